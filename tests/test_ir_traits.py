"""What ops say of themselves is true, every op says it, and a new op that does loses nothing that a model had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from pass_harness import S, c
from small_decoder import small_decoder
from test_ir_ops import CASES, Case, built, run

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.dims import concrete
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import REGISTRY, Input, Op, Tokens, Value
from llmc.compiler.ir.shapes import require
from llmc.compiler.ir.structural import Cumsum, Gather, GatherElements, Scatter, Softmax, axes_of
from llmc.compiler.ir.types import FLOATS, INTEGERS, KV, Array, Tensor
from llmc.compiler.losses import losses
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.flatten_tokens import RULES
from llmc.compiler.passes.manager import PASSES, Pass, Report, parse_pipeline, run_passes
from llmc.compiler.passes.schemes import find_head
from llmc.compiler.pipeline import RECOGNISE, pipeline_text
from llmc.errors import CompileError, IRError


def of_kind(kind: Tokens) -> list[Case]:
    return [case for case in CASES if REGISTRY[case.name.partition(" ")[0]].tokens is kind]


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_op_says_what_it_does_to_tokens(name: str) -> None:
    assert isinstance(REGISTRY[name].tokens, Tokens)


def test_an_op_that_does_not_say_so_cannot_be() -> None:
    with pytest.raises(IRError, match=r"llm\.silent does not say what it does to tokens"):

        class Silent(Op, name="llm.silent"):
            """Says nothing."""

            x: Value

    assert "llm.silent" not in REGISTRY


def test_every_op_that_moves_elements_has_a_rule_for_tokens() -> None:
    moves = {kind for kind in REGISTRY.values() if kind.tokens is Tokens.MOVES}
    assert moves <= set(RULES)


def test_an_operand_of_indices_is_said_to_be_one() -> None:
    """Ops with integer operands that are no elements, tokens or places are those over caches and sequences."""
    named = {name for name, kind in REGISTRY.items() if kind.lookups is not Op.lookups}
    assert named == {"t.gather", "t.gather_elements", "t.scatter", "llm.embed"}
    for name in named:
        fields = REGISTRY[name]._operand_fields
        case = next(case for case in CASES if case.name.startswith(name))
        op, _ = built(case)
        for item in op.lookups():
            assert item.field in fields and getattr(op, item.field).dtype in INTEGERS
            assert item.table in op.operands and isinstance(item.size, int)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda x, ids: Embed(x, ids), 7),
        (lambda x, ids: Gather(x, ids), 7),
        (lambda x, ids: Gather(x, ids, -1), 5),
        (lambda x, ids: GatherElements(x, e.constant(np.zeros((7, 3)), "i64"), -1), 5),
        (lambda x, ids: Scatter(x, ids, e.constant(np.zeros((2, 5)), "f32")), 7),
    ],
)
def test_places_are_those_of_the_axis_that_is_looked_up(make: Callable[[Value, Value], Op], size: int) -> None:
    (found,) = make(Input("x", Tensor((7, 5), "f32")), Input("ids", Tensor((2,), "i64"))).lookups()
    assert found.size == size


@pytest.mark.parametrize("case", of_kind(Tokens.ELEMENTS), ids=str)
def test_each_element_alone(case: Case) -> None:
    """Elements in another order give the results in that order."""
    op, inputs = built(case)
    shape = tuple(concrete(dim, {}) for dim in op.shape)
    order = np.random.default_rng(0).permutation(int(np.prod(shape)))
    shuffled = [np.broadcast_to(array, shape).reshape(-1)[order] for array in inputs.values()]
    flat, values = built(Case(case.name, case.make, tuple(shuffled), case.expected))
    np.testing.assert_array_equal(run(flat, values), run(op, inputs).reshape(-1)[order])


@pytest.mark.parametrize("case", [*of_kind(Tokens.ROWS), *of_kind(Tokens.FIRST)], ids=str)
def test_each_row_alone(case: Case) -> None:
    """Rows of the first axis the other way round give the results the other way round."""
    op, inputs = built(case)
    count = op.shape[0]
    turned = {
        value: array[::-1] if array.ndim > 1 and array.shape[0] == count and i != _weight(op, i) else array
        for i, (value, array) in enumerate(inputs.items())
    }
    if op.tokens is Tokens.FIRST:
        turned = {value: array[::-1] if array.shape[0] == count else array for value, array in inputs.items()}
    np.testing.assert_allclose(run(op, turned), run(op, inputs)[::-1], rtol=1e-6, atol=1e-6)


def _weight(op: Op, place: int) -> int:
    """The operand's own place where it is a weight, by its field's name: else another."""
    fields = [key for key, value in op.named_operands() if value is not None]
    return place if fields[place] == "w" else -1


@pytest.mark.parametrize("case", of_kind(Tokens.AXES), ids=str)
def test_each_line_alone(case: Case) -> None:
    """The other way round along an axis that the op does not work along, so is the result."""
    op, inputs = built(case)
    ((value, array),) = inputs.items()
    free = [axis for axis in range(array.ndim) if axis not in axes_of(op)]
    for axis in free:
        gone = 0 if op.rank == array.ndim else sum(other < axis for other in axes_of(op))
        found = run(op, {value: np.flip(array, axis)})
        np.testing.assert_allclose(found, np.flip(run(op, inputs), axis - gone), rtol=1e-6, atol=1e-6)


# A new op and a pass that makes it, as docs/contributing.md says: nothing else of the compiler knows of them.


@pytest.fixture
def soft_clip() -> Iterator[str]:
    """The name of a pass that makes `llm.soft_clip` of what models write for it; both are gone after the test."""

    class SoftClip(Op, name="llm.soft_clip"):
        """limit * tanh(x / limit)"""

        tokens = Tokens.ELEMENTS

        x: Value
        limit: float

        def infer(self) -> Tensor:
            require(self.x.dtype in FLOATS, f"needs floats, not {self.x.dtype}")
            return self.x.tensor

        def evaluate(self, x: Array) -> Array:
            return np.asarray(self.limit * np.tanh(x / self.limit), x.dtype)

        def decompose(self) -> Value:
            limit = e.constant(self.limit, self.x.dtype)
            return e.Mul(limit, e.Tanh(e.Div(self.x, limit)))

    @dataclass(frozen=True)
    class FuseSoftClip(Pass, name="fuse-soft-clip"):
        """limit * tanh(x / limit) becomes llm.soft_clip."""

        def run(self, graph: Graph, report: Report) -> Graph:
            def rule(op: Op) -> Value | None:
                if not isinstance(op, e.Mul) or not isinstance(op.a, e.Tanh) or not isinstance(op.a.x, e.Div | e.Mul):
                    return None
                if not isinstance(op.b, e.Constant):
                    return None
                report.hit("soft clip")
                return SoftClip(op.a.x.a, float(op.b.value.array))

            return rewrite(graph, rule)

    yield FuseSoftClip.name
    del REGISTRY["llm.soft_clip"], PASSES["fuse-soft-clip"]


def capped_decoder() -> Graph:
    """The small decoder, its logits capped as Gemma 2's are."""
    graph = small_decoder()
    logits = e.Mul(e.Tanh(e.Div(graph.output("logits"), c(30))), c(30))
    return graph.replace_outputs([("logits", logits)])


def compiled(pipeline: str) -> tuple[Graph, list[Report]]:
    return run_passes(capped_decoder(), parse_pipeline(pipeline))


def test_a_new_op_costs_a_model_neither_its_cache_nor_its_heads_precision(soft_clip: str) -> None:
    options = CompileOptions(quantization="int4")
    text = pipeline_text(options)
    plain, _ = compiled(text)
    graph, reports = compiled(text.replace(RECOGNISE, f"{RECOGNISE},{soft_clip}"))
    assert sum(report.hits["soft clip"] for report in reports) == 1
    assert any(isinstance(value.type, KV) for value in graph.inputs)
    head, expected = find_head(graph), find_head(plain)
    assert head is not None and expected is not None
    assert str(head.w.type) == str(expected.w.type) and "t6" in str(head.w.type)
    clip = next(op for op in graph.ops if op.name == soft_clip.replace("fuse-", "llm.").replace("-", "_"))
    assert str(clip.shape[0]) == "R"  # only of the rows that are asked for
    assert not losses(graph, reports, "generate", "int4")


# What is lost is said.


def mixing_decoder() -> Graph:
    """The small decoder with a running mean of its logits, which no pass can tell apart by tokens."""
    graph = small_decoder()
    return graph.replace_outputs([("logits", Cumsum(graph.output("logits"), 1))])


def test_a_cache_that_is_lost_is_said_with_the_reason() -> None:
    graph, reports = run_passes(mixing_decoder(), parse_pipeline(pipeline_text(CompileOptions(quantization="none"))))
    (line,) = losses(graph, reports, "generate", "none")
    assert "no KV cache" in line and "flatten-tokens refused t.cumsum" in line and "token axis" in line
    assert "\n" not in line and "llmc explain" in line


def test_a_head_that_is_not_found_is_said() -> None:
    graph, reports = run_passes(mixing_decoder(), parse_pipeline(pipeline_text(CompileOptions(quantization="int4"))))
    said = losses(graph, reports, "generate", "int4")
    assert any("the head was not found" in line and "t.cumsum" in line for line in said)


def test_attention_that_sees_other_texts_is_an_error() -> None:
    """Whatever pass left it so: in a step of several texts only attention over their pages keeps them apart."""
    starts = Input("starts", Tensor((3,), "i32"))
    q, k, v = (Input(name, Tensor((S, 2, 8), "f32")) for name in "qkv")
    attended = Attention(q, k, v, scale=0.5, causal=False)
    reports = [Report("insert-kv-cache")]
    reports[0].refuse("llm.attention", "the graph has sizes besides T")
    graph = Graph("g", (q, k, v, starts), (("y", attended), ("n", starts)))
    with pytest.raises(CompileError, match="texts of one step would see each other: insert-kv-cache refused"):
        losses(graph, reports, "encode", "none")
    assert losses(Graph("g", (q, k, v), (("y", attended),)), reports, "encode", "none")


def test_the_reason_is_attention_only_where_some_is_left() -> None:
    """A softmax over experts is refused by the same pass, and is no reason."""
    reports = [Report("fuse-attention"), Report("flatten-tokens")]
    reports[0].refuse("t.softmax", "its scores are clipped")
    reports[1].refuse("t.matmul", "it multiplies tokens with tokens")
    scores, experts = Input("scores", Tensor((S, S), "f32")), Input("experts", Tensor((S, 8), "f32"))
    for value, reason in ((scores, "fuse-attention refused t.softmax: its scores are clipped"),
                          (experts, "flatten-tokens refused t.matmul: it multiplies")):  # fmt: skip
        graph = Graph("g", (value,), (("y", Softmax(value, 1)),))
        for task in ("generate", "encode"):
            (line,) = losses(graph, reports, task, "none")
            assert reason in line
        assert losses(graph, reports, "run", "none") == []
    assert "No attention was recognised" in losses(graph, [], "generate", "none")[0]


def test_a_layer_that_is_not_rounded_as_asked_is_said() -> None:
    report = Report("quantize")
    report.refuse("t.matmul w", "not read by llm.linear or llm.embed: its weight stays f32")
    said = losses(Graph("g", (), ()), [report], "run", "int8")
    assert said == ["not quantized as asked: t.matmul w: not read by llm.linear or llm.embed: its weight stays f32"]
