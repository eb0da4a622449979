"""Tensors of a GGUF file as weights of a model: joined, turned, as integers; and what a user is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf_files import TYPES, blocks_of, write

from llmc.compiler.ir.types import dtype_of
from llmc.errors import FrontendError
from llmc.frontends.gguf.reader import GgufFile
from llmc.frontends.gguf.rows import (
    Groups,
    Interleaved,
    Joined,
    KeyValueHeads,
    PairsToHalves,
    Plus,
    Row,
    Shaped,
    Taken,
    Turned,
)
from llmc.frontends.gguf.stored import KINDS
from llmc.frontends.gguf.weights import GgufWeights, Tensors, Weight
from llmc.frontends.stored_integers import Part


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def source(folder: Path, tensors: Mapping[str, tuple[str, np.ndarray]], weights: Mapping[str, Weight]) -> GgufWeights:
    return GgufWeights(Tensors([GgufFile(write(folder / "m.gguf", {}, tensors))]), weights)


def test_a_tensor_stands_in_one_part_of_a_model(tmp_path: Path) -> None:
    files = [GgufFile(write(tmp_path / name, {}, {name: ("F32", values(4))})) for name in ("a", "b")]
    assert Tensors(files).names == ["a", "b"] and "b" in Tensors(files) and "c" not in Tensors(files)
    np.testing.assert_array_equal(Tensors(files).load("b"), values(4))
    with pytest.raises(FrontendError, match="tensor 'a' stands in another part"):
        Tensors([files[0], files[1], files[0]])


def test_floats_stay_in_their_dtype_where_nothing_is_done_to_them(tmp_path: Path) -> None:
    tensors = {
        "half": ("F16", values(4, 32)), "half2": ("F16", values(2, 32)), "whole": ("F32", values(2, 32)),
        "bytes": ("Q8_0", values(4, 32)),
    }  # fmt: skip
    weights = {
        "alone": Weight(("half",)), "joined": Weight(("half", "half2"), Joined()),
        "mixed": Weight(("half", "whole"), Joined()), "more": Weight(("half",), values=Plus(1.0)),
        "bytes": Weight(("bytes",)), "both": Weight(("half", "half2"), Joined(), Plus(1.0)),
    }  # fmt: skip
    found = source(tmp_path, tensors, weights)
    expected = {"alone": "f16", "joined": "f16", "mixed": "f32", "more": "f32", "bytes": "f32", "both": "f32"}
    assert {name: found.dtype(name) for name in found.names} == expected
    shapes = {name: (4, 32) if name in ("alone", "more", "bytes") else (6, 32) for name in expected}
    for name in found.names:
        array = found.load(name)
        assert dtype_of(array.dtype) == expected[name] and array.flags.c_contiguous
        assert array.shape == found.shape(name) == shapes[name]
    halves = np.concatenate([values(4, 32), values(2, 32)]).astype(np.float16)
    np.testing.assert_array_equal(found.load("joined"), halves)
    np.testing.assert_array_equal(found.load("both"), halves.astype(np.float32) + 1)
    assert found.of_linears == {"alone", "joined", "mixed", "bytes"}
    assert found.tensors_of("mixed") == ("half", "whole")


def test_rows_of_one_number_are_put_together_as_rows_are(tmp_path: Path) -> None:
    """Vectors, and the biases of experts, which have one axis more."""
    tensors = {
        "a": ("F32", values(8)), "b": ("F32", values(4)), "x.bias": ("F32", values(3, 8)),
        "y.bias": ("F32", values(3, 4)), "x": ("F32", values(3, 8)), "y": ("F32", values(2, 8)),
    }  # fmt: skip
    weights = {
        "vector": Weight(("a", "b"), Joined()), "less": Weight(("a", "b"), Joined(), Plus(-1.0)),
        "experts": Weight(("x.bias", "y.bias"), Joined(1)), "rows": Weight(("x", "y"), Joined()),
        "halves": Weight(("a",), PairsToHalves(2)),
    }  # fmt: skip
    found = source(tmp_path, tensors, weights)
    expected = {
        "vector": np.concatenate([values(8), values(4)]), "less": np.concatenate([values(8), values(4)]) - 1,
        "experts": np.concatenate([values(3, 8), values(3, 4)], axis=1),
        "rows": np.concatenate([values(3, 8), values(2, 8)]), "halves": values(8)[[0, 2, 1, 3, 4, 6, 5, 7]],
    }  # fmt: skip
    for name, array in expected.items():
        np.testing.assert_array_equal(found.load(name), array)
        assert found.shape(name) == array.shape and found.load(name).flags.c_contiguous


def test_what_cannot_be_put_together_is_told_with_its_tensors(tmp_path: Path) -> None:
    found = source(tmp_path, {"a": ("F32", values(6, 32))}, {"w": Weight(("a",), PairsToHalves(4))})
    for ask in (found.shape, found.load):
        with pytest.raises(FrontendError, match=r"weight w cannot be made of a \[6, 32\]: 6 rows are not 4 heads"):
            ask("w")


@pytest.mark.parametrize("kind", KINDS)
def test_integers_stand_for_the_numbers_of_the_file(tmp_path: Path, kind: str) -> None:
    """Of one tensor, and of two whose rows are put together; in shapes and dtypes as they are said."""
    wide = 2 * TYPES[kind][1]
    tensors = {name: (kind, blocks_of(kind, values(rows, wide))) for name, rows in (("a", 4), ("b", 6))}
    found = source(tmp_path, tensors, {"one": Weight(("a",)), "two": Weight(("a", "b"), Joined())})
    for name, rows in (("one", 4), ("two", 10)):
        stored = found.integers(name)
        assert stored is not None
        parts = [part for part in (stored.q, stored.scales, stored.zeros) if isinstance(part, Part)]
        for part in parts:
            array = part.load()
            assert array.shape == part.shape and dtype_of(array.dtype) == part.dtype
        exact = found.load(name)
        error = np.abs(stored.dequantized() - exact).max() / np.abs(exact).max()
        assert error < 1e-6 and stored.shape == found.shape(name) == (rows, wide)
        said = f"{stored.bits} bits ({kind}, scales rounded to f16)" if kind.endswith("_K") else f"bits ({kind})"
        assert said in stored.what and stored.bits == int(kind[1])
        assert stored.scales.shape == (rows, wide // stored.block) and stored.block in (16, 32)
        signed = kind in ("Q8_0", "Q3_K", "Q6_K")
        assert (stored.q.dtype == "i8", stored.zeros is None) == (signed, signed)
        assert isinstance(stored.zeros, Part) or signed or stored.zeros == 1 << (stored.bits - 1)


def test_what_is_no_matrix_of_one_kept_type_has_no_integers(tmp_path: Path) -> None:
    tensors = {
        "a": ("Q4_0", values(4, 32)), "b": ("Q8_0", values(4, 32)), "c": ("Q4_0", values(2, 4, 32)),
        "d": ("Q4_0", values(32)), "e": ("F16", values(4, 32)), "f": ("IQ4_NL", values(4, 32)),
        "g": ("IQ4_NL", values(2, 4, 32)),
    }  # fmt: skip
    weights = {name: Weight((name,)) for name in tensors} | {
        "ab": Weight(("a", "b"), Joined()), "ba": Weight(("b", "a"), Joined()), "a+": Weight(("a",), values=Plus(1.0)),
        "aa": Weight(("a", "a"), Joined()), "ff": Weight(("f", "f"), Joined()), "fe": Weight(("f", "e"), Joined()),
    }  # fmt: skip
    found = source(tmp_path, tensors, weights)
    assert {name for name in found.names if found.integers(name) is not None} == {"a", "b", "aa"}
    # What of them is rounded anew keeps the bits of the finest: 4.5 of Q4_0 and IQ4_NL, 8.5 of Q8_0.
    assert found.least() == {"ab": "int8", "ba": "int8", "a+": "int5", "f": "int5", "ff": "int5", "fe": "int5"}


def test_shapes_are_those_of_the_results() -> None:
    for shape in ((5,), (2, 5), (3, 2, 5)):
        array = np.zeros(shape)
        for change in (Turned(), Plus(1.0), Row(0), Shaped((1, 5)), Shaped((5,)), Shaped((6, 5))):
            if isinstance(change, Shaped) and np.prod(change.to) != array.size:
                assert change.shape(shape) == ()
            else:
                assert change.shape(shape) == change(array).shape
    keys, heads = KeyValueHeads(), np.arange(24.0).reshape(2, 4, 3)
    assert keys.shape((2, 4, 3), (2, 5, 4)) == keys(heads, np.zeros((2, 5, 4))).shape == (16, 4)
    for wrong in (
        ((2, 4), (2, 5, 4)),
        ((2, 4, 3), (5, 4)),
        ((2, 4, 3), (3, 5, 4)),
        ((2, 4, 3), (2, 5, 3)),
        ((2, 4, 3), (2, 5, 5)),
        ((2, 4, 3, 1), (2, 5, 4)),
        ((2, 4, 3), (2, 5, 4, 1)),
    ):
        assert keys.shape(*wrong) == ()


def test_rows_that_do_not_fit_are_refused() -> None:
    rows = np.zeros((12, 2))
    for change in (PairsToHalves(2), PairsToHalves(6), Taken(4, 12), Groups(2, 1), Groups(2, 4), Groups(1, 10)):
        assert len(change([rows])) in (12, 8)
    wrong = [
        (PairsToHalves(4), "12 rows are not 4 heads of pairs"), (PairsToHalves(12), "12 rows are not 12 heads"),
        (Groups(2, 3), "12 rows are not 2 groups of 5 heads"), (Taken(4, 13), "it has 12 rows, not 13"),
    ]  # fmt: skip
    for change, said in wrong:
        with pytest.raises(ValueError, match=said):
            change([rows])
    experts = np.zeros((2, 3, 4))
    for first, second in ((experts, experts[:1]), (rows, rows), (experts[None], experts[None])):
        with pytest.raises(ValueError, match="no two of one shape"):
            Interleaved()([first, second])
    assert Interleaved()([experts, experts]).shape == (2, 6, 4)


def test_a_row_of_a_matrix() -> None:
    matrix = np.arange(24.0).reshape(2, 3, 4)
    for index in range(6):
        assert Row(index)(matrix).tolist() == list(range(4 * index, 4 * index + 4))
