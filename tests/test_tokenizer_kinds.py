"""Of every kind of tokenizer, an artifact's text is that of transformers: ids, decoded, streamed, continued."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizer_kinds import KINDS, id_lists, strings

from llmc.frontends.hf.config import load_config, quiet
from llmc.frontends.hf.tokenizer import read_text
from llmc.runtime.manifest import TextFacts
from llmc.runtime.tokenizer import Detokenizer, Tokenizer

QUICK, WHOLE = 100, 500  # strings of a kind


@dataclasses.dataclass(frozen=True)
class Pair:
    """A directory's tokenizer, as an artifact holds it and as transformers reads it."""

    ours: Tokenizer
    theirs: Any

    def decoded(self, ids: list[int], skip_special: bool = True) -> str:
        with quiet():  # transformers logs that it does not clean up
            return str(self.theirs.decode(ids, skip_special_tokens=skip_special))


def read(directory: Path) -> Pair:
    text = read_text(directory, load_config(directory))
    assert text.facts is not None, text.notes
    names = {field.name for field in dataclasses.fields(TextFacts)}
    facts = {name: tuple(value) if isinstance(value, list) else value for name, value in text.facts.items()}
    ours = Tokenizer(text.files["tokenizer.json"], TextFacts(**{name: facts[name] for name in names & facts.keys()}))
    return Pair(ours, transformers.AutoTokenizer.from_pretrained(directory))


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def pair(kind: str) -> Pair:
        directory = tmp_path_factory.mktemp(kind)
        KINDS[kind](directory)
        return read(directory)

    return pair


def streamed(tokenizer: Tokenizer, ids: list[int], context: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, context)
    return "".join([detokenizer.add(token) for token in ids]) + detokenizer.finish()


def check_encoding(pair: Pair, text: str) -> list[int]:
    for special in (False, True):
        ids = list(pair.theirs(text, add_special_tokens=special)["input_ids"])
        assert pair.ours.encode(text, add_special=special) == ids
    return ids


def check_decoding(pair: Pair, ids: list[int], cuts: list[int]) -> None:
    """cuts: where the text is continued. Wherever the whole starts with the text before the cut, the pieces are the
    rest of it; else (a character was cut there) they begin where the two differ."""
    whole = pair.decoded(ids)
    assert pair.ours.decode(ids) == whole
    assert pair.ours.decode(ids, skip_special=False) == pair.decoded(ids, skip_special=False)
    for cut in {0, *cuts}:
        before = pair.decoded(ids[:cut])
        same = next(
            (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
        )
        assert streamed(pair.ours, ids[cut:], ids[:cut]) == whole[same:], (ids, cut)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_transformers(kind: str, pair_of: Any) -> None:
    pair = pair_of(kind)
    for number, text in enumerate(strings(QUICK)):
        ids = check_encoding(pair, text)
        check_decoding(pair, ids, [number % (len(ids) + 1), len(ids)])
    for number, ids in enumerate(id_lists(pair.ours.size, QUICK)):
        check_decoding(pair, ids, [number % (len(ids) + 1)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_transformers_at_every_cut(kind: str, pair_of: Any) -> None:
    pair = pair_of(kind)
    for text in strings(WHOLE, seed=11):
        ids = check_encoding(pair, text)
        check_decoding(pair, ids, list(range(len(ids) + 1)))
    for ids in id_lists(pair.ours.size, WHOLE, seed=11):
        check_decoding(pair, ids, list(range(len(ids) + 1)))
