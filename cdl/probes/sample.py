"""The loss that is probed: a mean over a fixed list of batches, with its gradient and products with its Hessian.

A point w is an `Iterate`: the parameters, which everything is differentiated by, and what else the loss reads and
nobody differentiates by, such as the statistics of batch normalisation.

Precision. The numbers of one batch are as exact as the loss itself computes them, float32 for models: some 1e-7 of the
loss. Batches are summed in float64 on the host (losses), in float32 on the device (gradients, products), and norms,
distances and inner products are float64 sums of those float32 entries; norms of mini-batch gradients are float32. So
what is wrong with an inner product <d, g> is about 1e-6 |d| |g| at most.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cdl.errors import UserError

__all__ = ["Gradient", "Iterate", "Loss", "between", "inner", "moved", "toward"]

_PIECE = 1 << 20  # numbers that are float64 at once


class Iterate(NamedTuple):
    """params: tree of float arrays. fixed: what else the loss reads; () for nothing."""

    params: Any
    fixed: Any = ()


class Gradient(NamedTuple):
    """loss: float64. params: its gradient, a tree of NumPy arrays. norm2_E: |g_e|^2, of the mean loss of batch e."""

    loss: float
    params: Any
    norm2_E: np.ndarray


class Loss:
    """L(w) = sum of losses / sum of counts over E batches.

    Args:
      sums: (params, fixed, batch, *shared) -> (summed loss, count), scalars.
      batch_E: tree of arrays with a leading axis E.
      shared: trees of arrays that are the same at all iterates, such as the weights beside adapters; arguments of what
        is compiled, of which constants would be copies.
    """

    def __init__(self, sums: Callable[..., tuple[jax.Array, jax.Array]], batch_E: Any, *shared: Any):
        self._sums, self._given = sums, jax.tree.map(jnp.asarray, (batch_E, *shared))

        def values(params: Any, fixed: Any, batch_E: Any, *shared: Any) -> Any:
            return jax.lax.map(lambda batch: sums(params, fixed, batch, *shared), batch_E)

        def gradient(params: Any, fixed: Any, batch_E: Any, *shared: Any) -> Any:
            def one(total: Any, batch: Any) -> Any:
                at = jax.value_and_grad(lambda p: sums(p, fixed, batch, *shared), has_aux=True)
                (loss, count), grad = at(params)
                norm2 = sum((jnp.vdot(g, g) for g in jax.tree.leaves(grad)), start=jnp.zeros(())) / count**2
                return jax.tree.map(jnp.add, total, grad), (loss, count, norm2)

            return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), batch_E)

        def product(params: Any, fixed: Any, along: Any, batch_E: Any, *shared: Any) -> Any:
            def one(total: Any, batch: Any) -> Any:
                slope = jax.grad(lambda p: sums(p, fixed, batch, *shared), has_aux=True)
                _, curved, count = jax.jvp(slope, (params,), (along,), has_aux=True)
                return jax.tree.map(jnp.add, total, curved), count

            total, count_E = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), batch_E)
            return jax.tree.map(lambda x: x / count_E.sum(), total)

        self._values, self._gradient, self._product = map(_exact, (values, gradient, product))

    @classmethod
    def of(cls, loss: Callable[[Any], jax.Array]) -> "Loss":
        """From a function of the parameters alone."""
        return cls(lambda params, fixed, batch: (loss(params), jnp.ones(())), np.zeros(1))

    def divided(self) -> "Loss | None":
        """The same over the same rows, each batch in equal parts, as few as can be; None where batches are of one row.
        Leaves of a batch have its rows along their first axis."""
        batch_E, *shared = self._given
        E, B = jax.tree.leaves(batch_E)[0].shape[:2]
        if B == 1:
            return None
        parts = next(n for n in range(2, B + 1) if B % n == 0)
        return Loss(
            self._sums, jax.tree.map(lambda x: x.reshape(E * parts, B // parts, *x.shape[2:]), batch_E), *shared
        )

    def __call__(self, at: Iterate) -> float:
        """The loss; NaN where it is not finite."""
        loss_E, count_E = (np.asarray(x, np.float64) for x in self._values(*at, *self._given))
        return float(loss_E.sum() / count_E.sum())

    def gradient(self, at: Iterate) -> Gradient:
        """Loss and gradient.

        Raises:
          UserError: one of them is not finite.
        """
        total, numbers = self._gradient(*at, *self._given)
        loss_E, count_E, norm2_E = (np.asarray(x, np.float64) for x in numbers)
        if not (np.isfinite(loss_E).all() and np.isfinite(norm2_E).all()):
            raise UserError("the loss or its gradient is not finite at an iterate; probe a run that has not diverged")
        count = count_E.sum()
        mean = jax.tree.map(lambda x: np.asarray(x) / np.asarray(count, x.dtype), jax.device_get(total))
        return Gradient(float(loss_E.sum() / count), mean, norm2_E)

    def product(self, at: Iterate) -> Callable[[Any], Any]:
        """v -> H v, trees like the parameters: the Hessian at a point, as forward mode over the gradient gives it."""
        here = jax.device_put(at)
        return lambda along: self._product(*here, along, *self._given)


def _exact(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled with products of float32 in float32, which GPUs and TPUs would make of fewer digits."""
    compiled = jax.jit(f)

    def run(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return compiled(*arguments)

    return run


def inner(a: Any, b: Any) -> float:
    """<a, b> of two trees, in float64."""
    return sum((_inner(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)), start=0.0)


def toward(a: Any, b: Any, g: Any) -> tuple[float, float]:
    """|a - b|^2 and <a - b, g> of three trees, from differences in float64: two iterates are far closer to each other
    than either is to 0."""
    length2 = along = 0.0
    for leaves in zip(*map(jax.tree.leaves, (a, b, g)), strict=True):
        x, y, z = (np.ravel(leaf) for leaf in leaves)
        for i in range(0, len(x), _PIECE):
            d = np.subtract(x[i : i + _PIECE], y[i : i + _PIECE], dtype=np.float64)
            length2 += float(d @ d)
            along += float(d @ z[i : i + _PIECE].astype(np.float64))
    return length2, along


def moved(at: Iterate, direction: Any, by: float) -> Iterate:
    """w + by * direction."""
    return at._replace(params=jax.tree.map(lambda x, d: _sum(x, 1.0, d, by), at.params, direction))


def between(a: Iterate, b: Iterate, share: float) -> Iterate:
    """(1 - share) a + share b, of the parameters and of what else the loss reads."""
    return jax.tree.map(lambda x, y: _sum(x, 1 - share, y, share), a, b)


def _sum(x: Any, p: float, y: Any, q: float) -> np.ndarray:
    return (p * np.asarray(x, np.float64) + q * np.asarray(y, np.float64)).astype(np.asarray(x).dtype)


def _inner(x: Any, y: Any) -> float:
    x, y = np.ravel(x), np.ravel(y)
    pieces = (slice(i, i + _PIECE) for i in range(0, len(x), _PIECE))
    return sum((float(x[p].astype(np.float64) @ y[p].astype(np.float64)) for p in pieces), start=0.0)
