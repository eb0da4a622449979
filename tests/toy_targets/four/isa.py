"""Vectors of four lanes, bytes multiplied as any machine can: no intrinsic of one is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu.group_sums import Sums, WideSums
from llmc.targets.cpu.layouts import WeightTiles
from llmc.targets.cpu.vector_isa import Blocking, VectorIsa
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr

WEIGHT_TILES = WeightTiles(16, signed_bytes=True)  # as if there were wider vectors on other machines


@dataclass(frozen=True)
class FourLanes(VectorIsa):
    """Four slices make a tile of weights."""

    def sums(self, bits: int, group: int) -> Sums:
        return WideSums()

    def dot(self, acc: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        from tvm import tirx

        products = weights.astype("int32x16") * activations.astype("int32x16")
        for first in range(4):
            lanes = [tirx.const(lane, "int32") for lane in range(first, 16, 4)]
            acc = acc + tirx.Shuffle([products], lanes)
        return acc


def missing(machine: Machine) -> tuple[str, ...]:
    return ()


def isa_for(machine: Machine) -> FourLanes:
    return FourLanes("four", 4, 16, None, Blocking(2, 2, 32), Blocking(2, 2, 32), "x")
