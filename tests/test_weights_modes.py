"""--weights: in the artifact, random, nowhere, or in a file of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_harness import CACHE
from tiny_models import make_tiny

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.errors import ArtifactError
from llmc.runtime.runtime import Runtime

IDS = [3, 141, 59, 26, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("weights") / "llama")


def compiled(model: Path, output: Path, weights: str, seed: int = 0, calibrate: str | None = None) -> Path:
    options = CompileOptions(
        quantization="int4", group_size=32, weights=weights, seed=seed, kernel_cache=CACHE, calibrate=calibrate
    )
    compile_model(str(model), output, options)
    return output


def test_weights_in_a_file_say_what_embedded_ones_say(model: Path, tmp_path: Path) -> None:
    embedded = Runtime.load(compiled(model, tmp_path / "a.so", "embed", calibrate="none")).forward(IDS)
    file = tmp_path / "weights.bin"
    artifact = compiled(model, tmp_path / "b.so", str(file), calibrate="none")
    assert artifact.stat().st_size < (tmp_path / "a.so").stat().st_size
    np.testing.assert_array_equal(Runtime.load(artifact, weights=file).forward(IDS), embedded)
    # The code is the same without weights: the file fits that artifact too.
    bare = compiled(model, tmp_path / "c.so", "none")
    np.testing.assert_array_equal(Runtime.load(bare, weights=file).forward(IDS), embedded)
    with pytest.raises(ArtifactError, match="compiled without weights"):
        Runtime.load(bare)


def test_weights_in_a_file_are_rounded_by_what_layers_see_and_fit_the_bare_artifact(
    model: Path, tmp_path: Path
) -> None:
    """None of them has more bits than its scheme: the file would not be what the other artifact reads."""
    file = tmp_path / "weights.bin"
    own = Runtime.load(compiled(model, tmp_path / "a.so", str(file)), weights=file).forward(IDS)
    bare = compiled(model, tmp_path / "b.so", "none")
    np.testing.assert_array_equal(Runtime.load(bare, weights=file).forward(IDS), own)
    for other in (file.read_bytes() + bytes(64), file.read_bytes()[:-64]):  # of weights that lie otherwise
        file.write_bytes(other)
        with pytest.raises(ArtifactError, match="does not hold the"):
            Runtime.load(bare, weights=file)


def test_a_flipped_byte_in_the_file_is_found(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    artifact = compiled(model, tmp_path / "a.so", str(file))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"weights\.bin"):
        Runtime.load(artifact, weights=file)


def test_random_weights_follow_their_seed(model: Path, tmp_path: Path) -> None:
    first, second, third = (
        Runtime.load(compiled(model, tmp_path / f"{i}.so", "random", seed)).forward(IDS)
        for i, seed in enumerate((1, 1, 2))
    )
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).all()
    assert np.abs(first - third).max() > 1e-3
