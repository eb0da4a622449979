"""Every tensor op in every dtype, compiled, equals its numpy meaning: at the edges of dtypes, and of nothing at all.

What is computed exactly by both must be equal to the last bit; where a library function or an order of additions
differs, to within a few units in the last place of the dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from program_batch import ProgramBatch

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Op
from llmc.compiler.ir.types import FLOATS, INTEGERS, NUMPY_DTYPES, Tensor
from llmc.targets import machine_named
from llmc.targets.lowering import Program

DTYPES = (*FLOATS, *INTEGERS, "bool")
SOME = ("f32", "f16", "i64", "u8", "bool")  # of every kind one; the others in the slow tests
Dtypes = tuple[str, ...]
# Relative, for what is not exact: f32 sums and functions within a few roundings; halves are rounded once more.
TOLERANCE = {"f64": 1e-12, "f32": 2e-6, "f16": 2**-10, "bf16": 2**-7}


@dataclass(frozen=True)
class Case:
    """One op over inputs of these arrays. skip(*arrays): where the result may be anything."""

    op: Op
    given: tuple[Input, ...]
    arrays: tuple[np.ndarray, ...]
    exact: bool = True
    skip: Callable[..., np.ndarray] | None = None

    @property
    def graph(self) -> Graph:
        return Graph("one", self.given, (("y", self.op),))

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {value.name: array for value, array in zip(self.given, self.arrays, strict=True)}

    def __str__(self) -> str:
        shapes = "_".join(f"{array.dtype}{list(array.shape)}" for array in self.arrays)
        extra = "_".join(f"{name}={value}" for name, value in self.op.attributes().items())
        return f"{self.op.name}_{shapes}_{self.op.dtype}_{extra}".replace(" ", "")


def edges(dtype: str) -> np.ndarray:
    """Values at which a dtype's arithmetic turns, and some between."""
    numpy_dtype = NUMPY_DTYPES[dtype]
    if dtype == "bool":
        return np.array([False, True])
    if dtype in FLOATS:
        values = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 0.1, -3.7, 7.25, 100.0, 1e-30, np.inf, -np.inf, np.nan]
        return np.array(values).astype(numpy_dtype)
    limits = np.iinfo(numpy_dtype)
    signed = [-1, -2, -7, limits.min, limits.min + 1] if limits.min else []
    return np.array([0, 1, 2, 3, 5, 7, 100, limits.max, limits.max - 1, *signed], numpy_dtype)


def random(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Small numbers, equal ones among them."""
    rng = np.random.default_rng([seed, *shape])
    if dtype == "bool":
        return rng.random(shape) > 0.4
    values = (
        rng.standard_normal(shape) * 2 if dtype in FLOATS else rng.integers(0 if dtype[0] == "u" else -9, 10, shape)
    )
    return values.astype(NUMPY_DTYPES[dtype])


def made(build: Callable[..., Op], *arrays: np.ndarray, exact: bool = True, skip: Callable | None = None) -> Case:
    names = {numpy_dtype: name for name, numpy_dtype in NUMPY_DTYPES.items()}
    inputs = [Input(f"x{i}", Tensor(array.shape, names[array.dtype])) for i, array in enumerate(arrays)]
    return Case(build(*inputs), tuple(inputs), arrays, exact, skip)


def undefined_division(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    lowest = np.iinfo(a.dtype).min
    overflows = (a == lowest) & (b == -1) if lowest else np.zeros(np.broadcast(a, b).shape, bool)
    return (b == 0) | overflows


EXACT_UNARY = (e.Neg, e.Abs, e.Sqrt, e.Reciprocal, e.Floor, e.Round, e.Relu)
INTEGER_UNARY = (e.Neg, e.Abs, e.Relu)
ARITHMETIC = (e.Add, e.Sub, e.Mul, e.Maximum, e.Minimum)
DIVISIONS = (e.Div, e.FloorDivide, e.Mod, e.Fmod)
BITS = (e.BitAnd, e.BitOr, e.BitXor, e.ShiftLeft, e.ShiftRight)
MOVES: tuple[Callable[..., Op], ...] = (
    lambda x: s.Transpose(x, (2, 0, 1)),
    lambda x: s.Transpose(x, (0, 2, 1)),
    lambda x: s.Broadcast(s.Slice(x, 1, 1, 2), (2, 3, 5, 7)),
    lambda x: s.Slice(x, 1, 1, 5, 2),
    lambda x: s.Slice(x, 2, 3, 3),
    lambda x: s.Concat((x, x, s.Slice(x, 1, 2, 3)), 1),
    lambda x: s.Concat((x, s.Slice(x, 2, 0, 0)), -1),
    lambda x: s.Pad(x, (0, 1, 2), (1, 0, 3), 1.0),
    lambda x: s.Pad(s.Slice(x, 1, 0, 0), (0, 1, 0), (0, 1, 0)),
    lambda x: e.Where(e.constant(np.arange(7) % 2 == 0), x, s.Slice(x, 1, 0, 1)),
)
REDUCTIONS = (s.Sum, s.Prod, s.Mean, s.Max, s.Min)
AXES = ((0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2), ())
# In which numpy gives either zero, depending on its own instructions.
UNSIGNED_ZEROS = (e.Maximum, e.Minimum, e.Relu, e.Activation, s.Reduce, s.Cumsum, s.Matmul, s.Scatter)


def elementwise_cases(dtypes: Dtypes) -> list[Case]:
    found = []
    for dtype in (dtype for dtype in dtypes if dtype in FLOATS):
        one, other = edges(dtype), edges(dtype)[:, None]
        unary = [kind for kind in e.Unary.__subclasses__() if kind is not e.Not]
        # The lowest of them overflow f64's and f32's exp alike; sin and cos of infinities are not numbers.
        found += [made(kind, one, exact=kind in EXACT_UNARY) for kind in unary]
        found += [made(lambda x, k=k: e.Activation(x, k), one[:12], exact=k.startswith("relu")) for k in e.ACTIVATIONS]
        found += [made(kind, one, other) for kind in (*ARITHMETIC, *DIVISIONS, *e.Compare.__subclasses__())]
        found.append(made(e.Pow, np.abs(one), other, exact=False))
    for dtype in (dtype for dtype in dtypes if dtype in INTEGERS):
        one, other = edges(dtype), edges(dtype)[:, None]
        found += [made(kind, one) for kind in INTEGER_UNARY]
        found += [made(kind, one, other) for kind in (*ARITHMETIC, *BITS, *e.Compare.__subclasses__())]
        found += [made(kind, one, other, skip=undefined_division) for kind in DIVISIONS]
        found.append(made(e.Pow, one[one != (np.iinfo(one.dtype).min or 1)], other))
    truths = edges("bool")
    found += [made(kind, truths, truths[:, None]) for kind in (e.And, e.Or, e.Equal, e.NotEqual)]
    return [*found, made(e.Not, truths)]


def cast_cases(dtypes: Dtypes) -> list[Case]:
    found = []
    for source, target in itertools.product(dtypes, dtypes):
        array = edges(source)
        if source in FLOATS and target in INTEGERS:  # others are undefined
            array = np.array([0, 1, 2.5, 100.9, 127] + [-1.9, -100] * (target[0] == "i")).astype(array.dtype)
        found.append(made(lambda x, to=target: e.Cast(x, to), array))
    # Rounded to f32 first, these fall on a half of f16 and then to the wrong side.
    twice = np.array([1 + 2**-11 + 2**-40, 1 - 2**-12 - 2**-40, 65519.9999999, 2**-25 + 2**-60, -(1 + 2**-11 + 2**-40)])
    found.append(made(lambda x: e.Cast(x, "f16"), twice))
    for group in (("i8", "u8"), ("i16", "u16", "f16", "bf16"), ("i32", "u32", "f32"), ("i64", "u64", "f64")):
        pairs = itertools.permutations(group, 2)
        found += [made(lambda x, to=b: e.Bitcast(x, to), random(a, 33)) for a, b in pairs]
    return found


def structural_cases(dtypes: Dtypes) -> list[Case]:
    found = []
    indices = np.array([[0, -1], [6, 2]], np.int64)
    for dtype in dtypes:
        x = random(dtype, 3, 5, 7)
        found += [made(move, x) for move in MOVES]
        for narrow in ("i64", "i32", "u8"):
            at = np.abs(indices) if narrow == "u8" else indices
            found.append(made(lambda x, i: s.Gather(x, i, 2), x, at.astype(NUMPY_DTYPES[narrow])))
        found.append(made(lambda x, i: s.Gather(x, i, 0), x, np.array(-1)))
        inside = np.random.default_rng(1).integers(-5, 5, (3, 2, 7))
        found.append(made(lambda x, i: s.GatherElements(x, i, 1), x, inside))
        rows = np.array([2, 0, 2, 1, 2])
        for reduction in ("none", "add", "mul", "max", "min")[: 1 if dtype == "bool" else None]:
            updates = random(dtype, 5, 5, 7, seed=1)
            found.append(made(lambda *v, r=reduction: s.Scatter(*v, r), x, rows, updates))
        found += [made(lambda x, a=axis: s.Argmax(x, a), x) for axis in (0, 1, -1)]
        orders = itertools.product((0, 1, -1), (True, False))
        found += [made(lambda x, a=a, g=g: s.TopK(x, x.shape[a], a, g), x) for a, g in orders]
        found.append(made(lambda x: s.TopK(x, 3, 2), x))
        if dtype in FLOATS:
            found += [made(lambda x, a=axis: s.Softmax(x, a), x, exact=False) for axis in (0, 1, 2)]
            ordered = np.array([[1, np.nan, np.inf, np.nan, -np.inf, 1]]).astype(x.dtype)
            found += [made(lambda x, g=g: s.TopK(x, 4, 1, g), ordered) for g in (True, False)]
            found.append(made(lambda x: s.Argmax(x, 1), ordered))
        if dtype != "bool":
            found += [made(lambda x, a=axis: s.Cumsum(x, a), x) for axis in (0, 1, 2)]
            found.append(made(s.Matmul, x, random(dtype, 7, 9), exact=dtype in INTEGERS))
            found.append(made(s.Matmul, x, random(dtype, 3, 7, 70), exact=dtype in INTEGERS))
            found.append(made(s.Matmul, x[:, :, :0], random(dtype, 3, 0, 2)))
    return found


def reduction_cases(dtypes: Dtypes) -> list[Case]:
    found = []
    for dtype in dtypes[:-1]:
        ints = dtype in INTEGERS
        x = random(dtype, 2, 33, 70)
        for kind, axes in itertools.product(REDUCTIONS, AXES):
            if kind is s.Prod and not ints:  # of more, floats overflow
                found.append(made(lambda x, k=kind, a=axes: k(x, a), random(dtype, 2, 3, 4), exact=False))
                continue
            exact = ints or kind in (s.Max, s.Min)
            found.append(made(lambda x, k=kind, a=axes: k(x, a, len(a) != 1), x, exact=exact))
        for kind in (s.Sum, s.Prod, s.Max, s.Min, *(() if ints else (s.Mean,))):
            found += [made(lambda x, k=kind, a=a: k(x, (a,)), x[:, :0, :3]) for a in (0, 1, 2)]
        if not ints:
            holed = x.copy()
            holed[0, 5, 6] = np.nan
            found += [made(lambda x, k=k, a=a: k(x, (a,)), holed) for k in (s.Max, s.Min) for a in (1, 2)]
    truths = random("bool", 2, 33, 70)
    rare = truths & random("bool", 2, 33, 70, seed=2) & random("bool", 2, 33, 70, seed=3)
    for kind, axes, x in itertools.product((s.Any, s.All, s.Max, s.Min, s.Sum), AXES, (rare, ~rare)):
        found.append(made(lambda x, k=kind, a=axes: k(x, a), x))
    return found


def small_cases(dtypes: Dtypes) -> list[Case]:
    """Single numbers, and nothing at all."""
    found = []
    for dtype in dtypes:
        number, nothing = random(dtype), random(dtype, 0, 3)
        found += [made(lambda x: s.Broadcast(x, (2, 3)), number), made(lambda x: e.Cast(x, "f32"), number)]
        found += [made(lambda x: s.Transpose(x, (1, 0)), nothing), made(lambda x: e.Cast(x, "f32"), nothing)]
        found.append(made(lambda x: s.Concat((x, x), 1), nothing))
        if dtype != "bool":
            found += [made(e.Add, number, random(dtype, 1, 3)), made(e.Add, nothing, random(dtype, 1))]
            found += [made(lambda x, k=k: k(x, ()), number) for k in (s.Sum, s.Max)]
    return [*found, made(lambda: s.Iota(7)), made(lambda: s.Iota(0, "i32"))]


GROUPS = {
    "elementwise": elementwise_cases,
    "cast": cast_cases,
    "structural": structural_cases,
    "reduction": reduction_cases,
    "small": small_cases,
}


@functools.cache
def compiled(group: str, machine: str, dtypes: Dtypes) -> tuple[ProgramBatch, list[tuple[Case, Program]]]:
    batch = ProgramBatch(machine_named(machine))
    programs = [(case, batch.add(case.graph)) for case in GROUPS[group](dtypes)]
    batch.build()
    return batch, programs


def problem_with(case: Case, found: np.ndarray) -> str:
    """How the result differs from the op's meaning; "" for not at all."""
    expected = np.asarray(evaluate(case.graph, case.inputs, lambda name: case.inputs[name])["y"])
    try:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if case.skip is not None:
            everywhere = np.broadcast_arrays(found, case.skip(*case.arrays))[1]
            found, expected = np.where(everywhere, 0, found), np.where(everywhere, 0, expected)
        if case.op.dtype not in FLOATS:
            np.testing.assert_array_equal(found, expected)
            return ""
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        tolerance = 0.0 if case.exact else TOLERANCE[case.op.dtype]
        # Sums of numbers up to 8 may cancel. Halves are summed in f32, and rounded once.
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=8 * min(tolerance, TOLERANCE["f32"]))
        if case.exact and not isinstance(case.op, UNSIGNED_ZEROS):
            signs = np.signbit(np.where(expected == 0, found, 0)), np.signbit(np.where(expected == 0, expected, 0))
            np.testing.assert_array_equal(*signs, "signs of zeros")
    except AssertionError as error:
        return f"{case}: {' '.join(str(error).split())[:300]}"
    return ""


def check(group: str, machine: str, dtypes: Dtypes) -> None:
    batch, programs = compiled(group, machine, dtypes)
    problems = [problem_with(case, batch.run(program, case.inputs)["y"]) for case, program in programs]
    failed = [problem for problem in problems if problem]
    assert not failed, "\n".join([f"{len(failed)} of {len(problems)} differ", *failed[:40]])


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_compiled_equals_meaning(group: str) -> None:
    check(group, "native", SOME)


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["native", "x86-64-v3"])
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_dtype_equals_meaning(group: str, machine: str) -> None:
    check(group, machine, DTYPES)


def test_every_op_and_dtype_is_here() -> None:
    from llmc.targets.cpu.plain_builder import FORMS

    found = {
        (case.op.name, case.op.operands[0].dtype)
        for make in GROUPS.values()
        for case in make(DTYPES)
        if case.op.operands
    }
    assert {name for name, _ in found} | {"t.iota", "t.activation"} == set(FORMS) | {"t.activation"}
    for name in ("t.add", "t.cast", "t.transpose", "t.sum", "t.matmul", "t.top_k"):
        assert {dtype for op, dtype in found if op == name} >= set(DTYPES) - {"bool"}


def test_symbolic_sizes_may_be_zero() -> None:
    n = symbol("N", 0, 40)
    x = Input("x", Tensor((n, 5), "f32"))
    graph = Graph("g", (x,), (("sum", s.Sum(x, (0,))), ("t", s.Transpose(x, (1, 0))), ("n", e.Neg(x))))
    batch = ProgramBatch(machine_named("native"))
    program = batch.add(graph)
    batch.build()
    for size in (0, 1, 33):
        data = {"x": random("f32", size, 5)}
        expected = evaluate(graph, data, data.__getitem__)
        for name, found in batch.run(program, data).items():
            np.testing.assert_allclose(found, np.asarray(expected[name]), rtol=1e-5, atol=1e-5)


def test_indices_out_of_range_read_no_memory_outside() -> None:
    """Negative ones count from the end; those beyond stop at the ends, as a wrong input must not crash the process."""
    x, i = random("f32", 4, 3), np.array([0, 3, 4, 10**12, -1, -4, -5, -(10**12)])
    case = made(lambda x, i: s.Gather(x, i, 0), x, i)
    batch = ProgramBatch(machine_named("native"))
    program = batch.add(case.graph)
    batch.build()
    found = batch.run(program, case.inputs)["y"]
    np.testing.assert_array_equal(found, x[[0, 3, 3, 3, 3, 0, 0, 0]])
