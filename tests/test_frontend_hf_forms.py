"""Every form that an aten op has (defaults, factors, axes, dtypes) means what it means in torch.

Forms of one kind are traced together, which is quick; a failure names the form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_frontend_hf_aten import K, N, Q, V, Wrapped, X, Y, floats, integers, translated

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Reshape
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.hf.aten import HANDLERS, Translation, cast, dtype_name, from_torch, handles
from llmc.frontends.hf.export import quietly

Forms = Mapping[str, Callable[..., torch.Tensor]]


def graph_of(forms: Forms, *tensors: torch.Tensor) -> Graph:
    """A graph with one output for each form, all of the same inputs x0, x1, ..."""
    with quietly():
        program = torch.export.export(
            Wrapped(lambda *given: tuple(form(*given) for form in forms.values())), tensors, strict=False
        ).run_decompositions({})
    holes = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = tuple(Input(f"x{i}", Tensor(tuple(x.shape), dtype_name(x.dtype))) for i, x in enumerate(tensors))
    values = Translation({}).run(program.graph_module, dict(zip(holes, inputs, strict=True)))
    return Graph("forms", inputs, tuple(zip(forms, values, strict=True)))


def grouped(x: torch.Tensor, queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of these shapes, cut out of a tensor."""
    return tuple(
        x.flatten()[at : at + math.prod(shape)].view(shape) for at, shape in ((0, queries), (50, keys), (90, keys))
    )


END = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 4.0, 0.25])
C, A, B = integers(4, seed=3).float(), integers(3, 5, seed=4).float(), integers(5, 4, seed=5).float()

GROUPS: dict[str, tuple[tuple[torch.Tensor, ...], Forms]] = {
    "arithmetic": (
        (X, Y, N),
        {
            "add nothing of it": lambda x, y, n: torch.add(x, y, alpha=0),
            "add half": lambda x, y, n: torch.add(x, y, alpha=0.5),
            "add the negative": lambda x, y, n: torch.add(x, y, alpha=-1),
            "add integers three times": lambda x, y, n: torch.add(n, n, alpha=3),
            "subtract the negative": lambda x, y, n: torch.sub(x, y, alpha=-2),
            "subtract the other way round": lambda x, y, n: torch.rsub(x, y) + torch.rsub(n, 3),
            "integer to a float power": lambda x, y, n: n**2.0,
            "the first and fourth power": lambda x, y, n: x**1 + x**4,
            "powers near those of roots": lambda x, y, n: (x.abs() + 1) ** 1.5 + (x.abs() + 1) ** -1.5,
            "max of two kinds of halves": lambda x, y, n: torch.max(x.bfloat16(), y.half()),
            "outer product of halves": lambda x, y, n: torch.outer(x[0, 0].bfloat16(), y[0, 0].bfloat16()).float(),
            "truth equals a number": lambda x, y, n: ((x > 0) == 2) | ((x > 0) >= 2),
            "truth equals a truth": lambda x, y, n: (x > 0) == True,  # noqa: E712
            "integers made narrow and wide": lambda x, y, n: (n * 100).int().to(torch.int8).long(),
            "integers made narrow and floats": lambda x, y, n: (n * 100).int().to(torch.int8).float(),
            "integers of one operand": lambda x, y, n: torch.square(n) + (n - 2).abs() - n.neg() + F.relu(n - 2),
            "floats of integers": lambda x, y, n: n.sqrt() + n.sigmoid() + torch.reciprocal(n + 1) + n.exp(),
            "rounded": lambda x, y, n: (x * 3).floor() + (x * 2).round(),
            "truths of numbers": lambda x, y, n: torch.logical_or(x - x, n) ^ torch.logical_and(x, n.int()),
            "truth of a small number": lambda x, y, n: torch.logical_not(x * 0.01),
            "where integers say so": lambda x, y, n: torch.where(n.bool(), x, y),
        },
    ),
    "powers at the ends": (
        (END,),
        {
            "square root": lambda x: x**0.5,
            "one over the square root": lambda x: x**-0.5,
            "square and cube": lambda x: x**2 + x**3,
        },
    ),
    "numbers that are rounded": (
        (torch.tensor([-3.0, -2.5, -1.5, -0.75, -0.5, -0.0, 0.5, 1.5, 2.5, 3.0, 7.25]), torch.arange(-5, 6)),
        {
            "remainders": lambda x, n: x % -0.75 + x % 0.75 + n % -3 + n % 3 + (x + 8) % -x.clamp(min=0.5),
            "quotients": lambda x, n: torch.div(n, -2, rounding_mode="trunc") + n // -2 + x // -0.75 + n // 3,
            "to the nearest, to the even": lambda x, n: x.round() + x.floor() * 16,
            "casts to integers": lambda x, n: x.int() + x.long() + x.to(torch.int8) + (n > 0).int(),
            "limits the wrong way round": lambda x, n: x.clamp(2.0, -1.0) + n.clamp(-1, 2) + n.clamp(min=0.5),
            "truths counted": lambda x, n: (x > 0).cumsum(0) + (n > 1).sum() + n.sum(0, dtype=torch.float32),
            "numbers of both sides": lambda x, n: torch.where(x > 0, 1, 0) + torch.where(n > 0, 0.5, 2.0),
            "integers and floats": lambda x, n: torch.where(x > 0, n, x) + torch.max(n, x) - torch.min(x, n),
        },
    ),
    "numbers that are none": (
        (END,),
        {
            "the greater": lambda x: torch.maximum(x, x.flip(0)) + F.relu(x),
            "the smaller": lambda x: torch.minimum(x, x.flip(0)),
            "within limits": lambda x: x.clamp(-1.0, 1.0),
            "truths": lambda x: torch.logical_not(x) | (x != x),
            "comparisons": lambda x: (x < 1) ^ (x >= 1) ^ (x == x),
            "roundings": lambda x: x.floor() + x.round(),
            "one over it": lambda x: x.reciprocal() + x.rsqrt(),
        },
    ),
    "nonlinearities": (
        (X * 12,),
        {
            "softplus": lambda x: F.softplus(x),
            "softplus, flat": lambda x: F.softplus(x, beta=0.5),
            "softplus, steep, and straight early": lambda x: F.softplus(x, beta=2.0, threshold=3.0),
            "softplus of halves": lambda x: F.softplus(x.bfloat16(), threshold=-100.0),
        },
    ),
    "reductions": (
        (X, N),
        {
            "max along an axis": lambda x, n: x.max(1)[0] + x.max(-2)[1],
            "argmax along an axis": lambda x, n: x.argmax(1),
            "topk of the last axis": lambda x, n: x.topk(4)[0] + x.topk(4)[1],
            "topk without an order asked for": lambda x, n: x.topk(4, sorted=False)[0].sum(-1),
            "norm of all": lambda x, n: torch.linalg.vector_norm(x),
            "norm along an axis": lambda x, n: torch.linalg.vector_norm(x, dim=1),
            "norm that keeps its axis": lambda x, n: torch.linalg.vector_norm(x, dim=1, keepdim=True),
            "sums": lambda x, n: n.sum(1) + x.sum(1) + (n > 1).sum(1),
            "layer norm, its own eps": lambda x, n: F.layer_norm(x * 1e-3, (5,)),
        },
    ),
    "products": (
        (C, A, B, floats(4, 5, 3)),
        {
            "addmm of what counts for nothing": lambda c, a, b, x: torch.addmm(c / 0.0, a, b, beta=0),
            "addmm without its first operand": lambda c, a, b, x: torch.addmm(c, a, b, beta=-1),
            "addmm with its first operand twice": lambda c, a, b, x: torch.addmm(c, a, b, beta=2),
            "addmm of halves": lambda c, a, b, x: torch.addmm(c.bfloat16(), a.bfloat16(), b.bfloat16()),
            "a matrix times matrices": lambda c, a, b, x: a @ x.transpose(1, 2).transpose(1, 2),
            "einsum without an arrow": lambda c, a, b, x: torch.einsum("ij,ij", a, a),
        },
    ),
    "attention": (
        (Q, K, V, floats(6, 3, 4)),
        {
            "fewer queries": lambda q, k, v, b: F.scaled_dot_product_attention(q[:, :, :3], k, v, enable_gqa=True),
            "fewer queries and a mask": lambda q, k, v, b: F.scaled_dot_product_attention(
                q[:, :, :3], q, q, torch.ones(3, 4).triu().bool()
            ),
            "fewer queries and a bias": lambda q, k, v, b: F.scaled_dot_product_attention(
                q[:, :, :3], k, v, b, enable_gqa=True
            ),
            "groups of heads, as wide as there are keys' heads": lambda q, k, v, b: F.scaled_dot_product_attention(
                *grouped(q, (2, 4, 3, 2), (2, 2, 4, 2)), b[:4, :, :4], enable_gqa=True
            ),
            "groups of heads, as many as sequences": lambda q, k, v, b: F.scaled_dot_product_attention(
                *grouped(q, (4, 4, 3, 2), (4, 2, 4, 2)), b[:4, :, :4], enable_gqa=True
            ),
            "without a batch": lambda q, k, v, b: F.scaled_dot_product_attention(q[0], q[0], q[0]),
            "without a batch, biased": lambda q, k, v, b: F.scaled_dot_product_attention(q[0, :, :3], q[0], q[0], b),
        },
    ),
    "joins and cuts": (
        (X, Y),
        {
            "nothing joined with matrices": lambda x, y: torch.cat([torch.zeros(0), x]),
            "nothing joined with nothing": lambda x, y: torch.cat([torch.zeros(0), torch.zeros(0)]),
            "join along the first axis": lambda x, y: torch.cat([x, y]) * torch.cat([y, x]),
            "stack along the first axis": lambda x, y: torch.stack([x, y]),
            "split along the first axis": lambda x, y: x.split(2)[0] + x.chunk(2)[0],
            "unbind the first axis": lambda x, y: x.unbind()[2],
            "one before the start": lambda x, y: x[:, -8:-2],
            "a step": lambda x, y: x[:, 1:7:2] + x[:, 0:5:2],
            "a step over one element": lambda x, y: x[1:2][::3],
            "the first axis": lambda x, y: torch.ops.aten.slice(x, start=1) * 2,
            "nothing at the end": lambda x, y: x[:, 9:],
            "pad with nothing said": lambda x, y: F.pad(x, (1, 0)) + torch.constant_pad_nd(x, (0, 1)),
            "pad on one side, cut on the other": lambda x, y: F.pad(x, (1, -2, -1, 2)),
            "repeat each": lambda x, y: x.repeat_interleave(2),
            "a slice after the first": lambda x, y: torch.slice_scatter(x, y[:, :2], 1, 1, 3),
            "a slice along the first axis": lambda x, y: torch.slice_scatter(x, y[:1], start=1, end=2),
            "a slice at the end": lambda x, y: torch.slice_scatter(x, y[:, :3], 1, 4, 7),
            "the whole as a slice": lambda x, y: torch.slice_scatter(x, y.double().float()),
        },
    ),
    "picks": (
        (X, N),
        {
            "gather of fewer": lambda x, n: x.gather(2, n[:2, :3, :2]),
            "gather of fewer before the axis": lambda x, n: x.gather(-1, n[:2]),
            "gather of fewer behind the axis": lambda x, n: x.gather(1, n[:, :, :3]),
            "gather along the first axis": lambda x, n: x.gather(-3, n[:2, :4] % 3),
            "index before the start of its axis": lambda x, n: x[1][n[0, 0], torch.arange(5) - 1],
            "index of the first axis": lambda x, n: x[n[0, 0] % 3],
            "triangles": lambda x, n: x.tril() - x.triu(),
            "one hot": lambda x, n: F.one_hot(n, 7),
        },
    ),
    "made": (
        (X,),
        {
            "counted": lambda x: torch.arange(5) + torch.arange(1, 6) + torch.arange(0, 10, 2),
            "counted from below nothing": lambda x: torch.arange(-2, 3) + torch.arange(-1.5, 3.5),
            "counted in floats": lambda x: torch.arange(0.0, 2.5, 0.5) + torch.arange(0, 5, dtype=torch.float32),
            "a trained part": lambda x: torch.dropout(x, 0.5, False) + F.dropout(x, 0.0),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_each_form_of_an_op_means_what_torch_says(group: str) -> None:
    tensors, forms = GROUPS[group]
    graph = graph_of(forms, *tensors)
    data = {f"x{i}": x.numpy() for i, x in enumerate(tensors)}
    with np.errstate(all="ignore"):
        found = evaluate(graph, data, lambda name: np.zeros(0))
    for name, form in forms.items():
        want = form(*tensors)
        wanted = want.float().numpy() if want.dtype == torch.bfloat16 else want.numpy()
        got = np.asarray(found[name])
        assert got.shape == wanted.shape, name
        np.testing.assert_allclose(got.astype(wanted.dtype), wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_integers_that_were_made_wide_are_used_as_they_came() -> None:
    """Token ids are i32, models widen them first: no graph needs the i64 ones."""
    forms: Forms = {
        "rows": lambda n, t: F.embedding(n.long(), t),
        "picked": lambda n, t: t[n.long()],
        "floats": lambda n, t: n.long().float(),
    }
    graph = graph_of(forms, integers(3, 2).int(), floats(5, 4))
    assert not [value for value in topological([value for _, value in graph.outputs]) if value.dtype == "i64"]


def test_an_index_beyond_its_axis_is_no_element_of_the_next_row() -> None:
    with pytest.raises(Exception, match="axis 1 of index"):
        translated(lambda x, n: x[n[0], torch.arange(5) % 5 + 1], X[0], N[:1, 0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.einsum("abc,dbc->a", x, x), "einsum 'abc,dbc->a' is not supported"),
        (lambda x: torch.einsum("bc,cd,de->be", x[0], x[0].T, x[0]), "einsum 'bc,cd,de->be' is not supported"),
        (lambda x: torch.einsum("abc->cab", x), "einsum 'abc->cab' is not supported"),
        (lambda x: torch.einsum("...bc,...cd->...bd", x, x.mT), "einsum '...bc,...cd->...bd' is not supported"),
        (lambda x: torch.einsum("bc,cd", x[0], x[0].T), "einsum 'bc,cd' is not supported"),
        (lambda x: x[:1].var(0), "a variance of 1 elements, corrected by 1"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.25), "drops 0.25 of its probabilities"),
    ],
)
def test_what_has_no_translation_is_refused_by_its_own_line(
    function: Callable[..., torch.Tensor], message: str
) -> None:
    with pytest.raises(FrontendError) as caught:
        translated(function, X)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_elements_are_not_dropped_in_silence() -> None:
    def translation(train: bool) -> Value:
        with quietly():
            program = torch.export.export(Wrapped(lambda x: torch.dropout(x, 0.25, train)), (X,), strict=False)
        (hole,) = (node for node in program.graph.nodes if node.op == "placeholder")
        given = Input("x", Tensor((3, 7, 5), "f32"))
        (value,) = Translation({}).run(program.graph_module, {hole: given})
        return value

    assert isinstance(translation(False), Input)
    with pytest.raises(FrontendError, match=r"dropping 0\.25 of the elements is not supported"):
        translation(True)


def test_unsupported_ops_are_counted() -> None:
    with pytest.raises(FrontendError) as caught:
        translated(
            lambda x: torch.special.i0(x) + torch.special.i0(2 * x) + torch.special.i1(x) + torch.atanh(x) + 1, X
        )
    found = str(caught.value)
    assert "special_i0.default (2x, first at special_i0)" in found
    assert "special_i1.default (1x, first at special_i1)" in found and "atanh.default (1x, first at atanh)" in found
    assert "add" not in found and "mul" not in found


@pytest.mark.parametrize("wrong", [lambda x: Reshape(x, (7, 3, 5)), lambda x: cast(x, "bf16")])
def test_a_translation_of_another_type_than_the_traces_is_refused(
    wrong: Callable[[Value], Value], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HANDLERS, "tanh", lambda t, node, x: wrong(x))
    with pytest.raises(FrontendError, match=r"tanh \(aten.tanh.default\).*the trace has \[3, 7, 5\] f32"):
        translated(lambda x: x.tanh(), X)


def test_an_op_has_one_handler() -> None:
    before = dict(HANDLERS)
    with pytest.raises(ValueError, match=r"two functions handle aten\.tanh"):
        handles("tanh")(lambda t, node, x: x)
    assert before == HANDLERS


def test_a_tensor_of_the_model_is_a_constant_if_its_values_are_known() -> None:
    for tensor in (floats(3), floats(3).bfloat16(), torch.tensor([True, False]), torch.tensor([1 << 40, -1])):
        found = evaluate(Graph("c", (), (("y", from_torch(tensor, "table")),)), {}, lambda name: np.zeros(0))["y"]
        assert from_torch(tensor, "table").dtype == dtype_name(tensor.dtype)
        np.testing.assert_array_equal(np.asarray(found, np.float64), tensor.double().numpy())
    with pytest.raises(FrontendError, match="tensor table"):
        from_torch(torch.empty(3, device="meta"), "table")


def test_parts_without_gradients_and_in_another_precision_are_part_of_the_graph() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z = x * y
        with torch.autocast("cpu", enabled=False):
            z = z - y * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (z[0] @ y[0].T).float()

    (want,) = (function(X, Y),)
    np.testing.assert_allclose(translated(function, X, Y), want, rtol=1e-2, atol=1e-2)
