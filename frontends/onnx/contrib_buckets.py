"""T5's relative position bias (Raffel et al. 2020, section 2.1): near distances one bucket each, far ones share."""

from __future__ import annotations

import math

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Abs, Add, Cast, Greater, Less, Log, Maximum, Minimum, Mul, Sub, Where, constant
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Gather, Iota, Reshape, Transpose
from llmc.frontends.onnx.contrib_parts import known


def bucketed_bias(table: Value, queries: int | Dim, keys: int | Dim, max_distance: int, bidirectional: bool) -> Value:
    """[1, heads, Q, K]: the rows of table [buckets, heads] that the distances key - query fall into."""
    buckets = known(table.shape[0], "the number of buckets")
    distance: Value = Sub(Reshape(Iota(keys), (1, keys)), Reshape(Iota(queries), (queries, 1)))
    zero = constant(0, "i64")
    base: Value | None = None
    if bidirectional:
        buckets //= 2
        base = Where(Greater(distance, zero), constant(buckets, "i64"), zero)
        distance = Abs(distance)
    else:
        distance = Maximum(Sub(zero, distance), zero)
    exact = buckets // 2
    wide = Cast(Maximum(distance, constant(1, "i64")), "f32")  # at least 1: the logarithm of what is not near
    factor = (buckets - exact) / math.log(max_distance / exact)
    far: Value = Cast(Mul(Log(Mul(wide, constant(1 / exact, "f32"))), constant(factor, "f32")), "i64")
    far = Minimum(Add(far, constant(exact, "i64")), constant(buckets - 1, "i64"))
    bucket: Value = Where(Less(distance, constant(exact, "i64")), distance, far)
    if base is not None:
        bucket = Add(bucket, base)
    rows = Gather(table, bucket, 0)  # [Q, K, heads]
    heads = table.shape[1]
    return Reshape(Transpose(rows, (2, 0, 1)), (1, heads, queries, keys))
