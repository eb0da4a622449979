"""Each module behind a base model computes what sentence-transformers' own computes, of the files that it saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer import modules as library

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import LayerNorm
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.hf.pooling import (
    ACTIVATIONS,
    MODES,
    SENTENCE,
    TOKEN_EMBEDDINGS,
    Context,
    Module,
    Truncate,
    embedding_of,
    read_module,
)
from llmc.frontends.hf.sentence import Sentence
from llmc.frontends.weight_sources import ArrayWeights

Array = np.ndarray
WIDTH = 6
TOKENS = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2))


def computed(module: Module, x: torch.Tensor, weights: ArrayWeights | None = None) -> Array:
    """A module's value in numpy; of token embeddings [1, S, features] for any number S of tokens."""
    size = symbol("S", 1, 16)
    shape = tuple(x.shape) if x.dim() == 2 else (1, size, x.shape[2])
    given = Input("x", Tensor(shape, "f32"))
    positions = Input("positions", Tensor((1, size), "i32"))
    source = module.weights() or weights or ArrayWeights({})
    graph = Graph("module", (given, positions), (("y", module.apply(given, Context(positions, source))),))
    count = x.shape[1] if x.dim() == 3 else 4
    data = {"x": x.numpy(), "positions": np.arange(count, dtype=np.int32)[None]}
    return np.asarray(evaluate(graph, data, source.load)["y"])


def saved(module: torch.nn.Module, directory: Path) -> Module:
    """What is read of a module that the library wrote."""
    directory.mkdir(parents=True, exist_ok=True)
    module.save(str(directory))
    return read_module(type(module).__name__, "2_Part", directory)


def wanted(module: torch.nn.Module, x: torch.Tensor, writes: str = SENTENCE) -> Array:
    """The library's value of one text without padding."""
    reads = TOKEN_EMBEDDINGS if x.dim() == 3 else SENTENCE
    with torch.no_grad():
        found: Array = module({reads: x, "attention_mask": torch.ones(1, x.shape[1])})[writes].numpy()
    return found


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("mode", [*MODES, ("lasttoken", "cls"), tuple(MODES)])
def test_pooling_is_the_librarys(mode: str | tuple[str, ...], size: int, tmp_path: Path) -> None:
    module = library.Pooling(WIDTH, mode)
    x = TOKENS[:, :size]
    np.testing.assert_allclose(computed(saved(module, tmp_path), x), wanted(module, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", range(len(MODES)))
def test_flags_choose_modes_in_the_librarys_order(first: int, tmp_path: Path) -> None:
    """As old versions wrote them: of two flags in any order, one vector."""
    names = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    flags = {f"pooling_mode_{name}": name in (names[first], names[first - 1]) for name in reversed(names)}
    (tmp_path / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **flags}))
    module = library.Pooling.load(str(tmp_path))
    found = computed(read_module("Pooling", "1_Pooling", tmp_path), TOKENS)
    np.testing.assert_allclose(found, wanted(module, TOKENS), rtol=1e-6, atol=1e-6)


def test_pooling_that_says_nothing_is_the_mean(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"pooling_mode_cls_token": False}))
    np.testing.assert_allclose(
        computed(read_module("Pooling", "1_Pooling", tmp_path), TOKENS), TOKENS.numpy().mean(1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "counts"),
    [({}, True), *(({"include_prompt": value}, bool(value)) for value in (True, False, 0, None))],
)
def test_whether_a_prompt_counts(settings: dict[str, object], counts: bool, tmp_path: Path) -> None:
    """Whatever Python takes for false leaves it out, as in the library."""
    (tmp_path / "config.json").write_text(json.dumps({"embedding_dimension": WIDTH, **settings}))
    assert read_module("Pooling", "1_Pooling", tmp_path).include_prompt is counts  # type: ignore[attr-defined]
    assert bool(library.Pooling.load(str(tmp_path)).include_prompt) is counts


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("x", [TEXT, TOKENS], ids=["text", "tokens"])
def test_dense_layers_are_the_librarys(name: str, x: torch.Tensor, tmp_path: Path) -> None:
    where = TOKEN_EMBEDDINGS if x.dim() == 3 else SENTENCE
    module = library.Dense(WIDTH, 4, activation_function=getattr(torch.nn, name)(), module_input_name=where)
    found = saved(module, tmp_path)
    assert (found.reads, found.writes) == (where, where)
    np.testing.assert_allclose(computed(found, x), wanted(module, x, where), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [WIDTH, 4, 8])
@pytest.mark.parametrize("residual", [True, False])
def test_biases_and_residuals_are_the_librarys(bias: bool, outputs: int, residual: bool, tmp_path: Path) -> None:
    module = library.Dense(WIDTH, outputs, bias=bias, use_residual=residual)
    found = saved(module, tmp_path)
    np.testing.assert_allclose(computed(found, TEXT), wanted(module, TEXT), rtol=1e-5, atol=1e-6)
    assert set(found.shapes) == {f"2_Part.{name}" for name in module.state_dict()}


def test_settings_that_are_left_away_are_the_librarys_own(tmp_path: Path) -> None:
    settings = {"in_features": WIDTH, "out_features": WIDTH, "use_residual": 1, "module_input_name": SENTENCE}
    torch.manual_seed(3)
    library.Dense(WIDTH, WIDTH).save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    module = library.Dense.load(str(tmp_path))
    found = computed(read_module("Dense", "2_Part", tmp_path), TEXT)
    np.testing.assert_allclose(found, wanted(module, TEXT), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_compute_in_f32(dtype: torch.dtype, tmp_path: Path) -> None:
    module = library.Dense(WIDTH, 4).to(dtype)
    found = computed(saved(module, tmp_path), TEXT)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted(module.float(), TEXT), rtol=1e-5, atol=1e-6)


def test_layer_norms_are_the_librarys(tmp_path: Path) -> None:
    """With an epsilon that shows where features are small."""
    module = library.LayerNorm(WIDTH)
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    found = saved(module, tmp_path)
    for x in (TEXT, TEXT * 1e-3):
        np.testing.assert_allclose(computed(found, x), wanted(module, x), rtol=1e-4, atol=1e-5)
    made = found.apply(Input("x", Tensor((1, WIDTH), "f32")), Context(None, found.weights()))  # type: ignore[arg-type]
    assert isinstance(made, LayerNorm) and made.eps == module.norm.eps


@pytest.mark.parametrize("x", [TEXT, TEXT * 1e-14, TEXT * 0, TOKENS], ids=["text", "least", "zero", "tokens"])
def test_normalization_is_the_librarys(x: torch.Tensor, tmp_path: Path) -> None:
    where = TOKEN_EMBEDDINGS if x.dim() == 3 else SENTENCE
    module = library.Normalize(where)
    np.testing.assert_allclose(computed(saved(module, tmp_path), x), wanted(module, x, where), rtol=1e-5)


def test_normalization_of_old_has_no_settings(tmp_path: Path) -> None:
    assert read_module("Normalize", "2_Normalize", tmp_path).reads == SENTENCE
    with pytest.raises(FrontendError, match=r"config\.json is missing"):
        read_module("Pooling", "1_Pooling", tmp_path)


@pytest.mark.parametrize("most", [1, WIDTH - 1, WIDTH, WIDTH + 1])
def test_features_are_cut_at_the_end(most: int, tmp_path: Path) -> None:
    module = Truncate("", tmp_path, SENTENCE, SENTENCE, most=most)
    np.testing.assert_array_equal(computed(module, TEXT), TEXT.numpy()[:, :most])


# What is refused.


def dense(
    tmp_path: Path, save: Callable[[dict[str, torch.Tensor]], object] = lambda weights: None, **own: object
) -> Module:
    """A dense layer's directory with other weights, or other settings."""
    module = library.Dense(WIDTH, 4)
    module.save(str(tmp_path))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    save(weights)
    save_file(weights, tmp_path / "model.safetensors")
    settings = {**json.loads((tmp_path / "config.json").read_text()), **own}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return read_module("Dense", "2_Part", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("linear.bias"), r"weight 2_Part\.linear\.bias is \[\], its config wants \[4\]"),
        (
            lambda weights: weights.update({"linear.weight": torch.ones(WIDTH, 4)}),
            r"linear\.weight is \[6, 4\], its config wants \[4, 6\]",
        ),
        (
            lambda weights: weights.update({"linear.bias": torch.ones(4, dtype=torch.int32)}),
            r"linear\.bias holds i32, not floats",
        ),
        (lambda weights: weights.update(scale=torch.ones(1)), r"has no place for the weights 2_Part\.scale"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FrontendError, match=message):
        dense(tmp_path, change).weights()


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(damage: float, tmp_path: Path) -> None:
    source = dense(tmp_path, lambda weights: weights["linear.bias"].fill_(damage)).weights()
    assert source is not None and np.isfinite(source.load("2_Part.linear.weight")).all()
    with pytest.raises(FrontendError, match=r"2_Part\.linear\.bias holds NaN or infinity"):
        source.load("2_Part.linear.bias")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"in_features": number}, "no number of features")
            for number in (0, -1, True, 6.0, "6", None, (1 << 20) + 1)
        ),
        ({"out_features": 0}, "out_features is 0, which is no number of features"),
        ({"activation_function": None}, "activation None is not supported"),
        ({"activation_function": "own.Tanh"}, r"activation 'own\.Tanh' is not supported; supported are torch\.nn's Id"),
        ({"module_input_name": "pixels"}, "works on 'pixels', which is not supported"),
        ({"module_output_name": "pixels"}, "writes 'pixels' of sentence_embedding"),
        ({"module_input_name": TOKEN_EMBEDDINGS, "module_output_name": SENTENCE}, "writes 'sentence_embedding' of tok"),
        ({"module_output_name": TOKEN_EMBEDDINGS}, "writes 'token_embeddings' of sentence_embedding"),
    ],
)
def test_settings_of_dense_layers_that_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match=message):
        dense(tmp_path, **settings)


def test_the_most_features_of_a_layer(tmp_path: Path) -> None:
    assert dense(tmp_path, in_features=1 << 20, out_features=1).shapes["2_Part.linear.weight"] == (1, 1 << 20)


@pytest.mark.parametrize("mode", ["median", ["mean", "median"], [], 7])
def test_modes_that_are_not_known_are_refused(mode: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    with pytest.raises(FrontendError, match=r"config\.json: pooling mode .* is none of cls, max, mean, "):
        read_module("Pooling", "1_Pooling", tmp_path)


def test_modules_that_are_not_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match="module 'LSTM' is not supported; supported: Pooling, Dense, LayerNorm, N"):
        read_module("LSTM", "1_LSTM", tmp_path)


# Several modules.


def chain(tmp_path: Path, *modules: torch.nn.Module) -> tuple[Module, ...]:
    return tuple(
        read_module(type(module).__name__, str(number), saved(module, tmp_path / str(number)).directory)
        for number, module in enumerate(modules)
    )


def sentence(modules: tuple[Module, ...]) -> Sentence:
    return Sentence(Path(), modules, "feature-extraction", None, False, {}, None)


def test_one_module_works_on_what_another_one_makes(tmp_path: Path) -> None:
    """Before the pooling on tokens, behind it on the text."""
    own = [library.Normalize(TOKEN_EMBEDDINGS), library.Pooling(WIDTH, "max"), library.Normalize()]
    modules = chain(tmp_path, *own)
    given, positions = Input("x", Tensor((1, 5, WIDTH), "f32")), Input("positions", Tensor((1, 5), "i32"))
    made = embedding_of(modules, given, Context(positions, ArrayWeights({})))
    features = {TOKEN_EMBEDDINGS: TOKENS, "attention_mask": torch.ones(1, 5)}
    for module in own:
        features = module(features)
    data = {"x": TOKENS.numpy(), "positions": np.arange(5, dtype=np.int32)[None]}
    found = evaluate(Graph("chain", (given, positions), (("y", made),)), data, lambda name: np.zeros(0))["y"]
    np.testing.assert_allclose(np.asarray(found), features[SENTENCE].numpy(), rtol=1e-5)


def test_a_module_before_what_it_works_on_is_refused(tmp_path: Path) -> None:
    modules = chain(tmp_path, library.Normalize(), library.Pooling(WIDTH))
    given, positions = Input("x", Tensor((1, 5, WIDTH), "f32")), Input("positions", Tensor((1, 5), "i32"))
    with pytest.raises(FrontendError, match="works on sentence_embedding, which no module before it makes"):
        embedding_of(modules, given, Context(positions, ArrayWeights({})))


def test_modules_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    modules = chain(tmp_path, library.Pooling(WIDTH, ("cls", "max")), library.LayerNorm(WIDTH))
    given, positions = Input("x", Tensor((1, 5, WIDTH), "f32")), Input("positions", Tensor((1, 5), "i32"))
    source = modules[1].weights()
    assert source is not None
    with pytest.raises(FrontendError, match="1 does not fit what stands before it: "):
        embedding_of(modules, given, Context(positions, source))


def test_embeddings_are_of_length_1_where_the_last_module_that_makes_them_normalizes(tmp_path: Path) -> None:
    pooling, tokens, text = library.Pooling(WIDTH), library.Normalize(TOKEN_EMBEDDINGS), library.Normalize()
    dense, norm = library.Dense(WIDTH, WIDTH), library.LayerNorm(WIDTH)
    cases = [((pooling, text), True), ((pooling, dense, text), True), ((pooling, text, tokens), True)]
    cases += [((), False), ((pooling,), False), ((pooling, tokens), False), ((pooling, text, norm), False)]
    cases += [((tokens, pooling), False), ((pooling, text, pooling), False)]
    for number, (modules, expected) in enumerate(cases):
        assert sentence(chain(tmp_path / str(number), *modules)).normalized is expected, modules
