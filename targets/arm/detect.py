"""ARM machines by name, and this one."""

from __future__ import annotations

from llmc.errors import CompileError
from llmc.runtime import cpu
from llmc.targets.arm.features import MCPU, USEFUL
from llmc.targets.machine import Machine

ARCHITECTURE = "aarch64"  # as `runtime.cpu.architecture` says it

_NEON = ("neon",)
_DOT = (*_NEON, "dotprod")
_A76 = (*_DOT, "fullfp16")
_V1 = (*_A76, "i8mm", "bf16")

# name: (features that its code may use, L1, L2, L3 bytes). Of small CPUs without a third level, L3 is the second one.
_MACHINES: dict[str, tuple[tuple[str, ...], int, int, int]] = {
    "aarch64": (_NEON, 32 << 10, 512 << 10, 1 << 20),
    "aarch64+dotprod": (_DOT, 32 << 10, 512 << 10, 2 << 20),
    "aarch64+fp16": (_A76, 32 << 10, 512 << 10, 2 << 20),
    "aarch64+i8mm": ((*_DOT, "i8mm"), 64 << 10, 1 << 20, 8 << 20),
    "aarch64+bf16": ((*_DOT, "i8mm", "bf16"), 64 << 10, 1 << 20, 8 << 20),
    "cortex-a53": (_NEON, 32 << 10, 512 << 10, 512 << 10),
    "cortex-a55": (_A76, 32 << 10, 128 << 10, 1 << 20),
    "cortex-a72": (_NEON, 32 << 10, 1 << 20, 1 << 20),
    "cortex-a76": (_A76, 64 << 10, 512 << 10, 2 << 20),
    "cortex-x1": (_A76, 64 << 10, 1 << 20, 8 << 20),
    "neoverse-n1": (_A76, 64 << 10, 1 << 20, 32 << 20),
    "neoverse-n2": (_V1, 64 << 10, 1 << 20, 32 << 20),
    "neoverse-v1": (_V1, 64 << 10, 1 << 20, 32 << 20),
    "neoverse-v2": (_V1, 64 << 10, 2 << 20, 36 << 20),
    "apple-m1": (_A76, 128 << 10, 3 << 20, 8 << 20),
    "apple-m2": (_V1, 128 << 10, 4 << 20, 8 << 20),
    "apple-m3": (_V1, 128 << 10, 4 << 20, 8 << 20),
    "apple-m4": (_V1, 128 << 10, 4 << 20, 8 << 20),
    "raspberry-pi-4": (_NEON, 32 << 10, 1 << 20, 1 << 20),
    "raspberry-pi-5": (_A76, 64 << 10, 512 << 10, 2 << 20),
    "graviton2": (_A76, 64 << 10, 1 << 20, 32 << 20),
    "graviton3": (_V1, 64 << 10, 1 << 20, 32 << 20),
    "graviton4": (_V1, 64 << 10, 2 << 20, 36 << 20),
    "ampere-altra": (_A76, 64 << 10, 1 << 20, 32 << 20),
}


def names() -> list[str]:
    """Every name that `machine` takes."""
    return list(_MACHINES)


def machine(name: str) -> Machine:
    """The machine called `name`, one of `names`."""
    features, l1, l2, l3 = _MACHINES[name]
    return Machine(name, "arm", MCPU, frozenset(features), 128, l1, l2, l3)


def native() -> Machine | None:
    """This machine, None if it is no 64-bit ARM one: the useful features that it shows. CompileError without NEON."""
    if cpu.architecture() != ARCHITECTURE:
        return None
    present = cpu.features()
    if "neon" not in present:
        raise CompileError("this CPU lacks neon, which llmc needs; compile for another machine with --target")
    features = frozenset(_NEON) | present.intersection(USEFUL)
    caches = (64 << 10, 1 << 20, 8 << 20) if "i8mm" in features else (32 << 10, 512 << 10, 2 << 20)
    return Machine("native", "arm", MCPU, features, 128, *caches)
