"""Memory of a training step, said before anything is allocated. For what lies there between steps: `state_bytes`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cdl.models.build import Model
from cdl.sharding import BATCH, partition_specs
from cdl.train.step import init_state, train_step

__all__ = ["StepBytes", "activation_bytes", "step_bytes"]


class StepBytes(NamedTuple):
    """Bytes on one device: state, batch and rate that a compiled step is called with, and what it needs besides."""

    arguments: int
    temporaries: int


def activation_bytes(model: Model, batch: Any) -> int:
    """Bytes that the backward pass of a batch keeps from the forward pass, as JAX says it; XLA may keep less.

    Args:
      model: with its `Compute.remat`. Attention that is not fused keeps all S x S scores; whether it is fused depends
        on the devices that this is called on.
      batch: as `Model.loss` takes it, arrays or `jax.ShapeDtypeStruct`s: one device's rows of one microbatch, say.
    """

    def backward(params: Any, stats: Any, batch: Any, frozen: Any) -> Any:
        return jax.vjp(lambda params: model.over(frozen).loss(params, stats, batch)[0].loss, params)[1]

    made = jax.make_jaxpr(backward)(*jax.eval_shape(model.init, 0), batch, model.frozen).jaxpr
    kept = {v for v in made.outvars if isinstance(v, Var)} - set(made.invars)  # parameters are there in any case
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept if isinstance(v.aval, jax.core.ShapedArray))


def step_bytes(
    model: Model, optimizer: optax.GradientTransformation, batch: Any, mesh: Mesh, microbatches: int = 1
) -> StepBytes:
    """What XLA says of `train_step`, compiled for the devices of a mesh whose "run" is 1. Takes as long as compiling.

    Args:
      model, optimizer, microbatches: see `cdl.train.step.Program`.
      batch: as `Model.loss` takes it, whole, arrays or `jax.ShapeDtypeStruct`s.
      mesh: with the axes `cdl.sharding.AXES`.
    """

    def on(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    state: Any = jax.eval_shape(partial(init_state, model, optimizer), 0)
    state, frozen = (jax.tree.map(on, x, partition_specs(x, model.rules, mesh.shape)) for x in (state, model.frozen))
    batch = jax.tree.map(lambda x: on(x, PartitionSpec(BATCH)), batch)

    def step(state: Any, batch: Any, eta: jax.Array, frozen: Any) -> Any:
        return train_step(model.over(frozen), optimizer, state, batch, eta, microbatches)

    with jax.set_mesh(mesh):
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch, rate, frozen).compile()
    said = compiled.memory_analysis()
    assert said is not None
    return StepBytes(said.argument_size_in_bytes, said.temp_size_in_bytes)
