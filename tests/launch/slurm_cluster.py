"""A Slurm of one node on this machine, for tests: its own key, ports and state; no systemd, cgroups or database."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# Debian has the daemons where the PATH of many users does not look.
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
# A job that is requeued waits for cred_expire, which is 120 s by default.
AuthInfo=socket={short}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
# CPUs is taken as it stands: slurmd may count other sockets and cores in a container than Python does.
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=3
MinJobAge=60
ReturnToService=2
SlurmdTimeout=10
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={short}/spool
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes={host} Default=YES
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    if os.geteuid() != 0:
        return "a Slurm of its own is started by root alone"
    if not all(shutil.which(name, path=PATH) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        return "no Slurm is installed: install slurm-wlm and munge"
    return None


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """What the environment of sbatch needs; the configuration, state and logs of the cluster are in `folder`."""
    with ExitStack() as stack:
        # Paths of sockets have at most 107 bytes, and munged, which is not root, cannot enter pytest's folders.
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp")))
        short.chmod(0o755)
        (short / "spool").mkdir()
        (folder / "state").mkdir(parents=True)
        (short / "munge.key").write_bytes(os.urandom(128))
        (short / "munge.key").chmod(0o600)
        for path in (short, short / "munge.key"):
            shutil.chown(path, "munge", "munge")
        conf, host = folder / "slurm.conf", socket.gethostname().split(".")[0]
        conf.write_text(CONF.format(host=host, ports=_ports(2), short=short, folder=folder, cpus=os.cpu_count()))
        client = {"SLURM_CONF": str(conf)}
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))} | client | {"PATH": PATH}

        daemons: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, daemons, short, conf)

        def start(*command: str, user: str | None = None) -> None:
            with (folder / f"{command[0]}.log").open("wb") as log:
                new = subprocess.Popen(command, env=env, cwd=short, stdout=log, stderr=log, user=user, group=user)
                daemons.append(new)

        files = [f"--{kind}-file={short}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        start("munged", "--foreground", f"--socket={short}/munge.socket", *files, user="munge")
        _wait(lambda: (short / "munge.socket").exists(), folder)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        sinfo = ["sinfo", "--noheader", "--format=%T"]
        _wait(lambda: subprocess.run(sinfo, env=env, capture_output=True, check=False).stdout == b"idle\n", folder)
        yield client


def _ports(n: int) -> list[int]:
    """Free ones. All are open at once, so they differ, and the system draws them, so two clusters' differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _wait(done: Callable[[], bool], folder: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError("\n".join(f"{p.name}:\n{p.read_text()}" for p in sorted(folder.glob("*.log"))))
        time.sleep(0.1)


def _end(daemons: list[subprocess.Popen[bytes]], short: Path, conf: Path) -> None:
    """Kill whoever stands in `short`, as daemons do (slurmstepd shows nothing else), and whoever uses `conf`."""

    def belongs(process: Path) -> bool:
        with suppress(OSError):  # it may just have ended
            variables = (process / "environ").read_bytes().split(b"\0")
            return (process / "cwd").readlink() == short or f"SLURM_CONF={conf}".encode() in variables
        return False

    while pids := {int(p.name) for p in Path("/proc").glob("[0-9]*") if belongs(p)} - {os.getpid()}:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for daemon in daemons:
        daemon.wait()
