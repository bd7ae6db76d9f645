"""Muon-NSGD against the polynomial on singular values in float64, a per-layer loop, and optax's Muon."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from cdl.optim.muon_nsgd import Rule, muon_nsgd, newton_schulz, scale_by_muon_nsgd, tensor_ranks
from cdl.sharding import ShardingRule


def tree(seed: int, layers: int | None = None) -> dict[str, Any]:
    """Parameters (or gradients) of two linear layers and a norm, stacked over `layers` if given."""
    lead = () if layers is None else (layers,)
    shapes = {
        "up": {"kernel": (*lead, 8, 24), "bias": (*lead, 24)},
        "down": {"kernel": (*lead, 24, 8), "bias": (*lead, 8)},
        "norm": {"scale": (*lead, 8)},
        "token": {"embedding": (*lead, 40, 8)},
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("shape", [(12, 12), (10, 40), (40, 10), (3, 16, 6)])
def test_newton_schulz_acts_on_singular_values_alone(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s[..., None, :]) @ vt
    np.testing.assert_allclose(newton_schulz(jnp.asarray(x, jnp.float32)), expected, atol=2e-5)


def test_singular_values_of_an_update_are_near_one() -> None:
    g = tree(0)
    u, _ = scale_by_muon_nsgd().update(g, scale_by_muon_nsgd().init(g))
    for path in ("up", "down"):
        s = np.linalg.svd(u[path]["kernel"], compute_uv=False)
        assert 0.65 < s.min()
        assert s.max() < 1.2


def test_directions_equal_those_of_optax_muon() -> None:
    """optax averages momentum, ours adds it up: the same direction, and Newton-Schulz drops the scale."""
    params = {"kernel": jnp.zeros((16, 20))}
    ours = scale_by_muon_nsgd(momentum=0.9)
    theirs = optax.contrib.scale_by_muon(
        beta=0.9, nesterov=False, weight_dimension_numbers={"kernel": optax.contrib.MuonDimensionNumbers()}
    )
    state, their_state = ours.init(params), theirs.init(params)
    for seed in range(4):
        g = {"kernel": jax.random.normal(jax.random.key(seed), (16, 20))}
        u, state = ours.update(g, state)
        v, their_state = theirs.update(g, their_state, params)
        np.testing.assert_allclose(u["kernel"], v["kernel"], atol=1e-4)


def test_stacked_layers_equal_a_loop_over_layers() -> None:
    layers, params = 3, tree(1, layers=3)
    optimizer = muon_nsgd(0.1)
    state = optimizer.init(params)
    take = lambda t, i: jax.tree.map(lambda x: x[i], t)  # noqa: E731
    states = [optimizer.init(take(params, i)) for i in range(layers)]
    for seed in range(3):
        g = tree(10 + seed, layers)
        u, state = optimizer.update(g, state, params)
        for i in range(layers):
            v, states[i] = optimizer.update(take(g, i), states[i], take(params, i))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), take(u, i), v)


def test_nsgd_update_has_norm_eta() -> None:
    eta, params = 0.037, tree(2)
    optimizer = muon_nsgd(eta)
    state = optimizer.init(params)
    for seed in range(3):
        u, state = optimizer.update(tree(20 + seed), state, params)
        for leaf in (u["up"]["bias"], u["down"]["bias"], u["norm"]["scale"]):
            assert np.linalg.norm(np.float64(leaf)) == pytest.approx(eta, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_the_scale_of_the_gradient_does_not_matter(scale: float) -> None:
    optimizer = scale_by_muon_nsgd()
    g = tree(3)
    u, _ = optimizer.update(g, optimizer.init(g))
    v, _ = optimizer.update(jax.tree.map(lambda x: scale * x, g), optimizer.init(g))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), u, v)


def test_a_zero_gradient_moves_nothing() -> None:
    g = jax.tree.map(jnp.zeros_like, tree(4))
    u, _ = scale_by_muon_nsgd().update(g, scale_by_muon_nsgd().init(g))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(u))


def test_weight_decay_is_decoupled_and_for_matrices_alone() -> None:
    params, g = tree(5), tree(6)
    plain, decayed = muon_nsgd(0.1, weight_decay=0.0), muon_nsgd(0.1, weight_decay=0.3)
    u, _ = plain.update(g, plain.init(params), params)
    v, _ = decayed.update(g, decayed.init(params), params)
    difference = jax.tree.map(lambda a, b: a - b, v, u)
    np.testing.assert_allclose(difference["up"]["kernel"], -0.1 * 0.3 * params["up"]["kernel"], atol=1e-6)
    assert np.all(difference["up"]["bias"] == 0)


def test_ratio_scales_the_vectors_alone() -> None:
    g = tree(7)
    one, half = scale_by_muon_nsgd(), scale_by_muon_nsgd(nsgd_ratio=0.5)
    u, v = one.update(g, one.init(g))[0], half.update(g, half.init(g))[0]
    np.testing.assert_allclose(v["norm"]["scale"], 0.5 * u["norm"]["scale"])
    np.testing.assert_array_equal(v["up"]["kernel"], u["up"]["kernel"])


def test_a_leaf_that_no_rule_names_raises() -> None:
    with pytest.raises(ValueError, match="no rule says whether parameter 'head/weights'"):
        muon_nsgd(0.1).init({"head": {"weights": jnp.zeros((4, 4))}})
    with pytest.raises(ValueError, match=r"'head/kernel' \(4,\) has fewer axes than the 2"):
        muon_nsgd(0.1).init({"head": {"kernel": jnp.zeros(4)}})
    assert tensor_ranks({"w": jnp.zeros((2, 3))}, [Rule("w", 2)]) == {"w": 2}


def test_filters_of_a_convolution_are_normalised_as_one_tensor() -> None:
    g = {"conv": {"kernel": jax.random.normal(jax.random.key(0), (2, 3, 3, 4, 5))}}  # two of them, stacked
    u, _ = scale_by_muon_nsgd().update(g, scale_by_muon_nsgd().init(g))
    np.testing.assert_allclose(np.sqrt((np.float64(u["conv"]["kernel"]) ** 2).sum((1, 2, 3, 4))), 1, rtol=1e-6)


SHARDING = (
    ShardingRule(r"up/kernel$", ("fsdp", "tensor")),
    ShardingRule(r"down/kernel$", ("tensor", "fsdp")),
    ShardingRule(r"embedding$", ("tensor", "fsdp")),
)


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [(5, (1, 2, 2)), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, (2, 2, 2)), (3, (1, 8, 1))))],
)
def test_an_update_is_the_same_on_a_mesh(layers: int, sizes: tuple[int, int, int]) -> None:
    """Many matrices are dealt out whole, few by columns; neither changes a direction."""
    g = tree(9, layers)
    alone = scale_by_muon_nsgd()
    expected, _ = alone.update(g, alone.init(g))
    devices = np.asarray(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    spread = scale_by_muon_nsgd(sharding=SHARDING)
    with jax.set_mesh(mesh):
        got, _ = jax.jit(lambda g: spread.update(g, spread.init(g)))(g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_a_small_matrix_and_a_tall_embedding_keep_their_kind() -> None:
    """Kinds go by path: neither a stacked bias nor a vocabulary of any size changes optimizer."""
    assert tensor_ranks({"bias": jnp.zeros((12, 64)), "embedding": jnp.zeros((50257, 8))}) == {
        "bias": 1,
        "embedding": 2,
    }


def test_second_call_compiles_nothing_and_keeps_the_state() -> None:
    params = tree(8)
    optimizer = muon_nsgd(0.1)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for seed in range(3):
        _, new = update(tree(30 + seed), state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        state = new
    assert update._cache_size() == 1


def test_momentum_out_of_range_raises() -> None:
    with pytest.raises(ValueError, match=r"momentum=1.0"):
        scale_by_muon_nsgd(momentum=1.0)
