"""Adapters merged by `--lora`: what PEFT computes with them, weight by weight; everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stored_models import artifact
from tiny_models import make_tiny

from llmc import api
from llmc.errors import LlmcError
from llmc.frontends.hf.lift import lift

Tensors = dict[str, np.ndarray]
BASIC = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "peft_version": "0.18",
}
UP, DOWN, QUERY = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"


def write_adapter(folder: Path, tensors: Tensors, **settings: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**BASIC, **settings}))
    save_file(
        {f"base_model.model.{name}": array for name, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def pair(module: str, outputs: int, inputs: int, rank: int = 4, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, inputs)), rng.standard_normal((outputs, rank))
    return {f"{module}.lora_A.weight": a.astype(np.float32), f"{module}.lora_B.weight": b.astype(np.float32)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def weights(base: Path) -> Tensors:
    return load_file(base / "model.safetensors")


def product(tensors: Tensors, module: str) -> np.ndarray:
    """B A in f64."""
    a, b = (tensors[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    return np.asarray(b @ a)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / 2),
        ({"lora_alpha": 3.5}, 3.5 / 4),
        ({"alpha_pattern": {"up_proj": 10}}, 10 / 4),
        ({"alpha_pattern": {"model.layers.1.mlp.up_proj": 10}}, 6 / 4),
        ({"alpha_pattern": {r"layers\.\d\.mlp\.up_proj": 2, "up_proj": 10}}, 2 / 4),
        ({"r": 9, "rank_pattern": {"up_proj": 4}}, 6 / 4),
    ],
)
def test_a_product_is_added_by_its_scale(
    base: Path, weights: Tensors, settings: dict[str, object], scale: float, tmp_path: Path
) -> None:
    tensors = pair(UP, *weights[f"{UP}.weight"].shape)
    found = lift(base, lora=[write_adapter(tmp_path / "a", tensors, **settings)])
    expected = weights[f"{UP}.weight"].astype(np.float64) + scale * product(tensors, UP)
    np.testing.assert_allclose(found.load(f"{UP}.weight"), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.load(f"{DOWN}.weight"), weights[f"{DOWN}.weight"])
    assert any("is merged: 1 weights changed" in note for note in found.notes)


def test_magnitudes_scale_rows(base: Path, weights: Tensors, tmp_path: Path) -> None:
    """DoRA: each row has the length that its magnitude says."""
    tensors = pair(DOWN, *weights[f"{DOWN}.weight"].shape)
    magnitude = np.linspace(0.5, 2, len(weights[f"{DOWN}.weight"]), dtype=np.float32)
    tensors[f"{DOWN}.lora_magnitude_vector"] = magnitude
    found = lift(base, lora=[write_adapter(tmp_path / "a", tensors, use_dora=True)]).load(f"{DOWN}.weight")
    np.testing.assert_allclose(np.linalg.norm(found.astype(np.float64), axis=1), magnitude, rtol=1e-5)
    whole = weights[f"{DOWN}.weight"] + 1.5 * product(tensors, DOWN)
    directions = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(found, directions * magnitude[:, None], rtol=1e-4, atol=1e-5)


def test_several_adapters_add_up(base: Path, weights: Tensors, tmp_path: Path) -> None:
    shape = weights[f"{QUERY}.weight"].shape
    one, two = pair(QUERY, *shape, seed=1), pair(QUERY, *shape, rank=2, seed=2)
    folders = [write_adapter(tmp_path / "one", one), write_adapter(tmp_path / "two", two, r=2)]
    found = lift(base, lora=folders).load(f"{QUERY}.weight")
    expected = weights[f"{QUERY}.weight"] + 1.5 * product(one, QUERY) + 3 * product(two, QUERY)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_whole_modules_take_the_base_models_place(base: Path, weights: Tensors, tmp_path: Path) -> None:
    head = np.full_like(weights["lm_head.weight"], 0.25)
    folder = write_adapter(tmp_path / "a", {"lm_head.weight": head}, modules_to_save=["lm_head"])
    np.testing.assert_array_equal(lift(base, lora=[folder]).load("lm_head.weight"), head)


def test_a_weight_that_is_saved_with_its_change_gets_both(base: Path, weights: Tensors, tmp_path: Path) -> None:
    """PEFT stores heads and embeddings besides, where these are targets: the change is for what is stored."""
    shape = weights["lm_head.weight"].shape
    stored = np.full(shape, 0.25, np.float32)
    tensors = pair("lm_head", *shape) | {"lm_head.base_layer.weight": stored}
    found = lift(base, lora=[write_adapter(tmp_path / "a", tensors)]).load("lm_head.weight")
    np.testing.assert_allclose(found, stored + 1.5 * product(tensors, "lm_head"), rtol=1e-5, atol=1e-5)


def test_the_model_says_how_a_layer_lies(base: Path, weights: Tensors, tmp_path: Path) -> None:
    """Of a square weight no shape tells, and PEFT corrects a setting that is wrong."""
    tensors = pair(QUERY, *weights[f"{QUERY}.weight"].shape)
    assert weights[f"{QUERY}.weight"].shape[0] == weights[f"{QUERY}.weight"].shape[1]
    found = lift(base, lora=[write_adapter(tmp_path / "a", tensors, fan_in_fan_out=True)]).load(f"{QUERY}.weight")
    np.testing.assert_allclose(found, weights[f"{QUERY}.weight"] + 1.5 * product(tensors, QUERY), rtol=1e-5, atol=1e-5)


def test_an_embedding_and_layers_that_lie_the_other_way(tmp_path: Path) -> None:
    """Of a table, and of layers whose weight is [inputs, outputs]: the product is turned."""
    directory = make_tiny("gpt2", tmp_path / "model", tie_word_embeddings=False)
    before = load_file(directory / "model.safetensors")
    stored = {name.removeprefix("transformer."): array for name, array in before.items()}
    module, table = "transformer.h.0.attn.c_attn", "transformer.wte"
    inputs, outputs = stored["h.0.attn.c_attn.weight"].shape
    ids, features = stored["wte.weight"].shape
    tensors = pair(module, outputs, inputs)
    rng = np.random.default_rng(3)
    tensors[f"{table}.lora_embedding_A"] = rng.standard_normal((4, ids)).astype(np.float32)
    tensors[f"{table}.lora_embedding_B"] = rng.standard_normal((features, 4)).astype(np.float32)
    found = lift(directory, lora=[write_adapter(tmp_path / "a", tensors, fan_in_fan_out=True)])
    expected = stored["h.0.attn.c_attn.weight"] + 1.5 * product(tensors, module).T
    np.testing.assert_allclose(found.load(f"{module}.weight"), expected, rtol=1e-5, atol=1e-5)
    added = 1.5 * (tensors[f"{table}.lora_embedding_B"] @ tensors[f"{table}.lora_embedding_A"]).T
    np.testing.assert_allclose(found.load(f"{table}.weight"), stored["wte.weight"] + added, rtol=1e-4, atol=1e-5)


def test_a_tied_table_is_not_changed_for_one_of_its_two_uses(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "model", tie_word_embeddings=True)
    rows, features = load_file(directory / "model.safetensors")["model.embed_tokens.weight"].shape
    name = "model.embed_tokens"
    tensors = {
        f"{name}.lora_embedding_A": np.ones((4, rows), np.float32),
        f"{name}.lora_embedding_B": np.ones((features, 4), np.float32),
    }
    table = {f"{name}.weight": np.ones((rows, features), np.float32)}
    head = {"lm_head.weight": np.full((rows, features), 1, np.float32)}
    both = {f"{name}.weight": np.full((rows, features), 2, np.float32), **head}
    for number, (changed, settings) in enumerate(
        [(tensors, {}), (table, {}), (pair("lm_head", rows, features), {}), (both, {"ensure_weight_tying": True})]
    ):
        with pytest.raises(LlmcError, match=r"share one weight|has no lm_head"):
            lift(directory, lora=[write_adapter(tmp_path / str(number), changed, **settings)])
    with pytest.raises(LlmcError, match=r"which has no score\.weight"):
        lift(directory, lora=[write_adapter(tmp_path / "s", {"score.weight": np.ones((2, features), np.float32)})])
    each = lift(directory, lora=[write_adapter(tmp_path / "c", both, modules_to_save=["lm_head", "embed_tokens"])])
    assert (each.load("lm_head.weight") == 1).all() and (each.load(f"{name}.weight") == 2).all()
    found = lift(directory, lora=[write_adapter(tmp_path / "b", head, modules_to_save=["lm_head"])])
    assert (found.load("lm_head.weight") == 1).all() and (found.load(f"{name}.weight") != 1).any()


GOOD = pair(UP, 96, 64)
REFUSED: dict[str, tuple[dict[str, object], Tensors, str]] = {
    "another kind": ({"peft_type": "LOHA"}, GOOD, "peft_type is 'LOHA'"),
    "a changed base": ({"init_lora_weights": "pissa"}, GOOD, "init_lora_weights is 'pissa'"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 3]]}, GOOD, "layer_replication is"),
    "a setting of later": ({"use_magic": True}, GOOD, "use_magic is True, which llmc does not know"),
    "half of it": ({}, {f"{UP}.lora_A.weight": GOOD[f"{UP}.lora_A.weight"]}, "only one of the two"),
    "another rank": ({"r": 8}, GOOD, "the rank is 8"),
    "no magnitudes": ({"use_dora": True}, GOOD, "do not agree"),
    "another model": (
        {},
        pair("model.layers.9.mlp.up_proj", 128, 64),
        r"no adapter of this model, which has no model\.l",
    ),
    "another size": ({}, pair(UP, 128, 60), "is no adapter of this model: .* made for"),
    "a bias of its own": ({"lora_bias": True}, {**GOOD, f"{UP}.lora_B.bias": np.ones(128, np.float32)}, "lora_bias"),
    "no numbers": ({}, {**GOOD, f"{UP}.lora_A.weight": np.full((4, 64), np.nan, np.float32)}, "no finite floats"),
    "integers": ({}, {**GOOD, f"{UP}.lora_A.weight": np.ones((4, 64), np.int32)}, "no finite floats"),
    "a wrong pattern": ({"alpha_pattern": {"(": 1}}, GOOD, "pattern"),
    "no rank": ({"rank_pattern": {"up_proj": -4}, "use_rslora": True}, GOOD, "at least 1 is needed"),
    "twice": ({}, {**GOOD, **{f"decoder.{name}": array for name, array in GOOD.items()}}, "more than one change"),
    "no scale": ({"lora_alpha": "much"}, GOOD, "no number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(base: Path, case: str, tmp_path: Path) -> None:
    settings, tensors, message = REFUSED[case]
    with pytest.raises(LlmcError, match=message):
        lift(base, lora=[write_adapter(tmp_path / "a", tensors, **settings)])


def test_places_without_an_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"adapter_config\.json"):
        lift(base, lora=[tmp_path / "nowhere"])
    folder = write_adapter(tmp_path / "a", GOOD)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LlmcError, match=r"has no adapter_model\.safetensors"):
        lift(base, lora=[folder])
    with pytest.raises(LlmcError, match="not --weights random"):
        lift(base, lora=[write_adapter(tmp_path / "b", GOOD)], weights="random")
    with pytest.raises(LlmcError, match=r"compile the model that it is for with --lora .*/b"):
        lift(tmp_path / "b")
    with pytest.raises(LlmcError, match="no Hugging Face model"):
        api.compile(str(tmp_path / "model.onnx"), tmp_path / "out.so", lora=str(folder))


def test_an_artifact_writes_what_the_merged_model_does(base: Path, weights: Tensors, tmp_path: Path) -> None:
    """End to end, and by content: another adapter in the same place is another artifact."""
    tensors = pair(UP, *weights[f"{UP}.weight"].shape)
    folder = write_adapter(tmp_path / "a", tensors)
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in base.iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    changed = (weights[f"{UP}.weight"] + 1.5 * product(tensors, UP)).astype(np.float32)
    save_file({**weights, f"{UP}.weight": changed}, merged / "model.safetensors", {"format": "pt"})
    ids = np.arange(9, dtype=np.int32)
    logits = []
    for source, options in ((base, {"lora": (str(folder),)}), (merged, {}), (base, {})):
        runtime = artifact(source, tmp_path / f"{len(logits)}.so", **options)
        sequence = runtime.sequence()
        logits.append(runtime.step([(sequence, ids, "all")]))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
    assert np.abs(logits[0] - logits[2]).max() > 0.1
    first = api.make_options(lora=str(folder)).as_json()["lora"]
    save_file(
        {f"base_model.model.{name}": 2 * array for name, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    assert api.make_options(lora=str(folder)).as_json()["lora"] != first
