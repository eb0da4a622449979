"""Checkpoints of floats of 8 and 4 bits and of tables (fp8, MXFP4, bitsandbytes), of HQQ and of torchao: their tensors
mean what their libraries make of them, and models of them are what these stand for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import lifted_logits, load_reference, random_ids, reference_logits
from safetensors.numpy import load_file
from stored_models import Array, Pair, artifact, f8, greedy, groups_of, rounded, save_tensors, slow, write_pair
from test_stored_compressed_tensors import Tensors
from tiny_models import make_tiny

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_lifted
from llmc.errors import FrontendError
from llmc.frontends.hf.lift import lift
from llmc.frontends.hf.stored import open_stored
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import StoredWeights


def normal(*shape: int) -> Array:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def source_of(tensors: Mapping[str, Array], **settings: object) -> WeightSource:
    return open_stored(Settings(settings, "config.json"), Tensors(tensors))[0]


# fp8


def in_blocks(w: Array, rows: int, columns: int) -> tuple[dict[str, Array], Array]:
    """weight, weight_scale_inv and values, a scale a block."""
    grid = (-(-w.shape[0] // rows), -(-w.shape[1] // columns))
    scales = np.random.default_rng(list(grid)).random(grid).astype(np.float32) / 100 + 0.01
    wide = np.repeat(np.repeat(scales, rows, 0), columns, 1)[: w.shape[0], : w.shape[1]]
    small = f8(w / wide)
    return {"weight": small, "weight_scale_inv": scales}, small.astype(np.float32) * wide


@pytest.mark.parametrize(("shape", "block"), [((64, 128), (32, 64)), ((33, 129), (16, 128)), ((7, 31), (128, 128))])
def test_blocks_of_fp8_are_multiplied_by_their_scale(shape: tuple[int, int], block: tuple[int, int]) -> None:
    tensors, values = in_blocks(normal(*shape), *block)
    source = source_of({f"m.{k}": v for k, v in tensors.items()}, quant_method="fp8", weight_block_size=list(block))
    np.testing.assert_array_equal(source.load("m.weight"), values)
    if all(size % part == 0 for size, part in zip(shape, block, strict=True)):
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        raw = torch.from_numpy(tensors["weight"].view(np.uint8)).view(torch.float8_e4m3fn)
        scales = torch.from_numpy(tensors["weight_scale_inv"])
        want = Fp8Dequantize(None)._dequantize_one(raw, scales, torch.float32)
        np.testing.assert_array_equal(values, want.numpy())


def test_scales_of_fp8_of_other_shapes() -> None:
    w = f8(normal(3, 8, 16))
    for shape in ((1,), (), (3,), (3, 1), (3, 1, 1), (3, 8, 1), (3, 2, 4)):
        scales = np.random.default_rng(0).random(shape).astype(np.float32) + 1
        blocks = {"weight_block_size": [4, 4]} if shape == (3, 2, 4) else {}
        source = source_of({"m.w": w, "m.w_scale_inv": np.asarray(scales)}, quant_method="fp8", **blocks)
        whole = scales.reshape(*shape, *(1,) * (3 - len(shape))) if len(shape) > 1 or shape == (3,) else scales
        if shape == (3, 2, 4):
            whole = np.repeat(np.repeat(scales, 4, 1), 4, 2)
        np.testing.assert_array_equal(source.load("m.w"), w.astype(np.float32) * whole)


def write_fp8(name: str, w: Array) -> tuple[dict[str, Array], Array]:
    return in_blocks(w, 32, 48)


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 48], "activation_scheme": "dynamic"}


@pytest.mark.parametrize("family", ["llama", slow("qwen3_moe"), slow("deepseek_v3")])
def test_a_model_in_blocks_of_fp8(family: str, tmp_path: Path) -> None:
    """Experts too, which are stored one by one and merged when they are loaded."""
    pair = write_pair(family, tmp_path, write_fp8, FP8)
    lifted, ids = lift(pair.directory), random_ids(300, 33)
    want = reference_logits(load_reference(pair.reference), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=2e-4)
    assert any("are floats of 8 bits: -q rounds what they stand for" in note for note in lifted.notes)


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        ({}, {"weight_block_size": [128]}, "weight_block_size is .*two positive whole numbers"),
        ({}, {"weight_block_size": [0, 128]}, "weight_block_size is .*two positive whole numbers"),
        ({"m.weight_scale_inv": np.ones((3, 1), np.float32)}, {}, r"its weight_scale_inv of \[3, 1\] does not fit"),
        ({"m.weight": np.ones((64, 64), np.int8)}, {}, "its weight is i8"),
        ({"m.weight": None}, {}, "says fp8, but no weight of the checkpoint has a scale"),
    ],
)
def test_fp8_that_is_not_read_is_refused(
    change: dict[str, Array | None], settings: dict[str, object], why: str
) -> None:
    tensors = {"m.weight": f8(normal(64, 64)), "m.weight_scale_inv": np.ones((2, 2), np.float32), **change}
    given = {"quant_method": "fp8", "weight_block_size": [32, 32], **settings}
    with pytest.raises(FrontendError, match=why):
        source_of({k: v for k, v in tensors.items() if v is not None}, **given)


@pytest.mark.parametrize("shape", [(7,), (7, 1), (1, 33), (1,), (), (7, 33)])
def test_scales_of_rows_or_columns(shape: tuple[int, ...]) -> None:
    w, scales = f8(normal(7, 33)), np.random.default_rng(0).random(shape, np.float32) + 1
    source = source_of({"m.weight": w, "m.weight_scale": np.asarray(scales)}, quant_method="fbgemm_fp8")
    whole = scales[:, None] if shape == (7,) else scales
    np.testing.assert_array_equal(source.load("m.weight"), w.astype(np.float32) * whole)


@pytest.mark.parametrize(
    ("weight", "scale"), [((3, 8, 16), (2, 1, 1)), ((3, 8, 16), (2, 8, 16)), ((8, 16), (2, 1, 1)), ((8, 16), (4, 4, 2))]
)
def test_scales_of_other_experts_are_refused(weight: tuple[int, ...], scale: tuple[int, ...]) -> None:
    tensors = {"m.weight": f8(normal(*weight)), "m.weight_scale_inv": np.ones(scale, np.float32)}
    with pytest.raises(FrontendError, match=r"its weight_scale_inv of .* does not fit its weight of"):
        source_of(tensors, quant_method="fp8", weight_block_size=[4, 4])


def test_sizes_of_blocks_have_limits() -> None:
    tensors = {"m.weight": f8(normal(4, 4)), "m.weight_scale_inv": np.full((1, 1), 2, np.float32)}
    most = (1 << 24) - 1
    source = source_of(tensors, quant_method="fp8", weight_block_size=[most, 1])
    np.testing.assert_array_equal(source.load("m.weight"), tensors["m.weight"].astype(np.float32) * 2)
    for sizes in ([most + 1, 1], [1, most + 1], [True, 1], [1.0, 1], [1, -1], "1x1"):
        with pytest.raises(FrontendError, match="expected two positive whole numbers"):
            source_of(tensors, quant_method="fp8", weight_block_size=sizes)


# MXFP4


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 10, 2, 16)).astype(np.uint8)
    scales = rng.integers(100, 140, (3, 10, 2)).astype(np.uint8)
    source = source_of({"m.w_blocks": blocks, "m.w_scales": scales}, quant_method="mxfp4")
    want = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    found = source.load("m.w")
    assert source.shape("m.w") == found.shape == (3, 64, 10) and source.dtype("m.w") == "bf16"
    np.testing.assert_array_equal(found.astype(np.float32), want.numpy())


@pytest.mark.slow
def test_a_model_with_experts_in_mxfp4(tmp_path: Path) -> None:
    plain = make_tiny("gpt_oss", tmp_path / "plain", intermediate_size=64)
    rng, stored, floats = np.random.default_rng(0), {}, {}
    for name, array in load_file(plain / "model.safetensors").items():
        stored[name] = floats[name] = array
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = array.shape
            del stored[name]
            stored[f"{name}_blocks"] = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
            stored[f"{name}_scales"] = np.full((experts, outputs, inputs // 32), 124, np.uint8)
            source = source_of({k: v for k, v in stored.items() if name in k}, quant_method="mxfp4")
            floats[name] = source.load(name).astype(np.float32)
    for folder, tensors in (("stored", stored), ("floats", floats)):
        (tmp_path / folder).mkdir()
        save_tensors(tensors, tmp_path / folder / "model.safetensors")
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / folder / file).write_bytes((plain / file).read_bytes())
    path = tmp_path / "stored" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(config))
    lifted, ids = lift(tmp_path / "stored"), random_ids(300, 9)
    want = reference_logits(load_reference(tmp_path / "floats"), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=1e-4)
    assert any("4 weights of the checkpoint are in MXFP4" in note for note in lifted.notes)


def test_mxfp4_that_is_damaged_is_refused() -> None:
    blocks, scales = np.zeros((1, 2, 1, 16), np.uint8), np.full((1, 2, 1), 255, np.uint8)
    source = source_of({"m.w_blocks": blocks, "m.w_scales": scales}, quant_method="mxfp4")
    with pytest.raises(FrontendError, match="an exponent of 255, which stands for no number"):
        source.load("m.w")
    with pytest.raises(FrontendError, match=r"its w_scales is u8 \[2, 1\], expected u8 \[1, 2, 1\]"):
        source_of({"m.w_blocks": blocks, "m.w_scales": scales[0]}, quant_method="mxfp4")


# bitsandbytes

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)


def halves(w: Array, kind: str, nested: bool, block: int = 64) -> tuple[dict[str, Array], Array]:
    """The tensors of a weight as bitsandbytes stores it, and its values, in blocks of the flat weight."""
    flat, table = w.reshape(-1), NF4 if kind == "nf4" else FP4
    blocks = -(-flat.size // block)
    padded = np.zeros(blocks * block, np.float32)
    padded[: flat.size] = flat
    scales = np.maximum(np.abs(padded.reshape(blocks, block)).max(axis=1), 1e-3).astype(np.float32)
    state: dict[str, object] = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(w.shape)}
    found: dict[str, Array] = {"weight.quant_map": table}
    if nested:
        rng = np.random.default_rng(blocks)
        code = np.sort(rng.standard_normal(256)).astype(np.float32)
        small = rng.integers(0, 256, blocks).astype(np.uint8)
        most = rng.random(-(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(scales.mean())}
        scales = code[small] * np.repeat(most, 256)[:blocks] + np.float32(scales.mean())
        found |= {"weight.absmax": small, "weight.nested_absmax": most, "weight.nested_quant_map": code}
    else:
        found["weight.absmax"] = scales
    relative = padded.reshape(blocks, block) / scales[:, None]
    q = np.abs(relative[..., None] - table).argmin(axis=-1).reshape(-1)[: flat.size + flat.size % 2].astype(np.uint8)
    found["weight"] = ((q[0::2] << 4) | q[1::2])[:, None]
    text = json.dumps(state).encode()
    found[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    values = table[q[: flat.size]] * np.repeat(scales, block)[: flat.size]
    return found, values.reshape(w.shape)


# CRC-32 of what bitsandbytes 0.50.2 dequantizes on a CPU, f32, for `halves(normal(*shape), kind, nested)` of these.
BITSANDBYTES: dict[tuple[str, bool, tuple[int, int]], int] = {
    ("nf4", False, (16, 32)): 3339494523,
    ("nf4", False, (33, 128)): 1560822745,
    ("nf4", False, (7, 31)): 2369869017,
    ("nf4", False, (128, 300)): 4135199376,
    ("nf4", True, (16, 32)): 468920487,
    ("nf4", True, (33, 128)): 1100492944,
    ("nf4", True, (7, 31)): 3045169908,
    ("nf4", True, (128, 300)): 362283253,
    ("fp4", False, (16, 32)): 3758085285,
    ("fp4", False, (33, 128)): 3338416594,
    ("fp4", False, (7, 31)): 1747602654,
    ("fp4", False, (128, 300)): 682849943,
    ("fp4", True, (16, 32)): 629285396,
    ("fp4", True, (33, 128)): 2428706677,
    ("fp4", True, (7, 31)): 3047405967,
    ("fp4", True, (128, 300)): 2773214804,
}


@pytest.mark.parametrize(("kind", "nested", "shape"), BITSANDBYTES)
def test_tables_of_bitsandbytes_are_bit_for_bit_the_references(kind: str, nested: bool, shape: tuple[int, int]) -> None:
    tensors, values = halves(normal(*shape), kind, nested)
    found = source_of({f"m.{k}": v for k, v in tensors.items()}, quant_method="bitsandbytes").load("m.weight")
    np.testing.assert_array_equal(found, values)
    assert zlib.crc32(np.ascontiguousarray(found).tobytes()) == BITSANDBYTES[kind, nested, shape]


def write_bytes(name: str, w: Array) -> tuple[dict[str, Array], Array]:
    scb = np.abs(w).max(axis=1).astype(np.float32)
    q = np.round(w / scb[:, None] * 127).astype(np.int8)
    values = q.astype(np.float32) * (scb / np.float32(127))[:, None]
    return {"weight": q, "SCB": scb, "weight_format": np.zeros((), np.uint8)}, values


@pytest.mark.parametrize(
    ("family", "kind"),
    [slow("llama", "nf4"), ("gpt2", "int8"), slow("gpt2", "nf4"), slow("qwen2", "fp4")],
)
def test_a_model_of_bitsandbytes(family: str, kind: str, tmp_path: Path) -> None:
    """GPT-2 has its weights the other way round, and bitsandbytes turns them."""

    def write(name: str, w: Array) -> tuple[dict[str, Array], Array]:
        if kind == "int8":
            return write_bytes(name, w)
        return halves(w, kind, family == "llama")

    pair = write_pair(family, tmp_path, write, {"quant_method": "bitsandbytes"}, turned=family == "gpt2")
    lifted, ids = lift(pair.directory), random_ids(300, 33)
    want = reference_logits(load_reference(pair.reference), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=1e-4)
    kept = next(r for r in run_lifted(lifted, CompileOptions()).reports if r.name == "keep-integers")
    assert sum(kept.hits.values()) == (8 if kind == "int8" else 0)
    assert any("bitsandbytes" in note for note in lifted.notes)


@pytest.mark.slow
def test_an_artifact_of_bytes(tmp_path: Path) -> None:
    """Scales are f32 in the file and f16 in the artifact: weights are off by 2^-12 at most."""
    pair = write_pair("llama", tmp_path, write_bytes, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    runtime, reference = artifact(pair.directory, tmp_path / "m.so"), load_reference(pair.reference)
    ids = random_ids(300, 45)
    np.testing.assert_allclose(runtime.forward(ids[0]), reference_logits(reference, ids)[0], rtol=0, atol=1e-2)
    text = "for index in range(10):"
    assert runtime.generate(text, max_tokens=20, temperature=0) == greedy(reference, pair.directory, text, 20)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weight.absmax": np.ones(3, np.float32)}, r"its weight.absmax is f32 \[3\], expected f32 \[8\]"),
        ({"weight.quant_map": np.ones(15, np.float32)}, r"its weight.quant_map is f32 \[15\]"),
        ({"weight": np.ones((9, 1), np.uint8)}, r"its weight is not u8 \[256, 1\]"),
        ({"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)}, "is no JSON"),
        ({"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"[]", np.uint8)}, "is no JSON object"),
        ({"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape": [-1]}', np.uint8)}, "shape is"),
        ({"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape": [8]}', np.uint8)}, "blocksize is None"),
        ({"weight.quant_state.bitsandbytes__nf4": None}, "holds no weight that it has rounded"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, Array | None], why: str) -> None:
    tensors = {**halves(normal(16, 32), "nf4", False)[0], **change}
    with pytest.raises(FrontendError, match=why):
        source_of({f"m.{k}": v for k, v in tensors.items() if v is not None}, quant_method="bitsandbytes")


def test_bytes_of_bitsandbytes_are_parts_of_127() -> None:
    tensors, values = write_bytes("", normal(7, 33))
    found = source_of({f"m.{k}": v for k, v in tensors.items()}, quant_method="bitsandbytes").load("m.weight")
    np.testing.assert_array_equal(found, values)
    exact = tensors["weight"] * tensors["SCB"].astype(np.float64)[:, None] / 127
    np.testing.assert_allclose(found, exact, rtol=3e-7, atol=0)  # two roundings of f32


STATE = "weight.quant_state.bitsandbytes__nf4"


def state_with(**changes: object) -> dict[str, Array]:
    """JSON of 257 numbers in blocks of one. None: left out."""
    values = {"shape": [257], "blocksize": 1, **changes}
    text = json.dumps({name: value for name, value in values.items() if value is not None})
    return {STATE: np.frombuffer(text.encode(), np.uint8)}


def nested_blocks() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "weight": rng.integers(0, 256, (129, 1)).astype(np.uint8), "weight.quant_map": NF4,
        "weight.absmax": rng.integers(0, 256, 257).astype(np.uint8),
        "weight.nested_absmax": np.array([2, 3], np.float32),
        "weight.nested_quant_map": np.arange(256, dtype=np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("offset", [None, 0.5, 2])
def test_scales_of_scales_of_bitsandbytes(offset: float | None) -> None:
    """256 share one and nothing is added, unless the JSON says so."""
    tensors = {**nested_blocks(), **state_with(nested_offset=offset)}
    found = source_of({f"m.{k}": v for k, v in tensors.items()}, quant_method="bitsandbytes").load("m.weight")
    halved = np.stack([tensors["weight"] >> 4, tensors["weight"] & 15], -1).reshape(-1)[:257]
    wide = np.where(np.arange(257) < 256, 2, 3).astype(np.float32)
    np.testing.assert_array_equal(found, NF4[halved] * (tensors["weight.absmax"] * wide + np.float32(offset or 0)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (state_with(nested_offset=True), "nested_offset is True, expected a number"),
        (state_with(nested_offset="1"), "nested_offset is '1', expected a number"),
        (state_with(nested_offset=float("inf")), "nested_offset is inf, expected a number"),
        (state_with(nested_blocksize=0), "nested_blocksize is 0, expected a whole number, 1 to 16777216"),
        (state_with(nested_blocksize=257), r"its weight.nested_absmax is f32 \[2\], expected f32 \[1\]"),
        (state_with(blocksize=(1 << 24) + 1), "blocksize is 16777217, expected a whole number, 1 to 16777216"),
        ({STATE: np.zeros(70_000, np.uint8)}, "has 70000 bytes"),
    ],
)
def test_states_of_bitsandbytes_that_are_not_read_are_refused(change: dict[str, Array], why: str) -> None:
    tensors = {**nested_blocks(), **state_with(), **change}
    with pytest.raises(FrontendError, match=why):
        source_of({f"m.{k}": v for k, v in tensors.items()}, quant_method="bitsandbytes")


# HQQ


def hqq(w: Array, bits: int, group: int, axis: int = 1) -> tuple[dict[str, Array], Array]:
    grid = (w.size // group, group) if axis else (group, w.size // group)
    flat = w.reshape(grid)
    low, high = flat.min(axis=axis, keepdims=True), flat.max(axis=axis, keepdims=True)
    scale = np.maximum((high - low) / ((1 << bits) - 1), 1e-4).astype(np.float16)
    zero = (-low / scale.astype(np.float32)).astype(np.float16)
    q = np.clip(np.round(flat / scale.astype(np.float32) + zero), 0, (1 << bits) - 1).astype(np.uint8)
    each = 8 // bits
    parts = np.split(q, each)
    packed = np.zeros_like(parts[0])
    for index, part in enumerate(parts):
        packed |= part << np.uint8(8 - bits * (index + 1))
    values = ((q - zero.astype(np.float32)) * scale.astype(np.float32)).reshape(w.shape)
    settings = {"nbits": bits, "group_size": group, "axis": axis, "shape": list(w.shape), "view_as_float": 0}
    text = np.frombuffer(f"{bits}bit_u8".encode(), np.uint8)
    tensors = {name: np.asarray(value, np.int32) for name, value in settings.items()}
    return {"W_q": packed, "scale": scale, "zero": zero, "packing": text, **tensors}, values


# CRC-32 of `Quantizer.dequantize` of hqq 0.2.8, computed in f32, for `hqq(normal(32, 64), ...)` of these.
HQQ: dict[tuple[int, int, int], int] = {
    (2, 16, 0): 1657624293,
    (2, 16, 1): 1423566946,
    (2, 32, 0): 288200347,
    (2, 32, 1): 1357077079,
    (2, 64, 1): 3919955939,
    (4, 16, 0): 2179929539,
    (4, 16, 1): 3304419309,
    (4, 32, 0): 3638734446,
    (4, 32, 1): 725568765,
    (4, 64, 1): 1911660306,
    (8, 16, 0): 3526815631,
    (8, 16, 1): 3894638945,
    (8, 32, 0): 2869726914,
    (8, 32, 1): 3353766845,
    (8, 64, 1): 1943464702,
}


@pytest.mark.parametrize(("bits", "group", "axis"), HQQ)
def test_weights_of_hqq_are_bit_for_bit_the_references(bits: int, group: int, axis: int) -> None:
    tensors, values = hqq(normal(32, 64), bits, group, axis)
    found = source_of({f"m.{k}": v for k, v in tensors.items()}, quant_method="hqq").load("m.weight")
    np.testing.assert_array_equal(found, values)
    assert zlib.crc32(np.ascontiguousarray(found).tobytes()) == HQQ[bits, group, axis]


@pytest.mark.parametrize("axis", [slow(0), 1])
def test_a_model_of_hqq(axis: int, tmp_path: Path) -> None:
    pair = write_pair("llama", tmp_path, lambda name, w: hqq(w, 4, 32, axis), {"quant_method": "hqq"})
    lifted, ids = lift(pair.directory), random_ids(300, 33)
    want = reference_logits(load_reference(pair.reference), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=1e-4)
    kept = next(r for r in run_lifted(lifted, CompileOptions()).reports if r.name == "keep-integers")
    assert dict(kept.hits) == ({"kept as q4g32z": 14} if axis else {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"nbits": np.array(3)}, "it has 3 bits along axis 1: 2, 4 and 8 bits"),
        ({"nbits": np.array(1.0)}, "its setting nbits is no tensor of one whole number"),
        ({"group_size": np.array(48)}, "are no whole groups of 48"),
        ({"shape": np.array([1, 2, 3])}, "its setting shape is no tensor of two numbers"),
        ({"shape": np.array([-4, 4])}, "no whole groups"),
        ({"shape": np.array([0, 64])}, r"\[0, 64\] of 4 bits are no whole groups of 32"),
        ({"shape": np.array([3, 32])}, r"\[3, 32\] of 4 bits are no whole groups of 32"),
        ({"shape": np.array([2, 31]), "group_size": np.array(31)}, "of 4 bits are no whole groups of 31"),
        ({"group_size": np.array(0)}, "no whole groups of 0"),
        ({"nbits": None}, "its setting nbits is no tensor of one whole number"),
        ({"group_size": np.array([32, 32])}, "its setting group_size is no tensor of one whole number"),
        ({"scale": np.ones((3, 1), np.float16)}, r"its scale is f16 \[3, 1\]"),
        ({"scale_q": np.ones(3)}, "its scales are quantized themselves"),
        ({"view_as_float": np.array(1)}, "stored as floats"),
        ({"W_q": None}, "has no layer with a W_q"),
    ],
)
def test_hqq_that_is_not_read_is_refused(change: dict[str, Array | None], why: str) -> None:
    tensors = {**hqq(normal(32, 64), 4, 32)[0], **change}
    with pytest.raises(FrontendError, match=why):
        source_of({f"m.{k}": v for k, v in tensors.items() if v is not None}, quant_method="hqq")


@pytest.mark.parametrize(
    ("shape", "bits", "group", "axis"),
    [((1, 64), 4, 32, 1), ((4, 33), 8, 33, 1), ((2, 7), 8, 1, 1), ((32, 64), 2, 32, 0)],
)
def test_what_a_layer_of_hqq_may_leave_out(shape: tuple[int, int], bits: int, group: int, axis: int) -> None:
    """Its axis, which is 1 then, and whether integers are stored as floats, which they are not."""
    tensors, values = hqq(normal(*shape), bits, group, axis)
    del tensors["view_as_float"]
    if axis == 1:
        del tensors["axis"]
    file = Tensors({f"m.{k}": v for k, v in tensors.items()})
    source, notes = open_stored(Settings({"quant_method": "hqq"}, "config.json"), file)
    np.testing.assert_array_equal(source.load("m.weight"), values)
    assert isinstance(source, StoredWeights)
    stored = source.integers("m.weight")
    assert (stored is None) == (axis == 0) == any("have groups across rows (HQQ's axis 0)" in note for note in notes)
    assert stored is None or stored.block == (0 if shape[1] == group else group)


# torchao


def torchao_pair(folder: Path, kind: str, family: str = "llama") -> Pair:
    """A model as torchao writes it: tensors named after the weight, and the kind in the file's metadata."""
    metadata: dict[str, str] = {}

    def write(name: str, w: Array) -> tuple[dict[str, Array], Array]:
        metadata[f"{name}.weight"] = json.dumps({"_type": kind, "_data": {"block_size": [1, w.shape[1]]}})
        if kind == "Float8Tensor":
            scale = (np.abs(w).max(axis=1, keepdims=True) / 448).astype(np.float32)
            q = f8(w / scale)
            return {"_weight_qdata": q, "_weight_scale": scale}, q.astype(np.float32) * scale
        size = 32 if kind.startswith("Intx") else w.shape[1]
        q, scale, zero = rounded(w, 4 if size == 32 else 8, groups_of(w.shape[1], size), True)
        found = {"_weight_qdata": (q - zero[0, 0]).astype(np.int8), "_weight_scale": scale}
        if size == 32:
            found["_weight_zero_point"] = np.zeros(scale.shape, np.int8)
        return found, (q - zero[0, 0]) * np.repeat(scale.astype(np.float32), size, axis=1)

    pair = write_pair(family, folder, write, {"quant_method": "torchao", "quant_type": {}})
    path = pair.directory / "model.safetensors"
    from llmc.frontends.hf.weights import SafetensorsFile

    file = SafetensorsFile(path)
    tensors = {name: file.load(name).copy() for name in file.names}
    save_tensors(tensors, path, metadata)
    return pair


@pytest.mark.parametrize(
    ("kind", "kept"), [slow("Int8Tensor", "q8g64"), ("IntxUnpackedToInt8Tensor", "q4g32"), slow("Float8Tensor", "")]
)
def test_a_model_of_torchao(kind: str, kept: str, tmp_path: Path) -> None:
    pair = torchao_pair(tmp_path, kind)
    lifted, ids = lift(pair.directory), random_ids(300, 33)
    want = reference_logits(load_reference(pair.reference), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=1e-4)
    report = next(r for r in run_lifted(lifted, CompileOptions()).reports if r.name == "keep-integers")
    assert dict(report.hits) == ({f"kept as {kept}": 14} if kept else {})


def test_kinds_of_torchao_that_are_not_read_are_refused(tmp_path: Path) -> None:
    pair = torchao_pair(tmp_path / "a", "Int4TilePackedTo4dTensor")
    with pytest.raises(FrontendError, match="say that it is 'Int4TilePackedTo4dTensor', of torchao's kinds"):
        lift(pair.directory)
    with pytest.raises(FrontendError, match="torch's own files of quantized tensors are not read"):
        source_of({"m.weight": normal(3, 3)}, quant_method="torchao")


class WithMetadata(Tensors):
    metadata: Mapping[str, str]


def torchao_source(q: Array, described: str, **parts: Array) -> WeightSource:
    file = WithMetadata({"m._weight_qdata": q, **{f"m._weight_{name}": array for name, array in parts.items()}})
    file.metadata = {"m.weight": described}
    return open_stored(Settings({"quant_method": "torchao"}, "config.json"), file)[0]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (7, 1), (1, 3), (7, 3)])
@pytest.mark.parametrize("zeros", [False, True])
def test_integers_of_torchao(shape: tuple[int, ...], zeros: bool) -> None:
    rng = np.random.default_rng(list(shape))
    q, scale = rng.integers(-128, 128, (7, 33)).astype(np.int8), np.asarray(rng.random(shape, np.float32))
    points = {"zero_point": np.asarray(rng.integers(-9, 9, shape), np.int8)} if zeros else {}
    found = torchao_source(q, '{"_type": "Int8Tensor"}', scale=scale, **points).load("m.weight")
    wide = [each.reshape(-1, 1) if shape == (7,) else np.atleast_2d(each) for each in (scale, *points.values())]
    wide = [np.repeat(each, 33 // each.shape[1], axis=1) for each in wide]
    np.testing.assert_array_equal(found, (q.astype(np.float32) - sum(wide[1:])) * wide[0])


@pytest.mark.parametrize("shape", [(5,), (9,), (1, 1, 7), (7, 1, 1), (3, 1), (7, 2), (2, 2, 2)])
def test_scales_of_torchao_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FrontendError, match=r"its _weight_scale of .* does not fit its _weight_qdata of \[7, 33\]"):
        torchao_source(np.ones((7, 33), np.int8), '{"_type": "Int8Tensor"}', scale=np.ones(shape, np.float32))


@pytest.mark.parametrize("described", ["{", "[" * 100_000, "[]", '{"_type": 1}', "{}"])
def test_metadata_of_torchao_that_say_no_kind_are_refused(described: str) -> None:
    with pytest.raises(FrontendError, match="layer m: the file's metadata say that it is"):
        torchao_source(np.ones((7, 33), np.int8), described, scale=np.ones(1, np.float32))


# Others


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"quantization_config": {"quant_method": "quanto"}},
            r"\(quanto\), in a way that is not read: compile the",
        ),
        ({"quantization_config": {"bits": 4}}, r"\(quantization_config\), in a way that is not read"),
        ({"quantization_config": [1]}, r"\(quantization_config\), in a way that is not read"),
        ({"quantization_bit": 4}, r"\(quantization_bit, as ChatGLM's are\), in a way that is not read"),
        ({"model_type": "chatglm", "quantization_bit": 4, "auto_map": {}}, "quantization_bit, as ChatGLM"),
    ],
)
def test_other_methods_are_refused_by_name(settings: dict[str, object], why: str, tmp_path: Path) -> None:
    plain = make_tiny("llama", tmp_path)
    path = plain / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(FrontendError, match=why):
        lift(plain)
