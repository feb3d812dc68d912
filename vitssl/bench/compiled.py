"""What a compiled program does to memory and between devices, from its optimised HLO.

Traffic is what kernels read and write, every operand and result once, of slices the
slice alone: an upper bound, since caches are not seen.
"""

import collections
import dataclasses
import functools
import math
import re

# Nothing runs for these. The end of what was started is counted where it starts.
_FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "iota"),
}
_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "ragged-all-to-all", "collective-broadcast"),
)
_SLICES, _UPDATE = ("slice", "dynamic-slice"), "dynamic-update-slice"
_NOWHERE = re.compile("(?!)")
_MOVES = {"copy", "convert", "transpose"}
# Beside a move these change nothing in the values.
_VIEWS = _FREE | {"reshape", "broadcast", "slice", "copy-start"}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or one exchange between devices.

    Attributes:
        name: of the instruction.
        kind: "product", "attention", "move" (copy, convert or transpose, and nothing
            else), "other", or the name of a collective.
        size: bytes that it reads and writes; of a collective, those of the larger of
            what goes in and what comes out.
        times: how often it runs in a step.
        result: type and shape.
        source: the operation that it was traced from.
    """

    name: str
    kind: str
    size: float
    times: int
    result: str
    source: str

    @property
    def bytes(self) -> float:
        """Bytes of a step."""
        return self.size * self.times


def kernels(text: str, *, inside: str = r"S\(5\)") -> list[Kernel]:
    """Return what runs in a step.

    Args:
        text: an optimised HLO module.
        inside: layouts of arrays that are not in the device's memory: on GPUs those on
            the host; on TPUs what lies inside the chip too, which is any other space.
    """
    computations = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]
    return list(_kernels(computations, entry, 1, re.compile(inside)))


def by_kind(found: list[Kernel]) -> dict[str, float]:
    """Return {kind: bytes of a step}, without those between devices."""
    total = collections.Counter()
    for kernel in found:
        if kernel.kind not in _COLLECTIVES:
            total[kernel.kind] += kernel.bytes
    return dict(total)


def collectives(found: list[Kernel]) -> dict[str, tuple[int, float]]:
    """Return {kind: (how many in a step, their bytes)} of what devices exchange."""
    total = {}
    for kernel in found:
        if kernel.kind in _COLLECTIVES:
            count, size = total.get(kernel.kind, (0, 0.0))
            total[kernel.kind] = count + kernel.times, size + kernel.bytes
    return total


def moves(found: list[Kernel], most: int = 10) -> list[Kernel]:
    """Return the largest copies, converts and transposes."""
    only = [k for k in found if k.kind == "move"]
    return sorted(only, key=lambda k: -k.bytes)[:most]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str

    def called(self, key: str) -> str | None:
        found = re.search(rf"{key}=%?([\w.\-]+)", self.rest)
        return found and found[1]


def _computations(text):
    """Return {name: {name: instruction}} of a module."""
    found, current = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?.*\{$", line)
        if head and not line.startswith(" "):
            current = found.setdefault(head[1], {})
        elif current is not None and (match := _LINE.match(line)):
            current[match[1]] = _instruction(*match.groups())
    return found


def _instruction(name, text):
    cut = _closing(text) if text.startswith("(") else text.index(" ")
    shape, text = text[:cut], text[cut:].lstrip()
    op, _, rest = text.partition("(")
    cut = _closing("(" + rest) - 2
    if op in ("parameter", "constant"):
        return _Instruction(name, shape, op, (rest[:cut],), rest[cut:])
    # Older texts write the shape before an operand.
    operands = re.findall(r"%([\w.\-]+)", rest[:cut]) or re.findall(
        r"(?:^|[, ])([a-zA-Z_][\w.\-]*)(?=,|$)", rest[:cut]
    )
    return _Instruction(name, shape, op, tuple(operands), rest[cut:])


def _closing(text) -> int:
    """Return where the bracket that a text begins with has been closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    return len(text)


def _kernels(computations, name, times, inside):
    here = computations[name]
    for x in here.values():
        recurse = functools.partial(_kernels, computations, inside=inside)
        if x.op in _FREE or x.op.endswith(("-done", "-update")):
            continue
        if x.op == "while":
            trips = _trips(x, computations)
            yield from recurse(x.called("body"), times * trips)
        elif x.op in ("call", "async-start"):
            yield from recurse(x.called("calls") or x.called("to_apply"), times)
        elif x.op == "conditional":
            # Both branches count: an upper bound.
            branches = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
            names = branches[1].split(",") if branches else ()
            keys = "true_computation", "false_computation"
            for branch in names or map(x.called, keys):
                yield from recurse(branch.strip(" %"), times)
        else:
            yield _kernel(x, here, computations, times, inside)


def _trips(loop, computations) -> int:
    """Return how often a loop runs: as it says, or what its counter is compared to."""
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = computations[loop.called("condition")].values()
    bounds = [x.operands[0] for x in condition if x.op == "constant"]
    return max([1, *(int(n) for n in bounds if n.isdecimal())])


def _kernel(x, here, computations, times, inside):
    kind = _kind(x, computations)
    if kind in _COLLECTIVES:
        inside = _NOWHERE  # All of it crosses the links, wherever it lies.
    read = [_size(here[o].shape, inside) for o in x.operands if o in here]
    scratch = x.op == "custom-call" and x.shape.startswith("(")
    written = _size(x.shape, inside, scratch)
    if x.op in ("fusion", *_SLICES, _UPDATE):
        body = computations.get(x.called("calls") or "") or _alone(x, here)
        read = [_read(i, body, full, computations) for i, full in enumerate(read)]
        written -= _kept(body, inside)
    size = sum(read) + written
    if kind in _COLLECTIVES:
        # What was started has its operands in its result.
        started = x.op.endswith("-start") and written > sum(read)
        size = max(sum(read), written - started * sum(read))
    elif x.op == "copy-start":
        size = written  # (to, from, context).
    elif x.op == "slice-start":
        size = _sliced(x.shape, inside)
    source = re.search(r'op_name="([^"]*)"', x.rest)
    result = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", x.shape)
    return Kernel(x.name, kind, size, times, result, source[1] if source else "")


def _sliced(shape, inside) -> float:
    """Return the bytes of a slice that is only started: ((from), to, context)."""
    cut = 1 + _closing(shape[1:])
    source, part = shape[:cut], shape[cut:].rpartition(",")[0]
    read = 0.0 if inside.search(source) else _size(part, _NOWHERE)
    return read + _size(part, inside)


def _alone(x, here):
    """Return an instruction as the body of a fusion."""
    given = [
        dataclasses.replace(here[o], op="parameter", operands=(str(i),))
        for i, o in enumerate(x.operands)
        if o in here
    ]
    return {y.name: y for y in (*given, x)}


def _read(index, body, full, computations) -> float:
    """Return the bytes that a fusion reads of a parameter of `full` bytes."""
    mine = {n for n, y in body.items() if y.op == "parameter" and _index(y) == index}
    found = 0.0
    for y in body.values():
        if not mine & {*y.operands}:
            continue
        if y.op == "bitcast":
            mine.add(y.name)
        elif y.op == "fusion":  # A TPU's are within each other.
            within = computations[y.called("calls")]
            for i, operand in enumerate(y.operands):
                if operand in mine:
                    found += _read(i, within, full, computations)
        elif y.op not in (*_SLICES, _UPDATE) or mine & {*y.operands[1:]}:
            return full
        elif y.op in _SLICES:
            found += _size(y.shape, _NOWHERE)
    return min(found, full)


def _index(parameter) -> int:
    return int(parameter.operands[0])


def _kept(body, inside) -> float:
    """Return the bytes of a fusion's results that it leaves in place."""
    last = list(body.values())[-1]
    ends = [body[o] for o in last.operands] if last.op == "tuple" else [last]
    kept = 0.0
    for y in ends:
        while y.op == "bitcast":
            y = body[y.operands[0]]
        if y.op == _UPDATE:
            part = body[y.operands[1]].shape
            kept += _size(y.shape, inside) - _size(part, inside)
    return kept


def _kind(x, computations):
    op = x.op.removesuffix("-start")
    target = re.search(r'custom_call_target="([^"]*)"', x.rest)
    target = target[1] if target else ""
    ops = _ops(x, computations) or {op}
    if op in _COLLECTIVES:
        return op
    if "fmha" in target or "splash_mha" in x.name:
        return "attention"
    if {"dot", "convolution"} & ops or re.search("cublas|gemm|cudnn.conv", target):
        return "product"
    moved = op in ("fusion", *_MOVES) and ops & _MOVES and ops <= _MOVES | _VIEWS
    return "move" if moved else "other"


def _ops(x, computations) -> set[str]:
    """Return what a fusion is made of, and the fusions within it."""
    body = computations.get(x.called("calls") or "", {}).values()
    within = (_ops(y, computations) for y in body if y.op == "fusion")
    return {y.op for y in body if y.op != "fusion"}.union(*within)


def _size(shape, inside, scratch=False) -> float:
    """Return the bytes of all arrays of a type; without room for scratch if asked."""
    total = 0.0
    for dtype, sides, layout in _ARRAY.findall(shape):
        # "bf16", "f8e4m3fn", "s4"; tokens have no number.
        bits = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(bits[0]) if bits else 0
        sides = [int(n) for n in sides.split(",") if n]
        if scratch and dtype in ("s8", "u8") and len(sides) == 1:
            continue
        if not inside.search(layout):
            total += math.prod(sides) * bits / 8
    return total
