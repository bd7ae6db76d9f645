"""The one training loop: keeps the lanes of a `Program` full until every run has ended.

Step convention: row s of a curve is about the weights after s updates. `eval_loss` and `eval_accuracy` at row s are
theirs on the held-out batches; `train_loss` and `grad_norm` at row s are theirs on the batch of update s+1, the one
they are about to learn from; `eta` at row s is the rate of update s, which led there (0 at row 0). Row T has no
training batch and hence neither of these.

With several processes each runs this loop, and makes the same decisions at the same steps: they depend on numbers that
all of them read, among them each other's wishes to save or to stop.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from cdl.train.checkpoint import Checkpoints, Restored
from cdl.train.step import Evaluation, Program, StepMetrics, TrainState

__all__ = ["LaneStatus", "Outcome", "Run", "RunError", "Saving", "Stopped", "train"]

BLOCK_SECONDS = 0.25  # aim for one dispatch: long against its overhead, short for a person who watches
BLOCKS_IN_FLIGHT = 2  # dispatched but unread: the devices never wait for the host


class Stopped(Exception):
    """Training was asked to stop, and did, with every run saved."""


class RunError(Exception):
    """A run could not begin, or its batches could not be read. id: of the run. error: why."""

    def __init__(self, id: str, error: Exception):
        super().__init__(id, error)
        self.id, self.error = id, error


@contextlib.contextmanager
def _by(run: "Run") -> Iterator[None]:
    """What is raised in here is a matter of this run; what devices raise is of all that are on them."""
    try:
        yield
    except (RunError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise RunError(run.id, error) from error


@dataclass(frozen=True)
class Run:
    """What to train. id: a name. seed: of the weights. eta_T: float64 [T]. eval_steps: rising, the last is T.
    batches: from a number of updates s to the batches of updates s+1, s+2, ..., of this process's rows.
    initial: the parameters and statistics to start from, trees of NumPy arrays; None: drawn from the seed."""

    id: str
    seed: int
    eta_T: np.ndarray
    eval_steps: tuple[int, ...]
    batches: Callable[[int], Iterator[Any]]
    initial: Callable[[], tuple[Any, Any]] | None = None


class Saving(NamedTuple):
    """Where and when unfinished runs are saved.

    open: the checkpoints of a run that is to begin; if there are any, it goes on from the newest. None: it is not to be
      trained after all.
    seconds: between two saves of all runs, by the clock. steps: also after every so many updates of a run; 0: not.
    final: also after the last update, to keep what was trained.
    """

    open: Callable[[Run], Checkpoints | None]
    seconds: float
    steps: int
    final: bool

    def now(self, step: int, T: int) -> bool:
        """Is a run of T updates to be saved after this one?"""
        return self.final if step == T else self.steps > 0 and step % self.steps == 0


class Outcome(NamedTuple):
    """How a run ended.

    status: "done", or "diverged" where a loss was NaN or infinite; then the curve stops before that row.
    curve: arrays `step`, `eta`, `train_loss`, `grad_norm`, `eval_loss`, `eval_accuracy` of one length; NaN where
      nothing was measured.
    diverged_at: the row whose loss was not finite, or None.
    seconds: from the first dispatch to the last number read, beside the other lanes; compilation is before that, and
      time between a save and its restoring is left out.
    waited: seconds of these in which the devices had nothing to do because a batch was still being read.
    """

    run: Run
    status: str
    curve: dict[str, np.ndarray]
    diverged_at: int | None
    seconds: float
    waited: float


class LaneStatus(NamedTuple):
    """What one lane was doing when its numbers were last read.

    first, step: this block was updates first + 1 to step. eta, loss, grad_norm: of each of them, [step - first].
    evaluation: at `step`, or None. waited: see `Outcome`.
    """

    run: Run
    first: int
    step: int
    eta: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    evaluation: Evaluation | None
    waited: float


_BEFORE = ("train_loss", "grad_norm")  # rows 0 to s-1 are known after s updates
_AFTER = ("eval_loss", "eval_accuracy")  # rows 0 to s


@dataclass
class _Live:
    """A run that has not ended: how far it is dispatched, and its numbers as far as they are read."""

    run: Run
    checkpoints: Checkpoints | None
    started: float = field(default_factory=time.monotonic)
    step: int = 0
    ended: bool = False
    diverged_at: int | None = None
    waited: float = 0.0
    curve: dict[str, np.ndarray] = field(init=False)
    batches: Iterator[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.curve = {name: np.full(len(self.run.eta_T) + 1, np.nan) for name in (*_BEFORE, *_AFTER)}

    @property
    def T(self) -> int:
        return len(self.run.eta_T)

    def start(self, program: Program, lane: int) -> bool:
        """Is there a checkpoint to go on from? Then it is in the lane."""
        restored = self._restored(program, lane) if self.checkpoints and self.checkpoints.found() else None
        if restored:
            self.step = restored.step
            for name, values in self.curve.items():
                values[: len(restored.losses[name])] = restored.losses[name]
            seconds, self.waited = restored.losses["seconds"]
            self.started = time.monotonic() - seconds
        self.ended = self.step == self.T  # stopped after its last save and before its result was published
        if not self.ended:
            self.batches = self.run.batches(self.step)
        return restored is not None

    def _restored(self, program: Program, lane: int) -> Restored | None:
        assert self.checkpoints is not None
        read: list[Restored | None] = []

        def make(like: TrainState) -> TrainState | None:
            assert self.checkpoints is not None
            read.append(self.checkpoints.restore(like))
            return read[0].state if read[0] else None

        program.put_lane(lane, make)
        return read[0]

    def save(self, program: Program, lane: int) -> None:
        assert self.checkpoints is not None
        known = {name: self.curve[name][: self.step + (name in _AFTER)] for name in self.curve}
        seconds = np.array([time.monotonic() - self.started, self.waited])
        self.checkpoints.save(self.step, program.lane(lane), known | {"seconds": seconds})

    def to_next_pause(self, saving: Saving | None) -> int:
        """Steps to the next evaluation, or the next save where there is one every so many steps."""
        to_eval = next(s for s in self.run.eval_steps if s > self.step) - self.step
        return min(to_eval, saving.steps - self.step % saving.steps) if saving and saving.steps else to_eval


class _Block(NamedTuple):
    """One dispatch that is still to be read: lane -> (run, first step, number of steps); wishes: (save, stop).
    ended: lanes whose run had ended before, as was then seen."""

    spans: dict[int, tuple[_Live, int, int]]
    metrics_RxK: StepMetrics
    evaluated: list[int]
    evaluation_R: Evaluation | None
    wishes: Any
    ended: set[int]


def train(
    program: Program,
    runs: Iterable[Run],
    on_block: Callable[[list[LaneStatus]], None] | None = None,
    *,
    at_once: int | None = None,
    saving: Saving | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Train all runs, `at_once` at a time (as many as there are lanes if None); yields outcomes as they come.

    Runs start in the order given, each in the first lane that is free. What a run computes does not depend on the
    lanes beside it, nor on whether it was stopped and went on. `on_block` is called with the busy lanes about every
    `BLOCK_SECONDS`; `stop` is asked as often.

    Raises:
      Stopped: `stop` said so. With `saving`, all runs that have begun are on disk.
      RunError: from what a run raised that could not begin, or whose batches could not be read. Exception: what
        `saving.open` raised. With `saving`, and in a single process, all runs that have begun are on disk then, too.
    """
    waiting = deque(runs)
    lanes: list[_Live | None] = [None] * program.lanes
    unread: deque[_Block] = deque()
    pace = _Pace(program.block)
    saved_at = time.monotonic()
    while True:
        trouble: Exception | None = None
        outcomes: list[Outcome] = []
        due: dict[int, _Live] = {}  # lane -> run to be saved now
        try:
            outcomes += _refill(program, lanes, waiting, at_once or program.lanes, saving)
            batches = _read_batches(program, lanes, pace.steps(), saving, unread)
        except Exception as error:
            # Other processes do not know of it; and what devices hold after an error of theirs is not worth saving.
            if saving is None or jax.process_count() > 1 or isinstance(error, jax.errors.JaxRuntimeError):
                raise
            trouble, batches = error, None
        if batches:
            wishes = [saving is not None and time.monotonic() - saved_at > saving.seconds, stop()]
            unread.append(_dispatch(program, lanes, batches, wishes))
            for i, live in enumerate(lanes):
                if live and saving and saving.now(live.step, live.T):
                    due[i] = live
                if live and live.step == live.T:
                    lanes[i] = None  # all of it is dispatched; its numbers are on their way
        save, leave = False, trouble is not None
        in_flight = BLOCKS_IN_FLIGHT if (any(lanes) or waiting) and not due else 0
        while len(unread) > (0 if save or leave else in_flight):
            block = unread.popleft()
            outcomes += _read(block, lanes)
            pace.read(max(n for _, _, n in block.spans.values()))
            wished = np.asarray(block.wishes)
            save, leave = save or bool(wished[0]), leave or bool(wished[1])
            if on_block:
                on_block(_statuses(block))
        if saving:
            if save or leave:
                due |= {i: live for i, live in enumerate(lanes) if live}
                saved_at = time.monotonic()
            for i, live in due.items():
                if live.diverged_at is None:
                    live.save(program, i)
            for live in due.values():
                if live.checkpoints and (leave or live.ended):
                    live.checkpoints.wait()
        yield from outcomes
        if trouble:
            raise trouble
        if not (waiting or any(lanes)):
            return
        if leave:
            raise Stopped


def _refill(
    program: Program, lanes: list[_Live | None], waiting: deque[Run], at_once: int, saving: Saving | None
) -> list[Outcome]:
    """Start runs in free lanes; returns those that turn out to have ended before they were interrupted."""
    fresh: dict[int, _Live] = {}
    outcomes: list[Outcome] = []
    for i in range(at_once):
        while lanes[i] is None and i not in fresh and waiting:
            run = waiting.popleft()
            checkpoints = saving.open(run) if saving else None
            if saving and not checkpoints:
                continue
            live = _Live(run, checkpoints)
            with _by(run):
                there = live.start(program, i)
            if not there:
                fresh[i] = live
            elif live.ended:
                outcomes.append(_outcome(live))
            else:
                lanes[i] = live
    if fresh:
        program.fill({i: live.run.seed for i, live in fresh.items()})
    for i, live in fresh.items():
        if live.run.initial:
            with _by(live.run):
                weights = live.run.initial()
            program.put_weights(i, *weights)
    for i, live in fresh.items():
        lanes[i] = live
    return outcomes


class _Batches(NamedTuple):
    """steps: of each row of the mesh. eta_RxK, batch_RxK: what they take."""

    steps: list[int]
    eta_RxK: np.ndarray
    batch_RxK: Any


def _read_batches(
    program: Program, lanes: list[_Live | None], most: int, saving: Saving | None, unread: deque[_Block]
) -> _Batches | None:
    """The next steps of every row of the mesh: none beyond the next evaluation or save of any of its lanes."""
    R, K = program.lanes, program.block
    per_row = R // program.rows
    steps = [0] * program.rows
    for d in range(program.rows):
        busy = [live for live in lanes[d * per_row : (d + 1) * per_row] if live]
        steps[d] = min([most, *(live.to_next_pause(saving) for live in busy)]) if busy else 0
    if not any(steps):
        return None
    eta_RxK = np.zeros((R, K))
    batch_RxK: Any = None
    began = time.monotonic()
    for i, live in enumerate(lanes):
        if live is None:
            continue
        n, first = steps[i // per_row], live.step
        eta_RxK[i, :n] = live.run.eta_T[first : first + n]
        for k in range(n):
            with _by(live.run):
                batch = next(live.batches)
            if batch_RxK is None:
                batch_RxK = jax.tree.map(lambda x: np.zeros((R, K, *x.shape), x.dtype), batch)
            for all_RxK, one in zip(jax.tree.leaves(batch_RxK), jax.tree.leaves(batch), strict=True):
                all_RxK[i, k] = one
    # Were the devices done before the batches were there?
    if not unread or unread[-1].metrics_RxK.loss.is_ready():  # pyrefly: ignore[missing-attribute]
        for live in lanes:
            if live:
                live.waited += time.monotonic() - began
    return _Batches(steps, eta_RxK, batch_RxK)


def _dispatch(program: Program, lanes: list[_Live | None], batches: _Batches, wishes: list[bool]) -> _Block:
    """Send every row of the mesh its next steps."""
    per_row = program.lanes // program.rows
    spans, evaluated = {}, []
    for i, live in enumerate(lanes):
        if live:
            n = batches.steps[i // per_row]
            spans[i] = (live, live.step, n)
            live.step += n
            if live.step in live.run.eval_steps:
                evaluated.append(i)
    metrics_RxK = program.train(batches.batch_RxK, batches.eta_RxK, batches.steps)
    evaluation_R = program.evaluate(evaluated) if evaluated else None
    return _Block(spans, metrics_RxK, evaluated, evaluation_R, program.agree(np.array(wishes)), set())


def _read(block: _Block, lanes: list[_Live | None]) -> Iterator[Outcome]:
    """Wait for a block's numbers; end the runs that they end."""
    before = dict(zip(_BEFORE, (_local(x) for x in block.metrics_RxK), strict=True))
    after = dict(zip(_AFTER, (_local(x) for x in block.evaluation_R), strict=True)) if block.evaluation_R else {}
    for i, (live, first, n) in block.spans.items():
        if live.ended:
            block.ended.add(i)  # it diverged in an earlier block
            continue
        for name, values_RxK in before.items():
            live.curve[name][first : first + n] = values_RxK[i, :n]
        broken = [first + int(k) for k in np.flatnonzero(~np.isfinite(before["train_loss"][i, :n]))[:1]]
        if i in block.evaluated:
            for name, values_R in after.items():
                live.curve[name][first + n] = values_R[i]
            if not broken and not np.isfinite(after["eval_loss"][i]):
                broken = [first + n]
        if broken or first + n == live.T:
            live.ended, live.diverged_at = True, broken[0] if broken else None
            if lanes[i] is live:
                lanes[i] = None
            yield _outcome(live)


def _outcome(live: _Live) -> Outcome:
    rows = slice(0, live.diverged_at)  # None: all of them
    steps = {"step": np.arange(live.T + 1), "eta": np.concatenate([[0.0], live.run.eta_T])}
    curve = {name: values[rows] for name, values in (steps | live.curve).items()}
    status = "done" if live.diverged_at is None else "diverged"
    return Outcome(live.run, status, curve, live.diverged_at, time.monotonic() - live.started, live.waited)


def _statuses(block: _Block) -> list[LaneStatus]:
    """Of the block's lanes, without runs that had diverged before."""
    statuses = []
    for i, (live, first, n) in block.spans.items():
        if i in block.ended:
            continue
        rows, step = slice(first, first + n), first + n
        evaluation = Evaluation(*(live.curve[name][step] for name in _AFTER)) if i in block.evaluated else None
        loss, grad_norm = (live.curve[name][rows] for name in _BEFORE)
        statuses.append(
            LaneStatus(live.run, first, step, live.run.eta_T[rows], loss, grad_norm, evaluation, live.waited)
        )
    return statuses


def _local(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


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
