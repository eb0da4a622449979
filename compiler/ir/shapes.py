"""Shape arithmetic that ops share."""

from __future__ import annotations

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import Shape
from llmc.errors import IRError


class UnequalSizes(IRError):
    """Sizes that must be equal and are not, for every value of their symbols at least. pairs: which."""

    def __init__(self, message: str, *pairs: tuple[int | Dim, int | Dim]) -> None:
        super().__init__(message)
        self.pairs = pairs


def require_equal(message: str, *pairs: tuple[int | Dim, int | Dim]) -> None:
    """Raises UnequalSizes(message) unless the sizes of each pair are the same polynomial."""
    unequal = [(a, b) for a, b in pairs if a != b]
    if unequal:
        raise UnequalSizes(message, *unequal)


def broadcast_shapes(*shapes: Shape) -> Shape:
    """numpy's broadcasting; two sizes are equal only when their polynomials are."""
    rank = max(len(shape) for shape in shapes)
    result: list[int | Dim] = [1] * rank
    for shape in shapes:
        for index, dim in enumerate(shape, start=rank - len(shape)):
            if dim == 1 or dim == result[index]:
                continue
            if result[index] != 1:
                said = f"shapes {' and '.join(str(list(s)) for s in shapes)} do not broadcast"
                raise UnequalSizes(said, (result[index], dim))
            result[index] = dim
    return tuple(result)


def axis_of(axis: int, rank: int) -> int:
    """A non-negative axis, checked."""
    if not -rank <= axis < rank:
        raise IRError(f"axis {axis} is outside a tensor of rank {rank}")
    return axis % rank


def require(condition: bool, message: str) -> None:
    """Raise IRError(message) unless the condition holds."""
    if not condition:
        raise IRError(message)


def require_same_dtype(*values: Value) -> str:
    """The dtype that all values share."""
    dtypes = {value.dtype for value in values}
    if len(dtypes) != 1:
        raise IRError(f"operands have different dtypes: {', '.join(value.dtype for value in values)}")
    return dtypes.pop()
