"""How well `cdl pilot` chooses, where the truth is known: against fixed grids of the same cost, on made-up losses.

    python experiments/pilot_simulation.py [--repeats=60] [--out=runs/paper]

Losses are L_inf + Q(eta_ref) / sqrt(T) and noise, as (5.1) says, with an optimal rate anywhere within a factor of 16 of
the first guess, and rates that diverge. `straight` worlds keep to that law: plain ones, others with a flat optimum,
with one that moves with T, or where runs diverge at a fixed peak rate. `bent` ones add a term in 1/T, with which no
line is right. A grid has the same rates at each of six horizons and takes as many updates in all as the pilot took; `by
4` and `by 2` is the factor between its rates.

Prints, in %: the share of 95% intervals that hold the loss of the planned run; the mean error of its prediction; the
mean regret, which is the loss above that of the best rate; the median width of the intervals; and the share of the
budget that was spent. Writes every case to pilot_simulation.csv. No training; four minutes on two cores.
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cdl.laws.horizon import fit_horizon
from cdl.pilot import Goal, next_step

GOALS = ((25_600, 0.78), (25_600, 3.9), (100_000, 0.25))  # planned updates, budget as a share of them
NOISE = (0.002, 0.005, 0.01)  # of a loss, nats
STRAIGHT, BENT = ("plain", "flat", "moving", "peak"), ("bent down", "bent up")
HORIZONS = 6  # of a grid, each twice the one before
GRIDS = {"grid by 4": [2.0**k for k in range(-4, 5, 2)], "grid by 2": [2.0**k for k in range(-4, 5)]}


class World:
    """Losses by rate and horizon, of one kind, drawn by a seed."""

    def __init__(self, kind: str, noise: float, seed: int):
        rng = self._rng = np.random.default_rng(seed)
        self._noise = noise
        self._best = 2 ** rng.uniform(-4, 4)
        self._L_inf, self._Q = rng.uniform(1, 3), rng.uniform(10, 25)
        self._diverges = self._best * 2 ** rng.uniform(0.7, 4)
        self._width, self._peak = 1.0, math.inf
        self._bend, self._bend_power = 0.0, 0.0
        self._tilt, self._middle = 0.0, self._best
        if kind == "flat":
            self._width = 0.35
        elif kind == "moving":  # L_inf has an optimum of its own, elsewhere
            self._width, self._tilt = 0.7, 0.02
            self._middle = self._best * 2 ** rng.choice([-1.5, 1.5])
        elif kind == "peak":
            self._width, self._diverges = 0.35, math.inf
            self._peak = self._best * 2 ** rng.uniform(0, 1.5) / math.sqrt(400)
        elif kind == "bent down":
            self._width, self._bend, self._bend_power = 0.5, rng.uniform(-60, -10), -0.3
        elif kind == "bent up":
            self._width, self._bend, self._bend_power = 0.7, rng.uniform(5, 40), 0.5

    def loss(self, eta_ref: float, T: int) -> float:
        """Without noise; NaN where a run diverges."""
        if eta_ref > self._diverges or eta_ref / math.sqrt(T) > self._peak:
            return math.nan
        far = eta_ref / self._best
        limit = self._L_inf + self._tilt * math.log2(eta_ref / self._middle) ** 2
        slope = self._Q * math.cosh(self._width * math.log(far))
        return limit + slope / math.sqrt(T) + self._bend * far**self._bend_power / T

    def noisy(self, eta_ref: float, T: int) -> float:
        """Of one run."""
        return self.loss(eta_ref, T) + self._noise * self._rng.standard_normal()

    def train(self, points: list[tuple[float, int]]) -> pd.DataFrame:
        """The table of these runs."""
        rows = [(eta_ref, T, self.noisy(eta_ref, T)) for eta_ref, T in points]
        table = pd.DataFrame(rows, columns=["eta_ref", "T", "loss"])
        return table.assign(status=np.where(table["loss"].isna(), "diverged", "done"))

    def lowest(self, T: int) -> float:
        """The loss of the best rate."""
        return float(np.nanmin([self.loss(self._best * 2 ** (i / 16), T) for i in range(-100, 101)]))


def piloted(world: World, goal: Goal) -> pd.DataFrame:
    """The runs that `cdl pilot` would train."""
    table = world.train([])
    while not isinstance(step := next_step(table, goal), str):
        table = pd.concat([table, world.train(list(step.points))], ignore_index=True)
    return table


def on_grid(world: World, goal: Goal, rates: list[float]) -> pd.DataFrame:
    """The runs of a grid."""
    shortest = max(1, int(goal.budget / len(rates) / (2**HORIZONS - 1)))
    horizons = sorted({min(shortest * 2**i, goal.top) for i in range(HORIZONS)})
    return world.train(list(product(rates, horizons)))


def outcome(world: World, table: pd.DataFrame, goal: Goal) -> dict[str, Any]:
    """How the plan that follows from these runs turns out."""
    best = fit_horizon(table).best(goal.T)
    said, true = best.predict(goal.T), world.loss(best.eta_ref, goal.T)
    return dict(
        covered=world.noisy(best.eta_ref, goal.T) in said,
        error=abs(said.loss - true) / true,
        regret=true / world.lowest(goal.T) - 1,
        width=(said.high - said.low) / said.loss,
        spent=table["T"].sum() / goal.budget,
        diverged=math.isnan(true),
    )


def simulate(T: int, share: float, noise: float, kind: str, seed: int) -> list[dict[str, Any]]:
    """One world, and each way to choose runs in it."""
    goal = Goal(T=T, budget=share * T)
    ways = {"pilot": piloted(world := World(kind, noise, seed), goal)}
    outcomes = [outcome(world, ways["pilot"], goal)]
    spent = Goal(T=T, budget=float(ways["pilot"]["T"].sum()))
    for name, rates in GRIDS.items():
        ways[name] = on_grid(world := World(kind, noise, seed), spent, rates)
        outcomes.append(outcome(world, ways[name], spent))
    law = "straight" if kind in STRAIGHT else "bent"
    about = dict(T=T, budget=share, noise=noise, kind=kind, law=law, seed=seed)
    spent_by_all = dict(spent=outcomes[0]["spent"])
    return [about | dict(way=way) | made | spent_by_all for way, made in zip(ways, outcomes, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60, metavar="N", help="worlds of each kind")
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help="folder for the table")
    arguments = parser.parse_args()
    cases = [
        (*goal, noise, kind, seed)
        for goal, noise, kind, seed in product(GOALS, NOISE, (*STRAIGHT, *BENT), range(arguments.repeats))
    ]
    with ProcessPoolExecutor() as pool:
        made = [row for rows in pool.map(simulate, *zip(*cases, strict=True), chunksize=8) for row in rows]
    table = pd.DataFrame(made)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "pilot_simulation.csv", index=False)
    percent = dict(covered="mean", error="mean", regret="mean", width="median", spent="mean", diverged="mean")
    for by in (["law", "noise", "way"], ["law", "way"]):
        print((100 * table.groupby(by).agg(percent)).round(2).to_string(), end="\n\n")
    print(out / "pilot_simulation.csv")


if __name__ == "__main__":
    main()
