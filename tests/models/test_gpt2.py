"""GPT-2: published sizes, causality, initial weights, and bad sections."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError
from cdl.models import build, gpt2
from tests.models.programs import compiled

SMALL: dict[str, Any] = dict(vocab_size=61, context=24, n_layer=3, n_head=4, d_model=32, dtype="float32")


def test_sizes_are_the_published_ones_and_what_their_names_say() -> None:
    published = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1.5B": 1_557_611_200}
    unit = {"k": 1e3, "M": 1e6, "B": 1e9}
    for size in gpt2.SIZES:
        vocabulary = (50257, 1024) if size in published or size[-1] == "B" else (256, 64)
        n_params = build.build({"name": "gpt2", **gpt2.arguments(size, *vocabulary)}).n_params
        assert n_params == pytest.approx(float(size[:-1]) * unit[size[-1]], rel=0.2)
        assert n_params == published.get(size, n_params)


def test_no_position_sees_a_later_token() -> None:
    model = compiled(lambda tokens: gpt2.GPT2(**SMALL, compute=Compute(), rngs=nnx.Rngs(0))(tokens))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 61)
    changed = tokens.at[:, 11].set((tokens[:, 11] + 1) % 61)
    difference = np.abs(model(tokens) - model(changed)).max(axis=(0, 2))
    assert np.all(difference[:11] == 0)
    assert np.all(difference[11:] > 0)


def test_initial_loss_is_that_of_guessing() -> None:
    model = build.build({"name": "gpt2", **SMALL})
    tokens = jax.random.randint(jax.random.key(2), (8, 25), 0, 61)
    sums, stats = compiled(lambda tokens: model.loss(*model.init(0), tokens))(tokens)
    assert float(sums.count) == 8 * 24
    assert float(sums.loss / sums.count) == pytest.approx(np.log(61), abs=0.05)
    assert stats == {}


def test_weights_say_which_predictions_count() -> None:
    model = build.build({"name": "gpt2", **SMALL})
    loss = compiled(lambda batch: model.loss(*model.init(0), batch))
    tokens = jax.random.randint(jax.random.key(2), (4, 25), 0, 61)
    weight = jnp.zeros((4, 24)).at[1:3].set(1)
    got, _ = loss({"tokens": tokens, "weight": weight})
    expected, _ = loss(tokens[1:3])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_initial_weights_have_their_spread_in_each_layer_and_differ_between_layers() -> None:
    model = build.build({"name": "gpt2"} | SMALL | dict(d_model=128))
    layers = compiled(model.init)(3)[0]["blocks"]["layers"]
    residual = 0.02 / np.sqrt(2 * 3)
    for path, std in {"attention qkv": 0.02, "attention out": residual, "mlp up": 0.02, "mlp down": residual}.items():
        part, dense = path.split()
        kernel_LxIxO = layers[part][dense]["kernel"]
        np.testing.assert_allclose(kernel_LxIxO.std(axis=(1, 2)), std, rtol=0.05)
        for a, b in ((0, 1), (0, 2), (1, 2)):  # as far apart as independent draws
            difference = np.std(kernel_LxIxO[a] - kernel_LxIxO[b])
            assert difference == pytest.approx(np.sqrt(2) * std, rel=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(n_head=5), "model.d_model=32 must be a multiple of model.n_head=5"),
        (dict(n_layer=0), "model.n_layer=0"),
        (dict(dtype="bfloat61"), "no model.dtype 'bfloat61'; did you mean 'bfloat16'"),
        (dict(d_modle=3), "'d_modle'; did you mean 'd_model'"),
        (dict(name="gtp2"), "no model 'gtp2'; did you mean 'gpt2'"),
    ],
)
def test_bad_sections_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        build.build({"name": "gpt2"} | SMALL | change)
    assert said in str(e.value)


def test_the_gradient_of_tokens_in_bfloat16_is_summed_in_float32() -> None:
    """Each of few tokens occurs some thousand times: summed in bfloat16, most of that would be rounded away."""
    tokens = jax.random.randint(jax.random.key(0), (512, 25), 0, 3)
    grads = {}
    for dtype in ("float32", "bfloat16"):
        model = build.build({"name": "gpt2", **SMALL, "dtype": dtype})
        params, stats = compiled(model.init)(0)
        grads[dtype] = compiled(jax.grad(lambda p, m=model, s=stats: m.loss(p, s, tokens)[0].loss))(params)
    exact, rounded = (np.asarray(g["token"]["embedding"]) for g in grads.values())
    assert np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact)
