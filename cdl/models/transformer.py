"""What transformers share: attention, the pre-norm block of GPT-2 and ViT, a stack of blocks of any kind, scores.

Blocks of a stack are one block whose parameters lead with L, the layer. They are run by `jax.lax.scan`, so compile time
does not grow with depth, and equal shapes lie together for the optimizer. Dense layers run over [B*S, D]: on CPUs, XLA
is then faster than over [B, S, D].
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec

from cdl.errors import UserError, unknown
from cdl.sharding import BATCH, ShardingRule, constrain, make_mesh

__all__ = [
    "REMAT",
    "SHARDING",
    "Block",
    "Stack",
    "attend",
    "check_positive",
    "check_sizes",
    "dense",
    "dtype_of",
    "implementation",
    "scores",
]


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


def check_sizes(d_model: int, n_head: int, prefix: str = "", **sizes: int) -> None:
    """Raises UserError where a size is not positive, or `d_model` is not a multiple of `n_head`. The prefix is that of
    the fields' names."""
    own = sizes | dict(d_model=d_model, n_head=n_head)
    check_positive(**{f"{prefix}{name}": value for name, value in own.items()})
    if d_model % n_head:
        raise UserError(f"model.{prefix}d_model={d_model} must be a multiple of model.{prefix}n_head={n_head}")


def check_positive(**sizes: float) -> None:
    """Raises UserError where one is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"model.{name}={value} must be at least 1")


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
        self.implementation = implementation(attention, dtype, length, d_model // n_head, causal)
        self.qkv = dense(d_model, 3 * d_model, 0.02, dtype, rngs)
        self.out = dense(d_model, d_model, out_std, dtype, rngs)

    def __call__(self, x_BSxD: jax.Array, batch: int) -> jax.Array:
        D = x_BSxD.shape[-1]
        qkv_BxSxHx3xK = self.qkv(x_BSxD).reshape(batch, -1, self.n_head, 3, D // self.n_head)
        q_BxSxHxK, k_BxSxHxK, v_BxSxHxK = jnp.moveaxis(qkv_BxSxHx3xK, 3, 0)
        y_BxSxHxK = attend(self.implementation, q_BxSxHxK, k_BxSxHxK, v_BxSxHxK, self.causal)
        return self.out(y_BxSxHxK.reshape(-1, D))


class MLP(nnx.Module):
    """Width 4 D and GELU; in the tanh form that GPT-2 was trained with, or exact as in ViT."""

    def __init__(self, d_model: int, *, tanh: bool, out_std: float, dtype: Any, rngs: nnx.Rngs):
        self.tanh = tanh
        self.up = dense(d_model, 4 * d_model, 0.02, dtype, rngs)
        self.down = dense(4 * d_model, d_model, out_std, dtype, rngs)

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
    """`n_layer` blocks, one after the other: x_BSxD -> x_BSxD. Their parameters lead with L.

    block: makes one, called with `rngs`. A block takes x_BSxD, and what the stack is given besides.
    """

    def __init__(self, block: Callable[..., nnx.Module], n_layer: int, *, remat: str, rngs: nnx.Rngs):
        if remat not in REMAT:
            raise unknown("compute.remat", remat, REMAT)
        self.n_layer, self.remat = n_layer, remat

        @nnx.split_rngs(splits=n_layer)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Module:
            return block(rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x_BSxD: jax.Array, *besides: Any) -> jax.Array:
        graphdef, params_L = nnx.split(self.layers)

        def layer(x_BSxD: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, params)(x_BSxD, *besides), None

        layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=False)
        # Two small layers, as of the demo, run faster without a loop. Not where less is to be kept:
        # without a loop between the passes, XLA may keep what it was to compute again.
        unroll = self.n_layer <= 2 and self.remat == "none"
        return jax.lax.scan(layer, x_BSxD, params_L, unroll=unroll)[0]


@jax.custom_vjp
def scores(x_NxD: jax.Array, table_VxD: jax.Array) -> jax.Array:
    """x table^T: products in the dtype of x, sums and result in float32; backwards too, which JAX would do in float32
    altogether, several times as slow."""
    return _product("nd,vd->nv", x_NxD, table_VxD.astype(x_NxD.dtype))


def _scores_forward(x_NxD: jax.Array, table_VxD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not by `scores`, which has no forward mode: products with a Hessian take it of this function.
    return _product("nd,vd->nv", x_NxD, table_VxD.astype(x_NxD.dtype)), (x_NxD, table_VxD)


def _scores_backward(kept: tuple[jax.Array, jax.Array], ct_NxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_NxD, table_VxD = kept
    ct_NxV = ct_NxV.astype(x_NxD.dtype)
    x_ct_NxD = _product("nv,vd->nd", ct_NxV, table_VxD.astype(x_NxD.dtype)).astype(x_NxD.dtype)
    return x_ct_NxD, _product("nv,nd->vd", ct_NxV, x_NxD)


scores.defvjp(_scores_forward, _scores_backward)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def attend(how: Any, q_BxSxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, causal: bool) -> jax.Array:
    """y_BxSxHxK. `how` is what `implementation` gave; each of the G heads of keys and values is for H / G of queries,
    one after the other."""
    if how != "blocks":
        return jax.nn.dot_product_attention(q_BxSxHxK, k_BxSxGxK, v_BxSxGxK, is_causal=causal, implementation=how)
    group = q_BxSxHxK.shape[2] // k_BxSxGxK.shape[2]
    return _causal_in_blocks(q_BxSxHxK, *(jnp.repeat(x, group, axis=2) for x in (k_BxSxGxK, v_BxSxGxK)))


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


def dense(n_in: int, n_out: int, std: float, dtype: Any, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """A dense layer with weights from N(0, std^2)."""
    return nnx.Linear(n_in, n_out, use_bias=bias, dtype=dtype, kernel_init=nnx.initializers.normal(std), rngs=rngs)


@functools.cache
def implementation(wanted: str, dtype: Any, length: int, head: int, causal: bool, group: int = 1) -> Any:
    """What "auto" is, for `attend`. It asks a GPU, once: what cuDNN takes differs. group: heads of queries for each of
    keys."""
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
    if why := _does_not_compile("cudnn", dtype, length, head, causal, group):
        warnings.warn(f"cuDNN has no attention for this model here, XLA's is used ({why})", stacklevel=2)
        return "xla"
    return "cudnn"


def _does_not_compile(how: Any, dtype: Any, length: int, head: int, causal: bool, group: int = 1) -> str:
    """Why an attention does not compile, forward and backward, as `cdl.train.step` has it on the devices of this
    process; "" if it does."""
    devices = jax.local_devices()
    mesh = make_mesh(dict(run=1, data=len(devices), fsdp=1, tensor=1), devices)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((len(devices), length, group, head), dtype, sharding=rows)

    def total(q: jax.Array) -> jax.Array:
        q = constrain(q, BATCH)
        x = q[:, :, :1]
        return jax.nn.dot_product_attention(q, x, x, is_causal=causal, implementation=how).sum()

    everywhere = PartitionSpec()
    trial = jax.shard_map(
        jax.grad(total), mesh=mesh, in_specs=everywhere, out_specs=everywhere, axis_names={"run"}, check_vma=False
    )
    try:
        jax.jit(trial).lower(x).compile()
    except Exception as error:  # whatever it is, the plain one works
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""
