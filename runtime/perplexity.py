"""How well an artifact predicts a text, alone and beside a reference: `llmc eval`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.runtime import Runtime

Logits = NDArray[np.float32]
Ids = NDArray[np.int32]
Reference = Callable[[Ids], Logits]

_MOST_LOSS = 700.0  # nats; e to that power is still a number
_MOST_LOGITS = 1 << 26  # logits held at once, 256 MiB


@dataclass(frozen=True)
class Quality:
    """perplexity: exp of the mean negative log-likelihood, in nats, of `tokens` predictions in `windows` windows.

    With a reference: its perplexity on the same predictions, the mean Kullback-Leibler divergence of the artifact's
    next-token distribution from the reference's (in nats), and the part of predictions whose most likely token is the
    same.
    """

    perplexity: float
    tokens: int
    windows: int
    window: int
    reference_perplexity: float | None = None
    mean_kl_divergence: float | None = None
    top1_agreement: float | None = None


def windows_of(runtime: Runtime, text: str, size: int = 512, count: int | None = None) -> list[Ids]:
    """Consecutive windows of `size` tokens: the first token is the model's beginning-of-text token, if it has one, and
    the text's tokens go on from one window to the next. A last window that is not full is left out, unless it is the
    only one."""
    if size < 2:
        raise RuntimeStateError(f"a window needs at least 2 tokens, not {size}")
    if size > runtime.max_context:
        most = runtime.max_context
        raise RuntimeStateError(
            f"a window of {size} tokens is more than the context of {most}: give --window {most} or less"
        )
    tokens = runtime.tokenizer.encode(text, add_special=False)
    bos = runtime.manifest.text.bos_id if runtime.manifest.text else None
    start = [] if bos is None else [bos]
    step = size - len(start)
    pieces = [tokens[at : at + step] for at in range(0, len(tokens), step)]
    if len(pieces) > 1 and len(pieces[-1]) < step:
        pieces.pop()
    windows = [np.array([*start, *piece], np.int32) for piece in pieces[:count]]
    if not windows or len(windows[0]) < 2:
        raise RuntimeStateError("the text is too short: at least two tokens are needed")
    return windows


def evaluate(
    runtime: Runtime, windows: list[Ids], reference: Reference | None = None, tell: Callable[[], None] | None = None
) -> Quality:
    """Predicts every token of each window but the first from those before it. reference(ids) gives float32 logits
    [len(ids), vocab], of which the first `runtime.vocab_size` columns count."""
    return evaluate_all([runtime], windows, reference, tell)[0]


def evaluate_all(
    runtimes: Sequence[Runtime],
    windows: list[Ids],
    reference: Reference | None = None,
    tell: Callable[[], None] | None = None,
) -> list[Quality]:
    """`evaluate` for each of several artifacts, which have the same vocabulary; the reference runs once a window."""
    tallies = [_Tally(runtime, reference is not None) for runtime in runtimes]
    for ids in windows:
        expected = None if reference is None else reference(ids)[:, : runtimes[0].vocab_size]
        for tally in tallies:
            tally.add(ids, expected)
        if tell is not None:
            tell()
    return [tally.quality(windows) for tally in tallies]


def check_comparable(runtimes: Sequence[Runtime]) -> None:
    """RuntimeStateError where a text is not the same ids for all of these, so that figures cannot be compared."""
    first = runtimes[0]
    for other in runtimes[1:]:
        both = f"{first.artifact.path} and {other.artifact.path}"
        if other.vocab_size != first.vocab_size:
            raise RuntimeStateError(
                f"{both} cannot be compared: they have vocabularies of {first.vocab_size} and {other.vocab_size} tokens"
            )
        texts = (first.manifest.text, other.manifest.text)
        starts = [None if text is None else text.bos_id for text in texts]
        if first.artifact.tokenizer() != other.artifact.tokenizer() or starts[0] != starts[1]:
            raise RuntimeStateError(f"{both} cannot be compared: their tokenizers differ")


class _Tally:
    """What one artifact's predictions sum up to."""

    def __init__(self, runtime: Runtime, has_reference: bool) -> None:
        self.runtime, self.has_reference = runtime, has_reference
        self.loss = self.reference_loss = self.divergence = 0.0
        self.same = self.total = 0

    def add(self, ids: Ids, expected: Logits | None) -> None:
        """Predict a window. expected: the reference's logits [len(ids), vocab]."""
        chunk = max(1, _MOST_LOGITS // self.runtime.vocab_size)
        with self.runtime.sequence(len(ids)) as sequence:
            for begin in range(0, len(ids) - 1, chunk):
                end = min(begin + chunk, len(ids) - 1)
                found = log_softmax(self.runtime.step([(sequence, ids[begin:end], "all")]))
                targets = ids[begin + 1 : end + 1]
                rows = np.arange(end - begin)
                self.loss -= float(found[rows, targets].sum(dtype=np.float64))
                if expected is not None:
                    wanted = log_softmax(expected[begin:end])
                    self.reference_loss -= float(wanted[rows, targets].sum(dtype=np.float64))
                    with np.errstate(invalid="ignore"):
                        gaps = np.exp(wanted) * (wanted - found)
                    # What the reference rules out has no part in the sum.
                    self.divergence += float(np.where(np.isneginf(wanted), 0, gaps).sum(dtype=np.float64))
                    self.same += int((wanted.argmax(axis=-1) == found.argmax(axis=-1)).sum())
        self.total += len(ids) - 1

    def quality(self, windows: list[Ids]) -> Quality:
        """What it comes to."""
        total = self.total
        quality = Quality(_perplexity(self.loss, total), total, len(windows), len(windows[0]))
        if not self.has_reference:
            return quality
        return replace(
            quality,
            reference_perplexity=_perplexity(self.reference_loss, total),
            mean_kl_divergence=self.divergence / total,
            top1_agreement=self.same / total,
        )


def log_softmax(logits: Logits) -> Logits:
    """Log-probabilities of each row, float32 [rows, vocab]; the sum is in f64, as vocabularies are long."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total: NDArray[np.float64] = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    result: Logits = (shifted - np.log(total)).astype(np.float32)
    return result


def _perplexity(loss: float, count: int) -> float:
    mean = loss / count
    if not mean < _MOST_LOSS:
        raise RuntimeStateError(f"a mean loss of {mean:g} nats a token has no perplexity: is the text in UTF-8?")
    return math.exp(mean)
