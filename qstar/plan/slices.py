"""Names of slices, read before JAX starts: `v5e:4x4`, `h100:8`, `gpu`."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from qstar.errors import UserError, require

SIMULATED = ("gpu", "h100", "h200", "cpu")  # NAME:COUNT
SHAPES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # axes of a slice


class Slice(NamedTuple):
    """A slice as it was named: its kind of chip and their number."""

    name: str
    kind: str
    chips: int

    @property
    def simulated(self) -> int:
        """The number of CPU devices that stand for its chips."""
        return self.chips if self.kind in SIMULATED and self.name != "gpu" else 0


def read_slices(text: str) -> list[Slice]:
    """Reads the value of --topology, a comma list; raises UserError for a name that is no slice, or none at all."""
    # All at once: the second would otherwise be refused after the first has been compiled.
    found = [read_slice(name) for name in text.split(",") if name]
    require((bool(found), f"--topology={text}: names no slice; give one like v5e:4x4 or cpu:8"))
    return found


def read_slice(name: str) -> Slice:
    """Reads the name of one slice; raises UserError."""
    kind, colon, shape = name.partition(":")
    if kind in SIMULATED and re.fullmatch(r":[1-9]\d{0,3}|", colon + shape):
        return Slice(name, kind, int(shape or 8))
    if kind in SHAPES and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) and shape.count("x") == SHAPES[kind] - 1:
        return Slice(name, kind, math.prod(map(int, shape.split("x"))))
    forms = "v5e:4x4, v6e:2x4, v5p:2x2x2, v4:2x2x1, tpu7x:2x2x1, h100:8, h200:8 or cpu:8"
    raise UserError(f"--topology={name}: not a slice that is known here; give one like {forms}")
