"""`cdl pilot`: what to train next, so that a budget of updates says most about one much longer run.

`next_step` is a pure function of the finished runs and the goal. The plan of action, `_Pilot.plan`, is written as if it
trained by itself: it asks for a step, sees the results, asks for the next. Each call plays it again from the start; a
step whose points are all in the table passes at once, and the first that lacks some is what to train. The plan sees
results of points that it has asked for and no others. So neither the order in which runs finish nor a kill in the
middle of a step changes what is asked.

It ends. What is asked is never in the table, costs an update or more, and fits into what the runs in the table leave of
the budget; once run it is in the table, whatever its status. Within a call every step passed is at least one row of the
table that no earlier step had, and what asks for nothing runs over finite ladders.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from cdl.errors import UserError
from cdl.laws.horizon import ALWAYS_IN, MOST_EXTRAPOLATION, NoLaw, fit_horizon, numbers

__all__ = ["Goal", "Step", "next_step"]

# Rates are eta_ref * 2^k. In simulations rates sqrt(2) apart gave no better ones: neighbours cannot be told apart, and
# each costs what a longer horizon would.
FIRST = (0, -2, 2, -4, 4)  # k of the first grid, most useful first
WIDEN = 2  # a grid is widened by as much as its rates are apart
FURTHEST = 16  # rates are sought within 2^16 of the first
LADDER = 2  # from one horizon to the next: at 1.4 the four longest, which no test leaves out, hide that the line bends
LEAST_LADDER = 1.25  # a last horizon that the budget cuts short must still be this much longer than the one before
WORTH = 0.5  # a rate goes on while it may be better than the best by this share of the width that is asked for,
SURE = 0.9  # and leaves the race when that can be denied with this confidence
PEAK = 0.5  # a rate is tried again, at a longer horizon, where its peak is this share of the lowest that diverged

_Point = tuple[int, int]  # k of the rate, and T
_Steps = Iterator[tuple[str, list[_Point]] | str]


@dataclass(frozen=True)
class Goal:
    """What the pilots are for.

    T: the horizon to be planned for. budget: updates that all pilots together may take, those in the table included; a
    run of T updates costs T, diverged or not. width: they end once the prediction interval of the loss at T is narrower
    than this share of the loss. shortest: the horizon of the first grid. eta_ref: its middle. longest: the longest
    horizon of a pilot, half of T if None.
    """

    T: int
    budget: float
    width: float = 0.02
    shortest: int = 100
    eta_ref: float = 1.0
    longest: int | None = None

    def __post_init__(self) -> None:
        T, shortest, first = self.T, self.shortest, len(FIRST) * self.shortest
        for fine, wrong in (
            (shortest >= 1, f"shortest={shortest} must be at least 1 update"),
            (shortest < T < math.inf, f"T={T} must be beyond shortest={shortest}; raise T or lower shortest"),
            (0 < self.width < math.inf, f"width={self.width:g} must be a positive share of the loss, such as 0.02"),
            (0 < self.eta_ref < math.inf, f"eta_ref={self.eta_ref:g} must be positive and finite"),
            (
                first <= self.budget < math.inf,
                f"budget={self.budget:g} updates: the first grid takes {first}",
            ),
            (shortest <= self.top <= T, f"longest={self.top} must lie between shortest={shortest} and T={T}"),
        ):
            if not fine:
                raise UserError(wrong)

    @property
    def top(self) -> int:
        """The longest horizon of a pilot."""
        return max(self.T // 2, self.shortest) if self.longest is None else self.longest

    def rate(self, k: int) -> float:
        """eta_ref * 2^k to three digits, which every machine reads as the same float."""
        return float(f"{self.eta_ref * 2.0**k:.3g}")


class Step(NamedTuple):
    """What to train next, (eta_ref, T) each, and why, in words for a person."""

    why: str
    points: tuple[tuple[float, int], ...]


def next_step(table: pd.DataFrame, goal: Goal) -> Step | str:
    """What to train next.

    Args:
      table: columns eta_ref, T, status ("done", "diverged" or "failed") and loss, a row per run; may be empty. Runs
        that no pilot asked for count for the budget and for the law.
      goal: what for.

    Returns:
      A step: points that the table lacks and the budget pays for. Or why the pilots are over, in words.
    """
    runs, others = _read(table, goal)
    return _next(table, goal, runs, others)


def _next(table: pd.DataFrame, goal: Goal, runs: dict[_Point, float], others: float) -> Step | str:
    """`next_step`, where runs that the plan will not come to take so many updates."""
    left = goal.budget - float(table["T"].sum())
    pilot = _Pilot(goal, goal.budget - others)
    for step in pilot.plan():
        if isinstance(step, str):
            return _known(table, goal) or step
        why, points = step
        missing = [p for p in points if p not in runs]
        if not missing:
            pilot.runs.update((p, runs[p]) for p in points)
            continue
        # A step that has begun is finished first, or what is asked would depend on which of its runs was the quickest.
        if len(missing) == len(points) and (enough := _known(table, goal)):
            return enough
        unseen = pilot.left - left - (_cost(points) - _cost(missing))
        if _cost(missing) > left and unseen > 0:  # the plan has taken the budget for larger than it is
            return _next(table, goal, runs, others + unseen)
        ask = []
        for k, T in missing:
            if T <= left:
                left -= T
                ask.append((goal.rate(k), T))
        return Step(why, tuple(ask)) if ask else f"the budget is spent: {max(left, 0):.0f} updates are left"
    raise AssertionError("a plan ends with words")


def _cost(points: Iterable[_Point]) -> int:
    return sum(T for _, T in points)


def _read(table: pd.DataFrame, goal: Goal) -> tuple[dict[_Point, float], float]:
    """Losses at rates that a plan may ask for, inf where a run diverged, NaN where it failed; and what others cost."""
    found: dict[_Point, list[float]] = {}
    others = 0.0
    checked = numbers(table, "T")
    for eta_ref, T, loss, status in zip(*(checked[c] for c in ("eta_ref", "T", "loss")), table["status"], strict=True):
        k = round(math.log2(eta_ref / goal.eta_ref))
        if not math.isclose(goal.rate(k), eta_ref, rel_tol=1e-9):
            others += T
        elif status == "failed":
            found.setdefault((k, int(T)), [])
        else:
            found.setdefault((k, int(T)), []).append(loss if status == "done" and math.isfinite(loss) else math.inf)
    return {point: float(np.mean(seeds)) if seeds else math.nan for point, seeds in found.items()}, others


def _known(table: pd.DataFrame, goal: Goal) -> str | None:
    """That the loss at T is known well enough, in words, if it is, and there were rates on both sides of the best."""
    if table["T"].nunique() <= ALWAYS_IN:
        return None
    try:
        fit = fit_horizon(table[table["status"] != "failed"])
    except NoLaw:
        return None
    best = fit.best(goal.T)
    p = best.predict(goal.T)
    if (
        not 0 <= p.high - p.low < goal.width * p.loss
        or len(np.unique(best.T)) <= ALWAYS_IN  # of four none was tested, and they may lie straight by luck
        or best.T.max() * MOST_EXTRAPOLATION < goal.T
        or not table["eta_ref"].min() < best.eta_ref < table["eta_ref"].max()
    ):
        return None
    found = f"{p.loss:.4f}, 95% interval {p.low:.4f} to {p.high:.4f}, with eta_ref={best.eta_ref:g}"
    return f"the loss at T={goal.T} is known to {goal.width:.2g} of itself: {found}"


class _Pilot:
    """The plan of action, and the runs that it knows of: their losses, inf where one diverged, NaN where one failed."""

    def __init__(self, goal: Goal, budget: float) -> None:
        self.goal, self.budget = goal, budget
        self.runs: dict[_Point, float] = {}

    def plan(self) -> _Steps:
        """Steps, why and what, the most useful points first. In the end why there are no more."""
        goal = self.goal
        for step in self._grid():
            yield step
            if isinstance(step, str):
                return
        ladder, rung = [goal.shortest], goal.shortest
        while rung < goal.top and self._sound():
            rung = min(LADDER * rung, goal.top)
            T, rates = rung, self._contenders(rung)
            if len(rates) * T > self.left:  # all of them at a shorter horizon, or else the best alone
                T = int(self.left // len(rates))
                if T < LEAST_LADDER * ladder[-1]:
                    T, rates = min(rung, int(self.left)), rates[:1]
            if T < LEAST_LADDER * ladder[-1]:
                break
            why = f"T={T} for the rates that may be best at T={goal.T}"
            while rates and len(rates) * T <= self.left:
                yield why, [(k, T) for k in rates]
                rates = self._contenders(T)
                why = f"T={T} around the rate that is now the best"
            if not any(math.isfinite(loss) for (_, t), loss in self.runs.items() if t == T):
                continue
            ladder.append(T)
            best = self._best()
            lacking = [(best, t) for t in ladder if (best, t) not in self.runs and not self._too_high(best, t)]
            if lacking and _cost(lacking) <= self.left:
                yield f"the horizons that eta_ref={goal.rate(best):g}, now the best rate, lacks", lacking
        for T in reversed([round(math.sqrt(a * b)) for a, b in itertools.pairwise(ladder)]):
            rates = self._contenders(T)
            rates = rates if len(rates) * T <= self.left else rates[:1]
            if 0 < len(rates) * T <= self.left:
                yield f"T={T}, between those trained: the interval at T={goal.T} is wide", [(k, T) for k in rates]
        if not self._sound():
            why = "every rate diverged at some horizon; give a smaller eta_ref"
        elif ladder[-1] < goal.top and self.left < LEAST_LADDER * ladder[-1]:
            why = "the budget is spent"
        else:
            why = "all that would help is trained"
        failed = sum(math.isnan(loss) for loss in self.runs.values())
        yield f"{why}: {self.left:.0f} updates are left" + (f", {failed} runs failed" if failed else "")

    def _grid(self) -> _Steps:
        """The rates at the shortest horizon: a coarse grid, widened until the best is inside, refined around it."""
        T, rate = self.goal.shortest, self.goal.rate
        yield f"a coarse grid of rates at T={T}", [(k, T) for k in FIRST]
        for apart, what in (
            (WIDEN, "lies on the edge of the grid: widening it"),
            (1, "is the best: refining around it"),
        ):
            while True:
                if self._sound():
                    best = self._best()
                    why, around = f"eta_ref={rate(best):g} {what}", (best - apart, best + apart)
                elif math.inf in self.runs.values():
                    why, around = "every rate diverged: trying a smaller one", (min(self.runs)[0] - WIDEN,)
                else:
                    yield f"every run of T={T} failed; see why before going on"
                    return
                new = [(k, T) for k in around if (k, T) not in self.runs and abs(k) <= FURTHEST]
                if not new:
                    break
                yield why, new
        if not self._sound():
            yield f"every rate down to {rate(-FURTHEST):g} diverged at T={T}; give a smaller eta_ref"

    @property
    def left(self) -> float:
        """What is left of the budget."""
        return self.budget - _cost(self.runs)

    def _sound(self) -> dict[_Point, float]:
        """The losses of rates that did not diverge at a horizon as long or longer."""
        bad = {k: T for (k, T), loss in sorted(self.runs.items()) if loss == math.inf}
        return {(k, T): x for (k, T), x in self.runs.items() if math.isfinite(x) and T > bad.get(k, 0)}

    def _best(self) -> int:
        """The rate of the lowest loss at the longest horizon; of equal ones the one in the middle."""
        return min((-T, loss, abs(k), k) for (k, T), loss in self._sound().items())[-1]

    def _contenders(self, T: int) -> list[int]:
        """The best rate and its neighbours, as far as they are in the race and still to be trained at T."""
        if not self._sound():
            return []
        best = self._best()
        around = [k for k in (best + 1, best - 1) if abs(k) <= FURTHEST]
        around = [k for k in around if not self._too_high(k, T) and not self._beaten(k, best)]
        return [k for k in (best, *around) if (k, T) not in self.runs]

    def _too_high(self, k: int, T: int) -> bool:
        """Is the peak rate, eta_ref / sqrt(T), more than `PEAK` of one that diverged?"""
        peaks = [self.goal.rate(e) / math.sqrt(t) for (e, t), loss in self.runs.items() if loss == math.inf]
        return bool(peaks) and self.goal.rate(k) / math.sqrt(T) > 1.01 * PEAK * min(peaks)  # rates are rounded

    def _beaten(self, k: int, best: int) -> bool:
        """Will rate k, at the goal's T, not be better than the best one by as much as matters?

        Where both keep the law so does their difference, and losses of one horizon and seed differ less from each other
        than from their lines.
        """
        pairs = [(T, loss, self.runs.get((best, T), math.nan)) for (e, T), loss in self.runs.items() if e == k]
        T, loss, least = np.array([p for p in pairs if np.isfinite(p).all()], float).reshape(-1, 3).T
        if len(T) < 3:
            return False
        x = 1 / np.sqrt(T) - 1 / math.sqrt(self.goal.T)  # 0 at the goal
        (_, gap), covariance = np.polyfit(x, loss - least, 1, cov=True)
        lowest = gap - stats.t.ppf(SURE, len(x) - 2) * math.sqrt(max(covariance[1, 1], 0))
        return bool(lowest > -WORTH * self.goal.width * least[T.argmax()])
