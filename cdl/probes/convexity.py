"""How convex a loss is along the path of a run: what the bounds of `cdl.theory` assume, measured.

For saved iterates w_t, w_s of a run, with g_t the gradient of the loss at w_t,

    gap[t, s] = L(w_t) - L(w_s) - <w_t - w_s, g_t>

is at most 0 for all t and s where the loss is convex along the path, and at most 0 for all t at one s where it is
star-convex towards w_s (Remark 2.2 of the paper). It is how far w_s lies below the tangent at w_t.

In array names P is the number of iterates, in the order of the run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdl.errors import UserError
from cdl.probes.sample import Iterate, Loss, between, inner, moved, toward

__all__ = ["Line", "Path", "measure_path", "ray", "segment"]


@dataclass(frozen=True, eq=False)
class Path:
    """What was measured at P iterates; float64.

    loss_P. inner_PxP: <w_t - w_s, g_t>, row t and column s. distance_PxP: |w_t - w_s|. norm_P: |g_t|. mean_square_P:
    mean of the squared norms of mini-batch gradients at w_t.
    """

    loss_P: np.ndarray
    inner_PxP: np.ndarray
    distance_PxP: np.ndarray
    norm_P: np.ndarray
    mean_square_P: np.ndarray

    @property
    def gap_PxP(self) -> np.ndarray:
        """The gaps, 0 on the diagonal."""
        return self.loss_P[:, None] - self.loss_P[None, :] - self.inner_PxP

    @property
    def relative_PxP(self) -> np.ndarray:
        """gap / (|L_t - L_s| + |<w_t - w_s, g_t>|), from -1 to 1 whatever the units; 0 where both are 0."""
        scale_PxP = np.abs(self.loss_P[:, None] - self.loss_P[None, :]) + np.abs(self.inner_PxP)
        return np.divide(self.gap_PxP, scale_PxP, out=np.zeros_like(scale_PxP), where=scale_PxP > 0)

    @property
    def lowest(self) -> int:
        """Which iterate has the lowest loss."""
        return int(np.argmin(self.loss_P))

    @property
    def G(self) -> float:
        """The bound of (2.2) on the path: the largest root mean square of mini-batch gradients."""
        return float(np.sqrt(self.mean_square_P.max()))

    def star_P(self, s: int = -1) -> np.ndarray:
        """The gaps towards one iterate, the last one if none is named."""
        return self.gap_PxP[:, s]

    def share_P(self, tolerance: float = 0.0) -> np.ndarray:
        """Of the ordered pairs of different iterates, both t or later, the share with a gap of at most `tolerance`; NaN
        for the last t, after which there is no pair."""
        held_PxP = self.gap_PxP <= tolerance
        P = len(held_PxP)
        share_P = np.full(P, np.nan)
        for t in range(P - 1):
            rest = P - t
            share_P[t] = (held_PxP[t:, t:].sum() - rest) / (rest * (rest - 1))
        return share_P

    def convex_from(self, tolerance: float = 0.0) -> int | None:
        """The first iterate from which on all pairs, of both orders, have a gap of at most `tolerance`; None where not
        even the last two have."""
        bad = np.argwhere(self.gap_PxP > tolerance).min(axis=1)
        first = int(bad.max()) + 1 if len(bad) else 0
        return first if first < len(self.loss_P) - 1 else None

    def star_from(self, tolerance: float = 0.0, s: int = -1) -> int | None:
        """The first iterate from which on all gaps towards s are at most `tolerance`; None where that of the last
        iterate but s is not."""
        s %= len(self.loss_P)
        gap_P = np.delete(self.star_P(s), s)
        bad = np.flatnonzero(gap_P > tolerance)
        first = int(bad[-1]) + 1 if len(bad) else 0
        return first + (first >= s) if first < len(gap_P) else None

    def rho_P(self, slack: float = 0.0, both: bool = False) -> np.ndarray:
        """The weak-convexity modulus: for each t the least rho >= 0 with gap[t, s] <= slack + rho/2 |w_t - w_s|^2 for
        all s after t; NaN for the last.

        Args:
          slack: what rounding may do to a gap, which would count for much where two iterates nearly agree.
          both: over all pairs of iterates from t on instead, whichever of the two the tangent is at.
        """
        over_PxP = np.maximum(self.gap_PxP - slack, 0.0)
        apart_PxP = self.distance_PxP**2
        rho_PxP = np.divide(2 * over_PxP, apart_PxP, out=np.zeros_like(over_PxP), where=apart_PxP > 0)
        later_P = np.triu(rho_PxP, 1).max(axis=1)
        if both:
            later_P = np.maximum(later_P, np.tril(rho_PxP, -1).max(axis=0))
            later_P = np.maximum.accumulate(later_P[::-1])[::-1].copy()
        later_P[-1] = np.nan
        return later_P


def measure_path(
    loss: Loss,
    load: Callable[[int], Iterate],
    count: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Path:
    """Losses, gradients and all pairs of P iterates.

    One gradient is there at a time. Iterates are loaded again for each gradient: `load` decides which to keep.

    Args:
      loss: L.
      load: i -> iterate i, 0 to count - 1, in the order of the run.
      count: P.
      tell: is told how many iterates are done.

    Raises:
      UserError: fewer than two iterates, or a loss that is not finite.
    """
    if count < 2:
        raise UserError(f"{count} iterate has no pair; give at least 2")
    inner_PxP, distance_PxP = np.zeros((count, count)), np.zeros((count, count))
    loss_P, norm_P, mean_square_P = np.zeros(count), np.zeros(count), np.zeros(count)
    for t in range(count):
        here = load(t)
        gradient = loss.gradient(here)
        loss_P[t] = gradient.loss
        norm_P[t] = inner(gradient.params, gradient.params) ** 0.5
        mean_square_P[t] = gradient.norm2_E.mean()
        for s in range(count):
            if s != t:
                length2, inner_PxP[t, s] = toward(here.params, load(s).params, gradient.params)
                distance_PxP[t, s] = length2**0.5
        tell(t + 1)
    return Path(loss_P, inner_PxP, distance_PxP, norm_P, mean_square_P)


@dataclass(frozen=True, eq=False)
class Line:
    """The loss at N points of a line, evenly spaced.

    at_N: their positions, in the units of whoever chose the line. length: what 1 of these is in the norm of the
    parameters. loss_N: float64.
    """

    at_N: np.ndarray
    length: float
    loss_N: np.ndarray

    @property
    def bend(self) -> float:
        """The most negative second difference of the loss, in its units; positive where all are."""
        return float(np.diff(self.loss_N, 2).min())

    @property
    def curvature(self) -> float:
        """The same as a second derivative along the line: over the squared length of a step. 0 on a line of none."""
        step = (self.at_N[1] - self.at_N[0]) * self.length
        return self.bend / step**2 if step else 0.0


def segment(loss: Loss, a: Iterate, b: Iterate, points: int = 21) -> Line:
    """The loss on the way from a (0) to b (1), in equal steps of both ends; what else the loss reads goes along."""
    at_N = _grid(points)
    length2, _ = toward(a.params, b.params, a.params)
    return Line(at_N, length2**0.5, np.array([loss(between(a, b, share)) for share in at_N]))


def ray(loss: Loss, at: Iterate, gradient: Any, reach: float, points: int = 21) -> Line:
    """L(w - a g) for a from 0 to `reach`; the length of a = 1 is |g|."""
    at_N = _grid(points) * reach
    length = inner(gradient, gradient) ** 0.5
    return Line(at_N, length, np.array([loss(moved(at, gradient, -a)) for a in at_N]))


def _grid(points: int) -> np.ndarray:
    if points < 3:
        raise UserError(f"{points} points have no second difference; give at least 3")
    return np.linspace(0.0, 1.0, points)
