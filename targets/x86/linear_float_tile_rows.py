"""bf16 weights times a few rows on tile registers (AMX), as exact as in f32.

A tile of packed weights, 16 pairs of inputs by 16 result columns, is an operand of a multiplication as it lies: no
weight passes through a vector register. Activations come as three bf16 each, which hold all of an f32 (see
`activation_tiles`): products are exact and sums are f32. A kilobyte of weights takes three multiplications of as many
cycles as there are rows, 48 with 16 rows, and memory takes some 200 for it: the limit is the memory's read bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.layouts import FloatLayout
from llmc.targets.cpu.linear_problem import FloatProblem
from llmc.targets.cpu.vectors import load, prefetch, splat, store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Rows, knob
from llmc.targets.x86 import tiles as amx
from llmc.targets.x86.isa import X86Isa, isa_for
from llmc.targets.x86.tiles import INPUTS, TILE

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

# Weight tiles of a unit, side by side: they share the loads of activations, which come from the second-level cache.
# With two, 8 rows took 3% longer and 16 rows 8%.
TILES = 4
PARTS = 3  # bf16 of an activation
_PAIRS = INPUTS // 2  # rows of a weight tile
# Numbers of the tile registers. A weight tile's products have one sum: two, with the small parts' own, are nearer still
# (root mean square error 0.6 times that), but one is as near as numpy's f32 already.
_A, _B, _C = (0, 1, 2), 3, (4, 5, 6, 7)


@dataclass
class _Unit:
    """TILES weight tiles times a block of rows, while their code is emitted.

    start: where the weight tiles begin, in bytes; first_x: where the block's activations do, in elements. padded: a
    tile on the stack for the inputs past the last multiple of 32, if there are any. distance: of prefetches, in bytes.
    """

    isa: X86Isa
    k: int
    x: Buffer
    data: Buffer
    padded: Buffer | None
    start: Sequence[Expr]
    first_x: Expr
    distance: int

    def run(self) -> None:
        """Add up all inputs."""
        for c in _C:
            amx.zero(c)
        blocks, rest = divmod(-(-self.k // 2), _PAIRS)
        with b.loop(blocks) as block:
            self._multiply(block)
        if rest:
            self._load_x(blocks)
            for t in range(TILES):
                self._multiply_rest(t, blocks, rest)

    def _multiply(self, block: Expr) -> None:
        """32 inputs, with the prefetches that are due meanwhile."""
        ahead = [self._ahead(start, block) for start in self.start]
        self._load_x(block)
        line_bytes = self.isa.cache_line
        lines = 2 * TILE // line_bytes
        for t in range(TILES):
            amx.load(_B, self.data, self.start[t] + block * (2 * TILE))
            for part in range(PARTS):
                amx.dot_bf16(_C[t], _A[part], _B)
                b.keep_order()
                for line in range(lines * part // PARTS, lines * (part + 1) // PARTS):
                    prefetch(self.data, ahead[t] + line * line_bytes, near=True)

    def _load_x(self, block: Expr | int) -> None:
        for part in range(PARTS):
            amx.load(_A[part], self.x, self.first_x + (b.index(block) * PARTS + part) * TILE)

    def _ahead(self, start: Expr, block: Expr) -> Expr:
        """Where to prefetch from: `distance` bytes on; past the tile's end, in the tile that follows in its stream."""
        from tvm import tirx

        size = -(-self.k // 2) * self.isa.vector_bytes
        inside = b.let(block * (2 * TILE) + self.distance)
        return b.let(start + inside + tirx.Select(inside >= size, b.index((TILES - 1) * size), b.index(0)))

    def _multiply_rest(self, t: int, blocks: int, rest: int) -> None:
        """The last inputs, with zeros behind them."""
        from tvm import tirx

        assert self.padded is not None
        isa = self.isa
        for row in range(_PAIRS):
            value = splat(0, isa.lanes, "int32")
            if row < rest:
                at = self.start[t] + (blocks * _PAIRS + row) * isa.vector_bytes
                value = tirx.reinterpret(isa.i32, load(self.data, at, isa.vector_bytes))
            store(self.padded, row, value)
        amx.load(_B, b.view(self.padded.data, [b.MANY], "int32"), 0)
        for part in range(PARTS):
            amx.dot_bf16(_C[t], _A[part], _B)


@dataclass(frozen=True)
class FloatTileRows(CpuTemplate[FloatProblem], name="float_linear_tile_rows"):
    """(x u16 in the form `Bf16Tiles` of PARTS parts, data u16, bias f32 [n] if any, residual f32 [T, features] if any,
    out f32 [T, features]; T, begin, end).

    Any T, 16 rows at a time; a short block is multiplied as short as it is. One unit: TILES weight tiles. ahead, least:
    see `QuantizedRows`.
    """

    ahead: int = knob(1536, 3072, 6144)
    least: int = knob(16 << 10, 32 << 10, 64 << 10, code=False)

    @classmethod
    def default(cls, problem: FloatProblem, machine: Machine, rows: Rows = ANY_ROWS) -> FloatTileRows:
        return cls(ahead=3072, least=32 << 10)

    def refuse(self, problem: FloatProblem, machine: Machine) -> str:
        if not amx.has_tiles(machine, "bf16") or isa_for(machine).lanes != amx.ROWS:
            return f"{machine.name} has no tile registers for bf16, as wide as its vectors"
        if problem.dtype != "bf16" or problem.pairs:
            return f"weights are {problem.dtype}, and activations {'bf16' if problem.pairs else 'f32'}"
        return super().refuse(problem, machine)

    def stack_bytes(self, problem: FloatProblem, machine: Machine) -> int:
        vector = isa_for(machine).vector_bytes
        return arrays(vector * TILES * amx.ROWS, vector * _PAIRS)

    def build(self, problem: FloatProblem, machine: Machine) -> PrimFunc:
        def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
            _emit(problem, isa_for(machine), self.ahead, handles, sizes)

        pointers = [("x", "uint16"), ("data", "uint16"), *problem.epilogue.pointers()]
        return b.plain_function(pointers, ["T"], body, b.ORDER_HELPER)


def _emit(
    problem: FloatProblem, isa: X86Isa, ahead: int, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]
) -> None:
    from tvm import tirx

    k, epilogue, tokens = problem.k, problem.epilogue, sizes["T"]
    all_tiles, pairs = FloatLayout("bf16", isa.lanes, problem.gated).tiles(problem.n), -(-k // 2)
    x, data = b.view(handles["x"], [b.MANY], "uint16"), b.view(handles["data"], [b.MANY], "uint8")
    sums = b.scratch([TILES, amx.ROWS], isa.f32)
    padded = b.scratch([_PAIRS], isa.i32) if pairs % _PAIRS else None
    with b.loop((tokens + (amx.ROWS - 1)) // amx.ROWS) as block:
        first_row = b.let(block * amx.ROWS)
        here = b.let(tirx.Min(tokens - first_row, b.index(amx.ROWS)))
        first_x = b.let(block * (-(-k // INPUTS) * PARTS * TILE))
        rows = dict.fromkeys((*_A, *_C), (here, amx.ROW_BYTES))
        with amx.configured(rows), b.loop(sizes["end"] - sizes["begin"]) as i:
            # The last unit may be short: it repeats the last tile and stores it once.
            first_tile, last = b.let((sizes["begin"] + i) * TILES), b.index(all_tiles - 1)
            tile = [first_tile, *(b.let(tirx.Min(first_tile + t, last)) for t in range(1, TILES))]
            start = [b.let(t * (pairs * isa.vector_bytes)) for t in tile]
            _Unit(isa, k, x, data, padded, start, first_x, ahead).run()
            for t, c in enumerate(_C):
                amx.store(c, b.view(sums.data, [b.MANY], "float32"), t * (amx.ROWS * isa.lanes))
            with b.loop(here) as m:
                for t in range(0, TILES, epilogue.tiles):
                    with b.when(first_tile + t < all_tiles):
                        finished = [sums[t + j, m] for j in range(epilogue.tiles)]
                        epilogue.emit(isa, handles, first_row + m, (first_tile + t) // epilogue.tiles, finished)
