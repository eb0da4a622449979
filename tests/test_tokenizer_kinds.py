"""Of every kind of tokenizer, an artifact's text is that of transformers: ids, decoded, streamed, continued."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tokenizer_kinds import KINDS, id_lists, strings
from tokenizer_pair import Pair, check_decoding, check_encoding, read

from llmc.runtime.tokenizer import Detokenizer, StopMatcher

QUICK, WHOLE = 100, 500  # strings of a kind


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def pair(kind: str) -> Pair:
        directory = tmp_path_factory.mktemp(kind)
        KINDS[kind](directory)
        return read(directory)

    return pair


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_transformers(kind: str, pair_of: Any) -> None:
    pair = pair_of(kind)
    for number, text in enumerate(strings(QUICK)):
        ids = check_encoding(pair, text)
        check_decoding(pair, ids, [number % (len(ids) + 1), len(ids)])
    for number, ids in enumerate(id_lists(pair.ours.size, QUICK)):
        check_decoding(pair, ids, [number % (len(ids) + 1)])


def tokens_of_transformers(pair: Pair, ids: list[int], stops: list[str]) -> int | None:
    """How many tokens transformers writes, up to the first that completes a stop string."""
    criteria = transformers.StopStringCriteria(pair.theirs, stops)
    found = (bool(criteria(torch.tensor([ids[: count + 1]]), torch.zeros(1))[0]) for count in range(len(ids)))
    return next((count + 1 for count, stopped in enumerate(found) if stopped), None)


def tokens_of_ours(pair: Pair, ids: list[int], stops: list[str]) -> int | None:
    """The same as generation does it."""
    detokenizer, matcher = Detokenizer(pair.ours), StopMatcher(stops)
    for count, token in enumerate(ids):
        special = pair.ours.special_text(token)
        if special:
            matcher.skip(special, detokenizer.pending)
        else:
            matcher.feed(detokenizer.add(token))
            matcher.look(detokenizer.pending)
        if matcher.stopped:
            return count + 1
    return None


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "flags", "llama2", "phi3", "gemma"])
def test_stop_strings_end_a_text_at_the_token_of_transformers(kind: str, pair_of: Any) -> None:
    """Stops across token borders, within a token, at line ends that are byte tokens, and at special tokens: alone, amid
    text, and in part."""
    pair = pair_of(kind)
    chance = random.Random(3)
    special = sorted(token.content for token in pair.theirs.added_tokens_decoder.values() if token.special)
    parts = [
        "def greet(name):\n return x",
        "Hello again.\n\nDon't stop",
        "it 's 3.14 , isn 't it ?",
        "naïve x\n",
        *special,
    ]
    for _ in range(QUICK // 4):
        chosen = [parts[0], *(chance.choice(parts) for _ in range(chance.randint(1, 5)))]
        ids = [token for part in chosen for token in pair.theirs(part, add_special_tokens=False)["input_ids"]]
        text = pair.decoded(ids, skip_special=False)
        start = chance.randrange(len(text))
        stops = [text[start : start + chance.randint(1, 8)].strip(" ") or "x", chance.choice([*special, "\n", "never"])]
        assert tokens_of_ours(pair, ids, stops) == tokens_of_transformers(pair, ids, stops), (ids, stops, text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_transformers_at_every_cut(kind: str, pair_of: Any) -> None:
    pair = pair_of(kind)
    for text in strings(WHOLE, seed=11):
        ids = check_encoding(pair, text)
        check_decoding(pair, ids, list(range(len(ids) + 1)))
    for ids in id_lists(pair.ours.size, WHOLE, seed=11):
        check_decoding(pair, ids, list(range(len(ids) + 1)))
