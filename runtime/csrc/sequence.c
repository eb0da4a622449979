/* Sequences: tokens that a model has seen, and the pages of the KV cache that hold them. */
#include <stddef.h>
#include <string.h>

#include "memory.h"
#include "model.h"

enum { ALIGNMENT = 64 };

static int64_t ceiling(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

int64_t llmc_root_of(const LlmcSequence *sequence) {
    return -(sequence->view.regime + (llmc_facts.regime_count + 1) * sequence->adapter_serial);
}

static int64_t padded(int64_t bytes) { return ceiling(bytes, ALIGNMENT) * ALIGNMENT; }

bool llmc_has_cache(void) { return llmc_facts.state == LLMC_PAGED; }

int64_t llmc_most_tokens(void) {
    const int64_t context = llmc_facts.max_context, step = llmc_facts.max_step;
    return llmc_has_cache() || context < step ? context : step;
}

int64_t llmc_regime_of(const LlmcSequence *sequence, int64_t length) {
    const int64_t whole = length > sequence->view.expected ? length : sequence->view.expected;
    int64_t regime = 0;
    while (regime < llmc_facts.regime_count && whole > llmc_facts.regimes[regime]) regime++;
    return regime;
}

int64_t llmc_length_in(int64_t regime) {
    if (llmc_facts.regime_count == 0) return 0;
    return regime < llmc_facts.regime_count ? llmc_facts.regimes[regime] : llmc_facts.regimes[regime - 1] + 1;
}

/* A sequence without tokens, in the model's list; the lock is held. NULL: no memory. */
static LlmcSequence *make_sequence(LlmcModel *model, int64_t expected) {
    const int64_t most = llmc_has_cache() ? ceiling(llmc_most_tokens(), llmc_facts.page) : 0;
    const int64_t numbers = padded(most * (int64_t)sizeof(int32_t));
    const int64_t parts[] = {
        padded(sizeof(LlmcSequence)),
        padded(llmc_facts.vocabulary * (int64_t)sizeof(float)),
        padded(llmc_most_tokens() * (int64_t)sizeof(int32_t)),
        padded(most * (int64_t)sizeof(int64_t)),
        numbers,
        llmc_facts.regime_count ? numbers : 0,
    };
    char *places[sizeof parts / sizeof *parts];
    int64_t bytes = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) bytes += parts[i];
    char *memory = llmc_reserve(bytes);
    if (memory == NULL) return NULL;
    places[0] = memory;
    for (size_t i = 1; i < sizeof parts / sizeof *parts; i++) places[i] = places[i - 1] + parts[i - 1];
    LlmcSequence *sequence = (LlmcSequence *)(void *)memory;
    *sequence = (LlmcSequence){.model = model, .memory_bytes = bytes};
    sequence->logits = (float *)(void *)places[1];
    sequence->tokens = (int32_t *)(void *)places[2];
    sequence->serials = (int64_t *)(void *)places[3];
    sequence->page_ids = (int32_t *)(void *)places[4];
    sequence->before_anew.page_ids = (int32_t *)(void *)places[5];
    sequence->view = (LlmcSequenceView){
        .expected = expected, .reading = 1, .tokens = sequence->tokens, .page_ids = sequence->page_ids};
    sequence->after = model->sequences;
    if (model->sequences != NULL) model->sequences->before = sequence;
    model->sequences = sequence;
    return sequence;
}

void llmc_truncate(LlmcSequence *sequence, int64_t length) {
    LlmcSequenceView *view = &sequence->view;
    view->length = length;
    if (!llmc_has_cache()) return;
    const int64_t needed = ceiling(length, llmc_facts.page), full = length / llmc_facts.page;
    /* The last first, so that the tail of a prefix makes room before its head. */
    while (view->page_count > needed) {
        llmc_pages_release(&sequence->model->pages, sequence->page_ids[--view->page_count]);
    }
    if (sequence->serial_count > full) sequence->serial_count = full;
}

int llmc_sequence(LlmcModel *model, int64_t expected, LlmcSequence **sequence) {
    llmc_no_error();
    if (sequence == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "there is no place for the sequence: it is NULL");
    *sequence = NULL;
    if (model == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the model is NULL");
    if (llmc_facts.task != LLMC_GENERATE) {
        return llmc_fail(LLMC_ERROR_UNSUPPORTED, "this artifact is an encoder: it has no sequences, but `encode`");
    }
    if (expected < 0 || expected > llmc_most_tokens()) {
        return llmc_fail(LLMC_ERROR_CONTEXT, "%lld tokens are expected: the context has %lld", (long long)expected,
                         (long long)llmc_most_tokens());
    }
    pthread_mutex_lock(&model->lock);
    *sequence = make_sequence(model, expected);
    pthread_mutex_unlock(&model->lock);
    return *sequence != NULL ? LLMC_OK : llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for another sequence");
}

/* Copies what a sequence is into a new one, which shares its pages. */
static void copy_into(LlmcSequence *made, const LlmcSequence *sequence) {
    const LlmcSequenceView *view = &sequence->view;
    made->view.length = view->length;
    made->view.regime = view->regime;
    made->view.reading = view->reading;
    made->view.adapter = view->adapter;
    made->adapter_serial = sequence->adapter_serial;
    made->view.page_count = view->page_count;
    made->has_logits = sequence->has_logits;
    made->serial_count = sequence->serial_count;
    memcpy(made->tokens, sequence->tokens, (size_t)view->length * sizeof *made->tokens);
    memcpy(made->page_ids, sequence->page_ids, (size_t)view->page_count * sizeof *made->page_ids);
    memcpy(made->serials, sequence->serials, (size_t)made->serial_count * sizeof *made->serials);
    if (made->has_logits) {
        memcpy(made->logits, sequence->logits, (size_t)llmc_facts.vocabulary * sizeof *made->logits);
    }
    for (int64_t i = 0; i < view->page_count; i++) llmc_pages_share(&made->model->pages, made->page_ids[i]);
}

int llmc_fork(LlmcSequence *sequence, LlmcSequence **other) {
    llmc_no_error();
    if (other == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "there is no place for the sequence: it is NULL");
    *other = NULL;
    if (sequence == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the sequence is NULL");
    LlmcModel *model = sequence->model;
    pthread_mutex_lock(&model->lock);
    LlmcSequence *made = make_sequence(model, sequence->view.expected);
    if (made != NULL) copy_into(made, sequence);
    pthread_mutex_unlock(&model->lock);
    *other = made;
    return made != NULL ? LLMC_OK : llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for another sequence");
}

void llmc_end(LlmcSequence *sequence) {
    if (sequence == NULL) return;
    LlmcModel *model = sequence->model;
    pthread_mutex_lock(&model->lock);
    llmc_truncate(sequence, 0);
    if (sequence->before != NULL) sequence->before->after = sequence->after;
    if (sequence->after != NULL) sequence->after->before = sequence->before;
    if (model->sequences == sequence) model->sequences = sequence->after;
    pthread_mutex_unlock(&model->lock);
    llmc_give_back(sequence, sequence->memory_bytes);
}

int64_t llmc_length(const LlmcSequence *sequence) { return sequence == NULL ? 0 : sequence->view.length; }

float *llmc_logits(LlmcSequence *sequence) {
    return sequence != NULL && sequence->has_logits ? sequence->logits : NULL;
}

int llmc_rollback(LlmcSequence *sequence, int64_t count) {
    llmc_no_error();
    if (sequence == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the sequence is NULL");
    const int64_t length = sequence->view.length;
    if (count < 0 || count > length) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "rollback of %lld tokens of a sequence of %lld", (long long)count,
                         (long long)length);
    }
    pthread_mutex_lock(&sequence->model->lock);
    llmc_truncate(sequence, length - count);
    pthread_mutex_unlock(&sequence->model->lock);
    if (count > 0) sequence->has_logits = false;
    return LLMC_OK;
}

/* Takes over registered pages as long as they hold the tokens that come next; the lock is held. */
static void adopt_pages(LlmcSequence *sequence, const int32_t *ids, int64_t count) {
    LlmcSequenceView *view = &sequence->view;
    LlmcPages *pages = &sequence->model->pages;
    int64_t parent = llmc_root_of(sequence);
    for (; view->length + llmc_facts.page < count; view->length += llmc_facts.page) {
        const int32_t *tokens = ids + view->length, page = llmc_pages_find(pages, parent, tokens);
        if (page < 0) return;
        llmc_pages_share(pages, page);
        parent = pages->serials[page];
        sequence->page_ids[view->page_count++] = page;
        sequence->serials[sequence->serial_count++] = parent;
        memcpy(sequence->tokens + view->length, tokens, (size_t)llmc_facts.page * sizeof *tokens);
    }
}

int llmc_adopt(LlmcSequence *sequence, const int32_t *ids, int64_t count, int64_t *covered) {
    llmc_no_error();
    if (covered != NULL) *covered = 0;
    if (sequence == NULL || covered == NULL || count < 0 || (count > 0 && ids == NULL)) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "the sequence, ids or `covered` are NULL, or count is below 0");
    }
    if (sequence->view.length > 0) {
        return llmc_fail(LLMC_ERROR_STATE, "a sequence of %lld tokens adopts nothing: it has to be empty",
                         (long long)sequence->view.length);
    }
    if (count > llmc_most_tokens()) {
        return llmc_fail(LLMC_ERROR_CONTEXT, "%lld tokens are more than the context of %lld that the artifact was "
                         "compiled for", (long long)count, (long long)llmc_most_tokens());
    }
    sequence->view.regime = llmc_regime_of(sequence, count);
    if (!llmc_has_cache()) return LLMC_OK;
    pthread_mutex_lock(&sequence->model->lock);
    adopt_pages(sequence, ids, count);
    pthread_mutex_unlock(&sequence->model->lock);
    *covered = sequence->view.length;
    return LLMC_OK;
}
