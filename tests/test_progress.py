"""Progress: what a person reads while runs train."""

import io
import itertools
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cdl.config import base, change, flatten
from cdl.progress import TerminalProgress
from cdl.sweep.grid import Point
from cdl.train.flops import StepCost
from cdl.train.loop import LaneStatus, Run
from cdl.train.step import Evaluation
from cdl.wording import LINE_SECONDS, duration

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 185, 7800)] == ["0 s", "59 s", "3 min 05 s", "2 h 10 min"]


def points(*horizons: int) -> list[Point]:
    return [Point(flatten(change(base(), {"T": T})), "f") for T in horizons]


def run_of(point: Point) -> Run:
    return Run(point.id, 0, np.full(point.config.T, 0.1), (point.config.T,), iter)


def status(
    run: Run, first: int, step: int, loss: float = 3.0, evaluation: Any = None, waited: float = 0.0
) -> LaneStatus:
    n = step - first
    return LaneStatus(run, first, step, run.eta_T[first:step], np.full(n, loss), np.full(n, 1.5), evaluation, waited)


class Watched:
    """Progress on a fake clock, and what it said."""

    def __init__(self, todo: list[Point], cost: StepCost, width: int = 140, terminal: bool = False):
        self.now = 0.0
        self._file = io.StringIO()
        console = Console(file=self._file, width=width, force_terminal=terminal, _environ={"TERM": "xterm"})
        self.progress = TerminalProgress(console, clock=lambda: self.now)
        self.progress.__enter__()
        self.progress.start(todo, finished=0, lanes=len(todo), costs={p.id: cost for p in todo})

    def block(self, at: float, *lanes: LaneStatus) -> str:
        """What is said of the lanes at a time."""
        self.now = at
        before = len(self._file.getvalue())
        self.progress.block(lanes)
        return self._file.getvalue()[before:]

    def end(self) -> str:
        self.progress.__exit__(None, None, None)
        return self._file.getvalue()


TOKENS = StepCost("tokens", amount=1000, flops=600, peak=100_000.0)


def test_work_done_adds_up_when_a_run_diverges() -> None:
    todo = points(100, 300)
    runs = [run_of(p) for p in todo]
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    with TerminalProgress(console) as progress:
        progress.start(todo, finished=2, lanes=2, costs={p.id: TOKENS for p in todo})
        progress.block([status(runs[0], 0, 20), status(runs[1], 0, 20)])
        progress.finished(todo[0], {"loss": None, "status": "diverged", "seconds": 1.0})
        progress.block([status(runs[0], 20, 40, np.nan), status(runs[1], 20, 40)])  # still in flight
        progress.finished(todo[1], {"loss": 2.5, "status": "done", "seconds": 65.0})
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 runs, 2 already done; 2 at a time" in said
    assert re.search(r"\[3/4\] +eta_ref 1 +T 100 +diverged", said)
    assert re.search(r"\[4/4\] +eta_ref 1 +T 300 +loss 2.5000 +\(1 min 05 s\)\n", said)  # and nothing left
    assert progress._work_done == progress._work


def test_a_log_file_has_a_line_every_half_minute() -> None:
    """20 steps a second of 1000 tokens and 600 FLOPs: a line says so, with what is left of the 100,000."""
    todo = points(100_000)
    run, watched = run_of(todo[0]), Watched(points(100_000), TOKENS)
    lines = [watched.block(k / 4, status(run, 5 * k, 5 * k + 5, waited=k * 0.025)) for k in range(500)]
    when = [k / 4 for k, line in enumerate(lines) if line]
    assert when == [LINE_SECONDS * i for i in (1, 2, 3, 4)]
    assert lines[480] == (
        "step 2405/100000  loss 3.0000  grad norm 1.5  rate 0.1  20,000 tokens/s  MFU 12.0%  waited 10.0%  "
        "1 h 21 min left\n"  # 97,595 steps
    )


def test_a_single_run_has_a_line_for_every_evaluation() -> None:
    todo = points(100)
    run, watched = run_of(todo[0]), Watched(points(100), StepCost("images", 64, 600, None))
    assert watched.block(0, status(run, 0, 10)) == ""
    said = watched.block(4, status(run, 10, 50, evaluation=Evaluation(2.5, 0.625)))  # type: ignore[arg-type]
    assert said == (
        "step 50/100  loss 3.0000  held-out 2.5000  accuracy 62.5%  grad norm 1.5  rate 0.1  640 images/s  "
        "waited 0.0%  5 s left\n"
    )


def test_a_sweep_in_a_log_file_says_how_far_it_is() -> None:
    todo = points(100, 300)
    a, b = (run_of(p) for p in todo)
    watched = Watched(todo, TOKENS)
    assert watched.block(0, status(a, 0, 10), status(b, 0, 10, evaluation=Evaluation(2.5, 0.5))) == ""  # type: ignore[arg-type]
    said = watched.block(30, status(a, 10, 40), status(b, 10, 40))
    assert said == "0/2 runs  20%  2,000 tokens/s  MFU 0.6%  waited 0.0%  2 min 40 s left\n"  # MFU: the mean of lanes


def test_a_run_that_goes_on_says_so_and_its_speed_is_of_now() -> None:
    todo = points(1000)
    run, watched = run_of(todo[0]), Watched(points(1000), TOKENS)
    # It waited 500 s before it was stopped.
    assert watched.block(100, status(run, 600, 601, waited=500.0)) == "T 1000  goes on from step 600\n"
    said = watched.block(130, status(run, 601, 700, waited=503.0))
    assert said.endswith("3,300 tokens/s  MFU 2.0%  waited 10.0%  1 min 31 s left\n")  # 300 of 99 in 30 s
    assert watched.progress._work_done == 700 * TOKENS.flops


def test_a_lane_that_goes_on_later_brings_no_old_waiting() -> None:
    todo = points(1000, 2000)
    a, b = (run_of(p) for p in todo)
    watched = Watched(todo, TOKENS)
    watched.block(0, status(a, 0, 1))
    said = watched.block(20, status(a, 1, 100, waited=1.0), status(b, 600, 601, waited=500.0))
    assert said == "eta_ref 1  T 2000  goes on from step 600\n"
    said = watched.block(40, status(a, 100, 200, waited=4.0), status(b, 601, 700, waited=503.0))
    assert "waited 10.0%" in said


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("unit", ["tokens", "images"])
@pytest.mark.parametrize("runs", [1, 8])
def test_a_terminal_shows_all_and_wraps_nothing(width: int, unit: str, runs: int) -> None:
    T = 500_000
    todo = points(*range(T, T + runs))
    lanes = [run_of(p) for p in todo]
    cost = StepCost(unit, amount=100_000, flops=600, peak=20_000.0)
    watched = Watched(todo, cost, width, terminal=True)
    for k in range(3):
        blocks = [
            status(r, 20 * k, 20 * k + 20, 10.98765, Evaluation(10.98765, 0.98765), k * 1.0)  # type: ignore[arg-type]
            for r in lanes
        ]
        said = watched.block(2.0 * k, *blocks)
    lines = ESCAPES.sub("", said).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    million = f"{runs * 1_000_000:,} {unit}/s"
    for expected in (f"0/{runs} runs", million, "MFU", "waited 50.0%", "h 53 min left", "grad norm", "10.9877", "60/5"):
        assert expected in text, expected
    assert ("98.8%" in text) == (unit == "images")
    assert "…" not in text
    watched.end()


def test_a_terminal_is_not_redrawn_for_every_step() -> None:
    """Several hosts report every step."""
    todo = points(1000)
    run, watched = run_of(todo[0]), Watched(todo, TOKENS, terminal=True)
    drawn = [bool(watched.block(0.01 * k, status(run, k, k + 1))) for k in range(100)]
    assert sum(drawn) == pytest.approx(10, abs=1)
    assert all(len(list(same)) < 12 for now, same in itertools.groupby(drawn) if not now)
    watched.end()
