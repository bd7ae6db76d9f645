"""GPT-2: published sizes, causality, and the numbers of `transformers` given the same weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cdl.errors import UserError
from cdl.models import build, gpt2

SMALL = dict(vocab_size=61, context=24, n_layer=3, n_head=4, d_model=32)


def test_sizes_are_the_published_ones_and_what_their_names_say() -> None:
    published = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1.5B": 1_557_611_200}
    unit = {"k": 1e3, "M": 1e6, "B": 1e9}
    for size in gpt2.SIZES:
        vocabulary = (256, 64) if size[-1] == "k" else (50257, 1024)
        n_params = build.build({"name": "gpt2", **gpt2.arguments(size, *vocabulary)}).n_params
        assert n_params == pytest.approx(float(size[:-1]) * unit[size[-1]], rel=0.2)
        assert n_params == published.get(size, n_params)


def test_no_position_sees_a_later_token() -> None:
    model = gpt2.GPT2(**SMALL, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 61)
    changed = tokens.at[:, 11].set((tokens[:, 11] + 1) % 61)
    difference = np.abs(model(tokens) - model(changed)).max(axis=(0, 2))
    assert np.all(difference[:11] == 0)
    assert np.all(difference[11:] > 0)


def test_initial_loss_is_that_of_guessing() -> None:
    model = build.build({"name": "gpt2", **SMALL})
    tokens = jax.random.randint(jax.random.key(2), (8, 25), 0, 61)
    assert float(model.loss(model.init(0), tokens)) == pytest.approx(np.log(61), abs=0.05)


def test_initial_weights_have_their_spread() -> None:
    params = build.build({"name": "gpt2"} | SMALL | dict(d_model=128)).init(3)
    block = params["blocks"][0]
    assert np.std(block["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(block["mlp"]["down"]["kernel"]) == pytest.approx(0.02 / np.sqrt(6), rel=0.05)
    assert np.std(block["attention"]["out"]["kernel"]) == pytest.approx(0.02 / np.sqrt(6), rel=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(n_head=5), "model.d_model=32 must be a multiple of model.n_head=5"),
        (dict(n_layer=0), "model.n_layer=0"),
        (dict(d_modle=3), "'d_modle'; did you mean 'd_model'"),
        (dict(name="gtp2"), "no model 'gtp2'; did you mean 'gpt2'"),
    ],
)
def test_bad_sections_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        build.build({"name": "gpt2"} | SMALL | change)
    assert said in str(e.value)


def to_torch(params: Any) -> dict[str, Any]:
    """Our parameters under the names of `transformers.GPT2LMHeadModel`."""
    import torch

    def tensor(x: Any) -> Any:
        return torch.tensor(np.array(x))

    state = {
        "transformer.wte.weight": tensor(params["token"]["embedding"]),
        "lm_head.weight": tensor(params["token"]["embedding"]),
        "transformer.wpe.weight": tensor(params["position"]["embedding"]),
    }
    pairs = [("transformer.ln_f", params["norm"])]
    for i, block in params["blocks"].items():
        h = f"transformer.h.{i}"
        pairs += [
            (f"{h}.ln_1", block["norm_1"]),
            (f"{h}.attn.c_attn", block["attention"]["qkv"]),
            (f"{h}.attn.c_proj", block["attention"]["out"]),
            (f"{h}.ln_2", block["norm_2"]),
            (f"{h}.mlp.c_fc", block["mlp"]["up"]),
            (f"{h}.mlp.c_proj", block["mlp"]["down"]),
        ]
    for name, leaf in pairs:
        state[f"{name}.weight"] = tensor(leaf["kernel"] if "kernel" in leaf else leaf["scale"])
        state[f"{name}.bias"] = tensor(leaf["bias"])
    return state


@pytest.mark.filterwarnings("ignore")  # of torch's and transformers' own making
def test_loss_and_gradients_equal_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = build.build({"name": "gpt2", **SMALL})
    # Larger weights than at the start, and non-zero biases, so that every part shows.
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), model.init(0))
    tokens = np.random.default_rng(0).integers(0, 61, (4, 25))
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61, n_positions=24, n_layer=3, n_head=4, n_embd=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(to_torch(params), strict=False)
    assert not unexpected
    assert all("attn.bias" in m or "masked_bias" in m for m in missing)
    logits = theirs(torch.tensor(tokens[:, :-1])).logits
    target = torch.tensor(tokens[:, 1:])
    their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    their_loss.backward()
    loss, grads = jax.value_and_grad(model.loss)(params, jnp.asarray(tokens))
    assert float(loss) == pytest.approx(their_loss.item(), abs=1e-5)
    got = to_torch(grads)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(got[name], parameter.grad, atol=1e-5, err_msg=name)
