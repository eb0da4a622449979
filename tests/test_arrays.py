"""Artifacts that take arrays: inputs are checked against what the model wants, sizes come from shapes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fake_kinds import write_arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.arrays import rounded, widened
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.runtime import Runtime
from llmc.runtime.sizes import SizeError, parse_size, show, value_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return Runtime.load(write_arrays(tmp_path_factory.mktemp("arrays") / "any.so"), threads=2)


def inputs(n: int, m: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((n, 3), np.float32),
        "y": rng.integers(-9, 9, (n, m)),
        "half": rng.standard_normal((n, 3), np.float32),
    }


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_any_sizes_in_range(model: Runtime, n: int, m: int, seed: int) -> None:
    given = inputs(n, m, seed)
    found = model.run(given)
    np.testing.assert_allclose(found["total"], given["x"].sum(1) + given["y"].sum(1), rtol=1e-5, atol=1e-4)
    twice = 2 * given["half"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found["wide"], twice)
    assert found["count"] == m and found["count"].shape == () and found["count"].dtype == np.int64


def test_results_are_kept_and_layout_does_not_matter(model: Runtime) -> None:
    """Outputs are new arrays; inputs may be views in any order, unaligned, or lists."""
    given = inputs(5, 7)
    first = model.run(given)
    other = model.run(inputs(5, 7, seed=1))
    assert not np.array_equal(first["total"], other["total"])
    backwards = np.asfortranarray(given["x"][::-1])[::-1]
    raw = np.zeros(given["y"].nbytes + 1, np.uint8)[1:].view(np.int64).reshape(5, 7)
    raw[...] = given["y"]
    again = model.run({"x": backwards, "y": raw, "half": given["half"].astype(ml_dtypes.bfloat16)})
    lists = model.run({"x": given["x"].tolist(), "y": given["y"].tolist(), "half": given["half"]})
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)
        np.testing.assert_array_equal(lists[name], array)


class Stubborn:
    """A tensor that does not become an array, as torch's that need a gradient do not."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise RuntimeError("call detach first")


WRONG = {
    "missing": ({"x": None}, "input x is missing; wanted: x float32 .n, 3., y int64 .n, m., half bfloat16"),
    "unknown": ({"z": np.zeros(3)}, "there is no input z; wanted: x float32"),
    "dtype": ({"x": np.zeros((4, 3))}, r"x must be float32 \[n, 3\], and is float64: give x.astype\('float32'\)"),
    "byte order": ({"x": np.zeros((4, 3), ">f4")}, "and is >f4"),
    "rank": ({"x": np.zeros(3, np.float32)}, r"x must be float32 \[n, 3\], and has shape \[3\]"),
    "size": ({"x": np.zeros((4, 2), np.float32)}, r"x must be float32 \[n, 3\], and has shape \[4, 2\]"),
    "conflict": ({"y": np.zeros((3, 2), np.int64)}, "n is 4 in x and 3 in y: they must be equal"),
    "too many": (
        {"x": np.zeros((9, 3), np.float32), "y": np.zeros((9, 2), np.int64), "half": np.zeros((9, 3), np.float32)},
        "n is 9 in x, and the model was compiled for 8 at most: compile it with --max-dim n=9",
    ),
    "too few": (
        {"x": np.zeros((0, 3), np.float32), "y": np.zeros((0, 2), np.int64), "half": np.zeros((0, 3), np.float32)},
        "n is 0 in x, and must be at least 1",
    ),
    "a list of other things": ({"y": [[0.5, 1.0]] * 4}, "y must be int64 .n, m., and its values are float64"),
    "a ragged list": ({"y": [[1], [1, 2], [3], [4]]}, "y must be int64 .n, m., and is no array"),
    "another library's": ({"x": Stubborn()}, "x must be float32 .n, 3., and is no array: call detach first"),
    "texts": ({"x": [["a"] * 3] * 4}, "its values are <U1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_one_line(model: Runtime, name: str) -> None:
    changes, message = WRONG[name]
    given = {key: value for key, value in {**inputs(4, 2), **changes}.items() if value is not None}
    with pytest.raises(RuntimeStateError, match=message) as caught:
        model.run(given)
    assert "\n" not in str(caught.value)


def test_methods_for_text_say_what_to_use(model: Runtime) -> None:
    for call in (
        lambda: model.generate("a"),
        lambda: model.embed("a"),
        lambda: model.classify("a"),
        lambda: model.encode("a"),
        lambda: model.sequence(),
    ):
        with pytest.raises(RuntimeStateError, match=r"takes arrays: use run\(\{name: array\}\), not "):
            call()
    with pytest.raises(RuntimeStateError, match="a dict from names to arrays"):
        model.run([1, 2])  # type: ignore[arg-type]


def test_sizes_in_several_places(tmp_path: Path) -> None:
    """A name that is only part of sizes is solved for; the others are checked."""
    facts = [
        {"name": "x", "dtype": "float32", "shape": ["n", 3]},
        {"name": "y", "dtype": "int64", "shape": ["n", "2*m + 1"]},
        {"name": "half", "dtype": "bfloat16", "shape": ["n", 3]},
    ]
    runtime = Runtime.load(write_arrays(tmp_path / "odd.so", inputs=facts))
    arrays = runtime._arrays
    assert arrays is not None
    assert arrays.bind({"x": (2, 3), "y": (2, 7), "half": (2, 3)}) == {"n": 2, "m": 3}
    with pytest.raises(RuntimeStateError, match=r"y must be int64 \[n, 2\*m \+ 1\], and has shape \[2, 8\]"):
        arrays.bind({"x": (2, 3), "y": (2, 8), "half": (2, 3)})


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_bfloat16_is_rounded_as_elsewhere(values: list[float]) -> None:
    array = np.array(values, np.float32)
    with np.errstate(all="ignore"):
        expected = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(widened(rounded(array)), expected)


names = st.sampled_from(["n", "m", "batch.1", "a-b", "T"])
texts = st.recursive(
    st.integers(0, 9).map(str) | names,
    lambda inner: (
        st.tuples(inner, inner).map(lambda two: f"({two[0]} + {two[1]})")
        | st.tuples(inner, inner).map(lambda two: f"({two[0]})*({two[1]})")
        | st.tuples(inner, st.integers(1, 5)).map(lambda two: f"({two[0]} + -1*3)//{two[1]}")
    ),
    max_leaves=6,
)


@given(texts)
@settings(max_examples=200, deadline=None)
def test_sizes_mean_what_they_say(text: str) -> None:
    """A size's value is that of the expression; what is shown of it parses to the same."""
    binding = {"n": 5, "m": 7, "batch.1": 3, "a-b": 11, "T": 2}
    size = parse_size(text)
    spelled = text.replace("batch.1", "3").replace("a-b", "11").replace("n", "5").replace("m", "7").replace("T", "2")
    assert value_of(size, binding) == eval(spelled)
    assert value_of(parse_size(show(size)), binding) == value_of(size, binding)


@pytest.mark.parametrize(
    "value",
    [-1, 1 << 63, 1.5, None, True, "", "n +", "n n", "(n", "n)", "n//0", "n//m", "n//(2)*", "-n", "2 ** 3", "n;m",
     "(" * 100 + "n" + ")" * 100, "n + " * 2000 + "n", "n*" * 3000 + "n", "__import__('os')"],
)  # fmt: skip
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(SizeError):
        parse_size(value)


def test_sizes_beyond_all_memory_are_an_error() -> None:
    with pytest.raises(RuntimeStateError, match="2\\^62"):
        value_of(parse_size("n*n*n*n*n*n*n*n"), {"n": 1 << 40})
