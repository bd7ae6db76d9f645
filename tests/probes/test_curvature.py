"""Eigenvalues against those of matrices that are known, and Hessian-vector products against a dense Hessian."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from cdl.errors import UserError
from cdl.models import build as models
from cdl.models.gpt2 import arguments
from cdl.probes.convexity import measure_path
from cdl.probes.curvature import extreme_eigenvalues
from cdl.probes.sample import Iterate, Loss, inner, moved


def matrix(values: list[float] | np.ndarray) -> np.ndarray:
    q_NxN, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((len(values), len(values))))
    return (q_NxN * np.asarray(values)) @ q_NxN.T


def product(h_NxN: np.ndarray) -> Any:
    return lambda v_N: h_NxN @ np.asarray(v_N, float)


@pytest.mark.parametrize("seed", [0, 1])
def test_both_ends_of_a_known_spectrum(seed: int) -> None:
    values = np.concatenate([np.linspace(-1, 1, 197), [-4.0, 9.0, 25.0]])
    h_NxN = matrix(values)
    found = extreme_eigenvalues(product(h_NxN), np.zeros(200), seed=seed, tolerance=1e-8, vectors=True)
    assert found.largest == pytest.approx(25.0, abs=1e-5)
    assert found.smallest == pytest.approx(-4.0, abs=1e-5)
    assert found.converged
    assert not found.exact
    assert found.vectors is not None
    for vector, value in zip(found.vectors, (25.0, -4.0), strict=True):
        np.testing.assert_allclose(h_NxN @ vector, value * vector, atol=1e-4)
        assert np.linalg.norm(vector) == pytest.approx(1.0)


def test_errors_hold_before_it_has_converged() -> None:
    values = np.sort(np.random.default_rng(5).standard_normal(120))
    for most in (3, 6, 12):
        found = extreme_eigenvalues(product(matrix(values)), np.zeros(120), tolerance=1e-12, most=most)
        assert (found.products, found.converged) == (most, False)
        assert np.abs(values - found.largest).min() <= found.largest_error
        assert np.abs(values - found.smallest).min() <= found.smallest_error
        assert values[0] <= found.smallest <= found.largest <= values[-1]


def test_the_residual_of_a_vector_is_the_error() -> None:
    h_NxN = matrix(np.random.default_rng(6).standard_normal(80))
    found = extreme_eigenvalues(product(h_NxN), np.zeros(80), tolerance=1e-12, most=7, vectors=True)
    assert found.vectors is not None
    for vector, value, error in zip(found.vectors, found[:2], found[2:4], strict=True):
        assert np.linalg.norm(h_NxN @ vector - value * vector) == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "products"),
    [
        ([2.0] * 20 + [-3.0] * 20, 2),  # two values, many times each
        ([5.0] * 40, 1),
        ([0.0] * 40, 1),
        ([1.0, -2.0, 7.0], 3),  # no more vectors
    ],
)
def test_a_space_that_the_matrix_keeps_ends_it_with_exact_values(values: list[float], products: int) -> None:
    found = extreme_eigenvalues(product(matrix(values)), np.zeros(len(values)), tolerance=1e-12)
    assert (found.largest, found.smallest) == pytest.approx((max(values), min(values)), abs=1e-5)
    assert (found.products, found.exact, found.converged) == (products, True, True)


def test_trees_are_what_they_are_flattened_to() -> None:
    """A diagonal matrix over a tree of arrays of several shapes."""
    like = {"a": jnp.zeros(3), "b": [jnp.zeros((2, 4)), jnp.zeros(())]}
    size = {"a": jnp.arange(3.0), "b": [jnp.full((2, 4), -7.0), jnp.array(11.0)]}
    found = extreme_eigenvalues(lambda v: jax.tree.map(jnp.multiply, size, v), like, tolerance=1e-6, vectors=True)
    assert (found.largest, found.smallest) == pytest.approx((11.0, -7.0), abs=1e-5)
    assert found.vectors is not None
    assert abs(float(found.vectors[0]["b"][1])) == pytest.approx(1.0, abs=1e-5)
    assert np.linalg.norm(found.vectors[1]["b"][0]) == pytest.approx(1.0, abs=1e-5)
    assert found.vectors[0]["b"][0].shape == (2, 4)


def test_vectors_stay_orthogonal_long_after_a_value_has_been_found() -> None:
    """Rounding brings values back that lie apart, and then a sum of the vectors has no unit norm."""
    h_NxN = matrix(np.concatenate([[100.0, 50.0, 20.0, 10.0], np.linspace(-1, 0, 200)]))
    found = extreme_eigenvalues(product(h_NxN), np.zeros(204), tolerance=1e-16, most=60, vectors=True)
    assert found.products == 60
    assert found.vectors is not None
    for vector, value in zip(found.vectors, (100.0, -1.0), strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-9)
        np.testing.assert_allclose(h_NxN @ vector, value * vector, atol=1e-3)


def test_what_cannot_be_found_is_said() -> None:
    with pytest.raises(UserError, match="not finite"):
        extreme_eigenvalues(lambda v: v * np.nan, np.zeros(3))
    with pytest.raises(UserError, match="most=0"):
        extreme_eigenvalues(lambda v: v, np.zeros(3), most=0)


@pytest.fixture(scope="module")
def gpt2() -> tuple[Loss, Iterate, Any]:
    """A tiny one with attention and an MLP, three batches of which one counts for less; L as one function."""
    model = models.build(
        {"name": "gpt2"} | arguments("3k", vocab_size=5, context=4) | dict(d_model=4), models.Compute(attention="xla")
    )
    params, stats = jax.device_get(jax.jit(model.init)(0))
    rng = np.random.default_rng(2)  # away from where it is drawn, which is nearly flat
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype("f4"), params)
    batch_E = dict(
        tokens=np.random.default_rng(0).integers(0, 5, (3, 2, 5)).astype(np.int32),
        weight=np.ones((3, 2, 4), np.float32) * np.array([1, 1, 0.25], np.float32)[:, None, None],
    )

    def sums(params: Any, stats: Any, batch: Any) -> Any:
        found, _ = model.loss(params, stats, batch, train=False)
        return found.loss, found.count

    def whole(params: Any) -> jax.Array:
        loss_E, count_E = jax.vmap(lambda batch: sums(params, stats, batch))(batch_E)
        return loss_E.sum() / count_E.sum()

    return Loss(sums, batch_E), Iterate(params, stats), whole


def test_products_are_those_of_the_dense_hessian_of_a_real_model(gpt2: tuple[Loss, Iterate, Any]) -> None:
    loss, at, whole = gpt2
    flat_N, unravel = ravel_pytree(at.params)
    h_NxN = np.asarray(jax.jit(jax.hessian(lambda w_N: whole(unravel(w_N))))(flat_N), float)
    assert 100 < len(flat_N) < 600
    multiply = loss.product(at)
    v_KxN = np.random.default_rng(1).standard_normal((3, len(flat_N))).astype(np.float32)
    for v_N in v_KxN:
        np.testing.assert_allclose(ravel_pytree(multiply(unravel(v_N)))[0], h_NxN @ v_N, atol=2e-4)
    values = np.linalg.eigvalsh((h_NxN + h_NxN.T) / 2)
    assert values[0] < -0.01  # a real one bends both ways
    found = extreme_eigenvalues(multiply, at.params, tolerance=1e-5)
    assert (found.smallest, found.largest) == pytest.approx((values[0], values[-1]), abs=1e-3 * values[-1])


def test_gaps_of_a_real_model_are_the_curvature_between_its_iterates(gpt2: tuple[Loss, Iterate, Any]) -> None:
    """The gaps of a pair add up to -<d, (g_t - g_s)>, which is -<d, H d> half-way, to O(|d|^4)."""
    loss, at, _ = gpt2
    gradient = loss.gradient(at).params
    ends = [moved(at, gradient, -0.005), moved(at, gradient, 0.005)]
    path = measure_path(loss, ends.__getitem__, 2)
    d = jax.tree.map(np.subtract, ends[0].params, ends[1].params)
    bent = inner(d, jax.device_get(loss.product(at)(d)))
    assert abs(bent) > 3e-4
    assert path.gap_PxP[0, 1] + path.gap_PxP[1, 0] == pytest.approx(-bent, rel=0.02, abs=2e-6)
    assert path.gap_PxP[0, 1] == pytest.approx(-bent / 2, rel=0.2)
    assert path.loss_P[0] < path.loss_P[1]
