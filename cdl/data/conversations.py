"""Records of prompts and answers as rows of tokens, with the loss on the answers alone.

A record is a list of turns, (prompt, answer). Its row is, for each turn, the tokens of the prompt, the vocabulary's end
token, the tokens of the answer, and the end token again; answers and the ends after them are what is learned. Rows are
padded on the right, where nothing is learned. Records that are longer than a row are left out.
"""

import functools
import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from cdl.data.vocabulary import Vocabulary
from cdl.errors import UserError, check_share, say

__all__ = [
    "Conversations",
    "Rows",
    "Turns",
    "check_section",
    "fingerprint",
    "fitting",
    "holds_out",
    "shuffled",
    "spread",
    "subset",
    "tokenize",
]

Turns = Sequence[tuple[str, str]]


class Conversations(NamedTuple):
    """The tokens of all records, one after the other.

    token_N: uint16 or uint32. learned_N: bool, is it one that the loss is of? start_P1: int64; record p has
    ``token_N[start_P1[p]:start_P1[p + 1]]``. end: the token between prompt and answer.
    """

    token_N: np.ndarray
    learned_N: np.ndarray
    start_P1: np.ndarray
    end: int

    def __len__(self) -> int:
        return len(self.start_P1) - 1


def check_section(section: ConfigDict) -> None:
    """What can be wrong with the fields that `data` sections of records share.

    Raises:
      UserError: sizes that are not positive, or a share that is none.
    """
    for name in ("batch_size", "seq_len"):
        if section[name] < 1:
            raise UserError(f"data.{name}={section[name]} must be at least 1")
    check_share("data.heldout", section.heldout)


def tokenize(records: Iterable[Turns], vocabulary: Vocabulary) -> Conversations:
    """The records as tokens.

    Raises:
      UserError: text that the vocabulary cannot encode.
    """
    dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)
    end = np.array([vocabulary.end], dtype).tobytes()
    tokens, learned = bytearray(), bytearray()  # an array for each of many short texts would be mostly its header
    start = array("q", [0])
    for turns in records:
        for prompt, answer in turns:
            for text, is_learned in ((prompt, b"\0"), (answer, b"\1")):
                said = vocabulary.encode(text.encode())
                tokens += said.astype(dtype).tobytes() + end
                learned += is_learned * (len(said) + 1)
        start.append(len(learned))
    token_N, learned_N = np.frombuffer(tokens, dtype), np.frombuffer(learned, bool)
    return Conversations(token_N, learned_N, np.array(start), vocabulary.end)


def subset(conversations: Conversations, mask_P: np.ndarray) -> Conversations:
    """The records for which the mask is true."""
    c = conversations
    size_P = np.diff(c.start_P1)
    kept_N = np.repeat(mask_P, size_P)
    start_P1 = np.concatenate([[0], np.cumsum(size_P[mask_P])])
    return Conversations(c.token_N[kept_N], c.learned_N[kept_N], start_P1, c.end)


def fitting(conversations: Conversations, section: ConfigDict, what: str, before_P: np.ndarray | int = 0) -> np.ndarray:
    """The indices of the records that fit into a row of S + 1 tokens, after so many others (`before_P`).

    Raises:
      UserError: fewer than a batch has.
    """
    size_P = np.diff(conversations.start_P1) + before_P
    index = np.flatnonzero(size_P <= section.seq_len + 1)
    if len(index) < section.batch_size:
        longest = f"; the longest has {size_P.max()} tokens" if len(size_P) else ""
        raise UserError(
            f"data.path={section.path!r} has {len(index)} records for {what} that fit into data.seq_len="
            f"{section.seq_len}, and a batch has {section.batch_size}{longest}; use more records, a smaller "
            f"data.batch_size or a larger data.seq_len"
        )
    if len(index) < len(size_P):
        _say_once(
            f"{len(size_P) - len(index)} of {len(size_P)} records of data.path={section.path!r} for {what} are longer "
            f"than data.seq_len={section.seq_len} and left out"
        )
    return index


_say_once = functools.cache(say)  # batches are made anew for every run


class Rows(grain.sources.RandomAccessDataSource):
    """Item i is record ``index[i]`` as dict(tokens=int32 [S + 1], weight=float32 [S]), 1 where the loss is of it.

    Args:
      before_P: end tokens in front of each record, where something else is to stand.
    """

    def __init__(self, conversations: Conversations, index: np.ndarray, S: int, before_P: np.ndarray | None = None):
        self._conversations, self._index, self._S, self._before_P = conversations, index, S, before_P

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        c, p = self._conversations, self._index[index]
        first = 0 if self._before_P is None else self._before_P[p]
        start, end = c.start_P1[p : p + 2]
        tokens = np.full(self._S + 1, c.end, np.int32)
        learned = np.zeros(self._S + 1, bool)
        tokens[first : first + end - start] = c.token_N[start:end]
        learned[first : first + end - start] = c.learned_N[start:end]
        return dict(tokens=tokens, weight=learned[1:].astype(np.float32))

    def __repr__(self) -> str:
        return f"Rows(n={len(self)}, S={self._S})"


def shuffled(
    rows: grain.sources.RandomAccessDataSource, section: ConfigDict, seed: int, part: tuple[int, int]
) -> grain.MapDataset:
    """Batches of rows in a random order, each row once an epoch; of part (p, P) the p-th of P equal parts of each.

    Raises:
      UserError: P processes cannot share a batch.
    """
    p, P = part
    B = section.batch_size
    if B % P:
        raise UserError(f"data.batch_size={B} cannot be shared by {P} processes; use a multiple of {P}")
    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(B // P, drop_remainder=True)[p::P]


def spread(
    rows: grain.sources.RandomAccessDataSource, conversations: Conversations, section: ConfigDict, size: int
) -> dict[str, np.ndarray]:
    """As many batches of these rows as have about `size` learned tokens, with a leading axis E, evenly spread.

    Args:
      conversations: of which they are rows.
    """
    B = section.batch_size
    mean = conversations.learned_N.sum() / len(conversations)
    E = min(max(1, round(size / (B * mean))), len(rows) // B)
    chosen = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, E * B).astype(np.int64)]
    return {name: np.stack([row[name] for row in chosen]).reshape(E, B, *chosen[0][name].shape) for name in chosen[0]}


def holds_out(text: str, share: float) -> bool:
    """Is a record with this prompt held out? By a hash of it, so no prompt is learned from and evaluated on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * 2**64


def fingerprint(*conversations: Conversations) -> str:
    """A hash of the tokens, of where records begin, and of what is learned."""
    h = hashlib.sha256()
    for c in conversations:
        for part in (c.token_N, c.learned_N, c.start_P1):
            h.update(f"{part.dtype}{part.shape}".encode())
            h.update(np.ascontiguousarray(part).data)
    return h.hexdigest()[:16]
