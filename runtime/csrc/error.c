/* The text of the last error of each thread; and structs that grow. */
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "model.h"

enum { MOST_STRUCT_BYTES = 1 << 16 };

static _Thread_local char text[512];

int llmc_fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return code;
}

void llmc_no_error(void) { text[0] = 0; }

const char *llmc_error(void) { return text; }

int llmc_read_struct(void *to, int64_t size, const void *from, const char *name) {
    memset(to, 0, (size_t)size);
    if (from == NULL) return LLMC_OK;
    int64_t given;
    memcpy(&given, from, sizeof given);
    if (given < (int64_t)sizeof given || given > MOST_STRUCT_BYTES) {
        return llmc_fail(LLMC_ERROR_ARGUMENT, "%s.bytes is %lld: it has to be sizeof(%s)", name, (long long)given, name);
    }
    for (int64_t i = size; i < given; i++) {
        if (((const char *)from)[i] != 0) {
            return llmc_fail(LLMC_ERROR_UNSUPPORTED,
                             "%s has a field that this artifact does not know: compile the model again", name);
        }
    }
    memcpy(to, from, (size_t)(given < size ? given : size));
    return LLMC_OK;
}
