"""Tokenizers: bytes, byte-level BPE from the two files that GPT-2 has, or a ``tokenizer.json``. No downloads.

Text that looks like a special token, ``<|endoftext|>`` in a document about tokenizers, stays text.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cdl.errors import UserError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Vocabulary", "read_vocabulary"]

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class Vocabulary(Protocol):
    """What turns text into tokens 0..size-1. end: the token after each document. about: name, end, fingerprints."""

    size: int
    end: int
    about: dict[str, Any]

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of UTF-8 text, 1-D, uint16 if `size` allows it, else uint32."""
        ...


def read_vocabulary(name: str) -> Vocabulary:
    """The tokenizer of ``--tokenizer`` and `data.tokenizer`: bytes, ``VOCAB.json,MERGES.txt`` or a ``tokenizer.json``.

    Raises:
      UserError: not there, not readable, files that do not fit together, no token that ends documents, or the
        package `tokenizers` is not installed.
    """
    if name == "bytes":
        return _Bytes()
    files = [Path(part).expanduser() for part in ([name] if Path(name).expanduser().is_file() else name.split(","))]
    for file in files:
        if not file.is_file():
            raise UserError(f"tokenizer={name}: there is no file {file}; give bytes, VOCAB.json,MERGES.txt or a .json")
    try:
        import tokenizers  # noqa: F401
    except ImportError as e:
        raise UserError(f"tokenizer={name} needs the package tokenizers: pip install tokenizers") from e
    if len(files) == 1:
        return _Files(_tokenizer_json(files[0]), files)
    if len(files) == 2:
        return _Files(_bpe(*files), files)
    raise UserError(f"tokenizer={name} has {len(files)} files; give bytes, VOCAB.json,MERGES.txt or a tokenizer.json")


class _Bytes:
    """Token b is byte b, and 0 ends documents; a NUL within one becomes U+FFFD."""

    size, end = 256, 0

    def __init__(self) -> None:
        self.about = {"name": "bytes", "end": "\0", "files": {}}

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text.replace(b"\0", b"\xef\xbf\xbd"), np.uint8).astype(np.uint16)


class _Files:
    def __init__(self, tokenizer: "tokenizers.Tokenizer", files: Sequence[Path]):
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._tokenizer = tokenizer
        self.size = max(vocabulary.values()) + 1
        self._dtype = np.uint16 if self.size <= 1 << 16 else np.uint32
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
        end = next((token for token in _ENDS if token in vocabulary), None)
        if end is None:
            raise UserError(f"{files[0]} has no token that ends a document; add {_ENDS[0]} to it")
        self.end = vocabulary[end]
        self.about = {"name": ",".join(str(file.resolve()) for file in files), "end": end, "files": hashes}
        special = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        for i, text in (special | {self.end: end}).items():
            if i in self.encode(text.encode()):
                raise UserError(
                    f"{files[0]} makes the special token {text} of the text {text!r}, so documents could hold it; "
                    "use byte-level BPE"
                )

    def encode(self, text: bytes) -> np.ndarray:
        # One at a time: a batch would be spread over threads, and each process has one core to itself.
        try:
            (encoding,) = self._tokenizer.encode_batch_fast([text.decode()], add_special_tokens=False)
        except Exception as e:  # it raises nothing narrower
            raise UserError(f"{self.about['name']} cannot encode {text[:40]!r} ({e}); use byte-level BPE") from e
        return np.array(encoding.ids, self._dtype)


def _tokenizer_json(file: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer

    content = _json(file)
    if "model" not in content:
        raise UserError(f"tokenizer={file} has no model in it; give a tokenizer.json, or VOCAB.json,MERGES.txt")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as e:  # it raises nothing narrower
        raise UserError(f"tokenizer={file} is no tokenizer.json ({str(e).splitlines()[0]}); save it again") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _bpe(vocabulary_file: Path, merges_file: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = _json(vocabulary_file)
    ids = list(vocabulary.values())
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids) or len(set(ids)) < len(ids):
        raise UserError(
            f"{vocabulary_file} is no vocabulary, its values are not distinct whole numbers; give VOCAB.json"
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if missing := set(alphabet) - vocabulary.keys():
        raise UserError(f"{vocabulary_file} lacks {len(missing)} of the 256 bytes; give a vocabulary of byte-level BPE")
    merges = _merges(merges_file)
    parts = {part for pair in merges for part in (*pair, "".join(pair))}
    apart = f"{vocabulary_file} and {merges_file} do not fit together"
    if unknown := parts - vocabulary.keys():
        raise UserError(f"{apart}: {len(unknown)} merges make or need a token like {min(unknown)!r} that is not there")
    unreachable = [t for t in vocabulary.keys() - parts - set(alphabet) if not t.startswith(("<", "["))]
    if len(unreachable) > len(vocabulary) / 100:
        raise UserError(
            f"{apart}: no merge makes {len(unreachable)} tokens of the vocabulary, {min(unreachable)!r} one"
        )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _merges(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{file} is no UTF-8 text; give MERGES.txt") from e
    if lines[0].startswith("#version"):
        del lines[0]
    merges = []
    for line in filter(None, (line.rstrip("\r") for line in lines)):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise UserError(f"{file} has the line {line!r:.40}, no pair of tokens; give VOCAB.json,MERGES.txt")
        merges.append((left, right))
    return merges


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as e:
        raise UserError(f"tokenizer: {file} is no JSON ({e}); give VOCAB.json,MERGES.txt or a tokenizer.json") from e
    if not isinstance(content, dict):
        raise UserError(f"tokenizer: {file} is no JSON object; give VOCAB.json,MERGES.txt or a tokenizer.json")
    return content
