"""GPTQ checkpoints: their integers mean what GPTQModel makes of them, and models of them are what they stand for."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hf_models import lifted_logits, load_reference, random_ids, reference_logits
from stored_models import (
    Array,
    Pair,
    artifact,
    greedy,
    groups_of,
    packed_words,
    read_stored,
    rounded,
    save_tensors,
    slow,
    tiny,
    values_of,
    write_pair,
)  # fmt: skip

from llmc.compiler.losses import integer_notes
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_lifted
from llmc.errors import FrontendError
from llmc.frontends.hf.lift import lift
from llmc.frontends.hf.stored import gptq
from llmc.frontends.hf.stored.packing import pack, unpack
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.hf.weights import SafetensorsFile
from llmc.frontends.weight_sources import ArrayWeights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 96, 129])
def test_packed_integers_are_unpacked(bits: int, count: int) -> None:
    rng = np.random.default_rng([bits, count])
    q = rng.integers(0, 1 << bits, (3, count))
    words = packed_words(q, bits)
    np.testing.assert_array_equal(unpack(words, bits, count), q)
    np.testing.assert_array_equal(unpack(words[0], bits, count), q[0])
    with pytest.raises(ValueError, match="do not hold"):
        unpack(words, bits, words.shape[1] * 32 // bits + 1)


def test_three_bits_lie_as_autogptq_packs_them() -> None:
    """Ten whole ones, two bits of the eleventh; its third bit, ten, one bit of the next; its other two bits, ten."""
    q = np.random.default_rng(0).integers(0, 8, 32)
    words = [0, 0, 0]
    for j in range(10):
        words[0] |= int(q[j]) << (3 * j)
        words[1] |= int(q[11 + j]) << (3 * j + 1)
        words[2] |= int(q[22 + j]) << (3 * j + 2)
    words[0] |= (int(q[10]) & 3) << 30
    words[1] |= int(q[10]) >> 2 | (int(q[21]) & 1) << 31
    words[2] |= int(q[21]) >> 1
    np.testing.assert_array_equal(unpack(np.array(words, np.uint32), 3, 32), q)


def layer(
    bits: int, group: int, order: bool, first: bool, inputs: int = 192, outputs: int = 32
) -> tuple[dict[str, Array], Array]:
    """A random layer's tensors, and each input's group. Version 1 has one borrowed from whole words, as GPTQModel."""
    rng = np.random.default_rng([bits, group + 1, order, first])
    group_of = groups_of(inputs, group)
    group_of = group_of[rng.permutation(inputs)] if order else group_of
    groups = int(group_of.max()) + 1
    zeros = packed_words(rng.integers(0, 1 << bits, (groups, outputs)), bits)
    if first and bits == 3:
        zeros = packed_words((unpack(zeros, 3, outputs).astype(int) - 1) & 7, 3)
    elif first:
        ones = packed_words(np.ones((1, outputs), np.int64), bits)
        zeros = (zeros.view(np.uint32) - ones.view(np.uint32)).view(np.int32)
    return {
        "qweight": np.ascontiguousarray(packed_words(rng.integers(0, 1 << bits, (outputs, inputs)), bits).T),
        "qzeros": zeros,
        "scales": ((rng.random((groups, outputs)) + 0.5) / 100).astype(np.float16),
        "g_idx": group_of.astype(np.int32),
    }, group_of


# CRC-32 of `TorchLinear.dequantize_weight()` of gptqmodel 7.7.0, f16 [inputs, outputs], for `layer` of these.
REFERENCE: dict[tuple[int, int, bool, bool], int] = {
    (2, -1, False, True): 3056399141, (2, -1, False, False): 1331155370, (2, 32, False, True): 327323054,
    (2, 32, False, False): 2149984157, (2, 32, True, True): 949527330, (2, 32, True, False): 2241741685,
    (2, 64, False, True): 1724343641, (2, 64, False, False): 1615886062, (2, 64, True, True): 744952802,
    (2, 64, True, False): 2837582431, (3, -1, False, True): 4164835062, (3, -1, False, False): 3520474845,
    (3, 32, False, True): 3177004335, (3, 32, False, False): 237032210, (3, 32, True, True): 2416614911,
    (3, 32, True, False): 971757219, (3, 64, False, True): 3142435796, (3, 64, False, False): 1814409118,
    (3, 64, True, True): 2019679362, (3, 64, True, False): 558849173, (4, -1, False, True): 1178697904,
    (4, -1, False, False): 532355250, (4, 32, False, True): 1103549557, (4, 32, False, False): 1047710307,
    (4, 32, True, True): 176414550, (4, 32, True, False): 293589968, (4, 64, False, True): 3604532219,
    (4, 64, False, False): 2046527193, (4, 64, True, True): 801226538, (4, 64, True, False): 336527455,
    (8, -1, False, True): 4084215833, (8, -1, False, False): 4151377605, (8, 32, False, True): 2001709030,
    (8, 32, False, False): 1139707290, (8, 32, True, True): 3996619730, (8, 32, True, False): 115811211,
    (8, 64, False, True): 1389375733, (8, 64, False, False): 937414467, (8, 64, True, True): 3903364263,
    (8, 64, True, False): 268255050,
}  # fmt: skip


def opened(tensors: Mapping[str, Array], **settings: object) -> Array:
    file = ArrayWeights({f"m.{part}": array for part, array in tensors.items()})
    given = Settings({"quant_method": "gptq", **settings}, "config.json")
    source, _ = gptq.read(given, file)
    return source.load("m.weight")


@pytest.mark.parametrize("first", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("group", [-1, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_bit_for_bit_the_references(bits: int, group: int, order: bool, first: bool) -> None:
    if group < 0 and order:
        pytest.skip("one group has one order")
    tensors, _ = layer(bits, group, order, first)
    form = "gptq" if first else "gptq_v2"
    found = opened(tensors, bits=bits, group_size=group, sym=False, checkpoint_format=form)
    assert found.dtype == np.float32
    halves = np.ascontiguousarray(found.T.astype(np.float16))
    assert zlib.crc32(halves.tobytes()) == REFERENCE[bits, group, order, first]


@pytest.mark.parametrize(("inputs", "bits"), [(32, 4), (96, 3), (160, 2), (224, 8)])
def test_weights_without_g_idx_have_groups_in_order(inputs: int, bits: int) -> None:
    tensors, _ = layer(bits, 64, False, False, inputs)
    want = opened(tensors, bits=bits, group_size=64, sym=False, format="gptq_v2")
    del tensors["g_idx"]
    np.testing.assert_array_equal(opened(tensors, bits=bits, group_size=64, sym=False, format="gptq_v2"), want)


def test_groups_of_different_sizes_are_floats() -> None:
    tensors, _ = layer(4, 64, False, False)
    q, zeros = unpack(tensors["qweight"].T, 4, 192), unpack(tensors["qzeros"], 4, 32).T
    tensors["g_idx"][5] = 2
    found = opened(tensors, bits=4, group_size=64, sym=False, format="gptq_v2")
    np.testing.assert_array_equal(
        found, values_of(q.astype(int), tensors["scales"].T, zeros.astype(int), tensors["g_idx"])
    )


# Whole models


def writer(bits: int, group: int, symmetric: bool, order: bool, first: bool) -> Callable[[str, Array], object]:
    def write(name: str, w: Array) -> tuple[dict[str, Array], Array]:
        # Layers of the same inputs have them in the same order, as GPTQ finds it.
        seed = zlib.crc32(name.replace("q_proj", "").replace("k_proj", "").replace("v_proj", "").encode())
        group_of = groups_of(w.shape[1], group)
        group_of = group_of[np.random.default_rng(seed).permutation(len(group_of))] if order else group_of
        q, scales, zeros = rounded(w, bits, group_of, symmetric)
        return {
            "qweight": np.ascontiguousarray(packed_words(q, bits).T),
            "qzeros": packed_words(zeros.T - first, bits),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": group_of.astype(np.int32),
        }, values_of(q, scales, zeros, group_of)

    return write


def model(
    folder: Path, family: str = "llama", bits: int = 4, group: int = 32, symmetric: bool = True, order: bool = False,
    first: bool = True, **more: object,
) -> Pair:  # fmt: skip
    form = {} if first else {"checkpoint_format": "gptq_v2"}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": order, **form}
    return write_pair(family, folder, writer(bits, group, symmetric, order, first), settings, **more)  # type: ignore[arg-type]


MODELS: dict[str, dict[str, object]] = {
    "llama": {},
    "llama, act-order": {"order": True},
    "qwen2, 3 bits": {"family": "qwen2", "bits": 3},
    "gemma2, 8 bits, one group": {"family": "gemma2", "bits": 8, "group": -1},
    "gpt2, 2 bits": {"family": "gpt2", "bits": 2, "turned": True},
    "mixtral": {"family": "mixtral", "order": True},
    "phi3, version 2": {"family": "phi3", "first": False},
    "opt, asymmetric, act-order": {"family": "opt", "symmetric": False, "order": True},
}


# The others differ in what their tensors hold, which faster tests compare.
FAST = ("llama, act-order", "gpt2, 2 bits")


@pytest.mark.parametrize("case", [c if c in FAST else slow(c) for c in MODELS])
def test_a_model_is_what_its_integers_stand_for(case: str, tmp_path: Path) -> None:
    pair = model(tmp_path, **MODELS[case])  # type: ignore[arg-type]
    lifted = lift(pair.directory)
    ids = random_ids(300, 33)
    want = reference_logits(load_reference(pair.reference), ids)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=1e-4)
    compiled = run_lifted(lifted, CompileOptions(quantization="int4"))
    kept = next(report for report in compiled.reports if report.name == "keep-integers")
    assert sum(n for what, n in kept.hits.items() if what.startswith("kept as")) > 6 and not kept.refusals
    assert integer_notes(compiled.reports) == []
    assert any("weights of the checkpoint are integers" in note for note in lifted.notes)
    assert any("(experts)" in note for note in lifted.notes) == (case == "mixtral")


@pytest.mark.parametrize("case", [slow("llama, act-order"), slow("gpt2, 2 bits"), "opt, asymmetric, act-order"])
def test_an_artifact_is_what_its_integers_stand_for(case: str, tmp_path: Path) -> None:
    pair = model(tmp_path, **MODELS[case])  # type: ignore[arg-type]
    runtime, reference = artifact(pair.directory, tmp_path / "m.so"), load_reference(pair.reference)
    ids = random_ids(300, 45)
    np.testing.assert_allclose(runtime.forward(ids[0]), reference_logits(reference, ids)[0], rtol=0, atol=1e-4)
    text = "for index in range(10):"
    assert runtime.generate(text, max_tokens=20, temperature=0) == greedy(reference, pair.directory, text, 20)


def first_weight(directory: Path) -> tuple[Array, tuple[str, ...]]:
    source, notes = read_stored(directory)
    return source.load("model.layers.0.mlp.down_proj.weight"), notes


@pytest.mark.parametrize("first", [True, False])
def test_symmetric_zero_points_say_which_version_they_are(first: bool, tmp_path: Path) -> None:
    """Labelled wrongly, the numbers decide, and a note says so."""
    pair = model(tmp_path, first=first)
    right, notes = first_weight(pair.directory)
    assert not any("labelled" in note for note in notes)
    path = pair.directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2" if first else "gptq"
    path.write_text(json.dumps(config))
    wrong, notes = first_weight(pair.directory)
    np.testing.assert_array_equal(right, wrong)
    assert any(f"are those of version {1 if first else 2}" in note for note in notes)


def test_other_zero_points_are_as_the_label_says(tmp_path: Path) -> None:
    pair = model(tmp_path, symmetric=False)
    _, notes = read_stored(pair.directory)
    assert any("zero points are read as those of GPTQ version 1" in note for note in notes)


def test_settings_of_older_tools_beside_the_config(tmp_path: Path) -> None:
    pair = model(tmp_path)
    want, _ = first_weight(pair.directory)
    path = pair.directory / "config.json"
    config = json.loads(path.read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    path.write_text(json.dumps(config))
    (pair.directory / "quantize_config.json").write_text(json.dumps(settings))
    np.testing.assert_array_equal(first_weight(pair.directory)[0], want)


def test_settings_that_were_left_beside_a_model_of_floats(tmp_path: Path) -> None:
    pair = model(tmp_path)
    (pair.reference / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    source, notes = read_stored(pair.reference)
    assert not notes and all(name.endswith(".weight") for name in source.names)


def test_layers_that_are_left_out_and_a_quantized_head(tmp_path: Path) -> None:
    """What is quantized is what has integers, by whatever setting it was chosen."""
    pair = model(tmp_path, chosen=lambda name: "down_proj" in name or "lm_head" in name)
    lifted = lift(pair.directory)
    assert sum(name.endswith(".weight.q") for name in lifted.weights.names) == 3
    ids = random_ids(300, 9)
    want = reference_logits(load_reference(pair.reference), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=1e-4)


def test_layers_of_other_bits(tmp_path: Path) -> None:
    """`dynamic` gives layers bits of their own, which their tensors show."""
    pair = model(tmp_path)
    path = pair.directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"bits": 8, "dynamic": {"+:.*": {"bits": 4}}}
    path.write_text(json.dumps(config))
    assert first_weight(pair.directory)[0].shape == (64, 96)
    del config["quantization_config"]["dynamic"]
    path.write_text(json.dumps(config))
    with pytest.raises(FrontendError, match=r"its integers have 4 bits, but .*config\.json.* says 8"):
        read_stored(pair.directory)


def test_biases_of_nothing_that_the_model_does_not_have(tmp_path: Path) -> None:
    """Older tools store a bias of zeros for every layer; any other bias is not left out."""
    pair = model(tmp_path)
    path = pair.directory / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: file.load(name).copy() for name in file.names}
    bias = "model.layers.0.mlp.down_proj.bias"
    tensors[bias] = np.zeros(64, np.float16)
    save_tensors(tensors, path)
    lift(pair.directory)
    tensors[bias][3] = 1
    save_tensors(tensors, path)
    with pytest.raises(FrontendError, match=r"unexpected: model\.layers\.0\.mlp\.down_proj\.bias"):
        lift(pair.directory)


WRONG: dict[str, tuple[Callable[[dict[str, Array]], object], str]] = {
    "no scales": (lambda t: t.pop("scales"), "layer m: its scales is missing"),
    "no zero points": (lambda t: t.pop("qzeros"), "layer m: its qzeros is missing"),
    "integers of floats": (lambda t: t.update(qweight=t["qweight"].astype(np.float32)), "its qweight is f32"),
    "scales of another width": (lambda t: t.update(scales=t["scales"][:, :8]), r"its scales is f16 \[3, 8\]"),
    "too few words": (lambda t: t.update(qweight=t["qweight"][:-1]), "its qweight has 23 rows for 192 inputs"),
    "5 bits": (lambda t: t.update(qweight=np.zeros((30, 32), np.int32)), "5 bits each: 2, 3, 4 and 8 bits are read"),
    "a group too far": (lambda t: t["g_idx"].__setitem__(3, 9), "names groups 0 to 9, of 3"),
    "a negative group": (lambda t: t["g_idx"].__setitem__(3, -1), "names groups -1 to 2"),
    "a group of nobody": (lambda t: t["g_idx"].__setitem__(slice(None), 0), "no input is in group 1 of its 3"),
    "more groups than inputs": (
        lambda t: t.update(scales=np.ones((999, 32), np.float16), qzeros=np.zeros((999, 4), np.int32)),
        "it has 999 groups for 192 inputs",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_refused(case: str) -> None:
    change, why = WRONG[case]
    tensors, _ = layer(4, 64, False, True)
    change(tensors)
    with pytest.raises(FrontendError, match=why):
        opened(tensors, bits=4, group_size=64)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', expected 'gptq' or 'gptq_v2'"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64', expected 'int32'"),
        ({"bits": "four"}, "bits is 'four', expected a whole number, 2 to 8"),
        ({"bits": 4, "sym": "yes"}, "sym is 'yes', expected true or false"),
    ],
)
def test_settings_that_are_not_read_are_refused(settings: dict[str, object], why: str) -> None:
    with pytest.raises(FrontendError, match=why):
        opened(layer(4, 64, False, True)[0], **settings)


# What the settings and the numbers of one small layer decide, by plain formulas


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1,), (33,), (129,), (2, 7), (2, 3, 31), (1, 2, 400)])
def test_packed_integers_lie_bit_behind_bit_in_any_number_of_axes(bits: int, shape: tuple[int, ...]) -> None:
    q = np.random.default_rng([bits, *shape]).integers(0, 1 << bits, shape).astype(np.uint8)
    words = pack(q, bits)
    np.testing.assert_array_equal(words, packed_words(q, bits))
    np.testing.assert_array_equal(unpack(words, bits, shape[-1]), q)
    with pytest.raises(ValueError, match=f"^{words.shape[-1]} words do not hold 9999 integers"):
        unpack(words, bits, 9999)


def small(
    zeros: object, bits: int = 4, inputs: int = 64, outputs: int = 32, groups: int = 1, minus: object = 0,
    ordered: bool = True,
) -> tuple[dict[str, Array], Callable[[object], Array]]:  # fmt: skip
    """A layer whose stored words of zero points hold `zeros` less `minus`, and its values with other zero points."""
    rng = np.random.default_rng([bits, inputs, outputs, groups])
    q, size = rng.integers(0, 1 << bits, (outputs, inputs)), -(-inputs // groups)
    scales = (rng.random((groups, outputs)) / 64 + 0.01).astype(np.float16)
    words = packed_words(np.broadcast_to(np.asarray(zeros), (groups, outputs)), bits).view(np.uint32)
    less = np.resize(np.asarray(minus, np.uint32), words.shape)
    group_of = np.arange(inputs) // size
    tensors = {
        "qweight": np.ascontiguousarray(packed_words(q, bits).T), "qzeros": (words - less).view(np.int32),
        "scales": scales, **({"g_idx": group_of.astype(np.int32)} if ordered else {}),
    }  # fmt: skip

    def values(points: object) -> Array:
        return values_of(q, scales.T, np.broadcast_to(np.asarray(points), (outputs, groups)), group_of)

    return tensors, values


def opened_with_notes(tensors: Mapping[str, Array], **settings: object) -> tuple[Array, tuple[str, ...]]:
    file = ArrayWeights({f"m.{part}": array for part, array in tensors.items()})
    source, notes = gptq.read(Settings({"quant_method": "gptq", **settings}, "config.json"), file)
    return source.load("m.weight"), notes


MIXED = np.arange(32) % 3 + 5  # zero points that differ, none of them at an end
FIRST, SECOND = {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}
# bits, what is stored, settings, the zero points that this stands for, the notes
POINTS: dict[str, tuple[int, object, dict[str, object], object, list[str]]] = {
    "the middle, less one": (4, 7, {}, 8, []),
    "the middle of 2 bits": (2, 1, {**FIRST, "sym": True}, 2, []),
    "the middle of 8 bits": (8, 128, {**SECOND, "sym": True}, 128, []),
    "the middle, of the second": (4, 8, SECOND, 8, []),
    "labelled the second": (4, 7, SECOND, 8, [r"labelled GPTQ version 2.*those of version 1 .zero points minus"]),
    "labelled the first": (4, 8, FIRST, 8, [r"labelled GPTQ version 1.*those of version 2 \(zero points as"]),
    "above the middle": (4, 9, FIRST, 10, ["zero points differ .* symmetric: read as GPTQ version 1"]),
    "4 in the middle's place": (4, 4, SECOND, 4, ["zero points differ .* symmetric: read as GPTQ version 2"]),
    "differing": (4, MIXED, {}, MIXED + 1, ["zero points differ though .* symmetric: read as GPTQ version 1"]),
    "asymmetric": (4, MIXED, {"sym": False}, MIXED + 1, ["read as those of GPTQ version 1"]),
    "asymmetric, the second": (4, MIXED, {**SECOND, "sym": False}, MIXED, ["read as those of GPTQ version 2"]),
    "asymmetric, in the middle": (4, 7, {**SECOND, "sym": False}, 7, ["read as those of GPTQ version 2"]),
    "the greatest": (2, 3, {"sym": False}, None, ["read as those", "the greatest number that their bits hold"]),
    "the greatest, the second": (4, 15, {**SECOND, "sym": False}, 15, ["read as those of GPTQ version 2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", POINTS)
def test_zero_points_by_their_numbers_and_their_label(case: str) -> None:
    bits, stored, settings, points, expected = POINTS[case]
    tensors, values = small(stored, bits)
    found, notes = opened_with_notes(tensors, bits=bits, **settings)
    if points is not None:
        np.testing.assert_array_equal(found, values(np.asarray(points)[:, None] if np.ndim(points) else points))  # type: ignore[index]
    assert len(notes) == len(expected), notes
    for note, words in zip(notes, expected, strict=True):
        assert re.search(words, note), note


def test_three_bits_as_older_versions_wrote_them() -> None:
    """They took other numbers off the three words, which 32 zero points in the middle show."""
    tensors, values = small(4, 3, minus=(0x24924924, 0x92492492, 0x49249249))
    found, notes = opened_with_notes(tensors, bits=3)
    np.testing.assert_array_equal(found, values(4))
    assert len(notes) == 1 and "those of version 1 as older versions of GPTQModel wrote 3 bits" in notes[0]


@pytest.mark.parametrize("size", [None, -1, 0, 64, 100, 1 << 24])
def test_groups_that_hold_all_inputs(size: int | None) -> None:
    tensors, values = small(7, ordered=False)
    file = ArrayWeights({f"m.{part}": array for part, array in tensors.items()})
    source, _ = gptq.read(Settings({"bits": 4, "group_size": size}, "config.json"), file)
    np.testing.assert_array_equal(source.load("m.weight"), values(8))
    stored = source.integers("m.weight")
    assert stored is not None and stored.block == 0  # which is said as one scale for each output


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 248, 1), (8, 8, 8), (96, 40, 3)])
def test_sizes_of_a_layer(inputs: int, outputs: int, groups: int) -> None:
    """Words of zero points are counted exactly, and a group may be one input."""
    tensors, values = small(7, 4, inputs, outputs, groups)
    for part in ((), ("g_idx",)):
        given = {name: array for name, array in tensors.items() if name not in part}
        found = opened(given, bits=4, group_size=inputs // groups)
        np.testing.assert_array_equal(found, values(8))


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        ({}, {"bits": 8}, "its integers have 4 bits, but config.json says 8"),
        ({}, {"bits": 2}, "its integers have 4 bits, but config.json says 2"),
        ({}, {"group_size": (1 << 24) + 1}, "group_size is 16777217, expected a whole number, -1 to 16777216"),
        ({}, {"group_size": -2}, "group_size is -2, expected"),
        ({"g_idx": None}, {"group_size": 32}, "it has 1 groups, but config.json says groups of 32 of 64 inputs"),
        ({"qweight": np.zeros((8, 0), np.int32)}, {}, r"its qweight is \[8, 0\], with nothing in it"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    change: dict[str, Array | None], settings: dict[str, object], why: str
) -> None:
    tensors = {**small(7)[0], **change}
    with pytest.raises(FrontendError, match=why):
        opened({name: array for name, array in tensors.items() if array is not None}, **{"bits": 4, **settings})


def test_the_tiny_model_is_no_quantized_one() -> None:
    assert not any("integers" in note for note in lift(tiny("llama")).notes)
