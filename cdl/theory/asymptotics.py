"""What the bound of a schedule tends to as T grows (paper, Table 1 and section 2.4).

For rates eta_t = eta_peak s(x), x = t/T, with I = int_0^1 s and A(x) = int_x^1 s,

    bound - L* ~ q1² / (T eta_peak) + eta_peak (q2² + log ln T),
    q1² = D² / (2 I),    q2² = (G²/2) int_0^1 s(x)² / A(x) dx.

A shape that ends at f = s(1) > 0 has s²/A ~ f / (1 - x), and the integral diverges. The sum behind it ends like
f (1 + 1/2 + .. + 1/n) + f ~ f (ln n + gamma + 1), n updates before the end, the integral up to there like -f ln(n/T).
Both together make

    log = G² f / 2,    q2² = (G²/2) ( int_0^1 [s²/A - f / (1 - x)] dx + f (gamma + 1) ).

inv_sqrt after a whole number W of warmup updates is a function of t, not of x. With M = max(W, 1), s_t = sqrt(M/t) has
S_T ~ 2 sqrt(M T), and 1 / (t (sqrt T - sqrt t)) = (1/t + 1 / (sqrt t (sqrt T - sqrt t))) / sqrt T splits the sum into

    its start:  ln T + gamma - H_W + (sum_{t<=W} (t/W)²) / W,    its end:  2 ln T + 2 gamma + 2 ln 2,    and eta_T: 2,

all times sqrt(M) / (2 sqrt T). So log = 3/4 G² sqrt(M), where the paper prints 1/4 for M = 1: it adds ln T / 2 of its
third sum to an O() and drops it.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import sympy as _sympy

from cdl.errors import UserError
from cdl.theory.pieces import Expr, NoLimit, Piece, X, check, pieces, share

__all__ = ["Limit", "limit", "limit_of", "positive"]

sympy: Any = _sympy  # the types of sympy do not have the operators of its expressions

_U = sympy.Symbol("u", positive=True)  # distance from the end
_DIGITS = 140  # of heights next to the end of a piece: they are differences there
_DEPTH = 60  # panels shrink by 4 towards both ends of a piece, so often
_TAIL, _MOST_PANELS = 1e-7, 1000  # see `_resolved`
_LONGEST_FORM = 60  # characters; longer closed forms are not printed


@dataclass(frozen=True)
class Limit:
    """bound - L* ~ q1² / (T^(1 + power) eta_peak) + eta_peak T^power (q2² + log ln T).

    q1 has D in it, q2 and log have G. q2_squared is the finite part and can be negative (inv_sqrt after more than 130
    updates of warmup). log: 0 unless the shape ends above 0. power: 0 unless the shape is a function of t alone.
    q1_form, q2_form: q1² and q2² for D = G = 1 as text, None where there is no closed form that fits a line.
    """

    q1: float
    q2_squared: float
    log: float = 0.0
    power: float = 0.0
    q1_form: str | None = None
    q2_form: str | None = None

    @property
    def q2(self) -> float:
        """sqrt(q2²), NaN where the finite part is negative."""
        return math.sqrt(self.q2_squared) if self.q2_squared >= 0 else math.nan

    @property
    def qualified(self) -> bool:
        """Does the bound at eta_peak = 1/sqrt(T) fall like 1/sqrt(T)?"""
        return self.log == 0 and self.power == 0

    def noise(self, T: float) -> float:
        """q2² + log ln T."""
        noise = self.q2_squared + self.log * math.log(_horizon(T))
        if noise <= 0:
            raise UserError(f"T={T!r} is too short for the limit of this shape: its noise term is {noise:.3g}; raise T")
        return noise

    def bound(self, eta_peak: float, T: float) -> float:
        """bound - L* at a peak rate."""
        eta_peak, T = positive("eta_peak", eta_peak), _horizon(T)
        return eta_peak * T**self.power * self.noise(T) + self.q1**2 / (T ** (1 + self.power) * eta_peak)

    def best_peak(self, T: float) -> float:
        """The peak rate with the lowest bound: q1 / sqrt(T^(1 + 2 power) (q2² + log ln T))."""
        return self.q1 / math.sqrt(self.noise(T) * T ** (1 + 2 * self.power))

    def best_bound(self, T: float) -> float:
        """bound - L* there: 2 q1 sqrt((q2² + log ln T) / T)."""
        return 2 * self.q1 * math.sqrt(self.noise(T) / T)


def limit(name: str, *, D: float = 1.0, G: float = 1.0, warmup: float = 0.0, final: float = 0.0, **shape: Any) -> Limit:
    """The limit of a shape of `cdl.schedules`, good to 1e-12.

    Args:
      name, warmup, final, **shape: as for `schedule`. Whole numbers of updates vanish in the limit, but for the
        warmup of inv_sqrt, which sets its height.
      D: distance of the start from the optimum. G: bound of the gradients. Both positive.

    Raises:
      UserError: a bad argument. `NoLimit`: wsd with a whole number of updates of decay, where s has no limit.

    >>> limit("wsd", decay=0.2).q2_form
    '1 + ln(3)'
    """
    D, G = positive("D", D), positive("G", G)
    check(name, warmup=warmup, final=final, **shape)
    if name != "inv_sqrt" or share(warmup) > 0 or final > 0:
        return limit_of(pieces(name, warmup=warmup, final=final, **shape), D=D, G=G)
    W, M = int(warmup), max(int(warmup), 1)
    early = float((W + 1) * (2 * W + 1) / (6 * W**2) - mpmath.harmonic(W)) if W else 0.0  # of the ramp, less H_W
    finite = math.sqrt(M) / 4 * (3 * np.euler_gamma + 2 + 2 * math.log(2) + early)
    forms = (_text(1 / (4 * sympy.sqrt(M))), "(3γ + 2 + 2 ln(2))/4" if M == 1 else None)
    return Limit(D / (2 * M**0.25), G**2 * finite, G**2 * 0.75 * math.sqrt(M), -0.5, *forms)


def limit_of(shape: Sequence[Piece], *, D: float = 1.0, G: float = 1.0) -> Limit:
    """The limit of any shape in pieces, from x = 0 to where its last rate is; power = 0.

    It ends like (1 - x)^a, a >= 0. It may start like x^-b, b < 1; from b = 1/2 on q2² is infinite.
    """
    rest, noise = 0.0, 0.0
    rest_form, noise_form = sympy.S.Zero, sympy.S.Zero  # None once there is none
    end, last = _end_height(shape[-1]), True
    for piece in reversed(shape):
        area_form = _area(piece)
        known = rest_form is not None and area_form is not None
        part_form = _closed(piece, rest_form, last) if known else None
        if part_form is not None:
            area, part = _number(area_form), _number(part_form)
        else:
            area, part = _quadrature(piece, rest, float(end) if last else 0.0, last)
            part_form = _rational(piece, rest_form, end if last else 0, part) if known else None
        rest, noise, last = rest + area, noise + part, False
        rest_form = rest_form + area_form if known else None
        noise_form = None if noise_form is None or part_form is None else noise_form + part_form
    if noise_form is not None:
        noise_form = (noise_form + end * (sympy.EulerGamma + 1)) / 2
    f = float(end)
    return Limit(
        q1=D / math.sqrt(2 * rest),
        q2_squared=G**2 / 2 * (noise + f * (np.euler_gamma + 1)),
        log=G**2 * f / 2,
        q1_form=None if rest_form is None else _text(1 / (2 * rest_form)),
        q2_form=None if noise_form is None else _text(noise_form),
    )


# --- Integrals of a piece: area = int s, noise = int s² / A ------------------------------------------------------


def _end_height(piece: Piece) -> Expr:
    end = piece.height.subs(X, piece.end)
    if not end.is_finite:  # exp(-1/(1 - x))
        end = sympy.N(piece.height.subs(X, piece.end - sympy.Rational(1, 10**60)), 30)
    return sympy.S.Zero if abs(sympy.N(end, 30)) < 1e-25 else end


def _area(piece: Piece) -> Expr | None:
    """int s, where it is a sum of terms that sympy integrates at once; else None."""
    a, b, height = piece
    total = sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(height)):
        factor, g = term.as_independent(X, as_Add=False)
        inner, waves = sympy.S.One, []
        for part in sympy.Mul.make_args(g):
            if part.func in (sympy.cos, sympy.sin, sympy.exp) or (part.is_Pow and not part.base.has(X)):
                waves.append(part)
            else:
                inner *= part
        wave = waves[0].args[-1] if len(waves) == 1 else X
        if len(waves) <= 1 and inner.is_polynomial(X) and _is_linear(wave):
            F = sympy.integrate(g, X)
        elif not waves and g.is_Pow and _is_linear(g.base) and g.exp.is_number and g.exp > -1:
            F = g.base ** (g.exp + 1) / ((g.exp + 1) * sympy.diff(g.base, X))
        else:
            return None
        total += factor * (F.subs(X, b) - F.subs(X, a))
    return total


def _is_linear(e: Expr) -> bool:
    return e.is_polynomial(X) and sympy.degree(e, X) == 1


def _closed(piece: Piece, rest: Expr, last: bool) -> Expr | None:
    """int s²/A in closed form for straight, exponential and power pieces, `rest` being A at the end; else None.

    In the last piece A starts from 0. If its end is f > 0 the integral stops at 1 - eps and f ln eps is added.
    """
    a, b, height = piece
    w, h0, h1 = b - a, height.subs(X, a), height.subs(X, b)
    if not height.has(X):
        return h1 * sympy.log(w if last else (rest + h1 * w) / rest) if h1 != 0 else sympy.S.Zero
    if _is_linear(height):
        if last:  # s ds = -slope dA, so int s²/A = int 2 s² / (h1² + 2 slope rest - s²) ds, here and below
            return 2 * (h0 - h1) + (h1 * sympy.log(2 * h1 * w / (h0 + h1)) if h1 != 0 else 0)
        K = h1**2 + 2 * (h1 - h0) / w * rest
        k, size = sympy.sqrt(abs(K)), sympy.N(K, 30)
        if size > 1e-25:
            return 2 * (h0 - h1) + k * sympy.log((k + h1) * (k - h0) / ((k - h1) * (k + h0)))
        return 2 * (h0 - h1) + (2 * k * (sympy.atan(h1 / k) - sympy.atan(h0 / k)) if size < -1e-25 else 0)
    if (height.func == sympy.exp or (height.is_Pow and not height.base.has(X))) and _is_linear(height.args[-1]):
        rate = sympy.log(h0 / h1) / w  # s = h0 exp(-rate (x - a)), ds = -rate s dx
        if last:
            return h0 - h1 + h1 * sympy.log((h0 - h1) / (h1 * rate))
        K = rate * rest - h1
        return h0 - h1 - K * sympy.log((K + h0) / (K + h1))
    if last:
        factor, r = sympy.powsimp(sympy.expand(height.subs(X, b - _U))).as_coeff_exponent(_U)
        if not factor.has(_U) and r.is_number and r > 0:
            return factor * (r + 1) / r * w**r
    return None


def _rational(piece: Piece, rest: Expr, end: Expr, value: float) -> Expr | None:
    """int s²/A - end/(b - x) of a polynomial piece by partial fractions, if it agrees with the number known."""
    a, b, height = piece
    if not height.is_polynomial(X) or not all(sympy.sympify(e).is_Rational for e in (a, b, rest, end)):
        return None
    A = rest + sympy.integrate(height, (X, X, b))
    if sympy.degree(A, X) > 6 or not all(c.is_Rational for c in sympy.Poly(height, X).coeffs()):
        return None
    ratio = sympy.cancel(height**2 / A - end / (b - X))
    if any(sympy.degree(g, X) > 2 for g, _ in sympy.factor_list(sympy.denom(ratio), X)[1]):
        return None
    F = sympy.integrate(sympy.apart(ratio, X), X)
    F = F.replace(sympy.log, lambda z: sympy.log(abs(z)))
    total = F.subs(X, b) - F.subs(X, a) + (end * sympy.log(b - a) if end != 0 else 0)
    found = sympy.N(total, 30)
    return total if found.is_real and abs(found - value) <= 1e-9 * max(1.0, abs(value)) else None


def _gauss(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1], and the matrices to integrals from 0 to every node and to Legendre coefficients."""
    z, weights = np.polynomial.legendre.leggauss(n)
    integrals = np.stack([np.polynomial.legendre.Legendre.basis(k).integ(lbnd=-1)(z) for k in range(n)], axis=1)
    to_legendre = np.linalg.inv(np.polynomial.legendre.legvander(z, n - 1))
    return (z + 1) / 2, weights / 2, integrals @ to_legendre / 2, to_legendre


_NODES, _WEIGHTS, _UP_TO, _TO_LEGENDRE = _gauss(20)
_EDGES = np.concatenate([0.25 ** np.arange(_DEPTH, 2, -1), np.arange(1, 9) / 16])  # of half a piece, from its end


def _quadrature(piece: Piece, rest: float, end: float, last: bool) -> tuple[float, float]:
    """int s and int s²/A - end/(b - x) by Gauss's rule on panels that shrink towards both ends.

    A is summed from the end, never a difference. Heights are differences next to the end and get `_DIGITS` digits.
    Beyond the last panel stands the power law that the heights follow there. Panels are halved until s and s²/A are
    polynomials on each of them as far as can be seen.

    Raises:
      UserError: `NoLimit`: that takes too many panels.
    """
    a, b, height = piece
    w = float(b - a)
    heights = sympy.lambdify(X, height, "mpmath")
    with mpmath.workdps(_DIGITS):
        a_, b_ = (mpmath.mpf(sympy.N(e, _DIGITS)) for e in (a, b))
        edge = mpmath.mpf(w * _EDGES[0])
        tip, foot = float(heights(b_ - edge)), float(heights(a_ + edge))

        # The half at the end, outwards: u = b - x.
        def from_end(width: np.ndarray, s_PxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            area_P = width * (s_PxN @ _WEIGHTS)
            within = tip * low_edge / (1 + _exponent(s_PxN))
            A_P = rest + within + np.cumsum(area_P) - area_P
            return area_P, A_P[:, None] + width[:, None] * (s_PxN @ _UP_TO.T)

        low_edge = w * float(_EDGES[0])
        v_PxN, width, s_PxN, area_P, A_PxN = _resolved(lambda v: heights(b_ - v), w, from_end)
        rise = _exponent(s_PxN)
        noise = float((width * ((s_PxN * _over(s_PxN, A_PxN) - end / v_PxN) @ _WEIGHTS)).sum())
        if last and end == 0 and np.isfinite(rise):
            noise += tip * (1 + rise) / rise
        elif last and end > 0:
            noise += end * math.log(w * 0.5)  # what was taken off over this half, up to ln eps
        area = tip * low_edge / (1 + rise) + float(area_P.sum())

        # The half at the start, inwards: v = x - a.
        def from_start(width: np.ndarray, s_PxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            area_P = width * (s_PxN @ _WEIGHTS)
            A_P = rest + area + np.cumsum(area_P[::-1])[::-1] - area_P
            return area_P, A_P[:, None] + area_P[:, None] - width[:, None] * (s_PxN @ _UP_TO.T)

        _, width, s_PxN, area_P, A_PxN = _resolved(lambda v: heights(a_ + v), w, from_start)
    climb = _exponent(s_PxN)
    noise += float((width * ((s_PxN * _over(s_PxN, A_PxN)) @ _WEIGHTS)).sum())
    area += float(area_P.sum())
    if climb < 0:
        area += foot * low_edge / (1 + climb)
        noise += foot**2 * low_edge / ((1 + 2 * climb) * (rest + area)) if climb > -0.5 + 1e-9 else math.inf
    return area, noise


def _resolved(
    height: Callable[[Any], Any], w: float, areas: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, ...]:
    """Nodes v [P, N], widths, heights, areas and A of panels on half a piece, small enough for all of them.

    On a panel that is small enough the Legendre coefficients of s and of s²/A fall below `_TAIL` of their largest; the
    error of Gauss's rule is about the square of that. Panels that hold next to nothing are left as they are.
    """
    low, width = w * _EDGES[:-1], w * np.diff(_EDGES)
    s_PxN = _at_nodes(height, low, width)
    while True:
        area_P, A_PxN = areas(width, s_PxN)
        noise_PxN = s_PxN * _over(s_PxN, A_PxN)
        rough = np.zeros(len(low), bool)
        for f_PxN in (s_PxN, noise_PxN):
            coefficients_PxN = abs(f_PxN @ _TO_LEGENDRE.T)
            held = abs(f_PxN).max(1) * width
            rough |= (coefficients_PxN[:, -3:].max(1) > _TAIL * coefficients_PxN.max(1)) & (held > 1e-13 * held.sum())
        if not rough.any():
            return low[:, None] + width[:, None] * _NODES, width, s_PxN, area_P, A_PxN
        if len(low) + rough.sum() > _MOST_PANELS:
            raise NoLimit("its heights change too often, or too fast, for an integral")
        half = width[rough] / 2
        new_low = np.concatenate([low[rough], low[rough] + half])
        new_width = np.concatenate([half, half])
        s_PxN = np.concatenate([s_PxN[~rough], _at_nodes(height, new_low, new_width)])
        low, width = np.concatenate([low[~rough], new_low]), np.concatenate([width[~rough], new_width])
        order = np.argsort(low)
        low, width, s_PxN = low[order], width[order], s_PxN[order]


def _at_nodes(height: Callable[[Any], Any], low: np.ndarray, width: np.ndarray) -> np.ndarray:
    return np.array([[float(height(mpmath.mpf(v))) for v in row] for row in low[:, None] + width[:, None] * _NODES])


def _over(s: np.ndarray, A: np.ndarray) -> np.ndarray:
    return np.divide(s, A, out=np.zeros_like(s), where=A > 0)


def _exponent(s_PxN: np.ndarray) -> float:
    """a in s ~ v^a on the innermost panel, [1, 4] times its edge; inf if s is 0 there to all digits."""
    s0, s1 = s_PxN[0, 0], s_PxN[0, -1]
    return math.log(s1 / s0) / math.log((1 + 3 * _NODES[-1]) / (1 + 3 * _NODES[0])) if s0 > 0 and s1 > 0 else math.inf


# --- Parts -------------------------------------------------------------------------------------------------------


def positive(name: str, value: float) -> float:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise UserError(f"{name}={value!r} must be a positive number")
    return float(value)


def _horizon(T: float) -> float:
    if positive("T", T) < 1:
        raise UserError(f"T={T!r} must be at least 1")
    return float(T)


def _number(e: Expr) -> float:
    return float(sympy.N(e, 30))


def _text(e: Expr) -> str | None:
    """The shortest way to write a closed form, None where it takes more than a line's share."""
    if sympy.count_ops(e) > _LONGEST_FORM:
        return None
    ways = [e, sympy.expand(e), sympy.logcombine(e), sympy.expand_log(sympy.expand(e), force=True), sympy.factor(e)]
    text = min((str(way) for way in ways), key=len).replace("EulerGamma", "γ").replace("log", "ln")
    return text if len(text) <= _LONGEST_FORM and not re.search(r"\d{7}", text) else None
