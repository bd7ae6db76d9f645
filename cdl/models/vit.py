"""Vision transformer (Dosovitskiy et al., 2021) in Flax NNX: patches as tokens, pre-norm blocks, learned positions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError, unknown
from cdl.models import transformer
from cdl.models.transformer import Block, Stack, check_positive, check_sizes, dtype_of
from cdl.sharding import BATCH, ShardingRule, constrain

__all__ = ["CHANNELS", "POOLS", "SHARDING", "SIZES", "ViT", "arguments", "check_patches", "patches"]

CHANNELS = 3
POOLS = ("cls", "mean")

# name/patch: patch, layers, heads, width. Ti to L are published (Touvron et al., 2021, for Ti and S); the others are
# for images of 8 x 8 and say how many parameters they have there.
SIZES = {
    "1k/2": (2, 1, 1, 8),
    "30k/2": (2, 2, 2, 32),
    "100k/2": (2, 2, 2, 64),
    "Ti/16": (16, 12, 3, 192),
    "S/16": (16, 12, 6, 384),
    "B/16": (16, 12, 12, 768),
    "B/32": (32, 12, 12, 768),
    "L/16": (16, 24, 16, 1024),
}

SHARDING = (
    *transformer.SHARDING,
    ShardingRule(r"patch/kernel$", (None, "fsdp")),
    ShardingRule(r"position/embedding$", (None, "fsdp")),
    ShardingRule(r"head/kernel$", ("fsdp", "tensor")),
    ShardingRule(r"head/bias$", ("tensor",)),
)


def arguments(
    size: str = "Ti/16", image_size: int = 224, classes: int = 1000, pool: str = "cls", dtype: str = "float32"
) -> dict[str, Any]:
    """The arguments of `ViT` for a named size.

    >>> arguments("B/16")["patch"], arguments("B/16")["d_model"]
    (16, 768)
    """
    if size not in SIZES:
        raise unknown("size of vit", size, SIZES)
    patch, n_layer, n_head, d_model = SIZES[size]
    return dict(
        image_size=image_size,
        patch=patch,
        classes=classes,
        n_layer=n_layer,
        n_head=n_head,
        d_model=d_model,
        pool=pool,
        dtype=dtype,
    )


class ViT(nnx.Module):
    """image_BxHxWxC (float32, standardised; H = W = `image_size`, C = 3) -> logits_BxV, float32, V = `classes`.

    `pool` is "cls" (a class token before the patches, read after the last block) or "mean" (no such token; mean over
    the patches after the final norm: Beyer et al., 2022). Norms have epsilon 1e-6, as the original has; Hugging Face's
    default of 1e-12 differs from it by less than rounding wherever activations have a variance above 1e-2.

    Weights are drawn as in `cdl.models.transformer.Block`; those of positions, patches, class token and head from
    N(0, 0.02^2). `dtype` is that of the computation; parameters are float32, and so is the head's product.

    Raises:
      UserError: `image_size` is not a multiple of `patch`, `d_model` is not one of `n_head`, a size is not positive,
        an unknown pool or dtype; when called, images of another size.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        classes: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        pool: str,
        dtype: str,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        check_sizes(d_model, n_head, n_layer=n_layer, classes=classes)
        check_patches(image_size, patch)
        if pool not in POOLS:
            raise unknown("model.pool", pool, POOLS)
        number = dtype_of(dtype)
        normal = nnx.initializers.normal(0.02)
        self.image_size, self.pixels, self.pool = image_size, patch, pool
        n_patch = (image_size // patch) ** 2
        self.patch = nnx.Linear(patch * patch * CHANNELS, d_model, dtype=number, kernel_init=normal, rngs=rngs)
        if pool == "cls":
            self.cls = nnx.Param(normal(rngs.params(), (d_model,), jnp.float32))
        self.position = nnx.Embed(n_patch + (pool == "cls"), d_model, dtype=number, embedding_init=normal, rngs=rngs)
        block = partial(
            Block,
            d_model,
            n_head,
            n_layer,
            length=self.position.num_embeddings,
            causal=False,
            tanh=False,
            epsilon=1e-6,
            dtype=number,
            attention=compute.attention,
        )
        self.blocks = Stack(block, n_layer, remat=compute.remat, rngs=rngs)
        self.norm = nnx.LayerNorm(d_model, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.head = nnx.Linear(d_model, classes, dtype=jnp.float32, kernel_init=normal, rngs=rngs)

    def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        del train  # nothing differs
        B = image_BxHxWxC.shape[0]
        x_BSxP = patches(image_BxHxWxC, self.image_size, self.pixels)
        x_BxSxD = self.patch(x_BSxP).reshape(B, -1, self.patch.out_features)
        if self.pool == "cls":
            cls_Bx1xD = jnp.broadcast_to(self.cls[...].astype(x_BxSxD.dtype), (B, 1, x_BxSxD.shape[-1]))
            x_BxSxD = jnp.concatenate([cls_Bx1xD, x_BxSxD], axis=1)
        x_BxSxD += self.position(jnp.arange(x_BxSxD.shape[1]))
        S, D = x_BxSxD.shape[1:]
        x_BxSxD = self.blocks(constrain(x_BxSxD.reshape(B * S, D), BATCH), B).reshape(B, S, D)
        x_BxD = self.norm(x_BxSxD[:, 0]) if self.pool == "cls" else self.norm(x_BxSxD).mean(axis=1)
        return constrain(self.head(x_BxD), BATCH, "tensor")


def check_patches(image_size: int, patch: int) -> None:
    """Raises UserError where a size is not positive, or no whole number of patches is an image."""
    check_positive(image_size=image_size, patch=patch)
    if image_size % patch:
        raise UserError(f"model.image_size={image_size} must be a multiple of model.patch={patch}")


def patches(image_BxHxWxC: jax.Array, size: int, pixels: int) -> jax.Array:
    """[B*S, pixels*pixels*C]: S patches by rows, each by (row, column, channel), as a convolution's kernel [H, W, C, D]
    is flattened. A dense layer over them is the convolution with that stride.

    Raises:
      UserError: images that are not `size` x `size` x `CHANNELS`.
    """
    if image_BxHxWxC.shape[1:] != (expected := (size, size, CHANNELS)):
        raise UserError(f"images are {image_BxHxWxC.shape[1:]} and the model's {expected}; set model.image_size")
    B, H, W, C = image_BxHxWxC.shape
    x = image_BxHxWxC.reshape(B, H // pixels, pixels, W // pixels, pixels, C)
    return jnp.moveaxis(x, 3, 2).reshape(-1, pixels * pixels * C)
