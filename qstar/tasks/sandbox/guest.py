"""The process that runs the program: executes its definitions, makes the calls that the judge asks for, returns values.

Once the program has begun, nothing this process sends is trusted: it shares its interpreter with the program.
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
    """Serves the judge at the other end of `fd` until it closes; `baseline` is the address space before the program."""
    order = codec.receive(fd)
    isolate.few_arenas()
    # Every stack counts towards the address space, by default 8 MiB each.
    threading.stack_size(2 << 20)
    isolate.limits(baseline + (order["memory_mb"] << 20), order["cpu_seconds"])
    # Not "__main__": a script's own `if __name__ == "__main__"` must not run under tests.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    # Every object that was handed out stays alive, so that its id and number are never those of another.
    objects: dict[int, object] = {}
    numbers: dict[int, int] = {}

    def keep(value: object) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects[len(objects)] = value
        return numbers[id(value)]

    def load() -> None:
        # dont_inherit: this file's `from __future__ import annotations` must not apply to the program.
        exec(compile(order["program"], "program", "exec", dont_inherit=True, optimize=0), module.__dict__)

    actions: dict[str, Callable[..., object]] = {
        "name": lambda name: module.__dict__[name],
        "call": lambda f, args, options: f(*args, **options),
        "attribute": getattr,
        "set": setattr,
        "iterate": iter,
        "next": next,
        "item": lambda x, key: x[key],
        "length": len,
        "truth": bool,
        "text": str,
    }
    _answer(fd, keep, load)
    while True:
        what, *args = codec.receive(fd)
        action = actions[what]
        _answer(fd, keep, lambda: action(*(codec.decode(a, objects.__getitem__) for a in args)))  # noqa: B023


def _answer(fd: int, keep: Callable[[object], int], f: Callable[[], object]) -> None:
    try:
        reply: list = ["value", codec.encode(f(), keep)]
    except SystemExit:
        reply = ["exit"]
    except MemoryError:
        reply = ["memory"]
    except BaseException as error:
        # The nearest built-in class: tests cannot name the program's own exception classes.
        known = next(c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c)
        reply = ["error", known, codec.message(error)]
    try:
        codec.send(fd, reply)
    except codec.TooLong as error:
        codec.send(fd, ["long", str(error)])
