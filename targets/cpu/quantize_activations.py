"""f32 activations to what linear ops multiply, after a norm if asked: bytes with a scale and a sum a group, or bf16.

    scale = max|x| / 127,   q = round(x / scale) (half to even),   sum = sum of q
A group whose largest magnitude is below 1e-30 becomes zeros with scale 0. Inputs past `k` count as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.row_norm import RowNorm
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for
from llmc.targets.cpu.vectors import add, first_lanes, load, maximum, reduce, splat, store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc
    from typing_extensions import Self

NORMS = ("none", "rms", "layer")
SMALLEST = 1e-30  # below this 127 / max|x| would come near overflow
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000  # 1.5 * 2^23: f32 around it are whole numbers


def padded(k: int, group: int) -> int:
    """Bytes of a quantized row: k rounded up to whole groups."""
    return -(-k // group) * group


@dataclass(frozen=True, kw_only=True)
class RoundingProblem(Problem):
    """Rows of k numbers that are rounded, after a norm if asked: kernels take (x f32 [T, k], weight f32 [k] if norm,
    norm_bias f32 [k] if any, what they write; begin, end). One unit: one row.

    norm "rms": x / sqrt(mean(x^2) + eps) * (weight + weight_offset); "layer": (x - mean) / sqrt(variance + eps) *
    (weight + weight_offset) + norm_bias. ValueError for a norm that is not known.
    """

    k: int
    norm: str = "none"
    eps: float = 0.0
    weight_offset: float = 0.0
    norm_bias: bool = False

    def __post_init__(self) -> None:
        if self.norm not in NORMS or (self.norm_bias and self.norm == "none"):
            raise ValueError(f"norm {self.norm!r} with norm_bias={self.norm_bias}; known: {', '.join(NORMS)}")

    def inputs_read(self) -> list[tuple[str, str]]:
        """The pointers that are read."""
        names = ["x", *(["weight"] if self.norm != "none" else []), *(["norm_bias"] if self.norm_bias else [])]
        return [(name, "float32") for name in names]


R = TypeVar("R", bound=RoundingProblem)


@dataclass(frozen=True)
class RowRounding(CpuTemplate[R]):
    """A row at a time. The limit is the memory: a row is read from it once, and from the first-level cache after that.
    chains: independent sums of a norm, since an addition takes some cycles. least: numbers that are worth a thread."""

    chains: int = knob(1, 2, 4, 8, exact=False)
    least: int = knob(1024, 2048, 4096, 8192, 16384, code=False)

    @classmethod
    def default(cls, problem: R, machine: Machine, rows: Rows = ANY_ROWS) -> Self:
        return cls(chains=4, least=4096)

    def vectors(self, problem: R, lanes: int) -> int:
        """That are in registers beside the sums of a norm."""
        return 0

    def stack_bytes(self, problem: R, machine: Machine) -> int:
        isa = isa_for(machine)
        count = 2 * self.chains + self.vectors(problem, isa.lanes)
        return arrays(*[isa.vector_bytes] * count)

    def grain(self, problem: R) -> int:
        return max(1, self.least // problem.k)


@dataclass(frozen=True, kw_only=True)
class BytesProblem(RoundingProblem):
    """To bytes: (..., xq i8 [T, padded(k, group)], xscales f32 [T, groups], xsums i32 [T, groups]); see
    `IntegerGroups`."""

    group: int


@dataclass(frozen=True)
class QuantizeRows(RowRounding[BytesProblem], name="quantize_activations"):
    """To bytes in groups."""

    def vectors(self, problem: BytesProblem, lanes: int) -> int:
        return 4 * -(-problem.group // lanes)  # numbers and integers, of whole groups and of a last one

    def build(self, problem: BytesProblem, machine: Machine) -> PrimFunc:
        results = [("xq", "int8"), ("xscales", "float32"), ("xsums", "int32")]

        def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
            _quantize(problem, isa_for(machine), self.chains, handles, sizes)

        return b.plain_function([*problem.inputs_read(), *results], [], body)


def _quantize(
    problem: BytesProblem, isa: VectorIsa, chains: int, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]
) -> None:
    k, group, groups = problem.k, problem.group, -(-problem.k // problem.group)
    x = b.view(handles["x"], [b.MANY, k], "float32")
    xq = b.view(handles["xq"], [b.MANY, groups * group], "int8")
    xscales = b.view(handles["xscales"], [b.MANY, groups], "float32")
    xsums = b.view(handles["xsums"], [b.MANY, groups], "int32")
    with b.loop(sizes["end"] - sizes["begin"]) as i:
        row = b.let(sizes["begin"] + i)
        normed = normalised(isa, handles, x, row, problem, chains)

        def one_group(g: Expr, valid: int) -> None:
            vectors = group // isa.lanes
            values = b.Registers(vectors, isa.f32)
            for v in range(vectors):
                values[v] = normed(g * group + v * isa.lanes, valid - v * isa.lanes)
            scale, whole = _round(isa, values)
            store(xscales, (row, g), scale)
            store(xsums, (row, g), whole.pair_sums() if isa.pair_sums(group) else whole.total)
            for v in range(vectors):
                narrow = whole.low_bytes(v)
                store(xq, (row, g * group + v * isa.lanes), narrow)

        with b.loop(k // group) as g:
            one_group(g, group)
        if k % group:
            one_group(b.index(groups - 1), k % group)


@dataclass(frozen=True)
class RoundRows(RowRounding[RoundingProblem], name="round_activations"):
    """To bf16: (..., xh u16 [T, 2 * ceil(k / 2)]), see `Bf16Pairs`. Rounds to nearest, ties to even; NaN stays NaN."""

    def build(self, problem: RoundingProblem, machine: Machine) -> PrimFunc:
        def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
            _round_to_bf16(problem, isa_for(machine), self.chains, handles, sizes)

        return b.plain_function([*problem.inputs_read(), ("xh", "uint16")], [], body)


def _round_to_bf16(
    problem: RoundingProblem, isa: VectorIsa, chains: int, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]
) -> None:
    k, width = problem.k, padded(problem.k, 2)
    x = b.view(handles["x"], [b.MANY, k], "float32")
    xh = b.view(handles["xh"], [b.MANY, width], "uint16")
    with b.loop(sizes["end"] - sizes["begin"]) as i:
        row = b.let(sizes["begin"] + i)
        normed = normalised(isa, handles, x, row, problem, chains)

        def convert(start: Expr, valid: int) -> Expr:
            return isa.f32_to_bf16(b.let(normed(start, valid)))

        with b.loop(k // isa.lanes) as v:
            store(xh, (row, v * isa.lanes), convert(v * isa.lanes, isa.lanes))
        if k % isa.lanes:
            start = b.index(k // isa.lanes * isa.lanes)
            store(xh, (row, start), convert(start, k % isa.lanes), width % isa.lanes or isa.lanes)


class _Rounded:
    """A group's integers, in the low bytes of u32 lanes, and their sums by lane (i32)."""

    def __init__(self, isa: VectorIsa, values: b.Registers, lane_sums: Expr) -> None:
        self.isa, self.values, self.lane_sums = isa, values, lane_sums

    @property
    def total(self) -> Expr:
        """The sum of all."""
        return reduce(self.lane_sums, add)

    def pair_sums(self) -> Expr:
        """The sum of the first two of every four in the low 16 bits, of the other two in the high ones."""
        from tvm import tirx

        isa = self.isa
        lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), isa.lanes)
        zero = splat(0, isa.lanes, "int32")
        first = b.let(reduce(tirx.Select((lane & 2) < 2, self.lane_sums, zero), add))
        return ((self.total - first) << 16) | (first & 0xFFFF)

    def low_bytes(self, vector: int) -> Expr:
        """`lanes` i8."""
        from tvm import tirx

        return tirx.reinterpret(f"int8x{self.isa.lanes}", self.values[vector].astype(f"uint8x{self.isa.lanes}"))


def _round(isa: VectorIsa, values: b.Registers) -> tuple[Expr, _Rounded]:
    """(scale, integers) of one group.

    Magnitudes order as their bits do, and integers have a maximum that takes no care of NaN. Adding 1.5 * 2^23 rounds
    to an integer, half to even, and leaves it in the low bits.
    """
    from tvm import tirx

    u32, count = f"uint32x{isa.lanes}", len(values.slots)

    def bits(value: Expr) -> Expr:
        return tirx.reinterpret(u32, value)

    magnitudes = [bits(isa.magnitude(values[v])) for v in range(count)]
    largest = magnitudes[0]
    for magnitude in magnitudes[1:]:
        largest = tirx.Max(largest, magnitude)
    peak = b.let(tirx.reinterpret("float32", reduce(largest, maximum)))
    nothing = peak < tirx.const(SMALLEST, "float32")
    zero = tirx.const(0.0, "float32")
    scale = b.let(tirx.Select(nothing, zero, peak / tirx.const(127.0, "float32")))
    inverse = b.let(tirx.Select(nothing, zero, tirx.const(127.0, "float32") / peak))
    integers = b.Registers(count, u32)
    total = splat(-count * ROUNDER_BITS % (1 << 32), isa.lanes, "uint32")
    for v in range(count):
        integers[v] = bits(values[v] * inverse + ROUNDER)
        total = total + integers[v]
    return scale, _Rounded(isa, integers, b.let(tirx.reinterpret(isa.i32, total)))


def normalised(
    isa: VectorIsa, handles: Mapping[str, Expr], x: Buffer, row: Expr, problem: RoundingProblem, chains: int
) -> Callable[[Expr, int], Expr]:
    """Emit the norm's statistics of a row; returns (start, valid) -> `lanes` normalised values, zeros past `valid`."""
    from tvm import tirx

    k, lanes = problem.k, isa.lanes
    if problem.norm == "none":
        return lambda start, valid: load(x, (row, start), lanes, valid)
    norm = RowNorm(problem.norm, k, problem.eps, problem.weight_offset)
    row_norm = norm.statistics(lambda offset, width: load(x, (row, offset), width), lanes, chains)
    weight = b.view(handles["weight"], [k], "float32")
    bias = b.view(handles["norm_bias"], [k], "float32") if problem.norm_bias else None

    def value(start: Expr, valid: int) -> Expr:
        zeros = splat(0.0, lanes)
        if valid <= 0:
            return zeros
        factors = load(weight, start, lanes, valid), None if bias is None else load(bias, start, lanes, valid)
        found = row_norm.normalise(load(x, (row, start), lanes, valid), *factors)
        if valid >= lanes or row_norm.mean is None:  # without a mean zeros stay zeros
            return found
        return tirx.Select(first_lanes(valid, lanes), found, zeros)

    return value
