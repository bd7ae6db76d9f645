"""The one training loop: keeps the lanes of a `Program` full until every run has ended.

Step convention: row s of a curve is about the weights after s updates. `eval_loss` at row s is their held-out loss;
`train_loss` at row s is their loss on the batch of update s+1, the one they are about to learn from; `eta` at row s
is the rate of update s, which led there (0 at row 0). Row T has no training batch and hence no training loss.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from cdl.train.step import Program

__all__ = ["LaneStatus", "Outcome", "Run", "train"]

BLOCK_SECONDS = 0.25  # aim for one dispatch: long against its overhead, short for a person who watches
BLOCKS_IN_FLIGHT = 2  # dispatched but unread: the devices never wait for the host


@dataclass(frozen=True)
class Run:
    """What to train. id: a name. seed: of the weights. eta_T: float64 [T]. eval_steps: rising, the last is T.
    batches: batches[k-1] is the batch of update k."""

    id: str
    seed: int
    eta_T: np.ndarray
    eval_steps: tuple[int, ...]
    batches: Any


class Outcome(NamedTuple):
    """How a run ended.

    status: "done", or "diverged" where a loss was NaN or infinite; then the curve stops before that row.
    curve: arrays `step`, `eta`, `train_loss`, `eval_loss` of one length; NaN where nothing was measured.
    diverged_at: the row whose loss was not finite, or None.
    seconds: from the first dispatch to the last number read, beside the other lanes; compilation is before that.
    """

    run: Run
    status: str
    curve: dict[str, np.ndarray]
    diverged_at: int | None
    seconds: float


class LaneStatus(NamedTuple):
    """What one lane was doing when its numbers were last read."""

    run: Run
    step: int
    eta: float
    loss: float


@dataclass
class _Live:
    """A run that has not ended: how far it is dispatched, and its losses as far as they are read."""

    run: Run
    started: float
    step: int = 0
    ended: bool = False
    train_loss: np.ndarray = field(init=False)
    eval_loss: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.train_loss = np.full(len(self.run.eta_T) + 1, np.nan)
        self.eval_loss = np.full(len(self.run.eta_T) + 1, np.nan)

    def to_next_eval(self) -> int:
        return next(s for s in self.run.eval_steps if s > self.step) - self.step


class _Block(NamedTuple):
    """One dispatch that is still to be read: lane -> (run, first step, number of steps)."""

    spans: dict[int, tuple[_Live, int, int]]
    loss_RxK: jax.Array
    evaluated: list[int]
    eval_loss_R: jax.Array | None


def train(
    program: Program,
    runs: Iterable[Run],
    on_block: Callable[[list[LaneStatus]], None] | None = None,
    at_once: int | None = None,
) -> Iterator[Outcome]:
    """Train all runs, `at_once` at a time (as many as there are lanes if None); yields outcomes as they come.

    Runs start in the order given, each in the first lane that is free. What a run computes does not depend on the
    lanes beside it. `on_block` is called with the busy lanes about every `BLOCK_SECONDS`.
    """
    waiting = deque(runs)
    if waiting:
        program.compile(waiting[0].batches[0])
    lanes: list[_Live | None] = [None] * program.lanes
    unread: deque[_Block] = deque()
    pace = _Pace(program.block)
    while True:
        _refill(program, lanes, waiting, at_once or program.lanes)
        if any(lanes):
            unread.append(_dispatch(program, lanes, pace.steps()))
            for i, live in enumerate(lanes):
                if live and live.step == len(live.run.eta_T):
                    lanes[i] = None  # all of it is dispatched; its numbers are on their way
        while len(unread) > (BLOCKS_IN_FLIGHT if any(lanes) or waiting else 0):
            block = unread.popleft()
            yield from _read(block, lanes)
            pace.read(max(n for _, _, n in block.spans.values()))
            if on_block:
                spans = [s for s in block.spans.values() if not s[0].ended or s[1] + s[2] == len(s[0].run.eta_T)]
                on_block([_status(live, first + n) for live, first, n in spans])
        if not (waiting or any(lanes)):
            return


def _refill(program: Program, lanes: list[_Live | None], waiting: deque[Run], at_once: int) -> None:
    seeds = {}
    for i in range(at_once):
        if lanes[i] is None and waiting:
            run = waiting.popleft()
            lanes[i], seeds[i] = _Live(run, time.monotonic()), run.seed
    if seeds:
        program.fill(seeds)


def _dispatch(program: Program, lanes: list[_Live | None], most: int) -> _Block:
    """Send every device its next steps: none beyond the next evaluation of any of its lanes."""
    R, K = program.lanes, program.block
    per_device = R // program.devices
    steps_D = np.zeros(program.devices, int)
    for d in range(program.devices):
        busy = [live for live in lanes[d * per_device : (d + 1) * per_device] if live]
        steps_D[d] = min([most, *(live.to_next_eval() for live in busy)]) if busy else 0
    eta_RxK = np.zeros((R, K))
    batch_RxK: np.ndarray | None = None
    spans, evaluated = {}, []
    for i, live in enumerate(lanes):
        if live is None:
            continue
        n, first = int(steps_D[i // per_device]), live.step
        eta_RxK[i, :n] = live.run.eta_T[first : first + n]
        for k in range(n):
            batch = live.run.batches[first + k]
            if batch_RxK is None:
                batch_RxK = np.zeros((R, K, *batch.shape), batch.dtype)
            batch_RxK[i, k] = batch
        spans[i] = (live, first, n)
        live.step = first + n
        if live.step in live.run.eval_steps:
            evaluated.append(i)
    assert batch_RxK is not None  # a busy lane takes at least one step
    loss_RxK = program.train(batch_RxK, eta_RxK, steps_D)
    return _Block(spans, loss_RxK, evaluated, program.evaluate(evaluated) if evaluated else None)


def _read(block: _Block, lanes: list[_Live | None]) -> Iterator[Outcome]:
    """Wait for a block's numbers; end the runs that they end."""
    loss_RxK = np.asarray(block.loss_RxK, np.float64)
    eval_loss_R = None if block.eval_loss_R is None else np.asarray(block.eval_loss_R, np.float64)
    for i, (live, first, n) in block.spans.items():
        if live.ended:
            continue  # it diverged in an earlier block
        live.train_loss[first : first + n] = loss_RxK[i, :n]
        broken = [first + int(k) for k in np.flatnonzero(~np.isfinite(loss_RxK[i, :n]))[:1]]
        if i in block.evaluated and eval_loss_R is not None:
            live.eval_loss[first + n] = eval_loss_R[i]
            if not broken and not np.isfinite(eval_loss_R[i]):
                broken = [first + n]
        if broken or first + n == len(live.run.eta_T):
            live.ended = True
            if lanes[i] is live:
                lanes[i] = None
            yield _outcome(live, broken[0] if broken else None)


def _outcome(live: _Live, diverged_at: int | None) -> Outcome:
    rows = slice(0, diverged_at)  # None: all of them
    curve = {
        "step": np.arange(len(live.train_loss))[rows],
        "eta": np.concatenate([[0.0], live.run.eta_T])[rows],
        "train_loss": live.train_loss[rows],
        "eval_loss": live.eval_loss[rows],
    }
    status = "done" if diverged_at is None else "diverged"
    return Outcome(live.run, status, curve, diverged_at, time.monotonic() - live.started)


def _status(live: _Live, step: int) -> LaneStatus:
    return LaneStatus(live.run, step, float(live.run.eta_T[step - 1]), float(live.train_loss[step - 1]))


class _Pace:
    """How many steps make a block of `BLOCK_SECONDS`, learned from the blocks read so far."""

    def __init__(self, most: int):
        self._most, self._steps = most, 1.0
        self._last: float | None = None

    def steps(self) -> int:
        return int(min(max(self._steps, 1), self._most))

    def read(self, n: int) -> None:
        now = time.monotonic()
        if self._last is not None:
            wanted = n * BLOCK_SECONDS / max(now - self._last, 1e-6)
            self._steps += 0.5 * (min(wanted, self._most) - self._steps)
        self._last = now
