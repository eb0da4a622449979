"""An adapter on weights in memory: what is added to which of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from llmc.compiler.ir.types import NUMPY_DTYPES
from llmc.errors import FrontendError
from llmc.frontends.hf.lora import AdaptedWeights, Adapter, Modules
from llmc.frontends.stored_integers import stored_integers
from llmc.frontends.weight_sources import ArrayWeights

OUTPUTS, INPUTS, RANK = 3, 5, 2
Tensors = dict[str, np.ndarray]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def pair(module: str = "x", outputs: int = OUTPUTS, inputs: int = INPUTS, rank: int = RANK) -> Tensors:
    return {f"{module}.lora_A.weight": numbers(rank, inputs), f"{module}.lora_B.weight": numbers(outputs, rank, seed=1)}


def table_pair(module: str = "x", rows: int = OUTPUTS, features: int = INPUTS) -> Tensors:
    return {
        f"{module}.lora_embedding_A": numbers(RANK, rows),
        f"{module}.lora_embedding_B": numbers(features, RANK, seed=1),
    }


def adapter(folder: Path, tensors: Tensors, **settings: object) -> Adapter:
    folder.mkdir(exist_ok=True)
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, **settings}
    kept = {name: value for name, value in said.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    save_file(
        {f"base_model.model.{name}": array for name, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return Adapter.read(folder)


def modules(*names: str, **more: Any) -> Modules:
    return Modules(frozenset(names or ("x",)), **{"turned": frozenset(), **more})


def base(**arrays: np.ndarray) -> ArrayWeights:
    return ArrayWeights({f"{name}.weight": array for name, array in arrays.items()})


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["linear", "turned", "table", "magnitudes", "turned magnitudes"])
def test_a_weight_gets_its_product_and_keeps_its_dtype(kind: str, dtype: str, tmp_path: Path) -> None:
    """W + s B A, in the order in which the weight lies; with magnitudes, rows of these lengths."""
    is_turned, has_magnitudes = "turned" in kind, "magnitudes" in kind
    shape = (INPUTS, OUTPUTS) if is_turned else (OUTPUTS, INPUTS)
    weight = numbers(*shape, seed=2).astype(NUMPY_DTYPES[dtype])
    tensors = table_pair() if kind == "table" else pair()
    a, b = (array.astype(np.float64) for array in tensors.values())
    tensors |= {"x.lora_magnitude_vector": np.array([0.5, 1, 3], np.float32)} if has_magnitudes else {}
    found = AdaptedWeights(
        base(x=weight, y=weight), adapter(tmp_path / "a", tensors, use_dora=has_magnitudes),
        modules("x", "y", turned=frozenset({"x"} if is_turned else ())),
    )  # fmt: skip
    expected = (weight.T if is_turned else weight).astype(np.float64) + 3 * ((b @ a).T if kind == "table" else b @ a)
    if has_magnitudes:
        expected *= np.array([[0.5], [1], [3]]) / np.linalg.norm(expected, axis=1, keepdims=True)
    got = found.load("x.weight")
    step = {"f16": 1e-3, "bf16": 8e-3}.get(dtype, 1e-6)
    np.testing.assert_allclose(got.astype(np.float64), expected.T if is_turned else expected, rtol=step, atol=step / 8)
    assert got.dtype == NUMPY_DTYPES[dtype] and got.flags.c_contiguous
    assert found.load("y.weight") is weight
    assert (found.dtype("x.weight"), found.shape("x.weight")) == (dtype, shape)
    assert list(found.names) == ["x.weight", "y.weight"]
    assert found.note == f"adapter {tmp_path / 'a'} is merged: 1 weights changed"


def test_a_row_of_zeros_has_no_direction(tmp_path: Path) -> None:
    tensors = {name: array * 0 for name, array in pair().items()} | {"x.lora_magnitude_vector": np.ones(3, np.float32)}
    weight = np.zeros((OUTPUTS, INPUTS), np.float32)
    found = AdaptedWeights(base(x=weight), adapter(tmp_path / "a", tensors, use_dora=True), modules())
    assert (found.load("x.weight") == 0).all()


SCALES: list[tuple[dict[str, object], str, float]] = [
    ({}, "x", 3),
    ({"lora_alpha": None}, "x", 4),
    ({"lora_alpha": -3}, "x", -1.5),
    ({"lora_alpha": 999_999_999}, "x", 499_999_999.5),
    ({"use_rslora": True}, "x", 6 / 2**0.5),
    ({"r": None, "rank_pattern": {"x": 2}}, "x", 3),
    ({"alpha_pattern": {"x": 1}}, "x", 0.5),
    ({"alpha_pattern": {"x": 1}}, "deep.x", 0.5),
    ({"alpha_pattern": {"x": 1}}, "max", 3),
    ({"alpha_pattern": {"x": 1}}, "x.y", 3),
    ({"alpha_pattern": {"x|y": 1}}, "y", 0.5),
    ({"alpha_pattern": {"y": 1, "deep.x": 2, "x": 3}}, "deep.x", 1),
]


@pytest.mark.parametrize(("settings", "module", "scale"), SCALES)
def test_the_scale_is_that_of_the_first_pattern_that_fits(
    settings: dict[str, object], module: str, scale: float, tmp_path: Path
) -> None:
    assert adapter(tmp_path / "a", pair(module), **settings).changes[module].scale == pytest.approx(scale, rel=1e-12)


def test_the_least_rank_is_1(tmp_path: Path) -> None:
    found = adapter(tmp_path / "a", pair(rank=1), r=1)
    assert found.changes["x"].scale == 6
    assert str(tmp_path) in repr(found) and "changes" not in repr(found) and "whole" not in repr(found)


def test_an_adapter_that_says_no_rank_has_one_of_8(tmp_path: Path) -> None:
    assert adapter(tmp_path / "a", pair(rank=8), r=None, lora_alpha=None).changes["x"].scale == 1


BAD: dict[str, tuple[Tensors, dict[str, object], str]] = {
    "rank 0": (pair(), {"r": 0}, "r is 0, expected a whole number, 1 to 65536"),
    "a rank of millions": (pair(), {"r": (1 << 16) + 1}, "r is 65537, expected a whole number, 1 to 65536"),
    "a rank below 1": (pair(), {"rank_pattern": {"x": 0.5}}, "the rank of x is 0.5, at least 1 is needed"),
    "no alpha": (pair(), {"lora_alpha": 0}, "alpha_pattern or its default is 0 for x, no number"),
    "an endless alpha": (pair(), {"lora_alpha": 1e9}, "or its default is 1000000000.0 for x, no number"),
    "true for alpha": (pair(), {"lora_alpha": True}, "or its default is True for x, no number"),
    "a text for alpha": (pair(), {"alpha_pattern": {"x": "1"}}, "or its default is '1' for x, no number"),
    "no pattern": (pair(), {"alpha_pattern": {"(": 1}}, "alpha_pattern has the pattern '(': "),
    "one matrix": ({"x.lora_B.weight": numbers(3, 2)}, {}, "module x has only one of the two matrices"),
    "the other matrix": ({"x.lora_A.weight": numbers(2, 5)}, {}, "module x has only one of the two matrices"),
    "no matrix": ({"x.lora_A.weight": numbers(2)}, {}, "x.lora_A.weight' is [2], no matrix: merge it with peft"),
    "a kernel": ({"x.lora_B.weight": numbers(2, 2, 1)}, {}, "is [2, 2, 1], no matrix: merge it with peft"),
    "another rank of A": (
        pair() | {"x.lora_A.weight": numbers(3, 5)}, {}, "its matrices are [3, 5] and [3, 2], the rank is 2",
    ),
    "another rank of B": (
        pair() | {"x.lora_B.weight": numbers(3, 3)}, {}, "its matrices are [2, 5] and [3, 3], the rank is 2",
    ),
    "magnitudes that are not said": (
        pair() | {"x.lora_magnitude_vector": numbers(3)}, {}, "use_dora and its magnitudes",
    ),
    "magnitudes of a table": (
        table_pair() | {"x.lora_magnitude_vector": numbers(3)}, {"use_dora": True},
        "magnitudes of an embedding (use_dora) are not merged",
    ),
    "nothing": ({}, {}, "holds no tensors of an adapter"),
    "a bias of its own": (
        pair() | {"x.lora_B.bias": numbers(3)}, {}, "a: x has a bias of its own (lora_bias), which is not merged",
    ),
    "another beginning": (pair(), {"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "a setting": (pair(), {"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]], which llmc does not know"),
    "half a number": (pair() | {"y": np.array([np.inf], np.float32)}, {}, "y' holds no finite floats"),
    "whole numbers": (pair() | {"y": np.array([1])}, {}, "y' holds no finite floats"),
    "another kind": (pair(), {"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_cannot_be_merged_is_refused(case: str, tmp_path: Path) -> None:
    tensors, settings, said = BAD[case]
    with pytest.raises(FrontendError) as caught:
        adapter(tmp_path / "a", tensors, **settings)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [None, False, [], {}, "", 0])
def test_a_setting_that_says_nothing_may_have_any_name(value: object, tmp_path: Path) -> None:
    assert adapter(tmp_path / "a", pair(), of_later=value, loftq_config={"any": 1}).changes.keys() == {"x"}


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_beginning_that_leaves_the_base_as_it_is(value: object, tmp_path: Path) -> None:
    assert adapter(tmp_path / "a", pair(), init_lora_weights=value, peft_type="lora").changes.keys() == {"x"}


def test_an_adapter_may_lie_in_a_file_of_torch(tmp_path: Path) -> None:
    adapter(tmp_path, pair())
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in pair().items()}, tmp_path / "adapter_model.bin")
    assert Adapter.read(tmp_path).changes["x"].scale == 3
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(FrontendError, match=r"has no adapter_model\.safetensors: give the directory"):
        Adapter.read(tmp_path)


def test_tensors_that_stand_for_whole_weights(tmp_path: Path) -> None:
    """With PEFT's names taken off: its prefix, and what it puts around a layer that has a change too."""
    found = adapter(tmp_path / "a", {"y.base_layer.weight": numbers(2), "z.bias": numbers(3), "w": numbers(1)})
    assert sorted(found.whole) == ["w", "y.weight", "z.bias"] and not found.changes


@pytest.mark.parametrize(
    ("wanted", "names", "expected"),
    [
        ("a.x", ("a.x", "b.a.x"), "a.x"),
        ("a.x", ("b.a.x", "b.a.y"), "b.a.x"),
        ("b.a.x", ("a.x", "a.y"), "a.x"),
        ("a.x", ("ba.x",), None),
        ("ba.x", ("a.x",), None),
        ("a.x", ("b.a.x", "c.a.x"), None),
        ("x", (), None),
    ],
)
def test_a_module_may_have_or_lack_a_prefix(wanted: str, names: tuple[str, ...], expected: str | None) -> None:
    assert Modules(frozenset(names), frozenset()).find(wanted) == expected


def refusal(source: ArrayWeights, changed: Adapter, of: Modules) -> str:
    try:
        AdaptedWeights(source, changed, of)
    except FrontendError as error:
        return str(error)
    return ""


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    weight = numbers(OUTPUTS, INPUTS)

    def said(tensors: Tensors, *names: str, array: np.ndarray = weight, **settings: object) -> str:
        return refusal(base(x=array), adapter(tmp_path / "a", tensors, **settings), modules(*names))

    where = f"{tmp_path / 'a'} is no adapter of this model"
    assert said(pair()) == "" and said(pair("model.x")) == ""
    assert said(pair("y")) == f"{where}, which has no y"
    assert said(pair(), "y") == f"{where}, which has no x"  # a weight, but no module of that name
    others = {"q.weight": weight, "r.weight": weight, "x.weight": weight, **pair("p"), **pair("y"), **pair()}
    assert said(others) == f"{where}, which has no p, q.weight, r.weight, y"
    assert said(pair(outputs=4)) == f"{where}: x.weight is f32 [3, 5], it is made for [4, 5]"
    assert said(pair(inputs=4)) == f"{where}: x.weight is f32 [3, 5], it is made for [3, 4]"
    assert said(table_pair(rows=5, features=3)) == f"{where}: x.weight is f32 [3, 5], it is made for [5, 3]"
    assert said(pair(), array=weight.astype(np.int8)) == f"{where}: x.weight is i8 [3, 5], it is made for [3, 5]"
    assert said({"x.weight": numbers(3, 4)}) == f"{where}: x.weight is f32 [3, 5], it has [3, 4] for it"
    assert said(pair() | {"x.lora_magnitude_vector": numbers(2)}, use_dora=True) == (
        f"{where}: x.weight is f32 [3, 5], it has 2 magnitudes"
    )
    twice = f"{tmp_path / 'a'} has more than one change of x.weight"
    assert said({**pair(), **pair("model.x")}, "x") == twice
    assert said({"x.weight": weight, "model.x.weight": weight}) == twice


def test_a_layer_whose_source_says_that_it_lies_as_any_other_is_not_turned(tmp_path: Path) -> None:
    """Formats of quantized weights store all layers as [outputs, inputs], whatever the model has."""

    class Linear(ArrayWeights):
        of_linears = ("x.weight",)

    weight = numbers(OUTPUTS, INPUTS)
    found = AdaptedWeights(
        Linear({"x.weight": weight}), adapter(tmp_path / "a", pair()), modules(turned=frozenset({"x"}))
    )
    assert found.of_linears == {"x.weight"} and found.load("x.weight").shape == (OUTPUTS, INPUTS)


def test_a_weight_that_is_replaced_is_the_adapters(tmp_path: Path) -> None:
    """Of its dtype, with a change of its own upon it; a tensor that the base has not is no weight of it."""
    weight, stored = numbers(OUTPUTS, INPUTS), numbers(OUTPUTS, INPUTS, seed=9).astype(np.float16)
    tensors = {**pair(), "x.base_layer.weight": stored, "y.weight": stored}
    found = AdaptedWeights(base(x=weight, y=weight, z=weight), adapter(tmp_path / "a", tensors), modules())
    a, b = pair().values()
    np.testing.assert_allclose(found.load("x.weight"), stored + 3 * (b @ a), rtol=2e-3, atol=1e-3)
    assert found.load("y.weight").tobytes() == stored.tobytes()
    assert [found.dtype(f"{name}.weight") for name in "xyz"] == ["f16", "f16", "f32"]
    assert found.note.endswith("is merged: 1 weights changed, 2 replaced")
    assert list(found.names) == ["x.weight", "y.weight", "z.weight"]


def test_integers_stay_where_nothing_changes_them(tmp_path: Path) -> None:
    kept = object()

    class Stored(ArrayWeights):
        def integers(self, name: str) -> object:
            return kept

    source = Stored({f"{name}.weight": numbers(OUTPUTS, INPUTS) for name in "xyz"})
    tensors = {**pair(), "y.weight": numbers(OUTPUTS, INPUTS)}
    found = AdaptedWeights(source, adapter(tmp_path / "a", tensors), modules())
    assert [stored_integers(found, f"{name}.weight") for name in "xyz"] == [None, None, kept]


# A table and a head that share one weight. What an adapter has of them: a change, a whole tensor, or nothing.
PRODUCT, WHOLE, NOTHING = "product", "whole", "nothing"
SHARED: list[tuple[str, str, bool, bool]] = [
    # of the table, of the head, whether they stay one, whether that is taken
    (NOTHING, NOTHING, False, True),
    (NOTHING, NOTHING, True, True),
    (PRODUCT, NOTHING, False, False),
    (WHOLE, NOTHING, False, False),
    (NOTHING, WHOLE, False, True),
    (NOTHING, WHOLE, True, False),
    (WHOLE, WHOLE, False, True),
    (WHOLE, WHOLE, True, False),
    (PRODUCT, WHOLE, False, False),
]


@pytest.mark.parametrize(("table", "head", "ties", "taken"), SHARED)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_shared_weight_is_changed_for_both_of_its_uses_or_not_at_all(
    table: str, head: str, ties: bool, taken: bool, prefix: str, tmp_path: Path
) -> None:
    """prefix: what stands before the table's name in the model, and not in the checkpoint."""
    weight = numbers(OUTPUTS, INPUTS)
    tensors = {"z.weight": weight}
    tensors |= table_pair("embed") if table == PRODUCT else {"embed.weight": weight} if table == WHOLE else {}
    tensors |= {"head.weight": weight} if head == WHOLE else {}
    of = modules(f"{prefix}embed", "head", "z", table=f"{prefix}embed", head="head")
    said = refusal(base(embed=weight, z=weight), adapter(tmp_path / "a", tensors, ensure_weight_tying=ties), of)
    touched = [f"{name}.weight" for name, kind in (("embed", table), ("head", head)) if kind != NOTHING]
    expected = f"a changes {', '.join(touched)}: the model's embedding and head share one weight, so that it has to be"
    assert (expected in said) if not taken else said == ""


def test_a_head_of_its_own_in_the_checkpoint_is_changed_like_any_weight(tmp_path: Path) -> None:
    weight = numbers(OUTPUTS, INPUTS)
    of = modules("embed", "head", table="embed", head="head")
    for tensors in (pair("head"), table_pair("embed"), {"embed.weight": weight}):
        assert refusal(base(embed=weight, head=weight), adapter(tmp_path / "a", tensors), of) == ""
    found = AdaptedWeights(base(embed=weight), adapter(tmp_path / "a", {"model.head.weight": weight}), of)
    assert list(found.names) == ["embed.weight", "head.weight"] and found.shape("head.weight") == (OUTPUTS, INPUTS)
    for other in ("score.weight", "ahead.weight"):
        assert f"which has no {other}" in refusal(base(embed=weight), adapter(tmp_path / "a", {other: weight}), of)


SMALL = {"vocab_size": 9, "num_hidden_layers": 1, "num_attention_heads": 1}


def test_what_an_adapter_finds_in_a_model() -> None:
    with torch.device("meta"):
        llama = {
            ties: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**SMALL, hidden_size=8, intermediate_size=8, tie_word_embeddings=ties)
            )
            for ties in (False, True)
        }
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
        bert = transformers.BertModel(transformers.BertConfig(**SMALL, hidden_size=8, intermediate_size=8))
    own, shared, turned = (Modules.of(model) for model in (llama[False], llama[True], gpt2))
    assert (own.table, own.head, own.turned) == ("", "", frozenset())
    assert (shared.table, shared.head, shared.turned) == ("model.embed_tokens", "lm_head", frozenset())
    assert own.names == shared.names == {name for name, _ in llama[True].named_modules()}
    assert (turned.table, turned.head) == ("transformer.wte", "lm_head")
    layer = "transformer.h.0"
    assert turned.turned == {
        f"{layer}.attn.c_attn", f"{layer}.attn.c_proj", f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj",
    }  # fmt: skip
    assert (Modules.of(bert).table, Modules.of(bert).head) == ("", "")


@pytest.mark.parametrize(("text", "shared"), [({"tie_word_embeddings": True}, True), ({}, False)])
def test_whether_a_table_is_shared_is_a_setting_of_the_text_model(text: dict[str, bool], shared: bool) -> None:
    class Parts(torch.nn.Module):
        config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**text if decoder else {}))

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.get_submodule("table")

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.get_submodule("head")

    model = Parts()
    model.add_module("table", torch.nn.Identity())
    model.add_module("head", torch.nn.Identity())
    found = Modules.of(model)  # type: ignore[arg-type]
    assert (found.table, found.head) == (("table", "head") if shared else ("", ""))
