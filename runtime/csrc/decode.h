/* A step of one token of each sequence: what decoding pays for every token. */
#ifndef LLMC_DECODE_H
#define LLMC_DECODE_H

#include <stdint.h>

#include "step.h"

/* One more token of each sequence of a step that was filled for one of each: what changes from one such step to the next,
 * while the sequences have the same pages. `runtime/library.py` mirrors this struct with ctypes. */
typedef struct LlmcDecoding {
    const LlmcStep *step;
    const int32_t *positions;  /* [count] of the tokens: the step's own table */
    const int32_t *last_pages; /* [count]: the page that each token goes to */
    int32_t *slots, *tiles;    /* the step's own tables */
    int64_t count, page;
} LlmcDecoding;

/* Fills the slots and the tiles' positions, and runs the step as `llmc_run` does. */
int llmc_decode(const LlmcDecoding *decoding, int64_t threads);

#endif
