"""Which instructions the code generator may use: those that a machine's features name, one by one, and no others.

LLVM's name of a CPU brings how long its instructions take, and also everything that the CPU can do. Virtual machines
often hide some of that, and an artifact that used it all would die of an unknown instruction on them: so what the name
brings and the features do not say is turned off. What cannot be told apart from x86-64 itself, or makes no code, stays.
"""

from __future__ import annotations

TRIPLE = "x86_64-linux-gnu"

# Of the C compiler: none beyond its own.
COMPILER_OPTIONS = ()

# Everything that LLVM's CPUs from Haswell to Zen 5 and Sapphire Rapids bring beyond `LEVEL_2`.
EXTENSIONS = (
    "adx", "aes", "amx-bf16", "amx-int8", "amx-tile", "avx", "avx2", "avx512bf16", "avx512bitalg", "avx512bw",
    "avx512cd", "avx512dq", "avx512f", "avx512fp16", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vl",
    "avx512vnni", "avx512vp2intersect", "avx512vpopcntdq", "avxvnni", "bmi", "bmi2", "cldemote", "clflushopt", "clwb",
    "clzero", "enqcmd", "f16c", "fma", "fsgsbase", "gfni", "hreset", "invpcid", "kl", "lzcnt", "movbe", "movdir64b",
    "movdiri", "mwaitx", "pclmul", "pconfig", "pku", "prefetchi", "prfchw", "ptwrite", "rdpid", "rdpru", "rdrnd",
    "rdseed", "serialize", "sha", "shstk", "sse4a", "tsxldtrk", "uintr", "vaes", "vpclmulqdq", "waitpkg", "wbnoinvd",
    "widekl", "xsavec", "xsaveopt", "xsaves",
)  # fmt: skip

# x86-64-v2, which LLVM has to keep: AVX stands on it. Linux calls "crc32" a part of SSE4.2.
LEVEL_2 = ("cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2")


def attributes(features: frozenset[str]) -> list[str]:
    """LLVM's attributes beside the name of a CPU. What a feature stands on is turned on again by its "+"."""
    off = [f"-{name}" for name in EXTENSIONS if name not in features]
    return off + [f"+{name}" for name in sorted(features)]
