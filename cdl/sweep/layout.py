"""Where runs go: the mesh of devices, and how many runs are trained side by side on it."""

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cdl.errors import UserError
from cdl.machine import cores
from cdl.sharding import make_mesh, mesh_shape

__all__ = ["Layout", "layout", "shape_on", "use_cpu_cores"]


class Layout(NamedTuple):
    """Where runs go: on which mesh, in how many lanes, and how many of these are used."""

    mesh: Mesh
    lanes: int
    at_once: int


def shape_on(config: ConfigDict, devices: int) -> dict[str, int]:
    """The sizes of the mesh on so many devices, axis -> size.

    Raises:
      UserError: a mesh that does not fit the devices or the batch.
    """
    shape = mesh_shape(config.mesh.to_dict(), devices)
    rows, parts = config.data.batch_size, shape["data"] * shape["fsdp"] * config.compute.microbatches
    if config.compute.microbatches < 1 or rows % parts:
        raise UserError(
            f"data.batch_size={rows} must be a multiple of mesh.data={shape['data']} x mesh.fsdp={shape['fsdp']} x "
            f"compute.microbatches={config.compute.microbatches}"
        )
    return shape


def layout(config: ConfigDict, runs: int, lanes: int | None = None) -> Layout:
    """Where runs of a config go on this machine, or with several processes on all of theirs.

    On a CPU there are at least two rows for small runs, of which one may idle: XLA compiles a program for one device by
    another route than for several, with other last bits, and a run is to be the same alone and in company.

    Args:
      config: of one of the runs.
      runs: number of runs there are.
      lanes: runs side by side; one per row of the mesh if None.

    Raises:
      UserError: a mesh that does not fit the devices or the batch; lanes fewer than one; more than there are rows on
        CPU devices, where lanes that share one would only change last bits; on other devices, more than there are and
        no multiple of them; several processes and more than one lane.
    """
    # In this order the rows of a process lie together; on TPU slices ids alone run across hosts.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    shape = shape_on(config, len(devices))
    rows, spread = shape["run"], math.prod(shape.values()) // shape["run"]
    if lanes is not None and lanes < 1:
        raise UserError(f"--lanes={lanes} must be at least 1")
    if jax.process_count() > 1:
        if rows > 1 or (lanes or 1) > 1 or spread < len(devices):
            raise UserError(
                f"{jax.process_count()} processes train one run at a time on all {len(devices)} devices; let "
                "mesh.data, mesh.fsdp and mesh.tensor multiply to that (one of them may be -1), and mesh.run be -1 or 1"
            )
        at_once = 1
    elif lanes is not None and lanes > rows and devices[0].platform == "cpu":
        raise UserError(f"--lanes={lanes} exceeds the number of CPU cores, {rows}; use at most that many")
    elif lanes is not None and lanes > rows and lanes % rows:
        raise UserError(f"--lanes={lanes} must be a multiple of the number of devices, {rows}")
    else:
        at_once = lanes or min(rows, runs)
    used = at_once if devices[0].platform != "cpu" or spread > 1 else max(at_once, min(2, rows))
    mesh = make_mesh(shape | dict(run=min(used, rows)), devices)
    return Layout(mesh, used, min(at_once, runs))


def use_cpu_cores() -> None:
    """Make a device of each CPU core, at least two; no effect on other backends.

    Small models leave most of a second core idle, a second run does not (experiments/benchmarks/lanes.py). Has to
    come before JAX is first used; later it changes nothing.
    """
    if jax.config.jax_num_cpu_devices > 0:  # pyrefly: ignore[missing-attribute]
        return  # said by JAX_NUM_CPU_DEVICES
    try:
        jax.config.update("jax_num_cpu_devices", max(2, cores()))
    except RuntimeError:
        return  # JAX is in use already, as in a notebook: its devices are what there is
