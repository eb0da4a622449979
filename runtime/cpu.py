"""What this machine's CPU can do, and how many threads this process may use, read from the Linux kernel."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import sys
from pathlib import Path

from llmc.runtime import control_groups, topology
from llmc.runtime.errors import RuntimeStateError

# The kernel's flag names whose LLVM feature has another spelling. The rest differ at most by "_" (see `_spell`).
_X86_SPELLING = {
    "pni": "sse3",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "pclmulqdq": "pclmul",
    "rdrand": "rdrnd",
    "lahf_lm": "sahf",
    "bmi1": "bmi",
    "abm": "lzcnt",
    "cx16": "cx16",
    "sha_ni": "sha",
    "amx_tile": "amx-tile",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "amx_fp16": "amx-fp16",
    "amx_complex": "amx-complex",
    "3dnowprefetch": "prfchw",
    "lm": "64bit",
    "fxsr": "fxsr",
}
_ARM_SPELLING = {
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
    "asimdfhm": "fp16fml",
    "atomics": "lse",
    "crc32": "crc",
    "sha3": "sha3",
    "asimdrdm": "rdm",
    "sb": "sb",
    "fp": "fp-armv8",
}


# Bits of AT_HWCAP and AT_HWCAP2 (Linux: arch/arm64/include/uapi/asm/hwcap.h), by the kernel's names of the flags.
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_ARM_HWCAP = {
    0: "fp", 1: "asimd", 3: "aes", 6: "sha2", 7: "crc32", 8: "atomics", 10: "asimdhp", 12: "asimdrdm", 17: "sha3",
    20: "asimddp", 22: "sve", 23: "asimdfhm", 29: "sb",
}  # fmt: skip
_ARM_HWCAP2 = {1: "sve2", 13: "i8mm", 14: "bf16", 23: "sme"}


def llvm_features(flags: set[str], architecture: str) -> frozenset[str]:
    """LLVM's names of the features behind the kernel's CPU flags ("avx512_vnni" is "avx512vnni", ...)."""
    spelling = _ARM_SPELLING if architecture == "aarch64" else _X86_SPELLING
    return frozenset(spelling.get(flag) or _spell(flag) for flag in flags)


def _spell(flag: str) -> str:
    """avx512_bf16, avx_vnni, avx_vnni_int8, ...: LLVM writes them without underscores."""
    return flag.replace("_", "") if flag.startswith("avx") else flag


def architecture() -> str:
    """ "x86_64", "aarch64", ... of this program: one of 32 bits runs on most of these machines, but loads none of their
    code."""
    machine = platform.machine().lower()
    if sys.maxsize < 1 << 32:
        return f"{machine} with a Python of 32 bits"
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@functools.cache
def features() -> frozenset[str]:
    """This machine's features, which are the same on all of its CPUs: Linux tells processes what all have.

    Raises `RuntimeStateError` where Linux cannot be asked.
    """
    if architecture() == "aarch64":
        return llvm_features(_arm_flags(), "aarch64")
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "flags":
                    found = llvm_features(set(value.split()), "x86_64")
                    return found if _tiles_allowed(found) else found - _TILE_FEATURES
    except OSError as error:
        raise RuntimeStateError(
            f"what this CPU has is not known: /proc/cpuinfo cannot be read ({error.strerror})"
        ) from error
    return frozenset()


def _arm_flags() -> set[str]:
    """What the kernel told this process when it began: also right under an emulator, which shows the host's files."""
    try:
        ask = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError) as error:
        raise RuntimeStateError("what this CPU has is not known: the system's library has no getauxval") from error
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    first, second = ask(_AT_HWCAP), ask(_AT_HWCAP2)
    found = {name for bit, name in _ARM_HWCAP.items() if first >> bit & 1}
    return found | {name for bit, name in _ARM_HWCAP2.items() if second >> bit & 1}


def glibc() -> str:
    """The version of the system's library, "2.36"; empty where that is another one, or not known."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        return ""
    return version if name == "glibc" else ""


_TILE_FEATURES = frozenset(_X86_SPELLING[flag] for flag in _X86_SPELLING if flag.startswith("amx_"))
_ARCH_PRCTL = 158  # x86-64's number of the system call
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def _tiles_allowed(found: frozenset[str]) -> bool:
    """Asks Linux to let this process use tile registers, whose 8 KiB a thread it gives out on request only.

    The answer holds for all threads, and for children that are forked. Kernels before 5.16 and some sandboxes refuse.
    """
    if not found & _TILE_FEATURES:
        return True
    try:
        libc = ctypes.CDLL(None)
        return int(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0
    except (OSError, AttributeError):
        return False


def available_threads() -> int:
    """How many threads can run at once: the CPUs this process may use, or fewer under a cgroup quota."""
    count = len(allowed_cpus())
    quota = control_groups.cpu_quota()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def allowed_cpus() -> frozenset[int]:
    """The numbers of the CPUs that this thread, and those that it starts, may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def default_threads(devices: Path = topology.DEVICES) -> topology.DefaultThreads:
    """How many threads a step has where nobody asks for a number, and where they run.

    Under a quota that is smaller they run anywhere: others use the machine too, and may come to the same node.
    """
    found, most = topology.default_threads(allowed_cpus(), devices), available_threads()
    if found.threads <= most:
        return found
    return topology.DefaultThreads(most, None, "as many as the control group's quota of CPU time allows")


def available_memory() -> int:
    """Bytes that could be allocated now without swapping, as Linux estimates it, within the control groups' limits."""
    free = _system_memory()
    allowed = control_groups.free_memory()
    return free if allowed is None else min(free, allowed)


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 32
