"""Where attention's queries come from: columns of rows that a linear op wrote, normalised and turned as they are read.

A unit of attention reads each of its queries once, so doing this there saves writing and reading them once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.targets.cpu.builder import index, let
from llmc.targets.cpu.rope_append import Rotation
from llmc.targets.kernel import Param

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr


@dataclass(frozen=True)
class QueryRows:
    """Heads of `head_dim` channels, side by side from column `offset` of rows of `stride` numbers on.

    pairs, interleaved, norm_eps (None: no norm) and norm_offset: what happens to a head, as in `rope_append`.
    """

    stride: int
    offset: int = 0
    pairs: int = 0
    interleaved: bool = False
    norm_eps: float | None = None
    norm_offset: float = 0.0

    def params(self) -> tuple[Param, ...]:
        """Its fields as a kernel's parameter, which `QueryRows(*parameter)` takes."""
        return (self.stride, self.offset, self.pairs, self.interleaved, self.norm_eps, self.norm_offset)

    @property
    def changed(self) -> bool:
        """Whether queries differ from what lies in memory."""
        return bool(self.pairs) or self.norm_eps is not None

    def pointers(self) -> list[tuple[str, str]]:
        """The arguments that it adds to a kernel: angles f32[T, 2, pairs], query_weight f32[head_dim]."""
        angles, weight = [("angles", "float32")], [("query_weight", "float32")]
        return angles * bool(self.pairs) + weight * (self.norm_eps is not None)

    def read(
        self, a: SimpleNamespace, lanes: int, head_dim: int, token: Expr, head: Expr, turned: Buffer
    ) -> tuple[Buffer, Expr]:
        """(buffer, first element) of a token's query: `turned` [head_dim], filled with it, or where it lies."""
        start = let(token * self.stride + head * head_dim + self.offset)
        if not self.changed:
            return a.query, start
        style = Rotation(lanes, head_dim, self.pairs, self.interleaved, self.norm_eps, self.norm_offset)
        weight = a.query_weight if self.norm_eps is not None else None
        turn = (a.angles, let(token * (2 * self.pairs))) if self.pairs else None
        style.head(a.query, start, weight, turn, turned, index(0))
        return turned, index(0)
