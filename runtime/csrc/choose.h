/* Choosing the next token from a row of logits: what temperature, top-k, top-p, min-p and the repetition penalty mean. */
#ifndef LLMC_CHOOSE_H
#define LLMC_CHOOSE_H

#include <stdint.h>

/* Applied in this order: the penalty for seen ids, then the temperature, then the filters, then a draw.
 *
 * top-k keeps the k likeliest tokens and those as likely as the last of them; top-p, of these, the fewest that make up
 * `top_p` of their probability (of equally likely ones the lower ids); min-p, of these, those at least `min_p` times as
 * likely as the likeliest. `runtime/library.py` mirrors this struct with ctypes. */
typedef struct LlmcChoice {
    float *logits;       /* [count]; changed while the choice is made if there is a penalty, but not after */
    const int32_t *seen; /* [seen_count], each id once: what the penalty is for */
    void *scratch;       /* 64-byte aligned, llmc_choose_bytes(count) bytes */
    int64_t count;
    int64_t seen_count;
    int64_t top_k;      /* 0: off */
    double penalty;     /* above 0: seen logits are divided by it, or multiplied where they are negative; 1: off */
    double temperature; /* 0: the likeliest token, the first of equally likely ones */
    double top_p;       /* 1: off */
    double min_p;       /* 0: off */
    double uniform;     /* from [0, 1): which token of those left, by the running sum of their probabilities, by id */
} LlmcChoice;

/* The chosen token; LLMC_NO_TOKEN where a logit is NaN or infinite, or all are minus infinity; LLMC_NO_CHOICE where a
 * field of the choice is out of range: then nothing was read or written beyond it. On at most `threads` threads.
 *
 * Where the temperature is not 0, scratch starts with f32 [count] weights: 0 of tokens that were ruled out, and else
 * the probability, in proportion to that of the likeliest token. */
int64_t llmc_choose(const LlmcChoice *choice, int64_t threads);

enum { LLMC_NO_TOKEN = -1, LLMC_NO_CHOICE = -2 };

/* Bytes of scratch that a choice among `count` tokens needs. */
int64_t llmc_choose_bytes(int64_t count);

#endif
