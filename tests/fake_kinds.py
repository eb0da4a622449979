"""Small artifacts with handwritten steps that are no decoders: an encoder, and a graph of any kind.

The encoder: every token's key is its id, position and token type, stored through `slots`; the state of a token is a
hash of all keys of its sequence, read through `block_table`, `tiles` and `starts`, and of its own row. A sequence's
vector is a hash of its tokens' states. So a wrong slot, page, tile, start, position or type changes the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fake_artifact
import numpy as np

MAX_STEP = fake_artifact.MAX_STEP
MAX_TOKENS = 40
DIMENSION = 3
LABELS = ["no", "maybe", "yes"]

_HASH = r"""
#include "pool.h"
#define PAGE 32
static uint64_t mix(uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * UINT64_C(0x9E3779B97F4A7C15);
    return sum ^ (sum >> 29);
}
"""

ENCODER_STEP = (
    _HASH
    + r"""
int llmc_step(const LlmcStep *s) {
    const int64_t tokens = s->sizes[LLMC_TOKENS], sequences = s->sizes[LLMC_SEQUENCES];
    float *keys = s->cache[0];
    uint64_t *sums = s->arena;
    float *vectors = s->outputs[0], *states = s->outputs[1];
    if (tokens > %(max_step)d) return 7;
    if (((uintptr_t)vectors | (uintptr_t)states | (uintptr_t)s->starts | (uintptr_t)s->token_types) %% 64) return 8;
    if (s->starts[0] != 0 || s->starts[sequences] != tokens) return 9;
    if (s->profile) s->profile[0] += 1;
    for (int64_t t = 0; t < tokens; t++) {
        keys[(s->slots[t] / PAGE) * 2 * PAGE + s->slots[t] %% PAGE] =
            (float)(s->ids[t] + 1) + 1000.0f * (float)s->positions[t] + 100000.0f * (float)s->token_types[t];
        sums[t] = 0;
    }
    for (int64_t q = 0; q < s->sizes[LLMC_TILES]; q++) {
        const int32_t *tile = s->tiles + 4 * q;
        const int32_t *pages = s->block_table + tile[0] * s->sizes[LLMC_PAGES];
        const int32_t length = s->starts[tile[0] + 1] - s->starts[tile[0]];
        for (int row = 0; row < tile[2]; row++) {
            uint64_t sum = (uint64_t)(tile[3] + row);
            for (int p = 0; p < length; p++)
                sum = mix(sum, (uint64_t)keys[(int64_t)pages[p / PAGE] * 2 * PAGE + p %% PAGE]);
            sums[tile[1] + row] += sum; /* added: a row in two tiles shows */
        }
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int v = 0; v < 3; v++) states[3 * t + v] = (float)(mix(sums[t], (uint64_t)v) >> 48) / 65536.0f;
    for (int64_t b = 0; b < sequences; b++)
        for (int v = 0; v < 3; v++) {
            uint64_t sum = (uint64_t)v;
            for (int64_t t = s->starts[b]; t < s->starts[b + 1]; t++) sum = mix(sum, sums[t]);
            vectors[3 * b + v] = (float)(sum >> 48) / 65536.0f;
        }
    return 0;
}
"""
)

# total[n] = sums of the rows of x [n, 3] and y [n, m]; wide: bf16 [n, 3] times two; count: m, of no axis.
ARRAY_STEP = r"""
#include "pool.h"
int llmc_step(const LlmcStep *s) {
    const int64_t columns = s->dims[0], rows = s->dims[1]; /* m, n: sorted by name */
    const float *x = s->inputs[0];
    const int64_t *y = s->inputs[1];
    const uint16_t *half = s->inputs[2];
    float *total = s->outputs[0];
    uint16_t *wide = s->outputs[1];
    int64_t *count = s->outputs[2];
    if (((uintptr_t)x | (uintptr_t)y | (uintptr_t)half | (uintptr_t)total | (uintptr_t)wide) %% 64) return 8;
    if (%(max_step)d < 0 || %(vocab)d < 0) return 9;
    if (s->profile) s->profile[0] += 1;
    for (int64_t i = 0; i < rows; i++) {
        total[i] = x[3 * i] + x[3 * i + 1] + x[3 * i + 2];
        for (int64_t j = 0; j < columns; j++) total[i] += (float)y[i * columns + j];
        for (int j = 0; j < 3; j++) wide[3 * i + j] = (uint16_t)(half[3 * i + j] + 0x80); /* the exponent, one more */
    }
    count[0] = columns;
    return 0;
}
"""


def _mix(total: int, word: int) -> int:
    total = ((total ^ word) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return total ^ (total >> 29)


def reference(ids: Sequence[int], types: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The vector float32 [3] and the states float32 [n, 3] that the encoder must give for a sequence."""
    types = types if types is not None else [0] * len(ids)
    keys = [token + 1 + 1000 * p + 100000 * kind for p, (token, kind) in enumerate(zip(ids, types, strict=True))]
    sums = []
    for row in range(len(ids)):
        total = row
        for key in keys:
            total = _mix(total, int(np.float32(key)))
        sums.append(total)
    states = np.array([[_mix(total, v) >> 48 for v in range(3)] for total in sums], np.float32) / 65536
    vector = []
    for v in range(3):
        total = v
        for part in sums:
            total = _mix(total, part)
        vector.append(total >> 48)
    return np.array(vector, np.float32) / 65536, states


def word_tokenizer(words: Sequence[str] = ("a", "b", "c", "dog", "cat")) -> bytes:
    """A tokenizer.json of words, with [CLS] text [SEP] and [CLS] text [SEP] text [SEP] around them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer.to_str().encode()


def encoder_facts(**changes: object) -> dict[str, object]:
    """The manifest's `encoder` of an embedding model."""
    return {
        "kind": "embedding",
        "output": "embedding",
        "labels": None,
        "multi_label": False,
        "max_tokens": MAX_TOKENS,
        "prompts": {"query": "dog "},
        "default_prompt": None,
        "normalized": False,
        **changes,
    }


def encoder_step() -> dict[str, object]:
    """The manifest's `step` of the encoder."""
    step = dict(fake_artifact.manifest()["step"])  # type: ignore[call-overload]
    return {**step, "max_step": MAX_STEP, "state": "ragged", "arena_bytes": 8 * MAX_STEP}


def write_encoder(
    path: Path,
    encoder: object = None,
    tokenizer: bytes | None = None,
    source: str = ENCODER_STEP,
    token_types: int = 2,
    no_use: bool = False,
    **changes: object,
) -> Path:
    """Writes the fake encoder. encoder: its entry in the manifest; no_use: none; changes: others."""
    layer = {"kv_heads": 1, "head_dim": 2, "value_dim": 2, "dtype": "float32", "window": None}
    facts: dict[str, object] = {
        "task": "encode",
        "step": encoder_step(),
        "kv": {"layers": [layer]},
        "outputs": [
            {"name": "embedding", "dtype": "float32", "shape": ["B", DIMENSION]},
            {"name": "states", "dtype": "float32", "shape": ["T", 3]},
        ],
        "encoder": None if no_use else encoder_facts() if encoder is None else encoder,
        "tokenizer_facts": {**fake_artifact.manifest()["tokenizer"], "token_types": token_types},  # type: ignore[dict-item]
        **changes,
    }
    return fake_artifact.write(path, source, tokenizer or word_tokenizer(), **facts)


def write_arrays(path: Path, **changes: object) -> Path:
    """Writes the fake graph of any kind, for at most 8 rows and 40 columns."""
    step = {**fake_artifact.manifest()["step"], "state": "run", "max_step": 1, "vocab_size": 1}  # type: ignore[dict-item]
    facts: dict[str, object] = {
        "task": "run",
        "step": step,
        "kv": {"layers": []},
        "max_context": 1,
        "tokenizer": None,
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["n", 3]},
            {"name": "y", "dtype": "int64", "shape": ["n", "m"]},
            {"name": "half", "dtype": "bfloat16", "shape": ["n", 3]},
        ],
        "outputs": [
            {"name": "total", "dtype": "float32", "shape": ["n"]},
            {"name": "wide", "dtype": "bfloat16", "shape": ["n", 3]},
            {"name": "count", "dtype": "int64", "shape": []},
        ],
        "symbols": [{"name": "m", "low": 0, "high": 40}, {"name": "n", "low": 1, "high": 8}],
        **changes,
    }
    return fake_artifact.write(path, ARRAY_STEP, **facts)
