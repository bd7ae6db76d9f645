"""Results on disk: one folder per finished point, complete or absent.

    runs/demo/sweep.json            what the sweep's points have in common, and their ids
    runs/demo/<id>/point.json       config, and fingerprints of its data and of the weights that it starts from
    runs/demo/<id>/curve.parquet    step, eta, train_loss, eval_loss (rows: see `cdl.train.loop`)
    runs/demo/<id>/result.json      status, final losses, time, versions
    runs/demo/checkpoints/<id>/     of a run under way, and of a finished one whose weights are kept: run.json (config,
                                    devices, versions), the lock of the process that trains it, its checkpoints

The folder of a point is written under a temporary name and renamed, so a reader sees all of it or nothing, and a crash
leaves at most a temporary folder that the next sweep removes. Tables are made by reading the folders.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from cdl.errors import UserError, say

if TYPE_CHECKING:  # a reader of results needs no model
    from cdl.sweep.grid import Point

__all__ = ["Claim", "Store", "sweep_table"]

_RECORD = "sweep.json"
_TEMPORARY = ".writing-"
_LOCK_SECONDS = 30.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_STALE_SECONDS = 3600  # writing takes milliseconds; one this old belongs to nobody
_FINGERPRINTS = {"data.fingerprint": "saw other text", "init.fingerprint": "started from other weights"}
_FIRST = ["id", "status", "eta_ref", "T", "seed", "eta_peak", "loss", "train_loss", "seconds"]


class Claim(IntEnum):
    """What comes of `Store.begin`: the point is this process's, or another trains it, or has finished it."""

    MINE = 0
    TAKEN = 1
    FINISHED = 2


class Store:
    """The folder of a sweep. Reading never writes."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._locks: dict[str, FileLock] = {}

    def open_for(self, points: "Sequence[Point]") -> None:
        """Make the folder this sweep's, or extend it by these points; remove what a crash left half-written.

        A sweep may grow along eta_ref, T, seed and the axes that its grid varied when it was begun.

        Raises:
          UserError: the folder holds a sweep that differs in another field, or something that is no sweep.
        """
        self._merged(points)  # says what is wrong before anything is made
        self.root.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._remove_leftovers()
            merged = json.dumps(self._merged(points), indent=1)
            record = self.root / _RECORD
            if not record.is_file() or record.read_text() != merged:
                _replace(record, merged)

    def _merged(self, points: "Sequence[Point]") -> dict[str, Any]:
        """What sweep.json has to say of these points and of those that are there."""
        fixed = _common(points)
        record = self.root / _RECORD
        ids = {p.id for p in points}
        if record.is_file():
            old = _read_json(record, "this file")
            # Names first: another optimizer also has other arguments, but that is not the news.
            for field, there in sorted(old["fixed"].items(), key=lambda x: (not x[0].endswith(".name"), x[0])):
                here = fixed.get(field, "varied")
                if field in _FINGERPRINTS and here != there:
                    raise UserError(
                        f"{self.root} belongs to another sweep: its runs {_FINGERPRINTS[field]}; choose another --out"
                    )
                if here != there:
                    raise UserError(
                        f"{self.root} belongs to another sweep: {field} is {there!r} there and {here!r} here; "
                        f"choose another --out, or set {field}={there}"
                    )
            fixed = old["fixed"]
            ids |= set(old["points"])
        elif self.root.is_file():
            raise UserError(f"--out={str(self.root)!r} is a file; choose a folder")
        elif self.root.is_dir() and any(not f.name.startswith(_TEMPORARY) for f in self.root.iterdir()):
            raise UserError(f"--out={str(self.root)!r} holds other files and no sweep; choose a new folder")
        return {"fixed": fixed, "points": sorted(ids)}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process is in here for this folder, where the file system has locks."""
        lock = _lock(self.root / f"{_TEMPORARY}lock", _LOCK_SECONDS)
        with contextlib.suppress(OSError):
            lock.acquire()  # Timeout is an OSError too
        try:
            yield
        finally:
            _unlock(lock)

    def _remove_leftovers(self) -> None:
        for left in self.root.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):  # it was not left, but is finished now
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def ids(self) -> set[str]:
        """Ids of the finished points, done or diverged."""
        return {f.parent.name for f in self.root.glob("*/result.json") if not f.parent.name.startswith(".")}

    def expected(self) -> set[str]:
        """Ids of all points that sweeps into this folder were asked for."""
        record = self.root / _RECORD
        return set(_read_json(record, "this file")["points"]) if record.is_file() else self.ids()

    def checkpoints(self, point: "Point") -> Path:
        """The folder in which a point is saved while it is trained."""
        return self.root / "checkpoints" / point.id

    def saved(self, point: "Point") -> bool:
        """Has it a checkpoint?"""
        return any(re.fullmatch(r"step_\d+", f.name) for f in self.checkpoints(point).glob("step_*"))

    def begin(self, point: "Point", environment: Mapping[str, Any]) -> Claim:
        """Make a point this process's, until `release` or its end, and write down what runs, and on what.

        Where that cannot be done the run is worth more, and may go on.
        """
        if self._finished(point):
            return Claim.FINISHED
        folder = self.checkpoints(point)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return Claim.MINE  # nothing can be written, as saving will say
        lock = _lock(folder / "lock", 0)
        try:
            lock.acquire()
        except Timeout:
            return Claim.TAKEN
        except OSError as e:
            if e.errno not in _FULL:
                say(f"{folder} cannot be locked ({e.strerror}); take care that no other command trains this run")
            return Claim.MINE
        self._locks[point.id] = lock
        if self._finished(point):  # by another process, in these milliseconds
            self.release(point)
            with contextlib.suppress(OSError):
                folder.rmdir()  # not if weights are kept in it
            return Claim.FINISHED
        said = _described(point) | dict(environment) | {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        with contextlib.suppress(OSError):
            _replace(folder / "run.json", json.dumps(said, indent=1))
        return Claim.MINE

    def release(self, point: "Point") -> None:
        """Let others have a point that was begun."""
        if lock := self._locks.pop(point.id, None):
            _unlock(lock)

    def write(self, point: "Point", curve: Mapping[str, np.ndarray], result: Mapping[str, Any]) -> None:
        """Publish a finished point. One that is already there stays as it is.

        Raises:
          OSError: the disk is full, say; nothing is left behind.
        """
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.root))
        try:
            temporary.chmod(0o755)  # mkdtemp makes it private, results are not
            pd.DataFrame(dict(curve)).to_parquet(temporary / "curve.parquet", index=False)
            (temporary / "point.json").write_text(json.dumps(_described(point), indent=1))
            (temporary / "result.json").write_text(json.dumps(dict(result), indent=1))
            for file in temporary.iterdir():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
            temporary.rename(self.root / point.id)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not self._finished(point):  # nobody else was first
                raise

    def _finished(self, point: "Point") -> bool:
        return (self.root / point.id / "result.json").is_file()

    def curve(self, id: str) -> pd.DataFrame:
        """The curve of one point: columns step, eta, train_loss, eval_loss."""
        path = self.root / id / "curve.parquet"
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as e:  # pyarrow's errors are both
            raise UserError(f"{path} is damaged; remove the folder {path.parent} and run the sweep again") from e

    def table(self) -> pd.DataFrame:
        """One row per finished point: id, status, results, then every config field; by eta_ref, then T.

        `loss` is the held-out loss after update T, in nats a token; NaN where the run diverged.
        """
        rows = []
        for id in self.ids():
            folder = self.root / id
            point, result = (_read_json(folder / f, f"the folder {folder}") for f in ("point.json", "result.json"))
            if "config" not in point or "loss" not in result:
                raise UserError(f"{folder} is damaged: a field is missing; remove it and run the sweep again")
            fingerprints = {field: point.get(field, "") for field in _FINGERPRINTS}
            rows.append({"id": id} | result | point["config"] | fingerprints)
        if not rows:
            return pd.DataFrame(columns=pd.Index(_FIRST))
        table = pd.DataFrame(rows).astype({"loss": float, "train_loss": float})
        rest = [c for c in table.columns if c not in _FIRST]
        return table[_FIRST + rest].sort_values(["eta_ref", "T", "seed", "id"], ignore_index=True)


def sweep_table(folder: str | Path) -> pd.DataFrame:
    """The table of a sweep (see `Store.table`).

    Raises:
      UserError: no finished point in the folder.
    """
    store = Store(folder)
    table = store.table()
    if table.empty:
        raise UserError(f"{folder} holds no finished run; start one with cdl sweep --out={folder}")
    return table


def _common(points: "Sequence[Point]") -> dict[str, Any]:
    """What all points share, without eta_ref, T and seed, along which any sweep may grow."""
    first = points[0].identity
    return {
        k: v
        for k, v in first.items()
        if k not in ("eta_ref", "T", "seed") and all(p.identity.get(k) == v for p in points)
    }


def _lock(file: Path, seconds: float) -> FileLock:
    # Where there are no locks filelock would leave a mark, which outlives a process that is killed.
    return FileLock(file, timeout=seconds, fallback_to_soft=False)


def _unlock(lock: FileLock) -> None:
    if lock.is_locked:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()


def _described(point: "Point") -> dict[str, Any]:
    return {"id": point.id, "config": point.flat} | point.fingerprints


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(f"{_TEMPORARY}{os.getpid()}-{file.name}")
    temporary.write_text(text)
    temporary.rename(file)


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file; `remedy` is what to remove where it is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}); remove {remedy} and run the sweep again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; remove {remedy} and run the sweep again")
    return value
