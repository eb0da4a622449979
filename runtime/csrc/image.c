/* The artifact's own file: is it that of this code, and where in it are the weights. Read, not mapped: a file that is cut
 * short meanwhile is an error and no signal. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory.h"
#include "model.h"

enum { ALIGNMENT = 64, BUFFER_BYTES = 1 << 14, MOST_NAME_BYTES = 1 << 20, MOST_READ = 1 << 30 };

typedef struct Image {
    const char *path;
    int descriptor;
    int64_t size;
} Image;

static bool is_inside(const Image *image, uint64_t offset, uint64_t bytes) {
    return bytes <= (uint64_t)image->size && offset <= (uint64_t)image->size - bytes;
}

/* Reads a part of the file that is inside of it. */
static bool read_part(const Image *image, void *to, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t count = pread(image->descriptor, to, (size_t)(bytes < MOST_READ ? bytes : MOST_READ), offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        to = (char *)to + count, bytes -= count, offset += count;
    }
    return true;
}

static int unreadable(const Image *image) {
    return llmc_fail(LLMC_ERROR_FILE, "%s cannot be read, or became shorter while it was read", image->path);
}

static int open_image(Image *image, const char *path) {
    struct stat about;
    image->path = path;
    image->descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (image->descriptor < 0) return llmc_fail(LLMC_ERROR_FILE, "%s cannot be opened: %s", path, strerror(errno));
    if (fstat(image->descriptor, &about) != 0 || !S_ISREG(about.st_mode)) {
        close(image->descriptor);
        return llmc_fail(LLMC_ERROR_FILE, "%s is not a file", path);
    }
    image->size = about.st_size;
    return LLMC_OK;
}

/* Whether bytes differ. Between a library's constants there is room that the address sanitizer watches: not here. */
__attribute__((no_sanitize_address)) static bool differ(const char *one, const char *other, uint64_t bytes) {
    char difference = 0;
    for (uint64_t i = 0; i < bytes; i++) difference |= one[i] ^ other[i];
    return difference != 0;
}

/* Whether a part of the file is what lies in memory. */
static bool is_same(const Image *image, const char *memory, uint64_t offset, uint64_t bytes) {
    char buffer[BUFFER_BYTES];
    if (!is_inside(image, offset, bytes)) return false;
    while (bytes > 0) {
        const uint64_t count = bytes < BUFFER_BYTES ? bytes : BUFFER_BYTES;
        if (!read_part(image, buffer, (int64_t)count, (int64_t)offset)) return false;
        if (differ(buffer, memory, count)) return false;
        memory += count, offset += count, bytes -= count;
    }
    return true;
}

/* Whether the file holds this code: everything that is loaded to be read or run, and that the loader does not change. */
static bool is_own(const Image *image, const char *base) {
    const ElfW(Ehdr) *header = (const void *)base;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_phentsize != sizeof(ElfW(Phdr))) return false;
    const ElfW(Phdr) *parts = (const void *)(base + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++) {
        if (parts[i].p_type != PT_LOAD || parts[i].p_flags & PF_W) continue;
        if (!is_same(image, base + parts[i].p_vaddr, parts[i].p_offset, parts[i].p_filesz)) return false;
    }
    return true;
}

/* The section of this name; its type is SHT_NULL where there is none. False where the table cannot be read. */
static bool find_section(const Image *image, const char *wanted, ElfW(Shdr) *found) {
    ElfW(Ehdr) header;
    ElfW(Shdr) names, section;
    *found = (ElfW(Shdr)){.sh_type = SHT_NULL};
    if (!is_inside(image, 0, sizeof header) || !read_part(image, &header, sizeof header, 0)) return false;
    const uint64_t size = sizeof section;
    if (header.e_shentsize != size || header.e_shstrndx >= header.e_shnum) return false;
    if (!is_inside(image, header.e_shoff, size * header.e_shnum)) return false;
    if (!read_part(image, &names, (int64_t)size, (int64_t)(header.e_shoff + size * header.e_shstrndx))) return false;
    if (names.sh_size < 1 || names.sh_size > MOST_NAME_BYTES) return false;
    if (!is_inside(image, names.sh_offset, names.sh_size)) return false;
    char *text = malloc(names.sh_size + 1);
    if (text == NULL) return false;
    bool fine = read_part(image, text, (int64_t)names.sh_size, (int64_t)names.sh_offset);
    text[names.sh_size] = 0;
    for (int i = 0; fine && i < header.e_shnum; i++) {
        fine = read_part(image, &section, (int64_t)size, (int64_t)(header.e_shoff + size * (uint64_t)i));
        if (fine && section.sh_name < names.sh_size && strcmp(text + section.sh_name, wanted) == 0) *found = section;
    }
    free(text);
    return fine;
}

/* Maps or copies `bytes` bytes of the file, which are inside of it. */
static int take_weights(const Image *image, int64_t offset, int64_t bytes, bool copy, LlmcWeights *weights) {
    void *memory;
    if (copy) {
        memory = llmc_reserve_huge(bytes);
        if (memory != NULL && !read_part(image, memory, bytes, offset)) {
            llmc_give_back(memory, bytes);
            return unreadable(image);
        }
        if (memory != NULL) mprotect(memory, (size_t)bytes, PROT_READ); /* nothing writes to them from now on */
    } else {
        memory = mmap(NULL, (size_t)bytes, PROT_READ, MAP_SHARED, image->descriptor, offset);
        if (memory == MAP_FAILED) memory = NULL;
    }
    if (memory == NULL) {
        return llmc_fail(LLMC_ERROR_MEMORY, "there is no room for the %lld bytes of weights of %s", (long long)bytes,
                         image->path);
    }
    *weights = (LlmcWeights){memory, bytes};
    return LLMC_OK;
}

static int own_weights(const Image *image, const char *base, bool elsewhere, bool copy, LlmcWeights *weights) {
    if (!is_own(image, base)) {
        return llmc_fail(LLMC_ERROR_FILE, "%s does not hold the code that runs: give `open` the file that was loaded",
                         image->path);
    }
    if (elsewhere) return LLMC_OK;
    ElfW(Shdr) section;
    if (!find_section(image, ".llmc.weights", &section)) {
        return llmc_fail(LLMC_ERROR_FILE, "%s is damaged: its section table cannot be read", image->path);
    }
    if (section.sh_type == SHT_NULL || section.sh_size == 0) {
        return llmc_fail(LLMC_ERROR_FILE, "%s was compiled without weights: name their file in LlmcOptions.weights",
                         image->path);
    }
    if (section.sh_size != (uint64_t)llmc_facts.weights_bytes || section.sh_offset % (uint64_t)sysconf(_SC_PAGESIZE) ||
        !is_inside(image, section.sh_offset, section.sh_size)) {
        return llmc_fail(LLMC_ERROR_FILE, "%s is damaged: its weights are not those of its code", image->path);
    }
    return take_weights(image, (int64_t)section.sh_offset, (int64_t)section.sh_size, copy, weights);
}

static int external_weights(const char *path, bool copy, LlmcWeights *weights) {
    Image image;
    int code = open_image(&image, path);
    if (code != LLMC_OK) return code;
    if (image.size != llmc_facts.weights_bytes) {
        code = llmc_fail(LLMC_ERROR_FILE, "%s does not hold the %lld bytes of weights that the artifact needs", path,
                         (long long)llmc_facts.weights_bytes);
    } else {
        code = take_weights(&image, 0, llmc_facts.weights_bytes, copy, weights);
    }
    close(image.descriptor);
    return code;
}

int llmc_open_weights(const char *path, const char *external, bool copy, LlmcWeights *weights, const void **place) {
    static const _Alignas(ALIGNMENT) char nothing[1];
    const bool elsewhere = external != NULL || llmc_facts.weights_bytes == 0;
    Dl_info about;
    Image image;
    if (dladdr((const void *)&llmc_facts, &about) == 0) {
        return llmc_fail(LLMC_ERROR_FILE, "the loader does not know which file this code is from");
    }
    int code = open_image(&image, path == NULL ? about.dli_fname : path);
    if (code != LLMC_OK) return code;
    code = own_weights(&image, about.dli_fbase, elsewhere, copy, weights);
    close(image.descriptor);
    if (code == LLMC_OK && external != NULL && llmc_facts.weights_bytes > 0) {
        code = external_weights(external, copy, weights);
    }
    *place = weights->memory == NULL ? nothing : weights->memory;
    return code;
}
