"""Which process trains which run, on file systems that may have no locks.

Every process that trains for a sweep keeps a file there, ``workers/<name>.json``, whose time stamp it moves on every
few seconds (`Worker`). A run is the process's that has created the run's newest claim, ``claim-<n>``: a file that is
not there can be created by one process alone. The next claim may be created once the holder of the newest has let go of
it or is dead (`Claims`): at once where it ran on this host and the system knows its process no more, elsewhere when its
stamp has stood still for a minute of this host's steady clock. So no two clocks are ever compared, nor one with itself
after it was set.

Claims stay until the run has ended, and so tell how often it was begun and how that went.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["SILENT_SECONDS", "TEMPORARY", "Attempts", "Claims", "Worker", "create", "replace"]

TEMPORARY = ".writing-"  # what names of half-written files and folders begin with
BEAT_SECONDS = 3.0
SILENT_SECONDS = 60.0  # a host that is short of memory can be silent for long
_IDLE_SECONDS = 60.0  # after which a worker's file says that its runs stand still
_CLAIM = re.compile(r"claim-(\d+)")
_WORKERS = "workers"


class Attempts(NamedTuple):
    """How often a run was begun in vain since it last got further.

    crashes: it raised, or its process went down by itself. deaths: its process was killed, or nobody knows. said: of
    the last crash.
    """

    crashes: int = 0
    deaths: int = 0
    said: str = ""


class Worker:
    """This process, as others in a sweep's folder see it. Use as a context manager.

    Args:
      root: the sweep's folder.
      about: what else its file says, for `cdl status`; see `tell`.
    """

    def __init__(self, root: Path, about: Mapping[str, Any] | None = None):
        self._workers = root / _WORKERS
        self._about: dict[str, Any] = dict(about or {}) | {
            "host": _host(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }
        self._told = time.monotonic()
        self._ended = threading.Event()
        self._lock = threading.Lock()  # of what follows, which changes with the name
        self._be_born()

    def _be_born(self) -> None:
        host = re.sub(r"[^\w.-]", "_", socket.gethostname())
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
        self._file = self._workers / f"{self.name}.json"
        self._written: dict[str, Any] = {}
        self._stamp = 0

    def __enter__(self) -> "Worker":
        self._workers.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread = threading.Thread(target=self._live, name="beat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file.unlink()

    def tell(self, **about: Any) -> None:
        """Say something more in the file, at the next beat. Who tells nothing for a minute is said to be idle."""
        self._about = self._about | about
        self._told = time.monotonic()

    def buried(self) -> bool:
        """Do others think it dead? It was suspended for long, say, or cut off from the folder. Then its claims are
        void, also those to come, until it is `reborn`."""
        try:
            there = os.listdir(self._workers)  # which network file systems answer without what they remember
        except OSError:
            return False
        return f"{self.name}.dead" in there or self._file.name not in there

    def reborn(self) -> None:
        """Go on under another name."""
        with self._lock:
            self._be_born()
            self._beat()

    def _live(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock, contextlib.suppress(OSError):  # the disk may have room again at the next
                self._beat()

    def _beat(self) -> None:
        # A stamp of our own making: one of the clock's would repeat itself after the clock is set back.
        self._stamp = max(time.time_ns(), self._stamp + 2 * 10**9)
        idle = time.monotonic() - self._told
        about = self._about | ({"idle_min": int(idle / 60)} if idle > _IDLE_SECONDS else {})
        if about != self._written:
            try:
                replace(self._file, json.dumps(about), self._stamp)
                self._written = about
                return
            except OSError:
                if not self._written:
                    raise
        os.utime(self._file, ns=(self._stamp, self._stamp))  # also on a full disk


class Claims:
    """The claims of one sweep, as one process sees them."""

    def __init__(self, root: Path):
        self._workers = root / _WORKERS
        self._seen: dict[str, tuple[int, float]] = {}  # worker -> its stamp, and when it was first seen here
        self._moved: set[str] = set()  # workers whose stamp was seen to change

    def take(self, folder: Path, worker: str, step: int) -> Path | None:
        """Make a run this worker's; the claim, or None where another holds it.

        Args:
          folder: of the run's claims; there.
          step: that the run will go on from.

        Raises:
          OSError: nothing can be written.
        """
        newest = _newest(folder)
        claim = folder / f"claim-{newest}"
        said = _read(claim)
        if said.get("worker") == worker and "ended" not in said:
            return claim  # it could not be let go of, when nothing could be written
        if newest and self.held(claim):
            return None
        claim = folder / f"claim-{newest + 1}"
        return claim if create(claim, json.dumps({"worker": worker, "step": step})) else None

    def holder(self, folder: Path) -> str | None:
        """The living process that has a run, or None."""
        newest = _newest(folder)
        claim = folder / f"claim-{newest}"
        return _read(claim).get("worker") if newest and self.held(claim) else None

    def held(self, claim: Path) -> bool:
        """Is its holder alive, and has not let go?"""
        try:
            said = json.loads(claim.read_text())
        except FileNotFoundError:
            return False
        except OSError:
            return True  # who knows; the next look may
        except ValueError:  # being written, or its writer died over it
            if self._moves(str(claim), 0):
                return True
            with contextlib.suppress(OSError):  # others have not watched it for so long
                replace(claim, json.dumps({"worker": "unknown", "ended": "released"}))
            return False
        return "ended" not in said and self.alive(said["worker"])

    def superseded(self, claim: Path) -> bool:
        """Has another process thought the holder dead and taken the run, and maybe ended it?"""
        with contextlib.suppress(OSError):  # the next look may tell
            return f"claim-{_newest(claim.parent)}" != claim.name
        return False

    def end(self, claim: Path, how: str, said: str = "") -> None:
        """Let go of a claim: "released", or "failed" with what is known of it."""
        with contextlib.suppress(OSError):
            replace(claim, json.dumps(_read(claim) | {"ended": how, "said": said}))

    def attempts(self, folder: Path, step: int) -> Attempts:
        """Those in vain since the run was last forgiven or got as far as this step; not one that is under way."""
        crashes, deaths, said = 0, 0, ""
        for n in range(_newest(folder), 0, -1):
            claim = _read(folder / f"claim-{n}")
            if "worker" not in claim:
                continue  # its writer died over it
            if "forgiven" in claim or claim.get("step") != step:
                break
            death = {} if "ended" in claim else self.record(claim["worker"])
            if "ended" not in claim and (not death or self.alive(claim["worker"])):
                continue  # under way; or it ended well, but could not write that on a full disk
            crashed = claim.get("ended") == "failed" or "crashed" in death
            crashes += crashed
            deaths += "ended" not in claim and not crashed
            said = said or claim.get("said", "") or death.get("crashed", "")
        return Attempts(crashes, deaths, said)

    def forgive(self, folder: Path) -> None:
        """What went wrong so far counts no more."""
        claim = folder / f"claim-{_newest(folder)}"
        if claim.exists():
            replace(claim, json.dumps(_read(claim) | {"forgiven": True}))

    def alive(self, worker: str) -> bool:
        """Does a worker live, as far as can be known here?"""
        return self._look(worker) is not False

    def heard(self, worker: str) -> bool:
        """Is it certain that a worker lives? Of one on another host, a look or two cannot tell."""
        return self._look(worker) is True

    def silence(self, worker: str) -> float:
        """Seconds since a worker moved its stamp, by its clock and this one's; to be read by people, not decided by."""
        try:
            return time.time() - (self._workers / f"{worker}.json").stat().st_mtime
        except OSError:
            return 0.0

    def _look(self, worker: str) -> bool | None:
        """Does a worker live? None: nothing says that it does not."""
        file = self._workers / f"{worker}.json"
        try:
            with file.open() as f:  # network file systems look for a newer stamp when a file is opened
                stamp, text = os.fstat(f.fileno()).st_mtime_ns, f.read()
        except FileNotFoundError:
            return False
        except OSError:
            stamp, text = 0, ""
        try:
            said = json.loads(text)
        except ValueError:
            said = {}
        if file.with_suffix(".dead").exists():
            return False
        if said.get("host") == _host() and said.get("born"):
            born = _born(said["pid"])
            if born == said["born"]:
                return True
            if born is not None:
                self.bury(worker)  # other hosts cannot know
                return False
        if self._moves(worker, stamp):
            return True if worker in self._moved else None
        self.bury(worker)  # others have not watched it for so long
        return False

    def _moves(self, what: str, stamp: int) -> bool:
        """Was there another stamp than this within the last minute, or is it not that long known here?"""
        now = time.monotonic()
        if self._seen.get(what, (stamp,))[0] != stamp:
            self._moved.add(what)
        if what not in self._seen or self._seen[what][0] != stamp:
            self._seen[what] = (stamp, now)
        return now - self._seen[what][1] < SILENT_SECONDS

    def workers(self) -> list[str]:
        """All that have a file, dead or alive."""
        return sorted(f.stem for f in self._workers.glob("*.json") if not f.name.startswith(TEMPORARY))

    def record(self, worker: str) -> dict[str, Any]:
        """What a worker says of itself, and what was said of its death; empty where there is nothing."""
        file = self._workers / f"{worker}.json"
        return _read(file) | _read(file.with_suffix(".dead"))

    def bury(self, worker: str, crashed: str = "") -> None:
        """Write down that a worker is dead: whoever started it knows before others can. crashed: by its own doing."""
        file = self._workers / f"{worker}.dead"
        if file.with_suffix(".json").exists():
            with contextlib.suppress(OSError):
                replace(file, json.dumps({"crashed": crashed} if crashed else {}))

    def forget_dead(self, folders: Iterable[Path]) -> None:
        """Remove the files of dead workers but those that claims in these folders speak of."""
        named = {_read(claim).get("worker") for folder in folders for claim in folder.glob("claim-*")}
        for worker in self.workers():
            if worker not in named and not self.alive(worker):
                for suffix in (".dead", ".json"):
                    with contextlib.suppress(OSError):
                        (self._workers / f"{worker}{suffix}").unlink()


def create(file: Path, text: str) -> bool:
    """Make a file that is not there yet, whole; False where it is.

    Raises:
      OSError: it cannot be written.
    """
    temporary = file.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{file.name}")
    try:
        _write(temporary, text)
        try:
            os.link(temporary, file)
        except FileExistsError:
            return file.read_text() == text  # NFS: done, but the answer was lost and the question repeated
        except OSError:  # no hard links here
            try:
                with file.open("x") as f:
                    f.write(text)
            except FileExistsError:
                return file.read_text() == text
        return True
    finally:
        temporary.unlink(missing_ok=True)


def replace(file: Path, text: str, stamp: int | None = None) -> None:
    """Write a file whole or not at all. stamp: its time, ns."""
    temporary = file.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{file.name}")
    try:
        _write(temporary, text)
        if stamp is not None:
            os.utime(temporary, ns=(stamp, stamp))
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _write(file: Path, text: str) -> None:
    with file.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())  # a name without its content is all that a host which goes down may leave otherwise


@functools.cache
def _host() -> str:
    """This host since it was started, and this container on it: where process numbers mean the same."""
    parts = [socket.gethostname()]
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(file) if file.endswith("pid") else Path(file).read_text().strip())
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """When a process was started, in ticks since the host was; "" where it is no more, None where that is not told."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # some systems hide the processes of others
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            return None
        return None
    return "" if state in "ZX" else rest[18]


def _newest(folder: Path) -> int:
    try:
        return max((int(m[1]) for name in os.listdir(folder) if (m := _CLAIM.fullmatch(name))), default=0)
    except FileNotFoundError:
        return 0


def _read(file: Path) -> dict[str, Any]:
    """What a small file says; nothing where it is gone or being written."""
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
