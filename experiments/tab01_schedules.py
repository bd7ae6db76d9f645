"""Table 1: best peak rate and best bound of each schedule, what the paper prints against the bound (2.4) itself.

    python experiments/tab01_schedules.py

For D = G = 1: the paper's formula and the corrected one, at T = 1,000,000, each divided by the numbers of the discrete
bound (2.4) at its best peak. 1.000 is right. Trains nothing, so every scale is the same. See experiments/paper.py for
options.
"""

import math
from typing import Any, NamedTuple

from paper import Claim, Lab, Outcome, main

import cdl
from cdl.theory.asymptotics import limit
from cdl.theory.bounds import bound_terms

T = 1_000_000
RIGHT = 0.1  # as far from 1 a ratio may be by what is beyond the leading order: 1/ln T
ELSEWHERE = ("(A.6)", "Generalization 2")  # formulas that are not in Table 1

WSD_C = 0.8


class Row(NamedTuple):
    """A schedule, and the best bound and best peak rate at T that the paper prints for it (D = G = 1)."""

    label: str
    name: str
    arguments: dict[str, float]
    printed: str
    bound: float
    peak: float
    note: str


def rows() -> list[Row]:
    """What the paper prints."""
    ln_T, c = math.log(T), WSD_C
    wsd = 1 + math.log((1 + c) / (1 - c)) / 2
    return [
        Row(
            "constant", "constant", {}, "√(ln T / T)", math.sqrt(ln_T / T), 1 / math.sqrt(ln_T * T),
            "leading term only: ln T + γ + 1",
        ),
        Row(
            "inverse square root", "inv_sqrt", {}, "√(ln T / 4T)", math.sqrt(ln_T / (4 * T)), 1 / math.sqrt(ln_T),
            "**slip**: noise is 3/4 ln T, not 1/4; √(3 ln T / 4T), peak 1/√(3 ln T)",
        ),
        Row("linear", "linear", {}, "2 √(1/T)", 2 / math.sqrt(T), 1 / math.sqrt(T), ""),
        Row("cosine", "cosine", {}, "2 √(1.061/T)", 2 * math.sqrt(1.061 / T), 1 / math.sqrt(1.061 * T), ""),
        Row(
            f"WSD, c = {c}", "wsd", {"decay": round(1 - c, 9)}, "2 √((1 + ½ ln((1+c)/(1-c))) / ((1+c) T))",
            2 * math.sqrt(wsd / ((1 + c) * T)), 1 / math.sqrt((1 + c) * wsd * T), "Table 1",
        ),
        Row(
            f"WSD, c = {c}", "wsd", {"decay": round(1 - c, 9)}, "(A.6): peak √((1+c)(1 + ½ ln ..) T)",
            2 * math.sqrt(wsd / ((1 + c) * T)), math.sqrt((1 + c) * wsd * T), "**slip**: upside down in (A.6)",
        ),
        Row(
            f"WSD, c = {c}", "wsd", {"decay": round(1 - c, 9)}, "Generalization 2: q₁ = D/(1+c)",
            2 * math.sqrt(wsd) / (1 + c) / math.sqrt(T), 1 / ((1 + c) * math.sqrt(wsd * T)), "**slip**: q₁ = D/√(1+c)",
        ),
    ]  # fmt: skip


def experiment(lab: Lab) -> Outcome:
    """Evaluate."""
    del lab  # trains nothing
    lines = [
        f"Best bound (less L\\*) and best peak rate over those of the discrete bound (2.4), T = {T:,}, D = G = 1.",
        "",
        "| schedule | paper: best bound | paper, bound | paper, peak | here, bound | here, peak | q₁² | noise term | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    numbers: list[dict[str, Any]] = []
    for row in rows():
        eta_T = cdl.schedule(row.name, T, **row.arguments)
        bound, peak = bound_terms(eta_T).best, cdl.best_peak(eta_T)
        found = limit(row.name, **row.arguments)
        noise = found.q2_form or f"{found.q2_squared:.10g}"
        noise += f" + {found.log:.3g} ln T" if found.log else ""
        ratios = [row.bound / bound, row.peak / peak, found.best_bound(T) / bound, found.best_peak(T) / peak]
        numbers.append(row._asdict() | dict(T=T, discrete_bound=bound, discrete_peak=peak, ratios=ratios, noise=noise))
        cells = [row.label, row.printed, *(f"{r:.4g}" if r > 10 else f"{r:.4f}" for r in ratios)]
        cells += [found.q1_form or f"{found.q1**2:.10g}", noise, row.note]
        lines.append("| " + " | ".join(cells) + " |")
    said = {
        f"{row.label} ({row.printed})": (
            row,
            f"bound {x['ratios'][0]:.4g}, peak {x['ratios'][1]:.4g} times the right one",
        )
        for row, x in zip(rows(), numbers, strict=True)
    }
    elsewhere = [f"{name}: {words}" for name, (row, words) in said.items() if row.printed.startswith(ELSEWHERE)]
    right = [all(abs(r - 1) <= RIGHT for r in x["ratios"][:2]) for x in numbers if x["printed"].startswith(ELSEWHERE)]
    off = [
        f"{name}: {words}"
        for x, (name, (row, words)) in zip(numbers, said.items(), strict=True)
        if max(abs(r - 1) for r in x["ratios"][:2]) > RIGHT and not row.printed.startswith(ELSEWHERE)
    ]
    claims = [
        Claim(
            "Best bounds and best peak rates of five schedules (Table 1)",
            f"at T = {T:,}, all within {RIGHT:.0%} of the discrete bound's but {'; '.join(off)}"
            if off
            else "all right",
            not off,
        ),
        Claim("The optimum of WSD in (A.6), and q1 of WSD in Generalization 2", "; ".join(elsewhere), all(right)),
    ]
    return Outcome(None, {"rows": numbers}, claims, "\n".join(lines))


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
