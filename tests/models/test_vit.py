"""Vision transformers: published sizes, patches as a convolution, invariances of the two pools, bad sections."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError
from cdl.models import build, vit
from tests.models.programs import compiled

SMALL: dict[str, Any] = dict(
    image_size=12, patch=4, classes=5, n_layer=2, n_head=2, d_model=16, pool="cls", dtype="float32"
)


def made(**changes: Any) -> vit.ViT:
    return vit.ViT(**SMALL | changes, compute=Compute(), rngs=nnx.Rngs(0))


def test_sizes_are_the_published_ones_and_what_their_names_say() -> None:
    published = {
        "Ti/16": 5_717_416,
        "S/16": 22_050_664,
        "B/16": 86_567_656,
        "B/32": 88_224_232,
        "L/16": 304_326_632,
    }
    for size in vit.SIZES:
        if size in published:
            assert build.build({"name": "vit", **vit.arguments(size)}).n_params == published[size]
        else:
            n_params = build.build({"name": "vit", **vit.arguments(size, image_size=8, classes=10)}).n_params
            assert n_params == pytest.approx(1e3 * float(size.split("k/")[0]), rel=0.25)


def test_patch_embedding_is_a_convolution() -> None:
    image = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    kernel = jax.random.normal(jax.random.key(1), (4, 4, 3, 16))
    expected = jax.lax.conv_general_dilated(image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    got = vit.patches(image, 12, 4) @ kernel.reshape(-1, 16)
    np.testing.assert_allclose(got, expected.reshape(-1, 16), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pool", vit.POOLS)
def test_patches_are_a_set_but_for_their_positions(pool: str) -> None:
    graphdef, params = nnx.split(made(pool=pool))
    without = jax.tree_util.tree_map_with_path(lambda p, x: x * ("position" not in jax.tree_util.keystr(p)), params)
    image = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    moved = jnp.roll(image, 4, axis=1)  # by one row of patches
    logits = compiled(lambda params, image: nnx.merge(graphdef, params)(image))
    assert np.abs(logits(params, image) - logits(params, moved)).max() > 1e-5
    np.testing.assert_allclose(logits(without, image), logits(without, moved), atol=1e-6)


def test_initial_loss_is_that_of_guessing() -> None:
    model = build.build({"name": "vit", **SMALL})
    batch = dict(image=jax.random.normal(jax.random.key(0), (16, 12, 12, 3)), label=jnp.arange(16) % 5)
    sums, stats = compiled(lambda batch: model.loss(*model.init(0), batch))(batch)
    assert float(sums.count) == 16
    assert float(sums.loss / sums.count) == pytest.approx(np.log(5), abs=0.1)
    assert stats == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(patch=5), "model.image_size=12 must be a multiple of model.patch=5"),
        (dict(pool="max"), "no model.pool 'max'; known: cls, mean"),
        (dict(classes=0), "model.classes=0"),
        (dict(n_head=3), "model.d_model=16 must be a multiple of model.n_head=3"),
    ],
)
def test_bad_sections_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        build.build({"name": "vit"} | SMALL | change)
    assert said in str(e.value)


def test_images_of_another_size_are_named() -> None:
    with pytest.raises(UserError, match=r"images are \(8, 12, 3\) and the model's \(12, 12, 3\); set model.image_size"):
        made()(jnp.zeros((2, 8, 12, 3)))
    with pytest.raises(UserError, match="no size of vit 'B/61'; did you mean 'B/16'"):
        vit.arguments("B/61")
