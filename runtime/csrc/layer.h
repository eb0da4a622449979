/* The session layer as Python's runtime uses it (runtime/layer.py mirrors these structs with ctypes): beside what llmc.h
 * has, its steps run one at a time, in memory that Python has made, and it writes many tokens in one call.
 *
 * Nothing here takes the model's lock or turns of its own: who calls it is the model's only user at that time. */
#ifndef LLMC_LAYER_H
#define LLMC_LAYER_H

#include <stdint.h>

#include "choose.h"
#include "llmc.h"
#include "pages.h"
#include "places.h"
#include "step.h"

/* How the layer has work done; NULL: as the artifact does it, in this process's memory. */
typedef struct LlmcHooks {
    int (*run)(const LlmcStep *step, int64_t threads);           /* llmc_run */
    int64_t (*choose)(const LlmcChoice *choice, int64_t threads); /* llmc_choose */
    int (*copy_page)(int64_t from, int64_t to);                  /* of the KV cache, in all layers; 0: done */
    const float *(*fetch)(const float *logits);                  /* a row of logits, as this process sees it; or NULL */
} LlmcHooks;

/* What a model is made of. The step has all of its pointers and keeps them; the layer fills its sizes, and the tables,
 * which are those that the step reads, as this process sees them. */
typedef struct LlmcLayer {
    int64_t bytes; /* of this struct */
    LlmcStep *step;
    LlmcTables tables;
    float *logits; /* where rows go, 64-byte aligned, with room for those of any step; NULL where there are none */
    LlmcHooks hooks;
    int64_t threads;
    /* What the manifest says: refused where the code says otherwise. */
    int64_t state, vocabulary, max_context, max_step, page;
} LlmcLayer;

/* A model over memory that is not its own; `llmc_close` gives back the rest, and all sequences. layer: has to stay where
 * it is while the model is open; its logits and its hooks may be changed between calls. */
int llmc_layer_open(const LlmcLayer *layer, LlmcModel **model);

/* What of a model and of a sequence may be read between calls. */
const LlmcPages *llmc_layer_pages(const LlmcModel *model);
void llmc_layer_drop_kept(LlmcModel *model);

typedef struct LlmcSequenceView {
    int64_t length, page_count;
    int64_t regime;   /* that all of its tokens are computed in */
    int64_t expected; /* tokens that it will have at least */
    int64_t reading;  /* 1: no token of its own has run, so that what comes is the rest of a prompt, even one token */
    const int32_t *tokens;   /* [length] */
    const int32_t *page_ids; /* [page_count] */
    int64_t adapter;  /* the number of its adapter, 0: none */
} LlmcSequenceView;

/* Adapters whose tables Python fills: `begin` refuses a number that a sequence uses, and makes it one of no adapter, so
 * that the tables may change; `end` makes it that of what is there then, which no prefix was computed with. `users` says how
 * many sequences have it. */
int llmc_adapter_begin(LlmcModel *model, int64_t number);
void llmc_adapter_end(LlmcModel *model, int64_t number);
int64_t llmc_adapter_users(const LlmcModel *model, int64_t number);
int llmc_adapt(LlmcSequence *sequence, int64_t number);

/* Feeding several sequences, step by step: `begin` checks and makes room, each `step` runs the model once and commits
 * what it has run, `end` gives up what has not run, and has to be called before anything else is done with them. Where
 * `begin` fails, nothing has changed, and there is no end to call. A sequence that is computed anew, in another regime,
 * has no tokens from the beginning of its first step on, until they are committed again. */
typedef struct LlmcRequest {
    LlmcSequence *sequence; /* each once */
    const int32_t *ids;     /* [count], at least one; read by `begin` only, but the requests themselves until `end` */
    int64_t count;
    int64_t first_row; /* the logits from this token on are wanted; count: none */
} LlmcRequest;

int llmc_feed_begin(LlmcModel *model, const LlmcRequest *requests, int64_t number);
/* logits: where its rows of logits go, 64-byte aligned, with room for all that may come; NULL: the layer's own place. rows:
 * how many it has left there, in the order of the requests. */
int llmc_feed_step(LlmcModel *model, float *logits, int64_t *rows);
/* Requests that are not done. */
int64_t llmc_feed_left(const LlmcModel *model);
void llmc_feed_end(LlmcModel *model);

/* One text in the making. */
typedef struct LlmcText {
    LlmcSequence *sequence;
    LlmcChoice *choice;     /* how tokens are chosen; its logits and its uniform are filled in */
    const double *uniforms; /* [most]: token number i is drawn with uniforms[i]; NULL: greedy */
    int32_t *seen;          /* choice->seen, as this process sees it */
    unsigned char *known;   /* [vocabulary]: 1 for ids in choice->seen, which then takes up what is chosen; NULL: no
                               penalty */
    const int32_t *stops;   /* [stop_count]: ids that end the text; they are chosen, and not taken up as seen */
    int64_t stop_count;
    int32_t *tokens; /* [most]: those chosen so far; the last of them is fed next */
    int64_t count;   /* of them, at least one */
    int64_t most;
    int64_t end; /* set: LLMC_TEXT_* */
} LlmcText;

enum {
    LLMC_TEXT_GOES_ON = 0,
    LLMC_TEXT_STOPPED,    /* at one of its stops, which is its last token */
    LLMC_TEXT_FULL,       /* it has `most` tokens */
    LLMC_TEXT_NOT_FINITE, /* no token could be chosen: the model's logits are not finite, */
    LLMC_TEXT_NO_CHOICE,  /* or those after the penalty are not, or the choice cannot be */
};

typedef struct LlmcWriting {
    LlmcText *texts; /* [number] */
    int64_t number;
    int64_t deadline; /* of CLOCK_MONOTONIC, in nanoseconds: no round begins after it, but the first */
    int64_t *times;   /* NULL, or [rounds of the text with the most room]: when each round was over, likewise */
    int64_t rounds;   /* set */
} LlmcWriting;

/* Writes texts side by side, in rounds of one token each: the last one is fed, the next one chosen. Until a text ends, or
 * the deadline. An error is that of a feed, and the tokens chosen before it count. */
int llmc_write(LlmcModel *model, LlmcWriting *writing);

/* Encoders: how many of the first texts go into one step, at least one; and a step of as many. ids: those of all texts,
 * one after the other, and their token types (NULL: all 0). Outputs are those of the step. */
int64_t llmc_encode_fitting(const LlmcModel *model, const int64_t *counts, int64_t number);
int llmc_encode_step(LlmcModel *model, const int32_t *ids, const int32_t *types, const int64_t *counts, int64_t number);

#endif
