"""Images with questions and answers, for vision-language models, with the loss on the answers alone.

Where they come from (`data.path`):

- ``easy-vqa``: the records of the PyPI package of that name, 4,000 images of shapes and 38,575 questions to learn from,
  1,000 images and 9,673 questions held out.
- a Parquet file, or a folder of them (read recursively), as The Cauldron (Laurençon et al., 2024) is published: columns
  `images`, a list of structs with encoded `bytes`, and `texts`, a list of structs with `user` and `assistant`.

A batch is dict(image=uint8 [B, M, H, H, 3], tokens=int32 [B, S+1], slot=int32 [B, S], weight=float32 [B, S]). A row
begins with the places of its images, `data.image_tokens` each, then come its turns (`cdl.data.conversations`). `slot`
is which of the M * image_tokens image tokens of the row stands at a place, -1 where the token itself does.
"""

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from cdl.data import augment, conversations
from cdl.data.conversations import Conversations, Rows, Turns, fitting, holds_out, shuffled, spread, tokenize
from cdl.data.vocabulary import read_vocabulary
from cdl.errors import UserError

__all__ = ["Records", "batches", "check_section", "data_arguments", "heldout_batches", "read_records"]

_COLUMNS = ("images", "texts")
_GROUPS_KEPT = 8  # row groups of images that stay in memory


class Part(NamedTuple):
    """images_P: number of images of each record. image: (record, which of its images) -> encoded bytes."""

    conversations: Conversations
    images_P: np.ndarray
    image: "_Package | _Parquet"


class Records(NamedTuple):
    """fingerprint: a hash of all tokens and images (of Parquet, of the images' sizes), whatever the path."""

    train: Part
    heldout: Part
    fingerprint: str


def data_arguments() -> dict[str, Any]:
    """The `data` section of a config.

    path: see the module. batch_size: B records. seq_len: S positions of a row, images among them; longer records are
    left out. heldout: share of the records that is kept for evaluation (easy-vqa brings its own). tokenizer: see
    `cdl.data.vocabulary.read_vocabulary`. image_size: H, to which images are stretched. images: M, the most a record
    may have; records with more are left out. image_tokens: of each image, as the model makes them. mean, std: of each
    channel on the scale 0..1, SigLIP's.
    """
    return dict(
        path="easy-vqa",
        batch_size=16,
        seq_len=80,
        heldout=0.05,
        tokenizer="bytes",
        image_size=64,
        images=1,
        image_tokens=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def check_section(section: ConfigDict) -> None:
    """All that can be wrong with a `data` section whatever its records.

    Raises:
      UserError: a size or share that cannot be, or rows too short for their images.
    """
    conversations.check_section(section)
    for name in ("image_size", "images", "image_tokens"):
        if section[name] < 1:
            raise UserError(f"data.{name}={section[name]} must be at least 1")
    places = section.images * section.image_tokens
    if places >= section.seq_len:
        raise UserError(
            f"data.images={section.images} x data.image_tokens={section.image_tokens} are {places} places of the "
            f"data.seq_len={section.seq_len}, which leaves none for text; raise data.seq_len or use fewer images"
        )


def read_records(section: ConfigDict) -> Records:
    """Read and tokenize the texts behind `data.path`; images stay where they are.

    Raises:
      UserError: nothing there, not these columns, or a tokenizer that cannot be read.
    """
    check_section(section)
    return _read(section.path, section.heldout, section.tokenizer)


def batches(records: Records, section: ConfigDict, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Random access to batches: ``batches(...)[k-1]`` is that of update k. All records are visited in a random order,
    each once an epoch, a new order every epoch.

    Args:
      section: the `data` section of a config.
      seed: of the order.
      part: (p, P) for the rows [p*B/P, (p+1)*B/P) of every batch, which process p of P reads.

    Raises:
      UserError: too few records for one batch, or P processes cannot share B of them.
    """
    return shuffled(_Rows(records.train, section, "training"), section, seed, part)


def heldout_batches(records: Records, section: ConfigDict, size: int) -> dict[str, np.ndarray]:
    """The fixed held-out set, as `batches` with a leading axis E: as many as have about `size` learned tokens, spread
    evenly over the held-out records.

    Raises:
      UserError: too few records for one batch.
    """
    rows = _Rows(records.heldout, section, "evaluation")
    return spread(rows, records.heldout.conversations, section, size)


class _Rows(grain.sources.RandomAccessDataSource):
    """Item i is a row of a batch."""

    def __init__(self, part: Part, section: ConfigDict, what: str):
        M, n = section.images, section.image_tokens
        before_P = np.where(part.images_P <= M, part.images_P * n, section.seq_len + 2)  # too many: fits into no row
        self._index = fitting(part.conversations, section, what, before_P)
        self._text = Rows(part.conversations, self._index, section.seq_len, before_P)
        self._part, self._M, self._n, self._size, self._path = part, M, n, section.image_size, section.path

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        p = int(self._index[index])
        image_MxHxHxC = np.zeros((self._M, self._size, self._size, 3), np.uint8)
        images = int(self._part.images_P[p])
        for m in range(images):
            try:
                image_MxHxHxC[m] = augment.whole_view(self._part.image(p, m), self._size)
            except augment.Undecodable as e:
                raise UserError(
                    f"data.path={self._path!r}: image {m} of record {p} cannot be decoded ({e}); remove the record"
                ) from e
        row = self._text[index]
        place_S = np.arange(len(row["weight"]), dtype=np.int32)
        return row | dict(image=image_MxHxHxC, slot=np.where(place_S < images * self._n, place_S, np.int32(-1)))

    def __repr__(self) -> str:
        return f"_Rows(n={len(self)}, of {self._path})"


@functools.lru_cache(maxsize=4)
def _read(path: str, heldout: float, tokenizer: str) -> Records:
    vocabulary = read_vocabulary(tokenizer)
    if path == "easy-vqa":
        return _records(*(_package(name, vocabulary) for name in ("train", "test")))
    where = Path(path).expanduser()
    files = [where] if path and where.is_file() else sorted(where.rglob("*.parquet")) if path else []
    if not files:
        raise UserError(f"data.path={path!r} has no Parquet files; give a file or folder of them, or 'easy-vqa'")
    return _parquet(files, heldout, vocabulary)


def _records(train: Part, heldout: Part) -> Records:
    h = hashlib.sha256(conversations.fingerprint(train.conversations, heldout.conversations).encode())
    for part in (train, heldout):
        h.update(part.images_P.astype("<i8").data)
        h.update(part.image.digest().encode())
    return Records(train, heldout, h.hexdigest()[:16])


class _Package:
    """Images of easy-vqa: one a record, a small file each."""

    def __init__(self, folder: Path, id_P: Sequence[int]):
        self._folder, self._id_P = folder, id_P

    def __call__(self, p: int, m: int) -> bytes:
        return (self._folder / f"{self._id_P[p]}.png").read_bytes()

    def digest(self) -> str:
        h = hashlib.sha256()
        for id in sorted(set(self._id_P)):
            h.update((self._folder / f"{id}.png").read_bytes())
        return h.hexdigest()


def _package(name: str, vocabulary: Any) -> Part:
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("data.path='easy-vqa' needs the package easy-vqa: pip install easy-vqa")
    folder = Path(spec.origin).parent / "data" / name
    questions: list[tuple[str, str, int]] = json.loads((folder / "questions.json").read_text())
    said = tokenize(([(question, answer)] for question, answer, _ in questions), vocabulary)
    return Part(said, np.ones(len(said), np.int64), _Package(folder / "images", [id for _, _, id in questions]))


class _Parquet:
    """Images of Parquet files: record p is row `row_P[p]` of row group `group_P[p]`, counted over all files."""

    def __init__(self, groups: list[tuple[Path, int]], group_P: np.ndarray, row_P: np.ndarray, digest: str):
        self._groups, self._group_P, self._row_P, self._digest = groups, group_P, row_P, digest
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, p: int, m: int) -> bytes:
        return self._group(int(self._group_P[p]))[int(self._row_P[p])][m]["bytes"].as_py()

    def _group(self, g: int) -> Any:
        with self._lock:
            if g in self._kept:
                self._kept.move_to_end(g)
                return self._kept[g]
        file, group = self._groups[g]
        images = pq.ParquetFile(file).read_row_group(group, columns=["images"])["images"]
        with self._lock:
            self._kept[g] = images
            while len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
        return images

    def __getstate__(self) -> dict[str, Any]:  # for processes that read ahead
        return self.__dict__ | dict(_kept=OrderedDict(), _lock=None)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def digest(self) -> str:
        return self._digest


def _parquet(files: Sequence[Path], heldout: float, vocabulary: Any) -> Records:
    """All texts in memory, as tokens; of images their number and sizes."""
    turns: list[Turns] = []
    groups: list[tuple[Path, int]] = []
    found: list[tuple[int, int, int]] = []  # group, row, images
    sizes = hashlib.sha256()
    for file in files:
        parquet = _opened(file)
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=list(_COLUMNS))
            for row, (texts, images) in enumerate(zip(table["texts"], table["images"], strict=True)):
                said = [(turn["user"] or "", turn["assistant"] or "") for turn in texts.as_py() or []]
                if not said:
                    continue  # nothing to learn
                turns.append(said)
                size = [len(image["bytes"].as_buffer() or b"") for image in images] if images.is_valid else []
                sizes.update(repr(size).encode())
                found.append((len(groups), row, len(size)))
            groups.append((file, group))
    held_P = np.array([holds_out(repr(t), heldout) for t in turns])
    group_row_images_Px3 = np.array(found, np.int64).reshape(-1, 3)
    parts = []
    for wanted in (False, True):
        index = np.flatnonzero(held_P == wanted)
        group_P, row_P, images_P = group_row_images_Px3[index].T
        said = tokenize((turns[i] for i in index), vocabulary)
        parts.append(Part(said, images_P, _Parquet(groups, group_P, row_P, sizes.hexdigest())))
    return _records(*parts)


def _opened(file: Path) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as e:
        raise UserError(f"data.path: {str(file)!r} is no Parquet file ({str(e).splitlines()[0]}); remove it") from e
    names = parquet.schema_arrow.names
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise UserError(
            f"data.path: {str(file)!r} has no column {missing[0]!r} but {', '.join(names)}; "
            f"give files with the columns {' and '.join(_COLUMNS)}, as The Cauldron has"
        )
    return parquet
