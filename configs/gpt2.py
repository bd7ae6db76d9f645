"""GPT-2 on text, as the paper trains it (section 5.1 and Appendix B, "Section 5").

    cdl train --config=configs/gpt2.py:0.1b-muon --dry-run --devices=8
    cdl sweep --config=configs/gpt2.py:0.1b-adamw --out=runs/adamw data.path=my/tokens

`0.1b-adamw`, `0.1b-muon`, `1b-muon` and `7b-muon` are the paper's four settings, on GPT-2 tokens of OpenWebText in
data/openwebtext: train.bin and val.bin as `cdl data` and nanoGPT make them. Any size of `cdl.models.gpt2.SIZES`
(`124M`, `355M`, ..) is the same setting with Muon-NSGD, on the bytes of Python's standard library, which are there.

For 8 devices of 80 GB. With fewer, raise compute.microbatches by as much as the devices are fewer; it changes rounding
alone.
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.errors import unknown
from cdl.models import gpt2
from cdl.sweep.grid import product

# argument: size, optimizer (section 5.1: "4 settings").
PAPER = {
    "0.1b-adamw": ("124M", "adamw"),
    "0.1b-muon": ("124M", "muon_nsgd"),
    "1b-muon": ("1B", "muon_nsgd"),
    "7b-muon": ("7B", "muon_nsgd"),
}
VOCABULARY = 50257
# Section 5.1 has "6 eta_ref from 0.01 to 30.0" for each setting and 5.2 the best, 0.3 for AdamW and 10 for Muon-NSGD.
# Which six is not said; these are a factor of about 3 apart, have the best inside, and span 0.01 to 30 together.
RATES = {"adamw": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0], "muon_nsgd": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]}
BEST = {"adamw": 0.3, "muon_nsgd": 10.0}
# Section 5.1: "10 training horizons from 100 to 500k iterations", which is not said either.
HORIZONS = [100, 300, 1000, 2500, 5000, 10_000, 30_000, 100_000, 250_000, 500_000]


def get_config(arg: str = "124M") -> ConfigDict:
    """One run: one of the paper's settings, or a size."""
    if arg not in PAPER and arg not in gpt2.SIZES:
        raise unknown("argument of configs/gpt2.py", arg, [*PAPER, *gpt2.SIZES])
    size, optimizer = PAPER.get(arg, (arg, "muon_nsgd"))
    small = size not in ("355M", "774M", "1B", "1.5B", "7B")
    c = cdl.config.base()
    c.seed = 1337  # Appendix D.3
    c.T = 5000
    c.eta_ref = BEST[optimizer]
    c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size, VOCABULARY, context=1024, dtype="bfloat16"))
    c.data.path = "data/openwebtext" if arg in PAPER else "stdlib"
    c.data.batch_size = 512 if small else 64  # Appendix B: "0.1B models use batch size 512. 1B/7B models use .. 64"
    c.data.seq_len = 1024
    if optimizer == "adamw":
        c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.95)  # Appendix B
    else:
        c.optimizer = cdl.config.section("optimizer", "muon_nsgd", momentum=0.95)  # Appendix B
    c.optimizer.weight_decay = 0.01  # section 5.1, as the next three
    c.optimizer.clip_norm = 0.0
    c.schedule = cdl.config.section("schedule", "cosine", warmup=0.02, final=0.0)
    c.eval.size = 1 << 20
    if small:
        c.mesh.data = -1
        c.compute.microbatches = 4
    else:
        c.mesh.fsdp = -1
        c.compute.remat = "dots"
    return c


def sweep(arg: str = "124M") -> list[dict[str, Any]]:
    """Rates and horizons as in the paper."""
    _, optimizer = PAPER.get(arg, (arg, "muon_nsgd"))
    return product(eta_ref=RATES[optimizer], T=HORIZONS)
