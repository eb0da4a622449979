"""Products of matrices, attention, branches and loops of ONNX against numpy, onnxruntime and the standard."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_graphs import Draws, Nodes, compare, evaluated

from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.elementwise import Constant
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError, IRError
from llmc.frontends.onnx.translation import Body, Item, Node, Translation

RNG = np.random.default_rng(17)
floats = Draws(RNG).floats
integers = Draws(RNG).integers


@pytest.mark.parametrize(("turn_a", "turn_b"), list(itertools.product((0, 1), repeat=2)))
def test_gemm(turn_a: int, turn_b: int) -> None:
    a, b = floats(*((5, 3) if turn_a else (3, 5))), floats(*((7, 5) if turn_b else (5, 7)))
    nodes = Nodes({"a": ("float32", a.shape)})
    outputs = [nodes.add("Gemm", "a", b, transA=turn_a, transB=turn_b)]
    for c in (floats(), floats(7), floats(3, 1), floats(3, 7)):
        outputs += [
            nodes.add("Gemm", "a", b, c, transA=turn_a, transB=turn_b, alpha=alpha, beta=beta)
            for alpha, beta in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (2.0, 0.0), (1.0, 2.0), (1.0, -1.0))
        ]
    none = np.array([np.nan, np.inf, 0, 1, 2, 3, 4], np.float32)  # of which nothing is added
    outputs.append(nodes.add("Gemm", "a", b, none, transA=turn_a, transB=turn_b, beta=0.0))
    compare(nodes, outputs, {"a": a})


@pytest.mark.parametrize(("left", "right"), [((3, 5), (5, 7)), ((2, 3, 5), (5, 7)), ((5,), (5, 7)), ((3, 5), (5,))])
def test_products_of_integers_with_zero_points(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = integers(*left), integers(*right, dtype=np.int8)
    rows, columns = (left[-2] if len(left) > 1 else 1), (right[-1] if len(right) > 1 else 1)
    points_a = [None, np.uint8(3), np.array([200], np.uint8), *([integers(rows)] if len(left) == 2 else [])]
    points_b = [
        None,
        np.int8(-3),
        np.array([9], np.int8),
        *([integers(columns, dtype=np.int8)] if len(right) > 1 else []),
    ]
    for zero_a, zero_b in itertools.product(points_a, points_b):
        nodes = Nodes({"a": ("uint8", left)})
        (found,) = evaluated(nodes.graph(nodes.add("MatMulInteger", "a", b, zero_a, zero_b)), {"a": a})
        wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
        if zero_a is not None:
            wide_a = wide_a - (zero_a if zero_a.size == 1 else zero_a[:, None]).astype(np.int64)
        if zero_b is not None:
            wide_b = wide_b - zero_b.astype(np.int64)
        np.testing.assert_array_equal(found, wide_a @ wide_b)


def test_products_of_integers_that_are_rounded_again() -> None:
    """Scales are powers of two, so that f32 has every product exactly; halves are rounded to even."""
    a, b = integers(3, 5), integers(5, 7, dtype=np.int8)
    powers = 2.0 ** RNG.integers(-3, 3, 7)
    scales_a = (0.5, [0.25], [0.5, 1, 0.25])
    scales_b = (0.25, [0.5], powers.tolist())
    for scale_a, scale_b in itertools.product(scales_a, scales_b):
        first, second = np.array(scale_a, np.float32), np.array(scale_b, np.float32)
        zeros = np.full(first.shape, 7, np.uint8), np.full(second.shape, -2, np.int8)
        nodes = Nodes({"a": ("uint8", (3, 5))})
        output = nodes.add("QLinearMatMul", "a", first, zeros[0], b, second, zeros[1], np.float32(16), np.uint8(100))
        total = (a.astype(np.int64) - 7) @ (b.astype(np.int64) + 2)
        expected = np.rint(total * first.reshape(-1, 1).astype(np.float64) * second / 16) + 100
        np.testing.assert_array_equal(evaluated(nodes.graph(output), {"a": a})[0], np.clip(expected, 0, 255))


@pytest.mark.parametrize(("left", "right"), [((2, 3, 5), (5, 7)), ((5,), (5, 7)), ((5,), (5,))], ids=str)
def test_rows_of_batches_and_vectors_that_are_rounded_again(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b, scale = integers(*left), integers(*right, dtype=np.int8), np.float32(0.25)
    of_rows = np.array([0.5, 1, 0.25] if len(left) == 3 else [0.5], np.float32)
    zeros = np.arange(7, 7 + len(of_rows)).astype(np.uint8)
    nodes = Nodes({"a": ("uint8", left)})
    output = nodes.add(
        "QLinearMatMul", "a", of_rows, zeros, b, scale.reshape(1), np.array([-2], np.int8), np.float32(16), np.uint8(9)
    )
    turned = (-1, 1) if len(left) > 1 else (-1,)
    total = (a.astype(np.int64) - zeros.reshape(turned)) @ (b.astype(np.int64) + 2)
    expected = np.rint(total * of_rows.reshape(turned if len(left) > 1 else ()).astype(np.float64) * scale / 16) + 9
    np.testing.assert_array_equal(evaluated(nodes.graph(output), {"a": a})[0], np.clip(expected, 0, 255))


@pytest.mark.parametrize(
    ("equation", "shapes", "message"),
    [
        ("ij,jk->ik", ((2, 3),), "has 2 terms for 1 operands"),
        ("ij->i", ((2, 3, 4),), "does not fit an operand of rank 3"),
        ("ijkl->i", ((2, 3, 4),), "does not fit an operand of rank 3"),
        ("...ijkl->i", ((2, 3, 4),), "does not fit an operand of rank 3"),
        ("ii->i", ((2, 3),), "the axes 'i' have sizes 2 and 3"),
    ],
)
def test_equations_that_do_not_fit(equation: str, shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    nodes = Nodes({f"x{i}": ("float32", shape) for i, shape in enumerate(shapes)})
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add("Einsum", *nodes.inputs, equation=equation))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...ij,...jk->...ik", ((2, 1, 3, 4), (5, 4, 6))),
        ("...ij,...jk->...ik", ((1, 3, 4), (5, 4, 6))),
        ("...ij,...jk", ((5, 3, 4), (1, 4, 6))),
        ("i...->...", ((2, 3, 4),)),
        ("...->...", ((2, 3),)),
        ("iii->i", ((3, 3, 3),)),
        ("iijj->ij", ((3, 3, 2, 2),)),
        (" a b , b c -> a c ", ((2, 3), (3, 4))),
        ("ab,cd->", ((2, 3), (4, 5))),
        ("ba", ((2, 3),)),
        ("ij,jk,kl,lm->im", ((2, 3), (3, 4), (4, 5), (5, 6))),
        ("ij,jk,kl,lm->ml", ((2, 3), (3, 4), (4, 5), (5, 6))),
        ("...ij,...jk->...ik", ((2, 3), (3, 4))),
        ("...i,...j->...ij", ((5, 1, 2), (1, 4, 3))),
    ],
    ids=str,
)
def test_equations_with_axes_that_are_repeated_or_left_out(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    arrays = {f"x{i}": floats(*shape) for i, shape in enumerate(shapes)}
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()})
    (found,) = evaluated(nodes.graph(nodes.add("Einsum", *arrays, equation=equation)), arrays)
    expected = np.einsum(equation.replace(" ", ""), *arrays.values())
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Attention


def attending(
    queries: int = 3, keys: int = 5, heads: int = 4, kv_heads: int = 2, past: int = 0
) -> dict[str, np.ndarray]:
    found = {"q": floats(2, heads, queries, 6), "k": floats(2, kv_heads, keys, 6), "v": floats(2, kv_heads, keys, 7)}
    if past:
        found |= {"pk": floats(2, kv_heads, past, 6), "pv": floats(2, kv_heads, past, 7)}
    return found


@pytest.mark.parametrize(
    "options",
    [
        {}, {"is_causal": 1}, {"scale": 0.3}, {"softcap": 0.7}, {"is_causal": 1, "softcap": 0.7, "scale": 1.0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("masked", [None, bool, np.float32])
@pytest.mark.parametrize("past", [0, 4])
def test_attention_and_its_scores(options: dict[str, object], mode: int, masked: type | None, past: int) -> None:
    arrays = attending(5, 5, past=past)
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 24)
    mask = None
    if masked is not None:
        mask = floats(5, 5 + past) if masked is np.float32 else RNG.random((5, 5 + past)) < 0.7
        mask[:, 0] = True  # every query sees a key: the standard does not agree with itself elsewhere
    extra = ["pk", "pv"] if past else []
    outputs = nodes.many("Attention", "q", "k", "v", mask, *extra, outputs=4, qk_matmul_output_mode=mode, **options)
    kept = outputs if past else [outputs[0], outputs[3]]
    # In its raw scores onnx's reference has the softcap by mistake: onnxruntime and the standard's text do not.
    run = nodes.runtime(*kept).run if mode == 0 else ReferenceEvaluator(nodes.model(*kept)).run
    for own, other in zip(evaluated(nodes.graph(*kept), arrays), run(None, arrays), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5)


def test_attention_of_three_axes_is_that_of_four() -> None:
    arrays = attending()
    four = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 23)
    (expected,) = evaluated(four.graph(four.add("Attention", "q", "k", "v")), arrays)
    flat = {name: a.swapaxes(1, 2).reshape(2, a.shape[2], -1) for name, a in arrays.items()}
    three = Nodes({name: ("float32", a.shape) for name, a in flat.items()}, 23)
    output = three.add("Attention", "q", "k", "v", q_num_heads=4, kv_num_heads=2)
    (found,) = evaluated(three.graph(output), flat)
    np.testing.assert_array_equal(found, expected.swapaxes(1, 2).reshape(2, 3, -1))


@pytest.mark.parametrize(
    ("operands", "attributes", "message"),
    [
        (("q", "k", "v", None, "k"), {}, "past_key and past_value come together"),
        (("q", "k", "v", None, None, "v"), {}, "past_key and past_value come together"),
        (("t", "t", "t"), {"kv_num_heads": 2}, "need the attributes q_num_heads and kv_num_heads"),
        (("t", "t", "t"), {"q_num_heads": 2}, "need the attributes q_num_heads and kv_num_heads"),
    ],
)
def test_attention_that_is_not_whole(
    operands: tuple[str | None, ...], attributes: dict[str, object], message: str
) -> None:
    arrays = {**attending(), "t": floats(2, 3, 12)}
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 23)
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add("Attention", *operands, **attributes))


@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (2, 0), (1, 1), (2, 1), (-1, 0), (-1, 1), (2, -1)], ids=str)
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("kind", ["alone", "past", "lengths", "fewer"])
def test_attention_within_windows(window: tuple[int, int], causal: int, kind: str) -> None:
    """A key `left` places before a query is seen, and `right` places after; a query's place counts the past."""
    keys, past = (7 if kind == "fewer" else 5), (3 if kind == "past" else 0)
    arrays = attending(5, keys, past=past)
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 26)
    left, right = window
    lengths = np.array([5, 4]) if kind == "lengths" else None
    operands = [None, *(["pk", "pv"] if past else [None, None]), lengths]
    options = {"left_window_size": left, "right_window_size": right, "is_causal": causal}
    output = nodes.add("Attention", "q", "k", "v", *operands[: 4 if lengths is not None else 3], **options)
    (found,) = evaluated(nodes.graph(output), arrays)
    k, v = arrays["k"].repeat(2, 1), arrays["v"].repeat(2, 1)
    if past:
        k, v = (np.concatenate([arrays[name].repeat(2, 1), x], 2) for name, x in (("pk", k), ("pv", v)))
    scores = arrays["q"] @ k.swapaxes(2, 3) / math.sqrt(6)
    first = (past if lengths is None else (lengths - 5).reshape(2, 1, 1, 1)) * np.ones((2, 1, 1, 1), int)
    ahead = np.arange(keys + past) - (np.arange(5)[:, None] + first)
    seen = np.ones(ahead.shape, bool) if left < 0 else ahead >= -left
    if causal or right >= 0:
        seen &= ahead <= (0 if causal else right)
    if lengths is not None:
        seen &= np.arange(keys) < lengths.reshape(2, 1, 1, 1)
    scores = np.where(seen, scores, -np.inf)
    some = seen.any(-1, keepdims=True)
    shares = np.where(some, np.exp(scores - np.where(some, scores.max(-1, keepdims=True), 0)), 0)
    expected = shares / np.where(some, shares.sum(-1, keepdims=True), 1) @ v
    np.testing.assert_allclose(np.where(some, found, 0), expected, rtol=1e-4, atol=1e-5)


def test_masks_shorter_than_the_keys_hide_the_rest() -> None:
    """Since opset 24; over a free number of keys too."""
    arrays = attending(3, 5)
    for opset, shape in itertools.product((24, 26), ((1,), (3, 1), (3, 2), (2, 1, 3, 4))):
        for mask in (np.ones(shape, bool), floats(*shape)):
            whole = np.full((*shape[:-1], 5), -np.inf, np.float32)
            whole[..., : shape[-1]] = 0 if mask.dtype == bool else mask
            found = []
            for given, keys in ((mask, 5), (mask, "K"), (whole, 5)):
                sizes = {n: [*a.shape[:2], keys if n in "kv" else a.shape[2], a.shape[3]] for n, a in arrays.items()}
                nodes = Nodes({name: ("float32", size) for name, size in sizes.items()}, opset)
                at_least = nodes.add("Concat", "k", np.zeros((2, 2, 0, 6), np.float32), axis=2)
                if keys == "K" and shape[-1] > 1:
                    continue  # one key at least is there
                output = nodes.add("Attention", "q", at_least, "v", given)
                found.append(evaluated(nodes.graph(output), arrays)[0])
            for other in found[:-1]:
                np.testing.assert_allclose(other, found[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [23, 24])
def test_a_mask_as_long_as_the_keys_is_used_as_it_is(opset: int) -> None:
    nodes = Nodes({name: ("float32", a.shape) for name, a in attending(3, 5).items()}, opset)
    graph = nodes.graph(nodes.add("Attention", "q", "k", "v", floats(3, 5)))
    (found,) = (op for op in graph.ops if isinstance(op, Attention))
    assert isinstance(found.bias, Constant)


def test_before_opset_24_a_mask_of_one_column_is_for_all_keys() -> None:
    """It broadcasts; since then it hides all keys but the first."""
    arrays = attending(3, 5)
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 23)
    outputs = [nodes.add("Attention", "q", "k", "v", mask) for mask in (np.ones((3, 1), bool), None)]
    found, plain = evaluated(nodes.graph(*outputs), arrays)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "causal", "window"),
    [
        ({}, False, 0), ({"is_causal": 1}, True, 0), ({"right_window_size": 0}, True, 0),
        ({"is_causal": 1, "left_window_size": 2}, True, 3), ({"left_window_size": 2, "right_window_size": 0}, True, 3),
        ({"left_window_size": 0, "right_window_size": 0}, True, 1), ({"is_causal": 1, "left_window_size": 0}, True, 1),
        ({"left_window_size": 2, "right_window_size": 2}, False, 3), ({"softcap": -0.5}, False, 0),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("past", [0, 4])
def test_what_attention_can_say_itself_is_no_mask(
    options: dict[str, float], causal: bool, window: int, past: int
) -> None:
    """So that its kernels leave out what is not seen. A softcap below zero is none."""
    arrays = attending(5, 5, past=past)
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 26)
    output = nodes.add("Attention", "q", "k", "v", None, *(["pk", "pv"] if past else []), **options)
    (found,) = (op for op in nodes.graph(output).ops if isinstance(op, Attention))
    assert (found.causal, found.window, found.softcap, found.bias) == (causal, window, 0, None)


@pytest.mark.parametrize("outputs", ["y", "y,,", "y,k,v", "y,k,v,", "y,,,s", "y,k,v,s"])
def test_attention_gives_the_outputs_that_are_named(outputs: str) -> None:
    names, arrays = outputs.split(","), attending()
    nodes = Nodes({f"{name}_in": ("float32", a.shape) for name, a in arrays.items()}, 24)
    nodes.nodes.append(helper.make_node("Attention", ["q_in", "k_in", "v_in"], names, name="node"))
    asked = [name for name in names if name]
    found = evaluated(nodes.graph(*asked), {f"{name}_in": a for name, a in arrays.items()})
    shapes = {"y": (2, 4, 3, 7), "k": arrays["k"].shape, "v": arrays["v"].shape, "s": (2, 4, 3, 5)}
    assert [array.shape for array in found] == [shapes[name] for name in asked]


def test_a_query_that_sees_no_key_has_no_shares() -> None:
    arrays, mask = attending(), np.ones((3, 5), bool)
    mask[1] = False
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 24)
    outputs = nodes.many("Attention", "q", "k", "v", mask, outputs=4, qk_matmul_output_mode=3)
    found, shares = evaluated(nodes.graph(outputs[0], outputs[3]), arrays)
    assert not found[:, :, 1].any()
    np.testing.assert_allclose(shares.sum(-1), np.broadcast_to([1, 0, 1], (2, 4, 3)), rtol=1e-6)


def test_a_mask_of_bf16_is_added() -> None:
    arrays, mask = attending(), floats(3, 5)
    half = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    nodes = Nodes({name: ("bfloat16", a.shape) for name, a in arrays.items()}, 24)
    (found,) = evaluated(
        nodes.graph(nodes.add("Attention", "q", "k", "v", mask.astype(half))),
        {name: a.astype(half) for name, a in arrays.items()},
    )
    wide = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 24)
    (expected,) = evaluated(wide.graph(wide.add("Attention", "q", "k", "v", mask)), arrays)
    # Queries, keys, values and mask are rounded to 8 bits each, and so is the result: 2^-9 of numbers up to 4.
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8, atol=2**-7)


def test_a_mask_of_one_number_is_for_all() -> None:
    arrays = attending(3, 5)
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 24)
    found, plain = evaluated(
        nodes.graph(nodes.add("Attention", "q", "k", "v", np.array(True)), nodes.add("Attention", "q", "k", "v")),
        arrays,
    )
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "window", [{}, {"left_window_size": 1, "right_window_size": 2}, {"left_window_size": 0}], ids=str
)
def test_scores_of_keys_that_are_seen_are_not_moved(window: dict[str, int]) -> None:
    """With lengths and windows: the scores are the raw ones, or -inf."""
    arrays = attending(5, 5)
    nodes = Nodes({name: ("float32", a.shape) for name, a in arrays.items()}, 26)
    operands = ("q", "k", "v", None, None, None, np.array([5, 4]))
    raw, biased = (
        nodes.many("Attention", *operands, outputs=4, qk_matmul_output_mode=mode, **window)[3] for mode in (0, 2)
    )
    plain, found = evaluated(nodes.graph(raw, biased), arrays)
    assert np.isinf(found).any()
    np.testing.assert_array_equal(found[np.isfinite(found)], plain[np.isfinite(found)])


# Branches and loops


def info(name: str, kind: int = TensorProto.FLOAT, rank: int | None = None) -> object:
    return helper.make_tensor_value_info(name, kind, None if rank is None else [None] * rank)


@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("turned", [0, 1])
def test_scans_of_each_axis_in_each_direction(backward: int, axis: int, turned: int) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["state", "row"], ["next"]), helper.make_node("Mul", ["next", "row"], ["out"])],
        "body", [info("state"), info("row")], [info("next"), info("out")],
    )  # fmt: skip
    x = floats(3, 3)
    nodes = Nodes({"s": ("float32", (3,)), "x": ("float32", x.shape)})
    outputs = nodes.many(
        "Scan", "s", "x", outputs=2, body=body, num_scan_inputs=1, scan_input_axes=[axis],
        scan_input_directions=[backward], scan_output_axes=[axis], scan_output_directions=[turned],
    )  # fmt: skip
    compare(nodes, outputs, {"s": floats(3), "x": x})


def scanning(states: int, rows: int) -> object:
    """A body: each state plus the row; as many rows of the first state times the row, each one more."""
    made = [helper.make_node("Add", [f"state{i}", "row"], [f"next{i}"]) for i in range(states)]
    made.append(helper.make_node("Mul", ["next0", "row"] if states else ["row", "row"], ["out0"]))
    made += [helper.make_node("Add", [f"out{i - 1}", "row"], [f"out{i}"]) for i in range(1, rows)]
    return helper.make_graph(
        made, "body", [*(info(f"state{i}") for i in range(states)), info("row")],
        [*(info(f"next{i}") for i in range(states)), *(info(f"out{i}") for i in range(rows))],
    )  # fmt: skip


@pytest.mark.parametrize(("states", "rows"), [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("opset", [9, 21])
def test_scans_of_the_first_axis_forwards_where_nothing_is_said(states: int, rows: int, opset: int) -> None:
    names = [f"s{i}" for i in range(states)]
    nodes = Nodes({**dict.fromkeys(names, ("float32", (3,))), "x": ("float32", (4, 3))}, opset)
    outputs = nodes.many(
        "Scan", *names, "x", outputs=states + rows, body=scanning(states, rows), num_scan_inputs=1
    )  # fmt: skip
    compare(nodes, outputs, {**{name: floats(3) for name in names}, "x": floats(4, 3)})


@pytest.mark.parametrize("length", [5000, 0, "S"])
def test_a_scan_is_over_a_known_number_of_elements(length: int | str) -> None:
    nodes = Nodes({"s0": ("float32", (3,)), "x": ("float32", (length, 3))})
    outputs = nodes.many("Scan", "s0", "x", outputs=2, body=scanning(1, 1), num_scan_inputs=1)
    with pytest.raises(FrontendError, match=f"it runs over {length} elements; a known number from 1 to 4096"):
        nodes.graph(*outputs)


def test_a_scan_of_the_most_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.frontends.onnx.ops_control._MOST_STEPS", 4)
    nodes = Nodes({"s0": ("float32", (3,)), "x": ("float32", (4, 3))})
    outputs = nodes.many("Scan", "s0", "x", outputs=2, body=scanning(1, 1), num_scan_inputs=1)
    compare(nodes, outputs, {"s0": floats(3), "x": floats(4, 3)})


def looped(
    most: object, going: object, stop: float | None, rows: bool = True, shape: tuple[int, ...] = ()
) -> tuple[Nodes, list[str]]:
    """x = x * 2 + i, while it is below `stop` (None: what the loop is given), with a row of each step."""
    made = [
        helper.make_node("Cast", ["i"], ["step"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Add", ["twice", "step"], ["more"]),
    ]
    if stop is None:
        made.append(helper.make_node("Identity", ["going"], ["on"]))
    else:
        value = helper.make_tensor("value", TensorProto.FLOAT, [], [stop])
        made += [
            helper.make_node("Constant", [], ["limit"], value=value),
            helper.make_node("Less", ["more", "limit"], ["on"]),
        ]
    ends = [info("on", TensorProto.BOOL), info("more"), *([info("twice")] if rows else [])]
    body = helper.make_graph(
        made,
        "body",
        [info("i", TensorProto.INT64, 0), info("going", TensorProto.BOOL, 0), info("x", rank=len(shape))],
        ends,
    )
    nodes = Nodes({"a": ("float32", shape)})
    return nodes, nodes.many("Loop", most, going, "a", outputs=2 if rows else 1, body=body)


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("going", [None, True])
def test_loops_of_a_number_of_steps(most: int, going: bool | None) -> None:
    nodes, outputs = looped(np.int64(most), None if going is None else np.array(going), None)
    compare(nodes, outputs, {"a": np.float32(0.5)})


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 3)])
def test_rows_of_loops_come_first(shape: tuple[int, ...]) -> None:
    nodes, outputs = looped(np.int64(4), None, None, shape=shape)
    compare(nodes, outputs, {"a": floats(*shape)})


def chosen(then: list[object], other: list[object]) -> tuple[Nodes, str]:
    """One branch or the other by `flag`; each gives what its last node computes of x [3], i and a table [4, 3]."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [4, 3], np.arange(12, dtype=np.float32))
    graphs = {}
    for name, nodes in (("then_branch", then), ("else_branch", other)):
        last = nodes[-1].output[0]  # type: ignore[attr-defined]
        graphs[name] = helper.make_graph(nodes, name, [], [info(last)], [table])
    found = Nodes({"x": ("float32", (3,)), "i": ("int64", ()), "flag": ("bool", ())})
    return found, found.add("If", "flag", **graphs)


ROW = [helper.make_node("Gather", ["table", "i"], ["row"]), helper.make_node("Neg", ["row"], ["turned"])]
OWN = [helper.make_node("Abs", ["x"], ["own"])]


@pytest.mark.parametrize("first", [True, False])
def test_a_lookup_of_a_branch_that_is_not_taken_may_be_out_of_range(first: bool) -> None:
    nodes, output = chosen(ROW, OWN) if first else chosen(OWN, ROW)
    graph, x = nodes.graph(output), floats(3)
    for index, taken in ((2, True), (2, False), (99, False)):
        (found,) = evaluated(graph, {"x": x, "i": np.array(index), "flag": np.array(taken == first)})
        row = -np.arange(12, dtype=np.float32).reshape(4, 3)[index % 4]
        np.testing.assert_array_equal(found, row if taken else np.abs(x))


def test_a_lookup_around_a_branch_is_done_whatever_is_taken() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    nodes = Nodes({"x": ("float32", (3,)), "i": ("int64", ()), "flag": ("bool", ())})
    row = nodes.add("Gather", table, "i")
    graphs = [
        helper.make_graph([helper.make_node(op, [name], [op])], op, [], [info(op)])
        for op, name in (("Neg", row), ("Abs", "x"))
    ]
    graph = nodes.graph(nodes.add("If", "flag", then_branch=graphs[0], else_branch=graphs[1]))
    x = floats(3)
    for flag in (True, False):
        (found,) = evaluated(graph, {"x": x, "i": np.array(2), "flag": np.array(flag)})
        np.testing.assert_array_equal(found, -table[2] if flag else np.abs(x))
        with pytest.raises(IRError, match="out of"):
            evaluated(graph, {"x": x, "i": np.array(99), "flag": np.array(flag)})


def test_a_branch_may_have_weights_of_its_own() -> None:
    """Before its lookups, which are not done where the other branch is taken."""
    weights = Param("weights", Tensor((4, 3), "f32"))
    index, x, flag = Input("i", Tensor((), "i64")), Input("x", Tensor((3,), "f32")), Input("flag", Tensor((), "bool"))
    gather = Node("Gather", "", 21, "gather", ("weights", "i"), ("row",))
    then = Body((), ("row",), (gather,), {"weights": Item(weights)})
    other = Body((), ("x",), ())
    choice = Node("If", "", 21, "if", ("flag",), ("y",), {"then_branch": then, "else_branch": other})
    inputs = (index, x, flag)
    (item,) = Translation().run(Body((), ("y",), (choice,)), {value.name: Item(value) for value in inputs})
    graph = Graph("g", inputs, (("y", item.value),))
    table, row = floats(4, 3), floats(3)
    for place, taken in ((2, True), (2, False), (99, False)):
        given = {"i": np.array(place), "x": row, "flag": np.array(taken)}
        found = evaluate(graph, given, lambda name: table)["y"]
        np.testing.assert_array_equal(found, table[place] if taken else row)


@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.UINT8])
def test_branches_of_different_types_are_no_choice(kind: int) -> None:
    cast = [helper.make_node("Cast", ["x"], ["cast"], to=kind)]
    for branches in ((cast, OWN), (OWN, cast)):
        nodes, output = chosen(*branches)
        with pytest.raises(FrontendError, match="its condition is known only when running, and its branches differ"):
            nodes.graph(output)


@pytest.mark.parametrize("start", [0.1, 3.0, 20.0])
def test_loops_that_end_by_what_they_compute(start: float) -> None:
    nodes, outputs = looped(np.int64(6), np.array(True), 9.0, rows=False)
    compare(nodes, outputs, {"a": np.float32(start)})


@pytest.mark.parametrize("most", [0, 3, None])
def test_loops_that_never_run_keep_their_state(most: int | None) -> None:
    nodes, outputs = looped(None if most is None else np.int64(most), np.array(most == 0), None, rows=False)
    compare(nodes, outputs, {"a": np.float32(0.5)})


def test_a_loop_of_the_most_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.frontends.onnx.ops_control._MOST_STEPS", 8)
    nodes, outputs = looped(np.int64(8), np.array(True), None)
    compare(nodes, outputs, {"a": np.float32(0.5)})


@pytest.mark.parametrize(
    ("most", "going", "stop", "rows", "message"),
    [
        (None, np.array(True), None, False, "runs more than 8 times"),
        (np.int64(9), np.array(True), None, False, "runs more than 8 times"),
        (np.int64(0), np.array(True), None, True, "it never runs, and what it would give has no shape"),
        (np.int64(3), np.array(True), 9.0, True, "how many rows it gives is known only when running"),
        ("a", np.array(True), None, True, "how often it runs must be known"),
    ],
)
def test_loops_that_are_not_taken_apart(
    most: object, going: object, stop: float | None, rows: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.frontends.onnx.ops_control._MOST_STEPS", 8)
    nodes, outputs = looped(most, going, stop, rows)
    with pytest.raises(FrontendError, match=message):
        nodes.graph(*outputs)
