/* Where the tokens of a step go: the tables of a step, made of runs of tokens of several sequences. */
#ifndef LLMC_PLACES_H
#define LLMC_PLACES_H

#include <stdint.h>

#include "step.h"

/* Consecutive tokens of one sequence in one step: positions start .. start + count - 1. */
typedef struct LlmcPart {
    const int32_t *ids;   /* [count] */
    const int32_t *pages; /* [page_count] of the sequence, in order; at least those of its tokens up to these */
    int64_t page_count;   /* 0: there is no cache */
    int64_t count, start;
    int64_t first_row; /* the logits of the rows from here on are wanted; count: none */
    int64_t length;    /* what `lengths` of the step says of its tokens */
    int64_t adapter;   /* the number of its tokens' adapter, 0: none */
    int64_t decoding;  /* 1: its tokens decode, each in a tile of its own; 0: they are read, as a prompt or a text */
} LlmcPart;

/* Where a step's tables lie: each has room for the tokens of a step, tiles for four numbers each, and the block table for
 * as many sequences of the longest context. */
typedef struct LlmcTables {
    int32_t *ids, *positions, *slots, *lengths, *rows, *tiles;
    int32_t *starts; /* one more than tokens; NULL: the step has none */
    int32_t *token_types;
    int32_t *block_table;
    int32_t *adapters;
} LlmcTables;

/* What decides how the work of attention is divided. */
typedef struct LlmcDivision {
    int64_t page, tile, max_splits;
    int64_t part;     /* tokens of a context that attention takes together, at least */
    int64_t kv_heads; /* the fewest of any layer */
    int64_t threads;
} LlmcDivision;

/* Fills the tables and `step->sizes`. */
void llmc_fill_step(LlmcStep *step, const LlmcTables *tables, const LlmcDivision *division, const LlmcPart *parts,
                    int64_t number);

/* In how many parts attention takes a context of so many tokens: of division->part each, or, where those would be more
 * than division->max_splits, of twice as many, four times, ... */
int64_t llmc_parts_of(const LlmcDivision *division, int64_t tokens);

/* Into how many units attention cuts the context of a query tile that is taken in up to `parts` parts: one for every part
 * if threads would have too little to do with one for all of them. It decides who
 * does the work, not what is computed. */
int64_t llmc_choose_splits(const LlmcDivision *division, int64_t tiles, int64_t parts);

/* Rows of a query tile: division->tile, halved until every thread has a few units of work, but not below sixteen. */
int64_t llmc_choose_tile(const LlmcDivision *division, const LlmcPart *parts, int64_t number);

#endif
