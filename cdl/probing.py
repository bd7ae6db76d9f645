"""`cdl probe`: what the bounds assume of a loss, measured on the saved iterates of a run, finished or under way.

The loss is the training loss on a fixed sample: the first batches, as the run's config makes them, of a data order that
belongs to no run (`_ORDER`). So all runs of a sweep are probed on the same rows, whatever their seeds. Models are in
their evaluation mode: batch normalisation uses the statistics saved with each iterate, which are held fixed.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from cdl.compute import Compute
from cdl.data import build as data
from cdl.errors import UserError, say
from cdl.models import build as models
from cdl.probes.convexity import Line, measure_path, ray, segment
from cdl.probes.convexity import Path as Measured
from cdl.probes.curvature import Spectrum, extreme_eigenvalues, most_steps
from cdl.probes.figures import probe_figure
from cdl.probes.sample import Gradient, Iterate, Loss, inner, toward
from cdl.sweep import initial
from cdl.sweep.grid import Point, points_in
from cdl.sweep.programs import check_files, eta_of
from cdl.sweep.store import Store
from cdl.train.checkpoint import read_weights, saved_steps

__all__ = ["Probe", "probe"]

_ORDER = 2**32 - 1  # the seed of the sample
_PRODUCTS = 60  # with a Hessian, at most, at one iterate
_FEWEST_PRODUCTS = 5
_SHARE = 0.5  # of the memory that is free
_REACH = 4.0  # of a ray, in steps to the minimum that the loss would have if it were quadratic along it
HOW_TO_SAVE = "train with checkpoint.steps=20 checkpoint.keep=1000 --keep (cdl train, cdl sweep), into another --out"


@dataclass(frozen=True, eq=False)
class Bend:
    """Curvature at one iterate. index: which. slope: the loss along the gradient there, `cdl.probes.convexity.ray`."""

    index: int
    spectrum: Spectrum
    slope: Line


@dataclass(frozen=True, eq=False)
class Probe:
    """What was measured of a run.

    id, name: of the run. T: its updates; status: "done" or "under way". step_P: updates that each iterate has seen, the
    first 0. rate_P: rate of the update after each (of the last update, at the end). path: losses, gaps, gradient norms
    and distances. bends: at some of the iterates. segments: (index, index, loss on the way). sample: what the loss is a
    mean over. tolerance: up to which a gap counts as none. rounding: what putting the rows of the sample into other
    batches changes gaps by, NaN where that cannot be done.
    """

    id: str
    name: str
    T: int
    status: str
    step_P: np.ndarray
    rate_P: np.ndarray
    path: Measured
    bends: Sequence[Bend]
    segments: Sequence[tuple[int, int, Line]]
    sample: str
    tolerance: float
    rounding: float

    @property
    def convex_from(self) -> int | None:
        """The step from which on all pairs of saved iterates have a gap of at most `tolerance`."""
        return self._step(self.path.convex_from(self.tolerance))

    @property
    def star_from(self) -> int | None:
        """The step from which on all gaps towards the last iterate are at most `tolerance`."""
        return self._step(self.path.star_from(self.tolerance))

    @property
    def rho_P(self) -> np.ndarray:
        """The weak-convexity modulus of the path after each iterate, beyond rounding."""
        return self.path.rho_P(self._slack)

    @property
    def rho_both_P(self) -> np.ndarray:
        """The same over all pairs from each iterate on, of both orders."""
        return self.path.rho_P(self._slack, both=True)

    @property
    def sharpness(self) -> list[tuple[int, float]]:
        """(step, rate x largest eigenvalue): gradient descent is stable below 2."""
        return [(int(self.step_P[b.index]), float(self.rate_P[b.index]) * b.spectrum.largest) for b in self.bends]

    @property
    def _slack(self) -> float:
        return self.rounding if np.isfinite(self.rounding) else 0.0

    def _step(self, index: int | None) -> int | None:
        return None if index is None else int(self.step_P[index])

    def summary(self) -> str:
        """What came out, in a few lines."""
        p, step_P, last = self.path, self.step_P, int(self.step_P[-1])
        t, s = np.unravel_index(np.argmax(p.gap_PxP), p.gap_PxP.shape)
        half, noisiest, root_P = len(step_P) // 2, int(np.argmax(p.mean_square_P)), p.mean_square_P**0.5
        return "\n".join(
            [
                f"{self.name}, {self.status}: {len(step_P)} iterates, steps 0 to {last}",
                f"loss of {self.sample}: {p.loss_P[0]:.4f} at step 0, {p.loss_P[-1]:.4f} at step {last}, lowest "
                f"{p.loss_P[p.lowest]:.4f} at step {step_P[p.lowest]}",
                f"weakly convex along the path {_from(self.convex_from)}: gap <= {self.tolerance:g} for all pairs from there "
                f"({p.share_P(self.tolerance)[0]:.1%} of all pairs)",
                f"star-convex towards the last iterate {_from(self.star_from)}: gap <= {self.tolerance:g}",
                f"largest gap {p.gap_PxP.max():.3g}: step {step_P[s]} below the tangent at step {step_P[t]}; rounding "
                f"{self.rounding:.1g}",
                f"weak-convexity modulus of the path: {self.rho_both_P[0]:.3g} over all pairs, "
                f"{self.rho_both_P[half]:.3g} from step {step_P[half]} on",
                f"G = {p.G:.3g}, the largest root mean square of mini-batch gradients (step {step_P[noisiest]}); "
                f"{root_P[-1]:.3g} at step {last}",
                f"norm of the full gradient {p.norm_P[0]:.3g} at step 0, {p.norm_P[-1]:.3g} at step {last}; "
                f"|w_0 - w_T| = {p.distance_PxP[0, -1]:.4g}",
                *(self._of_segment(*x) for x in self.segments),
                *map(self._of_bend, self.bends),
            ]
        )

    def _of_segment(self, a: int, b: int, line: Line) -> str:
        return (
            f"segment from step {self.step_P[a]} to {self.step_P[b]}: loss {line.loss_N[0]:.4f} to "
            f"{line.loss_N[-1]:.4f}, at most {line.loss_N.max():.4f}, {_bent(line)}"
        )

    def _of_bend(self, bend: Bend) -> str:
        s, rate, step = bend.spectrum, float(self.rate_P[bend.index]), self.step_P[bend.index]
        return (
            f"step {step}: eigenvalues {s.smallest:.3g} ± {s.smallest_error:.1g} to {s.largest:.3g} ± "
            f"{s.largest_error:.1g} ({s.products} products{'' if s.converged else ', not converged'}); rate x largest "
            f"{rate * s.largest:.3g}; against the gradient {_bent(bend.slope)}"
        )

    def plot(self) -> Figure:
        """A figure of all of it."""
        return probe_figure(self)

    def numbers(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them; what is not known is null."""
        p = self.path
        made = {
            "id": self.id,
            "run": self.name,
            "T": self.T,
            "status": self.status,
            "sample": self.sample,
            "tolerance": self.tolerance,
            "rounding": self.rounding,
            "convex_from": self.convex_from,
            "star_from": self.star_from,
            "G": p.G,
            "step": self.step_P,
            "rate": self.rate_P,
            "loss": p.loss_P,
            "gradient_norm": p.norm_P,
            "mean_square": p.mean_square_P,
            "share": p.share_P(self.tolerance),
            "rho": self.rho_P,
            "rho_both": self.rho_both_P,
            "star_last": p.star_P(),
            "star_lowest": p.star_P(p.lowest),
            "from_start": p.distance_PxP[0],
            "to_end": p.distance_PxP[:, -1],
            "gap": p.gap_PxP,
            "relative_gap": p.relative_PxP,
            "inner": p.inner_PxP,
            "distance": p.distance_PxP,
            "segments": [
                {"from": self.step_P[a], "to": self.step_P[b]} | _of_line(line) for a, b, line in self.segments
            ],
            "curvature": [
                {"step": self.step_P[b.index], "rate": self.rate_P[b.index]}
                | {k: v for k, v in b.spectrum._asdict().items() if k != "vectors"}
                | {"along_gradient": _of_line(b.slope)}
                for b in self.bends
            ],
        }
        return _plain(made)

    def save(self, out: Path) -> list[Path]:
        """Write probe.json and probe.png into a folder, which is made."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "probe.json").write_text(json.dumps(self.numbers()))
        self.plot().savefig(out / "probe.png", dpi=100)
        return [out / "probe.json", out / "probe.png"]


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
    point = _point(store, id)
    check_files([point])
    c = point.config
    steps = [s for s in saved_steps(store.checkpoints(point)) if T is None or s <= T]
    done = id in store.ids()
    if len(steps) < 2:
        up_to = f" up to --T={T}" if T is not None else ""
        there = "none" if not steps else f"one, of step {steps[0]}"
        raise UserError(f"of the iterates of run {id}{up_to} {there} is saved, and probing needs two; {HOW_TO_SAVE}")
    model = models.build(c.model.to_dict(), Compute(remat=c.compute.remat, attention="xla"))
    dataset = data.build(c.data)
    tell("reading iterates")
    saved = _Iterates(store.checkpoints(point), c, model, _spread(steps, iterates - 1), hold=not done)
    batch_E = _sample(dataset, samples)
    E = len(jax.tree.leaves(batch_E)[0])

    def sums(params: Any, stats: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        found, _ = model.loss(params, stats, dataset.prepare(batch), train=False)
        return found.loss, found.count

    loss = Loss(sums, batch_E)
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
            bends.append(_bend(loss, saved, i, path, model.n_params))
        tell("rounding")
        rounding = _rounding(sums, loss, batch_E, saved, P)
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
    """

    def __init__(self, folder: Path, c: ConfigDict, model: models.Model, steps: Sequence[int], hold: bool):
        self._folder, self._kept = folder, dict[int, Iterate]()
        params, stats = initial.load(c) if c.init else jax.device_get(jax.jit(model.init)(c.seed))
        self._kept[0] = Iterate(params, stats)
        size = sum(x.nbytes for x in jax.tree.leaves(self._kept[0]))
        self._fit = max(2, int(_SHARE * free_memory() // size))
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
        read = Iterate(*read_weights(self._folder / f"step_{step}"))
        if len(self._kept) < self._fit:
            self._kept[step] = read
        return read


def free_memory() -> int:
    """Bytes that this machine could give now."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _point(store: Store, id: str) -> Point:
    for grid in store.grids():
        for point in points_in(grid):
            if point.id == id:
                return point
    raise UserError(f"{store.root} has no run {id}; cdl ls {store.root} lists them")


def _spread(there: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly spaced, the first and the last among them; of one, the last."""
    if count >= len(there):
        return list(there)
    places = np.linspace(0, len(there) - 1, count) if count > 1 else np.full(count, len(there) - 1)
    return [there[i] for i in np.unique(places.round().astype(int))]


def _sample(dataset: data.Dataset, samples: int) -> Any:
    """The first batches of the order of `_ORDER`, with a leading axis E."""
    E = max(2, round(samples / dataset.per_batch))
    batches = list(itertools.islice(dataset.batches(_ORDER, 0), E))
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def _bend(loss: Loss, saved: _Iterates, i: int, path: Measured, N: int) -> Bend:
    """Eigenvalues at an iterate, and the loss along its gradient."""
    most = min(_PRODUCTS, most_steps(N, _SHARE * free_memory()))
    if most < min(_FEWEST_PRODUCTS, N):
        raise UserError(f"memory holds {most} vectors of {N:,} parameters, too few for eigenvalues; use --curvature=0")
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


def _rounding(sums: Any, loss: Loss, batch_E: Any, saved: _Iterates, P: int) -> float:
    """What the same rows in other batches change gaps by: the largest of four pairs, the ends and the last two."""
    E, B = jax.tree.leaves(batch_E)[0].shape[:2]
    if B == 1:
        return float("nan")
    parts = next(n for n in range(2, B + 1) if B % n == 0)
    other = Loss(sums, jax.tree.map(lambda x: x.reshape(E * parts, B // parts, *x.shape[2:]), batch_E))
    ends = {i: saved.load(i) for i in {0, P - 2, P - 1}}
    both: dict[int, tuple[Gradient, Gradient]] = {i: (loss.gradient(w), other.gradient(w)) for i, w in ends.items()}

    def change(t: int, s: int) -> float:
        (a, b), (c, d) = both[t], both[s]
        slope = jax.tree.map(np.subtract, b.params, a.params)
        return abs((b.loss - a.loss) - (d.loss - c.loss) - toward(ends[t].params, ends[s].params, slope)[1])

    pairs = [(0, P - 1), (P - 1, 0), (P - 1, P - 2), (P - 2, P - 1)]
    return max(change(t, s) for t, s in pairs if t != s)


def _from(step: int | None) -> str:
    return "from no step on" if step is None else f"from step {step} on"


def _bent(line: Line) -> str:
    """Words for the second differences of a line."""
    if line.bend >= 0:
        return "convex at its points"
    return f"second differences down to {line.bend:.2g} (curvature {line.curvature:.2g})"


def _of_line(line: Line) -> dict[str, Any]:
    return asdict(line) | {"bend": line.bend, "curvature": line.curvature}


def _plain(x: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple | np.ndarray):
        return [_plain(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not np.isfinite(x) else x
