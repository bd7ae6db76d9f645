"""Figure 13: fine-tuning all weights, or low-rank adapters: final loss against 1/sqrt(T).

    python experiments/fig13_fine_tuning.py [--scale=laptop|gpu|paper]

`laptop` and `gpu`: GPT-2 of two sizes, trained here on the source of Python's standard library, then fine-tuned to say
the docstring of a function from its signature. `paper`: GPT-2 small, medium and large with published weights, on E2E
(Appendix D.2; configs/e2e.py says what has to be there). Adapters of rank 4, AdamW, linear decay, batch size 8. See
experiments/paper.py for options.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper import Claim, Lab, Outcome, Sweep, config, main, span

import cdl.config
from cdl.laws.horizon import fit_line
from cdl.models import gpt2
from cdl.plots import finish, palette
from cdl.sweep.grid import product

GOOD = 0.95
SIZES = {"laptop": ["30k", "120k"], "gpu": ["11M", "29M"], "paper": ["124M", "355M", "774M"]}
HORIZONS = {"laptop": [50, 100, 200, 400, 700], "gpu": [250, 500, 1000, 2000, 4000]}
ETA_REF = {"full": 0.02, "lora": 0.1}  # the paper's are for larger models


def pretraining(scale: str) -> list[Sweep]:
    """The models that are fine-tuned, where none are published."""
    made = []
    for size in SIZES[scale] if scale != "paper" else []:
        c = config("demo.py")[0]
        c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size, context=256))
        c.data.batch_size, c.data.seq_len = (8, 256) if scale == "laptop" else (64, 256)
        c.T, c.eta_ref = (600, 1.0) if scale == "laptop" else (4000, 4.0)
        made.append(Sweep(f"pretrained-{size}", c, [{}], keep=True))
    return made


def fine_tuning(scale: str, size: str, weights: str, which: str) -> Sweep:
    """Horizons of one size, `which` is "full" or "lora". weights: to start from, but for those of configs/e2e.py."""
    c, grid = config(f"e2e.py:{which}-{size if scale == 'paper' else '124M'}")
    if scale != "paper":
        c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size, context=256))
        c.data = cdl.config.section("data", "pairs", batch_size=8)
        c.init, c.eta_ref = weights, ETA_REF[which]
        c.eval.times, c.eval.size = 1, 16384
        grid = product(T=HORIZONS[scale])
    return Sweep(f"{which}-{size}", c, grid)


def experiment(lab: Lab) -> Outcome:
    """Train, fine-tune, fit and draw."""
    weights = dict.fromkeys(SIZES[lab.scale], "")
    for size, sweep in zip(SIZES[lab.scale], pretraining(lab.scale), strict=False):
        weights[size] = str(lab.train(sweep).weights[0])
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    colors, numbers, claims = palette(SIZES[lab.scale]), dict[str, Any](), []
    for ax, (which, title) in zip(figure.subplots(1, 2), {"full": "all weights", "lora": "LoRA"}.items(), strict=True):
        lost = 0
        for size in SIZES[lab.scale]:
            table = lab.train(fine_tuning(lab.scale, size, weights[size], which)).table
            runs = table[table["status"] == "done"]
            lost += len(table) - len(runs)
            line = fit_line(runs["T"].to_numpy(), runs["loss"].to_numpy())
            numbers[f"{which} {size}"] = vars(line)
            x = np.linspace(0, runs["T"].min() ** -0.5, 50)
            ax.plot(x, line.L_inf + line.Q * x, lw=1.2, color=colors[size])
            ax.plot(
                runs["T"] ** -0.5, runs["loss"], "o", ms=5, color=colors[size], label=f"{size}, $R^2$ = {line.r2:.4f}"
            )
        ax.set(xlabel="$1/\\sqrt{T}$", ylabel="held-out loss of answers", xlim=(0, None))
        ax.set_title(f"Fine-tuning {title}", loc="left", fontsize=10)
        finish(ax)
        r2 = [numbers[f"{which} {size}"]["r2"] for size in SIZES[lab.scale]]
        said = f"R2 {span(r2, '.4f')} for {' and '.join(SIZES[lab.scale])}" + (f", {lost} diverged" if lost else "")
        good = min(r2) >= GOOD and not lost
        claims.append(Claim(f"Fine-tuning {title}: the loss is a line in 1/sqrt(T)", said, good))
    return Outcome(figure, numbers, claims)


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
