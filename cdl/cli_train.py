"""The verb of the command line that trains one run, and what it shares with those that train many."""

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from rich.console import Console

from cdl import config as configs
from cdl.compute import Compute
from cdl.errors import Terminated, UserError
from cdl.metrics import Metrics, OpenWriter, Profile, tensorboard_writers, wandb_writers
from cdl.models import build as models
from cdl.models.lora import LoRA
from cdl.progress import TerminalProgress
from cdl.sharding import make_mesh
from cdl.sweep.grid import Point
from cdl.sweep.layout import layout, shape_on, use_cpu_cores
from cdl.sweep.programs import parts_of, points_of
from cdl.sweep.run import run_points
from cdl.sweep.store import Store
from cdl.train.distributed import check_same, check_shared, in_every_process, in_first_process, join_processes
from cdl.train.flops import step_flops
from cdl.train.loop import Stopped
from cdl.train.memory import activation_bytes, step_bytes
from cdl.train.step import state_bytes

_AGAIN_SECONDS = 1.0

__all__ = ["caught_signals", "console", "interrupted", "start_devices", "train", "train_points"]


def train(arguments: argparse.Namespace) -> None:
    """`cdl train`."""
    start_devices(arguments)
    if arguments.devices is not None and not arguments.dry_run:
        raise UserError(f"--devices={arguments.devices} is for --dry-run; for a run set mesh.data, mesh.fsdp and so on")
    config = in_every_process(lambda: configs.load(arguments.config)[0])
    changes = configs.parse_assignments(arguments.changes)
    if arguments.dry_run:
        said = _dry_run(configs.change(config, changes), arguments.devices)
        if jax.process_index() == 0:
            print("\n".join(f"{name:<12}{text}" for name, text in said.items()))
        return
    points = in_every_process(lambda: points_of(config, [changes]))
    id = points[0].id
    out = Path(arguments.out) if arguments.out else Path("runs") / f"train-{id}"
    in_first_process(functools.partial(Store(out).retry, points))
    store = train_points(arguments, out, points, 1, keep=True)
    if jax.process_index() > 0:
        return
    result = store.result(id)
    if result["status"] == "done":
        unit = "images" if points[0].config.data.name == "images" else "tokens"
        right = f", accuracy {result['accuracy']:.1%}" if unit == "images" else ""
        print(
            f"done: held-out loss {result['loss']:.4f}{right}, training loss {result['train_loss']:.4f}, "
            f"{result[f'{unit}_per_s']:,.0f} {unit}/s"
        )
        if store.saved(points[0]):  # not where a sweep had trained it
            print(f"Weights: {store.checkpoints(points[0])}")
    else:
        print(f"diverged: the loss after {result['diverged_at']} updates was not finite; try a smaller eta_ref")
    print(f"Results: {out / id}")


def _dry_run(c: ConfigDict, devices: int | None) -> dict[str, str]:
    """What a run is and takes on so many devices (those here if None), name -> words. Reads no data, allocates nothing.

    Raises:
      UserError: whatever can be said of a bad config without its data.
    """
    if devices is not None and devices < 1:
        raise UserError(f"--devices={devices} must be at least 1")
    model, optimizer = parts_of(c)
    n = devices or jax.device_count()
    sizes = shape_on(c, n)
    lanes, sizes = sizes["run"], sizes | dict(run=1)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    parts = c.compute.microbatches
    rows = c.data.batch_size // (sizes["data"] * sizes["fsdp"] * parts)
    unit = "images" if c.data.name == "images" else f"x {c.data.seq_len} tokens"
    gradients = state_bytes(model._replace(frozen=None), optax.identity(), mesh)  # split as the parameters are
    said = {
        "parameters": f"{model.n_params:,}" + (f", {_trained(model):,} of them trained" if model.frozen else ""),
        "updates": f"T={c.T:,}, {c.optimizer.name}, {c.schedule.name} from a peak rate of {c.eta_ref / c.T**0.5:.4g}",
        "batch": f"{c.data.batch_size} {unit}, {parts} x {rows} on a device",
        "mesh": " ".join(f"{axis}={size}" for axis, size in sizes.items())
        + f", {math.prod(sizes.values())} of {n} devices; a sweep trains {lanes} side by side",
        "memory": f"on a device {_bytes(state_bytes(model, optimizer, mesh))} of parameters and optimizer state, "
        f"{_bytes(gradients)} of gradients",
    }
    if (batch := _batch(c, c.data.batch_size)) is None:
        return said  # the size of images is up to the data
    said["memory"] += f", at most {_bytes(activation_bytes(model, _batch(c, rows)))} of activations"
    plain = models.build(
        c.model.to_dict(), Compute(attention="xla"), LoRA(**c.lora)
    )  # a fused one hides what it computes
    said["FLOPs"] = f"{step_flops(plain, batch):.4g} an update"
    here = jax.devices()
    if devices is None and here[0].platform != "cpu":
        xla = step_bytes(model, optimizer, batch, make_mesh(sizes, here), parts)
        said["XLA"] = f"on a device {_bytes(xla.arguments)} of arguments and {_bytes(xla.temporaries)} besides"
    return said


def _trained(model: models.Model) -> int:
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, 0)[0]))


def _batch(c: ConfigDict, rows: int) -> Any:
    """The shapes of so many rows of a batch, as a model takes them; None where the size of images is up to the data."""
    if c.data.name == "text":
        return jax.ShapeDtypeStruct((rows, c.data.seq_len + 1), jnp.int32)
    if c.data.name == "images":
        size = c.data.image_size or c.model.to_dict().get("image_size")
        if not size:
            return None
        shapes = dict(image=((rows, size, size, 3), jnp.float32), label=((rows,), jnp.int32))
    else:
        S = c.data.seq_len
        shapes = dict(tokens=((rows, S + 1), jnp.int32), weight=((rows, S), jnp.float32))
        if c.data.name == "vqa":
            size = c.data.image_size
            shapes |= dict(image=((rows, c.data.images, size, size, 3), jnp.float32), slot=((rows, S), jnp.int32))
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _bytes(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def start_devices(arguments: argparse.Namespace) -> None:
    """Before JAX is first used: the devices of this process, and the other processes."""
    use_cpu_cores()
    explicit = (arguments.coordinator, arguments.processes, arguments.process)
    if arguments.distributed and any(x is not None for x in explicit):
        raise UserError("--distributed finds the other processes by itself; leave out --coordinator and the like")
    if arguments.distributed or any(x is not None for x in explicit):
        join_processes(*explicit)
    _keep_programs()


def _keep_programs() -> None:
    """Compiled programs are kept in the user's cache folder, unless JAX was told where; where that fails, nowhere."""
    if jax.config.jax_compilation_cache_dir is not None:  # pyrefly: ignore[missing-attribute]
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdl" / "xla"
        if jax.default_backend() == "cpu":
            cpu = _cpu()
            # There XLA rejects what it wrote itself, and says so in pages on stderr (jax issue 38445).
            if "GenuineIntel" in cpu:
                return
            # A program for a CPU holds its machine code, and homes are shared between machines; JAX does not look.
            folder /= f"cpu-{hashlib.sha256(cpu.encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that can be written
        return
    if os.access(folder, os.W_OK):
        warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _cpu() -> str:
    """What kind of CPU this is, and what it can do."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return f"{platform.machine()} {platform.processor()}"
    told = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features")
    first = file.read_text().partition("\n\n")[0].splitlines()
    return "\n".join(line for line in first if line.startswith(told))


def train_points(
    arguments: argparse.Namespace,
    root: Path,
    points: Sequence[Point],
    lanes: int | None,
    *,
    keep: bool = False,
    give_up: bool = False,
    wait: bool = True,
    about: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Store:
    """Train what the folder lacks of these points, in this process; see `cdl.sweep.run.run_points`."""
    keep, path = keep or arguments.keep, arguments.keep
    check_same(json.dumps([[p.id, p.program] for p in points] + [root.name, lanes, keep, path]))  # paths may differ
    for point in points:
        layout(point.config, len(points), lanes)
    store, out = Store(root), console()
    writers: list[OpenWriter] = []

    def open_writers() -> None:
        writers.extend([tensorboard_writers(root)] if arguments.tensorboard else [])
        writers.extend([wandb_writers(arguments.wandb, root)] if arguments.wandb else [])

    in_first_process(open_writers)
    in_first_process(functools.partial(store.open_for, points))
    check_shared(root)
    if {p.id for p in points} <= store.ids():
        many = f"all {len(points)} runs are" if len(points) > 1 else "the run is"
        profile = " or to trace" if arguments.profile else ""
        out.print(
            f"{root}: {many} there already, nothing to train{profile}.", highlight=False, soft_wrap=True, markup=False
        )
    caught: list[int] = []
    try:
        with caught_signals(out, caught), ExitStack() as stack:
            listeners: list[Any] = [stack.enter_context(TerminalProgress(out))]
            if jax.process_index() == 0:
                say = functools.partial(out.print, highlight=False, markup=False, soft_wrap=True)
                listeners += [stack.enter_context(Metrics(writers, say))] if writers else []
                if arguments.profile:
                    steps = arguments.profile if arguments.profile > 0 else None
                    listeners.append(stack.enter_context(Profile(root / "profile", steps, say)))
            run_points(
                points,
                store,
                listeners,
                lanes,
                keep=keep,
                path=path,
                give_up=give_up,
                wait=wait,
                about=about,
                stop=lambda: bool(caught) or stop(),
            )
    except (Stopped, KeyboardInterrupt) as e:
        raise interrupted(store, points, caught, isinstance(e, Stopped)) from None
    return store


def interrupted(store: Store, points: Sequence[Point], caught: Sequence[int], saved: bool) -> KeyboardInterrupt:
    """What a person is told who has interrupted a command. saved: it ended in good order."""
    kept = len({p.id for p in points} & store.ids())
    begun = " and those under way are saved" if saved and any(store.saved(p) for p in points) else ""
    error = Terminated if caught and signal.SIGINT not in caught else KeyboardInterrupt
    return error(f"{kept} of {len(points)} runs are kept{begun}; the same command goes on from there")


@contextmanager
def caught_signals(out: Console, caught: list[int]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP are put into a list; another one, a second later or more, interrupts at once.

    Not sooner: of one Ctrl-C this process and its parent, say `make`, both hear, and the parent may pass it on. A
    terminal that is closed (SIGHUP) does not hurry anybody.
    """
    first = 0.0

    def on_signal(number: int, frame: FrameType | None) -> Any:
        nonlocal first
        if not caught:
            first = time.monotonic()
            caught.append(number)
            out.print("Saving what is under way; once more to leave without.", highlight=False)
        elif number != signal.SIGHUP and time.monotonic() - first > _AGAIN_SECONDS:
            caught.append(number)
            raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in numbers}  # nohup ignores SIGHUP
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def console() -> Console:
    """On stderr; with several processes the first one speaks."""
    return Console(stderr=True, quiet=jax.process_index() > 0, file=sys.stderr)
