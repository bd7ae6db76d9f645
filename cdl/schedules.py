"""Learning-rate schedules: one array of rates, and the `optax.Schedule` that reads it.

Update k = 1..T applies ``eta_T[k-1] = peak * s_k(T)`` (README, "Steps"). An optimizer of
optax sees ``count = k-1`` for the same update. Bounds, laws and trainers all use the array made here, so the rates
that a bound sees are the rates that were applied.

Every shape takes

- ``warmup``: updates 1..W climb linearly, update W being at full height; an int is a number of updates, a float in
  [0, 1) a share of T. Shapes that fall (linear, cosine, wsd, step, inv_sqrt, constant) take up the remaining T - W
  updates. Shapes that climb by themselves (cyclic, one_cycle) take up all T, and warmup scales their first W rates.
- ``final``: where the shape's zero lies, as a share of the peak: ``s -> final + (1 - final) s``. Decaying shapes end
  there at update T, cyclic has its troughs there, constant never leaves its peak. inv_sqrt and step have no zero:
  for them it is a floor, ``max(final, s)``.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cdl.errors import UserError, unknown

__all__ = ["SHAPES", "optax_schedule", "schedule", "shape_arguments"]


def schedule(
    name: str, T: int, *, peak: float = 1.0, warmup: float = 0, final: float = 0.0, **shape: Any
) -> np.ndarray:
    """The rates of a whole run.

    Args:
      name: one of `SHAPES`.
      T: number of updates, at least 1.
      peak: rate at height 1, positive.
      warmup: number of updates (int) or share of T (float in [0, 1)) over which the rate climbs to the peak.
      final: height, as a share of the peak, onto which the shape's zero is mapped.
      **shape: arguments of the shape itself: ``decay, form`` (wsd), ``cycles`` (cyclic), ``at, factor`` (step),
        ``rise, start`` (one_cycle).

    Returns:
      ``eta_T``, float64 [T]; ``eta_T[k-1]`` is the rate of update k.

    Raises:
      UserError: an unknown shape or argument, or one out of range, named with its value.

    >>> schedule("linear", 4, peak=2.0).tolist()
    [1.5, 1.0, 0.5, 0.0]
    >>> schedule("wsd", 5, decay=0.4).tolist()
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if name not in SHAPES:
        raise unknown("schedule", name, SHAPES)
    T = _whole("T", T, low=1)
    _require(T <= 10**8, "T", T, "at most 10^8: rates are a table of T numbers")
    _require(_is_number(peak) and 0 < peak < math.inf, "peak", peak, "a positive number")
    _require(_is_number(final) and 0 <= final <= 1, "final", final, "a number in [0, 1]")
    warmup_steps = _duration("warmup", warmup, T)
    if warmup_steps >= T:
        raise UserError(f"warmup={warmup!r} is {warmup_steps} updates of T={T}; use fewer than T")
    arguments = shape_arguments(name)
    for key in shape:
        if key not in arguments:
            raise unknown(f"argument of schedule {name!r}", key, ["peak", "warmup", "final", *arguments])
    s_T = SHAPES[name](T, warmup_steps, float(final), **(arguments | shape))
    return float(peak) * s_T


def optax_schedule(name: str, T: int, **arguments: Any) -> Callable[[Any], Any]:
    """The same rates as an `optax.Schedule`: ``count -> eta_{count+1}``, float32, traceable.

    It reads a table of the T numbers of `schedule`, so the two agree element by element. Counts from T on keep the
    last rate. Takes the arguments of `schedule` and raises the same errors.
    """
    import jax.numpy as jnp  # here, so that an array of rates costs no import of jax

    eta_T = schedule(name, T, **arguments).astype(np.float32)
    return lambda count: jnp.asarray(eta_T)[jnp.clip(count, 0, T - 1)]


def shape_arguments(name: str) -> dict[str, Any]:
    """The arguments that belong to one shape alone, with their defaults.

    >>> shape_arguments("cyclic")
    {'cycles': 5}
    """
    if name not in SHAPES:
        raise unknown("schedule", name, SHAPES)
    parameters = inspect.signature(SHAPES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


# --- Shapes: (T, warmup_steps, final, *, own arguments) -> s_T, float64 [T] ---------------------------------------


def _constant(T: int, warmup: int, final: float) -> np.ndarray:
    return _after_warmup(T, warmup, final, np.ones_like)


def _linear(T: int, warmup: int, final: float) -> np.ndarray:
    return _after_warmup(T, warmup, final, lambda y: 1 - y)


def _cosine(T: int, warmup: int, final: float) -> np.ndarray:
    return _after_warmup(T, warmup, final, lambda y: (1 + np.cos(np.pi * y)) / 2)


def _wsd(T: int, warmup: int, final: float, *, decay: float = 0.1, form: str = "linear") -> np.ndarray:
    """Warmup, stable, decay over the last `decay` (updates, or share of T) in one of four forms."""
    decay_steps = _duration("decay", decay, T)
    if warmup + decay_steps > T:
        raise UserError(f"decay={decay!r} ({decay_steps} updates) and warmup ({warmup}) exceed T={T}; shorten one")
    forms: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "linear": lambda y: 1 - y,
        "cosine": lambda y: (1 + np.cos(np.pi * y)) / 2,
        "sqrt": lambda y: 1 - np.sqrt(y),
        "exponential": lambda y: final**y,
    }
    if form not in forms:
        raise unknown("decay form of wsd", form, forms)
    y = np.arange(1, decay_steps + 1) / max(decay_steps, 1)
    if form == "exponential":
        _require(final > 0, "final", final, "positive for form='exponential', which never reaches 0")
        decay_D = forms[form](y)  # a geometric path from 1 to `final`: no affine map on top
    else:
        decay_D = final + (1 - final) * forms[form](y)
    return np.concatenate([_ramp(warmup), np.ones(T - warmup - decay_steps), decay_D])


def _inv_sqrt(T: int, warmup: int, final: float) -> np.ndarray:
    k = np.arange(warmup + 1, T + 1)
    s = np.sqrt(max(warmup, 1) / k)
    return np.concatenate([_ramp(warmup), np.maximum(final, s)])


def _step(T: int, warmup: int, final: float, *, at: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> np.ndarray:
    """Height factor^i after the i-th of the shares `at` of T."""
    _require(_is_number(factor) and 0 < factor <= 1, "factor", factor, "a number in (0, 1]")
    ok = isinstance(at, Sequence) and not isinstance(at, str) and all(_is_number(a) and 0 < a < 1 for a in at)
    _require(bool(ok and at) and list(at) == sorted(set(at)), "at", at, "rising shares of T, each in (0, 1)")
    k = np.arange(1, T + 1)
    drops_T = np.sum([k > round(a * T) for a in at], axis=0, initial=0)
    s_T = np.maximum(final, float(factor) ** drops_T)
    s_T[:warmup] *= _ramp(warmup)
    return s_T


def _cyclic(T: int, warmup: int, final: float, *, cycles: int = 5) -> np.ndarray:
    """Triangular waves from trough to peak to trough; the last one ends at update T."""
    cycles = _whole("cycles", cycles, low=1)
    if 2 * cycles > T:
        raise UserError(f"cycles={cycles} need at least {2 * cycles} updates to rise and fall, T={T}; use fewer")
    # Phase in whole numbers: k * cycles mod T, so that every trough is exactly a trough.
    phase_T = (np.arange(1, T + 1) * cycles % T) / T
    s_T = final + (1 - final) * (1 - np.abs(2 * phase_T - 1))
    s_T[:warmup] *= _ramp(warmup)
    return s_T


def _one_cycle(T: int, warmup: int, final: float, *, rise: float = 0.3, start: float = 0.04) -> np.ndarray:
    """Half a cosine up from `start` over the first `rise` (updates, or share of T), half a cosine down to `final`."""
    _require(_is_number(start) and 0 <= start <= 1, "start", start, "a number in [0, 1]")
    up = _duration("rise", rise, T)
    if up >= T:
        raise UserError(f"rise={rise!r} is {up} updates of T={T}; use fewer than T")
    up_s = start + (1 - start) * (1 - np.cos(np.pi * np.arange(1, up + 1) / max(up, 1))) / 2
    down_s = final + (1 - final) * (1 + np.cos(np.pi * np.arange(1, T - up + 1) / (T - up))) / 2
    s_T = np.concatenate([up_s, down_s])
    s_T[:warmup] *= _ramp(warmup)
    return s_T


SHAPES: dict[str, Callable[..., np.ndarray]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inv_sqrt": _inv_sqrt,
    "step": _step,
    "cyclic": _cyclic,
    "one_cycle": _one_cycle,
}


# --- Parts -------------------------------------------------------------------------------------------------------


def _ramp(warmup: int) -> np.ndarray:
    """1/W, 2/W, .., 1."""
    return np.arange(1, warmup + 1) / max(warmup, 1)


def _after_warmup(T: int, warmup: int, final: float, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A ramp, then f on y = (k - W)/(T - W) in (0, 1], so that y = 1 is update T."""
    y = np.arange(1, T - warmup + 1) / (T - warmup)
    return np.concatenate([_ramp(warmup), final + (1 - final) * f(y)])


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _require(condition: bool, name: str, value: object, what: str) -> None:
    if not condition:
        raise UserError(f"{name}={value!r} must be {what}")


def _whole(name: str, value: object, *, low: int) -> int:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    _require(whole and value >= low, name, value, f"a whole number, at least {low}")  # type: ignore[operator]
    return int(value)  # type: ignore[call-overload]


def _duration(name: str, value: object, T: int) -> int:
    """An int counts updates; a float is a share of T."""
    what = "a number of updates (int) or a share of T (float in [0, 1))"
    _require(_is_number(value), name, value, what)
    if isinstance(value, int | np.integer):
        _require(bool(value >= 0), name, value, what)
        return int(value)
    _require(0 <= value < 1, name, value, what)  # type: ignore[operator]
    return round(value * T)  # type: ignore[operator]
