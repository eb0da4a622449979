"""Where more bits go: never more than asked for, to what gains most, and nothing else changes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own_cache import use_own_cache
from tiny_models import make_tiny

import llmc
from llmc.compiler import calibrate as calibration
from llmc.compiler.allocation import Choice, assemblies, matrices, others, saved, spend, spent_on, usable
from llmc.compiler.encodings import encode
from llmc.compiler.encodings.feedback import Rounded
from llmc.compiler.encodings.grouped import grouped, stored_bytes
from llmc.compiler.ir.elementwise import Mul, constant
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.op import Param, Value
from llmc.compiler.ir.structural import Concat, Slice
from llmc.compiler.ir.types import Tensor, parse_encoding
from llmc.compiler.own_text import chances_of, draw
from llmc.compiler.passes.schemes import Overrides
from llmc.compiler.rounded_parts import RoundedParts
from llmc.errors import CompileError
from llmc.runtime.artifact import Artifact
from llmc.runtime.runtime import Runtime

units = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=3).map(
        lambda steps: [
            Choice(sum(bits for bits, _ in steps[: i + 1]), 1.0 - sum(gain for _, gain in steps[1 : i + 1]) / 3)
            for i in range(len(steps))
        ]
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(units, st.integers(0, 60))
def test_no_more_is_spent_than_there_is_and_nothing_that_gains_is_left_if_it_fits(
    units: list[list[Choice]], most: int
) -> None:
    taken = spend(units, most)
    spent = sum(choices[number].bits - choices[0].bits for choices, number in zip(units, taken, strict=True))
    assert 0 <= spent <= most
    for choices, number in zip(units, taken, strict=True):
        assert choices[number].noise <= choices[0].noise
        if number + 1 < len(choices) and choices[number + 1].noise < choices[number].noise:
            # The next step was too dear when its turn came, with no less spent than the better steps before it.
            assert choices[number + 1].bits - choices[number].bits > most - spent


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=6), st.integers(0, 6))
def test_of_steps_that_cost_alike_the_best_are_taken(gains: list[float], count: int) -> None:
    taken = spend([[Choice(4, 1.0), Choice(6, 1.0 - gain)] for gain in gains], 2 * count)
    best = sorted(gains, reverse=True)[:count]
    assert sum(taken) == min(count, len(gains))
    assert sorted((gain for gain, number in zip(gains, taken, strict=True) if number), reverse=True) == best


def test_other_encodings_of_a_weight_have_the_same_groups() -> None:
    for name, expected in (
        ("t4g32", ["t3g32", "t5g32", "t6g32"]), ("q4g64a", ["t5g64", "t6g64"]), ("q4g128", ["t5g128", "t6g128"]),
        ("t2g64", ["t3g64", "t4g64"]), ("t5g64", ["t4g64", "t6g64", "q8g64"]), ("t6g64", ["t5g64", "q8g64"]),
        ("q8g64", []), ("t4g64r", ["t3g64r", "t5g64r", "t6g64r"]),
    ):  # fmt: skip
        assert [str(each) for each in others(grouped(parse_encoding(name)))] == expected


def param(name: str, rows: int) -> Param:
    return Param(name, Tensor((rows, 96), "f32"))


def rounded(weight: Quantize, values: np.ndarray, errors: dict[str, list[float]]) -> list[Rounded]:
    ones = np.ones(len(values), np.float32)
    return [
        Rounded(encode(parse_encoding(name), values), ones, np.array(each, np.float32)) for name, each in errors.items()
    ]


def merged(*parts: Value, encoding: str = "t4g32") -> Quantize:
    return Quantize(Concat(parts, 0) if len(parts) > 1 else parts[0], encoding)


def kept_weights() -> tuple[dict[Quantize, list[Rounded]], dict[str, np.ndarray]]:
    """Queries, keys and values in one weight, and an output, that lose alike."""
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal((rows, 96)).astype(np.float32) for name, rows in
              (("q", 5), ("k", 3), ("v", 2), ("o", 10))}  # fmt: skip
    qkv, out = merged(*(param(name, len(values[name])) for name in "qkv")), merged(param("o", 10))
    noise = {"t4g32": [0.03] * 10, "t3g32": [0.1] * 10, "t6g32": [0.001] * 10}
    kept = {
        qkv: rounded(qkv, np.concatenate([values[name] for name in "qkv"]), noise),
        out: rounded(out, values["o"], noise),
    }
    return kept, values


def bits_between(one: str, other: str) -> int:
    """Of ten rows."""
    more, fewer = (stored_bytes(parse_encoding(name), (10, 96)) for name in (one, other))
    return 8 * (more - fewer)


NONE = Overrides(())


def test_bits_go_where_the_model_loses_most() -> None:
    kept, _ = kept_weights()
    qkv, out = kept
    step = bits_between("t6g32", "t4g32")
    for heavy, light, names in ((qkv, out, "qkv"), (out, qkv, "o")):
        losses = {heavy: 0.9, light: 0.1}
        assert spent_on(kept, step, NONE, losses) == dict.fromkeys(names, "int6")
    assert spent_on(kept, 2 * step, NONE, {qkv: 0.9, out: 0.1}) == dict.fromkeys("qkvo", "int6")
    assert spent_on(kept, -bits_between("t4g32", "t3g32"), NONE, {qkv: 0.9, out: 0.1}) == {"o": "int3"}


def test_a_weight_that_hardly_matters_pays_for_one_that_does() -> None:
    kept, _ = kept_weights()
    qkv, out = kept
    most = bits_between("t6g32", "t4g32") - bits_between("t4g32", "t3g32")
    found = spent_on(kept, most, NONE, {qkv: 1.0, out: 1e-6})
    assert found == dict.fromkeys("qkv", "int6") | {"o": "int3"}
    assert spent_on(kept, most, NONE, {qkv: 1e-6, out: 1.0}) == dict.fromkeys("qkv", "int3") | {"o": "int6"}


def test_where_losses_are_not_known_none_gets_fewer_bits() -> None:
    kept, _ = kept_weights()
    step = bits_between("t6g32", "t4g32")
    assert spent_on(kept, 0, NONE, None) == {}
    assert len(set(spent_on(kept, step, NONE, None).values())) == 1
    assert spent_on(kept, 2 * step, NONE, None) == dict.fromkeys("qkvo", "int6")
    with pytest.raises(CompileError, match="cannot be rounded to so few bits"):
        spent_on(kept, -1, NONE, None)


@given(st.integers(-400, 2000), st.floats(0, 1), st.floats(0, 1))
def test_no_more_bits_are_taken_than_there_are(most: int, first: float, second: float) -> None:
    kept, _ = kept_weights()
    qkv, out = kept
    least = -2 * bits_between("t4g32", "t3g32")
    if most < least:
        with pytest.raises(CompileError, match="so few bits"):
            spent_on(kept, most, NONE, {qkv: first, out: second})
        return
    found = spent_on(kept, most, NONE, {qkv: first, out: second})
    taken = sum(bits_between(f"t{found.get(name, 'int4')[3:]}g32", "t4g32") for name in ("q", "o"))
    assert taken <= most
    assert len({found.get(name) for name in "qkv"}) == 1


def test_what_the_user_asked_for_stays() -> None:
    kept, _ = kept_weights()
    qkv, out = kept
    losses = {qkv: 1.0, out: 0.1}
    assert spent_on(kept, 1e9, Overrides((("v", "int4"),)), losses) == {"o": "int6"}
    assert spent_on(kept, 1e9, NONE, {out: 0.1}) == {"o": "int6"}  # nothing is known of the other
    assert usable(kept, Overrides((("o", "int4"),))) == [qkv]
    assert saved(kept, NONE) == 2 * bits_between("t4g32", "t3g32")
    assert saved(kept, Overrides((("o", "int4"),))) == bits_between("t4g32", "t3g32")


def test_params_that_no_override_can_tell_apart_are_left() -> None:
    kept, _ = kept_weights()
    (qkv, first), (_, second) = kept.items()
    twice = {qkv: first, merged(param("q", 10)): second}
    assert spent_on(twice, 1e9, NONE, None) == {}  # "q" is in both
    odd = {merged(param("onnx::MatMul,1", 10)): second}
    assert spent_on(odd, 1e9, NONE, None) == {}


def test_rows_are_put_together_as_weights_are_merged_now() -> None:
    kept, values = kept_weights()
    both, alone = merged(param("q", 5), param("k", 3)), merged(param("v", 2), encoding="t6g32")
    found = {each.weight: each.encoded() for each in assemblies([both, alone, merged(param("o", 10))], kept)}
    expected = encode(parse_encoding("t4g32"), np.concatenate([values["q"], values["k"]]))
    assert all(np.array_equal(part, found[both].parts[name]) for name, part in expected.parts.items())
    finer_values = encode(parse_encoding("t6g32"), values["v"])
    assert all(np.array_equal(part, found[alone].parts[name]) for name, part in finer_values.parts.items())
    for missing in (merged(param("other", 5)), merged(param("q", 5), encoding="q8g32")):
        with pytest.raises(KeyError):
            assemblies([missing], kept)


def test_what_is_kept_in_files_stays_what_it_was(tmp_path: Path) -> None:
    """Of a weight, its finer encodings too: also where the next weight, such as a head, begins with one of these."""
    values = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    first, second = merged(param("o", 7)), merged(param("head", 7), encoding="t6g32")
    found = [
        (first, rounded(first, values, {"t4g32": [0.5] * 7, "t5g32": [0.1] * 7, "t6g32": [0.0] * 7})),
        (second, rounded(second, 2 * values[::-1], {"t6g32": [0.5] * 7, "q8g32": [0.0] * 7})),
    ]
    parts = RoundedParts(tmp_path, tmp_path, [first, second])
    for weight, choices in found:
        for choice in choices:
            parts.put(weight, choice)
        parts.finish(weight)
    kept = parts.in_order()
    assert list(kept) == [first, second]
    for weight, choices in found:
        assert [each.encoded.encoding for each in kept[weight]] == [each.encoded.encoding for each in choices]
        for stored, choice in zip(kept[weight], choices, strict=True):
            for name, part in choice.encoded.parts.items():
                np.testing.assert_array_equal(stored.encoded.parts[name], part)


def test_weights_of_one_param_are_each_their_own(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((9, 96)).astype(np.float32)
    weights = [merged(Slice(param("a", 9), 0, start, start + 3)) for start in (0, 3, 6)]
    store = calibration.RoundedWeights(tmp_path, lambda name: values)
    for number, weight in enumerate(weights):
        store.add(weight, encode(parse_encoding("t4g32"), values[3 * number : 3 * number + 3]))
    for number, weight in enumerate(weights):
        packed = store.packed[weight]
        assert isinstance(packed.q, Param)
        expected = encode(parse_encoding("t4g32"), values[3 * number : 3 * number + 3])
        np.testing.assert_array_equal(store.load(packed.q.name), expected.parts["q"])


def test_matrices_are_known_by_what_they_are_made_of() -> None:
    one, same, other = (matrices(merged(param(name, 5)))[0].key for name in ("a", "a", "b"))
    assert one == same != other
    scaled = [matrices(merged(Mul(param("a", 1), constant([[float(number)]], "f32"))))[0].key for number in (2, 2, 3)]
    assert scaled[0] == scaled[1] != scaled[2]
    halves = [matrices(merged(Slice(param("a", 8), 0, start, start + 4)))[0].key for start in (0, 4)]
    assert halves[0] != halves[1]
    assert [part.rows for part in matrices(merged(param("a", 5), param("b", 3)))] == [slice(0, 5), slice(5, 8)]


def bits_of(path: Path) -> float:
    artifact = Artifact.open(path)
    try:
        return artifact.manifest.model.bits_per_weight
    finally:
        artifact.close()


def test_a_model_gets_the_bits_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_cache(tmp_path / "cache", monkeypatch)
    model = make_tiny("llama", tmp_path / "llama")
    llmc.compile(model, tmp_path / "plain.so", calibrate="none")
    least = bits_of(tmp_path / "plain.so")
    found = []
    for more in (0.15, 0.8):
        path = tmp_path / f"{more}.so"
        for _ in range(2):  # rounded, and from the cache
            llmc.compile(model, path, bits_per_weight=least + more)
            found.append((bits_of(path), path.read_bytes()))
    (first, a), (_, again), (second, b), (_, b_again) = found
    assert a == again and b == b_again
    # Rows are padded to whole tiles when a weight is taken apart: the tiny model's matrices are few rows.
    assert least < first < second
    for path, other in itertools.pairwise([tmp_path / "plain.so", tmp_path / "0.15.so", tmp_path / "0.8.so"]):
        assert path.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_per_weight": 1.0}, "takes .* at least"),
        ({"bits_per_weight": 0.5}, "1 to 16"),
        ({"bits_per_weight": 5, "calibrate": "none"}, "needs measured inputs"),
        ({"bits_per_weight": 5, "dtype": "int8"}, "needs measured inputs"),
        ({"bits_per_weight": 5, "weights": "none"}, "needs measured inputs"),
        ({"bits_per_weight": 5, "weights": "weights.bin"}, "fits all artifacts"),
    ],
)
def test_what_cannot_be_spent_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "llama")
    with pytest.raises(CompileError, match=message):
        llmc.compile(model, tmp_path / "model.so", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "model.so").exists()


def test_a_model_of_some_size_writes_its_text_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in 8 bits: every id is what that model's logits behind the ids before it give, whatever runs beside."""
    use_own_cache(tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(calibration, "WRITES_FROM", 1)
    monkeypatch.setattr("llmc.compiler.own_text.LENGTH", 24)
    seen: list[np.ndarray] = []
    real = calibration.calibrate

    def watched(graph: object, load: object, texts: list[np.ndarray], *rest: object) -> object:
        seen.extend(texts)
        return real(graph, load, texts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration, "calibrate", watched)
    model = make_tiny("llama", tmp_path / "llama")
    llmc.compile(model, tmp_path / "rounded.so")
    llmc.compile(model, tmp_path / "writer.so", dtype="int8")
    assert {len(text) for text in seen} == {24}
    with Runtime.load(tmp_path / "writer.so") as runtime:
        for text, chances in zip(seen, chances_of(seen, 0), strict=True):
            assert np.array_equal(draw(runtime.forward(text)[:-1], chances[1:]), text[1:])


def test_a_model_that_does_not_run_here_has_its_text_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_cache(tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(calibration, "WRITES_FROM", 1)

    def refuse(*_: object) -> None:
        raise CompileError("no machine")

    monkeypatch.setattr("llmc.compiler.pipeline.written_texts", refuse)
    llmc.compile(make_tiny("llama", tmp_path / "llama"), tmp_path / "model.so")
    assert (tmp_path / "model.so").exists()
