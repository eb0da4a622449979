"""Where weights come from: safetensors files read in place, torch files, random numbers, values in memory.

A source gives arrays by name, one at a time, and says every dtype and shape without reading any.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from llmc.compiler.ir.types import NUMPY_DTYPES, Array
from llmc.errors import FrontendError
from llmc.frontends.hf.config import read_json
from llmc.frontends.lifted import WeightSource
from llmc.frontends.weight_sources import ArrayWeights, RandomWeights

__all__ = [
    "STORED_DTYPES",
    "ArrayWeights",
    "RandomWeights",
    "SafetensorsFile",
    "ShardedFiles",
    "TorchFile",
    "is_finite",
    "open_checkpoint",
    "shortened",
    "to_numpy",
    "to_torch",
]

_SAFETENSORS_DTYPES = {
    "F64": "f64",
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    "I64": "i64",
    "I32": "i32",
    "I16": "i16",
    "I8": "i8",
    "U64": "u64",
    "U32": "u32",
    "U16": "u16",
    "U8": "u8",
    "BOOL": "bool",
    "F8_E4M3": "f8_e4m3",
    "F8_E5M2": "f8_e5m2",
    "F8_E8M0": "f8_e8m0",
}
# Dtypes of tensors in files: those of the IR, and floats of 8 bits, which formats of quantized weights are made of.
STORED_DTYPES: dict[str, np.dtype[Any]] = {
    **NUMPY_DTYPES,
    "f8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "f8_e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
# Buffers that older versions of transformers stored and every version computes: they are no weights.
STORED_CONSTANTS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$")
_MOST_HEADER_BYTES = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its file: byte offsets from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One `.safetensors` file, mapped. The header is checked before anything in it is used.

    metadata: texts by name that stand beside the tensors; some formats say there what the tensors are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                if size < 8:
                    raise FrontendError(f"{path} is no safetensors file: it has {size} bytes")
                file.seek(0)
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(size - 8, _MOST_HEADER_BYTES):
                    raise FrontendError(f"{path} is truncated or no safetensors file: its header claims {length} bytes")
                header = file.read(length)
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FrontendError(f"{path} cannot be read: {error.strerror}") from error
        self._places, self.metadata = _read_header(path, header, 8 + length, size)
        self._loaded: _Place | None = None

    @property
    def names(self) -> Iterable[str]:
        return self._places.keys()

    def dtype(self, name: str) -> str:
        return self._places[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def load(self, name: str) -> Array:
        """A read-only view of the file's bytes (a copy where the file has them unaligned)."""
        place = self._places[name]
        self._release()
        self._loaded = place
        dtype = STORED_DTYPES[place.dtype]
        count = (place.end - place.begin) // dtype.itemsize
        array = np.frombuffer(self._bytes, dtype, count, place.begin).reshape(place.shape)
        return array if place.begin % dtype.itemsize == 0 else array.copy()

    def _release(self) -> None:
        """Give back the pages of the weight before: a whole model passes through, one weight at a time.

        An array that still views them stays valid, and is read from the file again when touched.
        """
        if self._loaded is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = self._loaded.begin - self._loaded.begin % mmap.PAGESIZE
        self._bytes.madvise(mmap.MADV_DONTNEED, begin, self._loaded.end - begin)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a name appears twice")
    return data


def _read_header(path: Path, header: bytes, start: int, size: int) -> tuple[dict[str, _Place], dict[str, str]]:
    """Check a safetensors header: dtype, shape and bytes agree, offsets lie in the file and do not overlap. Places and
    metadata."""
    try:
        data = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FrontendError(f"{path}: its header is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FrontendError(f"{path}: its header must be a JSON object")
    places = {}
    for name, entry in data.items():
        if name != "__metadata__":
            places[name] = _read_place(f"{path}: tensor {name!r:.100}", entry, start, size)
    reached = start
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin < reached:
            raise FrontendError(f"{path}: tensor {name!r:.100} overlaps another one")
        reached = place.end
    metadata = data.get("__metadata__")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return places, {name: text for name, text in texts if isinstance(text, str)}


def _read_place(what: str, entry: object, start: int, size: int) -> _Place:
    if not isinstance(entry, dict):
        raise FrontendError(f"{what} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SAFETENSORS_DTYPES:
        raise FrontendError(f"{what} has dtype {dtype!r:.40}, which is not supported")
    if not _are_sizes(shape) or len(shape) > 8:
        raise FrontendError(f"{what} has shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FrontendError(f"{what} has data_offsets {offsets!r:.80}")
    name = _SAFETENSORS_DTYPES[dtype]
    needed = STORED_DTYPES[name].itemsize
    for dim in shape:
        needed *= dim
    begin, end = offsets
    if begin > end or start + end > size:
        raise FrontendError(f"{what} lies at bytes {begin}..{end}, outside the file: it is truncated or damaged")
    if end - begin != needed:
        raise FrontendError(f"{what} takes {end - begin} bytes, but {dtype} {list(shape)} needs {needed}")
    return _Place(name, tuple(shape), start + begin, start + end)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


class ShardedFiles:
    """Several files as one source: all that they hold, whichever file the index says, as transformers takes it. A name
    that stands in two of them means the same numbers in both."""

    def __init__(self, parts: Mapping[Path, WeightSource], index: Mapping[str, str] | None = None) -> None:
        self._owner: dict[str, WeightSource] = {}
        for path, part in parts.items():
            for name in part.names:
                if not _same(name, self._owner.setdefault(name, part), part):
                    raise FrontendError(
                        f"{path}: tensor {name!r:.100} stands in another file of the checkpoint with other numbers: "
                        "download the model again"
                    )
        self.metadata = {k: v for part in parts.values() for k, v in getattr(part, "metadata", {}).items()}
        lost = [name for name in (index or ()) if name not in self._owner and not STORED_CONSTANTS.search(name)]
        if lost:
            raise FrontendError(f"the checkpoint's index lists tensors that its files lack: {shortened(lost)}")

    @property
    def names(self) -> Iterable[str]:
        return self._owner.keys()

    def dtype(self, name: str) -> str:
        return self._owner[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owner[name].shape(name)

    def load(self, name: str) -> Array:
        return self._owner[name].load(name)


def _same(name: str, one: WeightSource, other: WeightSource) -> bool:
    """Whether a tensor is the same in two sources."""
    if one is other:
        return True
    if (one.dtype(name), one.shape(name)) != (other.dtype(name), other.shape(name)):
        return False
    return one.load(name).tobytes() == other.load(name).tobytes()


class TorchFile:
    """A `.bin` checkpoint, through torch's weights-only unpickler over a mapped file."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it refuses anyway
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the old format cannot be mapped
                loaded = self._load_old(path)
            except Exception as error:
                raise self._refusal(path) from error
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise FrontendError(f"{path} must hold tensors by name")
        self._tensors: dict[str, torch.Tensor] = loaded
        for name in loaded:
            self.dtype(name)

    @staticmethod
    def _load_old(path: Path) -> object:
        import torch

        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TorchFile._refusal(path) from error

    @staticmethod
    def _refusal(path: Path) -> FrontendError:
        # torch's own message advises to load the file with the code that may be in it.
        return FrontendError(
            f"{path} is damaged, or holds more than plain tensors: objects in it could run code, so it is not read. "
            "Use a safetensors version of the model"
        )

    @property
    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def dtype(self, name: str) -> str:
        kind = str(self._tensors[name].dtype).removeprefix("torch.")
        layout = str(self._tensors[name].layout).removeprefix("torch.")
        if layout != "strided":
            raise FrontendError(f"{self.path}: tensor {name!r:.100} is stored as {layout}, which is not supported")
        for ours, dtype in STORED_DTYPES.items():
            if dtype.name == kind:
                return ours
        raise FrontendError(f"{self.path}: tensor {name!r:.100} has dtype {kind}, which is not supported")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def load(self, name: str) -> Array:
        return to_numpy(self._tensors[name])


def to_numpy(tensor: object) -> Array:
    """A torch tensor's values; bf16 and floats of 8 bits through their bits, which numpy itself cannot name."""
    import torch

    assert isinstance(tensor, torch.Tensor)
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(NUMPY_DTYPES["bf16"])
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind.startswith("float8"):
        small: Array = tensor.view(torch.uint8).numpy()
        return small.view(next(dtype for dtype in STORED_DTYPES.values() if dtype.name == kind))
    array: Array = tensor.numpy()
    return array


def to_torch(array: Array) -> object:
    """A torch tensor over (a copy of) an array's values."""
    import torch

    if array.dtype == NUMPY_DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def open_checkpoint(directory: Path, named: object = None) -> WeightSource:
    """The checkpoint in a model directory: safetensors before `.bin`, sharded or in one file.

    named: the file that config.json names as the model's (`transformers_weights`), if it does.
    """
    for path in sorted(directory.glob(_DISTRIBUTED)):  # transformers takes it before all others
        raise FrontendError(
            f"{directory} holds a distributed checkpoint ({path.name}), which is not read: load it with transformers "
            "and save it with save_pretrained"
        )
    if named is not None:
        return _named_checkpoint(directory, named)
    for single, kind in _KINDS.items():
        if (directory / single).exists():
            return kind(directory / single)
        if (directory / f"{single}.index.json").exists():
            return _sharded(directory / f"{single}.index.json", kind)
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return SafetensorsFile(others[0])
    raise FrontendError(
        f"{directory} has no weights: expected model.safetensors, pytorch_model.bin, or the index of a sharded one"
    )


_DISTRIBUTED = f"shard-{'[0-9]' * 5}-model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors"
_KINDS: dict[str, type[SafetensorsFile] | type[TorchFile]] = {
    "model.safetensors": SafetensorsFile,
    "pytorch_model.bin": TorchFile,
}


def _named_checkpoint(directory: Path, named: object) -> WeightSource:
    """The checkpoint in the file of this name, or that this index lists."""
    where = f"{directory / 'config.json'}: transformers_weights"
    if not isinstance(named, str) or named != Path(named).name or named in ("", ".", ".."):
        raise FrontendError(f"{where} must name a file beside it, and is {named!r:.100}")
    path = directory / named
    if not path.is_file():
        raise FrontendError(f"{where} names {named!r:.100}, which is missing: download the model again")
    if named.endswith(".safetensors.index.json"):
        return _sharded(path, SafetensorsFile)
    if path.suffix != ".safetensors":
        raise FrontendError(f"{where} names {named!r:.100}, which is neither a .safetensors file nor an index of some")
    return SafetensorsFile(path)


def _sharded(index_path: Path, kind: type[SafetensorsFile] | type[TorchFile]) -> WeightSource:
    index = _read_index(index_path)
    return ShardedFiles({path: kind(path) for path in _shards(index_path, index)}, index)


def _read_index(path: Path) -> dict[str, str]:
    names = read_json(path, most_bytes=256 << 20).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise FrontendError(f"{path} has no weight_map from tensor names to files")
    return names


def _shards(index_path: Path, index: Mapping[str, str]) -> list[Path]:
    shards = []
    for file in sorted(set(index.values())):
        if file != Path(file).name or file in ("", ".", ".."):
            raise FrontendError(f"{index_path} names a file outside its directory: {file!r:.100}")
        if not (index_path.parent / file).is_file():
            raise FrontendError(f"{index_path} lists {file!r:.100}, which is missing: download the model again")
        shards.append(index_path.parent / file)
    return shards


def shortened(names: Iterable[str], most: int = 6) -> str:
    """Names for a message: the first few, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def is_finite(array: Array) -> bool:
    """Whether no number is infinite or NaN. Every weight passes here, so it is read block by block, as bits."""
    dtype = array.dtype
    if dtype.kind in "iub":
        return True
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{dtype.itemsize}")
    # The exponent of infinity and NaN is all ones: without its sign, such a number is at least infinity.
    infinity = np.array([np.inf], dtype).view(bits.dtype)[0]
    magnitude = bits.dtype.type((1 << (8 * dtype.itemsize - 1)) - 1)
    block = 1 << 18
    return all(int((bits[start : start + block] & magnitude).max()) < infinity for start in range(0, len(bits), block))
