/* The gated-SiLU expert FFN over one message, computed in float32, one thread: gather, both
 * products, the activation and the weighted sum in one pass over each expert's weights, which are
 * float32 or bfloat16 (`narrow`; exact in float32, half the memory to read).
 *
 * Weights are kept in panels of 32 columns (raymoe/experts/compiled.py cuts them), so that memory is
 * read once and in order whatever the number of rows; a tile of up to ROWS rows x 32 columns stays in
 * registers, rows being the broadcast side (Goto and van de Geijn, 2008, with the packing done once,
 * when the replica is loaded).
 *     up   [F / 16][D][16 gate columns, 16 up columns]
 *     down [D / 32][F][32 columns]
 * Narrow ones have the two halves of each row of 32 columns interleaved: [16][2].
 */

#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__AVX512F__)
enum { WIDTH = 16, ROWS = 12 };
#elif defined(__AVX__)
enum { WIDTH = 8, ROWS = 3 };
#else
enum { WIDTH = 4, ROWS = 3 };
#endif
enum { PANEL = 32, VECTORS = PANEL / WIDTH, HALF = VECTORS / 2, BLOCK = 8 * ROWS, AHEAD = 4096 };

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef float Loose __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

typedef int32_t LooseIntegers __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static inline Vector load(const float *at) { return *(const Loose *)at; }
/* Columns c and c + 16 of a narrow panel lie in one word, low and high: both are WIDTH of them. */
static inline void split(const char *at, Vector *low, Vector *high) {
    Integers words = *(const LooseIntegers *)(const void *)at;
    *low = (Vector)(words << 16);
    *high = (Vector)(words & (int32_t)0xffff0000);
}
static inline Vector choose(Integers where, Vector yes, Vector no) {
    return (Vector)((where & (Integers)yes) | (~where & (Integers)no));
}
static inline void store(float *at, Vector value) { *(Loose *)at = value; }

/* e^x, within 2 units in the last place for x in [-87, 88] and clamped outside: a power of two and
 * a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients of expf). */
static inline Vector exponential(Vector x) {
    const Vector zero = {0};
    Vector high = zero + 88.0f, low = zero - 87.0f;
    x = choose(x > high, high, x);
    x = choose(x < low, low, x);
    Vector shifted = x * 1.44269504088896341f + 12582912.0f; /* rounds: 1.5 * 2^23 */
    Vector n = shifted - 12582912.0f;
    Vector r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vector p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return p * (Vector)power;
}

static inline Vector silu(Vector x) { return x / (1.0f + exponential(-x)); }

typedef struct {
    const float *x;         /* [N, D] */
    const int32_t *row;     /* of each pair */
    const float *weight;    /* of each pair; NULL: rows mode */
    float *out;             /* [N, D] or [P, D] */
    float *packed, *joined; /* [BLOCK, D], [BLOCK, F]: chunks of rows, transposed */
    int64_t hidden, inner, narrow;
} Job;

/* acc [m][VECTORS] += transposed rows [k][m] times a panel [k][32] */
static inline __attribute__((always_inline)) void tile(const int m, const int narrow,
                                                       int64_t depth, const float *rows,
                                                       const char *panel,
                                                       Vector acc[ROWS][VECTORS]) {
    const int64_t size = narrow ? 2 : 4;
    for (int64_t k = 0; k < depth; k++, rows += m, panel += size * PANEL) {
#pragma GCC unroll 4
        for (int v = 0; v < HALF; v++) {
            Vector first, second; /* columns WIDTH * v on, and those 16 further */
            if (narrow) {
                split(panel + 4 * WIDTH * v, &first, &second);
            } else {
                const float *wide = (const float *)(const void *)panel;
                first = load(wide + WIDTH * v);
                second = load(wide + WIDTH * (v + HALF));
                __builtin_prefetch(panel + 4 * WIDTH * (v + HALF) + AHEAD);
            }
            /* 4 KiB ahead, also into the next panel: the hardware stops at pages. 164 us a message
             * instead of 400 at 8 experts x 8 rows x [256, 256] float32 */
            __builtin_prefetch(panel + 4 * WIDTH * v + AHEAD);
#pragma GCC unroll 12
            for (int i = 0; i < m; i++) {
                acc[i][v] += first * rows[i];
                acc[i][v + HALF] += second * rows[i];
            }
        }
    }
}

static inline __attribute__((always_inline)) void up_tile(const int m, const int narrow,
                                                          const Job *job, const float *rows,
                                                          const char *panel, float *joined) {
    Vector acc[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) acc[i][v] = (Vector){0};
    tile(m, narrow, job->hidden, rows, panel, acc);
#pragma GCC unroll 12
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int v = 0; v < HALF; v++) {
            const Vector h = silu(acc[i][v]) * acc[i][v + HALF];
            for (int c = 0; c < WIDTH; c++) joined[(WIDTH * v + c) * m + i] = h[c];
        }
}

static inline __attribute__((always_inline)) void down_tile(const int m, const int narrow,
                                                            const Job *job, const float *joined,
                                                            const char *panel, int64_t pair,
                                                            int64_t column) {
    Vector acc[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) acc[i][v] = (Vector){0};
    tile(m, narrow, job->inner, joined, panel, acc);
#pragma GCC unroll 12
    for (int i = 0; i < m; i++) {
        int64_t row = job->weight ? job->row[pair + i] : pair + i;
        float *to = job->out + row * job->hidden + column;
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            if (job->weight)
                store(to + WIDTH * v, load(to + WIDTH * v) + acc[i][v] * job->weight[pair + i]);
            else
                store(to + WIDTH * v, acc[i][v]);
        }
    }
}

#define FOR_EACH_SIZE(CASE) CASE(1) CASE(2) CASE(3) MORE_SIZES(CASE)
#if defined(__AVX512F__)
#define MORE_SIZES(CASE) \
    CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define MORE_SIZES(CASE)
#endif

static void up(int m, const Job *job, const float *rows, const char *panel, float *joined) {
    switch (job->narrow ? -m : m) {
#define CASE(M) \
    case M: up_tile(M, 0, job, rows, panel, joined); break; \
    case -M: up_tile(M, 1, job, rows, panel, joined); break;
        FOR_EACH_SIZE(CASE)
#undef CASE
    }
}

static void down(int m, const Job *job, const float *joined, const char *panel, int64_t pair,
                 int64_t column) {
    switch (job->narrow ? -m : m) {
#define CASE(M) \
    case M: down_tile(M, 0, job, joined, panel, pair, column); break; \
    case -M: down_tile(M, 1, job, joined, panel, pair, column); break;
        FOR_EACH_SIZE(CASE)
#undef CASE
    }
}

/* Rows of pairs [first, first + m) as [D][m]. */
static void pack(const Job *job, int64_t first, int64_t m, float *to) {
    for (int64_t i = 0; i < m; i++) {
        const float *from = job->x + job->row[first + i] * job->hidden;
        for (int64_t k = 0; k < job->hidden; k++) to[k * m + i] = from[k];
    }
}

/* One expert's run of pairs, at most BLOCK of them: each panel is read once. */
static void block(const Job *job, const char *up_panels, const char *down_panels, int64_t first,
                  int64_t count) {
    int64_t hidden = job->hidden, inner = job->inner, size = job->narrow ? 2 : 4;
    /* chunks of about equal size: 13 rows are 7 and 6, not 12 and 1 */
    int64_t chunks = (count + ROWS - 1) / ROWS, start[BLOCK / ROWS + 1];
    for (int64_t c = 0; c <= chunks; c++) start[c] = count * c / chunks;
    for (int64_t c = 0; c < chunks; c++)
        pack(job, first + start[c], start[c + 1] - start[c], job->packed + start[c] * hidden);
    for (int64_t f = 0; f < inner; f += PANEL / 2, up_panels += size * PANEL * hidden)
        for (int64_t c = 0; c < chunks; c++) {
            int64_t m = start[c + 1] - start[c];
            up((int)m, job, job->packed + start[c] * hidden, up_panels,
               job->joined + start[c] * inner + f * m);
        }
    for (int64_t d = 0; d < hidden; d += PANEL, down_panels += size * PANEL * inner)
        for (int64_t c = 0; c < chunks; c++)
            down((int)(start[c + 1] - start[c]), job, job->joined + start[c] * inner, down_panels,
                 first + start[c], d);
}

/* Floats of scratch that raymoe_experts needs. */
int64_t raymoe_experts_scratch(int64_t hidden, int64_t inner) { return BLOCK * (hidden + inner); }

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* One message, or what of it `budget_ns` allows (0: all). replicas: addresses of (up, down) for each
 * expert, 0 where it is not held; words: expert_ids [n], counts [n], row [P], all checked but for the
 * layer's own number of experts; weights float32 [P] or NULL; narrow: replicas are bfloat16, else
 * float32. out [N, D] is the weighted sum, or [P, D] a row a pair.
 * `first`: the pair to begin with, 0 or what the last call has returned. Returns the pair to go on
 * with, P when all is done; -1 when an expert is not held: nothing has been computed then. */
int64_t raymoe_experts(const int64_t *replicas, int64_t experts, const int32_t *words,
                       const float *weights, const float *x, float *out, float *scratch,
                       int64_t n, int64_t tokens, int64_t hidden, int64_t inner,
                       int64_t narrow, int64_t first, int64_t budget_ns) {
    if (!first) {
        for (int64_t i = 0; i < n; i++)
            if ((uint32_t)words[i] >= (uint64_t)experts || !replicas[2 * words[i]]) return -1;
        if (weights) memset(out, 0, (size_t)(tokens * hidden) * sizeof *out);
    }
    Job job = {.x = x, .row = words + 2 * n, .weight = weights, .out = out,
               .packed = scratch, .joined = scratch + BLOCK * hidden,
               .hidden = hidden, .inner = inner, .narrow = narrow};
    int64_t pair = 0, until = budget_ns ? now_ns() + budget_ns : 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t *replica = replicas + 2 * words[i];
        int64_t end = pair + words[n + i];
        if (pair < first) pair = first < end ? first : end;
        while (pair < end) {
            int64_t count = end - pair < BLOCK ? end - pair : BLOCK;
            block(&job, (const char *)(intptr_t)replica[0], (const char *)(intptr_t)replica[1], pair,
                  count);
            pair += count;
            if (until && now_ns() >= until) return pair;
        }
    }
    return pair;
}
