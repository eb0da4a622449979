"""Normalisation of rows: rms_norm and layer_norm, with a residual addition in front if wanted.

A row is read from memory once and stays in L1 for the second pass; writing it back is the limit (8 bytes an element, 16
with the residual). Statistics are f32 sums over four accumulators of a vector each.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.targets.cpu.builder import let, loop, scratch
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import (
    add,
    for_pieces,
    load,
    pieces,
    pin,
    range_kernel,
    reduce_lanes,
    remainder,
    splat,
    store,
)
from llmc.targets.kernel import Kernel, kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from tvm.tirx import Expr, PrimFunc

CHAINS = 4  # independent sums: the latency of an addition is four cycles


def norm_kernel(
    machine: Machine,
    *,
    kind: str,
    features: int,
    eps: float,
    weight: bool = True,
    bias: bool = False,
    weight_offset: int = 0,
    residual: bool = False,
    groups: int = 1,
) -> Kernel:
    """The kernel that normalises rows; see `norm` for its arguments. Units: rows (T), or T * heads for a head norm.

    For a norm over each head of [T, heads, D]: features = D, and `groups` = heads only if every head has its own
    weights (weight [heads, D]); with one weight vector for all heads leave it at 1 and pass T * heads units.
    """
    return kernel(
        norm,
        machine.key,
        kind=kind,
        features=features,
        eps=float(eps),
        weight=weight,
        bias=bias,
        weight_offset=weight_offset,
        residual=residual,
        groups=groups,
    )


def norm(
    machine: Machine,
    *,
    kind: str,
    features: int,
    eps: float,
    weight: bool,
    bias: bool,
    weight_offset: int,
    residual: bool,
    groups: int,
) -> PrimFunc:
    """One unit is one row of `features` numbers. All f32:

        x [units, features], [addend [units, features], total [units, features]], [weight [groups, features]],
        [bias [groups, features]], out [units, features]

    kind "rms": x / sqrt(mean(x^2) + eps); "layer": (x - mean(x)) / sqrt(variance(x) + eps); then `* (weight_offset +
    weight) + bias`, as far as present. With `residual`, x + addend takes the place of x and is written to `total`.
    `total` may be the same buffer as x or addend, `out` the same as x.
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"norm: kind must be 'rms' or 'layer', not {kind!r}")
    lanes = isa_for(machine).lanes
    names = ["x"] + ["addend", "total"] * residual + ["weight"] * weight + ["bias"] * bias + ["out"]

    def row(a: SimpleNamespace, u: Expr) -> None:
        base = pin(u * features)
        source = a.total if residual else a.x
        if residual:

            def accumulate(offset: Expr | int, width: int) -> None:
                store(
                    a.total,
                    base + offset,
                    load(a.x, base + offset, width) + load(a.addend, base + offset, width),
                    width,
                )

            for_pieces(features, lanes, accumulate)
        mean = None
        if kind == "layer":
            mean = let(_row_sum(source, base, features, lanes, lambda v: v) * (1.0 / features))
        scale = _reciprocal_root(_centred_squares(source, base, features, lanes, mean), features, eps)
        parameters = pin(remainder(u, groups) * features) if groups > 1 else 0

        def normalise(offset: Expr | int, width: int) -> None:
            value = load(source, base + offset, width)
            if mean is not None:
                value = value - splat(mean, width)
            value = value * splat(scale, width)
            if weight:
                factor = load(a.weight, parameters + offset, width)
                value = value * (factor + splat(float(weight_offset), width) if weight_offset else factor)
            if bias:
                value = value + load(a.bias, parameters + offset, width)
            store(a.out, base + offset, value, width)

        for_pieces(features, lanes, normalise)

    return range_kernel([(name, "float32") for name in names], [], row)


def _centred_squares(source: object, base: Expr, features: int, lanes: int, mean: Expr | None) -> Expr:
    """Sum of (x - mean)^2 over the row."""

    def square(value: Expr) -> Expr:
        width = int(value.ty.dtype.lanes)
        centred = let(value if mean is None else value - splat(mean, width))
        return centred * centred

    return _row_sum(source, base, features, lanes, square)


def _reciprocal_root(total: Expr, features: int, eps: float) -> Expr:
    """1 / sqrt(total / features + eps), one a row."""
    from tvm import tirx

    return let(tirx.const(1.0, "float32") / tirx.sqrt(total * (1.0 / features) + tirx.const(eps, "float32")))


def _row_sum(source: object, base: Expr, features: int, lanes: int, term: Callable[[Expr], Expr]) -> Expr:
    """The sum of term(x) over one row, in `CHAINS` vector accumulators."""
    sums = [scratch(lanes, "float32") for _ in range(CHAINS)]
    for chain in sums:
        store(chain, 0, splat(0.0, lanes), lanes)
    stride = lanes * CHAINS
    if features // stride:
        with loop(features // stride) as number:
            for i, chain in enumerate(sums):
                value = term(load(source, base + number * stride + i * lanes, lanes))
                store(chain, 0, load(chain, 0, lanes) + value, lanes)
    done = features // stride * stride
    for i, (offset, width) in enumerate(pieces(features - done, lanes)):
        chain = sums[i % CHAINS]
        store(chain, 0, load(chain, 0, width) + term(load(source, base + done + offset, width)), width)
    parts = [load(chain, 0, lanes) for chain in sums]
    return reduce_lanes((parts[0] + parts[1]) + (parts[2] + parts[3]), lanes, add)
