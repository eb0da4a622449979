"""--check runs the artifact: kernels, packing, plan of memory, driver and runtime; what is wrong is named."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import CACHE
from test_arrays_end_to_end import write_model
from tiny_encoders import make_encoder
from tiny_models import make_tiny

from llmc import frontends
from llmc.compiler import pipeline
from llmc.compiler.check import Checker
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.errors import CompileError
from llmc.frontends.lifted import Lifted
from llmc.runtime.library import Step
from llmc.targets import check_artifact, memory
from llmc.targets.cpu import library
from llmc.targets.cpu.norms import Norm, NormProblem
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine

CONTEXT = 80  # several pages and more than one query tile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(autouse=True)
def lifted_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lifting takes longer than all the rest: a model is lifted once for all tests."""
    monkeypatch.setattr(frontends, "lift", _lift)
    yield


_REAL_LIFT = frontends.lift


@cache
def _lifted(source: str, most: int | None) -> Lifted:
    return _REAL_LIFT(source, max_context=most)


def _lift(source: str, *, max_context: int | None = None, **_: object) -> Lifted:
    return _lifted(source, max_context)


@cache
def _model(folder: Path) -> str:
    return str(make_tiny("mistral", folder / "model", num_hidden_layers=2, max_position_embeddings=CONTEXT))


def check(folder: Path, source: str | None = None, output: str = "model.so", **options: object) -> Checker:
    found: list[Checker] = []
    chosen = CompileOptions(check=True, kernel_cache=CACHE, **options)  # type: ignore[arg-type]
    compile_model(source or _model(folder), folder / output, chosen, on_checked=found.append)
    return found[0]


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_a_decoder_is_compared_to_the_end(folder: Path, scheme: str) -> None:
    checker = check(folder, quantization=scheme)
    words = "\n".join(checker.summary())
    assert "sequences of 2, 80 and 41 tokens" in words and "1 and 2 threads, bit for bit" in words
    artifact = [d for d in checker.differences if d.pass_name.startswith("the artifact")]
    assert len(artifact) == 2
    if scheme == "none":  # f32 beside f32, summed in another order
        assert 0 < max(d.relative for d in artifact) < 2e-5


def test_an_encoder_is_compared_to_the_end(folder: Path) -> None:
    model = str(make_encoder("bert", folder / "encoder"))
    checker = check(folder, model, quantization="none")
    artifact = [d for d in checker.differences if d.pass_name.startswith("the artifact")]
    assert artifact and max(d.relative for d in artifact) < 2e-5


def test_arrays_are_compared_at_several_sizes(folder: Path) -> None:
    checker = check(folder, str(write_model(folder / "arrays.onnx")), quantization="none")
    assert any("batch=" in text and "steps=129" in text for text in checker.sizes)
    assert not checker.not_run and len([d for d in checker.differences if d.pass_name.startswith("the artifact")]) > 10


def test_what_cannot_be_run_is_said(folder: Path) -> None:
    assert "not checked: the artifact itself" in check(folder, quantization="int8", weights="none").summary()[-1]


@pytest.mark.slow
def test_weights_in_a_file_of_their_own_are_used(folder: Path) -> None:
    assert not check(folder, quantization="int8", weights=str(folder / "weights.bin")).not_run


def faulty(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Puts one fault into what makes artifacts."""
    if what == "kernel":
        right = Norm.kernel

        def uneven(self: Norm, problem: NormProblem, machine: Machine) -> Kernel:
            return right(self, replace(problem, eps=problem.eps + 0.01), machine)

        monkeypatch.setattr(Norm, "kernel", uneven)
    elif what == "weight":
        packed = pipeline.packed_arrays

        def wrong(placed: object, load: object, *told: object) -> Iterator[tuple[int, str, np.ndarray]]:
            for offset, name, array in packed(placed, load, *told):  # type: ignore[arg-type]
                yield offset, name, array[::-1] if "down_proj" in name and array.dtype != np.int8 else array

        monkeypatch.setattr(pipeline, "packed_arrays", wrong)
    elif what == "plan":
        plan_memory = memory.plan_memory

        def overlapping(program: object, largest: object) -> memory.Plan:
            plan = plan_memory(program, largest)  # type: ignore[arg-type]
            return memory.Plan(dict.fromkeys(plan.offsets, 0), plan.nbytes, plan.without_reuse)

        monkeypatch.setattr(memory, "plan_memory", overlapping)
    elif what == "driver":
        generate = library.generate_step

        def short(program: object, addresses: object) -> tuple[str, list[str]]:
            source, calls = generate(program, addresses)  # type: ignore[arg-type]
            return source.replace("step, units, grain)", "step, (units) - ((units) > 40), grain)"), calls

        monkeypatch.setattr(library, "generate_step", short)
    elif what == "runtime":
        run = check_artifact._Watcher.run

        def late(self: check_artifact._Watcher, given: Step) -> None:
            positions = (ctypes.c_int32 * given.sizes[0]).from_address(given.positions)
            positions[:] = [min(position + 1, CONTEXT - 1) for position in positions]
            run(self, given)

        monkeypatch.setattr(check_artifact._Watcher, "run", late)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("kernel", r"llm\.rms_norm of .*layernorm.* \(kernel .* computes something else"),
        ("weight", r"llm\.linear of .*down_proj.* \(kernel .* computes something else"),
        ("plan", r"other bits than its own kernels .*first at .*plan of memory"),
        ("driver", r"other bits than its own kernels .*driver"),
        ("runtime", r"the artifact at 1 thread: logits differs .* what the runtime gives"),
    ],
)
def test_a_fault_is_named_and_nothing_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    (folder / "faulty.so").write_bytes(b"what was there before")  # a name that no test has loaded
    faulty(monkeypatch, what)
    with pytest.raises(CompileError, match=message):
        check(folder, output="faulty.so", quantization="none" if what == "kernel" else "int8")
    assert (folder / "faulty.so").read_bytes() == b"what was there before"
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
