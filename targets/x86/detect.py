"""x86 machines by name, and this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmc.errors import CompileError
from llmc.runtime import cpu
from llmc.targets.machine import Machine
from llmc.targets.x86.features import LEVEL_2

_V3 = (*LEVEL_2, "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_LAKE = (*_V4, "prfchw")
_ICE = (*_LAKE, "avx512vnni", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq", "gfni")
_SAPPHIRE = (*_ICE, "avx512bf16", "avx512fp16", "avxvnni", "amx-tile", "amx-int8", "amx-bf16")

# What code is made better by, beyond a level: kernels ask for it, or LLVM takes it where it is shorter.
_USEFUL = frozenset(_SAPPHIRE) - frozenset(_V4)
_BESIDE_V3 = frozenset({"avxvnni", "gfni", "prfchw"})  # of these, what has instructions without AVX-512

# name: (LLVM's CPU, which says how long instructions take; features that its code may use; vector bits; L1, L2, L3
# bytes)
_MACHINES: dict[str, tuple[str, tuple[str, ...], int, int, int, int]] = {
    "x86-64-v3": ("x86-64-v3", _V3, 256, 32 << 10, 512 << 10, 8 << 20),
    "haswell": ("haswell", _V3, 256, 32 << 10, 256 << 10, 8 << 20),
    "alderlake": ("alderlake", (*_V3, "prfchw", "avxvnni", "gfni"), 256, 48 << 10, 1280 << 10, 24 << 20),
    "znver3": ("znver3", (*_V3, "prfchw"), 256, 32 << 10, 512 << 10, 32 << 20),
    "x86-64-v4": ("x86-64-v4", _V4, 512, 32 << 10, 1 << 20, 16 << 20),
    "skylake-avx512": ("skylake-avx512", _LAKE, 512, 32 << 10, 1 << 20, 16 << 20),
    "cascadelake": ("cascadelake", (*_LAKE, "avx512vnni"), 512, 32 << 10, 1 << 20, 16 << 20),
    "icelake-server": ("icelake-server", _ICE, 512, 48 << 10, 1280 << 10, 32 << 20),
    "znver4": ("znver4", (*_ICE, "avx512bf16"), 512, 32 << 10, 1 << 20, 32 << 20),
    "znver5": ("znver5", (*_ICE, "avx512bf16", "avxvnni"), 512, 48 << 10, 1 << 20, 32 << 20),
    "sapphirerapids": ("sapphirerapids", _SAPPHIRE, 512, 48 << 10, 2 << 20, 60 << 20),
}


def names() -> list[str]:
    """Every name that `machine` takes."""
    return list(_MACHINES)


def machine(name: str) -> Machine:
    """The machine called `name`, one of `names`."""
    mcpu, features, bits, l1, l2, l3 = _MACHINES[name]
    return Machine(name, "x86", mcpu, frozenset(features), bits, l1, l2, l3)


def native() -> Machine | None:
    """This machine, None if it is no x86-64 one: its level, the useful features that it shows, its own cache sizes; and
    instructions that take as long as on the named machine which it has most in common with."""
    if cpu.architecture() != "x86_64":
        return None
    present = cpu.features()
    if not present.issuperset(_V3):
        raise CompileError(
            f"this CPU lacks {', '.join(sorted(set(_V3) - present))}, which llmc needs; compile for another machine "
            "with --target"
        )
    wide = present.issuperset(_V4)
    features = frozenset(_V4) | (present & _USEFUL) if wide else frozenset(_V3) | (present & _BESIDE_V3)
    alike = [candidate for candidate in map(machine, _MACHINES) if (candidate.vector_bits == 512) == wide]
    best = max(alike, key=lambda other: (len(other.features & features), -len(other.features - features)))
    caches = {level: _cache_bytes(level) for level in ("l1", "l2", "l3")}
    found = {f"{level}_bytes": size for level, size in caches.items() if size}
    return replace(best, name="native", features=features, **found)  # type: ignore[arg-type]


def _cache_bytes(level: str) -> int:
    """Bytes of this CPU's data cache of a level, 0 where the system does not tell."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "level").read_text().strip() != level[1:]:
                continue
            if (index / "type").read_text().strip() == "Instruction":
                continue
            text = (index / "size").read_text().strip()
        except OSError:
            continue
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        return int(text.rstrip("KMG")) * scale
    return 0
