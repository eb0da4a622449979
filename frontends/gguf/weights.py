"""A GGUF file's tensors as a model's weights: by its own names, rows in its own order, dequantized when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmc.compiler.ir.types import NUMPY_DTYPES, Array
from llmc.errors import FrontendError
from llmc.frontends.gguf import stored
from llmc.frontends.gguf.dequantize import Bytes, dequantize
from llmc.frontends.gguf.reader import GgufFile, StoredTensor
from llmc.frontends.gguf.tensor_types import TensorType
from llmc.frontends.stored_integers import Part, StoredIntegers


class Tensors:
    """The tensors of a file, or of all parts of one that was split."""

    def __init__(self, files: Iterable[GgufFile]) -> None:
        self._owner: dict[str, GgufFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self._owner:
                    raise FrontendError(f"{file.path}: tensor {name!r:.100} stands in another part of the model too")
                self._owner[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def __getitem__(self, name: str) -> StoredTensor:
        return self._owner[name].tensors[name]

    @property
    def names(self) -> list[str]:
        return list(self._owner)

    def blocks(self, name: str) -> Bytes:
        """Its bytes [rows, bytes of a row]."""
        return self._owner[name].blocks(name)

    def load(self, name: str) -> Array:
        """Its values: f32, or as they are stored."""
        tensor = self[name]
        return dequantize(tensor.kind, self.blocks(name)).reshape(tensor.shape)

    def dtype(self, name: str) -> str:
        """The IR dtype of `load`."""
        return self[name].kind.dtype or "f32"


class Rows(Protocol):
    """How rows are put together and ordered: whatever a row holds (weights, integers, scales) stays whole."""

    def __call__(self, parts: list[Array]) -> Array:
        """Of arrays [..., K], the array [..., K]; K may be 0, where only the shape is asked for."""


class Values(Protocol):
    """What a converter did to values, undone: of the arranged rows, or of several tensors as they are."""

    def shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for arrays of these shapes."""

    def __call__(self, *parts: Array) -> Array:
        """The result, f32."""


@dataclass(frozen=True)
class Weight:
    """tensors: what it is made of. rows: their rows in the model's order (default: of one tensor, as they are). values:
    applied after that, in f32."""

    tensors: tuple[str, ...]
    rows: Rows | None = None
    values: Values | None = None


class GgufWeights:
    """A file's tensors as a source under the model's own names.

    of_linears: weights [outputs, inputs], also where the model itself keeps them the other way round.
    """

    def __init__(self, tensors: Tensors, weights: Mapping[str, Weight]) -> None:
        self._tensors = tensors
        self._weights = dict(weights)
        self.of_linears = frozenset(name for name, weight in self._weights.items() if weight.values is None)

    @property
    def names(self) -> Iterable[str]:
        return self._weights.keys()

    def dtype(self, name: str) -> str:
        weight = self._weights[name]
        dtypes = {self._tensors.dtype(tensor) for tensor in weight.tensors}
        return dtypes.pop() if len(dtypes) == 1 and weight.values is None else "f32"

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self._weights[name]
        shapes = [self._tensors[tensor].shape for tensor in weight.tensors]
        shape = shapes[0]
        if weight.rows is None and weight.values is not None:
            return weight.values.shape(*shapes)
        if weight.rows is not None:
            flat = _is_vector(weight, shape)
            rows = [np.empty((*(shape if flat else shape[:-1]), 0), np.int8) for shape in shapes]
            made = self._arranged(name, weight, rows).shape[:-1]
            shape = made if flat else (*made, shape[-1])
        return shape if weight.values is None else weight.values.shape(shape)

    def load(self, name: str) -> Array:
        weight = self._weights[name]
        dtype = NUMPY_DTYPES[self.dtype(name)]
        parts = [self._tensors.load(tensor).astype(dtype, copy=False) for tensor in weight.tensors]
        if weight.rows is None and weight.values is not None:
            return np.ascontiguousarray(weight.values(*parts))
        if weight.rows is None:
            (made,) = parts
        elif _is_vector(weight, parts[0].shape):  # rows of one number
            made = self._arranged(name, weight, [part[..., None] for part in parts])[..., 0]
        else:
            made = self._arranged(name, weight, parts)
        return np.ascontiguousarray(made if weight.values is None else weight.values(made))

    def integers(self, name: str) -> StoredIntegers | None:
        """A weight's integers, where the types of all of its tensors are kept as such."""
        weight = self._weights[name]
        kinds = {self._tensors[tensor].kind for tensor in weight.tensors}
        kind = kinds.pop()
        shape = self.shape(name)
        if kinds or weight.values is not None or kind.name not in stored.KINDS or len(shape) != 2:
            return None
        known = stored.KINDS[kind.name]
        blocks, rounded = (shape[0], shape[1] // known.group), kind.block > known.group

        def part(of: Callable[[TensorType, Bytes], Array], shape: tuple[int, ...], dtype: str) -> Part:
            def load() -> Array:
                found = [of(kind, self._tensors.blocks(tensor)) for tensor in weight.tensors]
                return np.ascontiguousarray(found[0] if weight.rows is None else self._arranged(name, weight, found))

            return Part(shape, dtype, load)

        return StoredIntegers(
            q=part(stored.integers, shape, "i8" if known.zero == 0 else "u8"),
            scales=part(stored.scales, blocks, "f32" if rounded else "f16"),
            zeros=part(stored.zeros, blocks, "f32") if known.zero is None else known.zero or None,
            block=known.group,
            bits=known.bits,
            what=f"{known.bits} bits ({kind.name}{', scales rounded to f16' if rounded else ''})",
        )

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """The file's tensors that a weight is made of."""
        return self._weights[name].tensors

    def least(self) -> dict[str, str]:
        """How finely weights are rounded at least, by name: those that the file has rounded, and that are not kept."""
        found = {}
        for name, weight in self._weights.items():
            kept = self.integers(name) is not None
            kinds = [self._tensors[tensor].kind.name for tensor in weight.tensors]
            schemes = [stored.least_scheme(kind, kept) for kind in kinds]
            known = [scheme for scheme in schemes if scheme is not None]
            if known and len(self.shape(name)) == 2:
                found[name] = max(known)  # int4 < int5 < int6 < int8
        return found

    def _arranged(self, name: str, weight: Weight, parts: list[Array]) -> Array:
        assert weight.rows is not None
        try:
            return weight.rows(parts)
        except ValueError as error:
            listed = ", ".join(f"{tensor} {list(self._tensors[tensor].shape)}" for tensor in weight.tensors)
            raise FrontendError(f"weight {name} cannot be made of {listed}: {error}") from error


def _is_vector(weight: Weight, shape: tuple[int, ...]) -> bool:
    """Whether the tensors have no axis of inputs: a bias has one number a row, or a row of each expert."""
    return len(shape) == 1 or weight.tensors[0].endswith(".bias")
