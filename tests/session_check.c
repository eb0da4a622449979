/* Random calls of llmc.h over a step that is known exactly, by several threads; built with and without sanitizers by
 * tests/test_c_session.py. With STATELESS defined the step keeps no cache; with REGIMES, sequences are computed in one of
 * three by their length. Exits 0 when all holds.
 *
 * The step: a token's key is its id, position and regime, put into the cache through `slots`; the logits of a row are a
 * hash of all keys that it sees through `block_table` and `tiles`. A wrong page, slot, tile, position, length or row
 * changes them. */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "llmc.h"
#include "model.h"
#include "pool.h"
#include "step_check.h"

enum { VOCAB = 13, POISON = 12, PAGE = 8, TILE = 4, MAX_STEP = 20, CONTEXT = 90, LAYERS = 2, PAGES = 60, FAILED = 11 };
enum { SEQUENCES = 6, CALLERS = 4, TEXTS = 3, WRITTEN = 30 };

static const char *const failures[FAILED] = {"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "a poisoned token"};
#ifdef STATELESS
enum { MOST = MAX_STEP };
#else
enum { MOST = CONTEXT };
static const LlmcLayerFacts layers[LAYERS] = {{1, 2, 2, 4, 0}, {1, 2, 2, 4, 0}};
#endif
#ifdef REGIMES
enum { REGIME_COUNT = 2 };
static const int64_t regimes[REGIME_COUNT] = {19, 50};
#else
enum { REGIME_COUNT = 0 };
static const int64_t *const regimes = NULL;
#endif

const LlmcFacts llmc_facts = {
    .bytes = sizeof(LlmcFacts), .task = LLMC_GENERATE, .vocabulary = VOCAB, .max_context = CONTEXT,
    .max_step = MAX_STEP, .page = PAGE, .tile = TILE, .max_splits = 3, .part = 2 * PAGE, .arena_bytes = 8 * MAX_STEP,
    .regime_count = REGIME_COUNT, .regimes = regimes, .architecture = "any", .failure_count = FAILED, .failures = failures, .encoder_output = -1,
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

/* length: of the sequence, or any in the same regime. */
static uint64_t key_of(int32_t id, int64_t position, int64_t length) {
    uint64_t regime = 0;
    for (int i = 0; i < REGIME_COUNT; i++) regime += length > regimes[i];
    return (uint64_t)(id + 1) + UINT64_C(1000) * (uint64_t)position + UINT64_C(1000000) * regime;
}

static float logit_of(uint64_t sum, int v) { return (float)(mix(sum, (uint64_t)v) >> 40); }

static void store(void *context, int64_t begin, int64_t end) {
    const LlmcStep *s = context;
    for (int64_t t = begin; llmc_facts.state == LLMC_PAGED && t < end; t++) {
        const int64_t page = s->slots[t] / PAGE, offset = s->slots[t] % PAGE;
        const float key = (float)key_of(s->ids[t], s->positions[t], s->lengths[t]);
        ((float *)s->cache[0])[page * 2 * PAGE + offset] = key;
        ((float *)s->cache[3])[(page * PAGE + offset) * 2] = 2 * key;
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
                sum = mix(sum, key_of(s->ids[p], p, s->lengths[p]));
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
    int64_t length, expected;
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
    const int64_t whole = twin->length > twin->expected ? twin->length : twin->expected;
    uint64_t sum = 0;
    for (int64_t p = 0; p < twin->length; p++) sum = mix(sum, key_of(twin->tokens[p], p, whole));
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
        if (code == LLMC_ERROR_STEP) {
            /* Only what is computed anew, in another regime, may be left with fewer tokens. */
            const int64_t length = llmc->length(twin->sequence);
            CHECK(length == twin->length || (REGIME_COUNT > 0 && length < twin->length));
            twin->length = length;
            twin->has_logits = false;
        }
        if (code != LLMC_OK) continue;
        memcpy(twin->tokens + twin->length, ids[n], (size_t)counts[n] * sizeof(int32_t));
        twin->length += counts[n];
        twin->has_logits = true;
    }
}

/* Begins a sequence with what the cache has of another one's tokens, and of some that follow. */
static void adopt(Caller *c, Twin *twin, const Twin *other) {
    int32_t ids[CONTEXT];
    const int64_t count = below(c, MOST);
    int64_t covered = -1;
    for (int64_t i = 0; i < count; i++) ids[i] = i < other->length ? other->tokens[i] : (int32_t)below(c, 2);
    CHECK(llmc->adopt(twin->sequence, ids, count, &covered) == LLMC_OK);
    CHECK(covered % PAGE == 0 && (covered == 0 || (covered < count && llmc_facts.state == LLMC_PAGED)));
    memcpy(twin->tokens, ids, (size_t)covered * sizeof *ids);
    twin->length = covered;
    if (covered > 0) CHECK(llmc->adopt(twin->sequence, ids, count, &covered) == LLMC_ERROR_STATE && covered == 0);
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
        twin->expected = below(c, 2) ? below(c, MOST) : 0;
        CHECK(llmc->sequence(c->model, twin->expected, &twin->sequence) == LLMC_OK);
        adopt(c, twin, other);
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

/* Every page has as many users as there are sequences with it, and one without is free or kept for its tokens, under
 * which it is found; the model is at rest. */
static void check_pages(const LlmcModel *model) {
    const LlmcPages *pages = &model->pages;
    int32_t *users = calloc((size_t)pages->capacity + 1, sizeof *users);
    CHECK(users != NULL);
    int64_t used = 0, kept = 0, listed = 0;
    for (const LlmcSequence *s = model->sequences; s != NULL; s = s->after) {
        const LlmcSequenceView *view = &s->view;
        for (int64_t i = 0; i < view->page_count; i++) users[s->page_ids[i]]++;
        CHECK(view->page_count == (pages->capacity ? (view->length + PAGE - 1) / PAGE : 0));
        CHECK(s->serial_count == (pages->capacity ? view->length / PAGE : 0) && s->pending == 0);
    }
    for (int32_t p = 0; p < pages->capacity; p++) {
        CHECK(users[p] == pages->users[p]);
        used += users[p] > 0;
        kept += users[p] == 0 && pages->serials[p] != 0;
        if (pages->serials[p]) CHECK(llmc_pages_find(pages, pages->parents[p], pages->tokens + p * PAGE) == p);
    }
    for (int32_t p = pages->oldest; p; p = pages->newer[p - 1]) {
        CHECK(users[p - 1] == 0 && pages->serials[p - 1] != 0);
        listed++;
    }
    CHECK(kept == pages->kept_count && kept == listed && used + kept + pages->free_count == pages->fresh);
    CHECK(llmc_pages_available(pages) == pages->capacity - used);
    free(users);
}

/* A text that `llmc_write` writes, and one beside it that is fed and chosen token by token. */
typedef struct Pair {
    LlmcSequence *written, *fed;
    LlmcChoice choice, twin_choice;
    unsigned char known[VOCAB], twin_known[VOCAB];
    int32_t seen[VOCAB], twin_seen[VOCAB], tokens[WRITTEN], stop;
    double uniforms[WRITTEN];
    int64_t checked; /* tokens that both have */
} Pair;

static void begin_pair(Caller *c, LlmcModel *model, Pair *pair) {
    int32_t ids[CONTEXT];
    const int64_t count = 1 + below(c, MOST - WRITTEN > 20 ? 20 : MOST - WRITTEN > 0 ? MOST - WRITTEN : 1);
    for (int64_t i = 0; i < count; i++) ids[i] = (int32_t)below(c, POISON);
    *pair = (Pair){.stop = (int32_t)below(c, 4 * VOCAB), .checked = 1};
    CHECK(llmc->sequence(model, 0, &pair->written) == LLMC_OK && llmc->feed(pair->written, ids, count) == LLMC_OK);
    CHECK(llmc->fork(pair->written, &pair->fed) == LLMC_OK);
    pair->tokens[0] = (int32_t)below(c, POISON);
    for (int i = 0; i < WRITTEN; i++) pair->uniforms[i] = (double)below(c, 1000) / 1000;
    pair->choice = (LlmcChoice){.scratch = model->own.scratch, .count = VOCAB, .penalty = 1 + (double)below(c, 2), .top_p = 1};
    if (below(c, 2)) pair->choice.temperature = 1e5;
    pair->twin_choice = pair->choice;
    pair->choice.seen = pair->seen, pair->twin_choice.seen = pair->twin_seen;
}

/* What the sequence that is fed by hand chooses next is what the other one was given. */
static void check_token(const LlmcModel *model, Pair *pair, int32_t token) {
    LlmcChoice *choice = &pair->twin_choice;
    CHECK(llmc->feed(pair->fed, &pair->tokens[pair->checked - 1], 1) == LLMC_OK);
    choice->logits = llmc->logits(pair->fed);
    choice->uniform = pair->uniforms[pair->checked];
    CHECK(llmc_choose(choice, model->threads) == token);
    if (token != pair->stop && !pair->twin_known[token]) pair->twin_known[token] = 1, pair->twin_seen[choice->seen_count++] = token;
    pair->checked++;
}

/* Texts in one step, or one after the other: in calls of one round and of many, until one ends. POISON is a token like any
 * other to a choice, and ends the writing with an error when it is fed. */
static void check_writing(Caller *c, LlmcModel *model) {
    static Pair pairs[TEXTS];
    LlmcText texts[TEXTS];
    bool is_over = false;
    for (int i = 0; i < TEXTS; i++) {
        Pair *pair = &pairs[i];
        begin_pair(c, model, pair);
        texts[i] = (LlmcText){.sequence = pair->written, .choice = &pair->choice, .seen = pair->seen, .known = pair->known,
                              .uniforms = pair->choice.temperature != 0 ? pair->uniforms : NULL, .stops = &pair->stop,
                              .stop_count = 1, .tokens = pair->tokens, .count = 1, .most = WRITTEN};
    }
    while (!is_over) {
        int64_t times[WRITTEN], before = texts[0].count;
        LlmcWriting writing = {.texts = texts, .number = TEXTS, .times = times,
                               .deadline = below(c, 2) ? 0 : INT64_MAX};
        const int code = llmc_write(model, &writing);
        if (writing.deadline == 0) CHECK(writing.rounds <= 1);
        for (int64_t r = 1; r < writing.rounds; r++) CHECK(times[r] >= times[r - 1]);
        bool is_poisoned = false, is_long = false;
        for (int i = 0; i < TEXTS; i++) {
            Pair *pair = &pairs[i];
            while (pair->checked < texts[i].count) check_token(model, pair, pair->tokens[pair->checked]);
            const int32_t last = pair->tokens[texts[i].count - 1];
            const int64_t expected = last == pair->stop && texts[i].count > 1 ? LLMC_TEXT_STOPPED
                                     : texts[i].count == WRITTEN ? LLMC_TEXT_FULL : LLMC_TEXT_GOES_ON;
            CHECK(texts[i].end == expected);
            is_over |= texts[i].end != LLMC_TEXT_GOES_ON;
            is_poisoned |= last == POISON;
            is_long |= llmc->length(pair->written) == MOST;
        }
        if (code != LLMC_OK) {
            CHECK((code == LLMC_ERROR_STEP && is_poisoned) || (code == LLMC_ERROR_CONTEXT && is_long));
            is_over = true;
        } else {
            CHECK(texts[0].count == before + writing.rounds && writing.rounds > 0);
        }
    }
    LlmcWriting full = {.texts = texts, .number = 1};
    texts[0].most = texts[0].count;
    CHECK(llmc_write(model, &full) == LLMC_ERROR_ARGUMENT);
    for (int i = 0; i < TEXTS; i++) llmc->end(pairs[i].written), llmc->end(pairs[i].fed);
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
    CHECK(llmc->adopt(NULL, ids, 1, &one) == LLMC_ERROR_ARGUMENT && llmc->adopt(sequence, NULL, 1, &one) != LLMC_OK);
    CHECK(llmc->adopt(sequence, ids, CONTEXT + 1, &one) == LLMC_ERROR_CONTEXT && one == 0);
    one = 1;
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
    callers[0].random = 99;
    for (int i = 0; i < 20; i++) check_writing(&callers[0], second);
    check_pages(second);
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
