"""The runtime's own errors, under the one tree of `llmc.errors`."""

from __future__ import annotations

from llmc.errors import ArtifactError, LlmcError, RuntimeStateError


class CacheFullError(RuntimeStateError):
    """The KV cache has no page left for the tokens that a step would add."""


class ContextError(RuntimeStateError):
    """A sequence would grow longer than the model or the artifact allows."""


class TextError(RuntimeStateError):
    """Text that cannot be made or read: no tokenizer, no chat template, or a template that fails."""


class StepError(RuntimeStateError):
    """The artifact's step function reported a failure."""


__all__ = [
    "ArtifactError",
    "CacheFullError",
    "ContextError",
    "LlmcError",
    "RuntimeStateError",
    "StepError",
    "TextError",
]
