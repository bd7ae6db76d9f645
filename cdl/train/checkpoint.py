"""Checkpoints of one run: written in the background by Orbax, checked bit by bit when they are read.

A checkpoint is a folder `step_N` that Orbax writes under a temporary name and renames, so it is there whole or not at
all. Orbax reads flipped bits as numbers, so a record is stored with the arrays, `record.json`: what the run was, shape,
dtype and checksum of every leaf, the files, and a digest of the record itself. A checkpoint that does not agree with
its record is set aside as `damaged-step_N` and the one before is used.

Writing never ends a run: a full disk is said, and the next save tries again. With several processes every process calls
every method, in the same order, on a file system that all of them see.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from cdl.errors import UserError, say
from cdl.train.checksum import checksums
from cdl.train.distributed import on_all_processes

__all__ = ["Checkpoints", "Restored", "Weights", "read_weights", "saved_steps"]

_RECORD = "record.json"
_MEET_SECONDS = 300  # that processes wait for one whose part of a save has failed, which then fails for all
_SMALL = 2**20  # bytes; larger files hold numbers, which have checksums of their own
_ORBAX_NOTES = "_CHECKPOINT_METADATA"  # into which Orbax writes once more at the end
_WRITING = ".orbax-checkpoint-tmp"  # what Orbax adds to the name of an unfinished one
_STEP = re.compile(r"step_(\d+)")
_SAVES = itertools.count()  # of this process, and so of each: all make the same calls
_LEFTOVER = re.compile(rf"step_\d+{re.escape(_WRITING)}|deleted-step_\d+")


class Restored(NamedTuple):
    """step: updates that `state` has seen. state: a tree like the one asked for. losses: float64, as saved."""

    step: int
    state: Any
    losses: dict[str, np.ndarray]


class _DamagedError(Exception):
    """A checkpoint that cannot be used, and why."""


class Checkpoints:
    """Checkpoints of one run in one folder, of which the newest few are kept.

    Args:
      folder: of this run alone; made when something is saved.
      about: what the run is, as JSON can hold it. A folder is only opened with the `about` it was made with.
      keep: how many checkpoints stay.
      say: is given one line for each failed save and each damaged checkpoint.

    Raises:
      UserError: the folder has a checkpoint of something else. Nothing in it is changed.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], *, keep: int = 2, say: Callable[[str], None] = say):
        if keep < 1:
            raise UserError(f"keep={keep} checkpoints leaves none; keep at least 1")
        self._folder, self._keep, self._say = folder.absolute(), keep, say
        self._about = json.loads(json.dumps(about))  # tuples are lists from here on, as they will be when read
        self._pending: tuple[int, Any] | None = None  # the save under way: its step, its Orbax checkpointer
        self._latest: int | None = None
        self._abandoned = False
        try:
            for step, record in self._records(saved_steps(self._folder)):
                self._check(step, "of another run", _fields(record["about"]), _fields(self._about))
        except OSError as error:
            raise UserError(f"{self._folder} cannot be read ({_one_line(error)}); its owner has to allow it") from None
        self._clean()

    def save(self, step: int, state: Any, losses: Mapping[str, np.ndarray]) -> None:
        """Save, in the background; if the save before is still under way, wait for that first.

        Returns when `state` may be donated or deleted and `losses` changed. Does not raise when writing fails.

        Args:
          step: updates that the state has seen. The step last saved or restored is not saved again.
          state: tree of `jax.Array`s, sharded in any way; with several processes, over all of them.
          losses: name -> float64 array of any shape.
        """
        self.wait()
        if step == self._latest or self._abandoned:
            return
        leaves, _ = _by_name(state)
        curves = {name: np.asarray(curve, np.float64) for name, curve in losses.items()}
        record = {
            "step": step,
            "about": self._about,
            "leaves": {name: [_kind(leaves[name]), total] for name, total in checksums(leaves).items()},
            "losses": {name: _curve_seal(curve) for name, curve in curves.items()},
        }
        ocp = _orbax()
        path = self._path(step)
        problem = self._cannot_write(path)
        if not on_all_processes(problem is None):
            self._failed(step, problem or OSError("the first process cannot write"))
            return
        # Processes meet at named barriers. No two saves may share a name, and paths may differ between hosts.
        here = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=f"save_{next(_SAVES)}")
        # In the background, in the first process, when all have written and before the folder gets its name.
        seal = functools.partial(_seal, path.with_name(f"{path.name}{_WRITING}"), record)
        writer = ocp.AsyncCheckpointer(
            # Compressed, trained weights are 7% smaller and take four times as long.
            ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=here),
            async_options=ocp.options.AsyncOptions(timeout_secs=_MEET_SECONDS, post_finalization_callback=seal),
            multiprocessing_options=here,
        )
        tree = {"state": _not_empty(leaves), "losses": _not_empty(curves)}
        try:
            writer.save(path, args=ocp.args.PyTreeSave(tree))
            self._pending = step, writer
        except Exception as error:  # whatever it is, the run is worth more than a checkpoint
            self._failed(step, error)

    def found(self) -> bool:
        """Is there a checkpoint, whole or damaged?"""
        return bool(_from_first_process(saved_steps(self._folder)))

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is whole, or None if there is none; damaged ones are said and set aside.

        Args:
          like: tree of `jax.ShapeDtypeStruct` with shardings (or of arrays), as the state is to be. The devices may be
            others than those it was saved from.

        Raises:
          UserError: the state saved has other parameters, shapes or dtypes. Nothing in the folder is changed.
        """
        self.wait()
        for leaf in jax.tree.leaves(like):
            leaf.sharding.shard_shape(leaf.shape)  # raises here, not where it would look like damage
        _orbax()
        steps = _from_first_process(saved_steps(self._folder))
        here = {name: _kind(leaf) for name, leaf in _by_name(like)[0].items()}
        for step, record in self._records(steps):
            there = {name: kind for name, (kind, _) in record["leaves"].items()}
            self._check(step, "of another model or optimizer", there, here)
        damaged: dict[int, str] = {}
        restored: Restored | None = None
        for step in reversed(steps):
            try:
                restored = self._read(step, like)
                break
            except _DamagedError as why:
                damaged[step] = str(why)
        if jax.process_index() == 0:
            instead = f"the run goes on from step {restored.step}" if restored else "the run starts over"
            for step, why in damaged.items():
                self._say(f"{self._path(step)} is damaged ({why}) and {self._set_aside(step)}; {instead}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint restored")
        self._latest = restored.step if restored else None
        return restored

    @property
    def latest(self) -> int | None:
        """The step last saved or restored here and known to be on disk; None if there is none."""
        return self._latest

    def wait(self) -> None:
        """Until what was saved is on disk, or has failed and was said; then old checkpoints are removed."""
        if self._pending is None:
            return
        (step, writer), self._pending = self._pending, None
        try:
            writer.close()  # waits
        except Exception as error:
            self._failed(step, error)
            return
        self._latest = step
        self._prune(self._keep)

    def close(self) -> None:
        """Wait for the last save, and remove what failed ones have left."""
        self.wait()
        self._clean()

    def abandon(self) -> None:
        """Change nothing in the folder any more: it has become another process's."""
        self._abandoned = True

    def finish(self, path: bool = False) -> None:
        """Wait for the last save and keep that alone, or with `path` the newest few. For runs that have ended."""
        self.wait()
        self._prune(self._keep if path else 1)

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step}"

    def _prune(self, keep: int) -> None:
        """Remove all but the newest few."""
        if jax.process_index() == 0 and not self._abandoned:
            with contextlib.suppress(OSError):  # what stays takes space, no more
                for old in saved_steps(self._folder)[:-keep]:  # renamed first: half of one is no checkpoint
                    self._path(old).rename(self._folder / f"deleted-step_{old}")
        self._clean()

    def _clean(self) -> None:
        """Remove what an interrupted or failed save has left, if that can be done."""
        if self._abandoned:
            return
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir() if jax.process_index() == 0 else ():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def _cannot_write(self, path: Path) -> OSError | None:
        """What is already known to go wrong is better not left to Orbax: many processes and threads would fail."""
        self._clean()
        if jax.process_index() == 0:
            try:
                if path.exists():
                    raise FileExistsError(f"{path.name} is there already")
                trial = path.with_name(f"{path.name}{_WRITING}")
                trial.mkdir(parents=True)
                trial.rmdir()
            except OSError as error:
                return error
        return None

    def _failed(self, step: int, error: Exception) -> None:
        self._clean()
        good: list[int] = []
        with contextlib.suppress(OSError):
            good = [s for s in saved_steps(self._folder) if s != step]
        last = f"the last good one is of step {good[-1]}" if good else "there is none before it"
        self._say(f"CHECKPOINT FAILED at step {step} in {self._folder} ({_one_line(error)}); the run goes on; {last}")

    def _set_aside(self, step: int) -> str:
        """Rename a damaged checkpoint; says what became of it."""
        names = (f"damaged-step_{step}{f'.{i}' if i else ''}" for i in range(10**6))
        name = next(name for name in names if not (self._folder / name).exists())
        try:
            self._path(step).rename(self._folder / name)
        except OSError as error:
            return f"could not be set aside: {_one_line(error)}"
        return f"set aside as {name}"

    def _records(self, steps: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Those that can be read."""
        for step in steps:
            with contextlib.suppress(_DamagedError):
                yield step, _record(self._path(step))

    def _check(self, step: int, what: str, there: Mapping[str, str], here: Mapping[str, str]) -> None:
        for name in [*here, *there]:
            if here.get(name) != there.get(name):
                raise UserError(
                    f"{self._path(step)} is {what}: {name} is {there.get(name, 'absent')} there and "
                    f"{here.get(name, 'absent')} here; move {self._folder} away or go back to what it was made with"
                )

    def _read(self, step: int, like: Any) -> Restored:
        """One checkpoint, on all processes or on none."""
        record: dict[str, Any] = {}
        leaves: dict[str, jax.Array] = {}
        losses: dict[str, np.ndarray] = {}
        shaped, structure = _by_name(like)
        why = ""
        try:
            record = _record(self._path(step))
            _check_files(self._path(step), record)
            leaves, losses = _load(self._path(step), shaped, record["losses"])
        except _DamagedError as error:
            why = str(error)
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # as when memory is short: the checkpoint may be good
        except Exception as error:  # damage shows in many ways
            why = _one_line(error)
        if not on_all_processes(not why):
            raise _DamagedError(why or "another process could not read it")
        # From here on, all processes compute the same numbers.
        for name, total in checksums(leaves).items():
            if total != record["leaves"][name][1]:
                raise _DamagedError(f"the numbers of {name} are not those that were saved")
        return Restored(step, jax.tree.unflatten(structure, leaves.values()), losses)


class Weights(NamedTuple):
    """params, stats: trees of NumPy arrays, as `cdl.models.build.Model.init` gives them; `cdl.models.pretrained.save`
    writes them for other tools. step: updates that they have seen."""

    params: Any
    stats: Any
    step: int


def read_weights(folder: Path) -> Weights:
    """Those of the newest checkpoint of a run that is whole. Changes nothing.

    Args:
      folder: of the run's checkpoints, or one of its checkpoints.

    Raises:
      UserError: there is none.
    """
    one = _STEP.fullmatch(folder.name)
    paths = [folder] if one else [folder / f"step_{step}" for step in reversed(saved_steps(folder))]
    why = "there is no checkpoint in it"
    for path in paths:
        try:
            return Weights(*_weights(path), int(path.name.removeprefix("step_")))
        except _DamagedError as error:
            why = f"{path.name} is damaged: {error}"
        except MemoryError:
            raise
        except Exception as error:  # damage shows in many ways
            why = f"{path.name} is damaged: {_one_line(error)}"
    raise UserError(f"{folder} has no weights ({why}); give a folder such as runs/x/checkpoints/<id>")


def _weights(path: Path) -> tuple[Any, Any]:
    record = _record(path)
    _check_files(path, record)
    wanted = {name: x for name, x in record["leaves"].items() if name.startswith(("params.", "stats."))}
    ocp = _orbax()
    args = ocp.args.PyTreeRestore(
        {"state": dict.fromkeys(wanted, 0)},
        restore_args={"state": dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray))},
        partial_restore=True,
    )
    read = ocp.PyTreeCheckpointHandler().restore(ocp.path.step.epath.Path(path.absolute()), args=args)["state"]
    for name, x in read.items():
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the others may be too small for all of it
            if checksums({name: x}) != {name: wanted[name][1]}:
                raise _DamagedError(f"the numbers of {name} are not those that were saved")
    # Names were joined from keys, of which those of lists are numbers. Axis 0 is the lane's.
    keys = {name: tuple(int(key) if key.isdigit() else key for key in name.split(".")) for name in read}
    tree = unflatten_dict({keys[name]: x[0] for name, x in read.items()})
    return tree["params"], tree.get("stats", {})


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, rising."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _STEP.fullmatch(path.name)))


def _record(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads((path / _RECORD).read_bytes())
        record, digest = stored["record"], stored["digest"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _DamagedError(f"{_RECORD} cannot be read: {_one_line(error)}") from None
    if digest != _digest(record) or f"step_{record['step']}" != path.name:
        raise _DamagedError(f"{_RECORD} does not agree with itself")
    return record


def _check_files(path: Path, record: Mapping[str, Any]) -> None:
    if damaged := [f for f, seen in record["files"].items() if _look_at(path / f) != seen]:
        raise _DamagedError(f"{damaged[0]} is not as it was written")


def _seal(folder: Path, record: dict[str, Any]) -> None:
    """Write the record beside the arrays, with what the files are like."""
    files = {str(p.relative_to(folder)): _look_at(p) for p in folder.rglob("*") if p.is_file()}
    del files[_ORBAX_NOTES]
    record = record | {"files": files}
    (folder / _RECORD).write_text(json.dumps({"record": record, "digest": _digest(record)}))


def _look_at(file: Path) -> list[int | None]:
    """Size, and for small files a checksum. Orbax would notice as well, but not quietly, and not always."""
    size = file.stat().st_size
    return [size, zlib.crc32(file.read_bytes()) if size <= _SMALL else None]


def _load(path: Path, shaped: Mapping[str, Any], losses: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves and losses as they are on disk; those of length 0 are not there and made."""
    ocp = _orbax()
    state = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in shaped.items()}
    curves = {name: np.empty(shape) for name, (shape, _) in losses.items()}
    item = {"state": _not_empty(state), "losses": _not_empty(curves)}
    args = ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
    # By the handler, which meets no other process on the way: one that fails here must not keep the others waiting.
    read = ocp.PyTreeCheckpointHandler().restore(ocp.path.step.epath.Path(path), args=args)
    leaves = {
        name: read["state"][name] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in state.items()
    }
    curves |= read["losses"]
    for name, curve in curves.items():
        if _curve_seal(curve) != losses[name]:
            raise _DamagedError(f"the numbers of losses.{name} are not those that were saved")
    return leaves, curves


def _by_name(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by their path, such as `params.block_0.kernel`, and the structure they came from."""
    paths, structure = jax.tree.flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if len(leaves) < len(paths):
        raise ValueError("two leaves of the state have the same name")
    return leaves, structure


def _fields(about: Mapping[str, Any]) -> dict[str, str]:
    """Values by dotted name, as JSON."""
    paths = jax.tree.leaves_with_path(about, is_leaf=lambda x: not isinstance(x, dict) or not x)
    return {jax.tree_util.keystr(path, simple=True, separator="."): json.dumps(value) for path, value in paths}


def _kind(leaf: Any) -> str:
    """Such as float32[768, 3072]."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def _curve_seal(curve: np.ndarray) -> list[Any]:
    return [list(curve.shape), zlib.crc32(curve.tobytes())]


def _not_empty(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Orbax refuses arrays of length 0."""
    return {name: array for name, array in arrays.items() if array.size}


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def _from_first_process(steps: list[int]) -> list[int]:
    """File systems may show a new folder to one process before another. The newest 16 are enough."""
    if jax.process_count() == 1:
        return steps
    newest = np.full(16, -1, np.int32)
    newest[: len(steps[-16:])] = steps[-16:]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(newest) if step >= 0]


@functools.cache
def _orbax() -> Any:
    """Imported when needed, and what it tells its developers kept from the terminal: failures are said by `say`.

    Of many reads or writes at once Orbax raises the first that fails and closes their event loop; the others then
    complain to the logger of asyncio, as warnings, and, from threads of C++, to `sys.unraisablehook`.
    """
    import orbax.checkpoint as ocp

    warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host.* was never awaited", RuntimeWarning)

    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: not re.search("/orbax/|tensorstore", record.getMessage()))
    before = sys.unraisablehook

    def hook(what: "sys.UnraisableHookArgs") -> None:
        if not (what.object is None and str(what.exc_value) == "Event loop is closed"):
            before(what)

    sys.unraisablehook = hook
    return ocp
