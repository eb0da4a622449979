"""Weight layouts: unpack undoes pack, and row blocks packed alone are the bytes of the whole."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.encodings.levels import table_levels
from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout, WeightTiles

SIZES = [(1, 1), (7, 31), (33, 33), (129, 64), (64, 129), (31, 256)]


def quantized(layout: QuantizedLayout, n: int, k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n * 1000 + k)
    half = 1 << layout.bits - 1
    if layout.symmetric:
        q = rng.integers(-half + (layout.bits == 8), half, (n, k)).astype(np.int8)
    else:
        q = rng.integers(0, 2 * half, (n, k)).astype(np.uint8)
    parts = {"q": q, "scales": rng.random((n, layout.scale_groups(k))).astype(np.float16)}
    if not layout.symmetric:
        parts["minimums"] = -rng.random((n, layout.groups(k))).astype(np.float16)
    return parts


SHAPES = [(32, 8, False), (64, 16, False), (128, 16, True), (32, 8, True)]
LAYOUTS = [
    *(
        QuantizedLayout(bits, group, symmetric, tile_rows, offset, gated)
        for bits, symmetric, offset in [(4, True, 8), (4, False, 0), (8, True, 128), (8, True, 0), (8, False, -128)]
        for group, tile_rows, gated in SHAPES
    ),
    QuantizedLayout(8, 32, True, 8, 0, per_row=True),
    QuantizedLayout(4, 64, True, 16, 8, gated=True, per_row=True),
    *(QuantizedLayout(bits, 16, offset > 0, 8, offset) for bits, offset in [(2, 0), (4, 8), (6, 32), (8, 0)]),
    *(
        WeightTiles(tile_rows, signed).quantized(bits, group, symmetric=True, table=True, gated=gated)
        for bits in (4, 6)
        for signed in (False, True)
        for group, tile_rows, gated in SHAPES
    ),
]


def layout_name(layout: QuantizedLayout) -> str:
    kind = "table" if layout.levels is not None else "even" if layout.symmetric else "minimums"
    more = f"{'-gated' if layout.gated else ''}{'-signed' if layout.signed else ''}"
    more += "-row" * layout.per_row
    return f"{layout.bits}-{kind}-{layout.group}-{layout.tile_rows}{more}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_quantized_round_trip(layout: QuantizedLayout, n: int, k: int) -> None:
    n *= 1 + layout.gated
    parts = quantized(layout, n, k)
    packed = layout.pack(**parts)
    assert {name: (a.shape, a.dtype) for name, a in packed.items()} == layout.arrays(n, k)
    assert sum(a.nbytes for a in packed.values()) == layout.nbytes(n, k)
    found = layout.unpack(packed, n, k)
    assert found.keys() == parts.keys()
    for name, values in parts.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_row_blocks_pack_alone(layout: QuantizedLayout) -> None:
    rows, k = 3 * layout.row_multiple + 5, 96
    parts = quantized(layout, rows * (1 + layout.gated), k)
    whole = layout.pack(**parts)
    blocks = []
    for start in range(0, rows, layout.row_multiple):
        chosen = np.arange(start, min(start + layout.row_multiple, rows))
        if layout.gated:
            chosen = np.concatenate([chosen, rows + chosen])
        blocks.append(layout.pack(**{name: values[chosen] for name, values in parts.items()}))
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([block[name] for block in blocks]), values)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_float_round_trip_and_row_blocks(dtype: str, gated: bool, n: int, k: int) -> None:
    n *= 1 + gated
    layout = FloatLayout(dtype, 8, gated)
    kind = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    values = np.random.default_rng(0).standard_normal((n, k)).astype(kind)
    packed = layout.pack(values)
    assert {name: (a.shape, a.dtype) for name, a in packed.items()} == layout.arrays(n, k)
    np.testing.assert_array_equal(layout.unpack(packed, n, k)["values"], values)
    rows = np.split(np.arange(n), 2) if gated else [np.arange(n)]
    first = np.concatenate([half[:8] for half in rows])
    np.testing.assert_array_equal(layout.pack(values[first])["data"], packed["data"][: 1 + gated])


def test_a_nibble_lies_where_the_layout_says() -> None:
    """Row 3, input 13 of a group: quad 3, so the high nibbles of vector 1, byte 4 * 3 + 1."""
    q = np.zeros((8, 32), np.int8)
    q[3, 13] = 5
    data = QuantizedLayout(4, 32, True, 8, 8).pack(q, np.ones((8, 1), np.float16))["data"]
    assert data[0, 0, 1, 13] == (5 + 8) << 4 | 8
    assert (np.delete(data.ravel(), 32 + 13) == 0x88).all()


def test_six_bits_lie_where_the_layout_says() -> None:
    """Row 3, input 8 * 4 + 13 of a group: quad 3 of the second bundle. Its low four bits are the high halves of that
    bundle's second vector, its high two bits the highest of its third; byte 4 * 3 + 1 of each."""
    q = np.full((8, 64), -32, np.int8)
    q[3, 16 + 13] = 0b101011 - 32
    layout = WeightTiles(8).quantized(6, 64, symmetric=True, table=True)
    data = layout.pack(q, np.ones((8, 1), np.float16))["data"]
    assert data.shape == (1, 1, 12, 32) and (layout.bundle_quads, layout.bundle_vectors) == (4, 3)
    assert data[0, 0, 4, 13] == 0b1011 << 4 and data[0, 0, 5, 13] == 0b10 << 6
    data[0, 0, 4:6, 13] = 0
    assert not data.any()


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [4, 6])
def test_the_bytes_of_a_table_are_its_levels_but_for_an_offset(bits: int, signed: bool) -> None:
    levels = table_levels(bits)
    layout = WeightTiles(16, signed).quantized(bits, 64, symmetric=True, table=True)
    assert layout.table is not None and layout.unit == levels.unit
    values = (np.array(layout.table) - layout.byte_offset) * layout.unit
    assert (values == levels.values).all()
    assert layout.signed == signed and (layout.byte_offset == 0) == signed
    low, high = (-128, 127) if signed else (0, (1 << layout.byte_bits) - 1)
    assert min(layout.table) >= low and max(layout.table) <= high
    even = WeightTiles(16, signed).quantized(4, 64, symmetric=True)
    assert even.table is None and even.unit == 1 and (even.byte_offset, even.byte_bits) == (even.offset, even.bits)


def test_parts_that_do_not_fit_are_refused() -> None:
    q, scales = np.zeros((8, 64), np.int8), np.ones((8, 1), np.float16)
    with pytest.raises(ValueError, match=r"scales are \(8, 1\)"):
        QuantizedLayout(4, 32, True, 8, 8).pack(q, scales)
    with pytest.raises(ValueError, match="minimums"):
        QuantizedLayout(4, 64, False, 8, 0).pack(q, scales)
    with pytest.raises(ValueError, match="gate rows"):
        QuantizedLayout(4, 64, True, 8, 8, gated=True).pack(q[:7], scales[:7])
    with pytest.raises(ValueError, match="groups of 48"):
        QuantizedLayout(4, 48, True, 8, 8)
    with pytest.raises(ValueError, match="7-bit"):
        QuantizedLayout(7, 64, True, 8, 0)
    with pytest.raises(ValueError, match="f16"):
        FloatLayout("f16", 8).pack(np.zeros((8, 8), np.float32))
