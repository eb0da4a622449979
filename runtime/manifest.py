"""The manifest: what an artifact says about itself, parsed strictly.

Every field that the runtime acts upon is checked for type and range here, so that the rest of the runtime can trust
it: a damaged or hostile manifest is an `ArtifactError`, never a crash. Fields that only people read (kernels, memory
plan, provenance) are kept as they are.

    {"schema": 1, "abi": 1, "llmc_version": "0.1.0",
     "model": {"name", "source", "parameters", "bits_per_weight"},
     "target": {"name", "arch": "x86_64", "features": ["avx2", ...]},
     "step": {"max_step", "page", "tile", "max_splits", "arena_bytes", "vocab_size", "state": "paged" | "none",
              "calls": ["what the n-th profile entry measures", ...],
              "costs": [{"bytes", "operations": {"": number, "T": number, "T*KEYS": number, ...}, "arithmetic": "f32",
                         "when": [[symbol, low, high | null], ...], "calls": [numbers of calls]}],
              "limits": [{"name": "read" | "int8" | ..., "symbol", "amount", "input_bytes"}]},
     "max_context": 4096,
     "kv": {"layers": [{"kv_heads", "head_dim", "value_dim", "dtype": "float16" | "float32", "window": null | n}]},
     "weights": {"bytes", "hash", "tensors": [{"name", "offset", "nbytes"}]},
     "tokenizer": null | {"chat_template", "bos_id", "bos_token", "eos_token", "special_tokens": {"pad_token": ...},
                          "add_bos", "stop_ids", "clean_up_spaces"},
     "generation": {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"},
     "kernels": [...], "memory": {...}, "provenance": {...}}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmc.runtime.errors import ArtifactError

SCHEMA = 1
ABI = 1
_MOST = 1 << 62  # no size, offset or count is larger

Json = Mapping[str, object]
# Terms of a sum: the symbols that are multiplied, and a factor. `targets/call_facts.py` says what the symbols are.
Polynomial = tuple[tuple[tuple[str, ...], float], ...]
_COST_SYMBOL = re.compile(r"[TSQBMR]|SPLITS|(KEYS|PAIRS)[0-9]{0,9}")


@dataclass(frozen=True)
class ModelFacts:
    """Where the model came from. source: what `llmc compile` was given."""

    name: str
    source: str
    parameters: int
    bits_per_weight: float


@dataclass(frozen=True)
class TargetFacts:
    """What the code needs. features: in LLVM's spelling."""

    name: str
    arch: str
    features: frozenset[str]


@dataclass(frozen=True)
class CallCost:
    """What some calls of a step cost each: bytes from memory, and operations on numbers of the kind `arithmetic`.

    when: (symbol, low, high) guards; all must hold for the calls to be made. calls: their numbers.
    """

    bytes: Polynomial
    operations: Polynomial
    arithmetic: str
    when: tuple[tuple[str, int, int | None], ...]
    calls: tuple[int, ...]


@dataclass(frozen=True)
class LimitFacts:
    """A function of the artifact that measures a limit of the machine; `runtime/limits.py` has what the fields say."""

    name: str
    symbol: str
    amount: int
    input_bytes: int


@dataclass(frozen=True)
class StepFacts:
    """The limits of one step. page: tokens a cache page; tile: rows a query tile at most; arena_bytes: planned for
    max_step tokens; state: "paged" (a KV cache) or "none" (every step sees whole sequences)."""

    max_step: int
    page: int
    tile: int
    max_splits: int
    arena_bytes: int
    vocab_size: int
    state: str
    calls: tuple[str, ...]
    costs: tuple[CallCost, ...] = ()
    limits: tuple[LimitFacts, ...] = ()


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a page: keys [kv_heads, head_dim, page] and values [kv_heads, page, value_dim]."""

    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    window: int | None


@dataclass(frozen=True)
class Tensor:
    """A weight's bytes in the weights section."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TextFacts:
    """How text becomes tokens, beyond tokenizer.json. add_bos: put bos_id in front where the tokenizer did not."""

    chat_template: str | None
    bos_id: int | None
    bos_token: str
    eos_token: str
    special_tokens: Mapping[str, str]
    add_bos: bool
    stop_ids: tuple[int, ...]
    clean_up_spaces: bool


@dataclass(frozen=True)
class GenerationDefaults:
    """The checkpoint's own sampling settings; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Manifest:
    """A manifest whose every used field has been checked."""

    llmc_version: str
    model: ModelFacts
    target: TargetFacts
    step: StepFacts
    max_context: int
    layers: tuple[LayerCache, ...]
    weights_bytes: int
    weights_hash: str | None
    tensors: tuple[Tensor, ...]
    text: TextFacts | None
    generation: GenerationDefaults
    raw: Json = field(repr=False)

    @property
    def bytes_per_page(self) -> int:
        """Cache bytes of one page over all layers."""
        return sum(
            layer.kv_heads
            * (layer.head_dim + layer.value_dim)
            * self.step.page
            * (2 if layer.dtype == "float16" else 4)
            for layer in self.layers
        )


class _Reader:
    """Typed access to a JSON object; every refusal names the field."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise _refuse(path or "the manifest", "an object", value)
        self.value: dict[str, object] = value
        self.path = path

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def child(self, key: str) -> _Reader:
        return _Reader(self.value.get(key), self._name(key))

    def integer(self, key: str, low: int = 0, high: int = _MOST, default: int | None = None) -> int:
        value = self.value.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise _refuse(self._name(key), f"an integer in {low}..{high}", value)
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return None if self.value.get(key) is None else self.integer(key, low, high)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.value.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
            raise _refuse(self._name(key), f"a number in {low:g}..{high:g}", value)
        return float(value)  # type: ignore[arg-type]

    def string(self, key: str, choices: tuple[str, ...] = (), default: str | None = None) -> str:
        value = self.value.get(key, default)
        if not isinstance(value, str) or (choices and value not in choices):
            raise _refuse(self._name(key), " or ".join(map(repr, choices)) or "a string", value)
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.value.get(key, default)
        if not isinstance(value, bool):
            raise _refuse(self._name(key), "true or false", value)
        return value

    def array(self, key: str, default: list[object] | None = None) -> list[object]:
        value = self.value.get(key, default)
        if not isinstance(value, list):
            raise _refuse(self._name(key), "a list", value)
        return value

    def children(self, key: str) -> list[_Reader]:
        """The objects of a list, which may be missing."""
        return [_Reader(value, f"{self._name(key)}[{index}]") for index, value in enumerate(self.array(key, []))]

    def strings(self, key: str, default: list[object] | None = None) -> tuple[str, ...]:
        values = self.array(key, default)
        for value in values:
            if not isinstance(value, str):
                raise _refuse(self._name(key), "a list of strings", value)
        return tuple(str(value) for value in values)


def _refuse(name: str, wanted: str, value: object) -> ArtifactError:
    shown = "missing" if value is None else f"{value!r:.60}"
    return ArtifactError(
        f"the manifest cannot be used: {name} must be {wanted}, and is {shown}. Compile the model again"
    )


def parse(data: bytes) -> Manifest:
    """The manifest in `data`, or an `ArtifactError` that names the first field which is wrong."""
    try:
        raw = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the manifest is not JSON ({error}). Compile the model again") from error
    top = _Reader(raw, "")
    schema = top.integer("schema")
    if schema != SCHEMA:
        newer = "a newer" if schema > SCHEMA else "an older"
        raise ArtifactError(
            f"the artifact was made by {newer} llmc ({top.value.get('llmc_version')!r:.40}, schema {schema}; this one "
            f"reads schema {SCHEMA}): compile the model again, or install the version that made it"
        )
    abi = top.integer("abi")
    if abi != ABI:
        raise ArtifactError(f"the artifact's step has ABI {abi}, and this runtime calls ABI {ABI}: compile again")
    step = _step(top.child("step"))
    weights = top.child("weights")
    weights_bytes = weights.integer("bytes")
    return Manifest(
        llmc_version=top.string("llmc_version"),
        model=_model(top.child("model")),
        target=_target(top.child("target")),
        step=step,
        max_context=top.integer("max_context", 1, 1 << 30),
        layers=_layers(top.child("kv"), step),
        weights_bytes=weights_bytes,
        weights_hash=weights.string("hash") if "hash" in weights.value else None,
        tensors=_tensors(weights, weights_bytes),
        text=None if top.value.get("tokenizer") is None else _text(top.child("tokenizer"), step.vocab_size),
        generation=_generation(_Reader(top.value.get("generation", {}), "generation"), step.vocab_size),
        raw=top.value,
    )


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a JSON number")


def _model(reader: _Reader) -> ModelFacts:
    return ModelFacts(
        name=reader.string("name"),
        source=reader.string("source"),
        parameters=reader.integer("parameters"),
        bits_per_weight=reader.number("bits_per_weight", 0, 64),
    )


def _target(reader: _Reader) -> TargetFacts:
    return TargetFacts(reader.string("name"), reader.string("arch"), frozenset(reader.strings("features")))


def _step(reader: _Reader) -> StepFacts:
    calls = reader.strings("calls", default=[])
    return StepFacts(
        max_step=reader.integer("max_step", 1, 1 << 20),
        page=reader.integer("page", 1, 1 << 16),
        tile=reader.integer("tile", 1, 1 << 16),
        max_splits=reader.integer("max_splits", 1, 1 << 10, default=16),
        arena_bytes=reader.integer("arena_bytes", 0, 1 << 44),
        vocab_size=reader.integer("vocab_size", 1, 1 << 26),
        state=reader.string("state", ("paged", "none")),
        calls=calls,
        costs=tuple(_cost(item, len(calls)) for item in reader.children("costs")),
        limits=tuple(_limit(item) for item in reader.children("limits")),
    )


def _cost(reader: _Reader, calls: int) -> CallCost:
    guards = []
    for guard in reader.array("when", []):
        if not (isinstance(guard, list) and len(guard) == 3 and _is_cost_symbol(guard[0])):
            raise _refuse(f"{reader.path}.when", "a list of [symbol, low, high]", guard)
        name, low, high = guard
        if type(low) is not int or not (high is None or type(high) is int):
            raise _refuse(f"{reader.path}.when", "a list of [symbol, low, high]", guard)
        guards.append((str(name), low, high))
    numbers: list[int] = []
    for number in reader.array("calls"):
        if type(number) is not int or not 0 <= number < calls:
            raise _refuse(f"{reader.path}.calls", f"a list of numbers below {calls}", number)
        numbers.append(number)
    return CallCost(
        bytes=_polynomial(reader.child("bytes")),
        operations=_polynomial(reader.child("operations")),
        arithmetic=reader.string("arithmetic"),
        when=tuple(guards),
        calls=tuple(numbers),
    )


def _polynomial(reader: _Reader) -> Polynomial:
    terms = []
    for monomial in reader.value:
        names = tuple(monomial.split("*")) if monomial else ()
        if not all(map(_is_cost_symbol, names)):
            raise _refuse(reader.path, "a polynomial over the sizes of a step", monomial)
        terms.append((names, reader.number(monomial, -1e18, 1e18)))
    return tuple(terms)


def _is_cost_symbol(name: object) -> bool:
    return isinstance(name, str) and _COST_SYMBOL.fullmatch(name) is not None


def _limit(reader: _Reader) -> LimitFacts:
    symbol = reader.string("symbol")
    if not symbol.startswith("llmc_limit_"):
        raise _refuse(f"{reader.path}.symbol", "the name of a limit kernel", symbol)
    return LimitFacts(
        name=reader.string("name"),
        symbol=symbol,
        amount=reader.integer("amount", 1, 1 << 30),
        input_bytes=reader.integer("input_bytes", 0, 1 << 30),
    )


def _layers(reader: _Reader, step: StepFacts) -> tuple[LayerCache, ...]:
    layers = []
    for index, value in enumerate(reader.array("layers")):
        layer = _Reader(value, f"kv.layers[{index}]")
        layers.append(
            LayerCache(
                kv_heads=layer.integer("kv_heads", 1, 1 << 16),
                head_dim=layer.integer("head_dim", 1, 1 << 16),
                value_dim=layer.integer("value_dim", 1, 1 << 16),
                dtype=layer.string("dtype", ("float16", "float32")),
                window=layer.optional_integer("window", 1, _MOST),
            )
        )
    if layers and step.state == "none":
        raise ArtifactError("the manifest cannot be used: kv.layers without a paged state. Compile the model again")
    return tuple(layers)


def _tensors(reader: _Reader, total: int) -> tuple[Tensor, ...]:
    tensors = []
    for index, value in enumerate(reader.array("tensors")):
        entry = _Reader(value, f"weights.tensors[{index}]")
        offset = entry.integer("offset", 0, total)
        tensors.append(Tensor(entry.string("name"), offset, entry.integer("nbytes", 0, total - offset)))
    return tuple(tensors)


def _text(reader: _Reader, vocab_size: int) -> TextFacts:
    stop_ids = []
    for value in reader.array("stop_ids"):
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise _refuse("tokenizer.stop_ids", "a list of token ids", value)
        stop_ids.append(value)
    special = _Reader(reader.value.get("special_tokens", {}), "tokenizer.special_tokens")
    return TextFacts(
        chat_template=None if reader.value.get("chat_template") is None else reader.string("chat_template"),
        bos_id=reader.optional_integer("bos_id", 0, vocab_size - 1),
        bos_token=_string_or_empty(reader, "bos_token"),
        eos_token=_string_or_empty(reader, "eos_token"),
        special_tokens={key: special.string(key) for key in special.value},
        add_bos=reader.boolean("add_bos", False),
        stop_ids=tuple(stop_ids),
        clean_up_spaces=reader.boolean("clean_up_spaces", False),
    )


def _string_or_empty(reader: _Reader, key: str) -> str:
    return "" if reader.value.get(key) is None else reader.string(key)


def _generation(reader: _Reader, vocab_size: int) -> GenerationDefaults:
    return GenerationDefaults(
        temperature=reader.number("temperature", 0, 1e6, default=0.0),
        top_k=reader.integer("top_k", 0, 1 << 31, default=0),
        top_p=reader.number("top_p", 0, 1, default=1.0),
        min_p=reader.number("min_p", 0, 1, default=0.0),
        repetition_penalty=reader.number("repetition_penalty", 1e-6, 1e6, default=1.0),
    )
