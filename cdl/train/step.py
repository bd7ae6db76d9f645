"""The compiled part of training: R runs ("lanes") side by side in one program.

Lanes are independent. They lie on the mesh axis "run": one device holds R / devices of them and runs them `vmap`ped,
with no communication. What tells lanes apart is data: seed, rates, batches. So one program serves every point of a
grid over seeds, rates, horizons and schedules, and a lane is refilled with another run without compiling anything.

Each device may advance by its own number of steps a call. On a CPU the devices are its cores, one lane each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from cdl.models.build import Model

__all__ = ["Program", "TrainState", "train_step"]


class TrainState(NamedTuple):
    """step: number of updates applied, int32. params, opt_state: trees of arrays. In a `Program`, all lead with R."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(model: Model, optimizer: optax.GradientTransformation, seed: jax.Array | int) -> TrainState:
    """The state before the first update."""
    params = model.init(seed)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    model: Model, optimizer: optax.GradientTransformation, state: TrainState, batch: Any, eta: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Update k = state.step + 1 at rate eta; also the loss of the batch before the update."""
    loss, grads = jax.value_and_grad(model.loss)(state.params, batch)
    opt_state = optax.tree_utils.tree_set(state.opt_state, learning_rate=eta)
    updates, opt_state = optimizer.update(grads, opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), loss


class Program:
    """R lanes of one model and optimizer on some devices.

    Calls return at once and the devices work on; reading a returned array waits for it.

    Args:
      model, optimizer: as built by `cdl.models.build` and `cdl.optim.build`.
      heldout_ExBxS1: batches that `evaluate` averages over.
      lanes: R, a multiple of the number of devices.
      devices: those the lanes lie on.
      block: K, the most steps that one call of `train` can take.
    """

    def __init__(
        self,
        model: Model,
        optimizer: optax.GradientTransformation,
        heldout_ExBxS1: np.ndarray,
        *,
        lanes: int,
        devices: Sequence[jax.Device],
        block: int,
    ):
        if lanes % len(devices):
            raise ValueError(f"lanes={lanes} must be a multiple of the number of devices, {len(devices)}")
        self.lanes, self.devices, self.block, self.n_params = lanes, len(devices), block, model.n_params
        mesh = jax.sharding.Mesh(np.asarray(devices), ("run",))
        run, everywhere = PartitionSpec("run"), PartitionSpec()
        self._by_run = NamedSharding(mesh, run)
        self._heldout = jax.device_put(heldout_ExBxS1, NamedSharding(mesh, everywhere))
        on_mesh = partial(jax.shard_map, mesh=mesh, out_specs=run)
        over_lanes = jax.vmap if lanes > len(devices) else _over_one_lane
        new = over_lanes(partial(init_state, model, optimizer))
        step = over_lanes(partial(train_step, model, optimizer))

        def fill(state: TrainState, seed_R: jax.Array, fresh_R: jax.Array) -> TrainState:
            def refill() -> TrainState:
                def choose(new: jax.Array, old: jax.Array) -> jax.Array:
                    return jnp.where(fresh_R.reshape(-1, *[1] * (new.ndim - 1)), new, old)

                return jax.tree.map(choose, new(seed_R), state)

            return jax.lax.cond(fresh_R.any(), refill, lambda: state)

        def train(
            state: TrainState, batch_RxK: Any, eta_RxK: jax.Array, steps_1: jax.Array
        ) -> tuple[TrainState, jax.Array]:
            def body(k: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
                state, loss_RxK = carry
                batch_R = jax.tree.map(lambda x: x[:, k].astype(jnp.int32), batch_RxK)
                state, loss_R = step(state, batch_R, eta_RxK[:, k])
                return state, loss_RxK.at[:, k].set(loss_R)

            return jax.lax.fori_loop(0, steps_1[0], body, (state, jnp.full_like(eta_RxK, jnp.nan)))

        def evaluate(params_R: Any, wanted_R: jax.Array, batch_E: Any) -> jax.Array:
            def mean_loss() -> jax.Array:
                def loss(params: Any) -> jax.Array:
                    return jax.lax.map(lambda x: model.loss(params, x.astype(jnp.int32)), batch_E).mean()

                return over_lanes(loss)(params_R)

            return jax.lax.cond(wanted_R.any(), mean_loss, lambda: jnp.full(wanted_R.shape, jnp.nan))

        # check_vma is off: the loops and branches below differ between devices on purpose.
        self._fill = jax.jit(on_mesh(fill, in_specs=run, check_vma=False), donate_argnums=0)
        self._train = jax.jit(on_mesh(train, in_specs=run, check_vma=False), donate_argnums=0)
        self._evaluate = jax.jit(on_mesh(evaluate, in_specs=(run, run, everywhere), check_vma=False))
        one = jax.eval_shape(partial(init_state, model, optimizer), jax.ShapeDtypeStruct((), jnp.uint32))
        self._state: TrainState = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype), one), out_shardings=self._by_run
        )()

    def compile(self, batch: np.ndarray) -> None:
        """Compile what is not compiled yet, by calls that do nothing, so that times of runs are of training.

        Args:
          batch: one batch, for its shape and type.
        """
        R, K = self.lanes, self.block
        self.fill({})
        self.train(np.zeros((R, K, *batch.shape), batch.dtype), np.zeros((R, K)), np.zeros(self.devices))
        self.evaluate([]).block_until_ready()

    def fill(self, seeds: dict[int, int]) -> None:
        """Put a new run into each lane named: lane -> seed. The others are left as they are."""
        seed_R = np.zeros(self.lanes, np.uint32)
        fresh_R = np.zeros(self.lanes, bool)
        for lane, seed in seeds.items():
            seed_R[lane], fresh_R[lane] = seed, True
        self._state = self._fill(self._state, self._put(seed_R), self._put(fresh_R))

    def train(self, batch_RxK: np.ndarray, eta_RxK: np.ndarray, steps_D: np.ndarray) -> jax.Array:
        """Device d takes its first steps_D[d] <= K steps. Returns loss_RxK, NaN past those, without waiting."""
        self._state, loss_RxK = self._train(
            self._state,
            self._put(batch_RxK),
            self._put(eta_RxK.astype(np.float32)),
            self._put(steps_D.astype(np.int32)),
        )
        return loss_RxK

    def evaluate(self, wanted: Sequence[int]) -> jax.Array:
        """Held-out loss_R of the lanes named, without waiting; other lanes' numbers mean nothing."""
        wanted_R = np.isin(np.arange(self.lanes), wanted)
        return self._evaluate(self._state.params, self._put(wanted_R), self._heldout)

    @property
    def state(self) -> TrainState:
        """The state of all lanes, leading axis R."""
        return self._state

    def _put(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, self._by_run)


def _over_one_lane(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` for a leading axis of length 1, without the axis inside: XLA on CPUs is faster so."""

    def g(*arguments: Any) -> Any:
        return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], arguments)))

    return g
