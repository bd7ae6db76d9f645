"""Figure 1: the bound (2.4) at peak rate 1/sqrt(T) against T, for schedules that pass the exam and some that fail.

    python experiments/fig01_exam.py [--out=runs/paper]

Writes fig01_exam.png and fig01_exam.json, and prints the verdicts of both exams. D = G = 1, L* = 0; WSD has 10%
warmup and 10% decay as in the paper. No training; seconds on a CPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help="folder for figure and numbers")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)

    numbers = {}
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True).ravel()
    print(f"{'schedule':28s}{'symbolic':15s}{'numeric':15s}reason")
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
        print(f"{label:28s}{verdicts[0]:15s}{verdicts[1]:15s}{symbolic.reason}")
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
    figure.savefig(out / "fig01_exam.png", dpi=130)
    (out / "fig01_exam.json").write_text(json.dumps(numbers, indent=1))
    print(f"Figure: {out / 'fig01_exam.png'}\nNumbers: {out / 'fig01_exam.json'}")


if __name__ == "__main__":
    main()
