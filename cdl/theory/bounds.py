"""Bounds on the loss of (stochastic) subgradient descent, from the learning rates alone: (2.3), (2.4) and (3.1).

For convex loss, D = ||w_0 - w*||, gradient norms E||g||² <= G_t² and rates eta_1..eta_T with S_k = eta_1 + .. + eta_k,
the loss after tau updates is at most L* plus

    last iterate (2.4):     D²/(2 S_tau)  +  1/2 sum_{t<tau} eta_t² G_t² / (S_tau - S_t)  +  eta_tau G_tau² / 2
    average iterate (2.3):  D²/(2 S_tau)  +  1/2 sum_{t<=tau} eta_t² G_t² / S_tau

The paper prints (2.4) as a triple sum; its Theorem 2 gives the form above. L* is left out everywhere. With D, G and L*
fitted instead of known, the last-iterate bound is the paper's law (3.1).

A rate of 0 leaves the iterate where it was, so the bound after it is that after the last positive rate, and infinite
before the first one. (The linear schedule ends at 0; (2.4) as printed would divide by it.) A tiny positive last rate
makes a large bound, truly: the sum then asks the last iterate to be good after a step that hardly moved it.

Everything is float64, on the CPU unless asked otherwise, whatever `jax_enable_x64` says; the setting is not touched.
Numbers in, numbers out. Inside `jax.jit`, `jax.grad` and `jax.vmap`, traced arrays out, computed in float64 and given
back in the precision of the program around; for derivatives with all digits, take them `with jax.enable_x64(True):`.
Derivatives are by reverse mode, once (`bound` with x64: any). The derivative at a rate of exactly 0, where the bound
jumps, is given as 0. Values of traced arrays cannot be checked: a negative or NaN rate makes the whole result NaN.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from cdl.errors import UserError
from cdl.theory import cauchy

__all__ = ["Terms", "average_bound", "bound", "bound_curve", "bound_terms", "checked"]

Iterate = Literal["last", "average"]
_BLOCK = 2**19  # rates worked on together
_LEAST_SHARE, _LEAST_RATE = 1e-300, 1e-300  # XLA makes 0 of numbers below 2e-308
_MOST = 1e100


@dataclass(frozen=True)
class Terms:
    """The terms of a bound. If all rates are multiplied by c, `distance` is divided by c and the others multiplied.

    distance: D²/(2 S). past: the noise of earlier updates. own: the noise of the last update, eta_tau G_tau² / 2.
    """

    distance: Any
    past: Any
    own: Any

    @property
    def noise(self) -> Any:
        return self.past + self.own

    @property
    def total(self) -> Any:
        return self.distance + self.noise

    @property
    def best_scale(self) -> Any:
        """The factor on all rates that makes the bound smallest, sqrt(distance / noise)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return _plain(np.true_divide, self.distance, self.noise) ** 0.5

    @property
    def best(self) -> Any:
        """The bound at that factor, 2 sqrt(distance · noise); NaN where no rate was positive."""
        with np.errstate(invalid="ignore"):
            return 2 * _plain(np.multiply, self.distance, self.noise) ** 0.5


def _plain(operation: np.ufunc, a: Any, b: Any) -> Any:
    """By numpy, which does not raise where floats of Python do; traced arrays by JAX."""
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return getattr(jnp, operation.__name__)(a, b)
    return operation(a, b)


def bound(eta_T: ArrayLike, D: ArrayLike = 1.0, G: ArrayLike = 1.0, *, device: jax.Device | None = None) -> Any:
    """The last-iterate bound (2.4) after all updates, without L*.

    Args:
      eta_T: rates, [T], or [R, T] for R schedules at once. `cdl.schedule` makes them.
      D: distance from the start to a minimiser, a number or [R].
      G: bound on the gradient norm, a number, or one for each step, [T] or [R, T].
      device: where to compute; the CPU unless given.

    Returns:
      A float for [T], an array [R] for [R, T].

    Raises:
      UserError (a ValueError): a negative, NaN or infinite rate, no rates, D or G negative, shapes that do not match.

    >>> bound([1.0, 0.5], D=2.0, G=1.0)  # 4/(2·1.5) + 1/2 [1²/0.5 + 0.5]
    2.583333333333333
    """
    return bound_terms(eta_T, D, G, device=device).total


def average_bound(eta_T: ArrayLike, D: ArrayLike = 1.0, G: ArrayLike = 1.0, *, device: jax.Device | None = None) -> Any:
    """The bound (2.3) of the average iterate, each weighted by the rate of the update that leaves it, without L*.

    Arguments, returns and errors as `bound`.

    >>> average_bound([1.0, 0.5], D=2.0, G=1.0)  # (4 + 1.25) / (2·1.5)
    1.75
    """
    return bound_terms(eta_T, D, G, iterate="average", device=device).total


def bound_curve(
    eta_T: ArrayLike,
    D: ArrayLike = 1.0,
    G: ArrayLike = 1.0,
    *,
    iterate: Iterate = "last",
    accuracy: bool = False,
    device: jax.Device | None = None,
) -> Any:
    """The bound after every update 1..T, without L*, [T] or [R, T], in time and memory of order T.

    With ``accuracy=True``, (curve, relative error that the computation vouches for), a float or [R].
    Other arguments and errors as `bound`; how it is done is told in `cdl.theory.cauchy`.

    >>> bound_curve([1.0, 0.5], D=2.0, G=1.0).tolist()
    [2.5, 2.583333333333333]
    """
    curve = bound_terms(eta_T, D, G, iterate=iterate, curve=True, device=device).total
    if not accuracy:
        return curve
    eta_T, D, G = _arguments(eta_T, D, G)
    if iterate == "average":  # two sums of positive numbers
        return curve, eta_T.shape[-1] * np.finfo(np.float64).eps * np.ones(eta_T.shape[:-1])[()]
    eta_P, G_P = _padded(eta_T, G)
    return curve, _computed(_curve_accuracy, eta_P, D, G_P, device)[0]


def bound_terms(
    eta_T: ArrayLike,
    D: ArrayLike = 1.0,
    G: ArrayLike = 1.0,
    *,
    iterate: Iterate = "last",
    curve: bool = False,
    device: jax.Device | None = None,
) -> Terms:
    """The terms of `bound` or `average_bound` apart, at the end or, with ``curve=True``, after every update.

    Arguments and errors as `bound`. Each term is a float, [R], [T] or [R, T], as the bound that they add up to.

    >>> terms = bound_terms([1.0, 0.5], D=2.0, G=1.0)
    >>> terms.distance, terms.past, terms.own
    (1.3333333333333333, 1.0, 0.25)
    """
    if (iterate, curve) not in _CORES:
        raise UserError(f"iterate={iterate!r} must be 'last' or 'average'")
    eta_T, D, G = _arguments(eta_T, D, G)
    if not curve:
        return Terms(*_computed(_CORES[iterate, curve], eta_T, D, G, device))
    eta_P, G_P = _padded(eta_T, G)
    return Terms(*(x[..., : eta_T.shape[-1]] for x in _computed(_CORES[iterate, curve], eta_P, D, G_P, device)))


# --- Input and output ----------------------------------------------------------------------------------------------


def _arguments(eta_T: ArrayLike, D: ArrayLike, G: ArrayLike) -> tuple[Any, Any, Any]:
    """Checked and in shapes that fit together: [T] or [R, T]; [] or [R]; [], [T] or [R, T]."""
    eta_T, D, G = (checked(name, x) for name, x in (("eta_T", eta_T), ("D", D), ("G", G)))
    if eta_T.ndim not in (1, 2) or 0 in eta_T.shape:
        raise UserError(f"eta_T has shape {eta_T.shape}; give at least one rate, as [T] or [R, T]")
    if not isinstance(eta_T, jax.core.Tracer):
        floor = np.maximum(_LEAST_SHARE * eta_T.max(-1, keepdims=True), _LEAST_RATE)
        if np.count_nonzero(eta_T < floor) > np.count_nonzero(eta_T == 0):  # faster than one pass over both
            low = eta_T[(eta_T < floor) & (eta_T > 0)].min()
            raise UserError(
                f"eta_T holds {low:g}, less than {_LEAST_SHARE:g} of the largest rate or than {_LEAST_RATE:g}, which "
                "float64 cannot work with; write 0 for such a step"
            )
    if D.shape not in ((), eta_T.shape[:-1]):
        raise UserError(f"D has shape {D.shape} for eta_T of shape {eta_T.shape}; give one number, or one per schedule")
    if G.shape not in ((), eta_T.shape[-1:], eta_T.shape):
        raise UserError(f"G has shape {G.shape} for eta_T of shape {eta_T.shape}; give one number, or one per step")
    return eta_T, D, G


def checked(name: str, x: ArrayLike) -> Any:
    """As a finite, non-negative float64 array, or UserError; a traced array as it is."""
    if isinstance(x, jax.core.Tracer):
        if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise UserError(f"{name} is an array of {x.dtype}; it must be a number or an array of numbers")
        return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))
    try:
        array = np.asarray(x)
        if array.dtype.kind not in "fiu" and array.dtype != jnp.bfloat16:
            raise TypeError
        array = array.astype(np.float64, copy=False)
    except (TypeError, ValueError) as e:
        raise UserError(f"{name}={' '.join(repr(x).split()):.80} must be a number or an array of numbers") from e
    if array.size and not (array.min() >= 0 and array.max() < np.inf):
        bad = ~(np.isfinite(array) & (array >= 0))
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        at = f"[{', '.join(map(str, where))}]" if where else ""
        raise UserError(f"{name}{at}={array[where]:g} must be a finite number, at least 0")
    if (
        name in ("D", "G")
        and array.size
        and not (array.max() <= _MOST and array[array > 0].min(initial=1) >= 1 / _MOST)
    ):
        raise UserError(f"{name} must lie between {1 / _MOST:g} and {_MOST:g}, or be 0: its square has to be a float64")
    return array


def _padded(eta_T: Any, G: Any) -> tuple[Any, Any]:
    """Both with zeros up to a length that few compiled programs serve; zero rates at the end change nothing before."""
    T = eta_T.shape[-1]

    def longer(x: Any) -> Any:
        pad = jnp.pad if isinstance(x, jax.core.Tracer) else np.pad
        return pad(x, [(0, 0)] * (x.ndim - 1) + [(0, cauchy.padded_length(T) - T)])

    return longer(eta_T), longer(G) if G.ndim else G


def _computed(core: Any, eta_T: Any, D: Any, G: Any, device: jax.Device | None) -> tuple[Any, ...]:
    """Run a core in float64: traced if the inputs are, else on a device and back to numpy."""
    inputs = eta_T, D, G
    traced = [x.dtype for x in inputs if isinstance(x, jax.core.Tracer)]
    if traced and jnp.result_type(float) != np.float64:
        return _traced(core, jnp.result_type(*traced), *inputs)
    if traced:
        return core(*(lax.convert_element_type(x, jnp.float64) for x in inputs))
    with jax.enable_x64(True):
        device = device or jax.local_devices(backend="cpu")[0]
        if eta_T.ndim == 1:
            outputs = core(*jax.device_put(inputs, device))
            return tuple(float(y) if y.ndim == 0 else np.asarray(y) for y in outputs)
        # Some rows at a time: faster in the cache, and memory stays small. The last block overlaps, to have its shape.
        R, T = eta_T.shape
        rows = min(R, max(1, _BLOCK // T))
        blocks = [slice(i, i + rows) for i in (min(start, R - rows) for start in range(0, R, rows))]
        done = [
            core(*jax.device_put((eta_T[i], D[i] if D.ndim else D, G[i] if G.ndim == 2 else G), device)) for i in blocks
        ]
        results = tuple(np.empty((R, *y.shape[1:])) for y in done[0])
        for block, outputs in zip(blocks, done, strict=True):
            for result, y in zip(results, outputs, strict=True):
                result[block] = y
        return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _traced(core: Any, dtype: Any, *inputs: Any) -> tuple[Any, ...]:
    """A core in float64 as part of somebody's program, in which float64 may not exist; so must its derivative."""
    with jax.enable_x64(True):
        outputs = core(*(lax.convert_element_type(x, jnp.float64) for x in inputs))
        return tuple(lax.convert_element_type(y, dtype) for y in outputs)


def _traced_bwd(core: Any, dtype: Any, inputs: tuple[Any, ...], g: tuple[Any, ...]) -> tuple[Any, ...]:
    with jax.enable_x64(True):
        _, pull = jax.vjp(core, *(lax.convert_element_type(x, jnp.float64) for x in inputs))
        gradients = pull(tuple(lax.convert_element_type(y, jnp.float64) for y in g))
        return tuple(lax.convert_element_type(y, x.dtype) for x, y in zip(inputs, gradients, strict=True))


_traced.defvjp(lambda core, dtype, *inputs: (_traced(core, dtype, *inputs), inputs), _traced_bwd)


# --- The bounds in jnp: eta [T] or [R, T], D [] or [R], G [], [T] or [R, T] -> (distance, past, own) -----------------


@jax.jit
def _last(eta_T: Array, D: Array, G: Array) -> tuple[Array, Array, Array]:
    eta_T, peak = _scaled(eta_T)
    # Sums from the end: S_T - S_t as a difference of sums from the start loses digits.
    rest_T = lax.cumsum(eta_T, axis=eta_T.ndim - 1, reverse=True)  # S_T - S_{t-1}
    after_T = cauchy.later(rest_T, -1)  # S_T - S_t
    noise_T = eta_T * G**2
    past = jnp.where(after_T > 0, noise_T * (eta_T / jnp.where(after_T > 0, after_T, 1.0)), 0.0).sum(-1)
    own = jnp.where(after_T == 0, noise_T, 0.0).sum(-1)  # of the last positive rate
    peak = peak[..., 0]
    return D**2 / (2 * peak * rest_T[..., 0]), peak * past / 2, peak * own / 2


@jax.jit
def _average(eta_T: Array, D: Array, G: Array) -> tuple[Array, Array, Array]:
    eta_T, peak = _scaled(eta_T)
    S, peak = eta_T.sum(-1), peak[..., 0]
    past = jnp.where(S > 0, peak * (eta_T**2 * G**2).sum(-1) / (2 * jnp.where(S > 0, S, 1.0)), 0.0)
    return D**2 / (2 * peak * S), past, jnp.zeros_like(past)


@jax.jit
def _average_curve(eta_T: Array, D: Array, G: Array) -> tuple[Array, Array, Array]:
    eta_T, peak = _scaled(eta_T)
    axis = eta_T.ndim - 1
    S_T, noise_T = lax.cumsum(eta_T, axis=axis), lax.cumsum(eta_T**2 * G**2, axis=axis)
    past_T = jnp.where(S_T > 0, peak * noise_T / (2 * jnp.where(S_T > 0, S_T, 1.0)), 0.0)
    return D[..., None] ** 2 / (2 * peak * S_T), past_T, jnp.zeros_like(past_T)


@jax.jit
def _last_curve(eta_T: Array, D: Array, G: Array) -> tuple[Array, Array, Array]:
    eta_T, peak = _scaled(eta_T)
    one = _curve_of_one
    if eta_T.ndim == 2:
        one = jax.vmap(one, in_axes=(0, 0 if G.ndim == 2 else None))
    S_T, past_T, own_T = one(eta_T, G)
    return D[..., None] ** 2 / (2 * peak * S_T), peak * past_T / 2, peak * own_T / 2


def _curve_of_one(eta_T: Array, G: Array) -> tuple[Array, Array, Array]:
    """(S_tau, noise of earlier updates, own noise) after the last positive rate up to each step; 0 before the first."""
    place_T, (eta_P, *G_P) = _packed(eta_T, G) if G.ndim else _packed(eta_T)
    G2 = G_P[0] ** 2 if G_P else G**2
    past_P = cauchy.causal_sum(eta_P, eta_P**2 * G2)
    at_T = jnp.maximum(place_T, 0)
    S_T, past_T, own_T = (jnp.where(place_T >= 0, x_P[at_T], 0.0) for x_P in (lax.cumsum(eta_P), past_P, eta_P * G2))
    return S_T, past_T, own_T


@jax.jit
def _curve_accuracy(eta_T: Array, D: Array, G: Array) -> tuple[Array]:
    eta_T, _ = _scaled(eta_T)
    if eta_T.ndim == 2:
        return (jax.vmap(_accuracy_of_one)(eta_T),)
    return (_accuracy_of_one(eta_T),)


def _accuracy_of_one(eta_T: Array) -> Array:
    return cauchy.accuracy(_packed(eta_T)[1][0])


def _packed(eta_T: Array, *others_T: Array) -> tuple[Array, tuple[Array, ...]]:
    """Positive rates moved to the front, zeros behind.

    Returns the place of the last positive rate up to each step (-1 before the first), and the packed arrays.
    """
    positive_T = eta_T > 0
    place_T = jnp.cumsum(positive_T, dtype=jnp.int32) - 1
    to_T = jnp.where(positive_T, place_T, eta_T.shape[0])  # zeros: out of range, dropped
    zeros_P = jnp.zeros(eta_T.shape[0], eta_T.dtype)
    return place_T, tuple(zeros_P.at[to_T].set(x_T, mode="drop") for x_T in (eta_T, *others_T))


def _scaled(eta_T: Array) -> tuple[Array, Array]:
    """Rates as shares of the largest, [.., T], and that, [.., 1] (1 if all are 0), so that no square overflows.

    Zeros are cut from differentiation: the bound jumps there. What is no rate makes the peak, so everything, NaN.
    """
    peak = lax.stop_gradient(eta_T.max(-1, keepdims=True))
    peak = jnp.where(peak > 0, peak, 1.0)
    peak = jnp.where((eta_T >= 0).all(-1, keepdims=True), peak, jnp.nan)
    return jnp.where(eta_T > 0, eta_T / peak, 0.0), peak


_CORES = {
    ("last", False): _last,
    ("last", True): _last_curve,
    ("average", False): _average,
    ("average", True): _average_curve,
}
