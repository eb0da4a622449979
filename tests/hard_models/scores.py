"""Biases, scales and softmaxes: everything between the product of queries and keys and the probabilities."""

from __future__ import annotations

import random

import numpy as np

from hard_models.masks import stored
from hard_models.parts import (
    BIAS,
    DECODER,
    ENCODER,
    ROWS,
    SCALE,
    SOFTMAX,
    VOCABULARY,
    Part,
    Place,
    Room,
    Tensor,
    far,
    part,
)


def _slopes(room: Room, base: float) -> np.ndarray:
    return np.array([base * 2.0**-i for i in range(room.heads)], np.float32).reshape(-1, 1, 1)


def _away(p: Place, room: Room) -> Tensor:
    """The distance as f32; of encoders its absolute value."""
    d = p.m.f(p.d)
    return d if room.looks_back else p.m.abs(d)


# Biases: build(place) -> f32 that broadcasts to [heads, S, S], or None.


@part(BIAS)
def no_bias(r: random.Random, room: Room) -> Part:
    return Part("plain", lambda p: None, shows=False)


@part(BIAS)
def alibi(r: random.Random, room: Room) -> Part:
    base, way = r.choice((0.25, 0.0625, 0.01)), r.choice(("distance", "key", "clamped", "from"))
    limit = far(r, 10, 250)

    def build(p: Place) -> Tensor:
        slopes = p.m.const(_slopes(room, base))
        if way == "key" and room.looks_back:
            return p.m.f(p.k) * slopes
        if way == "clamped":
            return p.m.maximum(_away(p, room) * (-slopes), -limit * base)
        if way == "from":
            return p.m.maximum(_away(p, room) - float(limit), 0.0) * (-slopes)
        return _away(p, room) * (-slopes)

    return Part("alibi", build, {"slope": base, "way": way, "limit": limit})


@part(BIAS)
def bent_slope(r: random.Random, room: Room) -> Part:
    at, a, b = far(r, 5, 250), r.choice((0.02, 0.1)), r.choice((-0.05, 0.3))

    def build(p: Place) -> Tensor:
        away = _away(p, room)
        return p.m.where(away < float(at), away * (-a), away * (-b) - (a - b) * at)

    return Part("bent slope", build, {"at": at, "a": a, "b": b})


@part(BIAS)
def curve(r: random.Random, room: Room) -> Part:
    way, n = r.choice(("log", "root", "square", "cosine", "clipped log", "length")), far(r, 20, 250)

    def build(p: Place) -> Tensor:
        m, away = p.m, p.m.abs(p.m.f(p.d))
        if way == "log":
            return -m.log(away + 1.0)
        if way == "root":
            return -m.sqrt(away)
        if way == "square":
            return m.square(away) * (-1.0 / (n * n))
        if way == "cosine":
            return m.cos(away * (6.0 / n)) * 1.5
        if way == "length":
            return away / m.f(p.length) * -3.0
        return -m.minimum(m.log(away + 1.0), float(np.log(n)))

    return Part("curve", build, {"way": way, "n": n})


@part(BIAS)
def buckets(r: random.Random, room: Room) -> Part:
    count, longest = r.choice((8, 16, 32)), r.choice((50, 128, 200))

    def build(p: Place) -> Tensor:
        """T5's buckets: half of them for single distances, the others on a log scale up to `longest`."""
        m = p.m
        one_way = count if room.looks_back else count // 2
        exact = one_way // 2
        d = m.maximum(p.d, 0) if room.looks_back else m.abs(p.d)
        wide = m.log(m.f(d) / float(exact) + 1e-6) * float((one_way - exact) / np.log(longest / exact))
        large = m.minimum(m.cast(wide, "i64") + exact, one_way - 1)
        bucket = m.where(d < exact, d, large)
        if not room.looks_back:
            bucket = bucket + m.where(p.d < 0, m.as_value(one_way, "i64"), m.as_value(0, "i64"))
        found = m.rows(m.weight("buckets", count, room.heads, scale=1.5), bucket)
        return m.transpose(found, 2, 0, 1)

    return Part("buckets", build, {"count": count, "longest": longest})


@part(BIAS)
def at_one_place(r: random.Random, room: Room) -> Part:
    j, way, more = far(r, 1, 200), r.choice(("key", "distance", "pair")), r.choice((-6.0, 3.0))

    def build(p: Place) -> Tensor:
        m = p.m
        if way == "key":
            there = m.eq(p.k, j)
        elif way == "distance":
            there = m.eq(p.d, j)
        else:
            there = m.eq(p.k, j) & (p.q > j + 20)
        base = -m.log(m.abs(m.f(p.d)) + 1.0)
        return m.where(there, base + more, base)

    return Part("bias at one place", build, {"way": way, "at": j, "more": more})


@part(BIAS)
def bias_table(r: random.Random, room: Room) -> Part:
    way, n = r.choice(("distance", "clipped", "pairs", "key", "head pairs")), far(r, 20, 250)
    bump = r.random() < 0.5

    def build(p: Place) -> Tensor:
        m = p.m
        rng = np.random.default_rng(n)
        smooth = np.sin(np.arange(ROWS) / 9.0).astype(np.float32)
        if bump:
            smooth = np.where(np.arange(ROWS) == n, 4.0, 0.0 * smooth).astype(np.float32)
        if way == "distance":
            return m.rows(m.table("by_distance", smooth), m.abs(p.d))
        if way == "clipped":
            return m.rows(m.table("by_near", smooth[: n + 1].copy()), m.minimum(m.abs(p.d), n))
        if way == "key":
            return m.rows(m.table("by_key", smooth), p.k)
        away = np.abs(np.subtract.outer(np.arange(ROWS), np.arange(ROWS)))
        pairs = smooth[away].copy()
        pairs[n : n + 40, : n + 40] += rng.standard_normal((40, n + 40))[: ROWS - n].astype(np.float32)
        if way == "head pairs":
            pairs = np.stack([pairs * (h + 1) / 2 for h in range(room.heads)])
        return stored(p, "by_pair", pairs)

    return Part("bias table", build, {"way": way, "n": n, "bump": bump})


@part(BIAS, DECODER, ENCODER)
def bias_by_ids(r: random.Random, room: Room) -> Part:
    """A number for each token that is looked at, or for each that looks and is looked at."""
    way = r.choice(("key", "both"))

    def build(p: Place) -> Tensor:
        m = p.m
        weights = m.weight("by_id", VOCABULARY, 1)
        key = m.transpose(m.rows(weights, p.ids), 0, 2, 1)  # [B, 1, S]
        found = key if way == "key" else key * m.rows(weights, p.ids)
        return m.unsqueeze(found, 1)

    return Part("bias by ids", build, {"way": way})


@part(BIAS)
def without_effect(r: random.Random, room: Room) -> Part:
    """Added to all scores of a query: the softmax does not see it."""
    n = far(r, 5, 250)
    return Part("bias by query", lambda p: p.m.sin(p.m.f(p.q) / float(n)) * 2.0, {"n": n}, shows=False)


# Scales: build(place, raw, room's head size) -> f32 scores.


@part(SCALE)
def plain_scale(r: random.Random, room: Room) -> Part:
    way = r.choice(("times", "over"))

    def build(p: Place, raw: Tensor, dim: int) -> Tensor:
        return raw * float(dim**-0.5) if way == "times" else raw / float(dim**0.5)

    return Part("plain", build, shows=False)


def scaled(name: str, law: object, facts: dict[str, object]) -> Part:
    """law(place, scores) of the scores that are already scaled."""
    return Part(name, lambda p, raw, dim: law(p, raw * float(dim**-0.5)), facts)  # type: ignore[operator]


@part(SCALE)
def scale_per_head(r: random.Random, room: Room) -> Part:
    factors = [r.choice((0.5, 1.5, 2.0, -1.0)) for _ in range(room.heads)]
    shaped = np.array(factors, np.float32).reshape(-1, 1, 1)
    return scaled("scale per head", lambda p, s: s * p.m.const(shaped), {"factors": factors})


@part(SCALE)
def scale_by_query(r: random.Random, room: Room) -> Part:
    n, way = far(r, 5, 200), r.choice(("log n", "table", "switch", "growing"))

    def law(p: Place, s: Tensor) -> Tensor:
        m, q = p.m, p.m.f(p.q)
        if way == "log n":
            return s * m.maximum(m.log(q + 1.0) / float(np.log(n)), 1.0)
        if way == "table":
            factors = np.where(np.arange(ROWS) < n, 1.0, 2.5).astype(np.float32)
            return s * m.rows(m.table("temperature", factors), p.q)
        if way == "switch":
            return m.where(p.q < n, s, s * 2.0)
        return s * (m.clip(q / float(n), 0.0, 2.0) + 0.5)

    return scaled("scale by query", law, {"way": way, "n": n})


@part(SCALE)
def scale_by_distance(r: random.Random, room: Room) -> Part:
    n, way = far(r, 5, 200), r.choice(("clip", "switch", "key", "table"))

    def law(p: Place, s: Tensor) -> Tensor:
        m, away = p.m, p.m.abs(p.m.f(p.d))
        if way == "clip":
            return s / m.clip(away * (1.0 / n), 1.0, 2.0)
        if way == "switch":
            return m.where(away < float(n), s, s * 0.5)
        if way == "key":
            return m.where(p.k < n, s, s * 1.7)
        factors = np.where(np.arange(ROWS) == min(n, 50), -2.0, 1.0).astype(np.float32)
        return s * m.rows(m.table("by_distance_factor", factors), m.abs(p.d))

    return scaled("scale by distance", law, {"way": way, "n": n})


@part(SCALE)
def scale_by_length(r: random.Random, room: Room) -> Part:
    n, way = far(r, 16, 250), r.choice(("log", "switch"))

    def law(p: Place, s: Tensor) -> Tensor:
        m = p.m
        if way == "log":
            return s * m.maximum(m.log(m.f(p.length)) / float(np.log(n)), 1.0)
        return s * m.where(p.length > n, m.as_value(2.0, "f32"), m.as_value(1.0, "f32"))

    return scaled("scale by length", law, {"way": way, "n": n})


@part(SCALE)
def bent_scores(r: random.Random, room: Room) -> Part:
    way = r.choice(("clip", "softcap", "floor", "ceiling", "leaky", "relu", "abs", "square", "sine", "two caps"))
    limit = r.choice((0.5, 1.5, 3.0, 4.5))

    def law(p: Place, s: Tensor) -> Tensor:
        m = p.m
        laws = {
            "clip": lambda: m.clip(s, -limit, limit),
            "softcap": lambda: m.tanh(s / limit) * limit,
            "floor": lambda: m.maximum(s, -limit),
            "ceiling": lambda: m.minimum(s, limit),
            "leaky": lambda: m.where(s < -limit, s * 3.0 + 2.0 * limit, s),
            "relu": lambda: m.relu(s),
            "abs": lambda: m.abs(s),
            "square": lambda: s * s * 0.3,
            "sine": lambda: m.sin(s) * limit,
            "two caps": lambda: m.tanh(m.tanh(s / limit) * (limit / 2.0)) * 2.0,
        }
        return laws[way]()

    return scaled("bent scores", law, {"way": way, "limit": limit})


@part(SCALE)
def far_clip(r: random.Random, room: Room) -> Part:
    """A clip that only the greatest scores meet: 6 standard deviations, or 4."""
    limit, sides = r.choice((5.0, 7.0, 9.0)), r.choice(("both", "low", "high"))

    def law(p: Place, s: Tensor) -> Tensor:
        s = s * 3.0
        low, high = {"both": (-limit, limit), "low": (-limit, 1e9), "high": (-1e9, limit)}[sides]
        return p.m.clip(s, low, high)

    return scaled("far clip", law, {"limit": limit, "sides": sides})


@part(SCALE)
def negative_scale(r: random.Random, room: Room) -> Part:
    return scaled("negative scale", lambda p, s: -s, {})


# Softmaxes: build(place, scores) -> probabilities.


@part(SOFTMAX)
def softmax(r: random.Random, room: Room) -> Part:
    way = r.choice(("op", "op", "exp", "raw exp", "log", "shifted"))

    def build(p: Place, s: Tensor) -> Tensor:
        m = p.m
        if way == "op":
            return m.softmax(s)
        if way == "log":
            return m.exp(m.log_softmax(s))
        if way == "shifted":
            return m.softmax(s - m.reduce("Max", s, -1))
        e = m.exp(s if way == "raw exp" else s - m.reduce("Max", s, -1))
        return e / m.reduce("Sum", e, -1)

    return Part("plain", build, {"way": way}, shows=False)


@part(SOFTMAX)
def with_sink(r: random.Random, room: Room) -> Part:
    way = r.choice(("column", "one", "one in front"))

    def build(p: Place, s: Tensor) -> Tensor:
        """Probabilities that go to nothing: a learned score a head, or a score of 0."""
        m = p.m
        one = s[..., :1] if m.style == "torch" else m.slice(s, 0, 1, -1)
        if way == "column":
            sink = m.reshape(m.weight(f"sink{p.layer}", p.heads, scale=1.0), 1, p.heads, 1, 1)
            column = m.clip(one, 0.0, 0.0) + sink
        else:
            column = m.clip(one, 0.0, 0.0)
        if way == "one in front":
            return m.slice(m.softmax(m.concat([column, s], -1)), 1, None, -1)
        return m.slice(m.softmax(m.concat([s, column], -1)), 0, -1, -1)

    return Part("sink", build, {"way": way})


@part(SOFTMAX)
def other_normalisation(r: random.Random, room: Room) -> Part:
    way = r.choice(("sigmoid", "relu", "softmax1", "wrong axis", "eps", "mixed"))

    def build(p: Place, s: Tensor) -> Tensor:
        m = p.m
        if way == "sigmoid":
            return m.sigmoid(s) * 0.1
        if way == "relu":
            e = m.relu(s)
            return e / (m.reduce("Sum", e, -1) + 1e-3)
        if way == "softmax1":
            e = m.exp(s)
            return e / (m.reduce("Sum", e, -1) + 1.0)
        if way == "eps":
            e = m.exp(s - m.reduce("Max", s, -1))
            return e / (m.reduce("Sum", e, -1) + 0.25)
        if way == "mixed":
            return m.softmax(s) * 0.8 + m.softmax(s * 0.3) * 0.2
        return m.softmax(s, axis=-2)

    return Part("no softmax", build, {"way": way})
