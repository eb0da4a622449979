"""Targets are folders: found by themselves, behind one interface, over templates that name no instruction set."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import CACHE
from program_harness import CompiledGraph
from test_program import params_of, small_graph
from tiny_models import make_tiny

import llmc
import llmc.targets
from llmc.compiler import artifact as compiler_artifact
from llmc.compiler.ir.evaluate import evaluate
from llmc.errors import CompileError
from llmc.runtime import artifact as runtime_artifact
from llmc.runtime import cpu
from llmc.targets import lower, machine_named, machine_names
from llmc.targets.target import Target, all_targets, target_named

ROOT = Path(__file__).parent.parent
TOYS = Path(__file__).parent / "toy_targets"
# Names of instruction sets, of their registers and instructions, and of the folders that have them.
NAMES = re.compile(
    r"x86|\bavx|vnni|\bamx|\bsse\d?\b|\b[xyz]mm|\bf16c\b|\bneon|\bsve\d?\b|dotprod|i8mm|[sud]mmla|\bv?[sud]dot\b|aarch64"
    r"|\barm\b|\bvp[a-z]+(bw|wd|usd|ubsw|ps)\b|=[vwx]\b|llvm\.(x86|aarch64)|\btdp\w+|\btile(load|store)\w+",
    re.IGNORECASE,
)
needs_vectors = pytest.mark.skipif(
    not machine_named("x86-64-v3").features <= cpu.features(),
    reason="this computer lacks what the toy uses",
)


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the folder `four` beside the others."""
    monkeypatch.setattr(llmc.targets, "__path__", [*llmc.targets.__path__, str(TOYS)])
    yield
    for name in [name for name in sys.modules if name.startswith("llmc.targets.four")]:
        del sys.modules[name]
    if hasattr(llmc.targets, "four"):
        delattr(llmc.targets, "four")


def test_shared_templates_name_no_instruction_set() -> None:
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted((ROOT / "targets" / "cpu").glob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if NAMES.search(line)
    ]
    assert found == []
    for line in ('"=v,0"', "AVX-512", "llvm.x86.avx2.permps", "vpmaddubsw", "a NEON register", "tiles of AMX", "zmm"):
        assert NAMES.search(line)


def test_no_folder_is_named_outside_itself() -> None:
    """Neither by what is shared, nor by another room."""
    folders = [path.parent.name for path in sorted((ROOT / "targets").glob("*/target.py"))]
    assert folders
    for room in ("targets", "compiler", "frontends", "runtime", "llmc"):
        for path in (ROOT / room).rglob("*.py"):
            own = path.relative_to(ROOT).parts[1]
            text = path.read_text(encoding="utf-8")
            named = {folder for folder in folders if re.search(rf"targets(\.|/| import ){folder}\b", text)}
            assert named <= {own}, path
            if room != "targets":
                assert not re.search(r"llmc\.targets\.cpu\b", text), path


@pytest.mark.parametrize("target", all_targets())
def test_every_folder_has_the_whole_interface(target: Target) -> None:
    wanted = [name for name in vars(Target) if not name.startswith("_")]
    assert len(wanted) >= 7
    assert [name for name in wanted if not callable(getattr(target, name, None))] == []
    for name in target.names():
        machine = target.machine(name)
        assert (machine.name, target_named(machine.arch), machine.architecture) == (name, target, target.architecture())


def test_names_are_unique_and_others_are_told() -> None:
    names = machine_names()
    assert len(set(names)) == len(names) and names[0] == "native"
    with pytest.raises(CompileError, match="unknown target 'pdp11'; known: native, "):
        machine_named("pdp11")


def test_native_is_asked_of_the_target_of_this_kind_of_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "architecture", lambda: "pdp11")
    with pytest.raises(CompileError, match="no target is for this computer"):
        machine_named("native")


def test_a_new_folder_is_found(four: None) -> None:
    assert "four-lanes" in machine_names()
    machine = machine_named("four-lanes")
    program = lower(small_graph("q4g32", "int8"), machine)
    rules = {item.choice.rule for item in program.ops}
    assert {"linear_quantized", "round_rows", "embed_tokens"} <= rules


@needs_vectors
@pytest.mark.parametrize(
    ("scheme", "rounding"),
    [
        ("f32", "f32"), ("q4g32a", "int8"), ("q8g32", "int8"),
        # Tables of 64 entries, a comparison each, take minutes to compile. ARM has as many lanes: test_arm.py.
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in (("bf16", "bf16"), ("q4g32", "int8"), ("q8g32", "f32"), ("t4g32", "int8"), ("t4g32", "f32"))),
    ],
)  # fmt: skip
def test_templates_run_on_it(four: None, scheme: str, rounding: str) -> None:
    graph = small_graph(scheme, rounding)
    params = params_of(graph)
    compiled = CompiledGraph(graph, machine_named("four-lanes"), params)
    for tokens in (1, 7, 33):
        ids = np.random.default_rng(1).integers(0, 50, tokens).astype(np.int32)
        expected = np.asarray(evaluate(graph, {"ids": ids}, params.__getitem__)["logits"])
        logits, _ = compiled.run({"ids": ids})
        tolerance = {"int8": 2e-3, "bf16": 1e-2}.get(rounding, 1e-5)  # as in test_program
        assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


@needs_vectors
def test_a_model_runs_on_it(four: None, tmp_path: Path) -> None:
    """Attention, caches and embeddings too: against the same model for a machine that the project has."""
    model, found = make_tiny("llama", tmp_path / "llama"), []
    for target in ("four-lanes", "x86-64-v3"):
        path = tmp_path / f"{target}.so"
        llmc.compile(model, path, "none", target=target, kernel_cache=CACHE, jobs=2)
        found.append(llmc.Runtime.load(path, threads=2).forward([3, 1, 4, 1, 5, 9, 2, 6] * 5))
    assert np.abs(found[0] - found[1]).max() <= 1e-4 * np.abs(found[1]).max()  # sums in another order


def constants(path: str) -> dict[str, object]:
    """Numbers that a module's upper case names stand for."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            try:
                found[node.targets[0].id] = eval(compile(ast.Expression(node.value), path, "eval"), {})
            except NameError:
                continue
    return found


def test_what_is_the_same_number_has_one_definition() -> None:
    """A cache page, a cache line, a tile of the matrix unit: stated once in the rooms that may import each other."""
    for name, number in (("PAGE", 32), ("CACHE_LINE", 64), ("AHEAD_BYTES", 3072), ("TILE", 64), ("ALIGNMENT", 64)):
        where = [
            str(path.relative_to(ROOT))
            for room in ("compiler", "targets")
            for path in sorted((ROOT / room).rglob("*.py"))
            if constants(str(path.relative_to(ROOT))).get(name) == number
        ]
        assert len(where) <= 1, (name, where)


def test_rooms_that_may_not_import_each_other_agree() -> None:
    assert compiler_artifact.HASH_CHUNK == runtime_artifact.HASH_CHUNK
    # Weights start where pages of every size that systems have start: the reader asks for those of its own.
    assert all(compiler_artifact.PAGE % (size << 10) == 0 for size in (4, 16, 64))
    header = (ROOT / "runtime" / "csrc" / "pool.h").read_text(encoding="utf-8")
    assert f"LLMC_HASH_CHUNK ((int64_t){compiler_artifact.HASH_CHUNK >> 20} << 20)" in header
