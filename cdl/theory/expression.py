"""Heights written as expressions in x = t/T, or in t and T: read without running Python, cut up, and scaled."""

import ast
import functools
import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import sympy as _sympy

from cdl.errors import UserError, unknown
from cdl.schedules import SHAPES
from cdl.theory.pieces import Expr, NoLimit, Piece, X, exact

__all__ = ["NO_POWER", "SYMPY_ERRORS", "T_SYMBOL", "own_symbols", "parse", "scaled", "slope", "t_symbol"]

sympy: Any = _sympy  # the types of sympy do not have the operators of its expressions
Relational = _sympy.core.relational.Relational

# What sympy, and functions that it makes, raise on expressions that they cannot work with.
SYMPY_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, NotImplementedError)

t_symbol, T_SYMBOL = sympy.Symbol("t", positive=True), sympy.Symbol("T", positive=True)
NO_POWER = Fraction(10**6)  # for heights that fall to 0 faster than any power
_MOST_POWER = 100  # higher ones take sympy too long
_MOST_OPERATIONS, _MOST_CONDITIONS, _MOST_PIECES = 200, 24, 64  # of expressions whose limit is looked for: seconds
_MOST_WITH_T = 30  # operations
_LONG = mpmath.mpf(10) ** 40  # a T that stands for T -> infinity
_SAMPLED = (16_000, 1_024_000)  # runs on which heights and their leading order in T are compared


# --- Reading -----------------------------------------------------------------------------------------------------

_NAMES = {"x": X, "t": t_symbol, "T": T_SYMBOL, "pi": sympy.pi, "e": sympy.E, "E": sympy.E}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": sympy.sqrt,
    "exp": sympy.exp,
    "log": sympy.log,
    "ln": sympy.log,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "Abs": sympy.Abs,
    "abs": sympy.Abs,
    "Min": sympy.Min,
    "min": sympy.Min,
    "Max": sympy.Max,
    "max": sympy.Max,
    "Piecewise": sympy.Piecewise,
}
_OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.BitAnd: sympy.And,
    ast.BitOr: sympy.Or,
    ast.And: sympy.And,
    ast.Or: sympy.Or,
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: a,
    ast.Not: sympy.Not,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}


@functools.lru_cache(64)  # the highest of 24 takes sympy seconds
def parse(text: str) -> Expr:
    """An expression in x, or in t and T. Only numbers, the names and the operations below; nothing is evaluated.

    Raises:
      UserError: a name or an operation that is not known, or no expression at all.

    >>> parse("Piecewise((1, x < 0.8), ((1 - x)/0.2, True))")
    Piecewise((1, x < 4/5), (5 - 5*x, True))
    """
    if text.strip().isidentifier() and text.strip() not in _NAMES:
        raise unknown("schedule", text, SHAPES)
    path = re.fullmatch(r"([\w./\\~ -]*)\.[A-Za-z]\w*", text.strip())
    if path and path[1] not in _NAMES:
        raise UserError(f"{text!r:.200} looks like a file; the exam takes names, expressions or callables, no files")
    try:
        e = _built(ast.parse(text.strip(), mode="eval").body)
    except UserError as error:
        raise UserError(f"the expression {text!r:.200}: {error}") from None
    except (SyntaxError, RecursionError, MemoryError, *SYMPY_ERRORS) as error:
        said = "it cannot be read" if isinstance(error, SyntaxError | RecursionError | MemoryError) else error
        raise UserError(f"the expression {text!r:.200}: {said}".replace("\n", " ")) from error
    if not isinstance(e, sympy.Expr):
        raise UserError(f"the expression {text!r:.200} is no height; write one like '1 - x' or '1/sqrt(t)'")
    if e.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan, sympy.I):
        raise UserError(f"the expression {text!r:.200} is {e!s:.80}; heights must be finite and real")
    return e


def _built(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=bool(value)):
            return sympy.true if value else sympy.false
        case ast.Constant(value=int(value) | float(value)) if math.isfinite(value):
            return exact(value)
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.Name(id=name):
            raise unknown("name", name, [*_NAMES, *_FUNCTIONS])
        case ast.Call(func=ast.Name(id="Piecewise"), args=arguments, keywords=[]):
            if not arguments or not all(isinstance(branch, ast.Tuple) for branch in arguments):
                raise UserError("Piecewise takes pairs of a height and a condition; write Piecewise((1, x < 0.5), ..)")
            branches = [_built(branch) for branch in arguments]
            for _, condition in branches:
                if not isinstance(condition, sympy.logic.boolalg.Boolean) or isinstance(condition, sympy.Expr):
                    raise UserError(f"{condition} is no condition; write one like x < 0.5, or True")
            return sympy.Piecewise(*branches)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_built, arguments))
        case ast.Call(func=ast.Name(id=name)):
            raise unknown("function", name, _FUNCTIONS)
        case ast.Tuple(elts=[value, condition]):  # of Piecewise
            return _built(value), _built(condition)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_built(left), _built(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_built(left), _built(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_built(operand))
        case ast.BoolOp(op=op, values=values):
            return _OPERATIONS[type(op)](*map(_built, values))
        case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(op) in _OPERATIONS for op in ops):
            sides = [_built(left), *map(_built, rights)]
            return sympy.And(
                *(_OPERATIONS[type(op)](*pair) for op, pair in zip(ops, itertools.pairwise(sides), strict=True))
            )
    raise UserError("only numbers, x, t, T, pi, e, + - * / **, comparisons and " + ", ".join(_FUNCTIONS) + " are known")


def _power(base: Expr, power: Expr) -> Expr:
    if power.is_number:
        within = [abs(p.exp) for p in base.atoms(sympy.Pow) if p.exp.is_number]
        if abs(power) * max([1, *within]) > _MOST_POWER:
            raise UserError(f"powers may go up to {_MOST_POWER}")
    return base**power


def own_symbols(e: Expr) -> Expr:
    """A sympy expression of somebody else, in the symbols used here."""
    names = {symbol: _NAMES.get(symbol.name) for symbol in e.free_symbols if isinstance(symbol, sympy.Symbol)}
    other = [str(symbol) for symbol, own in names.items() if own not in (X, t_symbol, T_SYMBOL)]
    if other or not isinstance(e, sympy.Expr):
        raise UserError(f"{e} must be an expression in x, or in t and T alone" + (f", not {other}" if other else ""))
    return e.subs(names)


# --- Pieces, powers and limits -------------------------------------------------------------------------------------


def scaled(e: Expr) -> tuple[Fraction, list[Piece]]:
    """p and sigma of s ~ T^p sigma(x), without the part at the end where it is 0.

    Raises:
      UserError: `NoLimit`: there is none, it is too long, or what s has beside it may decide its bound.
    """
    if sympy.count_ops(e) > _MOST_OPERATIONS:
        raise NoLimit(f"it has more than {_MOST_OPERATIONS} operations")
    if sum(math.comb(len(of.args), 2) for of in e.atoms(sympy.Max, sympy.Min)) > _MOST_CONDITIONS:
        raise NoLimit("it takes the highest or lowest of too many")
    own = e = e.subs(t_symbol, X * T_SYMBOL)
    if e.has(T_SYMBOL) and sympy.count_ops(e) > _MOST_WITH_T:
        raise NoLimit(f"it has T in it and more than {_MOST_WITH_T} operations")
    e = e.rewrite(sympy.Piecewise) if e.has(sympy.Abs, sympy.Min, sympy.Max) else e
    if len(e.atoms(Relational)) > _MOST_CONDITIONS:
        raise NoLimit(f"it has more than {_MOST_CONDITIONS} conditions")
    if e.has(T_SYMBOL):
        e = e.replace(lambda r: isinstance(r, Relational), _for_long_runs)
    pieces, p = _pieces(e), Fraction(0)
    if own.has(T_SYMBOL):
        # Not before it is cut: simplify "solves" conditions, sin(T) > 0 to T < pi.
        whole = [Piece(a, b, sympy.simplify(height)) for a, b, height in pieces]
        led = [_leading(piece) for piece in whole]
        p = max((power for power, _ in led if power is not None), default=Fraction(0))
        sigmas = [sigma if power == p else sympy.S.Zero for power, sigma in led]
        pieces = [Piece(a, b, sigma) for (a, b, _), sigma in zip(pieces, sigmas, strict=True)]
        _compare(own, p, whole, pieces)
    while pieces and sympy.expand(pieces[-1].height) == 0:
        pieces = pieces[:-1]
    if not pieces:
        raise NoLimit("its heights vanish as T grows")
    return p, pieces


def _compare(e: Expr, p: Fraction, whole: list[Piece], pieces: list[Piece]) -> None:
    """Raise NoLimit where the lower orders in T of heights e may decide the bound.

    At the end, where steps are divided by the few that follow, e must go like T^p sigma down to the last update.
    Elsewhere it is enough that e is not of a higher order: 1000 updates of height 1 may be forgotten, not one of T.
    """
    end, sigma = whole[-1].height, pieces[-1].height
    ends = [k for k, piece in enumerate(whole) if sympy.expand(piece.height) != 0]
    if ends and sympy.expand(pieces[ends[-1]].height) == 0:
        raise NoLimit("the heights at its end are of a lower order in T than the others")
    if sympy.expand(sigma) != 0 and end.has(T_SYMBOL):
        f, g = (sympy.lambdify((X, T_SYMBOL), h, "mpmath") for h in (end, sigma))
        with mpmath.workdps(300):
            power, steps = mpmath.mpf(p.numerator) / p.denominator, [_LONG**-share for share in (0.25, 0.5, 1, 2)]
            ratios = [f(1 - u, _LONG) / (g(1 - u, _LONG) * _LONG**power) for u in steps]
            at_end = sympy.simplify(end.subs(X, 1)), sympy.simplify(sigma.subs(X, 1))
        if any(abs(ratio - 1) > 1e-6 for ratio in ratios) or (at_end[1] == 0) != (at_end[0] == 0):
            raise NoLimit("lower orders in T decide the end")
    heights = sympy.lambdify((X, T_SYMBOL), e, "numpy")
    leading = sympy.lambdify(
        X, sympy.Piecewise(*((piece.height, piece.end >= X) for piece in pieces), (0, True)), "numpy"
    )
    highest = []
    with np.errstate(all="ignore"):
        for T in _SAMPLED:
            x = np.arange(1.0, T) / T
            highest.append(np.max(np.abs(heights(x, float(T))) / (T ** float(p) * (1 + np.abs(leading(x))))))
    if not highest[1] < 2 * max(1.0, highest[0]):
        raise NoLimit("some of its heights are of a higher order in T than the others")


def _pieces(e: Expr) -> list[Piece]:
    """An expression cut where one of its conditions changes, each part with the branch that holds there."""
    cuts = {sympy.S.Zero, sympy.S.One}
    for condition in e.atoms(Relational):
        cuts |= {root for root in _roots(condition.lhs - condition.rhs) if 0 < root < 1}
        if len(cuts) > _MOST_PIECES:
            raise NoLimit(f"it has more than {_MOST_PIECES} pieces")
    edges = sorted(cuts, key=lambda cut: sympy.N(cut, 50))

    def part(a: Expr, b: Expr) -> Piece:
        middle = sympy.Rational(str(sympy.N((a + b) / 2, 40)))

        def branch(*branches: Any) -> Expr:
            for value, condition in branches:
                holds = condition.subs(X, middle)
                if holds == sympy.true:
                    return value
                if holds != sympy.false:
                    raise NoLimit(f"it is open whether {condition} holds")
            raise UserError(f"the Piecewise has no value at x={float(middle):g}; end it with (.., True)")

        return Piece(a, b, e.replace(sympy.Piecewise, branch))

    return [part(a, b) for a, b in itertools.pairwise(edges)]


def _roots(g: Expr) -> list[Expr]:
    """Where g changes its sign in (0, 1): exact for straight and quadratic g, else to 60 digits."""
    if not g.has(X):
        return []
    if g.is_polynomial(X) and sympy.degree(g, X) <= 2:
        return [root for root in sympy.roots(g, X) if root.is_real]
    f = sympy.lambdify(X, g, "mpmath")
    found = []
    with mpmath.workdps(60):
        grid = [mpmath.mpf(k) / 2003 for k in range(1, 2004)]
        values = [f(x) for x in grid]
        if sum(mpmath.re(g0) * mpmath.re(g1) < 0 for g0, g1 in itertools.pairwise(values)) > _MOST_PIECES:
            raise NoLimit(f"it has more than {_MOST_PIECES} pieces")
        for x0, x1, g0, g1 in zip(grid, grid[1:], values, values[1:], strict=False):
            if mpmath.im(g0) == mpmath.im(g1) == 0 and g0 * g1 < 0:
                found.append(sympy.Float(mpmath.findroot(f, (x0, x1), solver="anderson", verify=False), 60))
    return found


def _for_long_runs(condition: Expr) -> Expr:
    """What a condition becomes once T is large: its leading term in T decides."""
    g = sympy.expand(condition.lhs - condition.rhs)
    if not g.has(T_SYMBOL):
        return condition
    if not g.is_polynomial(T_SYMBOL):
        raise NoLimit(f"the condition {condition} is no polynomial in T")
    leads = sympy.Poly(g, T_SYMBOL)
    if leads.length() > 1 and leads.LC().subs(X, 1) == 0:
        raise NoLimit(f"the condition {condition} changes at the end")
    return condition.func(leads.LC(), 0)


def _leading(piece: Piece) -> tuple[Fraction | None, Expr]:
    """p and sigma of a piece with T in it; p is None where it is 0."""
    e = piece.height
    if sympy.expand(e) == 0:
        return None, sympy.S.Zero
    if any(f.has(T_SYMBOL) for f in e.atoms(sympy.Function)) or any(f.exp.has(T_SYMBOL) for f in e.atoms(sympy.Pow)):
        raise NoLimit("T stands in a function or an exponent")
    f = sympy.lambdify((X, T_SYMBOL), e, "mpmath")
    with mpmath.workdps(300):
        a, b = (mpmath.mpf(sympy.N(edge, 50)) for edge in (piece.start, piece.end))
        ten = mpmath.mpf(10)
        heights = [(f(x, ten**40), f(x, ten**80)) for x in (a + (b - a) * k / 7 for k in (2, 3, 5))]
        if any(h == 0 for pair in heights for h in pair):
            raise NoLimit("its heights follow no power of T")
        powers = [float(mpmath.log(abs(high / low)) / mpmath.log(ten**40)) for low, high in heights]
    p = Fraction(powers[0]).limit_denominator(1000)
    sigma = sympy.limit(e / T_SYMBOL ** sympy.Rational(p), T_SYMBOL, sympy.oo)
    if sigma.has(T_SYMBOL, sympy.Limit, sympy.oo, sympy.nan) or max(powers) - min(powers) > 1e-6:
        raise NoLimit("its heights follow no power of T")
    return p, sigma


def slope(piece: Piece, at_start: bool) -> Fraction:
    """a in s ~ v^a, v the distance from the start or the end of the piece."""
    f = sympy.lambdify(X, piece.height, "mpmath")
    edge, sign = (piece.start, 1) if at_start else (piece.end, -1)
    with mpmath.workdps(400):
        edge = mpmath.mpf(sympy.N(edge, 400))
        v = [mpmath.mpf(10) ** -n for n in (30, 40, 50)]
        heights = [f(edge + sign * x) for x in v]
        if any(not mpmath.isfinite(h) or mpmath.im(h) != 0 or h <= mpmath.mpf(10) ** -300 for h in heights):
            return NO_POWER
        far, near = (float(mpmath.log(h1 / h0, 10)) / -10 for h0, h1 in itertools.pairwise(heights))
    if abs(near - far) > 1e-3:
        if min(near, far) > 3:
            return NO_POWER
        raise NoLimit(f"its heights follow no power at x={float(edge):g}")
    return Fraction(near).limit_denominator(1000)
