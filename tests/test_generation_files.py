"""What files say about generation, setting by setting: what is taken, and what is named in a note instead."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

from llmc.errors import FrontendError
from llmc.frontends.hf.generation import Generation, generation_of, read_generation
from llmc.runtime.settings import LARGEST, GenerationSettings

VOCABULARY = 320
NO_NUMBERS = [True, "1", [1], math.nan]


def said(**settings: object) -> Generation:
    return generation_of(settings, "file.json", VOCABULARY)


COUNTS = ([0, 1, (1 << 62) - 1], [-1, 1 << 62, 1 << 63, 1.0, True, "1"])
LENGTHS = ([1, (1 << 62) - 1], [0, 1 << 62, 1.0, True, "1"])
PENALTIES = ([1e-9, 1, 1.2, 1e6], [0, -1, 1000000.5, math.inf, *NO_NUMBERS])
CUTOFFS = ([0, 0.5, 0.999], [-0.001, 1, *NO_NUMBERS])
SHARES = ([0, 0.5, 1], [-0.001, 1.001, *NO_NUMBERS])
PARTS = ([1e-9, 0.5, 1], [0, 1.001, *NO_NUMBERS])
# By setting: values that are taken, and values that are not.
BORDERS: dict[str, tuple[list[object], list[object]]] = {
    "temperature": ([0, 0.7, 1e6], [-0.001, 1000000.5, math.inf, *NO_NUMBERS]),
    "top_k": COUNTS,
    "top_p": SHARES,
    "min_p": SHARES,
    "top_h": PARTS,
    "typical_p": PARTS,
    "epsilon_cutoff": CUTOFFS,
    "eta_cutoff": CUTOFFS,
    "sequence_bias": ([[], [[[0, 5], -2.5]]], ["a", [[[-1], 1]], [[[], 1]], [[[1], math.inf]], [[[1], 2, 3]], [7]]),
    "encoder_repetition_penalty": PENALTIES,
    "repetition_penalty": PENALTIES,
    "no_repeat_ngram_size": COUNTS,
    "encoder_no_repeat_ngram_size": COUNTS,
    "bad_words_ids": ([[], [[0], [3, 5]]], ["a", [3], [[]], [[-1]], [[True]], [[1.0]]]),
    "min_length": COUNTS,
    "min_new_tokens": COUNTS,
    "forced_bos_token_id": ([0, 319], [-1, 320, True, 1.0, [1]]),
    "forced_eos_token_id": ([0, 319, [0, 319], []], [-1, 320, [0, -1], [0, 320], True, "1"]),
    "remove_invalid_values": ([True, False], [1, "true"]),
    "exponential_decay_length_penalty": (
        [[0, 1e-9], [-3, 1.5]],
        [[0, 0], [0, math.inf], [1.5, 1], [1], [1, 2, 3], {"1": 1, "2": 2}, 5],
    ),
    "suppress_tokens": ([[], [0, 7]], [7, "7", [True], [1.0]]),
    "begin_suppress_tokens": ([[], [0, 7]], [7, "7", [True], [1.0]]),
    "max_new_tokens": LENGTHS,
    "max_length": LENGTHS,
    "max_time": ([0, 2.5], [-0.001, math.inf, *NO_NUMBERS]),
    "stop_strings": (["end", ["a", "b"], []], [5, [5], {"a": 1}]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_a_value_that_can_be_is_what_the_runtime_takes_it_for(name: str) -> None:
    for value in BORDERS[name][0]:
        found = said(**{name: value, "do_sample": True})
        assert found.notes == ()
        expected = GenerationSettings().changed({"temperature": 1.0, "top_k": 50, name: value})
        assert GenerationSettings().changed(found.defaults) == expected


@pytest.mark.parametrize("name", BORDERS)
def test_a_value_that_cannot_be_is_left_out_and_named(name: str) -> None:
    for value in BORDERS[name][1]:
        found = said(**{name: value})
        assert found.defaults == {"temperature": 0.0}
        (note,) = found.notes
        assert note.startswith(f"file.json: {name} ") and note.endswith(": ignored")


def test_a_bias_of_minus_infinity_is_the_least_number_that_a_manifest_holds() -> None:
    assert said(sequence_bias=[[[1], -math.inf], [[2], -4]]).defaults["sequence_bias"] == [[[1], -LARGEST], [[2], -4.0]]


@pytest.mark.parametrize(
    ("value", "sampled", "noted"),
    [(True, True, False), (1, True, False), (False, False, False), (None, False, False), (0, False, False),
     ("yes", False, True), (2, False, True)],
)  # fmt: skip
def test_a_text_is_sampled_where_the_file_says_so(value: object, sampled: bool, noted: bool) -> None:
    found = said(do_sample=value, temperature=0.7)
    assert found.defaults == ({"temperature": 0.7, "top_k": 50} if sampled else {"temperature": 0.0})
    assert bool(found.notes) == noted


IDS = [0, 1, 7, 319, 2.0, 10**400]
NO_IDS = [-1, 2.5, True, False, "2", {"a": 2}, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", [*IDS, *NO_IDS], ids=lambda value: f"{value!r:.12}")
def test_a_text_ends_at_whole_numbers_from_0_on(value: object) -> None:
    """Alone, in lists and in lists of lists, however deep; what is no id is left out and named."""
    ids = [value] if value in IDS and value is not True and value is not False else []
    for given, more in ((value, []), ([5, [value]], [5]), ([None, value], [])):
        found = said(eos_token_id=given)
        assert found.end_ids == [*more, *ids]
        assert bool(found.notes) == (ids == [])
        assert all(type(token) is int for token in found.end_ids)
    deep = functools.reduce(lambda inner, _: [inner], range(600), value)
    assert said(eos_token_id=deep).end_ids == ids


def test_end_tokens_keep_their_order() -> None:
    assert said(eos_token_id=[3, [1, [2, 9]], 0]).end_ids == [3, 1, 2, 9, 0]


def test_end_tokens_of_the_config_count_where_the_other_file_has_none(tmp_path: Path) -> None:
    config = {"eos_token_id": [5, "x"], "top_k": 7}
    for settings, ends, notes in (({"top_k": 3}, [5], 1), ({"top_k": 3, "eos_token_id": 9}, [9], 0)):
        found = files(tmp_path, config=config, generation_config=settings)
        assert (found.end_ids, len(found.notes)) == (ends, notes)
        assert found.defaults == {"temperature": 0.0, "top_k": 3}
    (tmp_path / "generation_config.json").unlink()
    found = read_generation(tmp_path, VOCABULARY)
    assert (found.end_ids, len(found.notes), found.defaults["top_k"]) == ([5], 1, 7)


# Settings that change a text in transformers and not here, and such that do not change it there either.
TOLD: list[tuple[dict[str, object], bool]] = [
    *(
        ({name: number}, number not in (0, 1))
        for name in ("num_beams", "num_beam_groups", "num_return_sequences")
        for number in (0, 1, 2, "2")
    ),
    ({"penalty_alpha": 0.6}, True),
    ({"penalty_alpha": 0.6, "top_k": 2}, True),
    ({"penalty_alpha": 0.6, "top_k": 1}, False),
    ({"penalty_alpha": 0}, False),
    ({"penalty_alpha": 0.6, "do_sample": True}, False),
    ({"penalty_alpha": 0.6, "do_sample": 1}, True),
    ({"guidance_scale": 1}, False),
    ({"guidance_scale": 0.5}, True),
    ({"guidance_scale": 1.5}, True),
    ({"cache_implementation": "quantized"}, True),
    ({"cache_implementation": "a_static_one"}, False),
    ({"cache_implementation": "static"}, False),
    ({"watermarking_config": {}}, False),
    ({"token_healing": False}, False),
]


@pytest.mark.parametrize(("settings", "told"), TOLD)
def test_what_would_change_the_text_is_told(settings: dict[str, object], told: bool) -> None:
    notes = [note for note in said(**settings).notes if "is not supported" in note]
    assert bool(notes) == told
    assert all(note.startswith(f"file.json: {next(iter(settings))} ") for note in notes)


def test_a_note_shows_a_part_of_what_is_wrong() -> None:
    """At most 40 characters of a value that cannot be, and 60 of one that has no effect."""
    (note,) = said(forced_eos_token_id=[10**99]).notes
    assert "0" * 38 in note and "0" * 39 not in note
    for name, most in (("top_k", 40), ("do_sample", 40), ("eos_token_id", 40), ("constraints", 60)):
        (note,) = said(**{name: "a" * 99}).notes
        assert note.count("a" * (most - 1)) == 1 and "a" * most not in note


def files(directory: Path, **contents: object) -> Generation:
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return read_generation(directory, VOCABULARY)


def test_settings_of_a_config_stand_in_the_order_of_its_file(tmp_path: Path) -> None:
    """So that the artifacts of one model are equal: Python's sets have another order in each process."""
    names = [name for name in BORDERS if not name.startswith("forced")][::-1]
    config = {name: BORDERS[name][0][-1] for name in names} | {"do_sample": True}
    whole = files(tmp_path, config={**config, "text_config": {"forced_bos_token_id": 3, "top_k": 9}})
    later = [name for name in names if name not in ("temperature", "top_k")]
    assert list(whole.defaults) == ["temperature", "top_k", *later, "forced_bos_token_id"]
    assert whole.defaults["top_k"] == config["top_k"]


def test_a_text_models_settings_are_those_of_the_first_part_that_is_there(tmp_path: Path) -> None:
    """The whole's own come first, unless they are null."""
    part = {"top_k": 9, "min_p": 0.25}
    assert files(tmp_path, config={"decoder": {}, "generator": part, "text_config": {"top_k": 4}}).defaults == {
        "temperature": 0.0, **part
    }  # fmt: skip
    assert files(tmp_path, config={"decoder": 3, "text_config": part, "top_k": None}).defaults["top_k"] == 9
    assert files(tmp_path, config={"text_config": part, "top_k": 5}).defaults["top_k"] == 5


def test_a_first_token_that_a_config_forces_is_its_bos(tmp_path: Path) -> None:
    """`force_bos_token_to_be_generated`, a setting of old."""
    old = {"bos_token_id": 0, "force_bos_token_to_be_generated": True}
    assert files(tmp_path, config=old).defaults["forced_bos_token_id"] == 0
    assert "forced_bos_token_id" not in files(tmp_path, config={**old, "bos_token_id": None}).defaults
    assert "forced_bos_token_id" not in files(tmp_path, config={"bos_token_id": 0}).defaults


def test_files_of_generation_are_read_up_to_16_mib(tmp_path: Path) -> None:
    for size, fits in ((16 << 20, True), ((16 << 20) + 1, False)):
        (tmp_path / "generation_config.json").write_text('{"top_k": 3}'.ljust(size))
        if fits:
            assert read_generation(tmp_path, VOCABULARY).defaults["top_k"] == 3
            continue
        with pytest.raises(FrontendError, match=f"at most {16 << 20} are read"):
            read_generation(tmp_path, VOCABULARY)
