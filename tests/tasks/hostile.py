"""Programs that want a good verdict without solving anything, want out, or want to stay. TOKEN is what the tests expect.

Each is (program, reasons it may be given). The tests of all but a few are TESTS; `f` would have to return the token.
"""

# ruff: noqa: E501

from __future__ import annotations

STILL = {"timeout"}
DEAD = {"exited"}
NO = {"wrong", "error"}
ANY = {"wrong", "error", "exited", "timeout", "memory", "output"}

# What a program may do to look for the token: return every text that looks like one.
_HUNT = """
import re
found = []
def look(text):
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    found.extend(re.findall("token-[0-9a-f]{32}", text) if isinstance(text, str) else [])
def f(x):
    return found[0] if found else ""
"""


def _signal(*steps: str, pair: str = "socket.socketpair()", process: str = "{victim}") -> str:
    """A program that takes the steps, asks for signals when descriptor `a` is ready (O_ASYNC), and makes it ready."""
    steps = (
        *steps,
        "fcntl.fcntl(a, 4, fcntl.fcntl(a, 3) | 0x2000)",
        "os.write(b if isinstance(b, int) else b.fileno(), b'x')",
    )
    lines = [f"try: {step}\nexcept OSError: pass" for step in steps]
    head = "import ctypes, fcntl, os, resource, socket, struct, time\nl = ctypes.CDLL(None)\nt = (ctypes.c_int * 1)()"
    made = f"p = {process}\ntry: a, b = {pair}\nexcept OSError: a, b = socket.socketpair()"
    return "\n".join([head, made, *lines, "def f(x): return time.sleep(0.05)"])


HOSTILE: dict[str, tuple[str, set[str]]] = {
    # ---- ends early, and says that all is well
    "exits with 0": ("import os; os._exit(0)", DEAD),
    "exits when called": ("import os\ndef f(x): os._exit(0)", DEAD),
    "sys.exit": ("import sys; sys.exit(0)", DEAD),
    "SystemExit when called": ("def f(x): raise SystemExit(0)", DEAD),
    "prints that it passed": ("print('passed'); print({'reason': 'passed'})\ndef f(x): return 'passed'", NO),
    "aborts": ("import os; os.abort()", DEAD),
    "kills itself": ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)", ANY),
    "stops itself": ("import os, signal\ndef f(x):\n    while True: os.kill(os.getpid(), signal.SIGSTOP)", STILL),
    "crashes the interpreter": ("import ctypes; ctypes.string_at(0)", DEAD),
    "exits in a thread": (
        "import os, threading\nthreading.Timer(0.05, os._exit, [0]).start()\nimport time\ntime.sleep(9)",
        DEAD,
    ),
    "leaves by an exit handler": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)", DEAD),
    "execs true": ("import os\nos.execv('/bin/true', ['true'])", NO),
    # ---- tampers with what it thinks is the checker
    "swallows assertions": (
        "import builtins\nclass AssertionError(Exception): pass\nbuiltins.AssertionError = AssertionError\ndef f(x): return 0",
        NO,
    ),
    "patches the hooks": (
        "import sys\nsys.excepthook = lambda *a: None\nsys.exit = lambda *a: None\nsys.settrace(lambda *a: None)\ndef f(x): return 0",
        NO,
    ),
    "patches the builtins": (
        "import builtins\nbuiltins.compile = builtins.exec = builtins.isinstance = lambda *a, **k: True\ndef f(x): return 0",
        ANY,
    ),
    "patches the judge's modules": (
        "import sys\nfor m in ('judge', 'codec', 'isolate', 'guest', 'server', '__main__'):\n    m = sys.modules.get(m)\n    for n in list(vars(m)) if m else []:\n"
        "        if callable(getattr(m, n)): setattr(m, n, lambda *a, **k: ('passed', ''))\ndef f(x): return 0",
        ANY,
    ),
    "sends a verdict": (
        "import codec\ncodec.send(3, {'reason': 'passed', 'seconds': 0.0, 'detail': ''})\ncodec.send(3, ['passed'])\ndef f(x): return 0",
        ANY,
    ),
    "answers before it is asked": (
        "import codec\nfor _ in range(50): codec.send(3, ['value', True])\ndef f(x): return True",
        ANY,
    ),
    "writes to every descriptor": (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"reason": "passed"}\' * 9)\n    except OSError: pass',
        ANY,
    ),
    "closes every descriptor": ("import os\nos.closerange(0, 1000)\ndef f(x): return 0", DEAD),
    "sends an enormous length": ("import os\nos.write(3, b'\\xff\\xff\\xff\\xff')\ndef f(x): return 0", {"output"}),
    "runs the judge's loop itself": (
        "import judge\njudge.verdict = lambda *a: ('passed', '')\njudge.run(3, 3, 1 << 40, 'seccomp')",
        ANY,
    ),
    "redefines what tests use": (
        "class str:\n    def __new__(cls, *a): return 1\ndef len(x): return 1\ndef f(x): return 1",
        NO,
    ),
    # ---- objects that lie
    "equals everything": (
        "class A:\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\n    __hash__ = lambda s: 0\ndef f(x): return A()",
        NO,
    ),
    "a text that equals everything": (
        "class A(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(x): return A('x')",
        NO,
    ),
    "a type that equals everything": (
        "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef f(x): return A",
        NO,
    ),
    "an object of many faces": (
        "class A:\n    def __getattr__(s, n): return lambda *a, **k: True\n    def __call__(s, *a): return s\ndef f(x): return A()",
        NO,
    ),
    "a list that lies": (
        "class A(list):\n    def __iter__(s):\n        raise SystemExit(0)\n    def __eq__(s, o): return True\ndef f(x): return A([1])",
        NO,
    ),
    # ---- looks for the expected value
    "searches its objects": (
        _HUNT + "import gc\nfor o in gc.get_objects():\n    for x in gc.get_referents(o): look(x)",
        NO,
    ),
    "searches the frames": (
        _HUNT
        + "import sys\nframe = sys._getframe()\nwhile frame:\n    for x in [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]: look(repr(x))\n    frame = frame.f_back",
        NO,
    ),
    "searches its memory": (
        _HUNT
        + "for line in open('/proc/self/maps'):\n    a, b = (int(x, 16) for x in line.split()[0].split('-'))\n    try:\n"
        "        with open('/proc/self/mem', 'rb') as m:\n            m.seek(a); look(m.read(min(b - a, 1 << 24)))\n    except (OSError, ValueError, OverflowError): pass",
        NO,
    ),
    "searches other processes": (
        _HUNT
        + "import os\nfor p in os.listdir('/proc'):\n    for n in ('cmdline', 'environ', 'mem', 'fd/3', 'fd/4', 'fd/5'):\n        try:\n"
        "            if p.isdigit(): look(open(f'/proc/{p}/{n}', 'rb').read(1 << 20))\n        except (OSError, ValueError): pass",
        NO,
    ),
    "searches the environment": (_HUNT + "import os\nlook(repr(os.environ))", NO),
    "searches its descriptors": (
        _HUNT
        + "import os\nfor fd in range(64):\n    try:\n        os.set_blocking(fd, False); look(os.read(fd, 1 << 20))\n    except OSError: pass",
        ANY,
    ),
    "searches the files": (
        _HUNT
        + "import os\nfor top in (os.getcwd(), '{folder}'):\n    for d, _, names in os.walk(top):\n        for n in names:\n"
        "            try: look(open(os.path.join(d, n), 'rb').read(1 << 16))\n            except OSError: pass",
        NO,
    ),
    "reads its parent's memory": (
        _HUNT
        + "import ctypes, os\nl = ctypes.CDLL(None)\nprint(l.ptrace(16, os.getppid(), 0, 0))\nb = ctypes.create_string_buffer(1 << 16)\n"
        "class V(ctypes.Structure): _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
        "for a in range(id(b) & ~0xfffff, (id(b) & ~0xfffff) + (1 << 24), 1 << 16):\n"
        "    l.process_vm_readv(os.getppid(), ctypes.byref(V(ctypes.addressof(b), 1 << 16)), 1, ctypes.byref(V(a, 1 << 16)), 1, 0); look(b.raw)",
        NO,
    ),
    # ---- takes all there is
    "spins": ("while True: pass", STILL),
    "spins when called": ("def f(x):\n    while True: pass", STILL),
    "spins inside C": ("def f(x): return (1 << 99_000_000) ** 9 % 7", ANY),
    "sleeps": ("import time; time.sleep(1000)", STILL),
    "ignores all signals": (
        "import signal\nfor s in signal.valid_signals():\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        STILL,
    ),
    "catches everything for ever": (
        "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        STILL,
    ),
    "waits for input": ("def f(x): return input()", NO),
    "eats memory": ("def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 20))", {"memory"}),
    "eats memory at once": ("a = bytearray(1 << 40)", {"memory"}),
    "eats anonymous files": (
        "import os\nfor i in range(9): os.write(os.memfd_create('x'), bytes(1 << 26))\ndef f(x): return 0",
        NO | {"memory"},
    ),
    "recurses": ("def f(x): return f(x)", NO),
    "recurses through the stack": (
        "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(x): return f(x)\nclass A:\n    def __repr__(s): return repr(s)\nrepr(A())",
        DEAD | {"memory", "error"},
    ),
    "raises its limits": (
        "import resource\nfor r in (resource.RLIMIT_AS, resource.RLIMIT_CPU):\n    resource.setrlimit(r, (resource.RLIM_INFINITY,) * 2)",
        NO,
    ),
    "returns too much": ("def f(x): return 'x' * (1 << 24)", {"output"}),
    "returns a deep list": ("def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a", ANY),
    "sends a deep list": (
        "import os, struct\nb = b'[' * 1000000\nos.write(3, struct.pack('<I', len(b)) + b)\ndef f(x): return 0",
        {"output"},
    ),
    "sends a number of a million digits": (
        "import os, struct\nb = b'[\"value\", ' + b'9' * 1000000 + b']'\nos.write(3, struct.pack('<I', len(b)) + b)",
        {"output"},
    ),
    "sends the same hash": (
        "import codec\ncodec.MAX_BYTES = 1 << 30\ndef f(x): return {i * ((1 << 61) - 1) for i in range(40000)}",
        ANY,
    ),
    "fills the disk": (
        "i = 0\nwhile True:\n    i += 1\n    with open(f'x{i}', 'wb') as file:\n        for _ in range(64): file.write(bytes(1 << 20))",
        NO | STILL,
    ),
    # ---- multiplies
    "forks for ever": ("import os\nwhile True: os.fork()", NO),
    "forks and lets the child answer": ("import os\nif os.fork(): os._exit(0)\ndef f(x): return 0", NO),
    "becomes a daemon": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\ndef f(x): return 0",
        NO,
    ),
    "starts a program": ("import subprocess\nsubprocess.run(['sh', '-c', 'sleep 1000 &'])\ndef f(x): return 0", NO),
    "spawns without fork": ("import os\nos.posix_spawn('/bin/sleep', ['sleep', '1000'], {})\ndef f(x): return 0", NO),
    "clones by hand": (
        "import ctypes\nl = ctypes.CDLL(None)\nfor n, a in ((56, 17), (57, 0), (58, 0), (435, 0)):\n    if l.syscall(n, a, 0, 0, 0, 0) == 0:\n        while True: pass\ndef f(x): return 0",
        NO,
    ),
    "starts threads for ever": (
        "import threading\ndef g():\n    while True: threading.Thread(target=g).start()\ng()",
        ANY,
    ),
    "leaves threads behind": (
        "import threading\ndef g():\n    while True: pass\nfor _ in range(4): threading.Thread(target=g).start()\ndef f(x): return 0",
        NO | STILL,
    ),
    # ---- gets at others
    "kills its parent": (
        "import os\nfor p in (os.getppid(), -1, 0): \n    try: os.kill(p, 9)\n    except OSError: pass\ndef f(x): return 0",
        NO,
    ),
    "kills by other means": (
        "import ctypes, os\nl = ctypes.CDLL(None)\np = os.getppid() or 2\nl.syscall(234, p, p, 9); l.syscall(200, p, 9); l.syscall(129, p, 9, 0)\n"
        "fd = l.syscall(434, p, 0); l.syscall(424, fd, 9, 0, 0)\ndef f(x): return 0",
        NO,
    ),
    "connects": (
        "import socket\ns = socket.create_connection(('127.0.0.1', {port}), 1); s.send(b'out')\ndef f(x): return 0",
        NO,
    ),
    "sends a datagram": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'out', ('127.0.0.1', {port}))\ndef f(x): return 0",
        NO,
    ),
    "writes a file": ("open('{folder}/mark', 'w').write('out')\ndef f(x): return 0", NO),
    "makes a folder": ("import os\nos.makedirs('{folder}/made')\ndef f(x): return 0", NO),
    "removes a file": ("import os\nos.unlink('{folder}/kept')\ndef f(x): return 0", NO),
    "empties a file": ("import os\nos.truncate('{folder}/kept', 0)\ndef f(x): return 0", NO),
    "climbs out by links": (
        "import os\nos.symlink('{folder}', 'out')\nopen('out/mark', 'w').write('out')\ndef f(x): return 0",
        NO,
    ),
    "climbs out of the root": (
        "import os\nos.mkdir('a')\nos.chroot('a')\nos.chdir('../../..')\nopen('{folder}/mark', 'w')\ndef f(x): return 0",
        NO,
    ),
    "makes a namespace": (
        "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nassert l.unshare(0x10000000) == 0\ndef f(x): return 0",
        NO,
    ),
    "mounts": (
        "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nassert l.mount(b'proc', b'.', b'proc', 0, None) == 0\ndef f(x): return 0",
        NO,
    ),
    "forgets its parent's death": (
        "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0\ndef f(x): return 0",
        NO,
    ),
    "uses the 32-bit calls": (
        "import ctypes\nassert ctypes.CDLL(None).syscall(0x40000000 + 57) >= 0\ndef f(x): return 0",
        NO,
    ),
    # ---- has the kernel signal another process
    "owns a socket for another": (_signal("fcntl.fcntl(a, 8, p)", "fcntl.fcntl(a, 10, 9)"), NO),  # F_SETOWN, F_SETSIG
    "owns a socket for a group": (_signal("fcntl.fcntl(a, 8, -p)"), NO),
    "owns a socket by F_SETOWN_EX": (
        _signal("fcntl.fcntl(a, 15, struct.pack('ii', 1, p))", "fcntl.fcntl(a, 10, 9)"),
        NO,
    ),
    "owns a socket by FIOSETOWN": (_signal("fcntl.ioctl(a, 0x8901, struct.pack('i', p))", "fcntl.fcntl(a, 10, 9)"), NO),
    "owns a socket by SIOCSPGRP": (_signal("fcntl.ioctl(a, 0x8902, struct.pack('i', p))"), NO),
    "owns a socket by numbers": (_signal("l.syscall(72, a.fileno(), 8, p)", "l.syscall(72, a.fileno(), 10, 9)"), NO),
    "owns a pipe for another": (_signal("fcntl.fcntl(a, 8, p)", "fcntl.fcntl(a, 10, 9)", pair="os.pipe()"), NO),
    "asks for signals by FIOASYNC": (
        _signal("fcntl.fcntl(a, 8, p)", "fcntl.ioctl(a, 0x5452, struct.pack('i', 1))"),
        NO,
    ),
    "leases a file for another": (
        _signal(
            "fcntl.fcntl(9, 8, p)",
            "fcntl.fcntl(9, 1024, 0)",
            "open(os.__file__, 'a')",
            pair="(os.dup2(os.open(os.__file__, 0), 9), 1)",
        ),
        NO,
    ),
    "watches a folder for another": (
        _signal(
            "fcntl.fcntl(a, 8, p)", "fcntl.fcntl(a, 1026, 0x8000000F)", "open('x', 'w')", pair="(os.open('.', 0), 1)"
        ),
        NO,
    ),
    "moves a terminal to another": (_signal("fcntl.ioctl(0, 0x5410, struct.pack('i', p))"), NO),
    "has its judge signalled": (_signal("fcntl.fcntl(a, 8, p)", "fcntl.fcntl(a, 10, 9)", process="os.getppid()"), NO),
    "has its judge signalled by their socket": (
        _signal("fcntl.fcntl(a, 8, p)", "fcntl.fcntl(a, 10, 9)", pair="(3, 1)", process="os.getppid()"),
        NO,
    ),
    "signals by numbers": (
        _signal(
            "[l.syscall(n, p, 9) for n in (62, 200)]",
            "[l.syscall(62, -p, 9)]",
            "l.syscall(234, p, p, 9)",
            "l.syscall(129, p, 9, bytes(128))",
            "l.syscall(297, p, p, 9, bytes(128))",
            "l.syscall(424, l.syscall(434, p, 0), 9, 0, 0)",
        ),
        NO,
    ),
    "has a timer signal another": (
        _signal(
            "l.syscall(222, 1, (ctypes.c_int * 16)(0, 0, 9, 4, p), t)",
            "l.syscall(223, t[0], 0, (ctypes.c_long * 4)(0, 0, 0, 1), 0)",
        ),
        NO,
    ),
    "limits another": (_signal("resource.prlimit(p, resource.RLIMIT_CPU, (0, 0))"), NO),
    # ---- uses numpy, where it may
    "writes through a memory map": (
        "import numpy as np\nnp.memmap('{folder}/kept', 'u1', 'r+')[:] = 0\ndef f(x): return 0",
        NO,
    ),
    "writes an array": ("import numpy as np\nnp.zeros(9).tofile('{folder}/mark')\ndef f(x): return 0", NO),
    "opens numpy for writing": ("import numpy as np\nopen(np.__file__, 'r+')\ndef f(x): return 0", NO),
    "reads beside numpy": (
        _HUNT
        + "import numpy, os\nd = os.path.dirname(os.path.dirname(numpy.__file__))\nassert set(os.listdir(d)) - {'numpy', 'numpy.libs'}\ndef f(x): return 0",
        NO,
    ),
    "an array that equals everything": (
        "import numpy as np\nclass A(np.ndarray):\n    def __eq__(s, o): return True\n    __bool__ = lambda s: True\n    tobytes = lambda *a: b''\n"
        "def f(x): return np.zeros(3).view(A)",
        NO,
    ),
    "a number that equals everything": (
        "import numpy as np\nclass A(np.float64):\n    def __eq__(s, o): return True\n    def item(s): return s\ndef f(x): return A(3)",
        NO,
    ),
    "an array of objects": (
        "import numpy as np\nclass A:\n    def __eq__(s, o): return True\ndef f(x): return np.array([A()])",
        NO,
    ),
    "sends an array of objects": (
        "import codec\ncodec.send(3, ['value', None])\ncodec.send(3, ['value', ['ndarray', '|O', [1], '00' * 8]])",
        ANY,
    ),
    "sends an enormous array": (
        "import codec\ncodec.send(3, ['value', None])\ncodec.send(3, ['value', ['ndarray', '<f8', [1 << 40], '00' * 8]])",
        ANY,
    ),
    # ---- is no program
    "does not parse": ("def f(x: return 1", NO),
    "holds a zero": ("def f(x): return 1\0", NO),
    "holds half a character": ("def f(x): return '\ud800'", NO),
    "does nothing": ("", NO),
    "only runs as a script": ("if __name__ == '__main__':\n    def f(x): return 0", NO),
}
