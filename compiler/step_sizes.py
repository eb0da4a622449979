"""How large a step may be: its tokens, and the greatest value of every size, which memory is planned for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.compiler.ir.attention import MOST_PARTS
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import KV
from llmc.errors import CompileError

if TYPE_CHECKING:
    from llmc.compiler.options import CompileOptions

GENERATE, ENCODE, RUN = "generate", "encode", "run"  # kinds of graphs: `frontends/lifted.py`


def step_limit(graph: Graph, options: CompileOptions, max_context: int, task: str = GENERATE) -> int:
    """Tokens a step at most: whole sequences where there is no cache that is kept; 1 where there are no tokens."""
    if task == RUN:
        return 1
    if task == ENCODE and any(value.name == "starts" for value in graph.inputs):
        return max(options.tokens_a_step(is_encoder=True), max_context)
    cached = any(isinstance(value.type, KV) for value in graph.inputs)
    return min(options.tokens_a_step(is_encoder=False), max_context) if cached else max_context


def largest_sizes(step: int, max_context: int) -> dict[str, int]:
    """The greatest value of every symbol of a step of at most `step` tokens, for planning memory."""
    return {
        "T": step, "S": step, "R": step, "Q": step, "B": step,
        "M": -(-max_context // PAGE), "SPLITS": MOST_PARTS, "PROMPT": 1, "ADAPTED": step,
    }  # fmt: skip


def greatest(graph: Graph, step: int, max_context: int, task: str) -> dict[str, int]:
    """The greatest value of every symbol: of the step's own, or of the names in a graph of any kind."""
    if task != RUN:
        return largest_sizes(step, max_context)
    found: dict[str, int] = {}
    for symbol in graph.symbols:
        if symbol.high is None:
            raise CompileError(f"the size {symbol.name!r} has no greatest value: give --max-dim {symbol.name}=N")
        found[symbol.name] = max(symbol.high, found.get(symbol.name, 0))
    return found
