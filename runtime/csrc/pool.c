/* A fork-join thread pool for steps made of hundreds of short parallel loops.
 *
 * A loop is a job. Its owner opens it, works on it, closes it, and waits only for those workers that joined: a worker
 * that the system keeps off its core costs nothing. Workers spin a short while for the next job, then give way to other
 * processes, then sleep on a futex.
 *
 * Every thread starts with a slice of its own, so that what it reads is one stream, and takes it in pieces from the
 * front. Who is done takes half of what another has left, from the end: a busy core does less, an absent one nothing,
 * and all finish together.
 *
 * The job word `state` holds OPEN, the number of helpers wanted and the number inside. A worker joins by raising the
 * last with a compare-and-swap that fails once the job is closed; the fields of a job change only while it is closed
 * and nobody is inside. */
#define _GNU_SOURCE
#include "pool.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <link.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    CACHE_LINE = 64,
    MOST_WORKERS = 1023,
    STACK_BYTES = 2 << 20, /* of a worker, at least */
    SPIN_NANOSECONDS = 30000,       /* pause loops before giving way: about one futex wake-up */
    YIELD_NANOSECONDS = 60000,      /* then sched_yield until this long after the last work, then sleep */
    GIVE_WAY_NANOSECONDS = 1000000, /* how often a worker gives way between jobs, while it holds nothing */
    PIECES = 4,                     /* a thread takes this part of what is left of its slice */
};

#define OPEN (UINT64_C(1) << 63)
#define WANTED_SHIFT 32
#define INSIDE_MASK UINT64_C(0xffffffff)

/* What is left of a thread's part of the job, in blocks of `grain` units: begin << 32 | end. */
typedef struct Slice {
    _Alignas(CACHE_LINE) _Atomic uint64_t blocks;
} Slice;

struct LlmcPool {
    /* Stable across versions: how any artifact runs a job, and how it takes its turn. */
    void (*parallel)(LlmcPool *pool, LlmcBody body, void *context, int64_t units, int64_t grain);
    void (*enter)(LlmcPool *pool, int64_t threads);
    void (*leave)(LlmcPool *pool);

    pthread_mutex_t turn; /* held by the thread that owns the jobs */
    int64_t threads;      /* threads of the turn's owner, itself included */
    int64_t workers;      /* workers started so far */
    _Atomic int64_t named; /* of these, the ones that know their number */
    LlmcPool *next;       /* all pools of this artifact, for the fork handler */

    LlmcBody body;
    void *context;
    int64_t units;
    int64_t grain;

    _Alignas(CACHE_LINE) _Atomic uint64_t state;
    _Alignas(CACHE_LINE) _Atomic uint32_t epoch; /* raised for every job: what workers watch and sleep on */
    _Atomic int32_t sleepers;

    Slice slices[MOST_WORKERS + 1]; /* by thread: 0 is the owner's */
};

static _Atomic(LlmcPool *) current;
static LlmcPool *created;
static pthread_mutex_t creation = PTHREAD_MUTEX_INITIALIZER;

/* Whether this thread is inside a body: then loops run inline, and it takes no turn, which its owner has. */
static _Thread_local bool inside_body;
/* The pool whose turn this thread has, and how often it took one: what asks again is part of the first. */
static _Thread_local LlmcPool *turn_of;
static _Thread_local int64_t turns;

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static uint64_t range_of(uint64_t begin, uint64_t end) { return begin << 32 | end; }

static uint64_t begin_of(uint64_t range) { return range >> 32; }

static uint64_t end_of(uint64_t range) { return range & UINT32_MAX; }

static void run_blocks(const LlmcPool *pool, uint64_t begin, uint64_t end) {
    int64_t last = (int64_t)end * pool->grain;
    pool->body(pool->context, (int64_t)begin * pool->grain, last < pool->units ? last : pool->units);
}

static bool replace(Slice *slice, uint64_t *seen, uint64_t range) {
    return atomic_compare_exchange_weak_explicit(&slice->blocks, seen, range, memory_order_relaxed,
                                                 memory_order_relaxed);
}

/* Works on the thread's own slice until it is empty. The pieces are one after the other in memory, so that many cost
 * little more than one; the smaller they are, the more is left for others to take when this thread is slow. */
static void finish_slice(LlmcPool *pool, Slice *own) {
    for (;;) {
        uint64_t range = atomic_load_explicit(&own->blocks, memory_order_relaxed), middle;
        do {
            uint64_t left = end_of(range) - begin_of(range);
            if (left == 0) return;
            middle = begin_of(range) + (left + PIECES - 1) / PIECES;
        } while (!replace(own, &range, range_of(middle, end_of(range))));
        run_blocks(pool, begin_of(range), middle);
    }
}

/* Takes the second half of what some other thread has left. False when there is nothing left anywhere. */
static bool take_over(LlmcPool *pool, int64_t threads, int64_t self) {
    for (int64_t i = 1; i <= threads; i++) {
        Slice *other = &pool->slices[(self + i) % threads];
        uint64_t range = atomic_load_explicit(&other->blocks, memory_order_relaxed), middle;
        do {
            middle = (begin_of(range) + end_of(range)) / 2;
        } while (middle < end_of(range) && !replace(other, &range, range_of(begin_of(range), middle)));
        if (middle == end_of(range)) continue;
        if (self >= threads) { /* a worker beyond those that were asked for, in place of one: it has no slice */
            run_blocks(pool, middle, end_of(range));
        } else {
            atomic_store_explicit(&pool->slices[self].blocks, range_of(middle, end_of(range)), memory_order_relaxed);
            finish_slice(pool, &pool->slices[self]);
        }
        return true;
    }
    return false;
}

static void work(LlmcPool *pool, int64_t threads, int64_t self) {
    if (self < threads) finish_slice(pool, &pool->slices[self]);
    while (take_over(pool, threads, self)) continue;
}

/* Joins the open job, if there is one that wants help, and works on it. */
static bool join_job(LlmcPool *pool, int64_t self) {
    uint64_t state = atomic_load_explicit(&pool->state, memory_order_acquire);
    do {
        uint64_t wanted = (state & ~OPEN) >> WANTED_SHIFT;
        if (!(state & OPEN) || (state & INSIDE_MASK) >= wanted) return false;
    } while (!atomic_compare_exchange_weak_explicit(&pool->state, &state, state + 1, memory_order_acq_rel,
                                                    memory_order_acquire));
    work(pool, (int64_t)((state & ~OPEN) >> WANTED_SHIFT) + 1, self);
    atomic_fetch_sub_explicit(&pool->state, 1, memory_order_release);
    return true;
}

static void *worker(void *argument) {
    LlmcPool *pool = argument;
    const int64_t self = atomic_fetch_add(&pool->named, 1) + 1;
    uint32_t seen = atomic_load_explicit(&pool->epoch, memory_order_acquire);
    int64_t last_work = now(), gave_way = last_work;
    inside_body = true;
    join_job(pool, self);
    for (;;) {
        /* Look for a new job: spin, then give way, then sleep. A job that needs no more help does not count as work,
         * so that workers which a smaller run leaves idle go to sleep. */
        int64_t waited = 0;
        for (unsigned round = 1; atomic_load_explicit(&pool->epoch, memory_order_acquire) == seen; round++) {
            if (waited < SPIN_NANOSECONDS) {
                relax();
                if (round % 32 == 0) waited = now() - last_work;
            } else if (waited < YIELD_NANOSECONDS) {
                sched_yield();
                waited = now() - last_work;
            } else {
                atomic_fetch_add(&pool->sleepers, 1);
                futex_wait(&pool->epoch, seen);
                atomic_fetch_sub(&pool->sleepers, 1);
                /* Woken for a job: worth spinning again afterwards. A spurious wake-up only spins once more. */
                last_work = now();
                waited = 0;
            }
        }
        seen = atomic_load_explicit(&pool->epoch, memory_order_acquire);
        if (join_job(pool, self)) last_work = now();
        /* Where another process wants this core, it gets it now and not in the middle of a piece that all wait for. */
        if (last_work - gave_way > GIVE_WAY_NANOSECONDS) {
            sched_yield();
            gave_way = now();
        }
    }
    return NULL;
}

/* Starts workers until there are `wanted`. A system that refuses threads leaves the pool smaller, not broken. */
static void start_workers(LlmcPool *pool, int64_t wanted) {
    if (wanted > MOST_WORKERS) wanted = MOST_WORKERS;
    if (pool->workers >= wanted) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* workers leave signals to the program's own threads */
    pthread_attr_t attributes;
    size_t stack = 0;
    pthread_attr_init(&attributes);
    if (pthread_attr_getstacksize(&attributes, &stack) == 0 && stack < STACK_BYTES) {
        pthread_attr_setstacksize(&attributes, STACK_BYTES); /* kernels keep up to some hundred KiB there */
    }
    while (pool->workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker, pool) != 0) break;
        pthread_detach(thread);
        pool->workers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void run_job(LlmcPool *pool, LlmcBody body, void *context, int64_t units, int64_t grain) {
    if (units <= 0) return;
    if (grain < 1) grain = 1;
    if (units / grain >= UINT32_MAX) grain = units / UINT32_MAX + 1; /* blocks are counted in 32 bits */
    int64_t helpers = units / grain - 1;
    if (helpers > pool->threads - 1) helpers = pool->threads - 1;
    if (helpers > pool->workers) helpers = pool->workers;
    if (inside_body || turn_of != pool || helpers <= 0) {
        body(context, 0, units);
        return;
    }
    pool->body = body;
    pool->context = context;
    pool->units = units;
    pool->grain = grain;
    uint64_t blocks = (uint64_t)((units + grain - 1) / grain), threads = (uint64_t)helpers + 1;
    for (uint64_t i = 0; i < threads; i++) {
        uint64_t slice = range_of(blocks * i / threads, blocks * (i + 1) / threads);
        atomic_store_explicit(&pool->slices[i].blocks, slice, memory_order_relaxed);
    }
    atomic_store(&pool->state, OPEN | (uint64_t)helpers << WANTED_SHIFT);
    /* Sequentially consistent against a worker's "count me as asleep, then look at the epoch". */
    atomic_fetch_add(&pool->epoch, 1);
    int64_t missing = helpers - (pool->workers - atomic_load(&pool->sleepers));
    if (missing > 0) futex_wake(&pool->epoch, (int)missing);

    inside_body = true;
    work(pool, helpers + 1, 0);
    inside_body = false;

    atomic_fetch_and_explicit(&pool->state, ~OPEN, memory_order_acq_rel);
    int64_t start = 0;
    for (unsigned round = 1; atomic_load_explicit(&pool->state, memory_order_acquire) & INSIDE_MASK; round++) {
        if (round < 256) {
            relax();
        } else if (start == 0 || now() - start < SPIN_NANOSECONDS) {
            if (start == 0) start = now();
            relax();
        } else {
            sched_yield(); /* the worker we wait for may be waiting for our core */
        }
    }
}

/* A thread that waited for a turn while it has one would wait for itself; and a body, for the thread that waits for it.
 * Both go on within the turn there is: so does who asks for a second pool, whose loops then run on this thread. */
static void enter(LlmcPool *pool, int64_t threads) {
    if (inside_body || turns++) return;
    pthread_mutex_lock(&pool->turn);
    turn_of = pool;
    pool->threads = threads < 1 ? 1 : threads;
    start_workers(pool, pool->threads - 1);
}

static void leave(LlmcPool *pool) {
    (void)pool;
    if (inside_body || turns == 0 || --turns) return;
    LlmcPool *own = turn_of;
    turn_of = NULL;
    pthread_mutex_unlock(&own->turn);
}

/* After fork the child has this thread only: its pools start over, with workers of their own when first needed. */
static void restart_in_child(void) {
    for (LlmcPool *pool = created; pool != NULL; pool = pool->next) {
        pthread_mutex_init(&pool->turn, NULL);
        pool->workers = 0;
        atomic_store(&pool->named, 0);
        atomic_store(&pool->state, 0);
        atomic_store(&pool->sleepers, 0);
    }
    turn_of = NULL;
    turns = 0;
    inside_body = false;
    pthread_mutex_init(&creation, NULL);
}

static pthread_once_t fork_handler = PTHREAD_ONCE_INIT;

static void add_fork_handler(void) { pthread_atfork(NULL, NULL, restart_in_child); }

/* The loaded object that this code is part of: what the search looks for, and finds. */
typedef struct Object {
    uintptr_t address;
    const char *name; /* NULL: the program itself, or nothing */
    int seen;
} Object;

static int find_object(struct dl_phdr_info *info, size_t size, void *context) {
    Object *object = context;
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        uintptr_t offset = object->address - info->dlpi_addr - header->p_vaddr;
        if (header->p_type != PT_LOAD || offset >= header->p_memsz) continue;
        if (object->seen > 0) object->name = info->dlpi_name; /* the program comes first, under any name */
        return 1;
    }
    object->seen++;
    return 0;
}

/* Workers run this code, and other artifacts call it through their pool, until the process ends: so the library that
 * it is in stays loaded from now on. Others, which make no pool, may go. False where the loader does not know it. */
static bool stay_loaded(void) {
    Object self = {(uintptr_t)worker, NULL, 0};
    if (!dl_iterate_phdr(find_object, &self)) return false;
    return self.name == NULL || dlopen(self.name, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE) != NULL;
}

LlmcPool *llmc_pool_create(void) {
    if (!stay_loaded()) return NULL;
    LlmcPool *pool = aligned_alloc(CACHE_LINE, (sizeof(LlmcPool) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
    if (pool == NULL) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->parallel = run_job;
    pool->enter = enter;
    pool->leave = leave;
    pthread_mutex_init(&pool->turn, NULL);
    pool->threads = 1;
    pthread_once(&fork_handler, add_fork_handler);
    pthread_mutex_lock(&creation);
    pool->next = created;
    created = pool;
    pthread_mutex_unlock(&creation);
    llmc_pool_use(pool);
    return pool;
}

void llmc_pool_use(LlmcPool *pool) { atomic_store_explicit(&current, pool, memory_order_release); }

void llmc_parallel(LlmcBody body, void *context, int64_t units, int64_t grain) {
    LlmcPool *pool = atomic_load_explicit(&current, memory_order_acquire);
    if (pool == NULL) {
        if (units > 0) body(context, 0, units); /* nobody made a pool: one thread */
        return;
    }
    pool->parallel(pool, body, context, units, grain);
}

/* `current` is read once: a pool that is set during a step serves the next one. */
LlmcPool *llmc_take_turn(int64_t threads) {
    LlmcPool *pool = atomic_load_explicit(&current, memory_order_acquire);
    if (pool != NULL) pool->enter(pool, threads);
    return pool;
}

void llmc_end_turn(LlmcPool *pool) {
    if (pool != NULL) pool->leave(pool);
}

int llmc_run(const LlmcStep *step, int64_t threads) {
    LlmcPool *pool = llmc_take_turn(threads);
    int code = llmc_step(step);
    llmc_end_turn(pool);
    return code;
}

typedef struct HashJob {
    const unsigned char *data;
    int64_t bytes;
    uint64_t *out;
} HashJob;

/* Both constants are odd, so that each step is a bijection of what it takes in: one changed word changes its lane for
 * good, and one changed lane changes the result. `compiler/artifact.py` computes the same with numpy. */
#define LANE_FACTOR UINT64_C(0x9E3779B97F4A7C15)
#define FOLD_FACTOR UINT64_C(0xD6E8FEB86659FD93)

static uint64_t mix(uint64_t sum, uint64_t word, uint64_t factor) {
    sum = (sum ^ word) * factor;
    return sum ^ (sum >> 32);
}

static void mix_lanes(uint64_t *restrict lanes, const unsigned char *data) {
    for (int lane = 0; lane < LLMC_HASH_LANES; lane++) {
        uint64_t word;
        memcpy(&word, data + 8 * lane, 8);
        lanes[lane] = mix(lanes[lane], word, LANE_FACTOR);
    }
}

static uint64_t hash_chunk(const unsigned char *data, int64_t bytes) {
    uint64_t lanes[LLMC_HASH_LANES];
    for (int lane = 0; lane < LLMC_HASH_LANES; lane++) lanes[lane] = (uint64_t)lane;
    const int64_t block = 8 * LLMC_HASH_LANES;
    int64_t done = 0;
    for (; bytes - done >= block; done += block) mix_lanes(lanes, data + done);
    if (done < bytes) { /* the last block, filled up with zeros; the length tells it from real zeros */
        unsigned char last[8 * LLMC_HASH_LANES] = {0};
        memcpy(last, data + done, (size_t)(bytes - done));
        mix_lanes(lanes, last);
    }
    uint64_t sum = (uint64_t)bytes;
    for (int lane = 0; lane < LLMC_HASH_LANES; lane++) sum = mix(sum, lanes[lane], FOLD_FACTOR);
    return sum;
}

static void hash_body(void *context, int64_t begin, int64_t end) {
    const HashJob *job = context;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t start = chunk * LLMC_HASH_CHUNK;
        int64_t bytes = job->bytes - start;
        job->out[chunk] = hash_chunk(job->data + start, bytes < LLMC_HASH_CHUNK ? bytes : LLMC_HASH_CHUNK);
    }
}

void llmc_hash(const void *data, int64_t bytes, uint64_t *out, int64_t threads) {
    HashJob job = {data, bytes, out};
    LlmcPool *pool = llmc_take_turn(threads);
    llmc_parallel(hash_body, &job, (bytes + LLMC_HASH_CHUNK - 1) / LLMC_HASH_CHUNK, 1);
    llmc_end_turn(pool);
}

int64_t llmc_abi(void) { return LLMC_ABI; }
