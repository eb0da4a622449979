"""verify: an artifact beside another one of the same model, also one for another kind of machine, under an emulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.errors import LlmcError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmc.runtime.runtime import Runtime
    from llmc.targets.emulated import Emulated, Ids

LENGTHS = (5, 33, 200)  # tokens of the texts that are compared, or the context; kernels take up to 192 rows at once
GREEDY = 24  # tokens that are written
# Of a row's spread, or of a vector's length. Two machines round activations of 8 bits to the other side of a half now
# and then: a hundredth is usual.
MOST_ERROR = 0.03


@dataclass(frozen=True)
class Verdict:
    """What was compared.

    rows: predictions, or vectors. error: of the worst row, the root of the mean square difference by the spread of what
    is expected; of the worst vector, the length of the difference by its own. divergence: the mean KL divergence of
    predictions in nats, or the largest 1 - cosine of vectors. same: rows with the same likeliest token. greedy: tokens
    that are the same from the first on, of `written`. gap: by how much of its spread the other artifact likes its own
    token more, where they differ first.
    """

    emulated: str | None
    rows: int
    error: float
    divergence: float
    same: int
    greedy: int = 0
    written: int = 0
    gap: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.error <= MOST_ERROR and self.gap <= MOST_ERROR


def verify(
    artifact: o.Artifact,
    against: Annotated[
        Path, typer.Option("--against", metavar="SO", help="One of the same model, compiled for this computer.")
    ],
    emulate: Annotated[
        str | None,
        typer.Option("--emulate", metavar="CPU", help="The CPU, as qemu names it: max, cortex-a76, neoverse-n1, ..."),
    ] = None,
    weights: o.Weights = None,
    threads: o.Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random texts.")] = 0,
    json: o.Json = False,
) -> None:
    """Compare an artifact with another one of its model: what they predict of random texts, and what they write.

    One for another kind of machine runs under qemu, on an emulated CPU. That shows that it is right, and nothing of how
    fast it is. The exit status is 1 where they differ more than roundings do.
    """
    found = compare(artifact, against, emulate, weights, threads, seed)
    if json:
        output.print_json(asdict(found) | {"good": found.is_good})
    else:
        _print(artifact, against, found)
    if not found.is_good:
        raise typer.Exit(1)


def compare(
    path: Path, against: Path, emulate: str | None, weights: Path | None, threads: int | None, seed: int
) -> Verdict:
    """The comparison. LlmcError where one of the two does not run, or where they are not of one model."""
    from llmc.runtime import cpu
    from llmc.runtime.runtime import Runtime
    from llmc.targets.emulated import Emulated, why_not

    subject = Emulated.open(path, emulate or "max", weights, threads or 2)
    manifest, runtime = subject.manifest, Runtime.load(against, threads, weights=weights)
    for ours, theirs, what in (
        (manifest.task, runtime.manifest.task, "task"),
        (manifest.step.vocab_size, runtime.manifest.step.vocab_size, "size of the vocabulary"),
    ):
        if ours != theirs:
            raise LlmcError(f"{path} and {against} are not of one model: their {what} is {ours} and {theirs}")
    is_foreign = manifest.target.arch != cpu.architecture()
    if not is_foreign and emulate is not None:
        raise LlmcError(f"{path} is for {manifest.target.arch}, as this computer is: compare it without --emulate")
    if is_foreign and weights is not None:
        raise LlmcError(
            "artifacts for two architectures read different weights: compile both with their weights inside"
        )
    reason = why_not(manifest) if is_foreign else ""
    if reason:
        raise LlmcError(f"{path} cannot be run here: {reason}")
    here = None if is_foreign else Runtime.load(path, threads, weights=weights)
    texts = _texts(runtime, seed)
    if manifest.task == "encode":
        return _encoders(here or subject, runtime, texts)
    if manifest.task != "generate":
        raise LlmcError(f"{path} takes arrays: verify compares what continues or encodes texts")
    return _decoders(here or subject, runtime, texts, seed)


def _texts(runtime: Runtime, seed: int) -> list[NDArray[np.int32]]:
    import numpy as np

    rng, most = np.random.default_rng(seed), runtime.max_context - GREEDY
    if runtime.manifest.encoder is not None:
        most = runtime.manifest.encoder.max_tokens
    lengths = sorted({max(1, min(length, most)) for length in LENGTHS})
    return [rng.integers(0, runtime.vocab_size, length).astype(np.int32) for length in lengths]


def _decoders(subject: Runtime | Emulated, other: Runtime, texts: Sequence[NDArray[np.int32]], seed: int) -> Verdict:
    import numpy as np

    from llmc.targets.emulated import Emulated, pieces_of

    rng = np.random.default_rng(seed)
    pieces = [pieces_of(text, rng) for text in texts]
    prompt, written = texts[0], min(GREEDY, other.max_context - len(texts[0]))
    emulated = isinstance(subject, Emulated)
    found = subject.logits(pieces) if isinstance(subject, Emulated) else _logits(subject, pieces)
    tokens = subject.greedy(prompt, written) if isinstance(subject, Emulated) else _greedy(subject, prompt, written)
    expected, theirs = _logits(other, pieces), _greedy(other, prompt, written)
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise LlmcError("logits are not finite numbers")
    same_tokens = next((i for i, pair in enumerate(zip(tokens, theirs, strict=True)) if pair[0] != pair[1]), written)
    gap = 0.0
    if same_tokens < written:
        with other.sequence() as kept:
            liked = np.array(kept.append([*map(int, prompt), *theirs[:same_tokens]]), np.float64)
        gap = float((liked[theirs[same_tokens]] - liked[tokens[same_tokens]]) / max(liked.std(), 1e-30))
    spread = np.maximum(expected.std(axis=-1, dtype=np.float64), 1e-30)
    error = float((np.sqrt(np.mean((found.astype(np.float64) - expected) ** 2, axis=-1)) / spread).max())
    chances, own = _log_softmax(expected), _log_softmax(found)
    divergence = float((np.exp(chances) * (chances - own)).sum(-1).mean())
    same = int((expected.argmax(-1) == found.argmax(-1)).sum())
    model = subject.model if isinstance(subject, Emulated) else None
    return Verdict(model if emulated else None, len(found), error, divergence, same, same_tokens, written, gap)


def _encoders(subject: Runtime | Emulated, other: Runtime, texts: Sequence[NDArray[np.int32]]) -> Verdict:
    import numpy as np

    from llmc.targets.emulated import Emulated

    def rows(of: Runtime | Emulated) -> NDArray[np.float64]:
        if isinstance(of, Emulated):
            return np.concatenate(of.encode(texts)).astype(np.float64)
        return np.concatenate([np.atleast_2d(each) for each in _encoded(of, texts)]).astype(np.float64)

    found, expected = rows(subject), rows(other)
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise LlmcError(f"its vectors are {list(found.shape)}, the other's {list(expected.shape)}, or are no numbers")
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    angles = 1 - (found * expected).sum(-1) / np.maximum(lengths, 1e-30)
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    errors = np.linalg.norm(found - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)
    model = subject.model if isinstance(subject, Emulated) else None
    return Verdict(model, len(found), float(errors.max()), float(angles.max()), same)


def _encoded(runtime: Runtime, texts: Sequence[NDArray[np.int32]]) -> list[NDArray[np.generic]]:
    """The output of the artifact's encoder, text by text, as `encode` of llmc.h gives it."""
    import numpy as np

    from llmc.runtime.ragged import RaggedRunner, Tokens

    runner, facts = runtime.caller, runtime.manifest.encoder
    assert facts is not None
    if not isinstance(runner, RaggedRunner):
        raise LlmcError("an encoder that takes one text at a time is not compared")
    found = []
    for text in texts:
        (rows,) = runner.run([Tokens(text, np.zeros(len(text), np.int32))])[facts.output]
        found.append(np.array(rows))
    return found


def _logits(runtime: Runtime, pieces: Sequence[Sequence[Ids]]) -> NDArray[np.float32]:
    import numpy as np

    found = []
    for sequence in pieces:
        with runtime.sequence() as kept:
            found += [np.array(kept.append([int(token) for token in piece])) for piece in sequence]
    return np.stack(found)


def _greedy(runtime: Runtime, prompt: Ids, count: int) -> list[int]:
    found: list[int] = []
    with runtime.sequence() as kept:
        logits = kept.append([int(token) for token in prompt])
        while len(found) < count:
            found.append(int(logits.argmax()))
            logits = kept.append([found[-1]])
    return found


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


def _print(path: Path, against: Path, found: Verdict) -> None:
    where = f", on an emulated {found.emulated}," if found.emulated else ""
    if found.written:
        print(
            f"{path}{where} beside {against}: KL {found.divergence:.2e} nats on average, {found.error:.1%} of the "
            f"spread of logits in the worst row, the same likeliest token in {found.same} of {found.rows} rows, the "
            f"same {found.greedy} of {found.written} tokens written"
        )
    else:
        print(
            f"{path}{where} beside {against}: {found.rows} vectors, {found.error:.1%} of the length of the worst, 1 - "
            f"cosine at most {found.divergence:.1e}, the largest number at the same place in {found.same}"
        )
    print("good: they differ by roundings" if found.is_good else "different: by more than roundings are")


COMMANDS = (
    (verify, ("llmc verify pycoder-arm.so --against pycoder.so",
              "llmc verify pycoder-arm.so --against pycoder.so --emulate cortex-a76")),
)  # fmt: skip
