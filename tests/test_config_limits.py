"""What a config.json may say: sizes and depths within limits, numbers that are numbers, a type that is known."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from llmc.errors import FrontendError
from llmc.frontends.hf import config

PATH = Path("some/config.json")
LLAMA = {"model_type": "llama"}


def refusal(data: dict[str, object]) -> str:
    """What is said of settings; empty if they are taken."""
    try:
        config.check_config(data, PATH)
    except FrontendError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", sorted({*config._LIMITS, *config._REAL_LIMITS}))
def test_a_known_number_lies_within_its_limits(name: str) -> None:
    """Wherever it stands, and in lists, which some models have for their layers."""
    low, high = {**config._LIMITS, **config._REAL_LIMITS}[name]
    is_real = name in config._REAL_LIMITS
    step = 1e-6 if is_real else 1
    for number in (low, high):
        for value in (number, [number, number], None):
            assert refusal({**LLAMA, name: value, "part": {name: value}}) == ""
    for number in (low - step, high * 1.001 if is_real else high + 1):
        said = f"some/config.json: {name} is {number!r}, outside "
        for data in ({name: number}, {name: [low, number]}, {"part": {name: number}}, {"parts": [{name: number}]}):
            assert refusal({**LLAMA, **data}).startswith(said)


SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "head_dim", "vocab_size",
         "max_position_embeddings")  # fmt: skip


def test_only_what_a_model_may_lack_is_zero() -> None:
    assert [name for name in SIZES if refusal({**LLAMA, name: 0}) == ""] == []
    assert [name for name in SIZES if refusal({**LLAMA, name: 1})] == []
    for name in ("num_encoder_layers", "num_experts"):
        assert refusal({**LLAMA, name: 0}) == "" and refusal({**LLAMA, name: -1})
    assert refusal({**LLAMA, "rms_norm_eps": 0}) == "" and refusal({**LLAMA, "rms_norm_eps": -1e-9})
    for name in ("rope_theta", "factor"):
        assert refusal({**LLAMA, name: 0.5}) == "" and refusal({**LLAMA, name: 0}) and refusal({**LLAMA, name: -0.5})


def test_the_largest_models_that_there_are_stay_below_the_limits() -> None:
    largest = {
        "num_hidden_layers": 256, "num_attention_heads": 1024, "hidden_size": 1 << 16, "intermediate_size": 1 << 19,
        "vocab_size": 1 << 20, "head_dim": 1 << 12, "num_experts": 1 << 12, "max_position_embeddings": 1 << 24,
        "rope_theta": 1e12, "factor": 1e3, "rms_norm_eps": 0.1,
    }  # fmt: skip
    assert refusal({**LLAMA, **largest}) == ""
    assert [name for name, number in largest.items() if not refusal({**LLAMA, name: number * (1 << 14)})] == []


@pytest.mark.parametrize("value", [True, False, "8", 8.0, [8, True], {"of": 8}])
def test_a_size_is_an_integer(value: object) -> None:
    assert "some/config.json: hidden_size must be an integer, not " in refusal({**LLAMA, "hidden_size": value})


def nested(depth: int) -> object:
    return 1 if depth == 0 else [nested(depth - 1)] if depth % 2 else {"x": nested(depth - 1)}


def test_settings_are_no_deeper_than_a_model_needs() -> None:
    assert refusal({**LLAMA, "deep": nested(23)}) == ""
    assert "x is nested more than 24 deep" in refusal({**LLAMA, "deep": nested(24)})


def test_settings_are_no_longer_than_a_model_needs() -> None:
    assert refusal({**LLAMA, "long": [0] * (1 << 16)}) == ""
    assert "long has 65537 entries" in refusal({**LLAMA, "long": [0] * ((1 << 16) + 1)})


def test_numbers_of_any_name_are_numbers_that_a_setting_has() -> None:
    for number in (1 << 53, -(1 << 53), math.inf, 1e300, "1" * 99):
        assert refusal({**LLAMA, "any": number}) == ""
    for number in ((1 << 53) + 1, -(1 << 53) - 1):
        assert "any has 16 digits" in refusal({**LLAMA, "any": [number]})
    assert "any is not a number (NaN)" in refusal({**LLAMA, "any": {"any": math.nan}})


def test_a_number_that_is_refused_is_shown_in_part() -> None:
    for name, value in (("hidden_size", 10**99), ("factor", 10**99), ("hidden_size", "1" * 99)):
        said = refusal({**LLAMA, name: value})
        assert "0" * 39 in said or "1" * 39 in said
        assert "0" * 40 not in said and "1" * 40 not in said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "some/config.json has no model_type"),
        ({"model_type": 7}, "some/config.json has no model_type"),
        ({"model_type": "llama"}, ""),
        ({"model_type": "bert"}, ""),
        ({"model_type": "llama", "auto_map": {}}, ""),
        ({"model_type": "vits_of_nobody", "auto_map": {}}, "needs remote code, which llmc never runs"),
        ({"model_type": "vits_of_nobody"}, "'vits_of_nobody' is unknown to this version of transformers"),
        ({"model_type": "clap_text_model"}, "'clap_text_model' is no model of text"),
    ],
)
def test_a_model_type_is_one_of_text_that_transformers_knows(data: dict[str, object], said: str) -> None:
    found = refusal(data)
    assert said in found and bool(said) == bool(found)


@pytest.mark.parametrize("read", [config.read_json, config.read_json_list])
def test_a_file_is_read_up_to_its_limit_and_is_of_its_kind(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    good, other, kind = ("{}", "[]", "object, not list") if read is config.read_json else ("[]", "{}", "list, not dict")
    path.write_text(good.ljust(100))
    assert read(path, most_bytes=100) == json.loads(good)
    with pytest.raises(FrontendError, match=r"x\.json has 100 bytes; at most 99 are read"):
        read(path, most_bytes=99)
    path.write_text(other)
    with pytest.raises(FrontendError, match=rf"x\.json must hold a JSON {kind}"):
        read(path)
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FrontendError, match="is missing or not a file"):
            read(place)


@pytest.mark.parametrize("read", [config.read_json, config.read_json_list])
def test_a_file_is_read_up_to_4_mib_where_nothing_else_is_said(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    good = "{}" if read is config.read_json else "[]"
    path.write_text(good.ljust(4 << 20))
    assert not read(path)
    path.write_text(good.ljust((4 << 20) + 1))
    with pytest.raises(FrontendError, match="4194305 bytes; at most 4194304 are read"):
        read(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, **options: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.json").write_text("[" * 200_000)
    with pytest.raises(FrontendError, match=r"x\.json is not valid JSON of a model: it is nested too deep"):
        config.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{,}")
    with pytest.raises(FrontendError, match=r"x\.json is not valid JSON: Expecting"):
        config.read_json(tmp_path / "x.json")
    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(FrontendError, match=r"x\.json cannot be read: Permission denied"):
        config.read_json(tmp_path / "x.json")


def test_transformers_log_is_silent_only_inside() -> None:
    """Errors are not logged, as they are raised; what is worse is. What was silent before stays so."""
    logger = logging.getLogger("transformers.anything")
    with pytest.raises(KeyError), config.quiet():
        assert not logger.isEnabledFor(logging.ERROR) and logger.isEnabledFor(logging.CRITICAL)
        raise KeyError
    assert logger.isEnabledFor(logging.ERROR)
    logging.disable(logging.INFO)
    try:
        with config.quiet():
            pass
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_what_transformers_made_of_the_sizes_is_looked_at_again(name: str) -> None:
    """Some configs take them from keys of other names."""

    def made(value: object) -> Any:
        return SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**{name: value} if decoder else {}))

    for value in (1, 64, None):
        assert config._checked(made(value), PATH) is not None
    for value in (0, -1, True, 2.0, "2"):
        with pytest.raises(FrontendError, match=f"some/config.json: {name} must be a positive integer, not {value!r}"):
            config._checked(made(value), PATH)


def test_transformers_reads_local_files_and_runs_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []

    def read(directory: Path, **options: object) -> object:
        asked.append({"directory": directory, **options})
        return SimpleNamespace(get_text_config=lambda decoder: None)

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "auto_map": {"AutoConfig": "evil.Config"}}))
    config.load_config(tmp_path)
    assert asked == [{"directory": tmp_path, "trust_remote_code": False, "local_files_only": True}]


def test_what_transformers_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    """Of a directory, and of settings that stand in a file of another kind."""
    bad = {**LLAMA, "hidden_size": 64, "num_attention_heads": 5}
    (tmp_path / "config.json").write_text(json.dumps(bad))
    for read in (lambda: config.load_config(tmp_path), lambda: config.config_of(bad, PATH)):
        with pytest.raises(FrontendError, match=r"config\.json is refused by transformers: \w+: ") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert config._first_line(ValueError("a\n b " + "c" * 300)) == "ValueError: a b " + "c" * 196
    assert config._first_line(ValueError()) == "ValueError"


def test_a_config_of_other_settings_is_that_of_a_directory(tmp_path: Path) -> None:
    data = {**LLAMA, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps(data))
    one, other = config.load_config(tmp_path), config.config_of(data, PATH)
    assert (one.hidden_size, one.vocab_size, type(one)) == (other.hidden_size, other.vocab_size, type(other))
    assert data["model_type"] == "llama"
