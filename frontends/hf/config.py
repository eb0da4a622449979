"""A model's config.json, checked before a model is built from it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import FrontendError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MOST_BYTES = 4 << 20
_MOST_DEPTH = 24
# No model comes near these; beyond them building would take hours or all memory, which is what a hostile file wants.
_MOST_LAYERS, _MOST_HEADS, _MOST_WIDTH, _MOST_EXPERTS = 512, 8192, 1 << 20, 1 << 14
_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), (1, _MOST_LAYERS)),
    **dict.fromkeys(("num_encoder_layers", "encoder_layers"), (0, _MOST_LAYERS)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_head"), (1, _MOST_HEADS)),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), (1, _MOST_WIDTH)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, _MOST_EXPERTS)),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), (1, 1 << 28)),
    "intermediate_size": (1, 1 << 23),
    "head_dim": (1, 1 << 16),
    "vocab_size": (1, 1 << 24),
}
# Beyond these a model computes nothing meaningful: roots of negative numbers, divisions by zero.
_REAL_LIMITS = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps"), (0, 1)),
    **dict.fromkeys(("rope_theta", "rotary_emb_base"), (1e-3, 1e15)),
    "factor": (1e-3, 1e6),
}
_MOST_INTEGER = 1 << 53


def read_json(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, object]:
    """A JSON object from a file of bounded size and depth; FrontendError names the file."""
    data = _read(path, most_bytes)
    if not isinstance(data, dict):
        raise FrontendError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def read_json_list(path: Path, most_bytes: int = _MOST_BYTES) -> list[object]:
    """A JSON list from a file of bounded size and depth; FrontendError names the file."""
    data = _read(path, most_bytes)
    if not isinstance(data, list):
        raise FrontendError(f"{path} must hold a JSON list, not {type(data).__name__}")
    return data


def _read(path: Path, most_bytes: int) -> object:
    try:
        if not path.is_file():
            raise FrontendError(f"{path} is missing or not a file")
        size = path.stat().st_size
        if size > most_bytes:
            raise FrontendError(f"{path} has {size} bytes; at most {most_bytes} are read")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FrontendError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise FrontendError(f"{path} is not valid JSON of a model: it is nested too deep") from None
    except ValueError as error:
        raise FrontendError(f"{path} is not valid JSON: {error}") from None


def _check_numbers(value: object, path: Path, name: str, depth: int = 0) -> None:
    """Refuse settings of absurd depth, length or size, and known ones outside their limits."""
    if depth > _MOST_DEPTH:
        raise FrontendError(f"{path}: {name} is nested more than {_MOST_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            for number in item if isinstance(item, list) else [item]:
                _check_limit(number, path, key)
            _check_numbers(item, path, key, depth + 1)
    elif isinstance(value, list):
        if len(value) > 1 << 16:
            raise FrontendError(f"{path}: {name} has {len(value)} entries")
        for item in value:
            _check_numbers(item, path, name, depth + 1)
    elif isinstance(value, float) and value != value:
        raise FrontendError(f"{path}: {name} is not a number (NaN)")
    elif isinstance(value, int) and abs(value) > _MOST_INTEGER:
        raise FrontendError(f"{path}: {name} has {len(str(abs(value)))} digits, which no setting has")


def _check_limit(number: object, path: Path, name: str) -> None:
    if name in _REAL_LIMITS and isinstance(number, (int, float)) and not isinstance(number, bool):
        lowest, highest = _REAL_LIMITS[name]
        if not lowest <= number <= highest:
            raise FrontendError(f"{path}: {name} is {number!r:.40}, outside {lowest:g}..{highest:g}")
    if name not in _LIMITS or number is None:
        return
    low, high = _LIMITS[name]
    if isinstance(number, bool) or not isinstance(number, int):
        raise FrontendError(f"{path}: {name} must be an integer, not {number!r:.40}")
    if not low <= number <= high:
        raise FrontendError(f"{path}: {name} is {number!r:.40}, outside {low}..{high}")


def check_config(data: Mapping[str, object], path: Path) -> None:
    """Refuse what cannot be compiled or must not be run, before transformers sees it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    _check_numbers(data, path, "config")
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise FrontendError(f"{path} has no model_type: it does not say which architecture it is")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_MAPPING_NAMES:
        if "auto_map" in data:
            raise FrontendError(f"{path}: model type {model_type!r} needs remote code, which llmc never runs")
        known = model_type in CONFIG_MAPPING
        what = (
            "is no model of text: llmc compiles decoders and encoders of text"
            if known
            else "is unknown to this version of transformers: `pip install -U transformers` may know it"
        )
        raise FrontendError(f"{path}: model type {model_type!r} {what}")


def own_code(data: Mapping[str, object]) -> tuple[str, ...]:
    """A note on code of a model of a type that transformers knows: it may compute something else, and does not run."""
    named = data.get("auto_map")
    models = {name: code for name, code in named.items() if "Config" not in name} if isinstance(named, dict) else {}
    if not models:
        return ()
    return (
        f"the model's own code ({', '.join(str(code) for code in models.values()):.80}) never runs: it is taken for "
        f"transformers' own {data.get('model_type')!s:.60}, and what that code does otherwise is lost",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines from transformers: what matters becomes an error or a note of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def load_config(directory: Path) -> PreTrainedConfig:
    """The transformers config of a model directory, of a native model type."""
    from transformers import AutoConfig

    path = directory / "config.json"
    data = read_json(path)
    check_config(data, path)
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # transformers raises many kinds for a bad value
        raise FrontendError(f"{path} is refused by transformers: {_first_line(error)}") from error
    return _checked(config, path)


def config_of(data: Mapping[str, object], path: Path) -> PreTrainedConfig:
    """The transformers config of these settings, which stand in a file of another kind; `check_config` goes before."""
    from transformers import AutoConfig

    settings = dict(data)
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    except Exception as error:  # transformers raises many kinds for a bad value
        raise FrontendError(f"{path} is refused by transformers: {_first_line(error)}") from error
    return _checked(config, path)


def _checked(config: PreTrainedConfig, path: Path) -> PreTrainedConfig:
    text = config.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "vocab_size", "hidden_size"):
        number = getattr(text, name, None)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise FrontendError(f"{path}: {name} must be a positive integer, not {number!r:.40}")
    return config


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
