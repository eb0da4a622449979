/* What this machine has: looked at before any kernel runs, as an instruction that is missing kills the process. */
#define _GNU_SOURCE
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "model.h"

#if defined(__aarch64__)
/* Bits that the kernel gives a process when it begins (arch/arm64/include/uapi/asm/hwcap.h), by its own names of them. */
static const struct Bit {
    const char *flag;
    unsigned long kind;
    int place;
} bits[] = {{"asimd", AT_HWCAP, 1},    {"asimdhp", AT_HWCAP, 10}, {"asimddp", AT_HWCAP, 20}, {"fp", AT_HWCAP, 0},
            {"atomics", AT_HWCAP, 8}, {"i8mm", AT_HWCAP2, 13},   {"bf16", AT_HWCAP2, 14}};

/* The first feature of the facts that the CPU lacks; NULL: it has all, or `unknown` is set. */
static const char *missing_feature(bool *unknown) {
    *unknown = false;
    for (int64_t i = 0; i < llmc_facts.feature_count; i++) {
        bool has = false;
        for (size_t j = 0; j < sizeof bits / sizeof *bits; j++) {
            if (strcmp(bits[j].flag, llmc_facts.features[i].flag) == 0) has = getauxval(bits[j].kind) >> bits[j].place & 1;
        }
        if (!has) return llmc_facts.features[i].name;
    }
    return NULL;
}
#else
/* Whether a word of `length` bytes is a flag, underscores aside: avx512_vnni, avx512vnni. */
static bool is_flag(const char *word, size_t length, const char *flag) {
    const char *end = word + length;
    for (;;) {
        while (word < end && *word == '_') word++;
        while (*flag == '_') flag++;
        if (word == end || *flag == 0) return word == end && *flag == 0;
        if (*word++ != *flag++) return false;
    }
}

static bool has_flag(const char *line, const char *flag) {
    for (;;) {
        line += strspn(line, " \t\n");
        const size_t length = strcspn(line, " \t\n");
        if (length == 0) return false;
        if (is_flag(line, length, flag)) return true;
        line += length;
    }
}

/* The flags of the first CPU in /proc/cpuinfo, to be freed; Linux shows the same for all. NULL: not known. */
static char *cpu_flags(void) {
    FILE *file = fopen("/proc/cpuinfo", "re");
    if (file == NULL) return NULL;
    char *line = NULL, *found = NULL;
    size_t room = 0;
    while (found == NULL && getline(&line, &room, file) > 0) {
        char *colon = strchr(line, ':');
        if (colon != NULL && (strncmp(line, "flags", 5) == 0 || strncmp(line, "Features", 8) == 0)) {
            found = strdup(colon + 1);
        }
    }
    free(line);
    fclose(file);
    return found;
}

/* The first feature of the facts that the CPU lacks; NULL: it has all, or `unknown` is set. */
static const char *missing_feature(bool *unknown) {
    char *flags = llmc_facts.feature_count > 0 ? cpu_flags() : NULL;
    const char *found = NULL;
    *unknown = llmc_facts.feature_count > 0 && flags == NULL;
    for (int64_t i = 0; flags != NULL && found == NULL && i < llmc_facts.feature_count; i++) {
        if (!has_flag(flags, llmc_facts.features[i].flag)) found = llmc_facts.features[i].name;
    }
    free(flags);
    return found;
}
#endif

/* Asks Linux to let this process use tile registers; the answer holds for all of its threads. */
static bool tiles_allowed(void) {
#if defined(__x86_64__)
    enum { ARCH_PRCTL = 158, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

int llmc_check_machine(void) {
    bool unknown;
    const char *missing = missing_feature(&unknown);
    if (unknown) return llmc_fail(LLMC_ERROR_MACHINE, "what this CPU has is not known: /proc/cpuinfo cannot be read");
    if (missing != NULL) {
        return llmc_fail(LLMC_ERROR_MACHINE,
                         "the artifact needs %s, which this CPU does not have: compile the model for this machine", missing);
    }
    if (llmc_facts.tile_registers && !tiles_allowed()) {
        return llmc_fail(LLMC_ERROR_MACHINE, "the artifact needs AMX tile registers, and Linux does not give them to "
                                             "this process: compile the model for a machine without");
    }
    return LLMC_OK;
}

int64_t llmc_usable_cpus(void) {
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
    const long online = sysconf(_SC_NPROCESSORS_ONLN); /* more CPUs than a cpu_set_t has room for */
    return online < 1 ? 1 : online;
}
