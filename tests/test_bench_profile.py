"""What the kernels of a step cost, what share of the limits that is, and how `llmc bench` tells and draws it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import fake_artifact
import numpy as np
import pytest
import small_decoder as sd
from hypothesis import given
from hypothesis import strategies as st
from kernel_harness import CACHE
from tiny_models import VOCAB, make_tiny
from x86_machines import MACHINES

from llmc.cli import run as cli
from llmc.cli.profile_table import print_profile
from llmc.compiler.ir.dims import Dim, concrete, symbol
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.errors import ArtifactError
from llmc.runtime import manifest
from llmc.runtime.json_reader import Reader
from llmc.runtime.limits import Limits
from llmc.runtime.profile import (
    KernelTime,
    Profile,
    Sample,
    Spread,
    StepSizes,
    evaluate,
    kernel_times,
    keys_seen,
    merge_steps,
    pairs_seen,
    profile_phase,
)
from llmc.runtime.runtime import Runtime
from llmc.targets import lower
from llmc.targets.call_facts import call_costs, keys, pairs, polynomial

LIMITS = Limits(2, 1e10, int8_ops_per_second=1e12, f32_flops_per_second=1e11, tile_int8_ops_per_second=4e12)

# Costs


@given(st.integers(0, 300), st.integers(1, 200), st.integers(0, 150))
def test_keys_and_pairs_are_those_of_the_mask(start: int, tokens: int, window: int) -> None:
    row, key = np.arange(start, start + tokens)[:, None], np.arange(start + tokens)[None]
    seen = (key <= row) & ((key > row - window) if window else True)
    assert pairs_seen(start, tokens, window) == seen.sum()
    assert keys_seen(start, tokens, window) == seen.any(axis=0).sum()


def dims() -> st.SearchStrategy[int | Dim]:
    """Polynomials over the sizes of a step; divisions are exact ones."""
    leaves = st.integers(0, 50) | st.sampled_from(["T", "Q", "B", "M", "R", "SPLITS"]).map(symbol)
    leaves |= st.sampled_from([0, 4, 128]).map(keys) | st.sampled_from([0, 4]).map(pairs)
    return st.recursive(
        leaves, lambda inner: st.builds(lambda a, b: a + b, inner, inner) | st.builds(lambda a, b: a * b, inner, inner)
    )


@given(dims(), st.lists(st.tuples(st.integers(0, 99), st.integers(1, 40)), min_size=1, max_size=4))
def test_polynomials_survive_the_manifest(size: int | Dim, runs: list[tuple[int, int]]) -> None:
    step = StepSizes((7, 3, 2, 5, 4, 6), tuple(runs))
    found = manifest._polynomial(Reader(json.loads(json.dumps(polynomial(size))), "bytes"), frozenset())
    names = ("T", "Q", "B", "M", "R", "SPLITS", "KEYS", "KEYS4", "KEYS128", "PAIRS", "PAIRS4")
    assert evaluate(found, step) == concrete(size, {name: step[name] for name in names})


def test_a_floor_division_counts_as_an_exact_one() -> None:
    tokens = symbol("T")
    assert polynomial((tokens * 3 + 1) // 2 * 4) == {"": 2, "T": 6}


def cost(**changes: object) -> dict[str, object]:
    return {"bytes": {}, "operations": {}, "arithmetic": "f32", "when": [], "calls": [0], **changes}


@pytest.mark.parametrize(
    "costs",
    [
        5,
        ["x"],
        [cost(bytes=3)],
        [cost(bytes={"X": 1})],
        [cost(bytes={"T*": 1})],
        [cost(bytes={"T": "many"})],
        [cost(operations={"T": 1e300})],
        [cost(arithmetic=None)],
        [cost(when=[["T", 1]])],
        [cost(when=[["X", 1, None]])],
        [cost(when=[["T", None, 3]])],
        [cost(calls=[1])],
        [cost(calls=[-1])],
        [cost(calls=["0"])],
        [cost(calls=3)],
    ],
)
def test_costs_that_cannot_be_are_refused(costs: object) -> None:
    raw = fake_artifact.manifest()
    raw["step"] = {**raw["step"], "costs": costs}  # type: ignore[dict-item]
    with pytest.raises(ArtifactError, match=r"step\.costs"):
        manifest.parse(json.dumps(raw).encode())


@pytest.mark.parametrize(
    "change", [{"symbol": "system"}, {"symbol": 3}, {"amount": 0}, {"input_bytes": -1}, {"name": None}]
)
def test_limits_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    raw = fake_artifact.manifest()
    limit = {"name": "read", "symbol": "llmc_limit_read_1", "amount": 4096, "input_bytes": 0, **change}
    raw["step"] = {**raw["step"], "limits": [limit]}  # type: ignore[dict-item]
    with pytest.raises(ArtifactError, match=r"step\.limits"):
        manifest.parse(json.dumps(raw).encode())


# Costs of a compiled model: three layers, two of them with a window of 5 keys.

LAYERS, WINDOWED, WINDOW = 3, 2, 5
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 32
WEIGHTS = HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * HIDDEN + 3 * HIDDEN * INNER  # of a layer
TOKEN_BYTES = KV_HEADS * 2 * HEAD_DIM * 2  # of a layer's cache, in f16


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("profile")
    options = CompileOptions(quantization="int4", max_step=32, kernel_cache=CACHE)
    compile_model(str(make_tiny("gemma3_text", folder / "model")), folder / "model.so", options)
    return Runtime.load(folder / "model.so", threads=2)


def profiled(runtime: Runtime, splits: list[int]) -> list[KernelTime]:
    """The kernels of one sequence, all logits wanted, its tokens in steps of these sizes."""
    runtime.set_profiling(True)
    try:
        with runtime.sequence() as sequence:
            for count in splits:
                runtime.step([(sequence, np.arange(count) + 2, "all")])
        return runtime.profile_kernels()
    finally:
        runtime.set_profiling(False)


def test_every_call_has_one_cost(runtime: Runtime) -> None:
    facts = runtime.manifest.step
    numbers = [number for cost in facts.costs for number in cost.calls]
    assert sorted(numbers) == list(range(len(facts.calls)))
    assert {limit.name for limit in facts.limits} >= {"read", "int8", "f32"}


@pytest.mark.parametrize("splits", [[31], [1], [1, 30], [7, 1, 1, 22], [33, 31]])
def test_operations_are_those_of_the_model_however_its_tokens_are_split(runtime: Runtime, splits: list[int]) -> None:
    tokens = sum(splits)
    linear = 2 * tokens * (LAYERS * WEIGHTS + VOCAB * HIDDEN)
    windowed, whole = pairs_seen(0, tokens, WINDOW), pairs_seen(0, tokens, 0)
    attention = 4 * HEADS * HEAD_DIM * (WINDOWED * windowed + (LAYERS - WINDOWED) * whole)
    assert sum(item.total.operations for item in profiled(runtime, splits)) == linear + attention


def test_each_further_token_reads_its_keys_and_values_and_the_same_weights(runtime: Runtime) -> None:
    def moved(tokens: int) -> float:
        """Bytes of the last of so many tokens."""
        together = (sum(item.total.bytes for item in profiled(runtime, [1] * count)) for count in (tokens, tokens - 1))
        return next(together) - next(together)

    assert moved(3) - moved(2) == LAYERS * TOKEN_BYTES
    assert moved(12) - moved(11) == (LAYERS - WINDOWED) * TOKEN_BYTES  # the windows are full
    weights = LAYERS * WEIGHTS + VOCAB * HIDDEN
    assert 4.25 / 8 * weights < moved(2) < 9 / 8 * weights  # 4 bits and a scale; the head and padding take more


def test_calls_are_counted_where_their_guards_hold(runtime: Runtime) -> None:
    labels, steps = runtime.manifest.step.calls, (1, 32, 5)
    found = profiled(runtime, list(steps))
    runtime.set_profiling(True)
    with runtime.sequence() as sequence:
        for count in steps:
            runtime.step([(sequence, np.arange(count) + 2, "all")])
    timed = {label for label, nanoseconds in runtime.profile() if nanoseconds}
    runtime.set_profiling(False)
    assert {f"{item.op} {item.kernel} {item.shape}".strip() for item in found} == timed
    heads = [item for item in found if item.shape == f"[{VOCAB}, {HIDDEN}]"]
    assert sum(item.total.calls for item in heads) == len(steps)
    assert {item.serves for item in heads} == {(("rows", 1, 1),), (("rows", 5, 8),), (("rows", 17, None),)}
    for item in found:
        assert len(item.samples) == len(steps)
        assert all((sample.seconds > 0) == (sample.calls > 0) for sample in item.samples)
    assert len(labels) > len(found)


def test_profiling_stops_and_starts_from_zero(runtime: Runtime) -> None:
    first = profiled(runtime, [3])
    with runtime.sequence() as sequence:
        runtime.step([(sequence, [1, 2, 3], "last")])
    assert runtime.profile_kernels() == []

    def untimed(items: list[KernelTime]) -> set[KernelTime]:
        return {replace(item, samples=tuple(replace(sample, seconds=0) for sample in item.samples)) for item in items}

    assert untimed(profiled(runtime, [3])) == untimed(first)


def test_plain_kernels_count_their_matrix_products_and_weights() -> None:
    """A graph of tensor ops as a frontend lifts it, whole sequences at a time."""
    heads, kv_heads, dim, width, inner = sd.HEADS, sd.KV_HEADS, sd.DIM, sd.WIDTH, sd.INNER
    weights = width * (2 * heads + 2 * kv_heads) * dim + 3 * width * inner + width * sd.VOCABULARY
    program = lower(sd.small_decoder(), MACHINES["avx2"])
    moved, operations = 0.0, 0.0
    for found in call_costs(program):
        step = StepSizes((9, 1, 1, 1, 9, 1), ((0, 9),))
        values = [
            evaluate(manifest._polynomial(Reader(found[name], name), frozenset()), step)
            for name in ("bytes", "operations")
        ]
        calls = found["calls"]
        assert isinstance(calls, list)
        moved, operations = moved + len(calls) * values[0], operations + len(calls) * values[1]
    assert operations == 2 * 9 * weights + 2 * 2 * heads * 9 * 9 * dim
    looked_up = 2 * 9 * width  # tokens and positions
    assert 4 * weights <= moved <= 1.3 * 4 * (weights + looked_up)  # norms, masks and other small constants


# Beside the limits


def time(label: str, seconds: float, moved: float, operations: float, arithmetic: str = "f32") -> KernelTime:
    """Of two samples that took and cost the same."""
    return KernelTime("op", label, (), "", arithmetic, (Sample(1, seconds / 2, moved / 2, operations / 2),) * 2)


@pytest.mark.parametrize(
    ("item", "limit", "percent"),
    [
        (time("read", 1.0, 5e9, 1e9), "memory", 50),
        (time("multiply", 1.0, 1e9, 5e10), "f32", 50),
        (time("tiles", 2.0, 1e9, 4e12, "int8"), "int8", 50),  # the faster of two units is the limit
        (time("append", 0.5, 1e9, 0), "memory", 20),
        (time("unmeasured", 1.0, 1e9, 1e12, "bf16"), "memory", 10),
        (time("unmeasured alone", 1.0, 0, 1e12, "bf16"), None, None),
        (time("norm", 1.0, 0, 0), None, None),
    ],
    ids=lambda value: value.kernel if isinstance(value, KernelTime) else "",
)
def test_the_limit_is_what_takes_longest(item: KernelTime, limit: str | None, percent: float | None) -> None:
    phase = profile_phase([item], LIMITS, [2.0, 2.0], 8)
    (found,) = phase.kernels
    assert (found.limit, found.limit_percent) == (limit, pytest.approx(percent) if percent else None)
    total = item.total
    assert found.gigabytes_per_second == pytest.approx(total.bytes / total.seconds / 1e9)
    assert found.gops == pytest.approx(total.operations / total.seconds / 1e9)
    assert found.calls == 1


def test_a_phase_adds_up() -> None:
    items = [time("a", 1.0, 5e9, 1e9), time("b", 0.5, 0, 2.5e10), time("c", 0.1, 0, 0)]
    phase = profile_phase(items, LIMITS, [1.0, 1.0], 8)
    assert phase.wall_seconds == Spread(1.0, 1.0, 1.0)
    assert phase.kernel_seconds.median + phase.outside_seconds.median == pytest.approx(phase.wall_seconds.median)
    assert sum(item.share_percent for item in phase.kernels) + phase.outside_percent == pytest.approx(100)
    assert phase.bytes == pytest.approx(5e9 / 2)
    assert phase.operations == pytest.approx(2.6e10 / 2)
    assert phase.limit_percent == pytest.approx(100 * (0.5 + 0.25) / 2.0)
    assert [item.kernel for item in phase.kernels] == ["a", "b", "c"]


def test_one_slow_sample_changes_no_median_and_shares_still_add_up() -> None:
    slow = KernelTime("op", "slow once", (), "", "f32", tuple(Sample(1, s, 1e9, 0) for s in (0.2, 9.0, 0.2, 0.4)))
    seldom = KernelTime("op", "seldom", (), "", "f32", (Sample(), Sample(), Sample(2, 0.5, 1e9, 0), Sample()))
    phase = profile_phase([slow, seldom], LIMITS, [1.0, 10.0, 1.0, 1.0], 1)
    found = {item.kernel: item for item in phase.kernels}
    assert found["slow once"].seconds == Spread(pytest.approx(0.3), pytest.approx(0.2), pytest.approx(2.55))
    assert found["slow once"].limit_percent == pytest.approx((50 + 25) / 2)
    assert found["slow once"].share_percent == pytest.approx((20 + 90 + 20 + 40) / 4)
    assert found["seldom"].seconds == Spread(0.5, 0.5, 0.5)  # of the samples that called it
    assert (found["seldom"].calls, found["seldom"].share_percent) == (0.5, pytest.approx(50 / 4))
    assert phase.wall_seconds.median == 1.0
    assert sum(item.share_percent for item in phase.kernels) + phase.outside_percent == pytest.approx(100)


def test_what_fits_into_the_cache_has_no_share_of_the_memorys_speed() -> None:
    items = [time("read", 1.0, 4e6, 1e3), time("multiply", 1.0, 1e6, 5e10)]
    for cache, inside in ((2_500_000, True), (2_499_999, False)):
        phase = profile_phase(items, replace(LIMITS, cache_bytes=cache), [1.0, 1.0], 1)
        found = {item.kernel: item for item in phase.kernels}
        assert phase.in_cache == inside
        assert found["read"].limit == "memory"
        assert (found["read"].limit_percent is None) == inside
        assert found["multiply"].limit_percent == pytest.approx(50)
        assert phase.limit_percent == pytest.approx(25 if inside else 25 + 100 * 2e-4, abs=0.001)


def test_kernels_of_one_label_are_together_if_they_serve_the_same_rows() -> None:
    sizes = [StepSizes((tokens, 1, 1, 1, 1, 1), ((0, tokens),)) for tokens in (1, 20, 2)]
    few = manifest.CallCost(((("T",), 2.0),), (((), 3.0),), "int8", (("T", 0, 8),), (0, 2))
    last = manifest.CallCost(((("T",), 1.0),), (), "f32", (("R", 0, 8),), (3,))
    many = manifest.CallCost(((("T",), 5.0),), (), "f32", (("T", 9, None),), (1,))
    taken = [[10, 0, 40, 1], [0, 20, 0, 2], [30, 0, 1, 3]]
    one, other = kernel_times(["op kernel [2]"] * 4, taken, [few, many, last], sizes)
    assert (one.op, one.kernel, one.shape, one.serves, one.arithmetic) == (
        "op", "kernel", "[2]", (("rows", 0, 8),), "int8",
    )  # fmt: skip
    assert one.samples == (Sample(3, 51e-9, 2 + 2 + 1, 6), Sample(1, 2e-9, 20, 0), Sample(3, 34e-9, 4 + 4 + 2, 6))
    assert other.serves == (("rows", 9, None),)
    assert other.samples == (Sample(), Sample(1, 20e-9, 100, 0), Sample())
    (merged, _) = merge_steps([one, other], [2, 3])
    assert merged.samples == (Sample(4, pytest.approx(53e-9), 25, 6), one.samples[2])


# The command


def fake(tmp_path: Path, **changes: object) -> Path:
    step = fake_artifact.manifest()["step"]
    assert isinstance(step, dict)
    costs = [cost(bytes={"": 300, "KEYS": 8}, operations={"T": 40, "PAIRS": 4})]
    return fake_artifact.write(
        tmp_path / "fake.so", step={**step, "calls": ["llm.all everything [7, 3]"], "costs": costs, **changes}
    )


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtime.limits.memory_bandwidth", lambda threads: 1e10)
    monkeypatch.setattr("llmc.runtime.limits.cache_bytes", lambda: 0)


ARGUMENTS = ("--prompt-tokens", "20", "--gen-tokens", "6", "--batch", "3", "--repeats", "2", "--threads", "1")


def test_bench_profiles_prefill_and_decode(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", str(fake(tmp_path)), "--profile", "--json", *ARGUMENTS]) == 0
    profile = json.loads(capfd.readouterr().out)["profile"]
    assert profile["limits"]["read_bytes_per_second"] == 1e10
    prefill, decode = profile["phases"]["prefill"], profile["phases"]["decode"]
    (kernel,) = prefill["kernels"]
    assert (kernel["op"], kernel["kernel"], kernel["shape"]) == ("llm.all", "everything", "[7, 3]")
    # 3 * 20 tokens are two steps of at most 48: the third text is 8 and 12 tokens long in them.
    assert (prefill["samples"], prefill["tokens"], kernel["calls"]) == (2, 60, 2)
    assert kernel["bytes"] == 2 * 300 + 8 * (20 + 20 + 8 + 20)
    assert kernel["operations"] == 40 * 60 + 4 * 3 * (20 * 21 // 2)
    (kernel,) = decode["kernels"]
    assert (decode["samples"], decode["tokens"], kernel["calls"]) == (6, 3, 1)
    assert kernel["bytes"] == pytest.approx(300 + 8 * 3 * np.mean([21, 22, 23, 24, 25, 26]))
    assert kernel["limit"] == "memory"


def test_bench_prints_a_table_for_each_phase(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    costs = [cost(bytes={"": 300}, calls=[0], when=[["R", 1, 1]]), cost(calls=[1], when=[["T", 2, 4]])]
    path = fake(tmp_path, calls=["llm.all everything [7, 3]", "llm.all everything [7, 3]"], costs=costs)
    assert cli(["bench", str(path), "--profile", "--prompt-tokens", "4", "--gen-tokens", "6", "--threads", "1"]) == 0
    out = capfd.readouterr().out
    assert "memory 10.0 GB/s" in out
    assert "prefill of 4 tokens, median of 3 samples" in out
    assert "decode of 1 token, median of 6 samples" in out
    assert out.count("outside kernels") == out.count("in all") == 2
    rows = [line.split()[:5] for line in out.splitlines() if "everything" in line]
    assert sorted(rows[:2]) == [["all", "everything", "1", "[7,", "3]"], ["all", "everything", "2-4", "[7,", "3]"]]
    assert rows[2:] == [["all", "everything", "1", "[7,", "3]"]]
    assert "10^9 bytes" in out and "a multiply-add is two" in out


def lines_of(items: list[KernelTime], limits: Limits, capfd: pytest.CaptureFixture[str]) -> str:
    print_profile(Profile(limits, {"decode": profile_phase(items, limits, [1.0, 1.0], 1)}))
    return capfd.readouterr().out


def test_a_percentage_above_100_is_never_printed(capfd: pytest.CaptureFixture[str]) -> None:
    out = lines_of([time("read", 1.0, 23e9, 1e9), time("slower", 0.5, 3e9, 0)], LIMITS, capfd)
    assert re.search(r"read .* memory +>100\n", out)
    assert re.search(r"slower .* memory +60\.0\n", out)
    assert "230" not in out.replace("23,000.0", "")
    assert ">100: the limit was measured low" in out
    assert "in cache" not in out


def test_percentages_in_the_cache_are_words(capfd: pytest.CaptureFixture[str]) -> None:
    limits = replace(LIMITS, cache_bytes=32 << 20)
    out = lines_of([time("read", 1.0, 2e6, 1e3), time("multiply", 0.5, 1e6, 2e10)], limits, capfd)
    assert "memory  in cache\n" in out
    assert "f32         40.0\n" in out
    assert "in cache: all that a sample reads fits into the last cache (32.0 MiB)" in out
    assert ">100" not in out


@pytest.mark.parametrize(
    ("cache", "bandwidth_now", "said"),
    [
        (0, 1e15, "decode uses 0.0% of it"),
        (0, 1e-3, "decode reads faster: the limit was measured low"),
        (1 << 40, 1e-3, "the weights are in cache, so that memory is no limit"),
    ],
)
def test_bench_says_what_a_share_of_the_bandwidth_means(
    cache: int,
    bandwidth_now: float,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmc.runtime.limits.memory_bandwidth", lambda threads: bandwidth_now)
    monkeypatch.setattr("llmc.runtime.limits.cache_bytes", lambda: cache)
    assert cli(["bench", str(fake(tmp_path)), *ARGUMENTS]) == 0
    out = capfd.readouterr().out
    assert said in out
    assert "measured now with 1 thread;" in out
    assert "weights read      0.0 MB a step" in out


def test_bench_says_when_an_artifact_has_no_costs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", str(fake(tmp_path, costs=[])), "--profile", *ARGUMENTS]) != 0
    assert "compile the model again" in capfd.readouterr().err


# The picture


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_roofline_is_drawn_in_the_type_of_its_name(
    suffix: str, start: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"roof{suffix}"
    picture.write_text("older")
    assert cli(["bench", str(fake(tmp_path)), "--roofline", str(picture), *ARGUMENTS]) == 0
    assert picture.read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake.so", picture.name]
    assert "outside kernels" not in capfd.readouterr().out  # the table is asked for by --profile


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda folder: folder / "roof.jpeg", ".png, .svg, .pdf"),
        (lambda folder: folder / "roof", ".png, .svg, .pdf"),
        (lambda folder: folder / "missing" / "roof.png", "there is no folder"),
        (lambda folder: _folder(folder / "roof.png"), "it is a folder"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_anything_is_measured(
    place: Callable[[Path], Path], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli(["bench", str(tmp_path / "no artifact"), "--roofline", str(place(tmp_path))]) != 0
    assert said in capfd.readouterr().err


def test_a_missing_matplotlib_is_told_with_the_command_that_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli(["bench", str(tmp_path / "no artifact"), "--roofline", str(tmp_path / "roof.png")]) != 0
    assert "pip install matplotlib" in capfd.readouterr().err


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    picture = tmp_path / "roof.png"
    picture.write_text("older")

    def full(self: object, file: IO[bytes], **_: object) -> None:
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    assert cli(["bench", str(fake(tmp_path)), "--roofline", str(picture), *ARGUMENTS]) != 0
    assert "No space left on device" in capfd.readouterr().err
    assert picture.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake.so", "roof.png"]
