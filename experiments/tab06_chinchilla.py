"""Table 6: slope, intercept and R2 of the line of each model size, and larger models predicted from smaller ones.

    python experiments/tab06_chinchilla.py [--scale=laptop|gpu]
    python experiments/tab06_chinchilla.py --scale=paper --data=svg_extracted_data.csv

Prints the table and how far runs lie from their lines; at `paper` scale also what (5.1), fitted to the sizes up to 2.3B
alone, says of every run of a larger one (docs/laws.md). See experiments/best_rates.py for what is trained or read, and
experiments/paper.py for options.
"""

from typing import Any

import numpy as np
import pandas as pd
from best_rates import lines_at_best_rates, runs_at_best_rates, size, slope
from chinchilla import LARGEST_FITTED, LEAST_R2, larger, table_6
from paper import Claim, Lab, Outcome, main, span

from cdl.laws.figures import scaling_figure
from cdl.laws.scaling import fit_scaling


def experiment(lab: Lab) -> Outcome:
    """Train or read, and fit."""
    table = table_6(lines_at_best_rates(lab))
    lines = ["| size | horizons | slope | L_inf | R2 | worst run |", "|---|---|---|---|---|---|"]
    for r in table.itertuples():
        cells = [size(1e9 * float(r.size_B)), r.horizons, slope(float(r.slope)), f"{r.L_inf:.3f}", f"{r.r2:.3f}"]  # type: ignore[arg-type]
        lines.append("| " + " | ".join(map(str, [*cells, f"{r.worst:.2%}"])) + " |")
    off, all_runs = table["beyond_1_percent"].sum(), table["horizons"].sum()
    claims = [
        Claim(
            f"Losses at the best rate are a straight line in 1/sqrt(tokens) for every model size, R2 >= {LEAST_R2}",
            f"R2 {span(table['r2'].tolist())} over {len(table)} sizes",
            bool(table["r2"].min() >= LEAST_R2 - 5e-4),
        ),
        Claim(
            "All losses are within 1% of the line (said of Figure 7)",
            f"{off} of {all_runs} runs are further off, the worst {table['worst'].max():.2%}",
            bool(off == 0),
        ),
    ]
    numbers: dict[str, Any] = {"table": table}
    figure = None
    if lab.scale == "paper":
        said, numbers["larger"], figure = predictions(runs_at_best_rates(lab))
        lines += ["", *said]
    return Outcome(figure, numbers, claims, "\n".join(lines))


def predictions(runs: pd.DataFrame) -> tuple[list[str], pd.DataFrame, Any]:
    """(5.1) from the sizes up to 2.3B: words, predictions of every larger run, figure."""
    fit = fit_scaling(runs[runs["N"] <= LARGEST_FITTED], x="tokens")
    target = dict(N=float(runs["N"].max()), T=float(runs["tokens"].max()))
    said = [f"(5.1) from the sizes up to {LARGEST_FITTED / 1e9:g}B, horizons too short for a line left out:"]
    said += fit.summary(**target).splitlines()[-3:-1]
    said += [f"Warning: {warning}." for warning in fit.warnings(**target)]
    rest = larger(runs)
    said += ["", f"{'size (B)':>8} {'runs':>5} {'mean error':>10} {'worst':>8} {'bias':>8} {'in the interval':>16}"]
    groups = [(f"{N / 1e9:.3f}", these) for N, these in rest.groupby("N")]  # type: ignore[operator]
    enough = rest[rest["tokens"] >= runs.loc[runs["N"] <= LARGEST_FITTED, "tokens"].min()]
    for name, these in [*groups, ("all", rest), ("in range", enough)]:
        error = these["relative"]
        said.append(
            f"{name:>8} {len(these):5d} {np.abs(error).mean():10.2%} {np.abs(error).max():8.2%} {error.mean():+8.2%} "
            f"{these['inside'].sum():9d} of {len(these)}"
        )
    said.append("bias: predicted over measured, less 1; in range: no fewer tokens than any run that was fitted")
    return said, rest, scaling_figure(fit, **target)


if __name__ == "__main__":
    main(__file__, __doc__, experiment, of_published=True)
