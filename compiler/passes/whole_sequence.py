"""For a graph that could not be flattened to tokens: each step computes one whole sequence, without a cache."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.dims import product, symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Gather, Reshape
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.manager import Pass, Report


@dataclass(frozen=True)
class WholeSequence(Pass, name="whole-sequence"):
    """Logits [1, S, vocabulary] become those of the rows asked for, [R, vocabulary]; other graphs stay as they are.

    `sequences`: an encoder, whose outputs [1, S, ...] lose their first axis.
    """

    sequences: bool = False

    def run(self, graph: Graph, report: Report) -> Graph:
        return self._encoder(graph, report) if self.sequences else self._decoder(graph, report)

    def _encoder(self, graph: Graph, report: Report) -> Graph:
        ids = next((value for value in graph.inputs if value.name == "ids"), None)
        if ids is None or ids.rank != 2:
            return graph
        report.hit("graph")
        report.refuse("the graph", "it was not flattened to tokens: every step takes one sequence")

        def rows(value: Value) -> Value:
            per_token = value.shape[:2] == (1, ids.shape[1])
            return Reshape(value, value.shape[1:]) if per_token else value

        return graph.replace_outputs((name, rows(value)) for name, value in graph.outputs)

    def _decoder(self, graph: Graph, report: Report) -> Graph:
        logits = dict(graph.outputs).get("logits")
        if logits is None or logits.rank != 3 or any(value.name == "rows" for value in graph.inputs):
            return graph
        report.hit("graph")
        report.refuse("the graph", "it was not flattened to tokens: every step computes the whole sequence anew")
        rows = Input("rows", Tensor((symbol("R", 1),), "i32"))
        flat = Reshape(logits, (product(logits.shape[:-1]), logits.shape[-1]))
        outputs = [(name, Gather(flat, rows, 0) if name == "logits" else value) for name, value in graph.outputs]
        return Graph(graph.name, (*graph.inputs, rows), tuple(outputs))
