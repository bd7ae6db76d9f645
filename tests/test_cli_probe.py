"""`cdl probe` on real runs, and which of a run's iterates are kept for it."""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import cdl
from cdl import cli_sweep, probing
from cdl.cli import main
from cdl.data import build as data
from cdl.errors import UserError
from cdl.models import build as models
from cdl.models import resnet
from cdl.sweep.grid import Point, points_in
from cdl.sweep.programs import eta_of
from cdl.sweep.store import Store
from cdl.train.checkpoint import read_weights

from .conftest import TINY

IMAGES = TINY.replace("tiny", "tiny_images")
STEPS = ["checkpoint.steps=4", "checkpoint.keep=6"]


def point_in(folder: Path) -> Point:
    return points_in(Store(folder).grids()[0])[0]


def saved(folder: Path, id: str) -> list[int]:
    return sorted(int(f.name.removeprefix("step_")) for f in (folder / "checkpoints" / id).glob("step_*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 32 updates with its last six iterates."""
    out = tmp_path_factory.mktemp("probe") / "run"
    assert main(["train", f"--config={TINY}", f"--out={out}", "T=32", "seed=3", *STEPS, "--keep"]) == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, of which each test may do what it likes."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def probed(folder: Path, **options: Any) -> dict[str, Any]:
    return cdl.probe(folder, point_in(folder).id, **(dict(samples=128, curvature=0) | options)).numbers()


def test_a_finished_run_keeps_its_newest_iterates_where_asked_to(trained: Path) -> None:
    assert saved(trained, point_in(trained).id) == [12, 16, 20, 24, 28, 32]


def test_a_probe_measures_the_iterates_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses, distances and tangents against what the model itself says of the checkpoints."""
    point = point_in(run)
    assert main(["probe", str(run), point.id[:5], "--samples=128", "--curvature=2"]) == 0
    folder = run / "probes" / point.id
    made = json.loads((folder / "probe.json").read_text())
    assert made["step"] == [0, 12, 16, 20, 24, 28, 32]
    c = point.config
    model, dataset = models.build(c.model.to_dict()), data.build(c.data)
    batches = dataset.batches(2**32 - 1, 0)
    sample = [next(batches) for _ in range(2)]

    def mean(params: Any) -> Any:
        sums = [model.loss(params, {}, dataset.prepare(batch), train=False)[0] for batch in sample]
        return sum(s.loss for s in sums) / sum(s.count for s in sums)

    iterates = [model.init(3)[0]] + [read_weights(run / "checkpoints" / point.id / f"step_{s}")[0] for s in (20, 32)]
    loss, grad = jax.jit(jax.value_and_grad(mean))(iterates[1])
    found = [made["loss"][i] for i in (0, 3, 6)]
    assert found == pytest.approx([float(mean(iterates[0])), float(loss), float(mean(iterates[2]))], rel=2e-6)
    d = jax.tree.map(lambda a, b: np.subtract(a, b, dtype=float), iterates[1], iterates[2])
    inner = sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(d), jax.tree.leaves(grad), strict=True))
    assert made["inner"][3][6] == pytest.approx(inner, rel=1e-4)
    assert made["gap"][3][6] == pytest.approx(found[1] - found[2] - inner, rel=1e-3)
    assert made["star_last"] == [row[6] for row in made["gap"]]
    assert made["to_end"][3] == pytest.approx(sum(np.vdot(x, x) for x in jax.tree.leaves(d)) ** 0.5)
    assert made["gradient_norm"][3] == pytest.approx(sum(np.vdot(x, x) for x in jax.tree.leaves(grad)) ** 0.5, rel=1e-4)
    assert made["G"] ** 2 == max(made["mean_square"])
    assert all(mean >= whole**2 for mean, whole in zip(made["mean_square"], made["gradient_norm"], strict=True))
    assert made["rate"] == [*eta_of(c)[[0, 12, 16, 20, 24, 28]], eta_of(c)[31]]
    assert [b["step"] for b in made["curvature"]] == [0, 32]
    assert made["curvature"][0]["largest"] > 0 > made["curvature"][0]["smallest"]
    whole = made["segments"][0]
    assert (whole["from"], whole["to"]) == (0, 32)
    assert (whole["loss_N"][0], whole["loss_N"][-1]) == pytest.approx((found[0], found[2]), rel=2e-6)
    assert 0 <= made["rounding"] < 1e-5
    assert (folder / "probe.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "7 iterates, steps 0 to 32" in said
    assert f"weakly convex along the path from step {made['convex_from']} on: gap <= 0.0001" in said
    assert f"Figure: {folder / 'probe.png'}" in said


def test_a_run_under_way_is_probed_by_what_is_sealed(run: Path) -> None:
    """Of one that another process trains: no result yet, a checkpoint half written, one that goes meanwhile."""
    id = point_in(run).id
    finished = probed(run)
    shutil.rmtree(run / id)
    folder = run / "checkpoints" / id
    shutil.rmtree(folder / "step_32")
    (folder / "step_36.orbax-checkpoint-tmp").mkdir()
    made = probed(run)
    assert (finished["status"], made["status"]) == ("done", "under way")
    assert made["step"] == [0, 12, 16, 20, 24, 28]
    assert made["gap"] == [row[:-1] for row in finished["gap"][:-1]]


def test_iterates_that_are_removed_while_they_are_read_are_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    id = point_in(run).id
    shutil.rmtree(run / id)

    def read(path: Path) -> Any:
        if path.name == "step_16" and path.exists():
            shutil.rmtree(path)
        return read_weights(path)

    monkeypatch.setattr(probing, "read_weights", read)
    assert probed(run)["step"] == [0, 12, 20, 24, 28, 32]


def test_a_damaged_iterate_is_said(run: Path) -> None:
    id = point_in(run).id
    (run / "checkpoints" / id / "step_20" / "record.json").write_text("{")
    with pytest.raises(UserError, match="step_20"):
        probed(run)


def test_which_iterates_are_used_can_be_said(run: Path) -> None:
    assert probed(run, iterates=4)["step"] == [0, 12, 20, 32]
    assert probed(run, T=27)["step"] == [0, 12, 16, 20, 24]


@pytest.mark.slow
def test_more_iterates_than_memory_holds_are_read_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = probed(run)
    size = sum(x.nbytes for x in jax.tree.leaves(models.build(point_in(run).config.model.to_dict()).init(0)))
    reads = Counter[str]()

    def read(path: Path) -> Any:
        reads[path.name] += 1
        return read_weights(path)

    monkeypatch.setattr(probing, "free_memory", lambda: 7 * size)
    monkeypatch.setattr(probing, "read_weights", read)
    capsys.readouterr()
    assert probed(run) == whole
    assert "memory holds 3 of 7 iterates" in capsys.readouterr().err
    assert (reads["step_12"], reads["step_16"]) == (1, 1)  # kept, with the first
    assert min(reads[f"step_{s}"] for s in (20, 24, 28, 32)) >= 7  # for each gradient
    reads.clear()
    with pytest.raises(UserError, match="--curvature=0"):
        probed(run, curvature=1)
    assert not reads  # before anything is measured in vain


@pytest.mark.slow
def test_batch_normalisation_uses_the_statistics_of_each_iterate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(resnet.DEPTHS, 18, ((1,), False))  # one block instead of eight: they take long to compile
    model = ["model.name=resnet", "model.stem=cifar", "model.classes=10", "model.width=2", "data.augment=none"]
    model += ["optimizer.name=sgd", "eta_ref=0.3"]
    out = tmp_path / "run"
    assert (
        main(["train", f"--config={IMAGES}", f"--out={out}", "T=6", "--keep", *STEPS[1:], "checkpoint.steps=3", *model])
        == 0
    )
    point = point_in(out)
    made = probed(out, samples=32)
    assert made["step"] == [0, 3, 6]
    net, dataset = models.build(point.config.model.to_dict()), data.build(point.config.data)
    batches = dataset.batches(2**32 - 1, 0)
    sample = [dataset.prepare(next(batches)) for _ in range(2)]
    params, stats, _ = read_weights(out / "checkpoints" / point.id / "step_3")
    sums = [jax.jit(net.loss, static_argnums=3)(params, stats, batch, False)[0] for batch in sample]
    assert made["loss"][1] == pytest.approx(float(sum(s.loss for s in sums) / sum(s.count for s in sums)), rel=1e-5)


def test_what_is_wrong_is_said_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = point_in(run).id
    (run / "file").touch()
    for words, said in (
        (["zz"], "'zz' is the beginning of no run"),
        ([id, "--T=8"], "up to --T=8 none is saved"),
        ([id, "--T=13"], "one, of step 12 is saved, and probing needs two; train with checkpoint.steps=20"),
        ([id, "--samples=0"], "--samples=0 must be at least 1"),
        ([id, "--iterates=2"], "--iterates=2 must be at least 3"),
        ([id, "--curvature=-1"], "--curvature=-1"),
        ([id, "--tolerance=-1"], "--tolerance=-1"),
        ([id, f"--out={run / 'file'}"], "is a file; choose a folder"),
    ):
        assert main(["probe", str(run), *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_unasked_a_run_keeps_its_last_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the error says how to have more."""
    out = tmp_path / "run"
    assert main(["train", f"--config={TINY}", f"--out={out}", "T=32", *STEPS]) == 0
    id = point_in(out).id
    assert saved(out, id) == [32]
    capsys.readouterr()
    assert main(["probe", str(out), id]) == 2
    assert "checkpoint.steps=20 checkpoint.keep=1000 --keep" in capsys.readouterr().err


def test_a_diverged_run_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diverging = ["optimizer.name=sgd", "eta_ref=1e9", "T=32", "--keep", *STEPS]
    assert main(["train", f"--config={TINY}", f"--out={tmp_path}", *diverging]) == 0
    capsys.readouterr()
    assert main(["probe", str(tmp_path), ""]) == 2
    assert "has diverged, and of such runs no iterates are kept" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_keeps_the_iterates_of_all_its_runs_where_asked_to(tmp_path: Path) -> None:
    out, config = tmp_path / "sweep", tmp_path / "two.py"
    config.write_text(
        Path(TINY).read_text().replace("T=[40, 60, 90, 130]", "T=[24, 32]").replace("[0.5, 2.0]", "[1.0]")
    )
    assert main(["sweep", f"--config={config}", f"--out={out}", *STEPS, "--keep"]) == 0
    kept = {p.config.T: saved(out, p.id) for p in points_in(Store(out).grids()[0])}
    assert kept == {24: [4, 8, 12, 16, 20, 24], 32: [12, 16, 20, 24, 28, 32]}


@pytest.mark.parametrize("keep", [True, False])
def test_workers_are_told_to_keep_iterates(keep: bool, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    monkeypatch.setattr(cli_sweep, "Local", lambda command, shares, logs: words.extend(command))
    arguments = argparse.Namespace(keep=keep, tensorboard=False, wandb=None, backend="local", workers=1)
    cli_sweep._backend(arguments, trained, [point_in(trained)], None)
    assert ("--keep" in words) == keep
