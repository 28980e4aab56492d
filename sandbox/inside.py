"""What runs inside a sandbox, on one of two sides of a socket: the candidate (untrusted code) or its judge.

The text of this file is handed to `python -c`, so that it needs the standard library alone. The candidate's process
holds the program under test and nothing else; it gets function names and arguments and answers with *data*: JSON with
tags for what JSON lacks. The judge's process, in a sandbox of its own, holds the reference solution and the tests. What
the candidate does to its own process (patched builtins, __eq__, frames, exit codes) can change what it sends, never
how that is compared: it passes by sending right answers, and in no other way.
"""

import builtins
import collections
import itertools
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
import types

MAX_FRAME = 32 << 20  # bytes of one message
MAX_ITEMS = 1_000_000  # that are taken from an iterator

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed, itertools.chain, collections.abc.Iterator)
VIEWS = (collections.abc.KeysView, collections.abc.ValuesView, collections.abc.ItemsView)


def encode(x, refer):
    """A JSON-able image of x; objects that are no data become `refer(x)`, a number that stands for them."""
    t = type(x)
    if x is None or t is bool or t is str or t is float:
        return x
    if t is int:
        return x if -(2**63) <= x < 2**63 else {"int": hex(x)}
    if t is list:
        return [encode(v, refer) for v in x]
    for kind, tag in ((tuple, "tuple"), (set, "set"), (frozenset, "frozenset"), (collections.deque, "deque")):
        if isinstance(x, kind):
            return {tag: [encode(v, refer) for v in x]}
    if isinstance(x, dict):
        return {"dict": [[encode(k, refer), encode(v, refer)] for k, v in x.items()]}
    for kind in (list, str, int, float):  # instances of subclasses: their data
        if isinstance(x, kind):
            return encode(kind(x), refer)
    if t is complex:
        return {"complex": [x.real, x.imag]}
    if t in (bytes, bytearray):
        return {t.__name__: x.hex()}
    if t is range:
        return {"range": [x.start, x.stop, x.step]}
    if isinstance(x, ITERATORS + VIEWS):
        return {"iterator": [encode(v, refer) for v in itertools.islice(x, MAX_ITEMS)]}
    if t.__module__ == "numpy" and hasattr(x, "tolist") and x.dtype.kind in "biufcUS":
        return {"numpy": [x.dtype.str, encode(x.tolist(), refer)]}
    if isinstance(x, Remote):
        return {"object": x._key}
    return {"object": refer(x)}


def decode(x, resolve):
    """The value of which `encode` made x; `resolve(number)` gives what stands for an object that is no data."""
    if isinstance(x, list):
        return [decode(v, resolve) for v in x]
    if not isinstance(x, dict):
        return x
    ((tag, content),) = x.items()
    if tag == "int":
        return int(content, 16)
    if tag == "object":
        return resolve(content)
    if tag == "complex":
        return complex(*content)
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag).fromhex(content)
    if tag == "range":
        return range(*content)
    if tag == "dict":
        return {decode(k, resolve): decode(v, resolve) for k, v in content}
    if tag == "numpy":
        import numpy

        return numpy.array(decode(content[1], resolve), dtype=content[0])[()]
    items = [decode(v, resolve) for v in content]
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque, "iterator": iter}
    return kinds[tag](items)


def send(sock, message):
    text = json.dumps(message).encode()
    if len(text) > MAX_FRAME:
        raise ValueError(f"a message of {len(text)} bytes, {MAX_FRAME} are allowed")
    sock.sendall(struct.pack(">I", len(text)) + text)


def receive(sock, deadline=None):
    """The next message. Raises EOFError at the end, TimeoutError, ValueError for what is no message."""

    def exactly(n):
        parts = bytearray()
        while len(parts) < n:
            if deadline is not None:
                sock.settimeout(max(1e-3, deadline - time.monotonic()))
            part = sock.recv(min(n - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return parts

    (size,) = struct.unpack(">I", exactly(4))
    if size > MAX_FRAME:
        raise ValueError(f"a message of {size} bytes, {MAX_FRAME} are allowed")
    return json.loads(exactly(size))


# ---------------------------------------------------------------------------------------------------------------------
# The candidate's side
# ---------------------------------------------------------------------------------------------------------------------


def serve(sock):
    """Load and call what the judge asks for, and answer with data, until the socket closes."""
    objects = []  # the results that are no data
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and typing look classes' modules up

    def refer(x):
        objects.append(x)
        return len(objects) - 1

    def resolve(key):  # a number, or a name in the program
        return objects[key] if isinstance(key, int) else getattr(module, key)

    def answer(message):
        verb, target, *rest = message
        if verb == "load":
            exec(compile(target, "solution", "exec"), module.__dict__)
            return None
        target = resolve(target)
        rest = [decode(x, resolve) for x in rest]
        if verb == "call":
            return target(*rest[0], **rest[1])
        if verb == "get":
            return getattr(target, rest[0])
        return setattr(target, rest[0], rest[1])

    send(sock, "ready")
    while True:
        message = receive(sock)
        try:
            reply = {"value": encode(answer(message), refer)}
        except BaseException as e:  # SystemExit too
            reply = {"error": [type(e).__name__, repr(e)[:300]]}
        try:
            send(sock, reply)
        except ValueError as e:
            send(sock, {"error": ["ValueError", str(e)]})


# ---------------------------------------------------------------------------------------------------------------------
# The judge's side
# ---------------------------------------------------------------------------------------------------------------------


class Failed(BaseException):
    """The candidate cannot go on. `why` is timeout, died or garbled. Not an Exception: no test can swallow it."""

    def __init__(self, why):
        super().__init__(why)
        self.why = why


class Candidate:
    """The process of the program under test, as its judge sees it."""

    def __init__(self, sock):
        self.sock = sock
        self.seconds = 0.0  # that it may still take
        self.failure = None

    def ready(self, timeout):
        """Wait until the process is up; what it runs has not begun by then."""
        if receive(self.sock, time.monotonic() + timeout) != "ready":
            raise ValueError("the candidate's process is not what it should be")

    def ask(self, verb, target, *rest, timeout=math.inf):
        """Have one thing done, in at most `timeout` and in all of the seconds that are left.

        Raises:
            Failed: there is no (good) answer, now and from now on.
            Exception: what the program raised, if it is one of Python's own, else RuntimeError.
        """
        if self.failure:
            raise Failed(self.failure)
        message = [verb, target, *[encode(x, refuse) for x in rest]]
        start = time.monotonic()
        try:
            self.sock.settimeout(max(1e-3, min(timeout, self.seconds)))
            send(self.sock, message)
            reply = receive(self.sock, start + min(timeout, self.seconds))
            self.seconds -= time.monotonic() - start
            if "error" in reply:
                name, text = reply["error"]
            else:
                return decode(reply["value"], lambda number: Remote(self, int(number)))
        except TimeoutError:
            self.failure = "timeout"
        except (OSError, EOFError):
            self.failure = "died"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error):
            self.failure = "garbled"
        if self.failure:
            raise Failed(self.failure)
        kind = getattr(builtins, str(name), None)  # tests may expect a ValueError
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        try:
            error = kind(str(text)[:300])
        except TypeError:  # a few want more arguments
            error = RuntimeError(str(text)[:300])
        raise error

    def load(self, code, timeout=math.inf):
        self.ask("load", code, timeout=timeout)

    def call(self, name, *args, timeout=math.inf):
        return self.ask("call", name, list(args), {}, timeout=timeout)


class Remote:
    """Stands for a function or an object in the candidate's process. It equals nothing but itself."""

    __slots__ = ("_candidate", "_key")

    def __init__(self, candidate, key):
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_key", key)

    def __call__(self, *args, **kwargs):
        return self._candidate.ask("call", self._key, list(args), kwargs)

    def __getattr__(self, name):
        return self._candidate.ask("get", self._key, name)

    def __setattr__(self, name, value):
        self._candidate.ask("set", self._key, name, value)


def refuse(x):
    raise TypeError(f"a {type(x).__name__} cannot be sent to the program")


# ---------------------------------------------------------------------------------------------------------------------


def limit(limits):
    """Set the limits of this process and its children; hard ones, so that the program cannot raise them."""
    for name, value in limits.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (value, value))


def main(role, limits, fd, paths):
    """Be the candidate or the judge at the end `fd` of a socket. A judge's job comes in by stdin and goes to stdout."""
    sys.path[:] = sys.path + paths
    sys.set_int_max_str_digits(100_000)  # EvalPlus has such numbers
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    limit(limits)
    if role == "candidate":
        return serve(sock)
    job = json.loads(sys.stdin.buffer.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.modules["sandbox"] = types.ModuleType("sandbox")
    sys.modules["sandbox.inside"] = sys.modules["__main__"]
    namespace = {"__name__": "judges"}
    exec(compile(job["judges"], "judges.py", "exec"), namespace)
    candidate = Candidate(sock)
    candidate.ready(job["patience"])
    print("started", file=out, flush=True)
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, job["seconds"] + job["spare"])
    candidate.seconds = job["seconds"]
    json.dump(namespace[job["judge"]](candidate, job["data"]), out)
    out.flush()


def alarm(number, frame):
    raise Failed("timeout")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
