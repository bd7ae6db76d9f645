"""How fast training is: against PyTorch, Muon-NSGD against AdamW, and from start to first step.

    python experiments/benchmarks/train.py [--device=cpu|gpu] [--size=SIZE] [--seconds=10] [--rounds=3] [--json=FILE]

CPU: GPT-2 of 11M parameters on bytes, batch 8 x 256, float32, AdamW, all cores; PyTorch is eager, as most use it there.
GPU: GPT-2 124M, sequence 1024, bfloat16, AdamW; PyTorch is compiled, in autocast, with its fused AdamW. Both are given
the largest batch, of 32 rows or fewer, that fits both. The model of PyTorch is `GPT2LMHeadModel` of transformers with
attention by `scaled_dot_product_attention`, without dropout; it has our weights, and has to give our loss.

Each measurement has a process of its own; they take turns, so ratios within one output compare like with like. A part
that cannot be run (no PyTorch, no memory) is left out and says so.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cdl.machine import processor

VOCABULARY = {"cpu": 256, "gpu": 50_304}  # GPT-2's 50,257 in whole tiles, as nanoGPT has it
SEQUENCE = {"cpu": 256, "gpu": 1024}
SIZE = {"cpu": "11M", "gpu": "124M"}
ROWS = {"cpu": (8,), "gpu": (32, 16, 8)}
TOKENS = 2**19  # of a batch in which Muon-NSGD is compared with AdamW
TIMES = "ms: median (lowest to highest round)"
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of the same weights and tokens
BUSY = 0.25  # load of a core by others from which ratios mean nothing
BLOCK_SECONDS = 0.25  # of one dispatch, as in `cdl.train.loop`
COMMAND = ["train", "--config=configs/demo.py", "T=20"]


class Shape(NamedTuple):
    """What is trained, alike on both sides. rows: of a microbatch."""

    device: str
    size: str
    rows: int
    sequence: int
    vocabulary: int
    dtype: str


class Failed(Exception):
    """A part that could not be run; the text says why, in one line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), help="the GPU where there is one")
    parser.add_argument("--size", help="of the model, a name of cdl.models.gpt2.SIZES")
    parser.add_argument("--sequence", type=int, help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a batch of Muon-NSGD and AdamW")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, help="3, and 2 on a GPU, where each process compiles for long")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing more is begun")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        name, *values = json.loads(arguments.part)
        print(json.dumps(globals()[name](*values)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = _all(arguments, Parts(Path(folder), 60 * arguments.minutes))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


class Parts:
    """Runs parts in processes of their own, with a compilation cache that they share, until time is up."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self._end = folder, time.monotonic() + seconds

    def __call__(self, name: str, *values: Any, cache: str = "cache", device: str = "") -> Any:
        left = self._end - time.monotonic()
        if left <= 0:
            raise Failed("no time left; give --minutes")
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
        }
        if device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, f"--part={json.dumps([name, *values])}"]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            raise Failed("stopped at the time limit; give --minutes") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise Failed(said[-1][:300])
        return json.loads(done.stdout.splitlines()[-1])


def _all(arguments: argparse.Namespace, part: Parts) -> dict[str, Any]:
    device = arguments.device or part("default_device")
    arguments.rounds = arguments.rounds or (3 if device == "cpu" else 2)
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    results: dict[str, Any] = {"machine": part("machine", device=device), "load": load}
    print(f"{results['machine']}; load {load:.1f} at the start", flush=True)
    if load > BUSY * cores:
        print(
            f"WARNING: others use these {cores} cores. PyTorch's threads wait for each other by spinning and suffer "
            "far more from that than cdl: do not quote the ratios below.",
            flush=True,
        )
    shape = Shape(
        device,
        arguments.size or SIZE[device],
        ROWS[device][0],
        arguments.sequence or SEQUENCE[device],
        VOCABULARY[device],
        "float32" if device == "cpu" else "bfloat16",
    )
    sections = [_against_pytorch, _start]
    if device == "gpu" or arguments.tokens != TOKENS:
        sections.insert(1, _optimizers)
    for section in sections:
        try:
            results[section.__name__.strip("_")] = section(arguments, part, shape)
        except Failed as e:
            print(f"\nleft out: {e}", flush=True)
    return results


def _against_pytorch(arguments: argparse.Namespace, part: Parts, shape: Shape) -> dict[str, Any]:
    print(f"\nGPT-2 {shape.size}, sequence {shape.sequence}, {shape.dtype}, AdamW\n", flush=True)
    theirs = "PyTorch, eager" if shape.device == "cpu" else "PyTorch, compiled"
    first: dict[str, Any] = {}
    weights = missing = ""
    for rows in ROWS[shape.device]:
        shape, missing, last = shape._replace(rows=rows), "", rows == ROWS[shape.device][-1]
        weights = str(part.folder / f"weights-{rows}")
        try:
            first = part("ours", shape, "adamw", rows, 0.0, weights, device=shape.device)
        except Failed as e:
            if last or "memory" not in str(e).lower():
                raise
            print(f"{rows} rows: cdl: {e}", flush=True)
            continue
        try:
            _check_same(first, part("pytorch", shape, 0.0, weights, device=shape.device), shape.dtype)
        except Failed as e:
            missing = str(e)
            print(f"{rows} rows: {theirs}: {e}", flush=True)
            if "memory" in missing.lower() and not last:
                continue
        break
    calls: dict[str, Callable[[], Any]] = {
        "cdl": lambda: part("ours", shape, "adamw", shape.rows, arguments.seconds, "", device=shape.device)
    }
    if not missing:
        calls[theirs] = lambda: part("pytorch", shape, arguments.seconds, weights, device=shape.device)
    measured = _in_turns(calls, arguments.rounds)
    tokens = shape.rows * shape.sequence
    lines = [[f"batch {shape.rows} x {shape.sequence}", "tokens/s", "MFU", TIMES, "step time"]]
    base = _median(measured[theirs]) if theirs in measured else None
    for name, rounds in measured.items():
        seconds = _median(rounds)
        used = f"{first['flops'] / seconds / first['peak']:.1%}" if first["peak"] else "-"
        ratio = f"x {seconds / base:.2f}" if base else "-"
        lines.append([name, f"{tokens / seconds:,.0f}", used, _spread(rounds), ratio])
    _table(lines)
    return {"shape": shape._asdict(), "first": first, "missing": missing, "rounds": measured}


def _check_same(ours: dict[str, Any], theirs: dict[str, Any], dtype: str) -> None:
    difference = abs(ours["first_loss"] / theirs["first_loss"] - 1)
    print(
        f"parameters {ours['n_params']:,} and {theirs['n_params']:,}; first loss {ours['first_loss']:.5f} and "
        f"{theirs['first_loss']:.5f} (cdl and PyTorch {theirs['version']}, attention {theirs['attention']})\n",
        flush=True,
    )
    if ours["n_params"] != theirs["n_params"] or difference > LOSS_TOLERANCE[dtype]:
        raise Failed("cdl and PyTorch do not compute the same model")


def _optimizers(arguments: argparse.Namespace, part: Parts, shape: Shape) -> dict[str, Any]:
    batch = max(1, arguments.tokens // shape.sequence)
    rows = min(shape.rows, batch)
    names = {"AdamW": "adamw", "Muon-NSGD": "muon_nsgd"}
    print(f"\nGPT-2 {shape.size}, {batch * shape.sequence:,} tokens a step, {batch // rows} microbatches\n", flush=True)
    shape = shape._replace(rows=rows)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda optimizer=optimizer: part(
            "ours", shape, optimizer, batch, arguments.seconds, "", device=shape.device
        )
        for name, optimizer in names.items()
    }
    measured = _in_turns(calls, arguments.rounds)
    lines = [["", TIMES, "step time"]]
    for name, rounds in measured.items():
        ratio = f"x {_median(rounds) / _median(measured['AdamW']):.3f}" if "AdamW" in measured else "-"
        lines.append([name, _spread(rounds), ratio])
    _table(lines)
    return measured


def _start(arguments: argparse.Namespace, part: Parts, shape: Shape) -> dict[str, Any]:
    print(f"\nFrom start to first step: cdl {' '.join(COMMAND)}\n", flush=True)
    rounds = itertools.count()
    here = Path()  # of this round: cold is the first to use its cache, warm the second

    def cold() -> Any:
        nonlocal here
        here = part.folder / f"start-{next(rounds)}"
        return start("cold")

    def start(name: str) -> Any:
        return part("first_step", time.time(), str(here / name), cache=str(here / "cache"), device=shape.device)

    measured = _in_turns({"cold": cold, "warm": lambda: start("warm")}, arguments.rounds)
    _table([["compilation cache", TIMES], *([name, _spread(times)] for name, times in measured.items())])
    return measured


def _in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each gave in each round; one that fails is left out from then on."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
    left = dict(calls)
    for _ in range(rounds):
        for name, call in list(left.items()):
            try:
                found[name].append(call())
            except Failed as e:
                print(f"{name}: after {len(found[name])} rounds: {e}", flush=True)
                del left[name]
    if not any(found.values()):
        raise Failed("nothing was measured")
    return {name: rounds for name, rounds in found.items() if rounds}


def _median(rounds: list[dict[str, Any]]) -> float:
    return statistics.median(r["seconds"] for r in rounds)


def _spread(rounds: list[dict[str, Any]]) -> str:
    ms = [1e3 * r["seconds"] for r in rounds]
    return f"{statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})"


def _table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(f"{x:<{w}}" if not i else f"{x:>{w}}" for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if not i else ":") for i, w in enumerate(widths)) + "|"
    print("\n".join([lines[0], rule, *lines[1:]]), flush=True)


# --- Parts, each in a process of its own ----------------------------------------------------------------------------


def default_device() -> str:
    import jax

    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def machine() -> str:
    from importlib.metadata import PackageNotFoundError, version

    import jax

    versions = []
    for name in ("jax", "flax", "optax", "torch", "transformers"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{jax.devices()[0].device_kind}; {processor()}; {', '.join(versions)}"


def _tokens(shape: Shape, rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape.vocabulary, (rows, shape.sequence + 1), np.uint16)


def ours(values: list[Any], optimizer: str, batch: int, seconds: float, save: str) -> dict[str, Any]:
    """Seconds a step through `Program`, as `cdl train` has it: blocks, the next one sent before the last is read.

    Args:
      values: of a `Shape`. optimizer: its name. batch: rows of a step, in microbatches of ``shape.rows``.
      seconds: of the measurement; 0 for the first loss alone. save: a folder for the initial weights; "" for none.
    """
    from cdl.sweep.layout import layout, use_cpu_cores
    from cdl.sweep.programs import points_of, program_for

    use_cpu_cores()
    import jax

    from cdl import config as configs
    from cdl.compute import Compute
    from cdl.models import build as models
    from cdl.models import gpt2, pretrained
    from cdl.train.flops import peak_flops, step_flops

    shape = Shape(*values)
    c = configs.base()
    section = gpt2.arguments(shape.size, shape.vocabulary, shape.sequence, shape.dtype)
    c.model = configs.section("model", "gpt2", **section)
    c.optimizer = configs.section("optimizer", optimizer)
    c.data.batch_size, c.data.seq_len = batch, shape.sequence
    c.compute.microbatches = batch // shape.rows
    c.eval.size = batch * shape.sequence  # one batch; nothing is evaluated
    (point,) = points_of(c, [{}])
    program = program_for(point, layout(c, 1))
    R, K = program.lanes, program.block
    batch_RxK = np.broadcast_to(_tokens(shape, batch), (R, K, batch, shape.sequence + 1))
    eta_RxK = np.full((R, K), 1e-4)

    def steps(n: int) -> Any:
        return program.train(batch_RxK, eta_RxK, [n] + [0] * (program.rows - 1)).loss

    program.fill({0: c.seed})
    if save:
        params = jax.tree.map(lambda x: np.asarray(x)[0], program.lane(0).params)
        pretrained.save(c.model.to_dict(), params, {}, save)
    plain = models.build(c.model.to_dict(), Compute(attention="xla"))
    result = {
        "first_loss": float(np.asarray(steps(1))[0, 0]),
        "n_params": program.n_params,
        "flops": step_flops(plain, jax.ShapeDtypeStruct((batch, shape.sequence + 1), np.int32)),
        "peak": peak_flops(program.mesh.devices.flat[0].device_kind, shape.dtype),
    }
    if not seconds:
        return result
    began = time.perf_counter()
    steps(1).block_until_ready()
    n = int(min(max(1, BLOCK_SECONDS / (time.perf_counter() - began)), K))

    def blocks() -> Iterator[None]:
        last = steps(n)
        while True:
            now = steps(n)
            last.block_until_ready()
            last = now
            yield

    return result | {"seconds": _timed(blocks(), seconds) / n}


def pytorch(values: list[Any], seconds: float, weights: str) -> dict[str, Any]:
    """Seconds a step of PyTorch with the weights in a folder; see `ours`."""
    try:
        import torch  # pyrefly: ignore[missing-import]
        import torch.nn.functional as F  # pyrefly: ignore[missing-import]
        import transformers  # pyrefly: ignore[missing-import]
    except ImportError as e:
        raise SystemExit(f"{e}; install the extra of the tests") from e

    shape = Shape(*values)
    device = "cuda" if shape.device == "gpu" and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(weights, **dropout)
    model.to(device).train()
    model.config.use_cache = False  # keys and values of all layers are for generation
    fused = {"fused": True} if device == "cuda" else {}  # else PyTorch's choice
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, **fused)
    tokens = torch.from_numpy(_tokens(shape, shape.rows).astype(np.int64)).to(device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")

    def loss_of(tokens: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=shape.dtype == "bfloat16"):
            logits = model(input_ids=tokens[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    forward = torch.compile(loss_of) if shape.device == "gpu" else loss_of

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(tokens)
        loss.backward()
        optimizer.step()
        return loss.detach()

    result = {
        "first_loss": float(step()),
        "n_params": sum(p.numel() for p in model.parameters()),
        "version": torch.__version__,
        "attention": model.config._attn_implementation,
    }
    if not seconds:
        return result
    step()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    step()
    wait()
    n = int(max(1, BLOCK_SECONDS / (time.perf_counter() - began)))

    def blocks() -> Iterator[None]:
        while True:
            for _ in range(n):
                step()
            wait()
            yield

    return result | {"seconds": _timed(blocks(), seconds) / n}


def _timed(blocks: Iterator[None], seconds: float) -> float:
    """The median time of a block, of as many as fit, three at least; the first is left out."""
    next(blocks)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        began = time.perf_counter()
        next(blocks)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def first_step(began: float, out: str) -> dict[str, float]:
    """Seconds from `began`, by the clock, until `cdl train` has read the numbers of its first step."""
    from contextlib import redirect_stdout

    from cdl import cli
    from cdl.progress import TerminalProgress

    seconds: list[float] = []
    block = TerminalProgress.block

    def noting(self: Any, lanes: Any) -> None:
        seconds.append(time.time() - began)
        block(self, lanes)

    TerminalProgress.block = noting
    with redirect_stdout(sys.stderr):
        code = cli.main([*COMMAND, f"--out={out}"])
    if code:
        raise SystemExit(code)
    return {"seconds": seconds[0]}


if __name__ == "__main__":
    main()
