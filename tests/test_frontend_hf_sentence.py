"""sentence-transformers directories, saved by that library: graphs give its embeddings, facts are its settings."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import cache
from pathlib import Path

import hf_models
import numpy as np
import pytest
import sentence_transformers
import tokenizers
import torch
from tiny_encoders import make_encoder, make_sentence, write_encoder_tokenizer

from llmc.api import _as_source
from llmc.artifact_cache import model_hash
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.compiler.ir.verify import verify
from llmc.errors import FrontendError
from llmc.frontends.hf.lift import lift
from llmc.frontends.hf.pooling import MODES
from llmc.frontends.hf.sentence import read_sentence
from llmc.frontends.hf.source import is_below, module_paths
from llmc.frontends.lifted import ENCODE, Lifted
from llmc.frontends.onnx.encoder import _truncated

Array = np.ndarray
TOLERANCE = 2e-5  # two f32 evaluations of values of size about 1
TEXTS = (
    "A cat sat on the mat.",
    "",
    "Paris",
    "naïve — 日本語 🙂 Ünïcödé",
    "THE QUICK BROWN FOX jumps over the lazy dog " * 3,
    "words without end " * 90,
)

_ORDINARY = "the cat sat on a mat ; how are you in Paris , naïve 日本語 🙂 x=1; don't U.S. 1000 é [MASK] <s>"
WORDS = [*_ORDINARY.split(), "\t", ""]


@cache
def sentence(family: str, pooling: str | tuple[str, ...] = "mean", modules: str = "") -> Path:
    name = f"sentence-{family}-{'-'.join([pooling] if isinstance(pooling, str) else pooling)}-{modules}"
    return make_sentence(family, hf_models._root / name, pooling, modules=modules)


def tokens_of(lifted: Lifted, text: str) -> dict[str, Array]:
    """A text as the graph's inputs, cut to the most tokens that the facts allow, special ones kept."""
    assert lifted.encoder is not None
    tokenizer = tokenizers.Tokenizer.from_buffer(lifted.text.files["tokenizer.json"])
    most = lifted.encoder["max_tokens"]
    assert isinstance(most, int)
    tokenizer.enable_truncation(most)
    encoding = tokenizer.encode(text)
    found = {"ids": encoding.ids, "positions": range(len(encoding.ids)), "token_types": encoding.type_ids}
    return {value.name: np.array([found[value.name]], np.int32) for value in lifted.graph.inputs}


def embeddings(lifted: Lifted, texts: tuple[str, ...]) -> Array:
    """[texts, features] from the graph's numpy meaning."""
    rows = [evaluate(lifted.graph, tokens_of(lifted, text), lifted.load)["embedding"] for text in texts]
    return np.concatenate(rows)


def expected(directory: Path, texts: tuple[str, ...], **options: object) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
        found: Array = model.encode(list(texts), **options)
    return found


@pytest.mark.parametrize(
    ("family", "pooling", "modules"),
    [
        ("bert", "mean", "N"),
        ("bert", "cls", ""),
        ("bert", "max", "DN"),
        ("bert", ("cls", "mean"), "LD"),
        ("bert", tuple(MODES), ""),
        ("mpnet", "mean", "N"),
        ("roberta", "cls", "N"),
        ("modernbert", "mean_sqrt_len_tokens", ""),
    ],
)
def test_embeddings_are_the_librarys(family: str, pooling: str | tuple[str, ...], modules: str) -> None:
    directory = sentence(family, pooling, modules)
    lifted = lift(directory)
    verify(lifted.graph)
    assert lifted.task == ENCODE
    assert [name for name, _ in lifted.graph.outputs] == ["embedding"]
    found, wanted = embeddings(lifted, TEXTS), expected(directory, TEXTS)
    # Embeddings that are sums over tokens are larger than 1.
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * max(1.0, float(np.abs(wanted).max())))
    assert wanted.std(axis=0).max() > 0.01  # texts differ
    assert lifted.encoder is not None and lifted.encoder["normalized"] is modules.endswith("N")


def test_facts_are_the_directorys_settings(tmp_path: Path) -> None:
    prompts = {"query": "query: ", "document": "passage: "}
    directory = make_sentence(
        "bert", tmp_path / "m", modules="N", prompts=prompts, default_prompt_name="query", max_seq_length=48
    )
    assert lift(directory).encoder == {
        "kind": "embedding",
        "output": "embedding",
        "labels": None,
        "multi_label": False,
        "plain_scores": False,
        "max_tokens": 48,
        "prompts": prompts,
        "default_prompt": "query",
        "normalized": True,
    }
    assert lift(directory, max_context=20).encoder["max_tokens"] == 20  # type: ignore[index]


@pytest.mark.parametrize("spelling", ["max_seq_length", "model_max_length"])
def test_the_most_tokens_are_the_librarys(tmp_path: Path, spelling: str) -> None:
    """In whichever file they stand; a text is cut before its last special token."""
    directory = copied(sentence("bert"), tmp_path)
    file = {"max_seq_length": "sentence_bert_config.json", "model_max_length": "tokenizer_config.json"}[spelling]
    change(directory / file, **{spelling: 21})
    lifted = lift(directory)
    assert lifted.encoder is not None and lifted.encoder["max_tokens"] == 21
    np.testing.assert_allclose(embeddings(lifted, TEXTS), expected(directory, TEXTS), atol=TOLERANCE)


# Where a limit of 21 tokens may stand besides: (file, what it says), in order.
_LIMITS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "arguments of old": [("sentence_bert_config.json", {"tokenizer_args": {"model_max_length": 21}})],
    "arguments first": [
        ("sentence_bert_config.json", {"max_seq_length": 9, "processor_kwargs": {"model_max_length": 21}})
    ],
    "a name of old": [("sentence_xlnet_config.json", {"max_seq_length": 21})],
    "the first file that says something": [
        ("sentence_bert_config.json", {}), ("sentence_roberta_config.json", {"max_seq_length": 21}),
        ("sentence_albert_config.json", {"max_seq_length": 9}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", _LIMITS)
def test_the_most_tokens_stand_where_the_library_reads_them(case: str, tmp_path: Path) -> None:
    (copied(sentence("bert"), tmp_path) / "sentence_bert_config.json").unlink()
    for file, content in _LIMITS[case]:
        (tmp_path / file).write_text(json.dumps(content))
    found = read_sentence(tmp_path)
    assert found is not None and found.max_tokens == 21
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert model.max_seq_length == 21


def test_embeddings_are_cut_to_the_librarys_size(tmp_path: Path) -> None:
    """`truncate_dim`: after all modules, so that what was normalized no longer has length 1."""
    directory = copied(sentence("bert", "max", "DN"), tmp_path)
    change(directory / "config_sentence_transformers.json", truncate_dim=16)
    lifted = lift(directory)
    found = embeddings(lifted, TEXTS)
    assert found.shape == (len(TEXTS), 16) and lifted.encoder is not None and lifted.encoder["normalized"] is False
    np.testing.assert_allclose(found, expected(directory, TEXTS), atol=TOLERANCE)
    sentence_of = read_sentence(directory)
    assert sentence_of is not None
    embedding = Input("embedding", Tensor((1, 24), "f32"))
    graph = _truncated(Graph("encoder", (embedding,), (("embedding", embedding),)), "embedding", sentence_of)
    assert graph.output("embedding").shape == (1, 16)  # of an ONNX file with the modules in it


def test_an_adapter_beside_a_base_model_in_a_folder_is_refused(tmp_path: Path) -> None:
    """The library would load it."""
    directory = copied(sentence("bert"), tmp_path)
    (directory / "0_Transformer").mkdir()
    entries = json.loads((directory / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (directory / "modules.json").write_text(json.dumps(entries))
    (directory / "0_Transformer" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "a LORA adapter" in refusal(directory)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "bpe", "unigram"])
def test_tokens_are_those_of_the_library(kind: str, tmp_path: Path) -> None:
    directory = make_encoder("bert", tmp_path / "m")
    write_encoder_tokenizer(directory, kind)
    lifted = lift(directory)
    transformer = sentence_transformers.sentence_transformer.modules.Transformer(str(directory))
    for text in [*TEXTS, *sentences(200)]:
        wanted = transformer.preprocess([text])["input_ids"][0].tolist()
        assert tokens_of(lifted, text)["ids"][0].tolist() == wanted


def test_a_vocabulary_alone_becomes_a_tokenizer(tmp_path: Path) -> None:
    """vocab.txt, as BERT's first checkpoints have it."""
    directory = make_encoder("bert", tmp_path / "m")
    words = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    lifted = lift(directory)
    transformer = sentence_transformers.sentence_transformer.modules.Transformer(str(directory))
    for text in TEXTS:
        given = tokens_of(lifted, text)
        wanted = transformer.preprocess([text])
        assert given["ids"][0].tolist() == wanted["input_ids"][0].tolist()
    assert lifted.text.facts is not None and lifted.text.facts["token_types"] == 2


def test_letters_are_made_small_where_the_settings_say_so(tmp_path: Path) -> None:
    directory = copied(sentence("roberta", "cls", "N"), tmp_path)
    before = lift(directory)
    change(directory / "sentence_bert_config.json", do_lower_case=1)  # whatever Python takes for true
    after = lift(directory)
    assert tokens_of(before, "CAT").keys() == tokens_of(after, "CAT").keys()
    assert tokens_of(after, "CAT")["ids"].tolist() == tokens_of(before, "cat")["ids"].tolist()
    assert tokens_of(after, "CAT")["ids"].tolist() != tokens_of(before, "CAT")["ids"].tolist()


def test_the_base_model_may_lie_in_a_folder(tmp_path: Path) -> None:
    """As the library's first versions wrote it; their poolings are flags."""
    new = sentence("bert", ("cls", "mean"))
    (tmp_path / "0_Transformer").mkdir()
    for path in new.iterdir():
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.copy(path, tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    flags = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    library = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": f"{library}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{library}.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    texts = TEXTS[:3]
    np.testing.assert_allclose(embeddings(lift(tmp_path), texts), expected(tmp_path, texts), atol=TOLERANCE)
    assert module_paths(tmp_path / "modules.json") == ["0_Transformer", "1_Pooling"]


def test_a_decoder_with_last_token_pooling(tmp_path: Path) -> None:
    """A causal base model is an encoder here."""
    directory = copied(sentence("bert", "lasttoken"), tmp_path)
    decoder = hf_models.tiny("llama")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(decoder / name, directory)
    change(directory / "tokenizer_config.json", pad_token="<s>", model_max_length=100)
    lifted = lift(directory)
    assert lifted.task == ENCODE
    texts = ("def greet(name):", "class Point", "x" * 50)
    found, wanted = embeddings(lifted, texts), expected(directory, texts)
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # values of size 4


def test_a_cross_encoder_is_a_classifier_of_pairs(tmp_path: Path) -> None:
    base = make_encoder("bert", tmp_path / "base", "SequenceClassification", num_labels=1)
    directory = tmp_path / "m"
    sentence_transformers.CrossEncoder(str(base)).save(str(directory))
    lifted = lift(directory)
    assert lifted.encoder is not None
    facts = {name: lifted.encoder[name] for name in ("kind", "output", "labels", "multi_label")}
    assert facts == {
        "kind": "classification", "output": "logits", "labels": ["LABEL_0"], "multi_label": True,
    }  # fmt: skip
    change(directory / "config_sentence_transformers.json", activation_fn="torch.nn.modules.linear.Identity")
    again = lift(directory).encoder
    assert again is not None and again["multi_label"] is False


def test_prompts_that_pooling_leaves_out(tmp_path: Path) -> None:
    prompts = {"query": "query: "}
    directory = make_sentence("bert", tmp_path / "m", prompts=prompts, include_prompt=False)
    lifted = lift(directory)
    assert lifted.encoder is not None and lifted.encoder["prompts"] == {}
    assert any("prompts are left out" in note for note in lifted.notes)
    change(directory / "config_sentence_transformers.json", default_prompt_name="query")
    assert "include_prompt" in refusal(directory)


def test_random_weights_reach_the_modules() -> None:
    lifted = lift(sentence("bert", "max", "DN"), weights="random")
    assert "2_Dense.linear.weight" in {param.name for param in lifted.graph.params}
    assert np.isfinite(embeddings(lifted, TEXTS[:2])).all()


def test_the_cache_and_copies_have_the_modules_too(tmp_path: Path) -> None:
    """Another pooling is another artifact; a model with another tokenizer keeps its modules."""
    directory = copied(sentence("bert", "max", "DN"), tmp_path / "m")
    before = model_hash(directory)
    change(directory / "1_Pooling" / "config.json", pooling_mode="cls")
    assert model_hash(directory) != before
    (tmp_path / "scratch").mkdir()
    copy = Path(_as_source(directory, sentence("bert"), tmp_path / "scratch"))
    assert lift(copy).encoder == lift(directory).encoder


def module(kind: str, path: str = "1_Pooling") -> list[dict[str, object]]:
    transformer = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    return [transformer, {"idx": 1, "name": "1", "path": path, "type": kind}]


LIBRARY = "sentence_transformers.models."
HOSTILE: dict[str, tuple[object, str]] = {
    "own code": (module("custom_st.Transformer"), "'custom_st.Transformer' is the model's own code"),
    "code of the library's name": (module("sentence_transformers_evil.Pooling"), "own code"),
    "a module that is not known": (module(f"{LIBRARY}CNN"), "'CNN' is not supported"),
    "static": ([{"path": "", "type": f"{LIBRARY}StaticEmbedding"}], "'StaticEmbedding', which is not supported"),
    "pictures": ([{"path": "", "type": f"{LIBRARY}CLIPModel"}], "'CLIPModel', which is not supported"),
    "above": (module(f"{LIBRARY}Pooling", "../elsewhere"), "leaves the model's directory"),
    "absolute": (module(f"{LIBRARY}Pooling", "/etc"), "leaves the model's directory"),
    "of another system": (module(f"{LIBRARY}Pooling", "C:\\pooling"), "leaves the model's directory"),
    "missing": (module(f"{LIBRARY}Pooling", "nowhere"), "is missing"),
    "no pooling": (module(f"{LIBRARY}Normalize"), "no Pooling"),
    "an object": ({}, "JSON list"),
    "empty": ([], "1 to 64 modules"),
    "no types": ([{"path": ""}], "needs a type and a path"),
    "endless": ([module(f"{LIBRARY}Pooling")[0]] * 65, "1 to 64 modules"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_list_of_modules_is_refused(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    directory = copied(sentence("bert", "max", "DN"), tmp_path)
    (directory / "modules.json").write_text(json.dumps(content))
    assert message in refusal(directory)


SETTINGS: dict[str, tuple[str, dict[str, object], str]] = {
    "mode": ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling mode ['median']"),
    "activation": ("2_Dense/config.json", {"activation_function": "os.system"}, "activation 'os.system'"),
    "unknown activation": ("2_Dense/config.json", {"activation_function": "torch.nn.Hardshrink"}, "Hardshrink"),
    "features": ("2_Dense/config.json", {"in_features": 10**12}, "no number of features"),
    "weights": ("2_Dense/config.json", {"out_features": 25}, "its config wants [25, 64]"),
    "width": ("1_Pooling/config.json", {"pooling_mode": ["cls", "max"]}, "does not fit"),
    "feature": ("3_Normalize/config.json", {"module_input_name": "pixels"}, "works on 'pixels'"),
    "length": ("sentence_bert_config.json", {"max_seq_length": "long"}, "no number of tokens"),
    "task": ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "transformer_task"),
    "settings": ("sentence_bert_config.json", {"config_args": {"num_hidden_layers": 1}}, "config_args"),
    "settings of tokenizers": (
        "sentence_bert_config.json", {"tokenizer_args": {"truncation_side": "left"}}, "tokenizer_args (truncation_s",
    ),
    "settings of models": ("sentence_bert_config.json", {"model_args": {"num_hidden_layers": 1}}, "model_args (num_h"),
    "another tokenizer": ("sentence_bert_config.json", {"tokenizer_name_or_path": "/x"}, "tokenizer_name_or_path '/x'"),
    "another output": (
        "sentence_bert_config.json", {"module_output_name": "sentence_embedding"}, "module_output_name 'sentence_e",
    ),
    "weights without a place": ("2_Dense/config.json", {"bias": False}, "no place for the weights 2_Dense.linear.bias"),
    "no features left": ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim is 0"),
    "prompts": ("config_sentence_transformers.json", {"prompts": {"query": 7}}, "prompts must be texts"),
    "default": ("config_sentence_transformers.json", {"default_prompt_name": "nothing"}, "none of its prompts"),
    "scores": ("config_sentence_transformers.json", {"activation_fn": "os.system"}, "activation 'os.system'"),
    "kind": ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "'SparseEncoder' are not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_supported_are_refused(case: str, tmp_path: Path) -> None:
    file, settings, message = SETTINGS[case]
    directory = copied(sentence("bert", "max", "DN"), tmp_path)
    change(directory / file, **settings)
    assert message in refusal(directory)


@pytest.mark.parametrize("link", ["1_Pooling", "2_Dense/model.safetensors"])
def test_links_out_of_the_directory_are_refused(link: str, tmp_path: Path) -> None:
    directory = copied(sentence("bert", "max", "DN"), tmp_path / "m")
    (directory / link).rename(tmp_path / "outside")
    (directory / link).symlink_to(tmp_path / "outside")
    assert "outside the model's directory" in refusal(directory)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = copied(sentence("bert", "max", "DN"), tmp_path)
    path = directory / "2_Dense" / "model.safetensors"
    weights = load_file(path)
    weights["linear.weight"][0, 0] = torch.nan
    save_file(weights, path)
    lifted = lift(directory)
    with pytest.raises(FrontendError, match=r"2_Dense\.linear\.weight holds NaN"):
        lifted.load("2_Dense.linear.weight")


@pytest.mark.parametrize(
    ("path", "good"),
    [("1_Pooling", True), ("a/b", True), ("", False), ("..", False), ("a/../../b", False), ("/a", False), ("*", False)],
)
def test_paths_below(path: str, good: bool) -> None:
    assert is_below(path) is good


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refusal(directory: Path) -> str:
    with pytest.raises(FrontendError) as caught:
        lift(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def sentences(count: int) -> list[str]:
    """Texts of 1 to 60 words, ordinary and odd ones."""
    random = np.random.default_rng(3)
    return [" ".join(random.choice(WORDS, 1 + int(random.integers(60)))) for _ in range(count)]
