/* Writing texts: rounds of one token each, in which the last token is fed and the next one chosen. */
#define _GNU_SOURCE
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

#include "model.h"

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Whether the largest of the model's own logits is a number: none is NaN, and one is finite. */
static bool is_finite_row(const float *logits) {
    float largest = -INFINITY;
    for (int64_t i = 0; i < llmc_facts.vocabulary; i++) {
        if (isnan(logits[i])) return false;
        if (logits[i] > largest) largest = logits[i];
    }
    return isfinite(largest);
}

static bool is_stop(const LlmcText *text, int32_t token) {
    for (int64_t i = 0; i < text->stop_count; i++) {
        if (text->stops[i] == token) return true;
    }
    return false;
}

/* The penalty of later tokens is for this one, too. */
static void take_up(const LlmcText *text, int32_t token) {
    if (text->known == NULL || text->known[token]) return;
    text->known[token] = 1;
    text->seen[text->choice->seen_count++] = token;
}

/* Chooses the next token of a text; whether it goes on. */
static bool choose_next(const LlmcModel *model, LlmcText *text, float *logits) {
    LlmcChoice *choice = text->choice;
    choice->logits = logits;
    if (text->uniforms != NULL) choice->uniform = text->uniforms[text->count];
    const int64_t token = llmc_choose_token(model, choice);
    if (token < 0) {
        const LlmcHooks *hooks = model->hooks;
        const float *row = hooks != NULL && hooks->fetch != NULL ? hooks->fetch(logits) : logits;
        const bool is_broken = token == LLMC_NO_TOKEN && row != NULL && !is_finite_row(row);
        text->end = is_broken ? LLMC_TEXT_NOT_FINITE : LLMC_TEXT_NO_CHOICE;
        return false;
    }
    text->tokens[text->count++] = (int32_t)token;
    if (is_stop(text, (int32_t)token)) {
        text->end = LLMC_TEXT_STOPPED;
        return false;
    }
    take_up(text, (int32_t)token);
    if (text->count == text->most) text->end = LLMC_TEXT_FULL;
    return text->end == LLMC_TEXT_GOES_ON;
}

/* One round; going: whether all texts go on after it. */
static int write_round(LlmcModel *model, LlmcText *texts, LlmcRequest *requests, int64_t number, bool *going) {
    for (int64_t i = 0; i < number; i++) {
        requests[i] = (LlmcRequest){texts[i].sequence, &texts[i].tokens[texts[i].count - 1], 1, 0};
    }
    int code = llmc_feed_begin(model, requests, number);
    if (code != LLMC_OK) return code;
    while (code == LLMC_OK && llmc_feed_left(model) > 0) {
        LlmcText *text = &texts[model->feed.next]; /* rows are those of the requests that a step finishes, in order */
        int64_t rows;
        code = llmc_feed_step(model, NULL, &rows);
        for (int64_t i = 0; i < rows; i++) {
            *going &= choose_next(model, &text[i], *model->logits + i * llmc_facts.vocabulary);
        }
    }
    llmc_feed_end(model);
    return code;
}

static int check_texts(const LlmcText *texts, int64_t number) {
    for (int64_t i = 0; i < number; i++) {
        const LlmcText *text = &texts[i];
        if (text->choice == NULL || text->tokens == NULL || text->count < 1 || text->count >= text->most ||
            (text->known != NULL && text->seen == NULL)) {
            return llmc_fail(LLMC_ERROR_ARGUMENT, "text %lld has no choice, no tokens or no room", (long long)i);
        }
    }
    return LLMC_OK;
}

int llmc_write(LlmcModel *model, LlmcWriting *writing) {
    const int64_t number = writing->number;
    LlmcRequest one, *requests = number == 1 ? &one : calloc((size_t)number + 1, sizeof *requests);
    llmc_no_error();
    writing->rounds = 0;
    if (requests == NULL) return llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for %lld requests", (long long)number);
    int code = check_texts(writing->texts, number);
    for (int64_t i = 0; code == LLMC_OK && i < number; i++) writing->texts[i].end = LLMC_TEXT_GOES_ON;
    bool going = true;
    while (code == LLMC_OK && going) {
        code = write_round(model, writing->texts, requests, number, &going);
        if (code != LLMC_OK) break;
        const int64_t time = now();
        if (writing->times != NULL) writing->times[writing->rounds] = time;
        writing->rounds++;
        going &= time < writing->deadline;
    }
    if (requests != &one) free(requests);
    return code;
}
