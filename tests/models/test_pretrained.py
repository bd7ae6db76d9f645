"""Files of weights: what is saved is loaded, in every float type and layout of files, and each fault is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cdl.errors import UserError
from cdl.models import llama
from cdl.models.build import build
from cdl.models.pretrained import load, read_section, save
from cdl.models.resnet import DEPTHS
from tests.models.programs import compiled

LLAMA = dict(name="llama") | llama.arguments("3k", 11, 6) | dict(n_layer=2)
SECTIONS = {
    "gpt2": dict(name="gpt2", vocab_size=11, context=6, n_layer=2, n_head=2, d_model=8, dtype="float32"),
    "llama": LLAMA,
    "llama-untied": LLAMA | dict(tied=False),
    "vit": dict(name="vit", image_size=8, patch=4, classes=5, n_layer=2, n_head=2, d_model=8, pool="cls"),
    "vit-mean": dict(name="vit", image_size=8, patch=4, classes=5, n_layer=2, n_head=2, d_model=8, pool="mean"),
    "resnet": dict(name="resnet", depth=50, stem="imagenet", classes=5, width=4),
    "resnet-cifar": dict(name="resnet", depth=18, stem="cifar", classes=5, width=4),
}


@pytest.fixture(autouse=True)
def _short_resnets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEPTHS, 18, ((1, 2), False))
    monkeypatch.setitem(DEPTHS, 50, ((1, 2), True))


def trees_of(section: dict[str, Any]) -> Any:
    """Parameters and statistics, every number another."""
    shapes = jax.eval_shape(build(section).init, 0)
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SECTIONS)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    section = SECTIONS[name]
    trees = trees_of(section)
    save(section, *trees, tmp_path)
    assert read_section(tmp_path) == {"dtype": "float32"} | section
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same(load(section, path), trees)
    with pytest.raises(UserError, match=r"config\.json exists and is not overwritten"):
        save(section, *trees, tmp_path)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float64])
def test_other_float_types_become_float32(dtype: Any, tmp_path: Path) -> None:
    section = SECTIONS["gpt2"]
    trees = trees_of(section)
    save(section, *trees, tmp_path)
    tensors = {key: value.astype(dtype) for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), trees)
    assert_same(load(section, tmp_path), rounded)


def test_loaded_weights_are_not_written_into(tmp_path: Path) -> None:
    section = SECTIONS["resnet-cifar"]
    save(section, *trees_of(section), tmp_path)
    params, stats = load(section, tmp_path)
    before = jax.tree.map(np.copy, stats)
    batch = {"image": np.ones((2, 8, 8, 3), np.float32), "label": np.zeros(2, int)}
    compiled(lambda params: build(section).loss(params, stats, batch))(params)
    assert_same(stats, before)


Tensors = dict[str, np.ndarray]


def renamed(tensors: Tensors) -> None:
    """As the first files of GPT-2: no prefix, the mask beside the weights, one of the two tied tensors."""
    for key in list(tensors):
        tensors[key.removeprefix("transformer.")] = tensors.pop(key)
    tensors["h.0.attn.bias"] = np.ones((1, 1, 6, 6), np.float32)
    tensors["h.1.attn.masked_bias"] = np.full((), -1e4, np.float32)
    tensors["lm_head.weight"] = tensors.pop("wte.weight")


def doubled(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()


@pytest.mark.parametrize("change", [renamed, doubled])
def test_files_of_gpt2_as_they_occur(change: Callable[[Tensors], None], tmp_path: Path) -> None:
    trees = trees_of(SECTIONS["gpt2"])
    save(SECTIONS["gpt2"], *trees, tmp_path)
    changed(tmp_path, change)
    assert_same(load(SECTIONS["gpt2"], tmp_path), trees)


def changed(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_files_of_llama_as_they_occur(tmp_path: Path) -> None:
    """Either of two tied tensors, or both, equal; frequencies beside the weights; the fields of older versions."""
    trees = trees_of(LLAMA)
    save(LLAMA, *trees, tmp_path)
    changed(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_same(load(LLAMA, tmp_path), trees)
    changed(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    changed(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}))
    assert_same(load(LLAMA, tmp_path), trees)
    changed(tmp_path, lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match=r"lm_head.weight is not the token embedding; llama has its output tied"):
        load(LLAMA, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    newer = {key: value for key, value in config.items() if not key.startswith("rope_") and key != "head_dim"}
    newer |= dict(rope_parameters=dict(rope_type="default", rope_theta=config["rope_theta"]))
    for written in (newer, {key: value for key, value in config.items() if key != "head_dim"}):
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert read_section(tmp_path) == LLAMA


def test_tensors_that_are_missing_and_left_over_are_listed(tmp_path: Path) -> None:
    save(LLAMA, *trees_of(LLAMA), tmp_path)
    gone = [f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("input_layernorm", "mlp.up_proj", "mlp.down_proj")]

    def change(tensors: Tensors) -> None:
        for name in gone:
            tensors[f"extra.{name}"] = tensors.pop(f"model.{name}")
        del tensors["extra.layers.0.input_layernorm.weight"], tensors["extra.layers.1.mlp.up_proj.weight"]

    changed(tmp_path, change)
    with pytest.raises(UserError) as e:
        load(LLAMA, tmp_path)
    named = sorted(gone)
    extra = [f"extra.{name}" for name in named if name not in (gone[0], gone[4])]
    missing = f"tensors {', '.join(named)} are not there"
    assert str(e.value) == (
        f"{tmp_path}: {missing}; tensors {', '.join(extra)} have no place in the model; "
        f"give a file of this kind and size of model"
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"tensors (\S+, ){19}\S+ and 13 more are not there; tensors"):
        load(LLAMA | dict(n_layer=5), tmp_path)  # of three more layers nine each


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "tensor h.1.mlp.c_fc.bias is not there"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "tensor extra has no place in the model"),
        (
            lambda t: t.update({"transformer.wpe.weight": np.ones((7, 8), np.float32)}),
            "transformer.wpe.weight is [7, 8] and the model has [6, 8] there",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": np.ones(8, np.int32)}),
            "transformer.ln_f.bias is I32; weights are one of F64, F32, F16, BF16",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}),
            "lm_head.weight is not the token embedding",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[Tensors], None], said: str, tmp_path: Path) -> None:
    save(SECTIONS["gpt2"], *trees_of(SECTIONS["gpt2"]), tmp_path)
    changed(tmp_path, change)
    with pytest.raises(UserError) as e:
        load(SECTIONS["gpt2"], tmp_path)
    assert said in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gpt2", dict(model_type="gtp2"), "'gtp2'; did you mean 'gpt2'?"),
        ("gpt2", dict(n_head=4), "model.n_head is 4 there and 2 here; set it to 4"),
        ("gpt2", dict(activation_function="relu"), "activation_function='relu', but model 'gpt2' has 'gelu_new'"),
        ("gpt2", dict(n_inner=16), "n_inner=16, but model 'gpt2' has 32"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu', but model 'llama' has 'silu'"),
        ("llama", dict(rms_norm_eps=1e-6), "rms_norm_eps=1e-06, but model 'llama' has 1e-05"),
        ("llama", dict(attention_bias=True), "attention_bias=True"),
        ("llama", dict(mlp_bias=True), "mlp_bias=True"),
        ("llama", dict(head_dim=8), "head_dim=8, but model 'llama' has 4"),
        ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8)), "rope_scaling={'rope_type': 'llama3', 'fac"),
        ("llama", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e5)), "rope_scaling={'rope_type': 'yarn'"),
        ("llama", dict(rope_theta=10000), "model.theta is 10000.0 there and 100000.0 here"),
        ("llama", dict(num_key_value_heads=None), "model.n_kv_head is 2 there and 1 here; set it to 2"),
        ("llama", dict(tie_word_embeddings=False), "model.tied is False there and True here; set it to False"),
        ("llama", dict(model_type="gpt2"), "this is model 'gpt2', and 'llama' is needed"),
        ("vit", dict(layer_norm_eps=1e-5), "layer_norm_eps=1e-05, but model 'vit' has 1e-06"),
        ("vit", dict(patch_size=[4, 2]), "patch_size=[4, 2], but model 'vit' is square"),
        ("vit", dict(pool="mean"), "model.pool is 'mean' there and 'cls' here; set it to 'mean'"),
        ("resnet", dict(depths=[3, 8, 36, 3]), "depths=[3, 8, 36, 3], but model 'resnet' has [1, 2]"),
        ("resnet", dict(downsample_in_bottleneck=True), "downsample_in_bottleneck=True"),
    ],
)
def test_configs_of_other_models_are_named(name: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    save(SECTIONS[name], *trees_of(SECTIONS[name]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as e:
        load(SECTIONS[name], tmp_path)
    assert said in str(e.value)
    assert str(tmp_path) in str(e.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    section = SECTIONS["gpt2"]
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(section, tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*nothing\.safetensors"):
        load(section, tmp_path / "nothing.safetensors")
    save(section, *trees_of(section), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        load(section, tmp_path)
    index = {"weight_map": {"transformer.wte.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"cannot read .*model-00002-of-00002\.safetensors"):
        load(section, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        read_section(tmp_path)
