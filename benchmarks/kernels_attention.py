"""How near attention runs to the machine: decode against read bandwidth, prefill against FMA or tile peak, one thread.

    python benchmarks/kernels_attention.py [--quick]

Both limits are measured in the same run, by kernels that do nothing else, interleaved with what they are compared to.
A cell is the median of the rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernel_harness import Compiled, aligned
from x86_machines import MACHINES, runnable

from llmc.runtime import cpu
from llmc.targets.cpu.attention import AttentionPlan, attention_plan
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.builder import loop, scratch
from llmc.targets.cpu.limit_kernels import INPUT_BYTES
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import integer, load, prefetch, range_kernel, splat, store
from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser
from llmc.targets.x86 import detect
from llmc.targets.x86.tile_limits import TILE_SUMS, limit_tiles
from llmc.targets.x86.tiles import has_tiles

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import PrimFunc

PAGE, TILE = 32, 64
SHAPES = [(32, 8, 128), (14, 2, 64), (16, 16, 64)]  # heads, kv_heads, head_dim


def read_memory(machine: Machine, *, block: int) -> PrimFunc:
    """data f32[units, block], order i32[units], out f32[units, lanes]: reads and adds, one block after another.

    Blocks come in any order, as a cache's pages do; the following one is prefetched at the pace of reading.
    """
    lanes, chains = isa_for(machine).lanes, 8

    def unit(a: SimpleNamespace, u: Expr) -> None:
        sums = [scratch(lanes, "float32") for _ in range(chains)]
        for chain in sums:
            store(chain, 0, splat(0.0, lanes))
        here, following = (integer(load(a.order, u + i)) * block for i in (0, 1))
        with loop(block // (lanes * chains)) as i:
            prefetch(a.data, following + i * (lanes * chains), lanes * chains)
            for number, chain in enumerate(sums):
                at = here + i * (lanes * chains) + number * lanes
                store(chain, 0, load(chain, 0, lanes) + load(a.data, at, lanes))
        total = load(sums[0], 0, lanes)
        for chain in sums[1:]:
            total = total + load(chain, 0, lanes)
        store(a.out, u * lanes, total)

    return range_kernel([("data", "float32"), ("order", "int32"), ("out", "float32")], [], unit)


def multiply_add(machine: Machine, *, steps: int) -> PrimFunc:
    """data f32[2, lanes], out f32[units, lanes]: 12 chains of fused multiply-adds in registers, `steps` of each."""
    lanes, chains = isa_for(machine).lanes, 12

    def unit(a: SimpleNamespace, u: Expr) -> None:
        sums = [scratch(lanes, "float32") for _ in range(chains)]
        for number, chain in enumerate(sums):
            store(chain, 0, splat(float(number), lanes))
        with loop(steps):
            for chain in sums:
                store(chain, 0, load(chain, 0, lanes) * load(a.data, 0, lanes) + load(a.data, lanes, lanes))
        total = load(sums[0], 0, lanes)
        for chain in sums[1:]:
            total = total + load(chain, 0, lanes)
        store(a.out, u * lanes, total)

    return range_kernel([("data", "float32"), ("out", "float32")], [], unit)


def seconds(run: Callable[[], None]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def compare(work: Callable[[], None], limit: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median seconds of both, run in turn."""
    work(), limit()
    pairs = [(seconds(work), seconds(limit)) for _ in range(rounds)]
    return median(p[0] for p in pairs), median(p[1] for p in pairs)


def attention_arrays(
    shape: tuple[int, int, int], sequences: int, context: int, new: int
) -> tuple[list[np.ndarray], int, int]:
    """A step's arrays: `new` last tokens of each sequence, whose pages lie in random order. Also M and the tiles."""
    heads, kv_heads, dim = shape
    rng = np.random.default_rng(0)
    pages = context // PAGE
    table = rng.permutation(sequences * pages).astype(np.int32).reshape(sequences, pages)
    cache = [aligned(np.full((sequences * pages, kv_heads, dim, PAGE), 0.25, np.float16)) for _ in range(2)]
    query = rng.standard_normal((sequences * new, heads, dim)).astype(np.float32)
    tiles = [
        (sequence, sequence * new + start, min(TILE, new - start), context - new + start)
        for sequence in range(sequences)
        for start in range(0, new, TILE)
    ]
    out = np.zeros_like(query)
    arrays = [aligned(query), *cache, aligned(np.array(tiles, np.int32)), aligned(table), aligned(out)]
    return arrays, pages, len(tiles)


def runner(
    machine: Machine, shape: tuple[int, int, int], sequences: int, context: int, new: int
) -> tuple[Callable[[], None], list[np.ndarray]]:
    heads, kv_heads, dim = shape
    plan = attention_plan(Chooser(machine), AttentionProblem(heads, kv_heads, dim, dim, dim**-0.5))
    assert isinstance(plan, AttentionPlan)
    arrays, pages, tiles = attention_arrays(shape, sequences, context, new)
    unused = aligned(np.zeros(16, np.float32))
    tile = Compiled(plan.tile, machine)
    kind = [int(new > 1)] * plan.by_kind
    return lambda: tile(*arrays, unused, unused, pages, 1, *kind, 0, plan.tile_units(tiles, 1)), arrays


def decode_line(machine: Machine, shape: tuple[int, int, int], rounds: int, total_bytes: int) -> str:
    """One new token of several sequences over long contexts, against reading as many bytes."""
    _, kv_heads, dim = shape
    context = 4096
    sequences = max(1, total_bytes // (context * kv_heads * dim * 4))
    run, arrays = runner(machine, shape, sequences, context, 1)
    size = arrays[1].nbytes + arrays[2].nbytes
    block = dim * PAGE // 2  # a head's keys or values of a page
    units = size // (4 * block)
    data = aligned(np.zeros((units, block), np.float32))
    order = aligned(np.append(np.random.default_rng(1).permutation(units), 0).astype(np.int32))
    sink = aligned(np.zeros((units, 16), np.float32))
    read = Compiled(kernel(read_memory, machine.key, block=block), machine)
    taken, limit = compare(run, lambda: read(data, order, sink, 0, units), rounds)
    return f"decode  {shape!s:14} {size / taken / 1e9:7.1f} GB/s of {size / limit / 1e9:6.1f}: {limit / taken:6.1%}"


def prefill_line(machine: Machine, shape: tuple[int, int, int], context: int, new: int, rounds: int) -> str:
    """`new` tokens at the end of a context, against fused multiply-adds in registers."""
    heads, _, dim = shape
    run, _ = runner(machine, shape, 1, context, new)
    keys = sum(range(context - new + 1, context + 1))
    operations = 4 * keys * heads * dim
    if has_tiles(machine, "bf16"):
        unit_operations, shape_of = TILE_SUMS * 2 * 16 * 16 * 32, [INPUT_BYTES // 4]
        peak = Compiled(kernel(limit_tiles, machine.key, dtype="bf16"), machine)
    else:
        steps, lanes = 1000, isa_for(machine).lanes
        unit_operations, shape_of = steps * 12 * lanes * 2, [2, lanes]
        peak = Compiled(kernel(multiply_add, machine.key, steps=steps), machine)
    units = max(1, operations // unit_operations)
    data = aligned(np.full(shape_of, 0.5, np.float32))
    sink = aligned(np.zeros(max(units * 16, 256), np.float32))
    taken, limit = compare(run, lambda: peak(data, sink, 0, units), rounds)
    limit *= operations / (units * unit_operations)
    return (
        f"prefill {shape!s:14} {operations / taken / 1e9:7.1f} GFLOPS of {operations / limit / 1e9:6.1f}:"
        f" {limit / taken:6.1%}  ({new} tokens of {context})"
    )


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    rounds, total_bytes = (3, 64 << 20) if quick else (9, 512 << 20)
    machines = {name: MACHINES[name] for name in ("avx2", "avx512vnni") if runnable(name)}
    tiles = detect.machine("sapphirerapids")
    if tiles.features <= cpu.features():
        machines["amx"] = tiles
    for name, machine in machines.items():
        print(name)
        for shape in SHAPES:
            print(" ", decode_line(machine, shape, rounds, total_bytes), flush=True)
        for shape in SHAPES:
            for context, new in ((512, 512), (2048, 128)):
                print(" ", prefill_line(machine, shape, context, new, rounds), flush=True)


if __name__ == "__main__":
    main()
