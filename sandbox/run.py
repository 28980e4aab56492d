"""Running untrusted programs: bubblewrap, limits, and a verdict that the program cannot write itself.

Every program gets two processes, each in a sandbox of its own: the candidate (the program) and its judge (reference
solution and tests), joined by a socket alone; inside.py says what they speak. A sandbox has its own user, pid, network,
ipc and mount namespaces, no environment, the system and Python's folders read-only, 64 MiB of private /tmp, neither
/proc nor /sys nor /etc nor /home, a filter of system calls, and limits on memory, CPU time, processes, file size and
open files. docs/sandbox.md says what it promises and what it does not.
"""

import contextlib
import functools
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from sandbox import seccomp

HERE = Path(__file__).parent
NOBODY = 65534
MIB = 1 << 20
# The whole environment of a program. Threads count as processes; the order of sets is the same at every run.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
PATIENCE = 30  # seconds that two sandboxes may take to start, on a busy machine
PACKAGES = ("numpy",)  # that programs and tests may import; the benchmarks need no others


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
            "RLIMIT_CORE": 1,  # byte: none is written, and, unlike at 0, none is sent to the host's crash handler
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


@dataclass
class Trial:
    """A program and who judges it: `judge` is a function of judges.py, `data` its argument, JSON-able.

    The verdict comes at most `seconds + spare + 1` seconds after both processes have started.
    """

    judge: str
    data: dict[str, Any]
    seconds: float  # that the program, and the comparison of its answers, may take in all, by the clock
    spare: float = 3.0  # that the reference solution may take besides
    limits: Limits = field(default_factory=Limits)


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def python_folders() -> tuple[str, list[str], list[str]]:
    """(interpreter, folders that it needs, folders of packages). No virtual environment is entered: -S."""
    packages = {os.path.realpath(sysconfig.get_path(k)) for k in ("purelib", "platlib")}
    specs = [importlib.util.find_spec(name) for name in PACKAGES]
    packages |= {os.path.realpath(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
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
    words += [w for name, value in ENVIRONMENT.items() for w in ("--setenv", name, value)]
    words += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            words += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]  # where libraries are, /usr/local's too
    words += ["--dev", "/dev", "--size", str(limits.tmp_mib * MIB), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    words += [w for f in folders for w in ("--ro-bind", f, f)]  # after /tmp and /dev, below which they may lie
    words += [w for f in ("/", "/dev", "/dev/pts") for w in ("--remount-ro", f)]
    return words


def start(role: str, trial: Trial, sock: socket.socket, folder: str | None, **streams) -> subprocess.Popen:
    """Start one of the two processes at its end of the socket; in `folder` and without a sandbox if it is given."""
    interpreter, _, packages = python_folders()
    arguments = {
        "role": role,
        "fd": sock.fileno(),
        "paths": packages,
        "limits": trial.limits.rlimits(trial.seconds + trial.spare * (role == "judge")),
    }
    python = [interpreter, "-s", "-S", "-P", "-B", "-c", (HERE / "inside.py").read_text(), json.dumps(arguments)]
    if folder:
        return subprocess.Popen(
            python, cwd=folder, env=ENVIRONMENT, pass_fds=[sock.fileno()], start_new_session=True, **streams
        )
    words, fds = bubblewrap(trial.limits), [sock.fileno()]
    with contextlib.ExitStack() as files:
        if filter := seccomp.program():
            file = files.enter_context(open(os.memfd_create("seccomp"), "w+b", buffering=0))
            file.write(filter)
            file.seek(0)
            words, fds = [*words, "--seccomp", str(file.fileno())], [*fds, file.fileno()]
        return subprocess.Popen([*words, "--", *python], pass_fds=fds, start_new_session=True, **streams)


def run(trial: Trial, unsafe: bool = False) -> dict[str, Any]:
    """The judge's verdict on one program, see judges.py; without a sandbox if `unsafe`.

    Raises:
        UserError: the sandbox did not start, and not at the second try either.
    """
    for _ in range(2):
        out, err, late = _run(trial, unsafe)
        started, _, verdict = out.partition("\n")
        if started == "started":
            try:
                return json.loads(verdict)
            except ValueError:  # the judge ran out of memory or time: the fault of what the program sent
                status = "timeout" if late else "failed"
                return {"base": status, "plus": status, "crashed": True, "reason": f"the judge ended: {err[-200:]}"}
    raise UserError(f"the sandbox did not start: {' '.join(err.split())[-300:] or 'it was silent'}")


def _run(trial: Trial, unsafe: bool) -> tuple[str, str, bool]:
    """What the judge wrote to stdout and stderr, and whether it was ended for its time; no process is left."""
    task = {
        "judges": (HERE / "judges.py").read_text(),
        "judge": trial.judge,
        "data": trial.data,
        "seconds": trial.seconds,
        "patience": PATIENCE,
    }
    quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
    one, other = socket.socketpair()
    with (
        tempfile.TemporaryDirectory() if unsafe else contextlib.nullcontext() as folder,
        tempfile.TemporaryFile() as stdin,
        contextlib.ExitStack() as ends,
    ):
        stdin.write(json.dumps(task).encode())
        stdin.seek(0)
        with one, other:  # closed here, so that each side learns when the other has ended
            candidate = start("candidate", trial, one, folder, stdin=quiet, stdout=quiet, stderr=quiet)
            ends.callback(kill, candidate)
            judge = start("judge", trial, other, folder, stdin=stdin, stdout=pipe, stderr=pipe)
            ends.callback(kill, judge)
        ready, _, _ = select.select([judge.stdout], [], [], PATIENCE + 5)  # until it says "started", or ends
        try:
            out, err = judge.communicate(timeout=trial.seconds + trial.spare + 1 if ready else 0)
            late = judge.returncode in [-n for n in TOO_LATE] + [128 + n for n in TOO_LATE]  # bubblewrap's code
        except subprocess.TimeoutExpired as e:
            out, err, late = e.stdout or b"", b"did not end in time", True
    return out.decode(errors="replace"), err.decode(errors="replace"), late


TOO_LATE = (signal.SIGPROF, signal.SIGXCPU)  # what ends a judge that has taken too much processor time


def kill(process: subprocess.Popen) -> None:
    """End a sandbox: all its processes die with the first one of their pid namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


def run_all(trials: Sequence[Trial], workers: int = 1, unsafe: bool = False, show: str = "") -> list[dict[str, Any]]:
    """The verdicts on many programs, `workers` at a time.

    A program that times out runs once more, alone, since a busy machine may be to blame: its verdict says `again`.
    """
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda trial: run(trial, unsafe), trials)
        verdicts = list(tqdm(done, total=len(trials), desc=show, unit="program", disable=not show))
    for i, verdict in enumerate(verdicts):
        if workers > 1 and timed_out(verdict):
            verdicts[i] = {**run(trials[i], unsafe), "again": True}
    return verdicts


def timed_out(verdict: dict[str, Any]) -> bool:
    return "timeout" in (verdict.get("base"), verdict.get("plus"))


# ---------------------------------------------------------------------------------------------------------------------
# Does it hold on this machine?
# ---------------------------------------------------------------------------------------------------------------------

# What a program must not be able to do, each as an expression that is true where it can.
PROBE = """
import importlib, mmap, os, signal, socket

OUTSIDE = "", "/usr", "/dev", "/dev/shm", os.path.dirname(os.__file__)

def can(f, *arguments):
    try:
        return bool(f(*arguments))
    except OSError:
        return False

def connects(address):
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect(address) is None

def forks(n):
    made = []
    for _ in range(n):
        try:
            pid = os.fork()
        except OSError:
            break
        if not pid:
            signal.pause()
        made.append(pid)
    for pid in made:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(made) == n

def writes(path, size):
    with open(path, "wb") as f:
        f.write(bytes(size))
    return True

def lacks(package):
    try:
        importlib.import_module(package)
    except Exception:
        return True

def probe(canary, port, processes, memory, tmp, packages):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return [f"cannot import {package}" for package in packages if lacks(package)] + [name for name, found in {
        "read files outside": any(can(open, f) for f in (canary, "/etc/passwd", "/proc/self/status")),
        "write outside /tmp": any(can(writes, f + "/x", 1) for f in OUTSIDE),
        "fill /tmp": can(writes, "/tmp/x", tmp + 1),
        "use the network": can(connects, ("127.0.0.1", port)),
        "see the environment": "GMT_SANDBOX_CANARY" in os.environ or "PATH" in os.environ,
        "start many processes": can(forks, processes + 1),
        "take much memory": can(mmap.mmap, -1, memory + 1),
        "be root": os.geteuid() == 0 and os.getuid() == 0 and can(os.setgroups, []),
    }.items() if found]
"""


@functools.cache
def probe() -> str:
    """Why programs cannot be run in a sandbox on this machine; empty if they can: it was tried."""
    if sys.platform != "linux":
        return "it needs Linux"
    for program in ["bwrap"] + ["setpriv"] * (os.geteuid() == 0):
        if not shutil.which(program):
            return f"there is no {program} (Debian, Ubuntu: apt install bubblewrap util-linux)"
    limits = Limits()
    with tempfile.NamedTemporaryFile() as canary, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(canary.name, 0o644)
        arguments = [
            canary.name,
            server.getsockname()[1],
            limits.processes,
            limits.memory_mib * MIB,
            limits.tmp_mib * MIB,
            PACKAGES,
        ]
        data = {
            "program": PROBE,
            "reference": "def probe(*_): return []",
            "entry_point": "probe",
            "task": 0,
            "base": [arguments],
            "atol": 0,
            "least": 10,
            "factor": 1,
        }
        try:
            verdict = run(Trial("judge_inputs", data, seconds=20.0, limits=limits))
        except UserError as e:
            return str(e)
    return "" if verdict["base"] == "passed" else f"it does not hold: {verdict['reason']}"


UNSAFE = (
    "warning: programs run without a sandbox, under limits on memory, time and file size only: they can read and "
    "delete your files, use the network, end your processes and forge their verdict"
)


def ensure_available(allow_unsafe: bool) -> bool:
    """Try the sandbox, once per process. Returns whether programs are to run without one.

    Raises:
        UserError: no sandbox works on this machine, and nobody has allowed to go without.
    """
    why = probe()
    if why and not allow_unsafe:
        raise UserError(
            f"code tasks run the model's programs in a sandbox (bubblewrap), which does not work here: {why}. On a "
            "machine that you can afford to lose, --allow_unsafe_code runs them without"
        )
    if why:
        print(UNSAFE, file=sys.stderr)
    return bool(why)
