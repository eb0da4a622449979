"""adapt-linears: room beside linear ops for adapters that are loaded at run time (LoRA).

Each linear op over tokens whose weight is rows of the checkpoint's own matrices gets an `llm.low_rank` behind its sums,
which reads three tables that the runtime fills: new inputs `adapters` i32[T] (of each token, 0: none) and, for op n,
`adapter.n.a`, `adapter.n.b` and `adapter.n.ranks`. An activation that was part of the op comes behind that; its bias
and its residual stay. A merged op has one part for each matrix that it was made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.adapters import Activated, LowRank
from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Add, Cast, Constant, Sub
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.integers import PackGroups, UnpackNibbles
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear, Quantize, QuantizeActivations
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import Concat, Gather, Reshape, Slice, Transpose
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.schemes import describe, param_names
from llmc.errors import CompileError

ADAPTERS = "adapters"  # the input that says which adapter each token has
TABLES = ("a", "b", "ranks")  # the inputs of each op, in the order in which a step has them
_WEIGHT = ".weight"
_INTEGERS = ".weight.q"  # of a weight that the source stores as integers


def table_name(number: int, table: str) -> str:
    """The input that is one of the tables of op `number`."""
    return f"adapter.{number}.{table}"


@dataclass(frozen=True)
class Part:
    """Columns of an op that one module's weight makes. module: its name, in the model that was lifted. outputs: of that
    weight. rows: which of its output rows these are, in order, as runs (first, behind the last)."""

    module: str
    outputs: int
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AdapterTable:
    """The tables of one op: a [entries, parts, rank, inputs], b [entries, rank, outputs], ranks [entries, parts].
    powers: the op's inputs are divided by 2^powers against the module's own (`smoothing.py`); empty: they are not."""

    inputs: int
    outputs: int
    parts: tuple[Part, ...]
    powers: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdaptLinears(Pass, name="adapt-linears"):
    """count: adapters that may be loaded at a time. rank: the greatest rank of one."""

    count: int = 1
    rank: int = 16

    def run(self, graph: Graph, report: Report) -> Graph:
        return self.adapted(graph, report, {})[0]

    def adapted(
        self, graph: Graph, report: Report, originals: Mapping[Value, Value]
    ) -> tuple[Graph, tuple[AdapterTable, ...]]:
        """The graph with its new inputs, and what they are for. originals: of weights that were rounded to integers of
        a file, what was rounded."""
        return _Run(self, graph, report, originals).run()


@dataclass
class _Run:
    options: AdaptLinears
    graph: Graph
    report: Report
    originals: Mapping[Value, Value]
    tables: list[AdapterTable] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)

    def run(self) -> tuple[Graph, tuple[AdapterTable, ...]]:
        ids = next((value for value in self.graph.inputs if value.name == "ids"), None)
        rows = next((value for value in self.graph.inputs if value.name == "rows"), None)
        if ids is None or rows is None or ids.rank != 1:
            raise CompileError("--adapters needs a decoder with a KV cache: this graph has no tokens [T] and rows [R]")
        adapters = Input(ADAPTERS, Tensor(ids.shape, "i32"))
        of_rows = {ids.shape[0]: adapters, rows.shape[0]: Gather(adapters, rows, 0)}
        embedded = {name for op in self.graph.ops if isinstance(op, Embed) for name in param_names(op.table)}
        new: dict[Value, Value] = {}
        for op in self.graph.ops:
            rebuilt: Value = op.map_operands(lambda value: new.get(value, value))
            if isinstance(rebuilt, (Linear, GatedLinear)) and isinstance(op, (Linear, GatedLinear)):
                rebuilt = self._adapted(op, rebuilt, of_rows, embedded)
            if rebuilt is not op:
                new[op] = rebuilt
        if not self.tables:
            raise CompileError(
                "--adapters: no linear op of this model has a weight of its own, so that none is adapted"
            )
        outputs = tuple((name, new.get(value, value)) for name, value in self.graph.outputs)
        inputs = (*self.graph.inputs, adapters, *self.inputs)
        return substitute_values(Graph(self.graph.name, inputs, outputs), {}), tuple(self.tables)

    def _adapted(
        self,
        op: Linear | GatedLinear,
        rebuilt: Linear | GatedLinear,
        of_rows: Mapping[int | Dim, Value],
        embedded: set[str],
    ) -> Value:
        """What stands in the place of a linear op: `rebuilt`, itself over new operands, or more."""
        if op in self.graph.constants:
            return rebuilt
        x = _unrounded(rebuilt.x)
        parts = self._parts(op, x, of_rows, embedded)
        if isinstance(parts, str):
            self.report.refuse(describe(op, self.originals.get(op.w, op.w)), f"no adapter can change it: {parts}")
            return rebuilt
        self.report.hit("linear")
        gated = isinstance(rebuilt, GatedLinear)
        residual = rebuilt.residual if isinstance(rebuilt, Linear) else None
        apart = gated or bool(rebuilt.activation)  # the sums are to be changed in front of the activation
        sums = Linear(
            rebuilt.x, rebuilt.w, rebuilt.bias, None if apart else residual, "", rebuilt.rounding,
        )  # fmt: skip
        changed = self._low_rank(sums, x, of_rows[x.shape[0]], parts)
        return Activated(changed, residual, rebuilt.activation, gated) if apart else changed

    def _low_rank(self, sums: Linear, x: Value, adapters: Value, parts: list[tuple[int, Part]]) -> Value:
        entries, rank, number = self.options.count + 1, self.options.rank, len(self.tables)
        (n, k), columns = sums.w.shape, tuple(end for end, _ in parts)
        assert isinstance(n, int) and isinstance(k, int)
        shapes = ((entries, len(parts), rank, k), (entries, rank, n), (entries, len(parts)))
        kinds = ("f32", "f32", "i32")
        a, b, ranks = (
            Input(table_name(number, name), Tensor(shape, kind))
            for name, shape, kind in zip(TABLES, shapes, kinds, strict=True)
        )
        self.tables.append(AdapterTable(k, n, tuple(part for _, part in parts)))
        self.inputs += (a, b, ranks)
        return LowRank(sums, x, adapters, a, b, ranks, columns)

    def _parts(
        self, op: Linear | GatedLinear, x: Value, of_rows: Mapping[int | Dim, Value], embedded: set[str]
    ) -> list[tuple[int, Part]] | str:
        """(Behind the last column, part) of each part; or why there are none."""
        if op.dtype != "f32" or x.dtype != "f32":
            return f"its activations are {x.dtype}, not f32"
        if x.rank != 2 or x.shape[0] not in of_rows:
            return f"its activations {x.type} are no rows of tokens"
        if isinstance(x, Gather) and x.axis % x.rank == 1:
            return "its inputs are in an order of the file's own"
        found = _origin(self.originals.get(op.w, op.w), 1)
        if isinstance(found, str):
            return found
        names, rows = found
        shared = sorted(embedded & {name for name, _ in names})
        if shared:
            return f"its weight {shared[0]} is the table of embeddings too"
        if not all(name.endswith((_WEIGHT, _INTEGERS)) for name, _ in names):
            return f"its weight {names[0][0]} is that of no module"
        return list(_by_module(names, rows))


def _by_module(names: list[_Weight], rows: NDArray[np.int64]) -> Iterator[tuple[int, Part]]:
    """Consecutive columns of one weight together. rows [outputs, 2]: the number of the weight, and the row in it."""
    begin, numbers = 0, np.array([names.index(name) for name in names])[rows[:, 0]]
    for end in (*(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)):
        (name, outputs), own = names[int(numbers[begin])], rows[begin:end, 1]
        breaks = (0, *(np.flatnonzero(np.diff(own) != 1) + 1).tolist(), len(own))
        runs = tuple((int(own[low]), int(own[high - 1]) + 1) for low, high in itertools.pairwise(breaks))
        module = name[: -len(_WEIGHT)] if name.endswith(_WEIGHT) else name[: -len(_INTEGERS)]
        yield end, Part(module, outputs, runs)
        begin = end


def _unrounded(value: Value) -> Value:
    """Activations in front of their rounding."""
    if isinstance(value, QuantizeActivations):
        return value.x
    if isinstance(value, Cast) and isinstance(value.x, Cast) and value.x.dtype == "bf16":
        return value.x.x
    return value


_Weight = tuple[str, int]  # a param, and how many outputs it has
_Origin = tuple[list[_Weight], NDArray[np.int64]]


def _origin(value: Value, axis: int) -> _Origin | str:
    """Where a weight's rows come from, whose inputs lie on `axis`: params, and for all other axes in order (number of
    the param, row of its outputs), int64 [..., 2]. Or what was done to them that no adapter knows of."""
    if isinstance(value, Param):
        if value.tensor.rank != 2:
            return f"its weight {value.name} has rank {value.tensor.rank}"
        rows = np.arange(int(value.shape[1 - axis]))  # type: ignore[arg-type]  # params have fixed sizes
        return [(value.name, len(rows))], np.stack([np.zeros_like(rows), rows], axis=-1)
    if isinstance(value, (PackGroups, Quantize)):
        return _origin(value.q if isinstance(value, PackGroups) else value.w, axis)
    if isinstance(value, Cast) or (isinstance(value, UnpackNibbles) and axis == value.rank - 1):
        return _origin(value.x, axis)
    if isinstance(value, (Add, Sub)) and isinstance(value.b, Constant) and value.b.rank == 0:  # of stored integers
        return _origin(value.a, axis)
    return _moved(value, axis)


def _moved(value: Value, axis: int) -> _Origin | str:
    """`_origin` of ops that move whole rows."""
    if isinstance(value, Concat) and value.axis % value.rank != axis:
        names: list[_Weight] = []
        arrays = []
        for operand in value.operands:
            found = _origin(operand, axis)
            if isinstance(found, str):
                return found
            arrays.append(found[1] + np.array([len(names), 0]))
            names += found[0]
        at = value.axis % value.rank
        return names, np.concatenate(arrays, at - (at > axis))
    if isinstance(value, Transpose):
        inner = _origin(value.x, value.permutation[axis])
        if isinstance(inner, str):
            return inner
        kept = [source for place, source in enumerate(value.permutation) if place != axis]
        order = [source - (source > value.permutation[axis]) for source in kept]
        return inner[0], inner[1].transpose((*order, len(order)))
    if isinstance(value, Slice) and value.axis % value.rank != axis:
        inner, at = _origin(value.x, axis), value.axis % value.rank
        if isinstance(inner, str) or isinstance(value.start, Dim) or isinstance(value.stop, Dim):
            return inner if isinstance(inner, str) else "a part of its weight depends on a size"
        return inner[0], np.take(inner[1], np.arange(value.start, value.stop, value.step), at - (at > axis))
    if isinstance(value, Reshape) and axis == value.rank - 1 and value.shape[-1:] == value.x.shape[-1:]:
        inner = _origin(value.x, value.x.rank - 1)
        return inner if isinstance(inner, str) else (inner[0], inner[1].reshape(*map(int, value.shape[:-1]), 2))  # type: ignore[arg-type]
    kind = value.name if isinstance(value, Op) else type(value).__name__
    return f"its weight is computed by {kind}, and not as the checkpoint has it"
