"""What a sweep gains over its runs one after the other, and what its store costs.

    python experiments/benchmarks/sweep.py                    # all that this machine can measure
    python experiments/benchmarks/sweep.py grid --config=configs/demo.py --out=grid.json
    python experiments/benchmarks/sweep.py lanes              # on an accelerator
    python experiments/benchmarks/sweep.py store

grid: wall time of `cdl sweep`, in this process's way and by workers, against `cdl train` of one point after the other,
each with an empty compilation cache of its own. lanes: runs an hour by the number of lanes, for GPT-2 of three sizes,
each number of lanes in a process of its own. store: 10,000 points listed and tabulated, and what one more finished run
costs. Every row is a median, with what it was made of beside it; ratios are within one output.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZES = ("900k", 256, 64), ("11M", 256, 16), ("29M", 512, 8)  # of `cdl.models.gpt2`, context, batch
STORE_POINTS = 10_000
COMPILED = "JAX_PERSISTENT_CACHE"
PART = """
import importlib.util
spec = importlib.util.spec_from_file_location("whole", {config!r})
whole = importlib.util.module_from_spec(spec)
spec.loader.exec_module(whole)
get_config = whole.get_config
sweep = lambda: {points!r}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=("grid", "lanes", "store", []), metavar="PART")
    parser.add_argument("--config", default="configs/demo.py", help="of the grid")
    parser.add_argument("--points", type=int, help="only the first so many of it")
    parser.add_argument("--most", type=int, default=64, help="lanes")
    parser.add_argument("--out", help="JSON file for the numbers")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(lane_rate(*arguments.measure)))
        return
    device = subprocess.run(
        [sys.executable, "-c", "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind, d[0].platform)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    *kind, platform_name = device
    packages = ", ".join(f"{p} {version(p)}" for p in ("jax", "flax", "optax"))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(f"{' '.join(kind)}, {machine}, {packages}")
    parts = arguments.parts or (["store", "grid"] if platform_name == "cpu" else ["lanes", "store"])
    numbers: dict[str, Any] = {"device": kind, "packages": packages}
    if "store" in parts:
        numbers["store"] = store()
    if "grid" in parts:
        numbers["grid"] = grid(arguments.config, arguments.points)
    if "lanes" in parts:
        numbers["lanes"] = lanes(arguments.most)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(numbers, indent=1))


def grid(config: str, most: int | None) -> dict[str, float]:
    """Seconds of each way to run a grid."""
    from cdl import config as configs

    _, points = configs.load(config)
    assert points
    points = points[:most]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.py"
        part.write_text(PART.format(config=str(Path(config).absolute()), points=points))

        def cdl(name: str, *words: str) -> None:
            cache = dict(
                JAX_COMPILATION_CACHE_DIR=f"{folder}/xla-{name}", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
            )
            command = [sys.executable, "-m", "cdl.cli", *words]
            subprocess.run(command, check=True, env=os.environ | cache, capture_output=True)

        def timed(name: str, do: Callable[[], None]) -> None:
            began = time.perf_counter()
            do()
            seconds[name] = time.perf_counter() - began
            base = seconds.get("cdl train, one after the other")
            ratio = f"   x {base / seconds[name]:.2f}" if base else ""
            print(f"{name:<36} {seconds[name]:>8.1f} s for {len(points)} runs{ratio}", flush=True)

        def one_after_the_other() -> None:
            for i, point in enumerate(points):
                changes = [f"{k}={v}" for k, v in point.items()]
                cdl("train", "train", f"--config={part}", f"--out={folder}/train/{i}", *changes)

        timed("cdl train, one after the other", one_after_the_other)
        timed("cdl sweep", lambda: cdl("sweep", "sweep", f"--config={part}", f"--out={folder}/sweep"))
        workers = f"--workers={os.cpu_count()}"
        timed(f"cdl sweep {workers}", lambda: cdl("workers", "sweep", f"--config={part}", f"--out={folder}/w", workers))
    return seconds


def lanes(most: int) -> dict[str, dict[int, float]]:
    """Updates a second by the number of lanes, for each size, until twice the lanes do not fit."""
    rates: dict[str, dict[int, float]] = {}
    for name, context, batch in SIZES:
        rates[name], n = {}, 1
        while n <= most:
            command = [sys.executable, __file__, f"--measure={json.dumps([name, context, batch, n])}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name:>5} {n:>4} lanes: {done.stderr.strip().splitlines()[-1][:150]}")
                break
            measured = json.loads(done.stdout.splitlines()[-1])
            rates[name][n] = n / measured["step"]
            ratio = rates[name][n] / rates[name][1]
            print(
                f"{name:>5} {n:>4} lanes: {rates[name][n]:>10,.1f} updates/s   x {ratio:.2f}   "
                f"{3600 * rates[name][n] / 1000:>10,.1f} runs of 1,000 updates an hour   compiled in "
                f"{measured['compilation']:.0f} s",
                flush=True,
            )
            n *= 2
    return rates


def lane_rate(size: str, context: int, batch: int, lanes: int) -> dict[str, float]:
    """Seconds of a step of so many lanes on the devices here."""
    import cdl.config
    from cdl.models import gpt2
    from cdl.sweep.layout import layout
    from cdl.sweep.probe import probe
    from cdl.sweep.programs import points_of

    c = cdl.config.base()
    c.model = cdl.config.section("model", "gpt2", **gpt2.arguments(size, context=context, dtype="bfloat16"))
    c.data.batch_size, c.data.seq_len = batch, context
    (point,) = points_of(c, [{}])
    measured = probe(point, layout(c, lanes, lanes))
    return {"step": measured.step, "compilation": measured.compilation}


def store() -> dict[str, float]:
    """Seconds of what is done with a store of many points."""
    import numpy as np

    import cdl.config
    from cdl.sweep.claims import Worker
    from cdl.sweep.grid import Point, product
    from cdl.sweep.store import Store

    flat = cdl.config.flatten(cdl.config.base())
    changes = product(eta_ref=np.geomspace(0.1, 10, 100), T=range(100, 100 + STORE_POINTS // 100))
    points = [Point(flat | change, "f") for change in changes]
    curve = {name: np.ones(101) for name in ("step", "eta", "train_loss", "grad_norm", "eval_loss", "eval_accuracy")}
    result = dict(status="done", loss=1.0, train_loss=1.0, eta_peak=0.1, seconds=1.0, versions={"cdl": "0"})
    seconds: dict[str, float] = {}
    folder = Path(tempfile.mkdtemp(dir=os.getcwd(), prefix=".store-"))  # not in memory, as /tmp often is
    try:
        s = Store(folder / "s")
        began = time.perf_counter()
        s.open_for(points)
        seconds["open a grid"] = time.perf_counter() - began
        each = []
        with Worker(s.root) as worker:
            for point in points:
                began = time.perf_counter()
                s.begin(point, worker, {"keep": False})
                s.write(point, curve, result)
                s.release(point)
                each.append(time.perf_counter() - began)
        seconds["claim and publish a run"] = statistics.median(each)
        for name, words in (("cdl ls", ["ls"]), ("cdl status", ["status"]), ("cdl table --csv", ["table"])):
            command = [sys.executable, "-m", "cdl.cli", *words, str(s.root)]
            command += [f"--csv={folder}/t.csv"] if words == ["table"] else []
            times = []
            for _ in range(3):
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times.append(time.perf_counter() - began)
            seconds[name] = statistics.median(times)
        for name, do in (("Store.ids", s.ids), ("Store.table", s.table)):
            times = []
            for _ in range(3):
                began = time.perf_counter()
                do()
                times.append(time.perf_counter() - began)
            seconds[name] = statistics.median(times)
    finally:
        shutil.rmtree(folder)
    for name, value in seconds.items():
        print(f"store of {STORE_POINTS:,} points: {name:<26} {1000 * value:>10,.1f} ms", flush=True)
    return seconds


if __name__ == "__main__":
    main()
