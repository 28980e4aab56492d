"""The sandbox: right programs pass, hostile ones do not and leave nothing, and its absence is refused."""

import builtins
import copy
import hashlib
import json
import math
import os
import re
import socket
import struct
import tempfile
import time
from collections import Counter, OrderedDict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hostile
import numpy as np
import psutil
import pytest
from conftest import needs_sandbox

from common.errors import UserError
from sandbox import inside, seccomp
from sandbox import run as sandbox
from sandbox.run import Limits, Trial, python_folders

ROOT = Path(__file__).parents[1]


def inputs_trial(program: str, inputs: tuple[int, ...] = (3, 5, 7), memory: int = 512) -> Trial:
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
    return Trial("judge_inputs", data, 3.0, limits=Limits(memory_mib=memory, tmp_mib=16))


def asserts_trial(program: str, tests: str, reference: str = "def f(x): return x + 1", seconds: float = 3.0) -> Trial:
    data = {"program": program, "reference": reference, "remote": None, "tests": {"base": tests}}
    return Trial("judge_asserts", data, seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile programs
# ---------------------------------------------------------------------------------------------------------------------


MARK = 511  # MiB of memory: known by it are the processes of this test, whoever else runs sandboxes
LIMITS = Limits(memory_mib=MARK, tmp_mib=16)
ENDS = {
    "timeout": ["infinite loop", "infinite loop at load", "sleeps", "catches every signal", "infinite output"],
    "died": ["os._exit in call", "segfault", "closes all descriptors"],
    "garbled": ["garbage frames", "patched runner", "colliding set", "30 MiB of empty lists", "dtype of objects"],
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
    programs |= {name: (text, (3,)) for name, text in (escapes | hostile.REPLIES).items()}
    programs |= {f"right {i}": ("def f(x): return x * x + 1", (3,)) for i in range(9)}  # others are not harmed
    trials = {name: inputs_trial(*programs[name], memory=MARK) for name in programs}
    for name, (tests, program) in hostile.SWALLOWED.items():
        trials[f"tests: {name}"] = replace(asserts_trial(program, tests), limits=LIMITS)
    order = sorted(trials, key=lambda name: hashlib.sha256(name.encode()).digest())
    took = {}

    def run(name):
        start = time.monotonic()
        verdict = sandbox.run(trials[name])
        took[name] = time.monotonic() - start
        return verdict

    written = [f"/tmp/{name}" for name in ("x", "l", "env", "d", "39")] + ["/x", "/usr/x", "/dev/shm/x"]
    before = [f for f in written if os.path.lexists(f)]
    with server, unix, ThreadPoolExecutor(2) as pool:
        done = pool.map(run, order)
        status = {name: verdict["base"] for name, verdict in zip(order, done, strict=True)}
    assert len(trials) - 9 >= 150
    assert [name for name, s in status.items() if (s == "passed") != name.startswith("right")] == []
    assert [name for name, s in took.items() if s > trials[name].seconds + 5] == []
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
    names += ["watches files", "locks a file for reading", "syncs a file", "limits of its parent", "netlink"]
    with server:
        for name in [*names, "kills the host"]:  # by signal 0, which does nothing
            verdict = sandbox.run(inputs_trial(programs[name].replace("/tmp/l", "l"), (3,)), unsafe=True)
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
    assert sandbox.run(inputs_trial(program)) == {"base": "passed", "reason": ""}
    assert sandbox.run(inputs_trial("import numpy as np\ndef f(x): return np.int64(x) ** 2 + 1"))["base"] == "passed"


@needs_sandbox
def test_tests_that_are_code():
    """Objects of the program stay in its process, its exceptions reach the test, helpers are the reference's."""
    reference = "class Node:\n    def __init__(self, x): self.x = x\ndef f(node): return node.x + 1\nhelper = len"
    setup = "n = Node(1)\nn.next = Node(2)\nassert f(n) == 2 and f(n.next) == 3 and n.x == 1\n"
    assert sandbox.run(asserts_trial(reference, setup, reference))["base"] == "passed"
    assert sandbox.run(asserts_trial(reference, setup + "assert n == Node(1)", reference))["base"] == "failed"
    forged = "def helper(x): return 99\ndef f(x): return 0"
    assert sandbox.run(asserts_trial(forged, "assert helper('abc') == 99", reference))["base"] == "failed"
    raising = "def f(x): raise ValueError('no')"
    test = "try:\n    f(1)\nexcept ValueError as e:\n    assert 'no' in str(e)\nelse:\n    assert False"
    assert sandbox.run(asserts_trial(raising, test))["base"] == "passed"
    dying = "import os\ndef f(x): os._exit(0)"
    assert sandbox.run(asserts_trial(dying, "try:\n    f(1)\nexcept BaseException:\n    pass"))["base"] == "died"


@needs_sandbox
def test_a_judge_that_ends_early_is_a_failed_program():
    """Not a sandbox that did not start: what the program sent may be the cause, such as too much for the memory."""
    for tests in ("import os; os._exit(0)", "import ctypes; ctypes.string_at(0)"):
        verdict = sandbox.run(asserts_trial("def f(x): return x", tests))
        assert verdict["base"] == "failed" and verdict["crashed"]
    assert sandbox.run(asserts_trial("def f(x): return 10**12", "assert [0] * f(1)"))["base"] == "failed"
    assert sandbox.run(asserts_trial("def f(x): return 1", "while f(1): pass", seconds=0.5))["base"] == "timeout"


@needs_sandbox
def test_timed_out_programs_run_again_alone(monkeypatch):
    trials = [inputs_trial("def f(x): return x * x + 1"), inputs_trial("def f(x):\n    while True: pass")]
    verdicts = sandbox.run_all(trials, workers=2)
    assert [v["base"] for v in verdicts] == ["passed", "timeout"] and verdicts[1]["again"]
    seen = []
    busy = {"base": "timeout"}
    monkeypatch.setattr(
        sandbox, "run", lambda trial, unsafe: seen.append(trial) or (busy if len(seen) == 1 else {"base": "passed"})
    )
    assert sandbox.run_all(trials[:1], workers=2) == [{"base": "passed", "again": True}]


@needs_sandbox
def test_tolerance_stays_once_a_float_was_expected():
    """EvalPlus' quirk: lists with an integer among the floats are compared exactly before that, and with 1e-6 after."""
    data = {
        "program": "def f(x): return [1, 0.5 + 1e-9] if x else 0.5",
        "reference": "def f(x): return [1, 0.5] if x else 0.5",
        "entry_point": "f", "task": 0, "atol": 0, "least": 1.0, "factor": 1.0,
    }  # fmt: skip
    assert sandbox.run(Trial("judge_inputs", {**data, "base": [[0], [1]]}, 3.0))["base"] == "passed"
    assert sandbox.run(Trial("judge_inputs", {**data, "base": [[1], [0]]}, 3.0))["base"] == "failed"
    empty = {**data, "program": "def f(x): return [float(2**60)] * x", "reference": "def f(x): return [2**60 + 1] * x"}
    assert sandbox.run(Trial("judge_inputs", {**empty, "base": [[0], [1]]}, 3.0))["base"] == "failed"  # [] is no float


@needs_sandbox
def test_loading_a_program_has_the_whole_tasks_time():
    """As in EvalPlus, where the limit of an input holds for calls alone."""
    data = {
        "program": "import time\ntime.sleep(2)\ndef f(x): return x", "reference": "def f(x): return x",
        "entry_point": "f", "task": 0, "base": [[1]], "atol": 0, "least": 1.0, "factor": 1.0,
    }  # fmt: skip
    assert sandbox.run(Trial("judge_inputs", data, 20.0))["base"] == "passed"
    assert sandbox.run(Trial("judge_inputs", data, 0.5))["base"] == "timeout"


@needs_sandbox
def test_program_time_is_its_own():
    """The reference's time is not charged, and a call's limit grows with it."""
    slow = "import time\ndef f(x):\n    time.sleep(0.3)\n    return x"
    data = {"program": slow, "reference": slow, "entry_point": "f", "task": 0, "base": [[1], [2]], "atol": 0}
    assert sandbox.run(Trial("judge_inputs", {**data, "least": 0.1, "factor": 4.0}, 2.0))["base"] == "passed"
    assert sandbox.run(Trial("judge_inputs", {**data, "least": 0.1, "factor": 0.5}, 2.0))["base"] == "timeout"
    assert sandbox.run(Trial("judge_inputs", {**data, "least": 4.0, "factor": 4.0}, 0.5))["base"] == "timeout"


# ---------------------------------------------------------------------------------------------------------------------
# Without a sandbox
# ---------------------------------------------------------------------------------------------------------------------


def test_no_sandbox_is_refused_unless_allowed(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "probe", lambda: "there is no bwrap")
    with pytest.raises(UserError, match="there is no bwrap.*--allow_unsafe_code"):
        sandbox.ensure_available(allow_unsafe=False)
    assert sandbox.ensure_available(allow_unsafe=True) is True
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
    [
        ("--unshare-all", "use the network"),
        ("--clearenv", "see the environment"),
        ("--remount-ro /", "write outside"),
        ("--remount-ro /dev", "write outside"),
        (f"--ro-bind {python_folders()[2][0]}", "cannot import numpy"),
    ],
)
def test_probe_finds_a_sandbox_that_does_not_hold(monkeypatch, without, found):
    words, out = sandbox.bubblewrap(Limits()), without.split()
    at = next(i for i in reversed(range(len(words))) if words[i : i + len(out)] == out)
    weak = words[:at] + words[at + len(out) + (out[0] == "--ro-bind") :]
    if without == "--unshare-all":  # all but the network
        weak[at:at] = ["--unshare-pid", "--unshare-ipc", "--unshare-uts"]
        monkeypatch.setattr(sandbox.seccomp, "program", lambda: None)  # which refuses sockets
    monkeypatch.setattr(sandbox, "bubblewrap", lambda limits: weak)
    monkeypatch.setenv("GMT_SANDBOX_CANARY", "1")
    assert found in sandbox.probe.__wrapped__()


@needs_sandbox
def test_packages_below_tmp_are_found(monkeypatch):
    """The sandbox has a /tmp of its own; an environment may lie below the machine's."""
    interpreter, folders, packages = python_folders()
    with tempfile.TemporaryDirectory(dir="/tmp") as private:
        folder = private + "/site"
        os.mkdir(folder)
        (Path(folder) / "below_tmp.py").write_text("one = 1")
        monkeypatch.setattr(sandbox, "python_folders", lambda: (interpreter, [*folders, folder], [*packages, folder]))
        monkeypatch.setattr(sandbox, "bubblewrap", sandbox.bubblewrap.__wrapped__)
        program = "import below_tmp\nopen('/tmp/x', 'w')\ndef f(x): return x * x + below_tmp.one"
        assert sandbox.run(inputs_trial(program))["base"] == "passed"
        leaves = f"import os\ndef f(x): return x * x + len(os.listdir({folder!r}))"  # the one file
        assert sandbox.run(inputs_trial(leaves))["base"] == "passed"


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
        sandbox.run(inputs_trial(""))


def test_unsafe_programs_have_limits():
    verdict = sandbox.run(inputs_trial("def f(x): return len(bytearray(1 << 30)) and x * x + 1"), unsafe=True)
    assert verdict["base"] == "failed" and "MemoryError" in verdict["reason"]
    assert sandbox.run(inputs_trial("def f(x): return x * x + 1"), unsafe=True)["base"] == "passed"


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
    there = lambda x: inside.decode(inside.encode(x, lambda x: 0), lambda key: "no data")  # noqa: E731
    point = namedtuple("Point", "x y")
    assert there(point(1, 2)) == (1, 2) and there(Counter("aab")) == {"a": 2, "b": 1}
    assert there(OrderedDict(a=1)) == {"a": 1} and math.isnan(there(math.nan))
    assert list(there(map(str, [1, 2]))) == ["1", "2"] and list(there({"a": 1}.items())) == [("a", 1)]
    assert there([object()]) == ["no data"] and there(len) == "no data"


@pytest.mark.parametrize(
    "value",
    [
        np.int8(-3), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1 + 2j), np.str_("a"), np.zeros((2, 0, 3)),
        np.arange(6).reshape(2, 3).T, np.array([1.5, np.nan], "f2"), np.array(["a", "bc"]), np.array([b"a"]),
        np.array([1, 2], ">i4"), np.array(3.5), np.array([[True], [False]]),
    ],
    ids=repr,
)  # fmt: skip
def test_arrays_come_through(value):
    back = inside.decode(json.loads(json.dumps(inside.encode(value, None))), None)
    np.testing.assert_array_equal(back, value, strict=not isinstance(value, np.str_) and value.dtype.str[0] != ">")


def test_other_arrays_are_objects():
    for value in (np.array([None]), np.array(["2000-01-01"], "M8[s]"), np.zeros(2, "i4,f4"), np.longdouble(1)):
        assert inside.encode(value, lambda x: 7) == {"object": 7}


P = (1 << 61) - 1  # multiples of it have the hash 0


@pytest.mark.parametrize(
    "image",
    [
        {"numpy": ["|O", [1], [1]]}, {"numpy": ["<i8", [2], [1]]}, {"numpy": ["<i8", [1], [True]]},
        {"numpy": ["<i8", [-1], [1]]}, {"numpy": [["<i8"], [1], [1]]}, {"numpy": ["<i8", [0, 1 << 62], []]},
        {"numpy": ["<U999999", [9], ["a"] * 9]}, {"numpy": ["<i8", [1], [{"object": 0}]]},
        {"set": [k * P for k in range(500)]}, {"dict": [[k * P, 0] for k in range(500)]}, {"set": [[]]},
        {"frozenset": [{"tuple": [k * P]} for k in range(500)]}, {"int": 1},
        {"complex": [1, 2.0]}, {"complex": [{"object": 0}, 1.0]}, {"range": [1, 2]}, {"range": [0, 1.0, 1]},
        {"bytes": "0"}, {"eval": []}, {"tuple": 1}, {"tuple": [], "set": []}, {}, [0] * 1000, [[]] * 600,
    ],
    ids=lambda image: str(image)[:40],
)  # fmt: skip
def test_what_is_no_data_is_refused(image):
    with pytest.raises((ValueError, TypeError, LookupError)):
        inside.decode(image, lambda key: inside.Remote(None, key), objects=1000)


@pytest.mark.parametrize("depth, fits", [(80, True), (120, False)])
@pytest.mark.parametrize("kind", [list, tuple])
def test_data_has_a_depth(depth, fits, kind):
    value = 0
    for _ in range(depth):
        value = kind([value])
    try:
        assert inside.decode(inside.encode(value, None), None) == value and fits
    except ValueError:
        assert not fits


@pytest.mark.parametrize("text", ["1" * 41, "0." + "1" * 41, "[" * 100_000], ids=["integer", "float", "depth"])
def test_messages_that_are_slow_to_read_are_refused(text):
    one, other = socket.socketpair()
    with one, other:
        one.sendall(struct.pack(">I", len(text)) + text.encode())
        with pytest.raises((ValueError, RecursionError)):
            inside.receive(other)
        one.sendall(struct.pack(">I", 101) + b" " * 101)
        with pytest.raises(ValueError, match="101 bytes, 100 are allowed"):
            inside.receive(other, most=100)


def test_a_message_has_one_deadline():
    """However many parts it comes in: what has come already does not count after it."""
    one, other = socket.socketpair()
    with one, other:
        inside.send(one, "late")
        with pytest.raises(TimeoutError):
            inside.receive(other, time.monotonic() - 1)
        assert inside.receive(other, time.monotonic() + 60) == "late"


def test_stand_ins_ask_for_no_special_names():
    asked = []
    stand_in = inside.Remote(SimpleNamespace(ask=lambda *words: asked.append(words)), 0)
    for name in (
        "__array__",
        "__array_interface__",
        "__array_struct__",
        "__index__",
        "__len__",
        "__iter__",
        "__dict__",
    ):
        assert not hasattr(stand_in, name)
        with pytest.raises(AttributeError):
            setattr(stand_in, name, 1)
    for use in (len, iter, int, float, complex, memoryview, bytes, copy.deepcopy, copy.copy, sum):
        with pytest.raises(TypeError):
            use(stand_in)
    assert np.asarray(stand_in).dtype == object and asked == []
    assert stand_in.name is None and asked == [("get", 0, "name")]
    assert stand_in != inside.Remote(None, 0)


def test_errors_of_programs_are_ours():
    assert {"ValueError", "KeyError", "ZeroDivisionError", "OSError", "UnicodeError"} < set(inside.ERRORS)
    for name, kind in inside.ERRORS.items():
        assert issubclass(kind, inside.ProgramError) and isinstance(kind("x"), getattr(builtins, name))
        assert not issubclass(kind, StopIteration | StopAsyncIteration)
    assert not {"StopIteration", "SystemExit", "GeneratorExit", "KeyboardInterrupt"} & set(inside.ERRORS)


def run_filter(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the filter of a machine returns for a system call: as the kernel would run it."""
    architecture = architecture or seccomp.MACHINES[machine][1]
    data = struct.pack("iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = [struct.unpack("HBBI", w) for (w,) in struct.iter_unpack("8s", seccomp.program(machine))]
    at = accumulator = 0
    while True:
        code, if_true, if_false, k = steps[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (accumulator,) = struct.unpack_from("I", data, k)
        elif code == 0x06:  # BPF_RET | BPF_K
            return k
        else:  # BPF_JMP | BPF_JEQ, BPF_JGE, BPF_JSET
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: accumulator & k}[code]
            at += if_true if holds else if_false


ALLOWED, REFUSED, ENDED = 0x7FFF0000, 0x00050001, 0x80000000


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_seccomp_filter(machine):
    column, _ = seccomp.MACHINES[machine]
    for name, numbers in seccomp.REFUSED.items():
        if numbers[column] is not None:
            assert run_filter(machine, numbers[column]) == REFUSED, name
    number = {name: numbers[column] for name, (numbers, _, _) in seccomp.SOME.items()}
    assert run_filter(machine, seccomp.FATAL["sync"][column]) == ENDED
    assert run_filter(machine, number["prlimit64"], 0) == ALLOWED
    assert run_filter(machine, number["prlimit64"], 1) == REFUSED
    assert run_filter(machine, number["prlimit64"], 1 << 32) == ALLOWED  # a pid has 32 bits
    assert [run_filter(machine, number["fcntl"], 5, command) for command in (0, 1, 2, 3, 4, 1030)] == [ALLOWED] * 6
    assert [run_filter(machine, number["fcntl"], 5, c) for c in (5, 6, 7, 36, 37, 38, 1024, 1026)] == [REFUSED] * 8
    assert [run_filter(machine, number["socket"], family) for family in (1, 1 + (1 << 32))] == [ALLOWED] * 2
    assert [run_filter(machine, number["socket"], family) for family in (2, 10, 16, 17, 38, 40)] == [REFUSED] * 6
    clone = seccomp.CLONE[column]
    assert run_filter(machine, clone, 17) == REFUSED and run_filter(machine, clone, 0x3D0F00) == ALLOWED
    assert run_filter(machine, 435) == 0x00050026  # clone3: ENOSYS
    known = {"x86_64": (0, 1, 9, 12, 59, 202, 231), "aarch64": (63, 64, 222, 214, 221, 98, 94)}
    assert [run_filter(machine, n) for n in known[machine]] == [
        ALLOWED
    ] * 7  # read, write, mmap, brk, execve and others
    assert run_filter(machine, 0x40000001) == REFUSED
    assert run_filter(machine, 1, architecture=0x40000003) == ENDED  # i386


HEADERS = {  # the kernel's; the generic numbers are ARM's
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_seccomp_numbers_are_the_kernels(machine):
    if not HEADERS[machine].exists():
        pytest.skip("no headers of the kernel")
    defined = dict(re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)\b", HEADERS[machine].read_text(), re.M))
    column, _ = seccomp.MACHINES[machine]
    calls = {**seccomp.REFUSED, **seccomp.FATAL, "clone": seccomp.CLONE, "clone3": (435, 435)}
    calls |= {name: numbers for name, (numbers, _, _) in seccomp.SOME.items()}
    newer = {"cachestat"}  # than some headers
    for name, numbers in calls.items():
        if name in defined or name not in newer:
            assert defined.get(name) == (None if numbers[column] is None else str(numbers[column])), name


def test_an_unknown_machine_has_no_filter():
    assert seccomp.program("sparc") is None
