/* What an open model is made of: shared by the files behind llmc.h. */
#ifndef LLMC_MODEL_H
#define LLMC_MODEL_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "facts.h"
#include "pages.h"
#include "places.h"
#include "step.h"

/* A model's weights, mapped or copied. */
typedef struct LlmcWeights {
    void *memory; /* NULL: there are none to give back */
    int64_t bytes;
} LlmcWeights;

/* Invariant: all that a step reads and writes is there, as large as the facts say. `lock` guards everything but what
 * `open` has decided; whoever has it may run steps and choose. */
struct LlmcModel {
    pthread_mutex_t lock;
    int64_t threads;
    LlmcWeights weights;
    LlmcStep step;
    LlmcTables tables;
    LlmcDivision division;
    void *table_memory;
    int64_t table_bytes;
    LlmcPart *parts; /* [max_step]: those of the step that is made */
    void **cache;    /* [2 * layers]: keys and values of each */
    int64_t *page_bytes; /* [2 * layers]: of a page in each of them */
    LlmcPages pages;
    LlmcSequence *sequences; /* all of them, linked */

    /* Text: */
    float *logits; /* [max_step, vocabulary], for steps with rows of several sequences */
    int64_t logits_bytes;
    void *scratch; /* of choices */
    int64_t scratch_bytes;
    int32_t *seen;       /* [vocabulary]: ids that a penalty is for */
    unsigned char *known; /* [vocabulary]: 1 for these, while they are collected; else 0 */

    /* Encoders: [outputs], each with room for a whole step. */
    void **outputs;
    int64_t *output_bytes;
};

/* Invariant: `pages` are those that `length` tokens need, each with this sequence among its users. All of them were
 * computed in one regime. The model's lock guards all but its own tokens. */
struct LlmcSequence {
    LlmcModel *model;
    LlmcSequence *before, *after; /* in the model's list */
    int64_t memory_bytes;         /* of this and of the three arrays, which lie behind it */
    int64_t length, page_count;
    int64_t expected; /* tokens that it will have at least */
    int64_t regime;
    bool has_logits; /* those of its last token */
    float *logits;   /* [vocabulary] */
    int32_t *tokens; /* [max_context] */
    int32_t *page_ids;
};

/* Notes down the text of an error for this thread, and returns its code. */
int llmc_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* No error: what a call begins with. */
void llmc_no_error(void);
const char *llmc_error(void);

/* Copies what a caller gave of a struct that starts with its size into one of `size` bytes. Fields that he does not know
 * become 0; of those that this code does not know it is an error if any is not 0. NULL: all are 0. */
int llmc_read_struct(void *to, int64_t size, const void *from, const char *name);

/* LLMC_OK, or LLMC_ERROR_MACHINE where this CPU or system lacks something that the code needs. */
int llmc_check_machine(void);
/* CPUs that this process may use. */
int64_t llmc_usable_cpus(void);

/* The weights of this artifact: from its own file at `path` (NULL: where it was loaded from), whose code has to be this,
 * or from another file. place: where they lie. */
int llmc_open_weights(const char *path, const char *external, bool copy, LlmcWeights *weights, const void **place);

/* One step over parts; the model's lock is held. */
int llmc_run_parts(LlmcModel *model, int64_t parts);

int llmc_open(const char *path, const LlmcOptions *options, LlmcModel **model);
void llmc_close(LlmcModel *model);
int llmc_sequence(LlmcModel *model, int64_t expected, LlmcSequence **sequence);
int llmc_fork(LlmcSequence *sequence, LlmcSequence **other);
void llmc_end(LlmcSequence *sequence);
int64_t llmc_length(const LlmcSequence *sequence);
int llmc_feed(LlmcSequence *sequence, const int32_t *ids, int64_t count);
int llmc_feed_all(LlmcSequence *const *sequences, const int32_t *const *ids, const int64_t *counts, int64_t number);
int llmc_rollback(LlmcSequence *sequence, int64_t count);
int llmc_next(LlmcSequence *sequence, const LlmcSampling *sampling, int32_t *token);
float *llmc_logits(LlmcSequence *sequence);
int llmc_encode(LlmcModel *model, const int32_t *ids, const int64_t *counts, int64_t number, float *rows);

#endif
