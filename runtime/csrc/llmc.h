/* Use a model that llmc compiled, from C: all that a program needs of llmc is this file and the artifact.
 *
 * An artifact (`llmc compile MODEL -o model.so`) is a shared library that exports one function of this header,
 * `llmc_api`, which gives the table of all others. A program links with the artifact, or opens it:
 *
 *     void *library = dlopen("./model.so", RTLD_NOW | RTLD_LOCAL);
 *     const LlmcApi *(*get)(int64_t) = (const LlmcApi *(*)(int64_t))dlsym(library, "llmc_api");
 *     const LlmcApi *llmc = get(LLMC_API_VERSION);
 *
 * Every artifact has a table of its own, for its own model: a program that uses several gets one of each.
 *
 * Errors. Functions that return int return 0 (LLMC_OK) or one of the LLMC_ERROR_* below, and then have done nothing,
 * unless they say otherwise. `error()` is the text of it. Nothing here prints, exits or aborts. Pointers, sizes and ids
 * that are given are looked at as far as C allows: what a pointer points to has to be as large as is said.
 *
 * Threads. A model may be used by several threads: calls on it take turns, each on up to `threads` threads. A sequence
 * is for one thread at a time. `close` is for when no other call on the model is under way. Steps are computed by the
 * thread that calls and by workers that the artifact starts once and keeps, so it stays loaded, whatever dlclose is
 * told. A thread that calls feed, next or encode needs 1 MiB of stack. After fork(), a child may use a model only if no
 * other thread of the parent was in a call.
 *
 * Tokens. Texts are token ids here; a tokenizer is the program's part. `tokenizer.json` can be taken out of an artifact:
 * `objcopy -O binary --dump-section .llmc.tokenizer=tokenizer.json.gz model.so /dev/null`. */
#ifndef LLMC_H
#define LLMC_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when something that is here changes its meaning. Structs and the table may grow at their end within a version:
 * each starts with its size. */
#define LLMC_API_VERSION 1

enum {
    LLMC_OK = 0,
    LLMC_ERROR_ARGUMENT,    /* what was given cannot be: a NULL, a size, a token id, an option */
    LLMC_ERROR_FILE,        /* the file cannot be read, is not this artifact, or lacks its weights */
    LLMC_ERROR_MACHINE,     /* this machine lacks something that the code needs */
    LLMC_ERROR_MEMORY,      /* out of memory or of address space */
    LLMC_ERROR_FULL,        /* the KV cache has no page left */
    LLMC_ERROR_CONTEXT,     /* more tokens than the artifact was compiled for */
    LLMC_ERROR_STATE,       /* not now: such as `next` before the first `feed` */
    LLMC_ERROR_UNSUPPORTED, /* this kind of artifact cannot do that */
    LLMC_ERROR_NUMBERS,     /* the model's logits are not finite, so that there is no next token */
    LLMC_ERROR_STEP         /* the model found its input impossible while it ran */
};

/* What an artifact is for. */
enum { LLMC_GENERATE = 0, LLMC_ENCODE, LLMC_RUN };

/* What its steps see: parts of sequences that go on from a cache; one whole sequence, without a cache; several whole
 * sequences; arrays of any kind. */
enum { LLMC_PAGED = 0, LLMC_STATELESS, LLMC_RAGGED, LLMC_ARRAYS };

/* What an output of an encoder has a row for: the output as a whole, each token, each sequence; or none of these. */
enum { LLMC_PER_CALL = 0, LLMC_PER_TOKEN, LLMC_PER_SEQUENCE, LLMC_PER_OTHER };

/* One layer's part of the KV cache. A page has keys [kv_heads, head_dim, page] and values [kv_heads, page, value_dim]. */
typedef struct LlmcLayerFacts {
    int64_t kv_heads, head_dim, value_dim;
    int64_t element_bytes; /* 2: float16; 4: float32 */
    int64_t window;        /* keys that a token sees at most, itself included; 0: all */
} LlmcLayerFacts;

/* An ISA feature that the code needs, as LLVM calls it, and as Linux does in /proc/cpuinfo. */
typedef struct LlmcFeature {
    const char *name, *flag;
} LlmcFeature;

/* An output of an encoder. dtype: numpy's name. It has `elements` numbers a row. */
typedef struct LlmcOutputFacts {
    const char *name, *dtype;
    int64_t per; /* LLMC_PER_* */
    int64_t elements;
} LlmcOutputFacts;

/* A linear op that adapters change (LoRA), if the artifact was compiled with room for some. An adapter adds, for each of
 * `parts` ranges of the op's outputs, the product of a matrix A [r, inputs] and the part's columns of a matrix B. Which
 * module of the model each part is of stands in the artifact's manifest (`adapters`). */
typedef struct LlmcAdapterFacts {
    int64_t inputs, outputs, parts;
} LlmcAdapterFacts;

/* What an artifact is: compiled into it, and the same as in its manifest. */
typedef struct LlmcFacts {
    int64_t bytes; /* of this struct */
    int64_t task;  /* LLMC_GENERATE, ... */
    int64_t state; /* LLMC_PAGED, ... */
    int64_t vocabulary;    /* token ids are below this; numbers of a row of logits */
    int64_t max_context;   /* tokens of a sequence at most */
    int64_t max_step;      /* tokens of a step at most: longer prompts take several */
    int64_t page;          /* tokens of a page of the cache */
    int64_t tile;          /* rows of a query tile at most */
    int64_t max_splits;    /* parts that attention takes a context in at most */
    int64_t part;          /* tokens of such a part, doubled where there would be more parts */
    int64_t row_kinds;     /* 1: tokens of prompts and tokens that decode are computed differently, in steps of their own */
    int64_t arena_bytes;   /* that a step works in */
    int64_t weights_bytes; /* in the artifact's section .llmc.weights, or in a file of their own */
    int64_t tile_registers; /* 1: Linux has to be asked for AMX registers (arch_prctl), which `open` does */
    const char *architecture; /* "x86_64", ... */
    int64_t feature_count;
    const LlmcFeature *features;
    int64_t layer_count;
    const LlmcLayerFacts *layers;
    int64_t regime_count; /* lengths after which every token of a sequence is computed differently, ascending */
    const int64_t *regimes;
    int64_t failure_count; /* what a step that returns 1, 2, ... has found wrong */
    const char *const *failures;
    int64_t output_count; /* of an encoder */
    const LlmcOutputFacts *outputs;
    int64_t encoder_output; /* which of the outputs `encode` gives; -1: none */
    int64_t max_tokens;     /* tokens of a text that is encoded at most */
    int64_t adapter_count;  /* adapters that may be loaded at a time, with the numbers 1 to adapter_count */
    int64_t adapter_rank;   /* the greatest rank of one */
    int64_t adapter_table_count;
    const LlmcAdapterFacts *adapter_tables;
} LlmcFacts;

/* How a model is opened. Zeros are the defaults: `LlmcOptions options = {.bytes = sizeof options};` */
typedef struct LlmcOptions {
    int64_t bytes;       /* of this struct */
    int64_t threads;     /* for a step at most; 0: as many CPUs as this process may use (quotas of
                            control groups are not looked at) */
    int64_t cache_bytes; /* for the KV cache, which takes memory only as it is used; 0: some whole contexts, within half
                            of the free memory */
    const char *weights; /* the file with the weights of an artifact that was compiled without; else NULL */
    int64_t copy_weights; /* 0: used in the mapped file, which processes share. 1: copied into huge pages, which are
                             read faster, and which a file that changes or shrinks cannot hurt */
} LlmcOptions;

/* How `next` chooses. Zeros and NULLs: greedy, the likeliest token. The rest has the order and the meaning that it has in
 * transformers: penalty, temperature, top-k, top-p, min-p, then a draw. */
typedef struct LlmcSampling {
    int64_t bytes;      /* of this struct */
    double temperature; /* 0: the likeliest token, and what follows but the penalty counts for nothing */
    int64_t top_k;      /* 0: off */
    double top_p;       /* up to 1; 0 and 1: off */
    double min_p;       /* 0: off */
    double repetition_penalty; /* of tokens that the sequence has; 0 and 1: off */
    /* Where the temperature is not 0: the state of a random generator, which any number starts and each draw moves on.
     * It is SplitMix64: state += 0x9E3779B97F4A7C15; z = state; z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
     * z = (z ^ z >> 27) * 0x94D049BB133111EB; z ^= z >> 31; the draw is (z >> 11) / 2^53. So the same logits, options
     * and state give the same token, everywhere. */
    uint64_t *random;
} LlmcSampling;

/* What an adapter adds to one linear op. ranks [parts]: of each part, 0: nothing; up to facts->adapter_rank. a: f32
 * [parts, adapter_rank, inputs], of which the first ranks[p] rows of part p are read. b: f32 [adapter_rank, outputs], of
 * which the first ranks[p] rows are read in the columns of part p; the adapter's scale is multiplied into it. NULL ranks:
 * nothing is added to this op. */
typedef struct LlmcAdapterTable {
    const int32_t *ranks;
    const float *a, *b;
} LlmcAdapterTable;

typedef struct LlmcModel LlmcModel;
typedef struct LlmcSequence LlmcSequence;

typedef struct LlmcApi {
    int64_t bytes; /* of this struct, as the artifact knows it */
    const LlmcFacts *facts;

    /* The text of the last error of a call on this thread, in English, without a newline; until the next call. */
    const char *(*error)(void);

    /* Opens the artifact for use. path: its file, which has to hold this very code; NULL: the one that it was loaded
     * from. options: NULL for the defaults. The file is needed during the call only; but where weights are used in the
     * mapped file, it must not be written to or cut short while the model is open. Hashes are not compared: `llmc
     * inspect FILE` does that. */
    int (*open)(const char *path, const LlmcOptions *options, LlmcModel **model);

    /* Gives back a model and all of its sequences. NULL is no model. */
    void (*close)(LlmcModel *model);

    /* Text: artifacts whose task is LLMC_GENERATE. */

    /* A new empty sequence. expected: tokens that it will have at least, 0 if unknown. It matters only where there are
     * regimes: the sequence is computed in that of `expected` tokens from the start, and not anew as it grows into it. */
    int (*sequence)(LlmcModel *model, int64_t expected, LlmcSequence **sequence);

    /* A second sequence with the same tokens, and the same logits. Pages of the cache are shared until one of the two
     * writes to them. */
    int (*fork)(LlmcSequence *sequence, LlmcSequence **other);

    /* Gives back a sequence and its pages. NULL is no sequence. */
    void (*end)(LlmcSequence *sequence);

    /* Tokens of a sequence so far. */
    int64_t (*length)(const LlmcSequence *sequence);

    /* Appends tokens: ids [count], in as few steps as it takes. Afterwards there are logits for `next`. On an error the
     * sequence has the tokens that it had before; where a step had begun, it has no logits until something is fed. A
     * sequence that grows into another regime is computed anew: after an error in the middle of that it has those of
     * its tokens, from the first on, that are done (`length`).
     * Where facts->row_kinds is 1, one token behind others that were fed counts as one that decodes: feed a prompt at
     * once, or in pieces of two tokens and more. */
    int (*feed)(LlmcSequence *sequence, const int32_t *ids, int64_t count);

    /* `feed` of several sequences of one model, which share steps: that costs little more than one of them. ids [number]
     * and counts [number]: what each gets, at least one token. On an error all are as in `feed`. */
    int (*feed_all)(LlmcSequence *const *sequences, const int32_t *const *ids, const int64_t *counts, int64_t number);

    /* Forgets the last `count` tokens, and the logits if count is not 0. */
    int (*rollback)(LlmcSequence *sequence, int64_t count);

    /* The next token by the logits after the last one. It is not appended: `feed` does that. sampling: NULL is greedy. */
    int (*next)(LlmcSequence *sequence, const LlmcSampling *sampling, int32_t *token);

    /* The logits after the last token, f32 [vocabulary]; NULL where there are none. The program may change them before
     * `next`. They are there until the next feed, rollback or end. */
    float *(*logits)(LlmcSequence *sequence);

    /* Encoders: artifacts whose task is LLMC_ENCODE. */

    /* Encodes texts: ids has the tokens of all `number` texts, one after the other, and counts [number] how many each
     * has. rows: room for a row of facts->outputs[facts->encoder_output].elements f32 for each text or, where that
     * output is per token, for each token. Token types are 0: a pair of texts is for Python. */
    int (*encode)(LlmcModel *model, const int32_t *ids, const int64_t *counts, int64_t number, float *rows);

    /* Text, again: what an artifact knows if `bytes` says that its table goes so far. */

    /* Takes over cached tokens: as many whole pages as hold the start of ids [count], of sequences that are there or
     * were ended. covered: how many tokens the sequence has by this, fewer than count, so that something is left to
     * feed: ids [*covered], ... It has no logits yet. Only for an empty sequence. Prefixes are found by their tokens and
     * share their pages; what nobody uses is kept until its room is needed, the longest unused first. */
    int (*adopt)(LlmcSequence *sequence, const int32_t *ids, int64_t count, int64_t *covered);

    /* Loads an adapter under a number from 1 to facts->adapter_count, in place of what was there. tables: one for each of
     * facts->adapter_tables; all of it is copied. An error while a sequence has that number. */
    int (*load_adapter)(LlmcModel *model, int64_t number, const LlmcAdapterTable *tables);

    /* Takes an adapter away. An error while a sequence has it. */
    int (*unload_adapter)(LlmcModel *model, int64_t number);

    /* From now on the sequence, which has to be empty, is computed with this adapter; 0: with none. Call it before
     * `adopt`: pages are shared among sequences of one adapter, and not with those of what its number stood for before. */
    int (*adapt)(LlmcSequence *sequence, int64_t number);
} LlmcApi;

/* The table of this artifact; NULL where it has none of that version. */
const LlmcApi *llmc_api(int64_t version);

#ifdef __cplusplus
}
#endif

#endif
