"""T5's relative position bias (Raffel et al. 2020, section 2.1): near distances one bucket each, far ones share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Abs, Add, Greater, Maximum, Minimum, Sub, Where, constant
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Gather, Iota, Reshape, Transpose
from llmc.frontends.onnx.contrib_parts import known, require

MOST_DISTANCE = 1 << 20  # T5 tells distances up to 128 apart


def buckets_of(buckets: int, max_distance: int) -> NDArray[np.int64]:
    """The buckets of distances 0 .. max_distance: each its own up to buckets / 2, then by logarithm (in f32)."""
    exact = buckets // 2
    require(
        0 < exact < max_distance <= MOST_DISTANCE,
        f"{buckets} buckets a direction for distances up to {max_distance}: needs at least two buckets, and a "
        f"max_distance above half of them, at most {MOST_DISTANCE}",
    )
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    far = np.log(ratio) / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)
    shared = np.minimum(exact + far.astype(np.int64), buckets - 1)
    return np.where(distance < exact, distance, shared)


def bucketed_bias(table: Value, queries: int | Dim, keys: int | Dim, max_distance: int, bidirectional: bool) -> Value:
    """[1, heads, Q, K]: the rows of table [buckets, heads] that the distances key - query fall into."""
    buckets = known(table.shape[0], "the number of buckets")
    distance: Value = Sub(Reshape(Iota(keys), (1, keys)), Reshape(Iota(queries), (queries, 1)))
    zero, most = constant(0, "i64"), constant(max_distance, "i64")
    base: Value | None = None
    if bidirectional:
        buckets //= 2
        base = Where(Greater(distance, zero), constant(buckets, "i64"), zero)
        distance = Abs(distance)
    else:
        distance = Maximum(Sub(zero, distance), zero)
    bucket: Value = Gather(constant(buckets_of(buckets, max_distance), "i64"), Minimum(distance, most), 0)
    if base is not None:
        bucket = Add(bucket, base)
    rows = Gather(table, bucket, 0)  # [Q, K, heads]
    return Reshape(Transpose(rows, (2, 0, 1)), (1, table.shape[1], queries, keys))
