"""Gaps, moduli and lines against what they are by hand, on functions that are known in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdl.errors import UserError
from cdl.probes.convexity import Path, measure_path, ray, segment
from cdl.probes.sample import Iterate, Loss

H_NxN = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, -1.0]])  # indefinite


def quadratic(params: dict[str, jax.Array]) -> jax.Array:
    w_N = jnp.concatenate([params["a"], params["b"].ravel()])
    return 0.5 * w_N @ jnp.asarray(H_NxN, jnp.float32) @ w_N + 7.0


def trees(w_PxN: np.ndarray) -> list[Iterate]:
    return [Iterate(dict(a=w[:1].astype(np.float32), b=w[1:].astype(np.float32).reshape(2, 1))) for w in w_PxN]


def on_line(w_P: list[float]) -> list[Iterate]:
    return [Iterate(np.array([w], np.float32)) for w in w_P]


def measured(function: object, iterates: list[Iterate]) -> Path:
    return measure_path(Loss.of(function), iterates.__getitem__, len(iterates))  # type: ignore[arg-type]


def well(w: jax.Array) -> jax.Array:
    """Two minima at -1 and 1; convex where |w| >= 1/sqrt(3)."""
    return 0.25 * ((w**2 - 1) ** 2).sum()


def test_gaps_of_a_quadratic_are_those_of_its_hessian() -> None:
    w_PxN = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32).astype(float)
    path = measured(quadratic, trees(w_PxN))
    d_PxPxN = w_PxN[:, None] - w_PxN[None]
    np.testing.assert_allclose(path.gap_PxP, -0.5 * np.einsum("tsi,ij,tsj->ts", d_PxPxN, H_NxN, d_PxPxN), atol=1e-5)
    np.testing.assert_allclose(path.distance_PxP, np.linalg.norm(d_PxPxN, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(path.norm_P, np.linalg.norm(w_PxN @ H_NxN, axis=1), rtol=1e-6)
    np.testing.assert_allclose(path.star_P(2), path.gap_PxP[:, 2])


def test_the_modulus_of_a_concave_direction_is_its_curvature() -> None:
    """gap = -1/2 d H d, so along an eigenvector of value -c it is c/2 |d|^2: rho = c for every pair."""
    values, vectors_NxN = np.linalg.eigh(H_NxN)
    path = measured(quadratic, trees(np.outer([0.3, 1.0, 0.1, 2.0], vectors_NxN[:, 0])))
    np.testing.assert_allclose(path.rho_P()[:-1], -values[0], rtol=1e-4)
    np.testing.assert_allclose(path.rho_P(both=True)[:-1], -values[0], rtol=1e-4)
    assert np.isnan(path.rho_P()[-1])
    convex = measured(quadratic, trees(np.outer([0.3, 1.0, 0.1, 2.0], vectors_NxN[:, 2])))
    assert convex.rho_P(slack=1e-6)[:-1].max() == 0.0
    assert convex.convex_from(1e-6) == 0


def test_the_double_well_is_convex_along_a_path_from_where_it_is() -> None:
    """From its top at 0 outwards: the loss at s is below the tangent at w where 3 w^2 + 2 w s + s^2 < 2."""
    w_P = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    path = measured(well, on_line(w_P))
    w_Px1, s_1xP = np.array(w_P)[:, None], np.array(w_P)[None]
    exact_PxP = -((w_Px1 - s_1xP) ** 2) * (3 * w_Px1**2 + 2 * w_Px1 * s_1xP + s_1xP**2 - 2) / 4
    np.testing.assert_allclose(path.gap_PxP, exact_PxP, atol=1e-6)
    bad = [(t, s) for t in range(6) for s in range(6) if t != s and exact_PxP[t, s] > 1e-6]
    assert path.convex_from(1e-6) == 1 + max(min(pair) for pair in bad) == 3
    # Towards the minimum at 1, with s = 1: 3 w^2 + 2 w - 1 >= 0 from w = 1/3 on.
    assert path.star_from(1e-6) == 2
    assert path.lowest == 5
    pairs = [path.gap_PxP[t, s] <= 1e-6 for t in range(2, 6) for s in range(2, 6) if t != s]
    assert path.share_P(1e-6)[2] == pytest.approx(np.mean(pairs))
    assert 0 < path.share_P(1e-6)[0] < path.share_P(1e-6)[2] < path.share_P(1e-6)[3] == 1.0


def test_the_first_convex_iterate_depends_on_what_comes_after_it_alone() -> None:
    gap_PxP = np.zeros((5, 5))
    gap_PxP[3, 1] = 1.0  # one bad pair: a tangent late, a point early

    def path(gap_PxP: np.ndarray) -> Path:
        zero_P = np.zeros(5)
        return Path(zero_P, -gap_PxP, np.ones((5, 5)), zero_P, zero_P)

    assert path(gap_PxP).convex_from() == 2
    assert path(gap_PxP).convex_from(1.0) == 0
    assert path(gap_PxP.T).convex_from() == 2
    assert path(gap_PxP).rho_P().tolist()[:4] == [0, 0, 0, 0]  # no later point lies below an earlier tangent
    assert path(gap_PxP).rho_P(both=True).tolist()[:4] == [2, 2, 0, 0]
    assert path(gap_PxP.T).rho_P().tolist()[:4] == [0, 2, 0, 0]
    assert path(gap_PxP.T).rho_P(slack=0.5).tolist()[:4] == [0, 1, 0, 0]
    gap_PxP[3, 4] = 1.0
    assert path(gap_PxP).convex_from() is None
    assert path(gap_PxP).star_from() is None
    assert path(gap_PxP).star_from(s=1) == 4


def test_relative_gaps_do_not_depend_on_units() -> None:
    iterates = trees(np.random.default_rng(1).standard_normal((4, 3)))
    path, scaled = measured(quadratic, iterates), measured(lambda p: 1024.0 * quadratic(p), iterates)
    np.testing.assert_allclose(scaled.relative_PxP, path.relative_PxP, atol=1e-5)
    assert np.abs(path.relative_PxP).max() <= 1.0
    assert np.diag(path.relative_PxP).tolist() == [0.0] * 4


def test_batches_count_by_what_they_predict() -> None:
    """L(w) = sum_e c_e (w - x_e)^2 / sum_e c_e of two batches: 3 of 1, 1 of 5."""
    loss = Loss(
        lambda w, shift, b: (b["count"] * ((w - b["x"] - shift) ** 2).sum(), b["count"]),
        dict(x=np.array([1.0, 5.0], np.float32), count=np.array([3.0, 1.0], np.float32)),
    )
    at = Iterate(np.zeros(1, np.float32), np.float32(0))
    assert loss(at) == pytest.approx((3 * 1 + 25) / 4)
    gradient = loss.gradient(at)
    assert gradient.params[0] == pytest.approx(-2 * (3 * 1 + 5) / 4)
    assert gradient.norm2_E.tolist() == pytest.approx([4.0, 100.0])  # of each batch's own mean
    assert np.asarray(loss.product(at)(np.ones(1, np.float32)))[0] == pytest.approx(2.0)
    assert loss(at._replace(fixed=np.float32(-1))) == pytest.approx((3 * 0 + 16) / 4)
    path = measure_path(loss, [at, at._replace(params=np.full(1, 2, np.float32))].__getitem__, 2)
    assert path.mean_square_P.tolist() == pytest.approx([52.0, 20.0])
    assert path.G == pytest.approx(52**0.5)


def test_what_all_iterates_share_is_given_to_programs_and_is_no_part_of_them() -> None:
    seen = []

    def sums(w: jax.Array, fixed: Any, batch: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen.append(isinstance(target, jax.core.Tracer))
        return ((w - target) ** 2).sum() * batch.size, jnp.ones(()) * batch.size

    loss = Loss(sums, np.zeros((2, 6, 1), np.float32), np.arange(3, dtype=np.float32))
    divided = loss.divided()
    assert divided is not None
    for which in (loss, divided):
        at = Iterate(np.ones(3, np.float32))
        assert which(at) == pytest.approx(2.0)
        assert which.gradient(at).params.tolist() == pytest.approx([2.0, 0.0, -2.0])
        assert np.asarray(which.product(at)(np.ones(3, np.float32))).tolist() == pytest.approx([2.0] * 3)
    assert len(divided.gradient(at).norm2_E) == 2 * 2
    assert seen
    assert all(seen)
    assert Loss(sums, np.zeros((2, 1, 6), np.float32), np.zeros(3)).divided() is None


def test_small_gaps_between_far_iterates_are_not_lost_in_rounding() -> None:
    """Iterates at 1000 that differ by 0.01: <w_t, g> - <w_s, g> in float32 would be off by 1e-1, the gap is 5e-5."""
    w_PxN = 1000.0 + np.array([[0.0] * 3, [0.01] * 3])
    w_PxN = w_PxN.astype(np.float32).astype(float)
    path = measured(lambda w: 0.5 * ((w - 999.0) ** 2).sum(), [Iterate(w.astype(np.float32)) for w in w_PxN])
    exact = -0.5 * ((w_PxN[0] - w_PxN[1]) ** 2).sum()
    assert path.gap_PxP[0, 1] == pytest.approx(exact, rel=0.02)


def test_a_segment_and_its_second_differences() -> None:
    start, end = on_line([0.0, 1.0])
    line = segment(Loss.of(well), start, end, points=11)
    at_N = np.linspace(0, 1, 11)
    np.testing.assert_allclose(line.loss_N, 0.25 * (at_N**2 - 1) ** 2, atol=1e-6)
    assert line.length == pytest.approx(1.0)
    assert line.bend == pytest.approx(np.diff(0.25 * (at_N**2 - 1) ** 2, 2).min(), abs=1e-6)
    assert line.curvature == pytest.approx(-0.96, abs=0.02)  # 3 w^2 - 1 near the top
    both = [Iterate(x.params, x.params) for x in (start, end)]
    moved = segment(Loss(lambda w, shift, b: ((w - shift).sum(), jnp.ones(())), np.zeros(1)), *both)
    np.testing.assert_allclose(moved.loss_N, 0.0, atol=1e-6)  # what is fixed goes along


def test_a_ray_goes_down_the_gradient() -> None:
    at, loss = on_line([3.0])[0], Loss.of(lambda w: 0.5 * (w**2).sum())
    line = ray(loss, at, loss.gradient(at).params, reach=2.0, points=9)
    np.testing.assert_allclose(line.loss_N, 0.5 * (3 - 3 * np.linspace(0, 2, 9)) ** 2, atol=1e-5)
    assert line.length == pytest.approx(3.0)
    assert line.curvature == pytest.approx(1.0, rel=1e-4)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UserError, match="at least 2"):
        measured(well, on_line([0.0]))
    with pytest.raises(UserError, match="not finite"):
        measured(lambda w: jnp.log(w).sum(), on_line([1.0, -1.0]))
    with pytest.raises(UserError, match="at least 3"):
        segment(Loss.of(well), *on_line([0.0, 1.0]), points=2)
