"""The sandbox: honest programs pass, hostile ones neither pass nor get out nor stay, and each verdict has its reason."""

from __future__ import annotations

import ast
import collections
import decimal
import fractions
import gc
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qstar.errors import UserError
from qstar.tasks.code import MBPP, HumanEval
from qstar.tasks.sandbox import REASONS, Job, Sandbox, Verdict, codec, needed_names, run_python
from tests.tasks.hostile import HOSTILE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
TOKEN = f"token-{os.urandom(16).hex()}"
TESTS = f"assert f(3) == {TOKEN!r}\nassert len(f(4)) == {len(TOKEN)}"
LIMIT = 1.0


ISOLATIONS = ("landlock", "seccomp")


@pytest.fixture(scope="module", params=[*ISOLATIONS, *(f"{name} numpy" for name in ISOLATIONS)])
def verifier(request):
    isolation, *allow = request.param.split()
    try:
        pool = Sandbox(2, isolation=isolation, allow=allow)
    except UserError as error:
        pytest.skip(str(error))
    with pool:
        yield pool


@pytest.fixture(scope="module")
def pool():
    try:
        pool = Sandbox(2)
    except UserError as error:
        pytest.skip(str(error))
    with pool:
        yield pool


def family(root: int) -> set[int]:
    """Every process that descends from `root`."""
    parent = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = {root}
    while new := {p for p, up in parent.items() if up in found} - found:
        found |= new
    return found - {root}


def idle(pool: Sandbox, seconds: float = 10.0) -> bool:
    """Whether each server comes to have nothing below it but the judge and the empty process that wait for a job.

    A server adopts what loses its parent, so whatever a program left behind would be there.
    """
    end = time.monotonic() + seconds
    while any(len(family(w._process.pid)) != 2 for w in pool._workers):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def open_folder():
    """A folder that everybody may reach and write, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield pathlib.Path(name)


def test_no_hostile_program_passes_escapes_or_stays(verifier, open_folder):
    """On one pool, one after the other: each has to leave the pool as it was for the next."""
    (open_folder / "kept").write_text(TOKEN)
    os.chmod(open_folder / "kept", 0o666)  # so it is not their user that keeps them from it
    wrong = {}
    # Of a program's own user, so that it could signal it.
    victim = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        server.setblocking(False)
        port = server.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        datagrams.setblocking(False)
        fill = {"{folder}": str(open_folder), "{port}": str(port), "{victim}": str(victim.pid)}
        jobs = []
        for program, _ in HOSTILE.values():
            for name, value in fill.items():
                program = program.replace(name, value)
            jobs.append(Job(program, TESTS))
        began = time.monotonic()
        verdicts = verifier.run_many(jobs, timeout_s=LIMIT, memory_mb=128)
        took = time.monotonic() - began
        for name, verdict in zip(HOSTILE, verdicts, strict=True):
            slow = {"timeout"} if verdict.seconds >= LIMIT else set()  # a busy machine may get no further in that time
            if verdict.passed or verdict.reason not in HOSTILE[name][1] | slow or verdict.seconds > LIMIT + 6:
                wrong[name] = verdict
        for listener in (server.accept, lambda: datagrams.recv(9)):
            with pytest.raises(BlockingIOError):  # nobody called
                listener()
    victim.stdin.close()
    assert not wrong and victim.wait(20) == 0  # at the end of its input: nobody ended it
    assert sorted(os.listdir(open_folder)) == ["kept"] and (open_folder / "kept").read_text() == TOKEN
    assert idle(verifier)
    assert took < len(HOSTILE) * (LIMIT + 1)
    honest = Job(f"def f(x): return {TOKEN!r}", TESTS)
    assert all(v.passed for v in verifier.run_many([honest] * 8))  # and the pool works as before


def test_there_are_enough_hostile_programs():
    assert len(HOSTILE) >= 30


def test_a_hostile_program_that_knew_the_answer_would_pass(pool):
    """The table above fails programs because they do not know the token, not because they are badly written."""
    knows = "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()\n"
    assert pool.run(Job(knows + f"def f(x): return {TOKEN!r}", TESTS)).passed
    assert idle(pool)  # its thread is gone


@pytest.mark.parametrize(
    "program, tests, reason",
    [
        ("def f(x): return x + 1", "assert f(1) == 2", "passed"),
        ("def f(x): return x + 1", "assert f(1) == 3", "wrong"),
        ("def g(x): return x", "assert f(1) == 3", "error"),
        ("def f(x): return 1 / 0", "assert f(1) == 3", "error"),
        ("def f(x): assert x == 2", "assert f(1) == 3", "error"),  # the program's own assertion is no test
        ("def f(x): return x", "if f(0):\n    assert True", "untested"),
        ("def f(x): return x", "def check(f):\n    assert f(1) == 1", "untested"),  # never called
        ("def f(x): return x", "def check(f):\n    assert f(1) == 1\ncheck(f)", "passed"),
        ("def f(x): return x", "import nonsense\nassert f(1) == 1", "error"),
        ("def f(x): raise KeyError(x)", "try:\n    f(1)\nexcept KeyError as e:\n    assert '1' in str(e)", "passed"),
        ("def f(x): raise KeyError(x)", "try:\n    f(1)\nexcept ValueError:\n    assert True", "error"),
        ("import time\ndef f(x): time.sleep(9)", "try:\n    f(1)\nexcept:\n    pass\nassert True", "timeout"),
        ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept:\n    pass\nassert True", "exited"),
        ("def f(x): return x", "assert sorted(f({3, 1})) == [1, 3] and f(2.5) == 2.5", "passed"),
        ("class P:\n    def __init__(s, a): s.a = a\ndef f(p): return p.a", "p = P(3)\np.a = 4\nassert f(p) == p.a == 4",
         "passed"),
        ("class P: pass\ndef f(): return [P()]", "assert f() == f()", "wrong"),  # equal to nothing, not even itself
        ("def f(): return object()", "assert f() != 3", "wrong"),  # and differs from nothing
        ("import asyncio\nasync def g(x): return x\ndef f(x): return asyncio.run(g(x))", "assert f(1) == 1",
         "passed"),
        ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2] and sum(f(4)) == 6", "passed"),
        ("import itertools\ndef f(n): return itertools.count()", "assert list(f(3)) == [0]", "timeout"),
        ("import re\ndef f(s): return re.match('a', s)", "assert f('ab') and not f('b')\nassert f('b') is None", "passed"),
        ("from collections import Counter\ndef f(s): return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}", "passed"),
        ("from collections import namedtuple\nT = namedtuple('T', 'a b')\ndef f(): return T(1, 2)", "assert f() == (1, 2)",
         "passed"),
        ("def f(x): return x", "assert f(lambda: 1) == 1", "error"),  # functions cannot be handed over
        ("def f(x):\n    x.clear()\n    return []", "a = [1]\nassert f(a) == a", "wrong"),  # arguments are copies
        ("def sum(a, b): return a * b", "assert sum(2, 3) == 6", "passed"),  # the tests name nothing else
        ("def set(x): return 0\ndef f(x): return 5", "assert set(f(1)) == set([1])", "error"),
        ("R = 3\ndef f(x): return x + R", "assert f(1) == 1 + R", "passed"),
        ("def f(x, *, y=1): return x * y", "assert f(2, y=3) == 6", "passed"),
        ("class E(ValueError): pass\ndef f(): raise E('no')", "try:\n    f()\nexcept ValueError as e:\n    assert 'no' in str(e)",
         "passed"),
        ("class E(Exception): pass\ndef f(): raise E('no')", "try:\n    f()\nexcept ValueError:\n    assert True", "error"),
        ("from datetime import *\ndef f(d): return d + timedelta(days=1)", "from datetime import *\n"
         "assert f(date(2024, 2, 28)) == date(2024, 2, 29) and f(datetime(2024, 1, 1, 2)) > datetime(2024, 1, 2)", "passed"),
        ("import threading\ndef f(n):\n    out, b = [], threading.Barrier(n)\n    def g(): b.wait(), out.append(1)\n"
         "    ts = [threading.Thread(target=g) for _ in range(n)]\n    for t in ts: t.start()\n    for t in ts: t.join()\n"
         "    return len(out)", "assert f(30) == 30", "passed"),
        ("import fcntl, os\ndef f():\n    a, b = os.pipe()\n    os.set_blocking(a, False)\n    fcntl.fcntl(a, fcntl.F_SETFD, 1)\n"
         "    return os.isatty(a), fcntl.fcntl(a, fcntl.F_GETFL) & os.O_NONBLOCK > 0", "assert f() == (False, True)", "passed"),
        ("def f(xs, t): return [x for x in xs if type(x) is not t]", "assert f((1, 'a'), int) == ['a']", "passed"),
    ],
)  # fmt: skip
def test_reasons(pool, program, tests, reason):
    verdict = pool.run(Job(program, tests), timeout_s=1.5 if reason == "timeout" else 20)
    assert verdict.reason == reason, verdict
    assert verdict.passed == (reason == "passed") and reason in REASONS


NUMPY = [
    ("import numpy as np\ndef f(x): return np.sum(x)", "assert f([1, 2]) == 3 and f([0.5]) == 0.5"),
    ("import numpy as np\ndef f(x): return x.T @ x", "import numpy as np\nassert (f(np.eye(3)) == np.eye(3)).all()"),
    ("from numpy.linalg import inv\nimport numpy.random as r\ndef f(): return inv([[2.0]]).tolist(), r.rand(0).shape",
     "assert f() == ([[0.5]], (0,))"),
    ("import numpy as np\ndef f(): return {np.int64(3): [np.float32(0.5), np.bool_(True)], 'z': np.zeros((2, 0))}",
     "z = f()\nassert z.pop('z').shape == (2, 0) and z == {3: [0.5, True]}"),
]  # fmt: skip


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_numpy_can_be_allowed(isolation):
    try:
        pool = Sandbox(1, isolation=isolation, allow=("numpy",))
    except UserError as error:
        pytest.skip(str(error))
    with pool:
        for job in NUMPY:
            assert (found := pool.run(Job(*job), timeout_s=20)).passed, found
        found = pool.run(Job("import yaml", "assert f()"), timeout_s=20)  # no other package, though it lies beside
        assert found.reason == "error" and "No module named" in found.detail


def test_a_task_says_which_packages_its_programs_may_import(tmp_path):
    task = HumanEval(data="x", allow=["numpy"])
    job = Job(*NUMPY[0])
    task.job = lambda problem, program: job
    assert task.correct(None, "") and task.judged([None], [""]) == [True]
    assert not run_python(*job[:2], timeout_s=20).passed
    assert run_python(*job[:2], timeout_s=20, allow=("numpy",)).passed


def test_a_package_may_be_a_single_module(verifier, tmp_path, monkeypatch):
    (tmp_path / "lonely.py").write_text("import fractions\nhalf = fractions.Fraction(1, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Sandbox(1, isolation=verifier.isolation, allow="lonely") as pool:  # one name, not six letters
        found = pool.run(Job("from lonely import half\ndef f(x): return x * half", "assert f(3) == 1.5"), timeout_s=20)
    assert found.passed, found


def test_one_package_is_given_by_its_name():
    assert run_python(*NUMPY[0], timeout_s=20, allow="numpy").passed


def test_a_comparison_of_no_plain_value_is_named(pool):
    found = pool.run(Job("def f(): return {1: 2}.keys()", "assert f() == {1}"), timeout_s=20)
    assert found.reason == "wrong" and "views of a dict" in found.detail


@pytest.mark.parametrize("name", ["nonsense", "os", "../numpy", "numpy.linalg", ""])
def test_a_package_that_cannot_be_allowed_is_named(name):
    with pytest.raises(UserError, match=f"allow='{name}' is not an installed package"):
        Sandbox(1, allow=(name,))


def test_run_python_is_the_pool_of_this_process():
    verdict = run_python("def f(x): return x", "assert f(1) == 1", timeout_s=20, memory_mb=64)
    assert isinstance(verdict, Verdict) and verdict.passed and 0 < verdict.seconds < 20


def test_verdicts_do_not_depend_on_the_hash_seed_or_the_clock(pool):
    program = "import random\ndef f(): return [list(set('abcdef')), random.random(), __name__]"
    tests = "assert f() == 0"
    details = set()
    for _ in range(6):
        verdict = pool.run(Job(program + "\nraise ValueError(f())", tests))
        details.add(verdict.detail)
    assert len(details) == 1 and "program" in details.pop()


def test_a_program_has_no_folder_that_it_may_write_to(verifier):
    write = "def f(path):\n    try: open(path, 'w')\n    except OSError: return 'refused'"
    tests = "\n".join(f"assert f({path!r}) == 'refused'" for path in ("left", "/dev/shm/left"))
    assert verifier.run(Job(write, tests), timeout_s=20).passed


def test_a_pool_whose_processes_were_killed_goes_on():
    with Sandbox(1) as pool:
        job = Job("def f(x): return x", "assert f(1) == 1")
        assert pool.run(job).passed
        os.kill(pool._workers[0]._process.pid, 9)
        pool._workers[0]._process.wait()
        assert pool.run(job).passed
        assert idle(pool)
        mine = {pool._workers[0]._process.pid, *family(pool._workers[0]._process.pid)}
    end = time.monotonic() + 10
    while mine & family(1) and time.monotonic() < end:
        time.sleep(0.02)
    assert len(mine) == 3 and not mine & family(1)  # server, judge and program went with the pool


def test_memory_is_what_was_asked_for(pool):
    job = Job("def f(n): return len(bytearray(n << 20))", "assert f(60) == 60 << 20")
    assert pool.run(job, memory_mb=100, timeout_s=20).passed
    assert pool.run(job, memory_mb=40, timeout_s=20).reason == "memory"


@pytest.mark.parametrize(
    "tests, what",
    [
        ("assert f(", "not Python"),
        ("assert f()\nreturn", "not Python"),
        ("f(1)", "assert nothing"),
        ("", "assert nothing"),
    ],
)
def test_tests_that_cannot_fail_a_program_are_refused(pool, tests, what):
    with pytest.raises(ValueError, match=what):
        pool.run(Job("def f(x): return x", tests))


@pytest.mark.parametrize("limits", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"memory_mb": 0}])
def test_limits_are_positive(pool, limits):
    with pytest.raises(ValueError, match="positive"):
        pool.run(Job("", "assert f()"), **limits)


def test_an_isolation_that_does_not_exist():
    with pytest.raises(UserError, match="isolation='none'"):
        Sandbox(1, isolation="none")


def test_needed_names_are_those_that_the_program_has_to_bring():
    assert needed_names("assert set(f(1)) == set(g)\nx = 3\nassert x") == ("f", "g")
    assert needed_names("import math\ndef check(c):\n    y = math.pi\n    assert c(h(y)) == y\ncheck(f)") == ("f", "h")
    assert needed_names("assert sum(1, 2) == 3") == ("sum",)
    assert needed_names("n = Node(1)\nn.left = Node(2)\nassert depth(n) == 2") == ("Node", "depth")


def test_tests_are_read_by_many_threads_at_once():
    """The collector may run Python code (JAX has it do so) between two nodes of a tree: then it is another thread's turn."""
    threshold, turn = gc.get_threshold(), lambda *_: time.sleep(0)
    tests = [
        f"assert f({i}) == " + "[" * 30 + "]" * 30 + f"\nassert g() == {[[j] for j in range(200)]}" for i in range(60)
    ]
    gc.callbacks.append(turn)
    gc.set_threshold(100)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(needed_names, tests)) == {("f", "g")}
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(turn)


# ------------------------------------------------------------------------------------------------------- the values

VALUES = [
    None, True, 0, -5, 2**62, -(2**200), 1.5, -0.0, float("inf"), "é\ud800\0", b"\x00\xff", 2 - 1j, [], [1, [2, ()]], (1,),
    {1: "a", (2, "b"): [None]}, {1, "a"}, frozenset({(1, 2)}), range(3, 9, 2), bytearray(b"x"), int, [str, type(None)],
    {"handle": ["list"]}, collections.deque([1, 2]), fractions.Fraction(-1, 3), decimal.Decimal("1.10"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda v: repr(v) if not isinstance(v, set) else "a set")
def test_values_come_back_as_they_were(value):
    data = json.loads(json.dumps(codec.encode(value, None)))
    found = codec.decode(data, None)
    assert found == value and type(found) is type(value) and repr(found) == repr(value)


def test_subclasses_arrive_as_what_they_hold():
    class Loud(list):
        def __iter__(self):
            raise RuntimeError

        def __eq__(self, other):
            return True

    class Big(int):
        def __int__(self):
            return 7

        __index__ = __int__

    class Other(str):
        def __str__(self):
            return "other"

    assert codec.decode(codec.encode([Loud([1, 2]), Big(3), Other("x")], None), None) == [[1, 2], 3, "x"]
    assert type(codec.decode(codec.encode(Big(3), None), None)) is int


@pytest.mark.parametrize(
    "data",
    [{}, [], ["list", {}], ["nonsense"], ["int", "x"], ["handle", "1"], ["handle", True], ["type", "object"], ["deque", {}],
     ["dict", 3], ["range", "a"], ["set", ["list"]], ["bytes", 3], ["complex", "1"], [["list"]], ["decimal", "x"]],
    ids=repr,
)  # fmt: skip
def test_what_is_no_value_is_refused(data):
    with pytest.raises((ValueError, TypeError, IndexError, KeyError, ArithmeticError)):
        codec.decode(data, lambda number: number)


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "exit", "object", "Foreign", None, 3])
def test_what_the_program_raises_never_ends_the_judge(name):
    assert type(codec.exception(name, "x")) is RuntimeError
    assert type(codec.exception("KeyError", "x")) is KeyError


# ------------------------------------------------------------------------------------------------ reference programs


def references(shared):
    """(task, problem, reference program as a model would have written it) of both data sets."""
    mbpp = MBPP(data=str(shared("data/mbpp/mbpp.jsonl")))
    yield from ((mbpp, p, mbpp.solution(p)) for s in ("few_shot", "test", "val", "train") for p in mbpp.every(s))
    for template in ("mbpp", "completion"):
        task = HumanEval(data=str(shared("data/humaneval/HumanEval.jsonl")), template=template)
        yield from ((task, p, task.solution(p)) for p in task.problems("test"))


def test_every_reference_program_passes(pool, shared):
    cases = list(references(shared))
    assert len(cases) == 974 + 2 * 164
    found = pool.run_many([task.job(p, task.parse(text)) for task, p, text in cases], timeout_s=120, memory_mb=512)
    assert not {p.id: v for (_, p, _), v in zip(cases, found) if not v.passed}


def test_no_reference_program_passes_for_another_problem(pool, shared):
    """The tests do test: the next problem's program, renamed to the function that is asked for, fails."""
    task = HumanEval(data=str(shared("data/humaneval/HumanEval.jsonl")))
    problems = task.problems("test")[:40]
    jobs = []
    for p, other in zip(problems, problems[1:]):
        name, theirs = (ast.parse(q.gold).body[-1].name for q in (p, other))
        jobs.append(task.job(p, f"{other.gold}\n{name} = {theirs}"))
    assert not any(v.passed for v in pool.run_many(jobs, timeout_s=10))


def test_a_program_cannot_redefine_the_helpers_of_its_tests(pool, shared):
    """HumanEval/32 measures a root by `poly`, which stands in the prompt, so in the program as well."""
    task = HumanEval(data=str(shared("data/humaneval/HumanEval.jsonl")))
    (problem,) = [p for p in task.problems("test") if p.id == "HumanEval/32"]
    cheat = "def poly(xs, x): return 0.0\ndef find_zero(xs): return 0.0"
    assert not pool.run(task.job(problem, cheat), timeout_s=10).passed
