"""Embedding on x86: every layout of a table gives exactly the rows that it stands for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_harness import Compiled, aligned, default_kernel
from x86_machines import machines_of

from llmc.compiler.encodings import GroupQuantized
from llmc.compiler.encodings.grouped import grouped
from llmc.compiler.encodings.levels import table_levels
from llmc.compiler.ir.types import parse_encoding
from llmc.targets.cpu.embedding import RowLayout, embedding
from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.vector_isa import weight_tiles
from llmc.targets.machine import Machine

MACHINES = machines_of("avx2", "avx512", "avx512vnni")
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
ROWS, SCALE = 37, 2.0  # a power of two scales without rounding: results are exact
IDS = aligned(np.array([36, 0, 15, 16, 7, 8, 36, 1], np.int32))


def quantized_table(
    encoding: GroupQuantized, features: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    symmetric, levels = encoding.symmetric, encoding.levels
    q = rng.integers(levels.lowest, levels.highest + 1, (ROWS, features)).astype(np.int8 if symmetric else np.uint8)
    shape = (ROWS, encoding.scales(features))
    scales = rng.random(shape).astype(np.float16)
    return q, scales, None if symmetric else rng.standard_normal(shape).astype(np.float16)


def row_layout(encoding: GroupQuantized) -> RowLayout:
    levels = table_levels(encoding.bits) if encoding.table else None
    return RowLayout(encoding.bits, encoding.group, encoding.symmetric, levels, encoding.in_steps, encoding.per_row)


def run(machine: Machine, layout: object, arrays: list[np.ndarray], features: int) -> np.ndarray:
    out = aligned(np.full((len(IDS), features), np.nan, np.float32))
    kernel = Compiled(default_kernel(*embedding(layout, features, SCALE), machine), machine)
    kernel(IDS, *(aligned(a) for a in arrays), out, 3, len(IDS))
    kernel(IDS, *(aligned(a) for a in arrays), out, 0, 3)
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("features", [33, 129])
@pytest.mark.parametrize("machine", MACHINES)
def test_rows_of_floats(machine: Machine, features: int, dtype: str) -> None:
    """Plain rows and the tiles of a matrix kernel hold the same numbers."""
    table = np.random.default_rng(0).standard_normal((ROWS, features)).astype(FLOATS[dtype])
    expected = table[IDS].astype(np.float32) * SCALE
    assert np.array_equal(run(machine, dtype, [table], features), expected)
    tiles = weight_tiles(machine).floats(dtype)
    assert np.array_equal(run(machine, tiles, list(tiles.pack(table).values()), features), expected)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        *((name, 101) for name in ("q4g32", "q4g32a", "q4g32z", "q8g32", "q8g32a", "q8g32z", "t4g32", "t4g64")),
        # Groups of 8 have fields shorter than any vector, groups of 40 fields that no vector divides.
        *(("t6g32", 101), ("t6g64", 129), ("t6g8", 31), ("t6g40", 7), ("t6g64", 1), ("t6g128", 256), ("t4g40", 7)),
        *(("q2g16a", 33), ("t4g16", 101), ("q6g16", 31), ("q8g16z", 7), ("q8g64r", 101), ("t6g32r", 33)),
    ],
)
@pytest.mark.parametrize("machine", MACHINES)
def test_rows_of_quantized_tables(machine: Machine, name: str, features: int) -> None:
    encoding = grouped(parse_encoding(name))
    group, symmetric = encoding.group, encoding.symmetric
    q, scales, minimums = quantized_table(encoding, features)
    spread = [
        None if a is None else np.repeat(a.astype(np.float32), encoding.scaled(features), axis=1)[:, :features]
        for a in (scales, minimums)
    ]
    levels = q.astype(np.float64)
    if encoding.table:
        levels = table_levels(encoding.bits).values.astype(np.float64)[q.astype(int) - encoding.levels.lowest]
    if encoding.in_steps:
        spread[1] = spread[1].astype(np.float64) * spread[0]
    expected = levels * spread[0] + (0 if spread[1] is None else spread[1])
    layouts: list[RowLayout | QuantizedLayout] = [row_layout(encoding)]
    if group % 32 == 0 or group == 16:  # as the tiles of a matrix kernel want it
        layouts.append(
            weight_tiles(machine).quantized(
                encoding.bits, group, symmetric, encoding.table, in_steps=encoding.in_steps, per_row=encoding.per_row
            )
        )
    for layout in layouts:
        got = run(machine, layout, list(layout.pack(q, scales, minimums).values()), features)
        # An integer or level of up to 8 bits times an f16 scale is exact in f32; adding the minimum rounds once.
        assert np.abs(got - expected[IDS] * SCALE).max() <= (0 if symmetric else 2**-24 * 1024)


@given(
    kind=st.sampled_from(["q4", "q4a", "t4", "t6", "q8", "q8a"]),
    group=st.sampled_from([8, 32, 40, 64]),
    features=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_packing_comes_back(kind: str, group: int, features: int, seed: int) -> None:
    encoding = grouped(parse_encoding(f"{kind[:2]}g{group}{kind[2:]}"))
    layout = row_layout(encoding)
    q, scales, minimums = quantized_table(encoding, features, seed)
    packed = layout.pack(q, scales, minimums)
    assert {name: (a.shape, a.dtype) for name, a in packed.items()} == layout.arrays(ROWS, features)
    assert sum(a.nbytes for a in packed.values()) == layout.nbytes(ROWS, features)
    parts = layout.unpack(packed, ROWS, features)
    assert parts["q"].dtype == q.dtype and np.array_equal(parts["q"], q)
    assert np.array_equal(parts["scales"], scales)
    # Rows packed on their own are the same bytes: tables are packed in blocks.
    block = layout.pack(q[5:9], scales[5:9], None if minimums is None else minimums[5:9])
    assert all(np.array_equal(block[name], array[5:9]) for name, array in packed.items())


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="gated"):
        embedding(FloatLayout("f32", 8, gated=True), 64)
    with pytest.raises(ValueError, match="f64"):
        embedding("f64", 64)
    with pytest.raises(ValueError, match="minimums"):
        RowLayout(4, 32).pack(np.zeros((2, 32), np.int8), np.zeros((2, 1), np.float16), np.zeros((2, 1), np.float16))
