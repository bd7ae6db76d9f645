"""Batches are functions of (seed, step); every kind of source; sources that cannot work."""

import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from ml_collections import ConfigDict

from cdl.data.text import Corpus, batches, data_arguments, heldout_batches, largest_token, read_corpus
from cdl.data.token_files import fingerprint
from cdl.errors import UserError

SECTION = ConfigDict(dict(path="x", batch_size=4, seq_len=8, heldout=0.1))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(32, 127, 3000, dtype=np.uint8).tobytes())
    return path


def test_a_batch_is_a_function_of_seed_and_step(text_file: Path) -> None:
    corpus = read_corpus(str(text_file), 0.1)
    one, again, other = (batches(corpus, SECTION, seed) for seed in (7, 7, 8))
    assert one[0].shape == (4, 9)
    backwards = [again[k] for k in reversed(range(300))][::-1]  # in any order, past the first epoch
    assert all(np.array_equal(one[k], backwards[k]) for k in range(300))
    assert not all(np.array_equal(one[k], other[k]) for k in range(10))


def test_every_window_comes_once_an_epoch(text_file: Path) -> None:
    corpus = read_corpus(str(text_file), 0.1)
    windows = (len(corpus.train) - 1) // 8
    epochs = np.concatenate([batches(corpus, SECTION, 0)[k] for k in range(2 * windows // 4)])
    every = sorted(corpus.train[8 * i : 8 * i + 9].tobytes() for i in range(windows))
    first, second = epochs[:windows], epochs[windows : 2 * windows]
    assert sorted(w.tobytes() for w in first) == every
    assert not np.array_equal(first[: len(second)], second)  # a new order


def test_held_out_text_is_the_tail_and_is_not_trained_on(text_file: Path) -> None:
    corpus = read_corpus(str(text_file), 0.1)
    whole = np.frombuffer(text_file.read_bytes(), np.uint8)
    assert np.array_equal(np.concatenate([corpus.train, corpus.heldout]), whole)
    assert len(corpus.heldout) == 300
    held = heldout_batches(corpus, SECTION, size=64)
    assert held.shape == (2, 4, 9)
    assert all(w.tobytes() in corpus.heldout.tobytes() for w in held.reshape(-1, 9))


def test_the_embedded_text_is_real_and_large() -> None:
    corpus = read_corpus("stdlib", 0.05)
    assert len(corpus.train) > 5_000_000
    assert corpus.train.max() < 256
    assert b"def __init__(self" in corpus.train.tobytes()
    batches(corpus, ConfigDict(data_arguments()), 0)[0]


def test_a_bin_file_is_mapped_and_a_folder_of_bins_brings_its_split(tmp_path: Path) -> None:
    tokens = np.arange(5000, dtype=np.uint16) * 13
    tokens.tofile(tmp_path / "train.bin")
    tokens[:900].tofile(tmp_path / "val.bin")
    one = read_corpus(str(tmp_path / "train.bin"), 0.1)
    assert isinstance(one.train, np.memmap)
    assert np.array_equal(np.concatenate([one.train, one.heldout]), tokens)
    both = read_corpus(str(tmp_path), 0.1)
    assert len(both.train) == 5000
    assert np.array_equal(both.heldout, tokens[:900])


def test_a_folder_is_read_in_an_order_of_its_own_without_binary_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for i in range(30):
        (tmp_path / ("sub" if i % 2 else "") / f"{i}.md").write_text(f"document {i}. " * 20)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\0")
    (tmp_path / ".hidden").write_text("secret")
    corpus = read_corpus(str(tmp_path), 0.1)
    text = np.concatenate([corpus.train, corpus.heldout]).tobytes()
    documents = text.split(b"\0")
    assert len(documents) == 30
    assert sorted(documents) != documents
    assert b"PNG" not in text
    assert b"secret" not in text


def test_fingerprint_is_of_the_tokens_and_not_of_the_path(tmp_path: Path, text_file: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    changed = tmp_path / "changed.txt"
    changed.write_bytes(text_file.read_bytes()[:-1] + b"!")
    prints = [read_corpus(str(p), 0.1).fingerprint for p in (text_file, copy, changed)]
    assert prints[0] == prints[1] != prints[2]


def test_sources_that_cannot_work_are_named(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "half").mkdir()
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "half" / "train.bin")
    said = {
        "missing.txt": "does not exist",
        "odd.bin": "3 bytes",
        "empty.txt": "is empty",
        "folder": "no text file",
        "half": "no val.bin",
    }
    for name, words in said.items():
        with pytest.raises(UserError, match=words):
            read_corpus(str(tmp_path / name), 0.1)
    with pytest.raises(UserError, match=r"data.heldout=1.0"):
        read_corpus("stdlib", 1.0)


@pytest.mark.parametrize("change", [dict(batch_size=1000), dict(seq_len=1000), dict(batch_size=0), dict(seq_len=-1)])
def test_too_little_text_for_one_batch_is_named(text_file: Path, change: dict[str, Any]) -> None:
    corpus = read_corpus(str(text_file), 0.1)
    field, value = next(iter(change.items()))
    section = ConfigDict(SECTION.to_dict() | change)
    with pytest.raises(UserError, match=rf"{value}"):
        batches(corpus, section, 0)
    with pytest.raises(UserError, match=field):
        heldout_batches(corpus, section, 64)


@pytest.mark.parametrize("P", [1, 2, 4])
def test_parts_of_a_batch_join_to_the_whole(text_file: Path, P: int) -> None:
    corpus = read_corpus(str(text_file), 0.1)
    whole = batches(corpus, SECTION, 3)
    parts = [batches(corpus, SECTION, 3, part=(p, P)) for p in range(P)]
    for k in (0, 1, 7, 200, 1000):  # past the first epochs, too
        assert np.array_equal(np.concatenate([part[k] for part in parts]), whole[k])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_the_largest_token_is_found_wherever_it_is(dtype: Any) -> None:
    for where in (0, 5_000_000, 9_999_999):
        tokens = np.zeros(10_000_000, dtype)
        tokens[where] = np.iinfo(dtype).max
        empty = tokens[:0]
        assert largest_token(Corpus(tokens, tokens[:1], "")) == np.iinfo(dtype).max
        assert largest_token(Corpus(empty, tokens, "")) == np.iinfo(dtype).max


def test_processes_must_share_a_batch_evenly(text_file: Path) -> None:
    with pytest.raises(UserError, match=r"data.batch_size=4 cannot be shared by 3 processes"):
        batches(read_corpus(str(text_file), 0.1), SECTION, 0, part=(0, 3))


def test_files_as_nanogpt_writes_them_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = {name: rng.integers(0, 50257, n, dtype=np.uint16) for name, n in (("train", 9000), ("val", 700))}
    for name, tokens in written.items():  # its data/openwebtext/prepare.py
        array = np.memmap(tmp_path / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(len(tokens),))
        for i in range(0, len(tokens), 1000):
            array[i : i + 1000] = tokens[i : i + 1000]
        array.flush()
    corpus = read_corpus(str(tmp_path), 0.1)
    assert np.array_equal(corpus.train, written["train"])
    assert np.array_equal(corpus.heldout, written["val"])
    assert largest_token(corpus) == max(t.max() for t in written.values())


def write_described(folder: Path, tokens: np.ndarray, **about: Any) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("train", "val"):
        tokens.tofile(folder / f"{name}.bin")
    (folder / "tokens.json").write_text(json.dumps({"dtype": tokens.dtype.name, "vocab_size": 100_000} | about))


def test_tokens_json_says_how_wide_tokens_are(tmp_path: Path) -> None:
    tokens = np.arange(70_000, 75_000, dtype=np.uint32)
    write_described(tmp_path, tokens)
    corpus = read_corpus(str(tmp_path), 0.1)
    assert corpus.train.dtype == np.uint32
    assert np.array_equal(corpus.train, tokens)
    assert batches(corpus, SECTION, 0)[0].max() > 1 << 16
    one = read_corpus(str(tmp_path / "train.bin"), 0.1)
    assert np.array_equal(np.concatenate([one.train, one.heldout]), tokens)


def test_files_that_are_not_those_described_are_named(tmp_path: Path) -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    of_file = {"tokens": 5000, "fingerprint": fingerprint(tokens)}
    write_described(tmp_path, tokens, train=of_file, val=of_file)
    read_corpus(str(tmp_path), 0.1)
    changed = tokens.copy()
    changed[4321] = 1
    cases: list[tuple[bytes, dict[str, Any], str]] = [
        (changed.tobytes(), {}, "was changed after"),
        (tokens[:-1].tobytes(), {}, "4999 tokens where tokens.json says 5000"),
        (tokens.tobytes()[:-1], {}, "has 9999 bytes, no array of uint16 tokens"),
        (tokens.tobytes(), {"vocab_size": 4999}, "token 4999 where tokens.json says vocab_size=4999"),
        (tokens.tobytes()[:-2], {"dtype": "uint32"}, "has 9998 bytes, no array of uint32 tokens"),
        (tokens.tobytes(), {"dtype": "float16"}, "needs dtype"),
        (tokens.tobytes(), {"vocab_size": "many"}, "needs dtype"),
    ]
    for content, about, words in cases:
        write_described(tmp_path, tokens, **({"train": of_file, "val": of_file} | about))
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_corpus(str(tmp_path), 0.1)
    (tmp_path / "tokens.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_corpus(str(tmp_path), 0.1)


def test_a_bin_file_that_holds_something_else_is_named(tmp_path: Path) -> None:
    array = np.arange(3000, dtype=np.uint16)

    def file(write: Callable[[BinaryIO], Any]) -> bytes:
        write(buffer := io.BytesIO())
        return buffer.getvalue()

    cases = [
        (file(lambda f: np.save(f, array)), "a NumPy .npy file"),
        (file(lambda f: np.savez(f, array)), "a zip archive"),
        (gzip.compress(array.tobytes()), "a gzip archive"),
        *((pickle.dumps(x, protocol), "a Python pickle") for x in (array, array.tolist()) for protocol in (2, 3, 4, 5)),
        (("A sentence, naïve or 三. " * 9000).encode(), "text"),
        (np.arange(3000, dtype=np.int64).tobytes(), "32 or more bits"),
        (np.arange(3000, dtype=np.uint32).tobytes(), "32 or more bits"),
        (b"", "0 bytes"),
    ]
    for content, what in cases:
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(UserError, match=what) as raised:
            read_corpus(str(tmp_path / "train.bin"), 0.1)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("vocabulary", [2, 4, 65, 256, 50257, 65536])
def test_no_array_of_tokens_is_taken_for_something_else(tmp_path: Path, vocabulary: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, vocabulary, rng.integers(16, 400), dtype=np.uint16)
        tokens.tofile(tmp_path / "train.bin")
        corpus = read_corpus(str(tmp_path / "train.bin"), 0.1)
        assert np.array_equal(np.concatenate([corpus.train, corpus.heldout]), tokens)
