"""What GPT-2 and ViT share: pre-norm blocks of attention and MLP, and a stack of them.

Blocks of a stack are one block whose parameters lead with L, the layer. They are run by `jax.lax.scan`, so compile time
does not grow with depth, and equal shapes lie together for the optimizer. Dense layers run over [B*S, D]: on CPUs, XLA
is then faster than over [B, S, D].
"""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec

from cdl.errors import UserError, unknown
from cdl.sharding import BATCH, ShardingRule, constrain, make_mesh

__all__ = ["REMAT", "SHARDING", "Block", "Stack", "check_sizes", "dtype_of"]


def _keeps_products(primitive: Any, *_: Any, **__: Any) -> bool:
    """Norms, GELU and softmax are computed again, not kept: a scan writes all that is kept to memory and reads it
    back, which takes longer than they do."""
    return primitive is primitives.dot_general_p or primitive.name.startswith("dot_product_attention")


# name -> policy: what a block keeps for the backward pass.
REMAT: dict[str, Any] = {
    "none": _keeps_products,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ("auto", "xla", "blocks", "cudnn")
BLOCK = 128  # queries at least, where attention goes by blocks; of these, at most so many:
MOST_BLOCKS = 4
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Kernels are [in, out]: split along what the block widens to ("tensor") and along the other side ("fsdp").
SHARDING = (
    ShardingRule(r"(qkv|up)/kernel$", ("fsdp", "tensor")),
    ShardingRule(r"(out|down)/kernel$", ("tensor", "fsdp")),
    ShardingRule(r"(qkv|up)/bias$", ("tensor",)),
)


def dtype_of(name: str) -> Any:
    """The dtype in which a model computes; parameters, norms, softmax and loss are float32 in any case."""
    if name not in DTYPES:
        raise unknown("model.dtype", name, DTYPES)
    return DTYPES[name]


def check_sizes(d_model: int, n_head: int, **sizes: int) -> None:
    """Raises UserError where a size is not positive, or `d_model` is not a multiple of `n_head`."""
    for name, value in (sizes | dict(d_model=d_model, n_head=n_head)).items():
        if value < 1:
            raise UserError(f"model.{name}={value} must be at least 1")
    if d_model % n_head:
        raise UserError(f"model.d_model={d_model} must be a multiple of model.n_head={n_head}")


class Attention(nnx.Module):
    """Multi-head self-attention.

    The columns of `qkv` are ordered (head, q k v, K), so that splitting them splits heads.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        length: int,
        causal: bool,
        attention: str,
        out_std: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.n_head, self.causal = n_head, causal
        self.implementation = _implementation(attention, dtype, length, d_model // n_head, causal)
        self.qkv = _dense(d_model, 3 * d_model, 0.02, dtype, rngs)
        self.out = _dense(d_model, d_model, out_std, dtype, rngs)

    def __call__(self, x_BSxD: jax.Array, batch: int) -> jax.Array:
        D = x_BSxD.shape[-1]
        qkv_BxSxHx3xK = self.qkv(x_BSxD).reshape(batch, -1, self.n_head, 3, D // self.n_head)
        q_BxSxHxK, k_BxSxHxK, v_BxSxHxK = jnp.moveaxis(qkv_BxSxHx3xK, 3, 0)
        if self.implementation == "blocks":
            y_BxSxHxK = _causal_in_blocks(q_BxSxHxK, k_BxSxHxK, v_BxSxHxK)
        else:
            y_BxSxHxK = jax.nn.dot_product_attention(
                q_BxSxHxK, k_BxSxHxK, v_BxSxHxK, is_causal=self.causal, implementation=self.implementation
            )
        return self.out(y_BxSxHxK.reshape(-1, D))


class MLP(nnx.Module):
    """Width 4 D and GELU; in the tanh form that GPT-2 was trained with, or exact as in ViT."""

    def __init__(self, d_model: int, *, tanh: bool, out_std: float, dtype: Any, rngs: nnx.Rngs):
        self.tanh = tanh
        self.up = _dense(d_model, 4 * d_model, 0.02, dtype, rngs)
        self.down = _dense(4 * d_model, d_model, out_std, dtype, rngs)

    def __call__(self, x_BSxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BSxD), approximate=self.tanh))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Weights are drawn from N(0, 0.02^2), those that write to the residual stream from N(0, 0.02^2 / (2 n_layer)).
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_layer: int,
        *,
        length: int,
        causal: bool,
        tanh: bool,
        epsilon: float,
        dtype: Any,
        attention: str,
        rngs: nnx.Rngs,
    ):
        out_std = 0.02 / math.sqrt(2 * n_layer)
        self.norm_1 = nnx.LayerNorm(d_model, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)
        self.attention = Attention(
            d_model,
            n_head,
            length=length,
            causal=causal,
            attention=attention,
            out_std=out_std,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm_2 = nnx.LayerNorm(d_model, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)
        self.mlp = MLP(d_model, tanh=tanh, out_std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x_BSxD: jax.Array, batch: int) -> jax.Array:
        x_BSxD = constrain(x_BSxD + self.attention(self.norm_1(x_BSxD), batch), BATCH)
        return constrain(x_BSxD + self.mlp(self.norm_2(x_BSxD)), BATCH)


class Stack(nnx.Module):
    """`n_layer` blocks, one after the other: x_BSxD -> x_BSxD. Arguments as of `Block`; its parameters lead with L."""

    def __init__(self, d_model: int, n_head: int, n_layer: int, *, remat: str, rngs: nnx.Rngs, **block: Any):
        if remat not in REMAT:
            raise unknown("compute.remat", remat, REMAT)
        self.n_layer, self.remat = n_layer, remat

        @nnx.split_rngs(splits=n_layer)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(d_model, n_head, n_layer, rngs=rngs, **block)

        self.layers = make(rngs)

    def __call__(self, x_BSxD: jax.Array, batch: int) -> jax.Array:
        graphdef, params_L = nnx.split(self.layers)

        def layer(x_BSxD: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, params)(x_BSxD, batch), None

        layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=False)
        # Two small layers, as of the demo, run faster without a loop. Not where less is to be kept:
        # without a loop between the passes, XLA may keep what it was to compute again.
        unroll = self.n_layer <= 2 and self.remat == "none"
        return jax.lax.scan(layer, x_BSxD, params_L, unroll=unroll)[0]


def _causal_in_blocks(q_BxSxHxK: jax.Array, k_BxSxHxK: jax.Array, v_BxSxHxK: jax.Array) -> jax.Array:
    """Causal attention, each block of queries on the keys up to its own end alone. Scores and softmax in float32.

    Heads go before positions, which XLA on CPUs wants of batched products.
    """
    q_BxHxSxK, k_BxHxSxK, v_BxHxSxK = (x.swapaxes(1, 2) for x in (q_BxSxHxK, k_BxSxHxK, v_BxSxHxK))
    S, K = q_BxHxSxK.shape[-2:]
    blocks = next((n for n in range(MOST_BLOCKS, 1, -1) if S % n == 0 and S // n >= BLOCK), 1)
    parts = []
    for i in range(blocks):
        first, end = S * i // blocks, S * (i + 1) // blocks
        scores_BxHxQxS = jnp.einsum(
            "bhqk,bhsk->bhqs",
            q_BxHxSxK[:, :, first:end],
            k_BxHxSxK[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        seen_QxS = jnp.arange(first, end)[:, None] >= jnp.arange(end)
        weights_BxHxQxS = jax.nn.softmax(jnp.where(seen_QxS, scores_BxHxQxS / math.sqrt(K), -jnp.inf), axis=-1)
        parts.append(jnp.einsum("bhqs,bhsk->bhqk", weights_BxHxQxS.astype(v_BxHxSxK.dtype), v_BxHxSxK[:, :, :end]))
    return jnp.concatenate(parts, axis=2).swapaxes(1, 2)


def _dense(n_in: int, n_out: int, std: float, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n_in, n_out, dtype=dtype, kernel_init=nnx.initializers.normal(std), rngs=rngs)


@functools.cache
def _implementation(wanted: str, dtype: Any, length: int, head: int, causal: bool) -> Any:
    """What "auto" is. It asks a GPU, once: what cuDNN takes differs."""
    if wanted not in ATTENTION:
        raise unknown("compute.attention", wanted, ATTENTION)
    if wanted == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(f"compute.attention='cudnn' needs an NVIDIA GPU, and here is {jax.default_backend()}; use auto")
    if wanted == "auto" and jax.default_backend() == "cpu":
        wanted = "blocks"
    if wanted != "auto":
        return wanted if wanted != "blocks" or causal else "xla"
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16:
        return "xla"
    if why := _does_not_compile("cudnn", dtype, length, head, causal):
        warnings.warn(f"cuDNN has no attention for this model here, XLA's is used ({why})", stacklevel=2)
        return "xla"
    return "cudnn"


def _does_not_compile(implementation: Any, dtype: Any, length: int, head: int, causal: bool) -> str:
    """Why an attention does not compile, forward and backward, as `cdl.train.step` has it on the devices of this
    process; "" if it does."""
    devices = jax.local_devices()
    mesh = make_mesh(dict(run=1, data=len(devices), fsdp=1, tensor=1), devices)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((len(devices), length, 1, head), dtype, sharding=rows)

    def total(x: jax.Array) -> jax.Array:
        x = constrain(x, BATCH)
        return jax.nn.dot_product_attention(x, x, x, is_causal=causal, implementation=implementation).sum()

    everywhere = PartitionSpec()
    trial = jax.shard_map(
        jax.grad(total), mesh=mesh, in_specs=everywhere, out_specs=everywhere, axis_names={"run"}, check_vma=False
    )
    try:
        jax.jit(trial).lower(x).compile()
    except Exception as error:  # whatever it is, the plain one works
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""
