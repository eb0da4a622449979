"""Manifests of encoders and of graphs of any kind are checked field by field: a wrong one is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from fake_kinds import LABELS, encoder_facts, write_arrays, write_encoder

from llmc.errors import ArtifactError
from llmc.runtime import manifest
from llmc.runtime.artifact import Artifact


def raw(path: Path) -> dict[str, object]:
    opened = Artifact.open(path)
    opened.close()
    return copy.deepcopy(dict(opened.manifest.raw))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    facts = encoder_facts(kind="classification", labels=LABELS)
    return raw(write_encoder(tmp_path_factory.mktemp("manifest") / "encoder.so", facts))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return raw(write_arrays(tmp_path_factory.mktemp("manifest") / "arrays.so"))


def one(name: object = "y", dtype: object = "float32", shape: object = ("B", 3)) -> list[dict[str, object]]:
    return [{"name": name, "dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape}]


# (which, path of the entry, its value, what the message names)
HOSTILE: list[tuple[str, str, object, str]] = [
    ("encoder", "task", "decode", "task"),
    ("encoder", "task", "run", "step.state"),
    ("encoder", "task", "generate", "step.state"),
    ("encoder", "step.state", "paged", "step.state"),
    ("encoder", "outputs", one(shape=("N", 3)), r"outputs\[0\].shape"),
    ("encoder", "outputs", one(shape=(-1,)), r"outputs\[0\].shape"),
    ("encoder", "outputs", one(shape=(1 << 70,)), r"outputs\[0\].shape"),
    ("encoder", "outputs", one(shape="B"), r"outputs\[0\].shape"),
    ("encoder", "outputs", one(shape=tuple(range(17))), r"outputs\[0\].shape"),
    ("encoder", "outputs", one(dtype="complex64"), r"outputs\[0\].dtype"),
    ("encoder", "outputs", one(dtype="O"), r"outputs\[0\].dtype"),
    ("encoder", "outputs", one(name=None), r"outputs\[0\].name"),
    ("encoder", "outputs", one() + one(), "outputs must be of different names"),
    ("encoder", "outputs", [], "encoder.output"),
    ("encoder", "encoder.kind", "oracle", "encoder.kind"),
    ("encoder", "encoder.kind", "tokens", "encoder.output"),
    ("encoder", "encoder.output", "states", "encoder.output"),
    ("encoder", "encoder.output", "nothing", "encoder.output"),
    ("encoder", "encoder.labels", ["a"], "encoder.labels must be a list of 3"),
    ("encoder", "encoder.labels", [1, 2, 3], "encoder.labels"),
    ("encoder", "encoder.multi_label", 1, "encoder.multi_label"),
    ("encoder", "encoder.max_tokens", 0, "encoder.max_tokens"),
    ("encoder", "encoder.max_tokens", 1 << 20, "encoder.max_tokens"),
    ("encoder", "encoder.prompts", {"a": 3}, "encoder.prompts.a"),
    ("encoder", "encoder.prompts", [], "encoder.prompts"),
    ("encoder", "encoder.default_prompt", "none such", "encoder.default_prompt"),
    ("encoder", "encoder", [1], "encoder must be an object"),
    ("encoder", "max_context", 30, "encoder.max_tokens"),
    ("arrays", "kv.layers", [{"kv_heads": 1, "head_dim": 2, "value_dim": 2, "dtype": "float32"}], "kv.layers"),
    ("arrays", "symbols", [{"name": "n", "low": 1, "high": 8}], "inputs.*made of n"),
    ("arrays", "symbols", [{"name": "n", "low": 9, "high": 8}], r"symbols\[0\].high"),
    ("arrays", "symbols", [{"name": "n", "low": -1, "high": 8}], r"symbols\[0\].low"),
    ("arrays", "symbols", [{"name": "n;", "low": 1, "high": 8}], r"symbols\[0\].name"),
    ("arrays", "symbols", [{"name": "n", "low": 1, "high": 8}] * 2, "symbols must be of different names"),
    ("arrays", "inputs", one(shape=("n//0",)), r"inputs\[0\].shape"),
    ("arrays", "inputs", one(shape=("n*" * 5000 + "n",)), r"inputs\[0\].shape"),
    ("arrays", "inputs", one(shape=(1.5,)), r"inputs\[0\].shape"),
    ("arrays", "inputs", 3, "inputs"),
]


@pytest.mark.parametrize("which, path, value, message", HOSTILE)
def test_a_hostile_manifest_is_refused_by_name(
    which: str, path: str, value: object, message: str, encoder: dict[str, object], arrays: dict[str, object]
) -> None:
    facts = copy.deepcopy({"encoder": encoder, "arrays": arrays}[which])
    manifest.parse(json.dumps(facts).encode())  # it is right before
    *folders, key = path.split(".")
    entry = facts
    for folder in folders:
        entry = entry[folder]  # type: ignore[assignment]
    entry[key] = value
    with pytest.raises(ArtifactError, match=message) as caught:
        manifest.parse(json.dumps(facts).encode())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_costs_may_use_the_names_of_the_model(arrays: dict[str, object]) -> None:
    cost = {"bytes": {"m*n": 4}, "operations": {}, "arithmetic": "f32", "when": [["n", 2, None]], "calls": [0]}
    step = {**arrays["step"], "costs": [cost]}  # type: ignore[dict-item]
    found = manifest.parse(json.dumps({**arrays, "step": step}).encode())
    assert found.step.costs[0].bytes == ((("m", "n"), 4.0),)
    step["costs"] = [{**cost, "bytes": {"T": 1}}]
    with pytest.raises(ArtifactError, match="polynomial"):
        manifest.parse(json.dumps({**arrays, "step": step}).encode())
