"""Results on disk: one folder per finished point, complete or absent.

    runs/demo/sweep.json            what the sweep's points have in common
    runs/demo/grids/<hash>.json     a grid that was asked for: the points of one command
    runs/demo/<id>/point.json       config, and fingerprints of its data and of the weights that it starts from
    runs/demo/<id>/curve.parquet    step, eta, train_loss, eval_loss (rows: see `cdl.train.loop`)
    runs/demo/<id>/result.json      status, final losses, time, versions
    runs/demo/checkpoints/<id>/     of a run under way, and of a finished one whose weights are kept: run.json (config,
                                    devices, versions), claims of processes that train it, its checkpoints; failed.json
                                    where it was given up
    runs/demo/probes/<id>/          what `cdl probe` has measured of a run
    runs/demo/workers/<name>.json   a process that trains; .dead beside it: it does no more (see `cdl.sweep.claims`)

No two processes have to write one file at once. The folder of a point is written under a temporary name and renamed, so
a reader sees all of it or nothing; what a crash leaves lies in checkpoints/<id>, which the next process to train the
run clears. Tables are made by reading the folders.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cdl.errors import UserError, unknown
from cdl.sweep.claims import TEMPORARY, Attempts, Claims, Worker, create, replace
from cdl.sweep.identity import NEUTRAL

if TYPE_CHECKING:  # a reader of results needs no model
    from cdl.sweep.grid import Point

__all__ = ["Claim", "Store", "grid_name", "read_json", "sweep_table"]

_RECORD = "sweep.json"
_FAILED = "failed.json"
_ID = re.compile(r"[0-9a-f]{12}")
_WRITTEN_SECONDS = 2.0
_STALE_SECONDS = 3600  # writing takes milliseconds; one this old belongs to nobody
MOST_CRASHES = 3  # then a run is given up
MOST_DEATHS = 10  # killed processes say less about the run
_FINGERPRINTS = {"data.fingerprint": "saw other text", "init.fingerprint": "started from other weights"}
_FIRST = ["id", "status", "eta_ref", "T", "seed", "eta_peak", "loss", "train_loss", "seconds"]


class Claim(IntEnum):
    """What comes of `Store.begin`: the point is this process's, another trains it, it is finished, or given up."""

    MINE = 0
    TAKEN = 1
    FINISHED = 2
    FAILED = 3


class Store:
    """The folder of a sweep. Reading never writes, but for the note that a worker is dead."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.claims = Claims(self.root)
        self._mine: dict[str, Path] = {}  # id -> claim

    def open_for(self, points: "Sequence[Point]") -> None:
        """Make the folder this sweep's, or extend it by these points.

        A sweep may grow along eta_ref, T, seed and the axes that its grid varied when it was begun.

        Raises:
          UserError: the folder holds a sweep that differs in another field, or something that is no sweep.
        """
        self._check(points)  # says what is wrong before anything is made
        grids = self.root / "grids"
        self.root.mkdir(parents=True, exist_ok=True)
        if not create(self.root / _RECORD, json.dumps({"fixed": _common(points)}, indent=1)):
            self._check(points)  # another process may have been first
        grids.mkdir(exist_ok=True)
        create(grids / f"{grid_name(points)}.json", _grid_text(points))
        self.tidy()

    def _check(self, points: "Sequence[Point]") -> None:
        record = self.root / _RECORD
        if record.is_file():
            old, fixed = read_json(record, "this file")["fixed"], _common(points)
            old |= {field: value for field, value in NEUTRAL.items() if field in fixed and field not in old}
            # Names first: another optimizer also has other arguments, but that is not the news.
            for field, there in sorted(old.items(), key=lambda x: (not x[0].endswith(".name"), x[0])):
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
        elif self.root.is_file():
            raise UserError(f"--out={str(self.root)!r} is a file; choose a folder")
        elif self.root.is_dir() and any(not f.name.startswith(TEMPORARY) for f in self.root.iterdir()):
            if record.is_file():
                self._check(points)  # another process has just made it
                return
            raise UserError(f"--out={str(self.root)!r} holds other files and no sweep; choose a new folder")

    def tidy(self) -> None:
        """Clear what killed processes have left: checkpoints of finished points, files half written, their own."""
        finished = self.ids()
        for folder in self.begun():
            if folder.name in finished and any(folder.glob("claim-*")) and not self.claims.holder(folder):
                self._clear(folder)
        self.claims.forget_dead(self.begun())
        folders = [self.root / name for name in (".", "grids", "workers", "checkpoints")]
        left = [f for folder in folders for f in folder.glob(f"{TEMPORARY}*")]
        if not left:
            return
        now = tempfile.mkdtemp(prefix=TEMPORARY, dir=self.root)  # by the clock that stamped the others
        for file in left:
            with contextlib.suppress(OSError):  # it was not left, but is finished now
                if os.stat(now).st_mtime - file.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
        os.rmdir(now)

    def ids(self) -> set[str]:
        """Ids of the finished points, done or diverged."""
        try:
            with os.scandir(self.root) as entries:
                return {e.name for e in entries if _ID.fullmatch(e.name) and e.is_dir()}
        except FileNotFoundError:
            return set()

    def failed(self) -> dict[str, dict[str, Any]]:
        """Of the points that were given up, id -> what is known: status, error, traceback, attempts."""
        failed: dict[str, dict[str, Any]] = {}
        for file in self.root.glob(f"checkpoints/*/{_FAILED}"):
            try:
                failed[file.parent.name] = json.loads(file.read_text())
            except FileNotFoundError:
                continue  # it is tried again
            except (OSError, ValueError) as e:
                failed[file.parent.name] = {"status": "failed", "error": f"{file} is damaged ({e})", "traceback": ""}
        return failed

    def grid_names(self) -> set[str]:
        """Of the grids that were asked for."""
        return {f.stem for f in (self.root / "grids").glob("*.json") if not f.name.startswith(TEMPORARY)}

    def grids(self, name: str | None = None) -> list[dict[str, Any]]:
        """The grids that were asked for, oldest first, or the one of that name (`grid_name`), as
        `cdl.sweep.grid.points_in` reads them."""
        names = self.grid_names()
        if name and name not in names:
            raise unknown("grid", name, names)
        files = [self.root / "grids" / f"{n}.json" for n in ([name] if name else names)]
        ordered = sorted(files, key=lambda f: f.stat().st_mtime_ns if f.exists() else 0)
        return [read_json(f, "this file") for f in ordered]

    def expected(self) -> set[str]:
        """Ids of all points that sweeps into this folder were asked for."""
        return {point["id"] for grid in self.grids() for point in grid["points"]} or self.ids()

    def checkpoints(self, point: "Point") -> Path:
        """The folder in which a point is saved while it is trained."""
        return self.root / "checkpoints" / point.id

    def saved(self, point: "Point") -> int | None:
        """The step of its newest checkpoint."""
        names = (re.fullmatch(r"step_(\d+)", f.name) for f in self.checkpoints(point).glob("step_*"))
        return max((int(m[1]) for m in names if m), default=None)

    def attempts(self, point: "Point") -> Attempts:
        """How often the point was begun in vain since it last got further."""
        return self.claims.attempts(self.checkpoints(point), self.saved(point) or 0)

    def begin(self, point: "Point", worker: Worker, about: Mapping[str, Any], give_up: bool = True) -> Claim:
        """Make a point this process's, until `release` or its end. A point begun in vain too often is given up.

        Args:
          give_up: else it is tried all the same.
          about: what run.json says besides what runs: on which devices, by which versions; keep: are weights kept?

        Raises:
          OSError: nothing can be written.
        """
        folder = self.checkpoints(point)
        if self._finished(point):
            return Claim.FINISHED
        if worker.buried():
            return Claim.TAKEN  # or will be: nobody respects what this process claims
        if give_up and (folder / _FAILED).is_file():
            return Claim.FAILED
        claim = self._take(folder, worker, self.saved(point) or 0)
        if claim is None:
            return Claim.TAKEN
        self._mine[point.id] = claim
        # By another process, in these milliseconds; or before: network file systems remember for a minute that a file
        # is not there, but ask again for what a folder holds.
        if point.id in self.ids():
            self.release(point)
            return Claim.FINISHED
        tries = self.attempts(point)
        if give_up and (tries.crashes >= MOST_CRASHES or tries.deaths >= MOST_DEATHS):
            died = f"its process was killed, or lost, {tries.deaths} times before the run got further"
            self.claims.end(claim, "released")
            self._give_up(point, tries.said or died)
            return Claim.FAILED
        for left in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        said = _described(point) | dict(about) | {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        replace(folder / "run.json", json.dumps(said, indent=1))
        return Claim.MINE

    def _take(self, folder: Path, worker: Worker, step: int) -> Path | None:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return self.claims.take(folder, worker.name, step)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):  # whoever has just finished it has removed it
                    raise
                time.sleep(0.05)

    def release(self, point: "Point", failed: str | None = None) -> None:
        """Let others have a point that was begun. failed: what went wrong, where something did."""
        if claim := self._mine.pop(point.id, None):
            if self._finished(point):
                self._clear(claim.parent)
            else:
                self.claims.end(claim, "released" if failed is None else "failed", failed or "")

    def _clear(self, folder: Path) -> None:
        """Leave of a finished point's checkpoints what is to be kept."""
        run, keep = folder / "run.json", True
        with contextlib.suppress(UserError):
            if run.exists():
                keep = read_json(run, "").get("keep") and self.result(folder.name)["status"] == "done"
        if not keep:
            with contextlib.suppress(OSError):
                _remove(folder)
            return
        for file in [*folder.glob("claim-*"), *folder.glob(f"{TEMPORARY}*"), run]:
            shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless there are weights in it

    def lost(self, worker: Worker) -> list[str]:
        """Ids of points that are this worker's no more, since another process thinks it dead."""
        if self._mine and worker.buried():
            return list(self._mine)
        return [id for id, claim in self._mine.items() if self.claims.superseded(claim)]

    def fail(self, point: "Point", trouble: str) -> None:
        """Give up a point that is this process's. trouble: what went wrong, the most telling line last."""
        if claim := self._mine.get(point.id):
            self.claims.end(claim, "failed", trouble)
        self._give_up(point, trouble)

    def _give_up(self, point: "Point", trouble: str) -> None:
        tries = self.attempts(point)
        record = {
            "status": "failed",
            "error": trouble.strip().splitlines()[-1] if trouble.strip() else "unknown",
            "traceback": trouble,
            "attempts": tries.crashes + tries.deaths,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        replace(self.checkpoints(point) / _FAILED, json.dumps(record, indent=1))
        self._mine.pop(point.id, None)

    def retry(self, points: "Iterable[Point]") -> None:
        """Points that were given up may be tried again."""
        for point in points:
            if (failed := self.checkpoints(point) / _FAILED).is_file():
                self.claims.forgive(failed.parent)
                failed.unlink(missing_ok=True)

    def write(self, point: "Point", curve: Mapping[str, np.ndarray], result: Mapping[str, Any]) -> None:
        """Publish a finished point. One that is already there stays as it is.

        Raises:
          OSError: the disk is full, say; nothing is left behind.
        """
        folder = self.checkpoints(point)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        try:
            temporary.chmod(0o755)  # mkdtemp makes it private, results are not
            pd.DataFrame(dict(curve)).to_parquet(temporary / "curve.parquet", index=False)
            (temporary / "point.json").write_text(json.dumps(_described(point), indent=1))
            (temporary / "result.json").write_text(json.dumps(dict(result), indent=1))
            for file in temporary.iterdir():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
            temporary.rename(self.root / point.id)
            _sync(self.root)  # before its checkpoints go
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not self._finished(point):  # nobody else was first
                raise
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was saved

    def remove(self, ids: Iterable[str]) -> None:
        """Remove points for good: their results, and what is saved of them.

        Raises:
          UserError: one of them is being trained; those before it are removed.
        """
        worker = Worker(self.root)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a full disk must not keep anybody from removing what fills it
                stack.enter_context(worker)
            for id in ids:
                saved = self.root / "checkpoints" / id
                try:
                    free = self._take(saved, worker, 0) is not None
                except OSError:
                    free = not self.claims.holder(saved)
                if not free:
                    raise UserError(f"{id} is being trained by {self.claims.holder(saved)}; stop that first")
                for folder in (self.root / id, saved):  # in this order: the claim is in the second
                    if folder.is_dir():
                        _remove(folder)

    def _finished(self, point: "Point") -> bool:
        return (self.root / point.id).is_dir()

    def curve(self, id: str) -> pd.DataFrame:
        """The curve of one point: columns step, eta, train_loss, eval_loss."""
        path = self.root / id / "curve.parquet"
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as e:  # pyarrow's errors are both
            raise UserError(f"{path} is damaged; remove the folder {path.parent} and run the sweep again") from e

    def result(self, id: str, point: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What is known of one finished point: results, then every config field and fingerprint.

        Args:
          point: the latter, where they are known: half of the files are not read then.
        """
        folder = self.root / id
        result = read_json(folder / "result.json", f"the folder {folder}")
        described: dict[str, Any] = {} if point else read_json(folder / "point.json", f"the folder {folder}")
        if "loss" not in result or not (point or "config" in described):
            raise UserError(f"{folder} is damaged: a field is missing; remove it and run the sweep again")
        fingerprints = {field: described.get(field, "") for field in _FINGERPRINTS}
        return {"id": id} | result | dict(point or NEUTRAL | described["config"] | fingerprints)

    def begun(self) -> list[Path]:
        """The folders of points under way, given up, or kept weights of."""
        return sorted(f for f in (self.root / "checkpoints").glob("*") if _ID.fullmatch(f.name) and f.is_dir())

    def table(self) -> pd.DataFrame:
        """One row per finished point: id, status, results, then every config field; by eta_ref, then T.

        `loss` is the held-out loss after update T, in nats a token; NaN where the run diverged.
        """
        rows = [self.result(id) for id in self.ids()]
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


def grid_name(points: "Sequence[Point]") -> str:
    """The name of these points' grid in a store."""
    return hashlib.sha256(_grid_text(points).encode()).hexdigest()[:12]


def _common(points: "Sequence[Point]") -> dict[str, Any]:
    """What all points share, without eta_ref, T and seed, along which any sweep may grow."""
    first = points[0].identity
    return {
        k: v
        for k, v in first.items()
        if k not in ("eta_ref", "T", "seed") and all(p.identity.get(k) == v for p in points)
    }


def _remove(folder: Path) -> None:
    """Remove a folder: under another name, since half of it would look like something."""
    doomed = folder.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have it on disk what was renamed into a folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _described(point: "Point") -> dict[str, Any]:
    return {"id": point.id, "config": point.flat} | point.fingerprints


def _grid_text(points: "Sequence[Point]") -> str:
    """The points of a grid: what all of them have, and what each has besides, with its id."""
    flats = [p.flat | p.fingerprints for p in points]
    common = {k: v for k, v in flats[0].items() if all(k in f and f[k] == v for f in flats)}
    own = [{"id": p.id} | {k: v for k, v in f.items() if k not in common} for p, f in zip(points, flats, strict=True)]
    return json.dumps({"common": common, "points": own})


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file; `remedy` is what to remove where it is damaged."""
    try:
        began = time.monotonic()
        while not (text := path.read_text()) and time.monotonic() - began < _WRITTEN_SECONDS:
            time.sleep(0.05)  # where there are no hard links, a file is there before its content; see `create`
        value = json.loads(text)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}); remove {remedy} and run the sweep again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; remove {remedy} and run the sweep again")
    return value
