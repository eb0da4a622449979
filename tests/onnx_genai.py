"""Decoders as ONNX Runtime's generative exporter writes them: grouped-query attention, skip norms, weights in blocks.

model = genai_llama(packed=True)        # an onnx.ModelProto
quantized = in_blocks(model, 32)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

MICROSOFT = "com.microsoft"
VOCABULARY = 96


def genai_llama(
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    inner: int = 160,
    positions: int = 128,
    packed: bool = False,
    rotary_inside: bool = True,
    window: int = -1,
    seed: int = 0,
) -> onnx.ModelProto:
    """Inputs input_ids, attention_mask and past_key_values.N.key/value; outputs logits and present.N.key/value.

    packed: one projection gives queries, keys and values. rotary_inside: the attention op rotates; else ops in front.
    """
    rng = np.random.default_rng(seed)
    dim = hidden // heads
    build = _Builder()

    def weight(name: str, inputs: int, outputs: int) -> str:
        return build.stored(name, rng.standard_normal((inputs, outputs)) / np.sqrt(inputs))

    def norm(name: str) -> str:
        return build.stored(name, 1 + 0.1 * rng.standard_normal(hidden))

    angles = np.arange(positions)[:, None] / 10000.0 ** (np.arange(dim // 2) * 2 / dim)[None]
    cos, sin = build.stored("cos_cache", np.cos(angles)), build.stored("sin_cache", np.sin(angles))
    one = build.stored("one", np.array([1]), np.int64)
    summed = build("ReduceSum", ["attention_mask", one], keepdims=0)
    lengths = build("Cast", [build("Sub", [summed, one])], to=TensorProto.INT32)
    shape = build("Shape", ["attention_mask"])
    total = build(
        "Cast", [build("Gather", [shape, build.stored("index", np.array(1), np.int64)])], to=TensorProto.INT32
    )
    x = build("Gather", [build.stored("embed_tokens", rng.standard_normal((VOCABULARY, hidden))), "input_ids"])
    normed = build("SimplifiedLayerNormalization", [x, norm("norm.0")], axis=-1, epsilon=1e-5, stash_type=1)
    pasts, presents = [], []
    for n in range(layers):
        sizes = (hidden, kv_heads * dim, kv_heads * dim)
        if packed:
            q = build("MatMul", [normed, weight(f"layers.{n}.qkv_proj", hidden, sum(sizes))], name=f"/qkv.{n}")
            qkv: Sequence[str] = (q, "", "")
        else:
            qkv = [
                build("MatMul", [normed, weight(f"layers.{n}.{part}_proj", hidden, size)], name=f"/{part}.{n}")
                for part, size in zip("qkv", sizes, strict=True)
            ]
        if not rotary_inside:
            at = "position_ids"
            turned = [
                build("RotaryEmbedding", [part, at, cos, sin], domain=MICROSOFT, num_heads=count)
                for part, count in ((qkv[0], heads), (qkv[1], kv_heads))
            ]
            qkv = (*turned, qkv[2])
        past = [f"past_key_values.{n}.{part}" for part in ("key", "value")]
        present = [f"present.{n}.{part}" for part in ("key", "value")]
        pasts += past
        presents += present
        attended = f"attended.{n}"
        caches = [cos, sin] if rotary_inside else []
        build(
            "GroupQueryAttention",
            [*qkv, *past, lengths, total, *caches],
            [attended, *present],
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=int(rotary_inside),
            local_window_size=window,
        )
        output = build("MatMul", [attended, weight(f"layers.{n}.o_proj", hidden, hidden)], name=f"/o.{n}")
        normed, x = build.skip_norm(x, output, norm(f"norm.{2 * n + 1}"))
        gate, up = (
            build("MatMul", [normed, weight(f"layers.{n}.{part}_proj", hidden, inner)], name=f"/{part}.{n}")
            for part in ("gate", "up")
        )
        gated = build("Mul", [build("Mul", [gate, build("Sigmoid", [gate])]), up])
        output = build("MatMul", [gated, weight(f"layers.{n}.down_proj", inner, hidden)], name=f"/down.{n}")
        normed, x = build.skip_norm(x, output, norm(f"norm.{2 * n + 2}"))
    build("MatMul", [normed, weight("lm_head", hidden, VOCABULARY)], ["logits"], name="/lm_head")
    ids = ["input_ids", "attention_mask"] + ([] if rotary_inside else ["position_ids"])
    widths = {"attention_mask": "total_sequence_length"}
    cached = ["batch_size", kv_heads, "past_sequence_length", dim]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", widths.get(name, "sequence_length")])
        for name in ids
    ]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cached) for name in pasts]
    cached[2] = "total_sequence_length"
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCABULARY])
    ]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cached) for name in presents]
    graph = helper.make_graph(build.nodes, "main_graph", inputs, outputs, build.tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


class _Builder:
    """Nodes and stored tensors; calling it adds a node and gives the name of its first output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def __call__(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str] = (),
        name: str = "",
        domain: str = "",
        **attributes: object,
    ) -> str:
        name = name or f"/{op}.{len(self.nodes)}"
        made = list(outputs) or [f"{name}/output"]
        self.nodes.append(helper.make_node(op, list(inputs), made, name=name, domain=domain, **attributes))
        return made[0]

    def stored(self, name: str, array: np.ndarray, dtype: type = np.float32) -> str:
        self.tensors.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def skip_norm(self, x: str, skip: str, weight: str) -> tuple[str, str]:
        """The norm of the sum, and the sum."""
        names = [f"{weight}/normed", "", "", f"{weight}/sum"]
        op = "SkipSimplifiedLayerNormalization"
        self(op, [x, skip, weight], names, domain=MICROSOFT, epsilon=1e-5)
        return names[0], names[3]


def in_blocks(model: onnx.ModelProto, block: int, symmetric: bool = True, bits: int = 4) -> onnx.ModelProto:
    """The model with its MatMul weights in blocks, by ONNX Runtime's own quantizer."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        quantizer = MatMulNBitsQuantizer(copy, algo_config=config)
        quantizer.process()
    finally:
        logging.disable(before)
    return quantizer.model.model
