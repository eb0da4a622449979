"""Weights that a checkpoint holds as integers enter the graph as what they are: integers, scales and zero points.

A format's reader describes each weight (`StoredIntegers`), and `keep_stored` puts that in the place of the param in a
lifted graph. The passes then keep the integers where a linear op or an embedding reads them (`keep-integers`). What is
no uniform integers, such as a table's entries or floats of 8 bits, a reader serves as floats (`Part`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from llmc.compiler.ir.elementwise import Cast, constant
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.integers import ScaleIntegers, UnpackNibbles
from llmc.compiler.ir.op import Param, Value
from llmc.compiler.ir.structural import Gather, Transpose
from llmc.compiler.ir.types import FLOATS, INTEGERS, Array, Tensor
from llmc.errors import FrontendError
from llmc.frontends.lifted import WeightSource
from llmc.frontends.weight_sources import LayeredWeights


@dataclass(frozen=True)
class Part:
    """An array that is read when asked for. `load` gives it in this shape and IR dtype."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Array]


@runtime_checkable
class IntegerSource(Protocol):
    """What a source has beside its arrays, if some of them are stored as integers."""

    def integers(self, name: str) -> StoredIntegers | None:
        """A weight's integers; None where it has none."""


@dataclass(frozen=True)
class StoredIntegers:
    """A weight [outputs, inputs], f32: (q - zeros) * scales, with the columns in the place that `order` says.

    q: u8 or i8 [outputs, inputs]. scales: floats [outputs, ceil(inputs / block)], each for `block` inputs of a row, or
    [outputs, 1] or [1, 1] for all of them (block 0). zeros: in the shape of the scales, integers or floats; a number is
    for all, None is 0. bits: of each integer in the file, as q may have more room: u8 of 4 bits or less is 0 to
    2^bits - 1. order: i32 [inputs], a permutation, where the file has the inputs in an order of its own: column j of q
    is that of input order[j]. what: the format in words, for notes, such as "4 bits (gptq)".
    """

    q: Part
    scales: Part
    zeros: Part | int | None
    block: int
    bits: int
    what: str
    order: Part | None = None

    def __post_init__(self) -> None:
        rows, inputs = self.shape
        blocks = -(-inputs // self.block) if self.block else 1
        fits = [(rows, blocks), (1, blocks)]
        if self.q.dtype not in ("u8", "i8") or not 1 <= self.bits <= 8:
            raise FrontendError(f"integers of {self.bits} bits as {self.q.dtype}: only i8 and u8 are known")
        if self.scales.shape not in fits or self.scales.dtype not in FLOATS:
            raise FrontendError(
                f"scales are {self.scales.dtype} {list(self.scales.shape)}, for integers of [{rows}, {inputs}] in "
                f"blocks of {self.block or inputs} they are floats [{rows}, {blocks}]"
            )
        if isinstance(self.zeros, Part) and (
            self.zeros.shape not in fits or self.zeros.dtype not in (*FLOATS, *INTEGERS)
        ):
            raise FrontendError(f"zero points are {self.zeros.dtype} {list(self.zeros.shape)}, not [{rows}, {blocks}]")
        if self.order is not None and (self.order.shape != (inputs,) or self.order.dtype != "i32"):
            raise FrontendError(f"the order of inputs is {self.order.dtype} {list(self.order.shape)}, not [{inputs}]")

    @property
    def shape(self) -> tuple[int, int]:
        """[outputs, inputs]."""
        rows, inputs = self.q.shape
        return rows, inputs

    def dequantized(self) -> Array:
        """What the integers stand for, f32 [outputs, inputs]."""
        q = self.q.load().astype(np.float32)
        if self.zeros is not None:
            zeros = self.zeros.load() if isinstance(self.zeros, Part) else np.array([[self.zeros]])
            q -= self._whole(zeros.astype(np.float32))
        q *= self._whole(self.scales.load().astype(np.float32))
        return q if self.order is None else q[:, np.argsort(self.order.load())]

    def _whole(self, values: Array) -> Array:
        """One column for each of the inputs, or for all of them."""
        if not self.block or values.shape[1] == 1:
            return values
        return np.repeat(values, self.block, axis=1)[:, : self.shape[1]]


def stored_integers(source: WeightSource, name: str) -> StoredIntegers | None:
    """What a weight of a source is stored as, if that is integers, and the source says so."""
    return source.integers(name) if isinstance(source, IntegerSource) else None


class StoredWeights:
    """A checkpoint in a format of quantized weights, as a source of the weights that they stand for, f32.

    integers, floats: what the format makes, by the name of the weight. parts: the file's own tensors that these are
    made of, which are no weights by themselves. The rest is `file`'s. of_linears: weights that are made, [outputs,
    inputs] whatever the model's own layers have.
    """

    def __init__(
        self,
        file: WeightSource,
        integers: Mapping[str, StoredIntegers],
        floats: Mapping[str, Part],
        parts: Collection[str],
    ) -> None:
        self._file, self._integers, self._floats = file, dict(integers), dict(floats)
        made = [*self._integers, *self._floats]
        kept = [name for name in file.names if name not in set(parts)]
        for name in sorted({*kept} & {*made}):
            raise FrontendError(f"the checkpoint holds weight {name!r:.100} twice, quantized and as it is")
        self._names = [*kept, *made]
        self.of_linears: frozenset[str] = frozenset(made)

    @property
    def names(self) -> Iterable[str]:
        return self._names

    def dtype(self, name: str) -> str:
        if name in self._integers:
            return "f32"
        return self._floats[name].dtype if name in self._floats else self._file.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._integers:
            return self._integers[name].shape
        return self._floats[name].shape if name in self._floats else self._file.shape(name)

    def load(self, name: str) -> Array:
        with np.errstate(all="ignore"):  # numbers that are not finite are refused by who asks for the weight
            if name in self._integers:
                return self._integers[name].dequantized()
            return self._floats[name].load() if name in self._floats else self._file.load(name)

    def integers(self, name: str) -> StoredIntegers | None:
        return self._integers.get(name)


def keep_stored(
    graph: Graph, source: WeightSource, stored: Mapping[str, StoredIntegers], turned: Collection[str] = ()
) -> tuple[Graph, WeightSource]:
    """The graph with params that are stored as integers made of these, and where its params come from.

    turned: params [inputs, outputs], the transpose of what is stored. A weight `name` becomes params `name.q`,
    `name.scales`, `name.zeros` and `name.places`.
    """
    parts = _Parts()
    replaced: dict[Value, Value] = {}
    for param in graph.params:
        found = stored.get(param.name)
        if found is None:
            continue
        weight = parts.weight(param.name, found)
        weight = Transpose(weight, (1, 0)) if param.name in turned else weight
        if weight.shape != param.shape:
            raise FrontendError(f"weight {param.name} is stored as {list(weight.shape)}, not {list(param.shape)}")
        replaced[param] = weight if weight.dtype == param.dtype else Cast(weight, param.dtype)
    if not replaced:
        return graph, source
    return substitute_values(graph, replaced), LayeredWeights(parts, source)


def stored_notes(stored: Iterable[StoredIntegers]) -> tuple[str, ...]:
    """What a user should know of weights that come as integers: which, how many, and that -q is for the others."""
    counts: dict[str, int] = {}
    for weight in stored:
        blocks = f"blocks of {weight.block} inputs" if weight.block else "a scale for each output"
        if weight.block == 0 and weight.scales.shape[0] == 1:
            blocks = "one scale"
        order = ", inputs in an order of their own" if weight.order is not None else ""
        kind = f"{weight.what}, {blocks}{order}"
        counts[kind] = counts.get(kind, 0) + 1
    return tuple(
        f"{count} weight{'s' if count > 1 else ''} of the checkpoint are integers: {kind}. Where an encoding holds "
        "them they are kept: -q and --override are for the other weights"
        for kind, count in counts.items()
    )


class _Parts:
    """The parts of stored weights as a source."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[str, Part]] = {}
        self._places: dict[bytes, Param] = {}

    def weight(self, name: str, stored: StoredIntegers) -> Value:
        """The weight f32 [outputs, inputs] as a value of params."""
        scales: Value = self._param(f"{name}.scales", name, stored.scales)
        if scales.dtype != "f32":
            scales = Cast(scales, "f32")
        zeros: Value | None = None
        if isinstance(stored.zeros, Part):
            zeros = self._param(f"{name}.zeros", name, stored.zeros)
        elif stored.zeros:
            zeros = constant([[stored.zeros]], "u8" if stored.zeros > 0 else "i8")
        weight: Value = ScaleIntegers(self._integers(name, stored), scales, zeros, 1, stored.block)
        return weight if stored.order is None else Gather(weight, self._inverse(name, stored.order), 1)

    def _integers(self, name: str, stored: StoredIntegers) -> Value:
        """Half bytes where they fit, so that whoever sees them knows their range without reading them."""
        rows, inputs = stored.shape
        if stored.q.dtype != "u8" or stored.bits != 4 or inputs % 2 or not inputs:
            return self._param(f"{name}.q", name, stored.q)
        load = stored.q.load

        def packed() -> Array:
            q = load()
            return np.asarray(q[:, 0::2] | (q[:, 1::2] << np.uint8(4)))

        return UnpackNibbles(self._param(f"{name}.q", name, Part((rows, inputs // 2), "u8", packed)))

    def _inverse(self, name: str, order: Part) -> Param:
        """Where each input's column lies; one param for all weights in the same order."""
        given = order.load()
        if not np.array_equal(np.sort(given), np.arange(len(given))):
            raise FrontendError(f"weight {name}: the order of its inputs does not name each of them once")
        places = np.argsort(given).astype(np.int32)
        key = places.tobytes()
        if key not in self._places:
            self._places[key] = self._param(f"{name}.places", name, Part(places.shape, "i32", lambda: places))
        return self._places[key]

    def _param(self, name: str, weight: str, part: Part) -> Param:
        self._parts[name] = (weight, part)
        return Param(name, Tensor(part.shape, part.dtype))

    @property
    def names(self) -> Iterable[str]:
        return self._parts.keys()

    def dtype(self, name: str) -> str:
        return self._parts[name][1].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[name][1].shape

    def load(self, name: str) -> Array:
        weight, part = self._parts[name]
        array = part.load()
        if array.shape != part.shape:
            raise FrontendError(f"weight {weight}: {name} is {list(array.shape)}, expected {list(part.shape)}")
        if part.dtype in FLOATS and not np.isfinite(array.astype(np.float32)).all():
            raise FrontendError(
                f"weight {weight}: its scales or zero points hold NaN or infinity: the checkpoint is damaged or was "
                "never whole; download it again"
            )
        return array
