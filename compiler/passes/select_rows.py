"""select-rows: logits are computed for the rows asked for, and whatever only they need is computed for those rows.

A new input rows i32[R] names tokens. An op is row-only when nothing but the selected logits comes of it and it treats
each token alone: the head, the final norm, and the last layer from its attention's output on. Those run over R rows;
every other value they use is gathered once.

In an encoder (`sequences=true`) the rows are those that the graph picks itself, such as the first token of each
sequence: there is no new input.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Input, Op, Tokens, Value
from llmc.compiler.ir.structural import Concat, Gather, Matmul, Reshape, Slice, Transpose, axes_of
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.flatten_tokens import SEQUENCES
from llmc.compiler.passes.manager import Pass, Report


@dataclass(frozen=True)
class SelectRows(Pass, name="select-rows"):
    """`output`: the output whose rows are selected. `sequences`: none is, but what sequences pick is computed alone."""

    output: str = "logits"
    sequences: bool = False

    def run(self, graph: Graph, report: Report) -> Graph:
        return self._picked(graph, report) if self.sequences else self._wanted(graph, report)

    def _picked(self, graph: Graph, report: Report) -> Graph:
        """The graph with every gather of a row a sequence moved in front of what only that row needs."""
        for index in range(len(graph.ops)):
            picks = [op for op in graph.ops if _picks(op)]
            if index >= len(picks):
                return graph
            pick = picks[index]
            assert isinstance(pick, Gather)
            if any(value is pick.x for _, value in graph.outputs) or len(graph.users[pick.x]) > 1:
                continue
            tokens = pick.x.shape[0]
            assert isinstance(tokens, Dim)
            row_only = _row_only(graph, pick.x, "", tokens, pick)
            if row_only:
                alone = _of_rows(graph, pick.x, pick.indices, tokens, row_only, report)
                graph = substitute_values(graph, {pick: alone})
        return graph

    def _wanted(self, graph: Graph, report: Report) -> Graph:
        outputs = dict(graph.outputs)
        logits = outputs.get(self.output)
        if logits is None or not isinstance(logits.type, Tensor):
            report.refuse(f"output {self.output}", f"there is no such tensor; outputs: {', '.join(outputs)}")
            return graph
        tokens = logits.shape[0]
        if not isinstance(tokens, Dim) or logits.rank != 2:
            report.refuse(f"output {self.output}", f"needs [T, vocabulary], not {logits.type}: flatten-tokens is first")
            return graph
        rows = Input("rows", Tensor((symbol("R", 1),), "i32"))
        row_only = _row_only(graph, logits, self.output, tokens)
        new = _of_rows(graph, logits, rows, tokens, row_only, report)
        kept = tuple((name, new if name == self.output else value) for name, value in graph.outputs)
        return Graph(graph.name, (*graph.inputs, rows), kept)


def _picks(op: Op) -> bool:
    """Whether this takes a row of some value [T, ...] for each sequence."""
    if not isinstance(op, Gather) or op.axis % op.x.rank != 0 or op.indices.rank != 1:
        return False
    return str(op.x.shape[0]) == "T" and op.indices.shape[0] == SEQUENCES


def _of_rows(graph: Graph, wanted: Value, rows: Value, tokens: Dim, row_only: set[Op], report: Report) -> Value:
    """Rows of `wanted` [T, ...]: `row_only` ops run over the rows alone, what they read is gathered."""
    selected: dict[Value, Value] = {}

    def of_rows(value: Value) -> Value:
        """The rows of a value that has tokens; any other value itself."""
        if not isinstance(value.type, Tensor) or tokens not in value.shape:
            return value
        if value not in selected:
            selected[value] = Gather(value, rows, 0)
            report.hit("gather")
        return selected[value]

    for op in graph.ops:
        if op in row_only:
            if isinstance(op, Reshape):
                selected[op] = Reshape(of_rows(op.x), (rows.shape[0], *op.to[1:]))
            else:
                selected[op] = op.map_operands(of_rows)
            report.hit("row-only op")
    return of_rows(wanted)


def _row_only(graph: Graph, wanted: Value, output: str, tokens: Dim, reader: Op | None = None) -> set[Op]:
    """Ops that only the selected rows of `wanted` need and that treat each token (axis 0) alone.

    output: the name of what is `wanted`; reader: an op that reads those rows of it only.
    """
    kept = {value for name, value in graph.outputs if name != output}
    found: set[Op] = set()
    for op in reversed(graph.ops):
        if op in kept or not _treats_tokens_alone(op, tokens):
            continue
        users = [user for user in graph.users.get(op, ()) if user is not reader]
        if all(user in found for user in users) and (op is wanted or users):
            found.add(op)
    # A reshape of a gathered value is better gathered after it, in two axes.
    for op in graph.ops:
        if op in found and isinstance(op, Reshape) and op.x not in found:
            found.discard(op)
    return found


def _treats_tokens_alone(op: Op, tokens: Dim) -> bool:
    """Whether row t of the result comes from row t of each operand that has tokens, which stand on axis 0."""
    if not isinstance(op.type, Tensor) or op.rank == 0 or op.shape[0] != tokens or tokens in op.shape[1:]:
        return False
    with_tokens = [value for value in op.operands if isinstance(value.type, Tensor) and tokens in value.shape]
    if not with_tokens or any(value.shape[0] != tokens or tokens in value.shape[1:] for value in with_tokens):
        return False
    if op.tokens is Tokens.ROWS:
        return all(value.rank > 1 for value in with_tokens)
    if op.tokens in (Tokens.ELEMENTS, Tokens.FIRST):  # an operand of fewer axes would have its tokens on another one
        return True
    if op.tokens is Tokens.AXES:
        return 0 not in axes_of(op)
    return _moves_tokens_whole(op, with_tokens)


def _moves_tokens_whole(op: Op, with_tokens: list[Value]) -> bool:
    """The same of ops whose trait does not settle it."""
    if isinstance(op, Embed):
        return op.ids in with_tokens
    if isinstance(op, Matmul):
        return with_tokens == [op.a] and op.rank == 2
    if isinstance(op, (Slice, Concat)):
        return op.axis % op.rank != 0
    if isinstance(op, Transpose):
        return op.permutation[0] == 0
    return isinstance(op, Reshape)
