"""Llama against `transformers` given the same weights, and what it is without: causal, relative, the same however it is
computed."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from cdl.compute import Compute
from cdl.errors import UserError
from cdl.models import build, llama
from cdl.models.pretrained import load, read_section, save
from cdl.models.transformer import REMAT, attend
from cdl.optim import build as optimizers
from cdl.sharding import AXES, make_mesh
from cdl.train.step import Program
from tests.models.programs import compiled, products

SMALL: dict[str, Any] = dict(
    vocab_size=61,
    context=24,
    n_layer=3,
    n_head=6,
    n_kv_head=2,
    d_model=48,
    d_ff=80,
    theta=1000.0,
    tied=True,
    dtype="float32",
)
SECTION = {"name": "llama", **SMALL}
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 25))


def theirs(heads: int = 6, groups: int = 2, tied: bool = True) -> Any:
    """LlamaForCausalLM with every parameter away from where it starts."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=24,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=1000.0),
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.2 * torch.randn(tensor.shape)
    return model.eval()


def assert_same_tree(got: Any, expected: Any, **tolerance: float) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("heads", "groups", "tied"), [(6, 2, True), (6, 1, False), (4, 4, True)])
def test_logits_loss_and_gradients_are_those_of_transformers(
    heads: int, groups: int, tied: bool, tmp_path: Path
) -> None:
    model = theirs(heads, groups, tied)
    torch = pytest.importorskip("torch")
    model.save_pretrained(tmp_path / "weights")
    section = read_section(tmp_path / "weights")
    assert section == SECTION | dict(n_head=heads, n_kv_head=groups, tied=tied)
    params, stats = load(section, tmp_path / "weights")
    their_logits = model(torch.tensor(TOKENS[:, :-1])).logits
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), torch.tensor(TOKENS[:, 1:]).flatten())
    their_loss.backward()
    with torch.no_grad():  # saved and loaded as if they were weights
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")

    graphdef = nnx.split(made(**{k: v for k, v in section.items() if k != "name"}), nnx.Param)[0]

    def mean(params: Any) -> Any:
        sums, _ = build.build(section).loss(params, stats, jnp.asarray(TOKENS))
        return sums.loss / sums.count, nnx.merge(graphdef, params)(TOKENS[:, :-1])

    (loss, logits), grads = compiled(jax.value_and_grad(mean, has_aux=True))(params)
    np.testing.assert_allclose(logits, their_logits.detach(), atol=1e-4)
    assert loss == pytest.approx(their_loss.item(), abs=1e-5)
    assert_same_tree(grads, load(section, tmp_path / "gradients")[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_what_we_save_transformers_loads(tied: bool, tmp_path: Path) -> None:
    model = theirs(tied=tied)
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model.save_pretrained(tmp_path / "theirs")
    section = read_section(tmp_path / "theirs")
    save(section, *load(section, tmp_path / "theirs"), tmp_path / "ours")
    again, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    names = [set(load_file(tmp_path / x / "model.safetensors")) for x in ("theirs", "ours")]
    assert names[0] == names[1]  # older versions are less lenient
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert again.config.rope_parameters == model.config.rope_parameters
    tokens = torch.tensor(TOKENS)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert read_section(tmp_path / "ours") == section


def made(compute: Compute = Compute(), **changes: Any) -> llama.Llama:  # noqa: B008
    return llama.Llama(**SMALL | changes, compute=compute, rngs=nnx.Rngs(0))


def test_sizes_are_the_published_ones_and_what_their_names_say() -> None:
    published = {"135M": 134_515_008, "360M": 361_821_120}
    for size in llama.SIZES:
        sizes = (49152, 8192) if size in published else ()
        n_params = build.build({"name": "llama", **llama.arguments(size, *sizes)}).n_params
        assert n_params == pytest.approx(float(size[:-1]) * {"k": 1e3, "M": 1e6}[size[-1]], rel=0.06)
        assert n_params == published.get(size, n_params)


def test_no_position_sees_a_later_one() -> None:
    """Through the gradient: logits at s depend on embeddings up to s, and on each of them."""
    x_BxSxD = jax.random.normal(jax.random.key(1), (1, 12, 48))
    decode = made().decode
    jacobian_SxSxD = compiled(jax.jacobian(lambda x: decode(x)[0].sum(axis=-1)))(x_BxSxD)[:, 0]
    depends = np.abs(jacobian_SxSxD).max(axis=-1) > 0
    np.testing.assert_array_equal(depends, np.tril(np.ones((12, 12), bool)))


def test_positions_are_relative_and_seen() -> None:
    """A query and a key that both move on by as much have the same product, and another when one of them does."""
    rotations_2xSxJ = llama._rotations(9, 8, 100.0)
    q_K, k_K = jax.random.normal(jax.random.key(2), (2, 8))
    q_SxK, k_SxK = (llama._rotated(jnp.broadcast_to(x, (1, 9, 1, 8)), rotations_2xSxJ)[0, :, 0] for x in (q_K, k_K))
    product_SxS = np.asarray(q_SxK @ k_SxK.T)
    for distance in range(-8, 9):
        diagonal = np.diagonal(product_SxS, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert len(np.unique(product_SxS[0].round(4))) == 9


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_by_blocks_takes_grouped_queries(groups: int) -> None:
    q = jax.random.normal(jax.random.key(0), (2, 256, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 256, groups, 8))
    plain, blocks = (
        compiled(jax.value_and_grad(lambda *x, how=how: (attend(how, *x, True) ** 2).sum(), (0, 1, 2)))(q, k, v)
        for how in ("xla", "blocks")
    )
    assert_same_tree(blocks, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_how_it_is_computed_changes_nothing() -> None:
    params, stats = compiled(build.build(SECTION).init)(0)
    results = []
    for compute in (*(Compute(remat=remat) for remat in REMAT), Compute(attention="xla")):
        model = build.build(SECTION, compute)
        results.append(compiled(jax.value_and_grad(lambda p, m=model: m.loss(p, stats, TOKENS)[0].loss))(params))
    for other in results[1:]:
        assert_same_tree(other, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_is_for_products_alone(tied: bool) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = build.build(SECTION | dict(dtype=dtype, tied=tied))
        params, stats = compiled(model.init)(0)
        sums, _ = compiled(model.loss)(params, stats, TOKENS)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, sums))} == {jnp.dtype("float32")}
        losses[dtype] = float(sums.loss / sums.count)
        if dtype == "bfloat16":
            inputs = list(products(jax.make_jaxpr(model.loss)(params, stats, TOKENS).jaxpr))
            assert len(inputs) > 8
            assert all(pair == [jnp.bfloat16] * 2 for pair in inputs)
    assert losses["float32"] == pytest.approx(np.log(61), abs=0.05)
    assert 0 < abs(losses["float32"] - losses["bfloat16"]) < 2**-6 * losses["float32"]


@pytest.mark.slow
def test_eight_devices_train_as_one() -> None:
    """And neither parameters nor optimizer state are copied along fsdp and tensor, but for norms."""
    model = build.build(SECTION | dict(vocab_size=64, n_head=4, d_model=32))
    tokens = np.random.default_rng(1).integers(0, 64, (3, 8, 17)).astype(np.int32)
    losses = []
    for sizes in ((1, 1, 1, 1), (1, 2, 2, 2)):
        program = Program(
            model,
            optimizers.build({"name": "muon_nsgd"}, model.rules),
            tokens[:1],
            lanes=1,
            mesh=make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()),
            block=3,
            prepare=lambda x: x,
        )
        program.fill({0: 0})
        losses.append(np.asarray(program.train(tokens[None], np.full((1, 3), 0.02), [3] * program.rows).loss))
        split = [x for x in jax.tree.leaves(program.state) if x.ndim > 2 and x.shape[-1] > 1]
        parts = {x.size // x.addressable_shards[0].data.size for x in split if x.shape[-2] > 3}
        assert parts == {int(np.prod(sizes[2:]))}
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(n_head=5), "model.d_model=48 must be a multiple of model.n_head=5"),
        (dict(n_kv_head=4), "model.n_head=6 must be a multiple of model.n_kv_head=4"),
        (dict(n_kv_head=0), "model.n_kv_head=0 must be at least 1"),
        (dict(d_model=18), "gives each of model.n_head=6 heads 3 dimensions"),
        (dict(theta=0.0), "model.theta=0.0 must be at least 1"),
        (dict(d_fff=3), "'d_fff'; did you mean 'd_ff'"),
    ],
)
def test_bad_sections_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        build.build(SECTION | change)
    assert said in str(e.value)
    with pytest.raises(UserError, match="no size of llama '361M'; did you mean '360M'"):
        llama.arguments("361M")
