"""Tokenizer files, special tokens, chat template and generation defaults of a model directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """Everything that turns text into tokens and back."""

    files: dict[str, bytes] = field(default_factory=dict)


def read_text(directory: Path, config: object) -> Text:
    return Text()
