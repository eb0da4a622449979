"""Masks over the places of a text's queries and keys, and their numbers for every pair and every length."""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.passes.pair_functions import PairReader
from llmc.compiler.passes.points import Point
from llmc.compiler.passes.probe import Probe


class Pairs:
    """Queries [S, 1], keys [1, S] and the length [1, 1] of texts of at most `most` tokens."""

    def __init__(self, most: int = 9) -> None:
        self.most = most
        self.size = symbol("S", 1, most)
        at = s.Iota(self.size)
        self.at = at
        self.q, self.k = s.Reshape(at, (self.size, 1)), s.Reshape(at, (1, self.size))
        self.length = s.Reshape(s.Slice(s.Iota(self.size + 1), 0, self.size, self.size + 1), (1, 1))
        self.back = e.Sub(self.q, self.k)
        self.causal = e.LessEqual(self.k, self.q)
        self.positions = Input("positions", Tensor((1, self.size), "i32"))
        self.token = Input("x", Tensor((self.size, self.size), "f32"))

    def reader(self, *values: Value) -> PairReader:
        """Reads values of a graph."""
        ids = Input("ids", Tensor((1, self.size), "i32"))
        outputs = tuple((f"out{i}", value) for i, value in enumerate(values))
        probe = Probe(Graph("g", (ids, self.positions, self.token), outputs))
        return PairReader(probe, self.most, size=self.size)

    def numbers(self, reader: PairReader, value: Value, length: int) -> Array:
        """A value for a text of some length, as an evaluator has it: [..., Q, K]."""
        (found,) = reader.probe.evaluate([value], length, exact=False)
        return np.broadcast_to(found, (*found.shape[:-2], length, length))

    def read(self, reader: PairReader, point: Point, length: int, by_distance: bool = False) -> Array:
        """A point for all pairs of a text of some length, [..., Q, K]; by_distance: of their distance alone."""
        at = np.arange(length)
        queries, keys = at[:, None], at[None]
        if by_distance:
            queries, keys = np.zeros((1, 1), np.int64), keys - queries
        found = reader.evaluate(point, queries, keys, np.full((1, 1), length))
        rank = len(point.shape)
        found = np.broadcast_to(found, (length, length, *point.shape))
        found = found.reshape(length, length, *point.shape[: max(0, rank - 2)])
        return np.moveaxis(found, (0, 1), (-2, -1))
