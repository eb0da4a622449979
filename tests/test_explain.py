"""What `llmc explain` says of lowering: which rows each kernel serves, and which rules did not apply."""

from __future__ import annotations

import itertools

import pytest
from small_decoder import small_decoder

from llmc.cli.step_sizes import sizes_text
from llmc.compiler.manifest import explain
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.targets import lower, machine_named
from llmc.targets.kernel import DEFAULT_FORMULA, kernel
from llmc.targets.machine import Machine

Guards = list[tuple[str, int, int | None]]


def explained(quantization: str, target: str) -> dict[str, object]:
    options = CompileOptions(quantization=quantization, target=target, group_size=32, max_step=64)
    compiled = run_pipeline(small_decoder(), options)
    return explain(compiled, lower(compiled.graph, machine_named(target)))


def linear_kernels(quantization: str, target: str) -> list[list[dict[str, object]]]:
    """The kernels of each kind of linear op, without those that only prepare activations."""
    entries = explained(quantization, target)["kernels"]
    assert isinstance(entries, list)
    return [
        [item for item in entry["kernels"] if "linear" in item["kernel"]]
        for entry in entries
        if "linear" in entry["op"]
    ]


@pytest.mark.parametrize(
    ("quantization", "target", "rows"),
    [
        ("int4", "x86-64-v3", ["1", "2-4", "5-8", "9-16", "17 and more"]),
        ("int8", "icelake-server", ["1", "2-4", "5-8", "9-16", "17 and more"]),
        ("none", "x86-64-v3", ["1", "2-4", "5-6", "7-8", "9 and more"]),
        ("none", "icelake-server", ["1", "2-4", "5-8", "9-12", "13 and more"]),
    ],
)
def test_every_row_count_is_served_by_one_kernel_and_explain_says_which(
    quantization: str, target: str, rows: list[str]
) -> None:
    kinds = linear_kernels(quantization, target)
    assert kinds
    for kernels in kinds:
        guards: list[Guards] = [item["when"] for item in kernels]  # type: ignore[misc]
        assert [sizes_text(when) for when in guards] == rows
        bounds = [(low, high) for ((_, low, high),) in guards]
        assert bounds[0][0] <= 1 and bounds[-1][1] is None
        assert all(high is not None and high + 1 == low for (_, high), (low, _) in itertools.pairwise(bounds))
        assert {item["origin"] for item in kernels} == {DEFAULT_FORMULA}


@pytest.mark.parametrize(
    ("quantization", "prompts", "decoding"),
    [
        ("bf16", ["1-128 of prompts", "129 and more of prompts"], ["any that decode"]),
        (
            "int4",
            ["1-128 of prompts", "129 and more of prompts"],
            ["1 that decode", "2-4 that decode", "5-8 that decode", "9-16 that decode", "17 and more that decode"],
        ),
    ],
)
def test_explain_says_which_kind_of_rows_a_kernel_serves(
    quantization: str, prompts: list[str], decoding: list[str]
) -> None:
    first, *_ = linear_kernels(quantization, "sapphirerapids")
    texts = [sizes_text(item["when"]) for item in first]  # type: ignore[arg-type]
    assert [text for text in texts if text.endswith("of prompts")] == prompts
    assert [text for text in texts if text.endswith("that decode")] == decoding
    assert len(texts) == len(prompts) + len(decoding)


def test_parameters_are_in_the_order_of_the_template_without_what_is_off() -> None:
    for kernels in linear_kernels("int4", "x86-64-v3"):
        for item in kernels:
            parameters = item["parameters"]
            assert isinstance(parameters, list)
            names = [text.partition("=")[0] for text in parameters]
            assert names[:2] == ["n", "k"]
            fused = {"gated", "activation", "bias", "residual"}
            problem = [name for name in names[2:] if name not in fused][:3]
            assert problem == ["bits", "group", "symmetric"]
            assert max(map(names.index, problem)) == 4 + len(fused & set(names)), "knobs come behind the problem"
            assert not {"bias=False", "activation=none", "residual=False"} & set(parameters)


def test_a_rule_of_lower_priority_is_no_refusal() -> None:
    for quantization in ("int4", "none"):
        entries = explained(quantization, "x86-64-v3")["kernels"]
        reasons = [why for entry in entries for _, why in entry["rejected"]]  # type: ignore[attr-defined]
        assert not [why for why in reasons if "faster" in why]
    rejected = dict(pair for entry in entries for pair in entry["rejected"])  # type: ignore[attr-defined]
    assert rejected["linear_quantized"] == "the weight is not quantized"


def test_switches_that_are_on_are_words() -> None:
    def template(machine: Machine, *, n: int, gated: bool = False, window: int = 0, kind: str = "") -> None: ...

    def text(**params: int | bool | str) -> list[str]:
        return kernel(template, "", **params).parameters()  # type: ignore[arg-type]

    assert text(window=0, n=3, gated=False, kind="none") == ["n=3"]
    assert text(window=5, n=3, gated=True, kind="silu") == ["n=3", "gated", "window=5", "kind=silu"]


@pytest.mark.parametrize(
    ("when", "text"),
    [
        ([], ""),
        ([("T", 1, 1)], "1"),
        ([("R", 2, 4)], "2-4"),
        ([("S", 17, None)], "17 and more"),
        ([("SPLITS", 2, None)], "splits 2 and more"),
        ([("T", 1, 8), ("batch", 3, 3)], "1-8, batch 3"),
    ],
)
def test_ranges_of_sizes_are_said_as_people_say_them(when: Guards, text: str) -> None:
    assert sizes_text(when) == text
