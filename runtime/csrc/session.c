/* Sequences: tokens that a model has seen, and the pages of the KV cache that hold them. */
#include <stddef.h>
#include <string.h>

#include "memory.h"
#include "model.h"

enum { ALIGNMENT = 64 };

static int64_t ceiling(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

static int64_t padded(int64_t bytes) { return ceiling(bytes, ALIGNMENT) * ALIGNMENT; }

static bool has_cache(void) { return llmc_facts.state == LLMC_PAGED; }

/* Tokens of a sequence at most: without a cache every step sees all of them. */
static int64_t most_tokens(void) {
    const int64_t context = llmc_facts.max_context, step = llmc_facts.max_step;
    return has_cache() || context < step ? context : step;
}

/* The regime that a sequence of so many tokens is computed in, and a length in that regime. */
static int64_t regime_of(const LlmcSequence *sequence, int64_t length) {
    const int64_t whole = length > sequence->expected ? length : sequence->expected;
    int64_t regime = 0;
    while (regime < llmc_facts.regime_count && whole > llmc_facts.regimes[regime]) regime++;
    return regime;
}

static int64_t length_in(int64_t regime) {
    if (llmc_facts.regime_count == 0) return 0;
    return regime < llmc_facts.regime_count ? llmc_facts.regimes[regime] : llmc_facts.regimes[regime - 1] + 1;
}

/* A sequence without tokens, in the model's list; the lock is held. NULL: no memory. */
static LlmcSequence *make_sequence(LlmcModel *model, int64_t expected) {
    const int64_t logits = padded(llmc_facts.vocabulary * (int64_t)sizeof(float));
    const int64_t tokens = padded(most_tokens() * (int64_t)sizeof(int32_t));
    const int64_t pages = has_cache() ? ceiling(most_tokens(), llmc_facts.page) * (int64_t)sizeof(int32_t) : 0;
    const int64_t bytes = padded(sizeof(LlmcSequence)) + logits + tokens + pages;
    LlmcSequence *sequence = llmc_reserve(bytes);
    if (sequence == NULL) return NULL;
    char *place = (char *)sequence + padded(sizeof(LlmcSequence));
    *sequence = (LlmcSequence){.model = model, .memory_bytes = bytes, .expected = expected};
    sequence->logits = (float *)(void *)place;
    sequence->tokens = (int32_t *)(void *)(place + logits);
    sequence->page_ids = (int32_t *)(void *)(place + logits + tokens);
    sequence->after = model->sequences;
    if (model->sequences != NULL) model->sequences->before = sequence;
    model->sequences = sequence;
    return sequence;
}

/* Makes a sequence one of `length` tokens, which it had; the lock is held. */
static void truncate_to(LlmcSequence *sequence, int64_t length) {
    const int64_t needed = has_cache() ? ceiling(length, llmc_facts.page) : 0;
    while (sequence->page_count > needed) {
        llmc_pages_release(&sequence->model->pages, sequence->page_ids[--sequence->page_count]);
    }
    sequence->length = length;
}

static int no_page(const LlmcModel *model) {
    return llmc_fail(LLMC_ERROR_FULL, "the KV cache is full: all %lld pages are in use. End sequences, or open the model "
                     "with more cache_bytes", (long long)model->pages.capacity);
}

/* Makes pages for `end` tokens, and the one that the next token goes to this sequence's own. */
static int add_pages(LlmcSequence *sequence, int64_t end) {
    LlmcModel *model = sequence->model;
    const int64_t last = sequence->length / llmc_facts.page;
    if (sequence->length % llmc_facts.page && model->pages.users[sequence->page_ids[last]] > 1) {
        const int32_t shared = sequence->page_ids[last], own = llmc_pages_take(&model->pages);
        if (own < 0) return no_page(model);
        for (int64_t i = 0; i < 2 * llmc_facts.layer_count; i++) {
            char *buffer = model->cache[i];
            const int64_t bytes = model->page_bytes[i];
            memcpy(buffer + own * bytes, buffer + shared * bytes, (size_t)bytes);
        }
        llmc_pages_release(&model->pages, shared);
        sequence->page_ids[last] = own;
    }
    while (sequence->page_count * llmc_facts.page < end) {
        const int32_t page = llmc_pages_take(&model->pages);
        if (page < 0) return no_page(model);
        sequence->page_ids[sequence->page_count++] = page;
    }
    return LLMC_OK;
}

int llmc_sequence(LlmcModel *model, int64_t expected, LlmcSequence **sequence) {
    llmc_no_error();
    if (sequence == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "there is no place for the sequence: it is NULL");
    *sequence = NULL;
    if (model == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the model is NULL");
    if (llmc_facts.task != LLMC_GENERATE) {
        return llmc_fail(LLMC_ERROR_UNSUPPORTED, "this artifact is an encoder: it has no sequences, but `encode`");
    }
    if (expected < 0 || expected > most_tokens()) {
        return llmc_fail(LLMC_ERROR_CONTEXT, "%lld tokens are expected: the context has %lld", (long long)expected,
                         (long long)most_tokens());
    }
    pthread_mutex_lock(&model->lock);
    *sequence = make_sequence(model, expected);
    pthread_mutex_unlock(&model->lock);
    return *sequence != NULL ? LLMC_OK : llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for another sequence");
}

int llmc_fork(LlmcSequence *sequence, LlmcSequence **other) {
    llmc_no_error();
    if (other == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "there is no place for the sequence: it is NULL");
    *other = NULL;
    if (sequence == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the sequence is NULL");
    LlmcModel *model = sequence->model;
    pthread_mutex_lock(&model->lock);
    LlmcSequence *made = make_sequence(model, sequence->expected);
    if (made != NULL) {
        made->length = sequence->length;
        made->regime = sequence->regime;
        made->page_count = sequence->page_count;
        made->has_logits = sequence->has_logits;
        memcpy(made->tokens, sequence->tokens, (size_t)made->length * sizeof *made->tokens);
        memcpy(made->page_ids, sequence->page_ids, (size_t)made->page_count * sizeof *made->page_ids);
        if (made->has_logits) {
            memcpy(made->logits, sequence->logits, (size_t)llmc_facts.vocabulary * sizeof *made->logits);
        }
        for (int64_t i = 0; i < made->page_count; i++) llmc_pages_share(&model->pages, made->page_ids[i]);
    }
    pthread_mutex_unlock(&model->lock);
    *other = made;
    return made != NULL ? LLMC_OK : llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for another sequence");
}

void llmc_end(LlmcSequence *sequence) {
    if (sequence == NULL) return;
    LlmcModel *model = sequence->model;
    pthread_mutex_lock(&model->lock);
    truncate_to(sequence, 0);
    if (sequence->before != NULL) sequence->before->after = sequence->after;
    if (sequence->after != NULL) sequence->after->before = sequence->before;
    if (model->sequences == sequence) model->sequences = sequence->after;
    pthread_mutex_unlock(&model->lock);
    llmc_give_back(sequence, sequence->memory_bytes);
}

int64_t llmc_length(const LlmcSequence *sequence) { return sequence == NULL ? 0 : sequence->length; }

float *llmc_logits(LlmcSequence *sequence) {
    return sequence != NULL && sequence->has_logits ? sequence->logits : NULL;
}

int llmc_rollback(LlmcSequence *sequence, int64_t count) {
    llmc_no_error();
    if (sequence == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the sequence is NULL");
    if (count < 0 || count > sequence->length) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "rollback of %lld tokens of a sequence of %lld", (long long)count,
                         (long long)sequence->length);
    }
    pthread_mutex_lock(&sequence->model->lock);
    truncate_to(sequence, sequence->length - count);
    pthread_mutex_unlock(&sequence->model->lock);
    if (count > 0) sequence->has_logits = false;
    return LLMC_OK;
}

/* Whether these tokens may come behind those of the sequence. */
static int check_feed(const LlmcSequence *sequence, const int32_t *ids, int64_t count) {
    if (sequence == NULL || ids == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "a sequence or its ids are NULL");
    if (count < 1) return llmc_fail(LLMC_ERROR_ARGUMENT, "%lld token ids: feed at least one", (long long)count);
    if (count > most_tokens() - sequence->length) {
        return llmc_fail(LLMC_ERROR_CONTEXT,
                         "%lld more tokens than the %lld there are make more than the context of %lld that the artifact "
                         "was compiled for", (long long)count, (long long)sequence->length, (long long)most_tokens());
    }
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] >= 0 && ids[i] < llmc_facts.vocabulary) continue;
        return llmc_fail(LLMC_ERROR_ARGUMENT, "token id %ld is not in the vocabulary of %lld", (long)ids[i],
                         (long long)llmc_facts.vocabulary);
    }
    const int64_t end = sequence->length + count;
    if (has_cache() && sequence->length > 0 && regime_of(sequence, end) != sequence->regime) {
        return llmc_fail(LLMC_ERROR_UNSUPPORTED,
                         "the model computes a sequence of %lld tokens differently from its start: make a new one, with "
                         "expected = %lld or more", (long long)end, (long long)end);
    }
    return LLMC_OK;
}

/* Checks all and makes room for all; the lock is held. Lengths stay as they are. */
static int prepare(LlmcSequence *const *sequences, const int32_t *const *ids, const int64_t *counts, int64_t number) {
    for (int64_t i = 0; i < number; i++) {
        const int code = check_feed(sequences[i], ids[i], counts[i]);
        if (code != LLMC_OK) return code;
        if (sequences[i]->model != sequences[0]->model) {
            return llmc_fail(LLMC_ERROR_ARGUMENT, "sequences of several models cannot share a step");
        }
        for (int64_t j = 0; j < i; j++) {
            if (sequences[i] == sequences[j]) return llmc_fail(LLMC_ERROR_ARGUMENT, "a sequence is there twice");
        }
    }
    for (int64_t i = 0; i < number; i++) {
        LlmcSequence *sequence = sequences[i];
        const int64_t end = sequence->length + counts[i];
        const int code = has_cache() ? add_pages(sequence, end) : LLMC_OK;
        if (code != LLMC_OK) return code;
        if (sequence->length == 0 || !has_cache()) sequence->regime = regime_of(sequence, end);
        memcpy(sequence->tokens + sequence->length, ids[i], (size_t)counts[i] * sizeof **ids);
    }
    return LLMC_OK;
}

/* How far a feed has come: tokens [done] of the sequence number [next] are in the cache, and all of those before it. */
typedef struct Progress {
    int64_t next, done;
} Progress;

/* Whether the tokens of a feed decode: one token behind those that the sequence has. Others are a prompt's. */
static bool decodes(const LlmcSequence *sequence, int64_t count) {
    return has_cache() && count == 1 && sequence->length > 0;
}

/* The parts of the next step, of at most max_step tokens, and of one kind where the two kinds of tokens are computed
 * differently; returns how many. Without a cache a step has all tokens of one
 * sequence. first: the number of the sequence that the first part is of. */
static int64_t gather_parts(LlmcModel *model, LlmcSequence *const *sequences, const int64_t *counts, int64_t number,
                            Progress *progress) {
    int64_t parts = 0, room = llmc_facts.max_step;
    while (progress->next < number && room > 0 && (parts == 0 || has_cache())) {
        const LlmcSequence *sequence = sequences[progress->next];
        const bool decoding = decodes(sequence, counts[progress->next]);
        if (parts > 0 && llmc_facts.row_kinds && model->parts[0].decoding != decoding) break;
        const int64_t begin = has_cache() ? sequence->length + progress->done : 0;
        const int64_t left = sequence->length + counts[progress->next] - begin, count = left < room ? left : room;
        model->parts[parts++] = (LlmcPart){
            .ids = sequence->tokens + begin,
            .pages = sequence->page_ids,
            .page_count = sequence->page_count,
            .count = count,
            .start = begin,
            .first_row = count == left ? count - 1 : count,
            .length = length_in(sequence->regime),
            .decoding = decoding,
        };
        room -= count;
        progress->done += count;
        if (count == left) *progress = (Progress){progress->next + 1, 0};
    }
    return parts;
}

/* All steps of a feed; the lock is held. */
static int run(LlmcModel *model, LlmcSequence *const *sequences, const int64_t *counts, int64_t number) {
    Progress progress = {0, 0};
    while (progress.next < number) {
        const int64_t first = progress.next;
        const int64_t parts = gather_parts(model, sequences, counts, number, &progress);
        const int64_t finished = progress.next - first; /* sequences whose logits this step gives, one after the other */
        for (int64_t i = first; i < progress.next; i++) sequences[i]->has_logits = false;
        model->step.logits = finished == 1 ? sequences[first]->logits : model->logits;
        const int code = llmc_run_parts(model, parts);
        if (code != LLMC_OK) return code;
        for (int64_t i = 0; i < finished; i++) {
            LlmcSequence *sequence = sequences[first + i];
            if (finished > 1) {
                memcpy(sequence->logits, model->logits + i * llmc_facts.vocabulary,
                       (size_t)llmc_facts.vocabulary * sizeof *sequence->logits);
            }
            sequence->has_logits = true;
        }
    }
    return LLMC_OK;
}

int llmc_feed_all(LlmcSequence *const *sequences, const int32_t *const *ids, const int64_t *counts, int64_t number) {
    llmc_no_error();
    if (sequences == NULL || ids == NULL || counts == NULL || number < 1 || sequences[0] == NULL) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "sequences, ids or counts are NULL, or there are none");
    }
    LlmcModel *model = sequences[0]->model;
    pthread_mutex_lock(&model->lock);
    int code = prepare(sequences, ids, counts, number);
    const bool is_ready = code == LLMC_OK;
    if (is_ready) code = run(model, sequences, counts, number);
    for (int64_t i = 0; i < number; i++) {
        LlmcSequence *sequence = sequences[i];
        if (code == LLMC_OK) {
            sequence->length += counts[i];
        } else if (sequence != NULL && sequence->model == model) {
            truncate_to(sequence, sequence->length); /* gives back the pages that were made */
            if (is_ready) sequence->has_logits = false;
        }
    }
    pthread_mutex_unlock(&model->lock);
    return code;
}

int llmc_feed(LlmcSequence *sequence, const int32_t *ids, int64_t count) {
    return llmc_feed_all(&sequence, &ids, &count, 1);
}
