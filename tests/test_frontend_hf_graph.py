"""Weights, buffers and constants of a module in its graph, and outputs that weights are missing for."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn.functional import embedding

from llmc.compiler.ir.elementwise import Add, Cast, Constant, constant
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param
from llmc.compiler.ir.structural import Mean
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.hf.export import Call, export
from llmc.frontends.hf.graph import Outputs, translate, without_outputs_of
from llmc.frontends.hf.model import MetaModel
from llmc.frontends.hf.trace import Traced, _without_mutations
from llmc.frontends.lifted import WeightSource
from llmc.frontends.weight_sources import ArrayWeights

Array = np.ndarray
MOST = 4096  # elements of a computed buffer that is a constant of the graph


class Model(torch.nn.Module):
    """Uses tensors of every kind that a model may have: its results are sums over them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(9, 4, generator=generator))
        self.model = torch.nn.Linear(4, 4)  # whose name is also that of the whole
        self.tied = torch.nn.Linear(4, 9, bias=False)
        self.tied.weight = self.table
        self.register_buffer("stored", torch.randn(4, generator=generator))
        self.register_buffer("small", torch.randn(4, generator=generator).double(), persistent=False)
        self.register_buffer("integers", torch.tensor([1, -2, 3, 1 << 30]), persistent=False)
        self.register_buffer("most", torch.randn(MOST // 4, 4, generator=generator), persistent=False)
        self.register_buffer("large", torch.randn(MOST + 1, 1, generator=generator).double(), persistent=False)
        self.fixed = torch.tensor(2.5)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, return_dict: bool
    ) -> dict[str, torch.Tensor]:
        hidden = self.model(embedding(input_ids, self.table)) * self.stored + self.small.float() * self.fixed
        return {
            "hidden": hidden,
            "logits": self.tied(hidden) + position_ids[..., None],
            "buffers": embedding(input_ids, self.most) + embedding(input_ids, self.large) + self.integers,
            "halves": hidden.half(),
        }


STORED = ("table", "model.weight", "model.bias", "stored")
CALL = Call({"input_ids": "ids", "position_ids": "positions"})
IDS = np.array([[3, 1, 4, 1, 5]], np.int32)
DATA = {"ids": IDS, "positions": np.arange(5, dtype=np.int32)[None]}


def parts() -> tuple[Model, MetaModel, ArrayWeights]:
    """A model, the same without values, and its weights, of which one is stored in bf16."""
    model = Model()
    with torch.no_grad():
        model.model.weight.copy_(model.model.weight.bfloat16())
    state = model.state_dict()
    arrays: dict[str, Array] = {name: state[name].numpy() for name in STORED}
    arrays["model.weight"] = arrays["model.weight"].astype(ml_dtypes.bfloat16)
    buffers = {name: value.numpy() for name, value in model.named_buffers() if name not in STORED}
    meta = copy.deepcopy(model).to("meta")
    meta.tied.weight, meta.fixed = meta.table, model.fixed
    return model, MetaModel(meta, buffers, False), ArrayWeights(arrays)  # type: ignore[arg-type]


def test_a_models_tensors_have_their_values_wherever_they_come_from() -> None:
    model, meta, source = parts()
    graph, weights = translate(Traced(meta, export(meta.model, CALL, 8), None, ()), source, 6)
    with torch.no_grad():
        wanted = model(torch.from_numpy(IDS).long(), torch.arange(5)[None], return_dict=True)
    found = evaluate(graph, DATA, weights.load)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        near = 1e-2 if name == "halves" else 1e-5
        np.testing.assert_allclose(np.asarray(found[name]), value.float().numpy(), rtol=near, atol=near, err_msg=name)
    assert {value.dtype for _, value in graph.outputs} == {"f32"}
    # Tied weights are one param; a large buffer is one too, whose values are those computed, in f32.
    assert {param.name: param.dtype for param in graph.params} == {
        "table": "f32", "model.weight": "bf16", "model.bias": "f32", "stored": "f32", "large": "f32",
    }  # fmt: skip
    sizes = {op.x.dtype for op in graph.ops if isinstance(op, Cast) and isinstance(op.x, Param)}
    assert sizes == {"bf16"}
    assert not [op for op in graph.ops if isinstance(op, Constant) and op.dtype == "f64"]
    (size,) = graph.symbols
    assert (size.name, size.low, size.high) == ("S", 2, 6)
    assert [value.name for value in graph.inputs] == ["ids", "positions"]


def test_weights_stay_the_sources_where_no_buffer_is_large() -> None:
    class Small(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, return_dict: bool) -> Outputs:
            return {"y": input_ids + token_type_ids}

    source = ArrayWeights({})
    call = Call({"input_ids": "ids", "token_type_ids": "token_types"})
    traced = Traced(MetaModel(Small(), {}, False), export(Small(), call, 8), None, ())  # type: ignore[arg-type]
    graph, weights = translate(traced, source, 8)
    assert weights is source
    assert [value.name for value in graph.inputs] == ["ids", "positions", "token_types"]


def test_outputs_may_be_made_of_the_models_own() -> None:
    def finish(outputs: Outputs, positions: Input, weights: WeightSource) -> Outputs:
        assert list(outputs) == ["hidden", "logits", "buffers", "halves"] and weights is source
        return {"mean": Mean(outputs["hidden"], (1,), False), "at": positions}

    model, meta, source = parts()
    graph, weights = translate(Traced(meta, export(meta.model, CALL, 8), None, ()), source, 8, finish)
    found = evaluate(graph, DATA, weights.load)
    with torch.no_grad():
        hidden = model(torch.from_numpy(IDS).long(), torch.arange(5)[None], return_dict=True)["hidden"]
    np.testing.assert_allclose(np.asarray(found["mean"]), hidden.mean(1).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found["at"]), DATA["positions"])


def test_a_model_that_writes_to_its_buffers_returns_what_it_returns() -> None:
    """Exported, such buffers are results too, in front of the model's own."""

    class Writing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1, dtype=torch.long), persistent=False)
            self.register_buffer("last", torch.zeros(1, dtype=torch.long), persistent=False)

        def forward(self, input_ids: torch.Tensor, return_dict: bool) -> dict[str, torch.Tensor]:
            self.seen += 1
            self.last.copy_(input_ids[0, :1])
            return {"y": input_ids + self.seen, "z": input_ids - self.last}

    buffers = {name: np.array([4], np.int64) for name in ("seen", "last")}
    exported = _without_mutations(export(Writing().to("meta"), Call({"input_ids": "ids"}), 8))
    graph, weights = translate(Traced(MetaModel(Writing(), buffers, False), exported, None, ()), ArrayWeights({}), 8)  # type: ignore[arg-type]
    found = evaluate(graph, DATA, weights.load)
    assert list(found) == ["y", "z"]
    np.testing.assert_array_equal(np.asarray(found["y"]), IDS + 5)
    np.testing.assert_array_equal(np.asarray(found["z"]), IDS - 3)


# Outputs whose weights are missing.

X = Input("x", Tensor((2,), "f32"))
A, B = (Param(name, Tensor((2,), "f32")) for name in "ab")
GRAPH = Graph("g", (X,), (("main", Add(X, A)), ("other", Add(X, B)), ("plain", Add(X, constant(1.0)))))


@pytest.mark.parametrize("missing", [(), ("c",), ("x",)])
def test_a_graph_that_misses_nothing_is_itself(missing: tuple[str, ...]) -> None:
    assert without_outputs_of(GRAPH, missing) is GRAPH


def test_outputs_that_miss_weights_are_left_out() -> None:
    kept = without_outputs_of(GRAPH, ["b", "c"])
    assert [name for name, _ in kept.outputs] == ["main", "plain"]
    assert (kept.name, kept.inputs, kept.output("main")) == ("g", (X,), GRAPH.output("main"))


def test_a_graph_whose_main_output_misses_weights_is_refused() -> None:
    with pytest.raises(FrontendError, match=r"the checkpoint does not fit the model\. missing: a, b$"):
        without_outputs_of(GRAPH, ["b", "a", "c"])
