"""`cdl fit` and `cdl forecast` as typed: output, files, and wrong input, one line each."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cdl.cli import LAWS, main
from cdl.laws import curve

from .laws.test_curve import SHAPES, law, table


def typed(command: str) -> int:
    return main(command.split())


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three logs as trainers write them, and tables of final losses."""
    for name, run in table(noise=1e-3).groupby("run"):
        seen = run.dropna().rename(columns={"eta": "lr"})
        seen[["step", "lr", "loss"]].to_csv(tmp_path / f"{name}.csv", index=False)
    eta = np.geomspace(1e-4, 1e-2, 9)
    rng = np.random.default_rng(0)
    losses = 3 + 1e-4 / eta + 20 * eta + 1e-3 * rng.standard_normal(9)
    pd.DataFrame({"eta": eta, "loss": losses, "T": 1000}).to_csv(tmp_path / "peaks.csv", index=False)
    tokens = np.geomspace(1e9, 1e11, 7)
    losses = 2 + 3e4 / np.sqrt(tokens) + 1e-3 * rng.standard_normal(7)
    pd.DataFrame({"tokens": tokens, "loss": losses}).to_csv(tmp_path / "tokens.csv", index=False)
    (tmp_path / "horizons.csv").write_text("T,eta,loss\n100,0.1,3\n200,0.1,2\n")
    (tmp_path / "flat.csv").write_text("step,lr,loss\n" + "".join(f"{s},0.1,2.5\n" for s in range(1, 30)))
    (tmp_path / "nan.csv").write_text("step,lr,loss\n1,0.1,nan\n2,0.1,nan\n")
    (tmp_path / "words.csv").write_text("step,lr,loss\n1,0.1,good\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_curve_prints_both_samples_and_writes_all_points(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("fit curve cosine.csv constant.csv --test drop.csv --plot=fit.html --csv=points.csv") == 0
    printed = capsys.readouterr()
    assert "convex law: L_inf = " in printed.out
    assert "2nd half from 1st" in printed.out
    assert "Other runs, predicted:" in printed.out
    assert "Note: cosine, constant: rates are recorded every 20 steps and interpolated between." in printed.err
    points = pd.read_csv("points.csv")
    assert set(points.loc[points["fitted"], "run"]) == {"cosine", "constant"}
    other = points[~points["fitted"]]
    assert (other["low"] < other["predicted"]).all()
    assert (other["predicted"] < other["high"]).all()
    fit = curve.fit_curve(["cosine.csv", "constant.csv"])
    np.testing.assert_allclose(
        other["predicted"], fit.predict(curve.trajectories("drop.csv")[0].eta_T, other["step"].to_numpy())
    )
    page = Path("fit.html").read_text()
    assert "<svg" in page
    assert "convex law: L_inf" in page
    assert 'src="' not in page  # self-contained


def test_all_laws(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("fit curve cosine.csv constant.csv --test drop.csv --law=all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("Warning: ")] == ["law", *LAWS]


@pytest.mark.slow
def test_all_laws_keep_their_warnings(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("fit curve constant.csv --law=all") == 0
    assert "Warning: paper: the rate is 0.001 at all losses fitted" in capsys.readouterr().out


def test_names_of_laws_are_those_of_the_package() -> None:
    assert LAWS == curve.LAWS


def test_forecast(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ["cosine:T=4000,peak=1e-3,warmup=0.05", "cosine:peak=2e-3"]
    command = ["forecast", "cosine.csv", "constant.csv", "drop.csv", "--to", *to, "--T=3000", "--csv=f.csv"]
    assert main([*command, "--plot=f.png"]) == 0
    printed = capsys.readouterr().out
    assert "Warning: cosine:peak=2e-3: it peaks at 0.002, the runs fitted at 0.001" in printed
    forecast = pd.read_csv("f.csv")
    last = forecast.groupby("schedule").last()
    assert last.loc[to[0], "step"] == 4000
    assert last.loc[to[1], "step"] == 3000
    assert ((forecast["low"] < forecast["loss"]) & (forecast["loss"] < forecast["high"])).all()
    assert Path("f.png").stat().st_size > 10_000


def test_forecast_of_a_run_that_goes_on(logs: Path) -> None:
    """The first half and the whole schedule give the second half."""
    log = pd.read_csv("cosine.csv")
    log[log["step"] <= 1000].to_csv("begun.csv", index=False)
    np.savetxt("rates.txt", SHAPES["cosine"])
    assert typed("forecast begun.csv constant.csv --to rates.txt --csv=f.csv") == 0
    last = pd.read_csv("f.csv").iloc[-1]
    assert last["low"] < law(SHAPES["cosine"], np.array([2000]))[0] < last["high"]


def test_peak_and_horizon(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("fit peak peaks.csv --plot=peak.png --csv=peak_law.csv") == 0
    assert "eta_peak" in capsys.readouterr().out
    drawn = pd.read_csv("peak_law.csv")
    assert drawn.loc[drawn["loss"].idxmin(), "eta"] == pytest.approx(np.sqrt(1e-4 / 20), rel=0.1)
    assert typed("fit horizon tokens.csv --x=tokens --to=1e12 --csv=line.csv --plot=line.svg") == 0
    line = pd.read_csv("line.csv").iloc[0]
    assert line["low"] < 2 + 3e4 / 1e6 < line["high"]
    assert line["L_inf"] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fit", "required: LAW"),
        ("fit curves", "invalid choice: 'curves'"),
        ("fit curve", "required: RUN"),
        ("fit curve absent.csv", "absent.csv does not exist"),
        ("fit curve flat.csv", "all losses are 2.5: there is nothing to fit"),
        ("fit curve nan.csv", "no finite loss"),
        ("fit curve words.csv", "words.csv"),
        ("fit curve cosine.csv --law=convx", "invalid choice: 'convx'"),
        ("fit curve cosine.csv --until=2", "until=2.0 must be a part of the run"),
        ("fit curve cosine.csv --after=1e6", "there are no recorded losses after step 1000000"),
        ("fit curve cosine.csv --loss=los", "los"),
        ("fit curve cosine.csv --schedule=cosine:T=100,peak=1", "shorter"),
        ("fit curve cosine.csv --schedule=cosin:T=100", "cosin"),
        ("fit curve cosine.csv --plot=fit.bmp", "must end in .png, .pdf, .svg or .html"),
        ("fit curve cosine.csv --csv=cosine.csv", "would overwrite another file"),
        ("fit curve cosine.csv --test drop.csv --after=3000", "--after=3000 leaves no loss of the runs to test on"),
        ("fit curve cosine.csv --after=-5", "after=-5 must be a step"),
        ("fit curve . --csv=cosine.csv", "would overwrite another file"),
        ("fit curve c*.csv --csv=cosine.csv", "would overwrite another file"),
        ("fit curve cosine.csv --schedule=peaks.csv --csv=peaks.csv", "would overwrite another file"),
        ("forecast cosine.csv --to cosine.csv", "cosine.csv is a log with some steps only (100, 120, ..)"),
        ("fit horizon tokens.csv --x=tokens --to=-5", "--to=-5.0 must be a positive number of tokens"),
        ("forecast cosine.csv", "required: --to"),
        ("forecast cosine.csv --to cosine", "'cosine' has no horizon; give T"),
        ("forecast cosine.csv --to cosine:T=100 --level=1", "level=1.0 must lie between 0 and 1"),
        ("fit peak absent.csv", "absent.csv does not exist"),
        ("fit peak tokens.csv", "columns"),
        ("fit peak peaks.csv --T=7", "--T=7 is not in peaks.csv"),
        ("fit peak horizons.csv", "horizons.csv has several horizons and (4.1) is for one; give --T=200"),
        ("fit horizon peaks.csv --x=tokens", "tokens"),
        ("fit horizon cosine.csv", "T"),
    ],
)
def test_wrong_input(logs: Path, capsys: pytest.CaptureFixture[str], command: str, said: str) -> None:
    before = set(logs.iterdir())
    try:
        code = typed(command)
    except SystemExit as e:  # argparse
        code = e.code
    printed = capsys.readouterr()
    assert code == 2
    last = printed.err.strip().splitlines()[-1]
    assert said in last
    assert all(line.startswith("Note: ") for line in printed.err.strip().splitlines()[:-1])
    assert set(logs.iterdir()) == before
