"""Heads, norms, activations, residuals, mixers of tokens and output heads."""

from __future__ import annotations

import random

from hard_models.parts import (
    DECODER,
    DIM,
    ENCODER,
    FFN,
    HEAD,
    HEADS,
    MIXER,
    NORM,
    RESIDUAL,
    VOCABULARY,
    WIDTH,
    Part,
    Place,
    Room,
    Tensor,
    far,
    part,
)  # fmt: skip

TEXT = (DECODER, ENCODER)
INNER = 48

# Heads: build(place, k or v [B, kv heads, S, D], "k" | "v", D) -> [B, heads, S, D].
# facts["kv"]: how many heads keys and values have.


@part(HEADS)
def heads_of_their_own(r: random.Random, room: Room) -> Part:
    return Part("plain", lambda p, x, what, width: x, {"kv": room.heads}, shows=False)


@part(HEADS, *TEXT)
def grouped_heads(r: random.Random, room: Room) -> Part:
    way, kv = r.choice(("interleaved", "tiled", "mixed", "gathered")), r.choice((1, room.heads // 2))
    times = room.heads // kv
    order = [r.randrange(kv) for _ in range(room.heads)]

    def build(p: Place, x: Tensor, what: str, width: int) -> Tensor:
        m = p.m
        if way == "gathered":
            return m.take(x, order, 1)
        if way == "tiled" or (way == "mixed" and what == "k"):
            return m.concat([x] * times, 1)
        y = m.concat([m.unsqueeze(x, 2)] * times, 2)  # [B, kv, times, S, D]
        return m.reshape(y, 0, room.heads, -1, width)

    return Part("grouped heads", build, {"way": way, "kv": kv}, shows=False)


@part(HEADS, *TEXT)
def moved_heads(r: random.Random, room: Room) -> Part:
    order = list(range(room.heads))
    r.shuffle(order)
    which = r.choice(("k", "v", "kv"))

    def build(p: Place, x: Tensor, what: str, width: int) -> Tensor:
        return p.m.take(x, order, 1) if what in which else x

    return Part("moved heads", build, {"kv": room.heads, "order": order, "of": which}, shows=False)


@part(HEADS, *TEXT)
def mixed_heads(r: random.Random, room: Room) -> Part:
    """Keys of a head are sums of two heads': no grouping, though shapes say so."""

    def build(p: Place, x: Tensor, what: str, width: int) -> Tensor:
        return x + p.m.take(x, [(i + 1) % room.heads for i in range(room.heads)], 1) if what == "k" else x

    return Part("mixed heads", build, {"kv": room.heads})


@part(HEADS, *TEXT)
def changed_heads(r: random.Random, room: Room) -> Part:
    """Queries and keys that go through something of their own: facts["qk"] says what, `changed` does it."""
    ways = ("rms", "rms of all", "layer", "unit", "clip", "tanh", "weightless", "keys only")
    return Part("changed heads", lambda p, x, what, width: x, {"kv": room.heads, "qk": r.choice(ways)})


def changed(p: Place, x: Tensor, what: str, way: object) -> Tensor:
    """q or k [B, H, S, D] after what `changed_heads` chose."""
    m, i = p.m, p.layer
    if way == "clip":
        return m.clip(x, -0.7, 0.7)
    if way == "tanh":
        return m.tanh(x)
    if way == "unit":
        return x / m.sqrt(m.reduce("Sum", m.square(x), -1) + 1e-6) * 3.0
    if way == "layer":
        c = x - m.reduce("Mean", x, -1)
        return c / m.sqrt(m.reduce("Mean", m.square(c), -1) + 1e-5) * m.weight(f"{what}_norm{i}", DIM)
    if way == "rms of all":  # over all heads
        y = m.reduce("Mean", m.reduce("Mean", m.square(x), -1), 1)
        return x / m.sqrt(y + 1e-5)
    if way in ("rms", "weightless", "keys only"):
        if way == "keys only" and what == "q":
            return x
        y = x / m.sqrt(m.reduce("Mean", m.square(x), -1) + 1e-5)
        return y if way == "weightless" else y * m.weight(f"{what}_norm{i}", DIM)
    return x


# Norms: build(place, x [.., WIDTH], name) -> the same shape.


@part(NORM)
def norm(r: random.Random, room: Room) -> Part:
    way = r.choice(("rms", "rms", "layer", "rms plus one", "weightless"))

    def build(p: Place, x: Tensor, name: str) -> Tensor:
        m = p.m
        if way == "layer":
            c = x - m.reduce("Mean", x, -1)
            y = c / m.sqrt(m.reduce("Mean", m.square(c), -1) + 1e-5)
            return y * m.weight(f"{name}.w", WIDTH) + m.weight(f"{name}.b", WIDTH, scale=0.3)
        y = x * (1.0 / m.sqrt(m.reduce("Mean", m.square(x), -1) + 1e-6))
        if way == "weightless":
            return y
        w = m.weight(f"{name}.w", WIDTH, scale=0.5) + 1.0
        return y * w

    return Part("plain", build, {"way": way}, shows=False)


@part(NORM, *TEXT)
def odd_norm(r: random.Random, room: Room) -> Part:
    ways = (
        "eps outside", "max eps", "unbiased", "raw over deviation", "mean absolute", "greatest", "groups", "large eps",
        "no mean", "clipped", "two eps", "sum", "partial", "cube", "raw rms minus mean",
    )  # fmt: skip
    way = r.choice(ways)

    def build(p: Place, x: Tensor, name: str) -> Tensor:
        m = p.m
        mean = lambda y: m.reduce("Mean", y, -1)  # noqa: E731
        c = x - mean(x)
        laws = {
            "eps outside": lambda: x / (m.sqrt(mean(m.square(x))) + 0.5),
            "max eps": lambda: x / m.sqrt(m.maximum(mean(m.square(x)), 1.1)),
            "unbiased": lambda: c / m.sqrt(m.reduce("Sum", m.square(c), -1) / float(WIDTH - 1) + 1e-5),
            "raw over deviation": lambda: x / m.sqrt(mean(m.square(c)) + 1e-5),
            "mean absolute": lambda: x / (mean(m.abs(x)) + 1e-5),
            "greatest": lambda: x / (m.reduce("Max", m.abs(x), -1) + 1e-5),
            "groups": lambda: grouped(m, x),
            "large eps": lambda: x / m.sqrt(mean(m.square(x)) + 3.0),
            "no mean": lambda: c / m.sqrt(mean(m.square(x)) + 1e-5),
            "clipped": lambda: m.clip(x / m.sqrt(mean(m.square(x)) + 1e-5), -1.0, 1.0),
            "two eps": lambda: c / (m.sqrt(mean(m.square(c)) + 0.1) + 0.2),
            "sum": lambda: x / m.sqrt(m.reduce("Sum", m.square(x), -1) + 1e-5) * 4.0,
            "partial": lambda: x / m.sqrt(mean(m.square(m.slice(x, 0, WIDTH // 2, -1))) + 1e-5),
            "cube": lambda: x / m.sqrt(mean(m.abs(x) * m.square(x)) + 1e-5),
            "raw rms minus mean": lambda: x / m.sqrt(mean(m.square(x)) + 1e-5) - mean(x),
        }
        return laws[way]() * m.weight(f"{name}.w", WIDTH)

    return Part("odd norm", build, {"way": way})


def grouped(m: object, x: Tensor) -> Tensor:
    """RMS norm of groups of 8 features."""
    y = m.reshape(x, 0, 0, WIDTH // 8, 8)  # type: ignore[attr-defined]
    y = y / m.sqrt(m.reduce("Mean", m.square(y), -1) + 1e-5)  # type: ignore[attr-defined]
    return m.reshape(y, 0, 0, WIDTH)  # type: ignore[attr-defined]


# Feed-forward parts: build(place, h, x) -> [.., WIDTH]; h is normalised, x is not.


def _gelu(m: object, x: Tensor, way: str) -> Tensor:
    if way == "erf":
        return x * 0.5 * (m.erf(x / float(2**0.5)) + 1.0)  # type: ignore[attr-defined]
    if way == "quick":
        return x * m.sigmoid(x * 1.702)  # type: ignore[attr-defined]
    return x * 0.5 * (m.tanh((x + x * x * x * 0.044715) * 0.7978845608) + 1.0)  # type: ignore[attr-defined]


def activation(m: object, x: Tensor, way: str) -> Tensor:
    """An activation by name; some of them are nearly one that has a name."""
    laws = {
        "relu": lambda: m.relu(x),  # type: ignore[attr-defined]
        "silu": lambda: x * m.sigmoid(x),  # type: ignore[attr-defined]
        "gelu": lambda: _gelu(m, x, "erf"),
        "gelu tanh": lambda: _gelu(m, x, "tanh"),
        "gelu quick": lambda: _gelu(m, x, "quick"),
        "relu squared": lambda: m.square(m.relu(x)),  # type: ignore[attr-defined]
        "identity": lambda: x,
        "sigmoid": lambda: m.sigmoid(x),  # type: ignore[attr-defined]
        # Nearly:
        "silu 1.5": lambda: x * m.sigmoid(x * 1.5),  # type: ignore[attr-defined]
        "gelu 0.4": lambda: x * 0.5 * (m.erf(x / 1.6) + 1.0),  # type: ignore[attr-defined]
        "gelu plus": lambda: x * 0.5 * (m.erf(x / float(2**0.5)) + 0.8),  # type: ignore[attr-defined]
        "square silu": lambda: x * x * m.sigmoid(x),  # type: ignore[attr-defined]
        "mish": lambda: x * m.tanh(m.softplus(x)),  # type: ignore[attr-defined]
        "sine": lambda: m.sin(x),  # type: ignore[attr-defined]
        "leaky": lambda: m.maximum(x, x * 0.1),  # type: ignore[attr-defined]
        "hard": lambda: x * m.clip(x / 6.0 + 0.5, 0.0, 1.0),  # type: ignore[attr-defined]
        "relu minus": lambda: m.relu(x) - 0.2,  # type: ignore[attr-defined]
        "silu of another": lambda: x * m.sigmoid(m.maximum(x, -1.0)),  # type: ignore[attr-defined]
        "cubed": lambda: m.relu(x) * m.square(m.relu(x)),  # type: ignore[attr-defined]
    }
    return laws[way]()


KNOWN = ("relu", "silu", "gelu", "gelu tanh", "gelu quick", "relu squared")
NEARLY = ("silu 1.5", "gelu 0.4", "gelu plus", "square silu", "mish", "sine", "leaky", "hard", "relu minus", "cubed")
NEARLY = (*NEARLY, "silu of another")


@part(FFN)
def feed_forward(r: random.Random, room: Room) -> Part:
    way, gated = r.choice((*KNOWN, "none")), r.random() < 0.4

    def build(p: Place, h: Tensor, x: Tensor) -> Tensor:
        m = p.m
        if way == "none":
            return None
        first = m.weight(f"up{p.layer}", WIDTH, INNER, scale=WIDTH**-0.5)
        y = activation(m, m.matmul(h, first), way)
        if gated:
            y = y * m.matmul(h, m.weight(f"by{p.layer}", WIDTH, INNER, scale=WIDTH**-0.5))
        return m.matmul(y, m.weight(f"down{p.layer}", INNER, WIDTH, scale=INNER**-0.5))

    return Part("plain", build, {"way": way, "gated": gated and way != "none"}, shows=False)


@part(FFN, *TEXT)
def odd_feed_forward(r: random.Random, room: Room) -> Part:
    ways = (
        "nearly",
        "nearly gated",
        "two inputs",
        "two inputs other",
        "both activated",
        "gate by head",
        "maxout",
        "sum",
    )
    way, name = r.choice((*ways, "nearly", "two inputs", "experts")), r.choice(NEARLY)
    known = r.choice(KNOWN)

    def build(p: Place, h: Tensor, x: Tensor) -> Tensor:
        m = p.m
        linear = lambda of, what: m.matmul(of, m.weight(f"{what}{p.layer}", WIDTH, INNER, scale=WIDTH**-0.5))  # noqa: E731
        up = linear(h, "up")
        ways = {
            "nearly": lambda: activation(m, up, name),
            "nearly gated": lambda: activation(m, up, name) * linear(h, "by"),
            "two inputs": lambda: activation(m, up, known) * linear(x, "by"),
            "two inputs other": lambda: activation(m, linear(x, "by"), known) * up,
            "both activated": lambda: activation(m, up, known) * activation(m, linear(h, "by"), "sigmoid"),
            "gate by head": lambda: up * m.sigmoid(m.reduce("Mean", linear(h, "by"), -1)),
            "maxout": lambda: m.maximum(up, linear(h, "by")),
            "sum": lambda: activation(m, up, known) + linear(x, "by"),
            "experts": lambda: experts(m, h, up, linear(h, "by"), known),
        }
        return m.matmul(ways[way](), m.weight(f"down{p.layer}", INNER, WIDTH, scale=INNER**-0.5))

    return Part("odd feed-forward", build, {"way": way, "of": name if "nearly" in way else known})


def experts(m: object, h: Tensor, one: Tensor, other: Tensor, known: str) -> Tensor:
    """A mixture of two by a softmax over what h says."""
    gates = m.softmax(m.matmul(h, m.weight("router", WIDTH, 2)))  # type: ignore[attr-defined]
    a, b = m.split(gates, [1, 1])  # type: ignore[attr-defined]
    return activation(m, one, known) * a + activation(m, other, "relu") * b


# Residuals: facts say how a layer is put together; `decoder.py` does it.

RESIDUALS = (
    "pre", "post", "sandwich", "parallel", "none", "scaled", "by feature", "early", "weighted", "gated", "values of x",
    "keys of first", "same weights", "shared keys", "queries are keys",
)  # fmt: skip


@part(RESIDUAL)
def residual(r: random.Random, room: Room) -> Part:
    return Part("plain", lambda: r, {"way": "pre"}, shows=False)


@part(RESIDUAL, *TEXT)
def odd_residual(r: random.Random, room: Room) -> Part:
    way = r.choice(RESIDUALS[1:])
    shows = way != "queries are keys" and (
        way not in ("same weights", "shared keys", "keys of first", "early") or room.layers > 1
    )
    return Part("residual", lambda: r, {"way": way}, shows)


# Mixers of tokens: build(place, x [B, S, WIDTH], first position [S] is 0) -> x.


@part(MIXER)
def no_mixer(r: random.Random, room: Room) -> Part:
    return Part("plain", lambda p, x: x, shows=False)


@part(MIXER, *TEXT)
def token_mixer(r: random.Random, room: Room) -> Part:
    ways = ("shift", "mean before", "three taps", "lengths", "all means", "roll", "flip", "far shift", "greatest")
    way, n = r.choice(ways if not room.looks_back else ways[:4] + ways[7:8] * 2), far(r, 2, 100)

    def build(p: Place, x: Tensor) -> Tensor:
        m = p.m
        shifted = lambda by: m.shifted(x, by)  # noqa: E731
        ways = {
            "shift": lambda: x * 0.6 + shifted(1) * 0.4,
            "far shift": lambda: x + shifted(n) * 0.5,
            "mean before": lambda: x + m.cumsum(x, 1) / m.unsqueeze(m.f(p.positions) + 1.0, 1),
            "three taps": lambda: x * m.weight("tap0", WIDTH) + shifted(1) * m.weight("tap1", WIDTH) + shifted(2) * 0.5,
            "lengths": lambda: x * (m.f(p.length) / 64.0),
            "all means": lambda: x + m.reduce("Mean", x, 1),
            "roll": lambda: x + m.concat([m.slice(x, 1, None, 1), m.slice(x, 0, 1, 1)], 1) * 0.5,
            "flip": lambda: x + m.flipped(x, 1) * 0.5,
            "greatest": lambda: x - m.reduce("Max", x, 1) * 0.3,
        }
        return ways[way]()

    return Part("token mixer", build, {"way": way, "n": n})


# Output heads: build(place, x, table of embeddings) -> logits.


def _logits(p: Place, x: Tensor, tied: Tensor | None) -> Tensor:
    if tied is not None:
        return p.m.matmul(x, p.m.transpose(tied, 1, 0)) * float(WIDTH**-0.5)
    return p.m.matmul(x, p.m.weight("head", WIDTH, VOCABULARY, scale=WIDTH**-0.5))


@part(HEAD)
def head(r: random.Random, room: Room) -> Part:
    tied = r.random() < 0.3
    return Part("plain", lambda p, x, t: _logits(p, x, t if tied else None), {"tied": tied}, shows=False)


@part(HEAD, *TEXT)
def odd_head(r: random.Random, room: Room) -> Part:
    way, n = (
        r.choice(("softcap", "log softmax", "by position", "length", "bias", "shifted", "centred", "from")),
        far(r, 3, 250),
    )

    def build(p: Place, x: Tensor, tied: Tensor) -> Tensor:
        m = p.m
        y = _logits(p, x, None)
        at = m.unsqueeze(m.f(p.positions), 1)
        ways = {
            "softcap": lambda: m.tanh(y / 1.5) * 1.5,
            "log softmax": lambda: m.log_softmax(y),
            "by position": lambda: y * (at / float(n) + 1.0),
            "length": lambda: y / m.sqrt(m.f(p.length)) * 8.0,
            "bias": lambda: y + m.weight("head.b", VOCABULARY),
            "shifted": lambda: y + m.shifted(y, 1),
            "centred": lambda: y - m.reduce("Mean", y, -1),
            "from": lambda: m.where(at < float(n), y, y * 0.5),
        }
        return ways[way]()

    return Part("odd head", build, {"way": way, "n": n})
