"""The configs of the paper's runs: built at full size without computing a number, against what the paper says."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cdl.cli import main
from cdl.config import change, flatten, load
from cdl.errors import UserError
from cdl.models.gpt2 import SIZES
from cdl.schedules import schedule
from cdl.sharding import AXES
from cdl.sweep.grid import expand, per_lane
from cdl.sweep.layout import shape_on
from cdl.sweep.programs import parts_of, points_of
from cdl.train.memory import activation_bytes
from cdl.train.step import state_bytes

CONFIGS = Path(__file__).parent.parent / "configs"
DEVICES, DEVICE_BYTES = 8, 80e9
V, S = 50257, 1024  # of GPT-2


def gpt2_parameters(size: str) -> int:
    """Blocks: 12 D^2 weights, 13 D biases and norms each; embeddings; the last norm."""
    L, _, D = SIZES[size]
    return L * (12 * D**2 + 13 * D) + (V + S + 2) * D


def siglip_parameters(L: int, D: int, image: int, patch: int) -> int:
    """Blocks as GPT-2's; patches of three colours, a bias and a place for each; the last norm."""
    return L * (12 * D**2 + 13 * D) + (3 * patch**2 + 1 + (image // patch) ** 2 + 2) * D


# argument: parameters. Published by Hugging Face (gpt2, .., gpt2-xl; SmolLM2), timm and torchvision; ResNet-50 with the
# CIFAR stem by github.com/kuangliu/pytorch-cifar. The sizes 1B and 7B are the paper's, their shapes ours. The model of
# images and text is SigLIP 2's base, 4 x 4 of whose patches go into SmolLM2-360M: nanoVLM calls it 460M.
SIZED = {
    "gpt2.py:0.1b-adamw": 124_439_808,
    "gpt2.py:0.1b-muon": 124_439_808,
    "gpt2.py:1b-muon": gpt2_parameters("1B"),
    "gpt2.py:7b-muon": gpt2_parameters("7B"),
    "gpt2.py:124M": 124_439_808,
    "gpt2.py:355M": 354_823_168,
    "gpt2.py:774M": 774_030_080,
    "gpt2.py:1.5B": 1_557_611_200,
    "llama.py:135M": 134_515_008,
    "llama.py:360M": 361_821_120,
    "vit.py:imagenet": 86_567_656,
    "vit.py:Ti/16": 5_717_416,
    "vit.py:S/16": 22_050_664,
    "vit.py:L/16": 304_326_632,
    "resnet18.py:imagenet": 11_689_512,
    "resnet18.py:imagenet-sgd": 11_689_512,
    "resnet18.py:imagenet-adamw": 11_689_512,
    "resnet50.py:imagenet": 25_557_032,
    "resnet50.py:cifar10": 23_520_842,
    "vlm.py:paper": siglip_parameters(12, 768, 512, 16) + 16 * 768 * 960 + 361_821_120,
    "e2e.py:full-124M": 124_439_808,
    "e2e.py:full-355M": 354_823_168,
    "e2e.py:full-774M": 774_030_080,
}
DIGITS = ["vit.py", "resnet18.py", "resnet50.py"]

SECTION_5 = {
    "seed": 1337,
    "data.seq_len": 1024,
    "model.dtype": "bfloat16",
    "model.context": 1024,
    "model.vocab_size": V,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 0.0,
    "schedule.name": "cosine",
    "schedule.warmup": 0.02,
    "schedule.final": 0.0,
}
MUON = {"optimizer.name": "muon_nsgd", "optimizer.momentum": 0.95, "optimizer.nsgd_ratio": 1.0, "eta_ref": 10.0}
ADAMW = {"optimizer.name": "adamw", "optimizer.b1": 0.9, "optimizer.b2": 0.999, "optimizer.weight_decay": 0.01}
FIGURE_12 = ADAMW | {"data.batch_size": 128, "eta_ref": 0.01, "schedule.name": "cosine", "schedule.final": 0.0}
APPENDIX_D2 = {"schedule.name": "linear", "schedule.warmup": 0.0, "data.batch_size": 8}
# What the paper says of its runs: section 5.1, 5.4, Appendix B and D.
SAID: dict[str, dict[str, Any]] = {
    "gpt2.py:0.1b-adamw": SECTION_5 | ADAMW | {"optimizer.b2": 0.95, "eta_ref": 0.3, "data.batch_size": 512},
    "gpt2.py:0.1b-muon": SECTION_5 | MUON | {"data.batch_size": 512},
    "gpt2.py:1b-muon": SECTION_5 | MUON | {"data.batch_size": 64},
    "gpt2.py:7b-muon": SECTION_5 | MUON | {"data.batch_size": 64},
    "resnet18.py:imagenet-sgd": {
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.0,
        "optimizer.weight_decay": 0.0,
        "data.batch_size": 256,
    },
    "resnet18.py:imagenet-adamw": ADAMW | {"data.batch_size": 256},
    "resnet18.py:imagenet": FIGURE_12,
    "resnet50.py:imagenet": FIGURE_12,
    "resnet50.py:cifar10": FIGURE_12,
    "vit.py:imagenet": FIGURE_12,
    "vlm.py:paper": {
        "optimizer.name": "adamw",
        "optimizer.rates": "projector:100",
        "schedule.name": "cosine",
        "schedule.warmup": 0.03,
        "eta_ref": 5e-3,
        "model.context": 8192,
    },
    "e2e.py:full": {"lora.rank": 0, "eta_ref": 5e-5} | APPENDIX_D2,
    "e2e.py:lora": {"lora.rank": 4, "lora.alpha": 32.0, "eta_ref": 5e-4} | APPENDIX_D2,
}


def loaded(name: str) -> tuple[Any, list[dict[str, Any]]]:
    config, grid = load(str(CONFIGS / name))
    assert grid is not None
    return config, grid


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of configs that begin with some: they are there, as far as can be said without reading them."""
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "siglip2", "smollm2"):
        Path("weights", name).mkdir(parents=True)


@pytest.mark.parametrize("name", SIZED)
def test_config_fits_eight_devices(name: str) -> None:
    """Parameters as published; state as the optimizer's copies of them, split along fsdp; room left on the device."""
    c, _ = loaded(name)
    model, optimizer = parts_of(c)
    assert model.n_params == SIZED[name]
    sizes = shape_on(c, DEVICES) | {"run": 1}
    mesh = jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    state = state_bytes(model, optimizer, mesh)
    params, stats = jax.eval_shape(model.init, 0)
    copies = {"sgd": 1, "muon_nsgd": 2, "adamw": 3}[c.optimizer.name]
    floats = copies * sum(x.size for x in jax.tree.leaves(params)) + sum(x.size for x in jax.tree.leaves(stats))
    assert 1 <= state / (4 * floats / sizes["fsdp"]) < 1.01
    rows = c.data.batch_size // (sizes["data"] * sizes["fsdp"] * c.compute.microbatches)
    own = {} if model.data == "images" else dict(tokens=(c.data.seq_len + 1,), weight=(c.data.seq_len,))
    if model.data == "images":
        own = dict(image=(c.data.image_size, c.data.image_size, 3), label=())
    if model.data == "vqa":
        own |= dict(image=(c.data.images, c.data.image_size, c.data.image_size, 3), slot=(c.data.seq_len,))
    batch = {
        key: jax.ShapeDtypeStruct((rows, *shape), np.float32 if key in ("image", "weight") else np.int32)
        for key, shape in own.items()
    }
    gradients = 4 * model.n_params / sizes["fsdp"]
    kept = activation_bytes(model, batch)
    print(f"{name}: {model.n_params:,} parameters; on a device {state / 1e9:.2f} GB of parameters and optimizer state,")
    print(f"    {gradients / 1e9:.2f} GB of gradients, {kept / 1e9:.2f} GB of activations at most")
    assert state + gradients + kept < 0.6 * DEVICE_BYTES


@pytest.mark.parametrize("name", SAID)
def test_config_is_what_the_paper_says(name: str) -> None:
    flat = flatten(loaded(name)[0])
    assert {field: flat[field] for field in SAID[name]} == SAID[name]


@pytest.mark.parametrize("name", [*SIZED, *DIGITS])
def test_every_point_of_a_sweep_can_be_trained(name: str) -> None:
    """In one program, at rates that can be made; points differ, and the config's own rate is one of theirs."""
    c, grid = loaded(name)
    assert all(per_lane(field) for changes in grid for field in changes)
    points = expand(c, grid, lambda _: "")  # raises where two are the same
    assert c.eta_ref in [p.config.eta_ref for p in points]
    for p in (p.config for p in points):
        arguments = p.schedule.to_dict()
        assert schedule(arguments.pop("name"), p.T, peak=p.eta_ref / p.T**0.5, **arguments).any()


def test_section_5_has_240_runs() -> None:
    grids = {name: loaded(name)[1] for name in SIZED if "-adamw" in name or "-muon" in name if name.startswith("gpt2")}
    assert sum(len(grid) for grid in grids.values()) == 240
    for name, grid in grids.items():
        rates, horizons = (sorted({point[field] for point in grid}) for field in ("eta_ref", "T"))
        assert (len(rates), len(horizons)) == (6, 10)
        assert (horizons[0], horizons[-1]) == (100, 500_000)
        assert rates[0] < SAID[name]["eta_ref"] < rates[-1]
    every = {point["eta_ref"] for grid in grids.values() for point in grid}
    assert (min(every), max(every)) == (0.01, 30.0)


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("resnet18.py:imagenet-sgd", {"linear": 0.225, "cosine": 0.225, "cyclic": 0.056, "wsd": 0.113}),
        ("resnet18.py:imagenet-adamw", {"linear": 3e-4, "cosine": 3e-4, "cyclic": 3e-4, "wsd": 1.4e-4}),
    ],
)
def test_schedules_of_figures_2_and_3(name: str, peaks: dict[str, float]) -> None:
    """Peak rates of Appendix B; cyclic has five triangles; wsd 10% of warm-up and of decay; the others none."""
    c, grid = loaded(name)
    eta = {}
    for p in (change(c, changes) for changes in grid):
        arguments = p.schedule.to_dict()
        eta[p.schedule.name] = schedule(arguments.pop("name"), p.T, peak=p.eta_ref / p.T**0.5, **arguments)
    assert eta.keys() == peaks.keys()
    for shape, peak in peaks.items():
        assert eta[shape].max() == pytest.approx(peak, rel=1e-3)  # linear starts one update below its peak
        assert eta[shape][-1] == pytest.approx(0, abs=1e-12)
    assert np.argmax(eta["linear"]) == np.argmax(eta["cosine"]) == 0
    cyclic = eta["cyclic"]
    assert np.sum((cyclic[1:-1] > cyclic[:-2]) & (cyclic[1:-1] > cyclic[2:])) == 5
    assert np.mean(eta["wsd"] == eta["wsd"].max()) == pytest.approx(0.8, abs=1e-3)


def test_figure_12_ends_at_one_epoch_and_at_820() -> None:
    for name in ("vit.py:imagenet", "resnet18.py:imagenet", "resnet50.py:imagenet"):
        c, grid = loaded(name)
        assert 0.95 < max(point["T"] for point in grid) * c.data.batch_size / 1_281_167 <= 1
    c, grid = loaded("resnet50.py:cifar10")
    assert max(point["T"] for point in grid) * c.data.batch_size / 50_000 == pytest.approx(820, abs=0.01)


@pytest.mark.parametrize("name", DIGITS)
def test_digits_need_no_download(name: str) -> None:
    c, grid = loaded(name)
    assert len(points_of(c, grid)) == len(grid) == 15


@pytest.mark.parametrize("name", ["gpt2.py", "llama.py", "vlm.py", "e2e.py", *DIGITS])
def test_unknown_arguments_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"no argument of configs/{name} 'imagnet'"):
        load(str(CONFIGS / f"{name}:imagnet"))


def test_a_sweep_may_take_the_argument_of_its_config(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    config = "import cdl.config\ndef get_config(arg='3'):\n c = cdl.config.base(); c.T = int(arg); return c\n"
    file.write_text(f"{config}def sweep(arg='3'): return [dict(T=int(arg))]")
    assert load(str(file))[1] == [dict(T=3)]
    assert load(f"{file}:5")[1] == [dict(T=5)]
    file.write_text(f"{config}def sweep(): return [dict(T=4)]")
    assert load(f"{file}:5")[1] == [dict(T=4)]


def test_dry_run_says_what_a_run_takes_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that no machine here could hold, without its data."""
    command = ["train", f"--config={CONFIGS / 'gpt2.py'}:7b-muon", "--dry-run"]
    assert main([*command, "--devices=16", "mesh.tensor=2", "compute.microbatches=2", "--out=out"]) == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    N = gpt2_parameters("7B")
    assert said["parameters"] == f"{N:,}"
    assert said["batch"] == "64 x 1024 tokens, 2 x 4 on a device"
    assert said["mesh"].startswith("run=1 data=1 fsdp=8 tensor=2, 16 of 16 devices")
    L, _, D = SIZES["7B"]
    own = 4 * (N + V * D) / 16  # V is odd, and so the embedding is not split along "tensor"
    memory = [float(word) for word in said["memory"].split() if word[0].isdigit()]
    assert memory[:2] == pytest.approx([2 * own / 1e9, own / 1e9], rel=0.005)
    flops = 6 * 64 * S * (N - (S + 2) * D - 13 * L * D + 2 * L * S * D)  # products of weights, and scores
    assert float(said["FLOPs"].split()[0]) == pytest.approx(flops, rel=1e-3)
    assert not Path("out").exists()
    for wrong, why in [
        (["--devices=0"], "--devices=0 must be at least 1"),
        (["--devices=7"], "data.batch_size=64 must be a multiple of mesh.data=1 x mesh.fsdp=7"),
        (["model.d_model=100"], "model.d_model=100 must be a multiple of model.n_head=32"),
        (["T=1"], "no positive rate at T=1"),
        (["data.seq_len=2048"], "data.seq_len=2048 exceeds model.context=1024"),
        (["data.batch_size=0"], "data.batch_size=0 must be at least 1"),
        (["data.heldout=3"], "data.heldout=3.0 must be a share"),
        (["init=nowhere"], "init='nowhere' does not exist"),
    ]:
        assert main([*command, *wrong]) == 2
        assert why in capsys.readouterr().err
    assert main([*command[:-1], "--devices=8"]) == 2
    assert "--devices=8 is for --dry-run" in capsys.readouterr().err


def test_dry_run_counts_adapters_apart_from_what_they_adapt(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 4 beside the kernels [D, 3 D] of 12 layers; AdamW's moments and the gradients are of adapters alone."""
    assert main(["train", f"--config={CONFIGS / 'e2e.py'}:lora", "--dry-run", "--devices=1"]) == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    adapters, D = 12 * 4 * (768 + 3 * 768), 768
    assert said["parameters"] == f"{124_439_808 + adapters:,}, {adapters:,} of them trained"
    memory = [float(word) for word in said["memory"].split() if word[0].isdigit()]
    assert memory[:2] == pytest.approx([4 * (124_439_808 + 3 * adapters) / 1e6, 4 * adapters / 1e6], rel=0.005)
    products = 124_439_808 - (S + 2) * D - 13 * 12 * D  # with frozen weights: forward, and backward to the input
    flops = 8 * 256 * (4 * products + 12 * 6 * 2 * 256 * D + 6 * adapters)
    assert float(said["FLOPs"].split()[0]) == pytest.approx(flops, rel=1e-3)
