"""Rates that make the last-iterate bound (2.4) smallest: a peak, a cooldown, a whole schedule, or the rest of one.

The best schedule. In the sums from the end, R_t = eta_t + .. + eta_T, the bound is

    D²/(2 R_1)  +  1/2 [ sum_{t<T} G_t² (R_t - R_{t+1})² / R_{t+1}  +  G_T² R_T ],

a sum of convex functions (squares over linear ones), so it has one minimum, and it is where the derivatives vanish.
With r_t = R_t / R_{t+1} - 1 they say

    G_T² = G_{T-1}² ((1 + r_{T-1})² - 1),   2 G_t² r_t = G_{t-1}² ((1 + r_{t-1})² - 1),   R_1² = D² / (2 G_1² r_1),

which is solved from the end, one square root a step: no descent, no starting point, exact at any T. As T grows its
solution tends to eta_t ~ G_t^-2 sum_{s>t} G_s^-2, and for gradient norms that stay the same to linear decay.

The best continuation of given rates is the same problem with the beginning fixed. What the future costs is
proportional to X, the sum of its rates, and what the past costs falls with X, so X is the root of one equation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from scipy import optimize

from cdl.errors import UserError
from cdl.schedules import schedule
from cdl.theory.bounds import bound, bound_terms, checked

__all__ = ["Continuation", "Cooldown", "Optimum", "best_continuation", "best_cooldown", "best_peak", "best_schedule"]


@dataclass(frozen=True)
class Optimum:
    """A schedule that makes the bound smallest.

    eta_T: its rates. bound: at T, without L*. linear: the bound of linear decay from its own best peak, to compare.
    """

    eta_T: np.ndarray
    bound: float
    linear: float

    @property
    def improvement(self) -> float:
        """By which share it is below linear decay."""
        return 1 - self.bound / self.linear


@dataclass(frozen=True)
class Cooldown:
    """The best cooldown of a warmup-stable-decay schedule: its length, the rate before it, and the bound less L*."""

    steps: int
    share: float
    peak: float
    bound: float


@dataclass(frozen=True)
class Continuation:
    """Ways to go on from rates that were applied to a later horizon, best first.

    ways: name -> all T rates, those of the past included. bounds: name -> bound at T, without L*. notes: name -> what
    was chosen. scratch: the bound of the best schedule that starts again.
    """

    ways: dict[str, np.ndarray]
    bounds: dict[str, float]
    notes: dict[str, str]
    scratch: float


def best_peak(eta_T: ArrayLike, D: ArrayLike = 1.0, G: ArrayLike = 1.0) -> Any:
    """The peak rate at which a schedule of this shape has the smallest last-iterate bound; a float, or [R].

    The size of eta_T does not matter. It is the largest rate that is given, which in ``schedule`` may be a step short
    of ``peak``. The bound there is ``bound_terms(eta_T, D, G).best``. Arguments and errors as `bound`; UserError also
    where no rate is positive, or D or G is 0.

    >>> round(best_peak([1.0, 1.0, 1.0]), 6)  # sqrt(1 / (3 (1 + 1/2 + 1)))
    0.365148
    """
    terms = bound_terms(eta_T, D, G)
    peak = np.max(np.asarray(eta_T, np.float64), axis=-1)
    if not np.all(peak > 0):
        raise UserError("eta_T has no positive rate, so it has no best peak; give a schedule that moves")
    if not np.all(terms.noise > 0):
        raise UserError("G=0 makes every larger rate better; give positive gradient norms")
    if not np.all(terms.distance > 0):
        raise UserError("D=0 starts at a minimiser, where the best rate is 0; give a positive distance")
    best = terms.best_scale * peak
    return float(best) if np.ndim(best) == 0 else best


def best_cooldown(
    T: int, D: float = 1.0, G: ArrayLike = 1.0, *, peak: float | None = None, warmup: float = 0, form: str = "linear"
) -> Cooldown:
    """The length of the last phase of ``schedule("wsd", T)`` with the smallest last-iterate bound.

    Args:
      T: horizon.
      D, G: as in `bound`.
      peak: the rate of the stable phase; without it, the best one for each length.
      warmup, form: of the schedule.

    Raises:
      UserError: arguments that `bound` or `schedule` refuse.

    With the best peak and gradient norms that stay the same, the answer is: all of it (linear decay). A stable phase
    pays where the rate is given and smaller than that of linear decay, or where gradient norms grow.
    """

    def rates(steps: int) -> np.ndarray:
        height = 1.0 if peak is None else peak
        return schedule("wsd", T, peak=height, warmup=warmup, decay=steps, form=form)

    def cost(steps: int) -> float:
        terms = bound_terms(rates(steps), D, G)
        return terms.best if peak is None else terms.total

    rates(0)  # checks the arguments
    longest = T - (round(warmup * T) if isinstance(warmup, float) else warmup)
    steps = _least_whole(cost, 0, longest)
    rate = float(bound_terms(rates(steps), D, G).best_scale) if peak is None else float(peak)
    return Cooldown(steps, steps / T, rate, cost(steps))


def best_schedule(T: int, D: float = 1.0, G: ArrayLike = 1.0) -> Optimum:
    """The one schedule of T rates with the smallest last-iterate bound, for any gradient norms.

    Args:
      T: horizon.
      D: distance from the start to a minimiser.
      G: gradient norm, a number or one for each step, [T]; positive.

    Raises:
      UserError: T below 1, D or G not positive, G of another length.

    >>> best = best_schedule(2)
    >>> [round(float(e), 4) for e in best.eta_T]  # R_1² = 1 / (2 (sqrt 2 - 1))
    [0.3218, 0.7769]
    """
    linear = schedule("linear", T) if T != 1 else np.ones(1)  # checks T
    G_T = _norms(G, T)
    r_T = _ratios(G_T)
    first = _distance(D) / np.sqrt(2 * r_T[0]) / G_T[0]  # R_1
    eta_T = _from_ratios(r_T, first)
    return Optimum(eta_T, bound(eta_T, D, G_T), bound_terms(linear, D, G_T).best)


def best_continuation(
    past_T: ArrayLike, T: int, D: float = 1.0, G: ArrayLike = 1.0, *, cooldown: float = 0.2
) -> Continuation:
    """How to go on after the rates past_T, [T1], when the horizon becomes T (Schaipp et al. 2025, section 5).

    Ways: ``best``, the free optimum; ``same rate``, the last positive rate kept, then the best linear cooldown;
    ``lower rate``, the best constant share of it, then a linear cooldown over the last `cooldown` (share) of T;
    ``linear``, straight to 0 from the best rate.

    Args:
      past_T: rates already applied. Give the stable phase, without a cooldown that would be undone.
      T: the new horizon, larger than T1.
      D, G: as in `best_schedule`; G has one norm for each of the T steps, or one number.
      cooldown: for ``lower rate``.

    Raises:
      UserError: as `best_schedule`; no positive rate in past_T, or T not beyond it.
    """
    past_T = np.asarray(checked("past_T", past_T))
    if past_T.ndim != 1 or not past_T.any():
        raise UserError(f"past_T has shape {past_T.shape} and must be at least one positive rate, as [T1]")
    rest = len(schedule("constant", T)) - len(past_T)
    if rest < 1:
        raise UserError(f"T={T} must be larger than the {len(past_T)} updates of past_T")
    if not (isinstance(cooldown, int | float) and 0 < cooldown <= 1):
        raise UserError(f"cooldown={cooldown!r} must be a share of T in (0, 1]")
    D, G_T = _distance(D), _norms(G, T)
    rate = float(past_T[past_T > 0][-1])

    def joined(future: np.ndarray) -> np.ndarray:
        return np.concatenate([past_T, future])

    def cost(future: np.ndarray) -> float:
        return bound(joined(future), D, G_T)

    def flat_then_down(steps: int, height: float = 1.0) -> np.ndarray:
        return height * rate * np.minimum(1, np.arange(rest, 0, -1) / (steps + 1))

    steps = _least_whole(lambda n: cost(flat_then_down(n)), 1, rest)
    last = min(rest, max(1, round(cooldown * T)))
    share = _least(lambda s: cost(flat_then_down(last, s)))
    start = _least(lambda s: cost(flat_then_down(rest, s)))
    futures = {
        "best": (_best_future(past_T, D, G_T), "the free optimum"),
        "same rate": (flat_then_down(steps), f"cooldown over the last {steps} updates, {steps / T:.1%} of T"),
        "lower rate": (flat_then_down(last, share), f"{share:.3f} of the rate, cooldown over the last {last} updates"),
        "linear": (flat_then_down(rest, start), f"from {start:.3f} of the rate to 0"),
    }
    bounds = {name: cost(future) for name, (future, _) in futures.items()}
    order = sorted(futures, key=lambda name: bounds[name])
    return Continuation(
        ways={name: joined(futures[name][0]) for name in order},
        bounds={name: bounds[name] for name in order},
        notes={name: futures[name][1] for name in order},
        scratch=best_schedule(T, D, G_T).bound,
    )


def _best_future(past_T: np.ndarray, D: float, G_T: np.ndarray) -> np.ndarray:
    """The rates after past_T that make the bound smallest; their sum X is where past gain meets future cost."""
    T1 = len(past_T)
    r_T = _ratios(G_T[T1:])
    after_T = np.append(np.cumsum(past_T[:0:-1])[::-1], 0.0)  # the rates that follow in the past
    weight_T = (past_T * G_T[:T1]) ** 2
    moved = weight_T > 0
    price = G_T[T1] ** 2 * r_T[0]  # of each unit of X

    def worth(log_X: float) -> float:
        """Of more X: what it takes from the past's terms over what it adds to the future's, as a log; it falls."""
        X = np.exp(log_X)
        gain = D**2 / (past_T.sum() + X) ** 2 + (weight_T[moved] / (after_T[moved] + X) ** 2).sum()
        return float(np.log(gain / 2) - np.log(price))

    low = high = np.log(past_T.max())
    while worth(low) <= 0:
        low -= 5.0
    while worth(high) >= 0:
        high += 5.0
    return _from_ratios(r_T, float(np.exp(optimize.brentq(worth, low, high, xtol=1e-14))))


# --- The recursion -------------------------------------------------------------------------------------------------


def _ratios(G_T: np.ndarray) -> np.ndarray:
    """r_t = R_t / R_{t+1} - 1 for t = 1..T-1, and 1/2 in the place of r_T, for which the recursion asks 2 r_T = 1."""
    with jax.enable_x64(True):
        return np.asarray(_ratios_jit(jax.device_put(G_T, jax.local_devices(backend="cpu")[0])))


@jax.jit
def _ratios_jit(G_T: Array) -> Array:
    def step(r: Array, change: Array) -> tuple[Array, Array]:
        y = 2 * r * change
        r = y / (1 + jnp.sqrt(1 + y))  # sqrt(1 + y) - 1
        return r, r

    change_T = (G_T[1:] / G_T[:-1]) ** 2
    last = jnp.full((), 0.5, G_T.dtype)
    _, r_T = lax.scan(step, last, change_T, reverse=True, unroll=8)
    return jnp.append(r_T, last)


def _from_ratios(r_T: np.ndarray, first: float) -> np.ndarray:
    """eta_t = r_t R_{t+1} from R_1."""
    log_R_T = np.log(first) - np.append(0.0, np.cumsum(np.log1p(r_T[:-1])))
    R_T = np.exp(log_R_T)
    return np.append(r_T[:-1] * R_T[1:], R_T[-1])


# --- Parts ---------------------------------------------------------------------------------------------------------


def _distance(D: float) -> float:
    D_ = checked("D", D)
    if D_.shape != ():
        raise UserError(f"D has shape {D_.shape}; give one number")
    if D_ == 0:
        raise UserError("D=0 starts at a minimiser, where the best rate is 0; give a positive distance")
    return float(D_)


def _norms(G: ArrayLike, T: int) -> np.ndarray:
    G_T = checked("G", G)
    if G_T.shape not in ((), (T,)):
        raise UserError(f"G has shape {G_T.shape} for T={T}; give one number, or one per step")
    if not np.all(G_T > 0):
        raise UserError("G must be positive: a step without gradient noise would have no best rate")
    return np.broadcast_to(G_T, (T,))


def _least(cost: Callable[[float], float]) -> float:
    """Where a function of a positive number is smallest that falls, then rises, to infinity at both ends."""
    x = 1.0
    while cost(2 * x) < cost(x):
        x *= 2
    while cost(x / 2) < cost(x):
        x /= 2
    bounds = (np.log(x / 2), np.log(2 * x))
    found = optimize.minimize_scalar(
        lambda u: cost(float(np.exp(u))), bounds=bounds, method="bounded", options=dict(xatol=1e-7)
    )
    return float(np.exp(found.x))


def _least_whole(cost: Callable[[int], float], low: int, high: int) -> int:
    """The same for whole numbers in [low, high]: ever finer grids around the best so far."""
    known: dict[int, float] = {}
    a, b = low, high
    while True:
        grid = np.unique(np.linspace(a, b, 17).round().astype(int))
        for n in grid.tolist():
            if n not in known:
                known[n] = cost(n)
        best = min(known, key=lambda n: (known[n], n))
        if b - a <= 16:
            return best
        width = (b - a) // 16 + 1
        a, b = max(low, best - width), min(high, best + width)
