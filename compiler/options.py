"""What a compile can be asked for: one frozen record, checked when it is made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from llmc.compiler.ir.encoded import PAGE
from llmc.errors import CompileError

SCHEMES = ("none", "bf16", "f16", "int8", "int6", "int5", "int4", "int3", "int2")
AUTO = "auto"  # what the model is for decides
INTEGERS = tuple(scheme for scheme in SCHEMES if scheme.startswith("int"))
ACTIVATIONS = ("int8", "bf16", "f32")
CHANNEL = 0  # as a group size: one scale a row
GROUP_SIZES = (16, 32, 64, 128, 256, CHANNEL)
WEIGHT_SOURCES = ("embed", "random", "none")
MOST_CONTEXT = 1 << 28  # positions are int32, and no text is longer
MOST_STEP = 1 << 16  # the arena is planned for so many tokens at once
# Of a model whose accuracy is measured though nothing else takes long: some seconds on two cores, two products
# of its weights with 512 rows.
MEASURED_PARAMETERS = 1 << 27
MOST_ADAPTERS = 1024
MOST_RANK = 1024
MOST_DIM = 1 << 31  # of a size that a model names


# `fnmatch` patterns of weight names, without the characters that separate a pass's options.
_PATTERN = re.compile(r"[\w.*?\[\]!-]+")


@dataclass(frozen=True)
class CompileOptions:
    """How a model is to be compiled.

    target: a machine's name (`native`, `x86-64-v4`, ...), resolved by `llmc.targets`.
    quantization: the scheme of linear weights; "none" stores and computes f32. "auto": int4, but for an encoder the
    fewest bits by which its vectors stay near to the original's (`encoder_choice.py`).
    group_size: weights that share one scale, along the input dimension; 0, also given as "channel": all of an output
    channel. symmetric: no per-group minimum.
    activations: the lowest precision that inputs of matmuls may be rounded to; None: int8 for integer
    weights, bf16 for bf16, else f32.
    embedding, head: schemes of the token embedding and of the output head; None: the same as `quantization`, but where
    that is int5 or less, int6 for both. A head tied to the embedding has the embedding's scheme.
    overrides: (name pattern, scheme) pairs: the first pattern that matches a weight's name (`fnmatch`) decides.
    calibrate: what the inputs of linear layers are measured on, so that their weights' rounding errors make up for each
    other. "none": each weight is rounded for itself. "self": the model's own text (of an encoder, random ids).
    Anything else: besides, a file of text, or of JSON lines with a "text" where its name ends in .jsonl. None: "self"
    for a model of texts in int6 or less whose weights are embedded or go to a file, else "none".
    bits_per_weight: stored bits for each of the model's parameters, all parts counted. By what the model loses by each
    alone, weights get one bit fewer than their scheme has, or up to two more, as far as these last. None: a tenth of a
    bit more than the schemes take; where weights go to a file, which fits all artifacts of the model, all have their
    scheme.
    lora: directories of adapters, as PEFT writes them, that are merged into the weights.
    adapters: how many adapters there is room for, that are loaded at run time and chosen for each text. adapter_rank:
    the greatest rank of one. What is not loaded takes address space, and no memory.
    accuracy: whether the artifact tells how far it is from its original: each rounded matrix, and the outputs on text
    that the model writes. None: where weights are rounded to integers, and that takes long anyway or the model is small
    (`MEASURED_PARAMETERS`).
    max_context: the most tokens a sequence may have; None: what the model says. max_step: tokens a step at most;
    None: 512, and 2,048 for encoders, whose batches then share a step.
    max_dims: (name, greatest value) of free sizes of a graph that is not text; others have defaults.
    dims: (name, value) of free sizes of such a graph that are numbers.
    weights: "embed" puts them into the artifact, "random" puts noise there, "none" leaves them out (they are given
    at load time), anything else is the path of a file that they are written to.
    check: evaluate the graph before and after every pass on random bindings, in f64.
    kernel_cache: where compiled kernels are kept; None: `~/.cache/llmc/kernels`. jobs: code generation threads.
    """

    target: str = "native"
    quantization: str = "int4"
    group_size: int = 64
    symmetric: bool = True
    activations: str | None = None
    embedding: str | None = None
    head: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    calibrate: str | None = None
    bits_per_weight: float | None = None
    lora: tuple[str, ...] = ()
    adapters: int = 0
    adapter_rank: int = 64
    accuracy: bool | None = None
    max_context: int | None = None
    max_step: int | None = None
    max_dims: tuple[tuple[str, int], ...] = ()
    dims: tuple[tuple[str, int], ...] = ()
    weights: str = "embed"
    check: bool = False
    kernel_cache: Path | None = None
    jobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("quantization (-q)", self.quantization, (*SCHEMES, AUTO))
        if str(self.group_size) == "channel":
            object.__setattr__(self, "group_size", CHANNEL)
        _choice("--group-size", self.group_size, GROUP_SIZES, "channel")
        _choice("--activations", self.activations, (None, *ACTIVATIONS))
        _choice("--embedding", self.embedding, (None, *SCHEMES))
        _choice("--head", self.head, (None, *SCHEMES))
        for pattern, scheme in self.overrides:
            _choice(f"--override {pattern}", scheme, SCHEMES)
            if not pattern:
                raise CompileError("--override needs a name pattern before the '=': --override '*.down_proj*=int8'")
            if not _PATTERN.fullmatch(pattern):
                raise CompileError(
                    f"--override {pattern!r}: a name pattern has letters, digits and ._-*?[], such as *.down_proj*"
                )
        if self.group_size == CHANNEL and not self.symmetric:
            raise CompileError("--asymmetric needs groups: with --group-size channel there are no minimums")
        given = (self.quantization, self.embedding, self.head, *(scheme for _, scheme in self.overrides))
        if self.group_size % 32 and (odd := {"int3", "int5"} & set(given)):
            raise CompileError(
                f"{min(odd)} needs --group-size 32 or more: {self.group_size} weights of 3 or 5 bits fill half a vector"
            )
        if not isinstance(self.lora, tuple) or not all(isinstance(each, str) and each for each in self.lora):
            raise CompileError(f"--lora needs directories of adapters, not {self.lora!r:.60}")
        _in_range("--adapters", self.adapters, 0, MOST_ADAPTERS)
        _in_range("--adapter-rank", self.adapter_rank, 1, MOST_RANK)
        if self.calibrate == "":
            raise CompileError("--calibrate is none, self or a file's path, not empty")
        if self.bits_per_weight is not None:
            if self.measures_inputs is False:
                raise CompileError(
                    "--bits-per-weight needs measured inputs: -q int6 or less, or --calibrate self, and not --fast, "
                    "--weights none or --weights random"
                )
            if self.weights_file is not None:
                raise CompileError(
                    "--bits-per-weight needs weights in the artifact: a file of them fits all artifacts of the model"
                )
            if not 1 <= self.bits_per_weight <= 16:
                raise CompileError(f"--bits-per-weight is 1 to 16, not {self.bits_per_weight:g}")
        if self.accuracy and not self.has_weights:
            raise CompileError(f"--accuracy needs the model's weights, and not --weights {self.weights}")
        if not self.target:
            raise CompileError("--target needs a machine's name; `--target native` is this machine")
        if not self.weights:
            raise CompileError(f"--weights is {', '.join(WEIGHT_SOURCES)} or a file's path, not empty")
        _in_range("--max-context", self.max_context, PAGE, MOST_CONTEXT)
        _in_range("--max-step", self.max_step, 16, MOST_STEP)
        for option, sizes in (("--max-dim", self.max_dims), ("--dim", self.dims)):
            for name, size in sizes:
                if not name:
                    raise CompileError(f"{option} needs a size's name before the '=': {option} batch=8")
                _in_range(f"{option} {name}", size, 1, MOST_DIM)
        _in_range("--jobs", self.jobs, 1, 1024)
        _in_range("--seed", self.seed, 0, (1 << 63) - 1)

    @property
    def activation_dtype(self) -> str:
        """The lowest precision that inputs of matmuls may be rounded to: "int8", "bf16" or "f32"."""
        if self.activations is not None:
            return self.activations
        return "int8" if self.quantization.startswith("int") else "bf16" if self.quantization == "bf16" else "f32"

    def tokens_a_step(self, is_encoder: bool) -> int:
        """The most tokens of one step, as far as sequences can be cut."""
        return self.max_step or (2048 if is_encoder else 512)

    @property
    def measures_inputs(self) -> bool | None:
        """Whether weights are rounded by what their layers see; None: where the model is one of texts."""
        if self.calibrate is not None:
            return self.calibrate != "none"
        # The error of int8 is below that of activations.
        low = self.quantization in (AUTO, *INTEGERS) and self.quantization != "int8"
        return None if low and self.weights not in ("random", "none") else False

    @property
    def has_weights(self) -> bool:
        """Whether the model's own weights go into the artifact, or into a file beside it."""
        return self.weights not in ("random", "none")

    def tells_accuracy(self, parameters: int) -> bool:
        """Whether the accuracy of a model of so many parameters is measured."""
        if self.accuracy is not None:
            return self.accuracy
        if not self.has_weights or self.quantization not in INTEGERS:
            return False
        return self.measures_inputs is not False or parameters <= MEASURED_PARAMETERS

    @property
    def calibration_file(self) -> Path | None:
        """The file of texts that are measured besides the model's own."""
        return None if self.calibrate in (None, "none", "self") else Path(str(self.calibrate))

    @property
    def weights_file(self) -> Path | None:
        """The file that the weights go to instead of into the artifact, if there is one."""
        return None if self.weights in WEIGHT_SOURCES else Path(self.weights)

    def as_json(self) -> dict[str, object]:
        """Every option that changes the artifact, as plain JSON values: for the manifest and for cache keys."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("kernel_cache", "jobs", "check"):
            del kept[name]
        if not self.adapters:
            del kept["adapters"], kept["adapter_rank"]
        if self.calibration_file is not None:
            kept["calibrate"] = _hash_of("--calibrate", self.calibration_file)
        kept["lora"] = [_hash_of("--lora", *_adapter_files(Path(each).expanduser())) for each in self.lora]
        kept["overrides"] = [list(pair) for pair in self.overrides]
        kept["max_dims"], kept["dims"] = dict(self.max_dims), dict(self.dims)
        json.dumps(kept)
        return kept


def _hash_of(option: str, *paths: Path) -> str:
    digest = hashlib.sha256()
    try:
        for path in paths:
            digest.update(path.read_bytes())
    except OSError as error:
        raise CompileError(f"{option} {error.filename}: {error.strerror}") from error
    return f"sha256:{digest.hexdigest()}"


def _adapter_files(directory: Path) -> list[Path]:
    """What an adapter is made of."""
    return [directory / "adapter_config.json", *sorted(directory.glob("adapter_model.*"))]


def parse_overrides(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """`PATTERN=SCHEME` texts, as the command line gives them, to pairs."""
    pairs = []
    for text in texts:
        pattern, equals, scheme = text.rpartition("=")
        if not equals:
            raise CompileError(f"--override is PATTERN=SCHEME, such as '*.down_proj*=int8', not {text!r}")
        pairs.append((pattern, scheme))
    return tuple(pairs)


def parse_dims(texts: list[str], option: str) -> tuple[tuple[str, int], ...]:
    """`NAME=N` texts, as the command line gives them, to pairs. option: what they were given with."""
    pairs: list[tuple[str, int]] = []
    for text in texts:
        name, equals, size = text.rpartition("=")
        if not equals or not size.strip().isdecimal():
            raise CompileError(f"{option} is NAME=N, such as batch=8, not {text!r}")
        if name.strip() in dict(pairs):
            raise CompileError(f"{option} {name.strip()} is given twice")
        pairs.append((name.strip(), int(size)))
    return tuple(pairs)


def _choice(what: str, value: object, choices: tuple[object, ...], name_of_zero: str = "0") -> None:
    if value not in choices or isinstance(value, bool):  # False is 0
        allowed = ", ".join(str(choice) if choice != 0 else name_of_zero for choice in choices if choice is not None)
        raise CompileError(f"{what} is one of {allowed}, not {value!r}")


def _in_range(what: str, value: int | None, least: int, most: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise CompileError(f"{what} is a whole number, not {value!r:.40}")
    if value is not None and value < least:
        raise CompileError(f"{what} is at least {least}, not {value}")
    if value is not None and value > most:
        raise CompileError(f"{what} is at most {most}, not {value}")
