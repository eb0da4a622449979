"""flatten-tokens: a graph over one sequence [1, S, ...] becomes a graph over T tokens of any mixture of sequences.

Outside attention a decoder acts on each token alone. The pass proves that op by op: every value has one axis that
counts tokens, and no op but `llm.attention` may mix along it. In the new graph that axis comes first, and a leading
batch axis of size 1 is gone: [1, S, h] becomes [T, h], [1, heads, S, d] becomes [T, heads, d].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmc.compiler.ir.dims import Dim, Symbol, product, symbol, symbols_of
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention, Embed
from llmc.compiler.ir.op import Input, Op, Tokens, Value
from llmc.compiler.ir.ragged import RelativeBias
from llmc.compiler.ir.structural import (
    Broadcast,
    CheckedIndex,
    Concat,
    Gather,
    GatherElements,
    Iota,
    Matmul,
    Pad,
    Reduce,
    Reshape,
    Slice,
    Transpose,
    axes_of,
)
from llmc.compiler.ir.types import Shape, Tensor
from llmc.compiler.passes.distance_tables import distance_table
from llmc.compiler.passes.flatten_sequences import Mixes, leave_tokens, number_of_tokens, token_count
from llmc.compiler.passes.lengths import LENGTHS
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.probe import Probe

INPUTS = ("ids", "positions", "token_types", LENGTHS)
SEQUENCES = symbol("B", 1)


@dataclass(frozen=True)
class FlattenTokens(Pass, name="flatten-tokens"):
    """`max_step`: the most tokens that one step of the new graph may have (the range of T).

    `sequences`: values with one row a sequence are allowed, and tables of what attention adds by relative position (an
    encoder).
    """

    max_step: int = 512
    sequences: bool = False

    def run(self, graph: Graph, report: Report) -> Graph:
        old_inputs = {value.name: value for value in graph.inputs}
        size = old_inputs["ids"].shape[1] if "ids" in old_inputs and old_inputs["ids"].rank == 2 else None
        if not isinstance(size, Dim):
            report.refuse("input ids", "needs ids: [1, S] with a symbolic S")
            return graph
        wrong = [v.name for v in graph.inputs if v.name not in INPUTS or v.shape != (1, size)]
        if wrong:
            report.refuse(f"input {wrong[0]}", f"needs inputs {' and '.join(INPUTS)} of one shape [1, {size}]")
            return graph
        tokens = symbol("T", 1, self._most_tokens(size))
        inputs = tuple(Input(value.name, Tensor((tokens,), value.dtype)) for value in graph.inputs)
        new_inputs: dict[Value, Value] = dict(zip(graph.inputs, inputs, strict=True))
        flattener = Flattener(graph, size, tokens, new_inputs, self.sequences)
        for op in graph.ops:
            flattener.add(op)
        for _, value in graph.outputs:
            if value in flattener.refused:
                op, reason = flattener.refused[value]
                report.refuse(op, f"{reason}; the graph stays one sequence at a time")
                return graph
        outputs = tuple((name, flattener.new.get(value, value)) for name, value in graph.outputs)
        starts = (flattener.starts,) if self.sequences else ()
        made = Graph(graph.name, (*inputs, *starts), outputs)
        for op in made.ops if set(made.symbols) & size.symbols() else ():
            if any(_sizes_of(value) & size.symbols() for value in op.attributes().values()):
                report.refuse(
                    op, f"it asks for the tokens of a sequence, {size}; the graph stays one sequence at a time"
                )
                return graph
        report.hit("graph")
        return made

    def _most_tokens(self, size: Dim) -> int:
        """A step's tokens at most; sequences of an encoder are not cut."""
        return max(self.max_step, *(symbol.high or 0 for symbol in size.symbols())) if self.sequences else self.max_step


@dataclass(frozen=True)
class Layout:
    """Where a value's tokens are: `token` axis, the dropped `batch` axis of size 1 or None, and the `rest` in order.

    token None: it is a value a sequence.
    """

    token: int | None
    batch: int | None
    rest: tuple[int, ...]

    @property
    def all_rest(self) -> tuple[int, ...]:
        """Every axis but the token axis."""
        return tuple(sorted({*self.rest, *(() if self.batch is None else (self.batch,))}))


class Flattener:
    """Builds the new graph's values; `new` maps old values to new ones, `refused` others to an op and its reason."""

    def __init__(self, graph: Graph, size: Dim, tokens: int | Dim, inputs: dict[Value, Value], sequences: bool) -> None:
        self.graph, self.size, self.tokens, self.sequences = graph, size, tokens, sequences
        self.symbols = size.symbols()
        self.new: dict[Value, Value] = inputs
        self.refused: dict[Value, tuple[Op, str]] = {}
        self.decided: set[Value] = set(inputs)  # old values that differ from token to token or sequence to sequence
        self.starts = Input("starts", Tensor((SEQUENCES + 1,), "i32"))

    def add(self, op: Op) -> None:
        """Rebuild one op, whose operands were rebuilt or refused."""
        if not self.has_tokens(op) and not any(value in self.decided for value in op.operands):
            return
        self.decided.add(op)
        try:
            count = token_count(self, op) if self.sequences else None
            if count is not None:
                self.new[op] = count
                return
            for value in op.operands:
                if value in self.refused and not (isinstance(op, Attention) and value is op.bias):
                    self.refused[op] = self.refused[value]
                    return
            if not self.sequences and not self.has_tokens(op):
                raise Mixes("it makes one value of all tokens")
            leaves = not self.has_tokens(op) and any(self.has_tokens(value) for value in op.operands)
            self.new[op] = self.finish(leave_tokens(self, op) if leaves else self.rebuilt(op), op)
        except Mixes as reason:
            self.refused[op] = op, str(reason)

    def rebuilt(self, op: Op) -> Value:
        """The new value by the op's own rule, or else by the rule for its `tokens`."""
        for kind, rule in RULES.items():
            if isinstance(op, kind):
                return rule(self, op)
        by_trait = _TRAIT_RULES.get(op.tokens)
        if by_trait is None:
            raise Mixes(f"{op.name} has no token-wise rule")
        return by_trait(self, op)

    def has_tokens(self, value: Value) -> bool:
        """Whether the sequence's length appears in the value's shape."""
        return isinstance(value.type, Tensor) and any(symbols_of(dim) & self.symbols for dim in value.type.shape)

    def layout(self, value: Value) -> Layout:
        """The layout of an old value that tokens decide."""
        axes = [axis for axis, dim in enumerate(value.shape) if symbols_of(dim) & self.symbols]
        if not axes and value in self.decided:
            batch = 0 if value.rank and value.shape[0] == 1 else None
            return Layout(None, batch, tuple(range(value.rank))[0 if batch is None else 1 :])
        if len(axes) != 1:
            raise Mixes(f"axes {axes} of {value.type} all count tokens")
        if value.shape[axes[0]] != self.size:
            raise Mixes(f"axis {axes[0]} of {value.type} is not one element a token")
        token = axes[0]
        batch = 0 if value.shape[0] == 1 else None
        return Layout(token, batch, tuple(i for i in range(value.rank) if i not in (token, batch)))

    def rows(self, value: Value) -> int | Dim:
        """How many rows the new value has: one a token, or one a sequence."""
        return self.tokens if self.has_tokens(value) else SEQUENCES

    def shape(self, value: Value, axes: tuple[int, ...]) -> Shape:
        """The new shape of an old value: its rows, then the sizes of some of its axes."""
        return (self.rows(value), *(value.shape[i] for i in axes))

    def finish(self, built: Value, op: Op) -> Value:
        """The rebuilt value in the new shape of `op`: the two differ at most in axes of size 1."""
        return reshaped(built, self.shape(op, self.layout(op).rest))

    def full(self, value: Value) -> tuple[Value, tuple[int, ...]]:
        """The new value with every axis of the old one present, tokens first; and those old axes in order."""
        axes = self.layout(value).all_rest
        return reshaped(self.new[value], self.shape(value, axes)), axes

    def along(self, value: Value, axes: tuple[int, ...], what: str) -> tuple[Value, tuple[int, ...]]:
        """The new value and where some of its old axes now are."""
        layout = self.layout(value)
        axes = tuple(axis % value.rank for axis in axes)
        if layout.token in axes:
            raise Mixes(f"it {what} the token axis {layout.token} of {value.type}")
        new, kept = (self.full(value)) if layout.batch in axes else (self.new[value], layout.rest)
        return new, tuple(1 + kept.index(axis) for axis in axes)

    def aligned(self, value: Value, result: Value) -> Value:
        """An operand of an op that broadcasts, so that it broadcasts to the new result in the same way."""
        layout = self.layout(result)
        offset = result.rank - value.rank
        sizes = tuple(value.shape[i - offset] if i >= offset else 1 for i in layout.rest)
        if value in self.decided:
            self.must_meet(value, result, offset)
            return reshaped(self.new[value], (self.rows(result), *sizes))
        padded = (*(1 for _ in range(len(sizes) - value.rank)), *value.shape)
        return value if padded == sizes else reshaped(value, sizes)

    def must_meet(self, value: Value, result: Value, offset: int) -> None:
        """Refuse where rows of an operand, whose axes are `offset` behind the result's, are not those of the result."""
        token, wanted = self.layout(value).token, self.layout(result).token
        if token is None and wanted is not None:
            raise Mixes("it gives each token one value of all tokens of its sequence")
        # An axis of S broadcasts to one of S, and the result has one of them.
        assert token is None or token + offset == wanted

    def elementwise(self, op: Op) -> Value:
        return op.map_operands(lambda value: self.aligned(value, op))

    def mapped(self, op: Op) -> Value:
        """An op whose operands keep their meaning when the token axis moves to the front."""
        for value in op.operands:
            if value in self.decided and value.rank - 1 not in self.layout(value).rest:
                raise Mixes(f"it works along the token axis of {value.type}")
        return op.map_operands(lambda value: self.new.get(value, value))

    def token_first(self, op: Op) -> Value:
        """An op defined over tokens on axis 0."""
        for value in op.operands:
            if value in self.decided and self.layout(value).token != 0:
                raise Mixes(f"the tokens of {value.type} are not on axis 0")
        return op.map_operands(lambda value: self.new.get(value, value))

    def transpose(self, op: Transpose) -> Value:
        full, axes = self.full(op.x)
        # Axes of size 1 need no moving: leaving them out avoids transposes that do nothing.
        kept = [axis for axis in axes if op.x.shape[axis] != 1]
        order = [axis for axis in op.permutation if axis in kept]
        if order == kept:
            return full
        x = reshaped(full, self.shape(op.x, tuple(kept)))
        return Transpose(x, (0, *(1 + kept.index(axis) for axis in order)))

    def reshape(self, op: Reshape) -> Value:
        before, after = self.layout(op.x).token, self.layout(op).token
        if before is not None and product(op.x.shape[:before]) != product(op.shape[:after]):
            raise Mixes("it moves elements between tokens")
        return self.new[op.x]

    def broadcast(self, op: Broadcast) -> Value:
        return Broadcast(self.aligned(op.x, op), self.shape(op, self.layout(op).rest))

    def slice(self, op: Slice) -> Value:
        x, (axis,) = self.along(op.x, (op.axis,), "slices")
        if isinstance(op.start, Dim) or isinstance(op.stop, Dim):
            raise Mixes("its bounds depend on the number of tokens")
        return Slice(x, axis, op.start, op.stop, op.step)

    def concat(self, op: Concat) -> Value:
        # A first axis of size 1 is dropped from all operands, or it is the one that they are put together along.
        parts = [self.along(x, (op.axis,), "concatenates along") for x in op.xs]
        return Concat(tuple(x for x, _ in parts), parts[0][1][0])

    def pad(self, op: Pad) -> Value:
        token = self.layout(op.x).token
        if token is not None and (op.low[token] or op.high[token]):
            raise Mixes("it pads the token axis")
        full, axes = self.full(op.x)
        return Pad(full, (0, *(op.low[i] for i in axes)), (0, *(op.high[i] for i in axes)), op.value)

    def along_axes(self, op: Op) -> Value:
        """An op along one axis, or several, of its operand x."""
        x, axes = self.along(op.operands[0], axes_of(op), "reduces" if isinstance(op, Reduce) else "works along")
        return op.replace(x=x, axes=axes) if "axes" in op.attributes() else op.replace(x=x, axis=axes[0])

    def gather(self, op: Gather) -> Value:
        if op.x in self.decided:
            if op.indices in self.decided:
                raise Mixes("it gathers tokens by token")
            x, (axis,) = self.along(op.x, (op.axis,), "gathers along")
            return Gather(x, op.indices, axis)
        axis = op.axis % op.x.rank
        indices = self.new[op.indices]
        gathered = Gather(op.x, indices, axis)
        order = (axis, *(i for i in range(gathered.rank) if i != axis))
        return gathered if axis == 0 else Transpose(gathered, order)

    def gather_elements(self, op: GatherElements) -> Value:
        axis = op.axis % op.x.rank
        if op.x not in self.decided and axis == self.layout(op.indices).token:
            return self._rows_of_table(op, axis)
        if not (op.x in self.decided and op.indices in self.decided):
            raise Mixes("it gathers from one place for every token")
        if self.layout(op.x).token != self.layout(op.indices).token or axis == self.layout(op.x).token:
            raise Mixes(f"it gathers along the token axis of {op.x.type}")
        (x, axes), (indices, _) = self.full(op.x), self.full(op.indices)
        return GatherElements(x, indices, 1 + axes.index(axis))

    def _rows_of_table(self, op: GatherElements, axis: int) -> Value:
        """Each token looks up rows of its own in a table: the axis of the rows becomes the token axis."""
        order = (axis, *(i for i in range(op.x.rank) if i != axis))
        table = op.x if axis == 0 else Transpose(op.x, order)
        return GatherElements(table, self.full(op.indices)[0], 0)

    def matmul(self, op: Matmul) -> Value:
        """A token's rows times a matrix: each token is a stack of matrices of its own."""
        if op.a in self.decided and op.b not in self.decided:
            token = self.layout(op.a).token  # not the axis that is summed over: op.b would have tokens too
            if token == op.a.rank - 2 or (token is None and product(op.a.shape[:-1]) == 1):
                return self._rows_times_matrix(op)
        token = self.layout(op).token
        if token is not None and token >= op.rank - 2:
            raise Mixes("it multiplies tokens with tokens")
        operands = []
        for value in (op.a, op.b):
            offset = op.rank - value.rank
            sizes = tuple(value.shape[i - offset] if i >= offset else 1 for i in range(op.rank) if i != token)
            if value in self.decided:
                self.must_meet(value, op, offset)
                operands.append(reshaped(self.new[value], (self.rows(op), *sizes)))
            else:
                operands.append(reshaped(value, sizes))
        return Matmul(operands[0], operands[1])

    def _rows_times_matrix(self, op: Matmul) -> Value:
        leading = (*(1 for _ in range(op.rank - op.a.rank)), *op.a.shape[:-2])
        if all(dim == 1 for dim in (*leading, *op.b.shape[:-2])):
            x = reshaped(self.new[op.a], (self.rows(op), op.a.shape[-1]))
            return Matmul(x, reshaped(op.b, op.b.shape[-2:]))
        return Matmul(reshaped(self.new[op.a], (self.rows(op), *leading, 1, op.a.shape[-1])), op.b)

    def checked_index(self, op: CheckedIndex) -> Value:
        """Places in an axis of a token each, of a sequence: it has as many as that one has tokens."""
        if not symbols_of(op.size) & self.symbols:
            return self.elementwise(op)
        if op.sizes is not None or self.has_tokens(op):
            raise Mixes("it asks for each token how many its sequence has")
        x, counts = self.new[op.x], number_of_tokens(self, op.size, "i32")
        if counts is None:
            raise Mixes(f"it asks for {op.size} of each sequence, which is no multiple of its tokens and a number")
        sizes = Broadcast(Reshape(counts, (SEQUENCES, *(1 for _ in x.shape[1:]))), x.shape) if x.rank > 1 else counts
        return CheckedIndex(x, sizes, what=op.what)

    def embed(self, op: Embed) -> Value:
        return op.replace(ids=self.new[op.ids])

    def attention(self, op: Attention) -> Value:
        for value in (op.q, op.k, op.v):
            if not self.has_tokens(value) or self.layout(value).token != value.rank - 3:
                raise Mixes(f"the tokens of {value.type} are not on axis {value.rank - 3}")
            if product(value.shape[:-3]) != 1:
                raise Mixes(f"{value.type} holds {product(value.shape[:-3])} sequences, not one")
        q, k, v = (reshaped(self.new[x], (self.tokens, *x.shape[-2:])) for x in (op.q, op.k, op.v))
        if op.bias is None:
            return op.replace(q=q, k=k, v=v)
        return op.replace(q=q, k=k, v=v, bias=RelativeBias(self.table(op.bias, op.q.shape[-2]), self.tokens))

    def table(self, bias: Value, heads: int | Dim) -> Value:
        """What a bias adds to the scores of two tokens by their distance."""
        if isinstance(bias, RelativeBias):
            return bias.table
        assert isinstance(heads, int)
        try:
            return distance_table(Probe(self.graph), bias, heads)
        except Unrecognised as reason:
            raise Mixes(str(reason)) from None

    def iota(self, op: Iota) -> Value:
        raise Mixes("it counts tokens from 0, which is not their position in a mixture of sequences")


def _sizes_of(attribute: object) -> frozenset[Symbol]:
    """The symbols in an op's attribute: a size, or several."""
    if isinstance(attribute, tuple):
        return frozenset(found for each in attribute for found in _sizes_of(each))
    return frozenset(symbols_of(attribute)) if isinstance(attribute, Dim) else frozenset()


def reshaped(value: Value, shape: Shape) -> Value:
    """The value in another shape; itself when it has that shape; one reshape where it is a reshape already."""
    if value.shape == shape:
        return value
    if isinstance(value, Reshape):
        return reshaped(value.x, shape)
    return Reshape(value, shape)


Rule = Callable[..., Value]
_TRAIT_RULES: dict[Tokens, Rule] = {
    Tokens.ELEMENTS: Flattener.elementwise,
    Tokens.ROWS: Flattener.mapped,
    Tokens.FIRST: Flattener.token_first,
    Tokens.AXES: Flattener.along_axes,
}
# Every op that moves elements has a rule of its own; so has each op that mixes tokens in a form that rules can handle.
RULES: dict[type[Op], Rule] = {
    Transpose: Flattener.transpose,
    Reshape: Flattener.reshape,
    Broadcast: Flattener.broadcast,
    Slice: Flattener.slice,
    Concat: Flattener.concat,
    Pad: Flattener.pad,
    Gather: Flattener.gather,
    GatherElements: Flattener.gather_elements,
    Matmul: Flattener.matmul,
    CheckedIndex: Flattener.checked_index,
    Embed: Flattener.embed,
    Attention: Flattener.attention,
    Iota: Flattener.iota,
}
