"""What an artifact's code says of itself (`LlmcFacts` of llmc.h) is what its manifest says."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import c_api
import fake_kinds
import pytest
from kernel_harness import CACHE
from tiny_encoders import make_sentence
from tiny_models import make_tiny

import llmc
from llmc.runtime import cpu
from llmc.runtime.artifact import Artifact
from llmc.targets import machine_named
from llmc.targets.cpu.library import c_sources
from llmc.targets.facts import c_string, cpu_flag
from llmc.targets.x86 import detect

TASKS, STATES = ("generate", "encode", "run"), ("paged", "none", "ragged", "run")
BYTES = {"float16": 2, "float32": 4}
LONGROPE = {
    "max_position_embeddings": 96,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, "factor": 4.0,
        "short_factor": [1.0] * 8, "long_factor": [2.0, 3.0] * 4,
    },
}  # fmt: skip


def compiled(kind: str, folder: Path) -> Path:
    """An artifact of each kind that there is."""
    path = folder / "model.so"
    if kind == "arrays":
        return fake_kinds.write_arrays(path)
    if kind == "encoder":
        model = make_sentence("bert", folder / "model")
    else:
        model = make_tiny("llama", folder / "model", **(LONGROPE if kind == "regimes" else {}))
    llmc.compile(model, path, dtype="int4" if kind == "decoder" else "f32", kernel_cache=CACHE)
    return path


@pytest.mark.parametrize("kind", ["decoder", "regimes", "encoder", "arrays"])
def test_facts_are_those_of_the_manifest(kind: str, tmp_path: Path) -> None:
    path = compiled(kind, tmp_path)
    facts = c_api.table(path).facts.contents
    artifact = Artifact.open(path)
    manifest, step = artifact.manifest, artifact.manifest.step
    artifact.close()
    expected = {
        "bytes": ctypes.sizeof(facts),
        "task": TASKS.index(manifest.task),
        "state": STATES.index(step.state),
        "vocabulary": step.vocab_size,
        "max_context": manifest.max_context,
        "max_step": step.max_step,
        "page": step.page,
        "tile": step.tile,
        "max_splits": step.max_splits,
        "part": step.part,
        "row_kinds": int(step.row_kinds),
        "arena_bytes": step.arena_bytes,
        "weights_bytes": manifest.weights_bytes,
        "tile_registers": any(name.startswith("amx") for name in manifest.target.features),
    }
    assert {name: getattr(facts, name) for name in c_api.NUMBERS} == expected
    assert facts.architecture.decode() == manifest.target.arch
    assert {item.name.decode() for item in c_api.listed(facts, "feature")} == manifest.target.features
    assert [
        (layer.kv_heads, layer.head_dim, layer.value_dim, layer.element_bytes, layer.window)
        for layer in c_api.listed(facts, "layer")
    ] == [(x.kv_heads, x.head_dim, x.value_dim, BYTES[x.dtype], x.window or 0) for x in manifest.layers]
    assert tuple(c_api.listed(facts, "regime")) == step.regimes
    assert tuple(text.decode() for text in c_api.listed(facts, "failure")) == step.failures
    outputs = c_api.listed(facts, "output")
    assert [(x.name.decode(), x.dtype.decode()) for x in outputs] == [(x.name, x.dtype) for x in manifest.outputs]
    encoder = manifest.encoder
    if encoder is None:
        assert facts.encoder_output == -1
    else:
        found = outputs[facts.encoder_output]
        assert (found.name.decode(), found.per) == (encoder.output, 2)
        assert (found.elements,) == manifest.outputs[facts.encoder_output].shape[-1]
        assert facts.max_tokens == encoder.max_tokens


def test_linux_has_every_feature_by_the_name_that_the_facts_give() -> None:
    known = {feature for name in detect.names()[1:] for feature in machine_named(name).features}
    assert known > {"sse4.1", "lzcnt", "amx-int8", "avx512vnni"}
    for feature in known:
        assert cpu.llvm_features({cpu_flag(feature)}, "x86_64") == {feature}
    for feature in ("neon", "dotprod", "fullfp16", "fp16fml", "lse", "i8mm", "sve2", "crc", "rdm"):
        assert cpu.llvm_features({cpu_flag(feature)}, "aarch64") == {feature}


def test_the_structs_of_the_tests_are_those_of_the_header(tmp_path: Path) -> None:
    names = ("Facts", "LayerFacts", "Feature", "OutputFacts", "Options", "Sampling", "Api")
    kinds = (c_api.Facts, c_api.Layer, c_api.Feature, c_api.Output, c_api.Options, c_api.Sampling, c_api.Api)
    lines, expected = [], []
    for name, kind in zip(names, kinds, strict=True):
        for field, *_ in kind._fields_:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof(Llmc{name}, {field}));')
            expected.append(f"{name}.{field} {getattr(kind, field).offset}")
        lines.append(f'printf("{name} %zu\\n", sizeof(Llmc{name}));')
        expected.append(f"{name} {ctypes.sizeof(kind)}")
    source = (
        '#include "llmc.h"\n#include <stddef.h>\n#include <stdio.h>\n' + f"int main(void) {{ {' '.join(lines)} }}\n"
    )
    code, binary = tmp_path / "print.c", tmp_path / "print"
    code.write_text(source)
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run(["gcc", "-std=c11", *warnings, f"-I{c_sources()}", str(code), "-o", str(binary)], check=True)
    assert subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.splitlines() == expected
    subprocess.run(["gcc", "-x", "c++", *warnings, "-fsyntax-only", f"-I{c_sources()}", str(code)], check=True)


def test_texts_are_written_as_they_are() -> None:
    assert c_string('a"b\\c\n\u00e9?') == '"a\\042b\\134c\\012\\303\\251\\077"'
