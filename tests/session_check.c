/* Random calls of llmc.h over a step that is known exactly, by several threads; built with and without sanitizers by
 * tests/test_c_session.py. With STATELESS defined the step keeps no cache. Exits 0 when all holds.
 *
 * The step: a token's key is its id and position, put into the cache through `slots`; the logits of a row are a hash of
 * all keys that it sees through `block_table` and `tiles`. A wrong page, slot, tile, position or row changes them. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "llmc.h"
#include "model.h"
#include "pool.h"
#include "step_check.h"

enum { VOCAB = 13, POISON = 12, PAGE = 8, TILE = 4, MAX_STEP = 20, CONTEXT = 90, LAYERS = 2, PAGES = 60, FAILED = 11 };
enum { SEQUENCES = 6, CALLERS = 4 };

static const char *const failures[FAILED] = {"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "a poisoned token"};
#ifdef STATELESS
enum { MOST = MAX_STEP };
#else
enum { MOST = CONTEXT };
static const LlmcLayerFacts layers[LAYERS] = {{1, 2, 2, 4, 0}, {1, 2, 2, 4, 0}};
#endif

const LlmcFacts llmc_facts = {
    .bytes = sizeof(LlmcFacts), .task = LLMC_GENERATE, .vocabulary = VOCAB, .max_context = CONTEXT,
    .max_step = MAX_STEP, .page = PAGE, .tile = TILE, .max_splits = 3, .part = 2 * PAGE, .arena_bytes = 8 * MAX_STEP,
    .architecture = "any", .failure_count = FAILED, .failures = failures, .encoder_output = -1,
#ifdef STATELESS
    .state = LLMC_STATELESS,
#else
    .state = LLMC_PAGED, .layer_count = LAYERS, .layers = layers,
#endif
};

static const LlmcLimits limits = {
    .least = {1, 1, 1, 1, 0, 1, 0},
    .most = {MAX_STEP, MAX_STEP, MAX_STEP, (CONTEXT + PAGE - 1) / PAGE, MAX_STEP, 3, 1},
    .arena_bytes = 8 * MAX_STEP, .vocabulary = VOCAB, .context = CONTEXT, .page = PAGE, .tile = TILE, .logits = true,
    .ids = true, .positions = true, .tiles = true, .rows = true,
#ifndef STATELESS
    .caches = 2 * LAYERS, .slots = true, .block_table = true,
#endif
};

static uint64_t mix(uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * UINT64_C(0x9E3779B97F4A7C15);
    return sum ^ (sum >> 29);
}

static uint64_t key_of(int32_t id, int64_t position) { return (uint64_t)(id + 1) + UINT64_C(1000) * (uint64_t)position; }

static float logit_of(uint64_t sum, int v) { return (float)(mix(sum, (uint64_t)v) >> 40); }

static void store(void *context, int64_t begin, int64_t end) {
    const LlmcStep *s = context;
    for (int64_t t = begin; llmc_facts.state == LLMC_PAGED && t < end; t++) {
        const int64_t page = s->slots[t] / PAGE, offset = s->slots[t] % PAGE;
        ((float *)s->cache[0])[page * 2 * PAGE + offset] = (float)key_of(s->ids[t], s->positions[t]);
        ((float *)s->cache[3])[(page * PAGE + offset) * 2] = 2 * (float)key_of(s->ids[t], s->positions[t]);
    }
}

static void attend(void *context, int64_t begin, int64_t end) {
    const LlmcStep *s = context;
    uint64_t *sums = s->arena;
    for (int64_t q = begin; q < end; q++) {
        const int32_t *tile = s->tiles + 4 * q, *pages = s->block_table + tile[0] * s->sizes[LLMC_PAGES];
        for (int row = 0; row < tile[2]; row++) {
            uint64_t sum = 0;
            for (int p = 0; p <= tile[3] + row; p++) {
#ifdef STATELESS
                (void)pages;
                sum = mix(sum, key_of(s->ids[p], p));
#else
                const float key = ((float *)s->cache[0])[(int64_t)pages[p / PAGE] * 2 * PAGE + p % PAGE];
                const float value = ((float *)s->cache[3])[((int64_t)pages[p / PAGE] * PAGE + p % PAGE) * 2];
                sum = mix(sum, (uint64_t)key + (value != 2 * key));
#endif
            }
            sums[tile[1] + row] = sum;
        }
    }
}

int llmc_step(const LlmcStep *s) {
    CHECK(llmc_check_step(s, &limits) == 0);
    llmc_parallel(store, (void *)(uintptr_t)s, s->sizes[LLMC_TOKENS], 1);
    for (int64_t t = 0; t < s->sizes[LLMC_TOKENS]; t++) {
        if (s->ids[t] == POISON) return FAILED;
    }
    llmc_parallel(attend, (void *)(uintptr_t)s, s->sizes[LLMC_TILES], 1);
    for (int64_t r = 0; r < s->sizes[LLMC_ROWS]; r++) {
        for (int v = 0; v < VOCAB; v++) s->logits[r * VOCAB + v] = logit_of(((uint64_t *)s->arena)[s->rows[r]], v);
    }
    return 0;
}

static const LlmcApi *llmc;

/* What a sequence has to be. */
typedef struct Twin {
    LlmcSequence *sequence;
    int32_t tokens[CONTEXT];
    int64_t length;
    bool has_logits;
} Twin;

typedef struct Caller {
    LlmcModel *model;
    uint64_t random;
    int64_t rounds;
    Twin twins[SEQUENCES];
} Caller;

static int64_t below(Caller *c, int64_t end) {
    c->random = mix(c->random, 77);
    return (int64_t)(c->random >> 20) % end;
}

static void check_twin(const Twin *twin) {
    CHECK(llmc->length(twin->sequence) == twin->length);
    const float *logits = llmc->logits(twin->sequence);
    CHECK((logits != NULL) == twin->has_logits);
    if (!twin->has_logits) return;
    uint64_t sum = 0;
    for (int64_t p = 0; p < twin->length; p++) sum = mix(sum, key_of(twin->tokens[p], p));
    int32_t best = 0, token = -1;
    for (int v = 0; v < VOCAB; v++) {
        CHECK(logits[v] == logit_of(sum, v));
        if (logits[v] > logits[best]) best = v;
    }
    CHECK(llmc->next(twin->sequence, NULL, &token) == LLMC_OK && token == best);
}

static void check_choices(Caller *c, const Twin *twin) {
    uint64_t state = c->random, again = c->random;
    LlmcSampling sampling = {.bytes = sizeof sampling, .temperature = 1e5, .top_k = below(c, 5), .random = &state,
                             .repetition_penalty = 1.0 + (double)below(c, 2)};
    int32_t first = -1, second = -1;
    CHECK(llmc->next(twin->sequence, &sampling, &first) == LLMC_OK && state != again);
    sampling.random = &again;
    CHECK(llmc->next(twin->sequence, &sampling, &second) == LLMC_OK && first == second && state == again);
    sampling.random = NULL;
    CHECK(llmc->next(twin->sequence, &sampling, &second) == LLMC_ERROR_ARGUMENT);
    sampling.random = &again, sampling.top_p = -1;
    CHECK(llmc->next(twin->sequence, &sampling, &second) == LLMC_ERROR_ARGUMENT && state == again);
}

/* Feeds some of the sequences some tokens, now and then of a kind that cannot be. */
static void feed(Caller *c) {
    LlmcSequence *sequences[SEQUENCES];
    const int32_t *ids[SEQUENCES];
    int32_t words[SEQUENCES][CONTEXT + 5];
    int64_t counts[SEQUENCES], number = 0, fed[SEQUENCES];
    int expected = LLMC_OK;
    for (int i = 0; i < SEQUENCES; i++) {
        Twin *twin = &c->twins[i];
        if (below(c, 2)) continue;
        const int64_t count = 1 + below(c, below(c, 3) ? 3 : 40);
        for (int64_t k = 0; k < count; k++) words[i][k] = (int32_t)below(c, POISON);
        const int64_t kind = below(c, 40), place = below(c, count);
        int wrong = LLMC_OK;
        if (kind == 0) words[i][place] = below(c, 2) ? VOCAB : -1, wrong = LLMC_ERROR_ARGUMENT;
        if (twin->length + count > MOST) wrong = LLMC_ERROR_CONTEXT;
        if (wrong == LLMC_OK && kind == 1) words[i][place] = POISON, wrong = LLMC_ERROR_STEP;
        if (expected == LLMC_OK || (expected == LLMC_ERROR_STEP && wrong != LLMC_OK)) expected = wrong;
        sequences[number] = twin->sequence, ids[number] = words[i], counts[number] = count, fed[number++] = i;
    }
    if (number == 0) {
        CHECK(llmc->feed_all(sequences, ids, counts, 0) == LLMC_ERROR_ARGUMENT);
        return;
    }
    const int code = llmc->feed_all(sequences, ids, counts, number);
    CHECK(code == expected || (code == LLMC_ERROR_FULL && (expected == LLMC_OK || expected == LLMC_ERROR_STEP)));
    CHECK((llmc->error()[0] == 0) == (code == LLMC_OK));
    for (int64_t n = 0; n < number; n++) {
        Twin *twin = &c->twins[fed[n]];
        if (code == LLMC_ERROR_STEP) twin->has_logits = false;
        if (code != LLMC_OK) continue;
        memcpy(twin->tokens + twin->length, ids[n], (size_t)counts[n] * sizeof(int32_t));
        twin->length += counts[n];
        twin->has_logits = true;
    }
}

static void renew(Caller *c, Twin *twin) {
    if (twin->sequence != NULL) llmc->end(twin->sequence);
    *twin = (Twin){0};
    const Twin *other = &c->twins[below(c, SEQUENCES)];
    if (other->sequence != NULL && other != twin && below(c, 3)) {
        CHECK(llmc->fork(other->sequence, &twin->sequence) == LLMC_OK);
        LlmcSequence *sequence = twin->sequence;
        *twin = *other;
        twin->sequence = sequence;
    } else {
        CHECK(llmc->sequence(c->model, below(c, MOST), &twin->sequence) == LLMC_OK);
    }
}

static void roll_back(Caller *c, Twin *twin) {
    const int64_t count = below(c, 4) ? below(c, twin->length + 1) : twin->length;
    CHECK(llmc->rollback(twin->sequence, twin->length + 1) == LLMC_ERROR_ARGUMENT);
    CHECK(llmc->rollback(twin->sequence, -1) == LLMC_ERROR_ARGUMENT);
    CHECK(llmc->rollback(twin->sequence, count) == LLMC_OK);
    twin->length -= count;
    if (count > 0) twin->has_logits = false;
}

static void *hammer(void *argument) {
    Caller *c = argument;
    for (int i = 0; i < SEQUENCES; i++) renew(c, &c->twins[i]);
    for (int64_t round = 0; round < c->rounds; round++) {
        Twin *twin = &c->twins[below(c, SEQUENCES)];
        const int64_t kind = below(c, 10);
        if (kind < 6) feed(c);
        else if (kind < 8) roll_back(c, twin);
        else renew(c, twin);
        for (int i = 0; i < SEQUENCES; i++) check_twin(&c->twins[i]);
        if (twin->has_logits) check_choices(c, twin);
    }
    return NULL;
}

/* Every page has as many users as there are sequences with it; the model is at rest. */
static void check_pages(const LlmcModel *model) {
    const LlmcPages *pages = &model->pages;
    int32_t *users = calloc((size_t)pages->capacity + 1, sizeof *users);
    CHECK(users != NULL);
    int64_t used = 0;
    for (const LlmcSequence *s = model->sequences; s != NULL; s = s->after) {
        for (int64_t i = 0; i < s->page_count; i++) users[s->page_ids[i]]++;
        CHECK(s->page_count == (pages->capacity ? (s->length + PAGE - 1) / PAGE : 0));
    }
    for (int64_t p = 0; p < pages->capacity; p++) {
        CHECK(users[p] == pages->users[p]);
        used += users[p] > 0;
    }
    CHECK(llmc_pages_available(pages) == pages->capacity - used);
    free(users);
}

static void check_what_cannot_be(LlmcModel *model) {
    LlmcModel *none = model;
    LlmcSequence *sequence = NULL, *other = NULL;
    int32_t token = 1;
    const int32_t *ids = &token;
    int64_t one = 1;
    CHECK(llmc_api(LLMC_API_VERSION + 1) == NULL && llmc->bytes == sizeof *llmc && llmc->facts == &llmc_facts);
    CHECK(llmc->open("/dev/null", NULL, &none) == LLMC_ERROR_FILE && none == NULL);
    CHECK(llmc->open("/no such file", NULL, &none) == LLMC_ERROR_FILE && strstr(llmc->error(), "No such file"));
    CHECK(llmc->open(NULL, NULL, NULL) == LLMC_ERROR_ARGUMENT);
    const struct {
        LlmcOptions known;
        int64_t more;
    } newer = {{.bytes = sizeof newer}, 1};
    CHECK(llmc->open(NULL, &newer.known, &none) == LLMC_ERROR_UNSUPPORTED);
    CHECK(llmc->open(NULL, &(LlmcOptions){.bytes = 0}, &none) == LLMC_ERROR_ARGUMENT);
    CHECK(llmc->open(NULL, &(LlmcOptions){.bytes = sizeof(LlmcOptions), .threads = -1}, &none) == LLMC_ERROR_ARGUMENT);
    CHECK(llmc->open(NULL, &(LlmcOptions){.bytes = sizeof(LlmcOptions), .copy_weights = 2}, &none) != LLMC_OK);
    CHECK(llmc->sequence(NULL, 0, &sequence) == LLMC_ERROR_ARGUMENT);
    CHECK(llmc->sequence(model, CONTEXT + 1, &sequence) == LLMC_ERROR_CONTEXT && sequence == NULL);
    CHECK(llmc->sequence(model, 0, NULL) == LLMC_ERROR_ARGUMENT);
    CHECK(llmc->sequence(model, 0, &sequence) == LLMC_OK);
    CHECK(llmc->next(sequence, NULL, &token) == LLMC_ERROR_STATE && llmc->logits(sequence) == NULL);
    CHECK(llmc->feed(sequence, &token, 0) == LLMC_ERROR_ARGUMENT && llmc->feed(sequence, NULL, 1) != LLMC_OK);
    CHECK(llmc->feed(NULL, &token, 1) == LLMC_ERROR_ARGUMENT);
    LlmcSequence *twice[] = {sequence, sequence};
    CHECK(llmc->feed_all(twice, (const int32_t *[]){ids, ids}, (int64_t[]){one, one}, 2) == LLMC_ERROR_ARGUMENT);
    CHECK(llmc->fork(NULL, &other) == LLMC_ERROR_ARGUMENT && llmc->fork(sequence, NULL) == LLMC_ERROR_ARGUMENT);
    CHECK(llmc->feed(sequence, ids, one) == LLMC_OK);
    llmc->logits(sequence)[3] = 0.0f / (float)(token - 1); /* not a number */
    CHECK(llmc->next(sequence, NULL, &token) == LLMC_ERROR_NUMBERS && token == 1);
    float row;
    CHECK(llmc->encode(model, ids, &one, 1, &row) == LLMC_ERROR_UNSUPPORTED);
    CHECK(llmc->encode(NULL, ids, &one, 1, &row) == LLMC_ERROR_ARGUMENT);
    llmc->end(sequence);
    llmc->end(NULL);
    llmc->close(NULL);
}

/* rounds: calls of each thread. */
int main(int argc, char **argv) {
    static Caller callers[CALLERS];
    pthread_t threads[CALLERS];
    LlmcModel *model, *second;
    const int64_t page_bytes = LAYERS * 2 * 2 * PAGE * 4; /* keys and values of two floats a token */
    const LlmcOptions options = {.bytes = sizeof options, .threads = 3, .cache_bytes = PAGES * page_bytes};
    llmc = llmc_api(LLMC_API_VERSION);
    CHECK(llmc != NULL);
    CHECK(llmc->open(NULL, &options, &model) == LLMC_OK && llmc->open(NULL, NULL, &second) == LLMC_OK);
    CHECK(model->pages.capacity == (LLMC_PAGED == llmc_facts.state ? PAGES : 0));
    check_what_cannot_be(second);
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = (Caller){.model = model, .random = (uint64_t)i + 1, .rounds = argc > 1 ? atoll(argv[1]) : 100};
        CHECK(pthread_create(&threads[i], NULL, hammer, &callers[i]) == 0);
    }
    for (int i = 0; i < CALLERS; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    check_pages(model);
    for (int i = 0; i < SEQUENCES; i++) llmc->end(callers[0].twins[i].sequence);
    check_pages(model);
    llmc->close(second);
    llmc->close(model); /* with the other sequences */
    fflush(NULL);
    _exit(0);
}
