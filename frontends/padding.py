"""Sequences without padding: where a graph compares token ids with the padding's, the answer is always no."""

from __future__ import annotations

from llmc.compiler.ir.elementwise import Add, Cast, Equal, Mul, Not, NotEqual, constant
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.pattern import number_of
from llmc.compiler.ir.structural import Broadcast, Cumsum, Reshape


def without_padding(graph: Graph, pad_id: int | None) -> tuple[Graph, int | None]:
    """The graph where no token of `ids` is the padding's, and that id where the graph asks for it (None: it does not).

    pad_id: the padding's id, as the model's config says. None: the id that positions are counted around, where they are
    counted as RoBERTa does: running sums of `ids != padding`, 0 at padding, from `padding + 1` on.
    """
    replaced: dict[Value, Value] = {}
    found = None
    for op in graph.ops:
        if isinstance(op, (Equal, NotEqual)):
            compared = next((b for a, b in ((op.a, op.b), (op.b, op.a)) if _is_ids(a)), None)
            number = None if compared is None else number_of(compared)
            if number is not None and (number == pad_id if pad_id is not None else _counts_around(graph, op, number)):
                replaced[op] = Broadcast(constant(isinstance(op, NotEqual), "bool"), op.shape)
                found = int(number)
    return (substitute_values(graph, replaced), found) if replaced else (graph, None)


def _is_ids(value: Value) -> bool:
    while isinstance(value, (Cast, Reshape)):
        value = value.x
    return isinstance(value, Input) and value.name == "ids"


def _counts_around(graph: Graph, op: Equal | NotEqual, number: float) -> bool:
    """Whether positions are running sums of `ids != number`, times that, plus `number`."""
    sums = {value for value in graph.ops if isinstance(value, Cumsum) and _is_unequal(value.x, op)}
    moved = {value for each in sums for value in _reached(graph, each, (Cast, Reshape, Add))}
    products = {v for v in moved if isinstance(v, Mul) and any(_is_unequal(operand, op) for operand in v.operands)}
    totals = {value for each in products for value in _reached(graph, each, (Cast, Reshape))}
    return any(isinstance(value, Add) and number in (number_of(value.a), number_of(value.b)) for value in totals)


def _is_unequal(value: Value, op: Equal | NotEqual) -> bool:
    """Whether a value says where the operands of `op` are unequal, as numbers or bools."""
    unequal = isinstance(op, NotEqual)
    while value is not op:
        if not isinstance(value, (Cast, Reshape, Not)):
            return False
        unequal ^= isinstance(value, Not)
        value = value.x
    return unequal


def _reached(graph: Graph, start: Op, through: tuple[type[Op], ...]) -> set[Op]:
    """`start`, what is made of it by ops of these kinds alone, and the ops that use those."""
    found, stack = {start}, [start]
    while stack:
        value = stack.pop()
        for user in graph.users.get(value, ()):
            if user not in found:
                found.add(user)
                stack.extend([user] if isinstance(user, through) else [])
    return found
