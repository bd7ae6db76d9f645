"""The demo: GPT-2 of 120 thousand parameters on the source of Python's standard library, eta_ref x T.

Runs on two CPU cores in about three minutes. The paper's setting (section 5) in small: Muon-NSGD, one rate for all
parameters, cosine decay to 0 with 2% warmup, peak rate eta_ref / sqrt(T).
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.sweep.grid import product


def get_config() -> ConfigDict:
    """One run."""
    return cdl.config.base()


def sweep() -> list[dict[str, Any]]:
    """The grid: four rates, a factor of 2 apart, and six horizons, the shortest to show where the law begins."""
    return product(eta_ref=[0.5, 1.0, 2.0, 4.0], T=[100, 200, 400, 700, 1000, 1600])
