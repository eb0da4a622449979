"""Steps over arrays of any kind: inputs are checked, sizes are read off their shapes, outputs are new arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.device import Buffer, Device, Place, Use
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.manifest import ArrayFacts
from llmc.runtime.profile import StepSizes
from llmc.runtime.sizes import names_of, show, value_of
from llmc.runtime.step_call import StepCaller

BFLOAT16 = "bfloat16"  # numpy has no such dtype: what goes in is rounded from float32, and comes out as that

Array = NDArray[np.generic]


class ArrayRunner(StepCaller):
    """Runs a graph of any kind. One thread at a time."""

    def __init__(self, artifact: Artifact, device: Device, weights: Place) -> None:
        super().__init__(artifact, device, weights)
        self.inputs = artifact.manifest.inputs
        self.outputs = artifact.manifest.outputs
        self.symbols = artifact.manifest.symbols
        self._buffers: dict[str, Buffer] = {}
        self._given = self.table("inputs", (max(1, len(self.inputs)),), np.uint64)
        self._wanted = self.table("outputs", (max(1, len(self.outputs)),), np.uint64)
        self._dims = self.table("dims", (max(1, len(self.symbols)),), np.int64)

    def run(self, given: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """The outputs by name, as new arrays. Raises `RuntimeStateError` for inputs that do not fit."""
        arrays = self._checked(given)
        binding = self.bind({name: array.shape for name, array in arrays.items()})
        shapes = [tuple(self._size(facts, value_of(size, binding)) for size in facts.shape) for facts in self.outputs]
        dtypes = [_stored(facts.dtype) for facts in self.outputs]
        kept = [self._uploaded(facts.name, arrays[facts.name]) for facts in self.inputs]
        places = self.results(shapes, dtypes)
        self._given[: len(kept)] = [place.number for place in kept]
        self._wanted[: len(places)] = [place.number for place in places]
        self._dims[: len(self.symbols)] = [binding[symbol.name] for symbol in self.symbols]
        self.call()
        if self.profiling:
            self.profiled.append(StepSizes(named=binding))
        results = map(self.device.fetch, places, shapes, dtypes)
        return {
            facts.name: widened(array) if facts.dtype == BFLOAT16 else array
            for facts, array in zip(self.outputs, results, strict=True)
        }

    @staticmethod
    def _size(facts: ArrayFacts, size: int) -> int:
        if size < 0:
            raise RuntimeStateError(f"these inputs are too small: output {facts.name} would have a size of {size}")
        return size

    def _checked(self, given: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Inputs by name, of the right dtype and rank."""
        wanted = ", ".join(map(describe, self.inputs)) or "none"
        known = {facts.name for facts in self.inputs}
        if not isinstance(given, Mapping):
            raise RuntimeStateError(f"inputs are a dict from names to arrays; wanted: {wanted}")
        missing = [facts.name for facts in self.inputs if facts.name not in given]
        if missing:
            raise RuntimeStateError(f"input {', '.join(missing)} is missing; wanted: {wanted}")
        unknown = [str(name) for name in given if name not in known]
        if unknown:
            raise RuntimeStateError(f"there is no input {', '.join(unknown)}; wanted: {wanted}")
        return {facts.name: _as_wanted(facts, given[facts.name]) for facts in self.inputs}

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The value of every named size, from the shapes of all inputs. Raises `RuntimeStateError` where they differ
        from what the graph wants, from each other, or are beyond what was planned for."""
        binding: dict[str, int] = {}
        source: dict[str, str] = {}
        places = [
            (facts, size, found)
            for facts in self.inputs
            for size, found in zip(facts.shape, shapes[facts.name], strict=True)
        ]
        for facts, size, found in places:
            if len(size) == 1 and names_of(size):
                (name,) = names_of(size)
                if binding.setdefault(name, found) != found:
                    raise RuntimeStateError(
                        f"{name} is {binding[name]} in {source[name]} and {found} in {facts.name}: they must be equal"
                    )
                source.setdefault(name, facts.name)
        for facts, size, found in places:  # a size that is only part of others, such as `2*n + 1`
            free = names_of(size) - binding.keys()
            if len(free) == 1:
                (name,) = free
                start = value_of(size, {**binding, name: 0})
                slope = value_of(size, {**binding, name: 1}) - start
                binding[name] = max(0, (found - start) // slope) if slope else 0
                source[name] = facts.name
        for symbol in self.symbols:
            if symbol.name not in binding:
                raise RuntimeStateError(f"no input says how large {symbol.name} is: compile the model again")
            self._check_range(symbol.name, binding[symbol.name], symbol.low, symbol.high, source[symbol.name])
        for facts, size, found in places:
            if value_of(size, binding) != found:
                raise RuntimeStateError(
                    f"input {facts.name} must be {describe(facts, short=True)}, and has shape "
                    f"{list(shapes[facts.name])}"
                )
        return binding

    @staticmethod
    def _check_range(name: str, value: int, low: int, high: int, source: str) -> None:
        if value < low:
            raise RuntimeStateError(f"{name} is {value} in {source}, and must be at least {low}")
        if value > high:
            raise RuntimeStateError(
                f"{name} is {value} in {source}, and the model was compiled for {high} at most: "
                f"compile it with --max-dim {name}={value}"
            )

    def _uploaded(self, name: str, array: Array) -> Place:
        """Where the device finds the array: where it is, or in a buffer that is kept for the next run."""
        if self.device.reads_in_place(array):
            return self.device.upload(array)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < array.nbytes:
            buffer = self._buffers[name] = self.device.reserve(array.nbytes, Use.RESULT)
        return self.device.upload(array, buffer.at())


def describe(facts: ArrayFacts, short: bool = False) -> str:
    """`pixels float32 [batch, 3, 2*side]`; short: without the name."""
    shape = ", ".join(show(size) for size in facts.shape)
    return f"{facts.dtype} [{shape}]" if short else f"{facts.name} {facts.dtype} [{shape}]"


def _as_wanted(facts: ArrayFacts, value: ArrayLike) -> Array:
    """An input of the right dtype and rank. Lists and numbers take the dtype that is wanted where nothing is lost;
    arrays must have it."""
    wanted = np.dtype(np.float32) if facts.dtype == BFLOAT16 else np.dtype(facts.dtype)
    fits = "must be " + describe(facts, short=True)
    given = isinstance(value, (np.ndarray, np.generic))
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # a ragged list; a tensor of another library
        raise RuntimeStateError(f"input {facts.name} {fits}, and is no array: {error}") from error
    if facts.dtype == BFLOAT16 and array.dtype.name == BFLOAT16:
        array = array.view(np.uint16)
        wanted = array.dtype
    elif array.dtype != wanted:
        if given:
            raise RuntimeStateError(
                f"input {facts.name} {fits}, and is {array.dtype}: give {facts.name}.astype('{wanted}')"
            )
        if not (array.size == 0 or np.can_cast(array.dtype, wanted, "same_kind") or _holds(array, wanted)):
            raise RuntimeStateError(f"input {facts.name} {fits}, and its values are {array.dtype}")
        array = array.astype(wanted)
    if array.ndim != len(facts.shape):
        raise RuntimeStateError(f"input {facts.name} {fits}, and has shape {list(array.shape)}")
    if facts.dtype == BFLOAT16 and array.dtype != np.uint16:
        array = rounded(array)
    return array


def _holds(array: Array, wanted: np.dtype[np.generic]) -> bool:
    """Whether a dtype has all the values of an array of integers."""
    if array.dtype.kind not in "iub" or wanted.kind not in "iuf":
        return False
    return bool((array.astype(wanted) == array).all())


def _stored(dtype: str) -> np.dtype[np.generic]:
    return np.dtype(np.uint16) if dtype == BFLOAT16 else np.dtype(dtype)


def rounded(array: Array) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers (ties to even) of float32 numbers; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    near = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), near).reshape(array.shape)


def widened(bits: Array) -> NDArray[np.float32]:
    """float32 numbers from the bits of bfloat16 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
