"""A small artifact with a handwritten step, so that the runtime is tested without the compiler.

The model of the fake step: every token's key is its id and position, stored through `slots`; the logits of a row are a
hash of all keys that it sees through `block_table` and `tiles`, one by one. A wrong slot, page, tile, position or row
changes the logits. `reference_logits` computes the same from the tokens alone.
"""

from __future__ import annotations

import atexit
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from llmc.compiler.artifact import ArtifactWriter
from llmc.runtime import cpu
from llmc.targets.cpu.library import INTERFACE, c_sources, link_options
from llmc.targets.facts import facts_source

CODED = ("task", "target", "step", "max_context", "kv", "weights", "outputs", "encoder")  # what `facts_source` reads
VOCAB = 300
MAX_STEP = 48

STEP = r"""
#include "pool.h"
#define PAGE 32
#define VOCAB %(vocab)d
typedef struct { const LlmcStep *step; } Context;
/* The cache is one float per token in layer 0's keys, and its double in layer 1's values. */
static void store(void *context, int64_t begin, int64_t end) {
    const LlmcStep *s = ((Context *)context)->step;
    float *keys = s->cache[0], *values = s->cache[3];
    for (int64_t t = begin; t < end; t++) {
        int64_t page = s->slots[t] / PAGE, offset = s->slots[t] %% PAGE;
        keys[page * 2 * PAGE + offset] = (float)(s->ids[t] + 1) + 1000.0f * (float)s->positions[t];
        values[(page * PAGE + offset) * 2] = 2.0f * keys[page * 2 * PAGE + offset];
    }
}
static uint64_t mix(uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * UINT64_C(0x9E3779B97F4A7C15);
    return sum ^ (sum >> 29);
}
static void attend(void *context, int64_t begin, int64_t end) {
    const LlmcStep *s = ((Context *)context)->step;
    const float *keys = s->cache[0], *values = s->cache[3];
    uint64_t *sums = s->arena;
    for (int64_t q = begin; q < end; q++) {
        const int32_t *tile = s->tiles + 4 * q;
        const int32_t *pages = s->block_table + tile[0] * s->sizes[LLMC_PAGES];
        for (int row = 0; row < tile[2]; row++) {
            uint64_t sum = 0;
            for (int p = 0; p <= tile[3] + row; p++) {
                float key = keys[(int64_t)pages[p / PAGE] * 2 * PAGE + p %% PAGE];
                float value = values[((int64_t)pages[p / PAGE] * PAGE + p %% PAGE) * 2];
                sum = mix(sum, (uint64_t)key + (uint64_t)(value != 2.0f * key));
            }
            sums[tile[1] + row] = sum;
        }
    }
}
static void predict(void *context, int64_t begin, int64_t end) {
    const LlmcStep *s = ((Context *)context)->step;
    const uint64_t *sums = s->arena;
    const unsigned char *weights = s->weights;
    for (int64_t r = begin; r < end; r++)
        for (int v = 0; v < VOCAB; v++)
            s->logits[r * VOCAB + v] = (float)(mix(sums[s->rows[r]], (uint64_t)v + weights[v]) >> 48);
}
int llmc_step(const LlmcStep *s) {
    Context context = {s};
    if (s->sizes[LLMC_TOKENS] > %(max_step)d) return 7;
    if ((uintptr_t)s->logits %% 64 || (uintptr_t)s->arena %% 64 || (uintptr_t)s->ids %% 64) return 8;
    if (s->profile) s->profile[0] += 1;
    llmc_parallel(store, &context, s->sizes[LLMC_TOKENS], 1);
    llmc_parallel(attend, &context, s->sizes[LLMC_TILES], 1);
    llmc_parallel(predict, &context, s->sizes[LLMC_ROWS], 1);
    return 0;
}
"""

# Without a cache: the whole sequence is in the step, in one run of tiles.
STATELESS_STEP = r"""
#include "pool.h"
#define VOCAB %(vocab)d
static uint64_t mix(uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * UINT64_C(0x9E3779B97F4A7C15);
    return sum ^ (sum >> 29);
}
int llmc_step(const LlmcStep *s) {
    const unsigned char *weights = s->weights;
    for (int64_t r = 0; r < s->sizes[LLMC_ROWS]; r++) {
        uint64_t sum = 0;
        for (int64_t t = 0; t <= s->rows[r]; t++)
            sum = mix(sum, (uint64_t)(s->ids[t] + 1) + UINT64_C(1000) * (uint64_t)s->positions[t]);
        for (int v = 0; v < VOCAB; v++)
            s->logits[r * VOCAB + v] = (float)(mix(sum, (uint64_t)v + weights[v]) >> 48);
    }
    return 0;
}
"""


def _mix(total: int, word: int) -> int:
    total = ((total ^ word) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return total ^ (total >> 29)


def weights() -> np.ndarray:
    """The fake model's one weight: uint8 [vocab]."""
    return np.random.default_rng(0).integers(0, 256, VOCAB, dtype=np.uint8)


def reference_logits(ids: list[int]) -> np.ndarray:
    """What the step must answer for each token of a sequence: float32 [len(ids), vocab]."""
    out = np.zeros((len(ids), VOCAB), np.float32)
    total = 0
    bias = weights().tolist()
    for position, token in enumerate(ids):
        total = _mix(total, token + 1 + 1000 * position)
        out[position] = [_mix(total, v + bias[v]) >> 48 for v in range(VOCAB)]
    return out


def _command(compiler: tuple[str, ...] = ("gcc",)) -> list[str]:
    return [*compiler, "-O3", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread", f"-I{c_sources()}"]


@cache
def runtime_objects(compiler: tuple[str, ...] = ("gcc",)) -> tuple[str, ...]:
    """The runtime's own C code, compiled once a test process. compiler: that of another architecture, if asked."""
    folder = Path(tempfile.mkdtemp(prefix="llmc-fake-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = sorted(c_sources().glob("*.c"))
    for each in [sources] if compiler == ("gcc",) else [[source] for source in sources]:  # zig makes one at a time
        subprocess.run([*_command(compiler), "-c", *map(str, each)], cwd=folder, check=True)
    return tuple(str(folder / f"{path.stem}.o") for path in sources)


def compile_library(
    source: str, folder: Path, facts: Mapping[str, object] | None = None, compiler: tuple[str, ...] = ("gcc",)
) -> Path:
    """Compiles a step with the runtime's C code, as the compiler does. facts: the manifest, if not the fake model's."""
    step = folder / "step.c"
    step.write_text(f'{source}\n#include "facts.h"\n{facts_source(manifest() if facts is None else facts)}\n')
    library = folder / "library.so"
    linking = link_options([*INTERFACE, "llmc_limit_*"], folder)
    command = [*_command(compiler), str(step), *runtime_objects(compiler), "-o", str(library), *linking]
    subprocess.run(command, check=True)
    return library


@cache
def library(source: str = STEP, facts: str = "", compiler: tuple[str, ...] = ("gcc",)) -> Path:
    """The fake step, compiled once a test process. facts: JSON of the manifest's entries that the code has too."""
    folder = Path(tempfile.mkdtemp(prefix="llmc-fake-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return compile_library(
        source % {"vocab": VOCAB, "max_step": MAX_STEP}, folder, json.loads(facts) if facts else None, compiler
    )


def manifest(**changes: object) -> dict[str, object]:
    """A manifest of the fake model; top-level entries can be replaced."""
    layer = {"kv_heads": 1, "head_dim": 2, "value_dim": 2, "dtype": "float32", "window": None}
    return {
        "schema": 1,
        "abi": 8,
        "task": "generate",
        "llmc_version": "0.1.0",
        "model": {"name": "fake", "source": "models/fake", "parameters": VOCAB, "bits_per_weight": 8.0},
        "target": {"name": "native", "arch": cpu.architecture(), "features": []},
        "step": {
            "max_step": MAX_STEP,
            "page": 32,
            "tile": 16,
            "max_splits": 16,
            "part": 512,
            "arena_bytes": 8 * MAX_STEP,
            "vocab_size": VOCAB,
            "state": "paged",
            "calls": ["whole step"],
        },
        "max_context": 400,
        "kv": {"layers": [layer, layer]},
        "weights": {"bytes": VOCAB, "tensors": [{"name": "bias", "offset": 0, "nbytes": VOCAB}]},
        "tokenizer": {
            "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "bos_id": None,
            "bos_token": None,
            "eos_token": None,
            "special_tokens": {},
            "add_bos": False,
            "stop_ids": [],
            "clean_up_spaces": False,
        },
        "generation": {},
        "kernels": [],
        "memory": {},
        "provenance": {},
        **changes,
    }


def byte_tokenizer() -> bytes:
    """A tokenizer.json with one token a byte (256 of them), and a few merges of ASCII pairs up to VOCAB tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = []
    for first in "etaoinshr":
        for second in "etaoin":
            if first + second not in vocabulary and len(vocabulary) < VOCAB:
                merges.append((first, second))
                vocabulary[first + second] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def _coded_facts(whole: dict[str, object]) -> str:
    """What `library` is to code of a manifest; nothing where that is the fake model's, or makes no sense."""
    facts, plain = ({name: m[name] for name in CODED if name in m} for m in (whole, manifest()))
    try:
        facts_source(facts)
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""
    return "" if facts == plain else json.dumps(facts)


_DEFAULT = object()


def write(
    path: Path,
    source: str = STEP,
    tokenizer: bytes | None = None,
    tokenizer_facts: object = _DEFAULT,
    compiler: tuple[str, ...] = ("gcc",),
    **changes: object,
) -> Path:
    """Writes the fake artifact. tokenizer: bytes of the section; tokenizer_facts, changes: entries of the manifest,
    which the code has too, where it has such facts."""
    if tokenizer_facts is not _DEFAULT:
        changes["tokenizer"] = tokenizer_facts
    code = library(source, _coded_facts(manifest(**changes)), compiler)
    with ArtifactWriter(path, code) as writer:
        writer.begin_weights()
        writer.append(weights())
        writer.add_tokenizer(byte_tokenizer() if tokenizer is None else tokenizer)
        writer.add_manifest(json.loads(json.dumps(manifest(**changes))))
    return path
