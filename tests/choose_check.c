/* Exercises choices from logits; built with and without sanitizers by tests/test_pool.py. Exits 0 when all holds. */
#define _GNU_SOURCE
#include "choose.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "pool.h"

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

enum { MOST = 6000, CALLERS = 4, CHANGED = 40 };

/* A caller's own numbers and memory. */
typedef struct {
    uint64_t state; /* of xorshift64 */
    float logits[MOST], before[MOST], penalised[MOST], weights[MOST], exact[MOST];
    int32_t seen[CHANGED], order[MOST];
    int64_t rounds;
} Fuzz;

static uint64_t draw(Fuzz *f) {
    f->state ^= f->state << 13;
    f->state ^= f->state >> 7;
    return f->state ^= f->state << 17;
}

static int64_t below(Fuzz *f, int64_t bound) { return (int64_t)(draw(f) >> 11) % bound; }

static double unit(Fuzz *f) { return (double)(draw(f) >> 11) * 0x1p-53; }

#define ONE_OF(f, ...) ((double[]){__VA_ARGS__}[below(f, (int64_t)(sizeof(double[]){__VA_ARGS__} / sizeof(double)))])

/* Logits of one kind: smooth, or with ties, or with numbers at the ends of f32; some broken. */
static int64_t fill_logits(Fuzz *f) {
    int64_t count = below(f, 4) ? 1 + below(f, 300) : 1 + below(f, MOST);
    int64_t kind = below(f, 6);
    double spread = ONE_OF(f, 1e-3, 1, 8, 100);
    for (int64_t i = 0; i < count; i++) {
        double smooth = spread * (unit(f) + unit(f) + unit(f) - 1.5);
        f->logits[i] = (float)(kind == 0   ? smooth
                               : kind == 1 ? 0.25 * (double)below(f, 5)
                               : kind == 2 ? (below(f, 8) ? smooth : -INFINITY)
                               : kind == 3 ? FLT_TRUE_MIN * (double)below(f, 1 << 20)
                               : kind == 4 ? (below(f, 9) ? smooth : below(f, 2) ? FLT_MAX : -FLT_MAX)
                                           : 3);
    }
    if (below(f, 8) == 0) f->logits[below(f, count)] = (float)ONE_OF(f, NAN, INFINITY, -NAN, -INFINITY);
    if (below(f, 30) == 0) for (int64_t i = 0; i < count; i++) f->logits[i] = -INFINITY;
    return count;
}

static _Thread_local const float *sorted_by;

static int by_likelihood(const void *a, const void *b) {
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    if (sorted_by[i] != sorted_by[j]) return sorted_by[i] > sorted_by[j] ? -1 : 1;
    return i < j ? -1 : 1;
}

/* What is left after a choice from `logits`, where the likeliest is `largest`, is what the filters' definitions keep: a
 * prefix in the order of likelihood, which ends where each filter says, or before for weights that f32 has no room for. */
static void check_kept(Fuzz *f, const LlmcChoice *choice, const float *logits, float largest) {
    const int64_t count = choice->count;
    const double cooling = (float)(1 / choice->temperature < FLT_MAX ? 1 / choice->temperature : FLT_MAX);
    for (int64_t i = 0; i < count; i++) {
        float x = (logits[i] - largest) * (float)cooling;
        f->exact[i] = x > -87.0f ? (float)exp((double)x) : 0;
        f->order[i] = (int32_t)i;
    }
    sorted_by = logits;
    qsort(f->order, (size_t)count, sizeof *f->order, by_likelihood);
    int64_t kept = 0;
    double total = 0, left = 0;
    for (int64_t n = 0; n < count; n++) {
        int32_t id = f->order[n];
        CHECK(f->weights[id] == 0 || fabsf(f->weights[id] - f->exact[id]) <= 2e-6f * f->exact[id]);
        if (f->weights[id] > 0) {
            CHECK(kept == n || f->exact[f->order[kept]] == 0 || f->weights[f->order[kept]] > 0);
            kept = n + 1;
        }
    }
    CHECK(kept > 0);
    int64_t most = count; /* tokens that top-k keeps */
    if (choice->top_k > 0 && choice->top_k < count) {
        for (most = choice->top_k; most < count && logits[f->order[most]] == logits[f->order[most - 1]];) most++;
    }
    for (int64_t n = 0; n < most; n++) total += f->exact[f->order[n]];
    for (int64_t n = 0; n < kept - 1; n++) left += f->exact[f->order[n]];
    const double last = f->exact[f->order[kept - 1]], slack = 1e-5 * total;
    const double bound = (double)largest + choice->temperature * log(choice->min_p); /* -inf where it is off */
    CHECK(kept <= most);
    if (choice->top_p < 1) CHECK(left < choice->top_p * total + slack);
    CHECK((double)logits[f->order[kept - 1]] >= bound || logits[f->order[kept - 1]] == largest);
    if (kept < most && f->exact[f->order[kept]] > 0) { /* some filter ruled the next one out */
        bool by_sum = choice->top_p < 1 && left + last >= choice->top_p * total - slack;
        CHECK(by_sum || (double)logits[f->order[kept]] < bound);
    }
}

static void check_choice(Fuzz *f, void *scratch) {
    const int64_t count = fill_logits(f), changed = below(f, 2) && count > CHANGED ? CHANGED : 0;
    for (int64_t i = 0; i < changed; i++) f->seen[i] = (int32_t)(i * (count / CHANGED));
    LlmcChoice choice = {
        .logits = f->logits, .seen = f->seen, .scratch = scratch, .count = count, .seen_count = changed,
        .top_k = below(f, 2) ? 0 : 1 + below(f, 2 * count), .penalty = changed ? ONE_OF(f, 0.5, 1.1, 3) : 1,
        .temperature = ONE_OF(f, 0, 1e-30, 0.3, 1, 1, 2.5, 1e30), .top_p = ONE_OF(f, 0, 0.1, 0.5, 0.9, 0.9999, 1, 1, 1),
        .min_p = ONE_OF(f, 0, 0, 0, 1e-9, 0.05, 1), .uniform = ONE_OF(f, 0, unit(f), unit(f), 1 - 0x1p-53)};
    memcpy(f->before, f->logits, sizeof f->before);
    memcpy(f->penalised, f->logits, sizeof f->penalised);
    for (int64_t i = 0; i < changed; i++) {
        float *logit = &f->penalised[f->seen[i]];
        *logit = *logit < 0 ? *logit * (float)choice.penalty : *logit / (float)choice.penalty;
    }
    bool broken = false;
    float largest = -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        broken |= !(f->penalised[i] <= FLT_MAX);
        largest = f->penalised[i] > largest ? f->penalised[i] : largest;
    }
    const int64_t chosen = llmc_choose(&choice, 1 + below(f, 5));
    CHECK(memcmp(f->before, f->logits, sizeof f->before) == 0);
    CHECK((chosen == -1) == (broken || largest == -INFINITY) && chosen < count);
    if (chosen < 0) return;
    CHECK(choice.temperature > 0 || f->penalised[chosen] == largest);
    memcpy(f->weights, scratch, sizeof(float) * (size_t)count);
    CHECK(llmc_choose(&choice, 1) == chosen); /* with any number of threads, bit for bit */
    if (choice.temperature == 0) return;
    CHECK(memcmp(f->weights, scratch, sizeof(float) * (size_t)count) == 0);
    check_kept(f, &choice, f->penalised, largest);
    double before = 0, total = 0;
    for (int64_t i = 0; i < count; i++) {
        total += f->weights[i];
        if (i < chosen) before += f->weights[i];
    }
    CHECK(f->weights[chosen] > 0 && choice.uniform * total >= before - 1e-5 * total);
    CHECK(choice.uniform * total <= before + f->weights[chosen] + 1e-5 * total);
}

static void *fuzz(void *argument) {
    Fuzz *f = argument;
    void *scratch = scratch_for(MOST);
    for (int64_t round = 0; round < f->rounds; round++) check_choice(f, scratch);
    free(scratch);
    return NULL;
}

static float shared[MOST];

/* One row of logits, from which each caller rules out another token than the likeliest by its penalty. */
static void *share(void *argument) {
    const int32_t own = (int32_t)(intptr_t)argument;
    LlmcChoice choice = {.logits = shared, .seen = &own, .scratch = scratch_for(MOST), .count = MOST, .seen_count = 1,
                         .penalty = 8, .top_p = 1};
    for (int round = 0; round < 200; round++) CHECK(llmc_choose(&choice, 3) == (own == 0 ? 1 : 0));
    free(choice.scratch);
    return NULL;
}

/* rounds: choices of each caller. */
int main(int argc, char **argv) {
    const int64_t rounds = argc > 1 ? atoll(argv[1]) : 100;
    CHECK(llmc_pool_create() != NULL);
    check_that_waiting_changes_nothing();
    static Fuzz fuzzes[CALLERS];
    pthread_t callers[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        fuzzes[i].state = UINT64_C(0x9E3779B97F4A7C15) * (uint64_t)(i + 1);
        fuzzes[i].rounds = rounds;
        CHECK(pthread_create(&callers[i], NULL, fuzz, &fuzzes[i]) == 0);
    }
    for (int i = 0; i < CALLERS; i++) CHECK(pthread_join(callers[i], NULL) == 0);
    for (int i = 0; i < MOST; i++) shared[i] = (float)(MOST - i) / MOST + 1;
    for (int i = 0; i < CALLERS; i++) CHECK(pthread_create(&callers[i], NULL, share, (void *)(intptr_t)i) == 0);
    for (int i = 0; i < CALLERS; i++) CHECK(pthread_join(callers[i], NULL) == 0);
    fflush(NULL);
    _exit(0);
}
