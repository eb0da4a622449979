"""Norms with a few large weights: powers of two go from them to the layers that read them, to even the activations.

Activations are rounded to int8 by the largest of a group. Where a norm multiplies some channels by much more than the
others, the others keep few of their 8 bits. SmoothQuant (Xiao et al. 2023, equation 4) divides each channel of the
activations by s = sqrt(max|x| / max|w|) and multiplies the weights of that input by it. In front of a norm's weights
all channels have a mean square of one over all tokens, more or less, so that |weight of the norm| stands for max|x|,
and no text is needed. s is rounded to a power of two, so that norm and weights are multiplied exactly and the model
computes the very same numbers. Of a factor that all channels share nothing depends: it is chosen so that matrices are
only multiplied up, as small numbers in f16 have no bits to lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmc.compiler.ir.elementwise import Add, Cast
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import GatedLinear, LayerNorm, Linear, RMSNorm
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.structural import Concat, Slice, Transpose
from llmc.compiler.ir.types import FLOATS, Array

LARGEST = 8.0  # times the median of a norm's weights: three of the seven bits of most numbers of a group are lost then
_WIDE = {"f32", "bf16"}  # exponents of these have room for any power of two that is moved
_STORED = {*_WIDE, "f16"}
MOST = 12  # powers of two that a channel is moved by
_AT_ONCE = 1 << 22  # numbers: temporaries take several times their room


class Source(Protocol):
    """What weights come from."""

    @property
    def names(self) -> Iterable[str]: ...

    def dtype(self, name: str) -> str: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def load(self, name: str) -> Array: ...


def is_uneven(vector: Array) -> bool:
    """Whether a few of a norm's weights are much larger than the others."""
    size = np.abs(vector.astype(np.float32))
    return bool(np.isfinite(size).all() and size.max(initial=0.0) >= LARGEST * max(float(np.median(size)), 1e-30))


def has_uneven_factors(graph: Graph, load: LoadParam) -> bool:
    """Whether any vector of a graph in which nothing was recognised yet may be an uneven norm's weights. What is only
    added, as biases are, is none."""
    users = graph.users
    return any(
        is_uneven(load(param.name))
        for param in graph.params
        if param.dtype in FLOATS and len(param.shape) == 1 and not all(isinstance(op, Add) for op in users[param])
    )


@dataclass(frozen=True)
class Scaled:
    """A param is multiplied by 2^powers along an axis."""

    axis: int
    powers: Array

    def __call__(self, array: Array) -> Array:
        made = np.empty(array.shape, array.dtype)
        for part in _parts(array, self.axis):
            made[part] = self._multiplied(array[part], self.powers)
        return made

    def is_exact(self, array: Array) -> bool:
        """Whether nothing of the array is lost."""
        for part in _parts(array, self.axis):
            made = self._multiplied(array[part], self.powers)
            back = self._multiplied(made, -self.powers)
            if not (np.isfinite(made.astype(np.float32)).all() and (back == array[part]).all()):
                return False
        return True

    def _multiplied(self, array: Array, powers: Array) -> Array:
        shape = [1] * array.ndim
        shape[self.axis] = -1
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(np.ldexp(array.astype(np.float32), powers.reshape(shape)).astype(array.dtype))


def _parts(array: Array, axis: int) -> Iterator[tuple[slice, ...]]:
    """Parts of a vector or matrix, each with all of an axis."""
    if array.ndim == 1:
        yield (slice(None),)
        return
    step = max(1, _AT_ONCE // max(1, array.shape[axis]))
    for start in range(0, array.shape[1 - axis], step):
        part = slice(start, start + step)
        yield (slice(None), part) if axis == 0 else (part, slice(None))


class ScaledWeights:
    """A source some of whose arrays are multiplied by powers of two."""

    def __init__(self, source: Source, scaled: Mapping[str, Scaled]) -> None:
        self._source, self._scaled = source, dict(scaled)

    def powers(self, name: str) -> tuple[int, ...]:
        """By which powers of two the inputs of a matrix were multiplied; empty: it is as it was."""
        scaled = self._scaled.get(name)
        return () if scaled is None else tuple(int(power) for power in scaled.powers)

    @property
    def names(self) -> Iterable[str]:
        return self._source.names

    def dtype(self, name: str) -> str:
        return self._source.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def load(self, name: str) -> Array:
        array, scaled = self._source.load(name), self._scaled.get(name)
        return array if scaled is None else scaled(array)


def smoothed(graph: Graph, source: Source) -> tuple[dict[str, Scaled], int]:
    """What to multiply params by, and of how many norms. graph: after its norms and linear ops have been recognised."""
    users = graph.users
    found: dict[str, Scaled] = {}
    norms = 0
    for op in graph.ops:
        part = _Norm.of(op, users, graph)
        made = {} if part is None else part.smoothed(source)
        if made and not made.keys() & found.keys():
            found |= made
            norms += 1
    return found, norms


@dataclass(frozen=True)
class _Norm:
    """A norm that only linear ops read. vectors: its params; weights: the params of these ops, and which of their axes
    are the inputs. Nothing else reads any of them."""

    weight: str
    vectors: tuple[str, ...]
    weights: dict[str, int]

    @classmethod
    def of(cls, op: Op, users: Mapping[Value, tuple[Op, ...]], graph: Graph) -> _Norm | None:
        """None where an op is no such norm."""
        if not isinstance(op, (RMSNorm, LayerNorm)) or op.w is None:
            return None
        if isinstance(op, RMSNorm) and op.offset:
            return None
        if not {op.dtype, op.x.dtype} <= _WIDE:
            return None
        outputs = {value for _, value in graph.outputs}
        linears = _readers(op, users, outputs)
        if not linears:
            return None
        seen: set[Value] = set()
        weights: dict[str, int] = {}
        for linear in linears:
            for name, axis in _places(linear.w, 1, seen):
                if weights.setdefault(name, axis) != axis:
                    return None
        names = list(_places_of_vectors(op, seen))
        ours: set[Op] = {op, *linears, *(value for value in seen if isinstance(value, Op))}
        elsewhere = any(value in outputs or not set(users.get(value, ())) <= ours for value in seen)
        twins = any(value.name in {*names, *weights} and value not in seen for value in graph.params)
        if elsewhere or twins or "" in weights or "" in names:
            return None
        # The weight of a linear op must not be another operand of one, such as its bias.
        if any(operand in seen for linear in linears for operand in linear.operands if operand is not linear.w):
            return None
        return cls(names[0], tuple(names), weights)

    def smoothed(self, source: Source) -> dict[str, Scaled]:
        """Empty where the norm is even, or where a number would be lost."""
        size = np.abs(source.load(self.weight).astype(np.float32))
        if not is_uneven(size):
            return {}
        columns = np.zeros_like(size)
        for name, axis in self.weights.items():
            array = source.load(name)
            for part in _parts(array, axis):
                largest = np.abs(array[part].astype(np.float32)).max(axis=1 - axis, initial=0.0)
                columns = np.maximum(columns, largest)
        known = (size > 0) & (columns > 0) & np.isfinite(columns)
        if not known.any():
            return {}
        wanted = np.log2(size[known] / columns[known]) / 2
        powers = np.zeros(size.shape, np.int32)
        powers[known] = np.clip(np.rint(wanted - wanted.min()), 0, MOST)
        found = {name: Scaled(0, -powers) for name in self.vectors}
        found |= {name: Scaled(axis, powers) for name, axis in self.weights.items()}
        return found if all(scaled.is_exact(source.load(name)) for name, scaled in found.items()) else {}


def _readers(value: Value, users: Mapping[Value, tuple[Op, ...]], outputs: set[Value]) -> list[Linear | GatedLinear]:
    """The linear ops whose activations a value is, if nothing else reads it; else none. Casts keep powers of two, but
    for those to f16, which may overflow."""
    found: list[Linear | GatedLinear] = []
    if value in outputs:
        return []
    for user in users.get(value, ()):
        if isinstance(user, Cast) and user.to in _WIDE:
            inner = _readers(user, users, outputs)
            if not inner:
                return []
            found += inner
        elif isinstance(user, (Linear, GatedLinear)) and [x for x in user.operands if x is value] == [user.x]:
            found.append(user)
        else:
            return []
    return found


def _places(value: Value, axis: int, seen: set[Value]) -> Iterator[tuple[str, int]]:
    """The params that a weight is put together of, each with its axis of inputs; an empty name for anything else."""
    seen.add(value)
    if isinstance(value, Param) and len(value.shape) == 2:
        yield value.name, axis
    elif isinstance(value, Cast) and value.x.dtype in _STORED and value.dtype in _WIDE:
        yield from _places(value.x, axis, seen)
    elif isinstance(value, Transpose) and tuple(value.permutation) == (1, 0):
        yield from _places(value.x, 1 - axis, seen)
    elif isinstance(value, Concat) and value.axis % 2 == 1 - axis:
        for operand in value.operands:
            yield from _places(operand, axis, seen)
    elif isinstance(value, Slice) and value.axis % 2 == 1 - axis:
        yield from _places(value.x, axis, seen)
    else:
        yield "", axis


def _places_of_vectors(op: RMSNorm | LayerNorm, seen: set[Value]) -> Iterator[str]:
    """The params that a norm's vectors are; an empty name for anything else."""
    for value in (op.w, getattr(op, "b", None)):
        if value is None:
            continue
        seen.add(value)
        while isinstance(value, Cast) and value.x.dtype in _STORED and value.dtype in _WIDE:
            value = value.x
            seen.add(value)
        yield value.name if isinstance(value, Param) else ""
