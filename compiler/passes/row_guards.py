"""Guards: conditions under which a source sets the probabilities of a whole row to zero, where the row is empty.

A softmax of a row that hides every key by -inf is 0 / 0; sources put zeros there, as `llm.attention` does. A guard is
believed where it implies that the row is empty: by its structure, or because it holds for no query at all.
"""

from __future__ import annotations

import math

from llmc.compiler.ir.elementwise import (
    Add,
    And,
    Cast,
    Compare,
    Equal,
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    Not,
    NotEqual,
    Or,
    Where,
)
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import All, Any, Max, Reduce, Reshape, Sum
from llmc.compiler.ir.types import FLOATS, Shape
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.rewriting import number_of
from llmc.compiler.passes.score_chain import Chain


def require_guard(chain: Chain, guard: Value) -> None:
    """Unrecognised unless `guard` [..., Q, 1] holds only where a row of scores hides every key by -inf."""
    if not _Guards(chain).row_is_empty(guard, True):
        raise Unrecognised("its probabilities are set to zero in rows that see keys")


class _Guards:
    """Implications between conditions and the emptiness of a row of the chain's scores."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        # Where one of these is -inf, so is the score: the scores themselves, and what is added to them.
        self.sums: set[Value] = set()
        self.hiding: list[tuple[Value, bool]] = []  # (condition, what it is where the score is -inf)
        self._walk(chain.scores)

    def _walk(self, value: Value) -> None:
        """Note what is added to the scores, and which conditions hide them, from the softmax's operand inwards."""
        inside = {self.chain.raw, *self.chain.steps}
        while True:
            self.sums.add(value)
            if value is self.chain.raw:
                return
            assert isinstance(value, Op)
            inner = next(x for x in value.operands if x in inside)
            if isinstance(value, Add):
                self.sums.update(value.operands)
            elif isinstance(value, Where) and number_of(value.b if value.a is inner else value.a) == -math.inf:
                self.hiding.append((value.condition, value.a is not inner))
            elif not _keeps(value):
                return  # further in, -inf may become anything
            value = inner

    def row_is_empty(self, guard: Value, holds: bool, closed: bool = True) -> bool:
        """Whether a condition a row, being `holds`, implies that the row is empty. closed: it has an axis of keys."""
        if isinstance(guard, Reshape):
            if _only_leads(guard):
                return self.row_is_empty(guard.x, holds, closed)
            return closed and _stripped(guard) == (*_stripped(guard.x), 1) and self.row_is_empty(guard.x, holds, False)
        if isinstance(guard, Not):
            return self.row_is_empty(guard.x, not holds, closed)
        if isinstance(guard, (And, Or)):
            results = [self.row_is_empty(x, holds, closed) for x in guard.operands]
            return any(results) if isinstance(guard, And) == holds else all(results)
        if isinstance(guard, (All, Any)) and _is_over_keys(guard, closed):
            return isinstance(guard, All) == holds and self.key_is_hidden(guard.x, holds)
        return isinstance(guard, Compare) and self._compared(guard, holds, closed)

    def _compared(self, guard: Compare, holds: bool, closed: bool) -> bool:
        """max(scores) == -inf, or a count of visible keys that is 0, and what says the same."""
        for x, other, op in ((guard.a, guard.b, type(guard)), (guard.b, guard.a, _MIRRORED.get(type(guard)))):
            while isinstance(x, Reshape) and _only_leads(x):
                x = x.x
            if not isinstance(x, Reduce) or not _is_over_keys(x, closed):
                continue
            is_least = op in ((Equal, LessEqual) if holds else (NotEqual, Greater))
            if isinstance(x, Max) and number_of(other) == -math.inf:
                return is_least and self.is_added(x.x)
            if isinstance(x, Sum) and number_of(other) == 0 and isinstance(x.x, Cast) and x.x.x.dtype == "bool":
                return is_least and x.dtype in _COUNTS and self.key_is_hidden(x.x.x, False)
        return False

    def key_is_hidden(self, condition: Value, holds: bool) -> bool:
        """Whether a condition a key, being `holds`, implies that its score is -inf."""
        condition = _unmoved(condition)
        if any(condition is _unmoved(value) and holds == hides for value, hides in self.hiding):
            return True
        if isinstance(condition, Not):
            return self.key_is_hidden(condition.x, not holds)
        if isinstance(condition, (And, Or)):
            results = [self.key_is_hidden(x, holds) for x in condition.operands]
            return any(results) if isinstance(condition, And) == holds else all(results)
        if not isinstance(condition, Compare):
            return False
        for x, other, op in (
            (condition.a, condition.b, type(condition)),
            (condition.b, condition.a, _MIRRORED.get(type(condition))),
        ):
            if number_of(other) == -math.inf and op in ((Equal, LessEqual) if holds else (NotEqual, Greater)):
                return self.is_added(x)
        return False

    def is_added(self, value: Value) -> bool:
        """Whether a score is -inf where this is."""
        value = _unmoved(value)
        return any(value is _unmoved(each) for each in self.sums)


_COUNTS = (*FLOATS, "i32", "u32", "i64", "u64")  # in i8, 256 keys are 0 again
_MIRRORED: dict[type[Compare], type[Compare]] = {
    Equal: Equal,
    NotEqual: NotEqual,
    LessEqual: GreaterEqual,
    GreaterEqual: LessEqual,
    Less: Greater,
    Greater: Less,
}


def _unmoved(value: Value) -> Value:
    """The value under float casts and axes of size 1 in front, which keep -inf, and rows and keys, where they are."""
    while isinstance(value, (Cast, Reshape)) and _keeps(value):
        value = value.x
    return value


def _keeps(value: Value) -> bool:
    """Whether -inf stays what it is, and rows and keys where they are: in a cast to floats of floats, or axes in front.

    Whole numbers have no -inf: the least of them is a score like any other.
    """
    if isinstance(value, Reshape):
        return _only_leads(value)
    return isinstance(value, Cast) and value.to in FLOATS and value.x.dtype in FLOATS


def _stripped(value: Value) -> Shape:
    """A shape without axes of size 1 in front."""
    return value.shape[next((axis for axis, dim in enumerate(value.shape) if dim != 1), value.rank) :]


def _only_leads(op: Reshape) -> bool:
    """Whether a reshape adds or drops axes of size 1 in front only."""
    return _stripped(op) == _stripped(op.x)


def _is_over_keys(op: Reduce, closed: bool) -> bool:
    """Whether a reduction is over the last axis alone, which stays as one of size 1 (closed) or vanishes."""
    return {axis % op.x.rank for axis in op.axes} == {op.x.rank - 1} and op.keep == closed
