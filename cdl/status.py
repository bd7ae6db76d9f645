"""How a sweep stands, wherever its workers run: read from its folder alone."""

import time
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cdl.errors import UserError
from cdl.sweep.claims import SILENT_SECONDS
from cdl.sweep.store import Store
from cdl.wording import LINE_SECONDS, duration, finished_line

__all__ = ["Running", "Status", "Watch", "WorkersProgress", "picture", "show_status"]

_LOOK_SECONDS = 1.0
_MODEL = ("model.", "data.batch_size", "data.seq_len", "data.image_size")  # what FLOPs of a step depend on


class Running(NamedTuple):
    """A run that a living worker has; step and loss are None before its first numbers. doubt: is it really trained?"""

    id: str
    eta_ref: float
    T: int
    seed: int
    step: int | None
    loss: float | None
    worker: str
    doubt: str


class Status(NamedTuple):
    """Points by what has become of them; those of `failed` with the error.

    per_s: of all workers, unit -> a second. seconds_left: None where nothing is known yet, or nobody works.
    """

    total: int
    done: int
    diverged: list[dict[str, Any]]
    failed: list[tuple[dict[str, Any], str]]
    running: list[Running]
    workers: int
    per_s: dict[str, float]
    seconds_left: float | None

    @property
    def waiting(self) -> int:
        """Points that nobody trains yet."""
        return self.total - self.done - len(self.diverged) - len(self.failed) - len(self.running)


class Watch:
    """Looks at a sweep's folder again and again.

    points: what was asked for, id -> config and fingerprints. results: id -> what `Store.result` says, read once.
    """

    def __init__(self, store: Store, ids: set[str] | None = None):
        """ids: of the points of interest; all that were asked for if None."""
        self._store, self._only = store, ids
        self._names: set[str] = set()  # of the grids that were read
        self._asked: dict[str, dict[str, Any]] = {}
        self._models: dict[str, str] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.points: dict[str, dict[str, Any]] = {}

    def look(self) -> Status:
        """How it stands now."""
        store = self._store
        points = self.points = self.points_asked()
        finished = {id for id in store.ids() if self._only is None or id in self._only}
        for id in finished - self.results.keys():
            try:
                self.results[id] = store.result(id, self._asked.get(id))
            except UserError:
                if id in store.ids():
                    raise
        finished &= self.results.keys()  # somebody may have removed one just now
        points.update({id: self.results[id] for id in finished - points.keys()})
        failed = {id: record for id, record in store.failed().items() if id in points and id not in finished}
        alive = [w for w in store.claims.workers() if store.claims.alive(w)]
        records = {w: store.claims.record(w) for w in alive}
        told: dict[str, dict[str, Any]] = {}
        ended, running = finished | failed.keys(), []
        for folder in store.begun():
            id = folder.name
            if id in points and id not in ended and (worker := store.claims.holder(folder)):
                told[id] = records.get(worker, {}).get("runs", {}).get(id, {})
                point, run = points[id], told[id]
                common = (id, point["eta_ref"], point["T"], point["seed"])
                doubt = self._doubt(worker, records.get(worker, {}))
                running.append(Running(*common, run.get("step"), run.get("loss"), worker, doubt))
        per_s: dict[str, float] = {}
        for record in records.values():
            if record.get("per_s"):
                per_s[record["unit"]] = per_s.get(record["unit"], 0.0) + record["per_s"]
        by_status = {id: self.results[id]["status"] for id in finished}
        return Status(
            len(points),
            sum(s == "done" for s in by_status.values()),
            [points[id] | self.results[id] for id, s in by_status.items() if s == "diverged"],
            [(points[id], record["error"]) for id, record in failed.items()],
            sorted(running, key=lambda r: (r.worker, -r.T, r.eta_ref)),
            len(alive),
            per_s,
            self._left(
                points, finished | failed.keys(), told, sum(r.get("flops_per_s") or 0 for r in records.values())
            ),
        )

    def _doubt(self, worker: str, record: dict[str, Any]) -> str:
        claims = self._store.claims
        if not claims.heard(worker) and (silence := claims.silence(worker)) > SILENT_SECONDS:
            return f"not heard of for {duration(silence)}"
        return f"no step for {duration(60 * record['idle_min'])}" if "idle_min" in record else ""

    def points_asked(self) -> dict[str, dict[str, Any]]:
        """Config and fingerprints of every point of interest, by id. Grids do not change; there may be more of them."""
        if (names := self._store.grid_names()) != self._names:
            self._names = names
            for grid in self._store.grids():
                for own in grid["points"]:
                    if self._only is None or own["id"] in self._only:
                        self._asked[own["id"]] = grid["common"] | own
            self._models = {id: _model(point) for id, point in self._asked.items()}
        return dict(self._asked)

    def _left(
        self, points: dict[str, dict[str, Any]], ended: set[str], told: dict[str, Any], flops_per_s: float
    ) -> float | None:
        """Seconds, by the FLOPs of what is left; those of a model not met yet are taken as the others' mean."""
        if not flops_per_s:
            return None
        costs: dict[str, float] = {}
        for id, known in [*self.results.items(), *told.items()]:
            if id in self._models and known.get("flops_per_step"):
                costs[self._models[id]] = known["flops_per_step"]
        if not costs:
            return None
        mean = sum(costs.values()) / len(costs)
        left = (
            (p["T"] - told.get(id, {}).get("step", 0)) * costs.get(self._models[id], mean)
            for id, p in points.items()
            if id not in ended
        )
        return sum(left) / flops_per_s


def _model(point: dict[str, Any]) -> str:
    return repr([(k, v) for k, v in sorted(point.items()) if k.startswith(_MODEL)])


def head(s: Status, name: str) -> str:
    """How many runs there are of each kind, speed and time left, in one line."""
    parts = [f"{s.done} done"]
    parts += [f"{len(s.diverged)} diverged"] if s.diverged else []
    parts += [f"{len(s.failed)} failed"] if s.failed else []
    parts += [f"{len(s.running)} running", f"{s.waiting} waiting"] if s.done < s.total else []
    speed = [f"{v:,.0f} {unit}/s" for unit, v in s.per_s.items()] if s.running else []
    left = [f"{duration(s.seconds_left)} left"] if s.running and s.seconds_left is not None else []
    workers = [f"{s.workers} worker{'s' * (s.workers != 1)}"] if s.running or s.waiting else []
    return "  ".join([f"{name}: {s.total} runs", ", ".join(parts), *workers, *speed, *left])


def picture(status: Status, name: str, rows: int = 40) -> RenderableType:
    """A head line, the runs under way (so many at most), and what went wrong."""
    s = status
    shown: list[RenderableType] = [Text(head(s, name), style="bold")]
    if s.running:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("run", "eta_ref", "T", "step", "loss", "worker"):
            left = column in ("run", "worker")
            table.add_column(column, justify="left" if left else "right", no_wrap=column != "worker", overflow="fold")
        for r in s.running[:rows]:
            step = "starting" if r.step is None else f"{r.step} ({r.step / r.T:.0%})"
            table.add_row(r.id, f"{r.eta_ref:g}", str(r.T), step, "" if r.loss is None else f"{r.loss:.4f}", r.worker)
        shown.append(table)
        if len(s.running) > rows:
            shown.append(Text(f"... and {len(s.running) - rows} more"))
    for worker, doubt in dict.fromkeys((r.worker, r.doubt) for r in s.running if r.doubt):
        shown.append(Text(f"{worker}  {doubt}", style="yellow"))
    for point in s.diverged:
        shown.append(Text(f"diverged  {_said(point)}  after {point['diverged_at']} updates"))
    for point, error in s.failed:
        shown.append(Text(f"failed  {_said(point)}  {error}"))
    return Group(*shown)


def _said(point: dict[str, Any]) -> str:
    return f"{point['id']}  eta_ref {point['eta_ref']:g}  T {point['T']}"


class WorkersProgress:
    """What a person sees whose runs train elsewhere: a line for each that ends, and below them how it stands.

    Where there is no terminal a line says so every `LINE_SECONDS`. Use as a context manager.

    Args:
      console: where to.
      watch: of the points asked for.
      name: of the sweep.
    """

    def __init__(self, console: Console, watch: Watch, name: str):
        self._console, self._watch, self._name = console, watch, name
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._watch.look()
        self._known = set(watch.results)
        self._failed: set[str] = set()
        self._said = time.monotonic()

    def __enter__(self) -> "WorkersProgress":
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.show()
        self._live.__exit__(*error)

    def show(self) -> None:
        """Look again, and say what is new."""
        status = self._watch.look()
        for id, result in self._watch.results.items():
            if id not in self._known:
                self._known.add(id)
                line = finished_line(len(self._known), status.total, result["eta_ref"], result["T"], result)
                self._console.print(line, highlight=False, soft_wrap=True)
        for point, error in status.failed:
            if point["id"] not in self._failed:
                self._failed.add(point["id"])
                self._console.print(f"{_said(point)}  failed: {error}", highlight=False, markup=False, soft_wrap=True)
        if self._console.is_terminal:
            self._live.update(picture(status, self._name, rows=20), refresh=True)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self._console.print(head(status, self._name), highlight=False, markup=False, soft_wrap=True)


def show_status(folder: str, watch: bool) -> None:
    """Print how a sweep stands; with `watch`, again every second until nothing is left to train.

    Raises:
      UserError: the folder holds no sweep.
    """
    store = Store(folder)
    if not store.grids() and not store.ids():
        raise UserError(f"{folder} holds no sweep; start one with cdl sweep --out={folder}")
    looks, console, name = Watch(store), Console(highlight=False, soft_wrap=True), store.root.resolve().name
    status = looks.look()
    if watch:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while status.running or status.waiting:
                live.update(picture(status, name), refresh=True)
                time.sleep(_LOOK_SECONDS)
                status = looks.look()
    console.print(picture(status, name))
