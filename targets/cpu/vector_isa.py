"""A vector instruction set, as the few operations that kernels are written over.

A `VectorIsa` knows how many 32-bit lanes a register has, how bytes are multiplied and how work is blocked for it. Its
methods return TIR expressions, so one template serves every instruction set; each architecture's folder has the
subclass that says what is its own. What is the same for all, such as loads and stores, is in `vectors`. A *quad* is
four consecutive bytes, and a vector of bytes holds one quad a lane.

Dot products of bytes take *stored weight* bytes and *signed activation* bytes in [-127, 127]. What a stored byte means
is the same for all instruction sets of an architecture: see `weight_tiles`.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu.vectors import CACHE_LINE, splat
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr

    from llmc.targets.cpu.group_sums import Sums
    from llmc.targets.cpu.layouts import WeightTiles


def bind(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`let t = value in body(t)`: names a value that an expression uses more than once."""
    from tvm import tirx

    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def llvm_call(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of one of LLVM's intrinsics that only computes."""
    from tvm.script import tirx as T

    return T.call_llvm_pure_intrin(dtype, name, *args)


@dataclass(frozen=True)
class Blocking:
    """Blocks of a linear kernel: `rows` rows by `slices` slices of tiles at once, `row_block` rows a unit of work."""

    rows: int
    slices: int
    row_block: int


class Bf16Dots(ABC):
    """An instruction that multiplies pairs of bf16 and sums them into f32."""

    @abstractmethod
    def dot(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        """acc + a.even*b.even + a.odd*b.odd on bf16 pairs held in i32 lanes. Needs `helper`."""

    @property
    @abstractmethod
    def helper(self) -> str:
        """LLVM code that a kernel with `dot` imports."""


@dataclass(frozen=True)
class VectorIsa(ABC):
    """One instruction set.

    lanes: 32-bit lanes of a register. registers: how many there are. bf16_dots: None where no instruction multiplies
    pairs of bf16. quantized_blocks, float_blocks: blocks of the prefill kernels of integers and of floats.
    register_class: what inline assembly calls a vector register. cache_line: bytes. few_slices: of a tile that has more
    than one, how many a few rows are multiplied by at once, where registers hold the sums twice. unrolled_quads: of a
    group of integers, by default. overlap: of `QuantizedBlocks`, by default.
    """

    name: str
    lanes: int
    registers: int
    bf16_dots: Bf16Dots | None
    quantized_blocks: Blocking
    float_blocks: Blocking
    register_class: str
    cache_line: int = CACHE_LINE
    few_slices: int = 2
    unrolled_quads: int = 8
    overlap: int = 1

    # Types

    @property
    def f32(self) -> str:
        return f"float32x{self.lanes}"

    @property
    def i32(self) -> str:
        return f"int32x{self.lanes}"

    @property
    def i16(self) -> str:
        return f"int16x{self.lanes * 2}"

    @property
    def i8(self) -> str:
        return f"int8x{self.lanes * 4}"

    @property
    def u8(self) -> str:
        return f"uint8x{self.lanes * 4}"

    @property
    def vector_bytes(self) -> int:
        return self.lanes * 4

    # Floating point

    def magnitude(self, value: Expr) -> Expr:
        """|value|, f32."""
        from tvm import tirx

        return tirx.reinterpret(self.f32, tirx.reinterpret(self.i32, value) & 0x7FFFFFFF)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """a * b + c, rounded once."""
        return llvm_call(self.f32, "llvm.fma", a, b, c)

    def f32_to_bf16(self, value: Expr) -> Expr:
        """f32 to bf16 as u16, to nearest even; NaN stays NaN. `value` must be a variable."""
        from tvm import tirx

        bits = tirx.reinterpret(f"uint32x{self.lanes}", value)
        even = (bits >> 16) & 1
        rounded = (bits + (even + 0x7FFF)) >> 16
        quiet = (bits >> 16) | 0x40
        # By its bits: TVM takes a comparison of a number with itself for settled.
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tirx.Select(is_nan, quiet, rounded).astype(f"uint16x{self.lanes}")

    def bf16_pair_to_f32(self, pairs: Expr, odd: bool) -> Expr:
        """The even or odd bf16 of each 32-bit lane (i32 expression), to f32."""
        from tvm import tirx

        bits = pairs & -65536 if odd else pairs << 16
        return tirx.reinterpret(self.f32, bits)

    # Bytes

    def splat_quad(self, quad: Expr) -> Expr:
        """Four bytes (an i32) repeated in every lane, as signed bytes."""
        from tvm import tirx

        return tirx.reinterpret(self.i8, tirx.Broadcast(quad, self.lanes))

    @property
    def spread_quads(self) -> int:
        """How many quads of activations are loaded at once, and then repeated out of that vector: 1, or as many as its
        lanes where instructions take a lane of a vector for all."""
        return 1

    def shift_bytes(self, packed: Expr, right: int) -> Expr:
        """The bits of each byte (u8) `right` places down, or up where that is negative; those that come in are zeros
        or bits of the next byte."""
        from tvm import tirx

        words = tirx.reinterpret(f"uint16x{self.lanes * 2}", packed)
        return tirx.reinterpret(self.u8, words >> right if right > 0 else words << -right)

    def look_up_bytes(self, table: Sequence[int], codes: Expr) -> Expr:
        """table[code] of each byte (u8), of a power of two up to 64 of bytes; of a code only as many bits as count.

        One comparison an entry: an instruction set that shuffles bytes has better.
        """
        from tvm import tirx

        places = codes & (len(table) - 1)
        found = splat(table[0] % 256, self.vector_bytes, "uint8")
        for number, byte in enumerate(table[1:], 1):
            here = places == splat(number, self.vector_bytes, "uint8")
            found = tirx.Select(here, splat(byte % 256, self.vector_bytes, "uint8"), found)
        return found

    def dot_centre(self, bits: int) -> int:
        """What `dot` takes from each byte of weights, where it does not multiply them as they are. bits: of such bytes,
        see `QuantizedLayout.byte_bits`."""
        return 0

    def pair_sums(self, group: int) -> bool:
        """Whether activations come with two sums a group of inputs: of the first two of every four, and of the others.

        `group_sums.PairSums` that hold a whole group in i16 start from these.
        """
        return False

    @abstractmethod
    def sums(self, bits: int, group: int) -> Sums:
        """How the products of one group of stored weights are summed."""

    def panel_sums(self, bits: int, group: int) -> Sums:
        """The same, where weights were unpacked for many rows."""
        return self.sums(bits, group)

    @abstractmethod
    def dot(self, acc: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        """acc (i32 lanes) + the dot of each lane's quad of stored weights with its quad of activations. Exact. Weights
        count from `dot_centre` on."""

    def in_place(self, sums: Expr) -> Expr:
        """`sums` (i16, i32 or f32), computed here and in this order. Needs `in_place_helper`.

        LLVM otherwise adds successive products to each other first, or does one row after the other, and spills.
        """
        from tvm import tirx

        dtype = str(sums.ty.dtype)
        return tirx.call_pure_extern(dtype, f"llmc_in_place_{dtype}", sums)

    @property
    def in_place_helper(self) -> str:
        """LLVM code that a kernel with `in_place` imports: uses of a sum that stay in place, and do nothing."""

        def of(dtype: str, vector: str) -> str:
            return f"""
            define {vector} @llmc_in_place_{dtype}({vector} %sums) alwaysinline {{
              %held = call {vector} asm sideeffect "", "={self.register_class},0"({vector} %sums)
              ret {vector} %held
            }}
            """

        kinds = ((self.i16, 2, "i16"), (self.i32, 1, "i32"), (self.f32, 1, "float"))
        return "".join(of(dtype, f"<{self.lanes * times} x {kind}>") for dtype, times, kind in kinds)


@functools.cache
def isa_for(machine: Machine) -> VectorIsa:
    """The widest instruction set that a machine has: its architecture's folder knows. ValueError where it has none."""
    found: VectorIsa = importlib.import_module(f"llmc.targets.{machine.arch}.isa").isa_for(machine)
    return found


@functools.cache
def weight_tiles(machine: Machine) -> WeightTiles:
    """How weights lie on all machines of an architecture: its folder knows."""
    found: WeightTiles = importlib.import_module(f"llmc.targets.{machine.arch}.isa").WEIGHT_TILES
    return found


def missing_vectors(machine: Machine) -> tuple[str, ...]:
    """What the machine lacks of the features that vector kernels are written for: a rule's `needs`."""
    missing: tuple[str, ...] = importlib.import_module(f"llmc.targets.{machine.arch}.isa").missing(machine)
    return missing
