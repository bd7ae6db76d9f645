"""Every format, written here by its own definition, comes back as it was; files that cannot work are named."""

import gzip
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from cdl.data.image_files import Images, read_images, write_array_records
from cdl.errors import UserError

RNG = np.random.default_rng(0)


def contents(source: Any) -> list[tuple[bytes, int]]:
    """All items, whether encoded or arrays."""
    items = [source[i] for i in range(len(source))]
    return [(bytes(np.ascontiguousarray(x["image"])), x["label"]) for x in items]


def png(seed: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# --- Digits and the held-out share ----------------------------------------------------------------------------------


def test_the_digits_are_there_and_their_split_is_fair_and_fixed() -> None:
    digits = read_images("digits", 0.1)
    assert (len(digits.train), len(digits.heldout), digits.classes) == (1617, 180, 10)
    train, heldout = contents(digits.train), contents(digits.heldout)
    assert contents(read_images("digits", 0.1).heldout) == heldout
    assert {digits.train[i]["image"].shape for i in range(50)} == {(8, 8, 1)}
    assert max(digits.train[i]["image"].max() for i in range(50)) == 255
    counts = np.bincount([label for _, label in heldout], minlength=10)
    assert counts.min() >= 8  # of 18
    from sklearn.datasets import load_digits

    images, target = load_digits(return_X_y=True)
    every = sorted(
        (np.round(x * 255 / 16).astype(np.uint8).tobytes(), int(y)) for x, y in zip(images, target, strict=True)
    )
    assert sorted(train + heldout) == every  # none twice, none lost


@pytest.mark.parametrize("share", [0.0, 1.0, -1, float("nan")])
def test_a_share_that_is_none_is_named(share: float) -> None:
    with pytest.raises(UserError, match=r"data\.heldout"):
        read_images("digits", share)


# --- Class folders --------------------------------------------------------------------------------------------------


def class_folder(root: Path, classes: dict[str, list[int]], suffix: str = ".png") -> Path:
    for name, seeds in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            (root / name / f"{seed:03d}{suffix}").write_bytes(png(seed))
    return root


def test_class_folders_are_read_and_what_is_no_image_is_not(tmp_path: Path) -> None:
    class_folder(tmp_path, {"cat": [0, 1, 2], "dog": [3, 4], "eel": []})
    (tmp_path / "dog" / "deeper").mkdir()
    (tmp_path / "dog" / "deeper" / "x.JPEG").write_bytes(png(5))
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "dog" / ".hidden.png").write_bytes(png(6))
    images = read_images(str(tmp_path), 0.34)
    assert images.classes == 2  # eel has no images
    assert (len(images.train), len(images.heldout)) == (4, 2)
    expected = [(png(i), 0) for i in (0, 1, 2)] + [(png(i), 1) for i in (3, 4, 5)]
    assert sorted(contents(images.train) + contents(images.heldout)) == sorted(expected)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_a_folder_brings_its_own_held_out_part(tmp_path: Path, name: str) -> None:
    class_folder(tmp_path / "train", {"b": [0, 1, 2], "a": [3]})
    class_folder(tmp_path / name, {"b": [4], "a": [5]})
    images = read_images(str(tmp_path), 0.1)
    assert contents(images.train) == [(png(3), 0), (png(0), 1), (png(1), 1), (png(2), 1)]
    assert contents(images.heldout) == [(png(5), 0), (png(4), 1)]


def test_train_may_be_the_only_part_or_a_class(tmp_path: Path) -> None:
    part = class_folder(tmp_path / "part" / "train", {"a": [0, 1], "b": [2, 3]}).parent
    kind = class_folder(tmp_path / "kind", {"train": [0, 1], "plane": [2, 3]})
    assert read_images(str(part), 0.25).classes == 2
    images = read_images(str(kind), 0.25)
    assert sorted(contents(images.train) + contents(images.heldout))[0][1] in (0, 1)
    assert {label for _, label in contents(images.train) + contents(images.heldout)} == {0, 1}


def test_classes_that_differ_between_the_parts_are_named(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", {"a": [0], "b": [1]})
    class_folder(tmp_path / "val", {"a": [2], "c": [3]})
    with pytest.raises(UserError, match="class 'b' has images in train only"):
        read_images(str(tmp_path), 0.1)


def test_a_fingerprint_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"a": [*range(20)], "b": [*range(20, 40)]}
    first, copy, changed = (class_folder(tmp_path / n, classes) for n in ("first", "copy", "changed"))
    (changed / "a" / "007.png").write_bytes(png(99))
    one = read_images(str(first), 0.1)
    scandir = os.scandir

    class Backwards:
        """os.scandir in another order."""

        def __init__(self, path: Any = "."):
            with scandir(path) as entries:
                self._entries = iter(sorted(entries, key=lambda e: e.name, reverse=True))

        def __iter__(self) -> Any:
            return self._entries

        def __next__(self) -> Any:
            return next(self._entries)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    other = read_images(str(copy), 0.1)
    assert other.fingerprint == one.fingerprint
    assert contents(other.train) == contents(one.train)
    assert read_images(str(changed), 0.1).fingerprint != one.fingerprint
    assert read_images(str(first), 0.2).fingerprint != one.fingerprint


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_bytes(png(0))
    for name, words in {"missing": "does not exist", "empty": "holds no images", "file.png": "is a file"}.items():
        with pytest.raises(UserError, match=words):
            read_images(str(tmp_path / name), 0.1)
    with pytest.raises(UserError, match="does not exist"):
        read_images("", 0.1)


# --- CIFAR ----------------------------------------------------------------------------------------------------------


def cifar_rows(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), rng.integers(0, classes, n)


CIFAR10 = {**{f"data_batch_{i}": cifar_rows(4, 10, i) for i in range(1, 6)}, "test_batch": cifar_rows(3, 10, 0)}
CIFAR100 = {"train": cifar_rows(20, 100, 1), "test": cifar_rows(3, 100, 0)}


def cifar_folder(root: Path, files: dict[str, tuple[np.ndarray, np.ndarray]], version: str) -> Path:
    root.mkdir()
    for name, (image_NxCxHxW, label_N) in files.items():
        n, fine = len(label_N), len(files) == 2
        if version == "binary":
            coarse = np.full((n, 1), 255, np.uint8) if fine else np.empty((n, 0), np.uint8)
            rows = np.concatenate([coarse, label_N[:, None].astype(np.uint8), image_NxCxHxW.reshape(n, -1)], axis=1)
            rows.tofile(root / f"{name}.bin")
        else:
            write = python2_pickle if version == "python 2" else lambda d: pickle.dumps(d, protocol=2)
            labels = {b"fine_labels" if fine else b"labels": label_N.tolist()}
            if fine:
                labels[b"coarse_labels"] = [255] * n
            (root / name).write_bytes(write({b"data": image_NxCxHxW.reshape(n, -1), **labels}))
    return root


def python2_pickle(content: dict[bytes, Any]) -> bytes:
    """As Python 2 and its NumPy wrote the published files: byte strings, and flags of a dtype as integers."""

    def integer(i: int) -> bytes:
        return b"K" + bytes([i]) if i < 256 else b"M" + struct.pack("<H", i)

    def value(x: Any) -> bytes:
        if isinstance(x, bytes):
            return b"U" + bytes([len(x)]) + x
        if isinstance(x, list):
            return b"](" + b"".join(integer(i) for i in x) + b"e"
        data = b"T" + struct.pack("<i", x.size) + x.tobytes()
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        return array + b"(K\x01" + integer(x.shape[0]) + integer(x.shape[1]) + b"\x86" + dtype + b"\x89" + data + b"tb"

    return b"\x80\x02}(" + b"".join(value(k) + value(v) for k, v in content.items()) + b"u."


@pytest.mark.parametrize("version", ["binary", "python 2", "python 3"])
@pytest.mark.parametrize(("files", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
def test_cifar_is_read_in_every_version(tmp_path: Path, files: Any, classes: int, version: str) -> None:
    images = read_images(str(cifar_folder(tmp_path / "cifar", files, version)), 0.1)
    *train, test = files.values()

    def rows(parts: list[Any]) -> list[tuple[bytes, int]]:
        return [(x.transpose(1, 2, 0).tobytes(), int(y)) for part in parts for x, y in zip(*part, strict=True)]

    assert images.classes == classes
    assert contents(images.train) == rows(train)
    assert contents(images.heldout) == rows([test])
    assert images.train[0]["image"].shape == (32, 32, 3)
    other = read_images(str(cifar_folder(tmp_path / "other", files, "binary")), 0.1)
    assert images.fingerprint == other.fingerprint


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cifar_folder(tmp_path / "cifar", CIFAR10, "python 3")
    monkeypatch.chdir(tmp_path)
    (root / "data_batch_3").write_bytes(pickle.dumps({b"data": Harm(), b"labels": []}))
    with pytest.raises(UserError, match=r"posix\.mkdir is not allowed"):
        read_images(str(root), 0.1)
    assert not (tmp_path / "harmed").exists()


def test_broken_cifar_files_are_named(tmp_path: Path) -> None:
    odd, missing, label, cut = (
        cifar_folder(tmp_path / n, CIFAR10, "binary") for n in ("odd", "missing", "label", "cut")
    )
    with (odd / "data_batch_2.bin").open("ab") as f:
        f.write(b"x")
    (missing / "data_batch_4.bin").unlink()
    with (label / "data_batch_1.bin").open("r+b") as f:
        f.write(bytes([10]))
    cut = cifar_folder(tmp_path / "pickle", CIFAR10, "python 3")
    (cut / "test_batch").write_bytes((cut / "test_batch").read_bytes()[:-100])
    shape = cifar_folder(tmp_path / "shape", CIFAR10, "python 3")
    (shape / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}))
    said = {
        odd: f"{4 * 3073 + 1} bytes, no multiple of 3073",
        missing: r"no data_batch_4\.bin",
        label: r"1 train images have labels out of 0\.\.9, such as 10",
        cut: "no CIFAR pickle",
        shape: r"\(2, 5\)",
    }
    for root, words in said.items():
        with pytest.raises(UserError, match=words):
            read_images(str(root), 0.1)


# --- idx ------------------------------------------------------------------------------------------------------------


def idx_folder(root: Path, packed: bool = False, dot: str = "-") -> Path:
    root.mkdir()
    rng = np.random.default_rng(1)
    for part, n in (("train", 30), ("t10k", 6)):
        for kind, array in (
            ("images", rng.integers(0, 256, (n, 28, 20), dtype=np.uint8)),
            ("labels", (np.arange(n) % 6).astype(np.uint8)),
        ):
            data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            name = f"{part}-{kind}{dot}idx{array.ndim}-ubyte"
            (root / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return root


def test_idx_files_are_read_packed_or_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    expected = rng.integers(0, 256, (30, 28, 20), dtype=np.uint8)
    three = [idx_folder(tmp_path / "a"), idx_folder(tmp_path / "b", True), idx_folder(tmp_path / "c", dot=".")]
    for root in three:
        images = read_images(str(root), 0.1)
        assert (len(images.train), len(images.heldout), images.classes) == (30, 6, 6)
        assert np.array_equal(images.train[7]["image"], expected[7][..., None])
        assert images.train[7]["label"] == 1
    assert len({read_images(str(root), 0.1).fingerprint for root in three}) == 1


def test_broken_idx_files_are_named(tmp_path: Path) -> None:
    magic, short, missing, gz, fewer = (
        idx_folder(tmp_path / n, n == "gz") for n in ("magic", "short", "no", "gz", "few")
    )
    images = "train-images-idx3-ubyte"
    (magic / images).write_bytes(b"\0\0\x0d\3" + (magic / images).read_bytes()[4:])
    (short / images).write_bytes((short / images).read_bytes()[:-1])
    (missing / "t10k-labels-idx1-ubyte").unlink()
    (gz / f"{images}.gz").write_bytes((gz / f"{images}.gz").read_bytes()[:-30])
    (fewer / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 2) + b"\0\0")
    said = {
        magic: "begins with 00000d03, an idx file of it with 00000803",
        short: "not what its header says",
        missing: "no t10k-labels-idx1-ubyte",
        gz: "cannot be unpacked",
        fewer: "30 images but 2 labels",
    }
    for root, words in said.items():
        with pytest.raises(UserError, match=words):
            read_images(str(root), 0.1)


# --- Parquet --------------------------------------------------------------------------------------------------------


def parquet_folder(root: Path, columns: dict[str, Any], name: str = "train-00000-of-00001.parquet") -> Path:
    root.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), root / name, row_group_size=3)
    return root


def images_column(seeds: Any, struct: bool) -> list[Any]:
    return [{"bytes": png(i), "path": f"{i}.png"} if struct else png(i) for i in seeds]


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_shards_are_read_row_by_row_in_any_order(tmp_path: Path, struct: bool) -> None:
    root = tmp_path / "shards"
    for shard in range(3):
        seeds = range(10 * shard, 10 * shard + 10)
        columns = {"label": [i % 7 for i in seeds], "image": images_column(seeds, struct)}
        parquet_folder(root, columns, f"train-0000{shard}-of-00003.parquet")
    parquet_folder(root, {"image": images_column([50], struct), "label": [6]}, "validation-00000-of-00001.parquet")
    parquet_folder(root, {"image": images_column([51], struct), "label": [-1]}, "test-00000-of-00001.parquet")
    images = read_images(str(root), 0.1)
    assert images.classes == 7
    order = RNG.permutation(30)
    items = [images.train[i] for i in order]
    assert [(x["image"], x["label"]) for x in items] == [(png(i), i % 7) for i in order]
    assert contents(images.heldout) == [(png(50), 6)]
    again = pickle.loads(pickle.dumps(images.train))
    assert contents(again) == contents(images.train)


def test_row_groups_in_memory_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cdl.data import image_shards

    seeds = range(60)
    columns = {"label": [0] * 60, "image": images_column(seeds, False)}
    images = read_images(str(parquet_folder(tmp_path / "p", columns)), 0.5)
    source = images.train._source  # type: ignore[attr-defined]
    monkeypatch.setattr(image_shards, "_CACHED_BYTES", 2000)
    for i in RNG.permutation(60):
        assert source[int(i)]["image"] == png(int(i))
        assert sum(column.nbytes for column in source._images._cache.values()) <= 2000


def test_parquet_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    two, label = images_column(range(2), False), [0, 1]
    said = {
        "columns": ({"img": two, "label": label}, "no column 'image'; it has: img, label"),
        "no_label": ({"image": two, "fine": label}, "no column 'label'; it has: image, fine"),
        "text": ({"image": ["a", "b"], "label": label}, "column image is string"),
        "names": ({"image": two, "label": ["cat", "dog"]}, "column label is string"),
        "null": ({"image": two, "label": [0, None]}, "1 rows without a label"),
        "negative": ({"image": two, "label": [0, -1]}, r"1 train images have labels out of 0\.\.0, such as -1"),
    }
    for name, (columns, words) in said.items():
        with pytest.raises(UserError, match=words):
            read_images(str(parquet_folder(tmp_path / name, columns)), 0.5)
    held = parquet_folder(tmp_path / "held", {"image": two, "label": label})
    parquet_folder(held, {"image": two, "label": [0, 2]}, "validation-0.parquet")
    with pytest.raises(UserError, match=r"1 held-out images have labels out of 0\.\.1, such as 2"):
        read_images(str(held), 0.5)
    with pytest.raises(UserError, match=r"no train-\*\.parquet"):
        read_images(str(parquet_folder(tmp_path / "other", {"image": two, "label": label}, "0000.parquet")), 0.5)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_images(str(tmp_path / "broken"), 0.5)


# --- ArrayRecord ----------------------------------------------------------------------------------------------------


def same(a: Images, b: Images) -> bool:
    return contents(a.train) == contents(b.train) and contents(a.heldout) == contents(b.heldout)


def test_array_records_hold_what_was_written(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "folder", {"a": [*range(9)], "b": [*range(9, 20)], "c": [20]})
    images = read_images(str(folder), 0.3)
    write_array_records(images, tmp_path / "records", per_shard=4)
    assert len(list((tmp_path / "records").glob("train-*-of-00004.array_record"))) == 4
    records = read_images(str(tmp_path / "records"), 0.1)
    assert records.classes == 3
    assert same(records, images)
    assert same(pickle.loads(pickle.dumps(records)), images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "records"]
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_array_records(images, tmp_path / "records")


def test_arrays_are_written_as_images_without_loss(tmp_path: Path) -> None:
    digits = read_images("digits", 0.1)
    few = Images(digits.heldout, digits.heldout, 10, "")
    write_array_records(few, tmp_path / "records")
    back = read_images(str(tmp_path / "records"), 0.1).train
    for i in range(0, len(back), 20):
        decoded = np.asarray(Image.open(io.BytesIO(back[i]["image"])))
        assert np.array_equal(decoded, digits.heldout[i]["image"][..., 0])


def test_writing_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_array_records(Images(Broken([0]), Broken([0]), 1, ""), tmp_path / "records")
    assert list(tmp_path.iterdir()) == []


def array_records(root: Path, records: list[bytes], name: str = "train-0.array_record") -> Path:
    root.mkdir(exist_ok=True)
    writer = ArrayRecordWriter(str(root / name), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return root


def test_records_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def record(label: int, classes: int, magic: bytes = b"cdl1") -> bytes:
        return magic + struct.pack("<ii", label, classes) + png(0)

    with pytest.raises(UserError, match=r"begins with b'\\n\\x05ab', not b'cdl1'"):
        read_images(str(array_records(tmp_path / "example", [b"\n\5abcde" * 5])), 0.5)
    wrong = read_images(str(array_records(tmp_path / "label", [record(0, 2), record(2, 2), record(0, 3)])), 0.5)
    every = wrong.train._source  # type: ignore[attr-defined]
    assert every[0]["label"] == 0
    for i in (1, 2):
        with pytest.raises(UserError, match=f"record {i} has label"):
            every[i]
    both = array_records(tmp_path / "both", [record(0, 2)])
    array_records(both, [record(0, 3)], "validation-0.array_record")
    with pytest.raises(UserError, match="2 classes in train, 3"):
        read_images(str(both), 0.5)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train-0.array_record").write_bytes(b"no")
    with pytest.raises(UserError, match="no ArrayRecord"):
        read_images(str(tmp_path / "broken"), 0.5)
