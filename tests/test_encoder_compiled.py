"""Compiled encoders: what stands beside a sequence in a step changes nothing, and the numbers are the graph's meaning.

In f32 a sum of n terms may be taken in any order: relative errors of n units of 2^-24, through a few layers of norms,
stay below 1e-5 of values of order one.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from program_harness import CompiledGraph
from small_encoder import (
    HEADS_OF_MODELS,
    VOCABULARY,
    WIDTH,
    Head,
    alone,
    everything,
    first,
    masked_mean,
    random_sequences,
    small_encoder,
    step_inputs,
)
from test_encoder_passes import ATTENTION

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import LoadParam, evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.ragged import POOLINGS, PoolTokens
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.compiler.scenario import random_params
from llmc.compiler.step_sizes import ENCODE
from llmc.targets import machine_named

LENGTHS = (1, 7, 31, 33, 129, 32, 2, 150)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Encoder:
    """A small encoder, compiled, with its weights."""

    def __init__(
        self, source: Graph, quantization: str = "none", machine: str = "native", load: LoadParam | None = None
    ) -> None:
        self.source = source
        self.load = load or random_params(source, 3)
        options = CompileOptions(quantization=quantization, embedding=None if load is None else "none")
        self.graph = run_pipeline(source, options, load=self.load, task=ENCODE).graph
        params = {param.name: self.load(param.name) for param in self.graph.params}
        self.program = CompiledGraph(self.graph, machine_named(machine), params, largest=512, task="encode")

    def run(
        self, sequences: list[tuple[list[int], list[int]]], tile: int = 64, splits: int = 1
    ) -> list[dict[str, Array]]:
        """The outputs of each sequence of one step."""
        found = self.program.run_arrays(step_inputs(self.graph, sequences, tile), splits)
        starts = np.cumsum([0, *(len(ids) for ids, _ in sequences)])
        return [
            {
                name: array[starts[i] : starts[i + 1]]
                if len(array) == starts[-1] != len(sequences)
                else array[i : i + 1]
                for name, array in found.items()
            }
            for i in range(len(sequences))
        ]

    def expected(self, sequences: list[tuple[list[int], list[int]]]) -> list[dict[str, Array]]:
        return [alone(self.source, self.load, ids, types) for ids, types in sequences]


@functools.cache
def encoder(
    kind: str = "both", head: Head = everything, quantization: str = "none", machine: str = "native"
) -> Encoder:
    graph = small_encoder(head) if kind == "both" else small_encoder(head, ATTENTION[kind])
    return Encoder(graph, quantization, machine)


def assert_close(found: list[dict[str, Array]], expected: list[dict[str, Array]], **tolerance: float) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], **(tolerance or CLOSE), err_msg=f"{name} of {index}")


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("causal", "sinks and softcap")]


@pytest.mark.parametrize("kind", ["both", "windows", "bias by distance", *SLOW_KINDS])
def test_a_mixture_of_sequences_is_each_alone(kind: str) -> None:
    model = encoder(kind)
    sequences = random_sequences(LENGTHS)
    together = model.run(sequences)
    assert_close(together, [model.run([one])[0] for one in sequences])
    assert_close(together, model.expected(sequences))


@pytest.mark.parametrize("machine", ["x86-64-v3", pytest.param("x86-64-v4", marks=pytest.mark.slow)])
def test_machines_without_tiles_agree(machine: str) -> None:
    model = encoder("windows", machine=machine)
    sequences = random_sequences((33, 1, 7, 64))
    assert_close(model.run(sequences), model.expected(sequences))


def all_heads(x: Value) -> dict[str, Value]:
    """Every kind of output, side by side."""
    return {f"{kind} {name}": value for kind, head in HEADS_OF_MODELS.items() for name, value in head(x).items()}


@pytest.mark.parametrize("head", [all_heads, first, masked_mean])
def test_each_kind_of_output_is_what_the_graph_means(head: Head) -> None:
    """All at once, and alone those of which less is computed then."""
    model = encoder("both", head)
    sequences = random_sequences((5, 1, 40, 2))
    assert_close(model.run(sequences), model.expected(sequences))


def test_tiles_and_splits_of_any_size_give_the_same() -> None:
    model = encoder("bias by distance")
    sequences = random_sequences(LENGTHS, seed=4)
    whole = model.run(sequences)
    for tile, splits in ((16, 1), (64, 3), (1, 2)):
        assert_close(model.run(sequences, tile, splits), whole)


def test_the_order_of_sequences_does_not_matter() -> None:
    model = encoder("windows")
    sequences = random_sequences((12, 129, 1, 33))
    there, back = model.run(sequences), model.run(sequences[::-1])
    assert_close(there, back[::-1])


@pytest.mark.parametrize(("kind", "quantization"), [("windows", "int8"), ("bias by distance", "bf16")])
def test_rounded_models_stay_near(kind: str, quantization: str) -> None:
    """Rounded weights, activations and caches (2^-8 each) move normalised vectors by about one part in a hundred."""
    model = encoder(kind, masked_mean, quantization)
    sequences = random_sequences(LENGTHS, seed=1)
    for found, expected in zip(model.run(sequences), model.expected(sequences), strict=True):
        cosine = float(found["embedding"][0] @ expected["embedding"][0])
        assert cosine > 0.999


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize(
    ("kind", "quantization"), [("both", "none"), ("windows", "int8"), ("bias by distance", "bf16")]
)
def test_a_broken_sequence_changes_no_other(kind: str, quantization: str, number: float) -> None:
    """A token whose embedding is NaN, infinite or overflows: the bits of all other sequences are those beside a sound
    one, whichever pages and rows lie next to it."""
    source = small_encoder(everything, ATTENTION[kind]) if kind != "both" else small_encoder(everything)
    sound = random_params(source, 3)

    def load(name: str) -> Array:
        found = sound(name)
        if name == "embed":
            found = found.copy()
            found[VOCABULARY - 1] = number
        return found

    model = Encoder(source, quantization, load=load)
    sequences = random_sequences((7, 33, 1, 64, 2), seed=1)
    sequences = [([min(token, VOCABULARY - 2) for token in ids], types) for ids, types in sequences]
    beside = model.run(sequences)
    for broken in (1, 3):
        ids, types = sequences[broken]
        for place in (0, len(ids) - 1):
            spoilt = [*ids[:place], VOCABULARY - 1, *ids[place + 1 :]]
            found = model.run([*sequences[:broken], (spoilt, types), *sequences[broken + 1 :]])
            for index in set(range(len(sequences))) - {broken}:
                assert all((found[index][name] == array).all() for name, array in beside[index].items())
            assert np.isfinite(number) or not all(np.isfinite(array).all() for array in found[broken].values())


def test_one_sequence_at_a_time_where_tokens_meet_their_mean() -> None:
    """Tokens less their mean cannot be cut apart: such a graph takes one sequence a step, and gives the same."""

    def centred(x: object) -> dict[str, object]:
        return {"tokens": e.Sub(x, s.Mean(x, (1,))), "first": s.Slice(x, 1, 0, 1)}  # type: ignore[arg-type]

    model = Encoder(small_encoder(centred))  # type: ignore[arg-type]
    assert model.graph.input("ids").rank == 2
    assert [len(value.shape) for _, value in model.graph.outputs] == [2, 3]
    for ids, types in random_sequences((2, 33, 129)):
        at = {"ids": ids, "token_types": types, "positions": range(len(ids))}
        inputs = {v.name: np.asarray([at[v.name]], np.int32) for v in model.graph.inputs}
        expected = alone(model.source, model.load, ids, types)
        found = model.program.run_arrays(inputs)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name].reshape(array.shape), array, **CLOSE)


@pytest.mark.parametrize("machine", ["native", "x86-64-v3"])
def test_pooling_of_any_width(machine: str) -> None:
    starts = Input("starts", Tensor((symbol("B", 1, 64) + 1,), "i32"))
    rows = {n: Input(f"x{n}", Tensor((symbol("T", 1, 512), n), "f32")) for n in (1, 7, 33, 64, 200)}
    pooled = {f"{kind} {n}": PoolTokens(x, starts, kind) for n, x in rows.items() for kind in POOLINGS}
    graph = Graph("pool", (*rows.values(), starts), tuple(pooled.items()))
    program = CompiledGraph(graph, machine_named(machine), {}, task="run")
    for lengths in ((1,), (7, 1, 64, 65, 129, 200), (1,) * 31):
        rng = np.random.default_rng(len(lengths))
        inputs = {x.name: rng.standard_normal((sum(lengths), n), np.float32) - 3 for n, x in rows.items()}
        inputs["starts"] = np.cumsum([0, *lengths]).astype(np.int32)  # type: ignore[assignment]
        found, expected = program.run_arrays(inputs), evaluate(graph, inputs, lambda name: np.zeros(0))
        for name, array in found.items():
            np.testing.assert_allclose(array, np.asarray(expected[name]), rtol=2e-6, atol=1e-5, err_msg=name)


def test_a_pooled_row_reads_its_own_rows_only() -> None:
    model = encoder("both", first)
    sequences = random_sequences((33, 7, 64))
    before = model.run(sequences)
    changed = [sequences[0], ([(i + 1) % VOCABULARY for i in sequences[1][0]], sequences[1][1]), sequences[2]]
    after = model.run(changed)
    for index in (0, 2):
        assert np.array_equal(before[index]["pooled"], after[index]["pooled"])
    assert not np.allclose(before[1]["pooled"], after[1]["pooled"]) and before[1]["pooled"].shape == (1, WIDTH)
