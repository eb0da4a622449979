"""Positions: rotations of queries and keys by many laws, and tables of positions that are added to embeddings."""

from __future__ import annotations

import random

import numpy as np

from hard_models.parts import (
    DECODER,
    DIM,
    ENCODER,
    PLACES,
    ROPE,
    ROWS,
    WIDTH,
    Part,
    Place,
    Room,
    Tensor,
    far,
    part,
)

TEXT = (DECODER, ENCODER)


def frequencies(pairs: int, base: float = 100.0) -> np.ndarray:
    """Radians a position of each pair of features."""
    return (base ** (-np.arange(pairs) / pairs)).astype(np.float32)


def rotate(p: Place, x: Tensor, angles: Tensor, interleaved: bool = False, factor: Tensor | None = None) -> Tensor:
    """x [B, H, S, D] turned by angles [S, D / 2]: halves of the features are pairs, or neighbours are."""
    m, pairs = p.m, DIM // 2
    cos, sin = m.cos(angles), m.sin(angles)
    if factor is not None:
        cos, sin = cos * factor, sin * factor
    if interleaved:
        parts = m.reshape(x, 0, 0, 0, pairs, 2)
        a, b = (m.reshape(y, 0, 0, 0, pairs) for y in m.split(parts, [1, 1], axis=-1))
        turned = [m.unsqueeze(y, 4) for y in (a * cos - b * sin, b * cos + a * sin)]
        return m.reshape(m.concat(turned, -1), 0, 0, 0, 2 * pairs)
    a, b = m.split(x, [pairs, pairs])
    cos, sin = m.concat([cos, cos], -1), m.concat([sin, sin], -1)
    return x * cos + m.concat([-b, a], -1) * sin


def _angles(p: Place, positions: Tensor, law: np.ndarray | None = None) -> Tensor:
    return p.m.unsqueeze(p.m.f(positions), 1) * p.m.const((frequencies(DIM // 2) if law is None else law)[None])


def turning(name: str, angles: object, facts: dict[str, object], which: str = "qk") -> Part:
    """A part: build(place, x, "q" | "k" | "v") -> x turned. angles(place) -> f32[S, D / 2]."""
    interleaved = bool(facts.get("interleaved"))

    def build(p: Place, x: Tensor, what: str) -> Tensor:
        if what not in which:
            return x
        return rotate(p, x, angles(p), interleaved)  # type: ignore[operator]

    return Part(name, build, facts)


@part(ROPE)
def none(r: random.Random, room: Room) -> Part:
    return Part("plain", lambda p, x, what: x, shows=False)


@part(ROPE)
def rope(r: random.Random, room: Room) -> Part:
    way = r.random() < 0.4
    return turning("rope", lambda p: _angles(p, p.positions), {"interleaved": way})


@part(ROPE)
def partial_rope(r: random.Random, room: Room) -> Part:
    """Only half of the features are turned; or in the layer 0 only."""
    layers = r.random() < 0.4

    def build(p: Place, x: Tensor, what: str) -> Tensor:
        m = p.m
        if what == "v" or (layers and p.layer):
            return x
        if layers:
            return rotate(p, x, _angles(p, p.positions))
        turned, rest = m.split(x, [DIM // 2, DIM // 2])
        angle = m.unsqueeze(m.f(p.positions), 1) * m.const(frequencies(DIM // 4)[None])
        cos, sin = m.cos(angle), m.sin(angle)
        a, b = m.split(turned, [DIM // 4, DIM // 4])
        return m.concat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    return Part("partial rope", build, {"layers": layers})


@part(ROPE)
def rope_tables(r: random.Random, room: Room) -> Part:
    """Stored cosines and sines, regular or with something amiss from a row on."""
    way, n = r.choice(("regular", "slower", "one row", "halves", "scaled", "shifted")), far(r, 5, 280)
    shown = r.random() < 0.5  # rows sliced from the table, or gathered

    def build(p: Place, x: Tensor, what: str) -> Tensor:
        m = p.m
        if what == "v":
            return x
        at = np.arange(ROWS)[:, None]
        positions = {"slower": np.where(at < n, at, n + (at - n) / 4), "shifted": np.where(at < n, at, at + 7)}.get(
            way, at
        )
        angles = positions * frequencies(DIM // 2)
        angles = np.concatenate([angles, angles * (0.5 if way == "halves" else 1.0)], 1)
        if way == "one row":
            angles[n] += 1.5
        factor = np.where(at < n, 1.0, 1.5) if way == "scaled" else 1.0
        found = []
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            table = m.table(f"{name}_{way}", (function(angles) * factor).astype(np.float32))
            found.append(m.top(table, p.length, 0) if shown else m.rows(table, p.positions))
        a, b = m.split(x, [DIM // 2, DIM // 2])
        return x * found[0] + m.concat([-b, a], -1) * found[1]

    return Part("rope tables", build, {"way": way, "row": n})


@part(ROPE)
def switched_rope(r: random.Random, room: Room) -> Part:
    way, n = r.choice(("compare", "table", "length", "last", "ntk", "quotient")), far(r, 5, 280)
    interleaved = r.random() < 0.2

    def angles(p: Place) -> Tensor:
        m = p.m
        at, slow, fast = m.unsqueeze(m.f(p.positions), 1), frequencies(DIM // 2) / 4, frequencies(DIM // 2)
        plain = _angles(p, p.positions)
        if way == "compare":
            return m.where(at < float(n), plain, plain * 0.25)
        if way == "table":
            factors = np.where(np.arange(ROWS) < n, 1.0, 0.25).astype(np.float32)[:, None]
            return plain * m.rows(m.table("speed", factors), p.positions)
        if way in ("length", "last"):
            longest = p.length if way == "length" else m.reduce("Max", p.positions, 0, keep=False) + 1
            return at * m.where(longest > n, m.const(slow[None]), m.const(fast[None]))
        if way == "quotient":
            return plain / (m.floor(at / float(n)) + 1.0)
        ratio = m.maximum(m.f(p.length) / float(n), 1.0)  # dynamic NTK
        base = m.power(ratio * 2.0 - 1.0, float(DIM / (DIM - 2))) * 100.0
        return at * m.power(base, m.const((-np.arange(DIM // 2) / (DIM // 2)).astype(np.float32)[None]))

    return turning("switched rope", angles, {"way": way, "at": n, "interleaved": interleaved})


@part(ROPE)
def odd_positions(r: random.Random, room: Room) -> Part:
    way = r.choice(("offset", "divided", "clipped", "wrapped", "grouped", "reversed", "table", "rounded"))
    n, c = far(r, 5, 250), r.choice((2, 4, 7))

    def angles(p: Place) -> Tensor:
        m, at = p.m, p.positions
        ways = {
            "offset": lambda: at + n,
            "divided": lambda: m.f(at) / float(c),
            "clipped": lambda: m.minimum(at, n),
            "wrapped": lambda: at % n,
            "grouped": lambda: at // c,
            "reversed": lambda: p.length - 1 - at,
            "table": lambda: m.rows(m.table("places", (np.arange(ROWS) * (np.arange(ROWS) < n)).astype(np.int64)), at),
            "rounded": lambda: m.floor(m.f(at) / float(c)),
        }
        return _angles(p, ways[way]())

    return turning("odd positions", angles, {"way": way, "n": n, "c": c})


@part(ROPE)
def uneven_rope(r: random.Random, room: Room) -> Part:
    """Queries and keys are turned differently, or values too."""
    way, n = r.choice(("queries", "keys", "offset", "frequency", "values", "layers", "opposite")), far(r, 1, 60)

    def build(p: Place, x: Tensor, what: str) -> Tensor:
        plain = _angles(p, p.positions)
        if what == "v":
            return rotate(p, x, plain) if way == "values" else x
        other = what == "k" or (way == "layers" and p.layer > 0)
        if (way == "queries" and what == "k") or (way == "keys" and what == "q"):
            return x
        if way == "offset" and other:
            plain = _angles(p, p.positions + n)
        if way in ("frequency", "layers") and other:
            plain = _angles(p, p.positions, frequencies(DIM // 2, 30.0))
        if way == "opposite" and other:
            plain = -plain
        return rotate(p, x, plain)

    shows = way != "layers" or room.layers > 1
    return Part("uneven rope", build, {"way": way, "n": n}, shows)


@part(ROPE)
def scaled_rope(r: random.Random, room: Room) -> Part:
    """Rotations with a length of their own: xPos' decay, a temperature from a position on, log n of queries."""
    way, n = r.choice(("decay", "from", "constant", "log n")), far(r, 5, 250)

    def build(p: Place, x: Tensor, what: str) -> Tensor:
        m = p.m
        if what == "v":
            return x
        at = m.unsqueeze(m.f(p.positions), 1)
        if way == "decay":
            power = m.exp(at * (-0.01 if what == "q" else 0.01))
            return rotate(p, x, _angles(p, p.positions), factor=power)
        if way == "from":
            return rotate(p, x, _angles(p, p.positions), factor=m.where(at < float(n), at * 0.0 + 1.0, at * 0.0 + 1.6))
        turned = rotate(p, x, _angles(p, p.positions))
        if way == "constant":
            return turned * 1.3
        return turned * m.maximum(m.log(at + 1.0) / float(np.log(n)), 1.0) if what == "q" else turned

    return Part("scaled rope", build, {"way": way, "n": n})


# Positions added to embeddings: build(place, x [B, S, WIDTH], ids) -> x.


@part(PLACES)
def no_places(r: random.Random, room: Room) -> Part:
    return Part("plain", lambda p, x, ids: x, shows=False)


@part(PLACES, *TEXT)
def learned_places(r: random.Random, room: Room) -> Part:
    way, n = r.choice(("plain", "offset", "modulo", "clip", "ids", "sliced", "backwards", "halved")), far(r, 5, 250)

    def build(p: Place, x: Tensor, ids: Tensor) -> Tensor:
        m, at = p.m, p.positions
        rows = {"clip": n + 1, "modulo": n}.get(way, ROWS + 64)
        table = m.weight("places", rows, WIDTH)
        if way == "sliced":
            return x + m.top(table, p.length, 0)
        index = {
            "plain": lambda: at,
            "offset": lambda: at + 2,
            "modulo": lambda: at * 3 % n,
            "clip": lambda: m.minimum(at, n),
            "ids": lambda: ids + at,
            "backwards": lambda: p.length - 1 - at,
            "halved": lambda: at // 2,
        }[way]()
        return x + m.rows(table, index)

    return Part("learned places", build, {"way": way, "n": n})


@part(PLACES, *TEXT)
def places_out_of_range(r: random.Random, room: Room) -> Part:
    """A table that ends before the sequence does: onnxruntime refuses it."""
    rows, way = far(r, 40, 250), r.choice(("products", "ids", "modulo"))

    def build(p: Place, x: Tensor, ids: Tensor) -> Tensor:
        table, at = p.m.weight("places", rows, WIDTH), p.positions
        index = {"products": lambda: at * 3 % (rows + 40), "ids": lambda: ids + at, "modulo": lambda: ids * at % 701}[
            way
        ]()
        return x + p.m.rows(table, index)

    return Part("places out of range", build, {"rows": rows, "way": way})


@part(PLACES, *TEXT)
def computed_places(r: random.Random, room: Room) -> Part:
    way, n = r.choice(("sine", "ramp", "length", "step")), far(r, 5, 280)

    def build(p: Place, x: Tensor, ids: Tensor) -> Tensor:
        m, at = p.m, p.m.unsqueeze(p.m.f(p.positions), 1)
        direction = m.weight("direction", 1, WIDTH)
        if way == "sine":
            angle = at * m.const(frequencies(WIDTH // 2)[None])
            return x + m.concat([m.sin(angle), m.cos(angle)], -1)
        if way == "ramp":
            return x + at / float(n) * direction
        if way == "length":
            return x + at / m.f(p.length) * direction
        return x + m.f(at >= float(n)) * direction * 2.0

    return Part("computed places", build, {"way": way, "n": n})
