"""Adapters that are loaded at run time, as PEFT writes them, into the tables that an artifact's steps read.

A module's product W x becomes W x + s B A x for the tokens of sequences that have the adapter. All of an adapter is
read and compared with the artifact's modules before any table changes; what it asks for beyond such products is
refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.lora import PARTS, LoraSettings, find, inner_name
from llmc.runtime.adapter_facts import AdapterFacts, PartFacts, TableFacts
from llmc.runtime.device import Buffer, Device, Use
from llmc.runtime.errors import AdapterError
from llmc.runtime.layer import Layer
from llmc.runtime.safetensors import SafetensorsFile

Floats = NDArray[np.float32]
_MOST_CONFIG = 1 << 22
_SETTINGS, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "compile the model with `--lora`, which merges it"


@dataclass(frozen=True)
class Product:
    """What an adapter adds to a module: a [r, inputs], and b [outputs, r] with the scale in it."""

    a: Floats
    b: Floats


def read_adapter(directory: Path, facts: AdapterFacts) -> dict[str, Product]:
    """The products of an adapter's directory by the artifact's modules. AdapterError for what does not fit it."""
    settings = _settings(directory)
    path = directory / _TENSORS
    if not path.is_file():
        raise AdapterError(f"{directory} has no {_TENSORS}: give the directory that PEFT has written, or save it again")
    with SafetensorsFile(path) as file:
        pairs = _pairs(file, directory)
        modules, known = facts.modules, {name: find(name, facts.modules) for name in pairs}
        unknown = sorted(name for name, module in known.items() if module is None)
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise AdapterError(
                f"{directory} adapts {unknown[0]:.100}{more}, which the artifact has no room beside: it is an adapter "
                f"of another model, or `llmc explain` says why; {_MERGE}"
            )
        if len(set(known.values())) != len(known):
            raise AdapterError(f"{directory} has more than one adapter of a module")
        _check_shapes(file, pairs, directory, settings, facts, {name: modules[known[name]] for name in pairs})  # type: ignore[index]
        found = {}
        for name, (a, b) in pairs.items():
            scale = np.float32(settings.scale(name))
            found[str(known[name])] = Product(file.load(a), file.load(b) * scale)
    return found


def _settings(directory: Path) -> LoraSettings:
    path = directory / _SETTINGS
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise AdapterError(f"{path} has more than {_MOST_CONFIG} bytes")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(
            f"{path} cannot be read: {error.strerror}. Give the directory that PEFT has written"
        ) from None
    except (ValueError, RecursionError):
        raise AdapterError(f"{path} is no JSON that can be read") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path} must hold a JSON object, not {type(values).__name__}")
    settings = LoraSettings(values, str(path), AdapterError)
    settings.check()
    for name in ("use_dora", "lora_bias"):
        if settings.flag(name):
            raise AdapterError(f"{path}: {name} is more than a product that is added: {_MERGE}")
    if values.get("bias") not in (None, "none") or values.get("modules_to_save"):
        what = "modules_to_save" if values.get("modules_to_save") else "bias"
        raise AdapterError(
            f"{path}: {what} is {values[what]!r:.60}: weights of its own are not loaded at run time: {_MERGE}"
        )
    return settings


def _pairs(file: SafetensorsFile, directory: Path) -> dict[str, tuple[str, str]]:
    """The tensors A and B of each module."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(file.tensors):
        parts = PARTS.match(inner_name(name))
        if parts is None or parts[2] not in ("lora_A", "lora_B") or parts[3] == ".bias":
            raise AdapterError(f"{directory}: tensor {name!r:.100} is no matrix that adds to a linear layer: {_MERGE}")
        if found.setdefault(parts[1], {}).setdefault(parts[2], name) != name:
            raise AdapterError(f"{directory} has more than one adapter of a module: {parts[1]:.100}")
    for module, pair in found.items():
        if len(pair) != 2:
            raise AdapterError(f"{directory}: module {module:.100} has only one of the two matrices of an adapter")
    if not found:
        raise AdapterError(f"{directory} holds no tensors of an adapter")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in found.items()}


def _check_shapes(
    file: SafetensorsFile,
    pairs: Mapping[str, tuple[str, str]],
    directory: Path,
    settings: LoraSettings,
    facts: AdapterFacts,
    sizes: Mapping[str, tuple[int, int]],
) -> None:
    for module, (a, b) in pairs.items():
        rank, (inputs, outputs) = settings.rank(module), sizes[module]
        shapes = file.tensors[a].shape, file.tensors[b].shape
        if rank > facts.rank:
            raise AdapterError(
                f"{directory} has rank {rank:g} for {module:.100}, the artifact has room for {facts.rank}: compile it "
                "with a larger --adapter-rank"
            )
        if shapes != ((rank, inputs), (outputs, rank)):
            raise AdapterError(
                f"{directory} is no adapter of this model: {module:.100} has matrices {list(shapes[0])} and "
                f"{list(shapes[1])}, for rank {rank:g} they are [{rank:g}, {inputs}] and [{outputs}, {rank:g}]"
            )


class AdapterTables:
    """The memory of all tables: for each op a [count + 1, parts, rank, inputs], b [count + 1, rank, outputs] and ranks
    [count + 1, parts]. Reserved whole, and where the device can, taken only as adapters are written."""

    def __init__(self, device: Device, facts: AdapterFacts) -> None:
        self.facts, self._device = facts, device
        self._buffers: list[tuple[Buffer, Buffer, Buffer]] = []
        entries = facts.count + 1
        for table in facts.tables:
            parts = len(table.parts)
            sizes = (parts * facts.rank * table.inputs, facts.rank * table.outputs, parts)
            a, b, ranks = (device.reserve(4 * entries * size, Use.SPARSE) for size in sizes)
            self._buffers.append((a, b, ranks))
        flat = [buffer.number for buffers in self._buffers for buffer in buffers]
        self._table = device.reserve(8 * len(flat), Use.TABLE)
        self._table.table((len(flat),), np.uint64)[:] = flat

    @property
    def number(self) -> int:
        """Of the table that a step finds them by."""
        return self._table.number

    def write(self, entry: int, products: Mapping[str, Product]) -> None:
        """Fills an entry: no step may use it meanwhile. Without products it adds nothing."""
        for table, (a, b, ranks) in zip(self.facts.tables, self._buffers, strict=True):
            parts = len(table.parts)
            own = [products.get(part.module) for part in table.parts]
            used = np.array([0 if each is None else len(each.a) for each in own], np.int32)
            self._device.upload(np.zeros(parts, np.int32), ranks.at(4 * entry * parts))
            for number, product in enumerate(own):
                if product is not None:
                    rows = (entry * parts + number) * self.facts.rank
                    self._device.upload(_inputs(table, product), a.at(4 * rows * table.inputs))
            if used.any():
                columns = _columns(table, own, int(used.max()))
                self._device.upload(columns, b.at(4 * entry * self.facts.rank * table.outputs))
            self._device.upload(used, ranks.at(4 * entry * parts))


def _inputs(table: TableFacts, product: Product) -> Floats:
    """A, for inputs as the op has them."""
    if not table.powers:
        return np.ascontiguousarray(product.a)
    return np.ldexp(product.a, np.array(table.powers, np.int32)).astype(np.float32)


def _columns(table: TableFacts, own: list[Product | None], rank: int) -> Floats:
    """B of all parts side by side, f32 [rank, outputs]."""
    found: Floats = np.zeros((rank, table.outputs), np.float32)
    end = 0
    for part, product in zip(table.parts, own, strict=True):
        begin, end = end, end + part.columns
        if product is not None:
            found[: len(product.a), begin:end] = product.b[_rows(part)].T
    return found


def _rows(part: PartFacts) -> NDArray[np.int64]:
    return np.concatenate([np.arange(first, end) for first, end in part.rows])


class Adapters:
    """The adapters that are loaded, by name. Hold the runtime's lock, but for `read` and `loaded`.

    artifact: its file, for messages. tables: None where there is no room for any, which every use then says.
    """

    def __init__(self, artifact: Path, tables: AdapterTables | None, layer: Layer) -> None:
        self._artifact, self._room, self._layer = artifact, tables, layer
        self._loaded: dict[str, tuple[int, Path]] = {}

    @property
    def _tables(self) -> AdapterTables:
        if self._room is None:
            raise AdapterError(f"{self._artifact} has no room for adapters: compile it with `--adapters N`")
        return self._room

    @property
    def loaded(self) -> dict[str, Path]:
        """Directories by name."""
        return {name: directory for name, (_, directory) in list(self._loaded.items())}

    def read(self, name: object, directory: str | os.PathLike[str]) -> tuple[str, Path, dict[str, Product]]:
        """What `put` takes. AdapterError for what is no name, and for an adapter that does not fit."""
        facts, checked, path = self._tables.facts, checked_name(name), checked_directory(directory)
        return checked, path, read_adapter(path, facts)

    def number(self, name: str | None) -> int:
        """What the session layer knows an adapter by; None: none. AdapterError where it is not loaded."""
        if name is None:
            return 0
        if name not in self._loaded:
            _ = self._tables  # where there is room for none, that is what is said
            known = ", ".join(self._loaded) or "none"
            raise AdapterError(f"no adapter {name!r:.60} is loaded (loaded: {known}): use load_lora() first")
        return self._loaded[name][0]

    def put(self, name: str, directory: Path, products: Mapping[str, Product]) -> None:
        """Loads an adapter that was read, in place of one of its name."""
        place = self._loaded[name][0] if name in self._loaded else self._free()
        self._begin(name, place)
        self._loaded.pop(name, None)
        self._tables.write(place, products)
        self._layer.adapter_end(place)
        self._loaded[name] = place, directory

    def take(self, name: str) -> None:
        """Takes an adapter away."""
        place = self.number(name)
        self._begin(name, place)
        del self._loaded[name]
        self._tables.write(place, {})

    def _free(self) -> int:
        taken, count = {place for place, _ in self._loaded.values()}, self._tables.facts.count
        free = set(range(1, count + 1)) - taken
        if not free:
            raise AdapterError(
                f"all {count} adapters that there is room for are loaded ({', '.join(self._loaded)}): "
                "unload one first, or compile with a larger --adapters"
            )
        return min(free)

    def _begin(self, name: str, place: int) -> None:
        users = self._layer.adapter_users(place)
        if users:
            texts = f"{users} text{'s' * (users > 1)} or sequence{'s' * (users > 1)}"
            raise AdapterError(f"adapter {name!r:.60} is in use by {texts}: finish or close them first")
        self._layer.adapter_begin(place)


def checked_name(name: object) -> str:
    """AdapterError for what is no name of an adapter."""
    if not isinstance(name, str) or not name or len(name) > 256:
        raise AdapterError(f"an adapter's name is a text of 1 to 256 characters, not {name!r:.40}")
    return name


def checked_directory(directory: str | os.PathLike[str]) -> Path:
    """AdapterError for what is no directory."""
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise AdapterError(f"{path} is no directory: give the one that PEFT has written, with {_SETTINGS} in it")
    return path
