"""GPT-2 at the three scales, as Figures 4 to 10 and Table 7 train it."""

from typing import Any

from ml_collections import ConfigDict
from paper import config

import cdl.config
from cdl.models import gpt2
from cdl.sweep.grid import Grid, product

WARMUP = 0.02  # Appendix B: "2% of the total steps"

# Appendix B, "Figure 4 and Figure 5": "linear decay with warm-up, cosine decay with warm-up, cyclic and WSD".
FOUR_SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"schedule.name": "linear", "schedule.warmup": WARMUP},
    "cosine": {"schedule.name": "cosine", "schedule.warmup": WARMUP},
    "cyclic": {"schedule.name": "cyclic", "schedule.warmup": 0.0, "schedule.cycles": 5},
    "wsd": {"schedule.name": "wsd", "schedule.warmup": WARMUP, "schedule.decay": 0.1},
}


def one_run(scale: str, optimizer: str, size: str = "") -> ConfigDict:
    """A config; the size is that of the scale unless one of `cdl.models.gpt2.SIZES` is named.

    laptop: the demo. gpu: 29M parameters in bfloat16 on the bytes of the standard library, 64 sequences of 512. paper:
    section 5.1.
    """
    if scale == "paper":
        return config(f"gpt2.py:{size or '0.1b'}-{'adamw' if optimizer == 'adamw' else 'muon'}")[0]
    c = config("demo.py")[0]
    if optimizer == "adamw":
        c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.95, weight_decay=0.01)  # section 5.1
    if scale == "gpu":
        c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size or "29M", 256, 512, "bfloat16"))
        c.data.batch_size, c.data.seq_len, c.eval.size = 64, 512, 1 << 18
    elif size:
        c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size))
    return c


# Muon-NSGD at the scales that train all sizes: rates x horizons of each. The first is that of Figure 9.
GRIDS: dict[str, dict[str, Grid]] = {
    "laptop": {
        "120k": product(eta_ref=[0.5, 1.0, 2.0, 4.0], T=[100, 200, 400, 700, 1000, 1600]),
        "30k": product(eta_ref=[0.5, 1.0, 2.0, 4.0], T=[100, 200, 400, 700, 1000]),
        "900k": product(eta_ref=[0.5, 1.0, 2.0], T=[100, 200, 300, 400, 600]),
    },
    "gpu": {
        "29M": product(eta_ref=[1.0, 2.0, 4.0, 8.0], T=[500, 1000, 2000, 4000, 8000, 16_000]),
        "11M": product(eta_ref=[1.0, 2.0, 4.0, 8.0], T=[500, 1000, 2000, 4000, 8000]),
        "124M": product(eta_ref=[2.0, 4.0], T=[500, 1000, 2000, 4000]),
    },
}
