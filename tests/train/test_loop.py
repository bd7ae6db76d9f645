"""Lanes: equal to a plain optax loop, bit-equal to each other whatever runs beside them, refilled without compiling."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest

from cdl.config import section
from cdl.data import build as data
from cdl.models import build as models
from cdl.models.gpt2 import arguments
from cdl.optim import build as optimizers
from cdl.schedules import schedule
from cdl.sharding import make_mesh
from cdl.train.loop import LaneStatus, Outcome, Run, train
from cdl.train.step import Program

DATA = data.build(section("data", "text", batch_size=4, seq_len=16))
MODEL = models.build({"name": "gpt2"} | arguments("3k", context=16))
HELDOUT = DATA.heldout(256)


def run(T: int, peak: float, seed: int = 0, evaluations: int = 2) -> Run:
    steps = tuple(round(T * i / evaluations) for i in range(1, evaluations + 1))
    return Run(f"{T}-{peak}-{seed}", seed, schedule("cosine", T, peak=peak), steps, partial(DATA.batches, seed))


def program(optimizer: str = "muon_nsgd", lanes: int = 1, devices: int = 1, block: int = 8) -> Program:
    made = optimizers.build({"name": optimizer})
    mesh = make_mesh(dict(run=devices, data=1, fsdp=1, tensor=1), jax.devices())
    return Program(MODEL, made, HELDOUT, lanes=lanes, mesh=mesh, block=block, prepare=DATA.prepare)


def mean_loss(params: Any, batch: Any) -> jax.Array:
    sums, _ = MODEL.loss(params, {}, DATA.prepare(batch))
    return sums.loss / sums.count


def outcomes(p: Program, runs: Sequence[Run]) -> dict[str, Outcome]:
    return {o.run.id: o for o in train(p, runs)}


def same(a: Outcome, b: Outcome) -> None:
    assert a.status == b.status
    for name, values in a.curve.items():
        np.testing.assert_array_equal(values, b.curve[name], err_msg=f"{a.run.id} {name}")


RUNS = [run(30, 0.1), run(21, 0.02), run(9, 0.3, seed=5), run(17, 0.05, seed=2**31), run(30, 0.3), run(4, 0.1)]


@pytest.mark.parametrize(
    "optimizer", ["muon_nsgd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "sgd"))]
)
def test_a_lane_equals_a_plain_optax_loop(optimizer: str) -> None:
    """The reference: optax with a schedule, a Python loop, no lanes, one update after the other."""
    r = run(25, 0.02, seed=3)
    tx = optimizers.OPTIMIZERS[optimizer](lambda count: jax.numpy.asarray(r.eta_T)[count])
    params, _ = jax.jit(MODEL.init)(3)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    expected = []
    for batch in itertools.islice(r.batches(0), 25):
        loss, params, state = step(params, state, batch)
        expected.append(float(loss))
    evaluate = jax.jit(mean_loss)
    final = np.mean([float(evaluate(params, b)) for b in HELDOUT])
    curve = outcomes(program(optimizer), [r])[r.id].curve
    np.testing.assert_allclose(curve["train_loss"][:-1], expected, rtol=2e-5)
    assert curve["eval_loss"][-1] == pytest.approx(final, rel=2e-5)


def test_curve_follows_the_step_convention() -> None:
    r = run(20, 0.1, evaluations=3)
    p = program()
    curve = outcomes(p, [r])[r.id].curve
    assert curve["step"].tolist() == list(range(21))
    assert curve["eta"][0] == 0
    np.testing.assert_array_equal(curve["eta"][1:], r.eta_T)
    assert np.flatnonzero(np.isfinite(curve["eval_loss"])).tolist() == [7, 13, 20]
    assert np.isfinite(curve["train_loss"][:20]).all()
    assert np.isnan(curve["train_loss"][20])
    assert p.state.step.tolist() == [20]  # T updates and no more
    first = float(jax.jit(lambda batch: mean_loss(MODEL.init(0)[0], batch))(next(r.batches(0))))
    assert curve["train_loss"][0] == pytest.approx(first, rel=1e-6)


@pytest.fixture(scope="module")
def two() -> Program:
    """Two lanes on two devices."""
    return program(lanes=2, devices=2)


@pytest.fixture(scope="module")
def alone(two: Program) -> dict[str, Outcome]:
    """Each of `RUNS` by itself, the other lane idle."""
    return {r.id: outcomes(two, [r])[r.id] for r in RUNS}


@pytest.mark.parametrize("lanes", [2, 3])
def test_runs_are_bit_equal_alone_and_in_company(lanes: int, two: Program, alone: dict[str, Outcome]) -> None:
    together = outcomes(two if lanes == 2 else program(lanes=lanes, devices=lanes), RUNS)
    assert together.keys() == alone.keys()
    for id, outcome in together.items():
        same(outcome, alone[id])


@pytest.mark.slow
def test_lanes_that_share_a_device_agree_closely(alone: dict[str, Outcome]) -> None:
    """`vmap` sums in another order: close, not bit-equal."""
    together = outcomes(program(lanes=4, devices=2), RUNS)
    for id, outcome in together.items():
        np.testing.assert_allclose(outcome.curve["train_loss"], alone[id].curve["train_loss"], rtol=1e-3)


def test_length_of_blocks_changes_no_bit(alone: dict[str, Outcome]) -> None:
    for id, outcome in outcomes(program(lanes=2, devices=2, block=1), RUNS).items():
        same(outcome, alone[id])


def test_a_program_compiles_once_for_every_run(two: Program) -> None:
    for runs in ([run(50, 1.0, seed=9), run(3, 0.001)], RUNS):
        outcomes(two, runs)
        assert [f._cache_size() for f in (two._fill, two._train, two._evaluate)] == [1, 1, 1]


@pytest.mark.parametrize(("lanes", "devices"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_run_that_diverges_is_cut_there_and_harms_nobody(lanes: int, devices: int) -> None:
    good = [run(30, 0.1), run(40, 0.05)]
    bad = run(60, 1e30)
    p = program("sgd", lanes, devices)
    alone = outcomes(p, good)
    both = outcomes(p, [good[0], bad, good[1]])
    for r in good:
        same(both[r.id], alone[r.id])
    outcome = both[bad.id]
    assert outcome.status == "diverged"
    assert outcome.diverged_at is not None
    assert 0 < outcome.diverged_at == len(outcome.curve["step"]) < 60
    assert np.isfinite(outcome.curve["train_loss"]).all()


def test_listener_sees_steps_rates_and_losses(two: Program) -> None:
    seen: list[LaneStatus] = []
    runs = [run(30, 0.1), run(12, 0.3)]
    done = {o.run.id: o for o in train(two, runs, seen.extend)}
    for r in runs:
        statuses = [s for s in seen if s.run is r]
        assert [s.step for s in statuses] == sorted({s.step for s in statuses})
        assert statuses[-1].step == len(r.eta_T)
        for s in statuses:
            np.testing.assert_array_equal(s.eta, r.eta_T[s.first : s.step])
            np.testing.assert_array_equal(s.loss, done[r.id].curve["train_loss"][s.first : s.step])


def test_lanes_must_fill_the_devices() -> None:
    with pytest.raises(ValueError, match="lanes=3 must be a multiple"):
        program(lanes=3, devices=2)


def test_no_runs_is_no_work() -> None:
    none: list[Any] = list(train(program(), []))
    assert none == []
