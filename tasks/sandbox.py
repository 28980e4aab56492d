"""Running untrusted programs: bubblewrap, limits, and a verdict that the program cannot write itself.

Every program gets two processes, each in a sandbox of its own: the candidate (the program) and its judge (reference
solution and tests), joined by a socket alone; inside.py says what they speak. A sandbox has its own user, pid, network,
ipc and mount namespaces, no environment, the system and Python's folders read-only, 64 MiB of private /tmp, neither
/proc nor /sys nor /etc nor /home, and limits on memory, CPU time, processes, file size and open files.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from config import UserError

HERE = Path(__file__).parent
NOBODY = 65534
MIB = 1 << 20
PATIENCE = 30  # seconds that two sandboxes may take to start, on a busy machine


@dataclass(frozen=True)
class Limits:
    """Of each of the two processes of a program; EvalPlus has 4 GiB too."""

    memory_mib: int = 4096
    tmp_mib: int = 64  # of /tmp, and of one file
    processes: int = 8  # and threads
    open_files: int = 64

    def rlimits(self, seconds: float) -> dict[str, int]:
        return {
            "RLIMIT_AS": self.memory_mib * MIB,
            "RLIMIT_CPU": int(seconds) + 2,
            "RLIMIT_FSIZE": self.tmp_mib * MIB,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


@dataclass
class Job:
    """A program and who judges it: `judge` is a function of judges.py, `data` its argument, JSON-able."""

    judge: str
    data: dict[str, Any]
    seconds: float  # wall time for everything after the start
    limits: Limits = field(default_factory=Limits)


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def python_folders() -> tuple[str, list[str], list[str]]:
    """(interpreter, folders that it needs, folders of packages). No virtual environment is entered: -S."""
    packages = {os.path.realpath(sysconfig.get_path(k)) for k in ("purelib", "platlib")}
    folders = sorted({os.path.realpath(sys.base_prefix), *packages} - {"/usr"})
    return os.path.realpath(sys.executable), [f for f in folders if not f.startswith("/usr/")], sorted(packages)


def hidden_parent(folder: str) -> str | None:
    """The outermost parent folder that other users cannot pass, such as /root."""
    return next((str(p) for p in reversed(Path(folder).parents) if not p.stat().st_mode & 0o001), None)


@functools.cache
def bubblewrap(limits: Limits) -> list[str]:
    """The words before the program's."""
    _, folders, _ = python_folders()
    words = []
    if os.geteuid() == 0:
        # The kernel does not count root's processes, also not in a user namespace: another user starts the sandbox.
        # Where that user could not read Python's folders, a first mount namespace shows them alone.
        if hidden := {f: p for f in folders if (p := hidden_parent(f))}:
            words += ["bwrap", "--die-with-parent", "--dev-bind", "/", "/"]
            words += [w for p in sorted(set(hidden.values())) for w in ("--tmpfs", p)]
            for folder, parent in hidden.items():
                between = [p for p in reversed(Path(folder).parents) if p.is_relative_to(parent) and str(p) != parent]
                words += [w for p in between for w in ("--dir", str(p))]  # readable, where --ro-bind makes private ones
                words += ["--ro-bind", folder, folder]
            words += ["--"]
        words += ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    words += ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    words += ["--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # threads count as processes
        words += ["--setenv", name, "1"]
    words += ["--setenv", "PYTHONHASHSEED", "0"]
    words += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            words += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    words += [w for f in folders for w in ("--ro-bind", f, f)]
    words += [w for f in ("null", "zero", "random", "urandom") for w in ("--dev-bind", f"/dev/{f}", f"/dev/{f}")]
    words += ["--size", str(limits.tmp_mib * MIB), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/", "--"]
    return words


def start(role: str, job: Job, sock: socket.socket, unsafe: bool, **streams) -> subprocess.Popen:
    """Start one of the two processes at its end of the socket."""
    interpreter, _, packages = python_folders()
    arguments = {
        "role": role,
        "fd": sock.fileno(),
        "paths": packages,
        "limits": job.limits.rlimits(job.seconds),
    }
    python = [interpreter, "-s", "-S", "-P", "-B", "-c", (HERE / "inside.py").read_text(), json.dumps(arguments)]
    return subprocess.Popen(
        python if unsafe else bubblewrap(job.limits) + python,
        pass_fds=[sock.fileno()],
        start_new_session=True,
        **streams,
    )


def run(job: Job, unsafe: bool = False) -> dict[str, Any]:
    """The judge's verdict on one program, see judges.py.

    Raises:
        UserError: the sandbox did not start.
    """
    ours, theirs = socket.socketpair()
    processes = []
    try:
        candidate = start(
            "candidate",
            job,
            theirs,
            unsafe,
            **dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL),
            stderr=subprocess.DEVNULL,
        )
        processes.append(candidate)
        judge = start("judge", job, ours, unsafe, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(judge)
        ours.close()  # each side learns from the socket when the other has ended
        theirs.close()
        words = {
            "judges": (HERE / "judges.py").read_text(),
            "judge": job.judge,
            "data": job.data,
            "seconds": job.seconds,
            "patience": PATIENCE,
        }
        try:
            out, err = judge.communicate(json.dumps(words).encode(), timeout=PATIENCE + job.seconds + 5)
        except subprocess.TimeoutExpired:
            return {"base": "timeout", "plus": "timeout", "reason": "the judge did not end"}
    finally:
        for process in processes:
            kill(process)
    verdict = json.loads(out) if out else {"status": "no verdict", "error": err.decode(errors="replace")[-500:]}
    return verdict


def kill(process: subprocess.Popen) -> None:
    """End a sandbox: its processes die with the one that started them, in a pid namespace of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()
