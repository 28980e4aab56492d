"""Judge untrusted text in worker processes, each call with a deadline and a limit on memory.

A formula can be as dangerous as a program: a tower of powers, a megabyte of brackets, a simplification without end. So
each is judged in a process that may be lost. The deadline is processor time, which does not depend on how busy the
machine is; a much longer one of the clock catches what only waits.

As a program (`python workers.py FILE FUNCTION SECONDS BYTES`) this file is such a worker: it calls the function of the
file with the arguments of each line of its input, and writes a line with the result. It imports nothing else, so that
a worker starts fast and can be limited tightly.
"""

import importlib.util
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

TIMEOUT, CRASH = "timeout", "crash"  # why a call gave no result


def call_all(
    file: Path, function: str, calls: list[tuple], workers: int, seconds: float = 5.0, memory: int = 2 << 30
) -> list[tuple[Any, str]]:
    """Call a function of a Python file with each tuple of arguments (of what JSON can hold), in worker processes.

    Args:
        file: imports by itself; its `prepare()`, if there is one, is called at a worker's start, without a deadline.
        seconds: processor time of one call; ten times that of the clock.
        memory: bytes of address space of a worker.
    Returns:
        for each call (result, "") or (None, why): TIMEOUT, or CRASH (an exception, too much memory, a dead process).
    Raises:
        RuntimeError: a worker does not start.
    """
    results: list[tuple[Any, str]] = [(None, CRASH)] * len(calls)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(calls)):
        todo.put(i)
    errors: list[BaseException] = []

    def work() -> None:
        worker = None
        try:
            while not errors:
                i = todo.get_nowait()
                worker = worker or Worker(file, function, seconds, memory)
                results[i] = worker.call(calls[i])
                if results[i][1]:
                    worker = worker.stop()
        except queue.Empty:
            pass
        except BaseException as e:
            errors.append(e)
        finally:
            if worker:
                worker.stop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(calls)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class Worker:
    """One process and the pipes to it."""

    def __init__(self, file: Path, function: str, seconds: float, memory: int):
        command = [sys.executable, "-P", __file__, str(file), function, str(seconds), str(memory)]
        self.seconds = seconds
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/"
        )
        if self._line(within=120) != b"ready\n":
            self.stop()
            raise RuntimeError(f"a worker process for {file.name} does not start: {' '.join(command)}")

    def call(self, arguments: tuple) -> tuple[Any, str]:
        """(result, "") or (None, why)."""
        try:
            self.process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None, CRASH
        line = self._line(within=10 * self.seconds)
        if line is None:
            return None, TIMEOUT
        if not line.endswith(b"\n"):
            return None, TIMEOUT if self.process.wait() == -signal.SIGPROF else CRASH
        return json.loads(line)

    def _line(self, within: float) -> bytes | None:
        """The next line of the worker; None after `within` seconds; cut, where the worker has died."""
        ready, _, _ = select.select([self.process.stdout], [], [], within)
        return self.process.stdout.readline() if ready else None

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def main(file: str, function: str, seconds: str, memory: str) -> None:
    """A worker: answer each line of standard input. Whatever the file prints goes nowhere."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, "prepare", lambda: None)()
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=results, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, float(seconds))  # SIGPROF ends the process, whatever it is doing
        try:
            answer = getattr(module, function)(*json.loads(line)), ""
            text = json.dumps(answer)
        except Exception:  # MemoryError and RecursionError among them
            text = json.dumps((None, CRASH))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(text, file=results, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
