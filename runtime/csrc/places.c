/* See places.h. */
#include "places.h"

#include <stdbool.h>
#include <stddef.h>

enum { UNITS_PER_THREAD = 4, LEAST_TILE = 16 };

static int64_t ceiling(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

static int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t llmc_parts_of(const LlmcDivision *division, int64_t tokens) {
    int64_t part = division->part;
    while (ceiling(tokens, part) > division->max_splits) part *= 2;
    return ceiling(tokens, part);
}

int64_t llmc_choose_splits(const LlmcDivision *division, int64_t tiles, int64_t parts) {
    const int64_t threads = division->threads, units = tiles * division->kv_heads;
    const bool is_few = units < threads || (parts > 2 && units < UNITS_PER_THREAD * threads);
    return threads > 1 && is_few ? parts : 1;
}

int64_t llmc_choose_tile(const LlmcDivision *division, const LlmcPart *parts, int64_t number) {
    int64_t tile = division->tile;
    while (tile > LEAST_TILE) {
        int64_t tiles = 0;
        for (int64_t i = 0; i < number; i++) tiles += ceiling(parts[i].count, tile);
        if (tiles * division->kv_heads >= UNITS_PER_THREAD * division->threads) break;
        tile = greatest(LEAST_TILE, tile / 2);
    }
    return tile;
}

static int64_t columns_of(const LlmcPart *parts, int64_t number) {
    int64_t columns = 1;
    for (int64_t i = 0; i < number; i++) columns = greatest(columns, parts[i].page_count);
    return columns;
}

/* Ids, positions, slots, lengths and adapters of a part whose first token is the step's `token`-th. */
static void fill_tokens(const LlmcTables *tables, const LlmcPart *part, int64_t page, int64_t token) {
    for (int64_t i = 0; i < part->count; i++) {
        const int64_t position = part->start + i;
        tables->ids[token + i] = part->ids[i];
        tables->positions[token + i] = (int32_t)position;
        tables->lengths[token + i] = (int32_t)part->length;
        tables->adapters[token + i] = (int32_t)part->adapter;
        tables->slots[token + i] =
            part->page_count ? (int32_t)(part->pages[position / page] * page + position % page) : 0;
    }
}

/* Tiles of a part, which end at positions that are multiples of `rows`; returns how many. The last first: it sees the
 * longest context, and the work ends with small units. */
static int64_t fill_tiles(int32_t *tiles, const LlmcPart *part, int64_t sequence, int64_t token, int64_t rows) {
    int64_t tile = 0;
    for (int64_t end = part->start + part->count; end > part->start; tile++) {
        const int64_t begin = greatest(part->start, (end - 1) / rows * rows);
        tiles[4 * tile] = (int32_t)sequence;
        tiles[4 * tile + 1] = (int32_t)(token + begin - part->start);
        tiles[4 * tile + 2] = (int32_t)(end - begin);
        tiles[4 * tile + 3] = (int32_t)begin;
        end = begin;
    }
    return tile;
}

void llmc_fill_step(LlmcStep *step, const LlmcTables *tables, const LlmcDivision *division, const LlmcPart *parts,
                    int64_t number) {
    const int64_t tile_rows = llmc_choose_tile(division, parts, number), columns = columns_of(parts, number);
    int64_t token = 0, tile = 0, row = 0, context_parts = 1, reading = 0, adapted = 0;
    for (int64_t i = 0; i < number; i++) {
        const LlmcPart *part = &parts[i];
        fill_tokens(tables, part, division->page, token);
        tile += fill_tiles(tables->tiles + 4 * tile, part, i, token, part->decoding ? 1 : tile_rows);
        context_parts = greatest(context_parts, llmc_parts_of(division, part->start + part->count));
        reading |= !part->decoding;
        adapted += part->adapter ? part->count : 0;
        for (int64_t r = part->first_row; r < part->count; r++) tables->rows[row++] = (int32_t)(token + r);
        int32_t *pages = tables->block_table + i * columns;
        for (int64_t p = 0; p < columns; p++) pages[p] = p < part->page_count ? part->pages[p] : 0;
        if (tables->starts != NULL) tables->starts[i] = (int32_t)token;
        token += part->count;
    }
    if (tables->starts != NULL) tables->starts[number] = (int32_t)token;
    step->sizes[LLMC_TOKENS] = token;
    step->sizes[LLMC_TILES] = tile;
    step->sizes[LLMC_SEQUENCES] = number;
    step->sizes[LLMC_PAGES] = columns;
    step->sizes[LLMC_ROWS] = row;
    step->sizes[LLMC_SPLITS] = llmc_choose_splits(division, tile, context_parts);
    step->sizes[LLMC_PROMPT] = reading;
    step->sizes[LLMC_ADAPTED] = adapted;
}
