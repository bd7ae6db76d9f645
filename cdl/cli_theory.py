"""`cdl bound`, `cdl exam` and `cdl optimal`: `cdl.theory` in the terminal."""

import argparse
import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from cdl.cli_output import check_outputs, save_figure, save_table, table_text
from cdl.errors import UserError
from cdl.plots import bounds_figure, exam_figure
from cdl.schedules import SHAPES, schedule
from cdl.theory.bounds import bound_curve
from cdl.theory.compare import arguments_of, compare, read_numbers, read_rates
from cdl.theory.exam import Exam
from cdl.theory.exam import exam as examine
from cdl.theory.optimal import best_continuation, best_cooldown, best_peak, best_schedule

__all__ = ["bound", "exam", "optimal"]


def bound(arguments: argparse.Namespace) -> None:
    """Compare schedules, each at its best peak where neither it nor --peak says another."""
    check_outputs(arguments, [*arguments.schedules, arguments.G])
    D, G = arguments.D, _gradient_norms(arguments.G)
    rates = {}
    for text in dict.fromkeys(arguments.schedules):
        name, options = _named(text)
        if name is None:
            rates[text] = read_rates(text)
        elif "peak" in options or arguments.peak is not None:
            rates[text] = read_rates(text, arguments.T, **({} if arguments.peak is None else {"peak": arguments.peak}))
        else:
            rates[text] = _at_best_peak(read_rates(text, arguments.T), D, G)
    print(table_text(compare(rates, D, G)))
    _save_curves(arguments, rates, D, G)


def exam(arguments: argparse.Namespace) -> None:
    """Both exams of each schedule, and the constants of the symbolic one."""
    check_outputs(arguments, [])
    rows, seen = [], []
    for text in dict.fromkeys(arguments.schedules or SHAPES):
        name, options = _named(text)
        found = examine(name or text, **options)  # symbolic where there is a limit
        by_numbers = found.method == "numeric"
        numeric = found if by_numbers else examine(name or text, method="numeric", **options)
        seen.append(dataclasses.replace(numeric, shape=text))
        symbolic = "-" if by_numbers else _verdict(found)
        q1, q2 = (f"{q**2:.6g}" if q is not None else "-" for q in (found.q1, found.q2))
        agree = found.qualified == numeric.qualified
        reason = found.reason if agree else f"{found.reason}; by numbers: {numeric.reason}"
        rows.append([text, symbolic, _verdict(numeric), q1, q2, reason])
    print(table_text(pd.DataFrame(rows, columns=["schedule", "symbolic", "numeric", "q1²", "q2²", "reason"])))
    if arguments.plot:
        save_figure(exam_figure(seen), arguments.plot)
    if arguments.csv:
        tables = [
            pd.DataFrame(dict(schedule=e.shape, T=e.T, distance=e.distance, noise=e.noise, qualified=e.qualified))
            for e in seen
        ]
        save_table(pd.concat(tables), arguments.csv)


def optimal(arguments: argparse.Namespace) -> None:
    """The best schedule beside common ones; with --past, the ways to go on."""
    check_outputs(arguments, [arguments.past, arguments.G])
    T, D, G = arguments.T, arguments.D, _gradient_norms(arguments.G)
    if arguments.past is None:
        best = best_schedule(T, D, G)
        cooldown = best_cooldown(T, D, G, peak=arguments.peak)
        wsd = f"wsd:decay={cooldown.steps}"
        rates = {"best": best.eta_T, wsd: schedule("wsd", T, peak=cooldown.peak, decay=cooldown.steps)}
        for name in ("linear", "cosine", "constant"):
            eta_T = schedule(name, T, peak=1.0 if arguments.peak is None else arguments.peak)
            if eta_T.any():  # at T = 1 some are 0
                rates[name] = eta_T if arguments.peak is not None else _at_best_peak(eta_T, D, G)
        notes = {"best": "the optimum of all schedules", wsd: f"the best cooldown, {cooldown.share:.1%} of T"}
        floor, of_what = best.bound, "the best schedule"
    elif arguments.peak is None:
        found = best_continuation(read_rates(arguments.past), T, D, G)
        rates, notes = found.ways, found.notes
        floor, of_what = found.scratch, "the best schedule from scratch"
    else:
        raise UserError(f"--peak={arguments.peak:g} and --past do not go together; the past has its own rates")
    table = compare(rates, D, G)[["schedule", "peak", "bound", "distance", "noise"]]
    table["above"] = [f"{b / floor - 1:+.3%}" for b in table["bound"]]
    table["note"] = [notes.get(name, "") for name in rates]
    print(f"T = {T}; above: over {of_what}, bound {floor:.6g}\n{table_text(table)}")
    _save_curves(arguments, rates, D, G)


def _named(text: str) -> tuple[str | None, dict[str, Any]]:
    """Name and arguments if it is a schedule with a name."""
    return arguments_of(text) if text.partition(":")[0] in SHAPES else (None, {})


def _at_best_peak(eta_T: np.ndarray, D: float, G: float | np.ndarray) -> np.ndarray:
    return eta_T * (best_peak(eta_T, D, G) / eta_T.max())


def _verdict(e: Exam) -> str:
    return "qualified" if e.qualified else "not qualified"


def _gradient_norms(text: str) -> float | np.ndarray:
    try:
        return float(text)
    except ValueError:
        return read_numbers(text)


def _save_curves(arguments: argparse.Namespace, rates: dict[str, np.ndarray], D: float, G: float | np.ndarray) -> None:
    """What --plot and --csv ask for: rates, and both bounds after every update."""
    if not (arguments.plot or arguments.csv):
        return
    last = {name: bound_curve(eta_T, D, G) for name, eta_T in rates.items()}
    if arguments.plot:
        save_figure(bounds_figure(rates, last), arguments.plot)
    if arguments.csv:
        tables = []
        for name, eta_T in rates.items():
            columns = dict(schedule=name, step=np.arange(1, len(eta_T) + 1), eta=eta_T, bound=last[name])
            columns["average_bound"] = bound_curve(eta_T, D, G, iterate="average")
            tables.append(pd.DataFrame(columns))
        save_table(pd.concat(tables), arguments.csv)
