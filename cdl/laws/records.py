"""Finished runs as one table of losses and rates, and as trajectories: the rate of every update, and losses.

`read_runs` reads what trainers leave behind (`cdl.laws.readers` has the formats), mends it and says what it mended.
`trajectories` turns such a table into what laws are fitted on. Steps are as in README, "Steps": a loss at step s is
that of the weights after s updates, and the rate at step s is that of update s.
"""

import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cdl.errors import UserError, unknown
from cdl.laws import readers
from cdl.laws.readers import OWN, Log, Source, count

__all__ = ["Trajectory", "read_runs", "short_names", "trajectories"]

# A change of the rate between two records is a jump where it is so many times as steep as those beside it.
JUMP = 10.0

Schedule = str | Path | np.ndarray


@dataclass(frozen=True)
class Trajectory:
    """What a law sees of a run.

    run: its name. eta_T: rate of every update, float64 [T]; T is the last step whose rate is known. step_P: steps with
    a loss, int64 [P], rising, within 1..T. loss_P: the losses, float64 [P], finite.
    """

    run: str
    eta_T: np.ndarray
    step_P: np.ndarray
    loss_P: np.ndarray


def read_runs(
    paths: Source | Iterable[Source],
    *,
    schedule: Schedule | Mapping[str, Schedule] | None = None,
    loss: str | None = None,
    warmup: int | None = None,
) -> pd.DataFrame:
    """Runs as one table, a row per step at which something is known.

    Args:
      paths: one or several of: a sweep's folder or one run's folder in it; CSV with columns step, lr, loss under the
        names that trainers use; W&B exports (JSON of a run, CSV of a chart or of a history); TensorBoard event files
        or a folder of logs, where each folder with event files is a run (needs the package tensorboard); a folder of
        CSV and JSON files; a pattern such as "logs/*.csv"; a DataFrame. Charts of the same run are put together.
      schedule: rates that replace recorded ones: an array [T], the text of a schedule ("cosine:T=24000,peak=3e-4") or
        of a file of rates, for every run; or a mapping from names of runs to these, where other runs keep theirs.
      loss: the column of losses. Without it, held-out losses come before training losses.
      warmup: number of updates of linear warm-up, for rates before the first recorded one: they rise to that over
        `warmup` updates and hold it. Without it they rise linearly up to the first record.

    Returns:
      Columns run (str), step (int64, from 1), eta and loss (float64), then the config of each run, scalars under their
      own names, or `config.x` where x is one of the four. Rows are by run in the order read, then by step. Where the
      loss is NaN only the rate is known, where eta is NaN only the loss. With `schedule` there is a row for every
      update. The run is called after the file (CSV), the folder (event files), or what the format says (JSON, charts,
      sweeps, a column `run`); runs of the same name get those of their folders in front: "25M/wsd", "100M/wsd".
      `table.attrs["notes"]` is a list of sentences "run: what was mended or assumed".

      Of duplicated steps the last row is kept; losses that are not finite, and rows at step 0, which is before the
      first update, are dropped and counted.

    Raises:
      UserError: no log of a run; columns missing or ambiguous; a step, rate or loss that cannot be one; no finite
        loss; a schedule shorter than the records; two runs that cannot be told apart.
    """
    if warmup is not None and not (isinstance(warmup, numbers.Integral) and warmup >= 0):
        raise UserError(f"warmup={warmup!r} must be a whole number of updates, 0 or more")
    if warmup is not None and schedule is not None:
        raise UserError(f"warmup={warmup} has no meaning beside a schedule, which has its own; leave one of them out")
    records, left_out = _read(paths, loss, schedule)
    for record in records:
        record.complete(warmup)
    table = pd.concat([r.table() for r in records], ignore_index=True)
    table.attrs["notes"] = [f"{r.run}: {note}" for r in records for note in r.notes] + left_out
    return table


def trajectories(runs: Source | Iterable[Source]) -> list[Trajectory]:
    """The rate of every update and the losses of each run, in the order of the runs.

    Rates between two records are interpolated linearly, and so is the rise from 0 to the first one. Where the rate
    jumps, the old rate is held until the record that shows the new one: a change between two records is a jump when it
    is more than ten times as steep as those before and after it. (After the last record the rate counts as constant.)

    Args:
      runs: a table of `read_runs`, whole, filtered or put together, or one made by hand; or what `read_runs` reads.

    Raises:
      UserError: as `read_runs`; a run without rates, or with losses later than its last known rate.
    """
    if isinstance(runs, pd.DataFrame) and set(OWN) <= set(runs.columns):
        runs = runs[list(OWN)]
    found = []
    for record in _read(runs)[0]:
        eta_T = _every_update(record.step_K, record.eta_K)
        if len(eta_T) < record.step_P[-1]:
            raise UserError(
                f"{record.where}: the schedule of {record.run} is shorter than its records: rates are known to step "
                f"{len(eta_T)}, losses to step {record.step_P[-1]}; give schedule= to read_runs, or drop the rest"
            )
        found.append(Trajectory(record.run, eta_T, record.step_P, record.loss_P))
    return found


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the words that all of them begin and end with.

    >>> short_names(["run_lr1_seed0", "run_lr2_seed0"])
    {'run_lr1_seed0': 'lr1', 'run_lr2_seed0': 'lr2'}
    """
    if len(set(names)) < 2:
        return {name: name for name in names}
    words = [name.split("_") for name in names]
    shortest = min(len(w) for w in words)
    start = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), shortest - 1)
    end = next((i for i in range(shortest - start) if len({w[-1 - i] for w in words}) > 1), 0)
    return {name: "_".join(w[start : len(w) - end]) for name, w in zip(names, words, strict=True)}


@dataclass
class _Record:
    """A run whose records are in order: losses at step_P, rates at step_K, each rising from 1."""

    run: str
    where: str
    step_P: np.ndarray
    loss_P: np.ndarray
    step_K: np.ndarray
    eta_K: np.ndarray
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def complete(self, warmup: int | None) -> None:
        """Say what is assumed about the rates that are not recorded; put in those of a warm-up."""
        first, gap = int(self.step_K[0]), np.diff(self.step_K)
        if len(gap) and gap.max() > 1:
            often = f"every {gap[0]} steps" if np.ptp(gap) == 0 else f"at most {gap.max()} steps apart"
            self.notes.append(f"rates are recorded {often} and interpolated between")
        if warmup is None and first > 1:
            self.notes.append(f"rates before step {first} are not recorded: taken as rising linearly from 0")
        elif warmup is not None and first > 1:
            rise = min(warmup, first)  # a first record inside the warm-up is on its way
            step = np.arange(1, max(rise, 1) + 1)
            new = step < first
            eta = self.eta_K[0] * (step / rise if rise else np.ones(1))
            self.step_K = np.concatenate([step[new], self.step_K])
            self.eta_K = np.concatenate([eta[new], self.eta_K])
            then = f", then constant to step {first}" if rise < first else ""
            self.notes.append(f"rates before step {first} are not recorded: {rise} updates of linear warm-up{then}")
        elif warmup is not None:
            self.notes.append(f"rates are recorded from step 1 on: warmup={warmup} is not needed")
        jump = np.flatnonzero(_jumps(self.step_K, self.eta_K) & (np.diff(self.step_K) > 1))
        if len(jump):
            (low, high), (old, new) = (x[jump[0] : jump[0] + 2] for x in (self.step_K, self.eta_K))
            often = f" {len(jump)} times, first" if len(jump) > 1 else ""
            self.notes.append(
                f"the rate jumps{often} from {old:.6g} at step {low} to {new:.6g} at {high}: held until then"
            )

    def table(self) -> pd.DataFrame:
        rates = pd.DataFrame({"step": self.step_K, "eta": self.eta_K})
        losses = pd.DataFrame({"step": self.step_P, "loss": self.loss_P})
        rows = rates.merge(losses, on="step", how="outer")  # by rising step
        return pd.DataFrame({"run": self.run} | {c: rows[c] for c in OWN[1:]} | self.config)


# From logs to records


def _read(
    paths: Source | Iterable[Source],
    loss: str | None = None,
    schedule: Schedule | Mapping[str, Schedule] | None = None,
) -> tuple[list[_Record], list[str]]:
    """The runs, and a sentence for each that diverged before its first loss."""
    logs = _told_apart(_together(readers.read_logs(paths)))
    given = _given_rates(schedule, [log.run for log in logs])
    records = [_record(log, loss, given.get(log.run)) for log in logs]
    found = [r for r in records if r is not None]
    if not found:
        raise UserError(f"{logs[0].where}: all runs diverged before their first loss; give others")
    gone = [log.run for log, record in zip(logs, records, strict=True) if record is None]
    return found, [f"{run}: diverged before its first loss, left out" for run in gone]


def _together(logs: list[Log]) -> list[Log]:
    """Charts of the same run as one log."""
    whole: list[Log] = []
    charts: dict[str, Log] = {}
    for log in logs:
        other = charts.get(log.run) if log.part else None
        if other is None:
            whole.append(log)
            if log.part:
                charts[log.run] = log
            continue
        twice = [name for name in log.series if name in other.series]
        if twice:
            raise UserError(f"{other.where} and {log.where} both have {twice[0]} of {log.run}; leave one out")
        other.series |= log.series
        other.notes += [note for note in log.notes if note not in other.notes]
    return whole


def _told_apart(logs: list[Log]) -> list[Log]:
    """The same logs; those that share a name get as many of their folders in front as it takes."""
    original = [log.run for log in logs]
    for depth in range(1, 64):
        count = Counter(log.run for log in logs)
        shared = [i for i, log in enumerate(logs) if count[log.run] > 1]
        if not shared:
            return logs
        for i in shared:
            file = logs[i].file
            # Of a folder, the run is its name; of a file, what it holds.
            folders = file.resolve().parent.parts[1:] if file else ()
            if depth > len(folders):
                raise UserError(f"two runs are called {original[i]}, one in {logs[i].where}; give them other names")
            logs[i].run = "/".join([*folders[-depth:], original[i]])
    raise UserError(f"two runs are called {original[0]}; give them other names")


def _record(log: Log, loss: str | None, schedule_T: np.ndarray | None) -> _Record | None:
    """A log put in order, with its own rates or those of a schedule; None where it diverged before its first loss."""
    where, notes = log.where, list(log.notes)
    name = _loss_column(log, loss, notes)
    step_N, values = log.series[name]
    loss_N = readers.numbers(values, name, where)
    finite_N = np.isfinite(loss_N)
    if not finite_N.all():
        notes.append(f"{count((~finite_N).sum(), 'row')} without a finite loss dropped")
    step_P, loss_P, mended = _in_order(step_N[finite_N], loss_N[finite_N])
    if len(step_P) and step_P[0] == 0:
        step_P, loss_P = step_P[1:], loss_P[1:]
        notes.append("the loss at step 0 dropped: it is before the first update")
    if len(step_P) == 0:
        if log.diverged:
            return None
        raise UserError(f"{where}: {log.run} has no finite loss in column {name} after step 0; leave it out")
    if schedule_T is not None:
        if len(schedule_T) < step_P[-1]:
            raise UserError(
                f"{where}: the schedule of {log.run} is shorter than its records: it has {len(schedule_T)} updates, "
                f"losses reach step {step_P[-1]}; give one of at least T={step_P[-1]}"
            )
        step_K, eta_K = np.arange(1, len(schedule_T) + 1), schedule_T
    else:
        step_K, eta_K, rates_mended = _recorded_rates(log)
        mended = np.maximum(mended, rates_mended)
    unsorted, duplicates = mended
    if unsorted:
        notes.append("rows were not sorted by step")
    if duplicates:
        notes.append(f"{count(duplicates, 'duplicated step')}, the last row kept")
    return _Record(log.run, where, step_P, loss_P, step_K, eta_K, log.config, notes)


def _recorded_rates(log: Log) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps from 1 on, their rates, and what `_in_order` says of the rows."""
    name = "eta"
    if log.loss != "loss":
        remedy = "keep one, or give schedule="
        name = readers.best_column(log.series, readers.rate_rank, log.where, "rates", remedy)
    step_N, values = log.series[name] if name else (np.empty(0, np.int64), [])
    eta_N = readers.numbers(values, str(name), log.where)
    known_N = ~np.isnan(eta_N)
    bad_N = known_N & ~((eta_N >= 0) & np.isfinite(eta_N))
    if bad_N.any():
        i = int(np.flatnonzero(bad_N)[0])
        raise UserError(f"{log.where}: the rate {eta_N[i]:g} at step {step_N[i]} is no rate; use finite ones from 0 on")
    step_K, eta_K, mended = _in_order(step_N[known_N], eta_N[known_N])
    updates = step_K > 0  # a rate at step 0 belongs to none
    if not updates.any():
        raise UserError(f"{log.where}: {log.run} has no rates; give schedule= to read_runs, or the log that has them")
    return step_K[updates], eta_K[updates], mended


def _loss_column(log: Log, loss: str | None, notes: list[str]) -> str:
    """The name of the losses. Says which was taken where there are held-out and training losses."""
    names, where = list(log.series), log.where
    if loss is not None:
        return readers.named_column(names, loss, where)
    if log.loss is not None:
        return log.loss
    best = readers.best_column(names, readers.loss_rank, where, "losses", "name one with loss=")
    if best is None:
        raise UserError(f"{where} has no column of losses; it has {', '.join(names) or 'none'}; name one with loss=")
    ranked = sorted((r, n) for n in names if (r := readers.loss_rank(n)) is not None)
    training = [n for (kind, *_), n in ranked if kind > 0]
    if training and best not in training:
        notes.append(f"the loss is {best}, held out; loss={training[0]!r} would be the other")
    return best


def _in_order(step_N: np.ndarray, value_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rising steps, the last value of each, and what was mended: (were they unsorted, how many were duplicates)."""
    unsorted = bool((step_N[1:] < step_N[:-1]).any())
    if unsorted:
        order = np.argsort(step_N, kind="stable")
        step_N, value_N = step_N[order], value_N[order]
    last_N = np.ones(len(step_N), bool)
    last_N[:-1] = step_N[1:] != step_N[:-1]
    return step_N[last_N], value_N[last_N], np.array([unsorted, (~last_N).sum()])


# Schedules


def _slopes(step_K: np.ndarray, eta_K: np.ndarray) -> np.ndarray:
    """Change of the rate per update before each record, [K], the first from 0 at step 0."""
    return np.diff(eta_K, prepend=0.0) / np.diff(step_K, prepend=0)


def _jumps(step_K: np.ndarray, eta_K: np.ndarray) -> np.ndarray:
    """Does the rate jump between record i and i+1? bool [K-1]."""
    steep_K = np.abs(_slopes(step_K, eta_K))
    after = np.append(steep_K[2:], [0.0] * (len(steep_K) > 1))
    return steep_K[1:] > JUMP * np.maximum(steep_K[:-1], after)


def _every_update(step_K: np.ndarray, eta_K: np.ndarray) -> np.ndarray:
    """The rate of each update up to the last record, float64 [T]; exact at records."""
    slope_K = _slopes(step_K, eta_K)
    slope_K[1:][_jumps(step_K, eta_K)] = 0.0
    gap_K = np.diff(step_K, prepend=0)
    before_K, step_before_K = np.append(0.0, eta_K[:-1]), np.append(0, step_K[:-1])
    past_T = np.arange(1, step_K[-1] + 1) - np.repeat(step_before_K, gap_K)
    eta_T = np.repeat(before_K, gap_K) + past_T * np.repeat(slope_K, gap_K)
    eta_T[step_K - 1] = eta_K
    return eta_T


def _given_rates(schedule: Schedule | Mapping[str, Schedule] | None, runs: list[str]) -> dict[str, np.ndarray]:
    """Run -> its given rates, [T] each."""
    if schedule is None:
        return {}
    if not isinstance(schedule, Mapping):
        eta_T = _rates(schedule)
        return dict.fromkeys(runs, eta_T)
    for run in schedule:
        if run not in runs:
            raise unknown("run", run, runs)
    return {run: _rates(value) for run, value in schedule.items()}


def _rates(schedule: Schedule) -> np.ndarray:
    if isinstance(schedule, str | Path):
        from cdl.theory.compare import read_rates  # loads jax

        eta_T, what = read_rates(str(schedule)), f"schedule={str(schedule)!r}"
    else:
        what = "schedule"
        try:
            eta_T = np.asarray(schedule, np.float64)
        except (TypeError, ValueError) as e:
            raise UserError(f"schedule={schedule!r} holds no rates; give an array, a text or a mapping") from e
    if eta_T.ndim != 1 or len(eta_T) == 0:
        raise UserError(f"{what} has shape {eta_T.shape}; give one rate for each update")
    bad_T = ~(np.isfinite(eta_T) & (eta_T >= 0))
    if bad_T.any():
        i = int(np.flatnonzero(bad_T)[0])
        raise UserError(f"{what} has the rate {eta_T[i]:g} at update {i + 1}; use finite rates from 0 on")
    return eta_T
