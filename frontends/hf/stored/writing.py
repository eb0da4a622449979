"""A quantized checkpoint in a form that other tools read: a model directory with some weights as packed integers.

Integers have even steps, one scale for each group of a row's inputs, and no minimum. Everything else of the directory
stays as it is. A directory appears when all of it is written, or not at all.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from safetensors import SafetensorError

from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError
from llmc.frontends.hf.checkpoint import ModelWeights
from llmc.frontends.hf.classes import choose_class
from llmc.frontends.hf.config import load_config, quiet, read_json
from llmc.frontends.hf.sentence import EMBED, read_sentence
from llmc.frontends.hf.source import module_paths, resolve
from llmc.frontends.hf.stored import quantization_of
from llmc.frontends.hf.stored.packing import pack
from llmc.frontends.hf.weights import open_checkpoint, to_torch
from llmc.frontends.lifted import WeightSource

if TYPE_CHECKING:
    import torch

_SHARD_BYTES = 2 << 30  # held in memory until they are written
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_WEIGHTS = re.compile(r".*\.(safetensors|bin)(\.index\.json)?\Z|config\.json\Z")


_KEPT = "heads, and layers whose weight no linear op of the graph reads as it is, are not quantized"


class Form(ABC):
    """A form of quantized layers. bits: that it has room for. Of its methods, group: inputs that share a scale; 0: all
    of a row."""

    name: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]

    @abstractmethod
    def refuse(self, outputs: int, inputs: int, bits: int, group: int) -> str:
        """Why a layer of this size has no such form; empty where it has."""

    @abstractmethod
    def tensors(self, q: Array, scales: Array, bits: int, group: int) -> dict[str, Array]:
        """A layer's tensors, by what follows its name. q: i8 [outputs, inputs]; scales: f16 [outputs, groups or 1]."""

    @abstractmethod
    def settings(self, bits: int, group: int, left_out: list[str]) -> dict[str, object]:
        """config.json's `quantization_config`. left_out: linear layers that stay as they are."""


class CompressedTensors(Form):
    """As llm-compressor writes it and vLLM and transformers read it: `pack-quantized`."""

    name = "compressed-tensors"
    bits = (4, 8)

    def refuse(self, outputs: int, inputs: int, bits: int, group: int) -> str:
        return "" if not group or inputs % group == 0 else f"groups of {group} do not divide its {inputs} inputs"

    def tensors(self, q: Array, scales: Array, bits: int, group: int) -> dict[str, Array]:
        return {
            "weight_packed": pack(_above_zero(q, bits), bits),
            "weight_scale": scales,
            "weight_shape": np.array(q.shape, np.int64),
        }

    def settings(self, bits: int, group: int, left_out: list[str]) -> dict[str, object]:
        weights = {
            "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel",
            "group_size": group or None, "dynamic": False,
        }  # fmt: skip
        return {
            "quant_method": self.name,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": left_out,
        }


class Gptq(Form):
    """As GPTQModel and AutoGPTQ write it, version 1: zero points minus one."""

    name = "gptq"
    bits = (2, 4, 8)

    def refuse(self, outputs: int, inputs: int, bits: int, group: int) -> str:
        if group and inputs % group:
            return f"groups of {group} do not divide its {inputs} inputs"
        words = 32 // bits
        short = [what for what, size in (("inputs", inputs), ("outputs", outputs)) if size % words]
        return f"its {' and '.join(short)} fill no whole words of {words} integers" if short else ""

    def tensors(self, q: Array, scales: Array, bits: int, group: int) -> dict[str, Array]:
        outputs, inputs = q.shape
        group = group or inputs
        zeros = np.full((inputs // group, outputs), (1 << bits - 1) - 1, np.uint8)
        return {
            "qweight": np.ascontiguousarray(pack(_above_zero(q, bits), bits).T),
            "qzeros": pack(zeros, bits),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": (np.arange(inputs) // group).astype(np.int32),
        }

    def settings(self, bits: int, group: int, left_out: list[str]) -> dict[str, object]:
        found: dict[str, object] = {
            "quant_method": self.name, "bits": bits, "group_size": group or -1, "desc_act": False, "sym": True,
            "checkpoint_format": self.name, "lm_head": False,
        }  # fmt: skip
        # The head is never quantized, which readers know; what else is not has to be named.
        others = [name for name in left_out if name.rpartition(".")[2] != "lm_head"]
        return found | ({"dynamic": {f"-:^{re.escape(name)}$": {} for name in others}} if others else {})


FORMS: dict[str, Form] = {form.name: form for form in (CompressedTensors(), Gptq())}


def form_of(name: str, bits: int) -> Form:
    """A form by its name; FrontendError where there is none, or where it does not have integers of so many bits
    (0: floats)."""
    form = FORMS.get(name)
    if form is None:
        raise FrontendError(f"--form is {' or '.join(FORMS)}, not {name!r}")
    if bits not in form.bits:
        found = f"int{bits}" if bits else "floats"
        raise FrontendError(f"-q: {name} is written as {' or '.join(f'int{each}' for each in form.bits)}, not {found}")
    return form


def _above_zero(q: Array, bits: int) -> Array:
    """u8 from 0 on, of i8 around 0."""
    return (q.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)


@dataclass(frozen=True)
class Original:
    """A model directory that is quantized. linears, tables: the names of its linear layers and embeddings; head: of the
    layer that makes logits, if it has one. weights: its weights, by the
    model's names; file: by the checkpoint's."""

    directory: Path
    linears: tuple[str, ...]
    tables: frozenset[str]
    head: str
    weights: ModelWeights
    file: WeightSource

    @classmethod
    def read(cls, source: str | Path) -> Original:
        """FrontendError for a model that is quantized already, or whose transformer is in a folder of its own."""
        import torch

        directory = resolve(source)
        sentence = read_sentence(directory)
        if sentence is not None and sentence.transformer != directory:
            raise FrontendError(
                f"{directory} keeps its transformer in {sentence.transformer.name}: quantize that folder, put it back"
            )
        config, path = load_config(directory), directory / "config.json"
        if quantization_of(directory, read_json(path)) is not None:
            raise FrontendError(f"{directory} is quantized already: quantize the original that it was made from")
        kind = choose_class(config, path, sentence is not None and sentence.task == EMBED)
        file = open_checkpoint(directory, getattr(config, "transformers_weights", None))
        with quiet(), torch.device("meta"):
            model = kind.build(config, "eager")
        modules = dict(model.named_modules())
        linears = tuple(name for name, module in modules.items() if type(module) is torch.nn.Linear)
        tables = frozenset(name for name, module in modules.items() if isinstance(module, torch.nn.Embedding))
        logits = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        heads = [name for name, module in modules.items() if module is logits]
        weights = ModelWeights(model, file, partly=True)
        found = cls(directory, linears, tables, heads[0] if heads else "", weights, file)
        if not any(found.layer_of(f"{layer}.weight") for layer in linears if layer != found.head):
            raise FrontendError(f"{directory} has no linear layer of its own that could be quantized")
        return found

    def others(self, replaced: set[str]) -> set[str]:
        """What holds matrices that stay as they are, by the checkpoint's names, beside embeddings."""
        tables = {self.weights.tensor_of(f"{name}.weight") for name in self.tables}
        return {
            name.removesuffix(".weight")
            for name in self.file.names
            if name.endswith(".weight") and name not in replaced | tables and len(self.file.shape(name)) == 2
        }

    def layer_of(self, weight: str) -> str:
        """The linear layer that a weight of the model is the whole matrix of; empty where there is none, or where it is
        not one tensor of the checkpoint."""
        layer = weight.removesuffix(".weight")
        is_whole = layer != weight and layer in self.linears and self.weights.tensor_of(weight) is not None
        return layer if is_whole else ""


@dataclass
class Written:
    """What a checkpoint has become. kept: (layer, why) of linear layers whose weights are as they were."""

    layers: int
    kept: list[tuple[str, str]]
    file_bytes: int


def write_checkpoint(
    original: Original, output: Path, form: Form, bits: int, group: int, rounded: Iterable[tuple[str, Encoded]]
) -> Written:
    """Write the directory `output`, which is not there yet or empty. rounded: weights of the model, each once, and what
    they were rounded to."""
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FrontendError(f"cannot write {output} (-o): it is there already; give a new folder")
    if not output.parent.is_dir():
        raise FrontendError(f"cannot write {output} (-o): there is no folder {output.parent}; make it first")
    temporary = output.with_name(f".{output.name[:60]}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        written = _write(original, temporary, form, bits, group, rounded)
        os.replace(temporary, output)
        return written
    except (OSError, SafetensorError) as error:
        raise FrontendError(f"cannot write {output}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    original: Original, folder: Path, form: Form, bits: int, group: int, rounded: Iterable[tuple[str, Encoded]]
) -> Written:
    kept: dict[str, str] = dict.fromkeys(original.linears, _KEPT)
    replaced: set[str] = set()

    def tensors() -> Iterator[tuple[str, Array]]:
        for weight, encoded in rounded:
            layer, tensor = original.layer_of(weight), original.weights.tensor_of(weight)
            if not layer or tensor is None:
                continue
            outputs, inputs = encoded.shape
            kept[layer] = form.refuse(outputs, inputs, bits, group)
            if kept[layer]:
                continue
            replaced.add(tensor)
            del kept[layer]
            for part, array in form.tensors(encoded.parts["q"], encoded.parts["scales"], bits, group).items():
                yield f"{tensor.removesuffix('.weight')}.{part}", array
        for name in original.file.names:
            if name not in replaced:
                yield name, original.file.load(name)

    nbytes = _write_shards(tensors(), folder)
    _copy_others(original.directory, folder)
    for layer in original.others(replaced):
        kept.setdefault(layer, _KEPT)
    config = read_json(original.directory / "config.json")
    config.pop("transformers_weights", None)  # the file has the name that is looked for
    config["quantization_config"] = form.settings(bits, group, sorted(kept))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in folder.glob("*.safetensors"):  # which are written for their owner only
        path.chmod((folder / "config.json").stat().st_mode)
    return Written(len(replaced), sorted(kept.items()), nbytes)


def _write_shards(tensors: Iterable[tuple[str, Array]], folder: Path) -> int:
    """Safetensors files of at most `_SHARD_BYTES` each, and their index if there are several. Returns their bytes."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def close() -> None:
        nonlocal size
        save_file(held, folder / f"{len(shards)}.shard", {"format": "pt"})
        shards.append(list(held))
        held.clear()
        size = 0

    for name, array in tensors:
        if held and size + array.nbytes > _SHARD_BYTES:
            close()
        held[name] = to_torch(array)  # type: ignore[assignment]
        size, total = size + array.nbytes, total + array.nbytes
    if held:
        close()
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    names = names if len(names) > 1 else ["model.safetensors"]
    for number, name in enumerate(names):
        (folder / f"{number}.shard").rename(folder / name)
    if len(names) > 1:
        places = {tensor: name for name, tensors_here in zip(names, shards, strict=True) for tensor in tensors_here}
        index: Mapping[str, object] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _copy_others(source: Path, target: Path) -> None:
    """The tokenizer, templates, settings and, of sentence-transformers models, the modules in folders of their own."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COPIED and not _WEIGHTS.match(path.name):
            shutil.copyfile(path, target / path.name)
    for below in module_paths(source / "modules.json"):
        if (source / below).is_dir():
            shutil.copytree(source / below, target / below)
