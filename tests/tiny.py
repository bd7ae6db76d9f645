"""A sweep of seconds: GPT-2 of three thousand parameters, six runs."""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.models import gpt2
from cdl.sweep.grid import product


def get_config() -> ConfigDict:
    c = cdl.config.base()
    c.model = cdl.config.section("model", "gpt2", **gpt2.arguments("3k", context=16))
    c.data.batch_size = 4
    c.data.seq_len = 16
    c.eval.times = 3
    c.eval.size = 512
    return c


def sweep() -> list[dict[str, Any]]:
    return product(eta_ref=[0.5, 2.0], T=[40, 60, 90, 130])
