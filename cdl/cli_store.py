"""The verbs of the command line that look into sweeps: `cdl ls`, `cdl show`, `cdl table`, `cdl rm`, `cdl status`."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cdl.errors import UserError, say
from cdl.status import Watch, show_status
from cdl.sweep.store import Store

__all__ = ["ls", "one_run", "rm", "show", "status", "table"]

_ALWAYS = ["id", "status", "eta_ref", "T", "seed", "loss", "seconds"]


def ls(arguments: argparse.Namespace) -> None:
    """`cdl ls`: the points of a sweep, or the sweeps in a folder."""
    folder = Path(arguments.folder)
    if (folder / "sweep.json").is_file() or Store(folder).ids():
        _print(_points(Store(folder)))
        return
    sweeps = [f.parent for f in sorted(folder.glob("*/sweep.json"))]
    if not sweeps:
        raise UserError(f"{folder} holds no sweep; start one with cdl sweep --out={folder}")
    rows = []
    for sweep in sweeps:
        s = (watch := Watch(Store(sweep))).look()
        counts = dict(runs=s.total, done=s.done, diverged=len(s.diverged), failed=len(s.failed), running=len(s.running))
        losses = [r["loss"] for r in watch.results.values() if r["loss"] is not None]
        rows.append({"sweep": sweep.name} | counts | {"lowest loss": min(losses, default=None)})
    _print(pd.DataFrame(rows))


def _points(store: Store) -> pd.DataFrame:
    """A row for each point that was asked for: what has become of it, and what tells it from the others."""
    watch = Watch(store)
    now = watch.look()
    running = {r.id: r for r in now.running}
    failed = {point["id"] for point, _ in now.failed}
    rows = []
    for id, point in (watch.points | watch.results).items():
        if id in watch.results:
            rows.append(point)
        elif id in running:
            step = running[id].step
            rows.append(point | {"status": "starting" if step is None else f"step {step}", "loss": running[id].loss})
        else:
            rows.append(point | {"status": "failed" if id in failed else "waiting"})
    table = pd.DataFrame(rows, columns=pd.Index(dict.fromkeys([*_ALWAYS, *(k for r in rows for k in r)])))
    fields = watch.points[next(iter(watch.points))] if watch.points else {}
    varied = [c for c in fields if c in table and c not in _ALWAYS and table[c].map(str).nunique() > 1]
    return table[_ALWAYS[:5] + varied + _ALWAYS[5:]].sort_values(["eta_ref", "T", "seed", "id"], ignore_index=True)


def show(arguments: argparse.Namespace) -> None:
    """`cdl show`: all that is known of a point."""
    store = Store(arguments.folder)
    id = one_run(store, arguments.id)
    if id in store.ids():
        known = store.result(id)
        curve = store.curve(id)
        print(f"{store.root / id}\n")
        _print_fields(known)
        evaluated = curve[curve["eval_loss"].notna()][["step", "eta", "train_loss", "eval_loss"]]
        print(f"\ncurve.parquet: {len(curve)} rows; evaluations:")
        _print(evaluated)
        return
    points = Watch(store).points_asked()
    if id in (failed := store.failed()):
        record = failed[id]
        print(f"{store.root / 'checkpoints' / id}\n")
        _print_fields({k: v for k, v in record.items() if k != "traceback"} | points.get(id, {}))
        print(f"\n{record['traceback'].rstrip()}")
        return
    holder = store.claims.holder(store.root / "checkpoints" / id)
    said = {"status": f"trained by {holder}" if holder else "waiting"}
    said |= store.claims.record(holder).get("runs", {}).get(id, {}) if holder else {}
    _print_fields({"id": id} | said | points.get(id, {}))


def table(arguments: argparse.Namespace) -> None:
    """`cdl table`: results and configs of all finished points."""
    made = Store(arguments.folder).table()
    if made.empty:
        raise UserError(f"{arguments.folder} holds no finished run; start one with cdl sweep --out={arguments.folder}")
    # Versions, lists: as text, which both formats and every reader can hold.
    odd = [c for c in made if made[c].dtype == object and made[c].map(lambda x: isinstance(x, dict | list)).any()]
    made = made.assign(**{str(c): made[c].map(json.dumps) for c in odd})
    for path, write in ((arguments.csv, made.to_csv), (arguments.parquet, made.to_parquet)):
        if path:
            if not Path(path).absolute().parent.is_dir():
                raise UserError(f"{path}: there is no folder {Path(path).parent}; make it first")
            write(path, index=False)
            print(f"{len(made)} rows, {len(made.columns)} columns: {path}", file=sys.stderr)
    if not (arguments.csv or arguments.parquet):
        made.to_csv(sys.stdout, index=False)


def rm(arguments: argparse.Namespace) -> None:
    """`cdl rm`: remove points, after a question."""
    store = Store(arguments.folder)
    if not store.grid_names() and not store.ids():
        raise UserError(f"{store.root} holds no sweep; name the folder of one")
    if bool(arguments.ids) == bool(arguments.status):
        raise UserError("name the runs to remove, or say which kind: --status=failed, diverged, done or all")
    if arguments.ids:
        ids = {one_run(store, id) for id in arguments.ids}
    else:
        statuses = {id: store.result(id)["status"] for id in store.ids()} | dict.fromkeys(store.failed(), "failed")
        ids = {id for id, status in statuses.items() if arguments.status in (status, "all")}
    there = {*store.ids(), *(f.name for f in store.begun())}
    if not ids & there:
        print(f"{store.root}: {'nothing of these runs is there' if ids else 'no such runs'}, nothing to remove")
        return
    ids &= there
    _wait_until_free(store, ids)
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise UserError(f"this would remove {len(ids)} runs and asks a person first; give --yes")
        try:
            answer = input(f"Remove {len(ids)} runs from {store.root} for good? [y/N] ")
        except EOFError:
            answer = ""
        if answer.lower() != "y":
            print("Nothing was removed.")
            return
    store.remove(ids)
    print(f"Removed {len(ids)} runs; the sweep's command trains them anew.")


def _wait_until_free(store: Store, ids: Iterable[str]) -> None:
    """Until it is certain that nobody trains these runs: of workers on other hosts that takes a minute.

    Raises:
      UserError: somebody does.
    """
    told = False
    while holders := {id: w for id in ids if (w := store.claims.holder(store.root / "checkpoints" / id))}:
        for id, worker in holders.items():
            if store.claims.heard(worker):
                raise UserError(f"{id} is being trained by {worker}; stop that first")
        if not told:
            workers = ", ".join(sorted(set(holders.values())))
            say(f"runs were last trained by {workers}; a minute will tell whether they still are")
        told = True
        time.sleep(1)


def status(arguments: argparse.Namespace) -> None:
    """`cdl status`."""
    show_status(arguments.folder, arguments.watch)


def one_run(store: Store, beginning: str) -> str:
    """The id of a sweep's run that begins so.

    Raises:
      UserError: none does, or several do.
    """
    known = {*store.ids(), *store.expected(), *(f.name for f in store.begun())}
    found = sorted(id for id in known if id.startswith(beginning))
    if len(found) != 1:
        which = f"{len(found)} runs, {', '.join(found[:3])}, ..; give more of it" if found else "no run; see cdl ls"
        raise UserError(f"{beginning!r} is the beginning of {which}")
    return found[0]


def _print(made: pd.DataFrame) -> None:
    shown = made.astype(object).where(made.notna(), "")
    with pd.option_context("display.width", None):
        print(shown.to_string(index=False, float_format="{:.6g}".format))


def _print_fields(fields: Mapping[str, Any]) -> None:
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name:<{width}}  {value}")
