"""Values and ops. An op is one frozen dataclass; printer, parser and verifier are derived from its fields.

A graph is a web of values: an op *is* the value that it computes, its operands are other values. Fields annotated
`Value`, `Value | None` or `tuple[Value, ...]` are operands; every other field is an attribute.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from llmc.compiler.ir.dims import Dim, substitute
from llmc.compiler.ir.types import KV, Array, Shape, Tensor, Type
from llmc.errors import IRError

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:  # what a type checker needs, and nothing at run time

    def dataclass_transform(**_: object) -> Callable[[type], type]:
        return lambda cls: cls


class Value:
    """Anything with a type that an op can use. Compared by identity."""

    type: Type

    @property
    def tensor(self) -> Tensor:
        """The tensor type; IRError if this is a KV cache."""
        if not isinstance(self.type, Tensor):
            raise IRError(f"expected a tensor, found {self.type}")
        return self.type

    @property
    def kv(self) -> KV:
        """The cache type; IRError if this is a tensor."""
        if not isinstance(self.type, KV):
            raise IRError(f"expected a KV cache, found {self.type}")
        return self.type

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def rank(self) -> int:
        return len(self.tensor.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Input(Value):
    """What a caller passes at every step."""

    name: str
    type: Type


@dataclasses.dataclass(frozen=True, eq=False)
class Param(Value):
    """A weight of the model: known when compiling, read from the checkpoint by name only when needed."""

    name: str
    type: Type


class Tokens(enum.Enum):
    """What an op does along the axis of its operands that counts tokens. Every op declares it, and passes that handle
    tokens use nothing else of an op.
    """

    ELEMENTS = "each element alone; operands broadcast as numpy's do"
    ROWS = "each row of the last axis alone; other operands than the first one, where they are no rows, are weights"
    FIRST = "tokens are on axis 0, and each one is treated alone"
    AXES = "each line along `axis`, or each part that `axes` span, alone"
    MOVES = "elements change places only: each such op has a rule in `passes/flatten_tokens.py`"
    MIXES = "tokens meet, or are counted"
    WEIGHTS = "computed when compiling: no token gets there"


@dataclasses.dataclass(frozen=True)
class Lookup:
    """An operand of an op that says where in another one it reads or writes: `field` holds integers, each a place in
    `axis` of `table`, from 0 to its size - 1."""

    field: str
    table: Value
    axis: int = 0

    @property
    def size(self) -> int | Dim:
        """How many places there are."""
        return self.table.shape[self.axis]


REGISTRY: dict[str, type[Op]] = {}

_Self = TypeVar("_Self", bound="Op")


@dataclass_transform(frozen_default=True, eq_default=False)
class Op(Value):
    """Base of all ops: `class Exp(Op, name="t.exp")`. The prefix of the name is the op's level (t, llm, k).

    tokens: what it does to tokens; every op, or the class that it comes from, says so. vectors: operands of few numbers
    that kernels want in f32. in_place: the operand whose memory its kernels change into the result; empty: none. Such
    an operand has no other user.
    """

    name: ClassVar[str] = ""
    tokens: ClassVar[Tokens]
    vectors: ClassVar[tuple[str, ...]] = ()
    in_place: ClassVar[str] = ""
    _operand_fields: ClassVar[tuple[str, ...]] = ()
    _attribute_fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, name: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        if not name:
            return
        if name in REGISTRY:
            raise IRError(f"two ops are called {name}")
        if not hasattr(cls, "tokens"):
            raise IRError(f"{name} does not say what it does to tokens: give it `tokens = Tokens....` (ir/op.py)")
        cls.name = name
        kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a dataclass since above
        cls._operand_fields = tuple(key for key, kind in kinds.items() if "Value" in kind)
        cls._attribute_fields = tuple(key for key, kind in kinds.items() if "Value" not in kind)
        REGISTRY[name] = cls

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "type", self.infer())
        except IRError as error:
            operands = ", ".join(str(value.type) for value in self.operands)
            error.args = (f"{self.name}({operands}): {error}",)
            raise

    @property
    def level(self) -> str:
        return self.name.partition(".")[0]

    @property
    def carries(self) -> bool:
        """Whether the result's elements are those of its operands, moved or each changed for itself: what is said of
        one computed operand, such as that it is a head's logits, is true of the result."""
        return self.tokens in (Tokens.ELEMENTS, Tokens.MOVES)

    def infer(self) -> Type:
        """The result's type; IRError when the operands break a rule of the op."""
        raise IRError(f"{self.name} does not say its result's type")

    # `Any` is mypy's spelling of "each op states its own signature".
    def evaluate(self, *operands: Any, **_: Any) -> Any:
        """The op's meaning in numpy: slow and obvious. Operands in field order, an absent one as None."""
        raise IRError(f"{self.name} has no numpy meaning")

    def decompose(self) -> Value | None:
        """The same value in simpler ops; None for an op that is primitive."""
        return None

    def lookups(self) -> tuple[Lookup, ...]:
        """Which operands are places in another one: every op that reads or writes where an operand says names them."""
        return ()

    def named_operands(self) -> Iterator[tuple[str, Value | tuple[Value, ...] | None]]:
        """Operand fields as they stand."""
        for key in self._operand_fields:
            yield key, getattr(self, key)

    @property
    def operands(self) -> tuple[Value, ...]:
        """All operand values, flat, absent ones left out."""
        found: list[Value] = []
        for key in self._operand_fields:
            value = getattr(self, key)
            if isinstance(value, tuple):
                found.extend(value)
            elif value is not None:
                found.append(value)
        return tuple(found)

    def attributes(self) -> dict[str, object]:
        """Attribute fields by name, in declaration order."""
        return {key: getattr(self, key) for key in self._attribute_fields}

    def replace(self: _Self, **changes: object) -> _Self:
        """A copy with some fields changed, inferred anew."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]  # every op is a dataclass

    def map_operands(self: _Self, mapping: Callable[[Value], Value]) -> _Self:
        """The op over mapped operands; itself when nothing changed."""
        changes: dict[str, object] = {}
        for key in self._operand_fields:
            value = getattr(self, key)
            if value is None:
                continue
            if isinstance(value, tuple):
                mapped = tuple(mapping(item) for item in value)
                if any(a is not b for a, b in zip(mapped, value, strict=True)):
                    changes[key] = mapped
            else:
                new = mapping(value)
                if new is not value:
                    changes[key] = new
        return self.replace(**changes) if changes else self

    def bind(self: _Self, binding: Mapping[str, int | Dim]) -> _Self:
        """A copy whose attributes have symbols replaced (the type is not inferred anew: for evaluation only)."""
        changes = {}
        for key, value in self.attributes().items():
            bound = _bind(value, binding)
            if bound is not value:
                changes[key] = bound
        if not changes:
            return self
        copy = object.__new__(type(self))
        for key in (*self._operand_fields, *self._attribute_fields):
            object.__setattr__(copy, key, changes.get(key, getattr(self, key)))
        object.__setattr__(copy, "type", self.type)
        return copy

    def __repr__(self) -> str:
        attributes = ", ".join(f"{k}={v!r}" for k, v in self.attributes().items())
        return f"<{self.name} {attributes} : {self.type}>"


def _bind(value: object, binding: Mapping[str, int | Dim]) -> object:
    if isinstance(value, Dim):
        return substitute(value, binding)
    if isinstance(value, tuple) and any(isinstance(item, (Dim, tuple)) for item in value):
        return tuple(_bind(item, binding) for item in value)
    return value


class Dense:
    """An immutable array as an attribute; equal when dtype, shape and bytes are."""

    __slots__ = ("array",)

    def __init__(self, array: Array) -> None:
        self.array = np.array(array, order="C")
        self.array.setflags(write=False)

    def _key(self) -> tuple[str, tuple[int, ...], bytes]:
        return str(self.array.dtype), self.array.shape, self.array.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dense) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Dense({self.array.dtype}{list(self.array.shape)})"
