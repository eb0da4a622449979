"""Every compile compares its first layer: where layers end is found by structure, and a wrong recogniser is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from kernel_harness import CACHE
from pass_harness import param
from tiny_models import make_tiny

from llmc.compiler import check_layer
from llmc.compiler import passes as _registered  # noqa: F401
from llmc.compiler.check_layer import LayerCheck, check_first_layer, cuts
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import llm
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.fuse_norm import FuseNorm
from llmc.compiler.passes.manager import Pass, Report, parse_pipeline
from llmc.compiler.pipeline import compile_model, pipeline_text
from llmc.compiler.scenario import random_params
from llmc.errors import CompileError

S = symbol("S", 2, 1024)
IDS, POSITIONS = (Input(name, Tensor((1, S), "i32")) for name in ("ids", "positions"))
WIDTH = 16
PLAIN = parse_pipeline(pipeline_text(CompileOptions(quantization="none")))


def linear(x: Value, name: str, outputs: int = WIDTH) -> Value:
    return s.Matmul(x, s.Transpose(param(name, outputs, WIDTH), (1, 0)))


def layer(x: Value, at: int, window: int = 0) -> Value:
    """Attention and an MLP, each behind a norm and beside the residual."""

    def norm(x: Value, name: str) -> Value:
        spread = s.Mean(e.Mul(x, x), (-1,))
        return e.Mul(param(name, WIDTH), e.Mul(x, e.Rsqrt(e.Add(spread, e.constant(1e-5, "f32")))))

    h = norm(x, f"{at}.norm1")
    q, k, v = (s.Reshape(linear(h, f"{at}.{name}"), (1, S, 2, 8)) for name in "qkv")
    attended = s.Reshape(llm.Attention(q, k, v, scale=0.5, window=window), (1, S, WIDTH))
    x = e.Add(x, linear(attended, f"{at}.o"))
    h = norm(x, f"{at}.norm2")
    return e.Add(x, linear(e.Tanh(linear(h, f"{at}.up")), f"{at}.down"))


def decoder(layers: int = 3, window: int = 0) -> Graph:
    x: Value = e.Cast(s.Gather(param("embed", 33, WIDTH), IDS, 0), "f32")
    x = e.Add(x, s.Gather(param("position", 1024, WIDTH), POSITIONS, 0))
    for at in range(layers):
        x = layer(x, at, window)
    return Graph("decoder", (IDS, POSITIONS), (("logits", linear(x, "head", 33)),))


@dataclass(frozen=True)
class Wrong(Pass):
    """Believes in another window, a softcap, a scale or an eps."""

    name: ClassVar[str] = "wrong"
    what: str = ""
    value: float = 0.0

    def run(self, graph: Graph, report: Report) -> Graph:
        def rule(op: Op) -> Value | None:
            if op.attributes().get(self.what, self.value) == self.value:
                return None
            return op.replace(**{self.what: int(self.value) if self.what == "window" else self.value})

        return rewrite(graph, rule)


def check(graph: Graph, *extra: Pass, seed: int = 0) -> LayerCheck:
    return check_first_layer(graph, [*PLAIN[:15], *extra, *PLAIN[15:]], random_params(graph), 1024, seed)


def test_the_cut_lies_between_the_first_attention_and_the_second() -> None:
    graph = decoder()
    _, value = cuts(graph)[0]
    names = {p.name for p in graph.replace_outputs((("y", value),)).params}
    assert {"embed", "0.q", "0.o", "0.up", "0.down"} <= names
    assert not any(name.startswith(("1.q", "1.o", "2.", "head")) for name in names)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_a_sound_compile_is_compared_at_any_depth(layers: int) -> None:
    found = check(decoder(layers))
    assert not found.skipped and found.differences and max(found.differences) < 1e-12
    assert "289" in str(found)


@pytest.mark.parametrize(
    ("window", "wrong"),
    [
        (0, Wrong("window", 8)), (0, Wrong("window", 32)), (0, Wrong("window", 128)), (0, Wrong("window", 250)),
        (300, Wrong("window", 301)), (300, Wrong("window", 0)), (700, Wrong("window", 699)),
        (0, Wrong("scale", 0.5001)), (0, Wrong("softcap", 50.0)), (0, Wrong("eps", 1.1e-5)),
        (0, Wrong("causal", False)),
    ],
)  # fmt: skip
def test_a_wrong_belief_is_named_wherever_it_begins_to_matter(window: int, wrong: Wrong) -> None:
    with pytest.raises(CompileError, match=r"first layer as recognised .*: pass wrong\{what=.* changed what"):
        check(decoder(2, window), wrong)


def test_what_an_inexact_pass_rounds_is_no_difference() -> None:
    graph = decoder(1)
    passes = parse_pipeline(pipeline_text(CompileOptions(quantization="int8")))
    found = check_first_layer(graph, passes, random_params(graph), 1024)
    assert len(found.differences) > 1 and max(found.differences) < 1e-7


def test_a_layer_that_costs_too_much_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_layer, "BUDGET", 3e6)
    shorter = check(decoder())
    assert not shorter.skipped and "not of 289: " in str(shorter)
    monkeypatch.setattr(check_layer, "BUDGET", 10)
    assert "more than two seconds" in check(decoder()).skipped


def test_large_tables_of_tokens_are_read_in_part() -> None:
    table = Param("embed", Tensor((200_000, WIDTH), "bf16"))
    graph = Graph("g", (IDS, POSITIONS), (("logits", layer(e.Cast(s.Gather(table, IDS, 0), "f32"), 0)),))
    weights, sizes = random_params(graph), []

    def load(name: str) -> np.ndarray:
        if name != "embed":
            return np.asarray(weights(name))
        sizes.append(name)
        return np.broadcast_to(np.asarray(weights("0.norm1")), (200_000, WIDTH))

    assert not check_first_layer(graph, PLAIN, load, 1024).skipped and sizes


def test_graphs_of_arrays_are_compared_too() -> None:
    n = symbol("n", 1, 300)
    x = Input("x", Tensor((n, 8), "f32"))
    spread = s.Mean(e.Mul(x, x), (-1,))
    y = e.Mul(x, e.Rsqrt(e.Add(spread, e.constant(1e-5, "f32"))))
    shares = s.Softmax(s.Matmul(y, s.Transpose(y, (1, 0))), 1)
    graph = Graph("g", (x,), (("y", s.Matmul(shares, y)),))
    passes = parse_pipeline(pipeline_text(CompileOptions(quantization="none"), "run"))
    assert not check_first_layer(graph, passes, random_params(graph), 1).skipped
    with pytest.raises(CompileError, match="pass wrong"):
        check_first_layer(graph, [*passes[:8], Wrong("eps", 0.1), *passes[8:]], random_params(graph), 1)


def test_a_layer_that_does_not_evaluate_is_skipped() -> None:
    """Indices that random inputs put beyond a table say nothing of the passes."""
    beyond = s.Gather(param("t", 3, 16), e.Add(IDS, e.constant(9, "i32")), 0)
    graph = Graph("g", (IDS, POSITIONS), (("logits", e.Add(beyond, s.Gather(param("u", 9, 16), IDS, 0))),))
    assert "does not evaluate" in check_first_layer(graph, PLAIN, random_params(graph), 64).skipped


def test_a_wrong_recogniser_fails_every_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FuseNorm.run

    def wrong(self: FuseNorm, graph: Graph, report: Report) -> Graph:
        return rewrite(
            right(self, graph, report), lambda op: op.replace(eps=1e-3) if isinstance(op, llm.RMSNorm) else None
        )

    monkeypatch.setattr(FuseNorm, "run", wrong)
    model = make_tiny("llama", tmp_path / "llama", num_hidden_layers=1)
    with pytest.raises(CompileError, match=r"the first layer as recognised .*: pass fuse-norm changed"):
        compile_model(str(model), tmp_path / "model.so", CompileOptions(quantization="none", kernel_cache=CACHE))
    assert not (tmp_path / "model.so").exists()
