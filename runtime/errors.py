"""The runtime's own errors, under the one tree of `llmc.errors`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmc.errors import ArtifactError, LlmcError, RuntimeStateError


class CacheFullError(RuntimeStateError):
    """The KV cache has no page left for the tokens that a step would add."""


class ContextError(RuntimeStateError):
    """A sequence would grow longer than the model or the artifact allows."""


class TextError(RuntimeStateError):
    """Text that cannot be made or read: no tokenizer, no chat template, or a template that fails."""


class AdapterError(RuntimeStateError):
    """An adapter that cannot be loaded, used or taken away."""


class BatchError(RuntimeStateError):
    """Some texts of a batch could not be written to their end; the others were.

    texts: by prompt, None for those that failed. errors: why, by the number of the prompt.
    """

    def __init__(self, texts: Sequence[str | None], errors: Mapping[int, RuntimeStateError]) -> None:
        self.texts, self.errors = tuple(texts), dict(errors)
        first = min(self.errors)
        more = f" (and {len(self.errors) - 1} more)" if len(self.errors) > 1 else ""
        rest = "; the other texts are in the error's `texts`" if len(self.errors) < len(self.texts) else ""
        super().__init__(f"prompt {first} of {len(self.texts)}{more}: {self.errors[first]}{rest}")


class StepError(RuntimeStateError):
    """The artifact's step function reported a failure."""


__all__ = [
    "AdapterError",
    "ArtifactError",
    "BatchError",
    "CacheFullError",
    "ContextError",
    "LlmcError",
    "RuntimeStateError",
    "StepError",
    "TextError",
]
