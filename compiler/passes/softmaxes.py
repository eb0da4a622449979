"""Softmaxes, however they are written, and the ops between a softmax and its product with the values."""

from __future__ import annotations

from llmc.compiler.ir.elementwise import Add, Cast, Div, Equal, Exp, Mul, Neg, Not, NotEqual, Reciprocal, Sub, Where
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Matmul, Max, Reshape, Slice, Softmax, Sum
from llmc.compiler.ir.types import FLOATS
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.rewriting import holds, number_of


def softmax_operand(op: Op) -> Value | None:
    """x where `op` is softmax(x) over the last axis, also written as exp(x - max(x)) / sum(exp(x - max(x)))."""
    if isinstance(op, Softmax):
        return op.x if op.axis % op.rank == op.rank - 1 else None
    exponential: Value | None = None
    if isinstance(op, Div):
        exponential, total = op.a, op.b
    elif isinstance(op, Mul):
        for a, b in ((op.a, op.b), (op.b, op.a)):
            if isinstance(b, Reciprocal):
                exponential, total = a, b.x
    if not isinstance(exponential, Exp) or not isinstance(total, Sum) or total.x is not exponential:
        return None
    if not total.keep or _axes(total) != {op.rank - 1}:
        return None
    return without_maximum(exponential.x)


def without_maximum(value: Value) -> Value:
    """x where value is x - max(x, -1); a softmax does not see the difference."""
    if not isinstance(value, (Add, Sub)):
        return value
    largest = value.b if isinstance(value, Sub) else None
    if isinstance(value, Add):
        largest = next((v.x for v in (value.b, value.a) if isinstance(v, Neg)), None)
    if isinstance(largest, Max) and largest.keep and _axes(largest) == {value.rank - 1}:
        other = value.a if isinstance(value, Sub) or largest is getattr(value.b, "x", None) else value.b
        return other if largest.x is other else value
    return value


def _axes(op: Max | Sum) -> set[int]:
    return {axis % op.x.rank for axis in op.axes}


def weighted(graph: Graph, softmax: Op, drops_column: bool) -> tuple[Matmul, list[Value]]:
    """The product of the probabilities with the values; and conditions [..., Q, 1] under which they are set to zero.

    drops_column: a last column, of sinks, is cut off in between. Unrecognised says what else is in between.
    """
    outputs = {value for _, value in graph.outputs}
    guards: list[Value] = []
    roundings: list[str] = []
    value: Op = softmax
    keys = softmax.shape[-1] - 1 if drops_column else softmax.shape[-1]
    while True:
        users = tuple(user for user in graph.users.get(value, ()) if not _is_nan_test(user, value))
        if value in outputs:
            raise Unrecognised("its probabilities are an output of the graph")
        if len(users) != 1:
            raise Unrecognised(f"its probabilities are used {len(users)} times")
        user = users[0]
        if isinstance(user, Matmul) and user.a is value:  # and not user.b, which would be a second use
            if drops_column:
                raise Unrecognised("its probabilities keep the column of sinks")
            coarse = next((dtype for dtype in roundings if not holds(dtype, user.dtype)), None)
            if coarse is not None:
                raise Unrecognised(f"its probabilities, which weigh values in {user.dtype}, are rounded to {coarse}")
            return user, guards
        same_last = user.shape[-2:] == value.shape[-2:]
        if isinstance(user, Slice) and drops_column and user.axis % user.rank == user.rank - 1:
            if user.start != 0 or user.stop != keys or user.step != 1:
                raise Unrecognised("its probabilities keep the column of sinks")
            drops_column = False
        elif isinstance(user, Where) and user.b is value and user.shape == value.shape and number_of(user.a) == 0:
            if _tests_nan(user.condition, value):
                pass  # there are none in `llm.attention`: a row that sees no key has zeros
            elif user.condition.rank and user.condition.shape[-1] != 1:
                raise Unrecognised("some of its probabilities are set to zero")
            else:
                guards.append(user.condition)
        elif not ((isinstance(user, Reshape) and same_last) or (isinstance(user, Cast) and user.dtype in FLOATS)):
            raise Unrecognised(f"its probabilities pass through {user.name}")
        if isinstance(user, Cast):
            roundings.append(user.to)
        value = user


def _is_nan_test(user: Op, value: Value) -> bool:
    """Whether an op says where a value is not a number: x != x, or x == x."""
    return isinstance(user, (NotEqual, Equal)) and user.a is value and user.b is value


def _tests_nan(condition: Value, value: Value) -> bool:
    """Whether a condition holds where a value is not a number."""
    if isinstance(condition, Not):
        return isinstance(condition.x, Equal) and _is_nan_test(condition.x, value)
    return isinstance(condition, NotEqual) and _is_nan_test(condition, value)
