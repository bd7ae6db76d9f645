"""What runs leave for other tools: read back by TensorBoard itself, and by a stand-in for W&B."""

import gzip
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from cdl import cli, cli_train
from cdl.config import base, change, flatten
from cdl.errors import UserError
from cdl.machine import processor
from cdl.metrics import MOST_STEPS, Metrics, Profile, ScalarWriter, tensorboard_writers, wandb_writers
from cdl.sweep.grid import Point
from cdl.train.flops import StepCost
from cdl.train.loop import LaneStatus, Run
from cdl.train.step import Evaluation

COST = StepCost("tokens", amount=1000, flops=600, peak=100_000.0)


def point_of(T: int) -> Point:
    return Point(flatten(change(base(), {"T": T})), "f")


def curve(T: int) -> dict[str, np.ndarray]:
    """Numbers of each update, all different, and exact in float32."""
    k = np.arange(1, T + 1)
    return {"train/loss": k / 8, "train/grad_norm": k / 4 + 1000, "train/eta": k / 2}


def blocks(point: Point, first: int, last: int, size: int, evaluate: tuple[int, ...] = ()) -> list[LaneStatus]:
    """The run's statuses, from one step to another, in blocks that end at evaluations."""
    T = point.config.T
    numbers, made = curve(T), []
    run = Run(point.id, 0, numbers["train/eta"], (T,), iter)
    while first < last:
        step = min(first + size, last, *(e for e in evaluate if e > first))
        rows = slice(first, step)
        evaluation: Any = Evaluation(step + 0.5, step / 1024) if step in evaluate else None  # type: ignore[arg-type]
        made.append(
            LaneStatus(
                run, first, step, *(numbers[f"train/{n}"][rows] for n in ("eta", "loss", "grad_norm")), evaluation, 0.0
            )
        )
        first = step
    return made


class Memory:
    """A writer that keeps what it gets, and fails once it has so much."""

    def __init__(self, most: int = 10**9):
        self.scalars: dict[int, dict[str, float]] = {}
        self.most, self.last = most, 0
        self.done: bool | None = None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if len(self.scalars) >= self.most:
            raise OSError(28, "No space left on device")
        assert step > self.last
        self.last = step
        self.scalars[step] = dict(scalars)

    def flush(self) -> None:
        pass

    def close(self, done: bool) -> None:
        self.done = done


def written(T: int, size: int, evaluate: tuple[int, ...] = ()) -> dict[int, dict[str, float]]:
    """What a run of T steps writes, reported in blocks of a size, on a clock that stands."""
    point, memory = point_of(T), Memory()
    with Metrics([lambda *_: memory], pytest.fail, clock=lambda: 0.0) as metrics:
        metrics.start([point], 0, 1, {point.id: COST})
        for block in blocks(point, 0, T, size, evaluate):
            metrics.block([block])
        metrics.finished(point, {})
    assert memory.done
    return memory.scalars


def test_every_step_of_a_run_is_written() -> None:
    numbers = curve(50)
    seen = written(50, 7, evaluate=(20, 50))
    assert list(seen) == list(range(1, 51))
    for k, scalars in seen.items():
        expected = {name: values[k - 1] for name, values in numbers.items()}
        if k in (20, 50):
            expected |= {"eval/loss": k + 0.5, "eval/accuracy": k / 1024}
        assert scalars == expected


def test_long_runs_are_thinned_by_their_steps_alone() -> None:
    T = 3 * MOST_STEPS - 1
    seen = written(T, 64, evaluate=(1000, 20_000))
    assert MOST_STEPS <= len(seen) <= MOST_STEPS + 4
    assert {1, 1000, 20_000, T} <= seen.keys()
    assert seen == written(T, 1000, evaluate=(1000, 20_000))


def test_speed_is_written_now_and_then() -> None:
    point, memory, now = point_of(1000), Memory(), 0.0
    metrics = Metrics([lambda *_: memory], pytest.fail, clock=lambda: now)
    metrics.start([point], 0, 1, {point.id: COST})
    for i, block in enumerate(blocks(point, 0, 1000, 10)):
        now = i / 2
        metrics.block([block._replace(waited=i / 8)])
    speeds = {k: s for k, s in memory.scalars.items() if "speed/mfu" in s}
    assert list(speeds) == [210, 410, 610, 810]
    for scalars in speeds.values():
        assert scalars["speed/tokens_per_s"] == pytest.approx(20_000)
        assert scalars["speed/mfu"] == pytest.approx(20 * 600 / 100_000)
        assert scalars["speed/waited"] == pytest.approx(0.25)


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every tag, as TensorBoard loads them."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.util.tensor_util import make_ndarray

    events = EventMultiplexer(tensor_size_guidance={"scalars": 0}).AddRunsFromDirectory(str(folder)).Reload()
    (run,) = events.Runs()
    tags = events.PluginRunToTagToContent("scalars")[run]
    return {tag: [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(run, tag)] for tag in tags}


def into_tensorboard(root: Path, point: Point, seen: list[LaneStatus], finish: bool) -> None:
    """Write blocks; without `finish` as a process does that is killed then: nothing is closed."""
    metrics = Metrics([tensorboard_writers(root)], pytest.fail, clock=lambda: 0.0)
    metrics.start([point], 0, 1, {point.id: COST})
    for block in seen:
        metrics.block([block])
    if finish:
        metrics.finished(point, {})
    KILLED.append(metrics)  # files of what was killed stay open, so that nothing is written at the end


KILLED: list[Metrics] = []


@pytest.fixture
def killed() -> Any:
    yield
    for metrics in KILLED:
        metrics.__exit__(None, None, None)
    KILLED.clear()


@pytest.mark.usefixtures("killed")
def test_tensorboard_has_every_step_once_however_often_a_run_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    T, evaluate = 200, (40, 80, 120, 160, 200)
    point = point_of(T)
    at = (0, 90), (0, 130), (80, 140), (120, 125), (120, 200)  # from a checkpoint, to where it was killed
    for first, last in at:
        seen = blocks(point, first, last, 7, evaluate)
        if last < T:  # another truth, that must not be left
            seen = [s._replace(loss=s.loss + (np.arange(s.first, s.step) >= 120) * 99) for s in seen]
        into_tensorboard(tmp_path, point, seen, finish=last == T)
        assert scalars_of(tmp_path)["train/loss"][-1][0] == last  # it is there when it is killed
    found = scalars_of(tmp_path)
    for name, values in curve(T).items():
        assert found[name] == list(zip(range(1, T + 1), values.tolist(), strict=True))
    assert found["eval/loss"] == [(e, e + 0.5) for e in evaluate]
    assert found["eval/accuracy"] == [(e, e / 1024) for e in evaluate]
    assert len(list((tmp_path / "tensorboard" / point.id).iterdir())) == len(at)


@pytest.mark.usefixtures("killed")
def test_tensorboard_knows_config_versions_and_devices(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    point = point_of(10)
    into_tensorboard(tmp_path, point, blocks(point, 0, 10, 5), finish=True)
    events = EventAccumulator(str(tmp_path / "tensorboard" / point.id)).Reload()
    text = make_ndarray(events.Tensors("config")[0].tensor_proto).item().decode()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["T"].number_value == 10
    assert hparams["optimizer.name"].string_value == "muon_nsgd"
    assert point.flat.keys() <= hparams.keys()
    assert f"| versions.jax | {jax.__version__} |" in text
    assert f"| device | {processor()} |" in text
    assert "| data.fingerprint | f |" in text


@pytest.mark.usefixtures("killed")
def test_our_own_logs_are_read_by_cdl(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    import cdl

    point = point_of(30)
    into_tensorboard(tmp_path, point, blocks(point, 0, 30, 5, (10, 20, 30)), finish=True)
    table = cdl.read_runs(str(tmp_path / "tensorboard")).dropna(subset="loss")
    assert table["step"].tolist() == [10, 20, 30]
    assert table["loss"].tolist() == [10.5, 20.5, 30.5]
    assert table["eta"].tolist() == [5.0, 10.0, 15.0]


def test_a_writer_that_fails_is_said_once_and_left_out() -> None:
    point, good, bad, said = point_of(50), Memory(), Memory(most=20), []

    def cannot(*_: Any) -> ScalarWriter:
        raise ConnectionError("nobody\nthere")

    with Metrics([cannot, lambda *_: bad, lambda *_: good], said.append) as metrics:
        metrics.start([point], 0, 1, {point.id: COST})
        for block in blocks(point, 0, 50, 5):
            metrics.block([block])
        metrics.finished(point, {})
    assert [len(m.scalars) for m in (bad, good)] == [20, 50]
    assert len(said) == 2
    assert said[0].startswith("Warning: ")
    assert said[0].endswith("nobody there")
    assert said[1].endswith("No space left on device")


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    point, said = point_of(10), []
    with Metrics([tensorboard_writers(tmp_path)], said.append) as metrics:
        metrics.start([point], 0, 1, {point.id: COST})
        for block in blocks(point, 0, 10, 5):
            metrics.block([block])
    assert len(said) == 1
    assert "Not a directory" in said[0]


def test_what_is_still_in_flight_of_a_diverged_run_opens_nothing() -> None:
    point, opened = point_of(10), []
    with Metrics([lambda *a: opened.append(Memory()) or opened[-1]], pytest.fail) as metrics:  # type: ignore[func-returns-value]
        metrics.start([point], 0, 1, {point.id: COST})
        first, second = blocks(point, 0, 10, 5)
        metrics.block([first])
        metrics.finished(point, {})
        metrics.block([second])
    assert len(opened) == 1
    assert max(opened[0].scalars) == 5


class FakeWandB:
    """`wandb`, as far as it is used: one run on the server, which knows its last step."""

    def __init__(self) -> None:
        self.history: dict[int, dict[str, float]] = {}
        self.inits: list[dict[str, Any]] = []
        self.exits: list[int] = []
        self.defined: set[str] = set()

    def init(self, **arguments: Any) -> Any:
        self.inits.append(arguments)
        assert Path(arguments["dir"]).is_dir()
        return SimpleNamespace(
            step=max(self.history, default=-1) + 1,
            define_metric=lambda name, summary: self.defined.add(name),
            log=self.log,
            finish=lambda exit_code: self.exits.append(exit_code),
        )

    def log(self, data: Mapping[str, float], step: int) -> None:
        assert step > max(self.history, default=-1), "W&B drops this, with a warning"
        self.history[step] = dict(data)


def test_wandb_gets_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, point = FakeWandB(), point_of(100)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first, last in ((0, 70), (40, 100)):
        with Metrics([wandb_writers("lab", tmp_path / "w")], pytest.fail, clock=lambda: 0.0) as metrics:
            metrics.start([point], 0, 1, {point.id: COST})
            for block in blocks(point, first, last, 9, (50, 100)):
                metrics.block([block])
            if last == 100:
                metrics.finished(point, {})
    assert list(fake.history) == list(range(1, 101))
    assert fake.history[50]["eval/loss"] == 50.5
    assert fake.history[99] == {name: values[98] for name, values in curve(100).items()}
    for arguments in fake.inits:
        assert (arguments["project"], arguments["id"], arguments["resume"]) == ("lab", point.id, "allow")
        assert arguments["reinit"] == "create_new"  # beside the runs of other lanes
        assert arguments["config"]["optimizer.name"] == "muon_nsgd"
        assert arguments["config"]["versions.jax"] == jax.__version__
    assert fake.exits == [1, 0]
    assert fake.defined == {"eval/loss", "eval/accuracy"}


def test_without_the_package_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(UserError, match="--wandb needs the package wandb; pip install wandb"):
        wandb_writers("lab", tmp_path)
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard; pip install tensorboard"):
        tensorboard_writers(tmp_path)


@pytest.mark.parametrize("steps", [None, 6])
def test_a_profile_is_of_the_steps_asked_for(tmp_path: Path, steps: int | None) -> None:
    point, said = point_of(100), []

    @jax.jit
    def profiled_program(x: jax.Array) -> jax.Array:
        return x @ x

    traced = []
    with Profile(tmp_path / "profile", steps, said.append) as profile:
        profile.start([point], 0, 1, {point.id: COST})
        for block in blocks(point, 0, 60, 4):
            profiled_program(np.ones((8, 8), np.float32)).block_until_ready()
            traced.append(profile._tracing)
            profile.block([block])
    first = traced.index(True)
    assert first == 2  # what was under way before
    assert sum(traced) == (8 if steps is None else 2)
    assert said[0].startswith(f"Trace of {4 * sum(traced)} steps: {tmp_path / 'profile'}; ")
    assert len(said) == 1
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    names = {e.get("name", "") for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("profiled_program" in name for name in names)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_too_short_for_a_profile_says_so(tmp_path: Path) -> None:
    point, said = point_of(4), []
    with Profile(tmp_path, None, said.append) as profile:
        profile.block(blocks(point, 0, 4, 4))
    assert len(said) == 1
    assert said[0].startswith("No trace: ")
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_early_leaves_its_trace(tmp_path: Path) -> None:
    point, said = point_of(16), []
    with Profile(tmp_path, None, said.append) as profile:
        for block in blocks(point, 0, 16, 4):
            profile.block([block])
    assert said[0].startswith("Trace of 8 steps")
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_values_of_options_are_optional_and_take_no_change_of_the_config() -> None:
    words = ["train", "--config=c.py", "--wandb", "T=20", "--profile", "seed=1", "--tensorboard"]
    arguments = cli._parser().parse_args(cli._with_values(words[:4]))
    assert (arguments.wandb, arguments.profile, arguments.changes) == ("cdl", None, ["T=20"])
    arguments, rest = cli._parser().parse_known_args(cli._with_values(words))
    assert (arguments.wandb, arguments.profile, arguments.changes + rest) == ("cdl", -1, ["T=20", "seed=1"])
    arguments = cli._parser().parse_args(["train", "--config=c.py", "--wandb=lab", "--profile=20"])
    assert (arguments.wandb, arguments.profile, arguments.tensorboard) == ("lab", 20, False)


@pytest.fixture
def cache_of_jax(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """No cache of compiled programs is set, and the user's cache folder is a new one."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_per_kind_of_cpu(
    cache_of_jax: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for cpu in ("vendor_id: AuthenticAMD avx2", "vendor_id: AuthenticAMD avx512"):
        monkeypatch.setattr(cli_train, "_cpu", lambda cpu=cpu: cpu)
        jax.config.update("jax_compilation_cache_dir", None)
        cli_train._keep_programs()
        folders.append(Path(cache_of_jax()))
        assert folders[-1].parent == tmp_path / "cache" / "cdl" / "xla"
        assert folders[-1].is_dir()
    assert folders[0] != folders[1]
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    cli_train._keep_programs()
    assert cache_of_jax() == "/elsewhere"


def test_no_programs_are_kept_where_that_is_noisy_or_impossible(
    cache_of_jax: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_train, "_cpu", lambda: "vendor_id: GenuineIntel")
    cli_train._keep_programs()
    assert cache_of_jax() is None
    monkeypatch.setattr(cli_train, "_cpu", lambda: "vendor_id: AuthenticAMD")
    (tmp_path / "cache").write_text("a file")
    cli_train._keep_programs()
    assert cache_of_jax() is None
