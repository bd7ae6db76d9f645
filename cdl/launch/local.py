"""Workers that are processes of this machine, each with its share of the cores or GPUs."""

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cdl.errors import UserError
from cdl.launch.supervise import End

__all__ = ["Local", "shares"]


class Local:
    """A `cdl.launch.supervise.Backend`.

    A worker's standard input is a pipe from this process, and a worker whose input ends saves its runs and ends: so
    none outlives this process, whatever becomes of it.

    Args:
      command: ``cdl worker FOLDER``, as words.
      shares: of each worker: environment variables, and arguments besides.
      logs: folder for what they say; made.
    """

    def __init__(self, command: Sequence[str], shares: Sequence[tuple[dict[str, str], list[str]]], logs: Path):
        self._command, self._shares, self._logs = list(command), list(shares), logs
        self._processes: dict[int, tuple[str, Path, subprocess.Popen[bytes]]] = {}  # share -> job, log, process
        self._started, self._name = 0, secrets.token_hex(3)
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, workers: int) -> None:
        free = [i for i in range(len(self._shares)) if i not in self._processes]
        for i in free[:workers]:
            self._started += 1
            job = f"local-{self._name}-{self._started}"
            environment, arguments = self._shares[i]
            command = [*self._command, *arguments, f"--job={job}", "--tied"]
            log = self._logs / f"{job}.log"
            with log.open("wb") as f:
                # A session of its own: Ctrl-C in the terminal is for this process alone.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=f,
                    stderr=f,
                    env=os.environ | environment,
                    start_new_session=True,
                )
            self._processes[i] = (job, log, process)

    def ended(self) -> list[End]:
        ends = []
        for i, (job, log, process) in list(self._processes.items()):
            if (code := process.poll()) is not None:
                del self._processes[i]
                if process.stdin:
                    process.stdin.close()
                ends.append(End(job, code, log))
                if code == 0:
                    log.unlink(missing_ok=True)
        return ends

    def jobs(self) -> set[str]:
        return {job for job, _, _ in self._processes.values()}

    def stop(self, kill: bool) -> None:
        for _, _, process in self._processes.values():
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)


def shares(workers: int) -> list[tuple[dict[str, str], list[str]]]:
    """For each worker its share of this machine: of its GPUs, where there are any, else of its cores.

    Raises:
      UserError: more workers than GPUs, or TPUs.
    """
    if any(Path("/dev").glob("accel*")):
        raise UserError(f"--workers={workers}: one process drives all TPU chips of a host; leave it out, lanes use all")
    if gpus := _gpus():
        if workers > len(gpus):
            raise UserError(
                f"--workers={workers} exceeds the number of GPUs, {len(gpus)}; use --lanes for more runs on each"
            )
        return [({"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::workers])}, []) for i in range(workers)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    parts = [cores[i::workers] or [cores[i % len(cores)]] for i in range(workers)]
    return [({}, [f"--cores={','.join(map(str, part))}"]) for part in parts]


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that JAX would use, found without it: it would take their memory."""
    wanted = os.environ.get("JAX_PLATFORMS") or "cuda"
    if not {"cuda", "gpu"} & set(wanted.split(",")) or not shutil.which("nvidia-smi"):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [x for x in visible.split(",") if x]
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(i) for i in range(len(listed.stdout.splitlines()))] if listed.returncode == 0 else []
