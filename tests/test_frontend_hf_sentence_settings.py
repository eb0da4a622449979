"""What is read of the JSON files of a sentence-transformers directory, without a model in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmc.errors import FrontendError
from llmc.frontends.hf.pooling import Normalize, Pooling, Truncate
from llmc.frontends.hf.sentence import Sentence, activation_of_scores, read_sentence

LIBRARY = "sentence_transformers.models."
FILES = (
    "sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json",
    "sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)  # fmt: skip


def written(
    directory: Path,
    base: dict[str, object] | None = None,
    modules: tuple[str, ...] = ("Pooling",),
    pooling: dict[str, object] | None = None,
    **settings: object,
) -> Path:
    """A directory. base: the Transformer's own settings. modules: behind it, by their class names."""
    kinds = ("Transformer", *modules)
    entries = [
        {"type": LIBRARY + kind, "path": f"{number}_{kind}" if number else ""} for number, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(entries))
    (directory / "config.json").write_text("{}")
    (directory / "sentence_bert_config.json").write_text(json.dumps(base or {}))
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings))
    for number, kind in enumerate(modules, 1):
        (directory / f"{number}_{kind}").mkdir(exist_ok=True)
        content = (pooling or {}) if kind == "Pooling" else {}
        (directory / f"{number}_{kind}" / "config.json").write_text(json.dumps(content))
    return directory


def read(directory: Path) -> Sentence:
    found = read_sentence(directory)
    assert found is not None
    return found


def refusal(directory: Path) -> str:
    with pytest.raises(FrontendError) as caught:
        read_sentence(directory)
    return str(caught.value)


def test_a_directory_without_modules_is_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_sentence(tmp_path) is None


def test_the_least_that_a_directory_says(tmp_path: Path) -> None:
    (written(tmp_path, modules=("Pooling", "Dropout", "Normalize")) / "config_sentence_transformers.json").unlink()
    found = read(tmp_path)
    assert [type(module) for module in found.modules] == [Pooling, Normalize]
    assert [module.name for module in found.modules] == ["1_Pooling", "3_Normalize"]
    assert found == Sentence(tmp_path, found.modules, "feature-extraction", None, False, {}, None)


# The list of modules.


def listed(directory: Path, entries: object) -> str:
    (written(directory) / "modules.json").write_text(json.dumps(entries))
    return refusal(directory)


TRANSFORMER, POOLING = (
    {"type": f"{LIBRARY}{kind}", "path": path} for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "must be a list of 1 to 64 modules"),
        ([TRANSFORMER, *[POOLING] * 64], "must be a list of 1 to 64 modules"),
        ([TRANSFORMER, "Pooling"], "each module needs a type and a path"),
        ([TRANSFORMER, {"type": 7, "path": ""}], "each module needs a type and a path"),
        ([TRANSFORMER, {"type": POOLING["type"]}], "each module needs a type and a path"),
        ([{"type": "own.Transformer", "path": ""}], "'own.Transformer' is the model's own code"),
        ([{**TRANSFORMER, "path": "../other"}], "the path '../other' leaves the model's directory"),
        ([POOLING, TRANSFORMER], "the first module is 'Pooling', which is not supported"),
        ([TRANSFORMER, TRANSFORMER, POOLING], "'Transformer' is not supported; supported: Pooling"),
        ([{**TRANSFORMER, "path": "nowhere"}, POOLING], "the Transformer's directory 'nowhere' has no config.json"),
        ([TRANSFORMER], "no Pooling module"),
    ],
)  # fmt: skip
def test_lists_of_modules_that_are_refused(entries: object, message: str, tmp_path: Path) -> None:
    assert message in listed(tmp_path, entries)


def test_as_many_modules_as_there_may_be(tmp_path: Path) -> None:
    (written(tmp_path) / "modules.json").write_text(json.dumps([TRANSFORMER, *[POOLING] * 63]))
    assert len(read(tmp_path).modules) == 63


def test_a_directory_without_a_config_is_named_by_a_dot(tmp_path: Path) -> None:
    (written(tmp_path) / "config.json").unlink()
    assert "the Transformer's directory '.' has no config.json" in refusal(tmp_path)


def test_the_transformer_may_lie_below(tmp_path: Path) -> None:
    entries = [{**TRANSFORMER, "path": "0_Transformer"}, POOLING]
    (written(tmp_path, {"max_seq_length": 9}) / "modules.json").write_text(json.dumps(entries))
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "0_Transformer" / "config.json").write_text("{}")
    (tmp_path / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    found = read(tmp_path)
    assert (found.transformer, found.max_tokens) == (tmp_path / "0_Transformer", 7)
    (tmp_path / "0_Transformer" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "a LORA adapter" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["SparseEncoder", "MultiVectorEncoder", "", 7])
def test_models_of_other_types_are_refused(kind: object, tmp_path: Path) -> None:
    assert f"models of type {kind!r} are not supported" in refusal(written(tmp_path, model_type=kind))


# The settings of the Transformer.


@pytest.mark.parametrize("name", FILES)
def test_settings_stand_in_the_first_file_that_says_something(name: str, tmp_path: Path) -> None:
    """Those in front of it are empty, and those behind it say something else."""
    written(tmp_path)
    for file in FILES[FILES.index(name) :]:
        (tmp_path / file).write_text(json.dumps({"max_seq_length": 11 if file == name else 5, "do_lower_case": 1}))
    found = read(tmp_path)
    assert (found.max_tokens, found.lower_case) == (11, True)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, None), ({"max_seq_length": None}, None), ({"max_seq_length": 2}, 2),
        ({"max_seq_length": 1 << 28}, 1 << 28),
        ({"max_seq_length": 9, "tokenizer_args": {"model_max_length": 7}}, 7),
        ({"max_seq_length": 9, "processor_kwargs": {"model_max_length": 7}}, 7),
        ({"max_seq_length": 9, "processor_kwargs": {"model_max_length": None}}, 9),
        ({"tokenizer_args": {"use_fast": True}, "processor_kwargs": {"model_max_length": 7}}, 7),
    ],
)  # fmt: skip
def test_how_many_tokens_a_text_may_have(settings: dict[str, object], most: int | None, tmp_path: Path) -> None:
    assert read(written(tmp_path, settings)).max_tokens == most


@pytest.mark.parametrize("number", [1, 0, -1, True, 7.0, "7", (1 << 28) + 1])
def test_numbers_of_tokens_that_are_none_are_refused(number: object, tmp_path: Path) -> None:
    message = refusal(written(tmp_path, {"max_seq_length": number}))
    assert f"max_seq_length is {number!r}, which is no number of tokens" in message


OF_TOKENIZERS = {"use_fast": True, "padding_side": "left", "model_max_length": 9}
OF_MODELS = {
    "torch_dtype": "float16", "dtype": "float16", "attn_implementation": "sdpa", "device_map": "auto",
    "low_cpu_mem_usage": True, "use_safetensors": True, "add_pooling_layer": False, "ignore_mismatched_sizes": True,
}  # fmt: skip
HARMLESS: dict[str, dict[str, object]] = {
    "config_args": {}, "config_kwargs": {}, "processing_kwargs": {}, "tokenizer_args": OF_TOKENIZERS,
    "processor_kwargs": OF_TOKENIZERS, "model_args": OF_MODELS, "model_kwargs": OF_MODELS,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_arguments_without_effect_are_allowed_and_others_refused(name: str, tmp_path: Path) -> None:
    given = {**HARMLESS[name], "trust_remote_code": True}
    read(written(tmp_path, {name: given}))
    read(written(tmp_path, {name: None}))
    message = refusal(written(tmp_path, {name: {**given, "num_labels": 1, "hidden_size": 7}}))
    assert f"the Transformer module has {name} (hidden_size, num_labels), which is not supported" in message
    assert f"has {name} ({name}), which is" in refusal(written(tmp_path, {name: [1]}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_name_or_path": "other"}, "has tokenizer_name_or_path 'other'"),
        ({"module_output_name": "sentence_embedding"}, "has module_output_name 'sentence_embedding'"),
        ({"modality_config": []}, "takes texts in a way that is not supported: None"),
        ({"modality_config": {"image": {}}}, "takes texts in a way that is not supported: None"),
        ({"modality_config": {"text": "forward"}}, "takes texts in a way that is not supported: 'forward'"),
        (
            {"modality_config": {"text": {"method": "get_text_features", "method_output_name": "last_hidden_state"}}},
            "takes texts in a way that is not supported: {'method': 'get_text_features'",
        ),
        (
            {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
            "takes texts in a way that is not supported: {'method': 'forward'",
        ),
        (
            {"modality_config": {name: {"method": "forward", "method_output_name": "last_hidden_state"}
                                 for name in ("text", "message")}},
            "puts every text into the tokenizer's chat template",
        ),
        ({"transformer_task": "text-generation"}, "transformer_task 'text-generation' is not supported with these mod"),
        ({"transformer_task": "sequence-classification"}, "transformer_task 'sequence-classification' is not supp"),
    ],
)  # fmt: skip
def test_settings_that_change_the_model_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    assert message in refusal(written(tmp_path, settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_name_or_path": None, "module_output_name": None},
        {"module_output_name": "token_embeddings"},
        *({"modality_config": {"text": {"method": "forward", "method_output_name": output}}}
          for output in ("last_hidden_state", "logits")),
    ],
)  # fmt: skip
def test_settings_that_say_what_is_usual_are_allowed(settings: dict[str, object], tmp_path: Path) -> None:
    assert read(written(tmp_path, settings)).task == "feature-extraction"


@pytest.mark.parametrize("name", ["query_length", "document_length", "query_expansion"])
def test_lengths_of_queries_and_documents_are_named(name: str, tmp_path: Path) -> None:
    assert any(name in note for note in read(written(tmp_path, {name: 32})).notes)
    assert read(written(tmp_path, {name: None})).notes == ()


# Cutting, prompts and scores.


@pytest.mark.parametrize("most", [1, 1 << 30])
def test_embeddings_are_cut_last_of_all(most: int, tmp_path: Path) -> None:
    found = read(written(tmp_path, modules=("Pooling", "Normalize"), truncate_dim=most))
    last = found.modules[-1]
    assert len(found.modules) == 3 and isinstance(last, Truncate) and last.most == most and not found.normalized
    assert (last.reads, last.writes, last.weights()) == ("sentence_embedding", "sentence_embedding", None)


@pytest.mark.parametrize("most", [0, -1, True, 7.0, "7"])
def test_cuts_that_leave_nothing_are_refused(most: object, tmp_path: Path) -> None:
    assert f"truncate_dim is {most!r}, which is no number" in refusal(written(tmp_path, truncate_dim=most))


@pytest.mark.parametrize("default", [None, "query", "document"])
def test_prompts_by_name(default: str | None, tmp_path: Path) -> None:
    found = read(written(tmp_path, prompts={"query": "query: ", "document": None}, default_prompt_name=default))
    assert (found.prompts, found.default_prompt, found.notes) == ({"query": "query: ", "document": ""}, default, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ["query: "]}, "prompts must be texts by name"),
        ({"prompts": {"query": 7}}, "prompts must be texts by name"),
        (
            {"prompts": {"query": "query: "}, "default_prompt_name": "other"},
            "the default prompt 'other' is none of its",
        ),
        ({"prompts": {"7": "query: "}, "default_prompt_name": 7}, "the default prompt 7 is none of its prompts"),
        ({"default_prompt_name": "query"}, "the default prompt 'query' is none of its prompts"),
    ],
)
def test_prompts_that_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    assert message in refusal(written(tmp_path, **settings))


def scorer(directory: Path, **settings: object) -> Path:
    return written(directory, {"transformer_task": "sequence-classification"}, (), **settings)


@pytest.mark.parametrize("kind", ["pooling", "score"])
def test_prompts_that_cannot_be_followed_are_left_out_or_refused(kind: str, tmp_path: Path) -> None:
    """The library puts a cross encoder's default prompt before the first text of a pair."""

    def directory(**settings: object) -> Path:
        return (
            written(tmp_path, pooling={"include_prompt": False}, **settings)
            if kind == "pooling"
            else scorer(tmp_path, **settings)
        )

    why = {"pooling": "pooling would have to skip", "score": "scores are of texts as they are given"}[kind]
    prompts = {"query": "query: ", "document": ""}
    for default in (None, "document"):
        found = read(directory(prompts=prompts, default_prompt_name=default))
        assert (found.prompts, found.default_prompt) == ({}, None)
        (note,) = found.notes
        assert note.startswith(f"its prompts are left out: {why}")
    message = refusal(directory(prompts=prompts, default_prompt_name="query"))
    assert {"pooling": "(include_prompt)", "score": "as the first of a pair"}[kind] in message
    empty = read(directory(prompts={"document": ""}, default_prompt_name="document"))
    assert (empty.prompts, empty.default_prompt, empty.notes) == ({"document": ""}, "document", ())


def test_a_prompt_that_one_of_several_poolings_leaves_out(tmp_path: Path) -> None:
    modules = ("Normalize", "Pooling", "Pooling")
    written(tmp_path, modules=modules, pooling={"include_prompt": False}, prompts={"query": "query: "})
    (tmp_path / "3_Pooling" / "config.json").write_text("{}")
    assert read(tmp_path).prompts == {}


@pytest.mark.parametrize(("kind", "scores"), [("Sigmoid", "sigmoid"), ("Identity", "none"), ("Softmax", "softmax")])
def test_a_directory_says_what_makes_scores_of_logits(kind: str, scores: str, tmp_path: Path) -> None:
    named = f"torch.nn.modules.activation.{kind}"
    found = read(scorer(tmp_path, model_type="CrossEncoder", activation_fn=named, truncate_dim=7))
    assert (found.task, found.modules, found.activation) == ("sequence-classification", (), kind)
    of_old = {"sbert_ce_default_activation_function": "torch.nn.Tanh"}
    others: dict[str, object] = {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}, **of_old}
    for width in (1, 3):
        assert activation_of_scores(others, width, "config.json", found) == scores


def test_a_directory_that_says_nothing_of_scores_leaves_them_to_the_config(tmp_path: Path) -> None:
    found = read(scorer(tmp_path))
    assert found.activation is None
    assert [activation_of_scores({}, width, "", found) for width in (1, 3)] == ["sigmoid", "none"]
    for kind in ("regression", "multi_label_classification"):
        assert activation_of_scores({"problem_type": kind}, 3, "", found) == "none"
    named = {"sbert_ce_default_activation_function": "torch.nn.Softmax"}
    assert activation_of_scores(named, 1, "", found) == "softmax"
    assert activation_of_scores({"sentence_transformers": {"activation_fn": "Identity"}}, 1, "", found) == "none"


def test_a_pooling_models_head_is_no_cross_encoder(tmp_path: Path) -> None:
    assert activation_of_scores({}, 3, "", read(written(tmp_path))) == "softmax"


def test_activations_of_scores_that_are_not_known_are_refused(tmp_path: Path) -> None:
    assert "the activation 'torch.nn.Tanh' of scores" in refusal(scorer(tmp_path, activation_fn="torch.nn.Tanh"))


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    (tmp_path / "m").mkdir()
    written(tmp_path / "m")
    config = tmp_path / "m" / "1_Pooling" / "config.json"
    config.unlink()
    config.symlink_to(tmp_path / "outside" / "config.json")
    assert "outside the model's directory" in refusal(tmp_path / "m")
