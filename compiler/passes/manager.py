"""Passes and how they run: textual pipelines, verification after each, timings, hit counts and refusals.

A pass is a frozen dataclass whose fields are its options; `run(graph, report)` returns a new graph that is valid and
means the same. Its class attribute `name` is what a pipeline's text says: `canonicalize,merge-projections{qkv=false}`.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.verify import verify
from llmc.errors import CompileError, IRError

PASSES: dict[str, type[Pass]] = {}


@dataclass
class Report:
    """What one run of a pass did: `hits` by kind of rewrite, `refusals` (what, why), seconds, op counts."""

    name: str = ""
    hits: Counter[str] = field(default_factory=Counter)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    ops_before: int = 0
    ops_after: int = 0

    def hit(self, kind: str) -> None:
        """Count one rewrite."""
        self.hits[kind] += 1

    def refuse(self, what: Op | str, reason: str) -> None:
        """Note a near-miss and why it was not rewritten."""
        text = what if isinstance(what, str) else f"{what.name} : {what.type}"
        self.refusals.append((text, reason))


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    exact: whether results stay as they are but for the order of sums. moves: how far a pass that is not exact may move
    an output, relative to its largest value, besides what it rounds to encodings (see `check_rounding`).
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    moves: ClassVar[float] = 0.0

    def __init_subclass__(cls, name: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            PASSES[name] = cls

    def run(self, graph: Graph, report: Report) -> Graph:
        """A graph that means the same; counts and refusals go into the report."""
        raise CompileError(f"pass {self.name} has no body")

    def __str__(self) -> str:
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        options = ",".join(f"{k.replace('_', '-')}={_text(v)}" for k, v in changed.items())
        return f"{self.name}{{{options}}}" if options else self.name


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_pipeline(text: str) -> list[Pass]:
    """Passes from `name{option=value,...},name,...`; CompileError names an unknown pass or option."""
    passes = []
    for item in _split(text):
        name, _, rest = item.partition("{")
        cls = PASSES.get(name.strip())
        if cls is None:
            raise CompileError(f"unknown pass {name.strip()!r}; known: {', '.join(sorted(PASSES))}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        options: dict[str, object] = {}
        for pair in filter(None, rest.rstrip("}").split(",")):
            key, _, value = pair.partition("=")
            option = fields.get(key.strip().replace("-", "_"))
            if option is None:
                raise CompileError(f"pass {name} has no option {key.strip()!r}; it has: {', '.join(fields) or 'none'}")
            options[option.name] = _convert(value.strip(), option.default)
        passes.append(cls(**options))
    return passes


def _split(text: str) -> list[str]:
    items, depth, current = [], 0, ""
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            items.append(current)
            current = ""
        else:
            current += character
    return [item.strip() for item in (*items, current) if item.strip()]


def _convert(text: str, default: object) -> object:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise CompileError(f"expected true or false, found {text!r}")
        return text == "true"
    return type(default)(text) if isinstance(default, (int, float)) else text


Observer = Callable[[Pass, Graph, Graph, Report], None]


def run_passes(graph: Graph, passes: Sequence[Pass], observers: Sequence[Observer] = ()) -> tuple[Graph, list[Report]]:
    """Run passes in order, verify after each, and tell the observers (pass, before, after, report)."""
    reports = []
    for item in passes:
        report = Report(item.name, ops_before=len(graph.ops))
        start = time.perf_counter()
        after = item.run(graph, report)
        report.seconds = time.perf_counter() - start
        try:
            verify(after)
        except IRError as error:
            raise CompileError(f"pass {item} broke the graph: {error}") from error
        report.ops_after = len(after.ops)
        reports.append(report)
        for observer in observers:
            observer(item, graph, after, report)
        graph = after
    return graph, reports
