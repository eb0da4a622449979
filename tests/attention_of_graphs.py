"""The attention that becomes of a graph, which has to compute what the graph did."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.types import FLOATS, Array, precise
from llmc.compiler.passes.fuse_attention import FuseAttention
from llmc.compiler.passes.manager import Report


def result(
    graph: Graph, limit: float = 1e-11, given: Mapping[str, Array] | None = None, **sizes: int
) -> Attention | str:
    """The first attention after fuse-attention, or why there is none; "" where nothing is said.

    In f64 both graphs give the same to `limit`, at these sizes of symbols, from random floats and from places counted
    along the last axis for all other inputs; `given` in place of these.
    """
    report = Report()
    after = FuseAttention().run(graph, report)
    found = [op for op in after.ops if isinstance(op, Attention)]
    if not found:
        assert after.ops == graph.ops
        return report.refusals[0][1] if report.refusals else ""
    generator = np.random.default_rng(5)
    inputs: dict[str, Array] = {}
    for value in graph.inputs:
        shape = tuple(dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape)
        inputs[value.name] = generator.standard_normal(shape)
        if value.dtype not in FLOATS:
            inputs[value.name] = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    inputs.update(given or {})
    with precise(), np.errstate(invalid="ignore"):
        before, now = (evaluate(each, inputs, inputs.__getitem__) for each in (graph, after))
    for name, expected in before.items():
        np.testing.assert_allclose(np.asarray(now[name]), np.asarray(expected), rtol=0, atol=limit)
    return found[0]
