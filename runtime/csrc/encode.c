/* Encoding texts: whole sequences side by side, in as few steps as they fit into. */
#include <stddef.h>
#include <string.h>

#include "model.h"

/* Where the next text is: its number, where its tokens begin in `ids`, and where its rows go. */
typedef struct Place {
    int64_t text, token;
    float *rows;
} Place;

static int64_t pages_of(int64_t count) { return (count + llmc_facts.page - 1) / llmc_facts.page; }

static const LlmcOutputFacts *output_facts(void) { return &llmc_facts.outputs[llmc_facts.encoder_output]; }

static int check_kind(void) {
    if (llmc_facts.task != LLMC_ENCODE) {
        return llmc_fail(LLMC_ERROR_UNSUPPORTED, "this artifact continues texts: it has sequences, and no `encode`");
    }
    if (llmc_facts.encoder_output < 0) {
        return llmc_fail(LLMC_ERROR_UNSUPPORTED, "what this encoder's outputs mean is not known: use it from Python");
    }
    const LlmcOutputFacts *output = output_facts();
    const bool is_same_for_all = output->per == LLMC_PER_CALL && llmc_facts.state != LLMC_STATELESS;
    if (strcmp(output->dtype, "float32") != 0 || is_same_for_all) {
        return llmc_fail(LLMC_ERROR_UNSUPPORTED, "the output %s is not rows of float32: use it from Python",
                         output->name);
    }
    return LLMC_OK;
}

static int check_texts(const int32_t *ids, const int64_t *counts, int64_t number) {
    int64_t token = 0;
    for (int64_t i = 0; i < number; i++) {
        if (counts[i] < 1) return llmc_fail(LLMC_ERROR_ARGUMENT, "text %lld has no tokens", (long long)i);
        if (counts[i] > llmc_facts.max_tokens) {
            return llmc_fail(LLMC_ERROR_CONTEXT, "text %lld has %lld tokens; the model takes %lld at most",
                             (long long)i, (long long)counts[i], (long long)llmc_facts.max_tokens);
        }
        for (const int64_t end = token + counts[i]; token < end; token++) {
            if (ids[token] >= 0 && ids[token] < llmc_facts.vocabulary) continue;
            return llmc_fail(LLMC_ERROR_ARGUMENT, "token id %ld of text %lld is not in the vocabulary of %lld",
                             (long)ids[token], (long long)i, (long long)llmc_facts.vocabulary);
        }
    }
    return LLMC_OK;
}

int64_t llmc_encode_fitting(const LlmcModel *model, const int64_t *counts, int64_t number) {
    const bool is_cached = llmc_facts.layer_count > 0;
    int64_t texts = 0, tokens = 0, pages = 0;
    while (texts < number) {
        tokens += counts[texts];
        pages += is_cached ? pages_of(counts[texts]) : 0;
        const bool fits = tokens <= llmc_facts.max_step && pages <= model->pages.capacity;
        if (texts > 0 && (!fits || llmc_facts.state == LLMC_STATELESS)) break;
        texts++;
    }
    return texts;
}

int llmc_encode_step(LlmcModel *model, const int32_t *ids, const int32_t *types, const int64_t *counts, int64_t number) {
    const bool is_cached = llmc_facts.layer_count > 0;
    int64_t tokens = 0, pages = 0;
    for (int64_t i = 0; i < number; i++) {
        const int64_t count = counts[i], needed = is_cached ? pages_of(count) : 0;
        if (tokens + count > llmc_facts.max_step || pages + needed > model->pages.capacity) {
            return llmc_fail(LLMC_ERROR_CONTEXT, "%lld texts are more than a step takes", (long long)number);
        }
        model->parts[i] = (LlmcPart){
            .ids = ids + tokens,
            .pages = model->pages.free + pages, /* which says page numbers from 0 on: see `llmc_make_places` */
            .page_count = needed,
            .count = count,
            .length = count,
        };
        tokens += count;
        pages += needed;
    }
    int32_t *token_types = model->tables.token_types;
    for (int64_t t = 0; t < tokens; t++) token_types[t] = types != NULL ? types[t] : 0;
    return llmc_run_parts(model, number, NULL);
}

/* Copies the rows of a step to where they belong, and moves on. */
static void take_rows(LlmcModel *model, int64_t texts, Place *place) {
    const LlmcOutputFacts *output = output_facts();
    const int64_t tokens = model->step->sizes[LLMC_TOKENS];
    const int64_t rows = output->per == LLMC_PER_TOKEN ? tokens : texts;
    memcpy(place->rows, model->own.outputs[llmc_facts.encoder_output],
           (size_t)(rows * output->elements) * sizeof *place->rows);
    place->rows += rows * output->elements;
    place->text += texts;
    place->token += tokens;
}

int llmc_encode(LlmcModel *model, const int32_t *ids, const int64_t *counts, int64_t number, float *rows) {
    llmc_no_error();
    if (model == NULL || number < 0 || (number > 0 && (ids == NULL || counts == NULL || rows == NULL))) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "the model, ids, counts or rows are NULL, or number is below 0");
    }
    int code = check_kind();
    if (code == LLMC_OK) code = check_texts(ids, counts, number);
    if (code != LLMC_OK) return code;
    pthread_mutex_lock(&model->lock);
    Place place = {0, 0, rows};
    while (code == LLMC_OK && place.text < number) {
        const int64_t texts = llmc_encode_fitting(model, counts + place.text, number - place.text);
        code = llmc_encode_step(model, ids + place.token, NULL, counts + place.text, texts);
        if (code == LLMC_OK) take_rows(model, texts, &place);
    }
    pthread_mutex_unlock(&model->lock);
    return code;
}
