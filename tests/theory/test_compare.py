"""Schedules in a word, rates from files, and the table that compares them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cdl
from cdl.theory.bounds import average_bound, bound
from cdl.theory.compare import arguments_of, compare, read_numbers, read_rates


def test_the_table_says_what_the_bounds_say() -> None:
    schedules = {"a": cdl.schedule("cosine", 100, peak=0.02), "b": cdl.schedule("wsd", 70, peak=0.1)}
    table = compare(schedules, 1.5, 0.5).set_index("schedule")
    for name, eta_T in schedules.items():
        row = table.loc[name]
        assert row["bound"] == bound(eta_T, 1.5, 0.5) == pytest.approx(row["distance"] + row["noise"])
        assert row["average"] == average_bound(eta_T, 1.5, 0.5)
        assert bound(eta_T * row["best_peak"] / row["peak"], 1.5, 0.5) == pytest.approx(row["best_bound"], rel=1e-14)


def test_a_schedule_that_never_moves_is_a_row_too() -> None:
    row = compare({"zeros": np.zeros(3)}).iloc[0]
    assert row["bound"] == np.inf
    assert np.isnan(row["best_peak"])


def test_a_schedule_in_a_word() -> None:
    expected = cdl.schedule("step", 40, peak=0.5, at=(0.3, 0.6), factor=0.5)
    np.testing.assert_array_equal(read_rates("step:at=(0.3, 0.6),factor=0.5,peak=0.5", 40), expected)
    np.testing.assert_array_equal(read_rates("step:at=(0.3, 0.6),factor=0.5,T=40", 7, peak=0.5), expected)
    assert arguments_of("wsd:form=sqrt") == ("wsd", {"form": "sqrt"})
    for text in ("wsd:0.1", "wsd:**a", "wsd:decay=f()", "wsd:decay=", "wsd:a=1,a=2", "wsd:)"):
        with pytest.raises(cdl.UserError, match="must look like"):
            arguments_of(text)


@pytest.mark.parametrize("form", ["npy", "txt", "csv", "table"])
def test_rates_from_files(form: str, tmp_path: Path) -> None:
    eta_T = np.array([0.1, 0.25, 1e-7])
    path = tmp_path / f"rates.{'csv' if form == 'table' else form}"
    if form == "npy":
        np.save(path, eta_T)
    elif form == "txt":
        np.savetxt(path, eta_T)
    elif form == "csv":
        pd.DataFrame({"anything": eta_T}).to_csv(path, index=False)
    else:
        pd.DataFrame({"step": [1, 2, 3], "learning_rate": eta_T, "loss": [3.0, 2.0, 1.0]}).to_csv(path, index=False)
    np.testing.assert_array_equal(read_rates(str(path)), eta_T)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "has columns a, b; name that of the rates eta"),
        ("one\ntwo\nthree\n", "holds no numbers"),
        ("", "holds no numbers"),
        ("eta\n", "holds no numbers"),
    ],
)
def test_files_without_rates(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    path.write_text(content)
    with pytest.raises(cdl.UserError, match=said):
        read_numbers(str(path))
