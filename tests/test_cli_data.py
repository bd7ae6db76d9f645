"""`cdl data`: what it prints, its progress, and that a kill leaves no folder under the final name."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from cdl.cli_data import data
from cdl.data.text import read_corpus
from cdl.data.tokenize import write_token_files
from cdl.errors import UserError


def arguments(*sources: Path, **changes: Any) -> argparse.Namespace:
    defaults = dict(tokenizer="bytes", field="text", val=0.3, workers=1)
    return argparse.Namespace(sources=[str(s) for s in sources], **(defaults | changes))


def test_what_was_made_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_bytes(b"caf\xe9 %d" % i)
    (folder / "image.png").write_bytes(b"\0")
    (folder / "empty").touch()
    data(arguments(folder, out=str(tmp_path / "out")))
    corpus = read_corpus(str(tmp_path / "out"), 0.1)
    train, held, *rest = capsys.readouterr().out.splitlines()
    n = int((corpus.heldout == 0).sum())
    assert 1 < n < 19
    assert train == f"{len(corpus.train)} tokens of {20 - n} documents to train on"
    assert held == f"{len(corpus.heldout)} tokens of {n} documents held out"
    assert rest == [
        "20 wrong bytes (no UTF-8) were replaced by U+FFFD",
        "1 document without text left out",
        f"{folder}: 1 other file passed over",
        f"Tokens: {tmp_path}/out (uint16, described in tokens.json); use data.path={tmp_path}/out model.vocab_size=256",
    ]


def test_bad_input_is_one_line_and_an_existing_folder_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_text("precious")
    for case in (arguments(tmp_path / "text.txt", out=str(tmp_path / "out")), arguments(tmp_path / "no", out="new")):
        with pytest.raises(UserError, match=r"exists already|does not exist") as raised:
            data(case)
        assert "\n" not in str(raised.value)
    assert (tmp_path / "out" / "train.bin").read_text() == "precious"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_command_leaves_no_folder_and_no_process(tmp_path: Path, how: signal.Signals) -> None:
    rng = np.random.default_rng(0)
    with (tmp_path / "lines.jsonl").open("w") as f:
        for text in rng.integers(97, 123, (128, 1 << 16), dtype=np.uint8):
            f.write(json.dumps({"text": text.tobytes().decode()}) + "\n")
    # Slow workers, so that it is certainly killed in the middle; they say who they are.
    script = tmp_path / "slow.py"
    script.write_text(
        "import argparse, os, pathlib, sys, time\n"
        "from cdl.data import vocabulary\n"
        "class Slow(vocabulary._Bytes):\n"
        "    def encode(self, text):\n"
        "        pathlib.Path(sys.path[0], f'{os.getpid()}.worker').touch()\n"
        "        time.sleep(0.05)\n"
        "        return super().encode(text)\n"
        "vocabulary._Bytes = Slow\n"
        "from cdl.cli_data import data\n"
        "if __name__ == '__main__':\n"
        f"    data(argparse.Namespace(sources=[{str(tmp_path / 'lines.jsonl')!r}], out={str(tmp_path / 'out')!r},\n"
        "                            tokenizer='bytes', field='text', val=0.1, workers=2))\n"
    )
    with (tmp_path / "stderr").open("wb") as stderr:
        command = subprocess.Popen([sys.executable, str(script)], stderr=stderr, start_new_session=True)
    workers: list[Path] = []
    while len(workers) < 2 or not list(tmp_path.glob(".out.partial/train.bin")):
        assert command.poll() is None
        time.sleep(0.05)
        workers = list(tmp_path.glob("*.worker"))
    if how == signal.SIGINT:  # as a terminal does it: to all of them
        os.killpg(command.pid, how)
    else:
        command.send_signal(how)
    command.wait()
    assert not (tmp_path / "out").exists()
    error = (tmp_path / "stderr").read_text()
    assert error.count("Traceback") == (how == signal.SIGINT)  # `cdl` makes one line of it; workers are silent
    if how == signal.SIGINT:
        assert not list(tmp_path.glob(".out*"))
    ends = time.monotonic() + 60
    while any(_alive(int(worker.stem)) for worker in workers):
        assert time.monotonic() < ends, "a worker outlives its command"
        time.sleep(0.05)
    write_token_files([str(tmp_path / "lines.jsonl")], tmp_path / "out", val=0.1, workers=1)
    assert not list(tmp_path.glob(".out*"))  # nor what the killed one had to leave


def test_tokens_that_lose_their_name_are_kept(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(9):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} of nine")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="was made meanwhile; the tokens are in ") as e:
        write_token_files([str(tmp_path / "text")], out, val=0.4, workers=1, watch=lambda _: out.mkdir(exist_ok=True))
    kept = Path(str(e.value).partition("tokens are in ")[2].partition(",")[0])
    assert (kept / "train.bin").stat().st_size > 0
    assert not list(out.iterdir())


def test_one_command_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 100)
    with FileLock(tmp_path / ".out.lock"), pytest.raises(UserError, match="another cdl data writes it"):
        write_token_files([str(tmp_path / "a.txt")], tmp_path / "out", val=0.1, workers=1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
