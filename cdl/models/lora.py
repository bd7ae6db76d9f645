"""Low-rank adaptation (Hu et al., 2022): y = x W + b + (alpha / rank) x A B, with W and b frozen, A and B trained.

Any linear layers of a model can be adapted, chosen by their paths. A is drawn as in `peft`, uniformly between
-1/sqrt(n_in) and 1/sqrt(n_in), and B is 0, so that training begins at the model that is adapted.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from cdl.errors import UserError

__all__ = ["LoRA", "LoRALinear", "adapt", "lora_arguments", "merge"]


class LoRA(NamedTuple):
    """The config section `lora`.

    rank: of A B; 0 trains all weights and adapts nothing. alpha: A B counts alpha / rank times. targets: linear layers
      whose path matches (`re.search`) are adapted, such as "attention/" or "qkv$|mlp/up$".
    """

    rank: int = 0
    alpha: float = 32.0
    targets: str = "attention/(qkv|q|v)$"


def lora_arguments() -> dict[str, Any]:
    """The section with its defaults; rank 4 and alpha 32 are those of Hu et al. for GPT-2 on E2E."""
    return LoRA()._asdict()


class LoRALinear(nnx.Linear):
    """x [..., n_in] -> [..., n_out]: a linear layer, or a stack of them, with adapters beside its weights.

    Args:
      linear: whose weights it takes over; kernel [..., n_in, n_out], the axes in front a stack of layers.
      rank, alpha: see `LoRA`.
    """

    def __init__(self, linear: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        n_in, n_out = linear.in_features, linear.out_features
        super().__init__(n_in, n_out, use_bias=linear.bias is not None, dtype=linear.dtype, rngs=rngs)
        self.kernel, self.bias = linear.kernel, linear.bias
        stack = linear.kernel.shape[:-2]
        self.scale = alpha / rank
        limit = n_in**-0.5
        self.lora_a = nnx.LoRAParam(
            jax.random.uniform(rngs.params(), (*stack, n_in, rank), minval=-limit, maxval=limit)
        )
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, n_out)))

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        dtype = self.dtype or x.dtype
        a, b = self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)
        return super().__call__(x, out_sharding) + self.scale * ((x.astype(dtype) @ a) @ b)


def adapt(model: nnx.Module, lora: LoRA, rngs: nnx.Rngs) -> None:
    """Puts a `LoRALinear` in the place of each linear layer that `lora.targets` names.

    Raises:
      UserError: it names none, or rank, alpha or the pattern are none.
    """
    if lora.rank < 1 or not lora.alpha > 0:
        raise UserError(f"lora.rank={lora.rank} and lora.alpha={lora.alpha} must be positive")
    try:
        pattern = re.compile(lora.targets)
    except re.error as e:
        raise UserError(
            f"lora.targets={lora.targets!r} is no regular expression ({e}); give one such as mlp/up$"
        ) from e
    layers = {"/".join(map(str, path)): (path, x) for path, x in nnx.iter_modules(model) if isinstance(x, nnx.Linear)}
    chosen = [name for name in layers if pattern.search(name)]
    if not chosen:
        raise UserError(f"lora.targets={lora.targets!r} matches no linear layer; there are {', '.join(layers)}")
    for name in chosen:
        (*parents, last), linear = layers[name]
        parent: Any = model
        for key in parents:
            parent = parent[key] if isinstance(key, int) else getattr(parent, str(key))
        adapted = LoRALinear(linear, lora.rank, lora.alpha, rngs=rngs)
        if isinstance(last, int):
            parent[last] = adapted
        else:
            setattr(parent, str(last), adapted)


def merge(frozen: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
    """The parameters of the model without adapters that computes the same: kernels become W + (alpha / rank) A B.

    Args:
      frozen, adapters: trees of arrays, as of `cdl.models.build.Model.frozen` and `Model.init`.
    """
    merged: dict[Any, Any] = flatten_dict(dict(frozen))
    low_rank: dict[Any, Any] = flatten_dict(dict(adapters))
    for path, a in low_rank.items():
        if path[-1] == "lora_a":
            kernel = (*path[:-1], "kernel")
            merged[kernel] = merged[kernel] + lora.alpha / lora.rank * (a @ low_rank[*path[:-1], "lora_b"])
    return unflatten_dict(merged)
