"""Writing weights into the artifact: offsets are planned first, then each tensor is evaluated, packed and freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.evaluate import LoadParam, evaluate_values
from llmc.compiler.ir.graph import topological
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.op import Param, Value
from llmc.compiler.ir.types import NUMPY_DTYPES, Array, itemsize
from llmc.errors import CompileError

ALIGNMENT = 64  # bytes: where every buffer that a kernel is given starts


class Layout(Protocol):
    """How a target packs a weight: `arrays` says shapes and dtypes of the parts, `pack` makes them."""

    def arrays(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]: ...


def name_of(value: Value) -> str:
    """The names of the checkpoint tensors that a value is made of, for people (of integers with scales, the former)."""
    whole = value.q if isinstance(value, PackGroups) else value
    params = [v.name for v in topological([whole]) if isinstance(v, Param)]
    if not params:
        return "constant"
    return params[0] if len(params) == 1 else f"{params[0]} + {len(params) - 1} more"


@dataclass(frozen=True)
class Stored:
    """One value as it is stored: as a plain array (layout None), or packed into the parts of a layout."""

    value: Value
    layout: Layout | None

    def parts(self) -> list[tuple[str, int]]:
        """(part, bytes) in storage order."""
        shape = self.value.shape
        if self.layout is None:
            count = product(shape)
            if not isinstance(count, int):
                raise CompileError(f"a weight has the symbolic size {count}")
            return [("", count * itemsize(self.value.dtype))]
        n, k = shape
        assert isinstance(n, int) and isinstance(k, int)
        return [
            (name, int(np.prod(size, dtype=np.int64)) * dtype.itemsize)
            for name, (size, dtype) in self.layout.arrays(n, k).items()
        ]

    @property
    def name(self) -> str:
        """See `name_of`."""
        return name_of(self.value)


@dataclass(frozen=True)
class Placed:
    """A stored value with the offset of each of its parts in the weights section."""

    stored: Stored
    offsets: dict[str, int]
    nbytes: int


def place(wanted: list[Stored]) -> tuple[list[Placed], int]:
    """Offsets of all parts, one after another, 64-byte aligned; and the size of the section."""
    position = 0
    placed = []
    for stored in dict.fromkeys(wanted):
        offsets = {}
        start = position = -(-position // ALIGNMENT) * ALIGNMENT
        for part, nbytes in stored.parts():
            position = -(-position // ALIGNMENT) * ALIGNMENT
            offsets[part] = position
            position += nbytes
        placed.append(Placed(stored, offsets, position - start))
    return placed, position


def packed_arrays(
    placed: list[Placed], load: LoadParam, keep: Callable[[Value, Encoded], None] | None = None
) -> Iterator[tuple[int, str, Array]]:
    """(offset, name, array) of every part, in storage order. A weight is evaluated, packed and then forgotten.

    keep: told of each encoded weight."""
    for item in placed:
        stored = item.stored
        try:
            value = evaluate_values([stored.value], {}, load, {})["0"]
        except CompileError as error:  # an encoding that refuses numbers does not know whose they are
            raise CompileError(f"{stored.name}: {error}") from error
        if stored.layout is None:
            if isinstance(value, Encoded):
                raise CompileError(f"{stored.name}: an encoded weight needs a layout")
            array = np.ascontiguousarray(value, dtype=NUMPY_DTYPES[stored.value.dtype])
            yield item.offsets[""], stored.name, array
            continue
        if keep is not None and isinstance(value, Encoded):
            keep(stored.value, value)
        pack = stored.layout.pack  # type: ignore[attr-defined]
        parts = pack(**value.parts) if isinstance(value, Encoded) else pack(value)
        del value
        for part, offset in item.offsets.items():
            yield offset, stored.name, np.ascontiguousarray(parts[part])
