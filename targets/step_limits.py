"""What a step is compiled for, as the artifact looks at it before it runs (`runtime/csrc/step_check.h`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmc.compiler.ir.attention import TILE
from llmc.compiler.ir.dims import Dim, symbols_of
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.interface import output_values, size_names
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import KV

if TYPE_CHECKING:
    from llmc.targets.lowering import Program

# Symbols of the step, as runtime/csrc/step.h has them; "S" is the length of a whole sequence in a stateless graph.
SIZES = {
    "T": "LLMC_TOKENS",
    "S": "LLMC_TOKENS",
    "Q": "LLMC_TILES",
    "B": "LLMC_SEQUENCES",
    "M": "LLMC_PAGES",
    "R": "LLMC_ROWS",
    "SPLITS": "LLMC_SPLITS",
    "PROMPT": "LLMC_PROMPT",
    "ADAPTED": "LLMC_ADAPTED",
}
_COUNT = len(set(SIZES.values()))
INPUTS = ("ids", "positions", "token_types", "slots", "tiles", "block_table", "rows", "starts", "lengths", "adapters")

_BROKEN = "the step was called with"
STEP_FAILURES = (
    f"{_BROKEN} a size that is negative, or larger than the artifact was compiled for",
    f"{_BROKEN} a pointer that is NULL or not aligned",
    f"{_BROKEN} less memory than it needs: the arena or the cache is too small",
    f"{_BROKEN} a token id that is not in the vocabulary",
    f"{_BROKEN} a position that is not below the context",
    f"{_BROKEN} a slot that is not in the cache",
    f"{_BROKEN} a page in its block table that is not in the cache",
    f"{_BROKEN} a row of logits that is none of its tokens",
    f"{_BROKEN} starts that are not those of whole sequences within the context",
    f"{_BROKEN} query tiles that are not rows of one sequence each, or not all of them",
    f"{_BROKEN} numbers of adapters that there are none of",
)
"""What `LLMC_WRONG_*` of runtime/csrc/step.h mean, from 1 on."""


def failures_of(program: Program) -> list[str]:
    """What a step that returns 1, 2, ... has found wrong, in that order: with what it was given, then while it ran."""
    found = dict.fromkeys(call.failure for lowered in program.ops for call in lowered.calls if call.failure)
    return list(dict.fromkeys([*STEP_FAILURES, *found]))


@dataclass(frozen=True)
class StepLimits:
    """sizes: the greatest value of every symbol, which memory is planned for. vocabulary, context: token ids and
    positions are below these; no sequence has more tokens than `context`."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 1 << 31
    context: int = 1 << 31


def adapter_tables(graph: Graph) -> list[Input]:
    """The inputs that are tables of adapters, in the order in which a step has them."""
    return [value for value in graph.inputs if value.name.startswith("adapter.")]


def adapter_count(graph: Graph) -> int:
    """How many adapters the tables have entries for, besides none."""
    entries = [value.shape[0] for value in adapter_tables(graph)]
    return int(entries[0]) - 1 if entries else 0  # type: ignore[arg-type]  # tables have fixed sizes


def limits_source(graph: Graph, task: str, limits: StepLimits, arena_bytes: int, has_weights: bool) -> str:
    """The C definition of a step's `LlmcLimits`. graph: the one that is compiled, after all passes."""
    arrays = task == "run"
    names = size_names(graph) if arrays else []
    low = {name: min(item.low for item in graph.symbols if item.name == name) for name in names}
    plain = [value for value in graph.inputs if not isinstance(value.type, KV)]
    tables = adapter_tables(graph) if not arrays else []
    least, most = _sizes(graph, limits) if not arrays else (["INT64_MIN"] * _COUNT, ["INT64_MAX"] * _COUNT)
    facts = {
        "least": f"{{{', '.join(least)}}}",
        "most": f"{{{', '.join(most)}}}",
        "arena_bytes": arena_bytes,
        "vocabulary": limits.vocabulary,
        "context": limits.context,
        "page": PAGE,
        "tile": TILE,
        "caches": 2 * (len(graph.inputs) - len(plain)),
        "inputs": len(plain) if arrays else 0,
        "outputs": 0 if task == "generate" else len(output_values(graph)),
        "dims": len(names),
        "least_dims": "least_dims",
        "most_dims": "most_dims",
        "weights": int(has_weights),
        "logits": int(task == "generate"),
        **({} if arrays else {value.name: 1 for value in plain if value.name in INPUTS}),
        **({"adapter_count": adapter_count(graph), "adapter_tables": len(tables)} if tables else {}),
    }
    dims = [
        f"static const int64_t {name}[] = {{{', '.join(f'INT64_C({value})' for value in values) or '0'}}};"
        for name, values in (
            ("least_dims", [low[name] for name in names]),
            ("most_dims", [limits.sizes[name] for name in names]),
        )
    ]
    fields = "\n".join(f"    .{name} = {value}," for name, value in facts.items())
    return "\n".join([*dims, f"static const LlmcLimits limits = {{\n{fields}\n}};"])


def _sizes(graph: Graph, limits: StepLimits) -> tuple[list[str], list[str]]:
    """The least and the greatest value of each of `LlmcStep.sizes`. What no input has a size of may be 0; so may the
    rows of which logits are wanted."""
    used = {
        item.name
        for value in graph.inputs
        if not isinstance(value.type, KV)
        for dim in value.shape
        if isinstance(dim, Dim)
        for item in symbols_of(dim)
    }
    slots = list(dict.fromkeys(SIZES.values()))
    least, most = dict.fromkeys(slots, 0), dict.fromkeys(slots, 0)
    for name, slot in SIZES.items():
        if name in used - {"R"} or name == "SPLITS":
            least[slot] = 1
        most[slot] = max(most[slot], limits.sizes.get(name, 0))
    most[SIZES["PROMPT"]] = 1
    most[SIZES["ADAPTED"]] = most[SIZES["T"]] if "adapters" in {value.name for value in graph.inputs} else 0
    return [f"INT64_C({least[slot]})" for slot in slots], [f"INT64_C({most[slot]})" for slot in slots]
