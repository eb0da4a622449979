"""The inputs of a graph that is not text: its free sizes as symbols with bounds, or as numbers.

A size that a file leaves free is often bound by the graph: two inputs are added, so their sizes are equal; a window has
to fit. Where translation finds such a condition, it is settled here, and the graph is translated again. That rules out
only sizes that the graph could not run with anyway, but for one case: of two sizes that are broadcast, one may be 1,
and then `--dim` has to say so. Inputs of other sizes are refused when running.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmc.compiler.ir.dims import Dim, Symbol, concrete, substitute, symbol, symbols_of
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.shapes import UnequalSizes
from llmc.compiler.ir.types import Tensor
from llmc.errors import DimError, FrontendError
from llmc.frontends.onnx.conventions import is_batch_size
from llmc.frontends.onnx.forms import at_most
from llmc.frontends.onnx.model import Signature, signature_dtype
from llmc.frontends.onnx.translation import MayNotFit, SizeUnknown

_DEFAULT_BATCH, _DEFAULT_SIZE = 8, 1024
_MOST_SIZE = 1 << 31
_NAME = re.compile(r"[A-Za-z_]\w{0,63}\Z")


@dataclass(frozen=True)
class FreeSizes:
    """The free sizes of a graph's inputs, and what is decided of them.

    names: a plain word for each, by the text that the file has, or INPUT_AXIS where it has none. asked: those that the
    user made numbers. most: greatest values that the user gave. numbers: sizes that are numbers. same: sizes that are
    another one. least: the least values that the graph can run with.
    """

    names: Mapping[str, str]
    asked: Mapping[str, int]
    most: Mapping[str, int]
    numbers: Mapping[str, int]
    same: Mapping[str, str] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Sequence[Signature], numbers: Mapping[str, int], most: Mapping[str, int]) -> FreeSizes:
        """Those of a graph's inputs; FrontendError for a number or a greatest value of a size that there is none of."""
        names: dict[str, str] = {}
        for signature in inputs:
            if signature.dims is None:
                raise FrontendError(
                    f"input {signature.name!r:.100} has no shape, not even a rank: onnx.shape_inference may find it"
                )
            for axis, dim in enumerate(signature.dims):
                if not isinstance(dim, int) and _text(signature, axis) not in names:
                    names[_text(signature, axis)] = _plain_name(_text(signature, axis), set(names.values()))
        known = list(names.values())
        for option, given in (("--dim", numbers), ("--max-dim", most)):
            for name, value in given.items():
                if name not in known:
                    has = f"its free sizes are {', '.join(known)}" if known else "it has no free sizes"
                    raise FrontendError(f"{option}: the model has no size {name!r:.60}: {has}")
                if not 1 <= value <= _MOST_SIZE:
                    raise FrontendError(f"{option} {name} is {value}: it must be within 1..{_MOST_SIZE}")
        for name in sorted(set(numbers) & set(most)):
            raise FrontendError(f"{name} is a number by --dim: leave --max-dim {name} away")
        return cls(names, numbers, most, numbers)

    def inputs(self, inputs: Sequence[Signature]) -> tuple[Input, ...]:
        """An input of the graph for each of the model's, in its own dtype."""
        return tuple(
            Input(
                signature.name,
                Tensor(
                    tuple(
                        dim if isinstance(dim, int) else self._size(self.names[_text(signature, axis)])
                        for axis, dim in enumerate(signature.dims or ())
                    ),
                    signature_dtype(signature, "input"),
                ),
            )
            for signature in inputs
        )

    def _root(self, name: str) -> str:
        while name in self.same:
            name = self.same[name]
        return name

    def _size(self, name: str) -> int | Dim:
        """A number, or the symbol that a size is: its own, or that of the size it is equal to."""
        root = self._root(name)
        if root in self.numbers:
            return self.numbers[root]
        alike = [other for other in self.names.values() if self._root(other) == root]
        asked = [self.most[other] for other in alike if other in self.most]
        default = _DEFAULT_BATCH if any(map(is_batch_size, alike)) else _DEFAULT_SIZE
        return symbol(root, self.least.get(root, 1), min(asked, default=default))

    @property
    def free(self) -> list[Symbol]:
        """The sizes that are free still, by name."""
        return sorted({size for name in self.names.values() for size in symbols_of(self._size(name))}, key=str)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided, for the user to read."""
        groups: dict[str, list[str]] = {}
        for name in self.same:
            groups.setdefault(self._root(name), []).append(name)
        equal = [
            f"the sizes {', '.join([root, *names])} have to be equal: all are {self._size(root)}"
            for root, names in sorted(groups.items())
        ]
        found = [f"the size {name} has to be {self.numbers[name]}" for name in self.numbers if name not in self.asked]
        return (*equal, *found)

    def after(self, cause: BaseException | None) -> FreeSizes | None:
        """With what would mend an error of the translation; None where nothing is known that would."""
        if isinstance(cause, UnequalSizes):
            return self._equal(*cause.pairs[0])
        if isinstance(cause, MayNotFit):
            for size in sorted(cause.room.symbols(), key=str):
                least = _least(cause.room, size)
                if least is not None:
                    return replace(self, least={**self.least, size.name: least})
        return None

    def _equal(self, a: int | Dim, b: int | Dim) -> FreeSizes | None:
        """With one size put for another, or a number for one, that makes two sizes equal."""
        difference = a - b
        if isinstance(difference, int):
            return None
        symbols = sorted(difference.symbols(), key=str)
        for kept in symbols:
            for other in symbols:
                if other != kept and substitute(difference, {other.name: symbol(kept.name, kept.low, kept.high)}) == 0:
                    least = max(kept.low, other.low)
                    together = {**self.same, other.name: kept.name}
                    return replace(self, same=together, least={**self.least, kept.name: least})
        for size in symbols:
            number = _solution(difference, size)
            if number is not None:
                return replace(self, numbers={**self.numbers, size.name: number})
        return None

    def remedy(self, cause: BaseException | None) -> str:
        """What to say behind an error of the translation: how free sizes become numbers, where that may help."""
        if not self.free or not isinstance(cause, (SizeUnknown, DimError, UnequalSizes)):
            return ""
        ranges = ", ".join(f"{size.name} ({size.low} to {size.high})" for size in self.free)
        return f". Free sizes of the inputs are {ranges}: --dim NAME=N makes one a number"


def _text(signature: Signature, axis: int) -> str:
    """What a free size is called in the file, or by where it stands."""
    dim = (signature.dims or ())[axis]
    return dim if isinstance(dim, str) else f"{signature.name}_{axis}"


def _least(room: Dim, size: Symbol) -> int | None:
    """The least value of a size from which on there is room; None where there is none at its greatest."""
    assert size.high is not None

    def fits(least: int) -> bool:
        return at_most(0, substitute(room, {size.name: symbol(size.name, least, size.high)})) is True

    return bisect_left(range(size.high), True, lo=size.low, key=fits) if fits(size.high) else None


def _solution(difference: Dim, size: Symbol) -> int | None:
    """The value of a size at which a difference is zero; None where there is not exactly one within its range."""
    if difference.symbols() != {size}:
        return None
    start, following = (concrete(difference, {size.name: value}) for value in (0, 1))
    slope = following - start
    is_linear = difference == symbol(size.name, size.low, size.high) * slope + start
    if not is_linear or start % slope:
        return None
    assert size.high is not None
    value = -start // slope
    return value if size.low <= value <= size.high else None


def _plain_name(text: str, taken: set[str]) -> str:
    """A word for a size: its own text, or what is left of it."""
    plain = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")[:48]
    if not _NAME.match(plain):
        plain = f"size_{plain}".rstrip("_")
    unique, number = plain, 2
    while unique in taken:
        unique, number = f"{plain}_{number}", number + 1
    return unique
