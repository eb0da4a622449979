"""sentence-transformers directories: the modules after the base model, and how texts become its inputs.

Everything is data: JSON and safetensors. Modules are known by the last part of the library's own class names; no class
is imported, no path leaves the directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import FrontendError
from llmc.frontends.hf.config import read_json, read_json_list
from llmc.frontends.hf.pooling import (
    SENTENCE,
    TOKEN_EMBEDDINGS,
    Module,
    Normalize,
    Pooling,
    Truncate,
    read_module,
)
from llmc.frontends.hf.source import check_links, is_below, require_checkpoint

_LIBRARY = "sentence_transformers."
_SETTINGS = (
    "sentence_bert_config.json",
    *(
        f"sentence_{name}_config.json"
        for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)
# What the Transformer module may hand to those who load the model, its config and its tokenizer: without effect on
# what it computes, or read here.
_HARMLESS = {
    "config_args": (),
    "config_kwargs": (),
    "processing_kwargs": (),
    "tokenizer_args": ("use_fast", "padding_side", "model_max_length"),
    "processor_kwargs": ("use_fast", "padding_side", "model_max_length"),
    **dict.fromkeys(
        ("model_args", "model_kwargs"),
        (
            "torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "use_safetensors",
            "add_pooling_layer", "ignore_mismatched_sizes",
        ),
    ),
}  # fmt: skip
_NOTHING = ("Dropout",)  # modules that do nothing outside training
_MOST_MODULES = 64
_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "none", "Softmax": "softmax"}  # of scores, by torch's names
EMBED, SCORE = "feature-extraction", "sequence-classification"


@dataclass(frozen=True)
class Sentence:
    """What a sentence-transformers directory says. transformer: the base model's directory. modules: behind it.

    task: EMBED, or SCORE for a cross encoder, whose scores go through `activation` (a class's name). max_tokens: None
    where only the tokenizer knows. notes: for the user.
    """

    transformer: Path
    modules: tuple[Module, ...]
    task: str
    max_tokens: int | None
    lower_case: bool
    prompts: dict[str, str]
    default_prompt: str | None
    activation: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def normalized(self) -> bool:
        """Whether embeddings have length 1."""
        makers = [module for module in self.modules if module.writes == SENTENCE]  # others change tokens alone
        return bool(makers) and isinstance(makers[-1], Normalize)


def read_sentence(directory: Path) -> Sentence | None:
    """What the directory says, or None for one of another kind. FrontendError names what is not supported."""
    path = directory / "modules.json"
    if not path.exists():
        return None
    settings = _optional(directory / "config_sentence_transformers.json")
    kind = settings.get("model_type", "SentenceTransformer")
    if kind not in ("SentenceTransformer", "CrossEncoder"):
        raise FrontendError(f"{directory}: sentence-transformers models of type {kind!r:.60} are not supported")
    entries = _entries(path)
    first_type, first_path = entries[0]
    if first_type != "Transformer":
        raise FrontendError(
            f"{path}: the first module is {first_type!r}, which is not supported: llmc compiles those that begin with "
            "a Transformer"
        )
    transformer = _inside(directory, first_path)
    if transformer != directory and transformer.is_dir():
        require_checkpoint(transformer)  # no adapter, which the library would load
    if not (transformer / "config.json").is_file():
        raise FrontendError(f"{path}: the Transformer's directory {first_path or '.'!r} has no config.json")
    modules = tuple(
        read_module(name, module_path, _inside(directory, module_path))
        for name, module_path in entries[1:]
        if name not in _NOTHING
    )
    base = _base_settings(transformer)
    task = base.get("transformer_task", EMBED)
    if task not in (EMBED, SCORE) or (task == SCORE and modules):
        raise FrontendError(f"{transformer}: transformer_task {task!r:.60} is not supported with these modules")
    if task == EMBED and not any(isinstance(module, Pooling) for module in modules):
        raise FrontendError(f"{path}: no Pooling module makes one embedding of a text's tokens, which is not supported")
    prompts, default, notes = _prompts(settings, modules, task, directory)
    if task == EMBED and settings.get("truncate_dim") is not None:
        modules = (*modules, _truncate(settings["truncate_dim"], directory))
    return Sentence(
        transformer=transformer,
        modules=modules,
        task=task,
        max_tokens=_max_tokens(base, transformer),
        lower_case=bool(base.get("do_lower_case")),
        prompts=prompts,
        default_prompt=default,
        activation=_activation(settings, directory),
        notes=(*notes, *_lengths_of_tasks(base)),
    )


def _lengths_of_tasks(base: Mapping[str, object]) -> tuple[str, ...]:
    """A note on settings of the Transformer module for texts that are said to be queries or documents."""
    given = [name for name in ("query_length", "document_length", "query_expansion") if base.get(name) is not None]
    if not given:
        return ()
    return (f"{', '.join(given)}: not obeyed, as texts are not told to be queries or documents (encode_query does)",)


def _entries(path: Path) -> list[tuple[str, str]]:
    """The modules of a modules.json: the last part of the class's name, and the directory below the model's."""
    data = read_json_list(path)
    if not 1 <= len(data) <= _MOST_MODULES:
        raise FrontendError(f"{path} must be a list of 1 to {_MOST_MODULES} modules")
    entries = []
    for entry in data:
        kind, below = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(below, str):
            raise FrontendError(f"{path}: each module needs a type and a path")
        if not kind.startswith(_LIBRARY):
            raise FrontendError(f"{path}: module type {kind!r:.100} is the model's own code, which llmc never runs")
        if below and not is_below(below):
            raise FrontendError(f"{path}: the path {below!r:.100} leaves the model's directory")
        entries.append((kind.rpartition(".")[2], below))
    return entries


def _inside(directory: Path, below: str) -> Path:
    """A module's directory; files in it may not link elsewhere."""
    found = directory / below
    if found.is_dir():
        check_links(found, directory)
    return found


def _optional(path: Path) -> dict[str, object]:
    return read_json(path) if path.exists() else {}


def _base_settings(transformer: Path) -> dict[str, object]:
    """The Transformer module's own settings; those that change the model or its inputs in unknown ways are refused."""
    files = (read_json(transformer / name) for name in _SETTINGS if (transformer / name).exists())
    settings = next((found for found in files if found), {})  # an empty one says nothing: the library reads on
    where = f"{transformer}: the Transformer module"
    for name, harmless in _HARMLESS.items():
        given = settings.get(name) or {}
        others = set(given) - {"trust_remote_code", *harmless} if isinstance(given, dict) else {name}
        if others:
            raise FrontendError(f"{where} has {name} ({', '.join(sorted(others))}), which is not supported")
    for name, plain in (("tokenizer_name_or_path", None), ("module_output_name", TOKEN_EMBEDDINGS)):
        wanted = settings.get(name)
        if wanted not in (None, plain) and settings.get("transformer_task", EMBED) == EMBED:
            raise FrontendError(f"{where} has {name} {wanted!r:.60}, which is not supported")
    ways = settings.get("modality_config")
    if ways is not None:
        text = ways.get("text") if isinstance(ways, dict) else None
        output = text.get("method_output_name") if isinstance(text, dict) and text.get("method") == "forward" else None
        if output not in ("last_hidden_state", "logits"):
            raise FrontendError(f"{where} takes texts in a way that is not supported: {text!r:.100}")
        # The library then makes a message of every text, also where it could take it plainly.
        if isinstance(ways, dict) and "message" in ways:
            raise FrontendError(
                f"{where} puts every text into the tokenizer's chat template (modality_config has 'message'), which is "
                "not supported: save it with a modality_config of 'text' alone if it was trained on plain texts"
            )
    return settings


def _truncate(most: object, where: Path) -> Truncate:
    """The module for the library's `truncate_dim`, a setting of the whole model."""
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise FrontendError(f"{where}: truncate_dim is {most!r:.40}, which is no number of features")
    return Truncate("", where, SENTENCE, SENTENCE, most=most)


def _activation(settings: dict[str, object], where: Path) -> str | None:
    activation = settings.get("activation_fn")
    return None if activation is None else _known_activation(activation, where)


def _known_activation(named: object, where: object) -> str:
    """The last part of the name of an activation of scores; FrontendError for one that scores cannot have here."""
    name = str(named).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise FrontendError(f"{where}: the activation {named!r:.80} of scores is not supported")
    return name


def activation_of_scores(config: Mapping[str, object], width: int, where: object, own: Sentence | None = None) -> str:
    """What makes a text's scores of its `width` logits: "softmax", "sigmoid" or "none", as transformers' pipeline or,
    where the config or the directory (`own`) is one of it, the library's CrossEncoder decides."""
    crossed = own is not None and own.task == SCORE
    named: object = own.activation if own is not None else None
    nested, old = config.get("sentence_transformers"), config.get("sbert_ce_default_activation_function")
    if named is None and isinstance(nested, Mapping):
        crossed, named = True, nested.get("activation_fn")
    elif named is None and old is not None:
        named = old
    if named is not None:
        return _ACTIVATIONS[_known_activation(named, where)]
    kind = config.get("problem_type")
    if not crossed and kind == "regression":
        return "none"
    if width == 1 or (not crossed and kind == "multi_label_classification"):
        return "sigmoid"
    return "none" if crossed else "softmax"


def _max_tokens(settings: dict[str, object], where: Path) -> int | None:
    given = [settings.get(name) or {} for name in ("tokenizer_args", "processor_kwargs")]
    limits = [one.get("model_max_length") for one in given if isinstance(one, dict)]
    number = next((limit for limit in limits if limit is not None), settings.get("max_seq_length"))
    if number is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool) or not 2 <= number <= 1 << 28:
        raise FrontendError(f"{where}: max_seq_length is {number!r:.40}, which is no number of tokens")
    return number


def _prompts(
    settings: dict[str, object], modules: tuple[Module, ...], task: object, where: Path
) -> tuple[dict[str, str], str | None, tuple[str, ...]]:
    """Prompts by name, the default one's name, and notes."""
    found, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if not isinstance(found, dict) or not all(isinstance(text, (str, type(None))) for text in found.values()):
        raise FrontendError(f"{where}: prompts must be texts by name")
    prompts = {str(name): str(text or "") for name, text in found.items()}
    if not (default is None or (isinstance(default, str) and default in prompts)):
        raise FrontendError(f"{where}: the default prompt {default!r:.60} is none of its prompts")
    left_out = not all(module.include_prompt for module in modules if isinstance(module, Pooling))
    if not any(prompts.values()) or not (task == SCORE or left_out):
        return prompts, default, ()
    what, why = "leaves it out of pooling (include_prompt)", "pooling would have to skip their tokens"
    if task == SCORE:
        what, why = "scores it with that, as the first of a pair", "scores are of texts as they are given"
    if default is not None and prompts[default]:
        raise FrontendError(f"{where}: it puts a prompt before every text and {what}, which is not supported")
    return {}, None, (f"its prompts are left out: {why}",)
