"""Pairs of prompts and answers: the loss is of answers alone, and each pair comes once an epoch."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

from cdl.config import base, flatten, section
from cdl.data import build
from cdl.data.pairs import batches, heldout_batches, read_pairs
from cdl.errors import UserError
from cdl.sweep.grid import Point

PAIRS = [(f"name[Inn {i}], food[{'fish' * (i % 3)}]", f"Inn {i} has {'some ' * (i % 5)}food.") for i in range(40)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "e2e.csv"
    pd.DataFrame(PAIRS, columns=["mr", "ref"]).to_csv(path, index=False)
    return path


def of(path: Path, **changes: object) -> ConfigDict:
    return section("data", "pairs", path=str(path), batch_size=4, seq_len=64, heldout=0.2, **changes)


def texts(batch: dict[str, np.ndarray]) -> list[tuple[bytes, bytes]]:
    """What is not learned of each row, and what is, padding left out."""
    rows = []
    for tokens_S1, weight_S in zip(batch["tokens"], batch["weight"], strict=True):
        learned_S1 = np.concatenate([[False], weight_S > 0])
        last = np.flatnonzero(learned_S1)[-1]
        asked, said = tokens_S1[: last + 1][~learned_S1[: last + 1]], tokens_S1[learned_S1]
        assert (tokens_S1[last:] == 0).all()
        rows.append((bytes(asked.tolist()), bytes(said.tolist())))
    return rows


def test_answers_and_the_ends_after_them_are_learned(file: Path) -> None:
    pairs = read_pairs(of(file))
    expected = {(prompt.encode() + b"\0", answer.encode() + b"\0") for prompt, answer in PAIRS}
    epoch = len(pairs.train) // 4
    train = [row for k in range(epoch) for row in texts(batches(pairs, of(file), 0)[k])]
    assert set(train) <= expected
    assert len(set(train)) == 4 * epoch
    held = heldout_batches(pairs, of(file), 10_000)
    kept = {row for e in range(len(held["tokens"])) for row in texts({k: v[e] for k, v in held.items()})}
    assert kept <= expected
    assert not kept & set(train)
    assert len(pairs.train) + len(pairs.heldout) == 40


def test_a_batch_is_a_function_of_seed_and_step_and_parts_join(file: Path) -> None:
    pairs = read_pairs(of(file))
    whole, again, other = (batches(pairs, of(file), seed) for seed in (3, 3, 4))
    halves = [batches(pairs, of(file), 3, (p, 2)) for p in range(2)]
    for k in reversed(range(20)):
        np.testing.assert_array_equal(whole[k]["tokens"], again[k]["tokens"])
        np.testing.assert_array_equal(whole[k]["weight"], np.concatenate([h[k]["weight"] for h in halves]))
    assert any((whole[k]["tokens"] != other[k]["tokens"]).any() for k in range(5))


def test_a_prompt_is_never_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    pd.DataFrame([(f"m{i % 50}", f"answer {i}") for i in range(500)], columns=["mr", "ref"]).to_csv(path, index=False)
    pairs = read_pairs(of(path))
    prompts = []
    for c in (pairs.train, pairs.heldout):
        rows = [c.token_N[c.start_P1[p] : c.start_P1[p + 1]] for p in range(len(c))]
        prompts.append({bytes(row[: list(row).index(0)].tolist()) for row in rows})
    assert not prompts[0] & prompts[1]
    assert 5 <= len(prompts[1]) <= 15


def test_a_folder_as_e2e_is_published_brings_its_held_out_part(tmp_path: Path) -> None:
    for name, part in (("trainset.csv", PAIRS[:30]), ("devset.csv", PAIRS[30:])):
        pd.DataFrame(part, columns=["mr", "ref"]).to_csv(tmp_path / name, index=False)
    pairs = read_pairs(of(tmp_path))
    assert (len(pairs.train), len(pairs.heldout)) == (30, 10)


def test_long_pairs_are_left_out_and_it_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = of(file)
    section.update(seq_len=44, batch_size=2)
    pairs = read_pairs(section)
    short = sum(len(a) + len(b) + 2 <= 45 for a, b in PAIRS)
    left = [batches(pairs, section, 0), heldout_batches(pairs, section, 1)]
    assert left
    assert 2 < short < 40
    said = capsys.readouterr().err
    assert "of 3" in said
    assert "longer than data.seq_len=44 and left out" in said
    assert all(len(a) + len(b) <= 45 for k in range(30) for a, b in texts(left[0][k]))


@pytest.mark.slow
def test_the_standard_library_has_thousands_of_pairs() -> None:
    data = build.build(section("data", "pairs"))
    batch = next(data.batches(0, 0))
    assert all(asked.startswith(b"def ") and said.endswith(b"\0") for asked, said in texts(batch))
    assert len(read_pairs(section("data", "pairs")).train) > 4000


def test_identity_is_of_the_tokens(file: Path, tmp_path: Path) -> None:
    moved = file.rename(tmp_path / "other.csv")
    one = build.fingerprint(of(moved))
    copy = tmp_path / "copy.csv"
    pd.DataFrame(PAIRS, columns=["a", "b"]).to_csv(copy, index=False)
    assert build.fingerprint(of(copy, prompt="a", answer="b")) == one
    assert build.fingerprint(of(copy, prompt="b", answer="a")) != one


def test_a_tokenizer_counts_by_its_tokens_wherever_it_lies(file: Path, gpt2_files: str, tmp_path: Path) -> None:
    def id(**changes: str) -> str:
        c = base()
        c.data = of(file, **changes)
        return Point(flatten(c), build.fingerprint(c.data)).id

    copies = [shutil.copy(name, tmp_path) for name in gpt2_files.split(",")]
    assert id(tokenizer=gpt2_files) == id(tokenizer=",".join(copies))
    assert id(tokenizer=gpt2_files) != id(tokenizer="bytes")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(prompt="meaning"), "data.prompt='meaning' is no column of"),
        (dict(answer="text"), "which has mr, ref; name one of these"),
        (dict(path="/nowhere"), "data.path='/nowhere' is no CSV file, nor a folder with trainset.csv and devset.csv"),
        (dict(path=""), "or 'stdlib'"),
        (dict(seq_len=10), "has 0 records for training that fit into data.seq_len=10"),
        (dict(seq_len=0), "data.seq_len=0 must be at least 1"),
        (dict(heldout=1.0), "data.heldout=1.0 must be a share"),
        (dict(tokenizer="no.json"), "there is no file no.json"),
    ],
)
def test_errors(file: Path, changes: dict[str, object], said: str) -> None:
    section = of(file)
    section.update(changes)
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        build.build(section).check(dict(vocab_size=256))
    assert said in str(caught.value)


def test_a_binary_file_is_no_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(bytes(range(256)) * 8)
    with pytest.raises(UserError, match=r"no CSV file|no column"):
        read_pairs(of(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mr,ref\na,b\nname[y]\n", "has 1 rows without 'mr' or 'ref', the first after 1 others"),
        ("mr,ref\na,b\n,c\na,\n", "has 2 rows without 'mr' or 'ref'"),
        ("mr,mr,ref\na,b,c\n", "data.prompt='mr' is the name of two columns"),
    ],
)
def test_rows_without_one_of_the_two_are_said(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_pairs(of(path))


def test_rows_longer_than_the_header_are_no_index(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("mr,ref\n" + "".join(f"name{i},one, two\n" for i in range(40)))
    with pytest.raises(UserError, match=r"x\.csv' is no CSV file .*Length of header"):
        read_pairs(of(path))


def test_a_small_vocabulary_is_said(file: Path) -> None:
    with pytest.raises(UserError, match=r"model.vocab_size=100 is too small"):
        build.build(of(file)).check(dict(vocab_size=100))
