"""How a model is called to be traced, and when its attention counts as captured."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmc.errors import FrontendError
from llmc.frontends.hf import capture
from llmc.frontends.hf import trace as tracing
from llmc.frontends.hf.classes import BASE, CAUSAL, ModelClass
from llmc.frontends.hf.export import Call, Exported
from llmc.frontends.hf.model import MetaModel
from llmc.frontends.hf.trace import Traced, _why_not_captured, _without_mutations
from llmc.frontends.lifted import ENCODE, GENERATE

DECODER, ENCODER = ModelClass(GENERATE, CAUSAL, None, True), ModelClass(ENCODE, BASE, None, False)


def config(layers: int = 1) -> Any:
    text = SimpleNamespace(num_hidden_layers=layers)
    return SimpleNamespace(model_type="toy", get_text_config=lambda decoder: text if decoder else None)


class Toy(torch.nn.Module):
    """A model of one parameter under two names. types: its config's token types."""

    def __init__(self, types: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace() if types is None else SimpleNamespace(type_vocab_size=types)
        self.inner = torch.nn.Linear(2, 2, device="meta")
        self.outer = torch.nn.Linear(2, 2, device="meta")
        self.outer.weight = self.inner.weight

    def forward(self, input_ids: torch.Tensor) -> None: ...


class Taking(Toy):
    """One that takes every argument that there is."""

    def forward(self, input_ids, position_ids=None, token_type_ids=None, use_cache=None) -> None: ...  # type: ignore[no-untyped-def, override]


class Counting(Toy):
    """One of RoBERTa's kind, with token types: positions begin at 2 in a table of 40."""

    def forward(self, input_ids, token_type_ids=None, position_ids=None):  # type: ignore[no-untyped-def, override]
        assert token_type_ids is not None
        torch.nn.functional.embedding(torch.arange(2, 2 + input_ids.shape[1])[None], torch.empty(40, 2, device="meta"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Call, int]]:
    """How models are exported, which no model is here."""
    made: list[tuple[Call, int]] = []

    def export(model: torch.nn.Module, call: Call, longest: int) -> Exported:
        made.append((call, longest))
        return Exported(None, longest, (), call.outputs or ("x",))  # type: ignore[arg-type]

    monkeypatch.setattr(tracing, "export", export)
    return made


def called(
    calls: list[tuple[Call, int]], kind: ModelClass, model: torch.nn.Module, *, types: bool = False, context: int = 64
) -> tuple[Call, int, int | None]:
    _, room = tracing._export(kind, MetaModel(model, {}, False), context, types, ("a", "b"))  # type: ignore[arg-type]
    return (*calls[-1], room)


def test_a_decoder_gives_logits_of_ids_and_positions(calls: list[tuple[Call, int]]) -> None:
    """Whatever its cache and token types would be; its positions begin at 0."""
    for model in (Taking(2), Toy()):
        both = {"input_ids": "ids", "position_ids": "positions"}
        arguments = both if isinstance(model, Taking) else {"input_ids": "ids"}
        call, longest, room = called(calls, DECODER, model)
        assert call == Call(arguments, 0, False, {"use_cache": False}, ("logits",))
        assert (longest, room) == (64, None)
    assert called(calls, DECODER, Counting())[0].first == 0


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("known", [None, 0, 1, 2])
def test_an_encoder_gets_token_types_or_one_type(calls: list[tuple[Call, int]], types: bool, known: int | None) -> None:
    call, _, _ = called(calls, ENCODER, Taking(known), types=types)
    assert ("token_type_ids" in call.arguments) is types
    assert call.one_type is bool(known and not types)
    assert (call.fixed, call.outputs) == ({"use_cache": False}, ("a", "b"))
    plain, _, _ = called(calls, ENCODER, Toy(known), types=types)
    assert plain == Call({"input_ids": "ids"}, 0, False, {}, ("a", "b"))


@pytest.mark.parametrize("context", [20, 38, 39])
def test_an_encoders_table_of_positions_limits_its_texts(calls: list[tuple[Call, int]], context: int) -> None:
    call, longest, room = called(calls, ENCODER, Counting(1), context=context)
    assert (call.first, longest, room) == (2, min(context, 38), 38)


@pytest.mark.parametrize(("kind", "wanted"), [(DECODER, "logits"), (ENCODER, "a or b")])
def test_a_model_without_the_results_is_refused(kind: ModelClass, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "export", lambda model, call, longest: Exported(None, longest, (), ()))  # type: ignore[arg-type]
    with pytest.raises(FrontendError, match=f"Toy returns no {wanted}$"):
        tracing._export(kind, MetaModel(Toy(), {}, False), 64, False, ("a", "b"))  # type: ignore[arg-type]
    with pytest.raises(FrontendError, match=r"Toy returns no tensor$"):
        tracing._export(ENCODER, MetaModel(Toy(), {}, False), 64, False, None)  # type: ignore[arg-type]


# Which attention is traced.


class Attempts:
    """Builds toys, and notes for which attention. fails: what exporting one raises. reasons: why it is not captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: dict[str, Exception] = {}
        self.reason, self.built, self.models = "", [], []  # type: ignore[var-annotated]
        monkeypatch.setattr(tracing, "build", self.build)
        monkeypatch.setattr(tracing, "_export", self.export)
        monkeypatch.setattr(tracing, "_without_mutations", lambda exported: exported)
        monkeypatch.setattr(
            tracing, "_why_not_captured", lambda program, layers: f"{self.reason}" if layers == 3 else "?"
        )

    def build(self, kind: ModelClass, config: object, implementation: str, context: int) -> MetaModel:
        self.built.append(implementation)
        self.models.append(Toy())
        return MetaModel(self.models[-1], {}, False)

    def export(self, *given: object) -> tuple[Exported, int]:
        self.given = given
        if self.built[-1] in self.fails:
            raise self.fails[self.built[-1]]
        return Exported(SimpleNamespace(), 64, (), ("logits",)), 7  # type: ignore[arg-type]

    def trace(self, **options: Any) -> Traced:
        return tracing.trace(DECODER, config(3), 64, **options)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    return Attempts(monkeypatch)


def test_a_captured_attention_needs_no_other(attempts: Attempts) -> None:
    traced = attempts.trace()
    assert attempts.built == [capture.IMPLEMENTATION]
    assert attempts.given == (DECODER, traced.meta, 64, False, None)
    assert (traced.meta.model, traced.room, traced.notes) == (attempts.models[0], 7, ())


def test_an_attention_that_is_not_captured_is_torchs_or_else_the_plain_one(attempts: Attempts) -> None:
    attempts.reason = "another mask"
    for fails, built in ((None, ["llmc", "sdpa"]), ("sdpa", ["llmc", "sdpa", "eager"])):
        attempts.built.clear()
        attempts.fails = {fails: RuntimeError("no")} if fails else {}
        traced = attempts.trace()
        assert attempts.built == built
        assert traced.notes == ("attention is not captured but recognised from its parts: another mask",)
        assert (traced.meta.model, traced.room) == (attempts.models[-1], 7)


def test_a_model_that_knows_no_other_attention_says_why(attempts: Attempts) -> None:
    attempts.fails = {capture.IMPLEMENTATION: KeyError("llmc")}
    (note,) = attempts.trace().notes
    assert "recognised from its parts: the settings of its config.json: KeyError: 'llmc'" in note
    attempts.fails |= {"sdpa": ValueError("first"), "eager": ValueError("last")}
    with pytest.raises(FrontendError, match=r"model type 'toy' cannot be compiled: .*: ValueError: last$"):
        attempts.trace()


def test_what_is_refused_is_not_tried_again(attempts: Attempts) -> None:
    attempts.fails = {capture.IMPLEMENTATION: FrontendError("refused")}
    with pytest.raises(FrontendError, match=r"^refused$"):
        attempts.trace()
    assert attempts.built == [capture.IMPLEMENTATION]


def test_parameters_may_be_untied(attempts: Attempts) -> None:
    """Each of the names that are asked for becomes a parameter without values of its own."""
    attempts.trace()
    assert attempts.models[0].outer.weight is attempts.models[0].inner.weight
    model = attempts.trace(untied=lambda model: ["outer.weight"]).meta.model
    assert isinstance(model, Toy) and model.outer.weight is not model.inner.weight
    assert model.outer.weight.shape == (2, 2) and model.outer.weight.device.type == "meta"
    assert not model.outer.weight.requires_grad and model.inner.weight.requires_grad


# What was captured.

MASK, ATTENTION = torch.ops.llmc.mask.default, torch.ops.llmc.attention.default


def program(*layers: Callable[[torch.fx.Graph, torch.fx.Node], object]) -> Any:
    """An exported program in which each layer adds nodes of an input."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = [layer(graph, x) for layer in layers]
    graph.output(made)
    return SimpleNamespace(graph_module=torch.fx.GraphModule(torch.nn.Module(), graph))


def attention(window: int | None = None) -> Callable[[torch.fx.Graph, torch.fx.Node], torch.fx.Node]:
    """A layer's, with a mask of that window if any."""

    def add(graph: torch.fx.Graph, x: torch.fx.Node) -> torch.fx.Node:
        mask = None if window is None else graph.call_function(MASK, (x, 4, 4, True, window))
        return graph.call_function(ATTENTION, (x, x, x, mask, None, 1.0, True, 0, 0.0))

    return add


def own_work(graph: torch.fx.Graph, x: torch.fx.Node) -> torch.fx.Node:
    mask = graph.call_function(MASK, (x, 4, 4, True, 0))
    return graph.call_function(operator.add, (x, graph.call_function(torch.ops.aten.neg.default, (mask,))))


@pytest.mark.parametrize("windows", [(), (None,), (0, 5), (None, 0, 3), (1, 2)])
def test_every_layer_is_captured(windows: tuple[int | None, ...]) -> None:
    made = program(*map(attention, windows))
    assert _why_not_captured(made, len(windows)) == ""
    assert _why_not_captured(made, len(windows) + 1) == (
        f"{len(windows)} of {len(windows) + 1} layers use the attention interface"
    )
    assert "of 0 layers" in _why_not_captured(made, 0) or not windows


def test_a_layer_inside_another_graph_counts() -> None:
    outer = program(attention())
    outer.graph_module.inner = program(attention(0)).graph_module
    assert _why_not_captured(outer, 2) == ""


def test_a_mask_without_a_meaning_is_not_captured() -> None:
    made = program(attention(3), attention(capture.UNKNOWN))
    assert _why_not_captured(made, 2) == "a layer's mask is none of those that are known"


def test_a_model_that_works_on_its_mask_is_not_captured() -> None:
    made = program(attention(0), own_work)
    assert _why_not_captured(made, 1) == "the model itself works on its mask (aten.neg.default)"


def test_a_mask_that_no_layer_uses_does_not_matter() -> None:
    made = program(attention(0), lambda graph, x: graph.call_function(MASK, (x, 4, 4, False, capture.UNKNOWN)) and x)
    assert _why_not_captured(made, 1) == ""


# Ops that write into their operands.


def test_programs_without_writes_stay_as_they_are() -> None:
    with torch.no_grad():
        made = torch.export.export(Wrapped(lambda x: x + 1), (torch.zeros(3),), strict=False)
        writing = torch.export.export(Wrapped(lambda x: (x * 1).add_(1)), (torch.zeros(3),), strict=False)
    exported = Exported(made, 8, ("x",), ("y",))
    assert _without_mutations(exported) is exported
    assert any("add_" in str(node.target) for node in writing.graph.nodes)
    pure = _without_mutations(Exported(writing, 8, ("x",), ("y",)))
    assert not any("add_" in str(node.target) for node in pure.program.graph.nodes)
    assert (pure.longest, pure.inputs, pure.outputs) == (8, ("x",), ("y",))


class Wrapped(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)
