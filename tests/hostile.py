"""Programs that must not pass, {name: source}. Each defines f(x), which is to be x * x + 1, and does not know that.

Two kinds. FORGERS try to pass without the right answer. ESCAPES call `right`, and so would pass, if their attempt
succeeds. Each is bounded in itself (300 processes, 2 GiB, 10 s), so that a sandbox that does not hold is no disaster.
"""

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
}
ALIVE = """
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
    names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    programs = {}
    for name, attempt in ATTEMPTS.items():
        body = "".join(f"    {line}\n" for line in attempt.split("\n"))
        programs[name] = f"{names}{RIGHT}{ALIVE}def f(x):\n{body}    return right(x)\n"
    return programs
