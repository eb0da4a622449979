"""Checkpoints of compressed-tensors: their tensors mean what its library makes of them, models what these stand for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_models import lifted_logits, load_reference, random_ids, reference_logits
from stored_models import Array, artifact, f8, greedy, groups_of, packed_words, rounded, slow, values_of, write_pair

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_lifted
from llmc.errors import FrontendError
from llmc.frontends.hf.lift import lift
from llmc.frontends.hf.stored import compressed_tensors
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.weight_sources import ArrayWeights

BF16 = ml_dtypes.bfloat16


@dataclass(frozen=True)
class Case:
    """A way to store weights. group: inputs of a group, -1 a scale a row, 0 one scale; block: of floats."""

    bits: int = 4
    group: int = 32
    symmetric: bool = True
    ordered: bool = False
    form: str = "pack-quantized"
    kind: str = "int"
    block: tuple[int, int] | None = None
    dtype: object = BF16
    dynamic: bool = True
    raw_zeros: bool = False  # zero points that are not packed, as older versions had them

    def settings(self) -> dict[str, object]:
        strategy = "block" if self.block else "group" if self.group > 0 else "channel" if self.group < 0 else "tensor"
        weights = {
            "num_bits": self.bits, "type": self.kind, "symmetric": self.symmetric, "strategy": strategy,
            "group_size": self.group if self.group > 0 and not self.block else None, "block_structure": self.block,
            "actorder": "group" if self.ordered else None, "dynamic": False,
        }  # fmt: skip
        activations = {"num_bits": 8, "type": self.kind, "dynamic": self.dynamic, "strategy": "token"}
        group = {"targets": ["Linear"], "weights": weights, "format": self.form}
        if self.form != "pack-quantized":
            group["input_activations"] = activations
        return {
            "quant_method": "compressed-tensors", "format": self.form, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
        }  # fmt: skip

    def tensors(self, w: Array) -> tuple[dict[str, Array], Array]:
        """What stands for a weight [N, K], and its values."""
        return self._floats(w) if self.kind == "float" else self._integers(w)

    def _integers(self, w: Array) -> tuple[dict[str, Array], Array]:
        group_of = groups_of(w.shape[1], self.group or -1)
        if self.ordered:
            group_of = group_of[np.random.default_rng(w.shape[1]).permutation(len(group_of))]
        q, scales, zeros = rounded(w, self.bits, group_of, self.symmetric, self.dtype)
        if self.group == 0:
            scales[:] = scales.max()
        values, middle = values_of(q, scales, zeros, group_of), 1 << (self.bits - 1)
        found: dict[str, Array] = {"weight_scale": scales if self.group else scales[0]}
        if self.form == "pack-quantized":
            found |= {"weight_packed": packed_words(q, self.bits), "weight_shape": np.array(w.shape)}
            if not self.symmetric:
                packed = packed_words(zeros.T, self.bits).T.copy()
                found["weight_zero_point"] = (zeros - middle).astype(np.int8) if self.raw_zeros else packed
        else:
            found["weight"] = (q - middle).astype(np.int8)
            if not self.symmetric:
                found["weight_zero_point"] = (zeros - middle).astype(np.int8)
        if self.ordered:
            found["weight_g_idx"] = group_of.astype(np.int32)
        if not self.dynamic:
            found["input_scale"] = np.array([0.1], np.float32)
        return found, values

    def _floats(self, w: Array) -> tuple[dict[str, Array], Array]:
        rows, columns = self.block or ((1, w.shape[1]) if self.group < 0 else w.shape)
        grid = (-(-w.shape[0] // rows), -(-w.shape[1] // columns))
        scales = np.zeros(grid, self.dtype)
        for i in range(grid[0]):
            for j in range(grid[1]):
                part = w[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scales[i, j] = np.abs(part).max() / 448
        wide = np.repeat(np.repeat(scales.astype(np.float32), rows, 0), columns, 1)[: w.shape[0], : w.shape[1]]
        small = f8(w / wide)
        stored = scales if self.block or self.group < 0 else scales.reshape(1)
        return {"weight": small, "weight_scale": stored}, small.astype(np.float32) * wide


CASES: dict[str, Case] = {
    "4 bits in groups": Case(),
    "4 bits, asymmetric": Case(symmetric=False, group=64),
    "4 bits, asymmetric, older": Case(symmetric=False, raw_zeros=True),
    "4 bits, ordered": Case(ordered=True),
    "4 bits a row": Case(group=-1, dtype=np.float16),
    "3 bits": Case(bits=3),
    "2 bits, asymmetric": Case(bits=2, symmetric=False),
    "8 bits in groups": Case(bits=8, group=64),
    "8 bits, asymmetric": Case(bits=8, group=-1, symmetric=False),
    "bytes": Case(bits=8, group=-1, form="int-quantized"),
    "bytes in groups": Case(bits=8, form="int-quantized", dtype=np.float16),
    "bytes, asymmetric": Case(bits=8, group=-1, form="int-quantized", symmetric=False),
    "bytes, one scale": Case(bits=8, group=0, form="int-quantized", dynamic=False),
    "floats": Case(bits=8, group=0, form="float-quantized", kind="float", dtype=np.float32, dynamic=False),
    "floats a row": Case(bits=8, group=-1, form="float-quantized", kind="float"),
    "floats in blocks": Case(bits=8, form="float-quantized", kind="float", block=(16, 32), dtype=np.float32),
    "naive": Case(bits=8, group=-1, form="naive-quantized", kind="float"),
}


def weight(rows: int, inputs: int) -> Array:
    return np.random.default_rng([rows, inputs]).standard_normal((rows, inputs)).astype(np.float32)


def opened(case: Case, tensors: Mapping[str, Array], **changes: object) -> Array:
    file = ArrayWeights({}) if not tensors else Tensors({f"m.{part}": array for part, array in tensors.items()})
    source, _ = compressed_tensors.read(Settings({**case.settings(), **changes}, "config.json"), file)
    return source.load("m.weight")


class Tensors(ArrayWeights):
    """Arrays with the dtypes that files may have."""

    def dtype(self, name: str) -> str:
        known = {"float8_e4m3fn": "f8_e4m3", "float8_e8m0fnu": "f8_e8m0", "float8_e5m2": "f8_e5m2"}
        return known.get(self._arrays[name].dtype.name) or super().dtype(name)


# CRC-32 of what compressed-tensors 0.20.1 decompresses, in the dtype of the scales, for weight(32, 128) of each case.
REFERENCE: dict[str, int] = {
    "4 bits in groups": 962021180,
    "4 bits, asymmetric": 3430848769,
    "4 bits, asymmetric, older": 1995489209,
    "4 bits, ordered": 4282736737,
    "4 bits a row": 2725874422,
    "3 bits": 2588998677,
    "2 bits, asymmetric": 2452465373,
    "8 bits in groups": 3604213360,
    "8 bits, asymmetric": 2123275441,
    "bytes": 2018412190,
    "bytes in groups": 2260422315,
    "bytes, asymmetric": 2123275441,
    "bytes, one scale": 4262905798,
    "floats": 2446468933,
    "floats a row": 3445523230,
    "floats in blocks": 3626873958,
    "naive": 3445523230,
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_bit_for_bit_the_references(name: str) -> None:
    case = CASES[name]
    tensors, values = case.tensors(weight(32, 128))
    found = opened(case, tensors)
    np.testing.assert_array_equal(found, values)
    crc = zlib.crc32(np.ascontiguousarray(found.astype(tensors["weight_scale"].dtype)).tobytes())
    assert crc == REFERENCE[name]


@pytest.mark.parametrize("name", ["4 bits in groups", "3 bits", "bytes", "floats a row"])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 32), (7, 96), (33, 160)])
def test_awkward_sizes(name: str, rows: int, inputs: int) -> None:
    tensors, values = CASES[name].tensors(weight(rows, inputs))
    np.testing.assert_array_equal(opened(CASES[name], tensors), values)


def writer(case: Case) -> Callable[[str, Array], tuple[dict[str, Array], Array]]:
    return lambda name, w: case.tensors(w)


MODELS = [
    ("llama", "4 bits in groups", "q4g32"),
    slow("qwen3", "4 bits, ordered", "q4g32"),
    ("gemma2", "bytes", "q8g64"),
    slow("mistral", "bytes, asymmetric", "q8g64z"),
    slow("olmo2", "8 bits in groups", "q8g64"),
    slow("llama", "floats a row", ""),
]


@pytest.mark.parametrize(("family", "name", "encoding"), MODELS)
def test_a_model_is_what_its_tensors_stand_for(family: str, name: str, encoding: str, tmp_path: Path) -> None:
    case = CASES[name]
    pair = write_pair(family, tmp_path, writer(case), case.settings())
    lifted, ids = lift(pair.directory), random_ids(300, 33)
    want = reference_logits(load_reference(pair.reference), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=1e-4)
    compiled = run_lifted(lifted, CompileOptions(quantization="int4"))
    kept = next(report for report in compiled.reports if report.name == "keep-integers")
    assert sum(kept.hits[what] for what in kept.hits if what == f"kept as {encoding}") == (14 if encoding else 0)
    assert not kept.refusals
    if case.form != "pack-quantized":
        assert any("made for activations" in note for note in lifted.notes)
    if not encoding:
        assert any("14 weights of the checkpoint are floats of 8 bits" in note for note in lifted.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "4 bits, ordered"])
def test_an_artifact_is_what_its_tensors_stand_for(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pair = write_pair("llama", tmp_path, writer(case), case.settings())
    runtime, reference = artifact(pair.directory, tmp_path / "m.so"), load_reference(pair.reference)
    ids = random_ids(300, 45)
    np.testing.assert_allclose(runtime.forward(ids[0]), reference_logits(reference, ids)[0], rtol=0, atol=1e-4)
    text = "for index in range(10):"
    assert runtime.generate(text, max_tokens=20, temperature=0) == greedy(reference, pair.directory, text, 20)


def test_the_older_name_of_the_settings(tmp_path: Path) -> None:
    case = CASES["4 bits in groups"]
    pair = write_pair("llama", tmp_path, writer(case), case.settings(), key="compression_config")
    assert any("4 bits (compressed-tensors)" in note for note in lift(pair.directory).notes)


def test_what_has_no_effect_is_told() -> None:
    case = CASES["bytes, one scale"]
    tensors, _ = case.tensors(weight(32, 128))
    file = Tensors({f"m.{part}": array for part, array in tensors.items()} | {"a.k_scale": np.ones(1, np.float32)})
    source, notes = compressed_tensors.read(Settings(case.settings(), "config.json"), file)
    assert list(source.names) == ["m.weight"]
    assert any("a scale that is fixed in the checkpoint" in note for note in notes)
    assert any("kv_cache_scheme" in note for note in notes)


PACKED, BYTES = CASES["4 bits in groups"], CASES["bytes"]
WRONG: list[tuple[Case, dict[str, object], dict[str, object], str]] = [
    (PACKED, {}, {"format": "marlin-24"}, "format is 'marlin-24', expected"),
    (PACKED, {}, {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized', expected"),
    (PACKED, {}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are not read"),
    (PACKED, {}, {"transform_config": {"config_groups": {"R1": {}}}}, "turns activations while the model runs"),
    (PACKED, {"weight_shape": None}, {}, "its weight_shape is missing"),
    (PACKED, {"weight_shape": np.array([31, 128])}, {}, r"its weight_shape is \[31, 128\]"),
    (PACKED, {"weight_shape": np.array([32, -1])}, {}, r"its weight_shape is \[32, -1\]"),
    (PACKED, {"weight_shape": np.array([32, 999])}, {}, "its 16 words a row do not hold 999 integers of 4 bits"),
    (PACKED, {"weight_packed": None}, {}, "neither weight_packed nor weight"),
    (PACKED, {"weight_scale": None}, {}, "no layer of the checkpoint has a weight_scale"),
    (PACKED, {"weight_scale": np.ones((32, 5), BF16)}, {}, "it has 5 groups of 128 inputs"),
    (PACKED, {"weight_scale": np.ones((4, 8, 4), BF16)}, {}, r"its weight_scale is bf16 \[4, 8, 4\]"),
    (PACKED, {"weight_g_idx": np.zeros(128, np.int32)}, {}, "no input is in group 1"),
    (PACKED, {"weight_zero_point": np.zeros((9, 9), np.int8)}, {}, r"its weight_zero_point is i8 \[9, 9\]"),
    (BYTES, {"weight": weight(32, 128)}, {}, "its weight is f32 beside a weight_scale: it is not compressed"),
    (
        CASES["floats a row"],
        {"weight_scale": np.ones((31, 1), BF16)},
        {},
        r"its weight_scale of \[31, 1\] does not",
    ),
    (CASES["floats in blocks"], {"weight_scale": np.ones((3, 3), BF16)}, {}, r"its weight_scale of \[3, 3\] does not"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_not_read_is_refused(number: int) -> None:
    case, change, settings, why = WRONG[number]
    tensors = {**case.tensors(weight(32, 128))[0], **change}
    with pytest.raises(FrontendError, match=why):
        opened(case, {n: a for n, a in tensors.items() if a is not None}, **settings)  # type: ignore[misc]


def test_settings_that_are_json_of_any_kind_are_refused(tmp_path: Path) -> None:
    case = CASES["4 bits in groups"]
    pair = write_pair("llama", tmp_path, writer(case), case.settings())
    path = pair.directory / "config.json"
    config = json.loads(path.read_text())
    for name, value in (("config_groups", []), ("format", 7), ("sparsity_config", "no")):
        changed = config | {"quantization_config": config["quantization_config"] | {name: value}}
        path.write_text(json.dumps(changed))
        with pytest.raises(FrontendError, match=rf"quantization_config: {name} is"):
            lift(pair.directory)


@pytest.mark.parametrize(("rows", "blocks"), [(192, 2), (448, 4), (129, 2)])
def test_blocks_of_floats_end_where_the_settings_say(rows: int, blocks: int) -> None:
    """Also where other blocks of as many would fit the shape."""
    weight = f8(np.ones((rows, 128), np.float32))
    scale = np.arange(1, blocks + 1, dtype=np.float32)[:, None]
    file = Tensors({"a.weight": weight, "a.weight_scale": scale})
    weights: dict[str, object] = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = Settings({"format": "float-quantized", "config_groups": groups}, "config.json")
    found = compressed_tensors.read(settings, file)[0].load("a.weight")
    np.testing.assert_array_equal(found[:, 0], np.arange(rows) // 128 + 1)
    del weights["block_structure"]
    with pytest.raises(FrontendError, match="does not fit"):
        compressed_tensors.read(settings, file)


def test_groups_that_no_setting_explains_are_refused() -> None:
    tensors = {"a.weight": np.ones((4, 192), np.int8), "a.weight_scale": np.ones((4, 2), np.float32)}
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}
    settings = Settings({"format": "int-quantized", "config_groups": groups}, "config.json")
    with pytest.raises(FrontendError, match="2 groups of 192 inputs"):
        compressed_tensors.read(settings, ArrayWeights(tensors))


# What the settings of several groups of layers say of one small layer


def described(*weights: dict[str, object] | None, form: str = "int-quantized") -> Settings:
    """Settings whose groups of layers have these weights; None: a group that says nothing of weights."""
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": each} for i, each in enumerate(weights)}
    return Settings({"format": form, "config_groups": groups}, "config.json")


def read_one(settings: Settings, **parts: Array) -> Array:
    file = Tensors({f"a.{part}": array for part, array in parts.items()})
    return compressed_tensors.read(settings, file)[0].load("a.weight")


FLOAT: dict[str, object] = {"type": "float", "num_bits": 8}


def test_weights_beside_quantized_ones_stay() -> None:
    tensors = {"a.weight": np.ones((4, 8), np.int8), "a.weight_scale": np.ones((4, 1), np.float32),
               "a.input_scale": np.ones(1, np.float32), "b.weight": np.ones(3, np.float32)}  # fmt: skip
    source, _ = compressed_tensors.read(described({}), Tensors(tensors))
    assert sorted(source.names) == ["a.weight", "b.weight"]


def test_bits_are_8_where_no_setting_says_them() -> None:
    q = np.random.default_rng(0).integers(0, 256, (7, 33))
    parts = {"weight_packed": packed_words(q, 8), "weight_shape": np.array([7, 33]),
             "weight_scale": np.full((7, 1), 0.5, np.float32)}  # fmt: skip
    want = (q - 128).astype(np.float32) / 2
    for weights in ({}, {"num_bits": 8}, {"num_bits": 64}):
        settings = described({}, weights, form="pack-quantized")
        np.testing.assert_array_equal(read_one(settings, **parts), want)
    with pytest.raises(FrontendError, match="its 9 words a row do not hold 33 integers of 64 bits"):
        read_one(described({"num_bits": 64}, form="pack-quantized"), **parts)


@pytest.mark.parametrize("scale", [(7,), (7, 1), (1, 1), (1,), ()])
def test_one_scale_or_one_a_row(scale: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    q, scales = rng.integers(-128, 128, (7, 33)).astype(np.int8), np.asarray(rng.random(scale, np.float32))
    want = q.astype(np.float32) * (scales[:, None] if scale == (7,) else scales)
    for size in (None, -1, 0, 1 << 24):
        settings = described({"num_bits": 8, "group_size": size})
        np.testing.assert_array_equal(read_one(settings, weight=q, weight_scale=scales), want)


@pytest.mark.parametrize(("sizes", "groups"), [((1,), 33), ((1, 16), 3), ((11, 64), 3), ((32,), 2)])
def test_the_size_of_groups_that_fits(sizes: tuple[int, ...], groups: int) -> None:
    """Of those that groups of layers have; integers and floats, also a group for each input."""
    rng = np.random.default_rng(groups)
    q, scales = rng.integers(-128, 128, (7, 33)).astype(np.int8), rng.random((7, groups), np.float32)
    size = next(size for size in sizes if -(-33 // size) == groups)
    wide = np.repeat(scales, size, axis=1)[:, :33]
    settings = described(None, *({"num_bits": 8, "group_size": each} for each in sizes))
    np.testing.assert_array_equal(read_one(settings, weight=q, weight_scale=scales), q.astype(np.float32) * wide)
    small = f8(weight(7, 33))
    settings = described(None, *({**FLOAT, "group_size": each} for each in sizes), form="float-quantized")
    found = read_one(settings, weight=small, weight_scale=scales)
    np.testing.assert_array_equal(found, small.astype(np.float32) * wide)


def test_groups_of_floats_are_of_one_row() -> None:
    settings = described({**FLOAT, "group_size": 16}, form="float-quantized")
    with pytest.raises(FrontendError, match=r"its weight_scale of \[4, 3\] does not fit"):
        read_one(settings, weight=f8(weight(7, 33)), weight_scale=np.ones((4, 3), np.float32))


@pytest.mark.parametrize("block", [[2, 16], "2x16", [1, 16], "1x16"])
def test_the_blocks_of_floats_that_fit(block: object) -> None:
    rows = 2 if "2" in str(block) else 1
    small, scales = f8(weight(7, 33)), np.random.default_rng(rows).random((-(-7 // rows), 3), np.float32)
    wide = np.repeat(np.repeat(scales, rows, axis=0), 16, axis=1)[:7, :33]
    others: list[dict[str, object]] = [{**FLOAT, "block_structure": each} for each in (block, [4, 32], "128x128")]
    found = read_one(described(None, *others, form="float-quantized"), weight=small, weight_scale=scales)
    np.testing.assert_array_equal(found, small.astype(np.float32) * wide)


@pytest.mark.parametrize(
    "block", [[0, 16], [16, 0], [True, 16], [1.0, 16], [-1, 16], [1 << 24, 1], [16], "16", "ax16", "x", "1x999999999"]
)
def test_blocks_of_other_kinds_are_refused(block: object) -> None:
    settings = described({**FLOAT, "block_structure": block}, form="float-quantized")
    with pytest.raises(FrontendError, match=r"block_structure is .*, expected two positive whole numbers"):
        read_one(settings, weight=f8(weight(7, 33)), weight_scale=np.ones((7, 1), np.float32))


ROW: dict[str, object] = {"num_bits": 8}


@pytest.mark.parametrize(
    ("weights", "parts", "why"),
    [
        ([{**FLOAT, "block_structure": [2, 16]}, {**FLOAT, "block_structure": [2, 15]}],
         {"weight": f8(weight(7, 33)), "weight_scale": np.ones((4, 3), np.float32)},
         r"does not fit .* in one of the blocks that the settings say: \[\(2, 15\), \(2, 16\)\]"),
        ([FLOAT], {"weight": f8(weight(1, 33))[0], "weight_scale": np.ones(2, np.float32)}, "its weight has 1 axes"),
        ([FLOAT], {"weight": f8(weight(7, 33)), "weight_scale": np.ones(7, np.int32)}, "its weight_scale is i32"),
        ([ROW], {"weight": np.ones((7, 33), np.int8), "weight_scale": np.ones((7, 0), np.float32)},
         "it has 0 groups of 33 inputs"),
        ([{**ROW, "group_size": -2}], {"weight": np.ones((7, 33), np.int8), "weight_scale": np.ones(7, np.float32)},
         "group_size is -2, expected a whole number, -1 to 16777216"),
        ([{**ROW, "group_size": (1 << 24) + 1}],
         {"weight": np.ones((7, 33), np.int8), "weight_scale": np.ones(7, np.float32)}, "group_size is 16777217"),
        ([{**ROW, "group_size": 16}, {**ROW, "group_size": 15}],
         {"weight": np.ones((7, 33), np.int8), "weight_scale": np.ones((7, 3), np.float32)},
         "it has 3 groups of 33 inputs, the settings say groups of 15 or 16"),
        # Groups of 33, the last of one input, are as many as groups of 32.
        ([{**ROW, "group_size": 32}],
         {"weight": np.ones((7, 100), np.int8), "weight_scale": np.ones((7, 4), np.float32),
          "weight_g_idx": (np.arange(100) // 33).astype(np.int32)}, "groups of different sizes, the settings say 32"),
    ],
)  # fmt: skip
def test_what_several_groups_of_layers_do_not_explain_is_refused(
    weights: list[dict[str, object]], parts: dict[str, Array], why: str
) -> None:
    with pytest.raises(FrontendError, match=why):
        read_one(described(*weights, form="float-quantized" if "type" in weights[0] else "int-quantized"), **parts)
