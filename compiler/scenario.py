"""The inputs that a graph is checked with: a few sequences of token ids, in the form of the inputs that it has at its
stage.

A lifted graph takes ids [1, S] and runs once a sequence; so does a flattened graph, ids [T], as long as its attention
has no cache. A graph with a cache runs as the runtime would run it: in steps that mix prompts and continuations, over
pages in no particular order; where the cache is a scratch (an encoder), in one step of whole sequences. Each way gives
the same outputs for the same tokens, which is what makes them comparable.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.ir.attention import TILE
from llmc.compiler.ir.dims import Dim, concrete, symbols_of
from llmc.compiler.ir.elementwise import Binary, Cast, Unary, Where
from llmc.compiler.ir.encoded import PAGE, Encoded, Pages
from llmc.compiler.ir.evaluate import Data, LoadParam, bind_symbols, evaluate_values
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import Gather, GatherElements
from llmc.compiler.ir.types import FLOATS, INTEGERS, KV, NUMPY_DTYPES, Array, numpy_dtype
from llmc.errors import CompileError

_PER_TOKEN = ("ids", "positions", "token_types", "lengths", "adapters")
_TABLE = "adapter."  # how the names of adapters' tables begin
_KNOWN = (*_PER_TOKEN, "starts", "slots", "tiles", "block_table", "rows")


@dataclass(frozen=True)
class Span:
    """Tokens `begin` to `end` of one sequence, as part of a step."""

    sequence: int
    begin: int
    end: int


@dataclass(frozen=True)
class Scenario:
    """Sequences of token ids, and the steps in which a graph with a cache sees them."""

    sequences: tuple[Array, ...]
    steps: tuple[tuple[Span, ...], ...]
    pages: tuple[tuple[int, ...], ...]  # page ids of each sequence, in order
    seed: int = 0

    @classmethod
    def random(cls, vocabulary: int, seed: int = 0, lengths: tuple[int, ...] = (5, 2, 9)) -> Scenario:
        """Random ids below `vocabulary`; each length is at least 2.

        The first sequence is a whole prompt in the last step; the others are cut at a random point, so that they
        continue in that step from what the cache holds.
        """
        rng = np.random.default_rng(seed)
        sequences = tuple(rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths)
        cuts = [int(rng.integers(1, length)) for length in lengths]
        later = range(1, len(lengths)) if len(lengths) > 1 else range(len(lengths))
        first = tuple(Span(i, 0, cuts[i]) for i in later)
        last = tuple(Span(i, cuts[i], lengths[i]) for i in later)
        if len(lengths) > 1:
            last = (*last[:1], Span(0, 0, lengths[0]), *last[1:])
        needed = [-(-length // PAGE) for length in lengths]
        ids = rng.permutation(sum(needed) + 1).tolist()
        pages = tuple(tuple(ids[sum(needed[:i]) : sum(needed[: i + 1])]) for i in range(len(lengths)))
        return cls(sequences, (first, last), pages, seed)

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def place(self, row: int, rows: int) -> tuple[int, ...]:
        """Where a row of an output with `rows` rows is: (sequence, position), or (sequence,) where each has one row."""
        return self.token(row) if rows == self.tokens else (row,)

    def types(self, sequence: int) -> Array:
        """Token types int32 [n] of a sequence: its second half is another text."""
        length = len(self.sequences[sequence])
        return (2 * np.arange(length) >= length).astype(np.int32)

    def row(self, sequence: int, position: int) -> int:
        """Where a token's outputs are among those of all tokens."""
        return sum(len(earlier) for earlier in self.sequences[:sequence]) + position

    def token(self, row: int) -> tuple[int, int]:
        """(sequence, position) of a row of the outputs."""
        for index, sequence in enumerate(self.sequences):
            if row < len(sequence):
                return index, row
            row -= len(sequence)
        raise CompileError(f"row {row} is beyond the scenario's tokens")

    def run(self, graph: Graph, load_param: LoadParam, known: Mapping[Value, Data] | None = None) -> dict[str, Array]:
        """Every output [tokens, features] but the caches, whatever shape the graph has; rows as `row` says. What has a
        row a sequence is [sequences, features].

        `known`: values that were evaluated already, such as quantized weights.
        """
        unknown = [v.name for v in graph.inputs if not _is_known(v)]
        if unknown:
            raise CompileError(f"cannot check a graph with input {unknown[0]!r}; known: {', '.join(_KNOWN)}, caches")
        names = {value.name for value in graph.inputs}
        results = self._run_in_steps if "block_table" in names else self._run_by_sequence
        return results(graph, load_param, known or {})

    def _steps_for(self, graph: Graph) -> tuple[tuple[Span, ...], ...]:
        """The steps that show a graph all tokens: one of whole sequences, the last first, where no cache is kept."""
        if any(isinstance(value.type, KV) for _, value in graph.outputs):
            return self.steps
        return (tuple(Span(i, 0, len(ids)) for i, ids in reversed(list(enumerate(self.sequences)))),)

    def _run_by_sequence(self, graph: Graph, load_param: LoadParam, known: Mapping[Value, Data]) -> dict[str, Array]:
        collected = _Collected(graph, self.tokens, len(self.sequences))
        steps = [self._render((Span(index, 0, len(ids)),)) for index, ids in enumerate(self.sequences)]
        runs: list[dict[str, Data]] = []
        for step in steps:
            inputs: dict[str, Data] = empty_tables(graph)
            for value in graph.inputs:
                if value.name in inputs:
                    continue
                data = step.arrays[value.name].astype(NUMPY_DTYPES[value.dtype])
                inputs[value.name] = data[None] if value.name in _PER_TOKEN and value.rank == 2 else data
            runs.append(inputs)
        for step, inputs, outputs in zip(steps, runs, evaluate_together(graph, runs, load_param, known), strict=True):
            collected.add(outputs, step.output_rows("rows" in inputs), step.sequences)
        return collected.outputs

    def _run_in_steps(self, graph: Graph, load_param: LoadParam, known: Mapping[Value, Data]) -> dict[str, Array]:
        collected = _Collected(graph, self.tokens, len(self.sequences))
        count = sum(len(pages) for pages in self.pages) + 1
        caches: dict[str, Data] = {
            value.name: Pages.empty(value.type, count) for value in graph.inputs if isinstance(value.type, KV)
        }
        tables = empty_tables(graph)
        for spans in self._steps_for(graph):
            step = self._render(spans)
            inputs = {**caches, **tables}
            for value in graph.inputs:
                if value.name not in inputs:
                    inputs[value.name] = step.arrays[value.name].astype(NUMPY_DTYPES[value.dtype])
            outputs = evaluate_with(graph, inputs, load_param, known)
            caches = {name: outputs.pop(f"{name}.next", cache) for name, cache in caches.items()}
            collected.add(outputs, step.output_rows("rows" in inputs), step.sequences)
        return collected.outputs

    def _render(self, spans: tuple[Span, ...]) -> _Step:
        """The step's inputs, in the layout that docs/architecture.md gives."""
        ids: list[int] = []
        positions: list[int] = []
        types: list[int] = []
        lengths: list[int] = []
        starts: list[int] = [0]
        slots: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        at: list[int] = []
        order = [span.sequence for span in spans]
        for span in spans:
            row = len(ids)
            for begin in range(span.begin, span.end, TILE):
                rows = min(TILE, span.end - begin)
                tiles.append((order.index(span.sequence), row + begin - span.begin, rows, begin))
            for position in range(span.begin, span.end):
                ids.append(int(self.sequences[span.sequence][position]))
                positions.append(position)
                types.append(int(self.types(span.sequence)[position]))
                lengths.append(len(self.sequences[span.sequence]))
                slots.append(self.pages[span.sequence][position // PAGE] * PAGE + position % PAGE)
                at.append(self.row(span.sequence, position))
            starts.append(len(ids))
        table = np.zeros((len(spans), max(len(self.pages[index]) for index in order)), np.int32)
        for row, index in enumerate(order):
            table[row, : len(self.pages[index])] = self.pages[index]
        # All rows are wanted, in an order that shows whether a graph honours it.
        chosen = np.random.default_rng(self.seed).permutation(len(ids))
        arrays: dict[str, Array] = {
            "ids": np.array(ids), "positions": np.array(positions), "token_types": np.array(types),
            "lengths": np.array(lengths), "adapters": np.zeros(len(ids)),
            "starts": np.array(starts), "slots": np.array(slots), "tiles": np.array(tiles), "block_table": table,
            "rows": chosen,
        }  # fmt: skip
        return _Step(arrays, np.array(at), np.array(at)[chosen], np.array(order))


@dataclass(frozen=True)
class _Step:
    """One step's inputs, the rows of all tokens that its own rows are, and its sequences in order."""

    arrays: dict[str, Array]
    plain: Array
    chosen: Array
    sequences: Array

    def output_rows(self, selected: bool) -> Array:
        return self.chosen if selected else self.plain


@dataclass
class _Collected:
    """Outputs of all tokens and sequences, filled in step by step."""

    graph: Graph
    tokens: int
    sequences: int
    outputs: dict[str, Array] = field(default_factory=dict)

    def add(self, outputs: Mapping[str, Data], rows: Array, sequences: Array) -> None:
        """rows: where the step's rows, one a token, belong; sequences: where those belong that are one a sequence."""
        for name, data in outputs.items():
            if isinstance(data, (Pages, Encoded)):
                continue
            axis = token_axis(self.graph.output(name))
            where, count = (sequences, self.sequences) if axis is None else (rows, self.tokens)
            flat = (data if axis is None else np.moveaxis(data, axis, 0)).reshape(len(where), -1)
            target = self.outputs.setdefault(name, np.full((count, flat.shape[1]), np.nan, flat.dtype))
            # What has a column a token too is wider for longer sequences: zeros fill what others lack.
            width = max(target.shape[1], flat.shape[1])
            target = self.outputs[name] = _widened(target, width)
            target[where] = _widened(flat, width)


def _widened(rows: Array, width: int) -> Array:
    missing = width - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing))) if missing else rows


def token_axis(value: Value) -> int | None:
    """The axis that counts tokens (S, T or R); None for what has a row a sequence."""
    for axis, dim in enumerate(value.shape):
        if any(symbol.name != "B" for symbol in symbols_of(dim)):
            return axis
    return None


def prompt_runs(graph: Graph, texts: Sequence[Array], tokens: int = 512, wide: bool = False) -> list[dict[str, Data]]:
    """The inputs of steps that read whole sequences, one each, or where a graph takes several about so many tokens.
    wide: with caches in f32."""
    if not any(value.name == "starts" for value in graph.inputs):
        return [prompt_inputs(graph, ids, wide=wide) for ids in texts]
    runs, waiting = [], list[Array]()
    for index, ids in enumerate(texts, 1):
        waiting.append(ids)
        if index == len(texts) or sum(map(len, waiting)) >= tokens:
            runs.append(prompt_inputs(graph, *waiting, wide=wide))
            waiting = []
    return runs


def prompt_inputs(graph: Graph, *texts: Array, wide: bool = False) -> dict[str, Data]:
    """The inputs of a step that reads whole sequences and gives all of their rows, in order: one, or several where the
    graph takes them. Caches are empty (wide: in f32), and tokens of the first type."""
    spans = tuple(Span(index, 0, len(ids)) for index, ids in enumerate(texts))
    ends = np.cumsum([0, *(-(-len(ids) // PAGE) for ids in texts)]).tolist()
    pages = tuple(tuple(range(begin, end)) for begin, end in itertools.pairwise(ends))
    arrays = Scenario(tuple(texts), (), pages)._render(spans).arrays
    arrays["rows"] = np.arange(sum(map(len, texts)))
    arrays["token_types"] = np.zeros_like(arrays["token_types"])
    inputs: dict[str, Data] = empty_tables(graph)
    for value in graph.inputs:
        if value.name in inputs:
            continue
        if isinstance(value.type, KV):
            empty = Pages.empty(value.type, ends[-1])
            inputs[value.name] = (
                Pages(*(each.astype(np.float32) for each in (empty.keys, empty.values))) if wide else empty
            )
            continue
        data = arrays[value.name].astype(NUMPY_DTYPES[value.dtype])
        inputs[value.name] = data[None] if value.name in _PER_TOKEN and value.rank == 2 else data
    return inputs


def evaluate_with(
    graph: Graph, inputs: Mapping[str, Data], load_param: LoadParam, known: Mapping[Value, Data]
) -> dict[str, Data]:
    """`evaluate`, given some of the graph's values besides its inputs."""
    given: dict[Value, Data] = dict(known)
    given.update({value: inputs[value.name] for value in graph.inputs})
    outputs = [value for _, value in graph.outputs]
    names = [name for name, _ in graph.outputs]
    return evaluate_values(outputs, given, load_param, bind_symbols(graph, inputs), names)


def evaluate_together(
    graph: Graph, runs: Sequence[Mapping[str, Data]], load_param: LoadParam, known: Mapping[Value, Data]
) -> list[dict[str, Data]]:
    """The outputs for each of several inputs, op by op, so that a weight is loaded and widened once for all of them."""
    outputs = dict.fromkeys(value for _, value in graph.outputs)
    found = {value: data for value, data in computed(graph, list(outputs), runs, load_param, known) if value in outputs}
    for value in outputs:
        if value not in found:
            assert isinstance(value, Input) or value in known
            found[value] = [inputs[value.name] if isinstance(value, Input) else known[value] for inputs in runs]
    return [{name: found[value][run] for name, value in graph.outputs} for run in range(len(runs))]


def computed(
    graph: Graph,
    roots: Sequence[Value],
    runs: Sequence[Mapping[str, Data]],
    load_param: LoadParam,
    known: Mapping[Value, Data],
    pool: Executor | None = None,
) -> Iterator[tuple[Value, list[Data]]]:
    """Everything that `roots` need besides the graph's inputs and `known`, in order: each value with what it is for
    each of several inputs. What no later value needs is forgotten. Weights are loaded and widened once for all.

    pool: of threads that share the inputs among them.
    """
    bindings = [bind_symbols(graph, inputs) for inputs in runs]
    given: list[dict[Value, Data]] = [{value: inputs[value.name] for value in graph.inputs} for inputs in runs]
    order = topological(roots, {*known, *graph.inputs})
    last_use = {operand: index for index, op in enumerate(order) if isinstance(op, Op) for operand in op.operands}
    shared: dict[Value, Data] = dict(known)  # values of params and constants, the same for all runs
    for index, value in enumerate(order):
        operands = value.operands if isinstance(value, Op) else ()
        # An op without sizes among its attributes gives itself when bound; others differ from run to run.
        sized = isinstance(value, Op) and value.bind({}) is not value
        if value in graph.constants and not sized and all(operand in shared for operand in operands):
            shared[value] = evaluate_values([value], shared, load_param, {})["0"]
        else:

            def evaluated(own: dict[Value, Data], binding: Mapping[str, int], value: Value = value) -> Data:
                operands = value.operands if isinstance(value, Op) else ()
                local = {operand: own[operand] if operand in own else shared[operand] for operand in operands}
                return evaluate_values([value], local, load_param, binding)["0"]

            results = list((map if pool is None else pool.map)(evaluated, given, bindings))
            for own, result in zip(given, results, strict=True):
                own[value] = result
        yield value, [own[value] if value in own else shared[value] for own in given]
        for operand in (*operands, value):
            if last_use.get(operand, index) == index and operand not in known:
                shared.pop(operand, None)
                for own in given:
                    own.pop(operand, None)


def vocabulary_of(graph: Graph, name: str = "ids", binding: Mapping[str, int] | None = None) -> int:
    """How many different ids an input may hold: rows of the smallest table that it looks up in, itself or as an integer
    computed from it. binding: the values of sizes, where tables have symbolic ones."""
    reached: set[Value] = {value for value in graph.inputs if value.name == name}
    bound = 1 << 15
    for op in graph.ops:
        computed = isinstance(op, (Cast, Unary, Binary, Where)) and op.dtype in INTEGERS
        if computed and not reached.isdisjoint(op.operands):
            reached.add(op)
        rows: int | Dim | None = None
        if isinstance(op, Embed) and op.ids in reached:
            rows = op.table.shape[0]
        elif isinstance(op, (Gather, GatherElements)) and op.indices in reached:
            rows = op.x.shape[op.axis]
        if rows is not None and (isinstance(rows, int) or binding):
            bound = min(bound, concrete(rows, binding or {}))
    return bound


def random_params(graph: Graph, seed: int = 0) -> LoadParam:
    """Weights of the right shapes and dtypes, the same ones for the same names, that keep activations of order one.

    Matrices are normal with variance 1 / inputs; vectors, which may be scales or biases, lie in [0.5, 1.5].
    """
    params: dict[str, Param] = {param.name: param for param in graph.params}

    def load(name: str) -> Array:
        if name not in params:
            raise CompileError(f"no param {name!r} in graph {graph.name}")
        kind = params[name].tensor
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        shape = tuple(concrete(dim, {}) for dim in kind.shape)
        if kind.dtype not in FLOATS:
            return rng.integers(0, 2 if kind.dtype == "bool" else 5, shape).astype(NUMPY_DTYPES[kind.dtype])
        vector = len(shape) < 2
        values = rng.uniform(0.5, 1.5, shape) if vector else rng.standard_normal(shape) / np.sqrt(shape[-1])
        return np.asarray(values).astype(NUMPY_DTYPES[kind.dtype])

    return load


def random_inputs(graph: Graph, seed: int = 0, sizes: Mapping[str, int] | None = None) -> dict[str, Data]:
    """Inputs for a graph that is no language model: sizes in 2..9 within their ranges, normal floats, valid ids.

    `sizes` fixes some symbols. Inputs called `positions` count up; other integers stay below the tables they index.
    """
    rng = np.random.default_rng(seed)
    binding: dict[str, int] = {}
    for symbol in graph.symbols:
        high = 9 if symbol.high is None else min(9, symbol.high)
        binding[symbol.name] = int(rng.integers(min(max(symbol.low, 2), high), high + 1))
    binding.update(sizes or {})
    return {value.name: _random_input(graph, value, rng, binding) for value in graph.inputs}


def _random_input(graph: Graph, value: Input, rng: np.random.Generator, binding: Mapping[str, int]) -> Data:
    if isinstance(value.type, KV):
        return Pages.empty(value.type, 4)
    shape = tuple(concrete(dim, binding) for dim in value.shape)
    dtype = NUMPY_DTYPES[value.dtype]
    if value.dtype in FLOATS:
        # Rounded as the type says, then as wide as evaluation is.
        return np.asarray(rng.standard_normal(shape)).astype(dtype).astype(numpy_dtype(value.dtype))
    if value.name == "positions":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    high = min(vocabulary_of(graph, value.name, binding), 100) if value.dtype in INTEGERS else 2
    return np.asarray(rng.integers(0, high, shape)).astype(dtype)


def is_token_graph(graph: Graph) -> bool:
    """Whether a graph takes token ids and nothing that a scenario cannot render."""
    return any(value.name == "ids" for value in graph.inputs) and all(map(_is_known, graph.inputs))


def _is_known(value: Input) -> bool:
    """Whether a scenario has this input."""
    return value.name in _KNOWN or isinstance(value.type, KV) or value.name.startswith(_TABLE)


def empty_tables(graph: Graph) -> dict[str, Data]:
    """The tables of adapters while none is loaded."""
    tables = [value for value in graph.inputs if value.name.startswith(_TABLE)]
    return {value.name: np.zeros(value.shape, NUMPY_DTYPES[value.dtype]) for value in tables}  # type: ignore[arg-type]
