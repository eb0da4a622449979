"""Embedding: rows of a table by token id, as f32, from every layout that a table may have.

A table of its own lies row by row (`RowLayout`, or plain floats). A table that is also the output matrix lies in the
tiles of the matrix kernels (layouts.py) and is stored once: a row is then one lane of its tile. Either way a token
reads a few kilobytes, next to nothing in a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llmc.compiler.encodings.levels import TableLevels, table_levels
from llmc.targets.cpu.builder import Registers, index, let, loop, scratch
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.layouts import PLANES, Arrays, FloatLayout, QuantizedLayout
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import (
    as_f32,
    cast,
    divide,
    for_pieces,
    integer,
    lanes_of,
    load,
    pieces,
    range_kernel,
    remainder,
    splat,
    store,
    typed,
)
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, P, Problem, Rows, knob

if TYPE_CHECKING:
    from collections.abc import Callable

    from tvm.tirx import Buffer, Expr, PrimFunc
    from typing_extensions import Self

ROW_BITS = tuple(PLANES)
_STORAGE = {"f32": "float32", "f16": "float16", "bf16": "uint16"}


@dataclass(frozen=True)
class RowLayout:
    """A group-quantized table, row after row.

    data u8 [n, groups, group * bits / 8]: 8-bit integers in order (symmetric: i8 bits); of 4-bit ones, byte j holds
    input j of the group in its low half and input j + group / 2 in its high half, symmetric ones with 8 added. Others
    lie plane after plane (`PLANES`). Of 6-bit ones (32 added), group / 2 bytes hold the low four bits in the same way,
    and byte j of the group / 4 behind them the high two bits of the inputs j, j + group / 4, j + group / 2 and
    j + 3 * group / 4, lowest first.
    scales, minimums f16 [n, groups] (per_row: [n, 1]). The last group is padded with zero weights. levels: what
    integers stand for, if not for themselves. in_steps: minimums count steps of the scale.
    """

    bits: int
    group: int
    symmetric: bool = True
    levels: TableLevels | None = None
    in_steps: bool = False
    per_row: bool = False

    def __post_init__(self) -> None:
        if self.bits not in ROW_BITS or self.group < 4 or self.group % 4:
            raise ValueError(f"no row layout for {self.bits}-bit weights in groups of {self.group}")

    @property
    def row_multiple(self) -> int:
        """Rows that may be packed on their own."""
        return 1

    @property
    def offset(self) -> int:
        """What is added to an integer to store it."""
        return 1 << (self.bits - 1) if self.bits < 8 and self.symmetric else 0

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of one row."""
        return self.group * self.bits // 8

    def groups(self, k: int) -> int:
        """Groups of k inputs."""
        return -(-k // self.group)

    def arrays(self, n: int, k: int) -> Arrays:
        """name -> (shape, dtype) for a logical [n, k]."""
        groups = self.groups(k)
        found: Arrays = {
            "data": ((n, groups, self.group_bytes), np.dtype(np.uint8)),
            "scales": ((n, 1 if self.per_row else groups), np.dtype(np.float16)),
        }
        return found if self.symmetric else found | {"minimums": found["scales"]}

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of all packed arrays of a logical [n, k]."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays(n, k).values())

    def pack(self, q: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """q: i8 (symmetric) or u8 [n, k]; scales, minimums: f16 [n, groups]. ValueError where they do not fit."""
        n, k = q.shape
        if (minimums is None) != self.symmetric:
            raise ValueError("minimums go with asymmetric weights, and only with them")
        groups = self.groups(k)
        padded = np.zeros((n, groups * self.group), np.uint8)
        padded[:, :k] = q.view(np.uint8)
        stored = (padded + np.uint8(self.offset)).reshape(n, groups, self.group)
        planes, below = [], 0
        for width in PLANES[self.bits]:
            field = (stored >> np.uint8(below)) & np.uint8((1 << width) - 1)
            parts = np.split(field, 8 // width, axis=-1)
            planes.append(sum((part << np.uint8(width * i) for i, part in enumerate(parts)), np.uint8(0)))
            below += width
        packed = {"data": np.concatenate(planes, axis=-1)}
        for name, values in {"scales": scales, "minimums": minimums}.items():
            if values is None:
                continue
            shape = (n, 1 if self.per_row else groups)
            if values.shape != shape:
                raise ValueError(f"{name} are {values.shape}, the table needs {shape}")
            packed[name] = np.ascontiguousarray(values, np.float16)
        return packed

    def unpack(self, arrays: Mapping[str, np.ndarray], n: int, k: int) -> dict[str, np.ndarray]:
        """The inverse of `pack`: q (i8 or u8) [n, k], scales and minimums f16 [n, groups]."""
        data = arrays["data"]
        stored, below, start = np.zeros((*data.shape[:-1], self.group), np.uint8), 0, 0
        for width in PLANES[self.bits]:
            plane = data[..., start : start + self.group * width // 8]
            shifted = [plane >> np.uint8(width * i) for i in range(8 // width)]
            stored |= (np.concatenate(shifted, axis=-1) & np.uint8((1 << width) - 1)) << np.uint8(below)
            below, start = below + width, start + plane.shape[-1]
        q = np.ascontiguousarray((stored - np.uint8(self.offset)).reshape(n, -1)[:, :k])
        parts = {"q": q.view(np.int8) if self.symmetric else q}
        return parts | {name: array for name, array in arrays.items() if name != "data"}


Layout: TypeAlias = RowLayout | QuantizedLayout | FloatLayout


@dataclass(frozen=True)
class RowsProblem(Problem):
    """ids i32[T], table [n, features] (f32, f16, or bf16 as u16), out f32[T, features]: rows times `scale`."""

    dtype: str
    features: int
    scale: float


@dataclass(frozen=True)
class TilesProblem(Problem):
    """ids i32[T], table as a `FloatLayout` packs it, out f32[T, features]: rows times `scale`."""

    dtype: str
    tile_rows: int
    features: int
    scale: float


@dataclass(frozen=True)
class QuantizedProblem(Problem):
    """ids i32[T], data u8, scales f16, [minimums f16 (asymmetric)], out f32[T, features]: rows times `scale`.

    table: integers stand for levels of a table. tile_rows = 0: the arrays are a `RowLayout`'s; otherwise a
    `QuantizedLayout`'s.
    """

    bits: int
    group: int
    symmetric: bool
    table: bool
    offset: int
    tile_rows: int
    features: int
    scale: float
    in_steps: bool = False
    per_row: bool = False


@dataclass(frozen=True)
class Embedding(CpuTemplate[P]):
    """One unit is one token. least: tokens that are worth a thread. Rows are copied a vector at a time: nothing is
    added up, so that there is nothing to wait for."""

    least: int = knob(1, 2, 4, 8, 16, 32, code=False)

    @classmethod
    def default(cls, problem: P, machine: Machine, rows: Rows = ANY_ROWS) -> Self:
        return cls(least=4)

    def grain(self, problem: P) -> int:
        return self.least


class EmbeddingRows(Embedding[RowsProblem], name="embedding_rows"):
    """Of plain rows."""

    def build(self, problem: RowsProblem, machine: Machine) -> PrimFunc:
        return _rows(isa_for(machine).lanes, **problem.params())  # type: ignore[arg-type]


class EmbeddingTiles(Embedding[TilesProblem], name="embedding_tiles"):
    """Of rows of floats that are lanes of tiles."""

    def build(self, problem: TilesProblem, machine: Machine) -> PrimFunc:
        return _tiles(**problem.params())  # type: ignore[arg-type]


class EmbeddingQuantized(Embedding[QuantizedProblem], name="embedding_quantized"):
    """Of quantized rows, or lanes of tiles. Groups are decoded one after another, as the encoding has them."""

    def stack_bytes(self, problem: QuantizedProblem, machine: Machine) -> int:
        return arrays(4 * problem.group)

    def build(self, problem: QuantizedProblem, machine: Machine) -> PrimFunc:
        return _quantized(isa_for(machine).lanes, **problem.params())  # type: ignore[arg-type]


def embedding(
    layout: Layout | str, features: int, scale: float = 1.0
) -> tuple[type[Embedding[Any]], Problem]:  # of one kind of problem, which types cannot say
    """What gathers rows of a table of `features` columns and multiplies them by `scale`. Units: T tokens.

    layout: "f32", "f16" or "bf16" for plain rows, a RowLayout, a QuantizedLayout or a FloatLayout. Gated layouts are no
    tables: ValueError.
    """
    if isinstance(layout, str):
        if layout not in _STORAGE:
            raise ValueError(f"no embedding from rows of {layout!r}; known: {', '.join(_STORAGE)}")
        return EmbeddingRows, RowsProblem(layout, features, float(scale))
    tile_rows = 0 if isinstance(layout, RowLayout) else layout.tile_rows
    if tile_rows and getattr(layout, "gated", False):
        raise ValueError("a gated layout is no embedding table")
    if isinstance(layout, FloatLayout):
        return EmbeddingTiles, TilesProblem(layout.dtype, tile_rows, features, float(scale))
    return EmbeddingQuantized, QuantizedProblem(
        layout.bits, layout.group, layout.symmetric, layout.levels is not None, layout.offset, tile_rows, features,
        float(scale), layout.in_steps, layout.per_row,
    )  # fmt: skip


def _rows(lanes: int, dtype: str, features: int, scale: float) -> PrimFunc:
    def unit(a: SimpleNamespace, token: Expr) -> None:
        source, target = let(integer(load(a.ids, token)) * features), let(token * features)
        for_pieces(
            features,
            lanes,
            lambda i, width: store(a.out, target + i, _scaled(as_f32(load(a.table, source + i, width)), scale)),
        )

    return range_kernel([("ids", "int32"), ("table", _STORAGE[dtype]), ("out", "float32")], [], unit)


def _tiles(dtype: str, tile_rows: int, features: int, scale: float) -> PrimFunc:
    inputs = 2 if dtype == "bf16" else 1  # consecutive inputs of a lane

    def unit(a: SimpleNamespace, token: Expr) -> None:
        row = integer(load(a.ids, token))
        depth = -(-features // inputs)
        tile = divide(row, tile_rows) * (depth * tile_rows) + remainder(row, tile_rows)
        source, target = let(tile * inputs), let(token * features)

        def element(i: Expr | int, width: int) -> None:
            value = as_f32(load(a.table, source + i * (tile_rows * inputs), width))
            store(a.out, target + i * inputs, _scaled(value, scale))

        with loop(features // inputs) as i:
            element(i, inputs)
        if features % inputs:
            element(features // inputs, 1)

    return range_kernel([("ids", "int32"), ("table", _STORAGE[dtype]), ("out", "float32")], [], unit)


def _quantized(
    vector: int,
    bits: int,
    group: int,
    symmetric: bool,
    table: bool,
    offset: int,
    tile_rows: int,
    features: int,
    scale: float,
    in_steps: bool,
    per_row: bool,
) -> PrimFunc:

    groups = -(-features // group)
    group_bytes = group * bits // 8
    levels = table_levels(bits) if table else None
    stride = tile_rows or 1  # elements from one group's scale to the next

    def unit(a: SimpleNamespace, token: Expr) -> None:
        row, target = integer(load(a.ids, token)), let(token * features)
        tile, lane = (let(divide(row, tile_rows)), let(remainder(row, tile_rows))) if tile_rows else (row, index(0))
        first_scale = let(tile * ((1 if per_row else groups) * stride) + lane)
        first_byte = let(tile * (groups * group_bytes * stride) + lane * 4)

        def emit(g: Expr | int, out: Buffer, at: Expr) -> None:
            factor = let(as_f32(load(a.scales, first_scale if per_row else first_scale + g * stride)) * scale)
            minimum = None if symmetric else as_f32(load(a.minimums, first_scale + g * stride))
            if minimum is not None:
                minimum = let(minimum * (factor if in_steps else scale))

            def write(i: Expr | int, stored: Expr, width: int) -> None:
                value = _integer_value(stored, offset, symmetric) if levels is None else _level(levels, stored)
                value = value * factor
                store(out, at + i, value if minimum is None else value + minimum)

            base = let(first_byte + g * (group_bytes * stride))
            if tile_rows:
                _lane_group(a.data, base, tile_rows, group, bits, write)
            else:
                _row_group(a.data, base, vector, group, bits, write)

        with loop(features // group) as g:
            emit(g, a.out, target + g * group)
        left = features % group
        if left:
            # The last group is decoded whole and cut when it is copied.
            whole = scratch(group, "float32")
            emit(features // group, whole, index(0))
            for i, width in pieces(left, vector):
                store(a.out, target + (features - left + i), load(whole, i, width))

    pointers = [("ids", "int32"), ("data", "uint8"), ("scales", "float16")]
    pointers += [("minimums", "float16")] * (not symmetric) + [("out", "float32")]
    return range_kernel(pointers, [], unit)


def _scaled(value: Expr, scale: float) -> Expr:
    return value if scale == 1.0 else value * scale


def _integer_value(stored: Expr, offset: int, symmetric: bool) -> Expr:
    """Stored bytes (u8) to the integers that they stand for, as f32. Subtraction wraps, as `pack`'s addition did."""
    from tvm import tirx

    integers = stored - splat(offset % 256, lanes_of(stored), "uint8") if offset % 256 else stored
    if symmetric:
        integers = tirx.reinterpret(typed("int8", lanes_of(stored)), integers)
    return cast(integers, "float32")


def _level(levels: TableLevels, stored: Expr) -> Expr:
    """The levels of stored integers from 0 on (u8), f32: exact, one comparison a level, as tokens are few."""
    from tvm import tirx

    # One statement a level: TVM's passes look again at all that is within a choice for each that it is within.
    lanes, found = lanes_of(stored), Registers(1, typed("float32", lanes_of(stored)))
    found[0], stored = splat(float(levels.values[0]), lanes), let(stored)
    for number, value in enumerate(levels.values[1:], 1):
        found[0] = tirx.Select(stored >= splat(number, lanes, "uint8"), splat(float(value), lanes), found[0])
    return found[0]


def _row_group(
    data: Buffer, base: Expr, vector: int, group: int, bits: int, write: Callable[[Expr | int, Expr, int], None]
) -> None:
    """One group of a row in a `RowLayout`: piece by piece of the narrowest plane, with all inputs that it holds."""
    planes = PLANES[bits]
    narrowest = min(planes)
    length = group * narrowest // 8  # bytes of the narrowest plane, and inputs of each of its fields

    def piece(i: Expr | int, width: int) -> None:
        read: dict[int, Expr] = {}
        for part in range(8 // narrowest):  # inputs [part * length, (part + 1) * length) of the group
            stored, below, start = None, 0, 0
            for plane in planes:
                runs = plane // narrowest  # of `length` bytes
                at, shift = start + part % runs * length, part // runs * plane
                if at not in read:
                    read[at] = let(load(data, base + at + i, width))
                field = _field(read[at], shift, plane)
                stored = field if stored is None else stored | (field << below)
                below, start = below + plane, start + group * plane // 8
            assert stored is not None
            write(part * length + i, stored, width)

    for_pieces(length, vector, piece)


def _field(packed: Expr, shift: int, bits: int) -> Expr:
    """The bits from `shift` on of every byte."""
    moved = packed >> shift if shift else packed
    return moved if shift + bits == 8 else moved & ((1 << bits) - 1)


def _lane_group(
    data: Buffer, base: Expr, tile_rows: int, group: int, bits: int, write: Callable[[Expr | int, Expr, int], None]
) -> None:
    """One group of one lane in a `QuantizedLayout`: four bytes of every vector."""
    layout = QuantizedLayout(bits, group, True, tile_rows, 0)  # what else it has is the same for where bytes lie
    quads, vectors = layout.bundle_quads, layout.bundle_vectors
    with loop(group // (4 * quads)) as bundle:
        stored = [let(load(data, base + (bundle * vectors + v) * (tile_rows * 4), 4)) for v in range(vectors)]
        for number in range(quads):
            whole = None
            for vector, bit, width, below in layout.fields(number):
                field = _field(stored[vector], bit, width)
                field = field << below if below else field
                whole = field if whole is None else whole | field
            assert whole is not None
            write((bundle * quads + number) * 4, whole, 4)
