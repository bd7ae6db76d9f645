"""Which fields of a config are in the id of a run (`cdl.sweep.grid.Point`), and which are not."""

from typing import Any

__all__ = ["HOW", "NEUTRAL", "PATHS"]

HOW = ("compute", "mesh", "checkpoint")  # sections that change rounding, memory and time, and no result but for these
PATHS = ("data.path", "data.tokenizer", "init")  # of files that count by what is in them
# Fields that came later than runs that are stored. At these values they change nothing: a run made before they were
# there keeps its id, and its place in a plan.
NEUTRAL: dict[str, Any] = {
    "lora.rank": 0,
    "lora.alpha": 32.0,
    "lora.targets": "attention/(qkv|q|v)$",
    "optimizer.rates": "",
}
