"""The manifest: what an artifact says about itself, parsed strictly.

Every field that the runtime acts upon is checked for type and range here, so that the rest of the runtime can trust
it: a damaged or hostile manifest is an `ArtifactError`, never a crash. Fields that only people read (kernels, memory
plan, provenance) are kept as they are.

    {"schema": 1, "abi": 6, "llmc_version": "0.1.0", "task": "generate" | "encode" | "run",
     "model": {"name", "source", "parameters", "bits_per_weight"},
     "target": {"name", "arch": "x86_64", "features": ["avx2", ...], "device": "host", also if missing,
                "glibc": "2.17", if known},
     "step": {"max_step", "page", "tile", "max_splits", "part", "arena_bytes", "vocab_size",
              "state": "paged" | "none" | "ragged" | "run", "regimes": [greatest length of each but the last],
              "row_kinds": true where prompts and decoding are computed differently,
              "calls": ["what the n-th profile entry measures", ...],
              "costs": [{"bytes", "operations": {"": number, "T": number, "T*KEYS": number, ...}, "arithmetic": "f32",
                         "when": [[symbol, low, high | null], ...], "calls": [numbers of calls]}],
              "limits": [{"name": "read" | "int8" | ..., "symbol", "amount", "input_bytes"}]},
     "inputs", "outputs": [{"name", "dtype": numpy's name, "shape": [4, "batch", "2*batch + 1", ...]}],
     "symbols": [{"name", "low", "high"}], in the order of the step's `dims`,
     "encoder": null | {"kind": "embedding" | "classification" | "tokens", "output": name, "labels": null | [...],
                        "multi_label", "plain_scores", "max_tokens", "prompts": {name: text},
                        "default_prompt": null | name, "normalized"},
     "max_context": 4096,
     "kv": {"layers": [{"kv_heads", "head_dim", "value_dim", "dtype": "float16" | "float32", "window": null | n}]},
     "weights": {"bytes", "hash", "tensors": [{"name", "offset", "nbytes", "type"}]},
     "tokenizer": null | {"chat_template", "chat_templates": {name: text}, "bos_id", "bos_token", "eos_token",
                          "special_tokens": {"pad_token": ...}, "add_bos", "stop_ids", "clean_up_spaces",
                          "split_special_tokens", "truncation_side": null | "left" | "right", "token_types"},
     "generation": {any of `GenerationSettings`},
     "accuracy": null | {"tensors": [{"name", "encoding", "bits", "numbers", "weight_error", "output_error": null | n}],
                         "text": null | {...}, "vectors": null | {...}}: `runtime/accuracy.py` says what these are,
     "adapters": null | {"count", "rank", "tables"}: `runtime/adapter_facts.py` says what these are,
     "kernels": [...], "memory": {...}, "provenance": {...}}
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmc.runtime.accuracy import Accuracy, parse_accuracy
from llmc.runtime.adapter_facts import AdapterFacts, parse_adapters
from llmc.runtime.errors import ArtifactError
from llmc.runtime.json_reader import MOST, Reader, refuse
from llmc.runtime.settings import GenerationSettings
from llmc.runtime.sizes import NAME, NamedSize, Size, SizeError, names_of, parse_size

SCHEMA = 1
ABI = 8

Json = Mapping[str, object]
# Terms of a sum: the symbols that are multiplied, and a factor. `targets/call_facts.py` says what the symbols are.
Polynomial = tuple[tuple[tuple[str, ...], float], ...]
_STATES = {"generate": ("paged", "none"), "encode": ("ragged", "none"), "run": ("run",)}
_TOKEN_SIZES = frozenset("TSB")  # tokens (of one sequence: S) and sequences: what outputs of an encoder have rows of
_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
    "uint8", "bool",
)  # fmt: skip
_MOST_AXES = 16
_MOST_CONTEXT = 1 << 31
# Floats, and what is encoded: kernels only multiply with these.
_NO_INDICES = re.compile(r"tensor<\[[^\[\]<>]*\], (f64|f32|f16|bf16|[a-z0-9]+, [^<>]+)>")
_COST_SYMBOL = re.compile(r"[TSQBMR]|SPLITS|PROMPT|ADAPTED|(KEYS|PAIRS)[0-9]{0,9}")


@dataclass(frozen=True)
class ModelFacts:
    """Where the model came from. source: what `llmc compile` was given. bits_per_weight: padding included."""

    name: str
    source: str
    parameters: int
    bits_per_weight: float


@dataclass(frozen=True)
class TargetFacts:
    """What the code needs. features: in LLVM's spelling. device: the kind that runs steps (`runtime/devices.py`).
    glibc: the least version of the system's library, "2.17"; empty: none is known."""

    name: str
    arch: str
    features: frozenset[str]
    device: str = "host"
    glibc: str = ""


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
    """The limits of one step. page: tokens a cache page; tile: rows a query tile at most; part: tokens of the parts
    that attention takes a context in, doubled where those would be more than max_splits; arena_bytes: planned for
    max_step tokens; state: "paged" (a KV cache), "none" (every step sees one whole sequence), "ragged" (several whole
    sequences) or "run" (arrays of any kind). failures: what a step that returns 1, 2, ... has found wrong with its
    inputs.

    regimes: lengths of a sequence after which the model computes every token of it differently (rotary frequencies for
    long contexts), ascending; tokens in a cache are of one regime. row_kinds: rows of prompts and rows that decode are
    computed differently, so that a step has one kind only.
    """

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
    failures: tuple[str, ...] = ()
    regimes: tuple[int, ...] = ()
    part: int = 512
    row_kinds: bool = False

    def regime(self, length: int) -> int:
        """The regime that a sequence of so many tokens is computed in: 0, 1, ..."""
        return bisect.bisect_left(self.regimes, length)

    def length_in(self, regime: int) -> int:
        """A length of that regime: what `lengths` of a step says of its tokens."""
        return self.regimes[regime] if regime < len(self.regimes) else self.regimes[-1] + 1


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a page: keys [kv_heads, head_dim, page] and values [kv_heads, page, value_dim]."""

    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    window: int | None


@dataclass(frozen=True)
class ArrayFacts:
    """An input or an output. dtype: numpy's name, or "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class EncoderFacts:
    """What an encoder's outputs mean, and how texts become its inputs.

    kind: "embedding" (`output` is one vector a text), "classification" (one number a label and text) or "tokens" (one
    row a token). multi_label: labels do not exclude each other. plain_scores: a text's numbers are no probabilities.
    max_tokens: longer texts are cut. prompts: texts that go in front, by name. normalized: embeddings have length 1.
    padding: tokens with this id at a text's end are taken away; None: none are.
    """

    kind: str
    output: str
    labels: tuple[str, ...] | None
    multi_label: bool
    max_tokens: int
    prompts: Mapping[str, str]
    default_prompt: str | None
    normalized: bool
    plain_scores: bool = False
    padding: int | None = None


@dataclass(frozen=True)
class Tensor:
    """A weight's bytes in the weights section. type: as the compiler prints it, `tensor<[4, 8], f32, q4g32>`."""

    name: str
    offset: int
    nbytes: int
    type: str = ""

    @property
    def may_be_indices(self) -> bool:
        """Whether steps may look something up by its numbers: plain integers, and what does not say what it is."""
        return _NO_INDICES.fullmatch(self.type) is None


@dataclass(frozen=True)
class TextFacts:
    """How text becomes tokens, beyond tokenizer.json. add_bos: put bos_id in front where the tokenizer did not.

    clean_up_spaces: take spaces before punctuation out of decoded text. split_special_tokens: in text that is encoded,
    special tokens are text like any other. truncation_side: where texts that are too long lose tokens; None: as
    tokenizer.json says. token_types: how many the model knows, where the tokenizer tells tokens apart by type; 0: all
    are of type 0. chat_templates: those that the checkpoint has under other names than the default one.
    """

    chat_template: str | None
    bos_id: int | None
    bos_token: str
    eos_token: str
    special_tokens: Mapping[str, str]
    add_bos: bool
    stop_ids: tuple[int, ...]
    clean_up_spaces: bool
    split_special_tokens: bool = False
    truncation_side: str | None = None
    token_types: int = 0
    chat_templates: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A manifest whose every used field has been checked."""

    llmc_version: str
    task: str
    model: ModelFacts
    target: TargetFacts
    step: StepFacts
    inputs: tuple[ArrayFacts, ...]
    outputs: tuple[ArrayFacts, ...]
    symbols: tuple[NamedSize, ...]
    encoder: EncoderFacts | None
    max_context: int
    layers: tuple[LayerCache, ...]
    weights_bytes: int
    weights_hash: str | None
    tensors: tuple[Tensor, ...]
    text: TextFacts | None
    generation: GenerationSettings
    accuracy: Accuracy | None
    adapters: AdapterFacts | None
    raw: Json = field(repr=False)

    @property
    def has_indices(self) -> bool:
        """Whether weights may hold places in a table. Compiling proved those to be in it (`compiler/ir/ranges.py` reads
        them), so that kernels trust them: damaged ones would be read outside of it."""
        return not self.tensors or any(tensor.may_be_indices for tensor in self.tensors)

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


def parse(data: bytes) -> Manifest:
    """The manifest in `data`, or an `ArtifactError` that names the first field which is wrong."""
    try:
        raw = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the manifest is not JSON ({error}). Compile the model again") from error
    top = Reader(raw, "")
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
    task = top.string("task", ("generate", "encode", "run"))
    symbols = tuple(_symbol(item) for item in top.children("symbols"))
    if len({symbol.name for symbol in symbols}) != len(symbols):
        raise refuse("symbols", "of different names", [symbol.name for symbol in symbols])
    step = _step(top.child("step"), _STATES[task], frozenset(symbol.name for symbol in symbols))
    known = frozenset(symbol.name for symbol in symbols) if task == "run" else _TOKEN_SIZES
    outputs = _arrays(top, "outputs", known)
    max_context = top.integer("max_context", 1, 1 << 30)
    weights = top.child("weights")
    weights_bytes = weights.integer("bytes")
    return Manifest(
        llmc_version=top.string("llmc_version"),
        task=task,
        model=_model(top.child("model")),
        target=_target(top.child("target")),
        step=step,
        inputs=_arrays(top, "inputs", known),
        outputs=outputs,
        symbols=symbols,
        encoder=None
        if top.value.get("encoder") is None
        else _encoder(top.child("encoder"), outputs, min(max_context, step.max_step)),
        max_context=max_context,
        layers=_layers(top.child("kv"), step),
        weights_bytes=weights_bytes,
        weights_hash=weights.string("hash") if "hash" in weights.value else None,
        tensors=_tensors(weights, weights_bytes),
        text=None if top.value.get("tokenizer") is None else _text(top, step.vocab_size),
        generation=_generation(Reader(top.value.get("generation", {}), "generation")),
        accuracy=None if top.value.get("accuracy") is None else parse_accuracy(top.child("accuracy")),
        adapters=None if top.value.get("adapters") is None else parse_adapters(top.child("adapters")),
        raw=top.value,
    )


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a JSON number")


def _model(reader: Reader) -> ModelFacts:
    return ModelFacts(
        name=reader.string("name"),
        source=reader.string("source"),
        parameters=reader.integer("parameters"),
        bits_per_weight=reader.number("bits_per_weight", 0, 1e18),
    )


def _target(reader: Reader) -> TargetFacts:
    return TargetFacts(
        reader.string("name"),
        reader.string("arch"),
        frozenset(reader.strings("features")),
        reader.string("device", default="host"),
        _glibc(reader),
    )


def _glibc(reader: Reader) -> str:
    text = reader.string("glibc", default="")
    if text and not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4}){1,3}", text):
        raise refuse("target.glibc", "a version like 2.17", text)
    return text


def _symbol(reader: Reader) -> NamedSize:
    low = reader.integer("low", 0, 1 << 40)
    return NamedSize(_name(reader, "name"), low, reader.integer("high", low, 1 << 40))


def _name(reader: Reader, key: str) -> str:
    name = reader.string(key)
    if not NAME.match(name):
        raise refuse(f"{reader.path}.{key}", "a name of letters, digits and _", name)
    return name


def _arrays(top: Reader, key: str, known: frozenset[str]) -> tuple[ArrayFacts, ...]:
    """Inputs or outputs; their sizes are made of the sizes that are `known`."""
    arrays = []
    for reader in top.children(key):
        shape = []
        for item in reader.array("shape"):
            try:
                size = parse_size(item)
            except SizeError as error:
                raise refuse(f"{reader.path}.shape", f"a list of sizes ({error})", item) from error
            if not names_of(size) <= known:
                raise refuse(f"{reader.path}.shape", f"made of {', '.join(sorted(known)) or 'numbers'}", item)
            shape.append(size)
        if len(shape) > _MOST_AXES:
            raise refuse(f"{reader.path}.shape", f"a list of at most {_MOST_AXES} sizes", reader.value["shape"])
        arrays.append(ArrayFacts(reader.string("name"), reader.string("dtype", _DTYPES), tuple(shape)))
    names = [array.name for array in arrays]
    if len(set(names)) != len(names):
        raise refuse(key, "of different names", names)
    return tuple(arrays)


def _encoder(reader: Reader, outputs: tuple[ArrayFacts, ...], most_tokens: int) -> EncoderFacts:
    labels = None if reader.value.get("labels") is None else reader.strings("labels")
    prompts = Reader(reader.value.get("prompts", {}), "encoder.prompts")
    facts = EncoderFacts(
        kind=reader.string("kind", ("embedding", "classification", "tokens")),
        output=reader.string("output", tuple(array.name for array in outputs)),
        labels=labels,
        multi_label=reader.boolean("multi_label", False),
        max_tokens=reader.integer("max_tokens", 1, most_tokens),
        prompts={key: prompts.string(key) for key in prompts.value},
        default_prompt=None if reader.value.get("default_prompt") is None else reader.string("default_prompt"),
        normalized=reader.boolean("normalized", False),
        plain_scores=reader.boolean("plain_scores", False),
        padding=reader.optional_integer("padding", 0, MOST),
    )
    if facts.default_prompt is not None and facts.default_prompt not in facts.prompts:
        raise refuse("encoder.default_prompt", "the name of a prompt", facts.default_prompt)
    shape = next((array.shape for array in outputs if array.name == facts.output), ())
    per_token = bool(shape) and bool(names_of(shape[0]) & {"T", "S"})
    rest = [size[0] for size in shape[1:] if len(size) == 1 and type(size[0]) is int]
    whole = len(rest) == len(shape[1:]) and (facts.kind != "embedding" or len(shape) == 2)
    if not shape or not whole or per_token != (facts.kind == "tokens"):
        row = "token" if facts.kind == "tokens" else "text"
        raise refuse("encoder.output", f"an output of a row a {row}", facts.output)
    if labels is not None and facts.kind != "embedding" and math.prod(rest) != len(labels):
        raise refuse("encoder.labels", f"a list of {math.prod(rest)}, as {facts.output} has so many columns", labels)
    return facts


def _step(reader: Reader, states: tuple[str, ...], symbols: frozenset[str]) -> StepFacts:
    calls = reader.strings("calls", default=[])
    return StepFacts(
        max_step=reader.integer("max_step", 1, 1 << 20),
        page=reader.integer("page", 1, 1 << 16),
        tile=reader.integer("tile", 1, 1 << 16),
        max_splits=reader.integer("max_splits", 1, 1 << 10, default=16),
        arena_bytes=reader.integer("arena_bytes", 0, 1 << 44),
        vocab_size=reader.integer("vocab_size", 1, 1 << 26),
        state=reader.string("state", states),
        calls=calls,
        costs=tuple(_cost(item, len(calls), symbols) for item in reader.children("costs")),
        limits=tuple(_limit(item) for item in reader.children("limits")),
        failures=tuple(reader.strings("failures", default=[])),
        regimes=_regimes(reader),
        part=reader.integer("part", 1, 1 << 30, default=512),
        row_kinds=reader.boolean("row_kinds", default=False),
    )


def _regimes(reader: Reader) -> tuple[int, ...]:
    found: list[int] = []
    for item in reader.array("regimes", []):
        if type(item) is not int or not (found[-1] if found else 0) < item < _MOST_CONTEXT:
            raise refuse(f"{reader.path}.regimes", "a list of ascending lengths", item)
        found.append(item)
    return tuple(found)


def _cost(reader: Reader, calls: int, symbols: frozenset[str]) -> CallCost:
    guards = []
    for guard in reader.array("when", []):
        if not (isinstance(guard, list) and len(guard) == 3 and _is_cost_symbol(guard[0], symbols)):
            raise refuse(f"{reader.path}.when", "a list of [symbol, low, high]", guard)
        name, low, high = guard
        if type(low) is not int or not (high is None or type(high) is int):
            raise refuse(f"{reader.path}.when", "a list of [symbol, low, high]", guard)
        guards.append((str(name), low, high))
    numbers: list[int] = []
    for number in reader.array("calls"):
        if type(number) is not int or not 0 <= number < calls:
            raise refuse(f"{reader.path}.calls", f"a list of numbers below {calls}", number)
        numbers.append(number)
    return CallCost(
        bytes=_polynomial(reader.child("bytes"), symbols),
        operations=_polynomial(reader.child("operations"), symbols),
        arithmetic=reader.string("arithmetic"),
        when=tuple(guards),
        calls=tuple(numbers),
    )


def _polynomial(reader: Reader, symbols: frozenset[str]) -> Polynomial:
    terms = []
    for monomial in reader.value:
        names = tuple(monomial.split("*")) if monomial else ()
        if not all(_is_cost_symbol(name, symbols) for name in names):
            raise refuse(reader.path, "a polynomial over the sizes of a step", monomial)
        terms.append((names, reader.number(monomial, -1e18, 1e18)))
    return tuple(terms)


def _is_cost_symbol(name: object, symbols: frozenset[str]) -> bool:
    """Whether a step has such a size: one with a name of the model's own, or else one that every step has."""
    return isinstance(name, str) and (name in symbols if symbols else _COST_SYMBOL.fullmatch(name) is not None)


def _limit(reader: Reader) -> LimitFacts:
    symbol = reader.string("symbol")
    if not symbol.startswith("llmc_limit_"):
        raise refuse(f"{reader.path}.symbol", "the name of a limit kernel", symbol)
    return LimitFacts(
        name=reader.string("name"),
        symbol=symbol,
        amount=reader.integer("amount", 1, 1 << 30),
        input_bytes=reader.integer("input_bytes", 0, 1 << 30),
    )


def _layers(reader: Reader, step: StepFacts) -> tuple[LayerCache, ...]:
    layers = []
    for index, value in enumerate(reader.array("layers")):
        layer = Reader(value, f"kv.layers[{index}]")
        layers.append(
            LayerCache(
                kv_heads=layer.integer("kv_heads", 1, 1 << 16),
                head_dim=layer.integer("head_dim", 1, 1 << 16),
                value_dim=layer.integer("value_dim", 1, 1 << 16),
                dtype=layer.string("dtype", ("float16", "float32")),
                window=layer.optional_integer("window", 1, MOST),
            )
        )
    if layers and step.state in ("none", "run"):
        raise ArtifactError("the manifest cannot be used: kv.layers without a paged state. Compile the model again")
    return tuple(layers)


def _tensors(reader: Reader, total: int) -> tuple[Tensor, ...]:
    tensors = []
    for index, value in enumerate(reader.array("tensors")):
        entry = Reader(value, f"weights.tensors[{index}]")
        offset = entry.integer("offset", 0, total)
        nbytes = entry.integer("nbytes", 0, total - offset)
        tensors.append(Tensor(entry.string("name"), offset, nbytes, entry.string("type", default="")))
    return tuple(tensors)


def _text(top: Reader, vocab_size: int) -> TextFacts:
    reader = top.child("tokenizer")
    encoder = top.value.get("encoder")
    typed = isinstance(encoder, dict) and encoder.get("pair_types") is True  # where older artifacts have it
    stop_ids = []
    for value in reader.array("stop_ids"):
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise refuse("tokenizer.stop_ids", "a list of token ids", value)
        stop_ids.append(value)
    special = Reader(reader.value.get("special_tokens", {}), "tokenizer.special_tokens")
    templates = Reader(reader.value.get("chat_templates", {}), "tokenizer.chat_templates")
    return TextFacts(
        chat_template=None if reader.value.get("chat_template") is None else reader.string("chat_template"),
        bos_id=reader.optional_integer("bos_id", 0, vocab_size - 1),
        bos_token=_string_or_empty(reader, "bos_token"),
        eos_token=_string_or_empty(reader, "eos_token"),
        special_tokens={key: special.string(key) for key in special.value},
        add_bos=reader.boolean("add_bos", False),
        stop_ids=tuple(stop_ids),
        clean_up_spaces=reader.boolean("clean_up_spaces", False),
        split_special_tokens=reader.boolean("split_special_tokens", False),
        truncation_side=None
        if reader.value.get("truncation_side") is None
        else reader.string("truncation_side", ("left", "right")),
        token_types=reader.integer("token_types", 0, 1 << 16, default=2 if typed else 0),
        chat_templates={name: templates.string(name) for name in templates.value},
    )


def _string_or_empty(reader: Reader, key: str) -> str:
    return "" if reader.value.get(key) is None else reader.string(key)


def _generation(reader: Reader) -> GenerationSettings:
    """The checkpoint's own settings; names that this version does not know cannot be obeyed, and are refused."""
    try:
        return GenerationSettings().changed(reader.value)
    except (KeyError, ValueError) as error:
        raise ArtifactError(
            f"the manifest cannot be used: generation.{str(error).strip(chr(39))}. Compile the model again"
        ) from None
