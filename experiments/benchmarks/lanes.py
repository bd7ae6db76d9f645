"""Tokens a second of the demo's model: one run alone, runs side by side on devices of their own, and `vmap`ped on one.

    python experiments/benchmarks/lanes.py [--config=configs/demo.py] [--seconds=10]

Each arrangement is timed in a process of its own, one after the other, twice over, so that ratios within one output
compare like with like. On a CPU the devices are its cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--arrangement", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arrangement:
        print(json.dumps(measure(arguments.config, arguments.seconds, *arguments.arrangement)))
        return
    cores = os.cpu_count() or 1
    arrangements = {
        "one run": (1, 2),
        f"{cores} runs, a device each": (cores, cores),
        f"{cores} runs, vmapped on one device": (cores, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in arrangements}
    for _ in range(2):
        for name, arrangement in arrangements.items():
            command = [sys.executable, __file__, f"--arrangement={json.dumps(arrangement)}"]
            command += [f"--config={arguments.config}", f"--seconds={arguments.seconds}"]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            rates[name].append(result["tokens_per_s"])
    print(f"{result['device']}, {cores} cores, {platform.machine()}, jax {result['jax']}, {arguments.config}")
    base = np.median(rates["one run"])
    for name, values in rates.items():
        spread = ", ".join(f"{v:,.0f}" for v in values)
        print(f"{name:34s} {np.median(values):>10,.0f} tokens/s   x {np.median(values) / base:.2f}   ({spread})")


def measure(config_path: str, seconds: float, busy: int, devices: int) -> dict[str, float | str]:
    """Tokens a second of `busy` runs on `devices` devices, compilation left out."""
    import jax

    jax.config.update("jax_num_cpu_devices", max(2, devices))
    from cdl import config as configs
    from cdl.sharding import make_mesh
    from cdl.sweep.layout import Layout
    from cdl.sweep.programs import points_of, program_for

    config, _ = configs.load(config_path)
    (point,) = points_of(config, [{}])
    lanes = max(busy, devices)
    mesh = make_mesh(dict(run=devices, data=1, fsdp=1, tensor=1), jax.devices())
    program = program_for(point, Layout(mesh, lanes, busy))
    data, K = point.config.data, program.block
    batch_RxK = np.random.default_rng(0).integers(0, 256, (lanes, K, data.batch_size, data.seq_len + 1), np.uint8)
    eta_RxK, steps = np.full((lanes, K), 0.01), [K if row < busy else 0 for row in range(devices)]
    program.fill(dict.fromkeys(range(lanes), 0))
    jax.block_until_ready(program.train(batch_RxK, eta_RxK, steps))
    began, blocks = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        jax.block_until_ready(program.train(batch_RxK, eta_RxK, steps))
        blocks += 1
    elapsed = time.perf_counter() - began
    tokens = blocks * K * busy * data.batch_size * data.seq_len
    return {"tokens_per_s": tokens / elapsed, "device": jax.devices()[0].device_kind, "jax": jax.__version__}


if __name__ == "__main__":
    main()
