"""Programs that must not pass, {name: source}. Each defines f(x), which is to be x * x + 1, and does not know that.

Four kinds. FORGERS try to pass without the right answer. REPLIES do, or try to be slow, by writing to the judge what no
program would. SWALLOWED have tests of their own that are Python code: (tests, program). ATTEMPTS go on to the right
answer, and so would pass, if they succeed. Each is bounded in itself (300 processes, 2 GiB, 10 s), so that a sandbox that
does not hold is no disaster.
"""

import json
import platform

from sandbox import seccomp

FORGERS = {
    "returns None": "def f(x): return None",
    "no such function": "def g(x): return 2",
    "syntax error": "def f(x) return 2",
    "sys.exit at load": "import sys; sys.exit(0)",
    "sys.exit in call": "def f(x):\n    import sys; sys.exit(0)",
    "os._exit at load": "import os; os._exit(0)",
    "os._exit in call": "def f(x):\n    import os; os._exit(0)",
    "abort": "def f(x):\n    import os; os.abort()",
    "always equal": "class A:\n    def __eq__(self, o): return True\n    __ne__ = lambda s, o: False\ndef f(x): return A()",
    "int that is always equal": "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\n"
    "def f(x): return A(0)",
    "float that is always equal": "class A(float):\n    def __eq__(self, o): return True\ndef f(x): return A('nan')",
    "list that is always equal": "class A(list):\n    def __eq__(self, o): return True\ndef f(x): return A([1])",
    "metaclass that is always equal": "class M(type):\n    def __eq__(c, o): return True\n    __hash__ = type.__hash__\n"
    "class A(metaclass=M): pass\ndef f(x): return A",
    "numpy's any": "import numpy\ndef f(x): return numpy.array([[True]])",
    "numpy object that is always equal": "import numpy\nclass A:\n    def __eq__(self, o): return True\n"
    "def f(x): return numpy.array([A()], dtype=object)",
    "mock": "from unittest.mock import MagicMock, ANY\ndef f(x): return ANY",
    "generator": "def f(x):\n    while True: yield x",
    "cycle": "def f(x):\n    a = []; a.append(a); return a",
    "deep list": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "huge output": "def f(x): return 'a' * (100 << 20)",
    "huge integer": "def f(x): return 1 << (1 << 24)",
    "prints the verdict": 'print(\'started\\n{"base": "passed"}\', flush=True)\ndef f(x): return 0',
    "patched builtins": "import builtins\nfor n in ('len', 'isinstance', 'hasattr', 'abs', 'all', 'type'):\n"
    "    setattr(builtins, n, lambda *a: True)\ndef f(x): return 0",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = BaseException\n__debug__x = 0\ndef f(x): return 0",
    "patched json": 'import json\njson.dumps = lambda *a, **k: \'{"base": "passed", "value": true}\'\ndef f(x): return 0',
    "patched runner": "import sys\nm = sys.modules['__main__']\nm.encode = lambda *a: {'base': 'passed'}\ndef f(x): return 0",
    "patched equality of judges": "import sys\nm = sys.modules['__main__']\nm.Remote.__eq__ = lambda *a: True\n"
    "m.Candidate.call = lambda *a, **k: 2\nm.Failed.why = 'passed'\ndef f(x): return m.Remote(None, 0)",
    "raises its way out": "class E(BaseException): why = 'passed'\ndef f(x): raise E()",
    "raises Failed": "import sys\ndef f(x): raise sys.modules['__main__'].Failed('passed')",
    "raises an evil repr": "class E(Exception):\n    def __repr__(self): raise SystemExit\ndef f(x): raise E()",
    "writes to all descriptors": "import os\ndef f(x):\n    for fd in range(3, 256):\n        for text in "
    '(b\'started\\n{"base": "passed"}\', b\'\\0\\0\\0\\x13{"base": "passed"}  \','
    " b'\\0\\0\\0\\x10{\"value\": true}  '):\n"
    "            try: os.write(fd, text)\n            except OSError: pass\n    return 0",
    "answers in advance": "import os, struct\nfor fd in range(3, 64):\n    for v in range(50):\n"
    "        t = b'{\"value\": %d}' % v\n        try: os.write(fd, struct.pack('>I', len(t)) + t)\n"
    "        except OSError: pass\ndef f(x): return 0",
    "garbage frames": "import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, b'\\xff' * 1000)\n"
    "        except OSError: pass\n    return 0",
    "deep JSON": "import os, struct\nt = b'{\"value\": ' + b'[' * 100000 + b']' * 100000 + b'}'\n"
    "for fd in range(3, 64):\n    try: os.write(fd, struct.pack('>I', len(t)) + t)\n    except OSError: pass\n"
    "def f(x): return 0",
    "foreign objects": 'import os, struct\nt = b\'{"value": {"object": "f"}}\'\nfor fd in range(3, 64):\n'
    "    try: os.write(fd, struct.pack('>I', len(t)) + t)\n    except OSError: pass\ndef f(x): return 0",
    "unknown tags": 'import os, struct\nt = b\'{"value": {"eval": "exit()"}}\'\nfor fd in range(3, 64):\n'
    "    try: os.write(fd, struct.pack('>I', len(t)) + t)\n    except OSError: pass\ndef f(x): return 0",
    "closes all descriptors": "import os\ndef f(x):\n    os.closerange(0, 256); return 0",
    "infinite loop": "def f(x):\n    while True: pass",
    "infinite loop at load": "while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(10)",
    "catches every signal": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass",
    "blocks every signal": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ndef f(x):\n"
    "    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    "infinite output": "import sys\ndef f(x):\n    while True:\n        print('x' * 10000)\n        sys.stderr.write('x' * 10000)",
    "stops itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "deep recursion": "def f(x): return f(x)",
    "deep recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "segfault": "import ctypes\ndef f(x): return ctypes.string_at(0)",
    "overwritten memory": "import ctypes\ndef f(x):\n    ctypes.memset(id(f), 255, 4096); return 0",
    "gc finds nothing": "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
    "        if isinstance(o, dict) and 'reference' in o and callable(o['reference']): return o['reference'](x)\n"
    "    return next(o for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o)['expected']",
    "frames hold nothing": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for v in (*frame.f_locals.values(), *frame.f_globals.values()):\n"
    "            if getattr(v, '__name__', '') == 'reference': return v(x)\n"
    "            if isinstance(v, dict) and 'expected' in v: return v['expected']\n        frame = frame.f_back\n"
    "    return 0",
    "threads that never end": "import threading, time\ndef f(x):\n    for _ in range(4):\n"
    "        threading.Thread(target=time.sleep, args=(10,)).start()\n    return 0",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise KeyboardInterrupt",
    "decompression bomb": "import zlib\ndef f(x):\n    d = zlib.compress(bytes(64 << 20)); return len(b''.join("
    "zlib.decompress(d) for _ in range(32)))",
    "slow regex": "import re\ndef f(x): return re.match('(a*)*b', 'a' * 40)",
    "slow integer": "def f(x): return 3 ** (10 ** 9)",
}

# Takes the socket over: reply(verb, target, rest) is the text that answers a message, or None.
HIJACK = """
import json, struct, sys, time
frame = sys._getframe()
while 'sock' not in frame.f_locals:
    frame = frame.f_back
sock, main = frame.f_locals['sock'], sys.modules['__main__']
sock.settimeout(None)
P = (1 << 61) - 1  # multiples of it have the hash 0
def say(text):
    sock.sendall(struct.pack('>I', len(text)) + text.encode())
def serve(reply):
    say('{"value": null}')
    while True:
        verb, target, *rest = main.receive(sock)
        say(reply(verb, target, rest))
"""


def always(value: object) -> str:
    """A program that answers everything with one value, given as JSON-able."""
    return f"{HIJACK}serve(lambda *_: {json.dumps({'value': value})!r})"


def computed(text: str) -> str:
    """A program that answers everything with the text of an expression, as the value."""
    return f"{HIJACK}text = '{{\"value\": ' + {text} + '}}'\nserve(lambda *_: text)"


def interface(value: str) -> str:
    """A program whose answer is `value`, with the object 0 in it, whose memory is offered to whoever asks."""
    return f"""{HIJACK}
def reply(verb, target, rest):
    if verb == 'call':
        return json.dumps({{"value": {value}}})
    if rest[0] in ('__array_interface__', '__array_struct__', '__array__', '__buffer__', '__index__', '__float__'):
        return json.dumps({{"value": {{"dict": [["data", {{"bytes": (bytes(4) * 20).hex()}}], ["shape", {{"tuple": []}}],
            ["typestr", "<u4"], ["offset", 24], ["version", 3]]}}}})
    return '{{"value": 10}}'
serve(reply)"""


REPLIES = {
    "array interface": interface('{"numpy": ["<u4", {"object": 0}]}'),
    "array interface of an entry": interface('{"numpy": ["<u4", [1], [{"object": 0}]]}'),
    "array interface of a scalar": interface('{"numpy": ["<u4", [], [{"object": 0}]]}'),
    "array interface of the dtype": interface('{"numpy": [{"object": 0}, [], [1]]}'),
    "array interface of the shape": interface('{"numpy": ["<u4", [{"object": 0}], [1]]}'),
    "index of a range": interface('{"range": [0, {"object": 0}, 1]}'),
    "float of a complex": interface('{"complex": [{"object": 0}, 0.0]}'),
    "an object alone": interface('{"object": 0}'),
    "dtype of objects": always({"numpy": ["|O", [1], [{"object": 0}]]}),
    "dtype of bytes": always({"numpy": ["|V8", [1], [{"bytes": "0000000000000000"}]]}),
    "dtype of dates": always({"numpy": ["<M8[s]", [1], [10]]}),
    "dtype with fields": always({"numpy": [[["a", "<i8"]], [1], [10]]}),
    "dtype with commas": always({"numpy": ["i8,O", [1], [10]]}),
    "empty array that is as long as the machine": always({"numpy": ["<i8", [0, 1 << 62], []]}),
    "array of a wrong shape": always({"numpy": ["<i8", [1 << 20, 1 << 20], [10]]}),
    "array of a negative shape": always({"numpy": ["<i8", [-1], [10]]}),
    "array of many dimensions": always({"numpy": ["<i8", [1] * 5000, [10]]}),
    "array of wide strings": computed("json.dumps({'numpy': ['<U999999', [3000], ['a'] * 3000]})"),
    "array of mixed entries": always({"numpy": ["<i8", [2], [10, True]]}),
    "array of an integer that is too large": always({"numpy": ["|i1", [1], [1 << 40]]}),
    "colliding set": computed("json.dumps({'set': [{'int': hex(k * P)} for k in range(5, 90000)]})"),
    "colliding dict": computed("json.dumps({'dict': [[{'int': hex(k * P)}, 0] for k in range(5, 24000)]})"),
    "colliding tuples": computed("json.dumps({'set': [{'tuple': [{'int': hex(k * P)}]} for k in range(5, 45000)]})"),
    "colliding complex numbers": computed(
        "json.dumps({'set': [{'complex': [-1000003.0 * k, float(k)]} for k in range(1, 30000)]})"
    ),
    "colliding sets of sets": computed(
        "json.dumps({'set': [{'frozenset': [{'int': hex(k * P)}]} for k in range(5, 45000)]})"
    ),
    "one key many times": computed("json.dumps({'dict': [[1, 0]] * 24000})"),
    "30 MiB of empty lists": computed("'[' + '[],' * 10000000 + '[]]'"),
    "4 MiB of empty lists": computed("'[' + '[],' * 1300000 + '[]]'"),
    "4 MiB of empty objects": computed("'[' + '{},' * 1300000 + '{}]'"),
    "4 MiB of keys": computed("'{' + ','.join(f'\"{k}\": 0' for k in range(300000)) + '}'"),
    "4 MiB of one float": computed("'0.' + '1' * 4000000"),
    "4 MiB of one integer": computed("'1' * 4000000"),
    "4 MiB of one hexadecimal integer": computed("json.dumps({'int': '0x' + 'f' * 4000000})"),
    "many long integers": computed("json.dumps([{'int': '0x' + 'f' * 80000}] * 50)"),
    "deep tuples": computed("'{\"tuple\": [' * 400 + ']}' * 400"),
    "deep lists": computed("'[' * 500 + ']' * 500"),
    "very deep lists": computed("'[' * 2000000 + ']' * 2000000"),
    "an endless range": always({"range": [0, 1 << 62, 1]}),
    "an infinite object": computed("'{\"object\": 1e999}'"),
    "an object with a name": always({"object": "f"}),
    "two tags": always({"tuple": [], "set": []}),
    "no tag": always({}),
    "a value and an error": f"""{HIJACK}serve(lambda *_: '{{"error": ["ValueError", "x"], "value": 10}}')""",
    "an error that is none": f"""{HIJACK}serve(lambda *_: '{{"error": null}}')""",
    "an error of a strange kind": f"""{HIJACK}serve(lambda *_: '{{"error": ["SystemExit", "0"]}}')""",
    "a text with an error in it": f"""{HIJACK}serve(lambda *_: '"error"')""",
    "a reply in drops": HIJACK
    + "serve(lambda *_: [sock.sendall(b'\\0\\1\\0\\0')] + [(sock.sendall(b' '), time.sleep(.0002)) for _ in range(30000)])",
    "a header in drops": HIJACK + "serve(lambda *_: [(sock.sendall(b'\\0'), time.sleep(.9)) for _ in range(8)])",
    "half a header": HIJACK + "serve(lambda *_: [sock.sendall(b'\\0\\0'), time.sleep(8)])",
    "more replies than questions": HIJACK + "serve(lambda *_: [say('{\"value\": 11}') for _ in range(2000)] and '[]')",
}

# Tests that would hold if what the program does got through: here f(x) is to be x + 1.
SWALLOWED = {
    "StopIteration in a list": ("assert list(map(f, [1, 2, 3])) == []", "def f(x): raise StopIteration"),
    "StopIteration in all": ("assert all(map(lambda x: f(x) == x + 1, [1, 2]))", "def f(x): raise StopIteration"),
    "its subclass": ("assert set(map(f, [1, 2])) <= {2, 3}", "class E(StopIteration): pass\ndef f(x): raise E"),
    "StopAsyncIteration": ("assert list(map(f, [1])) == []", "def f(x): raise StopAsyncIteration"),
    "StopIteration in a loop": ("for y in map(f, range(9)): assert y == 9", "def f(x): raise StopIteration(2)"),
    "GeneratorExit": ("assert list(map(f, [1])) == []", "def f(x): raise GeneratorExit"),
    "SystemExit": ("import atexit\nassert f(1) == 2", "def f(x): raise SystemExit(0)"),
    "KeyboardInterrupt": ("assert f(1) == 2", "def f(x): raise KeyboardInterrupt"),
    "a StopIteration by hand": (
        "assert list(map(f, [1])) == []",
        f"""{HIJACK}serve(lambda *_: '{{"error": ["StopIteration", "x"]}}')""",
    ),
    "a group of StopIterations": (
        "assert list(map(f, [1])) == []",
        "def f(x): raise BaseExceptionGroup('x', [StopIteration(), GeneratorExit()])",
    ),
    "a timeout in a test that catches everything": (
        "try: f(1)\nexcept: pass",
        "def f(x):\n    while True: pass",
    ),
    "an object that says that it is equal": (
        "assert f(1) == 2 or f(1) in [2] or f(1) in {2}",
        "class A:\n    def __eq__(self, o): return True\n    def __hash__(self): return hash(2)\ndef f(x): return A()",
    ),
    "an object with a length": (
        "assert len(f(1)) == 2",
        "class A:\n    def __len__(self): return 2\ndef f(x): return A()",
    ),
    "an object that is iterated": (
        "assert sum(f(1)) == 2",
        "class A:\n    def __iter__(self): return iter([2])\ndef f(x): return A()",
    ),
    "an object that is false": (
        "assert not f(1)",
        "class A:\n    def __bool__(self): return False\ndef f(x): return A()",
    ),
    "an object that is an array": (
        "import numpy\nassert numpy.allclose(f(1), 2)",
        "class A:\n    def __array__(self, *a, **k): import numpy; return numpy.array(2)\ndef f(x): return A()",
    ),
    "a special method by name": (
        "assert f(1).__index__() == 2",
        "class A:\n    def __index__(self): return 2\ndef f(x): return A()",
    ),
    "an endless sum": ("assert sum(f(1)) == 2", "def f(x): return range(1 << 60)"),
    "an endless set": ("assert set(f(1)) == {2}", "def f(x): return range(1 << 60)"),
    "an endless product": ("assert len(str(3 ** f(1))) == 2", "def f(x): return 1 << 40"),
    "an endless string": ("assert ('a' * f(1)).count('b') == f(1)", "def f(x): return 1 << 31"),
    "a slow pattern": ("import re\nassert re.match(f(1), 'a' * 40)", "def f(x): return '(a*)*b'"),
    "a set of the test's own": (
        "assert len(set(f(1))) == 2",
        computed("json.dumps([{'int': hex(k * P)} for k in range(5, 90000)])"),
    ),
    "a little late every time": (
        "a = f(1)\nfor _ in range(100): a.x",
        "import time\nclass A:\n    def __getattr__(self, n): time.sleep(.2)\na = A()\ndef f(x): return a",
    ),
}

RIGHT = "def right(x): return x * x + 1\n"
ATTEMPTS = {
    "reads /etc/passwd": "open('/etc/passwd').read(1)",
    "reads /proc": "import os; os.listdir('/proc')",
    "reads /sys": "import os; os.listdir('/sys')",
    "lists homes": "import os; os.listdir('/home')",
    "sees the project": "open(PROJECT)",
    "sees the environment": "import os; assert 'HOME' in os.environ or 'GMT_SECRET' in os.environ",
    "writes to /": "open('/x', 'w')",
    "writes to /usr": "open('/usr/x', 'w')",
    "writes to /dev/shm": "import os; os.makedirs('/dev/shm', exist_ok=True); open('/dev/shm/x', 'w')",
    "writes to Python": "import os; open(os.path.dirname(os.__file__) + '/x', 'w')",
    "symlink out": "import os; os.symlink(PROJECT, '/tmp/l'); open('/tmp/l').read(1)",
    "parent folders": "open('/tmp/../../../../etc/passwd').read(1)",
    "hard link": "import os; os.link('/usr/bin/env', '/tmp/env')",
    "chroot": "import os; os.chroot('/tmp')",
    "fills /tmp": "import itertools\nfor i in range(40):\n    open(f'/tmp/{i}', 'wb').write(bytes(4 << 20))",
    "a large file": "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "with open('/tmp/x', 'wb') as h:\n    for _ in range(40): h.write(bytes(4 << 20))",
    "a sparse file": "import os, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "h = open('/tmp/x', 'wb'); os.truncate(h.fileno(), 1 << 31)",
    "connects to the host": "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "connects to the world": "import socket; socket.create_connection(('1.1.1.1', 53), timeout=1)",
    "looks a name up": "import socket; socket.getaddrinfo('example.org', 80)",
    "host's abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)",
    "raw socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "sees network devices": "import socket; assert len(socket.if_nameindex()) > 1",
    "becomes root": "import os; os.setuid(0); assert os.getuid() == 0",
    "is root": "import os; assert os.getuid() == 0",
    "setuid program": "import subprocess; subprocess.run(['su', '-c', 'true'], check=True)",
    "mounts": "import ctypes; l = ctypes.CDLL(None); assert l.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "unshares the user": "import ctypes; l = ctypes.CDLL(None); assert l.unshare(0x10000000) == 0",
    "unshares mounts": "import ctypes; l = ctypes.CDLL(None); assert l.unshare(0x00020000) == 0",
    "traces its parent": "import ctypes, os; l = ctypes.CDLL(None); assert l.ptrace(16, os.getppid(), 0, 0) == 0",
    "traces the host": "import ctypes; l = ctypes.CDLL(None); assert l.ptrace(16, HOST, 0, 0) == 0",
    "kills the host": "import os; os.kill(HOST, 0)",
    "kills its init": "import os, signal, time; os.kill(1, signal.SIGKILL); time.sleep(.1); os.kill(1, 0)\n"
    "assert os.getppid() != 1",
    "kills everything": "import os, signal, time\nsignal.signal(15, signal.SIG_IGN); os.kill(-1, 15)\n"
    "assert os.getppid() == 0",
    "sees other processes": "import os\nassert sum(alive(p) for p in range(1, 3000)) > 3",
    "many processes": "import os, time\nfor _ in range(300):\n    if not os.fork(): time.sleep(5); os._exit(0)",
    "a tree of processes": "import os, time\nfor _ in range(8):\n    os.fork()\n    time.sleep(.05)",
    "a session of its own": "import os, time\nfor _ in range(20):\n    if not os.fork(): os.setsid(); time.sleep(5); os._exit(0)",
    "zombies": "import os\nfor _ in range(300):\n    if not os.fork(): os._exit(0)",
    "many threads": "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(3,)).start()",
    "much memory": "b = bytearray(1 << 31)",
    "much memory in parts": "b = [bytearray(1 << 24) for _ in range(128)]",
    "mapped memory": "import mmap; m = mmap.mmap(-1, 1 << 31)",
    "raises its limits": "import resource\nfor n in ('AS', 'NPROC', 'FSIZE', 'CPU'):\n"
    "    resource.setrlimit(getattr(resource, 'RLIMIT_' + n), (-1, -1))",
    "many descriptors": "import os; fds = [os.open('/dev/null', 0) for _ in range(1000)]",
    "a better priority": "import os; os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "another host name": "import socket; socket.sethostname('x')",
    "keys of the kernel": "import ctypes; l = ctypes.CDLL(None); assert l.syscall(250, 0, -4, 0) > 0",
    "sees the system's data": "import os; assert os.path.exists('/root/.ssh') or os.path.exists('/var/lib')",
    "one more process": "import os\nif not os.fork(): os._exit(0)",
    "spawns": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "shared memory": "import ctypes; l = ctypes.CDLL(None); assert l.shmget(0, 1 << 20, 0o1600) >= 0",
    "memory files": "import os; os.memfd_create('x')",
    "32-bit calls": "import ctypes; l = ctypes.CDLL(None); assert l.syscall(0x40000000 + 39) > 0",
    "the terminal": "open('/dev/tty')",
    "disks": "import os; assert any(n.startswith(('sd', 'vd', 'nvme')) for n in os.listdir('/dev'))",
    "devices": "import os; os.mknod('/tmp/d', 0o600 | 0o060000, os.makedev(8, 0))",
    "watches files": "fd = call('inotify_init1', 0); call('inotify_add_watch', fd, b'/usr', 0x20)",
    "watches all files": "call('fanotify_init', 0x200, 0)",
    "watches a folder by signals": "import fcntl, os; fcntl.fcntl(os.open('/usr', 0), 1026, 1)",
    "locks a file": "import fcntl, os; fcntl.flock(os.open(os.__file__, 0), fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "locks a file for reading": "import fcntl, os; fcntl.lockf(os.open(os.__file__, 0), fcntl.LOCK_SH | fcntl.LOCK_NB)",
    "locks an open file": "import fcntl, os, struct\n"
    "fcntl.fcntl(os.open(os.__file__, 0), 37, struct.pack('hhqqiq', 0, 0, 0, 0, 0, 0))",
    "asks for locks": "import fcntl, os, struct\n"
    "fcntl.fcntl(os.open(os.__file__, 0), 5, struct.pack('hhqqiq', 1, 0, 0, 0, 0, 0))",
    "leases a file": "import fcntl, os; fcntl.fcntl(os.open(os.__file__, 0), 1024, fcntl.F_RDLCK)",
    "hints at a file": "import fcntl, os, struct; fcntl.fcntl(os.open(os.__file__, 0), 1036, struct.pack('Q', 2))",
    "enlarges pipes": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
    "the time of /dev/null": "import os; os.utime('/dev/null')",
    "the time of an open /dev/null": "import os; os.utime(os.open('/dev/null', 1))",
    "the time of a file": "import os; os.utime(os.__file__)",
    "the mode of /dev/null": "import os; os.chmod('/dev/null', 0o666)",
    "a mark on /dev/null": "import os; os.setxattr('/dev/null', 'user.x', b'x')",
    "syncs all disks": "import os; os.sync()",
    "syncs all disks without a word": "import ctypes; ctypes.CDLL(None).sync()",
    "syncs a disk": "import os; call('syncfs', os.open('/usr', 0))",
    "syncs a file": "import os; os.fsync(os.open(os.__file__, 0))",
    "syncs a folder": "import os; os.fdatasync(os.open('/usr', 0))",
    "syncs mapped files": "call('msync', 0, 0, 4)",
    "drops a file from memory": "import os; os.posix_fadvise(os.open(os.__file__, 0), 0, 0, os.POSIX_FADV_DONTNEED)",
    "sees what is in memory": "import os; call('cachestat', os.open(os.__file__, 0), bytes(16), bytes(40), 0)",
    "sees what is in memory by reading": "import os; os.preadv(os.open(os.__file__, 0), [bytearray(9)], 0, os.RWF_NOWAIT)",
    "the limits of its init": "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE)",
    "higher limits of its init": "import resource; resource.prlimit(1, resource.RLIMIT_NPROC, (1 << 20, 1 << 20))",
    "limits of its parent": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_AS)",
    "the priority of its init": "import os; os.setpriority(os.PRIO_PROCESS, 1, 19)",
    "the priority of its user": "import os; os.setpriority(os.PRIO_USER, 0, 19)",
    "the processors of its init": "import os; os.sched_setaffinity(1, {0})",
    "the scheduler": "import os; os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
    "the hypervisor": "import socket; socket.socket(40, socket.SOCK_STREAM)",
    "the kernel's ciphers": "import socket; socket.socket(38, 5)",
    "netlink": "import socket; socket.socket(16, 3, 0)",
    "a descriptor of its maker": "import os, socket, sys\n"
    "f = sys._getframe()\nwhile 'sock' not in f.f_locals: f = f.f_back\n"
    "fd = f.f_locals['sock'].getsockopt(1, 77)\ncall('pidfd_send_signal', fd, 0, 0, 0)",
    "a descriptor of its init": "call('pidfd_open', 1, 0)",
    "memory in pipes": "import os; call('vmsplice', os.pipe()[1], None, 0, 0)",
    "packets": "import socket; socket.socket(17, socket.SOCK_RAW, 0)",
    "the kernel's log": "call('syslog', 10, 0, 0)",
    "io_uring": "call('io_uring_setup', 1, bytes(120))",
    "asynchronous files": "import ctypes; call('io_setup', 1, ctypes.byref(ctypes.c_ulong()))",
    "a program in the kernel": "call('bpf', 5, bytes(120), 120)",
    "counters of the processor": "call('perf_event_open', bytes(120), 0, -1, -1, 0)",
    "faults of its own": "call('userfaultfd', 1)",
    "handles of files": "call('name_to_handle_at', -100, b'/usr', bytes(200), bytes(8), 0)",
    "fills /dev": "open('/dev/x', 'w')",
    "fills /dev/shm": "open('/dev/shm/x', 'w')",
    "a terminal of its own": "import os; os.openpty()",
    "moves Python": "import os; os.rename(os.__file__, os.__file__ + 'x')",
    "a new name for the host's file": "import os; os.link(os.__file__, '/tmp/os.py')",
}
HELPERS = """
def call(name, *arguments):
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    result = -1 if NUMBERS[name] is None else libc.syscall(NUMBERS[name], *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result

def alive(pid):
    import os
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
"""


def escapes(**values) -> dict[str, str]:
    """The attempts as programs, with the host's values put into the names PROJECT, PORT, HOST and ABSTRACT."""
    column, _ = seccomp.MACHINES.get(platform.machine(), (0, 0))
    values["NUMBERS"] = {name: numbers[column] for name, numbers in seccomp.REFUSED.items()}
    names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    programs = {}
    for name, attempt in ATTEMPTS.items():
        body = "".join(f"    {line}\n" for line in attempt.split("\n"))
        programs[name] = f"{names}{RIGHT}{HELPERS}def f(x):\n{body}    return right(x)\n"
    return programs
