"""The vision encoder against `transformers` given the same weights, which travel in safetensors files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError
from cdl.models import build, siglip, vlm
from cdl.models.pretrained import load, read_section, save
from tests.models.programs import compiled
from tests.models.test_llama import assert_same_tree

SMALL: dict[str, Any] = dict(image_size=24, patch=6, n_layer=3, n_head=4, d_model=32, dtype="float32")
WHOLE: dict[str, Any] = {"name": "vlm"} | vlm.arguments() | dict(image_size=24, patch=6, vision_n_layer=3)
WHOLE |= dict(vision_n_head=4, vision_d_model=32, shuffle=2, text_n_layer=1)
IMAGES = np.random.default_rng(0).normal(size=(3, 24, 24, 3)).astype(np.float32)

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's and transformers' own making


def theirs(both: bool = False) -> Any:
    """SiglipVisionModel, or SiglipModel, with every parameter away from where it starts."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.SiglipVisionConfig(**sizes, image_size=24, patch_size=6)
    model = transformers.SiglipVisionModel(config)
    if both:
        text = dict(**sizes, vocab_size=50, max_position_embeddings=8, bos_token_id=None, eos_token_id=None)
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=config.to_dict(), text_config=text))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.2 * torch.randn(tensor.shape)
    return model.eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model beside it, which loading wants."""
    folder = tmp_path_factory.mktemp("text")
    section = vlm.parts(WHOLE)["text"]
    save(section, *build.build(section).init(0), folder)
    return folder


def made() -> Any:
    """Images and parameters -> patches."""
    module = siglip.Siglip(**SMALL, compute=Compute(), rngs=nnx.Rngs(0))
    graphdef = nnx.split(module, nnx.Param)[0]
    return lambda params: nnx.merge(graphdef, params)(IMAGES)


@pytest.mark.parametrize("both", [False, True])
def test_patches_and_gradients_are_those_of_transformers(both: bool, text: Path, tmp_path: Path) -> None:
    model = theirs(both)
    torch = pytest.importorskip("torch")
    model.save_pretrained(tmp_path / "weights")
    assert read_section(tmp_path / "weights") == {"name": "siglip", **SMALL}
    params = load(WHOLE, f"{tmp_path / 'weights'},{text}")[0]["vision"]
    vision = model.vision_model if both else model
    hidden = vision(torch.tensor(IMAGES).permute(0, 3, 1, 2)).last_hidden_state
    weight = np.random.default_rng(1).normal(size=hidden.shape).astype(np.float32)
    (hidden * torch.tensor(weight)).mean().backward()
    with torch.no_grad():  # saved and loaded as if they were weights
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    forward = made()
    patches, grads = compiled(lambda p: (forward(p), jax.grad(lambda p: (forward(p) * weight).mean())(p)))(params)
    np.testing.assert_allclose(patches, hidden.detach(), atol=1e-4)
    assert_same_tree(grads, load(WHOLE, f"{tmp_path / 'gradients'},{text}")[0]["vision"], atol=1e-5)


def test_what_we_save_transformers_loads(text: Path, tmp_path: Path) -> None:
    model = theirs()
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model.save_pretrained(tmp_path / "theirs")
    params = load(WHOLE, f"{tmp_path / 'theirs'},{text}")[0]["vision"]
    save({"name": "siglip", **SMALL}, params, {}, tmp_path / "ours")
    again, report = transformers.SiglipVisionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    expected = model.state_dict()
    assert set(again.state_dict()) == {name for name in expected if not name.startswith("head.")}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert again.config.hidden_act == model.config.hidden_act
    assert_same_tree(load(WHOLE, f"{tmp_path / 'ours'},{text}")[0]["vision"], params, atol=0)


def test_base_has_as_many_parameters_as_theirs() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.SiglipVisionConfig(image_size=512, vision_use_head=False)
        model = transformers.SiglipVisionModel(config)
    shapes = nnx.state(
        nnx.eval_shape(
            lambda: siglip.Siglip(**siglip.arguments("base/16", 512), compute=Compute(), rngs=nnx.Rngs(0)),
        )
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(p.numel() for p in model.parameters()) == 86_433_024


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(intermediate_size=100), "intermediate_size=100, but model 'siglip' has 128"),
        (dict(hidden_act="gelu"), "hidden_act='gelu', but model 'siglip' has 'gelu_pytorch_tanh'"),
        (dict(layer_norm_eps=1e-5), "layer_norm_eps=1e-05"),
        (dict(num_channels=1), "num_channels=1"),
        (dict(image_size=[24, 48]), "image_size=[24, 48], but model 'siglip' is square"),
        (dict(num_attention_heads=2), "model.vision_n_head is 2 there and 4 here; set it to 2"),
        (dict(model_type="siglip2"), "'siglip2'; did you mean 'siglip'"),
    ],
)
def test_configs_of_other_models_are_named(change: dict[str, Any], said: str, text: Path, tmp_path: Path) -> None:
    section = vlm.parts(WHOLE)["vision"]
    params, _ = build.build(WHOLE).init(0)
    save(section, params["vision"], {}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as e:
        load(WHOLE, f"{tmp_path},{text}")
    assert said in str(e.value)
    assert str(tmp_path) in str(e.value)


def test_images_of_another_size_are_named() -> None:
    module = siglip.Siglip(**SMALL, compute=Compute(), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"images are \(12, 12, 3\) and the model's \(24, 24, 3\)"):
        module(jnp.zeros((1, 12, 12, 3)))
    with pytest.raises(UserError, match="no size of siglip 'bas/16'; did you mean 'base/16'"):
        siglip.arguments("bas/16")
