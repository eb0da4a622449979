/* The thread pool that is compiled into every artifact: one pool a process, however many artifacts are loaded. */
#ifndef LLMC_POOL_H
#define LLMC_POOL_H

#include <stdint.h>

#include "step.h"

/* A pool made by one artifact serves all others: they touch only its first members, three function pointers, so that
 * artifacts of different versions can share it. */
typedef struct LlmcPool LlmcPool;

typedef void (*LlmcBody)(void *context, int64_t begin, int64_t end);

/* Calls body(context, begin, end) on disjoint ranges that cover [0, units), on this thread and on idle workers, and
 * returns when all are done. `grain`: the fewest units worth handing out, if a worker answers within a quarter of a
 * microsecond; more are, where it takes longer. A range may be half of that. Only a step that runs under llmc_run has
 * workers: elsewhere, and inside of a body, everything runs on this thread. */
void llmc_parallel(LlmcBody body, void *context, int64_t units, int64_t grain);

/* Gives llmc_parallel at most `threads` threads (this one included) until the turn ends; calls from several threads wait
 * for each other. Who has a turn, or is in a body, may ask again: that is part of the turn there is, with its threads.
 * Returns the pool that llmc_end_turn wants, which may be NULL. */
LlmcPool *llmc_take_turn(int64_t threads);
void llmc_end_turn(LlmcPool *pool);

/* Runs llmc_step on at most `threads` threads (this one included); calls from several threads take turns. */
int llmc_run(const LlmcStep *step, int64_t threads);

/* Makes a pool and makes this artifact use it. NULL when out of memory. Workers are started when first needed. The
 * artifact stays loaded from then on, whatever dlclose is told. */
LlmcPool *llmc_pool_create(void);

/* Makes this artifact use a pool that another artifact created. */
void llmc_pool_use(LlmcPool *pool);

/* Hashes `bytes` bytes in chunks of LLMC_HASH_CHUNK: out[i] is the hash of chunk i. Any changed byte changes it.
 * threads: at most, in a turn of the pool; 0: this thread alone, without a turn, so that no step waits for it. */
void llmc_hash(const void *data, int64_t bytes, uint64_t *out, int64_t threads);

/* LLMC_ABI of this artifact. */
int64_t llmc_abi(void);

#define LLMC_HASH_CHUNK ((int64_t)4 << 20)
#define LLMC_HASH_LANES 1024

#endif
