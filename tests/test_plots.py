"""Figures of bounds hold the numbers that they are about."""

import numpy as np

import cdl
from cdl.plots import bounds_figure, exam_figure


def test_bounds_figure_has_rates_and_bounds() -> None:
    rates = {"short": cdl.schedule("cosine", 50), "long": cdl.schedule("inv_sqrt", 10_000)}
    bounds = {name: cdl.bound_curve(eta_T) for name, eta_T in rates.items()}
    left, right = bounds_figure(rates, bounds).axes
    for ax, values in ((left, rates), (right, bounds)):
        for line, (name, y_T) in zip(ax.lines, values.items(), strict=True):
            step = np.asarray(line.get_xdata(), int)
            np.testing.assert_array_equal(line.get_ydata(), y_T[step - 1])
            assert step[0] == 1
            assert step[-1] == len(rates[name])
    assert [line.get_label() for line in left.lines] == ["short", "long"]


def test_exam_figure_has_both_terms() -> None:
    exams = [cdl.exam(name, method="numeric") for name in ("linear", "constant")]
    (ax,) = exam_figure(exams).axes
    for line, e in zip(ax.lines, exams, strict=True):
        np.testing.assert_allclose(line.get_ydata(), np.add(e.distance, e.noise))
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
