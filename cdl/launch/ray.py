"""Workers that are tasks of a Ray cluster: Ray finds each a place with the resources that it needs."""

import math
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cdl.errors import UserError
from cdl.launch.supervise import End

__all__ = ["Ray", "parse_resources"]

_LOOK_SECONDS = 0.5


class Ray:
    """A `cdl.launch.supervise.Backend`. Nodes have this Python's packages and see the sweep's folder.

    Args:
      arguments: of `cdl worker`.
      resources: of a worker, as Ray names them; a GPU if None and the cluster has any, else a CPU.
      logs: folder for what workers say; made.

    Raises:
      UserError: no Ray, no cluster, or none that has such resources.
    """

    def __init__(self, arguments: Sequence[str], resources: Mapping[str, float] | None, logs: Path):
        try:
            ray = import_module("ray")
        except ImportError as error:
            raise UserError("--backend=ray needs Ray; pip install 'cdl[ray]'") from error
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            if re.fullmatch(r"[^:/]+:\d+", address):  # Ray would try for minutes
                host, _, port = address.partition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        except OSError as error:
            raise UserError(
                f"there is no Ray cluster at {address!r}; start one (ray start), or set RAY_ADDRESS"
            ) from error
        there = ray.cluster_resources()
        wanted = dict(resources or ({"GPU": 1.0} if there.get("GPU") else {"CPU": 1.0}))
        for name, number in wanted.items():
            if number > there.get(name, 0):
                raise UserError(
                    f"--resources={name}={number:g} is more than the cluster has, {there.get(name, 0):g}; ask for less"
                )
        self._ray = ray
        self._arguments = [*arguments, f"--cpus={max(1, int(wanted.get('CPU', 1)))}"]
        # Replacing workers is the coordinator's, which also knows what is left to do.
        cpus, gpus = wanted.pop("CPU", 0), wanted.pop("GPU", 0)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=wanted, max_retries=0, max_calls=1)
        self._task = task(_work)
        self._logs, self._started, self._name = logs, 0, secrets.token_hex(3)
        self._tasks: dict[Any, str] = {}  # -> job
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, workers: int) -> None:
        settings = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))}
        for _ in range(workers):
            self._started += 1
            job = f"ray-{self._name}-{self._started}"
            arguments = [*self._arguments, f"--job={job}", "--tied"]
            task = self._task.remote(arguments, str(self._log(job)), os.getcwd(), settings)
            self._tasks[task] = job

    def ended(self) -> list[End]:
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        ends = []
        for task in ready:
            job = self._tasks.pop(task)
            try:
                code = self._ray.get(task)
            except self._ray.exceptions.RayError:  # its node or process is gone, or it was cancelled
                code = None
            if code == 0:
                self._log(job).unlink(missing_ok=True)
            ends.append(End(job, code, self._log(job)))
        return ends

    def jobs(self) -> set[str]:
        return set(self._tasks.values())

    def stop(self, kill: bool) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=kill)

    def _log(self, job: str) -> Path:
        return self._logs / f"{job}.log"


def _work(arguments: list[str], log: str, folder: str, settings: dict[str, str]) -> int:
    """A worker, on some node; its exit code. Its input ends with this process, and with that the worker."""
    command = [sys.executable, "-m", "cdl.cli", "worker", *arguments]
    with Path(log).open("wb") as f:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=f, stderr=f, cwd=folder, env=os.environ | settings
        )
    while (code := process.poll()) is None:
        try:
            time.sleep(_LOOK_SECONDS)  # a wait for the process would not hear that the task is cancelled
        except KeyboardInterrupt:
            process.terminate()
    return code


def parse_resources(text: str) -> dict[str, float]:
    """``"GPU=1,CPU=8"`` -> dict.

    >>> parse_resources("GPU=1,CPU=8")
    {'GPU': 1.0, 'CPU': 8.0}
    """
    resources: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not 0 < value < math.inf or name in resources:
            raise UserError(f"--resources={text!r} must be names and positive numbers, such as GPU=1,CPU=8")
        resources[name] = value
    return resources
