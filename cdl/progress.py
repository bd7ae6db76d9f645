"""What a person sees while runs train: runs done, speed, time left, and the rate and losses of every lane."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cdl.sweep.grid import Point
from cdl.train.flops import Speed, StepCost
from cdl.train.loop import LaneStatus
from cdl.train.step import Evaluation
from cdl.wording import LINE_SECONDS, duration, finished_line

__all__ = ["TerminalProgress"]

_REFRESH_SECONDS = 0.1  # of the table; several hosts report every step


class TerminalProgress:
    """A `cdl.sweep.run.Listener`: a line for every finished run, and on a terminal a live table below them.

    Where there is no terminal (a log file) a line says every `LINE_SECONDS` how it goes. A single run also has a line
    for every evaluation. Use as a context manager.

    Args:
      console: where to.
      clock: seconds, as `time.monotonic`.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self._console, self._clock = console, clock
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._lanes: Sequence[LaneStatus] = ()
        self._points: dict[str, Point] = {}
        self._costs: Mapping[str, StepCost] = {}
        self._finished = self._before = 0
        self._work = self._work_done = 0.0  # in FLOPs, so that models and batches of different size add up
        self._worked = 0.0  # of the work done, what was done here and not before a restart
        self._steps: dict[str, int] = {}
        self._waited: dict[str, float] = {}
        self._evaluations: dict[str, Evaluation] = {}
        self._begun: tuple[float, float] | None = None  # clock and work done here when the first numbers came back
        self._said = self._shown = -float("inf")
        self._speed = Speed(clock)

    def __enter__(self) -> "TerminalProgress":
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def start(self, todo: Sequence[Point], finished: int, lanes: int, costs: Mapping[str, StepCost]) -> None:
        self._points, self._costs = {p.id: p for p in todo}, costs
        self._before = finished
        self._work = sum(p.config.T * costs[p.id].flops for p in todo)
        kept = f", {finished} already done" if finished else ""
        self._print(f"{len(todo)} run{'s' * (len(todo) != 1)}{kept}; {lanes} at a time. Compiling ...")

    def block(self, lanes: Sequence[LaneStatus]) -> None:
        self._lanes = lanes
        for lane in lanes:
            if lane.run.id not in self._steps:
                self._take_up(lane)
            self._advance(lane.run.id, lane.step)
            if lane.evaluation is not None:
                self._evaluations[lane.run.id] = lane.evaluation
        # All lanes wait together, for one batch after the other.
        waits = [lane.waited - self._waited.get(lane.run.id, 0.0) for lane in lanes]
        self._waited |= {lane.run.id: lane.waited for lane in lanes}
        if lanes:
            self._speed.add(0, self._costs[lanes[0].run.id], max(0.0, *waits))
        self._speed.read()
        now = self._clock()
        if self._begun is None:
            self._begun, self._said = (now, self._worked), now
        evaluated = len(self._points) == 1 and any(lane.evaluation is not None for lane in lanes)
        if self._console.is_terminal:
            if evaluated:
                self._print("  ".join(self._numbers(lanes[0])))
        elif evaluated or now - self._said >= LINE_SECONDS:
            self._said = now
            self._print(self._line())
        if now - self._shown >= _REFRESH_SECONDS:
            self._shown = now
            self._refresh()

    def finished(self, point: Point, result: Mapping[str, Any]) -> None:
        self._finished += 1
        self._advance(point.id, point.config.T)
        number, total = self._before + self._finished, self._before + len(self._points)
        line = finished_line(number, total, point.config.eta_ref, point.config.T, result)
        left = self._left()
        self._console.print(f"{line}{f'  about {left}' if left else ''}", highlight=False, soft_wrap=True)
        self._refresh()

    def finished_elsewhere(self, point: Point) -> None:
        self._finished += 1
        self._work -= point.config.T * self._costs[point.id].flops

    def failed(self, point: Point, error: str) -> None:
        self.finished_elsewhere(point)
        self._print(f"eta_ref {point.config.eta_ref:g}  T {point.config.T}  failed: {error}")

    def _take_up(self, lane: LaneStatus) -> None:
        """A run begins, or goes on from a checkpoint: what was done before it counts for the share, not the speed."""
        id, first = lane.run.id, lane.first
        self._steps[id], self._waited[id] = first, lane.waited if first else 0.0
        self._work_done += first * self._costs[id].flops
        if first:
            which = "" if len(self._points) == 1 else f"eta_ref {self._points[id].config.eta_ref:g}  "
            self._print(f"{which}T {len(lane.run.eta_T)}  goes on from step {first}")

    def _advance(self, id: str, step: int) -> None:
        steps = max(step - self._steps.get(id, 0), 0)  # a diverged run has ended, whatever of it is still in flight
        self._steps[id] = self._steps.get(id, 0) + steps
        self._work_done += steps * self._costs[id].flops
        self._worked += steps * self._costs[id].flops
        self._speed.add(steps, self._costs[id])

    def _left(self) -> str:
        """Time left, by the mean speed since the first numbers came back; compilation is before that."""
        if self._begun is None or self._clock() - self._begun[0] <= 1:
            return ""
        per_s = (self._worked - self._begun[1]) / (self._clock() - self._begun[0])
        work = self._work - self._work_done
        return f"{duration(work / per_s)} left" if per_s and work else ""

    def _head(self) -> list[str]:
        """Speed, MFU, waiting and time left, as far as they are known."""
        said, speed = [], self._speed
        if speed.amount is not None and self._lanes:
            unit = self._costs[self._lanes[0].run.id].unit
            said.append(f"{speed.amount:,.0f} {unit}/s")
            if speed.mfu is not None:
                said.append(f"MFU {speed.mfu / len(self._lanes):.1%}")
            said.append(f"waited {speed.waited or 0:.1%}")
        left = self._left()
        return [*said, left] if left else said

    def _numbers(self, lane: LaneStatus) -> list[str]:
        """Step and losses of a run."""
        said = [f"step {lane.step}/{len(lane.run.eta_T)}", f"loss {lane.loss[-1]:.4f}"]
        evaluation = self._evaluations.get(lane.run.id)
        if evaluation is not None:
            said.append(f"held-out {evaluation.loss:.4f}")
            if self._of_images(lane):
                said.append(f"accuracy {evaluation.accuracy:.1%}")
        return said

    def _line(self) -> str:
        """How it goes, in one line: of a single run with its numbers."""
        if len(self._points) > 1 or not self._lanes:
            return "  ".join([*self._share(), *self._head()])
        lane = self._lanes[0]
        optimizer = [f"grad norm {lane.grad_norm[-1]:.3g}", f"rate {lane.eta[-1]:.3g}"]
        return "  ".join([*self._numbers(lane), *optimizer, *self._head()])

    def _share(self) -> list[str]:
        share = self._work_done / max(self._work, 1)
        return [f"{self._before + self._finished}/{self._before + len(self._points)} runs", f"{share:.0%}"]

    def _of_images(self, lane: LaneStatus) -> bool:
        return self._costs[lane.run.id].unit == "images"

    def _refresh(self) -> None:
        if not self._console.is_terminal:
            return
        images = any(self._of_images(lane) for lane in self._lanes)
        digits = max((len(str(len(lane.run.eta_T))) for lane in self._lanes), default=1)
        # Widest numbers; columns that went by what they hold now would move from one picture to the next.
        columns = {"eta_ref": 7, "step": 2 * digits + 1, "": 0, "rate": 8, "loss": 7, "held-out": 8}
        columns |= ({"accuracy": 8} if images else {}) | {"grad norm": 9}
        bar = min(20, max(1, self._console.width - sum(columns.values()) - 2 * (len(columns) - 1)))
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, width in columns.items():
            table.add_column(name, justify="right" if name else "left", no_wrap=True, min_width=width)
        for lane in self._lanes:
            T, evaluation = len(lane.run.eta_T), self._evaluations.get(lane.run.id)
            filled = round(bar * lane.step / T)
            table.add_row(
                f"{self._points[lane.run.id].config.eta_ref:g}",
                f"{lane.step}/{T}",
                "━" * filled + "╌" * (bar - filled),
                f"{lane.eta[-1]:.3g}",
                f"{lane.loss[-1]:.4f}",
                "" if evaluation is None else f"{evaluation.loss:.4f}",
                *([("" if evaluation is None else f"{evaluation.accuracy:.1%}")] if images else []),
                f"{lane.grad_norm[-1]:.3g}",
            )
        head = Text("  ".join([*self._share(), *self._head()]), style="bold", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(head, table), refresh=True)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
