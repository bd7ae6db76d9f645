"""Muon-NSGD: Muon for matrices, normalised SGD for everything else, one learning rate for both.

Paper, section 5.1 and Appendix B (after Boreiko et al., 2025), with momentum m_t = mu m_{t-1} + g_t:

    matrix:  W_{t} = W_{t-1} - eta * NS(m_t)
    other:   w_{t} = w_{t-1} - eta * m_t / ||m_t||_2       (per tensor)

NS is the quintic Newton-Schulz iteration of Muon (Jordan et al., 2024): it sends every singular value of m_t to the
neighbourhood of 1 and keeps the singular vectors. Both updates forget the scale of the gradient.

A leaf's kind is decided by its path, never by its size, and a leaf that no rule names is an error. A rule says of
which rank the tensor is: 2 for a matrix, which Muon is for; 1 for a vector; 4 for the filters of a convolution, which
are no matrices and hence normalised as the paper says. Axes in front of it are a stack of layers (of experts, of
heads), and each member of the stack is a tensor of its own: its own Newton-Schulz, its own norm.

On a mesh, matrices of equal shape are stacked and the stack is spread over all devices of a run, whatever they are
split by otherwise: each device orthogonalises its own few matrices whole, without communication inside the iteration.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdl.sharding import ShardingRule, automatic_axes, constrain, partition_specs

__all__ = ["RULES", "Rule", "decays", "muon_nsgd", "newton_schulz", "scale_by_muon_nsgd", "tensor_ranks"]


class Rule(NamedTuple):
    """Leaves whose path, joined by "/", matches `pattern` (`re.search`) are tensors of `rank`: 2 Muon, else NSGD."""

    pattern: str
    rank: int


# The names that Flax gives its parameters. The first rule that matches decides.
RULES = (
    Rule(r"(^|/)conv[^/]*/kernel$", 4),
    Rule(r"(^|/)(kernel|embedding|lora_[ab])$", 2),
    Rule(r"(^|/)(bias|scale|cls)$", 1),
)

# Coefficients of Jordan et al. (2024): steepest at 0, singular values end in about [0.68, 1.14].
_A, _B, _C = 3.4445, -4.7750, 2.0315


def tensor_ranks(params: Any, rules: Sequence[Rule] = RULES) -> Any:
    """The rank of each leaf of `params` by its rule, as a tree of the same structure.

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
        if leaf.ndim < rank and rank > 1:
            raise ValueError(f"parameter {name!r} {leaf.shape} has fewer axes than the {rank} of its rule")
        return rank

    return jax.tree_util.tree_map_with_path(rank_of, params)


def decays(params: Any) -> Any:
    """Mask of the leaves that weight decay applies to, as in nanoGPT: matrices, and filters of convolutions."""
    return jax.tree.map(lambda rank: rank >= 2, tensor_ranks(params))


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
    momentum: float = 0.95,
    ns_steps: int = 5,
    nsgd_ratio: float = 1.0,
    rules: Sequence[Rule] = RULES,
    sharding: Sequence[ShardingRule] = (),
) -> optax.GradientTransformation:
    """The direction of Muon-NSGD, of unit scale, without learning rate and weight decay.

    Args:
      momentum: mu in [0, 1).
      ns_steps: Newton-Schulz iterations.
      nsgd_ratio: rate of the normalised-SGD part over that of the Muon part; the paper uses one rate (1.0).
      rules: which leaves are matrices and which are vectors, by path.
      sharding: how the leaves are split over a mesh, by path; matters for speed alone.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be in [0, 1)")

    def init(params: Any) -> optax.TraceState:
        tensor_ranks(params, rules)  # raises here, before any training
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.TraceState]:
        del params
        trace = jax.tree.map(lambda g, m: momentum * m + g, updates, state.trace)

        def normalised(m: jax.Array, rank: int) -> jax.Array:
            return nsgd_ratio * (_normalise(m, axes=tuple(range(-rank, 0))) if m.ndim else jnp.sign(m))

        ranks = tensor_ranks(trace, rules)
        specs = partition_specs(trace, sharding, jax.sharding.get_abstract_mesh().shape)
        is_muon = [rank == 2 for rank in jax.tree.leaves(ranks)]
        matrices, their_specs = (
            [x for x, muon in zip(jax.tree.leaves(tree), is_muon, strict=True) if muon] for tree in (trace, specs)
        )
        orthogonal = iter(_orthogonalise(matrices, their_specs, ns_steps))
        directions = jax.tree.map(lambda m, rank: next(orthogonal) if rank == 2 else normalised(m, rank), trace, ranks)
        return directions, optax.TraceState(trace=trace)

    return optax.GradientTransformation(init, update)


def muon_nsgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    ns_steps: int = 5,
    weight_decay: float = 0.01,
    nsgd_ratio: float = 1.0,
    sharding: Sequence[ShardingRule] = (),
) -> optax.GradientTransformation:
    """Muon-NSGD with decoupled weight decay on matrices: ``W <- W - eta (NS(m) + weight_decay W)``."""
    return optax.chain(
        scale_by_muon_nsgd(momentum, ns_steps, nsgd_ratio, sharding=sharding),
        optax.add_decayed_weights(weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate),
    )


def _orthogonalise(matrices: Sequence[jax.Array], specs: Sequence[Any], steps: int) -> list[jax.Array]:
    """`newton_schulz` of each; on a mesh, equal shapes together."""
    if not automatic_axes():
        return [newton_schulz(m, steps) for m in matrices]
    groups: dict[Any, list[int]] = {}
    stacks: list[jax.Array] = []
    for i, (m, spec) in enumerate(zip(matrices, specs, strict=True)):
        tall = m.shape[-2] > m.shape[-1]
        rows, columns = (_names(part) for part in (*spec, None, None)[m.ndim - 2 : m.ndim])
        stacks.append((m.mT if tall else m).reshape(-1, *sorted(m.shape[-2:])))
        key = (stacks[i].shape[1:], *((columns, rows) if tall else (rows, columns)))
        groups.setdefault(key, []).append(i)
    done: dict[int, jax.Array] = {}
    for (_, rows, columns), members in groups.items():
        stack = _orthogonalise_stack(jnp.concatenate([stacks[i] for i in members]), rows, columns, steps)
        ends = [sum(len(stacks[j]) for j in members[: k + 1]) for k in range(len(members) - 1)]
        for i, part in zip(members, jnp.split(stack, ends), strict=True):
            m = matrices[i]
            done[i] = (part.mT if m.shape[-2] > m.shape[-1] else part).reshape(m.shape)
    return [done[i] for i in range(len(matrices))]


def _orthogonalise_stack(stack: jax.Array, rows: tuple[str, ...], columns: tuple[str, ...], steps: int) -> jax.Array:
    """`newton_schulz` of [n, M, N], M <= N, that is split by the mesh axes `rows` and `columns` on M and N.

    Many matrices are dealt out whole; of few (an embedding), each device gets some columns, so that only the M x M Gram
    matrix is communicated. One axis of the mesh moves at a time: XLA makes an all-to-all of that, and would put the
    whole stack on every device if all moved at once.
    """
    axes = automatic_axes()
    n, _, N = stack.shape
    devices, rest = math.prod(axes.values()), tuple(a for a in axes if a not in rows + columns)
    if 2 * n >= devices:
        stack = jnp.pad(stack, ((0, -n % devices), (0, 0), (0, 0)))
        layouts: list[Any] = [(rows, None, columns), (rows + columns,), (rows + columns + rest,)]
    else:
        stack = jnp.pad(stack, ((0, 0), (0, 0), (0, -N % devices)))
        layouts = [(None, rows, columns), (None, None, columns + rows), (None, None, columns + rows + rest)]
    for layout in layouts:
        stack = constrain(stack, *layout)
    stack = newton_schulz(stack, steps)
    for layout in reversed(layouts):
        stack = constrain(stack, *layout)
    return stack[:n, :, :N]


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def _normalise(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """x / ||x||_2 over `axes`, 0 where x is 0; the largest entry goes first, so no square under- or overflows."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)
