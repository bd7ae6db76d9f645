"""Logs of runs as trainers leave them, each read into a `Log`: what was recorded, and at which steps.

A format is recognised by what a file or folder holds. Which of its columns are the step, the rate and the loss is
decided by the words in their names: `step_rank`, `rate_rank`, `loss_rank`. Nothing is mended here but rows without a
step; that is up to `cdl.laws.records`.
"""

import glob
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cdl.errors import UserError, unknown

__all__ = ["OWN", "Log", "Source", "best_column", "loss_rank", "named_column", "rate_rank", "read_logs"]

Source = str | Path | pd.DataFrame
Series = tuple[np.ndarray, Any]  # steps int64 [N] and what was recorded there [N], as found

MOST_STEPS = 10**8  # as in `cdl.schedules`: the rates of a run are a table of all steps
OWN = ("run", "step", "eta", "loss")  # columns of a table that `read_runs` made: with all four, no name is looked for
_HELD_OUT = {"val", "valid", "validation", "eval", "evaluation", "test", "dev", "heldout", "held", "holdout"}
_TRAINING = {"train", "training"}
_STEP = {"step", "steps", "iter", "iters", "iteration", "iterations", "update", "updates"}
_STEP |= {f"{word}_step" for word in ("global", "train", "training", "optimizer")}
# With one of these words a name means something that is derived from the loss or the rate.
_DERIVED = {"best", "min", "max", "std", "scale", "weight", "coef", "ratio", "mult", "multiplier", "factor", "decay"}
_DERIVED |= {"warmup", "peak", "base", "initial", "ref"}
_NO_NUMBER = {"", "nan", "none", "null"}  # what a cell without a number is written as


@dataclass
class Log:
    """One run as it was found.

    where: names it in messages. file: what it was read from, None for a DataFrame. series: name -> steps and values.
    config: flat scalars. loss: which series is the loss, where the format says so. notes: what was mended.
    part: one chart of a run, to be put together with the others. diverged: the run ended so.
    """

    run: str
    where: str
    file: Path | None
    series: dict[str, Series]
    config: dict[str, Any] = field(default_factory=dict)
    loss: str | None = None
    notes: list[str] = field(default_factory=list)
    part: bool = False
    diverged: bool = False


def read_logs(sources: Source | Iterable[Source]) -> list[Log]:
    """The logs in files, folders, patterns of file names and DataFrames, in that order; a file named twice counts once.

    Raises:
      UserError: nothing there, or nothing that is a log of a run.
    """
    given = [sources] if isinstance(sources, str | Path | pd.DataFrame) else list(sources)
    if not given:
        raise UserError("no runs are given; give a file, a folder or a DataFrame")
    logs: list[Log] = []
    seen: set[tuple[Path, str]] = set()
    for i, source in enumerate(given, start=1):
        if isinstance(source, pd.DataFrame):
            where = "the DataFrame" if len(given) == 1 else f"DataFrame {i}"
            logs += _table(source, where, None, f"run{i}")
            continue
        if not isinstance(source, str | Path):
            raise UserError(f"runs cannot be read from {source!r}; give a file, a folder or a DataFrame")
        for log in (log for path in _paths(str(source)) for log in _found(path)):
            key = (log.file.resolve() if log.file else Path(), log.run)
            if key not in seen:
                seen.add(key)
                logs.append(log)
    return logs


def count(n: int, noun: str) -> str:
    """A number and its noun: 1 row, 2 rows."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# Names of columns


def _words(name: str) -> set[str]:
    """The words of a name, whatever separates them: val/loss, val_loss, "Val Loss", valLoss."""
    return set(re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()))


def step_rank(name: str) -> tuple[int, ...] | None:
    """How well a name fits a column of steps: lower is better, None not at all. W&B's own count comes last."""
    name = name.strip().lower().replace(" ", "_")
    if name == "_step":
        return (2,)
    return (0,) if name in _STEP else (1,) if re.split(r"[/.]", name)[-1] in _STEP else None


def rate_rank(name: str) -> tuple[int, ...] | None:
    """How well a name fits a column of learning rates: eta, lr, learning_rate, train/lr, lr-AdamW, in this order."""
    words = _words(name)
    rest = words - {"eta", "lr", "learning", "rate"} - _TRAINING
    if words & _DERIVED or not ("lr" in words or {"learning", "rate"} <= words or ("eta" in words and not rest)):
        return None
    return (len(rest),)


def loss_rank(name: str) -> tuple[int, ...] | None:
    """How well a name fits a column of losses: held-out (0, ..), loss (1, 0), training (2, 0), others (3, ..)."""
    words = _words(name)
    if "loss" not in words or words & _DERIVED:
        return None
    rest = len(words - {"loss", "out"} - _HELD_OUT - _TRAINING)
    if words & _HELD_OUT:
        return (0, rest)
    return (3, rest) if rest else (2 if words & _TRAINING else 1, 0)


def best_column(
    names: Iterable[str], rank: Callable[[str], tuple[int, ...] | None], where: str, what: str, remedy: str
) -> str | None:
    """The name that fits best, None if none does.

    Raises:
      UserError: two fit equally well; `what` they are and the `remedy` are named.
    """
    ranked = sorted((r, name) for name in names if (r := rank(name)) is not None)
    best = [name for r, name in ranked if r == ranked[0][0]]
    if len(best) > 1:
        raise UserError(f"{where} has {len(best)} columns of {what}, {', '.join(best)}; {remedy}")
    return best[0] if best else None


def named_column(names: Iterable[str], name: str, where: str) -> str:
    """The column that a user named, in full or by its last part, in upper or lower case."""
    names = list(names)
    exact = [n for n in names if n.lower() == name.lower()]
    found = exact or [n for n in names if re.split(r"[/.]", n.lower())[-1] == name.lower()]
    if not found:
        raise UserError(f"{where}: {unknown('column', name, names)}")
    if len(found) > 1:
        raise UserError(f"{where} has {len(found)} columns {name!r}, {', '.join(found)}; give the name in full")
    return found[0]


# Numbers


def numbers(values: Any, name: str, where: str) -> np.ndarray:
    """float64 [N]; NaN where there is none.

    Raises:
      UserError: a cell is something else.
    """
    column = pd.Series(values)
    if not pd.api.types.is_numeric_dtype(column.dtype):
        text = column.astype(str).str.strip().str.lower()
        column, given = pd.to_numeric(column, errors="coerce"), column
        bad = column.isna() & ~given.isna() & ~text.isin(_NO_NUMBER)
        if bad.any():
            raise UserError(f"{where}: {given[bad].iloc[0]!r} in column {name} is no number; mend or remove it")
    return np.asarray(column.to_numpy(np.float64, na_value=np.nan))


def _steps(values: Any, name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have a step, bool [N], and the steps of those, int64."""
    step_N = numbers(values, name, where)
    known_N = ~np.isnan(step_N)
    step_N = step_N[known_N]
    bad_N = ~((step_N >= 0) & (step_N <= MOST_STEPS) & (step_N == np.floor(step_N)))
    if bad_N.any():
        raise UserError(
            f"{where}: step {step_N[bad_N][0]:.15g} is no number of updates; give whole ones to {MOST_STEPS:.0e}"
        )
    return known_N, step_N.astype(np.int64)


# Formats


def _paths(text: str) -> list[Path]:
    path = Path(text).expanduser()
    if path.exists():
        return [path]
    found = [Path(f) for f in sorted(glob.glob(str(path), recursive=True))] if glob.has_magic(text) else []
    if not found:
        raise UserError(f"{text} does not exist; give a file, a folder or a pattern such as 'logs/*.csv'")
    return found


def _found(path: Path) -> list[Log]:
    return _folder(path) if path.is_dir() else _file(path)


def _folder(path: Path) -> list[Log]:
    """A sweep, a point of one, a folder of event files, or one of CSV and JSON files."""
    if (path / "point.json").is_file():
        return _point(path)
    if (path / "sweep.json").is_file():
        points = [f for f in _visible(path.iterdir()) if (f / "point.json").is_file()]
        if not points:
            raise UserError(f"{path} is a sweep without a finished run; run it with cdl sweep --out={path}")
        return [log for f in points for log in _point(f)]
    files = [f for f in _visible(path.iterdir()) if f.suffix.lower() in (".csv", ".json") and f.is_file()]
    events = sorted({f.parent for f in _visible(path.rglob("*tfevents*"), path)})
    if path in events or (events and not files):
        return [log for folder in events for log in _events(folder)]
    if not files:
        raise UserError(f"{path} holds no run; give a sweep, a folder of CSV, JSON or event files, or a pattern")
    return [log for f in files for log in _file(f)]


def _visible(files: Iterable[Path], root: Path | None = None) -> Iterator[Path]:
    """Sorted, without what lies hidden or half-written under a name with a dot."""
    for f in sorted(files):
        if not any(part.startswith(".") for part in (f.relative_to(root).parts if root else (f.name,))):
            yield f


def _file(path: Path) -> list[Log]:
    if "tfevents" in path.name:
        return _events(path.parent)  # a run that was taken up again has several
    try:
        with path.open("rb") as f:
            head = f.read(4096)
        if not head.strip():
            raise UserError(f"{path} is empty; give the log of a run")
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
            return [_json(path)]
        frame = pd.read_csv(path, low_memory=False)
        for column in (c for c in frame.columns if c.strip().lower() == "run"):  # 007 is a name, and so is NA
            frame[column] = pd.read_csv(path, usecols=[column], dtype=str, keep_default_na=False)[column]
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path} is no log of a run ({reason}); give CSV, a JSON export of W&B or event files") from e
    return _table(frame, str(path), path, path.stem)


def _table(frame: pd.DataFrame, where: str, file: Path | None, run: str) -> list[Log]:
    """Rows of steps: one run, several by a column `run`, or one chart of several runs as W&B exports it."""
    frame = frame.rename(columns=lambda c: str(c).strip())
    names = [c for c in frame.columns if not c.startswith("Unnamed: ")]
    if len(set(names)) < len(names):
        raise UserError(f"{where} has two columns of the same name; it has {', '.join(names)}")
    chart = len(names) > 1 and all(" - " in c for c in names[1:])
    own = set(OWN) <= set(names)
    step = "step" if own else best_column(names[:1] if chart else names, step_rank, where, "steps", "call one step")
    if step is None:
        raise UserError(f"{where} has no column of steps; it has {', '.join(names)}; call one step")
    if frame.empty:
        raise UserError(f"{where} has no rows; give the log of a run")
    known_N, step_N = _steps(frame[step], step, where)
    frame = frame[known_N]
    notes = [f"{count((~known_N).sum(), 'row')} without a step dropped"] if not known_N.all() else []
    if step == "_step":
        notes.append("steps are those of W&B, _step: the number of calls of its log before")
    if chart:
        return _charts(frame, step_N, where, file, notes)
    run_column = next((c for c in names if c.lower() == "run"), None)
    groups: Mapping[Hashable, Any] = {run: slice(None)}
    if run_column is not None:
        if (frame[run_column].isna() | (frame[run_column] == "")).any():
            raise UserError(f"{where} has rows without a name in column {run_column}; fill it")
        codes, runs = pd.factorize(frame[run_column])  # in the order they come
        code_N = np.asarray(codes)
        rows_of = np.split(np.argsort(code_N, kind="stable"), np.cumsum(np.bincount(code_N))[:-1])
        groups = dict(zip(runs, rows_of, strict=True))
    measured = OWN[2:] if own else [c for c in names if rate_rank(c) or loss_rank(c)]
    rest = [c for c in names if c not in (*measured, step, run_column) and (own or step_rank(c) is None)]
    found = []
    for name, rows in groups.items():
        part, part_step_N = frame.iloc[rows], step_N[rows]
        log = Log(str(name), where, file, {c: (part_step_N, part[c]) for c in measured}, notes=list(notes))
        if "_step" in names:  # a row of W&B holds what one call logged; a blank is no record
            log.series = {c: _recorded(part_step_N, part[c]) for c in measured}
        constant = [c for c in rest if _constant(part[c])]
        log.config = _config({c: part[c].iloc[0] for c in constant})
        log.loss = "loss" if own else None
        found.append(log)
    return found


def _constant(column: pd.Series) -> bool:
    first = column.iloc[0]
    return bool(pd.api.types.is_scalar(first) and not pd.isna(first) and (column == first).all())


def _recorded(step_N: np.ndarray, values: pd.Series) -> Series:
    known_N = values.notna().to_numpy()
    return step_N[known_N], values[known_N]


def _charts(frame: pd.DataFrame, step_N: np.ndarray, where: str, file: Path | None, notes: list[str]) -> list[Log]:
    """W&B's export of a chart: columns "<run> - <metric>", and the same with __MIN and __MAX, which are left out."""
    logs: dict[str, Log] = {}
    for column in frame.columns[1:]:
        run, _, metric = column.rpartition(" - ")
        if not metric.startswith("_") and not metric.endswith(("__MIN", "__MAX")):
            log = logs.setdefault(run, Log(run, where, file, {}, notes=list(notes), part=True))
            log.series[metric] = _recorded(step_N, frame[column])
    return list(logs.values())


def _json(path: Path) -> Log:
    """W&B's export of a run: name, config, and history with a table of equally long lists in each group."""
    try:
        data = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is damaged JSON ({e}); export it again") from e
    if not isinstance(data, dict) or not isinstance(data.get("history"), dict):
        raise UserError(f"{path} is JSON without a 'history' of a run; give W&B's export, or CSV")
    log = Log(str(data.get("name") or path.stem), str(path), path, {}, _config(data.get("config") or {}))
    for group, table in data["history"].items():
        where = f"{path}, history.{group}"
        lists = {k: v for k, v in table.items() if isinstance(v, list)} if isinstance(table, dict) else {}
        step = best_column(lists, step_rank, where, "steps", "keep one")
        if step is None:
            continue
        known_N, step_N = _steps(lists[step], step, where)
        for name, values in lists.items():
            if (rate_rank(name) or loss_rank(name)) and values:
                if len(values) != len(known_N):
                    raise UserError(f"{where}: {name} has {len(values)} values for {len(known_N)} steps; export again")
                log.series[f"{group}/{name}"] = (step_N, pd.Series(values)[known_N.tolist()])
    return log


def _point(folder: Path) -> list[Log]:
    """A finished run of a sweep of ours (see `cdl.sweep.store`)."""
    try:
        point, result = (json.loads((folder / name).read_text()) for name in ("point.json", "result.json"))
        curve = pd.read_parquet(folder / "curve.parquet")
        step_N, config, diverged = np.asarray(curve["step"], np.int64), point["config"], result["status"] == "diverged"
        # Not every step is evaluated: a blank is no record.
        series = {c: _recorded(step_N, curve[c]) for c in ("eta", "eval_loss", "train_loss")}
    except (OSError, ValueError, KeyError, TypeError) as e:  # pyarrow's errors are among them
        raise UserError(f"{folder} is damaged ({e}); remove it and run the sweep again") from e
    log = Log(folder.resolve().name, str(folder), folder, series, _config(config), "eval_loss", diverged=diverged)
    if diverged:
        log.notes.append(f"diverged; read up to step {step_N.max(initial=0)}")
    return [log]


def _config(values: Any) -> dict[str, Any]:
    """The scalars, under names that differ from those of the table."""
    if not isinstance(values, Mapping):  # somebody else's JSON
        return {}
    scalars = {str(k): v for k, v in values.items() if pd.api.types.is_scalar(v) and not pd.isna(v)}
    return {f"config.{k}" if k in OWN else k: v for k, v in scalars.items()}


def _events(path: Path) -> list[Log]:
    """TensorBoard's event files of one run: all in its folder."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as e:
        raise UserError(f"{path} is a log of TensorBoard; pip install tensorboard to read it") from e
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    log = Log(path.resolve().name, str(path), path, {})
    tags: Any = events.Tags()
    for tag in tags["scalars"]:
        records = events.Scalars(tag)
        log.series[tag] = (_steps([r.step for r in records], tag, str(path))[1], [r.value for r in records])
    for tag in tags["tensors"]:  # scalars of TensorFlow 2
        records = events.Tensors(tag)
        values = [make_ndarray(r.tensor_proto).ravel() for r in records]
        if (rate_rank(tag) or loss_rank(tag)) and all(len(v) == 1 for v in values):
            log.series[tag] = (_steps([r.step for r in records], tag, str(path))[1], np.concatenate(values))
    if not log.series:
        raise UserError(f"{path} holds no scalars; give a folder of event files with a loss")
    return [log]
