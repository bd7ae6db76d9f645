"""Published laws of the loss along a run, as `Form`s: to compare with on one's own runs.

With S_k = eta_1 + .. + eta_k, and no change before the first update (eta_0 = eta_1):

multipower, Luo et al., arXiv 2503.12811, (1) and (2), seven constants:

    L_tau = L_inf + A S_tau^-alpha - B sum_{k <= tau} (eta_{k-1} - eta_k) G(eta_k^-gamma (S_tau - S_{k-1})),
    G(x) = 1 - (1 + C x)^-beta.

  The rises of the warm-up are among the changes. The paper's sum begins after the warm-up, but its authors' published
  constants and figures come from a sum over all updates, and only so are they reproduced (tested).

annealing, Tissue et al., arXiv 2408.11029, (1), four constants:

    L_tau = L_inf + A S_tau^-alpha - C sum_{i <= tau} sum_{k <= i} lambda^(i-k) (eta_{k-1} - eta_k),

  where the rates of the warm-up count as the peak, as in its authors' program, and lambda is `DECAY`.

functional, Li et al., arXiv 2509.19189, (30) as others quote it, for one size of model, seven constants:

    L_tau = L_inf + c1 S_tau^-s - c2 sum_{k <= tau} (eta_{k-1} - eta_k) (c3 + S_k^-s) g(S_tau - S_k),
    g(x) = 1 - (1 + c4 x)^-gamma,

  the sum from the peak on. c2 and the product c2 c3 are what is fitted.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.signal import lfilter

from cdl.errors import UserError
from cdl.laws.forms import Form, Prepared, positive_steps

__all__ = ["DECAY", "annealing", "functional", "multipower"]

DECAY = 0.999  # lambda of the annealing law, a setting there and not fitted: what its authors use by default
_NODES = 160  # of the sums over changes of the rate
_LEAVES = 65536  # no change of the rate below 1/65536 of all is told apart from its neighbours
_MOST_ERROR = 0.01  # of those sums, in units of the largest rate
_SMALLEST, _VAST = 1e-12, 1e300  # a rate and a sum of rates beyond which powers of them would leave float64


# --- The multi-power law -------------------------------------------------------------------------------------------


def _multipower_prepare(eta_T: np.ndarray, step_P: np.ndarray, around_J: np.ndarray | None) -> Prepared:
    del around_J
    positive_steps(eta_T, step_P)
    S_T = np.cumsum(eta_T)
    weight_PxK, start_PxK, eta_PxK = _changes(eta_T, S_T - eta_T, step_P, since=0)
    S_P = S_T[step_P - 1]
    since_PxK = np.maximum(S_P[:, None] - start_PxK, 0.0)
    stopped_PxK = eta_PxK == 0  # G is 1, its limit, once a positive rate follows, and 0 till then
    return {
        "log_S": np.log(S_P),
        "change": weight_PxK,
        "since": np.where(stopped_PxK & (since_PxK > 0), _VAST, since_PxK),
        "log_eta": np.log(np.where(stopped_PxK, 1.0, np.maximum(eta_PxK, _SMALLEST))),
    }


def _multipower_columns(shape_J: Array, prepared: dict[str, Array]) -> Array:
    alpha, C, beta, gamma = shape_J
    log_S_P, zero = prepared["log_S"], jnp.zeros_like(alpha)
    gain_P, _ = _gains((C, beta, gamma, zero), prepared["change"], prepared["since"], prepared["log_eta"])
    return jnp.stack([jnp.ones_like(log_S_P), jnp.exp(-alpha * log_S_P), -gain_P], 1)


def _multipower_natural(params: dict[str, float], unit: float) -> dict[str, float]:
    return params | {
        "A": params["A"] * unit ** params["alpha"],
        "B": params["B"] / unit,
        "C": params["C"] * unit ** (params["gamma"] - 1),
    }


multipower = Form(
    name="multipower",
    title="multi-power law",
    coefficients=("L_inf", "A", "B"),
    shape=("alpha", "C", "beta", "gamma"),
    low=(0.02, 1e-6, 0.02, 0.0),
    high=(3.0, 1e3, 20.0, 2.0),
    starts=tuple((alpha, C, 0.5, 0.5) for alpha in (0.3, 0.6) for C in (0.03, 0.3)),
    prepare=_multipower_prepare,
    columns=_multipower_columns,
    natural=_multipower_natural,
)

# --- The annealing law ---------------------------------------------------------------------------------------------


def _annealing_prepare(eta_T: np.ndarray, step_P: np.ndarray, around_J: np.ndarray | None) -> Prepared:
    del around_J
    positive_steps(eta_T, step_P)
    peak = _peak(eta_T)
    eta_T = np.concatenate([np.full(peak, eta_T[peak]), eta_T[peak:]])
    momentum_T = lfilter([1.0], [1.0, -DECAY], -np.diff(eta_T, prepend=eta_T[0]))
    at_P = step_P - 1
    return {"log_S": np.log(np.cumsum(eta_T)[at_P]), "annealing": np.cumsum(momentum_T)[at_P]}


def _annealing_columns(shape_J: Array, prepared: dict[str, Array]) -> Array:
    log_S_P = prepared["log_S"]
    return jnp.stack([jnp.ones_like(log_S_P), jnp.exp(-shape_J[0] * log_S_P), -prepared["annealing"]], 1)


annealing = Form(
    name="annealing",
    title="annealing law",
    coefficients=("L_inf", "A", "C"),
    shape=("alpha",),
    low=(0.02,),
    high=(3.0,),
    starts=((0.3,), (0.6,), (1.0,)),
    prepare=_annealing_prepare,
    columns=_annealing_columns,
    natural=lambda params, unit: params | {"A": params["A"] * unit ** params["alpha"], "C": params["C"] / unit},
)

# --- The functional scaling law ------------------------------------------------------------------------------------


def _functional_prepare(eta_T: np.ndarray, step_P: np.ndarray, around_J: np.ndarray | None) -> Prepared:
    del around_J
    positive_steps(eta_T, step_P)
    S_T = np.cumsum(eta_T)
    weight_PxK, time_PxK, _ = _changes(eta_T, S_T, step_P, since=_peak(eta_T))
    S_P = S_T[step_P - 1]
    return {
        "log_S": np.log(S_P),
        "change": weight_PxK,
        "since": np.maximum(S_P[:, None] - time_PxK, 0.0),
        "log_time": np.log(np.where(weight_PxK == 0, 1.0, time_PxK)),
    }


def _functional_columns(shape_J: Array, prepared: dict[str, Array]) -> Array:
    s, c4, gamma = shape_J
    log_S_P, zero = prepared["log_S"], jnp.zeros_like(s)
    label_P, batch_P = _gains((c4, gamma, zero, s), prepared["change"], prepared["since"], prepared["log_time"])
    return jnp.stack([jnp.ones_like(log_S_P), jnp.exp(-s * log_S_P), -label_P, -batch_P], 1)


def _functional_natural(params: dict[str, float], unit: float) -> dict[str, float]:
    return params | {
        "c1": params["c1"] * unit ** params["s"],
        "c2c3": params["c2c3"] / unit,
        "c2": params["c2"] * unit ** (params["s"] - 1),
        "c4": params["c4"] / unit,
    }


functional = Form(
    name="functional",
    title="functional scaling law",
    coefficients=("L_inf", "c1", "c2c3", "c2"),
    shape=("s", "c4", "gamma"),
    low=(0.02, 1e-6, 0.02),
    high=(3.0, 1e3, 20.0),
    starts=tuple((s, c4, 0.5) for s in (0.3, 0.6) for c4 in (0.03, 0.3)),
    prepare=_functional_prepare,
    columns=_functional_columns,
    natural=_functional_natural,
)

# --- Sums over the changes of the rate -----------------------------------------------------------------------------


@jax.custom_jvp
def _gains(
    parameters: tuple[Array, Array, Array, Array], change_PxK: Array, since_PxK: Array, log_PxK: Array
) -> tuple[Array, Array]:
    """sum_k change G and sum_k change e^(-b log) G, G = 1 - (1 + c e^(-a log) since)^-beta, for c, beta, a, b.

    With derivatives of its own in the parameters: they share their powers with the sums and with each other.
    """
    c, beta, a, b = parameters
    gain_PxK = change_PxK * -jnp.expm1(-beta * jnp.log1p(c * jnp.exp(-a * log_PxK) * since_PxK))
    return gain_PxK.sum(1), (gain_PxK * jnp.exp(-b * log_PxK)).sum(1)


@_gains.defjvp
def _gains_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (c, beta, a, b), change_PxK, since_PxK, log_PxK = primals
    x_PxK = c * jnp.exp(-a * log_PxK) * since_PxK
    log1p_PxK, aged_PxK = jnp.log1p(x_PxK), jnp.exp(-b * log_PxK)
    gain_PxK = change_PxK * -jnp.expm1(-beta * log1p_PxK)
    left_PxK = change_PxK - gain_PxK
    in_log_c_PxK = left_PxK * beta * x_PxK / (1 + x_PxK)
    values, derivatives = [], []
    for weight_PxK, ages in ((1.0, 0.0), (aged_PxK, 1.0)):
        values.append((weight_PxK * gain_PxK).sum(1))
        terms = (in_log_c_PxK / c, left_PxK * log1p_PxK, -in_log_c_PxK * log_PxK, -ages * gain_PxK * log_PxK)
        slopes = [(weight_PxK * term_PxK).sum(1) for term_PxK in terms]
        derivatives.append(sum(d * t for d, t in zip(slopes, tangents[0], strict=True)))
    return tuple(values), tuple(derivatives)


def _peak(eta_T: np.ndarray) -> int:
    """Index where the warm-up is over: the largest rate before the first that is lower than one before it."""
    falls_T = eta_T < np.maximum.accumulate(eta_T) * (1 - 1e-6)  # not by rounding
    return int(np.argmax(eta_T[: int(np.argmax(falls_T))])) if falls_T.any() else int(np.argmax(eta_T))


def _changes(
    eta_T: np.ndarray, place_T: np.ndarray, step_P: np.ndarray, since: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes for sums over the changes of the rate up to a step, sum_k (eta_{k-1} - eta_k) f(place_k, eta_k).

    Drops and rises are each merged in a binary tree. A block of it has two nodes, those of the Gauss quadrature for its
    own changes, and a point takes the largest blocks that are short against the distance to it and to the start, and
    within which the rate does not jump.

    Args:
      eta_T: rates. place_T: the sum of rates that goes with each change. step_P: where the sums end. since: the first
        change is that after this index.

    Returns:
      weight_PxK, place_PxK, eta_PxK with K = _NODES for every run: the sum is sum_j weight_j f(place_j, eta_j), exactly
      so for few changes, else for a smooth f closely (tested). Weights of 0 fill the rows up.

    Raises:
      UserError: rates that go up and down so often that these nodes do not do.
    """
    drop_T = -np.diff(eta_T, prepend=0.0)
    drop_T[: since + 1] = 0.0
    S_P = np.cumsum(eta_T)[step_P - 1]
    sides = [_side(sign, drop_T, eta_T, place_T, step_P) for sign in (1.0, -1.0) if (sign * drop_T > 0).any()]
    weight_PxK, place_PxK, eta_PxK = (np.full((len(step_P), _NODES), fill) for fill in (0.0, 0.0, 1.0))
    if not sides:
        return weight_PxK, place_PxK, eta_PxK
    ratio = 0.25 if sum(len(side.place_A) for side in sides) > _NODES else 0.0
    while True:
        nodes = (np.concatenate(x) for x in zip(*(_nodes(side, S_P, ratio) for side in sides), strict=True))
        point_M, weight_M, place_M, eta_M = nodes
        order = np.argsort(point_M, kind="stable")
        column_M = np.empty(len(order), int)
        column_M[order] = np.arange(len(order)) - np.searchsorted(point_M[order], point_M[order])
        if column_M.max(initial=0) < _NODES:
            break
        ratio *= 1.25
    weight_PxK[point_M, column_M] = weight_M
    place_PxK[point_M, column_M] = place_M
    eta_PxK[point_M, column_M] = eta_M
    for p in np.linspace(0, len(step_P) - 1, 5).astype(int):
        to_p = np.arange(step_P[p])
        exact = drop_T[to_p] @ _typical(S_P[p] - place_T[to_p], eta_T[to_p])
        merged = weight_PxK[p] @ _typical(S_P[p] - place_PxK[p], eta_PxK[p])
        if abs(merged - exact) > _MOST_ERROR * eta_T.max():
            raise UserError(
                f"the rate goes up and down too often: sums over its changes to step {step_P[p]} are not exact to "
                f"{_MOST_ERROR:.0%} of the peak; smooth the rates, or use law='annealing'"
            )
    return weight_PxK, place_PxK, eta_PxK


def _typical(distance: np.ndarray, eta: np.ndarray) -> np.ndarray:
    """What is summed, with constants that are not unusual."""
    return 1 - (1 + 0.1 * np.maximum(distance, 0.0) / np.sqrt(np.maximum(eta, _SMALLEST))) ** -0.5


@dataclass(frozen=True)
class _Side:
    """The changes of one sign: leaves A of a tree, and how many of them are over at each point."""

    sign: float
    place_A: np.ndarray
    eta_A: np.ndarray
    over_P: np.ndarray
    tree: list[dict[str, np.ndarray]]


def _side(sign: float, drop_T: np.ndarray, eta_T: np.ndarray, place_T: np.ndarray, step_P: np.ndarray) -> _Side:
    k_N = np.flatnonzero(sign * drop_T > 0)
    mass_N = sign * drop_T[k_N]
    before_N = np.cumsum(mass_N) - mass_N
    first_A = np.flatnonzero(np.diff(np.floor(before_N / mass_N.sum() * _LEAVES), prepend=-1.0))
    last_A = k_N[np.append(first_A[1:], len(k_N)) - 1]
    mass_A = np.add.reduceat(mass_N, first_A)
    from_N = np.repeat(k_N[first_A], np.diff(np.append(first_A, len(k_N))))  # so that single changes stay exact
    place_A, eta_A = (
        x_T[k_N[first_A]] + np.add.reduceat(mass_N * (x_T[k_N] - x_T[from_N]), first_A) / mass_A
        for x_T in (place_T, eta_T)
    )
    tree = _tree(mass_A, place_A, np.log(np.maximum(eta_A, 1e-3 * eta_T.max())))  # lower ones weigh too little
    return _Side(sign, place_A, eta_A, np.searchsorted(last_A, step_P - 1, side="right"), tree)


def _tree(mass_A: np.ndarray, place_A: np.ndarray, log_eta_A: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Blocks of 1, 2, 4, .. neighbours.

    Of each: mass; first, last, mean, variance and third central moment of its places; from, to and the largest jump
    between neighbours of its log rates.
    """
    length = 1 << (len(mass_A) - 1).bit_length()
    fill = (0, length - len(mass_A))
    place_A, log_eta_A = (np.pad(x_A, fill, mode="edge") for x_A in (place_A, log_eta_A))
    level = {"mass": np.pad(mass_A, fill), "first": place_A, "last": place_A, "mean": place_A}
    level |= {"from": log_eta_A, "to": log_eta_A} | {name: np.zeros(length) for name in ("variance", "third", "jump")}
    tree = [level]
    while len(tree[-1]["mass"]) > 1:
        a, b = ({name: x[i::2] for name, x in tree[-1].items()} for i in (0, 1))
        mass = a["mass"] + b["mass"]
        p = np.divide(a["mass"], mass, out=np.ones_like(mass), where=mass > 0)
        q, apart = 1 - p, b["mean"] - a["mean"]
        third = p * a["third"] + q * b["third"] + 3 * p * q * apart * (b["variance"] - a["variance"])
        tree.append(
            {
                "mass": mass,
                "first": a["first"],
                "last": b["last"],
                "mean": p * a["mean"] + q * b["mean"],
                "variance": p * a["variance"] + q * b["variance"] + p * q * apart**2,
                "third": third + p * q * (p - q) * apart**3,
                "from": a["from"],
                "to": b["to"],
                "jump": np.maximum(np.maximum(a["jump"], b["jump"]), np.abs(b["from"] - a["to"])),
            }
        )
    return tree


def _nodes(side: _Side, S_P: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The nodes of the blocks that points take: point_M, weight_M, place_M, eta_M.

    ratio: how long a block may be against its distance from the point and from the start.
    """
    found: list[tuple[np.ndarray, ...]] = []
    point_M = np.flatnonzero(side.over_P > 0)
    block_M = np.zeros(len(point_M), int)
    for i in reversed(range(len(side.tree))):
        level = {name: x[block_M] for name, x in side.tree[i].items()}
        if i == 0:
            found.append((point_M, level["mass"], level["mean"], side.eta_A[block_M]))
            break
        room_M = np.minimum(S_P[point_M] - level["last"], level["first"])
        take_M = np.minimum((block_M + 1) << i, len(side.place_A)) <= side.over_P[point_M]
        take_M &= (level["last"] - level["first"] <= ratio * room_M) & (level["jump"] <= 0.5 * max(1.0, ratio**2))
        mass, mean, variance, third = (level[name][take_M] for name in ("mass", "mean", "variance", "third"))
        skew = np.divide(third, variance, out=np.zeros_like(third), where=variance > 0)
        root = np.sqrt(skew**2 + 4 * variance)
        share = np.divide(root + skew, 2 * root, out=np.full_like(root, 0.5), where=root > 0)
        for weight, place in ((mass * share, mean + (skew - root) / 2), (mass * (1 - share), mean + (skew + root) / 2)):
            found.append((point_M[take_M], weight, place, np.interp(place, side.place_A, side.eta_A)))
        point_M, block_M = (np.repeat(x[~take_M], 2) for x in (point_M, block_M))
        block_M = 2 * block_M + np.arange(len(block_M)) % 2
        begun_M = block_M << (i - 1) < side.over_P[point_M]
        point_M, block_M = point_M[begun_M], block_M[begun_M]
    point_M, weight_M, place_M, eta_M = (np.concatenate(x) for x in zip(*found, strict=True))
    return point_M, side.sign * weight_M, place_M, eta_M
