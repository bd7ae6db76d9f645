"""Token files on disk: ``train.bin`` and ``val.bin`` as nanoGPT writes them, and ``tokens.json``, which describes them.

A file is a plain array of little-endian unsigned integers. Without a ``tokens.json`` beside it they are 16 bits wide.
With one (`cdl data` writes it; by hand ``{"dtype": "uint32", "vocab_size": 128256}`` is enough) they are what it says,
and a file that is not the one described is an error.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cdl.errors import UserError

__all__ = ["DESCRIPTION", "DTYPES", "FILES", "fingerprint", "map_tokens"]

DESCRIPTION = "tokens.json"
FILES = {"train": "train.bin", "val": "val.bin"}
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_BLOCK = 1 << 16
_PROBED = 256  # blocks
_MAGIC = {
    b"\x93NUMPY": "a NumPy .npy file",
    b"PK\x03\x04": "a zip archive (.npz, or saved by torch)",
    b"\x1f\x8b\x08": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PAR1": "a Parquet file",
    b"\x89HDF\r\n": "an HDF5 file",
}


def map_tokens(path: Path) -> np.ndarray:
    """The tokens of a ``.bin`` file, memory-mapped: uint16, or the dtype in ``tokens.json`` beside it.

    Raises:
      UserError: the file is empty, no array of that dtype, evidently something else, or not what ``tokens.json``
        describes.
    """
    about = _description(path)
    dtype = DTYPES[about["dtype"]] if about else DTYPES["uint16"]
    size = path.stat().st_size
    if looks := _looks_like(path):
        raise UserError(
            f"data.path: {str(path)!r} is no array of tokens, it looks like {looks}; make token files with `cdl data`"
        )
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"data.path: {str(path)!r} has {size} bytes, no array of {dtype.name} tokens; write it again")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if not about:
        _check_width(path, tokens)
        return tokens
    of_file = about.get(path.stem, {})
    expected = of_file.get("tokens", len(tokens))
    if len(tokens) != expected:
        wrong = f"has {len(tokens)} tokens where {DESCRIPTION} says {expected}"
    elif (most := max(int(block.max()) for block in _blocks(tokens))) >= about["vocab_size"]:
        wrong = f"has token {most} where {DESCRIPTION} says vocab_size={about['vocab_size']}"
    elif of_file.get("fingerprint", made := fingerprint(tokens)) != made:
        wrong = f"was changed after {DESCRIPTION} was written"
    else:
        return tokens
    raise UserError(f"data.path: {str(path)!r} {wrong}; make the folder again with `cdl data`")


def fingerprint(*streams: np.ndarray) -> str:
    """sha256 over the lengths and 256 evenly spaced blocks of 64 Ki tokens: whole for small data, a probe of large."""
    h = hashlib.sha256()
    for tokens in streams:
        h.update(f"{tokens.dtype}{len(tokens)};".encode())
        for block in _blocks(tokens):
            h.update(np.ascontiguousarray(block).data)
    return h.hexdigest()[:16]


def _blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    starts = np.unique(np.linspace(0, max(len(tokens) - _BLOCK, 0), _PROBED).astype(np.int64))
    for i in starts if len(tokens) > _PROBED * _BLOCK else range(0, len(tokens), _BLOCK):
        yield tokens[i : i + _BLOCK]


def _description(path: Path) -> dict[str, Any] | None:
    where = path.parent / DESCRIPTION
    if path.name not in FILES.values() or not where.is_file():
        return None
    try:
        about = json.loads(where.read_bytes())
    except ValueError as e:
        raise UserError(f"{str(where)!r} is no JSON ({e}); make the folder again with `cdl data`") from e
    if not isinstance(about, dict) or about.get("dtype") not in DTYPES or not isinstance(about.get("vocab_size"), int):
        raise UserError(f"{str(where)!r} needs dtype ({' or '.join(DTYPES)}) and vocab_size; write both")
    return about


def _looks_like(path: Path) -> str | None:
    """What a file evidently is, if not tokens."""
    with path.open("rb") as f:
        head = f.read(_BLOCK)
        f.seek(max(path.stat().st_size - 1, 0))
        last = f.read(1)
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if last == b"." and (head[:3] in (b"\x80\x04\x95", b"\x80\x05\x95") or head[:2] in (b"\x80\x02", b"\x80\x03")):
        return "a Python pickle"
    return "text" if len(head) >= 32 and _is_text(head) else None


def _is_text(head: bytes) -> bool:
    try:
        text = head[: -3 if len(head) == _BLOCK else None].decode("utf-8", errors="strict")
    except UnicodeDecodeError as e:
        if len(head) < _BLOCK or e.start < len(head) - 6:  # else the end of the sample cut a character
            return False
        text = head[: e.start].decode("utf-8")
    return not any(ord(c) < 32 and c not in "\t\n\r\f" for c in set(text))


def _check_width(path: Path, tokens: np.ndarray) -> None:
    """Wider integers read as uint16 have nothing, or next to nothing, in every second place."""
    sample = np.asarray(tokens[:_BLOCK])
    low, high = sample[::2], sample[1::2]
    if len(sample) >= 64 and high.max() <= 3 < low.max():
        raise UserError(
            f"data.path: {str(path)!r} looks like integers of 32 or more bits; if they are uint32, write a "
            f'{DESCRIPTION} beside it: {{"dtype": "uint32", "vocab_size": ...}}'
        )
