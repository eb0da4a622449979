"""The modules of sentence-transformers that stand behind a base model, as tensor ops.

A module reads and writes values by name: `token_embeddings` f32[1, S, features], `sentence_embedding` f32[1, features].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmc.compiler.ir.elementwise import Activation, Add, Cast, Div, Maximum, Mul, Relu, Sigmoid, Sqrt, Tanh, constant
from llmc.compiler.ir.llm import LayerNorm
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.structural import Concat, Iota, Matmul, Max, Mean, Reshape, Slice, Sum, Transpose
from llmc.compiler.ir.types import FLOATS, Array, Tensor
from llmc.errors import FrontendError, IRError
from llmc.frontends.hf.config import read_json
from llmc.frontends.hf.weights import is_finite, open_checkpoint, shortened
from llmc.frontends.lifted import WeightSource

TOKEN_EMBEDDINGS, SENTENCE = "token_embeddings", "sentence_embedding"
_MOST_FEATURES = 1 << 20

# The library's spelling of an activation: the last part of a class's name in torch.nn.
ACTIVATIONS: dict[str, Callable[[Value], Value]] = {
    "Identity": lambda x: x,
    "Tanh": Tanh,
    "Sigmoid": Sigmoid,
    "ReLU": Relu,
    "GELU": lambda x: Activation(x, "gelu"),
    "SiLU": lambda x: Activation(x, "silu"),
}


@dataclass(frozen=True)
class Context:
    """What modules may use beside features: `positions` i32[1, S], and the weights' dtypes."""

    positions: Input
    weights: WeightSource

    def param(self, name: str) -> Value:
        """A weight, of floats as `Module.weights` sees to, as f32."""
        dtype = self.weights.dtype(name)
        param = Param(name, Tensor(self.weights.shape(name), dtype))
        return Cast(param, "f32") if dtype != "f32" else param


@dataclass(frozen=True)
class Module:
    """name: what its weights' names begin with. directory: of its files. reads, writes: names of features."""

    name: str
    directory: Path
    reads: str
    writes: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of its weights, under their full names

    def apply(self, x: Value, context: Context) -> Value:
        """What it writes, of what it reads."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")

    def weights(self) -> WeightSource | None:
        """Its weights under their full names, checked against `shapes`; None if it has none."""
        if not self.shapes:
            return None
        source = _Prefixed(open_checkpoint(self.directory), f"{self.name}.")
        have = {name: source.shape(name) for name in source.names}
        for name, shape in self.shapes.items():
            if have.get(name) != shape:
                raise FrontendError(
                    f"{self.directory}: weight {name} is {list(have.get(name, ()))}, its config wants {list(shape)}"
                )
            if source.dtype(name) not in FLOATS:
                raise FrontendError(f"{self.directory}: weight {name} holds {source.dtype(name)}, not floats")
        if others := sorted(set(have) - set(self.shapes)):
            raise FrontendError(f"{self.directory}: its config has no place for the weights {shortened(others)}")
        return source


def token_count(tokens: Value) -> Value:
    """How many tokens [1, S, features] has, f32[1]: the last of 0..S."""
    size = tokens.shape[1]
    return Cast(Slice(Iota(size + 1), 0, size, size + 1), "f32")


def _mean(x: Value, context: Context) -> Value:
    return Mean(x, (1,), False)


def _mean_sqrt_len(x: Value, context: Context) -> Value:
    return Div(Sum(x, (1,), False), Sqrt(Reshape(token_count(x), (1, 1))))


def _weighted_mean(x: Value, context: Context) -> Value:
    """Later tokens count more: the n-th one n times."""
    weights = Reshape(Add(Cast(context.positions, "f32"), constant(1.0, "f32")), (1, x.shape[1], 1))
    return Div(Sum(Mul(x, weights), (1,), False), Sum(weights, (1,), False))


def _token(first: bool) -> Callable[[Value, Context], Value]:
    def take(x: Value, context: Context) -> Value:
        size = x.shape[1]
        return Reshape(Slice(x, 1, 0, 1) if first else Slice(x, 1, size - 1, size), (1, x.shape[2]))

    return take


# Values [1, S, features] to [1, features]. In the order in which several are concatenated where flags choose them.
MODES: dict[str, Callable[[Value, Context], Value]] = {
    "cls": _token(first=True),
    "max": lambda x, context: Max(x, (1,), False),
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _token(first=False),
}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooling(Module):
    """One vector of all tokens; several modes stand side by side in it. include_prompt: a prompt's tokens count."""

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True

    def apply(self, x: Value, context: Context) -> Value:
        pooled = tuple(MODES[mode](x, context) for mode in self.modes)
        return pooled[0] if len(pooled) == 1 else Concat(pooled, 1)


@dataclass(frozen=True, kw_only=True)
class Dense(Module):
    """activation(x @ w.T + bias), plus x, or plus a projection of x."""

    activation: str
    residual: bool

    def apply(self, x: Value, context: Context) -> Value:
        y = _linear(x, context.param(f"{self.name}.linear.weight"))
        if f"{self.name}.linear.bias" in self.shapes:
            y = Add(y, context.param(f"{self.name}.linear.bias"))
        y = ACTIVATIONS[self.activation](y)
        if not self.residual:
            return y
        projection = f"{self.name}.residual.weight"
        return Add(y, _linear(x, context.param(projection)) if projection in self.shapes else x)


@dataclass(frozen=True)
class LayerNormalize(Module):
    """Layer norm, with torch's default epsilon."""

    def apply(self, x: Value, context: Context) -> Value:
        return LayerNorm(x, context.param(f"{self.name}.norm.weight"), context.param(f"{self.name}.norm.bias"), 1e-5)


@dataclass(frozen=True)
class Normalize(Module):
    """Length 1, of what is not 0."""

    def apply(self, x: Value, context: Context) -> Value:
        length = Sqrt(Sum(Mul(x, x), (x.rank - 1,)))
        return Div(x, Maximum(length, constant(1e-12, "f32")))


@dataclass(frozen=True, kw_only=True)
class Truncate(Module):
    """The first features alone, which the library does last of all and without another normalization."""

    most: int

    def apply(self, x: Value, context: Context) -> Value:
        return self.of(x)

    def of(self, x: Value) -> Value:
        """The first features of [1, features]."""
        width = x.shape[x.rank - 1]
        assert isinstance(width, int)
        return Slice(x, x.rank - 1, 0, min(self.most, width))


def _linear(x: Value, w: Value) -> Value:
    return Matmul(x, Transpose(w, (1, 0)))


def embedding_of(modules: Sequence[Module], tokens: Value, context: Context) -> Value:
    """What modules make, one after another, of token embeddings [1, S, features]: one embedding [1, features]."""
    values = {TOKEN_EMBEDDINGS: tokens}
    for module in modules:
        if module.reads not in values:
            raise FrontendError(f"{module.directory}: it works on {module.reads}, which no module before it makes")
        try:
            values[module.writes] = module.apply(values[module.reads], context)
        except IRError as error:
            raise FrontendError(f"{module.directory} does not fit what stands before it: {error}") from error
    return values[SENTENCE]


def read_module(kind: str, name: str, directory: Path) -> Module:
    """The module of class `kind` in a directory, named by its path in the model; FrontendError if there is no such."""
    reader = _READERS.get(kind)
    if reader is None:
        raise FrontendError(
            f"{directory}: sentence-transformers module {kind!r:.60} is not supported; supported: {', '.join(_READERS)}"
        )
    path = directory / "config.json"
    # Old versions of the library write no config for modules without settings.
    settings = read_json(path) if path.exists() or kind != "Normalize" else {}
    return reader(name, directory, settings)


def _features(settings: Mapping[str, object], directory: Path) -> tuple[str, str]:
    """What a module reads, which it also writes: only pooling makes one vector of all tokens."""
    reads = settings.get("module_input_name") or SENTENCE
    writes = settings.get("module_output_name") or reads
    if reads not in (TOKEN_EMBEDDINGS, SENTENCE):
        raise FrontendError(f"{directory}: a module works on {reads!r:.60}, which is not supported")
    if writes != reads:
        raise FrontendError(f"{directory}: a module writes {writes!r:.60} of {reads}, which is not supported")
    return str(reads), str(reads)


def _number(settings: Mapping[str, object], name: str, directory: Path) -> int:
    number = settings.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= _MOST_FEATURES:
        raise FrontendError(f"{directory / 'config.json'}: {name} is {number!r:.40}, which is no number of features")
    return number


def _read_pooling(name: str, directory: Path, settings: Mapping[str, object]) -> Module:
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if settings.get(flag)] or ["mean"]
    listed = [str(mode) for mode in modes] if isinstance(modes, list) else [str(modes)]
    unknown = [mode for mode in listed if mode not in MODES]
    if unknown or not listed:
        raise FrontendError(f"{directory / 'config.json'}: pooling mode {unknown!r:.60} is none of {', '.join(MODES)}")
    include = bool(settings.get("include_prompt", True))
    return Pooling(name, directory, TOKEN_EMBEDDINGS, SENTENCE, {}, tuple(listed), include)


def _read_dense(name: str, directory: Path, settings: Mapping[str, object]) -> Module:
    inputs, outputs = _number(settings, "in_features", directory), _number(settings, "out_features", directory)
    spelled = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = str(spelled).rpartition(".")[2]
    if not str(spelled).startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise FrontendError(
            f"{directory / 'config.json'}: activation {spelled!r:.80} is not supported; supported are torch.nn's "
            f"{', '.join(ACTIVATIONS)}"
        )
    shapes: dict[str, tuple[int, ...]] = {f"{name}.linear.weight": (outputs, inputs)}
    if settings.get("bias", True):
        shapes[f"{name}.linear.bias"] = (outputs,)
    residual = bool(settings.get("use_residual"))
    if residual and inputs != outputs:
        shapes[f"{name}.residual.weight"] = (outputs, inputs)
    return Dense(name, directory, *_features(settings, directory), shapes, activation=activation, residual=residual)


def _read_layer_norm(name: str, directory: Path, settings: Mapping[str, object]) -> Module:
    size = (_number(settings, "dimension", directory),)
    shapes = {f"{name}.norm.weight": size, f"{name}.norm.bias": size}
    return LayerNormalize(name, directory, SENTENCE, SENTENCE, shapes)


def _read_normalize(name: str, directory: Path, settings: Mapping[str, object]) -> Module:
    return Normalize(name, directory, *_features(settings, directory))


_READERS: dict[str, Callable[[str, Path, Mapping[str, object]], Module]] = {
    "Pooling": _read_pooling,
    "Dense": _read_dense,
    "LayerNorm": _read_layer_norm,
    "Normalize": _read_normalize,
}


class _Prefixed:
    """A source whose names all begin with a prefix."""

    def __init__(self, source: WeightSource, prefix: str) -> None:
        self._source, self._prefix = source, prefix

    @property
    def names(self) -> list[str]:
        return [self._prefix + name for name in self._source.names]

    def dtype(self, name: str) -> str:
        return self._source.dtype(name.removeprefix(self._prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name.removeprefix(self._prefix))

    def load(self, name: str) -> Array:
        value = self._source.load(name.removeprefix(self._prefix))
        if not is_finite(value):
            raise FrontendError(f"weight {name} holds NaN or infinity: the model is damaged; download it again")
        return value
