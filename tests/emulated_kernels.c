/* Calls kernels of shared libraries on arrays in a shared file, for tests under an emulator: emulated_kernels FILE.
 * A line of stdin is LIBRARY SYMBOL ARGUMENT...; an argument is "pN", the address of byte N of the file, or "iN", a
 * number. Each is answered by a line "done". Kernels take pointers and int64 only, so that every argument is one 64-bit
 * word; those behind the last are not looked at. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { MOST = 32, LINE = 1 << 16 };
#define W(n) words[n], words[n + 1], words[n + 2], words[n + 3], words[n + 4], words[n + 5], words[n + 6], words[n + 7]
typedef int64_t T;
typedef void Kernel(T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T, T);

static int fail(const char *why) {
    printf("failed: %s\n", why);
    return 1;
}

int main(int count, char **arguments) {
    static char line[LINE];
    struct stat about;
    const int file = count == 2 ? open(arguments[1], O_RDWR) : -1;
    if (file < 0 || fstat(file, &about) != 0) return fail("no file");
    char *memory = mmap(NULL, (size_t)about.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return fail("no memory");
    while (fgets(line, LINE, stdin) != NULL) {
        const char *path = strtok(line, " \n"), *symbol = strtok(NULL, " \n"), *word;
        void *library = dlopen(path, RTLD_NOW);
        if (library == NULL) return fail(dlerror());
        Kernel *kernel = (Kernel *)dlsym(library, symbol);
        if (kernel == NULL) return fail(dlerror());
        T words[MOST] = {0};
        for (int i = 0; (word = strtok(NULL, " \n")) != NULL; i++) {
            if (i == MOST) return fail("too many arguments");
            const T value = strtoll(word + 1, NULL, 10);
            words[i] = *word == 'p' ? (T)(memory + value) : value;
        }
        kernel(W(0), W(8), W(16), W(24));
        puts("done");
        fflush(stdout);
    }
    return 0;
}
