"""How models are computed: the scan, rematerialisation and bfloat16 change neither losses nor gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError
from cdl.models import build
from cdl.models.resnet import DEPTHS
from cdl.models.transformer import REMAT, Block, Stack, _causal_in_blocks, _does_not_compile
from tests.models.programs import compiled, products

SECTIONS = {
    "gpt2": dict(name="gpt2", vocab_size=61, context=24, n_layer=3, n_head=4, d_model=32),
    "vit": dict(name="vit", image_size=8, patch=2, classes=10, n_layer=3, n_head=4, d_model=32),
    "resnet": dict(name="resnet", depth=18, stem="cifar", classes=10, width=4),
}
IMAGES = {"image": np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32), "label": np.arange(4)}


@pytest.fixture(autouse=True)
def _short_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEPTHS, 18, ((2, 1), False))


def batch_of(name: str) -> Any:
    return jax.random.randint(jax.random.key(1), (4, 25), 0, 61) if name == "gpt2" else IMAGES


def test_scan_is_a_loop_over_the_layers() -> None:
    sizes = dict(causal=True, tanh=True, epsilon=1e-5, dtype=jnp.float32, attention="xla", length=8)
    block = partial(Block, 16, 2, 4, **sizes)
    stack = nnx.eval_shape(lambda: Stack(block, 4, remat="none", rngs=nnx.Rngs(0)))
    graphdef, shapes_L = nnx.split(stack.layers)
    rng = np.random.default_rng(0)
    params_L = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes_L)
    stack_graphdef = nnx.split(stack)[0]
    x_BSxD = jax.random.normal(jax.random.key(1), (2 * 8, 16))

    def scanned(params_L: Any) -> jax.Array:
        return nnx.merge(stack_graphdef, {"layers": params_L})(x_BSxD, 2)

    def looped(params_L: Any) -> jax.Array:
        x = x_BSxD
        for i in range(4):
            x = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], params_L))(x, 2)
        return x

    results = [compiled(jax.value_and_grad(lambda p, f=f: (f(p) ** 2).mean()))(params_L) for f in (scanned, looped)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("resnet", marks=pytest.mark.slow)])  # ViT's stack is GPT-2's
def test_remat_keeps_less_for_the_same_loss_gradients_and_statistics(name: str) -> None:
    kept, results = {}, {}
    for remat in REMAT:
        model = build.build(SECTIONS[name], Compute(remat=remat))
        params, stats = compiled(model.init)(0)

        def loss(params: Any, stats: Any = stats, model: build.Model = model) -> Any:
            sums, after = model.loss(params, stats, batch_of(name))
            return sums.loss, after

        # What lies between the forward and the backward pass, parameters not counted.
        _, backward, _ = jax.eval_shape(lambda params: jax.vjp(loss, params, has_aux=True), params)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(backward)) - model.n_params
        results[remat] = compiled(jax.value_and_grad(loss, has_aux=True))(params)
    assert kept["full"] < 0.75 * kept["dots"] < 0.75**2 * kept["none"]
    for remat in ("dots", "full"):
        for a, b in zip(*map(jax.tree.leaves, (results["none"], results[remat])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SECTIONS)
def test_bfloat16_is_for_products_and_parameters_logits_and_losses_stay_float32(name: str) -> None:
    batch, losses = batch_of(name), {}
    for dtype in ("float32", "bfloat16"):
        section = SECTIONS[name] | dict(dtype=dtype)
        model = build.build(section)
        params, stats = compiled(model.init)(0)
        sums, after = compiled(model.loss)(params, stats, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, stats, sums, after))} == {jnp.dtype("float32")}
        losses[dtype] = float(sums.loss / sums.count)
        inputs = list(products(jax.make_jaxpr(model.loss)(params, stats, batch).jaxpr))
        wide = [pair for pair in inputs if pair != [jnp.bfloat16] * 2]
        if dtype == "bfloat16":
            assert len(wide) == (name != "gpt2"), wide  # the head of ViT and ResNet
            assert len(inputs) > 5
    # Numbers of 8 bits have relative errors up to 2^-9.
    assert 0 < abs(losses["float32"] - losses["bfloat16"]) < 2**-6 * losses["float32"]


@pytest.mark.parametrize("name", SECTIONS)
def test_logits_of_bfloat16_are_float32(name: str) -> None:
    arguments = build.model_arguments(name) | SECTIONS[name] | dict(dtype="bfloat16")
    del arguments["name"]
    inputs = batch_of(name)[:, :-1] if name == "gpt2" else batch_of(name)["image"]

    def logits() -> jax.Array:
        return build.MODELS[name].make(**arguments, compute=Compute(), rngs=nnx.Rngs(0))(inputs)

    assert jax.eval_shape(logits).dtype == jnp.float32


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (Compute(remat="ful"), "no compute.remat 'ful'; did you mean 'full'"),
        (Compute(attention="cuda"), "no compute.attention 'cuda'; did you mean 'cudnn'"),
    ],
)
def test_bad_compute_sections_are_named(compute: Compute, said: str) -> None:
    def loss() -> Any:
        model = build.build(SECTIONS["gpt2"], compute)
        return model.loss(*model.init(0), batch_of("gpt2"))

    with pytest.raises(UserError) as e:
        jax.eval_shape(loss)
    assert said in str(e.value)


def test_a_trial_of_attention_on_the_mesh_says_why_it_fails() -> None:
    """What cuDNN takes is asked so. The plain one compiles everywhere, and cuDNN's on no CPU."""
    assert _does_not_compile("xla", jnp.bfloat16, 16, 8, True) == ""
    assert "cudnn" in _does_not_compile("cudnn", jnp.bfloat16, 16, 8, True).lower()


@pytest.mark.parametrize(("S", "blocks"), [(12, 1), (250, 1), (256, 2), (384, 3), (512, 4)])
def test_attention_by_blocks_is_the_plain_one(S: int, blocks: int) -> None:
    q, k, v, ct = jax.random.normal(jax.random.key(0), (4, 2, S, 2, 8))
    plain = partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    results = []
    for attend in (_causal_in_blocks, plain):

        def both_ways(q: Any, k: Any, v: Any, ct: Any, attend: Any = attend) -> Any:
            y, back = jax.vjp(attend, q, k, v)
            return y, *back(ct)

        results.append(compiled(both_ways)(q, k, v, ct))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    dots = [e for e in jax.make_jaxpr(_causal_in_blocks)(q, k, v).jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(dots) == 2 * blocks
