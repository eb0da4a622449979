"""Every type of ggml becomes the numbers that its reference makes of it, bit for bit."""

from __future__ import annotations

import hashlib
import math

import ml_dtypes
import numpy as np
import pytest
from gguf_files import HALVES

from llmc.frontends.gguf import stored
from llmc.frontends.gguf.dequantize import dequantize
from llmc.frontends.gguf.grids import grid
from llmc.frontends.gguf.tensor_types import TENSOR_TYPES, TensorType

KINDS = {kind.name: (number, kind) for number, kind in TENSOR_TYPES.items()}
SHAPES = ((1, 1), (7, 3), (31, 2), (129, 1))  # rows, blocks of a row
# SHA-256 of the numbers for `blocks`, NaN as 0, as gguf-py 0.19's `gguf.quants.dequantize` makes them.
GOLDEN = {
    "Q4_0": "30082f00c7af5d03",
    "Q4_1": "980cf711770546fe",
    "Q5_0": "261021e9fd2d0fc3",
    "Q5_1": "8026a0a222e02723",
    "Q8_0": "45b34064dbedcffd",
    "Q2_K": "c70465775fd0ae28",
    "Q3_K": "181dba25a0da39c8",
    "Q4_K": "dc7cab893f9ea029",
    "Q5_K": "69c22e3bf02191ca",
    "Q6_K": "9443463d44d80f1d",
    "Q8_K": "d8b7cdc5646f4795",
    "IQ2_XXS": "899c135ddc87b769",
    "IQ2_XS": "aeae1113155e7814",
    "IQ3_XXS": "9cfe2a2c84cc00b9",
    "IQ1_S": "2356598ffbac2eee",
    "IQ4_NL": "d6f101d025dfece0",
    "IQ3_S": "f5f235c966f88ffb",
    "IQ2_S": "45d5b2958cbdb418",
    "IQ4_XS": "464e16d94e4ac5bc",
    "IQ1_M": "30bf3b6a0a87e6f4",
    "TQ1_0": "19caa16a1fca9d58",
    "TQ2_0": "7e2b457151b1822f",
    "MXFP4": "d96af7a610e214b4",
}


def blocks(kind: TensorType, rows: int, count: int) -> np.ndarray:
    return np.random.default_rng([rows, count, kind.size]).integers(0, 256, (rows, count * kind.size), dtype=np.uint8)


def digest(kind: TensorType) -> str:
    found = hashlib.sha256()
    for shape in SHAPES:
        values = np.nan_to_num(dequantize(kind, blocks(kind, *shape)).astype(np.float32), nan=0.0)
        found.update(values.tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("name", [name for name in KINDS if name in GOLDEN])
def test_the_reference_s_numbers(name: str) -> None:
    assert digest(KINDS[name][1]) == GOLDEN[name]


@pytest.mark.parametrize("name", [name for name, (_, kind) in KINDS.items() if kind.dtype in (None, "f32", "f16")])
def test_against_the_reference(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    number, kind = KINDS[name]
    if name == "Q8_K":
        pytest.skip("gguf-py does not dequantize it: files do not hold it")
    for shape in SHAPES:
        data = blocks(kind, *shape)
        ours = dequantize(kind, data).astype(np.float32)
        with np.errstate(all="ignore"):
            theirs = gguf.dequantize(data, gguf.GGMLQuantizationType(number)).astype(np.float32)
        same = ours.view(np.uint32) == theirs.view(np.uint32)
        assert np.all(same | (np.isnan(ours) & np.isnan(theirs)))


def test_plain_numbers() -> None:
    values = np.array([[1.5, -2.0, 0.0, 3.25]])
    for name, dtype in (("F64", np.float64), ("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        stored_as = values.astype(dtype)
        found = dequantize(KINDS[name][1], np.frombuffer(stored_as.tobytes(), np.uint8)[None])
        assert found.dtype == stored_as.dtype and found.astype(np.float64).tolist() == values.tolist()
        whole = np.frombuffer(stored_as.tobytes(), np.uint8)[None]
        assert np.shares_memory(dequantize(KINDS[name][1], whole), whole)
    for at in range(1, 4):  # at an odd address
        odd = np.frombuffer(bytes(at) + np.float32(7).tobytes(), np.uint8)[None, at:]
        found = dequantize(KINDS["F32"][1], odd)
        assert found.tolist() == [[7.0]] and found.flags.aligned


def test_exponents_of_mxfp4() -> None:
    """2^(e - 127) times E2M1 floats, of which the first is a half: down to numbers that f32 has as subnormal ones."""
    data = np.array([[exponent, *[0x21] * 16] for exponent in range(255)], np.uint8)
    found = dequantize(KINDS["MXFP4"][1], data)
    halves = np.array([math.ldexp(0.5, exponent - 127) for exponent in range(255)], np.float32)
    np.testing.assert_array_equal(found[:, 0], halves)
    np.testing.assert_array_equal(found[:, 16], 2 * halves)


def test_one_block_by_hand() -> None:
    """Q4_0: the low halves of bytes are the first 16 weights. Q8_K: one f32 scale."""
    scale = np.array([0.5], np.float16).view(np.uint8)
    found = dequantize(KINDS["Q4_0"][1], np.concatenate([scale, np.full(16, 0xF1, np.uint8)])[None])
    assert found.tolist() == [[-3.5] * 16 + [3.5] * 16]
    block = np.concatenate(
        [np.array([2.0], "<f4").view(np.uint8), np.arange(256).astype(np.uint8), np.zeros(32, np.uint8)]
    )
    expected = np.arange(256).astype(np.uint8).view(np.int8) * np.float32(2)
    assert dequantize(KINDS["Q8_K"][1], block[None]).tolist() == [expected.tolist()]


def test_rows_in_pieces_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["Q5_K"][1]
    data = blocks(kind, 33, 2)
    whole = dequantize(kind, data)
    for at_once in (1000, 1):
        monkeypatch.setattr("llmc.frontends.gguf.dequantize._AT_ONCE", at_once)
        np.testing.assert_array_equal(dequantize(kind, data).view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize(
    ("name", "shape", "levels"),
    [("IQ2_XXS", (256, 8), 3), ("IQ2_XS", (512, 8), 3), ("IQ2_S", (1024, 8), 3), ("IQ1_S", (2048, 8), 3),
     ("IQ3_XXS", (256, 4), 8), ("IQ3_S", (512, 4), 8)],
)  # fmt: skip
def test_grids(name: str, shape: tuple[int, int], levels: int) -> None:
    grid.cache_clear()
    points = grid(name)
    assert points.shape == shape and not points.flags.writeable  # all tensors of a model share it
    assert len(np.unique(points, axis=0)) == len(points) and len(np.unique(points)) == levels


@pytest.mark.parametrize("name", stored.KINDS)
def test_kept_integers_are_the_same_numbers(name: str) -> None:
    """As the encodings compute them, with scales and minimums in f16: exactly, but for K's products of scales."""
    kind, known = KINDS[name][1], stored.KINDS[name]
    data = blocks(kind, 65, 4).reshape(-1, kind.size)
    halves = HALVES.get(name, (0,) if known.zero is not None else (0, 2))
    rng = np.random.default_rng(0)
    for at in halves:
        data[:, at : at + 2] = (rng.standard_normal((len(data), 1)) * 0.01).astype(np.float16).view(np.uint8)
    data[::5, halves[0] : halves[0] + 2] = 0  # scales of 0: blocks of one value
    data = data.reshape(65, -1)
    q, scales = stored.integers(kind, data), stored.scales(kind, data)
    assert scales.shape == (65, data.shape[1] // kind.size * kind.block // known.group)
    steps = np.repeat(scales.astype(np.float16).astype(np.float32), known.group, axis=1)
    assert (
        q.dtype == (np.int8 if known.zero == 0 else np.uint8) and int(q.max()) - int(q.min()) == (1 << known.bits) - 1
    )
    assert scales.dtype == (np.float32 if name.endswith("_K") else np.float16)  # K's are products
    if known.zero is None:
        points = stored.zeros(kind, data)
        assert np.isfinite(points).all()
        lows = np.repeat(-scales.astype(np.float16).astype(np.float32) * points, known.group, axis=1).astype(np.float16)
        found = steps * q.astype(np.float32) + lows.astype(np.float32)
    else:
        found = steps * (q.astype(np.float32) - np.float32(known.zero))
    exact = dequantize(kind, data)
    if not name.endswith("_K"):
        np.testing.assert_array_equal(found, exact)
    error = np.sqrt(((found - exact) ** 2).sum() / (exact**2).sum())
    assert error < 5e-4  # half a unit of f16's last place; the type's own rounding is a hundred times that


def test_weights_that_are_not_kept_get_no_fewer_bits() -> None:
    least = {name: stored.least_scheme(name) for name in KINDS}
    bits = {"int4": 4.25, "int5": 5.25, "int6": 6.25, "int8": 8.25}
    for name, (_, kind) in KINDS.items():
        if kind.dtype is None and name not in stored.KINDS:
            assert bits[str(least[name])] >= min(kind.bits, 8.25)
        else:
            assert least[name] is None


@pytest.mark.parametrize("name", [name for name, (_, kind) in KINDS.items() if kind.dtype is None])
def test_no_coarser_scheme_has_as_many_bits(name: str) -> None:
    least, bits = int(str(stored.least_scheme(name, kept=False)).removeprefix("int")), KINDS[name][1].bits
    assert least >= min(bits, 8)
    assert all(bits > coarser for coarser in (4, 5, 6) if coarser < least)
    assert stored.least_scheme(name, kept=True) is None
