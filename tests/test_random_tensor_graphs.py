"""Random graphs of tensor ops of every kind and dtype: each compiled op equals its meaning on what it was given.

Every value of a graph is an output, and each is compared with the numpy meaning of its op on the *compiled* values of
its operands, so that no difference in a last place grows from op to op, or tips a comparison.
"""

from __future__ import annotations

import numpy as np
import pytest
from program_batch import ProgramBatch

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.types import FLOATS, INTEGERS, NUMPY_DTYPES, UNSIGNED, Array, Tensor
from llmc.errors import DimError, IRError
from llmc.targets import machine_named

SIZE = symbol("S", 1, 64)
SHAPES = ((SIZE, 6), (SIZE,), (6,), (SIZE, 1, 6), (2, SIZE, 3), ())
DTYPES = (*FLOATS, *INTEGERS, "bool")
# Relative to the largest number involved: a few roundings of the dtype.
TOLERANCE = {"f64": 1e-12, "f32": 4e-6, "f16": 2**-9, "bf16": 2**-6}

UNARY = [kind for kind in e.Unary.__subclasses__() if kind is not e.Not]
BINARY = (e.Add, e.Sub, e.Mul, e.Maximum, e.Minimum, e.Div, e.FloorDivide, e.Mod, e.Fmod)
BITS = (e.BitAnd, e.BitOr, e.BitXor, e.ShiftLeft, e.ShiftRight)
DIVISIONS = (e.Div, e.FloorDivide, e.Mod, e.Fmod)


def random_graph(seed: int, steps: int = 8) -> Graph:
    """A graph of `steps` ops over an input of each shape, all values of which are outputs."""
    rng = np.random.default_rng(seed)
    names = rng.choice(DTYPES, len(SHAPES))
    inputs = tuple(Input(f"x{i}", Tensor(shape, str(names[i]))) for i, shape in enumerate(SHAPES))
    values: list[Value] = list(inputs)
    made: list[Op] = []
    while len(made) < steps:
        op = _next(rng, values)
        if op is not None:
            made.append(op)
            values.append(op)
    found = [value for value in topological(list(made)) if isinstance(value, Op)]
    return Graph(f"random{seed}", inputs, tuple((f"v{i}", value) for i, value in enumerate(found)))


def _next(rng: np.random.Generator, values: list[Value]) -> Op | None:
    try:
        return _drawn(rng, values)
    except (IRError, DimError):  # the operands do not fit
        return None


def _drawn(rng: np.random.Generator, values: list[Value]) -> Op | None:
    x = values[rng.integers(len(values))]
    same = [value for value in values if value.dtype == x.dtype]
    y = same[rng.integers(len(same))]
    axis = int(rng.integers(-x.rank, x.rank)) if x.rank else 0
    kinds: list[object] = [e.Cast, *_of_dtype(x.dtype), *e.Compare.__subclasses__()[:6]]
    if x.rank:
        kinds += [s.Transpose, s.Broadcast, s.Slice, s.Concat, s.Pad, s.Gather, s.Argmax, s.TopK, s.Reshape, s.Scatter]
        kinds += [s.Any, s.All] if x.dtype == "bool" else [s.Sum, s.Prod, s.Mean, s.Max, s.Min, s.Cumsum, s.Matmul]
    kind = kinds[rng.integers(len(kinds))]
    assert isinstance(kind, type)
    if kind is e.Cast:
        return e.Cast(x, str(rng.choice(DTYPES)))
    if kind is e.Where:
        conditions = [value for value in values if value.dtype == "bool"]
        return e.Where(conditions[rng.integers(len(conditions))], x, y) if conditions else None
    if issubclass(kind, e.Unary):
        return kind(x)
    if issubclass(kind, e.Binary):
        return kind(x, y)
    if issubclass(kind, s.Reduce):
        axes = [i for i in range(x.rank) if rng.random() < 0.6]
        return kind(x, tuple(axes), bool(rng.random() < 0.5))
    if kind is s.Transpose:
        return s.Transpose(x, tuple(int(i) for i in rng.permutation(x.rank)))
    if kind is s.Broadcast:
        return s.Broadcast(x, (int(rng.integers(1, 3)), *x.shape))
    if kind is s.Slice:
        size = x.shape[axis]
        return s.Slice(x, axis, int(rng.integers(0, 2)), size, int(rng.integers(1, 3)))
    if kind is s.Concat:
        return s.Concat((x, y, x), axis)
    if kind is s.Pad:
        return s.Pad(x, *(tuple(int(i) for i in rng.integers(0, 3, x.rank)) for _ in range(2)), 1.0)
    if kind is s.Gather:
        indices = e.constant(rng.integers(-1, 1, int(rng.integers(1, 5))), str(rng.choice(["i64", "i32"])))
        return s.Gather(x, indices, axis)
    if kind is s.Scatter:
        count = int(rng.integers(1, 5))
        rows = s.Broadcast(s.Slice(x, 0, 0, 1), (count, *x.shape[1:]))
        how = ("none", "add", "mul", "max", "min")[rng.integers(5)] if x.dtype != "bool" else "none"
        return s.Scatter(x, e.constant(np.zeros(count, np.int64)), rows, how)
    if kind is s.TopK:
        return s.TopK(x, x.shape[axis], axis, bool(rng.random() < 0.5))
    if kind is s.Reshape:
        return s.Reshape(x, (*x.shape[:1], 1, *x.shape[1:]))
    if kind is s.Matmul:
        return s.Matmul(x, s.Transpose(x, (*range(x.rank - 2), x.rank - 1, x.rank - 2))) if x.rank >= 2 else None
    return kind(x, axis)


def _of_dtype(dtype: str) -> list[object]:
    """Elementwise ops of a dtype, and softmax."""
    if dtype == "bool":
        return [e.Not, e.And, e.Or, e.Where]
    if dtype in INTEGERS:
        return [e.Neg, e.Abs, e.Relu, e.Where, *BINARY, *BITS]
    return [*UNARY, *BINARY, e.Where, s.Softmax]


def data_for(graph: Graph, size: int, seed: int) -> dict[str, Array]:
    """Inputs for S = `size`."""
    rng = np.random.default_rng([seed, size])
    found = {}
    for value in graph.inputs:
        shape = [size if dim == SIZE else int(dim) for dim in value.shape]
        if value.dtype == "bool":
            found[value.name] = rng.random(shape) > 0.5
        else:
            low = 0 if value.dtype in UNSIGNED else -9
            numbers = rng.standard_normal(shape) * 2 if value.dtype in FLOATS else rng.integers(low, 10, shape)
            found[value.name] = np.asarray(numbers).astype(NUMPY_DTYPES[value.dtype])
    return found


def undefined(op: Op, operands: list[Array]) -> Array:
    """Where an op's result may be anything: integers by zero, and floats that no integer is near."""
    if isinstance(op, DIVISIONS) and op.dtype in INTEGERS:
        a, b = np.broadcast_arrays(*operands)
        return (b == 0) | ((b == -1) & (a == np.iinfo(a.dtype).min))
    source = operands[0] if operands else np.zeros(())
    if isinstance(op, (e.Cast, s.Mean)) and op.operands[0].dtype in FLOATS and op.dtype in INTEGERS:
        limits, wide = np.iinfo(NUMPY_DTYPES[op.dtype]), source.astype(np.float64)
        return ~((wide > float(limits.min) - 1) & (wide < float(limits.max)))
    return np.zeros((), bool)


def problem_with(op: Op, operands: list[Array], found: Array, size: int) -> str:
    with np.errstate(all="ignore"):
        expected = np.asarray(op.bind({"S": size}).evaluate(*operands))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    skip = np.broadcast_to(undefined(op, operands), expected.shape)
    found, expected = np.where(skip, 0, found), np.where(skip, 0, expected)
    try:
        if op.dtype not in FLOATS:
            np.testing.assert_array_equal(found, expected)
            return ""
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        numbers = [1.0, *(np.abs(x[np.isfinite(x)]).max(initial=0) for x in (expected, *map(_wide, operands)))]
        scale = max(numbers) ** (2 if isinstance(op, s.Matmul) else 1)
        tolerance = TOLERANCE[op.dtype]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)
    except AssertionError as error:
        return f"S = {size}: {op.name} {op.attributes()} of {[str(x.type) for x in op.operands]}: {str(error)[:300]}"
    return ""


def _wide(x: Array) -> Array:
    return np.asarray(x).astype(np.float64)


def check(seeds: range) -> None:
    batch = ProgramBatch(machine_named("native"))
    graphs = [random_graph(seed) for seed in seeds]
    programs = [batch.add(graph) for graph in graphs]
    batch.build()
    failed = []
    for seed, graph, program in zip(seeds, graphs, programs, strict=True):
        for size in (1, 7, 33):
            data = data_for(graph, size, seed)
            results = batch.run(program, data)
            known: dict[Value, Array] = {value: data[value.name] for value in graph.inputs}
            for name, value in graph.outputs:
                assert isinstance(value, Op)
                found = problem_with(value, [known[x] for x in value.operands], results[name], size)
                failed += [f"graph {seed}, {found}"] if found else []
                known[value] = results[name]
    assert not failed, "\n".join([f"{len(failed)} values differ", *failed[:30]])


def test_random_graphs() -> None:
    check(range(20))


@pytest.mark.slow
def test_many_random_graphs() -> None:
    check(range(1000, 1300))


def test_the_graphs_have_every_op_and_dtype() -> None:
    from llmc.targets.cpu.plain_builder import FORMS

    ops = [value for seed in range(1000, 1300) for _, value in random_graph(seed).outputs if isinstance(value, Op)]
    alone = {"t.activation", "t.iota", "t.bitcast", "t.gather_elements", "t.pow"}  # test_cpu_plain_matrix.py has them
    assert {op.name for op in ops} >= set(FORMS) - alone
    assert {op.dtype for op in ops} == set(DTYPES)
