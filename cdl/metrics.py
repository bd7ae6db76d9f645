"""What a run leaves for other tools: scalars for TensorBoard and Weights & Biases, traces for profilers.

Scalars stand at numbers of updates. At step k: `train/loss` and `train/grad_norm` of the batch of update k, before it;
`train/eta`, its rate; `eval/loss` and `eval/accuracy` after it. So all that a checkpoint of step k knows stands at
steps up to k, and a run that goes on from there writes what comes after.

A step's numbers are written if it is the first, the last, evaluated, or a multiple of T / 20,000 (rounded up), whatever
was written before; the speed about every ten seconds.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax

from cdl.errors import UserError
from cdl.sweep.grid import Point
from cdl.sweep.run import environment
from cdl.train.flops import Speed, StepCost
from cdl.train.loop import LaneStatus

__all__ = ["Metrics", "Profile", "ScalarWriter", "TensorBoard", "WandB", "tensorboard_writers", "wandb_writers"]

MOST_STEPS = 20_000  # that a run's training numbers are written of, and as many again
SPEED_SECONDS = 10.0
PROFILED_BLOCKS = 8

_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


class ScalarWriter(Protocol):
    """Where the numbers of one run go."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The numbers of a step; steps rise from call to call."""
        ...

    def flush(self) -> None:
        """What was written is safe should this process be killed."""
        ...

    def close(self, done: bool) -> None:
        """No more comes; `done`: the run has ended, and was not interrupted."""
        ...


# (run, step it goes on from, what it is: name -> number or text) -> its writer
OpenWriter = Callable[[Point, int, Mapping[str, Any]], ScalarWriter]


class TensorBoard:
    """One event file of TensorBoard, which continues those that are in the folder.

    Args:
      folder: of one run; made if it is not there.
      first: step that the run goes on from. What earlier files have of later steps does not count any more.
      about: what the run is, name -> number or text.
    """

    def __init__(self, folder: Path, first: int, about: Mapping[str, Any]):
        # No `EventFileWriter`: it would load TensorFlow where that is installed, and reports a full disk late.
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        event: Any = import_module("tensorboard.compat.proto.event_pb2")
        summary: Any = import_module("tensorboard.compat.proto.summary_pb2")
        self._event, self._summary, log = event.Event, summary.Summary, event.SessionLog
        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names.
        before = [int(m[1]) for f in folder.iterdir() if (m := _EVENTS.fullmatch(f.name))]
        number = max([int(time.time()), *(n + 1 for n in before)])
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._records = RecordWriter((folder / name).open("xb"))
        self._add(file_version="brain.Event:2")
        # Also for a run that begins: TensorBoard takes no note of the first START that it meets.
        self._add(step=first + 1 if first else 0, session_log=log(status=log.START))
        self._add(step=first, summary=hparams_pb(dict(about), trial_id=folder.name))
        self._add(step=first, summary=text_pb("config", _markdown(about)))
        self.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(step=step, summary=self._summary(value=values))

    def flush(self) -> None:
        self._records.flush()

    def close(self, done: bool) -> None:
        self._records.close()

    def _add(self, **event: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())


class WandB:
    """One run of Weights & Biases, which continues the one of the same id in the project.

    Args:
      wandb: the package.
      project, id: names of W&B's.
      folder: for W&B's own files.
      about: what the run is.
    """

    def __init__(self, wandb: Any, project: str, id: str, folder: Path, about: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        # create_new: the runs of other lanes go on.
        self._run = wandb.init(
            project=project, id=id, resume="allow", config=dict(about), dir=str(folder), reinit="create_new"
        )
        self._run.define_metric("eval/loss", summary="min,last")
        self._run.define_metric("eval/accuracy", summary="max,last")
        self._next = self._run.step  # steps before it, W&B has, and would warn of each

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        pass  # W&B hands over to a process of its own

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


def tensorboard_writers(root: Path) -> OpenWriter:
    """Opens event files in ``<root>/tensorboard/<id>/``.

    Raises:
      UserError: the package tensorboard is not installed.
    """
    _required("tensorboard", "--tensorboard", "tensorboard.summary.writer.record_writer")
    return lambda point, first, about: TensorBoard(root / "tensorboard" / point.id, first, about)


def wandb_writers(project: str, root: Path) -> OpenWriter:
    """Opens runs of a W&B project, with W&B's files in ``<root>/wandb/``.

    Raises:
      UserError: the package wandb is not installed.
    """
    wandb = _required("wandb", "--wandb", "wandb")
    return lambda point, first, about: WandB(wandb, project, point.id, root, about)


class Metrics:
    """A `cdl.sweep.run.Listener` that writes the numbers of every run. Use as a context manager.

    A writer that fails is said and left out; the run goes on.

    Args:
      opens: where to.
      say: takes one line of text.
      clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self, opens: Sequence[OpenWriter], say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ):
        self._opens, self._say, self._clock = list(opens), say, clock
        self._points: dict[str, Point] = {}
        self._costs: Mapping[str, StepCost] = {}
        self._runs: dict[str, _RunWriter] = {}

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: Any) -> None:
        for run in self._runs.values():
            run.close(done=False)
        self._runs.clear()

    def start(self, todo: Sequence[Point], finished: int, lanes: int, costs: Mapping[str, StepCost]) -> None:
        self._points, self._costs = {p.id: p for p in todo}, costs

    def block(self, lanes: Sequence[LaneStatus]) -> None:
        for lane in lanes:
            id = lane.run.id
            if id not in self._points:
                continue  # it diverged, and more of it was in flight
            if id not in self._runs:
                writers = [self._opened(open, self._points[id], lane.first) for open in self._opens]
                self._runs[id] = _RunWriter(writers, self._costs[id], lane, self._say, self._clock)
            self._runs[id].block(lane)

    def finished(self, point: Point, result: Mapping[str, Any]) -> None:
        self._points.pop(point.id, None)
        if point.id in self._runs:
            self._runs.pop(point.id).close(done=True)

    def finished_elsewhere(self, point: Point) -> None:
        self._points.pop(point.id, None)

    def failed(self, point: Point, error: str) -> None:
        self._points.pop(point.id, None)
        if point.id in self._runs:
            self._runs.pop(point.id).close(done=False)

    def _opened(self, open: OpenWriter, point: Point, first: int) -> ScalarWriter | None:
        try:
            return open(point, first, about(point))
        except Exception as error:  # as below
            self._say(_failed(error))
            return None


def about(point: Point) -> dict[str, Any]:
    """The full config of a run, the fingerprint of its data, versions and devices: dotted name -> number or text."""
    flat = point.flat | point.fingerprints
    for name, value in environment().items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in flat.items()}


class _RunWriter:
    """The writers of one run, and which of its steps they get."""

    def __init__(
        self,
        writers: Sequence[ScalarWriter | None],
        cost: StepCost,
        lane: LaneStatus,
        say: Callable[[str], None],
        clock: Callable[[], float],
    ):
        self._writers = [w for w in writers if w is not None]
        self._cost, self._say, self._clock = cost, say, clock
        self._T = len(lane.run.eta_T)
        self._every = -(-self._T // MOST_STEPS)
        self._speed = Speed(clock)
        self._waited = lane.waited if lane.first else 0.0
        self._speed_at = clock()

    def block(self, lane: LaneStatus) -> None:
        self._speed.add(lane.step - lane.first, self._cost, max(0.0, lane.waited - self._waited))
        self._speed.read()
        self._waited = lane.waited
        for k in range(lane.first + 1, lane.step + 1):
            scalars = self._scalars(lane, k)
            if scalars:
                self._each(lambda w, k=k, scalars=scalars: w.write(k, scalars))
        self._each(lambda w: w.flush())

    def close(self, done: bool) -> None:
        self._each(lambda w: w.close(done))
        self._writers.clear()

    def _scalars(self, lane: LaneStatus, k: int) -> dict[str, float]:
        """What is written of step k, if anything."""
        scalars: dict[str, float] = {}
        i, last = k - lane.first - 1, k == lane.step
        if k % self._every == 0 or k in (1, self._T) or (last and lane.evaluation is not None):
            scalars["train/loss"] = float(lane.loss[i])
            scalars["train/grad_norm"] = float(lane.grad_norm[i])
            scalars["train/eta"] = float(lane.eta[i])
        if last and lane.evaluation is not None:
            scalars["eval/loss"] = float(lane.evaluation.loss)
            scalars["eval/accuracy"] = float(lane.evaluation.accuracy)
        if last and self._speed.amount is not None and self._clock() - self._speed_at >= SPEED_SECONDS:
            self._speed_at = self._clock()
            scalars[f"speed/{self._cost.unit}_per_s"] = self._speed.amount
            scalars["speed/waited"] = self._speed.waited or 0.0
            if self._speed.mfu is not None:
                scalars["speed/mfu"] = self._speed.mfu
        return scalars

    def _each(self, call: Callable[[ScalarWriter], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:  # whatever it is, the run is worth more than its curves
                self._writers.remove(writer)
                with contextlib.suppress(Exception):
                    writer.close(done=False)
                self._say(_failed(error))


class Profile:
    """A `cdl.sweep.run.Listener` that has JAX's profiler trace some steps after the first ones. A context manager.

    Args:
      folder: where the trace goes.
      steps: at least so many updates, in whole dispatches; about `PROFILED_BLOCKS` dispatches if None.
      say: takes one line of text.
    """

    def __init__(self, folder: Path, steps: int | None, say: Callable[[str], None]):
        self._folder, self._steps, self._say = folder, steps, say
        self._blocks, self._traced = -2, 0  # two blocks are under way before their numbers are read
        self._tracing = self._ended = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._tracing:
            self._stop()
        elif not self._ended and self._blocks > -2:
            self._say("No trace: the run was over before the profiler could start; use a longer T")

    def start(self, todo: Sequence[Point], finished: int, lanes: int, costs: Mapping[str, StepCost]) -> None:
        pass

    def block(self, lanes: Sequence[LaneStatus]) -> None:
        if self._ended or not lanes:
            return
        self._blocks += 1
        if self._tracing:
            self._traced += lanes[0].step - lanes[0].first
            if self._blocks >= PROFILED_BLOCKS if self._steps is None else self._traced >= self._steps:
                self._stop()
        elif self._blocks == 0:
            self._tracing = True
            jax.profiler.start_trace(self._folder)

    def finished(self, point: Point, result: Mapping[str, Any]) -> None:
        pass

    def finished_elsewhere(self, point: Point) -> None:
        pass

    def failed(self, point: Point, error: str) -> None:
        pass

    def _stop(self) -> None:
        self._tracing, self._ended = False, True
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # a full disk, say
            self._say(_failed(error))
            return
        self._say(
            f"Trace of {self._traced} steps: {self._folder}; xprof --logdir={self._folder} shows it (pip install "
            f"xprof), or its .trace.json.gz at ui.perfetto.dev"
        )


def _required(package: str, option: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{option} needs the package {package}; pip install {package}") from error


def _failed(error: Exception) -> str:
    what = " ".join(str(error).split()) or type(error).__name__
    return f"Warning: the run goes on, but no more of its numbers are written there: {what}"


def _markdown(about: Mapping[str, Any]) -> str:
    return "\n".join(["| name | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in about.items())])
