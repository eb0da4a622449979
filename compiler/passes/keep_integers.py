"""Weights that the source has rounded keep their integers: llm.scale_integers under a linear op or an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llmc.compiler.encodings.grouped import EVEN_BITS, fits
from llmc.compiler.ir.elementwise import Add, Cast, Constant, Mul, Neg, Sub, constant
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import Graph, rewrite, topological
from llmc.compiler.ir.integers import PackGroups, ScaleIntegers, UnpackNibbles, repeat_blocks
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear, Quantize, static
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Reshape, Slice, Transpose
from llmc.compiler.ir.types import INTEGERS, Array
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.probe import read_weight
from llmc.compiler.passes.rewriting import uncast
from llmc.compiler.passes.schemes import describe
from llmc.errors import IRError

ROUNDING = 2.0**-11  # relative error of a number that f16 holds well
# Scales that are small beside the largest of their weight may lose more: 2^-14 of that one.
SMALL = 2.0**-14
STEP = 2.0**-3  # of a group's step, that its minimum may be moved by
CUTS = (32, 16)  # groups that blocks are cut into
FINE = "q8g32"  # its steps are an eighth of 4-bit ones, or less


@dataclass(frozen=True)
class KeepIntegers(Pass, name="keep-integers"):
    """A weight that is llm.scale_integers -> llm.pack_groups of the same integers.

    group: inputs that share a scale where the source's blocks are multiples of it, or rows have one scale; blocks of
    other multiples of 32 and 16 are cut into groups of as many, and weights in others are rounded anew, finely. Scales
    and minimums are stored as f16. Integers whose zero point is not the middle of their range get a minimum a group:
    -zero, in steps of the scale, or -zero * scale where zero points are wider floats. What does not fit stays as the
    floats that it stands for, to be rounded like any weight.
    """

    exact: ClassVar[bool] = False

    group: int = 64

    def run(self, graph: Graph, report: Report) -> Graph:
        kept: dict[Value, Value | str] = {}

        def packed(op: Op, weight: Value) -> Value | None:
            base = uncast(weight)
            turned = isinstance(base, Transpose) and base.permutation == (1, 0)
            source = uncast(base.x) if isinstance(base, Transpose) and turned else base
            if weight not in graph.constants or not isinstance(source, ScaleIntegers):
                if weight in graph.constants and base not in kept and (hidden := _hidden(base)):
                    kept[base] = hidden
                    report.refuse(describe(op, weight), hidden)
                return None
            if base not in kept:
                try:
                    kept[base] = self._pack(source, turned)
                except IRError as error:
                    kept[base] = str(error)
                found = kept[base]
                if isinstance(found, PackGroups):
                    report.hit(f"kept as {found.encoding}")
                elif isinstance(found, Quantize):
                    report.refuse(describe(op, weight), f"blocks of {source.block} inputs: rounded anew, {FINE}")
                else:
                    report.refuse(describe(op, weight), f"its integers are not kept: {found}")
            found = kept[base]
            return None if isinstance(found, str) else found

        def rule(op: Op) -> Value | None:
            if isinstance(op, (Linear, GatedLinear)):
                found = packed(op, op.w)
                return None if found is None else op.replace(w=found)
            if isinstance(op, Embed):
                found = packed(op, op.table)
                return None if found is None else op.replace(table=found)
            return None

        return rewrite(graph, rule)

    def _pack(self, source: ScaleIntegers, turned: bool) -> Value | str:
        """The encoded weight [outputs, inputs], or why there is none."""
        if source.q.rank != 2:
            return f"its integers are {source.q.type}, no matrix"
        if source.q.dtype not in ("i8", "u8"):
            return f"its integers are {source.q.dtype}, not 8 bits or less"
        q, axis = source.q, source.axis
        if turned:
            q, axis = Transpose(q, (1, 0)), 1 - axis
        rows, inputs = (static(dim) for dim in q.shape)
        block = source.block if source.block and axis == 1 else 0
        group = next((size for size in (self.group, *CUTS) if block % size == 0), 0)
        if not group:
            floats: Value = Transpose(source, (1, 0)) if turned else source
            return Quantize(floats if floats.dtype == "f32" else Cast(floats, "f32"), FINE)

        def per_group(values: Value) -> Value | None:
            """[rows, groups]; None where values differ inside of a group."""
            if source.block and not block:
                values = source.broadcast(values)
            values = Reshape(values, (*(1,) * (2 - values.rank), *values.shape)) if values.rank < 2 else values
            if turned:
                values = Transpose(values, (1, 0))
            groups = -(-inputs // group)
            if values.shape[1] == 1:
                return Broadcast(values, (rows, groups))
            if not block:
                return None
            values = repeat_blocks(values, 1, block // group, groups)
            return Broadcast(values, (rows, groups)) if values.shape[0] != rows else values

        scales = per_group(source.scales)
        zeros = None if source.zeros is None else per_group(source.zeros)
        if scales is None or (source.zeros is not None and zeros is None):
            return "its scales differ from input to input"
        lost = _rounding_of(source.scales)
        if lost:
            return lost
        bits = next(bits for bits in EVEN_BITS if bits >= _fewest_bits(source.q) and fits(bits, group))
        middle = {"i8": 0, "u8": 1 << (bits - 1)}[q.dtype]
        halves = Cast(scales, "f16")
        if _is_everywhere(source.zeros, middle):
            if middle:
                q = Cast(Sub(Cast(q, "i16"), constant(middle, "i16")), "i8")
            return PackGroups(q, halves, None, f"q{bits}g{group}")
        points: Value = constant(0.0, "f32") if zeros is None else Cast(zeros, "f32")
        if q.dtype == "i8":
            shift = 1 << (bits - 1)
            q = Cast(Add(Cast(q, "i16"), constant(shift, "i16")), "u8")
            points = Add(points, constant(float(shift), "f32"))
        if _in_steps(source):
            return PackGroups(q, halves, Cast(Broadcast(Neg(points), scales.shape), "f16"), f"q{bits}g{group}z")
        minimums = Broadcast(Neg(Mul(Cast(halves, "f32"), points)), scales.shape)
        lost = _rounding_of_minimums(minimums, halves)
        if lost:
            return lost
        return PackGroups(q, halves, minimums, f"q{bits}g{group}a")


def _hidden(weight: Value) -> str:
    """Why a weight that is computed from integers, such as a part of them or them in another order, keeps none; empty
    where there are none in it."""
    if isinstance(weight, (PackGroups, Quantize)) or not any(
        isinstance(value, ScaleIntegers) for value in topological([weight])
    ):
        return ""
    kind = weight.name if isinstance(weight, Op) else type(weight).__name__
    return f"its integers are not kept: they lie behind {kind}, so that what they stand for is rounded like any weight"


def _in_steps(source: ScaleIntegers) -> bool:
    """Whether f16 holds the zero points, which integers around 0 have 128 added to: parts of a step are lost then."""
    zeros = source.zeros
    if zeros is None or zeros.dtype in ("u8", "i8"):
        return True
    if zeros.dtype == "f16":
        return source.q.dtype == "u8"
    found = _read(zeros) if zeros.dtype in INTEGERS else None
    return found is not None and bool((np.abs(found.astype(np.int64)) <= 1 << 10).all())


def _fewest_bits(q: Value) -> int:
    """The fewest bits of an encoding of even steps that hold integers: 4 where they come out of half bytes, else by
    their values; 8 where these cannot be read now."""
    inner = q
    while isinstance(inner, (Reshape, Slice, Transpose)):
        inner = inner.x
    if isinstance(inner, UnpackNibbles):
        return 4
    found = _read(q)
    if found is None or not found.size:
        return 8
    lowest, highest = int(found.min()), int(found.max())
    for bits in EVEN_BITS:
        start = -(1 << bits - 1) if q.dtype == "i8" else 0
        if start <= lowest and highest < start + (1 << bits):
            return bits
    return 8


def _read(value: Value) -> Array | None:
    """A value that is known when compiling; None where its weights cannot be read now."""
    try:
        return np.asarray(evaluate_values([value], {}, read_weight, {})["0"])
    except IRError:
        return None


def _is_everywhere(zeros: Value | None, middle: int) -> bool:
    """Whether all zero points are `middle`; no zero points are 0."""
    if zeros is None:
        return middle == 0
    found = zeros.evaluate() if isinstance(zeros, Constant) else _read(zeros)
    return found is not None and bool(np.all(found == middle))


def _rounding_of_minimums(minimums: Value, scales: Value) -> str:
    """Why f16 does not hold the minimums of groups; empty where it does, or where they cannot be read now. Integers in
    groups that are far from 0 would all move by a good part of a step."""
    found, steps = _read(minimums), _read(scales)
    if found is None or steps is None or not found.size:
        return ""
    exact, step = found.astype(np.float64), np.abs(steps.astype(np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(exact.astype(np.float16).astype(np.float64) - exact)
        if np.all(error <= step * STEP):
            return ""
        worst = float(np.nanmax(error / np.maximum(step, np.finfo(np.float16).tiny)))
    return f"f16 does not hold its minimums: some groups would move by {worst:.2g} of a step"


def _rounding_of(scales: Value) -> str:
    """Why f16 does not hold the scales; empty where it does, or where they cannot be read now."""
    found = _read(scales)
    if found is None or not found.size:
        return ""
    exact = found.astype(np.float64)
    largest = float(np.abs(exact).max())
    with np.errstate(over="ignore"):
        error = np.abs(exact.astype(np.float16).astype(np.float64) - exact)
    allowed = np.maximum(np.abs(exact) * ROUNDING, largest * SMALL)
    if np.all(error <= allowed):
        return ""
    worst = float(np.nanmax(error)) / largest
    return f"f16 does not hold its scales (up to {largest:.3g}): they would change by {worst:.1e} of the largest"
