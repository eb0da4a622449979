"""What a model loses when one of its weights alone is rounded: by how much its outputs on a short text change.

The text is run through the graph once, op by op. At the first reader of a weight that is rounded, a copy of the text
branches off, for which this weight is what it was rounded to; from there on all copies go side by side, so that each
weight is loaded once. The last layer and what is behind it run copy by copy, as logits of all of them would take much
memory.

Layers differ by far more than what their own outputs lose: in the example model, the same relative error of outputs
costs 60 times as much in one matrix as in another, and in the head 300 times as much. What a copy finds on 32 tokens
ranks them as well as 1,024 do (docs/adr/0040).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from llmc.compiler.divergence import divergence_of, log_softmax
from llmc.compiler.ir.evaluate import Data, LoadParam, bind_symbols, evaluate_values
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear, Quantize
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import Array
from llmc.compiler.progress import Progress

TOKENS = 64  # of the text

Distance: TypeAlias = Callable[[Array, Array], float]
Decoded: TypeAlias = Callable[[Quantize], Array]


@dataclass
class _Copy:
    """The text, read with one weight as it was rounded; None: with all as they are. data: of values, so far."""

    weight: Quantize | None
    data: dict[Value, Data] = field(default_factory=dict)


def rounding_losses(
    graph: Graph,
    readers: Mapping[Op, Quantize],
    output: str,
    inputs: Mapping[str, Data],
    load: LoadParam,
    decoded: Decoded,
    distance: Distance,
    progress: Progress,
    pool: Executor | None = None,
) -> dict[Quantize, float]:
    """The distance of an output from what it is, for each weight that is rounded alone.

    graph: with weights in floats. readers: its ops that read a weight which is rounded. inputs: of one step. decoded:
    what a weight becomes. distance(expected, found): of two outputs. pool: of threads that share the copies.
    """
    binding = bind_symbols(graph, inputs)
    root = graph.output(output)
    order = topological([root], set(graph.inputs))
    reading = [index for index, value in enumerate(order) if isinstance(value, Op) and value in readers]
    progress.start("finding what each weight is worth", len(reading), "layers")
    if not reading:
        return {}
    last_use = {operand: index for index, op in enumerate(order) if isinstance(op, Op) for operand in op.operands}
    copies = [_Copy(None, {value: inputs[value.name] for value in graph.inputs})]
    shared: dict[Value, Data] = {}  # params, and what is made of them alone

    def evaluated(value: Value, copy: _Copy, rounded: Array | None) -> Data:
        operands = value.operands if isinstance(value, Op) else ()
        local = {operand: copy.data[operand] if operand in copy.data else shared[operand] for operand in operands}
        if rounded is not None:
            local[weight_of(value)] = rounded
        return evaluate_values([value], local, load, binding)["0"]

    for index, value in enumerate(order[: reading[-1]]):
        operands = value.operands if isinstance(value, Op) else ()
        if value in graph.constants and all(operand in shared for operand in operands):
            shared[value] = evaluate_values([value], shared, load, binding)["0"]
        else:
            weight = readers.get(value) if isinstance(value, Op) else None
            rounded = None if weight is None else decoded(weight)
            if weight is not None and all(copy.weight is not weight for copy in copies):
                copies.append(_Copy(weight, dict(copies[0].data)))

            def result(copy: _Copy, value: Value = value, weight: Quantize | None = weight,
                       rounded: Array | None = rounded) -> Data:  # fmt: skip
                return evaluated(value, copy, rounded if weight is not None and copy.weight is weight else None)

            found = list((map if pool is None else pool.map)(result, copies))
            for copy, data in zip(copies, found, strict=True):
                copy.data[value] = data
            progress.advance(weight is not None)
        for operand in (*operands, value):
            if last_use.get(operand, index) == index:
                shared.pop(operand, None)
                for copy in copies:
                    copy.data.pop(operand, None)
    found_losses = _ends(graph, order[reading[-1] :], readers, copies, shared, load, decoded, distance, pool, binding)
    progress.advance()
    return found_losses


def _ends(
    graph: Graph, rest: list[Value], readers: Mapping[Op, Quantize], copies: list[_Copy], shared: dict[Value, Data],
    load: LoadParam, decoded: Decoded, distance: Distance, pool: Executor | None, binding: Mapping[str, int],
) -> dict[Quantize, float]:  # fmt: skip
    """From the last layer, the first of `rest`, to the output, which is its last, copy by copy."""
    head, root = rest[0], rest[-1]
    assert isinstance(head, Op)
    weight = readers[head]
    for value in rest:
        if value in graph.constants and value not in shared:
            shared[value] = evaluate_values([value], shared, load, binding)["0"]
    if all(copy.weight is not weight for copy in copies):
        copies = [*copies, _Copy(weight, copies[0].data)]
    rounded = decoded(weight)

    def end(copy: _Copy) -> Array:
        known = {**shared, **copy.data}
        local = {**known, weight_of(head): rounded} if copy.weight is weight else known
        known[head] = evaluate_values([head], local, load, binding)["0"]
        found = known[root] if root in known else evaluate_values([root], known, load, binding)["0"]
        assert isinstance(found, np.ndarray)
        return found

    expected = end(copies[0])

    def loss(copy: _Copy) -> tuple[Quantize, float]:
        assert copy.weight is not None
        return copy.weight, distance(expected, end(copy))

    return dict((map if pool is None else pool.map)(loss, copies[1:]))


def weight_of(op: Value) -> Value:
    """The weight that a layer, or a table that an embedding, reads."""
    if isinstance(op, Embed):
        return op.table
    assert isinstance(op, (Linear, GatedLinear))
    return op.w


def divergence_from(vocabulary: int) -> Distance:
    """The mean KL divergence over tokens of logits [tokens, ...], of ids below `vocabulary`, in nats."""

    def distance(expected: Array, found: Array) -> float:
        a, b = (each.reshape(-1, each.shape[-1])[:, :vocabulary] for each in (expected, found))
        return divergence_of(log_softmax(a), log_softmax(b)) / max(1, len(a))

    return distance


def relative_error(expected: Array, found: Array) -> float:
    """The square of what vectors are off by, as a part of their own."""
    a, b = (each.astype(np.float64) for each in (expected, found))
    return float(np.square(a - b).sum() / (np.square(a).sum() or 1.0))
