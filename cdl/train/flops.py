"""How much a training step computes, and how much of what the devices could: model FLOPs, MFU, speed.

Model FLOPs (Chowdhery et al., 2022, appendix B) are those of the model's matrix products and convolutions, a multiply
and an add being two: once forward and twice as many backward. What is computed again to save memory, element-wise
work and the optimizer do not count, so MFU compares ways to train one model. Attention counts all S x S scores, also
those that a causal mask throws away (they are half), and convolutions also count the padding, as published figures do.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, primitives
from jax.interpreters.partial_eval import dce_jaxpr

from cdl.models.build import Model

__all__ = ["Speed", "StepCost", "mfu", "peak_flops", "step_flops"]

# jax.Device.device_kind begins with: FLOP/s of dense bfloat16 products that are summed in float32. Longer names first.
# NVIDIA: product data sheets ("with sparsity" halved), for GeForce appendix A of the Ampere and Ada whitepapers; V100
# and T4 have float16 alone. Google: docs.cloud.google.com/tpu/docs, system architecture; a device of v2 and v3 is one
# of the two cores of a chip.
_PEAKS = {
    "NVIDIA GB200": 2.5e15,
    "NVIDIA B200": 2.25e15,
    "NVIDIA GH200": 9.89e14,
    "NVIDIA H200 NVL": 8.35e14,
    "NVIDIA H200": 9.89e14,
    "NVIDIA H100 NVL": 8.35e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H100": 9.89e14,
    "NVIDIA A100": 3.12e14,
    "NVIDIA L40S": 3.62e14,
    "NVIDIA L40": 1.81e14,
    "NVIDIA L4": 1.21e14,
    "NVIDIA A10G": 7.0e13,
    "NVIDIA A10": 1.25e14,
    "NVIDIA GeForce RTX 4090 D": 1.47e14,
    "NVIDIA GeForce RTX 4090": 1.65e14,
    "NVIDIA GeForce RTX 3090 Ti": 8.0e13,
    "NVIDIA GeForce RTX 3090": 7.1e13,
    "Tesla V100-PCIE": 1.12e14,
    "Tesla V100-SXM2": 1.25e14,
    "Tesla T4": 6.5e13,
    "TPU v6": 9.18e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5e": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v4 lite": 1.38e14,
    "TPU v4": 2.75e14,
    "TPU v3": 1.23e14 / 2,
    "TPU v2": 4.6e13 / 2,
}

_KERNELS = ("ffi_call", "pallas_call", "dot_product_attention")  # beginnings of names; what they compute is not seen


class StepCost(NamedTuple):
    """What one update of a run takes.

    unit: "tokens" or "images". amount: how many of these it predicts. flops: model FLOPs. peak: FLOP/s of the devices,
    or the share of one, that the run has to itself; None where that is not known.
    """

    unit: str
    amount: int
    flops: int
    peak: float | None


def step_flops(model: Model, batch: Any) -> int:
    """Model FLOPs of one update on a batch: three times the forward pass; where parameters are frozen, whose gradients
    are not made, the products of the pass forward and backward as they come.

    Args:
      model: built with ``Compute(attention="xla")``; a fused kernel does not show what it computes, and with frozen
        parameters what is computed again (`Compute.remat`) would count.
      batch: as `Model.loss` takes it, or its shapes (`jax.ShapeDtypeStruct`). Nothing is computed.

    Raises:
      ValueError: products in a loop whose length is not known, or a kernel.
    """
    params, stats = jax.eval_shape(model.init, 0)

    def forward(params: Any, stats: Any, batch: Any, frozen: Any) -> Any:
        return model.over(frozen).loss(params, stats, batch)

    if model.frozen is None:
        return 3 * _products(jax.make_jaxpr(forward)(params, stats, batch, None).jaxpr)
    both = jax.make_jaxpr(jax.grad(lambda *x: forward(*x)[0].loss))(params, stats, batch, model.frozen).jaxpr
    # A rule of custom derivatives gives all of them, needed or not, and XLA leaves out what is not.
    needed, _ = dce_jaxpr(both, [True] * len(both.outvars))
    return _products(needed)


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """FLOP/s that a device has at most, None where it is not known.

    None for float32 too: what can be had there depends on whether products are in TF32, bfloat16 or float32, which XLA
    decides by flags and device.

    Args:
      device_kind: as `jax.Device.device_kind` says.
      dtype: of the computation.

    >>> peak_flops("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    """
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in _PEAKS.items() if device_kind.startswith(name)), None)


def mfu(
    flops_per_step: float, seconds_per_step: float, devices: float, device_kind: str, dtype: str = "bfloat16"
) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that went into the model; None where no peak is known.

    >>> mfu(156e12, 1.0, devices=2, device_kind="NVIDIA A100-SXM4-80GB")
    0.25
    """
    peak = peak_flops(device_kind, dtype)
    return None if peak is None else flops_per_step / (seconds_per_step * devices * peak)


class Speed:
    """Steps taken by one or several runs over about the last minute.

    Args:
      clock: seconds, as `time.monotonic`.
    """

    SECONDS = 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._done = (0.0, 0.0, 0.0)  # amount, seconds at the peak, seconds waited
        self._seen: deque[tuple[float, tuple[float, float, float]]] = deque()  # (time, done by then)

    def add(self, steps: int, cost: StepCost, waited: float = 0.0) -> None:
        """So many steps of a run were taken since the call before. `waited`: seconds of these without a batch."""
        amount, at_peak, waited_before = self._done
        at_peak += steps * cost.flops / cost.peak if cost.peak else 0.0
        self._done = (amount + steps * cost.amount, at_peak, waited_before + waited)

    def read(self) -> None:
        """Now is a moment up to which all has been added."""
        now = self._clock()
        if len(self._seen) > 1 and now - self._seen[-2][0] < 0.2:
            self._seen.pop()  # several hosts call after every step
        self._seen.append((now, self._done))
        while len(self._seen) > 1 and self._seen[1][0] <= now - self.SECONDS:
            self._seen.popleft()

    @property
    def _seconds(self) -> float:
        return self._seen[-1][0] - self._seen[0][0] if self._seen else 0.0

    def _per_second(self, i: int) -> float | None:
        return (self._seen[-1][1][i] - self._seen[0][1][i]) / self._seconds if self._seconds > 0 else None

    @property
    def amount(self) -> float | None:
        """Tokens or images a second; None before there is a time to divide by."""
        return self._per_second(0)

    @property
    def mfu(self) -> float | None:
        """The sum over the runs; None where no peak is known."""
        return self._per_second(1) or None

    @property
    def waited(self) -> float | None:
        """Share of the time in which devices waited for data."""
        share = self._per_second(2)
        return None if share is None else min(share, 1.0)


def _products(jaxpr: Jaxpr) -> int:
    """FLOPs of the matrix products and convolutions."""
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn: Any) -> int:
    # jax.experimental.roofline counts a scan's body once and leaves conditionals out (jax 0.10).
    name, params = eqn.primitive.name, eqn.params
    if eqn.primitive is primitives.dot_general_p:
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if eqn.primitive is primitives.conv_general_dilated_p:
        kernel = eqn.invars[1].aval.shape
        out_features, *rest = params["dimension_numbers"].rhs_spec
        del out_features
        return 2 * eqn.outvars[0].aval.size * math.prod(kernel[i] for i in rest)
    if name.startswith(_KERNELS):
        raise ValueError(f"FLOPs of {name} are not known; build the model with Compute(attention='xla')")
    inner = [_products(jaxpr) for jaxpr in _inside(params)]
    if eqn.primitive is primitives.scan_p:
        return params["length"] * sum(inner)
    if eqn.primitive is primitives.while_p and sum(inner):
        raise ValueError("FLOPs of products in a while loop are not known; use jax.lax.scan")
    if eqn.primitive is primitives.cond_p:
        return max(inner)
    if name == "shard_map":  # its body is what one device does
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    return sum(inner)  # jit, checkpoint, custom derivatives


def _inside(params: Any) -> list[Jaxpr]:
    """The programs among an equation's parameters. Rules of custom derivatives are functions, and not among them."""
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(x, "jaxpr", x) for x in leaves if hasattr(x, "eqns")]
