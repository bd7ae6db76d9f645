"""Batches of images are functions of (seed, step), whoever reads them and however many processes share them."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from scipy import stats

from cdl.data.augment import augmentation, evaluation_view
from cdl.data.image_sources import Arrays
from cdl.data.images import (
    Images,
    batches,
    check_undecodable,
    data_arguments,
    heldout_batches,
    image_size,
    iterate,
    read_images,
    standardise,
)
from cdl.errors import UserError


def section(**changes: Any) -> ConfigDict:
    return ConfigDict(data_arguments() | dict(path="x", batch_size=8) | changes)


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def digits() -> Images:
    return read_images("digits", 0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 images of 40 x 30 in train, 20 in val; label is the seed modulo 3."""
    for part, first, last in (("train", 0, 60), ("val", 60, 80)):
        for seed in range(first, last):
            file = tmp_path / part / f"class{seed % 3}" / f"{seed:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(seed))
    return tmp_path


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_a_batch_is_a_function_of_seed_and_step(digits: Images) -> None:
    c = section(augment="crop_flip")
    one, again, other = (batches(digits, c, seed) for seed in (7, 7, 8))
    first = one[0]
    assert {k: (v.shape, v.dtype.name) for k, v in first.items()} == {
        "image": ((8, 8, 8, 3), "uint8"),
        "label": ((8,), "int32"),
        "replaced": ((8,), "int32"),
    }
    steps = range(190, 215)  # over the end of the first epoch
    backwards = {k: again[k] for k in reversed(steps)}
    assert all(equal(one[k], backwards[k]) for k in steps)
    assert not any(np.array_equal(one[k]["image"], other[k]["image"]) for k in steps)


def test_every_image_comes_once_an_epoch_and_in_a_new_order(digits: Images) -> None:
    images = Images(digits.heldout, digits.heldout, 10, "")  # 180
    dataset = batches(images, section(batch_size=9), 0)
    seen = [image.tobytes() for k in range(40) for image in dataset[k]["image"]]
    every = sorted(evaluation_view(images.train[i]["image"], 8).tobytes() for i in range(180))
    assert sorted(seen[:180]) == sorted(seen[180:]) == every
    assert seen[:180] != seen[180:]


def test_labels_stay_with_their_images(folder: Path) -> None:
    dataset = batches(read_images(str(folder), 0.1), section(image_size=16), 0)
    label_of = {evaluation_view(jpeg(seed), 16).tobytes(): seed % 3 for seed in range(60)}
    for k in range(6):
        batch = dataset[k]
        assert [label_of[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()


def test_variation_is_new_in_every_epoch(digits: Images) -> None:
    images = Images(digits.heldout, digits.heldout, 10, "")
    dataset = batches(images, section(batch_size=180, augment="crop_flip"), 0)
    first, second = (sorted(image.tobytes() for image in dataset[k]["image"]) for k in (0, 1))
    assert first != second


@pytest.mark.parametrize("augment", ["none", "crop_flip", "inception"])
@pytest.mark.parametrize("P", [2, 4])
def test_parts_of_processes_make_the_whole_batch(digits: Images, augment: str, P: int) -> None:
    c = section(augment=augment)
    whole, parts = batches(digits, c, 3), [batches(digits, c, 3, (p, P)) for p in range(P)]
    for k in (0, 1, 201, 202, 203):
        rows = [part[k] for part in parts]
        assert equal({name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, whole[k])


@pytest.mark.parametrize("arrays", [False, True])
def test_threads_and_worker_processes_read_the_same_batches(digits: Images, folder: Path, arrays: bool) -> None:
    if arrays:
        dataset = batches(digits, section(augment="crop_flip"), 1)
    else:
        dataset = batches(read_images(str(folder), 0.1), section(image_size=16, augment="inception"), 1)
    expected = [dataset[k] for k in range(3, 12)]
    options = grain.ReadOptions(num_threads=3, prefetch_buffer_size=4)
    plain = iter(dataset[3:].to_iter_dataset(options))
    assert all(equal(next(plain), batch) for batch in expected)
    for workers in (0, 2):
        reader = iterate(dataset, 3, workers)
        assert all(equal(next(reader), batch) for batch in expected)
        reader.close()


# --- Arrays, a batch at a time --------------------------------------------------------------------------------------


def views_one_by_one(name: str, image: np.ndarray) -> list[bytes]:
    """All that the function for one image can give: two numbers of 0..2 are drawn for an image of 8 x 8, and a side."""

    class Scripted:
        def __init__(self, *drawn: int):
            self._drawn = drawn

        def integers(self, low: int, high: int, size: int) -> tuple[int, ...]:
            assert (low, high, size) == (0, 3, 2)
            return self._drawn[:2]

        def random(self) -> float:
            return 0.75 * self._drawn[2]

    scripts: list[Any] = [Scripted(*drawn) for drawn in np.ndindex(3, 3, 2)]
    return sorted({augmentation(name)(image, 8, script).tobytes() for script in scripts})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "views"), [("none", 1), ("flip", 2), ("crop_flip", 18)])
def test_arrays_get_the_views_that_single_images_get_equally_often(name: str, views: int, channels: int) -> None:
    """Rows of a batch that depended on each other would change the spread of the counts."""
    image = np.random.default_rng(0).integers(1, 256, (8, 8, channels), dtype=np.uint8)
    train = Arrays(np.stack([image] * 100), np.zeros(100, int))
    dataset = batches(Images(train, train, 1, ""), section(batch_size=90, augment=name), 0)
    count = Counter(view.tobytes() for k in range(40) for view in dataset[k]["image"])
    assert sorted(count) == views_one_by_one(name, image)
    assert len(count) == views
    assert 1e-3 < stats.chisquare(list(count.values())).pvalue < 1 - 1e-3 or views == 1


def test_arrays_keep_their_labels_and_come_once_an_epoch_across_its_end() -> None:
    label_N = np.arange(50)
    train = Arrays(np.broadcast_to(label_N.astype(np.uint8)[:, None, None, None], (50, 8, 8, 1)), label_N)
    dataset, other = (batches(Images(train, train, 50, ""), section(augment="crop_flip"), seed) for seed in (0, 1))
    rows = [dataset[k] for k in range(25)]  # 4 epochs, ends of which lie within batches
    label_ExN = np.concatenate([row["label"] for row in rows]).reshape(4, 50)
    assert np.array_equal(np.concatenate([row["image"] for row in rows])[:, 4, 4, 0], label_ExN.reshape(-1))
    assert np.array_equal(np.sort(label_ExN), np.tile(label_N, (4, 1)))
    assert len({tuple(order) for order in label_ExN.tolist()}) == 4
    assert not np.array_equal(rows[0]["label"], other[0]["label"])


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
def test_arrays_are_not_read_one_by_one(digits: Images, augment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Arrays, "__getitem__")
    assert batches(digits, section(image_size=8, augment=augment), 0)[0]["image"].any()


# --- Undecodable images ---------------------------------------------------------------------------------------------


def test_an_undecodable_image_is_replaced_by_the_next_and_marked(folder: Path) -> None:
    files = sorted(folder.glob("train/*/*.jpg"))
    broken = {4: b"", 5: b"no image", 30: files[30].read_bytes()[:300], 59: b"\xff\xd8\xff"}
    for i, data in broken.items():
        files[i].write_bytes(data)
    good = [i for i in range(60) if i not in broken]
    views = {i: evaluation_view(files[i].read_bytes(), 16).tobytes() for i in good}
    stands_in = {4: 6, 5: 6, 30: 31, 59: 0}
    images = read_images(str(folder), 0.1)
    for seed in (0, 1):
        batch = batches(images, section(image_size=16, batch_size=60), seed)[0]
        shown = [image.tobytes() for image in batch["image"]]
        marked = [image for image, replaced in zip(shown, batch["replaced"], strict=True) if replaced]
        assert sorted(marked) == sorted(views[i] for i in stands_in.values())
        assert sorted(shown) == sorted([*views.values(), *marked])


def test_nothing_but_undecodable_images_is_an_error(folder: Path) -> None:
    for file in folder.glob("train/*/*.jpg"):
        file.write_bytes(b"no image")
    images = read_images(str(folder), 0.1)
    with pytest.raises(UserError, match="60 images in a row"):
        batches(images, section(image_size=16), 0)[0]
    with pytest.raises(UserError, match="they are unreadable"):
        image_size(images, section())


def test_more_than_one_undecodable_image_in_a_hundred_is_an_error() -> None:
    """With three standard errors of a count of 1% on top, sqrt(10) of 1,000 and sqrt(1000) of 100,000 images."""
    check_undecodable("x", 19, 1000)
    check_undecodable("x", 1094, 100_000)
    check_undecodable("x", 499, 499)  # too early to say
    with pytest.raises(UserError, match=r"data\.path='x': 20 of 1000 images could not be decoded"):
        check_undecodable("x", 20, 1000)
    with pytest.raises(UserError, match="1095 of 100000"):
        check_undecodable("x", 1095, 100_000)


def test_held_out_images_are_held_to_the_same(digits: Images) -> None:
    class Broken(list):  # type: ignore[type-arg]
        """Every 20th image is broken."""

        def __getitem__(self, i: Any) -> Any:
            return dict(image=b"" if i % 20 == 0 else np.zeros((8, 8, 3), np.uint8), label=0)

    with pytest.raises(UserError, match="30 of 600"):
        heldout_batches(Images(digits.train, Broken(range(600)), 1, ""), section(batch_size=100), 600)


# --- Held-out batches -----------------------------------------------------------------------------------------------


def test_held_out_batches_are_spread_evenly_and_not_varied(folder: Path) -> None:
    images = read_images(str(folder), 0.1)
    held = heldout_batches(images, section(image_size=16, batch_size=5, augment="inception"), size=11)
    assert (held["image"].shape, held["image"].dtype, held["label"].dtype) == ((2, 5, 16, 16, 3), np.uint8, np.int32)
    files = sorted(folder.glob("val/*/*.jpg"))
    for e, i in enumerate(np.linspace(0, 19, 10).astype(int)):
        assert np.array_equal(held["image"].reshape(10, 16, 16, 3)[e], evaluation_view(files[i].read_bytes(), 16))
        assert held["label"].reshape(-1)[e] == int(files[i].stem) % 3
    every = heldout_batches(images, section(image_size=16, batch_size=5), size=1000)
    assert every["label"].shape == (4, 5)


# --- Settings -------------------------------------------------------------------------------------------------------


def test_the_size_is_that_of_the_images_or_as_given(digits: Images, folder: Path) -> None:
    assert image_size(digits, section()) == 8
    assert image_size(digits, section(image_size=32)) == 32
    assert batches(digits, section(image_size=12), 0)[0]["image"].shape == (8, 12, 12, 3)
    with pytest.raises(UserError, match=r"40 x 30; give data\.image_size"):
        image_size(read_images(str(folder), 0.1), section())
    for wrong in (-1, 8.5):
        with pytest.raises(UserError, match=rf"data\.image_size={wrong}"):
            image_size(digits, ConfigDict(section().to_dict() | dict(image_size=wrong)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(batch_size=0), r"data\.batch_size=0"),
        (dict(batch_size=1618), "1617 images for training, one batch needs 1618"),
        (dict(augment="flop"), "there is no data.augment 'flop'; did you mean 'flip'"),
    ],
)
def test_settings_that_cannot_work_are_named(digits: Images, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        batches(digits, section(**changes), 0)


def test_too_few_held_out_images_and_uneven_parts_are_named(digits: Images) -> None:
    with pytest.raises(UserError, match="180 images for evaluation, one batch needs 181"):
        heldout_batches(digits, section(batch_size=181), 1)
    with pytest.raises(UserError, match=r"data\.batch_size=8 does not divide among 3 processes"):
        batches(digits, section(), 0, (0, 3))


def test_standardised_channels_have_mean_0_and_deviation_1() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    unit = image.astype(np.float64) / 255
    mean, std = unit.mean(axis=(0, 1, 2)), unit.std(axis=(0, 1, 2))
    out = jax.jit(standardise)(image, tuple(mean), tuple(std))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, (unit - mean) / std, atol=1e-5)
    np.testing.assert_allclose(np.mean(out, axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(out, axis=(0, 1, 2)), 1, atol=1e-5)
