/* See step_check.h. Loops over indices have no branch, so that compilers make vectors of them. */
#include "step_check.h"

#include <stddef.h>

enum { ALIGNMENT = 64 };

/* A buffer that kernels read or write. */
static bool is_buffer(const void *pointer) { return pointer != NULL && (uintptr_t)pointer % ALIGNMENT == 0; }

static bool are_buffers(const void *const *pointers, int64_t count) {
    if (count > 0 && pointers == NULL) return false;
    bool fine = true;
    for (int64_t i = 0; i < count; i++) fine &= is_buffer(pointers[i]);
    return fine;
}

/* Whether all of `count` indices are in 0 .. end - 1. A negative one is a large one without its sign. */
static bool all_below(const int32_t *indices, int64_t count, int64_t end) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t index = (uint32_t)indices[i];
        largest = index > largest ? index : largest;
    }
    return count == 0 || (largest <= INT32_MAX && (int64_t)largest < end);
}

static bool sizes_fit(const int64_t *sizes, const int64_t *least, const int64_t *most, int64_t count) {
    bool fine = true;
    for (int64_t i = 0; i < count; i++) fine &= sizes[i] >= least[i] && sizes[i] <= most[i];
    return fine;
}

static bool pointers_fit(const LlmcStep *step, const LlmcLimits *limits) {
    const struct {
        bool wanted;
        const void *pointer;
    } buffers[] = {
        {limits->arena_bytes > 0, step->arena},
        {limits->weights, step->weights},
        {limits->logits && step->sizes[LLMC_ROWS] > 0, step->logits},
        {limits->ids, step->ids},
        {limits->positions, step->positions},
        {limits->slots, step->slots},
        {limits->tiles, step->tiles},
        {limits->block_table, step->block_table},
        {limits->rows && step->sizes[LLMC_ROWS] > 0, step->rows},
        {limits->token_types, step->token_types},
        {limits->starts, step->starts},
        {limits->lengths, step->lengths},
        {limits->adapters, step->adapters},
    };
    bool fine = true;
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        fine &= !buffers[i].wanted || is_buffer(buffers[i].pointer);
    }
    return fine && are_buffers((const void *const *)step->cache, limits->caches) &&
           are_buffers(step->inputs, limits->inputs) &&
           are_buffers((const void *const *)step->adapter_tables, limits->adapter_tables) &&
           are_buffers((const void *const *)step->outputs, limits->outputs);
}

/* The first row is 0, the last start is the end, and no sequence is empty or longer than the context. */
static bool starts_fit(const LlmcStep *step, int64_t context) {
    const int64_t sequences = step->sizes[LLMC_SEQUENCES];
    bool fine = step->starts[0] == 0 && step->starts[sequences] == step->sizes[LLMC_TOKENS];
    for (int64_t i = 0; i < sequences; i++) {
        int64_t length = (int64_t)step->starts[i + 1] - step->starts[i];
        fine &= length >= 1 && length <= context;
    }
    return fine;
}

/* Numbers of adapters that there are, and as many tokens with one as is said: whether there are any decides what runs. */
static bool adapters_fit(const LlmcStep *step, const LlmcLimits *limits) {
    int64_t adapted = 0;
    if (!all_below(step->adapters, step->sizes[LLMC_TOKENS], limits->adapter_count + 1)) return false;
    for (int64_t i = 0; i < step->sizes[LLMC_TOKENS]; i++) adapted += step->adapters[i] != 0;
    return adapted == step->sizes[LLMC_ADAPTED];
}

/* Each tile is of consecutive rows of one sequence, whose positions have pages in the block table; together they are as
 * many as there are tokens. Where sequences are whole, a tile is of the rows of its own, and all of it has pages. */
static bool tiles_fit(const LlmcStep *step, const LlmcLimits *limits) {
    const int64_t tokens = step->sizes[LLMC_TOKENS], room = step->sizes[LLMC_PAGES] * limits->page;
    const int64_t end = limits->block_table && room < limits->context ? room : limits->context;
    int64_t covered = 0;
    bool fine = true;
    for (int64_t i = 0; i < step->sizes[LLMC_TILES]; i++) {
        const int32_t *tile = step->tiles + 4 * i;
        const int64_t sequence = tile[0], first = tile[1], rows = tile[2], position = tile[3];
        fine &= sequence >= 0 && sequence < step->sizes[LLMC_SEQUENCES];
        fine &= rows >= 1 && rows <= limits->tile && first >= 0 && first + rows <= tokens;
        fine &= position >= 0 && position + rows <= end;
        covered += rows;
        if (limits->starts && fine) {
            const int64_t start = step->starts[sequence], stop = step->starts[sequence + 1];
            fine &= first >= start && first + rows <= stop && position == first - start && stop - start <= end;
        }
    }
    return fine && covered == tokens;
}

int llmc_check_step(const LlmcStep *step, const LlmcLimits *limits) {
    if (step == NULL || (limits->dims > 0 && step->dims == NULL)) return LLMC_WRONG_POINTER;
    if (!sizes_fit(step->sizes, limits->least, limits->most, LLMC_SIZES) ||
        !sizes_fit(step->dims, limits->least_dims, limits->most_dims, limits->dims)) {
        return LLMC_WRONG_SIZE;
    }
    if (step->arena_bytes < limits->arena_bytes || (limits->caches > 0 && step->cache_pages < 1)) {
        return LLMC_WRONG_MEMORY;
    }
    if (!pointers_fit(step, limits)) return LLMC_WRONG_POINTER;
    const int64_t tokens = step->sizes[LLMC_TOKENS], rows = step->sizes[LLMC_ROWS];
    const int64_t pages = step->cache_pages < INT32_MAX ? step->cache_pages : INT32_MAX;
    const int64_t table = step->sizes[LLMC_SEQUENCES] * step->sizes[LLMC_PAGES];
    if (limits->ids && !all_below(step->ids, tokens, limits->vocabulary)) return LLMC_WRONG_ID;
    if (limits->positions && !all_below(step->positions, tokens, limits->context)) return LLMC_WRONG_POSITION;
    if (limits->slots && !all_below(step->slots, tokens, pages * limits->page)) return LLMC_WRONG_SLOT;
    if (limits->block_table && !all_below(step->block_table, table, pages)) return LLMC_WRONG_PAGE;
    if (limits->rows && !all_below(step->rows, rows, tokens)) return LLMC_WRONG_ROW;
    if (limits->starts && !starts_fit(step, limits->context)) return LLMC_WRONG_START;
    if (limits->tiles && !tiles_fit(step, limits)) return LLMC_WRONG_TILE;
    if (limits->adapters && !adapters_fit(step, limits)) return LLMC_WRONG_ADAPTER;
    return 0;
}
