"""`cdl pilot`: pilots that are chosen as their results come in, and the plan that follows from them."""

import argparse
import functools
import json
import re
from typing import Any

import pandas as pd
from ml_collections import ConfigDict

from cdl import config as configs
from cdl.cli_output import show_report
from cdl.cli_sweep import trainer
from cdl.cli_train import console
from cdl.errors import UserError, say
from cdl.pilot import Goal, next_step
from cdl.report import write_report
from cdl.sweep.claims import replace
from cdl.sweep.grid import Point, points_in
from cdl.sweep.probe import choose_layout, probe
from cdl.sweep.programs import points_of, step_cost
from cdl.sweep.store import Store, read_json

__all__ = ["pilot"]

_RECORD = "pilot.json"
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def pilot(arguments: argparse.Namespace) -> None:
    """`cdl pilot`."""
    train = trainer(arguments)
    config = configs.change(configs.load(arguments.config)[0], configs.parse_assignments(arguments.changes))
    store = Store(arguments.out)
    tell = functools.partial(console().print, highlight=False, markup=False, soft_wrap=True)
    (first,) = points_of(config, [{"T": arguments.shortest or config.T}])
    goal = _goal(arguments, config, first, store)
    store.retry(point for grid in store.grids() for point in points_in(grid))
    while not isinstance(step := next_step(_table(store), goal), str):
        updates = sum(T for _, T in step.points)
        runs = f"{len(step.points)} run{'s' * (len(step.points) > 1)}"
        tell(f"Pilots: {step.why} ({runs}, {updates / goal.budget:.1%} of the budget).")
        points = points_of(config, [dict(eta_ref=eta_ref, T=T) for eta_ref, T in step.points])
        store.open_for(points)
        _record(store, arguments, goal)  # before anything can be killed: a time is not measured the same twice
        train(store.root, points, arguments.lanes)
    tell(f"Pilots: {step}.")
    show_report(*write_report(store.root, arguments.T))


def _table(store: Store) -> pd.DataFrame:
    """Finished runs and those that were given up."""
    points = {p.id: p.config for grid in store.grids() for p in points_in(grid)}
    failed = [
        dict(eta_ref=points[id].eta_ref, T=points[id].T, status="failed", loss=float("nan"))
        for id in store.failed()
        if id in points
    ]
    table = store.table()
    return pd.concat([table, pd.DataFrame(failed)], ignore_index=True) if failed else table


def _goal(arguments: argparse.Namespace, config: ConfigDict, point: Point, store: Store) -> Goal:
    """What to reach. The budget is counted in updates from here on, those that the same command counted before."""
    file = store.root / _RECORD
    there = read_json(file, "this file") if file.is_file() else {}
    same = there.get("asked") == _asked(arguments)
    updates = there["updates"] if same else _updates(arguments, point)
    return Goal(
        T=arguments.T,
        budget=updates,
        width=arguments.width,
        shortest=point.config.T,
        eta_ref=config.eta_ref,
        longest=arguments.longest,
    )


def _record(store: Store, arguments: argparse.Namespace, goal: Goal) -> None:
    replace(store.root / _RECORD, json.dumps({"asked": _asked(arguments), "updates": goal.budget}))


def _asked(arguments: argparse.Namespace) -> list[Any]:
    return [arguments.T, arguments.budget, arguments.changes]


def _updates(arguments: argparse.Namespace, point: Point) -> float:
    """The updates that a budget buys: ``5%`` of the planned run's, ``1e17`` FLOPs, or what one run makes in ``2h``
    here: the longest pilots, which take most of it, are often alone."""
    budget = arguments.budget.strip()
    found = re.fullmatch(r"([\d.]+(?:[eE][+-]?\d+)?)\s*(%|s|min|h|d|)", budget)
    if not found or not float(found[1]) > 0:
        raise UserError(
            f"--budget={budget!r} must be a share of the planned run (5%), a time (2h, 30min) or FLOPs (1e17)"
        )
    number, unit = float(found[1]), found[2]
    if unit == "%":
        return number / 100 * arguments.T
    if unit and (arguments.workers or arguments.backend != "local"):
        raise UserError(f"--budget={budget}: how much workers do in that time is not known; give a share (5%) or FLOPs")
    where = choose_layout([point], say, arguments.lanes)
    if not unit:
        return number / step_cost(point.config, where).flops
    measured = probe(point, where)
    return number * _UNITS[unit] * measured.lanes / measured.step
