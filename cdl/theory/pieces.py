"""Shapes of `cdl.schedules` as functions of x = t/T, in pieces, for limits and for the symbolic exam."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sympy as _sympy

from cdl.errors import UserError
from cdl.schedules import schedule, shape_arguments

__all__ = ["Expr", "NoLimit", "Piece", "X", "check", "exact", "pieces", "share"]

sympy: Any = _sympy  # the types of sympy do not have the operators of its expressions
Expr = Any  # sympy.Expr

X = sympy.Symbol("x", positive=True)  # t/T


class NoLimit(UserError):
    """The shape has heights, but no limit of the form above that could be found."""


class Piece(NamedTuple):
    """A part of a shape: `height`, an expression in `X`, on start < x <= end."""

    start: sympy.Expr
    end: sympy.Expr
    height: sympy.Expr


def pieces(name: str, *, warmup: float = 0.0, final: float = 0.0, **shape: Any) -> list[Piece]:
    """A shape of `cdl.schedules` as a function of x = t/T, for T so large that whole numbers of updates are nothing.

    Raises:
      UserError: a bad argument. `NoLimit`: a shape that has no such function.
    """
    check(name, warmup=warmup, final=final, **shape)
    w, f = share(warmup), exact(final)
    return [p for p in _PIECES[name](w, f, **(shape_arguments(name) | shape)) if p.start < p.end]


def exact(number: float) -> Expr:
    """The fraction that a number was written as: 0.1 is 1/10."""
    return sympy.Rational(str(number))


def _constant(w: Expr, f: Expr) -> list[Piece]:
    return [*_ramp(w), Piece(w, sympy.S.One, sympy.S.One)]


def _linear(w: Expr, f: Expr) -> list[Piece]:
    return [*_ramp(w), _fall(w, f, lambda y: 1 - y)]


def _cosine(w: Expr, f: Expr) -> list[Piece]:
    return [*_ramp(w), _fall(w, f, lambda y: (1 + sympy.cos(sympy.pi * y)) / 2)]


def _wsd(w: Expr, f: Expr, *, decay: float, form: str) -> list[Piece]:
    if isinstance(decay, int | np.integer):
        raise NoLimit(f"decay={decay!r} is a number of updates, which vanishes as T grows; give a share of T")
    c = 1 - exact(decay)
    if w > c:
        raise UserError(f"decay={decay!r} and warmup={float(w):g} exceed the run; shorten one")
    if form == "exponential":
        down = Piece(c, sympy.S.One, f ** ((X - c) / (1 - c)) if c < 1 else f)
    else:
        forms: dict[str, Callable[[Expr], Expr]] = {
            "linear": lambda y: 1 - y,
            "cosine": lambda y: (1 + sympy.cos(sympy.pi * y)) / 2,
            "sqrt": lambda y: 1 - sympy.sqrt(y),
        }
        down = _fall(c, f, forms[form])
    return [*_ramp(w), Piece(w, c, sympy.S.One), down]


def _inv_sqrt(w: Expr, f: Expr) -> list[Piece]:
    if w == 0 and f == 0:
        raise NoLimit("inv_sqrt after a whole number of warmup updates is a function of t alone; give a share of T")
    floor = min(w / f**2, sympy.S.One) if f > 0 else sympy.S.One  # where the height has come down to final
    return [*_ramp(w), Piece(w, max(floor, w), sympy.sqrt(w / X)), Piece(max(floor, w), sympy.S.One, f)]


def _step(w: Expr, f: Expr, *, at: Sequence[float], factor: float) -> list[Piece]:
    edges = [sympy.S.Zero, *map(exact, at), sympy.S.One]
    heights = [max(f, exact(factor) ** i) for i in range(len(edges))]
    return _warmed(w, [Piece(*p) for p in zip(edges, edges[1:], heights, strict=False)])


def _cyclic(w: Expr, f: Expr, *, cycles: int) -> list[Piece]:
    found = []
    for i in range(cycles):
        foot, top, end = (sympy.Rational(2 * i + j, 2 * cycles) for j in range(3))
        up = 2 * (cycles * X - i)
        found += [Piece(foot, top, f + (1 - f) * up), Piece(top, end, f + (1 - f) * (2 - up))]
    return _warmed(w, found)


def _one_cycle(w: Expr, f: Expr, *, rise: float, start: float) -> list[Piece]:
    r, low = share(rise), exact(start)
    up = low + (1 - low) * (1 - sympy.cos(sympy.pi * X / r)) / 2 if r > 0 else sympy.S.One
    return _warmed(w, [Piece(sympy.S.Zero, r, up), _fall(r, f, lambda y: (1 + sympy.cos(sympy.pi * y)) / 2)])


_PIECES: dict[str, Callable[..., list[Piece]]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inv_sqrt": _inv_sqrt,
    "step": _step,
    "cyclic": _cyclic,
    "one_cycle": _one_cycle,
}


def _ramp(w: Expr) -> list[Piece]:
    return [Piece(sympy.S.Zero, w, X / w)] if w > 0 else []


def _fall(start: Expr, f: Expr, form: Callable[[Expr], Expr]) -> Piece:
    """form(y) on y in (0, 1], from `start` to the end of the run, with its zero at f."""
    y = (X - start) / (1 - start) if start < 1 else sympy.S.One
    return Piece(start, sympy.S.One, f + (1 - f) * form(y))


def _warmed(w: Expr, shape: list[Piece]) -> list[Piece]:
    """The shape times a ramp up to w."""
    low = [Piece(a, min(b, w), h * X / w) for a, b, h in shape if a < w]
    return low + [Piece(max(a, w), b, h) for a, b, h in shape if b > w]


def check(name: str, *, warmup: float = 0.0, final: float = 0.0, **shape: Any) -> None:
    """Raise what `schedule` raises. Whole numbers of updates, however many, fit into a long enough run."""

    def fitted(value: Any) -> Any:
        return min(value, 1) if isinstance(value, int | np.integer) and not isinstance(value, bool) else value

    for key in {"T", "peak"} & shape.keys():
        raise UserError(f"{key}={shape[key]!r} is not part of a shape; leave it out")
    short = {key: fitted(value) if key in ("decay", "rise") else value for key, value in shape.items()}
    schedule(name, 10_000, warmup=fitted(warmup), final=final, **short)


def share(duration: float) -> Expr:
    """A duration in the limit: a share of T, or nothing if it is a number of updates."""
    return sympy.S.Zero if isinstance(duration, int | np.integer) else exact(duration)
