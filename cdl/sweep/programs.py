"""From points to the programs that run them, checked on the way."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cdl.compute import Compute
from cdl.data import build as data
from cdl.errors import UserError
from cdl.models import build as models
from cdl.models import pretrained, vlm
from cdl.models.lora import LoRA
from cdl.optim import build as optimizers
from cdl.schedules import schedule
from cdl.sweep import initial
from cdl.sweep.grid import Point, expand, points_in
from cdl.sweep.layout import Layout
from cdl.sweep.store import Store
from cdl.train.distributed import in_every_process
from cdl.train.flops import StepCost, peak_flops, step_flops
from cdl.train.step import Program

__all__ = [
    "PROBE_SEED",
    "check_files",
    "compiled",
    "eta_of",
    "eval_steps",
    "parts_of",
    "points_of",
    "program_for",
    "step_cost",
    "stored_point",
]

PROBE_SEED = 2**32 - 1  # of the data order of probes, and of no run
_BLOCK_BYTES = 4 << 20  # of batches in one dispatch and lane
_MOST_BLOCK = 64
_MOST_WORKERS = 256


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
        eta_of(point.config)
        eval_steps(point.config)
        if point.program not in checked:
            parts_of(point.config)
            data.build(point.config.data).check(point.config.model.to_dict())
            checked.add(point.program)
    return points


def stored_point(store: Store, id: str) -> Point:
    """A point of a sweep, finished or not, by its id.

    Raises:
      UserError: the sweep has none with this id, or one of another version of cdl.
    """
    for grid in store.grids():
        for point in points_in(grid):
            if point.id == id:
                return point
    raise UserError(f"{store.root} has no run {id}; cdl ls {store.root} lists them")


def check_files(points: Sequence[Point]) -> None:
    """Nothing if the files that points were made with, maybe on another machine, are here and the same.

    Raises:
      UserError: they are not.
    """
    seen: set[str] = set()
    for point in points:
        # A config takes a millisecond to make, and a grid may have ten thousand.
        files = {k: v for k, v in point.flat.items() if k == "init" or k.startswith(("data.", "model."))}
        key = repr((files, point.fingerprints))
        if key in seen:
            continue
        seen.add(key)
        c = point.config
        for field, path, here in (
            ("data.path", c.data.path, data.fingerprint(c.data)),
            ("init", c.init, initial.fingerprint(c)),
        ):
            if here != point.fingerprints[f"{field.partition('.')[0]}.fingerprint"]:
                raise UserError(f"{field}={path!r} is not what it was where the sweep was begun; bring the same files")


def compiled(point: Point, where: Layout) -> Program:
    """The program that runs this point and all points with an equal `program`, ready to run."""
    c, program = point.config, program_for(point, where)
    # Its iterator ends with it, and with that the threads or processes that read ahead.
    program.compile(in_every_process(lambda: next(data.build(c.data).batches(c.seed, 0, part=program.part))))
    return program


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
        frozen=initial.load(c)[0] if c.lora.rank else None,
    )


def step_cost(c: ConfigDict, where: Layout) -> StepCost:
    """What a step of a run takes, on its share of the devices."""
    dataset = data.build(c.data)
    batch = jax.eval_shape(dataset.prepare, jax.tree.map(lambda x: x[0], dataset.heldout(1)))
    model = models.build(
        c.model.to_dict(), Compute(attention="xla"), LoRA(**c.lora)
    )  # a fused one hides what it computes
    peak = peak_flops(where.mesh.devices.flat[0].device_kind, c.model.dtype)
    devices = where.mesh.size / where.lanes
    return StepCost(dataset.unit, dataset.per_batch, step_flops(model, batch), peak and peak * devices)


def parts_of(c: ConfigDict) -> tuple[models.Model, Any]:
    """Model and optimizer of a run, and all checks of it that need no data.

    Raises:
      UserError: bad values anywhere in the config, or parts that do not fit together.
    """
    eta_of(c)
    eval_steps(c)
    if not 0 <= c.compute.workers <= _MOST_WORKERS:
        raise UserError(f"compute.workers={c.compute.workers} must be from 0 to {_MOST_WORKERS}; one a core is plenty")
    how = c.checkpoint
    if how.seconds <= 0 or how.steps < 0 or how.keep < 1:
        raise UserError(
            f"checkpoint.seconds={how.seconds}, checkpoint.steps={how.steps}, checkpoint.keep={how.keep}: must be "
            f"positive, at least 0 and at least 1"
        )
    if c.lora.rank and not c.init:
        raise UserError(f"lora.rank={c.lora.rank} adapts weights that are there; say which by init=")
    model = models.build(c.model.to_dict(), Compute(**c.compute), LoRA(**c.lora))
    if model.data != data.DATA[c.data.name].takes:
        fit = " or ".join(repr(name) for name, kind in data.DATA.items() if kind.takes == model.data)
        raise UserError(f"model.name={c.model.name!r} takes data.name={fit} and not {c.data.name!r}")
    data.check_section(c.data, c.model.to_dict())
    if c.data.name == "vqa":
        for name, made in (("image_tokens", vlm.image_tokens(c.model)), ("image_size", c.model.image_size)):
            if c.data[name] != made:
                raise UserError(f"data.{name}={c.data[name]}, but the model's images have {made}; set it to {made}")
    absent = [str(path) for path in pretrained.paths_of(c.model.name, c.init) if not path.exists()] if c.init else []
    if absent:
        which = f" ({', '.join(absent)})" if "," in c.init else ""
        raise UserError(f"init={c.init!r} does not exist{which}; give safetensors, or the checkpoints of a run")
    if c.compute.microbatches > 1 and jax.tree.leaves(jax.eval_shape(model.init, 0)[1]):
        raise UserError(
            f"compute.microbatches={c.compute.microbatches}: model.name={c.model.name!r} normalises over the whole "
            f"batch; use 1, and more devices along mesh.data"
        )
    optimizer = optimizers.build(c.optimizer.to_dict(), model.rules)
    if c.optimizer.rates:  # says whether the paths are the model's
        jax.eval_shape(optimizer.init, jax.eval_shape(model.init, 0)[0])
    return model, optimizer


def eta_of(c: ConfigDict) -> np.ndarray:
    """The rates of a run, float64 [T]."""
    if not 0 <= c.seed < PROBE_SEED:
        raise UserError(f"seed={c.seed} must be in [0, 2^32 - 2]")
    if not 0 < c.eta_ref < math.inf:
        raise UserError(f"eta_ref={c.eta_ref} must be a positive number")
    arguments = c.schedule.to_dict()
    eta_T = schedule(arguments.pop("name"), c.T, peak=c.eta_ref / max(c.T, 1) ** 0.5, **arguments)
    if not eta_T.any():
        raise UserError(f"schedule {c.schedule.name!r} has no positive rate at T={c.T}; use a longer T")
    return eta_T


def eval_steps(c: ConfigDict) -> tuple[int, ...]:
    """The steps after which a run is evaluated, rising, the last is T."""
    if c.eval.times < 1 or c.eval.size < 1:
        raise UserError(f"eval.times={c.eval.times} and eval.size={c.eval.size} must be at least 1")
    times = min(c.eval.times, c.T)
    return tuple(sorted({max(1, round(c.T * i / times)) for i in range(1, times + 1)}))
