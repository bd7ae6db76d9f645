"""Claims: a run has one process at a time, without locks and without trusting any clock."""

import errno
import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from cdl.sweep import claims
from cdl.sweep.claims import Attempts, Claims, Worker, create

HOLDER = """
import sys
from pathlib import Path
from cdl.sweep.claims import Claims, Worker
root, *runs = map(Path, sys.argv[1:])
with Worker(root) as worker:
    sys.stdin.readline()
    held = [run.name for run in runs if Claims(root).take(run, worker.name, 0)]
    print(*held, flush=True)
    sys.stdin.readline()
"""


def folders(root: Path, n: int) -> list[Path]:
    runs = [root / "checkpoints" / f"{i:012x}" for i in range(n)]
    for run in runs:
        run.mkdir(parents=True)
    return runs


def holder(root: Path, *runs: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, str(root), *map(str, runs)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go_on(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def frozen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The steady clock of this process, which stands, as all of its workers do."""
    clock = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(claims, "BEAT_SECONDS", 1e6)
    return clock


def test_of_many_processes_that_want_all_runs_each_run_has_one(tmp_path: Path) -> None:
    runs = folders(tmp_path, 100)
    held: Counter[str] = Counter()
    with ExitStack() as stack:
        processes = [stack.enter_context(holder(tmp_path, *runs)) for _ in range(4)]
        while len(list(tmp_path.glob("workers/*.json"))) < 4:
            time.sleep(0.01)
        for process in processes:
            go_on(process)
        for process in processes:
            assert process.stdout is not None
            held.update(process.stdout.readline().split())
        for process in processes:
            go_on(process)
    assert held == Counter(run.name for run in runs)
    assert not list((tmp_path / "workers").iterdir())


def test_a_run_whose_process_was_killed_is_free_at_once(tmp_path: Path) -> None:
    (run,) = folders(tmp_path, 1)
    ours = Claims(tmp_path)
    with Worker(tmp_path) as we:
        for n in (1, 2, 3):
            with holder(tmp_path, run) as other:
                go_on(other)
                assert other.stdout is not None
                assert other.stdout.readline().split() == [run.name]
                assert ours.take(run, we.name, 0) is None
                assert ours.holder(run) is not None
                other.kill()
                # Dead, but not yet buried by its parent: the system still knows its number.
                while ours.holder(run):
                    time.sleep(0.01)
            assert ours.attempts(run, 0) == Attempts(crashes=0, deaths=n)
        claim = ours.take(run, we.name, 0)
        assert claim == run / "claim-4"


def test_elsewhere_a_worker_lives_as_long_as_its_stamp_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = folders(tmp_path, 1)
    clock = frozen(monkeypatch)
    with Worker(tmp_path) as they, Worker(tmp_path) as we:
        theirs, ours = Claims(tmp_path), Claims(tmp_path)
        claim = theirs.take(run, they.name, 0)
        assert claim
        monkeypatch.setattr(claims, "_host", lambda: "another host")
        set_back = time.time_ns() - 3600 * 10**9
        for _ in range(5):
            monkeypatch.setattr(claims.time, "time_ns", lambda: set_back)
            they._beat()
            assert ours.take(run, we.name, 0) is None
            clock[0] += claims.SILENT_SECONDS - 1
            assert ours.take(run, we.name, 0) is None
        clock[0] += 2
        assert not theirs.superseded(claim)
        assert ours.holder(run) is None
        assert Claims(tmp_path).holder(run) is None  # whoever comes now need not watch for a minute
        they._beat()
        assert Claims(tmp_path).take(run, we.name, 0) == run / "claim-2"
        assert theirs.superseded(claim)


def test_of_a_worker_elsewhere_it_takes_two_stamps_to_know_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Worker(tmp_path) as they:
        assert Claims(tmp_path).heard(they.name)
        monkeypatch.setattr(claims, "_host", lambda: "another host")
        ours = Claims(tmp_path)
        assert ours.alive(they.name)
        assert not ours.heard(they.name)
        they._beat()
        assert ours.heard(they.name)


def test_whoever_sees_a_process_dead_tells_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = folders(tmp_path, 1)
    with holder(tmp_path, run) as other:
        go_on(other)
        assert other.stdout is not None
        assert other.stdout.readline().split() == [run.name]
        other.kill()
    ours = Claims(tmp_path)
    assert ours.holder(run) is None
    monkeypatch.setattr(claims, "_host", lambda: "another host")
    with Worker(tmp_path) as we:
        assert Claims(tmp_path).take(run, we.name, 0) == run / "claim-2"
    assert ours.attempts(run, 0).deaths == 1


def test_a_claim_without_words_is_watched_for_a_minute_and_then_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = folders(tmp_path, 1)
    clock = frozen(monkeypatch)
    (run / "claim-1").touch()
    ours = Claims(tmp_path)
    with Worker(tmp_path) as we:
        assert ours.take(run, we.name, 0) is None
        clock[0] += claims.SILENT_SECONDS + 1
        assert Claims(tmp_path).take(run, we.name, 0) is None  # who has not watched
        assert not ours.held(run / "claim-1")
        assert Claims(tmp_path).take(run, we.name, 0) == run / "claim-2"
    assert ours.attempts(run, 0) == Attempts()


def test_a_claim_that_cannot_be_read_now_and_then_stays_its_holders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = folders(tmp_path, 1)
    clock = frozen(monkeypatch)
    plain = Path.read_text
    with Worker(tmp_path) as they, Worker(tmp_path) as we:
        ours = Claims(tmp_path)
        claim = ours.take(run, they.name, 0)
        assert claim

        def stale(path: Path, *arguments: str) -> str:
            if path == claim:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return plain(path, *arguments)

        for read in (stale, plain, stale, stale, plain):
            monkeypatch.setattr(Path, "read_text", read)
            assert ours.take(run, we.name, 0) is None
            clock[0] += claims.SILENT_SECONDS + 1


def test_who_ends_well_but_cannot_write_that_is_not_counted(tmp_path: Path) -> None:
    (run,) = folders(tmp_path, 1)
    with Worker(tmp_path) as they:
        assert Claims(tmp_path).take(run, they.name, 0)
    assert Claims(tmp_path).holder(run) is None
    assert Claims(tmp_path).attempts(run, 0) == Attempts()


def test_a_worker_that_was_buried_knows_it_and_can_begin_anew(tmp_path: Path) -> None:
    (run,) = folders(tmp_path, 1)
    ours = Claims(tmp_path)
    with Worker(tmp_path, dict(job="a job")) as we:
        first = we.name
        assert ours.take(run, we.name, 0)
        assert not we.buried()
        Claims(tmp_path).bury(first)
        assert we.buried()
        assert ours.holder(run) is None
        we.reborn()
        assert not we.buried()
        assert we.name != first
        assert ours.record(we.name)["job"] == "a job"
        assert ours.take(run, we.name, 0) == run / "claim-2"
        (tmp_path / "workers" / f"{we.name}.json").unlink()  # by one who has tidied up
        assert we.buried()


def test_a_clock_set_back_stops_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker(tmp_path) as worker:
        (file,) = tmp_path.glob("workers/*.json")
        now, seen = time.time_ns(), [file.stat().st_mtime_ns]
        for step in (0, -3600, -3600, -7200, 1, 1):
            monkeypatch.setattr(claims.time, "time_ns", lambda: now + step * 10**9)  # noqa: B023
            worker.tell(step=step)
            worker._beat()
            seen.append(file.stat().st_mtime_ns)
        assert seen == sorted(set(seen))
        assert json.loads(file.read_text())["step"] == 1


def test_a_claim_that_could_not_be_let_go_of_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = folders(tmp_path, 1)
    ours = Claims(tmp_path)
    with Worker(tmp_path) as we, monkeypatch.context() as full:
        claim = ours.take(run, we.name, 0)
        assert claim

        def no_space(*_: object) -> None:
            raise OSError("No space left on device")

        full.setattr(claims, "replace", no_space)
        ours.end(claim, "released")
        full.undo()
        assert ours.take(run, we.name, 0) == claim


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_created_once_and_whole(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(a: Path, b: Path) -> None:
        raise PermissionError("Operation not permitted")

    if not links:  # some network and user-space file systems have none
        monkeypatch.setattr(os, "link", link)
    assert create(tmp_path / "a", "first")
    assert not create(tmp_path / "a", "second")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "first")]


def test_what_went_wrong_counts_until_the_run_got_further_or_is_forgiven(tmp_path: Path) -> None:
    (run,) = folders(tmp_path, 1)
    ours = Claims(tmp_path)

    def attempt(step: int, how: str) -> Attempts:
        before = ours.attempts(run, step)
        claim = ours.take(run, we.name, step)
        assert claim
        ours.end(claim, how, f"at {step}")
        return before

    with Worker(tmp_path) as we:
        assert attempt(0, "failed") == Attempts()
        assert attempt(0, "released") == Attempts(crashes=1, said="at 0")
        assert attempt(0, "failed").crashes == 1  # an interrupt is nobody's fault
        assert attempt(50, "failed") == Attempts()
        assert ours.attempts(run, 50) == Attempts(crashes=1, said="at 50")
        ours.forgive(run)
        assert ours.attempts(run, 50) == Attempts()


def test_a_crash_that_was_seen_counts_as_one(tmp_path: Path) -> None:
    (run,) = folders(tmp_path, 1)
    ours = Claims(tmp_path)
    they = Worker(tmp_path)
    they.__enter__()
    assert ours.take(run, they.name, 0)
    assert ours.attempts(run, 0) == Attempts()  # it is under way
    ours.bury(they.name, crashed="SIGSEGV")
    assert ours.holder(run) is None
    assert ours.attempts(run, 0) == Attempts(crashes=1, said="SIGSEGV")
    they.__exit__()


def test_a_half_written_file_is_no_worker(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        (tmp_path / "workers" / f"{claims.TEMPORARY}0-{worker.name}.json").write_text("{")
        assert Claims(tmp_path).workers() == [worker.name]
