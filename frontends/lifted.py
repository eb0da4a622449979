"""The result of every frontend: a graph, its weights and its text side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError

GENERATE, ENCODE, RUN = TASKS = ("generate", "encode", "run")


class WeightSource(Protocol):
    """Named arrays that are read when asked for."""

    @property
    def names(self) -> Iterable[str]:
        """Every name that `load` takes."""

    def dtype(self, name: str) -> str:
        """The IR dtype of a weight, without reading it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""

    def load(self, name: str) -> Array:
        """The weight's values; callers must not write to them."""


@dataclass(frozen=True)
class Text:
    """What turns text into tokens. facts: the manifest's `tokenizer`; generation: its sampling defaults.

    files: by name, such as `tokenizer.json`. notes: for the user to read.
    """

    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    facts: dict[str, object] | None = None
    generation: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        """The tokenizer as the library `tokenizers` reads it, which cuts nothing and pads nothing; None without one."""
        stored = self.files.get("tokenizer.json")
        if stored is None:
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(stored.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


@dataclass(frozen=True)
class Lifted:
    """A model as a graph, with its weights and its text side.

    task says what the graph is:
    - "generate": a decoder. Inputs `ids` and `positions` i32[1, S], output `logits` f32[1, S, vocab].
    - "encode": text in, anything out. Inputs `ids`, `positions` and, where the model has them, `token_types`, all
      i32[1, S]: one sequence without padding. Outputs by any names, each with S in its shape (a row a token) or not (a
      row a sequence).
    - "run": any graph, with the model's own inputs and outputs.
    encoder: for "encode", the manifest's `encoder` (see docs/architecture.md). config: the model's own settings.
    notes: for the user to read, such as settings that have no effect here.
    least: schemes (int4 to int8) by names of params that the source has rounded in a way that is not kept: they are
    rounded anew, and no coarser than that, unless the user asks for it by name.
    otherwise: of a text model whose file does not say whether it is a decoder. It is lifted as one; if some attention
    of it sees later tokens, `settled` of `compiler/pipeline.py` takes the model that this function returns instead.
    """

    graph: Graph
    weights: WeightSource
    name: str
    architecture: str
    parameters: int
    vocab_size: int
    layers: int
    max_positions: int
    max_context: int
    text: Text
    notes: tuple[str, ...] = ()
    config: dict[str, object] = field(default_factory=dict, repr=False)
    task: str = GENERATE
    encoder: dict[str, object] | None = None
    least: Mapping[str, str] = field(default_factory=dict, repr=False)
    otherwise: Callable[[], Lifted] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise FrontendError(f"unknown task {self.task!r}; known: {', '.join(TASKS)}")

    def load(self, name: str) -> Array:
        """A param's values, as `evaluate` wants them."""
        return self.weights.load(name)
