"""Do the constants of the laws depend on the peak rate? Fit runs of one peak, predict those of another.

    python experiments/across_peaks.py --curves=DIR --llama=DIR [--out=runs/paper]

--llama has W&B exports (JSON) of the GitHub repository fabian-sp/lr-scheduling: Llama-style runs of two sizes, each at
two peak rates. Losses after step 1000 count. --curves has 25M/*.csv and 100M/*.csv of thu-yao-01-luo/MultiPowerLaw: one
peak rate, but several rates at which the runs end. Prints four tables:

  (a) each law fitted to every run on its own: do the constants agree?
  (b) fitted to the Llama runs of one peak, against those of the other;
  (c) fitted to both peaks together, with common constants and with D and G (A and B) of each peak's own; as a control
      the same for two schedules of one peak rate;
  (d) fitted to the curves that end at one rate, against those that end at others.

"r" stands for a law in rates divided by the r-th power of their run's peak rate: then D2 and A^(1/alpha) grow with the
peak rate as its r-th power, G2 and B^(1/(1-p)) fall so, and within a run nothing changes. The convex law has r = 0.5
unless it is fitted; A and B of one run are for rates so divided, those of the groups in (c) for rates as they are.
Writes across_peaks.png (the laws of (b) along
the step) and across_peaks_{alone,other,joint,ends}.csv. No training; some minutes on a CPU.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cdl.errors import UserError
from cdl.laws.curve import CurveFit, fit_curve
from cdl.laws.forms import Form, convex, paper
from cdl.laws.holdout import join, points_of, score_of
from cdl.laws.records import Trajectory, read_runs, trajectories
from cdl.laws.solve import predict, solve
from cdl.plots import GREY, finish, palette

AFTER = 1000  # of the Llama runs: losses up to this step follow no law of the rates
SIZES = ("25M", "100M")  # folders of --curves
SAME = 1.25  # rates within this factor are one rate


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of `fit_curve`, in rates divided by the r-th power of their run's peak rate."""

    name: str
    r: float = 0.0

    def fit(self, runs: "Runs") -> CurveFit:
        """It knows rates as `rates` gives them."""
        return fit_curve([self.rates(t) for t in runs], self.name, across_peaks=False)

    def rates(self, t: Trajectory) -> Trajectory:
        # The convex law divides what it is given by the square root of its peak.
        power = 1 - 2 * self.r if self.name == "convex" else -self.r
        return dataclasses.replace(t, eta_T=t.eta_T * peak(t) ** power)


CARRIED = {
    "paper": Law("paper"),
    "paper, r = 0.5": Law("paper", r=0.5),
    "convex, r = 0": Law("convex"),
    "convex": Law("convex", r=0.5),
}
ONE_PEAK = {name: CARRIED[name] for name in ("paper", "convex")}  # where r changes nothing
Runs = Sequence[Trajectory]


def read_llama(folder: Path) -> dict[str, list[Trajectory]]:
    """Model size -> its runs, losses up to step AFTER left out, named by their rates and length.

    Raises:
      UserError: no such runs there.
    """
    if not list(folder.glob("*.json")):
        raise UserError(f"--llama={folder} has no *.json; take the runs of https://github.com/fabian-sp/lr-scheduling")
    table = read_runs(folder)
    layers = table.groupby("run")["n_layer"].first()
    found: dict[str, list[Trajectory]] = {}
    for t in sorted(trajectories(table), key=lambda t: (layers[t.run], peak(t), len(t.eta_T))):
        kind = "constant" if np.ptp(t.eta_T[t.step_P[t.step_P > AFTER] - 1]) < 1e-3 * peak(t) else "cosine"
        name = f"{kind} {peak(t):.3g}, T={len(t.eta_T):,}"
        named = dataclasses.replace(points_of(t, t.step_P > AFTER), run=name)
        found.setdefault(f"{layers[t.run]:g} layers", []).append(named)
    return found


def read_curves(folder: Path) -> dict[str, list[Trajectory]]:
    """Model size -> its runs.

    Raises:
      UserError: no such runs there.
    """
    for size in SIZES:
        if not list((folder / size).glob("*.csv")):
            where = "https://github.com/thu-yao-01-luo/MultiPowerLaw"
            raise UserError(f"--curves={folder} has no {size}/*.csv; take the curves of {where}")
    return {size: trajectories(folder / size) for size in SIZES}


def peak(t: Trajectory) -> float:
    return float(t.eta_T.max())


def end(t: Trajectory) -> float:
    """The rate of the last recorded loss."""
    return float(t.eta_T[t.step_P[-1] - 1])


def grouped(runs: Runs, rate: Callable[[Trajectory], float]) -> dict[str, list[Trajectory]]:
    """Runs by a rate of theirs, largest first; named by the lowest of the group."""
    groups: list[list[Trajectory]] = []
    for t in sorted(runs, key=rate):
        if groups and rate(t) < SAME * rate(groups[-1][0]):
            groups[-1].append(t)
        else:
            groups.append([t])
    return {f"{rate(g[0]):.2g}": g for g in reversed(groups)}


def doubt(fit: CurveFit) -> str:
    """What `CurveFit.warnings` say, in a few words."""
    short = {"cannot be told apart": "one rate", "is at the end of its range": "range ends", "is nothing": "unused"}
    found = []
    for warning in fit.warnings:
        name = warning.removeprefix("the term of ").split(" ")[0] if " = " in warning or "term of" in warning else ""
        found += [f"{name} {word}".strip() for phrase, word in short.items() if phrase in warning]
    return ", ".join(found)


def alone(models: Mapping[str, Runs]) -> pd.DataFrame:
    """(a) The constants of laws fitted to each run on its own."""
    rows = []
    for model, runs in models.items():
        for law in ("paper", "convex"):
            for t in runs:
                fit = fit_curve([t], law)
                figures = {"points": len(t.step_P), "r2": fit.score([t])["r2"], "doubt": doubt(fit)}
                rows.append({"model": model, "law": law, "run": t.run} | fit.params | figures)
    return pd.DataFrame(rows)


def against(fit: CurveFit, runs: Runs) -> dict[str, float]:
    """Means over runs of `CurveFit.scores`, and of the signed errors at the first and the last point."""
    ends = [fit.predict(t.eta_T, t.step_P[[0, -1]]) / t.loss_P[[0, -1]] - 1 for t in runs]
    return fit.score(runs) | dict(zip(("first", "last"), np.mean(ends, 0).tolist(), strict=True))


def other_rate(
    models: Mapping[str, Runs], rate: Callable[[Trajectory], float], laws: Mapping[str, Law]
) -> pd.DataFrame:
    """(b), (d) Fitted to the runs of one rate, against those of each other."""
    rows = []
    for model, runs in models.items():
        groups = grouped(runs, rate)
        for fitted, these in groups.items():
            for name, law in laws.items():
                fit = law.fit(these)
                found = dict(model=model, fitted=fitted, law=name, fitted_r2=fit.score(fit.fitted)["r2"])
                for predicted, others in groups.items():
                    if predicted != fitted:
                        figures = against(fit, [law.rates(t) for t in others])
                        rows.append(found | dict(predicted=predicted) | figures | dict(doubt=doubt(fit)))
    return pd.DataFrame(rows)


def own_by_group(form: Form, groups: Sequence[str]) -> Form:
    """A law of three coefficients with common L_inf and shape, and the other two for each group of runs on its own.

    It has to be told the group: `prepared["group"]`, [P, groups], is 1 there and 0 elsewhere.
    """

    def columns(shape_J: Array, prepared: dict[str, Array]) -> Array:
        one_PxK, group_PxG = form.columns(shape_J, prepared), prepared["group"]
        return jnp.concatenate([one_PxK[:, :1], *(one_PxK[:, k : k + 1] * group_PxG for k in (1, 2))], 1)

    names = [f"{name} at {group}" for name in form.coefficients[1:] for group in groups]
    return dataclasses.replace(
        form, name=f"{form.name}, own", coefficients=(form.coefficients[0], *names), columns=columns
    )


def fit_own(form: Form, groups: Mapping[str, Runs]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fit `own_by_group`: the constants, and the predicted losses of each run by its name."""
    own = own_by_group(form, list(groups))
    every = [(g, Law(form.name).rates(t)) for g, runs in enumerate(groups.values()) for t in runs]
    unit = max(peak(t) for _, t in every)
    loss_P = np.concatenate([t.loss_P for _, t in every])

    def prepare(around_J: np.ndarray | None) -> list[dict[str, np.ndarray]]:
        found = []
        for g, t in every:
            indicator = np.tile(np.eye(len(groups))[g], (len(t.step_P), 1))
            found.append(form.prepare(t.eta_T / unit, t.step_P, around_J) | {"group": indicator})
        return found

    solution = solve(own, join(prepare(None)), loss_P)
    for _ in range(3 if form.shape else 0):  # as `fit_curve` does: columns are exact where the search ended
        solution = solve(own, join(prepare(solution.shape_J)), loss_P, near=solution)
    predicted = {
        t.run: predict(own, p, solution.shape_J, solution.coefficient_K)
        for (_, t), p in zip(every, prepare(solution.shape_J), strict=True)
    }
    values = dict(zip(own.coefficients, solution.coefficient_K.tolist(), strict=True))
    shape = dict(zip(form.shape, solution.shape_J.tolist(), strict=True))
    params = {form.coefficients[0]: values[form.coefficients[0]]} | shape
    for group in groups:
        these = {name: values[f"{name} at {group}"] for name in form.coefficients[1:]}
        natural = form.natural(params | these, unit)
        params |= {f"{name} at {group}": natural[name] for name in these}
    return params, predicted


def in_sample(groups: Mapping[str, Runs], predicted: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means over runs of `score_of`, and mean relative errors by group."""
    runs = [t for these in groups.values() for t in these]
    scores = pd.DataFrame([score_of(predicted[t.run], t.loss_P) for t in runs], index=[t.run for t in runs])
    by_group = {group: float(scores.loc[[t.run for t in these], "relative"].mean()) for group, these in groups.items()}
    return {str(name): float(scores[name].mean()) for name in scores} | {"by group": by_group}


def joint(models: Mapping[str, Mapping[str, Runs]]) -> pd.DataFrame:
    """(c) Fitted to all groups of runs, in sample: common constants, and two of each group's own."""
    rows = []
    for model, groups in models.items():
        runs = [t for these in groups.values() for t in these]
        several = len(grouped(runs, peak)) > 1
        for name, law in (CARRIED if several else ONE_PEAK).items():
            fit = law.fit(runs)
            predicted = {t.run: fit.predict(t.eta_T, t.step_P) for t in fit.fitted}
            rows.append({"model": model, "law": name, "params": fit.params} | in_sample(groups, predicted))
        if several:
            fit = fit_curve(runs)
            predicted = {t.run: fit.predict(t.eta_T, t.step_P) for t in fit.fitted}
            rows.append(
                {"model": model, "law": "convex, r fitted", "params": fit.params} | in_sample(groups, predicted)
            )
        for form in (paper, convex()):
            params, predicted = fit_own(form, groups)
            name = f"{form.name}, own {' and '.join(form.coefficients[1:])}"
            rows.append({"model": model, "law": name, "params": params} | in_sample(groups, predicted))
    return pd.DataFrame(rows)


def print_alone(table: pd.DataFrame) -> None:
    for law, names in (("paper", ["D2", "G2", "L_inf"]), ("convex", ["A", "B", "alpha", "p", "L_inf"])):
        print(heading(["", "run", *names, "R2", "warnings"]))
        for r in table[table["law"] == law].to_dict("records"):
            print(line([r["model"], r["run"], *(f"{r[x]:.4g}" for x in names), f"{r['r2']:.4f}", r["doubt"]]))
        print()


def print_other(table: pd.DataFrame) -> None:
    print(heading(["", "fitted at", "predicted", "law", "R2", "MAE", "mean", "worst", "first", "last", "warnings"]))
    for r in table.to_dict("records"):
        figures = [f"{r['r2']:.3f}", f"{r['mae']:.4f}", f"{r['relative']:.2%}", f"{r['worst']:.2%}"]
        signed = [f"{r[x]:+.2%}" for x in ("first", "last")]
        print(line([r["model"], r["fitted"], r["predicted"], r["law"], *figures, *signed, r["doubt"]]))
    print()


def print_joint(table: pd.DataFrame) -> None:
    print(heading(["", "law", "R2", "mean", "worst", "mean of each group", "constants"]))
    for r in table.to_dict("records"):
        by_group = ", ".join(f"{group}: {value:.2%}" for group, value in r["by group"].items())
        constants = ", ".join(f"{k} = {v:.3g}" for k, v in r["params"].items())
        figures = [f"{r['r2']:.4f}", f"{r['relative']:.2%}", f"{r['worst']:.2%}"]
        print(line([r["model"], r["law"], *figures, by_group, constants]))
    print()


def print_ends(table: pd.DataFrame) -> None:
    rates = list(dict.fromkeys(table["predicted"]))
    rates.sort(key=float, reverse=True)
    print(heading(["", "fitted, ending at", "law", *(f"ending at {rate}" for rate in rates), "warnings"]))
    for (model, fitted, law), rows in table.groupby(["model", "fitted", "law"], sort=False):  # type: ignore[misc]
        by = rows.set_index("predicted")
        cells = [
            f"{by.at[rate, 'relative']:.2%}, {by.at[rate, 'last']:+.2%}" if rate in by.index else "" for rate in rates
        ]
        print(line([model, fitted, law, *cells, by["doubt"].iloc[0]]))
    print()


def heading(names: Sequence[str]) -> str:
    return f"{line(names)}\n{'|---' * len(names)}|"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def across_figure(models: Mapping[str, Runs], laws: Mapping[str, Law]) -> Figure:
    """Fitted at the larger peak rate (solid; r changes nothing there), predicted at the smaller one (dashed)."""
    figure = Figure(figsize=(5.8 * len(models), 6.6), layout="constrained")
    axes = figure.subplots(2, len(models), sharex="col", sharey="row", height_ratios=[2, 1], squeeze=False)
    color = palette(list(laws))
    for (model, runs), (upper, lower) in zip(models.items(), axes.T, strict=True):
        fitted, predicted = grouped(runs, peak).values()
        for name, law in laws.items():
            fit = law.fit(fitted)
            for t in fit.fitted if law.r == 0 else ():
                upper.plot(t.step_P, fit.predict(t.eta_T, t.step_P), "-", lw=0.9, color=color[name])
            for t in [law.rates(t) for t in predicted]:
                predicted_P = fit.predict(t.eta_T, t.step_P)
                upper.plot(t.step_P, predicted_P, "--", lw=1.6, color=color[name])
                lower.plot(t.step_P, 100 * (predicted_P / t.loss_P - 1), "--", lw=1.4, color=color[name])
        for these, shade in ((fitted, "#aaaaaa"), (predicted, "k")):
            for t in these:
                upper.plot(t.step_P, t.loss_P, ".", ms=4, color=shade)
        upper.set(ylim=(2.98, 4.12))
        lower.set(ylim=(-2.5, 5), xlabel="step")
        lower.axhline(0, color=GREY, lw=0.8)
        upper.set_title(f"{model}: fitted at {peak(fitted[0]):.2g}, predicted at {peak(predicted[0]):.2g}", loc="left")
        finish(upper, legend=False)
        finish(lower, legend=False)
    axes[0, 0].set(ylabel="held-out loss (nats a token)")
    axes[1, 0].set(ylabel="predicted over\nmeasured (%)")
    handles = [Line2D([], [], color=color[name], lw=2, label=name) for name in laws]
    handles += [Line2D([], [], marker=".", ls="", color="#aaaaaa", label="measured, fitted to")]
    handles += [Line2D([], [], marker=".", ls="", color="k", label="measured, not seen")]
    handles += [Line2D([], [], ls=ls, color=GREY, label=label) for ls, label in (("-", "fit"), ("--", "prediction"))]
    axes[0, -1].legend(handles=handles, fontsize=8, frameon=False, ncols=2, loc="upper right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", required=True, metavar="DIR", help="folder with 25M/ and 100M/ of MultiPowerLaw")
    parser.add_argument("--llama", required=True, metavar="DIR", help="folder with runs of lr-scheduling, *.json")
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help="folder for figure and numbers")
    arguments = parser.parse_args()
    try:
        curves, llama = read_curves(Path(arguments.curves)), read_llama(Path(arguments.llama))
    except UserError as e:
        parser.error(str(e))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    print("(a) Fitted to each run on its own\n")
    tables = {"alone": alone(llama | curves)}
    print_alone(tables["alone"])
    print("(b) Fitted at one peak rate, predicted at the other\n")
    tables["other"] = other_rate(llama, peak, CARRIED)
    print_other(tables["other"])
    print("(c) Fitted to two peak rates, and as a control to two schedules of one peak rate; in sample\n")
    by_peak = {model: grouped(runs, peak) for model, runs in llama.items()}
    kinds = ("cosine", "constant")
    by_kind = {model: {k: [t for t in runs if t.run.startswith(k)] for k in kinds} for model, runs in curves.items()}
    tables["joint"] = joint(by_peak | by_kind)
    print_joint(tables["joint"])
    print("(d) Fitted to curves that end at one rate: mean error, and signed error at the last point, at others\n")
    tables["ends"] = other_rate(curves, end, ONE_PEAK)
    print_ends(tables["ends"])
    for name, table in tables.items():
        table.to_csv(out / f"across_peaks_{name}.csv", index=False)
    across_figure(llama, CARRIED).savefig(out / "across_peaks.png", dpi=130)
    print(f"Numbers: {', '.join(str(out / f'across_peaks_{name}.csv') for name in tables)}")
    print(f"Figure: {out / 'across_peaks.png'}")


if __name__ == "__main__":
    main()
