"""Table 2: slope, intercept and R2 of the lines of fifteen model sizes, beside what the paper prints.

    python experiments/tab02_best_rates.py [--scale=laptop|gpu]
    python experiments/tab02_best_rates.py --scale=paper --data=svg_extracted_data.csv

See experiments/best_rates.py for what is trained or read, and experiments/paper.py for options. Table 6 has all sizes.
"""

import numpy as np
from best_rates import lines_at_best_rates, size, slope
from chinchilla import LEAST_R2, table_6
from paper import Claim, Lab, Outcome, main, span

# The paper: size in billions, horizons, 2 q1 q2, L_inf, R2.
PRINTED = np.array(
    [
        [0.074, 5, 3.22e4, 2.825, 0.991], [0.140, 7, 3.04e4, 2.670, 0.991], [0.279, 8, 3.29e4, 2.498, 0.999],
        [0.425, 8, 3.27e4, 2.430, 0.998], [0.632, 8, 3.17e4, 2.367, 0.998], [1.143, 10, 3.10e4, 2.275, 0.998],
        [1.429, 9, 3.18e4, 2.253, 0.996], [1.611, 9, 3.36e4, 2.228, 0.995], [2.004, 8, 3.62e4, 2.178, 0.999],
        [2.280, 7, 4.41e4, 2.128, 1.000], [2.979, 10, 5.90e4, 2.016, 0.990], [4.519, 6, 3.83e4, 2.106, 0.978],
        [6.792, 8, 4.66e4, 2.023, 0.999], [9.290, 4, 4.29e4, 2.046, 0.988], [12.56, 3, 4.23e4, 2.053, 1.000],
    ]
)  # fmt: skip


def experiment(lab: Lab) -> Outcome:
    """Train or read, and fit."""
    table = table_6(lines_at_best_rates(lab))
    if lab.scale == "paper":
        nearest = [(table["size_B"] - row[0]).abs().idxmin() for row in PRINTED]
        table = table.loc[nearest].reset_index(drop=True)
    lines = ["| size | horizons | slope | L_inf | R2 |", "|---|---|---|---|---|"]
    for r in table.itertuples():
        cells = [size(1e9 * float(r.size_B)), r.horizons, slope(float(r.slope)), f"{r.L_inf:.3f}", f"{r.r2:.3f}"]  # type: ignore[arg-type]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    claims = [
        Claim(
            f"A line in 1/sqrt(tokens) fits with R2 >= {LEAST_R2} for each size",
            f"R2 {span(table['r2'].tolist())} over {len(table)} sizes",
            bool(table["r2"].min() >= LEAST_R2 - 5e-4),
        )
    ]
    if lab.scale == "paper":
        same = [
            (f"{r.slope:.2e}", f"{r.L_inf:.3f}", f"{r.r2:.3f}") == (f"{p[2]:.2e}", f"{p[3]:.3f}", f"{p[4]:.3f}")
            for r, p in zip(table.itertuples(), PRINTED, strict=True)
        ]
        claims.append(Claim("The numbers of Table 2", f"{sum(same)} of {len(same)} rows to every digit", all(same)))
    return Outcome(None, {"table": table}, claims, "\n".join(lines))


if __name__ == "__main__":
    main(__file__, __doc__, experiment, of_published=True)
