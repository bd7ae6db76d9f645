"""Llama (Touvron et al., 2023; Dubey et al., 2024) in Flax NNX: rotary positions, grouped queries, SwiGLU, no bias."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError, unknown
from cdl.models import transformer
from cdl.models.transformer import Stack, attend, check_positive, check_sizes, dense, dtype_of, implementation, scores
from cdl.sharding import BATCH, ShardingRule, constrain, take_rows

__all__ = ["SHARDING", "SIZES", "Llama", "arguments"]

EPSILON = 1e-5

# name: layers, heads of queries, heads of keys and values, width, hidden width. 135M and 360M are SmolLM2's (Ben Allal
# et al., 2025) and say how many parameters there are with its vocabulary of 49152; the others, with one of 256.
SIZES = {
    "3k": (1, 2, 1, 8, 24),
    "30k": (2, 4, 2, 32, 80),
    "120k": (2, 4, 2, 64, 192),
    "800k": (4, 8, 4, 128, 384),
    "10M": (6, 6, 2, 384, 1024),
    "135M": (30, 9, 3, 576, 1536),
    "360M": (32, 15, 5, 960, 2560),
}

SHARDING = (
    *transformer.SHARDING,
    ShardingRule(r"/(q|k|v|gate)/kernel$", ("fsdp", "tensor")),
    ShardingRule(r"(token|output)/embedding$", ("tensor", "fsdp")),
)


def arguments(size: str = "120k", vocab_size: int = 256, context: int = 64, dtype: str = "float32") -> dict[str, Any]:
    """The arguments of `Llama` for a named size, with SmolLM2's rotary positions and tied output.

    >>> smol = arguments("360M", vocab_size=49152, context=8192)
    >>> smol["n_layer"], smol["n_head"], smol["n_kv_head"], smol["d_model"], smol["d_ff"], smol["theta"], smol["tied"]
    (32, 15, 5, 960, 2560, 100000.0, True)
    """
    if size not in SIZES:
        raise unknown("size of llama", size, SIZES)
    n_layer, n_head, n_kv_head, d_model, d_ff = SIZES[size]
    return dict(
        vocab_size=vocab_size,
        context=context,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        d_model=d_model,
        d_ff=d_ff,
        theta=100000.0,
        tied=True,
        dtype=dtype,
    )


class Llama(nnx.Module):
    """tokens_BxS (whole numbers below `vocab_size`, S at most `context`) -> logits_BxSxV, float32.

    `n_kv_head`: heads of keys and values, each for as many heads of queries. `d_ff`: hidden width of the MLP. `theta`:
    base of the rotary frequencies. `tied`: the output reads the table of the tokens; else it has one of its own.

    `embed` and `decode` are its two halves, for sequences that are not of tokens alone.

    Weights are drawn as in `cdl.models.transformer.Block`, tables from N(0, 0.02^2). `dtype` is that of the
    computation; parameters are float32.

    Raises:
      UserError: `d_model` is not a multiple of `n_head`, or `n_head` of `n_kv_head`; heads of an odd size, a size that
        is not positive, or an unknown dtype. `prefix` is that of the fields' names therein.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context: int,
        n_layer: int,
        n_head: int,
        n_kv_head: int,
        d_model: int,
        d_ff: int,
        theta: float,
        tied: bool,
        dtype: str,
        compute: Compute,
        rngs: nnx.Rngs,
        prefix: str = "",
    ):
        check_sizes(d_model, n_head, prefix, n_layer=n_layer, n_kv_head=n_kv_head, d_ff=d_ff)
        check_positive(vocab_size=vocab_size, context=context, **{f"{prefix}theta": theta})
        if n_head % n_kv_head:
            raise UserError(f"model.{prefix}n_head={n_head} must be a multiple of model.{prefix}n_kv_head={n_kv_head}")
        if d_model // n_head % 2:
            raise UserError(
                f"model.{prefix}d_model={d_model} gives each of model.{prefix}n_head={n_head} heads "
                f"{d_model // n_head} dimensions; rotary positions turn pairs of them, so take an even number"
            )
        self.dtype, self.theta, self.head = dtype_of(dtype), theta, d_model // n_head
        normal = nnx.initializers.normal(0.02)
        self.token = nnx.Embed(vocab_size, d_model, embedding_init=normal, rngs=rngs)
        block = partial(
            _Block,
            d_model,
            n_head,
            n_kv_head,
            d_ff,
            out_std=0.02 / math.sqrt(2 * n_layer),
            how=implementation(compute.attention, self.dtype, context, self.head, True, n_head // n_kv_head),
            dtype=self.dtype,
        )
        self.blocks = Stack(block, n_layer, remat=compute.remat, rngs=rngs)
        self.norm = nnx.RMSNorm(d_model, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs)
        if not tied:
            self.output = nnx.Embed(vocab_size, d_model, embedding_init=normal, rngs=rngs)

    def __call__(self, tokens_BxS: jax.Array, train: bool = False) -> jax.Array:
        del train  # nothing differs
        return self.decode(self.embed(tokens_BxS))

    def embed(self, tokens_BxS: jax.Array) -> jax.Array:
        """x_BxSxD, float32."""
        return constrain(take_rows(self._table(self.token), tokens_BxS), BATCH)

    def decode(self, x_BxSxD: jax.Array) -> jax.Array:
        """logits_BxSxV of a sequence, of which each position sees those before it."""
        B, S, D = x_BxSxD.shape
        x_BSxD = constrain(x_BxSxD.astype(self.dtype).reshape(B * S, D), BATCH)
        x_BSxD = self.blocks(x_BSxD, B, _rotations(S, self.head, self.theta))
        table_VxD = self._table(self.output if hasattr(self, "output") else self.token)
        logits_BSxV = scores(self.norm(x_BSxD).astype(self.dtype), table_VxD)
        return constrain(logits_BSxV, BATCH, "tensor").reshape(B, S, -1)

    def _table(self, table: nnx.Embed) -> jax.Array:
        # Put together along D first, as in `GPT2`, and float32 as there.
        return constrain(table.embedding[...], "tensor", None)


class _Attention(nnx.Module):
    """Causal self-attention with grouped queries. Columns of each kernel are ordered (head, K), so that splitting them
    splits heads."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int,
        *,
        out_std: float,
        how: Any,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.how, self.head = how, d_model // n_head
        self.q = dense(d_model, n_head * self.head, 0.02, dtype, rngs, bias=False)
        self.k = dense(d_model, n_kv_head * self.head, 0.02, dtype, rngs, bias=False)
        self.v = dense(d_model, n_kv_head * self.head, 0.02, dtype, rngs, bias=False)
        self.out = dense(n_head * self.head, d_model, out_std, dtype, rngs, bias=False)

    def __call__(self, x_BSxD: jax.Array, batch: int, rotations_2xSxJ: jax.Array) -> jax.Array:
        q_BxSxHxK, k_BxSxGxK, v_BxSxGxK = (
            part(x_BSxD).reshape(batch, -1, part.out_features // self.head, self.head)
            for part in (self.q, self.k, self.v)
        )
        q_BxSxHxK, k_BxSxGxK = (_rotated(x, rotations_2xSxJ) for x in (q_BxSxHxK, k_BxSxGxK))
        y_BxSxHxK = attend(self.how, q_BxSxHxK, k_BxSxGxK, v_BxSxGxK, causal=True)
        return self.out(y_BxSxHxK.reshape(len(x_BSxD), -1))


class _MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, d_model: int, d_ff: int, *, out_std: float, dtype: Any, rngs: nnx.Rngs):
        self.gate = dense(d_model, d_ff, 0.02, dtype, rngs, bias=False)
        self.up = dense(d_model, d_ff, 0.02, dtype, rngs, bias=False)
        self.down = dense(d_ff, d_model, out_std, dtype, rngs, bias=False)

    def __call__(self, x_BSxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BSxD)) * self.up(x_BSxD))


class _Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int,
        d_ff: int,
        *,
        out_std: float,
        how: Any,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.norm_1 = nnx.RMSNorm(d_model, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs)
        self.attention = _Attention(d_model, n_head, n_kv_head, out_std=out_std, how=how, dtype=dtype, rngs=rngs)
        self.norm_2 = nnx.RMSNorm(d_model, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs)
        self.mlp = _MLP(d_model, d_ff, out_std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x_BSxD: jax.Array, batch: int, rotations_2xSxJ: jax.Array) -> jax.Array:
        x_BSxD = constrain(x_BSxD + self.attention(self.norm_1(x_BSxD), batch, rotations_2xSxJ), BATCH)
        return constrain(x_BSxD + self.mlp(self.norm_2(x_BSxD)), BATCH)


def _rotations(length: int, head: int, theta: float) -> jax.Array:
    """Cosines and sines of position s times theta^(-2j / K), for the J = K / 2 pairs of a head's dimensions."""
    angle_SxJ = jnp.outer(jnp.arange(length), theta ** (-jnp.arange(0, head, 2) / head))
    return jnp.stack([jnp.cos(angle_SxJ), jnp.sin(angle_SxJ)])


def _rotated(x_BxSxHxK: jax.Array, rotations_2xSxJ: jax.Array) -> jax.Array:
    """Each pair (j, j + K / 2) turned by its angle, in float32. The original pairs neighbours; files of Hugging Face
    have the columns in this order."""
    cos_SxJ, sin_SxJ = rotations_2xSxJ[:, :, None]
    a, b = jnp.split(x_BxSxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos_SxJ - b * sin_SxJ, b * cos_SxJ + a * sin_SxJ], axis=-1).astype(x_BxSxHxK.dtype)
