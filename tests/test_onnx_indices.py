"""Lookups of ONNX models: the step fails where onnxruntime does, gives its result elsewhere, and refuses what can be
known when compiling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_files import write
from onnx_graphs import Nodes, compare

from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.structural import CheckedIndex
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.manager import parse_pipeline, run_passes
from llmc.compiler.pipeline import compile_model, lift_model, run_lifted
from llmc.compiler.progress import Silent
from llmc.errors import CompileError, FrontendError
from llmc.frontends import lift
from llmc.runtime.errors import StepError
from llmc.runtime.runtime import Runtime

TABLE = np.arange(30, dtype=np.float32).reshape(10, 3)
GRID = np.arange(20, dtype=np.float32).reshape(4, 5)
PLAIN = CompileOptions(quantization="none")


ZERO, ZERO_TO_TWO = np.array([0]), (np.array([0]), np.array([2]))
KINDS = ("Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND")


def looking_up(kind: str) -> onnx.ModelProto:
    """A lookup by rows of the input i [n, 2], or by their first numbers."""
    g = Nodes({"i": ("int64", ["n", 2])})
    first = g.add("Reshape", g.add("Slice", "i", np.array([0]), np.array([1]), np.array([1])), np.array([-1]))
    second = g.add("Reshape", g.add("Slice", "i", np.array([1]), np.array([2]), np.array([1])), np.array([-1]))
    updates = g.add("Cast", second, to=TensorProto.FLOAT)
    made = {
        "Gather": lambda: g.add("Gather", TABLE, first),
        "GatherElements": lambda: g.add("GatherElements", GRID[:, :1], g.add("Unsqueeze", first, np.array([1]))),
        "GatherND": lambda: g.add("GatherND", GRID, "i"),
        "ScatterND": lambda: g.add("ScatterND", GRID, "i", updates),
        "ScatterElements": lambda: g.add("ScatterElements", GRID[:, 0], first, updates),
    }[kind]()
    return g.model(made)


WRONG = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, onnxruntime.capi.onnxruntime_pybind11_state.Fail
PLACES = (
    [[0, 0]], [[3, 4]], [[-1, -1]], [[-4, -5]], [[0, 5]], [[4, 0]], [[1, -6]], [[-5, 0]], [[9, 0]], [[-10, 1]],
    [[10, 0]], [[2**40, 0]], [[0, 2**40]], [[-(2**63), 0]], [[1, 2], [3, 1], [2, 0]], [[1, 2], [3, 1], [2, 7]],
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_lookup_fails_where_onnxruntimes_does(kind: str, tmp_path: Path) -> None:
    """Also where an index of one axis would be a place in another row, as [0, 5] of [4, 5] is in row 1."""
    path = write(looking_up(kind), tmp_path / "m.onnx")
    compile_model(str(path), tmp_path / "m.so", PLAIN)
    runtime, session = Runtime.load(tmp_path / "m.so", threads=2), onnxruntime.InferenceSession(str(path))
    failed = 0
    for places in PLACES:
        given = {"i": np.array(places, np.int64)}
        try:
            expected = session.run(None, given)[0]
        except WRONG:
            with pytest.raises(StepError, match="index out of range"):
                runtime.run(given)
            failed += 1
            continue
        (found,) = runtime.run(given).values()
        np.testing.assert_array_equal(found, expected)
    assert 3 <= failed < len(PLACES) - 3


def test_the_error_names_the_table_and_the_input(tmp_path: Path) -> None:
    g = Nodes({"places": ("int64", ["n"])})
    g.stored.append(onnx.numpy_helper.from_array(np.zeros((70_000, 2), np.float32), "wte"))
    path = write(g.model(g.add("Gather", "wte", "places")), tmp_path / "m.onnx")
    compile_model(str(path), tmp_path / "m.so", PLAIN)
    runtime = Runtime.load(tmp_path / "m.so")
    with pytest.raises(StepError) as caught:
        runtime.run({"places": np.array([70_000])})
    assert str(caught.value) == "index out of range: axis 0 of wte, by places; the axis has 70000 elements"
    assert runtime.run({"places": np.array([-1])})  # goes on


def test_an_index_of_a_branch_that_is_not_taken_is_no_error(tmp_path: Path) -> None:
    """onnxruntime runs the branch that is taken only; llmc computes both and chooses."""
    body = [
        helper.make_graph([helper.make_node("Gather", ["table", name], [f"{name}_rows"])], name, [], [
            helper.make_tensor_value_info(f"{name}_rows", TensorProto.FLOAT, ["n", 3])
        ])
        for name in ("a", "b")
    ]  # fmt: skip
    g = Nodes({"c": ("bool", []), "a": ("int64", ["n"]), "b": ("int64", ["n"])})
    g.stored.append(onnx.numpy_helper.from_array(TABLE, "table"))
    path = write(g.model(g.add("If", "c", then_branch=body[0], else_branch=body[1])), tmp_path / "m.onnx")
    compile_model(str(path), tmp_path / "m.so", PLAIN)
    runtime = Runtime.load(tmp_path / "m.so")
    session = onnxruntime.InferenceSession(str(path))
    for taken, a, b in ((True, 3, 99), (False, -99, 7), (True, 2, 4)):
        given = {"c": np.array(taken), "a": np.array([a]), "b": np.array([b])}
        (found,) = runtime.run(given).values()
        np.testing.assert_array_equal(found, session.run(None, given)[0])
    with pytest.raises(StepError, match="index out of range"):
        runtime.run({"c": np.array(False), "a": np.array([1]), "b": np.array([10])})


KNOWN = np.array([[0, -1], [-4, 2], [3, -5], [-1, -1], [1, 3]])


@pytest.mark.parametrize("kind", KINDS)
def test_known_places_count_from_the_end_of_their_own_axis(kind: str) -> None:
    """And need no check when the step runs."""
    g = Nodes({"table": ("float32", GRID.shape), "row": ("float32", (5,))})
    made = {
        "Gather": lambda: g.add("Gather", "table", KNOWN[:, 0]),
        "GatherElements": lambda: g.add("GatherElements", "table", KNOWN[:4], axis=1),
        "GatherND": lambda: g.add("GatherND", "table", KNOWN),
        "ScatterND": lambda: g.add("ScatterND", "table", KNOWN, "row"),
        "ScatterElements": lambda: g.add(
            "ScatterElements", "table", KNOWN[:1], g.add("Unsqueeze", g.add("Slice", "row", *ZERO_TO_TWO), ZERO), axis=1
        ),
    }[kind]()
    compare(g, [made], {"table": GRID, "row": -TABLE.reshape(-1)[:5]})
    graph, _ = run_passes(g.graph(made), parse_pipeline("fold,bound-indices"), [])
    assert not any(isinstance(op, CheckedIndex) for op in graph.ops)


@pytest.mark.parametrize("kind", ["GatherND", "ScatterND"])
def test_a_place_that_may_be_the_last_is_none_of_the_row_before(kind: str) -> None:
    """Clipped to -1 .. 4, it is in range of an axis of 5, and -1 counts from the end of that axis."""
    g = Nodes({"table": ("float32", (5, 5)), "i": ("int64", ("n", 2)), "row": ("float32", ("n",))})
    places = g.add("Clip", "i", np.int64(-1), np.int64(4))
    made = g.add(kind, "table", places, *(["row"] if kind == "ScatterND" else []))
    given = np.array([[0, -1], [-1, 3], [2, 9], [-7, -7]])
    compare(g, [made], {"table": TABLE.reshape(-1)[:25].reshape(5, 5), "i": given, "row": -TABLE.reshape(-1)[:4]})


@pytest.mark.parametrize("index, size", [(np.array([3, 10, 0]), 10), (np.array([-11, 2]), 10)])
def test_an_index_that_is_stored_and_wrong_is_refused(index: np.ndarray, size: int, tmp_path: Path) -> None:
    g = Nodes({"x": ("float32", [size, "n"])})
    path = write(g.model(g.add("Gather", "x", index)), tmp_path / "m.onnx")
    with pytest.raises(FrontendError, match=r"Gather .*out of range.* has 10 elements"):
        lift(path)


def text_model(index: str, rows: int, path: Path) -> Path:
    """Rows of two tables, by the ids and by a computed index: an encoder, as nothing says otherwise."""
    g = Nodes({"input_ids": ("int64", ["batch", "seq"])})
    length = g.add("Gather", g.add("Shape", "input_ids"), np.int64(1))
    positions = g.add("Range", np.int64(0), length, np.int64(1))
    rng = np.random.default_rng(0)
    x = g.add("Gather", rng.standard_normal((64, 8)).astype(np.float32), "input_ids")
    made = {
        "mod": lambda: g.add("Mod", g.add("Mul", positions, np.int64(3)), np.int64(700)),
        "sum": lambda: g.add("Add", "input_ids", positions),
        "far": lambda: g.add(
            "Mod", g.add("Mul", "input_ids", g.add("Add", positions, np.int64(1000003))), np.int64(40000000)
        ),
        "twice the id": lambda: g.add("Mul", "input_ids", np.int64(2)),
    }[index]()  # fmt: skip
    y = g.add("Gather", rng.standard_normal((rows, 8)).astype(np.float32), made)
    return write(g.model(g.add("Add", x, y)), path)


@pytest.mark.parametrize("index", ["sum", "far"])
def test_a_text_that_asks_for_more_rows_than_there_are_fails_alone(index: str, tmp_path: Path) -> None:
    path = text_model(index, 70, tmp_path / "m.onnx")
    compile_model(str(path), tmp_path / "m.so", CompileOptions(quantization="none", max_context=512))
    runtime, session = Runtime.load(tmp_path / "m.so", threads=2), onnxruntime.InferenceSession(str(path))
    for ids in ([0, 1, 2], [63, 5], [63] * 7, [0] * 69 + [63]):
        given = {"input_ids": np.array([ids], np.int64)}
        try:
            expected = session.run(None, given)[0][0]
        except WRONG:
            with pytest.raises(StepError, match=r"index out of range: axis 0 of .*, by ids"):
                runtime.encode([ids])
            continue
        found = runtime.encode([ids])[0]
        assert any(np.array_equal(value, expected) for value in found.values())


@pytest.mark.parametrize(
    "index, rows, reason", [("mod", 512, "--max-context 171 or less"), ("twice the id", 126, "vocabulary of 64")]
)
def test_a_table_that_is_too_small_for_what_is_let_through_is_refused(
    index: str, rows: int, reason: str, tmp_path: Path
) -> None:
    path = text_model(index, rows, tmp_path / "m.onnx")
    with pytest.raises(CompileError, match=reason):
        compile_model(str(path), tmp_path / "m.so", CompileOptions(quantization="none", max_context=512))


def test_a_table_that_is_just_large_enough_needs_no_check(tmp_path: Path) -> None:
    for index, rows in (("mod", 700), ("twice the id", 127)):
        lifted = lift_model(str(text_model(index, rows, tmp_path / "m.onnx")), CompileOptions(max_context=512))
        graph = run_lifted(lifted, CompileOptions(quantization="none")).graph
        assert not any(isinstance(op, CheckedIndex) for op in graph.ops)


class Notes(Silent):
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_what_does_not_say_that_it_decodes_is_settled_by_its_attention(tmp_path: Path) -> None:
    """The frontend runs no pass: it gives a decoder that may be otherwise."""
    g = Nodes({"input_ids": ("int64", ["batch", "seq"])})
    rng = np.random.default_rng(0)
    x = g.add("Gather", rng.standard_normal((64, 8)).astype(np.float32), "input_ids")
    logits = g.add("MatMul", x, rng.standard_normal((8, 64)).astype(np.float32))
    path = write(g.model(logits), tmp_path / "m.onnx")
    lifted = lift(path)
    assert lifted.task == "generate" and lifted.otherwise is not None
    settled = lift_model(str(path), CompileOptions())
    assert settled.task == "encode" and settled.otherwise is None
    assert any("taken for an encoder" in note and "architectures" in note for note in settled.notes)
    (tmp_path / "config.json").write_text('{"architectures": ["ModelForCausalLM"]}')
    said = lift_model(str(path), CompileOptions())
    assert said.task == "generate" and lift(path).otherwise is None
    notes = Notes()
    graph = run_lifted(said, PLAIN).graph
    assert any(isinstance(op, Linear) for op in graph.ops)
    compile_model(str(path), tmp_path / "m.so", PLAIN, notes)
    assert any("no KV cache" in note for note in notes.notes)
