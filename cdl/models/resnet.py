"""ResNet-18 and ResNet-50 (He et al., 2016) in Flax NNX, with batch normalisation.

ResNet-50 is "v1.5": a block that halves the image does so in its 3 x 3 convolution, as torchvision and Hugging Face
have it. Images and activations are [B, H, W, C].
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError, unknown
from cdl.models.transformer import REMAT, dtype_of
from cdl.sharding import BATCH, ShardingRule, constrain

__all__ = ["DEPTHS", "SHARDING", "STEMS", "ResNet", "arguments", "expanded"]

CHANNELS = 3
STEMS = ("imagenet", "cifar")

# depth: blocks of each stage; is the block a bottleneck, four times as wide outside as inside?
DEPTHS = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}

SHARDING = (
    ShardingRule(r"(^|/)conv[^/]*/kernel$", ("fsdp",)),
    ShardingRule(r"head/kernel$", ("fsdp", "tensor")),
    ShardingRule(r"head/bias$", ("tensor",)),
)


def arguments(
    depth: int = 18, stem: str = "imagenet", classes: int = 1000, width: int = 64, dtype: str = "float32"
) -> dict[str, Any]:
    """The arguments of `ResNet`; `width` is the number of channels of the stem.

    >>> arguments(50)
    {'depth': 50, 'stem': 'imagenet', 'classes': 1000, 'width': 64, 'dtype': 'float32'}
    """
    return dict(depth=depth, stem=stem, classes=classes, width=width, dtype=dtype)


class ConvNorm(nnx.Module):
    """Convolution without bias, then batch normalisation; `activate` adds ReLU. [B, H, W, C] -> [B, H', W', C'].

    Convolutions take and give `dtype`; what follows is float32. Statistics of a batch are over all of it, on however
    many devices it lies. Running ones move by ``0.9 running + 0.1 batch`` (torch's momentum 0.1), and their variance is
    that of the n values themselves, sum / n; torch keeps sum / (n - 1).
    """

    def __init__(self, n_in: int, n_out: int, size: int, stride: int, *, activate: bool, dtype: Any, rngs: nnx.Rngs):
        self.activate = activate
        self.conv = nnx.Conv(
            n_in,
            n_out,
            (size, size),
            stride,
            padding=size // 2,  # the same on all sides; XLA's "SAME" is not where the stride is 2
            use_bias=False,
            dtype=dtype,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(n_out, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.norm(self.conv(x), use_running_average=not train)
        return nnx.relu(x) if self.activate else x


class ResidualBlock(nnx.Module):
    """relu(shortcut(x) + branch(x)); the branch is two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 (`bottleneck`).

    All scales of norms start at 1, the last of a branch too, as in torchvision. Starting that at 0 (Goyal et al., 2017)
    leaves the branch's convolutions without gradient in the first update, which optimizers that normalise it would
    blow up.
    """

    def __init__(self, n_in: int, n_mid: int, stride: int, *, bottleneck: bool, dtype: Any, rngs: nnx.Rngs):
        def layer(n_in: int, n_out: int, size: int, stride: int = 1, activate: bool = True) -> ConvNorm:
            return ConvNorm(n_in, n_out, size, stride, activate=activate, dtype=dtype, rngs=rngs)

        n_out = expanded(n_mid, bottleneck)
        if bottleneck:
            branch = [layer(n_in, n_mid, 1), layer(n_mid, n_mid, 3, stride), layer(n_mid, n_out, 1, activate=False)]
        else:
            branch = [layer(n_in, n_mid, 3, stride), layer(n_mid, n_out, 3, activate=False)]
        self.branch = nnx.List(branch)
        if stride != 1 or n_in != n_out:
            self.shortcut = layer(n_in, n_out, 1, stride, activate=False)
        else:
            self.shortcut = None
        self.dtype = dtype

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        for layer in self.branch:
            y = layer(y, train)
        shortcut = x if self.shortcut is None else self.shortcut(x, train)
        return constrain(nnx.relu(shortcut + y).astype(self.dtype), BATCH)


class ResNet(nnx.Module):
    """image_BxHxWxC (float32, standardised; C = 3) -> logits_BxV, float32, V = `classes`.

    With ``train=True`` norms use the statistics of the batch and update the running ones (`nnx.BatchStat`); else they
    use those. Convolutions are drawn from N(0, 2 / fan-out) (He et al., 2015), the head uniformly with variance
    1 / (3 fan-in). `dtype` is that of the convolutions and of what blocks hand on; parameters, norms and head are
    float32.

    Args:
      depth: 18 or 50.
      stem: "imagenet" (7 x 7 of stride 2, then 3 x 3 maxima of stride 2) or "cifar" (3 x 3 of stride 1).
      width: channels of the stem; stages have 1, 2, 4, 8 times as many, times 4 in ResNet-50.
      compute: `remat` goes by blocks; "dots" keeps what convolutions gave.

    Raises:
      UserError: an unknown depth, stem or dtype, a size that is not positive; when called, images without 3 channels.
    """

    def __init__(
        self, *, depth: int, stem: str, classes: int, width: int, dtype: str, compute: Compute, rngs: nnx.Rngs
    ):
        if depth not in DEPTHS:
            raise unknown("model.depth", depth, map(str, DEPTHS))
        if stem not in STEMS:
            raise unknown("model.stem", stem, STEMS)
        if compute.remat not in REMAT:
            raise unknown("compute.remat", compute.remat, REMAT)
        for name, value in dict(classes=classes, width=width).items():
            if value < 1:
                raise UserError(f"model.{name}={value} must be at least 1")
        number = dtype_of(dtype)
        stages, bottleneck = DEPTHS[depth]
        self.remat, self.pooled = compute.remat, stem == "imagenet"
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.stem = ConvNorm(CHANNELS, width, size, stride, activate=True, dtype=number, rngs=rngs)
        blocks, n_in = [], width
        for i, n_block in enumerate(stages):
            for j in range(n_block):
                stride = 2 if i > 0 and j == 0 else 1
                n_mid = width * 2**i
                blocks.append(ResidualBlock(n_in, n_mid, stride, bottleneck=bottleneck, dtype=number, rngs=rngs))
                n_in = expanded(n_mid, bottleneck)
        self.blocks = nnx.List(blocks)
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.head = nnx.Linear(n_in, classes, dtype=jnp.float32, kernel_init=uniform, rngs=rngs)

    def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        if image_BxHxWxC.shape[-1] != CHANNELS:
            raise UserError(f"images are {image_BxHxWxC.shape[1:]}; resnet takes (height, width, {CHANNELS})")
        x = self.stem(constrain(image_BxHxWxC, BATCH), train)
        if self.pooled:
            x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = self._run(block, x, train)
        return constrain(self.head(x.mean(axis=(1, 2), dtype=jnp.float32)), BATCH, "tensor")

    def _run(self, block: ResidualBlock, x: jax.Array, train: bool) -> jax.Array:
        if self.remat == "none":
            return block(x, train)
        policy = _keeps_convolutions if self.remat == "dots" else REMAT[self.remat]
        return nnx.remat(lambda block, x: block(x, train), policy=policy)(block, x)


def expanded(n_mid: int, bottleneck: bool) -> int:
    """Channels that a block gives, of `n_mid` inside it."""
    return 4 * n_mid if bottleneck else n_mid


def _keeps_convolutions(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive is jax.lax.conv_general_dilated_p
