"""What the benchmarks share: interleaved repeats, medians, a table and a JSON file."""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import platform
import resource
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


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, prepare: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times after a warm-up, in turn: what disturbs the machine disturbs all alike.

    `prepare` comes before each call and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            prepare()
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


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a package that is not installed, and its modules: empty ones, which have any name that is asked for."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        ours = name.split(".")[0] == self.package
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec):
        return unittest.mock.MagicMock(name=spec.name)

    def exec_module(self, module):
        pass


def allow_missing(package: str) -> None:
    """Let modules that import a package which is not installed be imported, for those of their functions that go
    without it."""
    if not is_there(package):
        import transformers  # noqa: F401 - looks for itself which packages are there, before this one seems to be

        sys.meta_path.insert(0, StandIn(package))


def is_there(package: str) -> bool:
    """Whether a package is installed."""
    spec = importlib.util.find_spec(package)
    return spec is not None and not isinstance(spec.loader, StandIn)
