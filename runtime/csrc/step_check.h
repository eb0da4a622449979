/* What a step is given, looked at before it runs: sizes, pointers and everything that is an index. */
#ifndef LLMC_STEP_CHECK_H
#define LLMC_STEP_CHECK_H

#include <stdbool.h>
#include <stdint.h>

#include "step.h"

/* What the artifact was compiled for: generated with its step (targets/step_limits.py). */
typedef struct LlmcLimits {
    int64_t least[LLMC_SIZES], most[LLMC_SIZES]; /* of LlmcStep.sizes */
    int64_t arena_bytes;
    int64_t vocabulary;                             /* token ids are below this */
    int64_t context;                                /* positions and lengths of sequences are below and up to this */
    int64_t page, tile;                             /* tokens of a cache page; rows of a query tile at most */
    int64_t caches, inputs, outputs, dims;          /* how many pointers, and sizes, there are */
    const int64_t *least_dims, *most_dims;          /* of LlmcStep.dims */
    bool weights, logits;                           /* which of its pointers the step follows */
    bool ids, positions, slots, tiles, block_table, rows, token_types, starts, lengths, adapters;
    int64_t adapter_count;                          /* numbers of adapters are up to this */
    int64_t adapter_tables;                         /* how many pointers there are */
} LlmcLimits;

/* 0, or which LLMC_WRONG_* of step.h it is. Reads T + Q + B * M + R numbers: next to nothing of a step. */
int llmc_check_step(const LlmcStep *step, const LlmcLimits *limits);

#endif
