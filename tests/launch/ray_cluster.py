"""A Ray cluster of several nodes on this machine, for tests: one can be taken away while it works.

python tests/launch/ray_cluster.py 2      # prints the address; takes a node away for every line of input
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

MEMORY = 80 * 2**20  # of the object store, whose least is 75 MiB


def missing() -> str | None:
    """Why no cluster can be started here."""
    if sys.platform != "linux":
        return "the cluster needs 127.0.0.2, which Linux alone has from the start"
    return None if importlib.util.find_spec("ray") else "Ray is not installed: install ray"


class RayCluster:
    """address: for RAY_ADDRESS."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process
        self.address = self._answer()

    def remove_node(self) -> None:
        """Take a node with its processes away."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._answer() == "removed"

    def _answer(self) -> str:
        """Ray prints too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("cluster: "):
                return line.removeprefix("cluster: ").strip()
        raise RuntimeError("the cluster has ended")


@contextmanager
def ray_cluster(nodes: int = 2) -> Iterator[RayCluster]:
    """A head without CPUs and nodes of one CPU each, in a process of their own: Ray forks, which JAX does not allow."""
    # Sockets have paths of at most 107 bytes, so not in pytest's folders.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        environment = os.environ | {"RAY_TMPDIR": temp, "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, __file__, str(nodes)]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield RayCluster(process)
            finally:
                process.communicate()  # closes its input


def main(nodes: int) -> None:
    from ray.cluster_utils import Cluster

    # Ray takes 127.0.0.1 for a mistake, in drivers at least, and puts the address of the network card in its place.
    own = dict(node_ip_address="127.0.0.2", object_store_memory=MEMORY, include_dashboard=False)
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, **own)
        workers = [cluster.add_node(num_cpus=1, **own) for _ in range(nodes)]
        print(f"cluster: {cluster.address}", flush=True)
        for _ in sys.stdin:
            cluster.remove_node(workers.pop(), allow_graceful=False)
            print("cluster: removed", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
