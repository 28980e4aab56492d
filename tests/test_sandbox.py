"""The sandbox: right programs pass, hostile ones do not and leave nothing, and its absence is refused."""

import hashlib
import json
import math
import os
import socket
import struct
import time
from collections import Counter, OrderedDict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import psutil
import pytest
from conftest import needs_sandbox

from common.config import UserError
from sandbox import inside, seccomp
from sandbox import run as sandbox
from sandbox.run import Job, Limits

ROOT = Path(__file__).parents[1]


def inputs_job(program: str, inputs: tuple[int, ...] = (3, 5, 7), memory: int = 512) -> Job:
    """f(x) must be x * x + 1."""
    data = {
        "program": program,
        "reference": "def f(x): return x * x + 1",
        "entry_point": "f",
        "task": 0,
        "base": [[x] for x in inputs],
        "atol": 0,
        "least": 1.0,
        "factor": 1.0,
    }
    return Job("judge_inputs", data, 3.0, limits=Limits(memory_mib=memory, tmp_mib=16))


def asserts_job(program: str, tests: str, reference: str = "def f(x): return x + 1", seconds: float = 3.0) -> Job:
    data = {"program": program, "reference": reference, "remote": None, "tests": {"base": tests}}
    return Job("judge_asserts", data, seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile programs
# ---------------------------------------------------------------------------------------------------------------------


MARK = 511  # MiB of memory: known by it are the processes of this test, whoever else runs sandboxes
ENDS = {
    "timeout": ["infinite loop", "infinite loop at load", "sleeps", "catches every signal", "infinite output"],
    "died": ["os._exit in call", "segfault", "closes all descriptors"],
    "garbled": ["garbage frames", "patched runner"],
    "failed": ["sys.exit at load", "always equal", "many processes", "much memory", "reads /etc/passwd"],
}


@needs_sandbox
def test_hostile_programs_do_not_pass_and_leave_nothing(monkeypatch):
    monkeypatch.setenv("GMT_SECRET", "x")
    server, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind(f"\0gmt-{os.getpid()}")
    unix.listen()
    values = {"PROJECT": str(ROOT / "README.md"), "PORT": server.getsockname()[1], "HOST": os.getpid()}
    escapes = hostile.escapes(**values, ABSTRACT=f"gmt-{os.getpid()}")
    programs = {name: (text, (3, 5, 7)) for name, text in hostile.FORGERS.items()}
    programs |= {name: (text, (3,)) for name, text in escapes.items()}
    programs |= {f"right {i}": ("def f(x): return x * x + 1", (3,)) for i in range(9)}  # others are not harmed
    order = sorted(programs, key=lambda name: hashlib.sha256(name.encode()).digest())
    written = [f"/tmp/{name}" for name in ("x", "l", "env", "d", "39")] + ["/x", "/usr/x", "/dev/shm/x"]
    before = [f for f in written if os.path.lexists(f)]
    with server, unix, ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda name: sandbox.run(inputs_job(*programs[name], memory=MARK)), order)
        status = {name: verdict["base"] for name, verdict in zip(order, done, strict=True)}
    assert len(hostile.FORGERS) + len(escapes) >= 100
    assert [name for name, s in status.items() if (s == "passed") != name.startswith("right")] == []
    assert {s: [name for name in names if status[name] != s] for s, names in ENDS.items()} == {s: [] for s in ENDS}
    for _ in range(50):  # those that were killed need a moment
        if not (left := [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if is_ours(p.info["cmdline"])]):
            break
        time.sleep(0.1)
    assert left == []
    assert [f for f in written if os.path.lexists(f)] == before


def is_ours(words: list[str] | None) -> bool:
    return f'"RLIMIT_AS": {MARK << 20}' in " ".join(words or [])


def test_attempts_succeed_where_nothing_hinders_them():
    """So that a test of theirs can go red: harmless ones of them, without a sandbox."""
    server = socket.create_server(("127.0.0.1", 0))
    values = {"PROJECT": str(ROOT / "README.md"), "PORT": server.getsockname()[1], "HOST": os.getpid(), "ABSTRACT": ""}
    programs = hostile.escapes(**values)
    names = ["reads /etc/passwd", "reads /proc", "sees the project", "symlink out", "connects to the host"]
    with server:
        for name in [*names, "kills the host"]:  # by signal 0, which does nothing
            verdict = sandbox.run(inputs_job(programs[name].replace("/tmp/l", "l"), (3,)), unsafe=True)
            assert verdict["base"] == "passed", name


# ---------------------------------------------------------------------------------------------------------------------
# Right programs
# ---------------------------------------------------------------------------------------------------------------------


@needs_sandbox
def test_right_programs_pass():
    program = """
from dataclasses import dataclass
import threading
@dataclass
class Pair:
    a: "int"
def f(x):
    print("noise"); open("scratch", "w").write("x")
    t = threading.Thread(target=print); t.start(); t.join()
    return Pair(x).a ** 2 + 1
"""
    assert sandbox.run(inputs_job(program)) == {"base": "passed", "reason": ""}
    assert sandbox.run(inputs_job("import numpy as np\ndef f(x): return np.int64(x) ** 2 + 1"))["base"] == "passed"


@needs_sandbox
def test_tests_that_are_code():
    """Objects of the program stay in its process, its exceptions reach the test, helpers are the reference's."""
    reference = "class Node:\n    def __init__(self, x): self.x = x\ndef f(node): return node.x + 1\nhelper = len"
    setup = "n = Node(1)\nn.next = Node(2)\nassert f(n) == 2 and f(n.next) == 3 and n.x == 1\n"
    assert sandbox.run(asserts_job(reference, setup, reference))["base"] == "passed"
    assert sandbox.run(asserts_job(reference, setup + "assert n == Node(1)", reference))["base"] == "failed"
    forged = "def helper(x): return 99\ndef f(x): return 0"
    assert sandbox.run(asserts_job(forged, "assert helper('abc') == 99", reference))["base"] == "failed"
    raising = "def f(x): raise ValueError('no')"
    test = "try:\n    f(1)\nexcept ValueError as e:\n    assert 'no' in str(e)\nelse:\n    assert False"
    assert sandbox.run(asserts_job(raising, test))["base"] == "passed"
    dying = "import os\ndef f(x): os._exit(0)"
    assert sandbox.run(asserts_job(dying, "try:\n    f(1)\nexcept BaseException:\n    pass"))["base"] == "died"


@needs_sandbox
def test_a_judge_that_ends_early_is_a_failed_program():
    """Not a sandbox that did not start: what the program sent may be the cause, such as too much for the memory."""
    for tests in ("import os; os._exit(0)", "import ctypes; ctypes.string_at(0)"):
        verdict = sandbox.run(asserts_job("def f(x): return x", tests))
        assert verdict["base"] == "failed" and verdict["crashed"]
    assert sandbox.run(asserts_job("def f(x): return 10**12", "assert [0] * f(1)"))["base"] == "failed"
    assert sandbox.run(asserts_job("def f(x): return 1", "while f(1): pass", seconds=0.5))["base"] == "timeout"


@needs_sandbox
def test_timed_out_programs_run_again_alone(monkeypatch):
    jobs = [inputs_job("def f(x): return x * x + 1"), inputs_job("def f(x):\n    while True: pass")]
    verdicts = sandbox.run_all(jobs, workers=2)
    assert [v["base"] for v in verdicts] == ["passed", "timeout"] and verdicts[1]["again"]
    seen = []
    busy = {"base": "timeout"}
    monkeypatch.setattr(
        sandbox, "run", lambda job, unsafe: seen.append(job) or (busy if len(seen) == 1 else {"base": "passed"})
    )
    assert sandbox.run_all(jobs[:1], workers=2) == [{"base": "passed", "again": True}]


@needs_sandbox
def test_tolerance_stays_once_a_float_was_expected():
    """EvalPlus' quirk: lists with an integer among the floats are compared exactly before that, and with 1e-6 after."""
    data = {
        "program": "def f(x): return [1, 0.5 + 1e-9] if x else 0.5",
        "reference": "def f(x): return [1, 0.5] if x else 0.5",
        "entry_point": "f", "task": 0, "atol": 0, "least": 1.0, "factor": 1.0,
    }  # fmt: skip
    assert sandbox.run(Job("judge_inputs", {**data, "base": [[0], [1]]}, 3.0))["base"] == "passed"
    assert sandbox.run(Job("judge_inputs", {**data, "base": [[1], [0]]}, 3.0))["base"] == "failed"


@needs_sandbox
def test_program_time_is_its_own():
    """The reference's time is not charged, and a call's limit grows with it."""
    slow = "import time\ndef f(x):\n    time.sleep(0.3)\n    return x"
    data = {"program": slow, "reference": slow, "entry_point": "f", "task": 0, "base": [[1], [2]], "atol": 0}
    assert sandbox.run(Job("judge_inputs", {**data, "least": 0.1, "factor": 4.0}, 2.0))["base"] == "passed"
    assert sandbox.run(Job("judge_inputs", {**data, "least": 0.1, "factor": 0.5}, 2.0))["base"] == "timeout"
    assert sandbox.run(Job("judge_inputs", {**data, "least": 4.0, "factor": 4.0}, 0.5))["base"] == "timeout"


# ---------------------------------------------------------------------------------------------------------------------
# Without a sandbox
# ---------------------------------------------------------------------------------------------------------------------


def test_no_sandbox_is_refused_unless_allowed(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "probe", lambda: "there is no bwrap")
    with pytest.raises(UserError, match="there is no bwrap.*--allow_unsafe_code"):
        sandbox.check(allow_unsafe=False)
    assert sandbox.check(allow_unsafe=True) is True
    assert "can read and delete your files" in capsys.readouterr().err


@needs_sandbox
def test_the_probe_finds_nothing_here():
    assert sandbox.probe() == ""


def test_probe_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert "there is no bwrap" in sandbox.probe.__wrapped__()


@needs_sandbox
@pytest.mark.parametrize(
    "without, found",
    [("--unshare-all", "use the network"), ("--clearenv", "see the environment"), ("--remount-ro", "write outside")],
)
def test_probe_finds_a_sandbox_that_does_not_hold(monkeypatch, without, found):
    words = sandbox.bubblewrap(Limits())
    at = words.index(without, words.index("--unshare-all"))
    weak = words[:at] + words[at + (2 if without == "--remount-ro" else 1) :]
    if without == "--unshare-all":  # all but the network
        weak[at:at] = ["--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    monkeypatch.setattr(sandbox, "bubblewrap", lambda limits: weak)
    monkeypatch.setenv("GMT_SANDBOX_CANARY", "1")
    assert found in sandbox.probe.__wrapped__()


@needs_sandbox
@pytest.mark.parametrize("name, found", [("RLIMIT_AS", "much memory"), ("RLIMIT_FSIZE", "")])
def test_probe_finds_a_limit_that_does_not_bite(monkeypatch, name, found):
    rlimits = Limits.rlimits
    monkeypatch.setattr(Limits, "rlimits", lambda self, s: {k: v for k, v in rlimits(self, s).items() if k != name})
    why = sandbox.probe.__wrapped__()
    assert found in why and bool(found) == bool(why)  # /tmp has a size besides


@needs_sandbox
def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "bubblewrap", lambda limits: ["bwrap", "--ro-bind", "/nowhere", "/"])
    with pytest.raises(UserError, match="did not start.*nowhere"):
        sandbox.run(inputs_job(""))


def test_unsafe_programs_have_limits():
    verdict = sandbox.run(inputs_job("def f(x): return len(bytearray(1 << 30)) and x * x + 1"), unsafe=True)
    assert verdict["base"] == "failed" and "MemoryError" in verdict["reason"]
    assert sandbox.run(inputs_job("def f(x): return x * x + 1"), unsafe=True)["base"] == "passed"


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 2**63, -(2**70), 1.5, math.inf, "a\ud800\0", [], [1, [2.0]], (), (1, (2,)),
        {1, 2}, frozenset("a"), {(1, 2): [3], "a": None}, 1 + 2j, b"\xff", bytearray(b"a"), range(1, 9, 2), deque([1]),
    ],
    ids=repr,
)  # fmt: skip
def test_data_comes_through(value):
    back = inside.decode(json.loads(json.dumps(inside.encode(value, None))), None)
    assert type(back) is type(value) and back == value


def test_data_of_subclasses_and_iterators():
    there = lambda x: inside.decode(inside.encode(x, lambda x: "no data"), lambda key: key)  # noqa: E731
    point = namedtuple("Point", "x y")
    assert there(point(1, 2)) == (1, 2) and there(Counter("aab")) == {"a": 2, "b": 1}
    assert there(OrderedDict(a=1)) == {"a": 1} and math.isnan(there(math.nan))
    assert list(there(map(str, [1, 2]))) == ["1", "2"] and list(there({"a": 1}.items())) == [("a", 1)]
    assert there([object()]) == ["no data"] and there(len) == "no data"


def test_seccomp_programs():
    """Every refused call has its number, jumps stay inside, and an unknown machine has no filter."""
    for machine, calls in (("x86_64", 33), ("aarch64", 31)):
        words = [struct.unpack("HBBI", w) for w in struct.iter_unpack("8s", seccomp.program(machine)) for w in w]
        assert len(words) == 4 + 2 + 2 * calls + 2 + 6
        assert all(i + 1 + max(t, f) < len(words) for i, (code, t, f, _) in enumerate(words) if code & 7 == 5)
    assert seccomp.program("sparc") is None
