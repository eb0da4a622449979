"""ONNX texts in which the number of tokens decides something: as onnxruntime has it at every number, 1 among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto
from scored_models import VOCABULARY, Scored, softmax, whole, write_scored

from llmc.compiler.ir.evaluate import evaluate
from llmc.frontends import lift

LENGTHS = (1, 2, 7, 128, 129)
IDS = np.random.default_rng(3).integers(0, VOCABULARY, max(LENGTHS))
N = np.int64


def minus(g: Scored) -> str:
    return g.add("Sub", N(0), g.size)


def after_the_first(g: Scored) -> str:
    rest = g.add("Slice", g.at, whole(1), whole(1 << 40), whole(0))
    return g.add("Equal", g.add("Size", rest), N(0))


DECIDES: dict[str, Callable[[Scored], str]] = {
    "more than one": lambda g: g.add("Greater", g.size, N(1)),
    "exactly one": lambda g: g.add("Equal", g.size, N(1)),
    "the smaller of it and 2": lambda g: g.add("Equal", g.add("Min", g.size, N(2)), N(2)),
    "half of it": lambda g: g.add("Greater", g.add("Div", g.size, N(2)), N(0)),
    "tokens after the first": after_the_first,
    "a rest with the sign of minus it": lambda g: g.add("Less", g.add("Mod", minus(g), N(7), fmod=1), N(0)),
    "a rest with the sign of 7": lambda g: g.add("Less", g.add("Mod", minus(g), N(7)), N(3)),
    "a product that wraps": lambda g: g.add("Greater", g.add("Mul", g.size, N(1 << 56)), N(0)),
    "a product that wraps in i32": lambda g: g.add(
        "Greater", g.add("Mul", g.add("Cast", g.size, to=TensorProto.INT32), np.int32(1 << 24)), np.int32(0)
    ),
    "a product that f32 rounds": lambda g: g.add(
        "Equal", g.add("Sub", g.add("Mul", g.floats(g.size), np.float32(16777215)), np.float32(2147483520)),
        np.float32(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECIDES)
def test_what_a_size_decides_is_onnxruntimes_at_every_size(name: str, tmp_path: Path) -> None:
    def shares(g: Scored, scores: str) -> str:
        return g.add("Mul", softmax(g, scores), g.add("Where", DECIDES[name](g), np.float32(2), np.float32(1)))

    path = write_scored(tmp_path / "model.onnx", lambda g, raw: g.causal(g.scaled(raw)), shares=shares)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    lifted = lift(path, max_context=256)
    for length in LENGTHS:
        ids = IDS[None, :length]
        (expected,) = session.run(None, {"input_ids": ids})
        given = {"ids": ids.astype(np.int32), "positions": np.arange(length, dtype=np.int32)[None]}
        (found,) = evaluate(lifted.graph, given, lifted.load).values()
        np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
