"""Generalization 3, for Figure 7 and Tables 2 and 6: each run at its best peak rate, against 1/sqrt(tokens).

At `laptop` and `gpu` scale GPT-2 of several sizes is trained with Muon-NSGD over reference rates and horizons, and of
each size and horizon the lowest loss counts. At `paper` scale the runs are published ones (`chinchilla`).
"""

import pandas as pd
from chinchilla import lines_of, read
from gpt2_runs import GRIDS, one_run
from paper import Lab, Sweep, published

import cdl
from cdl.laws.horizon import Line

WHAT = "svg_extracted_data.csv of epoch-research/analyzing-chinchilla"


def sweeps(scale: str) -> list[Sweep]:
    """A sweep for each size."""
    return [
        Sweep(f"gpt2-muon_nsgd-{size}", one_run(scale, "muon_nsgd", size), grid)
        for size, grid in GRIDS.get(scale, {}).items()
    ]


def runs_at_best_rates(lab: Lab) -> pd.DataFrame:
    """Columns N, tokens, loss; at scales that train also T and eta_ref."""
    if lab.scale == "paper":
        return read(str(published(lab, WHAT)))
    found = []
    for sweep in sweeps(lab.scale):
        table = lab.train(sweep).table
        done = table[table["status"] == "done"]
        best = done.loc[done.groupby("T")["loss"].idxmin()]
        tokens = best["T"] * best["data.batch_size"] * best["data.seq_len"]
        columns = dict(N=best["n_params"].astype(float), tokens=tokens, loss=best["loss"], T=best["T"])
        found.append(pd.DataFrame(columns | dict(eta_ref=best["eta_ref"])))
    return pd.concat(found, ignore_index=True)


def lines_at_best_rates(lab: Lab) -> dict[float, Line]:
    """N -> line. Of our own runs without horizons that are too short, which `fit_horizon` finds; published ones are all
    in it, as in the paper."""
    runs = runs_at_best_rates(lab)
    if lab.scale == "paper":
        return lines_of(runs)
    each = {float(N): cdl.fit_horizon(these[["tokens", "loss"]], x="tokens") for N, these in runs.groupby("N")}  # type: ignore[arg-type]
    return {N: fit.lines[0] for N, fit in each.items()}


def size(N: float) -> str:
    """A number of parameters, as it is shown."""
    return f"{N / 1e9:.3f}B" if N >= 5e6 else f"{N / 1e3:,.0f}k"


def slope(Q: float) -> str:
    """A slope, as the paper prints it."""
    return f"{Q:.2e}" if Q >= 1e4 else f"{Q:,.0f}"


__all__ = ["lines_at_best_rates", "runs_at_best_rates", "size", "slope", "sweeps"]
