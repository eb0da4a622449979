/* Ends a test program that finds something not so, naming the place. */
#ifndef LLMC_TESTS_CHECK_H
#define LLMC_TESTS_CHECK_H

#include <stdio.h>
#include <unistd.h>

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            _exit(1); \
        } \
    } while (0)

#endif
