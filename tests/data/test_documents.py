"""Documents come whole, in order and in small pieces; sources that cannot be read are named in one line."""

import gzip
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdl.data import documents
from cdl.data.documents import Documents
from cdl.errors import UserError


def read(*paths: Path, field: str = "text") -> list[bytes]:
    """All documents, pieces joined."""
    whole, parts = [], []
    for piece in Documents([str(p) for p in paths], field):
        parts.append(piece.text)
        if piece.last:
            whole.append(b"".join(parts))
            parts = []
    assert not parts
    return whole


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


TEXTS = ["one", "zwei\nZeilen", "三 <|endoftext|>", 'q"uote\\']


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"id": i, "text": t}).encode() + b"\n" for i, t in enumerate(TEXTS))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[:-1])  # with a byte order mark, no newline at the end
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:40]) + gzip.compress(lines[40:]))
    zstd = [pa.compress(part, codec="zstd", asbytes=True) for part in (lines[:40], lines[40:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstd))
    columns = [pa.array(TEXTS), pa.array(TEXTS).cast(pa.large_string()), pa.array(TEXTS).dictionary_encode()]
    columns += [pa.array(TEXTS).cast(pa.binary()), pa.array(TEXTS).cast(pa.string_view())]
    for i, column in enumerate(columns):
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": column}), tmp_path / f"{i}.parquet", row_group_size=3)
    expected = [t.encode() for t in TEXTS]
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for file in files:
        assert read(file) == expected, file
    assert read(tmp_path) == 8 * expected


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.md", "a.txt", "c/d/e.py", ".hidden/x.txt", "c/.secret"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b/image.png").write_bytes(b"\x89PNG\0\0")
    assert read(tmp_path) == [b"a.txt", b"b/10.md", b"b/2.txt", b"c/d/e.py"]
    assert read(tmp_path / "c", tmp_path / "a.txt") == [b"c/d/e.py", b"a.txt"]
    assert Documents([str(tmp_path)], "text").sources[0].passed_over == 1
    write_lines(tmp_path / "c" / "shard.jsonl", {"text": "record"})
    assert read(tmp_path) == [b"record"]  # a data set, whose other files are not documents
    assert Documents([str(tmp_path)], "text").sources[0].passed_over == 5


def test_long_documents_come_in_pieces_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE", 1000)
    monkeypatch.setattr(documents, "_HEAD", 200)
    rng = np.random.default_rng(0)
    words = " ".join("".join(rng.choice([*"abcé字"], n)) for n in rng.integers(1, 9, 3000))
    kinds = {"words": words, "no_space": words.replace(" ", ""), "spaces": " " * 5003, "exact": "x " * 1000}
    for name, text in kinds.items():
        (tmp_path / name).write_text(text)
        pieces = list(Documents([str(tmp_path / name)], "text"))
        assert len(pieces) > 1
        assert all(0 < len(p.text) <= 1000 for p in pieces)
        assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
        assert b"".join(p.text for p in pieces).decode() == text
        assert all(p.text.decode() for p in pieces)  # no character is cut
        for left, right in itertools.pairwise(pieces):
            assert name != "words" or (left.text[-1:] in b"abc" and right.text[:1] == b" ")
    lines = write_lines(tmp_path / "long.jsonl", {"text": words}, {"text": "short"})
    assert read(lines) == [words.encode(), b"short"]
    assert max(len(p.text) for p in Documents([str(lines)], "text")) <= 1000


def test_reading_never_runs_ahead_of_what_was_asked_for(tmp_path: Path) -> None:
    size = 64 << 20
    with (tmp_path / "large.txt").open("wb") as f:
        for _ in range(size >> 20):
            f.write(b"a line of some text, again and \n" * (1 << 15))
    source = Documents([str(tmp_path / "large.txt")], "text")
    asked = 0
    for n, piece in enumerate(source):
        asked += len(piece.text)
        assert source.read - asked < 1 << 18
        if n == 20:
            break
    assert asked < 8 << 20 < source.size == size


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(500)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(500)]}), tmp_path / "c.parquet")
    source = Documents([str(tmp_path)], "text")
    marks = [source.read for _ in source]
    assert marks == sorted(marks)
    assert marks[-1] <= source.read == source.size == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_wrong_bytes_are_replaced_and_counted_and_empty_documents_left_out(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve \ufffd".encode() + b"caf\xe9 \xff!")
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    write_lines(tmp_path / "r.jsonl", {"text": "half \ud800 pair"}, {"text": ""}, {"text": None}, {"text": "good 😀"})
    pq.write_table(pa.table({"text": pa.array([b"ok", b"\xff", None], pa.binary())}), tmp_path / "r.parquet")
    found = {}
    for name in ("latin.txt", "nothing.txt", "mark.txt", "r.jsonl", "r.parquet"):
        source = Documents([str(tmp_path / name)], "text")
        found[name] = ([p.text.decode() for p in source], source.replaced, source.empty)
    assert found == {
        "latin.txt": (["naïve \ufffdcaf\ufffd \ufffd!"], 2, 0),
        "nothing.txt": ([], 0, 1),
        "mark.txt": ([], 0, 1),
        "r.jsonl": (["half \ufffd pair", "good 😀"], 1, 2),
        "r.parquet": (["ok", "\ufffd"], 1, 1),
    }


def _parquet(columns: dict[str, Any]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


BAD: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "absent.jsonl": (b'{"text": "a"}\n\n{"title": "b", "id": 3}\n', r"line 3 has no field 'text'.*title, id"),
    "number.jsonl": (b'{"text": 3}\n', r"line 1: 'text' is 3, not text"),
    "list.jsonl": (b'["text"]\n', r"line 1 is no JSON object"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"line 2 is no JSON"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", r"line 1 is no JSON"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), r"line 1 is no JSON"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n')[:-9], r"cannot be decompressed"),
    "wrong.jsonl.gz": (b"no gzip", r"cannot be decompressed"),
    "cut.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04", r"cannot be decompressed"),
    "wrong.jsonl.zst": (b"no zstd", r"cannot be decompressed"),
    "wrong.parquet": (b"no Parquet, whatever the name says", r"cannot be read as Parquet"),
    "empty.parquet": (b"", r"cannot be read as Parquet"),
    "absent.parquet": (_parquet({"title": ["a"], "id": [1]}), r"no field 'text'.*title, id"),
    "number.parquet": (_parquet({"text": [1]}), r"'text' is int64, not text"),
    "list.parquet": (_parquet({"text": [["a"]]}), r"'text' is list.*not text"),
    "binary.txt": (b"text\0", r"has NUL bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*{words}") as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_damaged_pages_of_parquet_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"some text {i * 7919}" for i in range(5000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[50:4000] = bytes(3950)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as Parquet"):
        read(path)


def test_missing_and_repeated_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        Documents([str(tmp_path / "nowhere")], "text")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"a.txt is given twice"):
        Documents([str(tmp_path), str(tmp_path / "a.txt")], "text")
