"""Workers that are tasks of a real Ray cluster of two nodes, started here for the test."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from cdl.sweep.store import Store
from tests.launch.ray_cluster import missing, ray_cluster
from tests.launch.test_local import Written, interrupt, sweep
from tests.sweep.test_run import equal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


def test_a_node_that_dies_in_the_middle_costs_nothing(long8: str, undisturbed8: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    written = Written(out)
    command = sweep(out, "--backend=ray", "--workers=2", "--resources=CPU=1", config=long8)
    with ray_cluster(nodes=2) as cluster:
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            while process.poll() is None and written.look() < 2:
                time.sleep(0.02)
            assert written.look() < 7  # both nodes have a run
            cluster.remove_node()
            _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert written.look() == 8
        equal(out, undisturbed8)
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "nothing to train" in again.stderr
        greedy = sweep(tmp_path / "other", "--backend=ray", "--resources=GPU=8")
        refused = subprocess.run(greedy, env=environment, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "--resources=GPU=8 is more than the cluster has, 0; ask for less" in refused.stderr
    assert not Store(out).failed()


def test_ctrl_c_has_the_tasks_save_and_end(tmp_path: Path) -> None:
    with ray_cluster(nodes=2) as cluster:
        words = ("--backend=ray", "--workers=2", "--resources=CPU=1")
        assert not any(w.is_running() for w in interrupt(tmp_path, *words, RAY_ADDRESS=cluster.address))


def test_no_cluster_is_said(tmp_path: Path) -> None:
    command = sweep(tmp_path / "s", "--backend=ray")
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster at '127.0.0.1:1'" in done.stderr
