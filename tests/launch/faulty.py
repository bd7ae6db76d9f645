"""`cdl`, in which something goes wrong.

FAULTY=raise FAULTY_T=60 python tests/launch/faulty.py worker runs/x    # runs of 60 updates raise at the sixth
FAULTY=abort FAULTY_T=60 python tests/launch/faulty.py worker runs/x    # or take their process down
FAULTY=clock python tests/launch/faulty.py worker runs/x                # its clock is set back all the time
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from cdl.cli import main
from cdl.sweep import run

plain = run._run_of


def run_of(point: Any, *others: Any) -> Any:
    made = plain(point, *others)

    def batches(first: int) -> Iterator[Any]:
        for n, batch in enumerate(made.batches(first)):
            if first + n >= 5:
                if os.environ["FAULTY"] == "raise":
                    raise RuntimeError("a cosmic ray")
                os.abort()
            yield batch

    wrong = point.config.T == int(os.environ["FAULTY_T"])
    return dataclasses.replace(made, batches=batches) if wrong else made


def set_clock_back() -> None:
    began, now, now_ns = time.monotonic(), time.time, time.time_ns
    time.time = lambda: now() - 3600 * (time.monotonic() - began)
    time.time_ns = lambda: now_ns() - int(3600e9 * (time.monotonic() - began))


if __name__ == "__main__":
    if os.environ["FAULTY"] == "clock":
        set_clock_back()
    else:
        run._run_of = run_of
    sys.exit(main())
