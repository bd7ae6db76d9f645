"""`cdl probe`: how convex training is, from the saved iterates of a run."""

import argparse
from pathlib import Path

from cdl.cli_store import one_run
from cdl.cli_train import console, start_devices
from cdl.errors import UserError
from cdl.probing import probe as measure
from cdl.sweep.store import Store

__all__ = ["probe"]


def probe(arguments: argparse.Namespace) -> None:
    """Measure, write probe.json and probe.png, and say what came out."""
    store = Store(arguments.folder)
    id = one_run(store, arguments.id)
    out = Path(arguments.out) if arguments.out else store.root / "probes" / id
    if out.is_file():
        raise UserError(f"--out={arguments.out} is a file; choose a folder")
    start_devices(arguments)
    with console().status("probing") as status:
        made = measure(
            store.root,
            id,
            samples=arguments.samples,
            iterates=arguments.iterates,
            curvature=arguments.curvature,
            T=arguments.T,
            tolerance=arguments.tolerance,
            tell=status.update,
        )
    files = made.save(out)
    print(made.summary())
    print(f"Numbers: {files[0]}\nFigure: {files[1]}")
