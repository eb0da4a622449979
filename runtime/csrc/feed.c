/* Feeding sequences: making room for tokens, running them in steps, and committing what has run. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

static int no_page(const LlmcModel *model) {
    return llmc_fail(LLMC_ERROR_FULL, "the KV cache is full: all %lld pages are in use. End sequences, or open the model "
                     "with more cache_bytes", (long long)model->pages.capacity);
}

/* Copies a page in all layers. */
static int copy_page(const LlmcModel *model, int32_t from, int32_t to) {
    if (model->hooks != NULL && model->hooks->copy_page != NULL) {
        if (model->hooks->copy_page(from, to) == 0) return LLMC_OK;
        return llmc_fail(LLMC_ERROR_STEP, "a page of the KV cache could not be copied");
    }
    for (int64_t i = 0; i < 2 * llmc_facts.layer_count; i++) {
        char *buffer = model->step->cache[i];
        const int64_t bytes = model->page_bytes[i];
        memcpy(buffer + to * bytes, buffer + from * bytes, (size_t)bytes);
    }
    return LLMC_OK;
}

/* Makes pages for `end` tokens, and the one that the next token goes to this sequence's own, and unknown to others. */
static int add_pages(LlmcSequence *sequence, int64_t end) {
    LlmcModel *model = sequence->model;
    LlmcPages *pages = &model->pages;
    LlmcSequenceView *view = &sequence->view;
    if (view->length % llmc_facts.page) {
        int32_t *last = &sequence->page_ids[view->length / llmc_facts.page];
        if (pages->users[*last] > 1) {
            const int32_t own = llmc_pages_take(pages);
            if (own < 0) return no_page(model);
            const int code = copy_page(model, *last, own);
            llmc_pages_release(pages, code == LLMC_OK ? *last : own);
            if (code != LLMC_OK) return code;
            *last = own;
        } else {
            llmc_pages_forget(pages, *last);
        }
    }
    while (view->page_count * llmc_facts.page < end) {
        const int32_t page = llmc_pages_take(pages);
        if (page < 0) return no_page(model);
        sequence->page_ids[view->page_count++] = page;
    }
    return LLMC_OK;
}

/* Gives up the pages that `others` has and this sequence does not. */
static void release_replaced(LlmcPages *pages, const int32_t *others, int64_t count, const int32_t *kept,
                             int64_t kept_count) {
    for (int64_t i = count - 1; i >= 0; i--) {
        if (i >= kept_count || others[i] != kept[i]) llmc_pages_release(pages, others[i]);
    }
}

/* Makes a sequence an empty one of another regime, whose tokens all have to run again: over its own pages, and others in
 * place of those that it shares. */
static int begin_anew(LlmcSequence *sequence, int64_t regime) {
    LlmcSequenceView *view = &sequence->view;
    LlmcPages *pages = &sequence->model->pages;
    LlmcBefore *before = &sequence->before_anew;
    *before = (LlmcBefore){.is_set = true, .length = view->length, .page_count = view->page_count,
                           .regime = view->regime, .serial_count = sequence->serial_count,
                           .page_ids = before->page_ids};
    memcpy(before->page_ids, sequence->page_ids, (size_t)view->page_count * sizeof *before->page_ids);
    for (int64_t i = 0; i < view->page_count; i++) {
        if (pages->users[sequence->page_ids[i]] == 1) continue;
        const int32_t own = llmc_pages_take(pages);
        if (own < 0) return no_page(sequence->model);
        sequence->page_ids[i] = own;
    }
    for (int64_t i = 0; i < view->page_count; i++) llmc_pages_forget(pages, sequence->page_ids[i]);
    view->length = 0;
    view->regime = regime;
    sequence->serial_count = 0;
    return LLMC_OK;
}

/* Undoes what was prepared and has not begun to run. */
static void abandon(LlmcSequence *sequence) {
    LlmcSequenceView *view = &sequence->view;
    LlmcBefore *before = &sequence->before_anew;
    if (before->is_set) {
        release_replaced(&sequence->model->pages, sequence->page_ids, view->page_count, before->page_ids,
                         before->page_count);
        memcpy(sequence->page_ids, before->page_ids, (size_t)before->page_count * sizeof *before->page_ids);
        view->page_count = before->page_count;
        view->length = before->length;
        view->regime = before->regime;
        sequence->serial_count = before->serial_count;
        before->is_set = false;
    }
    llmc_truncate(sequence, view->length);
    sequence->pending = 0;
}

/* A step that computes a sequence anew has begun: what its pages held before is gone. */
static void leave_behind(LlmcSequence *sequence) {
    LlmcBefore *before = &sequence->before_anew;
    if (!before->is_set) return;
    release_replaced(&sequence->model->pages, before->page_ids, before->page_count, sequence->page_ids,
                     sequence->view.page_count);
    before->is_set = false;
}

/* `count` tokens that were pending are in the cache now. */
static void commit(LlmcSequence *sequence, int64_t count) {
    LlmcSequenceView *view = &sequence->view;
    LlmcPages *pages = &sequence->model->pages;
    view->length += count;
    view->reading = 0;
    sequence->pending -= count;
    if (!llmc_has_cache()) return;
    while ((sequence->serial_count + 1) * llmc_facts.page <= view->length) {
        const int64_t index = sequence->serial_count, parent = index ? sequence->serials[index - 1] : llmc_root_of(sequence);
        sequence->serials[index] = llmc_pages_register(pages, sequence->page_ids[index], parent,
                                                       sequence->tokens + index * llmc_facts.page);
        sequence->serial_count++;
    }
}

/* Whether these tokens may come behind those of the sequence. */
static int check_request(const LlmcModel *model, const LlmcRequest *request) {
    const LlmcSequence *sequence = request->sequence;
    if (sequence == NULL || request->ids == NULL) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "a sequence or its ids are NULL");
    }
    if (request->count < 1) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "%lld token ids: feed at least one", (long long)request->count);
    }
    const int64_t most = llmc_most_tokens(), length = sequence->view.length;
    if (request->count > most - length) {
        return llmc_fail(LLMC_ERROR_CONTEXT,
                         "%lld more tokens than the %lld there are make more than the context of %lld that the artifact "
                         "was compiled for", (long long)request->count, (long long)length, (long long)most);
    }
    for (int64_t i = 0; i < request->count; i++) {
        const int32_t id = request->ids[i];
        if (id >= 0 && id < llmc_facts.vocabulary) continue;
        return llmc_fail(LLMC_ERROR_ARGUMENT, "token id %ld is not in the vocabulary of %lld", (long)id,
                         (long long)llmc_facts.vocabulary);
    }
    if (sequence->model != model) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "sequences of several models cannot share a step");
    }
    if (sequence->pending > 0) return llmc_fail(LLMC_ERROR_ARGUMENT, "a sequence is there twice");
    return LLMC_OK;
}

/* Makes a sequence ready for the tokens of a request, which was checked. */
static int prepare(const LlmcRequest *request) {
    LlmcSequence *sequence = request->sequence;
    LlmcSequenceView *view = &sequence->view;
    const int64_t begin = view->length, end = begin + request->count, regime = llmc_regime_of(sequence, end);
    memcpy(sequence->tokens + begin, request->ids, (size_t)request->count * sizeof *request->ids);
    if (llmc_has_cache() && begin > 0 && regime != view->regime) {
        const int code = begin_anew(sequence, regime);
        if (code != LLMC_OK) return code;
    }
    view->regime = regime;
    sequence->fed_from = begin;
    sequence->wanted = begin + request->first_row;
    sequence->is_decoding = llmc_has_cache() && view->length > 0 && request->count == 1 && !view->reading;
    sequence->pending = end - view->length;
    return llmc_has_cache() ? add_pages(sequence, end) : LLMC_OK;
}

int llmc_feed_begin(LlmcModel *model, const LlmcRequest *requests, int64_t number) {
    int code = LLMC_OK;
    int64_t checked = 0;
    if (number < 1) return llmc_fail(LLMC_ERROR_ARGUMENT, "there are no sequences to feed");
    while (code == LLMC_OK && checked < number) {
        code = check_request(model, &requests[checked]);
        if (code == LLMC_OK) requests[checked++].sequence->pending = 1; /* so that a second time is noticed */
    }
    for (int64_t i = 0; code == LLMC_OK && i < number; i++) code = prepare(&requests[i]);
    model->feed = (LlmcFeed){.requests = requests, .number = checked};
    if (code != LLMC_OK) llmc_feed_end(model);
    return code;
}

int64_t llmc_feed_left(const LlmcModel *model) { return model->feed.number - model->feed.next; }

void llmc_feed_end(LlmcModel *model) {
    const LlmcFeed *feed = &model->feed;
    for (int64_t i = feed->next; i < feed->number; i++) abandon(feed->requests[i].sequence);
    model->feed = (LlmcFeed){0};
}

/* The parts of the next step, of at most max_step tokens, and of one kind where the two kinds of tokens are computed
 * differently; returns how many. They are of the next requests, one each. Without a cache a step has all tokens of one
 * sequence. */
static int64_t gather_parts(LlmcModel *model) {
    const LlmcFeed *feed = &model->feed;
    int64_t parts = 0, room = llmc_facts.max_step;
    while (feed->next + parts < feed->number && room > 0 && (parts == 0 || llmc_has_cache())) {
        const LlmcSequence *sequence = feed->requests[feed->next + parts].sequence;
        const LlmcSequenceView *view = &sequence->view;
        if (parts > 0 && llmc_facts.row_kinds && model->parts[0].decoding != sequence->is_decoding) break;
        const int64_t begin = llmc_has_cache() ? view->length : 0, left = view->length + sequence->pending - begin;
        const int64_t count = left < room ? left : room, rows_before = sequence->wanted - begin;
        model->parts[parts++] = (LlmcPart){
            .ids = sequence->tokens + begin,
            .pages = sequence->page_ids,
            .page_count = view->page_count,
            .count = count,
            .start = begin,
            .first_row = rows_before < 0 ? 0 : rows_before < count ? rows_before : count,
            .length = llmc_length_in(view->regime),
            .adapter = view->adapter,
            .decoding = sequence->is_decoding,
        };
        room -= count;
    }
    return parts;
}

int llmc_feed_step(LlmcModel *model, float *logits, int64_t *rows) {
    LlmcFeed *feed = &model->feed;
    const int64_t parts = gather_parts(model);
    for (int64_t i = 0; i < parts; i++) leave_behind(feed->requests[feed->next + i].sequence);
    const int code = llmc_run_parts(model, parts, logits != NULL ? logits : *model->logits);
    *rows = code == LLMC_OK ? model->step->sizes[LLMC_ROWS] : 0;
    if (code != LLMC_OK) return code;
    for (int64_t i = 0; i < parts; i++) {
        LlmcSequence *sequence = feed->requests[feed->next].sequence;
        const int64_t end = model->parts[i].start + model->parts[i].count;
        commit(sequence, end - sequence->view.length);
        if (sequence->pending == 0) feed->next++;
    }
    return LLMC_OK;
}

/* All steps of a feed of requests that each want the last row: their sequences have these logits then. */
static int run_all(LlmcModel *model) {
    const LlmcFeed *feed = &model->feed;
    const size_t bytes = (size_t)llmc_facts.vocabulary * sizeof(float);
    while (llmc_feed_left(model) > 0) {
        const int64_t first = feed->next;
        int64_t rows;
        /* Rows of one sequence are written where they stay: a step of one request, or of the last one. */
        LlmcSequence *next = feed->requests[first].sequence;
        const int code = llmc_feed_step(model, llmc_feed_left(model) == 1 ? next->logits : NULL, &rows);
        if (code != LLMC_OK) return code;
        for (int64_t i = 0; i < rows; i++) {
            LlmcSequence *sequence = feed->requests[first + i].sequence;
            if (model->step->logits != sequence->logits) {
                memcpy(sequence->logits, *model->logits + i * llmc_facts.vocabulary, bytes);
            }
            sequence->has_logits = true;
        }
    }
    return LLMC_OK;
}

/* `llmc_feed_all` with room for the requests; the lock is held. */
static int feed_requests(LlmcModel *model, LlmcRequest *requests, LlmcSequence *const *sequences,
                         const int32_t *const *ids, const int64_t *counts, int64_t number) {
    for (int64_t i = 0; i < number; i++) requests[i] = (LlmcRequest){sequences[i], ids[i], counts[i], counts[i] - 1};
    int code = llmc_feed_begin(model, requests, number);
    if (code != LLMC_OK) return code;
    code = run_all(model);
    llmc_feed_end(model);
    /* What has run before an error is given up, where the tokens before it are there still. */
    for (int64_t i = 0; code != LLMC_OK && i < number; i++) {
        LlmcSequence *sequence = sequences[i];
        sequence->has_logits = false;
        if (sequence->view.length > sequence->fed_from) llmc_truncate(sequence, sequence->fed_from);
    }
    return code;
}

int llmc_feed_all(LlmcSequence *const *sequences, const int32_t *const *ids, const int64_t *counts, int64_t number) {
    llmc_no_error();
    if (sequences == NULL || ids == NULL || counts == NULL || number < 1 || sequences[0] == NULL) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "sequences, ids or counts are NULL, or there are none");
    }
    LlmcModel *model = sequences[0]->model;
    LlmcRequest one, *requests = number == 1 ? &one : calloc((size_t)number, sizeof *requests);
    if (requests == NULL) return llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for %lld requests", (long long)number);
    pthread_mutex_lock(&model->lock);
    const int code = feed_requests(model, requests, sequences, ids, counts, number);
    pthread_mutex_unlock(&model->lock);
    if (requests != &one) free(requests);
    return code;
}

int llmc_feed(LlmcSequence *sequence, const int32_t *ids, int64_t count) {
    return llmc_feed_all(&sequence, &ids, &count, 1);
}
