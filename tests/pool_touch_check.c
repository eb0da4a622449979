/* Counts the cache lines that move between threads in a loop that all threads take part in. Arguments: numbers of
 * threads. Prints for each, and for loops of even and of uneven blocks: the lines that move in one loop, and how often
 * the busiest one is taken away from others by a write. tests/test_pool.py builds it with pool.c and
 * -DLLMC_POOL_TOUCH=count_touch.
 *
 * A line is held by some threads. Who reads it and does not hold it fetches it; who writes to it takes it from all
 * others. The threads may be many more than the cores: counted is what they do, not how fast. */
#define _GNU_SOURCE
#include "pool.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "check.h"

enum { LINES = 4096, THREADS = 256, WORDS = THREADS / 64, LOOPS = 40, BLOCKS = 16 };

typedef struct Line {
    _Atomic uint64_t holders[WORDS];
    int64_t moved, taken;
} Line;

static Line lines[LINES]; /* of the pool */
static LlmcPool *pool;
static atomic_flag busy = ATOMIC_FLAG_INIT;
static _Atomic int known;
static _Thread_local int self = -1;

void count_touch(const void *address, int writes) {
    const uintptr_t index = ((uintptr_t)address - (uintptr_t)pool) / 64;
    CHECK((uintptr_t)address >= (uintptr_t)pool && index < LINES);
    if (self < 0) self = atomic_fetch_add(&known, 1);
    CHECK(self < THREADS);
    Line *line = &lines[index];
    const int word = self / 64;
    const uint64_t bit = UINT64_C(1) << self % 64;
    if (!writes && atomic_load(&line->holders[word]) & bit) return;
    while (atomic_flag_test_and_set(&busy)) sched_yield();
    int alone = 1;
    for (int i = 0; i < WORDS; i++) {
        alone &= atomic_load(&line->holders[i]) == (i == word ? bit : 0);
        if (writes) atomic_store(&line->holders[i], 0);
    }
    atomic_fetch_or(&line->holders[word], bit);
    line->moved += !alone;
    line->taken += writes && !alone;
    atomic_flag_clear(&busy);
}

typedef struct Loop {
    int64_t threads, number;
    int uneven;
    _Atomic int64_t arrived, done;
} Loop;

/* A thread's first piece ends when all threads have one: so all take part. */
static void body(void *context, int64_t begin, int64_t end) {
    static _Thread_local int64_t last = -1;
    Loop *loop = context;
    if (last != loop->number) {
        last = loop->number;
        atomic_fetch_add(&loop->arrived, 1);
        while (atomic_load(&loop->arrived) < loop->threads) sched_yield();
    }
    for (int64_t block = begin; loop->uneven && block < end; block++) {
        const uint64_t mixed = (uint64_t)(block / BLOCKS + loop->number) * UINT64_C(0x9E3779B97F4A7C15);
        for (uint64_t i = 0; i < (mixed >> 61); i++) sched_yield();
    }
    atomic_fetch_add(&loop->done, end - begin);
}

/* rows: whether blocks are uneven; tokens: how many threads. */
int llmc_step(const LlmcStep *step) {
    static int64_t number;
    Loop loop = {.threads = step->sizes[LLMC_TOKENS], .uneven = step->sizes[LLMC_ROWS] != 0};
    const int64_t blocks = loop.threads * (loop.uneven ? BLOCKS : 1);
    for (int i = 0; i <= LOOPS; i++) {
        if (i == 1) { /* after the first loop all threads are there */
            while (atomic_flag_test_and_set(&busy)) sched_yield();
            for (int j = 0; j < LINES; j++) lines[j].moved = lines[j].taken = 0;
            atomic_flag_clear(&busy);
        }
        loop.number = number++;
        loop.arrived = loop.done = 0;
        llmc_parallel(body, &loop, blocks, 1);
        CHECK(loop.done == blocks && loop.arrived == loop.threads);
    }
    int64_t moved = 0, taken = 0;
    for (int j = 0; j < LINES; j++) {
        moved += lines[j].moved;
        if (lines[j].taken > taken) taken = lines[j].taken;
    }
    printf("%d %d %.1f %.1f\n", (int)loop.threads, loop.uneven, (double)moved / LOOPS, (double)taken / LOOPS);
    return 0;
}

int main(int count, char **arguments) {
    pool = llmc_pool_create();
    CHECK(pool != NULL);
    for (int i = 1; i < count; i++) {
        LlmcStep step = {.sizes = {[LLMC_TOKENS] = atoi(arguments[i])}};
        for (int uneven = 0; uneven < 2; uneven++) {
            step.sizes[LLMC_ROWS] = uneven;
            CHECK(llmc_run(&step, step.sizes[LLMC_TOKENS]) == 0);
        }
    }
    fflush(NULL);
    _exit(0);
}
