"""Weights whose source has the inputs in an order of its own keep that order: activations are put into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.elementwise import constant
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.integers import ScaleIntegers
from llmc.compiler.ir.llm import GatedLinear, Linear
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Gather
from llmc.compiler.ir.types import Array
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.probe import read_weight
from llmc.compiler.passes.rewriting import uncast
from llmc.compiler.passes.schemes import describe
from llmc.errors import IRError


@dataclass(frozen=True)
class OrderInputs(Pass, name="order-inputs"):
    """linear(x, gather(w, places)) of a w of llm.scale_integers -> linear(gather(x, order), w).

    `places` names each column of w once; order is its inverse. So `keep-integers` finds blocks of inputs that share a
    scale where the source has them.
    """

    def run(self, graph: Graph, report: Report) -> Graph:
        def rule(op: Op) -> Value | None:
            if not isinstance(op, (Linear, GatedLinear)) or op.w not in graph.constants:
                return None
            gather = uncast(op.w)
            if not isinstance(gather, Gather) or not isinstance(uncast(gather.x), ScaleIntegers):
                return None
            if gather.axis % gather.rank != 1 or gather.rank != 2:
                report.refuse(describe(op, op.w), "its rows are in another order, not its inputs")
                return None
            places = _read(gather.indices)
            if places is None or places.shape != gather.x.shape[1:] or set(places.tolist()) != set(range(len(places))):
                report.refuse(describe(op, op.w), "its columns are not each one of the source's, or cannot be read now")
                return None
            report.hit("inputs in the order of the source")
            order = constant(np.argsort(places).astype(np.int32), "i32")
            return op.replace(x=Gather(op.x, order, op.x.rank - 1), w=gather.x)

        return rewrite(graph, rule)


def _read(value: Value) -> Array | None:
    """Indices that are known when compiling; None where they cannot be read now."""
    try:
        return np.asarray(evaluate_values([value], {}, read_weight, {})["0"])
    except IRError:
        return None
