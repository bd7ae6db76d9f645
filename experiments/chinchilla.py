"""Generalization 3 from published runs: losses of the Chinchilla models against 1/sqrt(tokens).

The file is svg_extracted_data.csv of the public repository epoch-research/analyzing-chinchilla: 245 runs read off a
published figure, with model size, training FLOP and final loss. Models of a size, rounded to 0.001B, are one line where
they have three horizons; tokens = FLOP / 6 / size. Every run is in its line, as in the paper.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from cdl.errors import UserError
from cdl.laws.horizon import Line, fit_line
from cdl.laws.scaling import LEAST_HORIZONS, fit_scaling

LARGEST_FITTED = 2.3e9
LEAST_R2 = 0.978  # of Tables 2 and 6, as printed


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
