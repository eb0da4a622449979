"""The arena plan: where each temporary of a step lies, so that values alive together never overlap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmc.compiler.ir.dims import Dim, bounds, concrete, product, substitute, symbol, symbols_of
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.types import NUMPY_DTYPES, Tensor, itemsize
from llmc.compiler.weights import ALIGNMENT
from llmc.errors import CompileError
from llmc.targets.joining import joined_loop
from llmc.targets.kernel import Packed, Scratch
from llmc.targets.lowering import Program, values_of


@dataclass(frozen=True)
class Block:
    """One temporary: alive from call `first` to call `last`, both included."""

    key: object
    nbytes: int
    first: int
    last: int


@dataclass
class Plan:
    """Byte offsets in the arena by value, or by (op, scratch name); and what the plan costs."""

    offsets: dict[object, int] = field(default_factory=dict)
    nbytes: int = 0
    without_reuse: int = 0


def scratch_bytes(scratch: Scratch, largest: Mapping[str, int]) -> int:
    """Bytes of a scratch at the largest sizes. `dtype` is numpy's or the IR's spelling."""
    import numpy as np

    dtype = NUMPY_DTYPES.get(scratch.dtype) or np.dtype(scratch.dtype)
    size = scratch.size
    assert isinstance(size, (int, Dim))
    return most(size, largest) * dtype.itemsize


def most(size: int | Dim, largest: Mapping[str, int]) -> int:
    """An upper bound of a size whose symbols are at most `largest`: exact where it never falls as one of them grows."""
    ranged: dict[str, int | Dim] = {}
    for item in symbols_of(size):
        if item.name not in largest:
            raise CompileError(f"the size {size} needs a greatest value of {item.name}")
        ranged[item.name] = symbol(item.name, min(item.low, largest[item.name]), largest[item.name])
    bounded = substitute(size, ranged)
    growth = [substitute(bounded, {name: dim + 1}) - bounded for name, dim in ranged.items()]
    if all(bounds(change)[0] >= 0 for change in growth):
        return concrete(size, largest)
    high = bounds(bounded)[1]
    assert high is not None  # every symbol has a greatest value
    return high


def scratch_key(op: Op, scratch: Scratch) -> object:
    """Scratches are per op; those whose name starts with "@" are shared by name over the whole program."""
    return scratch.name if scratch.name.startswith("@") else (op, scratch.name)


def plan_memory(program: Program, largest: Mapping[str, int]) -> Plan:
    """Place every temporary, largest first, at the lowest offset that is free during its life (best effort: optimal
    placement is NP-hard). `largest`: the greatest value of every symbol.
    """
    blocks = _lifetimes(program, largest)
    plan = Plan(without_reuse=sum(block.nbytes for block in blocks))
    placed: list[tuple[int, Block]] = []
    for block in sorted(blocks, key=lambda b: (-b.nbytes, b.first)):
        offset = 0
        for start, other in sorted(placed, key=lambda item: item[0]):
            if other.last < block.first or block.last < other.first:
                continue
            if offset + block.nbytes <= start:
                break
            offset = max(offset, start + other.nbytes)
        placed.append((offset, block))
        plan.offsets[block.key] = offset
        plan.nbytes = max(plan.nbytes, offset + block.nbytes)
    return plan


def _lifetimes(program: Program, largest: Mapping[str, int]) -> list[Block]:
    first: dict[object, int] = {}
    last: dict[object, int] = {}
    sizes: dict[object, int] = {}

    def touch(key: object, time: int, nbytes: int) -> None:
        first[key] = min(first.get(key, time), time)
        last[key] = max(last.get(key, time), time)
        sizes[key] = max(sizes.get(key, 0), -(-nbytes // ALIGNMENT) * ALIGNMENT)

    external = {program.buffer_of(value) for _, value in program.graph.outputs}
    times = list(range(len(program.ops)))
    for place in times.copy():
        loop = joined_loop(program, place)
        for part in () if loop is None else loop.parts:  # a thread may still read what another is done with
            times[part.place] = place
    for time, lowered in zip(times, program.ops, strict=True):
        for call in lowered.calls:
            for value in (*values_of(call), *([lowered.op] if "result" in call.args else [])):
                owner = program.buffer_of(value)
                if needs_arena(owner, program) and owner not in external:
                    assert isinstance(owner.type, Tensor)
                    touch(owner, time, most(product(owner.shape), largest) * itemsize(owner.dtype))
            for argument in call.args:
                if isinstance(argument, Scratch):
                    touch(scratch_key(lowered.op, argument), time, scratch_bytes(argument, largest))
    return [Block(key, sizes[key], first[key], last[key]) for key in first]


def needs_arena(value: Value, program: Program) -> bool:
    """Whether a value is a plain temporary: not an input, not known when compiling, not a cache."""
    return not isinstance(value, Input) and value not in program.graph.constants and isinstance(value.type, Tensor)


def weight_key(argument: object) -> object:
    """What identifies stored bytes: a value as it is, or packed by a layout into a part."""
    return (argument.weight, argument.layout, argument.part) if isinstance(argument, Packed) else argument
