"""Adapters' directories are read as PEFT writes them, and nothing in them is trusted."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import write_adapter, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from llmc.errors import ArtifactError
from llmc.runtime.adapter_facts import AdapterFacts, PartFacts, TableFacts, parse_adapters
from llmc.runtime.errors import AdapterError
from llmc.runtime.json_reader import Reader
from llmc.runtime.lora import Product, checked_directory, read_adapter
from llmc.runtime.safetensors import SafetensorsFile

Q, K, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"
FACTS = AdapterFacts(
    2,
    6,
    (
        TableFacts(5, 7, (PartFacts(Q, 4, ((0, 4),)), PartFacts(K, 3, ((0, 3),)))),
        TableFacts(9, 5, (PartFacts(DOWN, 5, ((0, 5),)),)),
    ),
)
SIZES = {Q: (5, 4), K: (5, 3), DOWN: (9, 5)}
NAMES = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def pair(rank: int = 4, inputs: int = 5, outputs: int = 4, module: str = Q) -> dict[str, np.ndarray]:
    return {
        f"base_model.model.{module}.lora_A.weight": numbers(rank, inputs),
        f"base_model.model.{module}.lora_B.weight": numbers(outputs, rank),
    }


def test_products_have_the_scale_in_them(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "a", SIZES, rank=4, ranks={K: 6, DOWN: 1}, rank_pattern={"k_proj": 6, "layers.0.mlp.down_proj": 1},
        alpha_pattern={"q_proj": 2}, lora_alpha=3, use_rslora=True,
    )  # fmt: skip
    found = read_adapter(folder, FACTS)
    assert set(found) == set(SIZES)
    with SafetensorsFile(folder / "adapter_model.safetensors") as file:
        for module, scale in ((Q, 2 / np.sqrt(4)), (K, 3 / np.sqrt(6)), (DOWN, 3.0)):
            a, b = (file.load(f"base_model.model.{module}.lora_{name}.weight") for name in "AB")
            assert np.array_equal(found[module].a, a)
            np.testing.assert_allclose(found[module].b, b * scale, rtol=1e-6)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.language_model."])
def test_modules_may_have_or_lack_what_stands_in_front(prefix: str, tmp_path: Path) -> None:
    tensors = {name.replace("base_model.model.", prefix): array for name, array in pair().items()}
    assert list(read_adapter(write_tensors(tmp_path / "a", tensors), FACTS)) == [Q]


def test_every_float_dtype_is_read_as_it_is(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    values = torch.tensor([[1.5, -(2.0**-14), 65504.0], [0.0, 3.0e-5, -1.0]])
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    save_torch({str(kind): values.to(kind) for kind in kinds}, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        for kind in kinds:
            assert np.array_equal(file.load(str(kind)), values.to(kind).to(torch.float32).numpy()), kind


BAD: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "no LoRA": (pair(), {"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
    "DoRA": (
        pair(),
        {"use_dora": True},
        "use_dora is more than a product that is added: compile the model with `--lora`",
    ),
    "a bias of B": (pair(), {"lora_bias": True}, "lora_bias is more than a product"),
    "biases": (pair(), {"bias": "lora_only"}, "bias is 'lora_only': weights of its own are not loaded at run time"),
    "whole modules": (
        pair(),
        {"modules_to_save": ["lm_head"]},
        r"modules_to_save is \['lm_head'\]: weights of its own",
    ),
    "PiSSA": (pair(), {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', expected true"),
    "what nobody knows": (pair(), {"new_thing": 3}, "new_thing is 3, which llmc does not know"),
    "a rank beyond": (
        pair(7),
        {"r": 7},
        "has rank 7 for .*q_proj, the artifact has room for 6: compile it with a larger",
    ),
    "another rank": (pair(3), {}, r"matrices \[3, 5\] and \[4, 3\], for rank 4 they are \[4, 5\] and \[4, 4\]"),
    "other inputs": (pair(inputs=6), {}, r"is no adapter of this model: .*q_proj has matrices \[4, 6\]"),
    "other outputs": (pair(outputs=5), {}, r"is no adapter of this model: .*\[5, 4\], for rank 4"),
    "another module": (
        pair(module="model.layers.9.mlp.up_proj"),
        {},
        "adapts model.layers.9.mlp.up_proj, which the artifact",
    ),
    "an embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": numbers(4, 9)},
        {},
        "is no matrix that adds to a linear layer",
    ),
    "magnitudes": (pair() | {f"base_model.model.{Q}.lora_magnitude_vector": numbers(4)}, {}, "is no matrix that adds"),
    "a whole tensor": (
        pair() | {"base_model.model.lm_head.weight": numbers(4, 4)},
        {},
        "is no matrix that adds to a linear",
    ),
    "one of two": ({NAMES[0]: numbers(4, 5)}, {}, "has only one of the two matrices"),
    "a vector": (pair() | {NAMES[0]: numbers(4)}, {}, r"matrices \[4\] and"),
    "nothing": ({}, {}, "holds no tensors of an adapter"),
    "twice": (
        pair() | {n.replace("base_model.model.", ""): v for n, v in pair().items()},
        {},
        "more than one adapter of a module",
    ),
    "twice by its end": (
        pair() | {n.replace("base_model.model.model.", ""): v for n, v in pair().items()},
        {},
        "more than one adapter",
    ),
    "NaN": (pair() | {NAMES[1]: np.full((4, 4), np.nan, np.float32)}, {}, "holds NaN or infinity"),
    "integers": (pair() | {NAMES[1]: np.ones((4, 4), np.int32)}, {}, "is 'I32', not of F64, F32, F16, BF16"),
    "alpha": (pair(), {"lora_alpha": "6"}, "alpha_pattern or its default is '6'"),
    "a flag": (pair(), {"use_rslora": 1}, "use_rslora is 1, expected true or false"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    tensors, more, message = BAD[case]
    folder = write_tensors(tmp_path / "a", tensors, **more)
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(folder, FACTS)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no directory: give the one that PEFT has written"):
        checked_directory(tmp_path / "missing")
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read: No such file"):
        read_adapter(tmp_path, FACTS)
    for text, why in (("[]", "must hold a JSON object"), ("{", "is no JSON"), ("[" * 100000, "is no JSON")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=why):
            read_adapter(tmp_path, FACTS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors: give the directory"):
        read_adapter(tmp_path, FACTS)
    (tmp_path / "adapter_config.json").write_text(" " * (1 << 22) + "{}")
    with pytest.raises(AdapterError, match="has more than 4194304 bytes"):
        read_adapter(tmp_path, FACTS)


def header_of(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it ends too early"),
    "short": (b"\x01\0\0", "it ends too early"),
    "a length beyond the file": (header_of({}, length=1 << 62), "its header has"),
    "a length of nothing": (header_of({}, length=0), "its header has 0 bytes"),
    "no JSON": (header_of(b"{nonsense}"), "its header is no JSON"),
    "deep": (header_of(b"[" * 100000), "its header is no JSON"),
    "a list": (header_of([1]), "its header is no JSON object"),
    "no entry": (header_of({"x": 3}), "is None, not of"),
    "an unknown dtype": (header_of(entry(dtype="I8")), "is 'I8', not of"),
    "a dtype that is none": (header_of(entry(dtype=[])), "not of"),
    "a negative size": (header_of(entry(shape=[-2]), bytes(8)), "a shape or place that cannot be"),
    "a size of text": (header_of(entry(shape=["2"]), bytes(8)), "a shape or place that cannot be"),
    "true": (header_of(entry(shape=[True]), bytes(8)), "a shape or place that cannot be"),
    "a huge size": (header_of(entry(shape=[1 << 62]), bytes(8)), "a shape or place that cannot be"),
    "many axes": (header_of(entry(shape=[1] * 9), bytes(8)), "lies beyond"),
    "beyond the file": (header_of(entry(), bytes(7)), "a shape or place that cannot be|lies beyond the file"),
    "another size": (header_of(entry(data_offsets=[0, 4]), bytes(8)), r"of \[2\] has 4 bytes"),
    "backwards": (header_of(entry(data_offsets=[8, 0]), bytes(8)), "has -8 bytes"),
    "three places": (header_of(entry(data_offsets=[0, 8, 8]), bytes(8)), "lies beyond"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    data, why = HEADERS[case]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match=why) as error:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_change_of_a_byte_is_an_error_or_another_number(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed"
    folder.mkdir(exist_ok=True)
    save_file({"a": numbers(3, 4), "b": numbers(2, 2)}, folder / "x.safetensors")
    content = bytearray((folder / "x.safetensors").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with SafetensorsFile(folder / "x.safetensors") as file:
            for name in file.tensors:
                assert np.isfinite(file.load(name)).all()
    except AdapterError:
        pass


def test_facts_of_a_manifest_are_checked() -> None:
    part: dict[str, object] = {"module": "m", "outputs": 4, "rows": [[0, 2], [3, 4]]}
    table: dict[str, object] = {"inputs": 2, "outputs": 3, "parts": [part], "powers": [0, 3]}
    facts: dict[str, object] = {"count": 1, "rank": 8, "tables": [table]}
    found = parse_adapters(Reader(facts, "adapters"))
    assert found == AdapterFacts(1, 8, (TableFacts(2, 3, (PartFacts("m", 4, ((0, 2), (3, 4))),), (0, 3)),))
    assert found.modules == {"m": (2, 4)}
    changes: list[Callable[[], dict[str, object]]] = [
        lambda: {**facts, "count": 0},
        lambda: {**facts, "rank": -1},
        lambda: {**facts, "tables": [{**table, "outputs": 4}]},
        lambda: {**facts, "tables": [{**table, "powers": [1]}]},
        lambda: {**facts, "tables": [{**table, "powers": [1, 65]}]},
        lambda: {**facts, "tables": [{**table, "parts": [{**part, "rows": [[0, 2], [3, 5]]}]}]},
        lambda: {**facts, "tables": [{**table, "parts": [{**part, "rows": [[2, 2], [0, 3]]}]}]},
        lambda: {**facts, "tables": [{**table, "parts": [{**part, "rows": [[0, 2, 3]]}]}]},
        lambda: {**facts, "tables": [{**table, "parts": [{**part, "module": 3}]}]},
    ]
    for change in changes:
        with pytest.raises(ArtifactError, match=r"the manifest cannot be used: adapters\."):
            parse_adapters(Reader(change(), "adapters"))


def test_products_are_what_is_added() -> None:
    product = Product(numbers(2, 5), numbers(4, 2))
    assert product.a.shape[0] == product.b.shape[1]
