"""Linear ops on tile registers: against f64, at awkward sizes, where this computer has them; their code everywhere."""

from __future__ import annotations

import random
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cpu_linear_cases import ACTIVATIONS, wide
from kernel_harness import Compiled, aligned

from llmc.compiler.encodings.levels import table_levels
from llmc.runtime import cpu
from llmc.targets.cpu.codegen import build_module
from llmc.targets.cpu.linear_problem import FloatProblem, ManyRowsProblem, QuantizedProblem
from llmc.targets.template import Chooser, space
from llmc.targets.x86 import detect
from llmc.targets.x86.activation_tiles import Bf16Tiles
from llmc.targets.x86.linear_float_tile_rows import FloatTileRows
from llmc.targets.x86.linear_tile_rows import QuantizedTileRows
from llmc.targets.x86.tile_plan import ROWS_FROM, TileLinear, tile_plan, usable

MACHINE = detect.machine("sapphirerapids")
needs_tiles = pytest.mark.skipif(not MACHINE.features <= cpu.features(), reason="this computer has no tile registers")

SMALL = ManyRowsProblem(n=64, k=64, bits=4, group=64)

# A product's factors are each rounded to bf16, by 2^-9 at most; f32 sums of thousands add little to that.
ROUNDING = 2.0**-8 + 2.0**-12
# Three parts hold all of an f32: what is left are the roundings of f32 sums, relative to what is summed.
SPLIT_ROUNDING = 2.0**-20


def in_tiles(form: Bf16Tiles, x: np.ndarray) -> np.ndarray:
    """[T, features] as the kernels want it; rows past the last hold NaN, which must not leak."""
    tiles = form.encode(x)["xtiles"]
    rows = tiles.transpose(0, 3, 1, 2, 4).reshape(-1, *tiles[0, :, :, 0].shape)
    rows[len(x) :] = 0x7FC0
    return np.ascontiguousarray(rows.reshape(-1, 16, *rows.shape[1:]).transpose(0, 2, 3, 1, 4))


class Case:
    """One linear op: packed weights, and its exact value with the size of what is summed."""

    def __init__(
        self, tokens: int, n: int, k: int, bits: int, group: int, symmetric: bool = True, table: bool = False, **fused
    ) -> None:
        rng = np.random.default_rng(n * k + bits)
        self.tokens, self.fused = tokens, fused
        if bits >= 16:
            group = 0
        in_steps = bool(fused.get("in_steps"))
        problem = ManyRowsProblem(n=n, k=k, bits=bits, group=group, symmetric=symmetric, table=table, **fused)
        self.plan = tile_plan(Chooser(MACHINE), problem)
        self.x = x = rng.standard_normal((tokens, k)).astype(np.float32)
        if bits >= 16:
            weight = rng.standard_normal((n, k)).astype(np.float32 if bits == 32 else ml_dtypes.bfloat16)
            arrays, exact = self.plan.layout.pack(weight), weight.astype(np.float64)
            self.weight = weight
            magnitude = np.abs(exact)
        else:
            most = 2 ** (bits - 1) - 1
            q = rng.integers(-most - table, most + 1, (n, k)).astype(np.int8)
            if not symmetric:
                q = (q + most).astype(np.uint8)
            groups = -(-k // group)
            scales = (0.01 * (0.5 + rng.random((n, groups)))).astype(np.float16)
            minimums = None if symmetric else (-0.1 * rng.random((n, groups))).astype(np.float16)
            if in_steps:
                minimums = np.round(-most * rng.random((n, groups))).astype(np.float16)
            arrays = self.plan.layout.pack(q, scales, *([] if symmetric else [minimums]))
            levels = table_levels(bits).values.astype(np.float64)[q + most + 1] if table else q
            exact = levels * wide(scales, group, k)
            magnitude = np.abs(exact)
            if minimums is not None:
                least = wide(minimums, group, k) * (wide(scales, group, k) if in_steps else 1)
                exact, magnitude = exact + least, magnitude + np.abs(least)
        sums, self.terms = x.astype(np.float64) @ exact.T, np.abs(x) @ magnitude.T
        if fused.get("bias"):
            arrays["bias"] = rng.standard_normal(n).astype(np.float32)
            sums = sums + arrays["bias"]
        features = n // 2 if fused.get("gated") else n
        act = ACTIVATIONS[fused.get("activation", "none")]
        self.expected, terms = act(sums[:, :features]), self.terms
        self.terms = 1.2 * terms[:, :features]  # no activation steepens an error by more
        if fused.get("gated"):
            up = sums[:, features:]
            self.terms = self.terms * np.abs(up) + terms[:, features:] * np.abs(self.expected)
            self.expected = self.expected * up
        if fused.get("residual"):
            arrays["residual"] = rng.standard_normal((tokens, features)).astype(np.float32)
            self.expected = self.expected + arrays["residual"]
        self.form = self.plan.variants[0].form
        assert isinstance(self.form, Bf16Tiles)
        arrays["xtiles"] = in_tiles(self.form, x)
        self.arrays = {name: aligned(values) for name, values in arrays.items()}

    def run(self, which: int, pieces: int = 1) -> np.ndarray:
        """The result of a variant, in `pieces` ranges of units, last first."""
        variant = self.plan.variants[which]
        tokens, features = self.expected.shape
        packed = self.fused.get("packed")
        result = Bf16Tiles(features, features, self.form.parts)
        elements = result.buffers(tokens)[0].elements if packed else tokens * features
        guard = 64
        out = aligned(np.full(elements + guard, 7, np.uint16 if packed else np.float32))
        workspace = aligned(
            np.full(variant.workspace, 255, np.uint8)
        )  # NaN in every dtype: what lies there is not read
        given = {**self.arrays, "out": out, "workspace": workspace}
        compiled, units = Compiled(variant.kernel, MACHINE), variant.units(tokens)
        bounds = [units * i // pieces for i in range(pieces + 1)]
        for i in reversed(range(pieces)):
            compiled(*(given[name] for name in self.plan.names(variant)), tokens, bounds[i], bounds[i + 1])
        assert (out[elements:] == 7).all(), "wrote past its result"
        if packed:
            return result.decode({"xtiles": out[:elements]}, tokens)
        return out[:elements].reshape(tokens, features)

    def check(self, which: int, pieces: int = 1) -> None:
        split = self.form.parts > 1
        tolerance = SPLIT_ROUNDING if split else ROUNDING + (2.0**-8 if self.fused.get("packed") else 0)
        allowed = tolerance * (self.terms + (np.abs(self.expected) if self.fused.get("packed") else 0)) + 1e-6
        assert (np.abs(self.run(which, pieces) - self.expected) <= allowed).all()


@needs_tiles
@pytest.mark.parametrize("which", [0, 1], ids=["few", "many"])
@pytest.mark.parametrize("shape", [(1, 7, 31), (17, 33, 129), (33, 129, 65), (129, 31, 700), (70, 600, 33)])
@pytest.mark.parametrize(
    "weights",
    [
        (4, 64, True), (4, 32, False), (8, 64, True), (8, 128, False), (16, 32, True), (32, 32, True),
        (4, 64, True, True), (4, 128, True, True), (6, 64, True, True), (6, 32, True, True),
        (5, 32, True, True), (3, 64, False, False), (2, 32, True, True),
    ],
)  # fmt: skip
def test_every_result_is_near_the_exact_one(which: int, shape: tuple[int, int, int], weights: tuple) -> None:
    Case(*shape, *weights).check(which)


@needs_tiles
@pytest.mark.parametrize("which", [0, 1], ids=["few", "many"])
@pytest.mark.parametrize("weights", [(4, 16, True, True), (6, 16, True), (8, 16, False)])
def test_groups_of_16_share_tiles_in_pairs(which: int, weights: tuple) -> None:
    Case(33, 129, 160, *weights).check(which)
    Case(70, 31, 50, *weights).check(which)


@needs_tiles
@pytest.mark.parametrize("which", [0, 1], ids=["few", "many"])
@pytest.mark.parametrize("bits", [4, 8])
def test_minimums_that_count_steps(which: int, bits: int) -> None:
    Case(33, 129, 65, bits, 32, False, in_steps=True).check(which)


@needs_tiles
@pytest.mark.parametrize("bits", [4, 6, 16, 32])
@pytest.mark.parametrize(
    "fused",
    [
        {"bias": True, "residual": True, "activation": "gelu"},
        {"gated": True, "activation": "silu", "bias": True},
        {"gated": True, "activation": "gelu_tanh", "packed": True},
        {"activation": "relu", "bias": True, "packed": True},
    ],
    ids=str,
)
def test_fused_tails(bits: int, fused: dict) -> None:
    n = 192 if fused.get("gated") else 160
    for which in (0, 1):
        Case(37, n, 96, bits, 32, table=bits == 6, **fused).check(which)


@needs_tiles
def test_three_parts_are_as_exact_as_f32() -> None:
    """Sums of 2,000 products: no further off than f32 multiply-adds in a row, and far less than one part alone."""
    case = Case(64, 96, 2000, 32, 32)
    off = np.abs(case.run(1) - case.expected)
    x, weight = case.x, case.weight
    sums = np.zeros((64, 96), np.float32)
    for i in range(2000):
        sums += x[:, i : i + 1] * weight[:, i]
    assert np.sqrt((off**2).mean()) <= 1.5 * np.sqrt(((sums - case.expected) ** 2).mean())


@needs_tiles
def test_parts_of_numbers_of_every_size() -> None:
    """Three parts sum to the very number, from 2^-109 on up."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5, 64)) * 2.0 ** rng.integers(-100, 120, (5, 64))).astype(np.float32)
    x[0, :4] = 0.0, -0.0, 1.0, np.finfo(np.float32).max / 2
    form = Bf16Tiles(64, 64, 3)
    out = aligned(np.full(form.buffers(5)[0].elements, 0x7FC0, np.uint16))
    Compiled(form.writer(Chooser(MACHINE)).kernel, MACHINE)(aligned(x), out, 0, 5)
    assert (form.decode({"xtiles": out}, 5) == x).all()


@needs_tiles
def test_any_split_of_the_units_gives_the_same_bits() -> None:
    for bits, table in ((2, True), (3, False), (4, False), (4, True), (5, True), (6, True)):
        case = Case(150, 300, 200, bits, 64, table=table)
        for which in (0, 1):
            assert case.run(which, 5).tobytes() == case.run(which).tobytes()


@needs_tiles
@pytest.mark.parametrize(
    ("bits", "shape"),
    [(4, (33, 80, 1500)), (6, (65, 48, 1900)), (8, (260, 48, 2500)), (16, (290, 100, 2200)), (32, (300, 40, 900))],
)
def test_inputs_of_several_steps(bits: int, shape: tuple[int, int, int]) -> None:
    """Long rows, near and far: weights are unpacked a step ahead, and sums are stored between steps."""
    for which in (0, 1):
        Case(*shape, bits, 64 if bits < 16 else 32, table=bits == 6).check(which)


@needs_tiles
def test_more_rows_than_a_block() -> None:
    for bits in (4, 32):
        Case(600, 48, 64, bits, 64).check(1)
        Case(600, 48, 64, bits, 64).check(0)


@needs_tiles
@pytest.mark.parametrize("k", [1, 31, 33, 96, 129])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_activations_round_to_the_nearest_bf16(k: int, norm: str) -> None:
    rng = np.random.default_rng(k)
    tokens, inputs = 19, -(-k // 64) * 64
    x = rng.standard_normal((tokens, k)).astype(np.float32)
    weight = rng.standard_normal(k).astype(np.float32)
    extra = [] if norm == "none" else [aligned(weight)]
    form = Bf16Tiles(k, inputs)
    out = aligned(np.full(form.buffers(tokens)[0].elements, 0x7FC0, np.uint16))
    Compiled(form.writer(Chooser(MACHINE), norm=norm, eps=1e-5).kernel, MACHINE)(aligned(x), *extra, out, 0, tokens)
    got = replace(form, features=inputs).decode({"xtiles": out}, tokens)
    exact = x.astype(np.float64)
    if norm != "none":
        centred = exact - (exact.mean(1, keepdims=True) if norm == "layer" else 0)
        exact = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * weight
    assert (got[:, k:] == 0).all()
    if norm == "none":
        assert (got[:, :k] == x.astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    else:
        assert np.abs(got[:, :k] - exact).max() <= 2.0**-8 * np.abs(exact).max()


def test_the_code_multiplies_tiles_and_nothing_else_does() -> None:
    made = tile_plan(Chooser(MACHINE), SMALL).variants[0].kernel
    code = build_module(made, MACHINE).inspect_source("asm")
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in code
    assert usable(MACHINE) and not any(usable(detect.machine(name)) for name in ("x86-64-v3", "x86-64-v4", "znver5"))


def test_blocks_that_do_not_fit_are_refused() -> None:
    assert "no whole number of tiles" in TileLinear(3, 32, 512, 0).refuse(SMALL, MACHINE)
    gated = replace(SMALL, gated=True, packed=True)
    assert TileLinear(2, 32, 512, 0).refuse(gated, MACHINE) == (
        "panels of 2 weight tiles have no whole number of tiles of results"
    )
    assert TileLinear(4, 32, 512, 0).refuse(gated, MACHINE) == ""
    assert "48 features do not fill" in TileLinear(4, 32, 512, 0).refuse(replace(SMALL, n=48, packed=True), MACHINE)
    assert "no tile registers" in TileLinear(4, 32, 512, 0).refuse(SMALL, detect.machine("znver5"))
    ring = QuantizedTileRows(rows=8, unpack_ahead=2, ring=2, ahead=3072, least=32 << 10)
    few = QuantizedProblem(n=64, k=64, bits=4, group=64, symmetric=True)
    assert ring.refuse(few, MACHINE) == "a ring of 2 groups has no room for 2 ahead and one that is multiplied"
    assert replace(ring, ring=4).refuse(few, MACHINE) == ""
    assert "groups of 16 do not fill" in replace(ring, ring=4).refuse(replace(few, group=16), MACHINE)
    assert "80 inputs in groups of 16 are no whole" in TileLinear(4, 32, 512, 0).refuse(
        replace(SMALL, k=80, group=16), MACHINE
    )


def test_every_way_to_write_a_kernel_becomes_code() -> None:
    """A few members of each space, drawn by chance; what they compute is tested where there are tile registers."""
    drawn = random.Random(0)
    for template, problem in (
        (TileLinear, SMALL),
        (TileLinear, ManyRowsProblem(n=96, k=129, bits=32, packed=True)),
        (TileLinear, ManyRowsProblem(n=96, k=129, bits=4, group=64, table=True)),
        (TileLinear, ManyRowsProblem(n=96, k=129, bits=6, group=32, table=True)),
        (TileLinear, ManyRowsProblem(n=96, k=160, bits=6, group=16)),
        (QuantizedTileRows, QuantizedProblem(n=64, k=192, bits=4, group=96, symmetric=False)),
        (QuantizedTileRows, QuantizedProblem(n=64, k=192, bits=4, group=64, symmetric=True, table=True)),
        (QuantizedTileRows, QuantizedProblem(n=64, k=192, bits=6, group=64, symmetric=True, table=True)),
        (FloatTileRows, FloatProblem(n=70, k=129, dtype="bf16")),
    ):
        for member in drawn.sample(list(space(template, problem, MACHINE)), 2):
            assert "tdp" in build_module(member.kernel(problem, MACHINE), MACHINE).inspect_source("asm")


def test_few_rows_are_left_to_the_integer_kernels() -> None:
    plan = tile_plan(Chooser(MACHINE), SMALL)
    assert plan.variants[0].low == ROWS_FROM
    assert plan.variants[0].high is not None and plan.variants[0].high + 1 == plan.variants[1].low
    assert plan.variants[1].high is None
