"""Text models whose scores, masks and biases are of every kind: recognised as what they are, or kept as they are.

Each model is lifted, goes through all passes, and is evaluated at 300 tokens, in pieces where it has a cache, beside
onnxruntime. What it is recognised as is part of the test.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from attention_harness import run_steps
from kernel_harness import CACHE
from onnx import TensorProto
from scored_models import LEAST, VOCABULARY, Scored, Scores, softmax, whole, write_scored
from small_encoder import step_inputs

from llmc.compiler.ir.attention import Attention, PagedAttention
from llmc.compiler.ir.elementwise import Constant
from llmc.compiler.ir.evaluate import Data, evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import Array, precise
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model, run_pipeline
from llmc.frontends import Lifted, lift
from llmc.runtime.runtime import Runtime

TOKENS, CONTEXT = 300, 512
IDS = np.random.default_rng(7).integers(0, VOCABULARY, TOKENS)
# f32 in another order, of logits of about 3.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """Scores, and what becomes of them: causal, window W, slopes, table (all with a cache), or a reason for refusing.

    encodes: the model is an encoder's; kinds are then all, band W and table. scale: of the weights. shares: what makes
    probabilities of scores. rounds: it rounds to halves, so that it is not evaluated in f64.
    """

    scores: Scores
    kind: str
    scale: float = 1.0
    encodes: bool = False
    shares: Scores = softmax
    rounds: bool = False


def masked(*conditions: object) -> Scores:
    """Scaled scores under a causal mask and more conditions, functions of the model."""
    return lambda g, raw: g.causal(g.scaled(raw), *(condition(g) for condition in conditions))  # type: ignore[operator]


def less(g: Scored, x: str, number: object) -> str:
    return g.add("Less", x, number)


def far(g: Scored) -> str:
    """The distance as a float [1, S, S]."""
    return g.add("Unsqueeze", g.floats(g.distance), whole(0))


def stored(change: object) -> Scores:
    """A stored triangle of 512 rows, changed somewhere, sliced to the sequence."""
    table = np.tril(np.ones((CONTEXT, CONTEXT), bool))
    change(table)  # type: ignore[operator]

    def scores(g: Scored, raw: str) -> str:
        end = g.add("Unsqueeze", g.size, whole(0))
        rows = g.add("Slice", table, whole(0), end, whole(0))
        return g.hide(g.add("Slice", rows, whole(0), end, whole(1)), g.scaled(raw), -1e9)

    return scores


def image(table: Array) -> None:
    table[20:40, 20:40] = True


def hole(table: Array) -> None:
    table[100:120, 3] = False


def band(table: Array) -> None:
    table &= ~np.tril(np.ones_like(table), -40)


def logn(g: Scored) -> str:
    """[S, 1]: log-n factors of queries beyond 64."""
    count = g.add("Log", g.floats(g.add("Add", g.q, np.int64(1))))
    return g.add("Max", g.add("Div", count, np.float32(np.log(64.0))), np.float32(1.0))


def clamped(least: float) -> Scores:
    def scores(g: Scored, raw: str) -> str:
        sloped = g.add("Mul", far(g), np.array([[[-0.125]], [[-0.0625]]], np.float32))
        return g.causal(g.add("Add", g.scaled(raw), g.add("Max", sloped, np.float32(least))))

    return scores


def alibi_by_key(g: Scored, raw: str) -> str:
    sloped = g.add("Mul", g.floats(g.k), np.array([[[0.125]], [[0.0625]]], np.float32))
    return g.causal(g.add("Add", g.scaled(raw), sloped))


def by_distance(g: Scored, raw: str) -> str:
    """Scores over 1 for near keys, over 2 for far ones."""
    over = g.add("Clip", g.add("Mul", g.floats(g.distance), np.float32(1 / 64)), np.float32(1), np.float32(2))
    return g.causal(g.add("Div", g.scaled(raw), over))


def threshold(g: Scored, raw: str) -> str:
    scores = g.scaled(raw)
    return g.causal(g.add("Where", g.add("Less", scores, np.float32(-3)), np.float32(-1e9), scores))


def multiplied(g: Scored, raw: str) -> str:
    """GPT-2's first way: scores * mask - 1e10 * (1 - mask)."""
    mask = g.floats(g.seen())
    hidden = g.add("Mul", g.add("Sub", np.float32(1), mask), np.float32(1e10))
    return g.add("Sub", g.add("Mul", g.scaled(raw), mask), hidden)


def bounded_below(least: float) -> Scores:
    """OPT's way: a mask is added, and what overflows is lifted to the least number."""

    def scores(g: Scored, raw: str) -> str:
        added = g.add("Where", g.seen(), np.float32(0), LEAST)
        return g.add("Max", g.add("Add", g.scaled(raw), added), np.float32(least))

    return scores


def by_quotient(g: Scored) -> str:
    return less(g, g.add("Sub", *(g.add("Div", x, np.int64(32)) for x in (g.q, g.k))), np.int64(4))


def encoder_mask(g: Scored, raw: str, seen: str) -> str:
    return g.hide(seen, g.scaled(raw), -1e9)


def apart(g: Scored) -> str:
    return g.add("Abs", g.floats(g.distance))


def streaming(g: Scored, raw: str) -> str:
    chunks = g.add("Sub", *(g.add("Div", x, np.int64(32)) for x in (g.q, g.k)))
    return encoder_mask(
        g, raw, g.add("And", g.add("GreaterOrEqual", chunks, np.int64(0)), g.add("LessOrEqual", chunks, np.int64(2)))
    )


def log_bias(g: Scored, raw: str) -> str:
    grown = g.add("Min", g.add("Log", g.add("Add", apart(g), np.float32(1))), np.float32(4))
    return g.add("Sub", g.scaled(raw), grown)


def far_key(g: Scored, raw: str) -> str:
    """A bias by distance, and 5 more for key 137."""
    grown = g.add("Neg", g.add("Log", g.add("Add", apart(g), np.float32(1))))
    more = g.add("Where", g.add("Equal", g.k, np.int64(137)), g.add("Add", grown, np.float32(5)), grown)
    return g.add("Add", g.scaled(raw), more)


def global_first(g: Scored, raw: str) -> str:
    """A band of 16, and token 0 sees all and is seen by all."""
    first = g.add("Or", *(g.add("Equal", x, np.int64(0)) for x in (g.q, g.k)))
    return encoder_mask(g, raw, g.add("Or", less(g, g.add("Abs", g.distance), np.int64(16)), first))


def by_length(g: Scored, raw: str) -> str:
    """Scores times log(S) / log(64) of more than 64 tokens."""
    grown = g.add("Div", g.add("Log", g.floats(g.size)), np.float32(np.log(64.0)))
    return g.causal(g.add("Mul", g.scaled(raw), g.add("Max", grown, np.float32(1))))


def none_from_100(g: Scored, scores: str) -> str:
    """Probabilities that are zero for queries from 100 on."""
    return g.add("Where", g.add("GreaterOrEqual", g.q, np.int64(100)), np.float32(0), softmax(g, scores))


def in_bf16(g: Scored, x: str) -> str:
    """Numbers as bf16 counts: each to 256, every other one to 512."""
    return g.floats(g.add("Cast", x, to=TensorProto.BFLOAT16))


WINDOWS = np.array([16, 64], np.int64).reshape(2, 1, 1)
UNLIKE, NOT_CAUSAL = "not decided by the distance", "the mask is not causal"
NOT_WINDOW, NO_SLOPE = "not causal with a window of 38", "which is no slope times a distance"
CASES = {
    "plain": Case(masked(), "causal"),
    "clipped": Case(lambda g, x: g.causal(g.add("Clip", g.scaled(x), np.float32(-4), np.float32(4))), "t.maximum", 3.0),
    "clipped above": Case(lambda g, x: g.causal(g.add("Min", g.scaled(x), np.float32(9))), "t.minimum", 3.0),
    "threshold": Case(threshold, "t.lt compares its scores", 1.5),
    "leaky": Case(lambda g, x: g.causal(g.add("LeakyRelu", g.scaled(x), alpha=0.5)), "t.", 1.5),
    "squared": Case(lambda g, x: g.causal(g.add("Mul", g.scaled(x), x)), "meet themselves"),
    "per-head windows": Case(masked(lambda g: less(g, g.distance, WINDOWS)), "table"),
    "block-local": Case(masked(by_quotient), NOT_CAUSAL),
    "float window": Case(masked(lambda g: less(g, g.floats(g.distance), np.float32(64))), "window 64"),
    "window by a fraction": Case(
        masked(lambda g: less(g, g.add("Div", g.floats(g.distance), np.float32(128)), np.float32(1))), "window 128"
    ),
    "window by thirds": Case(
        masked(lambda g: less(g, g.add("Div", g.floats(g.distance), np.float32(3)), np.float32(33.5))), "window 101"
    ),
    "window by a square": Case(
        masked(lambda g: less(g, g.add("Mul", g.distance, g.distance), np.int64(20000))), "window 142"
    ),
    "window that a remainder makes": Case(
        masked(lambda g: less(g, g.add("Sub", g.distance, g.add("Mod", g.distance, np.int64(7))), np.int64(50))),
        "window 56",
    ),
    "window or never": Case(
        masked(lambda g: g.add("Or", less(g, g.distance, np.int64(16)), g.add("Equal", g.k, np.int64(-1)))), "window 16"
    ),
    "causal by its quotients too": Case(
        masked(lambda g: g.add("GreaterOrEqual", *(g.add("Div", x, np.int64(32)) for x in (g.q, g.k)))), "causal"
    ),
    "before the end": Case(masked(lambda g: less(g, g.k, g.size)), "causal"),
    "the last hundred": Case(masked(lambda g: less(g, g.add("Sub", g.size, g.k), np.int64(150))), UNLIKE),
    "clamped ALiBi": Case(clamped(-4.5), "table"),
    "ALiBi clamped far": Case(clamped(-20.0), "table"),
    "ALiBi clamped beyond the context": Case(clamped(-1e3), "slopes"),
    "ALiBi by key": Case(alibi_by_key, "slopes"),
    "dilated": Case(
        masked(
            lambda g: g.add(
                "Or",
                less(g, g.distance, np.int64(8)),
                g.add("Equal", g.add("Mod", g.distance, np.int64(4)), np.int64(0)),
            )
        ),
        "table",
    ),
    "chunks": Case(masked(lambda g: g.add("Equal", *(g.add("Div", x, np.int64(64)) for x in (g.q, g.k)))), NOT_CAUSAL),
    "global keys": Case(
        masked(
            lambda g: g.add(
                "Or",
                less(g, g.distance, np.int64(16)),
                g.add("Equal", g.add("Mul", g.k, np.int64(3)), np.int64(150)),
            )
        ),
        NOT_CAUSAL,
    ),
    "global keys by a remainder": Case(
        masked(
            lambda g: g.add(
                "Or",
                less(g, g.distance, np.int64(16)),
                g.add("Equal", g.add("Mod", g.k, np.int64(50)), np.int64(0)),
            )
        ),
        NOT_CAUSAL,
    ),
    "no probabilities from 100 on": Case(masked(), "set to zero in rows that see keys", shares=none_from_100),
    "log-n": Case(lambda g, x: g.causal(g.add("Mul", g.scaled(x), logn(g))), "causal", 1.5),
    "log-n that divides": Case(lambda g, x: g.causal(g.add("Div", g.scaled(x), logn(g))), "causal", 1.5),
    "scale by head": Case(lambda g, x: g.causal(g.add("Mul", x, np.array([[[0.3]], [[0.5]]], np.float32))), "causal"),
    "scale by distance": Case(by_distance, "scale differs from place to place", 1.5),
    "stored": Case(stored(lambda table: None), "causal"),
    "stored band": Case(stored(band), "window 40"),
    "stored with an image": Case(stored(image), NOT_CAUSAL),
    "stored with a hole": Case(stored(hole), NOT_CAUSAL),
    "softcap": Case(lambda g, x: g.causal(g.add("Mul", g.add("Tanh", g.scaled(x, 0.1)), np.float32(5))), "causal", 2.0),
    "tanh of masked scores": Case(lambda g, x: g.add("Tanh", g.causal(g.scaled(x))), "masked already"),
    "strictly causal": Case(
        lambda g, x: g.hide(less(g, g.k, g.q), g.scaled(x), -1e9), "hides from a query the key at its own place"
    ),
    "hidden by a number that does not hide": Case(
        lambda g, x: g.hide(g.seen(), g.scaled(x), -7.0), "t.where puts a number"
    ),
    "replaced by a bias": Case(lambda g, x: g.hide(g.seen(), g.scaled(x), 0.0), "t.where puts a number"),
    "multiplied": Case(multiplied, "causal"),
    "lifted to the least": Case(bounded_below(float(LEAST)), "causal"),
    "lifted higher": Case(bounded_below(-4.0), "t.maximum", 3.0),
    "half of it in f16": Case(
        lambda g, x: g.causal(
            g.scaled(x), g.add("LessOrEqual", *(g.add("Cast", y, to=TensorProto.FLOAT16) for y in (g.k, g.q)))
        ),
        "causal",
    ),
    "window counted in bf16": Case(
        masked(lambda g: less(g, g.add("Sub", *(in_bf16(g, y) for y in (g.q, g.k))), np.float32(40))),
        NOT_WINDOW,
        rounds=True,
    ),
    "ALiBi in bf16": Case(
        lambda g, x: g.causal(g.add("Add", g.scaled(x), in_bf16(g, g.add("Mul", g.floats(g.k), np.float32(0.5))))),
        NO_SLOPE,
        rounds=True,
    ),
    "encoder": Case(lambda g, x: g.scaled(x), "all", encodes=True),
    "encoder, band by a fraction": Case(
        lambda g, x: encoder_mask(g, x, less(g, g.add("Div", apart(g), np.float32(64)), np.float32(1))),
        "band 64",
        encodes=True,
    ),
    "encoder, band ahead": Case(
        lambda g, x: encoder_mask(g, x, less(g, g.add("Sub", g.k, g.q), np.int64(3))), "table", encodes=True
    ),
    "encoder, chunks": Case(streaming, "neither causal nor a window", encodes=True),
    "encoder, token 0 sees all": Case(global_first, "neither causal nor a window", encodes=True),
    "encoder, bias by logarithm": Case(log_bias, "table", encodes=True),
    "encoder, bias at one key": Case(far_key, "no slope times a distance", encodes=True),
}

# What tokens that come later change in every row: each step computes the whole text.
WHOLE = {
    "scale by length": Case(by_length, "causal", 1.5),
    "softmax over heads": Case(masked(), "none", shares=lambda g, x: g.add("Softmax", x, axis=1)),
    "softmax over queries": Case(masked(), "none", shares=lambda g, x: g.add("Softmax", x, axis=2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scored")


def model_of(name: str, folder: Path) -> Path:
    case = (CASES | WHOLE)[name]
    path = folder / f"{name.replace(' ', '-')}.onnx"
    return (
        path
        if path.exists()
        else write_scored(path, case.scores, decodes=not case.encodes, scale=case.scale, shares=case.shares)
    )


def original(path: Path, ids: Array = IDS) -> Array:
    """onnxruntime's output [tokens, width]."""
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input_ids": ids[None]})
    assert isinstance(found[0], np.ndarray)
    return found[0][0]


def kind_of(op: Attention | PagedAttention) -> str:
    """What a recognised attention is called in CASES."""
    if op.bias is not None:
        return "table"
    if op.slopes is not None:
        assert isinstance(op.slopes, Constant)
        return "slopes"
    if op.window:
        return f"{'window' if op.causal else 'band'} {op.window}"
    return "causal" if op.causal else "all"


@pytest.mark.parametrize("name", CASES)
def test_scores_are_recognised_as_what_they_are_or_kept(name: str, folder: Path) -> None:
    case, path = CASES[name], model_of(name, folder)
    lifted = lift(path, max_context=CONTEXT)
    compiled = run_pipeline(lifted.graph, CompileOptions(quantization="none"), load=lifted.load, task=lifted.task)
    (report,) = [report for report in compiled.reports if report.name == "fuse-attention"]
    found = [op for op in compiled.graph.ops if isinstance(op, (Attention, PagedAttention))]
    if found:
        assert {kind_of(op) for op in found} == {case.kind} and not report.refusals
        assert all(isinstance(op, PagedAttention) for op in found), "a cache, or sequences of an encoder in one step"
    else:
        assert case.kind in report.refusals[0][1]
    np.testing.assert_allclose(
        evaluated(lifted, compiled.graph, not case.rounds), original(path), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", WHOLE)
def test_what_later_tokens_change_keeps_no_cache(name: str, folder: Path) -> None:
    path = model_of(name, folder)
    lifted = lift(path, max_context=CONTEXT)
    compiled = run_pipeline(lifted.graph, CompileOptions(quantization="none"), load=lifted.load, task=lifted.task)
    assert {kind_of(op) for op in compiled.graph.ops if isinstance(op, Attention)} <= {WHOLE[name].kind}
    assert not any(isinstance(op, PagedAttention) for op in compiled.graph.ops)
    assert any(report.name == "whole-sequence" and report.refusals for report in compiled.reports)
    wanted = original(path)
    # Shares over heads do not add up to 1: logits grow with the keys.
    np.testing.assert_allclose(
        evaluated(lifted, compiled.graph), wanted, rtol=0, atol=TOLERANCE * max(1, np.abs(wanted).max() / 3)
    )


def evaluated(lifted: Lifted, graph: Graph, exact: bool = True) -> Array:
    """The recognised graph's output for IDS [tokens, width]; of a decoder with a cache, in pieces."""
    names = {value.name for value in graph.inputs}
    if "slots" in names and "starts" not in names:
        return run_steps(graph, lifted.load, [IDS.tolist()], [[(0, 1)], [(0, 130)], [(0, 33)], [(0, 136)]])[0]
    at = np.arange(TOKENS, dtype=np.int32)
    given: dict[str, Data] = {"ids": IDS[None].astype(np.int32), "positions": at[None], "rows": at}
    if "starts" in names:
        given = step_inputs(graph, [(IDS.tolist(), [0] * TOKENS)])
    with precise() if exact else nullcontext():
        found = evaluate(graph, {name: given[name] for name in names}, lifted.load)
    return np.asarray(next(iter(found.values()))).reshape(TOKENS, -1)


def test_every_kind_of_way_is_covered() -> None:
    kinds = {case.kind.split()[0] for case in CASES.values()}
    assert kinds >= {"causal", "window", "slopes", "table", "all", "band"}


# One of each way in which kernels compute them.
COMPILED = ("per-head windows", "clamped ALiBi", "log-n", "clipped", "encoder, bias by logarithm")


@pytest.mark.parametrize("name", COMPILED)
def test_artifacts_say_what_onnxruntime_says(name: str, folder: Path, tmp_path: Path) -> None:
    path = model_of(name, folder)
    options = CompileOptions(quantization="none", max_context=CONTEXT, kernel_cache=CACHE)
    compile_model(str(path), tmp_path / "model.so", options)
    runtime = Runtime.load(tmp_path / "model.so", threads=2)
    if CASES[name].encodes:
        (found,) = runtime.encode([IDS.tolist()])
        assert isinstance(found, dict)
        np.testing.assert_allclose(found["last_hidden_state"], original(path), rtol=0, atol=TOLERANCE)
        return
    sequence = runtime.sequence()
    pieces = [runtime.step([(sequence, piece.tolist(), "all")]) for piece in np.split(IDS, (1, 130, 163))]
    np.testing.assert_allclose(np.concatenate(pieces), original(path), rtol=0, atol=TOLERANCE)
