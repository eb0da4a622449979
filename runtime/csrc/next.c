/* The next token of a sequence, by its logits. */
#include <stddef.h>

#include "choose.h"
#include "model.h"

/* SplitMix64, as llmc.h has it: a number from [0, 1). */
static double draw(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    z ^= z >> 31;
    return (double)(z >> 11) * 0x1p-53;
}

/* Collects the ids that a sequence has, each once, in the model's `seen`; returns how many. */
static int64_t collect_seen(LlmcModel *model, const LlmcSequence *sequence) {
    int64_t count = 0;
    for (int64_t i = 0; i < sequence->view.length; i++) {
        const int32_t id = sequence->tokens[i];
        if (model->own.known[id]) continue;
        model->own.known[id] = 1;
        model->own.seen[count++] = id;
    }
    for (int64_t i = 0; i < count; i++) model->own.known[model->own.seen[i]] = 0;
    return count;
}

/* Chooses; the lock is held. */
static int64_t choose(LlmcSequence *sequence, const LlmcSampling *sampling) {
    LlmcModel *model = sequence->model;
    LlmcChoice choice = {
        .logits = sequence->logits,
        .scratch = model->own.scratch,
        .count = llmc_facts.vocabulary,
        .top_k = sampling->top_k,
        .penalty = sampling->repetition_penalty == 0 ? 1 : sampling->repetition_penalty,
        .temperature = sampling->temperature,
        .top_p = sampling->top_p == 0 ? 1 : sampling->top_p,
        .min_p = sampling->min_p,
    };
    if (choice.penalty != 1) {
        choice.seen = model->own.seen;
        choice.seen_count = collect_seen(model, sequence);
    }
    uint64_t state = sampling->random == NULL ? 0 : *sampling->random;
    if (choice.temperature != 0) choice.uniform = draw(&state);
    const int64_t token = llmc_choose_token(model, &choice);
    if (token >= 0 && choice.temperature != 0) *sampling->random = state;
    return token;
}

int llmc_next(LlmcSequence *sequence, const LlmcSampling *sampling, int32_t *token) {
    LlmcSampling given;
    llmc_no_error();
    if (sequence == NULL || token == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the sequence or `token` is NULL");
    const int code = llmc_read_struct(&given, sizeof given, sampling, "LlmcSampling");
    if (code != LLMC_OK) return code;
    if (!sequence->has_logits) {
        return llmc_fail(LLMC_ERROR_STATE, "there are no logits: feed the sequence at least one token");
    }
    if (given.temperature != 0 && given.random == NULL) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "a temperature other than 0 needs a random state: `random` is NULL");
    }
    pthread_mutex_lock(&sequence->model->lock);
    const int64_t chosen = choose(sequence, &given);
    pthread_mutex_unlock(&sequence->model->lock);
    if (chosen == LLMC_NO_CHOICE) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "an option of LlmcSampling is out of range");
    }
    if (chosen < 0) {
        return llmc_fail(LLMC_ERROR_NUMBERS, "the logits are not finite: the model, its input or the penalty is broken");
    }
    *token = (int32_t)chosen;
    return LLMC_OK;
}
