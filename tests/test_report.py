"""The report: self-contained, complete, and of the numbers that were fitted."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from cdl.cli import main
from cdl.planning import plan
from cdl.report import write_report
from cdl.sweep.store import sweep_table


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("report") / "sweep"
    shutil.copytree(tiny_sweep, copy)
    return copy


def test_page_holds_everything_it_shows(folder: Path) -> None:
    made, files = write_report(folder)
    page = _Page()
    page.feed(files[0].read_text())
    assert len(page.sources) == 3
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    for line in made.fit.lines:
        assert f"{line.L_inf:.4f}" in page.text
        assert f"{line.r2:.4f}" in page.text
    for run in sweep_table(folder).itertuples():
        assert str(run.id) in page.text
    assert f"expect a loss of {made.prediction.loss:.4f}" in page.text
    for warning in made.warnings:
        assert warning in page.text
    for png in files[1:]:
        height, width = matplotlib.image.imread(png).shape[:2]
        assert height > 500
        assert width > 800


def test_report_and_plan_take_a_horizon(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--T=5000"]) == 0
    assert "Plan: at T=5000" in capsys.readouterr().out
    assert main(["plan", str(folder), "--T=777"]) == 0
    said = capsys.readouterr().out
    rate = re.search(r"at T=777 use eta_ref\*=(\S+), a peak rate of (\S+),", said)
    assert rate
    assert float(rate[2]) == pytest.approx(float(rate[1]) / 777**0.5, rel=1e-3)
    assert main(["plan", str(folder), "--T=0"]) == 2


def test_an_unfinished_sweep_is_reported_as_such(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "part")
    gone = sweep_table(folder)["id"][3]
    shutil.rmtree(tmp_path / "part" / gone)
    assert "1 of the sweep's 8 runs are missing; run it again to go on" in plan(tmp_path / "part").warnings
