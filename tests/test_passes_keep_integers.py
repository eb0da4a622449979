"""keep-integers: which integers of a source stay, in which encoding, and that they stand for the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import PackGroups, ScaleIntegers, UnpackNibbles
from llmc.compiler.ir.llm import Embed, Linear, Quantize
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import Array, Tensor, precise
from llmc.compiler.passes.keep_integers import KeepIntegers, _hidden, _rounding_of
from llmc.compiler.passes.manager import Report
from llmc.compiler.passes.probe import reading

T = symbol("T", 1, 9)
ROWS, INPUTS = 4, 192


@dataclass(frozen=True)
class Case:
    """Integers from `low` to `high`, their scales and zero points; and the encoding, or why there is none."""

    low: int
    high: int
    scales: tuple[int, ...]
    outcome: str
    dtype: str = "i8"
    block: int = 0
    axis: int = 1
    zeros: tuple[int, ...] | None = None
    zero: int | None = None  # all of them; None: 0 to 3 in turns
    shape: tuple[int, ...] = (ROWS, INPUTS)
    scale: float = 0.25  # of the largest


SCALES = "its integers are not kept: f16 does not hold its scales"
PER_INPUT = "its integers are not kept: its scales differ from input to input"
CASES: dict[str, Case] = {
    "4 bits in blocks of 64": Case(-8, 7, (ROWS, 3), "q4g64", block=64),
    "6 bits in blocks of 64": Case(-17, 7, (ROWS, 3), "q6g64", block=64),
    "5 bits, above": Case(-8, 8, (ROWS, 3), "q5g64", block=64),
    "8 bits, above": Case(-8, 32, (ROWS, 3), "q8g64", block=64),
    "blocks of 192": Case(-8, 7, (ROWS, 1), "q4g64", block=192),
    "blocks of 32": Case(-8, 7, (ROWS, 6), "q4g32", block=32),
    "blocks of 96": Case(-128, 127, (ROWS, 2), "q8g32", block=96),
    "blocks of 16": Case(-8, 7, (ROWS, 12), "q4g16", block=16),
    "blocks of 48, 3 bits": Case(-4, 3, (ROWS, 4), "q4g16", block=48),
    "6 bits in blocks of 16": Case(-32, 31, (ROWS, 12), "q6g16", block=16),
    "2 bits in blocks of 16": Case(0, 3, (ROWS, 12), "q2g16z", "u8", block=16, zeros=(ROWS, 12)),
    "blocks of 24": Case(-8, 7, (ROWS, 8), "blocks of 24 inputs: rounded anew, q8g32", block=24),
    "blocks that end early": Case(-8, 7, (ROWS, 2), "q4g64", block=128),
    "one scale a row": Case(-8, 7, (ROWS, 1), "q4g64"),
    "one scale": Case(-8, 7, (), "q4g64"),
    "one scale, as a vector": Case(-8, 7, (1,), "q4g64"),
    "a scale an input": Case(-8, 7, (INPUTS,), PER_INPUT),
    "a scale an input and row": Case(-8, 7, (ROWS, INPUTS), PER_INPUT),
    "blocks of rows": Case(-8, 7, (2, INPUTS), PER_INPUT, block=2, axis=0),
    "a row of scales for all rows": Case(-8, 7, (1, 3), "q4g64", block=64),
    "blocks of rows, a scale each": Case(-8, 7, (2, 1), "q4g64", block=2, axis=0),
    "one row of scales in blocks": Case(-8, 7, (1, 3), "q4g64", block=64, shape=(1, INPUTS)),
    "inputs that no block divides": Case(-8, 7, (ROWS, 1), "q4g64", shape=(ROWS, 50)),
    "zero points of 0": Case(-8, 7, (ROWS, 3), "q4g64", block=64, zeros=(ROWS, 3), zero=0),
    "a zero point a block": Case(-8, 7, (ROWS, 3), "q4g64z", block=64, zeros=(ROWS, 3)),
    "a zero point a row": Case(-100, 100, (ROWS, 1), "q8g64z", zeros=(ROWS, 1)),
    "a zero point an input": Case(-100, 100, (ROWS, 1), PER_INPUT, zeros=(INPUTS,)),
    "bytes": Case(0, 255, (ROWS, 3), "q8g64z", "u8", block=64),
    "bytes around 128": Case(0, 255, (ROWS, 3), "q8g64", "u8", block=64, zeros=(ROWS, 3), zero=128),
    "bytes around 8": Case(0, 255, (ROWS, 3), "q8g64z", "u8", block=64, zeros=(ROWS, 3), zero=8),
    "half bytes around 8": Case(0, 15, (ROWS, 3), "q4g64", "u8", block=64, zeros=(ROWS, 3), zero=8),
    "half bytes around 7": Case(0, 15, (ROWS, 3), "q4g64z", "u8", block=64, zeros=(ROWS, 3), zero=7),
    "half bytes and one more": Case(0, 16, (ROWS, 3), "q5g64z", "u8", block=64, zeros=(ROWS, 3), zero=8),
    "16 bits": Case(-8, 7, (ROWS, 1), "its integers are not kept: its integers are i16, not 8 bits or less", "i16"),
    "scales beyond f16": Case(
        -8,
        7,
        (ROWS, 1),
        f"{SCALES} (up to 2.5e+05): they would change by inf of the largest",
        scale=250000.0,
    ),
    "scales below f16": Case(
        -8,
        7,
        (ROWS, 1),
        f"{SCALES} (up to 1e-08): they would change by 1.0e+00 of the largest",
        scale=1e-8,
    ),
}  # fmt: skip


def numbers(case: Case) -> dict[str, Array]:
    generator = np.random.default_rng(len(case.outcome))
    q = generator.integers(case.low, case.high + 1, case.shape)
    flat = q.reshape(-1)
    flat[-1], flat[-2] = case.low, case.high  # both occur, in the last row
    found = {"q": q.astype({"i8": np.int8, "u8": np.uint8, "i16": np.int16}[case.dtype])}
    count = int(np.prod(case.scales))
    found["scales"] = (case.scale / 2.0 ** (np.arange(count) % 3)).reshape(case.scales).astype(np.float32)
    if case.zeros is not None:
        points = np.arange(int(np.prod(case.zeros))) % 4 if case.zero is None else np.full(case.zeros, case.zero)
        found["zeros"] = points.reshape(case.zeros).astype(found["q"].dtype)
    found["x"] = generator.integers(-8, 8, (3, case.shape[-1])).astype(np.float64)
    return found


def weight(case: Case, turned: bool) -> Value:
    """[outputs, inputs]; turned: as the transpose of a weight [inputs, outputs]."""
    data = numbers(case)
    q = Param("q", Tensor(case.shape[::-1] if turned else case.shape, case.dtype))

    def side(name: str) -> Value:
        shape = data[name].shape
        return Param(
            name,
            Tensor(shape[::-1] if turned and len(shape) == 2 else shape, "f32" if name == "scales" else case.dtype),
        )

    zeros = side("zeros") if case.zeros is not None else None
    made = ScaleIntegers(q, side("scales"), zeros, 1 - case.axis if turned else case.axis, case.block)
    return s.Transpose(made, (1, 0)) if turned else made


def graph_of(weight: Value) -> Graph:
    x = Input("x", Tensor((T, weight.shape[-1]), "f32"))
    return Graph("g", (x,), (("y", Linear(x, weight)),))


def loader(case: Case, turned: bool) -> Callable[[str], Array]:
    data = numbers(case)
    return lambda name: data[name].T if turned else data[name]


# A vector lies along the inputs, which the transpose of a weight has first.
BOTH_WAYS = [
    (name, turned)
    for name, case in CASES.items()
    for turned in (False, True)
    if not turned or (len(case.scales) != 1 and len(case.zeros or ()) != 1)
]


@pytest.mark.parametrize(("name", "turned"), BOTH_WAYS)
def test_integers_stay_where_an_encoding_holds_them(name: str, turned: bool) -> None:
    case = CASES[name]
    before, report, load = graph_of(weight(case, turned)), Report(), loader(case, turned)
    with reading(load):
        after = KeepIntegers().run(before, report)
    (linear,) = (op for op in after.ops if isinstance(op, Linear))
    if not case.outcome.startswith("q"):
        assert [why for _, why in report.refusals] == [case.outcome] and not report.hits
        assert isinstance(linear.w, Quantize) == ("rounded anew" in case.outcome)
        return
    assert report.hits == {f"kept as {case.outcome}": 1} and report.refusals == []
    assert isinstance(linear.w, PackGroups) and linear.w.shape == case.shape
    x = numbers(case)["x"]
    with precise():
        expected, found = (np.asarray(evaluate(graph, {"x": x}, load)["y"]) for graph in (before, after))
    # All numbers are small multiples of powers of two.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_a_table_of_several_matrices_keeps_no_integers() -> None:
    made = ScaleIntegers(Param("q", Tensor((2, ROWS, INPUTS), "i8")), Param("scales", Tensor((), "f32")))
    assert KeepIntegers()._pack(made, False) == "its integers are tensor<[2, 4, 192], i8>, no matrix"


def test_half_bytes_are_seen_where_they_are_taken_apart() -> None:
    packed = Param("packed", Tensor((ROWS, 64), "u8"))
    q = s.Reshape(UnpackNibbles(packed), (ROWS, 128))
    made = ScaleIntegers(q, Param("scales", Tensor((ROWS, 2), "f32")), e.constant(8, "u8"), 1, 64)
    report = Report()
    KeepIntegers().run(graph_of(made), report)  # nobody reads weights
    assert report.hits == {"kept as q4g64": 1}
    other = ScaleIntegers(Param("q", Tensor((ROWS, 128), "i8")), Param("scales", Tensor((ROWS, 2), "f32")), None, 1, 64)
    report = Report()
    KeepIntegers().run(graph_of(other), report)
    assert report.hits == {"kept as q8g64": 1}


def test_a_table_and_a_head_share_their_integers() -> None:
    case = CASES["4 bits in blocks of 64"]
    table = weight(case, False)
    ids, x = Input("ids", Tensor((T,), "i32")), Input("x", Tensor((T, INPUTS), "f32"))
    graph = Graph("g", (ids, x), (("e", Embed(table, ids)), ("y", Linear(x, table))))
    report = Report()
    with reading(loader(case, False)):
        after = KeepIntegers().run(graph, report)
    assert report.hits == {"kept as q4g64": 1}
    assert len({op for op in after.ops if isinstance(op, PackGroups)}) == 1
    report = Report()
    assert KeepIntegers(group=32).run(graph, report) is not graph and report.hits == {"kept as q8g32": 1}


def test_a_weight_that_is_computed_or_holds_no_integers_stays() -> None:
    x = Input("x", Tensor((T, INPUTS), "f32"))
    given = Input("q", Tensor((ROWS, INPUTS), "i8"))
    for value in (
        ScaleIntegers(given, Param("scales", Tensor((), "f32"))),
        Param("w", Tensor((ROWS, INPUTS), "f32")),
        s.Transpose(Param("w", Tensor((INPUTS, ROWS), "f32")), (1, 0)),
    ):
        inputs = (x, given) if isinstance(value, ScaleIntegers) else (x,)
        graph, report = Graph("g", inputs, (("y", Linear(x, value)),)), Report()
        assert KeepIntegers().run(graph, report) is graph and report.refusals == []


def test_integers_behind_another_op_are_told_and_mean_what_they_did() -> None:
    """A part of the rows, or an order that is not that of the inputs of a linear op, is no weight of integers."""
    case = CASES["4 bits in blocks of 64"]
    made, order = weight(case, False), e.constant(np.arange(INPUTS, dtype=np.int32)[::-1].copy(), "i32")
    ids = Input("ids", Tensor((T,), "i32"))
    hidden: list[tuple[str, Value]] = [
        ("t.slice", s.Slice(made, 0, 1, 3)),
        ("t.gather", s.Gather(made, order, 1)),
        ("t.gather", s.Gather(s.Slice(made, 0, 1, 3), order, 1)),
    ]
    for name, value in hidden:
        for graph in (graph_of(value), Graph("g", (ids,), (("y", Embed(value, ids)),))):
            report = Report()
            with reading(loader(case, False)):
                assert KeepIntegers().run(graph, report) is graph
            ((_, why),) = report.refusals
            assert f"they lie behind {name}" in why, why
    assert not _hidden(Param("w", Tensor((2, 2), "f32")))


@pytest.mark.parametrize(("largest", "holds"), [(2.0**-10.5, True), (2.0**-11.5, False)])
def test_a_small_scale_may_lose_what_is_little_of_the_largest(largest: float, holds: bool) -> None:
    """1.49 of f16's least number becomes 1 of it: that is 2^-25.03 less, 2^-14.5 and 2^-13.5 of the largest."""
    why = _rounding_of(e.constant(np.array([1.49 * 2.0**-24, largest]), "f32"))
    assert (why == "") == holds and ("f16 does not hold" in why) != holds


def test_groups_that_no_encoding_has_are_refused() -> None:
    case = CASES["blocks of 96"]
    report = Report()
    with reading(loader(case, False)):
        after = KeepIntegers(group=12).run(graph_of(weight(case, False)), report)
    assert not any(isinstance(op, PackGroups) for op in after.ops)
    ((_, why),) = report.refusals
    assert why.startswith("its integers are not kept: llm.pack_groups(") and "no encoding with groups of 12" in why


@pytest.mark.parametrize(("zero", "kept"), [(100.0, True), (20_000.0, False)])
def test_minimums_that_f16_does_not_hold(zero: float, kept: bool) -> None:
    """Groups far from 0: a minimum of 20,000 steps has a last place of several steps in f16."""
    x = Input("x", Tensor((T, INPUTS), "f32"))
    q = Param("q", Tensor((ROWS, INPUTS), "u8"))
    scales, zeros = (Param(name, Tensor((ROWS, 6), "f32")) for name in ("scales", "zeros"))
    graph = Graph("m", (x,), (("y", Linear(x, ScaleIntegers(q, scales, zeros, 1, 32))),))
    rng = np.random.default_rng(0)
    data = {
        "q": rng.integers(0, 16, (ROWS, INPUTS)).astype(np.uint8),
        "scales": np.full((ROWS, 6), 0.001, np.float16).astype(np.float32),
        "zeros": (zero + rng.random((ROWS, 6))).astype(np.float32),
    }
    report = Report("keep-integers")
    with reading(data.__getitem__):
        found = KeepIntegers().run(graph, report)
    assert any(isinstance(op, PackGroups) for op in found.ops) == kept
    assert kept or "f16 does not hold its minimums" in report.refusals[0][1]


@pytest.mark.parametrize(("dtype", "ending"), [("u8", "z"), ("i8", "a")])
def test_parts_of_a_step_are_not_lost_to_the_middle(dtype: str, ending: str) -> None:
    """128 and a tenth is 128 and an eighth in f16: with 128 added, the zero point is scaled before it is rounded."""
    x = Input("x", Tensor((T, INPUTS), "f32"))
    q = Param("q", Tensor((ROWS, INPUTS), dtype))
    scales, zeros = Param("scales", Tensor((ROWS, 6), "f32")), Param("zeros", Tensor((ROWS, 6), "f16"))
    graph = Graph("m", (x,), (("y", Linear(x, ScaleIntegers(q, scales, zeros, 1, 32))),))
    data = {
        "q": np.random.default_rng(0).integers(0, 128, (ROWS, INPUTS)).astype({"u8": np.uint8, "i8": np.int8}[dtype]),
        "scales": np.full((ROWS, 6), 0.001, np.float16).astype(np.float32),
        "zeros": np.full((ROWS, 6), 0.1, np.float16),
    }
    data["q"][0, 0] = 200 if dtype == "u8" else -100
    with reading(data.__getitem__):
        found = KeepIntegers().run(graph, Report("keep-integers"))
    (packed,) = [op for op in found.ops if isinstance(op, PackGroups)]
    assert packed.encoding == f"q8g32{ending}"
