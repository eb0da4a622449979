"""ONNX decoders whose rotary angles are written in unusual ways: onnxruntime's logits, at any length, by the cache too.

Each has one law of position or of the length that changes far from the start, where a few positions would not show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_harness import CACHE
from onnx import TensorProto, helper
from onnx_graphs import Nodes

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.runtime.runtime import Runtime

VOCABULARY, HIDDEN, HEADS, DIM = 64, 32, 2, 16
CONTEXT, SWITCH = 160, 96  # tokens; and the position or length at which a law changes: no position of the first pages
SLOW = (100.0 ** -(np.arange(0, DIM, 2) / DIM)).astype(np.float32)
LENGTHS = (1, 31, SWITCH, SWITCH + 1, 129, CONTEXT)
IDS = np.random.default_rng(11).integers(0, VOCABULARY, CONTEXT).astype(np.int32)
TOLERANCE = 2e-5  # of the largest logit: f32 against f32, over two layers

Angles = Callable[[Nodes, str, str], tuple[str, str]]  # nodes, positions i64 [S], S as i64: cosines and sines [S, DIM]


def f32(value: object) -> np.ndarray:
    return np.asarray(value, np.float32)


def products(g: Nodes, positions: str, frequencies: object) -> str:
    """positions times frequencies, [S, pairs]."""
    at = g.add("Unsqueeze", g.add("Cast", positions, to=TensorProto.FLOAT), np.array([1]))
    return g.add("MatMul", at, frequencies)


def turned(g: Nodes, angles: str) -> tuple[str, str]:
    both = g.add("Concat", angles, angles, axis=-1)
    return g.add("Cos", both), g.add("Sin", both)


def stored(g: Nodes, positions: str, values: np.ndarray) -> str:
    return g.add("Gather", values.astype(np.float32), positions)


def by_position(later: float) -> np.ndarray:
    return np.where(np.arange(CONTEXT) < SWITCH, 1.0, later)[:, None]


def scaled_by_table(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    cos, sin = turned(g, products(g, positions, SLOW[None]))
    scale = stored(g, positions, by_position(0.5))
    return g.add("Mul", cos, scale), g.add("Mul", sin, scale)


def frequency_by_table(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    return turned(g, g.add("Mul", products(g, positions, SLOW[None]), stored(g, positions, by_position(0.25))))


def frequency_by_comparison(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    near = g.add("Less", g.add("Unsqueeze", positions, np.array([1])), np.int64(SWITCH))
    return turned(g, g.add("Where", near, products(g, positions, SLOW[None]), products(g, positions, SLOW[None] / 4)))


def second_half_of_a_table(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    near = np.arange(CONTEXT)[:, None] * np.concatenate([SLOW, SLOW])[None]
    far = np.where(np.arange(CONTEXT)[:, None] < 4, near, near / 4)
    tables = [np.concatenate([function(near), function(far)], axis=1) for function in (np.cos, np.sin)]
    cut = [np.array([bound]) for bound in (DIM, 2 * DIM, 1)]
    cos, sin = (g.add("Slice", stored(g, positions, table), *cut) for table in tables)
    return cos, sin


def chosen(g: Nodes, positions: str, is_long: str) -> tuple[str, str]:
    return turned(g, products(g, positions, g.add("Where", is_long, SLOW[None] / 4, SLOW[None])))


def by_size(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    return chosen(g, positions, g.add("Greater", size, np.int64(SWITCH)))


def by_last_position(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    return chosen(g, positions, g.add("Greater", g.add("ReduceMax", positions, keepdims=0), np.int64(SWITCH - 1)))


def base_of(g: Nodes, positions: str, growth: str) -> tuple[str, str]:
    base = g.add("Mul", f32(100.0), g.add("Pow", growth, f32(DIM / (DIM - 2))))
    inverse = g.add("Reciprocal", g.add("Pow", base, f32(np.arange(0, DIM, 2) / DIM)[None]))
    return turned(g, products(g, positions, inverse))


def in_steps(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    """Qwen's dynamic NTK: the base grows with every doubling of the length beyond SWITCH / 3."""
    ratio = g.add("Div", g.add("Cast", size, to=TensorProto.FLOAT), f32(SWITCH / 3))
    doublings = g.add("Add", g.add("Div", g.add("Log", ratio), f32(np.log(2.0))), f32(1.0))
    growth = g.add("Sub", g.add("Pow", f32(2.0), g.add("Ceil", doublings)), f32(1.0))
    return base_of(g, positions, g.add("Max", growth, f32(1.0)))


def with_every_token(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    """Dynamic NTK beyond SWITCH tokens."""
    return base_of(g, positions, g.add("Max", g.add("Div", g.add("Cast", size, to=1), f32(SWITCH)), f32(1.0)))


def plain(g: Nodes, positions: str, size: str) -> tuple[str, str]:
    return turned(g, products(g, positions, SLOW[None]))


def model_of(angles: Angles, log_n: bool) -> onnx.ModelProto:
    """A decoder of two layers, attention written out. log_n: queries times log(position + 1), as in Qwen."""
    g = Nodes({"input_ids": ("int64", ("batch", "S"))})
    generator = np.random.default_rng(5)

    def weight(*shape: int) -> np.ndarray:
        return f32(generator.standard_normal(shape) / np.sqrt(shape[0]) * 1.5)

    size = g.add("Gather", g.add("Shape", "input_ids"), np.int64(1))
    positions = g.add("Range", np.int64(0), size, np.int64(1))
    cos, sin = angles(g, positions, size)
    growth = np.maximum(1, np.log(np.arange(1, CONTEXT + 1)) / np.log(SWITCH / 2))[:, None]
    grown = stored(g, positions, growth)
    seen = g.add("LessOrEqual", positions, g.add("Unsqueeze", positions, np.array([1])))
    x = g.add("Gather", f32(generator.standard_normal((VOCABULARY, HIDDEN))), "input_ids")
    for _ in range(2):
        parts = []
        for part in ("q", "k", "v"):
            heads = g.add("Reshape", g.add("MatMul", x, weight(HIDDEN, HIDDEN)), np.array([0, 0, HEADS, DIM]))
            heads = g.add("Transpose", heads, perm=[0, 2, 1, 3])
            if part != "v":
                low, high = g.many("Split", heads, outputs=2, axis=-1, num_outputs=2)
                other = g.add("Concat", g.add("Neg", high), low, axis=-1)
                heads = g.add("Add", g.add("Mul", heads, cos), g.add("Mul", other, sin))
            parts.append(g.add("Mul", heads, grown) if log_n and part == "q" else heads)
        q, k, v = parts
        scores = g.add("Mul", g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2])), f32(DIM**-0.5))
        shares = g.add("Softmax", g.add("Where", seen, scores, f32(np.finfo(np.float32).min)), axis=-1)
        mixed = g.add("Transpose", g.add("MatMul", shares, v), perm=[0, 2, 1, 3])
        x = g.add("Add", x, g.add("MatMul", g.add("Reshape", mixed, np.array([0, 0, HIDDEN])), weight(HIDDEN, HIDDEN)))
    logits = g.add("MatMul", x, weight(HIDDEN, VOCABULARY))
    g.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    model = g.model()
    model.graph.output.append(helper.make_tensor_value_info("logits", 1, ["batch", "S", VOCABULARY]))
    return model


CASES: dict[str, tuple[Angles, bool, list[int] | None]] = {  # regimes; None: no cache
    "plain": (plain, False, []),
    "log n": (plain, True, []),
    "scaled by a table": (scaled_by_table, False, []),
    "frequency by a table": (frequency_by_table, False, []),
    "frequency by a comparison": (frequency_by_comparison, False, []),
    "second half of a table": (second_half_of_a_table, False, []),
    "by size": (by_size, False, [SWITCH]),
    "by the last position": (by_last_position, False, [SWITCH]),
    "in steps": (in_steps, False, [SWITCH // 3, 2 * SWITCH // 3, 4 * SWITCH // 3]),
    "with every token": (with_every_token, False, None),
}


@dataclass(frozen=True)
class Case:
    name: str
    session: onnxruntime.InferenceSession
    runtime: Runtime
    regimes: list[int]

    def original(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.session.run(None, {"input_ids": ids.astype(np.int64)[None]})[0])[0]


QUICK = ("log n", "scaled by a table", "second half of a table", "by size", "in steps", "with every token")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    angles, log_n, _ = CASES[request.param]
    folder: Path = tmp_path_factory.mktemp("laws")
    onnx.save(model_of(angles, log_n), folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    options = CompileOptions(quantization="none", max_step=64, max_context=CONTEXT, kernel_cache=CACHE)
    manifest = compile_model(str(folder / "model.onnx"), folder / "model.so", options)
    yield Case(request.param, session, Runtime.load(folder / "model.so", threads=2), manifest["step"]["regimes"])  # type: ignore[index]


def same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_it_is_cached_unless_every_length_has_its_own_angles(case: Case) -> None:
    expected = CASES[case.name][2]
    assert case.runtime.task == "generate" and case.runtime.paged == (expected is not None)
    assert case.regimes == (expected or [])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_whole_text_is_the_original(case: Case, length: int) -> None:
    same(case.runtime.forward(IDS[:length]), case.original(IDS[:length]))


def test_pieces_of_a_text_are_the_original_of_the_text_so_far(case: Case) -> None:
    generator = np.random.default_rng(2)
    cuts = sorted({0, CONTEXT, SWITCH, SWITCH + 1, *generator.integers(1, CONTEXT, 5).tolist()})
    with case.runtime.sequence() as sequence:
        for begin, end in itertools.pairwise(cuts):
            same(case.runtime.step([(sequence, IDS[begin:end], "all")]), case.original(IDS[:end])[begin:])
