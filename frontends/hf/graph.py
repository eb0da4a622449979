"""An exported program and its weights to a graph of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.elementwise import Cast, constant
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import FLOATS, Array, Tensor, dtype_of
from llmc.errors import FrontendError
from llmc.frontends.hf.aten import Translation, cast, from_torch
from llmc.frontends.hf.model import MetaModel
from llmc.frontends.hf.trace import Traced
from llmc.frontends.hf.weights import ArrayWeights, shortened
from llmc.frontends.lifted import WeightSource
from llmc.frontends.weight_sources import LayeredWeights

for _part in ("aten_math", "aten_shape", "aten_complex"):
    importlib.import_module(f"llmc.frontends.hf.{_part}")  # registers its handlers

_SMALL = 4096  # elements of a computed buffer that becomes a constant in the graph; larger ones are params
Outputs = dict[str, Value]
# The graph's outputs from the model's own, the input `positions` and the weights.
Finish = Callable[[Outputs, Input, WeightSource], Outputs]


def translate(
    traced: Traced, source: WeightSource, context: int, finish: Finish | None = None
) -> tuple[Graph, WeightSource]:
    """The graph for 2..context tokens, and where its params come from.

    finish: what makes the graph's outputs; those of the model itself are f32 [1, ...].
    """
    exported = traced.exported
    size = symbol("S", 2, context)
    assert isinstance(size, Dim)
    wanted = [name for name in ("ids", "positions", "token_types") if name != "token_types" or name in exported.inputs]
    inputs = {name: Input(name, Tensor((1, size), "i32")) for name in wanted}
    names = _canonical_names(traced.meta.model)
    signature = exported.program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    given_names = dict(zip(signature.user_inputs, exported.inputs, strict=True))
    large: dict[str, Array] = {}
    given: dict[torch.fx.Node, Any] = {}
    sizes: dict[str, Dim] = {}
    for node in exported.program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in given_names:
            given[node] = Cast(inputs[given_names[node.name]], "i64")
            sizes[str(node.meta["val"].shape[1])] = size
        elif node.name in weights:
            name = weights[node.name].removeprefix("model.")
            given[node] = _weight(names.get(name, name), traced.meta, source, large)
        elif node.name in signature.inputs_to_lifted_tensor_constants:
            given[node] = from_torch(
                exported.program.constants[signature.inputs_to_lifted_tensor_constants[node.name]], node.name
            )
    # What the model returns comes last; before it stand buffers that the model writes to.
    meanings = Translation(sizes).run(exported.program.graph_module, given)[-len(exported.outputs) :]
    outputs = {name: cast(value, "f32") for name, value in zip(exported.outputs, meanings, strict=True)}
    if finish is not None:
        outputs = finish(outputs, inputs["positions"], source)
    graph = Graph("model", tuple(inputs.values()), tuple(outputs.items()))
    return graph, LayeredWeights(ArrayWeights(large), source) if large else source


def without_outputs_of(graph: Graph, missing: Sequence[str]) -> Graph:
    """The graph without outputs that need params of these names; FrontendError if that is its main output."""
    params = {value for value in graph.params if value.name in set(missing)}
    if not params:
        return graph
    kept = tuple((name, value) for name, value in graph.outputs if params.isdisjoint(topological([value], {})))
    main = next(iter(graph.outputs))[0]
    if main not in dict(kept):
        listed = shortened(value.name for value in params)
        raise FrontendError(f"the checkpoint does not fit the model. missing: {listed}")
    return Graph(graph.name, graph.inputs, kept)


def _weight(name: str, meta: MetaModel, source: WeightSource, large: dict[str, Array]) -> Value:
    """A weight of the checkpoint as a param cast to f32, or a computed buffer as a constant."""
    if name in meta.buffers:
        array = meta.buffers[name]
        if dtype_of(array.dtype) in FLOATS:
            array = array.astype(np.float32)
        if array.size <= _SMALL:
            return constant(array, dtype_of(array.dtype))
        large[name] = array
        return Param(name, Tensor(array.shape, dtype_of(array.dtype)))
    dtype = source.dtype(name)
    param = Param(name, Tensor(source.shape(name), dtype))
    return Cast(param, "f32") if dtype in FLOATS and dtype != "f32" else param


def _canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """For each name of a parameter, the first name of the same one: tied weights are one param."""
    first: dict[int, str] = {}
    names = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(value), name)
    return names
