"""Batches are functions of (seed, step); every kind of source; sources that cannot work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from cdl.data.text import batches, data_arguments, heldout_batches, read_corpus
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
    held = heldout_batches(corpus, SECTION, tokens=64)
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
