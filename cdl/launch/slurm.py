"""Workers that are jobs of Slurm: one array for each batch of workers, and `squeue` to see which have ended."""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from cdl.errors import UserError, say
from cdl.launch.supervise import End

__all__ = ["Slurm"]

_LOOK_SECONDS = 2.0  # between two questions to the controller, which many users share
_ANSWER_SECONDS = 60
_MOST_ASKED = 3  # times, where it matters
_NOTICE_SECONDS = 120  # before the time limit, to save


class Slurm:
    """A `cdl.launch.supervise.Backend`. Compute nodes see the sweep's folder, this Python and this folder.

    Args:
      command: ``cdl worker FOLDER``, as words.
      options: of sbatch, such as "--partition=gpu --gres=gpu:1 --time=4:00:00".
      logs: folder for what workers say; made.
      name: of the jobs, and of no others. Those in the queue become this one's: whoever began them was killed, or will
        replace them.

    Raises:
      UserError: no Slurm here.
    """

    def __init__(self, command: Sequence[str], options: str, logs: Path, name: str):
        if not shutil.which("sbatch"):
            raise UserError("--backend=slurm needs sbatch; start it on a login node of the cluster")
        self._script = (
            f'#!/bin/sh\nexec {shlex.join(command)} --job="slurm-${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" '
            f'--cpus="${{SLURM_CPUS_PER_TASK:-1}}"\n'
        )
        try:
            given = shlex.split(options)
        except ValueError as error:
            raise UserError(f"--sbatch={options!r} cannot be read ({error}); quote as in a shell") from error
        self._options = [
            *given,  # first: what follows has to hold
            f"--job-name={name}",
            f"--output={logs}/slurm-%A_%a.log",
            f"--signal=B:TERM@{_NOTICE_SECONDS}",
        ]
        self._logs = logs
        self._looked = -_LOOK_SECONDS
        self._jobs = _queued(f"--name={name}") or set()  # as in 123_4
        if self._jobs:
            say(f"{len(self._jobs)} jobs of this sweep are in Slurm's queue already")
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, workers: int) -> None:
        # One that is requeued by Slurm would run beside the one that replaces it.
        command = ["sbatch", *self._options, "--parsable", "--no-requeue", f"--array=0-{workers - 1}"]
        done = _ask(command, self._script)
        if done.returncode:
            raise UserError(f"{_one_line(done.stderr)}; mend that, or --sbatch=OPTIONS")
        array = done.stdout.strip().partition(";")[0]
        self._jobs |= {f"{array}_{i}" for i in range(workers)}

    def ended(self) -> list[End]:
        if not self._jobs or time.monotonic() - self._looked < _LOOK_SECONDS:
            return []
        self._looked = time.monotonic()
        queued = _queued()
        if queued is None:
            return []
        gone = sorted(self._jobs - queued)
        self._jobs -= set(gone)
        ends = []
        for job in gone:
            log, code = self._logs / f"slurm-{job}.log", _exit_code(job)
            if code == 0:
                log.unlink(missing_ok=True)
            ends.append(End(f"slurm-{job}", code, log))
        return ends

    def jobs(self) -> set[str]:
        return {f"slurm-{job}" for job in self._jobs}

    def stop(self, kill: bool) -> None:
        self._cancel("PENDING")
        # Without a signal Slurm would kill those at work 30 seconds later.
        self._cancel("RUNNING", *(["--signal=KILL", "--full"] if kill else ["--signal=TERM", "--batch"]))

    def _cancel(self, state: str, *how: str) -> None:
        said = ""
        for _ in range(_MOST_ASKED):
            queued = _queued(f"--states={state}")
            these = sorted(self._jobs & (queued or set()))
            done = _ask(["scancel", *how, *these]) if these else None
            if queued is not None and (done is None or done.returncode == 0):
                return
            said = _one_line(done.stderr) if done else "squeue does not answer"
            time.sleep(_LOOK_SECONDS)
        say(f"{said}; jobs may go on")


def _queued(*which: str) -> set[str] | None:
    """This user's jobs that wait or run; None where Slurm does not say."""
    done = _ask(["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}", *which])
    if done.returncode:
        say(f"{_one_line(done.stderr)}; jobs are taken to go on")
        return None
    return set(done.stdout.split())


def _exit_code(job: str) -> int | None:
    """As `End.code`; None where Slurm ended it, or has forgotten it."""
    done = _ask(["scontrol", "--oneliner", "show", "job", job])
    found = re.search(r"JobState=(\w+).* ExitCode=(\d+):(\d+)", done.stdout)
    if found is None or found[1] in ("CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT", "DEADLINE", "BOOT_FAIL"):
        return None
    return -int(found[3]) if int(found[3]) else int(found[2])


def _ask(command: Sequence[str], text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command of Slurm's; one that hangs, as all do while munge does, has failed."""
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        said = f"{command[0]} has not answered for {_ANSWER_SECONDS} seconds"
        return subprocess.CompletedProcess(command, 1, "", said)


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "it failed and said nothing"
