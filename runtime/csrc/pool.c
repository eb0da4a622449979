/* A fork-join thread pool for steps made of many short parallel loops.
 *
 * A loop is a job, of some blocks of units. Every thread starts with a slice of its own, so that what it reads is one
 * stream, and takes it in pieces from the front. Who is done takes half of what another has left, from the end: a busy
 * core does less, an absent one nothing, and all finish together. A worker that the system keeps off its core costs
 * nothing, as long as it holds no piece. Workers spin a short while for the next job, then give way to other processes,
 * then sleep on a futex.
 *
 * What a short loop costs is how often a cache line has to come from another core before something can go on
 * (docs/adr/0024), and what it costs many threads must not grow with their square (docs/adr/0016). So:
 * - The owner opens a job by writing one line: the description and the word `job`, which holds the job's serial number
 *   and its number of threads, and which workers watch. It has its first piece before anyone knows of the job, and waits
 *   for no line before it begins with it.
 * - Slices carry a tag of the job that they were last written for. One of an earlier job stands for what the present job
 *   starts with, so that nobody has to write it. A worker has the line of its own slice back before the next job comes.
 * - Who has nothing left to do writes how many blocks it did into a line of its own, and the owner waits until these are
 *   all. Nobody is told that a job is over: to take blocks is to change a slice, and a job that is over has none left.
 * - A worker looks for work at the others of its group of eight, and at one thread of each group whose number differs
 *   from its own in one bit. The owner looks everywhere, so that no slice is left over.
 *
 * That a slice is changed only for the job that is open: tags grow from job to job. While a job is open, its slices have
 * its tag, or an earlier one if nobody took of them; once it is over, all of them have its tag and no blocks, or a later
 * tag. So who changes a slice that had blocks of its job, or an earlier tag, did so while the job was open, and the
 * description it had read by then is the job's. Where tags begin again, all slices are set back; before, the owner waits
 * until no worker is in a job. */
#define _GNU_SOURCE
#include "pool_state.h"

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

/* Asks for a line that this thread will change, and does not wait for it. */
static void fetch_to_write(const void *line) {
#if defined(__x86_64__) || defined(__i386__)
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)line)); /* the builtin needs an option of the compiler */
#else
    __builtin_prefetch(line, 1);
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

/* Wakes some of the workers that a job of so many threads wants, if any sleep. Those that are woken do the same, so that
 * the owner can begin; of the last level some may be woken for nothing. Who goes to sleep just now may miss this job, and
 * is found by the next: to be sure, the owner would have to wait until others have seen its job. */
static void wake(LlmcPool *pool, int64_t threads) {
    if (threads < 2) return;
    const int level = level_of(threads - 1);
    int32_t asleep = 0;
    LLMC_POOL_TOUCH(&pool->sleepers, 0);
    for (int i = 0; i <= level; i++) asleep += atomic_load_explicit(&pool->sleepers[i], memory_order_relaxed);
    if (asleep <= 0) return;
    const int count = asleep < WOKEN ? asleep : WOKEN;
    syscall(SYS_futex, futex_of(pool), FUTEX_WAKE_BITSET_PRIVATE, count, NULL, NULL, (2u << level) - 1);
}

static int64_t threads_of(uint64_t job) { return (int64_t)(job >> SERIAL_BITS); }

static uint64_t begin_of(uint64_t range) { return range >> BEGIN_SHIFT; }

static uint64_t end_of(uint64_t range) { return range >> END_SHIFT & (uint64_t)MOST_BLOCKS; }

static uint64_t tag_of(const Job *job) { return job->word & TAG_MASK; }

static uint64_t range_of(const Job *job, uint64_t begin, uint64_t end) {
    return begin << BEGIN_SHIFT | end << END_SHIFT | tag_of(job);
}

/* Where the slice ends that a thread starts with. They are one after the other. */
static uint64_t slice_end(const Job *job, int64_t thread) {
    return job->blocks - job->share * (uint64_t)(threads_of(job->word) - 1 - thread);
}

/* What a thread has left, if this is what its slice holds. The owner's is written before others know of the job. */
static uint64_t range_in(const Job *job, int64_t thread, uint64_t blocks) {
    const uint64_t tag = blocks & ((UINT64_C(1) << END_SHIFT) - 1), end = slice_end(job, thread);
    if (tag == tag_of(job)) return blocks;
    return tag > tag_of(job) ? range_of(job, 0, 0) : range_of(job, end - job->share, end); /* later: the job is over */
}

static void run_blocks(Job *job, uint64_t begin, uint64_t end) {
    const uint64_t last = end * job->size;
    job->body(job->context, (int64_t)(begin * job->size), (int64_t)(last < job->units ? last : job->units));
    job->done += end - begin;
}

/* Where a thread's first piece of a range ends. The pieces are one after the other in memory; the smaller they are, the
 * more is left for others to take when this thread is slow. But each costs a call, so that little work is one piece. */
static uint64_t piece_end(const Job *job, uint64_t begin, uint64_t end) {
    const uint64_t left = end - begin, part = (left + PIECES - 1) / PIECES;
    const uint64_t piece = part < 2 * job->least ? 2 * job->least : part;
    return left < 2 * piece ? end : begin + piece;
}

static uint64_t look(Slice *slice) {
    LLMC_POOL_TOUCH(slice, 0);
    return atomic_load_explicit(&slice->blocks, memory_order_relaxed);
}

static bool replace(Slice *slice, uint64_t *seen, uint64_t range) {
    LLMC_POOL_TOUCH(slice, 1);
    return atomic_compare_exchange_weak_explicit(&slice->blocks, seen, range, memory_order_acq_rel,
                                                 memory_order_relaxed);
}

/* Works on the thread's own slice until it is empty. */
static void finish_slice(LlmcPool *pool, Job *job, int64_t self) {
    Slice *own = &pool->slices[self];
    for (;;) {
        uint64_t seen = look(own), range, middle;
        do {
            range = range_in(job, self, seen);
            if (begin_of(range) == end_of(range)) return;
            middle = piece_end(job, begin_of(range), end_of(range));
        } while (!replace(own, &seen, range_of(job, middle, end_of(range))));
        run_blocks(job, begin_of(range), middle);
    }
}

/* Takes the second half of what another thread has left, or all where half is too little, and works on it. False when it
 * has nothing. */
static bool take_half(LlmcPool *pool, Job *job, int64_t thread, int64_t self) {
    Slice *other = &pool->slices[thread];
    uint64_t seen = look(other), range, middle;
    do {
        range = range_in(job, thread, seen);
        const uint64_t left = end_of(range) - begin_of(range);
        if (left == 0) return false;
        middle = begin_of(range) + (left < 2 * job->least ? 0 : left / 2);
    } while (!replace(other, &seen, range_of(job, begin_of(range), middle)));
    LLMC_POOL_TOUCH(&pool->slices[self], 1);
    atomic_store_explicit(&pool->slices[self].blocks, range_of(job, middle, end_of(range)), memory_order_relaxed);
    finish_slice(pool, job, self);
    return true;
}

/* Takes half of what a thread near by has left: one of its group, then one of every group that is one bit away. */
static bool take_over(LlmcPool *pool, Job *job, int64_t self) {
    const int64_t threads = threads_of(job->word);
    for (int64_t away = 1; away < GROUP || away < threads; away = away < GROUP ? away + 1 : 2 * away) {
        int64_t other = self ^ away;
        if (other < threads && take_half(pool, job, other, self)) return true;
    }
    return false;
}

/* Tells the owner what this worker has done of the job. */
static void report(LlmcPool *pool, const Job *job, int64_t self) {
    LLMC_POOL_TOUCH(&pool->reports[self], 1);
    atomic_store_explicit(&pool->reports[self].done, (job->word & SERIAL_MASK) << BLOCK_BITS | job->done,
                          memory_order_release);
}

/* The blocks that a worker says it has done, of this job. If there are some, its slice is empty, or holds what it took
 * from another one. */
static uint64_t reported(LlmcPool *pool, const Job *job, int64_t thread) {
    LLMC_POOL_TOUCH(&pool->reports[thread], 0);
    const uint64_t done = atomic_load_explicit(&pool->reports[thread].done, memory_order_acquire);
    return done >> BLOCK_BITS == (job->word & SERIAL_MASK) ? done & (uint64_t)MOST_BLOCKS : 0;
}

static bool is_done(LlmcPool *pool, const Job *job) {
    uint64_t done = job->done;
    for (int64_t i = 1; i < threads_of(job->word) && done < job->blocks; i++) done += reported(pool, job, i);
    return done == job->blocks;
}

/* The owner's part behind its own slice: what nobody has taken, and then waiting for those that have. */
static void finish_job(LlmcPool *pool, Job *job) {
    if (is_done(pool, job)) return;
    for (int64_t i = 1; i < threads_of(job->word); i++) {
        while (!reported(pool, job, i) && take_half(pool, job, i, 0)) continue;
    }
    int64_t start = 0;
    for (unsigned round = 1; !is_done(pool, job); round++) {
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

/* Reads the job's description, if it still is the job that workers watch. From then on until the worker leaves, tags of
 * slices do not begin again. What is read here may belong to a later job; then no slice can be changed with it. */
static bool enter_job(LlmcPool *pool, Job *job, int64_t self) {
    LLMC_POOL_TOUCH(&pool->slices[self], 1);
    atomic_store(&pool->slices[self].inside, true);
    LLMC_POOL_TOUCH(&pool->job, 0);
    job->body = atomic_load_explicit(&pool->body, memory_order_relaxed);
    job->context = atomic_load_explicit(&pool->context, memory_order_relaxed);
    job->units = atomic_load_explicit(&pool->units, memory_order_relaxed);
    job->size = atomic_load_explicit(&pool->size, memory_order_relaxed);
    job->blocks = atomic_load_explicit(&pool->blocks, memory_order_relaxed);
    job->share = atomic_load_explicit(&pool->share, memory_order_relaxed);
    job->least = atomic_load_explicit(&pool->least, memory_order_relaxed);
    LLMC_POOL_TOUCH(&pool->job, 0);
    return atomic_load(&pool->job) == job->word;
}

/* Works on a job that wants this worker, unless it is over. Whether there was something to do. */
static bool help(LlmcPool *pool, uint64_t word, int64_t self) {
    Job job = {.word = word};
    if (enter_job(pool, &job, self)) {
        finish_slice(pool, &job, self);
        do {
            if (job.done) report(pool, &job, self);
        } while (take_over(pool, &job, self));
    }
    LLMC_POOL_TOUCH(&pool->slices[self], 1);
    atomic_store_explicit(&pool->slices[self].inside, false, memory_order_release);
    fetch_to_write(&pool->slices[self]);
    return job.done > 0;
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
        if (++pool->workers > pool->most) pool->most = pool->workers;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Sets all slices back, when tags begin again. `job`: of no thread, so that no worker enters one meanwhile. */
static void restart_tags(LlmcPool *pool, uint64_t job) {
    LLMC_POOL_TOUCH(&pool->job, 1);
    atomic_store(&pool->job, job);
    for (int64_t i = 0; i <= pool->most; i++) {
        for (;;) {
            LLMC_POOL_TOUCH(&pool->slices[i], 1);
            if (!atomic_load(&pool->slices[i].inside)) break;
            sched_yield();
        }
    }
    for (int64_t i = 0; i <= pool->most; i++) { /* only now: to who is inside, 0 would look like an earlier tag */
        LLMC_POOL_TOUCH(&pool->slices[i], 1);
        atomic_store_explicit(&pool->slices[i].blocks, 0, memory_order_relaxed);
    }
}

/* The serial of the next job. Called while no job is open. */
static uint64_t next_serial(LlmcPool *pool) {
    uint64_t serial = ((atomic_load_explicit(&pool->job, memory_order_relaxed) & SERIAL_MASK) + 1) & SERIAL_MASK;
    if (serial & TAG_MASK) return serial;
    restart_tags(pool, serial);
    return serial + 1;
}

/* Opens a job: the owner has its first piece then, up to the block that is returned. */
static uint64_t open_job(LlmcPool *pool, const Job *job) {
    const uint64_t end = slice_end(job, 0), first = piece_end(job, 0, end);
    LLMC_POOL_TOUCH(&pool->slices[0], 1);
    atomic_store_explicit(&pool->slices[0].blocks, range_of(job, first, end), memory_order_relaxed);
    LLMC_POOL_TOUCH(&pool->job, 1);
    atomic_store_explicit(&pool->body, job->body, memory_order_relaxed);
    atomic_store_explicit(&pool->context, job->context, memory_order_relaxed);
    atomic_store_explicit(&pool->units, job->units, memory_order_relaxed);
    atomic_store_explicit(&pool->size, job->size, memory_order_relaxed);
    atomic_store_explicit(&pool->blocks, job->blocks, memory_order_relaxed);
    atomic_store_explicit(&pool->share, job->share, memory_order_relaxed);
    atomic_store_explicit(&pool->least, job->least, memory_order_relaxed);
    atomic_store_explicit(&pool->job, job->word, memory_order_release);
    return first;
}

static void run_job(LlmcPool *pool, LlmcBody body, void *context, int64_t units, int64_t grain) {
    if (units <= 0) return;
    /* A grain of 1 stays what it is: then units are large. */
    grain = grain < 2 ? 1 : grain < MOST_BLOCKS ? 1 + (grain - 1) * pool->slowness / SIXTEENTHS : grain;
    if (inside_body || turn_of != pool || pool->threads < 2 || units / 2 < grain) {
        body(context, 0, units);
        return;
    }
    int64_t threads = units / grain;
    if (threads > pool->threads) threads = pool->threads;
    if (threads > pool->workers + 1) threads = pool->workers + 1;
    if (threads < 2) {
        body(context, 0, units);
        return;
    }
    const int64_t size = (units - 1) / MOST_BLOCKS + 1, blocks = (units - 1) / size + 1;
    /* A worker begins later than the owner, and is heard of later. What is worth handing out takes longer than that by
     * its very meaning: twice as long is near enough. */
    const int64_t least = (grain - 1) / size + 1, ahead = least / 2;
    Job job = {.word = (uint64_t)threads << SERIAL_BITS | next_serial(pool), .body = body, .context = context,
               .units = (uint64_t)units, .size = (uint64_t)size, .blocks = (uint64_t)blocks,
               .share = (uint64_t)((blocks - ahead) / threads), .least = (uint64_t)least};
    const uint64_t first = open_job(pool, &job);
    wake(pool, threads);
    inside_body = true;
    run_blocks(&job, 0, first);
    finish_slice(pool, &job, 0);
    finish_job(pool, &job);
    inside_body = false;
}

typedef struct Greeting {
    LlmcPool *pool;
    int64_t start, nanoseconds;
    _Atomic bool answered;
} Greeting;

static void answer(void *context, int64_t begin, int64_t end) {
    Greeting *greeting = context;
    (void)end;
    if (begin > 0) {
        atomic_store_explicit(&greeting->answered, true, memory_order_release);
        return;
    }
    do {
        LLMC_POOL_TOUCH(greeting->pool, 0);
        greeting->nanoseconds = now() - greeting->start;
        if (atomic_load_explicit(&greeting->answered, memory_order_acquire)) return;
    } while (greeting->nanoseconds < GREETING_NANOSECONDS);
}

/* Finds out how long a worker takes to answer: that may be three times as long when a system runs the threads on cores
 * that share no cache, and it moves them. */
static void greet(LlmcPool *pool) {
    Greeting greeting = {.pool = pool, .start = now()};
    run_job(pool, answer, &greeting, 2, 1);
    if (greeting.nanoseconds < pool->quickest) pool->quickest = greeting.nanoseconds;
    if (++pool->greetings < GREETINGS) return;
    const int64_t slowness = pool->quickest * SIXTEENTHS / ANSWER_NANOSECONDS, most = MOST_SLOWNESS * SIXTEENTHS;
    pool->slowness = slowness < SIXTEENTHS ? SIXTEENTHS : slowness > most ? most : slowness;
    pool->quickest = GREETING_NANOSECONDS;
    pool->greetings = 0;
}

/* A thread that waited for a turn while it has one would wait for itself; and a body, for the thread that waits for it.
 * Both go on within the turn there is: so does who asks for a second pool, whose loops then run on this thread. */
static void enter(LlmcPool *pool, int64_t threads) {
    if (inside_body || turns++) return;
    pthread_mutex_lock(&pool->turn);
    turn_of = pool;
    pool->threads = threads < 1 ? 1 : threads;
    start_workers(pool, pool->threads - 1);
    if (pool->threads > 1 && pool->workers > 0 && pool->turns_taken++ % GREETING_TURNS == 0) greet(pool);
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
        for (int64_t i = 0; i <= pool->most; i++) atomic_store(&pool->slices[i].inside, false);
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
    pool->slowness = SIXTEENTHS;
    pool->quickest = GREETING_NANOSECONDS;
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
