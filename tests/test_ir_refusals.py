"""What ops refuse, rule by rule: each case breaks one rule and no other, and one step from it the op is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmc.compiler.ir import attention as a
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import integers as i
from llmc.compiler.ir import llm
from llmc.compiler.ir import ragged as r
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.kernels import RunKernels
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.types import KV, Tensor, parse_encoding
from llmc.errors import DimError, IRError

S, BIG = symbol("S", 2, 40), symbol("B", 1, 1 << 31)
CACHE = Input("cache", KV(2, 8, 4, "f32"))


def x(*shape: object, dtype: str = "f32", encoding: str = "") -> Value:
    return Input("x", Tensor(tuple(shape), dtype, parse_encoding(encoding) if encoding else None))  # type: ignore[arg-type]


def at(*shape: object, dtype: str = "i32") -> Value:
    return x(*shape, dtype=dtype)


Q, K, V = x(3, 6, 8), x(5, 2, 8), x(5, 2, 4)
SIGNED, BYTES = at(4, 64, dtype="i8"), at(4, 64, dtype="u8")
PAGED = (x(3, 6, 8), CACHE, at(1, 4), at(1, 2))

REFUSED: dict[str, tuple[Callable[[], Op], str]] = {
    "exp of integers": (lambda: e.Exp(at(3)), "needs floats, not i32"),
    "not of integers": (lambda: e.Not(at(3)), "needs bool, not i32"),
    "unknown activation": (lambda: e.Activation(x(3), "swish"), "unknown activation 'swish'; known: relu"),
    "activation of integers": (lambda: e.Activation(at(3), "relu"), "needs floats"),
    "unlike dtypes": (lambda: e.Add(x(3), at(3)), "different dtypes: f32, i32"),
    "compared unlike dtypes": (lambda: e.Less(x(3), at(3)), "different dtypes"),
    "bits of floats": (lambda: e.BitAnd(x(3), x(3)), "needs integers, not f32"),
    "bits of another width": (lambda: e.Bitcast(x(3), "i64"), "f32 and i64 differ in width"),
    "condition of integers": (lambda: e.Where(at(3), x(3), x(3)), "the condition must be bool"),
    "branches of unlike dtypes": (lambda: e.Where(at(3, dtype="bool"), x(3), at(3)), "different dtypes"),
    "unequal sizes": (lambda: e.Add(x(3), x(2)), "do not broadcast"),
    "unequal sizes of three": (lambda: e.Where(at(2, dtype="bool"), x(1), x(3)), "do not broadcast"),
    "none beside three": (lambda: e.Add(x(0), x(3)), "do not broadcast"),
    "reshape": (lambda: s.Reshape(x(3, 4), (6, 3)), "different element counts"),
    "permutation of fewer axes": (lambda: s.Transpose(x(3, 4), (0,)), "no permutation of 2 axes"),
    "permutation twice": (lambda: s.Transpose(x(3, 4), (0, 0)), "no permutation"),
    "broadcast to fewer": (lambda: s.Broadcast(x(3, 4), (4,)), "does not broadcast"),
    "broadcast to one": (lambda: s.Broadcast(x(3, 4), (3, 1)), "does not broadcast"),
    "slice below 0": (lambda: s.Slice(x(9), 0, -1, 3), "0 <= start <= stop"),
    "slice backwards": (lambda: s.Slice(x(9), 0, 4, 3), "0 <= start <= stop"),
    "slice beyond": (lambda: s.Slice(x(9), 0, 4, 10), "stop 10 is beyond the axis of 9"),
    "slice without a step": (lambda: s.Slice(x(9), 0, 4, 9, 0), "positive step"),
    "slice far from any axis": (lambda: s.Slice(x(9), 3, 4, 9), "axis 3 is outside a tensor of rank 1"),
    "slice of no axis": (lambda: s.Slice(x(9), 1, 4, 9), "axis 1 is outside a tensor of rank 1"),
    "slice of no axis from behind": (lambda: s.Slice(x(9), -2, 4, 9), "axis -2 is outside"),
    "concat of none": (lambda: s.Concat((), 0), "at least one operand"),
    "concat of ranks": (lambda: s.Concat((x(3, 4), x(3, 4, 1)), 0), "differ outside axis 0"),
    "concat of a lower rank": (lambda: s.Concat((x(3, 4), x(3)), 0), "differ outside axis 0"),
    "concat of a lower rank behind": (lambda: s.Concat((x(3, 4), x(3)), 1), "differ outside axis 1"),
    "concat of the third": (
        lambda: s.Concat((x(3, 4), x(2, 4), x(3, 5)), 0), r"shapes \(3, 4\) and \(3, 5\) differ outside axis 0",
    ),
    "concat behind": (lambda: s.Concat((x(3, 4), x(2, 4)), 1), "differ outside axis 1"),
    "concat beside": (lambda: s.Concat((x(3, 4), x(3, 5)), 0), "differ outside axis 0"),
    "concat of dtypes": (lambda: s.Concat((x(3), at(3)), 0), "different dtypes"),
    "concat of no axis": (lambda: s.Concat((x(3), x(3)), 1), "outside a tensor"),
    "pad of fewer before": (lambda: s.Pad(x(3, 4), (0,), (0, 0)), "one low and one high"),
    "pad of fewer after": (lambda: s.Pad(x(3, 4), (0, 0), (0,)), "one low and one high"),
    "pad of fewer": (lambda: s.Pad(x(3, 4), (0,), (0,)), "one low and one high"),
    "pad of more": (lambda: s.Pad(x(3), (0, 0), (0, 0)), "one low and one high"),
    "pad below 0 before": (lambda: s.Pad(x(3, 4), (0, -1), (0, 5)), "cannot be negative"),
    "pad below 0 after": (lambda: s.Pad(x(3, 4), (0, 5), (-1, 0)), "cannot be negative"),
    "gather by floats": (lambda: s.Gather(x(3), x(2)), "must be integers, not f32"),
    "gather of no axis": (lambda: s.Gather(x(3), at(2), 1), "outside a tensor"),
    "gather elements by floats": (lambda: s.GatherElements(x(3), x(2), 0), "must be integers"),
    "gather elements of ranks": (lambda: s.GatherElements(x(3, 4), at(3), 0), "the operand's rank"),
    "gather elements beside": (lambda: s.GatherElements(x(3, 4), at(2, 3), 0), "differ in axis 1: 3 and 4"),
    "gather elements before": (lambda: s.GatherElements(x(3, 4), at(2, 3), -1), "differ in axis 0: 2 and 3"),
    "gather elements beyond": (lambda: s.GatherElements(x(3, 4), at(3, 5), 0), "differ in axis 1: 5 and 4"),
    "checked floats": (lambda: s.CheckedIndex(x(3), None, 4), "must be integers"),
    "checked by small sizes": (lambda: s.CheckedIndex(at(3), at(3, dtype="i16")), "i32 or i64, not i16"),
    "checked by other sizes": (lambda: s.CheckedIndex(at(3), at(2)), "sizes of .* for indices of"),
    "cumsum of no axis": (lambda: s.Cumsum(x(3), 1), "outside a tensor"),
    "sum of no axis": (lambda: s.Sum(x(3), (0, 1)), "outside a tensor"),
    "sum of an axis twice": (lambda: s.Mean(x(2, 3), (1, -1)), "name an axis of rank 2 twice"),
    "argmax of no axis": (lambda: s.Argmax(x(3), -2), "outside a tensor"),
    "top k of fewer": (lambda: s.TopK(x(3, 2), 3, 1), "k = 3 of an axis of 2"),
    "softmax of integers": (lambda: s.Softmax(at(3), 0), "needs floats"),
    "softmax of no axis": (lambda: s.Softmax(x(3), 1), "outside a tensor"),
    "vector times matrix": (lambda: s.Matmul(x(3), x(3, 2)), "needs matrices"),
    "matrix times vector": (lambda: s.Matmul(x(2, 3), x(3)), "needs matrices"),
    "inner sizes": (lambda: s.Matmul(x(2, 3), x(2, 3)), "inner sizes differ"),
    "leading sizes": (lambda: s.Matmul(x(2, 2, 3), x(3, 3, 2)), "do not broadcast"),
    "matrices of dtypes": (lambda: s.Matmul(x(2, 3), at(3, 2)), "different dtypes"),
    "unknown reduction": (lambda: s.Scatter(x(3), at(2), x(2), "sub"), "unknown reduction 'sub'"),
    "scatter by floats": (lambda: s.Scatter(x(3), x(2), x(2)), "must be integers"),
    "scatter of dtypes": (lambda: s.Scatter(x(3), at(2), at(2)), "different dtypes"),
    "scatter into one": (lambda: s.Scatter(x(), at(2), x(2)), "rows and a vector"),
    "scatter by a matrix": (lambda: s.Scatter(x(3, 2), at(2, 1), x(2, 2)), "rows and a vector"),
    "scatter of fewer updates": (lambda: s.Scatter(x(3, 2), at(2), x(1, 2)), "are not .2. rows of .3, 2."),
    "scatter of narrower updates": (lambda: s.Scatter(x(3, 2), at(2), x(2, 1)), "are not"),
    "scatter of flat updates": (lambda: s.Scatter(x(3, 2), at(2), x(2)), "are not"),
    "scatter of deeper updates": (lambda: s.Scatter(x(3, 2), at(2), x(2, 2, 1)), "are not"),
    "embed a vector": (lambda: llm.Embed(x(3), at(2)), "must be a matrix"),
    "embed by small ids": (lambda: llm.Embed(x(3, 2), at(2, dtype="i16")), "i32 or i64, not i16"),
    "quantize twice": (lambda: llm.Quantize(x(4, 64, encoding="q8g32"), "q8g32"), "already encoded"),
    "dequantize plain": (lambda: llm.Dequantize(x(4, 64)), "not encoded"),
    "round what is encoded": (lambda: llm.QuantizeActivations(x(4, 64, encoding="q8g32"), 8), "already encoded"),
    "round in groups of less": (lambda: llm.QuantizeActivations(x(4, 64), -8), "positive group"),
    "round in groups of none": (lambda: llm.QuantizeActivations(x(4, 64), 0), "positive group"),
    "linear by a vector": (lambda: llm.Linear(x(3, 4), x(4)), "must be a matrix"),
    "linear of other features": (lambda: llm.Linear(x(3, 4), x(2, 5)), "4 features meet 5 inputs"),
    "linear of more features": (lambda: llm.Linear(x(3, 5), x(2, 4)), "5 features meet 4 inputs"),
    "linear with an unknown rounding": (lambda: llm.Linear(x(3, 4), x(2, 4), rounding="f8"), "unknown rounding 'f8'"),
    "linear with another bias": (lambda: llm.Linear(x(3, 4), x(2, 4), x(4)), "bias of .* outputs 2"),
    "linear with another residual": (lambda: llm.Linear(x(3, 4), x(2, 4), None, x(2)), "residual of"),
    "linear with a longer residual": (lambda: llm.Linear(x(3, 4), x(2, 4), None, x(4, 2)), "residual of"),
    "gated linear by a vector": (lambda: llm.GatedLinear(x(3, 4), x(4)), "must be a matrix"),
    "gated linear of other features": (lambda: llm.GatedLinear(x(3, 4), x(2, 5)), "4 features meet 5 inputs"),
    "gated linear of a batch's features": (lambda: llm.GatedLinear(x(2, 3, 4), x(2, 5)), "4 features meet 5 inputs"),
    "gated linear of odd outputs": (lambda: llm.GatedLinear(x(3, 4), x(3, 4)), "3 does not split into 2"),
    "rms norm by another weight": (lambda: llm.RMSNorm(x(3, 4), x(3), 1e-5), "for rows of 4"),
    "rms norm of a batch": (lambda: llm.RMSNorm(x(2, 3, 4), x(3), 1e-5), "for rows of 4"),
    "layer norm by another weight": (lambda: llm.LayerNorm(x(3, 4), x(3), x(4), 1e-5), "for rows of 4"),
    "layer norm by another shift": (lambda: llm.LayerNorm(x(3, 4), x(4), x(3), 1e-5), "for rows of 4"),
    "angles of a matrix": (lambda: llm.RopeAngles(at(3, 1), x(2)), r"positions \[T\]"),
    "angles by a matrix": (lambda: llm.RopeAngles(at(3), x(2, 1)), r"frequencies \[pairs\]"),
    "rope of a matrix": (lambda: llm.Rope(x(3, 8), x(3, 2, 4)), "not rank 2"),
    "rope of a batch": (lambda: llm.Rope(x(3, 1, 8, 1), x(3, 2, 4)), "not rank 4"),
    "rope by a matrix": (lambda: llm.Rope(x(3, 1, 8), x(3, 2)), "needs angles"),
    "rope by three": (lambda: llm.Rope(x(3, 1, 8), x(3, 3, 4)), "needs angles"),
    "rope of other tokens": (lambda: llm.Rope(x(2, 1, 8), x(3, 2, 4)), "different token counts"),
    "rope of too many pairs": (lambda: llm.Rope(x(3, 1, 7), x(3, 2, 4)), "more angles than channels"),
    "rope of unknown pairs": (lambda: llm.Rope(x(3, 1, 80), x(3, 2, S)), "more angles than channels"),
    "rope of unknown channels": (lambda: llm.Rope(x(3, 1, S), x(3, 2, 1)), "more angles than channels"),
    "attention of matrices": (lambda: a.Attention(x(3, 8), x(5, 8), x(5, 4)), "one rank, at least 3"),
    "attention of ranks": (lambda: a.Attention(x(1, 3, 6, 8), K, V), "one rank"),
    "attention of a value's rank": (lambda: a.Attention(Q, K, x(1, 5, 2, 4)), "one rank"),
    "attention of other keys": (lambda: a.Attention(Q, x(5, 2, 7), V), "different sizes"),
    "attention of longer keys": (lambda: a.Attention(Q, x(5, 2, 9), V), "different sizes"),
    "attention of fewer values": (lambda: a.Attention(Q, K, x(4, 2, 4)), "keys and values"),
    "attention of other value heads": (lambda: a.Attention(Q, K, x(5, 1, 4)), "keys and values"),
    "attention of batches": (
        lambda: a.Attention(x(2, 3, 6, 8), x(3, 5, 2, 8), x(3, 5, 2, 4)), "different leading sizes",
    ),
    "attention of heads": (lambda: a.Attention(x(3, 5, 8), K, V), "5 heads over 2 key heads"),
    "append other keys": (lambda: a.KVAppend(CACHE, x(3, 2, 7), x(3, 2, 4), at(3)), "keys of"),
    "append keys of other heads": (lambda: a.KVAppend(CACHE, x(3, 1, 8), x(3, 2, 4), at(3)), "keys of"),
    "append longer keys": (lambda: a.KVAppend(CACHE, x(3, 2, 9), x(3, 2, 4), at(3)), "keys of"),
    "append keys of more heads": (lambda: a.KVAppend(CACHE, x(3, 3, 8), x(3, 2, 4), at(3)), "keys of"),
    "append other values": (lambda: a.KVAppend(CACHE, x(3, 2, 8), x(3, 2, 5), at(3)), "values of"),
    "append fewer values": (lambda: a.KVAppend(CACHE, x(3, 2, 8), x(2, 2, 4), at(3)), "one slot a token"),
    "append more values": (lambda: a.KVAppend(CACHE, x(3, 2, 8), x(4, 2, 4), at(3)), "one slot a token"),
    "append to fewer slots": (lambda: a.KVAppend(CACHE, x(3, 2, 8), x(3, 2, 4), at(2)), "one slot a token"),
    "paged queries of a matrix": (lambda: a.PagedAttention(x(3, 8), *PAGED[1:]), "queries of"),
    "paged queries of another size": (lambda: a.PagedAttention(x(3, 6, 7), *PAGED[1:]), "queries of"),
    "paged heads": (lambda: a.PagedAttention(x(3, 5, 8), *PAGED[1:]), "do not split"),
    "paged both ways without starts": (lambda: a.PagedAttention(*PAGED, causal=False), "needs starts"),
    "paged bias of a vector": (lambda: a.PagedAttention(*PAGED, bias=x(6)), "the bias must be"),
    "paged bias of other heads": (lambda: a.PagedAttention(*PAGED, bias=x(5, 7)), "the bias must be"),
    "paged bias without a middle": (lambda: a.PagedAttention(*PAGED, bias=x(6, 8)), "the bias must be"),
    "paged bias of an unknown size": (lambda: a.PagedAttention(*PAGED, bias=x(6, S)), "the bias must be"),
    "nibbles of integers": (lambda: i.UnpackNibbles(at(3, dtype="i8")), "needs bytes"),
    "nibbles of one": (lambda: i.UnpackNibbles(at(dtype="u8")), "needs bytes"),
    "scaled floats": (lambda: i.ScaleIntegers(x(5, 7), x(7)), "needs integers, not f32"),
    "scaled by integers": (lambda: i.ScaleIntegers(at(5, 7), at(7)), "scales are i32"),
    "scaled by others": (lambda: i.ScaleIntegers(at(5, 7), x(5)), "do not broadcast"),
    "scaled by more": (lambda: i.ScaleIntegers(at(7), x(5, 7)), "scales of .5, 7. for integers of .7."),
    "scaled from others": (lambda: i.ScaleIntegers(at(7), x(7), at(5, 7)), "zeros of"),
    "scaled in blocks of less": (lambda: i.ScaleIntegers(at(5, 7), x(2, 7), None, 0, -3), "positive block"),
    "scaled in blocks before": (lambda: i.ScaleIntegers(at(5, 7), x(2, 7), None, -1, 3), "positive block and an axis"),
    "scaled in blocks behind": (lambda: i.ScaleIntegers(at(5, 7), x(2, 7), None, 2, 3), "positive block and an axis"),
    "scaled in fewer blocks": (lambda: i.ScaleIntegers(at(7, 7), x(2, 7), None, 0, 3), "do not broadcast"),
    "packed with minimums": (lambda: i.PackGroups(SIGNED, x(4, 2), x(4, 2), "q8g32"), "minimums go with"),
    "packed without minimums": (lambda: i.PackGroups(BYTES, x(4, 2), None, "q4g32a"), "minimums go with"),
    "packed of bytes": (lambda: i.PackGroups(BYTES, x(4, 2), None, "q8g32"), "integers are u8"),
    "packed of fewer scales": (lambda: i.PackGroups(SIGNED, x(4, 1), None, "q8g32"), "groups are .4, 2."),
    "packed of fewer minimums": (lambda: i.PackGroups(BYTES, x(4, 2), x(4, 1), "q4g32a"), "groups are .4, 2."),
    "packed by integers": (lambda: i.PackGroups(SIGNED, at(4, 2), None, "q8g32"), "not floats"),
    "rounded integers": (lambda: i.RoundToIntegers(at(3), x(), None, "u8"), "needs floats"),
    "rounded by integers": (lambda: i.RoundToIntegers(x(3), at(), None, "u8"), "needs floats"),
    "rounded to floats": (lambda: i.RoundToIntegers(x(3), x(), None, "f16"), "rounds to integers, not f16"),
    "rounded by more": (lambda: i.RoundToIntegers(x(3), x(2, 3), None, "u8"), "broadcast to x"),
    "rounded from more": (lambda: i.RoundToIntegers(x(3), x(), at(2, 3), "u8"), "broadcast to x"),
    "unknown pooling": (lambda: r.PoolTokens(x(3, 4), at(2), "min"), "unknown kind 'min'"),
    "pooled number": (lambda: r.PoolTokens(x(), at(2)), "tokens on axis 0"),
    "pooled by a matrix": (lambda: r.PoolTokens(x(3, 4), at(2, 1)), "starts must be"),
    "pooled by wide starts": (lambda: r.PoolTokens(x(3, 4), at(2, dtype="i64")), "starts must be"),
    "pooled by narrow starts": (lambda: r.PoolTokens(x(3, 4), at(2, dtype="i16")), "starts must be"),
    "pooled by floats": (lambda: r.PoolTokens(x(3, 4), x(2)), "starts must be"),
    "bias of a batch": (lambda: r.RelativeBias(x(2, 3, 9), 3), "must be a matrix"),
    "bias of a vector": (lambda: r.RelativeBias(x(9), 3), "must be a matrix"),
    "bias without a middle": (lambda: r.RelativeBias(x(2, 8), 3), "needs a middle"),
    "bias of an unknown middle": (lambda: r.RelativeBias(x(2, S), 3), "needs a middle"),
    "a cache from nothing": (lambda: RunKernels((), "", "", (), "cache"), "starts from a cache"),
    "a cache from a tensor": (lambda: RunKernels((x(3),), "", "", (), "cache"), "starts from a cache"),
    "kernels to nowhere": (lambda: RunKernels((), "", "", (), "heap+0", (3,), "f32"), "unknown buffer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(IRError, match=message):
        make()


MADE: dict[str, tuple[Callable[[], Op], Tensor]] = {
    "a vector beside a matrix": (lambda: e.Add(x(4), x(3, 4)), Tensor((3, 4), "f32")),
    "ones on both sides": (lambda: e.Add(x(3, 1), x(2, 1, 4)), Tensor((2, 3, 4), "f32")),
    "one of one": (lambda: e.Mul(x(1), x(S, 1)), Tensor((S, 1), "f32")),
    "none of one": (lambda: e.Add(x(0), x(1)), Tensor((0,), "f32")),
    "absolute integers": (lambda: e.Abs(at(3)), Tensor((3,), "i32")),
    "bits of floats": (lambda: e.Bitcast(x(3, dtype="bf16"), "u16"), Tensor((3,), "u16")),
    "an empty slice": (lambda: s.Slice(x(9), 0, 4, 4), Tensor((0,), "f32")),
    "a slice of none": (lambda: s.Slice(x(0), 0, 0, 0), Tensor((0,), "f32")),
    "a slice to the end": (lambda: s.Slice(x(2, 9, 3), -2, 0, 9, 4), Tensor((2, 3, 3), "f32")),
    "a slice short of a step": (lambda: s.Slice(x(9), 0, 1, 9, 4), Tensor((2,), "f32")),
    "a slice of a size": (lambda: s.Slice(x(S), 0, 1, S - 1), Tensor((S - 2,), "f32")),
    "one joined": (lambda: s.Concat((x(3),), 0), Tensor((3,), "f32")),
    "joined from behind": (lambda: s.Concat((x(3, 4), x(3, S)), -1), Tensor((3, S + 4), "f32")),
    "padded number": (lambda: s.Pad(x(), (), ()), Tensor((), "f32")),
    "padded": (lambda: s.Pad(x(3, S), (1, 2), (0, 4)), Tensor((4, S + 6), "f32")),
    "gathered by a number": (lambda: s.Gather(x(3, 4), at(), 1), Tensor((3,), "f32")),
    "gathered from behind": (lambda: s.Gather(x(3, 4, 5), at(7, 8), -2), Tensor((3, 7, 8, 5), "f32")),
    "gathered elements": (lambda: s.GatherElements(x(3, 4), at(3, 9), -1), Tensor((3, 9), "f32")),
    "checked in place": (lambda: s.CheckedIndex(at(3), None, 4), Tensor((3,), "i32")),
    "checked by sizes": (lambda: s.CheckedIndex(at(3), at(3, dtype="i64")), Tensor((3,), "i32")),
    "checked bytes": (lambda: s.CheckedIndex(at(3, dtype="u8"), None, 4), Tensor((3,), "i64")),
    "checked below 2**31": (lambda: s.CheckedIndex(at(3), None, BIG - 1), Tensor((3,), "i32")),
    "checked below more": (lambda: s.CheckedIndex(at(3), None, BIG), Tensor((3,), "i64")),
    "checked below much more": (lambda: s.CheckedIndex(at(3), None, BIG + 1), Tensor((3,), "i64")),
    "checked without a bound": (lambda: s.CheckedIndex(at(3), None, symbol("U", 1)), Tensor((3,), "i64")),
    "kept axes": (lambda: s.Sum(x(2, 3, 4), (0, -1)), Tensor((1, 3, 1), "f32")),
    "dropped axes": (lambda: s.Sum(x(2, 3, 4), (0, -1), False), Tensor((3,), "f32")),
    "all of them": (lambda: s.TopK(x(3, 2), 2, -1), Tensor((3, 2), "i64")),
    "best of a size": (lambda: s.TopK(x(S, 2), S, 0), Tensor((S, 2), "i64")),
    "an argmax from behind": (lambda: s.Argmax(x(3, 2, 5), -2), Tensor((3, 5), "i64")),
    "matrices of batches": (lambda: s.Matmul(x(5, 1, 2, 3), x(4, 3, 7)), Tensor((5, 4, 2, 7), "f32")),
    "scattered numbers": (lambda: s.Scatter(x(3), at(2, dtype="i64"), x(2)), Tensor((3,), "f32")),
    "scattered none": (lambda: s.Scatter(x(3, 2), at(0), x(0, 2)), Tensor((3, 2), "f32")),
    "embedded number": (lambda: llm.Embed(x(3, 2), at(), "f16"), Tensor((2,), "f16")),
    "linear of a batch": (lambda: llm.Linear(x(2, 3, 4), x(5, 4), x(5), x(2, 3, 5)), Tensor((2, 3, 5), "f32")),
    "gated": (lambda: llm.GatedLinear(x(2, 3, 4), x(10, 4)), Tensor((2, 3, 5), "f32")),
    "rope of all channels": (lambda: llm.Rope(x(3, 1, 8), x(3, 2, 4)), Tensor((3, 1, 8), "f32")),
    "attention of a batch": (
        lambda: a.Attention(x(2, S, 6, 8), x(2, 5, 2, 8), x(2, 5, 2, 4)), Tensor((2, S, 6, 4), "f32"),
    ),
    "paged": (lambda: a.PagedAttention(*PAGED, bias=x(6, 7)), Tensor((3, 6, 4), "f32")),
    "paged both ways": (lambda: a.PagedAttention(*PAGED, starts=at(2), causal=False), Tensor((3, 6, 4), "f32")),
    "nibbles": (lambda: i.UnpackNibbles(at(3, 2, dtype="u8")), Tensor((3, 4), "u8")),
    "scaled": (lambda: i.ScaleIntegers(at(5, 7), x(7, dtype="f16"), at()), Tensor((5, 7), "f16")),
    "scaled in blocks": (lambda: i.ScaleIntegers(at(5, 7), x(5, 3), at(5, 1), 1, 3), Tensor((5, 7), "f32")),
    "scaled in one block": (lambda: i.ScaleIntegers(at(5, 7), x(5, 1), None, 1, 9), Tensor((5, 7), "f32")),
    "packed to the last": (
        lambda: i.PackGroups(at(4, 65, dtype="i8"), x(4, 3), None, "q8g32"),
        Tensor((4, 65), "f32", parse_encoding("q8g32")),
    ),
    "packed batches": (
        lambda: i.PackGroups(at(2, 3, 65, dtype="i8"), x(2, 3, 3), None, "q8g32"),
        Tensor((2, 3, 65), "f32", parse_encoding("q8g32")),
    ),
    "rounded in groups of one": (
        lambda: llm.QuantizeActivations(x(4, 64), 1), Tensor((4, 64), "f32", parse_encoding("a8g1")),
    ),
    "rounded": (lambda: i.RoundToIntegers(x(5, 7), x(7), at(5, 1), "i8"), Tensor((5, 7), "i8")),
    "pooled": (lambda: r.PoolTokens(x(7, 3, 2), at(S + 1)), Tensor((S, 3, 2), "f32")),
    "pooled numbers": (lambda: r.PoolTokens(x(7), at(4)), Tensor((3,), "f32")),
    "a bias of one": (lambda: r.RelativeBias(x(2, 1), S), Tensor((2, S, S), "f32")),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_is_made(name: str) -> None:
    make, expected = MADE[name]
    assert make().type == expected


def test_what_depends_on_a_size_is_an_error() -> None:
    for make in (
        lambda: s.Slice(x(S), 0, 0, 3),
        lambda: s.Slice(x(S), 0, S - 3, S),
        lambda: s.TopK(x(S), 3, 0),
    ):
        with pytest.raises(DimError, match="cannot settle"):
            make()
    assert s.TopK(x(S), 2, 0).shape == (2,) and s.Slice(x(S), 0, S - 2, S).shape == (2,)
