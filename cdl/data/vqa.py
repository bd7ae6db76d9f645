"""Images with questions and answers, for vision-language models, with the loss on the answers alone.

Where they come from (`data.path`) is in `cdl.data.vqa_sources`. A batch is dict(image=uint8 [B, M, H, H, 3],
tokens=int32 [B, S+1], slot=int32 [B, S], weight=float32 [B, S], replaced=int32 [B]). A row begins with the places of
its images, `data.image_tokens` each, then come its turns (`cdl.data.conversations`). `slot` is which of the
M * image_tokens image tokens of the row stands at a place, -1 where the token itself does.

A record with an image that cannot be decoded is replaced by the next one that fits into a row, and marked in
`replaced`, as in `cdl.data.images`.
"""

import functools
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from cdl.data import augment, conversations, vqa_sources
from cdl.data.conversations import Rows, fitting, shuffled, spread
from cdl.data.images import check_undecodable, first_decodable
from cdl.data.vocabulary import read_vocabulary
from cdl.data.vqa_sources import Part, Records
from cdl.errors import UserError

__all__ = ["Records", "batches", "check_section", "data_arguments", "heldout_batches", "read_records"]


def data_arguments() -> dict[str, Any]:
    """The `data` section of a config.

    path: see the module. batch_size: B records. seq_len: S positions of a row, images among them; longer records are
    left out. heldout: share of the records that is kept for evaluation (easy-vqa brings its own). tokenizer: see
    `cdl.data.vocabulary.read_vocabulary`. image_size: H, to which images are stretched. images: M, the most a record
    may have; records with more are left out. image_tokens: of each image, as the model makes them. mean, std: of each
    channel on the scale 0..1, SigLIP's.
    """
    return dict(
        path="easy-vqa",
        batch_size=16,
        seq_len=80,
        heldout=0.05,
        tokenizer="bytes",
        image_size=64,
        images=1,
        image_tokens=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def check_section(section: ConfigDict) -> None:
    """All that can be wrong with a `data` section whatever its records.

    Raises:
      UserError: a size or share that cannot be, or rows too short for their images.
    """
    conversations.check_section(section)
    for name in ("image_size", "images", "image_tokens"):
        if section[name] < 1:
            raise UserError(f"data.{name}={section[name]} must be at least 1")
    places = section.images * section.image_tokens
    if places >= section.seq_len:
        raise UserError(
            f"data.images={section.images} x data.image_tokens={section.image_tokens} are {places} places of the "
            f"data.seq_len={section.seq_len}, which leaves none for text; raise data.seq_len or use fewer images"
        )


def read_records(section: ConfigDict) -> Records:
    """Read and tokenize the texts behind `data.path`; images stay where they are.

    Raises:
      UserError: nothing there, not these columns, or a tokenizer that cannot be read.
    """
    check_section(section)
    return _read(section.path, section.heldout, section.tokenizer)


def batches(records: Records, section: ConfigDict, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Random access to batches: ``batches(...)[k-1]`` is that of update k. All records are visited in a random order,
    each once an epoch, a new order every epoch.

    Args:
      section: the `data` section of a config.
      seed: of the order.
      part: (p, P) for the rows [p*B/P, (p+1)*B/P) of every batch, which process p of P reads.

    Raises:
      UserError: too few records for one batch, or P processes cannot share B of them.
    """
    return shuffled(_Rows(records.train, section, "training"), section, seed, part)


def heldout_batches(records: Records, section: ConfigDict, size: int) -> dict[str, np.ndarray]:
    """The fixed held-out set, as `batches` with a leading axis E: as many as have about `size` learned tokens, spread
    evenly over the held-out records.

    Raises:
      UserError: too few records for one batch, or more than 1% with images that cannot be decoded.
    """
    rows = _Rows(records.heldout, section, "evaluation")
    made = spread(rows, records.heldout.conversations, section, size)
    replaced_ExB = made.pop("replaced")
    check_undecodable(section.path, int(replaced_ExB.sum()), replaced_ExB.size)
    return made


class _Rows(grain.sources.RandomAccessDataSource):
    """Item i is a row of a batch."""

    def __init__(self, part: Part, section: ConfigDict, what: str):
        M, n = section.images, section.image_tokens
        before_P = np.where(part.images_P <= M, part.images_P * n, section.seq_len + 2)  # too many: fits into no row
        self._index = fitting(part.conversations, section, what, before_P)
        self._text = Rows(part.conversations, self._index, section.seq_len, before_P)
        self._part, self._M, self._n, self._size, self._path = part, M, n, section.image_size, section.path

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return first_decodable(len(self), int(index), self._row, f"data.path={self._path!r}")

    def _row(self, i: int) -> dict[str, Any]:
        p = int(self._index[i])
        image_MxHxHxC = np.zeros((self._M, self._size, self._size, 3), np.uint8)
        images = int(self._part.images_P[p])
        for m in range(images):
            image_MxHxHxC[m] = augment.whole_view(self._part.image(p, m), self._size)
        row = self._text[i]
        place_S = np.arange(len(row["weight"]), dtype=np.int32)
        return row | dict(image=image_MxHxHxC, slot=np.where(place_S < images * self._n, place_S, np.int32(-1)))

    def __repr__(self) -> str:
        return f"_Rows(n={len(self)}, of {self._path})"


@functools.lru_cache(maxsize=4)
def _read(path: str, heldout: float, tokenizer: str) -> Records:
    return vqa_sources.read(path, heldout, read_vocabulary(tokenizer))
