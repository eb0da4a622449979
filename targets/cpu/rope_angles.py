"""Cosines and sines for rotary embedding, by libm: a position times a frequency is far outside of what a short
polynomial covers, and there are only a few thousand a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate
from llmc.targets.cpu.vectors import store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc


@dataclass(frozen=True)
class AnglesProblem(Problem):
    """(positions i32[T], frequencies f32[pairs], out f32[T, 2, pairs]; begin, end): one unit is one token.

    out[t, 0] = scale * cos(positions[t] * frequencies), out[t, 1] = scale * sin(...), the product rounded to f32.
    """

    pairs: int
    scale: float


@dataclass(frozen=True)
class RopeAngles(CpuTemplate[AnglesProblem], name="rope_angles"):
    """least: tokens that are worth a thread."""

    least: int = knob(1, 4, 16, 64, code=False)

    @classmethod
    def default(cls, problem: AnglesProblem, machine: Machine, rows: Rows = ANY_ROWS) -> RopeAngles:
        return cls(least=16)

    def grain(self, problem: AnglesProblem) -> int:
        return self.least

    def build(self, problem: AnglesProblem, machine: Machine) -> PrimFunc:
        return _angles(problem.pairs, problem.scale)


def _angles(pairs: int, scale: float) -> PrimFunc:
    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        positions = b.view(handles["positions"], [b.MANY], "int32")
        frequencies = b.view(handles["frequencies"], [pairs], "float32")
        out = b.view(handles["out"], [b.MANY, 2, pairs], "float32")
        factor = tirx.const(scale, "float32")
        with b.loop(sizes["end"] - sizes["begin"]) as i:
            token = b.let(sizes["begin"] + i)
            position = b.let(positions[token].astype("float32"))
            with b.loop(pairs) as pair:
                angle = b.let(position * frequencies[pair])
                for row, function in enumerate(("cosf", "sinf")):
                    store(out, (token, row, pair), factor * tirx.call_pure_extern("float32", function, angle))

    return b.plain_function([("positions", "int32"), ("frequencies", "float32"), ("out", "float32")], [], body)
