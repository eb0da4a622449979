/* See pages.h. */
#include "pages.h"

#include <stddef.h>
#include <string.h>
#include <time.h>

#include "memory.h"

enum { ALIGNMENT = 64 };

static uint64_t mix(uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * UINT64_C(0x9E3779B97F4A7C15);
    return sum ^ sum >> 32;
}

static uint64_t any_seed(const void *place) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return mix(mix((uint64_t)(uintptr_t)place, (uint64_t)time.tv_nsec), (uint64_t)time.tv_sec);
}

bool llmc_pages_open(LlmcPages *pages, int64_t capacity, int64_t tokens_per_page) {
    *pages = (LlmcPages){.capacity = capacity, .tokens_per_page = tokens_per_page};
    int64_t buckets = 1;
    while (buckets < capacity) buckets *= 2;
    pages->bucket_mask = (uint64_t)buckets - 1;
    const int64_t number = (int64_t)sizeof(int32_t), serial = (int64_t)sizeof(int64_t);
    const struct {
        void *place;
        int64_t bytes;
    } parts[] = {
        {&pages->serials, capacity * serial},   {&pages->parents, capacity * serial},
        {&pages->free, capacity * number},      {&pages->users, capacity * number},
        {&pages->siblings, capacity * number},  {&pages->buckets, buckets * number},
        {&pages->older, capacity * number},     {&pages->newer, capacity * number},
        {&pages->tokens, capacity * tokens_per_page * number},
    };
    const size_t count = sizeof parts / sizeof *parts;
    for (size_t i = 0; i < count; i++) pages->memory_bytes += (parts[i].bytes / ALIGNMENT + 1) * ALIGNMENT;
    char *memory = pages->memory = llmc_reserve(pages->memory_bytes);
    if (memory == NULL) return false;
    for (size_t i = 0; i < count; i++) {
        memcpy(parts[i].place, &memory, sizeof memory);
        memory += (parts[i].bytes / ALIGNMENT + 1) * ALIGNMENT;
    }
    pages->seed = any_seed(memory);
    return true;
}

void llmc_pages_close(LlmcPages *pages) {
    llmc_give_back(pages->memory, pages->memory_bytes);
    *pages = (LlmcPages){0};
}

/* Kept pages, linked in the order in which they were left. */

static void add_kept(LlmcPages *pages, int32_t page) {
    pages->older[page] = pages->newest;
    pages->newer[page] = 0;
    if (pages->newest) pages->newer[pages->newest - 1] = page + 1;
    pages->newest = page + 1;
    if (!pages->oldest) pages->oldest = page + 1;
    pages->kept_count++;
}

static void remove_kept(LlmcPages *pages, int32_t page) {
    const int32_t older = pages->older[page], newer = pages->newer[page];
    if (older) pages->newer[older - 1] = newer;
    else pages->oldest = newer;
    if (newer) pages->older[newer - 1] = older;
    else pages->newest = older;
    pages->kept_count--;
}

/* Registered pages, in buckets by the hash of their tokens and their parent. */

static int32_t *bucket_of(const LlmcPages *pages, int64_t parent, const int32_t *tokens) {
    uint64_t hash = mix(pages->seed, (uint64_t)parent);
    for (int64_t i = 0; i < pages->tokens_per_page; i++) hash = mix(hash, (uint32_t)tokens[i]);
    return &pages->buckets[hash & pages->bucket_mask];
}

static int32_t *tokens_of(const LlmcPages *pages, int32_t page) { return pages->tokens + page * pages->tokens_per_page; }

int32_t llmc_pages_find(const LlmcPages *pages, int64_t parent, const int32_t *tokens) {
    const size_t bytes = (size_t)pages->tokens_per_page * sizeof *tokens;
    if (pages->capacity == 0) return -1;
    for (int32_t next = *bucket_of(pages, parent, tokens); next; next = pages->siblings[next - 1]) {
        const int32_t page = next - 1;
        if (pages->parents[page] == parent && memcmp(tokens_of(pages, page), tokens, bytes) == 0) return page;
    }
    return -1;
}

int64_t llmc_pages_register(LlmcPages *pages, int32_t page, int64_t parent, const int32_t *tokens) {
    const int32_t known = llmc_pages_find(pages, parent, tokens);
    if (known >= 0) return pages->serials[known];
    llmc_pages_forget(pages, page);
    int32_t *bucket = bucket_of(pages, parent, tokens);
    memcpy(tokens_of(pages, page), tokens, (size_t)pages->tokens_per_page * sizeof *tokens);
    pages->parents[page] = parent;
    pages->siblings[page] = *bucket;
    *bucket = page + 1;
    return pages->serials[page] = ++pages->last_serial;
}

void llmc_pages_forget(LlmcPages *pages, int32_t page) {
    if (pages->serials[page] == 0) return;
    int32_t *link = bucket_of(pages, pages->parents[page], tokens_of(pages, page));
    while (*link != page + 1) link = &pages->siblings[*link - 1];
    *link = pages->siblings[page];
    pages->serials[page] = 0;
}

int32_t llmc_pages_take(LlmcPages *pages) {
    int32_t page;
    if (pages->free_count > 0) {
        page = pages->free[--pages->free_count];
    } else if (pages->fresh < pages->capacity) {
        page = (int32_t)pages->fresh++;
    } else if (pages->oldest) {
        page = pages->oldest - 1;
        remove_kept(pages, page);
        llmc_pages_forget(pages, page);
    } else {
        return -1;
    }
    pages->users[page] = 1;
    return page;
}

void llmc_pages_share(LlmcPages *pages, int32_t page) {
    if (pages->users[page]++ == 0) remove_kept(pages, page);
}

void llmc_pages_release(LlmcPages *pages, int32_t page) {
    if (--pages->users[page] > 0) return;
    if (pages->serials[page]) add_kept(pages, page);
    else pages->free[pages->free_count++] = page;
}

void llmc_pages_drop_kept(LlmcPages *pages) {
    while (pages->newest) {
        const int32_t page = pages->newest - 1;
        remove_kept(pages, page);
        llmc_pages_forget(pages, page);
        pages->free[pages->free_count++] = page;
    }
}

int64_t llmc_pages_available(const LlmcPages *pages) {
    return pages->free_count + pages->kept_count + pages->capacity - pages->fresh;
}
