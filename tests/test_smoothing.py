"""Powers of two go from uneven norms to the layers that read them: the same numbers, and smaller errors of rounding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hf_models import lifted_logits, random_ids
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny

from llmc.compiler import smoothing
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, LayerNorm, Linear, RMSNorm
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import evened, run_lifted
from llmc.compiler.progress import Silent
from llmc.compiler.smoothing import Scaled, ScaledWeights, has_uneven_factors, smoothed
from llmc.frontends.hf.lift import lift
from llmc.frontends.weight_sources import ArrayWeights

T = symbol("T", 1, 9)
K, N = 33, 7


def arrays(seed: int = 0, dtype: object = np.float32) -> dict[str, Array]:
    """A norm with two weights that are a hundred times the others, and layers that expect it."""
    rng = np.random.default_rng(seed)
    found = {"g": 1 + rng.random(K), "b": rng.standard_normal(K), "table": rng.standard_normal((9, K))}
    found |= {name: rng.standard_normal((N, K)) for name in ("p", "q")} | {"t": rng.standard_normal((K, N))}
    found["g"][[3, 31]] *= 100
    for name in ("p", "q"):
        found[name][:, [3, 31]] /= 100
    return {name: array.astype(dtype) for name, array in found.items()}


def param(name: str, *shape: int, dtype: str = "f32") -> Param:
    return Param(name, Tensor(shape, dtype))


X = Input("x", Tensor((T, K), "f32"))


def graph_of(*outputs: Value, inputs: tuple[Input, ...] = (X,)) -> Graph:
    return Graph("g", inputs, tuple((f"y{i}", value) for i, value in enumerate(outputs)))


def norm() -> RMSNorm:
    return RMSNorm(X, param("g", K), 1e-5)


def test_the_same_numbers_bit_for_bit() -> None:
    """Of several layers, put together and turned, and of a bias of the norm."""
    first = LayerNorm(X, param("g", K), param("b", K), 1e-5)
    both = Linear(first, s.Concat((param("p", N, K), param("q", N, K)), 0))
    graph = graph_of(both, Linear(e.Cast(first, "bf16"), e.Cast(s.Transpose(param("t", K, N), (1, 0)), "bf16")))
    data = arrays()
    found, norms = smoothed(graph, ArrayWeights(data))
    assert norms == 1 and found.keys() == {"g", "b", "p", "q", "t"}
    assert (found["g"].powers[[3, 31]] <= -3).all() and found["p"].powers.min() == 0  # matrices lose no bit of f16
    x = np.random.default_rng(1).standard_normal((5, K)).astype(np.float32)
    before = evaluate(graph, {"x": x}, ArrayWeights(data).load)
    scaled = ScaledWeights(ArrayWeights(data), found)
    after = evaluate(graph, {"x": x}, scaled.load)
    for name in before:  # sums of the very same products
        np.testing.assert_array_equal(np.asarray(after[name]), np.asarray(before[name]))
    size = np.abs(scaled.load("g"))
    assert size.max() / np.median(size) < 20 and list(scaled.names) == list(data)
    assert scaled.dtype("g") == "f32" and scaled.shape("t") == (K, N)


def refused() -> dict[str, Graph]:
    """Where more than linear layers would see the change."""
    g, p = param("g", K), param("p", N, K)
    one, other, ids = norm(), RMSNorm(X, g, 1e-5), Input("ids", Tensor((T,), "i32"))
    table = param("table", 9, K)
    return {
        "the norm is an output": graph_of(Linear(one, p), one),
        "something else reads the norm": graph_of(Linear(one, p), e.Neg(one)),
        "two norms share their weights": graph_of(Linear(other, p), e.Neg(RMSNorm(e.Neg(X), g, 1e-5))),
        "something else reads the weight": graph_of(Linear(norm(), p), e.Neg(p)),
        "the weight is a table too": graph_of(Linear(norm(), table), Embed(table, ids), inputs=(X, ids)),
        "the weight is computed": graph_of(Linear(norm(), e.Neg(p))),
        "the norm counts from one": graph_of(Linear(RMSNorm(X, g, 1e-5, 1.0), p)),
        "the norm's weight is computed": graph_of(Linear(RMSNorm(X, e.Neg(g), 1e-5), p)),
        "the norm is the residual too": graph_of(Linear(one, param("w", K, K), None, one)),
        "another norm has weights of that name": graph_of(Linear(norm(), p), e.Neg(norm())),
        "the weight becomes halves": graph_of(Linear(norm(), e.Cast(p, "f16"))),
        "the norm's weight becomes halves": graph_of(Linear(RMSNorm(X, e.Cast(e.Cast(g, "f16"), "f32"), 1e-5), p)),
        "another layer reads the weight": graph_of(Linear(norm(), p), Linear(X, p)),
    }


@pytest.mark.parametrize("case", refused())
def test_what_others_see_stays(case: str) -> None:
    data = arrays() | {"w": np.ones((K, K), np.float32)}
    assert smoothed(refused()[case], ArrayWeights(data)) == ({}, 0)


def test_even_norms_and_numbers_that_would_be_lost_stay() -> None:
    graph = graph_of(Linear(norm(), param("p", N, K)))
    assert smoothed(graph, ArrayWeights(arrays() | {"g": np.ones(K, np.float32)})) == ({}, 0)
    halves = arrays(dtype=np.float16)
    halves["p"][0] = 6e-8  # f16's least number, which is multiplied up
    assert smoothed(graph, ArrayWeights(halves))[1] == 1
    halves["p"] *= np.float16(8)
    halves["p"][:, 5] = halves["g"][5] = 6e-8  # half of it is nothing
    assert smoothed(graph, ArrayWeights(halves)) == ({}, 0)
    broken = arrays()
    broken["g"][0] = np.inf
    assert smoothed(graph, ArrayWeights(broken)) == ({}, 0)
    assert not Scaled(0, np.array([200])).is_exact(np.array([1e30], np.float32))


def test_a_model_in_halves_is_evened_too() -> None:
    """Numbers as small as those of real matrices lie below f16's normal ones now and then."""
    rng = np.random.default_rng(2)
    g, p = np.exp(rng.normal(-1, 0.5, 256)), rng.normal(0, 0.02, (256, 256))
    g[[3, 200]], p[:, [3, 200]] = 16, p[:, [3, 200]] / 32
    data = {name: array.astype(np.float16) for name, array in (("g", g), ("p", p))}
    assert (np.abs(data["p"]) < 2.0**-14).any()
    weight = e.Cast(param("p", 256, 256, dtype="f16"), "f32")
    x = Input("x", Tensor((T, 256), "f32"))
    wide = RMSNorm(x, e.Cast(param("g", 256, dtype="f16"), "f32"), 1e-5)
    found, norms = smoothed(graph_of(Linear(wide, weight), inputs=(x,)), ArrayWeights(data))
    assert norms == 1 and found["p"].powers[3] >= 3


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_are_the_whole(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(axis).standard_normal((7, 33)).astype(np.float32)
    scaled = Scaled(axis, np.arange(array.shape[axis], dtype=np.int32) - 3)
    whole = scaled(array)
    monkeypatch.setattr(smoothing, "_AT_ONCE", 40)
    np.testing.assert_array_equal(scaled(array), whole)
    np.testing.assert_array_equal(whole, array * 2.0 ** scaled.powers.reshape((-1, 1) if axis == 0 else (1, -1)))
    broken = array.copy()
    broken[-1, -1] = 1e-44  # lost where it is divided
    assert scaled.is_exact(array) and not Scaled(axis, -9 - 0 * scaled.powers).is_exact(broken)


def test_what_is_only_added_is_no_norm() -> None:
    """So that models with uneven biases are not recognised twice."""
    g, b = param("g", K), param("b", K)
    graph = graph_of(e.Add(e.Mul(X, g), b))
    even, uneven = np.ones(K, np.float32), np.where(np.arange(K) == 3, 100, 1).astype(np.float32)
    assert not has_uneven_factors(graph, {"g": even, "b": uneven}.__getitem__)
    assert has_uneven_factors(graph, {"g": uneven, "b": even}.__getitem__)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with uneven norms in front of attention; those in front of its gated layers are even."""
    directory = make_tiny("llama", tmp_path_factory.mktemp("uneven") / "m")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "input_layernorm" in name:
            tensors[name][[5, 40]] *= 64
            for layer in ("q_proj", "k_proj", "v_proj"):
                tensors[name.replace("input_layernorm", f"self_attn.{layer}")][:, [5, 40]] /= 64
    save_file(tensors, path, {"format": "pt"})
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    return directory


def test_a_model_is_rounded_better(model: Path) -> None:
    lifted, options, ids = lift(model), CompileOptions(quantization="int8", calibrate="none"), random_ids(300, 33)
    even = evened(lifted, options, Silent())
    assert isinstance(even.weights, ScaledWeights)
    changed = {name for name in even.weights.names if not np.array_equal(even.load(name), lifted.load(name))}
    assert changed and all(
        "input_layernorm" in n or ".q_proj" in n or ".k_proj" in n or ".v_proj" in n for n in changed
    )
    want = lifted_logits(lifted, ids)
    np.testing.assert_array_equal(lifted_logits(even, ids), want)
    for kept in ({"quantization": "none"}, {"activations": "f32"}, {"weights": "none"}):
        assert evened(lifted, CompileOptions(**{"quantization": "int8", **kept}), Silent()) is lifted  # type: ignore[arg-type]
    assert run_lifted(even, options).graph is not None
