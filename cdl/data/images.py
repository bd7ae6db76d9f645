"""Images for classification, and batches of them as a function of (seed, step).

Where images come from (`data.path`) is in `cdl.data.image_files`; how one is decoded and varied in `cdl.data.augment`.
A batch is dict(image=uint8 [B, S, S, 3], label=int32 [B], replaced=int32 [B]): grey images have three equal channels,
and values become numbers around 0 on the device (`standardise`), so that a quarter of the bytes travels there.

An image that cannot be decoded is replaced by the next one that can, in the order of the source, and marked in
`replaced`; which one depends on nothing else. `check_undecodable` ends a run in which this is frequent.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from cdl.data import augment
from cdl.data.image_files import Images, read_images
from cdl.data.image_sources import Arrays
from cdl.errors import UserError, check_share
from cdl.machine import cores

__all__ = [
    "Images",
    "batches",
    "check_section",
    "check_undecodable",
    "data_arguments",
    "first_decodable",
    "heldout_batches",
    "image_size",
    "iterate",
    "read_images",
    "standardise",
]

_POSITIVE = {"mean": "", "std": ", above 0"}
_TRIES = 100  # undecodable images in a row
_MOST_UNDECODABLE, _SEEN = 0.01, 500


def data_arguments() -> dict[str, Any]:
    """The `data` section of a config.

    path: see `cdl.data.image_files`. batch_size: B images. image_size: S, 0 for the size that the images have. augment:
    none, flip, crop_flip (CIFAR) or inception (ImageNet). heldout: share kept for evaluation where the source has no
    such part itself. mean, std: of each channel on the scale 0..1, ImageNet's.
    """
    return dict(
        path="digits",
        batch_size=128,
        image_size=0,
        augment="none",
        heldout=0.1,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def check_section(section: ConfigDict) -> None:
    """All that can be wrong with a `data` section whatever its images.

    Raises:
      UserError: a size, share, augmentation, mean or deviation that cannot be.
    """
    B, S = section.batch_size, section.image_size
    if B < 1:
        raise UserError(f"data.batch_size={B} must be at least 1")
    if S < 0 or not isinstance(S, int):
        raise UserError(f"data.image_size={S!r} must be a number of pixels, or 0 for the size that the images have")
    check_share("data.heldout", section.heldout)
    augment.augmentation(section.augment)
    for name, values in (("mean", section.mean), ("std", section.std)):
        numbers = [isinstance(x, int | float) and math.isfinite(x) and (x > 0 or name == "mean") for x in values]
        if numbers != [True] * 3:
            raise UserError(f"data.{name}={tuple(values)} must be three numbers, one a channel{_POSITIVE[name]}")


def batches(images: Images, section: ConfigDict, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Random access to batches: ``batches(...)[k-1]`` is the batch of update k.

    All images are visited in a random order, each once an epoch, a new order every epoch; batches go on over its end.
    An image of an update is varied the same way whatever the part, and whoever reads it. Arrays that are not resized
    are varied a batch at a time, all others one by one, with other draws of the same distribution.

    Args:
      images: from `read_images`.
      section: the config section `data`.
      seed: of order and variation, 0 to 2^32 - 1.
      part: (p, P) for rows p B/P to (p + 1) B/P of every batch, those of process p of P.

    Raises:
      UserError: fewer images than a batch has, a batch that P does not divide, or a setting that does not exist.
    """
    p, P = part
    B = _batch_size(images.train, section, "training")
    if B % P:
        raise UserError(f"data.batch_size={B} does not divide among {P} processes; give a multiple of {P}")
    S, train, name = image_size(images, section), images.train, section.augment
    if isinstance(train, Arrays) and train.image_NxHxWxC.shape[1:3] == (S, S) and name in augment.ARRAY_VIEWS:
        draw_batch = _DrawBatch(train, name, seed, B, slice(p * B // P, (p + 1) * B // P))
        return grain.MapDataset.range(2**62).seed(seed).random_map(draw_batch)  # without end
    draw = _Draw(train, S, name)
    items = grain.MapDataset.range(len(train)).seed(seed).shuffle().random_map(draw).repeat()
    return items.batch(B // P, drop_remainder=True)[p::P]  # the remainder of infinity, at B/P = 1, overflows


def iterate(dataset: grain.MapDataset, first: int, workers: int) -> grain.DatasetIterator:
    """The batches of `dataset` from item `first` on, made ahead of time. `close()` it to end its workers.

    Threads start at once and need no copies; Pillow lets go of the interpreter while it decodes and resizes. Processes
    take seconds to start, import the main script again, and hand batches over in /dev/shm, which has to hold some.
    `experiments/benchmarks/loading.py` compares the two: neither was always faster on two cores that others used too.

    Args:
      dataset: from `batches`, of images or of text.
      first: index of the first batch, k - 1 for update k.
      workers: 0 for threads in this process, one for each core; else this many worker processes.
    """
    rest = dataset[first:]
    if workers == 0:
        threads = cores()
        return iter(rest.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags of its own here, which only an absl program parses
    alone = rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    return iter(alone.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)))


def heldout_batches(images: Images, section: ConfigDict, size: int) -> dict[str, np.ndarray]:
    """The fixed held-out set: about `size` images, spread evenly over the held-out part, without variation.

    Returns:
      image: uint8 [E, B, S, S, 3]. label: int32 [E, B].

    Raises:
      UserError: too few images for one batch, or more than 1% of them undecodable.
    """
    B = _batch_size(images.heldout, section, "evaluation")
    draw = _Draw(images.heldout, image_size(images, section), "none")
    E = min(max(1, round(size / B)), len(images.heldout) // B)
    chosen = np.linspace(0, len(images.heldout) - 1, E * B).astype(np.int64)
    rng = np.random.default_rng(0)  # nothing is drawn from it
    with ThreadPoolExecutor(cores()) as pool:
        items = list(pool.map(lambda i: draw(int(i), rng), chosen))
    check_undecodable(section.path, sum(int(item["replaced"]) for item in items), len(items))
    image_NxSxSxC = np.stack([item["image"] for item in items])
    label_N = np.stack([item["label"] for item in items])
    return dict(image=image_NxSxSxC.reshape(E, B, *image_NxSxSxC.shape[1:]), label=label_N.reshape(E, B))


def image_size(images: Images, section: ConfigDict) -> int:
    """S, the side of the square images of a batch: `data.image_size`, or where it is 0 the size that they have.

    Raises:
      UserError: it cannot be; or it is 0, and the images (16 of them are looked at) are not square and of one size.
    """
    check_section(section)
    if section.image_size > 0:
        return section.image_size
    probes = np.unique(np.linspace(0, len(images.train) - 1, 16).astype(np.int64))
    sizes = sorted({size for i in probes if (size := _size_of(images.train[int(i)]["image"]))})
    if len(sizes) == 1 and sizes[0][0] == sizes[0][1]:
        return sizes[0][0]
    said = " and ".join(f"{width} x {height}" for height, width in sizes[:2]) or "unreadable"
    raise UserError(
        f"data.image_size=0 takes images of data.path={section.path!r} as they are, but they are {said}; "
        "give data.image_size=224, say"
    )


def standardise(image_BxHxWxC: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 images to float32, on the device: (x / 255 - mean) / std, a number of each for every channel."""
    mean_C, std_C = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (image_BxHxWxC.astype(jnp.float32) / 255 - mean_C) / std_C


def check_undecodable(path: str, replaced: int, seen: int) -> None:
    """Nothing as long as at most 1% of `seen` images were replaced, with a margin of three standard errors for chance,
    or fewer than 500 were seen.

    Raises:
      UserError: more than that, of the images behind data.path.
    """
    allowed = _MOST_UNDECODABLE * seen
    if seen >= _SEEN and replaced > allowed + 3 * allowed**0.5:
        raise UserError(
            f"data.path={path!r}: {replaced} of {seen} images could not be decoded, more than "
            f"{_MOST_UNDECODABLE:.0%}; remove or mend the broken files"
        )


def first_decodable(n: int, index: int, make: Callable[[int], dict[str, Any]], path: str) -> dict[str, Any]:
    """What `make` makes of item `index` of n, or else of the next one that does not raise `Undecodable`; `replaced`,
    int32, says whether it is another one.

    Raises:
      UserError: none of the next hundred can be decoded.
    """
    for tries in range(min(n, _TRIES)):
        try:
            return make((index + tries) % n) | dict(replaced=np.int32(tries > 0))
        except augment.Undecodable:
            continue
    raise UserError(
        f"{min(n, _TRIES)} images in a row, from image {index} of {path}, could not be decoded; give JPEG, PNG, BMP or "
        "WebP images"
    )


class _Draw:
    """From the index of an image to an item of a batch."""

    def __init__(self, source: grain.sources.RandomAccessDataSource, size: int, name: str):
        self._source, self._size, self._view = source, size, augment.augmentation(name)

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        def item(i: int) -> dict[str, Any]:
            record = self._source[i]
            return dict(image=self._view(record["image"], self._size, rng), label=np.int32(record["label"]))

        return first_decodable(len(self._source), int(index), item, repr(self._source))


class _DrawBatch:
    """From the index of a batch to some of its rows."""

    def __init__(self, source: Arrays, name: str, seed: int, B: int, rows: slice):
        self._source, self._name, self._seed, self._B, self._rows = source, name, seed, B, rows

    def __call__(self, k: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        n, B = len(self._source), self._B
        epochs = range(k * B // n, ((k + 1) * B - 1) // n + 1)  # one or two, since B <= n
        index_B = np.concatenate([_order(n, self._seed, epoch) for epoch in epochs])[k * B % n :][:B]
        image_BxSxSxC = augment.array_views(self._name, self._source.image_NxHxWxC, index_B, self._rows, rng)
        label_B = self._source.label_N[index_B[self._rows]].astype(np.int32)
        return dict(image=image_BxSxSxC, label=label_B, replaced=np.zeros_like(label_B))


@functools.lru_cache(maxsize=64)  # an epoch or two of each lane
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """All images in an order of its own for each epoch. Grain's shuffle takes longer than all else about a batch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def _batch_size(source: grain.sources.RandomAccessDataSource, section: ConfigDict, what: str) -> int:
    check_section(section)
    B, n = section.batch_size, len(source)
    if n < B:
        raise UserError(
            f"data.path={section.path!r} has {n} images for {what}, one batch needs {B}; give more images, a smaller "
            "data.batch_size or another data.heldout"
        )
    return B


def _size_of(image: bytes | np.ndarray) -> tuple[int, int] | None:
    try:
        return augment.size_of(image)
    except augment.Undecodable:
        return None
