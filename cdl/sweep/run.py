"""Run the points that a store lacks: group them by program, train each group in lanes, publish each as it ends.

With several processes (`jax.distributed`) all of them run every point together, on one mesh; the first one writes.
"""

import functools
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cdl.data import build as data
from cdl.errors import UserError
from cdl.models import build as models
from cdl.models.transformer import Compute
from cdl.optim import build as optimizers
from cdl.schedules import schedule
from cdl.sharding import make_mesh, mesh_shape
from cdl.sweep import initial
from cdl.sweep.grid import Point, expand
from cdl.sweep.store import Store
from cdl.train.checkpoint import Checkpoints
from cdl.train.flops import StepCost, mfu, peak_flops, step_flops
from cdl.train.loop import LaneStatus, Outcome, Run, Saving, train
from cdl.train.step import Program

__all__ = [
    "Layout",
    "Listener",
    "environment",
    "layout",
    "parts_of",
    "points_of",
    "program_for",
    "run_points",
    "shape_on",
    "use_cpu_cores",
]

_BLOCK_BYTES = 4 << 20  # of batches in one dispatch and lane
_MOST_BLOCK = 64
_MOST_WORKERS = 256


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


class Layout(NamedTuple):
    """Where runs go: on which mesh, in how many lanes, and how many of these are used."""

    mesh: Mesh
    lanes: int
    at_once: int


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
            _parts(point)
            checked.add(point.program)
    return points


def shape_on(config: ConfigDict, devices: int) -> dict[str, int]:
    """The sizes of the mesh on so many devices, axis -> size.

    Raises:
      UserError: a mesh that does not fit the devices or the batch.
    """
    shape = mesh_shape(config.mesh.to_dict(), devices)
    rows, parts = config.data.batch_size, shape["data"] * shape["fsdp"] * config.compute.microbatches
    if config.compute.microbatches < 1 or rows % parts:
        raise UserError(
            f"data.batch_size={rows} must be a multiple of mesh.data={shape['data']} x mesh.fsdp={shape['fsdp']} x "
            f"compute.microbatches={config.compute.microbatches}"
        )
    return shape


def layout(config: ConfigDict, runs: int, lanes: int | None = None) -> Layout:
    """Where runs of a config go on this machine, or with several processes on all of theirs.

    On a CPU there are at least two rows for small runs, of which one may idle: XLA compiles a program for one device by
    another route than for several, with other last bits, and a run is to be the same alone and in company.

    Args:
      config: of one of the runs.
      runs: number of runs there are.
      lanes: runs side by side; one per row of the mesh if None.

    Raises:
      UserError: a mesh that does not fit the devices or the batch; lanes fewer than one; more than there are rows on
        CPU devices, where lanes that share one would only change last bits; on other devices, more than there are and
        no multiple of them; several processes and more than one lane.
    """
    # In this order the rows of a process lie together; on TPU slices ids alone run across hosts.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    shape = shape_on(config, len(devices))
    rows, spread = shape["run"], math.prod(shape.values()) // shape["run"]
    if lanes is not None and lanes < 1:
        raise UserError(f"--lanes={lanes} must be at least 1")
    if jax.process_count() > 1:
        if rows > 1 or (lanes or 1) > 1 or spread < len(devices):
            raise UserError(
                f"{jax.process_count()} processes train one run at a time on all {len(devices)} devices; let "
                "mesh.data, mesh.fsdp and mesh.tensor multiply to that (one of them may be -1), and mesh.run be -1 or 1"
            )
        at_once = 1
    elif lanes is not None and lanes > rows and devices[0].platform == "cpu":
        raise UserError(f"--lanes={lanes} exceeds the number of CPU cores, {rows}; use at most that many")
    elif lanes is not None and lanes > rows and lanes % rows:
        raise UserError(f"--lanes={lanes} must be a multiple of the number of devices, {rows}")
    else:
        at_once = lanes or min(rows, runs)
    used = at_once if devices[0].platform != "cpu" or spread > 1 else max(at_once, min(2, rows))
    mesh = make_mesh(shape | dict(run=min(used, rows)), devices)
    return Layout(mesh, used, min(at_once, runs))


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

    Runs that are stopped are saved under ``<store>/checkpoints/<id>`` and go on from there.

    Args:
      points: distinct, from `points_of`.
      store: opened for them.
      listeners: told of progress, one after the other.
      lanes: runs side by side; see `layout`.
      keep: keep the last checkpoint of finished runs.
      stop: asked often; once it is true, runs are saved and `cdl.train.loop.Stopped` is raised.
    """
    finished = store.ids()
    lacks = np.array([p.id not in finished for p in points])
    if jax.process_count() > 1:
        lacks = multihost_utils.broadcast_one_to_all(lacks)  # the first one's word: the others' files may lag behind
    todo = [p for p, lacking in zip(points, lacks, strict=True) if lacking]
    first = jax.process_index() == 0
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

    def on_block(lanes: list[LaneStatus]) -> None:
        for listener in listeners:
            listener.block(lanes)

    for key, group in groups.items():
        where = layouts[key]
        program = program_for(group[0], where)
        by_id = {p.id: p for p in group}
        opened: dict[str, Checkpoints] = {}
        saving = _saving(store, by_id, opened, keep)
        runs = (_run_of(p, program) for p in group)
        c = group[0].config
        program.compile(next(data.build(c.data).batches(c.seed, 0, part=program.part)))
        for outcome in train(program, runs, on_block, at_once=where.at_once, saving=saving, stop=stop):
            point = by_id[outcome.run.id]
            result = _result(point, outcome, program, by_point[point.id])
            checkpoints = opened.pop(point.id)
            kept = keep and outcome.status == "done"
            if kept and checkpoints.latest != point.config.T:  # said already; what is not kept is not done
                there = f"those of step {checkpoints.latest} are" if checkpoints.latest else "none are"
                raise UserError(
                    f"the weights after T={point.config.T} could not be written to {_checkpoints(store, point)}, where "
                    f"{there}; mend that and run the same command again, which goes on from there"
                )
            if first:
                store.write(point, outcome.curve, result)
            if kept:
                checkpoints.close()
            else:
                checkpoints.remove()
            for listener in listeners:
                listener.finished(point, result)


def program_for(point: Point, where: Layout) -> Program:
    """The program that runs this point and all points with an equal `program`."""
    model, optimizer, dataset = _parts(point)
    c = point.config
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


def environment() -> dict[str, Any]:
    """What runs in this process are computed by: the name of the devices, processes, versions."""
    packages = ("cdl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
    }


def use_cpu_cores() -> None:
    """Make a device of each CPU core, at least two; no effect on other backends.

    Small models leave most of a second core idle, a second run does not (experiments/benchmarks/lanes.py). Has to
    come before JAX is first used; later it changes nothing.
    """
    if jax.config.jax_num_cpu_devices > 0:  # pyrefly: ignore[missing-attribute]
        return  # said by JAX_NUM_CPU_DEVICES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", max(2, cores))
    except RuntimeError:
        return  # JAX is in use already, as in a notebook: its devices are what there is


def _cost(c: ConfigDict, where: Layout) -> StepCost:
    """What a step of a run takes, on its share of the devices."""
    one = c.data.copy_and_resolve_references()
    one.batch_size = 1  # for the shapes of a row
    dataset = data.build(c.data)
    row = jax.eval_shape(dataset.prepare, next(data.build(one).batches(c.seed, 0)))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((c.data.batch_size, *x.shape[1:]), x.dtype), row)
    model = models.build(c.model.to_dict(), Compute(attention="xla"))  # fused attention hides what it computes
    peak = peak_flops(where.mesh.devices.flat[0].device_kind, c.model.dtype)
    devices = where.mesh.size / where.lanes
    return StepCost(dataset.unit, dataset.per_batch, step_flops(model, batch), peak and peak * devices)


def _checkpoints(store: Store, point: Point) -> Path:
    return store.root / "checkpoints" / point.id


def _saving(store: Store, points: Mapping[str, Point], opened: dict[str, Checkpoints], keep: bool) -> Saving:
    how = next(iter(points.values())).config.checkpoint

    def open(run: Run) -> Checkpoints:
        point = points[run.id]
        opened[run.id] = Checkpoints(_checkpoints(store, point), point.identity, keep=how.keep)
        return opened[run.id]

    return Saving(open, how.seconds, how.steps, keep)


def _parts(point: Point) -> tuple[models.Model, Any, data.Dataset]:
    """Model, optimizer and data of a point; raises UserError where they do not fit together."""
    model, optimizer = parts_of(point.config)
    dataset = data.build(point.config.data)
    dataset.check(point.config.model.to_dict())
    return model, optimizer, dataset


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


def _run_of(point: Point, program: Program) -> Run:
    c = point.config
    dataset = data.build(c.data)
    batches = functools.partial(dataset.batches, c.seed, part=program.part, workers=c.compute.workers)
    weights = functools.partial(initial.load, c) if c.init else None
    return Run(point.id, c.seed, _eta_T(c), _eval_steps(c), batches, weights)


def _result(point: Point, outcome: Outcome, program: Program, cost: StepCost) -> dict[str, Any]:
    """What result.json holds; None where a diverged run has no number, and where the peak of the devices is not known.

    Speed and MFU are over all its seconds, evaluations included.
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
        **environment(),
        "devices": program.mesh.size // program.rows,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
