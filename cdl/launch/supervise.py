"""Keep the workers of a sweep going until every run has ended."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from cdl.errors import UserError, say
from cdl.sweep.grid import Point
from cdl.sweep.store import Store
from cdl.train.loop import Stopped

__all__ = ["Backend", "End", "describe", "supervise"]

_POLL_SECONDS = 0.5
_LAST_SECONDS = 20.0  # for workers to end by themselves once all runs have
_MOST_CRASHES = 3  # of workers, before any has begun a run
_MOST_STARTS = 30  # of workers that are killed before they have, say
_MOST_REFUSALS = 2  # of workers, before a run has ended: one may be a matter of its host alone
BAD_INPUT = 2  # exit code of `cdl.cli` for what a person has to mend
_BY_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class End(NamedTuple):
    """How a worker ended. job: its name. code: as `subprocess.Popen.returncode`, minus the signal where one ended it;
    None where nobody knows. log: what it has said."""

    job: str
    code: int | None
    log: Path


class Backend(Protocol):
    """Starts workers and says how they end."""

    def start(self, workers: int) -> None:
        """Start so many more."""
        ...

    def ended(self) -> list[End]:
        """Those that have ended since this was asked last."""
        ...

    def jobs(self) -> set[str]:
        """Names of the workers started and not seen to end, also of those that still wait for their place."""
        ...

    def stop(self, kill: bool) -> None:
        """Have all of them save their runs and end; with `kill`, end at once."""
        ...


def supervise(
    backend: Backend,
    store: Store,
    points: Sequence[Point],
    workers: int,
    *,
    stop: Callable[[], bool],
    show: Callable[[], None],
) -> None:
    """Have workers train all points; those that die are replaced.

    Args:
      backend: where they run.
      store: opened for the points.
      workers: how many at a time.
      stop: asked often; once it is true, runs are saved and workers end. Who will not wait for that interrupts.
      show: called about twice a second.

    Raises:
      Stopped: it was asked to.
      UserError: what a worker says that a person has to mend; workers that end before they begin a run.
    """
    crashed, started = 0, 0  # since a run was last begun
    refused, before, last, told = 0, _progress(store, points), None, set[str]()
    try:
        while left := _left(store, points):
            if (now := _progress(store, left)) != before:
                crashed, started = 0, 0
                refused, before = refused if now[0] == before[0] else 0, now
            for end in backend.ended():
                bury(store, end)
                if end.code == BAD_INPUT:
                    refused += 1
                    mend = _last_line(end.log).removeprefix("cdl: error: ")
                    if refused >= _MOST_REFUSALS:
                        raise UserError(mend)
                    say(f"{describe(end)} ({mend}); another one is tried")
                crashed += end.code != 0 and not _by_others(end)
                last = end
            if crashed >= _MOST_CRASHES or started >= _MOST_STARTS:
                said = f"{describe(last)}: {_last_line(last.log)}" if last else "they say nothing"
                raise UserError(f"workers end without having begun a run ({said}); see {store.root / 'logs'}")
            holders = [store.claims.holder(store.checkpoints(p)) for p in left]
            others = _others(set(filter(None, holders)), store, backend)
            more = min(workers - len(backend.jobs()) - len(others), holders.count(None))
            if more > 0:
                backend.start(more)
                started += 1
            if new := others - told:
                told |= new
                doubt = "" if all(map(store.claims.heard, new)) else ", or were until it died: a minute will tell"
                say(f"runs are trained by {', '.join(sorted(new))}, which this command has not started{doubt}")
            show()
            if stop():
                raise Stopped
            time.sleep(_POLL_SECONDS)
        _wait(backend, store, _LAST_SECONDS)  # nothing is left for them, and they are about to see it
    finally:
        _end(backend, store)
    store.tidy()


def _left(store: Store, points: Sequence[Point]) -> list[Point]:
    ended = store.ids() | store.failed().keys()
    return [p for p in points if p.id not in ended]


def _progress(store: Store, left: Sequence[Point]) -> tuple[int, int]:
    """Changes with every run that is begun or ends."""
    return len(left), sum(len(list(store.checkpoints(p).glob("claim-*"))) for p in left)


def _others(holders: set[str], store: Store, backend: Backend) -> set[str]:
    """Those that somebody else has started: another command, or this one before it was killed."""
    return {w for w in holders if store.claims.record(w).get("job") not in backend.jobs()}


def _end(backend: Backend, store: Store) -> None:
    """Let all workers end."""
    if backend.jobs():
        backend.stop(kill=False)
    try:
        _wait(backend, store, math.inf)
    except KeyboardInterrupt:
        backend.stop(kill=True)
        raise


def _wait(backend: Backend, store: Store, seconds: float) -> None:
    """Until all workers have ended, so long at most."""
    began = time.monotonic()
    while backend.jobs() and time.monotonic() - began < seconds:
        for end in backend.ended():
            bury(store, end)
        time.sleep(0.1)


def bury(store: Store, end: End) -> None:
    """Let everybody know that a worker is dead, and whether it went down by itself."""
    by_itself = end.code not in (0, BAD_INPUT) and not _by_others(end)
    for worker in store.claims.workers():
        if store.claims.record(worker).get("job") == end.job:
            store.claims.bury(worker, crashed=f"{_tail(end.log)}\n{describe(end)}" if by_itself else "")


def _by_others(end: End) -> bool:
    """Was it killed, asked to stop, or lost?"""
    return end.code is None or -end.code in _BY_OTHERS or end.code - 128 in _BY_OTHERS


def describe(end: End) -> str:
    """Such as "local-3 was ended by SIGSEGV"."""
    if end.code is None:
        return f"{end.job} was lost"
    if end.code < 0:
        known = -end.code in set(signal.Signals)
        return f"{end.job} was ended by {signal.Signals(-end.code).name if known else f'signal {-end.code}'}"
    return f"{end.job} ended with exit code {end.code}"


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").strip().splitlines()[-40:])
    except OSError:
        return ""


def _last_line(log: Path) -> str:
    return (_tail(log) or "it has said nothing").splitlines()[-1]
