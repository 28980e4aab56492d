"""What runs inside a sandbox, on one of two sides of a socket: the candidate (untrusted code) or its judge.

The text of this file is handed to `python -c`, so that it needs the standard library alone. The candidate's process
holds the program under test and nothing else; it gets function names and arguments and answers with *data*: JSON with
tags for what JSON lacks. The judge's process, in a sandbox of its own, holds the reference solution and the tests. What
the candidate does to its own process (patched builtins, __eq__, frames, exit codes) can change what it sends, never
how that is compared: it passes by sending right answers, and in no other way.

C code that gets a value from the candidate, in the judge, and why none of it asks the candidate anything:

- socket.recv and struct.unpack get bytes. The size is checked before the message is read, the deadline after each part.
- The JSON scanner gets those bytes. Our own functions make the numbers, of at most 40 characters.
- int(text, 16), bytes.fromhex, complex, range get strings and numbers whose exact type was checked.
- tuple, set, frozenset, dict, deque, iter get lists of decoded values; hash gets the keys, before a set or dict is made
  of them: too many equal hashes are refused.
- numpy.dtype gets a string out of a whitelist; numpy.array gets a flat list of Python's own numbers or strings, all of
  the dtype's type. The shape is checked to fit. No stand-in (Remote) gets there.
- After that, C code of the judges and tests (==, abs, set, sorted, map, numpy.allclose, repr) gets values of Python's
  own exact types, numpy's arrays of plain dtypes, and stand-ins. A stand-in has no special method but __call__ and
  those of attributes, and these refuse special names (__array__, __index__, __len__ and so on) without asking.
- map, filter, sorted and others call stand-ins. What they raise is a ProgramError or Failed, never StopIteration.
- Whatever takes too long in C all the same is ended by a limit on the judge's processor time (Candidate.timed).
"""

import builtins
import collections
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
import types

MAX_FRAME = 32 << 20  # bytes of any message
MAX_ITEMS = 1_000_000  # that are taken from an iterator
# Of a reply. The largest right answers of HumanEval+ and MBPP+ have 12.4 MB and 1e6 objects: see judges.room.
MAX_BYTES, MAX_OBJECTS, MAX_DEPTH = 4 << 20, 100_000, 100

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed, itertools.chain, collections.abc.Iterator)
VIEWS = (collections.abc.KeysView, collections.abc.ValuesView, collections.abc.ItemsView)
DTYPE = re.compile(r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<c(8|16)|<U\d{1,6}|\|S\d{1,6}")
OF_DTYPE = {"b": bool, "i": int, "u": int, "f": float, "c": complex, "U": str, "S": bytes}


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
        return {"range": [encode(v, refer) for v in (x.start, x.stop, x.step)]}
    if isinstance(x, ITERATORS + VIEWS):
        return {"iterator": [encode(v, refer) for v in itertools.islice(x, MAX_ITEMS)]}
    if t.__module__ == "numpy" and hasattr(x, "tolist") and DTYPE.fullmatch(dtype := x.dtype.newbyteorder("<").str):
        return {"numpy": [dtype, list(x.shape), encode(x.ravel().tolist(), refer)]}
    if isinstance(x, Remote):
        return {"object": x._key}
    return {"object": refer(x)}


class Decoder:
    """Makes the values again of which `encode` made JSON, in time linear in its size.

    resolve: gives what stands for an object that is no data
    objects: so many are allowed; ValueError for more, and for whatever `encode` does not make
    """

    def __init__(self, resolve, objects=math.inf):
        self.resolve, self.objects = resolve, objects

    def value(self, x, depth=0):
        if isinstance(x, list):
            return self.items(x, depth)
        if not isinstance(x, dict):
            return x
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        ((tag, content),) = x.items()
        if tag == "object":
            return self.resolve(content)
        if tag == "int":
            return int(*exactly(str, [content], 1), 16)  # linear; HumanEval/83 has answers of 830,000 such digits
        if tag in ("bytes", "bytearray"):
            return getattr(builtins, tag).fromhex(content)
        items = self.items(content, depth)
        if tag == "complex":
            return complex(*exactly(float, items, 2))
        if tag == "range":
            return range(*exactly(int, items, 3))
        if tag == "numpy":
            return array(*items)
        if tag == "dict":
            return dict(zip(few_collisions([k for k, _ in items]), [v for _, v in items], strict=True))
        if tag in ("set", "frozenset"):
            items = few_collisions(items)
        kinds = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque, "iterator": iter}
        return kinds[tag](items)

    def items(self, x, depth):
        """The values of a list."""
        if type(x) is not list or depth > MAX_DEPTH:
            raise ValueError("no list, or too deep")
        self.objects -= len(x) + 1
        if self.objects < 0:
            raise ValueError("too many objects")
        return [self.value(v, depth + 1) if isinstance(v, list | dict) else v for v in x]


def decode(x, resolve, objects=math.inf):
    return Decoder(resolve, objects).value(x)


def exactly(kind, items, n):
    """items, if they are n of exactly this type."""
    if len(items) != n or any(type(v) is not kind for v in items):
        raise ValueError(f"not {n} of {kind.__name__}")
    return items


def few_collisions(keys):
    """keys, if a set of them takes linear time: integers, tuples and others with one hash are made at will."""
    same = collections.Counter(map(hash, keys))
    if sum(n * n for n in same.values()) > 10 * len(keys) + 10_000:
        raise ValueError("too many equal hashes")
    return keys


def array(dtype, shape, flat):
    """A numpy array or scalar of what `encode` made of it."""
    if type(dtype) is not str or not DTYPE.fullmatch(dtype):
        raise ValueError("no such dtype")
    exactly(OF_DTYPE[dtype[1]], flat, len(flat))
    exactly(int, shape, len(shape))
    if len(shape) > 8 or any(not 0 <= n <= MAX_ITEMS for n in shape) or math.prod(shape) != len(flat):
        raise ValueError("no such shape")
    import numpy

    if numpy.dtype(dtype).itemsize * len(flat) > MAX_FRAME:
        raise ValueError("too large an array")
    return numpy.array(flat, dtype=dtype).reshape(shape)[()]


def send(sock, message):
    text = json.dumps(message).encode()
    if len(text) > MAX_FRAME:
        raise ValueError(f"a message of {len(text)} bytes, {MAX_FRAME} are allowed")
    sock.sendall(struct.pack(">I", len(text)) + text)


def receive(sock, deadline=math.inf, most=MAX_FRAME):
    """The next message, of at most `most` bytes. Raises EOFError at the end, TimeoutError, ValueError for others."""

    def read(n):
        parts = bytearray()
        while len(parts) < n:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(None if left == math.inf else left)
            part = sock.recv(min(n - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return parts

    (size,) = struct.unpack(">I", read(4))
    if size > most:
        raise ValueError(f"a message of {size} bytes, {most} are allowed")
    text = read(size)
    gc.disable()  # which would look at all lists again and again
    try:
        return json.loads(text, parse_int=functools.partial(number, int), parse_float=functools.partial(number, float))
    finally:
        gc.enable()


def number(kind, text):
    """A number of JSON. Longer ones than Python writes are refused: they are read in more than linear time."""
    if len(text) > 40:
        raise ValueError("too long a number")
    return kind(text)


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
            kind = next(c.__name__ for c in type(e).__mro__ if c.__module__ == "builtins")
            reply = {"error": [kind, repr(e)[:300]]}
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


class ProgramError(Exception):
    """What the program raised."""


# Tests may expect a ValueError: each kind has a class of ours that is one. StopIteration, SystemExit and others that
# mean something to Python itself have none, nor have those that are not made of one string.
ERRORS = {
    name: type(name, (ProgramError, kind), {})
    for name, kind in vars(builtins).items()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, StopIteration | StopAsyncIteration | BaseExceptionGroup | Warning)
    and (not issubclass(kind, UnicodeError) or kind is UnicodeError)
    and name == kind.__name__
    and kind is not Exception
}


class Candidate:
    """The process of the program under test, as its judge sees it."""

    def __init__(self, sock):
        self.sock = sock
        self.seconds = 0.0  # that it may still take
        self.deadline = None  # of what is going on, by time.monotonic
        self.room = MAX_BYTES, MAX_OBJECTS  # of a reply
        self.failure = None

    def ready(self, timeout):
        """Wait until the process is up; what it runs has not begun by then."""
        if receive(self.sock, time.monotonic() + timeout) != "ready":
            raise ValueError("the candidate's process is not what it should be")

    @contextlib.contextmanager
    def timed(self, limit=math.inf):
        """One deadline for a call and for all that it leads to, the judge's own work on the answer too.

        What it takes is taken off the seconds that are left. Where C code does not hear the alarm, the judge is killed
        once it has used as much processor time.

        Raises:
            Failed: the deadline has passed.
        """
        start = time.monotonic()
        limit = max(1e-3, min(limit, self.seconds))
        self.deadline = start + limit
        signal.signal(signal.SIGALRM, self.alarm)
        signal.setitimer(signal.ITIMER_REAL, limit, 0.1)  # again and again: a test may catch everything
        signal.setitimer(signal.ITIMER_PROF, limit + 0.5)
        try:
            yield
            self.alarm()
        finally:
            self.deadline = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.seconds -= time.monotonic() - start

    def alarm(self, *_):
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.failure = self.failure or "timeout"
            raise Failed(self.failure)

    def ask(self, verb, target, *rest):
        """Have one thing done before the deadline.

        Raises:
            Failed: there is no (good) answer, now and from now on.
            ProgramError: what the program raised; also a ValueError, if that was one, and so on.
        """
        if self.failure:
            raise Failed(self.failure)
        message = [verb, target, *[encode(x, refuse) for x in rest]]
        error = None
        try:
            self.sock.settimeout(max(1e-3, self.deadline - time.monotonic()))
            send(self.sock, message)
            ((kind, content),) = receive(self.sock, self.deadline, self.room[0]).items()
            if kind == "value":
                return decode(content, self.stand_in, self.room[1])
            name, text = exactly(str, content, 2)
            error = ERRORS.get(name, ProgramError)(text[:300])
        except TimeoutError:
            self.failure = "timeout"
        except (OSError, EOFError):
            self.failure = "died"
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
            self.failure = "garbled"
        raise error or Failed(self.failure)

    def stand_in(self, key):
        """What stands for an object of the program."""
        if type(key) is not int:
            raise ValueError("no object")
        return Remote(self, key)

    def load(self, code):
        self.ask("load", code)

    def call(self, name, *args):
        return self.ask("call", name, list(args), {})


class Remote:
    """Stands for a function or an object in the candidate's process. It equals nothing but itself.

    Python and C code look special methods up in the type, or ask for them by name: there is none but __call__.
    """

    __slots__ = ("_candidate", "_key")

    def __init__(self, candidate, key):
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_key", key)

    def __call__(self, *args, **kwargs):
        return self._candidate.ask("call", self._key, list(args), kwargs)

    def __getattr__(self, name):
        return self._candidate.ask("get", self._key, plain(name))

    def __setattr__(self, name, value):
        self._candidate.ask("set", self._key, plain(name), value)

    def __reduce_ex__(self, protocol):
        raise TypeError("an object of the program cannot be copied")


def plain(name):
    """name, if it is an attribute of the program's own."""
    if name in Remote.__slots__ or (name.startswith("__") and name.endswith("__")):
        raise AttributeError(f"an object of the program has no {name} here")
    return name


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
    """Be the candidate or the judge at one end, fd, of a socket. The judge reads its task from stdin."""
    sys.path[:] = sys.path + paths
    sys.set_int_max_str_digits(100_000)  # EvalPlus has such numbers
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    limit(limits)
    if role == "candidate":
        return serve(sock)
    task = json.loads(sys.stdin.buffer.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.modules["sandbox"] = types.ModuleType("sandbox")
    sys.modules["sandbox.inside"] = sys.modules["__main__"]
    namespace = {"__name__": "judges"}
    exec(compile(task["judges"], "judges.py", "exec"), namespace)
    candidate = Candidate(sock)
    candidate.ready(task["patience"])
    print("started", file=out, flush=True)
    candidate.seconds = task["seconds"]
    json.dump(namespace[task["judge"]](candidate, task["data"]), out)
    out.flush()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
