"""`cdl probe`: what the bounds assume of a loss, measured on the saved iterates of a run, finished or under way.

The loss is the training loss on a fixed sample: the first batches, as the run's config makes them, of a data order of
its own (`PROBE_SEED`). So all runs of a sweep are probed on the same rows, whatever their seeds. Models are in their
evaluation mode and in float32: batch normalisation uses the statistics saved with each iterate, held fixed.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cdl.compute import Compute
from cdl.data import build as data
from cdl.errors import UserError, say
from cdl.models import build as models
from cdl.models.lora import LoRA
from cdl.probes.convexity import Path as Measured
from cdl.probes.convexity import measure_path, ray, segment
from cdl.probes.curvature import extreme_eigenvalues, most_steps
from cdl.probes.result import Bend, Probe
from cdl.probes.sample import Gradient, Iterate, Loss, inner, toward
from cdl.sweep import initial
from cdl.sweep.programs import PROBE_SEED, check_files, eta_of, stored_point
from cdl.sweep.store import Store
from cdl.train.checkpoint import read_weights, saved_steps

__all__ = ["probe"]

_PRODUCTS = 60  # with a Hessian, at most, at one iterate
_FEWEST_PRODUCTS = 5
_SHARE = 0.5  # of the memory that is free
_REACH = 4.0  # of a ray, in steps to the minimum that the loss would have if it were quadratic along it
HOW_TO_SAVE = "train with checkpoint.steps=20 checkpoint.keep=1000 --keep (cdl train, cdl sweep), into another --out"


def probe(
    folder: str | os.PathLike[str],
    id: str,
    *,
    samples: int = 16384,
    iterates: int = 50,
    curvature: int = 5,
    T: int | None = None,
    tolerance: float = 1e-4,
    tell: Callable[[str], None] = lambda words: None,
) -> Probe:
    """Measure a run of a sweep along its saved iterates, and the weights that it began with.

    Args:
      folder: of the sweep.
      id: of the run, all of it.
      samples: tokens or images of training data, about; whole batches, at least two.
      iterates: how many to use at most, the first and the last among them; evenly spaced of those there are.
      curvature: at how many of these to find eigenvalues.
      T: end at the last iterate that has seen at most so many updates.
      tolerance: up to which a gap counts as none, in the units of the loss.
      tell: is told what is being done.

    Raises:
      UserError: no such run, fewer than two iterates saved, other data than the run had, or a loss that is not finite.
    """
    for name, value, least in (("samples", samples, 1), ("iterates", iterates, 3), ("curvature", curvature, 0)):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if not tolerance >= 0:
        raise UserError(f"--tolerance={tolerance} must be at least 0")
    store = Store(Path(folder))
    point = stored_point(store, id)
    check_files([point])
    c = point.config
    steps = [s for s in saved_steps(store.checkpoints(point)) if T is None or s <= T]
    done = id in store.ids()
    if len(steps) < 2:
        up_to = f" up to --T={T}" if T is not None else ""
        if done and store.result(id)["status"] != "done":
            raise UserError(f"run {id} has diverged, and of such runs no iterates are kept; probe it under way")
        there = "none" if not steps else f"one, of step {steps[0]}"
        raise UserError(f"of the iterates of run {id}{up_to} {there} is saved, and probing needs two; {HOW_TO_SAVE}")
    # What fused attention computes has no second derivative; and in bfloat16 gaps would be rounding.
    exact = c.model.to_dict() | {"dtype": "float32"}
    model = models.build(exact, Compute(remat=c.compute.remat, attention="xla"), LoRA(**c.lora))
    frozen = initial.load(c)[0] if c.lora.rank else None
    dataset = data.build(c.data)
    most, reserved = _vectors(model) if curvature else (0, 0)
    tell("reading iterates")
    saved = _Iterates(store.checkpoints(point), c, model, _spread(steps, iterates - 1), not done, reserved)
    batch_E = _sample(dataset, samples)
    E = len(jax.tree.leaves(batch_E)[0])

    def sums(params: Any, stats: Any, batch: Any, frozen: Any) -> tuple[jax.Array, jax.Array]:
        found, _ = model.over(frozen).loss(params, stats, dataset.prepare(batch), train=False)
        return found.loss, found.count

    loss = Loss(sums, batch_E, frozen)
    step_P = np.array(saved.steps)
    P, eta_T = len(step_P), eta_of(c)
    try:
        path = measure_path(loss, saved.load, P, lambda n: tell(f"gradients: {n} of {P} iterates"))
        tell("segments")
        segments = [
            (a, P - 1, segment(loss, saved.load(a), saved.load(P - 1))) for a in sorted({0, 1, P // 2} - {P - 1})
        ]
        bends = []
        for n, i in enumerate(_spread(range(P), curvature), 1):
            tell(f"curvature: {n} of {curvature} iterates")
            bends.append(_bend(loss, saved, i, path, most))
        tell("rounding")
        rounding = _rounding(loss, saved, P)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device has too little memory for batches of data.batch_size={c.data.batch_size} of this model; "
            f"probe on one with more, or on the CPU by JAX_PLATFORMS=cpu"
        ) from error
    unit = f"{E * dataset.per_batch:,} {dataset.unit} of training data in {E} batches"
    name = f"{id}: {c.model.name}, {c.optimizer.name}, {c.schedule.name}, eta_ref={c.eta_ref:g}, T={c.T}, seed={c.seed}"
    rate_P = eta_T[np.minimum(step_P, c.T - 1)]
    status = "done" if done else "under way"
    return Probe(id, name, c.T, status, step_P, rate_P, path, bends, segments, unit, tolerance, rounding)


class _Iterates:
    """w_0 and saved iterates: as many as fit are kept in memory, the others are read from disk whenever they are used.

    hold: read all that fit now, since whoever trains the run may remove them; those that are gone already are left out.
    reserved: bytes to leave free.
    """

    def __init__(
        self, folder: Path, c: ConfigDict, model: models.Model, steps: Sequence[int], hold: bool, reserved: int
    ):
        self._folder, self._kept = folder, dict[int, Iterate]()
        params, stats = initial.load(c) if c.init and not c.lora.rank else jax.device_get(jax.jit(model.init)(c.seed))
        self._kept[0] = Iterate(params, stats)
        size = sum(x.nbytes for x in jax.tree.leaves(self._kept[0]))
        self._fit = max(2, int(_SHARE * (free_memory() - reserved) // size))
        self.steps = [0, *steps]
        if len(self.steps) > self._fit:
            say(
                f"memory holds {self._fit} of {len(self.steps)} iterates of {size / 1e6:,.3g} MB; the others are read "
                f"again for each gradient, which fewer --iterates would spare"
            )
        for step in steps if hold else ():
            try:
                self._read(step)
            except UserError:
                if (folder / f"step_{step}").exists():
                    raise
                self.steps.remove(step)
        if len(self.steps) < 3:
            raise UserError(f"iterates in {folder} were removed while they were read; {HOW_TO_SAVE}")

    def load(self, i: int) -> Iterate:
        return self._read(self.steps[i])

    def _read(self, step: int) -> Iterate:
        if step in self._kept:
            return self._kept[step]
        read = Iterate(*read_weights(self._folder / f"step_{step}")[:2])
        if len(self._kept) < self._fit:
            self._kept[step] = read
        return read


def free_memory() -> int:
    """Bytes that this machine could give now."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _spread(there: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly spaced, the first and the last among them; of one, the last."""
    if count >= len(there):
        return list(there)
    places = np.linspace(0, len(there) - 1, count) if count > 1 else np.full(count, len(there) - 1)
    return [there[i] for i in np.unique(places.round().astype(int))]


def _sample(dataset: data.Dataset, samples: int) -> Any:
    """The first batches of the order of `PROBE_SEED`, with a leading axis E."""
    E = max(2, round(samples / dataset.per_batch))
    batches = list(itertools.islice(dataset.batches(PROBE_SEED, 0), E))
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def _vectors(model: models.Model) -> tuple[int, int]:
    """How many products with the Hessian to make at most, and the bytes that their vectors take.

    Raises:
      UserError: memory holds too few of them.
    """
    N = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, 0)[0]))
    most = min(_PRODUCTS, most_steps(N, _SHARE * free_memory()))
    if most < min(_FEWEST_PRODUCTS, N):
        raise UserError(f"memory holds {most} vectors of {N:,} parameters, too few for eigenvalues; use --curvature=0")
    return most, 8 * N * most


def _bend(loss: Loss, saved: _Iterates, i: int, path: Measured, most: int) -> Bend:
    """Eigenvalues at an iterate, from so many products at most, and the loss along its gradient."""
    at = saved.load(i)
    product = loss.product(at)
    spectrum = extreme_eigenvalues(product, at.params, most=most)
    gradient = loss.gradient(at)
    length2 = inner(gradient.params, gradient.params)
    bent = inner(gradient.params, jax.device_get(product(gradient.params)))
    if bent > 0:
        reach = _REACH * length2 / bent
    else:  # no minimum along it; as far as the next iterate is
        reach = path.distance_PxP[i, i + 1 if i + 1 < len(path.loss_P) else i - 1] / length2**0.5
    return Bend(i, spectrum, ray(loss, at, gradient.params, reach))


def _rounding(loss: Loss, saved: _Iterates, P: int) -> float:
    """What the same rows in smaller batches change gaps by: the largest of four pairs, the ends and the last two; NaN
    where batches are of one row."""
    other = loss.divided()
    if other is None:
        return float("nan")
    ends = {i: saved.load(i) for i in {0, P - 2, P - 1}}
    both: dict[int, tuple[Gradient, Gradient]] = {i: (loss.gradient(w), other.gradient(w)) for i, w in ends.items()}

    def change(t: int, s: int) -> float:
        (a, b), (c, d) = both[t], both[s]
        slope = jax.tree.map(np.subtract, b.params, a.params)
        return abs((b.loss - a.loss) - (d.loss - c.loss) - toward(ends[t].params, ends[s].params, slope)[1])

    pairs = [(0, P - 1), (P - 1, 0), (P - 1, P - 2), (P - 2, P - 1)]
    return max(change(t, s) for t, s in pairs if t != s)
