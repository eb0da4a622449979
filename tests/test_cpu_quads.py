"""Quads of packed weights as bytes: every code is looked up, and every quad of a bundle is taken out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from kernel_harness import Compiled, aligned
from x86_machines import MACHINES, each_machine

from llmc.compiler.encodings.levels import table_levels
from llmc.targets.cpu.codegen import build_module
from llmc.targets.cpu.quads import quad_bytes
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for, weight_tiles
from llmc.targets.cpu.vectors import load, range_kernel, store
from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

SIZES = (4, 8, 16, 32, 64)
TILES = 3


def look_up(machine: Machine, *, table: tuple[int, ...], portable: bool) -> PrimFunc:
    """out = the table's bytes for codes, a vector a unit."""
    isa = isa_for(machine)

    def unit(a: SimpleNamespace, u: Expr) -> None:
        codes = load(a.codes, u * isa.vector_bytes, isa.vector_bytes)
        found = VectorIsa.look_up_bytes(isa, table, codes) if portable else isa.look_up_bytes(table, codes)
        store(a.out, u * isa.vector_bytes, found)

    return range_kernel([("codes", "uint8"), ("out", "uint8")], [], unit)


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "own"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("machine", each_machine())
def test_every_code_is_looked_up(machine: Machine, size: int, portable: bool) -> None:
    """Of a code only as many bits count as the table has places for, whatever the others are."""
    rng = np.random.default_rng(size)
    codes = aligned(rng.permutation(np.repeat(np.arange(256, dtype=np.uint8), 4)))
    steps = isa_for(machine).vector_bytes
    for table in (rng.permutation(256)[:size], np.full(size, 255), np.arange(size)[::-1]):
        out = aligned(np.zeros_like(codes))
        made = kernel(look_up, machine.key, table=tuple(int(byte) for byte in table), portable=portable)
        Compiled(made, machine)(codes, out, 0, len(codes) // steps)
        np.testing.assert_array_equal(out, table.astype(np.uint8)[codes % size])


@pytest.mark.parametrize("machine", each_machine()[:1])
def test_a_table_may_have_bytes_below_zero(machine: Machine) -> None:
    """Where weights are stored signed: as the portable code writes them."""
    table = table_levels(4).bytes
    codes = aligned(np.arange(256, dtype=np.uint8))
    out = aligned(np.zeros_like(codes))
    made = kernel(look_up, machine.key, table=table, portable=True)
    Compiled(made, machine)(codes, out, 0, len(codes) // isa_for(machine).vector_bytes)
    np.testing.assert_array_equal(out.view(np.int8), np.array(table, np.int8)[codes % 16])


@pytest.mark.parametrize(("size", "shuffles"), [(8, 1), (16, 1), (32, 2), (64, 4)])
@pytest.mark.parametrize("name", MACHINES)
def test_codes_are_looked_up_by_shuffles(name: str, size: int, shuffles: int) -> None:
    """By `vpermb` where there is one for all 64 places, which looks at no other bits: nothing masks them."""
    machine = MACHINES[name]
    made = kernel(look_up, machine.key, table=tuple(range(1, size + 1)), portable=False)
    code = build_module(made, machine).inspect_source("asm")
    if machine.has("avx512vbmi"):
        assert "vpermb" in code and "vpshufb" not in code and "vpand" not in code
    else:  # the loop over units is unrolled
        assert "vpshufb" in code and code.count("vpshufb") % shuffles == 0 and "vpermb" not in code


def unpacked(machine: Machine, *, bits: int, group: int, table: bool) -> PrimFunc:
    """out [tiles, quads, tile_rows * 4] = the bytes of a weight of one group, a tile a unit."""
    from tvm import tirx

    isa = isa_for(machine)
    layout = weight_tiles(machine).quantized(bits, group, symmetric=True, table=table)
    line, step = layout.tile_rows * 4, isa.vector_bytes

    def unit(a: SimpleNamespace, u: Expr) -> None:
        for quad in range(group // 4):
            first = quad // layout.bundle_quads * layout.bundle_vectors
            for start in range(0, line, step):

                def vector(number: int, first: int = first, start: int = start) -> Expr:
                    return load(a.data, (u * layout.vectors + first + number) * line + start, step)

                found = quad_bytes(isa, layout, vector, quad % layout.bundle_quads)
                store(a.out, (u * (group // 4) + quad) * line + start, tirx.reinterpret(isa.u8, found))

    return range_kernel([("data", "uint8"), ("out", "uint8")], [], unit)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize(("bits", "table"), [
    (2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (5, False), (5, True), (6, False), (6, True),
    (8, False),
])  # fmt: skip
@pytest.mark.parametrize("machine", each_machine())
def test_quads_are_the_bytes_that_are_multiplied(machine: Machine, bits: int, table: bool, group: int) -> None:
    layout = weight_tiles(machine).quantized(bits, group, symmetric=True, table=table)
    rows, half = TILES * layout.tile_rows, 1 << bits - 1
    q = np.random.default_rng(bits).integers(-half, half, (rows, group)).astype(np.int8)
    packed = layout.pack(q, np.ones((rows, 1), np.float16))["data"]
    out = aligned(np.zeros((TILES, group // 4, layout.tile_rows * 4), np.uint8))
    Compiled(kernel(unpacked, machine.key, bits=bits, group=group, table=table), machine)(
        aligned(packed), out, 0, TILES
    )
    stored = q.astype(np.int64) + (layout.offset if layout.table is None else half)
    expected = stored if layout.table is None else np.array(layout.table)[stored]
    lanes = expected.reshape(TILES, layout.tile_rows, group // 4, 4).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(out, lanes.reshape(out.shape).astype(np.uint8))
