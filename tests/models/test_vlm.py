"""The vision-language model against `transformers`' parts put together in torch; what each position and weight sees."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from cdl.compute import Compute
from cdl.errors import UserError
from cdl.models import build, vlm
from cdl.models.llama import Llama
from cdl.models.pretrained import load, read_section, save
from cdl.models.transformer import REMAT
from cdl.optim import build as optimizers
from cdl.sharding import AXES, make_mesh
from cdl.train.step import Program
from tests.models.programs import compiled
from tests.models.test_llama import assert_same_tree

B, M, S, V = 4, 2, 20, 61
SMALL: dict[str, Any] = dict(
    image_size=24,
    patch=6,
    vision_n_layer=1,
    vision_n_head=2,
    vision_d_model=16,
    shuffle=2,
    vocab_size=V,
    context=S,
    text_n_layer=2,
    text_n_head=4,
    text_n_kv_head=2,
    text_d_model=32,
    text_d_ff=48,
    text_theta=1000.0,
    text_tied=True,
    dtype="float32",
)
SECTION = {"name": "vlm", **SMALL}
I = 4  # tokens of an image


def batch_of(rows: int = B) -> dict[str, np.ndarray]:
    """Two images in a row, in the order of the second row the other way round; the last row has one; answers count."""
    rng = np.random.default_rng(0)
    slot_BxS = np.full((rows, S), -1, np.int32)
    slot_BxS[:, 2 : 2 + I] = np.arange(I)
    slot_BxS[:, 9 : 9 + I] = I + np.arange(I)
    slot_BxS[1, 2 : 2 + I], slot_BxS[1, 9 : 9 + I] = I + np.arange(I), np.arange(I)
    slot_BxS[-1, 9 : 9 + I] = -1
    weight_BxS = np.zeros((rows, S), np.float32)
    weight_BxS[:, 14:18] = 1
    return dict(
        image=rng.normal(size=(rows, M, 24, 24, 3)).astype(np.float32),
        tokens=rng.integers(0, V, (rows, S + 1)).astype(np.int32),
        slot=slot_BxS,
        weight=weight_BxS,
    )


BATCH = batch_of()


def forward_of(section: dict[str, Any], compute: Compute = Compute()) -> Any:  # noqa: B008
    """(parameters, batch) -> logits."""
    arguments = {k: v for k, v in section.items() if k != "name"}
    graphdef = nnx.split(nnx.eval_shape(lambda: vlm.VLM(**arguments, compute=compute, rngs=nnx.Rngs(0))))[0]
    return lambda p, b: nnx.merge(graphdef, p)(b["image"], b["tokens"][:, :-1], b["slot"])


@pytest.fixture(scope="module")
def params() -> Any:
    """Every number away from where it starts, so that every part shows."""
    shapes = jax.eval_shape(build.build(SECTION).init, 0)[0]
    rng = np.random.default_rng(1)
    spread = {"scale": 0.1, "bias": 0.1}
    return jax.tree_util.tree_map_with_path(
        lambda path, x: ((path[-1].key == "scale") + spread.get(path[-1].key, 0.2) * rng.normal(size=x.shape)).astype(
            np.float32
        ),
        shapes,
    )


forward = compiled(forward_of(SECTION))


def packed_by_loops(x: Any, factor: int) -> list[list[Any]]:
    """The tokens of one image, as lists of the patches of each, from patches in rows of a square: nanoVLM's order."""
    side = round(len(x) ** 0.5)
    return [
        [x[(top + i) * side + left + j] for i in range(factor) for j in range(factor)]
        for top in range(0, side, factor)
        for left in range(0, side, factor)
    ]


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 3), (4, 1), (4, 4)])
def test_pixel_shuffle_packs_squares_by_rows(side: int, factor: int) -> None:
    x_NxSxD = np.random.default_rng(2).normal(size=(2, side * side, 3)).astype(np.float32)
    expected = [[np.concatenate(token) for token in packed_by_loops(x_SxD, factor)] for x_SxD in x_NxSxD]
    np.testing.assert_array_equal(vlm._packed(jnp.asarray(x_NxSxD), factor), expected)


@pytest.mark.filterwarnings("ignore")
def test_logits_loss_and_gradients_are_those_of_parts_of_transformers(params: Any, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    save(SECTION, params, {}, tmp_path / "weights")
    vision = transformers.SiglipVisionModel.from_pretrained(tmp_path / "weights" / "vision")
    text = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "weights" / "text")
    projector = torch.nn.Linear(16 * 4, 32, bias=False)
    with torch.no_grad():
        projector.weight.copy_(torch.tensor(params["projector"]["kernel"].T))
    rows = []
    for image, tokens, slot in zip(BATCH["image"], BATCH["tokens"], BATCH["slot"], strict=True):
        patches = vision(torch.tensor(image).permute(0, 3, 1, 2)).last_hidden_state
        packed = [torch.cat(token) for one in patches for token in packed_by_loops(one, 2)]
        image_tokens = projector(torch.stack(packed))
        embedded = text.get_input_embeddings()(torch.tensor(tokens[:-1]))
        rows.append(torch.stack([embedded[s] if i < 0 else image_tokens[i] for s, i in enumerate(slot)]))
    their_logits = text(inputs_embeds=torch.stack(rows)).logits
    losses = torch.nn.functional.cross_entropy(
        their_logits.flatten(0, 1), torch.tensor(BATCH["tokens"][:, 1:], dtype=torch.long).flatten(), reduction="none"
    )
    weight = torch.tensor(BATCH["weight"]).flatten()
    their_loss = (losses * weight).sum() / weight.sum()
    their_loss.backward()
    with torch.no_grad():  # saved and loaded as if they were weights
        for part in (vision, text):
            for parameter in part.parameters():
                parameter.copy_(parameter.grad)
    vision.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    their_grads = load(SECTION, f"{tmp_path / 'vision'},{tmp_path / 'text'}")[0]
    their_grads["projector"]["kernel"] = projector.weight.grad.numpy().T

    def mean(params: Any) -> jax.Array:
        sums, _ = build.build(SECTION).loss(params, {}, BATCH)
        return sums.loss / sums.count

    loss, grads = compiled(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(forward(params, BATCH), their_logits.detach(), atol=1e-4)
    assert loss == pytest.approx(their_loss.item(), abs=1e-5)
    assert_same_tree(grads, their_grads, atol=1e-5)


def test_images_are_seen_from_their_slots_on_and_nowhere_else(params: Any) -> None:
    """The gradient of each position's logits reaches an image where one of its slots lies before, or there; and through
    it the vision model and the projector."""
    tokens, slot = jnp.asarray(BATCH["tokens"]), jnp.asarray(BATCH["slot"])

    def seen(image: jax.Array, s: jax.Array, params: Any) -> jax.Array:
        logits_BxSxV = forward_of(SECTION)(params, dict(image=image, tokens=tokens, slot=slot))
        return jax.nn.logsumexp(logits_BxSxV[:, s], axis=-1).sum()

    def at(s: jax.Array) -> Any:
        by_image, by_params = jax.grad(seen, (0, 2))(jnp.asarray(BATCH["image"]), s, params)
        parts = [by_params["projector"]["kernel"], by_params["vision"]["patch"]["kernel"]]
        return jnp.abs(by_image).max(axis=(2, 3, 4)), jnp.stack([jnp.abs(part).max() for part in parts])

    by_image_SxBxM, by_part_SxP = compiled(lambda: jax.lax.map(at, jnp.arange(S)))()
    slots_BxSx1 = BATCH["slot"][:, :, None]
    of_image_BxSxM = (slots_BxSx1 >= 0) & (slots_BxSx1 // I == np.arange(M))
    expected_SxBxM = np.moveaxis(np.maximum.accumulate(of_image_BxSxM, axis=1), 0, 1)
    np.testing.assert_array_equal(np.asarray(by_image_SxBxM) > 0, expected_SxBxM)
    for by_part_S in by_part_SxP.T:
        np.testing.assert_array_equal(by_part_S > 0, expected_SxBxM.any(axis=(1, 2)))


def test_a_row_without_images_is_the_language_model_alone(params: Any) -> None:
    nothing = BATCH | dict(slot=np.full((B, S), -1, np.int32))
    text = {k: v for k, v in vlm.parts(SECTION)["text"].items() if k != "name"}
    graphdef = nnx.split(Llama(**text, compute=Compute(), rngs=nnx.Rngs(0)))[0]
    alone = compiled(lambda p: nnx.merge(graphdef, p)(nothing["tokens"][:, :-1]))(params["text"])
    np.testing.assert_allclose(forward(params, nothing), alone, rtol=1e-5, atol=1e-5)


def test_the_token_behind_an_image_is_not_read_and_a_slot_beyond_the_images_shows(params: Any) -> None:
    logits = forward(params, BATCH)
    under = np.concatenate([BATCH["slot"] >= 0, np.zeros((B, 1), bool)], axis=1)
    np.testing.assert_array_equal(forward(params, BATCH | dict(tokens=np.where(under, 0, BATCH["tokens"]))), logits)
    beyond = BATCH["slot"].copy()
    beyond[0, 5] = M * I
    of_row_B = np.isnan(forward(params, BATCH | dict(slot=beyond))).any(axis=(1, 2))
    np.testing.assert_array_equal(of_row_B, [True, False, False, False])


def test_only_what_is_weighted_is_learned_and_padding_on_the_right_changes_nothing(params: Any) -> None:
    """Tokens after the last that counts may be any; so may targets that do not, and the sequence may end there."""
    loss = compiled(jax.value_and_grad(lambda p, b: build.build(SECTION).loss(p, {}, b)[0].loss))
    expected = loss(params, BATCH)
    other = BATCH["tokens"].copy()
    other[:, 19:] = (other[:, 19:] + 7) % V  # the last target that counts is token 18
    assert_same_tree(loss(params, BATCH | dict(tokens=other)), expected, rtol=1e-5, atol=1e-5)
    shorter = BATCH | dict(tokens=BATCH["tokens"][:, :19], slot=BATCH["slot"][:, :18], weight=BATCH["weight"][:, :18])
    assert_same_tree(loss(params, shorter), expected, rtol=1e-5, atol=1e-5)
    other[:, 18] = (other[:, 18] + 7) % V
    assert abs(loss(params, BATCH | dict(tokens=other))[0] - expected[0]) > 1e-3
    sums, _ = build.build(SECTION).loss(params, {}, BATCH)
    assert float(sums.count) == BATCH["weight"].sum()


@pytest.mark.slow
def test_how_it_is_computed_changes_nothing(params: Any) -> None:
    expected = forward(params, BATCH)
    for compute in (*(Compute(remat=remat) for remat in REMAT if remat != "none"), Compute(attention="xla")):
        np.testing.assert_allclose(compiled(forward_of(SECTION, compute))(params, BATCH), expected, atol=1e-4)
    rounded = compiled(forward_of(SECTION | dict(dtype="bfloat16")))(params, BATCH)
    assert rounded.dtype == jnp.float32
    assert 0 < np.linalg.norm(rounded - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.slow
def test_eight_devices_train_as_one() -> None:
    section = SECTION | dict(vocab_size=64)
    model = build.build(section)
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1], x]), batch_of(8))
    losses = []
    for sizes in ((1, 1, 1, 1), (1, 2, 2, 2)):
        program = Program(
            model,
            optimizers.build({"name": "adamw"}, model.rules),
            jax.tree.map(lambda x: x[:1], batches),
            lanes=1,
            mesh=make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()),
            block=3,
            prepare=lambda x: x,
        )
        program.fill({0: 0})
        fed = jax.tree.map(lambda x: x[None], batches)
        losses.append(np.asarray(program.train(fed, np.full((1, 3), 1e-2), [3] * program.rows).loss))
        paths = jax.tree.leaves_with_path(program.state.params)
        matrices = [x for path, x in paths if path[-1].key in ("kernel", "embedding")]
        shared = [x.size // x.addressable_shards[0].data.size for x in matrices]
        whole = int(np.prod(sizes[2:]))
        assert set(shared) <= {whole, sizes[2]}, shared  # patches and positions are split along fsdp alone
        assert shared.count(whole) >= len(shared) - 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_images_are_placed_without_communication() -> None:
    """Rows of a batch lie each on their own devices: these send each other gradients of parameters and nothing else."""
    model = build.build(SECTION | dict(vocab_size=80))
    mesh = make_mesh(dict(run=1, data=8, fsdp=1, tensor=1), jax.devices())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params, _ = jax.eval_shape(model.init, 0)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch_of(8))

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: model.loss(p, {}, batch)[0].loss)(params)

    everywhere = PartitionSpec()  # as `cdl.train.step` has it
    split = jax.shard_map(gradient, mesh=mesh, in_specs=everywhere, out_specs=everywhere, axis_names={"run"})
    text = jax.jit(split).lower(params, batch).compile().as_text()
    sent = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", text)
    shapes = [tuple(map(int, x.split(","))) for line in sent for x in re.findall(r"f32\[([\d,]+)\]", line)]
    assert len(shapes) > 5
    leaves = jax.tree.leaves(params)
    of_params = {tuple(sorted(shape)) for x in leaves for shape in (x.shape, x.shape[1:])}
    assert {tuple(sorted(shape)) for shape in shapes} <= of_params


def test_sizes_are_what_their_names_say_and_the_papers() -> None:
    paper = vlm.arguments("paper", vocab_size=49152, context=8192)
    n_params = build.build({"name": "vlm", **paper}).n_params
    assert n_params == 361_821_120 + 86_433_024 + 16 * 768 * 960  # SmolLM2-360M, siglip2-base at 512, projector
    assert vlm.image_tokens(paper) == 64  # nanoVLM's, of 512 x 512 pixels
    assert build.build({"name": "vlm", **vlm.arguments()}).n_params == pytest.approx(250e3, rel=0.02)
    with pytest.raises(UserError, match="no size of vlm 'papr'; did you mean 'paper'"):
        vlm.arguments("papr")


def test_components_show_in_paths_and_start_as_said() -> None:
    params, stats = compiled(build.build(SECTION | dict(text_d_model=256)).init)(0)
    assert set(params) == {"vision", "projector", "text"}
    assert stats == {}
    assert set(params["projector"]) == {"kernel"}
    assert params["projector"]["kernel"].std() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(shuffle=3), "model.image_size=24 must be a multiple of model.patch=6 times model.shuffle=3"),
        (dict(patch=0), "model.patch=0 must be at least 1"),
        (dict(context=3), "model.context=3 is too small for an image of 4 tokens; raise it"),
        (dict(vision_n_head=3), "model.vision_d_model=16 must be a multiple of model.vision_n_head=3"),
        (dict(text_n_kv_head=3), "model.text_n_head=4 must be a multiple of model.text_n_kv_head=3"),
        (dict(text_d_ff=0), "model.text_d_ff=0 must be at least 1"),
        (dict(dtype="float16"), "no model.dtype 'float16'"),
        (dict(text_n_layers=3), "'text_n_layers'; did you mean 'text_n_layer'"),
    ],
)
def test_bad_sections_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        build.build(SECTION | change)
    assert said in str(e.value)


def test_batches_that_do_not_fit_are_named(params: Any) -> None:
    many = BATCH | dict(image=np.repeat(BATCH["image"], 3, axis=1))
    with pytest.raises(UserError, match=r"model.context=20 is too small for 6 images of 24 tokens"):
        forward(params, many)
    longer = BATCH | {name: np.repeat(BATCH[name], 2, axis=1) for name in ("tokens", "slot")}
    with pytest.raises(UserError, match=r"model.context=20 is too small for a row of 41 tokens"):
        forward(params, longer)
    with pytest.raises(UserError, match=r"images are \(12, 12, 3\) and the model's \(24, 24, 3\)"):
        forward(params, BATCH | dict(image=BATCH["image"][:, :, ::2, ::2]))


def test_weights_come_from_two_folders_or_from_one_that_was_saved(params: Any, tmp_path: Path) -> None:
    save(SECTION, params, {}, tmp_path / "a")
    whole, stats = load(SECTION, tmp_path / "a")
    assert_same_tree(whole, params, atol=0)
    assert stats == {}
    vision, text = tmp_path / "a" / "vision", tmp_path / "a" / "text"
    both = [load(SECTION, f"{vision},{text}", seed=seed)[0] for seed in (3, 4)]
    drawn = [build.build(SECTION).init(seed)[0]["projector"] for seed in (3, 4)]
    for got, projector in zip(both, drawn, strict=True):
        assert_same_tree(got, params | dict(projector=jax.tree.map(np.asarray, projector)), rtol=1e-6)
    assert np.abs(both[0]["projector"]["kernel"] - both[1]["projector"]["kernel"]).max() > 0.01
    assert [read_section(x)["name"] for x in (vision, text)] == ["siglip", "llama"]
    for path, said in [
        (f"{text},{vision}", "this is model 'llama', and 'siglip' is needed"),
        (f"{vision}", "is not VISION,TEXT, two paths of weights, nor a folder with projector.safetensors"),
        (f"{vision},{text},{text}", "is not VISION,TEXT"),
        (f"{vision},{tmp_path}", "has neither model.safetensors nor model.safetensors.index.json"),
    ]:
        with pytest.raises(UserError) as e:
            load(SECTION, path)
        assert said in str(e.value)
    with pytest.raises(UserError, match=r"model.text_n_layer is 2 there and 3 here; set it to 2"):
        load(SECTION | dict(text_n_layer=3), f"{vision},{text}")
    with pytest.raises(UserError, match=r"projector.safetensors exists and is not overwritten"):
        save(SECTION, params, {}, tmp_path / "a")
