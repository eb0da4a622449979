"""A program as a k-level graph, for printing, comparing and golden tests."""

from __future__ import annotations

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.kernels import KernelCall, RunKernels
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Reshape
from llmc.compiler.ir.types import KV, Tensor
from llmc.targets.kernel import CachePart, Call, Packed
from llmc.targets.lowering import LoweredOp, Program
from llmc.targets.memory import Plan


def kernel_graph(program: Program, plan: Plan) -> Graph:
    """The graph whose run-time ops are `k.run`; compile-time values stay as they are, since artifacts store them."""
    graph = program.graph
    new: dict[Value, Value] = {}
    by_op = {lowered.op: lowered for lowered in program.ops}

    def run(op: Op) -> Value:
        lowered = by_op[op]
        args = _arguments(lowered, program, new)
        calls = tuple(_call(call) for call in lowered.calls)
        if isinstance(op.type, KV):
            cache = new.get(op.operands[0], op.operands[0])
            rest = tuple(value for value in args if value is not cache)
            return RunKernels((cache, *rest), op.name, lowered.choice.rule, calls, "cache")
        assert isinstance(op.type, Tensor)
        encoding = op.type.encoding.name if op.type.encoding is not None else ""
        return RunKernels(
            args,
            op.name,
            lowered.choice.rule,
            calls,
            _buffer(op, program, plan),
            op.type.shape,
            op.type.dtype,
            encoding,
        )

    for op in graph.ops:
        if op in graph.constants:
            continue
        if op in by_op:
            new[op] = run(op)
        elif isinstance(op, Reshape):
            new[op] = op.map_operands(lambda value: new.get(value, value))
    outputs = []
    for name, value in graph.outputs:
        if isinstance(value.type, KV) and value not in new:
            root = value
            while isinstance(root, Op):
                root = root.operands[0]
            value = root  # updated in place by the op that absorbed the append
        outputs.append((name, new.get(value, value)))
    return Graph(graph.name, graph.inputs, tuple(outputs))


def _arguments(lowered: LoweredOp, program: Program, new: dict[Value, Value]) -> tuple[Value, ...]:
    found: dict[Value, None] = {}
    for call in lowered.calls:
        for argument in call.args:
            value = argument.value if isinstance(argument, CachePart) else argument
            value = value.weight if isinstance(value, Packed) else value
            if isinstance(value, Value):
                found[new.get(value, value)] = None
    # A rounded activation is read through its scratches; what computes it is an operand all the same.
    for operand in lowered.op.operands:
        if operand in new and operand.type is not None and getattr(operand.type, "encoding", None) is not None:
            found[new[operand]] = None
    return tuple(found)


def _call(call: Call) -> KernelCall:
    guards = tuple(f"{item.symbol} in [{item.low}, {'inf' if item.high is None else item.high}]" for item in call.when)
    units = call.units
    return call.kernel.symbol, call.kernel.describe(), units, call.grain, guards  # type: ignore[return-value]


def _buffer(op: Op, program: Program, plan: Plan) -> str:
    owner = program.buffer_of(op)
    if any(program.buffer_of(value) is owner for name, value in program.graph.outputs if name == "logits"):
        return "logits"
    if any(program.buffer_of(value) is owner for _, value in program.graph.outputs):
        return "output"
    if owner in plan.offsets:
        return f"arena+{plan.offsets[owner]}"
    return "scratch"
