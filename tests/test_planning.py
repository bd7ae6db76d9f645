"""Plans from several sweeps: of one setting but for model size, in words that can be acted on."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cdl
from cdl.cli import main
from cdl.config import base, change, flatten
from cdl.errors import UserError
from cdl.laws.horizon import NoLaw
from cdl.planning import Plan, ScalingPlan, plan
from cdl.sweep.grid import Point
from cdl.sweep.store import Store

CURVE = {"step": np.arange(2), "eta": np.ones(2), "train_loss": np.ones(2), "eval_loss": np.ones(2)}
HORIZONS = [400, 700, 1000, 1600, 2500]
WIDTHS = {32: 30_000, 64: 120_000, 128: 480_000}  # width: parameters that the results name


def sweep(folder: Path, width: int, rates: tuple[float, ...] = (0.5, 1.0, 2.0), **changes: Any) -> Path:
    """A finished sweep whose losses are on the law: L_inf falls by 0.3 a factor of ten, Q is 19."""
    store = Store(folder)
    store.root.mkdir(parents=True)
    N, rng = WIDTHS[width], np.random.default_rng(width)
    for eta_ref in rates:
        for T in HORIZONS:
            fields = {"eta_ref": eta_ref, "T": T, "model.d_model": width} | changes
            loss = 4 - 0.3 * math.log10(N) + (19 + 4 * abs(math.log2(eta_ref))) / T**0.5
            result = dict(status="done", loss=loss + 0.001 * rng.standard_normal(), train_loss=1.0, seconds=1.0)
            point = Point(flatten(change(base(), fields)), "f")
            store.write(point, CURVE, result | dict(eta_peak=eta_ref / T**0.5, n_params=N))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pilots")
    return [sweep(root / f"w{width}", width, (0.5, 1.0, 2.0) if width == 32 else (1.0,)) for width in WIDTHS]


def test_a_larger_model_is_planned_for(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(folders, T=20_000, N=5e6)
    assert isinstance(made, ScalingPlan)
    assert made.eta_ref == 1.0
    assert made.eta_peak == pytest.approx(1 / math.sqrt(20_000))
    assert made.prediction is not None
    assert 4 - 0.3 * math.log10(5e6) + 19 / math.sqrt(20_000) in made.prediction
    tokens = {
        N: sum(HORIZONS) * (3 if N == 30_000 else 1) * base().data.batch_size * base().data.seq_len
        for N in WIDTHS.values()
    }
    assert made.pilots_flops == pytest.approx(sum(6 * N * D for N, D in tokens.items()))
    assert made.flops == pytest.approx(6 * 5e6 * 20_000 * base().data.batch_size * base().data.seq_len)
    said = re.search(
        r"train N=5e\+06, T=20000 at a peak rate of (\S+) \(eta_ref\*=1\); expect a loss of (\S+) \(95%", made.summary()
    )
    assert said
    assert float(said[1]) == pytest.approx(made.eta_peak, rel=1e-3)
    assert float(said[2]) == pytest.approx(made.prediction.loss, abs=1e-4)
    assert f"the pilots cost {made.pilots_flops / made.flops:.2%} of this run's FLOPs" in made.recommendation()
    assert any("no larger one was tried at other rates" in w for w in made.warnings)
    assert main(["plan", *map(str, folders), "--T=20000", "--N=5e6"]) == 0
    assert capsys.readouterr().out == made.summary() + "\n"
    assert len(made.plot().axes) == 3


def test_the_order_of_the_folders_and_their_split_do_not_matter(folders: list[Path]) -> None:
    there, back = plan(folders, 20_000, 5e6), plan([*folders[::-1], folders[0]], 20_000, 5e6)
    assert there.summary() == back.summary()
    largest = plan(folders)  # what is not said: the largest size, four times the longest horizon
    assert isinstance(largest, ScalingPlan)
    assert (largest.N, largest.T) == (480_000, 10_000)


def test_one_folder_alone_is_planned_by_its_own_lines(folders: list[Path]) -> None:
    made = plan(folders[0], 20_000)
    assert isinstance(made, Plan)
    assert made.summary() == plan([folders[0]], 20_000).summary() == cdl.plan(str(folders[0]), 20_000).summary()
    same = plan(folders[0], 20_000, N=30_000)
    assert isinstance(same, ScalingPlan)
    assert same.prediction == made.prediction
    assert same.eta_ref == made.eta_ref


def test_one_size_gives_another_its_rate_and_no_loss(folders: list[Path]) -> None:
    made = plan(folders[0], 20_000, N=5e6)
    assert isinstance(made, ScalingPlan)
    assert made.prediction is None
    assert "at a peak rate of 0.007071 (eta_ref*=1); which loss to expect cannot be said" in made.summary()
    assert any("nothing is known of how the loss changes with N; add pilots of other sizes" in w for w in made.warnings)
    two = plan(folders[:2], 20_000, N=5e6)
    assert re.search(r"expect a loss of about \S+, with no interval", two.summary())


def test_plans_are_drawn(folders: list[Path], tmp_path: Path) -> None:
    """As a page with the words of the plan in it, and not over a file of the sweep."""
    words = [str(f) for f in folders]
    page, T = tmp_path / "plan.html", "--T=10000"
    assert main(["plan", *words, T, "--N=1000000", f"--plot={page}"]) == 0
    assert plan(words, T=10000, N=1_000_000).recommendation()[:40] in page.read_text()
    assert "<svg" in page.read_text()
    assert main(["plan", *words, T, f"--plot={folders[0]}/x.csv"]) == 2
    assert main(["plan", words[0], T, f"--plot={tmp_path}/plan.png"]) == 0
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_folders_that_differ_in_more_than_size_are_refused(folders: list[Path], tmp_path: Path) -> None:
    other = sweep(tmp_path / "batch", 64, (1.0,), **{"data.batch_size": 4})
    with pytest.raises(NoLaw, match=r"differ in data.batch_size .*one law does not fit them; plan with sweeps"):
        plan([folders[0], other], 20_000, 5e6)
    vocabulary = sweep(tmp_path / "vocabulary", 64, (1.0,), **{"model.vocab_size": 512})
    with pytest.raises(NoLaw, match=r"differ in model.vocab_size"):
        plan([folders[0], vocabulary], 20_000, 5e6)
    deeper = sweep(tmp_path / "deeper", 64, (1.0,), **{"model.n_layer": 3})
    assert plan([folders[0], deeper], 20_000, 5e6).fit


def test_bad_input_is_named(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--T=0"], ["--T=100", "--N=0"]):
        assert main(["plan", *map(str, folders), *arguments]) == 2
        assert "both must be at least 1" in capsys.readouterr().err
    assert main(["plan", str(folders[0]), str(tmp_path / "none")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    with pytest.raises(UserError, match="no folder to plan from"):
        plan([])
    old = sweep(tmp_path / "old", 64)
    for result in old.glob("*/result.json"):
        result.write_text(re.sub(r',\s*"n_params": \d+', "", result.read_text()))
    with pytest.raises(UserError, match="old lack the number of parameters, n_params; train them anew"):
        plan(old, N=5e6)
    assert plan(old).T == 10_000  # without N there is no need of it
