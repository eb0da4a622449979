"""Problems of templates at awkward sizes: how to run a kernel of them, and what numpy says of it."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import emulation
import numpy as np
from attention_batches import LENGTHS, NEW, make_batch
from attention_batches import Case as AttentionCase
from kernel_harness import CACHE, aligned, skip_unless_runnable

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.adapters import Activated, LowRank
from llmc.compiler.ir.op import Input, Op
from llmc.compiler.ir.types import NUMPY_DTYPES, Tensor
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_tile import AttentionTile
from llmc.targets.cpu.codegen import object_code
from llmc.targets.cpu.functions import ActivationProblem, ActivationRows
from llmc.targets.cpu.low_rank import (
    ActivatedProblem,
    ActivatedRows,
    InnerProblem,
    LowRankInner,
    LowRankOuter,
    OuterProblem,
)
from llmc.targets.cpu.norms import Norm, NormProblem
from llmc.targets.cpu.plain import plain_call
from llmc.targets.cpu.plain_builder import PlainStrips, PlainSums
from llmc.targets.cpu.pooling import Pool, PoolProblem
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser, Problem, Template

Function = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """A problem. run: what a kernel of some knobs computes, on every machine the same inputs. expected: the same by
    numpy. tolerance: the greatest difference that roundings make, relative to the greatest number."""

    template: type[Template[Any]]
    problem: Problem
    run: Callable[[Template[Any], Function, Machine], np.ndarray]
    expected: np.ndarray
    tolerance: float


@dataclass(frozen=True)
class Given(Chooser):
    """Gives one member of a template's space, and what others have by default."""

    member: Template[Any]

    def choose(self, template: type[Any], problem: Any, rows: Any = (0, None)) -> Any:
        return self.member if template is type(self.member) else super().choose(template, problem, rows)


def functions(kernels: Iterable[Kernel], machine: Machine) -> dict[str, Function]:
    """Kernels as Python functions, by symbol, compiled into one library: quicker than one each."""
    skip_unless_runnable(machine)
    wanted = {kernel.symbol: kernel for kernel in kernels}
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        path = Path(folder) / "kernels.o"
        path.write_bytes(object_code(wanted.values(), machine))
        shared = path.with_suffix(".so")
        if emulation.is_foreign(machine):
            shared = CACHE / f"{Path(folder).name}.so"
            emulation.link(machine, [path], shared)
            return {symbol: _emulated(machine, shared, symbol) for symbol in wanted}
        subprocess.run(["gcc", "-shared", "-o", str(shared), str(path), "-lm"], check=True)
        library = ctypes.CDLL(str(shared))
    return {symbol: _function(library, symbol) for symbol in wanted}


def _emulated(machine: Machine, library: Path, symbol: str) -> Function:
    def call(*args: np.ndarray | int) -> None:
        emulation.call(machine, library, symbol, args)

    return call


def _function(library: ctypes.CDLL, symbol: str) -> Function:
    function = getattr(library, symbol)
    function.restype = None

    def call(*args: np.ndarray | int) -> None:
        function(
            *(
                ctypes.c_void_p(arg.ctypes.data) if isinstance(arg, np.ndarray) else ctypes.c_int64(int(arg))
                for arg in args
            )
        )

    return call


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return aligned(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _norm(kind: str, features: int, **facts: Any) -> Case:
    rows = 7
    problem = NormProblem(kind, features, 1e-5, **facts)
    x, addend, weight, bias = (_normal(rows, features, seed=seed) for seed in range(4))
    names = ["weight"] * problem.weight + ["bias"] * problem.bias
    given = {"weight": aligned(weight[0]), "bias": aligned(bias[0])}

    def run(_: Template[Any], function: Function, __: Machine) -> np.ndarray:
        out, total = aligned(np.full_like(x, np.nan)), aligned(np.full_like(x, np.nan))
        added = [addend, total] * problem.residual
        function(x, *added, *(given[name] for name in names), out, 0, rows)
        return out

    wide = (x + addend if problem.residual else x).astype(np.float64)
    if kind == "layer":
        wide = wide - wide.mean(axis=1, keepdims=True)
    wide = wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + 1e-5)
    wide = wide * (given["weight"] if problem.weight else 1) + (given["bias"] if problem.bias else 0)
    return Case(Norm, problem, run, wide, 5e-6)


def _pool(kind: str, columns: int) -> Case:
    lengths = [1, 7, 31, 33, 129, 300]
    starts = aligned(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    x, problem = _normal(sum(lengths), columns), PoolProblem(kind, columns)

    def run(pool: Template[Any], function: Function, machine: Machine) -> np.ndarray:
        assert isinstance(pool, Pool)
        out = aligned(np.full((len(lengths), columns), np.nan, np.float32))
        function(x, starts, out, 0, len(lengths) * pool.blocks(problem, machine))
        return out

    reduce = {"mean": np.mean, "max": np.max, "sum": np.sum}[kind]
    parts = [x[first:end].astype(np.float64) for first, end in pairwise(starts)]
    # Sums of up to 300 numbers of size 1, in f32: a rounding of 2^-24 of each partial sum, which average out.
    return Case(Pool, problem, run, np.stack([reduce(part, axis=0) for part in parts]), 1e-5)


def _activation(kind: str, size: int) -> Case:
    x, problem = _normal(size), ActivationProblem(kind, size, ())
    op = e.Activation(Input("x", Tensor((size,), "f32")), kind)

    def run(rows: Template[Any], function: Function, _: Machine) -> np.ndarray:
        assert isinstance(rows, ActivationRows)
        out = aligned(np.full(size, np.nan, np.float32))
        function(x, out, 0, -(-size // rows.block))
        return out

    return Case(ActivationRows, problem, run, np.asarray(op.evaluate(x), np.float64), 3e-6)


def _plain(template: type[Template[Any]], op: Op, tolerance: float) -> Case:
    shapes = [tuple(int(str(size)) for size in value.shape) for value in op.operands]
    rng = np.random.default_rng(0)
    data = [
        aligned(rng.integers(-9, 9, shape) if value.dtype == "i64" else rng.standard_normal(shape).astype(np.float32))
        for shape, value in zip(shapes, op.operands, strict=True)
    ]

    def run(member: Template[Any], function: Function, machine: Machine) -> np.ndarray:
        call = plain_call(op, Given(machine, member))
        assert not isinstance(call, str)
        out = aligned(np.zeros([int(str(size)) for size in op.shape], NUMPY_DTYPES[op.dtype]))
        function(*data, out, 0, int(str(call.units)))
        return out

    call = plain_call(op, Chooser(NATIVE))
    assert not isinstance(call, str) and call.kernel.problem is not None
    assert type(call.kernel.template) is template
    wide = [array.astype(np.float64) if array.dtype == np.float32 else array for array in data]
    return Case(template, call.kernel.problem, run, np.asarray(op.evaluate(*wide), np.float64), tolerance)


def _tables(entries: int, parts: int, rank: int, inputs: int, n: int) -> list[np.ndarray]:
    """x, adapters, a, ranks, inner and b, y of 7 tokens: some have no adapter, and adapters not all ranks."""
    rng = np.random.default_rng(0)
    ranks = aligned(rng.integers(0, rank + 1, (entries, parts)).astype(np.int32))
    ranks[0], ranks[1] = 0, rank
    adapters = aligned(np.array([1, 0, 2, 1, 0, 1, 2], np.int32))
    inner = np.full((7, parts, rank), np.nan, np.float32)
    return [_normal(7, inputs), adapters, _normal(entries, parts, rank, inputs, seed=1), ranks, aligned(inner),
            _normal(entries, rank, n, seed=2), _normal(7, n, seed=3)]  # fmt: skip


def _low_rank_inner(k: int, parts: int, rank: int) -> Case:
    problem = InnerProblem(k, parts, rank)
    x, adapters, a, ranks, *_ = _tables(3, parts, rank, k, 1)
    used = np.arange(rank) < ranks[adapters][:, :, None]

    def run(inner: Template[Any], function: Function, _: Machine) -> np.ndarray:
        assert isinstance(inner, LowRankInner)
        out = aligned(np.full((7, parts, rank), np.nan, np.float32))
        units = 7 * parts * inner.blocks(problem)
        for begin, end in ((units // 3, units), (0, units // 3)):
            function(x, adapters, a, ranks, out, begin, end)
        return np.where(used, out, 0)

    expected = np.einsum("tk,tprk->tpr", x.astype(np.float64), a[adapters].astype(np.float64))
    return Case(LowRankInner, problem, run, np.where(used, expected, 0), 3e-6)


def _low_rank_outer(columns: tuple[int, ...], rank: int) -> Case:
    problem = OuterProblem(columns, rank)
    x, adapters, a, ranks, _, b, y = _tables(3, len(columns), rank, 4, columns[-1])
    inner = aligned(np.einsum("tk,tprk->tpr", x, a[adapters]).astype(np.float32))
    op = LowRank(*(Input("", Tensor(v.shape, "i32" if v.dtype == np.int32 else "f32"))
                   for v in (y, x, adapters, a, b, ranks)), columns)  # fmt: skip

    def run(outer: Template[Any], function: Function, machine: Machine) -> np.ndarray:
        assert isinstance(outer, LowRankOuter)
        out, units = aligned(y), 7 * sum(outer.blocks(problem, machine))
        for begin, end in ((units // 3, units), (0, units // 3)):
            function(inner, adapters, b, ranks, out, begin, end)
        assert (out[adapters == 0] == y[adapters == 0]).all()
        return out

    wide = (v.astype(np.float64) for v in (y, x))
    return Case(LowRankOuter, problem, run, op.evaluate(*wide, adapters, a, b, ranks), 3e-6)


def _activated(features: int, gated: bool, residual: bool) -> Case:
    problem = ActivatedProblem(features, "silu", gated, residual)
    y, addend = _normal(3, features * (1 + gated)), _normal(3, features, seed=1)
    given = [addend] * residual
    op = Activated(*(Input("", Tensor(v.shape, "f32")) for v in (y, *given)), activation="silu", gated=gated)

    def run(rows: Template[Any], function: Function, machine: Machine) -> np.ndarray:
        assert isinstance(rows, ActivatedRows)
        out, units = aligned(np.full((3, features), np.nan, np.float32)), 3 * rows.blocks(problem, machine)
        for begin, end in ((units // 3, units), (0, units // 3)):
            function(y, *given, out, begin, end)
        return out

    expected = op.evaluate(y.astype(np.float64), addend.astype(np.float64) if residual else None)
    return Case(ActivatedRows, problem, run, expected, 3e-6)


def _attention(**facts: Any) -> Case:
    attention = AttentionCase(**facts)
    batch = make_batch(attention, LENGTHS, NEW)

    def run(member: Template[Any], _: Function, machine: Machine) -> np.ndarray:
        return replace(batch, case=replace(attention, member=member)).run(machine, splits=3, cuts=(0.4,))

    problem = AttentionProblem(scale=attention.scale, **facts)
    return Case(AttentionTile, problem, run, batch.expected(), 2e-5)


def _operand(*shape: int, dtype: str = "f32", name: str = "x") -> Input:
    return Input(name, Tensor(shape, dtype))


NATIVE = Machine(
    "any", "x86", "x86-64-v3", frozenset({"avx2", "fma", "f16c"}), 256
)  # whose kernels only have names here


def cases() -> Sequence[Case]:
    """Of every template whose code has knobs, at sizes that no vector divides."""
    found = [_norm(kind, features) for kind in ("rms", "layer") for features in (1, 7, 33, 129)]
    found += [_norm("layer", 100, bias=True, weight_offset=0, residual=True), _norm("rms", 31, weight=False)]
    found += [_pool(kind, columns) for kind in ("mean", "max", "sum") for columns in (7, 129)]
    found += [_activation(kind, size) for kind in ("silu", "gelu") for size in (1, 31, 129, 5000)]
    found += [
        _plain(PlainSums, s.Sum(_operand(3, 129), (1,)), 3e-6),
        _plain(PlainSums, s.Max(_operand(2, 5, 7), (1, 2)), 0),
        _plain(PlainSums, s.Sum(_operand(3, 33, dtype="i64"), (1,)), 0),
        _plain(PlainStrips, s.Sum(_operand(129, 33), (0,)), 3e-6),
        _plain(PlainStrips, s.Matmul(_operand(7, 31), _operand(31, 129, name="y")), 3e-6),
    ]
    found += [_low_rank_inner(k, parts, rank) for k, parts, rank in ((1, 1, 1), (7, 3, 5), (33, 1, 31), (129, 2, 8))]
    found += [_low_rank_outer(columns, rank) for columns, rank in (((1,), 1), ((7, 38, 167), 5), ((31, 64), 7))]
    found += [_low_rank_outer((129,), 33), _activated(1, True, False), _activated(33, True, True)]
    found += [_activated(31, False, True), _activated(129, False, False), _activated(3000, True, False)]
    found += [
        _attention(heads=4, kv_heads=2, head_dim=33, value_dim=20),
        _attention(heads=7, kv_heads=1, head_dim=16, value_dim=31, window=40, cache_dtype="float32"),
        _attention(heads=3, kv_heads=3, head_dim=7, value_dim=9, softcap=3.0, sinks=True, alibi=True),
    ]
    return found
