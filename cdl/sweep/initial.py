"""The weights that a run starts from where its config names a file (`init`), and a hash of them for its id."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cdl.errors import UserError
from cdl.models import pretrained
from cdl.models.build import build
from cdl.models.pretrained import MOST_NAMED
from cdl.train.checkpoint import read_weights

__all__ = ["fingerprint", "load"]

Section = tuple[tuple[str, Any], ...]


def load(c: ConfigDict) -> tuple[Any, Any]:
    """Parameters and statistics of a config with `init`, NumPy arrays that all runs of one model and seed share.

    Raises:
      UserError: nothing there that can be read, the weights of another model, or weights that lack a part that adapters
        would leave as it is drawn.
    """
    return _load(c.init, _hashable(c.model), None if c.lora.rank else c.seed)


def fingerprint(c: ConfigDict) -> str:
    """A hash of the weights, whatever file has them; "" where they are drawn. Raises as `load` does."""
    return _fingerprint(c.init, _hashable(c.model), None if c.lora.rank else 0) if c.init else ""


@functools.lru_cache(maxsize=4)
def _fingerprint(path: str, model: Section, seed: int | None) -> str:
    h = hashlib.sha256()
    for place, leaf in jax.tree.leaves_with_path(_load(path, model, seed)):
        h.update(f"{jax.tree_util.keystr(place)}{leaf.shape};".encode())
        h.update(np.ascontiguousarray(leaf, "<f4").data)
    return h.hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _load(path: str, model: Section, seed: int | None) -> tuple[Any, Any]:
    where = Path(path).expanduser()
    checkpoint = where.name.startswith("step_") or any(where.glob("step_*"))
    if not checkpoint or where.is_file() or any(where.glob("*.safetensors*")):
        return pretrained.load(dict(model), path, seed)
    weights = read_weights(where)[:2]
    theirs, ours = (_shapes(x) for x in (weights, jax.eval_shape(build(dict(model)).init, 0)))
    other = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if other and any(name.endswith("lora_a") for name in theirs):
        raise UserError(f"init={path!r} are adapters, and not the weights beside them; merge them with cdl export")
    if other:
        said = [f"{x} is {theirs.get(x, 'absent')} there and {ours.get(x, 'absent')} here" for x in other[:MOST_NAMED]]
        more = f" and {len(other) - MOST_NAMED} more" if len(other) > MOST_NAMED else ""
        raise UserError(
            f"init={path!r} has weights of another model: {', '.join(said)}{more}; set the sizes of the model to its"
        )
    return weights


def _shapes(weights: tuple[Any, Any]) -> dict[str, Any]:
    paths = jax.tree.leaves_with_path(dict(zip(("params", "stats"), weights, strict=True)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape) for path, leaf in paths}


def _hashable(section: ConfigDict) -> Section:
    return tuple(sorted(section.to_dict().items()))
