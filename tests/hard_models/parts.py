"""What a hard model is made of: parts that fill slots, written once over tensor functions that ONNX and torch have."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Tensor = Any  # an `ops_onnx.Value`, or a torch tensor: both have Python's operators
Ops = Any  # `ops_onnx.OnnxOps` or `ops_torch.TorchOps`

MASK, BIAS, SCALE, SOFTMAX, GUARD, ROPE, PLACES = "mask", "bias", "scale", "softmax", "guard", "rope", "places"
HEADS, NORM, FFN, RESIDUAL, MIXER, HEAD = "heads", "norm", "ffn", "residual", "mixer", "head"
SLOTS = (MASK, BIAS, SCALE, SOFTMAX, GUARD, ROPE, PLACES, HEADS, NORM, FFN, RESIDUAL, MIXER, HEAD)

DECODER, ENCODER, ARRAYS = KINDS = ("decoder", "encoder", "arrays")
VOCABULARY, WIDTH, DIM, ROWS = 61, 32, 8, 512  # ids; features, those of a head; rows of stored tables, the most tokens


@dataclass(frozen=True)
class Part:
    """One choice for a slot. build: writes it (its arguments depend on the slot). facts: parameters, for reports.

    shows: whether a model without it computes something else, so that a part that was lost would be seen.
    """

    name: str
    build: Callable[..., Tensor]
    facts: Mapping[str, object] = field(default_factory=dict)
    shows: bool = True

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        return f"{self.name}({facts})" if facts else self.name


@dataclass(frozen=True)
class Room:
    """What a part may need to know when it is drawn."""

    kind: str
    heads: int
    layers: int

    @property
    def looks_back(self) -> bool:
        """Whether tokens see only those before."""
        return self.kind == DECODER


@dataclass
class Place:
    """Where a part is being written: in which layer, over which positions.

    positions: i64[S]. q, k: the same as a column [S, 1] and as a row [1, S]. length: i64 scalar. ids: i64[B, S].
    padding: i64[B, S], 1 where a token is none; None where the model is not given it.
    """

    m: Ops
    layer: int
    heads: int
    positions: Tensor
    q: Tensor
    k: Tensor
    length: Tensor
    ids: Tensor = None
    padding: Tensor = None

    @property
    def d(self) -> Tensor:
        """How far back a key lies: i64[S, S]."""
        return self.q - self.k


Drawer = Callable[[random.Random, Room], "Part"]
GRAMMAR: dict[str, list[tuple[Drawer, tuple[str, ...]]]] = {slot: [] for slot in SLOTS}


def part(slot: str, *kinds: str) -> Callable[[Drawer], Drawer]:
    """Enter a function that draws a part of a slot, for the kinds of models that can have it (default: all)."""

    def enter(drawer: Drawer) -> Drawer:
        GRAMMAR[slot].append((drawer, kinds or KINDS))
        return drawer

    return enter


def far(r: random.Random, low: int = 2, high: int = 290) -> int:
    """A position or distance: small ones, those around 32, 64 and 128, and all others up to near the end."""
    choice = r.random()
    if choice < 0.25:
        return r.randint(low, max(low, min(12, high)))
    if choice < 0.5:
        return min(high, max(low, r.choice((16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 256, 257))))
    return r.randint(low, high)
