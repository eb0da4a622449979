"""What an artifact needs is what its code may use: LLVM's own list, and the instructions themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_harness import CACHE
from small_decoder import small_decoder

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.errors import CompileError
from llmc.runtime import cpu
from llmc.targets import lower, machine_named
from llmc.targets.cpu.codegen import llvm_target
from llmc.targets.cpu.kernel_cache import compile_kernels
from llmc.targets.cpu.library import kernels_of
from llmc.targets.cpu.limits import limit_kernels
from llmc.targets.x86 import detect
from llmc.targets.x86.features import LEVEL_2

NAMES = detect.names()
SERVER = machine_named("sapphirerapids").features
# What every x86-64 CPU with AVX has, and what says how fast an instruction is, not that there is one.
EVERYWHERE = {
    "64bit",
    "64bit-mode",
    "cmov",
    "cx8",
    "fxsr",
    "mmx",
    "nopl",
    "sse",
    "sse2",
    "x87",
    "xsave",
    "avx",
    "crc32",
}
SPEED = re.compile(
    r"(fast|faster|slow|false-deps|prefer|tuning|no-bypass|allow|idivq|idivl)-.*|branchfusion|macrofusion|ermsb|fsrm|vzeroupper"
    r"|sbb-dep-breaking"
)
# By the first that matches: a mnemonic, what else has to be in the line, the feature.
INSTRUCTIONS = [
    (r"v?gf2p8\w+", "", "gfni"),
    (r"vpdp(bus|wss)ds?", r"\{vex\}", "avxvnni"),
    (r"vpdp(bus|wss)ds?", "", "avx512vnni"),
    (r"vpdp\w+", "", "avxvnniint8"),
    (r"vdpbf16ps|vcvtne2?ps2bf16", "", "avx512bf16"),
    (r"vcvt(ph2ps|ps2ph)", "", "f16c"),
    (r"v\w+(ph|sh|phx|psx)|vmovw|vcvt(ph|sh)2\w+|vcvt\w+2(ph|sh)", "", "avx512fp16"),
    (r"vperm(b|[it]2b)|vpmultishiftqb", "", "avx512vbmi"),
    (r"vp(compress|expand)[bw]|vpsh[lr]dv?[wdq]", "", "avx512vbmi2"),
    (r"vpmadd52\w+", "", "avx512ifma"),
    (r"vpopcnt[bw]|vpshufbitqmb", "", "avx512bitalg"),
    (r"vpopcnt[dq]", "", "avx512vpopcntdq"),
    (r"vpconflict[dq]|vplzcnt[dq]|vpbroadcastm\w+", "", "avx512cd"),
    (r"vp2intersect[dq]", "", "avx512vp2intersect"),
    (r"vaes\w+", "[yz]mm", "vaes"),
    (r"v?aes\w+", "", "aes"),
    (r"vpclmul\w+", "[yz]mm", "vpclmulqdq"),
    (r"v?pclmul\w+", "", "pclmul"),
    (r"ldtilecfg|sttilecfg|tile\w+", "", "amx-tile"),
    (r"tdpb(ss|su|us|uu)d", "", "amx-int8"),
    (r"tdpbf16ps", "", "amx-bf16"),
    (r"tdp\w+|tcmm\w+", "", "a later amx"),
    (r"extrq|insertq|movnts[sd]", "", "sse4a"),
    (r"\w*", r"zmm|mm(1[6-9]|2\d|3[01])\b|\{%?k[1-7]\}|\bk[0-7]\b", "avx512f"),
    (r"vf(n?m)(add|sub)\w+", "", "fma"),
    (r"andn|bextr|bls(i|r|msk)|tzcnt", "", "bmi"),
    (r"bzhi|mulx|pdep|pext|rorx|s[ah][rl]x", "", "bmi2"),
    (r"lzcnt|movbe|popcnt|serialize|cldemote|clwb|clzero|clflushopt", "", ""),  # called as the feature is
    (r"ad[co]x", "", "adx"),
    (r"sha(1|256)\w+", "", "sha"),
    (r"prefetchw|prefetchwt1", "", "prfchw"),
    (r"prefetchit\d", "", "prefetchi"),
    (r"movdir\w+|rd(rand|seed|pid|pru)|[ut]\w*(monitor|wait|pause)x?|xsave[cs]\w*", "", "what no kernel wants"),
    (r"v\w+", "", "avx2"),
]  # fmt: skip


def needed(line: str) -> str:
    """The feature that an instruction needs, as `objdump -M intel` writes it; empty for one of x86-64-v2."""
    text = line.partition("#")[0].strip()
    mnemonic = re.sub(r"^(\{\w+\} |rep\w* |lock |data16 |cs |notrack )+", "", text).partition(" ")[0]
    for pattern, beside, feature in INSTRUCTIONS:
        if re.fullmatch(pattern, mnemonic) and re.search(beside, text):
            return feature or mnemonic
    return ""


def used(objects: list[Path]) -> dict[str, str]:
    """Features that object files use, each with an instruction that needs it."""
    command = ["objdump", "-d", "-M", "intel", "--no-show-raw-insn", *map(str, objects)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split("\t", 1)[1] for line in text.splitlines() if re.match(r" *[0-9a-f]+:\t", line)]
    assert len(lines) > 100 and "(bad)" not in text
    return {needed(line): line for line in lines}


@pytest.mark.parametrize(
    ("line", "feature"),
    [
        ("vgf2p8affineqb ymm1,ymm2,ymm0,0x0", "gfni"),
        ("{vex} vpdpbusd ymm0,ymm1,ymm2", "avxvnni"),
        ("vpdpbusd zmm0,zmm1,zmm2", "avx512vnni"),
        ("vcvtph2ps ymm0,XMMWORD PTR [rdi]", "f16c"),
        ("vcvtph2psx zmm0,YMMWORD PTR [rdi]", "avx512fp16"),
        ("vpermb zmm0,zmm1,zmm2", "avx512vbmi"),
        ("vaddps ymm0{k1},ymm1,ymm2", "avx512f"),
        ("vaddps ymm17,ymm1,ymm2", "avx512f"),
        ("vaddps ymm10,ymm1,ymm2", "avx2"),
        ("tdpbssd tmm0,tmm1,tmm2", "amx-int8"),
        ("movntss DWORD PTR [rdi],xmm0", "sse4a"),
        ("popcnt rax,rdi", "popcnt"),
        ("mov rax,QWORD PTR [rdi]", ""),
    ],
)
def test_instructions_are_told_apart(line: str, feature: str) -> None:
    assert needed(line) == feature


@pytest.mark.parametrize("name", NAMES)
def test_the_code_generator_has_no_feature_that_is_not_needed(name: str) -> None:
    """By its own account: whatever the name of the CPU brings."""
    import tvm

    machine = machine_named(name)
    found = tvm.get_global_func("target.llvm_get_cpu_features")(llvm_target(machine))
    extensions = {str(item) for item in found if not SPEED.fullmatch(str(item))}
    assert extensions - EVERYWHERE == machine.features


@pytest.mark.parametrize("missing", [None, *sorted(SERVER - machine_named("x86-64-v4").features)])
def test_native_has_what_the_cpu_shows(monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    """A virtual machine that hides one feature loses that one, and no more."""
    shown = frozenset(SERVER - {missing})
    monkeypatch.setattr(cpu, "features", lambda: shown | {"sse4a", "warp9"})
    found = machine_named("native")
    assert (found.features, found.mcpu, found.vector_bits) == (shown, "sapphirerapids", 512)


def test_native_without_whole_avx512_has_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda: SERVER - {"avx512bw"})
    found = machine_named("native")
    assert found.features == machine_named("x86-64-v3").features | {"avxvnni", "gfni", "prfchw"}
    assert (found.mcpu, found.vector_bits) == ("alderlake", 256)
    monkeypatch.setattr(cpu, "features", lambda: SERVER - {"bmi2"})
    with pytest.raises(CompileError, match="lacks bmi2"):
        machine_named("native")
    assert set(LEVEL_2) < machine_named("haswell").features


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump, which disassembles, is not here")
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("alderlake", "limits"),
        ("sapphirerapids", "limits"),
        *[pytest.param(name, kind, marks=pytest.mark.slow) for name in NAMES for kind in ("int4", "none", "bf16")],
    ],
)
def test_instructions_are_those_of_the_needs(name: str, quantization: str) -> None:
    machine = machine_named(name)
    kernels = [item.kernel for item in limit_kernels(machine)]
    if quantization != "limits":
        options = CompileOptions(quantization=quantization, target=name, group_size=32, max_step=64)
        kernels = kernels_of(lower(run_pipeline(small_decoder(), options).graph, machine))
    found = used(compile_kernels(kernels, machine, CACHE, jobs=2))
    assert found.keys() - machine.features - {""} == set(), found
    assert "avx2" in found or "avx512f" in found
