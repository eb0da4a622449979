"""Who may import whom: the runtime stays free of compilers and frameworks, and `import llmc` costs nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import fake_artifact
import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "tvm",
    "tvm_ffi",
    "safetensors",
    "scipy",
    "sympy",
    "llmc.compiler",
    "llmc.frontends",
    "llmc.targets",
)
ROOMS = ("compiler", "frontends", "targets", "runtime")
# What each room may import of the others, and of the world beyond the standard library.
ALLOWED = {
    "runtime": {"llmc.errors", "llmc.files", "llmc.lora", "llmc.runtime", "numpy", "tokenizers", "jinja2"},
    "compiler": {"llmc.errors", "llmc.files", "llmc.compiler", "llmc.frontends", "llmc.targets",
                 "llmc.runtime.manifest", "numpy", "ml_dtypes", "threadpoolctl", "z3"},
    "targets": {"llmc.errors", "llmc.compiler", "llmc.targets", "llmc.runtime", "numpy", "ml_dtypes", "tvm", "tvm_ffi"},
    "frontends": {"llmc.errors", "llmc.lora", "llmc.compiler", "llmc.frontends", "numpy", "ml_dtypes", "torch",
                  "transformers", "safetensors", "huggingface_hub", "tokenizers", "onnx", "google", "sentencepiece"},
}  # fmt: skip


def modules_after(code: str) -> set[str]:
    """sys.modules of a fresh interpreter that ran `code`."""
    program = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert shown.returncode == 0, shown.stderr
    return set(json.loads(shown.stdout.splitlines()[-1]))


def loaded(modules: set[str], names: tuple[str, ...]) -> set[str]:
    return {name for name in modules if any(name == heavy or name.startswith(heavy + ".") for heavy in names)}


def test_import_llmc_loads_nothing_but_itself() -> None:
    found = modules_after("import llmc")
    assert loaded(found, (*HEAVY, "numpy", "typer", "rich", "llmc.runtime", "llmc.api")) == set()


def test_the_runtime_loads_no_compiler_and_no_framework() -> None:
    assert loaded(modules_after("from llmc import Runtime"), (*HEAVY, "typer", "rich", "llmc.cli")) == set()


def test_generating_text_loads_no_compiler_and_no_framework(tmp_path: Path) -> None:
    """Not even lazily: load, text, chat."""
    path = fake_artifact.write(tmp_path / "fake.so")
    code = (
        f"from llmc import Runtime; r = Runtime.load({str(path)!r}); r.generate('hello', max_tokens=3); "
        "r.chat('hello', max_tokens=3); r.save(" + repr(str(tmp_path / "copy.so")) + ")"
    )
    assert loaded(modules_after(code), HEAVY) == set()
    assert (tmp_path / "copy.so").read_bytes() == path.read_bytes()


def test_reading_an_onnx_file_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """Nor do the passes over it. (A tokenizer beside it is read by transformers; tvm loads torch where it is there.)"""
    import numpy as np
    from onnx_files import mlp, write
    from onnx_graphs import Nodes

    text = Nodes({"input_ids": ("int64", ["batch", "seq"])})
    words = text.add("Gather", np.ones((9, 4), np.float32), "input_ids")
    paths = [write(mlp(), tmp_path / "arrays.onnx"), write(text.model(words), tmp_path / "text.onnx")]
    code = (
        "from llmc.compiler.options import CompileOptions as O; from llmc.frontends import lift; "
        "from llmc.compiler.pipeline import lift_model, run_lifted; "
        f"[(lift(p), run_lifted(lift_model(p, O()), O())) for p in {[str(path) for path in paths]!r}]"
    )
    found = modules_after(code)
    assert loaded(found, ("llmc.frontends.onnx", "onnx"))
    assert loaded(found, ("torch", "transformers", "safetensors")) == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["compile", "--help"], ["run", "ARTIFACT", "hi", "-n", "2"]]
)
def test_the_command_line_loads_only_what_a_command_needs(arguments: list[str], tmp_path: Path) -> None:
    path = fake_artifact.write(tmp_path / "fake.so")
    given = [str(path) if argument == "ARTIFACT" else argument for argument in arguments]
    found = modules_after(f"from llmc.cli import run; assert run({given!r}) == 0")
    assert (
        loaded(found, ("torch", "transformers", "onnx", "tvm", "llmc.compiler", "llmc.frontends", "llmc.targets"))
        == set()
    )


def test_the_public_names_are_there_and_no_others() -> None:
    import llmc

    assert set(llmc.__all__) <= set(dir(llmc))
    for name in llmc.__all__:
        assert getattr(llmc, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = llmc.nothing


def imports_of(path: Path) -> set[str]:
    """Absolute imports of a file, wherever they stand, but for those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            hidden.update(inner for statement in node.body for inner in ast.walk(statement))
    found = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for name in imports_of(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED[room])
    }
    assert wrong == set()


def test_only_the_pipeline_knows_of_targets_and_frontends() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "compiler").rglob("*.py"))
        if any(name.startswith(("llmc.targets", "llmc.frontends")) for name in imports_of(path))
    }
    assert users <= {"compiler/pipeline.py"}
