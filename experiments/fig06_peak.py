"""Figure 6: final loss against peak rate, and the law (4.1) at each model size.

    python experiments/fig06_peak.py [--scale=laptop|gpu]
    python experiments/fig06_peak.py --scale=paper --data=DIR

`laptop`: two sizes of GPT-2, ten peak rates each, AdamW and cosine decay to 0. `gpu`: 11M and 29M parameters. `paper`:
the published runs that the paper uses; DIR holds dense_lr_bs_loss.csv and moe_lr_bs_loss.csv of step-law/steplaw (Li et
al., 2025), losses are the column `smooth loss`. They decay to a rate of 1e-5 and not to 0, which (4.1) does not account
for. See experiments/paper.py for options.

Each configuration is fitted twice: on all its rates, and without those that the rule of `cdl.laws.peak` finds unstable.
"error" is the mean absolute leave-one-out error over the rates that the rule keeps, for both fits.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from gpt2_runs import one_run
from paper import Claim, Lab, Outcome, Sweep, at_peak, main, published, span
from step_law import PANELS, select

from cdl.laws.figures import peak_figure
from cdl.laws.peak import PeakFit, fit_peak, fit_points

GOOD = 0.95  # R2 that the paper reports at least
SIZES = {"laptop": ("30k", "120k"), "gpu": ("11M", "29M")}
PEAKS = [0.0003 * 2.0**k for k in range(10)]  # to 0.15


def sweeps(scale: str) -> list[Sweep]:
    """A sweep for each size; none at the scale of the paper, which takes published runs."""
    made = []
    for size in SIZES.get(scale, ()):
        c = one_run(scale, "adamw", size)
        T = 400 if scale == "laptop" else 4000
        made.append(Sweep(f"gpt2-adamw-{size}", c, [at_peak(peak, T) for peak in PEAKS]))
    return made


def left_one_out(fit: PeakFit, kept: np.ndarray) -> float:
    """Mean absolute error, over the kept rates, of fits that have not seen the run they predict."""
    errors = []
    for i in np.flatnonzero(np.isin(fit.eta, kept)):
        others = np.arange(len(fit.eta)) != i
        errors.append(abs(fit_points(fit.eta[others], fit.loss[others], fit.T).at(fit.eta[i]) - fit.loss[i]))
    return float(np.mean(errors))


def row(panel: str, name: str, rates: str, fit: PeakFit, kept: np.ndarray) -> dict[str, Any]:
    low, high = fit.interval
    left_out = " ".join(f"{eta:g}" for eta, _ in fit.left_out)
    return dict(
        panel=panel, configuration=name, T=fit.T, rates=rates, fitted=len(fit.eta), left_out=left_out, R2=fit.r2,
        error=left_one_out(fit, kept), L_inf=fit.L_inf, a=fit.a, b=fit.b, eta_peak=fit.best, low=low, high=high,
        lowest=fit.eta[fit.loss.argmin()],
    )  # fmt: skip


def experiment(lab: Lab) -> Outcome:
    """Train or read, fit and draw."""
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    if lab.scale == "paper":
        files = [file for file, _ in PANELS.values()]
        data = published(lab, "the folder with the two files of step-law/steplaw", *files)
        for panel, (file, configurations) in PANELS.items():
            runs = pd.read_csv(data / file)
            tables[panel] = {name: select(runs, configuration) for name, configuration in configurations.items()}
    else:
        trained = {
            f"GPT-2 {size}": lab.train(s).table for size, s in zip(SIZES[lab.scale], sweeps(lab.scale), strict=True)
        }
        tables["Dense"] = {
            name: pd.DataFrame({"eta": t["eta_peak"], "T": t["T"], "loss": t["loss"]}) for name, t in trained.items()
        }
    rows, fits, warnings = [], {panel: {} for panel in tables}, []
    for panel, configurations in tables.items():
        for name, table in configurations.items():
            eta, loss = np.asarray(table["eta"], float), np.asarray(table["loss"], float)
            finite = np.isfinite(loss)
            ruled = fits[panel][name] = fit_peak(table)
            rows.append(row(panel, name, "all", fit_points(eta[finite], loss[finite], ruled.T), ruled.eta))
            rows.append(row(panel, name, "rule", ruled, ruled.eta))
            warnings += [f"Warning: {panel} {name}: {sentence}." for sentence in ruled.warnings]
    lines = [
        "| | T | rates | fitted | left out | R2 | error | 1000 eta_peak* | 95% interval | lowest loss at |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        best = "none" if math.isnan(r["eta_peak"]) else f"{1e3 * r['eta_peak']:.3g}"
        interval = "none" if math.isnan(r["low"]) else f"{1e3 * r['low']:.3g} to {1e3 * r['high']:.3g}"
        cells = [
            f"{r['panel']} {r['configuration']}",
            f"{r['T']:,}",
            r["rates"],
            f"{r['fitted']}",
            r["left_out"].replace(" ", ", "),
        ]
        cells += [f"{r['R2']:.4f}", f"{r['error']:.4f}", best, interval, f"{1e3 * r['lowest']:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    kept = [r for r in rows if r["rates"] == "rule"]
    every = [r["R2"] for r in rows if r["rates"] == "all"]
    r2, left = [r["R2"] for r in kept], sum(len(r["left_out"].split()) for r in kept)
    claim = Claim(
        f"(4.1) describes the loss at any peak rate with R2 >= {GOOD}, across sizes and architectures",
        f"R2 {span(r2)} over {len(kept)} configurations, {left} unstable rates left out; with all rates {span(every)}",
        min(r2) >= GOOD,
    )
    return Outcome(peak_figure(fits), {"rows": rows}, [claim], "\n".join(lines + warnings))


if __name__ == "__main__":
    main(__file__, __doc__, experiment, of_published=True)
