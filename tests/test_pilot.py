"""Pilots end, ask for nothing twice, do not care who finishes first, and keep what they promise."""

import math
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cdl.errors import UserError
from cdl.laws.horizon import fit_horizon
from cdl.pilot import Goal, Step, next_step

Run = Callable[[float, int], tuple[str, float]]  # eta_ref, T -> status, loss
GOAL = Goal(T=6400, budget=20_000)


def rows(run: Run, points: tuple[tuple[float, int], ...]) -> pd.DataFrame:
    found = [(eta_ref, T, *run(eta_ref, T)) for eta_ref, T in points]
    return pd.DataFrame(found, columns=pd.Index(["eta_ref", "T", "status", "loss"]))


def pilot(run: Run, goal: Goal, table: pd.DataFrame | None = None) -> tuple[pd.DataFrame, list[Step], str]:
    """Train what is asked for until nothing is, and check every step."""
    table = rows(run, ()) if table is None else table
    steps: list[Step] = []
    while not isinstance(step := next_step(table, goal), str):
        there = set(zip(table["eta_ref"], table["T"], strict=True))
        assert step.points
        assert len({*step.points}) == len(step.points)
        assert not there & {*step.points}
        assert all(goal.shortest <= T <= goal.top for _, T in step.points)
        assert table["T"].sum() + sum(T for _, T in step.points) <= goal.budget
        table = pd.concat([t for t in (table, rows(run, step.points)) if len(t)], ignore_index=True)
        steps.append(step)
        assert len(steps) < 60
    return table, steps, step


def world(best: float = 1.0, noise: float = 0.002, seed: int = 0, bend: float = 0.0, drift: float = 0.0) -> Run:
    """A bowl of rates over a line in 1/sqrt(T), 1 + 19 / sqrt(T) at the best rate, that bends and whose best rate moves
    by so many octaves with every factor of 2 in T. Noise is a function of the point."""

    def run(eta_ref: float, T: int) -> tuple[str, float]:
        e = np.random.default_rng([seed, T, round(1e9 * eta_ref)]).standard_normal()
        octaves = math.log2(eta_ref / best) - drift * math.log2(T / 100)
        truth = 1 + 19 * math.cosh(0.5 * octaves) / math.sqrt(T) + bend / T
        return "done", truth + noise * float(e)

    return run


def limited(run: Run, diverges: Callable[[float, int], bool]) -> Run:
    return lambda eta_ref, T: ("diverged", math.nan) if diverges(eta_ref, T) else run(eta_ref, T)


def random(eta_ref: float, T: int) -> tuple[str, float]:
    rng = np.random.default_rng([T, round(1e9 * eta_ref)])
    return [("done", 2 + rng.standard_normal()), ("failed", math.nan), ("diverged", math.nan)][rng.integers(3)]


ODD: dict[str, Run] = {
    "all diverge": lambda e, T: ("diverged", math.nan),
    "all fail": lambda e, T: ("failed", math.nan),
    "no numbers": lambda e, T: ("done", math.nan),
    "flat": lambda e, T: ("done", 2.0),
    "smaller is better": lambda e, T: ("done", 2 + 0.1 * math.log2(e) + world()(1, T)[1]),
    "larger is better": lambda e, T: ("done", 1 / e),
    "negative": lambda e, T: ("done", -1 - 1 / T),
    "noise": world(noise=100),
    "at random": random,
    "long ones diverge": limited(world(), lambda e, T: T >= 400),
    "long ones fail": lambda e, T: ("failed", math.nan) if T >= 400 else world()(e, T),
    "large ones diverge": limited(world(best=64), lambda e, T: e > 2),
    "high peaks diverge": limited(world(best=4), lambda e, T: e / math.sqrt(T) > 0.1),
    "only one rate": limited(world(best=2**-16), lambda e, T: e > 2**-15.9),
    "sound": world(),
}


@pytest.mark.parametrize("run", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("budget", [500, 1234, 20_000])
def test_pilots_end_within_the_budget_and_ask_for_nothing_twice(run: Run, budget: int) -> None:
    goal = Goal(T=6400, budget=budget, width=0.02)
    table, _, end = pilot(run, goal)
    if "is known" in end:
        best = fit_horizon(table[table["status"] != "failed"]).best(goal.T).eta_ref
        assert table["eta_ref"].min() < best < table["eta_ref"].max()


@pytest.mark.parametrize("budget", [3000, 20_000])
@pytest.mark.parametrize(
    "run", [world(), world(best=1.4), world(best=20, noise=0.02, bend=-30), ODD["high peaks diverge"], random]
)
def test_the_order_in_which_runs_finish_changes_nothing(run: Run, budget: int) -> None:
    """Killed at any time, and whatever had finished by then."""
    goal = Goal(T=6400, budget=budget, width=0.01)
    others = rows(run, ((3.0, 150), (3.0, 270)))  # of no pilot
    whole, _, end = pilot(run, goal, others)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        table = others
        while not isinstance(step := next_step(table, goal), str):
            some = rng.permutation(len(step.points))[: rng.integers(1, len(step.points) + 1)]
            table = pd.concat([rows(run, tuple(step.points[i] for i in some)), table])
        assert step == end
        one, other = (t.sort_values(["T", "eta_ref"], ignore_index=True) for t in (table, whole))
        pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("best", [2**-13, 0.3, 1.0, 40, 2**9])
def test_the_grid_is_widened_and_refined_until_the_best_is_inside(best: float) -> None:
    table, _, end = pilot(world(best), GOAL)
    assert "is known" in end
    first = table[table["T"] == GOAL.shortest].sort_values("loss")["eta_ref"].to_numpy()
    octaves = np.log2(first / first[0])
    assert len(first) <= 13
    assert abs(math.log2(first[0] / best)) <= 0.55
    assert octaves.min() < -0.9  # rates are rounded to three digits
    assert octaves.max() > 0.9
    assert np.sort(abs(octaves))[1:3] == pytest.approx([1, 1], abs=0.01)


def test_a_diverged_rate_is_an_edge_and_is_tried_again_at_half_its_peak() -> None:
    stable = limited(world(best=2.0, noise=1e-4), lambda e, T: e / math.sqrt(T) > 0.11)
    table, _, _ = pilot(stable, GOAL)
    assert table.query("T == 100")["eta_ref"].max() == 16  # the first grid; 4 and 2 diverged, and 8 was not asked for
    assert 8 not in set(table.query("T == 100")["eta_ref"])
    assert set(table.query("eta_ref == 2")["T"]) >= {100, 400, 800}
    assert 200 not in set(table.query("eta_ref == 2")["T"])
    assert fit_horizon(table).best(6400).eta_ref == 2


def test_a_rate_that_diverges_at_a_longer_horizon_is_left_and_one_that_failed_is_not() -> None:
    late = limited(world(best=2.0, noise=1e-4), lambda e, T: e >= 2 and T >= 800)
    table, _, _ = pilot(late, GOAL)
    assert table[table["T"] > 800]["eta_ref"].max() == 1
    well = world(best=4.0, noise=1e-4)
    table, _, _ = pilot(lambda e, T: ("failed", math.nan) if (e, T) == (4, 100) else well(e, T), GOAL)
    assert set(table[table["T"] > 800]["eta_ref"]) == {4.0}


def test_the_grid_is_widened_where_the_best_rate_moves_with_the_horizon() -> None:
    ladder = {100 * 2**i for i in range(6)}
    table, steps, _ = pilot(world(noise=1e-3, drift=0.75), Goal(T=6400, budget=40_000, width=1e-3))
    for T in ladder:
        best = (T / 100) ** 0.75
        assert min(abs(math.log2(e / best)) for e in table[table["T"] == T]["eta_ref"]) <= 0.55
    assert any("around the rate that is now the best" in step.why for step in steps)
    last = table[table["T"] == 3200].sort_values("loss")["eta_ref"].iloc[0]
    assert ladder <= set(table[table["eta_ref"] == last]["T"])


def test_pilots_end_as_soon_as_the_loss_is_known() -> None:
    known, _, end = pilot(world(noise=0.001), GOAL)
    assert "is known" in end
    fit = fit_horizon(known)
    p = fit.best(6400).predict(6400)
    assert p.high - p.low <= 0.02 * p.loss
    assert len(fit.best(6400).T) >= 5
    assert known["T"].sum() < GOAL.budget / 2
    loose, _, _ = pilot(world(noise=0.001), Goal(T=6400, budget=20_000, width=0.5))
    assert loose["T"].nunique() >= 5  # of four horizons none can be tested for being too short
    unknown, _, end = pilot(world(noise=0.05), GOAL)
    assert "left" in end
    assert unknown["T"].sum() > 2 * known["T"].sum()


def test_runs_of_others_count_and_are_used() -> None:
    run = world(noise=0.001, seed=1)
    grid = rows(run, tuple((e, T) for e in (0.3, 1.2, 4.8) for T in (150, 300, 600, 1200, 2400)))
    assert "is known" in next_step(grid, GOAL)
    assert isinstance(next_step(grid, Goal(T=6400, budget=20_000, width=1e-4)), Step)
    assert "budget is spent" in next_step(grid, Goal(T=6400, budget=10_000, width=1e-4))
    begun = pd.concat([grid, rows(run, ((1.0, 100),))])
    assert isinstance(next_step(begun, GOAL), Step)  # which is finished, whichever of its runs was the first
    failed = pd.concat([grid, rows(lambda e, T: ("failed", math.nan), ((1.2, 3200),))])
    assert "is known" in next_step(failed, GOAL)
    grid = rows(run, tuple((e, T) for e in (0.5, 1.0, 2.0, 3.0) for T in (100, 200, 400, 700, 1000, 1600)))
    for seeds in (1, 2):
        for budget in (34_000, 38_000, 42_000):
            goal = Goal(T=25_600, budget=budget, width=1e-4)
            table, _, _ = pilot(run, goal, pd.concat([grid] * seeds))
            assert table["T"].sum() > 0.9 * budget


def test_pilots_keep_what_they_promise_and_beat_grids_of_the_same_cost() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "pilot_simulation.py"))
    kinds = [*script["STRAIGHT"] * 8, *script["BENT"] * 5]
    rows = [row for seed, kind in enumerate(kinds) for row in script["simulate"](25_600, 0.78, 0.005, kind, seed)]
    table = pd.DataFrame(rows)
    means = table.groupby(["law", "way"])[["covered", "error", "regret", "spent"]].mean()
    assert table["spent"].max() <= 1
    assert means.loc[("straight", "pilot"), "covered"] > 0.9
    assert means.loc[("straight", "pilot"), "regret"] < 0.002
    for law in ("straight", "bent"):
        assert means.loc[(law, "pilot"), "regret"] < means.loc[(law, "grid by 4"), "regret"] / 1.5
    for grid in script["GRIDS"]:
        assert means.loc[("bent", "pilot"), "error"] < means.loc[("bent", grid), "error"] / 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"T": 100}, "T=100 must be beyond shortest=100"),
        ({"budget": 499}, "budget=499 updates: the first grid takes 500"),
        ({"budget": math.inf}, "budget=inf"),
        ({"width": 0}, "width=0 must be"),
        ({"width": math.nan}, "width=nan must be"),
        ({"shortest": 0}, "shortest=0 must be"),
        ({"eta_ref": -1.0}, "eta_ref=-1 must be"),
        ({"longest": 50}, "longest=50 must lie between shortest=100 and T=6400"),
    ],
)
def test_goals_that_cannot_be_are_named(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Goal(**({"T": 6400, "budget": 20_000} | wrong))  # type: ignore[arg-type]
