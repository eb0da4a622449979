"""What is compared: each engine's settings by precision class, and how an engine is installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

Options = dict[str, "str | int | bool"]

HERE = Path(__file__).resolve().parent
CLASSES = ("int4", "int8", "float")
US = "llmc"


@dataclass(frozen=True)
class Peer:
    """An engine. adapter: its script beside this file. install: the command that makes it importable."""

    name: str
    adapter: str
    install: str

    @property
    def script(self) -> Path:
        return HERE / self.adapter


@dataclass(frozen=True)
class Variant:
    """One row of the comparison. convert and measure are passed to the adapter's commands of these names."""

    peer: str
    name: str
    precision: str
    convert: Options = field(default_factory=dict)
    measure: Options = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.peer} {self.name}"

    def key(self, model: Path, version: str) -> str:
        """The name of the converted model's folder: another one when the model, the settings or the engine change."""
        files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".safetensors"))
        facts = [str(model.resolve()), [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]]
        text = json.dumps([facts, self.convert, version], sort_keys=True)
        return f"{self.peer}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(US, "llmc_adapter.py", "pip install --editable '.[compile]'"),
        Peer(
            "llama.cpp",
            "llama_cpp_adapter.py",
            f'CXXFLAGS="-include {HERE / "amx_tile_config.h"}" CMAKE_ARGS="-DGGML_NATIVE=ON" '
            "pip install --no-binary llama-cpp-python llama-cpp-python gguf",
        ),
        Peer("openvino", "openvino_adapter.py", "pip install openvino-genai optimum-intel nncf 'transformers<5'"),
        Peer("onnxruntime", "onnxruntime_adapter.py", "pip install onnxruntime-genai onnx onnx-ir torch transformers"),
        Peer(
            "mnn",
            "mnn_adapter.py",
            "pip install MNN torch onnx onnxslim yaspin sentencepiece 'transformers<5', and set MNN_SOURCE "
            "to a checkout of github.com/alibaba/MNN, for its exporter",
        ),
        Peer("torch", "torch_adapter.py", "pip install torch transformers"),
    )
}

_BF16 = {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}
_F32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}
_OV_INT4: Options = {"weights": "int4", "group_size": 128}
_OV_INT8: Options = {"weights": "int8"}
# On CPUs llama.cpp's flash attention, its default, is faster for prompts and slower for single tokens.
_PLAIN: Options = {"flash_attention": 0}

# Within a class llmc's first row is what the others are compared with.
VARIANTS = (
    Variant(US, "int4", "int4", {"dtype": "int4"}),
    Variant("llama.cpp", "Q4_0", "int4", {"type": "Q4_0"}),
    Variant("llama.cpp", "Q4_0, no flash attention", "int4", {"type": "Q4_0"}, _PLAIN),
    Variant("llama.cpp", "Q4_K_M", "int4", {"type": "Q4_K_M"}),
    Variant("openvino", "int4 g128", "int4", _OV_INT4),
    Variant("openvino", "int4 g128, bf16, groups of 128", "int4", _OV_INT4, {**_BF16}),
    Variant("openvino", "int4 g128, f32, groups of 128", "int4", _OV_INT4, {**_F32}),
    Variant("onnxruntime", "int4 b32", "int4", {"precision": "int4", "accuracy_level": 4, "block_size": 32}),
    Variant("onnxruntime", "int4 b128", "int4", {"precision": "int4", "accuracy_level": 4, "block_size": 128}),
    Variant("mnn", "int4 b64", "int4", {"bits": 4, "block_size": 64}),
    Variant(US, "int8", "int8", {"dtype": "int8"}),
    Variant("llama.cpp", "Q8_0", "int8", {"type": "Q8_0"}),
    Variant("llama.cpp", "Q8_0, no flash attention", "int8", {"type": "Q8_0"}, _PLAIN),
    Variant("openvino", "int8", "int8", _OV_INT8),
    Variant("openvino", "int8, f32, groups of 128", "int8", _OV_INT8, {**_F32}),
    Variant("onnxruntime", "int8 b64", "int8", {"precision": "int8", "accuracy_level": 4, "block_size": 64}),
    Variant(US, "bf16", "float", {"dtype": "bf16"}),
    Variant(US, "f32", "float", {"dtype": "none"}),
    Variant("llama.cpp", "BF16", "float", {"type": "BF16"}),
    Variant("llama.cpp", "BF16, no flash attention", "float", {"type": "BF16"}, _PLAIN),
    Variant("torch", "bf16", "float", {"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    Variant("torch", "f32", "float", {"dtype": "float32"}, {"dtype": "float32"}),
)


def chosen(classes: Iterable[str], peers: Iterable[str]) -> list[Variant]:
    """The rows of these classes and peers; llmc's are always among them. ValueError names what does not exist."""
    classes, peers = list(classes), list(peers)
    for what, names, known in (("class", classes, CLASSES), ("peer", peers, tuple(PEERS))):
        for name in names:
            if name not in known:
                raise ValueError(f"there is no {what} {name!r}: choose from {', '.join(known)}")
    return [row for row in VARIANTS if row.precision in classes and row.peer in {US, *peers}]
