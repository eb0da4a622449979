"""Every aten op by itself, in a graph of one node: with its defaults and with each argument, it means what torch says.

Nothing is exported, so that a case takes a millisecond.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from test_frontend_hf_aten import N, X, Y, floats
from torch.fx.experimental.proxy_tensor import make_fx

from llmc.compiler.ir.elementwise import Cast, Constant, Mul, Pow
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.structural import Gather, Reshape
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.hf import graph  # noqa: F401  (registers the handlers)
from llmc.frontends.hf.aten import HANDLERS, Translation, cast, dtype_name, promoted

A = torch.ops.aten
Case = tuple[Any, ...]  # an op, its arguments, and perhaps a dictionary of named ones


def node_of(
    op: Any, *arguments: Any
) -> tuple[torch.fx.GraphModule, dict[torch.fx.Node, Input], dict[str, np.ndarray], Any]:
    """A graph of one call: with its inputs, their data, and torch's own result."""
    options = arguments[-1] if arguments and isinstance(arguments[-1], dict) else {}
    arguments = arguments[:-1] if options else arguments
    made = torch.fx.Graph()
    given: dict[torch.fx.Node, Input] = {}
    data: dict[str, np.ndarray] = {}

    def hole(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        name = f"x{len(given)}"
        node = made.placeholder(name)
        node.meta["val"] = value
        given[node] = Input(name, Tensor(tuple(value.shape), dtype_name(value.dtype)))
        data[name] = value.float().numpy() if value.dtype in (torch.bfloat16, torch.float64) else value.numpy()
        return node

    call = made.call_function(op, torch.fx.node.map_aggregate(arguments, hole), options)
    call.meta["val"] = want = op(*arguments, **options)
    made.output(call)
    return torch.fx.GraphModule(torch.nn.Module(), made), given, data, want


def meaning(op: Any, *arguments: Any) -> Any:
    module, given, _, _ = node_of(op, *arguments)
    return Translation({}).run(module, given)


def check(op: Any, *arguments: Any) -> None:
    module, given, data, want = node_of(op, *arguments)
    found = Translation({}).run(module, given)
    several = isinstance(want, (tuple, list))
    found, want = (tuple(found), tuple(want)) if several else ((found,), (want,))
    values = evaluate(
        Graph("op", tuple(given.values()), tuple((f"y{i}", value) for i, value in enumerate(found))), data,
        lambda name: np.zeros(0),
    )  # fmt: skip
    for i, wanted in enumerate(want[: len(found)]):
        got = np.asarray(values[f"y{i}"])
        assert (got.shape, found[i].dtype) == (tuple(wanted.shape), dtype_name(wanted.dtype))
        near = 1e-2 if wanted.dtype in (torch.bfloat16, torch.float16) else 1e-5
        np.testing.assert_allclose(got.astype(np.float64), wanted.double().numpy(), rtol=near, atol=near)


T, V5, V4, BITS = X > 0, floats(5), floats(4, seed=9), torch.tensor([-3.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.5])
HALF, BRAIN, M35, M54 = X.half(), X.bfloat16(), floats(3, 5, seed=4), floats(5, 4, seed=5)
Q = floats(1, 2, 4, 8, seed=6)
COUNTS = torch.tensor([0, 1, 2, 5])

CASES: dict[str, Case] = {
    "add": (A.add.Tensor, X, Y),
    "add times": (A.add.Tensor, X, Y, {"alpha": 2}),
    "add half": (A.add.Tensor, X, Y, {"alpha": 0.5}),
    "add nothing": (A.add.Tensor, X, Y, {"alpha": 0}),
    "add integers": (A.add.Tensor, N, N, {"alpha": 3}),
    "sub": (A.sub.Tensor, X, Y),
    "sub minus": (A.sub.Tensor, X, Y, {"alpha": -1}),
    "rsub": (A.rsub.Tensor, X, Y),
    "rsub times": (A.rsub.Tensor, X, Y, {"alpha": 3}),
    "rsub number": (A.rsub.Scalar, X, 2.0, 0.5),
    "mul": (A.mul.Tensor, X, Y),
    "div": (A.div.Tensor, X, Y),
    "div integers": (A.div.Tensor, N, N + 1),
    "div floor": (A.div.Tensor_mode, X, Y, {"rounding_mode": "floor"}),
    "div trunc": (A.div.Tensor_mode, N - 3, N + 1, {"rounding_mode": "trunc"}),
    "div plain": (A.div.Tensor_mode, X, Y, {"rounding_mode": None}),
    "maximum": (A.maximum.default, X, Y),
    "minimum": (A.minimum.default, X, Y),
    "remainder": (A.remainder.Tensor, X, Y),
    "floor_divide": (A.floor_divide.default, N - 3, N + 1),
    **{f"{name} {i}": (getattr(A, name).Tensor, *pair) for name in ("eq", "ne", "lt", "le", "gt", "ge")
       for i, pair in enumerate([(X, Y), (X, X), (N, 1.5), (X, N), (BRAIN, X), (HALF, torch.tensor(0.1)), (T, ~T),
                                (torch.full((2,), 0.1).half(), torch.tensor(0.1))])
       if not isinstance(pair[1], float)},
    **{f"{name} number": (getattr(A, name).Scalar, N, 1.5) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "eq truth": (A.eq.Scalar, T, 2),
    "eq true": (A.eq.Scalar, T, True),
    **{f"{name} {i}": (getattr(A, f"logical_{name}").default, *pair) for name in ("and", "or", "xor")
       for i, pair in enumerate([(T, X > 0.5), (N, X), (X * 0.01, N)])},
    **{f"bitwise {name}": (getattr(A, f"bitwise_{name}").Tensor, T, X > 0.5) for name in ("and", "or", "xor")},
    "logical_not": (A.logical_not.default, X * 0.01),
    "logical_not integers": (A.logical_not.default, N),
    "bitwise_not": (A.bitwise_not.default, T),
    **{name: (getattr(A, name).default, BITS) for name in (
        "exp", "tanh", "sigmoid", "erf", "sin", "cos", "floor", "round", "neg", "abs", "relu", "silu", "square",
        "expm1", "ceil", "sign",
    )},
    "ceil integers": (A.ceil.default, N - 3),
    "sign integers": (A.sign.default, N - 3),
    "sign of no number": (A.sign.default, torch.tensor([math.nan, -math.inf, -0.0, 0.0, math.inf])),
    "leaky_relu": (A.leaky_relu.default, BITS),
    "leaky_relu steep": (A.leaky_relu.default, BITS.half(), 0.3),
    **{name: (getattr(A, name).default, BITS + 4) for name in ("log", "sqrt", "rsqrt", "reciprocal", "log1p")},
    "integers to floats": (A.exp.default, N),
    "gelu": (A.gelu.default, BITS),
    "gelu tanh": (A.gelu.default, BITS, {"approximate": "tanh"}),
    "gelu none": (A.gelu.default, BITS, {"approximate": "none"}),
    "softplus": (A.softplus.default, BITS * 4),
    "softplus steep": (A.softplus.default, BITS, 3.0),
    "softplus straight": (A.softplus.default, BITS, 2.0, 1.5),
    "softplus halves": (A.softplus.default, BITS.bfloat16()),
    "clamp": (A.clamp.default, X, -0.5, 0.5),
    "clamp low": (A.clamp.default, X, -0.5),
    "clamp high": (A.clamp.default, X, None, 0.5),
    "clamp named": (A.clamp.default, X, {"max": 0.5}),
    "clamp named low": (A.clamp.default, X, {"min": 0.5}),
    "clamp tensors": (A.clamp.Tensor, X, Y - 1, Y),
    "clamp integers": (A.clamp.default, N, 1, 3),
    "clamp_min": (A.clamp_min.default, X, 0.1),
    "clamp_max": (A.clamp_max.default, X, 0.1),
    "clamp_min named": (A.clamp_min.default, X, {"min": 0.1}),
    "clamp_max named": (A.clamp_max.default, X, {"max": 0.1}),
    **{f"pow {power}": (A.pow.Tensor_Scalar, X.abs() + 0.5, power)
       for power in (0, 1, 2, 3, 4, 0.5, -0.5, 1.5, -1.5, -1, 2.5)},
    "pow integers": (A.pow.Tensor_Scalar, N, 2),
    "pow tensors": (A.pow.Tensor_Tensor, X.abs(), Y),
    "pow of a number": (A.pow.Scalar, 2.0, X),
    "where": (A.where.self, T, X, Y),
    "where integers say": (A.where.self, T, N, X),
    "masked_fill": (A.masked_fill.Scalar, X, T, -1.0),
    **{f"{name} all": (getattr(A, name).default, X) for name in ("mean", "sum", "amax", "amin", "any", "all", "max")
       if hasattr(getattr(A, name), "default")},
    **{f"{name} axes": (getattr(A, name).default, X, [0, -1]) for name in ("amax", "amin")},
    **{f"{name} axes kept": (getattr(A, name).default, X, [0, -1], True) for name in ("amax", "amin")},
    "mean axes": (A.mean.dim, X, [0, -1]), "mean kept": (A.mean.dim, X, [1], True),
    "sum axes": (A.sum.dim_IntList, X, [0, -1]), "sum kept": (A.sum.dim_IntList, X, [1], True),
    "sum of no axes": (A.sum.dim_IntList, X, []), "sum of truths": (A.sum.dim_IntList, T, [1]),
    "sum as floats": (A.sum.dim_IntList, N, [1], False, {"dtype": torch.float32}),
    "any axis": (A.any.dim, T, 1), "any kept": (A.any.dim, T, -1, True), "all axis": (A.all.dim, T, 1),
    "all kept": (A.all.dim, N, 0, True),
    "max axis": (A.max.dim, X, 1), "max kept": (A.max.dim, X, -2, True), "max other": (A.max.other, X, Y),
    "min other": (A.min.other, N, X), "argmax": (A.argmax.default, X, 1),
    "argmax kept": (A.argmax.default, X, -2, True),
    "topk": (A.topk.default, X, 3), "topk axis": (A.topk.default, X, 3, 1),
    "topk smallest": (A.topk.default, X, 2, -2, False),
    "topk of all": (A.topk.default, X, 5, -1, True, True),
    "cumsum": (A.cumsum.default, X, 1), "cumsum truths": (A.cumsum.default, T, -1),
    "softmax": (A._softmax.default, X, 1, False), "softmax in f32": (A.softmax.int, HALF, -1, torch.float32),
    "log_softmax": (A._log_softmax.default, X * 60, 1, False), "log_softmax last": (A.log_softmax.int, X, -1),
    "var": (A.var.dim, X, [1]), "var biased": (A.var.dim, X, [1], False), "var kept": (A.var.dim, X, [-1], True, True),
    "var all": (A.var.default, X), "var corrected": (A.var.correction, X, [1], {"correction": 2}),
    "var half": (A.var.correction, X, [1], {"correction": 0.5, "keepdim": True}),
    "var uncorrected": (A.var.correction, X, None, {"correction": 0}),
    "var_mean": (A.var_mean.correction, X, [1], {"correction": 1, "keepdim": True}),
    "var_mean plain": (A.var_mean.dim, X, [0]),
    **{f"matmul {i}": (A.matmul.default, *pair) for i, pair in enumerate(
        [(V5, V5), (X, V5), (floats(7), X), (M35, M54), (X, M54), (X[0], X.transpose(1, 2))])},
    "mm": (A.mm.default, M35, M54), "bmm": (A.bmm.default, X, floats(3, 5, 2)),
    "linear": (A.linear.default, X, floats(4, 5)), "linear of a vector": (A.linear.default, V5, floats(4, 5)),
    "linear with a bias": (A.linear.default, X, floats(4, 5), V4),
    "addmm": (A.addmm.default, V4, M35, M54), "baddbmm": (A.baddbmm.default, floats(3, 7, 2), X, floats(3, 5, 2)),
    **{f"addmm {beta} {alpha}": (A.addmm.default, V4, M35, M54, {"beta": beta, "alpha": alpha})
       for beta in (-1, 0, 0.5, 1, 2) for alpha in (-1, 0, 1, 2, 0.5)},
    "outer": (A.outer.default, V5, V4),
    "einsum": (A.einsum.default, "qbd, kdb -> kqb", [floats(2, 3, 4), floats(5, 4, 3)]),
    "einsum of batches": (A.einsum.default, "bhqd,bhkd->bhqk", [floats(2, 3, 4, 5), floats(2, 3, 6, 5)]),
    "einsum that sums all": (A.einsum.default, "ij,ij->", [M35, M35]),
    "layer_norm": (A.layer_norm.default, X, [5]), "layer_norm small": (A.layer_norm.default, X * 1e-3, [5]),
    "layer_norm weights": (A.layer_norm.default, X, [5], V5, V5 * 2, 1e-2),
    "native_layer_norm": (A.native_layer_norm.default, X, [5], V5, None, 1e-2),
    "rms_norm": (A.rms_norm.default, X, [5]), "rms_norm weights": (A.rms_norm.default, X, [5], V5, 0.1),
    "rms_norm small": (A.rms_norm.default, X * 1e-4, [5]),
    "norm": (A.linalg_vector_norm.default, X), "norm axes": (A.linalg_vector_norm.default, X, 2, [0, -1]),
    "norm kept": (A.linalg_vector_norm.default, X, 2, [1], True),
    "attention": (A.scaled_dot_product_attention.default, Q, Q, Q),
    "attention causal": (A.scaled_dot_product_attention.default, Q, Q, Q, None, 0.0, True),
    "attention scaled": (A.scaled_dot_product_attention.default, Q, Q, Q, {"scale": 0.7}),
    "attention masked": (A.scaled_dot_product_attention.default, Q, Q, Q, torch.ones(4, 4).tril().bool()),
    "attention biased": (A.scaled_dot_product_attention.default, Q, Q, Q, floats(2, 4, 4)),
    "attention of heads": (
        A.scaled_dot_product_attention.default, floats(1, 6, 4, 8), Q, Q, floats(4, 4), {"enable_gqa": True},
    ),
    "attention of few": (A.scaled_dot_product_attention.default, Q[:, :, :3], Q, Q, None, 0.0, True),
    "attention of two": (
        A.scaled_dot_product_attention.default, floats(1, 6, 2, 8), Q, Q, floats(2, 4), {"enable_gqa": True},
    ),
    "attention of four": (
        A.scaled_dot_product_attention.default, floats(1, 4, 2, 8), Q, Q, floats(2, 4), {"enable_gqa": True},
    ),
    "attention of three and few": (A.scaled_dot_product_attention.default, Q[0][:, :3], Q[0], Q[0], None, 0.0, True),
    "attention of three": (A.scaled_dot_product_attention.default, Q[0], Q[0], Q[0]),
    # Moved, picked and made.
    "to": (A.to.dtype, X, torch.int32), "to half": (A._to_copy.default, X, {"dtype": torch.bfloat16}),
    "dropout": (A.dropout.default, X, 0.5, False), "dropout of nothing": (A.dropout.default, X, 0.0, True),
    "view": (A.view.default, X, [5, 21]), "unsqueeze": (A.unsqueeze.default, X, 1),
    "flatten": (A.flatten.using_ints, X),
    "expand": (A.expand.default, X[:, :1], [3, 4, 5]), "permute": (A.permute.default, X, [2, -3, 1]),
    "transpose": (A.transpose.int, X, -1, 0), "transpose last": (A.transpose.int, X, 1, 2), "t": (A.t.default, M35),
    "slice": (A.slice.Tensor, X), "slice from": (A.slice.Tensor, X, 1, 2), "slice to": (A.slice.Tensor, X, 1, None, 4),
    "slice of the first axis": (A.slice.Tensor, X, {"start": 1}),
    "slice step": (A.slice.Tensor, X, 1, 1, 7, 2), "slice back": (A.slice.Tensor, X, -2, -3, -1),
    "slice beyond": (A.slice.Tensor, X, 1, -99, 99), "slice nothing": (A.slice.Tensor, X, 1, 5, 2),
    "slice far": (A.slice.Tensor, X, 1, 9), "narrow": (A.narrow.default, X, 1, 2, 3),
    "narrow back": (A.narrow.default, X, 1, -3, 2),
    "select": (A.select.int, X, 1, 2), "select first": (A.select.int, X, -1, 0),
    "select back": (A.select.int, X, -2, -1),
    "split": (A.split.Tensor, X, 2), "split axis": (A.split.Tensor, X, 3, 1),
    "split sizes": (A.split_with_sizes.default, X, [2, 5], -2),
    "chunk": (A.chunk.default, X, 2, -1), "tensor_split": (A.tensor_split.sections, X, 3, 1),
    "unbind": (A.unbind.int, X), "unbind axis": (A.unbind.int, X, -1),
    "cat": (A.cat.default, [X, Y]), "cat axis": (A.cat.default, [X, Y, X], -1), "cat kinds": (A.cat.default, [X, N], 1),
    "cat nothing": (A.cat.default, [torch.zeros(0), X], 2),
    "cat of nothing": (A.cat.default, [torch.zeros(0), torch.zeros(0)]),
    "stack": (A.stack.default, [X, Y]), "stack axis": (A.stack.default, [X, Y], -1),
    "stack within": (A.stack.default, [X, Y], 2),
    "repeat": (A.repeat.default, X, [2, 1, 3]), "repeat more": (A.repeat.default, M35, [2, 1, 3, 1]),
    "repeat each": (A.repeat_interleave.self_int, X, 2), "repeat each along": (A.repeat_interleave.self_int, X, 3, 1),
    "repeat each last": (A.repeat_interleave.self_int, X, 2, -1),
    "flip": (A.flip.default, X, [0, -1]), "pad": (A.constant_pad_nd.default, X, [1, 2]),
    "pad many": (A.constant_pad_nd.default, X, [1, 2, 0, 3, 4, 0], 1.5),
    "pad cut": (A.constant_pad_nd.default, X, [-1, 2, 3, -2]),
    "pad none": (A.constant_pad_nd.default, X, [0, 0]), "pad mode": (A.pad.default, X, [1, 2, -1, 0], "constant", 2.0),
    "pad default": (A.pad.default, X, [0, 1]), "pad cut both": (A.constant_pad_nd.default, X, [-1, -2]),
    "embedding": (A.embedding.default, floats(5, 4), N), "index_select": (A.index_select.default, X, -1, N[0, 0]),
    "gather": (A.gather.default, X, 2, N), "gather fewer": (A.gather.default, X, 1, N[:2, :2, :3]),
    "gather first": (A.gather.default, X, 0, N[:2] % 3), "gather back": (A.gather.default, X, -1, N[:, :3]),
    "index one": (A.index.Tensor, X, [None, N[0, 0]]), "index last": (A.index.Tensor, X, [None, None, N[0, 0]]),
    "index two": (A.index.Tensor, X, [N[0] % 3, N[1]]),
    "index two behind": (A.index.Tensor, X, [None, N[0, :, :1], N[0, 0]]),
    "index three": (A.index.Tensor, X, [N[0] % 3, N[1], N[2]]),
    "index back": (A.index.Tensor, X, [-1 - N[0] % 3, -1 - N[1]]),
    "slice_scatter": (A.slice_scatter.default, X, Y[:1], 0, 1, 2),
    "slice_scatter axis": (A.slice_scatter.default, X, Y[:, :2], 1, -2),
    "slice_scatter front": (A.slice_scatter.default, X, Y[:, :2], -2, 0, 2),
    "slice_scatter whole": (A.slice_scatter.default, X, Y),
    "slice_scatter named": (A.slice_scatter.default, X, Y[:2], {"end": 2}),
    "scatter": (A.scatter.value, X, 1, N[:, :2], 9.0), "scatter first": (A.scatter.value, X, 0, N[:1] % 3, 9),
    "scatter last": (A.scatter.value, X, -1, N[..., :1], -1.0),
    "arange": (A.arange.default, 5), "arange from": (A.arange.start, 2, 7),
    "arange step": (A.arange.start_step, 2, 11, 3),
    "arange back": (A.arange.start_step, 3, -4, -2), "arange floats": (A.arange.start_step, 0.5, 3.0, 0.5),
    "arange from nothing": (A.arange.start_step, 0, 6, 2), "arange of floats": (A.arange.default, 5.0),
    "arange below": (A.arange.start, -2, 3), "arange just below": (A.arange.start, -1, 3),
    "arange as floats": (A.arange.start, 0, 4, {"dtype": torch.float32}),
    "zeros": (A.zeros.default, [2, 3]), "ones": (A.ones.default, [2, 3]), "ones_like": (A.ones_like.default, N),
    "zeros_like": (A.zeros_like.default, T), "new_ones": (A.new_ones.default, X, [3]),
    "new_zeros": (A.new_zeros.default, X, [3]),
    "full": (A.full.default, [2], 2.5), "full_like": (A.full_like.default, X, 2.5),
    "new_full": (A.new_full.default, X, [2], 7),
    "full named": (A.full_like.default, X, {"fill_value": 2.5}), "scalar": (A.scalar_tensor.default, 3.0),
    "fill": (A.fill.Scalar, X, 2.0), "copy": (A.copy.default, X, N[:1]),
    **{f"{name} {shift}": (getattr(A, name).default, matrix, shift) for name in ("tril", "triu") for shift in (-2, 0, 1)
       for matrix in (X,)},
    "tril": (A.tril.default, X), "triu": (A.triu.default, N), "tril truths": (A.tril.default, T, 1),
    "one_hot": (A.one_hot.default, N, 7), "type_as": (A.type_as.default, N, X), "contiguous": (A.contiguous.default, X),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_op_means_what_torch_says(case: str) -> None:
    with np.errstate(all="ignore"):
        check(*CASES[case])


def test_small_powers_are_products() -> None:
    for power in (2, 3):
        assert isinstance(meaning(A.pow.Tensor_Scalar, X, power), Mul)
    assert isinstance(meaning(A.pow.Tensor_Scalar, X, 4), Pow)


def test_rows_of_a_table_are_picked_before_they_are_cast() -> None:
    """The table would be cast whole."""
    module, given, _, _ = node_of(A.embedding.default, floats(5, 4), N)
    table, ids = given
    stored = Param("table", Tensor((5, 4), "bf16"))
    made = Translation({}).run(module, {table: Cast(stored, "f32"), ids: given[ids]})
    assert isinstance(made, Cast) and isinstance(made.x, Gather)
    assert (made.x.x, made.x.indices, made.x.axis) == (stored, given[ids], 0)


def test_padding_that_is_cut_keeps_no_padding_of_nothing() -> None:
    assert meaning(A.constant_pad_nd.default, X, [0, 0]).type == Tensor((3, 7, 5), "f32")
    assert isinstance(meaning(A.constant_pad_nd.default, X, [0, 0]), Input)
    assert isinstance(meaning(A.slice.Tensor, X, 1, 0, 7), Input)


REFUSED: dict[str, tuple[Case, str]] = {
    "integers, bit by bit": ((A.bitwise_and.Tensor, N, N), "bitwise operations on integers are not supported"),
    "floats towards zero": ((A.div.Tensor_mode, X, Y, {"rounding_mode": "trunc"}),
    "float division rounded towards zero"),
    "one element's variance": ((A.var.dim, X[:1], [0]), "a variance of 1 elements, corrected by 1.0, is not a number"),
    "a variance corrected too much": ((A.var.correction, X, [0], {"correction": 4}), "of 3 elements, corrected by 4"),
    "a norm over two axes": ((A.layer_norm.default, X, [7, 5]), "a norm over 2 axes"),
    "a mean square over two axes": ((A.rms_norm.default, X, [7, 5]), "a norm over 2 axes"),
    "another norm": ((A.linalg_vector_norm.default, X, 1), "a norm of order 1 is not supported"),
    "three factors": ((A.einsum.default, "ij,jk,kl->il", [M35, M54, M54.T]), "einsum 'ij,jk,kl->il' is not supported"),
    "a diagonal": ((A.einsum.default, "ii,ij->ij", [M35[:, :3], M35]), "einsum 'ii,ij->ij' is not supported"),
    "a diagonal behind": ((A.einsum.default, "ij,ii->ij", [M54, floats(5, 5)]), "einsum 'ij,ii->ij' is not supported"),
    "a sum over one side": ((A.einsum.default, "ij,jk->i", [M35, M54]), "einsum 'ij,jk->i' is not supported"),
    "dropped probabilities": ((A.scaled_dot_product_attention.default, Q, Q, Q, None, 0.25), "drops 0.25 of its prob"),
    "dropped elements": ((A.dropout.default, X, 0.25, True), "dropping 0.25 of the elements is not supported"),
    "a reflection": ((A.pad.default, X, [1, 1], "reflect"), "padding by reflect is not supported"),
    "a mask": ((A.index.Tensor, X, [T]), "picking by a bool mask is not supported"),
    "axes that are apart": ((A.index.Tensor, X, [N[0] % 3, None, N[0]]), r"indices on axes [0, 2] are not supported"),
    "every second row": ((A.slice_scatter.default, X, X[:, :3], 1, 0, 6, 2),
    "replacing every 2th element is not supported"),
    "a part of other axes": ((A.scatter.value, X, 1, N[:2, :2], 9.0), "scattering over a part of the other axes"),
    "a part of axes behind": ((A.scatter.value, X, 1, N[:, :2, :3], 9.0), "scattering over a part of the other axes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_translation_is_refused(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(FrontendError) as caught:
        meaning(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_elements_beyond_an_axis_are_named() -> None:
    module, given, data, _ = node_of(A.index.Tensor, X[0], [N[0], N[0]])
    made = Graph("op", tuple(given.values()), (("y", Translation({}).run(module, given)),))
    data["x1"] = data["x1"] + 7
    with pytest.raises(Exception, match="axis 0 of index"):
        evaluate(made, data, lambda name: np.zeros(0))


def test_an_element_before_the_first_is_the_last_of_its_own_row() -> None:
    def function(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x[rows, torch.arange(5) - 1]

    module = make_fx(function, tracing_mode="fake")(X[0], N[0, 0])
    holes = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs = Input("x", Tensor((7, 5), "f32")), Input("rows", Tensor((5,), "i64"))
    value = Translation({}).run(module, dict(zip(holes, inputs, strict=True)))
    data = {"x": X[0].numpy(), "rows": N[0, 0].numpy()}
    found = evaluate(Graph("op", inputs, (("y", value),)), data, lambda name: np.zeros(0))["y"]
    np.testing.assert_array_equal(np.asarray(found), function(X[0], N[0, 0]).numpy())


# Complex numbers.

Z, TURN = floats(3, 4, 2), floats(3, 4, seed=8)
COMPLEX: dict[str, Any] = {
    "a product": lambda z, a: torch.view_as_complex(z) * torch.polar(a.abs(), a),
    "a product with real numbers": lambda z, a: torch.view_as_complex(z) * a,
    "a product with a number": lambda z, a: torch.view_as_complex(z) * 2.0,
    "a product from the left": lambda z, a: a * torch.complex(a, z[..., 0]),
    "parts": lambda z, a: torch.complex(torch.view_as_complex(z).real, torch.complex(a, z[..., 1]).imag),
    "moved": lambda z, a: torch.view_as_complex(z).transpose(0, 1).unsqueeze(1).reshape(12)[2:9],
    "as it is": lambda z, a: torch.view_as_complex(z).to(torch.complex64).clone(),
    "widened": lambda z, a: torch.view_as_complex(z).to(torch.complex128) * a,
}


@pytest.mark.parametrize("case", COMPLEX)
def test_complex_numbers_are_pairs(case: str) -> None:
    function = COMPLEX[case]
    module = make_fx(lambda z, a: torch.view_as_real(function(z, a)), tracing_mode="fake")(Z, TURN)
    holes = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs = Input("z", Tensor((3, 4, 2), "f32")), Input("a", Tensor((3, 4), "f32"))
    value = Translation({}).run(module, dict(zip(holes, inputs, strict=True)))
    data = {"z": Z.numpy(), "a": TURN.numpy()}
    found = evaluate(Graph("op", inputs, (("y", value),)), data, lambda name: np.zeros(0))["y"]
    np.testing.assert_allclose(np.asarray(found), torch.view_as_real(function(Z, TURN)).numpy(), rtol=1e-5, atol=1e-6)


def test_complex_numbers_of_another_precision_are_the_same_pairs() -> None:
    module, given, data, complex_ = node_of(A.view_as_complex.default, Z)
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        wide = module.graph.call_function(A.to.dtype, (output.args[0], torch.complex64))
        pairs = module.graph.call_function(A.view_as_real.default, (wide,))
    wide.meta["val"], pairs.meta["val"] = complex_, Z
    output.args = (pairs,)
    value = Translation({}).run(module, given)
    found = evaluate(Graph("op", tuple(given.values()), (("y", value),)), data, lambda name: np.zeros(0))["y"]
    np.testing.assert_array_equal(np.asarray(found), Z.numpy())


def test_other_ops_on_complex_numbers_are_refused() -> None:
    module = make_fx(lambda z: torch.view_as_real(torch.view_as_complex(z).exp()), tracing_mode="fake")(Z)
    (hole,) = (node for node in module.graph.nodes if node.op == "placeholder")
    with pytest.raises(FrontendError, match=r"exp: aten\.exp of complex numbers is not supported"):
        Translation({}).run(module, {hole: Input("z", Tensor((3, 4, 2), "f32"))})


# The walk through a graph.


def inner_of(function: Any, *tensors: torch.Tensor) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*tensors)


@pytest.mark.parametrize(
    "before", [("wrap_with_set_grad_enabled", False), ("wrap_with_autocast", "cpu", None, False, None)]
)
def test_graphs_in_wrappers_are_part_of_the_graph(before: tuple[Any, ...]) -> None:
    name, *settings = before
    made = torch.fx.Graph()
    x, y = made.placeholder("x"), made.placeholder("y")
    inner = made.get_attr("inner")
    made.output(made.call_function(getattr(torch.ops.higher_order, name), (*settings, inner, x, y)))
    root = torch.nn.Module()
    root.inner = inner_of(lambda a, b: a - 2 * b, X, Y)
    inputs = Input("x", Tensor((3, 7, 5), "f32")), Input("y", Tensor((3, 7, 5), "f32"))
    value = Translation({}).run(torch.fx.GraphModule(root, made), dict(zip((x, y), inputs, strict=True)))
    data = {"x": X.numpy(), "y": Y.numpy()}
    found = evaluate(Graph("op", inputs, (("z", value),)), data, lambda name: np.zeros(0))["z"]
    np.testing.assert_allclose(np.asarray(found), X - 2 * Y, rtol=1e-6)


def test_tensors_of_a_graph_are_constants() -> None:
    made = torch.fx.Graph()
    made.output(made.get_attr("table"))
    root = torch.nn.Module()
    root.register_buffer("table", floats(3))
    value = Translation({}).run(torch.fx.GraphModule(root, made), {})
    assert isinstance(value, Constant)
    root.register_buffer("table", torch.empty(3, device="meta"))
    with pytest.raises(FrontendError, match="keeps tensor table outside its buffers, so its values are unknown"):
        Translation({}).run(torch.fx.GraphModule(root, made), {})


def test_what_is_needed_is_asked_for_alone() -> None:
    """Ops without a translation may stand where the output does not look; those that are missing are all named."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x + 1, torch.i0(x) + torch.i0(x + 2) + torch.atanh(x) + torch.trunc(x)

    module = make_fx(function, tracing_mode="fake")(X)
    (hole,) = (node for node in module.graph.nodes if node.op == "placeholder")
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    given = {hole: Input("x", Tensor((3, 7, 5), "f32"))}
    with pytest.raises(FrontendError) as caught:
        Translation({}).run(module, given)
    said = "i0.default (2x, first at i0), atanh.default (1x, first at atanh), trunc.default (1x, first at trunc)"
    assert str(caught.value) == f"the model uses operations that are not supported yet: {said}"
    output.args = (output.args[0][0],)
    Translation({}).run(module, given)


def test_a_size_is_read_off_the_trace_whatever_computed_it() -> None:
    made = torch.fx.Graph()
    x = made.placeholder("x")
    size = made.call_function(A.sym_size.int, (made.call_function(A.i0.default, (x,)), 0))
    size.meta["val"] = torch.SymInt(SimpleNamespace(expr=sympy.Integer(3)))
    product = made.call_function(A.mul.Tensor, (x, size))
    product.meta["val"] = X
    made.output(product)
    given = Input("x", Tensor((3, 7, 5), "f32"))
    value = Translation({}).run(torch.fx.GraphModule(torch.nn.Module(), made), {x: given})
    found = evaluate(Graph("op", (given,), (("y", value),)), {"x": X.numpy()}, lambda name: np.zeros(0))["y"]
    np.testing.assert_array_equal(np.asarray(found), X.numpy() * 3)


@pytest.mark.parametrize(
    "wrong", [lambda x: Reshape(x, (7, 3, 5)), lambda x: Cast(x, "bf16"), lambda x: Cast(Reshape(x, (7, 3, 5)), "bf16")]
)
def test_values_of_another_type_than_the_traces_are_refused(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HANDLERS, "tanh", lambda t, node, x: wrong(x))
    with pytest.raises(
        FrontendError, match=r"tanh_default \(aten.tanh.default\) cannot be .*the trace has \[3, 7, 5\] f32"
    ):
        meaning(A.tanh.default, X)


def test_arguments_that_no_translation_takes_are_refused() -> None:
    with pytest.raises(FrontendError, match=r"argmax\S* \(aten.argmax.default\) has arguments that are not supported"):
        meaning(A.argmax.default, X)


# Dtypes.


@pytest.mark.parametrize(
    "a", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.half, torch.float]
)
def test_values_are_promoted_as_torch_promotes_tensors(a: torch.dtype) -> None:
    def value(dtype: torch.dtype) -> Value:
        return Input("x", Tensor((2,), dtype_name(dtype)))

    assert promoted(value(a)) == dtype_name(a)
    for b in (torch.bool, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32):
        wanted = dtype_name(torch.result_type(torch.zeros(2, dtype=a), torch.zeros(2, dtype=b)))
        assert promoted(value(a), value(b)) == wanted or {a, b} == {torch.uint8, torch.int8}
    for number in (True, 2, 0.5):
        assert promoted(value(a), number) == dtype_name(torch.result_type(torch.zeros(2, dtype=a), number))


def test_numbers_alone_are_of_their_own_kind() -> None:
    assert [promoted(*numbers) for numbers in ((True,), (True, 2), (2, 0.5), (0.5, True))] == [
        "bool",
        "i64",
        "f32",
        "f32",
    ]


def test_a_cast_of_a_widened_integer_is_one_of_its_source() -> None:
    for source in ("i32", "i16", "f32", "bool"):
        x = Input("x", Tensor((2,), source))
        wide = cast(x, "i64")
        assert cast(wide, "i64") is wide and cast(x, source) is x
        made = cast(wide, "f32")
        assert isinstance(made, Cast) and made.dtype == "f32" and (made.x is x) == (source == "i32")
    narrow = cast(Input("x", Tensor((2,), "i32")), "i8")
    again = cast(narrow, "f32")
    assert isinstance(again, Cast) and again.x is narrow
