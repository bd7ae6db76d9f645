"""`cdl`, in which runs of FAULTY_T updates go wrong after five batches: they raise (FAULTY=raise) or take down all.

FAULTY=abort FAULTY_T=60 python tests/launch/faulty.py worker runs/x
"""

import dataclasses
import os
import sys
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


if __name__ == "__main__":
    run._run_of = run_of
    sys.exit(main())
