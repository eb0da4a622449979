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
from llmc.compiler.ir.op import Input, Op
from llmc.compiler.ir.types import NUMPY_DTYPES, Tensor
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_tile import AttentionTile
from llmc.targets.cpu.codegen import object_code
from llmc.targets.cpu.functions import ActivationProblem, ActivationRows
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
    found += [
        _attention(heads=4, kv_heads=2, head_dim=33, value_dim=20),
        _attention(heads=7, kv_heads=1, head_dim=16, value_dim=31, window=40, cache_dtype="float32"),
        _attention(heads=3, kv_heads=3, head_dim=7, value_dim=9, softcap=3.0, sinks=True, alibi=True),
    ]
    return found
