"""Records of runs: every format, what is mended, the schedule between records, and bad input."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdl.errors import UserError
from cdl.laws.records import Trajectory, read_runs, trajectories
from cdl.schedules import schedule

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published runs are not in ../shared/data")


def run(eta_T: np.ndarray, every: int = 1, first: int = 1) -> pd.DataFrame:
    """Records of a schedule at every so many steps, the last among them, with losses."""
    T = len(eta_T)
    step = np.unique(np.append(np.arange(first, T + 1, every), T))
    return pd.DataFrame({"run": "a", "step": step, "eta": eta_T[step - 1], "loss": 3 + 1 / step})


def same(one: list[Trajectory], other: list[Trajectory]) -> bool:
    """Are these the same runs, to the last bit?"""
    return len(one) == len(other) and all(
        a.run == b.run and all(np.array_equal(getattr(a, x), getattr(b, x)) for x in ("eta_T", "step_P", "loss_P"))
        for a, b in zip(one, other, strict=True)
    )


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


rates = st.floats(1e-6, 1.0)
schedules = st.lists(rates, min_size=1, max_size=60).map(np.array)


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    """Runs in order of their names, with gaps between rows, some without a loss, some without a rate."""
    parts = []
    for name in draw(st.lists(st.sampled_from(["a", "b/c", "007", "NA", "ü x"]), min_size=1, max_size=3, unique=True)):
        step = np.array(sorted(draw(st.sets(st.integers(1, 80), min_size=2, max_size=20))))
        eta = np.array(draw(st.lists(rates, min_size=len(step), max_size=len(step))))
        loss = np.array(draw(st.lists(st.floats(-5, 5), min_size=len(step), max_size=len(step))))
        eta[:-1][draw(st.lists(st.booleans(), min_size=len(step) - 1, max_size=len(step) - 1))] = np.nan
        loss[1:][draw(st.lists(st.booleans(), min_size=len(step) - 1, max_size=len(step) - 1))] = np.nan
        parts.append(pd.DataFrame({"run": name, "step": step, "eta": eta, "loss": loss}))
    return pd.concat(parts, ignore_index=True)


# Trajectories


@settings(deadline=None)
@given(schedules)
def test_a_schedule_recorded_at_every_step_comes_back(eta_T: np.ndarray) -> None:
    (found,) = trajectories(run(eta_T))
    assert np.array_equal(found.eta_T, eta_T)
    assert np.array_equal(found.step_P, np.arange(1, len(eta_T) + 1))
    assert np.array_equal(found.loss_P, 3 + 1 / found.step_P)


@settings(deadline=None)
@given(schedules, st.integers(1, 20))
def test_records_are_kept_and_what_is_between_lies_between(eta_T: np.ndarray, every: int) -> None:
    table = run(eta_T, every)
    (found,) = trajectories(table)
    step = table["step"].to_numpy()
    assert np.array_equal(found.eta_T[step - 1], eta_T[step - 1])
    for i, j in itertools.pairwise(step):
        low, high = sorted(eta_T[[i - 1, j - 1]])
        assert (found.eta_T[i - 1 : j] >= low * (1 - 1e-12)).all()
        assert (found.eta_T[i - 1 : j] <= high * (1 + 1e-12)).all()


@settings(deadline=None)
@given(st.lists(st.tuples(rates, st.integers(2, 5)), min_size=1, max_size=6), st.integers(2, 40))
def test_steps_of_the_rate_come_back_as_jumps_at_records(pieces: list[tuple[float, int]], every: int) -> None:
    recorded = np.concatenate([[eta] * count for eta, count in pieces])
    step = every * np.arange(1, len(recorded) + 1)
    table = pd.DataFrame({"step": step, "eta": recorded, "loss": 1.0})
    (found,) = trajectories(table)
    past = np.arange(step[0], step[-1] + 1)  # the rise to the first record is no part of this
    assert np.array_equal(found.eta_T[past - 1], recorded[past // every - 1])


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "inv_sqrt", "cyclic", "one_cycle"])
def test_a_smooth_schedule_recorded_sparsely_is_interpolated(name: str) -> None:
    T, every = 4000, 40
    eta_T = schedule(name, T, warmup=every if name != "one_cycle" else 0, peak=3e-4)
    (found,) = trajectories(run(eta_T, every, first=every))
    steepest = np.abs(np.diff(eta_T)).max()
    past = slice(every - 1, None)
    assert np.abs(found.eta_T - eta_T)[past].max() <= steepest * every / 2
    if name in ("linear", "wsd"):  # straight between records, so exact
        np.testing.assert_allclose(found.eta_T, eta_T, rtol=1e-9, atol=1e-18)


def test_a_jump_is_ten_times_as_steep_as_both_sides() -> None:
    def between(change: float, side: float) -> float:
        """The rate half-way through a change by `change`, where the rates beside it change by `side`."""
        eta = np.cumsum([50.0, side, change, side])
        (found,) = trajectories(pd.DataFrame({"step": [10, 20, 30, 40], "eta": eta, "loss": 1.0}))
        return found.eta_T[24] - eta[1]

    # The rise to the first record, 5 a step, lies before the change that comes before, and is not beside this one.
    assert between(10.1, 1.0) == 0.0
    assert between(9.9, 1.0) == pytest.approx(4.95)
    assert between(-10.1, -1.0) == 0.0
    last = pd.DataFrame({"step": [10, 20, 30], "eta": [1.0, 1.0, 0.0], "loss": 1.0})
    assert "run1: the rate jumps from 1 at step 20 to 0 at 30: held until then" in read_runs(last).attrs["notes"]
    (end,) = trajectories(last)
    assert end.eta_T[19:].tolist() == [1.0] * 10 + [0.0]


def test_rates_before_the_first_record_rise_from_zero_or_by_the_warmup() -> None:
    table = pd.DataFrame({"step": [8, 12], "eta": [0.4, 0.4], "loss": [2.0, 1.0]})
    (found,) = trajectories(table)
    np.testing.assert_allclose(found.eta_T, 0.4 * np.minimum(np.arange(1, 13) / 8, 1))
    for warmup, rise in ((0, 0), (1, 1), (5, 5), (8, 8), (100, 8)):
        read = read_runs(table, warmup=warmup)
        (found,) = trajectories(read)
        np.testing.assert_allclose(found.eta_T, 0.4 * np.minimum(np.arange(1, 13) / max(rise, 1), 1))
        held = f", then constant to step {8}" if rise < 8 else ""
        said = f"run1: rates before step 8 are not recorded: {rise} updates of linear warm-up{held}"
        assert said in read.attrs["notes"]
        assert found.step_P.tolist() == [8, 12]


# Mending


@settings(deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_shuffled_and_repeated_rows_change_nothing(table: pd.DataFrame, random: Any) -> None:
    rows = list(range(len(table))) * 2
    random.shuffle(rows)
    mixed = trajectories(table.iloc[rows])
    assert same(sorted(mixed, key=lambda x: x.run), sorted(trajectories(table), key=lambda x: x.run))


@settings(max_examples=30, deadline=None)
@given(tables())
def test_a_table_written_as_csv_reads_back(tmp_path_factory: pytest.TempPathFactory, table: pd.DataFrame) -> None:
    file = tmp_path_factory.mktemp("csv") / "table.csv"
    read = read_runs(table)
    read.to_csv(file, index=False)
    assert same(trajectories(file), trajectories(table))
    pd.testing.assert_frame_equal(read_runs(file), read)
    pd.testing.assert_frame_equal(read_runs(read), read)


def test_what_was_mended_is_counted() -> None:
    table = pd.DataFrame(
        {
            "step": [10, 20, 30, 30, 40, 50, np.nan, 60, 0],
            "lr": [0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0],
            "loss": [5.0, np.nan, 9.0, 4.0, np.inf, 3.0, 1.0, np.nan, 11.0],
        }
    )
    read = read_runs(table)
    assert read["step"].tolist() == [10, 20, 30, 40, 50, 60]
    assert read["loss"].dropna().tolist() == [5.0, 4.0, 3.0]
    assert read["eta"].tolist() == [0.1] * 6
    assert read.attrs["notes"] == [
        "run1: 1 row without a step dropped",
        "run1: 3 rows without a finite loss dropped",
        "run1: the loss at step 0 dropped: it is before the first update",
        "run1: rows were not sorted by step",
        "run1: 1 duplicated step, the last row kept",
        "run1: rates are recorded every 10 steps and interpolated between",
        "run1: rates before step 10 are not recorded: taken as rising linearly from 0",
    ]
    assert read_runs(run(np.ones(5))).attrs["notes"] == []


def test_tables_can_be_filtered_and_put_together(tmp_path: Path) -> None:
    one, two = run(schedule("cosine", 50)), run(schedule("linear", 70)).assign(run="b")
    both = read_runs([one, two])
    assert both["run"].drop_duplicates().tolist() == ["a", "b"]
    assert same(trajectories(both[both["run"] == "b"]), trajectories(two))
    assert same(trajectories(pd.concat([read_runs(one), read_runs(two)])), trajectories(both))
    (early, _) = trajectories(both[both["step"] <= 20])
    assert len(early.eta_T) == 20


# Schedules that are given


def test_a_given_schedule_replaces_recorded_rates(tmp_path: Path) -> None:
    eta_T = schedule("cosine", 40, peak=3e-4, warmup=0.1)
    file = tmp_path / "rates.csv"
    pd.DataFrame({"eta": eta_T}).to_csv(file, index=False)
    table = pd.DataFrame({"run": "x", "step": [10, 20, 40], "eta": 1.0, "loss": [3.0, 2.0, 1.0]})
    text = "cosine:T=40,peak=3e-4,warmup=0.1"
    for value in (eta_T, list(eta_T), text, file, str(file), {"x": eta_T}, {"x": text}):
        read = read_runs(table, schedule=value)
        assert read["step"].tolist() == list(range(1, 41))
        assert np.array_equal(read["eta"], eta_T)
        assert read["loss"].dropna().tolist() == [3.0, 2.0, 1.0]
        (found,) = trajectories(read)
        assert np.array_equal(found.eta_T, eta_T)
    without = table.drop(columns="eta")
    assert same(trajectories(read_runs(without, schedule=eta_T)), trajectories(read))
    several = pd.concat([table, table.assign(run="y")])
    x, y = trajectories(read_runs(several, schedule={"y": eta_T}))
    assert x.eta_T[9:].tolist() == [1.0] * 31
    assert np.array_equal(y.eta_T, eta_T)


# Formats


def test_columns_are_found_by_what_trainers_call_them(tmp_path: Path) -> None:
    expected = trajectories(run(schedule("linear", 5)).assign(run="x"))
    values = run(schedule("linear", 5))
    for names in (
        "step lr loss",
        "loss Step LR",
        "iteration learning_rate val_loss",
        "iter train/lr val/loss",
        "trainer/global_step lr-AdamW/pg1 valLoss",
        "train/global_step train/learning_rate eval/loss",
        "global_step optim.lr validation_loss",
        "_step Learning Rate;Test Loss",
    ):
        columns = names.split() if ";" not in names else ["_step", "Learning Rate", "Test Loss"]
        kind = {"step": "step", "iter": "step", "eta": "eta", "lr": "eta", "learn": "eta", "loss": "loss"}
        of = {c: next(v for k, v in reversed(kind.items()) if k in c.lower()) for c in columns}
        of = {c: "step" if "step" in c.lower() else v for c, v in of.items()}
        frame = pd.DataFrame({c: values[of[c]] for c in columns} | {"note": "text", "train_loss": 9.0})
        file = tmp_path / "x.csv"
        frame.to_csv(file, index=False)
        assert same(trajectories(file), expected), names


def test_the_plainest_rate_is_taken() -> None:
    table = pd.DataFrame({"step": [1, 2], "lr/head": [9.0, 9.0], "lr": [2.0, 1.0], "eta time": "5 h", "loss": 1.0})
    assert read_runs(table)["eta"].tolist() == [2.0, 1.0]
    for name in ("lr", "lr/head"):  # without either, the time left is no rate
        table = table.drop(columns=name)
    with pytest.raises(UserError, match="the DataFrame: run1 has no rates; give schedule="):
        read_runs(table)


def test_held_out_losses_come_first_and_loss_names_another() -> None:
    table = pd.DataFrame({"step": [1, 2], "lr": 0.1, "train_loss": [9.0, 8.0], "val_loss": [5.0, 4.0]})
    read = read_runs(table)
    assert read["loss"].tolist() == [5.0, 4.0]
    assert read.attrs["notes"] == ["run1: the loss is val_loss, held out; loss='train_loss' would be the other"]
    assert read_runs(table, loss="Train_Loss")["loss"].tolist() == [9.0, 8.0]
    plain = table.rename(columns={"train_loss": "loss", "val_loss": "best_val_loss"})
    assert read_runs(plain)["loss"].tolist() == [9.0, 8.0]  # a best-so-far is no loss at a step


def test_wandb_charts_are_put_together(tmp_path: Path) -> None:
    loss = write(
        tmp_path / "loss.csv",
        '"Step","big - 1 - val/loss","big - 1 - val/loss__MIN","big - 1 - val/loss__MAX","small - val/loss",'
        '"small - val/loss__MIN","small - val/loss__MAX"\n'
        '"0","11","11","11","","",""\n"10","5","4","6","4.5","4.5","4.5"\n"20","3","3","3","","",""\n',
    )
    rate = write(
        tmp_path / "rate.csv",
        '"Step","big - 1 - train/lr","big - 1 - train/lr__MIN","big - 1 - train/lr__MAX","big - 1 - _step",'
        '"small - train/lr"\n"10","0.2","0.2","0.2","0","0.1"\n"15","","","","0","0.1"\n'
        '"20","0.4","0.4","0.4","0",""\n"","","","","",""\n',
    )
    for paths in ([loss, rate], tmp_path, str(tmp_path / "*.csv")):
        big, small = sorted(trajectories(paths), key=lambda x: x.run)
        assert (big.run, small.run) == ("big - 1", "small")
        assert (big.step_P.tolist(), big.loss_P.tolist()) == ([10, 20], [5.0, 3.0])
        assert (small.step_P.tolist(), small.loss_P.tolist()) == ([10], [4.5])
        assert (big.eta_T[[9, 19]].tolist(), small.eta_T[9:].tolist()) == ([0.2, 0.4], [0.1] * 6)
    assert "small: 1 row without a step dropped" in read_runs([loss, rate]).attrs["notes"]
    with pytest.raises(UserError, match=r"rate\.csv has no column of losses; it has train/lr; name one with loss="):
        read_runs(rate)
    with pytest.raises(UserError, match=r"loss\.csv and .*again\.csv both have val/loss of big - 1; leave one out"):
        read_runs([loss, Path(shutil.copy(loss, tmp_path / "again.csv"))])
    with pytest.raises(UserError, match=r"loss\.csv: big - 1 has no rates; give schedule= to read_runs, or the log"):
        read_runs(loss)


def test_wandb_history_has_losses_and_rates_in_different_rows(tmp_path: Path) -> None:
    history = pd.DataFrame(
        {
            "_step": [0, 1, 2, 3, 4],
            "_runtime": [1.5, 2.5, 3.5, 4.5, 5.5],
            "trainer/global_step": [50, 50, 100, 100, 150],
            "train/lr": [0.1, np.nan, 0.2, np.nan, 0.3],
            "train/loss": [9.0, np.nan, 8.0, np.nan, 7.0],
            "val/loss": [np.nan, 6.0, np.nan, 5.0, np.nan],
            "gpu": "H100",
        }
    )
    file = tmp_path / "history.csv"
    history.to_csv(file, index=False)
    for source in (history, file):
        read = read_runs(source)
        assert read["step"].tolist() == [50, 100, 150]
        assert read["eta"].tolist() == [0.1, 0.2, 0.3]
        assert read["loss"].dropna().tolist() == [6.0, 5.0]
        assert read["gpu"].tolist() == ["H100"] * 3
        assert not any("dropped" in note or "duplicated" in note for note in read.attrs["notes"])
    own = read_runs(history.drop(columns="trainer/global_step"), loss="train/loss")
    assert own["step"].tolist() == [2, 4]
    assert own.attrs["notes"][0].startswith("run1: steps are those of W&B, _step")


def test_wandb_json(tmp_path: Path) -> None:
    data = {
        "name": "llama",
        "config": {"lr": 0.1, "loss": "ce", "iterations": 20, "at": [1, 2], "resume": None},
        "history": {
            "val": {"iter": [0, 10, 20], "val_loss": [9.0, "NaN", 4.0], "val_acc": [0.1, 0.2, 0.3]},
            "train": {"iter": [10, 20], "train_lr": [0.1, 0.05], "train_loss": [8.0, 5.0]},
            "ema": {"iter": [], "val_loss_ema": []},
        },
    }
    file = write(tmp_path / "export", json.dumps(data))
    read = read_runs(file)
    assert list(read.columns) == ["run", "step", "eta", "loss", "lr", "config.loss", "iterations"]
    assert read.iloc[1].tolist() == ["llama", 20, 0.05, 4.0, 0.1, "ce", 20]
    assert read["loss"].isna().tolist() == [True, False]
    assert "llama: 1 row without a finite loss dropped" in read.attrs["notes"]
    assert read_runs(file, loss="train_loss")["loss"].tolist() == [8.0, 5.0]
    pd.testing.assert_frame_equal(read_runs(read), read)


def test_what_is_given_twice_is_read_once(tiny_sweep: Path, tmp_path: Path) -> None:
    points = sorted(f.parent for f in tiny_sweep.glob("*/point.json"))
    assert [x.run for x in trajectories([tiny_sweep, points[3], points[0]])] == [f.name for f in points]
    file = write(tmp_path / "x.csv", "step,lr,loss\n1,0.1,2\n")
    assert len(trajectories([file, tmp_path, f"{tmp_path}/*.csv"])) == 1


def test_a_sweep_and_a_run_of_it(tiny_sweep: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(tiny_sweep, folder)
    ids = sorted(f.parent.name for f in folder.glob("*/point.json"))
    hidden = folder / f".writing-{ids[0]}"
    shutil.copytree(folder / ids[0], hidden)
    shutil.copytree(folder / ids[0], folder / "check" / "another")
    found = trajectories(folder)
    assert [x.run for x in found] == ids
    assert len(ids) == 8
    for x in found:
        curve = pd.read_parquet(folder / x.run / "curve.parquet")
        config = json.loads((folder / x.run / "point.json").read_text())["config"]
        assert np.array_equal(x.eta_T, curve["eta"][1:])  # recorded at every update
        assert len(x.eta_T) == config["T"]
        held_out = curve[["step", "eval_loss"]].dropna().query("step > 0")
        assert x.step_P.tolist() == held_out["step"].tolist()
        assert x.loss_P.tolist() == held_out["eval_loss"].tolist()
        read = read_runs(folder / x.run)
        scalars = {k for k, v in config.items() if isinstance(v, int | float | str)}
        assert scalars | {"run", "step", "eta", "loss"} == set(read.columns)
        assert (read["eta_ref"] == config["eta_ref"]).all()
        assert (read["optimizer.name"] == config["optimizer.name"]).all()
        assert same(trajectories(read), [x])
        training = curve[["step", "train_loss"]].dropna().query("step > 0")
        assert read_runs(folder / x.run, loss="train_loss")["loss"].dropna().tolist() == training["train_loss"].tolist()


def test_what_diverged_is_read_as_far_as_it_went(tiny_sweep: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(tiny_sweep, folder)
    late, early = sorted(f.parent for f in folder.glob("*/point.json"))[:2]
    for run_folder in (late, early):
        result = json.loads((run_folder / "result.json").read_text())
        write(run_folder / "result.json", json.dumps(result | {"status": "diverged", "loss": None}))
        curve = pd.read_parquet(run_folder / "curve.parquet")
        at = curve.query("step > 0").dropna(subset="eval_loss")["step"].iloc[0]
        curve[curve["step"] < at + (run_folder == late)].to_parquet(run_folder / "curve.parquet")
    read = read_runs(folder)
    assert read["run"].nunique() == 7
    assert early.name not in set(read["run"])
    assert f"{early.name}: diverged before its first loss, left out" in read.attrs["notes"]
    assert any(note.startswith(f"{late.name}: diverged; read up to step ") for note in read.attrs["notes"])
    assert len(trajectories(read)[0].loss_P) == 1
    with pytest.raises(UserError, match="all runs diverged before their first loss; give others"):
        read_runs(early)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    def log(folder: Path, steps: range, rate_as_tensor: bool) -> None:
        writer = EventFileWriter(str(folder))
        for step in steps:
            rate, loss = 2.0**-4, 4 - step / 64  # exact in float32
            value = {"tensor": make_tensor_proto(np.float32(rate))} if rate_as_tensor else {"simple_value": rate}
            values = [Summary.Value(tag="train/lr", **value)]
            if step % 2 == 0:
                values.append(Summary.Value(tag="eval/loss", simple_value=loss))
            writer.add_event(Event(step=step, wall_time=step, summary=Summary(value=values)))
        writer.close()

    log(tmp_path / "logs" / "a", range(9), rate_as_tensor=False)
    log(tmp_path / "logs" / "deep" / "b", range(1, 5), rate_as_tensor=True)
    a, b = trajectories(tmp_path / "logs")
    assert (a.run, a.step_P.tolist(), a.loss_P.tolist()) == ("a", [2, 4, 6, 8], [3.96875, 3.9375, 3.90625, 3.875])
    assert (a.eta_T.tolist(), b.run, b.eta_T.tolist()) == ([2.0**-4] * 8, "b", [2.0**-4] * 4)
    (file,) = (tmp_path / "logs" / "a").iterdir()
    assert same(trajectories(file), [a])
    assert same(trajectories(tmp_path / "logs" / "a"), [a])
    write(tmp_path / "bad" / "events.out.tfevents.1", "no events")
    with pytest.raises(UserError, match="bad holds no scalars; give a folder of event files with a loss"):
        read_runs(tmp_path / "bad")


def test_without_tensorboard_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a" / "events.out.tfevents.1", "").parent
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(UserError, match="a is a log of TensorBoard; pip install tensorboard to read it"):
        read_runs(folder)


def test_runs_of_one_name_are_told_apart_by_folders(tmp_path: Path) -> None:
    for folder in ("x/25M", "y/25M", "x/100M"):
        write(tmp_path / folder / "wsd.csv", f"step,lr,loss\n1,0.1,{len(folder)}\n")
    write(tmp_path / "x" / "25M" / "cosine.csv", "step,lr,loss\n1,0.1,2\n")
    files = sorted(tmp_path.rglob("*.csv"))
    assert [x.run for x in trajectories(files)] == ["100M/wsd", "cosine", "x/25M/wsd", "y/25M/wsd"]
    assert [x.run for x in trajectories([files[0], files[0], files[0].parent])] == ["wsd"]
    frame = run(np.ones(3))
    with pytest.raises(UserError, match="two runs are called a, one in DataFrame 1; give them other names"):
        read_runs([frame, frame])


# Published runs


@needs_data
def test_published_curves() -> None:
    files = sorted((DATA / "curves").glob("*/*.csv"))
    assert len(files) == 18
    for file, x in zip(files, trajectories(files), strict=True):
        table = pd.read_csv(file)
        assert x.run == f"{file.parent.name}/{file.stem}"
        assert np.array_equal(x.step_P, table["step"])
        assert np.array_equal(x.loss_P, table["loss"])
        assert np.array_equal(x.eta_T[x.step_P - 1], table["lr"])
        first = x.step_P[0]
        np.testing.assert_allclose(x.eta_T[:first], 3e-4 * np.arange(1, first + 1) / first)
        if file.stem.startswith("wsdcon"):  # two rates, and nothing between
            assert set(x.eta_T[first - 1 :]) == set(table["lr"])
            assert len(set(table["lr"])) == 2


@needs_data
def test_published_json() -> None:
    files = sorted((DATA / "llama_runs").glob("*.json"))
    assert len(files) == 8
    table = read_runs(DATA / "llama_runs")
    for file, x in zip(files, trajectories(table), strict=True):
        data = json.loads(file.read_text())
        history, config = data["history"], data["config"]
        assert x.run == data["name"]
        assert x.step_P.tolist() == history["val"]["iter"][1:]
        assert x.loss_P.tolist() == history["val"]["val_loss"][1:]
        assert x.eta_T[np.array(history["train"]["iter"]) - 1].tolist() == history["train"]["train_lr"]
        assert len(x.eta_T) == config["iterations"]
        assert (table.loc[table["run"] == x.run, "n_layer"] == config["n_layer"]).all()
        assert x.eta_T[-2] == pytest.approx(
            config["lr"] if config["scheduler"] == "wsd" else config["lr"] / 10, rel=1e-4
        )


# Bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "{} is empty; give the log of a run"),
        ("step,lr,loss\n", "{} has no rows; give the log of a run"),
        ("a,b\n1,2\n", "{} has no column of steps; it has a, b; call one step"),
        ("step,lr\n1,2\n", "{} has no column of losses; it has lr; name one with loss="),
        ("step,loss\n1,2\n", "{}: x has no rates; give schedule= to read_runs, or the log that has them"),
        ("step,iter,lr,loss\n1,2,1,2\n", "{} has 2 columns of steps, iter, step; call one step"),
        ("step,lr,loss_a,loss_b\n1,2,3,4\n", "{} has 2 columns of losses, loss_a, loss_b; name one with loss="),
        ("step,lr,eta,loss\n1,2,3,4\n", "{} has 2 columns of rates, eta, lr; keep one, or give schedule="),
        ("step,lr,loss\n1.5,1,2\n", "{}: step 1.5 is no number of updates; give whole ones to 1e+08"),
        ("step,lr,loss\n-3,1,2\n", "{}: step -3 is no number of updates; give whole ones to 1e+08"),
        ("step,lr,loss\n4e12,1,2\n", "{}: step 4000000000000 is no number of updates; give whole ones to 1e+08"),
        ("step,lr,loss\ninf,1,2\n", "{}: step inf is no number of updates; give whole ones to 1e+08"),
        ("step,lr,loss\none,1,2\n", "{}: 'one' in column step is no number; mend or remove it"),
        ("step,lr,loss\n1,1,2\n2,1,oops\n", "{}: 'oops' in column loss is no number; mend or remove it"),
        ("step,lr,loss\n7,-1,2\n", "{}: the rate -1 at step 7 is no rate; use finite ones from 0 on"),
        ("step,lr,loss\n7,inf,2\n", "{}: the rate inf at step 7 is no rate; use finite ones from 0 on"),
        ("step,lr,loss\n1,1,nan\n2,1,inf\n", "{}: x has no finite loss in column loss after step 0; leave it out"),
        ("step,lr,loss\n0,1,5\n", "{}: x has no finite loss in column loss after step 0; leave it out"),
        ("run,step,lr,loss\na,1,1,5\n,2,1,5\n", "{} has rows without a name in column run; fill it"),
        ("{1", "{} is damaged JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); ex"),
        ('{"a": 1}', "{} is JSON without a 'history' of a run; give W&B's export, or CSV"),
        ('{"history": {}}', "{} has no column of losses; it has none; name one with loss="),
        (
            '{"history": {"val": {"iter": [1, 2], "val_loss": [3]}}}',
            "{}, history.val: val_loss has 1 values for 2 steps; export again",
        ),
    ],
)
def test_bad_files_are_named_with_the_fix(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path / "x.csv", text)
    with pytest.raises(UserError) as e:
        read_runs(file)
    assert str(e.value).startswith(said.replace("{}", str(file), 1))
    assert "\n" not in str(e.value)


def test_bad_sources_are_named_with_the_fix(tmp_path: Path) -> None:
    def said(sources: Any) -> str:
        with pytest.raises(UserError) as e:
            read_runs(sources)
        assert "\n" not in str(e.value)
        return str(e.value)

    fix = "give a file, a folder or a pattern such as 'logs/*.csv'"
    assert said(tmp_path / "none.csv") == f"{tmp_path}/none.csv does not exist; {fix}"
    assert said(f"{tmp_path}/*.csv") == f"{tmp_path}/*.csv does not exist; {fix}"
    assert said([]) == "no runs are given; give a file, a folder or a DataFrame"
    assert said([3]) == "runs cannot be read from 3; give a file, a folder or a DataFrame"
    assert said(tmp_path) == (
        f"{tmp_path} holds no run; give a sweep, a folder of CSV, JSON or event files, or a pattern"
    )
    write(tmp_path / "sweep" / "sweep.json", "{}")
    assert said(tmp_path / "sweep") == (
        f"{tmp_path}/sweep is a sweep without a finished run; run it with cdl sweep --out={tmp_path}/sweep"
    )
    write(tmp_path / "point" / "point.json", "{}")
    assert said(tmp_path / "point").startswith(f"{tmp_path}/point is damaged (")
    (tmp_path / "b.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert said(tmp_path / "b.csv").startswith(f"{tmp_path}/b.csv is no log of a run (")
    twice = pd.DataFrame([[1, 1.0, 1.0, 1.0]], columns=["step", "lr", "loss", "loss"])
    assert said(twice) == "the DataFrame has two columns of the same name; it has step, lr, loss, loss"


def test_bad_arguments_are_named_with_the_fix() -> None:
    table = run(np.ones(8))

    def said(table: pd.DataFrame = table, **arguments: Any) -> str:
        with pytest.raises(UserError) as e:
            trajectories(read_runs(table, **arguments))
        assert "\n" not in str(e.value)
        return str(e.value)

    assert said(loss="los") == "the DataFrame: there is no column 'los'; did you mean 'loss'?"
    assert said(warmup=-1) == "warmup=-1 must be a whole number of updates, 0 or more"
    assert said(warmup=0.1) == "warmup=0.1 must be a whole number of updates, 0 or more"
    assert said(warmup=3, schedule=np.ones(8)) == (
        "warmup=3 has no meaning beside a schedule, which has its own; leave one of them out"
    )
    assert said(schedule=np.ones(7)) == (
        "the DataFrame: the schedule of a is shorter than its records: it has 7 updates, losses reach step 8; "
        "give one of at least T=8"
    )
    assert said(table.assign(eta=table["eta"].where(table["step"] < 6))) == (
        "the DataFrame: the schedule of a is shorter than its records: rates are known to step 5, losses to step 8; "
        "give schedule= to read_runs, or drop the rest"
    )
    assert said(schedule={"b": np.ones(8)}) == "there is no run 'b'; known: a"
    assert said(schedule=np.ones((2, 4))) == "schedule has shape (2, 4); give one rate for each update"
    assert said(schedule=np.array([1.0, np.nan])) == "schedule has the rate nan at update 2; use finite rates from 0 on"
    assert said(schedule=[1.0, "x"]) == "schedule=[1.0, 'x'] holds no rates; give an array, a text or a mapping"
    assert said(schedule="cosin:T=9").startswith("there is no schedule or file 'cosin:T=9'")


def test_reading_runs_loads_no_jax(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", "step,lr,loss\n1,0.1,2\n")
    code = f"from cdl.laws import records; records.trajectories({str(file)!r}); import sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
