"""The same model, options and versions give the same bytes: whenever, wherever and in whichever order they are made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_files
import pytest
from kernel_harness import CACHE
from tiny_encoders import make_encoder
from tiny_models import make_tiny

import llmc
from llmc.errors import CompileError
from llmc.runtime.artifact import Artifact

COMPILE = """
import sys
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from pathlib import Path
cache, jobs, output, *models = sys.argv[1:]
for model in models:
    options = CompileOptions(group_size=32, kernel_cache=Path(cache), jobs=int(jobs))
    compile_model(model, Path(output, Path(model).name + ".so"), options)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_files.write(onnx_files.mlp(), tmp_path_factory.mktemp("model") / "mlp.onnx")


def test_artifacts_of_one_model_are_equal(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a copy of the model elsewhere, with other folders for what is in between."""
    other = tmp_path / "some" / "where" / "mlp.onnx"
    other.parent.mkdir(parents=True)
    shutil.copy(model, other)
    llmc.compile(model, tmp_path / "a.so", kernel_cache=CACHE, jobs=4)
    llmc.compile(model, tmp_path / "b.so", kernel_cache=CACHE, jobs=1)
    monkeypatch.setattr("tempfile.tempdir", str(other.parent))
    monkeypatch.chdir(other.parent)
    llmc.compile("mlp.onnx", "c.so", kernel_cache=CACHE)
    first = (tmp_path / "a.so").read_bytes()
    assert (tmp_path / "b.so").read_bytes() == first
    assert Path("c.so").read_bytes() == first


def test_weights_in_a_file_are_equal_and_may_lie_anywhere(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        llmc.compile(model, tmp_path / f"{name}.so", weights=str(tmp_path / f"{name}.weights"), kernel_cache=CACHE)
    for kind in ("so", "weights"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_an_artifact_has_the_time_that_it_was_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def created(value: str) -> object:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
        llmc.compile(model, tmp_path / "timed.so", kernel_cache=CACHE)
        artifact = Artifact.open(tmp_path / "timed.so")
        artifact.close()
        provenance = artifact.manifest.raw["provenance"]
        assert isinstance(provenance, dict)
        return provenance.get("created")

    assert [created("0"), created("1700000000"), created("")] == ["1970-01-01T00:00:00Z", "2023-11-14T22:13:20Z", None]
    with pytest.raises(CompileError, match=r"SOURCE_DATE_EPOCH is 'today'.*seconds since 1970"):
        created("today")


@pytest.mark.slow
def test_nothing_depends_on_the_order_of_sets(tmp_path: Path) -> None:
    """Sets of texts have another order in each process, and sets of objects that of their addresses. Kernels come from
    a cache, or are made in this order or that."""
    models = [
        make_tiny("gemma3_text", tmp_path / "gemma"),
        make_encoder("bert", tmp_path / "bert", "TokenClassification"),
    ]
    for seed, jobs, cache in ((1, 1, tmp_path / "cold"), (2, 4, CACHE)):
        output = tmp_path / f"out{seed}"
        output.mkdir()
        arguments = map(str, (cache, jobs, output, *models))
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", COMPILE, *arguments], check=True, env=environment, capture_output=True)
    for model in models:
        first, second = ((tmp_path / f"out{seed}" / f"{model.name}.so").read_bytes() for seed in (1, 2))
        assert first == second, model.name
