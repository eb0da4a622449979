/* The pages of the KV cache: which are free, how many sequences have each of the others, and which hold a prefix that can
 * be found again.
 *
 * A page is in exactly one state: free; used by some sequences; or kept, which nobody uses and which still holds tokens
 * that a new sequence may begin with. A full page may be registered under its tokens and those of all pages before it:
 * that makes it a prefix. It is known by a serial number that is never used twice, so that a child can name its parent
 * even after that is gone. Kept pages make room when no page is free, the longest unused first. All of it takes constant
 * time. */
#ifndef LLMC_PAGES_H
#define LLMC_PAGES_H

#include <stdbool.h>
#include <stdint.h>

/* `runtime/library.py` mirrors this struct with ctypes, to look at it. */
typedef struct LlmcPages {
    int64_t capacity;
    int64_t tokens_per_page;
    int64_t fresh;      /* pages from here on have never been used: their memory is untouched */
    int64_t free_count; /* of these below */
    int64_t kept_count;
    int32_t *free;  /* [capacity], the first free_count: pages that were used and are free again */
    int32_t *users; /* [capacity]: sequences that have the page; 0: it is free or kept */
    /* Prefixes. Pages are written as their number + 1 where 0 is none, so that memory is touched only when used. */
    int64_t *serials;  /* [capacity]: what a registered page is known by; 0: it is not registered */
    int64_t *parents;  /* [capacity]: the serial of the page before it; what a first page has is 0 or less */
    int32_t *tokens;   /* [capacity, tokens_per_page] */
    int32_t *siblings; /* [capacity]: the next page in the same bucket */
    int32_t *buckets;  /* [bucket_mask + 1]: the first page of those whose hash ends like this */
    int32_t *older, *newer; /* [capacity]: of kept pages, those that were left before and after it */
    int32_t oldest, newest;
    int64_t last_serial;
    uint64_t bucket_mask;
    uint64_t seed; /* of hashes: differs from run to run, so that nobody can make prompts whose hashes collide */
    void *memory;
    int64_t memory_bytes;
} LlmcPages;

/* False where there is no memory for it. */
bool llmc_pages_open(LlmcPages *pages, int64_t capacity, int64_t tokens_per_page);
void llmc_pages_close(LlmcPages *pages);

/* A page with one user: a free one, or else the one kept longest; -1 where all are in use. */
int32_t llmc_pages_take(LlmcPages *pages);

/* One user more; one less, and the last one leaves a registered page kept, and any other free. */
void llmc_pages_share(LlmcPages *pages, int32_t page);
void llmc_pages_release(LlmcPages *pages, int32_t page);

/* The registered page with these tokens after that parent; -1: there is none. It gains no user by this. */
int32_t llmc_pages_find(const LlmcPages *pages, int64_t parent, const int32_t *tokens);

/* Makes a full page findable and returns its serial, or that of the page already known by this content. */
int64_t llmc_pages_register(LlmcPages *pages, int32_t page, int64_t parent, const int32_t *tokens);

/* A page is about to change: from now on nobody finds it by its old content. */
void llmc_pages_forget(LlmcPages *pages, int32_t page);

/* Frees all pages that are only kept. */
void llmc_pages_drop_kept(LlmcPages *pages);

/* Pages that `llmc_pages_take` could give. */
int64_t llmc_pages_available(const LlmcPages *pages);

#endif
