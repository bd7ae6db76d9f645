"""One run on eight devices: the losses of one device, no tensor where it need not be, nothing compiled twice."""

import math
import re

import jax
import numpy as np
import pytest

from cdl.models import build as models
from cdl.optim import build as optimizers
from cdl.sharding import AXES, make_mesh
from cdl.train.step import Program, state_bytes

B, S, D, V, L = 16, 24, 32, 80, 4
SECTION = dict(name="gpt2", vocab_size=V, context=S, n_layer=L, n_head=4, d_model=D)
TOKENS = np.random.default_rng(0).integers(0, V, (20, B, S + 1)).astype(np.uint16)


def program(
    sizes: tuple[int, ...], optimizer: str = "muon_nsgd", microbatches: int = 1, dtype: str = "float32"
) -> Program:
    model = models.build(SECTION | dict(dtype=dtype))
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices())
    made = optimizers.build({"name": optimizer}, model.rules)
    return Program(
        model,
        made,
        TOKENS[:1],
        lanes=sizes[0],
        mesh=mesh,
        block=10,
        prepare=lambda x: x.astype(np.int32),
        microbatches=microbatches,
    )


def losses(p: Program) -> np.ndarray:
    """Of 20 updates, in two calls."""
    p.fill(dict.fromkeys(range(p.lanes), 0))
    eta = np.full((p.lanes, 10), 0.02)
    parts = [p.train(np.broadcast_to(x, (p.lanes, *x.shape)), eta, [10] * p.rows).loss for x in np.split(TOKENS, 2)]
    assert p._train._cache_size() == 1
    return np.concatenate([np.asarray(x) for x in parts], axis=1)


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    return {name: losses(program((1, 1, 1, 1), name))[0] for name in ("muon_nsgd", "adamw")}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("sizes", "optimizer"),
    [
        ((1, 2, 2, 2), "muon_nsgd"),
        pytest.param((1, 8, 1, 1), "muon_nsgd", marks=slow),
        pytest.param((1, 1, 8, 1), "muon_nsgd", marks=slow),
        pytest.param((1, 1, 1, 4), "muon_nsgd", marks=slow),
        pytest.param((2, 2, 2, 1), "muon_nsgd", marks=slow),
        pytest.param((1, 2, 2, 2), "adamw", marks=slow),
    ],
)
def test_losses_are_those_of_one_device(sizes: tuple[int, ...], optimizer: str, alone: dict[str, np.ndarray]) -> None:
    p = program(sizes, optimizer)
    for lane in losses(p):
        np.testing.assert_allclose(lane, alone[optimizer], rtol=1e-5)
    expected = state_bytes(models.build(SECTION), optimizers.build({"name": optimizer}), p.mesh)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(p.state))
    assert on_one == expected  # what is promised is what lies there,
    whole = sum(x.nbytes for x in jax.tree.leaves(p.state)) // p.lanes
    assert on_one < 1.3 * whole / math.prod(sizes[2:])  # and but for biases nothing is copied along fsdp and tensor


@pytest.mark.slow
def test_bfloat16_on_a_mesh_is_bfloat16_on_one_device(alone: dict[str, np.ndarray]) -> None:
    one, many = (losses(program(sizes, dtype="bfloat16"))[0] for sizes in ((1, 1, 1, 1), (1, 2, 2, 2)))
    rounding = np.abs(one - alone["muon_nsgd"]).max()  # of bfloat16 itself
    assert 1e-5 < rounding < 0.02
    assert np.abs(many - one).max() < 2 * rounding


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), pytest.param((1, 2, 2, 1), marks=slow)])
def test_microbatches_change_nothing(sizes: tuple[int, ...], alone: dict[str, np.ndarray]) -> None:
    got = losses(program(sizes, microbatches=4))[0]
    np.testing.assert_allclose(got, alone["muon_nsgd"], rtol=1e-5)


def test_an_evaluation_in_parts_is_the_same() -> None:
    means = []
    for microbatches in (1, 4):
        p = program((1, 1, 1, 1), microbatches=microbatches)
        p.fill({0: 3})
        means.append([float(x[0]) for x in p.evaluate([0])])
    assert means[0] == pytest.approx(means[1], rel=1e-6)


def collectives(p: Program) -> list[tuple[str, tuple[int, ...]]]:
    """What one call of `train` communicates: operation and shape of each array that it gives to a device."""
    arguments = (
        p._put_batch(np.zeros((1, 10, B // p.part[1], S + 1), np.uint16)),
        *(jax.device_put(x, p._by_run) for x in (np.zeros((1, 10), np.float32), np.zeros(1, np.int32))),
    )
    text = p._train.lower(p.state, *arguments, None).compile().as_text()  # nothing is frozen
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", line)
        if match:
            for shape in re.findall(r"\w\d+\[([\d,]*)\]", match.group(1)):
                found.append((match.group(2), tuple(int(n) for n in shape.split(",") if n)))
    return found


@pytest.mark.parametrize(
    "sizes", [(1, 2, 2, 2), pytest.param((1, 8, 1, 1), marks=slow), pytest.param((1, 1, 8, 1), marks=slow)]
)
def test_nothing_is_gathered_that_need_not_be(sizes: tuple[int, ...]) -> None:
    """No device is sent rows of the whole batch, nor the whole stack of a layer's matrices; Newton-Schulz sends none of
    the matrices that it works on."""
    devices = math.prod(sizes)
    rows = B // (sizes[1] * sizes[2])  # of the batch, on one device
    found = collectives(program(sizes))
    assert found
    of_activations = [(op, shape) for op, shape in found if S in shape[:-1] and math.prod(shape) > rows * S * D]
    assert of_activations == []
    of_logits = [(op, shape) for op, shape in found if V in shape and math.prod(shape) > V * D]
    assert of_logits == []
    # The widest stack of matrices (up and down, 2 L of D x 4 D) is gathered along "data" alone, if at all.
    stacks = [math.prod(shape) for op, shape in found if op == "all-gather" and shape[-2:] in ((D, 4 * D), (4 * D, D))]
    assert max(stacks, default=0) <= 2 * L * D * 4 * D * (sizes[1] / devices if sizes[2] * sizes[3] > 1 else 1)
    # Gram matrices are summed up for the two embeddings alone, five times each; and once the gradient of `out`.
    gram = [shape for op, shape in found if shape[-2:] == (D, D) and op == "all-reduce"]
    assert len(gram) <= 2 * 5 + 1
