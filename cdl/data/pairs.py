"""Pairs of texts, prompt and answer, for fine-tuning with the loss on the answer alone.

Where they come from (`data.path`):

- ``stdlib``: the functions of Python's own standard library that have a docstring: the signature is the prompt, the
  first paragraph of the docstring the answer. Six thousand real pairs on every machine.
- a CSV file with a column of prompts and one of answers, those of the E2E data (Novikova et al., 2017) by default.
- a folder with ``trainset.csv`` and ``devset.csv``, as E2E is published.
"""

import ast
import functools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from cdl.data.conversations import (
    Conversations,
    Rows,
    check_section,
    fingerprint,
    fitting,
    holds_out,
    shuffled,
    spread,
    tokenize,
)
from cdl.data.text import source_files
from cdl.data.vocabulary import read_vocabulary
from cdl.errors import UserError

__all__ = ["Pairs", "batches", "check_section", "data_arguments", "heldout_batches", "read_pairs"]

_FILES = ("trainset.csv", "devset.csv")

Texts = list[tuple[str, str]]


class Pairs(NamedTuple):
    """fingerprint: a hash of all tokens, whatever the path."""

    train: Conversations
    heldout: Conversations
    fingerprint: str


def data_arguments() -> dict[str, Any]:
    """The `data` section of a config.

    path: see the module. batch_size: B pairs. seq_len: S positions of a row; longer pairs are left out. heldout: share
    of the prompts that is kept for evaluation (a folder brings its own). tokenizer: see
    `cdl.data.vocabulary.read_vocabulary`. prompt, answer: columns of a CSV file.
    """
    return dict(path="stdlib", batch_size=8, seq_len=256, heldout=0.05, tokenizer="bytes", prompt="mr", answer="ref")


def read_pairs(section: ConfigDict) -> Pairs:
    """Read and tokenize the pairs behind `data.path`.

    Raises:
      UserError: nothing there, no CSV file with these columns, or a tokenizer that cannot be read.
    """
    check_section(section)
    return _read(section.path, section.heldout, section.tokenizer, section.prompt, section.answer)


def batches(pairs: Pairs, section: ConfigDict, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Random access to batches: ``batches(...)[k-1]`` is that of update k, dict(tokens=int32 [B, S+1], weight=float32
    [B, S]). All pairs are visited in a random order, each once an epoch, a new order every epoch.

    Args:
      section: the `data` section of a config.
      seed: of the order.
      part: (p, P) for the rows [p*B/P, (p+1)*B/P) of every batch, which process p of P reads.

    Raises:
      UserError: too few pairs for one batch, or P processes cannot share B of them.
    """
    rows = Rows(pairs.train, fitting(pairs.train, section, "training"), section.seq_len)
    return shuffled(rows, section, seed, part)


def heldout_batches(pairs: Pairs, section: ConfigDict, size: int) -> dict[str, np.ndarray]:
    """The fixed held-out set, as `batches` with a leading axis E: as many as have about `size` learned tokens, spread
    evenly over the held-out pairs.

    Raises:
      UserError: too few pairs for one batch.
    """
    rows = Rows(pairs.heldout, fitting(pairs.heldout, section, "evaluation"), section.seq_len)
    return spread(rows, pairs.heldout, section, size)


@functools.lru_cache(maxsize=4)
def _read(path: str, heldout: float, tokenizer: str, prompt: str, answer: str) -> Pairs:
    vocabulary = read_vocabulary(tokenizer)
    where = Path(path).expanduser()
    if path == "stdlib":
        train, held = _split(sorted(set(_docstrings(Path(sysconfig.get_paths()["stdlib"])))), heldout)
    elif path and where.is_file():
        train, held = _split(_csv(where, prompt, answer), heldout)
    elif path and all((where / name).is_file() for name in _FILES):
        train, held = (_csv(where / name, prompt, answer) for name in _FILES)
    else:
        raise UserError(
            f"data.path={path!r} is no CSV file, nor a folder with {' and '.join(_FILES)}; give one, or 'stdlib'"
        )
    made = [tokenize(([pair] for pair in pairs), vocabulary) for pairs in (train, held)]
    return Pairs(made[0], made[1], fingerprint(*made))


def _split(pairs: Texts, heldout: float) -> tuple[Texts, Texts]:
    held = [holds_out(prompt, heldout) for prompt, _ in pairs]
    train, kept = ([pair for pair, out in zip(pairs, held, strict=True) if out is wanted] for wanted in (False, True))
    return train, kept


def _csv(path: Path, prompt: str, answer: str) -> Texts:
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # rows longer than the header
            table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, OSError, pd.errors.ParserWarning) as e:  # pandas' own errors are ValueErrors
        raise UserError(f"data.path: {str(path)!r} is no CSV file ({str(e).splitlines()[0]}); give one") from e
    for field, name in (("prompt", prompt), ("answer", answer)):
        if name not in table:
            raise UserError(
                f"data.{field}={name!r} is no column of {str(path)!r}, which has {', '.join(map(str, table.columns))}; "
                f"name one of these"
            )
        if f"{name}.1" in table:
            raise UserError(f"data.{field}={name!r} is the name of two columns of {str(path)!r}; rename one")
    empty = np.flatnonzero((table[prompt] == "") | (table[answer] == ""))
    if len(empty):
        raise UserError(
            f"{str(path)!r} has {len(empty)} rows without {prompt!r} or {answer!r}, the first after {empty[0]} others; "
            f"remove them"
        )
    return list(zip(table[prompt], table[answer], strict=True))


def _docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Signature and first paragraph of the docstring, of each function that has one."""
    for file in sorted(source_files(root)):
        with warnings.catch_warnings(action="ignore"):  # of escapes in old source
            try:
                tree = ast.parse(file.read_bytes())
            except SyntaxError:  # made so on purpose, for tests of parsers
                continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                yield f"def {node.name}({ast.unparse(node.args)})", " ".join(text.split("\n\n")[0].split())
