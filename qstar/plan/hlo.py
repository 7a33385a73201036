"""Reader of compiled HLO text: FLOPs, memory traffic and collectives of one run of a program.

Every instruction counts as often as its computation runs. The trip count of a loop is XLA's `known_trip_count`, or
follows from the constant in its condition. A loop that ends on data (decoding) runs `assumed` times.
"""
# XLA's own `cost_analysis` is of no use here: it counts the body of a loop once, and the layers are scanned.

from __future__ import annotations

import dataclasses
import math
import re

from qstar.plan.hlo_attributes import group_size, meetings, source_name, window

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# In bits, since int4 takes half a byte; float8 types (f8e4m3fn ...) are many and are taken for the default of 8.
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
         "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_SLICES = ("dynamic-slice", "slice", "gather")
_PREFETCHES = ("copy-start", "slice-start", "dynamic-slice-start")
# They move no data themselves: names for buffers, or loops and calls whose bodies are counted instead. Of asynchronous
# pairs, the start counts.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "copy-done", "opt-barrier", "async-done", "async-update"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type."""

    dtype: str
    shape: tuple[int, ...]
    main: bool  # it lives in the device's main memory

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    arrays: tuple[Array, ...]  # of its result; a tuple has several
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(a.bytes for a in self.arrays)

    def called(self, *keys: str) -> list[str]:
        """Returns the names of the computations of `calls=`, `body=` and so on."""
        out = []
        for key in keys:
            if found := re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes):
                out += [n.strip().lstrip("%") for n in (found[1] or found[2]).split(",")]
        return out


@dataclasses.dataclass
class Collective:
    """Collectives of one kind, over the whole run of a program, per device."""

    count: float = 0.0
    bytes: float = 0.0  # that leave a device: see `Program.wire_bytes`


@dataclasses.dataclass
class Costs:
    """Costs of one run of a program, per device."""

    flops: float = 0.0  # of matrix products and convolutions
    bytes: float = 0.0  # read and written in main memory, by the instructions that the compiler left unfused
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    products: dict[str, float] = dataclasses.field(default_factory=dict)  # FLOPs by the operation's name in the source

    def add(self, other: Costs, times: float) -> None:
        for name, flops in other.products.items():
            self.multiply(name, times * flops)
        self.bytes += times * other.bytes
        for kind, c in other.collectives.items():
            self.send(kind, times * c.count, times * c.bytes)

    def multiply(self, name: str, flops: float) -> None:
        self.flops += flops
        self.products[name] = self.products.get(name, 0.0) + flops

    def send(self, kind: str, count: float, bytes_: float) -> None:
        mine = self.collectives.setdefault(kind, Collective())
        mine.count, mine.bytes = mine.count + count, mine.bytes + bytes_


def arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a type, e.g. `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`."""
    # S(n) is the memory space: 0, which is not written, is main memory; only its traffic is counted.
    return tuple(
        Array(m[1], tuple(int(n) for n in m[2].split(",") if n), not re.search(r"S\([1-9]", m[3] or ""))
        for m in _ARRAY.finditer(text)
        if m[1] in _BITS or m[1].startswith("f8")
    )


def _balanced(text: str, at: int) -> int:
    # A count, not a regular expression: types of tuples nest, and layouts have brackets of their own.
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth:
            return i + 1
    return len(text)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations by name, and the name of the entry."""
    out: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            entry = name if line.startswith("ENTRY") else entry
            lines = out.setdefault(name, [])
        elif found := _HEAD.match(line):
            lines.append(_instruction(line, found))
    return out, entry


def _instruction(line: str, head: re.Match) -> Instruction:
    at = head.end()
    stop = _balanced(line, at) if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", stop)
    op, closing = line[stop:opening].strip(), _balanced(line, opening)
    inner = line[opening + 1 : closing - 1]
    names = tuple(re.findall(r"%([\w.\-]+)", inner)) if "%" in inner else tuple(inner.split(", "))
    # Not operands: the value of a constant, the number of a parameter. `_counter` and `_read` look for them here.
    if op in ("constant", "parameter"):
        names = (inner,)
    return Instruction(head[2], op, arrays(line[at:stop]), names, line[closing:], bool(head[1]))


class Program:
    """The text of a compiled program, parsed once."""

    def __init__(self, text: str, assumed: int = 1):
        """assumed: trip count of the outermost loops whose own is not in the text (inner ones: 1)."""
        self.computations, self.entry = parse(text)
        self.assumed = assumed
        self._known: dict[tuple[str, bool, bool], Costs] = {}
        # By name within a computation: names are unique there, and operands are always of the same computation.
        self._tables = {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def costs(self) -> Costs:
        return self._of(self.entry, True, True)

    def _kind(self, i: Instruction) -> str:
        # A TPU compiler fuses an all-reduce with a slice of its result, which makes it a reduce-scatter.
        if i.op == "fusion" and any(c.startswith("all-reduce-scatter") for c in i.called("calls")):
            return "reduce-scatter"
        base = i.op.removesuffix("-start")
        # A group of one device sends nothing.
        return base if base in COLLECTIVES and group_size(i.attributes) != 1 else ""

    # ---------------------------------------------------------------------------------------------------- loops

    def _runs(self, loop: Instruction, where: str, outer: bool) -> tuple[int, bool]:
        # Returned with it: whether loops inside still count as outermost. Below a loop that ends on data, another such
        # loop runs once, or `assumed` would count squared.
        n = self.trips(loop, where)
        return (n, outer) if n is not None else (self.assumed if outer else 1, False)

    def trips(self, loop: Instruction, where: str) -> int | None:
        """Returns the trip count of a loop, or None if only data determine it."""
        # Without `known_trip_count`: the condition compares a counter with a constant, the body increments the counter
        # by a constant, and the loop's operand holds its start.
        if found := re.search(r'known_trip_count[^}]*?"?n"?\s*:\s*"?(\d+)', loop.attributes):
            return int(found[1])
        (condition,) = loop.called("condition")
        # The comparison may be fused; its operands are then looked for on both sides of the fusion.
        root = self._root(condition)
        compare = self._inner_root(root) if root else None
        if root is None or compare is None or compare.op != "compare":
            return None
        outside = [self._tables[condition].get(n) for n in root.operands]
        inside = [self._tables[name].get(n) for name in root.called("calls") for n in compare.operands]
        bound = next((x for x in (*outside, *inside) if x is not None and x.op == "constant"), None)
        counter = next((x for x in outside if x is not None and x.op == "get-tuple-element"), None)
        direction = next(iter(re.findall(r"direction=(\w+)", compare.attributes)), "")
        integral = ("s32", "u32", "s64")
        if bound is None or bound.arrays[0].dtype not in integral or direction not in ("LT", "LE", "GT", "GE", "NE"):
            return None
        step, start = self._counter(counter, loop, where)
        last = int(float(bound.operands[0])) + (direction == "LE") - (direction == "GE")
        return max(0, -(-(last - start) // step)) if step else None

    def _root(self, name: str) -> Instruction | None:
        return next((i for i in self.computations.get(name, ()) if i.root), None)

    def _inner_root(self, i: Instruction) -> Instruction | None:
        return self._root(i.called("calls")[0]) if i.op == "fusion" else i

    def _counter(self, counter: Instruction | None, loop: Instruction, where: str) -> tuple[int, int]:
        # (1, 0) where the text does not show them: `lax.scan` and `fori_loop` count from 0 by 1.
        found = re.search(r"index=(\d+)", counter.attributes) if counter else None
        if not found:
            return 1, 0
        index, (body,) = int(found[1]), loop.called("body")
        end = self._root(body)
        change = self._tables[body].get(end.operands[index]) if end and index < len(end.operands) else None
        inner = self._inner_root(change) if change else None
        known = []
        if change and inner and inner.op in ("add", "subtract"):
            tables = [self._tables[body], *(self._tables[n] for n in change.called("calls"))]
            names = (*change.operands, *inner.operands)
            known = [t[n] for t in tables for n in names if n in t and t[n].op == "constant"]
        given = self._tables[where].get(loop.operands[0]) if loop.operands else None
        first = self._tables[where].get(given.operands[index]) if given and given.op == "tuple" else None
        start = int(first.operands[0]) if first is not None and first.op == "constant" else 0
        sign = -1 if known and inner and inner.op == "subtract" else 1
        return sign * int(known[0].operands[0]) if known else 1, start

    # ------------------------------------------------------------------------------------------------- counting

    def _of(self, name: str, outer: bool, traffic: bool) -> Costs:
        # Cached: layers call the same computations again and again. Without `traffic` inside of fusions, whose inner
        # results are not written to memory; only FLOPs count there.
        key = (name, outer, traffic)
        if key not in self._known:
            self._known[key] = total = Costs()
            for i in self.computations.get(name, ()):
                self._add(total, i, name, outer, traffic)
        return self._known[key]

    def _add(self, total: Costs, i: Instruction, where: str, outer: bool, traffic: bool) -> None:
        if kind := self._kind(i):
            total.send(kind, 1, self.wire_bytes(i, kind, where))
            if i.op == "fusion":
                return
        elif i.op == "while":
            runs, inner = self._runs(i, where, outer)
            total.add(self._of(i.called("body")[0], inner, traffic), runs)
        elif i.op == "conditional":
            # Only one branch runs, and the text does not say which: the most expensive is an upper bound.
            branches = [self._of(b, outer, traffic) for b in i.called(*_BRANCHES)]
            total.add(max(branches, key=lambda c: (c.flops, c.bytes)), 1)
        elif i.op in ("call", "async-start", "fusion"):
            for other in i.called("calls", "to_apply"):
                total.add(self._of(other, outer, traffic and i.op != "fusion"), 1)
        elif i.op == "convolution":
            total.multiply(source_name(i.attributes), self._convolution(i, where))
        # XLA's CPU compiler replaces matrix products by custom calls of oneDNN.
        elif i.op == "dot" or (i.op == "custom-call" and "matmul" in i.attributes):
            total.multiply(source_name(i.attributes), self._dot(i, where))
        # A Pallas kernel's products are not in the text; its author's estimate is.
        elif i.op == "custom-call" and (kernel := re.search(r'"flops":"?(\d+)', i.attributes)):
            total.multiply(source_name(i.attributes), float(kernel[1]))
        if traffic and i.op not in _FREE and not i.op.endswith("-done"):
            total.bytes += self._traffic(i, where)

    def _operand(self, i: Instruction, n: int, where: str) -> Instruction | None:
        return self._tables[where].get(i.operands[n]) if n < len(i.operands) else None

    def wire_bytes(self, i: Instruction, kind: str, where: str) -> float:
        """Returns the bytes that one device sends in a ring: (n-1)/n of the whole, twice that for an all-reduce."""
        inputs = [self._tables[where].get(o) for o in i.operands]
        given = sum(x.bytes for x in inputs if x is not None)
        fused = [j for name in i.called("calls") for j in self.computations.get(name, ()) if j.op == "all-reduce"]
        n = group_size(i.attributes) or (group_size(fused[0].attributes) if fused else 0)
        share = (n - 1) / n if n else 1.0
        # The result of a start holds operands as well as results: their sum would count the data twice.
        started = i.op.endswith("-start") and len(i.arrays) > 1
        made = max(a.bytes for a in i.arrays) if started else i.bytes
        if kind in ("all-gather", "reduce-scatter"):
            return share * max(made, given)
        return {"all-reduce": 2 * share, "all-to-all": share, "collective-permute": 1.0}[kind] * given

    def _dot(self, i: Instruction, where: str) -> float:
        left = self._operand(i, 0, where)
        if left is None or not left.arrays:
            return 0.0
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        dims = [int(d) for d in found[1].split(",") if d] if found else [len(left.arrays[0].shape) - 1]
        return 2.0 * math.prod(i.arrays[0].shape) * math.prod(left.arrays[0].shape[d] for d in dims)

    def _convolution(self, i: Instruction, where: str) -> float:
        # TPU compilers write matrix products as convolutions. Batch axes are spatial ones, of which one tap in n meets data.
        left, kernel = self._operand(i, 0, where), self._operand(i, 1, where)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
        if left is None or kernel is None or labels is None:
            return 0.0
        a, k, o = labels[1], labels[2], labels[3]
        sizes = dict(zip(k, kernel.arrays[0].shape))
        shape_in, shape_out = dict(zip(a, left.arrays[0].shape)), dict(zip(o, i.arrays[0].shape))
        total = 2.0 * shape_out["b"] * shape_out["f"] * sizes["i"]
        for d, w in enumerate(window(i.attributes, sum(c.isdigit() for c in k))):
            total *= meetings(shape_in[str(d)], sizes[str(d)], shape_out[str(d)], *w)
        if found := re.search(r"batch_group_count=(\d+)", i.attributes):
            total /= int(found[1])
        return total

    def _traffic(self, i: Instruction, where: str) -> float:
        """Returns the bytes that an instruction moves; a fusion (or instruction) that slices an operand reads the slice."""
        if i.op == "custom-call" and '"AllocateBuffer"' in i.attributes:
            return 0.0
        update = self._operand(i, 1, where) if i.op == "dynamic-update-slice" else None
        if update is not None:
            return 2.0 * update.bytes
        if i.op in _SLICES:
            return 2.0 * i.bytes
        if i.op in _PREFETCHES and len(i.arrays) > 1:
            # The result names source and destination, whose bytes move once per side in main memory; counted as other
            # results are, every slice that a TPU compiler prefetches would be the whole matrix, and twice.
            return float(sum(a.main for a in i.arrays[:2]) * min(a.bytes for a in i.arrays[:2]))
        inside = next(iter(i.called("calls")), "") if i.op == "fusion" else ""
        total = self._written(inside, i.arrays) if inside else float(sum(a.bytes for a in i.arrays if a.main))
        for n in range(len(i.operands)):
            operand = self._operand(i, n, where)
            if operand is not None and any(a.main for a in operand.arrays):
                total += min(operand.bytes, self._read(inside, n, operand.bytes)) if inside else operand.bytes
        return total

    def _written(self, fusion: str, results: tuple[Array, ...]) -> float:
        """Returns the bytes that a fusion writes to main memory."""
        root = self._root(fusion)
        several = root is not None and root.op == "tuple" and len(root.operands) == len(results)
        made = [self._tables[fusion].get(name) for name in root.operands] if root and several else [root]
        if len(made) != len(results):
            return float(sum(a.bytes for a in results if a.main))
        return float(sum(self._updated(fusion, j, a.bytes) for j, a in zip(made, results) if a.main))

    def _updated(self, fusion: str, i: Instruction | None, full_size: int) -> int:
        # In place: only the update is written. KV caches are updated so, and the whole would be counted at every token.
        while i is not None and i.op in ("bitcast", "fusion"):
            if i.op == "fusion":
                fusion = i.called("calls")[0]
                i = self._root(fusion)
            else:
                i = self._operand(i, 0, fusion)
        update = self._operand(i, 1, fusion) if i is not None and i.op == "dynamic-update-slice" else None
        return update.bytes if update is not None else full_size

    def _read(self, fusion: str, n: int, full_size: int) -> float:
        # Slices if the fusion only slices its operand n (a layer of stacked parameters), 0 if it writes into it.
        inside = self.computations.get(fusion, ())
        names = {j.name for j in inside if j.op == "parameter" and j.operands == (str(n),)}
        users = [j for j in inside if names & set(j.operands)]
        while users and all(j.op == "bitcast" for j in users):  # through changes of shape
            names = {j.name for j in users}
            users = [j for j in inside if names & set(j.operands)]
        total = 0.0
        for j in users:
            if j.op == "fusion" and j.called("calls"):
                # TPU compilers nest fusions: what slices the keys of all layers is one inside of the product's.
                parts = [k for k, name in enumerate(j.operands) if name in names]
                total += sum(self._read(j.called("calls")[0], k, full_size) for k in parts)
            elif j.op not in (*_SLICES, "dynamic-update-slice") or j.operands[0] not in names:
                return full_size
            else:
                total += j.bytes if j.op in _SLICES else 0.0
        return total if users else full_size
