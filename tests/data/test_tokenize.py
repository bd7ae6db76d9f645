"""Token files equal what the tokenizer alone gives, for any number of processes, and appear whole or not at all."""

import json
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdl.data import documents, tokenize
from cdl.data.documents import Documents
from cdl.data.text import read_corpus
from cdl.data.tokenize import Progress, write_token_files
from cdl.data.vocabulary import read_vocabulary
from cdl.errors import UserError

from .conftest import HARD


@pytest.fixture(scope="module")
def tokenizer_json(gpt2_files: str) -> str:
    """The same with further special tokens, a beginning that is put before each text, and truncation."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.ByteLevelBPETokenizer(*gpt2_files.split(","))
    inner = bpe._tokenizer
    inner.add_special_tokens(["<s>", "<|endoftext|>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    inner.enable_truncation(8)
    inner.enable_padding(length=8)
    path = Path(gpt2_files.split(",")[0]).parent / "tokenizer.json"
    inner.save(str(path))
    return str(path)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """300 documents of many lengths."""
    rng = np.random.default_rng(0)
    path = tmp_path / "documents.jsonl"
    texts = [" ".join(rng.choice(HARD, rng.integers(1, 9))) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": f"{i} {t}"}) + "\n" for i, t in enumerate(texts)))
    return path


def split_at(tokens: np.ndarray, end: int) -> list[list[int]]:
    assert tokens[-1] == end
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]]


def test_tokens_equal_those_of_transformers(gpt2_files: str, tokenizer_json: str) -> None:
    transformers = pytest.importorskip("transformers")
    vocab, merges = (Path(name) for name in gpt2_files.split(","))
    pairs = [tuple(line.split(" ")) for line in merges.read_text().splitlines()[1:]]
    reference = transformers.GPT2Tokenizer(vocab=json.loads(vocab.read_text()), merges=pairs)
    for ours in (read_vocabulary(gpt2_files), read_vocabulary(tokenizer_json)):
        assert ours.end == reference.eos_token_id
        for text in HARD:
            expected = reference(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            assert ours.encode(text.encode()).tolist() == expected


def test_files_hold_each_document_as_the_tokenizer_alone_gives_it(gpt2_files: str, lines: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.ByteLevelBPETokenizer(*gpt2_files.split(","))
    about = write_token_files([str(lines)], lines.parent / "out", tokenizer=gpt2_files, val=0.2, workers=1)
    texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    end = reference.token_to_id("<|endoftext|>")
    expected = [[*reference.encode(text).ids, end] for text in texts]
    train, val = (np.fromfile(lines.parent / "out" / f, "<u2") for f in ("train.bin", "val.bin"))
    found = {name: split_at(tokens, end) for name, tokens in (("train", train), ("val", val))}
    held = [e in found["val"] for e in expected]
    assert found["train"] == [e for e, h in zip(expected, held, strict=True) if not h]  # whole and in order
    assert found["val"] == [e for e, h in zip(expected, held, strict=True) if h]
    assert 30 < sum(held) < 90  # of 300, a share of 0.2 and five standard deviations
    for name, tokens in (("train", train), ("val", val)):
        assert about[name]["documents"] == len(found[name])
        assert about[name]["tokens"] == len(tokens)
    assert (about["dtype"], about["vocab_size"], about["end_token"]) == ("uint16", reference.get_vocab_size(), end)
    assert about == json.loads((lines.parent / "out" / "tokens.json").read_text())


def test_cutting_a_long_document_changes_no_token(
    gpt2_files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PIECE", 2000)
    monkeypatch.setattr(documents, "_HEAD", 500)
    text = "".join(np.random.default_rng(1).choice(HARD, 200))
    (tmp_path / "long.txt").write_text(text, newline="")
    vocabulary = read_vocabulary(gpt2_files)
    pieces = list(Documents([str(tmp_path / "long.txt")], "text"))
    assert len(pieces) > 20
    joined = np.concatenate([vocabulary.encode(p.text) for p in pieces])
    assert np.array_equal(joined, vocabulary.encode(text.encode()))


def test_bytes_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(HARD):
        (folder / f"{i}.txt").write_bytes(text.encode())
    about = write_token_files([str(folder)], tmp_path / "out", val=0.5, workers=1)
    corpus = read_corpus(str(tmp_path / "out"), 0.1)
    stream = np.concatenate([corpus.train, corpus.heldout])
    assert corpus.train.dtype == np.uint16
    assert sorted(bytes(part[:-1]).decode() for part in split_at(stream, 0)) == sorted(HARD)
    assert about["vocab_size"] == 256
    (tmp_path / "nul.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "c"}')
    assert read_vocabulary("bytes").encode(b"a\0b").tolist() == list("a\ufffdb".encode())


@pytest.mark.parametrize("wide", [False, True])
def test_any_number_of_processes_writes_the_same_files(
    tmp_path: Path, lines: Path, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(tokenize, "_CHUNK", 1 << 15)  # many, so that they could come out of order
    words = {f"w{i}": i for i in range(70_000 if wide else 100)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | {"?": len(words)}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<eos>"])
    model.save(str(tmp_path / "words.json"))
    parts = ["".join(f'{{"text": "w{i} w{7 * i} w69999 {"w5 " * (i % 90)}"}}\n' for i in range(6000))]
    (tmp_path / "words.jsonl").write_text(parts[0])
    made = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        about = write_token_files(
            [str(lines), str(tmp_path / "words.jsonl")],
            out,
            tokenizer=str(tmp_path / "words.json"),
            val=0.1,
            workers=workers,
        )
        assert about["dtype"] == ("uint32" if wide else "uint16")
        made.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert made[0] == made[1]
    corpus = read_corpus(str(tmp_path / "out3"), 0.1)
    assert corpus.train.max() == (70_001 if wide else 101)


def test_a_document_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    texts = [f"document {i}\n" for i in range(200)]
    held = []
    for n, order in ((200, 1), (150, -1)):
        pq.write_table(pa.table({"body": texts[:n][::order] * 2}), tmp_path / f"{n}.parquet")
        write_token_files([str(tmp_path / f"{n}.parquet")], tmp_path / f"{n}", field="body", val=0.3, workers=1)
        held.append(bytes(np.fromfile(tmp_path / f"{n}" / "val.bin", "<u2").astype(np.uint8)).split(b"\0")[:-1])
    all_held, fewer_held = (sorted(h) for h in held)
    assert fewer_held == sorted(2 * [t.encode() for t in texts[:150] if t.encode() in all_held])


@pytest.mark.parametrize("val", [0.01, 0.99])
def test_of_a_single_document_the_tail_is_held_out(tmp_path: Path, val: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE", 1000)
    monkeypatch.setattr(documents, "_HEAD", 200)
    text = "".join(HARD).encode() * 3
    (tmp_path / "one.txt").write_bytes(text)
    about = write_token_files([str(tmp_path / "one.txt")], tmp_path / "out", val=val, workers=1)
    corpus = read_corpus(str(tmp_path / "out"), 0.5)
    assert bytes(np.concatenate([corpus.train, corpus.heldout]).astype(np.uint8)) == text + b"\0"
    assert len(corpus.heldout) == about["val"]["tokens"] == round(val * (len(text) + 1))


def test_at_most_two_chunks_a_process_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How far the sources are read ahead of what is written."""
    read = 0

    def endless(self: Documents) -> Iterator[documents.Piece]:
        nonlocal read
        for i in range(24):
            read += 1
            yield documents.Piece(f"{i} ".encode() * (1 << 19), last=True)  # one chunk each

    monkeypatch.setattr(Documents, "__iter__", endless)
    (tmp_path / "a.txt").write_text("a")
    ahead: list[int] = []

    def watch(progress: Progress) -> None:
        ahead.append(read - progress.documents)

    write_token_files([str(tmp_path / "a.txt")], tmp_path / "out", val=0.3, workers=2, watch=watch)
    assert len(ahead) == 24
    assert max(ahead) <= 4


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, lines: Path, workers: int) -> None:
    before = sorted(tmp_path.iterdir())

    def interrupt(progress: Progress) -> None:
        assert any(f.stat().st_size >= 0 for f in tmp_path.rglob("train.bin"))  # it is being written
        raise _Stop

    with pytest.raises(_Stop):
        write_token_files([str(lines)], tmp_path / "out", workers=workers, watch=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, lines: Path) -> None:
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(UserError, match=r"--out=.*cannot be written \(File too large\)"):
            write_token_files([str(lines)], tmp_path / "out", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_work_is_named_and_leaves_nothing(tmp_path: Path, lines: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "same.jsonl").write_text('{"text": "same"}\n' * 5)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(out="out"), "exists already"),
        (dict(out="link"), "exists already"),
        (dict(source="empty.txt"), "no document with text"),
        (dict(source="same.jsonl"), "all 5 documents begin alike"),
        (dict(val=0.0), "--val=0.0 must be"),
        (dict(val=1.0), "--val=1.0 must be"),
        (dict(val=1e-9), "holds out none of 300 documents"),
        (dict(val=1 - 1e-9), "holds out all of 300 documents"),
        (dict(workers=0), "--workers=0 must be"),
        (dict(tokenizer="gpt2"), "no file gpt2"),
        (dict(field="body"), "no field 'body'"),
    ]
    for case, words in cases:
        options = dict(source=lines.name, out="new", workers=1) | case
        source, out = tmp_path / options.pop("source"), tmp_path / options.pop("out")
        with pytest.raises(UserError, match=re.escape(words)) as raised:
            write_token_files([str(source)], out, **options)
        assert "\n" not in str(raised.value)
        assert sorted(tmp_path.iterdir()) == before
        assert not list((tmp_path / "out").iterdir())


def test_the_share_that_an_error_proposes_works(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(4)))
    for val in (1e-9, 1 - 1e-9):
        with pytest.raises(UserError, match="choose a share") as raised:
            write_token_files([str(tmp_path / "few.jsonl")], tmp_path / "out", val=val, workers=1)
        for i, share in enumerate(re.findall(r"[\d.]+", str(raised.value).partition("choose")[2])):
            about = write_token_files(
                [str(tmp_path / "few.jsonl")], tmp_path / f"{val}{i}", val=float(share), workers=1
            )
            assert about["train"]["documents"] + about["val"]["documents"] == 4


def test_an_error_in_a_worker_is_one_line(tmp_path: Path, lines: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    model.add_special_tokens(["</s>"])
    model.encode_special_tokens = True
    model.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match=r"words.json cannot encode"):
        write_token_files([str(lines)], tmp_path / "out", tokenizer=str(tmp_path / "words.json"), workers=2)
    assert not (tmp_path / "out").exists()


def test_tokenizer_files_that_do_not_fit_are_named(tmp_path: Path, gpt2_files: str, tokenizer_json: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocab, merges = gpt2_files.split(",")
    other = tokenizers.ByteLevelBPETokenizer()
    other.train_from_iterator(["entirely different words, zyzzyva"] * 9, vocab_size=300, show_progress=False)
    (tmp_path / "other").mkdir()
    other_vocab, other_merges = other.save_model(str(tmp_path / "other"))
    tokens = json.loads(Path(vocab).read_text())

    def write(name: str, content: Any) -> str:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    lines = Path(merges).read_text().split("\n")
    few = "\n".join(lines[: len(lines) // 2])
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], 0))
    unigram.add_special_tokens(["</s>"])
    unigram.save(str(tmp_path / "unigram.json"))
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    bare.save(str(tmp_path / "bare.json"))
    cases = {
        f"{vocab},{other_merges}": "do not fit together",
        f"{other_vocab},{merges}": "do not fit together",
        f"{vocab},{write('few.txt', few)}": "do not fit together",
        f"{other_vocab},{other_merges}": "no token that ends a document",
        f"{merges},{vocab}": "is no JSON",
        f"{vocab},{vocab}": "no pair of tokens",
        f"{vocab},{merges},{merges}": "3 files",
        f"{write('short.json', {'a': 0})},{merges}": "lacks 255 of the 256 bytes",
        f"{write('twice.json', dict.fromkeys(tokens, 0))},{merges}": "not distinct",
        vocab: "has no model in it",
        merges: "is no JSON",
        write("odd.json", {"model": {"type": "odd"}}): "is no tokenizer.json",
        write("list.json", [1]): "is no JSON object",
        str(tmp_path / "unigram.json"): "makes the special token </s>",
        str(tmp_path / "bare.json"): "no token that ends a document",
        f"{vocab},{tmp_path}/nowhere.txt": "there is no file",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as raised:
            read_vocabulary(name)
        assert "\n" not in str(raised.value)
    assert read_vocabulary(tokenizer_json).size == len(tokens) + 1


def test_without_the_package_the_command_to_install_it_is_named(
    gpt2_files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install tokenizers"):
        read_vocabulary(gpt2_files)
    assert read_vocabulary("bytes").size == 256
