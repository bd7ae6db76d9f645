"""FLOPs against closed forms and published figures; MFU and speed by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cdl.compute import Compute
from cdl.models import build as models
from cdl.models import gpt2, resnet, vit
from cdl.train.flops import Speed, StepCost, mfu, peak_flops, step_flops

X = jnp.ones((8, 8))
PRODUCT = 2 * 8**3  # FLOPs of X @ X


def of_function(f: Any) -> int:
    """Forward FLOPs, as `step_flops` counts those of a model."""
    model = models.Model(lambda seed: (X, {}), lambda x, stats, batch, train=True: (f(x), stats), 64, (), "text")  # type: ignore[arg-type]
    return step_flops(model, 0) // 3


def images(B: int, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((B, size, size, 3), jnp.float32)
    return dict(image=image, label=jax.ShapeDtypeStruct((B,), jnp.int32))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gpt2_by_its_formula(remat: str) -> None:
    B, S, V = 3, 512, 50257
    L, _, D = gpt2.SIZES["124M"]
    model = models.build({"name": "gpt2"} | gpt2.arguments("124M", V, S), Compute(attention="xla", remat=remat))
    a_token = 2 * (12 * L * D**2 + V * D) + 4 * L * S * D
    assert step_flops(model, jax.ShapeDtypeStruct((B, S + 1), jnp.int32)) == 3 * B * S * a_token


def test_vit_by_its_formula() -> None:
    patch, L, _, D = vit.SIZES["S/16"]
    model = models.build({"name": "vit"} | vit.arguments("S/16"), Compute(attention="xla"))
    patches = (224 // patch) ** 2
    S = patches + 1
    forward = 2 * (patches * patch**2 * 3 * D + S * 12 * L * D**2 + D * 1000) + 4 * L * S**2 * D
    assert step_flops(model, images(2, 224)) == 3 * 2 * forward


@pytest.mark.parametrize(("depth", "giga_macs"), [(18, 1.814), (50, 4.089)])
def test_resnets_take_the_published_number_of_products(depth: int, giga_macs: float) -> None:
    """torchvision's documentation of resnet18 and resnet50: GFLOPS 1.81 and 4.09, a multiply-add being one."""
    model = models.build({"name": "resnet"} | resnet.arguments(depth), Compute())
    assert step_flops(model, images(1, 224)) / 6e9 == pytest.approx(giga_macs, abs=1e-3)


def test_a_scan_counts_as_the_loop_it_is() -> None:
    def scan(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]

    def loop(x: jax.Array) -> jax.Array:
        for _ in range(5):
            x = x @ x
        return x

    assert of_function(scan) == of_function(loop) == 5 * PRODUCT


def test_batch_dimensions_of_products_count() -> None:
    assert (
        of_function(lambda x: jnp.einsum("bij,bjk->bik", jnp.ones((6, 2, 4)), jnp.ones((6, 4, 7)))) == 2 * 6 * 2 * 4 * 7
    )


def test_grouped_and_strided_convolutions() -> None:
    def f(_: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            jnp.ones((2, 9, 9, 8)),
            jnp.ones((3, 5, 4, 6)),
            (2, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    assert of_function(f) == 2 * (2 * 4 * 5 * 6) * (3 * 5 * 4)  # outputs, and what each sums


def test_programs_inside_programs() -> None:
    @jax.custom_vjp
    def square(x: jax.Array) -> jax.Array:
        return x @ x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * g @ x @ x @ x,))
    also_square = jax.custom_jvp(lambda x: x @ x)
    also_square.defjvp(lambda x, t: (also_square(x[0]), 2 * t[0] @ x[0] @ x[0] @ x[0]))
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    by_rows = jax.shard_map(lambda x: x @ X, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    assert of_function(jax.jit(lambda x: x @ x)) == PRODUCT
    assert of_function(jax.checkpoint(lambda x: x @ x)) == PRODUCT
    assert of_function(square) == PRODUCT
    assert of_function(also_square) == PRODUCT
    assert of_function(by_rows) == PRODUCT
    assert of_function(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)) == 2 * PRODUCT


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="while"):
        of_function(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x))
    with pytest.raises(ValueError, match="ffi_call"):
        of_function(lambda x: jax.ffi.ffi_call("nobodys", jax.ShapeDtypeStruct((8, 8), jnp.float32))(x))
    assert of_function(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x)) == 0


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
        ("Tesla V100-SXM2-16GB", 125),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v3", 61.5),
    ],
)
def test_peaks_of_devices_by_the_names_that_jax_gives(kind: str, tera: float) -> None:
    assert peak_flops(kind) == tera * 1e12
    assert peak_flops(kind, "float32") is None


def test_mfu() -> None:
    assert mfu(2 * 8 * 312e12, 4.0, 8, "NVIDIA A100-SXM4-40GB") == pytest.approx(0.5)
    assert mfu(1e15, 4.0, 8, "cpu") is None
    assert mfu(1e15, 4.0, 8, "NVIDIA A100-SXM4-40GB", "float32") is None


def test_speed_is_of_the_last_minute() -> None:
    now = 0.0
    speed = Speed(lambda: now)
    cost = StepCost("tokens", amount=10, flops=50, peak=1000.0)
    assert speed.amount is speed.mfu is speed.waited is None
    for second in range(300):
        now = float(second)
        steps = 1 if second <= 200 else 4
        speed.add(steps, cost, waited=0.25)
        speed.read()
        if second == 150:
            assert (speed.amount, speed.mfu, speed.waited) == pytest.approx((10, 0.05, 0.25))
    assert (speed.amount, speed.mfu, speed.waited) == pytest.approx((40, 0.2, 0.25))


def test_a_pause_longer_than_a_minute_counts() -> None:
    now = 0.0
    speed = Speed(lambda: now)
    for at in (0.0, 1.0, 301.0):
        now = at
        speed.add(60, StepCost("images", 1, 1, None))
        speed.read()
    assert speed.amount == pytest.approx(60 / 300)
    assert speed.mfu is None
