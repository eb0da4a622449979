"""Sequences without padding: what a model asks of padding has one answer."""

from __future__ import annotations

from llmc.compiler.ir.elementwise import Cast, Equal, Not, NotEqual, constant
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.pattern import number_of
from llmc.compiler.ir.structural import Broadcast, Cumsum, Reshape

_PLAIN = (Cast, Reshape, Not)


def without_padding(graph: Graph, pad_id: int | None) -> Graph:
    """The graph where no token of `ids` is the padding's, for a model that counts its positions by `ids != padding`.

    pad_id: the padding's id, as the model's config says; None: the id whose absence is counted.
    """
    replaced: dict[Value, Value] = {}
    for op in graph.ops:
        if isinstance(op, (Equal, NotEqual)):
            compared = next((b for a, b in ((op.a, op.b), (op.b, op.a)) if _is_ids(a)), None)
            number = None if compared is None else number_of(compared)
            if number is not None and (number == pad_id if pad_id is not None else _is_counted(graph, op)):
                replaced[op] = Broadcast(constant(isinstance(op, NotEqual), "bool"), op.shape)
    return substitute_values(graph, replaced) if replaced else graph


def _is_ids(value: Value) -> bool:
    while isinstance(value, (Cast, Reshape)):
        value = value.x
    return isinstance(value, Input) and value.name == "ids"


def _is_counted(graph: Graph, op: Op) -> bool:
    """Whether a running sum of what `op` says is taken."""
    stack: list[Op] = [op]
    seen = {op}
    while stack:
        for user in graph.users.get(stack.pop(), ()):
            if isinstance(user, Cumsum):
                return True
            if isinstance(user, _PLAIN) and user not in seen:
                seen.add(user)
                stack.append(user)
    return False
