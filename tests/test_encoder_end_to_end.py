"""From an encoder's directory to vectors and classes: what the artifact says is what the model's own library says."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import hf_models
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import CACHE
from tiny_encoders import make_encoder, make_sentence

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.runtime.runtime import Runtime

F32 = 2e-5  # two evaluations in f32 of values of size about 1, summed in different orders
MIXTURE = 1e-6  # sums over other tiles and splits
COSINE = 0.999  # int8 weights and activations

_ORDINARY = "the cat sat on a mat where quick foxes jump over lazy dogs in Paris ; naïve 日本語 🙂 don't 1000"
WORDS = _ORDINARY.split()


def sentences(count: int, longest: int = 60, seed: int = 0) -> list[str]:
    """Texts of 0 to `longest` words, some of them longer than the models take."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(length))) for length in rng.integers(0, longest, count)]


TEXTS = ["", "Paris", "A cat sat on the mat.", "words without end " * 90, *sentences(40)]


def compiled(directory: Path, quantization: str = "none") -> Runtime:
    path = directory.parent / f"{directory.name}-{quantization}.so"
    compile_model(str(directory), path, CompileOptions(quantization=quantization, kernel_cache=CACHE))
    return Runtime.load(path, threads=2)


@cache
def library(directory: Path) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(directory), device="cpu")


def expected(directory: Path, texts: list[str], **options: object) -> np.ndarray:
    """The library's embeddings, of each text alone: padding changes them in the last bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(library(directory).encode(texts, batch_size=1, show_progress_bar=False, **options))


# (family, pooling, modules behind it): every family and every pooling, with and without normalisation.
SENTENCE = [
    ("bert", "mean", "N"),
    ("distilbert", "cls", ""),
    ("roberta", "max", "N"),
    ("mpnet", "mean", "N"),
    ("modernbert", "mean", "DN"),
]


@cache
def sentence(family: str, pooling: str, modules: str) -> Path:
    directory = hf_models._root / f"end-to-end-{family}-{pooling}-{modules}"
    return make_sentence(family, directory, pooling, modules=modules, prompts={"query": "find this: "})


@cache
def embedder(family: str, pooling: str, modules: str, quantization: str = "none") -> Runtime:
    return compiled(sentence(family, pooling, modules), quantization)


@pytest.mark.parametrize("family, pooling, modules", SENTENCE)
def test_embeddings_are_those_of_the_library(family: str, pooling: str, modules: str) -> None:
    directory, runtime = sentence(family, pooling, modules), embedder(family, pooling, modules)
    found = runtime.embed(TEXTS)
    np.testing.assert_allclose(
        found, expected(directory, TEXTS), rtol=0, atol=F32 * max(1.0, float(np.abs(found).max()))
    )
    prompted = runtime.embed(TEXTS[:6], prompt_name="query")
    wanted = expected(directory, TEXTS[:6], prompt_name="query")
    np.testing.assert_allclose(prompted, wanted, rtol=0, atol=F32 * max(1.0, float(np.abs(found).max())))
    assert (np.abs(prompted - found[:6]).max(axis=1) > 1e-3).all()


@given(st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_any_mixture_gives_the_same_rows(chosen: list[int]) -> None:
    """Any order and any neighbours, also the same text several times."""
    runtime = embedder("mpnet", "mean", "N")
    alone = np.stack([runtime.embed(TEXTS[index]) for index in sorted(set(chosen))])
    rows = [sorted(set(chosen)).index(index) for index in chosen]
    found = runtime.embed([TEXTS[index] for index in chosen])
    np.testing.assert_allclose(found, alone[rows], rtol=0, atol=MIXTURE)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_rounded_embeddings_point_the_same_way(family: str) -> None:
    texts = sentences(200)
    wanted = expected(sentence(family, "mean", "N"), texts)
    found = embedder(family, "mean", "N", "int8").embed(texts)
    cosines = (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() > COSINE


def logits_of(directory: Path, head: str, texts: list[tuple[str, ...]], longest: int) -> list[np.ndarray]:
    """transformers' own logits of each text or pair."""
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        return [
            model(**tokenizer(*text, return_tensors="pt", truncation=True, max_length=longest)).logits[0].numpy()
            for text in texts
        ]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_classes_are_those_of_transformers(family: str) -> None:
    labels = ["no", "maybe", "yes"]
    directory = make_encoder(
        family, hf_models._root / f"classes-{family}", "SequenceClassification", id2label=dict(enumerate(labels))
    )
    runtime = compiled(directory)
    texts = [*TEXTS[:12], ("A cat", "sat on the mat"), ("", "x"), ("words " * 100, "without end " * 100)]
    pairs = [(text,) if isinstance(text, str) else text for text in texts]
    wanted = logits_of(directory, "SequenceClassification", pairs, runtime.max_tokens)
    found = runtime.classify(texts, activation="none")
    for entry, row in zip(found, wanted, strict=True):
        scores = entry["scores"]
        assert list(scores) == labels
        np.testing.assert_allclose(list(scores.values()), row, rtol=0, atol=F32 * max(1.0, float(np.abs(row).max())))
    # The default is a distribution.
    for entry, row in zip(runtime.classify(texts), wanted, strict=True):
        chances = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert entry["label"] == labels[int(row.argmax())]
        np.testing.assert_allclose(list(entry["scores"].values()), chances, atol=1e-4)


def test_labels_of_tokens_are_those_of_transformers() -> None:
    directory = make_encoder("bert", hf_models._root / "tags", "TokenClassification", id2label=dict(enumerate("ABCDE")))
    runtime = compiled(directory)
    texts = TEXTS[1:9]
    wanted = logits_of(directory, "TokenClassification", [(text,) for text in texts], runtime.max_tokens)
    for text, entries, rows in zip(texts, runtime.tag(texts), wanted, strict=True):
        assert [entry["label"] for entry in entries] == ["ABCDE"[index] for index in rows.argmax(axis=1)[1:-1]]
        assert all(text[entry["start"] : entry["end"]] == entry["word"] for entry in entries)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_of_real_size(quantization: str) -> None:
    """The shape of a widely used small model: 6 layers of 384 features."""
    config = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    directory = hf_models._root / "real"
    if not directory.exists():
        make_sentence("bert", directory, "mean", modules="N", config=config)
    texts = sentences(200)
    wanted, found = expected(directory, texts), compiled(directory, quantization).embed(texts)
    if quantization == "none":
        np.testing.assert_allclose(found, wanted, rtol=0, atol=F32)
    else:
        assert (found * wanted).sum(axis=1).min() > COSINE
