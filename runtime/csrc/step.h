/* The step's C interface: what the runtime passes to an artifact's generated step driver, and nothing else.
 *
 * `runtime/library.py` mirrors this struct with ctypes; change both together and raise LLMC_ABI. */
#ifndef LLMC_STEP_H
#define LLMC_STEP_H

#include <stdint.h>

#define LLMC_ABI 8

/* Positions in LlmcStep.sizes; the letters are those of docs/architecture.md. */
enum {
    LLMC_TOKENS = 0,    /* T: tokens of this step */
    LLMC_TILES = 1,     /* Q: query tiles */
    LLMC_SEQUENCES = 2, /* B: sequences */
    LLMC_PAGES = 3,     /* M: pages a sequence in the block table */
    LLMC_ROWS = 4,      /* R: rows whose logits are wanted */
    LLMC_SPLITS = 5,    /* SPLITS: units that attention over a context is for, if it has so many parts */
    LLMC_PROMPT = 6,    /* 1: the tokens are read, as a prompt or a text; 0: each decodes, in a tile of its own */
    LLMC_ADAPTED = 7,   /* ADAPTED: tokens that have an adapter */
    LLMC_SIZES = 8
};

typedef struct LlmcStep {
    int64_t sizes[LLMC_SIZES];
    const int32_t *ids;         /* [T] */
    const int32_t *positions;   /* [T] */
    const int32_t *slots;       /* [T]: page * PAGE + offset */
    const int32_t *tiles;       /* [Q, 4]: sequence, first row, rows, position of the first row */
    const int32_t *block_table; /* [B, M] */
    const int32_t *rows;        /* [R] */
    float *logits;              /* [R, vocabulary]; only where the task is "generate" */
    void *arena;                /* 4096-byte aligned, at least the manifest's step.arena_bytes */
    const void *weights;        /* 4096-byte aligned, read only: the artifact's weights section */
    void *const *cache;         /* keys of layer 0, values of layer 0, keys of layer 1, ...; 4096-byte aligned */
    int64_t *profile;           /* NULL, or int64[calls]: nanoseconds of each call, added to what is there */
    /* Encoders: */
    const int32_t *token_types; /* [T] */
    const int32_t *starts;      /* [B + 1]: the first row of each sequence, then T */
    /* Encoders, and graphs of any kind. Buffers are 64-byte aligned, also where they hold no element. */
    void *const *outputs;       /* the graph's outputs, in order */
    /* Graphs of any kind, whose sizes have names of their own: */
    const void *const *inputs;  /* the graph's inputs, in order */
    const int64_t *dims;        /* the sizes, sorted by name */
    /* Texts whose angles depend on the length of the sequence (the manifest's step.regimes): */
    const int32_t *lengths;     /* [T]: a length of the regime that the token's sequence is computed in */
    int64_t arena_bytes;        /* of the arena */
    int64_t cache_pages;        /* of each buffer of the cache: page numbers and slots are checked against it */
    /* Artifacts with room for adapters: */
    const int32_t *adapters;    /* [T]: the number of each token's adapter, 0: none */
    void *const *adapter_tables; /* a, b and ranks of linear op 0, of linear op 1, ...: LlmcAdapterFacts of llmc.h */
} LlmcStep;

/* What may be wrong with a step that is given to any artifact: what llmc_step returns, and then nothing has run. */
enum {
    LLMC_WRONG_SIZE = 1, /* negative, or beyond what the artifact was compiled for */
    LLMC_WRONG_POINTER,  /* NULL, or not aligned, where the step would read or write */
    LLMC_WRONG_MEMORY,   /* an arena or a cache that is too small */
    LLMC_WRONG_ID,
    LLMC_WRONG_POSITION,
    LLMC_WRONG_SLOT,
    LLMC_WRONG_PAGE,
    LLMC_WRONG_ROW,
    LLMC_WRONG_START,
    LLMC_WRONG_TILE,
    LLMC_WRONG_ADAPTER,
    LLMC_WRONG_KINDS = LLMC_WRONG_ADAPTER
};

/* Runs the model once over T tokens. Returns 0, or n > 0 when its inputs are impossible: one of the above, or else
 * something that this graph has looked at, after which what the step wrote is of no use. The manifest's step.failures
 * says what its n-th kind of failure is. */
int llmc_step(const LlmcStep *step);

#endif
