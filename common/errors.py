"""What the user gets to see when something is wrong: one line and an exit code, no traceback."""

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the ValueErrors of a library, its complaints about arguments that the user chose, into UserErrors."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from e


class Interrupted(Exception):
    """A signal has ended a run that can be resumed: one line, and exit code 128 + the signal's number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def run_main(main: Callable[[], Any], program: str) -> NoReturn:
    """Run a program's main: a UserError becomes one line on standard error and exit code 2, a signal 128 + number."""
    try:
        main()
    except UserError as e:
        tqdm.write(f"{program}: error: {' '.join(str(e).split())}", sys.stderr)  # on a line of its own, bar or not
        sys.exit(2)
    except Interrupted as e:
        tqdm.write(f"{program}: {e}", sys.stderr)
        sys.exit(128 + e.number)
    except KeyboardInterrupt:
        tqdm.write(f"{program}: interrupted; what it had saved is in its output_dir", sys.stderr)
        sys.exit(130)
    sys.exit(0)


def one_line(e: BaseException, most: int = 300) -> str:
    """The beginning of an exception's text, or its name where it has none."""
    return " ".join(str(e).split())[:most] or type(e).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or, where nothing is near, the known words."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
