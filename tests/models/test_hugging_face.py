"""GPT-2, ViT and ResNet against `transformers` given the same weights, which travel in safetensors files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cdl.compute import Compute
from cdl.models.build import MODELS, build
from cdl.models.pretrained import load, read_section, save
from cdl.models.resnet import DEPTHS
from tests.models.programs import compiled

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's and transformers' own making

TOKENS = np.random.default_rng(0).integers(0, 61, (4, 25))
IMAGES = np.random.default_rng(1).normal(size=(8, 32, 32, 3)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, 7, 8)
BATCH = {"image": IMAGES, "label": LABELS}


@pytest.fixture(autouse=True)
def _short_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNets with every kind of block, and few; `test_resnet` counts them all."""
    torch.manual_seed(0)
    monkeypatch.setitem(DEPTHS, 18, ((1, 2, 1, 1), False))
    monkeypatch.setitem(DEPTHS, 50, ((1, 2, 1, 1), True))


def gpt2() -> Any:
    none = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_layer=3, n_head=4, n_embd=32, bos_token_id=0, eos_token_id=0, **none
    )
    return randomised(transformers.GPT2LMHeadModel(config), 0.2)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        layer_norm_eps=1e-6,
        image_size=32,
        patch_size=8,
        num_labels=7,
    )
    return randomised(transformers.ViTForImageClassification(config), 0.2)


def resnet(depth: int, stem: str) -> Any:
    bottleneck = depth == 50
    config = transformers.ResNetConfig(
        embedding_size=4,
        hidden_sizes=[w * (4 if bottleneck else 1) for w in (4, 8, 16, 32)],
        depths=list(DEPTHS[depth][0]),
        layer_type="bottleneck" if bottleneck else "basic",
        num_labels=7,
    )
    model = transformers.ResNetForImageClassification(config)
    if stem == "cifar":
        config.stem = stem
        model.resnet.embedder.embedder.convolution = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        model.resnet.embedder.pooler = torch.nn.Identity()
    return randomised(model, 0.1)


def randomised(model: Any, spread: float) -> Any:
    """Every parameter away from where it starts, so that every part shows; running statistics too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += spread * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor += 0.3 * torch.rand(tensor.shape, generator=generator)
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.bias += 0.5  # few channels that ReLU leaves almost nothing of, whose norms would magnify rounding
    return model.eval()


def ours(model: Any, folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """Section, parameters and statistics of a model of theirs, by way of a file."""
    model.save_pretrained(folder)
    section = read_section(folder)
    return section, *load(section, folder)


def gradients(model: Any, folder: Path) -> Any:
    """Theirs after `backward`, as a tree of ours: saved and loaded as if they were weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return ours(model, folder)[1]


def computed(section: dict[str, Any], params: Any, stats: Any, batch: Any, train: bool) -> Any:
    """(loss, (logits, statistics after it)), gradients."""
    arguments = {key: value for key, value in section.items() if key != "name"}
    module = MODELS[section["name"]].make(**arguments, compute=Compute(), rngs=nnx.Rngs(0))
    graphdef = nnx.split(module, nnx.Param, nnx.BatchStat)[0]
    model = build(section)
    inputs = batch["image"] if section["name"] != "gpt2" else batch[:, :-1]

    def mean(params: Any, stats: Any) -> Any:
        sums, after = model.loss(params, stats, batch, train)
        return sums.loss / sums.count, (nnx.merge(graphdef, params, stats)(inputs, train), after)

    return compiled(jax.value_and_grad(mean, has_aux=True))(params, stats)


def assert_same_tree(got: Any, expected: Any, **tolerance: float) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance, err_msg=jax.tree_util.keystr(path))


def pixels(images: np.ndarray) -> Any:
    return torch.tensor(images).permute(0, 3, 1, 2)


def test_gpt2_logits_loss_and_gradients(tmp_path: Path) -> None:
    model = gpt2()
    section, params, stats = ours(model, tmp_path / "weights")
    theirs = model(torch.tensor(TOKENS[:, :-1])).logits
    their_loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.tensor(TOKENS[:, 1:]).flatten())
    their_loss.backward()
    (loss, (logits, _)), grads = computed(section, params, stats, jnp.asarray(TOKENS), True)
    np.testing.assert_allclose(logits, theirs.detach(), atol=1e-4)
    assert loss == pytest.approx(their_loss.item(), abs=1e-5)
    assert_same_tree(grads, gradients(model, tmp_path / "gradients"), atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_logits_loss_and_gradients(pool: str, tmp_path: Path) -> None:
    model = vit()
    section, params, stats = ours(model, tmp_path / "weights")
    section["pool"] = pool

    def pooled(params: Any) -> Any:
        if pool == "cls":
            return params
        rest = {key: value for key, value in params.items() if key != "cls"}
        return rest | {"position": {"embedding": params["position"]["embedding"][1:]}}

    if pool == "cls":
        theirs = model(pixels(IMAGES)).logits
    else:
        embeddings = model.vit.embeddings
        hidden = embeddings.patch_embeddings(pixels(IMAGES)) + embeddings.position_embeddings[:, 1:]
        for layer in model.vit.layers:
            hidden = layer(hidden, None)
        theirs = model.classifier(model.vit.layernorm(hidden).mean(dim=1))
    their_loss = torch.nn.functional.cross_entropy(theirs, torch.tensor(LABELS))
    their_loss.backward()
    (loss, (logits, _)), grads = computed(section, pooled(params), stats, BATCH, True)
    np.testing.assert_allclose(logits, theirs.detach(), atol=1e-4)
    assert loss == pytest.approx(their_loss.item(), abs=1e-5)
    assert_same_tree(grads, pooled(gradients(model, tmp_path / "gradients")), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "stem"), [(18, "cifar"), (50, "imagenet")])
def test_resnet_logits_loss_gradients_and_statistics(depth: int, stem: str, tmp_path: Path) -> None:
    model = resnet(depth, stem)
    section, params, stats = ours(model, tmp_path / "weights")
    assert (section["depth"], section["stem"], section["width"]) == (depth, stem, 4)
    model = model.double()
    evaluated = model(pixels(IMAGES).double()).logits
    sums, after = compiled(lambda *trees: build(section).loss(*trees, BATCH, train=False))(params, stats)
    their_loss = torch.nn.functional.cross_entropy(evaluated, torch.tensor(LABELS), reduction="sum")
    assert float(sums.loss) == pytest.approx(their_loss.item(), abs=1e-5)
    assert int(sums.correct) == int((evaluated.argmax(dim=1) == torch.tensor(LABELS)).sum())
    assert_same_tree(after, stats, rtol=0)

    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    before = {name: layer.running_var.clone() for name, layer in norms.items()}
    values: dict[str, float] = {}  # how many a norm sees of a channel
    for name, layer in norms.items():
        layer.register_forward_hook(lambda m, _, y, name=name: values.update({name: y.numel() / m.num_features}))
    trained = model.train()(pixels(IMAGES).double()).logits
    their_loss = torch.nn.functional.cross_entropy(trained, torch.tensor(LABELS))
    their_loss.backward()
    (loss, (logits, after)), grads = computed(section, params, stats, BATCH, True)
    np.testing.assert_allclose(logits, trained.detach(), atol=1e-4)
    assert loss == pytest.approx(their_loss.item(), abs=1e-5)

    # torch's running variance is 0.9 of what it was and 0.1 of sum / (n - 1); ours of sum / n.
    with torch.no_grad():
        for name, layer in norms.items():
            old = 0.9 * before[name]
            layer.running_var.copy_(old + (layer.running_var - old) * (1 - 1 / values[name]))
    _, _, their_stats = ours(model, tmp_path / "after")
    assert_same_tree(after, their_stats, rtol=1e-4, atol=1e-5)
    assert_same_tree(grads, gradients(model, tmp_path / "gradients"), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, vit, lambda: resnet(18, "imagenet")], ids=["gpt2", "vit", "resnet"])
def test_files_in_parts_and_without_a_head_load_the_same(make: Any, tmp_path: Path) -> None:
    model = make()
    section, *trees = ours(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert_same_tree(load(section, tmp_path / "parts"), tuple(trees), atol=0)
    model.base_model.save_pretrained(tmp_path / "base")  # names without prefix; ViT's and ResNet's head not there
    params, stats = load(section, tmp_path / "base", seed=5)
    if "head" in params:
        assert_same_tree(params["head"], build(section).init(5)[0]["head"], rtol=1e-6)
        params["head"] = trees[0]["head"]
    assert_same_tree((params, stats), tuple(trees), atol=0)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (gpt2, "GPT2LMHeadModel"),
        (vit, "ViTForImageClassification"),
        (lambda: resnet(50, "imagenet"), "ResNetForImageClassification"),
    ],
    ids=["gpt2", "vit", "resnet"],
)
def test_what_we_save_transformers_loads(make: Any, kind: str, tmp_path: Path) -> None:
    model = make()
    section, params, stats = ours(model, tmp_path / "theirs")
    save(section, params, stats, tmp_path / "ours")
    again, report = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert read_section(tmp_path / "ours") == section
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for key, value in json.loads((tmp_path / "ours" / "config.json").read_text()).items():
        assert theirs[key] == value or key == "n_inner", key
