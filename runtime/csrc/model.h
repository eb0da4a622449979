/* What an open model is made of: shared by the files behind llmc.h and layer.h. */
#ifndef LLMC_MODEL_H
#define LLMC_MODEL_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "facts.h"
#include "layer.h"
#include "pages.h"
#include "places.h"
#include "step.h"

/* A model's weights, mapped or copied. */
typedef struct LlmcWeights {
    void *memory; /* NULL: there are none to give back */
    int64_t bytes;
} LlmcWeights;

/* What is being fed: requests from number `next` on are not done. */
typedef struct LlmcFeed {
    const LlmcRequest *requests;
    int64_t number, next;
} LlmcFeed;

/* What `llmc_open` makes for a model, and Python otherwise. */
typedef struct LlmcOwn {
    LlmcStep step;
    LlmcWeights weights;
    void *table_memory;
    int64_t table_bytes;
    void **cache; /* [2 * layers]: keys and values of each */
    float *logits;
    int64_t logits_bytes;
    void *scratch; /* of choices */
    int64_t scratch_bytes;
    int32_t *seen;        /* [vocabulary]: ids that a penalty is for */
    unsigned char *known; /* [vocabulary]: 1 for these, while they are collected; else 0 */
    void **adapter_tables; /* [3 * adapter_table_count]: a, b and ranks of each linear op */
    void **outputs;       /* [outputs], each with room for a whole step */
    int64_t *output_bytes;
} LlmcOwn;

/* Invariant: all that a step reads and writes is there, as large as the facts say. `lock` guards everything but what
 * `open` has decided; whoever has it may run steps and choose. */
struct LlmcModel {
    pthread_mutex_t lock;
    int64_t threads;
    const LlmcHooks *hooks; /* NULL: none */
    LlmcStep *step;
    LlmcTables tables;
    LlmcDivision division;
    LlmcPart *parts;     /* [max_step]: those of the step that is made */
    int64_t *page_bytes; /* [2 * layers]: of a page in each buffer of the cache */
    LlmcPages pages;
    LlmcSequence *sequences; /* all of them, linked */
    LlmcFeed feed;
    int64_t *adapter_serials; /* [adapter_count + 1]: what was loaded last under each number; 0: nothing is there */
    int64_t last_adapter_serial;
    float *const *logits; /* where [rows, vocabulary] lies, of steps whose rows are nobody's own */
    LlmcOwn own;
};

/* What a sequence was before it is computed anew in another regime, until the first of its tokens is in the cache. */
typedef struct LlmcBefore {
    bool is_set;
    int64_t length, page_count, regime, serial_count;
    int32_t *page_ids;
} LlmcBefore;

/* Invariant, but while it is fed: `page_ids` are the pages that `length` tokens need, each with this sequence among its
 * users, and all of them were computed in one regime. `serials` are those of its first full pages, which are registered.
 * The model's lock guards all but its own tokens. */
struct LlmcSequence {
    LlmcSequenceView view;
    LlmcModel *model;
    LlmcSequence *before, *after; /* in the model's list */
    int64_t memory_bytes;         /* of this and of its arrays, which lie behind it */
    int64_t pending;              /* tokens behind `length` that are being fed, and have pages; 0: it is not fed */
    int64_t fed_from;             /* its length before it was fed last */
    int64_t wanted;               /* while it is fed: logits from this position on are wanted */
    bool is_decoding;             /* while it is fed: these tokens decode, and are no prompt's */
    bool has_logits;              /* those of its last token */
    float *logits;                /* [vocabulary] */
    int32_t *tokens;              /* [max_context], those of the view */
    int32_t *page_ids;
    int64_t serial_count;
    int64_t *serials;
    int64_t adapter_serial; /* of its adapter; 0: it has none */
    LlmcBefore before_anew;
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

/* What every model has, whoever made its step and tables: division, parts and pages. */
int llmc_make_places(LlmcModel *model, int64_t threads, int64_t pages);

/* One step over parts, whose logits go to `logits`; the model's lock is held. */
int llmc_run_parts(LlmcModel *model, int64_t parts, float *logits);
/* A choice, on the model's threads. */
int64_t llmc_choose_token(const LlmcModel *model, const LlmcChoice *choice);

/* Whether steps go on from a cache; tokens of a sequence at most, as without one every step sees all of them. */
bool llmc_has_cache(void);
int64_t llmc_most_tokens(void);

/* Where a sequence is when it has so many tokens: the regime that it is computed in, and a length in that regime. */
int64_t llmc_regime_of(const LlmcSequence *sequence, int64_t length);
int64_t llmc_length_in(int64_t regime);

/* What stands for "before the first page" of a sequence: pages are shared by those of one regime and one adapter. */
int64_t llmc_root_of(const LlmcSequence *sequence);

/* Bytes of table number `index` of adapters: a, b and ranks of linear op 0, and so on. */
int64_t llmc_adapter_table_bytes(int64_t index);

/* Makes a sequence one of its first `length` tokens; the lock is held. */
void llmc_truncate(LlmcSequence *sequence, int64_t length);

int llmc_open(const char *path, const LlmcOptions *options, LlmcModel **model);
void llmc_close(LlmcModel *model);
int llmc_sequence(LlmcModel *model, int64_t expected, LlmcSequence **sequence);
int llmc_fork(LlmcSequence *sequence, LlmcSequence **other);
void llmc_end(LlmcSequence *sequence);
int64_t llmc_length(const LlmcSequence *sequence);
int llmc_adopt(LlmcSequence *sequence, const int32_t *ids, int64_t count, int64_t *covered);
int llmc_feed(LlmcSequence *sequence, const int32_t *ids, int64_t count);
int llmc_feed_all(LlmcSequence *const *sequences, const int32_t *const *ids, const int64_t *counts, int64_t number);
int llmc_rollback(LlmcSequence *sequence, int64_t count);
int llmc_load_adapter(LlmcModel *model, int64_t number, const LlmcAdapterTable *tables);
int llmc_unload_adapter(LlmcModel *model, int64_t number);
int llmc_next(LlmcSequence *sequence, const LlmcSampling *sampling, int32_t *token);
float *llmc_logits(LlmcSequence *sequence);
int llmc_encode(LlmcModel *model, const int32_t *ids, const int64_t *counts, int64_t number, float *rows);

#endif
