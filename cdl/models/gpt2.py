"""GPT-2 (Radford et al., 2019) in Flax NNX: learned positions, pre-norm blocks, output tied to the embedding.

Dense layers run over [B*S, D]: on CPUs, XLA is then faster than over [B, S, D].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cdl.errors import UserError, unknown

__all__ = ["GPT2", "SIZES", "arguments"]

# name: layers, heads, width. 124M to 1.5B are the published ones; 1B and 7B are sizes of the paper, shapes ours.
SIZES = {
    "3k": (1, 1, 8),
    "30k": (2, 2, 32),
    "120k": (2, 2, 64),
    "900k": (4, 4, 128),
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1B": (24, 14, 1792),
    "1.5B": (48, 25, 1600),
    "7B": (32, 32, 4096),
}


def arguments(size: str = "120k", vocab_size: int = 256, context: int = 64) -> dict[str, Any]:
    """The arguments of `GPT2` for a named size (parameters of the blocks, with the published vocabulary for 124M on).

    >>> arguments("124M", vocab_size=50257, context=1024)
    {'vocab_size': 50257, 'context': 1024, 'n_layer': 12, 'n_head': 12, 'd_model': 768}
    """
    if size not in SIZES:
        raise unknown("size of gpt2", size, SIZES)
    n_layer, n_head, d_model = SIZES[size]
    return dict(vocab_size=vocab_size, context=context, n_layer=n_layer, n_head=n_head, d_model=d_model)


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, d_model: int, n_head: int, residual_std: float, rngs: nnx.Rngs):
        self.n_head = n_head
        self.qkv = _dense(d_model, 3 * d_model, 0.02, rngs)
        self.out = _dense(d_model, d_model, residual_std, rngs)

    def __call__(self, x_BSxD: jax.Array, batch: int) -> jax.Array:
        D = x_BSxD.shape[-1]
        qkv_BxSx3xHxK = self.qkv(x_BSxD).reshape(batch, -1, 3, self.n_head, D // self.n_head)
        q_BxSxHxK, k_BxSxHxK, v_BxSxHxK = jnp.moveaxis(qkv_BxSx3xHxK, 2, 0)
        y_BxSxHxK = jax.nn.dot_product_attention(q_BxSxHxK, k_BxSxHxK, v_BxSxHxK, is_causal=True)
        return self.out(y_BxSxHxK.reshape(-1, D))


class MLP(nnx.Module):
    """Width 4 D, GELU in the tanh form that GPT-2 was trained with."""

    def __init__(self, d_model: int, residual_std: float, rngs: nnx.Rngs):
        self.up = _dense(d_model, 4 * d_model, 0.02, rngs)
        self.down = _dense(4 * d_model, d_model, residual_std, rngs)

    def __call__(self, x_BSxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BSxD), approximate=True))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, d_model: int, n_head: int, residual_std: float, rngs: nnx.Rngs):
        self.norm_1 = nnx.LayerNorm(d_model, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(d_model, n_head, residual_std, rngs)
        self.norm_2 = nnx.LayerNorm(d_model, epsilon=1e-5, rngs=rngs)
        self.mlp = MLP(d_model, residual_std, rngs)

    def __call__(self, x_BSxD: jax.Array, batch: int) -> jax.Array:
        x_BSxD = x_BSxD + self.attention(self.norm_1(x_BSxD), batch)
        return x_BSxD + self.mlp(self.norm_2(x_BSxD))


class GPT2(nnx.Module):
    """tokens_BxS (whole numbers below `vocab_size`, S at most `context`) -> logits_BxSxV.

    Weights are drawn from N(0, 0.02^2), those that write to the residual stream from N(0, 0.02^2 / (2 n_layer)).

    Raises:
      UserError: `d_model` is not a multiple of `n_head`, or a size is not positive.
    """

    def __init__(self, *, vocab_size: int, context: int, n_layer: int, n_head: int, d_model: int, rngs: nnx.Rngs):
        for name, value in dict(
            vocab_size=vocab_size, context=context, n_layer=n_layer, n_head=n_head, d_model=d_model
        ).items():
            if value < 1:
                raise UserError(f"model.{name}={value} must be at least 1")
        if d_model % n_head:
            raise UserError(f"model.d_model={d_model} must be a multiple of model.n_head={n_head}")
        normal = nnx.initializers.normal(0.02)
        self.token = nnx.Embed(vocab_size, d_model, embedding_init=normal, rngs=rngs)
        self.position = nnx.Embed(context, d_model, embedding_init=normal, rngs=rngs)
        residual_std = 0.02 / math.sqrt(2 * n_layer)
        self.blocks = nnx.List([Block(d_model, n_head, residual_std, rngs) for _ in range(n_layer)])
        self.norm = nnx.LayerNorm(d_model, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens_BxS: jax.Array) -> jax.Array:
        B, S = tokens_BxS.shape
        x_BxSxD = self.token(tokens_BxS) + self.position(jnp.arange(S))
        x_BSxD = x_BxSxD.reshape(B * S, -1)
        for block in self.blocks:
            x_BSxD = block(x_BSxD, B)
        return self.token.attend(self.norm(x_BSxD)).reshape(B, S, -1)


def _dense(n_in: int, n_out: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n_in, n_out, kernel_init=nnx.initializers.normal(std), rngs=rngs)
