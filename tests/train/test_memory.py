"""What is said of a step's memory: by counting what blocks hand on, and by XLA itself."""

import jax
import jax.numpy as jnp
import pytest

from cdl.compute import Compute
from cdl.models import build as models
from cdl.optim import build as optimizers
from cdl.sharding import AXES, make_mesh
from cdl.train.memory import activation_bytes, step_bytes
from cdl.train.step import state_bytes

B, S, D, V = 8, 16, 32, 80
TOKENS = jax.ShapeDtypeStruct((B, S + 1), jnp.int32)


def model(n_layer: int, remat: str, dtype: str = "float32") -> models.Model:
    section = dict(name="gpt2", vocab_size=V, context=S, n_layer=n_layer, n_head=2, d_model=D, dtype=dtype)
    return models.build(section, Compute(remat=remat, attention="xla"))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize(("remat", "widths"), [("full", 1), ("dots", 1 + 3 + 1 + 4)])
def test_a_block_keeps_what_its_policy_says(remat: str, widths: int, dtype: str, size: int) -> None:
    """With "full" what enters it; with "dots" also what its dense layers give, of width 3 D, D and 4 D, but not what
    the last one gives: nothing but the sum that the next block starts from is made of that."""
    kept = [activation_bytes(model(n, remat, dtype), TOKENS) for n in (2, 5)]
    assert kept[1] - kept[0] == 3 * B * S * widths * D * size


def test_activations_grow_with_rows_and_parameters_are_none_of_them() -> None:
    one, two, four = (
        activation_bytes(model(2, "none"), jax.ShapeDtypeStruct((rows, S + 1), jnp.int32)) for rows in (B, 2 * B, 4 * B)
    )
    assert four - two == 2 * (two - one)
    assert 0 <= 2 * one - two < 4 * S * D * 4  # what does not grow is smaller than any matrix of a block


def test_xla_counts_the_state_as_we_do() -> None:
    m = model(2, "none")
    optimizer = optimizers.build({"name": "adamw"}, m.rules)
    mesh = make_mesh(dict(zip(AXES, (1, 2, 2, 2), strict=True)), jax.devices())
    said = step_bytes(m, optimizer, TOKENS, mesh, microbatches=2)
    batch = 4 * B * (S + 1) // 4  # of the rate in the state and the one given beside it, only one is read
    assert said.arguments == state_bytes(m, optimizer, mesh) + batch
    assert said.temporaries > 0
