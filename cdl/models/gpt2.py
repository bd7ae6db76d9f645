"""GPT-2 (Radford et al., 2019) in Flax NNX: learned positions, pre-norm blocks, output tied to the embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cdl.compute import Compute
from cdl.errors import unknown
from cdl.models import transformer
from cdl.models.transformer import Stack, check_sizes, dtype_of
from cdl.sharding import BATCH, ShardingRule, constrain, take_rows

__all__ = ["GPT2", "SHARDING", "SIZES", "arguments"]

# name: layers, heads, width. 124M to 1.5B are the published ones; 1B and 7B are sizes of the paper, shapes ours.
SIZES = {
    "3k": (1, 1, 8),
    "30k": (2, 2, 32),
    "120k": (2, 2, 64),
    "900k": (4, 4, 128),
    "11M": (6, 6, 384),
    "29M": (12, 7, 448),
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1B": (24, 14, 1792),
    "1.5B": (48, 25, 1600),
    "7B": (32, 32, 4096),
}

SHARDING = (
    *transformer.SHARDING,
    ShardingRule(r"token/embedding$", ("tensor", "fsdp")),
    ShardingRule(r"position/embedding$", (None, "fsdp")),
)


def arguments(size: str = "120k", vocab_size: int = 256, context: int = 64, dtype: str = "float32") -> dict[str, Any]:
    """The arguments of `GPT2` for a named size (parameters of the blocks, with the published vocabulary for 124M on).

    >>> arguments("124M", vocab_size=50257, context=1024)
    {'vocab_size': 50257, 'context': 1024, 'n_layer': 12, 'n_head': 12, 'd_model': 768, 'dtype': 'float32'}
    """
    if size not in SIZES:
        raise unknown("size of gpt2", size, SIZES)
    n_layer, n_head, d_model = SIZES[size]
    return dict(vocab_size=vocab_size, context=context, n_layer=n_layer, n_head=n_head, d_model=d_model, dtype=dtype)


class GPT2(nnx.Module):
    """tokens_BxS (whole numbers below `vocab_size`, S at most `context`) -> logits_BxSxV, float32.

    Weights are drawn as in `cdl.models.transformer.Block`. `dtype` is that of the computation; parameters are float32.

    Raises:
      UserError: `d_model` is not a multiple of `n_head`, a size is not positive, or an unknown dtype.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        dtype: str,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        check_sizes(d_model, n_head, n_layer=n_layer, vocab_size=vocab_size, context=context)
        self.dtype = dtype_of(dtype)
        normal = nnx.initializers.normal(0.02)
        self.token = nnx.Embed(vocab_size, d_model, embedding_init=normal, rngs=rngs)
        self.position = nnx.Embed(context, d_model, embedding_init=normal, rngs=rngs)
        self.blocks = Stack(
            d_model,
            n_head,
            n_layer,
            length=context,
            causal=True,
            tanh=True,
            epsilon=1e-5,
            dtype=self.dtype,
            attention=compute.attention,
            remat=compute.remat,
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(d_model, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens_BxS: jax.Array, train: bool = False) -> jax.Array:
        del train  # nothing differs
        B, S = tokens_BxS.shape
        # Tables are put together along D first: rows of a batch then find theirs without communication of rows. They
        # are float32, as are the sums over many tokens that their gradients consist of.
        token_VxD = constrain(self.token.embedding[...], "tensor", None)
        position_SxD = constrain(self.position.embedding[:S], None, None)
        x_BxSxD = (constrain(take_rows(token_VxD, tokens_BxS), BATCH) + position_SxD).astype(self.dtype)
        x_BSxD = self.blocks(constrain(x_BxSxD.reshape(B * S, -1), BATCH), B)
        logits_BSxV = _scores(self.norm(x_BSxD).astype(self.dtype), token_VxD)
        return constrain(logits_BSxV, BATCH, "tensor").reshape(B, S, -1)


@jax.custom_vjp
def _scores(x_NxD: jax.Array, table_VxD: jax.Array) -> jax.Array:
    """x table^T: products in the dtype of x, sums and result in float32; backwards too, which JAX would do in float32
    altogether, several times as slow."""
    return _product("nd,vd->nv", x_NxD, table_VxD.astype(x_NxD.dtype))


def _scores_forward(x_NxD: jax.Array, table_VxD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not by `_scores`, which has no forward mode: products with a Hessian take it of this function.
    return _product("nd,vd->nv", x_NxD, table_VxD.astype(x_NxD.dtype)), (x_NxD, table_VxD)


def _scores_backward(kept: tuple[jax.Array, jax.Array], ct_NxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_NxD, table_VxD = kept
    ct_NxV = ct_NxV.astype(x_NxD.dtype)
    x_ct_NxD = _product("nv,vd->nd", ct_NxV, table_VxD.astype(x_NxD.dtype)).astype(x_NxD.dtype)
    return x_ct_NxD, _product("nv,nd->vd", ct_NxV, x_NxD)


_scores.defvjp(_scores_forward, _scores_backward)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
