/* What the thread pool keeps: its numbers, a job, and the memory that its threads share. Only for pool.c. */
#ifndef LLMC_POOL_STATE_H
#define LLMC_POOL_STATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "pool.h"

#ifndef LLMC_POOL_GROUP /* a power of two, smaller in tests */
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
    ANSWER_NANOSECONDS = 250,       /* what grains are stated for: a worker that answers within this time */
    MOST_SLOWNESS = 4,              /* times as long are counted, at most */
    GREETING_TURNS = 4,             /* one turn in so many begins with asking */
    GREETINGS = 16,                 /* the quickest of so many answers counts: the others were busy */
    GREETING_NANOSECONDS = 2000,    /* waited for an answer, at most */
    SIXTEENTHS = 16,
    GROUP = LLMC_POOL_GROUP,        /* threads that help each other first */
    WOKEN = 4,                      /* sleepers that one thread wakes; these wake the others */
    LEVELS = 10,                    /* of sleepers: worker n is at the level of n's highest bit */
};

/* Tests define this as a function's name, and count which cache lines move between threads that do not sleep. */
#ifdef LLMC_POOL_TOUCH
void LLMC_POOL_TOUCH(const void *address, int writes);
#else
#define LLMC_POOL_TOUCH(address, writes) ((void)0)
#endif

/* `job`: threads << 48 | serial. The serials last for nine years at a million jobs a second. */
#define SERIAL_BITS 48
#define SERIAL_MASK ((UINT64_C(1) << SERIAL_BITS) - 1)

/* What is left of a thread's part of the job, in blocks: begin << 48 | end << 32 | tag. The tag is the end of the job's
 * serial, and never 0: when it has been through all its values, all slices are set to 0. */
#ifndef LLMC_POOL_TAG_BITS /* fewer in tests */
#define LLMC_POOL_TAG_BITS 32
#endif
#define TAG_MASK ((UINT64_C(1) << LLMC_POOL_TAG_BITS) - 1)
#define END_SHIFT 32
#define BEGIN_SHIFT 48
#define BLOCK_BITS (BEGIN_SHIFT - END_SHIFT)
#define MOST_BLOCKS ((INT64_C(1) << BLOCK_BITS) - 1)

typedef struct Slice {
    _Alignas(CACHE_LINE) _Atomic uint64_t blocks;
    _Atomic bool inside; /* whether its worker is in a job, or about to be: it may change slices */
} Slice;

/* How many blocks a worker has done: serial << 16 | blocks. In a line of its own, which the owner watches. */
typedef struct Report {
    _Alignas(CACHE_LINE) _Atomic uint64_t done;
} Report;

/* A job, as a thread that works on it knows it. */
typedef struct Job {
    uint64_t word;
    LlmcBody body;
    void *context;
    uint64_t units;
    uint64_t size; /* units of a block: 1, where there are not very many */
    uint64_t blocks;
    uint64_t share; /* blocks that each worker starts with; the owner has the others */
    uint64_t least; /* blocks of a piece, at least, where there are so many */
    uint64_t done;  /* blocks that this thread has done */
} Job;

struct LlmcPool {
    /* Stable across versions: how any artifact runs a job, and how it takes its turn. */
    void (*parallel)(LlmcPool *pool, LlmcBody body, void *context, int64_t units, int64_t grain);
    void (*enter)(LlmcPool *pool, int64_t threads);
    void (*leave)(LlmcPool *pool);

    pthread_mutex_t turn; /* held by the thread that owns the jobs */
    int64_t threads;      /* threads of the turn's owner, itself included */
    int64_t workers;      /* workers started so far */
    int64_t most;         /* the most that there were: not 0 in a child of fork, whose workers are none */
    _Atomic int64_t named; /* of these, the ones that know their number */
    LlmcPool *next;       /* all pools of this artifact, for the fork handler */
    int64_t slowness;     /* sixteenths of ANSWER_NANOSECONDS that a worker takes to answer, 16 at least */
    int64_t quickest;     /* nanoseconds, of the answers since it was counted last */
    int64_t greetings;    /* of which there were so many */
    uint64_t turns_taken;

    /* The job: what workers watch, and sleep on; and its description, in the same line. */
    _Alignas(CACHE_LINE) _Atomic uint64_t job;
    _Atomic(LlmcBody) body;
    _Atomic(void *) context;
    _Atomic uint64_t units;
    _Atomic uint64_t size;
    _Atomic uint64_t blocks;
    _Atomic uint64_t share;
    _Atomic uint64_t least;

    _Alignas(CACHE_LINE) _Atomic int32_t sleepers[LEVELS];

    Slice slices[MOST_WORKERS + 1]; /* by thread: 0 is the owner's */
    Report reports[MOST_WORKERS + 1];
};

#endif
