"""The compiled part of training: R runs ("lanes") side by side in one program, each on its own part of the mesh.

Lanes are independent. They lie on the mesh axis "run": each of its rows holds R / rows of them and runs them `vmap`ped,
with no communication between rows. What tells lanes apart is data: seed, rates, batches. So one program serves every
point of a grid over seeds, rates, horizons and schedules, and a lane is refilled with another run without compiling
anything. Each row may advance by its own number of steps a call; on a CPU the rows are its cores, one lane each.

Along the other axes of the mesh one run is spread over several devices (`cdl.sharding`), also of several hosts.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cdl.models.build import Model, Sums
from cdl.sharding import AXES, BATCH, constrain, partition_specs

__all__ = ["Evaluation", "Program", "StepMetrics", "TrainState", "init_state", "state_bytes", "train_step"]


class TrainState(NamedTuple):
    """step: number of updates applied, int32. params, stats, opt_state: trees of arrays. In a `Program`, all lead
    with R."""

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """Of the batch of an update, before it: the mean loss in nats, and the 2-norm of its gradient, before clipping."""

    loss: jax.Array
    grad_norm: jax.Array


class Evaluation(NamedTuple):
    """Means over the held-out batches: loss in nats, and the share of predictions that are right."""

    loss: jax.Array
    accuracy: jax.Array


def init_state(model: Model, optimizer: optax.GradientTransformation, seed: jax.Array | int) -> TrainState:
    """The state before the first update."""
    params, stats = model.init(seed)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))


def train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    eta: jax.Array,
    microbatches: int = 1,
) -> tuple[TrainState, StepMetrics]:
    """Update k = state.step + 1 at rate eta; also the loss and gradient norm of the batch before the update."""
    sums, grads, stats = _gradient(model, state, batch, microbatches)
    grads = jax.tree.map(lambda g: g / sums.count, grads)
    opt_state = optax.tree_utils.tree_set(state.opt_state, learning_rate=eta)
    updates, opt_state = optimizer.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(sums.loss / sums.count, optax.tree_utils.tree_norm(grads))
    return TrainState(state.step + 1, params, stats, opt_state), metrics


def _gradient(model: Model, state: TrainState, batch: Any, microbatches: int) -> tuple[Sums, Any, Any]:
    """Sums over the batch, the gradient of its summed loss, and the statistics after it.

    Sums, not means: so parts of a batch that predict unequal numbers of tokens are weighted by them.
    """

    def total(params: Any, stats: Any, batch: Any) -> tuple[jax.Array, tuple[Sums, Any]]:
        sums, stats = model.loss(params, stats, batch)
        return sums.loss, (sums, stats)

    grad = jax.grad(total, has_aux=True)
    if microbatches == 1:
        grads, (sums, stats) = grad(state.params, state.stats, batch)
        return sums, grads, stats

    def part(carry: Any, batch: Any) -> tuple[Any, None]:
        sums, grads, stats = carry
        more_grads, (more, stats) = grad(state.params, stats, batch)
        return (jax.tree.map(jnp.add, sums, more), jax.tree.map(jnp.add, grads, more_grads), stats), None

    zero = Sums(*[jnp.zeros((), jnp.float32)] * 3), jax.tree.map(jnp.zeros_like, state.params), state.stats
    return jax.lax.scan(part, zero, _split(batch, microbatches))[0]


def _split(batch: Any, parts: int) -> Any:
    """The batch in M parts, leading axis M. Part m has rows m, m + M, ...: each device has its share of every part."""
    return jax.tree.map(lambda x: constrain(x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), None, BATCH), batch)


def state_bytes(model: Model, optimizer: optax.GradientTransformation, mesh: Any) -> int:
    """Bytes of one run's parameters, statistics and optimizer state on each device that it is spread over; of frozen
    parameters, too, which runs share."""
    one = _abstract(model, optimizer), model.frozen
    specs = partition_specs(one, model.rules, mesh.shape)

    def on_one(leaf: Any, spec: PartitionSpec) -> int:
        names = [n for part in spec if part for n in ((part,) if isinstance(part, str) else part)]
        return leaf.size * leaf.dtype.itemsize // math.prod(mesh.shape[n] for n in names)

    return sum(jax.tree.leaves(jax.tree.map(on_one, one, specs)))


def _abstract(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    return jax.eval_shape(partial(init_state, model, optimizer), jax.ShapeDtypeStruct((), jnp.uint32))


class Program:
    """R lanes of one model and optimizer on a mesh.

    Calls return at once and the devices work on; reading a returned array waits for it. With several processes each
    makes the same calls, a batch being the process's own rows of it (`part`).

    Args:
      model, optimizer: as built by `cdl.models.build` and `cdl.optim.build`.
      heldout_ExB: batches that `evaluate` averages over, a tree of arrays; whole on every process.
      lanes: R, a multiple of the mesh's size along "run".
      mesh: with the axes `cdl.sharding.AXES`; "run" is of size 1 where there are several processes.
      block: K, the most steps that one call of `train` can take.
      prepare: from a batch as it is read to one as `Model.loss` takes it, on the devices.
      microbatches: parts that a batch is computed in.
      frozen: what `Model.frozen` has shapes of, a tree of NumPy arrays, whole on every process; all lanes share it.
    """

    def __init__(
        self,
        model: Model,
        optimizer: optax.GradientTransformation,
        heldout_ExB: Any,
        *,
        lanes: int,
        mesh: Mesh,
        block: int,
        prepare: Callable[[Any], Any],
        microbatches: int = 1,
        frozen: Any = None,
    ):
        rows = mesh.shape["run"]
        if lanes % rows:
            raise ValueError(f"lanes={lanes} must be a multiple of the mesh's size along run, {rows}")
        self.lanes, self.rows, self.block, self.mesh, self.n_params = lanes, rows, block, mesh, model.n_params
        self.part = rows_part(mesh)  # (p, P): of P equal parts of a batch's rows, this process supplies part p
        everywhere = Mesh(mesh.devices.reshape(-1), ("device",))
        self._by_device = NamedSharding(everywhere, PartitionSpec("device"))
        self._any = jax.jit(lambda x: x.any(axis=0), out_shardings=NamedSharding(everywhere, PartitionSpec()))
        run = PartitionSpec("run")
        self._by_run = NamedSharding(mesh, run)
        self._batch = NamedSharding(mesh, PartitionSpec("run", None, BATCH))
        self._heldout = jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec(None, BATCH))), heldout_ExB)
        still = partition_specs(frozen, model.rules, mesh.shape)
        self._frozen = jax.tree.map(lambda x, spec: _put(x, NamedSharding(mesh, spec)), frozen, still)
        one = _abstract(model, optimizer)
        specs = partition_specs(one, model.rules, mesh.shape)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, PartitionSpec("run", *spec)), specs)
        on_mesh = partial(jax.shard_map, mesh=mesh, out_specs=run, axis_names={"run"}, check_vma=False)
        # check_vma is off: the loops and branches below differ between rows on purpose.
        over_lanes = jax.vmap if lanes > rows else _over_one_lane

        def placed(state: TrainState) -> TrainState:
            return jax.tree.map(lambda x, spec: constrain(x, *spec), state, specs)

        new = over_lanes(lambda seed: placed(init_state(model, optimizer, seed)))

        def one_step(model: Model, state: TrainState, batch: Any, eta: jax.Array) -> tuple[TrainState, StepMetrics]:
            batch = prepare(jax.tree.map(lambda x: constrain(x, BATCH), batch))
            state, metrics = train_step(model, optimizer, state, batch, eta, microbatches)
            return placed(state), metrics

        def fill(state: TrainState, seed_R: jax.Array, fresh_R: jax.Array) -> TrainState:
            def refill() -> TrainState:
                def choose(new: jax.Array, old: jax.Array) -> jax.Array:
                    return jnp.where(fresh_R.reshape(-1, *[1] * (new.ndim - 1)), new, old)

                return jax.tree.map(choose, new(seed_R), state)

            return jax.lax.cond(fresh_R.any(), refill, lambda: state)

        def train(
            state: TrainState, batch_RxK: Any, eta_RxK: jax.Array, steps_1: jax.Array, frozen: Any
        ) -> tuple[TrainState, StepMetrics]:
            step = over_lanes(partial(one_step, model.over(frozen)))

            def body(k: jax.Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
                state, metrics_RxK = carry
                batch_R = jax.tree.map(lambda x: x[:, k], batch_RxK)
                state, metrics_R = step(state, batch_R, eta_RxK[:, k])
                return state, jax.tree.map(lambda all, now: all.at[:, k].set(now), metrics_RxK, metrics_R)

            none = jnp.full_like(eta_RxK, jnp.nan)
            return jax.lax.fori_loop(0, steps_1[0], body, (state, StepMetrics(none, none)))

        def evaluate(params_R: Any, stats_R: Any, wanted_R: jax.Array, heldout_ExB: Any, frozen: Any) -> Evaluation:
            def means(params: Any, stats: Any) -> Evaluation:
                def sums(batch: Any) -> Sums:
                    return model.over(frozen).loss(params, stats, prepare(batch), train=False)[0]

                def sums_in_parts(batch: Any) -> Sums:
                    return jax.tree.map(jnp.sum, jax.lax.map(sums, _split(batch, microbatches)))

                total = jax.tree.map(jnp.sum, jax.lax.map(sums if microbatches == 1 else sums_in_parts, heldout_ExB))
                return Evaluation(total.loss / total.count, total.correct / total.count)

            def none() -> Evaluation:
                return Evaluation(*[jnp.full(wanted_R.shape, jnp.nan)] * 2)

            return jax.lax.cond(wanted_R.any(), lambda: over_lanes(means)(params_R, stats_R), none)

        self._fill = jax.jit(on_mesh(fill, in_specs=run), donate_argnums=0, out_shardings=shardings)
        shared = PartitionSpec()
        self._train = jax.jit(
            on_mesh(train, in_specs=(run, run, run, run, shared)),
            donate_argnums=0,
            out_shardings=(shardings, self._by_run),
        )
        self._evaluate = jax.jit(
            on_mesh(evaluate, in_specs=(run, run, run, shared, shared)), out_shardings=self._by_run
        )
        self._state: TrainState = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype), one), out_shardings=shardings
        )()

    def compile(self, batch: Any) -> None:
        """Compile what is not compiled yet, by calls that do nothing, so that times of runs are of training.

        Args:
          batch: one batch, for its shape and type.
        """
        R, K = self.lanes, self.block
        self.fill({})
        self.train(
            jax.tree.map(lambda x: np.zeros((R, K, *x.shape), x.dtype), batch), np.zeros((R, K)), [0] * self.rows
        )
        jax.block_until_ready(self.evaluate([]))

    def fill(self, seeds: dict[int, int]) -> None:
        """Put a new run into each lane named: lane -> seed. The others are left as they are."""
        seed_R = np.zeros(self.lanes, np.uint32)
        fresh_R = np.zeros(self.lanes, bool)
        for lane, seed in seeds.items():
            seed_R[lane], fresh_R[lane] = seed, True
        self._state = self._fill(self._state, _put(seed_R, self._by_run), _put(fresh_R, self._by_run))

    def train(self, batch_RxK: Any, eta_RxK: np.ndarray, steps: Sequence[int]) -> StepMetrics:
        """Row d of the mesh takes its first steps[d] <= K steps. Returns metrics_RxK, NaN past those, without
        waiting."""
        self._state, metrics_RxK = self._train(
            self._state,
            jax.tree.map(self._put_batch, batch_RxK),
            _put(eta_RxK.astype(np.float32), self._by_run),
            _put(np.asarray(steps, np.int32), self._by_run),
            self._frozen,
        )
        return metrics_RxK

    def evaluate(self, wanted: Sequence[int]) -> Evaluation:
        """Held-out means, [R], of the lanes named, without waiting; other lanes' numbers mean nothing."""
        wanted_R = np.isin(np.arange(self.lanes), wanted)
        asked = _put(wanted_R, self._by_run)
        return self._evaluate(self._state.params, self._state.stats, asked, self._heldout, self._frozen)

    def agree(self, wishes: np.ndarray) -> Any:
        """For each wish, a bool, whether any process has it; without waiting, in step with the calls of `train`."""
        if jax.process_count() == 1:
            return wishes
        mine = np.repeat(wishes[None], jax.local_device_count(), axis=0)
        return self._any(jax.make_array_from_process_local_data(self._by_device, mine))

    @property
    def state(self) -> TrainState:
        """The state of all lanes, leading axis R."""
        return self._state

    def lane(self, lane: int) -> TrainState:
        """The state of one lane, leading axis 1, on the devices of its row. Without a copy where it is alone there:
        the next call of `train` or `fill` takes the memory back."""
        row, j = divmod(lane, self.lanes // self.rows)

        def take(x: jax.Array) -> jax.Array:
            shards = [s.data for s in _of_row(x, row, self.rows)]
            mine = [s if self.lanes == self.rows else s[j : j + 1] for s in shards]
            return jax.make_array_from_single_device_arrays((1, *x.shape[1:]), self._on_row(row, x), mine)

        return jax.tree.map(take, self._state)

    def lane_like(self, lane: int) -> TrainState:
        """What `lane` would return, as `jax.ShapeDtypeStruct`s."""
        row = lane // (self.lanes // self.rows)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype, sharding=self._on_row(row, x)), self._state
        )

    def put_lane(self, lane: int, make: Callable[[TrainState], TrainState | None]) -> None:
        """Put into a lane the state that `make` gives for `lane_like`; the others are left as they are.

        A lane that is alone on its devices gives its memory back before `make` is called, so that a state of more than
        half of it can be read. Where `make` gives None the lane is empty and has to be filled.
        """
        like = self.lane_like(lane)
        row, j = divmod(lane, self.lanes // self.rows)
        leaves, structure = jax.tree.flatten(self._state)
        shapes = [(x.shape, x.sharding) for x in leaves]
        mine = {s.device for s in _of_row(leaves[0], row, self.rows)}
        alone = self.lanes == self.rows
        kept: list[dict[Any, Any]] = [
            {s.device: None if alone and s.device in mine else s.data for s in x.addressable_shards} for x in leaves
        ]
        del self._state, leaves
        state = None
        try:
            state = make(like)
        finally:  # whatever it raises, the other lanes are to live
            if state is None:
                state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like)
            put: list[jax.Array] = []
            for (shape, sharding), parts, new in zip(shapes, kept, jax.tree.leaves(state), strict=True):
                for s in new.addressable_shards:
                    old = parts[s.device]
                    parts[s.device] = s.data if old is None else old.at[j].set(s.data[0])
                put.append(jax.make_array_from_single_device_arrays(shape, sharding, list(parts.values())))
            self._state = jax.tree.unflatten(structure, put)

    def put_weights(self, lane: int, params: Any, stats: Any) -> None:
        """Put weights into a lane that `fill` has just made new: trees of NumPy arrays, whole on every process.

        What optimizers keep starts at zero whatever the weights, so the rest of the state is right as it is.
        """

        def put(like: jax.ShapeDtypeStruct, x: np.ndarray) -> jax.Array:
            assert isinstance(like.sharding, NamedSharding)
            return _put(np.asarray(x, like.dtype)[None], like.sharding)

        like = self.lane_like(lane)
        weights = dict(params=jax.tree.map(put, like.params, params), stats=jax.tree.map(put, like.stats, stats))
        state = self.lane(lane)._replace(**weights)
        self.put_lane(lane, lambda _: state)

    def _on_row(self, row: int, x: jax.Array) -> NamedSharding:
        assert isinstance(x.sharding, NamedSharding)
        return NamedSharding(Mesh(self.mesh.devices[row : row + 1], AXES), x.sharding.spec)

    def _put_batch(self, x: np.ndarray) -> jax.Array:
        rows = x.shape[2] * self.part[1]
        return jax.make_array_from_process_local_data(self._batch, x, (*x.shape[:2], rows, *x.shape[3:]))


def rows_part(mesh: Mesh) -> tuple[int, int]:
    """(p, P): of P equal parts of a batch's rows, the devices of this process hold part p.

    Raises:
      ValueError: devices whose rows do not lie together, as no order of `jax.devices()` gives them.
    """
    grid = mesh.devices.reshape(mesh.shape["run"], -1, mesh.shape["tensor"])
    here = jax.process_index()
    rows = sorted({b for _, b, t in np.ndindex(grid.shape) if grid[_, b, t].process_index == here})
    n = len(rows)
    if rows != list(range(rows[0], rows[0] + n)) or rows[0] % n or grid.shape[1] % n:
        raise ValueError(f"the rows of process {here} do not lie together on the mesh {dict(mesh.shape)}")
    return rows[0] // n, grid.shape[1] // n


def _of_row(x: jax.Array, row: int, rows: int) -> list[Any]:
    """The shards of a row of the mesh that are on this process."""
    first = row * (x.shape[0] // rows)
    return [s for s in x.addressable_shards if (s.index[0].start or 0) == first]


def _put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """x, which every process has whole, on the devices."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _over_one_lane(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` for a leading axis of length 1, without the axis inside: XLA on CPUs is faster so."""

    def g(*arguments: Any) -> Any:
        return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], arguments)))

    return g
