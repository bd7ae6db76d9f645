"""The vision encoder of SigLIP 2 (Tschannen et al., 2025) at a fixed resolution, in Flax NNX: a ViT that has no class
token, and whose output are the normed patches."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cdl.compute import Compute
from cdl.errors import unknown
from cdl.models import transformer
from cdl.models.transformer import Block, Stack, check_sizes, dense, dtype_of
from cdl.models.vit import CHANNELS, check_patches, patches
from cdl.sharding import BATCH, ShardingRule, constrain

__all__ = ["SHARDING", "SIZES", "Siglip", "arguments"]

# name/patch: patch, layers, heads, width. base is published; 100k is for 64 x 64 pixels and says how many parameters
# there are then.
SIZES = {
    "100k/8": (8, 2, 2, 64),
    "base/16": (16, 12, 12, 768),
}

SHARDING = (
    *transformer.SHARDING,
    ShardingRule(r"patch/kernel$", (None, "fsdp")),
    ShardingRule(r"position/embedding$", (None, "fsdp")),
)


def arguments(size: str = "100k/8", image_size: int = 64, dtype: str = "float32") -> dict[str, Any]:
    """The arguments of `Siglip` for a named size.

    >>> arguments("base/16", image_size=512)
    {'image_size': 512, 'patch': 16, 'n_layer': 12, 'n_head': 12, 'd_model': 768, 'dtype': 'float32'}
    """
    if size not in SIZES:
        raise unknown("size of siglip", size, SIZES)
    patch, n_layer, n_head, d_model = SIZES[size]
    return dict(image_size=image_size, patch=patch, n_layer=n_layer, n_head=n_head, d_model=d_model, dtype=dtype)


class Siglip(nnx.Module):
    """image_BxHxWxC (float32, standardised; H = W = `image_size`, C = 3) -> x_BxSxD, float32, S patches by rows.

    Weights are drawn as in `cdl.models.transformer.Block`; those of positions and patches from N(0, 0.02^2). `dtype` is
    that of the computation; parameters are float32.

    Raises:
      UserError: `image_size` is not a multiple of `patch`, `d_model` is not one of `n_head`, a size is not positive, or
        an unknown dtype (`prefix` is that of the fields' names therein); when called, images of another size.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        dtype: str,
        compute: Compute,
        rngs: nnx.Rngs,
        prefix: str = "",
    ):
        check_sizes(d_model, n_head, prefix, n_layer=n_layer)
        check_patches(image_size, patch)
        number = dtype_of(dtype)
        self.image_size, self.pixels = image_size, patch
        n_patch = (image_size // patch) ** 2
        self.patch = dense(patch * patch * CHANNELS, d_model, 0.02, number, rngs)
        normal = nnx.initializers.normal(0.02)
        self.position = nnx.Embed(n_patch, d_model, dtype=number, embedding_init=normal, rngs=rngs)
        block = partial(
            Block,
            d_model,
            n_head,
            n_layer,
            length=n_patch,
            causal=False,
            tanh=True,
            epsilon=1e-6,
            dtype=number,
            attention=compute.attention,
        )
        self.blocks = Stack(block, n_layer, remat=compute.remat, rngs=rngs)
        self.norm = nnx.LayerNorm(d_model, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)

    def __call__(self, image_BxHxWxC: jax.Array) -> jax.Array:
        B, S = len(image_BxHxWxC), self.position.num_embeddings
        x_BSxP = patches(image_BxHxWxC, self.image_size, self.pixels)
        x_BxSxD = self.patch(x_BSxP).reshape(B, S, -1) + self.position(jnp.arange(S))
        x_BSxD = self.blocks(constrain(x_BxSxD.reshape(B * S, -1), BATCH), B)
        return self.norm(x_BSxD).reshape(B, S, -1)
