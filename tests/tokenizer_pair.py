"""A directory's tokenizer twice: as an artifact holds it, and as transformers reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import transformers

from llmc.frontends.hf.config import load_config, quiet
from llmc.frontends.hf.tokenizer import read_text
from llmc.runtime.decoder_steps import common
from llmc.runtime.manifest import TextFacts
from llmc.runtime.tokenizer import Detokenizer, Tokenizer


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
        same = common(before, whole)
        assert streamed(pair.ours, ids[cut:], ids[:cut]) == whole[same:], (ids, cut)
