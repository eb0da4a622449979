/* Continues a text, given as token ids: the same tokens as `Runtime.generate` in Python.
 *
 *     ./generate model.so COUNT ID ID ...           the likeliest tokens
 *     ./generate -t 0.8 -s 1 model.so COUNT ID ...  drawn at temperature 0.8, seed 1 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "llmc.h"

static const LlmcApi *llmc;

static void stop_with(const char *why) {
    fprintf(stderr, "generate: %s\n", why);
    exit(1);
}

static void check(int code) {
    if (code != LLMC_OK) stop_with(llmc->error());
}

static const LlmcApi *load(const char *path) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) stop_with(dlerror());
    const LlmcApi *(*get)(int64_t) = (const LlmcApi *(*)(int64_t))dlsym(library, "llmc_api");
    const LlmcApi *api = get == NULL ? NULL : get(LLMC_API_VERSION);
    if (api == NULL) stop_with("this file has no llmc_api of this version: compile the model again");
    return api;
}

int main(int count, char **words) {
    uint64_t state = 0;
    LlmcSampling sampling = {.bytes = sizeof sampling, .random = &state};
    for (int option; (option = getopt(count, words, "t:s:")) != -1;) {
        if (option == 't') sampling.temperature = atof(optarg);
        else if (option == 's') state = strtoull(optarg, NULL, 10);
        else return 2;
    }
    if (count - optind < 3) stop_with("usage: generate [-t TEMPERATURE] [-s SEED] model.so COUNT ID ...");
    const char *path = words[optind];
    const long wanted = atol(words[optind + 1]);
    const int prompt = count - optind - 2;
    int32_t *ids = malloc((size_t)prompt * sizeof *ids);
    if (ids == NULL) stop_with("out of memory");
    for (int i = 0; i < prompt; i++) ids[i] = (int32_t)atol(words[optind + 2 + i]);

    llmc = load(path);
    LlmcModel *model;
    LlmcSequence *sequence;
    LlmcOptions options = {.bytes = sizeof options};
    check(llmc->open(path, &options, &model));
    check(llmc->sequence(model, 0, &sequence));
    check(llmc->feed(sequence, ids, prompt));
    for (long i = 0; i < wanted; i++) {
        int32_t token;
        check(llmc->next(sequence, &sampling, &token));
        printf("%ld\n", (long)token);
        if (i + 1 < wanted) check(llmc->feed(sequence, &token, 1));
    }
    llmc->close(model); /* its sequences too */
    free(ids);
    return 0;
}
