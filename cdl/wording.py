"""Words that all views of runs share. Imports nothing, so that looking at results is quick."""

from collections.abc import Mapping
from typing import Any

__all__ = ["LINE_SECONDS", "duration", "finished_line"]

LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def finished_line(number: int, total: int, eta_ref: float, T: int, result: Mapping[str, Any]) -> str:
    """What is said of a run that has ended, in Rich's markup. number, total: of how many it is which to end."""
    loss = f"loss {result['loss']:.4f}" if result["loss"] is not None else f"[red]{result['status']}[/red]"
    replaced = result.get("images_replaced")
    return (
        f"[{number:>{len(str(total))}}/{total}]  eta_ref {eta_ref:<6g}  T {T:<6}  {loss}  "
        f"({duration(result['seconds'])}){f'  {replaced} broken images replaced' if replaced else ''}"
    )
