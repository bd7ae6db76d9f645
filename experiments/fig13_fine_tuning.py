"""Figure 13: fine-tuning all weights, or low-rank adapters: final loss against 1/sqrt(T).

    python experiments/fig13_fine_tuning.py [--scale=laptop|gpu|paper]

`laptop` and `gpu`: GPT-2 of two sizes, trained here on the source of Python's standard library, then fine-tuned to say
the docstring of a function from its signature. `paper`: GPT-2 small, medium and large with published weights in
weights/gpt2, weights/gpt2-medium and weights/gpt2-large, on E2E in data/e2e (Appendix D.2). Adapters of rank 4, AdamW,
linear decay, batch size 8. See experiments/paper.py for options.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from paper import Claim, Lab, Outcome, Sweep, config, main, span

import cdl.config
from cdl.laws.horizon import fit_line
from cdl.models import gpt2
from cdl.plots import finish, palette
from cdl.sweep.grid import product

GOOD = 0.95
SIZES = {"laptop": ["30k", "120k"], "gpu": ["11M", "29M"], "paper": ["124M", "355M", "774M"]}
WEIGHTS = {"124M": "weights/gpt2", "355M": "weights/gpt2-medium", "774M": "weights/gpt2-large"}
HORIZONS = {"laptop": [50, 100, 200, 400, 700], "gpu": [250, 500, 1000, 2000, 4000]}
PAPER_HORIZONS = [500, 1000, 2000, 5000, 10_000, 20_000]  # not said; an epoch of E2E is 5,258 updates
# Appendix D.2; models of the other scales are smaller and want larger rates.
ETA_REF = {"paper": {"full": 0.00005, "lora": 0.0005}}
OWN_ETA_REF = {"full": 0.02, "lora": 0.1}


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
    """Horizons of one size, from these weights; `which` is "full" or "lora"."""
    c: ConfigDict = cdl.config.base()
    c.init = weights
    vocabulary, context = (50257, 1024) if scale == "paper" else (256, 256)
    c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size, vocabulary, context))
    c.data = cdl.config.section("data", "pairs", batch_size=8)
    if scale == "paper":
        tokenizer = f"{weights}/vocab.json,{weights}/merges.txt"
        c.data = cdl.config.section("data", "pairs", batch_size=8, path="data/e2e", tokenizer=tokenizer)
    c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.999, weight_decay=0.01)
    c.schedule = cdl.config.section("schedule", "linear", warmup=0.0)
    c.eta_ref = ETA_REF.get(scale, OWN_ETA_REF)[which]
    c.eval.times, c.eval.size = 1, 16384
    if which == "lora":
        c.lora.rank = 4
    return Sweep(f"{which}-{size}", c, product(T=HORIZONS.get(scale, PAPER_HORIZONS)))


def experiment(lab: Lab) -> Outcome:
    """Train, fine-tune, fit and draw."""
    weights = dict(WEIGHTS)
    for size, sweep in zip(SIZES[lab.scale], pretraining(lab.scale), strict=False):
        weights[size] = str(lab.train(sweep).weights[0])
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    colors, numbers, claims = palette(SIZES[lab.scale]), dict[str, Any](), []
    for ax, (which, title) in zip(figure.subplots(1, 2), {"full": "all weights", "lora": "LoRA"}.items(), strict=True):
        for size in SIZES[lab.scale]:
            table = lab.train(fine_tuning(lab.scale, size, weights[size], which)).table
            runs = table[table["status"] == "done"]
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
        said = f"R2 {span(r2, '.4f')} for {' and '.join(SIZES[lab.scale])}"
        claims.append(Claim(f"Fine-tuning {title}: the loss is a line in 1/sqrt(T)", said, min(r2) >= GOOD))
    return Outcome(figure, numbers, claims)


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
