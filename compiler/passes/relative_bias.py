"""Biases of attention that depend on how far a key is from a query only (Raffel et al. 2020), seen by their values."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Activation, Binary, Cast, Compare, Unary, Where
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Gather, Iota, Reshape, Transpose
from llmc.compiler.ir.types import Array, numpy_dtype
from llmc.compiler.passes.probe import Probe
from llmc.errors import IRError

_POINTWISE = (Unary, Binary, Compare, Where, Cast, Activation, Reshape, Transpose, Broadcast)
_TOLERANCE = 1e-9
_DENSE = 1024  # tokens that a bias is evaluated for, at most, where no few of them show all distances


def relative_table(probe: Probe, bias: Value, span: int, stand_ins: bool = False) -> NDArray[np.float64] | None:
    """f64[heads, 2 * span - 1] by key - query + span - 1, for a bias [..., heads, S, S]; None if it is no such table.

    Weights are read, or random (`stand_ins`): what is relative then is so whatever they are. A bias without heads gives
    one row. Looked at: every distance below `span`, at several places.
    """
    counters = _counters(probe, bias)
    if counters is None and span > _DENSE:
        return None
    at = np.arange(span) if counters is None else ruler(span)
    known: dict[Value, Array] = {op: at.astype(numpy_dtype(op.dtype)) for op in counters or ()}
    try:
        found = probe.evaluate([bias], len(at), at.tolist(), known, stand_ins=stand_ins)[0]
    except (IRError, MemoryError):
        return None
    if found.ndim < 2 or np.isnan(found).any():
        return None
    heads = np.broadcast_to(found, (*found.shape[:-2], len(at), len(at))).reshape(-1, len(at), len(at))
    place = at[None, :] - at[:, None] + span - 1  # [query, key]
    table = np.full((len(heads), 2 * span - 1), np.nan)
    table[:, place] = heads
    if np.isnan(table).any() or not np.allclose(table[:, place], heads, rtol=_TOLERANCE, atol=_TOLERANCE):
        return None
    return table


def ruler(span: int) -> NDArray[np.int64]:
    """Some of 0..span - 1, about 2 * sqrt(span) of them, that lie every distance below `span` apart."""
    step = max(1, math.isqrt(span))
    return np.unique([*range(step), *range(step, span, step), span - 1])


def _counters(probe: Probe, bias: Value) -> list[Op] | None:
    """The counts 0, 1, ... that a bias is computed from, one pair at a time; None if it is computed otherwise."""
    counters: list[Op] = []
    seen: set[Value] = set()
    stack = [bias]
    while stack:
        value = stack.pop()
        if value in seen or not isinstance(value, Op) or value in probe.graph.constants:
            continue
        seen.add(value)
        if isinstance(value, Iota):
            if not isinstance(value.size, Dim) or value.size != probe.size:
                return None
            counters.append(value)
        elif not isinstance(value, _POINTWISE) and not (isinstance(value, Gather) and probe.is_constant(value.x)):
            return None
        stack.extend(value.operands)
    return counters
