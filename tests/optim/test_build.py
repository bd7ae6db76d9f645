"""Optimizers from config sections: the injected rate, and bad sections."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdl.errors import UserError
from cdl.optim.build import OPTIMIZERS, build, optimizer_arguments

PARAMS = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}


def run(optimizer: Any, rates: list[float], inject: bool) -> Any:
    params, state = PARAMS, optimizer.init(PARAMS)
    for k, eta in enumerate(rates):
        g = jax.tree.map(lambda x, k=k: jax.random.normal(jax.random.key(k), x.shape), PARAMS)
        if inject:
            state = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(eta))
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_injected_rate_equals_a_schedule(name: str) -> None:
    rates = [0.1, 0.03, 0.2]
    section = {"name": name} | optimizer_arguments(name)
    injected = run(build(section), rates, inject=True)
    scheduled = run(OPTIMIZERS[name](lambda count: jnp.asarray(rates)[count]), rates, inject=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), injected, scheduled)


def test_clipping_scales_large_gradients_and_no_others() -> None:
    """SGD at rate 1 moves by the gradient; clipped, by the gradient over its norm times the limit."""
    g = {"kernel": jnp.full((4, 6), 3.0), "bias": jnp.full(6, 4.0)}
    norm = np.sqrt(24 * 9 + 6 * 16)
    for limit, factor in ((5.0, 5.0 / norm), (50.0, 1.0), (0.0, 1.0)):
        optimizer = build({"name": "sgd", "clip_norm": limit})
        state = optax.tree_utils.tree_set(optimizer.init(PARAMS), learning_rate=jnp.float32(1.0))
        updates, _ = optimizer.update(g, state, PARAMS)
        np.testing.assert_allclose(updates["bias"], -4.0 * factor, rtol=1e-6)


def test_weight_decay_spares_vectors() -> None:
    for name in OPTIMIZERS:
        with_decay = run(OPTIMIZERS[name](0.1, weight_decay=0.5), [0.1], inject=False)
        without = run(OPTIMIZERS[name](0.1, weight_decay=0.0), [0.1], inject=False)
        np.testing.assert_array_equal(with_decay["bias"], without["bias"])
        np.testing.assert_allclose(without["kernel"] - with_decay["kernel"], 0.1 * 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "muon"}, "no optimizer 'muon'; did you mean 'muon_nsgd'"),
        ({"name": "adamw", "momentum": 0.9}, "no argument of optimizer 'adamw' 'momentum'"),
        ({"name": "sgd", "momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"name": "adamw", "weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
    ],
)
def test_bad_sections_are_named(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        build(section)
    assert said in str(e.value)


PARTS = {"vision": {"kernel": jnp.ones((3, 4))}, "projector": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}


def updates_of(section: dict[str, Any]) -> Any:
    optimizer = build(section)
    state = optax.tree_utils.tree_set(optimizer.init(PARTS), learning_rate=0.1)
    grads = jax.tree.map(lambda x: x * jnp.arange(1.0, 1.0 + x.size).reshape(x.shape), PARTS)
    return optimizer.update(grads, state, PARTS)[0]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_parts_of_a_model_have_their_own_rates(name: str) -> None:
    """Weight decay, which the rate multiplies, among it."""
    section = dict(name=name, weight_decay=0.3)
    plain, scaled = updates_of(section), updates_of(section | dict(rates="projector:100, projector/bias:0.5"))
    factors = {"vision": {"kernel": 1.0}, "projector": {"kernel": 100.0, "bias": 0.5}}  # the longest beginning counts
    expected = jax.tree.map(lambda x, factor: x * factor, plain, factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled, expected)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ("project:10", "no parameter's path begins with 'project'; the model has projector, vision"),
        ("projector", "'projector' must be a path and its factor once, as projector:100"),
        ("projector:ten", "must be a path and its factor"),
        ("vision:-1", "must be a path and its factor"),
        ("vision:1, vision:2", "'vision:2' must be a path and its factor once"),
    ],
)
def test_rates_of_parts_that_make_no_sense(rates: str, said: str) -> None:
    def use() -> None:
        build(dict(name="sgd", rates=rates)).init(PARTS)

    with pytest.raises(UserError) as caught:
        use()
    assert said in str(caught.value)
