"""Views of one image: pixels against Pillow called plainly, random choices against their closed-form distributions."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cdl.data.augment import (
    AUGMENTATIONS,
    Undecodable,
    augmentation,
    evaluation_view,
    resized_crop_box,
    size_of,
)
from cdl.errors import UserError


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise that is smooth over some pixels."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8))
    return noise.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(100, 75), (75, 100), (40, 200), (31, 30)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_the_evaluation_view_is_resized_then_cropped(width: int, height: int, kind: str) -> None:
    data = encoded(picture(width, height), kind)
    short, long = 32, int(max(width, height) * 32 / min(width, height))
    resized = Image.open(io.BytesIO(data)).convert("RGB")
    resized = resized.resize((long, short) if width > height else (short, long), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 28) / 2), round((resized.height - 28) / 2)
    expected = np.asarray(resized.crop((left, top, left + 28, top + 28)))
    assert size_of(data) == (height, width)
    assert np.array_equal(evaluation_view(data, 28), expected)


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    array = np.asarray(picture(32, 32))
    assert np.array_equal(evaluation_view(array, 32), array)
    assert np.array_equal(evaluation_view(encoded(Image.fromarray(array)), 32), array)
    grey = evaluation_view(array[..., :1], 32)
    assert np.array_equal(grey, np.repeat(array[..., :1], 3, axis=2))
    larger = Image.fromarray(array).resize((48, 48), Image.Resampling.BILINEAR)
    assert np.array_equal(evaluation_view(array, 48), np.asarray(larger))  # an array loses no border


def test_every_kind_of_pixels_becomes_rgb() -> None:
    image = picture(16, 16)
    grey, alpha = image.convert("L"), Image.linear_gradient("L").resize((16, 16))
    palette = image.quantize(16)
    see_through = palette.copy()
    see_through.info["transparency"] = bytes(range(0, 256, 16))
    wide = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    rgba = image.copy()
    rgba.putalpha(alpha)
    expected = {
        encoded(grey): grey.convert("RGB"),
        encoded(Image.merge("LA", (grey, alpha))): grey.convert("RGB"),
        encoded(rgba): image,
        encoded(palette): palette.convert("RGB"),
        encoded(see_through, transparency=see_through.info["transparency"]): palette.convert("RGB"),
        encoded(grey.convert("1")): grey.convert("1").convert("RGB"),
        encoded(Image.fromarray(wide)): Image.fromarray((wide // 256).astype(np.uint8)).convert("RGB"),
    }
    assert len(expected) == 7
    for data, rgb in expected.items():
        assert np.array_equal(evaluation_view(data, 16), np.asarray(rgb))
    cmyk = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")  # magenta and yellow ink are red
    assert np.abs(evaluation_view(cmyk, 16).astype(int) - [255, 0, 0]).max() <= 2


def test_exif_orientation_is_ignored() -> None:
    image, exif = picture(60, 40), Image.Exif()
    exif[0x0112] = 6  # turn it right
    assert np.array_equal(evaluation_view(encoded(image, "JPEG", exif=exif), 28), evaluation_view(jpeg(image), 28))


def jpeg(image: Image.Image) -> bytes:
    return encoded(image, "JPEG")


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_broken_files_are_undecodable(name: str) -> None:
    whole = picture(64, 48)
    broken = [b"", b"no image", *(encoded(whole, kind)[:-400] for kind in ("JPEG", "PNG", "BMP", "WEBP"))]
    broken += [jpeg(whole)[:2], encoded(whole)[:20]]
    for data in broken:
        with pytest.raises(Undecodable):
            augmentation(name)(data, 28, np.random.default_rng(0))


def test_a_large_jpeg_decoded_at_a_fraction_keeps_its_values() -> None:
    large = picture(1600, 1200)
    data = jpeg(large)
    whole = np.asarray(Image.open(io.BytesIO(data)))
    view, of_whole = evaluation_view(data, 98), evaluation_view(encoded(Image.fromarray(whole)), 98)
    assert not np.array_equal(view, of_whole)  # it was decoded at 1/4
    assert np.abs(view.astype(int) - of_whole).mean() < 1


def test_a_box_of_a_jpeg_decoded_at_a_fraction_is_the_same_box() -> None:
    data = jpeg(picture(1600, 1200))
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    for seed in range(4):
        box = resized_crop_box(1200, 1600, np.random.default_rng(seed))
        expected = np.asarray(whole.resize((40, 40), Image.Resampling.BILINEAR, box)).astype(int)
        view = augmentation("inception")(data, 40, np.random.default_rng(seed))
        assert min(np.abs(view - expected).mean(), np.abs(view[:, ::-1] - expected).mean()) < 1


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(UserError, match="'crop_flip'"):
        augmentation("crop_flp")


# --- Distributions --------------------------------------------------------------------------------------------------


def test_boxes_are_uniform_in_area_log_ratio_and_place() -> None:
    """On a square, a box of share a and ratio r fits if |log r| <= -log a: closed-form marginals of those that fit."""
    side, L, low = 10**6, np.log(4 / 3), 0.08
    rng = np.random.default_rng(0)
    left, top, right, bottom = np.array([resized_crop_box(side, side, rng) for _ in range(4000)]).T
    width, height = right - left, bottom - top
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= side
    a, log_r = width * height / side**2, np.log(width / height)

    def cumulative(a: np.ndarray) -> np.ndarray:
        integral = lambda t: t - t * np.log(t)  # noqa: E731  of -log t
        weight = L * (np.minimum(a, 3 / 4) - low) + np.maximum(integral(np.maximum(a, 3 / 4)) - integral(3 / 4), 0)
        return weight / (L * (3 / 4 - low) + integral(1.0) - integral(3 / 4))

    assert stats.kstest(a, cumulative).pvalue > 1e-3
    assert stats.kstest(log_r / np.minimum(L, -np.log(a)), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(left / (side - width), "uniform").pvalue > 1e-3
    assert stats.kstest(top / (side - height), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(9, 9000, (4494, 0, 4506, 9)), (9000, 9, (0, 4494, 9, 4506)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_box_fits_it_is_the_largest_in_the_centre(height: int, width: int, expected: tuple[int, ...]) -> None:
    assert resized_crop_box(height, width, np.random.default_rng(0)) == expected


def test_a_random_box_is_resized_as_pillow_does() -> None:
    image = picture(90, 70)
    data = encoded(image)
    mirrored = 0
    for seed in range(20):
        box = resized_crop_box(70, 90, np.random.default_rng(seed))
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, box))
        view = augmentation("inception")(data, 32, np.random.default_rng(seed))
        mirrored += np.array_equal(view, expected[:, ::-1])
        assert np.array_equal(view, expected) or np.array_equal(view, expected[:, ::-1])
    assert 0 < mirrored < 20


def test_half_of_the_images_are_mirrored() -> None:
    image = np.asarray(picture(8, 8))
    rng = np.random.default_rng(0)
    views = [augmentation("flip")(image, 8, rng) for _ in range(2000)]
    mirrored = sum(np.array_equal(view, image[:, ::-1]) for view in views)
    assert mirrored + sum(np.array_equal(view, image) for view in views) == 2000
    assert stats.binomtest(mirrored, 2000).pvalue > 1e-3


def test_padded_crops_are_all_equally_likely() -> None:
    image = np.asarray(picture(16, 16))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = [padded[i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    outcome = {view.tobytes(): 0 for crop in crops for view in (crop, crop[:, ::-1])}
    assert len(outcome) == 50
    rng = np.random.default_rng(0)
    for _ in range(5000):
        outcome[augmentation("crop_flip")(image, 16, rng).tobytes()] += 1
    assert stats.chisquare(list(outcome.values())).pvalue > 1e-3


def test_four_pixels_are_padded_for_a_side_of_32() -> None:
    image = np.full((32, 32, 3), 255, np.uint8)
    rng = np.random.default_rng(0)
    black = {int((augmentation("crop_flip")(image, 32, rng)[:, 16] == 0).all(axis=1).sum()) for _ in range(200)}
    assert black == {0, 1, 2, 3, 4}
