"""GGUF models compute what transformers computes with the numbers that the file holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import ARCHITECTURES, TYPES, blocks_of, model_parts, write, write_model
from hf_models import lifted_logits, load_reference, random_ids, reference_logits

from llmc.api import cached_artifact
from llmc.cli.writing import is_model
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.verify import verify
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model, run_lifted
from llmc.errors import FrontendError, LlmcError
from llmc.frontends import lift
from llmc.frontends.gguf.dequantize import dequantize
from llmc.frontends.gguf.description import architectures
from llmc.frontends.gguf.lift import open_model
from llmc.frontends.gguf.tensor_types import TENSOR_TYPES
from llmc.runtime.runtime import Runtime

TOLERANCE = 1e-4  # two f32 evaluations of logits of size about 3
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": None}


def values_of(kind: str, blocks: np.ndarray) -> np.ndarray:
    rows = dequantize(TENSOR_TYPES[TYPES[kind][0]], blocks.reshape(-1, blocks.shape[-1])).astype(np.float32)
    return rows.reshape(*blocks.shape[:-1], -1)


def rounded(model: torch.nn.Module, kind: str, turned: bool) -> torch.nn.Module:
    """transformers' model with matrices rounded as the file has them. Rows of a head that a converter reorders are
    rounded alike in either order; turned: the model has matrices [inputs, outputs], and the file the other way."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.numpy()
            if values.ndim < 2 or "wpe" in name:
                continue
            flip = turned and "wte" not in name
            rows = np.ascontiguousarray(values.T if flip else values)
            if rows.shape[-1] % TYPES[kind][1] == 0:
                made = values_of(kind, blocks_of(kind, rows))
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(made.T if flip else made)))
    return model


SLOW = ("llama", "qwen2", "gpt2", "qwen3moe")  # these are below, with rounded weights, or take long


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ARCHITECTURES]
)
def test_logits_are_transformers(tmp_path: Path, architecture: str) -> None:
    lifted = lift(write_model(architecture, tmp_path / "m.gguf"))
    verify(lifted.graph)
    model = load_reference(tmp_path / "m")
    for size in (1, 7, 31):
        ids = random_ids(lifted.vocab_size, size)
        difference = np.abs(lifted_logits(lifted, ids) - reference_logits(model, ids)).max()
        assert difference < TOLERANCE, f"{size} tokens: {difference}"
    assert reference_logits(model, ids).std() > 0.1


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "Q4_0"), ("qwen2", "Q8_0"), ("gpt2", "Q4_1"), pytest.param("qwen3moe", "Q8_0", marks=pytest.mark.slow)],
)
def test_rounded_weights(tmp_path: Path, architecture: str, kind: str) -> None:
    """Lifted, and with the integers in encodings of llmc: bit for bit the numbers of the file."""
    lifted = lift(write_model(architecture, tmp_path / "m.gguf", kind))
    model = rounded(load_reference(tmp_path / "m"), kind, architecture == "gpt2")
    ids = random_ids(lifted.vocab_size, 9)
    expected = reference_logits(model, ids)
    assert np.abs(lifted_logits(lifted, ids) - expected).max() < TOLERANCE
    compiled = run_lifted(lifted, CompileOptions(quantization="int4", activations="f32"))
    packed = {op.encoding for op in compiled.graph.ops if isinstance(op, PackGroups)}
    assert packed == {{"Q4_0": "q4g32", "Q4_1": "q4g32a", "Q8_0": "q8g32"}[kind]}
    # Experts are no matrices of linear ops: they stay the floats that their integers stand for.
    rest = [op for op in compiled.graph.ops if isinstance(op, Quantize)]
    assert not rest, [str(op.encoding) for op in rest]


def test_a_model_end_to_end(tmp_path: Path) -> None:
    """A mixed file through the compiler: logits of the artifact, and text, are those of its dequantized numbers."""
    directory = tmp_path / "m"
    metadata, tensors = model_parts("llama", directory, "Q4_0", vocab_size=384)
    for name in list(tensors):
        if name == "output.weight":
            tensors[name] = ("Q8_0", tensors[name][1])
    path = write(tmp_path / "m.gguf", metadata, tensors)
    lifted = lift(path)
    model = load_reference(directory)
    state = {name: torch.from_numpy(np.array(lifted.weights.load(name), np.float32)) for name in model.state_dict()}
    model.load_state_dict(state)
    manifest = compile_model(str(path), tmp_path / "m.so", CompileOptions(quantization="none", activations="f32"))
    assert manifest["model"]["name"] == "m"  # type: ignore[index]
    runtime = Runtime.load(tmp_path / "m.so")
    prompt = "def greet(name):\n"
    ids = torch.tensor([runtime.tokenizer.encode(prompt)])
    written = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert str(runtime.generate(prompt, max_tokens=12)) == runtime.tokenizer.decode(written.tolist())


def test_the_cache_of_artifacts_knows_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One artifact for a file, and another one once it has changed."""
    compiled: list[tuple[str, Path]] = []

    def fake(source: str, path: Path, *rest: object) -> None:
        compiled.append((source, path))
        path.write_bytes(b"")

    monkeypatch.setattr("llmc.compiler.pipeline.compile_model", fake)
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path / "cache"))
    options = CompileOptions(quantization="none")
    path = write_model("llama", tmp_path / "m.gguf").rename(tmp_path / "sha256-00")
    first = cached_artifact(path, None, options)
    assert cached_artifact(path, None, options) == first and len(compiled) == 1 and compiled[0][0] == str(path)
    assert is_model(path) and not is_model(tmp_path / "missing") and not is_model(first)
    path.write_bytes(path.read_bytes() + bytes(32))
    assert cached_artifact(path, None, options) != first
    with pytest.raises(LlmcError, match="a tokenizer of its own"):
        cached_artifact(path, tmp_path, options)


def test_weights_that_are_not_kept_get_no_fewer_bits(tmp_path: Path) -> None:
    metadata, tensors = model_parts("llama", tmp_path / "m", "Q4_K", **WIDE)
    kinds = {"attn_v": "IQ4_NL", "ffn_down": "Q5_K", "attn_output": "Q3_K", "ffn_up": "Q2_K"}
    for name, (_, values) in list(tensors.items()):
        module = name.split(".")[-2]
        if module in kinds:
            tensors[name] = (kinds[module], values)
    lifted = lift(write(tmp_path / "m.gguf", metadata, tensors))
    assert any("2 IQ4_NL to int5" in note and "Q5_K" not in note for note in lifted.notes)

    def encodings(options: CompileOptions) -> Counter[str]:
        ops = run_lifted(lifted, options).graph.ops
        return Counter(str(op.encoding) for op in ops if isinstance(op, (PackGroups, Quantize)))

    # q, k merged; gate (Q4_K) and up (Q2_K) differ; down, o (Q3_K), v; embedding and head.
    kept = {"q4g32a": 6, "q5g32a": 2, "q2g16a": 2, "q4g16": 2}
    assert encodings(CompileOptions(quantization="int4")) == {**kept, "t5g64": 2}
    # What a user asks for by name is done, and a finer scheme is no coarser.
    chosen = (("*v_proj*", "int4"),)
    assert encodings(CompileOptions(quantization="int4", overrides=chosen))["t5g64"] == 0
    assert encodings(CompileOptions(quantization="int8")) == {**kept, "q8g64": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"llama.attention.magic": 3}, r"not known to have: llama\.attention\.magic"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "factor is 2 with longrope"),
        ({"llama.rope.scaling.type": "magic", "llama.rope.scaling.factor": 2.0}, "'magic', which is not supported"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "original_context_length is missing"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5"),
        ({"llama.rope.dimension_count": 8}, "8 of 16 channels"),
        ({"llama.attention.value_length": 8}, "value_length is not key_length"),
        ({"llama.attention.head_count_kv": [1, 2]}, "differs from layer to layer"),
        ({"llama.attention.head_count": 0}, "head_count is 0, outside"),
        ({"llama.attention.causal": False}, "causal is False"),
        ({"llama.pooling_type": 1}, "pooling_type is 1"),
        ({"llama.embedding_length": 32}, "the embedding has 64"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.context_length": -5}, "max_position_embeddings is -5"),
        ({"llama.block_count": 3}, "missing: .*layers.2"),
        ({"llama.feed_forward_length": 95}, "the config wants"),
    ],
)
def test_settings_are_obeyed_or_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    metadata, tensors = model_parts("llama", tmp_path / "m")
    changed = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    with pytest.raises(FrontendError, match=said) as error:
        lift(write(tmp_path / "m.gguf", changed, tensors))
    assert "\n" not in str(error.value)


def test_tensors_are_used_or_refused(tmp_path: Path) -> None:
    metadata, tensors = model_parts("llama", tmp_path / "m")
    vector = ("F32", np.ones(64, np.float32))
    with pytest.raises(FrontendError, match=r"not known to have: blk\.0\.attn_sub_norm\.weight"):
        lift(write(tmp_path / "m.gguf", metadata, {**tensors, "blk.0.attn_sub_norm.weight": vector}))
    with pytest.raises(FrontendError, match=r"missing: .*self_attn\.\w_proj\.bias"):
        lift(write(tmp_path / "m.gguf", metadata, {**tensors, "blk.0.attn_q.bias": vector}))
    del tensors["token_embd.weight"]
    with pytest.raises(FrontendError, match=r"no tensor 'token_embd\.weight'"):
        lift(write(tmp_path / "m.gguf", metadata, tensors))


def test_keys_that_say_nothing_are_no_obstacle(tmp_path: Path) -> None:
    metadata, tensors = model_parts("llama", tmp_path / "m")
    more = {"quantize.imatrix.file": "x", "general.license": "mit", "who.knows": 3, "llama.vocab_size": 320}
    opened = open_model(write(tmp_path / "m.gguf", {**metadata, **more}, tensors))
    assert any("who.knows" in note for note in opened.notes)


def test_rope_factors(tmp_path: Path) -> None:
    """Llama 3's scaling is a table of factors in the file."""
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32, "rope_theta": 10000.0}  # fmt: skip
    metadata, tensors = model_parts("llama", tmp_path / "m", rope_parameters=scaling)
    # As llama.cpp's converter computes them.
    frequencies = 1.0 / (10000.0 ** (np.arange(0, 16, 2) / 16))
    lengths = 2 * np.pi / frequencies
    smooth = (32 / lengths - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / 4.0 + smooth)
    factors = np.where(lengths < 32 / 4.0, 1.0, np.where(lengths > 32 / 1.0, 4.0, between)).astype(np.float32)
    assert len(set(factors)) > 2
    lifted = lift(write(tmp_path / "m.gguf", metadata, {**tensors, "rope_freqs.weight": ("F32", factors)}))
    ids = random_ids(lifted.vocab_size, 60)
    expected = reference_logits(load_reference(tmp_path / "m"), ids)
    assert np.abs(lifted_logits(lifted, ids) - expected).max() < TOLERANCE
    plain = lift(write(tmp_path / "m.gguf", metadata, tensors))
    assert np.abs(lifted_logits(plain, ids) - expected).max() > 0.1  # the factors matter
    for wrong in (factors[:5], -factors, factors * np.nan):
        with pytest.raises(FrontendError, match="must have 8 positive numbers"):
            lift(write(tmp_path / "m.gguf", metadata, {**tensors, "rope_freqs.weight": ("F32", wrong)}))


@pytest.mark.parametrize("kind", [pytest.param("linear", marks=pytest.mark.slow), "yarn"])
def test_rope_scaling(tmp_path: Path, kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    more: dict[str, object] = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 32
        more["llama.rope.scaling.original_context_length"] = 32
    metadata, tensors = model_parts("llama", tmp_path / "m", rope_parameters=scaling)
    lifted = lift(write(tmp_path / "m.gguf", {**metadata, **more}, tensors))
    ids = random_ids(lifted.vocab_size, 60)
    expected = reference_logits(load_reference(tmp_path / "m"), ids)
    assert np.abs(lifted_logits(lifted, ids) - expected).max() < TOLERANCE


BERT = {
    "token_embd": "embeddings.word_embeddings", "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings", "token_embd_norm": "embeddings.LayerNorm",
    "blk.*.attn_q": "encoder.layer.*.attention.self.query", "blk.*.attn_k": "encoder.layer.*.attention.self.key",
    "blk.*.attn_v": "encoder.layer.*.attention.self.value", "blk.*.ffn_up": "encoder.layer.*.intermediate.dense",
    "blk.*.attn_output": "encoder.layer.*.attention.output.dense", "blk.*.ffn_down": "encoder.layer.*.output.dense",
    "blk.*.attn_output_norm": "encoder.layer.*.attention.output.LayerNorm",
    "blk.*.layer_output_norm": "encoder.layer.*.output.LayerNorm",
}  # fmt: skip


@pytest.mark.parametrize("pooling", [1, 2])
def test_an_encoder(tmp_path: Path, pooling: int) -> None:
    """BERT's vectors of texts: the mean of its tokens, or its first one's."""
    from tiny_encoders import make_encoder
    from transformers import AutoModel

    directory = make_encoder("bert", tmp_path / "m")
    model = AutoModel.from_pretrained(directory).eval()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    tensors = {}
    for layer in range(2):
        for theirs, ours in BERT.items():
            for suffix in (".weight", ".bias"):
                source = f"{ours}{suffix}".replace("*", str(layer))
                if source in state:
                    tensors[f"{theirs}{suffix}".replace("*", str(layer))] = ("F32", state[source])
    metadata = {
        "general.architecture": "bert", "bert.block_count": 2, "bert.context_length": 160, "bert.embedding_length": 64,
        "bert.feed_forward_length": 96, "bert.attention.head_count": 4, "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False, "bert.pooling_type": pooling, "tokenizer.ggml.model": "none",
    }  # fmt: skip
    lifted = lift(write(tmp_path / "m.gguf", metadata, tensors))
    assert lifted.task == "encode" and lifted.encoder is not None and lifted.encoder["kind"] == "embedding"
    ids = random_ids(lifted.vocab_size, 7)
    positions = np.arange(7, dtype=np.int32)[None]
    found = evaluate(lifted.graph, {"ids": ids, "positions": positions}, lifted.weights.load)["embedding"]
    with torch.no_grad():
        tokens = model(input_ids=torch.from_numpy(ids).long()).last_hidden_state.numpy()
    expected = tokens.mean(1) if pooling == 1 else tokens[:, 0]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    with pytest.raises(FrontendError, match="scores of pairs"):
        open_model(write(tmp_path / "m.gguf", {**metadata, "bert.pooling_type": 4}, tensors))


def test_mutated_settings(tmp_path: Path) -> None:
    """Whatever a key is changed to: a model or a FrontendError, before anything slow is done."""
    metadata, tensors = model_parts("llama", tmp_path / "m")
    names = sorted(architectures())
    assert len(names) == 38
    rng = np.random.default_rng(0)
    values = (0, 1, -1, 7, 2**31 - 1, 0.0, -0.5, 1e30, float("nan"), True, "", "x", [1, 2], [0.5], ["a"], [True])
    opened = refused = 0
    for seed in range(333):
        name = "llama" if seed % 2 else names[seed // 2 % len(names)]
        changed = {key.replace("llama.", f"{name}."): value for key, value in metadata.items()}
        changed["general.architecture"] = name
        keys = [key for key in changed if not key.startswith("tokenizer")]
        for key in rng.choice(keys, rng.integers(1, 3), replace=False):
            changed[str(key)] = values[rng.integers(len(values))]
        try:
            open_model(write(tmp_path / "m.gguf", changed, tensors))
            opened += 1
        except FrontendError as error:
            assert "\n" not in str(error)
            refused += 1
    assert opened > 5 and refused > 150


def test_a_factor_without_a_kind_is_linear(tmp_path: Path) -> None:
    """As llama.cpp takes it."""
    metadata, tensors = model_parts("llama", tmp_path / "m")
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        opened = open_model(write(tmp_path / "m.gguf", {**metadata, key: 2.0}, tensors))
        assert opened.config.rope_parameters["rope_type"] == "linear"
        assert opened.config.rope_parameters["factor"] == 2.0


def test_a_blob_is_called_what_it_says(tmp_path: Path) -> None:
    write_model("llama", tmp_path / "m.gguf")
    assert open_model(tmp_path / "m.gguf").name == "m"
    assert open_model((tmp_path / "m.gguf").rename(tmp_path / "sha256-00ff")).name == "tiny"


def test_random_weights(tmp_path: Path) -> None:
    lifted = lift(write_model("llama", tmp_path / "m.gguf", "Q4_0"), weights="random")
    assert not any("integers" in note for note in lifted.notes)
    assert np.isfinite(lifted_logits(lifted, random_ids(lifted.vocab_size, 3))).all()
