"""Table 6 and Figure 7: loss against 1/sqrt(tokens) of the Chinchilla runs (G3), and larger models from smaller ones.

    python experiments/tab06_chinchilla.py --data=svg_extracted_data.csv [--out=runs/paper]

The file is in the public repository epoch-research/analyzing-chinchilla: 245 runs read off a published figure, with
model size, training FLOP and final loss. Models of a size, rounded to 0.001B, are one line where they have three
horizons; tokens = FLOP / 6 / size. Every run is in its line, as in the paper. Prints Table 6 and how far the runs lie
from their lines (the paper: all of the 2B model within 1%), then what (5.1), fitted to the sizes up to 2.3B alone, says
of every run of a larger one. Writes tab06_chinchilla.csv, tab06_larger.csv and fig07_chinchilla.png. Seconds on a CPU.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cdl.errors import UserError
from cdl.laws.figures import scaling_figure, sizes_figure
from cdl.laws.horizon import Line, fit_line
from cdl.laws.scaling import LEAST_HORIZONS, fit_scaling

SHOWN = 2.007e9  # the 2B model of Figure 7
LARGEST_FITTED = 2.3e9


def read(path: str) -> pd.DataFrame:
    """Columns N (rounded to 0.001B), tokens, loss, a row per run.

    Raises:
      UserError: no such file, or not the columns of svg_extracted_data.csv.
    """
    if not Path(path).is_file():
        raise UserError(f"--data={path!r} does not exist; take svg_extracted_data.csv of analyzing-chinchilla")
    runs = pd.read_csv(path)
    missing = [c for c in ("Model Size", "Training FLOP", "loss") if c not in runs.columns]
    if missing:
        raise UserError(f"{path} lacks the columns {missing}; take svg_extracted_data.csv of analyzing-chinchilla")
    return pd.DataFrame(
        {
            "N": (runs["Model Size"] / 1e9).round(3) * 1e9,
            "tokens": runs["Training FLOP"] / 6 / runs["Model Size"],
            "loss": runs["loss"],
        }
    )


def lines_of(runs: pd.DataFrame) -> dict[float, Line]:
    """N -> the line through all of its runs, where there are three horizons."""
    return {
        float(N): fit_line(these["tokens"].to_numpy(), these["loss"].to_numpy())  # type: ignore[arg-type]
        for N, these in runs.groupby("N")
        if these["tokens"].nunique() >= LEAST_HORIZONS
    }


def table_6(lines: dict[float, Line]) -> pd.DataFrame:
    """The paper's columns, standard errors, and the largest relative error of a run."""
    rows = []
    for N, line in lines.items():
        relative = np.abs(line.L_inf + line.Q / np.sqrt(line.T) - line.loss) / line.loss
        rows.append(
            dict(
                size_B=N / 1e9, horizons=len(line.T), slope=line.Q, L_inf=line.L_inf, r2=line.r2, slope_se=line.Q_se,
                L_inf_se=line.L_inf_se, worst=relative.max(), beyond_1_percent=int((relative > 0.01).sum()),
            )
        )  # fmt: skip
    return pd.DataFrame(rows)


def larger(runs: pd.DataFrame) -> pd.DataFrame:
    """(5.1) from the smaller sizes: prediction and interval of every run of a larger one."""
    fit = fit_scaling(runs[runs["N"] <= LARGEST_FITTED], x="tokens")
    rest = runs[runs["N"] > LARGEST_FITTED].sort_values(["N", "tokens"])
    said = [fit.predict(N, tokens) for N, tokens in zip(rest["N"], rest["tokens"], strict=True)]
    return rest.assign(
        predicted=[p.loss for p in said],
        low=[p.low for p in said],
        high=[p.high for p in said],
        inside=[loss in p for loss, p in zip(rest["loss"], said, strict=True)],
        relative=[p.loss / loss - 1 for loss, p in zip(rest["loss"], said, strict=True)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="FILE", help="svg_extracted_data.csv")
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help="folder for tables and figures")
    arguments = parser.parse_args()
    try:
        runs = read(arguments.data)
    except UserError as e:
        parser.error(str(e))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    lines = lines_of(runs)
    table = table_6(lines)
    print(f"{'size (B)':>8} {'horizons':>8} {'slope':>9} {'L_inf':>6} {'R2':>6}   {'worst run':>9}")
    for row in table.itertuples():
        print(f"{row.size_B:8.3f} {row.horizons:8d} {row.slope:9.2e} {row.L_inf:6.3f} {row.r2:6.3f}   {row.worst:9.2%}")
    shown = table[np.isclose(table["size_B"], SHOWN / 1e9)].iloc[0]
    worst = table.loc[table["worst"].idxmax()]
    print(
        f"\nRuns more than 1% off their line: {shown.beyond_1_percent:.0f} of {shown.horizons:.0f} of the "
        f"{shown.size_B:.3f}B model of Figure 7 (worst {shown.worst:.2%}); {table['beyond_1_percent'].sum()} of "
        f"{table['horizons'].sum()} of all, in {(table['beyond_1_percent'] > 0).sum()} of {len(table)} sizes (worst "
        f"{worst.worst:.2%}, {worst.size_B:.3f}B)."
    )

    fit = fit_scaling(runs[runs["N"] <= LARGEST_FITTED], x="tokens")
    target = dict(N=float(runs["N"].max()), T=float(runs["tokens"].max()))
    print(f"\n(5.1) from the sizes up to {LARGEST_FITTED / 1e9:g}B, horizons too short for a line left out:")
    print("\n".join(fit.summary(**target).splitlines()[-3:-1]))
    for warning in fit.warnings(**target):
        print(f"Warning: {warning}.")
    rest = larger(runs)
    print(f"\n{'size (B)':>8} {'runs':>5} {'mean error':>10} {'worst':>8} {'bias':>8} {'in the interval':>16}")
    groups = [(f"{N / 1e9:.3f}", these) for N, these in rest.groupby("N")]  # type: ignore[operator]
    enough = rest[rest["tokens"] >= runs.loc[runs["N"] <= LARGEST_FITTED, "tokens"].min()]
    for name, these in [*groups, ("all", rest), ("in range", enough)]:
        error = these["relative"]
        print(
            f"{name:>8} {len(these):5d} {error.abs().mean():10.2%} {error.abs().max():8.2%} {error.mean():+8.2%} "
            f"{these['inside'].sum():9d} of {len(these)}"
        )
    print("bias: predicted over measured, less 1; in range: no fewer tokens than any run that was fitted")

    table.to_csv(out / "tab06_chinchilla.csv", index=False)
    rest.to_csv(out / "tab06_larger.csv", index=False)
    sizes_figure(lines, min(lines, key=lambda N: abs(N - SHOWN))).savefig(out / "fig07_chinchilla.png", dpi=130)
    scaling_figure(fit, **target).savefig(out / "tab06_larger.png", dpi=130)
    print(f"\nTables: {out / 'tab06_chinchilla.csv'}, {out / 'tab06_larger.csv'}")
    print(f"Figures: {out / 'fig07_chinchilla.png'}, {out / 'tab06_larger.png'}")


if __name__ == "__main__":
    main()
