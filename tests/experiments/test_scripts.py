"""The scripts of the paper's figures: configs of every scale, what is said of claims, and that they go on."""

import json
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cdl
from cdl import config
from cdl.sweep.programs import eta_of, eval_steps, parts_of

from ..conftest import TINY
from .conftest import EXPERIMENTS

SCRIPTS = sorted(f.stem for f in EXPERIMENTS.glob("*.py") if f.stem[:3] in ("fig", "tab"))


def test_commands_are_for_everybody(script: Callable[[str], ModuleType]) -> None:
    def command(changes: list[str], **given: Any) -> str:
        return script("paper")._command("fig06_peak", Namespace(**(dict(scale="laptop", data=None) | given)), changes)

    assert command([]) == "python experiments/fig06_peak.py"
    assert command([], scale="paper", data="/home/me/x") == "python experiments/fig06_peak.py --scale=paper --data=PATH"
    assert command(["seed=3", "data.path=/home/me/d"]).endswith("fig06_peak.py seed=3 data.path=PATH")


def test_results_are_of_the_grids_of_today_and_of_nobodys_machine(script: Callable[[str], ModuleType]) -> None:
    for file in (EXPERIMENTS / "results").glob("*-laptop.json"):
        made = json.loads(file.read_text(), parse_constant=pytest.fail)
        module = script(made["script"])
        if made["script"] == "fig13_fine_tuning":
            sizes = module.SIZES["laptop"]
            sweeps = module.pretraining("laptop")
            sweeps += [module.fine_tuning("laptop", size, "", which) for size in sizes for which in ("full", "lora")]
        elif hasattr(module, "lines_at_best_rates"):
            sweeps = script("best_rates").sweeps("laptop")
        else:
            sweeps = getattr(module, "sweeps", lambda scale: [])("laptop")
        sweeps = list(sweeps.values()) if isinstance(sweeps, dict) else sweeps
        assert made["runs"] == sum(len(sweep.grid) for sweep in sweeps), file.name
        assert made["command"] == f"python experiments/{made['script']}.py"


def test_every_figure_and_table_has_a_script() -> None:
    numbers = {name[:5] for name in SCRIPTS}
    assert numbers == {f"fig{n:02d}" for n in range(1, 14)} | {"tab01", "tab02", "tab06", "tab07"}
    page = (EXPERIMENTS / "RESULTS.md").read_text()
    assert all(f"experiments/{name}.py" in page for name in SCRIPTS)


def test_the_page_of_results_is_of_the_results_beside_it(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = script("results")
    monkeypatch.setattr(results, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["results.py"])
    results.main()
    assert (tmp_path / "page.md").read_text() == (EXPERIMENTS / "RESULTS.md").read_text()


@pytest.mark.parametrize("scale", ["laptop", "gpu", "paper"])
@pytest.mark.parametrize(
    "name", [x for x in SCRIPTS if x not in ("fig01_exam", "tab01_schedules", "fig13_fine_tuning")]
)
def test_every_run_of_every_scale_can_be_built(
    name: str, scale: str, script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that can be checked of a config without its data. The paths of weights are there, as far as that goes."""
    module = script(name)
    if not hasattr(module, "sweeps"):
        module = script("best_rates")
    monkeypatch.chdir(tmp_path)
    for folder in ("siglip2", "smollm2"):
        (tmp_path / "weights" / folder).mkdir(parents=True)
    sweeps = module.sweeps(scale)
    programs = set()
    for sweep in sweeps.values() if isinstance(sweeps, dict) else sweeps:
        for changes in sweep.grid:
            c = config.change(sweep.config, changes)
            eta_of(c)
            eval_steps(c)
            key = repr({k: v for k, v in config.flatten(c).items() if k not in ("T", "eta_ref", "seed")})
            if key not in programs:
                parts_of(c)
                programs.add(key)
    assert bool(programs) != (scale == "paper" and name[:5] in ("fig06", "fig07", "tab02", "tab06"))


@pytest.mark.parametrize("scale", ["laptop", "gpu", "paper"])
def test_fine_tuning_can_be_built(
    scale: str, script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("fig13_fine_tuning")
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2", "gpt2-medium", "gpt2-large"):
        (tmp_path / "weights" / folder).mkdir(parents=True)
    for sweep in module.pretraining(scale):
        parts_of(config.change(sweep.config, sweep.grid[0]))
    for size in module.SIZES[scale]:
        for which in ("full", "lora"):
            sweep = module.fine_tuning(scale, size, str(tmp_path), which)
            model, _ = parts_of(config.change(sweep.config, sweep.grid[0]))
            assert (model.frozen is not None) == (which == "lora")


@pytest.mark.slow
def test_a_script_trains_what_is_not_there_and_writes_what_it_found(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paper, module = script("paper"), script("fig09_gpt2_muon_horizons")
    tiny, grid = config.load(TINY)
    monkeypatch.setattr(module, "sweeps", lambda scale: [paper.Sweep("tiny", tiny, grid)])
    monkeypatch.setattr(sys, "argv", ["fig09.py", f"--out={tmp_path}", "eval.times=2"])

    def run() -> Any:
        with pytest.raises(SystemExit) as left:
            paper.main(module.__file__, module.__doc__, module.experiment)
        return left.value.code

    assert run() == 0
    written = json.loads((tmp_path / "fig09_gpt2_muon_horizons.json").read_text())
    assert (written["runs"], len(written["claims"]), written["scale"]) == (8, 3, "laptop")
    table = cdl.sweep_table(tmp_path / "tiny")
    assert set(table["eval.times"]) == {2}
    line = cdl.fit_horizon(table).lines[0]
    assert written["numbers"]["lines"]["0.5"]["r2"] == pytest.approx(line.r2)
    assert (tmp_path / "fig09_gpt2_muon_horizons.png").stat().st_size > 10_000
    capsys.readouterr()
    assert run() == 0
    assert "nothing to train" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["fig09.py", f"--out={tmp_path}", "eval.tims=2"])
    assert run() == 2
    assert "eval.times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fig06_peak.py", "--scale=paper"], "give --data, the folder with the two files of step-law/steplaw"),
        (["fig06_peak.py", "--scale=paper", "--data=/nowhere"], "lacks dense_lr_bs_loss.csv"),
        (["tab06_chinchilla.py", "--scale=paper", "--data=/no.csv"], "lacks no.csv"),
        (["fig09_gpt2_muon_horizons.py", "--scale=paper"], "data.path='data/openwebtext' does not exist"),
        (["fig01_exam.py", "--scale=huge"], "invalid choice: 'huge'"),
        (["fig09_gpt2_muon_horizons.py", "--data=x"], "--data=x is of scripts that read published runs"),
        (["fig06_peak.py", "--data=x"], "with --scale=paper"),
        (["results.py", "."], "holds no numbers of a script"),
    ],
)
def test_errors(
    arguments: list[str],
    said: str,
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *rest = arguments
    script("paper")  # finds what lies beside it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *rest])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXPERIMENTS / name), run_name="__main__")
    assert left.value.code != 0
    assert said in f"{capsys.readouterr().err}{left.value.code}"
