"""Run the points that a store lacks: group them by program, train each group in lanes, publish each as it ends.

With several processes (`jax.distributed`) all of them run every point together, on one mesh; the first one writes.
"""

import functools
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cdl.compute import Compute
from cdl.data import build as data
from cdl.errors import UserError, say
from cdl.models import build as models
from cdl.optim import build as optimizers
from cdl.schedules import schedule
from cdl.sweep import initial
from cdl.sweep.grid import Point, expand
from cdl.sweep.layout import Layout, layout
from cdl.sweep.store import Claim, Store
from cdl.train.checkpoint import Checkpoints
from cdl.train.distributed import in_every_process, in_first_process, on_all_processes, over_processes
from cdl.train.flops import StepCost, mfu, peak_flops, step_flops
from cdl.train.loop import LaneStatus, Outcome, Run, Saving, Stopped, train
from cdl.train.step import Program

__all__ = [
    "Listener",
    "environment",
    "parts_of",
    "points_of",
    "program_for",
    "run_points",
]

_BLOCK_BYTES = 4 << 20  # of batches in one dispatch and lane
_MOST_BLOCK = 64
_MOST_WORKERS = 256
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


def points_of(config: ConfigDict, changes: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of a grid, each checked: whatever can be wrong with one is said before any of them runs.

    Raises:
      UserError: see `expand`, and bad values anywhere in a point's config.
    """
    points = expand(config, changes, lambda c: data.fingerprint(c.data), initial.fingerprint)
    if not points:
        raise UserError("the grid has no points; let sweep() return at least one")
    checked: set[str] = set()
    for point in points:
        _eta_T(point.config)
        _eval_steps(point.config)
        if point.program not in checked:
            parts_of(point.config)
            data.build(point.config.data).check(point.config.model.to_dict())
            checked.add(point.program)
    return points


def run_points(
    points: Sequence[Point],
    store: Store,
    listeners: Sequence[Listener],
    lanes: int | None = None,
    *,
    keep: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train every point that the store lacks; longest first, so that the lanes end together.

    Runs that are stopped are saved under ``<store>/checkpoints/<id>`` and go on from there. While it is trained, a run
    is this process's alone; for runs that others train it waits.

    Args:
      points: distinct, from `points_of`.
      store: opened for them.
      listeners: told of progress, one after the other.
      lanes: runs side by side; see `layout`.
      keep: keep the last checkpoint of finished runs.
      stop: asked often; once it is true, runs are saved and `cdl.train.loop.Stopped` is raised.

    Raises:
      UserError: a result cannot be written; more than 1% of the images are broken.
    """
    finished = store.ids()
    lacks = np.array([p.id not in finished for p in points])
    if jax.process_count() > 1:
        lacks = multihost_utils.broadcast_one_to_all(lacks)  # the first one's word: the others' files may lag behind
    todo = [p for p, lacking in zip(points, lacks, strict=True) if lacking]
    if not todo:
        return
    todo.sort(key=lambda p: -p.config.T)
    groups: dict[str, list[Point]] = {}
    for point in todo:
        groups.setdefault(point.program, []).append(point)
    layouts = {key: layout(group[0].config, len(group), lanes) for key, group in groups.items()}
    costs = {key: _cost(group[0].config, layouts[key]) for key, group in groups.items()}
    by_point = {p.id: costs[key] for key, group in groups.items() for p in group}
    for listener in listeners:
        listener.start(todo, len(points) - len(todo), max(where.at_once for where in layouts.values()), by_point)
    sweep, waits = _Sweep(store, listeners, keep, stop), False
    while groups:
        taken = {key: _run_group(group, layouts[key], costs[key], sweep) for key, group in groups.items()}
        groups = {key: group for key, group in taken.items() if group}
        if groups:
            if not waits and jax.process_index() == 0:
                say(f"another process trains {sum(map(len, groups.values()))} of the runs; waiting for it")
            waits = True
            time.sleep(_WAIT_SECONDS)
            if not on_all_processes(not stop()):
                raise Stopped


class _Sweep(NamedTuple):
    """See `run_points`."""

    store: Store
    listeners: Sequence[Listener]
    keep: bool
    stop: Callable[[], bool]


def _run_group(group: Sequence[Point], where: Layout, cost: StepCost, sweep: _Sweep) -> list[Point]:
    """Train points of one program; returns those that another process trains."""
    taken: list[Point] = []

    def claimed(point: Point) -> bool:
        claim = Claim(in_first_process(functools.partial(sweep.store.begin, point, environment())))
        if claim is Claim.TAKEN:
            taken.append(point)
        if claim is Claim.FINISHED:
            for listener in sweep.listeners:
                listener.finished_elsewhere(point)
        return claim is Claim.MINE

    mine, rest = [], list(group)
    while rest and len(mine) < where.at_once:  # before memory and time go into a program for nothing
        point = rest.pop(0)
        mine += [point] if claimed(point) else []
    if mine:
        try:
            _train_group([*mine, *rest], {p.id for p in mine}, claimed, where, cost, sweep)
        finally:
            for point in group:
                sweep.store.release(point)
    return taken


def _train_group(
    group: Sequence[Point],
    mine: set[str],
    claimed: Callable[[Point], bool],
    where: Layout,
    cost: StepCost,
    sweep: _Sweep,
) -> None:
    """Train points of one program, but for those that are not `mine` and cannot be `claimed` when it is their turn."""
    store, listeners, keep, stop = sweep
    c, program = group[0].config, program_for(group[0], where)
    by_id = {p.id: p for p in group}
    opened: dict[str, Checkpoints] = {}  # of the runs under way
    replaced = _Replaced()
    unwritten: list[UserError] = []

    def open(run: Run) -> Checkpoints | None:
        point = by_id[run.id]
        if run.id not in mine and not claimed(point):
            return None
        opened[run.id] = Checkpoints(store.checkpoints(point), point.identity, keep=c.checkpoint.keep)
        return opened[run.id]

    def on_block(lanes: list[LaneStatus]) -> None:
        for listener in listeners:
            listener.block(lanes)

    def finish(outcome: Outcome) -> None:
        point, checkpoints = by_id[outcome.run.id], opened[outcome.run.id]
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
            unwritten.append(
                UserError(
                    f"the result of eta_ref={point.config.eta_ref:g}, T={point.config.T} could not be written to "
                    f"{store.root} ({said}); mend that and run the same command again, which goes on from the last "
                    f"checkpoints"
                )
            )
            return  # the others are saved, as when asked to stop
        del opened[point.id]
        if kept:
            checkpoints.finish()
        else:
            checkpoints.remove()
        store.release(point)
        for listener in listeners:
            listener.finished(point, result)

    # Its iterator ends with it, and with that the threads or processes that read ahead.
    program.compile(in_every_process(lambda: next(data.build(c.data).batches(c.seed, 0, part=program.part))))
    outcomes = train(
        program,
        (_run_of(p, program, replaced) for p in group),
        on_block,
        at_once=where.at_once,
        saving=Saving(open, c.checkpoint.seconds, c.checkpoint.steps, keep),
        stop=lambda: bool(unwritten) or stop(),
    )
    together = True
    try:
        for outcome in outcomes:
            finish(outcome)
    except Stopped:
        if not unwritten:
            raise
    except BaseException as e:
        # Of several processes this may be the only one that got here; and who interrupts twice will not wait.
        together = jax.process_count() == 1 and not isinstance(e, KeyboardInterrupt)
        for error in unwritten:
            say(str(error))
        raise
    finally:
        if together:
            for checkpoints in opened.values():
                checkpoints.close()
    if unwritten:
        raise unwritten[0]


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


def program_for(point: Point, where: Layout) -> Program:
    """The program that runs this point and all points with an equal `program`."""
    c = point.config
    model, optimizer = parts_of(c)
    dataset = data.build(c.data)
    heldout = dataset.heldout(c.eval.size)
    bytes_of_batch = sum(x[0].nbytes for x in jax.tree.leaves(heldout))
    return Program(
        model,
        optimizer,
        heldout,
        lanes=where.lanes,
        mesh=where.mesh,
        # Processes that run one program together must not differ in how many steps they send: one at a time.
        block=min(_MOST_BLOCK, max(1, _BLOCK_BYTES // bytes_of_batch)) if jax.process_count() == 1 else 1,
        prepare=dataset.prepare,
        microbatches=c.compute.microbatches,
    )


@functools.cache  # asked for at every claim, of every run and every second that one waits for others
def environment() -> dict[str, Any]:
    """What runs in this process are computed by: the name of the devices, processes, versions."""
    packages = ("cdl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
    }


def _cost(c: ConfigDict, where: Layout) -> StepCost:
    """What a step of a run takes, on its share of the devices."""
    dataset = data.build(c.data)
    batch = jax.eval_shape(dataset.prepare, jax.tree.map(lambda x: x[0], dataset.heldout(1)))
    model = models.build(c.model.to_dict(), Compute(attention="xla"))  # fused attention hides what it computes
    peak = peak_flops(where.mesh.devices.flat[0].device_kind, c.model.dtype)
    devices = where.mesh.size / where.lanes
    return StepCost(dataset.unit, dataset.per_batch, step_flops(model, batch), peak and peak * devices)


def parts_of(c: ConfigDict) -> tuple[models.Model, Any]:
    """Model and optimizer of a run, and all checks of it that need no data.

    Raises:
      UserError: bad values anywhere in the config, or parts that do not fit together.
    """
    _eta_T(c)
    _eval_steps(c)
    if not 0 <= c.compute.workers <= _MOST_WORKERS:
        raise UserError(f"compute.workers={c.compute.workers} must be from 0 to {_MOST_WORKERS}; one a core is plenty")
    how = c.checkpoint
    if how.seconds <= 0 or how.steps < 0 or how.keep < 1:
        raise UserError(
            f"checkpoint.seconds={how.seconds}, checkpoint.steps={how.steps}, checkpoint.keep={how.keep}: must be "
            f"positive, at least 0 and at least 1"
        )
    model = models.build(c.model.to_dict(), Compute(**c.compute.to_dict()))
    if model.data != c.data.name:
        raise UserError(f"model.name={c.model.name!r} takes data.name={model.data!r} and not {c.data.name!r}")
    data.check_section(c.data, c.model.to_dict())
    if c.init and not Path(c.init).expanduser().exists():
        raise UserError(f"init={c.init!r} does not exist; give safetensors, or the checkpoints of a run")
    if c.compute.microbatches > 1 and jax.tree.leaves(jax.eval_shape(model.init, 0)[1]):
        raise UserError(
            f"compute.microbatches={c.compute.microbatches}: model.name={c.model.name!r} normalises over the whole "
            f"batch; use 1, and more devices along mesh.data"
        )
    return model, optimizers.build(c.optimizer.to_dict(), model.rules)


def _eta_T(c: ConfigDict) -> np.ndarray:
    if not 0 <= c.seed < 2**32:
        raise UserError(f"seed={c.seed} must be in [0, 2^32)")
    if not 0 < c.eta_ref < math.inf:
        raise UserError(f"eta_ref={c.eta_ref} must be a positive number")
    arguments = c.schedule.to_dict()
    eta_T = schedule(arguments.pop("name"), c.T, peak=c.eta_ref / max(c.T, 1) ** 0.5, **arguments)
    if not eta_T.any():
        raise UserError(f"schedule {c.schedule.name!r} has no positive rate at T={c.T}; use a longer T")
    return eta_T


def _eval_steps(c: ConfigDict) -> tuple[int, ...]:
    if c.eval.times < 1 or c.eval.size < 1:
        raise UserError(f"eval.times={c.eval.times} and eval.size={c.eval.size} must be at least 1")
    times = min(c.eval.times, c.T)
    return tuple(sorted({max(1, round(c.T * i / times)) for i in range(1, times + 1)}))


def _run_of(point: Point, program: Program, replaced: _Replaced) -> Run:
    c = point.config
    batches = functools.partial(
        data.build(c.data).batches,
        c.seed,
        part=program.part,
        workers=c.compute.workers,
        on_replaced=functools.partial(replaced.add, point),
    )
    weights = functools.partial(initial.load, c) if c.init else None
    return Run(point.id, c.seed, _eta_T(c), _eval_steps(c), batches, weights)


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
        **({"images_replaced": over_processes(replaced.of[point.id])} if dataset.unit == "images" else {}),
        **environment(),
        "devices": program.mesh.size // program.rows,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
