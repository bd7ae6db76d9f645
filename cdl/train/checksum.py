"""A checksum of an array that lies on devices, computed there and the same however it is split."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

__all__ = ["checksum", "checksums"]


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """uint32: a checksum of the bits of an array and of where they are, the same for every sharding.

    Each 32-bit word is hashed with its index and the hashes are summed with wrap-around. A change of one word always
    shows; changes of several, such as words that trade places, are missed once in 2^32. Equal bits, equal checksum:
    NaNs count by their payload, and 0 and -0 differ.
    """
    bits = x.dtype.itemsize * 8
    if bits == 64:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)  # another axis, of length 2
    elif jnp.issubdtype(x.dtype, jnp.floating):
        words = jax.lax.bitcast_convert_type(x, f"uint{bits}")
    else:
        words = x
    index = jnp.zeros(words.shape, jnp.uint32)  # by axis: flattening would gather the shards
    for axis, length in enumerate(words.shape):
        index = index * jnp.uint32(length % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words.astype(jnp.uint32) ^ _mix(index + jnp.uint32(1))), dtype=jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """The last stage of MurmurHash3: one-to-one on 32-bit words, and every bit in reaches every bit out."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """One call a leaf, since leaves of one shape share a program; all are under way before the first is read."""
    return {name: int(total) for name, total in jax.device_get(jax.tree.map(checksum, dict(leaves))).items()}
