"""Which command is for which kind of artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.manifest import Manifest

_WHAT = {
    "generate": "continues texts",
    "embed": "makes embeddings",
    "classify": "classifies texts",
    "encode": "gives outputs of its own for texts",
    "run": "takes arrays",
}


def kind_of(manifest: Manifest) -> str:
    """What an artifact is for: "generate", "embed", "classify" (texts or tokens), "encode" (anything else that takes
    texts) or "run"."""
    if manifest.task != "encode":
        return manifest.task
    facts = manifest.encoder
    if facts is None or (facts.kind == "tokens" and facts.labels is None):
        return "encode"
    return "embed" if facts.kind == "embedding" else "classify"


def next_command(manifest: Manifest, path: Path) -> str:
    """What to try with an artifact."""
    kind = kind_of(manifest)
    if kind == "generate":
        chat = manifest.text is not None and manifest.text.chat_template
        return f"llmc chat {path}" if chat else f"llmc run {path} 'Once upon a time'"
    if kind in ("embed", "classify") and manifest.text is not None:
        return f"llmc {kind} {path} 'a text' 'another'"
    method = "tag" if kind == "classify" and manifest.encoder and manifest.encoder.kind == "tokens" else kind
    given = "{...}" if kind == "run" else "'a text'" if manifest.text is not None else "[1, 2, 3]"
    call = f"{method}({given})"
    return f"python -c \"from llmc import Runtime; print(Runtime.load('{path}').{call})\""


def require(manifest: Manifest, path: Path, command: str, *kinds: str) -> None:
    """LlmcError where an artifact is of none of the kinds that a command is for; it says which command is."""
    kind = kind_of(manifest)
    if kind in kinds:
        return
    if kind == "run":
        hint = "use Runtime.run({name: array}) in Python"
    elif kind == "encode":
        hint = "use Runtime.encode(texts) in Python"
    else:
        hint = f"use `{next_command(manifest, path)}`"
    raise LlmcError(f"`llmc {command}` is not for {path}, which {_WHAT[kind]}: {hint}")
