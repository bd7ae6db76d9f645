"""Several processes, each with its own devices, that train one run together: one process per host as a rule."""

import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cdl.errors import UserError, at_failure, say

__all__ = [
    "check_same",
    "check_shared",
    "in_every_process",
    "in_first_process",
    "join_processes",
    "on_all_processes",
    "over_processes",
]

T = TypeVar("T")
_MEET_SECONDS = 300
_LAST_WORDS_SECONDS = 2.0  # the first process takes the others down at once, and they may have the same to say
_LAG_SECONDS = 10.0  # until every process sees a new file; network file systems remember for seconds what is not there


def join_processes(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Meet the other processes; afterwards `jax.devices()` are those of all. Has to come before JAX is first used.

    Args:
      coordinator: host:port of process 0, which the others can reach; None: what Slurm, Open MPI, a TPU pod or
        Kubernetes say, as `jax.distributed.initialize` finds out.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      UserError: an incomplete or impossible address, no cluster found, or process 0 is not there. (Where it is, and
        another one is not, JAX ends all of them.)
    """
    given = (coordinator, processes, process)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise UserError("--coordinator, --processes and --process belong together; give all three")
    if coordinator is not None and processes is not None and process is not None:
        if ":" not in coordinator or not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator={coordinator!r} must be host:port, such as 10.0.0.1:1234")
        if not 0 <= process < processes:
            raise UserError(f"--process={process} must be one of 0 to {processes - 1}, with --processes={processes}")
        if processes > 1:
            say(
                f"process {process} of {processes} waits for the others at {coordinator}, up to {_MEET_SECONDS} seconds"
            )
        if process > 0:
            _reach(coordinator)
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=_MEET_SECONDS)
    except (ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"the processes could not meet ({said}); start one per host at about the same time, or give "
            f"--coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    if jax.process_count() > 1:
        at_failure.append(_leave)


def _reach(coordinator: str) -> None:
    """Wait until process 0 is there: JAX does so too, but ends with a stack of C++ where it does not come."""
    host, _, port = coordinator.rpartition(":")
    began = time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() - began > _MEET_SECONDS:
                raise UserError(
                    f"--coordinator={coordinator}: no process 0 there within {_MEET_SECONDS} seconds ({error}); start "
                    f"one, and see that this host can reach it"
                ) from error
        time.sleep(0.5)


def _leave(code: int) -> None:
    """End this process, and so the others. JAX would wait for them, who may wait for this one in the middle of a
    step; now they fail there, on a GPU after the 100 seconds in which nothing is heard of this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(_LAST_WORDS_SECONDS)
    os._exit(code)


def on_all_processes(flag: bool) -> bool:
    """Is it so on every process? All of them have to ask."""
    return flag if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def over_processes(count: int) -> int:
    """The sum of what all processes have counted. All of them have to ask."""
    return count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.asarray(count)).sum())


def in_first_process(do: Callable[[], int | None]) -> int:
    """Do something in the first process alone, while the others wait; in all of them, what it returned (None: 0).

    Raises:
      Exception: what it raised; in the other processes a UserError, so that none waits for one that has left.
    """
    error: Exception | None = None
    result = 0
    if jax.process_index() == 0:
        try:
            result = do() or 0
        except Exception as e:
            error = e
    if not on_all_processes(error is None):
        raise error or UserError("the first process could not go on; its message says why")
    return result if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(result)))


def in_every_process(do: Callable[[], T]) -> T:
    """Do something that may go wrong in some processes alone.

    Raises:
      Exception: what it raised here; a UserError where it went wrong in another process.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = do()
    except Exception as e:
        error = e
    if not on_all_processes(error is None):
        raise error or UserError("another process could not go on; its message says why")
    return result  # pyrefly: ignore[bad-return]


def check_same(what: str) -> None:
    """Nothing if all processes have the same text here.

    Raises:
      UserError: they do not, and so would train different things as one.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(what.encode()).digest(), np.uint8)
    all_Px32 = multihost_utils.process_allgather(mine)
    differs = (all_Px32 != all_Px32[0]).any(axis=1)
    if differs.any():
        raise UserError(
            f"process {int(np.argmax(differs))} has another config, other options or other data than process 0; start "
            f"the same command on all hosts"
        )


def check_shared(folder: Path) -> None:
    """Nothing if all processes see in a folder what the first one writes there.

    Raises:
      UserError: they do not.
    """
    if jax.process_count() == 1:
        return
    name = bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8))).hex()
    file = folder / f".writing-{name}"  # what `cdl.sweep.store` removes if this process is killed here
    in_first_process(file.touch)
    began = time.monotonic()
    while not (seen := file.exists()) and time.monotonic() - began < _LAG_SECONDS:
        time.sleep(0.1)
    all_see = np.atleast_1d(multihost_utils.process_allgather(np.asarray(seen)))
    in_first_process(file.unlink)
    if not all_see.all():
        raise UserError(
            f"process {int(np.argmin(all_see))} does not see what process 0 writes to {str(folder)!r}; choose a folder "
            f"that all of them share"
        )
