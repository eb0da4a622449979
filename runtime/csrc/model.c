/* Opening and closing a model: the memory that its steps work in. */
#include "model.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "choose.h"
#include "memory.h"
#include "pool.h"

enum {
    MOST_THREADS = 1024,
    ALIGNMENT = 64,
    CONTEXTS_BY_DEFAULT = 16, /* that the KV cache has room for */
    SHORT_TEXT = 8,           /* tokens: an encoder's cache has pages for a full step of texts of so many */
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t ceiling(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

static int no_memory(const char *what) {
    return llmc_fail(LLMC_ERROR_MEMORY, "there is no address space for %s: raise the limits of the process", what);
}

/* Bytes of a page in the buffer number `index`: keys of layer 0, values of layer 0, keys of layer 1, ... */
static int64_t buffer_bytes(int64_t index) {
    const LlmcLayerFacts *layer = &llmc_facts.layers[index / 2];
    const int64_t width = index % 2 ? layer->value_dim : layer->head_dim;
    return layer->kv_heads * width * llmc_facts.page * layer->element_bytes;
}

/* The process's workers: of this artifact, or of one that has lent it its pool. */
static int make_pool(void) {
    static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&making);
    LlmcPool *pool = llmc_take_turn(1);
    llmc_end_turn(pool);
    if (pool == NULL) pool = llmc_pool_create();
    pthread_mutex_unlock(&making);
    return pool != NULL ? LLMC_OK : llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for the pool of threads");
}

int llmc_make_places(LlmcModel *model, int64_t threads, int64_t pages) {
    const LlmcFacts *facts = &llmc_facts;
    const int64_t buffers = 2 * facts->layer_count;
    LlmcDivision *division = &model->division;
    *division = (LlmcDivision){.page = facts->page, .tile = facts->tile, .max_splits = facts->max_splits, .part = facts->part};
    division->kv_heads = facts->layer_count > 0 ? INT64_MAX : 1;
    for (int64_t i = 0; i < facts->layer_count; i++) {
        division->kv_heads = least(division->kv_heads, facts->layers[i].kv_heads);
    }
    division->threads = model->threads = threads;
    model->adapter_serials = calloc((size_t)facts->adapter_count + 1, sizeof *model->adapter_serials);
    if (model->adapter_serials == NULL) return no_memory("adapters");
    model->page_bytes = calloc((size_t)buffers + 1, sizeof *model->page_bytes);
    model->parts = calloc((size_t)facts->max_step, sizeof *model->parts);
    if (model->page_bytes == NULL || model->parts == NULL) return no_memory("a step");
    for (int64_t i = 0; i < buffers; i++) model->page_bytes[i] = buffer_bytes(i);
    if (!llmc_pages_open(&model->pages, pages, facts->page)) return no_memory("the KV cache");
    /* Encoders have no sequences whose pages would be counted: the list of free ones says the numbers of all of them. */
    for (int64_t i = 0; facts->task == LLMC_ENCODE && i < pages; i++) model->pages.free[i] = (int32_t)i;
    return LLMC_OK;
}

/* Pages of the cache: none where there is no cache, a step's where it is of one step. */
static int count_pages(const LlmcOptions *options, int64_t *pages) {
    const LlmcFacts *facts = &llmc_facts;
    int64_t page_bytes = 0;
    for (int64_t i = 0; i < 2 * facts->layer_count; i++) page_bytes += buffer_bytes(i);
    const int64_t context = ceiling(facts->max_context, facts->page), most = INT32_MAX / facts->page;
    *pages = 0;
    if (facts->layer_count == 0) return LLMC_OK;
    if (facts->state != LLMC_PAGED) {
        *pages = ceiling(facts->max_step, least(facts->page, SHORT_TEXT));
    } else if (options->cache_bytes == 0) {
        const int64_t free_bytes = (int64_t)sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);
        const int64_t affordable = free_bytes / 2 / page_bytes;
        *pages = least(greatest(context, least(CONTEXTS_BY_DEFAULT * context, affordable)), most);
    } else if (options->cache_bytes < page_bytes) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "cache_bytes of %lld hold no page of the KV cache, which has %lld bytes",
                         (long long)options->cache_bytes, (long long)page_bytes);
    } else {
        *pages = least(options->cache_bytes / page_bytes, most);
    }
    return LLMC_OK;
}

static int make_cache(LlmcModel *model, int64_t pages) {
    const int64_t buffers = 2 * llmc_facts.layer_count;
    void **cache = model->own.cache = calloc((size_t)buffers + 1, sizeof *cache);
    if (cache == NULL) return no_memory("the KV cache");
    for (int64_t i = 0; i < buffers; i++) {
        cache[i] = llmc_reserve(pages * buffer_bytes(i));
        if (cache[i] == NULL) return no_memory("the KV cache: lower LlmcOptions.cache_bytes");
    }
    model->step->cache = cache;
    model->step->cache_pages = pages;
    return LLMC_OK;
}

/* Tables for a whole step, one behind the other. */
static int make_tables(LlmcModel *model) {
    const LlmcFacts *facts = &llmc_facts;
    const int64_t tokens = facts->max_step, table = tokens * ceiling(facts->max_context, facts->page);
    LlmcTables *tables = &model->tables;
    const struct {
        int32_t **place;
        int64_t numbers;
    } parts[] = {
        {&tables->ids, tokens},       {&tables->positions, tokens},  {&tables->slots, tokens},
        {&tables->lengths, tokens},   {&tables->rows, tokens},       {&tables->tiles, 4 * tokens},
        {&tables->starts, tokens + 1}, {&tables->block_table, table}, {&tables->token_types, tokens},
        {&tables->adapters, tokens},
    };
    const size_t count = sizeof parts / sizeof *parts;
    for (size_t i = 0; i < count; i++) {
        model->own.table_bytes += ceiling(parts[i].numbers * (int64_t)sizeof(int32_t), ALIGNMENT) * ALIGNMENT;
    }
    char *memory = model->own.table_memory = llmc_reserve(model->own.table_bytes);
    if (memory == NULL) return no_memory("the tables of a step");
    for (size_t i = 0; i < count; i++) {
        *parts[i].place = (int32_t *)(void *)memory;
        memory += ceiling(parts[i].numbers * (int64_t)sizeof(int32_t), ALIGNMENT) * ALIGNMENT;
    }
    LlmcStep *step = model->step;
    step->ids = tables->ids, step->positions = tables->positions, step->slots = tables->slots;
    step->tiles = tables->tiles, step->block_table = tables->block_table, step->rows = tables->rows;
    step->starts = tables->starts, step->lengths = tables->lengths, step->token_types = tables->token_types;
    step->adapters = tables->adapters;
    return LLMC_OK;
}

/* Tables of adapters, which take memory only as they are filled. */
static int make_adapters(LlmcModel *model) {
    const int64_t count = 3 * llmc_facts.adapter_table_count;
    void **tables = model->own.adapter_tables = calloc((size_t)count + 1, sizeof *tables);
    if (tables == NULL) return no_memory("adapters");
    for (int64_t i = 0; i < count; i++) {
        tables[i] = llmc_reserve(llmc_adapter_table_bytes(i));
        if (tables[i] == NULL) return no_memory("adapters");
    }
    model->step->adapter_tables = tables;
    return LLMC_OK;
}

static int make_logits(LlmcModel *model) {
    const LlmcFacts *facts = &llmc_facts;
    LlmcOwn *own = &model->own;
    own->logits_bytes = facts->max_step * facts->vocabulary * (int64_t)sizeof(float);
    own->scratch_bytes = llmc_choose_bytes(facts->vocabulary);
    own->logits = llmc_reserve(own->logits_bytes);
    model->logits = &own->logits;
    own->scratch = llmc_reserve_huge(own->scratch_bytes);
    own->seen = llmc_reserve(facts->vocabulary * (int64_t)sizeof *own->seen);
    own->known = llmc_reserve(facts->vocabulary);
    const bool fine = own->logits != NULL && own->scratch != NULL && own->seen != NULL && own->known != NULL;
    return fine ? LLMC_OK : no_memory("logits");
}

/* Bytes of a number, by numpy's name of its dtype. */
static int64_t number_bytes(const char *dtype) {
    const char *end = dtype + strlen(dtype);
    const char *digit = end;
    while (digit > dtype && digit[-1] >= '0' && digit[-1] <= '9') digit--;
    return digit == end ? 1 : atoi(digit) / 8; /* bool has no number */
}

static int make_outputs(LlmcModel *model) {
    const LlmcFacts *facts = &llmc_facts;
    model->own.outputs = calloc((size_t)facts->output_count + 1, sizeof *model->own.outputs);
    model->own.output_bytes = calloc((size_t)facts->output_count + 1, sizeof *model->own.output_bytes);
    if (model->own.outputs == NULL || model->own.output_bytes == NULL) return no_memory("outputs");
    for (int64_t i = 0; i < facts->output_count; i++) {
        const LlmcOutputFacts *output = &facts->outputs[i];
        if (output->per == LLMC_PER_OTHER) {
            return llmc_fail(LLMC_ERROR_UNSUPPORTED, "the output %s has no row a token or text: use it from Python",
                             output->name);
        }
        const int64_t rows = output->per == LLMC_PER_CALL ? 1 : facts->max_step;
        model->own.output_bytes[i] = rows * output->elements * number_bytes(output->dtype);
        model->own.outputs[i] = llmc_reserve(model->own.output_bytes[i]);
        if (model->own.outputs[i] == NULL) return no_memory("outputs");
    }
    model->step->outputs = model->own.outputs;
    return LLMC_OK;
}

static int check_options(const LlmcOptions *options) {
    if (options->threads < 0 || options->threads > MOST_THREADS) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "threads is %lld: it has to be from 1 to %d, or 0 for the default",
                         (long long)options->threads, MOST_THREADS);
    }
    if (options->cache_bytes < 0 || options->copy_weights < 0 || options->copy_weights > 1) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "cache_bytes is below 0, or copy_weights neither 0 nor 1");
    }
    return LLMC_OK;
}

static int fill_model(LlmcModel *model, const char *path, const LlmcOptions *options) {
    const LlmcFacts *facts = &llmc_facts;
    const int64_t threads = least(options->threads > 0 ? options->threads : llmc_usable_cpus(), MOST_THREADS);
    int64_t pages = 0;
    LlmcStep *step = model->step = &model->own.step;
    int code = llmc_open_weights(path, options->weights, options->copy_weights != 0, &model->own.weights, &step->weights);
    if (code != LLMC_OK) return code;
    step->arena_bytes = facts->arena_bytes;
    step->arena = llmc_reserve_huge(facts->arena_bytes);
    if (step->arena == NULL) return no_memory("a step");
    code = make_tables(model);
    if (code == LLMC_OK) code = make_adapters(model);
    if (code == LLMC_OK) code = count_pages(options, &pages);
    if (code == LLMC_OK) code = make_cache(model, pages);
    if (code == LLMC_OK) code = llmc_make_places(model, threads, pages);
    if (code == LLMC_OK) code = facts->task == LLMC_GENERATE ? make_logits(model) : make_outputs(model);
    if (code == LLMC_OK) code = make_pool();
    return code;
}

int llmc_open(const char *path, const LlmcOptions *options, LlmcModel **model) {
    LlmcOptions given;
    llmc_no_error();
    if (model == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "there is no place for the model: `model` is NULL");
    *model = NULL;
    int code = llmc_read_struct(&given, sizeof given, options, "LlmcOptions");
    if (code == LLMC_OK) code = check_options(&given);
    if (code != LLMC_OK) return code;
    if (llmc_facts.task == LLMC_RUN) {
        return llmc_fail(LLMC_ERROR_UNSUPPORTED, "this artifact takes arrays: use it from Python");
    }
    code = llmc_check_machine();
    if (code != LLMC_OK) return code;
    LlmcModel *made = calloc(1, sizeof *made);
    if (made == NULL) return llmc_fail(LLMC_ERROR_MEMORY, "there is no memory for a model");
    pthread_mutex_init(&made->lock, NULL);
    code = fill_model(made, path, &given);
    if (code == LLMC_OK) {
        *model = made;
    } else {
        llmc_close(made);
    }
    return code;
}

void llmc_close(LlmcModel *model) {
    if (model == NULL) return;
    const LlmcFacts *facts = &llmc_facts;
    LlmcOwn *own = &model->own;
    while (model->sequences != NULL) llmc_end(model->sequences);
    llmc_give_back(own->weights.memory, own->weights.bytes);
    llmc_give_back(own->step.arena, own->step.arena_bytes);
    llmc_give_back(own->table_memory, own->table_bytes);
    for (int64_t i = 0; own->cache != NULL && i < 2 * facts->layer_count; i++) {
        llmc_give_back(own->cache[i], own->step.cache_pages * buffer_bytes(i));
    }
    for (int64_t i = 0; own->outputs != NULL && i < facts->output_count; i++) {
        llmc_give_back(own->outputs[i], own->output_bytes[i]);
    }
    for (int64_t i = 0; own->adapter_tables != NULL && i < 3 * facts->adapter_table_count; i++) {
        llmc_give_back(own->adapter_tables[i], llmc_adapter_table_bytes(i));
    }
    llmc_pages_close(&model->pages);
    llmc_give_back(own->logits, own->logits_bytes);
    llmc_give_back(own->scratch, own->scratch_bytes);
    llmc_give_back(own->seen, facts->vocabulary * (int64_t)sizeof *own->seen);
    llmc_give_back(own->known, facts->vocabulary);
    free(model->parts);
    free(model->page_bytes);
    free(model->adapter_serials);
    free(own->adapter_tables);
    free(own->cache);
    free(own->outputs);
    free(own->output_bytes);
    pthread_mutex_destroy(&model->lock);
    free(model);
}

int llmc_run_parts(LlmcModel *model, int64_t parts, float *logits) {
    const LlmcHooks *hooks = model->hooks;
    llmc_fill_step(model->step, &model->tables, &model->division, model->parts, parts);
    model->step->logits = logits;
    const bool is_hooked = hooks != NULL && hooks->run != NULL;
    const int wrong = is_hooked ? hooks->run(model->step, model->threads) : llmc_run(model->step, model->threads);
    if (wrong == 0) return LLMC_OK;
    if (wrong > 0 && wrong <= llmc_facts.failure_count) {
        return llmc_fail(LLMC_ERROR_STEP, "%s", llmc_facts.failures[wrong - 1]);
    }
    return llmc_fail(LLMC_ERROR_STEP, "the artifact's step failed with code %d", wrong);
}

int64_t llmc_choose_token(const LlmcModel *model, const LlmcChoice *choice) {
    const LlmcHooks *hooks = model->hooks;
    if (hooks != NULL && hooks->choose != NULL) return hooks->choose(choice, model->threads);
    return llmc_choose(choice, model->threads);
}
