"""Masks: which keys a query sees, as booleans that broadcast to [heads, S, S]; and guards behind the softmax."""

from __future__ import annotations

import random

import numpy as np

from hard_models.parts import DECODER, ENCODER, GUARD, MASK, ROWS, Part, Place, Room, Tensor, far, part


def causal(p: Place, way: int = 0) -> Tensor:
    """Keys up to the query, in one of several ways."""
    m = p.m
    ways = (
        lambda: p.k <= p.q,
        lambda: p.d >= 0,
        lambda: m.triangle(p.length),
        lambda: ~m.triangle(p.length, upper=True, diagonal=1),
        lambda: m.f(p.d) > -0.5,
        lambda: m.clip(p.d + 1, 0, 1) > 0,
        lambda: (p.k < p.q) | m.eq(p.k, p.q),
        lambda: stored(p, "triangle", np.tril(np.ones((ROWS, ROWS), bool))),
    )
    return ways[way]()


CAUSAL_WAYS = 8


def stored(p: Place, name: str, array: np.ndarray) -> Tensor:
    """The top left corner [S, S] of a stored array [.., N, N]."""
    rank = array.ndim
    table = p.m.table(name, array)
    return p.m.top(p.m.top(table, p.length, rank - 2), p.length, rank - 1)


def _two_sided(p: Place, r: Room) -> Tensor:
    """Distances back; of encoders their absolute values."""
    return p.d if r.looks_back else p.m.abs(p.d)


@part(MASK)
def plain(r: random.Random, room: Room) -> Part:
    """No limit but the order of tokens."""
    return Part("plain", lambda p: None, shows=False)


@part(MASK)
def window(r: random.Random, room: Room) -> Part:
    w, way = far(r, 2, 280), r.choice(("int", "float", "quotient", "square", "log", "floor"))

    def build(p: Place) -> Tensor:
        d, m = _two_sided(p, room), p.m
        if way == "int":
            return d < w
        if way == "float":
            return m.f(d) < w - 0.5
        if way == "quotient":
            return m.f(d) / float(w) < 1.0
        if way == "square":
            return d * d < w * w
        if way == "log":
            return m.log(m.abs(m.f(d)) + 1.0) < float(np.log(w + 0.5))
        return m.floor(m.f(d) * float(1 / w)) < 1.0

    return Part("window", build, {"size": w, "way": way})


@part(MASK)
def window_per_head(r: random.Random, room: Room) -> Part:
    sizes = [far(r, 2, 280) for _ in range(room.heads)]
    as_float = r.random() < 0.4

    def build(p: Place) -> Tensor:
        limit = np.array(sizes).reshape(-1, 1, 1)
        d = _two_sided(p, room)
        return p.m.f(d) < p.m.const(limit.astype(np.float32)) if as_float else d < p.m.const(limit)

    return Part("window per head", build, {"sizes": sizes})


@part(MASK)
def window_of_some_heads(r: random.Random, room: Room) -> Part:
    w, first = far(r, 2, 250), r.randrange(room.heads)

    def build(p: Place) -> Tensor:
        chosen = p.m.const((np.arange(room.heads) == first).reshape(-1, 1, 1))
        return ~chosen | (_two_sided(p, room) < w)

    return Part("window of one head", build, {"size": w, "head": first})


@part(MASK)
def window_of_some_layers(r: random.Random, room: Room) -> Part:
    w = far(r, 2, 280)
    return Part("window of layer 0", lambda p: _two_sided(p, room) < w if p.layer == 0 else None, {"size": w})


@part(MASK)
def blocks(r: random.Random, room: Room) -> Part:
    size, count, own = r.choice((8, 16, 25, 32, 50, 64)), r.randint(1, 4), r.random() < 0.3

    def build(p: Place) -> Tensor:
        apart = p.q // size - p.k // size
        if own:
            return p.m.eq(p.q // size, p.k // size)
        return apart < count if room.looks_back else (apart >= 0) & (apart <= count)

    return Part("blocks", build, {"size": size, "count": 0 if own else count})


@part(MASK)
def dilated(r: random.Random, room: Room) -> Part:
    w, step, rest = far(r, 2, 100), r.randint(2, 9), r.random() < 0.5

    def build(p: Place) -> Tensor:
        d = _two_sided(p, room) if rest else p.m.abs(p.d)
        return (d < w) | p.m.eq(d % step, 0)

    return Part("dilated", build, {"near": w, "step": step})


@part(MASK)
def global_keys(r: random.Random, room: Room) -> Part:
    w, way = far(r, 2, 60), r.choice(("modulo", "one", "product", "first", "table"))
    at, step = far(r, 3, 200), r.choice((7, 50, 64, 100))
    listed = sorted(r.sample(range(300), 4))

    def build(p: Place) -> Tensor:
        m, k = p.m, p.k
        seen = {
            "modulo": lambda: m.eq(k % step, step - 1),
            "one": lambda: m.eq(k, at),
            "product": lambda: m.eq(k * 3, at * 3),
            "first": lambda: k < min(at, 12),
            "table": lambda: m.rows(m.table("is_global", np.isin(np.arange(ROWS), listed)), k),
        }[way]()
        if room.kind == ENCODER and at % 2:
            seen = seen | m.eq(p.q, at)
        return (_two_sided(p, room) < w) | seen

    return Part("global keys", build, {"near": w, "way": way, "at": at if way != "modulo" else step})


@part(MASK)
def stored_holes(r: random.Random, room: Room) -> Part:
    seed, way = r.randrange(1 << 30), r.choice(("block", "hole", "sparse", "diagonal", "row", "cross"))
    a, b, per_head = far(r, 5, 250), far(r, 3, 250), r.random() < 0.2

    def build(p: Place) -> Tensor:
        rng = np.random.default_rng(seed)
        seen = np.tril(np.ones((ROWS, ROWS), bool)) if room.looks_back else np.ones((ROWS, ROWS), bool)
        if way == "block":
            if room.looks_back:
                seen[a : a + 40, a : a + 40] = True
            else:
                seen[a : a + 40, : a // 2 + 1] = False
        elif way == "hole":
            seen[a : a + 50, min(a, b)] = False
        elif way == "sparse":
            seen &= rng.random(seen.shape) < 0.7
        elif way == "diagonal":
            seen &= np.subtract.outer(np.arange(ROWS), np.arange(ROWS)) != min(b, 40)
        elif way == "row":
            seen[a, : a // 2 + 1] = False
        else:
            seen[:, min(a, 100)] = False
        np.fill_diagonal(seen, True)
        if per_head:
            seen = np.stack([seen] + [np.tril(np.ones_like(seen)) if room.looks_back else seen] * (room.heads - 1))
        return stored(p, "seen", seen)

    # A block makes a triangle see ahead: the mask is the whole of it.
    kind = "stored block ahead" if way == "block" and room.looks_back else "stored holes"
    return Part(kind, build, {"way": way, "at": (a, b)})


@part(MASK)
def segments(r: random.Random, room: Room) -> Part:
    cuts = sorted(r.sample(range(2, 290), r.randint(1, 4)))
    only_past = r.random() < 0.3

    def build(p: Place) -> Tensor:
        table = p.m.table("segment", np.searchsorted(cuts, np.arange(ROWS), side="right").astype(np.int64))
        own, other = p.m.rows(table, p.q), p.m.rows(table, p.k)
        return own >= other if only_past and not room.looks_back else p.m.eq(own, other)

    return Part("segments", build, {"cuts": cuts})


@part(MASK, DECODER)
def strictly_causal(r: random.Random, room: Room) -> Part:
    way = r.choice(("first sees itself", "first sees nothing"))

    def build(p: Place) -> Tensor:
        before = p.k < p.q
        return before | p.m.eq(p.q, 0) if way == "first sees itself" else before

    return Part("strictly causal", build, {"way": way})


@part(MASK)
def lagged(r: random.Random, room: Room) -> Part:
    a, b = far(r, 1, 40), far(r, 45, 280)

    def build(p: Place) -> Tensor:
        d = _two_sided(p, room)
        return ((d >= a) & (d < b)) | p.m.eq(p.d, 0)

    return Part("lagged window", build, {"from": a, "to": b})


@part(MASK)
def by_length(r: random.Random, room: Room) -> Part:
    way, n, w = r.choice(("half", "switch", "last")), far(r, 16, 280), far(r, 2, 40)

    def build(p: Place) -> Tensor:
        d = _two_sided(p, room)
        if way == "half":
            return d * 2 <= p.length
        if way == "switch":
            return (p.length < n) | (d < w)
        return (d < w) | (p.q + w > p.length)

    return Part("by length", build, {"way": way, "n": n, "near": w})


@part(MASK)
def one_hidden(r: random.Random, room: Room) -> Part:
    j, n, way = far(r, 1, 40), far(r, 1, 200), r.choice(("distance", "key", "key from"))

    def build(p: Place) -> Tensor:
        if way == "distance":
            return ~p.m.eq(p.d, j)
        hidden = p.m.eq(p.k, j) & (p.q > (j + n if way == "key from" else j))
        return ~hidden

    return Part("one hidden", build, {"way": way, "at": j, "from": n})


@part(MASK)
def growing_window(r: random.Random, room: Room) -> Part:
    step, first, way = r.choice((2, 3, 4)), far(r, 2, 60), r.choice(("linear", "root"))

    def build(p: Place) -> Tensor:
        d = _two_sided(p, room)
        return d < first + p.q // step if way == "linear" else d * d < p.q + first * first

    return Part("growing window", build, {"first": first, "step": step, "way": way})


@part(MASK)
def chosen_distances(r: random.Random, room: Room) -> Part:
    way, seed = r.choice(("powers", "table")), r.randrange(1 << 30)

    def build(p: Place) -> Tensor:
        d = p.m.abs(p.d)
        if way == "powers":
            return p.m.eq(p.m.bitand(d, d - 1), 0) | (d < 3)
        seen = np.random.default_rng(seed).random(ROWS) < 0.6
        seen[0] = True
        return p.m.rows(p.m.table("seen_distances", seen), d)

    return Part("chosen distances", build, {"way": way})


@part(MASK)
def parity(r: random.Random, room: Room) -> Part:
    w, n = far(r, 1, 60), r.choice((2, 3, 5))
    return Part("parity", lambda p: (_two_sided(p, room) < w) | p.m.eq((p.q + p.k) % n, 0), {"near": w, "of": n})


@part(MASK)
def exclusive(r: random.Random, room: Room) -> Part:
    a, b = far(r, 3, 100), far(r, 101, 280)

    def build(p: Place) -> Tensor:
        d = _two_sided(p, room)
        return (d < a) ^ (d < b) | (p.m.abs(p.d) < 2)

    return Part("exclusive windows", build, {"a": a, "b": b})


@part(MASK, DECODER, ENCODER)
def by_ids(r: random.Random, room: Room) -> Part:
    """Which keys are seen depends on what the tokens are: hidden ones, or texts that end at some ids."""
    way, token = r.choice(("hidden", "texts", "same", "marks")), r.randrange(2, 20)

    def build(p: Place) -> Tensor:
        m = p.m
        own, other = m.unsqueeze(p.ids, 2), m.unsqueeze(p.ids, 1)  # [B, S, 1], [B, 1, S]
        if way == "hidden":
            seen = ~m.eq(other, token) | m.eq(p.d, 0)
        elif way == "same":
            seen = m.eq(own % 3, other % 3) | m.eq(p.d, 0)
        elif way == "marks":
            seen = (other < token) | (m.abs(p.d) < 6)
        else:
            text = m.cumsum(m.cast(m.eq(p.ids, token), "i64"), 1)
            seen = m.eq(m.unsqueeze(text, 2), m.unsqueeze(text, 1))
        return m.unsqueeze(seen, 1)

    return Part("by ids", build, {"way": way, "token": token})


@part(MASK, DECODER)
def prefix(r: random.Random, room: Room) -> Part:
    n = far(r, 2, 200)
    return Part("prefix ahead", lambda p: (p.k <= p.q) | (p.k < n), {"tokens": n})


@part(MASK, ENCODER)
def uneven_band(r: random.Random, room: Room) -> Part:
    back, ahead = far(r, 1, 200), r.choice((0, 1, 2, far(r, 1, 100)))
    return Part("uneven band", lambda p: (p.d <= back) & (p.d >= -ahead), {"back": back, "ahead": ahead})


@part(GUARD)
def no_guard(r: random.Random, room: Room) -> Part:
    return Part("plain", lambda p, x: x, shows=False)


@part(GUARD)
def guarded_rows(r: random.Random, room: Room) -> Part:
    n, way = far(r, 5, 290), r.choice(("where", "product", "key"))

    def build(p: Place, x: Tensor) -> Tensor:
        if way == "where":
            return p.m.where(p.q >= n, 0.0, x)
        if way == "product":
            return x * p.m.f(p.q < n)
        return x * p.m.f(~p.m.eq(p.k, min(n, 60)))

    return Part("zeroed probabilities", build, {"from": n, "way": way})


@part(GUARD)
def nan_guard(r: random.Random, room: Room) -> Part:
    return Part("nan guard", lambda p, x: p.m.where(p.m.is_nan(x), 0.0, x), shows=False)


@part(GUARD)
def scaled_rows(r: random.Random, room: Room) -> Part:
    n, way = far(r, 5, 250), r.choice(("fade", "renormalised", "power"))

    def build(p: Place, x: Tensor) -> Tensor:
        if way == "fade":
            return x * p.m.clip(p.m.f(p.d) / float(-n) + 1.0, 0.0, 1.0)
        if way == "power":
            y = x * x
            return y / p.m.reduce("Sum", y, -1)
        y = x * p.m.where(p.m.eq(p.k % 5, 0), 0.25, p.m.f(p.k) * 0.0 + 1.0)
        return y / p.m.reduce("Sum", y, -1)

    return Part("changed probabilities", build, {"way": way, "n": n})
