"""Integer linear kernels beside the least time that this computer's memory and vector units allow, on one thread.

    python benchmarks/kernels_linear.py [--target x86-64-v3] [--rounds 5] [--tokens 1,8,512] [--json]

What a kernel must read and do is counted in `linear_limits`; how fast this computer reads and does it is measured in
the same rounds, interleaved with the kernels, because a shared computer's speed wanders. Shares are of whole rounds:
the median of limit / measured. Weights of up to 16 rows are gone through in many copies, so that they come from memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

import linear_limits as limits
from kernel_harness import Compiled, aligned

from llmc.targets import machine_named, machine_names
from llmc.targets.cpu.linear_plan import quantized_linear_plan
from llmc.targets.cpu.linear_problem import QuantizedProblem
from llmc.targets.cpu.tile_slices import slices_of
from llmc.targets.cpu.variants import LinearPlan
from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser
from llmc.targets.x86.isa import isa_for

# (name, n, k, gated) of a decoder of half a billion and one of a billion parameters
SHAPES = [
    ("0.5b gate_up", 2 * 4864, 896, True),
    ("0.5b down", 896, 4864, False),
    ("1.1b gate_up", 2 * 5632, 2048, True),
    ("1.1b down", 2048, 5632, False),
]
WORKING_SET = 256 << 20  # bytes of weights gone through in a round, well past any cache but a server's third level
FEW = 16  # rows that are limited by memory, or nearly
GROUP = 64
KINDS = [(4, False), (4, True), (6, True), (8, False)]  # bits, and whether integers stand for levels of a table


@dataclass
class Job:
    """run() does `amount` of something; seconds: of every round."""

    name: str
    run: Callable[[], None]
    amount: float = 0.0
    nbytes: float = 0.0
    work: limits.Work = field(default_factory=limits.Work)
    seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        """One round."""
        start = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - start)

    def rates(self) -> np.ndarray:
        """amount a second, of every round."""
        return self.amount / np.asarray(self.seconds)


def linear_job(machine: Machine, plan: LinearPlan, name: str, tokens: int, n: int, k: int, gated: bool) -> Job:
    """Time the plan's kernel for this many tokens."""
    (variant,) = [v for v in plan.variants if v.low <= tokens and (v.high is None or tokens <= v.high)]
    layout = plan.layout
    rng = np.random.default_rng(0)
    copies = max(1, WORKING_SET // layout.nbytes(n, k)) if tokens <= FEW else 1
    # All copies of a part in one array, which lies in huge pages, as the runtime's weights do and `read`'s numbers.
    arrays = {
        part: aligned(np.broadcast_to(rng.integers(0, 100, shape).astype(dtype), (copies, *shape)))
        for part, (shape, dtype) in layout.arrays(n, k).items()
    }
    groups = layout.groups(k)
    inputs = {
        "xq": aligned(rng.integers(-127, 128, (tokens, groups * GROUP)).astype(np.int8)),
        "xscales": aligned((rng.random((tokens, groups)) * 1e-6).astype(np.float32)),  # results around 1
        "xsums": aligned(np.zeros((tokens, groups), np.int32)),
        "out": aligned(np.zeros((tokens, n // 2 if gated else n), np.float32)),
    }
    compiled = Compiled(variant.kernel, machine)
    calls = [[inputs[a] if a in inputs else arrays[a][c] for a in plan.names(variant)] for c in range(copies)]
    units = variant.units(tokens)

    def run() -> None:
        for arguments in calls:
            compiled(*arguments, tokens, 0, units)

    params = dict(variant.kernel.params)
    reuse = params["row_block"] if variant.row_block else params["rows"]
    work = limits.linear_work(
        isa_for(machine), layout,
        tokens=tokens, slices=layout.tiles(n) * slices_of(isa_for(machine), layout), groups=groups, reuse=reuse,
    )  # fmt: skip
    return Job(name, run, copies, copies * layout.nbytes(n, k), work * copies)


def limit_jobs(machine: Machine) -> dict[str, Job]:
    """read: bytes a second; heavy, light: instructions a second."""
    big, out = aligned(np.ones(WORKING_SET // 2, np.uint8)), aligned(np.zeros(16, np.int32))
    small, units = aligned(np.ones(8192, np.int8)), 100_000

    def job(name: str, template: Callable[..., object], data: np.ndarray, count: int, amount: float) -> Job:
        compiled = Compiled(kernel(template, machine.key), machine)
        return Job(name, lambda: compiled(data, out, 0, count), amount)

    steps = units * limits.STEPS * limits.SUMS
    return {
        "read": job("read", limits.read, big, big.nbytes // limits.READ_BYTES, big.nbytes),
        "heavy": job("heavy", limits.heavy, small, units, steps),
        "light": job("light", limits.light, small, units, 2 * steps),
    }


def jobs(machine: Machine, tokens: list[int], shapes: str) -> list[Job]:
    """Every kernel on every shape, but kernels on tile registers: their limit is another."""
    found = []
    for shape, n, k, gated in SHAPES:
        if shapes not in shape:
            continue
        fused = {"gated": gated, "activation": "silu" if gated else "none"}
        for bits, table in KINDS:
            problem = QuantizedProblem(n=n, k=k, bits=bits, group=GROUP, symmetric=True, table=table, **fused)
            plan = quantized_linear_plan(Chooser(machine), problem)
            name = f"{shape} {'t' if table else 'q'}{bits}"
            found += [linear_job(machine, plan, f"{name} T={count}", count, n, k, gated) for count in tokens]
    return found


def main() -> None:
    """Interleave rounds of all jobs, then print each one's time beside its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=machine_names(), default="native", help="its instructions must run here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", default="1,8,512")
    parser.add_argument("--shapes", default="", help="only shapes whose name holds this")
    parser.add_argument("--no-tiles", action="store_true", help="as if there were no tile registers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    machine = machine_named(options.target)
    if options.no_tiles:
        plain = frozenset(name for name in machine.features if not name.startswith("amx"))
        machine = Machine(machine.name, machine.arch, machine.mcpu, plain, machine.vector_bits)
    measured = limit_jobs(machine)
    found = jobs(machine, [int(count) for count in options.tokens.split(",")], options.shapes)
    for _ in range(options.rounds):
        for job in [*measured.values(), *found]:
            job.time()
    read, heavy, light = (measured[name].rates() for name in ("read", "heavy", "light"))
    any_rate = np.maximum(light, heavy)
    rows = []
    for job in found:
        memory = job.nbytes / read
        vector = np.array([job.work.seconds(h, a) for h, a in zip(heavy, any_rate, strict=True)])
        limit = np.maximum(memory, vector)
        share = limit / np.asarray(job.seconds)
        rows.append({
            "name": job.name,
            "microseconds": float(np.median(job.seconds) / job.amount * 1e6),
            "memory_limit": float(np.median(memory) / job.amount * 1e6),
            "vector_limit": float(np.median(vector) / job.amount * 1e6),
            "of_limit": float(np.median(share)),
            "spread": [float(share.min()), float(share.max())],
        })  # fmt: skip
    rates = {"read_bytes": float(np.median(read)), "heavy": float(np.median(heavy)), "any": float(np.median(any_rate))}
    if options.json:
        print(json.dumps({"target": options.target, "isa": isa_for(machine).name, "rates": rates, "kernels": rows}))
        return
    print(f"{isa_for(machine).name}: reads {rates['read_bytes'] / 1e9:.1f} GB/s; vector instructions a ns: "
          f"{rates['heavy'] / 1e9:.2f} heavy, {rates['any'] / 1e9:.2f} any")  # fmt: skip
    print(f"{'':24} {'us':>9} {'memory':>9} {'vector':>9} {'of limit':>9}  spread")
    for row in rows:
        print(f"{row['name']:24} {row['microseconds']:9.1f} {row['memory_limit']:9.1f} {row['vector_limit']:9.1f} "
              f"{row['of_limit']:9.0%}  {row['spread'][0]:.0%}-{row['spread'][1]:.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
