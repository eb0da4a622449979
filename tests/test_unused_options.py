"""Options that change nothing about a model are named; those that do are not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from small_decoder import small_decoder

from llmc.compiler.options import CompileOptions, parse_dims
from llmc.compiler.passes.manager import parse_pipeline, run_passes
from llmc.compiler.pipeline import pipeline_text
from llmc.compiler.unused import unused
from llmc.errors import CompileError

# (options, the head's weight, whether the model is one of texts, tokens of a step, what is said)
IDLE: dict[str, tuple[Mapping[str, object], str, bool, int, str]] = {
    "minimums of int8": ({"quantization": "int8", "symmetric": False}, "head", True, 512, "--asymmetric"),
    "minimums of none": ({"quantization": "none", "symmetric": False}, "head", True, 512, "--asymmetric"),
    "groups of none": ({"quantization": "none", "group_size": 32}, "head", True, 512, "--group-size"),
    "text for floats": ({"quantization": "bf16", "calibrate": "self"}, "head", True, 512, "--calibrate"),
    "a tied head": ({"head": "int8"}, "embed", True, 512, "--head has no effect: the head is the embedding's"),
    "a head that has its own": ({"head": "int8", "overrides": (("head", "int4"),)}, "head", True, 512, "--head"),
    "tokens of arrays": ({"max_context": 64}, "head", False, 1, "--max-context"),
    "steps of arrays": ({"max_step": 64}, "head", False, 1, "--max-step has no effect: it is for models of texts"),
    "steps of whole texts": ({"max_step": 64}, "head", True, 128, "--max-step has no effect below 128"),
}


def said(given: Mapping[str, object], head: str, is_text: bool, step: int) -> list[str]:
    options = CompileOptions(**given)  # type: ignore[arg-type]
    _, reports = run_passes(small_decoder(head), parse_pipeline(pipeline_text(options)))
    return unused(options, is_text, reports, step)


@pytest.mark.parametrize("name", IDLE)
def test_an_option_without_an_effect_is_named(name: str) -> None:
    given, head, is_text, step, expected = IDLE[name]
    (line,) = said(given, head, is_text, step)
    assert line.startswith(expected) and "has no effect" in line and "\n" not in line


def test_a_table_that_has_another_scheme() -> None:
    """An override comes before --embedding, which does nothing then but for the head that shares the table."""
    assert said({"embedding": "int8"}, "embed", True, 512) == []
    graph = small_decoder("head").replace_outputs([("logits", small_decoder("head").inputs[1])])
    options = CompileOptions(quantization="int8", embedding="int4", head="int4")
    _, reports = run_passes(graph, parse_pipeline(pipeline_text(options, "run")))
    lines = unused(options, False, reports, 1)
    assert [line.split()[0] for line in lines] == ["--head", "--embedding"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"symmetric": False},
        {"quantization": "none", "embedding": "int4", "symmetric": False, "group_size": 32},
        {"quantization": "none", "overrides": (("down", "int4"),), "symmetric": False, "calibrate": "self"},
        {"quantization": "int8", "group_size": 32, "calibrate": "self", "head": "none", "embedding": "f16"},
        {"quantization": "none", "calibrate": "none"},
        {"max_step": 64, "max_context": 64},
    ],
    ids=str,
)
def test_an_option_with_an_effect_is_not(given: Mapping[str, object]) -> None:
    assert said(given, "head", True, 64) == []


def test_a_size_is_given_once() -> None:
    assert parse_dims(["a=1", "b=1"], "--dim") == (("a", 1), ("b", 1))
    with pytest.raises(CompileError, match="--max-dim a is given twice"):
        parse_dims(["a=1", " a=2"], "--max-dim")
