"""`llmc quantize`: what is written is what other tools read, by an independent reading of each form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import make_tiny
from typer.testing import CliRunner

from llmc import api
from llmc.cli.app import app
from llmc.compiler import quantized_checkpoint
from llmc.compiler.encodings import encode
from llmc.compiler.ir.types import parse_encoding
from llmc.errors import LlmcError
from llmc.frontends import lift
from llmc.frontends.hf.stored import open_stored, writing
from llmc.frontends.hf.stored.packing import PACKED_BITS, pack, unpack
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.weight_sources import ArrayWeights

GROUP = 32


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory's safetensors files."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def bits_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Integers [N, n] of i32 words [N, W], bit by bit."""
    each = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    each = each[:, : each.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return (each.astype(np.int64) << np.arange(bits)).sum(axis=-1)


def values(found: dict[str, np.ndarray], layer: str, form: str, bits: int) -> np.ndarray:
    """The weight [outputs, inputs] of a layer as the form's description has it."""
    part = {name.removeprefix(f"{layer}."): array for name, array in found.items() if name.startswith(f"{layer}.")}
    if form == "gptq":
        q, scales = bits_of(part["qweight"].T.copy(), bits), part["scales"].T
        zeros = bits_of(part["qzeros"], bits).T + 1
        group_of = part["g_idx"]
        q = q - zeros[:, group_of]
    else:
        outputs, inputs = part["weight_shape"]
        q, scales = bits_of(part["weight_packed"], bits)[:, :inputs] - (1 << bits - 1), part["weight_scale"]
        assert q.shape == (outputs, inputs)
        group_of = np.arange(inputs) // (inputs // scales.shape[1])
    assert scales.dtype == np.float16
    return np.asarray(q.astype(np.float32) * scales.astype(np.float32)[:, group_of])


@pytest.fixture(scope="module", params=["llama", "opt"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama") / "model")


def quantized(source: Path, output: Path, bits: int = 4, **options: object) -> writing.Written:
    given = {"group_size": GROUP, "calibrate": "none", **options}
    return api.quantize(source, output, f"int{bits}", **given)  # type: ignore[arg-type]


@given(st.sampled_from(PACKED_BITS), st.integers(1, 3), st.sampled_from((1, 7, 31, 32, 33, 129)), st.integers(0, 9))
def test_packing_is_what_unpacking_takes_apart(bits: int, rows: int, count: int, seed: int) -> None:
    integers = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    words = pack(integers, bits)
    assert words.dtype == np.int32 and words.shape == (rows, -(-count * bits // 32))
    np.testing.assert_array_equal(unpack(words, bits, count), integers)
    np.testing.assert_array_equal(bits_of(words, bits)[:, :count], integers)


@pytest.mark.parametrize(
    ("form", "bits"), [("compressed-tensors", 4), ("compressed-tensors", 8), ("gptq", 2), ("gptq", 4)]
)
def test_a_form_says_what_the_weights_were_rounded_to(original: Path, form: str, bits: int, tmp_path: Path) -> None:
    written = quantized(original, tmp_path / "out", form=form, bits=bits)
    before, after = tensors(original), tensors(tmp_path / "out")
    layers = [name.rpartition(".")[0] for name in after if name.endswith(("weight_packed", "qweight"))]
    assert len(layers) == written.layers > 4
    assert not set(layers) & {layer for layer, _ in written.kept}
    for layer in layers:
        exact = encode(parse_encoding(f"q{bits}g{GROUP}"), before.pop(f"{layer}.weight")).decode()
        np.testing.assert_array_equal(values(after, layer, form, bits), exact)
        after = {name: array for name, array in after.items() if not name.startswith(f"{layer}.") or "bias" in name}
    assert after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_llmc_reads_what_it_has_written(original: Path, form: str, tmp_path: Path) -> None:
    written = quantized(original, tmp_path / "out", form=form)
    found, after = lift(tmp_path / "out"), tensors(tmp_path / "out")
    layers = [name.rpartition(".")[0] for name in after if name.endswith(("weight_packed", "qweight"))]
    assert {f"{layer}.weight.q" for layer in layers} <= {param.name for param in found.graph.params}
    assert len(layers) == written.layers
    for layer in layers:
        np.testing.assert_array_equal(found.load(f"{layer}.weight"), values(after, layer, form, 4))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_one_scale_a_row(llama: Path, form: str, tmp_path: Path) -> None:
    quantized(llama, tmp_path / "out", form=form, bits=8, group_size=0)
    found, before, after = lift(tmp_path / "out"), tensors(llama), tensors(tmp_path / "out")
    layers = [name.rpartition(".")[0] for name in after if name.endswith(("weight_packed", "qweight"))]
    for layer in layers:
        exact = encode(parse_encoding("q8g64r"), before[f"{layer}.weight"]).decode()
        np.testing.assert_array_equal(values(after, layer, form, 8), exact)
        np.testing.assert_array_equal(found.load(f"{layer}.weight"), exact)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "'group_size': -1" in str(settings) if form == "gptq" else "'strategy': 'channel'" in str(settings)


def test_other_files_stay_and_settings_are_added(llama: Path, tmp_path: Path) -> None:
    quantized(llama, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((llama / "config.json").read_text())
    assert settings["quant_method"] == "compressed-tensors" and settings["ignore"] == ["lm_head"]
    names = {path.name for path in llama.iterdir() if path.is_file()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_rounding_by_inputs_moves_outputs_less(llama: Path, tmp_path: Path) -> None:
    """Not the same integers as rounded each for itself, and still the nearest few."""
    quantized(llama, tmp_path / "plain")
    quantized(llama, tmp_path / "seen", calibrate=None)
    plain, seen = tensors(tmp_path / "plain"), tensors(tmp_path / "seen")
    layer = "model.layers.0.mlp.up_proj"
    weight = tensors(llama)[f"{layer}.weight"]
    near, fed = (values(found, layer, "compressed-tensors", 4) for found in (plain, seen))
    assert (near != fed).any()
    errors = [float(((each - weight) ** 2).sum()) for each in (near, fed)]
    assert errors[0] < errors[1] < 4 * errors[0]


def test_several_files_have_an_index(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(llama, tmp_path / "one")
    monkeypatch.setattr(writing, "_SHARD_BYTES", 20_000)
    quantized(llama, tmp_path / "several")
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    one, several = tensors(tmp_path / "one"), tensors(tmp_path / "several")
    assert one.keys() == several.keys() == index["weight_map"].keys()
    assert all((one[name] == several[name]).all() for name in one)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in one.values())
    assert sorted(lift(tmp_path / "several").weights.names) == sorted(lift(tmp_path / "one").weights.names)


def test_layers_that_do_not_fit_a_form_stay_and_are_named(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "model", intermediate_size=72)
    written = quantized(source, tmp_path / "out", form="gptq")
    kept = dict(written.kept)
    assert "groups of 32 do not divide its 72 inputs" in kept["model.layers.0.mlp.down_proj"]
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.0\.mlp\.down_proj$" in settings["dynamic"] and not settings["lm_head"]
    assert "model.layers.0.mlp.down_proj.weight" in tensors(tmp_path / "out")
    lift(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "gguf"}, "--form is compressed-tensors or gptq"),
        ({"bits": 2}, "written as int4 or int8, not int2"),
        ({"bits": 0}, "written as int4 or int8, not floats"),
        ({"form": "gptq", "bits": 5}, "int2 or int4 or int8"),
        ({"group_size": 48}, "--group-size"),
        ({"calibrate": "/nowhere/text.txt"}, "--calibrate /nowhere/text.txt"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    llama: Path, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LlmcError, match=message):
        quantized(llama, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(LlmcError, match="there already"):
        quantized(llama, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(LlmcError, match="there is no folder"):
        quantized(llama, tmp_path / "no" / "out")


def test_a_failure_on_the_way_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantized_checkpoint._matrices

    def broken(weights: Iterator[object]) -> Iterator[object]:
        yield next(whole(weights))  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantized_checkpoint, "_matrices", broken)
    with pytest.raises(LlmcError, match=r"cannot write .*out: No space left"):
        quantized(llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_matrices_that_are_no_layers_are_named_too(tmp_path: Path) -> None:
    """Experts are no linear layers of the model, but matrices of the file that readers would take for packed."""
    source = make_tiny("qwen3_moe", tmp_path / "model")
    written = quantized(source, tmp_path / "out")
    left = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    floats = {
        name.removesuffix(".weight")
        for name, array in tensors(tmp_path / "out").items()
        if name.endswith(".weight") and array.ndim == 2 and "embed" not in name
    }
    assert floats <= {layer for layer, _ in written.kept} == set(left) and any("experts" in name for name in floats)


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="no linear layer of its own"):
        quantized(make_tiny("gpt2", tmp_path / "model"), tmp_path / "out")


def test_options_of_python_are_checked(llama: Path, tmp_path: Path) -> None:
    for options in ({"foo": 1}, {"form": "gguf"}, {"bits": 7}):
        with pytest.raises(LlmcError):
            quantized(llama, tmp_path / "out", **options)


def test_what_is_quantized_is_not_quantized_again(llama: Path, tmp_path: Path) -> None:
    quantized(llama, tmp_path / "out")
    with pytest.raises(LlmcError, match="quantized already"):
        quantized(tmp_path / "out", tmp_path / "again")


def test_the_command(llama: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(llama), "-o", str(tmp_path / "out"), "--fast", "--group-size", "32"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["layers"] == 14 and found["kept"][0][0] == "lm_head" and found["form"] == "compressed-tensors"


# The parts of it, without a model


@pytest.mark.parametrize(
    ("form", "sizes", "why"),
    [
        ("compressed-tensors", (7, 64, 4, 32), ""),
        ("compressed-tensors", (7, 33, 4, 0), ""),
        ("compressed-tensors", (7, 65, 4, 32), "groups of 32 do not divide its 65 inputs"),
        ("gptq", (8, 96, 4, 32), ""),
        ("gptq", (8, 40, 4, 0), ""),
        ("gptq", (8, 40, 4, 32), "groups of 32 do not divide its 40 inputs"),
        ("gptq", (16, 64, 2, 32), ""),
        ("gptq", (8, 64, 2, 32), "its outputs fill no whole words of 16 integers"),
        ("gptq", (7, 33, 8, 0), "its inputs and outputs fill no whole words of 4 integers"),
    ],
)
def test_which_layers_have_a_form(form: str, sizes: tuple[int, int, int, int], why: str) -> None:
    assert writing.FORMS[form].refuse(*sizes) == why


@pytest.mark.parametrize("form", writing.FORMS)
@pytest.mark.parametrize(("rows", "inputs", "bits", "group"), [(8, 8, 4, 8), (16, 96, 4, 32), (8, 64, 8, 0)])
def test_a_layer_is_read_as_it_was_rounded(form: str, rows: int, inputs: int, bits: int, group: int) -> None:
    rng, most = np.random.default_rng([rows, inputs]), 1 << bits - 1
    q = rng.integers(-most, most, (rows, inputs)).astype(np.int8)
    scales = rng.random((rows, inputs // group if group else 1)).astype(np.float16)
    parts = writing.FORMS[form].tensors(q, scales, bits, group)
    settings = writing.FORMS[form].settings(bits, group, ["lm_head"])
    file = ArrayWeights({f"m.{part}": array for part, array in parts.items()})
    source, notes = open_stored(Settings(settings, "config.json"), file)
    wide = np.repeat(scales.astype(np.float32), group or inputs, axis=1)
    np.testing.assert_array_equal(source.load("m.weight"), q.astype(np.float32) * wide)
    assert notes == ()


class Plain:
    """The tensors that weights of a model are, by their names."""

    def __init__(self, **tensors: str) -> None:
        self.tensors = tensors

    def tensor_of(self, name: str) -> str | None:
        return self.tensors.get(name.replace(".", "_"))


def test_only_linear_layers_of_their_own_are_written_as_integers(tmp_path: Path) -> None:
    """Not a table, nor a layer that is made of several tensors; matrices that nobody knows are named, but no others."""
    rng, source = np.random.default_rng(0), tmp_path / "in"
    shapes = {"a.weight": (32, 64), "b1.weight": (16, 64), "embed.weight": (32, 64), "conv.weight": (3, 4, 5),
              "router.weight": (4, 8), "norm.weight": (64,)}  # fmt: skip
    before = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    plain = Plain(a_weight="a.weight", embed_weight="embed.weight", norm_weight="norm.weight")
    original = writing.Original(
        source, ("a", "b"), frozenset({"embed"}), "", plain, ArrayWeights(before)  # type: ignore[arg-type]
    )  # fmt: skip
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "x", "transformers_weights": "y"}')
    rounded = [(name, encode(parse_encoding("q4g32"), before["a.weight"])) for name in ("a", "b", "embed", "norm")]
    given = [(f"{name}.weight", encoded) for name, encoded in rounded]
    written = writing.write_checkpoint(original, tmp_path / "out", writing.FORMS["gptq"], 4, GROUP, given)
    after, exact = tensors(tmp_path / "out"), rounded[0][1].decode()
    np.testing.assert_array_equal(values(after, "a", "gptq", 4), exact)
    assert {name for name in after if not name.startswith("a.")} == shapes.keys() - {"a.weight"}
    assert all((after[name] == before[name]).all() for name in shapes if name != "a.weight")
    assert written.layers == 1 and [layer for layer, _ in written.kept] == ["b", "b1", "router"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.keys() == {"model_type", "quantization_config"} and len(config["quantization_config"]["dynamic"]) == 3


@pytest.mark.parametrize(("limit", "files"), [(None, 1), (24, 1), (23, 2), (16, 2), (15, 3), (1, 3)])
def test_files_hold_as_much_as_they_may(
    limit: int | None, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tensors of 8 bytes: each file takes what fits, and only several have an index."""
    if limit is not None:
        monkeypatch.setattr(writing, "_SHARD_BYTES", limit)
    arrays = {f"t{i}": np.full(2, i, np.float32) for i in range(3)}
    assert writing._write_shards(arrays.items(), tmp_path) == 24
    found = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    numbered = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    assert found == (["model.safetensors"] if files == 1 else numbered)
    assert {name: array.tolist() for name, array in tensors(tmp_path).items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (files > 1) and len(list(tmp_path.iterdir())) == files + (files > 1)
    if files > 1:
        described = json.loads(index.read_text())
        assert described["metadata"] == {"total_size": 24} and list(described["weight_map"]) == list(arrays)
        for name, file in described["weight_map"].items():
            with safe_open(tmp_path / file, "np") as shard:
                assert name in shard.keys()  # noqa: SIM118 (no mapping)


def test_what_a_directory_has_beside_its_weights_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for folder in (source / "1_Pooling", source / "notes", source / "x.json", target):
        folder.mkdir(parents=True)
    kept = ["tokenizer.json", "chat_template.jinja", "vocab.txt", "spiece.model", "README.md", "1_Pooling/config.json"]
    left = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "run.py",
        "notes/a",
    ]
    for name in (*kept, *left):
        (source / name).write_text(name)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]  # the last has no files
    (source / "modules.json").write_text(json.dumps(modules))
    writing._copy_others(source, target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {*kept, "modules.json"}
    assert all((target / name).read_text() == name for name in kept)
