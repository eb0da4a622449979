"""Draws hard models from the grammar: a seed is a model, made of plain parts but for one to three."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hard_models.parts import (
    ARRAYS,
    BIAS,
    DECODER,
    ENCODER,
    FFN,
    GRAMMAR,
    GUARD,
    HEAD,
    HEADS,
    MASK,
    MIXER,
    NORM,
    PLACES,
    RESIDUAL,
    ROPE,
    SCALE,
    SLOTS,
    SOFTMAX,
    Part,
    Room,
)  # fmt: skip

for _module in ("masks", "scores", "rotations", "blocks"):
    importlib.import_module(f"hard_models.{_module}")  # enters its parts

# How often a slot is the one that has something unusual.
_WEIGHTS = {
    MASK: 26, BIAS: 14, SCALE: 14, SOFTMAX: 6, GUARD: 5, ROPE: 20, PLACES: 8, HEADS: 8, NORM: 6, FFN: 7, RESIDUAL: 6,
    MIXER: 5, HEAD: 5,
}  # fmt: skip
_IN_ARRAYS = (MASK, BIAS, SCALE, SOFTMAX, GUARD)
ONNX, TORCH = "onnx", "torch"
FILLS = ("lowest", "-inf", "-1e9", "-1e4", "add lowest", "add -1e9", "add -inf", "by product")


@dataclass(frozen=True)
class Spec:
    """A model: its parts by slot, and plain facts.

    seed: what was asked for, and drawn_as: what the model was drawn as. spelling: seed of the ways in which ONNX nodes
    are written.
    """

    seed: int
    drawn_as: int
    kind: str
    style: str
    parts: Mapping[str, Part]
    unusual: tuple[str, ...]
    heads: int
    layers: int
    value_dim: int
    sharpness: float
    causal_way: int
    fill: str
    positions: str
    ahead: bool = False  # whether a mask says itself what is seen ahead
    spelling: int | None = None

    @property
    def room(self) -> Room:
        """What parts know of it."""
        return Room(self.kind, self.heads, self.layers)

    def without(self, slot: str) -> Spec:
        """The same model with the plain part of a slot."""
        plain = GRAMMAR[slot][0][0](random.Random(self.drawn_as), self.room)
        return replace(self, parts={**self.parts, slot: plain}, ahead=self.ahead and slot != MASK)

    def __str__(self) -> str:
        listed = ", ".join(f"{slot}: {self.parts[slot]}" for slot in self.unusual) or "plain"
        return f"seed {self.seed}, {self.style} {self.kind} of {self.layers}: {listed}"


_AHEAD = ("stored block ahead", "prefix ahead")


def style_of(seed: int) -> str:
    """One model in eight is a torch module."""
    return TORCH if seed % 8 == 7 else ONNX


def draw(seed: int, style: str) -> Spec:
    """The model of a seed. style: "onnx", or "torch", where all models are decoders."""
    r = random.Random(seed)
    kind = r.choices((DECODER, ENCODER, ARRAYS), (10, 3, 2))[0] if style == ONNX else DECODER
    room = Room(kind, r.choice((4, 4, 2)), 1 if kind == ARRAYS else r.choice((1, 2, 2)))
    slots = [slot for slot in SLOTS if kind != ARRAYS or slot in _IN_ARRAYS]
    count = r.choices((1, 2, 3), (5, 4, 2))[0]
    unusual: list[str] = []
    while len(unusual) < min(count, len(slots)):
        slot = r.choices(slots, [_WEIGHTS[slot] for slot in slots])[0]
        if slot not in unusual:
            unusual.append(slot)
    parts = {slot: _part(slot, r, room, slot in unusual) for slot in SLOTS}
    return Spec(
        seed, seed, kind, style, parts, tuple(unusual), room.heads, room.layers,
        value_dim=r.choice((8, 8, 8, 8, 8, 16, 5)),
        sharpness=r.choice((0.7, 1.0, 1.4)),
        causal_way=r.choice((0, 0, 0, 1, 2, 3, 4, 5, 6, 7)),
        fill=r.choice(FILLS),
        positions=r.choice(("range", "range", "input", "cumsum")),
        ahead=kind == DECODER and parts[MASK].name in _AHEAD,
        spelling=r.randrange(1 << 30) if r.random() < 0.6 else None,
    )  # fmt: skip


def _part(slot: str, r: random.Random, room: Room, unusual: bool) -> Part:
    """A part: the slot's first drawer is the plain one. A rotation is not unusual in itself."""
    drawers = [drawer for drawer, kinds in GRAMMAR[slot] if room.kind in kinds]
    if unusual and len(drawers) > 1:
        return r.choice(drawers[1:])(r, room)
    if slot == ROPE and room.kind != ARRAYS and r.random() < 0.4:
        return drawers[1](r, room)
    if slot == HEADS and room.kind != ARRAYS and r.random() < 0.3:
        return drawers[1](r, room)
    return drawers[0](r, room)


__all__ = ["FFN", "HEAD", "NORM", "ONNX", "RESIDUAL", "TORCH", "Spec", "draw"]
