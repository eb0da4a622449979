"""What inputs and outputs of text models are taken for, by name and shape; and what they are not."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.onnx.conventions import Role, empty_past, is_batch_size, is_present, text_inputs
from llmc.frontends.onnx.model import Signature
from llmc.frontends.onnx.recognition import replaceable, token_rows, without_token_types

FLOAT, INT32, INT64 = 1, 6, 7
Dims = tuple[int | str | None, ...] | None
IDS = Signature("input_ids", INT64, ("batch", "sequence"))


def role_of(name: str, dims: Dims, dtype: int = INT64) -> Role | None:
    """The role of an input beside token ids."""
    found, _ = text_inputs([IDS, Signature(name, dtype, dims)])
    return None if found is None else found.roles[name]


@pytest.mark.parametrize("name", ["input_ids", "token_ids", "tokens", "input_ids:0"])
@pytest.mark.parametrize("dtype", [INT32, INT64])
@pytest.mark.parametrize("batch", ["batch", 1, None])
def test_token_ids(name: str, dtype: int, batch: int | str | None) -> None:
    found, why = text_inputs([Signature(name, dtype, (batch, "sequence"))])
    assert found is not None and not why
    assert found.having(Role.IDS) == [name]


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (Signature("ids", INT64, ("b", "s")), ""),
        (Signature("input_ids", INT64, ("b", "s", "t")), ""),
        (Signature("input_ids", INT64, None), ""),
        (Signature("input_ids", FLOAT, ("b", "s")), "'input_ids' is not an integer tensor"),
        (Signature("input_ids", INT64, ("b", 128)), "'input_ids' has a fixed length of 128: export"),
        (Signature("input_ids", INT64, (2, "s")), "'input_ids' has a fixed batch of 2: export"),
        (Signature("input_ids", INT64, (0, "s")), "'input_ids' has a fixed batch of 0: export"),
    ],
)
def test_what_are_no_token_ids(ids: Signature, why: str) -> None:
    found, said = text_inputs([ids])
    assert found is None
    assert said.startswith(why) and bool(said) == bool(why)


def test_two_texts_are_no_text() -> None:
    assert text_inputs([IDS, Signature("token_ids", INT64, ("b", "s"))]) == (None, "")
    assert text_inputs([]) == (None, "")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("attention_mask", Role.MASK), ("input_mask", Role.MASK), ("token_type_ids", Role.TOKEN_TYPES),
        ("segment_ids", Role.TOKEN_TYPES), ("segment_ids:0", Role.TOKEN_TYPES), ("position_ids", Role.POSITIONS),
        ("cache_position", Role.POSITIONS), ("total_sequence_length", Role.LENGTH), ("seqlens_k", Role.LAST),
        ("past_sequence_length", Role.PAST_LENGTH), ("use_cache_branch", Role.BRANCH), ("logits_to_keep", Role.KEEP),
    ],
)  # fmt: skip
def test_other_inputs_by_name(name: str, role: Role) -> None:
    assert role_of(name, ("b", "s")) is role
    of_one_axis = role_of(name, ("s",))
    assert of_one_axis is (None if role in (Role.MASK, Role.TOKEN_TYPES) else role)


@pytest.mark.parametrize("rank", range(2, 7))
@pytest.mark.parametrize(
    "name", ["past_key_values.0.key", "past.3.value", "past_0", "past_key_0", "cache_k", "k_cache_7", "past"]
)
def test_pasts(name: str, rank: int) -> None:
    dims = (*(f"d{i}" for i in range(rank)),)
    is_past = rank in (3, 4, 5)
    assert role_of(name, dims, FLOAT) is (Role.PAST if is_past else None)


@pytest.mark.parametrize("name", ["past_key_values.0.encoder.key", "past.cross_0", "pastoral", "my_past", "passed"])
def test_what_are_no_pasts(name: str) -> None:
    assert role_of(name, ("b", 2, "p", 4), FLOAT) is None
    assert text_inputs([IDS, Signature(name, FLOAT, ("b", 2, "p", 4))])[1] == (
        f"input {name!r} has no meaning that is known for text"
    )


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (("batch", 2, "past", 4), (1, 2, 0, 4)),
        (("N", 2, "past", 4), (1, 2, 0, 4)),
        (("b", "past", 2, 4), (1, 0, 2, 4)),
        ((None, 2, "past", 4), (1, 2, 0, 4)),
        ((1, 2, None, 4), (1, 2, 0, 4)),
        ((2, "batch_size", 2, "past", 4), (2, 1, 2, 0, 4)),
        (("batch", "past", 8), (1, 0, 8)),
    ],
)
def test_the_shape_of_a_past_of_no_tokens(dims: Dims, shape: tuple[int, ...]) -> None:
    assert empty_past(Signature("past", FLOAT, dims), IDS) == shape


def test_the_batch_of_a_past_is_called_as_that_of_the_ids() -> None:
    ids = Signature("input_ids", INT64, ("items", "sequence"))
    assert empty_past(Signature("past", FLOAT, ("items", 2, "past", 4)), ids) == (1, 2, 0, 4)


@pytest.mark.parametrize(
    ("dims", "why"),
    [
        (("batch", 2, 128, 4), r"has shape \['batch', 2, 128, 4\]: a cache of a fixed size is not supported"),
        ((1, 2, 3), "a cache of a fixed size is not supported"),
        (("batch", "heads", "past", 4), "which of its axes is the past cannot be told"),
        ((None, 2, None, None), r"has shape \['\?', 2, '\?', '\?'\]: which of its axes"),
        ((None, 1, 2, "past", 4), "which of its axes is the past cannot be told"),
        ((None, "past", 4), "which of its axes is the past cannot be told"),
        (("batch", 2, "past", None), "which of its axes is the past cannot be told"),
    ],
)
def test_pasts_of_which_no_axis_or_many_may_grow(dims: Dims, why: str) -> None:
    with pytest.raises(FrontendError, match=why):
        empty_past(Signature("past", FLOAT, dims), IDS)


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("present.0.key", ("b", 2, "p", 4), True), ("present_0", ("b", "p", 8), True), ("new_past_1", None, True),
        ("present.0.key", None, True), ("logits", ("b", "s", 9), False), ("logits", ("b", 2, "s", 9), True),
        ("logits", None, False), ("present.0.key", ("b", 9), False), ("presently", ("b", "s", 9), False),
        ("present", (), False), ("hidden_states", ("layers", "b", 2, "s", 4), True),
        ("attentions", ("b", 2, "s", "s"), True), ("pooled", ("b", 9), False),
    ],
)  # fmt: skip
def test_what_is_for_the_next_step(name: str, dims: Dims, expected: bool) -> None:
    assert is_present(Signature(name, FLOAT, dims)) is expected


def test_names_of_numbers_of_items() -> None:
    assert all(map(is_batch_size, ("batch", "batch_size", "N", "b", "Batch", "my_batch")))
    assert not any(map(is_batch_size, ("sequence", "nb", "bs", "number", "")))


# What the graph shows


SIZE = symbol("S", 2, 64)


def ids_of(dtype: str = "i32", name: str = "ids") -> Input:
    return Input(name, Tensor((1, SIZE), dtype))


def graph_of(value: Value, *inputs: Input) -> Graph:
    return Graph("g", inputs, (("y", value),))


def test_the_vocabulary_is_what_ids_index() -> None:
    ids, table = ids_of(), Param("t", Tensor((50, 8), "f32"))
    assert token_rows(graph_of(s.Gather(table, ids, 0), ids)) == 50
    assert token_rows(graph_of(s.Gather(table, e.Cast(e.Cast(ids, "i64"), "i32"), 0), ids)) == 50


def test_what_is_no_vocabulary() -> None:
    ids, table = ids_of(), Param("t", Tensor((50, 8), "f32"))
    other, given = ids_of(name="positions"), Input("t", Tensor((50, 8), "f32"))
    assert token_rows(graph_of(s.Gather(table, ids, 1), ids)) == 0
    assert token_rows(graph_of(s.Gather(table, other, 0), other)) == 0
    assert token_rows(graph_of(s.Gather(given, ids, 0), given, ids)) == 0
    assert token_rows(graph_of(s.Gather(table, e.Add(ids, ids), 0), ids)) == 0


def test_types_of_texts_of_one_piece_are_zero() -> None:
    ids, types = ids_of(), ids_of(name="token_types")
    found = without_token_types(graph_of(e.Add(ids, types), ids, types), types)
    assert types not in found.ops[-1].operands
    (zeros,) = (op for op in found.ops if isinstance(op, s.Broadcast))
    assert zeros.shape == types.shape
    assert not np.any(zeros.x.value.array)  # type: ignore[attr-defined]


def test_noise_may_stand_for_factors_and_tables() -> None:
    ids = ids_of()
    table, integers = Param("t", Tensor((50, 8), "f16")), Param("i", Tensor((50, 8), "i8"))
    weight, scale = Param("w", Tensor((9, 8), "f32")), Param("s", Tensor((8,), "f32"))
    rows = e.Cast(s.Gather(table, ids, 0), "f32")
    product = s.Matmul(e.Mul(rows, scale), s.Transpose(e.Cast(weight, "f32"), (1, 0)))
    more = e.Cast(s.Reshape(s.Gather(integers, ids, 0), (1, SIZE, 8)), "f32")
    graph = Graph("g", (ids,), (("y", product), ("z", more)))
    assert replaceable(graph) == {"t": "f16", "w": "f32"}
