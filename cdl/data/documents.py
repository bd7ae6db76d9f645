"""Documents of text files, JSON lines and Parquet, one piece at a time, whatever their size.

A text file is a document; a line of ``.jsonl`` (``.jsonl.gz``, ``.jsonl.zst``) or a row of ``.parquet`` is one, in the
field that is asked for. A folder is read with all its subfolders, in the order of the paths; where it holds JSON lines
or Parquet it is a data set in shards, and other files in it (a README, say) are passed over, as are hidden files, and
files with NUL bytes, which are not text.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cdl.errors import UserError

__all__ = ["Documents", "Piece", "Source"]

_RECORDS = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet")
_PIECE = 1 << 18  # bytes
_HEAD = 1 << 16
_LONGEST_LINE = 1 << 30
_ROWS = 64  # of Parquet at a time
_BOM = b"\xef\xbb\xbf"
_CUTS = (  # where a document is cut, best first; no word of the BPE of GPT-2 or GPT-4 spans the first
    re.compile(rb"[0-9A-Za-z](?=[ \t\r\n])"),
    re.compile(rb"[^ \t\r\n](?=[ \t\r\n])"),
    re.compile(rb"[\x00-\xff](?=[\x00-\x7f\xc0-\xff])"),  # between characters
)


class Piece(NamedTuple):
    """text: UTF-8, never empty, at most 256 KiB. last: the document ends with it."""

    text: bytes
    last: bool


class Source(NamedTuple):
    """What was asked for, and the files in it. passed_over: how many others a folder has."""

    path: Path
    files: list[Path]
    passed_over: int


class Documents:
    """All documents of some files and folders, in a fixed order.

    Memory holds one piece, one line or a few rows of text at a time. Documents longer than a piece are cut where a
    word ends before white space, so the tokens of byte-level BPE are those of the whole.

    Args:
      paths: files and folders.
      field: of JSON lines and Parquet, the one with the text.

    Attributes:
      sources: one for each path.
      size: bytes of all files.
      read: bytes of them read so far.
      replaced: wrong bytes (no UTF-8) and half characters (lone surrogates) so far, each replaced by U+FFFD.
      empty: documents without text so far, left out.

    Raises:
      UserError: a path does not exist, is no data, or comes twice; while reading, what cannot be read.
    """

    def __init__(self, paths: Sequence[str], field: str):
        self.sources = [_source(path) for path in paths]
        self._field = field
        self._files: dict[Path, int] = {}
        for file in (file for source in self.sources for file in source.files):
            if file.resolve() in self._files:
                raise UserError(f"{file} is given twice; name each file once")
            self._files[file.resolve()] = file.stat().st_size
        self.size = sum(self._files.values())
        self.read = self.replaced = self.empty = self._before = 0

    def __iter__(self) -> Iterator[Piece]:
        self.read = self.replaced = self.empty = self._before = 0
        for file in (file for source in self.sources for file in source.files):
            if not file.name.endswith(_RECORDS):
                yield from self._text_file(file)
            else:
                for text in self._parquet(file) if file.suffix == ".parquet" else self._json_lines(file):
                    yield from self._pieces(io.BytesIO(text))
            self._before += self._files[file.resolve()]
            self.read = self._before

    def _text_file(self, file: Path) -> Iterator[Piece]:
        with file.open("rb") as f:
            f.seek(len(_BOM) if f.read(len(_BOM)) == _BOM else 0)
            for piece in self._pieces(f):
                self.read = self._before + f.tell()
                yield piece

    def _pieces(self, f: BinaryIO) -> Iterator[Piece]:
        rest, begun = b"", False
        while len(block := rest + f.read(_PIECE - len(rest))) == _PIECE:  # so there may be more
            cut = _cut(block)
            rest, begun = block[cut:], True
            yield Piece(self._utf8(block[:cut]), last=False)
        if block:
            yield Piece(self._utf8(block), last=True)
        else:
            assert not begun  # a cut leaves something
            self.empty += 1

    def _utf8(self, raw: bytes) -> bytes:
        try:
            raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace").encode()
            self.replaced += text.count(b"\xef\xbf\xbd") - raw.count(b"\xef\xbf\xbd")
            return text
        return raw

    def _json_lines(self, file: Path) -> Iterator[bytes]:
        with file.open("rb") as raw, _decompressed(file, raw) as f:
            for n, line in enumerate(_lines(file, f), start=1):
                self.read = self._before + raw.tell()
                if line.isspace():
                    continue
                where = f"{file}, line {n}"
                try:
                    record = json.loads(self._utf8(line.removeprefix(_BOM) if n == 1 else line).decode())
                except (ValueError, RecursionError) as e:
                    raise UserError(f"{where} is no JSON ({e}); mend or remove the line") from e
                if not isinstance(record, dict):
                    raise UserError(f"{where} is no JSON object; give lines as {{{self._field!r}: ...}}")
                if self._field not in record:
                    raise _no_field(where, self._field, record)
                text = record[self._field]
                if text is None:
                    self.empty += 1
                elif not isinstance(text, str):
                    raise UserError(f"{where}: {self._field!r} is {text!r:.40}, not text; choose another --field")
                else:
                    yield self._encoded(text)

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError:  # JSON can write half a surrogate pair
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            self.replaced += whole.count("\ufffd") - text.count("\ufffd")
            return whole.encode()

    def _parquet(self, file: Path) -> Iterator[bytes]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file) as table:
                schema, rows, done = table.schema_arrow, table.metadata.num_rows, 0
                if self._field not in schema.names:
                    raise _no_field(str(file), self._field, schema.names)
                kind = schema.field(self._field).type
                kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
                    raise UserError(f"{file}: {self._field!r} is {kind}, not text; choose another --field")
                for batch in table.iter_batches(_ROWS, columns=[self._field]):
                    done += len(batch)
                    self.read = self._before + self._files[file.resolve()] * done // rows
                    for text in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
                        if text is None:
                            self.empty += 1
                        else:
                            yield text
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{file} cannot be read as Parquet ({_first_line(e)}); make it again") from e


def _source(name: str) -> Source:
    path = Path(name).expanduser()
    if path.is_file():
        if not path.name.endswith(_RECORDS) and _is_binary(path):
            raise UserError(f"{name} is no text, it has NUL bytes; give text in UTF-8, {', '.join(_RECORDS)}")
        return Source(path, [path], 0)
    if not path.is_dir():
        raise UserError(f"{name} does not exist; give text files, {', '.join(_RECORDS)}, or folders of these")
    files = []
    for folder, subfolders, names in os.walk(path, onerror=_unreadable):
        subfolders[:] = [d for d in subfolders if not d.startswith(".")]
        files += [file for n in names if not n.startswith(".") and (file := Path(folder, n)).is_file()]
    files.sort(key=lambda file: file.relative_to(path).parts)
    chosen = [file for file in files if file.name.endswith(_RECORDS)] or [
        file for file in files if not _is_binary(file)
    ]
    return Source(path, chosen, len(files) - len(chosen))


def _unreadable(error: OSError) -> None:
    raise error


def _is_binary(path: Path) -> bool:
    with path.open("rb") as f:
        return b"\0" in f.read(_HEAD)


def _cut(block: bytes) -> int:
    """Where to cut a block that has no end: within its last 64 KiB."""
    start = len(block) - _HEAD
    for pattern in _CUTS:
        ends = [match.end() for match in pattern.finditer(block, start)]
        if ends:
            return ends[-1]
    return start


def _decompressed(file: Path, raw: BinaryIO) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw  # pyrefly: ignore


def _lines(file: Path, f: io.BufferedIOBase) -> Iterator[bytes]:
    try:
        while line := f.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise UserError(f"{file} has a line of 1 GiB or more, so it is no JSON lines; write a document a line")
            yield line
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{file} cannot be decompressed ({_first_line(e)}); make it again") from e


def _no_field(where: str, field: str, known: Any) -> UserError:
    names = ", ".join(map(str, known)) or "none"
    return UserError(f"{where} has no field {field!r}; choose one with --field= (there: {names})")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
