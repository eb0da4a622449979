"""What an artifact says of its accuracy: how far it is from the model that it was compiled from, in all and tensor by
tensor. Measured when compiling, part of the manifest, read here."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.runtime.json_reader import Reader

ARTIFACT, GRAPH = "artifact", "graph"
WRITTEN, DRAWN = "written", "drawn"
_MOST = 1e30  # no ratio of squares that means anything is larger


@dataclass(frozen=True)
class TensorAccuracy:
    """A matrix that was rounded, by its name in the checkpoint.

    encoding: how it is stored, such as "t4g64"; bits: stored for each of its `numbers`, scales included. weight_error:
    the sum of its squared errors over the sum of its squares. output_error: the same of what its layer multiplies it
    to, on the text that accuracy was measured on; None where nothing multiplies by it, or nothing was run.
    """

    name: str
    encoding: str
    bits: float
    numbers: int
    weight_error: float
    output_error: float | None


@dataclass(frozen=True)
class TextAccuracy:
    """A decoder beside its original in f32, on `tokens` predictions in `texts` texts.

    source: "written" by the artifact itself, token by token, or "drawn" from the original's predictions in a few
    passes, where the artifact did not run on the machine that compiled it. through: what was run, the "artifact" or its
    "graph" in numpy. mean_kl_divergence: of its next-token distributions from the original's, in nats. top1_agreement:
    the part of predictions whose most likely token is the same.
    """

    texts: int
    tokens: int
    source: str
    through: str
    mean_kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class VectorAccuracy:
    """An encoder beside its original in f32: the cosines of the rows of `output`, of `texts` texts of random ids,
    all as likely.

    rows: how many rows there are, one a text or one a token. through: as in `TextAccuracy`.
    """

    output: str
    texts: int
    tokens: int
    rows: int
    through: str
    mean_cosine: float
    least_cosine: float


@dataclass(frozen=True)
class Accuracy:
    """What was measured; text and vectors are None where the model is of another kind, or did not run."""

    tensors: tuple[TensorAccuracy, ...]
    text: TextAccuracy | None = None
    vectors: VectorAccuracy | None = None


def parse_accuracy(reader: Reader) -> Accuracy:
    """A manifest's `accuracy`; `ArtifactError` names the first field that is wrong."""
    text, vectors = (None if reader.value.get(name) is None else reader.child(name) for name in ("text", "vectors"))
    return Accuracy(
        tensors=tuple(_tensor(item) for item in reader.children("tensors")),
        text=None if text is None else _text(text),
        vectors=None if vectors is None else _vectors(vectors),
    )


def _tensor(reader: Reader) -> TensorAccuracy:
    return TensorAccuracy(
        name=reader.string("name"),
        encoding=reader.string("encoding"),
        bits=reader.number("bits", 0, 1e6),
        numbers=reader.integer("numbers"),
        weight_error=reader.number("weight_error", 0, _MOST),
        output_error=None if reader.value.get("output_error") is None else reader.number("output_error", 0, _MOST),
    )


def _text(reader: Reader) -> TextAccuracy:
    return TextAccuracy(
        texts=reader.integer("texts", 1),
        tokens=reader.integer("tokens", 1),
        source=reader.string("source", (WRITTEN, DRAWN)),
        through=reader.string("through", (ARTIFACT, GRAPH)),
        # The smallest that sums in f32 give is a little below 0.
        mean_kl_divergence=reader.number("mean_kl_divergence", -1, _MOST),
        top1_agreement=reader.number("top1_agreement", 0, 1),
    )


def _vectors(reader: Reader) -> VectorAccuracy:
    return VectorAccuracy(
        output=reader.string("output"),
        texts=reader.integer("texts", 1),
        tokens=reader.integer("tokens", 1),
        rows=reader.integer("rows", 1),
        through=reader.string("through", (ARTIFACT, GRAPH)),
        mean_cosine=reader.number("mean_cosine", -1, 1),
        least_cosine=reader.number("least_cosine", -1, 1),
    )
