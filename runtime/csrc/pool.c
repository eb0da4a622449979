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
 * What a loop costs must not grow with the square of the threads (docs/adr/0016). So:
 * - The owner writes two cache lines to open a job, however many threads there are: the description and the word `job`,
 *   which holds the job's serial number and its number of threads, and which workers watch. Slices and groups carry the
 *   serial that they were last written for. One of an earlier job stands for what the present job starts with.
 * - Threads are in groups of eight. A worker joins and leaves in the word of its group: two bits for each member say
 *   whether it has joined and whether it has left. The owner closes a group by setting both for all that did not join.
 * - A worker looks for work at the others of its group, and at one thread of each group whose number differs from its
 *   own in one bit. The owner looks everywhere before it closes a group, so that no slice is left over.
 *
 * The description changes only while every group of the last job is closed and all who joined have left. */
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

#ifndef LLMC_POOL_GROUP /* fewer in tests: 2, 4 or 8 */
#define LLMC_POOL_GROUP 8
#endif

enum {
    CACHE_LINE = 64,
    MOST_WORKERS = 1023,
    STACK_BYTES = 2 << 20, /* of a worker, at least */
    SPIN_NANOSECONDS = 30000,       /* pause loops before giving way: about one futex wake-up */
    YIELD_NANOSECONDS = 60000,      /* then sched_yield until this long after the last work, then sleep */
    GIVE_WAY_NANOSECONDS = 1000000, /* how often a worker gives way between jobs, while it holds nothing */
    PIECES = 4,                     /* a thread takes this part of what is left of its slice */
    GROUP = LLMC_POOL_GROUP,        /* threads that join at one word */
    GROUPS = (MOST_WORKERS + GROUP) / GROUP,
    WOKEN = 4,                      /* sleepers that one thread wakes; these wake the others */
    LEVELS = 10,                    /* of sleepers: worker n is at the level of n's highest bit */
};

/* Tests define this as a function's name, and count which cache lines move between threads that do not sleep. */
#ifdef LLMC_POOL_TOUCH
void LLMC_POOL_TOUCH(const void *address, int writes);
#else
#define LLMC_POOL_TOUCH(address, writes) ((void)0)
#endif

/* `job`: threads << 48 | serial. A group: joined << 56 | left << 48 | serial. The serials last for nine years at a
 * million jobs a second. */
#define SERIAL_BITS 48
#define SERIAL_MASK ((UINT64_C(1) << SERIAL_BITS) - 1)
#define LEFT_SHIFT SERIAL_BITS
#define JOINED_SHIFT (SERIAL_BITS + GROUP)
#define MEMBERS ((UINT64_C(1) << GROUP) - 1)

/* What is left of a thread's part of the job, in blocks of `grain` units: begin << 44 | end << 24 | tag. The tag is the
 * end of the job's serial, and never 0: when it has been through all its values, all slices are set to 0. */
#ifndef LLMC_POOL_TAG_BITS /* fewer in tests */
#define LLMC_POOL_TAG_BITS 24
#endif
#define TAG_MASK ((UINT64_C(1) << LLMC_POOL_TAG_BITS) - 1)
#define END_SHIFT 24
#define BEGIN_SHIFT 44
#define MOST_BLOCKS ((INT64_C(1) << (BEGIN_SHIFT - END_SHIFT)) - 1)

typedef struct Slice {
    _Alignas(CACHE_LINE) _Atomic uint64_t blocks;
} Slice;

typedef struct Group {
    _Alignas(CACHE_LINE) _Atomic uint64_t members;
} Group;

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

    /* The description of the job, in a line of its own. */
    _Alignas(CACHE_LINE) LlmcBody body;
    void *context;
    int64_t units;
    int64_t grain;
    uint64_t share; /* blocks that each thread starts with, */
    uint64_t extra; /* and how many threads, the first ones, have one more */
    uint64_t tag;

    _Alignas(CACHE_LINE) _Atomic uint64_t job; /* what workers watch, and sleep on */
    _Alignas(CACHE_LINE) _Atomic int32_t sleepers[LEVELS];

    Group groups[GROUPS];
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

/* The half of `job` that changes with every job: futexes have 32 bits. */
static void *futex_of(LlmcPool *pool) {
    return (char *)&pool->job + (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0 : sizeof(uint32_t));
}

static int level_of(int64_t worker) { return 63 - __builtin_clzll((uint64_t)worker); }

/* Sleeps until woken, unless there is a new job already. */
static void sleep_at(LlmcPool *pool, int64_t self, uint64_t seen) {
    const int level = level_of(self);
    atomic_fetch_add(&pool->sleepers[level], 1);
    syscall(SYS_futex, futex_of(pool), FUTEX_WAIT_BITSET_PRIVATE, (uint32_t)seen, NULL, NULL, 1u << level);
    atomic_fetch_sub(&pool->sleepers[level], 1);
}

/* Wakes some of the workers that a job of so many threads wants, if any sleep. Those that are woken do the same, so
 * that the owner can begin; of the last level some may be woken for nothing. */
static void wake(LlmcPool *pool, int64_t threads) {
    if (threads < 2) return;
    const int level = level_of(threads - 1);
    int32_t asleep = 0;
    LLMC_POOL_TOUCH(&pool->sleepers, 0);
    for (int i = 0; i <= level; i++) asleep += atomic_load(&pool->sleepers[i]);
    if (asleep <= 0) return;
    const int count = asleep < WOKEN ? asleep : WOKEN;
    syscall(SYS_futex, futex_of(pool), FUTEX_WAKE_BITSET_PRIVATE, count, NULL, NULL, (2u << level) - 1);
}

static int64_t threads_of(uint64_t job) { return (int64_t)(job >> SERIAL_BITS); }

static uint64_t begin_of(uint64_t range) { return range >> BEGIN_SHIFT; }

static uint64_t end_of(uint64_t range) { return range >> END_SHIFT & (uint64_t)MOST_BLOCKS; }

static uint64_t range_of(const LlmcPool *pool, uint64_t begin, uint64_t end) {
    return begin << BEGIN_SHIFT | end << END_SHIFT | pool->tag;
}

/* What a thread has left, if this is what its slice holds. */
static uint64_t range_in(const LlmcPool *pool, int64_t thread, uint64_t blocks) {
    if ((blocks & ((UINT64_C(1) << END_SHIFT) - 1)) == pool->tag) return blocks;
    const uint64_t number = (uint64_t)thread, begin = number * pool->share;
    if (number < pool->extra) return range_of(pool, begin + number, begin + number + pool->share + 1);
    return range_of(pool, begin + pool->extra, begin + pool->extra + pool->share);
}

static void run_blocks(const LlmcPool *pool, uint64_t begin, uint64_t end) {
    int64_t last = (int64_t)end * pool->grain;
    pool->body(pool->context, (int64_t)begin * pool->grain, last < pool->units ? last : pool->units);
}

static uint64_t look(Slice *slice) {
    LLMC_POOL_TOUCH(slice, 0);
    return atomic_load_explicit(&slice->blocks, memory_order_relaxed);
}

static bool replace(Slice *slice, uint64_t *seen, uint64_t range) {
    LLMC_POOL_TOUCH(slice, 1);
    return atomic_compare_exchange_weak_explicit(&slice->blocks, seen, range, memory_order_relaxed,
                                                 memory_order_relaxed);
}

/* Works on the thread's own slice until it is empty. The pieces are one after the other in memory, so that many cost
 * little more than one; the smaller they are, the more is left for others to take when this thread is slow. */
static void finish_slice(LlmcPool *pool, int64_t self) {
    Slice *own = &pool->slices[self];
    for (;;) {
        uint64_t seen = look(own), range, middle;
        do {
            range = range_in(pool, self, seen);
            uint64_t left = end_of(range) - begin_of(range);
            if (left == 0) return;
            middle = begin_of(range) + (left + PIECES - 1) / PIECES;
        } while (!replace(own, &seen, range_of(pool, middle, end_of(range))));
        run_blocks(pool, begin_of(range), middle);
    }
}

/* Takes the second half of what another thread has left, and works on it. False when it has nothing. */
static bool take_half(LlmcPool *pool, int64_t thread, int64_t self) {
    Slice *other = &pool->slices[thread];
    uint64_t seen = look(other), range, middle;
    do {
        range = range_in(pool, thread, seen);
        middle = (begin_of(range) + end_of(range)) / 2;
        if (middle == end_of(range)) return false;
    } while (!replace(other, &seen, range_of(pool, begin_of(range), middle)));
    LLMC_POOL_TOUCH(&pool->slices[self], 1);
    atomic_store_explicit(&pool->slices[self].blocks, range_of(pool, middle, end_of(range)), memory_order_relaxed);
    finish_slice(pool, self);
    return true;
}

/* Takes half of what a thread near by has left: one of its group, then one of every group that is one bit away. */
static bool take_over(LlmcPool *pool, int64_t threads, int64_t self) {
    for (int64_t away = 1; away < GROUP || away < threads; away = away < GROUP ? away + 1 : 2 * away) {
        int64_t other = self ^ away;
        if (other < threads && take_half(pool, other, self)) return true;
    }
    return false;
}

static void work(LlmcPool *pool, int64_t threads, int64_t self) {
    finish_slice(pool, self);
    while (take_over(pool, threads, self)) continue;
}

/* What the word of a group is in this job, before anyone joined: who has no part in it counts as gone. */
static uint64_t nobody_joined(uint64_t job, int64_t group) {
    int64_t wanted = threads_of(job) - group * GROUP;
    uint64_t gone = wanted >= GROUP ? 0 : MEMBERS << wanted & MEMBERS;
    if (group == 0) gone |= 1; /* the owner */
    return gone << JOINED_SHIFT | gone << LEFT_SHIFT | (job & SERIAL_MASK);
}

/* Joins the job, if it still is that and open. */
static bool join_job(LlmcPool *pool, uint64_t job, int64_t self) {
    Group *group = &pool->groups[self / GROUP];
    const uint64_t bit = UINT64_C(1) << (JOINED_SHIFT + self % GROUP);
    uint64_t seen = atomic_load_explicit(&group->members, memory_order_relaxed), members;
    do {
        LLMC_POOL_TOUCH(group, 1);
        if ((seen & SERIAL_MASK) > (job & SERIAL_MASK)) return false; /* a later one */
        members = (seen & SERIAL_MASK) == (job & SERIAL_MASK) ? seen : nobody_joined(job, self / GROUP);
        if (members & bit) return false; /* closed */
    } while (!atomic_compare_exchange_weak_explicit(&group->members, &seen, members | bit, memory_order_acq_rel,
                                                    memory_order_relaxed));
    return true;
}

static void leave_job(LlmcPool *pool, int64_t self) {
    LLMC_POOL_TOUCH(&pool->groups[self / GROUP], 1);
    atomic_fetch_or_explicit(&pool->groups[self / GROUP].members, UINT64_C(1) << (LEFT_SHIFT + self % GROUP),
                             memory_order_release);
}

static uint64_t members_of(LlmcPool *pool, int64_t group) {
    LLMC_POOL_TOUCH(&pool->groups[group], 0);
    return atomic_load_explicit(&pool->groups[group].members, memory_order_acquire);
}

/* Helps the members of a group, and then lets no more of them join. The slice of one that did not join can only become
 * empty, and stays so: where the word is what it was before the owner looked at the slices, nothing is left over. */
static void close_group(LlmcPool *pool, uint64_t job, int64_t group) {
    uint64_t seen = members_of(pool, group);
    for (;;) {
        uint64_t members = (seen & SERIAL_MASK) == (job & SERIAL_MASK) ? seen : nobody_joined(job, group);
        const uint64_t left = members >> LEFT_SHIFT & MEMBERS, absent = ~(members >> JOINED_SHIFT) & MEMBERS;
        if (left == MEMBERS && seen == members) return;
        for (int64_t i = 0; i < GROUP; i++) {
            while (!(left >> i & 1) && take_half(pool, group * GROUP + i, 0)) continue;
        }
        if (absent == 0) return;
        members |= absent << JOINED_SHIFT | absent << LEFT_SHIFT;
        LLMC_POOL_TOUCH(&pool->groups[group], 1);
        if (atomic_compare_exchange_strong_explicit(&pool->groups[group].members, &seen, members, memory_order_acq_rel,
                                                    memory_order_acquire)) {
            return;
        }
    }
}

/* Waits until all who joined have left a group that is closed. */
static void wait_for_group(LlmcPool *pool, int64_t group) {
    int64_t start = 0;
    for (unsigned round = 1; (members_of(pool, group) >> LEFT_SHIFT & MEMBERS) != MEMBERS; round++) {
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

static uint64_t look_for_job(LlmcPool *pool) {
    LLMC_POOL_TOUCH(&pool->job, 0);
    return atomic_load_explicit(&pool->job, memory_order_acquire);
}

/* Works on a job that wants this worker, unless it is closed. */
static bool help(LlmcPool *pool, uint64_t job, int64_t self) {
    if (!join_job(pool, job, self)) return false;
    LLMC_POOL_TOUCH(&pool->body, 0);
    work(pool, threads_of(job), self);
    leave_job(pool, self);
    return true;
}

static void *worker(void *argument) {
    LlmcPool *pool = argument;
    const int64_t self = atomic_fetch_add(&pool->named, 1) + 1;
    uint64_t seen = 0;
    int64_t last_work = now(), gave_way = last_work;
    inside_body = true;
    for (;;) {
        /* Look for a new job: spin, then give way, then sleep. A job that does not want this worker does not count as
         * work, so that workers which a smaller run leaves idle go to sleep. */
        int64_t waited = 0;
        bool woken = false;
        for (unsigned round = 1; look_for_job(pool) == seen; round++) {
            if (waited < SPIN_NANOSECONDS) {
                relax();
                if (round % 32 == 0) waited = now() - last_work;
            } else if (waited < YIELD_NANOSECONDS) {
                sched_yield();
                waited = now() - last_work;
            } else {
                sleep_at(pool, self, seen);
                woken = true;
            }
        }
        seen = look_for_job(pool);
        if (woken) wake(pool, threads_of(seen));
        /* Who is woken for a job that is over by now may be needed for the next one soon. */
        if (self < threads_of(seen) && (help(pool, seen, self) || woken)) last_work = now();
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

/* The serial of the next job. Called while no job is open. */
static uint64_t next_serial(LlmcPool *pool) {
    uint64_t serial = ((atomic_load_explicit(&pool->job, memory_order_relaxed) & SERIAL_MASK) + 1) & SERIAL_MASK;
    if (serial & TAG_MASK) return serial;
    for (int64_t i = 0; i <= MOST_WORKERS; i++) {
        atomic_store_explicit(&pool->slices[i].blocks, 0, memory_order_relaxed);
    }
    return serial + 1;
}

static void run_job(LlmcPool *pool, LlmcBody body, void *context, int64_t units, int64_t grain) {
    if (units <= 0) return;
    if (grain < 1) grain = 1;
    if (units / grain >= MOST_BLOCKS) grain = units / MOST_BLOCKS + 1;
    int64_t threads = units / grain;
    if (threads > pool->threads) threads = pool->threads;
    if (threads > pool->workers + 1) threads = pool->workers + 1;
    if (inside_body || turn_of != pool || threads <= 1) {
        body(context, 0, units);
        return;
    }
    const uint64_t blocks = (uint64_t)((units + grain - 1) / grain);
    const uint64_t serial = next_serial(pool), job = (uint64_t)threads << SERIAL_BITS | serial;
    LLMC_POOL_TOUCH(&pool->body, 1);
    pool->body = body;
    pool->context = context;
    pool->units = units;
    pool->grain = grain;
    pool->share = blocks / (uint64_t)threads;
    pool->extra = blocks % (uint64_t)threads;
    pool->tag = serial & TAG_MASK;
    /* Sequentially consistent against a worker's "count me as asleep, then look for a job". */
    LLMC_POOL_TOUCH(&pool->job, 1);
    atomic_store(&pool->job, job);
    wake(pool, threads);

    const int64_t groups = (threads + GROUP - 1) / GROUP;
    inside_body = true;
    work(pool, threads, 0);
    for (int64_t group = 0; group < groups; group++) close_group(pool, job, group);
    inside_body = false;
    for (int64_t group = 0; group < groups; group++) wait_for_group(pool, group);
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
        atomic_store(&pool->job, next_serial(pool)); /* of no thread: the job of the parent is none of the child's */
        for (int i = 0; i < LEVELS; i++) atomic_store(&pool->sleepers[i], 0);
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

int64_t llmc_abi(void) { return LLMC_ABI; }
