"""Projections that are merged, taken apart, or given epilogues: one condition at a time, and what each refusal says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from pass_harness import S, graph_of, names, param, run_checked, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import RoundToIntegers
from llmc.compiler.ir.llm import GatedLinear, Linear
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import Array, precise
from llmc.compiler.passes.integer_products import IntegerProducts
from llmc.compiler.passes.manager import Report

WIDTH = 6
X, Y = x(S, WIDTH), x(S, WIDTH, name="y")


def weight(name: str, outputs: int = 4, dtype: str = "f32") -> Value:
    value = param(name, outputs, WIDTH, dtype=dtype)
    return value if dtype == "f32" else value.operands[0]  # type: ignore[attr-defined]


def vector(name: str, size: int = 4, dtype: str = "f32") -> Value:
    value = param(name, size, dtype=dtype)
    return value if dtype == "f32" else value.operands[0]  # type: ignore[attr-defined]


def linear(name: str, outputs: int = 4, value: Value = X, **more: object) -> Linear:
    return Linear(value, weight(name, outputs), **more)  # type: ignore[arg-type]


def run(pipeline: str, *outputs: Value) -> tuple[Graph, Report]:
    after, reports = run_checked(graph_of(*outputs), pipeline, tolerance=1e-12)
    return after, reports[-1]


@dataclass(frozen=True)
class Case:
    """Outputs, how many linears and gated linears are left of them, and what is refused and why."""

    outputs: tuple[Value, ...]
    linears: int
    gated: int = 0
    refusals: tuple[tuple[str, str], ...] = ()


def shown(name: str, size: int = 4) -> str:
    return f"llm.linear {name} : tensor<[S, {size}], f32>"


SILU = e.Activation(linear("g"), "silu")
UP = linear("u")
BOTH = linear("both", 8)
LEFT, RIGHT = s.Slice(BOTH, 1, 0, 4), s.Slice(BOTH, 1, 4, 8)
AGAIN = linear("both", 8, activation="gelu")
RESIDUAL = x(S, 4, name="r")
APART = "not gated: "

GATED: dict[str, Case] = {
    "gate and up": Case((e.Mul(SILU, UP),), 0, 1),
    "up and gate": Case((e.Mul(UP, SILU),), 0, 1),
    "of dtypes that differ": Case((e.Mul(SILU, Linear(X, weight("u", dtype="bf16"))),), 0, 1),
    "biases of dtypes that differ": Case(
        (
            e.Mul(
                e.Activation(linear("g", bias=vector("a", dtype="bf16")), "silu"), linear("u", bias=vector("b"))
            ),
        ),
        0,
        1,
    ),
    "one bias": Case((e.Mul(SILU, linear("u", bias=vector("b"))),), 0, 1),
    "the up is an output": Case((e.Mul(SILU, UP), UP), 2, 0, ((shown("g"), APART + "a part is used elsewhere too"),)),
    "the gate is used again": Case(
        (e.Mul(SILU, UP), e.Neg(SILU.x)), 2, 0, ((shown("g"), APART + "a part is used elsewhere too"),)
    ),
    "the activated gate is an output": Case(
        (e.Mul(SILU, UP), SILU), 2, 0, ((shown("g"), APART + "the activated gate is used elsewhere too"),)
    ),
    "the activated gate is used again": Case(
        (e.Mul(SILU, UP), e.Neg(SILU)), 2, 0, ((shown("g"), APART + "the activated gate is used elsewhere too"),)
    ),
    "both are activated": Case(
        (e.Mul(SILU, linear("u", activation="relu")),), 2, 0, ((shown("g"), APART + "both parts are activated"),)
    ),
    "the gate is activated twice": Case(
        (e.Mul(e.Activation(linear("g", activation="relu"), "silu"), UP),),
        2,
        0,
        ((shown("g"), APART + "the gate is activated twice"),),
    ),
    "sizes differ": Case(
        (e.Mul(e.Activation(linear("g", 1), "silu"), UP),),
        2,
        0,
        ((shown("g", 1), APART + "gate of tensor<[S, 1], f32> and up of tensor<[S, 4], f32> differ"),),
    ),
    "roundings differ": Case(
        (e.Mul(SILU, linear("u", rounding="bf16")),),
        2,
        0,
        ((shown("g"), APART + "the parts round their activations differently"),),
    ),
    "a residual in the up": Case(
        (e.Mul(SILU, linear("u", residual=RESIDUAL)),), 2, 0, ((shown("g"), APART + "a residual is added to it"),)
    ),
    "a residual in the gate": Case(
        (e.Mul(e.Activation(linear("g", residual=RESIDUAL), "silu"), UP),),
        2,
        0,
        ((shown("g"), APART + "a residual is added to it"),),
    ),
    "a weight that is computed": Case(
        (e.Mul(SILU, Linear(X, x(4, WIDTH, name="m"))),),
        2,
        0,
        ((shown("g"), APART + "its weight or bias is computed at run time"),),
    ),
    "a bias that is computed": Case(
        (e.Mul(SILU, linear("u", bias=x(4, name="m"))),),
        2,
        0,
        ((shown("g"), APART + "its weight or bias is computed at run time"),),
    ),
    "no activation": Case((e.Mul(linear("g"), UP),), 2),
    "halves": Case((e.Mul(e.Activation(LEFT, "silu"), RIGHT),), 0, 1),
    "halves, the second is the gate": Case((e.Mul(e.Activation(RIGHT, "silu"), LEFT),), 0, 1),
    "halves with a bias, the second is the gate": Case(
        (
            e.Mul(
                e.Activation(s.Slice(linear("both", 8, bias=vector("b", 8)), -1, 4, 8), "silu"),
                s.Slice(linear("both", 8, bias=vector("b", 8)), -1, 0, 4),
            ),
        ),
        2,
    ),
    "a half is an output": Case(
        (e.Mul(e.Activation(LEFT, "silu"), RIGHT), RIGHT),
        1,
        0,
        ((shown("both", 8), APART + "a part is used elsewhere too"),),
    ),
    "the whole is an output": Case(
        (e.Mul(e.Activation(LEFT, "silu"), RIGHT), BOTH),
        1,
        0,
        ((shown("both", 8), APART + "the product is used elsewhere too"),),
    ),
    "the whole is used again": Case(
        (e.Mul(e.Activation(LEFT, "silu"), RIGHT), e.Neg(BOTH)),
        1,
        0,
        ((shown("both", 8), APART + "the product is used elsewhere too"),),
    ),
    "halves activated together": Case(
        (e.Mul(e.Activation(s.Slice(AGAIN, 1, 0, 4), "silu"), s.Slice(AGAIN, 1, 4, 8)),),
        1,
        0,
        ((shown("both", 8), APART + "the halves are activated together"),),
    ),
    "one half twice": Case((e.Mul(e.Activation(LEFT, "silu"), s.Slice(BOTH, 1, 0, 4)),), 1),
    "halves that are strided": Case(
        (e.Mul(e.Activation(s.Slice(BOTH, 1, 0, 8, 2), "silu"), s.Slice(BOTH, 1, 1, 8, 2)),), 1
    ),
    "halves that overlap": Case((e.Mul(e.Activation(s.Slice(BOTH, 1, 0, 5), "silu"), s.Slice(BOTH, 1, 3, 8)),), 1),
    "quarters": Case((e.Mul(e.Activation(s.Slice(BOTH, 1, 0, 2), "silu"), s.Slice(BOTH, 1, 2, 4)),), 1),
    "the last quarters": Case((e.Mul(e.Activation(s.Slice(BOTH, 1, 4, 6), "silu"), s.Slice(BOTH, 1, 6, 8)),), 1),
    "halves of unequal size": Case(
        (e.Mul(e.Activation(s.Slice(linear("five", 5), 1, 0, 1), "silu"), s.Slice(linear("five", 5), 1, 1, 5)),), 2
    ),
    "halves of the rows": Case(
        (
            e.Mul(
                e.Activation(s.Slice(linear("w", value=x(8, WIDTH, name="q")), 0, 0, 4), "silu"),
                s.Slice(linear("w", value=x(8, WIDTH, name="q")), 0, 4, 8),
            ),
        ),
        2,
    ),
    "halves of another value": Case((e.Mul(e.Activation(s.Slice(X, 1, 0, 3), "silu"), s.Slice(X, 1, 3, 6)),), 0),
}  # fmt: skip


def left(graph: Graph, kind: type) -> int:
    return sum(type(op) is kind for op in graph.ops)


@pytest.mark.parametrize("name", GATED)
def test_what_becomes_of_a_gate_and_what_it_multiplies(name: str) -> None:
    case = GATED[name]
    after, report = run("merge-projections{qkv=false}", *case.outputs)
    assert (left(after, Linear), left(after, GatedLinear)) == (case.linears, case.gated)
    assert tuple(report.refusals) == case.refusals


A, B, C = linear("a"), linear("b", 3), linear("c", 5, bias=vector("cb", 5))
COMPUTED = "its weight or bias is computed at run time"
DIFFER = "not merged: their roundings, encodings or the schemes that overrides give them differ"
SIBLINGS: dict[str, Case] = {
    "three": Case((A, B, C), 1),
    "two": Case((A, B), 1),
    "one": Case((A,), 1),
    "of two inputs": Case((A, linear("b", value=Y)), 2),
    "dtypes that differ": Case((A, Linear(X, weight("h", dtype="f16")), Linear(X, weight("g", dtype="bf16"))), 1),
    "biases of dtypes that differ": Case(
        (linear("a", bias=vector("p", dtype="bf16")), linear("b", 3, bias=vector("q", 3, dtype="f16")), C), 1
    ),
    "with one activation": Case((linear("a", activation="relu"), linear("b", activation="relu")), 1),
    "with activations that differ": Case((linear("a", activation="relu"), linear("b", activation="silu")), 2),
    "with activations that follow": Case((e.Activation(A, "relu"), e.Activation(B, "relu")), 1),
    "with activations that differ and follow": Case((e.Activation(A, "relu"), e.Activation(B, "silu")), 2),
    "one with an activation that follows": Case((e.Activation(A, "relu"), B), 2),
    "one with an activation and another user": Case((e.Activation(A, "relu"), e.Neg(A), B), 1),
    "roundings that differ": Case(
        (A, linear("b", rounding="bf16"), C),
        2,
        0,
        ((f"{shown('a')} and {shown('b')}", DIFFER),),
    ),
    "one with a residual": Case(
        (A, B, linear("r", residual=RESIDUAL)),
        2,
        0,
        ((shown("r"), "not merged with its siblings: a residual is added to it"),),
    ),
    "one with a weight that is computed": Case(
        (A, B, Linear(X, x(4, WIDTH, name="m"))),
        2,
        0,
        (("llm.linear : tensor<[S, 4], f32>", f"not merged with its siblings: {COMPUTED}"),),
    ),
    "known when compiling": Case(
        (e.Add(linear("a", value=param("k", 3, WIDTH, dtype="f32")), x(3, 4, name="z")), B, C), 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIBLINGS)
def test_linears_of_one_input_become_one(name: str) -> None:
    case = SIBLINGS[name]
    after, report = run("merge-projections{gate-up=false}", *case.outputs)
    assert left(after, Linear) == case.linears and tuple(report.refusals) == case.refusals
    assert [value.type for _, value in after.outputs] == [value.type for value in case.outputs]


def test_the_head_is_merged_with_nothing() -> None:
    graph = Graph("g", (X,), (("logits", linear("head", 9)), ("other", A), ("third", B)))  # type: ignore[arg-type]
    after, _ = run_checked(graph, "merge-projections")
    assert left(after, Linear) == 2 and isinstance(after.output("logits"), Linear)


# split-projections: [.., heads, 3, dim] of one weight

QKV = linear("qkv", 24, bias=vector("bias", 24))
HEADS = s.Reshape(QKV, (S, 4, 3, 2))
SPLIT: dict[str, tuple[tuple[Value, ...], int]] = {  # and how many linears are left
    "three parts": (tuple(s.Slice(HEADS, 2, i, i + 1) for i in range(3)), 3),
    "one part": ((s.Slice(HEADS, 2, 1, 2),), 1),
    "counted from the end": ((s.Slice(HEADS, -2, 1, 2), s.Slice(HEADS, 2, 0, 1)), 2),
    "channels of each part": ((s.Slice(HEADS, 3, 0, 1),), 1),
    "every second": ((s.Slice(HEADS, 2, 0, 3, 2),), 1),
    "more than there is": ((s.Slice(HEADS, 2, 0, 2), s.Slice(HEADS, 2, 1, 3)), 0),
    "whole heads": ((s.Slice(HEADS, 1, 0, 2), s.Slice(HEADS, 1, 2, 4)), 0),
    "runs behind an axis of one": ((s.Slice(s.Reshape(QKV, (S, 1, 3, 8)), 2, 0, 1),), 0),
    "the product is an output": ((s.Slice(HEADS, 2, 1, 2), QKV), 0),
    "the reshape is an output": ((s.Slice(HEADS, 2, 1, 2), HEADS), 0),
    "the product is used otherwise": ((s.Slice(HEADS, 2, 1, 2), e.Neg(QKV)), 0),
    "the reshape is used otherwise": ((s.Slice(HEADS, 2, 1, 2), e.Neg(HEADS)), 0),
    "a residual": ((s.Slice(s.Reshape(linear("w", residual=x(S, 4, name="r")), (S, 2, 2)), 2, 0, 1),), 0),
    "rows": ((s.Slice(s.Reshape(linear("w", 24, value=x(5, WIDTH, name="q")), (5, 4, 3, 2)), 0, 1, 3),), 0),
    "rows put together": (
        (s.Slice(s.Reshape(linear("w", 24, value=x(4, WIDTH, name="q")), (2, 48)), 1, 0, 24),),
        0,
    ),
    "two reshapes": ((s.Slice(HEADS, 2, 1, 2), s.Slice(s.Reshape(QKV, (S, 2, 2, 6)), 2, 0, 1)), 2),
    "a part of nothing": ((s.Slice(HEADS, 2, 1, 1),), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_a_projection_that_is_taken_apart_becomes_projections(name: str) -> None:
    outputs, count = SPLIT[name]
    after, report = run("split-projections", *outputs)
    slices = [op for op in after.ops if isinstance(op, s.Slice) and op not in after.constants]
    if not count:
        assert not report.hits and len(slices) == len([op for op in graph_of(*outputs).ops if isinstance(op, s.Slice)])
        return
    assert left(after, Linear) == count and slices == [] and report.hits == {"projection": 1}


# fuse-epilogues

PLAIN = linear("p")
BIAS = vector("bias")
FIRST, SECOND = linear("first"), linear("second")
Z = x(S, 4, name="z")


def refused(what: str, reason: str, name: str = "p") -> tuple[tuple[str, str], ...]:
    return ((shown(name), f"{what} not fused: {reason}"),)


USED = "the result without it is used too"
EPILOGUES: dict[str, tuple[tuple[Value, ...], list[str], tuple[tuple[str, str], ...]]] = {
    "a bias": ((e.Add(PLAIN, BIAS),), ["llm.linear"], ()),
    "a bias on the left": ((e.Add(BIAS, PLAIN),), ["llm.linear"], ()),
    "a number": ((e.Add(PLAIN, e.constant(2.0, "f32")),), ["t.broadcast", "llm.linear"], ()),
    "a number of rank two": (
        (e.Add(PLAIN, param("n", 1, 1, dtype="f32")),),
        ["t.reshape", "t.broadcast", "llm.linear"],
        (),
    ),
    "a second bias": (
        (e.Add(linear("p", bias=vector("b", dtype="bf16")), BIAS),),
        ["t.cast", "t.add", "llm.linear"],
        (),
    ),
    "a bias in bf16 to one in f32": (
        (e.Add(linear("p", bias=BIAS), param("h", 4, dtype="bf16")),),
        ["t.cast", "t.add", "llm.linear"],
        (),
    ),
    "a bias of more rows": ((e.Add(PLAIN, param("m", 3, 1, 4, dtype="f32")),), ["llm.linear", "t.add"], ()),
    "a bias that is computed is a residual of other size": (
        (e.Add(PLAIN, x(4, name="v")),),
        ["llm.linear", "t.add"],
        refused("residual", "it is tensor<[4], f32> and broadcasts"),
    ),
    "a bias and the product": ((e.Add(PLAIN, BIAS), PLAIN), ["llm.linear", "t.add"], refused("bias", USED)),
    "a bias behind a residual": (
        (e.Add(linear("p", residual=Z), BIAS),),
        ["llm.linear", "t.add"],
        refused("bias", "a residual is added already"),
    ),
    "a bias behind an activation": (
        (e.Add(linear("p", activation="silu"), BIAS),),
        ["llm.linear", "t.add"],
        refused("bias", "silu is applied already"),
    ),
    "an activation": ((e.Activation(PLAIN, "silu"),), ["llm.linear"], ()),
    "an activation of another value": ((e.Activation(Z, "silu"),), ["t.activation"], ()),
    "an activation and the product": (
        (e.Activation(PLAIN, "silu"), e.Neg(PLAIN)),
        ["llm.linear", "t.activation", "t.neg"],
        refused("silu", USED),
    ),
    "an activation behind a residual": (
        (e.Activation(linear("p", residual=Z), "silu"),),
        ["llm.linear", "t.activation"],
        refused("silu", "a residual is added already"),
    ),
    "a residual": ((e.Add(PLAIN, Z),), ["llm.linear"], ()),
    "a residual on the left": ((e.Add(Z, PLAIN),), ["llm.linear"], ()),
    "a residual behind an activation": ((e.Add(linear("p", activation="silu"), Z),), ["llm.linear"], ()),
    "a residual and the product": ((e.Add(PLAIN, Z), PLAIN), ["llm.linear", "t.add"], refused("residual", USED)),
    "the product and itself": ((e.Add(PLAIN, PLAIN),), ["llm.linear", "t.add"], refused("residual", USED) * 2),
    "two residuals": (
        (e.Add(linear("p", residual=Z), x(S, 4, name="y2")),),
        ["llm.linear", "t.add"],
        refused("residual", "another is added already"),
    ),
    "two linears": ((e.Add(FIRST, SECOND),), ["llm.linear", "llm.linear"], ()),
    "two linears and a residual": ((e.Add(e.Add(FIRST, SECOND), Z),), ["llm.linear", "llm.linear"], ()),
    "two linears, one used again": (
        (e.Add(e.Add(FIRST, SECOND), Z), FIRST),
        ["llm.linear", "llm.linear", "t.add"],
        refused("residual", "another is added already", "second"),
    ),
    "a weight that is computed is no bias": ((e.Add(PLAIN, e.Exp(Z)),), ["t.exp", "llm.linear"], ()),
}  # fmt: skip


@pytest.mark.parametrize("name", EPILOGUES)
def test_what_follows_a_linear_is_fused_or_says_why_not(name: str) -> None:
    outputs, expected, refusals = EPILOGUES[name]
    after, report = run("fuse-epilogues", *outputs)
    assert names(after) == expected and tuple(report.refusals) == refusals


# integer-products

INTEGERS = param("q", WIDTH, 4, dtype="i8").operands[0]  # type: ignore[attr-defined]
ZEROS = param("zeros", 4, dtype="i8").operands[0]  # type: ignore[attr-defined]
SCALES = vector("scales")
STEP = e.Div(s.Max(s.Reshape(e.Abs(X), (WIDTH * S,)), (0,)), e.constant(127.0, "f32"))  # type: ignore[operator]
POINT = e.Cast(s.Reshape(s.Max(e.Cast(X, "i32"), (0, 1)), (1,)), "u8")


def wide(value: Value, dtype: str = "i32") -> Value:
    return e.Cast(value, dtype)


def rounded(value: Value = X, step: Value = STEP, zero: Value | None = None) -> Value:
    return RoundToIntegers(value, step, zero, "i8" if zero is None else "u8")


def times(a: Value, b: Value, *scales: Value) -> Value:
    result: Value = e.Cast(s.Matmul(a, b), "f32")
    for scale in scales:
        result = e.Mul(result, scale)
    return result


ACTS, WEIGHTS = wide(rounded()), wide(INTEGERS)
SHIFTED = e.Sub(wide(rounded(zero=POINT)), wide(POINT))
ONCE = "the product is not scaled by what its activations were divided by, once"
FORM = "a scale or zero point is neither one number nor one a column"
INTEGER_PRODUCTS: dict[str, tuple[Value, bool, str]] = {  # whether it becomes a linear, and why not
    "one scale": (times(ACTS, WEIGHTS, STEP, e.constant(0.1, "f32")), True, ""),
    "a scale a column": (times(ACTS, WEIGHTS, STEP, SCALES), True, ""),
    "scales first": (times(ACTS, WEIGHTS, e.Mul(SCALES, STEP)), True, ""),
    "scales on the left": (e.Mul(e.Mul(STEP, SCALES), times(ACTS, WEIGHTS)), True, ""),
    "a row of scales": (times(ACTS, WEIGHTS, e.Mul(s.Reshape(SCALES, (1, 4)), STEP)), True, ""),
    "two scales": (times(ACTS, WEIGHTS, STEP, SCALES, e.constant(0.1, "f32")), True, ""),
    "no other scale": (times(ACTS, WEIGHTS, STEP), True, ""),
    "a zero point in another shape": (
        times(e.Sub(wide(rounded(zero=POINT)), wide(s.Reshape(POINT, (1, 1)))), WEIGHTS, STEP), True, "",
    ),
    "weights that are wide already": (
        times(ACTS, param("wide", WIDTH, 4, dtype="i32").operands[0], STEP), True, "",  # type: ignore[attr-defined]
    ),
    "weights that a cast has narrowed": (times(ACTS, wide(e.Cast(INTEGERS, "i8")), STEP), True, ""),
    "several rows of scales": (times(ACTS, WEIGHTS, param("rows", 3, 1, 4, dtype="f32"), STEP), False, FORM),
    "a scale of another shape": (times(ACTS, WEIGHTS, s.Reshape(STEP, (1, 1)), s.Reshape(SCALES, (1, 4))), True, ""),
    "a scale that is spread": (times(ACTS, WEIGHTS, s.Broadcast(STEP, (4,))), True, ""),
    "a zero point": (times(SHIFTED, WEIGHTS, STEP, SCALES), True, ""),
    "a zero point a column": (times(ACTS, e.Sub(WEIGHTS, wide(ZEROS)), STEP, SCALES), True, ""),
    "in f32": (times(wide(rounded(), "f32"), wide(INTEGERS, "f32"), STEP), True, ""),
    "in i16": (e.Mul(e.Cast(s.Matmul(wide(rounded(), "i16"), wide(INTEGERS, "i16")), "f32"), STEP), False, ""),
    "more rows behind": (times(ACTS, WEIGHTS, STEP, s.Reshape(SCALES, (1, 1, 4))), True, ""),
    "not scaled": (times(ACTS, WEIGHTS, SCALES), False, ONCE),
    "scaled twice": (times(ACTS, WEIGHTS, e.Mul(STEP, STEP)), False, ONCE),
    "a known scale": (
        times(wide(rounded(step=e.constant(0.1, "f32"))), WEIGHTS, e.constant(0.1, "f32")),
        False,
        ONCE,
    ),
    "a scale a row": (times(ACTS, WEIGHTS, param("rows", 4, 1, 1, dtype="f32"), STEP), False, FORM),
    "a scale that is computed": (
        times(ACTS, WEIGHTS, x(4, name="v"), STEP),
        False,
        "the weight is no matrix known when compiling, or its scale is not",
    ),
    "a weight that is computed": (
        times(ACTS, wide(x(WIDTH, 4, name="m", dtype="i8")), STEP),
        False,
        "the weight is no matrix known when compiling, or its scale is not",
    ),
    "a weight for each of several": (
        times(ACTS, wide(param("qs", 2, WIDTH, 4, dtype="i8").operands[0]), STEP),  # type: ignore[attr-defined]
        False,
        "the weight is no matrix known when compiling, or its scale is not",
    ),
    "two products": (e.Mul(e.Mul(times(ACTS, WEIGHTS), times(ACTS, WEIGHTS)), STEP), False, ""),
    "another zero point": (
        times(e.Sub(wide(rounded(zero=POINT)), wide(e.Cast(STEP, "u8"))), WEIGHTS, STEP),
        False,
        "",
    ),
    "a zero point that is not taken off": (times(wide(rounded(zero=POINT)), WEIGHTS, STEP), False, ""),
    "a zero point that was not added": (times(e.Sub(ACTS, wide(POINT)), WEIGHTS, STEP), False, ""),
    "whole numbers that were not rounded": (times(wide(x(S, WIDTH, name="n", dtype="i8")), WEIGHTS, STEP), False, ""),
    "not a product of matrices": (e.Mul(e.Cast(wide(rounded()), "f32"), STEP), False, ""),
    "into another dtype": (e.Mul(e.Cast(s.Matmul(ACTS, WEIGHTS), "f64"), e.Cast(STEP, "f64")), False, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGER_PRODUCTS)
def test_products_of_integers_that_stand_for_floats(name: str) -> None:
    value, becomes, reason = INTEGER_PRODUCTS[name]
    report = Report()
    after = IntegerProducts().run(graph_of(value), report)
    assert left(after, Linear) == becomes and after.output("out0").type == value.type
    if becomes:
        assert not any(isinstance(op, RoundToIntegers) for op in after.ops)
        (linear_op,) = (op for op in after.ops if isinstance(op, Linear))
        assert linear_op.rounding == "int8" and linear_op.x is X
    if reason:
        assert reason in [why for _, why in report.refusals]
    elif not becomes:
        assert report.refusals == []


def test_what_a_product_of_integers_stands_for_is_kept() -> None:
    """The activations are whole numbers of steps, so that nothing is rounded: 127 is among each row's."""
    value = times(ACTS, e.Sub(WEIGHTS, wide(ZEROS)), STEP, SCALES, e.constant(0.5, "f32"))
    graph = graph_of(value)
    after = IntegerProducts().run(graph, Report())
    generator = np.random.default_rng(0)
    rows = generator.integers(-127, 128, (5, WIDTH)).astype(float)
    rows[:, 0] = 127
    weights = {"q": generator.integers(-9, 9, (WIDTH, 4)), "zeros": np.array([1, -2, 3, 0]), "scales": np.arange(1, 5)}

    def load(name: str) -> Array:
        return np.asarray(weights[name], np.float32 if name == "scales" else np.int8)

    with precise():
        expected, found = (np.asarray(evaluate(g, {"x": rows * 0.25}, load)["out0"]) for g in (graph, after))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
