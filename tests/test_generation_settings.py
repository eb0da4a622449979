"""Settings of generation do what they do in transformers: processors' logits, filters' tokens, whole texts."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import fake_artifact
import numpy as np
import pytest
import torch
from hf_models import tiny
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kernel_harness import CACHE
from test_sampling import choose, chooser
from transformers import AutoModelForCausalLM, GenerationConfig

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.frontends.hf import generation
from llmc.frontends.hf.config import load_config
from llmc.frontends.hf.encoder import read_encoder_text
from llmc.frontends.hf.tokenizer import read_text
from llmc.frontends.lifted import Text
from llmc.frontends.onnx.text import Companions
from llmc.runtime.errors import ArtifactError, RuntimeStateError
from llmc.runtime.generation import Limits, make_sampler
from llmc.runtime.runtime import Runtime
from llmc.runtime.settings import GenerationSettings

VOCAB = 23
ENDS = (3, 7)

ids = st.integers(0, VOCAB - 1)
id_lists = st.lists(ids, max_size=4)
sequences = st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=6)
RULES: dict[str, st.SearchStrategy[object]] = {
    "sequence_bias": st.lists(
        st.tuples(st.lists(ids, min_size=1, max_size=3), st.sampled_from([-7.5, 0.25, 3.0])).map(list),
        min_size=1,
        max_size=6,
    ),
    "encoder_repetition_penalty": st.sampled_from([0.7, 1.3]),
    "repetition_penalty": st.sampled_from([0.8, 1.2]),
    "no_repeat_ngram_size": st.integers(0, 4),
    "encoder_no_repeat_ngram_size": st.integers(0, 4),
    "bad_words_ids": sequences.filter(lambda found: any(item not in ([3], [7]) for item in found)),
    "min_length": st.integers(0, 12),
    "min_new_tokens": st.integers(0, 6),
    "forced_bos_token_id": ids,
    "forced_eos_token_id": ids | st.lists(ids, min_size=1, max_size=2),
    "remove_invalid_values": st.booleans(),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.sampled_from([0.9, 1.05, 2.0])).map(list),
    "suppress_tokens": id_lists,
    "begin_suppress_tokens": id_lists,
}
FILTERS: dict[str, st.SearchStrategy[object]] = {
    "temperature": st.sampled_from([0.3, 1.0, 1.7]),
    "top_h": st.sampled_from([0.2, 0.63, 1.0]),
    "top_k": st.integers(2, 30),
    "top_p": st.sampled_from([0.31, 0.87]),
    "min_p": st.sampled_from([0.013, 0.21]),
    "typical_p": st.sampled_from([0.17, 0.53, 0.91]),
    "epsilon_cutoff": st.sampled_from([0.0031, 0.047, 0.31]),
    "eta_cutoff": st.sampled_from([0.0029, 0.051, 0.41]),
}


def some_of(strategies: dict[str, st.SearchStrategy[object]]) -> st.SearchStrategy[dict[str, Any]]:
    """Values of some of the settings."""
    return st.fixed_dictionaries({}, optional=strategies)


@cache
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()


def theirs(given: dict[str, Any], prompt: list[int], text: list[int], logits: np.ndarray, most: int) -> np.ndarray:
    """float32 [vocab]: the scores that transformers' own processors make of logits; built as its `generate` does. NaN
    where they fail."""
    config = GenerationConfig(eos_token_id=list(ENDS), max_new_tokens=most, **given)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    start = torch.tensor([prompt])
    # What `generate` does with lengths before it builds the processors.
    config.max_length = most + len(prompt)
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + len(prompt)
    config._eos_token_tensor = torch.tensor(ENDS)
    processors = reference()._get_logits_processor(config, len(prompt), encoder_input_ids=start, device="cpu")
    try:
        return processors(torch.tensor([prompt + text]), torch.from_numpy(logits.copy())[None])[0].numpy()
    except ValueError:  # of torch's distributions, which take nothing infinite
        return np.full(VOCAB, np.nan, np.float32)


def ours(given: dict[str, Any], prompt: list[int], text: list[int], logits: np.ndarray, most: int) -> np.ndarray:
    """float32 [vocab]: tokens' weights, 0 for those that are ruled out."""
    settings = GenerationSettings().changed({"temperature": 1.0} | given)
    place = chooser(VOCAB)
    sampler = make_sampler(settings, 0, Limits(most, (), frozenset(ENDS)), place, prompt)
    sampler.observe(text)
    choose(logits, sampler)
    return place.weights.copy()


@given(
    some_of(RULES),
    some_of(FILTERS),
    st.lists(ids, min_size=1, max_size=9),
    st.lists(ids, max_size=7),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@hypothesis_settings(max_examples=200, deadline=None, report_multiple_bugs=False)
def test_what_is_left_to_draw_from_is_what_transformers_leaves(
    rules: dict[str, Any], filters: dict[str, Any], prompt: list[int], text: list[int], seed: int, last: bool
) -> None:
    """Any mixture of settings, over distinct logits: the same tokens, in the same proportions."""
    logits = (np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32)
    most = len(text) + (1 if last else 5)
    forced = rules.get("forced_eos_token_id")
    banned = set(rules.get("suppress_tokens", ()))
    forced_sets = [{forced} if isinstance(forced, int) else set(forced or ()), {rules.get("forced_bos_token_id")}]
    if any(one and one <= banned for one in forced_sets):
        rules.pop("suppress_tokens")  # transformers refuses these together
    scores = theirs({"do_sample": True, "top_k": 0} | rules | filters, prompt, text, logits, most)
    before = logits.copy()
    if not np.isfinite(scores.max()):  # its own draw fails
        said = "no token is left" if (scores == -np.inf).all() else "infinite|no token is left"
        with pytest.raises(RuntimeStateError, match=said):
            ours(rules | filters, prompt, text, logits, most)
        return
    found = ours(rules | filters, prompt, text, logits, most)
    assert (logits == before).all()
    expected = np.exp((scores - scores.max()).astype(np.float64))
    expected[expected < 1e-37] = 0  # below what f32 weights hold
    # Of tokens that are forced together or brought back from infinity, and so are equal, a filter may keep either.
    assert np.count_nonzero(found) == np.count_nonzero(expected)
    if (isinstance(forced, int) or not forced) and not rules.get("remove_invalid_values"):
        np.testing.assert_allclose(found / found.max(), expected, rtol=1e-4)
    else:
        np.testing.assert_allclose(np.sort(found / found.max()), np.sort(expected), rtol=1e-4)


# Whole texts


PROMPT = np.random.default_rng(0).integers(2, 320, 40).tolist()


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """The tiny llama in f32."""
    path = tmp_path_factory.mktemp("settings") / "llama.so"
    compile_model(str(tiny("llama")), path, CompileOptions(quantization="none", kernel_cache=CACHE))
    return Runtime.load(path, threads=1)


def generated(prompt: list[int], most: int, **given: Any) -> list[int]:
    """What transformers writes, greedily."""
    with torch.no_grad():
        out = reference().generate(
            torch.tensor([prompt]), max_new_tokens=most, do_sample=False, pad_token_id=0, **given
        )
    return [int(token) for token in out[0, len(prompt) :]]


def first_tokens() -> list[int]:
    return generated(PROMPT, 12, eos_token_id=[])


def settings_of_text() -> dict[str, dict[str, Any]]:
    """Settings that change the text after PROMPT."""
    free = first_tokens()
    return {
        "suppress_tokens": {"suppress_tokens": free[:3]},
        "begin_suppress_tokens": {"begin_suppress_tokens": free[:1]},
        "bad_words_ids": {"bad_words_ids": [free[:1], free[1:3]]},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 0.2},
        "repetition_penalty": {"repetition_penalty": 1.9},
        "sequence_bias": {"sequence_bias": [[free[:1], -20.0], [[free[1], 17], 11.5]]},
        "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [free[2], 1]},
        "min_length": {"min_length": len(PROMPT) + 4, "eos_token_id": [free[1], 1]},
        "forced_eos_token_id": {"forced_eos_token_id": 44},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 3.5], "eos_token_id": [1, 77]},
        "all at once": {
            "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": free[:2], "min_new_tokens": 4,
            "sequence_bias": [[[free[4]], 2.5]], "bad_words_ids": [[free[3], free[4]]], "eos_token_id": [free[5], 1],
        },
    }  # fmt: skip


NAMES = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "repetition_penalty", "sequence_bias",
    "min_new_tokens", "min_length", "forced_eos_token_id", "exponential_decay_length_penalty", "all at once",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_transformers(name: str, runtime: Runtime) -> None:
    given = settings_of_text()[name]
    expected = generated(PROMPT, 12, **({"eos_token_id": [1]} | given))
    assert expected != first_tokens()
    options = {("stop_token_ids" if name == "eos_token_id" else name): value for name, value in given.items()}
    stream = runtime.stream(PROMPT, max_tokens=12, **options)  # type: ignore[arg-type]
    stream.text()
    assert stream.tokens == expected
    alone = runtime.generate(PROMPT, max_tokens=12, **options)  # type: ignore[arg-type]
    assert runtime.generate_batch([PROMPT, PROMPT], max_tokens=12, **options) == [alone, alone]  # type: ignore[arg-type]


def test_a_forced_first_token_follows_a_prompt_of_one(runtime: Runtime) -> None:
    given: dict[str, Any] = {"forced_bos_token_id": 66, "begin_suppress_tokens": generated([5, 66], 1)}
    stream = runtime.stream([5], max_tokens=6, **given)
    stream.text()
    assert stream.tokens == generated([5], 6, eos_token_id=[1], **given)
    assert stream.tokens[0] == 66


def test_a_time_limit_ends_the_text_after_a_token(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, max_time=0.0, max_tokens=9)
    stream.text()
    assert (len(stream.tokens), stream.finish_reason) == (1, "time")
    for long in (3600, 1e300, math.inf):
        stream = runtime.stream(PROMPT, max_time=long, max_tokens=9)
        stream.text()
        assert stream.finish_reason != "time"


# What a checkpoint's files say


def defaults_of(directory: Path, **files: dict[str, Any] | None) -> Text:
    """The tiny llama's text with these files in place of its own; None: without."""
    shutil.copytree(tiny("llama"), directory, dirs_exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").unlink(missing_ok=True)
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return read_text(directory, load_config(directory))


def test_every_key_that_transformers_knows_is_classified() -> None:
    """It takes effect, has none on the text, or is named in a note. A new version of transformers with a new key fails
    here."""
    known = set(GenerationConfig().to_dict())
    tables = (generation.EFFECT, generation.ELSEWHERE, generation.NO_EFFECT, generation.NOTED)
    assert known - set().union(*tables) == set()
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert {field.name for field in dataclasses.fields(GenerationSettings)} == generation.EFFECT


@pytest.mark.parametrize("name", sorted({*RULES, *FILTERS}))
@given(data=st.data())
@hypothesis_settings(max_examples=5, deadline=None)
def test_a_file_says_what_an_option_says(name: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    value = data.draw((RULES | FILTERS)[name])
    text = defaults_of(tmp_path_factory.mktemp("file"), generation_config={name: value, "do_sample": True})
    assert text.notes == ()
    sampled = GenerationSettings().changed({"temperature": 1.0, "top_k": 50, name: value})
    assert GenerationSettings().changed(text.generation) == sampled


NOTED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 3},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "num_beam_groups": {"num_beam_groups": 2},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": {"bias": 2.0}},
    "dola_layers": {"dola_layers": "high"},
    "token_healing": {"token_healing": True},
    "force_words_ids": {"force_words_ids": [[1]]},
    "constraints": {"constraints": ["x"]},
    "is_assistant": {"is_assistant": True},
    "cache_implementation": {"cache_implementation": "quantized"},
}


@pytest.mark.parametrize("name", sorted(generation.NOTED))
def test_what_is_not_supported_is_named(name: str, tmp_path: Path) -> None:
    notes = defaults_of(tmp_path, generation_config=NOTED[name]).notes
    assert len(notes) == 1
    assert notes[0].startswith(f"generation_config.json: {name} ")


def test_settings_that_change_nothing_are_not_named(tmp_path: Path) -> None:
    """What `GenerationConfig` itself writes for a model that asks for nothing, and keys of others."""
    quiet = {
        **GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params(), "penalty_alpha": 0.6,
        "do_sample": True, "guidance_scale": 1.0, "somebody_elses": 3, "cache_implementation": "static",
    }  # fmt: skip
    text = defaults_of(tmp_path, generation_config=json.loads(json.dumps(quiet, default=str)))
    assert text.notes == ()
    found = GenerationSettings().changed(text.generation)
    assert found == GenerationSettings(temperature=1.0, top_k=50, max_length=20)


def test_values_that_make_no_sense_are_named_and_left_out(tmp_path: Path) -> None:
    wild = {
        "do_sample": True, "temperature": -3, "top_k": "many", "top_p": 7, "repetition_penalty": 0,
        "suppress_tokens": 5, "bad_words_ids": [[]], "sequence_bias": [[[1], "x"]], "max_new_tokens": 0,
        "stop_strings": [1], "exponential_decay_length_penalty": [1], "min_length": 1.5,
        "forced_bos_token_id": 320, "forced_eos_token_id": [4, 999],
    }  # fmt: skip
    text = defaults_of(tmp_path, generation_config=wild)
    assert text.generation == {"temperature": 1.0, "top_k": 50}
    assert len(text.notes) == len(wild) - 1
    for name in set(wild) - {"do_sample"}:
        assert any(f"generation_config.json: {name} " in note and "ignored" in note for note in text.notes)
    text = defaults_of(tmp_path, generation_config={"num_beams": "4"})
    assert len(text.notes) == 1 and "num_beams '4' is not supported" in text.notes[0]
    text = defaults_of(tmp_path, generation_config={"do_sample": "yes"})
    assert text.notes == ("generation_config.json: do_sample must be true or false, and is 'yes': ignored",)


@pytest.mark.parametrize(
    ("value", "ends", "named"),
    [
        (2.0, [2], False), ([[2], 3.0], [2, 3], False), ([], [5], False), ("2", [5], True), (True, [5], True),
        ({"a": 2}, [5], True), ([2, "x"], [2], True), (-1, [5], True), (2.5, [5], True),
    ],
)  # fmt: skip
def test_end_tokens_that_are_none_are_named(value: object, ends: list[int], named: bool, tmp_path: Path) -> None:
    """A text that does not end where its checkpoint meant it to is not left to be found out."""
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    found = generation.read_generation(tmp_path, 320)
    assert found.end_ids == ends
    assert [note for note in found.notes if "generation_config.json: eos_token_id must be" in note] == list(found.notes)
    assert bool(found.notes) == named
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    (tmp_path / "generation_config.json").unlink()
    assert bool(generation.read_generation(tmp_path, 320).notes) == named


def test_settings_of_old_stand_in_the_config(tmp_path: Path) -> None:
    """Without generation_config.json, transformers takes what config.json says; with one, nothing of it."""
    config = json.loads((tiny("llama") / "config.json").read_text())
    old = config | {"no_repeat_ngram_size": 3, "do_sample": True, "temperature": 0.7, "eos_token_id": [9, 11]}
    text = defaults_of(tmp_path / "old", config=old, generation_config=None)
    assert text.generation == {"temperature": 0.7, "top_k": 50, "no_repeat_ngram_size": 3}
    assert text.facts is not None and text.facts["stop_ids"] == [9, 11, 1]
    theirs = GenerationConfig.from_pretrained(tmp_path / "old", config_file_name="config.json", _from_model_config=True)
    assert (theirs.temperature, theirs.no_repeat_ngram_size, theirs.eos_token_id) == (0.7, 3, [9, 11])
    text = defaults_of(tmp_path / "new", config=old, generation_config={"eos_token_id": 9})
    assert text.generation == {"temperature": 0.0}
    assert text.facts is not None and text.facts["stop_ids"] == [9, 1]


def test_settings_of_a_text_model_within_another(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"top_k": 7, "text_config": {"top_k": 9, "eos_token_id": 4, "do_sample": True}})
    )
    found = generation.read_generation(tmp_path, 320)
    assert (found.end_ids, found.defaults) == ([4], {"temperature": 1.0, "top_k": 7})


def test_settings_beside_an_onnx_model(tmp_path: Path) -> None:
    """generation_config.json, or else what ONNX Runtime GenAI has in their place; the tokenizer in another folder."""
    search = {"max_length": 40, "top_k": 5, "do_sample": True, "num_beams": 2, "past_present_share_buffer": True}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [6, 7]}, "search": search}))
    companions = Companions(tmp_path / "model.onnx", tiny("llama"))
    text = companions.text(320)
    assert text.generation == {"temperature": 1.0, "top_k": 5, "max_length": 40}
    assert text.notes[0].startswith("genai_config.json: num_beams 2 is not supported")
    assert text.facts is not None and text.facts["stop_ids"] == [6, 7, 1]
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": [4], "eos_token_id": 9}))
    text = companions.text(320)
    assert text.generation == {"temperature": 0.0, "suppress_tokens": [4]}
    assert text.facts is not None and text.facts["stop_ids"] == [9, 1]


def test_an_encoder_has_no_settings_of_generation(tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 3, "max_length": 9}))
    text = read_encoder_text(tmp_path, load_config(tmp_path)).text
    assert (text.generation, text.notes) == ({}, ())


def test_an_artifact_obeys_its_checkpoint(tmp_path: Path) -> None:
    """Through the manifest: lengths, end tokens, rules, stop strings; and options go over them."""
    free = first_tokens()
    directory = tmp_path / "model"
    said = {
        "suppress_tokens": free[:1], "no_repeat_ngram_size": 3, "eos_token_id": [1, 44], "min_new_tokens": 4,
        "max_length": len(PROMPT) + 9, "forced_eos_token_id": 44,
    }  # fmt: skip
    defaults_of(directory, generation_config=said)
    path = tmp_path / "model.so"
    compile_model(str(directory), path, CompileOptions(quantization="none", kernel_cache=CACHE))
    runtime = Runtime.load(path, threads=1)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        expected = model.generate(torch.tensor([PROMPT]), pad_token_id=0)[0, len(PROMPT) :].tolist()
    stream = runtime.stream(PROMPT)
    stream.text()
    assert stream.tokens == expected
    assert (len(expected), expected[-1]) == (9, 44)
    plain = runtime.stream(
        PROMPT, suppress_tokens=[], no_repeat_ngram_size=0, min_new_tokens=0, forced_eos_token_id=[], max_tokens=12
    )
    plain.text()
    assert plain.tokens == free
    with pytest.raises(RuntimeStateError, match="max_length is 49"):
        runtime.generate(PROMPT * 3)


def test_lengths_and_stops_of_a_checkpoint_are_defaults(tmp_path: Path) -> None:
    plain = Runtime.load(fake_artifact.write(tmp_path / "plain.so"), threads=1)
    whole = plain.generate("hello", max_tokens=20)
    stop = whole[len(whole) // 2 :][:2]
    said = {"stop_strings": [stop], "max_new_tokens": 20, "max_length": 7}
    runtime = Runtime.load(fake_artifact.write(tmp_path / "said.so", generation=said), threads=1)
    assert runtime.generate("hello") == whole[: whole.index(stop)]
    assert runtime.generate("hello", stop=[]) == whole  # max_new_tokens comes before max_length
    assert runtime.generate("hello", stop="never", max_tokens=3) == plain.generate("hello", max_tokens=3)
    short = Runtime.load(fake_artifact.write(tmp_path / "short.so", generation={"max_length": 7}), threads=1)
    stream = short.stream([1, 2, 3, 4])
    stream.text()
    assert len(stream.tokens) == 3


@pytest.mark.parametrize("bad", [{"suppress_tokens": [0.5]}, {"heat": 1}, {"top_h": 2}, {"stop_strings": [3]}])
def test_settings_in_a_damaged_manifest_are_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"generation.{next(iter(bad))}"):
        Runtime.load(fake_artifact.write(tmp_path / "bad.so", generation=bad))


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "numbers in place of lists": ({"suppress_tokens": 5}, "suppress_tokens must be a list of token ids"),
    "fractions": ({"begin_suppress_tokens": [0.5]}, "begin_suppress_tokens must be a list of token ids"),
    "words as text": ({"bad_words_ids": ["ab"]}, "bad_words_ids must be a list of lists"),
    "empty words": ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists"),
    "a bias that is text": ({"sequence_bias": {(1,): "x"}}, "sequence_bias must be a list of"),
    "an endless bias": ({"sequence_bias": {(1,): float("inf")}}, "sequence_bias must be a list of"),
    "forced beyond": ({"forced_eos_token_id": 300}, "forced token id 300 is not in the vocabulary of 300"),
    "n-grams of text": ({"no_repeat_ngram_size": "2"}, "no_repeat_ngram_size must be an integer"),
    "typical_p 0": ({"typical_p": 0}, "typical_p must be above 0"),
    "a decay of three": ({"exponential_decay_length_penalty": (1, 2, 3)}, "exponential_decay_length_penalty must be"),
    "time in text": ({"max_time": "1 s"}, "max_time must be a number, not '1 s'"),
    "a stop that is no id": ({"stop_token_ids": [True]}, "stop_token_ids must be a list of token ids"),
    "transformers' name": ({"max_new_tokens": 5}, "max_new_tokens is called max_tokens here"),
    "no token left": ({"suppress_tokens": range(300)}, "no token is left to choose"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_cannot_be_are_named(name: str, tmp_path: Path) -> None:
    options, said = BAD_OPTIONS[name]
    runtime = Runtime.load(fake_artifact.write(tmp_path / "fake.so"), threads=1)
    for write in (runtime.generate, runtime.chat):
        with pytest.raises(RuntimeStateError, match=said):
            write("hello", **options)  # type: ignore[operator]
