"""Images of one size that are read into memory: scikit-learn's digits, idx files, CIFAR."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cdl.data.image_sources import Arrays, Parts, class_count
from cdl.errors import UserError

__all__ = ["CIFAR", "cifar", "digits", "idx"]


def digits() -> Parts:
    from sklearn.datasets import load_digits  # two seconds, which other sources need not spend

    loaded: Any = load_digits()  # 0 to 16
    source = Arrays(np.round(loaded.images * (255 / 16)).astype(np.uint8)[..., None], loaded.target)
    return Parts(source, None, 10, source.digest())


def _in_memory(root: Path, train: Arrays, heldout: Arrays, classes: int | None) -> Parts:
    classes = class_count(root, train.label_N, heldout.label_N, classes)
    return Parts(train, heldout, classes, train.digest() + heldout.digest())


def idx(root: Path) -> Parts:
    train, heldout = (
        Arrays(_idx_array(root, f"{part}-images", 3)[..., None], _idx_array(root, f"{part}-labels", 1).astype(int))
        for part in ("train", "t10k")
    )
    for part, source in (("train", train), ("t10k", heldout)):
        if len(source.image_NxHxWxC) != len(source):
            raise UserError(
                f"data.path={str(root)!r}: {part} has {len(source.image_NxHxWxC)} images but {len(source)} labels; "
                "use files of one download"
            )
    return _in_memory(root, train, heldout, None)


def _idx_array(root: Path, stem: str, dimensions: int) -> np.ndarray:
    """An idx file: bytes 0, 0, 8 (uint8), the number of dimensions; each as a big-endian int32; the values."""
    names = [f"{stem}{dot}idx{dimensions}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    file = next((root / name for name in names if (root / name).is_file()), None)
    if file is None:
        raise UserError(f"data.path={str(root)!r} has no {names[0]} (or .gz); give a folder with all four idx files")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, ValueError) as e:
        raise UserError(f"{str(file)!r} cannot be unpacked ({e}); download it again") from e
    magic = bytes([0, 0, 8, dimensions])
    if data[:4] != magic:
        raise UserError(f"{str(file)!r} begins with {data[:4].hex()}, an idx file of it with {magic.hex()}; replace it")
    header = 4 + 4 * dimensions
    shape = struct.unpack_from(f">{dimensions}I", data, 4) if len(data) >= header else (0,)
    if len(data) != header + int(np.prod(shape, dtype=object)):
        raise UserError(f"{str(file)!r} has {len(data)} bytes, not what its header says; download it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


class Cifar(NamedTuple):
    """A version of CIFAR: its files, its classes, and where the label is."""

    train: tuple[str, ...]
    heldout: str
    classes: int
    label_bytes: int  # before an image, of which the last counts; 0 for pickles
    label_key: bytes = b""


_FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR = (
    Cifar(tuple(f"{name}.bin" for name in _FIVE), "test_batch.bin", 10, 1),
    Cifar(("train.bin",), "test.bin", 100, 2),
    Cifar(_FIVE, "test_batch", 10, 0, b"labels"),
    Cifar(("train",), "test", 100, 0, b"fine_labels"),
)


def cifar(root: Path, kind: Cifar) -> Parts:
    for name in (*kind.train, kind.heldout):
        if not (root / name).is_file():
            raise UserError(f"data.path={str(root)!r} has {kind.train[0]} but no {name}; unpack the download again")
    read = _cifar_binary if kind.label_bytes else _cifar_pickle
    files = [read(root / name, kind) for name in (*kind.train, kind.heldout)]
    image_NxHxWxC, label_N = (np.concatenate(arrays) for arrays in zip(*files[:-1], strict=True))
    return _in_memory(root, Arrays(image_NxHxWxC, label_N), Arrays(*files[-1]), kind.classes)


def _cifar_binary(file: Path, kind: Cifar) -> tuple[np.ndarray, np.ndarray]:
    data, row = np.fromfile(file, np.uint8), kind.label_bytes + 3072
    if len(data) == 0 or len(data) % row:
        raise UserError(f"{str(file)!r} has {len(data)} bytes, no multiple of {row}: no CIFAR file; download it again")
    data_NxF = data.reshape(-1, row)
    return _cifar_images(data_NxF[:, kind.label_bytes :]), data_NxF[:, kind.label_bytes - 1].astype(int)


def _cifar_pickle(file: Path, kind: Cifar) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as f:
            content = _ArraysOnly(f, encoding="bytes").load()
        data_NxF, label_N = np.asarray(content[b"data"]), np.asarray(content[kind.label_key])
    except Exception as e:  # a broken pickle can raise anything
        raise UserError(f"{str(file)!r} is no CIFAR pickle ({type(e).__name__}: {e}); download it again") from e
    if data_NxF.dtype != np.uint8 or data_NxF.shape != (len(label_N), 3072) or label_N.dtype.kind != "i":
        raise UserError(f"{str(file)!r} has data of shape {data_NxF.shape}, not {len(label_N)} CIFAR images")
    return _cifar_images(data_NxF), label_N.astype(int)


def _cifar_images(data_NxF: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data_NxF.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _ArraysOnly(pickle.Unpickler):
    """Knows NumPy arrays and what needs no import; a pickle can otherwise run any code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("_codecs", "encode"): _encode,  # how Python 3 writes bytes in a pickle for Python 2
        }
        if (module_name, global_name) not in known:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed")
        return known[module_name, global_name]


def _reconstruct(kind: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("not an array as NumPy pickles it")
    return np.ndarray(shape, dtype)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")
