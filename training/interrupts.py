"""Signals that ask a run to stop: it saves at the next step boundary, all processes at the same one."""

import signal
import threading
import time
from typing import NoReturn

import torch
from accelerate import Accelerator

from common.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # a scheduler's end, its early warning, Ctrl-C
ECHO = 2.0  # seconds: torchrun hands Ctrl-C on to processes that the terminal has sent it to already


class Signals:
    """From listen() on, records signals instead of dying of them; as a context, puts the old handlers back.

    The second signal of a kind, unless it is the first one's echo, does what it always did, for the impatient.
    """

    def __init__(self):
        self.seen: dict[int, float] = {}  # signal: the time of its first arrival
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
        first = self.seen.setdefault(number, time.monotonic())
        if time.monotonic() - first > ECHO:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)

    def agree(
        self, sums: torch.Tensor, time_to_save: bool, accelerator: Accelerator
    ) -> tuple[list[float], bool, list[bool]]:
        """What all processes do after this step, and a step's sums over all of them: one collective for everything.

        Args:
            sums: (n,) fp64, this process's part.
            time_to_save: counts on the main process alone, since clocks differ.
        Returns:
            The sums, whether it is time to save, and for each of SIGNALS whether any process has got it.
        """
        flags = [time_to_save and accelerator.is_main_process, *(number in self.seen for number in SIGNALS)]
        total = accelerator.reduce(torch.cat([torch.tensor(flags).to(sums), sums]), "sum").tolist()
        save, *received = map(bool, total[: len(flags)])
        return total[len(flags) :], save, received


def stop(received: list[bool], saved_step: int, total_steps: int) -> NoReturn:
    """Raise Interrupted with the first of SIGNALS that any process has received, what is saved, and how to go on.

    saved_step is 0 where no step has had a finite gradient: there is nothing to save.
    """
    number = next(s for s, got in zip(SIGNALS, received, strict=True) if got)
    saved = f"saved step {saved_step} of {total_steps}" if saved_step else "nothing is saved, no step was taken"
    raise Interrupted(f"{number.name}: {saved}; the same command with --resume goes on", number)
