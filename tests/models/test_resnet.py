"""ResNets: published sizes, names, batch statistics on one device and on several, initial weights, bad sections."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cdl.errors import UserError
from cdl.models import build, resnet
from cdl.models.resnet import DEPTHS
from cdl.sharding import make_mesh, partition_specs
from tests.models.programs import compiled

SMALL: dict[str, Any] = dict(name="resnet", depth=18, stem="cifar", classes=10, width=8, dtype="float32")
BATCH = {
    "image": np.random.default_rng(0).normal(2.0, 3.0, size=(8, 16, 16, 3)).astype(np.float32),
    "label": np.arange(8),
}


@pytest.mark.parametrize(
    ("depth", "stem", "classes", "published"),
    [(18, "imagenet", 1000, 11_689_512), (50, "imagenet", 1000, 25_557_032), (18, "cifar", 10, 11_173_962)],
)
def test_sizes_are_the_published_ones(depth: int, stem: str, classes: int, published: int) -> None:
    model = build.build({"name": "resnet", **resnet.arguments(depth, stem, classes)})
    assert model.n_params == published
    params, stats = jax.eval_shape(model.init, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (leaf.ndim == 4) == bool(re.search(r"(^|/)conv[^/]*/kernel$", name)), name
    scales = [p for p, _ in jax.tree_util.tree_leaves_with_path(params) if p[-1].key == "scale"]
    assert len(jax.tree.leaves(stats)) == 2 * len(scales)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer blocks, for what does not depend on their number."""
    monkeypatch.setitem(DEPTHS, 18, ((1, 1), False))
    monkeypatch.setitem(DEPTHS, 50, ((1, 2), True))


@pytest.mark.usefixtures("short")
def test_training_sees_the_batch_and_evaluation_the_running_statistics() -> None:
    model = build.build(SMALL)
    params, stats = compiled(model.init)(0)
    evaluate, train = (compiled(lambda p, s, b, t=t: model.loss(p, s, b, t)) for t in (False, True))
    (alone, after), (_, _) = evaluate(params, stats, BATCH), train(params, stats, BATCH)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), after, stats))

    # A norm takes the scale of what it is given away, if it is the batch's.
    scaled = jax.tree_util.tree_map_with_path(lambda path, x: 3 * x if x.ndim == 4 else x, params)
    np.testing.assert_allclose(train(scaled, stats, BATCH)[0].loss, train(params, stats, BATCH)[0].loss, rtol=1e-3)
    assert abs(float(evaluate(scaled, stats, BATCH)[0].loss - alone.loss)) > 0.1 * float(alone.loss)

    # 0.9 of what it was, 0.1 of the batch's: after many updates without a change of weights, evaluation is training.
    expected, _ = train(params, stats, BATCH)
    for _ in range(150):
        stats = train(params, stats, BATCH)[1]
    np.testing.assert_allclose(evaluate(params, stats, BATCH)[0].loss, expected.loss, rtol=1e-3)


@pytest.mark.usefixtures("short")
def test_running_statistics_of_the_stem_in_closed_form() -> None:
    model = build.build(SMALL)
    params, stats = compiled(model.init)(0)
    _, after = compiled(model.loss)(params, stats, BATCH)
    x = jax.lax.conv_general_dilated(
        BATCH["image"], params["stem"]["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(after["stem"]["norm"]["mean"], 0.1 * x.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["stem"]["norm"]["var"], 0.9 + 0.1 * x.var(axis=(0, 1, 2)), rtol=1e-4)


@pytest.mark.usefixtures("short")
def test_devices_share_the_statistics_of_the_whole_batch() -> None:
    model = build.build(SMALL)
    trees = compiled(model.init)(0)
    expected = compiled(model.loss)(*trees, BATCH)
    mesh = make_mesh(dict(run=1, data=2, fsdp=2, tensor=2), jax.devices())
    specs = [partition_specs(tree, model.rules, mesh.shape) for tree in trees]
    assert specs[0]["blocks"][0]["branch"][0]["conv"]["kernel"] == PartitionSpec(None, None, None, "fsdp")
    assert specs[0]["head"]["kernel"] == PartitionSpec("fsdp", "tensor")
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), trees, tuple(specs))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        got = compiled(model.loss)(*placed, jax.device_put(BATCH, rows))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("short")
def test_initial_weights_have_their_spread() -> None:
    params, stats = compiled(build.build(SMALL | dict(width=32, depth=50)).init)(1)
    for i, fan_out in enumerate((64, 9 * 64, 256)):
        kernel = params["blocks"][2]["branch"][i]["conv"]["kernel"]
        assert np.std(kernel) == pytest.approx(np.sqrt(2 / fan_out), rel=0.05)
    assert np.std(params["head"]["kernel"]) == pytest.approx(np.sqrt(1 / 3 / 256), rel=0.05)
    scales = [x for p, x in jax.tree_util.tree_leaves_with_path(params) if p[-1].key == "scale"]
    assert all((x == 1).all() for x in scales)  # of every branch's last norm too
    assert {float(x) for leaf in jax.tree.leaves(stats) for x in np.unique(leaf)} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(depth=34), "no model.depth 34; known: 18, 50"),
        (dict(stem="imagnet"), "no model.stem 'imagnet'; did you mean 'imagenet'"),
        (dict(width=0), "model.width=0 must be at least 1"),
    ],
)
def test_bad_sections_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        build.build(SMALL | change)
    assert said in str(e.value)


def test_images_without_three_channels_are_named() -> None:
    model = build.build(SMALL)
    with pytest.raises(UserError, match=r"images are \(8, 8, 1\); resnet takes \(height, width, 3\)"):
        jax.eval_shape(
            lambda: model.loss(*model.init(0), {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.zeros(2, int)})
        )
