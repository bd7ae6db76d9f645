"""How fast and how exact the bounds are: the tables of the README's section on theory.

    python experiments/benchmarks/bounds.py [--device=cpu|gpu|tpu] [--longest=10000000] [--json=FILE]

Times are the best of several calls after a first one that compiles. Ratios compare numbers of the same run. Each
length is measured in a process of its own, for its peak memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cdl.machine import processor

SHAPES = ("constant", "cosine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, gpu or tpu")
    parser.add_argument("--longest", type=int, default=10**7, help="longest schedule for the whole curve")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        name, *values = json.loads(arguments.part)
        print(json.dumps(globals()[name](arguments.device, *values)))
        return

    def part(name: str, *values: Any) -> dict[str, Any]:
        command = [sys.executable, __file__, f"--device={arguments.device}", f"--part={json.dumps([name, *values])}"]
        return json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )

    results: dict[str, Any] = {"machine": part("machine")}
    print(f"{results['machine']['text']}\n\nWhole curve (2.4), tau = 1..T")
    print(f"{'':28s}{'T':>12s}{'seconds':>10s}{'ns/step':>9s}{'derivative':>12s}{'first call':>12s}{'memory':>10s}")
    results["curve"] = []
    for T in [n for n in (10**5, 10**6, 10**7) if n <= arguments.longest]:
        for shape in SHAPES:
            for precision in ("float64", "float32") if arguments.device != "cpu" else ("float64",):
                r = part("curve", shape, T, precision)
                results["curve"].append(r)
                gradient = f"x {r['gradient'] / r['seconds']:.1f}" if r["gradient"] else ""
                print(
                    f"{shape + ', ' + precision:28s}{T:>12,}{r['seconds']:>10.3f}{r['seconds'] / T * 1e9:>9.0f}"
                    f"{gradient:>12s}{r['first']:>10.1f} s{r['GB']:>7.2f} GB",
                    flush=True,
                )
    direct = results["direct"] = part("direct")
    million = [r["seconds"] for r in results["curve"] if r["T"] == 10**6 and r["precision"] == "float64"]
    if million:
        print(
            f"direct summation in numpy, {direct['T']:,} steps: {direct['seconds']:.2f} s; at T = 1,000,000 that is "
            f"{direct['million']:,.0f} s, {direct['million'] / max(million):,.0f} times as long"
        )
    for name, title in (("last", "\nLast iterate, T = 1,000,000"), ("many", "\n1,000 schedules of T = 10,000")):
        print(title)
        results[name] = part(name)
        base = next(iter(results[name].values()))
        for label, seconds in results[name].items():
            print(f"{label:44s}{seconds * 1e3:>10.2f} ms   x {base / seconds:.2f}")
    if arguments.device == "cpu":
        print("\nLargest relative error of the curve against 64-bit mantissas, T = 1,000,000")
        print(f"{'':28s}{'found':>10s}{'own bound':>12s}")
        results["errors"] = part("errors")
        for name, (found, own) in results["errors"].items():
            print(f"{name:28s}{found:>10.1e}{own:>12.1e}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


# --- Parts, each in a process of its own ----------------------------------------------------------------------------


def machine(platform_name: str) -> dict[str, str]:
    import jax

    versions = f"jax {jax.__version__}, numpy {np.__version__}"
    return {"text": f"{device_of(platform_name).device_kind}; {processor()}; {versions}"}


def curve(platform_name: str, shape: str, T: int, precision: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import cdl
    from cdl.theory import bounds

    with jax.enable_x64(True):
        put = lambda x: jax.device_put(np.asarray(x, precision), device_of(platform_name))  # noqa: E731
        eta_T, one = put(cdl.schedule(shape, T)), put(1.0)
        run = lambda: bounds._last_curve(eta_T, one, one)  # noqa: E731
        began = time.perf_counter()
        jax.block_until_ready(run())
        first = time.perf_counter() - began
        seconds = best_of(run)
        memory = peak_memory(device_of(platform_name))
        gradient = 0.0
        if T <= 10**6:
            total = jax.jit(
                jax.grad(lambda eta_T: jnp.where(eta_T > 0, sum(bounds._last_curve(eta_T, one, one)), 0).sum())
            )
            jax.block_until_ready(total(eta_T))
            gradient = best_of(lambda: total(eta_T))
    return dict(shape=shape, T=T, precision=precision, seconds=seconds, first=first, gradient=gradient, GB=memory)


def direct(platform_name: str, T: int = 20_000) -> dict[str, float]:
    """Every tau by one reverse cumulative sum in numpy; the time grows like T²."""
    eta_T = 1 - np.arange(T) / T
    began = time.perf_counter()
    for tau in range(1, T):
        (eta_T[:tau] ** 2 / np.cumsum(eta_T[1 : tau + 1][::-1])[::-1]).sum()
    seconds = time.perf_counter() - began
    return dict(T=T, seconds=seconds, million=seconds * (10**6 / T) ** 2)


def numpy_last(eta_T: np.ndarray, buffers_3xT: np.ndarray) -> float:
    """The fastest numpy that we could write: one cumulative sum of the reversed rates, in arrays that are kept."""
    eta, rest, terms = buffers_3xT
    eta[:] = eta_T[::-1]
    np.cumsum(eta, out=rest)
    np.divide(eta[1:], rest[:-1], out=terms[1:])
    return 0.5 / rest[-1] + 0.5 * (np.dot(terms[1:], eta[1:]) + eta[0])


def last(platform_name: str) -> dict[str, float]:
    import jax

    from cdl.theory import bounds

    eta_T = 1 - np.arange(10**6) / 10**6
    device, buffers = device_of(platform_name), np.empty((3, 10**6))
    calls: dict[str, Callable[[], Any]] = {
        "numpy": lambda: numpy_last(eta_T, buffers),
        "cdl.bound, from and to numpy": lambda: bounds.bound(eta_T, device=device),
    }
    with jax.enable_x64(True):
        for precision in ("float64", "float32"):
            inputs = jax.device_put([np.asarray(x, precision) for x in (eta_T, 1.0, 1.0)], device)
            calls[f"on the device, {precision}"] = lambda inputs=inputs: bounds._last(*inputs)
        return best_in_turn(calls, 60)


def many(platform_name: str) -> dict[str, float]:
    from cdl.theory import bounds

    eta_RxT = np.random.default_rng(0).uniform(0.1, 1, (1000, 10_000))
    device, buffers = device_of(platform_name), np.empty((3, 10_000))
    calls = {
        "Python loop over cdl.bound": lambda: [bounds.bound(eta_T, device=device) for eta_T in eta_RxT],
        "Python loop over numpy": lambda: [numpy_last(eta_T, buffers) for eta_T in eta_RxT],
        "cdl.bound, one call": lambda: bounds.bound(eta_RxT, device=device),
    }
    return best_in_turn(calls, 15)


def best_in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, the best of several rounds in which they take turns: a noisy neighbour meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(best_of(call, 1))
    return {name: min(t) for name, t in times.items()}


def errors(platform_name: str) -> dict[str, tuple[float, float]]:
    import cdl
    from cdl.theory.bounds import bound_curve

    T, rng = 10**6, np.random.default_rng(0)
    k = np.arange(1, T + 1)
    schedules = {
        "constant": np.ones(T),
        "linear": cdl.schedule("linear", T),
        "cosine": cdl.schedule("cosine", T),
        "WSD, warmup": cdl.schedule("wsd", T, warmup=0.02, decay=0.2),
        "cyclic, troughs of 1e-9": cdl.schedule("cyclic", T, final=1e-9),
        "inverse square root": cdl.schedule("inv_sqrt", T),
        "drop by 1e-3": np.where(k <= T // 2, 1, 1e-3),
        "drop by 1e-6": np.where(k <= T // 2, 1, 1e-6),
        "jump up by 1e8": np.where(k <= T // 2, 1e-8, 1),
        "random over ten decades": 10 ** rng.uniform(-10, 0, T),
    }
    taus = np.unique(
        [2, 3, 31, 32, 33, 34, 65, 97, T // 2, T // 2 + 1, T // 2 + 2, T // 2 + 99, T - 1, *rng.integers(2, T, 40)]
    )
    results = {}
    for name, eta_T in schedules.items():
        computed_T, own = bound_curve(eta_T, accuracy=True)
        e = eta_T.astype(np.longdouble)
        found = 0.0
        for tau in taus:
            rest = np.cumsum(e[:tau][::-1])[::-1]
            exact = 1 / (2 * rest[0]) + ((e[: tau - 1] ** 2 / rest[1:]).sum() + e[tau - 1]) / 2
            found = max(found, abs(float(computed_T[tau - 1] / exact - 1)))
        results[name] = (found, own)
    return results


def device_of(platform_name: str) -> Any:
    import jax

    return jax.local_devices(backend=platform_name)[0]


def best_of(call: Callable[[], Any], calls: int = 5) -> float:
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def peak_memory(device: Any) -> float:
    """GB: of the device where it tells, else of this process."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


if __name__ == "__main__":
    main()
