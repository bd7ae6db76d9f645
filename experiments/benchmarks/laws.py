"""How fast the laws of the loss along a run are fitted, how far, and how well they predict: a table of docs/laws.md.

    OPENBLAS_NUM_THREADS=1 python experiments/benchmarks/laws.py --data=DIR [--size=25M] [--calls=5] [--json=FILE]

DIR holds 25M and 100M, folders of CSV files step,lr,loss: loss_curve_repo/csv_25 and csv_100 of the GitHub repository
thu-yao-01-luo/MultiPowerLaw (Luo et al., arXiv 2503.12811). All laws are fitted to the same three curves, in turns and
in one process, after a first call that compiles; errors are means over the six other curves.

"published procedure" fits the multi-power law as its authors do, written anew from their description: L-BFGS-B from 135
starts for a law without memory, then at most 200 steps of AdamW. It has the merged sums of `cdl.laws.baselines` and
each cumulative sum once, so it is faster here than theirs. More BLAS threads slow it down: its vectors are short.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy
from scipy.optimize import minimize
from scipy.stats import linregress

import cdl
from cdl.laws.baselines import multipower
from cdl.laws.curve import LAWS, fit_curve
from cdl.laws.holdout import join, score_of
from cdl.laws.records import Trajectory, trajectories
from cdl.laws.solve import DELTA, objective, predict
from cdl.machine import processor

FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
OTHERS = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
WARMUP = 2160
PROCEDURE = "published procedure"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with 25M and 100M")
    parser.add_argument("--size", default="25M", help="25M or 100M")
    parser.add_argument("--calls", type=int, default=5, help="timed fits of each law")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    arguments = parser.parse_args()
    fitted, others = curves(arguments.data / arguments.size)
    fits: dict[str, Callable[[], tuple[float, Callable[[Trajectory], np.ndarray]]]] = {
        law: lambda law=law: fit_law(fitted, law) for law in LAWS
    }
    fits[PROCEDURE] = lambda: fit_as_published(fitted)
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    results: dict[str, tuple[float, Callable[[Trajectory], np.ndarray]]] = {}
    for turn in range(1 + arguments.calls):
        for name, fit in fits.items():
            began = time.perf_counter()
            results[name] = fit()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    rows: list[dict[str, Any]] = []
    for name, (reached, predicted) in results.items():
        scores = [score_of(predicted(t), t.loss_P) for t in others]
        figures = {key: float(np.mean([s[key] for s in scores])) for key in scores[0]}
        best, median = min(seconds[name]), statistics.median(seconds[name])
        rows.append({"law": name, "seconds": best, "median": median, "objective": reached} | figures)
    print(f"{machine()}\n\n{arguments.size}, fitted to {', '.join(FITTED)}; errors on the other six")
    print(f"{'':22s}{'seconds':>9s}{'median':>9s}{'ratio':>8s}{'objective':>12s}", end="")
    print(f"{'R2':>10s}{'MAE':>10s}{'relative':>10s}{'worst':>8s}")
    for r in rows:
        ratio = r["seconds"] / rows[0]["seconds"]
        print(f"{r['law']:22s}{r['seconds']:>9.3f}{r['median']:>9.3f}{'x ' + format(ratio, '.2g'):>8s}", end="")
        print(f"{r['objective']:>12.2e}{r['r2']:>10.5f}{r['mae']:>10.5f}{r['relative']:>10.3%}{r['worst']:>8.2%}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine(), "size": arguments.size, "rows": rows}))


def curves(folder: Path) -> tuple[list[Trajectory], list[Trajectory]]:
    """The curves to fit and the others."""
    missing = [n for n in FITTED + OTHERS if not (folder / f"{n}.csv").is_file()]
    if missing:
        raise SystemExit(
            f"{folder} has no {missing[0]}.csv; put the CSV files of loss_curve_repo/csv_25 or csv_100 of "
            f"github.com/thu-yao-01-luo/MultiPowerLaw there"
        )
    table = cdl.read_runs([folder / f"{n}.csv" for n in FITTED + OTHERS], warmup=WARMUP)
    runs = trajectories(table)
    return runs[: len(FITTED)], runs[len(FITTED) :]


def fit_law(fitted: Sequence[Trajectory], law: str) -> tuple[float, Callable[[Trajectory], np.ndarray]]:
    fit = fit_curve(fitted, law)
    return fit.objective, lambda t: fit.predict(t.eta_T, t.step_P)


# --- The published procedure ----------------------------------------------------------------------------------------


def fit_as_published(fitted: Sequence[Trajectory]) -> tuple[float, Callable[[Trajectory], np.ndarray]]:
    """The constants that the authors' procedure ends with: its objective, and predictions."""
    prepared, loss_P = join([rates_as_given(t) for t in fitted]), np.concatenate([t.loss_P for t in fitted])
    theta = refined(prepared, loss_P, starting_point(fitted))
    (*coefficients, C), (alpha, beta, gamma) = theta["scale"], theta["exponent"]
    shape_J, coefficient_K = np.array([alpha, C, beta, gamma]), np.array(coefficients)
    predicted = lambda prepared: predict(multipower, prepared, shape_J, coefficient_K)  # noqa: E731
    return objective(predicted(prepared), loss_P), lambda t: predicted(rates_as_given(t))


def rates_as_given(t: Trajectory) -> dict[str, np.ndarray]:
    """Prepared in no other unit, since AdamW depends on it, and after an update at rate 0, as the authors count."""
    return multipower.prepare(np.concatenate([[0.0], t.eta_T]), t.step_P + 1, None)


def starting_point(fitted: Sequence[Trajectory]) -> np.ndarray:
    """L_inf, A, alpha, B of the law L_inf + A S^-alpha - B (peak - eta), the best of 135 searches."""
    S_P = np.concatenate([np.cumsum(t.eta_T)[t.step_P - 1] for t in fitted])
    drop_P = np.concatenate([t.eta_T.max() - t.eta_T[t.step_P - 1] for t in fitted])
    loss_P = np.concatenate([t.loss_P for t in fitted])
    lowest = loss_P.min()
    line = linregress(np.log(S_P), np.log(loss_P - lowest + 0.01))

    def misfit(x: np.ndarray) -> float:
        residual_P = np.log(loss_P) - np.log(x[0] + x[1] * S_P ** -x[2] - x[3] * drop_P)
        return float(scipy.special.huber(DELTA, residual_P).sum())

    grid = itertools.product(
        np.linspace(lowest - 0.2, lowest + 0.2, 5),
        np.exp(line.intercept) + np.linspace(-0.1, 0.1, 3),
        -line.slope + np.linspace(-0.1, 0.1, 3),
        np.linspace(100, 1000, 3),
    )
    options = {"maxiter": 100000, "ftol": 1e-9, "gtol": 1e-6, "eps": 1e-8}
    with np.errstate(all="ignore"):
        found = [minimize(misfit, x, method="L-BFGS-B", bounds=[(0, np.inf)] * 4, options=options) for x in grid]
    return min(found, key=lambda r: r.fun).x


OPTIMIZER = optax.multi_transform(
    {"scale": optax.adamw(5e-2, weight_decay=0.01), "exponent": optax.adamw(5e-3, weight_decay=0.01)},
    {"scale": "scale", "exponent": "exponent"},
)


def refined(prepared: dict[str, np.ndarray], loss_P: np.ndarray, start: np.ndarray) -> dict[str, np.ndarray]:
    """AdamW from there and C = 1, beta = gamma = 1/2: scale L_inf, A, B, C; exponent alpha, beta, gamma.

    Stopped after 200 steps, or 20 without a lower objective. As in the authors' program, what is kept are the
    parameters one step after the lowest objective.
    """
    with jax.enable_x64(True):
        L_inf, A, alpha, B = start
        theta = {"scale": jnp.array([L_inf, A, B, 1.0]), "exponent": jnp.array([alpha, 0.5, 0.5])}
        state, kept, lowest, idle = OPTIMIZER.init(theta), theta, np.inf, 0
        for k in range(200):
            theta, state, value, norm = adamw_step(theta, state, prepared, np.log(loss_P))
            idle = 0 if value < lowest else idle + 1
            if (k > 20 and idle >= 20) or norm < 1e-5:
                break
            if value < lowest:
                lowest, kept = float(value), theta
        return {name: np.asarray(x) for name, x in kept.items()}


@jax.jit
def adamw_step(theta: Any, state: Any, prepared: dict[str, jax.Array], log_loss_P: jax.Array) -> tuple[Any, ...]:
    """Parameters and state after it; objective and norm of the gradient before it."""

    def total(theta: dict[str, jax.Array]) -> jax.Array:
        alpha, beta, gamma = theta["exponent"]
        shape_J = jnp.stack([alpha, theta["scale"][3], beta, gamma])
        predicted_P = multipower.columns(shape_J, prepared) @ theta["scale"][:3]
        return optax.losses.huber_loss(jnp.log(predicted_P), log_loss_P, delta=DELTA).sum()

    value, slope = jax.value_and_grad(total)(theta)
    updates, state = OPTIMIZER.update(slope, state, theta)
    return optax.apply_updates(theta, updates), state, value, optax.global_norm(slope)


def machine() -> str:
    versions = f"jax {jax.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, optax {optax.__version__}"
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "all")
    return f"{processor()}, {threads} for BLAS; {versions}"


if __name__ == "__main__":
    main()
