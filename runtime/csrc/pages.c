/* See pages.h. */
#include "pages.h"

#include <stddef.h>

#include "memory.h"

bool llmc_pages_open(LlmcPages *pages, int64_t capacity) {
    *pages = (LlmcPages){.capacity = capacity};
    pages->free = llmc_reserve(capacity * (int64_t)sizeof(int32_t));
    pages->users = llmc_reserve(capacity * (int64_t)sizeof(int32_t));
    if (pages->free != NULL && pages->users != NULL) return true;
    llmc_pages_close(pages);
    return false;
}

void llmc_pages_close(LlmcPages *pages) {
    llmc_give_back(pages->free, pages->capacity * (int64_t)sizeof(int32_t));
    llmc_give_back(pages->users, pages->capacity * (int64_t)sizeof(int32_t));
    *pages = (LlmcPages){0};
}

int32_t llmc_pages_take(LlmcPages *pages) {
    int32_t page;
    if (pages->free_count > 0) {
        page = pages->free[--pages->free_count];
    } else if (pages->fresh < pages->capacity) {
        page = (int32_t)pages->fresh++;
    } else {
        return -1;
    }
    pages->users[page] = 1;
    return page;
}

void llmc_pages_share(LlmcPages *pages, int32_t page) { pages->users[page]++; }

void llmc_pages_release(LlmcPages *pages, int32_t page) {
    if (--pages->users[page] == 0) pages->free[pages->free_count++] = page;
}

int64_t llmc_pages_available(const LlmcPages *pages) {
    return pages->free_count + pages->capacity - pages->fresh;
}
