"""Tokenizers, templates and defaults of a directory, in the form that the runtime's manifest takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from hf_models import tiny

from llmc.errors import FrontendError
from llmc.frontends.hf.config import load_config
from llmc.frontends.hf.tokenizer import read_text
from llmc.frontends.lifted import Text


def text_of(directory: Path, **files: object) -> Text:
    """The tiny llama's text with some files replaced (None removes one; dicts become JSON)."""
    shutil.copytree(tiny("llama"), directory, dirs_exist_ok=True)
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        if content is None:
            path.unlink()
        elif isinstance(content, dict):
            old = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**old, **content}))
        else:
            path.write_text(str(content))
    return read_text(directory, load_config(directory))


def facts_of(text: Text) -> dict[str, object]:
    assert text.facts is not None
    return text.facts


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    text = text_of(tmp_path)
    ours = tokenizers.Tokenizer.from_buffer(text.files["tokenizer.json"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in ("def greet(name):\n    return", "naïve — 日本語 🙂", "", " </s>x<s>"):
        assert ours.encode(sample).ids == theirs(sample)["input_ids"]


def test_special_tokens_and_stops(tmp_path: Path) -> None:
    facts = facts_of(text_of(tmp_path, generation_config__json={"eos_token_id": [7, 9]}))
    assert (facts["bos_id"], facts["bos_token"], facts["eos_token"]) == (0, "<s>", "</s>")
    # The ids to stop at first, then the end token itself.
    assert facts["stop_ids"] == [7, 9, 1]
    assert facts["add_bos"] is False


def test_stop_ids_outside_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    facts = facts_of(text_of(tmp_path, generation_config__json={"eos_token_id": [7, 10**9, -1, "x", True]}))
    assert facts["stop_ids"] == [7, 1]


def test_a_tokenizer_that_puts_a_first_token_says_so(tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    facts = facts_of(text_of(tmp_path / "m", tokenizer__json=tokenizer.to_str()))
    assert facts["add_bos"] is True


def _named(*pairs: tuple[str, str]) -> dict[str, object]:
    return {"chat_template": [{"name": name, "template": template} for name, template in pairs]}


_NO_TEMPLATE: dict[str, object] = {"chat_template": None}
# Files, the default template, the others.
TEMPLATES: dict[str, tuple[dict[str, object], str | None, dict[str, str]]] = {
    "string": ({"tokenizer_config__json": {"chat_template": "one"}}, "one", {}),
    "list": ({"tokenizer_config__json": _named(("tool_use", "a"), ("default", "b"))}, "b", {"tool_use": "a"}),
    "list without a default": ({"tokenizer_config__json": _named(("rag", "c"))}, None, {"rag": "c"}),
    "own file first": ({"tokenizer_config__json": {"chat_template": "one"}, "chat_template__jinja": "two"}, "two", {}),
    "processor's file": (
        {"tokenizer_config__json": _NO_TEMPLATE, "chat_template__json": {"chat_template": "d"}},
        "d",
        {},
    ),
    "none": ({"tokenizer_config__json": _NO_TEMPLATE}, None, {}),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_chat_template_is_found(case: str, tmp_path: Path) -> None:
    files, default, others = TEMPLATES[case]
    facts = facts_of(text_of(tmp_path, **files))
    assert (facts["chat_template"], facts["chat_templates"]) == (default, others)


def test_templates_in_a_folder_have_their_files_names(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    facts = facts_of(text_of(tmp_path, chat_template__jinja="plain"))
    assert (facts["chat_template"], facts["chat_templates"]) == ("plain", {"tool_use": "tools"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == {"default": "plain", "tool_use": "tools"}


def test_generation_is_greedy_unless_the_checkpoint_samples(tmp_path: Path) -> None:
    settings: dict[str, object] = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    quiet = text_of(tmp_path, generation_config__json=settings)
    assert quiet.generation == settings | {"temperature": 0.0}
    samples = text_of(tmp_path, generation_config__json=settings | {"do_sample": True})
    assert samples.generation == settings | {"top_k": 50}


def test_a_model_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    text = text_of(tmp_path, tokenizer__json=None)
    assert text.files == {} and text.facts is None and "token ids only" in text.notes[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match="tokenizer"):
        text_of(tmp_path, tokenizer__json=content)


def test_remote_tokenizer_code_never_runs(tmp_path: Path) -> None:
    remote = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "EvilTokenizer"}
    text = text_of(tmp_path, tokenizer_config__json=remote, evil__py="raise SystemExit('code ran')")
    assert facts_of(text)["eos_token"] == "</s>"


def test_slow_files_are_converted(tmp_path: Path) -> None:
    """vocab.json and merges.txt, as the first byte-level models had them."""
    shutil.copytree(tiny("gpt2"), tmp_path, dirs_exist_ok=True)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"})
    )
    text = read_text(tmp_path, load_config(tmp_path))
    ours = tokenizers.Tokenizer.from_buffer(text.files["tokenizer.json"])
    assert ours.decode(ours.encode("def greet(name):").ids) == "def greet(name):"
