"""Fields of a config that came later than runs that are stored, and what they are in those."""

from typing import Any

__all__ = ["NEUTRAL"]

# At these values they change nothing: a run made before they were there keeps its id, and its place in a plan.
NEUTRAL: dict[str, Any] = {
    "lora.rank": 0,
    "lora.alpha": 32.0,
    "lora.targets": "attention/(qkv|q|v)$",
    "optimizer.rates": "",
}
