"""Two real processes with four devices each, as two hosts would be: the losses of one process with eight."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cdl.errors import UserError
from cdl.sweep.store import MOST_CRASHES, Store, sweep_table
from cdl.train import distributed
from cdl.train.distributed import join_processes

from ..conftest import TINY

# `cdl train` that writes down the shape of the first batch that it reads.
COMMAND = """
import sys
from cdl.data import text
plain, note = text.batches, open(sys.argv.pop(), "w")
def noting(*arguments):
    dataset = plain(*arguments)
    print(dataset[0].shape, file=note, flush=True)
    return dataset
text.batches = noting
from cdl.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def start(out: Path, devices: int, *arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, f"--config={TINY}", f"--out={out}", "data.batch_size=16", *arguments]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=folder)


def start_two(
    out: Path,
    *arguments: str,
    folders: Sequence[Path | None] = (None, None),
    each: Sequence[Sequence[str]] = ((), ()),
) -> list[subprocess.Popen[str]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        start(
            out,
            4,
            *arguments,
            *each[i],
            f"--coordinator=127.0.0.1:{port}",
            "--processes=2",
            f"--process={i}",
            str(out.with_name(f"{out.name}-{i}.txt")),
            folder=folder,
        )
        for i, folder in enumerate(folders)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("mesh.data=2", "mesh.fsdp=-1"), ("mesh.data=4", "mesh.tensor=2")])
def test_two_processes_give_the_losses_of_one(mesh: tuple[str, str], tmp_path: Path) -> None:
    arguments = ("T=60", *mesh, "model.n_head=2", "model.d_model=16")
    alone = start(tmp_path / "one", 8, *arguments, str(tmp_path / "one.txt"))
    _, said = alone.communicate(timeout=300)
    assert alone.returncode == 0, said
    for process in start_two(tmp_path / "two", *arguments):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    one, two = (sweep_table(tmp_path / name) for name in ("one", "two"))
    assert one["id"].tolist() == two["id"].tolist()
    assert (one["processes"].tolist(), two["processes"].tolist()) == ([1], [2])
    a, b = (Store(tmp_path / name).curve(one["id"][0]) for name in ("one", "two"))
    for column in ("train_loss", "eval_loss"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-5, err_msg=column)
    shapes = [(tmp_path / f"{name}.txt").read_text().splitlines()[-1] for name in ("one", "two-0", "two-1")]
    assert shapes == ["(16, 17)", "(8, 17)", "(8, 17)"]  # each reads its own half


@pytest.mark.slow
def test_a_signal_to_one_process_stops_and_saves_both(tmp_path: Path) -> None:
    arguments = ("T=100000", "eval.times=1", "mesh.fsdp=-1", "checkpoint.steps=20")
    processes = start_two(tmp_path / "s", *arguments)
    began = time.monotonic()
    while time.monotonic() - began < 200 and not list((tmp_path / "s").glob("checkpoints/*/step_*")):
        assert all(p.poll() is None for p in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    said = [p.communicate(timeout=100)[1] for p in processes]
    assert processes[1].returncode == 143, said[1]
    assert processes[0].returncode == 130, said[0]  # stopped, though not by a signal of its own
    assert "those under way are saved" in said[0].splitlines()[-1]


@pytest.mark.slow
def test_a_run_that_always_raises_ends_both_but_is_given_up_in_the_end(tmp_path: Path) -> None:
    config, out = tmp_path / "two.py", tmp_path / "s"
    text = Path(TINY).read_text()
    config.write_text(text.replace("T=[40, 60, 90, 130]", "T=[40, 130]").replace("[0.5, 2.0]", "[0.5]"))
    faulty = str(Path(__file__).parents[1] / "launch" / "faulty.py")
    environment = os.environ | dict(FAULTY="raise", FAULTY_T="130", JAX_NUM_CPU_DEVICES="4")
    finished = []
    for _ in range(4):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        words = ["sweep", f"--config={config}", f"--out={out}", "data.batch_size=16", "mesh.fsdp=-1", "--processes=2"]
        command = [sys.executable, faulty, *words, f"--coordinator=127.0.0.1:{port}"]
        pipe = subprocess.PIPE
        both = [
            subprocess.Popen([*command, f"--process={i}"], stdout=pipe, stderr=pipe, text=True, env=environment)
            for i in range(2)
        ]
        said = [process.communicate(timeout=200)[1] for process in both]
        finished.append(len(Store(out).ids()))
        if both[0].returncode == 2:
            break
        assert "RuntimeError: a cosmic ray" in said[0]
    assert "1 of 2 runs failed" in said[0].splitlines()[-1]
    assert finished == [0, 1, 1, 1]  # the other one goes first as soon as something is known against this one
    (record,) = Store(out).failed().values()
    assert record["attempts"] == MOST_CRASHES


@pytest.mark.slow
def test_trouble_of_one_process_ends_both_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = [p.communicate(timeout=100)[1] for p in start_two(tmp_path / "file", "T=60", "mesh.fsdp=-1")]
    assert "is a file; choose a folder" in said[0]
    assert "the first process could not go on; its message says why" in said[1]
    # Two hosts with another command each, which must not become one run.
    pair = start_two(tmp_path / "mixed", "T=60", "mesh.fsdp=-1", each=(("seed=3",), ("seed=4",)))
    for process in pair:
        assert "process 1 has another config, other options or other data than process 0" in process.communicate()[1]
    assert not (tmp_path / "mixed").exists()
    # Data that one of them cannot read.
    missing = str(tmp_path / "missing.txt")
    said = [p.communicate()[1] for p in start_two(tmp_path / "c", "T=60", each=((), (f"data.path={missing}",)))]
    assert "another process could not go on" in said[0]
    assert "missing.txt' does not exist" in said[1]
    # Two hosts with a folder each, under one name.
    here = [tmp_path / name for name in "ab"]
    for folder in here:
        folder.mkdir()
    processes = start_two(Path("runs"), "T=60", "mesh.fsdp=-1", folders=here)
    for process in processes:
        _, last = process.communicate(timeout=100)
        assert process.returncode == 2, last
        assert "process 1 does not see what process 0 writes to 'runs'; choose a folder that all" in last
    assert not (tmp_path / "b" / "runs").exists()


def test_a_first_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_MEET_SECONDS", 1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # nobody listens
        with pytest.raises(UserError, match=r"no process 0 there within 1 seconds \(.*refused\); start one"):
            join_processes(f"127.0.0.1:{s.getsockname()[1]}", 2, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("10.0.0.1:1234", 2, None), "--coordinator, --processes and --process belong together"),
        (("10.0.0.1", 2, 0), "--coordinator='10.0.0.1' must be host:port"),
        (("10.0.0.1:1234", 2, 2), "--process=2 must be one of 0 to 1"),
    ],
)
def test_bad_addresses_are_named(arguments: tuple[str, int, int | None], said: str) -> None:
    with pytest.raises(UserError) as e:
        join_processes(*arguments)
    assert said in str(e.value)
