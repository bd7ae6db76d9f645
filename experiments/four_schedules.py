"""Figures 2 to 5: losses of one model under four schedules, and (3.1) fitted to them.

Each run is fitted by itself, on the losses recorded in its first half, and (3.1) says the second half from the rates
alone. Losses in the first 20% of a run are left out: the paper calls the bound tight "after a short period", and with
all losses the first few, at small sums of rates, decide the fit. The forecasting law of docs/laws.md is fitted to the
same losses beside it; both are scored on what they had not seen. The paper does not say on what its R2 are; so there is
also the one in sample, of a fit to both halves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper import Claim, Lab, Outcome, Sweep

import cdl
from cdl.plots import finish, palette

EARLY = 0.2  # of a run
GOOD = 0.95  # R2 that the paper reports at least


def four_schedules(lab: Lab, sweep: Sweep, names: Sequence[str], what: str, windows: int = 0) -> Outcome:
    """Train, fit and draw.

    Args:
      sweep: of four runs. names: of their schedules.
      what: is trained, in words.
      windows: of the training loss; 0 for held-out losses.
    """
    runs = lab.train(sweep)
    figure = Figure(figsize=(10, 7), layout="constrained")
    colors, numbers = palette(names), {}
    for i, (ax, name) in enumerate(zip(figure.subplots(2, 2).ravel(), names, strict=True)):
        row = runs.table.iloc[i]
        if row["status"] != "done":
            ax.set_title(f"{name}: diverged", loc="left", fontsize=10)
            numbers[name] = dict(status=row["status"])
            continue
        curve = runs.curve(i, name, windows)
        T = int(row["T"])
        eta_T = curve["eta"].to_numpy()
        known = curve[curve["loss"].notna() & (curve["step"] > EARLY * T)]
        step_P, loss_P = known["step"].to_numpy(), known["loss"].to_numpy()
        early_P = step_P <= T / 2
        laws: dict[str, dict[str, Any]] = {}
        for law in ("paper", "convex"):
            whole = cdl.fit_curve(curve, law=law, after=int(EARLY * T))
            in_sample = _r2(loss_P, whole.predict(eta_T, step_P))
            fit = cdl.fit_curve(curve, law=law, until=0.5, after=int(EARLY * T))
            said_P = fit.predict(eta_T, step_P)
            laws[law] = dict(
                parameters=fit.params,
                predicted=said_P,
                r2_in_sample=in_sample,
                r2=_r2(loss_P, said_P),
                r2_first_half=_r2(loss_P[early_P], said_P[early_P]),
                r2_second_half=_r2(loss_P[~early_P], said_P[~early_P]),
                error_second_half=float(np.abs(said_P / loss_P - 1)[~early_P].mean()),
            )
        numbers[name] = dict(
            peak=row["eta_peak"], T=T, step=step_P, loss=loss_P, final=row["loss"], eta=eta_T[step_P - 1], laws=laws
        )
        said_P, paper = laws["paper"]["predicted"], laws["paper"]
        every = curve[curve["loss"].notna()]
        ax.plot(every["step"], every["loss"], ".", ms=4, color="#999999", label="measured")
        ax.plot(step_P[early_P], said_P[early_P], "-", lw=2, color=colors[name], label="(3.1), fitted")
        ax.plot(step_P[~early_P], said_P[~early_P], "--", lw=2, color=colors[name], label="(3.1), predicted")
        title = f"{name}:  $R^2$ = {paper['r2_second_half']:.3f} predicted, {paper['r2_in_sample']:.3f} in sample"
        ax.set_title(title, loc="left", fontsize=10)
        ax.set(xlabel="update", ylabel="training loss" if windows else "held-out loss")
        reach = np.ptp(loss_P)
        ax.set_ylim(loss_P.min() - 0.15 * reach, loss_P.max() + 0.3 * reach)
        rates = ax.twinx()
        rates.fill_between(np.arange(1, T + 1), eta_T, color="#bbbbbb", alpha=0.25, lw=0)
        rates.set_ylim(0, 3.2 * eta_T.max())
        rates.set_yticks([])
        rates.spines[["top", "right"]].set_visible(False)
        finish(ax, legend=i == 0)
    figure.suptitle(f"{what} (grey area: the rate)", fontsize=11)
    done = {name: x["laws"] for name, x in numbers.items() if "laws" in x}
    return Outcome(
        figure,
        numbers,
        [
            Claim(
                f"{what}: (3.1) describes the losses under four schedules with R2 >= {GOOD}",
                f"R2 in sample: {_listed(done, 'paper', 'r2_in_sample')}",
                len(done) == len(names) and all(x["paper"]["r2_in_sample"] >= GOOD for x in done.values()),
            ),
            Claim(
                f"{what}: (3.1), fitted to half of the iterations, predicts the other half with R2 >= {GOOD}",
                f"R2 on the second half: {_listed(done, 'paper', 'r2_second_half')}; over the run: "
                f"{_listed(done, 'paper', 'r2')}; on the second half, of the law of docs/laws.md: "
                f"{_listed(done, 'convex', 'r2_second_half')}",
                len(done) == len(names) and all(x["paper"]["r2_second_half"] >= GOOD for x in done.values()),
            ),
        ],
    )


def _r2(loss_P: np.ndarray, said_P: np.ndarray) -> float:
    return float(1 - ((loss_P - said_P) ** 2).sum() / ((loss_P - loss_P.mean()) ** 2).sum())


def _listed(done: Mapping[str, Any], law: str, key: str) -> str:
    return ", ".join(f"{name} {laws[law][key]:.3f}" for name, laws in done.items())
