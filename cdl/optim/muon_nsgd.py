"""Muon-NSGD: Muon for matrices, normalised SGD for everything else, one learning rate for both.

Paper, section 5.1 and Appendix B (after Boreiko et al., 2025), with momentum m_t = mu m_{t-1} + g_t:

    matrix:  W_{t} = W_{t-1} - eta * NS(m_t)
    other:   w_{t} = w_{t-1} - eta * m_t / ||m_t||_2       (per tensor)

NS is the quintic Newton-Schulz iteration of Muon (Jordan et al., 2024): it sends every singular value of m_t to the
neighbourhood of 1 and keeps the singular vectors. Both updates forget the scale of the gradient.

A leaf's kind is decided by its path, never by its size, and a leaf that no rule names is an error. A rule says of
which rank the tensor is: 2 for a matrix, 1 for a vector. Axes in front of it are a stack of layers (of experts, of
heads), and each member of the stack is a tensor of its own: its own Newton-Schulz, its own norm.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["RULES", "Rule", "is_matrix", "muon_nsgd", "newton_schulz", "scale_by_muon_nsgd", "tensor_ranks"]


class Rule(NamedTuple):
    """Leaves whose path, joined by "/", matches `pattern` (`re.search`) are tensors of `rank`: 2 Muon, 1 NSGD."""

    pattern: str
    rank: int


# The names that Flax gives its parameters. The first rule that matches decides.
RULES = (
    Rule(r"(^|/)(kernel|embedding)$", 2),
    Rule(r"(^|/)(bias|scale)$", 1),
)

# Coefficients of Jordan et al. (2024): steepest at 0, singular values end in about [0.68, 1.14].
_A, _B, _C = 3.4445, -4.7750, 2.0315


def tensor_ranks(params: Any, rules: Sequence[Rule] = RULES) -> Any:
    """The rank (1 or 2) of each leaf of `params`, as a tree of the same structure.

    Raises:
      ValueError: a leaf that no rule names, or one with fewer axes than its rule says.
    """

    def rank_of(path: Any, leaf: Any) -> int:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rank = next((r.rank for r in rules if re.search(r.pattern, name)), None)
        if rank is None:
            patterns = ", ".join(r.pattern for r in rules)
            raise ValueError(
                f"no rule says whether parameter {name!r} {leaf.shape} is a matrix or a vector; rules: {patterns}"
            )
        if rank == 2 and leaf.ndim < 2:
            raise ValueError(f"parameter {name!r} {leaf.shape} is no matrix, as its rule says")
        return rank

    return jax.tree_util.tree_map_with_path(rank_of, params)


def is_matrix(params: Any) -> Any:
    """Mask of the leaves that are matrices: those that weight decay applies to (as in nanoGPT)."""
    return jax.tree.map(lambda rank: rank == 2, tensor_ranks(params))


def newton_schulz(x: jax.Array, steps: int = 5) -> jax.Array:
    """Approximate orthogonal factor U V^T of each matrix of a stack.

    Args:
      x: [..., M, N], any scale; an all-zero matrix stays zero.
      steps: iterations of ``x <- a x + (b x x^T + c (x x^T)^2) x``.

    Returns:
      [..., M, N] with the singular vectors of x and singular values near 1 (0.68 to 1.14 after 5 steps, for those
      that were at least a few thousandths of the Frobenius norm).
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the Gram matrix of the shorter side is the smaller one
    x = _normalise(x, axes=(-2, -1))
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return x if wide else x.mT


def scale_by_muon_nsgd(
    momentum: float = 0.95, ns_steps: int = 5, nsgd_ratio: float = 1.0, rules: Sequence[Rule] = RULES
) -> optax.GradientTransformation:
    """The direction of Muon-NSGD, of unit scale, without learning rate and weight decay.

    Args:
      momentum: mu in [0, 1).
      ns_steps: Newton-Schulz iterations.
      nsgd_ratio: rate of the normalised-SGD part over that of the Muon part; the paper uses one rate (1.0).
      rules: which leaves are matrices and which are vectors, by path.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be in [0, 1)")

    def init(params: Any) -> optax.TraceState:
        tensor_ranks(params, rules)  # raises here, before any training
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.TraceState]:
        del params
        trace = jax.tree.map(lambda g, m: momentum * m + g, updates, state.trace)

        def direction(m: jax.Array, rank: int) -> jax.Array:
            if rank == 2:
                return newton_schulz(m, ns_steps)
            return nsgd_ratio * (_normalise(m, axes=(-1,)) if m.ndim else jnp.sign(m))

        return jax.tree.map(direction, trace, tensor_ranks(trace, rules)), optax.TraceState(trace=trace)

    return optax.GradientTransformation(init, update)


def muon_nsgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    ns_steps: int = 5,
    weight_decay: float = 0.01,
    nsgd_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Muon-NSGD with decoupled weight decay on matrices: ``W <- W - eta (NS(m) + weight_decay W)``."""
    return optax.chain(
        scale_by_muon_nsgd(momentum, ns_steps, nsgd_ratio),
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(learning_rate),
    )


def _normalise(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """x / ||x||_2 over `axes`, 0 where x is 0; the largest entry goes first, so no square under- or overflows."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)
