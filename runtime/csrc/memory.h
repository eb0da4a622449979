/* Memory as steps want it: zeroed, page-aligned, and backed only where it is touched. */
#ifndef LLMC_MEMORY_H
#define LLMC_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

/* NULL where the address space is not there. Of 0 bytes it gives a place too, so that a pointer is there. */
void *llmc_reserve(int64_t bytes);
/* The same, in huge pages where the system has them. */
void *llmc_reserve_huge(int64_t bytes);
/* What was reserved; NULL is nothing. */
void llmc_give_back(void *memory, int64_t bytes);

#endif
