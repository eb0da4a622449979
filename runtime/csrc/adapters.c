/* Adapters: tables that sequences are computed with, by number. */
#include <stddef.h>
#include <string.h>

#include "model.h"

enum { TABLES = 3 }; /* of a linear op: a, b and ranks */

int64_t llmc_adapter_table_bytes(int64_t index) {
    const LlmcAdapterFacts *op = &llmc_facts.adapter_tables[index / TABLES];
    const int64_t entries = llmc_facts.adapter_count + 1, rank = llmc_facts.adapter_rank;
    const int64_t numbers[TABLES] = {op->parts * rank * op->inputs, rank * op->outputs, op->parts};
    return entries * numbers[index % TABLES] * 4;
}

static int check_number(const LlmcModel *model, int64_t number, int64_t least) {
    if (model == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the model is NULL");
    if (llmc_facts.adapter_count == 0 && number != 0) {
        return llmc_fail(LLMC_ERROR_UNSUPPORTED, "this artifact has no room for adapters: compile it with --adapters N");
    }
    if (number < least || number > llmc_facts.adapter_count) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "the adapter's number is %lld: it has to be from %lld to %lld",
                         (long long)number, (long long)least, (long long)llmc_facts.adapter_count);
    }
    return LLMC_OK;
}

int64_t llmc_adapter_users(const LlmcModel *model, int64_t number) {
    int64_t users = 0;
    for (const LlmcSequence *one = model->sequences; one != NULL; one = one->after) users += one->view.adapter == number;
    return users;
}

/* Makes a number one that no sequence can have, where none has it; the lock is held. */
static int begin(LlmcModel *model, int64_t number) {
    const int64_t users = llmc_adapter_users(model, number);
    if (users > 0) {
        return llmc_fail(LLMC_ERROR_STATE, "adapter %lld is in use by %lld sequences: end them first", (long long)number,
                         (long long)users);
    }
    model->adapter_serials[number] = 0;
    return LLMC_OK;
}

int llmc_adapter_begin(LlmcModel *model, int64_t number) {
    llmc_no_error();
    const int code = check_number(model, number, 1);
    return code == LLMC_OK ? begin(model, number) : code;
}

void llmc_adapter_end(LlmcModel *model, int64_t number) {
    model->adapter_serials[number] = ++model->last_adapter_serial;
}

int llmc_adapt(LlmcSequence *sequence, int64_t number) {
    llmc_no_error();
    if (sequence == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the sequence is NULL");
    LlmcModel *model = sequence->model;
    const int code = check_number(model, number, 0);
    if (code != LLMC_OK) return code;
    if (sequence->view.length > 0) {
        return llmc_fail(LLMC_ERROR_STATE, "a sequence of %lld tokens keeps its adapter: choose one while it is empty",
                         (long long)sequence->view.length);
    }
    pthread_mutex_lock(&model->lock);
    const int64_t serial = model->adapter_serials[number]; /* of number 0 it is 0 */
    if (number == 0 || serial != 0) {
        sequence->view.adapter = number;
        sequence->adapter_serial = serial;
    }
    pthread_mutex_unlock(&model->lock);
    if (number == 0 || serial != 0) return LLMC_OK;
    return llmc_fail(LLMC_ERROR_STATE, "no adapter is loaded under the number %lld", (long long)number);
}

static int check_tables(const LlmcAdapterTable *tables) {
    if (tables == NULL) return llmc_fail(LLMC_ERROR_ARGUMENT, "the adapter's tables are NULL");
    for (int64_t i = 0; i < llmc_facts.adapter_table_count; i++) {
        for (int64_t p = 0; tables[i].ranks != NULL && p < llmc_facts.adapter_tables[i].parts; p++) {
            const int64_t rank = tables[i].ranks[p];
            if (rank >= 0 && rank <= llmc_facts.adapter_rank && (rank == 0 || (tables[i].a && tables[i].b))) continue;
            return llmc_fail(LLMC_ERROR_ARGUMENT, "table %lld of the adapter has rank %lld, and room is for 0 to %lld; or "
                             "its a or b is NULL", (long long)i, (long long)rank, (long long)llmc_facts.adapter_rank);
        }
    }
    return LLMC_OK;
}

/* Copies the tables of one linear op to where steps read them: only the ranks that there are. */
static void fill(const LlmcModel *model, int64_t op, int64_t number, const LlmcAdapterTable *given) {
    const LlmcAdapterFacts *facts = &llmc_facts.adapter_tables[op];
    void *const *tables = model->step->adapter_tables + TABLES * op;
    const int64_t rank = llmc_facts.adapter_rank, a_size = facts->parts * rank * facts->inputs;
    int32_t *ranks = (int32_t *)tables[2] + number * facts->parts;
    float *a = (float *)tables[0] + number * a_size, *b = (float *)tables[1] + number * rank * facts->outputs;
    int64_t most = 0;
    for (int64_t p = 0; p < facts->parts; p++) {
        const int64_t used = ranks[p] = given == NULL || given->ranks == NULL ? 0 : given->ranks[p];
        const int64_t offset = p * rank * facts->inputs;
        if (used > 0) memcpy(a + offset, given->a + offset, (size_t)(used * facts->inputs) * sizeof *a);
        most = used > most ? used : most;
    }
    if (most > 0) memcpy(b, given->b, (size_t)(most * facts->outputs) * sizeof *b);
}

int llmc_load_adapter(LlmcModel *model, int64_t number, const LlmcAdapterTable *tables) {
    llmc_no_error();
    int code = check_number(model, number, 1);
    if (code == LLMC_OK) code = check_tables(tables);
    if (code != LLMC_OK) return code;
    pthread_mutex_lock(&model->lock);
    code = begin(model, number);
    if (code == LLMC_OK) {
        for (int64_t i = 0; i < llmc_facts.adapter_table_count; i++) fill(model, i, number, &tables[i]);
        llmc_adapter_end(model, number);
    }
    pthread_mutex_unlock(&model->lock);
    return code;
}

int llmc_unload_adapter(LlmcModel *model, int64_t number) {
    llmc_no_error();
    int code = check_number(model, number, 1);
    if (code != LLMC_OK) return code;
    pthread_mutex_lock(&model->lock);
    if (model->adapter_serials[number] == 0) {
        code = llmc_fail(LLMC_ERROR_STATE, "no adapter is loaded under the number %lld", (long long)number);
    } else {
        code = begin(model, number);
    }
    for (int64_t i = 0; code == LLMC_OK && i < llmc_facts.adapter_table_count; i++) fill(model, i, number, NULL);
    pthread_mutex_unlock(&model->lock);
    return code;
}
