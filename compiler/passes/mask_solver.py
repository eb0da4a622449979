"""Masks of whole numbers, proved by a solver for every query, key and length below the context.

Conditions on places with quotients, remainders, comparisons and choices are said in integer arithmetic, where each
number must fit the dtype that the source computes it in. What is left is one question to Z3 (de Moura and Bjorner
2008): is there a query and a key that the mask treats differently from `llm.attention`? No is a proof; a counterexample
refuses, and so does a question that takes too long.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import z3

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.structural import Broadcast, Reshape, Slice, Transpose
from llmc.compiler.ir.types import FLOATS, INTEGERS, NUMPY_DTYPES
from llmc.compiler.passes.masks import FURTHEST_SHIFT, HIDDEN, Mask, Unrecognised
from llmc.compiler.passes.pair_functions import PairReader
from llmc.compiler.passes.points import ZERO, Applied, Known, Linear, Place, Point
from llmc.errors import IRError

EFFORT = 2_000_000  # of one question, in steps of the solver (seconds would differ from machine to machine)
_MOST_CASES = 16  # different numbers that a mask may add
_UNLIKE = "its mask is not decided by the distance of key and query alone"
_MOVES = (Reshape, Broadcast, Transpose, Slice)
Cases = dict[float, z3.BoolRef]
_COMPARED: dict[type[Op], Callable[[z3.ArithRef, z3.ArithRef], z3.BoolRef]] = {
    e.Equal: operator.eq,
    e.NotEqual: operator.ne,
    e.Less: operator.lt,
    e.LessEqual: operator.le,
    e.Greater: operator.gt,
    e.GreaterEqual: operator.ge,
}
_ARITHMETIC: dict[type[Op], Callable[..., z3.ArithRef]] = {
    e.Add: operator.add,
    e.Sub: operator.sub,
    e.Mul: operator.mul,
    e.Neg: operator.neg,
    e.Abs: lambda x: z3.If(x >= 0, x, -x),
    e.Maximum: lambda x, y: z3.If(x >= y, x, y),
    e.Minimum: lambda x, y: z3.If(x <= y, x, y),
}


def proved_mask(reader: PairReader, bias: Point, chosen: Point | None, factor: Point | None, exact_shift: bool) -> Mask:
    """The causal mask or window that a bias over pairs is, for all of them; Unrecognised with a counterexample.

    chosen: where the product counts, as `score_chain.Apart` has it; a `factor` is not followed.
    exact_shift: what is added to all keys of a query counts (attention with sinks).
    """
    if factor is not None or any(math.prod(p.shape) != 1 for p in (bias, chosen) if p is not None):
        raise Unrecognised(f"{_UNLIKE}, and {reader.most} tokens are too many to look at every pair")
    terms = _Terms(reader)
    hidden, added = terms.is_hidden(bias)
    if exact_shift and added:
        raise Unrecognised("its mask adds a number to all keys of a query, which counts beside sinks")
    if chosen is not None and terms.possible(z3.And(z3.Not(hidden), z3.Not(terms.truth(chosen)))):
        raise Unrecognised("t.where puts a number that does not hide the key in place of a score")
    distance = terms.key - terms.query
    ahead = terms.possible(z3.And(z3.Not(hidden), distance > 0))
    window = _window(reader, terms, hidden)
    shown = z3.BoolVal(True) if ahead else distance <= 0
    if window:
        shown = z3.And(shown, distance < window, distance > -window)
    if terms.possible(shown == hidden):
        raise Unrecognised(f"{_UNLIKE}: {terms.example()}")
    return Mask(not ahead, window, None)


def _window(reader: PairReader, terms: _Terms, hidden: z3.BoolRef) -> int:
    """How near the nearest key is that the last query does not see; 0: it sees all before it."""
    longest = z3.And(terms.query == reader.most - 1, terms.length == reader.most)
    if not terms.possible(z3.And(longest, hidden)):
        return 0

    def hides(distance: int) -> bool:
        """Whether it does not see one of those so near or nearer."""
        return terms.possible(z3.And(longest, hidden, terms.query - terms.key <= distance))

    return bisect_left(range(reader.most), True, key=hides)


@dataclass
class _Terms:
    """Points as terms over the places of a query and a key and the length of their sequence."""

    reader: PairReader
    query: z3.ArithRef = field(default_factory=lambda: z3.Int("query"))
    key: z3.ArithRef = field(default_factory=lambda: z3.Int("key"))
    length: z3.ArithRef = field(default_factory=lambda: z3.Int("length"))

    def __post_init__(self) -> None:
        self.solver = z3.Solver()
        self.solver.set("rlimit", EFFORT)
        places = (self.query >= 0, self.query < self.length, self.key >= 0, self.key < self.length)
        self.solver.add(*places, self.length <= self.reader.most)
        self.model: z3.ModelRef | None = None

    def possible(self, condition: z3.BoolRef) -> bool:
        """Whether a condition holds anywhere; Unrecognised where that cannot be settled in time."""
        self.solver.push()
        self.solver.add(condition)
        answer = self.solver.check()
        self.model = self.solver.model() if answer == z3.sat else None
        self.solver.pop()
        if answer == z3.unknown:
            raise Unrecognised(f"{_UNLIKE}, and what it hides could not be settled")
        return bool(answer == z3.sat)

    def example(self) -> str:
        """The place that the last possible condition holds at."""
        assert self.model is not None
        query, key, size = (self.model.eval(x, model_completion=True) for x in (self.query, self.key, self.length))
        return f"the query at {query} and the key at {key} of {size} tokens show it"

    def is_hidden(self, bias: Point) -> tuple[z3.BoolRef, float]:
        """Whether a bias hides the key, and what it adds to all others, which must be one number."""
        cases = self.cases(bias)
        seen = {value for value in cases if not value <= HIDDEN and self.possible(cases[value])}
        hidden = [value for value in cases if value <= HIDDEN]
        if len(seen) != 1 or not max(seen) <= FURTHEST_SHIFT or max(hidden, default=-math.inf) > max(seen) + HIDDEN:
            raise Unrecognised(f"{_UNLIKE}: it adds {', '.join(f'{value:g}' for value in sorted(seen))}")
        return z3.Or(*(cases[value] for value in hidden)), max(seen)

    def cases(self, point: Point) -> Cases:
        """The numbers that a float may be, and when it is each."""
        if isinstance(point, Known):
            return {self._number(point): z3.BoolVal(True)}
        if not isinstance(point, Applied):
            raise Unrecognised(_UNLIKE)
        op, xs = point.op, point.xs
        if isinstance(op, _MOVES) or (isinstance(op, e.Cast) and xs[0].dtype in FLOATS):
            return self.cases(xs[0])
        if isinstance(op, e.Cast) and xs[0].dtype == "bool":
            truth = self.truth(xs[0])
            return {1.0: truth, 0.0: z3.Not(truth)}
        if isinstance(op, e.Where):
            truth = self.truth(xs[0])
            found: Cases = {}
            for branch, holds in ((xs[1], truth), (xs[2], z3.Not(truth))):
                for value, condition in self.cases(branch).items():
                    both = z3.And(condition, holds)
                    found[value] = z3.Or(found[value], both) if value in found else both
            return found
        if isinstance(op, (e.Add, e.Sub, e.Mul, e.Maximum, e.Minimum)):
            return self._combined(op, point.dtype, *(self.cases(x) for x in xs))
        raise Unrecognised(f"{_UNLIKE}: {op.name if op else ''} is not followed")

    @staticmethod
    def _combined(op: e.Binary, dtype: str, left: Cases, right: Cases) -> Cases:
        own = NUMPY_DTYPES[dtype].type
        found: Cases = {}
        for a, when_a in left.items():
            for b, when_b in right.items():
                with np.errstate(all="ignore"):
                    value = float(type(op).function(own(a), own(b)))
                both = z3.And(when_a, when_b)
                found[value] = z3.Or(found[value], both) if value in found else both
        if len(found) > _MOST_CASES:
            raise Unrecognised(_UNLIKE)
        return found

    def truth(self, point: Point) -> z3.BoolRef:
        """A condition."""
        if isinstance(point, Known):
            return z3.BoolVal(bool(self._number(point)))
        op, xs = (point.op, point.xs) if isinstance(point, Applied) else (None, ())
        if isinstance(op, _MOVES):
            return self.truth(xs[0])
        if isinstance(op, e.Not):
            return z3.Not(self.truth(xs[0]))
        if isinstance(op, (e.And, e.Or)):
            return (z3.And if isinstance(op, e.And) else z3.Or)(*(self.truth(x) for x in xs))
        if isinstance(op, e.Cast) and xs[0].dtype in INTEGERS:
            return self.whole(xs[0]) != 0
        if isinstance(op, (e.Equal, e.NotEqual)) and xs[0].dtype == "bool":
            same = self.truth(xs[0]) == self.truth(xs[1])
            return same if isinstance(op, e.Equal) else z3.Not(same)
        if isinstance(op, e.Compare) and xs[0].dtype in INTEGERS:
            return _COMPARED[type(op)](*(self.whole(x) for x in xs))
        raise Unrecognised(f"{_UNLIKE}: {op.name if op else 'a table'} is not followed")

    def whole(self, point: Point) -> z3.ArithRef:
        """A whole number, which fits its dtype."""
        if isinstance(point, Linear):
            return self._fits(self._place(point.place), point.dtype)
        if isinstance(point, Known):
            return z3.IntVal(int(self._number(point)))
        op, xs = (point.op, point.xs) if isinstance(point, Applied) else (None, ())
        if isinstance(op, _MOVES) or (isinstance(op, e.Cast) and xs[0].dtype in INTEGERS):
            return self._fits(self.whole(xs[0]), point.dtype)
        if isinstance(op, e.Cast) and xs[0].dtype == "bool":
            return z3.If(self.truth(xs[0]), z3.IntVal(1), z3.IntVal(0))
        if isinstance(op, e.Where):
            return z3.If(self.truth(xs[0]), self.whole(xs[1]), self.whole(xs[2]))
        if op is not None and type(op) in _ARITHMETIC and point.dtype in INTEGERS:
            return self._fits(_ARITHMETIC[type(op)](*(self.whole(x) for x in xs)), point.dtype)
        if isinstance(op, (e.Div, e.FloorDivide, e.Mod, e.Fmod)) and point.dtype in INTEGERS:
            return self._fits(self._divided(op, self.whole(xs[0]), xs[1]), point.dtype)
        raise Unrecognised(f"{_UNLIKE}: {op.name if op else 'a table'} is not followed")

    def _divided(self, op: e.Binary, x: z3.ArithRef, by: Point) -> z3.ArithRef:
        """Quotients and rests by a constant above 0; z3's are rounded down for such."""
        divisor = int(self._number(by)) if not by.variables else 0
        if divisor <= 0:
            raise Unrecognised(f"{_UNLIKE}: {op.name} by what is no number above 0 is not followed")
        if isinstance(op, e.FloorDivide):
            return x / divisor
        if isinstance(op, e.Mod):
            return x % divisor
        if isinstance(op, e.Div):
            return z3.If(x >= 0, x / divisor, -(-x / divisor))
        return z3.If(x >= 0, x % divisor, -(-x % divisor))

    def _number(self, point: Point) -> float:
        """The one number that a point without places is."""
        if math.prod(point.shape) != 1:
            raise Unrecognised(_UNLIKE)
        try:
            return self.reader.evaluate(point, ZERO, ZERO).reshape(()).item()  # type: ignore[no-any-return]
        except IRError as error:
            raise Unrecognised(f"its mask cannot be evaluated: {error}") from None

    def _place(self, place: Place) -> z3.ArithRef:
        return place.query * self.query + place.key * self.key + place.length * self.length + place.constant

    def _fits(self, term: z3.ArithRef, dtype: str) -> z3.ArithRef:
        """The term, where no place makes it too large for its dtype."""
        limits = np.iinfo(NUMPY_DTYPES[dtype])
        if self.possible(z3.Or(term < int(limits.min), term > int(limits.max))):
            raise Unrecognised(f"its mask computes numbers that do not fit {dtype}")
        return term
