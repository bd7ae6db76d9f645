"""Text as one stream of tokens, and batches of it as a function of (seed, step).

Where tokens come from (`data.path`):

- ``stdlib``: the source of Python's own standard library, as bytes: real text of about 11 MB on every machine.
- a text file, or a folder of text files (read recursively; files with a NUL byte are not text): bytes.
- a ``.bin`` file of uint16 tokens as nanoGPT writes them, or a folder with ``train.bin`` and ``val.bin`` as nanoGPT
  or ``cdl data`` write it (`cdl.data.token_files`): memory-mapped, never read whole.

Bytes are tokens 0..255; documents of a folder are separated by byte 0, in a fixed order that looks random (by hash of
their relative path), so that the held-out tail of the stream is a fair sample of files.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from cdl.data.token_files import FILES, fingerprint, map_tokens
from cdl.errors import UserError, check_share

__all__ = [
    "Corpus",
    "batches",
    "check_section",
    "data_arguments",
    "heldout_batches",
    "largest_token",
    "read_corpus",
    "source_files",
]

_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_OF_THIS_MACHINE = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


class Corpus(NamedTuple):
    """train, heldout: 1-D arrays of uint8, uint16 or uint32. fingerprint: a hash of the tokens, whatever the path."""

    train: np.ndarray
    heldout: np.ndarray
    fingerprint: str


def data_arguments() -> dict[str, Any]:
    """The `data` section of a config.

    path: see the module. batch_size: B sequences. seq_len: S predicted tokens a sequence. heldout: share of the
    stream, its tail, that is kept for evaluation (a folder with val.bin brings its own).
    """
    return dict(path="stdlib", batch_size=16, seq_len=64, heldout=0.05)


def check_section(section: ConfigDict) -> None:
    """All that can be wrong with a `data` section whatever its text.

    Raises:
      UserError: sizes that are not positive, or a share that is none.
    """
    for name in ("batch_size", "seq_len"):
        if section[name] < 1:
            raise UserError(f"data.{name}={section[name]} must be at least 1")
    check_share("data.heldout", section.heldout)


def read_corpus(path: str, heldout: float) -> Corpus:
    """Read or map the tokens behind `data.path`.

    Raises:
      UserError: nothing there, not a token file, or no text in it.
    """
    check_share("data.heldout", heldout)
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _split(_join(root, source_files(root)), heldout)
    where = Path(path).expanduser()
    if not path:
        raise UserError("data.path is empty; give 'stdlib', a text or .bin file, or a folder")
    if where.is_file():
        return _split(map_tokens(where) if where.suffix == ".bin" else _bytes(where), heldout)
    if (where / FILES["train"]).is_file():
        if not (where / FILES["val"]).is_file():
            raise UserError(f"data.path={path!r} has train.bin but no val.bin; give the .bin file itself")
        train, val = (map_tokens(where / name) for name in FILES.values())
        return Corpus(train, val, fingerprint(train, val))
    if where.is_dir():
        return _split(_join(where, _text_files(where)), heldout)
    raise UserError(f"data.path={path!r} does not exist; give 'stdlib', a text or .bin file, or a folder")


def batches(corpus: Corpus, section: ConfigDict, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Random access to batches: ``batches(...)[k-1]`` is the batch of update k, tokens_BxS1.

    Windows of S+1 tokens, S apart, are visited in a random order, each once an epoch, a new order every epoch. The
    last token of a window is the first of the next: each token but the first is predicted once an epoch.

    Args:
      corpus: from `read_corpus`.
      section: the `data` section of a config.
      seed: of the order.
      part: (p, P) for the rows [p*B/P, (p+1)*B/P) of every batch, which process p of P reads.

    Raises:
      UserError: the stream is too short for one batch, or P processes cannot share B sequences.
    """
    p, P = part
    windows = _windows("training", corpus.train, section)
    B, S = section.batch_size, section.seq_len
    if B % P:
        raise UserError(f"data.batch_size={B} cannot be shared by {P} processes; use a multiple of {P}")
    rows = grain.MapDataset.source(_Windows(corpus.train, windows, S)).seed(seed).shuffle().repeat()
    return rows.batch(B // P, drop_remainder=True)[p::P]  # the remainder of infinity, at B/P = 1, overflows


def heldout_batches(corpus: Corpus, section: ConfigDict, size: int) -> np.ndarray:
    """The fixed held-out set, tokens_ExBxS1: about `size` predicted tokens, spread evenly over the held-out stream.

    Raises:
      UserError: the held-out stream is too short for one batch.
    """
    B, S = section.batch_size, section.seq_len
    windows = _windows("evaluation", corpus.heldout, section)
    E = min(max(1, round(size / (B * S))), windows // B)
    starts = np.linspace(0, windows - 1, E * B).astype(np.int64) * S
    return np.stack([corpus.heldout[i : i + S + 1] for i in starts]).reshape(E, B, S + 1)


def largest_token(corpus: Corpus) -> int:
    """Over all of the text, whatever is said about it: a token beyond a model's vocabulary would read as NaN.

    A piece at a time, since the text may be larger than memory; in threads, which NumPy lets run side by side.
    """
    piece = 1 << 22
    streams = [tokens for tokens in (corpus.train, corpus.heldout) if len(tokens)]
    pieces = (tokens[i : i + piece] for tokens in streams for i in range(0, len(tokens), piece))
    with ThreadPoolExecutor() as threads:
        return max(threads.map(lambda tokens: int(tokens.max()), pieces))


class _Windows(grain.sources.RandomAccessDataSource):
    """Item i is window i."""

    def __init__(self, tokens: np.ndarray, n: int, S: int):
        self._tokens, self._n, self._S = tokens, n, S

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> np.ndarray:
        start = index * self._S
        return np.asarray(self._tokens[start : start + self._S + 1])

    def __repr__(self) -> str:
        return f"_Windows(n={self._n}, S={self._S})"


def _windows(what: str, tokens: np.ndarray, section: ConfigDict) -> int:
    check_section(section)
    B, S = section.batch_size, section.seq_len
    windows = (len(tokens) - 1) // S
    if windows < B:
        raise UserError(
            f"data.path={section.path!r} has {len(tokens)} tokens for {what}, one batch of {B} x {S} needs "
            f"{B * S + 1}; use a longer text, or a smaller data.batch_size or data.seq_len"
        )
    return windows


def _split(tokens: np.ndarray, heldout: float) -> Corpus:
    cut = round(len(tokens) * (1 - heldout))
    train, tail = tokens[:cut], tokens[cut:]
    return Corpus(train, tail, fingerprint(train, tail))


def _bytes(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        raise UserError(f"data.path={str(path)!r} is empty; give a file with text")
    return np.memmap(path, dtype=np.uint8, mode="r")


def _join(root: Path, files: Iterator[Path]) -> np.ndarray:
    by_hash = sorted(files, key=lambda f: hashlib.sha256(f.relative_to(root).as_posix().encode()).digest())
    texts = [text for f in by_hash if (text := f.read_bytes()) and b"\0" not in text]
    if not texts:
        raise UserError(f"data.path={str(root)!r} holds no text file; give a folder with text")
    return np.frombuffer(b"\0".join(texts), dtype=np.uint8)


def _text_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        subfolders[:] = [d for d in subfolders if not d.startswith(".")]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (f for f in files if f.is_file())  # no pipes, no links to nothing


def source_files(root: Path) -> Iterator[Path]:
    """The modules of a standard library, without tests and what differs from machine to machine."""
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        subfolders[:] = [d for d in subfolders if d not in _NOT_SOURCE]  # pruned: site-packages is large
        names = [n for n in names if n.endswith(".py") and not n.startswith(_OF_THIS_MACHINE)]
        yield from (Path(folder, n) for n in names)


def _unreadable(error: OSError) -> None:
    raise error
