"""How long the phases of a step take, and what that means in tokens per second, utilisation and memory."""

import resource
import time
from typing import Any

import torch

from training import plan


class Timer:
    """Seconds per phase of a step. A GPU runs behind Python: where `wait_for` is one, each lap waits for it."""

    def __init__(self, wait_for: torch.device | None):
        self.wait = wait_for is not None and wait_for.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.start = self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase; the next one begins."""
        if self.wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase], self.last = now - self.last, now

    def total(self) -> float:
        """Seconds from the start to the last lap."""
        return self.last - self.start

    def speed(self, tokens: int, flops_per_token: float, processes: int, device: torch.device) -> dict[str, Any]:
        """What is logged of a step's speed: `tokens` were trained on by all processes together."""
        return {
            "tokens_per_second": tokens / self.total(),
            "model_flops_utilisation": plan.utilisation(tokens * flops_per_token, self.total(), processes, device),
            "peak_memory_gib": peak_memory_gib(device),
            "seconds": self.seconds,
        }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process, in GiB: on its GPU, or, without one, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
