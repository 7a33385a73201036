"""The process that runs the program: defines what it defines, calls what it is asked to call, and sends values back.

Nothing here is trusted by anyone once the program has begun: it shares the interpreter with it.
"""

from __future__ import annotations

import builtins
import sys
import threading
import types
from collections.abc import Callable

import codec
import isolate


def live(fd: int, baseline: int) -> None:
    """Serves the judge at the other end of `fd` until it hangs up; `baseline` is the address space before the program."""
    order = codec.receive(fd)
    isolate.few_arenas()
    threading.stack_size(2 << 20)
    isolate.limits(baseline + (order["memory_mb"] << 20), order["cpu_seconds"])
    module = types.ModuleType("program")  # not "__main__": `if __name__ == "__main__"` is not what is tested
    sys.modules["program"] = module
    objects: dict[int, object] = {}
    numbers: dict[int, int] = {}

    def keep(value: object) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects[len(objects)] = value
        return numbers[id(value)]

    def load() -> None:
        exec(compile(order["program"], "program", "exec", dont_inherit=True, optimize=0), module.__dict__)

    do = {
        "name": lambda name: module.__dict__[name],
        "call": lambda f, args, options: f(*args, **options),
        "attribute": getattr,
        "set": setattr,
        "iterate": iter,
        "next": next,
        "item": lambda x, key: x[key],
        "length": lambda x: int(len(x)),
        "truth": lambda x: bool(x),
        "text": lambda x: str(x),
    }
    _answer(fd, keep, load)
    while True:
        what, *args = codec.receive(fd)
        _answer(fd, keep, lambda f=do[what], args=args: f(*(codec.decode(a, objects.__getitem__) for a in args)))


def _answer(fd: int, keep: Callable[[object], int], f: Callable[[], object]) -> None:
    """Sends what `f` returns, or what became of it."""
    try:
        reply = ["value", codec.encode(f(), keep)]
    except SystemExit:
        reply = ["exit"]
    except MemoryError:
        reply = ["memory"]
    except BaseException as error:
        try:
            text = str(error)[:500]
        except BaseException:
            text = ""
        reply = ["error", _known(type(error)), text]
    try:
        codec.send(fd, reply)
    except codec.TooLong as error:
        codec.send(fd, ["long", str(error)])


def _known(cls: type[BaseException]) -> str:
    """The name of the nearest built-in class: the tests cannot know an exception of the program's own by another."""
    return next(c.__name__ for c in cls.__mro__ if getattr(builtins, c.__name__, None) is c)
