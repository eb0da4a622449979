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
} LlmcPart;

/* Where a step's tables lie: each has room for the tokens of a step, tiles for four numbers each. */
typedef struct LlmcTables {
    int32_t *ids, *positions, *slots, *lengths, *rows, *tiles;
    int32_t *starts; /* one more than tokens; NULL: the step has none */
    int32_t *block_table;
    int64_t block_table_room; /* numbers that it has room for */
} LlmcTables;

/* What decides how the work of attention is divided. */
typedef struct LlmcDivision {
    int64_t page, tile, max_splits;
    int64_t kv_heads; /* the fewest of any layer */
    int64_t threads;
} LlmcDivision;

/* Numbers that the block table of a step with these parts has. */
int64_t llmc_table_numbers(const LlmcPart *parts, int64_t number);

/* Fills the tables and `step->sizes`; the block table has to have room for `llmc_table_numbers`. */
void llmc_fill_step(LlmcStep *step, const LlmcTables *tables, const LlmcDivision *division, const LlmcPart *parts,
                    int64_t number);

/* Into how many parts attention cuts the context: as many as give every thread a unit of at least four pages; and, so
 * that threads can help each other, a few units of at least sixteen. */
int64_t llmc_choose_splits(const LlmcDivision *division, int64_t tiles, int64_t pages);

/* Rows of a query tile: division->tile, halved until every thread has a few units of work, but not below sixteen. */
int64_t llmc_choose_tile(const LlmcDivision *division, const LlmcPart *parts, int64_t number);

#endif
