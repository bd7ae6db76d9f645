"""Figure 10: final losses of four settings at their best reference rate, against 1/sqrt(T) and 1/sqrt(FLOPs).

    python experiments/fig10_four_settings.py [--scale=laptop|gpu|paper]

`paper`: 0.1B with AdamW, and 0.1B, 1B and 7B with Muon-NSGD (section 5.3). `laptop` and `gpu`: the middle size with
AdamW, and three sizes with Muon-NSGD. The best rate is that of Figure 8 or 9, and other sizes take it from that one,
if they ran at it. See experiments/paper.py for options.
"""

from dataclasses import dataclass

import fig08_gpt2_adamw_horizons
import numpy as np
import pandas as pd
from best_rates import size
from best_rates import sweeps as sizes
from gpt2_runs import one_run
from matplotlib.figure import Figure
from paper import Claim, Lab, Outcome, Sweep, config, main, span

import cdl
from cdl.errors import UserError
from cdl.laws.horizon import Line, fit_line
from cdl.laws.scaling import fit_scaling
from cdl.plots import finish, palette

GOOD = 0.95


@dataclass
class Setting:
    """runs: all. table: those at the rate that it is given, eta_ref. line: through those that are long enough."""

    name: str
    eta_ref: float
    runs: pd.DataFrame
    table: pd.DataFrame
    line: Line

    @property
    def N(self) -> float:
        """Parameters."""
        return float(self.runs["n_params"].iloc[0])


def sweeps(scale: str) -> list[Sweep]:
    """AdamW, then Muon-NSGD by size, the reference first."""
    if scale != "paper":
        return [*fig08_gpt2_adamw_horizons.sweeps(scale), *sizes(scale)]
    grids = {"0.1b-adamw": "gpt2-adamw", "0.1b-muon": "gpt2-muon_nsgd", "1b-muon": "gpt2-1b", "7b-muon": "gpt2-7b"}
    made = []
    for name, folder in grids.items():
        own, muon = name.startswith("0.1b"), name.endswith("muon")
        grid = config(f"gpt2.py:{name}")[1]
        at_best = [x for x in grid if x["eta_ref"] == 10.0]  # section 5.2: eta_ref* of 0.1B with Muon-NSGD
        c = one_run(scale, "muon_nsgd" if muon else "adamw", name.split("-")[0])
        made.append(Sweep(folder, c, grid if own else at_best))
    return made


def experiment(lab: Lab) -> Outcome:
    """Train, fit and draw."""
    adamw, reference, *others = sweeps(lab.scale)
    settings = [_setting("AdamW", adamw, lab), _setting("Muon-NSGD", reference, lab)]
    best = settings[1].eta_ref
    settings += [_setting("Muon-NSGD", sweep, lab, best) for sweep in others]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = palette([s.name for s in settings])
    for s in settings:
        per_update = s.table["flops_per_step"].iloc[0]
        for ax, unit in ((left, 1.0), (right, float(per_update))):
            x = np.linspace(0, (unit * s.table["T"].min()) ** -0.5, 50)
            ax.plot(x, s.line.L_inf + s.line.Q * x * unit**0.5, lw=1.2, color=colors[s.name])
            label = f"{s.name}, $\\eta_{{ref}}$ = {s.eta_ref:g}, $R^2$ = {s.line.r2:.4f}"
            ax.plot((unit * s.table["T"]) ** -0.5, s.table["loss"], "o", ms=4, color=colors[s.name], label=label)
    left.set(xlabel="$1/\\sqrt{T}$", ylabel="final held-out loss", xlim=(0, None))
    right.set(xlabel="$1/\\sqrt{FLOPs}$", xlim=(0, None))
    finish(left)
    finish(right, legend=False)
    r2 = [s.line.r2 for s in settings]
    claims = [
        Claim(
            "The losses of all four settings are lines in 1/sqrt(T)",
            f"R2 {span(r2, '.4f')}",
            min(r2) >= GOOD,
        ),
        _transfer(settings[1], settings[2:]),
        _across_sizes(settings[1:]),
    ]
    numbers = {s.name: dict(eta_ref=s.eta_ref, line=vars(s.line), runs=s.table[["T", "loss"]]) for s in settings}
    return Outcome(figure, numbers, claims)


def _setting(optimizer: str, sweep: Sweep, lab: Lab, eta_ref: float | None = None) -> Setting:
    """Trained at all rates of its grid; at the best one of these where none of them is given."""
    runs = lab.train(sweep).table
    done = runs[runs["status"] == "done"]
    if eta_ref is None or eta_ref not in set(done["eta_ref"]):
        eta_ref = cdl.fit_horizon(runs).best(float(runs["T"].max())).eta_ref
    table = done[done["eta_ref"] == eta_ref]
    if len(table) < 3:
        raise UserError(f"{sweep.folder} has {len(table)} finished runs at eta_ref={eta_ref:g}; three make a line")
    (line,) = cdl.fit_horizon(table).lines if len(table) > 3 else (fit_line(*_columns(table), eta_ref),)
    return Setting(f"{size(float(runs['n_params'].iloc[0]))} {optimizer}", eta_ref, runs, table, line)


def _columns(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return runs["T"].to_numpy(float), runs["loss"].to_numpy(float)


def _transfer(reference: Setting, others: list[Setting]) -> Claim:
    """Is the rate of the reference, to 1% of the loss, the best of larger models that ran at rates around it?"""
    best = reference.eta_ref
    said, serves = [], []
    for s in (s for s in others if s.N > reference.N):
        last = s.runs[(s.runs["T"] == s.runs["T"].max()) & (s.runs["status"] == "done")]
        loss = dict(zip(last["eta_ref"], last["loss"], strict=True))
        if best in loss and min(loss) < best < max(loss):
            own = min(loss, key=loss.__getitem__)
            said.append(
                f"{size(s.N)}, {len(loss)} rates: {own:g}, {loss[best] / loss[own] - 1:.2%} lower than at {best:g}"
            )
            serves.append(loss[best] < 1.01 * loss[own])
    return Claim(
        "The best eta_ref of a small model serves larger ones",
        f"eta_ref* = {best:g} of {size(reference.N)}; "
        + (
            f"lowest loss at the longest horizon of {'; '.join(said)}"
            if said
            else "no larger one ran at rates around it"
        ),
        all(serves) if serves else None,
    )


def _across_sizes(settings: list[Setting]) -> Claim:
    """(5.1) from all but the largest size, for the largest."""
    by_size = sorted(settings, key=lambda s: s.N)
    frames = []
    for s in by_size:
        long = s.table[s.table["T"].isin(s.line.T)]
        frames.append(pd.DataFrame(dict(N=long["n_params"].astype(float), T=long["T"], loss=long["loss"])))
    largest = frames[-1]
    times = float(largest["N"].iloc[0] / frames[-2]["N"].iloc[0])
    paper = "Losses of the largest model are predicted from smaller ones (70 times across sizes)"
    try:
        fit = fit_scaling(pd.concat(frames[:-1], ignore_index=True))
        said = [fit.predict(N, T) for N, T in zip(largest["N"], largest["T"], strict=True)]
    except UserError as e:
        return Claim(paper, f"no law across {len(frames) - 1} sizes: {e}", None)
    error = np.array([p.loss / loss - 1 for p, loss in zip(said, largest["loss"], strict=True)])
    inside = sum(loss in p for p, loss in zip(said, largest["loss"], strict=True))
    here = f"{times:.1f} times: mean error {np.abs(error).mean():.2%}, worst {np.abs(error).max():.2%}, {inside} of "
    return Claim(paper, f"{here}{len(said)} in their 95% interval", bool(np.abs(error).mean() < 0.02))


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
