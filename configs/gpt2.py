"""GPT-2 at the paper's sizes (section 5): `--config=configs/gpt2.py:124M`, with your own tokens by `data.path=...`.

Meant for accelerators. The paper's batches are 512 x 1024 tokens for 124M and 64 x 1024 for the larger ones; a run here
holds its whole batch on one device in float32, without accumulation, so the default is 16.
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.models import gpt2
from cdl.sweep.grid import product


def get_config(size: str = "124M") -> ConfigDict:
    """One run of GPT-2 of a size in `cdl.models.gpt2.SIZES`, on GPT-2 tokens."""
    c = cdl.config.base()
    c.T = 5000
    c.eta_ref = 10.0  # the paper's best for Muon-NSGD; for AdamW 0.3
    c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size, vocab_size=50257, context=1024))
    c.data.batch_size = 16
    c.data.seq_len = 1024
    c.eval.tokens = 1 << 20
    return c


def sweep() -> list[dict[str, Any]]:
    """Six rates from 0.01 to 30 as in the paper, horizons from 100 updates to 500 thousand."""
    return product(
        eta_ref=[0.01, 0.1, 0.3, 1.0, 10.0, 30.0],
        T=[100, 300, 1000, 2500, 5000, 10_000, 30_000, 100_000, 250_000, 500_000],
    )
