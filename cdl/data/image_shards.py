"""Images in Parquet and ArrayRecord shards, of which only what is asked for is read."""

import hashlib
import io
import shutil
import struct
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module
from PIL import Image

from cdl.data.image_sources import HELDOUT_NAMES, Images, Parts, Source, class_count
from cdl.errors import UserError

__all__ = ["PROBES", "RowGroups", "array_record", "digest_of", "parquet", "write_array_records"]

RECORD = struct.Struct("<4sii")  # of an ArrayRecord record: MAGIC, label, number of classes; then the encoded image
MAGIC = b"cdl1"
_CACHED_BYTES = 2**28  # of Parquet row groups, in each process
PROBES, _PROBE_BYTES = 256, 2**16


def _shards(root: Path, suffix: str) -> tuple[list[Path], list[Path]]:
    """The shards of the two parts, in the order of their names."""

    def of(part: str) -> list[Path]:
        return sorted(f for f in root.glob(f"*{suffix}") if f.name.startswith((f"{part}-", f"{part}.")))

    train, rest = of("train"), next((files for name in HELDOUT_NAMES if (files := of(name))), [])
    if not train:
        raise UserError(f"data.path={str(root)!r} has no train-*{suffix}; name the shards so")
    return train, rest


def digest_of(files: Sequence[Path]) -> str:
    """Of the sizes, the beginnings, and blocks evenly spread over all bytes: of all bytes where these are few."""
    sizes = [f.stat().st_size for f in files]
    ends = np.cumsum(sizes)
    h = hashlib.sha256(str(sizes).encode())
    spread = np.linspace(0, max(int(ends[-1]) - _PROBE_BYTES, 0), PROBES).astype(np.int64)
    starts = np.union1d(spread, ends - sizes)
    for i, file in enumerate(files):
        begin = int(ends[i]) - sizes[i]
        with file.open("rb") as f:
            for start in starts[(begin <= starts) & (starts < ends[i])]:
                f.seek(int(start) - begin)
                h.update(f.read(_PROBE_BYTES))
    return h.hexdigest()


class RowGroups:
    """One column of Parquet files, by row group. Nothing stays open; those read last stay in memory, up to a limit.

    Args:
      groups: (file, its row group) of each.
    """

    def __init__(self, files: Sequence[Path], groups: Sequence[tuple[int, int]], column: str):
        self._files, self._groups, self._column = [str(f) for f in files], list(groups), column
        self._start()

    def _start(self) -> None:
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._footers: dict[int, pq.FileMetaData] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_footers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __getitem__(self, group: int) -> pa.ChunkedArray:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        i, g = self._groups[group]
        with pq.ParquetFile(self._files[i], metadata=self._footers.get(i)) as file:
            self._footers[i] = file.metadata
            column = file.read_row_group(g, columns=[self._column], use_threads=False)[self._column]
        with self._lock:
            self._cache[group] = column
            while len(self._cache) > 1 and sum(column.nbytes for column in self._cache.values()) > _CACHED_BYTES:
                self._cache.popitem(last=False)
        return column


class _Parquet(Source):
    """Rows of Parquet files."""

    def __init__(self, files: Sequence[Path]):
        with ThreadPoolExecutor(16) as pool:
            read = list(pool.map(_parquet_labels, files))
        self.label_N = np.concatenate([label_N for label_N, _ in read])
        groups = [(i, g, rows) for i, (_, counts) in enumerate(read) for g, rows in enumerate(counts)]
        self._images = RowGroups(files, [(i, g) for i, g, _ in groups], "image")
        self._ends = np.cumsum([rows for _, _, rows in groups])
        self._first = str(files[0])

    def __len__(self) -> int:
        return len(self.label_N)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, int(index), side="right"))
        image = self._images[group][int(index) - int(self._ends[group])].as_py()  # counted from the end of the group
        return dict(image=(image["bytes"] if isinstance(image, dict) else image) or b"", label=int(self.label_N[index]))

    def __repr__(self) -> str:
        return f"_Parquet(files={self._first!r}.., n={len(self)})"


def _parquet_labels(file: Path) -> tuple[np.ndarray, list[int]]:
    """The labels of a file, and the rows of its row groups."""
    try:
        with pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            for column in ("image", "label"):
                if column not in schema.names:
                    raise UserError(f"{str(file)!r} has no column {column!r}; it has: {', '.join(schema.names)}")
            image, label = schema.field("image").type, schema.field("label").type
            inner = image.field("bytes").type if pa.types.is_struct(image) and "bytes" in image.names else image
            if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
                raise UserError(f"{str(file)!r}: column image is {image}; it must be binary, or a struct with bytes")
            if not pa.types.is_integer(label):
                raise UserError(f"{str(file)!r}: column label is {label}; it must be of integers")
            labels = opened.read(columns=["label"])["label"]
            rows = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
    except (pa.ArrowInvalid, OSError) as e:
        raise UserError(f"{str(file)!r} cannot be read as Parquet ({str(e).splitlines()[0]}); write it again") from e
    if labels.null_count:
        raise UserError(f"{str(file)!r} has {labels.null_count} rows without a label; leave them out")
    return labels.to_numpy().astype(np.int64), rows


def parquet(root: Path) -> Parts:
    files, heldout_files = _shards(root, ".parquet")
    train, heldout = _Parquet(files), _Parquet(heldout_files) if heldout_files else None
    classes = class_count(root, train.label_N, heldout.label_N if heldout else train.label_N, None)
    return Parts(train, heldout, classes, digest_of([*files, *heldout_files]))


class _Records(Source):
    """Records of ArrayRecord files, as `write_array_records` writes them."""

    def __init__(self, files: Sequence[Path]):
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(f) for f in files])
        except RuntimeError as e:
            raise UserError(f"{str(files[0].parent)!r}: a file is no ArrayRecord ({e}); write it again") from e
        if not len(self._records):
            raise UserError(f"{str(files[0])!r} and its like have no records; write them again")
        self._path, self.classes = str(files[0].parent), 0
        self.classes = self._parsed(0)[1]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        label, classes, image = self._parsed(index)
        if not 0 <= label < classes or classes != self.classes:
            raise UserError(
                f"data.path={self._path!r}: record {int(index)} has label {label} of {classes} classes, others have "
                f"{self.classes} classes; write the records again"
            )
        return dict(image=image, label=label)

    def __repr__(self) -> str:
        return f"_Records(path={self._path!r}, n={len(self)})"

    def _parsed(self, index: SupportsIndex) -> tuple[int, int, bytes]:
        record = self._records[index]
        if record[:4] != MAGIC or len(record) < RECORD.size:
            raise UserError(
                f"data.path={self._path!r}: record {int(index)} begins with {record[:4]!r}, not {MAGIC!r}; make the "
                "shards with cdl.data.image_files.write_array_records"
            )
        _, label, classes = RECORD.unpack_from(record)
        return label, classes, record[RECORD.size :]


def array_record(root: Path) -> Parts:
    files, heldout_files = _shards(root, ".array_record")
    train, heldout = _Records(files), _Records(heldout_files) if heldout_files else None
    if heldout and heldout.classes != train.classes:
        raise UserError(
            f"data.path={str(root)!r} has {train.classes} classes in train, {heldout.classes} in the other part; "
            "write both from the same images"
        )
    return Parts(train, heldout, train.classes, digest_of([*files, *heldout_files]))


def write_array_records(images: Images, folder: str | Path, per_shard: int = 10_000) -> None:
    """Write images as ArrayRecord shards, which are read at random without reading more than asked for.

    A record is the bytes ``cdl1``, the label and the number of classes as little-endian int32, and the encoded image
    (an array is encoded as PNG). Files are ``train-00000-of-00013.array_record`` and ``validation-...``.

    Args:
      images: from `read_images`, of any source.
      folder: what to make; it appears when it is complete.
      per_shard: records of a file.

    Raises:
      UserError: there is something under this name already.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise UserError(f"{str(folder)!r} exists; give another name, nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part, source in (("train", images.train), ("validation", images.heldout)):
            shards = -(-len(source) // per_shard)
            for shard in range(shards):
                name = making / f"{part}-{shard:05d}-of-{shards:05d}.array_record"
                writer = array_record_module.ArrayRecordWriter(str(name), "group_size:1,uncompressed")
                for i in range(shard * per_shard, min(len(source), (shard + 1) * per_shard)):
                    record = source[i]
                    writer.write(RECORD.pack(MAGIC, record["label"], images.classes) + _encoded(record["image"]))
                writer.close()
        making.chmod(0o755)
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making)
        raise


def _encoded(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return image
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()
