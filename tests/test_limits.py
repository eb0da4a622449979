"""The limit kernels do all the work that they count, and what is measured with them is what they did."""

from __future__ import annotations

import ctypes
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import CACHE, Compiled, aligned
from x86_machines import MACHINES, each_machine

from llmc.errors import ArtifactError, CompileError
from llmc.runtime import cpu, limits
from llmc.runtime.limits import LimitFunction, Limits, load_functions, measure_limit, measure_limits
from llmc.runtime.manifest import LimitFacts
from llmc.targets import machine_named
from llmc.targets.cpu import limit_kernels as sources
from llmc.targets.cpu.codegen import build_module
from llmc.targets.cpu.limits import LimitKernel, limit_kernels, measure
from llmc.targets.machine import Machine

TILES = frozenset({"amx-tile", "amx-int8", "amx-bf16"})
SERVER = Machine("server", "x86", "sapphirerapids", MACHINES["avx512vnni"].features | TILES, 512)


def kernels(machine: Machine) -> dict[str, LimitKernel]:
    return {item.name: item for item in limit_kernels(machine)}


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        (MACHINES["avx2"], {"read", "int8", "f32"}),
        (MACHINES["avxvnni"], {"read", "int8", "f32"}),
        (MACHINES["avx512"], {"read", "int8", "f32"}),
        (MACHINES["avx512vnni"], {"read", "int8", "f32", "bf16"}),
        (SERVER, {"read", "int8", "f32", "bf16", "tile_int8", "tile_bf16"}),
    ],
    ids=lambda value: value.name if isinstance(value, Machine) else "",
)
def test_a_machine_is_measured_at_what_it_has_instructions_for(machine: Machine, names: set[str]) -> None:
    assert set(kernels(machine)) == names
    assert len({item.kernel.symbol for item in limit_kernels(machine)}) == len(names)


# (machine, limit, instruction, operations of one): as many instructions as the counted operations need.
INSTRUCTIONS = [
    (MACHINES["avx2"], "int8", "vpmaddubsw", 2 * 32),
    (MACHINES["avx2"], "f32", "vfmadd", 2 * 8),
    (MACHINES["avxvnni"], "int8", "vpdpbusd", 2 * 32),
    (MACHINES["avx512"], "int8", "vpmaddubsw", 2 * 64),
    (MACHINES["avx512vnni"], "int8", "vpdpbusd", 2 * 64),
    (MACHINES["avx512vnni"], "f32", "vfmadd", 2 * 16),
    (MACHINES["avx512vnni"], "bf16", "vdpbf16ps", 2 * 32),
    (SERVER, "tile_int8", "tdpbssd", 2 * 16 * 16 * 64),
    (SERVER, "tile_bf16", "tdpbf16ps", 2 * 16 * 16 * 32),
]


@pytest.mark.parametrize(("machine", "name", "instruction", "operations"), INSTRUCTIONS)
def test_a_unit_has_an_instruction_for_every_operation_counted(
    machine: Machine, name: str, instruction: str, operations: int
) -> None:
    """Nothing is shared, hoisted or counted twice; and sums stay in registers."""
    found = kernels(machine)[name]
    text = build_module(found.kernel, machine).inspect_source("asm")
    lines = [line for line in text.splitlines() if line.split() and instruction in " ".join(line.split()[:2])]
    units, rest = divmod(len(lines) * operations, found.amount)  # LLVM may unroll further
    assert units >= 1
    assert rest == 0
    spilled = [line for line in lines if "(%rsp)" in line or "(%rbp)" in line]
    assert spilled == []


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 7), (3, 5), (2, 2)])
def test_reading_reads_every_byte(machine: Machine, begin: int, end: int) -> None:
    found = kernels(machine)["read"]
    words = found.amount // 4
    data = aligned(np.random.default_rng(1).integers(-(2**31), 2**31, 7 * words).astype(np.int32))
    out = aligned(np.zeros(16, np.int32))
    Compiled(found.kernel, machine)(data, out, begin, end)
    assert out.sum(dtype=np.int32) == data[begin * words : end * words].sum(dtype=np.int32)


@pytest.mark.parametrize("machine", each_machine())
def test_multiplying_bytes_and_floats_computes_what_the_loop_says(machine: Machine) -> None:
    """The exclusive or of all sums: a product left out would change it."""
    lanes = machine.vector_bits // 32
    rows, columns = (5, 2) if machine.vector_bits == 256 else (6, 2)  # 16 registers of x86, and 32 of the others
    begin, end = 30, 37  # past the place where the starts repeat
    values = np.random.default_rng(2).integers(1, 5, sources.INPUT_BYTES // 4).astype(np.float32)
    total = np.zeros(lanes, np.int32)
    for row in range(rows):
        for column in range(columns):
            sums = np.zeros(lanes, np.float32)
            for unit in range(begin, end):
                first = unit % sources.STARTS * lanes
                weight = values[first + column * lanes :][:lanes]
                for step in range(sources.STEPS):
                    at = first + (columns + step * rows + row) * lanes
                    sums += weight * values[at : at + lanes]
            total ^= sums.view(np.int32)
    out = aligned(np.zeros(16, np.int32))
    Compiled(kernels(machine)["f32"].kernel, machine)(aligned(values), out, begin, end)
    np.testing.assert_array_equal(out[:lanes], total)


class Recorder:
    """A limit function that notes what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, int]] = []
        self.lock = threading.Lock()

    def __call__(self, data: int, output: int, begin: int, end: int) -> None:
        with self.lock:
            self.calls.append((data, output, begin, end))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_what_is_read_and_each_has_its_own_output(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "buffer_bytes", lambda: 7 * 4096 + 100)
    recorder = Recorder()
    assert measure_limit(LimitFunction("read", 4096, 0, recorder), threads, seconds=0) > 0
    assert len(recorder.calls) == 2 * threads  # two rounds
    for round_ in (recorder.calls[:threads], recorder.calls[threads:]):
        ranges = sorted(call[2:] for call in round_)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == 7
        assert all(left[1] == right[0] for left, right in pairwise(ranges))
        outputs = sorted(call[1] for call in round_)
        assert all(right - left >= 1024 for left, right in pairwise(outputs))
        assert len({call[0] for call in round_}) == 1


def test_the_best_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "buffer_bytes", lambda: 8 * 4096)
    taken = iter([0.5, 0.25])
    monkeypatch.setattr(limits, "_round", lambda *_: next(taken))
    assert measure_limit(LimitFunction("read", 4096, 0, Recorder()), 2, seconds=0) == 8 * 4096 / 0.25


def test_multipliers_count_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_round", lambda *_: 0.5)
    monkeypatch.setattr(limits, "_units_for", lambda *_: 100)
    assert measure_limit(LimitFunction("int8", 1000, 8192, Recorder()), 3, seconds=0) == 3 * 100 * 1000 / 0.5


def test_the_peak_of_an_arithmetic_is_that_of_its_fastest_unit() -> None:
    found = Limits(2, 1e10, int8_ops_per_second=1e12, f32_flops_per_second=3e11, tile_int8_ops_per_second=8e12)
    assert found.peak("int8") == 8e12
    assert found.peak("f32") == 3e11
    assert found.peak("bf16") is None
    assert found.peaks() == {"int8": 1e12, "f32": 3e11, "tile_int8": 8e12}


def test_memory_is_measured_without_a_function_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_bandwidth", lambda threads: threads * 1e9)
    monkeypatch.setattr(limits, "cache_bytes", lambda: 9 << 20)
    assert measure_limits([], 3) == Limits(3, 3e9, cache_bytes=9 << 20)


def test_a_function_that_the_library_lacks_is_an_error_and_an_unknown_limit_is_not() -> None:
    library = ctypes.CDLL(None)
    assert load_functions(library, [LimitFacts("antigravity", "llmc_limit_antigravity", 1, 0)]) == []
    with pytest.raises(ArtifactError, match="llmc_limit_read_0"):
        load_functions(library, [LimitFacts("read", "llmc_limit_read_0", 1, 0)])


def test_this_computer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SECONDS", 0.01)
    monkeypatch.setattr(limits, "buffer_bytes", lambda: 4 << 20)
    machine = machine_named("native")
    found = measure(machine, 2, CACHE)
    assert found.threads == 2
    assert set(found.peaks()) == set(kernels(machine)) - {"read"}
    # No machine is a thousand times as fast as those that kernels are written for; a busy one may be very slow.
    assert 0 < found.read_bytes_per_second < 1e13
    assert all(0 < rate < 1e15 for rate in found.peaks().values())


def test_another_machine_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2"}))
    with pytest.raises(CompileError, match=r"no .*amx-int8.* as server"):
        measure(SERVER, 1, tmp_path)
