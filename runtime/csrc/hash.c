/* Hashes of weights, at the speed of memory: see llmc_hash in pool.h. */
#include <stddef.h>
#include <string.h>

#include "pool.h"

typedef struct HashJob {
    const unsigned char *data;
    int64_t bytes;
    uint64_t *out;
} HashJob;

/* Both constants are odd, so that each step is a bijection of what it takes in: one changed word changes its lane for
 * good, and one changed lane changes the result. `compiler/artifact.py` computes the same with numpy. */
#define LANE_FACTOR UINT64_C(0x9E3779B97F4A7C15)
#define FOLD_FACTOR UINT64_C(0xD6E8FEB86659FD93)

static uint64_t mix(uint64_t sum, uint64_t word, uint64_t factor) {
    sum = (sum ^ word) * factor;
    return sum ^ (sum >> 32);
}

static void mix_lanes(uint64_t *restrict lanes, const unsigned char *data) {
    for (int lane = 0; lane < LLMC_HASH_LANES; lane++) {
        uint64_t word;
        memcpy(&word, data + 8 * lane, 8);
        lanes[lane] = mix(lanes[lane], word, LANE_FACTOR);
    }
}

static uint64_t hash_chunk(const unsigned char *data, int64_t bytes) {
    uint64_t lanes[LLMC_HASH_LANES];
    for (int lane = 0; lane < LLMC_HASH_LANES; lane++) lanes[lane] = (uint64_t)lane;
    const int64_t block = 8 * LLMC_HASH_LANES;
    int64_t done = 0;
    for (; bytes - done >= block; done += block) mix_lanes(lanes, data + done);
    if (done < bytes) { /* the last block, filled up with zeros; the length tells it from real zeros */
        unsigned char last[8 * LLMC_HASH_LANES] = {0};
        memcpy(last, data + done, (size_t)(bytes - done));
        mix_lanes(lanes, last);
    }
    uint64_t sum = (uint64_t)bytes;
    for (int lane = 0; lane < LLMC_HASH_LANES; lane++) sum = mix(sum, lanes[lane], FOLD_FACTOR);
    return sum;
}

static void hash_body(void *context, int64_t begin, int64_t end) {
    const HashJob *job = context;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t start = chunk * LLMC_HASH_CHUNK;
        int64_t bytes = job->bytes - start;
        job->out[chunk] = hash_chunk(job->data + start, bytes < LLMC_HASH_CHUNK ? bytes : LLMC_HASH_CHUNK);
    }
}

void llmc_hash(const void *data, int64_t bytes, uint64_t *out, int64_t threads) {
    HashJob job = {data, bytes, out};
    const int64_t chunks = (bytes + LLMC_HASH_CHUNK - 1) / LLMC_HASH_CHUNK;
    if (threads <= 0) { /* beside the pool: a turn would hold up the steps of others */
        hash_body(&job, 0, chunks);
        return;
    }
    LlmcPool *pool = llmc_take_turn(threads);
    llmc_parallel(hash_body, &job, chunks, 1);
    llmc_end_turn(pool);
}
