"""A checkpoint's generation settings, those that transformers' `generate` uses, in the form of the manifest.

Every key that transformers knows is in one of three tables: it takes effect, it has none on the text that llmc writes,
or it is named in a note. Keys that transformers does not know have no effect there either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llmc.frontends.hf.config import read_json

_MOST_BYTES = 16 << 20
# Where a config keeps the settings of its text model, as transformers looks for them.
_PARTS = ("decoder", "generator", "text_config")
_TOP_K = 50  # transformers' own, where a text is sampled
_LARGEST = float.fromhex("0x1.fffffep127")  # of f32: manifests hold no infinities

Value = Callable[[object], object]


@dataclass(frozen=True)
class Generation:
    """defaults: the manifest's `generation`. end_ids: tokens that end a text. notes: what is not obeyed."""

    defaults: dict[str, object]
    end_ids: list[int]
    notes: tuple[str, ...]


NOTHING = Generation({}, [], ())


def read_generation(directory: Path, vocabulary: int) -> Generation:
    """The settings of generation_config.json, or, where there is none, those of old in config.json. vocabulary: how
    many tokens the model has."""
    path = directory / "generation_config.json"
    config = _of_model_config(_optional_json(directory / "config.json"))
    if path.exists():
        found = generation_of(_optional_json(path), path.name, vocabulary)
    else:
        found = generation_of(config, "config.json", vocabulary)
    if found.end_ids or not path.exists():
        return found
    ends, wrong = _ends(config, "config.json")
    return replace(found, end_ids=ends, notes=(*found.notes, *wrong))


def generation_of(settings: Mapping[str, object], source: str, vocabulary: int) -> Generation:
    """What these settings say, which stand in a file named `source`."""
    given = {name: value for name, value in settings.items() if value is not None}
    defaults, notes = _defaults(given, source)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if any(token >= vocabulary for token in token_ids(defaults.get(name))):
            forced = defaults.pop(name)
            notes.append(f"{source}: {name} {forced!r:.40} is not in the vocabulary of {vocabulary}: ignored")
    ends, wrong = _ends(given, source)
    return Generation(defaults, ends, (*notes, *wrong, *_unsupported(given, source)))


def _ends(given: Mapping[str, object], source: str) -> tuple[list[int], list[str]]:
    """The tokens that end a text, and a note where some of them are no token ids: such a text would not end."""
    value = given.get("eos_token_id")
    others = [item for item in _items(value) if _token(item) is None and item is not None]
    note = f"{source}: eos_token_id must be a token id or a list of them, and is {value!r:.40}: what is none is ignored"
    return token_ids(value), [note] if others else []


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path, most_bytes=_MOST_BYTES) if path.exists() else {}


def _of_model_config(config: Mapping[str, object]) -> dict[str, object]:
    """Settings of generation in a config.json: those of its text model where the whole has none."""
    part = next((config[name] for name in _PARTS if isinstance(config.get(name), dict) and config[name]), {})
    assert isinstance(part, dict)
    known = {*_EFFECT, *_NOTED, *ELSEWHERE}
    found = {
        name: config[name] if config.get(name) is not None else part.get(name)
        for name in {**config, **part}  # in the files' order, so that artifacts are equal
        if name in known
    }
    if config.get("force_bos_token_to_be_generated") and config.get("bos_token_id") is not None:
        found["forced_bos_token_id"] = config["bos_token_id"]
    return found


def _defaults(given: Mapping[str, object], source: str) -> tuple[dict[str, object], list[str]]:
    """The settings in the manifest's form, and notes of those that make no sense. Greedy unless it asks for samples."""
    found: dict[str, object] = {}
    notes = []
    for name, value in given.items():
        if name not in _EFFECT:
            continue
        wanted, read = _EFFECT[name]
        try:
            found[name] = read(value)
        except (TypeError, ValueError, OverflowError):
            notes.append(f"{source}: {name} must be {wanted}, and is {value!r:.40}: ignored")
    if given.get("do_sample") not in (True, False, None):
        notes.append(f"{source}: do_sample must be true or false, and is {given['do_sample']!r:.40}: ignored")
    if _samples(given):
        found = {"temperature": 1.0, "top_k": _TOP_K} | found
    else:
        found["temperature"] = 0.0
    return found, notes


def _samples(given: Mapping[str, object]) -> bool:
    return given.get("do_sample") == 1  # true, or the number


def _unsupported(given: Mapping[str, object], source: str) -> list[str]:
    """Notes of settings that would change the text in transformers, and do not here."""
    return [
        f"{source}: {name} {given[name]!r:.60} is not supported: {instead}"
        for name, (has_effect, instead) in _NOTED.items()
        if name in given and has_effect(given)
    ]


def _number(low: float, high: float, low_open: bool = False, high_open: bool = False) -> Value:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        if not (above and below):
            raise ValueError
        return float(value)

    return read


def _integer(low: int) -> Value:
    def read(value: object) -> int:
        number = _whole(value)
        if not low <= number < 1 << 62:
            raise ValueError
        return number

    return read


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise TypeError
    return [_whole(item) for item in value]


def _sequence(value: object) -> list[int]:
    ids = _ids(value)
    if not ids or min(ids) < 0:
        raise ValueError
    return ids


def _sequences(value: object) -> list[list[int]]:
    if not isinstance(value, list):
        raise TypeError
    return [_sequence(item) for item in value]


def _biases(value: object) -> list[list[object]]:
    if not isinstance(value, list):
        raise TypeError
    found: list[list[object]] = []
    for ids, bias in value:
        number = _number(-math.inf, math.inf, high_open=True)(bias)
        assert isinstance(number, float)
        found.append([_sequence(ids), max(number, -_LARGEST)])
    return found


def _decay(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError
    start, factor = value
    return [_whole(start), _number(0, math.inf, low_open=True, high_open=True)(factor)]


def _strings(value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    return texts


def _forced(value: object) -> list[int]:
    ids = _ids(value if isinstance(value, list) else [value])
    if any(token < 0 for token in ids):
        raise ValueError
    return ids


def token_ids(value: object) -> list[int]:
    """Token ids from an id, or from a list of ids or of lists; what is none is left out."""
    return [token for token in map(_token, _items(value)) if token is not None]


def _items(value: object) -> list[object]:
    found, left = [], [value]
    while left:
        item = left.pop()
        if isinstance(item, (list, tuple)):
            left.extend(reversed(item))
        else:
            found.append(item)
    return found


def _token(value: object) -> int | None:
    """The id that a number is; a whole number may be written as 2.0, which transformers takes too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


_PENALTY = ("above 0", _number(0, 1e6, low_open=True))
_CUTOFF = ("from 0 to below 1", _number(0, 1, high_open=True))
_COUNT = ("an integer of 0 or more", _integer(0))
_LENGTH = ("an integer of 1 or more", _integer(1))
# What each is in a file, and in the manifest's form: the runtime's `GenerationSettings` by name. They may be out of
# range in a file; then they are ignored, and a note says so.
_EFFECT: dict[str, tuple[str, Value]] = {
    "temperature": ("from 0 to 1e6", _number(0, 1e6)),
    "top_k": _COUNT,
    "top_p": ("from 0 to 1", _number(0, 1)),
    "min_p": ("from 0 to 1", _number(0, 1)),
    "top_h": ("above 0, up to 1", _number(0, 1, low_open=True)),
    "typical_p": ("above 0, up to 1", _number(0, 1, low_open=True)),
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "sequence_bias": ("a list of [token ids, number] pairs", _biases),
    "encoder_repetition_penalty": _PENALTY,
    "repetition_penalty": _PENALTY,
    "no_repeat_ngram_size": _COUNT,
    "encoder_no_repeat_ngram_size": _COUNT,
    "bad_words_ids": ("a list of lists of token ids", _sequences),
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "forced_bos_token_id": ("a token id", _integer(0)),
    "forced_eos_token_id": ("a token id or a list of them", _forced),
    "remove_invalid_values": ("true or false", _flag),
    "exponential_decay_length_penalty": ("a start and a factor", _decay),
    "suppress_tokens": ("a list of token ids", _ids),
    "begin_suppress_tokens": ("a list of token ids", _ids),
    "max_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "max_time": ("a number of seconds", _number(0, math.inf, high_open=True)),
    "stop_strings": ("a string or a list of strings", _strings),
}
# Read elsewhere: whether temperature and the like have an effect; tokens that end a text.
ELSEWHERE = frozenset({"do_sample", "eos_token_id"})

_HasEffect = Callable[[Mapping[str, object]], bool]


def _more_than(name: str, number: float) -> _HasEffect:
    def has_effect(given: Mapping[str, object]) -> bool:
        value = given[name]
        return not isinstance(value, (int, float)) or value > number  # no number at all: named as well

    return has_effect


def _truthy(name: str) -> _HasEffect:
    return lambda given: bool(given[name])


def _contrastive(given: Mapping[str, object]) -> bool:
    top_k = given.get("top_k", _TOP_K)
    return (
        _more_than("penalty_alpha", 0)(given)
        and given.get("do_sample") is not True
        and isinstance(top_k, int)
        and top_k > 1
    )


def _guided(given: Mapping[str, object]) -> bool:
    return given["guidance_scale"] != 1


_ONE_BY_ONE = "one text is written, token by token"
# When a setting has an effect in transformers, and what llmc does instead.
_NOTED: dict[str, tuple[_HasEffect, str]] = {
    "num_beams": (_more_than("num_beams", 1), _ONE_BY_ONE),
    "num_beam_groups": (_more_than("num_beam_groups", 1), _ONE_BY_ONE),
    "num_return_sequences": (_more_than("num_return_sequences", 1), _ONE_BY_ONE),
    "constraints": (_truthy("constraints"), _ONE_BY_ONE),
    "force_words_ids": (_truthy("force_words_ids"), "no words are forced"),
    "penalty_alpha": (_contrastive, "the likeliest token is chosen, without contrastive search"),
    "dola_layers": (_truthy("dola_layers"), "all logits are those of the last layer"),
    "guidance_scale": (_guided, "logits are not guided by a second run"),
    "watermarking_config": (_truthy("watermarking_config"), "texts have no watermark"),
    "token_healing": (_truthy("token_healing"), "the prompt's last token stays"),
    "is_assistant": (_truthy("is_assistant"), "texts do not end where the model is unsure"),
    "cache_implementation": (
        lambda given: given["cache_implementation"] == "quantized",
        "the cache holds f16 or f32",
    ),
}

# Lengths and diversity of beams; how an assistant guesses (guesses are checked, so the text is the same); caches,
# compilation and chunks; what `generate` returns; encoder-decoder models; padding, and a first token for no prompt.
NO_EFFECT = frozenset(
    {
        "early_stopping", "length_penalty", "diversity_penalty", "low_memory",
        "use_mtp", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
        "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile",
        "continuous_batching_config", "prefill_chunk_size",
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "renormalize_logits", "decoder_start_token_id", "pad_token_id", "bos_token_id",
        "transformers_version", "_from_model_config",
    }
)  # fmt: skip
EFFECT, NOTED = frozenset(_EFFECT), frozenset(_NOTED)
