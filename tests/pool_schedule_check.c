/* Runs the pool under schedules that are drawn: one thread at a time, and before each access to what threads share it
 * is drawn which one goes on. Some threads are held up for long, anywhere. So a worker comes late at every point of a
 * loop, and of the loops after it. Argument: how many loops. tests/test_pool.py builds it with pool.c and
 * -DLLMC_POOL_TOUCH=schedule. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { THREADS = 64, MOST = 40 };

static sem_t may_run[THREADS];
static int held_up[THREADS]; /* steps of others until a thread goes on */
static int known;
static pthread_mutex_t arrivals = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int self = -1;
static uint64_t drawn = 1;

static int draw(int below) {
    drawn = drawn * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (int)((drawn >> 33) % (uint64_t)below);
}

static void arrive(int runs) {
    CHECK(pthread_mutex_lock(&arrivals) == 0);
    self = known;
    CHECK(self < THREADS && sem_init(&may_run[self], 0, 0) == 0);
    known++;
    CHECK(pthread_mutex_unlock(&arrivals) == 0);
    if (!runs) CHECK(sem_wait(&may_run[self]) == 0);
}

/* Only the thread that runs gets here, but for new ones. */
static int next_thread(void) {
    CHECK(pthread_mutex_lock(&arrivals) == 0);
    const int threads = known;
    CHECK(pthread_mutex_unlock(&arrivals) == 0);
    if (draw(50) == 0) held_up[draw(threads)] = draw(draw(2) ? 500 : 50);
    for (;;) {
        for (int i = 0; i < threads; i++) held_up[i] -= held_up[i] > 0;
        const int next = draw(3) ? draw(threads) : self;
        if (!held_up[next]) return next;
    }
}

void schedule(const void *address, int writes) {
    (void)address, (void)writes;
    if (self < 0) arrive(0);
    const int next = next_thread();
    if (next == self) return;
    CHECK(sem_post(&may_run[next]) == 0);
    CHECK(sem_wait(&may_run[self]) == 0);
}

/* In place of the C library's: who sleeps is woken at once, as the one thread that runs must not. */
long syscall(long number, ...);
long syscall(long number, ...) { return number < 0; }

typedef struct Loop {
    int64_t units, grain;
    int times[MOST], inside, over;
} Loop;

static void body(void *context, int64_t begin, int64_t end) {
    Loop *loop = context;
    CHECK(0 <= begin && begin < end && end <= loop->units && !loop->over);
    loop->inside++;
    for (int64_t i = begin; i < end; i++) {
        loop->times[i]++;
        schedule(loop, 1);
        CHECK(loop->times[i] == 1 && !loop->over);
    }
    loop->inside--;
}

/* tokens: how many loops. */
int llmc_step(const LlmcStep *step) {
    static Loop loops[2]; /* one after the other: who is late finds the one before over */
    for (int64_t i = 0; i < step->sizes[LLMC_TOKENS]; i++) {
        Loop *loop = &loops[i % 2];
        memset(loop, 0, sizeof *loop);
        loop->units = 1 + draw(MOST);
        loop->grain = 1 + draw(4) / 3 * draw(5);
        llmc_parallel(body, loop, loop->units, loop->grain);
        CHECK(loop->inside == 0);
        loop->over = 1;
        for (int64_t j = 0; j < MOST; j++) CHECK(loop->times[j] == (j < loop->units));
    }
    return 0;
}

int main(int count, char **arguments) {
    CHECK(count == 2);
    alarm(300); /* who waits for ever is killed */
    arrive(1);
    CHECK(llmc_pool_create() != NULL);
    LlmcStep step = {.sizes = {[LLMC_TOKENS] = 20}};
    for (int64_t i = 0; i < atoi(arguments[1]) / 20; i++) {
        const int most = i < 20 ? 4 : 9; /* few first: more happens in a loop */
        CHECK(llmc_run(&step, 2 + draw(most - 1)) == 0);
    }
    _exit(0);
}
