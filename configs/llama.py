"""Llama on text: the shapes of SmolLM2, which section 5.4 of the paper has as its language model, and small ones.

    cdl train --config=configs/llama.py:360M --dry-run --devices=8
    cdl train --config=configs/llama.py:360M init=folder/of/smollm2 data.path=my/tokens
    cdl sweep --config=configs/llama.py --out=runs/llama

`120k`, which is the default, and any other small size of `cdl.models.llama.SIZES` are trained on the bytes of Python's
standard library, which are there. `135M` and `360M` have SmolLM2's vocabulary, and data.path has to have its tokens: a
folder as `cdl data` makes it with SmolLM2's tokenizer. The paper does not train Llama from scratch; rates and schedule
are those of its GPT-2 (section 5.1).

The large ones are for 8 devices of 80 GB. With fewer, raise compute.microbatches by as much as the devices are fewer;
it changes rounding alone.
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.errors import unknown
from cdl.models import llama
from cdl.sweep.grid import product

VOCABULARY, CONTEXT = 49152, 8192  # of SmolLM2
LARGE = ("135M", "360M")


def get_config(arg: str = "120k") -> ConfigDict:
    """One run of a size."""
    if arg not in llama.SIZES:
        raise unknown("argument of configs/llama.py", arg, llama.SIZES)
    c = cdl.config.base()
    c.T = 400
    c.eta_ref = 1.0
    c.data.batch_size = 16
    c.optimizer = cdl.config.section("optimizer", "muon_nsgd", momentum=0.95, weight_decay=0.01)
    c.schedule = cdl.config.section("schedule", "cosine", warmup=0.02, final=0.0)
    if arg not in LARGE:
        c.model = cdl.config.section("model", "llama", **llama.arguments(arg))
        return c
    c.T = 5000
    c.eta_ref = 10.0
    c.model = cdl.config.section("model", "llama", **llama.arguments(arg, VOCABULARY, CONTEXT, dtype="bfloat16"))
    c.data.path = "data/smollm2"
    c.data.batch_size = 512
    c.data.seq_len = 1024
    c.eval.size = 1 << 20
    c.mesh.data = -1
    c.compute.microbatches = 8
    return c


def sweep(arg: str = "120k") -> list[dict[str, Any]]:
    """Rates around the best of GPT-2, and horizons."""
    if arg in LARGE:
        return product(eta_ref=[1.0, 3.0, 10.0, 30.0], T=[1000, 2500, 5000, 10_000, 30_000])
    return product(eta_ref=[0.5, 1.0, 2.0], T=[100, 200, 400, 800])
