"""Runs that are stopped, killed, damaged or moved to other devices end as if nothing had happened."""

import gc
import itertools
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from cdl.config import load, section
from cdl.data import build as data
from cdl.errors import UserError
from cdl.models import build as models
from cdl.models import resnet
from cdl.models.gpt2 import arguments
from cdl.optim import build as optimizers
from cdl.schedules import schedule
from cdl.sharding import AXES, make_mesh
from cdl.sweep.layout import layout
from cdl.sweep.programs import points_of, program_for
from cdl.sweep.store import Store
from cdl.train import checkpoint
from cdl.train.checkpoint import Checkpoints
from cdl.train.loop import Outcome, Run, RunError, Saving, Stopped, train
from cdl.train.step import Program

from ..conftest import TINY

DATA = data.build(section("data", "text", batch_size=8, seq_len=16))
MODEL = models.build({"name": "gpt2"} | arguments("3k", context=16))
HELDOUT = DATA.heldout(256)


def run(T: int, peak: float, seed: int = 0) -> Run:
    eta_T = schedule("cosine", T, peak=peak)
    return Run(f"{T}-{peak}-{seed}", seed, eta_T, (T // 2, T), partial(DATA.batches, seed))


def program(*sizes: int, lanes: int = 0) -> Program:
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices())
    optimizer = optimizers.build({"name": "muon_nsgd"}, MODEL.rules)
    return Program(MODEL, optimizer, HELDOUT, lanes=lanes or sizes[0], mesh=mesh, block=4, prepare=DATA.prepare)


def saving(folder: Path, steps: int = 0, final: bool = True) -> Saving:
    return Saving(lambda run: Checkpoints(folder / run.id, {"id": run.id}), 3600.0, steps, final)


def trained(p: Program, runs: list[Run], where: Saving, stop_after: int | None = None) -> dict[str, Outcome]:
    """Outcomes; with `stop_after`, of those that ended before `stop` had been asked so often."""
    asked = itertools.count()
    outcomes: dict[str, Outcome] = {}
    try:
        for outcome in train(p, runs, saving=where, stop=lambda: stop_after is not None and next(asked) >= stop_after):
            outcomes[outcome.run.id] = outcome
    except Stopped:
        assert stop_after is not None
    return outcomes


def final_state(p: Program, folder: Path, run: Run) -> Any:
    restored = Checkpoints(folder / run.id, {"id": run.id}).restore(p.lane_like(0))
    assert restored is not None
    assert restored.step == len(run.eta_T)
    return restored.state


def equal(a: dict[str, Outcome], b: dict[str, Outcome]) -> None:
    assert a.keys() == b.keys()
    for id, outcome in a.items():
        assert outcome.status == b[id].status
        for name, values in outcome.curve.items():
            np.testing.assert_array_equal(values, b[id].curve[name], err_msg=f"{id} {name}")


RUNS = [run(40, 0.1), run(23, 0.02, seed=3), run(31, 0.3, seed=1)]


@pytest.mark.parametrize(
    "lanes", [2, pytest.param(4, marks=pytest.mark.slow)]
)  # one on each row of the mesh, two on each
def test_stopped_runs_go_on_bit_for_bit(lanes: int, tmp_path: Path) -> None:
    p = program(2, 1, 1, 1, lanes=lanes)
    straight = trained(p, RUNS, saving(tmp_path / "a"))
    parts: dict[str, Outcome] = {}
    for stop_after in (2, 5, 3, None):
        todo = [r for r in RUNS if r.id not in parts]
        parts |= trained(p, todo, saving(tmp_path / "b"), stop_after)
    equal(parts, straight)
    for r in RUNS:
        states = (final_state(p, tmp_path / folder, r) for folder in "ab")
        jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_runs_on_images_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Batch statistics and the variation of images are as if nothing had happened, too."""
    images = data.build(section("data", "images", batch_size=8, augment="crop_flip"))
    model = models.build({"name": "resnet"} | resnet.arguments(18, stem="cifar", classes=10, width=4))
    optimizer = optimizers.build({"name": "sgd", "momentum": 0.9}, model.rules)
    mesh = make_mesh(dict(run=2, data=1, fsdp=1, tensor=1), jax.devices())
    p = Program(model, optimizer, images.heldout(16), lanes=2, mesh=mesh, block=4, prepare=images.prepare)
    runs = [replace(r, batches=partial(images.batches, r.seed)) for r in RUNS[:2]]
    straight = trained(p, runs, saving(tmp_path / "a"))
    parts = trained(p, runs, saving(tmp_path / "b"), stop_after=3)
    parts |= trained(p, [r for r in runs if r.id not in parts], saving(tmp_path / "b"))
    equal(parts, straight)
    for r in runs:
        states = [final_state(p, tmp_path / folder, r) for folder in "ab"]
        assert jax.tree.leaves(states[0].stats)
        weights = checkpoint.read_weights(tmp_path / "a" / r.id)[:2]
        assert jax.tree.structure(weights) == jax.tree.structure(jax.eval_shape(model.init, 0))
        jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_memory_need_not_hold_a_state_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run has had on its devices is given back before its checkpoint is read."""
    p = program(1, 1, 2, 1)
    trained(p, RUNS[:1], saving(tmp_path), stop_after=3)
    held: list[int] = []
    plain = checkpoint._load

    def live() -> int:
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    def load(*arguments: Any) -> Any:
        held.append(live())
        return plain(*arguments)

    monkeypatch.setattr(checkpoint, "_load", load)
    before, state = live(), sum(x.nbytes for x in jax.tree.leaves(p.state))
    trained(p, RUNS[:1], saving(tmp_path))
    assert len(held) == 1
    assert held[0] <= before - state


@pytest.mark.parametrize("where", ["a batch", "the next run"])
def test_trouble_of_one_run_loses_no_step_of_another(where: str, tmp_path: Path) -> None:
    p = program(2, 1, 1, 1)
    straight = trained(p, RUNS, saving(tmp_path / "a"))

    def batches(first: int) -> Iterator[Any]:
        if where == "the next run":
            raise UserError("the disk is gone")
        yield from itertools.islice(DATA.batches(RUNS[troubled].seed, first), 9)
        raise UserError("the disk is gone")

    troubled = {"a batch": 0, "the next run": 2}[where]
    runs = [replace(r, batches=batches) if i == troubled else r for i, r in enumerate(RUNS)]
    with pytest.raises(RunError, match="the disk is gone") as raised:
        trained(p, runs, saving(tmp_path / "b"))
    assert raised.value.id == RUNS[troubled].id
    assert isinstance(raised.value.error, UserError)
    saved = {r.id: Checkpoints(tmp_path / "b" / r.id, {"id": r.id}).found() for r in RUNS}
    assert saved[RUNS[1 if troubled == 0 else 0].id]
    equal(trained(p, RUNS, saving(tmp_path / "b")), straight)


def test_a_checkpoint_that_cannot_be_read_harms_no_other_lane(tmp_path: Path) -> None:
    p = program(2, 1, 1, 1)
    p.fill({0: 1, 1: 2})
    before = [jax.device_get(p.lane(i)) for i in (0, 1)]

    def make(like: Any) -> Any:
        raise MemoryError

    with pytest.raises(MemoryError):
        p.put_lane(0, make)
    jax.tree.map(np.testing.assert_array_equal, before[1], jax.device_get(p.lane(1)))
    p.fill({0: 1})
    jax.tree.map(np.testing.assert_array_equal, before[0], jax.device_get(p.lane(0)))


@pytest.mark.slow
def test_saving_changes_nothing_and_happens_when_it_is_due(tmp_path: Path) -> None:
    p = program(2, 1, 1, 1)
    plain = {o.run.id: o for o in train(p, RUNS)}
    equal(trained(p, RUNS, saving(tmp_path, steps=7)), plain)
    kept = {r.id: sorted(f.name for f in (tmp_path / r.id).glob("step_*")) for r in RUNS}
    assert kept == {r.id: sorted((f"step_{(len(r.eta_T) - 1) // 7 * 7}", f"step_{len(r.eta_T)}")) for r in RUNS}


def test_a_run_that_ended_before_its_result_was_published_is_not_trained_again(tmp_path: Path) -> None:
    p = program(2, 1, 1, 1)
    straight = trained(p, RUNS, saving(tmp_path))
    batches = partial(pytest.fail, "a batch was read")
    equal(trained(p, [replace(r, batches=batches) for r in RUNS], saving(tmp_path)), straight)


def test_a_damaged_checkpoint_costs_steps_and_changes_no_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    p, r = program(2, 1, 1, 1), RUNS[0]
    straight = {o.run.id: o for o in train(p, [r])}
    trained(p, [r], saving(tmp_path, steps=5), stop_after=8)
    folder = tmp_path / r.id
    newest = max((int(f.name[5:]) for f in folder.glob("step_*")), default=0)
    largest = max((f for f in (folder / f"step_{newest}").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    equal(trained(p, [r], saving(tmp_path)), straight)
    said = capsys.readouterr().err
    assert f"step_{newest} is damaged" in said
    assert re.search(r"the run goes on from step \d+", said)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 1), (1, 1, 2, 2)])
def test_a_run_goes_on_on_other_devices(sizes: tuple[int, ...], tmp_path: Path) -> None:
    r = RUNS[0]
    first = program(1, 2, 4, 1)
    straight = trained(first, [r], saving(tmp_path / "a"))[r.id]
    trained(first, [r], saving(tmp_path / "b"), stop_after=3)
    moved = trained(program(*sizes), [r], saving(tmp_path / "b"))[r.id]
    for name, values in moved.curve.items():
        np.testing.assert_allclose(values, straight.curve[name], rtol=1e-5, err_msg=name)


def train_command(out: Path, *changes: str) -> list[str]:
    return [sys.executable, "-m", "cdl.cli", "train", f"--config={TINY}", f"--out={out}", *changes]


def same_results(a: Path, b: Path, changes: dict[str, Any]) -> None:
    """Two folders of `cdl train` hold the same curve, the same weights and the same optimizer state, bit for bit."""
    config, _ = load(TINY)
    (point,) = points_of(config, [changes])
    like = program_for(point, layout(point.config, 1)).lane_like(0)
    pd.testing.assert_frame_equal(Store(a).curve(point.id), Store(b).curve(point.id), check_exact=True)
    states = []
    for root in (a, b):
        restored = Checkpoints(root / "checkpoints" / point.id, point.identity).restore(like)
        assert restored is not None
        assert restored.step == point.config.T
        states.append(restored.state)
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    T = ("T=30000", "eval.times=2")
    process = subprocess.Popen(train_command(tmp_path / "a", *T), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # ends with the process
        if "Compiling" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "those under way are saved; the same command goes on from there" in said.splitlines()[-1]
    steps = [int(folder.name[5:]) for folder in (tmp_path / "a" / "checkpoints").glob("*/step_*")]
    assert len(steps) == 1  # the signal's, as none was due
    assert 0 < steps[0] < 30000


# The loop of the command, with every batch that it takes written down: step, digest of its tokens.
LOGGED = """
import hashlib, sys
import numpy as np
from cdl.data import text
plain = text.batches
log = open(sys.argv.pop(), "ab", buffering=0)
class Logged:
    def __init__(self, dataset): self.dataset = dataset
    def __getitem__(self, k):
        batch = self.dataset[k]
        if len(batch) == 4:  # not the one row from which shapes are known
            log.write(f"{k} {hashlib.sha256(np.ascontiguousarray(batch)).hexdigest()}\\n".encode())
        return batch
text.batches = lambda *arguments: Logged(plain(*arguments))
from cdl.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_twenty_sigkills_change_no_bit(tmp_path: Path) -> None:
    """Parameters, optimizer state, curve and the tokens of every step are those of a run that was left alone."""
    changes = {"T": 12000, "eval.times": 4, "checkpoint.steps": 200}

    def command(name: str) -> list[str]:
        return [
            sys.executable,
            "-c",
            LOGGED,
            *train_command(tmp_path / name, *(f"{k}={v}" for k, v in changes.items()))[3:],
            str(tmp_path / f"{name}.log"),
        ]

    alone = subprocess.run(command("alone"), capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    moments = random.Random(0)
    log = tmp_path / "killed.log"
    for _ in range(20):
        before = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.exists() or log.stat().st_size < before + 10_000):
            time.sleep(0.01)  # until some hundred batches were read
        time.sleep(moments.uniform(0, 0.5))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended = subprocess.run(command("killed"), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    same_results(tmp_path / "alone", tmp_path / "killed", changes)
    tokens = [dict(line.split() for line in f.read_text().splitlines()) for f in (tmp_path / "alone.log", log)]
    assert len(tokens[0]) == 12000
    assert tokens[0] == tokens[1]
    lines = log.read_text().splitlines()
    assert len(set(lines)) == len(tokens[1])  # a step that was repeated saw the same tokens
    assert len(lines) > len(set(lines))  # and some were
