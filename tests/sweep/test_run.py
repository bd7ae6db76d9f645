"""Sweeps as their user runs them: killed and resumed, extended, repeated."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict
from PIL import Image

import cdl
from cdl.config import flatten, load
from cdl.errors import UserError
from cdl.planning import plan
from cdl.sweep.claims import Worker
from cdl.sweep.grid import Point
from cdl.sweep.programs import points_of
from cdl.sweep.run import run_points
from cdl.sweep.store import Store, sweep_table
from cdl.train.checkpoint import Checkpoints

from ..conftest import TINY

VOLATILE = ["seconds", "seconds_waited", "tokens_per_s", "finished"]


def sweep(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "cdl.cli", "sweep", f"--config={TINY}", f"--out={out}", *arguments]


def equal(a: Path, b: Path) -> None:
    """Two sweep folders hold the same results, bit for bit."""
    left, right = (sweep_table(f).drop(columns=VOLATILE) for f in (a, b))
    pd.testing.assert_frame_equal(left, right, check_exact=True)
    for id in left["id"]:
        pd.testing.assert_frame_equal(Store(a).curve(id), Store(b).curve(id), check_exact=True)


@pytest.mark.slow
def test_sigkill_at_several_moments_loses_and_changes_nothing(long8: str, undisturbed8: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "cdl.cli", "sweep", f"--config={long8}", f"--out={out}"]
    moments = random.Random(0)
    seen: set[str] = set()
    for more in (0, 1, 0, 1):  # kill when this many more points are published, and up to 20 ms later
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (
            len(Store(out).ids()) < len(seen) + more or not (out / "sweep.json").exists()
        ):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.02))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = Store(out).ids()
        assert seen <= now  # what was finished stays,
        Store(out).table()  # and all of it can be read
        seen = now
    assert 0 < len(seen) < 8
    written = {id: (out / id / "result.json").stat().st_mtime_ns for id in seen}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for id, when in written.items():
        assert (out / id / "result.json").stat().st_mtime_ns == when  # not run again
    equal(out, undisturbed8)


def test_ctrl_c_says_what_is_kept(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*sweep(tmp_path / "s"), "eval.size=100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not Store(tmp_path / "s").ids():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    last = said.strip().splitlines()[-1]
    kept, saved = Store(tmp_path / "s").ids(), list((tmp_path / "s").glob("checkpoints/*/step_*"))
    also = " and those under way are saved" if saved else ""  # none where all lanes were between two runs
    assert last == f"cdl: interrupted; {len(kept)} of 8 runs are kept{also}; the same command goes on from there"
    assert "Traceback" not in said


def opened(out: Path) -> tuple[Store, list[Point]]:
    """A store for the sweep of tests/tiny.py, and its points."""
    config, grid = load(TINY)
    assert grid is not None
    points = points_of(config, grid)
    store = Store(out)
    store.open_for(points)
    return store, points


class Nobody:
    """A listener that does nothing."""

    def start(self, *_: Any) -> None: ...
    def block(self, *_: Any) -> None: ...
    def finished(self, *_: Any) -> None: ...
    def finished_elsewhere(self, *_: Any) -> None: ...
    def failed(self, *_: Any) -> None: ...


@pytest.mark.parametrize("file", [TINY, pytest.param(TINY.replace("tiny", "tiny_images"), marks=pytest.mark.slow)])
def test_every_config_field_is_read(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections that go whole to functions that take no unknown argument are read so; other fields one by one."""
    read: set[tuple[frozenset[str], str]] = set()  # (names of the section, name)
    plain = ConfigDict.__getattr__

    def recording(self: ConfigDict, name: str) -> Any:
        read.add((frozenset(self.keys()), name))
        return plain(self, name)

    config, _ = load(file)
    monkeypatch.setattr(ConfigDict, "__getattr__", recording)
    points = points_of(config, [dict(T=4)])
    store = Store(tmp_path / "s")
    store.open_for(points)
    run_points(points, store, [Nobody()])
    monkeypatch.undo()
    whole = ("model", "optimizer", "schedule", "compute", "mesh", "lora")
    sections = [config, config.data, config.eval, config.checkpoint]
    expected = {(frozenset(s.keys()), name) for s in sections for name in s}
    assert len(expected) == len(flatten(config)) - sum(len(config[k]) for k in whole) + len(whole) + 3
    assert expected <= read


@pytest.mark.slow
def test_a_result_that_cannot_be_written_stops_the_sweep_with_all_others_saved(
    tiny_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, points = opened(tmp_path / "s")
    plain, written = store.write, []

    def write(point: Point, *result: Any) -> None:
        written.append(point.id)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(point, *result)

    monkeypatch.setattr(store, "write", write)
    with pytest.raises(UserError, match=r"could not be written to .* \(No space left on device\); mend that"):
        run_points(points, store, [Nobody()], lanes=3)
    assert written[2] not in store.ids()
    under_way = [p for p in points if (p.id not in store.ids()) and list(store.checkpoints(p).glob("step_*"))]
    assert under_way
    monkeypatch.undo()
    run_points(points, store, [Nobody()])
    equal(store.root, tiny_sweep)
    assert not list((store.root / "checkpoints").iterdir())


def test_a_run_that_was_taken_over_is_left_alone_and_the_others_go_on(
    tiny_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where this process was suspended for minutes, and another host thought it dead."""
    store, points = opened(tmp_path / "s")
    other = Store(store.root)
    taken: list[Point] = []

    class Taking(Nobody):
        def block(self, lanes: Any) -> None:
            if not taken:
                taken.append(next(p for p in points if p.id == lanes[0].run.id))
                claim = store.checkpoints(taken[0]) / "claim-2"
                claim.write_text(json.dumps({"worker": they.name, "step": 0}))

    with Worker(store.root) as they:
        run_points(points, store, [Taking()], lanes=2, wait=False)
        assert "another one has taken over its run" in capsys.readouterr().err
        assert store.ids() == {p.id for p in points} - {taken[0].id}
        left = {f.name for f in store.checkpoints(taken[0]).iterdir()}
        assert left == {"run.json", "claim-1", "claim-2"}  # nothing was saved or removed
        assert other.claims.holder(store.checkpoints(taken[0])) == they.name
    run_points(points, store, [Nobody()])
    equal(store.root, tiny_sweep)


def test_after_an_error_the_same_process_can_try_again(tmp_path: Path) -> None:
    config, _ = load(TINY)
    (point,) = points_of(config, [dict(T=20)])
    store = Store(tmp_path / "s")
    store.open_for([point])
    other = Checkpoints(store.checkpoints(point), {"another": "run"})
    other.save(3, {"x": jax.numpy.ones(3)}, {})
    other.close()
    with pytest.raises(UserError, match="of another run"):
        run_points([point], store, [Nobody()])
    shutil.rmtree(store.checkpoints(point))
    run_points([point], store, [Nobody()])
    assert store.ids() == {point.id}


@pytest.mark.slow
def test_replaced_images_are_said_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(200):
        file = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:40])  # one of them
    config, _ = load(TINY.replace("tiny", "tiny_images"))
    changes = {"data.path": str(tmp_path / "images"), "T": 20, "data.batch_size": 18, "data.augment": "none"}
    (point,) = points_of(config, [changes])
    store = Store(tmp_path / "s")
    store.open_for([point])
    run_points([point], store, [Nobody()])
    # two epochs of 180
    assert store.table()["images_replaced"].tolist() == [2]
    assert capsys.readouterr().err.count("cannot be decoded and are replaced by the next ones") == 1


@pytest.mark.slow
@pytest.mark.parametrize("wait", [True, False])
def test_a_process_that_others_think_dead_goes_on_under_another_name(
    wait: bool, tiny_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, points = opened(tmp_path / "s")
    other = Store(store.root)
    names: list[str] = []

    class Burying(Nobody):
        def block(self, lanes: Any) -> None:
            names.extend(set(other.claims.workers()) - set(names))
            if len(names) == 1:
                other.claims.bury(names[0])
                assert all(other.claims.holder(folder) is None for folder in other.begun())

    run_points(points, store, [Burying()], lanes=2, wait=wait)
    assert len(names) == 2
    assert "another one has taken over its run" in capsys.readouterr().err
    equal(store.root, tiny_sweep)
    store.tidy()
    assert not list((store.root / "checkpoints").iterdir())
    assert not list((store.root / "workers").iterdir())


@pytest.mark.slow
def test_a_log_that_takes_no_more_stops_the_sweep_with_all_runs_saved(tmp_path: Path) -> None:
    config, _ = load(TINY)
    points = points_of(config, [dict(T=2000, seed=seed) for seed in (0, 1)])
    store, undisturbed = Store(tmp_path / "s"), Store(tmp_path / "undisturbed")
    for each in (store, undisturbed):
        each.open_for(points)

    class Full(Nobody):
        def block(self, lanes: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        run_points(points, store, [Full()], lanes=2, give_up=True)
    assert all(0 < (store.saved(p) or 0) < 2000 for p in points)
    assert not any(any(store.attempts(p)) for p in points)  # it is no run's fault
    for each in (store, undisturbed):
        run_points(points, each, [Nobody()], lanes=2)
    equal(store.root, undisturbed.root)


def test_a_second_time_trains_nothing(tiny_sweep: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in tiny_sweep.glob("*/*")}
    done = subprocess.run(sweep(tiny_sweep), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all 8 runs are there already, nothing to train" in done.stderr
    assert "Plan: at T=520" in done.stdout
    assert {f: f.stat().st_mtime_ns for f in tiny_sweep.glob("*/*")} == before


def test_the_function_gives_what_the_command_gives(
    tiny_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook calls it; rows are in the order of the grid."""
    config, grid = load(TINY)
    assert grid is not None
    table = cdl.run_sweep(config, grid, tmp_path / "s")
    equal(tmp_path / "s", tiny_sweep)
    assert [(row.eta_ref, row.T) for row in table.itertuples()] == [(x["eta_ref"], x["T"]) for x in grid]
    assert cdl.run_sweep(config, grid[:2], tmp_path / "s")["id"].tolist() == table["id"].tolist()[:2]
    with pytest.raises(UserError, match="no config field"):
        cdl.run_sweep(config, [{"model.n_layers": 3}], tmp_path / "s")
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    with pytest.raises(UserError, match="take cdl sweep --distributed"):
        cdl.run_sweep(config, grid, tmp_path / "s")


def test_results_say_what_was_run(tiny_sweep: Path) -> None:
    table = sweep_table(tiny_sweep)
    assert len(table) == 8
    assert (table["status"] == "done").all()
    assert table["eta_peak"].tolist() == pytest.approx((table["eta_ref"] / table["T"] ** 0.5).tolist())
    assert (table["tokens"] == table["T"] * 4 * 16).all()
    for row in table.itertuples():
        curve = Store(tiny_sweep).curve(str(row.id))
        assert len(curve) == row.T + 1
        assert curve["eval_loss"].iloc[-1] == row.loss
        assert curve["eta"].max() == pytest.approx(row.eta_peak)
        assert curve["eval_loss"].notna().sum() == 3
        last = curve["train_loss"].dropna().iloc[-max(1, row.T // 20) :]
        assert row.train_loss == pytest.approx(last.mean(), rel=1e-12)


def test_check_trains_the_predicted_horizon_and_says_how_it_went(tiny_sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(tiny_sweep, out)
    promised = plan(out)
    done = subprocess.run(sweep(out, "--check"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = plan(out)
    assert [(c.eta_ref, c.T) for c in made.checks] == [(promised.eta_ref, 4 * 130)]
    assert made.checks[0].prediction == promised.prediction  # the check is no part of the fit
    assert len(sweep_table(out)) == 8
    verdict = "inside" if made.checks[0].inside else "OUTSIDE"
    assert f"loss {made.checks[0].loss:.4f}" in done.stdout
    assert f"{verdict} the 95% interval" in done.stdout


@pytest.mark.slow
def test_a_check_that_fails_is_said(tiny_sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(tiny_sweep, out)
    faulty, faults = Path(__file__).parents[1] / "launch" / "faulty.py", dict(FAULTY="raise", FAULTY_T="520")
    for _ in range(2):  # the second time it is tried again
        command = [sys.executable, str(faulty), *sweep(out, "--check")[3:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | faults)
        assert done.returncode == 2
        assert "T=520 as predicted" not in done.stdout
        assert "RuntimeError: a cosmic ray" in done.stdout
        assert "Plan: at T=520" in done.stdout
        assert "1 of 1 runs failed" in done.stderr.splitlines()[-1]
        assert str(out / "check") in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_check_has_the_settings_of_the_grid(tmp_path: Path) -> None:
    config = tmp_path / "adamw.py"
    axes = 'product(**{"optimizer.name": ["adamw"]}, seed=[3], eta_ref='
    config.write_text(Path(TINY).read_text().replace("product(eta_ref=", axes))
    out = tmp_path / "s"
    command = [sys.executable, "-m", "cdl.cli", "sweep", f"--config={config}", f"--out={out}", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check = sweep_table(out / "check")
    assert check["optimizer.name"].tolist() == ["adamw"]
    assert check["seed"].tolist() == [3]
    assert len(plan(out).checks) == 1
    checked = check["eta_ref"][0]
    for row in sweep_table(out).itertuples():
        if row.eta_ref == checked:
            shutil.rmtree(out / str(row.id))
    without = plan(out)  # a check that has lost its line is said, and harms nothing
    assert without.checks == ()
    assert any("no line to be compared with" in w for w in without.warnings)


@pytest.mark.slow
def test_a_sweep_goes_on_where_its_text_was_moved_to(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(bytes(range(32, 127)) * 100)
    config = tmp_path / "short.py"
    config.write_text(Path(TINY).read_text().replace("T=[40, 60, 90, 130]", "T=[20, 30]"))

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cdl.cli", "sweep", f"--config={config}", f"--out={tmp_path / 's'}"]
        return subprocess.run([*command, f"data.path={text}"], capture_output=True, text=True, check=False)

    assert run().returncode == 0
    text = text.rename(tmp_path / "b.txt")
    config.write_text(config.read_text().replace("T=[20, 30]", "T=[20, 30, 45]"))
    moved = run()
    assert moved.returncode == 0, moved.stderr
    assert "2 runs, 4 already done" in moved.stderr
    assert "Plan: at T=180" in moved.stdout


@pytest.mark.slow
def test_two_sweeps_at_once_into_one_folder_share_its_runs(tiny_sweep: Path, tmp_path: Path) -> None:
    command = sweep(tmp_path / "s")
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    finished = 0
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        finished += said.count("  loss ")
    assert finished == 8  # none was trained twice
    equal(tmp_path / "s", tiny_sweep)
    assert not list((tmp_path / "s").glob(".writing-*"))


@pytest.mark.slow
def test_a_grid_without_a_law_is_finished_all_the_same(tmp_path: Path) -> None:
    config = tmp_path / "one.py"
    config.write_text(Path(TINY).read_text().replace("T=[40, 60, 90, 130]", "T=[20]"))
    command = [sys.executable, "-m", "cdl.cli", "sweep", f"--config={config}", f"--out={tmp_path / 's'}", "--lanes=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 runs; 1 at a time" in done.stderr
    assert "no law to fit" in done.stdout
    checked = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 2
    assert "nothing to check" in checked.stderr


@pytest.mark.slow
def test_a_diverged_run_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    config = tmp_path / "wild.py"
    config.write_text(Path(TINY).read_text().replace("eta_ref=[0.5, 2.0]", "eta_ref=[0.5, 1e30]"))
    out = tmp_path / "wild"
    command = [sys.executable, "-m", "cdl.cli", "sweep", f"--config={config}", f"--out={out}", "optimizer.name=sgd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = sweep_table(out).set_index(["eta_ref", "T"])
    assert (table.loc[0.5, "status"] == "done").all()
    assert (table.loc[1e30, "status"] == "diverged").all()
    assert table.loc[1e30, "loss"].isna().all()
    row = table.loc[(1e30, 130)]
    curve = Store(out).curve(str(row["id"]))
    assert len(curve) == row["diverged_at"] < 130
    assert row["tokens"] == len(curve) * 4 * 16
    assert curve["train_loss"].notna().all()
    assert "eta_ref=1e+30 diverged at T = 40, 60, 90, 130" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "nothing to train" in again.stderr  # diverged is finished
