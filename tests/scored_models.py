"""Tiny ONNX text models whose attention scores are a function of one's own: masks, biases and scales of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx_graphs import OPSET, Nodes

VOCABULARY, WIDTH, HEADS, DIM = 32, 16, 2, 8
LEAST = np.float32(np.finfo(np.float32).min)
Scores = Callable[["Scored", str], str]


def softmax(g: Scored, scores: str) -> str:
    return g.add("Softmax", scores, axis=-1)


class Scored(Nodes):
    """A model in the making: `q` [S, 1] and `k` [1, S] are the places (i64) of queries and keys, `size` is S."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__({"input_ids": ("int64", ["batch", "seq"])})
        self.generator = np.random.default_rng(seed)
        self.size = self.add("Gather", self.add("Shape", "input_ids"), np.int64(1))
        self.at = self.add("Range", np.int64(0), self.size, np.int64(1))
        self.q = self.add("Unsqueeze", self.at, whole(1))
        self.k = self.add("Unsqueeze", self.at, whole(0))
        self.distance = self.add("Sub", self.q, self.k)  # how far back the key is

    def weight(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (self.generator.standard_normal(shape) * scale / np.sqrt(shape[0])).astype(np.float32)

    def floats(self, x: str) -> str:
        return self.add("Cast", x, to=TensorProto.FLOAT)

    def seen(self, *more: str) -> str:
        """The key is not after the query, and more."""
        found = self.add("LessOrEqual", self.k, self.q)
        for each in more:
            found = self.add("And", found, each)
        return found

    def hide(self, seen: str, scores: str, fill: float = float(LEAST)) -> str:
        return self.add("Where", seen, scores, np.float32(fill))

    def causal(self, scores: str, *more: str) -> str:
        return self.hide(self.seen(*more), scores)

    def scaled(self, raw: str, by: float = 0.35) -> str:
        return self.add("Mul", raw, np.float32(by))


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def write_scored(
    path: Path, scores: Scores, *, decodes: bool = True, scale: float = 1.0, layers: int = 1, shares: Scores = softmax
) -> Path:
    """A model with `scores(model, products)` between the products of queries and keys [1, 2, S, S] and the softmax.

    decodes: its output is called logits, else it is an encoder's hidden state. scale: of its weights. shares: what
    makes probabilities of scores.
    """
    g = Scored()
    x = g.add("Gather", g.generator.standard_normal((VOCABULARY, WIDTH)).astype(np.float32), "input_ids")
    for _ in range(layers):
        q, k, v = (
            g.add(
                "Transpose",
                g.add("Reshape", g.add("MatMul", x, g.weight(WIDTH, WIDTH, scale=scale)), whole(0, 0, HEADS, DIM)),
                perm=[0, 2, 1, 3],
            )
            for _ in range(3)
        )
        raw = g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2]))
        mixed = g.add("Transpose", g.add("MatMul", shares(g, scores(g, raw)), v), perm=[0, 2, 1, 3])
        mixed = g.add("MatMul", g.add("Reshape", mixed, whole(0, 0, WIDTH)), g.weight(WIDTH, WIDTH))
        x = g.add("Add", x, mixed)
    out = "logits" if decodes else "last_hidden_state"
    result = g.add("MatMul", x, g.weight(WIDTH, VOCABULARY)) if decodes else x
    g.nodes.append(helper.make_node("Identity", [result], [out]))
    width = VOCABULARY if decodes else WIDTH
    graph = helper.make_graph(
        g.nodes,
        "scored",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["batch", "seq", width])],
        g.stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
