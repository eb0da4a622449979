"""Weights that come quantized stay so: the same integers in the artifact, and the results that they stand for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_contrib_tools import Case, Fixed, Model, compare, normal
from onnx_products import exact_products
from program_harness import CompiledGraph
from x86_machines import MACHINES, runnable

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import PackGroups, ScaleIntegers
from llmc.compiler.ir.llm import Linear
from llmc.compiler.losses import integer_notes
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import RECOGNISE, pipeline_text
from llmc.errors import FrontendError
from llmc.targets.machine import Machine

MICROSOFT = "com.microsoft"
S = {"S": symbol("S", 1, 40)}
# Kernel tests run every encoding on every machine, -128 among the weights; here two machines stand for all.
RUNNABLE = [
    pytest.param(MACHINES[name], id=name, marks=[] if name in ("avx2", "avx512vnni") else pytest.mark.slow)
    for name in MACHINES
    if runnable(name)
]
F16 = 2.0**-11  # the relative error of a number that f16 rounds


def model_of(
    nodes: list[onnx.NodeProto],
    stored: Mapping[str, np.ndarray],
    features: int,
    outputs: Mapping[str, int],
    ids: bool = False,
) -> onnx.ModelProto:
    """From x f32 [1, S, features] (or ids [1, S]) to outputs f32 [1, S, n]."""
    x = ("ids", TensorProto.INT64, [1, "S"]) if ids else ("x", TensorProto.FLOAT, [1, "S", features])
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "S", n]) for name, n in outputs.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "small", [helper.make_tensor_value_info(*x)], results, tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def packed_of(graph: Graph) -> list[PackGroups]:
    return [op for op in graph.ops if isinstance(op, PackGroups)]


def parts_of(model: Model, weight: PackGroups) -> Encoded:
    found = evaluate_values([weight], {}, model.load, {})["0"]
    assert isinstance(found, Encoded)
    return found


def run_text(scheme: str = "none", activations: str | None = None) -> str:
    return pipeline_text(CompileOptions(quantization=scheme, activations=activations), "run")


def compiled(model: Model, graph: Graph, machine: Machine) -> CompiledGraph:
    return CompiledGraph(graph, machine, model.params, task="run")


# Weights in blocks


def blocks_model(
    bits: int, block: int, zeros: bool, n: int = 33, k: int = 100, exact: bool = True, bias: bool = True
) -> tuple[onnx.ModelProto, np.ndarray]:
    """One MatMulNBits, and its integers u8 [n, k]. exact: scales that f16 holds."""
    rng = np.random.default_rng([bits, block, zeros, n, k])
    blocks = -(-k // block)
    q = rng.integers(0, 1 << bits, (n, blocks * block)).astype(np.uint8)
    q[0, :4] = [0, (1 << bits) - 1, 0, 0]  # the ends of the range: -128 among them
    low, high = q.reshape(n, blocks, -1, 2)[..., 0], q.reshape(n, blocks, -1, 2)[..., 1]
    packed = low | (high << np.uint8(4)) if bits == 4 else q.reshape(n, blocks, block)
    scales = (rng.random((n, blocks)) + 0.5).astype(np.float32) / (1 << bits)
    stored = {"B": packed, "scales": scales.astype(np.float16).astype(np.float32) if exact else scales}
    inputs = ["x", "B", "scales"]
    if zeros:
        stored["zeros"] = rng.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8)
    inputs += ["zeros" if zeros else "", ""]
    if bias:
        stored["bias"] = normal(n, seed=4)
    inputs += ["bias" if bias else ""]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], name="linear", domain=MICROSOFT, N=n, K=k, bits=bits, block_size=block
    )
    return model_of([node], stored, k, {"y": n}), q[:, :k]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("block", "k"), [(32, 100), (64, 64), (128, 129), (256, 500)])
def test_the_integers_of_blocks_are_kept(bits: int, block: int, k: int, zeros: bool) -> None:
    proto, q = blocks_model(bits, block, zeros, k=k)
    model = Model(proto, S)
    graph, reports = model.passed(run_text())
    [weight] = packed_of(graph)
    group = min(block, 64)
    assert weight.encoding == f"q{bits}g{group}{'z' if zeros else ''}"
    parts = parts_of(model, weight).parts
    middle = 0 if zeros else 1 << (bits - 1)
    np.testing.assert_array_equal(parts["q"].astype(int), q.astype(int) - middle)
    scales = model.params["scales"]
    repeated = np.repeat(scales, block // group, axis=1)[:, : -(-k // group)]
    np.testing.assert_array_equal(parts["scales"], repeated.astype(np.float16))
    quantize = next(report for report in reports if report.name == "quantize")
    assert quantize.hits == {f"linear already {weight.encoding}": 1} and not quantize.refusals


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_kept_weights_are_the_source_to_rounding_in_f16(bits: int, zeros: bool, exact: bool) -> None:
    proto, _ = blocks_model(bits, 32, zeros, exact=exact)
    model = Model(proto, S)
    before = next(op for op in model.graph.ops if isinstance(op, ScaleIntegers))
    want = np.asarray(evaluate_values([before], {}, model.load, {})["0"], np.float64)
    graph, _ = model.passed(run_text())
    found = parts_of(model, packed_of(graph)[0])
    scales = np.repeat(model.params["scales"], 32, axis=1)[:, :100].astype(np.float64)
    if exact:
        np.testing.assert_array_equal(found.decode(), want.astype(np.float32))
        return
    # Scales are rounded, zero points are not.
    assert np.all(np.abs(found.decode() - want) <= F16 * (np.abs(want) + scales * 2.0**-8))


def test_blocks_of_16_are_kept() -> None:
    proto, _ = blocks_model(4, 16, False)
    model = Model(proto, S)
    graph, reports = model.passed(run_text("int4"))
    assert integer_notes(reports) == [] and "q4g16" in {
        str(op.w.tensor.encoding) for op in graph.ops if isinstance(op, Linear)
    }
    given = {"x": normal(1, 7, 100)}
    want = model.onnxruntime(given)["y"]
    fine, _ = model.passed(run_text("none"))
    # Scales in f16.
    error = np.abs(model.evaluated(fine, given)["y"] - want).max() / np.abs(want).max()
    assert error < 2.0**-10


@pytest.mark.parametrize("machine", RUNNABLE)
@pytest.mark.parametrize(
    ("bits", "block", "zeros"),
    [(4, 32, False), (4, 128, True), (8, 64, False), pytest.param(8, 32, True, marks=pytest.mark.slow)],
)
def test_compiled_blocks_equal_onnxruntime(machine: Machine, bits: int, block: int, zeros: bool) -> None:
    proto, _ = blocks_model(bits, block, zeros)
    model = Model(proto, S)
    graph, _ = model.passed(run_text("none"))
    program = compiled(model, graph, machine)
    for tokens in (1, 7, 33):
        given = {"x": normal(1, tokens, 100)}
        want = model.onnxruntime(given)["y"]
        found = program.run_arrays(given)["y"]
        assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()  # f32 sums of 100 terms


def test_projections_of_one_input_merge_only_in_one_encoding() -> None:
    stored: dict[str, np.ndarray] = {}
    nodes = []
    for name, bits, zeros in (("q", 4, False), ("k", 4, False), ("v", 8, False), ("z", 8, False)):
        proto, _ = blocks_model(bits, 32, zeros, bias=name == "k", n=24 + 8 * bits)
        node = proto.graph.node[0]
        renamed = {i.name: f"{name}.{i.name}" for i in proto.graph.initializer}
        stored |= {renamed[i.name]: numpy_helper.to_array(i) for i in proto.graph.initializer}
        node.input[:] = [renamed.get(i, i) for i in node.input]
        node.output[:], node.name = [name], name
        nodes.append(node)
    model = Model(model_of(nodes, stored, 100, {"q": 56, "k": 56, "v": 88, "z": 88}), S)
    given = {"x": normal(1, 7, 100)}
    graph, _ = model.passed(run_text())
    linears = [op for op in graph.ops if isinstance(op, Linear)]
    assert sorted((op.w.shape[0], str(op.w.tensor.encoding)) for op in linears) == [(112, "q4g32"), (176, "q8g32")]
    for name, want in model.onnxruntime(given).items():
        np.testing.assert_allclose(model.evaluated(graph, given)[name], want, rtol=0, atol=1e-5 * np.abs(want).max())


# Integers with scales


def dequantized(
    q: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, axis: int = 1, block: int = 0, gemm: bool = False
) -> onnx.ModelProto:
    """x @ dequantized(q), q [k, n] (gemm: transposed, [n, k])."""
    stored = {"q": q, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    attributes = {"axis": axis} | ({"block_size": block} if block else {})
    nodes = [helper.make_node("DequantizeLinear", list(stored), ["w"], name="weight", **attributes)]
    k, n = q.shape[::-1] if gemm else q.shape
    if gemm:
        stored |= {"shape": np.array([-1, k]), "back": np.array([1, -1, n])}
        nodes += [
            helper.make_node("Reshape", ["x", "shape"], ["rows"], name="flat"),
            helper.make_node("Gemm", ["rows", "w"], ["z"], name="gemm", transB=1),
            helper.make_node("Reshape", ["z", "back"], ["y"], name="back"),
        ]
    else:
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    return model_of(nodes, stored, k, {"y": n})


def random_integers(*shape: int, dtype: type = np.int8) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(list(shape)).integers(info.min, info.max + 1, shape).astype(dtype)


def random_scales(*shape: int) -> np.ndarray:
    """Scales that f16 holds."""
    found = (np.random.default_rng(list(shape)).random(shape) + 0.5) / 100
    return found.astype(np.float16).astype(np.float32)


Q = random_integers(100, 33)


@pytest.mark.parametrize(
    ("proto", "encoding"),
    [
        (dequantized(Q, random_scales(), None), "q8g64"),
        (dequantized(Q, random_scales(), np.int8(0)), "q8g64"),
        (dequantized(Q, random_scales(33), np.zeros(33, np.int8)), "q8g64"),
        (dequantized(Q, random_scales(33), random_integers(33)), "q8g64z"),
        (dequantized(Q.T.copy(), random_scales(33), None, axis=0, gemm=True), "q8g64"),
        (dequantized(Q[:96], random_scales(3, 33), None, axis=0, block=32), "q8g32"),
        (dequantized(Q[:96].T.copy(), random_scales(33, 3), None, block=32, gemm=True), "q8g32"),
        (dequantized(Q[:, :32], random_scales(100, 1), None, block=32), None),
        (dequantized(random_integers(100, 33, dtype=np.uint8), random_scales(33), np.full(33, 128, np.uint8)), "q8g64"),
        (dequantized(random_integers(100, 33, dtype=np.uint8), random_scales(), np.uint8(131)), "q8g64z"),
        (dequantized(random_integers(100, 33, dtype=np.uint8), random_scales(), None), "q8g64z"),
        (dequantized(Q, random_scales(100), None, axis=0), None),
        (dequantized(random_integers(100, 33, dtype=np.int32), random_scales(), None), None),
        (dequantized(Q, random_scales() * np.float32(1e-6), None), None),
        (dequantized(Q, random_scales() * np.float32(1e9), None), None),
    ],
    ids=[
        "tensor", "zero", "columns", "columns with zeros", "gemm", "blocks", "blocks of gemm", "blocks of outputs",
        "bytes", "bytes with zero", "bytes from 0", "inputs", "wide", "scales below f16", "scales above f16",
    ],
)  # fmt: skip
def test_weights_that_are_dequantized_keep_their_integers(proto: onnx.ModelProto, encoding: str | None) -> None:
    model = Model(proto, S)
    features = model.inputs[0].shape[2]
    assert isinstance(features, int)
    given = {"x": normal(1, 7, features)}
    want = model.onnxruntime(given)["y"]
    graph, reports = model.passed(run_text())
    kept = packed_of(graph)
    assert [weight.encoding for weight in kept] == ([] if encoding is None else [encoding])
    found = model.evaluated(graph, given)["y"]
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()
    if encoding is None:
        [why] = [why for report in reports for _, why in report.refusals if report.name == "keep-integers"]
        assert "its integers are not kept" in why


def test_4_bit_integers_are_stored_in_4_bits() -> None:
    """As int4 tensors are read: one integer a byte."""
    q = random_integers(96, 33) >> 4
    model = Model(dequantized(q, random_scales(3, 33), None, axis=0, block=32), S)
    [weight] = packed_of(model.passed(run_text())[0])
    assert weight.encoding == "q4g32"
    np.testing.assert_array_equal(parts_of(model, weight).parts["q"], q.T)
    shifted = Model(dequantized(q, random_scales(3, 33), random_integers(3, 33) >> 4, axis=0, block=32), S)
    [weight] = packed_of(shifted.passed(run_text())[0])
    assert weight.encoding == "q4g32z"
    np.testing.assert_array_equal(parts_of(shifted, weight).parts["q"].astype(int), q.T.astype(int) + 8)


@pytest.mark.parametrize("machine", RUNNABLE)
def test_a_table_of_integers_serves_the_embedding_and_the_head(machine: Machine) -> None:
    table, scale = random_integers(51, 100), random_scales()
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="rows"),
        helper.make_node("DequantizeLinear", ["rows", "scale"], ["x"], name="embedding"),
        helper.make_node("DequantizeLinear", ["table", "scale"], ["w"], name="weight"),
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0], name="turned"),
        helper.make_node("MatMul", ["x", "turned"], ["logits"], name="head"),
    ]
    model = Model(model_of(nodes, {"table": table, "scale": scale}, 100, {"logits": 51}, ids=True), S)
    graph, _ = model.passed(run_text("none"))
    [weight] = packed_of(graph)
    assert weight.encoding == "q8g64"
    given = {"ids": np.random.default_rng(0).integers(0, 51, (1, 7))}
    want = model.onnxruntime(given)["logits"]
    found = compiled(model, graph, machine).run_arrays(given)["logits"]
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


def test_what_the_artifact_stores_are_the_source_s_integers() -> None:
    from llmc.compiler.pipeline import stored_values
    from llmc.compiler.weights import packed_arrays, place
    from llmc.targets import lower

    model = Model(dequantized(Q, random_scales(33), None), S)
    for machine in MACHINES.values():
        graph, _ = model.passed(run_text("int8"))
        placed, _ = place(stored_values(lower(graph, machine)))
        [item] = [item for item in placed if item.stored.layout is not None]
        arrays = dict(zip(item.offsets, (array for _, _, array in packed_arrays([item], model.load)), strict=True))
        layout = item.stored.layout
        found = layout.unpack(arrays, 33, 100)  # type: ignore[union-attr]
        np.testing.assert_array_equal(found["q"], Q.T)
        assert -128 in found["q"]


# What ONNX Runtime's quantizers write


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """ONNX Runtime's quantizers log, and warn of their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(before)


def float_model() -> onnx.ModelProto:
    """Two layers with biases and a nonlinearity between them."""
    stored = {
        "w1": normal(100, 64) / 10,
        "b1": normal(64, seed=1),
        "w2": normal(64, 33, seed=2) / 8,
        "b2": normal(33, seed=3),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"], name="first"),
        helper.make_node("Add", ["m1", "b1"], ["a1"], name="first_bias"),
        helper.make_node("Tanh", ["a1"], ["h"], name="tanh"),
        helper.make_node("MatMul", ["h", "w2"], ["m2"], name="second"),
        helper.make_node("Add", ["b2", "m2"], ["y"], name="second_bias"),
    ]
    return model_of(nodes, stored, 100, {"y": 33})


def by_quantizer(folder: Path, kind: str, unsigned: bool = False, per_channel: bool = False) -> onnx.ModelProto:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": normal(1, 9, 100, seed=seed)} for seed in range(8)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    source, target = folder / "float.onnx", folder / "quantized.onnx"
    onnx.save(float_model(), source)
    weight = QuantType.QUInt8 if unsigned else QuantType.QInt8
    if kind == "dynamic":
        quantize_dynamic(source, target, weight_type=weight, per_channel=per_channel)
    else:
        quantize_static(
            source, target, Samples(), QuantFormat.QDQ, weight_type=weight, per_channel=per_channel,
            activation_type=QuantType.QUInt8,
        )  # fmt: skip
    return onnx.load(target)


def float_results(graph: Graph, model: Model, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of the dequantized weights, without rounding of activations."""
    from llmc.compiler.ir.graph import rewrite

    def exact(op: object) -> object:
        return op.replace(rounding="f32") if isinstance(op, Linear) else None

    return model.evaluated(rewrite(graph, exact), given)["y"]  # type: ignore[arg-type]


@exact_products
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
def test_dynamic_quantization_becomes_linear_ops(tmp_path: Path, unsigned: bool, per_channel: bool) -> None:
    model = Model(by_quantizer(tmp_path, "dynamic", unsigned, per_channel), S)
    given = {"x": normal(1, 33, 100, seed=9)}
    want = model.onnxruntime(given)["y"]
    # The translation rounds as the source does; one rounding may fall the other way where f32 sums differ.
    assert np.abs(model.evaluated(model.graph, given)["y"] - want).max() <= 0.02 * np.abs(want).max()
    graph, _ = model.passed(run_text("none"))
    linears = [op for op in graph.ops if isinstance(op, Linear)]
    assert [op.rounding for op in linears] == ["f32", "f32"]  # int8 roundings have become ops of their own
    assert all(op.bias is not None for op in linears)
    assert sum(op.name == "llm.quantize_activations" for op in graph.ops) == 2
    assert not any(op.name in ("t.matmul", "llm.round_to_integers") for op in graph.ops if op not in graph.constants)
    exact = float_results(graph, model, given)
    ours, theirs = model.evaluated(graph, given)["y"], want
    # Rounding a row by its own largest element is no coarser than rounding the tensor by one.
    assert np.abs(ours - exact).std() < np.abs(theirs - exact).std()
    assert {str(op.w.tensor.encoding)[:5] for op in linears} == {"q8g64"}


@pytest.mark.parametrize("machine", RUNNABLE)
def test_compiled_dynamic_quantization(tmp_path: Path, machine: Machine) -> None:
    model = Model(by_quantizer(tmp_path, "dynamic"), S)
    graph, _ = model.passed(run_text("none"))
    program = compiled(model, graph, machine)
    for tokens in (1, 7):
        given = {"x": normal(1, tokens, 100, seed=tokens)}
        want = model.evaluated(graph, given)["y"]
        # An f32 sum a digit off may make one activation of the second layer round the other way: a step of 1 / 127.
        assert np.abs(program.run_arrays(given)["y"] - want).max() <= 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("per_channel", [False, True])
def test_static_quantization_keeps_its_weights_and_its_limits(tmp_path: Path, per_channel: bool) -> None:
    model = Model(by_quantizer(tmp_path, "static", per_channel=per_channel), S)
    given = {"x": normal(1, 33, 100, seed=9) * 3}  # beyond what calibration saw
    want = model.onnxruntime(given)["y"]
    graph, _ = model.passed(run_text("none"))
    assert [weight.encoding for weight in packed_of(graph)] == ["q8g64", "q8g64"]
    found = model.evaluated(graph, given)["y"]
    step = float(np.diff(np.unique(want)).min())  # outputs are rounded too
    assert np.abs(found - want).max() <= 1.01 * step
    assert np.mean(np.abs(found - want) > step / 2) < 0.05


def test_calibrated_roundings_of_text_models_are_permissions(tmp_path: Path) -> None:
    """In text models kernels may be finer: what remains are the weights' integers and a relu that was left out."""
    source = onnx.load_from_string(by_quantizer(tmp_path, "static").SerializeToString())
    model = Model(source, S, wide_floats=True)
    given = {"x": normal(1, 33, 100, seed=9)}
    graph, _ = model.passed(run_text("none"))
    assert [op.name for op in graph.ops if op not in graph.constants] == ["llm.linear", "t.tanh", "llm.linear"]
    ours, theirs = model.evaluated(graph, given)["y"], model.onnxruntime(given)["y"]
    assert np.abs(ours - theirs).std() < 0.02 * theirs.std()


@pytest.mark.parametrize(("lowest", "expected"), [(0, "t.activation"), (3, None)])
def test_a_relu_that_a_quantizer_left_out_is_put_back(lowest: int, expected: str | None) -> None:
    stored = {"scale": np.float32(0.02), "zero": np.uint8(lowest), "w": normal(100, 33)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="round"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["back"], name="back"),
        helper.make_node("MatMul", ["back", "w"], ["y"], name="linear"),
    ]
    model = Model(model_of(nodes, stored, 100, {"y": 33}), S, wide_floats=True)
    graph, _ = model.passed(RECOGNISE)
    assert [op.name for op in graph.ops if op not in graph.constants] == [
        *([expected] if expected else []),
        "llm.linear",
    ]


def test_nothing_else_in_a_quantized_graph_changes_with_q() -> None:
    """-q is for the weights that are not quantized yet."""
    proto, _ = blocks_model(4, 32, False)
    proto.graph.node.append(helper.make_node("MatMul", ["y", "w"], ["z"], name="float"))
    proto.graph.initializer.append(numpy_helper.from_array(normal(33, 64), "w"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, "S", 64]))
    model = Model(proto, S)
    for scheme, expected in (("int8", "q8g64"), ("int4", "t4g64"), ("int6", "t6g64"), ("none", "None")):
        graph, _ = model.passed(run_text(scheme))
        linears = [op for op in graph.ops if isinstance(op, Linear)]
        assert [str(op.w.tensor.encoding) for op in linears] == ["q4g32", expected]


# Refusals, and ops against ONNX Runtime


@pytest.mark.parametrize("zeros", ["", "bytes", "flat", "floats"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("block", "k"), [(16, 100), (32, 33), (128, 129)])
def test_matmul_n_bits(bits: int, block: int, k: int, zeros: str) -> None:
    if (bits, zeros) == (8, "floats"):
        pytest.skip("refused: see below")
    rng = np.random.default_rng([bits, block, k])
    n, blocks = 7, -(-k // block)
    points: dict[str, np.ndarray | None] = {
        "": None,
        "bytes": rng.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8),
        "flat": rng.integers(0, 256, n * -(-blocks * bits // 8)).astype(np.uint8),
        "floats": (15 * rng.random((n, blocks))).astype(np.float32),
    }
    packed = rng.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8)
    inputs: list[np.ndarray | Fixed | None] = [normal(2, 5, k), Fixed(packed), Fixed(random_scales(n, blocks))]
    point = points[zeros]
    inputs += [None if point is None else Fixed(point), None, Fixed(normal(n))]
    attributes = {"N": n, "K": k, "bits": bits, "block_size": block, "accuracy_level": 1}
    compare(Case("MatMulNBits", inputs, attributes, symbols={5: "S", 2: "B"}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"bits": 2}, "bits=2: only 4 and 8 bits are supported"),
        ({"block_size": 24}, "block_size=24: a power of two from 16 on"),
        ({"weight_prepacked": 1}, "weight_prepacked=1 is not supported, only 0"),
        ({"g_idx": True}, "g_idx (inputs in another order) is not supported: export without act_order"),
        ({"K": 1000}, "different element counts"),
    ],
    ids=["bits", "block", "prepacked", "g_idx", "lies"],
)
def test_matmul_n_bits_refuses(changes: dict[str, object], why: str) -> None:
    attributes: dict[str, object] = {"N": 7, "K": 64, "bits": 4, "block_size": 32} | changes
    order = Fixed(np.arange(64, dtype=np.int32)) if attributes.pop("g_idx", False) else None
    packed, scales = Fixed(np.zeros((7, 2, 16), np.uint8)), Fixed(random_scales(7, 2))
    with pytest.raises(FrontendError) as error:
        Case("MatMulNBits", [normal(1, 5, 64), packed, scales, None, order], attributes).graph()
    assert why in str(error.value) and "the_node" in str(error.value)


def test_float_zero_points_need_4_bits() -> None:
    packed, scales = Fixed(np.zeros((7, 2, 32), np.uint8)), Fixed(random_scales(7, 2))
    inputs = [normal(1, 5, 64), packed, scales, Fixed(normal(7, 2))]
    with pytest.raises(FrontendError, match="with 8 bits only uint8 is supported"):
        Case("MatMulNBits", inputs, {"N": 7, "K": 64, "bits": 8, "block_size": 32}).graph()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 64)])
def test_gather_block_quantized(bits: int, block: int, zeros: bool) -> None:
    rng = np.random.default_rng([bits, block])
    blocks = 128 // block
    inputs: list[np.ndarray | Fixed | None] = [
        Fixed(rng.integers(0, 256, (40, 128 * bits // 8)).astype(np.uint8)),
        rng.integers(0, 40, (2, 7)),
        Fixed(random_scales(40, blocks)),
    ]
    if zeros:
        inputs.append(Fixed(rng.integers(0, 256, (40, -(-blocks * bits // 8))).astype(np.uint8)))
    attributes = {"bits": bits, "block_size": block, "quantize_axis": 1, "gather_axis": 0}
    compare(Case("GatherBlockQuantized", inputs, attributes, symbols={7: "S"}))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_rounding_and_back(dtype: type) -> None:
    x = 40 * normal(2, 7, 33)
    point, points = random_integers(1, dtype=dtype)[0], random_integers(33, dtype=dtype)
    for scale, zero, axis in (
        (random_scales(), point, 1),
        (random_scales(33), points, 2),
        (random_scales(33), None, -1),
    ):
        if zero is None and dtype is np.int8:
            continue  # u8 where there is no zero point
        parts = [Fixed(scale), *([] if zero is None else [Fixed(zero)])]
        compare(Case("QuantizeLinear", [x, *parts], {"axis": axis}, domain="", symbols={7: "S"}), tolerance=0)
        q = random_integers(2, 7, 33, dtype=dtype)
        for data in (q, Fixed(q)):
            compare(Case("DequantizeLinear", [data, *parts], {"axis": axis}, domain="", symbols={7: "S"}), 1e-6)


@pytest.mark.parametrize("x", [normal(7, 33), np.abs(normal(7, 33)), -np.abs(normal(7, 33)), np.zeros((7, 3), "f4")])
def test_dynamic_rounding(x: np.ndarray) -> None:
    compare(Case("DynamicQuantizeLinear", [x], {}, 3, domain="", symbols={7: "S"}), tolerance=1e-6)


@exact_products
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_integer_products(columns: bool, bias: bool) -> None:
    w, scale = Fixed(random_integers(33, 9)), Fixed(random_scales(9) if columns else random_scales())
    zero = Fixed(random_integers(9) if columns else random_integers(1)[0])
    added = [Fixed(normal(9))] if bias else []
    compare(Case("DynamicQuantizeMatMul", [normal(2, 7, 33), w, scale, zero, *added], symbols={7: "S"}))
    a = [random_integers(2, 7, 33, dtype=np.uint8), w, Fixed(random_scales()), scale, Fixed(np.uint8(99)), zero, *added]
    compare(Case("MatMulIntegerToFloat", a, symbols={7: "S"}))
