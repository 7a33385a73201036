"""Parsers of the attributes of an HLO instruction: groups of devices, windows of convolutions, names in the source."""

from __future__ import annotations

import functools
import math
import re

import numpy as np


def source_name(attributes: str) -> str:
    """Returns the name of the operation in the source, "" if the text has none."""
    found = re.search(r'op_name="([^"]*)"', attributes)
    return found[1] if found else ""


def group_size(attributes: str) -> int:
    """Returns the number of devices in each group of a collective, 0 if the text does not say."""
    # Three notations: lists of devices, [groups, devices in each] over an iota, and axes of a named mesh.
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", found[2]))
    return 0


def window(attributes: str, dims: int) -> list[tuple[int, int, int, int]]:
    """Returns (stride, low padding, input dilation, kernel dilation) per spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=", 1) for part in found[1].split()) if found else {}

    def numbers(key: str, default: int) -> list[int]:
        if key not in fields:
            return [default] * dims
        return [int(x.split("_")[0]) for x in fields[key].split("x")]

    return list(zip(numbers("stride", 1), numbers("pad", 0), numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)))


@functools.cache
def meetings(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, spread: int) -> int:
    """Returns the pairs (output place, kernel tap) of one spatial axis of a convolution that meet an element of its input."""
    # Padding and the zeros of a dilation need no multiplication.
    if dilate == stride == spread == 1 and low == 0 and kernel == 1:
        return out
    at = np.arange(kernel)[:, None] * spread - low + np.arange(out)[None, :] * stride
    return int(np.sum((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)))
