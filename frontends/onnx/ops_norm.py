"""Normalisations over batches, channels and groups of them, and losses; the ones over tokens are in ops_attention."""

from __future__ import annotations

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import product
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.shapes import axis_of
from llmc.compiler.ir.structural import split_exact
from llmc.frontends.onnx.forms import broadcast, cast, like, reshape, squeeze, unsqueeze
from llmc.frontends.onnx.ops_reduce import log_softmax
from llmc.frontends.onnx.translation import Item, Node, Translation, Unsupported, handles
from llmc.frontends.onnx.windows import Window, in_windows


def _channels(vector: Value, rank: int) -> Value:
    return reshape(vector, (*vector.shape, *(1,) * (rank - 2)))


def normalised(x: Value, mean: Value, variance: Value, epsilon: float) -> Value:
    """(x - mean) / sqrt(variance + epsilon)"""
    return e.Mul(e.Sub(x, mean), e.Rsqrt(e.Add(variance, like(epsilon, variance))))


def moments(x: Value, axes: tuple[int, ...]) -> tuple[Value, Value]:
    """Mean and (population) variance over axes, which stay with size 1."""
    mean = s.Mean(x, axes)
    centred = e.Sub(x, mean)
    return mean, s.Mean(e.Mul(centred, centred), axes)


@handles("BatchNormalization")
def _batch_norm(
    t: Translation, node: Node, x: Item, scale: Item, bias: Item, mean: Item, variance: Item
) -> list[Value]:
    epsilon, rank = node.get("epsilon", 1e-5), x.rank
    wide = "f64" if x.dtype == "f64" else "f32"
    value = cast(x.value, wide)
    weights = [_channels(cast(item.value, wide), rank) for item in (scale, bias)]
    if not node.get("training_mode", 0):
        own = [_channels(cast(item.value, wide), rank) for item in (mean, variance)]
        found = normalised(value, own[0], own[1], epsilon)
        return [cast(e.Add(e.Mul(found, weights[0]), weights[1]), x.dtype)]
    momentum = node.get("momentum", 0.9)
    axes = tuple(i for i in range(rank) if i != 1)
    here = moments(value, axes)
    result = e.Add(e.Mul(normalised(value, *here, epsilon), weights[0]), weights[1])
    running = [
        e.Add(
            e.Mul(old.value, like(momentum, old.value)),
            e.Mul(cast(reshape(new, old.shape), old.dtype), like(1 - momentum, old.value)),
        )
        for old, new in zip((mean, variance), here, strict=True)
    ]
    return [cast(result, x.dtype), *running]


@handles("InstanceNormalization")
def _instance_norm(t: Translation, node: Node, x: Item, scale: Item, bias: Item) -> Value:
    mean, variance = moments(x.value, tuple(range(2, x.rank)))
    found = normalised(x.value, mean, variance, node.get("epsilon", 1e-5))
    return e.Add(e.Mul(found, _channels(scale.value, x.rank)), _channels(bias.value, x.rank))


@handles("GroupNormalization", since=18)
def _group_norm(t: Translation, node: Node, x: Item, scale: Item, bias: Item) -> Value:
    """Groups of channels; one scale and bias a channel, before opset 21 one a group."""
    groups = node.attributes["num_groups"]
    each = split_exact(x.shape[1], groups)
    wide = x.dtype if node.get("stash_type", 1) != 1 or x.dtype == "f64" else "f32"
    grouped = reshape(cast(x.value, wide), (x.shape[0], groups, each, *x.shape[2:]))
    mean, variance = moments(grouped, tuple(range(2, grouped.rank)))
    found = normalised(grouped, mean, variance, node.get("epsilon", 1e-5))

    def weights(item: Item) -> Value:
        if node.version < 21:
            return reshape(item.value, (1, groups, *(1,) * (grouped.rank - 2)))
        return reshape(item.value, (1, groups, each, *(1,) * (grouped.rank - 3)))

    found = cast(found, x.dtype)
    return reshape(e.Add(e.Mul(found, weights(scale)), weights(bias)), x.shape)


@handles("MeanVarianceNormalization")
def _mean_variance_norm(t: Translation, node: Node, x: Item) -> Value:
    axes = tuple(axis_of(axis, x.rank) for axis in node.get("axes") or (0, 2, 3))
    mean, variance = moments(x.value, axes)
    return e.Div(e.Sub(x.value, mean), e.Add(e.Sqrt(variance), like(1e-9, variance)))


@handles("LRN")
def _local_response_norm(t: Translation, node: Node, x: Item) -> Value:
    """x / (bias + alpha / size * the sum of the squares of near channels) ** beta. Krizhevsky et al. (2012)."""
    size = node.attributes["size"]
    value = x.value
    rows = reshape(e.Mul(value, value), (x.shape[0], 1, x.shape[1], product(x.shape[2:])))
    low = (size - 1) // 2
    near = in_windows(
        rows,
        [
            Window(x.shape[1], size, 1, 1, low, size - 1 - low, x.shape[1]),
            Window(rows.shape[3], 1, 1, 1, 0, 0, rows.shape[3]),
        ],
        0,
    )
    total = reshape(s.Sum(near, (3,), keep=False), x.shape)
    scaled = e.Add(e.Mul(total, like(node.get("alpha", 1e-4) / size, value)), like(node.get("bias", 1.0), value))
    return e.Div(value, e.Pow(scaled, like(node.get("beta", 0.75), value)))


@handles("NegativeLogLikelihoodLoss")
def _nll_loss(t: Translation, node: Node, logs: Item, target: Item, weight: Item | None = None) -> Value:
    return _loss(node, logs.value, target.value, weight)


def _loss(node: Node, logs: Value, target: Value, weight: Item | None) -> Value:
    """What each target [N, ...] has in logs [N, C, ...], negative, weighted; then summed or averaged."""
    mode, ignored = node.get("reduction", "mean"), node.get("ignore_index")
    index = cast(target, "i64")
    counted: Value | None = None
    if ignored is not None:
        counted = e.NotEqual(index, e.constant(ignored))
        index = e.Where(counted, index, e.constant(0))
    loss: Value = e.Neg(squeeze(s.GatherElements(logs, unsqueeze(index, 1), 1), 1))
    each: Value | None = None if weight is None else s.Gather(weight.value, index, 0)
    if each is not None:
        loss = e.Mul(loss, each)
    if counted is not None:
        # Chosen, not multiplied by zero: what is ignored may be infinite.
        nothing = like(0, loss)
        loss = e.Where(counted, loss, nothing)
        each = e.Where(counted, like(1, loss) if each is None else each, nothing)
    axes = tuple(range(loss.rank))
    if mode == "none":
        return loss
    if mode == "sum":
        return s.Sum(loss, axes, keep=False)
    if mode != "mean":
        raise Unsupported(f"reduction {mode!r} is not supported")
    if each is None:
        return s.Mean(loss, axes, keep=False)
    return e.Div(s.Sum(loss, axes, keep=False), s.Sum(broadcast(each, loss.shape), axes, keep=False))


@handles("SoftmaxCrossEntropyLoss")
def _softmax_loss(t: Translation, node: Node, scores: Item, target: Item, weight: Item | None = None) -> list[Value]:
    logs = log_softmax(scores.value, 1)
    return [_loss(node, logs, target.value, weight), logs]
