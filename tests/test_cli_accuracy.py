"""inspect --accuracy and eval --compare, on artifacts that say what is expected."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fake_artifact
import numpy as np
import pytest

from llmc.cli import run as run_command
from llmc.cli.accuracy_picture import accuracy_figure, place_of
from llmc.errors import ArtifactError
from llmc.runtime.accuracy import Accuracy, TensorAccuracy, TextAccuracy, VectorAccuracy, parse_accuracy
from llmc.runtime.json_reader import Reader
from llmc.runtime.perplexity import evaluate_all, windows_of
from llmc.runtime.runtime import Runtime

TENSORS = [
    {"name": f"model.layers.{layer}.{kind}.weight", "encoding": encoding, "bits": bits, "numbers": 1000 * (layer + 1),
     "weight_error": 1e-2 * (layer + 1), "output_error": error}
    for layer in range(12)
    for kind, encoding, bits, error in (("self_attn.q_proj", "t4g64", 4.25, 1e-4 * (layer + 1)),
                                        ("mlp.down_proj", "t6g64", 6.25, 1e-5))
]  # fmt: skip
TABLE = {"name": "model.embed_tokens.weight", "encoding": "t6g64", "bits": 6.25, "numbers": 5000, "weight_error": 1e-3}
TEXT = {"texts": 4, "tokens": 508, "source": "written", "through": "artifact", "mean_kl_divergence": 0.0069,
        "top1_agreement": 0.9528}  # fmt: skip
VECTORS = {"output": "embedding", "texts": 64, "tokens": 1024, "rows": 64, "through": "graph", "mean_cosine": 0.9931,
           "least_cosine": 0.981}  # fmt: skip
TOLD = {"tensors": [TABLE, *TENSORS], "text": TEXT, "vectors": None}


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = run_command([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_artifact.write(tmp_path_factory.mktemp("told") / "fake.so", accuracy=TOLD)


def test_the_runtime_reads_what_was_measured(artifact: Path) -> None:
    found = Runtime.load(artifact, 1).manifest.accuracy
    assert found is not None
    assert found.text == TextAccuracy(4, 508, "written", "artifact", 0.0069, 0.9528)
    assert found.vectors is None
    assert found.tensors[0] == TensorAccuracy("model.embed_tokens.weight", "t6g64", 6.25, 5000, 1e-3, None)
    assert len(found.tensors) == 25
    assert parse_accuracy(Reader({"vectors": VECTORS}, "accuracy")).vectors == VectorAccuracy(**VECTORS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ([], "accuracy"),
        ({"tensors": 3}, "accuracy.tensors"),
        ({"tensors": [{**TABLE, "weight_error": -1}]}, r"accuracy.tensors\[0\].weight_error"),
        ({"tensors": [{**TABLE, "output_error": "low"}]}, r"accuracy.tensors\[0\].output_error"),
        ({"tensors": [{**TABLE, "numbers": 1.5}]}, r"accuracy.tensors\[0\].numbers"),
        ({"text": {**TEXT, "top1_agreement": 1.5}}, "accuracy.text.top1_agreement"),
        ({"text": {**TEXT, "source": "stolen"}}, "accuracy.text.source"),
        ({"text": {**TEXT, "tokens": 0}}, "accuracy.text.tokens"),
        ({"vectors": {**VECTORS, "mean_cosine": 2}}, "accuracy.vectors.mean_cosine"),
        ({"vectors": {**VECTORS, "through": None}}, "accuracy.vectors.through"),
    ],
)
def test_wrong_figures_are_refused_by_name(told: object, named: str, tmp_path: Path) -> None:
    path = fake_artifact.write(tmp_path / "wrong.so", accuracy=told)
    with pytest.raises(ArtifactError, match=named):
        Runtime.load(path, 1)


def test_inspect_lists_the_worst_first(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "inspect", artifact, "--accuracy")
    assert (status, err) == (0, "")
    assert "KL 0.0069 nats, the same likeliest token 95.3%" in out
    assert "508 tokens that it wrote itself" in out
    assert re.search(r"t4g64 +12 +78,000 +4.25 +8.33e-02 +8.33e-04\n", out)
    assert re.search(r"all +25 +161,000 ", out)
    names = re.findall(r"^model\.\S+", out, re.MULTILINE)
    assert names[:2] == [f"model.layers.{n}.self_attn.q_proj.weight" for n in (11, 10)]
    assert names[2] == "model.embed_tokens.weight"  # nothing multiplies by it: its own error counts
    assert len(names) == 20
    assert "and 5 more" in out
    status, out, _ = run(capfd, "inspect", artifact, "--accuracy", "--json")
    found = json.loads(out)
    assert (found["text"], found["vectors"], len(found["tensors"])) == (TEXT, None, 25)


def test_encoders_and_graphs_are_told_in_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fake_artifact.write(tmp_path / "fake.so", accuracy={"tensors": [], "vectors": VECTORS})
    status, out, _ = run(capfd, "inspect", tmp_path / "fake.so", "--accuracy")
    assert status == 0
    assert "cosine 0.9931 on average, 0.9810 at least, of embedding" in out
    assert "64 texts of random ids, 1024 in all, through its graph in numpy" in out
    status, _, err = run(capfd, "inspect", tmp_path / "fake.so", "--picture", tmp_path / "none.png")
    assert status == 1
    assert "nothing to draw" in err


def test_without_figures_it_says_how_to_get_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "inspect", fake_artifact.write(tmp_path / "old.so"), "--accuracy")
    assert (status, out) == (1, "")
    assert "compile it again with --accuracy" in err


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("self_attn.q_proj", 3)),
        ("transformer.h.11.mlp.c_fc.weight", ("mlp.c_fc", 11)),
        ("model.layers.0.experts.5.w1.weight", ("experts.*.w1", 0)),
        ("model.embed_tokens.weight", ("model.embed_tokens", None)),
        ("conv2d.weight", ("conv2d", None)),
        ("onnx::MatMul_214", ("onnx::MatMul_*", None)),
        ("7", ("*", 7)),
    ],
)
def test_kinds_and_layers_of_names(name: str, place: tuple[str, int | None]) -> None:
    assert place_of(name) == place


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures(suffix: str, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"errors.{suffix}"
    assert run(capfd, "inspect", artifact, "--picture", path)[0] == 0
    assert path.stat().st_size > 1000
    status, _, err = run(capfd, "inspect", artifact, "--picture", tmp_path / "errors.gif")
    assert status == 1
    assert ".png, .svg, .pdf" in err


def test_a_picture_has_a_cell_for_each_matrix() -> None:
    pytest.importorskip("matplotlib")
    told = parse_accuracy(Reader(TOLD, "accuracy"))
    figure = accuracy_figure(told, "title")
    outputs, weights = (axes for axes in figure.axes if axes.get_xlabel() == "layer")
    assert [len(axes.texts) for axes in (outputs, weights)] == [24, 25]
    assert {text.get_text() for text in weights.texts} == {"4", "6"}
    kinds = [label.get_text() for label in weights.get_yticklabels()]
    assert kinds == ["model.embed_tokens", "self_attn.q_proj", "mlp.down_proj"]
    figure.canvas.draw()
    box = figure.bbox
    for axes in (outputs, weights):
        for label in (*axes.get_yticklabels(), axes.title):
            extent = label.get_window_extent()
            assert box.x0 <= extent.x0 and extent.x1 <= box.x1
    many = Accuracy(tuple(TensorAccuracy(f"l.{n}.x.weight", "q8g64", 8.25, 1, 1e-4, None) for n in range(100)))
    (only,) = (axes for axes in accuracy_figure(many, "t").axes if axes.get_xlabel() == "layer")
    assert not only.texts  # no room for them


# eval --compare

SHARP = fake_artifact.STEP.replace(">> 48", ">> 60")  # logits of 0..15
DULL = fake_artifact.STEP.replace(">> 48", ">> 62")  # of 0..3


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    return fake_artifact.write(folder / "sharp.so", SHARP), fake_artifact.write(folder / "dull.so", DULL)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a text that is cut into windows, again and again. " * 4)
    return path


def test_artifacts_are_ranked_by_perplexity(
    two: tuple[Path, Path], text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whichever comes first, and as each is measured alone."""
    for order in (two, two[::-1]):
        status, out, _ = run(capfd, "eval", "--compare", *order, "--text", text, "--window", 16, "--json")
        assert status == 0
        found = json.loads(out)["artifacts"]
        assert [Path(item["artifact"]).name for item in found] == ["dull.so", "sharp.so"]
        for item in found:
            _, alone, _ = run(capfd, "eval", item["artifact"], "--text", text, "--window", 16, "--json")
            assert json.loads(alone)["perplexity"] == item["perplexity"]
            assert item["file_bytes"] == Path(item["artifact"]).stat().st_size
            assert item["bits_per_weight"] == 8.0
    status, out, _ = run(capfd, "eval", "--compare", *two, "--text", text, "--window", 16)
    lines = out.splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in lines[:3]] == ["artifact", "dull.so", "sharp.so"]
    assert "KL" not in lines[0]


def test_with_a_reference_the_nearest_comes_first(two: tuple[Path, Path], text: Path) -> None:
    """The reference is one of them: it has no divergence from itself, and runs once a window."""
    sharp, dull = (Runtime.load(path, 1) for path in two)
    windows = windows_of(sharp, text.read_text(), 16)
    calls: list[int] = []

    def reference(ids: np.ndarray) -> np.ndarray:
        calls.append(len(ids))
        return sharp.forward(ids)

    found = evaluate_all([dull, sharp], windows, reference)
    assert len(calls) == len(windows)
    assert found[1].mean_kl_divergence == pytest.approx(0, abs=1e-9)
    assert found[1].top1_agreement == 1
    assert found[0].mean_kl_divergence is not None and found[0].mean_kl_divergence > 0.1
    assert found[0].reference_perplexity == found[1].reference_perplexity == found[1].perplexity


def test_what_cannot_be_compared_is_refused(
    two: tuple[Path, Path], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = fake_artifact.byte_tokenizer().replace(b'"et":', b'"e~":', 1)
    facts = {**dict(fake_artifact.manifest()["tokenizer"]), "bos_id": 7}  # type: ignore[call-overload]
    for name, changes in (("tokens", {"tokenizer": other}), ("bos", {"tokenizer_facts": facts})):
        path = fake_artifact.write(tmp_path / f"{name}.so", SHARP, **changes)
        status, _, err = run(capfd, "eval", "--compare", two[0], path, "--text", text, "--window", 16)
        assert status == 1
        assert "cannot be compared: their tokenizers differ" in err
        assert name in err
    step = {**dict(fake_artifact.manifest()["step"]), "vocab_size": 299}  # type: ignore[call-overload]
    path = fake_artifact.write(tmp_path / "fewer.so", SHARP, step=step)
    status, _, err = run(capfd, "eval", "--compare", two[0], path, "--text", text, "--window", 16)
    assert status == 1
    assert "vocabularies of 300 and 299 tokens" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("FIRST", "SECOND", "--text", "TEXT"), "--compare"),
        (("--compare", "FIRST", "--text", "TEXT"), "two or more"),
        (("FIRST",), "--text"),
        (("--compare", "FIRST", "SECOND"), "--reference"),
    ],
)
def test_options_that_do_not_fit(
    arguments: tuple[str, ...], said: str, two: tuple[Path, Path], text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"FIRST": two[0], "SECOND": two[1], "TEXT": text}
    status, _, err = run(capfd, "eval", *(given.get(item, item) for item in arguments))
    assert status == 1
    assert said in err
