"""A decoder of one layer as a frontend would lift it, small enough to print: for tests of passes and of the checker."""

from __future__ import annotations

from pass_harness import S, c, param

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import Tensor

VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM, INNER = 33, 12, 4, 2, 4, 7


def rms_norm(x: Value, name: str) -> Value:
    """As models write it: power, mean, rsqrt, weight last."""
    spread = s.Mean(e.Pow(x, c(2)), (-1,))
    return e.Mul(param(name, WIDTH), e.Mul(x, e.Rsqrt(e.Add(spread, c(1e-5)))))


def linear(x: Value, name: str, outputs: int, inputs: int = WIDTH) -> Value:
    """x @ w.T of a weight [outputs, inputs]."""
    return s.Matmul(x, s.Transpose(param(name, outputs, inputs), (1, 0)))


def small_decoder(head: str = "embed") -> Graph:
    """ids, positions i32[1, S] -> logits f32[1, S, 33]: learned positions, grouped attention, gated MLP.

    head: the name of its weight, by default that of the embedding.
    """
    ids, positions = (Input(name, Tensor((1, S), "i32")) for name in ("ids", "positions"))
    x: Value = s.Gather(param("embed", VOCABULARY, WIDTH), ids, 0)
    x = e.Add(x, s.Gather(param("positions", 128, WIDTH), positions, 0))
    h = rms_norm(x, "norm1")
    q = s.Reshape(linear(h, "q", HEADS * DIM), (1, S, HEADS, DIM))
    k, v = (s.Reshape(linear(h, name, KV_HEADS * DIM), (1, S, KV_HEADS, DIM)) for name in ("k", "v"))
    attended = s.Reshape(Attention(q, k, v, scale=0.5), (1, S, HEADS * DIM))
    x = e.Add(x, linear(attended, "o", WIDTH, HEADS * DIM))
    h = rms_norm(x, "norm2")
    gate = linear(h, "gate", INNER)
    x = e.Add(x, linear(e.Mul(e.Mul(gate, e.Sigmoid(gate)), linear(h, "up", INNER)), "down", WIDTH, INNER))
    return Graph("decoder", (ids, positions), (("logits", linear(rms_norm(x, "norm"), head, VOCABULARY)),))


def of_modules(graph: Graph) -> Graph:
    """The same graph, its params called as those of modules are in a checkpoint, and in f32."""
    params = {value: Param(f"{value.name}.weight", Tensor(value.shape, "f32")) for value in graph.params}
    casts = [op for op in graph.ops if isinstance(op, e.Cast) and op.x in params]
    return substitute_values(graph, {op: params[op.x] for op in casts})  # type: ignore[index]
