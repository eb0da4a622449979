"""What code for ARM may use: the features that a machine names, and what every 64-bit ARM CPU has, by LLVM's names.

All machines are LLVM's `generic` CPU with features turned on one by one: a CPU's own name would bring all that it can
do, SVE and atomics among it, and how long its instructions take, which makes little difference (docs/adr/0030).
"""

from __future__ import annotations

TRIPLE = "aarch64-linux-gnu"
MCPU = "generic"

# What kernels have code for; LLVM takes `fullfp16` where that is shorter, no kernel multiplies halves.
USEFUL = ("dotprod", "i8mm", "bf16", "fullfp16")

# Of the C compiler: gcc otherwise calls a library for atomics, that asks the system's library what the CPU has.
COMPILER_OPTIONS = ("-mno-outline-atomics",)


def attributes(features: frozenset[str]) -> list[str]:
    """LLVM's attributes beside the name of a CPU."""
    return [f"+{name}" for name in sorted(features)]
