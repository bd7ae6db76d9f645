"""The one error type for bad input, the wording that all of it shares, and what follows from it."""

import difflib
import sys
from collections.abc import Callable, Iterable

# Called with its exit code when a command has failed and has said so.
at_failure: list[Callable[[int], None]] = []


class UserError(ValueError):
    """Input that the caller can mend: one line that names the value and the fix.

    The command line prints it without a traceback and exits with status 2.
    """


class Terminated(KeyboardInterrupt):
    """Interrupted by SIGTERM instead of Ctrl-C."""


def unknown(kind: str, value: object, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist: says which, the nearest one, and all there are."""
    names = sorted(known)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return UserError(f"there is no {kind} {value!r}; {hint}")


def check_share(field: str, value: float) -> None:
    """Raises UserError where the value of a field is no share."""
    if not 0 < value < 1:
        raise UserError(f"{field}={value!r} must be a share in (0, 1)")


def say(line: str) -> None:
    """What a person should know at once, though the work goes on: a line on stderr."""
    print(f"cdl: {line}", file=sys.stderr, flush=True)
