"""What a person sees while a sweep trains: points done, time left, and the rate and loss of every lane."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cdl.sweep.grid import Point
from cdl.train.loop import LaneStatus

__all__ = ["TerminalProgress", "duration"]


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


class TerminalProgress:
    """A `cdl.sweep.run.Listener`: a line for every finished point, and on a terminal a live table below them.

    Use as a context manager.
    """

    def __init__(self, console: Console):
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._lanes: Sequence[LaneStatus] = ()
        self._points: dict[str, Point] = {}
        self._finished = self._before = 0
        self._work = self._work_done = 0.0  # in tokens, so that points of different batch add up
        self._steps: dict[str, int] = {}
        self._begun: tuple[float, float] | None = None  # clock and work done when the first numbers came back

    def __enter__(self) -> "TerminalProgress":
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def start(self, todo: Sequence[Point], finished: int, lanes: int) -> None:
        self._points = {p.id: p for p in todo}
        self._before = finished
        self._work = sum(p.config.T * _tokens(p) for p in todo)
        kept = f", {finished} already done" if finished else ""
        self._console.print(
            f"{len(todo)} run{'s' * (len(todo) != 1)}{kept}; {lanes} at a time. Compiling ...", highlight=False
        )

    def block(self, lanes: Sequence[LaneStatus]) -> None:
        self._lanes = lanes
        for lane in lanes:
            self._advance(lane.run.id, lane.step)
        if self._begun is None:
            self._begun = (time.monotonic(), self._work_done)
        self._refresh()

    def finished(self, point: Point, result: Mapping[str, Any]) -> None:
        self._finished += 1
        self._advance(point.id, point.config.T)
        loss = f"loss {result['loss']:.4f}" if result["loss"] is not None else f"[red]{result['status']}[/red]"
        total = self._before + len(self._points)
        self._console.print(
            f"[{self._before + self._finished:>{len(str(total))}}/{total}]"
            f"  eta_ref {point.config.eta_ref:<6g}  T {point.config.T:<6}  {loss}  "
            f"({duration(result['seconds'])}){self._left()}",
            highlight=False,
            soft_wrap=True,
        )

    def _advance(self, id: str, step: int) -> None:
        before = self._steps.get(id, 0)
        self._steps[id] = max(step, before)  # a diverged run has ended, whatever of it is still in flight
        self._work_done += (self._steps[id] - before) * _tokens(self._points[id])

    def _rate(self) -> float:
        """Tokens a second, compilation left out; 0 while it is not known."""
        if self._begun is None:
            return 0.0
        seconds = time.monotonic() - self._begun[0]
        return (self._work_done - self._begun[1]) / seconds if seconds > 1 else 0.0

    def _left(self) -> str:
        rate, work = self._rate(), self._work - self._work_done
        return f"  about {duration(work / rate)} left" if rate and work else ""

    def _refresh(self) -> None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("eta_ref", "T", "step", "", "rate", "train loss"):
            table.add_column(name, justify="right" if name else "left")
        for lane in self._lanes:
            c, share = self._points[lane.run.id].config, lane.step / len(lane.run.eta_T)
            bar = "━" * round(20 * share) + "╌" * (20 - round(20 * share))
            table.add_row(f"{c.eta_ref:g}", str(c.T), str(lane.step), bar, f"{lane.eta:.5f}", f"{lane.loss:.4f}")
        total, share = self._before + len(self._points), self._work_done / max(self._work, 1)
        rate = f", {self._rate():,.0f} tokens/s" if self._rate() else ""
        head = f"{self._before + self._finished} of {total} runs, {share:.0%} of the steps{rate}{self._left()}"
        self._live.update(Group(Text(head, style="bold"), table), refresh=True)


def _tokens(point: Point) -> int:
    """Predicted tokens a step."""
    return point.config.data.batch_size * point.config.data.seq_len
