"""The `cdl` command. Every verb is also a function of the package; here they get words, progress and exit codes.

Exit codes: 0 fine, 2 bad input (one line on stderr says what and how to mend it), 130 interrupted (Ctrl-C), 143 asked
to stop (SIGTERM).
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from cdl.errors import Terminated, UserError, at_failure

__all__ = ["main", "parse", "run"]

LAWS = ("convex", "paper", "multipower", "annealing", "functional")  # cdl.laws.curve.LAWS, which would load jax


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    return run(parse(sys.argv[1:] if argv is None else argv))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What a command line says. Leaves with exit code 2 where it says nothing that can be done."""
    parser = _parser()
    # Changes and ids may stand between options too, which argparse alone does not allow after it has seen some.
    arguments, rest = parser.parse_known_args(_with_values(argv))
    many = getattr(arguments, "changes", getattr(arguments, "ids", None))
    if rest and (many is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if many is not None:
        many += rest
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Run a verb, `arguments.run`; what goes wrong is said. Returns the exit code."""
    code = _run(arguments)
    if code:
        for leave in at_failure:
            leave(code)
    return code


def _run(arguments: argparse.Namespace) -> int:
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
        return 143 if isinstance(e, Terminated) else 130
    except Exception:
        if not at_failure:
            raise
        traceback.print_exc()
        return 1
    return 0


def _with_values(words: Sequence[str]) -> list[str]:
    """Options whose value may be left out do not take the word after them, which may be a change of the config."""
    return [f"{word}=" if word in ("--wandb", "--profile") else word for word in words]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _whole_number(text: str) -> int:
    """100000 or 1e5."""
    with contextlib.suppress(ValueError, OverflowError):
        if (number := float(text)).is_integer():
            return int(number)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number, such as 1000 or 1e5")


def _profiled(text: str) -> int:
    """Steps of ``--profile=STEPS``; -1 of ``--profile``."""
    steps = _whole_number(text) if text else -1
    if text and steps < 1:
        raise argparse.ArgumentTypeError(f"{text} steps cannot be traced; give at least 1")
    return steps


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

    def process_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--distributed", action="store_true", help="one of several processes, as Slurm or a TPU pod says"
        )
        p.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes, the address of the first")
        p.add_argument("--processes", type=int, metavar="N", help="with --coordinator: how many there are")
        p.add_argument("--process", type=int, metavar="I", help="with --coordinator: which one this is, from 0")

    def keep_argument(p: argparse.ArgumentParser, also: str) -> None:
        p.add_argument("--keep", action="store_true", help=f"keep {also} the newest checkpoint.keep saved iterates")

    alone = dict(distributed=False, coordinator=None, processes=None, process=None)

    def metrics_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument("--tensorboard", action="store_true", help="write event files to OUT/tensorboard")
        p.add_argument(
            "--wandb",
            nargs="?",
            type=lambda text: text or "cdl",
            metavar="PROJECT",
            help="write to Weights & Biases, project cdl unless --wandb=PROJECT",
        )

    def worker_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--lanes", type=int, metavar="N", help="runs side by side (default: a core each, or as many as pay)"
        )
        p.add_argument(
            "--workers", type=int, metavar="N", help="processes that train, replaced when they die (default: this one)"
        )
        p.add_argument(
            "--backend",
            default="local",
            choices=("local", "slurm", "ray"),
            help="where workers run (default: this machine)",
        )
        p.add_argument("--sbatch", metavar="OPTIONS", help="with --backend=slurm: as '--partition=gpu --gres=gpu:1'")
        p.add_argument("--resources", metavar="NAME=N,..", help="with --backend=ray: of each worker, as GPU=1,CPU=8")

    p = verb(
        "sweep",
        _later("cli_sweep", "sweep"),
        "train the grid of a config, fit the law, write the report",
        "cdl sweep --config=configs/demo.py --out=runs/demo --check",
    )
    config_arguments(p)
    p.add_argument("--out", metavar="DIR", help="folder of the sweep; run again to go on")
    p.add_argument("--dry-run", action="store_true", help="show the grid and what it costs here, and train nothing")
    keep_argument(p, "of finished runs")
    worker_arguments(p)
    process_arguments(p)
    metrics_arguments(p)
    p.add_argument("--check", action="store_true", help="then train the predicted horizon and compare")
    p.set_defaults(profile=None)  # of one run

    p = verb(
        "pilot",
        _later("cli_pilot", "pilot"),
        "choose and train pilots within a budget, and plan a longer run from them",
        "cdl pilot --config=configs/demo.py --out=runs/pilot --T=20000 --budget=30min",
    )
    config_arguments(p)
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the pilots; run again to go on")
    p.add_argument("--T", type=_whole_number, required=True, metavar="N", help="updates of the run to plan")
    p.add_argument(
        "--budget", required=True, metavar="B", help="of all pilots: 5%% of that run, 2h or 30min here, or 1e17 FLOPs"
    )
    p.add_argument(
        "--width", type=float, default=0.02, metavar="SHARE", help="of the predicted loss: an interval narrow enough"
    )
    p.add_argument(
        "--shortest", type=_whole_number, metavar="N", help="updates of the shortest (default: the config's)"
    )
    p.add_argument("--longest", type=_whole_number, metavar="N", help="updates of the longest (default: half of --T)")
    worker_arguments(p)
    metrics_arguments(p)
    p.set_defaults(profile=None, keep=False, **alone)

    p = verb(
        "worker",
        _later("cli_sweep", "worker"),
        "train what a sweep lacks, beside its other workers, and end",
        "cdl worker runs/demo",
    )
    p.add_argument("folder", help="folder of a sweep, which all of its workers see")
    p.add_argument("--lanes", type=int, metavar="N", help="runs side by side (default: a core each, or as many as pay)")
    keep_argument(p, "of finished runs")
    metrics_arguments(p)
    p.add_argument("--grid", help=argparse.SUPPRESS)  # from here on, for whoever starts it
    p.add_argument("--job", help=argparse.SUPPRESS)
    p.add_argument("--cores", help=argparse.SUPPRESS)
    p.add_argument("--cpus", type=int, help=argparse.SUPPRESS)
    p.add_argument("--tied", action="store_true", help=argparse.SUPPRESS)
    p.set_defaults(profile=None, **alone)

    p = verb(
        "status",
        _later("cli_store", "status"),
        "how a sweep stands, wherever its workers run",
        "cdl status runs/demo --watch",
    )
    p.add_argument("folder", help="folder of a sweep")
    p.add_argument("--watch", action="store_true", help="look again every second, until it has ended")

    p = verb("ls", _later("cli_store", "ls"), "the runs of a sweep, or the sweeps in a folder", "cdl ls runs/demo")
    p.add_argument("folder", nargs="?", default="runs", help="folder of a sweep, or of several (default: runs)")

    p = verb("show", _later("cli_store", "show"), "all that is known of a run", "cdl show runs/demo 76be")
    p.add_argument("folder", help="folder of a sweep")
    p.add_argument("id", help="id of the run, or how it begins")

    p = verb(
        "table",
        _later("cli_store", "table"),
        "results and configs of a sweep's runs, a row each",
        "cdl table runs/demo --parquet=demo.parquet",
    )
    p.add_argument("folder", help="folder of a sweep")
    p.add_argument("--csv", metavar="FILE", help="write them as CSV (default: print them so)")
    p.add_argument("--parquet", metavar="FILE", help="write them as Parquet")

    p = verb(
        "probe",
        _later("cli_probe", "probe"),
        "how convex training is along the saved iterates of a run",
        "cdl train --config=configs/demo.py --out=runs/one T=800 checkpoint.steps=20 checkpoint.keep=40 --keep\n"
        "  cdl probe runs/one 67b8",
    )
    p.add_argument("folder", help="folder of a sweep, or the --out of cdl train")
    p.add_argument("id", help="id of the run, or how it begins")
    p.add_argument("--out", metavar="DIR", help="folder for probe.json and probe.png (default: FOLDER/probes/<id>)")
    p.add_argument(
        "--samples",
        type=_whole_number,
        default=16384,
        metavar="N",
        help="tokens or images of training data (default: 16384)",
    )
    p.add_argument("--iterates", type=int, default=50, metavar="N", help="iterates to use at most (default: 50)")
    p.add_argument(
        "--curvature", type=int, default=5, metavar="N", help="at how many of them to find eigenvalues (default: 5)"
    )
    p.add_argument("--T", type=_whole_number, metavar="N", help="end at the last iterate of at most so many updates")
    p.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="GAP", help="up to which a gap counts as none (default: 1e-4)"
    )
    p.set_defaults(**alone)

    p = verb(
        "export",
        _later("cli_export", "export"),
        "write the weights of a run for other tools, adapters merged",
        "cdl export runs/one 67b8 --out=weights/one",
    )
    p.add_argument("folder", help="folder of a sweep, or the --out of cdl train")
    p.add_argument("id", help="id of the run, or how it begins")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to make, for transformers and for init=DIR")

    p = verb("rm", _later("cli_store", "rm"), "remove runs of a sweep", "cdl rm runs/demo --status=diverged")
    p.add_argument("folder", help="folder of a sweep")
    p.add_argument("ids", nargs="*", metavar="ID", help="ids of runs, or how they begin")
    p.add_argument("--status", choices=("failed", "diverged", "done", "all"), help="all of this kind")
    p.add_argument("--yes", action="store_true", help="do not ask")

    p = verb(
        "train",
        _later("cli_train", "train"),
        "train one run",
        "cdl train --config=configs/demo.py T=800 eta_ref=2.0 data.path=my_text.txt",
    )
    config_arguments(p)
    p.add_argument("--out", metavar="DIR", help="folder for the result (default: runs/train-<id>)")
    keep_argument(p, "beside the last")
    process_arguments(p)
    metrics_arguments(p)
    p.add_argument(
        "--profile",
        nargs="?",
        type=_profiled,
        metavar="STEPS",
        help="trace about two seconds into OUT/profile, or with --profile=STEPS so many steps",
    )
    p.add_argument("--dry-run", action="store_true", help="say what the run takes, and train nothing; needs no data")
    p.add_argument("--devices", type=int, metavar="N", help="with --dry-run: as on N devices (default: those here)")

    p = verb(
        "data",
        _later("cli_data", "data"),
        "make token files of text, JSON lines or Parquet",
        "cdl data corpus/ more.jsonl.gz --out=data/mine --tokenizer=encoder.json,vocab.bpe",
    )
    p.add_argument("sources", nargs="+", metavar="SOURCE", help="text file, .jsonl[.gz|.zst], .parquet, or a folder")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to make, for data.path")
    p.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="FILES",
        help="bytes (default), VOCAB.json,MERGES.txt of GPT-2's kind, or a tokenizer.json",
    )
    p.add_argument("--field", default="text", metavar="NAME", help="field with the text (default: text)")
    p.add_argument("--val", type=float, default=0.0005, metavar="SHARE", help="held-out documents (default: 0.0005)")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")

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


def _report(arguments: argparse.Namespace) -> None:
    from cdl.cli_output import show_report
    from cdl.report import write_report

    show_report(*write_report(arguments.folder, arguments.T))


def _plan(arguments: argparse.Namespace) -> None:
    from cdl.cli_output import PAGES, check_outputs, save_figure
    from cdl.planning import plan

    check_outputs(arguments, arguments.folder, PAGES)
    made = plan(arguments.folder, arguments.T, arguments.N)
    print(made.summary())
    if arguments.plot:
        save_figure(made.plot(), arguments.plot, "Plan", made.summary())


if __name__ == "__main__":
    sys.exit(main())
