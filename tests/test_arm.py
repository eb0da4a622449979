"""ARM: what its kernels use, and that they compute what they should, under an emulator; artifacts linked for it.

`make test-all` runs the tests of all kernels for ARM besides (`x86_machines.each_machine`).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import emulation
import fake_artifact
import numpy as np
import pytest
from arm_machines import MACHINES
from kernel_harness import CACHE, aligned
from template_cases import Case, cases, functions
from test_templates import check
from tiny_models import make_tiny

import llmc
from llmc.cli import run
from llmc.cli.verifying import Verdict, compare
from llmc.errors import ArtifactError, CompileError
from llmc.runtime import cpu
from llmc.runtime.runtime import Runtime
from llmc.targets import machine_named
from llmc.targets.arm import detect
from llmc.targets.cpu import c_compiler
from llmc.targets.cpu.codegen import build_module, llvm_target
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.linear_problem import QuantizedProblem
from llmc.targets.cpu.linear_quantized import QuantizedBlocks, QuantizedRows
from llmc.targets.cpu.system_needs import least_glibc
from llmc.targets.emulated import Emulated

NEON = MACHINES["neon"]
needs_emulator = pytest.mark.usefixtures("emulator")
# What every 64-bit ARM CPU has, registers of the system that no code here names, and what only says how fast code is.
EVERYWHERE = re.compile(r"fp-armv8|ete|trbe|fuse-.*|use-.*|enable-select-opt")


@pytest.fixture
def emulator() -> None:
    emulation.require(NEON)


@pytest.fixture
def compiler() -> tuple[str, ...]:
    emulation.require(NEON)
    return tuple(c_compiler.compiler_command(NEON))


# Machines


@pytest.mark.parametrize("name", detect.names())
def test_the_code_generator_has_the_needs_and_nothing_more(name: str) -> None:
    import tvm

    machine = machine_named(name)
    found = {str(each) for each in tvm.get_global_func("target.llvm_get_cpu_features")(llvm_target(machine))}
    assert {each for each in found if not EVERYWHERE.fullmatch(each)} == machine.features


@pytest.mark.parametrize(("shown", "expected"), [
    ({"fp", "asimd"}, {"neon"}),
    ({"fp", "asimd", "asimddp", "asimdhp", "sve", "atomics"}, {"neon", "dotprod", "fullfp16"}),
    ({"fp", "asimd", "asimddp", "i8mm", "bf16", "sme"}, {"neon", "dotprod", "i8mm", "bf16"}),
])  # fmt: skip
def test_native_is_what_the_cpu_shows_and_kernels_use(
    monkeypatch: pytest.MonkeyPatch, shown: set[str], expected: set[str]
) -> None:
    monkeypatch.setattr(cpu, "architecture", lambda: "aarch64")
    monkeypatch.setattr(cpu, "features", lambda: cpu.llvm_features(shown, "aarch64"))
    assert machine_named("native").features == expected
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"fp-armv8"}))
    with pytest.raises(CompileError, match="lacks neon"):
        machine_named("native")


def test_all_of_arm_reads_the_same_weights() -> None:
    problem = QuantizedProblem(n=33, k=129, bits=4, group=64, symmetric=True, table=True)
    assert len({problem.layout(machine_named(name)) for name in detect.names()}) == 1


# Kernels


@pytest.mark.parametrize("name", MACHINES)
def test_the_loops_have_their_instructions_and_spill_nothing(name: str) -> None:
    machine = MACHINES[name]
    wanted = {"neon": ("smlal2", "smlal2"), "dotprod": ("sdot", "sdot"), "i8mm": ("sdot", "smmla")}[name]
    for table in (True, False):
        problem = QuantizedProblem(n=64, k=128, bits=4, group=64, symmetric=True, table=table)
        for template, rows, word in ((QuantizedRows, (1, 1), wanted[0]), (QuantizedBlocks, (17, None), wanted[1])):
            kernel = template.default(problem, machine, rows).kernel(problem, machine)
            lines = build_module(kernel, machine).inspect_source("asm").splitlines()
            at = [number for number, line in enumerate(lines) if re.search(rf"\b{word}\b", line)]
            loop = lines[at[0] : at[-1]]
            assert len(at) >= 32 and sum(bool(re.search(r"\btbl\b", line)) for line in lines) == (64 if table else 0)
            spilled = [line for line in loop if re.search(r"\b(str|stp)\b.*\bq\d+.*\[sp", line)]
            most = len(at) // 32 if word == "smmla" else 0  # a few of that one, while it scales a group
            assert len(spilled) <= most


def few_cases() -> list[Case]:
    """Of each template one, and all of integers, whose instructions differ."""
    found, seen = [], set()
    for case in cases():
        if isinstance(case.problem, QuantizedProblem) or case.template not in seen:
            found.append(case)
            seen.add(case.template)
    return found


INTEGERS = [case for case in few_cases() if case.template in (QuantizedRows, QuantizedBlocks)]
OTHERS = [case for case in few_cases() if case not in INTEGERS]


@needs_emulator
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.template.name)
def test_templates_on_neon(case: Case) -> None:
    check(case, NEON, [case.template.default(case.problem, NEON)])


@needs_emulator
@pytest.mark.parametrize("name", ["neon", "dotprod", "i8mm"])
@pytest.mark.parametrize("template", [QuantizedRows, QuantizedBlocks])
def test_integers(name: str, template: type[QuantizedRows] | type[QuantizedBlocks]) -> None:
    machine = MACHINES[name]
    for case in INTEGERS:
        if case.template is template:
            check(case, machine, [template.default(case.problem, machine)])


@needs_emulator
@pytest.mark.parametrize("name", ["neon", "i8mm"])
def test_sums_of_the_largest_products_are_exact(name: str) -> None:
    """All weights at one end and all activations at the other, of every number of bits: no sum of i16 wraps around."""
    machine, rows, n, k = MACHINES[name], 17, 16, 64
    problems = [QuantizedProblem(n=n, k=k, bits=bits, group=64, symmetric=False) for bits in (2, 3, 4, 5, 6, 8)]
    members = [QuantizedBlocks.default(problem, machine) for problem in problems]
    kernels = [member.kernel(problem, machine) for member, problem in zip(members, problems, strict=True)]
    compiled = functions(kernels, machine)
    for problem, member, kernel in zip(problems, members, kernels, strict=True):
        layout = problem.layout(machine)
        assert isinstance(layout, QuantizedLayout)
        for weight in (0, (1 << problem.bits) - 1):
            for activation in (-127, 127):
                packed = layout.pack(
                    np.full((n, k), weight, np.uint8), np.ones((n, 1), np.float16), np.zeros((n, 1), np.float16)
                )
                x = np.full((rows, k), activation, np.int8)
                given = (x, np.ones((rows, 1), np.float32), x.sum(1, dtype=np.int32, keepdims=True))
                out = aligned(np.zeros((rows, n), np.float32))
                arrays = [aligned(array) for array in (*given, *packed.values())]
                compiled[kernel.symbol](*arrays, out, rows, 0, -(-layout.tiles(n) // member.tiles))
                assert (out == weight * activation * k).all(), (problem.bits, weight, activation)


# Artifacts


def test_an_artifact_is_linked_for_old_systems_and_large_pages(compiler: tuple[str, ...], tmp_path: Path) -> None:
    library = fake_artifact.compile_library(
        fake_artifact.STEP % {"vocab": 9, "max_step": 16}, tmp_path, compiler=compiler
    )
    data = library.read_bytes()
    assert int.from_bytes(data[18:20], "little") == 183  # EM_AARCH64
    headers, count = int.from_bytes(data[0x20:0x28], "little"), int.from_bytes(data[0x38:0x3A], "little")
    loaded = [data[headers + 56 * i : headers + 56 * (i + 1)] for i in range(count)]
    assert {int.from_bytes(part[48:56], "little") for part in loaded if part[:4] == b"\1\0\0\0"} == {1 << 16}
    found = least_glibc(library)
    assert found == c_compiler.LEAST_GLIBC if "ziglang" in compiler else re.fullmatch(r"2\.\d+", found)


def fake(path: Path, compiler: tuple[str, ...], *features: str) -> Path:
    target = {"name": "board", "arch": "aarch64", "features": list(features)}
    return fake_artifact.write(path, compiler=compiler, target=target)


def test_the_runtimes_c_code_runs_on_arm(compiler: tuple[str, ...], tmp_path: Path) -> None:
    """The pool, the cache's pages, the choice of tokens; weights mapped from the file."""
    emulated = Emulated.open(fake(tmp_path / "model.so", compiler, "neon", "dotprod"), "cortex-a76")
    ids = np.random.default_rng(0).integers(0, 300, 90).tolist()
    expected = fake_artifact.reference_logits(ids)
    found = emulated.logits([[ids[:33], ids[33:34], ids[34:]], [ids[:1], ids[1:64]]])
    assert (found == expected[[32, 33, 89, 0, 63]]).all()
    tokens = emulated.greedy(ids[:5], 40)
    assert tokens == [int(row.argmax()) for row in fake_artifact.reference_logits([*ids[:5], *tokens])[4:-1]]


def test_a_cpu_that_lacks_something_is_told(compiler: tuple[str, ...], tmp_path: Path) -> None:
    for model, feature in (("cortex-a72", "dotprod"), ("cortex-a76", "i8mm"), ("max", "avx9000")):
        emulated = Emulated.open(fake(tmp_path / "model.so", compiler, "neon", feature), model)
        with pytest.raises(CompileError, match=f"emulated {model}: the artifact needs {feature}, which this CPU"):
            emulated.logits([[[1]]])
    everything = fake(tmp_path / "model.so", compiler, "neon", "dotprod", "fullfp16", "i8mm", "bf16")
    assert np.isfinite(Emulated.open(everything).logits([[[1]]])).all()


def test_python_says_that_it_is_for_another_machine(compiler: tuple[str, ...], tmp_path: Path) -> None:
    if cpu.architecture() == "aarch64":
        pytest.skip("this computer is one")
    with pytest.raises(ArtifactError, match=r"is for aarch64, and this machine is x86_64. Run: llmc compile"):
        Runtime.load(fake(tmp_path / "model.so", compiler))


def test_verify_compares_across_architectures(
    compiler: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there, here = fake(tmp_path / "there.so", compiler, "neon"), fake_artifact.write(tmp_path / "here.so")
    if cpu.architecture() == "aarch64":
        pytest.skip("this computer is one")
    found = compare(there, here, "cortex-a72", None, 2, 0)
    assert (found.emulated, found.divergence, found.same, found.greedy) == ("cortex-a72", 0, found.rows, found.written)
    assert run(["verify", str(there), "--against", str(here)]) == 0
    assert "on an emulated max," in capfd.readouterr().out
    assert run(["verify", str(here), "--against", str(here), "--emulate", "max"]) == 1
    assert "compare it without --emulate" in capfd.readouterr().err


def test_verify_tells_what_differs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here, step = (
        fake_artifact.write(tmp_path / "here.so"),
        fake_artifact.STEP.replace("(uint64_t)v + ", "(uint64_t)v + 1 + "),
    )
    assert step != fake_artifact.STEP
    other = fake_artifact.write(tmp_path / "other.so", source=step)
    assert run(["verify", str(here), "--against", str(here)]) == 0
    assert run(["verify", str(other), "--against", str(here), "--json"]) == 1
    assert '"good": false' in capfd.readouterr().out


def test_what_is_good_is_near_in_its_worst_row_and_writes_the_same() -> None:
    assert Verdict("max", 18, 0.01, 1e-4, 18, 24, 24).is_good
    assert Verdict("max", 18, 0.01, 1e-4, 18, 3, 24, gap=0.01).is_good  # two tokens that are as likely
    assert not Verdict("max", 18, 0.01, 1e-4, 18, 0, 24, gap=0.5).is_good
    assert not Verdict("max", 18, 0.05, 1e-4, 18, 24, 24).is_good
    assert not Verdict("max", 18, float("nan"), 0.0, 0).is_good


@pytest.mark.slow
@pytest.mark.parametrize("target", ["aarch64", "cortex-a76", "graviton3"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bf16", "f32"])
def test_a_model_writes_what_it_writes_here(target: str, dtype: str, tmp_path: Path) -> None:
    """And `--check` compares its logits with the graph's, under the emulator."""
    emulation.require(NEON)
    model, told = make_tiny("llama", tmp_path / "model"), []
    options = {"dtype": dtype, "kernel_cache": CACHE, "jobs": 2, "calibrate": "none"}
    llmc.compile(model, tmp_path / "here.so", **options)
    from llmc.api import make_options
    from llmc.compiler.pipeline import compile_model

    chosen = make_options(target=target, check=True, **options)
    compile_model(str(model), tmp_path / "there.so", chosen, on_checked=lambda checker: told.append(checker.summary()))
    assert any("on an emulated max: " in line for line in told[0]) and not any("not checked" in x for x in told[0])
    found = compare(tmp_path / "there.so", tmp_path / "here.so", "max", None, 2, 0)
    assert found.is_good and found.same == found.rows and found.greedy == found.written


# The compiler for another architecture


def test_without_a_cross_compiler_it_is_said_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_named("cortex-a76")
    monkeypatch.setattr(cpu, "architecture", lambda: "riscv64")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(c_compiler.shutil, "which", lambda _name: None)
    monkeypatch.setattr(c_compiler, "_zig", lambda: None)
    with pytest.raises(CompileError, match=r"links for cortex-a76, which is aarch64: pip install 'llmc\[cross\]'"):
        c_compiler.compiler_command(machine)
    monkeypatch.setattr(c_compiler.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert c_compiler.compiler_command(NEON)[0] == "aarch64-linux-gnu-gcc"
    monkeypatch.setattr(c_compiler, "_zig", lambda: Path("/packages/ziglang/zig"))
    command = c_compiler.compiler_command(NEON)
    assert command[:4] == ["/packages/ziglang/zig", "cc", "-target", "aarch64-linux-gnu.2.17"]


def test_zig_is_the_installed_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model's folder may have files of that name too."""
    for place in ("installed", "model"):
        package = tmp_path / place / "ziglang"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "zig").touch()
    monkeypatch.chdir(tmp_path / "model")
    for first in ("", str(tmp_path / "model")):
        monkeypatch.setattr(sys, "path", [first, str(tmp_path / "installed")])
        assert c_compiler._zig() == tmp_path / "installed" / "ziglang" / "zig"
        monkeypatch.setattr(sys, "path", [first])
        assert c_compiler._zig() is None


@pytest.mark.parametrize(
    "made", ["aarch64-linux-musl", "aarch64-none-elf", "aarch64-unknown-linux-android24", "", "x86_64-linux-gnu"]
)
def test_a_compiler_for_another_system_is_none(made: str, tmp_path: Path) -> None:
    own = tmp_path / "cc"
    for text, expected in ((made, False), ("aarch64-none-linux-gnu", True)):
        own.write_text(f"#!/bin/sh\necho {text}\n")
        own.chmod(0o755)
        c_compiler._makes.cache_clear()
        assert c_compiler._makes((str(own),), "aarch64") == expected


def test_a_python_of_32_bits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Raspberry Pi whose system has 32 bits and whose kernel has 64."""
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert cpu.architecture() == "aarch64"
    monkeypatch.setattr(cpu.sys, "maxsize", 2**31 - 1)
    assert cpu.architecture() == "aarch64 with a Python of 32 bits"


@pytest.mark.parametrize("makes", [True, False])
def test_cc_is_taken_where_it_makes_such_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, makes: bool) -> None:
    own = tmp_path / f"cc-{makes}"
    own.write_text(f"#!/bin/sh\necho {'aarch64' if makes else 'x86_64'}-linux-gnu\n")
    own.chmod(0o755)
    monkeypatch.setattr(cpu, "architecture", lambda: "riscv64")
    monkeypatch.setattr(c_compiler, "_cross_compiler", lambda _machine: ["found"])
    monkeypatch.setenv("CC", str(own))
    assert c_compiler.compiler_command(NEON)[0] == (str(own) if makes else "found")


def test_features_come_from_the_auxiliary_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulator's process sees its own CPU there, and the host's in /proc/cpuinfo."""

    class Auxiliary:
        """As ctypes' function: it has `argtypes` and `restype`."""

        def __call__(self, kind: int) -> int:
            return {16: 1 << 1 | 1 << 20 | 1 << 22, 26: 1 << 13}[kind]

    class Libc:
        getauxval = Auxiliary()

    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _name: Libc)
    monkeypatch.setattr(cpu, "architecture", lambda: "aarch64")
    cpu.features.cache_clear()
    try:
        assert cpu.features() == {"neon", "dotprod", "sve", "i8mm"}
    finally:
        cpu.features.cache_clear()


@pytest.mark.parametrize(("needs", "has", "is_fine"), [
    ("2.17", "2.36", True), ("2.36", "2.36", True), ("2.4", "2.36", True), ("2.37", "2.36", False), ("2.37", "", True)
])  # fmt: skip
def test_an_older_system_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needs: str, has: str, is_fine: bool
) -> None:
    target = {"name": "native", "arch": cpu.architecture(), "features": [], "glibc": needs}
    path = fake_artifact.write(tmp_path / "model.so", target=target)
    monkeypatch.setattr(cpu, "glibc", lambda: has)
    if is_fine:
        assert Runtime.load(path).forward([1]).shape[0] == 1
        return
    with pytest.raises(ArtifactError, match=f"needs glibc {needs}, and this system has {has}. Run: llmc compile"):
        Runtime.load(path)
