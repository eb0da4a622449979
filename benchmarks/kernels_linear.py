"""Linear kernels beside what this computer can do: memory bandwidth for one token, byte multipliers for prefill.

    python benchmarks/kernels_linear.py [--isa avx512vnni] [--rounds 5] [--json]

The limits are measured in the same run, interleaved with the kernels, because a shared computer's speed wanders: read
bandwidth by a kernel that only adds up an array, the multipliers' peak by a kernel that stays in the first-level cache.
Two threads are two Python threads (ctypes drops the interpreter's lock) on halves of the work units.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tvm import tirx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernel_harness import Compiled, aligned
from x86_machines import MACHINES, runnable

from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine
from llmc.targets.x86 import linear_builder as b
from llmc.targets.x86.isa import isa_for
from llmc.targets.x86.layouts import FloatLayout
from llmc.targets.x86.linear_plan import LinearPlan, float_linear_plan, quantized_linear_plan

# qwen2.5-0.5b: gate and up, then down. (name, n, k, gated)
SHAPES = [("gate_up", 2 * 4864, 896, True), ("down", 896, 4864, False)]
WORKING_SET = 256 << 20  # bytes of weights gone through in a round, well past any cache but a server's third level

MULTIPLY_BYTES = 8192


def read_all(machine: Machine):
    """(x i32, out i32; begin, end): one unit is 4 KiB of x, added up."""
    isa = isa_for(machine)

    def body(p, s):
        x, out = b.view(p["x"], [b.MANY, 1024], "int32"), b.view(p["out"], [isa.lanes], "int32")
        sums = b.Registers(4, isa.i32)
        for j in range(4):
            sums[j] = isa.splat(0, "int32")
        with b.loop(s["end"] - s["begin"]) as i, b.loop(1024 // isa.lanes // 4) as v:
            for j in range(4):
                sums[j] = sums[j] + isa.load(x, s["begin"] + i, (v * 4 + j) * isa.lanes)
        b.store_vector(isa, out, [0], sums[0] + sums[1] + sums[2] + sums[3])

    return b.plain_function([("x", "int32"), ("out", "int32")], [], body)


def multiply_limit(machine: Machine):
    """(x i8, out i32; begin, end): one unit is 8 dots of 4-bit weights in each of 10 independent sums.

    Without VNNI a dot is a multiplication and an addition of i16, the least there is; there the operands change all the
    time, because a compiler shares repeated products.
    """
    isa = isa_for(machine)
    width = isa.vector_bytes

    def body(p, s):
        x, out = b.view(p["x"], [MULTIPLY_BYTES], "int8"), b.view(p["out"], [isa.lanes], "int32")
        sums = b.Registers(10, isa.i32 if isa.vnni else isa.i16)
        for j in range(10):
            sums[j] = isa.splat(0, "int32" if isa.vnni else "int16")
        with b.loop(s["end"] - s["begin"]) as i:
            first = b.let((s["begin"] + i) % 32 * width)
            w = [b.let(isa.load(x, first + j * width, lanes=width)) for j in range(2)]
            for step in range(8):
                for j in range(5):
                    a = b.let(isa.load(x, first + (2 + (0 if isa.vnni else step * 5) + j) * width, lanes=width))
                    for t in range(2):
                        at = j * 2 + t
                        sums[at] = isa.dot(sums[at], w[t], a, 4) if isa.vnni else sums[at] + isa.dot_narrow(w[t], a)
        total = sums[0]
        for j in range(1, 10):
            total = total ^ sums[j]
        b.store_vector(isa, out, [0], tirx.reinterpret(isa.i32, total))

    return b.plain_function([("x", "int8"), ("out", "int32")], [], body)


@dataclass
class Job:
    """Something to time: run(begin, end) does a range of `units`; the result is `amount` / seconds in `unit`."""

    name: str
    run: Callable[[int, int], None]
    units: int
    amount: float
    unit: str
    limit: str = ""
    best: dict[int, float] = field(default_factory=dict)

    def time(self, threads: int) -> None:
        """One round; keeps the best."""
        bounds = [self.units * i // threads for i in range(threads + 1)]
        workers = [threading.Thread(target=self.run, args=(bounds[i], bounds[i + 1])) for i in range(1, threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        self.run(bounds[0], bounds[1])
        for worker in workers:
            worker.join()
        rate = self.amount / (time.perf_counter() - start)
        self.best[threads] = max(rate, self.best.get(threads, 0.0))


def linear_job(machine: Machine, plan: LinearPlan, name: str, tokens: int, n: int, k: int, gated: bool) -> Job:
    """Time the plan's kernel for this many tokens. Few tokens go through many copies of the weight."""
    (variant,) = [v for v in plan.variants if v.low <= tokens and (v.high is None or tokens <= v.high)]
    rng = np.random.default_rng(0)
    nbytes = plan.layout.nbytes(n, k)
    copies = max(1, WORKING_SET // nbytes) if tokens <= 16 else 1
    # As bits, 0x3F80 and up are bf16 numbers of ordinary size: denormals would be slow.
    first = 0x3F80 if isinstance(plan.layout, FloatLayout) else 0
    arrays = {
        part: [aligned(rng.integers(first, first + 100, shape).astype(dtype)) for _ in range(copies)]
        for part, (shape, dtype) in plan.layout.arrays(n, k).items()
    }
    group = getattr(plan.layout, "group", 32)
    padded = -(-k // group) * group
    inputs = {
        "x": aligned(
            rng.integers(0x3F80, 0x3FFF, (tokens, k + k % 2)).astype(np.uint16)
            if plan.activations == "bf16"
            else rng.standard_normal((tokens, k)).astype(np.float32)
        ),
        "xq": aligned(rng.integers(-127, 128, (tokens, padded)).astype(np.int8)),
        "xscales": aligned((rng.random((tokens, padded // group)) * 1e-6).astype(np.float32)),  # results around 1
        "xsums": aligned(np.zeros((tokens, padded // group), np.int32)),
        "out": aligned(np.zeros((tokens, n // 2 if gated else n), np.float32)),
    }
    compiled = Compiled(variant.kernel, machine)
    calls = [[inputs[a] if a in inputs else arrays[a][c] for a in plan.arguments] for c in range(copies)]

    def run(begin: int, end: int) -> None:
        for arguments in calls:
            compiled(*arguments, tokens, begin, end)

    units = variant.units(tokens)
    if tokens <= 16:
        return Job(name, run, units, copies * nbytes / 1e9, "GB/s", "read")
    return Job(name, run, units, 2 * tokens * n * k / 1e12, "TOPS", "multiply" if plan.activations == "i8" else "")


def limit_jobs(machine: Machine) -> list[Job]:
    """The two limits."""
    isa = isa_for(machine)
    big, out = aligned(np.ones(WORKING_SET, np.uint8)), [aligned(np.zeros(16, np.int32)) for _ in range(2)]
    reader = Compiled(kernel(read_all, machine.key), machine)
    multiplier = Compiled(kernel(multiply_limit, machine.key), machine)
    small = aligned(np.ones(MULTIPLY_BYTES, np.int8))
    units = 100_000
    dots = units * 8 * 10 * isa.lanes * 4 * 2 / 1e12
    return [
        Job("read", lambda i, j: reader(big, out[i > 0], i, j), WORKING_SET >> 12, WORKING_SET / 1e9, "GB/s"),
        Job("multiply", lambda i, j: multiplier(small, out[i > 0], i, j), units, dots, "TOPS"),
    ]


def jobs(machine: Machine, quick: bool) -> list[Job]:
    """Every kernel on every shape."""
    found = limit_jobs(machine)
    for shape, n, k, gated in SHAPES[: 1 if quick else None]:
        fused = {"gated": gated, "activation": "silu" if gated else "none"}
        plans = {
            "q4": quantized_linear_plan(machine, n=n, k=k, bits=4, group=64, symmetric=True, **fused),
            "q8": quantized_linear_plan(machine, n=n, k=k, bits=8, group=64, symmetric=True, **fused),
        }
        if not quick:
            plans["q4 x f32"] = quantized_linear_plan(
                machine, n=n, k=k, bits=4, group=64, symmetric=True, activations="f32", **fused
            )
            plans |= {d: float_linear_plan(machine, n=n, k=k, dtype=d, **fused) for d in ("bf16", "f32")}
        for scheme, plan in plans.items():
            for tokens in (1, 4, 8, 128, 512):
                found.append(linear_job(machine, plan, f"{shape} {scheme} T={tokens}", tokens, n, k, gated))
    return found


def main() -> None:
    """Interleave rounds of all jobs until the time is up, then print the best of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=[name for name in MACHINES if runnable(name)], default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one shape, quantized kernels only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    name = options.isa or [n for n in MACHINES if runnable(n)][-1]
    found = jobs(MACHINES[name], options.quick)
    for _ in range(options.rounds):
        for job in found:
            for threads in (1, 2):
                job.time(threads)
    limits = {job.name: job.best for job in found}
    rows = []
    for job in found:
        share = {t: rate / limits[job.limit][t] if job.limit else None for t, rate in job.best.items()}
        rows.append({"isa": name, "name": job.name, "unit": job.unit, "rate": job.best, "of_limit": share})
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        cells = [f"{rate:9.3f} {'' if row['of_limit'][t] is None else format(row['of_limit'][t], '5.0%'):>5}"
                 for t, rate in row["rate"].items()]  # fmt: skip
        print(f"{row['isa']:11} {row['name']:24} {row['unit']:5} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
