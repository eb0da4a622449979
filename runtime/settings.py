"""The settings of generation, by the names that transformers has for them: their values, and their defaults. A
checkpoint's own come with the artifact; a caller's take precedence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

LARGEST = float(np.finfo(np.float32).max)
_MOST_IDS = 1 << 20


@dataclass(frozen=True)
class GenerationSettings:
    """Each is off by default, but for temperature: 0 is greedy.

    The rules for single tokens and sequences hold whether a text is sampled or greedy; temperature, top_k, top_p,
    min_p, top_h, typical_p, epsilon_cutoff and eta_cutoff only where it is sampled. Where no more is said, they mean
    what they mean in transformers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_h: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    max_time: float | None = None
    stop_strings: tuple[str, ...] = ()

    def changed(self, values: Mapping[str, object]) -> GenerationSettings:
        """These with others in their place; ValueError "NAME must be ..." for what a setting cannot be."""
        return dataclasses.replace(self, **{name: checked(name, value) for name, value in values.items()})  # type: ignore[arg-type]


def checked(name: str, value: object) -> object:
    """The value in the form that `GenerationSettings` holds; ValueError "NAME must be ..." where it cannot be."""
    wanted, read = _SETTINGS[name]
    try:
        return read(value)
    except _KindError as error:
        wanted = str(error)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be {wanted}, not {value!r:.40}")


class _KindError(TypeError):
    """A value that is no number where one is wanted; says what is wanted."""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, Python's or numpy's; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


Reader = Callable[[object], object]


def _number(holds: Callable[[float], bool]) -> Reader:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise _KindError("a number")
        return _real(value, holds)

    return read


def _real(value: object, holds: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError
    if not holds(float(value)):
        raise ValueError
    return float(value)


def _whole(value: object) -> int:
    if not is_integer(value):
        raise TypeError
    return int(value)


def _integer(low: int) -> Reader:
    def read(value: object) -> int:
        try:
            number = _whole(value)
        except TypeError:
            raise _KindError("an integer") from None
        if not low <= number < 1 << 62:
            raise ValueError
        return number

    return read


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _ids(value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError
    ids = tuple(_whole(item) for item in value)
    if len(ids) > _MOST_IDS:
        raise ValueError
    return ids


def _some_ids(value: object) -> tuple[int, ...]:
    """The ids of a sequence: at least one, and none negative."""
    ids = _ids(value)
    if not ids or min(ids) < 0:
        raise ValueError
    return ids


def _id_or_ids(value: object) -> tuple[int, ...]:
    return _ids(value if isinstance(value, Iterable) else (value,))


def _id_or_none(value: object) -> int | None:
    ids = _id_or_ids(value)
    if len(ids) > 1:
        raise ValueError
    return ids[0] if ids else None


def _sequences(value: object) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError
    return tuple(_some_ids(item) for item in value)


def _biases(value: object) -> tuple[tuple[tuple[int, ...], float], ...]:
    """From {ids: bias} or [[ids, bias], ...]. Of a sequence that is there twice the last counts."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError
    found: dict[tuple[int, ...], float] = {}
    for ids, bias in value.items() if isinstance(value, Mapping) else value:
        found[_some_ids(ids)] = max(_real(bias, lambda x: x < math.inf), -LARGEST)
    return tuple(found.items())


def _decay(value: object) -> tuple[int, float] | None:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError
    parts = list(value)
    if not parts:
        return None
    start, factor = parts
    return _whole(start), _real(factor, lambda x: 0 < x < math.inf)


def _strings(value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Iterable):
        raise TypeError
    found = tuple(texts)
    if not all(isinstance(text, str) for text in found):
        raise TypeError
    return found


_PENALTY = ("above 0 (1: off)", _number(lambda x: 0 < x < math.inf))
_CUTOFF = ("from 0 (off) to below 1", _number(lambda x: 0 <= x < 1))
_COUNT = ("0 (off) or more", _integer(0))
_LENGTH = ("1 or more", _integer(1))
_TOKENS = ("a list of token ids", _ids)
_SETTINGS: dict[str, tuple[str, Reader]] = {
    "temperature": ("0 (greedy) or more", _number(lambda x: 0 <= x < math.inf)),
    "top_k": _COUNT,
    "top_p": ("from 0 (the likeliest only) to 1 (off)", _number(lambda x: 0 <= x <= 1)),
    "min_p": ("from 0 (off) to 1", _number(lambda x: 0 <= x <= 1)),
    "top_h": ("from 0 (off) to 1", _number(lambda x: 0 <= x <= 1)),
    "typical_p": ("above 0, and 1 for off", _number(lambda x: 0 < x < math.inf)),
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
    "forced_bos_token_id": ("a token id, or an empty list for none", _id_or_none),
    "forced_eos_token_id": ("a token id or a list of them", _id_or_ids),
    "remove_invalid_values": ("true or false", _flag),
    "exponential_decay_length_penalty": ("a pair of a start (tokens) and a factor, or empty", _decay),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "max_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "max_time": ("a number of seconds", _number(lambda x: x >= 0)),
    "stop_strings": ("a string or a list of strings", _strings),
}
