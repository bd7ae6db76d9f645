"""The device mesh, and which tensor lies where on it.

One mesh for every program, with axes

    run     independent runs (lanes); no communication
    data    rows of a batch; parameters are copied
    fsdp    rows of a batch too; parameters and optimizer state are split
    tensor  heads, hidden units and vocabulary of one model

Models name the axes of their parameters by rules on paths, and of some activations by `constrain`; XLA puts in the
communication. An axis that does not divide a dimension is left out there: that tensor is copied instead of split.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from cdl.errors import UserError

__all__ = [
    "AXES",
    "BATCH",
    "ShardingRule",
    "automatic_axes",
    "constrain",
    "make_mesh",
    "mesh_shape",
    "partition_specs",
    "take_rows",
]

AXES = ("run", "data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that rows of a batch are split over

Spec = tuple[str | tuple[str, ...] | None, ...]


class ShardingRule(NamedTuple):
    """Leaves whose path, joined by "/", matches `pattern` (`re.search`) are split by `spec` on their last axes."""

    pattern: str
    spec: Spec


def mesh_shape(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes of a config section ``{run, data, fsdp, tensor}`` on so many devices, -1 replaced.

    One size may be -1, for what the others leave; beside another that is -1, ``run=-1`` is 1.

    Raises:
      UserError: sizes that are not positive, two of them -1, or that do not divide the number of devices.

    >>> mesh_shape(dict(run=-1, data=-1, fsdp=2, tensor=1), 8)
    {'run': 1, 'data': 4, 'fsdp': 2, 'tensor': 1}
    """
    shape = {axis: sizes[axis] for axis in AXES}
    written = ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
    if any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"{written}: each must be at least 1, or -1 for what the others leave")
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1 and free[0] == "run":
        shape["run"] = 1
        del free[0]
    if len(free) > 1:
        raise UserError(f"{written}: only one of data, fsdp and tensor can be -1")
    given = math.prod(size for size in shape.values() if size != -1)
    if given > devices or (free and devices % given):
        need = f"{'a multiple of ' if free else ''}{given} device{'s' * (given > 1)}"
        raise UserError(
            f"{written} needs {need} and there {'are' if devices > 1 else 'is'} {devices}; change the sizes"
        )
    return shape | {axis: devices // given for axis in free}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of this shape, axis -> size, over the first of these devices."""
    used = np.asarray(devices[: math.prod(shape.values())], dtype=object)
    return Mesh(used.reshape([shape[axis] for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_specs(tree: Any, rules: Sequence[ShardingRule], axes: Mapping[str, int]) -> Any:
    """The `PartitionSpec` of each leaf on a mesh of these axes: by the first rule that matches its path, else a copy on
    all devices.

    A rule is for the last axes of a leaf; those before them (a stack of layers) are not split. It also matches where
    the path is only a part of the leaf's (optimizer state lies under names of its own).
    """

    def spec_of(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec: Spec = next((r.spec for r in rules if re.search(r.pattern, name)), ())
        if len(spec) > leaf.ndim:
            return PartitionSpec()  # a number beside the tensor, as optimizers keep
        whole = (None,) * (leaf.ndim - len(spec)) + tuple(spec)
        return PartitionSpec(*_divisible(whole, leaf.shape, axes))

    return jax.tree_util.tree_map_with_path(spec_of, tree)


def automatic_axes() -> dict[str, int]:
    """Axes of the mesh around the traced code along which XLA places tensors -> size; {} where all of them are 1."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        a: mesh.shape[a] for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto
    }
    return sizes if math.prod(sizes.values()) > 1 else {}


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """x, to be split by `spec` on its first axes; x itself where there is no mesh, or one device of it."""
    axes = automatic_axes()
    if not axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*_divisible(spec, x.shape, axes)))


def take_rows(table_VxD: jax.Array, index_BxS: jax.Array) -> jax.Array:
    """Rows of a table, [B, S, D]; each device looks up those of its part of the batch.

    Left to itself, XLA gathers the gradient of the whole batch on every device to add it up there.
    """
    axes = {a: n for a, n in automatic_axes().items() if a in BATCH}
    if math.prod(axes.values()) == 1 or index_BxS.shape[0] % math.prod(axes.values()):
        return jnp.take(table_VxD, index_BxS, axis=0)
    rows = PartitionSpec(tuple(axes))
    own = jax.shard_map(
        lambda table, index: jnp.take(table, index, axis=0),
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        axis_names=set(axes),
    )
    return own(table_VxD, index_BxS)


def _divisible(spec: Spec, shape: tuple[int, ...], axes: Mapping[str, int]) -> list[Any]:
    """The spec without axes that the mesh lacks or that do not divide their dimension."""
    kept: list[Any] = []
    for names, size in zip(spec, shape[: len(spec)], strict=True):
        group: list[str] = []
        for name in (names,) if isinstance(names, str) else names or ():
            if axes.get(name, 1) > 1 and size % math.prod([axes[n] for n in (*group, name)]) == 0:
                group.append(name)
        kept.append(tuple(group) if len(group) > 1 else group[0] if group else None)
    return kept
