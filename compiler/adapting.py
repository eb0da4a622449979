"""Room for adapters that are loaded at run time (LoRA): the last change of a graph before kernels are chosen.

It comes behind the rounding of weights, so that nothing of a model is rounded otherwise because of it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.verify import verify
from llmc.compiler.passes.adapt_linears import AdapterTable as AdapterTable
from llmc.compiler.passes.adapt_linears import AdaptLinears
from llmc.compiler.passes.manager import Observer, Report
from llmc.compiler.smoothing import ScaledWeights
from llmc.errors import CompileError

if TYPE_CHECKING:
    from llmc.compiler.options import CompileOptions
    from llmc.compiler.pipeline import Compiled
    from llmc.frontends.lifted import Lifted


def check_room(task: str, graph: Graph, options: CompileOptions) -> None:
    """CompileError where the options ask for adapters and the graph, after all passes, has no tokens of sequences with
    a cache: said before weights are rounded, which takes long."""
    paged = any(value.name == "block_table" for value in graph.inputs)
    if options.adapters and not (paged and task == "generate"):
        raise CompileError("--adapters needs a model that continues texts and keeps a cache, which this one does not")


def make_room(lifted: Lifted, compiled: Compiled, options: CompileOptions, observers: Sequence[Observer]) -> None:
    """Changes the graph of `compiled`, where the options ask for it, and notes down what its tables are for.
    CompileError as `check_room`, and for a graph without a linear op that can be adapted."""
    if not options.adapters:
        return
    check_room(lifted.task, compiled.graph, options)
    item, before, start = AdaptLinears(options.adapters, options.adapter_rank), compiled.graph, time.perf_counter()
    report = Report(item.name, ops_before=len(before.ops))
    after, tables = item.adapted(before, report, dict(compiled.originals))
    verify(after)
    report.seconds, report.ops_after = time.perf_counter() - start, len(after.ops)
    compiled.graph, compiled.reports = after, [*compiled.reports, report]
    compiled.adapters = tuple(_with_powers(table, lifted) for table in tables)
    for observer in observers:
        observer(item, before, after, report)


def _with_powers(table: AdapterTable, lifted: Lifted) -> AdapterTable:
    """The table with what `smoothing` has divided the op's inputs by."""
    if not isinstance(lifted.weights, ScaledWeights):
        return table
    found = {lifted.weights.powers(f"{part.module}.weight") for part in table.parts}
    if len(found) > 1:
        raise CompileError(f"--adapters: the inputs of {table.parts[0].module} are divided by several numbers")
    return dataclasses.replace(table, powers=found.pop())


def adapter_facts(tables: Sequence[AdapterTable], options: CompileOptions) -> dict[str, object]:
    """What a manifest says of them; see `runtime/manifest.py`."""
    return {
        "count": options.adapters,
        "rank": options.adapter_rank,
        "tables": [
            {
                "inputs": table.inputs,
                "outputs": table.outputs,
                "parts": [
                    {"module": part.module, "outputs": part.outputs, "rows": [list(run) for run in part.rows]}
                    for part in table.parts
                ],
                **({"powers": list(table.powers)} if any(table.powers) else {}),
            }
            for table in tables
        ],
    }  # fmt: skip
