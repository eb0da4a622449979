"""Puts the parts of a drawn model together: text models and graphs of arrays, over any tensor functions."""

from __future__ import annotations

import random

import numpy as np
import onnx

from hard_models.blocks import changed
from hard_models.drawing import Spec
from hard_models.masks import causal
from hard_models.ops_onnx import OnnxOps, Value, model_input
from hard_models.parts import (
    ARRAYS,
    BIAS,
    DECODER,
    DIM,
    FFN,
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
    SOFTMAX,
    VOCABULARY,
    WIDTH,
    Ops,
    Place,
    Tensor,
)  # fmt: skip

LOWEST = float(np.finfo(np.float32).min)


def attend(p: Place, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, D] each -> [B, H, S, value dim]: scale, bias, mask, softmax, guard."""
    m, parts = p.m, spec.parts
    scores = parts[SCALE].build(p, m.matmul(q, m.transpose(k, 0, 1, 3, 2)), DIM)
    bias = parts[BIAS].build(p)
    if bias is not None:
        scores = scores + bias
    seen = parts[MASK].build(p)
    if spec.kind == DECODER and not spec.ahead:
        order = causal(p, spec.causal_way)
        seen = order if seen is None else seen & order
    if p.padding is not None:
        real = m.unsqueeze(m.unsqueeze(m.cast(p.padding, "bool"), 1), 1)  # [B, 1, 1, S]
        seen = real if seen is None else seen & real
    if seen is not None:
        scores = hide(p, spec, scores, seen)
    return m.matmul(parts[GUARD].build(p, parts[SOFTMAX].build(p, scores)), v)


def hide(p: Place, spec: Spec, scores: Tensor, seen: Tensor) -> Tensor:
    """Scores with those of hidden keys far below, in one of the ways in which models write it."""
    m, fill = p.m, spec.fill
    strict = spec.parts[MASK].facts.get("way") == "first sees nothing"
    if strict and "inf" in fill:
        fill = "-1e9"  # a row without keys is uniform then, and not NaN
    number = {"-inf": -np.inf, "-1e9": -1e9, "-1e4": -1e4}.get(fill.removeprefix("add "), LOWEST)
    if fill == "by product":
        return scores + (1.0 - m.f(seen)) * -1e9
    if fill.startswith("add "):
        zero = m.as_value(0.0, "f32")
        return scores + m.where(seen, zero, m.as_value(number, "f32"))
    return m.where(seen, scores, m.as_value(number, "f32"))


def layer(p: Place, spec: Spec, x: Tensor, first: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One layer of a text model. x, first (what came into layer 0): [B, S, WIDTH]. kept: keys and values of layers."""
    m, parts, way = p.m, spec.parts, spec.parts[RESIDUAL].facts["way"]
    i = 0 if way == "same weights" else p.layer
    norm = lambda y, name: parts[NORM].build(p, y, f"{name}{i}")  # noqa: E731
    h = x if way == "post" else norm(first if way == "early" else x, "norm_a")
    kv, dv = int(parts[HEADS].facts["kv"]), spec.value_dim  # type: ignore[call-overload]

    def heads(name: str, count: int, width: int, scale: float, of: Tensor = None) -> Tensor:
        y = m.matmul(h if of is None else of, m.weight(f"{name}{i}", WIDTH, count * width, scale=scale * WIDTH**-0.5))
        if spec.drawn_as % 3 == 0:
            y = y + m.weight(f"{name}{i}.b", count * width, scale=0.3)
        return m.transpose(m.reshape(y, 0, 0, count, width), 0, 2, 1, 3)

    q = heads("q", spec.heads, DIM, spec.sharpness)
    if kept and way == "shared keys":
        k, v = kept[0]
    else:
        name = "q" if way == "queries are keys" and kv == spec.heads else "k"
        k = heads(name, kv, DIM, spec.sharpness, first if way == "keys of first" else None)
        v = heads("v", kv, dv, 1.0, x if way == "values of x" else None)
    kept.append((k, v))
    if "qk" in parts[HEADS].facts:
        q, k = (changed(p, y, name, parts[HEADS].facts["qk"]) for y, name in ((q, "q"), (k, "k")))
    if dv == DIM:
        v = parts[ROPE].build(p, v, "v")
    q, k = parts[ROPE].build(p, q, "q"), parts[ROPE].build(p, k, "k")
    k, v = parts[HEADS].build(p, k, "k", DIM), parts[HEADS].build(p, v, "v", dv)
    a = m.reshape(m.transpose(attend(p, spec, q, k, v), 0, 2, 1, 3), 0, 0, spec.heads * dv)
    a = m.matmul(a, m.weight(f"o{i}", spec.heads * dv, WIDTH, scale=(spec.heads * dv) ** -0.5))
    feed = lambda of: parts[FFN].build(p, of, x)  # noqa: E731
    if way == "gated":
        a = a * m.sigmoid(m.matmul(h, m.weight(f"gate{i}", WIDTH, WIDTH, scale=WIDTH**-0.5)))
    if way == "sandwich":
        a = norm(a, "norm_c")
    if way == "parallel":
        f = feed(h)
        return x + a if f is None else x + a + f
    if way == "none":
        x = a
    elif way == "scaled":
        x = x + a * 0.5
    elif way == "by feature":
        x = x + a * m.weight(f"feature{i}", WIDTH)
    elif way == "weighted":
        x = x * 0.7 + a
    else:
        x = x + a
    if way == "post":
        x = norm(x, "norm_a")
    f = feed(x if way == "post" else norm(x, "norm_b"))
    return x if f is None else x + f


def text(m: Ops, spec: Spec, ids: Tensor, positions: Tensor, length: Tensor, padding: Tensor = None) -> Tensor:
    """ids i64[B, S], positions i64[S] -> logits [B, S, VOCABULARY] of a decoder, [B, S, WIDTH] of an encoder."""
    parts = spec.parts

    def place(number: int) -> Place:
        q, k = m.unsqueeze(positions, 1), m.unsqueeze(positions, 0)
        return Place(m, number, spec.heads, positions, q, k, length, ids, padding)

    table = m.weight("embedding", VOCABULARY, WIDTH)
    x = parts[PLACES].build(place(0), m.rows(table, ids), ids)
    if parts[PLACES].name != "places out of range" and spec.drawn_as % 5 == 0:
        x = x * float(WIDTH**0.5)
    first, kept = x, list[tuple[Tensor, Tensor]]()
    for number in range(spec.layers):
        x = layer(place(number), spec, x, first, kept)
        if number == 0:
            x = parts[MIXER].build(place(0), x)
    if spec.kind != DECODER:
        return x
    last = place(spec.layers)
    return parts[HEAD].build(last, parts[NORM].build(last, x, "norm"), table)


def onnx_model(spec: Spec) -> onnx.ModelProto:
    """The file of a drawn model."""
    m = OnnxOps(spec.drawn_as, None if spec.spelling is None else random.Random(spec.spelling))
    return _arrays(m, spec) if spec.kind == ARRAYS else _text(m, spec)


def _text(m: OnnxOps, spec: Spec) -> onnx.ModelProto:
    ids = Value(m, "input_ids", "i64")
    inputs = [model_input("input_ids", "i64", ["batch", "seq"])]
    length, padding = m.length_of(ids, 1), None
    if spec.positions == "input":
        inputs.append(model_input("position_ids", "i64", ["batch", "seq"]))
        positions = m.reshape(Value(m, "position_ids", "i64"), -1)
    elif spec.positions == "cumsum":
        inputs.append(model_input("attention_mask", "i64", ["batch", "seq"]))
        padding = Value(m, "attention_mask", "i64")
        positions = m.reshape(m.cumsum(padding, 1) - 1, -1)
    else:
        positions = m.arange(length)
    found = text(m, spec, ids, positions, length, padding)
    name, width = ("logits", VOCABULARY) if spec.kind == DECODER else ("last_hidden_state", WIDTH)
    return m.model(inputs, {name: (found, ["batch", "seq", width])})


def _arrays(m: OnnxOps, spec: Spec) -> onnx.ModelProto:
    """Attention over q, k, v [1, heads, n, DIM]."""
    shape = [1, spec.heads, "n", DIM]
    q, k, v = (Value(m, name, "f32") for name in "qkv")
    length = m.length_of(q, 2)
    positions = m.arange(length)
    place = Place(m, 0, spec.heads, positions, m.unsqueeze(positions, 1), m.unsqueeze(positions, 0), length)
    return m.model([model_input(name, "f32", shape) for name in "qkv"], {"y": (attend(place, spec, q, k, v), shape)})
