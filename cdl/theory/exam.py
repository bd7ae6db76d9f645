"""The qualifying exam for schedules (paper, section 2.4): does the bound at eta_peak = 1/sqrt(T) fall like 1/sqrt(T)?

`symbolic_exam` decides by Condition 2.5, that is by where s(x)² / A(x), A(x) = int_x^1 s, can be integrated:

- s ~ (1 - x)^a at the end: yes for a > 0; at a = 0, s -> f, the noise term grows like (G²/2) f ln T.
- s ~ c x^-b at the start: yes for b < 1/2; at b = 1/2 it grows like (G²/2) c²/A(0) ln T, above like a power of T.
- s(t, T) ~ T^p sigma(t/T) with p != 0: no. 1/sqrt(T) is the wrong power for the peak.

`numeric_exam` computes sqrt(T) x bound on T = 1000, 2000, .., 1024000 and decides by its differences per doubling of T:
they shrink (qualified), stay (a logarithm), or grow (a power). Where these cannot be told apart by then it says "not
settled", gives no constant, and does not qualify.

Expressions in t and T go by their leading order in T as long as that alone decides, by `numeric_exam` where not.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import sympy as _sympy

from cdl.errors import UserError, unknown
from cdl.schedules import SHAPES, schedule
from cdl.theory.asymptotics import Limit, limit, limit_of, positive
from cdl.theory.bounds import bound_terms
from cdl.theory.expression import SYMPY_ERRORS, T_SYMBOL, own_symbols, parse, scaled, slope, t_symbol
from cdl.theory.pieces import Expr, NoLimit, X, check

__all__ = ["Exam", "exam", "numeric_exam", "symbolic_exam"]

sympy: Any = _sympy  # the types of sympy do not have the operators of its expressions

HORIZONS = tuple(1000 * 2**k for k in range(11))  # multiples of 1000, so that most shares of T are whole
_LEAST_HORIZONS = 6  # that a schedule with whole numbers of updates must fit into
_VISIBLE = 3e-5  # of a term, per doubling of T: growth below it is not told from the rounding of shares of T
_LOG = 1.002  # differences that change by less than this factor per doubling are a logarithm
_STEADY = 1.04  # by more than this: a power, or a level; in between it is open
_BELIEVED = 0.01, 1e-3  # how far a level may be from the last value, or two ways to it from each other
_RANGE = 1e-100, 1e100  # of the highest height
_LEAST = 1e-150  # of the highest: heights below it are 0, float64 cannot work with them
_DUST = 1e-14  # of the highest: heights below it may be rounding errors of a zero


@dataclass(frozen=True)
class Exam:
    """What the exam found.

    shape: its name in print. q1, q2: of `Limit`, None where they do not exist. log, power: sqrt(T) x bound grows like
    log ln T, or like T^power; both 0 if it levels off. q1_form, q2_form: q1² and q2² for D = G = 1 as text, where
    they are known. T, distance, noise: evidence of the numeric exam, the two terms of sqrt(T) x bound at each T.
    """

    shape: str
    qualified: bool
    q1: float | None
    q2: float | None
    reason: str
    method: str
    log: float = 0.0
    power: float = 0.0
    q1_form: str | None = None
    q2_form: str | None = None
    T: tuple[int, ...] = ()
    distance: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()

    def summary(self) -> str:
        """The verdict in a line, the constants in another.

        >>> print(exam("(1 - x)**2").summary())
        (1 - x)**2: qualified (symbolic); sqrt(T) x bound levels off at 2.25
          q1² = 1.5 (3/2), q2² = 0.75 (3/4)
        """
        lines = [f"{self.shape}: {'qualified' if self.qualified else 'not qualified'} ({self.method}); {self.reason}"]
        known = [("q1²", self.q1, self.q1_form), ("q2²", self.q2, self.q2_form)]
        constants = [
            f"{name} = {q**2:.6g}" + (f" ({form})" if form else "") for name, q, form in known if q is not None
        ]
        return "\n  ".join([*lines, ", ".join(constants)] if constants else lines)


def exam(shape: Any, *, D: float = 1.0, G: float = 1.0, method: str | None = None, **arguments: Any) -> Exam:
    """Examine a schedule.

    Args:
      shape: one of
        - a name of `cdl.schedules.SHAPES`, with its `arguments`;
        - an expression, text or sympy, in x = t/T ("1 - x"), or in t and T ("1/sqrt(t)");
        - a callable ``T -> heights of all T updates``, or ``(t_T, T) -> heights``, where t_T is the array 1..T.
      D, G: as for `cdl.theory.asymptotics.limit`.
      method: "symbolic" or "numeric". None is the symbolic exam for names and expressions, and the numeric one for
        callables and where the symbolic one finds no limit; the reason says so then.

    Raises:
      UserError: neither a name nor an expression, or heights that are negative, not finite or nowhere positive.

    >>> exam("1/sqrt(t)").qualified, exam("wsd", decay=0.1, warmup=0.1).qualified
    (False, True)
    """
    if method not in (None, "symbolic", "numeric"):
        raise unknown("method of exam", method, ["symbolic", "numeric"])
    if method == "numeric" or (method is None and not isinstance(shape, str | sympy.Basic)):
        return numeric_exam(shape, D=D, G=G, **arguments)
    try:
        return symbolic_exam(shape, D=D, G=G, **arguments)
    except NoLimit as e:
        if method == "symbolic":
            raise
        found = numeric_exam(shape, D=D, G=G, **arguments)
        return replace(found, reason=f"{found.reason} (found by numbers, not by symbols: {e})")


# --- Symbolic ----------------------------------------------------------------------------------------------------


def symbolic_exam(shape: str | Expr, *, D: float = 1.0, G: float = 1.0, **arguments: Any) -> Exam:
    """The exam of a name or an expression, by its limit as T grows.

    Raises:
      UserError: as `exam`. `NoLimit`: no s ~ T^p sigma(x) was found, or sigma follows no power of x or 1 - x at an end.
    """
    D, G = positive("D", D), positive("G", G)
    text, heights = _heights(shape, arguments)
    if isinstance(shape, str) and shape in SHAPES:
        return _of_limit(text, limit(shape, D=D, G=G, **arguments), G)
    if not isinstance(shape, str | sympy.Basic):
        raise UserError(f"{text} is a callable, which has no symbols; use method='numeric'")
    heights(HORIZONS[0])  # raises on bad ones
    try:
        return _of_expression(text, parse(shape) if isinstance(shape, str) else own_symbols(shape), D, G)
    except UserError:
        raise
    except SYMPY_ERRORS as e:
        raise NoLimit(f"sympy finds no limit of {text:.200}: {e}".replace("\n", " ")) from e


def _of_expression(text: str, e: Expr, D: float, G: float) -> Exam:
    p, pieces = scaled(e)
    b = -slope(pieces[0], at_start=True)
    for i, piece in enumerate(pieces):
        if slope(piece, at_start=False) < 0 or (i > 0 and slope(piece, at_start=True) < 0):
            grows = f"{text} grows without bound inside of x = 0..1"
            raise NoLimit(grows) if e.has(t_symbol, T_SYMBOL) else UserError(f"{grows}; heights must be finite")
    if p != 0 or b > Fraction(1, 2):
        return _of_power(text, p, b)
    found = limit_of(pieces, D=D, G=G)
    if not (math.isfinite(found.q1) and found.q1 > 0) or math.isnan(found.q2_squared):
        raise NoLimit(f"the integrals of {text} are no numbers")
    if b < Fraction(1, 2):
        return _of_limit(text, found, G)
    # s ~ c/sqrt(x) at the start: sum_t s_t² / (S_T - S_t) has c²/A(0) sum_t 1/t, and 1/A(0) = 2 q1²/D².
    c = float(sympy.N((pieces[0].height * sympy.sqrt(X)).subs(X, sympy.Rational(1, 10**60)), 30))
    log = found.log + (G * c * found.q1 / D) ** 2
    reason = f"the rates start like x^-0.5: the noise term grows like {log:.3g} ln T"
    return Exam(text, False, found.q1, None, reason, "symbolic", log=log, q1_form=found.q1_form)


def _of_limit(text: str, found: Limit, G: float) -> Exam:
    if found.power != 0:
        return _of_power(text, Fraction(found.power), Fraction(1, 2))
    if found.log != 0:
        reason = (
            f"the schedule ends at height {2 * found.log / G**2:.3g}: the noise term grows like {found.log:.3g} ln T"
        )
        return Exam(text, False, found.q1, None, reason, "symbolic", log=found.log, q1_form=found.q1_form)
    reason = f"sqrt(T) x bound levels off at {found.q1**2 + found.q2_squared:.6g}"
    forms = {"q1_form": found.q1_form, "q2_form": found.q2_form}
    return Exam(text, True, found.q1, found.q2, reason, "symbolic", **forms)


def _of_power(text: str, p: Fraction, b: Fraction) -> Exam:
    """s ~ T^p x^-b at the start: the terms of sqrt(T) x bound grow like T/S_T and like sum s_t² / (S_T - S_t)."""
    distance = -p + min(Fraction(0), 1 - b)
    noise = p + max(Fraction(0), 2 * b - 1) if b < 1 else p + b
    power = float(max(distance, noise))
    cause = f"the rates go like T^{float(p):.3g} by themselves" if p != 0 else f"the rates start like x^{-float(b):.3g}"
    reason = f"{cause}, and {_grows(distance >= noise, power)}{' / ln T' if b == 1 else ''}"
    return Exam(text, False, None, None, reason, "symbolic", power=power)


def _grows(distance: bool, power: float) -> str:
    term, size = ("distance", "small") if distance else ("noise", "large")
    return f"a peak of 1/sqrt(T) makes them too {size}: the {term} term of sqrt(T) x bound grows like T^{power:.3g}"


# --- Numeric -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Growth:
    """How a term goes for large T. size: its limit, the factor of ln T or the power of T; NaN for "unsteady".

    "open": what it does beyond the last T cannot be told; size is its change over the last doubling.
    """

    kind: Literal["level", "log", "power", "unsteady", "open"]
    size: float


def numeric_exam(shape: Any, *, D: float = 1.0, G: float = 1.0, **arguments: Any) -> Exam:
    """The exam of anything that gives heights, by sqrt(T) x bound on T = 1000, 2000, .., 1024000.

    Heights below 1e-14 of the highest are taken as 0 where they look like rounding errors of a zero, which stay as they
    are while T grows: a last step of that size would make the noise term of a good schedule huge. If they fall like a
    power of T they are meant. If they do neither, and change the bound, nothing is settled.

    Raises:
      UserError: as `exam`; it names T where heights are wrong.
    """
    D, G = positive("D", D), positive("G", G)
    text, heights = _heights(shape, arguments)
    horizons, terms, lasts = [], [], []
    for T in HORIZONS:
        s_T = heights(T)
        if s_T is not None:
            swept = np.where(s_T < _DUST * s_T.max(), 0.0, s_T)
            both = [swept, s_T] if s_T[swept == 0].any() else [swept]
            horizons.append(T)
            terms.append([bound_terms(s / math.sqrt(T), D, G) for s in both])
            lasts.append([float(s[s > 0][-1]) for s in both])
    if len(horizons) < _LEAST_HORIZONS:
        raise UserError(
            f"{text} fits into {len(horizons)} of the runs of up to {HORIZONS[-1]} updates; shorten its parts"
        )
    dust = _dust([[float(x.noise) for x in both] for both in terms], [both[-1] for both in lasts])
    chosen = [both[-1 if dust == "meant" else 0] for both in terms]
    ends = [both[-1 if dust == "meant" else 0] for both in lasts]
    distance = tuple(math.sqrt(T) * float(x.distance) for T, x in zip(horizons, chosen, strict=True))
    noise = tuple(math.sqrt(T) * float(x.noise) for T, x in zip(horizons, chosen, strict=True))
    end = ends[-1] if np.ptp(ends[-3:]) <= 1e-6 * ends[-1] else 0.0  # a height that stays
    growths = _growth(distance, 0.0), _growth(noise, G**2 / 2 * end)

    def verdict(qualified: bool, reason: str, q1: float | None = None, q2: float | None = None, **found: Any) -> Exam:
        known: dict[str, Any] = {"q1": q1, "q2": q2, "T": tuple(horizons), "distance": distance, "noise": noise}
        return Exam(text, qualified, reason=reason, method="numeric", **known, **found)

    if dust == "open":
        reason = f"the last heights fall below {_DUST:g} of the highest, and the bound depends on them: not settled"
        return verdict(False, f"{reason}, looked at up to T={horizons[-1]}")
    kinds, seen = [g.kind for g in growths], f"looked at up to T={horizons[-1]}"
    q = [math.sqrt(max(g.size, 0.0)) if g.kind == "level" else None for g in growths]
    if "unsteady" in kinds:
        term = "distance" if kinds[0] == "unsteady" else "noise"
        return verdict(False, f"the {term} term of sqrt(T) x bound neither levels off nor grows steadily, {seen}")
    if "power" in kinds:
        power, far = max((g.size, i == 0) for i, g in enumerate(growths) if g.kind == "power")
        return verdict(False, f"{_grows(far, power).replace('them', 'the rates')}, {seen}", power=power)
    if "open" in kinds:
        i = kinds.index("open")
        change = f"still changes by {growths[i].size:.2g} over the last doubling of T"
        return verdict(
            False, f"not settled, {seen}: the {('distance', 'noise')[i]} term of sqrt(T) x bound {change}", *q
        )
    if "log" in kinds:
        term = "noise" if kinds[1] == "log" else "distance"
        log = sum(g.size for g in growths if g.kind == "log")
        ends_there = term == "noise" and abs(log - G**2 * end / 2) < 0.05 * log
        cause = f"the schedule ends at height {end:.3g}: " if ends_there else ""
        return verdict(False, f"{cause}the {term} term grows like {log:.3g} ln T, {seen}", q[0], log=log)
    reason = f"sqrt(T) x bound levels off at {sum(g.size for g in growths):.6g}, {seen}"
    if 0 < G**2 * end / 2 < 10 * _VISIBLE * noise[-1]:  # a growth that could not be seen
        reason += (
            f"; that it ends at height {end:.2g} makes the noise term grow like {G**2 * end / 2:.1g} ln T far beyond"
        )
    if dust == "rounding":
        reason += f"; last heights below {_DUST:g} of the highest are taken as 0"
    return verdict(True, reason, *q)


def _dust(noise: Sequence[Sequence[float]], lasts: Sequence[float]) -> Literal["none", "rounding", "meant", "open"]:
    """What heights below `_DUST` are, from the noise without and, where there are any, with them at each T.

    Args:
      lasts: the last positive height at each T, whether dust or not.
    """
    there = [len(both) > 1 for both in noise]
    if all(abs(both[-1] - both[0]) <= _VISIBLE * both[0] for both in noise):
        return "none"
    fall = -np.diff(np.log2(lasts))
    if fall.min() > 0.5 and np.ptp(fall) < 0.5:
        return "meant"
    tiny = [last for last, is_dust in zip(lasts, there, strict=True) if is_dust]
    return "rounding" if max(tiny) <= 1e3 * min(tiny) else "open"


def _growth(terms: Sequence[float], expected: float) -> _Growth:
    """What a term tends to, from its values at doubling T.

    2 y(2T) - y(T) takes off what falls like 1/T and leaves limit, logarithm and powers; doing it twice takes off
    ln(T)/T as well. Shares of T that are rounded to whole updates leave changes of the order 1/T with both signs.

    Args:
      expected: the factor of ln T that a height above 0 at the end calls for.
    """
    y = np.asarray(terms)
    z = 2 * y[1:] - y[:-1]
    z = 2 * z[1:] - z[:-1]
    raw, change = np.diff(y), np.diff(z)
    visible = _VISIBLE * abs(y[-1])
    log = float(np.median(change[-4:])) / math.log(2)
    if log * math.log(2) > visible and expected / 2 < log < 2 * expected:
        return _Growth("log", float(change[-1]) / math.log(2))
    if max(abs(change[-2:])) <= visible:
        return _level(y, z)
    if min(change[-3:]) < 0 < max(change[-3:]):  # rounding of shares, or no law at all
        steady = max(abs(raw[-2:])) <= 100 * visible
        return _Growth("level", float(np.median(z[-4:]))) if steady else _Growth("unsteady", math.nan)
    ratio = math.sqrt(change[-1] / change[-3]) if change[-3] != 0 else math.inf
    if ratio < 1 / _STEADY:
        return _level(y, _aitken(_aitken(z)))
    if change[-1] < 0:  # bounded, for it falls and is positive
        return _level(y, z)
    if min(raw[-3:]) <= 0:
        return _Growth("unsteady", math.nan)
    if 1 / _LOG <= ratio <= _LOG:
        return _Growth("log", float(change[-1]) / math.log(2))
    if ratio <= _STEADY:
        return _Growth("open", float(raw[-1]))
    return _Growth("power", math.log2(ratio))


def _level(y: np.ndarray, limits: np.ndarray) -> _Growth:
    """The last limit extrapolated, where it is near the last value or the limit before."""
    near, agree = (abs(limits[-1] - x) for x in (y[-1], limits[-2]))
    if near <= _BELIEVED[0] * abs(y[-1]) or agree <= _BELIEVED[1] * abs(limits[-1]):
        return _Growth("level", float(limits[-1]))
    return _Growth("open", float(y[-1] - y[-2]))


def _aitken(z: np.ndarray) -> np.ndarray:
    """Aitken's delta-squared: takes off one power of T."""
    first, second = np.diff(z)[1:], np.diff(z, 2)
    return z[2:] - np.divide(first**2, second, out=np.zeros_like(first), where=second != 0)


# --- What is examined --------------------------------------------------------------------------------------------


def _heights(shape: Any, arguments: dict[str, Any]) -> tuple[str, Callable[[int], np.ndarray | None]]:
    """The name in print, and the heights of T updates; None if the schedule does not fit into T."""
    if isinstance(shape, str) and shape in SHAPES:
        return _of_name(shape, arguments)
    text = shape if isinstance(shape, str) else getattr(shape, "__name__", str(shape))
    if arguments:
        raise UserError(
            f"{text!r} takes no arguments, {sorted(arguments)} belong to schedules with a name; leave them out"
        )
    if isinstance(shape, str | sympy.Basic):
        e = parse(shape) if isinstance(shape, str) else own_symbols(shape)
        f = sympy.lambdify((X, t_symbol, T_SYMBOL), e, "numpy")

        def call(T: int) -> Any:
            t_T = np.arange(1.0, T + 1)
            try:
                return np.broadcast_to(f(t_T / T, t_T, float(T)), (T,))
            except SYMPY_ERRORS as error:
                raise UserError(
                    f"{text:.200} gives no heights for T={T}: {error}; its parts must be finite numbers".replace(
                        "\n", " "
                    )
                ) from error

    elif callable(shape):
        places = _places(shape, text)

        def call(T: int) -> Any:
            return shape(T) if places == 1 else shape(np.arange(1.0, T + 1), T)

    else:
        raise UserError(f"{shape!r} is no schedule; give a name, an expression or a callable")
    return text, lambda T: _checked(call, T, text)


def _of_name(name: str, arguments: dict[str, Any]) -> tuple[str, Callable[[int], np.ndarray | None]]:
    listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    check(name, **arguments)
    schedule(name, HORIZONS[-1], **arguments)  # raises what is wrong at all T

    def heights(T: int) -> np.ndarray | None:
        try:
            return schedule(name, T, **arguments)
        except UserError:  # more updates of warmup or decay than T
            return None

    return f"{name}({listed})" if listed else name, heights


def _places(shape: Callable[..., Any], text: str) -> int:
    """How many arguments a callable wants, 1 or 2."""
    try:
        parameters = inspect.signature(shape).parameters.values()
    except ValueError as e:
        raise UserError(f"{text} does not say what it takes; wrap it: lambda T: ..") from e
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    wanted = sum(p.default is p.empty for p in positional) or min(len(positional), 1)
    if wanted not in (1, 2):
        raise UserError(f"{text} takes {wanted} arguments; a schedule takes T, or the updates t_T = 1..T and T")
    return wanted


def _checked(call: Callable[[int], Any], T: int, text: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        s_T = call(T)
    try:
        s_T = np.array(s_T, float)  # a copy
    except (TypeError, ValueError) as e:
        raise UserError(f"{text} gave no numbers for T={T}; give an array of T heights") from e
    if s_T.shape == ():
        s_T = np.full(T, s_T)
    if s_T.shape != (T,):
        raise UserError(f"{text} gave heights of shape {s_T.shape} for T={T}; give one for each of the {T} updates")
    if not np.isfinite(s_T).all():
        k = int(np.argmin(np.isfinite(s_T)))
        raise UserError(f"{text} has height {s_T[k]} at t={k + 1} of T={T}; heights must be finite")
    s_T[(s_T < _LEAST * s_T.max()) & (s_T > -_DUST * s_T.max())] = 0.0
    if s_T.min() < 0:
        k = int(s_T.argmin())
        raise UserError(f"{text} has height {s_T[k]:.4g} at t={k + 1} of T={T}; heights must be at least 0")
    if s_T.max() == 0:
        raise UserError(f"{text} is 0 at all t of T={T}; a schedule needs a positive height")
    if not _RANGE[0] <= s_T.max() <= _RANGE[1]:
        raise UserError(f"{text} goes up to {s_T.max():g} at T={T}; scale heights to about 1")
    return s_T
