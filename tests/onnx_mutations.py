"""Damage to ONNX files: of bytes, and of what the bytes mean. The same seed always gives the same file."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper
from onnx_files import FLOAT, INT64, mlp, model_of, value

_NUMBERS = (0, 1, -1, 2, 7, 127, 255, 4096, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 62), -(1 << 63), (1 << 63) - 1)
_TEXTS = (
    "", "x", "y", "../secret", "/dev/zero", "a" * 5000, "ai.onnx", "com.microsoft", "If", "Loop", "é", "input_ids",
)  # fmt: skip


def seeds() -> list[onnx.ModelProto]:
    """The models that are damaged: small, and each with other parts of the format in it."""
    return [mlp(), *_shapes(), _functions(), _branches(), _text(), _contrib()]


def _shapes() -> list[onnx.ModelProto]:
    """Shape arithmetic of a free size, as exporters write it, and ops whose results attributes and constants size."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["size"], axis=0),
        helper.make_node("Unsqueeze", ["size", "axes"], ["sizes"]),
        helper.make_node("Concat", ["sizes", "last"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["turned"], perm=[1, 0]),
        helper.make_node("Slice", ["turned", "zeros", "ends"], ["y"]),
    ]
    numbers = {"zero": 0, "axes": [0], "last": [6], "zeros": [0], "ends": [4]}
    arrays = {name: np.array(number, np.int64) for name, number in numbers.items()}
    first = model_of(nodes, [value("x", ["n", 2, 3])], [value("y", [4, "n"])], arrays)
    nodes = [
        helper.make_node("ConstantOfShape", ["sizes"], ["zeros"], value=helper.make_tensor("v", FLOAT, [1], [0.5])),
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node("Tile", ["padded", "times"], ["tiled"]),
        helper.make_node("Expand", ["zeros", "wide"], ["expanded"]),
        helper.make_node("Range", ["from", "to", "by"], ["counted"]),
        helper.make_node("OneHot", ["counted", "depth", "values"], ["hot"], axis=-1),
        helper.make_node("Conv", ["image", "kernel"], ["convolved"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["image", "", "", "larger"], ["resized"], mode="nearest"),
        helper.make_node("MaxPool", ["image"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Softmax", ["x"], ["soft"], axis=-1),
        helper.make_node("Cast", ["soft"], ["cast"], to=TensorProto.FLOAT16),
        helper.make_node("TopK", ["x", "k"], ["best", "where"], axis=-1),
        helper.make_node("CumSum", ["x", "axis"], ["sums"]),
        helper.make_node("Einsum", ["x", "x"], ["products"], equation="ab,cb->ac"),
        helper.make_node("SpaceToDepth", ["image"], ["deep"], blocksize=2),
        helper.make_node("Split", ["x"], ["left", "right"], axis=1, num_outputs=2),
    ]
    numbers = {"sizes": [1, 4], "pads": [0, 1, 0, 1], "times": [2, 1], "wide": [3, 4], "from": 0, "to": 5, "by": 1,
               "depth": 6, "k": [2], "axis": 1, "larger": [1, 2, 8, 8]}  # fmt: skip
    arrays = {name: np.array(number, np.int64) for name, number in numbers.items()}
    arrays |= {"values": np.float32([0, 1]), "kernel": np.ones((2, 2, 3, 3), np.float32)}
    names = ("tiled", "expanded", "hot", "convolved", "resized", "pooled", "cast", "best", "where", "sums", "products",
             "deep", "left", "right")  # fmt: skip
    inputs = [value("x", ["n", 4]), value("image", [1, 2, 4, 4])]
    return [first, model_of(nodes, inputs, [value(name, None or []) for name in names], arrays)]


def _functions() -> onnx.ModelProto:
    inner = helper.make_node("LeakyRelu", ["a"], ["b"])
    inner.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    leaky = helper.make_function(
        "own", "Leaky", ["a"], ["b"], [inner], [helper.make_opsetid("", 21)],
        attribute_protos=[helper.make_attribute("slope", 0.25)],
    )  # fmt: skip
    calls = [helper.make_node("Leaky", ["a"], ["c"], domain="own"), helper.make_node("Neg", ["c"], ["b"])]
    twice = helper.make_function(
        "own", "Twice", ["a"], ["b"], calls, [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    )
    uses = (("Twice", "x", "y"), ("Leaky", "y", "z"))
    nodes = [helper.make_node(op, [read], [written], domain="own") for op, read, written in uses]
    return model_of(nodes, [value("x", [3])], [value("z", [3])], functions=[leaky, twice], domains=["own"])


def _branches() -> onnx.ModelProto:
    def graph(op: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(op, ["x"], ["out"])], op, [], [value("out", [3])])

    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["state", "x"], ["next"])],
        "body",
        [value("i", [], INT64), value("go", [], TensorProto.BOOL), value("state", [3])],
        [value("on", [], TensorProto.BOOL), value("next", [3])],
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=graph("Neg"), else_branch=graph("Abs")),
        helper.make_node("Loop", ["times", "", "y"], ["z"], body=body),
    ]
    inputs = [value("x", [3]), value("c", [], TensorProto.BOOL)]
    return model_of(nodes, inputs, [value("z", [3])], {"times": np.array(3, np.int64)})


def _text() -> onnx.ModelProto:
    """A model of text: a table, a mask, positions, attention without heads, logits."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.standard_normal((40, 8)).astype(np.float32),
        "places": rng.standard_normal((16, 8)).astype(np.float32),
        "square": rng.standard_normal((8, 8)).astype(np.float32),
        "head": rng.standard_normal((8, 40)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Gather", ["places", "position_ids"], ["here"]),
        helper.make_node("Add", ["words", "here"], ["x"]),
        helper.make_node("MatMul", ["x", "square"], ["q"]),
        helper.make_node("Transpose", ["x"], ["k"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
        helper.make_node("Mul", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "x"], ["mixed"]),
        helper.make_node("Concat", ["past_key_values.0.key", "mixed"], ["present.0.key"], axis=1),
        helper.make_node("MatMul", ["present.0.key", "head"], ["logits"]),
    ]
    shape = ["batch", "sequence"]
    inputs = [value(name, shape, INT64) for name in ("input_ids", "attention_mask", "position_ids")]
    inputs.append(value("past_key_values.0.key", ["batch", "past", 8]))
    return model_of(nodes, inputs, [value("logits", [*shape, 40]), value("present.0.key", ["batch", "all", 8])], arrays)


def _contrib() -> onnx.ModelProto:
    """ONNX Runtime's own operations, and integers for weights."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("SkipSimplifiedLayerNormalization", ["x", "x", "scale"], ["normal"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["normal", "packed", "scales"], ["product"], domain="com.microsoft",
                         K=32, N=16, bits=4, block_size=32),
        helper.make_node("FastGelu", ["product"], ["active"], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["whole", "step"], ["float"], axis=0),
        helper.make_node("MatMul", ["active", "float"], ["y"]),
        helper.make_node("LayerNormalization", ["y", "gamma"], ["z"]),
    ]  # fmt: skip
    arrays = {
        "scale": np.ones(32, np.float32),
        "packed": rng.integers(0, 256, (16, 1, 16)).astype(np.uint8),
        "scales": rng.random((16, 1)).astype(np.float32),
        "whole": rng.integers(-8, 8, (16, 6)).astype(np.int8),
        "step": rng.random(16).astype(np.float32),
        "gamma": np.ones(6, np.float32),
    }
    inputs, outputs = [value("x", [1, "n", 32])], [value("z", [1, "n", 6])]
    return model_of(nodes, inputs, outputs, arrays, domains=["com.microsoft"])


def mutated(models: list[onnx.ModelProto], seed: int) -> bytes:
    """The bytes of a damaged file."""
    rng = random.Random(seed)
    model = onnx.ModelProto()
    model.CopyFrom(rng.choice(models))
    if seed % 3 == 0:
        return _damaged(model.SerializeToString(), rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(CHANGES)(model, rng)
    try:
        return model.SerializeToString()
    except ValueError:  # text that no file can hold
        return b""


def _damaged(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    at, other = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[other:]
    if kind == 2:
        return data[:at] + data[at:other] * 2 + data[other:]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        changed[rng.randrange(len(changed))] = rng.choice((rng.randrange(256), 0xFF, 0x80, 0))
    return bytes(changed)


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Every node, those of functions and branches too."""
    found = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in model.graph.node:
        found += [inner for attribute in node.attribute for inner in attribute.g.node]
    return found


def _names(model: onnx.ModelProto) -> list[str]:
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    return [*names, *(tensor.name for tensor in model.graph.initializer), *_TEXTS]


def _change_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer or [TensorProto()])
    kind = rng.randrange(3)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_NUMBERS)
    elif kind == 1:
        tensor.dims.append(rng.choice(_NUMBERS))
    elif tensor.dims:
        del tensor.dims[rng.randrange(len(tensor.dims))]


def _change_type(model: onnx.ModelProto, rng: random.Random) -> None:
    infos = [*model.graph.input, *model.graph.output]
    if rng.random() < 0.5 and model.graph.initializer:
        rng.choice(model.graph.initializer).data_type = rng.randrange(30)
        return
    if not infos:
        return
    info = rng.choice(infos)
    kind = rng.randrange(4)
    dims = info.type.tensor_type.shape.dim
    if kind == 0 or not dims:
        info.type.tensor_type.elem_type = rng.randrange(30)
    elif kind == 1:
        rng.choice(dims).dim_value = rng.choice(_NUMBERS)
    elif kind == 2:
        rng.choice(dims).dim_param = rng.choice(_TEXTS)
    else:
        dims.add().dim_value = rng.choice(_NUMBERS)


def _change_contents(model: onnx.ModelProto, rng: random.Random) -> None:
    """Other numbers in a constant: sizes, axes, ends."""
    inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    whole = [tensor for tensor in inside if tensor.data_type == INT64]
    if not whole:
        return
    tensor = rng.choice(whole)
    array = numpy_helper.to_array(tensor).copy() if len(tensor.raw_data) == 8 * np.prod(tensor.dims) else np.zeros(1)
    if array.size:
        array = array.astype(np.int64)
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice(_NUMBERS)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _change_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    attributes = [attribute for node in _nodes(model) for attribute in node.attribute]
    if not attributes:
        return
    attribute = rng.choice(attributes)
    kind = rng.randrange(7)
    if kind == 0:
        attribute.i = rng.choice(_NUMBERS)
    elif kind == 1:
        attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    elif kind == 2:
        attribute.s = rng.choice((b"", b"\xff\xfe", b"linear", b"a" * 5000, b"NOTSET"))
    elif kind == 3:
        attribute.ints.append(rng.choice(_NUMBERS))
    elif kind == 4 and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_NUMBERS)
    elif kind == 5:
        attribute.type = rng.randrange(15)
    else:
        attribute.name = rng.choice((*_TEXTS, "axis", "perm", "to"))


def _change_links(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(_nodes(model) or [onnx.NodeProto()])
    kind = rng.randrange(6)
    if kind == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(_names(model))
    elif kind == 1 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(_names(model))
    elif kind == 2 and len(node.input) > 1:
        node.input[0], node.input[1] = node.input[1], node.input[0]
    elif kind == 3:
        node.input.append(rng.choice(_names(model)))
    elif kind == 4 and node.input:
        del node.input[-1]
    elif node.output:
        del node.output[-1]


def _change_nodes(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = model.graph.node
    kind = rng.randrange(5)
    index = rng.randrange(len(nodes)) if nodes else None
    if index is None:
        return
    if kind == 0:
        del nodes[index]
    elif kind == 1:
        nodes[index].op_type = rng.choice(
            ("Add", "MatMul", "Reshape", "Concat", "Gather", "Where", "Loop", "Scan", "Nothing", "Range", "Resize",
             "GroupQueryAttention", "Attention", "QuantizeLinear", "SequenceEmpty", "NonZero", "Leaky", "Twice")
        )  # fmt: skip
    elif kind == 2:
        nodes[index].domain = rng.choice(("", "own", "com.microsoft", "ai.onnx", "nowhere"))
    elif kind == 3:
        nodes.add().CopyFrom(nodes[index])
    else:
        rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        rng.shuffle(rest)
        del nodes[:]
        nodes.extend(rest)


def _change_outside(model: onnx.ModelProto, rng: random.Random) -> None:
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")
    for key in ("location", "offset", "length"):
        tensor.external_data.add(key=key, value=rng.choice((*_TEXTS, *map(str, _NUMBERS))))


def _change_header(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(3)
    if kind == 0 and model.opset_import:
        rng.choice(model.opset_import).version = rng.choice((*_NUMBERS, 13, 17, 20, 23))
    elif kind == 1 and model.functions:
        function = rng.choice(model.functions)
        function.name = rng.choice(("Leaky", "Twice", "Add", ""))
    else:
        model.opset_import.add(domain=rng.choice(_TEXTS), version=rng.choice(_NUMBERS))


def _change_any(model: onnx.ModelProto, rng: random.Random) -> None:
    """Clear or repeat a field anywhere."""
    message: Message = model
    while True:
        fields = [(field, content) for field, content in message.ListFields() if field.message_type is not None]
        if not fields or rng.random() < 0.2:
            break
        field, content = rng.choice(fields)
        message = rng.choice(content) if field.is_repeated else content
    present = message.ListFields()
    if present:
        field, content = rng.choice(present)
        if field.is_repeated and len(content) and rng.random() < 0.5:
            content.append(content[0]) if field.message_type is None else content.add().CopyFrom(content[0])
        else:
            message.ClearField(field.name)


Change = Callable[[onnx.ModelProto, random.Random], None]
CHANGES: tuple[Change, ...] = (
    _change_dims, _change_type, _change_contents, _change_contents, _change_attribute, _change_attribute, _change_links,
    _change_links, _change_nodes, _change_outside, _change_header, _change_any,
)  # fmt: skip
