"""Directories of sentence-transformers and transformers, compiled: embeddings and classes are those libraries' own.

Shapes are those of all-MiniLM-L6 and all-mpnet-base, with two layers and a small vocabulary.
"""

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
from test_frontend_hf_sentence import TEXTS, expected, sentences
from tiny_encoders import make_encoder, make_sentence

import llmc
from llmc import Runtime

Array = np.ndarray
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
MPNET = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
PROMPTS = {"query": "query: ", "document": ""}
SENTENCES = (*TEXTS, *sentences(194))


@cache
def directory(family: str, pooling: str, modules: str) -> Path:
    shape = MPNET if family == "mpnet" else MINILM
    target = hf_models._root / f"compiled-{family}-{pooling}-{modules}"
    return make_sentence(family, target, pooling, modules=modules, config=shape, prompts=PROMPTS, max_seq_length=128)


@cache
def compiled(family: str, pooling: str, modules: str, dtype: str) -> Runtime:
    source = directory(family, pooling, modules)
    artifact = source.parent / f"{source.name}-{dtype}.so"
    llmc.compile(source, artifact, dtype=dtype)
    return Runtime.load(artifact, threads=1)


@cache
def reference(family: str, pooling: str, modules: str) -> Array:
    return expected(directory(family, pooling, modules), SENTENCES, batch_size=16)


CASES = [("bert", "mean", "N"), ("bert", "cls", ""), ("bert", "max", "DN"), ("mpnet", "mean", "N")]
INT8 = [CASES[0]]
ALL = [
    (family, pooling, modules)
    for family in ("bert", "mpnet")
    for pooling in ("mean", "cls", "max")
    for modules in ("", "N")
]


def with_slow(quick: list[tuple[str, str, str]]) -> list[object]:
    """Some cases, and every shape, pooling and normalisation besides as slow ones."""
    return [*quick, *(pytest.param(case, marks=pytest.mark.slow) for case in ALL if case not in quick)]


@pytest.mark.parametrize("case", with_slow(CASES), ids="-".join)
def test_embeddings_of_200_sentences_are_the_librarys(case: tuple[str, str, str]) -> None:
    found, wanted = compiled(*case, "f32").embed(SENTENCES), reference(*case)
    assert found.shape == wanted.shape == (200, 24 if "D" in case[2] else wanted.shape[1])
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("case", with_slow(INT8), ids="-".join)
def test_int8_embeddings_point_where_the_librarys_do(case: tuple[str, str, str]) -> None:
    found, wanted = compiled(*case, "int8").embed(SENTENCES), reference(*case)
    cosines = (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() > 0.999


def test_a_text_alone_is_embedded_as_among_others() -> None:
    """No padding: a text's embedding does not depend on the texts beside it."""
    runtime = compiled(*CASES[0], "f32")
    together = runtime.embed(SENTENCES[:20])
    for index in (0, 1, 5, 19):
        np.testing.assert_allclose(runtime.embed(SENTENCES[index]), together[index], atol=1e-6)


def test_prompts_are_the_librarys() -> None:
    runtime, texts = compiled(*CASES[0], "f32"), TEXTS[:3]
    for options in ({"prompt_name": "query"}, {"prompt": "as a question: "}, {"prompt_name": "document"}):
        wanted = expected(directory(*CASES[0]), texts, **options)
        np.testing.assert_allclose(runtime.embed(texts, **options), wanted, atol=1e-4)


@cache
def classifier(head: str, labels: int, **config: object) -> tuple[Path, Runtime]:
    source = make_encoder("bert", hf_models._root / f"classifier-{head}-{labels}", head, num_labels=labels, **config)
    llmc.compile(source, source.parent / f"{source.name}.so", dtype="f32")
    return source, Runtime.load(source.parent / f"{source.name}.so", threads=1)


@pytest.mark.parametrize("labels", [1, 3])
def test_classes_are_those_of_transformers_pipeline(labels: int) -> None:
    source, runtime = classifier("SequenceClassification", labels)
    pipeline = transformers.pipeline("text-classification", str(source), device="cpu", top_k=None, truncation=True)
    for text, found in zip(TEXTS, runtime.classify(list(TEXTS)), strict=True):
        wanted = {entry["label"]: entry["score"] for entry in pipeline([text])[0]}
        assert found["scores"] == pytest.approx(wanted, abs=1e-4)
        assert found["label"] == max(wanted, key=wanted.__getitem__)


def test_pairs_are_scored_as_cross_encoders_do() -> None:
    """The second text has token types of its own; the longer of two is cut first."""
    source, runtime = classifier("SequenceClassification", 1)
    pairs = [(a, b) for a in TEXTS[:3] for b in TEXTS[2:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = sentence_transformers.CrossEncoder(str(source), device="cpu").predict(pairs)
    found = [entry["score"] for entry in runtime.classify(pairs)]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_labels_of_tokens_are_those_of_transformers() -> None:
    source, runtime = classifier("TokenClassification", 3)
    model = transformers.AutoModelForTokenClassification.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    found = runtime.encode(list(TEXTS))
    for text, outputs in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            wanted = model(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0].numpy()
        np.testing.assert_allclose(outputs["logits"], wanted, atol=1e-4)
