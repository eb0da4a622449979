"""The memory estimate: bytes by part, counted once, from the graph alone."""

from __future__ import annotations

import pytest

from llmc.compiler.estimate import GROUPS, LIBRARY_BYTES, estimate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.text import parse
from llmc.compiler.passes.fuse_epilogues import FuseEpilogues
from llmc.compiler.passes.manager import run_passes
from llmc.compiler.passes.merge_projections import MergeProjections
from llmc.compiler.passes.quantize import QuantizeWeights
from llmc.errors import IRError

VOCABULARY, HIDDEN, HEADS, DIM, MLP = 101, 64, 2, 32, 96

TEXT = """
graph @main {B in [1, inf], M in [1, inf], Q in [1, inf], T in [1, 512]} (
    %ids: tensor<[T], i32>, %slots: tensor<[T], i32>, %tiles: tensor<[Q, 4], i32>,
    %block_table: tensor<[B, M], i32>, %cache.0: kv<2, 32, 32, f16>) {
  @embed: tensor<[101, 64], bf16>
  @norm: tensor<[64], f32>
  @q: tensor<[64, 64], bf16>
  @k: tensor<[64, 64], bf16>
  @v: tensor<[64, 64], bf16>
  @k.bias: tensor<[64], f32>
  @o: tensor<[64, 64], bf16>
  @gate: tensor<[96, 64], bf16>
  @up: tensor<[96, 64], bf16>
  @down: tensor<[64, 96], bf16>
  %0 = llm.embed(@embed, %ids) : tensor<[T, 64], f32>
  %1 = llm.rms_norm(%0, @norm) {eps = 0.01} : tensor<[T, 64], f32>
  %2 = llm.linear(%1, @q, none, none) : tensor<[T, 64], f32>
  %3 = llm.linear(%1, @k, @k.bias, none) : tensor<[T, 64], f32>
  %4 = llm.linear(%1, @v, none, none) : tensor<[T, 64], f32>
  %5 = t.reshape(%2) {to = [T, 2, 32]} : tensor<[T, 2, 32], f32>
  %6 = t.reshape(%3) {to = [T, 2, 32]} : tensor<[T, 2, 32], f32>
  %7 = t.reshape(%4) {to = [T, 2, 32]} : tensor<[T, 2, 32], f32>
  %8 = llm.kv_append(%cache.0, %6, %7, %slots) : kv<2, 32, 32, f16>
  %9 = llm.paged_attention(%5, %8, %tiles, %block_table, none, none, none, none) : tensor<[T, 2, 32], f32>
  %10 = t.reshape(%9) {to = [T, 64]} : tensor<[T, 64], f32>
  %11 = llm.linear(%10, @o, none, none) : tensor<[T, 64], f32>
  %12 = t.add(%0, %11) : tensor<[T, 64], f32>
  %13 = llm.linear(%12, @gate, none, none) : tensor<[T, 96], f32>
  %14 = t.activation(%13) {kind = "silu"} : tensor<[T, 96], f32>
  %15 = llm.linear(%12, @up, none, none) : tensor<[T, 96], f32>
  %16 = t.mul(%14, %15) : tensor<[T, 96], f32>
  %17 = llm.linear(%16, @down, none, none) : tensor<[T, 64], f32>
  %18 = t.add(%12, %17) : tensor<[T, 64], f32>
  %19 = llm.linear(%18, HEAD, none, none) : tensor<[T, 101], f32>
  return logits = %19, cache.0.next = %8
}
"""
TIED = parse(TEXT.replace("HEAD", "@embed"))
UNTIED = parse(TEXT.replace("HEAD", "@head").replace("  %0 =", "  @head: tensor<[101, 64], bf16>\n  %0 =", 1))


def compiled(graph: Graph, scheme: str) -> Graph:
    return run_passes(graph, [MergeProjections(), QuantizeWeights(scheme=scheme), FuseEpilogues()])[0]


@pytest.mark.parametrize("merged", [False, True])
def test_bytes_by_part(merged: bool) -> None:
    graph = compiled(UNTIED, "bf16") if merged else UNTIED
    found = estimate(graph, context=100)
    bias = 4 * HIDDEN * (3 if merged else 1)  # merged: zeros for q and v
    assert found.weights == {
        "embedding": 2 * VOCABULARY * HIDDEN,
        "attention": 2 * 4 * HIDDEN * HIDDEN,
        "mlp": 2 * 3 * HIDDEN * MLP,
        "head": 2 * VOCABULARY * HIDDEN,
        "norms and biases": 4 * HIDDEN + bias,
        "other": 0,
    }
    assert tuple(found.weights) == GROUPS
    assert found.weight_bytes == sum(found.weights.values())
    assert found.file_bytes == found.weight_bytes + LIBRARY_BYTES
    assert found.read_per_token == found.weight_bytes - found.weights["embedding"]
    assert found.parameters == 2 * VOCABULARY * HIDDEN + 4 * HIDDEN**2 + 3 * HIDDEN * MLP + 2 * HIDDEN


def test_a_tied_table_counts_once_and_is_read_whole() -> None:
    found = estimate(compiled(TIED, "int4"), context=100)
    assert found.weights["head"] == 0
    assert found.weights["embedding"] == VOCABULARY * (HIDDEN * 6 // 8 + 2)
    assert found.tables == 0 and found.read_per_token == found.weight_bytes


def test_quantized_weights_count_scales_and_padding() -> None:
    found = estimate(compiled(UNTIED, "int4"), context=100)
    assert found.weights["attention"] == 4 * HIDDEN * (HIDDEN // 2 + 2)
    assert found.weights["embedding"] == VOCABULARY * (HIDDEN * 6 // 8 + 2)
    assert found.weights["head"] == VOCABULARY * (HIDDEN * 6 // 8 + 2)
    # down has 96 inputs: two groups of 64, the second half empty.
    assert found.weights["mlp"] == 2 * MLP * (HIDDEN // 2 + 2) + HIDDEN * 2 * 34
    assert found.bits_per_weight == pytest.approx(8 * found.weight_bytes / found.parameters)
    assert 4 < found.bits_per_weight < 8


@pytest.mark.parametrize(("context", "sequences", "tokens"), [(1, 1, 32), (32, 1, 32), (33, 1, 64), (33, 3, 192)])
def test_the_cache_is_counted_in_pages(context: int, sequences: int, tokens: int) -> None:
    found = estimate(TIED, context=context, sequences=sequences)
    assert found.cache_per_token == HEADS * (DIM + DIM) * 2
    assert found.cache == tokens * found.cache_per_token
    assert found.memory == found.weight_bytes + found.cache + found.arena


@pytest.mark.parametrize("step", [1, 7, 33, 512])
def test_the_arena_holds_the_fullest_moment(step: int) -> None:
    fused = compiled(UNTIED, "bf16")
    # The fullest moment is the residual with the merged q, k, v: [T, 64] and [T, 192], and what reads them.
    at_most = estimate(fused, context=512, step=step).arena
    assert at_most % (4 * step) == 0
    assert at_most // (4 * step) == 64 + 192 + 64
    # Fusing never needs more room.
    assert at_most <= estimate(UNTIED, context=512, step=step).arena


def test_a_step_is_no_longer_than_the_context() -> None:
    assert estimate(TIED, context=33, step=512).arena == estimate(TIED, context=33, step=33).arena
    assert estimate(TIED, context=33, step=66, sequences=2).arena == 2 * estimate(TIED, context=33).arena


def test_an_encoder_caches_a_step() -> None:
    scratch = TIED.replace_outputs([("embedding", TIED.output("logits"))])
    kept, held = estimate(TIED, context=512, sequences=100), estimate(scratch, context=512, sequences=100)
    assert held.cache_per_token == kept.cache_per_token
    assert held.cache == (512 // 32 + 100) * 32 * held.cache_per_token < kept.cache
    assert estimate(scratch, context=33).cache == estimate(TIED, context=33).cache


def test_sizes_of_a_graph_of_any_kind_are_the_greatest() -> None:
    graph = parse("""
    graph @main {batch in [0, 8], N in [1, 40]} (%x: tensor<[batch, N], f32>) {
      %0 = t.exp(%x) : tensor<[batch, N], f32>
      return y = %0
    }
    """)
    assert estimate(graph, context=1).arena == 8 * 40 * 4


def test_attention_without_a_cache_counts_as_f16() -> None:
    graph = parse("""
    graph @main {S in [2, 64]} (%x: tensor<[1, S, 4, 16], f32>, %k: tensor<[1, S, 2, 16], f32>) {
      %0 = llm.attention(%x, %k, %k, none, none, none) {scale = 0.25} : tensor<[1, S, 4, 16], f32>
      return a = %0
    }
    """)
    assert estimate(graph, context=64).cache_per_token == 2 * (16 + 16) * 2


def test_attention_that_was_not_recognised_still_counts_as_attention() -> None:
    graph = parse("""
    graph @main {S in [2, 64]} (%x: tensor<[S, 16], f32>) {
      @q: tensor<[16, 16], f32>
      @o: tensor<[16, 16], f32>
      @up: tensor<[48, 16], f32>
      %0 = llm.linear(%x, @q, none, none) : tensor<[S, 16], f32>
      %1 = t.transpose(%0) {permutation = [1, 0]} : tensor<[16, S], f32>
      %2 = t.matmul(%0, %1) : tensor<[S, S], f32>
      %3 = t.softmax(%2) {axis = 1} : tensor<[S, S], f32>
      %4 = t.matmul(%3, %0) : tensor<[S, 16], f32>
      %5 = llm.linear(%4, @o, none, none) : tensor<[S, 16], f32>
      %6 = llm.linear(%5, @up, none, none) : tensor<[S, 48], f32>
      return a = %6
    }
    """)
    found = estimate(graph, context=64)
    assert found.weights["attention"] == 2 * 4 * 16 * 16
    assert found.weights["mlp"] == 4 * 16 * 48


def test_a_symbolic_weight_is_an_error() -> None:
    graph = parse("""
    graph @main {S in [2, 64]} (%x: tensor<[S], f32>) {
      @w: tensor<[S], f32>
      %0 = t.add(%x, @w) : tensor<[S], f32>
      return a = %0
    }
    """)
    with pytest.raises(IRError, match=r"size"):
        estimate(graph, context=64)
