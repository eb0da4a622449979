"""A small module of torch, exported and made a graph, computes what it computes itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from transformers import masking_utils

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.structural import Gather
from llmc.frontends.hf.export import Call, Exported, _is_numbers, export, first_position, quietly
from llmc.frontends.hf.graph import translate
from llmc.frontends.hf.model import MetaModel
from llmc.frontends.hf.trace import Traced
from llmc.frontends.weight_sources import ArrayWeights

Array = np.ndarray
Made = Mapping[str, object]
IDS = torch.tensor([[3, 1, 4, 1, 5]])
POSITIONS = torch.arange(5)[None]
TYPES = torch.tensor([[0, 0, 1, 1, 2]])
ALL = {"input_ids": "ids", "position_ids": "positions", "token_type_ids": "token_types"}


class Model(torch.nn.Module):
    """Computes results by their names with a function of what it is given."""

    def __init__(self, function: Callable[..., Made]) -> None:
        super().__init__()
        self.function = function

    def forward(self, return_dict: bool = False, **given: torch.Tensor) -> Made:
        assert return_dict
        return self.function(**given)


def graph_of(model: torch.nn.Module, exported: Exported, longest: int = 8) -> Graph:
    graph, _ = translate(Traced(MetaModel(model, {}, False), exported, None, ()), ArrayWeights({}), longest)  # type: ignore[arg-type]
    return graph


def found(function: Callable[..., Made], call: Call, longest: int = 8) -> dict[str, Array]:
    """The results of a function by way of its graph, of ids, positions and token types."""
    graph = graph_of(Model(function), export(Model(function), call, longest), longest)
    given = {"ids": IDS, "positions": POSITIONS, "token_types": TYPES}
    data = {value.name: given[value.name].int().numpy() for value in graph.inputs}
    return {name: np.asarray(value) for name, value in evaluate(graph, data, lambda name: np.zeros(0)).items()}


def test_arguments_get_what_they_are_called_for() -> None:
    def function(input_ids: torch.Tensor, token_type_ids: torch.Tensor, position_ids: torch.Tensor) -> Made:
        return {"sum": input_ids * 100 + position_ids * 10 + token_type_ids}

    np.testing.assert_array_equal(found(function, Call(ALL))["sum"], (IDS * 100 + POSITIONS * 10 + TYPES).numpy())
    assert export(Model(function), Call(ALL), 8).inputs == ("ids", "positions", "token_types")


def test_positions_are_counted_from_the_models_first_one() -> None:
    call = Call({"input_ids": "ids", "position_ids": "positions"}, first=7)
    made = found(lambda input_ids, position_ids: {"ids": input_ids, "at": position_ids}, call)
    np.testing.assert_array_equal(made["at"], POSITIONS.numpy() + 7)
    np.testing.assert_array_equal(made["ids"], IDS.numpy())
    without = found(lambda input_ids: {"ids": input_ids}, Call({"input_ids": "ids"}, first=7))
    np.testing.assert_array_equal(without["ids"], IDS.numpy())


def test_one_type_of_all_tokens_is_said_once() -> None:
    call = Call({"input_ids": "ids"}, one_type=True)
    made = found(
        lambda input_ids, token_type_ids: {"types": input_ids * 0 + token_type_ids, "once": token_type_ids}, call
    )
    np.testing.assert_array_equal(made["types"], IDS.numpy() * 0)
    assert made["once"].shape == (1, 1)


def test_other_arguments_are_fixed() -> None:
    call = Call({"input_ids": "ids"}, fixed={"factor": 3})
    np.testing.assert_array_equal(found(lambda input_ids, factor: {"y": input_ids * factor}, call)["y"], IDS * 3)


RESULTS = {"a": lambda ids: ids + 1, "nothing": lambda ids: None, "b": lambda ids: ids + 2, "c": lambda ids: (ids, ids)}


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [(None, ("a", "b")), (("b", "a"), ("b", "a")), (("b", "other"), ("b",)), (("nothing", "c"), ()), (("a",), ("a",))],
)
def test_results_are_kept_by_name(wanted: tuple[str, ...] | None, kept: tuple[str, ...]) -> None:
    """Tensors alone, in the order asked for; all of them where none is named."""
    model = Model(lambda input_ids: {name: make(input_ids) for name, make in RESULTS.items()})
    exported = export(model, Call({"input_ids": "ids"}, outputs=wanted), 8)
    assert exported.outputs == kept
    if kept:
        graph = graph_of(model, exported)
        made = evaluate(graph, {"ids": IDS.int().numpy(), "positions": POSITIONS.int().numpy()}, lambda name: IDS)
        for name in kept:
            np.testing.assert_array_equal(np.asarray(made[name]), RESULTS[name](IDS).numpy())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("longest", [3, 7, 8, 500])
def test_a_trace_holds_for_2_to_the_most_tokens(longest: int) -> None:
    model = Model(lambda input_ids: {"y": input_ids + torch.arange(input_ids.shape[1], device="meta")})
    exported = export(model, Call({"input_ids": "ids"}), longest)
    (limits,) = exported.program.range_constraints.values()
    assert (limits.lower, limits.upper, exported.longest) == (2, longest, longest)
    (size,) = graph_of(model, exported, longest).symbols
    assert (size.low, size.high) == (2, longest)


def full(most: int) -> Model:
    """Treats a full table of positions in a way of its own."""

    def function(input_ids: torch.Tensor) -> Made:
        return {"y": input_ids * 2 if input_ids.shape[1] == most else input_ids + 1}

    return Model(function)


@pytest.mark.parametrize("longest", [8, 9])
def test_a_full_table_that_is_treated_differently_costs_one_token(longest: int) -> None:
    model = full(longest)
    exported = export(model, Call({"input_ids": "ids"}), longest)
    (limits,) = exported.program.range_constraints.values()
    assert (limits.lower, limits.upper, exported.longest) == (2, longest - 1, longest - 1)
    made = found(model.function, Call({"input_ids": "ids"}), longest)
    np.testing.assert_array_equal(made["y"], IDS.numpy() + 1)


@pytest.mark.parametrize(("most", "longest"), [(7, 7), (6, 9), (8, 9)])
def test_a_trace_that_holds_for_fewer_tokens_is_an_error(most: int, longest: int) -> None:
    with pytest.raises(torch._dynamo.exc.UserError):
        export(full(most), Call({"input_ids": "ids"}), longest)


def test_positions_that_restart_are_not_looked_for() -> None:
    def function(input_ids: torch.Tensor, position_ids: torch.Tensor) -> Made:
        assert masking_utils.find_packed_sequence_indices(position_ids) is None
        return {"y": input_ids}

    export(Model(function), Call({"input_ids": "ids", "position_ids": "positions"}), 8)


def test_a_model_is_exported_as_it_is_used_and_not_as_it_is_trained() -> None:
    class Training(Model):
        def forward(self, return_dict: bool = False, **given: torch.Tensor) -> Made:
            assert not self.training and not torch.is_grad_enabled()
            return super().forward(return_dict, **given)

    export(Training(lambda input_ids: {"y": input_ids}), Call({"input_ids": "ids"}), 8)


# Numbers in a model's code.

NUMBERS: dict[str, Callable[[object], torch.Tensor]] = {
    "a number": lambda device: torch.tensor(7, device=device),
    "a float": lambda device: torch.tensor(0.5, device=device),
    "a truth": lambda device: torch.tensor(True, device=device),
    "a list": lambda device: torch.tensor([3, 1, 4, 1, 5], device=device),
    "a tuple": lambda device: torch.tensor((0.5, 2, 3, 4, 5), device=device),
    "truths and numbers": lambda device: torch.tensor([True, 2, False, 3, 4], device=device),
    "a matrix": lambda device: torch.tensor([[1], [2]], device=device),
    "of a dtype": lambda device: torch.tensor([1, 0, 2, 0, 3], device=device, dtype=torch.bool),
    "a float of integers": lambda device: torch.as_tensor([1, 2, 3, 4, 5], device=device, dtype=torch.float32),
    "nothing": lambda device: torch.tensor([], device=device).sum(),
    "a list for an index": lambda device: torch.arange(9, device=device)[[4, -1, 0, 2, 2]],
    "a list of one number": lambda device: torch.arange(9, device=device)[[4]],
    "the last by a list": lambda device: torch.arange(9, device=device)[[-1]],
    "one column by a list": lambda device: torch.arange(9, device=device).view(3, 3)[:, [1]],
    "columns by a list": lambda device: torch.arange(15, device=device).view(3, 5)[1:, [4, 3, 2, 1, 0]],
    "two lists": lambda device: torch.arange(9, device=device).view(3, 3)[[2, 1, 0, 1, 2], [0, 1, 2, 1, 0]],
    "two lists of one number": lambda device: torch.arange(9, device=device).view(3, 3)[[2], [1]],
    "a list beside a tensor": lambda device: torch.arange(9, device=device).view(3, 3)[
        torch.tensor([2, 1, 0, 1, 2], device=device), [1]
    ],
    "no list": lambda device: torch.arange(9, device=device).view(3, 3)[1, 2],
}


def test_numbers_that_code_makes_tensors_of_keep_their_values() -> None:
    """Those of the meta device have none."""

    def function(input_ids: torch.Tensor) -> Made:
        made = {name: make(input_ids.device) for name, make in NUMBERS.items()}
        assert {value.device.type for value in made.values()} == {"meta"}
        assert {name: value.dtype for name, value in made.items()} == {
            name: value.dtype for name, value in want.items()
        }
        return made

    want = {name: make("cpu") for name, make in NUMBERS.items()}
    got = found(function, Call({"input_ids": "ids"}))
    assert list(got) == list(NUMBERS)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value.numpy(), err_msg=name)


def test_a_list_of_one_number_is_a_slice() -> None:
    model = Model(lambda input_ids: {"y": input_ids[:, [1]]})
    graph = graph_of(model, export(model, Call({"input_ids": "ids"}), 8))
    assert not [op for op in graph.ops if isinstance(op, Gather)]


@pytest.mark.parametrize(("length", "kept"), [(4096, True), (4097, False)])
def test_long_lists_of_numbers_are_tables_and_not_code(length: int, kept: bool) -> None:
    """Each number would be an op."""
    assert _is_numbers([0.5] * length) is kept and _is_numbers((True, [7, (0.5,)])) and not _is_numbers([["7"]])


def test_a_tensor_made_of_a_tensor_is_that() -> None:
    got = found(lambda input_ids: {"y": torch.as_tensor(input_ids, dtype=torch.float32)}, Call({"input_ids": "ids"}))
    np.testing.assert_array_equal(got["y"], IDS.numpy())


# Silence.


def test_what_is_done_quietly_says_nothing_and_all_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.root.manager.disable
    with pytest.raises(RuntimeError, match="inside"), quietly():
        warnings.warn("a warning", UserWarning, stacklevel=1)
        logging.getLogger("transformers").error("an error")
        logging.getLogger("transformers").critical("the worst")
        raise RuntimeError("inside")
    assert caplog.messages == ["the worst"]
    assert logging.root.manager.disable == before
    with pytest.warns(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)


# The position that a model gives its first token.


class Counting(torch.nn.Module):
    """A model of RoBERTa's kind, whose first token stands behind the position of padding."""

    def __init__(self, padding: int, rows: int = 50, types: bool = False) -> None:
        super().__init__()
        self.padding, self.types = padding, types
        self.words, self.table = torch.nn.Embedding(99, 4), torch.nn.Embedding(rows, 4)

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = input_ids.ne(self.padding).int()
        return torch.cumsum(mask, 1) * mask + self.padding

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None) -> torch.Tensor:
        if self.types:
            assert token_type_ids is not None and token_type_ids.shape == input_ids.shape and not token_type_ids.any()
        made = self.words(input_ids) + self.table(self.positions(input_ids).long())
        raise RuntimeError(f"needs its weights: {made.sum()}")


@pytest.mark.parametrize("types", [False, True])
def test_a_model_that_counts_from_behind_the_padding(types: bool) -> None:
    """Also where the padding's id is among those that it is asked with."""
    for padding in range(21):
        model = Counting(padding, types=types).to("meta")
        assert first_position(model, types) == (padding + 1, 50 - padding - 1), padding


class Changing(Counting):
    """Becomes another model when it is called with a short text, as BigBird does."""

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None) -> torch.Tensor:
        words, self.kind = self.words, "short"
        self.words = torch.nn.Embedding(99, 4, device="meta")
        assert words is not self.words
        return super().forward(input_ids, token_type_ids)


def test_a_model_that_changes_itself_is_as_before() -> None:
    model = Changing(1).to("meta")
    model.kind, words = "long", model.words
    assert first_position(model, False) == (2, 48)
    assert model.kind == "long" and model.words is words and dict(model.named_modules())["words"] is words


class Plain(Counting):
    """Counts from 0, as most do."""

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(input_ids.shape[1])[None]


class Backwards(Counting):
    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(input_ids.shape[1]).flip(0)[None] + 2


class Single(Counting):
    """Positions of another shape than the ids."""

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(2, 2 + input_ids.shape[1])


@pytest.mark.parametrize("kind", [Plain, Backwards, Single])
def test_a_model_that_does_not_count_so(kind: type[Counting]) -> None:
    assert first_position(kind(1).to("meta"), False) == (0, None)


def test_lookups_of_what_has_no_values_say_nothing() -> None:
    class Unknown(Counting):
        def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().positions(input_ids).to("meta")

    assert first_position(Unknown(1).to("meta"), False) == (0, None)
