"""What the scripts of the paper's figures and tables share: scales, runs in a store, claims, figures and numbers.

    python experiments/figNN_name.py [--scale=laptop|gpu|paper] [--out=DIR] [FIELD=VALUE ...] [options of cdl sweep]

`laptop` takes minutes on two CPU cores, on data that packages ship; `gpu` hours on one accelerator; `paper` is the
paper's own setting, on data that has to be there. FIELD=VALUE changes the config of all runs, such as data.path=DIR
where they all have the same data.
With the options of `cdl sweep` runs go to workers: --workers=8, --backend=slurm --sbatch=.., --lanes=4.

A script stops and goes on like a sweep: finished runs stay in DIR, and scripts that need the same runs share them. It
ends with DIR/figNN_name.png, and DIR/figNN_name.json with its numbers and what the paper claims of them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import cdl
import cdl.config
from cdl.cli import parse, run
from cdl.errors import UserError
from cdl.sweep.grid import Grid
from cdl.sweep.identity import PATHS

ROOT = Path(__file__).parents[1]
SCALES = ("laptop", "gpu", "paper")


@dataclass(frozen=True)
class Sweep:
    """Runs that a script needs. folder: under DIR. config: of one. grid: changes of each. keep: are weights kept?"""

    folder: str
    config: ConfigDict
    grid: Grid
    keep: bool = False


@dataclass(frozen=True)
class Claim:
    """paper: what it says. here: what came out. agrees: None where this scale cannot tell."""

    paper: str
    here: str
    agrees: bool | None


@dataclass(frozen=True)
class Outcome:
    """figure: in the paper's form, None for a table. numbers: all that it shows, for json. claims: what the paper says
    of them. text: a table in Markdown, to be printed."""

    figure: Figure | None
    numbers: Mapping[str, Any]
    claims: Sequence[Claim]
    text: str = ""


class Runs:
    """Finished runs of a `Sweep`.

    table: a row for each, in the order of the grid, as `cdl.sweep_table`. weights: the folders of what they ended with.
    """

    def __init__(self, folder: Path, table: pd.DataFrame):
        self._folder, self.table = folder, table
        self.weights = [folder / "checkpoints" / id for id in table["id"]]

    def curve(self, i: int, name: str, windows: int = 0) -> pd.DataFrame:
        """Run i as `cdl.fit_curve` takes it: columns run, step, eta, loss; NaN where no loss was measured.

        Args:
          windows: instead of the held-out losses, means of the training loss over so many parts of the run, each at its
            middle.
        """
        curve = pd.read_parquet(self._folder / self.table["id"][i] / "curve.parquet")
        loss_T = curve["eval_loss"].to_numpy()[1:]
        if windows:
            T = len(loss_T)
            train_T, loss_T = curve["train_loss"].to_numpy()[:-1], np.full(T, np.nan)
            for part in np.array_split(np.arange(T), windows):
                loss_T[part[len(part) // 2]] = train_T[part].mean()
        columns = {"step": curve["step"].iloc[1:], "eta": curve["eta"].iloc[1:], "loss": loss_T}
        return pd.DataFrame({"run": name} | columns)


class Lab:
    """Where a script's runs are trained. scale, out, data: as said on the command line."""

    def __init__(self, scale: str, out: Path, data: str | None, sweep_arguments: argparse.Namespace):
        self.scale, self.out, self.data, self._arguments = scale, out, data, sweep_arguments
        self.seconds: dict[str, float] = {}
        self.device, self.versions = "", {}

    def train(self, sweep: Sweep) -> Runs:
        """Train what is not there yet.

        Raises:
          UserError: as `cdl sweep`.
        """
        changes = cdl.config.parse_assignments(self._arguments.changes)
        if set_here := sorted(changes.keys() & {field for change in sweep.grid for field in change}):
            raise UserError(f"{set_here[0]} is set by the script, run by run; change it there")
        points = [changes | change for change in sweep.grid]
        folder = self.out / sweep.folder
        keep = sweep.keep or self._arguments.keep
        runs = Runs(folder, cdl.run_sweep(sweep.config, points, folder, self._arguments, keep=keep))
        self.seconds |= dict(zip(runs.table["id"], runs.table["seconds"], strict=True))
        self.device, self.versions = runs.table["device"].iloc[-1], runs.table["versions"].iloc[-1]
        return runs


def config(file: str) -> tuple[ConfigDict, Grid]:
    """Config and grid of ``file.py:arg`` in configs/."""
    made, grid = cdl.config.load(str(ROOT / "configs" / file))
    return made, grid or [{}]


def main(file: str, doc: str | None, experiment: Callable[[Lab], Outcome], *, of_published: bool = False) -> None:
    """Run a script from its command line, and leave with its exit code. of_published: at `paper` scale it reads
    published runs and trains none."""
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0], epilog="Options of cdl sweep and changes of the config go on."
    )
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument("--out", metavar="DIR", help="folder for runs, figure and numbers (default: runs/paper-SCALE)")
    parser.add_argument("--data", metavar="PATH", help="published runs, for figures that the paper makes of such")
    arguments, rest = parser.parse_known_args()
    if arguments.data is not None and not (of_published and arguments.scale == "paper"):
        parser.error(f"--data={arguments.data} is of scripts that read published runs, with --scale=paper")
    out = Path(arguments.out or f"runs/paper-{arguments.scale}")

    def work(sweep_arguments: argparse.Namespace) -> None:
        lab = Lab(arguments.scale, out, arguments.data, sweep_arguments)
        outcome = experiment(lab)
        out.mkdir(parents=True, exist_ok=True)
        name = Path(file).stem
        written = dict(
            script=name,
            title=(doc or "").partition("\n")[0].rstrip("."),
            scale=arguments.scale,
            command=_command(name, arguments, sweep_arguments.changes),
            runs=len(lab.seconds),
            run_seconds=round(sum(lab.seconds.values()), 1),
            machine=lab.device,
            versions=lab.versions,
            claims=[asdict(claim) for claim in outcome.claims],
            numbers=outcome.numbers,
        )
        # Numbers that are not finite become null, which JSON has.
        plain = json.loads(json.dumps(written, default=_plain), parse_constant=lambda _: None)
        text = json.dumps(plain, indent=1, allow_nan=False) + "\n"
        if outcome.text:
            print(outcome.text)
            (out / f"{name}.md").write_text(outcome.text + "\n")
        if outcome.figure:
            outcome.figure.savefig(out / f"{name}.png", dpi=110)
            print(f"Figure: {out / f'{name}.png'}")
        (out / f"{name}.json").write_text(text)
        for claim in outcome.claims:
            verdict = {True: "agrees", False: "DISAGREES", None: "not tested at this scale"}[claim.agrees]
            print(f"Paper: {claim.paper}\nHere:  {claim.here} ({verdict})")
        print(f"Numbers: {out / f'{name}.json'}")

    sweep_arguments = parse(["sweep", "--config=", f"--out={out}", *rest])
    for option, value in (("--config", sweep_arguments.config), ("--dry-run", sweep_arguments.dry_run)):
        if value:
            parser.error(f"{option} is for cdl sweep, and the script says what is trained")
    if sweep_arguments.check or sweep_arguments.distributed or sweep_arguments.coordinator:
        parser.error("--check, --distributed and --coordinator are for cdl sweep; take --workers for several processes")
    sweep_arguments.run = work
    sys.exit(run(sweep_arguments))


def at_peak(peak: float, T: int) -> dict[str, Any]:
    """The changes that give a run of T updates this peak rate."""
    return {"T": T, "eta_ref": peak * T**0.5}


def published(lab: Lab, what: str, *files: str) -> Path:
    """The path of --data, with these files in it.

    Raises:
      UserError: there is none.
    """
    if lab.data is None:
        raise UserError(f"--scale=paper makes this of published runs; give --data, {what}")
    path = Path(lab.data)
    missing = (
        [file for file in files if not (path / file).is_file()] if files else [] if path.is_file() else [path.name]
    )
    if missing:
        raise UserError(f"--data={lab.data!r} lacks {missing[0]}; give {what}")
    return path


def span(values: Sequence[float], form: str = ".3f") -> str:
    """The least and the largest of numbers."""
    return f"{min(values):{form}} to {max(values):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def _command(name: str, arguments: argparse.Namespace, changes: Sequence[str]) -> str:
    """What gives these numbers elsewhere: without the paths of this machine, nor where and how runs were trained."""
    words = ["python", f"experiments/{name}.py"]
    words += [] if arguments.scale == SCALES[0] else [f"--scale={arguments.scale}"]
    words += [] if arguments.data is None else ["--data=PATH"]
    given = cdl.config.parse_assignments(changes)
    return " ".join([*words, *(f"{field}={'PATH' if field in PATHS else value}" for field, value in given.items())])


def _plain(x: Any) -> Any:
    """Numbers and arrays of NumPy and pandas for json."""
    if isinstance(x, np.generic | np.ndarray | pd.Series):
        return x.tolist()
    if isinstance(x, pd.DataFrame):
        return x.to_dict("list")
    raise TypeError(f"{type(x).__name__} does not go into json")
