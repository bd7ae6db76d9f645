"""What a source of labelled images is: random access to encoded bytes or arrays, in two parts."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np

from cdl.errors import UserError

__all__ = ["HELDOUT_NAMES", "Arrays", "Images", "Parts", "Source", "class_count", "fixed_order", "subset"]

HELDOUT_NAMES = ("validation", "val", "test")  # of the folder or the shards of a held-out part, the first that exists

Source = grain.sources.RandomAccessDataSource


class Images(NamedTuple):
    """train, heldout: sources of dict(image=encoded bytes or uint8 [H, W, C], label=int), label in 0..classes-1.

    fingerprint: a hash of the images (of samples where they are many) and of how they are split, whatever the path.
    """

    train: Source
    heldout: Source
    classes: int
    fingerprint: str


class Parts(NamedTuple):
    """What a reader finds. heldout None: to be taken out of train."""

    train: Source
    heldout: Source | None
    classes: int
    content: str


class Arrays(Source):
    """Images of one size, in memory."""

    def __init__(self, image_NxHxWxC: np.ndarray, label_N: np.ndarray):
        self.image_NxHxWxC, self.label_N = image_NxHxWxC, label_N

    def __len__(self) -> int:
        return len(self.label_N)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return dict(image=self.image_NxHxWxC[index], label=int(self.label_N[index]))

    def __repr__(self) -> str:
        return f"Arrays{self.image_NxHxWxC.shape}"

    def digest(self) -> str:
        h = hashlib.sha256(f"{self.image_NxHxWxC.shape}".encode())
        h.update(np.ascontiguousarray(self.image_NxHxWxC).data)
        h.update(self.label_N.astype("<i8").data)
        return h.hexdigest()


def subset(source: Source, index_N: np.ndarray) -> Source:
    """Some images of a source. Those of arrays are copied, so that they are arrays again."""
    if isinstance(source, Arrays):
        return Arrays(source.image_NxHxWxC[index_N], source.label_N[index_N])
    return _Subset(source, index_N)


class _Subset(Source):
    """Some images of a source that are read one by one."""

    def __init__(self, source: Source, index_N: np.ndarray):
        self._source, self._index_N = source, index_N

    def __len__(self) -> int:
        return len(self._index_N)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return self._source[int(self._index_N[index])]

    def __repr__(self) -> str:
        return f"_Subset({self._source!r}, n={len(self)})"


def fixed_order(n: int) -> np.ndarray:
    """0..n-1 in the order of a hash of the number (the finalizer of SplitMix64), the same everywhere and always."""
    z_N = (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z_N ^ (z_N >> np.uint64(31)), kind="stable")


def class_count(root: Path, train_label_N: np.ndarray, heldout_label_N: np.ndarray, classes: int | None) -> int:
    """How many classes there are: as given, or the largest training label and 1. All labels have to fit."""
    if not len(train_label_N):
        raise UserError(f"data.path={str(root)!r} holds no images for training; give more")
    classes = int(train_label_N.max()) + 1 if classes is None else classes
    for part, label_N in (("train", train_label_N), ("held-out", heldout_label_N)):
        wrong_N = label_N[(label_N < 0) | (label_N >= classes)]
        if len(wrong_N):
            raise UserError(
                f"data.path={str(root)!r}: {len(wrong_N)} {part} images have labels out of 0..{classes - 1}, such as "
                f"{int(wrong_N[0])}; leave these images out or mend their labels"
            )
    return classes
