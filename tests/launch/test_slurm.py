"""Workers that are jobs of a real Slurm, started here for the test."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdl.sweep.store import Store
from tests.launch.slurm_cluster import missing, slurm_cluster
from tests.launch.test_local import Written, interrupt, sweep
from tests.sweep.test_run import equal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield os.environ | environment


def pid_of_a_worker(out: Path) -> int | None:
    claims = Store(out).claims
    return next((claims.record(w)["pid"] for w in claims.workers() if claims.alive(w)), None)


def test_killed_jobs_are_replaced_and_the_table_is_that_of_one_process(
    slurm: dict[str, str], long8: str, undisturbed8: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    written, killed = Written(out), 0
    command = sweep(out, "--backend=slurm", "--workers=2", "--sbatch=--cpus-per-task=1", config=long8)
    with subprocess.Popen(command, env=slurm, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for finished in (1, 4):
            while process.poll() is None and (written.look() < finished or pid_of_a_worker(out) is None):
                time.sleep(0.02)
            if pid := pid_of_a_worker(out):
                os.kill(pid, 9)
                killed += 1
        _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert killed == 2
    assert written.look() == 8
    equal(out, undisturbed8)
    jobs = subprocess.run(["squeue", "--noheader"], env=slurm, capture_output=True, text=True, check=True).stdout
    assert not jobs


def test_a_killed_coordinator_is_followed_by_one_that_finds_its_jobs_at_work(
    slurm: dict[str, str], tiny_sweep: Path, tmp_path: Path
) -> None:
    """Which still wait in the queue, so that nothing in the folder speaks of them."""
    out = tmp_path / "ours"

    def jobs(*which: str) -> list[str]:
        asked = ["squeue", "--noheader", "--array", "--format=%i %j", *which]
        said = subprocess.run(asked, env=slurm, capture_output=True, text=True, check=True).stdout
        return [line.split()[0] for line in said.splitlines() if " cdl-ours-" in line]

    command = sweep(out, "--backend=slurm", "--workers=2", "--sbatch=--cpus-per-task=1 --begin=now+20")
    with subprocess.Popen(command, env=slurm, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(jobs()) < 2:
            time.sleep(0.1)
        process.kill()
    first = jobs()
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 jobs of this sweep are in Slurm's queue already" in done.stderr
    assert jobs("--states=all") == first  # no others were submitted
    assert not jobs()
    equal(out, tiny_sweep)


def test_ctrl_c_has_the_jobs_save_and_end(slurm: dict[str, str], tmp_path: Path) -> None:
    assert not any(w.is_running() for w in interrupt(tmp_path, "--backend=slurm", "--workers=2", **slurm))


def test_options_that_slurm_refuses_are_said(slurm: dict[str, str], tmp_path: Path) -> None:
    command = sweep(tmp_path / "s", "--backend=slurm", "--sbatch=--partition=abacus")
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid partition" in done.stderr.lower()
    assert "Traceback" not in done.stderr
