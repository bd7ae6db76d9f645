"""Run the points that a store lacks: group them by program, train each group in lanes, publish each as it ends.

With several processes (`jax.distributed`) all of them run every point together, on one mesh; the first one writes.
"""

import contextlib
import functools
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from cdl.data import build as data
from cdl.errors import UserError, say
from cdl.machine import processor
from cdl.sweep import initial
from cdl.sweep.claims import Worker
from cdl.sweep.grid import Point
from cdl.sweep.layout import Layout
from cdl.sweep.probe import choose_layout
from cdl.sweep.programs import compiled, eta_of, eval_steps, step_cost
from cdl.sweep.store import MOST_CRASHES, MOST_DEATHS, Claim, Store
from cdl.train.checkpoint import Checkpoints
from cdl.train.distributed import in_first_process, on_all_processes, over_processes
from cdl.train.flops import Speed, StepCost, mfu
from cdl.train.loop import LaneStatus, Outcome, Run, RunError, Saving, Stopped, train
from cdl.train.step import Program

__all__ = ["Listener", "environment", "run_points"]

_TELL_SECONDS = 1.0  # between two things that a process tells of itself
_WAIT_SECONDS = 1.0  # until it is asked again whether another process has left a run


class Listener(Protocol):
    """Who watches a sweep; see `cdl.progress` and `cdl.metrics`."""

    def start(self, todo: Sequence[Point], finished: int, lanes: int, costs: Mapping[str, StepCost]) -> None:
        """Training begins: points to run, number already there, lanes, and by id what a step of each point takes."""
        ...

    def block(self, lanes: Sequence[LaneStatus]) -> None:
        """Called a few times a second with what the lanes do."""
        ...

    def finished(self, point: Point, result: Mapping[str, Any]) -> None:
        """A point was published."""
        ...

    def finished_elsewhere(self, point: Point) -> None:
        """Another process has published a point that was to run."""
        ...

    def failed(self, point: Point, error: str) -> None:
        """A point was given up, here or elsewhere, after this error."""
        ...


def run_points(
    points: Sequence[Point],
    store: Store,
    listeners: Sequence[Listener],
    lanes: int | None = None,
    *,
    keep: bool = False,
    path: bool = False,
    give_up: bool = False,
    wait: bool = True,
    about: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train every point that the store lacks; longest first, so that the lanes end together.

    Runs that are stopped are saved under ``<store>/checkpoints/<id>`` and go on from there. While it is trained, a run
    is this process's alone. Runs that have failed before come last, and when they fail once more are given up, alone.

    Args:
      points: distinct, from `points_of`.
      store: opened for them.
      listeners: told of progress, one after the other.
      lanes: runs side by side; see `layout`.
      keep: keep the last checkpoint of finished runs.
      path: with `keep`: and those before it, as many as `checkpoint.keep` says.
      give_up: a run that raises, or whose process ends, is tried again, in the end recorded as failed, and the others
        go on. Else what it raises is raised.
      wait: for runs that other processes train, which may die over them.
      about: of this process, for `cdl status`.
      stop: asked often; once it is true, runs are saved and `cdl.train.loop.Stopped` is raised.

    Raises:
      UserError: a result cannot be written; without `give_up`, more than 1% of the images are broken.
    """
    ended = store.ids() | store.failed().keys()
    lacks = np.array([p.id not in ended for p in points])
    if jax.process_count() > 1:
        lacks = multihost_utils.broadcast_one_to_all(lacks)  # the first one's word: the others' files may lag behind
    todo = [p for p, lacking in zip(points, lacks, strict=True) if lacking]
    if not todo:
        return
    todo.sort(key=lambda p: -p.flat["T"])
    groups: dict[str, list[Point]] = {}
    for point in todo:
        groups.setdefault(point.program, []).append(point)
    layouts = {key: choose_layout(group, say, lanes) for key, group in groups.items()}
    costs = {key: step_cost(group[0].config, layouts[key]) for key, group in groups.items()}
    by_point = {p.id: costs[key] for key, group in groups.items() for p in group}
    with contextlib.ExitStack() as stack:
        worker = Worker(store.root, about)
        if jax.process_index() == 0:
            stack.enter_context(worker)
        listeners = [*listeners, _Telling(worker)]
        for listener in listeners:
            listener.start(todo, len(points) - len(todo), max(where.at_once for where in layouts.values()), by_point)
        sweep, waits = _Sweep(store, worker, listeners, keep, path, give_up, stop), False
        while groups:
            if in_first_process(worker.buried):
                in_first_process(worker.reborn)
            taken = {key: _run_group(group, layouts[key], costs[key], sweep) for key, group in groups.items()}
            groups = {key: group for key, group in taken.items() if group}
            if groups:
                worker.tell(runs={}, per_s=None, flops_per_s=None)
                others = in_first_process(functools.partial(_say_who_trains, groups, store, waits, wait))
                if others and not wait:
                    return
                waits = waits or bool(others)
                time.sleep(_WAIT_SECONDS)
                if not on_all_processes(not stop()):
                    raise Stopped


def _say_who_trains(groups: Mapping[str, Sequence[Point]], store: Store, known: bool, wait: bool) -> int:
    """Say who trains the runs that this process may not have, unless that is known; how many they are."""
    points = [p for group in groups.values() for p in group]
    holders = sorted(filter(None, {store.claims.holder(store.checkpoints(p)) for p in points}))
    if holders and not known:
        runs = f"{len(points)} run{'s are' if len(points) > 1 else ' is'}"
        doubt = "" if all(map(store.claims.heard, holders)) else ", or were until it died: a minute will tell"
        say(f"{runs} trained by {', '.join(holders)}{doubt}; {'waiting' if wait else 'left to others'}")
    return len(holders)


class _Sweep(NamedTuple):
    """See `run_points`."""

    store: Store
    worker: Worker
    listeners: Sequence[Listener]
    keep: bool
    path: bool
    give_up: bool
    stop: Callable[[], bool]


class _Telling:
    """A `Listener` that says in the worker's file what it does."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._costs: Mapping[str, StepCost] = {}
        self._speed, self._steps = Speed(), Counter[str]()
        self._told = 0.0

    def start(self, todo: Sequence[Point], finished: int, lanes: int, costs: Mapping[str, StepCost]) -> None:
        self._costs = costs
        self._worker.tell(lanes=lanes, device=environment()["device"])

    def block(self, lanes: Sequence[LaneStatus]) -> None:
        for lane in lanes:
            cost = self._costs[lane.run.id]
            self._speed.add(lane.step - max(self._steps[lane.run.id], lane.first), cost)
            self._steps[lane.run.id] = lane.step
        self._speed.read()
        if time.monotonic() - self._told < _TELL_SECONDS or not lanes:
            return
        self._told = time.monotonic()
        costs, per_s = self._costs, self._speed.amount
        runs = {
            x.run.id: {"step": x.step, "loss": float(x.loss[-1]), "flops_per_step": costs[x.run.id].flops}
            for x in lanes
        }
        cost = costs[lanes[0].run.id]
        flops_per_s = per_s and per_s / cost.amount * cost.flops
        self._worker.tell(runs=runs, unit=cost.unit, per_s=per_s, flops_per_s=flops_per_s)

    def finished(self, point: Point, result: Mapping[str, Any]) -> None: ...

    def finished_elsewhere(self, point: Point) -> None: ...

    def failed(self, point: Point, error: str) -> None: ...


def _run_group(group: Sequence[Point], where: Layout, cost: StepCost, sweep: _Sweep) -> list[Point]:
    """Train points of one program; returns those that another process trains."""
    store = sweep.store
    taken: list[Point] = []

    def claimed(point: Point) -> bool:
        about = environment() | {"keep": sweep.keep}
        claim = Claim(in_first_process(functools.partial(store.begin, point, sweep.worker, about, sweep.give_up)))
        if claim is Claim.TAKEN:
            taken.append(point)
        for listener in sweep.listeners:
            if claim is Claim.FINISHED:
                listener.finished_elsewhere(point)
            if claim is Claim.FAILED:
                listener.failed(point, store.failed().get(point.id, {}).get("error", ""))
        return claim is Claim.MINE

    program: Program | None = None
    rest = list(group)
    while rest:
        now, rest = _next_batch(rest, store)
        mine: set[str] = set()
        waiting, todo = list(now), list[Point]()
        trouble: Exception | None = None
        try:
            while waiting and len(mine) < where.at_once:  # before memory and time go into a program for nothing
                point = waiting.pop(0)
                mine |= {point.id} if claimed(point) else set()
            if not mine:
                continue
            todo = [p for p in now if p.id in mine] + waiting
            program = program or compiled(todo[0], where)
            trouble = _train_group(program, todo, mine, claimed, where.at_once, cost, sweep)
        except RunError as error:
            _note_failure(next(p for p in todo if p.id == error.id), error.error, sweep)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                _blame(todo, error, store)
                raise
            raise UserError(
                f"the devices have too little memory for {where.lanes} lanes; use a smaller --lanes, "
                f"compute.microbatches=2 or more, or compute.remat=full"
            ) from error
        except Exception as error:
            if not isinstance(error, UserError | OSError | Stopped):  # files of runs raise as `RunError`
                _blame(todo, error, store)
            raise
        finally:
            for point in now:
                store.release(point)
        if trouble:
            raise trouble
        if jax.process_count() == 1:  # a run has failed, or was taken over, and stopped the others
            ended = store.ids() | store.failed().keys() | {p.id for p in taken}
            rest += [p for p in todo if p.id not in ended]
    return taken


def _blame(points: Sequence[Point], error: Exception, store: Store) -> None:
    """It may be the fault of any of the runs under way."""
    for point in points:
        store.release(point, failed="".join(traceback.format_exception(error)))


def _next_batch(points: list[Point], store: Store) -> tuple[list[Point], list[Point]]:
    """What to train now, and what after that: first those that nothing is known against; runs on their last try alone,
    so that none takes others down with it. Of several processes, whose files may lag behind, the first one says."""
    crashes_deaths_P = np.array([store.attempts(p)[:2] for p in points])
    if jax.process_count() > 1:
        crashes_deaths_P = np.asarray(multihost_utils.broadcast_one_to_all(crashes_deaths_P))
    on_last_P = np.any(crashes_deaths_P >= np.array([MOST_CRASHES - 1, MOST_DEATHS - 1]), axis=1)
    order_P = np.argsort(crashes_deaths_P.sum(axis=1), kind="stable")
    others = [points[i] for i in order_P if not on_last_P[i]]
    last = [points[i] for i in np.flatnonzero(on_last_P)]
    return (others, last) if others else (last[:1], last[1:])


def _note_failure(point: Point, error: Exception, sweep: _Sweep) -> None:
    """A run has raised: try it again, or give it up."""
    user = isinstance(error, UserError)  # which will not go away by itself
    said = str(error) if user else "".join(traceback.format_exception(error))
    if sweep.give_up and jax.process_count() > 1:  # the others do not know of it; it comes later when they start again
        sweep.store.release(point, failed=said)
    if not sweep.give_up or jax.process_count() > 1:
        raise error
    if user or sweep.store.attempts(point).crashes + 1 >= MOST_CRASHES:
        sweep.store.fail(point, said)
        for listener in sweep.listeners:
            listener.failed(point, said.strip().splitlines()[-1])
    else:
        sweep.store.release(point, failed=said)


def _train_group(
    program: Program,
    group: Sequence[Point],
    mine: set[str],
    claimed: Callable[[Point], bool],
    at_once: int,
    cost: StepCost,
    sweep: _Sweep,
) -> Exception | None:
    """Train points of one program, but for those that are not `mine` and cannot be `claimed` when it is their turn.

    Returns: what kept results, or words about them, from being written; then all runs are saved, and none is to blame.
    """
    store, listeners, keep, c = sweep.store, sweep.listeners, sweep.keep, group[0].config
    by_id = {p.id: p for p in group}
    opened: dict[str, Checkpoints] = {}  # of the runs under way
    replaced = _Replaced()
    trouble: list[Exception] = []  # of writing results or telling of them, after which all is saved
    lost: set[str] = set()  # runs that others have taken over
    looked = 0.0
    alone = jax.process_count() == 1

    def open(run: Run) -> Checkpoints | None:
        point = by_id[run.id]
        if run.id not in mine and not claimed(point):
            return None
        try:
            opened[run.id] = Checkpoints(store.checkpoints(point), point.identity, keep=c.checkpoint.keep)
        except UserError as error:  # that of another run
            raise RunError(run.id, error) from error
        return opened[run.id]

    def tell(say_to: Callable[[Listener], None]) -> None:
        try:
            for listener in listeners:
                say_to(listener)
        except Exception as error:  # what it writes to is full or closed, say: runs are saved before it is raised
            trouble.append(error)

    def on_block(lanes: list[LaneStatus]) -> None:
        tell(lambda listener: listener.block(lanes))
        nonlocal looked
        if time.monotonic() - looked < _TELL_SECONDS:  # it lists a folder for each lane
            return
        looked = time.monotonic()
        for id in store.lost(sweep.worker):
            if id in opened and id not in lost:
                say(f"this process was silent for so long that another one has taken over its run {id}")
                lost.add(id)
                if alone:  # others would wait for this one; what they save is what whoever took it over will
                    opened[id].abandon()

    def finish(outcome: Outcome) -> None:
        point, checkpoints = by_id[outcome.run.id], opened[outcome.run.id]
        if alone and point.id in store.lost(sweep.worker):
            lost.add(point.id)
            checkpoints.abandon()
            return
        kept = keep and outcome.status == "done"
        if kept and checkpoints.latest != point.config.T:  # said already; what is not kept is not done
            there = f"those of step {checkpoints.latest} are" if checkpoints.latest else "none are"
            raise UserError(
                f"the weights after T={point.config.T} could not be written to {store.checkpoints(point)}, where "
                f"{there}; mend that and run the same command again, which goes on from there"
            )
        result = _result(point, outcome, program, cost, replaced)
        try:
            in_first_process(functools.partial(store.write, point, outcome.curve, result))
        except (OSError, UserError) as e:
            said = e.strerror or e if isinstance(e, OSError) else e
            trouble.append(
                UserError(
                    f"the result of eta_ref={point.config.eta_ref:g}, T={point.config.T} could not be written to "
                    f"{store.root} ({said}); mend that and run the same command again, which goes on from the last "
                    f"checkpoints"
                )
            )
            return  # the others are saved, as when asked to stop
        del opened[point.id]
        checkpoints.finish(sweep.path)
        store.release(point)  # and with it what is not to be kept
        tell(lambda listener: listener.finished(point, result))

    outcomes = train(
        program,
        (_run_of(p, program, replaced) for p in group),
        on_block,
        at_once=at_once,
        saving=Saving(open, c.checkpoint.seconds, c.checkpoint.steps, keep),
        stop=lambda: bool(trouble or lost) or sweep.stop(),
    )
    together = True
    try:
        for outcome in outcomes:
            finish(outcome)
    except Stopped:
        if not trouble and (sweep.stop() or not lost or not alone):
            raise
    except BaseException as e:
        # Of several processes this may be the only one that got here; and who interrupts twice will not wait.
        together = alone and not isinstance(e, KeyboardInterrupt)
        for error in trouble:
            say(str(error))
        raise
    finally:
        if together:
            for checkpoints in opened.values():
                checkpoints.close()
    return trouble[0] if trouble else None


class _Replaced:
    """Counts the undecodable images of each run, and says so once."""

    def __init__(self) -> None:
        self.of = Counter[str]()

    def add(self, point: Point, images: int) -> None:
        if not self.of:
            say(
                f"images of data.path={point.config.data.path!r} cannot be decoded and are replaced by the next ones; "
                f"result.json will say how many, and more than 1% end the run"
            )
        self.of[point.id] += images


@functools.cache  # asked for at every claim, of every run and every second that one waits for others
def environment() -> dict[str, Any]:
    """What runs in this process are computed by: the name of the devices, processes, versions."""
    kind = jax.devices()[0].device_kind
    packages = ("cdl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "device": processor() if kind == "cpu" else kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
    }


def _run_of(point: Point, program: Program, replaced: _Replaced) -> Run:
    c = point.config
    batches = functools.partial(
        data.build(c.data).batches,
        c.seed,
        part=program.part,
        workers=c.compute.workers,
        on_replaced=functools.partial(replaced.add, point),
    )
    weights = functools.partial(initial.load, c) if c.init and not c.lora.rank else None  # then the program has them
    return Run(point.id, c.seed, eta_of(c), eval_steps(c), batches, weights)


def _result(point: Point, outcome: Outcome, program: Program, cost: StepCost, replaced: _Replaced) -> dict[str, Any]:
    """What result.json holds; None where a diverged run has no number, and where the peak of the devices is not known.

    Speed and MFU are over all its seconds, evaluations included. Images that were replaced are counted since the run
    was last started or resumed.
    """
    c, curve = point.config, outcome.curve
    last = curve["train_loss"][-1 - max(1, c.T // 20) : -1]  # row T has none
    done = outcome.status == "done"
    steps = len(curve["step"]) - done
    dataset = data.build(c.data)
    predicted = steps * dataset.per_batch
    used = mfu(
        steps * cost.flops,
        max(outcome.seconds, 1e-9),
        program.mesh.size / program.lanes,
        program.mesh.devices.flat[0].device_kind,
        c.model.dtype,
    )
    return {
        "status": outcome.status,
        "loss": float(curve["eval_loss"][-1]) if done else None,
        "accuracy": float(curve["eval_accuracy"][-1]) if done else None,
        "train_loss": float(np.mean(last)) if done else None,
        "diverged_at": outcome.diverged_at,
        "eta_peak": c.eta_ref / c.T**0.5,
        "n_params": program.n_params,
        dataset.unit: predicted,
        "seconds": round(outcome.seconds, 3),
        "seconds_waited": round(outcome.waited, 3),
        f"{dataset.unit}_per_s": round(predicted / max(outcome.seconds, 1e-9), 1),
        "flops_per_step": cost.flops,
        "mfu": used and round(used, 4),
        **(
            {"images_replaced": over_processes(replaced.of[point.id])}
            if data.DATA[point.config.data.name].takes != "text"
            else {}
        ),
        **environment(),
        "devices": program.mesh.size // program.rows,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
