"""The config section `compute`: how a run is computed, which changes nothing but rounding, memory and time."""

from typing import Any, NamedTuple

__all__ = ["Compute", "compute_arguments"]


class Compute(NamedTuple):
    """The fields of the section.

    remat: what a block of a model keeps for the backward pass: "none" (what matrix products and attention gave), "dots"
      (only what dense layers gave) or "full" (only what enters a block).
    attention: "xla", "blocks" (without most of the scores that a causal mask throws away), "cudnn" (fused, NVIDIA GPUs,
      bfloat16) or "auto": the fused one where it works, "blocks" on CPUs.
    microbatches: parts that a batch is computed in, one after the other.
    workers: processes that read data; 0 reads in threads.
    """

    remat: str = "none"
    attention: str = "auto"
    microbatches: int = 1
    workers: int = 0


def compute_arguments() -> dict[str, Any]:
    """The section with its defaults."""
    return Compute()._asdict()
