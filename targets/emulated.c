/* Runs an artifact through llmc.h, for comparisons: emulated ARTIFACT THREADS [WEIGHTS]. A line of stdin is
 *     sequence                 the tokens that follow are a new sequence's
 *     feed COUNT ID ...        appends tokens; the logits after the last one go to stdout, as f32
 *     encode COUNT ID ...      the rows of a text, as f32
 *     greedy COUNT             appends the likeliest token, COUNT times; these go to stdout, as i32 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc.h"

static const LlmcApi *llmc;

static void stop(const char *why) {
    fprintf(stderr, "%s\n", why);
    exit(1);
}

static void check(int code) {
    if (code != LLMC_OK) stop(llmc->error());
}

static void *room(int64_t bytes) {
    void *memory = malloc((size_t)bytes + 1);
    if (memory == NULL) stop("out of memory");
    return memory;
}

static void put(const void *data, int64_t bytes) {
    if (data == NULL || fwrite(data, 1, (size_t)bytes, stdout) != (size_t)bytes) stop("nothing to write, or no place");
}

static int64_t number(void) {
    long long found;
    if (scanf("%lld", &found) != 1) stop("a number is missing");
    return found;
}

static int32_t *numbers(int64_t count) {
    int32_t *found = room(count * 4);
    for (int64_t i = 0; i < count; i++) found[i] = (int32_t)number();
    return found;
}

static void encode(LlmcModel *model, int64_t count) {
    const LlmcFacts *facts = llmc->facts;
    if (facts->encoder_output < 0) stop("the artifact is no encoder");
    const LlmcOutputFacts *output = &facts->outputs[facts->encoder_output];
    const int64_t bytes = output->elements * 4 * (output->per == LLMC_PER_TOKEN ? count : 1);
    int32_t *ids = numbers(count);
    float *rows = room(bytes);
    check(llmc->encode(model, ids, &count, 1, rows));
    put(rows, bytes);
    free(ids);
    free(rows);
}

static void greedy(LlmcSequence *sequence, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        int32_t token;
        check(llmc->next(sequence, NULL, &token));
        put(&token, sizeof token);
        check(llmc->feed(sequence, &token, 1));
    }
}

int main(int count, char **words) {
    char command[16];
    LlmcModel *model;
    LlmcSequence *sequence = NULL;
    if (count < 3) stop("emulated ARTIFACT THREADS [WEIGHTS]");
    void *library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) stop(dlerror());
    const LlmcApi *(*get)(int64_t) = (const LlmcApi *(*)(int64_t))dlsym(library, "llmc_api");
    llmc = get == NULL ? NULL : get(LLMC_API_VERSION);
    if (llmc == NULL) stop("this file has no llmc_api of this version: compile the model again");
    const LlmcOptions options = {.bytes = sizeof options, .threads = atoll(words[2]), .weights = count > 3 ? words[3] : NULL};
    check(llmc->open(words[1], &options, &model));
    while (scanf("%15s", command) == 1) {
        if (strcmp(command, "sequence") == 0) {
            llmc->end(sequence);
            check(llmc->sequence(model, 0, &sequence));
            continue;
        }
        const int64_t tokens = number();
        if (strcmp(command, "feed") == 0) {
            int32_t *ids = numbers(tokens);
            check(llmc->feed(sequence, ids, tokens));
            put(llmc->logits(sequence), llmc->facts->vocabulary * 4);
            free(ids);
        } else if (strcmp(command, "encode") == 0) {
            encode(model, tokens);
        } else if (strcmp(command, "greedy") == 0) {
            greedy(sequence, tokens);
        } else {
            stop("unknown command");
        }
    }
    llmc->close(model);
    return fflush(stdout) != 0;
}
