"""Fine-tuning GPT-2 on E2E, all weights or low-rank adapters: the paper's Figure 13 (Appendix D.2).

    cdl sweep --config=configs/e2e.py:lora --out=runs/e2e-lora
    cdl sweep --config=configs/e2e.py:full-355M --out=runs/e2e-full data.path=my/e2e

`lora` and `full`, of 124M parameters, or of another size as `lora-355M` or `full-774M`. Published weights have to be in
weights/gpt2, weights/gpt2-medium or weights/gpt2-large, with vocab.json and merges.txt beside them, and E2E's
trainset.csv and devset.csv in data/e2e.
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.errors import unknown
from cdl.models import gpt2
from cdl.sweep.grid import product

WEIGHTS = {"124M": "weights/gpt2", "355M": "weights/gpt2-medium", "774M": "weights/gpt2-large"}
ETA_REF = {"full": 0.00005, "lora": 0.0005}  # Appendix D.2
# Not said; an epoch of E2E is 5,258 updates.
HORIZONS = [500, 1000, 2000, 5000, 10_000, 20_000]


def get_config(arg: str = "lora") -> ConfigDict:
    """One run: `lora` or `full`, with a size behind a dash or 124M."""
    which, _, size = arg.partition("-")
    size = size or "124M"
    if which not in ETA_REF or size not in WEIGHTS:
        raise unknown("argument of configs/e2e.py", arg, [f"{x}-{n}" for x in ETA_REF for n in WEIGHTS])
    c = cdl.config.base()
    c.T = 5000
    c.eta_ref = ETA_REF[which]
    c.init = WEIGHTS[size]
    c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size, 50257, context=1024))
    tokenizer = f"{c.init}/vocab.json,{c.init}/merges.txt"
    c.data = cdl.config.section("data", "pairs", path="data/e2e", batch_size=8, tokenizer=tokenizer)
    c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.999, weight_decay=0.01)
    c.schedule = cdl.config.section("schedule", "linear", warmup=0.0)
    if which == "lora":
        c.lora.rank = 4
    return c


def sweep(arg: str = "lora") -> list[dict[str, Any]]:
    """Horizons at the one rate of Figure 13."""
    del arg  # the same for all
    return product(T=HORIZONS)
