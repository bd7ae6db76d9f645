"""Figure 1: the bound (2.4) at peak rate 1/sqrt(T) against T, for schedules that pass the exam and some that fail.

    python experiments/fig01_exam.py

D = G = 1, L* = 0; WSD has 10% warmup and 10% decay as in the paper. Trains nothing, so every scale is the same; seconds
on a CPU. Prints the verdicts of both exams. See experiments/paper.py for options.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper import Claim, Lab, Outcome, main

import cdl

SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear decay": ("linear", {}),
    "cosine decay": ("cosine", {}),
    "constant": ("constant", {}),
    "WSD (10% up, 10% down)": ("wsd", {"warmup": 0.1, "decay": 0.1}),
    "inverse square root": ("inv_sqrt", {}),
    "1-cycle": ("one_cycle", {}),
    "step decay to 1%": ("step", {}),
    "cosine decay to 10%": ("cosine", {"final": 0.1}),
}


# Section 2.4.
PASS = ["linear decay", "cosine decay", "WSD (10% up, 10% down)"]
FAIL = ["constant", "inverse square root"]


def experiment(lab: Lab) -> Outcome:
    """Examine and draw."""
    del lab  # trains nothing
    numbers: dict[str, dict[str, Any]] = {}
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True).ravel()
    lines = ["| schedule | symbolic | numeric | reason |", "|---|---|---|---|"]
    for ax, (label, (name, arguments)) in zip(axes, SCHEDULES.items(), strict=True):
        symbolic = cdl.exam(name, **arguments)
        numeric = cdl.exam(name, method="numeric", **arguments)
        T, scaled = np.array(numeric.T), np.add(numeric.distance, numeric.noise)
        ax.loglog(
            T, scaled / np.sqrt(T), "o-", ms=4, color="tab:blue" if symbolic.qualified else "tab:red", label="(2.4)"
        )
        ax.loglog(T, scaled[0] / np.sqrt(T), "k--", lw=1, label="like $1/\\sqrt{T}$")
        ax.set_title(f"{label}: {'qualified' if symbolic.qualified else 'fails'}", fontsize=10)
        grows = (
            f"noise grows like {symbolic.log:.3g} ln T" if symbolic.log else f"grows like $T^{{{symbolic.power:g}}}$"
        )
        note = "" if symbolic.qualified else f"$\\sqrt{{T}}$ x bound: {grows}"
        ax.text(0.04, 0.05, note, transform=ax.transAxes, fontsize=8)
        ax.grid(alpha=0.25, lw=0.6)
        verdicts = ["qualified" if e.qualified else "not qualified" for e in (symbolic, numeric)]
        lines.append(f"| {label} | {verdicts[0]} | {verdicts[1]} | {symbolic.reason} |")
        numbers[label] = dict(
            schedule=name,
            arguments=arguments,
            symbolic=symbolic.qualified,
            numeric=numeric.qualified,
            reason=symbolic.reason,
            q1=symbolic.q1,
            q2=symbolic.q2,
            T=numeric.T,
            bound=(scaled / np.sqrt(T)).tolist(),
        )
    axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("T", fontsize=10)
    figure.supylabel("bound of the loss, less $L_*$", fontsize=10)
    verdict = {name: bool(numbers[name]["symbolic"]) for name in PASS + FAIL}
    said = ", ".join(f"{name} {'passes' if passed else 'fails'}" for name, passed in verdict.items())
    claims = [
        Claim(
            "Linear, cosine and WSD schedules pass the qualifying exam; constant and inverse square root fail",
            said,
            all(verdict[name] for name in PASS) and not any(verdict[name] for name in FAIL),
        ),
        Claim(
            "The bound itself shows it at growing T (Figure 1)",
            "the numeric exam, T up to 1e6, gives the same verdicts"
            if all(x["symbolic"] == x["numeric"] for x in numbers.values())
            else "the numeric exam differs",
            all(x["symbolic"] == x["numeric"] for x in numbers.values()),
        ),
    ]
    return Outcome(figure, numbers, claims, "\n".join(lines))


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
