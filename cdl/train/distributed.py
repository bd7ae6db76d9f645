"""Several processes, each with its own devices, that train one run together: one process per host as a rule."""

import jax

from cdl.errors import UserError

__all__ = ["join_processes"]


def join_processes(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Meet the other processes; afterwards `jax.devices()` are those of all. Has to come before JAX is first used.

    Args:
      coordinator: host:port of process 0, which the others can reach; None: what Slurm, Open MPI, a TPU pod or
        Kubernetes say, as `jax.distributed.initialize` finds out.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      UserError: an incomplete or impossible address, no cluster found, or the others did not come.
    """
    given = (coordinator, processes, process)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise UserError("--coordinator, --processes and --process belong together; give all three")
    if coordinator is not None and processes is not None and process is not None:
        if ":" not in coordinator or not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator={coordinator!r} must be host:port, such as 10.0.0.1:1234")
        if not 0 <= process < processes:
            raise UserError(f"--process={process} must be one of 0 to {processes - 1}, with --processes={processes}")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"the processes could not meet ({said}); start one per host at about the same time, or give "
            f"--coordinator=HOST:PORT --processes=N --process=I"
        ) from error
