"""Sources of weights without a file, and the parts of weights that are stored as integers, as they are said."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import ScaleIntegers, UnpackNibbles
from llmc.compiler.ir.op import Param
from llmc.compiler.ir.structural import Transpose
from llmc.compiler.ir.types import Array, Tensor, dtype_of
from llmc.errors import FrontendError
from llmc.frontends.stored_integers import (
    Part,
    StoredIntegers,
    StoredWeights,
    keep_stored,
    stored_integers,
    stored_notes,
)
from llmc.frontends.weight_sources import ArrayWeights, LayeredWeights, RandomWeights


def test_random_weights_are_noise_for_matrices_and_ones_for_norms() -> None:
    shapes = {"w": (300, 200), "v": (300, 200), "norm.weight": (7,), "a.bias": (5,), "one": (), "three": (2, 3, 4)}
    found = RandomWeights(shapes)
    assert list(found.names) == list(shapes)
    for name, shape in shapes.items():
        assert found.load(name).shape == found.shape(name) == shape
        assert dtype_of(found.load(name).dtype) == found.dtype(name) == "f32"
    assert np.all(found.load("norm.weight") == 1) and np.all(found.load("a.bias") == 0) and found.load("one") == 1
    w = found.load("w")
    assert abs(w.mean()) < 0.001 and 0.0195 < w.std() < 0.0205 and len(np.unique(w)) > 50_000
    assert not np.array_equal(w, found.load("v"))
    np.testing.assert_array_equal(w, RandomWeights(shapes, seed=0).load("w"))
    assert not np.array_equal(w, RandomWeights(shapes, seed=1).load("w"))
    half = RandomWeights(shapes, "f16")
    assert half.dtype("w") == "f16" and np.array_equal(half.load("w"), w.astype(np.float16))
    assert half.load("norm.weight").dtype == np.float16


def test_large_random_weights_repeat_a_block_from_where_the_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomWeights, "_BLOCK", 100)
    found = RandomWeights(dict.fromkeys("abcd", (7, 37)), seed=3)
    block = np.random.default_rng(3).standard_normal(100, dtype=np.float32) * np.float32(0.02)
    for name in found.names:
        begin = zlib.crc32(f"3 {name}".encode()) % 100
        expected = np.resize(np.roll(block, -begin), 7 * 37).reshape(7, 37)
        np.testing.assert_array_equal(found.load(name), expected)


def test_of_two_sources_the_first_wins() -> None:
    upper = ArrayWeights({"a": np.zeros(2, np.float16), "b": np.ones(3, np.float32)})
    lower = ArrayWeights({"b": np.zeros((4, 4), np.int8), "c": np.arange(5)})
    both = LayeredWeights(upper, lower)
    assert both.names == ["a", "b", "c"]
    assert [both.dtype(name) for name in both.names] == ["f16", "f32", "i64"]
    assert [both.shape(name) for name in both.names] == [(2,), (3,), (5,)]
    assert both.load("b").tolist() == [1, 1, 1] and both.load("c").tolist() == [0, 1, 2, 3, 4]


def part(array: Array) -> Part:
    return Part(array.shape, dtype_of(array.dtype), lambda: array)


def weight(rows: int = 3, inputs: int = 8, bits: int = 4, block: int = 4, **changed: object) -> StoredIntegers:
    blocks = -(-inputs // block) if block else 1
    q = (np.arange(rows * inputs) % (1 << bits)).reshape(rows, inputs).astype(np.uint8)
    scales = np.arange(1, rows * blocks + 1).reshape(rows, blocks).astype(np.float32)
    given = {"q": part(q), "scales": part(scales), "zeros": None, "block": block, "bits": bits, "what": "test"}
    return StoredIntegers(**(given | changed))  # type: ignore[arg-type]


def test_shapes_and_bits_that_fit() -> None:
    for shape in ((3, 2), (1, 2)):
        array = np.ones(shape, np.float16)
        assert weight(scales=part(array), zeros=part(array)).dequantized().shape == (3, 8)
    for bits in (1, 8):
        assert weight(bits=bits).bits == bits
    wrong: list[tuple[dict[str, object], str]] = [
        ({"bits": 0}, "integers of 0 bits as u8"), ({"bits": 9, "q": weight().q}, "integers of 9 bits"),
        ({"scales": part(np.ones((0, 2), np.float32))}, r"scales are f32 \[0, 2\]"),
        ({"scales": part(np.ones((3, 2), np.int32))}, r"scales are i32 .* in blocks of 4 they are floats \[3, 2\]"),
        ({"block": 0}, r"in blocks of 8 they are floats \[3, 1\]"),
        ({"zeros": part(np.ones((0, 2), np.float32))}, r"zero points are f32 \[0, 2\], not \[3, 2\]"),
    ]  # fmt: skip
    for changed, said in wrong:
        with pytest.raises(FrontendError, match=said):
            StoredIntegers(**{**vars(weight()), **changed})


@pytest.mark.parametrize(
    ("block", "scales"), [(4, (3, 2)), (4, (1, 2)), (0, (3, 1)), (0, (1, 1)), (8, (3, 1)), (3, (3, 3))]
)
def test_each_scale_is_for_its_block(block: int, scales: tuple[int, int]) -> None:
    array = np.arange(2, 2 + np.prod(scales), dtype=np.float32).reshape(scales)
    stored = weight(block=block, scales=part(array), zeros=part(array - 1))
    q = stored.q.load().astype(np.float32)
    for row in range(3):
        for column in range(8):
            scale = array[row % scales[0], column // block if block else 0]
            assert stored.dequantized()[row, column] == (q[row, column] - (scale - 1)) * scale


def kept(stored: StoredIntegers, dtype: str = "f32", turned: bool = False) -> tuple[Graph, list[str]]:
    """A graph with two params, of which the second is stored, and which params it has then."""
    shape = stored.shape[::-1] if turned else stored.shape
    first, second = Param("a", Tensor((2, 2), "f32")), Param("w", Tensor(shape, dtype))
    given = Graph("g", (), (("a", first), ("w", second)))
    source = ArrayWeights({"a": np.zeros((2, 2), np.float32)})
    graph, both = keep_stored(given, source, {"w": stored}, ["w"] if turned else [])
    for param in graph.params:
        array = both.load(param.name)
        assert (dtype_of(array.dtype), array.shape) == (param.dtype, param.shape)
        assert (both.dtype(param.name), both.shape(param.name)) == (param.dtype, param.shape)
    return graph, [param.name for param in graph.params]


def test_how_a_stored_weight_is_written_in_a_graph() -> None:
    graph, names = kept(weight())
    assert set(names) == {"a", "w.q", "w.scales"}
    scaled = dict(graph.outputs)["w"]
    assert isinstance(scaled, ScaleIntegers) and isinstance(scaled.operands[0], UnpackNibbles)
    # Half bytes only for 4 bits, without a sign, of an even count of inputs.
    signed = weight(q=part(np.zeros((3, 8), np.int8)))
    for other in (weight(bits=3), weight(bits=5), weight(inputs=7), signed):
        assert not [op for op in kept(other)[0].ops if isinstance(op, UnpackNibbles)]
    assert not [op for op in kept(weight())[0].ops if isinstance(op, Cast)]
    halves = weight(scales=part(np.ones((3, 2), np.float16)))
    doubles = weight(scales=part(np.ones((3, 2), np.float64)))
    for other in (halves, doubles):
        assert [op.dtype for op in kept(other)[0].ops if isinstance(op, Cast)] == ["f32"]
        assert [op.scales.dtype for op in kept(other)[0].ops if isinstance(op, ScaleIntegers)] == ["f32"]
    for dtype in ("f16", "bf16", "f64"):
        assert [op.dtype for op in kept(weight(), dtype)[0].ops if isinstance(op, Cast)] == [dtype]
    graph, _ = kept(weight(), turned=True)
    assert [op.shape for op in graph.ops if isinstance(op, Transpose)] == [(8, 3)]
    for zero, dtype in ((1, "u8"), (8, "u8"), (-1, "i8")):
        (op,) = (op for op in kept(weight(zeros=zero))[0].ops if isinstance(op, ScaleIntegers))
        assert op.operands[2].dtype == dtype
    graph = Graph("g", (), (("a", Param("a", Tensor((2, 2), "f32"))),))
    source = ArrayWeights({})
    assert keep_stored(graph, source, {"w": weight()}) == (graph, source)


def test_what_a_source_says_of_integers() -> None:
    stored = weight()
    assert stored_integers(StoredWeights(ArrayWeights({}), {"w": stored}, {}, []), "w") is stored
    assert stored_integers(ArrayWeights({"w": np.zeros(2)}), "w") is None


def test_a_part_has_the_shape_that_it_is_said_to_have() -> None:
    wrong = weight(scales=Part((3, 2), "f32", lambda: np.ones((3, 1), np.float32)))
    with pytest.raises(FrontendError, match=r"weight w: w\.scales is \[3, 1\], expected \[3, 2\]"):
        kept(wrong)


def test_notes_name_each_kind_once() -> None:
    one = weight(block=0, scales=part(np.ones((1, 1), np.float32)))
    each, blocks = weight(block=0), weight()
    shared = weight(scales=part(np.ones((1, 2), np.float32)))
    ordered = weight(order=part(np.arange(8, dtype=np.int32)))
    notes = stored_notes([one, each, blocks, shared, ordered])
    kinds = ["one scale", "a scale for each output", "blocks of 4 inputs", "blocks of 4 inputs, inputs in an order of"]
    assert len(notes) == 4
    for note, kind, count in zip(notes, kinds, ("1 weight", "1 weight", "2 weights", "1 weight"), strict=True):
        assert note.startswith(f"{count} of the checkpoint are integers: test, {kind}")
