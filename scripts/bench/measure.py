"""What the benchmarks share: interleaved repeats, medians, a table and a JSON file."""

import importlib.machinery
import importlib.util
import json
import platform
import resource
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of a call, until the device is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times after a warm-up, in turn: what disturbs the machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            spent = seconds(call)
            if i:
                times[name].append(spent)
    return times


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has held: of its GPU, or resident. `reset`: of a GPU, since now."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def median(values: list[float]) -> float:
    return statistics.median(values)


def hardware() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows of the same keys as a table; numbers with three digits."""
    text = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *text, strict=True)]
    for first, *others in [list(rows[0]), *text]:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


def write(path: str, content: dict[str, Any]) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"hardware": hardware(), **content}, indent=1) + "\n")
        print(f"saved {path}")


def allow_missing(package: str) -> None:
    """Let modules that import a package which is not installed be imported, for those of their functions that go
    without it."""
    if importlib.util.find_spec(package) is None:
        import transformers  # noqa: F401 - looks for itself which packages are there, before this one seems to be

        stand_in = unittest.mock.MagicMock(name=package)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(package, None)
        sys.modules.update({name: stand_in for name in (package, f"{package}.utils.logging", f"{package}.exceptions")})
