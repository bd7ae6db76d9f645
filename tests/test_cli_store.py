"""`cdl ls`, `show`, `table`, `rm`, `status`: what a person sees of a sweep without training anything."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cdl.cli import main
from cdl.status import Watch
from cdl.sweep import claims
from cdl.sweep.claims import Worker
from cdl.sweep.grid import points_in
from cdl.sweep.store import Store, sweep_table


@pytest.fixture
def sweep(tiny_sweep: Path, tmp_path: Path) -> Path:
    """A copy of a finished sweep, of which each test may do what it likes."""
    return Path(shutil.copytree(tiny_sweep, tmp_path / "runs" / "tiny"))


@pytest.fixture
def cdl(capsys: pytest.CaptureFixture[str]) -> Any:
    """A command line -> what it printed; errors are said on stderr and in the exit code."""

    def run(*words: str, code: int = 0) -> str:
        assert main([str(w) for w in words]) == code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.err if code else said.out

    return run


def unfinished(sweep: Path, T: int) -> Any:
    """Take the result of one point away; the point."""
    store = Store(sweep)
    point = next(p for p in points_in(store.grids()[0]) if p.config.T == T)
    store.remove([point.id])
    return point


def test_ls_has_a_row_for_each_run(sweep: Path, cdl: Any) -> None:
    point = unfinished(sweep, T=60)
    rows = [line.split() for line in cdl("ls", sweep).splitlines()]
    assert rows[0] == ["id", "status", "eta_ref", "T", "seed", "loss", "seconds"]
    table = sweep_table(sweep).set_index("id")
    assert len(rows) == 9
    for row in rows[1:]:
        if row[0] == point.id:
            assert row[1:] == ["waiting", "0.5", "60", "0"]
        else:
            assert row[1] == "done"
            assert float(row[5]) == pytest.approx(table.loc[row[0], "loss"], rel=1e-5)


def test_ls_of_a_folder_has_a_row_for_each_sweep(sweep: Path, cdl: Any) -> None:
    rows = [line.split() for line in cdl("ls", sweep.parent).splitlines()]
    assert rows[1][:6] == ["tiny", "8", "8", "0", "0", "0"]
    assert "holds no sweep" in cdl("ls", sweep / "grids", code=2)


def test_show_says_all_of_a_run(sweep: Path, cdl: Any) -> None:
    row = sweep_table(sweep).iloc[0]
    said = cdl("show", sweep, row["id"][:6])
    assert str(sweep / row["id"]) in said
    assert f"{row['loss']}" in said
    assert "optimizer.name" in said
    assert "no run" in cdl("show", sweep, "zz", code=2)
    assert "give more of it" in cdl("show", sweep, "", code=2)


def test_a_run_that_was_given_up_is_shown_with_its_traceback(sweep: Path, cdl: Any) -> None:
    store, point = Store(sweep), unfinished(sweep, T=60)
    with Worker(sweep) as worker:
        store.begin(point, worker, {})
        store.fail(point, 'File "x.py", line 3\nRuntimeError: a cosmic ray')
    assert f"failed  {point.id}  eta_ref 0.5  T 60  RuntimeError: a cosmic ray" in cdl("status", sweep)
    assert "7 done, 1 failed" in cdl("status", sweep)
    said = cdl("show", sweep, point.id)
    assert 'File "x.py", line 3' in said
    assert cdl("ls", sweep).count("failed") == 1
    assert "1 runs" in cdl("rm", sweep, "--status=failed", "--yes")
    assert "7 done, 0 running, 1 waiting" in cdl("status", sweep)


def test_status_follows_a_run_of_another_process(sweep: Path, cdl: Any) -> None:
    store, point = Store(sweep), unfinished(sweep, T=130)
    with Worker(sweep) as worker:
        store.begin(point, worker, {})
        assert f"{point.id}      0.5  130  starting" in cdl("status", sweep)
        runs = {point.id: dict(step=65, loss=3.25, flops_per_step=10)}
        worker.tell(runs=runs, unit="tokens", per_s=1000.0, flops_per_s=10.0)
        worker._beat()
        said = cdl("status", sweep)
        assert "7 done, 1 running, 0 waiting" in said
        assert "65 (50%)  3.2500" in said
        assert "1,000 tokens/s" in said
        status = Watch(store).look()
        assert status.seconds_left == pytest.approx(65 * 10 / 10)
        assert "is being trained" in cdl("rm", sweep, point.id, "--yes", code=2)
    assert "0 running, 1 waiting" in cdl("status", sweep)


def test_a_worker_that_stands_still_or_is_silent_is_said_to(
    sweep: Path, cdl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, point = Store(sweep), unfinished(sweep, T=130)
    with Worker(sweep) as worker:
        store.begin(point, worker, {})
        now = claims.time.monotonic()
        with monkeypatch.context() as later:
            later.setattr(claims.time, "monotonic", lambda: now + 190)
            worker._beat()
        assert f"{worker.name}  no step for 3 min 00 s" in cdl("status", sweep)
        assert "not heard" not in cdl("status", sweep)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(claims, "_host", lambda: "another host")
            stamp = claims.time.time() - 600
            os.utime(sweep / "workers" / f"{worker.name}.json", (stamp, stamp))
            assert "not heard of for 10 min" in cdl("status", sweep)


def test_rm_watches_for_a_minute_whether_a_worker_elsewhere_is_dead(
    sweep: Path, cdl: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, point = Store(sweep), unfinished(sweep, T=130)
    with Worker(sweep) as worker:
        store.begin(point, worker, {})
        (store.checkpoints(point) / "step_40").mkdir()
        monkeypatch.setattr(claims, "_host", lambda: "another host")
        assert "is being trained by" in cdl("rm", sweep, point.id, "--yes", code=2)  # its stamp moves
    monkeypatch.setattr(claims, "SILENT_SECONDS", 1.5)
    file = sweep / "workers" / f"{worker.name}.json"
    file.write_text(json.dumps({"host": "one that is no more"}))
    cdl("rm", sweep, point.id, "--yes")
    assert not store.begun()


def test_table_as_csv_and_parquet_has_all_of_it(sweep: Path, tmp_path: Path, cdl: Any) -> None:
    cdl("table", sweep, f"--csv={tmp_path / 't.csv'}", f"--parquet={tmp_path / 't.parquet'}")
    expected = sweep_table(sweep)
    for table in (
        pd.read_csv(tmp_path / "t.csv"),
        pd.read_parquet(tmp_path / "t.parquet"),
        pd.read_csv(io.StringIO(cdl("table", sweep))),
    ):
        assert list(table.columns) == list(expected.columns)
        assert table["loss"].tolist() == expected["loss"].tolist()
        assert json.loads(table["versions"][0]) == expected["versions"][0]
    assert "make it first" in cdl("table", sweep, "--csv=/no/such/folder/t.csv", code=2)
    assert "holds no finished run" in cdl("table", sweep / "grids", code=2)


def test_rm_asks_and_removes_what_it_was_asked_for(sweep: Path, cdl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted(Store(sweep).ids())[:2]
    assert "asks a person first" in cdl("rm", sweep, first, code=2)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, left in (("n", 8), ("", 8), ("y", 7)):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        cdl("rm", sweep, first)
        assert len(Store(sweep).ids()) == left
    cdl("rm", sweep, "--yes", second)
    assert not Store(sweep).ids() & {first, second}
    assert "no such runs" in cdl("rm", sweep, "--status=diverged")
    assert "nothing of these runs is there" in cdl("rm", sweep, first)
    assert "--status=failed" in cdl("rm", sweep, code=2)
    assert "holds no sweep" in cdl("rm", sweep / "grids", "--status=all", code=2)
    assert not list(sweep.glob(".writing-*"))
