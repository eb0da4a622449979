"""Typed settings of a GGUF file, and what a description makes of those that many architectures share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf_files import described

from llmc.errors import FrontendError
from llmc.frontends.gguf import description
from llmc.frontends.gguf.description import Description
from llmc.frontends.gguf.rows import Joined, Plus
from llmc.frontends.gguf.settings import Settings, shortest
from llmc.frontends.gguf.weights import Weight

SINGLE = float(np.float32(1e-5))  # as a file holds it


def settings(**values: object) -> Settings:
    return Settings(Path("m.gguf"), {f"a.{name}": value for name, value in values.items()}, "a")  # type: ignore[misc]


READ: list[tuple[str, object, object]] = [
    ("integer", 7, 7), ("integer", -7, -7), ("integer", [3, 3, 3], 3), ("integer", [3], 3),
    ("integers", [1, -2], [1, -2]), ("integers", [], []), ("number", 2, 2.0), ("number", SINGLE, 1e-5),
    ("number", 0.1, 0.1), ("flags", [True, False], [True, False]), ("flags", [], []), ("text", "x", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "value", "expected"), READ)
def test_a_value_of_the_right_type(method: str, value: object, expected: object) -> None:
    found = getattr(settings(key=value), method)("key")
    assert found == expected and type(found) is type(expected)


REFUSED: list[tuple[str, object, str]] = [
    ("integer", True, "must be an integer, and is True"), ("integer", 1.0, "must be an integer, and is 1.0"),
    ("integer", "1", "must be an integer"), ("integer", [1, 2], "differs from layer to layer"),
    ("integer", [], "differs from layer to layer"), ("integer", [True], "must be an integer"),
    ("integers", 1, "must be a list of integers"), ("integers", [1, True], "must be a list of integers"),
    ("integers", [1.0], "must be a list of integers"), ("number", True, "must be a finite number"),
    ("number", math.inf, "must be a finite number"), ("number", math.nan, "must be a finite number"),
    ("number", "1", "must be a finite number"), ("number", [1.0], "must be a finite number"),
    ("flags", True, "must be a list of true and false"), ("flags", [True, 1], "must be a list of true and false"),
    ("text", 1, "must be a string, and is 1"), ("text", ["x"], "must be a string"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "value", "said"), REFUSED)
def test_a_value_of_another_type_is_refused(method: str, value: object, said: str) -> None:
    with pytest.raises(FrontendError, match=rf"^m\.gguf: a\.key {said}") as error:
        getattr(settings(key=value), method)("key")
    assert len(str(error.value)) < 100
    with pytest.raises(FrontendError, match=f"{said.split(',')[0]}"):  # whatever would stand in its place
        getattr(settings(key=value), method)("key", *([value] if method in ("integer", "number", "text") else []))


def test_a_value_that_is_not_there() -> None:
    given = settings()
    for method in ("integer", "number"):
        with pytest.raises(FrontendError, match=r"a\.key is missing"):
            getattr(given, method)("key")
    assert given.integer("key", 0) == 0 and given.number("key", 0.5) == 0.5 and given.text("key", "x") == "x"
    assert given.integers("key") is None and given.flags("key") is None and given.text("key") == ""
    assert given.flag("key", True) is True and given.flag("key", False) is False
    assert settings(key=False).flag("key", True) is False and settings(key=True).flag("key", False) is True
    with pytest.raises(FrontendError, match=r"a\.key must be true or false, and is 1"):
        settings(key=1).flag("key", True)


def test_only_expected_values_may_stand_there() -> None:
    for value, allowed in ((1, (0, 1)), (SINGLE, (1e-5,)), ([2, 2], (2,)), (True, (True,)), (1.0, (1,)), ("x", ("x",))):
        settings(key=value).expect("key", allowed)  # type: ignore[arg-type]
    settings().expect("key", ())
    for value, allowed in ((2, (0, 1)), (1e-6, (1e-5,)), ([2, 3], (2,)), (True, (1,)), (1, (True,)), (0, (False,))):
        with pytest.raises(FrontendError, match=r"a\.key is .*, which is not supported: because$"):
            settings(key=value).expect("key", allowed, "because")  # type: ignore[arg-type]
    with pytest.raises(FrontendError, match=r"which is not supported$"):
        settings(key=2).expect("key", (1,))


def test_what_nobody_asked_for_is_known() -> None:
    given = Settings(Path("m"), {"a.b": 1, "a.c": 2, "a.d": 3, "ab.e": 4, "x.a.f": 5}, "a")
    assert given.has("b") and not given.has("e") and given.unread() == ["a.b", "a.c", "a.d"]
    given.get("b")
    given.ignore("c", "z")
    assert given.unread() == ["a.d"]


def test_the_shortest_decimal_that_means_an_f32() -> None:
    for value in (1e-5, 1e-6, 0.1, 1e30, 10000.0, -2.5, 500000.0):
        assert shortest(float(np.float32(value))) == value
    for double in (1 / 3, 0.1, 1e-300):  # more than an f32 holds
        assert shortest(double) == double


# --- a description ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Description:
    return described(tmp_path, "llama", {}, {})


def told(model: Description, **values: object) -> Description:
    """The same file with other settings: `a__b` is a.b."""
    metadata = dict(model.settings.metadata)
    metadata |= {f"llama.{name.replace('__', '.')}": value for name, value in values.items()}  # type: ignore[misc]
    metadata = {name: value for name, value in metadata.items() if value is not None}
    return Description(model.path, "llama", Settings(model.path, metadata, "llama"), model.tensors)


def rope(model: Description, **values: object) -> dict[str, object]:
    partial, latent = bool(values.pop("partial", False)), bool(values.pop("latent", False))
    return told(model, **values).rope(partial=partial, latent=latent)


def scaling(model: Description, kind: str | None, factor: float | None, **more: object) -> dict[str, object]:
    found = rope(model, rope__scaling__type=kind, rope__scaling__factor=factor, **more)
    assert found.pop("rope_theta") == 10000.0
    return found


PLAIN = {"rope_type": "default"}


@pytest.mark.parametrize("factor", [None, 0.0, 1.0])
@pytest.mark.parametrize("kind", [None, "none", "linear", "yarn", "longrope"])
def test_a_factor_of_1_scales_nothing(model: Description, kind: str | None, factor: float | None) -> None:
    assert scaling(model, kind, factor) == PLAIN


def test_scaling_is_linear_or_none(model: Description) -> None:
    assert rope(model, rope__freq_base=500000.0) == {"rope_type": "default", "rope_theta": 500000.0}
    for kind in (None, "linear"):
        assert scaling(model, kind, 0.5) == {"rope_type": "linear", "factor": 0.5}
        assert scaling(model, kind, None, rope__scale_linear=4.0) == {"rope_type": "linear", "factor": 4.0}
    assert scaling(model, "none", 4.0) == PLAIN
    assert scaling(model, "linear", 2.0, rope__scale_linear=4.0, rope__scaling__finetuned=True)["factor"] == 2.0
    with pytest.raises(FrontendError, match=r"factor is -0\.5, below 0"):
        scaling(model, "linear", -0.5)
    for kind in ("dynamic", "magic", "zoom"):
        with pytest.raises(FrontendError, match=f"type is '{kind}', which is not supported"):
            scaling(model, kind, 2.0)
    for factor in (0.5, 1.5):
        with pytest.raises(FrontendError, match=rf"attn_factor is {factor}, which is not supported"):
            scaling(model, "linear", 2.0, rope__scaling__attn_factor=factor)
    with pytest.raises(FrontendError, match=r"factor is 2 with longrope"):
        scaling(model, "longrope", 2.0)


YARN = {"rope__scaling__original_context_length": 32}


def test_yarn(model: Description) -> None:
    """As transformers has it where a file says no more than it must."""
    found = scaling(model, "yarn", 4.0, **YARN)
    assert found.pop("attention_factor") == pytest.approx(0.1 * math.log(4.0) + 1.0, abs=1e-12)
    assert found == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0,
    }  # fmt: skip
    for name, value in (("ext", 1.0), ("ext", -1.0), ("attn", 1.0)):
        scaling(model, "yarn", 4.0, **YARN, **{f"rope__scaling__yarn_{name}_factor": value})
    betas = {"rope__scaling__yarn_beta_fast": 24.0, "rope__scaling__yarn_beta_slow": 2.0}
    found = scaling(model, "yarn", 4.0, **YARN, **betas, rope__scaling__yarn_log_multiplier=0.0)
    assert (found["beta_fast"], found["beta_slow"]) == (24.0, 2.0)
    wrong = {"yarn_ext_factor": 0.5, "yarn_attn_factor": 2.0, "yarn_log_multiplier": 0.1, "attn_factor": 1.5}
    for name, value in (*wrong.items(), ("attn_factor", 0.5)):
        with pytest.raises(FrontendError, match=rf"{name} is {value}"):
            scaling(model, "yarn", 4.0, **YARN, **{f"rope__scaling__{name}": value})
    with pytest.raises(FrontendError, match="original_context_length is missing"):
        scaling(model, "yarn", 4.0)


def test_yarn_of_latent_keys(model: Description) -> None:
    """A tenth of the factor that transformers has is stored, rounded to f32."""
    more = {"rope__scaling__yarn_log_multiplier": float(np.float32(0.0707)), "rope__dimension_count": 4}
    found = scaling(model, "yarn", 40.0, latent=True, **YARN, **more)
    assert (found["mscale"], found["mscale_all_dim"]) == (0.707, 0.707) and "attention_factor" not in found
    more["rope__scaling__yarn_log_multiplier"] = float(np.float32(0.0123456))
    assert scaling(model, "yarn", 40.0, latent=True, **YARN, **more)["mscale"] == 0.123456
    with pytest.raises(FrontendError, match="yarn_log_multiplier is missing"):
        scaling(model, "yarn", 40.0, latent=True, **YARN)


def test_a_table_of_factors(tmp_path: Path) -> None:
    def with_table(values: object) -> Description:
        return described(tmp_path, "llama", {}, {"rope_freqs.weight": np.array(values)})

    model = with_table([1.0, 2.0, 3.0, 4.0])
    for kind, factor in ((None, None), ("none", 4.0), ("linear", 1.0), ("linear", 0.0)):
        found = scaling(model, kind, factor)
        assert found["short_factor"] == found["long_factor"] == [1.0, 2.0, 3.0, 4.0]
        assert (found["rope_type"], found["attention_factor"]) == ("longrope", 1.0)
    for factor in (0.5, 2.0):
        with pytest.raises(FrontendError, match="linear beside a table of factors"):
            scaling(model, "linear", factor)
    read = told(model)
    read.rope()
    assert read.read == {"rope_freqs.weight"} and read.left_over({}) == ["token_embd.weight"]
    scaled = told(model, rope__scaling__type="yarn", rope__scaling__factor=4.0, **YARN)
    scaled.rope()
    assert "rope_freqs.weight" in scaled.left_over({})  # which is refused
    assert scaling(with_table([1.0] * 4), None, None) == PLAIN
    for wrong in ([1.0] * 3, [1.0] * 5, [1.0, 1.0, 0.0, 1.0], [1.0, -1.0, 1.0, 1.0], [1.0, math.inf, 1.0, 1.0]):
        with pytest.raises(FrontendError, match=rf"must have 4 positive numbers, and has {len(wrong)}"):
            scaling(with_table(wrong), None, None)


def test_tables_for_short_and_long_texts(tmp_path: Path) -> None:
    short, long = np.array([1.0, 1.0, 1.0, 1.5]), np.array([1.0, 2.0, 3.0, 4.0])
    tables = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    model = described(tmp_path, "llama", {}, tables)
    found = scaling(model, "longrope", None)
    assert found == {
        "rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(),
        "original_max_position_embeddings": 64, "attention_factor": 1.0,
    }  # fmt: skip
    found = scaling(model, "longrope", 1.0, **YARN, rope__scaling__attn_factor=1.25)
    assert (found["original_max_position_embeddings"], found["attention_factor"]) == (32, 1.25)
    del tables["rope_factors_short.weight"]
    with pytest.raises(FrontendError, match=r"no 'rope_factors_short\.weight'"):
        scaling(described(tmp_path, "llama", {}, tables), "longrope", None)


def test_a_part_of_a_head_is_what_transformers_cuts_off(model: Description) -> None:
    for head in (4, 80, 88, 100, 128):
        for rotary in range(2, head + 1, 2):
            sizes = {"attention__key_length": head, "attention__value_length": head, "rope__dimension_count": rotary}
            factor = rope(model, partial=True, **sizes)["partial_rotary_factor"]
            assert isinstance(factor, float) and int(head * factor) == rotary and abs(factor - rotary / head) < 1e-9
    for count, partial in ((4, False), (16, False), (16, True), (0, True), (-2, True), (3, True)):
        with pytest.raises(FrontendError, match=f"dimension_count is {count}(, not an even number of up to| of) 8"):
            rope(model, rope__dimension_count=count, partial=partial)
    rope(model, rope__dimension_count=4, latent=True)


def test_architectures_are_found_by_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, description.Architecture] = {}
    monkeypatch.setattr(description, "_ARCHITECTURES", known)

    @description.architecture("one", "other")
    def made_up(model: Description) -> description.Plan:
        raise NotImplementedError

    assert known == {"one": made_up, "other": made_up}
    with pytest.raises(AssertionError):
        description.architecture("one")(made_up)
    asked: list[str] = []
    monkeypatch.setattr(description.importlib, "import_module", asked.append)
    assert description.architectures() is known
    files = Path(description.__file__).parent.glob("architectures/[a-z]*.py")
    assert {name.rpartition(".")[2] for name in asked} == {file.stem for file in files}


def test_sizes_of_heads(model: Description) -> None:
    assert (model.heads, model.kv_heads, model.head_dim, model.rotary) == (4, 4, 8, 8)
    other = told(model, attention__head_count_kv=2, attention__key_length=16, rope__dimension_count=6)
    assert (other.kv_heads, other.head_dim, other.rotary) == (2, 16, 6)
    assert told(model, attention__head_count=8192).heads == 8192
    for count in (0, -1, 8193):
        for name in ("head_count", "head_count_kv"):
            with pytest.raises(FrontendError, match=rf"attention\.{name} is {count}, outside 1\.\.8192"):
                getattr(told(model, **{f"attention__{name}": count}), "heads" if name == "head_count" else "kv_heads")
    with pytest.raises(FrontendError, match="value_length is not key_length, 8"):
        _ = told(model, attention__value_length=16).head_dim


def test_what_most_decoders_have(model: Description) -> None:
    config = model.decoder(model_type="x")
    assert config == {
        "vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 2,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
        "tie_word_embeddings": True, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        "rms_norm_eps": 1e-5, "model_type": "x",
    }  # fmt: skip
    # Files with a LayerNorm's epsilon alone are of models without RMSNorm; one of both has to be there.
    assert "rms_norm_eps" not in told(model, attention__layer_norm_rms_epsilon=None).decoder()
    assert told(model, attention__layer_norm_epsilon=None).decoder()["rms_norm_eps"] == 1e-5
    with pytest.raises(FrontendError, match="layer_norm_rms_epsilon is missing"):
        told(model, attention__layer_norm_epsilon=None, attention__layer_norm_rms_epsilon=None).decoder()
    odd = told(model, attention__value_length=16, attention__head_count_kv=0)
    config = odd.decoder(head_dim=4, num_key_value_heads=3)
    assert (config["head_dim"], config["num_key_value_heads"]) == (4, 3)
    for wrong in (16, 64):
        with pytest.raises(FrontendError, match=f"embedding_length is {wrong}, but the embedding has 32"):
            told(model, embedding_length=wrong).decoder()
    for key, value in (("attention__causal", False), ("pooling_type", 1)):
        with pytest.raises(FrontendError, match=f"{key.replace('__', '.')} is {value}"):
            told(model, **{key: value}).decoder()
    whole = told(model, attention__causal=True, pooling_type=0, vocab_size=41)
    whole.decoder()
    assert not [key for key in whole.settings.unread() if "epsilon" not in key]


def test_tensors_that_a_model_has_to_have(tmp_path: Path) -> None:
    model = described(tmp_path, "llama", {}, {"output.weight": (40, 32), "blk.1.attn_q.bias": (32,)})
    assert not model.tied and model.rows("output.weight") == 40 and model.vocabulary == 40
    assert model.in_layers("attn_q.bias") and not model.in_layers("attn_k.bias")
    assert not told(model, block_count=1).in_layers("attn_q.bias")
    for name, said in (("x.weight", "it has no tensor 'x.weight'"), ("blk.1.attn_q.bias", r"is \[32\], no matrix")):
        with pytest.raises(FrontendError, match=said):
            model.rows(name)
    with pytest.raises(FrontendError, match="no matrix"):
        described(tmp_path, "llama", {}, {"token_embd.weight": (4, 10, 32)}).decoder()


FAR, NEAR = "full_attention", "sliding_attention"


def test_layers_with_windows(model: Description) -> None:
    model = told(model, block_count=4)
    assert model.sliding(2) == [NEAR, FAR, NEAR, FAR] and model.sliding(3) == [NEAR, NEAR, FAR, NEAR]
    key = "attention__sliding_window_pattern"
    assert told(model, **{key: 4}).sliding(2) == [NEAR, NEAR, NEAR, FAR]
    assert told(model, **{key: 1}).sliding(2) == [FAR] * 4
    for none in (0, -1):
        assert told(model, **{key: none}).sliding(2) == [NEAR] * 4
    for more in ([], [True]):
        assert told(model, **{key: [True, False, False, True, *more]}).sliding(2) == [NEAR, FAR, FAR, NEAR]
    with pytest.raises(FrontendError, match="has 3 entries"):
        told(model, **{key: [True] * 3}).sliding(2)


def test_layers_that_draft_tokens_are_no_layers(tmp_path: Path) -> None:
    tensors = {f"blk.{layer}.{name}.weight": (32,) for layer in (2, 3, 4, 10) for name in ("attn_norm", "nextn.x")}
    model = described(tmp_path, "llama", {"block_count": 5, "nextn_predict_layers": 2}, tensors)
    assert (model.layers, model.drafts) == (3, 2) and told(model, nextn_predict_layers=None).layers == 5
    left = [f"blk.{layer}.{name}.weight" for layer in (2, 10) for name in ("attn_norm", "nextn.x")]
    assert model.left_over({}) == ["token_embd.weight", *left]
    used: Mapping[str, Weight] = {"x": Weight(("blk.2.attn_norm.weight", "token_embd.weight"))}
    assert model.left_over(used) == left[1:]
    assert len(told(model, nextn_predict_layers=0).left_over({})) == 9


def test_weights_by_the_names_of_modules(tmp_path: Path) -> None:
    tensors = {
        "blk.0.a.weight": (8, 32), "blk.0.a.bias": (8,), "blk.1.a.weight": (8, 32), "blk.2.a.weight": (8, 32),
        "blk.0.b.weight": (8, 32), "blk.0.c.weight": (8, 32), "blk.1.b.weight": (8, 32),
    }  # fmt: skip
    model = described(tmp_path, "llama", {}, tensors)
    joined, less, more = Joined(), Plus(-1.0), Plus(1.0)
    found = model.weights(
        {"embed": "token_embd", "head": "output"},
        {"x": "a", "y": "b c", "z.only": "a.weight"},
        layers="m",
        rows={"b": joined},
        values={"a": less, "a.weight": more},
    )
    assert found == {
        "embed.weight": Weight(("token_embd.weight",)),
        "m.0.x.weight": Weight(("blk.0.a.weight",), None, more),
        "m.0.x.bias": Weight(("blk.0.a.bias",), None, less),
        "m.0.y.weight": Weight(("blk.0.b.weight", "blk.0.c.weight"), joined),
        "m.0.z.only": Weight(("blk.0.a.weight",), None, more),
        "m.1.x.weight": Weight(("blk.1.a.weight",), None, more),
        "m.1.z.only": Weight(("blk.1.a.weight",), None, more),
    }
