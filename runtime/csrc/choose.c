/* See choose.h. A vocabulary of 150,000 logits is 600 KB that the step has just written, half of it in the cache of
 * each of two cores: straight passes over it, a part for each thread, take some ten microseconds each. A sort of it
 * would take as long as the step.
 *
 * All filters keep a prefix of the tokens in the order of their likelihood. So each is an edge in this order: a logit,
 * and an id among equal ones. It is found by counting (or adding up) in buckets of logits, and then by the same within
 * the one bucket that it falls into, until few tokens are left to be sorted. */
#include "choose.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"

/* Compiled for several kinds of vectors, of which the loader takes the widest that the processor has. Not with the thread
 * sanitizer: the loader chooses before that is ready, and the program would die at its start. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_THREAD__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

enum {
    LANES = 16,
    BLOCK = 1024, /* tokens that a draw skips at a time */
    STRIDE = 64,  /* that a pass skips, if none of them is what it looks for */
    PARTS = 8,    /* of the vocabulary: work units of a pass */
    BUCKETS = 512,
    FEW = 256, /* tokens that are sorted at once */
    DEPTHS = 3,
};

/* How far below the likeliest logit buckets begin to be worth it, in temperatures: the first depth that holds what a
 * filter asks for. Real distributions are steep, and then few tokens have to be put into buckets. */
static const float depths[DEPTHS] = {2, 6, 32};

typedef struct Token {
    float logit;
    int32_t id;
} Token;

/* What a pass finds in a part of the vocabulary. */
typedef struct Part {
    _Alignas(64) int64_t begin, end;
    float largest;
    bool broken;               /* there is a NaN or an infinity */
    double sums[DEPTHS + 1];   /* weights of the tokens down to each depth; of all */
    int64_t counts[DEPTHS + 1]; /* and how many there are */
    int64_t found;             /* tokens that `gather` put at the part's place in `tokens` */
    int64_t bucket_counts[BUCKETS + 1]; /* the last: all that lies deeper */
    double bucket_sums[BUCKETS + 1];
} Part;

/* A place in the order of likelihood: tokens up to this one, itself included, and their weights. */
typedef struct Edge {
    float logit;
    int32_t id;
    double sum;
} Edge;

typedef struct Choosing {
    const LlmcChoice *choice;
    float *weights;     /* [count] */
    Token *tokens;      /* [count] */
    double *block_sums; /* [blocks] */
    Part *parts;        /* [PARTS] */
    float largest;
    float scale; /* buckets a unit of logits */
    int bucket;  /* that `gather` wants */
    Edge edge;
} Choosing;

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static int64_t blocks_of(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

int64_t llmc_choose_bytes(int64_t count) {
    int64_t tables = round_up(blocks_of(count) * (int64_t)sizeof(double), 64) + PARTS * (int64_t)sizeof(Part);
    return 2 * round_up(count * (int64_t)sizeof(float), 64) + round_up(count * (int64_t)sizeof(Token), 64) + tables;
}

/* Sixteen numbers; compilers make of them what the processor has. A comparison gives 0 or -1 in each lane. */
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
#define PICK(mask, yes, no) ((Floats)(((mask) & (Ints)(yes)) | (~(mask) & (Ints)(no))))

/* The `count` numbers from `from` on, up to LANES of them, and `other` in the lanes behind. */
static inline void read_lanes(Floats *to, const float *from, int64_t count, float other) {
    if (count >= LANES) {
        memcpy(to, from, sizeof *to);
    } else {
        *to = (Floats){0} + other;
        memcpy(to, from, sizeof(float) * (size_t)count);
    }
}

static inline void write_lanes(float *to, const Floats *from, int64_t count) {
    if (count >= LANES) {
        memcpy(to, from, sizeof *from);
    } else {
        memcpy(to, from, sizeof(float) * (size_t)count);
    }
}

/* Sums of lanes. Of a block each lane adds up to 64 numbers, in f32, and blocks are added up in f64. */
static inline double total_of(const Floats *sums) {
    double total = 0;
    for (int lane = 0; lane < LANES; lane++) total += (*sums)[lane];
    return total;
}

/* The largest logit of a part, and whether there is a NaN or an infinity. */
WIDE static void look_in_part(const float *logits, Part *part) {
    Floats x, largest = (Floats){0} - FLT_MAX;
    Ints fine = (Ints){0} - 1;
    for (int64_t i = part->begin; i < part->end; i += LANES) {
        read_lanes(&x, logits + i, part->end - i, -INFINITY);
        fine &= x <= FLT_MAX;
        largest = PICK(x > largest, x, largest);
    }
    part->largest = -FLT_MAX;
    part->broken = false;
    for (int lane = 0; lane < LANES; lane++) {
        part->largest = largest[lane] > part->largest ? largest[lane] : part->largest;
        part->broken |= !fine[lane];
    }
}

static void look(void *context, int64_t begin, int64_t end) {
    const Choosing *c = context;
    for (int64_t i = begin; i < end; i++) look_in_part(c->choice->logits, &c->parts[i]);
}

/* exp(x) of x <= 0, to an ulp or two: 2^n * exp(r), n the nearest integer to x / log(2), and the series of exp up to
 * r^6, |r| <= log(2) / 2. Below -87, where results would not be normal numbers: 0, as for a NaN. */
static inline void exponential(const Floats *x, Floats *result) {
    const float rounder = 12582912.0f; /* 1.5 * 2^23: floats around it are whole numbers */
    Ints inside = *x > -87.0f;
    Floats clamped = PICK(inside, *x, (Floats){0});
    Floats shifted = clamped * 1.44269504f + rounder;
    Floats n = shifted - rounder;
    Floats r = clamped - n * 0.693145752f; /* log(2) in two parts, the first with few digits: n times it is exact */
    r -= n * 1.42860677e-6f;
    Floats series = r * (1.0f / 720) + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    Floats power = (Floats)(((Ints)shifted - (0x4B400000 - 127)) << 23);
    *result = PICK(inside, series * power, (Floats){0});
}

/* Weights of a block, and their sum. */
WIDE static double weigh_block(const float *logits, float *weights, int64_t count, float largest, float cooling) {
    Floats x, sums = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        read_lanes(&x, logits + i, count - i, -INFINITY);
        x = (x - largest) * cooling;
        exponential(&x, &x);
        write_lanes(weights + i, &x, count - i);
        sums += x;
    }
    return total_of(&sums);
}

/* Adds to a depth's *sum and *many the weights from `least` on. */
WIDE static void add_from(const float *weights, int64_t count, float least, double *sum, int64_t *many) {
    Floats x, sums = {0};
    Ints found = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        read_lanes(&x, weights + i, count - i, -1);
        sums += PICK(x >= least, x, (Floats){0});
        found -= x >= least;
    }
    *sum += total_of(&sums);
    for (int lane = 0; lane < LANES; lane++) *many += found[lane];
}

static void weigh(void *context, int64_t begin, int64_t end) {
    const Choosing *c = context;
    const LlmcChoice *choice = c->choice;
    const float cooling = (float)(1 / choice->temperature < FLT_MAX ? 1 / choice->temperature : FLT_MAX);
    const bool counted = choice->top_k > 0 || choice->top_p < 1;
    for (int64_t p = begin; p < end; p++) {
        Part *part = &c->parts[p];
        memset(part->sums, 0, sizeof part->sums);
        memset(part->counts, 0, sizeof part->counts);
        part->counts[DEPTHS] = part->end - part->begin;
        for (int64_t i = part->begin; i < part->end; i += BLOCK) {
            int64_t count = part->end - i < BLOCK ? part->end - i : BLOCK;
            double sum = weigh_block(choice->logits + i, c->weights + i, count, c->largest, cooling);
            c->block_sums[i / BLOCK] = sum;
            part->sums[DEPTHS] += sum;
            for (int d = 0; counted && d < DEPTHS; d++)
                add_from(c->weights + i, count, expf(-depths[d]), &part->sums[d], &part->counts[d]);
        }
    }
}

/* The bucket of a logit. The same expression everywhere, so that a token never changes its bucket. */
static inline int bucket_of(const Choosing *c, float logit) {
    float place = (c->largest - logit) * c->scale;
    return place < BUCKETS ? (int)place : BUCKETS;
}

/* Whether any of `count` logits is from `low` to `high`. */
WIDE static bool any_between(const float *logits, int64_t count, float low, float high) {
    Floats x;
    Ints found = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        read_lanes(&x, logits + i, count - i, INFINITY);
        x = PICK(x >= low, x, (Floats){0} + INFINITY);
        found |= x <= high;
    }
    uint64_t words[sizeof found / 8], any = 0;
    memcpy(words, &found, sizeof words);
    for (size_t i = 0; i < sizeof found / 8; i++) any |= words[i];
    return any != 0;
}

static void fill_buckets(void *context, int64_t begin, int64_t end) {
    const Choosing *c = context;
    const float *logits = c->choice->logits;
    const float reach = c->largest - (BUCKETS + 1) / c->scale; /* whatever is in a bucket is above this */
    for (int64_t p = begin; p < end; p++) {
        Part *part = &c->parts[p];
        memset(part->bucket_counts, 0, sizeof part->bucket_counts);
        memset(part->bucket_sums, 0, sizeof part->bucket_sums);
        for (int64_t i = part->begin; i < part->end; i += STRIDE) {
            int64_t stop = i + STRIDE < part->end ? i + STRIDE : part->end;
            if (!any_between(logits + i, stop - i, reach, FLT_MAX)) continue;
            for (int64_t j = i; j < stop; j++) {
                int bucket = bucket_of(c, logits[j]);
                part->bucket_counts[bucket]++;
                part->bucket_sums[bucket] += c->weights[j];
            }
        }
    }
}

/* The tokens of one bucket, in the order of their ids, in the part's place. */
static void gather(void *context, int64_t begin, int64_t end) {
    const Choosing *c = context;
    const float *logits = c->choice->logits;
    /* About where the bucket lies, a bucket more on both sides. */
    const float high = c->bucket == 0 ? FLT_MAX : c->largest - (c->bucket - 1) / c->scale;
    const float low = c->bucket == BUCKETS ? -FLT_MAX : c->largest - (c->bucket + 2) / c->scale;
    for (int64_t p = begin; p < end; p++) {
        Part *part = &c->parts[p];
        part->found = 0;
        for (int64_t i = part->begin; i < part->end; i += STRIDE) {
            int64_t stop = i + STRIDE < part->end ? i + STRIDE : part->end;
            if (!any_between(logits + i, stop - i, low, high)) continue;
            for (int64_t j = i; j < stop; j++) {
                if (bucket_of(c, logits[j]) == c->bucket && logits[j] >= -FLT_MAX) {
                    c->tokens[part->begin + part->found++] = (Token){logits[j], (int32_t)j};
                }
            }
        }
    }
}

static int by_likelihood(const void *a, const void *b) {
    const Token *first = a, *second = b;
    if (first->logit != second->logit) return first->logit > second->logit ? -1 : 1;
    return first->id < second->id ? -1 : 1;
}

/* The edge at which the running sum of the weights reaches `wanted`; or, if `counting`, the number of tokens, and then
 * behind all that are as likely. Before these tokens that was `reached`, and the sum was `sum`. The last token, if it
 * never gets there. Narrows `tokens` down before it sorts them. */
static Edge edge_within(
    const Choosing *c, Token *tokens, int64_t count, bool counting, double wanted, double reached, double sum) {
    while (count > FEW) {
        double high = tokens[0].logit, low = high;
        for (int64_t i = 1; i < count; i++) {
            if (tokens[i].logit > high) high = tokens[i].logit;
            if (tokens[i].logit < low) low = tokens[i].logit;
        }
        if (low == high) break; /* equal ones, in the order of their ids */
        double sums[BUCKETS] = {0}, scale = (BUCKETS - 1) / (high - low);
        int64_t counts[BUCKETS] = {0};
        for (int64_t i = 0; i < count; i++) {
            int bucket = (int)((high - tokens[i].logit) * scale);
            counts[bucket]++;
            sums[bucket] += c->weights[tokens[i].id];
        }
        int bucket = 0, last = BUCKETS - 1;
        for (; bucket < last; bucket++) {
            double more = counting ? (double)counts[bucket] : sums[bucket];
            if (reached + more >= wanted) break;
            reached += more;
            sum += sums[bucket];
        }
        while (counts[bucket] == 0) { /* rounding: the sum is never reached */
            bucket--;
            reached -= counting ? (double)counts[bucket] : sums[bucket];
            sum -= sums[bucket];
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) {
            if ((int)((high - tokens[i].logit) * scale) == bucket) tokens[kept++] = tokens[i];
        }
        count = kept;
    }
    if (count <= FEW) qsort(tokens, (size_t)count, sizeof *tokens, by_likelihood);
    Edge edge = {0};
    for (int64_t i = 0; i < count; i++) {
        double weight = c->weights[tokens[i].id];
        sum += weight;
        reached += counting ? 1 : weight;
        edge = (Edge){tokens[i].logit, tokens[i].id, sum};
        if (reached < wanted) continue;
        if (!counting || i + 1 == count || tokens[i + 1].logit != edge.logit) break;
    }
    return edge;
}

/* The edge in the whole vocabulary. */
static Edge find_edge(Choosing *c, bool counting, double wanted) {
    double reached = 0, sum = 0;
    int bucket = 0, last_filled = 0;
    double reached_there = 0, sum_there = 0;
    for (; bucket <= BUCKETS; bucket++) {
        double count = 0, weight = 0;
        for (int p = 0; p < PARTS; p++) {
            count += (double)c->parts[p].bucket_counts[bucket];
            weight += c->parts[p].bucket_sums[bucket];
        }
        double more = counting ? count : weight;
        if (bucket == BUCKETS || (count > 0 && reached + more >= wanted)) break;
        if (count > 0) last_filled = bucket, reached_there = reached, sum_there = sum;
        reached += more;
        sum += weight;
    }
    /* What is deeper than the buckets is not counted, but gathered; where that is nothing, rounding is why the sum was
     * not reached, and the edge is the last token above. */
    for (c->bucket = bucket;; c->bucket = last_filled, reached = reached_there, sum = sum_there) {
        llmc_parallel(gather, c, PARTS, 1);
        int64_t found = 0;
        for (int p = 0; p < PARTS; p++) {
            memmove(c->tokens + found, c->tokens + c->parts[p].begin, (size_t)c->parts[p].found * sizeof(Token));
            found += c->parts[p].found;
        }
        if (found) return edge_within(c, c->tokens, found, counting, wanted, reached, sum);
    }
}

/* Sets the weights of a block whose logits are below `least` to 0. Returns the sum of what is left. */
WIDE static double cut_block(const float *logits, float *weights, int64_t count, float least) {
    Floats x, weight, sums = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        read_lanes(&x, logits + i, count - i, -INFINITY);
        read_lanes(&weight, weights + i, count - i, 0);
        weight = PICK(x >= least, weight, (Floats){0});
        write_lanes(weights + i, &weight, count - i);
        sums += weight;
    }
    return total_of(&sums);
}

/* Sets all weights behind the edge to 0, and the sums of the blocks to what is left. */
static void cut(void *context, int64_t begin, int64_t end) {
    const Choosing *c = context;
    const float edge = c->edge.logit, above = nextafterf(edge, INFINITY);
    for (int64_t p = begin; p < end; p++) {
        for (int64_t i = c->parts[p].begin; i < c->parts[p].end; i += BLOCK) {
            int64_t count = c->parts[p].end - i < BLOCK ? c->parts[p].end - i : BLOCK;
            double sum = cut_block(c->choice->logits + i, c->weights + i, count, i > c->edge.id ? above : edge);
            for (int64_t j = c->edge.id + INT64_C(1); j > i && j < i + count; j++) { /* equal ones behind it */
                if (c->choice->logits[j] != edge) continue;
                sum -= c->weights[j];
                c->weights[j] = 0;
            }
            c->block_sums[i / BLOCK] = sum;
        }
    }
}

static Edge nearer(Edge a, Edge b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id) ? a : b;
}

/* Rules out what the filters do. */
static void filter(Choosing *c) {
    const LlmcChoice *choice = c->choice;
    Edge edge = {-FLT_MAX, INT32_MAX, 0};
    double total = 0;
    for (int p = 0; p < PARTS; p++) total += c->parts[p].sums[DEPTHS];
    bool top_k = choice->top_k > 0 && choice->top_k < choice->count;
    if (top_k || choice->top_p < 1) {
        int depth = 0;
        for (; depth < DEPTHS - 1; depth++) {
            double sum = 0, count = 0;
            for (int p = 0; p < PARTS; p++) {
                sum += c->parts[p].sums[depth];
                count += (double)c->parts[p].counts[depth];
            }
            bool enough = sum >= choice->top_p * total || choice->top_p >= 1;
            if (top_k ? count >= (double)choice->top_k : enough) break;
        }
        double scale = BUCKETS / (depths[depth] * choice->temperature);
        c->scale = (float)(scale < FLT_MAX ? scale : FLT_MAX);
        llmc_parallel(fill_buckets, c, PARTS, 1);
    }
    if (top_k) {
        edge = find_edge(c, true, (double)choice->top_k);
        total = edge.sum;
    }
    if (choice->top_p < 1) edge = nearer(edge, find_edge(c, false, choice->top_p * total));
    if (choice->min_p > 0) {
        /* The least float that is not below the bound, so that a comparison of floats is exact. */
        double bound = (double)c->largest + choice->temperature * log(choice->min_p);
        float least = bound < -FLT_MAX ? -FLT_MAX : (float)bound;
        if (least < bound) least = nextafterf(least, FLT_MAX);
        edge = nearer(edge, (Edge){least < c->largest ? least : c->largest, INT32_MAX, 0});
    }
    c->edge = edge;
    llmc_parallel(cut, c, PARTS, 1);
}

/* The first token at which the running sum of the weights passes `uniform` of the whole. */
static int64_t draw(const Choosing *c) {
    int64_t blocks = blocks_of(c->choice->count), chosen = 0;
    double total = 0, sum = 0;
    for (int64_t i = 0; i < blocks; i++) total += c->block_sums[i];
    double target = c->choice->uniform * total;
    int64_t block = 0, last = 0;
    for (; block < blocks; block++) {
        if (c->block_sums[block] > 0) last = block;
        if (sum + c->block_sums[block] > target) break;
        sum += c->block_sums[block];
    }
    if (block == blocks) block = last, target = INFINITY; /* rounding: the last that can be drawn at all */
    int64_t end = (block + 1) * BLOCK < c->choice->count ? (block + 1) * BLOCK : c->choice->count;
    for (int64_t i = block * BLOCK; i < end; i++) {
        if (!(c->weights[i] > 0)) continue;
        chosen = i;
        sum += c->weights[i];
        if (sum > target) break;
    }
    return chosen;
}

static int64_t likeliest(const Choosing *c) {
    for (int p = 0; p < PARTS; p++) {
        if (c->parts[p].largest < c->largest) continue;
        for (int64_t i = c->parts[p].begin; i < c->parts[p].end; i++) {
            if (c->choice->logits[i] == c->largest) return i;
        }
    }
    return LLMC_NO_TOKEN; /* all are minus infinity */
}

static int64_t choose(Choosing *c) {
    const LlmcChoice *choice = c->choice;
    llmc_parallel(look, c, PARTS, 1);
    c->largest = -FLT_MAX;
    for (int p = 0; p < PARTS; p++) {
        if (c->parts[p].broken) return LLMC_NO_TOKEN;
        if (c->parts[p].largest > c->largest) c->largest = c->parts[p].largest;
    }
    int64_t best = likeliest(c);
    if (best < 0 || choice->temperature == 0) return best;
    llmc_parallel(weigh, c, PARTS, 1);
    if (choice->top_k > 0 || choice->top_p < 1 || choice->min_p > 0) filter(c);
    return draw(c);
}

/* Whether a choice can be made as it is asked for. What is NaN fails every comparison. */
static bool is_possible(const LlmcChoice *choice) {
    if (choice == NULL || choice->logits == NULL || choice->scratch == NULL) return false;
    if ((uintptr_t)choice->logits % sizeof(float) || (uintptr_t)choice->scratch % 64) return false;
    if (choice->count < 1 || choice->count > INT32_MAX || choice->top_k < 0) return false;
    if (!(choice->penalty > 0 && choice->penalty < INFINITY)) return false;
    if (!(choice->temperature >= 0 && choice->temperature < INFINITY)) return false;
    if (!(choice->top_p >= 0 && choice->top_p <= 1 && choice->min_p >= 0 && choice->min_p <= 1)) return false;
    if (!(choice->uniform >= 0 && choice->uniform < 1)) return false;
    if (choice->penalty == 1) return true; /* what was seen has no effect */
    if (choice->seen_count < 0 || choice->seen_count > choice->count) return false;
    if (choice->seen_count > 0 && choice->seen == NULL) return false;
    bool inside = true;
    for (int64_t i = 0; i < choice->seen_count; i++) inside &= choice->seen[i] >= 0 && choice->seen[i] < choice->count;
    return inside;
}

int64_t llmc_choose(const LlmcChoice *choice, int64_t threads) {
    if (!is_possible(choice)) return LLMC_NO_CHOICE;
    char *place = choice->scratch;
    const int64_t count = choice->count;
    Choosing c = {.choice = choice, .weights = (float *)place};
    place += round_up(count * (int64_t)sizeof(float), 64);
    c.tokens = (Token *)place;
    place += round_up(count * (int64_t)sizeof(Token), 64);
    c.block_sums = (double *)place;
    place += round_up(blocks_of(count) * (int64_t)sizeof(double), 64);
    c.parts = (Part *)place;
    place += PARTS * sizeof(Part);
    for (int64_t p = 0; p < PARTS; p++) {
        int64_t begin = blocks_of(count) * p / PARTS * BLOCK, end = blocks_of(count) * (p + 1) / PARTS * BLOCK;
        c.parts[p].begin = begin;
        c.parts[p].end = end < count ? end : count;
    }
    /* Under the turn: another choice from these logits may be under way. The logits as they were are kept where a
     * penalty changes them. */
    LlmcPool *pool = llmc_take_turn(threads);
    const bool penalised = choice->penalty != 1;
    float *before = (float *)place;
    const float penalty = (float)choice->penalty;
    for (int64_t i = 0; penalised && i < choice->seen_count; i++) {
        float *logit = &choice->logits[choice->seen[i]];
        before[i] = *logit;
        *logit = *logit < 0 ? *logit * penalty : *logit / penalty;
    }
    int64_t chosen = choose(&c);
    for (int64_t i = choice->seen_count - 1; penalised && i >= 0; i--) choice->logits[choice->seen[i]] = before[i];
    llmc_end_turn(pool);
    return chosen;
}
