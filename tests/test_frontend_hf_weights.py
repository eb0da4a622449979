"""Checkpoints: every way of storing the same weights gives the same model; a damaged one gives one clear line."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import lifted_logits, lifted_tiny, load_reference, random_ids, reference_logits, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_encoders import make_encoder
from tiny_models import make_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from llmc.compiler.ir.evaluate import evaluate
from llmc.errors import FrontendError
from llmc.frontends.hf.checkpoint import ModelWeights
from llmc.frontends.hf.lift import lift
from llmc.frontends.hf.weights import ArrayWeights, RandomWeights, SafetensorsFile, open_checkpoint, to_numpy

Tensors = dict[str, torch.Tensor]


def rewritten(family: str, directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a tiny model with other tensors in its checkpoint."""
    shutil.copytree(tiny(family), directory)
    tensors = change(load_file(directory / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    return directory


def same_as(family: str, directory: Path) -> bool:
    lifted = lift(directory)
    ids = random_ids(lifted.vocab_size, 5)
    return np.array_equal(lifted_logits(lifted, ids), lifted_logits(lifted_tiny(family), ids))


def refusal(directory: Path) -> str:
    """The one line that lifting the directory fails with."""
    with pytest.raises(FrontendError) as caught:
        lift(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    return message


# The same weights, stored otherwise.


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    load_reference(tmp_path).save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same_as("llama", tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_are_read_without_running_them(sharded: bool, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if sharded:
        names = list(tensors)
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        index = {name: file for file, some in parts.items() for name in some}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        for file, some in parts.items():
            torch.save({name: tensors[name] for name in some}, tmp_path / file)
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same_as("llama", tmp_path)


class _Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


def test_a_torch_file_with_code_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Exploit()}, tmp_path / "pytorch_model.bin")
    assert "could run code" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_and_computed_in_f32(dtype: str, tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path, dtype=dtype)
    lifted = lift(directory)
    assert {param.dtype for param in lifted.graph.params} == {{"bfloat16": "bf16", "float16": "f16"}[dtype]}
    ids = random_ids(lifted.vocab_size, 9)
    want = reference_logits(load_reference(directory), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, atol=1e-4)


def test_the_prefix_of_the_base_model_may_be_missing(tmp_path: Path) -> None:
    directory = rewritten("gpt2", tmp_path / "m", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    assert same_as("gpt2", directory)


def test_either_of_two_tied_weights_will_do(tmp_path: Path) -> None:
    def moved(tensors: Tensors) -> Tensors:
        return {k.replace("model.embed_tokens", "lm_head"): v for k, v in tensors.items()}

    assert same_as("qwen2_tied", rewritten("qwen2_tied", tmp_path / "m", moved))


def logits_gap(directory: Path) -> float:
    """The largest difference between the lifted model's logits and transformers'."""
    lifted = lift(directory)
    ids = random_ids(lifted.vocab_size, 5)
    return float(np.abs(lifted_logits(lifted, ids) - reference_logits(load_reference(directory), ids)).max())


@pytest.mark.parametrize("family", ["qwen2_tied", "gemma2", "gpt2"])
def test_tied_weights_that_differ_are_both_used(family: str, tmp_path: Path) -> None:
    """As transformers does: the checkpoint is believed, and the config's tie is not. It is said."""

    def other_head(tensors: Tensors) -> Tensors:
        table = next(value for key, value in tensors.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(3))
        return tensors | {"lm_head.weight": noise * 0.2}

    directory = rewritten(family, tmp_path / "m", other_head)
    assert logits_gap(directory) < 1e-4
    assert [note for note in lift(directory).notes if "lm_head.weight" in note and "differ" in note]


def test_tied_weights_that_are_equal_stay_one(tmp_path: Path) -> None:
    directory = rewritten(
        "qwen2_tied", tmp_path / "m", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    assert same_as("qwen2_tied", directory)
    lifted = lift(directory)
    assert lifted.notes == lifted_tiny("qwen2_tied").notes
    assert len(lifted.graph.params) == len(lifted_tiny("qwen2_tied").graph.params)


def test_the_head_of_a_masked_encoder_may_be_its_own(tmp_path: Path) -> None:
    make_encoder("bert", tmp_path, "MaskedLM")
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["bert.embeddings.word_embeddings.weight"]
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(3)) * 0.2
    save_file(tensors | {"cls.predictions.decoder.weight": noise}, tmp_path / "model.safetensors")
    lifted = lift(tmp_path)
    ids = random_ids(table.shape[0], 5)
    want = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32)(torch.from_numpy(ids).long()).logits
    found = evaluate(
        lifted.graph,
        {"ids": ids, "positions": np.arange(5, dtype=np.int32)[None], "token_types": np.zeros_like(ids)},
        lifted.weights.load,
    )["logits"]
    np.testing.assert_allclose(np.asarray(found), want.detach().numpy(), atol=1e-4)


def test_stored_constants_of_older_versions_are_no_weights(tmp_path: Path) -> None:
    def older(tensors: Tensors) -> Tensors:
        frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
        return tensors | frequencies

    assert same_as("llama", rewritten("llama", tmp_path / "m", older))


def test_experts_stored_one_by_one_become_one_weight(tmp_path: Path) -> None:
    """transformers saves them apart and holds them together; so must we."""
    names = list(load_file(tiny("mixtral") / "model.safetensors"))
    assert any("experts.4." in name for name in names)
    lifted = lifted_tiny("mixtral")
    assert lifted.weights.shape("model.layers.0.mlp.experts.down_proj") == (5, 64, 96)
    ids = random_ids(lifted.vocab_size, 5)
    want = reference_logits(load_reference(tiny("mixtral")), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, atol=1e-4)


# Weights that do not fit.


def _drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


MISFITS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (_drop("model.norm.weight"), "missing: model.norm.weight"),
    "shape": (lambda t: t | {"model.norm.weight": torch.ones(65)}, r"model.norm.weight is [65], the config wants [64]"),
    "unexpected": (lambda t: t | {"model.norm.bias": torch.ones(64)}, "unexpected: model.norm.bias"),
    "integers": (lambda t: t | {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "holds i8, not floats"),
    "part of a linear layer": (
        lambda t: t | {"model.layers.0.self_attn.q_proj.gate.weight": torch.ones(4)},
        "unexpected: model.layers.0.self_attn.q_proj.gate.weight",
    ),
    "adapter": (
        lambda t: t | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)},
        "tensors of an adapter, model.layers.0.self_attn.q_proj.lora_A.default.weight: merge it with peft",
    ),
    "adapter with PEFT's prefix": (
        lambda t: t | {"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(4, 64)},
        "tensors of an adapter, base_model.model.model.layers.0.mlp.up_proj.lora_B.weight: merge",
    ),
    "saved by PEFT whole": (
        lambda t: {f"base_model.model.{k}".replace("q_proj", "q_proj.base_layer"): v for k, v in t.items()},
        "tensors of an adapter, base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    ),
    "many": (lambda t: {"model.norm.weight": torch.ones(64)}, "more"),
}


@pytest.mark.parametrize("fault", MISFITS)
def test_weights_that_do_not_fit_are_listed(fault: str, tmp_path: Path) -> None:
    change, expected = MISFITS[fault]
    assert expected in refusal(rewritten("llama", tmp_path / "m", change))


def test_tensors_of_parts_that_the_model_lacks_are_noted(tmp_path: Path) -> None:
    """Of a tower, and of a layer more (a draft head)."""
    more = {"vision_tower.patch.weight": torch.ones(4), "model.layers.9.self_attn.q_proj.weight": torch.ones(4)}
    lifted = lift(rewritten("llama", tmp_path / "m", lambda t: t | more))
    assert any(all(name in note for name in more) for note in lifted.notes)


# Headers that lie.


def header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


LIES: dict[str, tuple[object, str]] = {
    "not json": (b"{not json", "not valid JSON"),
    "not utf-8": (b"\xff\xfe", "not valid JSON"),
    "a list": ([], "JSON object"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "twice": (b'{"w": {}, "w": {}}', "twice"),
    "no entry": ({"w": 3}, "'w'"),
    "dtype": (entry(dtype="F4"), "dtype 'F4'"),
    "dtype of another kind": (entry(dtype=["F32"]), "'w'"),
    "negative shape": (entry(shape=[-2, -3]), "shape"),
    "shape of text": (entry(shape="23"), "shape"),
    "shape of truths": (entry(shape=[True, 6]), "shape"),
    "huge shape": (entry(shape=[1 << 40, 1 << 40]), "needs"),
    "wrong product": (entry(shape=[2, 4]), "needs 32"),
    "beyond the file": (entry(data_offsets=[8, 32]), "outside the file"),
    "backwards": (entry(data_offsets=[24, 0]), "outside the file"),
    "one offset": (entry(data_offsets=[0]), "data_offsets"),
    "overlap": ({**entry(), "v": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}, "overlaps"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused(lie: str, tmp_path: Path) -> None:
    header, expected = LIES[lie]
    path = header_file(tmp_path / "model.safetensors", header, bytes(24))
    with pytest.raises(FrontendError, match=r"model\.safetensors") as caught:
        SafetensorsFile(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 100, 1 << 40, (1 << 64) - 1])
def test_a_header_of_the_wrong_length_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(FrontendError):
        SafetensorsFile(header_file(tmp_path / "model.safetensors", entry(), bytes(24), length))


def test_any_truncation_is_refused(tmp_path: Path) -> None:
    whole = (tiny("llama") / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for size in (0, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FrontendError):
            SafetensorsFile(path)


@given(position=st.integers(0, 3000), value=st.integers(0, 255))
def test_a_changed_byte_never_crashes(position: int, value: int) -> None:
    """A header with one byte changed reads as some header, or is refused: no other error, nothing outside the file."""
    import tempfile

    whole = bytearray((tiny("llama") / "model.safetensors").read_bytes())
    whole[position % len(whole)] = value
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(whole)
        file.flush()
        try:
            source = SafetensorsFile(Path(file.name))
            for name in source.names:
                assert source.load(name).shape == source.shape(name)
        except FrontendError:
            pass


def test_an_index_cannot_reach_outside(tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its directory" in refusal(tmp_path / "m")


def test_an_index_that_lists_too_much_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    names = [*load_file(tmp_path / "a.safetensors"), "model.ghost"]
    index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.ghost" in refusal(tmp_path)


def test_an_index_may_list_constants_that_no_file_holds(tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    names = [*load_file(tmp_path / "a.safetensors"), "model.layers.0.self_attn.rotary_emb.inv_freq"]
    index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_as("llama", tmp_path)


def test_files_are_taken_whole_whatever_their_index_says(tmp_path: Path) -> None:
    """As transformers takes them: a tensor that the index puts into another file, or leaves out, counts; and two
    tensors of one name must not differ."""
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": [names[0], *names[1::2]]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, tmp_path / file)
    index = {name: "b.safetensors" if name == names[2] else file for file, some in parts.items() for name in some}
    del index[names[4]]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    source = open_checkpoint(tmp_path)
    assert sorted(source.names) == sorted(names)
    assert all(np.array_equal(source.load(name), tensors[name].numpy()) for name in names)
    save_file({name: tensors[name] + (name == names[0]) for name in parts["b.safetensors"]}, tmp_path / "b.safetensors")
    with pytest.raises(FrontendError, match=f"'{re.escape(names[0])}' stands in another file"):
        open_checkpoint(tmp_path)


def test_the_file_that_the_config_names_is_the_checkpoint(tmp_path: Path) -> None:
    """`transformers_weights`, beside a model.safetensors with other numbers."""
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    tensors = load_file(tmp_path / "other.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "o.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "other.safetensors")})
    )
    for named, expected in (
        ("other.safetensors", None), ("o.safetensors.index.json", None), ("../x.safetensors", "a file beside it"),
        ("lost.safetensors", "missing"), ("config.json", "neither"), (7, "a file beside it"),
    ):  # fmt: skip
        if expected is None:
            source = open_checkpoint(tmp_path, named)
            assert all(np.array_equal(source.load(name), tensor.numpy()) for name, tensor in tensors.items())
        else:
            with pytest.raises(FrontendError, match=expected):
                open_checkpoint(tmp_path, named)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "lost.safetensors"}))
    assert "lost.safetensors" in refusal(tmp_path)
    (tmp_path / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    assert "a distributed checkpoint" in refusal(tmp_path)


def test_experts_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    """Weights that are made from many tensors: their shape is checked, and nothing is rounded where dtypes differ."""
    tensors = load_file(tiny("qwen3_moe") / "model.safetensors")
    first = "model.layers.0.mlp.experts.down_proj"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny("qwen3_moe")))

    def weights(changed: Tensors) -> ModelWeights:
        return ModelWeights(model, ArrayWeights({name: to_numpy(tensor) for name, tensor in changed.items()}))

    mixed = weights({name: tensor.half() if ".experts.0." in name else tensor for name, tensor in tensors.items()})
    assert mixed.dtype(first) == "f32"
    np.testing.assert_array_equal(mixed.load(first)[1:], weights(tensors).load(first)[1:])
    fewer = {name: tensor for name, tensor in tensors.items() if ".experts.4." not in name}
    more = tensors | {name.replace("s.4.", "s.5."): tensors[name] for name in set(tensors) - set(fewer)}
    for changed, size in ((fewer, 4), (more, 6)):
        with pytest.raises(FrontendError, match=f"made from several tensors, is .{size}, .*config wants .5, "):
            weights(changed).load(first)
    with pytest.raises(FrontendError, match="is made from i32, not floats"):
        weights({name: tensor.int() if ".experts." in name else tensor for name, tensor in tensors.items()})


def test_torch_tensors_that_are_views_or_sparse(tmp_path: Path) -> None:
    """Negated lazily: read; sparse: refused."""
    numbers = torch.arange(6.0).reshape(2, 3)
    torch.save({"x": torch._neg_view(numbers), "y": numbers.t()}, tmp_path / "pytorch_model.bin")
    source = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(source.load("x"), -numbers.numpy())
    np.testing.assert_array_equal(source.load("y"), numbers.t().numpy())
    torch.save({"x": numbers.to_sparse()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FrontendError, match="'x' is stored as sparse_coo"):
        open_checkpoint(tmp_path)


# Random weights.


def test_random_weights_need_no_checkpoint(tmp_path: Path) -> None:
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    one, same, other = (lift(tmp_path, weights="random", seed=seed) for seed in (1, 1, 2))
    ids = random_ids(one.vocab_size, 4)
    np.testing.assert_array_equal(lifted_logits(one, ids), lifted_logits(same, ids))
    assert np.abs(lifted_logits(one, ids) - lifted_logits(other, ids)).max() > 0


def test_random_weights_are_normal_and_differ_by_name() -> None:
    source = RandomWeights({"a": (2048, 1536), "b": (2048, 1536), "norm.weight": (7,), "x.bias": (7,)}, "bf16")
    a, b = (source.load(name).astype(np.float32) for name in ("a", "b"))
    assert abs(a.std() - 0.02) < 1e-4 and abs(a.mean()) < 1e-4
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    assert (source.load("norm.weight") == 1).all() and (source.load("x.bias") == 0).all()
