/* Exercises the thread pool; built with and without sanitizers by tests/test_pool.py. Exits 0 when all holds. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { MOST = 5000 };

typedef struct {
    int64_t units, grain;
    int times[MOST]; /* plain ints: the sanitizer sees it if two threads get the same unit */
    _Atomic int64_t calls, inside;
    int nested;
} Count;

static void count_inner(void *context, int64_t begin, int64_t end) {
    Count *count = context;
    for (int64_t i = begin; i < end; i++) count->times[i]++;
}

static void count_body(void *context, int64_t begin, int64_t end) {
    Count *count = context;
    CHECK(0 <= begin && begin < end && end <= count->units);
    CHECK(2 * (end - begin) >= count->grain || end == count->units);
    atomic_fetch_add(&count->calls, 1);
    if (count->nested) {
        Count inner = {.units = 10, .grain = 1};
        llmc_parallel(count_inner, &inner, 10, 1);
        for (int i = 0; i < 10; i++) CHECK(inner.times[i] == 1);
    }
    for (int64_t i = begin; i < end; i++) count->times[i]++;
}

static const int64_t SIZES[] = {0, 1, 2, 7, 31, 33, 129, 1000, 4999};

/* A "step": loops of awkward sizes, each reading what the one before wrote. */
static void run_loops(int rounds) {
    Count *count = calloc(1, sizeof *count);
    CHECK(count != NULL);
    for (int round = 0; round < rounds; round++) {
        for (unsigned s = 0; s < sizeof SIZES / sizeof *SIZES; s++) {
            for (int64_t grain = 1; grain <= 64; grain *= 4) {
                count->units = SIZES[s];
                count->grain = grain;
                count->nested = round % 8 == 0;
                int before = count->times[0];
                llmc_parallel(count_body, count, count->units, grain);
                for (int64_t i = 0; i < count->units; i++) CHECK(count->times[i] == before + 1);
                memset(count->times, 0, sizeof count->times);
            }
        }
    }
    free(count);
}

typedef struct {
    int64_t units;
    _Atomic int64_t done;
} Rest;

/* The piece with the first unit ends only when all other pieces have: a thread that is held up holds up no more. */
static void wait_for_rest(void *context, int64_t begin, int64_t end) {
    Rest *rest = context;
    if (begin == 0) {
        while (atomic_load(&rest->done) < rest->units - end) sched_yield();
    }
    atomic_fetch_add(&rest->done, end - begin);
}

static void count_units(void *context, int64_t begin, int64_t end) {
    atomic_fetch_add((_Atomic int64_t *)context, end - begin);
}

static _Atomic int steps_inside;

/* A turn within a turn: of the thread that has it, and of all that work for it. */
static void hash_body(void *context, int64_t begin, int64_t end) {
    static const unsigned char data[1000];
    uint64_t *out = context;
    for (int64_t i = begin; i < end; i++) llmc_hash(data, (int64_t)sizeof data, &out[i], 3);
}

static void run_nested(void) {
    uint64_t outside = 0, inside[200] = {0};
    hash_body(&outside, 0, 1);
    llmc_parallel(hash_body, inside, 200, 1);
    for (int i = 0; i < 200; i++) CHECK(inside[i] == outside && outside != 0);
    LlmcPool *again = llmc_take_turn(2);
    run_loops(1);
    llmc_end_turn(again);
    run_loops(1);
}

static uint64_t drawn = 1;

static int64_t draw(int64_t below) {
    drawn = drawn * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (int64_t)(drawn >> 33) % below;
}

/* Loops one right after the other, of as many threads as it happens: most workers come too late for most of them. */
static void run_random(void) {
    static Count count;
    for (int loop = 0; loop < 40; loop++) {
        count.units = draw(draw(4) == 0 ? MOST : 150);
        count.grain = 1 + draw(draw(4) == 0 ? 100 : 3);
        llmc_parallel(count_body, &count, count.units, count.grain);
        for (int64_t i = 0; i < count.units; i++) CHECK(count.times[i] == 1);
        memset(count.times, 0, sizeof count.times);
    }
}

static pid_t program;
static _Atomic int fork_wanted;

static void wait_for_fork(void *context, int64_t begin, int64_t end) {
    (void)context, (void)end;
    CHECK(getpid() == program); /* the child has its own jobs */
    if (begin > 0) return;
    atomic_store(&fork_wanted, 1);
    while (atomic_load(&fork_wanted)) sched_yield();
}

/* llmc_step: as many tokens ask for loops of their own */
enum { HELD_UP = 1000, NESTED = 1001, RANDOM = 1002, FORKED = 1003 };

int llmc_step(const LlmcStep *step) {
    CHECK(atomic_fetch_add(&steps_inside, 1) == 0); /* steps take turns */
    if (step->sizes[LLMC_TOKENS] == HELD_UP) {
        for (int64_t units = 2; units < 100; units++) {
            Rest rest = {.units = units};
            llmc_parallel(wait_for_rest, &rest, units, 1);
            CHECK(rest.done == units);
        }
        _Atomic int64_t counted = 0;
        llmc_parallel(count_units, &counted, ((int64_t)1 << 40) + 7, 1); /* more than 32 bits hold */
        CHECK(counted == ((int64_t)1 << 40) + 7);
    } else if (step->sizes[LLMC_TOKENS] == NESTED) {
        run_nested();
    } else if (step->sizes[LLMC_TOKENS] == RANDOM) {
        run_random();
    } else if (step->sizes[LLMC_TOKENS] == FORKED) {
        llmc_parallel(wait_for_fork, NULL, 64, 1);
    } else {
        run_loops((int)step->sizes[LLMC_TOKENS]);
    }
    atomic_fetch_sub(&steps_inside, 1);
    return (int)step->sizes[LLMC_ROWS];
}

static void *caller(void *argument) {
    int64_t threads = *(int64_t *)argument;
    LlmcStep step = {.sizes = {3, 0, 0, 0, 5, 1}};
    for (int i = 0; i < 10; i++) {
        CHECK(llmc_run(&step, threads) == 5);
        CHECK(llmc_run(&(LlmcStep){.sizes = {NESTED}}, threads) == 0);
    }
    return NULL;
}

static void *run_forked(void *argument) {
    (void)argument;
    CHECK(llmc_run(&(LlmcStep){.sizes = {FORKED}}, 64) == 0);
    return NULL;
}

/* A fork in the middle of a job that few workers have joined yet. */
static void fork_within_job(void) {
    program = getpid();
    pthread_t stepping;
    CHECK(pthread_create(&stepping, NULL, run_forked, NULL) == 0);
    while (!atomic_load(&fork_wanted)) sched_yield();
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(60);
        atomic_store(&steps_inside, 0);
        LlmcPool *turn = llmc_take_turn(64); /* workers start, and find no job */
        usleep(50000);
        CHECK(llmc_run(&(LlmcStep){.sizes = {1}}, 64) == 0);
        llmc_end_turn(turn);
        _exit(0);
    }
    atomic_store(&fork_wanted, 0);
    CHECK(pthread_join(stepping, NULL) == 0);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

typedef struct Aside {
    const unsigned char *data;
    int64_t bytes;
    uint64_t out[4];
} Aside;

static void *hash_aside(void *argument) {
    Aside *aside = argument;
    llmc_hash(aside->data, aside->bytes, aside->out, 0);
    return NULL;
}

/* Without threads of the pool a hash waits for no turn: not even for one that ends after it. */
static void hash_beside(const unsigned char *data, int64_t bytes, const uint64_t *expected) {
    Aside aside = {data, bytes, {0}};
    pthread_t thread;
    LlmcPool *turn = llmc_take_turn(2);
    CHECK(pthread_create(&thread, NULL, hash_aside, &aside) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    llmc_end_turn(turn);
    CHECK(memcmp(aside.out, expected, sizeof aside.out) == 0);
}

int main(int argc, char **argv) {
    (void)argv;
    int with_fork = argc > 1;
    LlmcStep step = {.sizes = {4, 0, 0, 0, 0, 1}};
    run_loops(1);                    /* no pool: on this thread */
    CHECK(llmc_run(&step, 4) == 0);  /* still none */
    alarm(300);                      /* who waits for itself is killed */
    LlmcPool *pool = llmc_pool_create();
    CHECK(pool != NULL);
    run_loops(1);                    /* outside of a run: on this thread */
    for (int64_t threads = 0; threads <= 6; threads++) CHECK(llmc_run(&step, threads) == 0);

    for (int64_t threads = 2; threads <= 6; threads++) {
        CHECK(llmc_run(&(LlmcStep){.sizes = {HELD_UP}}, threads) == 0);
    }

    /* Many more than cores, in groups that are full and not, and in numbers that grow and shrink. */
    static const int64_t many[] = {7, 8, 9, 16, 17, 33, 64, 3, 40};
    for (unsigned i = 0; i < sizeof many / sizeof *many; i++) {
        CHECK(llmc_run(&(LlmcStep){.sizes = {1}}, many[i]) == 0);
        if (i % 2 == 0) CHECK(llmc_run(&(LlmcStep){.sizes = {HELD_UP}}, many[i]) == 0);
    }
    for (int i = 0; i < 100; i++) CHECK(llmc_run(&(LlmcStep){.sizes = {RANDOM}}, 3 + draw(62)) == 0);

    pthread_t callers[4];
    int64_t limits[4] = {1, 2, 3, 4};
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&callers[i], NULL, caller, &limits[i]) == 0);
    for (int i = 0; i < 4; i++) CHECK(pthread_join(callers[i], NULL) == 0);

    static uint64_t hashes[4], again[4];
    int64_t bytes = 3 * LLMC_HASH_CHUNK + 5;
    unsigned char *data = calloc(1, (size_t)bytes);
    CHECK(data != NULL);
    llmc_hash(data, bytes, hashes, 3);
    llmc_hash(data, bytes, again, 1);
    CHECK(memcmp(hashes, again, sizeof hashes) == 0);
    CHECK(hashes[0] == hashes[1] && hashes[3] != hashes[0]);
    hash_beside(data, bytes, hashes);
    free(data);

    for (int i = 0; i < 200; i++) { /* long pauses: workers go to sleep and are woken */
        if (i % 20 == 0) usleep(2000);
        CHECK(llmc_run(&(LlmcStep){.sizes = {1}}, 3) == 0);
    }
    if (with_fork) {
        fork_within_job();
        for (int generation = 0; generation < 3; generation++) {
            pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0) {
                alarm(60);
                CHECK(llmc_run(&step, 3) == 0); /* with workers of its own */
                continue;                       /* and children of its own */
            }
            CHECK(llmc_run(&step, 3) == 0);
            int status = -1;
            CHECK(waitpid(child, &status, 0) == child && status == 0);
            break;
        }
    }
    LlmcPool *first = llmc_take_turn(3); /* and then a turn of another pool, made meanwhile */
    CHECK(llmc_pool_create() != pool);
    CHECK(llmc_run(&step, 3) == 0);
    llmc_end_turn(first);
    CHECK(llmc_run(&step, 3) == 0);
    fflush(NULL);
    _exit(0);
}
