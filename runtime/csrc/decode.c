/* See decode.h. */
#include "decode.h"

#include "pool.h"

int llmc_decode(const LlmcDecoding *decoding, int64_t threads) {
    for (int64_t i = 0; i < decoding->count; i++) {
        const int64_t position = decoding->positions[i];
        decoding->slots[i] = (int32_t)(decoding->last_pages[i] * decoding->page + position % decoding->page);
        decoding->tiles[4 * i + 3] = (int32_t)position;
    }
    return llmc_run(decoding->step, threads);
}
