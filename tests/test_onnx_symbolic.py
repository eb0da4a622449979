"""Shape arithmetic of ONNX graphs: what is known of it when compiling is what onnxruntime computes, for every size."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto
from onnx_graphs import Nodes, compare, evaluated

from llmc.compiler.ir.dims import Dim, concrete
from llmc.errors import FrontendError

SIZES = ((1, 2), (1, 7), (3, 1), (2, 33), (5, 64))
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def start(**more: tuple[str, tuple[int | str, ...]]) -> Nodes:
    return Nodes({"x": ("float32", ("B", "S", 8)), **more})


def size(nodes: Nodes, axis: int, of: str = "x") -> str:
    """One size of a tensor as exporters ask for it: a scalar."""
    return nodes.add("Gather", nodes.add("Shape", of), np.int64(axis))


def row(nodes: Nodes, *sizes: object) -> str:
    """Sizes as a shape: each a vector of one, joined."""
    parts = [nodes.add("Unsqueeze", s, [0]) if isinstance(s, str) else np.array([s], np.int64) for s in sizes]
    return nodes.add("Concat", *parts, axis=0)


def split_heads(n: Nodes) -> str:
    shape = row(n, size(n, 0), size(n, 1), 2, -1)
    return n.add("Transpose", n.add("Reshape", "x", shape), perm=[0, 2, 1, 3])


def expand_with_minus_one(n: Nodes) -> str:
    """torch's expand(-1, S, -1, -1): -1 keeps the size, which the exporter writes as a choice."""
    target = row(n, -1, size(n, 1), -1, -1)
    ones = n.add("ConstantOfShape", [4], value=_tensor(1))
    chosen = n.add("Where", n.add("Equal", target, np.array([-1], np.int64)), ones, target)
    return n.add("Expand", n.add("Unsqueeze", n.add("ReduceSum", "x", [1], keepdims=0), [1, 3]), chosen)


def _tensor(value: int) -> TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array([value], np.int64))


def positions(n: Nodes) -> str:
    return n.add("Unsqueeze", n.add("Range", np.int64(0), size(n, 1), np.int64(1)), [0])


def shifted_positions(n: Nodes) -> str:
    length = size(n, 1)
    twice = n.add("Mul", length, np.int64(2))
    return n.add("Range", length, n.add("Sub", twice, np.int64(0)), np.int64(1))


def causal_mask(n: Nodes) -> str:
    length = size(n, 1)
    square = n.add("Expand", np.float32(1), row(n, length, length))
    return n.add("Trilu", square, np.int64(0), upper=0)


def last_token(n: Nodes) -> str:
    end = n.add("Sub", size(n, 1), np.int64(1))
    stop = n.add("Add", end, np.int64(1))
    return n.add("Slice", "x", n.add("Unsqueeze", end, [0]), n.add("Unsqueeze", stop, [0]), np.array([1]))


def scaled_by_root(n: Nodes) -> str:
    """Attention's scale as TorchScript writes it: from the shape, through floats."""
    width = n.add("Slice", n.add("Shape", "x"), np.array([-1]), np.array([2**63 - 1]))
    root = n.add("Sqrt", n.add("Cast", width, to=FLOAT))
    return n.add("Div", "x", root)


def flattened(n: Nodes) -> str:
    rows = n.add("Mul", size(n, 0), size(n, 1))
    flat = n.add("Reshape", "x", row(n, rows, 8))
    return n.add("Reshape", flat, row(n, size(n, 0), size(n, 1), -1))


def back_from_floats(n: Nodes) -> str:
    """A size that was doubled as a float, as upsampling writes it."""
    doubled = n.add("Floor", n.add("Mul", n.add("Cast", size(n, 1), to=FLOAT), np.float32(2)))
    return n.add("ConstantOfShape", row(n, n.add("Cast", doubled, to=INT64)))


def product_of_all(n: Nodes) -> str:
    total = n.add("ReduceProd", n.add("Shape", "x"), keepdims=1)
    return n.add("Reshape", "x", total)


def written_into_a_shape(n: Nodes) -> str:
    """A shape of which one size is replaced in place."""
    shape = n.add("ScatterND", n.add("Shape", "x"), np.array([[2]]), np.array([1]))
    return n.add("Expand", np.float32(3), shape)


def half_of_it(n: Nodes) -> str:
    """x.chunk(2, -1) and rotate_half, with sizes from the shape."""
    half = n.add("Div", size(n, 2), np.int64(2))
    first = n.add("Slice", "x", np.array([0]), n.add("Unsqueeze", half, [0]), np.array([2]))
    second = n.add("Slice", "x", n.add("Unsqueeze", half, [0]), np.array([2**63 - 1]), np.array([2]))
    return n.add("Concat", n.add("Neg", second), first, axis=-1)


def reversed_tokens(n: Nodes) -> str:
    return n.add("Slice", "x", np.array([-1]), np.array([-(2**63) + 1]), np.array([1]), np.array([-1]))


def decided_branch(n: Nodes) -> str:
    """At least one token is there, whatever its size: the maximum of S and 1 is S."""
    return n.add(
        "ConstantOfShape", row(n, n.add("Max", size(n, 1), np.int64(1)), n.add("Min", size(n, 0), np.int64(64)))
    )


def padded_by_a_size(n: Nodes) -> str:
    return n.add("Pad", "x", row(n, 0, size(n, 1), 0, 0, 0, 0))


def windows_of_two(n: Nodes) -> str:
    """S // 2 pairs, one odd token left out."""
    pairs = n.add("Div", size(n, 1), np.int64(2))
    even = n.add("Mul", pairs, np.int64(2))
    kept = n.add("Slice", "x", np.array([0]), n.add("Unsqueeze", even, [0]), np.array([1]))
    return n.add("Reshape", kept, row(n, size(n, 0), pairs, 2, 8))


IDIOMS: tuple[Callable[[Nodes], str], ...] = (
    split_heads, expand_with_minus_one, positions, shifted_positions, causal_mask, last_token, scaled_by_root,
    flattened, back_from_floats, product_of_all, written_into_a_shape, half_of_it, reversed_tokens, decided_branch,
    padded_by_a_size, windows_of_two,
)  # fmt: skip


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom.__name__)
def test_idioms_of_exporters_hold_for_every_size(idiom: Callable[[Nodes], str]) -> None:
    nodes = start()
    output = idiom(nodes)
    graph, runtime = nodes.graph(output), nodes.runtime(output)
    for batch, tokens in SIZES:
        x = np.random.default_rng(tokens).standard_normal((batch, tokens, 8)).astype(np.float32)
        expected = runtime.run(None, {"x": x})[0] if any(v.name == "x" for v in runtime.get_inputs()) else None
        (found,) = evaluated(graph, {"x": x})
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert tuple(concrete(d, {"B": batch, "S": tokens}) for d in graph.outputs[0][1].shape) == expected.shape


def random_arithmetic(nodes: Nodes, rng: random.Random, steps: int) -> list[str]:
    """Vectors of sizes, each made of earlier ones. No divisor is zero, so that onnxruntime computes all of them."""
    vectors = [nodes.add("Shape", "x"), nodes.add("Shape", "y")]
    for _ in range(steps):
        a, b = rng.choice(vectors), rng.choice(vectors)
        number = np.array([rng.randint(1, 5)], np.int64)
        kind = rng.randrange(13)
        if kind < 3:
            made = nodes.add(
                ("Add", "Sub", "Mul")[kind], nodes.add("Slice", a, [0], [1]), nodes.add("Slice", b, [-1], [9])
            )
        elif kind == 3:
            made = nodes.add(
                "Concat", nodes.add("Gather", a, np.array([0, -1])), nodes.add("Slice", b, [0], [2]), axis=0
            )
        elif kind == 4:
            made = nodes.add("Div", nodes.add("Abs", a), number)
        elif kind == 5:
            made = nodes.add("Max", a, number)
        elif kind == 6:
            made = nodes.add("Min", a, number)
        elif kind == 7:
            made = nodes.add("Where", nodes.add("Equal", a, number), a, nodes.add("Neg", a))
        elif kind == 8:
            made = nodes.add(("ReduceProd", "ReduceSum")[rng.randrange(2)], a, keepdims=1)
        elif kind == 9:
            made = nodes.add("Cast", nodes.add("Cast", a, to=FLOAT), to=INT64)
        elif kind == 10:
            made = nodes.add("Mod", nodes.add("Abs", a), number)
        elif kind == 11:
            made = nodes.add("Slice", a, [-1], [-99], [0], [-1])
        else:
            made = nodes.add("Squeeze", nodes.add("Unsqueeze", nodes.add("CumSum", a, np.int64(0)), [0]), [0])
        vectors.append(made)
    return vectors


@pytest.mark.parametrize("seed", range(25))
def test_what_is_known_of_random_arithmetic_is_right(seed: int) -> None:
    """Small sizes: products of them stay far from where floats of 32 bits, which some steps go through, round."""
    nodes = start(y=("float32", ("S", 3)))
    outputs = random_arithmetic(nodes, random.Random(seed), 8)
    items, _ = nodes.items(*outputs)
    graph, runtime = nodes.graph(*outputs), nodes.runtime(*outputs)
    for batch, tokens in ((1, 2), (3, 1), (2, 5)):
        arrays = {"x": np.zeros((batch, tokens, 8), np.float32), "y": np.zeros((tokens, 3), np.float32)}
        expected = runtime.run(None, arrays)
        for item, own, other in zip(items, evaluated(graph, arrays), expected, strict=True):
            np.testing.assert_array_equal(own, other)
            if item.known is not None:
                binding = {"B": batch, "S": tokens}
                known = [concrete(x, binding) if isinstance(x, Dim) else x for x in item.known.flat]
                np.testing.assert_array_equal(np.reshape(known, item.known.shape), other)


def test_elements_of_a_mask_of_ones_are_ones() -> None:
    """An attention mask of one sequence is nothing but ones, however it is indexed."""
    nodes = start(i=("int64", ("S", 2)))
    mask = nodes.add("Expand", np.array(True), row(nodes, size(nodes, 0), size(nodes, 1)))
    first, second = nodes.add("GatherND", mask, "i"), nodes.add("Gather", mask, "i", axis=1)
    assert [op.name for op in nodes.graph(first).ops] == ["t.constant", "t.broadcast"]
    assert [op.name for op in nodes.graph(second).ops] == ["t.constant", "t.broadcast"]
    arrays = {"x": np.zeros((2, 5, 8), np.float32), "i": np.array([[0, 1], [1, 4], [1, 0], [0, 0], [1, 1]])}
    compare(nodes, [first, second], arrays)


def test_plain_shape_arithmetic_is_known_not_computed() -> None:
    """None of the idioms but those over x itself leaves an op on integers in the graph, but for positions."""
    nodes = start()
    output = split_heads(nodes)
    assert [op.name for op in nodes.graph(output).ops] == ["t.reshape", "t.transpose"]


@pytest.mark.parametrize(
    ("op", "number"), [("Min", 7), ("Max", 7), ("Equal", 7), ("Less", 7), ("GreaterOrEqual", 64)], ids=str
)
def test_what_depends_on_the_size_is_computed_not_guessed(op: str, number: int) -> None:
    nodes = start()
    output = nodes.add(op, size(nodes, 1), np.int64(number))
    (item,), _ = nodes.items(output)
    assert item.known is None
    for batch, tokens in SIZES:
        compare(nodes, [output], {"x": np.zeros((batch, tokens, 8), np.float32)})


@pytest.mark.parametrize(("op", "number", "known"), [("Less", 65, True), ("Equal", 0, False), ("Greater", 64, False)])
def test_what_every_size_settles_is_known(op: str, number: int, known: bool) -> None:
    nodes = start()
    (item,), _ = nodes.items(nodes.add(op, size(nodes, 1), np.int64(number)))
    assert item.known is not None
    assert item.known.item() is known


def test_a_shape_that_is_not_known_is_one_clear_error() -> None:
    nodes = Nodes({"x": ("float32", (4, 6)), "shape": ("int64", (2,))})
    with pytest.raises(FrontendError, match=r"^Reshape \(node_0\) cannot be translated: .*'shape' must be known"):
        nodes.graph(nodes.add("Reshape", "x", "shape"))


def test_a_table_that_may_be_too_short_says_what_to_do() -> None:
    nodes = start()
    length = nodes.add("Unsqueeze", size(nodes, 1), [0])
    output = nodes.add("Slice", np.zeros((1, 32), np.float32), np.array([0]), length, np.array([1]))
    with pytest.raises(FrontendError, match=r"Slice \(node_3\).*whether S is within an axis of 32.*--max-dim"):
        nodes.graph(output)
