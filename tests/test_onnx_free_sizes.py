"""Sizes that a file leaves free and its graph does not: found equal, found large enough, or made numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_harness import CACHE
from onnx import TensorProto, helper
from onnx_files import value as typed
from onnx_graphs import Nodes
from test_cli import run

import llmc
from llmc.compiler.ir.dims import bounds
from llmc.compiler.ir.evaluate import evaluate
from llmc.errors import CompileError, FrontendError, LlmcError, RuntimeStateError
from llmc.frontends import lift
from llmc.frontends.lifted import Lifted
from llmc.runtime.runtime import Runtime

Shapes = Mapping[str, Sequence[int | str | None]]
Builder = Callable[[Nodes], str]


def write(path: Path, shapes: Shapes, build: Builder) -> Path:
    """A graph of float inputs. A size of None is one that the file does not name."""
    nodes = Nodes({name: ("f4", shape) for name, shape in shapes.items()})  # type: ignore[misc]
    model = nodes.model(build(nodes))
    del model.graph.input[:]
    model.graph.input.extend(typed(name, shape) for name, shape in shapes.items())
    onnx.save(model, path)
    return path


def same_as_onnxruntime(path: Path, lifted: Lifted, *sizes: Mapping[str, tuple[int, ...]]) -> None:
    """The lifted graph gives what onnxruntime gives for inputs of these shapes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for shapes in sizes:
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        (expected,) = session.run(None, arrays)
        found = evaluate(lifted.graph, arrays, lifted.weights.load)
        (result,) = (np.asarray(array) for array in found.values())
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def ranges(lifted: Lifted) -> dict[str, tuple[int, int | None]]:
    return {symbol.name: (symbol.low, symbol.high) for symbol in lifted.graph.symbols}


W = np.arange(15, dtype=np.float32).reshape(5, 3)
EQUAL: dict[str, tuple[Shapes, Builder]] = {
    "add": ({"a": ["n1", 3], "b": ["n2", 3]}, lambda g: g.add("Add", "a", "b")),
    "unnamed": ({"a": [None, 3], "b": [None, 3]}, lambda g: g.add("Add", "a", "b")),
    "concat": ({"a": ["unk__1", 3], "b": ["unk__2", 3]}, lambda g: g.add("Concat", "a", "b", axis=1)),
    "matmul": ({"a": [3, "k1"], "b": ["k2", 3]}, lambda g: g.add("MatMul", "a", "b")),
    "batched matmul": ({"a": ["n1", 3, 3], "b": ["n2", 3, 3]}, lambda g: g.add("MatMul", "a", "b")),
    "where": ({"a": ["n1", 3], "b": ["n2", 3]}, lambda g: g.add("Where", g.add("Less", "a", "b"), "a", "b")),
    "shifted": (
        {"a": ["n1", 3], "b": ["n2", 3]},
        lambda g: g.add("Add", *(g.add("Pad", x, np.array([1, 0, 2, 0])) for x in ("a", "b"))),
    ),
    "doubled": (
        {"a": ["n1", 3], "b": ["n2", 3]},
        lambda g: g.add("Add", *(g.add("Concat", x, x, axis=0) for x in ("a", "b"))),
    ),
    "halved": (
        {"a": ["n1", 3], "b": ["n2", 3]},
        lambda g: g.add("Add", *(g.add("Slice", x, [0], [1 << 40], [0], [2]) for x in ("a", "b"))),
    ),
    "reshaped": (
        {"a": ["n1", 3], "b": ["n2", 3]},
        lambda g: g.add("Reshape", "a", g.add("Shape", g.add("Transpose", "b", perm=[1, 0]))),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_sizes_that_must_be_equal_are_one(name: str, tmp_path: Path) -> None:
    shapes, build = EQUAL[name]
    path = write(tmp_path / "model.onnx", shapes, build)
    lifted = lift(path)
    assert len(ranges(lifted)) == 1
    assert any("have to be equal" in note for note in lifted.notes)
    sizes = [{key: tuple(d if isinstance(d, int) else n for d in shape) for key, shape in shapes.items()}
             for n in (1, 2, 7)]  # fmt: skip
    same_as_onnxruntime(path, lifted, *sizes)


def test_three_sizes_become_one(tmp_path: Path) -> None:
    shapes = {"a": ["x", 3], "b": ["y", 3], "c": ["z", 3]}
    path = write(tmp_path / "model.onnx", shapes, lambda g: g.add("Add", g.add("Add", "b", "c"), "a"))
    lifted = lift(path)
    assert ranges(lifted) == {"x": (1, 1024)} and len(lifted.notes) == 1
    same_as_onnxruntime(path, lifted, dict.fromkeys(shapes, (5, 3)))
    assert ranges(lift(path, max_dims={"y": 7, "z": 9})) == {"x": (1, 7)}
    assert ranges(lift(path, dims={"z": 4})) == {}
    with pytest.raises(FrontendError, match="do not broadcast"):
        lift(path, dims={"y": 3, "z": 4})


@pytest.mark.parametrize(
    ("build", "number"),
    [
        (lambda g: g.add("Concat", "a", W, axis=1), 5),
        (lambda g: g.add("MatMul", g.add("Transpose", "a", perm=[1, 0]), W), 5),
        (lambda g: g.add("Reshape", "a", np.array([2, 9])), 6),
        (lambda g: g.add("Reshape", g.add("Concat", "a", "a", axis=0), np.array([1, 12])), 2),
        (lambda g: g.add("Squeeze", "a", np.array([0])), 1),
    ],
)
def test_a_size_that_can_be_one_number_only_is_that(build: Builder, number: int, tmp_path: Path) -> None:
    """khmersm's batch: free in the input, 1 in a Reshape."""
    path = write(tmp_path / "model.onnx", {"a": ["n", 3]}, build)
    lifted = lift(path)
    assert ranges(lifted) == {} and lifted.graph.inputs[0].shape == (number, 3)
    assert lifted.notes == (f"the size n has to be {number}",)
    same_as_onnxruntime(path, lifted, {"a": (number, 3)})


def test_two_sizes_that_are_numbers_are_told_in_order(tmp_path: Path) -> None:
    other = np.ones((5, 3, 7), np.float32)
    path = write(tmp_path / "model.onnx", {"a": ["n", 3, "m"]}, lambda g: g.add("Concat", "a", other, axis=1))
    lifted = lift(path)
    assert lifted.notes == ("the size n has to be 5", "the size m has to be 7")
    same_as_onnxruntime(path, lifted, {"a": (5, 3, 7)})


# What no size, or more than one, could mend: nothing is decided then, and all of it is said.
UNSETTLED: dict[str, tuple[Shapes, Builder, str]] = {
    "two added and one doubled": (
        {"a": ["n1", 3], "b": ["n2", 3], "c": ["n3", 3]},
        lambda g: g.add("Add", g.add("Concat", "a", "b", axis=0), g.add("Concat", "c", "c", axis=0)),
        r"n1 \(1 to 1024\), n2 \(1 to 1024\), n3 \(1 to 1024\)",
    ),
    "one doubled": (
        {"a": ["n1", 3], "b": ["n2", 3]},
        lambda g: g.add("Add", g.add("Concat", "a", "a", axis=0), "b"),
        r"n1 \(1 to 1024\), n2 \(1 to 1024\)",
    ),
    "a square": ({"a": ["n", "n"]}, lambda g: g.add("Reshape", "a", np.array([4])), r"n \(1 to 8\)"),
    "an odd number doubled": (
        {"a": ["n", 3]}, lambda g: g.add("Add", g.add("Concat", "a", "a", axis=0), W), r"n \(1 to 8\)"
    ),
    "none of it": (
        {"a": ["n", 3]}, lambda g: g.add("Add", g.add("Concat", "a", W, axis=0), W), r"n \(1 to 8\)"
    ),
    "after two that are one": (
        {"a": ["n1", 3], "b": ["n2", 3]},
        lambda g: g.add("Resize", g.add("Add", "a", "b"), None, np.float32([2, 1]), mode="linear"),
        r"n1 \(1 to 1024\)",
    ),
    "beside one that is a number": (
        {"a": ["n", 3], "b": ["m", 3]},
        lambda g: g.add("Resize", g.add("MatMul", g.add("Transpose", W, perm=[1, 0]), "a"), None,
                        g.add("Cast", g.add("Slice", g.add("Shape", "b"), [0], [2], [0]), to=1), mode="linear"),
        r"m \(1 to 1024\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSETTLED)
def test_sizes_that_nothing_settles_are_listed_once_each(name: str, tmp_path: Path) -> None:
    shapes, build, listed = UNSETTLED[name]
    path = write(tmp_path / "model.onnx", shapes, build)
    with pytest.raises(FrontendError, match=rf"\. Free sizes of the inputs are {listed}: --dim NAME=N makes one a"):
        lift(path)


def test_what_nothing_settles_may_be_said(tmp_path: Path) -> None:
    shapes, build, _ = UNSETTLED["two added and one doubled"]
    path = write(tmp_path / "model.onnx", shapes, build)
    same_as_onnxruntime(path, lift(path, dims={"n1": 1, "n2": 3}), {"a": (1, 3), "b": (3, 3), "c": (2, 3)})


@pytest.mark.parametrize("most", [4, 5, 6])
def test_a_size_is_no_number_beyond_what_was_asked(most: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", {"a": ["n", 3]}, lambda g: g.add("Concat", "a", W, axis=1))
    if most < len(W):
        with pytest.raises(FrontendError, match=r"n \(1 to 4\)"):
            lift(path, max_dims={"n": most})
    else:
        assert lift(path, max_dims={"n": most}).graph.inputs[0].shape == (5, 3)


ROOM: dict[str, tuple[Builder, int]] = {
    "max pool": (lambda g: g.add("MaxPool", "a", kernel_shape=[5]), 5),
    "average pool": (lambda g: g.add("AveragePool", "a", kernel_shape=[3], strides=[2], pads=[1, 0]), 2),
    "pools one after another": (
        lambda g: g.add("MaxPool", g.add("MaxPool", "a", kernel_shape=[3], strides=[2]), kernel_shape=[3], strides=[2]),
        7,
    ),
    "conv": (lambda g: g.add("Conv", "a", np.ones((4, 3, 9), np.float32)), 9),
    "reflect": (lambda g: g.add("Pad", "a", np.array([0, 0, 3, 0, 0, 2]), mode="reflect"), 4),
    "wrap": (lambda g: g.add("Pad", "a", np.array([0, 0, 3, 0, 0, 2]), mode="wrap"), 3),
    "edge": (lambda g: g.add("Pad", "a", np.array([0, 0, 3, 0, 0, 2]), mode="edge"), 1),
    "top k": (lambda g: g.many("TopK", "a", np.array([4]), axis=2, outputs=2)[0], 4),
}


@pytest.mark.parametrize("name", ROOM)
def test_a_size_has_to_leave_room(name: str, tmp_path: Path) -> None:
    """What does not fit into tiny inputs is compiled for the others."""
    build, least = ROOM[name]
    path = write(tmp_path / "model.onnx", {"a": ["batch", 3, "steps"]}, build)
    lifted = lift(path)
    assert ranges(lifted) == {"batch": (1, 8), "steps": (least, 1024)}
    same_as_onnxruntime(path, lifted, *({"a": (2, 3, n)} for n in (least, least + 1, 31, 33)))


NUMBERS: dict[str, Builder] = {
    "resize": lambda g: g.add("Resize", "a", None, np.array([1, 1, 2], np.float32), mode="linear"),
    "ceil": lambda g: g.add("MaxPool", "a", kernel_shape=[3], strides=[2], ceil_mode=1),
    "lstm": lambda g: g.many(
        "LSTM", g.add("Transpose", "a", perm=[2, 0, 1]), np.ones((1, 20, 3), np.float32),
        np.ones((1, 20, 5), np.float32), hidden_size=5, outputs=3,
    )[0],
    "squeeze": lambda g: g.add("Squeeze", g.add("MaxPool", "a", kernel_shape=[3], strides=[11]), np.array([2])),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_what_needs_a_number_says_how_to_give_it(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", {"a": ["batch", 3, "steps"]}, NUMBERS[name])
    with pytest.raises(FrontendError, match=r"batch \(1 to 8\), steps \([13] to 1024\): --dim NAME=N makes one a"):
        lift(path)
    lifted = lift(path, dims={"steps": 12})
    assert ranges(lifted) == {"batch": (1, 8)}
    same_as_onnxruntime(path, lifted, {"a": (1, 3, 12)}, {"a": (3, 3, 12)})


def test_what_is_refused_without_free_sizes_says_nothing_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", {"a": [2, 3]}, lambda g: g.add("Add", "a", W))
    with pytest.raises(FrontendError, match=r"do not broadcast$"):
        lift(path)


def test_sizes_that_there_are_none_of(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", {"a": ["n", 3]}, lambda g: g.add("Relu", "a"))
    with pytest.raises(FrontendError, match=r"--dim: the model has no size 'm': its free sizes are n"):
        lift(path, dims={"m": 3})
    with pytest.raises(FrontendError, match="n is a number by --dim: leave --max-dim n away"):
        lift(path, dims={"n": 3}, max_dims={"n": 4})
    two = write(tmp_path / "two.onnx", {"a": ["n", "m"]}, lambda g: g.add("Relu", "a"))
    with pytest.raises(FrontendError, match="m is a number by --dim: leave --max-dim m away"):
        lift(two, dims={"n": 3, "m": 3}, max_dims={"n": 4, "m": 4})
    with pytest.raises(FrontendError, match=r"window of 5 does not fit into steps elements.*steps \(1 to 4\)"):
        lift(write(path, {"a": ["batch", 3, "steps"]}, ROOM["max pool"][0]), max_dims={"steps": 4})


@pytest.mark.parametrize("option", ["dims", "max_dims"])
def test_the_greatest_size(option: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", {"a": ["n", 3]}, lambda g: g.add("Relu", "a"))
    size = lift(path, **{option: {"n": 1 << 31}}).graph.inputs[0].shape[0]  # type: ignore[arg-type]
    assert bounds(size)[1] == 1 << 31
    with pytest.raises(FrontendError, match=r"n is 2147483649: it must be within 1..2147483648"):
        lift(path, **{option: {"n": (1 << 31) + 1}})  # type: ignore[arg-type]


def test_names_of_sizes_are_short_words_of_their_own(tmp_path: Path) -> None:
    names = ["a b", "a.b", "a-b", "x" * 47, "x" * 48, "x" * 49, "x" * 50, "7 up", "\u00e9"]
    path = write(tmp_path / "model.onnx", {"a": names}, lambda g: g.add("Relu", "a"))  # type: ignore[dict-item]
    expected = ["a_b", "a_b_2", "a_b_3", "x" * 47, "x" * 48, "x" * 48 + "_2", "x" * 48 + "_3", "size_7_up", "size"]
    assert [str(size) for size in lift(path).graph.inputs[0].shape] == expected


@pytest.mark.parametrize("option", ["--dim", "--max-dim"])
def test_a_model_of_texts_has_no_such_sizes(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parent.parent / "examples" / "pycoder"
    status, out, err = run(capfd, "estimate", example, option, "batch=2")
    assert (status, out) == (1, "") and "--max-context bounds it" in err


@pytest.mark.parametrize("name", ["input_features", "pixel_values", "input_values", "encoder_hidden_states", "mel",
                                  "decoder_inputs_embeds", "audio_values"])  # fmt: skip
def test_no_input_is_refused_for_its_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", {name: [1, 8, 20]}, lambda g: g.add("Relu", name))
    same_as_onnxruntime(path, lift(path), {name: (1, 8, 20)})


def test_part_of_an_encoder_decoder_is_a_graph_of_arrays(tmp_path: Path) -> None:
    """Beside `input_ids` too; a note says that it is not taken as text."""
    inputs = [typed("input_ids", ["batch", "length"], TensorProto.INT64),
              typed("encoder_hidden_states", ["batch", "source", 4])]  # fmt: skip
    table = onnx.numpy_helper.from_array(np.arange(40, dtype=np.float32).reshape(10, 4), "table")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceMean", ["encoder_hidden_states"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Add", ["rows", "mean"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [typed("y", ["batch", "length", 4])], [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    lifted = lift(tmp_path / "m.onnx")
    assert lifted.task == "run" and "encoder_hidden_states" in lifted.notes[0]


# The whole way


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tf2onnx writes models of two inputs; a window on top."""
    folder = tmp_path_factory.mktemp("two")
    return write(
        folder / "two.onnx",
        {"a": ["unk__330", 3, "steps"], "b": ["unk__331", 3, "steps"]},
        lambda g: g.add("MaxPool", g.add("Concat", "a", "b", axis=1), kernel_shape=[3]),
    )


def test_what_was_believed_is_checked_when_running(two: Path, tmp_path: Path) -> None:
    path = two.with_suffix(".so")
    llmc.compile(two, path, dtype="f32", kernel_cache=CACHE)
    runtime = Runtime.load(path, threads=1)
    rng = np.random.default_rng(0)

    def given(rows_a: int, rows_b: int, steps: int) -> dict[str, np.ndarray]:
        return {"a": rng.standard_normal((rows_a, 3, steps)).astype(np.float32),
                "b": rng.standard_normal((rows_b, 3, steps)).astype(np.float32)}  # fmt: skip

    session = onnxruntime.InferenceSession(str(two), providers=["CPUExecutionProvider"])
    for rows, steps in ((1, 3), (7, 31), (33, 129)):
        arrays = given(rows, rows, steps)
        (expected,) = session.run(None, arrays)
        np.testing.assert_array_equal(next(iter(runtime.run(arrays).values())), expected)
    with pytest.raises(RuntimeStateError, match="unk__330 is 2 in a and 3 in b: they must be equal"):
        runtime.run(given(2, 3, 5))
    with pytest.raises(RuntimeStateError, match="steps is 2 in a, and must be at least 3"):
        runtime.run(given(2, 2, 2))


def test_a_number_on_the_command_line_and_by_keyword(
    two: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.so"
    status, out, _ = run(capfd, "compile", two, "-q", "none", "--dim", "unk__331=2", "--dim", "steps=5", "-o", path)
    assert status == 0
    assert "a float32 [2, 3, 5]" in out and "sizes:" not in out
    status, out, _ = run(capfd, "ir", two, "--after", "lift", "--dim", "steps=5", "--json")
    assert status == 0 and "tensor<[unk__330, 3, 5], f32>" in json.loads(out)["text"]
    status, out, _ = run(capfd, "estimate", two, "--dim", "steps=5", "--json")
    assert status == 0 and json.loads(out)["arena"] >= 0
    with pytest.raises(LlmcError, match="--dim: the model has no size 'stepz'"):
        llmc.compile(two, path, dims={"stepz": 5})


@pytest.mark.parametrize("text", ["steps", "=3", "steps=x", "steps=0", "steps=-1", "steps=1e3"])
def test_numbers_that_are_none(two: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "compile", two, "--dim", text)
    assert status == 1 and out == "" and "--dim" in err and len(err.splitlines()) == 1
    with pytest.raises(CompileError, match="--dim steps is at least 1"):
        llmc.compile(two, "x.so", dims={"steps": 0})


def test_a_tokenizer_of_a_graph_that_takes_no_texts_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", {"x": ["n", 3]}, lambda nodes: nodes.add("Abs", "x"))
    assert lift(path).notes == ()
    (note,) = lift(path, tokenizer=tmp_path).notes
    assert "--tokenizer has no effect" in note
