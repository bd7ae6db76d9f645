"""A Ray cluster of several nodes on this machine, for tests: one can be taken away while it works."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

MEMORY = 80 * 2**20  # of the object store, whose least is 75 MiB


def missing() -> str | None:
    """Why no cluster can be started here."""
    return None if importlib.util.find_spec("ray") else "Ray is not installed: install ray"


@contextmanager
def ray_cluster(nodes: int = 2) -> Iterator[Cluster]:
    """A head without CPUs and nodes of one CPU each, at `.address`; `remove_node` takes one of `.worker_nodes` away."""
    import ray
    from ray.cluster_utils import Cluster

    # Sockets have paths of at most 107 bytes, so not in pytest's folders.
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp,
        mock.patch.dict(os.environ, {"RAY_TMPDIR": temp, "RAY_USAGE_STATS_ENABLED": "0"}),
    ):
        # Ray takes 127.0.0.1 for a mistake, in drivers at least, and puts the address of the network card in its place.
        own = dict(node_ip_address="127.0.0.2", object_store_memory=MEMORY, include_dashboard=False)
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, **own)
            for _ in range(nodes):
                cluster.add_node(num_cpus=1, **own)
            yield cluster
        finally:
            ray.shutdown()  # a driver that is still connected keeps the head alive
            cluster.shutdown()
