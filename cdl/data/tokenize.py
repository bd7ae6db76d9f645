"""Documents to token files: ``train.bin``, ``val.bin`` and ``tokens.json`` in a new folder, by several processes.

The files depend on the documents and the tokenizer alone, not on the number of processes. A document is held out by a
hash of its text (of its first 256 KiB), so equal documents stay together and a new source moves no old document; a
single document gives its tail. The folder gets its name when it is complete.
"""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from cdl.data.documents import Documents
from cdl.data.token_files import DESCRIPTION, DTYPES, FILES, fingerprint
from cdl.data.vocabulary import Vocabulary, read_vocabulary
from cdl.errors import UserError
from cdl.machine import cores

__all__ = ["Progress", "write_token_files"]

_CHUNK = 1 << 20  # bytes of text that a process gets at a time
_PIECES = 1 << 12  # at most


class Progress(NamedTuple):
    """size, read: bytes of the sources, in all and so far. documents, tokens: written so far."""

    size: int
    read: int
    documents: int
    tokens: int


class _Chunk(NamedTuple):
    """texts: pieces of documents. last: which end one. held: which belong to held-out ones. read: of the sources."""

    texts: list[bytes]
    last: list[bool]
    held: list[bool]
    read: int


_Counts = dict[str, dict[str, Any]]  # documents and tokens of train and val


def write_token_files(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bytes",
    field: str = "text",
    val: float = 0.0005,
    workers: int | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Tokenize documents into a new folder that `cdl.data.text.read_corpus` reads.

    Args:
      sources: files and folders; see `cdl.data.documents`.
      out: the folder to make.
      tokenizer: see `cdl.data.vocabulary`.
      field: of JSON lines and Parquet, the one with the text.
      val: share of the documents that is held out.
      workers: processes beside this one, four a core at most; by default one for each, and with 1 none but this.
      watch: told of progress, a few times a second at most.

    Returns:
      What ``tokens.json`` holds.

    Raises:
      UserError: `out` exists, no documents, too few to hold one out, or anything in the sources or the tokenizer that
        cannot be read. Nothing is left under the name of `out`.
    """
    if os.path.lexists(out):
        raise UserError(f"--out={out} exists already; choose a new folder")
    if not 0 < val < 1:
        raise UserError(f"--val={val} must be a share in (0, 1)")
    workers = cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers={workers} must be at least 1")
    workers = min(workers, 4 * cores())  # more would only take memory: hundreds of megabytes each
    vocabulary = read_vocabulary(tokenizer)
    documents = Documents(sources, field)
    dtype = "uint16" if vocabulary.size <= 1 << 16 else "uint32"
    with _new_folder(out) as folder:
        split = _Split(val)
        with closing(_encoded(_chunks(documents, split), vocabulary, tokenizer, workers)) as encoded:
            counts = _write(folder, encoded, DTYPES[dtype], lambda *done: watch(Progress(documents.size, *done)))
        counts = split.checked(folder, counts, DTYPES[dtype])
        for name, of_file in counts.items():
            of_file["fingerprint"] = fingerprint(np.memmap(folder / FILES[name], DTYPES[dtype], mode="r"))
        about = {
            "dtype": dtype,
            "vocab_size": vocabulary.size,
            "end_token": vocabulary.end,
            "tokenizer": vocabulary.about,
            **counts,
            "field": field,
            "held_out_share": val,
            "sources": [
                {"path": str(s.path.resolve()), "files": len(s.files), "passed_over": s.passed_over}
                for s in documents.sources
            ],
            "source_bytes": documents.size,
            "replaced_characters": documents.replaced,
            "empty_documents": documents.empty,
            "cdl": version("cdl"),
        }
        (folder / DESCRIPTION).write_text(json.dumps(about, indent=1))
    return about


@contextmanager
def _new_folder(out: Path) -> Generator[Path]:
    """A folder under a temporary name beside `out`, renamed at the end, removed where something fails; for one process
    at a time."""
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial"
    lock = FileLock(out.parent / f".{out.name}.lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"--out={out}: another cdl data writes it; wait, or choose another --out") from None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
            raise
    kept = False
    try:
        if folder.is_dir():
            shutil.rmtree(folder)  # of one that was killed
        folder.mkdir()
        yield folder
        for file in folder.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        if kept := os.path.lexists(out):
            raise UserError(f"--out={out} was made meanwhile; the tokens are in {folder}, move that where you like")
        folder.rename(out)
    except OSError as e:
        if e.filename:
            raise
        raise UserError(f"--out={out} cannot be written ({e.strerror or e}); nothing is kept, make room there") from e
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _chunks(documents: Documents, split: "_Split") -> Iterator[_Chunk]:
    texts, last, held, size, begins, is_held = [], [], [], 0, True, False
    for piece in documents:
        is_held = split.holds_out(piece.text) if begins else is_held
        begins = piece.last
        texts.append(piece.text)
        last.append(piece.last)
        held.append(is_held)
        size += len(piece.text)
        if size >= _CHUNK or len(texts) == _PIECES:
            yield _Chunk(texts, last, held, documents.read)
            texts, last, held, size = [], [], [], 0
    if texts:
        yield _Chunk(texts, last, held, documents.read)


def _encoded(
    chunks: Iterable[_Chunk], vocabulary: Vocabulary, tokenizer: str, workers: int
) -> Generator[tuple[_Chunk, tuple[bytes, bytes]]]:
    """Chunks in order with their tokens, for training and held out; at most two a process are under way."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, _encode(chunk, vocabulary)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads of whoever calls in a broken state
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer,))
    under_way: deque[tuple[_Chunk, Future[tuple[bytes, bytes]]]] = deque()
    try:
        for chunk in chunks:
            under_way.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(under_way) == 2 * workers:
                chunk, future = under_way.popleft()
                yield chunk, future.result()
        for chunk, future in under_way:
            yield chunk, future.result()
    except BrokenProcessPool as e:
        raise UserError(f"a worker process ended (out of memory?); try fewer than --workers={workers}") from e
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(chunk: _Chunk, vocabulary: Vocabulary) -> tuple[bytes, bytes]:
    """Tokens for training, tokens held out."""
    streams: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    end = np.array([vocabulary.end])
    for text, last, held in zip(chunk.texts, chunk.last, chunk.held, strict=True):
        streams[held].append(vocabulary.encode(text))
        if last:
            streams[held].append(end.astype(streams[held][-1].dtype))
    train, val = (b"".join(tokens.astype(tokens.dtype.newbyteorder("<")).tobytes() for tokens in s) for s in streams)
    return train, val


_in_worker: Vocabulary


def _start_worker(tokenizer: str) -> None:
    global _in_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()  # even if it was killed
    _in_worker = read_vocabulary(tokenizer)


def _encode_in_worker(chunk: _Chunk) -> tuple[bytes, bytes]:
    return _encode(chunk, _in_worker)


def _write(
    folder: Path,
    encoded: Iterable[tuple[_Chunk, tuple[bytes, bytes]]],
    dtype: np.dtype,
    watch: Callable[[int, int, int], None],
) -> _Counts:
    counts: _Counts = {name: {"documents": 0, "tokens": 0} for name in FILES}
    train, val = (folder / name for name in FILES.values())
    with train.open("wb") as train_file, val.open("wb") as val_file:
        for chunk, streams in encoded:
            for held, of_file, file in zip((False, True), counts.values(), (train_file, val_file), strict=True):
                file.write(streams[held])
                of_file["tokens"] += len(streams[held]) // dtype.itemsize
                of_file["documents"] += list(zip(chunk.last, chunk.held, strict=True)).count((True, held))
            watch(chunk.read, *(sum(of_file[key] for of_file in counts.values()) for key in ("documents", "tokens")))
    return counts


class _Split:
    """Which documents are held out: those whose hash, in [0, 1), is below the share."""

    def __init__(self, val: float):
        self._val, self._least, self._most = val, 1.0, 0.0

    def holds_out(self, text: bytes) -> bool:
        """Also remembers the hash."""
        mark = int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) / (1 << 48)
        self._least, self._most = min(mark, self._least), max(mark, self._most)
        return mark < self._val

    def checked(self, folder: Path, counts: _Counts, dtype: np.dtype) -> _Counts:
        """Is there something on both sides? Of a single document the tail is held out."""
        n = sum(of_file["documents"] for of_file in counts.values())
        if n == 0:
            raise UserError("there is no document with text in the sources; give others, or choose another --field")
        if n == 1:
            return self._tail(folder, counts, dtype)
        if all(of_file["documents"] for of_file in counts.values()):
            return counts
        if self._least == self._most:
            raise UserError(f"all {n} documents begin alike, so none can be held out by its beginning; give others")
        which = "all" if counts["val"]["documents"] else "none"
        least, most = math.ceil(self._least * 1e6) / 1e6, math.floor(self._most * 1e6) / 1e6
        raise UserError(f"--val={self._val} holds out {which} of {n} documents; choose a share from {least} to {most}")

    def _tail(self, folder: Path, counts: _Counts, dtype: np.dtype) -> _Counts:
        (whole,) = (name for name in FILES if counts[name]["documents"])
        tokens = counts[whole]["tokens"]
        held = round(self._val * tokens)
        if not 0 < held < tokens:
            raise UserError(f"--val={self._val} of one document of {tokens} tokens is {held}; choose another share")
        train, val = (folder / name for name in FILES.values())
        if whole == "val":
            val.replace(train)
        with train.open("r+b") as source, val.open("wb") as target:
            source.seek((tokens - held) * dtype.itemsize)
            shutil.copyfileobj(source, target)
            source.truncate((tokens - held) * dtype.itemsize)
        return {"train": {"documents": 1, "tokens": tokens - held}, "val": {"documents": 1, "tokens": held}}
