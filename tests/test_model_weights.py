"""A checkpoint's tensors as a model's weights: which is which, what they may be, and what is said of the rest."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers as tf
from transformers import (
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    MixtralForCausalLM,
    conversion_mapping,
)
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from llmc.errors import FrontendError
from llmc.frontends.hf.checkpoint import ModelWeights
from llmc.frontends.weight_sources import ArrayWeights

SIZES = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
Arrays = dict[str, np.ndarray]
QUERY, NORM, TABLE, HEAD = (
    "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight",
)  # fmt: skip


@cache
def model(kind: str) -> Any:
    """A model without values: nothing of it is changed by reading weights for it."""
    with torch.device("meta"):
        if kind == "gpt2":
            config = tf.GPT2Config(
                vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=4, bos_token_id=0, eos_token_id=0
            )
            return GPT2LMHeadModel(config)
        if kind == "mixtral":
            return MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2))
        return LlamaForCausalLM(
            tf.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=kind == "tied llama")
        )


@cache
def whole(kind: str) -> Arrays:
    """Every tensor that the model has, by its own names."""
    rng = np.random.default_rng(3)
    return {
        name: rng.standard_normal(tuple(value.shape)).astype(np.float32)
        for name, value in model(kind).state_dict().items()
    }


def without(arrays: Arrays, *names: str) -> Arrays:
    return {name: array for name, array in arrays.items() if name not in names}


def read(kind: str, arrays: Arrays, partly: bool = False) -> ModelWeights:
    return ModelWeights(model(kind), ArrayWeights(arrays), partly)


def refusal(kind: str, arrays: Arrays) -> str:
    with pytest.raises(FrontendError) as caught:
        ModelWeights(model(kind), ArrayWeights(arrays))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_whole_checkpoint_is_the_models_weights(kind: str) -> None:
    arrays = whole(kind)
    if kind == "gpt2":  # its head is its table
        arrays = {**arrays, HEAD: arrays["transformer.wte.weight"]}
    found = read(kind, arrays)
    assert set(found.names) == set(arrays)
    for name, array in arrays.items():
        assert found.load(name).tobytes() == array.tobytes()
        assert (found.dtype(name), found.shape(name), found.tensor_of(name)) == ("f32", array.shape, name)
        assert found.integers(name) is None
    assert (found.notes, found.missing, found.untied, found.turned) == ([], [], frozenset(), frozenset())
    assert found.merged_integers == 0


def test_what_is_missing_is_listed_or_left_out() -> None:
    arrays = without(whole("llama"), QUERY, NORM)
    assert refusal("llama", arrays) == f"the checkpoint does not fit the model. missing: {QUERY}, {NORM}"
    found = read("llama", arrays, partly=True)
    assert found.missing == [QUERY, NORM]
    assert [found.dtype(name) for name in found.missing] == ["f32", "f32"]
    assert found.shape(NORM) == (8,) and found.load(TABLE) is arrays[TABLE]


def test_all_faults_are_told_in_one_line() -> None:
    arrays = without(whole("llama"), QUERY) | {
        NORM: np.ones(9, np.float32), TABLE: whole("llama")[TABLE].astype(np.int8), "model.norm.bias": np.ones(8),
    }  # fmt: skip
    assert refusal("llama", arrays) == (
        f"the checkpoint does not fit the model. missing: {QUERY}; not as expected: {TABLE} holds i8, not floats, "
        f"{NORM} is [9], the config wants [8]; unexpected: model.norm.bias"
    )


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16", "i8", "u8", "bool"])
def test_a_weight_is_floats(dtype: str) -> None:
    kinds = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    kinds |= {"i8": np.int8, "u8": np.uint8, "bool": np.bool_}
    arrays = whole("llama") | {NORM: np.ones(8, kinds[dtype])}
    if "f" in dtype:
        assert read("llama", arrays).dtype(NORM) == dtype
    else:
        assert f"{NORM} holds {dtype}, not floats" in refusal("llama", arrays)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_holds_no_numbers_is_refused_when_it_is_read(bad: float) -> None:
    array = whole("llama")[QUERY].copy()
    array[-1, -1] = bad
    found = read("llama", whole("llama") | {QUERY: array})
    found.load(NORM)
    with pytest.raises(FrontendError, match=f"weight {QUERY} holds NaN or infinity: the checkpoint is damaged"):
        found.load(QUERY)


def test_two_tensors_of_one_weight_are_refused() -> None:
    arrays = whole("llama") | {"norm.weight": np.ones(8, np.float32)}
    assert refusal("llama", arrays) == f"tensors '{NORM}' and 'norm.weight' both mean weight {NORM}"


def test_names_may_lack_the_models_prefix() -> None:
    arrays = {name.removeprefix("model."): array for name, array in whole("llama").items()}
    found = read("llama", arrays)
    assert found.tensor_of(NORM) == "norm.weight" and found.load(NORM) is arrays["norm.weight"]


TIED: list[tuple[bool, bool, float, bool]] = [
    # whether the table and the head are there, how much they differ, whether they are one
    (True, False, 0, True),
    (False, True, 0, True),
    (True, True, 0, True),
    (True, True, 1e-6, False),
]


@pytest.mark.parametrize(("table", "head", "apart", "one"), TIED)
def test_tied_weights_are_what_the_checkpoint_has_of_them(table: bool, head: bool, apart: float, one: bool) -> None:
    arrays = whole("tied llama")
    given = {**arrays, HEAD: arrays[TABLE] + np.float32(apart)}
    if not table or not head:
        given = without(given, HEAD if table else TABLE)
    found = read("tied llama", given)
    assert {TABLE, HEAD} <= set(found.names)
    assert found.load(TABLE).tobytes() == given.get(TABLE, given.get(HEAD)).tobytes()  # type: ignore[union-attr]
    assert found.load(HEAD).tobytes() == given.get(HEAD, given.get(TABLE)).tobytes()  # type: ignore[union-attr]
    assert found.untied == (frozenset() if one else {HEAD})
    assert bool(found.notes) is not one
    assert one or found.notes[0].startswith(f"config.json ties {HEAD} to another weight, but the checkpoint holds both")


def test_tied_weights_of_which_nothing_is_there_are_missing() -> None:
    assert f"missing: {HEAD}, {TABLE}" in refusal("tied llama", without(whole("tied llama"), HEAD, TABLE))


def test_a_head_of_its_own_is_looked_at_like_any_weight() -> None:
    arrays = whole("tied llama")
    found = read("tied llama", arrays | {HEAD: np.full((9, 8), np.nan, np.float32)})
    with pytest.raises(FrontendError, match=f"weight {HEAD} holds NaN or infinity"):
        found.load(HEAD)


def test_weights_are_tied_by_what_the_model_says_too() -> None:
    """Where its parameters are not one, as after they were given other values."""
    with torch.device("meta"):
        apart = LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True))
        apart.lm_head.weight = torch.nn.Parameter(torch.zeros(9, 8))
    found = ModelWeights(apart, ArrayWeights(without(whole("llama"), HEAD)))
    assert found.load(HEAD) is whole("llama")[TABLE]


def test_each_of_several_ties_is_looked_at() -> None:
    """Also where of another one nothing is there."""
    with torch.device("meta"):
        masked = BertForMaskedLM(tf.BertConfig(**SIZES))
    arrays = {name: np.ones(tuple(value.shape), np.float32) for name, value in masked.state_dict().items()}
    stem, table = "cls.predictions", "bert.embeddings.word_embeddings.weight"
    lost = (table, f"{stem}.decoder.weight", f"{stem}.decoder.bias")
    found = ModelWeights(masked, ArrayWeights(without(arrays, *lost)), partly=True)
    assert sorted(found.missing) == sorted(lost[:2])
    assert found.tensor_of(lost[2]) == f"{stem}.bias"


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    source = SimpleNamespace(_checkpoint=ArrayWeights({"a": one, "b": other}))
    assert ModelWeights._equal(source, "a", "a")  # type: ignore[arg-type]
    found, turned = (ModelWeights._equal(source, *names) for names in (("a", "b"), ("b", "a")))  # type: ignore[arg-type]
    assert found is turned
    return found


def test_tensors_are_equal_in_their_numbers_to_the_last_one() -> None:
    one = np.zeros((3, (1 << 20) + 5), np.float32)
    assert equal(one, one.astype(np.float16)) and not equal(one, one.reshape(-1)) and not equal(one, one[:2])
    for place in (0, (1 << 20) - 1, 1 << 20, 1 << 21, one.size - 1):
        other = one.copy()
        other.reshape(-1)[place] = 1
        assert not equal(one, other) and not equal(other, one)
    assert equal(np.float32(1), np.float32(1)) and not equal(np.float32(1), np.float32(2))  # type: ignore[arg-type]
    assert equal(one[:0], one[:0])


# Tensors that the model has not


MODULE = "model.layers.0.self_attn.q_proj"
REST: dict[str, tuple[str, tuple[int, ...], str]] = {
    # A tensor more, and what is said of it: nothing, a note, or a refusal.
    "frequencies": ("model.layers.0.self_attn.rotary_emb.inv_freq", (2,), ""),
    "positions": ("model.position_ids", (1, 4), ""),
    "a mask": ("model.layers.0.self_attn.bias", (1, 1, 4, 4), ""),
    "a mask's number": ("model.layers.0.self_attn.masked_bias", (), ""),
    "a bias": ("model.norm.bias", (8,), "unexpected"),
    "of a module that has parts": ("model.layers.0.self_attn.sinks", (2,), "unexpected"),
    "a bias of two axes": ("model.norm.bias", (2, 8), "unexpected"),
    "a bias of three axes": ("model.norm.bias", (2, 2, 8), "unexpected"),
    "a bias of no axes": ("model.norm.bias", (), "unexpected"),
    "four axes of another name": ("model.norm.kernel", (1, 1, 4, 4), "unexpected"),
    "a weight more": ("model.layers.0.self_attn.q_norm.weight", (8,), "left out"),
    "a part of a linear layer": (f"{MODULE}.gate.weight", (8,), "unexpected"),
    "a part of a part of it": (f"{MODULE}.gate.scale.weight", (8,), "unexpected"),
    "a layer more": ("model.layers.1.self_attn.q_proj.weight", (8, 8), "left out"),
    "without the prefix": ("norm.bias", (8,), "unexpected"),
    "a tower": ("vision.patch.weight", (8,), "left out"),
    "alone": ("scale", (8,), "left out"),
    "an adapter": (f"{MODULE}.lora_A.weight", (2, 8), "tensors of an adapter"),
    "a layer's base": (f"{MODULE}.base_layer.weight", (8, 8), "tensors of an adapter"),
    "an adapter elsewhere": ("tower.x.lora_magnitude_vector", (8,), "tensors of an adapter"),
    "another kind": (f"{MODULE}.ia3_l", (8, 1), "tensors of an adapter"),
    "like an adapter's": ("tower.my_lora_A_of.weight", (8,), "left out"),
}


@pytest.mark.parametrize("case", REST)
def test_a_tensor_more_says_nothing_or_is_told(case: str) -> None:
    name, shape, said = REST[case]
    arrays = whole("llama") | {name: np.ones(shape, np.float32)}
    if said in ("", "left out"):
        expected = [f"tensors of parts that this model does not have are left out: {name}"] if said else []
        assert read("llama", arrays).notes == expected
    else:
        assert f"{said}: {name}" in refusal("llama", arrays).replace(" of an adapter, ", " of an adapter: ")


def test_a_mask_of_two_axes_is_one_by_its_numbers() -> None:
    name = "model.layers.0.self_attn.bias"
    for mask in (np.tri(4), np.tri(4, dtype=np.bool_), np.tri(4).astype(np.float16)):
        assert read("llama", whole("llama") | {name: mask}).notes == []
    for other in (np.tri(4) * 2, np.tri(4).T, np.tri(4, k=-1), np.zeros((4, 4))):
        assert f"unexpected: {name}" in refusal("llama", whole("llama") | {name: other})
    assert "unexpected: model.norm.kernel" in refusal("llama", whole("llama") | {"model.norm.kernel": np.tri(4)})


def test_what_a_model_says_that_it_ignores_is_ignored() -> None:
    """Of GPT-2, `attn.bias`, whatever it is."""
    arrays = whole("gpt2") | {HEAD: whole("gpt2")["transformer.wte.weight"]}
    assert read("gpt2", arrays | {"transformer.h.0.attn.bias": np.ones(3)}).notes == []


def test_of_the_tensors_of_an_adapter_two_are_named() -> None:
    more = {f"{MODULE}.lora_{part}.weight": np.ones((2, 8), np.float32) for part in "ABC"}
    said = refusal("llama", whole("llama") | more)
    assert f"tensors of an adapter, {MODULE}.lora_A.weight, {MODULE}.lora_B.weight and 1 more: merge" in said


def test_a_list_that_this_model_has_empty_is_no_part_of_a_layer() -> None:
    """A layer more of a model that has none, against a part of a linear layer, which has no parts either."""
    with torch.device("meta"):
        empty = LlamaModel(tf.LlamaConfig(**SIZES | {"num_hidden_layers": 0}, num_key_value_heads=1))
    arrays = {name: np.ones(tuple(value.shape), np.float32) for name, value in empty.state_dict().items()}
    found = ModelWeights(empty, ArrayWeights(arrays | {"layers.0.mlp.up_proj.weight": np.ones(3, np.float32)}))
    assert found.notes == ["tensors of parts that this model does not have are left out: layers.0.mlp.up_proj.weight"]


class Stored(ArrayWeights):
    """A source that holds QUERY as integers, and made layers of another."""

    of_linears = ("transformer.h.0.mlp.c_fc.weight",)

    def integers(self, name: str) -> object:
        return "integers" if name.endswith(("q_proj.weight", "w1.weight")) else None


def test_a_bias_of_zeros_beside_integers_says_nothing() -> None:
    """Some tools store one for every layer that they quantize."""
    for bias, said in ((np.zeros(8), True), (np.eye(8)[7], False)):
        for layer in ("q_proj", "o_proj"):
            arrays = whole("llama") | {f"model.layers.0.self_attn.{layer}.bias": bias.astype(np.float32)}
            if said and layer == "q_proj":
                found = ModelWeights(model("llama"), Stored(arrays))
                assert (found.notes, found.integers(QUERY), found.integers(NORM)) == ([], "integers", None)
            else:
                with pytest.raises(FrontendError, match=f"unexpected: .*{layer}.bias"):
                    ModelWeights(model("llama"), Stored(arrays))


def test_layers_that_a_format_stores_the_other_way_are_turned() -> None:
    """[outputs, inputs] as of any linear layer, for a model whose layers are [inputs, outputs]."""
    name, other = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight"
    arrays = whole("gpt2") | {HEAD: whole("gpt2")["transformer.wte.weight"]}
    found = ModelWeights(model("gpt2"), Stored(arrays | {name: np.ascontiguousarray(arrays[name].T)}))
    assert found.turned == {name}
    np.testing.assert_array_equal(found.load(name), arrays[name])
    np.testing.assert_array_equal(found.load(other), arrays[other])
    with pytest.raises(FrontendError, match=f"{name} is .32, 8., the config wants .8, 32."):
        ModelWeights(model("gpt2"), Stored(arrays))


# Weights that are made of several tensors


def experts(arrays: Arrays) -> Arrays:
    """Mixtral's experts one by one, as its checkpoints have them."""
    found = {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): array for name, array in arrays.items()}
    stem = "model.layers.0"
    both, down = (found.pop(f"{stem}.mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    for index in range(2):
        parts = {"w1": both[index, :6], "w3": both[index, 6:], "w2": down[index]}
        found |= {f"{stem}.block_sparse_moe.experts.{index}.{part}.weight": array for part, array in parts.items()}
    return found


GATES, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def test_experts_one_by_one_are_one_weight() -> None:
    arrays = whole("mixtral")
    found = read("mixtral", experts(arrays))
    assert set(found.names) == set(arrays)
    for name in (GATES, DOWN, GATES):
        assert found.load(name).tobytes() == arrays[name].tobytes()
        assert (found.tensor_of(name), found.integers(name), found.dtype(name)) == (None, None, "f32")
    assert found.merged_integers == 0
    assert ModelWeights(model("mixtral"), Stored(experts(arrays))).merged_integers == 2


@pytest.mark.parametrize(("some", "rest", "made"), [("f2", "f2", "f16"), ("f2", "f4", "f32"), ("f8", "f8", "f64")])
def test_what_is_made_of_several_dtypes_is_f32(some: str, rest: str, made: str) -> None:
    arrays = {
        name: array.astype(some if ".experts.0." in name else rest if ".experts." in name else "f4")
        for name, array in experts(whole("mixtral")).items()
    }
    found = read("mixtral", arrays)
    assert found.dtype(GATES) == made and found.load(GATES).dtype == {"f16": "f2", "f32": "f4", "f64": "f8"}[made]
    np.testing.assert_allclose(found.load(GATES), whole("mixtral")[GATES], rtol=1e-3)


def test_tensors_that_make_no_weight_are_named() -> None:
    arrays = experts(whole("mixtral"))
    first = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    found = read("mixtral", arrays | {first: np.ones((5, 8), np.float32)})
    found.load(DOWN)
    with pytest.raises(FrontendError, match=f"weight {GATES} cannot be made from {first}, .*: ") as caught:
        found.load(GATES)
    assert "\n" not in str(caught.value)
    fewer = read("mixtral", {name: array for name, array in arrays.items() if ".experts.1." not in name})
    with pytest.raises(FrontendError, match=f"weight {DOWN}, made from several tensors, is .1, 8, 6., the config want"):
        fewer.load(DOWN)
    with pytest.raises(FrontendError, match=f"{DOWN} is made from i8, not floats"):
        read("mixtral", {name: array.astype(np.int8) if ".w2." in name else array for name, array in arrays.items()})
    bad = read("mixtral", arrays | {first: np.full((6, 8), np.nan, np.float32)})
    with pytest.raises(FrontendError, match=f"weight {GATES} holds NaN or infinity"):
        bad.load(GATES)


def with_rules(monkeypatch: pytest.MonkeyPatch, *rules: object) -> None:
    """In place of the rules that transformers has for a model."""
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: list(rules))


def test_a_rule_holds_where_it_leads_to_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a tensor is what its own name says."""
    output = QUERY.replace("q_proj", "o_proj")
    with_rules(monkeypatch, WeightRenaming("q_proj", "o_proj"), WeightRenaming("model.norm", "model.gone"))
    found = read("llama", without(whole("llama"), output), partly=True)
    assert (found.tensor_of(output), found.missing, found.tensor_of(NORM)) == (QUERY, [QUERY], NORM)


GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


class Halves(Chunk):
    """Splits a tensor, and counts how often. named: it gives whole names, and in lists."""

    def __init__(self, named: bool = False, error: str = "") -> None:
        super().__init__(dim=0)
        self.calls: list[int] = []
        self.named, self.error = named, error

    def __deepcopy__(self, memo: object) -> Halves:
        return self

    def convert(self, *given: Any, **more: Any) -> dict[str, Any]:
        self.calls.append(1)
        if self.error:
            raise ValueError(self.error)
        made = super().convert(*given, **more)
        return {name: [value] for name, value in zip((GATE, UP), made.values(), strict=True)} if self.named else made


FUSED = {
    **without(whole("llama"), GATE, UP),
    "model.layers.0.mlp.both.weight": np.concatenate([whole("llama")[GATE], whole("llama")[UP]]),
}
TARGETS = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]


@pytest.mark.parametrize("named", [False, True])
def test_one_tensor_may_be_several_weights(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is split when one of them is read, once for those that follow."""
    halves = Halves(named)
    with_rules(monkeypatch, WeightConverter("mlp.both.weight", TARGETS, operations=[halves]))
    found = read("llama", FUSED)
    assert set(found.names) == set(whole("llama")) and halves.calls == []
    for name in (GATE, UP, GATE):
        np.testing.assert_array_equal(found.load(name), whole("llama")[name])
    assert halves.calls == [1]


def test_what_is_made_of_a_tensor_is_seen_where_no_name_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = Halves()
    rule = WeightConverter("mlp.both.weight", [TARGETS[0], "mlp.gone.weight"], operations=[halves])
    with_rules(monkeypatch, rule)
    found = read("llama", FUSED, partly=True)
    assert found.missing == [UP] and halves.calls == [1]
    assert set(found.names) == {*whole("llama"), "model.layers.0.mlp.gone.weight"} - {UP}


def test_what_goes_wrong_in_a_rule_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rules(monkeypatch, WeightConverter("mlp.both.weight", TARGETS, operations=[Halves(error="a\n b" + "c" * 300)]))
    with pytest.raises(FrontendError) as caught:
        read("llama", FUSED).load(GATE)
    said = str(caught.value)
    assert said.startswith(f"weight {GATE} cannot be made from model.layers.0.mlp.both.weight: ")
    assert "\n" not in said and len(said.partition("both.weight: ")[2]) == 200
