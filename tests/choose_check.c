/* Exercises choices from logits; built with and without sanitizers by tests/test_pool.py. Exits 0 when all holds. */
#define _GNU_SOURCE
#include "choose.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pool.h"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            _exit(1); \
        } \
    } while (0)

int llmc_step(const LlmcStep *step) { return (int)step->sizes[LLMC_ROWS]; } /* of no use here, but part of the pool */

static void *scratch_for(int64_t count) {
    int64_t bytes = (llmc_choose_bytes(count) + 63) / 64 * 64;
    void *scratch = aligned_alloc(64, (size_t)bytes);
    CHECK(scratch != NULL);
    return scratch;
}

/* Whether a thread waits for something, rather than for a processor. */
static int is_asleep(long thread) {
    char path[64], text[256] = {0};
    snprintf(path, sizeof path, "/proc/self/task/%ld/stat", thread);
    FILE *file = fopen(path, "r");
    CHECK(file != NULL && fgets(text, sizeof text, file) != NULL);
    fclose(file);
    const char *name_end = strrchr(text, ')');
    return name_end != NULL && name_end[2] == 'S';
}

typedef struct {
    LlmcChoice choice;
    _Atomic long thread;
    int64_t chosen;
} Waiting;

static void *choose_once(void *argument) {
    Waiting *waiting = argument;
    atomic_store(&waiting->thread, syscall(SYS_gettid));
    waiting->chosen = llmc_choose(&waiting->choice, 2);
    return NULL;
}

/* A choice that waits for its turn has not touched the logits, from which another one may be choosing. */
static void check_that_waiting_changes_nothing(void) {
    float logits[3] = {2, 3, 1};
    const float before[3] = {2, 3, 1};
    const int32_t seen[1] = {1};
    Waiting waiting = {
        .choice = {.logits = logits, .seen = seen, .scratch = scratch_for(3), .count = 3, .seen_count = 1, .penalty = 2,
                   .top_p = 1}};
    LlmcPool *pool = llmc_take_turn(2);
    pthread_t caller;
    CHECK(pthread_create(&caller, NULL, choose_once, &waiting) == 0);
    long thread;
    while ((thread = atomic_load(&waiting.thread)) == 0 || !is_asleep(thread)) sched_yield();
    CHECK(memcmp(logits, before, sizeof logits) == 0);
    llmc_end_turn(pool);
    CHECK(pthread_join(caller, NULL) == 0);
    CHECK(waiting.chosen == 0 && memcmp(logits, before, sizeof logits) == 0);
    free(waiting.choice.scratch);
}

int main(void) {
    CHECK(llmc_pool_create() != NULL);
    check_that_waiting_changes_nothing();
    fflush(NULL);
    _exit(0);
}
