"""Adapters against `peft` on the same weights; what is trained, saved and merged."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from cdl.cli import main
from cdl.config import base, change, flatten, section
from cdl.errors import UserError
from cdl.models.build import MODELS, Model, build
from cdl.models.gpt2 import arguments
from cdl.models.lora import LoRA, merge
from cdl.models.pretrained import save, to_hugging_face
from cdl.optim import build as optimizers
from cdl.planning import settings
from cdl.probing import probe
from cdl.sharding import AXES, make_mesh
from cdl.sweep import initial
from cdl.sweep.identity import NEUTRAL
from cdl.sweep.programs import points_of
from cdl.sweep.store import Store
from cdl.train.checkpoint import read_weights
from cdl.train.flops import step_flops
from cdl.train.loop import Run, train
from cdl.train.step import Program
from tests.models.programs import compiled

from ..conftest import TINY

GPT2 = dict(name="gpt2", vocab_size=61, context=24, n_layer=3, n_head=4, d_model=32)
THREE_K = dict(name="gpt2") | arguments("3k", context=16)
LORA = LoRA(rank=3, alpha=12.0, targets="attention/qkv$|mlp/down$")
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 25))


def away_from_zero(tree: Any, seed: int) -> Any:
    """B starts at 0, where nothing could be seen of A."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32) for x in leaves])


def weights(section: dict[str, Any]) -> Any:
    return away_from_zero(compiled(build(section).init)(0)[0], 1)


def mean_loss(model: Model, params: Any, batch: Any = TOKENS) -> jax.Array:
    sums, _ = model.loss(params, {}, batch)
    return sums.loss / sums.count


class _Theirs(NamedTuple):
    """A family of `transformers`, adapted by `peft`. modules: what our adapted layers are called there, {} a layer."""

    section: dict[str, Any]
    lora: LoRA
    family: str
    modules: dict[str, str]


FAMILIES = {
    "gpt2": _Theirs(
        GPT2,
        LORA,
        "GPT2LMHeadModel",
        {"attention/qkv": "transformer.h.{}.attn.c_attn", "mlp/down": "transformer.h.{}.mlp.c_proj"},
    ),
    "llama": _Theirs(
        dict(name="llama", vocab_size=61, context=24, n_layer=3, n_head=4, n_kv_head=2, d_model=32, d_ff=48),
        LoRA(rank=3, alpha=12.0, targets="attention/(q|v)$|mlp/down$"),
        "LlamaForCausalLM",
        {
            "attention/q": "model.layers.{}.self_attn.q_proj",
            "attention/v": "model.layers.{}.self_attn.v_proj",
            "mlp/down": "model.layers.{}.mlp.down_proj",
        },
    ),
}


@pytest.mark.filterwarnings("ignore")  # of torch's and transformers' own making
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_peft(family: str, tmp_path: Path) -> None:
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    section, lora, name, modules = FAMILIES[family]
    frozen = weights(section)
    model = build(section, lora=lora).over(frozen)
    adapters = away_from_zero(compiled(model.init)(2)[0], 3)
    loss, grads = compiled(jax.value_and_grad(lambda params: mean_loss(model, params)))(adapters)

    save(section, frozen, {}, tmp_path)
    theirs = getattr(transformers, name).from_pretrained(tmp_path, attn_implementation="eager").eval()
    targets = [".".join(path.split(".")[-2:]) for path in modules.values()]
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=targets, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(theirs, config).eval()
    named = dict(theirs.named_parameters())

    def ordered(layer: str, b_LxRxN: np.ndarray) -> np.ndarray:
        """Columns of our joint kernel are (head, q k v, K), of theirs (q k v, head, K)."""
        if layer != "attention/qkv":
            return b_LxRxN
        return b_LxRxN.reshape(3, lora.rank, 4, 3, -1).swapaxes(2, 3).reshape(b_LxRxN.shape)

    def pairs(tree: Any) -> dict[str, np.ndarray]:
        """Our arrays by their names, laid out as theirs."""
        flat = {"/".join(path): np.asarray(x) for path, x in flatten_dict(tree["blocks"]["layers"]).items()}
        made = {}
        for layer, path in modules.items():
            a, b = flat[f"{layer}/lora_a"], ordered(layer, flat[f"{layer}/lora_b"])
            for i in range(3):
                at = f"base_model.model.{path.format(i)}"
                made[f"{at}.lora_A.default.weight"], made[f"{at}.lora_B.default.weight"] = a[i].T, b[i].T
        return made

    assert pairs(adapters).keys() == {name for name, p in named.items() if p.requires_grad}
    with torch.no_grad():
        for name, array in pairs(adapters).items():
            named[name].copy_(torch.tensor(array))
    tokens = torch.tensor(TOKENS)
    logits = theirs(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 61), tokens[:, 1:].reshape(-1))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    for name, array in pairs(grads).items():
        np.testing.assert_allclose(array, named[name].grad.numpy(), rtol=1e-4, atol=1e-5 * abs(array).max())


def test_starts_at_the_model_that_it_adapts_and_merges_into_one_that_computes_the_same() -> None:
    frozen, plain, adapted = weights(GPT2), build(GPT2), build(GPT2, lora=LORA)
    model = adapted.over(frozen)
    fresh = compiled(adapted.init)(2)[0]
    loss = compiled(lambda params: mean_loss(model, params))
    reference = compiled(lambda params: mean_loss(plain, params))
    np.testing.assert_allclose(loss(fresh), reference(frozen), rtol=1e-6)
    trained = away_from_zero(fresh, 4)
    assert abs(loss(trained) - loss(fresh)) > 0.001
    np.testing.assert_allclose(loss(trained), reference(merge(frozen, trained, LORA)), rtol=1e-5)


def test_adapters_are_all_that_is_trained_and_drawn_as_in_peft() -> None:
    plain, adapted = build(GPT2), build(GPT2, lora=LORA)
    params, _ = compiled(adapted.init)(0)
    n_in, n_out, layers = 32, 96, 3
    assert sum(x.size for x in jax.tree.leaves(params)) == layers * 3 * ((n_in + n_out) + (128 + 32))
    assert adapted.n_params == plain.n_params + sum(x.size for x in jax.tree.leaves(params))
    a = np.concatenate([x.ravel() for path, x in flatten_dict(params).items() if path[-2:] == ("qkv", "lora_a")])
    assert abs(a).max() <= 32**-0.5
    assert abs(a.std() * (3 * 32) ** 0.5 - 1) < 0.1
    assert jax.tree.structure(adapted.frozen) == jax.tree.structure(weights(GPT2))
    # Of three products with weights, that for the gradient of frozen ones is not made; of scores, all are.
    B, S, D, V = 4, 24, 32, 61
    products, scores, low_rank = layers * 12 * D**2 + V * D, layers * 2 * S * D, layers * 3 * (4 * D + 5 * D)
    flops = step_flops(adapted, jax.ShapeDtypeStruct((B, S + 1), jnp.int32))
    assert flops == B * S * (4 * products + 6 * scores + 6 * low_rank)


def test_a_layer_alone_can_be_named() -> None:
    model = build(
        dict(name="vit", image_size=8, patch=4, classes=3, n_layer=1, n_head=1, d_model=8), lora=LoRA(2, 4.0, "^head$")
    )
    assert {path[0] for path in flatten_dict(compiled(model.init)(0)[0])} == {"head"}


@pytest.mark.parametrize(
    ("section", "lora", "said"),
    [
        (GPT2, LoRA(2, 8.0, "attn"), "'attn' matches no linear layer; there are blocks/layers/attention/out, blocks"),
        (GPT2, LoRA(2, 8.0, "(qkv"), "no regular expression"),
        (GPT2, LoRA(-1, 8.0), "lora.rank=-1 and lora.alpha=8.0 must be positive"),
        (GPT2, LoRA(2, 0.0), "must be positive"),
        (dict(name="resnet", depth=18, width=4, classes=3), LoRA(2, 8.0, "head"), "batch statistics"),
    ],
)
def test_errors(section: dict[str, Any], lora: LoRA, said: str) -> None:
    with pytest.raises(UserError) as caught:
        build(section, lora=lora)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights for the model of `TINY`."""
    folder = tmp_path_factory.mktemp("weights")
    save(THREE_K, weights(THREE_K), {}, folder)
    return folder


def test_a_run_keeps_its_adapters_alone_and_merges_them(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ["lora.rank=2", "lora.targets=attention/", f"init={start}", "optimizer.name=adamw", "T=20", "eta_ref=0.5"]
    assert main(["train", f"--config={TINY}", f"--out={tmp_path / 'out'}", *lora]) == 0
    (id,) = Store(tmp_path / "out").ids()
    adapters, stats, _ = read_weights(tmp_path / "out" / "checkpoints" / id)
    assert stats == {}
    assert {path[-1] for path in flatten_dict(adapters)} == {"lora_a", "lora_b"}
    before = to_hugging_face(THREE_K, weights(THREE_K), {})
    assert main(["export", str(tmp_path / "out"), id[:6], f"--out={tmp_path / 'merged'}"]) == 0
    after = to_hugging_face(THREE_K, *_loaded(tmp_path / "merged"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"}
    adapted_again = ["train", f"--config={TINY}", f"--out={tmp_path / 'no'}", f"init={tmp_path}/out/checkpoints/{id}"]
    assert main(adapted_again) == 2
    assert "are adapters, and not the weights beside them" in capsys.readouterr().err
    # What was merged evaluates as the run did.
    evaluated = ["train", f"--config={TINY}", f"init={tmp_path / 'merged'}", "T=3", "eta_ref=1e-12"]
    assert main([*evaluated, f"--out={tmp_path / 'again'}"]) == 0
    (again,) = Store(tmp_path / "again").table()["loss"]
    (loss,) = Store(tmp_path / "out").table()["loss"]
    np.testing.assert_allclose(again, loss, rtol=1e-5)


def _loaded(folder: Path) -> Any:
    from cdl.models.pretrained import load

    return load(THREE_K, folder)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (1, 2, 2, 2)])
def test_runs_share_what_is_frozen_on_any_mesh(sizes: tuple[int, ...]) -> None:
    frozen, model, optimizer = weights(GPT2), build(GPT2, lora=LORA), optimizers.build(dict(name="sgd"))
    lanes = 2 if sizes[0] == 2 else 1
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices())
    batches = [np.random.default_rng(k).integers(0, 61, (4, 17)).astype(np.int32) for k in range(6)]
    program = Program(
        model, optimizer, np.stack(batches[:1]), lanes=lanes, mesh=mesh, block=2, prepare=lambda x: x, frozen=frozen
    )
    runs = [Run(str(s), s, np.full(5, 0.02 + 0.03 * s), (5,), lambda first: iter(batches[first:])) for s in range(2)]
    outcomes = {o.run.id: o for o in train(program, runs)}
    step = compiled(jax.value_and_grad(lambda params, batch: mean_loss(model.over(frozen), params, batch)))
    for run in runs:
        params, _ = compiled(model.init)(run.seed)
        losses = []
        for k in range(5):
            loss, grads = step(params, batches[k])
            losses.append(float(loss))
            params = jax.tree.map(lambda p, g, run=run: p - run.eta_T[0] * g, params, grads)
        np.testing.assert_allclose(outcomes[run.id].curve["train_loss"][:-1], losses, rtol=1e-5)


def test_points(start: Path) -> None:
    def point(**changes: Any) -> Any:
        changes = {"model": None} | {k.replace("__", "."): v for k, v in changes.items()}
        c = base()
        c.model = section("model", **THREE_K)
        c.data.seq_len = 16
        return points_of(change(c, {k: v for k, v in changes.items() if v is not None}), [{}])[0]

    # Nothing is adapted at rank 0, whatever is said of it; and runs of before there were adapters keep their ids.
    assert point().id == point(lora__alpha=3.0, lora__targets="mlp").id
    assert not [name for name in point().identity if name.startswith("lora.") or name == "optimizer.rates"]
    adapted = point(lora__rank=2, init=str(start))
    assert adapted.id != point(init=str(start)).id
    assert adapted.id != point(lora__rank=2, lora__alpha=3.0, init=str(start)).id
    assert adapted.program == point(lora__rank=2, init=str(start), seed=3, eta_ref=2.0).program
    with pytest.raises(UserError, match="say which by init="):
        point(lora__rank=2)


def test_parts_that_a_file_lacks_are_not_frozen_as_they_are_drawn(tmp_path: Path) -> None:
    vit = dict(name="vit") | MODELS["vit"].arguments() | dict(image_size=8, patch=4, n_layer=1, n_head=1, d_model=8)
    save(vit, *build(vit).init(0), tmp_path)
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("classifier")}
    save_file(tensors, tmp_path / "headless.safetensors", metadata={"format": "pt"})
    c = change(base(), {"model.name": "vit", "data.name": "images", "data.path": "digits", "lora.targets": "qkv"})
    c = change(c, {f"model.{k}": v for k, v in vit.items() if k != "name"})

    def fingerprint(file: str, rank: int) -> str:
        return initial.fingerprint(change(c, {"init": str(tmp_path / file), "lora.rank": rank}))

    assert fingerprint("model.safetensors", 2) == fingerprint("model.safetensors", 0)
    assert fingerprint("headless.safetensors", 0)
    with pytest.raises(UserError, match="lacks the head, which adapters would leave as it is drawn; train it first"):
        fingerprint("headless.safetensors", 2)


def test_lanes_of_one_program_adapt_the_same_weights(start: Path, tmp_path: Path) -> None:
    save(THREE_K, jax.tree.map(lambda x: 0.5 * x, weights(THREE_K)), {}, tmp_path)
    c = base()
    c.model = section("model", **THREE_K)
    c.data.seq_len = 16
    whole, adapted = (
        points_of(change(c, {"lora.rank": rank}), [{"init": str(start)}, {"init": str(tmp_path)}]) for rank in (0, 2)
    )
    assert whole[0].program == whole[1].program
    assert adapted[0].program != adapted[1].program


@pytest.mark.slow
def test_a_folder_or_a_plan_takes_no_runs_of_both_kinds(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(*changes: str) -> int:
        return main(["sweep", f"--config={TINY}", f"--out={tmp_path / 'out'}", f"init={start}", *changes])

    assert sweep() == 0
    for changed in (["lora.rank=2"], ["optimizer.rates=token:2"]):
        assert sweep(*changed) == 2
        assert f"belongs to another sweep: {changed[0].partition('=')[0]} is" in capsys.readouterr().err
    table = Store(tmp_path / "out").table()
    assert set(table["lora.rank"]) == {0}
    assert {"lora.rank", "lora.targets", "optimizer.rates"} <= set(settings(table))
    # As of before there were such fields.
    for file in (tmp_path / "out").glob("*/point.json"):
        point = json.loads(file.read_text())
        point["config"] = {k: v for k, v in point["config"].items() if k not in NEUTRAL}
        file.write_text(json.dumps(point))
    pd.testing.assert_frame_equal(Store(tmp_path / "out").table(), table, check_like=True)
    assert sweep() == 0
    assert "nothing to train" in capsys.readouterr().err


def test_fields_that_came_later_are_what_a_config_has_by_itself() -> None:
    flat = flatten(base())
    assert {field: flat[field] for field in NEUTRAL} == NEUTRAL


@pytest.mark.slow
def test_adapters_are_probed_and_not_what_is_frozen(start: Path, tmp_path: Path) -> None:
    lora = ["lora.rank=2", f"init={start}", "optimizer.name=adamw", "T=12", "checkpoint.steps=4", "checkpoint.keep=9"]
    assert main(["train", f"--config={TINY}", f"--out={tmp_path}", "--keep", *lora]) == 0
    (id,) = Store(tmp_path).ids()
    found = probe(tmp_path, id, samples=128, curvature=0)
    assert found.step_P.tolist() == [0, 4, 8, 12]
    first, last = (read_weights(tmp_path / "checkpoints" / id / f"step_{s}")[0] for s in (4, 12))
    moved = sum(float(((a - b) ** 2).sum()) for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True))
    np.testing.assert_allclose(found.path.distance_PxP[1, 3], moved**0.5, rtol=1e-5)


@pytest.mark.slow
def test_export_wants_the_weights_that_were_adapted(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(start, tmp_path / "start")
    lora = ["lora.rank=2", f"init={tmp_path / 'start'}", "T=8"]
    assert main(["train", f"--config={TINY}", f"--out={tmp_path / 'out'}", *lora]) == 0
    shutil.rmtree(tmp_path / "start")
    save(THREE_K, jax.tree.map(lambda x: 2 * x, weights(THREE_K)), {}, tmp_path / "start")
    initial._fingerprint.cache_clear()
    initial._load.cache_clear()
    assert main(["export", str(tmp_path / "out"), "", f"--out={tmp_path / 'merged'}"]) == 2
    assert "is not what was adapted" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_adapters_goes_on_bit_for_bit(start: Path, tmp_path: Path) -> None:
    lora = ["lora.rank=2", f"init={start}", "optimizer.name=adamw", "T=30", "checkpoint.steps=10", "checkpoint.keep=3"]
    for out in ("whole", "stopped"):
        assert main(["train", f"--config={TINY}", f"--out={tmp_path / out}", "--keep", *lora]) == 0
    (id,) = Store(tmp_path / "whole").ids()
    shutil.rmtree(tmp_path / "stopped" / id)  # as if it had been stopped after update 10
    for step in (20, 30):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / id / f"step_{step}")
    assert main(["train", f"--config={TINY}", f"--out={tmp_path / 'stopped'}", *lora]) == 0
    whole, stopped = (Store(tmp_path / out).curve(id) for out in ("whole", "stopped"))
    pd.testing.assert_frame_equal(whole, stopped, check_exact=True)
