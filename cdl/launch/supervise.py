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
_MOST_FAILED_STARTS = 20
_LONGEST_PAUSE = 300.0  # seconds, between starts of workers that fail
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
      UserError: where no worker is left, what the last one says that a person has to mend, or that workers end before
        they begin a run; workers that cannot be started.
    """
    crashed, refused, started, not_started = 0, 0, 0, 0  # since a run was last begun; refused: since one has ended
    before, last, told, pause_ends = _progress(store, points), None, set[str](), 0.0
    try:
        while True:
            holders = _holders(store)  # before what is left: who has just published one holds none for a moment
            left = _left(store, points)
            if not left:
                break
            if (now := _progress(store, left)) != before:
                crashed, started = 0, 0
                refused, before = refused if now[0] == before[0] else 0, now
            for end in backend.ended():
                bury(store, end)
                refused += end.code == BAD_INPUT
                crashed += end.code not in (0, BAD_INPUT) and not _by_others(end)
                if end.code == BAD_INPUT:
                    say(f"{describe(end)}: {_mend(end)}")
                pause_ends = _after_pause(crashed + refused)
                last = end
            held = {p.id: holders[p.id] for p in left if p.id in holders}
            idle = not held and not backend.jobs()  # else one that works, or waits for its place, may do
            if idle and refused >= _MOST_REFUSALS and last:
                raise UserError(_mend(last))
            if (idle and crashed >= _MOST_CRASHES) or (not held and started >= _MOST_STARTS):
                said = f"{describe(last)}: {_last_line(last.log)}" if last else "they say nothing"
                raise UserError(f"workers end without having begun a run ({said}); see {store.root / 'logs'}")
            others = _others(set(held.values()), store, backend)
            more = min(workers - len(backend.jobs()) - len(others), len(left) - len(held))
            if more > 0 and time.monotonic() > pause_ends:
                try:
                    backend.start(more)
                    started, not_started = started + 1, 0
                except UserError as error:
                    not_started += 1
                    if not last or not_started >= _MOST_FAILED_STARTS:
                        raise
                    say(f"{error}; tried again later")
                    pause_ends = _after_pause(not_started)
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
    ids = {p.id for p in left}
    return len(left), sum(len(list(f.glob("claim-*"))) for f in store.begun() if f.name in ids)


def _holders(store: Store) -> dict[str, str]:
    """The living workers of those runs that have one, by id."""
    holders = {folder.name: store.claims.holder(folder) for folder in store.begun()}
    return {id: worker for id, worker in holders.items() if worker}


def _after_pause(failures: int) -> float:
    """When to start another worker: the later, the more have failed in a row."""
    return time.monotonic() + min(2.0**failures, _LONGEST_PAUSE) if failures else 0.0


def _mend(end: End) -> str:
    """What a worker that refuses to work says."""
    return _last_line(end.log).removeprefix("cdl: error: ")


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
