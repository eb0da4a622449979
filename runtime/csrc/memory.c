/* See memory.h. */
#define _GNU_SOURCE
#include "memory.h"

#include <stddef.h>
#include <sys/mman.h>

static int64_t whole(int64_t bytes) { return bytes < 1 ? 1 : bytes; }

void *llmc_reserve(int64_t bytes) {
    void *memory = mmap(NULL, (size_t)whole(bytes), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void *llmc_reserve_huge(int64_t bytes) {
    void *memory = llmc_reserve(bytes);
#ifdef MADV_HUGEPAGE
    if (memory != NULL) madvise(memory, (size_t)whole(bytes), MADV_HUGEPAGE); /* where it is refused: small pages */
#endif
    return memory;
}

void llmc_give_back(void *memory, int64_t bytes) {
    if (memory != NULL) munmap(memory, (size_t)whole(bytes));
}
