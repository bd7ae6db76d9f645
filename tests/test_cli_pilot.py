"""`cdl pilot` as a person uses it; how it chooses is tested in test_pilot.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from cdl.cli import main
from cdl.sweep.store import Store, sweep_table
from tests.conftest import TINY


def pilot(out: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cdl.cli", "pilot", f"--config={TINY}", f"--out={out}", "--shortest=20", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_pilot_keeps_to_its_budget_and_goes_on_when_given_more(tmp_path: Path) -> None:
    out = tmp_path / "s"
    done = pilot(out, "--T=1000", "--budget=25%")
    assert done.returncode == 0, done.stderr
    first = sweep_table(out)
    assert first["T"].sum() <= 250
    assert first["T"].min() == 20
    assert "Pilots: a coarse grid of rates at T=20" in done.stderr
    assert "Plan: at T=1000 use eta_ref*=" in done.stdout
    again = pilot(out, "--T=1000", "--budget=25%")
    assert again.stdout == done.stdout
    assert Store(out).ids() == set(first["id"])  # nothing new, nothing twice
    more = pilot(out, "--T=1000", "--budget=60%")
    assert more.returncode == 0, more.stderr
    assert set(first["id"]) < Store(out).ids()
    assert 250 < sweep_table(out)["T"].sum() <= 600


@pytest.mark.slow
def test_a_killed_pilot_ends_as_if_it_had_been_left_alone(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    words = ["--T=1000", "--budget=30%"]
    assert pilot(straight, *words).returncode == 0
    command = [sys.executable, "-m", "cdl.cli", "pilot", f"--config={TINY}", f"--out={killed}", "--shortest=20", *words]
    for finished in (2, 7):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(Store(killed).ids()) < finished:
                pass
            process.kill()
    assert pilot(killed, *words).returncode == 0
    ours, theirs = (sweep_table(f)[["id", "eta_ref", "T", "loss"]] for f in (killed, straight))
    assert ours.equals(theirs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget=much"], "--budget='much' must be a share of the planned run (5%), a time (2h, 30min) or"),
        (["--budget=0%"], "--budget='0%' must be a share"),
        (["--budget=2h", "--workers=2"], "how much workers do in that time is not known"),
        (["--budget=5%", "--width=0"], "width"),
        (["--budget=1e3"], "budget"),
        (["--budget=50%", "--shortest=2000"], "2000"),
        (["--budget=50%", "abacus=1"], "abacus"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_trained(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert main(["pilot", f"--config={TINY}", f"--out={out}", "--T=1000", *words]) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not Store(out).ids()
