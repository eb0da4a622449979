"""Rounded weights that are kept for the next compile: the same bytes, or none at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from own_cache import use_own_cache
from tiny_models import make_tiny

import llmc
from llmc.compiler import calibrate as calibration
from llmc.compiler.encodings import encode
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.op import Param
from llmc.compiler.ir.types import Tensor, parse_encoding
from llmc.compiler.rounded_cache import UNUSED_SECONDS, NotKept, RoundedCache


def rounded(encoding: str, rows: int, inputs: int) -> tuple[Quantize, Encoded]:
    w = np.random.default_rng(inputs).standard_normal((rows, inputs)).astype(np.float32)
    return Quantize(Param("w", Tensor(w.shape, "f32")), encoding), encode(parse_encoding(encoding), w)


@pytest.mark.parametrize("encoding", ["q4g64", "q4g32a", "t4g64", "t6g64", "q8g64", "t2g64", "q3g32a", "t5g64"])
@pytest.mark.parametrize("inputs", [1, 7, 31, 33, 129])
def test_what_is_read_is_what_was_written(encoding: str, inputs: int, tmp_path: Path) -> None:
    cache = RoundedCache(tmp_path / "rounded")
    weights = [rounded(encoding, rows, inputs) for rows in (1, 7)]
    cache.write("key", {"w": "int6"}, [encoded for _, encoded in weights])
    assert cache.schemes("key") == {"w": "int6"}
    found = list(cache.read("key", [weight for weight, _ in weights]))
    assert [weight for weight, _ in found] == [weight for weight, _ in weights]
    for (_, expected), (_, encoded) in zip(weights, found, strict=True):
        assert (encoded.encoding, encoded.shape) == (expected.encoding, expected.shape)
        assert encoded.parts.keys() == expected.parts.keys()
        for name, part in encoded.parts.items():
            assert part.dtype == expected.parts[name].dtype
            np.testing.assert_array_equal(part, expected.parts[name])


@pytest.mark.parametrize("encoding", ["q4g64", "t4g64", "t3g64"])
def test_four_bits_take_half_a_byte(encoding: str, tmp_path: Path) -> None:
    cache = RoundedCache(tmp_path)
    _, encoded = rounded(encoding, 256, 1024)
    cache.write("key", {}, [encoded])
    assert (tmp_path / "key.npz").stat().st_size < 0.6 * encoded.parts["q"].size


def test_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    cache = RoundedCache(tmp_path)
    weight, encoded = rounded("q4g64", 7, 129)
    cache.write("key", {}, [encoded])
    whole = (tmp_path / "key.npz").read_bytes()
    others = [rounded("q4g64", 8, 129)[0], rounded("q4g64", 7, 200)[0], rounded("q4g32", 7, 129)[0]]
    for key, weights in (("other", [weight]), ("key", [weight, weight]), *(("key", [other]) for other in others)):
        with pytest.raises(NotKept):
            list(cache.read(key, weights))
    middle = len(whole) // 2  # among the integers
    for damaged in (b"", whole[:100], whole[:-1], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        (tmp_path / "key.npz").write_bytes(damaged)
        with pytest.raises(NotKept):
            list(cache.read("key", [weight]))


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    RoundedCache(tmp_path / "file").write("key", {}, [rounded("q4g64", 1, 7)[1]])


def test_half_a_file_is_never_left(tmp_path: Path) -> None:
    def broken() -> object:
        yield rounded("q4g64", 1, 7)[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RoundedCache(tmp_path).write("key", {}, broken())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_was_not_used_for_long_goes(tmp_path: Path) -> None:
    cache, weight = RoundedCache(tmp_path), rounded("q4g64", 1, 7)[1]
    for name, age in (("old", 1.1), ("new", 0.9)):
        cache.write(name, {}, [weight])
        os.utime(tmp_path / f"{name}.npz", (0, (tmp_path / f"{name}.npz").stat().st_mtime - age * UNUSED_SECONDS))
    cache.write("next", {}, [weight])
    assert {path.stem for path in tmp_path.iterdir()} == {"new", "next"}


def test_a_second_compile_rounds_nothing_and_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_own_cache(tmp_path / "cache", monkeypatch)
    models = {seed: make_tiny("llama", tmp_path / f"llama{seed}", seed=seed) for seed in (0, 1)}
    calls: list[object] = []
    real = calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", lambda *a: calls.append(a) or real(*a))
    counts = []
    compiles: list[dict[str, object]] = [{}, {}, {"target": "x86-64-v3"}]
    for number, options in enumerate(compiles):
        llmc.compile(models[0], tmp_path / f"{number}.so", **options)  # type: ignore[arg-type]
        counts.append(len(calls))
    llmc.compile(models[1], tmp_path / "other.so")
    assert counts == [1, 1, 1]  # another target rounds alike
    assert len(calls) == 2  # another model's weights do not
    assert (tmp_path / "0.so").read_bytes() == (tmp_path / "1.so").read_bytes()
