"""The `cdl` command. Every verb is also a function of the package; here they get words, progress and exit codes.

Exit codes: 0 fine, 2 bad input (one line on stderr says what and how to mend it), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cdl.errors import UserError

if TYPE_CHECKING:  # heavy imports wait until a verb needs them: `cdl --help` is instant
    from rich.console import Console

    from cdl.planning import Plan
    from cdl.sweep.grid import Point
    from cdl.sweep.store import Store

__all__ = ["main"]

LAWS = ("convex", "paper", "multipower", "annealing", "functional")  # cdl.laws.curve.LAWS, which would load jax


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    parser = _parser()
    # Changes may stand between options too, which argparse alone does not allow after it has seen some.
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "changes") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.changes += rest
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except UserError as e:
        print(f"cdl: error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(f"cdl: error: {where}{e.strerror or e}; mend it, or choose another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"cdl: interrupted{f'; {e}' if str(e) else ''}", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _whole_number(text: str) -> int:
    """100000 or 1e5."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def _later(module: str, verb: str) -> Callable[[argparse.Namespace], None]:
    """A verb of `cdl.<module>`, loaded when it is run."""

    def run(arguments: argparse.Namespace) -> None:
        getattr(import_module(f"cdl.{module}"), verb)(arguments)

    return run


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"cdl {version('cdl')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cdl", description="Learn the law of loss and learning rate from small runs.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable[[Any], None] | None, help: str, example: str, among: Any = verbs
    ) -> argparse.ArgumentParser:
        p = among.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if run is not None:  # else it has verbs of its own
            p.set_defaults(run=run)
        return p

    def config_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file, e.g. configs/demo.py")
        p.add_argument(
            "changes", nargs="*", metavar="FIELD=VALUE", help="changes of the config, e.g. optimizer.name=adamw"
        )

    p = verb(
        "sweep",
        _sweep,
        "train the grid of a config, fit the law, write the report",
        "cdl sweep --config=configs/demo.py --out=runs/demo --check",
    )
    config_arguments(p)
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the sweep; run again to go on")
    p.add_argument("--lanes", type=int, metavar="N", help="runs side by side (default: one per device)")
    p.add_argument("--check", action="store_true", help="then train the predicted horizon and compare")

    p = verb(
        "train",
        _train,
        "train one run",
        "cdl train --config=configs/demo.py T=800 eta_ref=2.0 data.path=my_text.txt",
    )
    config_arguments(p)
    p.add_argument("--out", metavar="DIR", help="folder for the result (default: runs/train-<id>)")

    p = verb("report", _report, "write report.html and figures of a sweep", "cdl report runs/demo")
    p.add_argument("folder", help="folder of a sweep")
    p.add_argument("--T", type=_whole_number, metavar="N", help="horizon to predict (default: four times the longest)")

    p = verb(
        "plan",
        _plan,
        "rate and expected loss of a longer or larger run",
        "cdl plan runs/demo --T=20000\n  cdl plan runs/1M runs/4M runs/16M --T=50000 --N=124e6",
    )
    p.add_argument("folder", nargs="+", help="folder of a sweep; several may differ in model size alone")
    p.add_argument("--T", type=_whole_number, metavar="N", help="horizon to predict (default: four times the longest)")
    p.add_argument("--N", type=_whole_number, metavar="N", help="parameters to predict (default: the largest pilot's)")
    p.add_argument("--plot", metavar="FILE", help="draw a figure: .png, .pdf, .svg, or a page: .html")

    def theory_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument("--D", type=float, default=1.0, metavar="D", help="distance to a minimiser (default: 1)")
        p.add_argument("--G", default="1", metavar="G", help="gradient norm: a number, or a file with one a step")
        p.add_argument("--plot", metavar="FILE", help="draw a figure: .png, .pdf or .svg")
        p.add_argument("--csv", metavar="FILE", help="write the numbers")

    written = "name, name:key=value,.. as wsd:decay=0.2,form=sqrt"
    p = verb(
        "bound",
        _later("cli_theory", "bound"),
        "bounds of schedules, side by side, each at its best peak rate unless one is given",
        "cdl bound linear cosine wsd:decay=0.2 --T=1e5 --plot=bounds.png",
    )
    p.add_argument("schedules", nargs="+", metavar="SCHEDULE", help=f"{written}; or a file of rates (.csv, .txt, .npy)")
    p.add_argument("--T", type=_whole_number, metavar="N", help="horizon of named schedules")
    p.add_argument("--peak", type=float, metavar="RATE", help="peak rate of named schedules")
    theory_arguments(p)

    p = verb(
        "exam",
        _later("cli_theory", "exam"),
        "qualifying exam of schedules, by symbols and by numbers",
        "cdl exam cosine:final=0.1 '1 - x**2' '1/sqrt(t)' --plot=exam.png",
    )
    p.add_argument(
        "schedules",
        nargs="*",
        metavar="SCHEDULE",
        help=f"{written}; or an expression in x=t/T, or t and T (default: all)",
    )
    p.add_argument("--plot", metavar="FILE", help="draw sqrt(T) x bound against T: .png, .pdf or .svg")
    p.add_argument("--csv", metavar="FILE", help="write the numbers of the numeric exam")

    p = verb(
        "optimal",
        _later("cli_theory", "optimal"),
        "the schedule with the smallest bound, or the best way to go on from rates already applied",
        "cdl optimal --T=8000 --past=constant:T=3200,peak=0.016",
    )
    p.add_argument("--T", type=_whole_number, required=True, metavar="N", help="horizon")
    p.add_argument("--past", metavar="SCHEDULE", help="rates already applied: name:T=..,peak=.., or a file of rates")
    p.add_argument("--peak", type=float, metavar="RATE", help="peak rate for which to find the best cooldown")
    theory_arguments(p)

    def law_arguments(p: argparse.ArgumentParser, laws: Sequence[str]) -> None:
        p.add_argument(
            "runs", nargs="+", metavar="RUN", help="sweep folder, CSV (step, lr, loss), W&B export, log folder"
        )
        p.add_argument("--law", default="convex", choices=laws, help="law of the loss (default: convex)")
        p.add_argument("--until", type=float, default=1.0, metavar="PART", help="fit this first part of each run")
        p.add_argument(
            "--after", type=_whole_number, default=0, metavar="STEP", help="leave out losses up to this step"
        )
        p.add_argument("--schedule", metavar="SCHEDULE", help=f"rates of the runs, where none were recorded: {written}")
        p.add_argument("--warmup", type=_whole_number, metavar="N", help="updates of warm-up before the first record")
        p.add_argument("--loss", metavar="COLUMN", help="column of the losses")

    def drawn_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument("--plot", metavar="FILE", help="draw a figure: .png, .pdf, .svg, or a page: .html")
        p.add_argument("--csv", metavar="FILE", help="write the numbers")

    fits = verb("fit", None, "fit a law to finished runs", "cdl fit curve runs/*.csv --law=all").add_subparsers(
        dest="fit", metavar="LAW", required=True
    )
    p = verb(
        "curve",
        _later("cli_laws", "curve"),
        "law of the loss along runs, from their rates",
        "cdl fit curve cosine.csv constant.csv --test wsd.csv --law=all --plot=fit.png",
        among=fits,
    )
    law_arguments(p, (*LAWS, "all"))
    p.add_argument("--test", nargs="+", metavar="RUN", help="runs to predict")
    drawn_arguments(p)

    p = verb(
        "peak",
        _later("cli_laws", "peak"),
        "loss against peak rate at one horizon (4.1)",
        "cdl fit peak runs/demo --T=1600 --plot=peak.png",
        among=fits,
    )
    p.add_argument("table", help="folder of a sweep, or a CSV file with columns eta and loss")
    p.add_argument("--T", type=_whole_number, metavar="N", help="horizon, where the table has several")
    drawn_arguments(p)

    p = verb(
        "horizon",
        _later("cli_laws", "horizon"),
        "loss against 1/sqrt(T), 1/sqrt(tokens) or 1/sqrt(FLOPs)",
        "cdl fit horizon losses.csv --x=tokens --to=3e11",
        among=fits,
    )
    p.add_argument("table", help="folder of a sweep, or a CSV file with columns T (tokens, flops), loss and eta_ref")
    p.add_argument("--x", default="T", choices=("T", "tokens", "flops"), help="what the horizon is counted in")
    p.add_argument("--to", type=float, metavar="N", help="horizon to predict (default: four times the longest)")
    drawn_arguments(p)

    p = verb(
        "forecast",
        _later("cli_laws", "forecast"),
        "loss of schedules not yet run, from finished runs",
        "cdl forecast cosine.csv wsd.csv --to cosine:T=72000,peak=3e-4 linear:T=72000,peak=3e-4 --plot=forecast.png",
    )
    law_arguments(p, LAWS)
    p.add_argument("--to", nargs="+", required=True, metavar="SCHEDULE", help=f"{written}; or a file of rates")
    p.add_argument("--T", type=_whole_number, metavar="N", help="horizon of schedules that name none")
    p.add_argument("--level", type=float, default=0.9, metavar="P", help="of the intervals (default: 0.9)")
    drawn_arguments(p)
    return parser


def _sweep(arguments: argparse.Namespace) -> None:
    from cdl import config as configs
    from cdl.laws.horizon import NoLaw
    from cdl.planning import CHECKS, plan
    from cdl.report import write_report
    from cdl.sweep.run import check_lanes, points_of, use_cpu_cores
    from cdl.sweep.store import Store

    use_cpu_cores()
    if arguments.lanes is not None:
        check_lanes(arguments.lanes)
    console = _console()
    config, grid = configs.load(arguments.config)
    if grid is None:
        raise UserError(f"--config={arguments.config!r} has no sweep(); use cdl train, or add one as configs/demo.py")
    changes = configs.parse_assignments(arguments.changes)
    for field in changes:
        if any(field in c for c in grid):
            raise UserError(f"{field} is an axis of the sweep; change sweep() in {arguments.config}, or use cdl train")
    points = points_of(config, [changes | c for c in grid])
    store = Store(arguments.out)
    store.open_for(points)
    _train_points(console, points, store, arguments.lanes)
    try:
        made = plan(store.root)
    except NoLaw as e:  # the runs are what was asked for; not every grid has a law in it
        if arguments.check:
            raise UserError(f"the runs are done, but there is nothing to check: {e}") from e
        print(f"The runs are done, but there is no law to fit: {e}.\nResults: {store.root}")
        return
    if arguments.check:
        like = min(points, key=lambda p: p.config.seed).config  # one setting, or there were no law
        checks = points_of(like, [dict(eta_ref=made.eta_ref, T=made.T)])
        check_store = Store(store.root / CHECKS)
        check_store.open_for(checks)
        console.print(f"Check: training T={made.T} at eta_ref={made.eta_ref:g}, as predicted.", highlight=False)
        _train_points(console, checks, check_store, None)
    _show(*write_report(store.root))


def _train(arguments: argparse.Namespace) -> None:
    from cdl import config as configs
    from cdl.sweep.run import points_of, use_cpu_cores
    from cdl.sweep.store import Store

    use_cpu_cores()
    config, _ = configs.load(arguments.config)
    points = points_of(config, [configs.parse_assignments(arguments.changes)])
    out = Path(arguments.out) if arguments.out else Path("runs") / f"train-{points[0].id}"
    store = Store(out)
    store.open_for(points)
    _train_points(_console(), points, store, 1)
    row = store.table().set_index("id").loc[points[0].id]
    if row.status == "done":
        print(
            f"done: held-out loss {row.loss:.4f}, training loss {row.train_loss:.4f}, {row.tokens_per_s:,.0f} tokens/s"
        )
    else:
        print(f"diverged: the loss after {row.diverged_at:.0f} updates was not finite; try a smaller eta_ref")
    print(f"Results: {out / points[0].id}")


def _train_points(console: "Console", points: "Sequence[Point]", store: "Store", lanes: int | None) -> None:
    from cdl.progress import TerminalProgress
    from cdl.sweep.run import run_points

    if {p.id for p in points} <= store.ids():
        many = f"all {len(points)} runs are" if len(points) > 1 else "the run is"
        console.print(
            f"{store.root}: {many} there already, nothing to train.", highlight=False, soft_wrap=True, markup=False
        )
        return
    try:
        with TerminalProgress(console) as progress:
            run_points(points, store, progress, lanes)
    except KeyboardInterrupt:
        kept = len({p.id for p in points} & store.ids())
        raise KeyboardInterrupt(f"{kept} of {len(points)} runs are kept; the same command goes on from there") from None


def _report(arguments: argparse.Namespace) -> None:
    from cdl.report import write_report

    _show(*write_report(arguments.folder, arguments.T))


def _show(made: "Plan", files: Sequence[Path]) -> None:
    print(made.summary())
    print(f"Report: {files[0]}\nFigures: {', '.join(str(f) for f in files[1:])}")


def _plan(arguments: argparse.Namespace) -> None:
    from cdl.cli_output import PAGES, check_outputs, save_figure
    from cdl.planning import plan

    check_outputs(arguments, arguments.folder, PAGES)
    made = plan(arguments.folder, arguments.T, arguments.N)
    print(made.summary())
    if arguments.plot:
        save_figure(made.plot(), arguments.plot, "Plan", made.summary())


def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


if __name__ == "__main__":
    sys.exit(main())
