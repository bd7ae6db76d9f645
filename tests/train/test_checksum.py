"""The checksum of an array is that of its bits and their places, on any devices, and moves nothing between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cdl.train.checksum import checksum


def place(n: int, *axes: str | tuple[str, ...] | None) -> NamedSharding:
    """The first n devices, as a row if there is one axis to share, else as two rows."""
    devices = np.asarray(jax.devices()[:n]).reshape(2 if n > 1 else 1, -1)
    return NamedSharding(Mesh(devices, ("a", "b")), PartitionSpec(*axes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "bool"])
def test_checksum_is_the_same_for_every_sharding_and_sees_every_bit_and_place(dtype: str) -> None:
    rng = np.random.default_rng(0)
    size = jnp.dtype(dtype).itemsize
    raw = rng.integers(0, 2 if dtype == "bool" else 256, 16 * 24 * size, np.uint8)

    def array() -> np.ndarray:
        return raw.view(jnp.dtype(dtype)).reshape(16, 24).copy()

    total = int(checksum(array()))
    for where in (place(1), place(2, "a"), place(8, "a", "b"), place(8, "b", "a"), place(8, None, ("b", "a"))):
        assert int(checksum(jax.device_put(array(), where))) == total
    assert int(checksum(array()[::-1].copy())) != total
    assert int(checksum(np.roll(array(), 1))) != total
    for _ in range(20):
        raw[rng.integers(raw.size)] ^= np.uint8(1 if dtype == "bool" else 1 << rng.integers(8))
        before, total = total, int(checksum(array()))
        assert total != before


def test_checksum_sees_words_of_few_bits_trade_places() -> None:
    x = np.zeros(512, np.float32)
    x[3] = 1.0
    totals = {int(checksum(np.roll(x, shift))) for shift in range(512)}
    assert len(totals) == 512


def test_checksum_of_a_sharded_array_gathers_nothing() -> None:
    program = checksum.lower(jax.ShapeDtypeStruct((16, 24), np.float32, sharding=place(8, "a", "b"))).compile()
    text = program.as_text() or ""
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
