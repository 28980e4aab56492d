"""Signals that ask a run to stop: it saves at the next step boundary, all processes at the same one."""

import signal
import threading
from typing import NoReturn

from common.config import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # a scheduler's end, its early warning, Ctrl-C


class Signals:
    """From listen() on, records signals instead of dying of them; as a context, puts the old handlers back.

    The second signal of a kind does what it always did, for the impatient.
    """

    def __init__(self):
        self.seen: set[int] = set()
        self.before: dict = {}

    def __enter__(self) -> "Signals":
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            self.before = {number: signal.signal(number, self._record) for number in SIGNALS}

    def _record(self, number: int, frame) -> None:
        self.seen.add(number)
        signal.signal(number, self.before[number])

    def received(self) -> list[bool]:
        """For each of SIGNALS whether this process has got it."""
        return [number in self.seen for number in SIGNALS]


def stop(received: list[float], message: str) -> NoReturn:
    """Raise Interrupted with the first of SIGNALS that any process has received."""
    number = next(s for s, got in zip(SIGNALS, received, strict=True) if got)
    raise Interrupted(f"{number.name}: {message}", number)
