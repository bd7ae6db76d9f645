"""What a probe of a run has found: in words, as numbers for a file, and as a figure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cdl.probes.convexity import Line
from cdl.probes.convexity import Path as Measured
from cdl.probes.curvature import Spectrum
from cdl.probes.figures import probe_figure

__all__ = ["Bend", "Probe"]


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
                f"weakly convex along the path {_from(self.convex_from)}: gap <= {self.tolerance:g} for all pairs from "
                f"there ({p.share_P(self.tolerance)[0]:.1%} of all pairs)",
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
