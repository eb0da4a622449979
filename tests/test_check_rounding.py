"""What inexact passes round is compared with the bounds of the encodings: a wrong rounding is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from small_decoder import small_decoder
from test_passes_basic_check import CACHED

from llmc.compiler.check import Checker
from llmc.compiler.check_rounding import _require_quantized
from llmc.compiler.encodings import encode, grouped
from llmc.compiler.encodings.search import Rounding
from llmc.compiler.ir import llm
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.integers import ScaleIntegers
from llmc.compiler.ir.op import Input, Param
from llmc.compiler.ir.types import Tensor, parse_encoding, precise
from llmc.compiler.passes.manager import parse_pipeline, run_passes
from llmc.errors import CompileError


def check(scheme: str, options: str = "") -> Checker:
    checker = Checker(lengths=(5, 2))
    text = f"{CACHED},quantize{{scheme={scheme}{options}}}"
    run_passes(small_decoder(), parse_pipeline(text), [checker])
    return checker


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int4", ",group-size=8,activations=int8"), ("int4", ",group-size=8,symmetric=false,activations=int8"),
        ("int8", ",group-size=32,activations=int8"), ("int8", ",symmetric=false"), ("f16", ""),
        ("bf16", ",activations=bf16"), ("int4", ",search=false"), ("none", ""),
        ("q4g8", ",activations=int8"), ("int6", ",group-size=8,activations=int8"),
        ("int2", ",group-size=8,activations=int8"), ("int3", ",group-size=8,symmetric=false"),
        ("int5", ",group-size=8"), ("int8", ",group-size=0"), ("q4g64r", ",activations=int8"),
    ],
)  # fmt: skip
def test_right_roundings_keep_their_bounds(scheme: str, options: str) -> None:
    checker = check(scheme, options)
    # The decoder's own weights are bf16, which stays as it is.
    assert any("element by element" in text for text in checker.rounded) == (scheme not in ("none", "bf16"))
    assert any("activations" in text for text in checker.rounded) or "activations" not in options


def halved(found: Rounding) -> Rounding:
    return Rounding(found.q, found.scales / 2, found.minimums)


def shifted(found: Rounding) -> Rounding:
    return Rounding(np.clip(found.q + 1, -8, 7), found.scales, found.minimums)


def exchanged(found: Rounding) -> Rounding:
    """As if scales lay along the other axis."""
    return Rounding(found.q, found.scales[::-1].copy(), found.minimums)


@pytest.mark.parametrize("wrong", [halved, shifted, exchanged])
@pytest.mark.parametrize("scheme", ["int4", "q4g8", "int6", "int8"])
def test_wrong_weights_are_named(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Rounding], Rounding], scheme: str
) -> None:
    right = grouped._round_rows
    monkeypatch.setattr(grouped, "_round_rows", lambda *args: wrong(right(*args)))
    with pytest.raises(CompileError, match=r"pass quantize\{.*\}: weight .*, stored as [qt]\dg8, is .*allows"):
        check(scheme, ",group-size=8")


def test_casts_that_cut_off_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towards zero instead of to the nearest."""
    from llmc.compiler import check_rounding

    def truncated(value: object, load: object) -> np.ndarray:
        return np.nextafter(stored(value, load), np.float16(0))  # type: ignore[arg-type,call-overload,no-any-return]

    stored = check_rounding._as_stored
    monkeypatch.setattr(check_rounding, "_as_stored", truncated)
    with pytest.raises(CompileError, match="stored as f16"):
        check("f16")


def test_groups_of_activations_that_are_not_those_of_the_weight_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_group_of", lambda weight: 64)
    with pytest.raises(CompileError, match=r"pass quantize\{.*activations of .*, rounded to int8"):
        check("int8", ",group-size=8,activations=int8")


def test_other_scales_of_activations_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """max|x| / 128: each activation within half a step, but no multiple of max|x| / 127."""

    def wrong(x: np.ndarray, rounding: str, group: int) -> np.ndarray:
        if rounding != "int8":
            return x
        padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % group)])
        groups = padded.reshape(*x.shape[:-1], -1, group)
        scale = np.abs(groups).max(axis=-1, keepdims=True) / 128
        found = np.round(groups / np.where(scale == 0, 1, scale)) * scale
        return found.reshape(padded.shape)[..., : x.shape[-1]].astype(x.dtype)

    monkeypatch.setattr(llm, "round_activations", wrong)
    with pytest.raises(CompileError, match="whole multiples of max"):
        check("int8", ",group-size=8,activations=int8")


def test_what_else_an_inexact_pass_changes_is_compared_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.compiler.passes.quantize import QuantizeWeights

    right = QuantizeWeights.run

    def wrong(self: QuantizeWeights, graph: object, report: object) -> object:
        def rule(op: object) -> object:
            return op.replace(scale=op.scale * 1.001) if isinstance(op, llm.PagedAttention) else None

        return rewrite(right(self, graph, report), rule)  # type: ignore[arg-type]

    monkeypatch.setattr(QuantizeWeights, "run", wrong)
    with pytest.raises(CompileError, match=r"pass quantize\{.*changed|no bound|differs"):
        check("int8", ",group-size=8")


def test_integers_of_the_source_keep_theirs() -> None:
    """keep-integers: only scales are rounded, to f16; other integers are named."""
    q, scales = Param("q", Tensor((6, 64), "i8")), Param("scales", Tensor((6, 1), "f32"))
    graph = Graph("g", (X,), (("y", llm.Linear(X, ScaleIntegers(q, scales))),))
    rng = np.random.default_rng(0)
    data = {
        "q": rng.integers(-127, 128, (6, 64)).astype(np.int8),
        "scales": rng.uniform(0.01, 0.02, (6, 1)).astype(np.float32),
    }
    checker = Checker(data.__getitem__)
    run_passes(graph, parse_pipeline("keep-integers"), [checker])
    assert checker.rounded == ["keep-integers: 1 weight element by element (q8g64)"]


X = Input("x", Tensor((3, 64), "f32"))


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("size", [1, 7, 33, 129])
@pytest.mark.parametrize("name", ["q4g32", "q4g64a", "q8g64", "q8g32a", "t4g32", "t4g64", "t6g32"])
def test_no_weights_of_a_right_encoding_are_beyond_its_bound(name: str, size: int, search: bool) -> None:
    """Normal, heavy-tailed, one-sided, equal, tiny and zero ones."""
    rng = np.random.default_rng(size)
    normal = rng.standard_normal((300, size))
    for w in (normal, rng.standard_t(2, (300, size)), np.abs(normal), np.ones((3, size)), normal * 1e-6, 0 * normal):
        rows = w.astype(np.float32)
        encoded = encode(parse_encoding(name), rows, search=search)
        with precise():
            _require_quantized("w", rows.astype(np.float64), encoded.decode(), encoded)
