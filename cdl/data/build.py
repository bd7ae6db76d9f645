"""From the `data` section of a config to batches as functions of (seed, step), whatever they are batches of."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cdl.data import images, pairs, text, vqa
from cdl.errors import UserError, unknown

__all__ = ["DATA", "Dataset", "build", "check_section", "data_arguments", "fingerprint"]


class _Kind(NamedTuple):
    """arguments: the defaults of a `data` section with this name. takes: what models that learn from it take
    (`cdl.models.build.Model.data`)."""

    arguments: Callable[[], dict[str, Any]]
    takes: str


DATA = {
    "text": _Kind(text.data_arguments, "text"),
    "pairs": _Kind(pairs.data_arguments, "text"),
    "images": _Kind(images.data_arguments, "images"),
    "vqa": _Kind(vqa.data_arguments, "vqa"),
}


class _Batches(Protocol):
    def __call__(
        self,
        seed: int,
        first: int,
        *,
        part: tuple[int, int] = (0, 1),
        workers: int = 0,
        on_replaced: Callable[[int], None] = ...,
    ) -> Iterator[Any]: ...


class Dataset(NamedTuple):
    """Data of one section.

    unit: what is predicted, "tokens" or "images". per_batch: how many of these in a batch; places of rows that are
      padded count as tokens.
    batches: (seed, first, part, workers, on_replaced) -> the batches of updates first + 1, first + 2, ... without end;
      part (p, P) is of P equal parts of the rows of each, workers as in `cdl.data.images.iterate`. on_replaced is told
      how many images of a batch could not be decoded, if any.
    heldout: number of tokens or images -> a fixed sample of about so many, as batches with a leading axis E.
    prepare: batch as read -> batch as a model takes it, on the device.
    check: raises UserError where they do not suffice for a batch, or a model of this config section cannot take them.
    """

    unit: str
    per_batch: int
    batches: _Batches
    heldout: Callable[[int], Any]
    prepare: Callable[[Any], Any]
    check: Callable[[Mapping[str, Any]], None]


def data_arguments(name: str) -> dict[str, Any]:
    """The arguments of one kind of data and their defaults."""
    if name not in DATA:
        raise unknown("kind of data", name, DATA)
    return DATA[name].arguments()


def check_section(section: ConfigDict, model: Mapping[str, Any]) -> None:
    """All that can be wrong with a `data` section, for a `model` section, whatever lies under its path.

    Raises:
      UserError: says what.
    """
    if section.name == "images":
        images.check_section(section)
        return
    {"text": text, "pairs": pairs, "vqa": vqa}[section.name].check_section(section)
    if section.seq_len > model["context"]:
        raise UserError(f"data.seq_len={section.seq_len} exceeds model.context={model['context']}; raise the latter")


def fingerprint(section: ConfigDict) -> str:
    """A hash of the data behind a section, whatever their path.

    Raises:
      UserError: nothing there that can be read.
    """
    if section.name == "pairs":
        return pairs.read_pairs(section).fingerprint
    if section.name == "vqa":
        return vqa.read_records(section).fingerprint
    return _read(section.name, section.path, section.heldout).fingerprint


def build(section: ConfigDict) -> Dataset:
    """The data of a config section ``{name, **arguments}``.

    Raises:
      UserError: nothing there that can be read, or not enough for a batch.
    """
    return {"text": _text, "pairs": _pairs, "images": _images, "vqa": _vqa}[section.name](section)


@functools.lru_cache(maxsize=4)
def _read(name: str, path: str, heldout: float) -> text.Corpus | images.Images:
    return text.read_corpus(path, heldout) if name == "text" else images.read_images(path, heldout)


@functools.lru_cache(maxsize=4)
def _largest_token(path: str, heldout: float) -> int:
    corpus = _read("text", path, heldout)
    assert isinstance(corpus, text.Corpus)
    return text.largest_token(corpus)


def _text(section: ConfigDict) -> Dataset:
    corpus = _read("text", section.path, section.heldout)
    assert isinstance(corpus, text.Corpus)

    # Reading a map of the file costs less than asking another process for it, and nothing is replaced.
    def batches(seed: int, first: int, *, part: tuple[int, int] = (0, 1), **_: Any) -> Iterator[Any]:
        dataset: grain.MapDataset = text.batches(corpus, section, seed, part)
        return (dataset[k] for k in itertools.count(first))

    def check(model: Mapping[str, Any]) -> None:
        text.batches(corpus, section, 0)
        text.heldout_batches(corpus, section, 1)
        _check_vocabulary(section, model, _largest_token(section.path, section.heldout))

    return Dataset(
        unit="tokens",
        per_batch=section.batch_size * section.seq_len,
        batches=batches,
        heldout=functools.partial(text.heldout_batches, corpus, section),
        prepare=lambda tokens_BxS1: tokens_BxS1.astype(jnp.int32),
        check=check,
    )


def _check_vocabulary(section: ConfigDict, model: Mapping[str, Any], most: int) -> None:
    """Raises where the largest token is none of the model's: it would read as NaN."""
    if most >= model["vocab_size"]:
        raise UserError(
            f"model.vocab_size={model['vocab_size']} is too small for data.path={section.path!r}, which has token "
            f"{most}; use at least {most + 1}"
        )


def _pairs(section: ConfigDict) -> Dataset:
    read = pairs.read_pairs(section)

    def batches(seed: int, first: int, *, part: tuple[int, int] = (0, 1), **_: Any) -> Iterator[Any]:
        dataset = pairs.batches(read, section, seed, part)
        return (dataset[k] for k in itertools.count(first))

    def check(model: Mapping[str, Any]) -> None:
        pairs.batches(read, section, 0)
        pairs.heldout_batches(read, section, 1)
        _check_vocabulary(section, model, max(int(c.token_N.max()) for c in (read.train, read.heldout)))

    return Dataset(
        unit="tokens",
        per_batch=section.batch_size * section.seq_len,
        batches=batches,
        heldout=functools.partial(pairs.heldout_batches, read, section),
        prepare=lambda batch: batch,
        check=check,
    )


def _vqa(section: ConfigDict) -> Dataset:
    records = vqa.read_records(section)

    def check(model: Mapping[str, Any]) -> None:
        vqa.batches(records, section, 0)
        vqa.heldout_batches(records, section, 1)
        parts = (records.train, records.heldout)
        _check_vocabulary(section, model, max(int(part.conversations.token_N.max()) for part in parts))

    return Dataset(
        unit="tokens",
        per_batch=section.batch_size * section.seq_len,
        batches=_of_images(functools.partial(vqa.batches, records, section), section.path),
        heldout=functools.partial(vqa.heldout_batches, records, section),
        prepare=lambda batch: batch | dict(image=images.standardise(batch["image"], section.mean, section.std)),
        check=check,
    )


def _of_images(dataset: Callable[[int, tuple[int, int]], grain.MapDataset], path: str) -> _Batches:
    """`Dataset.batches` of batches with images, without their `replaced`; see `images.check_undecodable`.

    Args:
      dataset: (seed, part) -> random access to batches.
    """

    def batches(
        seed: int,
        first: int,
        *,
        part: tuple[int, int] = (0, 1),
        workers: int = 0,
        on_replaced: Callable[[int], None] = lambda images: None,
    ) -> Iterator[Any]:
        replaced = seen = 0
        for batch in images.iterate(dataset(seed, part), first, workers):
            replaced_B = batch["replaced"]
            if here := int(replaced_B.sum()):
                on_replaced(here)
            replaced, seen = replaced + here, seen + len(replaced_B)
            images.check_undecodable(path, replaced, seen)
            yield {name: x for name, x in batch.items() if name != "replaced"}

    return batches


def _images(section: ConfigDict) -> Dataset:
    source = _read("images", section.path, section.heldout)
    assert isinstance(source, images.Images)

    def prepare(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return batch | dict(image=images.standardise(batch["image"], section.mean, section.std))

    def check(model: Mapping[str, Any]) -> None:
        images.batches(source, section, 0)
        images.heldout_batches(source, section, 1)
        size = images.image_size(source, section)
        if "image_size" in model and model["image_size"] != size:
            raise UserError(
                f"data.path={section.path!r} gives images of {size} x {size} and model.image_size is "
                f"{model['image_size']}; set data.image_size or model.image_size"
            )
        if source.classes > model["classes"]:
            raise UserError(
                f"model.classes={model['classes']} is too small for data.path={section.path!r}, which has "
                f"{source.classes} classes; use at least {source.classes}"
            )

    return Dataset(
        unit="images",
        per_batch=section.batch_size,
        batches=_of_images(functools.partial(images.batches, source, section), section.path),
        heldout=functools.partial(images.heldout_batches, source, section),
        prepare=prepare,
        check=check,
    )
