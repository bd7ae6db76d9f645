"""The scripts in launch/: that of Slurm with a real one, that of TPU slices with a `gcloud` that runs commands here."""

import os
import sys
import time
from pathlib import Path

import pytest

from cdl.sweep.grid import points_in
from cdl.sweep.store import Store, sweep_table
from tests.conftest import TINY
from tests.launch.slurm_cluster import missing, slurm_cluster
from tests.launch.test_local import run
from tests.sweep.test_run import equal

LAUNCH = Path(__file__).parents[2] / "launch"

# Of a slice with two hosts: both run the command.
GCLOUD = """#!/usr/bin/env python3
import subprocess, sys
*words, command = sys.argv[1:]
assert words == "compute tpus tpu-vm ssh slice --zone=zone --worker=all".split(), words
hosts = [subprocess.Popen(["sh", "-c", command.removeprefix("--command=")]) for _ in range(2)]
sys.exit(max(host.wait() for host in hosts))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of somebody who has gcloud, and whose hosts have cdl in the folder that this test runs in."""
    (tmp_path / "bin").mkdir()
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    folder = tmp_path / "with space"
    (folder / ".venv" / "bin").mkdir(parents=True)
    cdl = folder / ".venv" / "bin" / "cdl"
    cdl.write_text(f'#!/bin/sh\nenv | grep TPU_ >> "{tmp_path}/settings"\nexec "{sys.executable}" -m cdl.cli "$@"\n')
    cdl.chmod(0o755)
    return {"PATH": f"{gcloud.parent}:{os.environ['PATH']}", "CDL_FOLDER": str(folder)}


@pytest.mark.slow
def test_each_host_of_a_tpu_slice_takes_runs_of_its_own(
    environment: dict[str, str], tiny_sweep: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a sweep"
    Store(out).open_for(points_in(Store(tiny_sweep).grids()[0]))
    done = run([str(LAUNCH / "tpu.sh"), "slice", "zone", "worker", str(out)], **environment)
    assert done.returncode == 0, done.stderr
    equal(out, tiny_sweep)
    settings = (tmp_path / "settings").read_text().splitlines()
    assert settings.count("TPU_VISIBLE_CHIPS=0,1,2,3") == 2
    assert settings.count("TPU_PROCESS_BOUNDS=1,1,1") == 2
    assert run([str(LAUNCH / "tpu.sh"), "slice"]).returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_one_run_on_several_tasks_of_slurm(tiny_sweep: Path, tmp_path: Path) -> None:
    """Two tasks find each other through Slurm and train one run on the devices of both."""
    out = tmp_path / "s"
    with slurm_cluster(tmp_path / "slurm") as client:
        settings = client | {"CDL_FOLDER": str(LAUNCH.parent), "JAX_NUM_CPU_DEVICES": "1"}
        words = ["train", f"--config={TINY}", f"--out={out}", "T=60", "eta_ref=0.5", "mesh.data=2"]
        options = ["--parsable", "--ntasks=2", "--ntasks-per-node=2", "--overcommit", f"--output={tmp_path}/log"]
        asked = run(["sbatch", *options, str(LAUNCH / "slurm.sh"), *words], **settings)
        assert asked.returncode == 0, asked.stderr
        while run(["squeue", "--noheader"], **settings).stdout:
            time.sleep(0.5)
    said = (tmp_path / "log").read_text()
    assert "done: held-out loss" in said, said
    (row,) = sweep_table(out).itertuples()
    assert row.processes == 2
    alone = sweep_table(tiny_sweep).query("T == 60 and eta_ref == 0.5")["loss"].item()
    assert row.loss == pytest.approx(alone, abs=1e-4)
