"""Run the points that a store lacks: group them by program, train each group in lanes, publish each as it ends."""

import functools
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from cdl.data.text import Corpus, batches, heldout_batches, read_corpus
from cdl.errors import UserError
from cdl.models import build as models
from cdl.optim import build as optimizers
from cdl.schedules import schedule
from cdl.sweep.grid import Point, expand
from cdl.sweep.store import Store
from cdl.train.loop import LaneStatus, Outcome, Run, train
from cdl.train.step import Program

__all__ = ["Listener", "check_lanes", "points_of", "program_for", "run_points", "use_cpu_cores"]

_BLOCK_BYTES = 4 << 20  # of batches in one dispatch and lane
_MOST_BLOCK = 64


class Listener(Protocol):
    """Who watches a sweep; see `cdl.progress`."""

    def start(self, todo: Sequence[Point], finished: int, lanes: int) -> None:
        """Training begins: points to run, number already there, lanes."""
        ...

    def block(self, lanes: Sequence[LaneStatus]) -> None:
        """Called a few times a second with what the lanes do."""
        ...

    def finished(self, point: Point, result: Mapping[str, Any]) -> None:
        """A point was published."""
        ...


def points_of(config: ConfigDict, changes: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of a grid, each checked: whatever can be wrong with one is said before any of them runs.

    Raises:
      UserError: see `expand`, and bad values anywhere in a point's config.
    """

    def fingerprint(c: ConfigDict) -> str:
        return _corpus(c.data.path, c.data.heldout).fingerprint

    points = expand(config, changes, fingerprint)
    if not points:
        raise UserError("the grid has no points; let sweep() return at least one")
    checked: set[str] = set()
    for point in points:
        _run_of(point)
        if point.program not in checked:
            _parts(point)
            checked.add(point.program)
    return points


def run_points(points: Sequence[Point], store: Store, listener: Listener, lanes: int | None = None) -> None:
    """Train every point that the store lacks; longest first, so that the lanes end together.

    Args:
      points: distinct, from `points_of`.
      store: opened for them.
      listener: told of progress.
      lanes: runs side by side, one per device if None; see `check_lanes`.
    """
    finished = store.ids()
    todo = [p for p in points if p.id not in finished]
    if not todo:
        return
    todo.sort(key=lambda p: -p.config.T)
    devices, R, at_once = _devices(lanes, len(todo))
    listener.start(todo, len(points) - len(todo), at_once)
    groups: dict[str, list[Point]] = {}
    for point in todo:
        groups.setdefault(point.program, []).append(point)
    for group in groups.values():
        program = program_for(group[0], R, devices)
        by_id = {p.id: p for p in group}
        for outcome in train(program, map(_run_of, group), listener.block, at_once):
            point = by_id[outcome.run.id]
            result = _result(point, outcome, program.n_params)
            store.write(point, outcome.curve, result)
            listener.finished(point, result)


def program_for(point: Point, lanes: int, devices: Sequence[jax.Device]) -> Program:
    """The program that runs this point and all points with an equal `program`."""
    model, optimizer, heldout = _parts(point)
    data = point.config.data
    block = min(_MOST_BLOCK, max(1, _BLOCK_BYTES // (data.batch_size * (data.seq_len + 1) * 2)))
    return Program(model, optimizer, heldout, lanes=lanes, devices=devices, block=block)


def use_cpu_cores() -> None:
    """Make a device of each CPU core, at least two; no effect on other backends.

    Small models leave most of a second core idle, a second run does not (experiments/benchmarks/lanes.py). Has to
    come before JAX is first used; later it changes nothing.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", max(2, cores))
    except RuntimeError:
        return  # JAX is in use already, as in a notebook: its devices are what there is


def check_lanes(lanes: int) -> None:
    """Can so many runs go side by side on this machine's devices?

    Raises:
      UserError: fewer than one; more than there are CPU devices, where lanes that share one would only change last
        bits; on other devices, more than there are and no multiple of them.
    """
    devices = jax.local_devices()
    if lanes < 1:
        raise UserError(f"--lanes={lanes} must be at least 1")
    if lanes > len(devices) and devices[0].platform == "cpu":
        raise UserError(f"--lanes={lanes} exceeds the number of CPU cores, {len(devices)}; use at most that many")
    if lanes > len(devices) and lanes % len(devices):
        raise UserError(f"--lanes={lanes} must be a multiple of the number of devices, {len(devices)}")


def _devices(lanes: int | None, runs: int) -> tuple[list[jax.Device], int, int]:
    """Devices to use, lanes on them, and how many of those to fill.

    On a CPU at least two devices, of which one may idle: XLA compiles a program for one device by another route than
    for several, with other last bits, and a run is to be the same alone and in company.
    """
    devices = jax.local_devices()
    at_once = lanes or min(len(devices), runs)
    check_lanes(at_once)
    R = max(at_once, min(2, len(devices))) if devices[0].platform == "cpu" else at_once
    return devices[:R], R, min(at_once, runs)


@functools.lru_cache(maxsize=4)
def _corpus(path: str, heldout: float) -> Corpus:
    return read_corpus(path, heldout)


@functools.lru_cache(maxsize=4)
def _largest_token(path: str, heldout: float) -> int:
    """Over all of the text, a piece at a time: it may be larger than memory."""
    piece, corpus = 1 << 24, _corpus(path, heldout)
    return max(int(t[i : i + piece].max()) for t in (corpus.train, corpus.heldout) for i in range(0, len(t), piece))


def _parts(point: Point) -> tuple[models.Model, Any, np.ndarray]:
    """Model, optimizer and held-out batches of a point; raises UserError where they do not fit together."""
    c = point.config
    model = models.build(c.model.to_dict())
    optimizer = optimizers.build(c.optimizer.to_dict())
    corpus = _corpus(c.data.path, c.data.heldout)
    if c.data.seq_len > c.model.context:
        raise UserError(f"data.seq_len={c.data.seq_len} exceeds model.context={c.model.context}; raise model.context")
    heldout = heldout_batches(corpus, c.data, c.eval.tokens)
    most = _largest_token(c.data.path, c.data.heldout)  # one beyond the vocabulary would read as NaN
    if most >= c.model.vocab_size:
        raise UserError(
            f"model.vocab_size={c.model.vocab_size} is too small for data.path={c.data.path!r}, which has token "
            f"{most}; use at least {most + 1}"
        )
    return model, optimizer, heldout


def _run_of(point: Point) -> Run:
    c = point.config
    if not 0 <= c.seed < 2**32:
        raise UserError(f"seed={c.seed} must be in [0, 2^32)")
    if not 0 < c.eta_ref < math.inf:
        raise UserError(f"eta_ref={c.eta_ref} must be a positive number")
    if c.eval.times < 1 or c.eval.tokens < 1:
        raise UserError(f"eval.times={c.eval.times} and eval.tokens={c.eval.tokens} must be at least 1")
    arguments = c.schedule.to_dict()
    eta_T = schedule(arguments.pop("name"), c.T, peak=c.eta_ref / max(c.T, 1) ** 0.5, **arguments)
    if not eta_T.any():
        raise UserError(f"schedule {c.schedule.name!r} has no positive rate at T={c.T}; use a longer T")
    times = min(c.eval.times, c.T)
    steps = sorted({max(1, round(c.T * i / times)) for i in range(1, times + 1)})
    corpus = _corpus(c.data.path, c.data.heldout)
    return Run(point.id, c.seed, eta_T, tuple(steps), batches(corpus, c.data, c.seed))


def _result(point: Point, outcome: Outcome, n_params: int) -> dict[str, Any]:
    """What result.json holds; None where a diverged run has no number."""
    c, curve = point.config, outcome.curve
    last = curve["train_loss"][-1 - max(1, c.T // 20) : -1]  # row T has none
    done = outcome.status == "done"
    steps = len(curve["step"]) - done
    tokens = steps * c.data.batch_size * c.data.seq_len
    return {
        "status": outcome.status,
        "loss": float(curve["eval_loss"][-1]) if done else None,
        "train_loss": float(np.mean(last)) if done else None,
        "diverged_at": outcome.diverged_at,
        "eta_peak": c.eta_ref / c.T**0.5,
        "n_params": n_params,
        "tokens": tokens,
        "seconds": round(outcome.seconds, 3),
        "tokens_per_s": round(tokens / max(outcome.seconds, 1e-9), 1),
        "device": jax.local_devices()[0].device_kind,
        "versions": {p: version(p) for p in ("cdl", "jax", "flax", "optax")} | {"python": platform.python_version()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
