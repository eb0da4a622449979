"""Every op's meaning: `evaluate` against torch or a naive loop, and `decompose` against `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmc.compiler.ir import adapters as adapters_ir
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import integers, llm, ragged
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.encoded import PAGE, Encoded, Pages
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.op import REGISTRY, Input, Op, Value
from llmc.compiler.ir.types import KV, Tensor, dtype_of, precise

Array = np.ndarray
RNG = np.random.default_rng(7)


@dataclass(frozen=True)
class Case:
    """An op over arrays, and what it should give for them; `name` tells cases of one op apart."""

    name: str
    make: Callable[..., Op]
    arrays: tuple[Array, ...]
    expected: Array
    tolerance: float = 1e-6

    def __str__(self) -> str:
        return self.name


def normal(*shape: int, dtype: type = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def run(value: Value, inputs: Mapping[Value, object]) -> Array:
    def no_params(name: str) -> Array:
        raise AssertionError(name)

    return evaluate_values([value], inputs, no_params, {})["0"]  # type: ignore[arg-type, return-value]


def built(case: Case) -> tuple[Op, dict[Value, Array]]:
    inputs = [Input(f"i{n}", Tensor(a.shape, dtype_of(a.dtype))) for n, a in enumerate(case.arrays)]
    return case.make(*inputs), dict(zip(inputs, case.arrays, strict=True))


def torch_case(op: type[Op], reference: Callable[..., torch.Tensor], *arrays: Array, tolerance: float = 1e-6) -> Case:
    expected = reference(*(torch.from_numpy(a) for a in arrays)).numpy()
    return Case(op.name, op, arrays, expected, tolerance)


X, Y, POSITIVE = normal(3, 1, 7), normal(5, 1), np.abs(normal(3, 7)) + 0.1
X3 = 3 * X
INTS, OTHER = RNG.integers(-9, 10, (5, 7)), RNG.integers(1, 6, (5, 7)) * RNG.choice([-1, 1], (5, 7))
BYTES = RNG.integers(0, 256, (5, 7)).astype(np.uint8)
FLAG, FLAG2 = RNG.random((5, 7)) < 0.5, RNG.random((5, 7)) < 0.5
IDS = RNG.integers(-7, 7, (3, 2)).astype(np.int64)


def naive_power(a: Array, b: Array) -> Array:
    """Integers to integers: one Python number after another, fractions cut off (of zero to a negative power: 0)."""
    return np.vectorize(lambda x, y: int(float(x) ** int(y)) if x or y >= 0 else 0, otypes=[np.int64])(a, b)


def elementwise_cases() -> list[Case]:
    """One or more for each t op that works element by element."""
    unary: list[tuple[type[Op], Callable[..., torch.Tensor], Array]] = [
        (e.Neg, torch.neg, X), (e.Abs, torch.abs, X), (e.Exp, torch.exp, X), (e.Log, torch.log, POSITIVE),
        (e.Sqrt, torch.sqrt, POSITIVE), (e.Rsqrt, torch.rsqrt, POSITIVE), (e.Reciprocal, torch.reciprocal, POSITIVE),
        (e.Tanh, torch.tanh, X), (e.Sigmoid, torch.sigmoid, 40 * X), (e.Erf, torch.erf, X), (e.Sin, torch.sin, X),
        (e.Cos, torch.cos, X), (e.Floor, torch.floor, 5 * X), (e.Round, torch.round, np.arange(-4, 4) / 2),
        (e.Relu, torch.relu, X), (e.Not, torch.logical_not, FLAG), (e.Neg, torch.neg, INTS), (e.Relu, torch.relu, INTS),
        (e.Atan, torch.atan, 9 * X),
    ]  # fmt: skip
    binary: list[tuple[type[Op], Callable[..., torch.Tensor], Array, Array]] = [
        (e.Add, torch.add, X, Y), (e.Sub, torch.sub, X, Y), (e.Mul, torch.mul, X, Y), (e.Div, torch.div, X, Y),
        (e.Div, lambda a, b: torch.div(a, b, rounding_mode="trunc"), INTS, OTHER),
        (e.FloorDivide, torch.floor_divide, INTS, OTHER), (e.Mod, torch.remainder, INTS, OTHER),
        (e.Mod, torch.remainder, X, Y), (e.Pow, torch.pow, POSITIVE, normal(7)),
        (e.Maximum, torch.maximum, X, Y), (e.Minimum, torch.minimum, X, Y),
        (e.Fmod, torch.fmod, 9 * X, Y), (e.Fmod, torch.fmod, INTS, OTHER), (e.BitAnd, torch.bitwise_and, INTS, OTHER),
        (e.BitOr, torch.bitwise_or, INTS, OTHER), (e.BitXor, torch.bitwise_xor, INTS, OTHER),
        (e.ShiftLeft, torch.bitwise_left_shift, BYTES, BYTES % 7),
        (e.ShiftRight, torch.bitwise_right_shift, BYTES, BYTES % 7),
        (e.Equal, torch.eq, INTS, OTHER), (e.NotEqual, torch.ne, INTS, OTHER), (e.Less, torch.lt, X, Y),
        (e.LessEqual, torch.le, INTS, OTHER), (e.Greater, torch.gt, X, Y), (e.GreaterEqual, torch.ge, INTS, OTHER),
        (e.And, torch.logical_and, FLAG, FLAG2), (e.Or, torch.logical_or, FLAG, FLAG2),
    ]  # fmt: skip
    activations: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": F.relu, "relu2": lambda x: F.relu(x) ** 2, "silu": F.silu, "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    }  # fmt: skip
    assert set(activations) == set(e.ACTIVATIONS)
    return [
        *(torch_case(op, f, a) for op, f, a in unary),
        *(torch_case(op, f, a, b, tolerance=2e-6) for op, f, a, b in binary),
        *(
            Case(
                f"t.activation {kind}",
                lambda x, kind=kind: e.Activation(x, kind),
                (3 * X,),
                f(torch.from_numpy(3 * X)).numpy(),
            )
            for kind, f in activations.items()
        ),
        torch_case(e.Where, torch.where, FLAG, X[:, :, :], normal(5, 7)),
        Case("t.constant", lambda: e.constant([1.5, -2], "f16"), (), np.array([1.5, -2], np.float16)),
        Case("t.cast", lambda x: e.Cast(x, "i32"), (5 * X,), torch.from_numpy(5 * X).to(torch.int32).numpy()),
        Case("t.cast f16", lambda x: e.Cast(x, "f16"), (X,), torch.from_numpy(X).half().numpy()),
        Case("t.bitcast", lambda x: e.Bitcast(x, "i32"), (X,), X.view(np.int32)),
        Case("t.shift_left out", lambda x: e.ShiftLeft(x, e.constant(8, "u8")), (BYTES,), np.zeros((5, 7), np.uint8)),
        Case("t.shift_left negative", e.ShiftLeft, (INTS, 0 * INTS - 1), 0 * INTS),
        Case("t.shift_right ints", e.ShiftRight, (INTS, np.abs(OTHER)), INTS // 2 ** np.abs(OTHER)),
        Case("t.shift_right out", e.ShiftRight, (INTS, 0 * INTS + 64), np.where(INTS < 0, -1, 0)),
        Case("t.pow ints", e.Pow, (INTS, OTHER // 2), naive_power(INTS, OTHER // 2)),
        Case("t.cast bool", lambda x: e.Cast(x, "bool"), (INTS,), INTS != 0),
    ]


def scattered(a: Array, rows: Array, mode: str) -> Array:
    """a[0] with the rows of a[1] put where `rows` says, one after another."""
    combine: dict[str, Callable[[Array, Array], Array]] = {
        "none": lambda old, new: new, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum
    }  # fmt: skip
    result = a[0].copy()
    for i, row in enumerate(rows):
        result[row] = combine[mode](result[row], a[1][i])
    return result


def structural_cases() -> list[Case]:
    """One or more for each t op that moves, reduces or multiplies."""
    a, b = normal(2, 3, 5, 4), normal(3, 4, 6)
    t = torch.from_numpy
    index = np.abs(IDS) % 7
    elements = RNG.integers(0, 3, (2, 1, 7)).astype(np.int64)
    pool = normal(3, 1, 7)
    rows = np.array([2, 0, 2])
    reduced: list[tuple[type[s.Reduce], Callable[..., torch.Tensor]]] = [
        (s.Sum, torch.sum), (s.Mean, torch.mean), (s.Max, torch.amax), (s.Min, torch.amin)
    ]  # fmt: skip
    several = torch.cat([t(a), t(a + 1), t(a)], -1)
    taken, wrapped = t(pool)[:, :, t(index)], t(pool)[:, :, t(IDS)]
    picked = torch.gather(t(pool), 0, t(elements))
    cases = [
        Case("t.iota", lambda: s.Iota(9, "i32"), (), torch.arange(9, dtype=torch.int32).numpy()),
        Case("t.reshape", lambda x: s.Reshape(x, (6, 5, 4)), (a,), t(a).reshape(6, 5, 4).numpy()),
        Case("t.transpose", lambda x: s.Transpose(x, (2, 0, 3, 1)), (a,), t(a).permute(2, 0, 3, 1).numpy()),
        Case("t.broadcast", lambda x: s.Broadcast(x, (2, 3, 5, 7)), (X,), t(X)[None].expand(2, 3, 5, 7).numpy()),
        Case("t.slice", lambda x: s.Slice(x, 2, 1, 5, 3), (a,), t(a)[:, :, 1:5:3].numpy()),
        Case("t.concat", lambda x, y: s.Concat((x, y, x), -1), (a, a + 1), several.numpy()),
        Case("t.pad", lambda x: s.Pad(x, (0, 2), (1, 0), -1.5), (Y,), F.pad(t(Y), (2, 0, 0, 1), value=-1.5).numpy()),
        Case("t.gather", lambda x, i: s.Gather(x, i, 2), (pool, index), taken.numpy()),
        Case("t.gather negative", lambda x, i: s.Gather(x, i, -1), (pool, IDS), wrapped.numpy()),
        Case("t.gather_elements", lambda x, i: s.GatherElements(x, i, 0), (pool, elements), picked.numpy()),
        Case("t.checked_index", lambda x: s.CheckedIndex(x, None, 7), (IDS,), np.where(IDS < 0, IDS + 7, IDS)),
        Case("t.checked_index sizes", s.CheckedIndex, (IDS, np.abs(IDS) + 1), np.where(IDS < 0, 1, IDS)),
        Case("t.cumsum", lambda x: s.Cumsum(x, -1), (INTS,), torch.cumsum(t(INTS), -1).numpy()),
        Case("t.argmax", lambda x: s.Argmax(x, 2), (a,), torch.argmax(t(a), 2).numpy()),
        Case("t.softmax", lambda x: s.Softmax(x, 1), (50 * a,), torch.softmax(t(50 * a), 1).numpy()),
        Case("t.matmul", s.Matmul, (a, b), torch.matmul(t(a), t(b)).numpy(), 1e-5),
        Case("t.prod", lambda x: s.Prod(x, (1,)), (a,), torch.prod(t(a), 1, keepdim=True).numpy()),
        Case("t.top_k", lambda x: s.TopK(x, 3, 2), (a,), torch.topk(t(a), 3, 2)[1].numpy()),
        Case("t.top_k smallest", lambda x: s.TopK(x, 2, 1, False), (a,), torch.topk(t(a), 2, 1, False)[1].numpy()),
        Case("t.top_k of equals", lambda x: s.TopK(x, 4, 0), (np.array([1, 7, 1, 7, 0]),), np.array([1, 3, 0, 2])),
        *(
            Case(f"t.scatter {mode}", partial(s.Scatter, reduction=mode), (a[0], rows, a[1]), scattered(a, rows, mode))
            for mode in ("none", "add", "mul", "max", "min")
        ),
        Case("t.any", lambda x: s.Any(x, (1,), False), (FLAG,), torch.any(t(FLAG), 1).numpy()),
        Case("t.all", lambda x: s.All(x, (0,)), (FLAG,), torch.all(t(FLAG), 0, keepdim=True).numpy()),
    ]  # fmt: skip
    for op, reference in reduced:
        for keep in (True, False):
            expected = reference(t(a), (1, 3), keepdim=keep).numpy()
            cases.append(
                Case(f"{op.name} keep={keep}", lambda x, op=op, keep=keep: op(x, (1, -1), keep), (a,), expected)
            )
    return cases


def torch_attention(
    q: Array, k: Array, v: Array, scale: float, causal: bool = True, window: int = 0, softcap: float = 0.0,
    sinks: Array | None = None, slopes: Array | None = None,
) -> Array:  # fmt: skip
    """q [T, heads, dim] at the end of k, v [S, kv_heads, dim]: scores written out, one head at a time."""
    outputs = []
    for head in range(q.shape[1]):
        own = head // (q.shape[1] // k.shape[1])
        scores = torch.from_numpy(q[:, head]) @ torch.from_numpy(k[:, own]).T * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        for row in range(q.shape[0]):
            at = k.shape[0] - q.shape[0] + row
            for key in range(k.shape[0]):
                if slopes is not None:
                    scores[row, key] += float(slopes[head]) * (key - at)
                if (causal and key > at) or (window and key <= at - window):
                    scores[row, key] = -torch.inf
        if sinks is not None:
            scores = torch.cat([scores, torch.full((len(scores), 1), float(sinks[head]))], 1)
        outputs.append(torch.softmax(scores, -1)[:, : k.shape[0]] @ torch.from_numpy(v[:, own]))
    return torch.stack(outputs, 1).numpy()


def llm_cases() -> list[Case]:
    """One or more for each llm op whose operands are plain arrays."""
    t = torch.from_numpy
    x, w, bias, residual = normal(2, 3, 31), normal(7, 31), normal(7), normal(2, 3, 7)
    scale, shift = normal(31), normal(31)
    table, ids = normal(11, 5), RNG.integers(0, 11, (2, 3)).astype(np.int32)
    q, k, v = normal(5, 6, 8), normal(9, 2, 8), normal(9, 2, 4)
    sinks, slopes = normal(6), np.abs(normal(6))
    rows = q[:, :, :]
    positions, frequencies = np.array([0, 3, 9, 10, 77], np.int32), np.array([1.0, 0.1, 0.01], np.float32)
    angles = np.stack([np.cos(np.outer(positions, frequencies)), np.sin(np.outer(positions, frequencies))], 1)
    angles = angles.astype(np.float32)
    gated = normal(14, 31)
    rms = t(x) * torch.rsqrt((t(x) ** 2).mean(-1, keepdim=True) + 1e-5)
    offset = rms * (1 + t(scale))
    linear = F.linear(t(x), t(w), t(bias))
    everything = F.gelu(linear) + t(residual)
    shifted = F.layer_norm(t(x), (31,), t(scale), t(shift), 1e-5)
    both = F.linear(t(x), t(gated), t(np.concatenate([bias, bias])))
    variants: list[dict[str, object]] = [
        {}, {"causal": False}, {"window": 3}, {"softcap": 2.0}, {"window": 1, "softcap": 0.5}
    ]  # fmt: skip
    return [
        Case("llm.embed", llm.Embed, (table, ids), table[ids]),
        Case("llm.embed f16", lambda a, b: llm.Embed(a, b, "f16"), (table, ids), table[ids].astype(np.float16)),
        Case("llm.linear", llm.Linear, (x, w), F.linear(t(x), t(w)).numpy(), 1e-5),
        Case("llm.linear all", partial(llm.Linear, activation="gelu"), (x, w, bias, residual),
             everything.numpy(), 1e-5),
        Case("llm.gated_linear", lambda *o: llm.GatedLinear(*o, "silu"), (x, gated, np.concatenate([bias, bias])),
             (F.silu(both[..., :7]) * both[..., 7:]).numpy(), 1e-5),
        Case("llm.rms_norm", lambda *o: llm.RMSNorm(*o, 1e-5), (x, scale), (rms * t(scale)).numpy(), 1e-5),
        Case("llm.rms_norm offset", partial(llm.RMSNorm, eps=1e-5, offset=1.0), (x, scale), offset.numpy(), 1e-5),
        Case("llm.rms_norm bare", lambda a: llm.RMSNorm(a, None, 1e-5), (x,), rms.numpy(), 1e-5),
        Case("llm.layer_norm", lambda *o: llm.LayerNorm(*o, 1e-5), (x, scale, shift),
             shifted.numpy(), 1e-5),
        Case("llm.layer_norm bare", lambda a: llm.LayerNorm(a, None, None, 1e-5), (x,),
             F.layer_norm(t(x), (31,)).numpy(), 1e-5),
        Case("llm.rope_angles", lambda *o: llm.RopeAngles(*o, 0.5), (positions, frequencies), 0.5 * angles, 1e-5),
        Case("llm.rope", llm.Rope, (rows, angles), turn(rows, angles, False)),
        Case("llm.rope interleaved", lambda *o: llm.Rope(*o, True), (rows, angles), turn(rows, angles, True)),
        Case("llm.quantize_activations", lambda a: llm.QuantizeActivations(a, 8), (x,), rounded_by_group(x, 8)),
        *(
            Case(f"llm.attention {options}", partial(llm.Attention, scale=0.3, **options), (q, k, v),
                 torch_attention(q, k, v, 0.3, **options), 1e-5)  # type: ignore[arg-type]
            for options in variants
        ),
        Case("llm.attention sinks slopes", lambda *o: llm.Attention(*o, scale=0.3), (q, k, v, sinks, slopes),
             torch_attention(q, k, v, 0.3, sinks=sinks, slopes=slopes), 1e-5),
        Case("llm.attention slopes", lambda a, b, c, d: llm.Attention(a, b, c, None, d, scale=0.3), (q, k, v, slopes),
             torch_attention(q, k, v, 0.3, slopes=slopes), 1e-5),
    ]  # fmt: skip


def turn(x: Array, angles: Array, interleaved: bool) -> Array:
    """Rotary embedding as complex multiplication, pair by pair."""
    result, pairs = x.copy(), angles.shape[2]
    for i in range(pairs):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        z = (x[:, :, first] + 1j * x[:, :, second]) * (angles[:, 0, i] + 1j * angles[:, 1, i])[:, None]
        result[:, :, first], result[:, :, second] = z.real, z.imag
    return result


def rounded_by_group(x: Array, group: int) -> Array:
    """int8 rounding, one row and group after another."""
    result = x.copy()
    for row in result.reshape(-1, x.shape[-1]):
        for begin in range(0, len(row), group):
            part = row[begin : begin + group]
            scale = np.float32(np.abs(part).max()) / np.float32(127)
            part[:] = np.round(part / scale) * scale
    return result


def integer_cases() -> list[Case]:
    """The ops of weights that a source has rounded, and of activations that it rounds."""
    q, scales, zeros = INTS.astype(np.int8), POSITIVE[0, :7].copy(), RNG.integers(-4, 5, (7,)).astype(np.int8)
    blocks = np.abs(normal(2, 7)) + np.float32(0.1)  # of three rows, the last one of two
    points = RNG.integers(-4, 5, (2, 7)).astype(np.int8)
    wide = [np.concatenate([np.repeat(x[:1], 3, 0), np.repeat(x[1:], 2, 0)]) for x in (blocks, points)]
    low_first = np.stack([BYTES % 16, BYTES // 16], axis=2).reshape(5, 14)
    x = np.concatenate([30 * normal(5, 7), np.array([[0.5, 1.5, -0.5, 2.5, 400, -400, 0]], np.float32)])
    half = np.float32(1)
    return [
        Case("llm.unpack_nibbles", integers.UnpackNibbles, (BYTES,), low_first),
        Case("llm.scale_integers", integers.ScaleIntegers, (q, scales, zeros), (q - zeros.astype(np.float32)) * scales),
        Case(
            "llm.scale_integers in blocks",
            lambda *operands: integers.ScaleIntegers(*operands, axis=0, block=3),
            (q, blocks, points),
            (q - wide[1].astype(np.float32)) * wide[0],
        ),
        Case(
            "llm.round_to_integers",
            lambda *operands: integers.RoundToIntegers(*operands, "u8"),
            (x, half, np.asarray(3, np.uint8)),
            np.clip(np.rint(x) + 3, 0, 255).astype(np.uint8),
        ),
    ]


def ragged_cases() -> list[Case]:
    """The ops over tokens of several sequences."""
    x, starts, table = normal(7, 3), np.array([0, 1, 5, 7], np.int32), normal(2, 9)
    reduced = {"mean": np.mean, "max": np.max, "sum": np.sum}
    distance = np.arange(4)[None, :] - np.arange(4)[:, None]
    return [
        *(
            Case(
                f"llm.pool_tokens {kind}",
                partial(ragged.PoolTokens, kind=kind),
                (x, starts),
                np.stack([reduced[kind](x[a:b], axis=0) for a, b in ((0, 1), (1, 5), (5, 7))]),
            )
            for kind in ragged.POOLINGS
        ),
        Case("llm.relative_bias", partial(ragged.RelativeBias, size=4), (table,), table[:, 4 + distance]),
    ]


def adapter_cases() -> list[Case]:
    """What adapters add: tokens of three adapters and of none, one of them without a part, ranks below the table's."""
    t = torch.from_numpy
    y, x, residual = normal(5, 9), normal(5, 7), normal(5, 9)
    adapters, ranks = np.array([2, 0, 1, 2, 3], np.int32), np.array([[0, 0], [4, 2], [1, 3], [0, 4]], np.int32)
    a, b, gated = normal(4, 2, 4, 7), normal(4, 4, 9), normal(5, 18)
    expected = y.copy()
    for token, adapter in enumerate(adapters):
        for part, columns in enumerate((slice(0, 6), slice(6, 9))):
            rank = ranks[adapter, part]
            delta = t(a[adapter, part, :rank]).T @ t(b[adapter, :rank, columns])
            expected[token, columns] += (t(x[token]) @ delta).numpy()
    both = F.silu(t(gated[:, :9])) * t(gated[:, 9:])
    return [
        Case("llm.low_rank", lambda *o: adapters_ir.LowRank(*o, (6, 9)), (y, x, adapters, a, b, ranks), expected, 1e-5),
        Case("llm.activated", partial(adapters_ir.Activated, activation="gelu"), (y,), F.gelu(t(y)).numpy(), 1e-5),
        Case("llm.activated gated", partial(adapters_ir.Activated, gated=True), (gated, residual),
             (both + t(residual)).numpy(), 1e-5),
    ]  # fmt: skip


CASES = [*elementwise_cases(), *structural_cases(), *llm_cases(), *integer_cases(), *ragged_cases(), *adapter_cases()]
# Ops over caches and encodings, which no plain array stands for: tested by name below.
OTHERS = {"llm.kv_append", "llm.paged_attention", "llm.quantize", "llm.dequantize", "llm.pack_groups"}


def test_every_op_has_a_case() -> None:
    # Kernel calls have no meaning in numpy: compiled programs are tested in test_program.py.
    meaningful = {name for name in REGISTRY if not name.startswith("k.")}
    assert {case.name.partition(" ")[0] for case in CASES} | OTHERS == meaningful


@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluate_agrees_with_the_reference(case: Case) -> None:
    op, inputs = built(case)
    found = run(op, inputs)
    assert found.shape == case.expected.shape == tuple(op.shape)
    assert dtype_of(found.dtype) == op.dtype
    np.testing.assert_allclose(found, case.expected, rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("llm.")], ids=str)
def test_decompose_means_the_same(case: Case) -> None:
    op, inputs = built(case)
    simpler = op.decompose()
    if simpler is None:
        primitive = isinstance(op, (llm.QuantizeActivations, integers.UnpackNibbles, ragged.PoolTokens))
        assert primitive, f"{case} has no decomposition"
        return
    assert simpler.type == op.type
    wide = {value: a.astype(np.float64) if a.dtype.kind == "f" else a for value, a in inputs.items()}
    with precise():
        expected, found = run(op, wide), run(simpler, wide)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


BINARY = [kind for kind in REGISTRY.values() if issubclass(kind, e.Binary)]


@pytest.mark.parametrize("kind", BINARY, ids=lambda kind: kind.name)
def test_an_op_commutes_where_its_operands_may_change_places(kind: type[e.Binary]) -> None:
    operands = (FLAG, FLAG2) if kind in (e.And, e.Or) else (INTS, OTHER)
    a, b = (Input(name, Tensor(x.shape, dtype_of(x.dtype))) for name, x in zip("ab", operands, strict=True))
    given = dict(zip((a, b), operands, strict=True))
    assert kind.commutative == np.array_equal(run(kind(a, b), given), run(kind(b, a), given))


@pytest.mark.parametrize("rounding", llm.ACTIVATION_ROUNDINGS)
def test_linear_rounds_its_activations_first(rounding: str) -> None:
    x, w = normal(3, 65), normal(4, 65)
    a, b = (Input(n, Tensor(v.shape, "f32")) for n, v in (("a", x), ("b", w)))
    op = llm.Linear(a, b, rounding=rounding)
    reference = {"f32": x, "bf16": torch.from_numpy(x).bfloat16().float().numpy(), "int8": rounded_by_group(x, 64)}
    np.testing.assert_allclose(run(op, {a: x, b: w}), reference[rounding] @ w.T, rtol=1e-5, atol=1e-5)


def test_scales_are_looked_for_unless_that_is_not_wanted() -> None:
    w = normal(5, 70)
    a = Input("w", Tensor(w.shape, "f32"))
    looked, not_looked = (
        np.square(run(llm.Dequantize(quantized), {a: w}) - w).sum()
        for quantized in (llm.Quantize(a, "q4g32"), llm.Quantize(a, "q4g32", search=False))
    )
    assert looked < not_looked


def test_quantize_then_dequantize_stays_within_half_a_step() -> None:
    w = normal(5, 70)
    a = Input("w", Tensor(w.shape, "f32"))
    quantized = llm.Quantize(a, "q8g32", search=False)
    assert isinstance(run(quantized, {a: w}), Encoded)
    found = run(llm.Dequantize(quantized), {a: w})
    assert found.shape == w.shape
    # A step is max|w| / 127; the scale itself is rounded to f16.
    assert np.abs(found - w).max() <= (0.5 + 127 * 2**-11) * np.abs(w).max() / 127


@pytest.mark.parametrize("window", [0, 3])
def test_paged_attention_is_attention_over_each_sequence(window: int) -> None:
    """Two sequences, one of a full page and one that crosses it, appended in two steps, at pages in no order."""
    lengths, dim, kv_heads, heads = (PAGE + 5, PAGE), 4, 2, 6
    kind = KV(kv_heads, dim, dim, "f32")
    q, k, v = ([normal(n, h, dim) for n in lengths] for h in (heads, kv_heads, kv_heads))
    table = np.array([[2, 0], [1, 99]], np.int32)  # what stands behind a sequence's pages is not read
    cache = Input("cache", kind)
    pages = Pages.empty(kind, 3)
    found = [np.zeros_like(part) for part in q]
    for begin, end in ((0, 2), (2, None)):
        spans = [slice(begin, end) for _ in lengths]
        counts = [len(range(n)[span]) for n, span in zip(lengths, spans, strict=True)]
        arrays = [np.concatenate([part[span] for part, span in zip(parts, spans, strict=True)]) for parts in (q, k, v)]
        at = [(i, position) for i, n in enumerate(lengths) for position in range(n)[begin:end]]
        slots = np.array([table[i, position // PAGE] * PAGE + position % PAGE for i, position in at], np.int32)
        tiles = np.array([(0, 0, counts[0], begin), (1, counts[0], counts[1], begin)], np.int32)
        names = [Input(n, Tensor(a.shape, "f32")) for n, a in zip("qkv", arrays, strict=True)]
        extra = [Input(n, Tensor(a.shape, "i32")) for n, a in (("s", slots), ("t", tiles), ("b", table))]
        appended = llm.KVAppend(cache, names[1], names[2], extra[0])
        op = llm.PagedAttention(names[0], appended, extra[1], extra[2], scale=0.5, window=window)
        inputs: dict[Value, object] = {cache: pages, **dict(zip(names, arrays, strict=True))}
        inputs.update(zip(extra, (slots, tiles, table), strict=True))
        result = run(op, inputs)
        pages = run(appended, inputs)  # type: ignore[assignment]
        found[0][spans[0]], found[1][spans[1]] = result[: counts[0]], result[counts[0] :]
    for i in range(2):
        expected = torch_attention(q[i], k[i], v[i], 0.5, window=window)
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)
