"""Points: what one run is, said completely; and grids of them."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cdl.config import HOW, PATHS, change, flatten, from_flat
from cdl.errors import UserError

__all__ = ["Point", "expand", "per_lane", "product"]


def per_lane(field: str) -> bool:
    """Is this config field data of a lane (rates, weights, ..) rather than part of the compiled program?"""
    return field in ("seed", "eta_ref", "T", "init.fingerprint") or field.startswith("schedule.")


class Point:
    """One run: a flat config, and the fingerprints of its data and of the weights that it starts from ("": drawn).

    `id` is a hash of everything that decides the result, and of nothing else: of the data it is the tokens that count
    and not the path, so a sweep can move with its data; and so it is with weights.
    """

    def __init__(self, flat: Mapping[str, Any], fingerprint: str, init: str = ""):
        # Through JSON, so that a point just made and one read back are the same thing.
        self.flat: dict[str, Any] = json.loads(json.dumps(dict(flat), sort_keys=True))
        self.fingerprints = {"data.fingerprint": fingerprint, "init.fingerprint": init}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The flat config without what says how to compute it, and with fingerprints for the paths of files."""
        kept = {k: v for k, v in self.flat.items() if k not in PATHS and k.split(".")[0] not in HOW}
        return kept | self.fingerprints

    @cached_property
    def id(self) -> str:
        """12 hexadecimal digits of sha256 over the identity."""
        return _hash(self.identity)

    @cached_property
    def program(self) -> str:
        """Points with equal `program` run in one compiled program."""
        how = {k: v for k, v in self.flat.items() if k.split(".")[0] in HOW}
        return _hash({k: v for k, v in (self.identity | how).items() if not per_lane(k)})

    @cached_property
    def config(self) -> ConfigDict:
        """The config, nested; reading a field it lacks raises."""
        return from_flat(self.flat)

    def __repr__(self) -> str:
        return f"Point({self.id}, eta_ref={self.flat['eta_ref']}, T={self.flat['T']})"


def product(**axes: Sequence[Any] | np.ndarray) -> list[dict[str, Any]]:
    """All combinations of the axes' values (lists or arrays), the last axis fastest.

    Raises:
      UserError: an axis that is empty or repeats a value.

    >>> product(T=[100, 200], eta_ref=[1.0, 3.0])[1]
    {'T': 100, 'eta_ref': 3.0}
    """
    lists = {name: np.asarray(v).tolist() if isinstance(v, np.ndarray) else list(v) for name, v in axes.items()}
    for name, values in lists.items():
        if not len(values) or len({repr(v) for v in values}) != len(values):
            raise UserError(f"axis {name}={values} of the grid must have values, each once")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists.values())]


def expand(
    config: ConfigDict,
    changes: Iterable[Mapping[str, Any]],
    fingerprint_of: Callable[[ConfigDict], str],
    init_of: Callable[[ConfigDict], str] = lambda _: "",
) -> list[Point]:
    """The points of a grid.

    Args:
      config: of one run.
      changes: what each point changes of it.
      fingerprint_of: config -> fingerprint of the data it names.
      init_of: config -> fingerprint of the weights it starts from, "" where they are drawn.

    Raises:
      UserError: an unknown field, or the same point twice.
    """
    points: dict[str, Point] = {}
    for c in changes:
        changed = change(config, c)
        point = Point(flatten(changed), fingerprint_of(changed), init_of(changed))
        if point.id in points:
            raise UserError(f"the grid has the point {dict(c)} twice; remove one")
        points[point.id] = point
    return list(points.values())


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
