"""Directories and configs that cannot be compiled: one clear line, quickly, and nothing of theirs runs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import transformers
from hf_models import lifted_tiny, tiny

from llmc.errors import FrontendError
from llmc.frontends.hf.config import own_code
from llmc.frontends.hf.lift import lift

SECONDS = 60  # of this process: far beyond what a refusal takes, far below what a hostile value could cost


def refusal(source: str | Path, **options: object) -> str:
    """The one line that lifting fails with, soon."""
    started = time.process_time()
    with pytest.raises(FrontendError) as caught:
        lift(source, **options)  # type: ignore[arg-type]
    assert time.process_time() - started < SECONDS
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def with_config(directory: Path, **changes: object) -> Path:
    """A copy of the tiny llama with settings changed; None removes one."""
    shutil.copytree(tiny("llama"), directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    config.update(changes)
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = {"x": value}
    return value


HOSTILE: dict[str, tuple[dict[str, object], str]] = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "digits of a known one": ({"hidden_size": 10**400}, "hidden_size"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "negative": ({"hidden_size": -64}, "hidden_size"),
    "text": ({"hidden_size": "64"}, "hidden_size"),
    "a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    "truth": ({"num_attention_heads": True}, "num_attention_heads"),
    "a list": ({"vocab_size": [320]}, "vocab_size"),
    "vocabulary": ({"vocab_size": 10**12}, "vocab_size"),
    "digits": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads that do not split": ({"num_key_value_heads": 3, "head_dim": 16}, ""),
    "activation": ({"hidden_act": "os.system"}, "os.system"),
    "rope": ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "nonsense"),
    "deep": ({"extra": nested(60)}, "deep"),
    "many": ({"layer_types": ["full_attention"] * 100_000}, "entries"),
    "other model type": ({"model_type": "nonsense"}, "nonsense"),
    "remote code": ({"model_type": "nonsense", "auto_map": {"AutoConfig": "evil.Config"}}, "remote code"),
    "no model type": ({"model_type": None}, "model_type"),
    "pictures": ({"model_type": "vit"}, "takes pixel_values, not text"),
    "sound": ({"model_type": "wav2vec2"}, "takes input_values, not text"),
    "pictures and text": ({"model_type": "clip"}, "takes pixel_values, not text"),
    "an encoder and a decoder": ({"model_type": "t5"}, "not supported yet"),
    "sound to text": ({"model_type": "whisper"}, "not supported yet"),
    "model type of another kind": ({"model_type": 7}, "model_type"),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "the checkpoint has no layer with a qweight",
    ),
    "quantized in another way": (
        {"quantization_config": {"quant_method": "aqlm"}},
        "(aqlm), in a way that is not",
    ),
    "quantized by another tool": ({"quantization": {"group_size": 64, "bits": 4}}, "already quantized (quantization)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused(case: str, tmp_path: Path) -> None:
    changes, expected = HOSTILE[case]
    assert expected in refusal(with_config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "JSON"),
        (b"[]", "JSON object"),
        (b"{", "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"a":' * 200_000, "JSON"),
        (b"{" + b" " * (5 << 20) + b"}", "bytes"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(text: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    message = refusal(tmp_path)
    assert expected in message and "config.json" in message


def test_a_remote_class_beside_a_native_type_never_runs(tmp_path: Path) -> None:
    """`auto_map` on a type that transformers knows: its own class is used, the file is never read."""
    directory = with_config(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (directory / "evil.py").write_text("raise SystemExit('code ran')\n")
    lifted = lift(directory)
    assert lifted.architecture == "llama"
    assert any("the model's own code (evil.Model) never runs" in note for note in lifted.notes)


@pytest.mark.parametrize("named", [None, {}, [], {"AutoConfig": "evil.Config"}])
def test_code_of_a_config_alone_is_no_model(named: object) -> None:
    assert own_code({"model_type": "llama", "auto_map": named}) == ()


def test_sizes_that_the_weights_do_not_have_cost_nothing(tmp_path: Path) -> None:
    """A config of a trillion parameters is built without memory, and then does not fit the checkpoint."""
    directory = with_config(tmp_path, hidden_size=1 << 19, num_attention_heads=4096, intermediate_size=1 << 22)
    assert "does not fit" in refusal(directory)


def test_a_mask_buffer_of_a_terabyte_is_refused(tmp_path: Path) -> None:
    """GPT-Neo keeps a causal mask of positions squared."""
    shutil.copytree(tiny("gpt_neo"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 20}))
    assert "max_position_embeddings" in refusal(tmp_path)


def test_sources_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no directory" in refusal(tmp_path / "nowhere")
    assert "no directory" in refusal("../nowhere/at/all")
    assert "config.json" in refusal(tmp_path)
    assert "is a file" in refusal(tiny("llama") / "config.json")
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    assert "no weights" in refusal(tmp_path)


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "x/base", "r": 4, "target_modules": ["q_proj"]}


def with_adapter(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    return directory


def test_an_adapter_is_never_left_out_without_a_word(tmp_path: Path) -> None:
    """Alone, with its base's config.json, or beside its base: the refusal names it and says what to do."""
    alone, described = with_adapter(tmp_path / "alone"), with_adapter(tmp_path / "described")
    shutil.copy(tiny("llama") / "config.json", described)
    shutil.copytree(tiny("llama"), tmp_path / "beside")
    for directory in (alone, described, with_adapter(tmp_path / "beside")):
        message = refusal(directory)
        assert "a LORA adapter of x/base" in message and "merge_and_unload" in message
    assert "take the adapter's files away" in message  # beside weights that could be compiled without it


def test_an_adapter_without_its_settings_and_one_of_prompts(tmp_path: Path) -> None:
    """Weights of an adapter are one, and what cannot be merged is not said to be merged."""
    bare, prompts = tmp_path / "bare", tmp_path / "prompts"
    shutil.copytree(tiny("llama"), bare)
    (bare / "adapter_model.bin").write_bytes(b"")
    message = refusal(bare)
    assert "an adapter (adapter_model.bin)" in message and "merge_and_unload" in message
    shutil.copytree(tiny("llama"), prompts)
    (prompts / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    message = refusal(prompts)
    assert "a PROMPT_TUNING adapter" in message and "cannot be merged" in message and "merge_and" not in message


def test_adapters_in_folders_are_noted(tmp_path: Path) -> None:
    """Where PEFT keeps adapters that have names; transformers loads the checkpoint without them."""
    shutil.copytree(tiny("llama"), tmp_path / "m")
    for name in ("fr", "default"):
        with_adapter(tmp_path / "m" / name)
    assert any("adapters in folders are left out" in n and "default, fr" in n for n in lift(tmp_path / "m").notes)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("consolidated.00.pth", "-hf version"),
        ("params.json", "-hf version"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.pt", "save_pretrained"),
        ("model_index.json", "diffusion"),
    ],
)
def test_other_formats_are_named(file: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"{}")
    message = refusal(tmp_path)
    assert file in message and expected in message
    if not file.endswith(".json"):
        assert expected in refusal(str(tmp_path / file))


# What tells apart the code that runs from the code that cannot be traced: a module, and what it does there.
UNTRACEABLE = {
    "mamba": ({"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1}, "mixer (MambaMixer) computes differ"),
    "dbrx": (
        {"vocab_size": 320, "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64,
         "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
         "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}},
        "(DbrxExperts) chooses by the values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_code_that_cannot_be_traced_is_named(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings, expected = UNTRACEABLE[kind]
    transformers.AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    message = refusal(tmp_path, weights="random")
    assert expected in message and "not supported yet" in message
    assert capfd.readouterr() == ("", "")  # torch prints the trace that failed


def test_options_that_make_no_sense() -> None:
    assert "context" in refusal(tiny("llama"), max_context=1)
    assert "weights" in refusal(tiny("llama"), weights="zeros")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_directory_are_refused(file: str, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "m")
    (tmp_path / "m" / file).rename(tmp_path / file)
    (tmp_path / "m" / file).symlink_to(tmp_path / file)
    assert "outside the model's directory" in refusal(tmp_path / "m")


def test_the_hub_cache_may_link_to_its_own_store(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(tiny("llama"), snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert lift(snapshot).parameters == lifted_tiny("llama").parameters
