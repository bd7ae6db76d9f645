"""Images with questions: slots, what is learned, The Cauldron's layout and the package's."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cdl.config import section
from cdl.data import build, vqa
from cdl.data.conversations import holds_out
from cdl.errors import UserError

RECORDS = 30


def picture(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (10 + i % 3, 8), (5 * i, 255 - 5 * i, 7)).save(out, "PNG")
    return out.getvalue()


def record(i: int) -> dict[str, Any]:
    """One, two or no images, each of a colour that says which; one or two turns."""
    turns = [dict(user=f"What is {i}?", assistant=f"It is {i}.", source="test")]
    if i % 2:
        turns.append(dict(user="Sure?", assistant="Yes.", source="test"))
    return dict(images=[dict(bytes=picture(i + j), path=None) for j in range(i % 3)], texts=turns)


def _turns(i: int) -> list[tuple[str, str]]:
    return [(turn["user"], turn["assistant"]) for turn in record(i)["texts"]]


@pytest.fixture
def cauldron(tmp_path: Path) -> Path:
    for f, part in enumerate((range(12), range(12, RECORDS))):
        folder = tmp_path / f"set{f}"
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist([record(i) for i in part]), folder / "train.parquet", row_group_size=5)
    return tmp_path


def of(path: Path | str, **changes: Any) -> ConfigDict:
    small = dict(batch_size=3, seq_len=64, heldout=0.3, image_size=4, images=2, image_tokens=4)
    return section("data", "vqa", path=str(path), **small | changes)


def number(row: dict[str, np.ndarray]) -> int:
    text = bytes(row["tokens"][row["tokens"] > 0].tolist()).decode()
    return int(text.split("What is ")[1].split("?")[0])


def rows(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{name: x[b] for name, x in batch.items()} for b in range(len(batch["tokens"]))]


def test_rows_are_those_of_the_files(cauldron: Path) -> None:
    records = vqa.read_records(of(cauldron))
    train = vqa.batches(records, of(cauldron), 0)
    n = len(records.train.images_P)
    seen = [row for k in range(n // 3) for row in rows(train[k])]
    held = vqa.heldout_batches(records, of(cauldron), 10_000)
    kept = [row for e in range(len(held["tokens"])) for row in rows({k: v[e] for k, v in held.items()})]
    numbers = [number(row) for row in seen]
    assert len(set(numbers)) == len(numbers)
    assert not set(numbers) & {number(row) for row in kept}
    assert n + len(records.heldout.images_P) == RECORDS
    for row in seen + kept:
        i = number(row)
        images, places = i % 3, 4 * (i % 3)
        np.testing.assert_array_equal(row["slot"], [s if s < places else -1 for s in range(64)])
        for j in range(2):
            colour = (5 * (i + j), 255 - 5 * (i + j), 7) if j < images else (0, 0, 0)
            assert (row["image"][j] == colour).all()
        turns = [f"What is {i}?\0", f"It is {i}.\0"] + (["Sure?\0", "Yes.\0"] if i % 2 else [])
        text = "".join(turns)
        assert bytes(row["tokens"][places : places + len(text)].tolist()).decode() == text
        learned = [c for j, turn in enumerate(turns) for c in [j % 2] * len(turn)]
        expected = np.zeros(65)
        expected[places : places + len(text)] = learned
        np.testing.assert_array_equal(row["weight"], expected[1:])


def test_the_package_of_small_pictures() -> None:
    pytest.importorskip("easy_vqa")
    data = build.build(section("data", "vqa"))
    again = next(data.batches(1, 5))
    batches = data.batches(1, 0)
    batch = [next(batches) for _ in range(6)][5]
    for name in batch:
        np.testing.assert_array_equal(batch[name], again[name])
    assert batch["image"].shape == (16, 1, 64, 64, 3)
    assert batch["image"].std() > 10
    answers = {bytes(row["tokens"][1:][row["weight"] > 0].tolist()) for row in rows(batch)}
    known = "circle green red gray yes teal black rectangle yellow triangle brown blue no"
    assert answers <= {f"{word}\0".encode() for word in known.split()}
    prepared = np.asarray(data.prepare(batch)["image"])
    np.testing.assert_allclose(prepared, batch["image"] / 127.5 - 1, atol=1e-6)


def test_records_with_more_images_than_places_are_left_out(cauldron: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = of(cauldron, images=1)
    seen = {number(row) for k in range(20) for row in rows(vqa.batches(vqa.read_records(one), one, 0)[k])}
    assert seen
    assert all(i % 3 < 2 for i in seen)
    assert "left out" in capsys.readouterr().err


def test_identity_is_of_texts_and_images(cauldron: Path, tmp_path: Path) -> None:
    one = build.fingerprint(of(cauldron))
    changed = [record(i) for i in range(12)]
    changed[3]["texts"][0]["assistant"] = "It is 4."
    pq.write_table(pa.Table.from_pylist(changed), cauldron / "set0" / "train.parquet", row_group_size=5)
    vqa._read.cache_clear()
    other = build.fingerprint(of(cauldron))
    assert other != one
    changed[4]["images"][0]["bytes"] = picture(5)  # texts as they were, and as many images
    pq.write_table(pa.Table.from_pylist(changed), cauldron / "set0" / "train.parquet", row_group_size=5)
    vqa._read.cache_clear()
    assert build.fingerprint(of(cauldron)) not in (one, other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(path="/nowhere"), "data.path='/nowhere' has no Parquet files"),
        (dict(seq_len=8), "data.images=2 x data.image_tokens=4 are 8 places of the data.seq_len=8"),
        (dict(image_size=0), "data.image_size=0 must be at least 1"),
        (dict(seq_len=16), "that fit into data.seq_len=16"),
        (dict(batch_size=100), "and a batch has 100"),
    ],
)
def test_errors(cauldron: Path, changes: dict[str, Any], said: str) -> None:
    section = of(cauldron)
    section.update(changes)
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        build.build(section).check(dict(vocab_size=256))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([dict(record(1), text="x", texts=None)], "column 'texts' of .* is null, and no list of structs with user and"),
        ([dict(images=record(1)["images"], text="x")], "has no column 'texts' but images, text"),
        ([dict(record(1), images=["a.png"])], "column 'images' of .* is list<.*string>, and no list of structs"),
        ([dict(record(1), texts=[dict(user="a", assistant=3)])], "is list<.*int64.*no list of structs with user"),
    ],
)
def test_other_columns_are_said(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=said):
        build.build(of(tmp_path))


def test_what_is_no_parquet_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="is no Parquet file"):
        build.build(of(tmp_path))


def test_records_with_broken_images_are_replaced_and_counted(tmp_path: Path) -> None:
    records = [record(i) for i in range(RECORDS)]
    records[8]["images"][1]["bytes"] = b"nothing"
    records[11]["images"][0] = None
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    data, told = build.build(of(tmp_path, heldout=1e-9)), list[int]()
    seen = [
        row
        for _, batch in zip(range(10), data.batches(0, 0, on_replaced=told.append), strict=False)
        for row in rows(batch)
    ]
    assert sorted(map(number, seen)) == sorted([*(set(range(RECORDS)) - {8, 11}), 9, 12])
    assert sum(told) == 2
    assert "replaced" not in next(data.batches(0, 0))
    for r in records:
        r["images"] = [dict(bytes=b"nothing", path=None)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    vqa._read.cache_clear()
    with pytest.raises(UserError, match=r"images in a row, from image 0 of data.path=.*, could not be decoded"):
        build.build(of(tmp_path)).heldout(10)


def test_images_are_found_without_paths_beside_them_and_in_other_processes(cauldron: Path, tmp_path: Path) -> None:
    bare = [dict(r, images=[dict(bytes=x["bytes"]) for x in r["images"]]) for r in map(record, range(RECORDS))]
    (tmp_path / "bare").mkdir()
    pq.write_table(pa.Table.from_pylist(bare), tmp_path / "bare" / "a.parquet", row_group_size=7)
    one, other = (vqa.read_records(of(folder)) for folder in (cauldron / "set0", tmp_path / "bare"))
    copy = pickle.loads(pickle.dumps(other.train.image))
    ordered = [i for i in range(RECORDS) if not holds_out(repr(_turns(i)), 0.3)]
    assert other.train.images_P.tolist() == [i % 3 for i in ordered]
    for p, i in enumerate(ordered):
        assert [copy(p, m) for m in range(i % 3)] == [picture(i + m) for m in range(i % 3)]
    n = len(one.train.images_P)
    assert n < 12
    np.testing.assert_array_equal(one.train.conversations.start_P1, other.train.conversations.start_P1[: n + 1])
