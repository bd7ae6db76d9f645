"""Schedules side by side, and how they are written in one word: ``wsd:decay=0.2,form=sqrt``, or a file of rates."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jax.typing import ArrayLike

from cdl.errors import UserError, unknown
from cdl.schedules import SHAPES, schedule
from cdl.theory.bounds import bound_terms

__all__ = ["arguments_of", "compare", "read_numbers", "read_rates"]

_COLUMNS = ("eta", "lr", "learning_rate", "rate")  # of a table, the first that it has


def compare(schedules: Mapping[str, ArrayLike], D: float = 1.0, G: ArrayLike = 1.0) -> pd.DataFrame:
    """One row per schedule: its last-iterate bound with its terms, the average iterate's, and both at the best peak.

    Args:
      schedules: name -> rates, [T] each, of any length.
      D, G: as in `bound`.

    Returns:
      Columns schedule, T, peak, bound, distance, noise, average (of the average iterate), best_peak, best_bound.
      Bounds are without L*.
    """
    rows = []
    for name, eta_T in schedules.items():
        eta_T = np.asarray(eta_T, np.float64)
        terms, average = bound_terms(eta_T, D, G), bound_terms(eta_T, D, G, iterate="average")
        peak = eta_T.max()
        rows.append(
            dict(
                schedule=name,
                T=len(eta_T),
                peak=float(peak),
                bound=terms.total,
                distance=terms.distance,
                noise=terms.noise,
                average=average.total,
                best_peak=float(peak * terms.best_scale if peak > 0 else np.nan),
                best_bound=terms.best,
            )
        )
    return pd.DataFrame(rows)


def arguments_of(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of ``name:key=value,key=value``; values as in Python, words without quotes.

    >>> arguments_of("step:at=(0.3, 0.6),factor=0.5")
    ('step', {'at': (0.3, 0.6), 'factor': 0.5})
    """
    name, _, rest = text.partition(":")
    try:
        call = ast.parse(f"f({rest})", mode="eval").body
        given = call.keywords if isinstance(call, ast.Call) and not call.args else []
        keys = [str(k.arg) for k in given if k.arg is not None]
        if len(set(keys)) != len(given) or bool(rest.strip()) != bool(given):
            raise ValueError(text)
        values = [k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value) for k in given]
    except (SyntaxError, ValueError) as e:
        raise UserError(f"{text!r} must look like wsd:decay=0.2,form=sqrt") from e
    return name, dict(zip(keys, values, strict=True))


def read_rates(text: str, T: int | None = None, **defaults: Any) -> np.ndarray:
    """The rates of a schedule given in a word: ``name``, ``name:key=value,..``, or a file; float64 [T].

    Args:
      text: a name of `cdl.schedules.SHAPES` with arguments of `schedule`, T among them; or a path for `read_numbers`.
      T: horizon where the text has none. Not for files, which have their own.
      **defaults: arguments where the text has none, such as peak.
    """
    if text.partition(":")[0] in SHAPES:
        name, given = arguments_of(text)
        arguments = defaults | given
        horizon = arguments.pop("T", T)
        if horizon is None:
            raise UserError(f"{text!r} has no horizon; give T")
        return schedule(name, horizon, **arguments)
    if not Path(text).exists():
        if Path(text).suffix:
            raise UserError(f"{text} does not exist; give a schedule ({', '.join(SHAPES)}) or a file of rates")
        raise unknown("schedule or file", text, SHAPES)
    return read_numbers(text)


def read_numbers(path: str) -> np.ndarray:
    """The numbers of a .npy file, of a text file with one on each line, or of a CSV file's only column or its rates."""
    file = Path(path)
    try:
        if file.suffix == ".npy":
            numbers = np.load(file)
        else:
            table = pd.read_csv(file, header=None)
            if not all(pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes):
                table = pd.read_csv(file)
            if "step" in table.columns and list(table["step"]) != list(range(1, len(table) + 1)):
                some = ", ".join(map(str, table["step"].head(2)))
                raise UserError(f"{path} is a log with some steps only ({some}, ..); give the rate of every update")
            column = next((c for c in _COLUMNS if c in table.columns), table.columns[0])
            if len(table.columns) > 1 and column not in _COLUMNS:
                raise UserError(f"{path} has columns {', '.join(map(str, table.columns))}; name that of the rates eta")
            numbers = table[column].to_numpy(np.float64)
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist; give a number, or a file of numbers") from e
    except (ValueError, TypeError, pd.errors.ParserError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} holds no numbers: {str(e).splitlines()[0]}; give one on each line, or .npy") from e
    if numbers.ndim != 1 or len(numbers) == 0 or numbers.dtype.kind not in "fiu":
        raise UserError(f"{path} holds no numbers in one row (shape {numbers.shape}); give one on each line, or .npy")
    return np.asarray(numbers, np.float64)
