/* Which pages of the KV cache are free, and how many sequences have each of the others. */
#ifndef LLMC_PAGES_H
#define LLMC_PAGES_H

#include <stdbool.h>
#include <stdint.h>

typedef struct LlmcPages {
    int64_t capacity;
    int64_t fresh;      /* pages from here on have never been used: their memory is untouched */
    int64_t free_count; /* of these below */
    int32_t *free;      /* [capacity], the first free_count: pages that were used and are free again */
    int32_t *users;     /* [capacity]: sequences that have the page; 0: it is free */
} LlmcPages;

/* False where there is no memory for it. */
bool llmc_pages_open(LlmcPages *pages, int64_t capacity);
void llmc_pages_close(LlmcPages *pages);

/* A page with one user; -1 where all are in use. */
int32_t llmc_pages_take(LlmcPages *pages);

/* One user more; one less, and the last one leaves it free. */
void llmc_pages_share(LlmcPages *pages, int32_t page);
void llmc_pages_release(LlmcPages *pages, int32_t page);

/* Pages that `llmc_pages_take` could give. */
int64_t llmc_pages_available(const LlmcPages *pages);

#endif
