"""Rotations of pairs of channels, however they are written: one detector for text and for graphs of arrays.

A rotation is a linear map of one value x, whose coefficients are elements of factors that x is multiplied by. Its
matrix is followed through the ops element by element, and compared with `llm.rope`: channels i and i + pairs (half) or
2i and 2i + 1 (interleaved) turn by a cosine and a sine, the channels after them pass. Nothing is evaluated here: that
two coefficients are one number is seen from the graph (`ElementNumbers`), or left to be shown (`Turn`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.dims import Dim, product, symbols_of
from llmc.compiler.ir.elementwise import Add, Cast, Mul, Neg, Sub
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Concat, Reshape, Slice, Transpose
from llmc.compiler.ir.types import FLOATS
from llmc.compiler.passes.element_numbers import ONE, ElementNumbers, Numbers, moves_along_free_axes
from llmc.compiler.passes.linear_maps import LinearMaps, Term
from llmc.compiler.passes.probe import LENGTH, Probe
from llmc.compiler.passes.rewriting import holds
from llmc.errors import IRError

_MOST = 1 << 20  # elements of a value that is followed, at most
_FEW = 3  # tokens of a graph of arrays where their number is free


@dataclass(frozen=True)
class Turn:
    """The numbers of a rotation's coefficients, each [rows, pairs]: a' = cos_a a - sin_a b, b' = cos_b b + sin_b a.

    It is a rotation where the cosines are equal and the sines are. Half: channels i and i + pairs are a pair.
    """

    interleaved: bool
    cos_a: Numbers
    cos_b: Numbers
    sin_a: Numbers
    sin_b: Numbers

    @property
    def is_certain(self) -> bool:
        """Whether the two cosines are one number of the graph, and the two sines."""
        return np.array_equal(self.cos_a, self.cos_b) and np.array_equal(self.sin_a, self.sin_b)


@dataclass(frozen=True)
class Rotation:
    """y as `llm.rope` of channels `start`... of x, which may be wider (queries, keys and values side by side).

    token: the axis of y that counts tokens; None in a graph of arrays. factors: what the rotation multiplies by.
    """

    x: Value
    y: Op
    token: int | None
    start: int
    turn: Turn
    factors: tuple[Value, ...]
    region: frozenset[Value]


class Rotations(LinearMaps):
    """Finds the rotation that a multiplication is part of.

    Of text, factors are what positions, lengths and weights decide; in a graph of arrays they are what is the same for
    several rows of the other operand.
    """

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe.graph)
        self.probe = probe
        self.is_text = probe.positions is not None and probe.size is not None
        self.numbers = ElementNumbers(probe.binding(1 if self.is_text else _FEW))

    def find(self, start: Op) -> Rotation | None:
        """The rotation that `start` is part of: the largest y that one x determines."""
        best: Rotation | None = None
        for y in self.linear_users(start):
            # A larger y counts only while it passes more channels of the same head (partial rotation).
            if isinstance(y, (Concat, Reshape) if best is not None else (Concat, Reshape, Add, Sub)):
                best = self._as_rotation(y) or best
        return best

    def is_map_op(self, op: Value) -> bool:
        """Whether this multiplies activations by a factor."""
        if not isinstance(op, Mul) or op.dtype not in FLOATS:
            return False
        factor = self._factor(op)
        if factor is None or not self.is_text:
            return factor is not None
        return bool(self.probe.sources.get(factor, frozenset()) & {"positions", LENGTH})

    def linear_operands(self, value: Value) -> tuple[Value, ...]:
        if isinstance(value, (Neg, Slice, Concat, Reshape, Transpose, Add, Sub)):
            return value.operands if self._are_activations(*value.operands) else ()
        if isinstance(value, Cast):
            return (value.x,) if value.dtype in FLOATS and value.x.dtype in FLOATS else ()
        if isinstance(value, Mul):
            factor = self._factor(value)
            return () if factor is None else (value.a if value.b is factor else value.b,)
        return ()

    def _are_activations(self, *values: Value) -> bool:
        """Whether all these are activations."""
        return not self.is_text or all(self.probe.depends_on_tokens(value) for value in values)

    def _factor(self, op: Mul) -> Value | None:
        """The operand of a product that is no activation."""
        if self.is_text:
            acting = [self.probe.depends_on_tokens(value) for value in (op.a, op.b)]
            return None if acting[0] == acting[1] else op.b if acting[0] else op.a
        for value, other in ((op.b, op.a), (op.a, op.b)):
            if other.shape == op.shape and product(value.shape) != product(op.shape):
                varies = value.rank > 1 and value.shape[-1] != 1 and product(value.shape[:-1]) != 1
                return value if varies else None
        return None

    def _as_rotation(self, y: Op) -> Rotation | None:
        """y as a rotation, or None."""
        source = self.source(y)
        if source is None or y.rank < 2 or not isinstance(y.shape[-1], int):
            return None
        x, nodes = source
        if not self.is_text and x.type != y.type:
            return None
        if any(np.prod(self.numbers.shape(value), dtype=np.int64) > _MOST for value in (x, *nodes)):
            return None
        if not all(self._acts_on_rows(value) for value in nodes):
            return None
        if any(isinstance(v, Cast) and not holds(v.to, x.dtype) for v in nodes):
            return None  # it rounds to less than what it rotates
        factors = tuple(dict.fromkeys(f for v in nodes if isinstance(v, Mul) and (f := self._factor(v)) is not None))
        try:
            terms = self.terms(x, nodes, self.numbers)
        except (IRError, ValueError, IndexError):
            return None  # a factor that one token has no shape for
        found = None if terms is None else _turn(terms, self.numbers.shape(x)[-1])
        if found is None:
            return None
        start, turn = found
        if self.is_text and any(len(np.unique(part, axis=0)) != 1 for part in _parts(turn)):
            return None  # heads turn by angles of their own
        return Rotation(x, y, self._token(y), start, turn, factors, frozenset((*nodes, y)))

    def _token(self, value: Value) -> int | None:
        """The axis that counts the tokens of a text; None where none, or more than that one has a size of its own."""
        symbols = frozenset() if self.probe.size is None else self.probe.size.symbols()
        axes = [axis for axis, dim in enumerate(value.shape) if symbols_of(dim) & symbols]
        return axes[0] if self.is_text and len(axes) == 1 and value.shape[axes[0]] == self.probe.size else None

    def _acts_on_rows(self, value: Value) -> bool:
        """Whether an op moves no element along an axis whose size is not known, so that few tokens stand for any."""
        if self.is_text:
            return self._acts_on_tokens(value)
        return not moves_along_free_axes(value)

    def _acts_on_tokens(self, value: Value) -> bool:
        """Whether each token of a value of text is made of the same token of the operands, wherever it is.

        Slices of tokens and what is put together from them have another number of them, and a product with a factor
        that has them on another axis has two such axes: these are none of these values.
        """
        token = self._token(value)
        if token is None:
            return False
        if isinstance(value, Reshape):
            before = self._token(value.x)
            return before is not None and product(value.shape[token:]) == product(value.x.shape[before:])
        return True


def _parts(turn: Turn) -> tuple[Numbers, ...]:
    return turn.cos_a, turn.cos_b, turn.sin_a, turn.sin_b


def _turn(terms: list[Term], width: int) -> tuple[int, Turn] | None:
    """The first channel of x, and the coefficients, where y's channels turn in pairs; width: the channels of x."""
    channels = terms[0].source.shape[-1]
    rows = np.arange(terms[0].source.size // channels)[:, None]
    sources, coefficients = [], []
    for term in terms:
        source, coefficient = term.source.reshape(-1, channels), term.coefficient.reshape(-1, channels)
        present = coefficient != 0
        if ((source // width != rows) & present).any() or (present != present[:1]).any():
            return None
        sources.append(np.where(present[0], source[0] % width, -1))
        if ((source % width != sources[-1]) & present).any():
            return None
        coefficients.append(coefficient)
    places = np.stack(sources)  # [terms, channels]: channels of x, -1 where nothing is added
    start = int(places[places >= 0].min(initial=width))
    entries = _entries(places - start)
    paired = None if entries is None else _paired(entries)
    if entries is None or paired is None:
        return None
    interleaved, first, second = paired
    table = np.stack(coefficients)  # [terms, rows, channels]
    alone = [c for c in range(channels) if c not in {*first, *second}]
    if any((table[entries[c][c], :, c] != ONE).any() for c in alone):
        return None

    def part(outputs: list[int], inputs: list[int]) -> Numbers:
        return np.stack([table[entries[c][i], :, c] for c, i in zip(outputs, inputs, strict=True)], axis=1)

    turn = Turn(interleaved, part(first, first), part(second, second), -part(first, second), part(second, first))
    return start, turn


Entries = list[dict[int, int]]  # for each channel of y: the term of each channel of x that it is made of


def _entries(places: Numbers) -> Entries | None:
    """From the channels [terms, channels] of x, less than 0 where nothing is added.

    None where a channel is made of several terms of one channel, or not of itself, or of more than two.
    """
    found: Entries = []
    for channel in range(places.shape[1]):
        own = {int(source): term for term, source in enumerate(places[:, channel]) if source >= 0}
        if len(own) != (places[:, channel] >= 0).sum() or channel not in own or len(own) > 2:
            return None
        found.append(own)
    return found


def _paired(entries: Entries) -> tuple[bool, list[int], list[int]] | None:
    """(interleaved, first channels, second channels) of the pairs, in `llm.rope`'s order; None for any other order."""
    partner = {c: next(i for i in own if i != c) for c, own in enumerate(entries) if len(own) == 2}
    if 0 not in partner or any(partner.get(other) != c for c, other in partner.items()):
        return None
    pairs = len(partner) // 2
    interleaved = partner[0] == 1 and pairs > 1
    if interleaved:
        first, second = list(range(0, 2 * pairs, 2)), list(range(1, 2 * pairs, 2))
    else:
        first, second = list(range(pairs)), list(range(pairs, 2 * pairs))
    fits = [partner.get(channel) for channel in first] == second
    return (interleaved, first, second) if fits else None


def size_of(factor: Value, axis: int, rank: int) -> int | Dim:
    """The factor's size along an axis of a value of `rank`."""
    own = axis - (rank - factor.rank)
    return 1 if own < 0 else factor.shape[own]
