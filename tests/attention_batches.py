"""Steps of random sequences over a paged cache: what attention kernels get, and the f64 answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import ml_dtypes
import numpy as np
from kernel_harness import Compiled, aligned

from llmc.targets.cpu.attention import AttentionPlan, attention_plan
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_query import QueryRows
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser, Template

PAGE, TILE = 32, 16


@dataclass(frozen=True)
class Case:
    """One kernel's parameters; head counts and sizes are awkward on purpose."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    cache_dtype: str = "float16"
    causal: bool = True
    span: int = 0
    member: Template[AttentionProblem] | None = None  # how the kernel is written, where not by default

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def plan(self, machine: Machine, query: QueryRows | None = None) -> AttentionPlan:
        others = () if query is None else query.params()
        facts = {name: value for name, value in vars(self).items() if name != "member"}
        problem = AttentionProblem(scale=self.scale, query=others, **facts)
        plan = attention_plan(Chooser(machine), problem)
        assert isinstance(plan, AttentionPlan)
        return plan if self.member is None else replace(plan, tile=self.member.kernel(problem, machine))


@dataclass(frozen=True)
class Batch:
    """Sequences in a paged cache and the query rows of one step."""

    case: Case
    keys: list[np.ndarray]  # a sequence's [length, kv_heads, head_dim]
    values: list[np.ndarray]
    key_pages: np.ndarray
    value_pages: np.ndarray
    block_table: np.ndarray
    tiles: np.ndarray
    query: np.ndarray
    sinks: np.ndarray
    slopes: np.ndarray
    bias: np.ndarray  # [heads, 2 * span - 1]

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(keys) for keys in self.keys])]).astype(np.int32)

    @property
    def is_read(self) -> bool:
        """Whether the rows are those of prompts, and do not decode: a tile has several."""
        return len(self.tiles) < len(self.query)

    def seen(self, sequence: int, position: int) -> slice:
        """The keys that a row at `position` of a sequence sees."""
        window, end = self.case.window, position + 1
        if not self.case.causal:
            end = len(self.keys[sequence])
            end = min(end, position + window) if window else end
        return slice(max(0, position - window + 1) if window else 0, end)

    def expected(self) -> np.ndarray:
        """Softmax attention in f64, one row and head at a time."""
        return self.reference()[0]

    def reference(self, rounded_rows: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(result, spread, exponent), all f64. spread [T, heads, value_dim]: the average of |value - result|, which
        relative errors of the weights are multiplied by. exponent [T, heads, 1]: the greatest sum of
        |query * key| * scale, on which the error of a relative error in queries and keys depends.

        rounded_rows: queries (scaled), keys and values are bf16 where tokens are read, or heads of a group are more.
        """
        case = self.case
        group = case.heads // case.kv_heads
        out = np.zeros((len(self.query), case.heads, case.value_dim))
        spread, exponent = np.zeros_like(out), np.zeros((len(self.query), case.heads, 1))
        scaled = np.float32(case.scale / case.softcap if case.softcap else case.scale * math.log2(math.e))
        for sequence, first, count, position in self.tiles:
            rounds = rounded_rows is not None and (self.is_read or group > rounded_rows)
            number, factor = (bfloat16, scaled) if rounds else (exact, np.float32(1))
            for row in range(count):
                last = position + row
                seen = self.seen(sequence, last)
                for head in range(case.heads):
                    kv = head * case.kv_heads // case.heads
                    keys = number(self.keys[sequence][seen, kv])
                    values = number(self.values[sequence][seen, kv])
                    query = number(self.query[first + row, head] * factor) * (case.scale / float(factor))
                    scores = keys @ query
                    if case.softcap:
                        scores = case.softcap * np.tanh(scores / case.softcap)
                    if case.alibi:
                        scores += self.slopes[head] * (np.arange(seen.start, seen.stop) - last)
                    if case.span:
                        scores += self.bias[head, np.arange(seen.start, seen.stop) - last + case.span - 1]
                    top = max(scores.max(), self.sinks[head]) if case.sinks else scores.max()
                    weights = np.exp(scores - top)
                    sink = np.exp(self.sinks[head] - top) if case.sinks else 0.0
                    total = weights.sum() + sink
                    result = weights @ values / total
                    out[first + row, head] = result
                    spread[first + row, head] = (weights @ np.abs(values - result) + sink * np.abs(result)) / total
                    exponent[first + row, head] = (np.abs(keys) @ np.abs(query)).max()
        return out, spread, exponent

    def run(
        self,
        machine: Machine,
        splits: int = 1,
        cuts: tuple[float, ...] = (),
        query: QueryRows | None = None,
        extras: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """The kernels' result, the work units cut into ranges at these fractions. query: how to read `self.query`, with
        its arguments in `extras`."""
        case, plan = self.case, self.case.plan(machine, query)
        tokens = len(self.query)
        out = aligned(np.full((tokens, case.heads, case.value_dim), np.nan, np.float32))
        state = aligned(np.full(plan.state_elements(tokens, splits), np.nan, np.float32))
        partial = aligned(np.full(max(1, plan.partial_elements(tokens, splits)), np.nan, np.float32))
        args = [self.query, self.key_pages, self.value_pages, self.tiles, self.block_table]
        args += [self.sinks] * case.sinks + [self.slopes] * case.alibi
        args += [self.starts] * (not case.causal) + [self.bias] * bool(case.span)
        arrays = [*(aligned(a) for a in args), *extras, out, state, partial]
        tile = Compiled(plan.tile, machine)
        for begin, end in reversed(ranges(plan.tile_units(len(self.tiles), splits), cuts)):
            kind = [int(self.is_read)] * plan.by_kind
            tile(*arrays, self.block_table.shape[1], splits, *kind, begin, end)
        if splits > 1:
            combine = Compiled(plan.combine, machine)
            for begin, end in reversed(ranges(plan.combine_units(tokens), cuts)):
                combine(state, partial, out, splits, begin, end)
        return out


def ranges(units: int, cuts: tuple[float, ...]) -> list[tuple[int, int]]:
    return list(pairwise([0, *(int(units * cut) for cut in cuts), units]))


def tiles_of(new: list[int], lengths: list[int], most: int) -> np.ndarray:
    """Tiles of at most `most` rows, which end at multiples of that, for the last `new[i]` tokens of each sequence."""
    tiles, row = [], 0
    for sequence, (count, length) in enumerate(zip(new, lengths, strict=True)):
        start = length - count
        while start < length:
            rows = min(most - start % most, length - start)
            tiles.append((sequence, row, rows, start))
            start, row = start + rows, row + rows
    return np.array(tiles, np.int32)


def make_batch(case: Case, lengths: list[int], new: list[int], *, seed: int = 0, most: int = TILE) -> Batch:
    """Random sequences of which the last `new` tokens are queries. Slots that hold no token are NaN."""
    rng = np.random.default_rng(seed)
    needed = [-(-length // PAGE) for length in lengths]
    pages = sum(needed) + 2
    order = rng.permutation(pages)
    table = np.full((len(lengths), max(needed) + 1), order[-1], np.int32)
    key_pages = np.full((pages, case.kv_heads, case.head_dim, PAGE), np.nan, case.cache_dtype)
    value_pages = np.full((pages, case.kv_heads, PAGE, case.value_dim), np.nan, case.cache_dtype)
    keys, values = [], []
    for sequence, length in enumerate(lengths):
        keys.append(rng.standard_normal((length, case.kv_heads, case.head_dim)).astype(case.cache_dtype))
        values.append(rng.standard_normal((length, case.kv_heads, case.value_dim)).astype(case.cache_dtype))
        for number in range(needed[sequence]):
            page, order = order[0], order[1:]
            table[sequence, number] = page
            block = slice(number * PAGE, (number + 1) * PAGE)
            filled = len(keys[-1][block])
            key_pages[page, :, :, :filled] = keys[-1][block].transpose(1, 2, 0)
            value_pages[page, :, :filled] = values[-1][block].transpose(1, 0, 2)
    query = (2 * rng.standard_normal((sum(new), case.heads, case.head_dim))).astype(np.float32)
    sinks = rng.standard_normal(case.heads).astype(np.float32)
    slopes = (0.5 ** np.arange(1, case.heads + 1)).astype(np.float32)
    tiles = tiles_of(new, lengths, most)
    bias = (2 * rng.standard_normal((case.heads, max(0, 2 * case.span - 1)))).astype(np.float32)
    return Batch(case, keys, values, key_pages, value_pages, table, tiles, query, sinks, slopes, bias)


# Prefills of 1, 7, 33 and 129 tokens, a chunk in the middle of a page, and decodes with contexts of 31 and 200.
LENGTHS, NEW = [1, 7, 33, 129, 70, 31, 200, 32], [1, 7, 33, 129, 19, 1, 1, 1]


def exact(array: np.ndarray) -> np.ndarray:
    return array.astype(float)


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to bf16, to nearest even, by way of f32."""
    return array.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float)
