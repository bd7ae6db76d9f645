"""Readers of labelled images: random access to encoded bytes or arrays, whatever they lie in.

What `data.path` may be:

- ``digits``: the 1,797 digits of scikit-learn, 8 x 8, in 10 classes.
- a folder of a folder for each class, ``root/<class>/*.jpg`` (jpeg, png, bmp, webp; deeper folders too), or
  ``root/train/<class>`` and ``root/val/<class>``. Classes are numbered in the order of their names.
- the folder of CIFAR-10 or CIFAR-100 (fine labels), binary or Python version.
- the idx files of MNIST and its kin, gzipped or not: ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte``.
- Parquet shards, ``train-*.parquet`` and perhaps ``validation-*`` or ``test-*``, with columns image (bytes, or the
  struct of bytes and path that Hugging Face writes) and label (integers).
- ArrayRecord shards, ``train-*.array_record`` and perhaps ``validation-*``, as `write_array_records` makes them.

Where there is no held-out part, a share of the images is taken out by a fixed order that looks random. Parquet can only
be read by row groups, so that one image in random order costs a whole group; what is larger than memory is best
rewritten once with `write_array_records`.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from cdl.data.image_arrays import CIFAR, cifar, digits, idx
from cdl.data.image_shards import PROBES, array_record, parquet, write_array_records
from cdl.data.image_sources import HELDOUT_NAMES, Images, Parts, Source, fixed_order, subset
from cdl.errors import UserError, check_share

__all__ = ["Images", "read_images", "write_array_records"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def read_images(path: str, heldout: float) -> Images:
    """Open the images behind `data.path`. heldout: the share to take out where the source has no part for it.

    Raises:
      UserError: nothing there, no images, files that are not what they should be, or labels that do not fit.
    """
    check_share("data.heldout", heldout)
    parts = digits() if path == "digits" else _read_folder(path)
    n = len(parts.train)
    if parts.heldout is None:
        train_N, rest_N = np.split(fixed_order(n), [round(n * (1 - heldout))])
        train, rest = (subset(parts.train, np.sort(index_N)) for index_N in (train_N, rest_N))
    else:
        train, rest = parts.train, parts.heldout
    split = f"{parts.content},{parts.classes},{len(train)},{len(rest)}"
    return Images(train, rest, parts.classes, hashlib.sha256(split.encode()).hexdigest()[:16])


def _read_folder(path: str) -> Parts:
    root = Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(f"data.path={path!r} does not exist; give 'digits' or a folder of images")
    if not root.is_dir():
        raise UserError(f"data.path={path!r} is a file; give the folder that it lies in")
    if any(root.glob("*.parquet")):
        return parquet(root)
    if any(root.glob("*.array_record")):
        return array_record(root)
    if any(root.glob("*[-.]idx3-ubyte*")):
        return idx(root)
    for kind in CIFAR:
        if (root / kind.train[0]).is_file():
            return cifar(root, kind)
    return _class_folders(root)


class _Files(Source):
    """Image files. Their names are an array of bytes: a million of them take tens of MB, in each worker."""

    def __init__(self, root: Path, name_N: np.ndarray, label_N: np.ndarray):
        self._root, self._name_N, self._label_N = root, name_N, label_N

    def __len__(self) -> int:
        return len(self._label_N)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        file = self._root / os.fsdecode(bytes(self._name_N[index]))
        try:
            image = file.read_bytes()
        except OSError:
            image = b""  # no image, as others that cannot be decoded
        return dict(image=image, label=int(self._label_N[index]))

    def __repr__(self) -> str:
        return f"_Files(root={str(self._root)!r}, n={len(self)})"

    def digest(self) -> str:
        """Of all names and of some contents."""
        h = hashlib.sha256(b"\0".join(self._name_N.tolist()))
        for i in np.unique(np.linspace(0, len(self) - 1, PROBES).astype(np.int64)):
            h.update(hashlib.sha256(self[i]["image"]).digest())
        return h.hexdigest()


def _class_folders(root: Path) -> Parts:
    if not (root / "train").is_dir() or not _subfolders(root / "train"):
        source, classes = _files_of(root)  # a class may be called train
        return Parts(source, None, len(classes), source.digest())
    train, classes = _files_of(root / "train")
    name = next((name for name in HELDOUT_NAMES if (root / name).is_dir()), None)
    if name is None:
        return Parts(train, None, len(classes), train.digest())
    heldout, others = _files_of(root / name)
    if classes != others:
        only = min({*classes} ^ {*others})
        raise UserError(
            f"data.path={str(root)!r}: the class {only!r} has images in {'train' if only in classes else name} only; "
            f"give the folders train and {name} the same classes"
        )
    return Parts(train, heldout, len(classes), train.digest() + heldout.digest())


def _files_of(root: Path) -> tuple[_Files, list[str]]:
    """The images of all class folders, and the classes that have some; both in the order of their names."""
    names, label, classes = [], [], []
    for folder in _subfolders(root):
        found = _images_in(root, folder)
        if found:
            names += sorted(found)
            label += [len(classes)] * len(found)
            classes.append(folder)
    if not names:
        raise UserError(
            f"data.path={str(root)!r} holds no images; give a folder with a folder of {', '.join(SUFFIXES)} files for "
            "each class, or one with CIFAR, idx, Parquet or ArrayRecord files"
        )
    return _Files(root, np.array(names), np.array(label)), classes


def _subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images_in(root: Path, folder: str) -> list[bytes]:
    """Paths relative to root, with / between their parts."""
    found = []
    for where, subfolders, files in os.walk(root / folder):
        subfolders[:] = [d for d in subfolders if not d.startswith(".")]
        prefix = os.fsencode(Path(where).relative_to(root).as_posix() + "/")
        found += [prefix + os.fsencode(f) for f in files if f.lower().endswith(SUFFIXES) and f[0] != "."]
    return found
