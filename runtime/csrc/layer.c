/* The session layer over memory that Python has made; see layer.h. */
#include "layer.h"

#include <stddef.h>
#include <stdlib.h>

#include "model.h"

static int check_facts(const LlmcLayer *layer) {
    const LlmcFacts *facts = &llmc_facts;
    if (layer->bytes == (int64_t)sizeof *layer && layer->state == facts->state &&
        layer->vocabulary == facts->vocabulary && layer->max_context == facts->max_context &&
        layer->max_step == facts->max_step && layer->page == facts->page) {
        return LLMC_OK;
    }
    return llmc_fail(LLMC_ERROR_FILE, "the artifact's code was made for another manifest than it has: compile the model again");
}

int llmc_layer_open(const LlmcLayer *layer, LlmcModel **model) {
    llmc_no_error();
    *model = NULL;
    int code = check_facts(layer);
    if (code != LLMC_OK) return code;
    LlmcModel *made = calloc(1, sizeof *made);
    if (made == NULL) return llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for a model");
    pthread_mutex_init(&made->lock, NULL);
    made->hooks = &layer->hooks;
    made->step = layer->step;
    made->tables = layer->tables;
    made->logits = &layer->logits;
    code = llmc_make_places(made, layer->threads, llmc_facts.layer_count > 0 ? layer->step->cache_pages : 0);
    if (code == LLMC_OK) {
        *model = made;
    } else {
        llmc_close(made);
    }
    return code;
}

const LlmcPages *llmc_layer_pages(const LlmcModel *model) { return &model->pages; }

void llmc_layer_drop_kept(LlmcModel *model) { llmc_pages_drop_kept(&model->pages); }
