"""Running passes in tests: every run is checked, before against after, in f64 at several sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llmc.compiler import passes as _registered  # noqa: F401
from llmc.compiler.check import Checker
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Cast, Constant, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.manager import Report, parse_pipeline, run_passes

S = symbol("S", 2, 40)
SEEDS = (0, 1)  # different sizes and values


def run_checked(
    graph: Graph, pipeline: str, seeds: Sequence[int] = SEEDS, tolerance: float = 1e-6
) -> tuple[Graph, list[Report]]:
    """The graph after the passes; fails where a pass changes what is computed."""
    checkers = [Checker(seed=seed, tolerance=tolerance) for seed in seeds]
    return run_passes(graph, parse_pipeline(pipeline), checkers)


def graph_of(*outputs: Value, also: Sequence[Input] = ()) -> Graph:
    """A graph that computes these values from whatever inputs they use, in order of name; `also` are inputs too."""
    inputs = {value.name: value for value in also}
    seen: set[Value] = set()
    stack = list(outputs)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if isinstance(value, Input):
            inputs[value.name] = value
        elif isinstance(value, Op):
            stack.extend(value.operands)
    ordered = tuple(inputs[name] for name in sorted(inputs))
    return Graph("g", ordered, tuple((f"out{i}", value) for i, value in enumerate(outputs)))


@functools.cache
def x(*shape: object, name: str = "x", dtype: str = "f32") -> Input:
    """An input, the same one for the same arguments; [1, S, 6] unless a shape is given."""
    return Input(name, Tensor(tuple(shape) or (1, S, 6), dtype))  # type: ignore[arg-type]


def param(name: str, *shape: int, dtype: str = "bf16") -> Value:
    """A weight as frontends give it: in the checkpoint's dtype, widened to f32."""
    weight = _param(name, Tensor(shape, dtype))
    return weight if dtype == "f32" else Cast(weight, "f32")


@functools.cache
def _param(name: str, kind: Tensor) -> Param:
    return Param(name, kind)


def c(value: float) -> Constant:
    """An f32 constant."""
    return constant(float(value), "f32")


def names(graph: Graph) -> list[str]:
    """The graph's ops by name, constants left out."""
    return [op.name for op in graph.ops if not isinstance(op, Constant)]
