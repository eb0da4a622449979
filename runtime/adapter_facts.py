"""What an artifact says of adapters that it has room for (LoRA): which tables its steps read, and what they are for.

"adapters": null | {"count": adapters at a time, "rank": the greatest of one,
                    "tables": [{"inputs": k, "outputs": n, "powers": missing | [k integers],
                                "parts": [{"module", "outputs": of the module, "rows": [[first, behind last], ...]}]}]}
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.runtime.json_reader import Reader, refuse

_MOST = 1 << 31
_MOST_PARTS = 1 << 12
_MOST_POWER = 64


@dataclass(frozen=True)
class PartFacts:
    """Columns of an op that one module makes. outputs: of the module. rows: which of these the columns are, in order,
    as runs (first, behind the last)."""

    module: str
    outputs: int
    rows: tuple[tuple[int, int], ...]

    @property
    def columns(self) -> int:
        """How many columns these are."""
        return sum(end - first for first, end in self.rows)


@dataclass(frozen=True)
class TableFacts:
    """What an adapter may add to one linear op. powers: its inputs are the module's divided by 2^powers; empty: they
    are the module's own."""

    inputs: int
    outputs: int
    parts: tuple[PartFacts, ...]
    powers: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterFacts:
    """count: adapters that may be loaded at a time. rank: the greatest rank of one."""

    count: int
    rank: int
    tables: tuple[TableFacts, ...]

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every module that can be adapted."""
        return {part.module: (table.inputs, part.outputs) for table in self.tables for part in table.parts}


def parse_adapters(reader: Reader) -> AdapterFacts:
    """The facts, or an `ArtifactError` that names the first field which is wrong."""
    return AdapterFacts(
        reader.integer("count", 1, 1 << 16),
        reader.integer("rank", 1, 1 << 16),
        tuple(_table(each) for each in reader.children("tables")),
    )


def _table(reader: Reader) -> TableFacts:
    inputs, outputs = reader.integer("inputs", 1, _MOST), reader.integer("outputs", 1, _MOST)
    parts = tuple(_part(each) for each in reader.children("parts"))
    powers = reader.array("powers", [])
    if not 1 <= len(parts) <= _MOST_PARTS or sum(part.columns for part in parts) != outputs:
        raise refuse(f"{reader.path}.parts", f"parts of {outputs} columns in all", reader.value.get("parts"))
    if powers and (len(powers) != inputs or not all(type(each) is int and abs(each) <= _MOST_POWER for each in powers)):
        raise refuse(f"{reader.path}.powers", f"{inputs} small integers", powers)
    return TableFacts(inputs, outputs, parts, tuple(int(each) for each in powers))  # type: ignore[call-overload]


def _part(reader: Reader) -> PartFacts:
    outputs = reader.integer("outputs", 1, _MOST)
    runs: list[tuple[int, int]] = []
    for run in reader.array("rows"):
        if not isinstance(run, list) or len(run) != 2 or not all(type(each) is int for each in run):
            raise refuse(f"{reader.path}.rows", "pairs of rows", run)
        first, end = run
        if not 0 <= first < end <= outputs:
            raise refuse(f"{reader.path}.rows", f"rows below {outputs}", run)
        runs.append((first, end))
    return PartFacts(reader.string("module"), outputs, tuple(runs))
