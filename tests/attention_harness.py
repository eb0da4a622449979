"""Small decoder graphs as a frontend lifts them, and a scheduler that runs flattened graphs over mixed sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Activation, Add, Cast, Cos, Mul, Neg, Rsqrt, Sin, constant
from llmc.compiler.ir.encoded import PAGE, Pages
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention, Linear
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Gather, Mean, Reshape, Slice, Transpose
from llmc.compiler.ir.types import KV, Array, Tensor, numpy_dtype, precise

S = symbol("S", 2, 64)
VOCABULARY, HEADS, KV_HEADS, DIM = 29, 4, 2, 8
HIDDEN = HEADS * DIM
LoadParam = Callable[[str], Array]


def weight(name: str, *shape: int) -> Param:
    return Param(name, Tensor(shape, "f32"))


def random_weights(graph: Graph, seed: int = 0) -> LoadParam:
    """Weights of unit scale per output for every param of a graph."""
    values = {}
    for param in graph.params:
        generator = np.random.default_rng([seed, *param.name.encode()])
        shape = tuple(int(dim) for dim in param.shape)
        values[param.name] = generator.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 1.0)
    return lambda name: values[name].astype(numpy_dtype("f32"))


def norm(x: Value, name: str) -> Value:
    mean = Mean(Mul(x, x), (x.rank - 1,))
    return Mul(Mul(x, Rsqrt(Add(mean, constant(1e-6)))), weight(name, int(x.shape[-1])))


def split_heads(x: Value, heads: int, dim: int = DIM) -> Value:
    """[1, S, heads * dim] -> [1, heads, S, dim]"""
    return Transpose(Reshape(x, (1, S, heads, dim)), (0, 2, 1, 3))


def frequencies(pairs: int, base: float = 10000.0) -> Array:
    return (base ** (-np.arange(pairs) / pairs)).astype(np.float32)


def half_cos_sin(positions: Value, values: Array, scale: float = 1.0) -> tuple[Value, Value]:
    """cos and sin [1, S, 2 * pairs] of cat(freqs, freqs), as transformers writes them."""
    inverse = constant(values, "f32")
    column = Reshape(Cast(positions, "f32"), (1, S, 1))
    angles = Mul(column, Reshape(inverse, (1, 1, len(values))))
    both = Concat((angles, angles), 2)
    if scale == 1.0:
        return Cos(both), Sin(both)
    return Mul(Cos(both), constant(scale)), Mul(Sin(both), constant(scale))


def rotate_half(x: Value) -> Value:
    dim = int(x.shape[-1])
    last = x.rank - 1
    return Concat((Neg(Slice(x, last, dim // 2, dim)), Slice(x, last, 0, dim // 2)), last)


def apply_half(x: Value, cos: Value, sin: Value) -> Value:
    """Rotary embedding of x [1, heads, S, dim] by cos and sin [1, S, dim]."""
    shape = (1, 1, S, int(x.shape[-1]))
    return Add(Mul(x, Reshape(cos, shape)), Mul(rotate_half(x), Reshape(sin, shape)))


Attend = Callable[[Value, Value, Value, Input], Value]
Rotate = Callable[[Value, Input], Value]


def captured(q: Value, k: Value, v: Value, positions: Input) -> Value:
    """llm.attention of q, k, v [1, heads, S, dim]; [1, S, heads, dim]."""
    q, k, v = (Transpose(x, (0, 2, 1, 3)) for x in (q, k, v))
    return Attention(q, k, v, scale=DIM**-0.5)


def no_rotation(x: Value, positions: Input) -> Value:
    return x


def half_rotation(x: Value, positions: Input) -> Value:
    return apply_half(x, *half_cos_sin(positions, frequencies(DIM // 2)))


def decoder(
    rotate: Rotate = half_rotation, attend: Attend = captured, layers: int = 2, kv_heads: int = KV_HEADS
) -> Graph:
    """A llama-like decoder over ids and positions [1, S] with the given rotation and attention."""
    ids = Input("ids", Tensor((1, S), "i32"))
    positions = Input("positions", Tensor((1, S), "i32"))
    x: Value = Gather(weight("embed", VOCABULARY, HIDDEN), ids, 0)
    for i in range(layers):
        h = norm(x, f"{i}.norm")
        q = split_heads(Linear(h, weight(f"{i}.q", HIDDEN, HIDDEN)), HEADS)
        k = split_heads(Linear(h, weight(f"{i}.k", kv_heads * DIM, HIDDEN)), kv_heads)
        v = split_heads(Linear(h, weight(f"{i}.v", kv_heads * DIM, HIDDEN)), kv_heads)
        a = attend(rotate(q, positions), rotate(k, positions), v, positions)
        x = Add(x, Linear(Reshape(a, (1, S, HIDDEN)), weight(f"{i}.o", HIDDEN, HIDDEN)))
        h = norm(x, f"{i}.mlp_norm")
        up = Mul(
            Activation(Linear(h, weight(f"{i}.gate", 40, HIDDEN)), "silu"), Linear(h, weight(f"{i}.up", 40, HIDDEN))
        )
        x = Add(x, Linear(up, weight(f"{i}.down", HIDDEN, 40)))
    logits = Linear(norm(x, "norm"), weight("embed", VOCABULARY, HIDDEN))
    return Graph("main", (ids, positions), (("logits", logits),))


def repeat_kv(x: Value, groups: int) -> Value:
    """[1, kv_heads, S, dim] -> [1, kv_heads * groups, S, dim], each head `groups` times in a row."""
    kv_heads, dim = int(x.shape[1]), int(x.shape[3])
    wide = Broadcast(Reshape(x, (1, kv_heads, 1, S, dim)), (1, kv_heads, groups, S, dim))
    return Reshape(wide, (1, kv_heads * groups, S, dim))


def run_sequence(graph: Graph, load: LoadParam, tokens: Sequence[int], positions: Sequence[int] | None = None) -> Array:
    """Logits [S, vocabulary], in f64, of one sequence in a graph over [1, S]."""
    at = np.arange(len(tokens)) if positions is None else np.asarray(positions)
    inputs = {"ids": np.asarray([tokens], np.int32), "positions": at[None].astype(np.int32)}
    given = {value.name: inputs[value.name] for value in graph.inputs}
    with precise():
        return np.asarray(evaluate(graph, given, load)["logits"])[0]


Step = Sequence[tuple[int, int]]  # (sequence, number of its next tokens) in the order of the step's rows


def run_steps(
    graph: Graph, load: LoadParam, sequences: Sequence[Sequence[int]], steps: Sequence[Step], tile: int = 16
) -> list[Array]:
    """Logits [length, vocabulary] of every sequence, in f64, from a paged graph that is run in the given steps."""
    needed = [-(-len(tokens) // PAGE) for tokens in sequences]
    # Pages in an order that no bug would guess: from the last one down, sequences interleaved.
    free = list(range(sum(needed) + 3))[::-1]
    pages: list[list[int]] = [[] for _ in sequences]
    for round_ in range(max(needed)):
        for sequence, count in enumerate(needed):
            if round_ < count:
                pages[sequence].append(free.pop(0))
    table = np.zeros((len(sequences), max(needed)), np.int32)
    for sequence, own in enumerate(pages):
        table[sequence, : len(own)] = own
    done = [0] * len(sequences)
    logits: list[list[Array]] = [[] for _ in sequences]
    with precise():
        caches = {v.name: Pages.empty(v.type, sum(needed) + 3) for v in graph.inputs if isinstance(v.type, KV)}
        for step in steps:
            ids, positions, slots, tiles, owners = [], [], [], [], []
            for sequence, count in step:
                for begin in range(0, count, tile):
                    rows = min(tile, count - begin)
                    tiles.append((sequence, len(ids) + begin, rows, done[sequence] + begin))
                at = np.arange(done[sequence], done[sequence] + count)
                ids += list(sequences[sequence][done[sequence] : done[sequence] + count])
                positions += at.tolist()
                slots += [table[sequence, p // PAGE] * PAGE + p % PAGE for p in at]
                owners += [sequence] * count
                done[sequence] += count
            inputs = {
                "ids": np.asarray(ids, np.int32),
                "positions": np.asarray(positions, np.int32),
                "slots": np.asarray(slots, np.int32),
                "tiles": np.asarray(tiles, np.int32),
                "block_table": table,
                "rows": np.arange(len(ids), dtype=np.int32),
                **caches,
            }
            outputs = evaluate(graph, {value.name: inputs[value.name] for value in graph.inputs}, load)
            caches = {name: outputs[f"{name}.next"] for name in caches}
            for row, owner in zip(np.asarray(outputs["logits"]), owners, strict=True):
                logits[owner].append(row)
    return [np.stack(rows) for rows in logits]
