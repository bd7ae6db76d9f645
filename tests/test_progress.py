"""Progress: what a person reads while a sweep trains."""

import io
import re

import numpy as np
from rich.console import Console

from cdl.config import base, change, flatten
from cdl.progress import TerminalProgress, duration
from cdl.sweep.grid import Point
from cdl.train.loop import LaneStatus, Run


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 185, 7800)] == ["0 s", "59 s", "3 min 05 s", "2 h 10 min"]


def test_work_done_adds_up_when_a_run_diverges() -> None:
    points = [Point(flatten(change(base(), {"T": t})), "f") for t in (100, 300)]
    runs = [Run(p.id, 0, np.full(p.config.T, 0.1), (p.config.T,), None) for p in points]
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    with TerminalProgress(console) as progress:
        progress.start(points, finished=2, lanes=2)
        progress.block([LaneStatus(runs[0], 20, 0.1, 3.0), LaneStatus(runs[1], 20, 0.1, 3.0)])
        progress.finished(points[0], {"loss": None, "status": "diverged", "seconds": 1.0})
        progress.block([LaneStatus(runs[0], 40, 0.1, np.nan), LaneStatus(runs[1], 40, 0.1, 2.9)])  # still in flight
        progress.finished(points[1], {"loss": 2.5, "status": "done", "seconds": 65.0})
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 runs, 2 already done; 2 at a time" in said
    assert re.search(r"\[3/4\] +eta_ref 1 +T 100 +diverged", said)
    assert re.search(r"\[4/4\] +eta_ref 1 +T 300 +loss 2.5000 +\(1 min 05 s\)\n", said)  # and nothing left
    assert progress._work_done == progress._work
