"""The store: complete or absent, never overwritten, and one sweep a folder."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdl.config import base, change, flatten
from cdl.errors import UserError
from cdl.sweep.claims import Worker
from cdl.sweep.grid import Point
from cdl.sweep.store import Claim, Store, sweep_table

CURVE = {"step": np.arange(3), "eta": np.ones(3), "train_loss": np.ones(3), "eval_loss": np.array([np.nan, 1.0, 0.5])}
RESULT = dict(status="done", loss=0.5, train_loss=0.6, eta_peak=0.1, seconds=1.0)


def point(**changes: Any) -> Point:
    return Point(flatten(change(base(), {k.replace("__", "."): v for k, v in changes.items()})), "f")


def test_write_and_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    points = [point(T=t) for t in (20, 10)]
    store.open_for(points)
    for p in points:
        store.write(p, CURVE, RESULT | dict(loss=1 / p.config.T))
    table = sweep_table(store.root)
    assert table["T"].tolist() == [10, 20]
    assert table["loss"].tolist() == [0.1, 0.05]
    assert table["model.n_layer"].tolist() == [2, 2]
    assert store.ids() == store.expected() == {p.id for p in points}
    for name, values in CURVE.items():
        np.testing.assert_array_equal(store.curve(points[0].id)[name], values)


def test_a_point_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    store, p = Store(tmp_path / "s"), point()
    store.open_for([p])
    store.write(p, CURVE, RESULT)
    store.write(p, CURVE, RESULT | dict(loss=99.0))
    assert sweep_table(store.root)["loss"].tolist() == [0.5]
    assert {f.name for f in store.root.iterdir()} == {"sweep.json", "grids", "checkpoints", p.id}
    assert not list(store.root.rglob(".writing-*"))


def test_a_point_has_one_process_at_a_time(tmp_path: Path) -> None:
    ours, theirs, p = Store(tmp_path / "s"), Store(tmp_path / "s"), point(T=7)
    ours.open_for([p])
    with Worker(ours.root) as we, Worker(ours.root) as they:
        assert ours.begin(p, we, {"device": "abacus"}) is Claim.MINE
        said = json.loads((ours.checkpoints(p) / "run.json").read_text())
        assert said["config"] == p.flat  # before the first step
        assert said["device"] == "abacus"
        assert theirs.begin(p, they, {}) is Claim.TAKEN
        ours.release(p)
        assert theirs.begin(p, they, {}) is Claim.MINE
        assert ours.begin(p, we, {}) is Claim.TAKEN
        theirs.write(p, CURVE, RESULT)
        theirs.release(p)
        assert ours.begin(p, we, {}) is Claim.FINISHED
    assert ours.ids() == {p.id}
    assert {f.name for f in ours.root.iterdir()} == {"sweep.json", "grids", "checkpoints", "workers", p.id}
    assert not list((ours.root / "checkpoints").iterdir())


def test_weights_that_another_process_has_just_kept_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It publishes between the two looks of this one for a result."""
    ours, theirs, p = Store(tmp_path / "s"), Store(tmp_path / "s"), point()
    theirs.open_for([p])
    weights = ours.checkpoints(p) / "step_400"
    plain = ours.claims.take

    def take(*arguments: Any) -> Any:
        weights.mkdir()
        theirs.write(p, CURVE, RESULT)
        return plain(*arguments)

    monkeypatch.setattr(ours.claims, "take", take)
    with Worker(ours.root) as we:
        assert ours.begin(p, we, {}) is Claim.FINISHED
    assert [f.name for f in ours.checkpoints(p).iterdir()] == ["step_400"]


def test_a_result_that_a_network_file_system_does_not_show_yet_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may remember for a minute that a file was not there; not so of what a folder holds."""
    ours, theirs, p = Store(tmp_path / "s"), Store(tmp_path / "s"), point()
    theirs.open_for([p])
    theirs.write(p, CURVE, RESULT)
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with Worker(ours.root) as we:
        assert ours.begin(p, we, {}) is Claim.FINISHED


@pytest.mark.parametrize(("status", "left"), [("done", ["step_400"]), ("diverged", [])])
def test_what_a_process_killed_after_it_had_published_has_left_is_cleared(
    status: str, left: list[str], tmp_path: Path
) -> None:
    store, p = Store(tmp_path / "s"), point()
    store.open_for([p])
    with Worker(store.root) as worker:
        assert store.begin(p, worker, dict(keep=True)) is Claim.MINE
        (store.checkpoints(p) / "step_400").mkdir()
        store.write(p, CURVE, RESULT | dict(status=status))
        Store(store.root).tidy()
        assert (store.checkpoints(p) / "claim-1").exists()  # it is still at it
    store.tidy()
    assert sorted(f.name for f in store.root.glob("checkpoints/*/*")) == left
    assert not list((store.root / "workers").iterdir())


def test_a_record_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    """Without hard links a file is there before its content."""
    Store(tmp_path / "s").open_for([point()])
    record = tmp_path / "s" / "sweep.json"
    text = record.read_text()
    record.write_text("")
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(Store(tmp_path / "s").open_for, [point()])
        time.sleep(0.2)
        record.write_text(text)
        opened.result()


def test_points_that_two_processes_add_at_once_are_all_recorded(tmp_path: Path) -> None:
    both = [Store(tmp_path / "s"), Store(tmp_path / "s")]
    with ThreadPoolExecutor(2) as pool:
        for i in range(20):
            points = [point(T=10 + i), point(T=1000 + i)]
            list(pool.map(lambda s, p: s.open_for([p]), both, points))
    assert len(both[0].expected()) == 40


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, p = Store(tmp_path / "s"), point()
    store.open_for([p])

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(p, CURVE, RESULT)
    assert store.ids() == set()
    assert not list(store.checkpoints(p).iterdir())


def test_half_written_folders_are_no_results_and_are_removed_when_old(tmp_path: Path) -> None:
    store, p = Store(tmp_path / "s"), point()
    store.open_for([p])
    for name, age in (("old", 7200), ("new", 0)):
        left = store.root / f".writing-{name}"
        left.mkdir()
        (left / "result.json").write_text(json.dumps(RESULT))
        os.utime(left, (time.time() - age,) * 2)
    assert store.ids() == set()
    assert store.table().empty
    store.open_for([p])
    assert sorted(f.name for f in store.root.glob(".writing-*")) == [".writing-new"]


def test_a_folder_belongs_to_one_sweep_and_may_grow(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.open_for([point(T=10), point(T=20)])
    store.open_for([point(T=30, eta_ref=9.0)])  # more horizons, rates and seeds of the same sweep
    assert len(store.expected()) == 3
    with pytest.raises(UserError, match=r"belongs to another sweep: model.d_model is 64 there and 32 here"):
        store.open_for([point(T=10, model__d_model=32)])
    with pytest.raises(UserError, match=r"model.d_model is 64 there and 'varied' here"):  # one law would not fit both
        store.open_for([point(T=10, model__d_model=d) for d in (32, 64)])
    other_text = Point(point(T=10).flat, "g")
    with pytest.raises(UserError, match="its runs saw other text"):
        store.open_for([other_text])
    with pytest.raises(UserError, match=r"optimizer.name is 'muon_nsgd' there and 'adamw' here"):
        store.open_for([point(T=10, optimizer__name="adamw")])
    assert len(store.expected()) == 3


def test_folders_that_are_no_sweep_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        Store(tmp_path).open_for([point()])
    with pytest.raises(UserError, match="is a file"):
        Store(tmp_path / "thesis.tex").open_for([point()])
    with pytest.raises(UserError, match="no finished run"):
        sweep_table(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    store, p = Store(tmp_path / "s"), point()
    store.open_for([p])
    store.write(p, CURVE, RESULT)
    (store.root / p.id / "result.json").write_text('{"status": ')
    with pytest.raises(UserError, match=rf"{p.id}/result.json is damaged .*remove the folder \S+{p.id} and"):
        store.table()
    (store.root / p.id / "result.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{p.id} is damaged: a field is missing"):
        store.table()
    (store.root / p.id / "curve.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"curve.parquet is damaged"):
        store.curve(p.id)
    (store.root / "sweep.json").write_text("[]")
    with pytest.raises(UserError, match=r"sweep.json is damaged; remove this file"):
        store.open_for([p])


def test_a_start_that_was_killed_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".writing-1234-sweep.json").write_text("{")
    Store(tmp_path).open_for([point()])
    assert Store(tmp_path).expected() == {point().id}
