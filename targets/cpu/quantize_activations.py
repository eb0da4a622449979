"""f32 activations to what linear ops multiply, after a norm if asked: bytes with a scale and a sum a group, or bf16.

    scale = max|x| / 127,   q = round(x / scale) (half to even),   sum = sum of q
A group whose largest magnitude is below 1e-30 becomes zeros with scale 0. Inputs past `k` count as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

NORMS = ("none", "rms", "layer")
SMALLEST = 1e-30  # below this 127 / max|x| would come near overflow
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000  # 1.5 * 2^23: f32 around it are whole numbers


def padded(k: int, group: int) -> int:
    """Bytes of a quantized row: k rounded up to whole groups."""
    return -(-k // group) * group


def quantize_activations(
    machine: Machine,
    *,
    k: int,
    group: int,
    norm: str = "none",
    eps: float = 0.0,
    weight_offset: float = 0.0,
    norm_bias: bool = False,
    stride: int = 0,
) -> PrimFunc:
    """(x f32 [T, stride], weight f32 [k] if norm, norm_bias f32 [k] if any, xq i8 [T, padded(k, group)],
    xscales f32 [T, groups], xsums i32 [T, groups]; begin, end). One unit: one row.

    xsums: a group's sum, or where `VectorIsa.pair_sums` says so the sum of the first two of every four inputs in the
    low 16 bits and of the other two in the high ones, both signed. stride: elements from row to row of x (0: k). norm
    "rms": x / sqrt(mean(x^2) + eps) * (weight + weight_offset); "layer": (x - mean) / sqrt(variance + eps) * (weight +
    weight_offset) + norm_bias. The limit is the memory: a row is read from it once, and from the first-level cache
    after that.
    """
    isa, groups = isa_for(machine), -(-k // group)
    results = [("xq", "int8"), ("xscales", "float32"), ("xsums", "int32")]

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        x = b.view(handles["x"], [b.MANY, stride or k], "float32")
        xq = b.view(handles["xq"], [b.MANY, groups * group], "int8")
        xscales, xsums = (b.view(handles[name], [b.MANY, groups], dtype) for name, dtype in results[1:])
        with b.loop(sizes["end"] - sizes["begin"]) as i:
            row = b.let(sizes["begin"] + i)
            normed = normalised(isa, handles, x, row, k, norm, eps, weight_offset, norm_bias)

            def one_group(g: Expr, valid: int) -> None:
                vectors = group // isa.lanes
                values = b.Registers(vectors, isa.f32)
                for v in range(vectors):
                    values[v] = normed(g * group + v * isa.lanes, valid - v * isa.lanes)
                scale, whole = _round(isa, values)
                b.store(xscales, [row, g], scale)
                b.store(xsums, [row, g], whole.pair_sums() if isa.pair_sums(group) else whole.total)
                for v in range(vectors):
                    narrow = whole.low_bytes(v)
                    b.store_vector(isa, xq, [row, g * group + v * isa.lanes], narrow)

            with b.loop(k // group) as g:
                one_group(g, group)
            if k % group:
                one_group(b.index(groups - 1), k % group)

    return b.plain_function([*norm_inputs(norm, norm_bias), *results], [], body)


def round_activations(
    machine: Machine,
    *,
    k: int,
    norm: str = "none",
    eps: float = 0.0,
    weight_offset: float = 0.0,
    norm_bias: bool = False,
    stride: int = 0,
) -> PrimFunc:
    """(x f32 [T, stride], weight?, norm_bias?, xh u16 [T, 2 * ceil(k / 2)]; begin, end): x, normed, as bits of bf16.

    Rounds to nearest, ties to even; NaN stays NaN. An odd k is padded with a zero. Otherwise as `quantize_activations`.
    """
    isa, width = isa_for(machine), -(-k // 2) * 2

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as I

        x = b.view(handles["x"], [b.MANY, stride or k], "float32")
        xh = b.view(handles["xh"], [b.MANY, width], "uint16")
        with b.loop(sizes["end"] - sizes["begin"]) as i:
            row = b.let(sizes["begin"] + i)
            normed = normalised(isa, handles, x, row, k, norm, eps, weight_offset, norm_bias)

            def convert(start: Expr, valid: int) -> Expr:
                return isa.f32_to_bf16(b.let(normed(start, valid)))

            with b.loop(k // isa.lanes) as v:
                b.store_vector(isa, xh, [row, v * isa.lanes], convert(v * isa.lanes, isa.lanes))
            if k % isa.lanes:
                start = b.index(k // isa.lanes * isa.lanes)
                lane = tirx.Ramp(start, b.index(1), isa.lanes)
                inside = isa.first(width % isa.lanes or isa.lanes)
                I.evaluate(I.masked_store(xh, convert(start, k % isa.lanes), row, lane, inside))

    return b.plain_function([*norm_inputs(norm, norm_bias), ("xh", "uint16")], [], body)


def norm_inputs(norm: str, norm_bias: bool) -> list[tuple[str, str]]:
    """The pointers that a norm reads. ValueError for a norm that is not known."""
    if norm not in NORMS or (norm_bias and norm == "none"):
        raise ValueError(f"norm {norm!r} with norm_bias={norm_bias}; known: {', '.join(NORMS)}")
    names = ["x", *(["weight"] if norm != "none" else []), *(["norm_bias"] if norm_bias else [])]
    return [(name, "float32") for name in names]


class _Rounded:
    """A group's integers, in the low bytes of u32 lanes, and their sums by lane (i32)."""

    def __init__(self, isa: VectorIsa, values: b.Registers, lane_sums: Expr) -> None:
        self.isa, self.values, self.lane_sums = isa, values, lane_sums

    @property
    def total(self) -> Expr:
        """The sum of all."""
        return self.isa.reduce("add", self.lane_sums)

    def pair_sums(self) -> Expr:
        """The sum of the first two of every four in the low 16 bits, of the other two in the high ones."""
        from tvm import tirx

        isa = self.isa
        lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), isa.lanes)
        two, zero = isa.splat(2, "int32"), isa.splat(0, "int32")
        first = b.let(isa.reduce("add", tirx.Select((lane & two) < two, self.lane_sums, zero)))
        return ((self.total - first) << 16) | (first & 0xFFFF)

    def low_bytes(self, vector: int) -> Expr:
        """`lanes` i8."""
        from tvm import tirx

        return tirx.reinterpret(f"int8x{self.isa.lanes}", self.values[vector].astype(f"uint8x{self.isa.lanes}"))


def _round(isa: VectorIsa, values: b.Registers) -> tuple[Expr, _Rounded]:
    """(scale, integers) of one group.

    Magnitudes order as their bits do, and integers have a maximum that takes no care of NaN: a reduction of floats
    would go lane by lane. Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits.
    """
    from tvm import tirx

    u32, count = f"uint32x{isa.lanes}", len(values.slots)

    def bits(value: Expr) -> Expr:
        return tirx.reinterpret(u32, value)

    magnitudes = [bits(isa.magnitude(values[v])) for v in range(count)]
    largest = magnitudes[0]
    for magnitude in magnitudes[1:]:
        largest = tirx.Max(largest, magnitude)
    peak = b.let(tirx.reinterpret("float32", isa.reduce("umax", largest)))
    nothing = peak < tirx.const(SMALLEST, "float32")
    zero = tirx.const(0.0, "float32")
    scale = b.let(tirx.Select(nothing, zero, peak / tirx.const(127.0, "float32")))
    inverse = b.let(tirx.Select(nothing, zero, tirx.const(127.0, "float32") / peak))
    integers = b.Registers(count, u32)
    total = isa.splat(-count * ROUNDER_BITS % (1 << 32), "uint32")
    for v in range(count):
        integers[v] = bits(values[v] * isa.splat(inverse) + isa.splat(ROUNDER))
        total = total + integers[v]
    return scale, _Rounded(isa, integers, b.let(tirx.reinterpret(isa.i32, total)))


def normalised(
    isa: VectorIsa,
    handles: Mapping[str, Expr],
    x: Buffer,
    row: Expr,
    k: int,
    norm: str,
    eps: float,
    weight_offset: float,
    norm_bias: bool,
) -> Callable[[Expr, int], Expr]:
    """Emit the norm's statistics of a row; returns (start, valid) -> `lanes` normalised values, zeros past `valid`."""
    from tvm import tirx

    def load(start: Expr, valid: int) -> Expr:
        return isa.load_first(x, valid, row, start)

    if norm == "none":
        return load
    mean = b.let(_sum_over_row(isa, k, load) / tirx.const(float(k), "float32")) if norm == "layer" else None

    def centred(start: Expr, valid: int) -> Expr:
        value = load(start, valid)
        if mean is None or valid <= 0:
            return value
        value = value - isa.splat(mean)
        return value if valid >= isa.lanes else tirx.Select(isa.first(valid), value, isa.splat(0.0))

    squares = _sum_over_row(isa, k, lambda start, valid: _squared(centred(start, valid)))
    variance = squares / tirx.const(float(k), "float32")
    inverse = b.let(tirx.const(1.0, "float32") / tirx.sqrt(variance + tirx.const(eps, "float32")))
    weight = b.view(handles["weight"], [k], "float32")
    shift = b.view(handles["norm_bias"], [k], "float32") if norm_bias else None

    def value(start: Expr, valid: int) -> Expr:
        factor = isa.load_first(weight, valid, start)
        if weight_offset:
            factor = factor + isa.splat(weight_offset)
        scaled = centred(start, valid) * isa.splat(inverse) * factor
        return scaled if shift is None else scaled + isa.load_first(shift, valid, start)

    return value


def _squared(value: Expr) -> Expr:
    from llmc.targets.cpu.vector_isa import bind

    return bind(value, lambda v: v * v)


def _sum_over_row(isa: VectorIsa, k: int, term: Callable[[Expr, int], Expr]) -> Expr:
    """The sum of term(start, valid) over a row's k elements: four partial sums, to hide the adder's latency."""
    width = 4
    sums = b.Registers(width, isa.f32)
    for j in range(width):
        sums[j] = isa.splat(0.0)
    step = width * isa.lanes
    with b.loop(k // step) as i:
        for j in range(width):
            sums[j] = sums[j] + term(i * step + j * isa.lanes, isa.lanes)
    for j, start in enumerate(range(k // step * step, k, isa.lanes)):
        sums[j] = sums[j] + term(b.index(start), k - start)
    return isa.reduce("fadd", (sums[0] + sums[1]) + (sums[2] + sums[3]))
