"""The least time that a linear kernel can take on one core: by what it reads, and by what its vector units must do.

Every vector instruction is one of two kinds, and the rates of both are measured:

    heavy   multiplications, conversions, shifts: two ports take them on every x86 core of interest
    any     additions and logic besides: as many ports as there are, heavy ones included

    seconds >= max(bytes / bandwidth, heavy / rate(heavy), (heavy + light) / rate(any))

What a kernel must do for one group of one slice (as many result columns as a vector has lanes) and some rows, per
quad of four inputs:

    unpacking, once for all rows that are multiplied at a time
            4 bits, per two quads: a shift, two masks
            6 bits, per four quads: five shifts, and for each quad two masks and an `or`
            a table: a heavy lookup a quad; `vpermb` saves the masks of 4 bits; without it 64 entries take four, with 11
            others to make and to merge places
    dot     VNNI: one heavy (`vpdpbusd`)
            else, even 4 bits: `vpmaddubsw` and an i16 addition; `vpmaddwd` once a group, or (groups above 64) every 8
            quads
            else, bytes of a table of 4 bits: `vpmaddubsw`, `vpmaddwd`, an addition
            else, bytes of 8 bits: a sign per row (heavy, or with AVX-512 a masked subtraction) and, per weight, a
            change of its top bit and a magnitude; `vpmaddubsw`, `vpmaddwd`, an addition
    scaling, per row: a conversion, two multiplications (one of them fused); per slice: the scale's conversion from f16

Loads, stores, broadcasts from memory and loop control are not counted: they have ports of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.group_sums import UNROLL
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.vectors import load, prefetch, splat, store
from llmc.targets.machine import Machine
from llmc.targets.x86.isa import X86Isa, isa_for

SUMS = 12  # independent chains: two ports, latencies of up to five cycles, and what two of 16 registers leave
STEPS = 8
READ_BYTES = 4096  # of one unit
READ_AHEAD = 3072


@dataclass(frozen=True)
class Work:
    """Vector instructions."""

    heavy: float = 0.0
    light: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.heavy + other.heavy, self.light + other.light)

    def __mul__(self, times: float) -> Work:
        return Work(self.heavy * times, self.light * times)

    def seconds(self, heavy_rate: float, any_rate: float) -> float:
        """The least time at these instructions a second."""
        return max(self.heavy / heavy_rate, (self.heavy + self.light) / any_rate)


def unpacking(isa: X86Isa, layout: QuantizedLayout) -> Work:
    """One quad's bytes, out of the vectors that it shares."""
    one_lookup = isa.vbmi and isa.lanes == 16
    if layout.bits == 8:
        return Work()
    if layout.bits == 6:
        return Work(heavy=5 / 4, light=3) + (Work(heavy=1) if one_lookup else Work(heavy=4, light=11))
    if layout.table is None:
        return Work(heavy=1 / 2, light=1)
    return Work(heavy=3 / 2, light=0 if one_lookup else 1)


def linear_work(isa: X86Isa, layout: QuantizedLayout, *, tokens: int, slices: int, groups: int, reuse: int) -> Work:
    """A linear op of `tokens` rows. reuse: rows that share one unpacking of the weights."""
    quads = layout.group // 4
    passes = -(-tokens // reuse)
    unpack = unpacking(isa, layout) * (quads * passes)
    if isa.vnni:
        dot = Work(heavy=quads)
    elif layout.byte_bits == 4:
        dot = Work(heavy=quads + (1 if isa.pair_sums(layout.group) else quads / UNROLL[-1]), light=quads)
    elif layout.byte_bits < 8:
        dot = Work(heavy=2 * quads, light=quads)
    else:
        dot = Work(heavy=3 * quads, light=quads) if isa.lanes == 8 else Work(heavy=2 * quads, light=2 * quads)
        unpack += Work(light=2 * quads) * passes
    scale = Work(heavy=3)
    per_slice = unpack + Work(heavy=1) * passes + (dot + scale) * tokens
    return per_slice * (slices * groups)


def read(machine: Machine):
    """(x i32, out i32; begin, end): adds up x, READ_BYTES a unit, lines asked for ahead and in order."""
    isa = isa_for(machine)
    words = READ_BYTES // 4

    def body(p, s):
        x, out = b.view(p["x"], [b.MANY], "int32"), b.view(p["out"], [isa.lanes], "int32")
        sums = b.Registers(4, isa.i32)
        for j in range(4):
            sums[j] = splat(0, isa.lanes, "int32")
        with b.loop(s["end"] - s["begin"]) as i, b.loop(words // 64) as step:
            start = b.let((s["begin"] + i) * words + step * 64)
            for line in range(4):
                b.keep_order()
                prefetch(x, start + line * 16 + READ_AHEAD // 4)
                for part in range(16 // isa.lanes):
                    sums[line] = sums[line] + load(x, start + line * 16 + part * isa.lanes, isa.lanes)
        store(out, 0, sums[0] + sums[1] + sums[2] + sums[3])

    return b.plain_function([("x", "int32"), ("out", "int32")], [], body, b.ORDER_HELPER)


def _chains(machine: Machine, dtype: str, step) -> object:
    """(x i8, out i32; begin, end): a unit is STEPS times `step(isa, sum, a, b)` for each of SUMS sums."""
    isa = isa_for(machine)

    def body(p, s):
        x, out = b.view(p["x"], [b.MANY], "int8"), b.view(p["out"], [isa.lanes], "int32")
        sums = b.Registers(SUMS, dtype)
        factors = [b.let(load(x, j * isa.vector_bytes, isa.vector_bytes)) for j in range(2)]
        for j in range(SUMS):
            sums[j] = tirx.reinterpret(dtype, load(x, j * isa.vector_bytes, isa.vector_bytes))
        with b.loop(s["end"] - s["begin"]):
            for _ in range(STEPS):
                for j in range(SUMS):
                    sums[j] = step(isa, sums[j], *factors)
        total = tirx.reinterpret(isa.i32, sums[0])
        for j in range(1, SUMS):
            total = total ^ tirx.reinterpret(isa.i32, sums[j])
        store(out, 0, total)

    return b.plain_function([("x", "int8"), ("out", "int32")], [], body)


def heavy(machine: Machine):
    """One dot instruction a step."""
    isa = isa_for(machine)
    if isa.vnni:
        return _chains(machine, isa.i32, lambda isa, total, a, c: isa.dot(total, a, c, 4))
    return _chains(
        machine, isa.i16, lambda isa, total, a, _: isa.dot_narrow(a, tirx.reinterpret(isa.i8, total))
    )  # fmt: skip


def light(machine: Machine):
    """An addition and an exclusive or a step, which no compiler makes one."""
    isa = isa_for(machine)
    return _chains(
        machine,
        isa.i32,
        lambda isa, total, a, c: (total + tirx.reinterpret(isa.i32, a)) ^ tirx.reinterpret(isa.i32, c),
    )
