"""The ends of the spectrum of a Hessian, by Lanczos, from products with it alone.

The vectors are kept, and each new one is made orthogonal to all of them, twice: without that a value that has been
found is found again. The recursion is float64 on the host; products are as exact as whoever makes them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cdl.errors import UserError

__all__ = ["Spectrum", "extreme_eigenvalues", "most_steps"]

# What is left of a product when its known part is taken away is rounding below this share of the largest value seen.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


class Spectrum(NamedTuple):
    """The largest and the smallest (most negative) eigenvalue found.

    largest_error, smallest_error: within them of each value there is an eigenvalue, |beta_m s_m| of the m-th Lanczos
      step. products: m. converged: both are below the tolerance. exact: the vectors span a space that the matrix
      maps into itself, so nothing was left to go on with: values are those of the matrix up to rounding.
    vectors: (of the largest, of the smallest), trees of unit norm; None unless asked for.
    """

    largest: float
    smallest: float
    largest_error: float
    smallest_error: float
    products: int
    converged: bool
    exact: bool
    vectors: tuple[Any, Any] | None = None


def extreme_eigenvalues(
    product: Callable[[Any], Any],
    like: Any,
    *,
    seed: int = 0,
    tolerance: float = 1e-3,
    most: int = 100,
    vectors: bool = False,
) -> Spectrum:
    """Both ends of the spectrum of a symmetric matrix over trees.

    Starts from a random vector, which has a part in every eigenspace: where the vectors come to span a space that the
    matrix keeps, its ends are those of the whole spectrum.

    Args:
      product: v -> H v, trees like `like`.
      like: tree of arrays, for shapes and dtypes.
      seed: of the first vector.
      tolerance: stop once both errors are below this share of the larger of the two values.
      most: products to make at most; so many float64 vectors are kept.
      vectors: also give the eigenvectors.

    Raises:
      UserError: `tolerance` or `most` is not positive, or a product is not finite.
    """
    if most < 1 or not tolerance > 0:
        raise UserError(f"most={most} and tolerance={tolerance} must be at least 1 and above 0")
    leaves, structure = jax.tree.flatten(like)
    shapes = [np.shape(leaf) for leaf in leaves]
    dtypes = [np.asarray(leaf).dtype if np.isscalar(leaf) else leaf.dtype for leaf in leaves]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    N = int(ends[-1])

    def tree(v_N: np.ndarray) -> Any:
        parts = np.split(v_N, ends[:-1])
        shaped = [p.reshape(s).astype(d) for p, s, d in zip(parts, shapes, dtypes, strict=True)]
        return jax.tree.unflatten(structure, shaped)

    def times(v_N: np.ndarray) -> np.ndarray:
        made = jax.device_get(jax.tree.leaves(product(tree(v_N))))
        w_N = np.concatenate([np.ravel(x).astype(np.float64) for x in made])
        if not np.isfinite(w_N).all():
            raise UserError("a product with the Hessian is not finite; probe a run that has not diverged")
        return w_N

    m = min(most, N)
    basis_MxN = np.empty((m, N))
    v_N = np.random.default_rng(seed).standard_normal(N)
    v_N /= np.linalg.norm(v_N)
    alpha, beta = list[float](), list[float]()
    while True:
        j = len(alpha)
        basis_MxN[j] = v_N
        w_N = times(v_N)
        alpha.append(float(v_N @ w_N))
        known = basis_MxN[: j + 1]
        for _ in range(2):
            w_N -= known.T @ (known @ w_N)
        beta.append(float(np.linalg.norm(w_N)))
        theta_J, s_JxJ = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
        low, high = (abs(beta[-1] * s_JxJ[-1, i]) for i in (0, -1))
        size = float(np.abs(theta_J[[0, -1]]).max())
        exact = beta[-1] <= _ROUNDING * size or j + 1 == N
        converged = exact or max(low, high) <= tolerance * size
        if converged or j + 1 == m:
            break
        v_N = w_N / beta[-1]
    found = tuple(tree(s_JxJ[:, i] @ basis_MxN[: j + 1]) for i in (-1, 0)) if vectors else None
    return Spectrum(float(theta_J[-1]), float(theta_J[0]), high, low, j + 1, converged, exact, found)


def most_steps(parameters: int, memory: float) -> int:
    """How many vectors of so many parameters fit into so many bytes."""
    return int(memory // (8 * parameters))
