"""Points: what one run is, said completely; and grids of them."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cdl.config import change, flatten, from_flat
from cdl.errors import UserError
from cdl.sweep.identity import HOW, NEUTRAL, PATHS

__all__ = ["Point", "chain", "expand", "per_lane", "points_in", "product", "zipped"]


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
        self.flat: dict[str, Any] = json.loads(json.dumps(NEUTRAL | dict(flat), sort_keys=True))
        self.fingerprints = {"data.fingerprint": fingerprint, "init.fingerprint": init}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The flat config without what says how to compute it, or changes nothing; with fingerprints for paths."""
        kept = {k: v for k, v in self.flat.items() if k not in PATHS and k.split(".")[0] not in HOW}
        adapts = self.flat["lora.rank"] > 0
        still = {k for k, v in NEUTRAL.items() if (not adapts if k.startswith("lora.") else kept[k] == v)}
        return {k: v for k, v in kept.items() if k not in still} | self.fingerprints

    @cached_property
    def id(self) -> str:
        """12 hexadecimal digits of sha256 over the identity."""
        return _hash(self.identity)

    @cached_property
    def program(self) -> str:
        """Points with equal `program` run in one compiled program."""
        how = {k: v for k, v in self.flat.items() if k.split(".")[0] in HOW}
        shared = {"init.fingerprint"} if self.flat["lora.rank"] else set()  # the weights that all lanes adapt
        return _hash({k: v for k, v in (self.identity | how).items() if k in shared or not per_lane(k)})

    @cached_property
    def config(self) -> ConfigDict:
        """The config, nested; reading a field it lacks raises."""
        return from_flat(self.flat)

    def __repr__(self) -> str:
        return f"Point({self.id}, eta_ref={self.flat['eta_ref']}, T={self.flat['T']})"


Grid = list[dict[str, Any]]


def product(*grids: Sequence[Mapping[str, Any]], **axes: Sequence[Any] | np.ndarray) -> Grid:
    """All combinations of the grids' points and the axes' values (lists or arrays), the last axis fastest.

    Raises:
      UserError: an axis or grid that is empty or repeats itself; a field that is in two of them.

    >>> product(T=[100, 200], eta_ref=[1.0, 3.0])[1]
    {'T': 100, 'eta_ref': 3.0}
    >>> len(product(zipped(T=[100, 400], seed=[0, 1]), eta_ref=[1.0, 3.0]))
    4
    """
    parts = [chain(grid) for grid in grids]
    parts += [[{name: value} for value in _values(name, values)] for name, values in axes.items()]
    points: Grid = [{}]
    for part in parts:
        if twice := {field for point in part for field in point} & points[0].keys():
            raise UserError(f"{sorted(twice)[0]} is in two axes of the product; leave it out of one")
        points = [a | b for a, b in itertools.product(points, part)]
    return points


def zipped(**axes: Sequence[Any] | np.ndarray) -> Grid:
    """The axes side by side: the first values of all, the second values of all, ...

    Raises:
      UserError: axes of different lengths, or the same point twice.

    >>> zipped(**{"T": [100, 400], "data.batch_size": [8, 16]})[1]
    {'T': 400, 'data.batch_size': 16}
    """
    lists = {name: _listed(values) for name, values in axes.items()}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise UserError(f"zipped axes must have as many values each ({said}); use product for all combinations")
    return chain([dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)])


def chain(*grids: Sequence[Mapping[str, Any]]) -> Grid:
    """The points of all grids, one after the other; also a check of points that were listed by hand.

    Raises:
      UserError: the same point twice, or a grid without points.
    """
    points = [dict(point) for grid in grids for point in grid]
    seen: set[str] = set()
    for point in points:
        key = repr(sorted(point.items()))
        if key in seen:
            raise UserError(f"the grid has the point {point} twice; remove one")
        seen.add(key)
    if not all(map(len, grids)):
        raise UserError("a grid without points; leave it out")
    return points


def _values(name: str, values: Sequence[Any] | np.ndarray) -> list[Any]:
    """The values of an axis, each once."""
    listed = _listed(values)
    if not listed or len({repr(v) for v in listed}) != len(listed):
        raise UserError(f"axis {name}={listed} of the grid must have values, each once")
    return listed


def _listed(values: Sequence[Any] | np.ndarray) -> list[Any]:
    return np.asarray(values).tolist() if isinstance(values, np.ndarray) else list(values)


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


def points_in(grid: Mapping[str, Any]) -> list[Point]:
    """The points of a grid as a store keeps it (`cdl.sweep.store.Store.grids`).

    Raises:
      UserError: this version of cdl gives them other ids.
    """
    points = []
    for own in grid["points"]:
        flat = grid["common"] | own
        names = ("id", "data.fingerprint", "init.fingerprint")
        id, data, init = (flat[name] for name in names)
        point = Point({k: v for k, v in flat.items() if k not in names}, data, init)
        if point.id != id:
            raise UserError(f"point {id} was made by another version of cdl, here it is {point.id}; use that version")
        points.append(point)
    return points


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
