"""The command line on artifacts that do not continue texts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from fake_kinds import LABELS, encoder_facts, reference, write_arrays, write_encoder
from test_cli import run

TEXTS = ("a dog", "", "b c cat")
IDS = ([1, 3, 6, 2], [1, 2], [1, 4, 5, 7, 2])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("cli") / "encoder.so")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = encoder_facts(kind="classification", labels=LABELS)
    return write_encoder(tmp_path_factory.mktemp("cli") / "classifier.so", facts)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_arrays(tmp_path_factory.mktemp("cli") / "arrays.so")


EXPECTED = np.stack([reference(ids)[0] for ids in IDS])


def test_embed_gives_all_numbers_as_json(encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "embed", encoder, *TEXTS, "--similarity", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["dimension"] == 3 and found["texts"] == list(TEXTS)
    np.testing.assert_array_equal(np.array(found["embeddings"], np.float32), EXPECTED)
    unit = EXPECTED / np.linalg.norm(EXPECTED, axis=1, keepdims=True)
    np.testing.assert_allclose(found["similarity"], unit @ unit.T, atol=1e-6)


def test_embed_writes_a_file_and_reads_lines(
    encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXTS[1:]) + "\n")
    target = tmp_path / "vectors.npy"
    status, out, err = run(capfd, "embed", encoder, TEXTS[0], "--file", lines, "-o", target)
    assert (status, out) == (0, "")
    assert "3 vectors of 3 numbers" in err
    np.testing.assert_array_equal(np.load(target), EXPECTED)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a dog\n")))
    status, out, _ = run(capfd, "embed", encoder, "--file", "-")
    assert status == 0 and out.endswith("  a dog\n")


def test_embed_with_prompts_and_unit_length(encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for options in (("--prompt", "query"), ("--prompt-text", "dog ")):
        _, out, _ = run(capfd, "embed", encoder, "cat", *options, "--normalize", "--json")
        vector = reference([1, 6, 7, 2])[0]
        np.testing.assert_allclose(json.loads(out)["embeddings"][0], vector / np.linalg.norm(vector), atol=1e-6)


def test_similarity_for_people(encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "embed", encoder, *TEXTS, "--similarity")
    assert status == 0 and out.count("1.000") == 3 and len(out.splitlines()) == 4


def test_classify(classifier: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "classify", classifier, *TEXTS, "--json")
    assert status == 0
    labels = [entry["label"] for entry in json.loads(out)["classes"]]
    assert labels == [LABELS[row.argmax()] for row in EXPECTED]
    _, out, _ = run(capfd, "classify", classifier, *TEXTS, "--all")
    assert [line.split()[0] for line in out.splitlines()] == labels
    assert all(name in out for name in LABELS)
    _, out, _ = run(capfd, "classify", classifier, "dog", "--pair-with", "a b", "--json")
    row = reference([1, 3, 4, 2, 6, 2], [0, 0, 0, 0, 1, 1])[0]
    assert json.loads(out)["classes"][0]["label"] == LABELS[row.argmax()]


def test_classify_labels_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    facts = encoder_facts(kind="tokens", output="states", labels=LABELS)
    tagger = write_encoder(tmp_path / "tagger.so", facts)
    status, out, _ = run(capfd, "classify", tagger, "a dog")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["a", "a", "dog"]
    status, out, err = run(capfd, "classify", tagger, "a dog", "--pair-with", "b")
    assert (status, out) == (1, "") and "labels tokens" in err


WRONG = {
    "run": (("run", "encoder", "a"), "`llmc run` is not for", "makes embeddings: use `llmc embed "),
    "chat": (("chat", "classifier"), "`llmc chat` is not for", "classifies texts: use `llmc classify "),
    "eval": (("eval", "encoder", "--text", "lines"), "`llmc eval` is not for", "use `llmc embed "),
    "embed": (("embed", "classifier", "a"), "`llmc embed` is not for", "use `llmc classify "),
    "classify": (("classify", "arrays", "a"), "takes arrays", "use Runtime.run({name: array}) in Python"),
    "run arrays": (("run", "arrays", "a"), "takes arrays", "use Runtime.run({name: array}) in Python"),
    "no texts": (("embed", "encoder"), "no texts: give them as arguments", "--file"),
    "prompt": (("embed", "encoder", "a", "--prompt", "x"), "has no prompt 'x'", "it has 'query'"),
    "output": (
        ("embed", "encoder", "a", "-o", "missing/x.npy"),
        "cannot write missing/x.npy",
        "no folder missing",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line(
    name: str, encoder: Path, classifier: Path, arrays: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines").write_text("a dog\n")
    known = {"encoder": encoder, "classifier": classifier, "arrays": arrays, "lines": tmp_path / "lines"}
    arguments, *parts = WRONG[name]
    status, out, err = run(capfd, *(known.get(str(argument), argument) for argument in arguments))
    assert status == 1 and out == ""
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err


def test_bench_of_an_encoder(encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "bench", encoder, "--prompt-tokens", 30, "--batch", 7, "--repeats", 2, "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["texts"], found["least_tokens"], found["most_tokens"]) == (7, 16, 30)
    assert found["tokens"] == 7 * 23
    assert found["tokens_per_second"] == pytest.approx(23 * found["texts_per_second"])
    status, out, _ = run(capfd, "bench", encoder, "--prompt-tokens", 5, "--batch", 1, "--repeats", 1)
    assert status == 0 and "1 of 5 to 5 tokens" in out


def test_bench_of_arrays(arrays: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "bench", arrays, "--dim", "n=3", "--repeats", 2, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["sizes"] == {"m": 40, "n": 3}
    assert 0 < found["least_seconds"] <= found["seconds"] and found["calls"] >= 2


BENCH_WRONG = {
    "gen": (("encoder", "--gen-tokens", 3), "--gen-tokens means nothing for"),
    "dim of text": (("encoder", "--dim", "n=3"), "it takes --prompt-tokens, --batch"),
    "batch of arrays": (("arrays", "--batch", 3), "it takes --dim"),
    "no such size": (("arrays", "--dim", "k=3"), "has no size k; it has m, n"),
    "too large": (("arrays", "--dim", "n=9"), "n is 1 to 8 in"),
    "no number": (("arrays", "--dim", "n"), "--dim is NAME=N"),
    "too long": (("encoder", "--prompt-tokens", 41), "41 tokens are more than the 40"),
    "none": (("encoder", "--batch", 0), "--batch must be 1 or more"),
}


@pytest.mark.parametrize("name", BENCH_WRONG)
def test_what_bench_refuses(name: str, encoder: Path, arrays: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (which, *options), message = BENCH_WRONG[name]
    status, out, err = run(capfd, "bench", {"encoder": encoder, "arrays": arrays}[str(which)], *options)
    assert status == 1 and out == "" and message in err and len(err.splitlines()) == 1


def test_inspect_says_what_they_are_for(
    encoder: Path, classifier: Path, arrays: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path, parts in (
        (encoder, ("embed", "embedding float32 [B, 3]", "40 tokens at most", "query")),
        (classifier, ("no, maybe, yes",)),
        (arrays, ("half bfloat16 [n, 3]", "m 0 to 40, n 1 to 8")),
    ):
        status, out, _ = run(capfd, "inspect", path)
        assert status == 0 and "KV cache" not in out
        for part in parts:
            assert part in out
