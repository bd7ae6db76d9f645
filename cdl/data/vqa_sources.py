"""Readers of images with questions and answers: all texts in memory, as tokens, and images one by one where they lie.

- ``easy-vqa``: the records of the PyPI package of that name, 4,000 images of shapes and 38,575 questions to learn from,
  1,000 images and 9,673 questions held out.
- a Parquet file, or a folder of them (read recursively), as The Cauldron (Laurençon et al., 2024) is published: columns
  `images`, a list of structs with encoded `bytes`, and `texts`, a list of structs with `user` and `assistant`. A share
  of the records is held out, by a hash of their texts.

An image of a Parquet file costs its row group, unless that was read lately. Files of many images are best written with
row groups of a hundred records or fewer.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdl.data.conversations import Conversations, Turns, fingerprint, holds_out, subset, tokenize
from cdl.data.image_shards import RowGroups, digest_of
from cdl.data.vocabulary import Vocabulary
from cdl.errors import UserError

__all__ = ["Part", "Records", "read"]

_COLUMNS = ("images", "texts")


class Part(NamedTuple):
    """images_P: number of images of each record. image: (record, which of its images) -> encoded bytes."""

    conversations: Conversations
    images_P: np.ndarray
    image: Callable[[int, int], bytes]


class Records(NamedTuple):
    """fingerprint: a hash of all tokens and of the files with the images (samples where they are many), whatever the
    path."""

    train: Part
    heldout: Part
    fingerprint: str


def read(path: str, heldout: float, vocabulary: Vocabulary) -> Records:
    """The records behind `data.path`.

    Raises:
      UserError: nothing there, or no files with these columns.
    """
    if path == "easy-vqa":
        return _package(vocabulary)
    where = Path(path).expanduser()
    files = [where] if path and where.is_file() else sorted(where.rglob("*.parquet")) if path else []
    if not files:
        raise UserError(f"data.path={path!r} has no Parquet files; give a file or folder of them, or 'easy-vqa'")
    return _parquet(files, heldout, vocabulary)


def _records(train: Part, heldout: Part, images: str) -> Records:
    h = hashlib.sha256(fingerprint(train.conversations, heldout.conversations).encode())
    for part in (train, heldout):
        h.update(part.images_P.astype("<i8").data)
    return Records(train, heldout, hashlib.sha256(h.digest() + images.encode()).hexdigest()[:16])


class _Files:
    """Images of easy-vqa: one a record, a small file each."""

    def __init__(self, folder: Path, id_P: Sequence[int]):
        self._folder, self._id_P = folder, id_P

    def __call__(self, p: int, m: int) -> bytes:
        return (self._folder / f"{self._id_P[p]}.png").read_bytes()


def _package(vocabulary: Vocabulary) -> Records:
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("data.path='easy-vqa' needs the package easy-vqa: pip install easy-vqa")
    parts, files = [], []
    for name in ("train", "test"):
        folder = Path(spec.origin).parent / "data" / name
        questions: list[tuple[str, str, int]] = json.loads((folder / "questions.json").read_text())
        said = tokenize(([(question, answer)] for question, answer, _ in questions), vocabulary)
        ids = [id for _, _, id in questions]
        parts.append(Part(said, np.ones(len(said), np.int64), _Files(folder / "images", ids)))
        files += [folder / "images" / f"{id}.png" for id in sorted(set(ids))]
    return _records(parts[0], parts[1], digest_of(files))


class _Images:
    """Images of Parquet files: record p is row `row_P[p]` of row group `group_P[p]`."""

    def __init__(self, groups: RowGroups, group_P: np.ndarray, row_P: np.ndarray):
        self._groups, self._group_P, self._row_P = groups, group_P, row_P

    def __call__(self, p: int, m: int) -> bytes:
        image = self._groups[int(self._group_P[p])][int(self._row_P[p])][m]
        return (image["bytes"].as_py() if image.is_valid else None) or b""  # which is no image


def _parquet(files: Sequence[Path], heldout: float, vocabulary: Vocabulary) -> Records:
    groups: list[tuple[int, int]] = []
    found: list[tuple[int, int, int, bool]] = []  # group, row, images, is it held out?

    def records() -> Iterator[Turns]:
        for i, file in enumerate(files):
            with _opened(file) as parquet:
                columns = ["texts", _shape_of_images(parquet)]
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group, columns=columns)
                    rows = zip(_turns(table["texts"]), _lengths(table["images"]), strict=True)
                    for row, (turns, images) in enumerate(rows):
                        if turns:  # else there is nothing to learn
                            found.append((len(groups), row, images, holds_out(repr(turns), heldout)))
                            yield turns
                    groups.append((i, group))

    said = tokenize(records(), vocabulary)
    group_P, row_P, images_P, held_P = np.array(found, np.int64).reshape(-1, 4).T
    read_groups = RowGroups(files, groups, "images")
    parts = []
    for wanted in (False, True):
        mask_P = (held_P > 0) == wanted
        images = _Images(read_groups, group_P[mask_P], row_P[mask_P])
        parts.append(Part(subset(said, mask_P), images_P[mask_P], images))
    return _records(parts[0], parts[1], digest_of(files))


def _turns(texts: pa.ChunkedArray) -> Iterator[Turns]:
    """The turns of each row."""
    each = texts.combine_chunks().flatten()
    users, assistants = (each.field(name).fill_null("").to_pylist() for name in ("user", "assistant"))
    first = 0
    for count in _lengths(texts):
        yield list(zip(users[first : first + count], assistants[first : first + count], strict=True))
        first += count


def _lengths(lists: pa.ChunkedArray) -> list[int]:
    return lists.combine_chunks().value_lengths().fill_null(0).to_pylist()


def _shape_of_images(parquet: pq.ParquetFile) -> str:
    """A column that says how many images a row has, without their bytes where there is another field beside them."""
    leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    of_images = [leaf for leaf in leaves if leaf.split(".")[0] == "images"]
    return next((leaf for leaf in of_images if not leaf.endswith(".bytes")), of_images[0])


def _opened(file: Path) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as e:
        raise UserError(f"data.path: {str(file)!r} is no Parquet file ({str(e).splitlines()[0]}); remove it") from e
    schema = parquet.schema_arrow
    like = f"give files with the columns {' and '.join(_COLUMNS)}, as The Cauldron has"
    for column, fields in (("images", {"bytes": _is_bytes}), ("texts", {"user": _is_text, "assistant": _is_text})):
        if column not in schema.names:
            raise UserError(f"data.path: {str(file)!r} has no column {column!r} but {', '.join(schema.names)}; {like}")
        kind = schema.field(column).type
        inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        types = {f.name: f.type for f in inner} if inner is not kind and pa.types.is_struct(inner) else {}
        if not all(name in types and is_right(types[name]) for name, is_right in fields.items()):
            raise UserError(
                f"data.path: column {column!r} of {str(file)!r} is {kind}, and no list of structs with "
                f"{' and '.join(fields)}; {like}"
            )
    return parquet


def _is_bytes(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
