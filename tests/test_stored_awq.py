"""AWQ checkpoints: their integers mean what AutoAWQ makes of them, and models of them are what they stand for."""

from __future__ import annotations

import json
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
    slow,
    values_of,
    write_pair,
)

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_lifted
from llmc.errors import FrontendError
from llmc.frontends.hf.lift import lift
from llmc.frontends.hf.stored import awq
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.weight_sources import ArrayWeights

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the outputs of a word, lowest bits first


def gemm(q: Array, scales: Array, zeros: Array) -> dict[str, Array]:
    """The tensors of integers [outputs, inputs], scales and zero points [outputs, groups]."""

    def words(values: Array) -> Array:
        return packed_words(values.T.reshape(values.shape[1], -1, 8)[..., ORDER].reshape(values.shape[1], -1), 4)

    return {"qweight": words(q), "qzeros": words(zeros), "scales": np.ascontiguousarray(scales.T)}


def gemv(q: Array, scales: Array, zeros: Array) -> dict[str, Array]:
    """The same in GEMV's layout, where scales and zero points are padded to whole words."""
    wide = -(-scales.shape[1] // 8) * 8
    padded = np.zeros((len(scales), wide), scales.dtype)
    padded[:, : scales.shape[1]] = scales
    return {"qweight": packed_words(q, 4), "qzeros": packed_words(zeros, 4), "scales": padded}


LAYOUTS = {"gemm": gemm, "gemv": gemv}


def layer(inputs: int, outputs: int, group: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([inputs, outputs, group])
    groups = inputs // group
    scales = ((rng.random((outputs, groups)) + 0.5) / 100).astype(np.float16)
    return rng.integers(0, 16, (outputs, inputs)), scales, rng.integers(0, 16, (outputs, groups))


def opened(tensors: Mapping[str, Array], **settings: object) -> Array:
    file = ArrayWeights({f"m.{part}": array for part, array in tensors.items()})
    source, _ = awq.read(Settings({"quant_method": "awq", **settings}, "config.json"), file)
    return source.load("m.weight")


# CRC-32 of `dequantize_gemm` of autoawq 0.2.9, f16 [inputs, outputs], for `layer` of these.
REFERENCE = {
    (64, 32, 32): 331341907,
    (128, 8, 128): 1798498646,
    (192, 40, 64): 2454187906,
    (96, 72, 32): 541677742,
}


@pytest.mark.parametrize(("inputs", "outputs", "group"), REFERENCE)
@pytest.mark.parametrize("version", LAYOUTS)
def test_weights_are_bit_for_bit_the_references(version: str, inputs: int, outputs: int, group: int) -> None:
    made = layer(inputs, outputs, group)
    found = opened(LAYOUTS[version](*made), bits=4, group_size=group, version=version)
    halves = np.ascontiguousarray(found.T.astype(np.float16))
    assert zlib.crc32(halves.tobytes()) == REFERENCE[inputs, outputs, group]


def writer(version: str, group: int, symmetric: bool) -> Callable[[str, Array], tuple[dict[str, Array], Array]]:
    def write(name: str, w: Array) -> tuple[dict[str, Array], Array]:
        group_of = groups_of(w.shape[1], group)
        q, scales, zeros = rounded(w, 4, group_of, symmetric)
        return LAYOUTS[version](q, scales, zeros), values_of(q, scales, zeros, group_of)

    return write


def model(
    folder: Path, family: str, version: str = "gemm", group: int = 32, symmetric: bool = False, **more: object
) -> Pair:
    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": version.upper(),
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    return write_pair(family, folder, writer(version, group, symmetric), settings, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "version", "symmetric"),
    [
        ("llama", "gemm", False),
        ("qwen2", "gemv", True),
        slow("olmo2", "gemm", True),
        slow("mistral", "gemm", False),
    ],
)
def test_a_model_is_what_its_integers_stand_for(family: str, version: str, symmetric: bool, tmp_path: Path) -> None:
    pair = model(tmp_path, family, version, 32, symmetric)
    lifted, ids = lift(pair.directory), random_ids(300, 33)
    want = reference_logits(load_reference(pair.reference), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, rtol=0, atol=1e-4)
    compiled = run_lifted(lifted, CompileOptions(quantization="int4"))
    kept = next(report for report in compiled.reports if report.name == "keep-integers")
    assert kept.hits == {f"kept as q4g32{'' if symmetric else 'z'}": 14} and not kept.refusals


@pytest.mark.slow
def test_an_artifact_is_what_its_integers_stand_for(tmp_path: Path) -> None:
    pair = model(tmp_path, "llama", symmetric=False)
    runtime, reference = artifact(pair.directory, tmp_path / "m.so"), load_reference(pair.reference)
    ids = random_ids(300, 45)
    np.testing.assert_allclose(runtime.forward(ids[0]), reference_logits(reference, ids)[0], rtol=0, atol=1e-4)
    text = "for index in range(10):"
    assert runtime.generate(text, max_tokens=20, temperature=0) == greedy(reference, pair.directory, text, 20)


def test_settings_of_older_tools_beside_the_config(tmp_path: Path) -> None:
    pair = model(tmp_path, "llama")
    name = "model.layers.0.mlp.down_proj.weight"
    want = read_stored(pair.directory)[0].load(name)
    path = pair.directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (pair.directory / "quant_config.json").write_text(json.dumps(settings))
    np.testing.assert_array_equal(read_stored(pair.directory)[0].load(name), want)


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        ({}, {"version": "marlin"}, "version is 'marlin', expected 'gemm' or .* or 'gemv'"),
        ({}, {"version": "gemv_fast"}, "version is 'gemv_fast', expected"),
        ({}, {"bits": 8}, "bits is 8, expected 4: no other is read"),
        ({}, {"group_size": 40}, "its 64 inputs are no whole groups of 40"),
        ({"scales": None}, {}, "its scales is missing"),
        ({"qzeros": np.zeros((2, 3), np.int32)}, {}, r"its qzeros is i32 \[2, 3\], expected i32 \[2, 4\]"),
        ({"qweight": np.zeros((64, 4), np.int16)}, {}, "its qweight is i16"),
        ({"qweight": None, "scales": None, "qzeros": None}, {}, "says awq, but the checkpoint has no layer"),
        ({"act.scales": np.full(3, 2, np.float16)}, {}, "divides activations by m.act.scales, which is not read"),
    ],
)
def test_what_is_not_read_is_refused(change: dict[str, Array | None], settings: dict[str, object], why: str) -> None:
    tensors = {**gemm(*layer(64, 32, 32)), **change}
    given = {"bits": 4, "group_size": 32, **settings}
    with pytest.raises(FrontendError, match=why):
        opened({name: array for name, array in tensors.items() if array is not None}, **given)


def test_scaled_activations_of_one_are_left_out() -> None:
    tensors = {**gemm(*layer(64, 32, 32)), "act.scales": np.ones(3, np.float16)}
    assert opened(tensors, group_size=32).shape == (32, 64)


@pytest.mark.parametrize("version", LAYOUTS)
@pytest.mark.parametrize("name", ["group_size", "q_group_size"])
@pytest.mark.parametrize("size", [None, -1, 0, 128])
def test_groups_that_hold_all_inputs(version: str, name: str, size: int | None) -> None:
    """Also where no setting says how many they are, which is 128 then."""
    q, scales, zeros = layer(128, 8, 128)
    file = ArrayWeights({f"m.{part}": array for part, array in LAYOUTS[version](q, scales, zeros).items()})
    source, notes = awq.read(Settings({"version": version, name: size}, "config.json"), file)
    np.testing.assert_array_equal(source.load("m.weight"), values_of(q, scales, zeros, np.zeros(128, int)))
    stored = source.integers("m.weight")
    assert stored is not None and stored.block == 0 and not notes  # which is said as one scale for each output


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        ({}, {"bits": 0}, "bits is 0, expected a whole number, 1 to 64"),
        ({}, {"bits": 65}, "bits is 65, expected a whole number, 1 to 64"),
        ({}, {"group_size": -2}, "group_size is -2, expected a whole number, -1 to 16777216"),
        ({}, {"group_size": (1 << 24) + 1}, "group_size is 16777217, expected a whole number"),
        ({"qzeros": np.zeros((16, 1), np.int32)}, {}, "its zero points or scales are of less than its 9 groups"),
        ({"scales": np.ones((16, 8), np.float16)}, {}, "its zero points or scales are of less than its 9 groups"),
    ],
)
def test_sizes_of_gemv_that_do_not_fit_are_refused(
    change: dict[str, Array], settings: dict[str, object], why: str
) -> None:
    tensors = {**gemv(*layer(72, 16, 8)), **change}
    with pytest.raises(FrontendError, match=why):
        opened(tensors, **{"bits": 4, "group_size": 8, "version": "gemv", **settings})
