"""Workers of this machine: what dies is replaced, nothing is lost, nothing is run twice, and no number changes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from cdl.errors import UserError
from cdl.launch.local import Local, shares
from cdl.launch.supervise import supervise
from cdl.sweep import claims
from cdl.sweep.claims import Attempts
from cdl.sweep.grid import points_in
from cdl.sweep.store import MOST_CRASHES, Store, grid_name, sweep_table
from tests.conftest import TINY
from tests.sweep.test_run import VOLATILE, equal

FAULTY = str(Path(__file__).parent / "faulty.py")


def sweep(out: Path, *arguments: str, config: str = TINY) -> list[str]:
    return [sys.executable, "-m", "cdl.cli", "sweep", f"--config={config}", f"--out={out}", *arguments]


def run(command: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def workers_of(coordinator: "subprocess.Popen[Any]") -> list[psutil.Process]:
    try:
        return psutil.Process(coordinator.pid).children()
    except psutil.NoSuchProcess:
        return []


class Written:
    """Finished points of a sweep are there for good."""

    def __init__(self, out: Path):
        self.out, self.when = out, dict[str, int]()

    def look(self) -> int:
        now = {id: (self.out / id / "result.json").stat().st_mtime_ns for id in Store(self.out).ids()}
        assert self.when.items() <= now.items()
        self.when = now
        return len(now)


@pytest.mark.slow
def test_two_workers_give_the_table_of_one_process(tiny_sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    done = run(sweep(out, "--workers=2"))
    assert done.returncode == 0, done.stderr
    assert "8 runs for 2 workers (local)" in done.stderr
    assert done.stderr.count("  loss ") == 8
    equal(out, tiny_sweep)
    assert not list((out / "checkpoints").iterdir())
    assert not list((out / "workers").iterdir())
    again = run(sweep(out, "--workers=2"))
    assert "all 8 runs are there already" in again.stderr
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_twenty_killed_workers_lose_and_change_nothing(points24: str, undisturbed24: Path, tmp_path: Path) -> None:
    out, moments, killed = tmp_path / "s", random.Random(0), 0
    written = Written(out)
    with subprocess.Popen(sweep(out, "--workers=2", config=points24), stderr=subprocess.PIPE, text=True) as coordinator:
        while killed < 20 and coordinator.poll() is None:
            moment = time.monotonic() + moments.uniform(0.1, 5)
            # However fast the machine is, there are to be runs left for all of the kills.
            while time.monotonic() < moment and written.look() <= killed:
                time.sleep(0.01)
            victims = workers_of(coordinator)
            if victims:
                moments.choice(victims).kill()
                killed += 1
        _, said = coordinator.communicate(timeout=120)
    assert coordinator.returncode == 0, said
    assert killed == 20
    assert written.look() == 24
    assert not Store(out).failed()
    equal(out, undisturbed24)


@pytest.mark.slow
def test_a_killed_coordinator_takes_its_workers_along_and_nothing_is_lost(
    points24: str, undisturbed24: Path, tmp_path: Path
) -> None:
    out, moments = tmp_path / "s", random.Random(1)
    written = Written(out)
    for _ in range(4):
        with subprocess.Popen(sweep(out, "--workers=2", config=points24), stderr=subprocess.DEVNULL) as coordinator:
            before = written.look()
            while coordinator.poll() is None and written.look() <= before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.2))
            workers = workers_of(coordinator)
            assert coordinator.poll() is None, "it ended before it could be killed"
            coordinator.kill()
        if moments.random() < 0.5:  # else the next command begins beside the old workers
            _, alive = psutil.wait_procs(workers, timeout=30)
            assert not alive
        written.look()
    done = run(sweep(out, "--workers=2", config=points24))
    assert done.returncode == 0, done.stderr
    assert written.look() == 24
    equal(out, undisturbed24)


@pytest.mark.parametrize("how", ["raise", pytest.param("abort", marks=pytest.mark.slow)])
def test_a_run_that_always_crashes_is_given_up_and_the_others_complete(
    how: str, tiny_sweep: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    faults = dict(FAULTY=how, FAULTY_T="60")
    if how == "raise":  # in one process, which survives it
        done = run([sys.executable, FAULTY, *sweep(out)[3:]], **faults)
        assert done.returncode == 2, done.stderr
        assert "2 of 8 runs failed" in done.stderr
        assert done.stdout.count("RuntimeError: a cosmic ray") == 2
    else:
        supervised(faults, out, tiny_sweep)
    failed = Store(out).failed()
    wrong = {str(row.id) for row in sweep_table(tiny_sweep).itertuples() if row.T == 60}
    assert set(failed) == wrong
    for record in failed.values():
        assert record["status"] == "failed"
        assert record["attempts"] == MOST_CRASHES
        assert ("RuntimeError: a cosmic ray" if how == "raise" else "SIGABRT") in record["error"]
        assert ("faulty.py" if how == "raise" else "Aborted") in record["traceback"]
    left = sweep_table(tiny_sweep).query("T != 60").reset_index(drop=True).drop(columns=VOLATILE)
    pd.testing.assert_frame_equal(sweep_table(out).drop(columns=VOLATILE), left, check_exact=True)
    mended = run(sweep(out))  # the same command tries them again
    assert mended.returncode == 0, mended.stderr
    assert not Store(out).failed()
    equal(out, tiny_sweep)


@pytest.mark.slow
def test_a_clock_that_is_set_back_all_the_time_changes_nothing(undisturbed8: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    written = Written(out)

    def show() -> None:
        if written.look() >= 2 and not killed:
            victim = next(w for w in psutil.Process().children() if "worker" in w.cmdline())
            victim.kill()
            killed.append(victim)

    killed: list[psutil.Process] = []
    supervised(dict(FAULTY="clock"), out, undisturbed8, show)
    assert killed
    assert written.look() == 8
    equal(out, undisturbed8)


def supervised(faults: dict[str, str], out: Path, like: Path, show: Callable[[], None] = lambda: None) -> None:
    """Train the grid of another sweep by two workers in which something goes wrong."""
    store, points = Store(out), points_in(Store(like).grids()[0])
    store.open_for(points)
    command = [sys.executable, FAULTY, "worker", str(out), f"--grid={grid_name(points)}"]
    with set_in_environment(faults):
        supervise(Local(command, shares(2), out / "logs"), store, points, 2, stop=lambda: False, show=show)


@contextmanager
def set_in_environment(what: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(what)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.slow
def test_ctrl_c_has_workers_save(tmp_path: Path) -> None:
    assert not any(w.is_running() for w in interrupt(tmp_path, "--workers=2"))


def interrupt(folder: Path, *arguments: str, **environment: str) -> list[psutil.Process]:
    """Ctrl-C of a sweep of two long runs, by two workers, has both saved and no run blamed; the workers."""
    config, out = folder / "long.py", folder / "s"
    config.write_text(Path(TINY).read_text().replace("T=[40, 60, 90, 130]", "T=[1_000_000]"))
    command, store = sweep(out, *arguments, config=str(config)), Store(out)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as coordinator:

        def at_work() -> list[psutil.Process]:
            records = [store.claims.record(w) for w in store.claims.workers()]
            return [psutil.Process(record["pid"]) for record in records if record.get("runs")]

        while coordinator.poll() is None and len(at_work()) < 2:
            time.sleep(0.02)
        workers = at_work()
        for _ in range(2):  # as where a parent that hears Ctrl-C too passes it on
            coordinator.send_signal(signal.SIGINT)
        _, said = coordinator.communicate(timeout=60)
    assert coordinator.returncode == 130, said
    last = said.strip().splitlines()[-1]
    assert last == (
        "cdl: interrupted; 0 of 2 runs are kept and those under way are saved; the same command goes on from there"
    )
    for point in points_in(store.grids()[0]):
        assert store.saved(point)
        assert not store.claims.holder(store.checkpoints(point))
        assert store.attempts(point) == Attempts()
    return workers


@pytest.mark.slow
def test_workers_that_find_nothing_to_do_end_in_peace(tiny_sweep: Path, tmp_path: Path) -> None:
    """Eight for eight runs: most come too late."""
    done = run(sweep(tmp_path / "s", "--workers=8"))
    assert done.returncode == 0, done.stderr
    equal(tmp_path / "s", tiny_sweep)


@pytest.mark.slow
def test_workers_that_cannot_begin_are_not_started_for_ever(tiny_sweep: Path, tmp_path: Path) -> None:
    store, points = Store(tmp_path / "s"), points_in(Store(tiny_sweep).grids()[0])
    store.open_for(points)
    backend = Local([sys.executable, "-c", "raise SystemExit('no such abacus')"], shares(1), store.root / "logs")
    with pytest.raises(
        UserError, match=r"without having begun a run \(local-.* ended with exit code 1: no such abacus"
    ):
        supervise(backend, store, points, 1, stop=lambda: False, show=lambda: None)


REFUSING = """
import os, sys
from pathlib import Path
from cdl.cli import main
host = Path(os.environ["HOST"])
if len(list(host.iterdir())) < int(os.environ["REFUSALS"]):
    (host / sys.argv[-2]).touch()
    print("cdl: error: /scratch is not mounted here; mount it", file=sys.stderr)
    sys.exit(2)
sys.exit(main(["worker", *sys.argv[1:]]))
"""


def train_on(root: Path, like: Path, refusals: list[int]) -> None:
    """The sweep of another folder by a worker on each of some hosts, which refuse so many times to work."""
    store, points = Store(root), points_in(Store(like).grids()[0])
    store.open_for(points)
    settings = []
    for i, n in enumerate(refusals):
        host = root.parent / f"host{i}"
        host.mkdir()
        settings.append((dict(HOST=str(host), REFUSALS=str(n)), [f"--cores={i}"]))
    backend = Local([sys.executable, "-c", REFUSING, str(root), f"--grid={grid_name(points)}"], settings, root / "logs")
    supervise(backend, store, points, len(settings), stop=lambda: False, show=lambda: None)


@pytest.mark.slow
def test_a_worker_that_refuses_once_is_replaced(
    tiny_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on(tmp_path / "s", tiny_sweep, [1])
    assert "ended with exit code 2: /scratch is not mounted here; mount it" in capsys.readouterr().err
    equal(tmp_path / "s", tiny_sweep)


def test_where_all_workers_refuse_the_sweep_ends_with_what_they_say(tiny_sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/scratch is not mounted here"):
        train_on(tmp_path / "s", tiny_sweep, [1000, 1000])


@pytest.mark.slow
def test_a_host_that_always_refuses_does_not_stop_the_others(
    undisturbed8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on(tmp_path / "s", undisturbed8, [1000, 0])
    equal(tmp_path / "s", undisturbed8)
    refusals = capsys.readouterr().err.count("/scratch is not mounted here")
    assert 1 <= refusals <= len(list((tmp_path / "host0").iterdir())) < 10  # with pauses between


def test_jobs_of_two_commands_have_names_of_their_own(tmp_path: Path) -> None:
    """In containers both may be process 7."""
    both = [Local([sys.executable, "-c", ""], shares(1), tmp_path) for _ in "ab"]
    for backend in both:
        backend.start(1)
    assert not both[0].jobs() & both[1].jobs()
    for backend in both:
        while backend.jobs():
            backend.ended()


@pytest.mark.slow
def test_runs_of_a_host_that_is_no_more_are_taken_over(
    tiny_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "SILENT_SECONDS", 3)  # of the coordinator's patience, not the workers'
    out = tmp_path / "s"
    store, points = Store(out), points_in(Store(tiny_sweep).grids()[0])
    store.open_for(points)
    name = "elsewhere-12-ab"
    (out / "workers").mkdir()
    (out / "workers" / f"{name}.json").write_text(json.dumps({"host": "elsewhere", "pid": 12, "born": "3"}))
    for point in points[:3]:
        store.checkpoints(point).mkdir(parents=True)
        (store.checkpoints(point) / "claim-1").write_text(json.dumps({"worker": name, "step": 0}))
    supervised(dict(FAULTY="raise", FAULTY_T="-1"), out, tiny_sweep)
    assert f"trained by {name}, which this command has not started, or were until" in capsys.readouterr().err
    equal(out, tiny_sweep)
    assert not list((out / "checkpoints").iterdir())
    assert not list((out / "workers").iterdir())


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """No byte more goes into a small file system."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as f, suppress(OSError):
        while True:
            f.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """No file can be made or removed, by root neither."""
    changed = run(["chattr", "-R", "+i", str(folder)])
    try:
        if changed.returncode:
            pytest.skip(f"no folder can be made immutable here: {changed.stderr.strip()}")
        yield
    finally:
        run(["chattr", "-R", "-i", str(folder)])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; where this process may not mount one, the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)])
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    run(["umount", "--lazy", str(folder)])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["--workers=2"]])
@pytest.mark.parametrize(
    ("fault", "words"), [(full, "No space left on device"), (read_only, "Operation not permitted")]
)
def test_a_disk_that_takes_no_more_stops_the_sweep_and_it_goes_on_later(
    fault: Any, words: str, workers: list[str], long8: str, undisturbed8: Path, tmp_path: Path, request: Any
) -> None:
    out = (request.getfixturevalue("small_disk") if fault is full else tmp_path) / "s"
    command = sweep(out, *workers, config=long8)
    written = Written(out)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and written.look() < 2:
            time.sleep(0.01)
        with fault(out.parent if fault is full else out):
            _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert words in said.strip().splitlines()[-1]
    assert 2 <= written.look() < 8
    points, store = points_in(Store(undisturbed8).grids()[0]), Store(out)
    for tries in map(store.attempts, points):  # it is no run's fault
        assert tries.crashes == 0
        assert tries.deaths <= (fault is read_only)  # where not even the worker's file can be removed
    again = run(command)
    assert again.returncode == 0, again.stderr
    assert written.look() == 8
    equal(out, undisturbed8)
