"""What weights become for tiles of bf16, before they are rounded: on any computer, as vectors that LLVM cuts in two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cpu_linear_cases import wide
from kernel_harness import Compiled, aligned
from x86_machines import MACHINES

from llmc.compiler.encodings.levels import table_levels
from llmc.targets.cpu import builder as b
from llmc.targets.cpu.vector_isa import VectorIsa
from llmc.targets.cpu.vectors import splat, store
from llmc.targets.kernel import kernel
from llmc.targets.x86.isa import WEIGHT_TILES, X86Isa, isa_for
from llmc.targets.x86.tile_plan import section_of
from llmc.targets.x86.tile_weights import CHUNK, Quantized, chunks
from llmc.targets.x86.tiles import INPUTS

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

    from llmc.targets.machine import Machine


@dataclass(frozen=True)
class Plain(X86Isa):
    """16 lanes without an instruction of their own; pairs stay two vectors of f32."""

    def pack_pairs(self, even: Expr, odd: Expr) -> Any:
        return even, odd

    def look_up(self, table: Expr, places: Expr) -> Expr:
        from tvm import tirx

        found = splat(0.0, self.lanes)
        for number in range(16):
            entry = tirx.Broadcast(tirx.Shuffle([table], [tirx.const(number, "int32")]), self.lanes)
            found = tirx.Select((places & 15) == splat(number, self.lanes, "int32"), entry, found)
        return found

    look_up_bytes = VectorIsa.look_up_bytes  # type: ignore[assignment]


def unpacked(machine: Machine, *, bits: int, group: int, kind: str, k: int) -> PrimFunc:
    """out f32 [tiles, sections, chunks, CHUNK, 2, 16]: of a unit, one chunk."""
    own = isa_for(machine)
    isa = Plain(own.name, 16, 32, None, own.quantized_blocks, own.float_blocks, "x")
    source = Quantized(isa, layout_of(bits, group, kind), k)
    each = chunks(source)

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        out = b.view(handles["out"], [b.MANY, CHUNK, 2, 16], "float32")
        with b.loop(sizes["end"] - sizes["begin"]) as i:
            unit = b.let(sizes["begin"] + i)

            def put(row: int, pairs: Any, part: int = 0) -> None:
                for half in (0, 1):
                    store(out, (unit, row, half, 0), pairs[half])

            section = b.let(unit // each % source.sections)
            source.unpack(handles, b.let(unit // (each * source.sections)), section, b.let(unit % each), put)

    return b.plain_function([*source.pointers(), ("out", "float32")], [], body)


def layout_of(bits: int, group: int, kind: str) -> Any:
    return WEIGHT_TILES.quantized(bits, group, kind != "minimums", kind == "table", per_row=kind == "row")


@pytest.mark.parametrize(
    ("bits", "group", "kind"),
    [(4, 16, "table"), (4, 16, "minimums"), (6, 16, "even"), (8, 16, "even"), (4, 64, "even"), (8, 32, "row")],
)
def test_every_weight_lies_where_tiles_have_it(bits: int, group: int, kind: str) -> None:
    """To a rounding of f32 or two."""
    machine = MACHINES["avx2"]
    n, k, half = 33, 2 * max(group, INPUTS), 1 << bits - 1
    rng, layout = np.random.default_rng(bits * group), layout_of(bits, group, kind)
    q = rng.integers(0, 2 * half, (n, k)).astype(np.uint8) if kind == "minimums" else (
        rng.integers(-half, half, (n, k)).astype(np.int8))  # fmt: skip
    shared = k if kind == "row" else group
    parts = {"q": q, "scales": (rng.random((n, k // shared)) + 0.5).astype(np.float16)}
    levels = table_levels(bits).values[q.astype(int) + half].astype(np.float64) if kind == "table" else q
    want = levels * wide(parts["scales"], shared, k)
    if kind == "minimums":
        parts["minimums"] = -rng.random((n, k // group)).astype(np.float16)
        want = want + wide(parts["minimums"], group, k)
    arrays = [aligned(values) for values in layout.pack(**parts).values()]
    each, sections = max(group, INPUTS) // (2 * CHUNK), k // max(group, INPUTS)
    out = aligned(np.full((layout.tiles(n), sections, each, CHUNK, 2, 16), np.nan, np.float32))
    options = {"bits": bits, "group": group, "kind": kind, "k": k}
    Compiled(kernel(unpacked, machine.key, **options), machine)(*arrays, out, 0, layout.tiles(n) * sections * each)
    found = out.transpose(0, 5, 1, 2, 3, 4).reshape(-1, k)[:n]
    np.testing.assert_allclose(found, want, rtol=0, atol=2**-21 * np.abs(want).max())


def test_groups_of_16_fill_tiles_in_pairs() -> None:
    assert section_of(64, 16) == section_of(50, 16) == section_of(7, 32) == section_of(7, 0) == INPUTS
    assert section_of(80, 16) == section_of(80, 48) == 0  # five groups are no whole pairs
    assert section_of(129, 64) == 64
