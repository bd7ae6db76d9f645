"""The verb `cdl data`: text to token files."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from cdl.data.token_files import DESCRIPTION
from cdl.data.tokenize import Progress, write_token_files

__all__ = ["data"]


def data(arguments: argparse.Namespace) -> None:
    """`cdl data`: tokenize documents into a folder for `data.path`."""
    out = Path(arguments.out)
    bar = Bar(
        TextColumn("{task.fields[documents]:,} documents"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("", total=None, documents=0)

    def watch(progress: Progress) -> None:
        bar.update(task, total=progress.size, completed=progress.read, documents=progress.documents)

    with bar:
        about = write_token_files(
            arguments.sources,
            out,
            tokenizer=arguments.tokenizer,
            field=arguments.field,
            val=arguments.val,
            workers=arguments.workers,
            watch=watch,
        )
    for name, purpose in (("train", "to train on"), ("val", "held out")):
        of_file = about[name]
        print(f"{of_file['tokens']:,} tokens of {_number(of_file['documents'], 'document')} {purpose}")
    if about["replaced_characters"]:
        print(f"{about['replaced_characters']:,} wrong bytes (no UTF-8) were replaced by U+FFFD")
    if about["empty_documents"]:
        print(f"{_number(about['empty_documents'], 'document')} without text left out")
    for source in about["sources"]:
        if source["passed_over"]:
            print(f"{source['path']}: {_number(source['passed_over'], 'other file')} passed over")
    use = f"data.path={out} model.vocab_size={about['vocab_size']}"
    print(f"Tokens: {out} ({about['dtype']}, described in {DESCRIPTION}); use {use}")


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"
