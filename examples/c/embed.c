/* Embeds texts, given as token ids with a "/" between texts: a line of numbers a text, as `Runtime.embed` in Python.
 *
 *     ./embed encoder.so ID ID ... / ID ID ... */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc.h"

/* This program is linked with the artifact: `cc embed.c -I FOLDER_OF_llmc.h ./encoder.so -o embed`. */
int main(int count, char **words) {
    const LlmcApi *llmc = llmc_api(LLMC_API_VERSION);
    LlmcModel *model;
    if (llmc == NULL || count < 3) {
        fprintf(stderr, "usage: embed encoder.so ID ... [/ ID ...], linked with this very artifact\n");
        return 2;
    }
    int32_t *ids = calloc((size_t)count, sizeof *ids);
    int64_t *counts = calloc((size_t)count, sizeof *counts), texts = 1, tokens = 0;
    const LlmcFacts *facts = llmc->facts;
    const int64_t width = facts->encoder_output < 0 ? 0 : facts->outputs[facts->encoder_output].elements;
    float *rows = calloc((size_t)count * (size_t)width + 1, sizeof *rows);
    if (ids == NULL || counts == NULL || rows == NULL) return 1;
    for (int i = 2; i < count; i++) {
        if (strcmp(words[i], "/") == 0) {
            texts++;
        } else {
            ids[tokens++] = (int32_t)atol(words[i]);
            counts[texts - 1]++;
        }
    }
    int code = llmc->open(words[1], NULL, &model);
    if (code == LLMC_OK) code = llmc->encode(model, ids, counts, texts, rows);
    if (code != LLMC_OK) fprintf(stderr, "embed: %s\n", llmc->error());
    for (int64_t i = 0; code == LLMC_OK && i < texts * width; i++) {
        printf("%.9g%c", (double)rows[i], (i + 1) % width ? ' ' : '\n');
    }
    llmc->close(model);
    free(rows);
    free(counts);
    free(ids);
    return code != LLMC_OK;
}
