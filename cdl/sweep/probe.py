"""How long steps take here, measured in a few seconds; and how many runs to train side by side for it."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from cdl.data import build as data
from cdl.sweep.grid import Point
from cdl.sweep.layout import Layout, layout, shape_on
from cdl.sweep.programs import compiled, eval_steps, parts_of
from cdl.train.memory import activation_bytes
from cdl.train.step import state_bytes

__all__ = ["Probe", "choose_layout", "most_lanes", "pick_lanes", "probe"]

_SECONDS = 1.0  # of steps, for one probe
_WORTH = 1.1  # twice the lanes have to be so much faster
_OF_MEMORY = 0.8  # for lanes; the rest is the program's, the batches', and what the estimate leaves out


class Probe(NamedTuple):
    """Measured with all lanes busy. step, evaluation: seconds for one of each lane. compilation: seconds."""

    lanes: int
    step: float
    evaluation: float
    compilation: float

    def seconds(self, points: Sequence[Point]) -> float:
        """What training these takes, compilation counted, if lanes are kept full."""
        steps = sum(p.config.T for p in points)
        evaluations = sum(len(eval_steps(p.config)) for p in points)
        lanes = min(self.lanes, len(points))
        return self.compilation + (steps * self.step + evaluations * self.evaluation) / lanes


def probe(point: Point, where: Layout) -> Probe:
    """Compile the program of a point and take steps for about a second, on batches of zeros."""
    began = time.perf_counter()
    program = compiled(point, where)
    program.fill(dict.fromkeys(range(where.at_once), 0))
    jax.block_until_ready(program.state)
    compilation = time.perf_counter() - began
    K, R = program.block, program.lanes
    batch = next(data.build(point.config.data).batches(0, 0, part=program.part))
    batch_RxK = jax.tree.map(lambda x: np.zeros((R, K, *x.shape), x.dtype), batch)
    busy = [K if d * (R // program.rows) < where.at_once else 0 for d in range(program.rows)]
    eta_RxK = np.zeros((R, K))

    def timed(do: Callable[[], Any]) -> float:
        began, times = time.perf_counter(), 0
        while times == 0 or time.perf_counter() - began < _SECONDS:
            jax.block_until_ready(do())
            times += 1
        return (time.perf_counter() - began) / times

    # Few at first: how long K of them take is not known yet.
    one = timed(lambda: program.train(batch_RxK, eta_RxK, [min(n, 1) for n in busy]))
    many = timed(lambda: program.train(batch_RxK, eta_RxK, busy)) / K if K * one < 10 * _SECONDS else one
    evaluation = timed(lambda: program.evaluate(range(where.at_once)))
    return Probe(where.at_once, min(one, many), evaluation, compilation)


def choose_layout(points: Sequence[Point], say: Callable[[str], None], lanes: int | None = None) -> Layout:
    """Where points of one program go: in so many lanes, or if None on a CPU a run a core, elsewhere as many as fit and
    make it faster. Raises as `layout`."""
    c = points[0].config
    where = layout(c, len(points), lanes)
    if lanes is not None:
        return where
    device = where.mesh.devices.flat[0]
    rows = where.mesh.shape["run"]
    if device.platform == "cpu" or jax.process_count() > 1 or len(points) <= rows:
        return where
    memory = (device.memory_stats() or {}).get("bytes_limit")
    most = most_lanes(points[0], memory, rows) if memory else rows
    measured: dict[int, float] = {}

    def rate(lanes: int) -> float:
        try:
            measured[lanes] = lanes / probe(points[0], layout(c, len(points), lanes)).step
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            measured[lanes] = 0.0  # the estimate was too low
        return measured[lanes]

    lanes = pick_lanes(rate, rows, min(most, -(-len(points) // rows) * rows))
    rates = ", ".join(f"{n}: {r:,.0f}" if r else f"{n}: too little memory" for n, r in measured.items())
    say(f"{lanes} lanes (updates a second by lanes: {rates})")
    return layout(c, len(points), lanes)


def pick_lanes(rate: Callable[[int], float], least: int, most: int) -> int:
    """The number of lanes, doubled from the least as long as that fits and pays.

    Args:
      rate: number of lanes -> updates a second of all of them together.
    """
    lanes, best = least, rate(least)
    while 2 * lanes <= most and (more := rate(2 * lanes)) > _WORTH * best:
        lanes, best = 2 * lanes, more
    return lanes


def most_lanes(point: Point, memory: float, rows: int) -> int:
    """Lanes that should fit, a multiple of the mesh's rows: state, gradients and activations of each, by estimate.

    Args:
      memory: bytes of a device.
    """
    c = point.config
    model, optimizer = parts_of(c)
    shape = shape_on(c, jax.device_count()) | dict(run=1)
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
    parts = shape["data"] * shape["fsdp"] * c.compute.microbatches
    dataset = data.build(c.data)
    batch = jax.eval_shape(dataset.prepare, jax.tree.map(lambda x: x[0], dataset.heldout(1)))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), batch)
    # Gradients are as large as parameters, and a state is held twice while lanes are filled.
    own = state_bytes(model._replace(frozen=None), optimizer, mesh)
    shared = state_bytes(model, optimizer, mesh) - own
    each = 2 * own + activation_bytes(model, batch)
    return rows * max(1, int((_OF_MEMORY * memory - shared) / each))
