"""The command line with wrong input, one line and exit code 2 each; and `cdl train`."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cdl
from cdl.cli import _parser, main
from cdl.schedules import SHAPES
from cdl.sweep.store import sweep_table
from cdl.theory.optimal import best_schedule

from .conftest import TINY

SWEEP = ["sweep", f"--config={TINY}", "--out=OUT"]
TRAIN = ["train", f"--config={TINY}", "--out=OUT"]
IMAGES = ["train", f"--config={TINY.replace('tiny', 'tiny_images')}", "--out=OUT"]
RESNET = [*IMAGES, "model.name=resnet", "model.stem=cifar", "model.classes=10", "model.width=4"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([*SWEEP, "modle.n_layer=3"], "no config field 'modle.n_layer'; did you mean 'model.n_layer'"),
        ([*SWEEP, "model.n_layer=many"], "model.n_layer='many' must be a number"),
        ([*SWEEP, "schedule.name=cosin"], "no schedule 'cosin'; did you mean 'cosine'"),
        ([*SWEEP, "optimizer.name=adam"], "no optimizer 'adam'; did you mean 'adamw'"),
        ([*SWEEP, "optimizer.momentum=1.5"], "optimizer.momentum=1.5"),
        ([*SWEEP, "model.name=gpt3"], "no model 'gpt3'; did you mean 'gpt2'"),
        ([*SWEEP, "model.n_head=3"], "model.d_model=8 must be a multiple of model.n_head=3"),
        ([*SWEEP, "model.vocab_size=100"], "model.vocab_size=100 is too small for data.path='stdlib'"),
        ([*SWEEP, "schedule.warmup=40"], "warmup=40 is 40 updates of T=40; use fewer than T"),
        ([*SWEEP, "data.path=/no/such/text"], "data.path='/no/such/text' does not exist"),
        ([*SWEEP, "data.path=SHORT"], "one batch of 4 x 16 needs 65"),
        ([*SWEEP, "data.seq_len=17"], "data.seq_len=17 exceeds model.context=16"),
        ([*SWEEP, "data.batch_size=0"], "data.batch_size=0 must be at least 1"),
        ([*SWEEP, "eval.times=0"], "eval.times=0"),
        ([*SWEEP, "seed=-1"], "seed=-1"),
        ([*SWEEP, "seed=4294967295"], "seed=4294967295 must be in [0, 2^32 - 2]"),
        ([*SWEEP, "eta_ref=3.0"], "eta_ref is an axis of the sweep"),
        ([*SWEEP, "--lanes=0"], "--lanes=0"),
        ([*SWEEP, "--lanes=9"], "--lanes=9 exceeds the number of CPU cores, 8"),
        ([*SWEEP, "optimizer.weight_decay=1e999"], "optimizer.weight_decay=inf"),
        ([*SWEEP, "data.path="], "data.path is empty"),
        ([*SWEEP, "--nonsense", "eval.times=2"], "unrecognized arguments: --nonsense"),
        ([*SWEEP, "T"], "'T' is no change of a config field"),
        ([*TRAIN, "T=0"], "T=0 must be a whole number, at least 1"),
        ([*TRAIN, "T=1.5"], "T=1.5 must be a whole number"),
        ([*TRAIN, "eta_ref=-1"], "eta_ref=-1.0 must be a positive number"),
        ([*TRAIN, "eta_ref=1e999"], "eta_ref=inf must be a positive number"),
        ([*TRAIN, "T=1"], "schedule 'cosine' has no positive rate at T=1"),
        ([*TRAIN, "mesh.data=3", "mesh.fsdp=-1"], "needs a multiple of 3 devices and there are 8"),
        (
            [*TRAIN, "mesh.data=16"],
            "mesh.data=16, mesh.fsdp=1, mesh.tensor=1 needs a multiple of 16 devices and there are 8",
        ),
        ([*TRAIN, "mesh.data=-1", "mesh.tensor=-1"], "only one of data, fsdp and tensor can be -1"),
        ([*TRAIN, "mesh.data=0"], "each must be at least 1, or -1"),
        ([*TRAIN, "mesh.data=8"], "data.batch_size=4 must be a multiple of mesh.data=8 x mesh.fsdp=1"),
        ([*TRAIN, "compute.microbatches=3"], "x compute.microbatches=3"),
        ([*TRAIN, "compute.microbatches=0"], "compute.microbatches=0"),
        ([*TRAIN, "compute.remat=some"], "no compute.remat 'some'; known: dots, full, none"),
        ([*TRAIN, "compute.attention=flash"], "no compute.attention 'flash'"),
        ([*TRAIN, "model.dtype=float16"], "no model.dtype 'float16'"),
        ([*TRAIN, "checkpoint.seconds=0"], "checkpoint.seconds=0.0"),
        ([*TRAIN, "optimizer.clip_norm=-1"], "optimizer.clip_norm=-1"),
        ([*TRAIN, "data.name=images"], "model.name='gpt2' takes data.name='text'"),
        ([*TRAIN, "data.name=pictures"], "no kind of data 'pictures'"),
        ([*TRAIN, "--coordinator=10.0.0.1:1"], "belong together"),
        ([*TRAIN, "--distributed", "--process=1"], "finds the other processes by itself"),
        ([*IMAGES, "model.classes=9"], "model.classes=9 is too small for data.path='digits', which has 10 classes"),
        ([*IMAGES, "model.image_size=16"], "gives images of 8 x 8 and model.image_size is 16"),
        ([*IMAGES, "data.batch_size=5000"], "1617 images for training, one batch needs 5000"),
        ([*IMAGES, "data.augment=flop"], "'flop'"),
        ([*IMAGES, "data.std=(0,0,0)"], "data.std=(0, 0, 0) must be three numbers, one a channel, above 0"),
        ([*IMAGES, "data.mean=(0.5,)"], "data.mean=(0.5,) must be three numbers"),
        ([*IMAGES, "compute.workers=1000"], "compute.workers=1000 must be from 0 to 256"),
        ([*TRAIN, "compute.attention=cudnn"], "compute.attention='cudnn' needs an NVIDIA GPU"),
        ([*RESNET, "compute.microbatches=2"], "normalises over the whole batch; use 1"),
        (["train", "--config=absent.py"], "--config='absent.py' does not exist"),
        (["train"], "the following arguments are required: --config"),
        (["sweeep"], "invalid choice: 'sweeep'"),
        ([], "required: VERB"),
        (["report", "/no/such/folder"], "/no/such/folder holds no finished run"),
        (["plan", "OUT"], "holds no finished run"),
        (["plan", "OUT", "--T=1.5"], "'1.5' is no whole number, such as 1000 or 1e5"),
        (["bound", "cosine"], "'cosine' has no horizon; give T"),
        (["bound", "cosin", "--T=10"], "no schedule or file 'cosin'; did you mean 'cosine'"),
        (["bound", "OUT.csv"], "does not exist; give a schedule"),
        (["bound", "SHORT"], "holds no numbers"),
        (["bound", "wsd:decay", "--T=10"], "'wsd:decay' must look like wsd:decay=0.2,form=sqrt"),
        (["bound", "wsd:decai=0.1", "--T=10"], "no argument of schedule 'wsd' 'decai'; did you mean 'decay'"),
        (["bound", "wsd:decay=__import__('os')", "--T=10"], "must look like wsd:decay=0.2"),
        (["bound", "cosine", "--T=1e20"], "at most 10^8"),
        (["bound", "cosine", "--T=-5"], "T=-5 must be a whole number, at least 1"),
        (["bound", "cosine", "--T=10", "--D=-1"], "D=-1 must be a finite number, at least 0"),
        (["bound", "cosine", "--T=10", "--G=OUT.npy"], "does not exist"),
        (["bound", "cosine", "--T=10", "--G=0"], "G=0 makes every larger rate better"),
        (["bound", "linear", "--T=1"], "no positive rate"),
        (["bound", "cosine", "--T=10", "--peak=0"], "peak=0.0 must be a positive number"),
        (["bound", "cosine", "--T=10", "--plot=OUT.bmp"], "must end in .png, .pdf or .svg"),
        (["bound", "cosine", "--T=10", "--plot=OUT/a.png"], "there is no folder"),
        (["bound", "SHORT", "--csv=SHORT"], "would overwrite another file of this command"),
        (["bound", "SHORT", "--plot=FOLDER/../short.txt.png", "--csv=SHORT.png"], "would overwrite another file"),
        (["bound", "cosine", "--T=10", "--csv=FOLDER"], "is a folder; give the name of a file"),
        (["bound", "cosine", "--T=10", "--D=0"], "D=0 starts at a minimiser"),
        (["bound", "cosine", "--T=10", "--G=1e200"], "G must lie between 1e-100 and 1e+100"),
        (["optimal", "--T=10", "--past=constant:T=5", "--D=0"], "D=0 starts at a minimiser"),
        (["exam", "cosin"], "cosin"),
        (["exam", "x - 2"], "x - 2"),
        (["exam", "__import__('os').system('touch OUT')"], "__import__"),
        (["optimal"], "the following arguments are required: --T"),
        (["optimal", "--T=0"], "T=0 must be a whole number, at least 1"),
        (["optimal", "--T=10", "--past=constant:T=10"], "T=10 must be larger than the 10 updates"),
        (["optimal", "--T=10", "--past=constant:T=5", "--peak=1"], "--peak=1 and --past do not go together"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a text of thirty-five characters ..")
    (tmp_path / "folder").mkdir()
    places = {"OUT": str(tmp_path / "out"), "SHORT": str(tmp_path / "short.txt"), "FOLDER": str(tmp_path / "folder")}
    for name, path in places.items():
        command = [word.replace(name, path) for word in command]
    try:
        code = main(command)
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()  # nothing is begun before everything is checked


def test_bounds_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "rates.csv"
    rates.write_text("step,lr\n" + "".join(f"{k},{0.1 / k}\n" for k in range(1, 51)))
    norms = tmp_path / "norms.npy"
    np.save(norms, np.linspace(1, 2, 50))
    figure, table = tmp_path / "a.png", tmp_path / "a.csv"
    schedules = ["wsd:decay=0.2,form=sqrt", "linear:peak=0.3", str(rates)]
    assert main(["bound", *schedules, "--T=50", f"--G={norms}", f"--plot={figure}", f"--csv={table}"]) == 0
    said = capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    written = pd.read_csv(table)
    assert list(written.columns) == ["schedule", "step", "eta", "bound", "average_bound"]
    for name in schedules:
        eta_T = written[written["schedule"] == name]["eta"].to_numpy()
        curve = cdl.bound_curve(eta_T, G=np.linspace(1, 2, 50))
        np.testing.assert_allclose(written[written["schedule"] == name]["bound"], curve, rtol=1e-12)
        assert f"{curve[-1]:.6g}" in said
    wsd, linear, own = (written[written["schedule"] == name]["eta"].max() for name in schedules)
    assert wsd == pytest.approx(cdl.best_peak(cdl.schedule("wsd", 50, decay=0.2, form="sqrt"), G=np.linspace(1, 2, 50)))
    assert (linear, own) == (0.3 * 49 / 50, 0.1)


@pytest.mark.slow
def test_exam_of_all_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, table = tmp_path / "a.svg", tmp_path / "a.csv"
    assert main(["exam", f"--plot={figure}", f"--csv={table}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[0]: line.split()[1:] for line in lines[1 : 1 + len(SHAPES)]}
    for name in SHAPES:
        says = ["not", "qualified"] * 2 if name in ("constant", "inv_sqrt", "step") else ["qualified"] * 2
        assert verdicts[name][: len(says)] == says
    assert set(pd.read_csv(table)["schedule"]) == set(SHAPES)
    assert "<svg" in figure.read_text()


def test_optimal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "a.csv"
    assert main(["optimal", "--T=60", "--past=constant:T=20,peak=0.1", f"--csv={table}"]) == 0
    assert "free optimum" in capsys.readouterr().out
    ends = pd.read_csv(table).groupby("schedule", sort=False)["bound"].last()
    assert list(ends.index) == ["best", *(name for name in ends.index if name != "best")]
    assert ends["best"] == ends.min()
    best = best_schedule(60)
    assert main(["optimal", "--T=60"]) == 0
    said = capsys.readouterr().out
    linear = next(line.split() for line in said.splitlines() if line.startswith("linear"))
    assert linear[-1] == f"{best.linear / best.bound - 1:+.3%}"
    assert main(["optimal", "--T=60", "--peak=0.05"]) == 0
    said = capsys.readouterr().out
    wsd, bound_of_wsd = next((line.split()[0], line.split()[2]) for line in said.splitlines() if line.startswith("wsd"))
    assert main(["bound", wsd, "--T=60", "--peak=0.05"]) == 0  # the name can be typed
    assert capsys.readouterr().out.splitlines()[1].split()[3] == bound_of_wsd
    assert main(["optimal", "--T=1"]) == 0


def test_a_folder_of_another_sweep_is_refused_and_kept(tiny_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sweep_table(tiny_sweep)
    code = main(["sweep", f"--config={TINY}", f"--out={tiny_sweep}", "data.batch_size=8"])
    said = capsys.readouterr().err
    assert code == 2
    assert "belongs to another sweep: data.batch_size is 4 there and 8 here; choose another --out" in said
    assert said.count("\n") == 1
    assert sweep_table(tiny_sweep).equals(before)


@pytest.mark.slow
def test_train_is_one_run_of_the_same_loop(
    tiny_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "T=60", f"--config={TINY}", "eta_ref=2.0", f"--out={tmp_path / 'one'}", "eval.times=3"]
    assert main(command) == 0
    table = sweep_table(tmp_path / "one")
    same = sweep_table(tiny_sweep).query("T == 60 and eta_ref == 2.0")
    assert table["id"].tolist() == same["id"].tolist()
    assert table["loss"].tolist() == same["loss"].tolist()  # bit-equal: alone here, in company there
    assert f"done: held-out loss {table['loss'][0]:.4f}" in capsys.readouterr().out
    assert main(command) == 0
    assert "the run is there already" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error(tiny_sweep: Path) -> None:
    command = f"{sys.executable} -m cdl.cli plan {tiny_sweep} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def verbs() -> list[str]:
    (choices,) = (a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return list(choices)


def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in verbs():
        with pytest.raises(SystemExit) as e:
            main([verb, "--help"])
        assert e.value.code == 0
        assert f"\n  cdl {verb} " in capsys.readouterr().out.partition("example:")[2]


def test_every_verb_has_a_section_with_output_in_the_docs() -> None:
    page = (Path(cdl.__file__).parents[1] / "docs" / "commands.md").read_text()
    _, *parts = re.split(r"^## (\w+)$", page, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert sections.keys() == set(verbs())
    elsewhere = {"pilot", "probe"}  # which have a page, or a section of one
    assert {verb for verb, text in sections.items() if f"$ cdl {verb}" not in text} == elsewhere
    assert all(re.search(r"\.md[#\w-]*\) has its output", sections[verb]) for verb in elsewhere)
