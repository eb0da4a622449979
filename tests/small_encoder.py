"""Encoders as a frontend would lift them: ids, positions and token types [1, S] in, any outputs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from pass_harness import c, param

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.encoded import PAGE, Pages
from llmc.compiler.ir.evaluate import Data, LoadParam, evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, LayerNorm, Linear
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import KV, Array, Tensor

VOCABULARY, WIDTH, HEADS, DIM, INNER, LABELS, LONGEST = 41, 64, 4, 16, 24, 3, 150
S = symbol("S", 2, LONGEST)
INPUTS = ("ids", "positions", "token_types")
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # ids and token types of each
Head = Callable[[Value], dict[str, Value]]
Attend = Callable[[Value, Value, Value, int], Value]


def linear(x: Value, name: str, outputs: int) -> Value:
    inputs = x.shape[-1]
    assert isinstance(inputs, int)
    return Linear(x, param(f"{name}.w", outputs, inputs, dtype="f32"), param(f"{name}.b", outputs, dtype="f32"))


def norm(x: Value, name: str) -> Value:
    return LayerNorm(x, param(f"{name}.w", WIDTH, dtype="f32"), param(f"{name}.b", WIDTH, dtype="f32"), 1e-5)


def both_ways(q: Value, k: Value, v: Value, layer: int) -> Value:
    """Every token sees every token."""
    return Attention(q, k, v, scale=DIM**-0.5, causal=False)


def tokens(x: Value) -> dict[str, Value]:
    return {"last_hidden_state": x}


def first(x: Value) -> dict[str, Value]:
    """A pooler: the first token's row, dense, tanh."""
    return {"pooled": e.Tanh(linear(s.Reshape(s.Slice(x, 1, 0, 1), (1, WIDTH)), "pooler", WIDTH))}


def last(x: Value) -> dict[str, Value]:
    return {"embedding": s.Gather(x, e.constant(-1, "i64"), 1)}


def mean(x: Value) -> dict[str, Value]:
    return {"embedding": s.Mean(x, (1,), False)}


def masked_mean(x: Value) -> dict[str, Value]:
    """As sentence-transformers does it, with a mask of ones; then the norm."""
    mask = s.Broadcast(c(1.0), (1, S, WIDTH))
    total = s.Sum(e.Mul(x, mask), (1,), False)
    y = e.Div(total, e.Maximum(s.Sum(mask, (1,), False), c(1e-9)))
    length = e.Sqrt(s.Sum(e.Mul(y, y), (1,)))
    return {"embedding": e.Div(y, e.Maximum(length, c(1e-12)))}


def classifier(x: Value) -> dict[str, Value]:
    return {"logits": linear(first(x)["pooled"], "classifier", LABELS)}


def everything(x: Value) -> dict[str, Value]:
    return {**tokens(x), **classifier(x), "largest": s.Max(x, (1,), False)}


HEADS_OF_MODELS: dict[str, Head] = {
    "tokens": tokens, "first": first, "last": last, "mean": mean, "masked mean": masked_mean,
    "classifier": classifier, "everything": everything,
}  # fmt: skip


def small_encoder(head: Head = everything, attend: Attend = both_ways, layers: int = 3, types: bool = True) -> Graph:
    """A BERT of a few layers: learned positions, norms behind each part, gelu."""
    inputs = tuple(Input(name, Tensor((1, S), "i32")) for name in INPUTS[: 3 if types else 2])
    tables = (("embed", VOCABULARY), ("positions", LONGEST), ("types", 2))
    parts = [Embed(param(n, k, WIDTH, dtype="f32"), value) for (n, k), value in zip(tables, inputs, strict=False)]
    x: Value = parts[0]
    for part in parts[1:]:
        x = e.Add(x, part)
    x = norm(x, "norm")
    for i in range(layers):
        q, k, v = (s.Reshape(linear(x, f"{i}.{n}", HEADS * DIM), (1, S, HEADS, DIM)) for n in "qkv")
        a = s.Reshape(attend(q, k, v, i), (1, S, HEADS * DIM))
        x = norm(e.Add(x, linear(a, f"{i}.o", WIDTH)), f"{i}.norm1")
        h = linear(e.Activation(linear(x, f"{i}.up", INNER), "gelu"), f"{i}.down", WIDTH)
        x = norm(e.Add(x, h), f"{i}.norm2")
    return Graph("encoder", inputs, tuple(head(x).items()))


def alone(graph: Graph, load: LoadParam, ids: Sequence[int], types: Sequence[int]) -> dict[str, Array]:
    """The outputs of a graph over [1, S] for one sequence: [S, features] or [1, features]."""
    at = {"ids": ids, "positions": range(len(ids)), "token_types": types}
    inputs: dict[str, Data] = {v.name: np.asarray([at[v.name]], np.int32) for v in graph.inputs}
    found = evaluate(graph, inputs, load)
    return {name: np.asarray(data).reshape(-1, np.asarray(data).shape[-1]) for name, data in found.items()}


def random_sequences(lengths: Sequence[int], seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Ids and token types: ones behind a random place."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]
    return [
        (own, [int(i >= cut) for i in range(len(own))]) for own, cut in zip(ids, rng.integers(0, lengths), strict=True)
    ]


def step_inputs(graph: Graph, sequences: Sequences, tile: int = 64, seed: int = 0) -> dict[str, Data]:
    """What the runtime gives to a graph over tokens of whole sequences: pages in any order, their slots NaN."""
    lengths = [len(ids) for ids, _ in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    needed = [-(-n // PAGE) for n in lengths]
    order = np.random.default_rng(seed).permutation(sum(needed) + 1)
    table = np.full((len(lengths), max(needed)), order[-1])
    slots, tiles = [], []
    for index, length in enumerate(lengths):
        table[index, : needed[index]] = own = order[sum(needed[:index]) : sum(needed[: index + 1])]
        slots += [own[i // PAGE] * PAGE + i % PAGE for i in range(length)]
        tiles += [(index, starts[index] + i, min(tile, length - i), i) for i in range(0, length, tile)]
    arrays = {
        "ids": np.concatenate([ids for ids, _ in sequences]), "token_types": np.concatenate([t for _, t in sequences]),
        "positions": np.concatenate([np.arange(n) for n in lengths]), "starts": starts,
        "slots": slots, "tiles": tiles, "block_table": table,
    }  # fmt: skip
    inputs: dict[str, Data] = {}
    for value in graph.inputs:
        if isinstance(value.type, KV):
            empty = Pages.empty(value.type, sum(needed) + 1)
            inputs[value.name] = Pages(np.full_like(empty.keys, np.nan), np.full_like(empty.values, np.nan))
        else:
            inputs[value.name] = np.ascontiguousarray(np.asarray(arrays[value.name], np.int32))
    return inputs
