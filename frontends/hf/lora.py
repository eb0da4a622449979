"""Adapters that add a product of two small matrices to weights (LoRA: Hu et al. 2021, arXiv 2106.09685), as PEFT writes
them, merged into the weights of a checkpoint when these are read.

A module's weight [outputs, inputs] becomes W + s B A, with A [r, inputs], B [outputs, r] and s = alpha / r, or
alpha / sqrt(r) (`use_rslora`: Kalajdzievski 2023, arXiv 2312.03732). With a magnitude m [outputs] (`use_dora`: Liu et
al. 2024, arXiv 2402.09353) row i becomes m_i (W + s B A)_i / |(W + s B A)_i|. An embedding [ids, features] becomes
E + s (B A)^T. Tensors of modules that were trained as a whole (`modules_to_save`, biases) take the base model's place.

What an adapter's settings ask for beyond that is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmc.compiler.ir.types import FLOATS, Array, dtype_of
from llmc.errors import FrontendError
from llmc.frontends.hf.config import read_json
from llmc.frontends.hf.weights import SafetensorsFile, TorchFile, is_finite, shortened
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import StoredIntegers, stored_integers
from llmc.lora import PARTS, LoraSettings, find, inner_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Change:
    """What is added to a weight: a [r, inputs], b [outputs, r], magnitude [outputs]. Inputs of an embedding are ids."""

    scale: float = 0.0
    a: Array | None = None
    b: Array | None = None
    magnitude: Array | None = None
    is_table: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter's directory. changes: by module; whole: tensors that take the place of the base model's, by name.
    ties: whether a table and a head that are one stay so (`ensure_weight_tying`)."""

    directory: Path
    ties: bool
    changes: Mapping[str, _Change] = field(repr=False)
    whole: Mapping[str, Array] = field(repr=False)

    @classmethod
    def read(cls, directory: Path) -> Adapter:
        """FrontendError for one that cannot be merged."""
        where = directory / "adapter_config.json"
        settings = LoraSettings(read_json(where), str(where), FrontendError)
        settings.check()
        file = _open(directory)
        changes: dict[str, _Change] = {}
        whole: dict[str, Array] = {}
        for name in sorted(file.names):
            if file.dtype(name) not in FLOATS or not is_finite(file.load(name)):
                raise FrontendError(f"{directory}: tensor {name!r:.100} holds no finite floats")
            inner = inner_name(name)
            found = PARTS.match(inner)
            if found is None:
                whole[inner] = file.load(name)
            else:
                _add(changes.setdefault(found[1], _Change()), found, file.load(name), directory, name, whole)
        for module, change in changes.items():
            change.scale = settings.scale(module)
            _check_change(change, settings, directory, module)
        for name in [name for name in whole if name.endswith(".lora_B.bias")]:
            module = name.removesuffix(".lora_B.bias")
            raise FrontendError(f"{directory}: {module} has a bias of its own (lora_bias), which is not merged")
        if not changes and not whole:
            raise FrontendError(f"{directory} holds no tensors of an adapter")
        return cls(directory, settings.flag("ensure_weight_tying"), changes, whole)


def _open(directory: Path) -> WeightSource:
    if (directory / "adapter_model.safetensors").exists():
        return SafetensorsFile(directory / "adapter_model.safetensors")
    if (directory / "adapter_model.bin").exists():
        return TorchFile(directory / "adapter_model.bin")
    raise FrontendError(f"{directory} has no adapter_model.safetensors: give the directory that PEFT has written")


def _add(
    change: _Change, found: re.Match[str], array: Array, directory: Path, name: str, whole: dict[str, Array]
) -> None:
    kind = found[2]
    if found[3] == ".bias":
        whole[found[0]] = array
    elif kind == "lora_magnitude_vector":
        change.magnitude = array.reshape(-1)
    elif array.ndim != 2:
        raise FrontendError(f"{directory}: tensor {name!r:.100} is {list(array.shape)}, no matrix: merge it with peft")
    elif kind.endswith("A"):
        change.a, change.is_table = array, "embedding" in kind
    else:
        change.b = array


def _check_change(change: _Change, settings: LoraSettings, directory: Path, module: str) -> None:
    where = f"{directory}: module {module:.100}"
    if change.a is None or change.b is None:
        raise FrontendError(f"{where} has only one of the two matrices of an adapter")
    rank = settings.rank(module)
    if change.a.shape[0] != rank or change.b.shape[1] != rank:
        raise FrontendError(
            f"{where}: its matrices are {list(change.a.shape)} and {list(change.b.shape)}, the rank is {rank}"
        )
    if settings.flag("use_dora") != (change.magnitude is not None):
        raise FrontendError(f"{where}: use_dora and its magnitudes (lora_magnitude_vector) do not agree")
    if change.magnitude is not None and change.is_table:
        raise FrontendError(f"{where}: magnitudes of an embedding (use_dora) are not merged: merge it with peft")


@dataclass(frozen=True)
class Modules:
    """What an adapter finds in a model. turned: modules whose weight lies as [inputs, outputs]. table, head: the
    embedding and the output head where they share one weight; empty where they do not."""

    names: frozenset[str]
    turned: frozenset[str]
    table: str = ""
    head: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Modules:
        from transformers.pytorch_utils import Conv1D

        names = dict(model.named_modules())
        turned = frozenset(name for name, module in names.items() if isinstance(module, Conv1D))
        table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
        settings = model.config.get_text_config(decoder=True)
        if table is None or head is None or not getattr(settings, "tie_word_embeddings", False):
            return cls(frozenset(names), turned)
        by_module = {id(module): name for name, module in names.items()}
        return cls(frozenset(names), turned, by_module.get(id(table), ""), by_module.get(id(head), ""))

    def find(self, module: str) -> str | None:
        """The model's name of an adapter's module, which may have or lack a prefix."""
        return find(module, self.names)


class AdaptedWeights:
    """A checkpoint's weights with an adapter merged in; those that it does not change are as they were.

    FrontendError for an adapter of another model, at the first module that does not fit, and for one that changes a
    table and a head that share one weight apart from each other, which PEFT computes and no merged weight does.
    """

    def __init__(self, base: WeightSource, adapter: Adapter, modules: Modules) -> None:
        self._base, self._adapter, self._modules = base, adapter, modules
        self._names = frozenset(base.names)
        # Weights of modules of linear ops, [outputs, inputs] whatever the model has.
        self.of_linears: frozenset[str] = frozenset(getattr(base, "of_linears", ()))
        self._turned: set[str] = set()
        self._changes: dict[str, _Change] = {}
        self._whole: dict[str, Array] = {}
        unknown: list[str] = []
        for wanted, array in adapter.whole.items():
            name = self._place(wanted, self._whole)
            if name is None:
                unknown.append(wanted)
                continue
            if name in self._names and base.shape(name) != array.shape:
                raise self._wrong(name, f"it has {list(array.shape)} for it")
            self._whole[name] = array
        for module, change in adapter.changes.items():
            name, own = self._place(f"{module}.weight", self._changes), modules.find(module)
            if name is None or own is None:
                unknown.append(module)
                continue
            if own in modules.turned and name not in self.of_linears:
                self._turned.add(name)
            self._check(name, change)
            self._changes[name] = change
        if unknown:
            raise FrontendError(f"{adapter.directory} is no adapter of this model, which has no {shortened(unknown)}")
        self._check_shared()

    def _place(self, wanted: str, taken: Mapping[str, object]) -> str | None:
        """The tensor of the checkpoint that a weight of the adapter belongs to, or a head of its own; None: none."""
        name = find(wanted, self._names)
        if name is None and self._modules.head and wanted in self._adapter.whole:
            own = f"{self._modules.head}.weight"
            name = own if wanted == own or wanted.endswith(f".{own}") else None
        if name is not None and name in taken:
            raise FrontendError(f"{self._adapter.directory} has more than one change of {name:.100}")
        return name

    def _check_shared(self) -> None:
        """Refuse a table that is changed without the head that shares it, or both where they stay one."""
        table, head = (f"{module}.weight" for module in (self._modules.table, self._modules.head))
        if not self._modules.head:
            return
        names = {find(table, self._names) or table: "the embedding", head: "the head"}
        touched = {name for name in names if name in self._changes or name in self._whole}
        apart = head in self._names or (touched == {head} and head in self._whole)
        both = touched == set(names) and touched <= set(self._whole)
        if touched and (self._adapter.ties or not (apart or both)):
            raise FrontendError(
                f"{self._adapter.directory} changes {shortened(touched)}: the model's embedding and head share one "
                "weight, so that it has to be merged with peft"
            )

    @property
    def note(self) -> str:
        """For the user to read."""
        more = f", {len(self._whole)} replaced" if self._whole else ""
        return f"adapter {self._adapter.directory} is merged: {len(self._changes)} weights changed{more}"

    @property
    def names(self) -> Iterable[str]:
        return [*self._base.names, *(name for name in self._whole if name not in self._names)]

    def dtype(self, name: str) -> str:
        if name in self._whole:
            return dtype_of(self._whole[name].dtype)
        return self._base.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole[name].shape if name in self._whole else self._base.shape(name)

    def integers(self, name: str) -> StoredIntegers | None:
        """What a weight is stored as, if that is integers and they stay."""
        return None if name in self._changes or name in self._whole else stored_integers(self._base, name)

    def load(self, name: str) -> Array:
        base = self._whole[name] if name in self._whole else self._base.load(name)
        change = self._changes.get(name)
        if change is None:
            return base
        assert change.a is not None
        assert change.b is not None
        added = np.float32(change.scale) * (change.b.astype(np.float32) @ change.a.astype(np.float32))
        turned = self._is_turned(name, change)
        weight = base.astype(np.float32)
        weight = (weight.T if turned else weight) + added
        if change.magnitude is not None:
            length = np.sqrt(np.einsum("nk,nk->n", weight, weight, dtype=np.float64)).astype(np.float32)
            weight *= (change.magnitude.astype(np.float32) / np.maximum(length, np.finfo(np.float32).tiny))[:, None]
        return np.ascontiguousarray(weight.T if turned else weight).astype(base.dtype)

    def _is_turned(self, name: str, change: _Change) -> bool:
        """Whether a weight lies as [inputs, outputs], as embeddings do. (`fan_in_fan_out` says what the model's own
        module says, or is wrong: PEFT corrects it.)"""
        return change.is_table or name in self._turned

    def _check(self, name: str, change: _Change) -> None:
        assert change.a is not None
        assert change.b is not None
        outputs, inputs = change.b.shape[0], change.a.shape[1]
        fits = (inputs, outputs) if self._is_turned(name, change) else (outputs, inputs)
        if self.shape(name) != fits or self.dtype(name) not in FLOATS:
            raise self._wrong(name, f"it is made for {list(fits)}")
        if change.magnitude is not None and len(change.magnitude) != outputs:
            raise self._wrong(name, f"it has {len(change.magnitude)} magnitudes")

    def _wrong(self, name: str, why: str) -> FrontendError:
        kind = f"{self.dtype(name)} {list(self.shape(name))}"
        return FrontendError(f"{self._adapter.directory} is no adapter of this model: {name:.100} is {kind}, {why}")
