"""The verbs of the command line that train many runs: `cdl sweep` and `cdl worker`."""

import argparse
import faulthandler
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from ml_collections import ConfigDict

from cdl import config as configs
from cdl.cli_output import show_report
from cdl.cli_train import caught_signals, console, interrupted, start_devices, train_points
from cdl.errors import UserError, say
from cdl.launch.local import Local, shares
from cdl.launch.ray import Ray, parse_resources
from cdl.launch.slurm import Slurm
from cdl.launch.supervise import Backend, supervise
from cdl.laws.horizon import NoLaw
from cdl.planning import CHECKS, plan
from cdl.report import write_report
from cdl.status import Watch, WorkersProgress
from cdl.sweep.grid import Point, points_in
from cdl.sweep.layout import shape_on
from cdl.sweep.probe import choose_layout, probe
from cdl.sweep.programs import check_files, parts_of, points_of, step_cost
from cdl.sweep.store import Store, grid_name
from cdl.train.distributed import in_every_process, in_first_process
from cdl.train.loop import Stopped
from cdl.wording import duration

__all__ = ["run_sweep", "sweep", "trainer", "worker"]

_SHOWN = 100  # rows of a grid
# `cdl sweep` without options
_ALONE: dict[str, Any] = dict(backend="local", workers=None, lanes=None, tensorboard=False, wandb=None, profile=None)
_ALONE |= dict(distributed=False, coordinator=None, processes=None, process=None, sbatch=None, resources=None)

Trainer = Callable[[Path, Sequence[Point], int | None], object]  # of points, into a folder, in so many lanes


def sweep(arguments: argparse.Namespace) -> None:
    """`cdl sweep`."""
    if arguments.dry_run:
        _check_workers(arguments)
        start_devices(arguments)
        print("\n".join(_dry_run(_grid(arguments), arguments)))
        return
    if arguments.out is None:
        raise UserError("--out is missing; name a folder for the sweep, such as --out=runs/mine")
    train = trainer(arguments)
    points = in_every_process(lambda: _grid(arguments))
    store = Store(arguments.out)
    in_first_process(functools.partial(store.retry, points))
    train(store.root, points, arguments.lanes)
    if jax.process_index() > 0:
        return
    failed = _tell_failed(store, points)
    if store.ids():  # not where all have failed
        failed = _conclude(arguments, store, points, train) or failed
    if failed:
        raise UserError(failed)


def run_sweep(
    config: ConfigDict,
    grid: Sequence[Mapping[str, Any]],
    folder: str | Path,
    arguments: argparse.Namespace | None = None,
    *,
    keep: bool = False,
) -> pd.DataFrame:
    """Train the points of a grid that a folder lacks, as `cdl sweep` does.

    Args:
      config: of one run.
      grid: changes of it, one mapping a point; see `cdl.sweep.grid`.
      folder: where results go; call again to go on.
      arguments: of `cdl sweep`, for workers; in this process if None.
      keep: keep the weights that runs end with, and the newest `checkpoint.keep` before them.

    Returns:
      The results, a row for each point in the order of the grid, with the columns of `cdl.sweep_table`.

    Raises:
      UserError: bad values in a config; runs that failed; one of several processes of `jax.distributed`.
    """
    if jax.distributed.is_initialized():
        raise UserError("a grid is trained by one process, or by its workers; take cdl sweep --distributed for several")
    arguments = argparse.Namespace(**(_ALONE | (vars(arguments) if arguments else {}) | dict(keep=keep)))
    store, train = Store(folder), trainer(arguments)
    points = points_of(config, grid)
    store.retry(points)
    train(store.root, points, arguments.lanes)
    if failed := _tell_failed(store, points):
        raise UserError(failed)
    table = store.table()
    return table.set_index("id", drop=False).loc[[p.id for p in points]].reset_index(drop=True)


def _tell_failed(store: Store, points: Sequence[Point]) -> str:
    """Print which runs were given up; returns what to do about it."""
    failures = store.failed()
    failed = [p for p in points if p.id in failures]
    for point in failed:
        said = failures[point.id]["error"]
        print(f"Failed: eta_ref={point.config.eta_ref:g}, T={point.config.T} ({point.id}): {said}")
    if not failed:
        return ""
    return (
        f"{len(failed)} of {len(points)} runs failed; cdl show {store.root} {failed[0].id} says more, and the same "
        f"command tries them again"
    )


def _conclude(arguments: argparse.Namespace, store: Store, points: Sequence[Point], train: Trainer) -> str:
    """Fit the law, check it if asked to, and write the report; returns what is to be done where the check failed."""
    try:
        made = plan(store.root)
    except NoLaw as e:  # the runs are what was asked for; not every grid has a law in it
        if arguments.check:
            raise UserError(f"the runs are done, but there is nothing to check: {e}") from e
        print(f"The runs are done, but there is no law to fit: {e}.\nResults: {store.root}")
        return ""
    failed = ""
    if arguments.check:
        like = min(points, key=lambda p: p.config.seed).config  # one setting, or there were no law
        checks = points_of(like, [dict(eta_ref=made.eta_ref, T=made.T)])
        console().print(f"Check: training T={made.T} at eta_ref={made.eta_ref:g}, as predicted.", highlight=False)
        there = Store(store.root / CHECKS)
        there.retry(checks)
        train(there.root, checks, None)
        failed = _tell_failed(there, checks)
    show_report(*write_report(store.root))
    return failed


def _dry_run(points: Sequence[Point], arguments: argparse.Namespace) -> Iterator[str]:
    """The grid, and what it costs on these devices, in lines."""
    flats = [p.flat | p.fingerprints for p in points]
    axes = [k for k in flats[0] if any(f.get(k) != flats[0][k] for f in flats)]
    table = pd.DataFrame({"id": [p.id for p in points]} | {k: [f.get(k) for f in flats] for k in axes})
    finished = Store(arguments.out).ids() if arguments.out else set()
    if finished:
        table["there"] = ["yes" if p.id in finished else "" for p in points]
    left = len(table) - _SHOWN
    yield table.head(_SHOWN).to_string(index=False)
    yield from [f"... and {left} more"] if left > 0 else []
    points = [p for p in points if p.id not in finished]
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.program, []).append(point)
    there = f", {len(table) - len(points)} of them there already" if finished else ""
    yield f"{len(table)} runs{there}; {len(groups)} compiled program{'s' * (len(groups) != 1)}"
    flops, seconds = 0, 0.0
    for group in groups.values():
        where = choose_layout(group, say, arguments.lanes)
        cost, measured = step_cost(group[0].config, where), probe(group[0], where)
        updates = sum(p.config.T for p in group)
        flops += updates * cost.flops
        seconds += measured.seconds(group)
        yield (
            f"{len(group)} runs of {parts_of(group[0].config)[0].n_params:,} parameters: {updates:,} updates, "
            f"{updates * cost.amount:.3g} {cost.unit}, {updates * cost.flops:.3g} FLOPs; {measured.lanes} at a time, "
            f"{measured.lanes / measured.step:,.1f} updates/s"
        )
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    yield f"In all {flops:.3g} FLOPs, about {duration(seconds)} on {device}, compilation included (measured just now)"


def _check_workers(arguments: argparse.Namespace) -> None:
    """Raises UserError where options of who trains are wrong."""
    for option in ("lanes", "workers"):
        if (number := getattr(arguments, option)) is not None and number < 1:
            raise UserError(f"--{option}={number} must be at least 1")
    for option, backend in (("sbatch", "slurm"), ("resources", "ray")):
        if getattr(arguments, option) is not None and arguments.backend != backend:
            raise UserError(f"--{option} is for --backend={backend}, not for {arguments.backend}")


def trainer(arguments: argparse.Namespace) -> Trainer:
    """Who trains: this process, or workers that it starts."""
    _check_workers(arguments)
    if arguments.backend == "local" and arguments.workers is None:
        start_devices(arguments)
        return lambda root, points, lanes: train_points(arguments, root, points, lanes, give_up=True)
    if arguments.distributed or any(x is not None for x in (arguments.coordinator, arguments.processes)):
        raise UserError("--workers start by themselves, each for runs of its own; leave out --distributed and the like")
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # accelerators are the workers'
    return functools.partial(_train_by_workers, arguments)


def _train_by_workers(arguments: argparse.Namespace, root: Path, points: Sequence[Point], lanes: int | None) -> None:
    store, out, caught = Store(root), console(), list[int]()
    tell = functools.partial(out.print, highlight=False, markup=False, soft_wrap=True)
    store.open_for(points)
    ids = {p.id for p in points}
    if ids <= store.ids():
        tell(f"{root}: all {len(points)} runs are there already, nothing to train.")
        return
    backend = _backend(arguments, root, points, lanes)
    workers = arguments.workers or 1
    tell(f"{len(ids - store.ids())} runs for {workers} workers ({arguments.backend}).")
    try:
        with caught_signals(out, caught), WorkersProgress(out, Watch(store, ids), root.name) as progress:
            supervise(backend, store, points, workers, stop=lambda: bool(caught), show=progress.show)
    except (Stopped, KeyboardInterrupt) as e:
        raise interrupted(store, points, caught, isinstance(e, Stopped)) from None


def _backend(arguments: argparse.Namespace, root: Path, points: Sequence[Point], lanes: int | None) -> Backend:
    words = [str(root.absolute()), f"--grid={grid_name(points)}"]
    words += [f"--lanes={lanes}"] if lanes else []
    words += ["--keep"] if arguments.keep else []
    words += ["--tensorboard"] if arguments.tensorboard else []
    words += [f"--wandb={arguments.wandb}"] if arguments.wandb else []
    command, logs = [sys.executable, "-m", "cdl.cli", "worker", *words], root.absolute() / "logs"
    if arguments.backend == "slurm":
        this = hashlib.sha256(" ".join(words[:2]).encode()).hexdigest()[:8]  # folder and grid
        return Slurm(command, arguments.sbatch or "", logs, f"cdl-{root.name}-{this}")
    if arguments.backend == "ray":
        return Ray(words, parse_resources(arguments.resources) if arguments.resources else None, logs)
    return Local(command, shares(arguments.workers or 1), logs)


def _grid(arguments: argparse.Namespace) -> list[Point]:
    config, grid = configs.load(arguments.config)
    if grid is None:
        raise UserError(f"--config={arguments.config!r} has no sweep(); use cdl train, or add one as configs/demo.py")
    if arguments.check and jax.process_count() > 1:
        raise UserError("--check is for one process; train the predicted horizon with cdl train instead")
    changes = configs.parse_assignments(arguments.changes)
    for field in changes:
        if any(field in c for c in grid):
            raise UserError(f"{field} is an axis of the sweep; change sweep() in {arguments.config}, or use cdl train")
    return points_of(config, [changes | c for c in grid])


def worker(arguments: argparse.Namespace) -> None:
    """`cdl worker`."""
    faulthandler.enable()  # where it crashes goes into its log, and from there into what is said of the run
    if arguments.cores:
        cores = {int(core) for core in arguments.cores.split(",")}
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        arguments.cpus = len(cores)
    gone = threading.Event()
    if arguments.tied:
        threading.Thread(target=_wait_for_end, args=(gone,), daemon=True).start()
    start_devices(arguments)
    store = Store(arguments.folder)
    grids = store.grids(arguments.grid)
    if not grids:
        raise UserError(f"{arguments.folder} holds no sweep; start one with cdl sweep --out={arguments.folder}")
    for grid in grids:
        points = points_in(grid)
        check_files(points)
        lanes = arguments.lanes
        if lanes is None and arguments.cpus and jax.default_backend() == "cpu":
            lanes = min(arguments.cpus, shape_on(points[0].config, jax.device_count())["run"])
        about = {"job": arguments.job} if arguments.job else {}
        train_points(arguments, store.root, points, lanes, give_up=True, wait=False, about=about, stop=gone.is_set)


def _wait_for_end(gone: threading.Event) -> None:
    """Until the process that started this one is gone, whatever became of it."""
    while os.read(0, 1):  # not by `sys.stdin`, whose lock this thread would hold when the interpreter ends
        pass
    gone.set()
