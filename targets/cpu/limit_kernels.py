"""The limits of a machine as kernels: reading memory, and multiplying bytes, bf16 pairs and f32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.limits import LimitKernel
from llmc.targets.cpu.matrix_unit import matrix_unit
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for
from llmc.targets.cpu.vectors import load, prefetch, splat, store
from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

READ_UNIT = 65536  # bytes
READ_STREAMS = 2
READ_AHEAD = 1024  # bytes
READ_SUMS = 8
STEPS = 8  # rounds of multiply-adds between two computations of an address
STARTS = 32  # vectors that the operands may start at
INPUT_BYTES = 8192


def _tile(isa: VectorIsa) -> tuple[int, int]:
    """(activation, weight) vectors that are multiplied with each other: as many sums as hide a unit's latency.

    Two units of up to five cycles of latency want ten sums; 12 where there are registers for them.
    """
    return (6, 2) if isa.registers >= 32 else (5, 2)


def limit_read(machine: Machine) -> PrimFunc:
    """(input i32, output i32; begin, end): the sum of the input. One unit is READ_UNIT bytes.

    Bytes: the input, once. Limit: memory. A unit is read as two streams side by side, each with prefetches a little
    ahead: that keeps more reads under way than one long stream does, and was the fastest of what was tried.
    """
    isa = isa_for(machine)
    words = READ_UNIT // 4
    part = words // READ_STREAMS
    sums_each = READ_SUMS // READ_STREAMS
    step = sums_each * isa.lanes

    def body(p: dict[str, Expr], s: dict[str, Expr]) -> None:
        x, out = b.view(p["input"], [b.MANY], "int32"), b.view(p["output"], [isa.lanes], "int32")
        sums = b.Registers(READ_SUMS, isa.i32)
        for j in range(READ_SUMS):
            sums[j] = splat(0, isa.lanes, "int32")
        with b.loop(s["end"] - s["begin"]) as i, b.loop(part // step) as v:
            for stream in range(READ_STREAMS):
                start = b.let((s["begin"] + i) * words + stream * part + v * step)
                for line in range(0, step, isa.cache_line // 4):
                    b.keep_order()
                    prefetch(x, start + READ_AHEAD // 4 + line)
                for j in range(sums_each):
                    at = stream * sums_each + j
                    sums[at] = sums[at] + load(x, start + j * isa.lanes, isa.lanes)
        total = sums[0]
        for j in range(1, READ_SUMS):
            total = total + sums[j]
        store(out, 0, total)

    return b.plain_function([("input", "int32"), ("output", "int32")], [], body, b.ORDER_HELPER)


def limit_multiply(machine: Machine, *, dtype: str) -> PrimFunc:
    """(input, output i32; begin, end): products of vectors of the input, summed up in registers.

    One unit is STEPS rounds of every activation vector of a tile times every weight vector. Bytes: the first-level
    cache's. Limit: the multipliers. Operands change from round to round, or a compiler would share repeated products.
    """
    isa = isa_for(machine)
    rows, columns = _tile(isa)
    dots = isa.bf16_dots if dtype == "bf16" else None
    byte_sums = isa.sums(4, 64)  # without a dot instruction: a multiplication and an addition of 16-bit sums
    element = {"int8": "int8", "bf16": "int32", "f32": "float32"}[dtype]
    lanes = isa.vector_bytes if dtype == "int8" else isa.lanes
    sum_dtype = {"int8": byte_sums.dtype(isa), "bf16": isa.f32, "f32": isa.f32}[dtype]

    def multiply_add(total: Expr, weight: Expr, activation: Expr) -> Expr:
        if dtype == "f32":
            return isa.fma(weight, activation, total)
        if dots is not None:
            return dots.dot(total, weight, activation)
        return byte_sums.add(isa, total, weight, activation, 4)

    def body(p: dict[str, Expr], s: dict[str, Expr]) -> None:
        from tvm import tirx

        x = b.view(p["input"], [INPUT_BYTES * lanes // isa.vector_bytes], element)
        out = b.view(p["output"], [isa.lanes], "int32")
        sums = b.Registers(rows * columns, sum_dtype)
        scalar, _, count = sum_dtype.partition("x")
        for j in range(rows * columns):
            sums[j] = splat(0, int(count), scalar)
        with b.loop(s["end"] - s["begin"]) as i:
            first = b.let((s["begin"] + i) % STARTS * lanes)
            weights = [b.let(load(x, first + j * lanes, lanes)) for j in range(columns)]
            for step in range(STEPS):
                for row in range(rows):
                    at = first + (columns + step * rows + row) * lanes
                    activation = b.let(load(x, at, lanes))
                    for column in range(columns):
                        j = row * columns + column
                        sums[j] = multiply_add(sums[j], weights[column], activation)
        total = tirx.reinterpret(isa.i32, sums[0])
        for j in range(1, rows * columns):
            total = total ^ tirx.reinterpret(isa.i32, sums[j])
        store(out, 0, total)

    helpers = "" if dots is None else dots.helper
    return b.plain_function([("input", element), ("output", "int32")], [], body, helpers)


def limit_kernels(machine: Machine) -> list[LimitKernel]:
    """Reading, and multiplying what this machine has instructions for."""
    isa = isa_for(machine)
    rows, columns = _tile(isa)
    found = [LimitKernel("read", kernel(limit_read, machine.key), READ_UNIT)]
    for dtype, factors in (("int8", 4), ("f32", 1), ("bf16", 2)):
        if dtype == "bf16" and isa.bf16_dots is None:
            continue
        operations = 2 * factors * isa.lanes * rows * columns * STEPS
        found.append(LimitKernel(dtype, kernel(limit_multiply, machine.key, dtype=dtype), operations, INPUT_BYTES))
    unit = matrix_unit(machine)
    return found if unit is None else [*found, *unit.limits()]
