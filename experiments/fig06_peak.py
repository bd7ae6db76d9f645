"""Figure 6: final loss against peak rate, the law (4.1) on the seven Step Law configurations of Tables 4 and 5.

    python experiments/fig06_peak.py --data=DIR [--out=runs/paper]

DIR holds dense_lr_bs_loss.csv and moe_lr_bs_loss.csv of the GitHub repository step-law/steplaw (Li et al., 2025).
Losses are its column `smooth loss`. Each configuration is fitted twice: on all its rates, and without those that the
rule of `cdl.laws.peak` finds unstable. "error" is the mean absolute leave-one-out error over the rates that the rule
keeps, for both fits. Writes fig06_peak.png and fig06_peak.csv, and prints the table and the warnings. No training;
seconds on a CPU.

These runs decay to a rate of 1e-5 and not to 0 (`mlr` in their names), which (4.1) does not account for.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cdl.laws.figures import peak_figure
from cdl.laws.peak import PeakFit, fit_peak, fit_points

# Panel of the figure: file, and model size in billions of parameters -> the columns that select the runs.
PANELS: dict[str, tuple[str, dict[str, dict[str, int]]]] = {
    "Dense": (
        "dense_lr_bs_loss.csv",
        {
            "1.07B": dict(h=2048, ffnh=8192, numh=16, numl=16, bs=352, ti=27743),
            "0.54B": dict(h=1280, ffnh=9048, numh=10, numl=13, bs=352, ti=39464),
            "0.43B": dict(h=1280, ffnh=9472, numh=10, numl=10, bs=512, ti=21696),
            "0.21B": dict(h=960, ffnh=9368, numh=15, numl=7, bs=128, ti=76293),
        },
    ),
    "MoE": (
        "moe_lr_bs_loss.csv",
        {
            "2.16B, 8 experts": dict(nume=8, moeh=2888, sed=8664, bs=32, ti=30517),
            "2.15B, 88 experts": dict(nume=88, moeh=352, sed=704, bs=32, ti=30517),
            "2.15B, 89 experts": dict(nume=89, moeh=352, sed=352, bs=32, ti=30517),
        },
    ),
}


def select(runs: pd.DataFrame, configuration: dict[str, int]) -> pd.DataFrame:
    """The runs of one configuration, as `cdl.fit_peak` takes them."""
    these = runs[(runs[list(configuration)] == pd.Series(configuration)).all(axis=1)]
    return pd.DataFrame({"eta": these["lr"], "T": these["ti"], "loss": these["smooth loss"]})


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with the two files of step-law/steplaw")
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help="folder for figure and numbers")
    arguments = parser.parse_args()
    data, out = Path(arguments.data), Path(arguments.out)
    for file, _ in PANELS.values():
        if not (data / file).is_file():
            parser.error(f"--data={data} lacks {file}; get it from https://github.com/step-law/steplaw")
    out.mkdir(parents=True, exist_ok=True)

    rows, fits, warnings = [], {}, []
    for panel, (file, configurations) in PANELS.items():
        runs, fits[panel] = pd.read_csv(data / file), {}
        for name, configuration in configurations.items():
            table = select(runs, configuration)
            eta, loss = np.asarray(table["eta"], float), np.asarray(table["loss"], float)
            ruled = fits[panel][name] = fit_peak(table)
            every = fit_points(eta, loss, ruled.T)
            rows.append(row(panel, name, "all", every, ruled.eta))
            rows.append(row(panel, name, "rule", ruled, ruled.eta))
            warnings += [f"{panel} {name}: {sentence}" for sentence in ruled.warnings]
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
    print("\n".join(lines))
    for sentence in warnings:
        print(f"Warning: {sentence}.")
    pd.DataFrame(rows).to_csv(out / "fig06_peak.csv", index=False)
    peak_figure(fits).savefig(out / "fig06_peak.png", dpi=130)
    print(f"Figure: {out / 'fig06_peak.png'}\nNumbers: {out / 'fig06_peak.csv'}")


if __name__ == "__main__":
    main()
