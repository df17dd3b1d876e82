/* Attention of decoding tokens over the paged KV cache. raymoe/engine/attention.py does the same in
 * torch and is the reference; tests/native holds the two against each other.
 *
 * B rows, one token each; H query heads, H_kv key/value heads, g = H / H_kv; blocks of T tokens.
 * Keys lie as [blocks, H_kv, T, D_k], values as [blocks, H_kv, T, D_s]; of D_s numbers the first D_v
 * are used. A plan is one int64 array:
 *     B records of 4: first position seen, the token's own position, where in the array the row's
 *     block numbers begin, the number of the first of them
 *     the block numbers
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { WIDE = 8 };
typedef float Floats __attribute__((vector_size(4 * WIDE), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDE), aligned(4)));

static inline Floats load(const float *from) { return *(const Floats *)from; }
static inline void store(float *to, Floats x) { *(Floats *)to = x; }
static inline Floats all(float x) { return (Floats){x, x, x, x, x, x, x, x}; }

static inline float sum(Floats x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

/* exp(x) for x <= 0 within 2 units in the last place: 2^n * e^r, |r| <= ln(2)/2, Taylor to r^7. */
static inline Floats exponential(Floats x) {
    const Floats round = all(12582912.0f); /* 1.5 * 2^23 */
    Ints below = x < all(-87.0f);
    x = (Floats)(((Ints)x & ~below) | ((Ints)all(-87.0f) & below));
    Floats shifted = x * 1.44269504f + round, n = shifted - round;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = all(1.0f / 5040) * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (Floats)((Ints)p + ((Ints)shifted << 23));
}

static inline float dot(const float *a, const float *b, int64_t width) {
    Floats one = all(0), two = all(0);
    int64_t at = 0;
    for (; at + 2 * WIDE <= width; at += 2 * WIDE) {
        one += load(a + at) * load(b + at);
        two += load(a + at + WIDE) * load(b + at + WIDE);
    }
    float rest = 0;
    for (; at < width; at++) rest += a[at] * b[at];
    return sum(one + two) + rest;
}

/* scores[0..count) become exp(score - largest); gives their sum, the sink's part with it. */
static float weigh(float *scores, int64_t count, const float *sink) {
    float largest = sink ? *sink : -INFINITY;
    for (int64_t t = 0; t < count; t++) largest = scores[t] > largest ? scores[t] : largest;
    Floats total = all(0);
    int64_t t = 0;
    for (; t + WIDE <= count; t += WIDE) {
        Floats e = exponential(load(scores + t) - largest);
        store(scores + t, e);
        total += e;
    }
    float rest = sink ? expf(*sink - largest) : 0;
    for (; t < count; t++) rest += scores[t] = expf(scores[t] - largest);
    return sum(total) + rest;
}

typedef struct {
    const int64_t *blocks; /* of the row, the first of them being block number `first_block` */
    int64_t first, stop, first_block, tokens, heads, head;
} Span;

/* The stretch of keys or values from position `at` to the end of its block: where, and how many. */
static inline float *stretch(float *pool, const Span *span, int64_t at, int64_t width, int64_t *many) {
    int64_t offset = at % span->tokens, left = span->stop - at;
    int64_t block = span->blocks[at / span->tokens - span->first_block];
    *many = span->tokens - offset < left ? span->tokens - offset : left;
    return pool + ((block * span->heads + span->head) * span->tokens + offset) * width;
}

/* out[0..width) = sum of weight * value / total */
static void mix(float *out, float *pool, const Span *span, const float *weights, float total,
                int64_t width, int64_t used) {
    float share = 1.0f / total;
    int64_t many, part = 0;
    for (; part + 4 * WIDE <= used; part += 4 * WIDE) {
        Floats a = all(0), b = a, c = a, d = a;
        const float *weight = weights;
        for (int64_t at = span->first; at < span->stop; at += many) {
            const float *value = stretch(pool, span, at, width, &many) + part;
            for (int64_t t = 0; t < many; t++, value += width) {
                Floats w = all(*weight++);
                a += w * load(value);
                b += w * load(value + WIDE);
                c += w * load(value + 2 * WIDE);
                d += w * load(value + 3 * WIDE);
            }
        }
        store(out + part, a * share);
        store(out + part + WIDE, b * share);
        store(out + part + 2 * WIDE, c * share);
        store(out + part + 3 * WIDE, d * share);
    }
    if (part == used) return;
    for (int64_t n = part; n < used; n++) out[n] = 0;
    const float *weight = weights;
    for (int64_t at = span->first; at < span->stop; at += many) {
        const float *value = stretch(pool, span, at, width, &many);
        for (int64_t t = 0; t < many; t++, value += width, weight++)
            for (int64_t n = part; n < used; n++) out[n] += *weight * value[n];
    }
    for (int64_t n = part; n < used; n++) out[n] *= share;
}

/* Write each row's new key and value, then attend -> out [B, H, D_v]. Strides in numbers; the last
 * dimension's is 1. `sinks` [H] or NULL: logits that take part and add nothing. `cap` 0: none.
 * `scratch` holds as many numbers as a row sees keys. */
int64_t raymoe_decode(const int64_t *plan, int64_t rows, int64_t heads, int64_t shared,
                      int64_t tokens, int64_t key_width, int64_t value_width, int64_t stored_width,
                      const float *query, int64_t query_row, int64_t query_head, const float *key,
                      int64_t key_row, int64_t key_head, const float *value, int64_t value_row,
                      int64_t value_head, float *keys, float *values, float *out,
                      const float *sinks, float scale, float cap, float *scratch) {
    int64_t group = heads / shared, many;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t *record = plan + 4 * row;
        Span span = {plan + record[2], record[0], record[1] + 1, record[3], tokens, shared, 0};
        for (span.head = 0; span.head < shared; span.head++) {
            int64_t h = span.head;
            memcpy(stretch(keys, &span, record[1], key_width, &many),
                   key + row * key_row + h * key_head, (size_t)key_width * sizeof(float));
            memcpy(stretch(values, &span, record[1], stored_width, &many),
                   value + row * value_row + h * value_head, (size_t)value_width * sizeof(float));
            for (int64_t g = h * group; g < (h + 1) * group; g++) {
                const float *asked = query + row * query_row + g * query_head;
                float *score = scratch;
                for (int64_t at = span.first; at < span.stop; at += many) {
                    const float *stored = stretch(keys, &span, at, key_width, &many);
                    for (int64_t t = 0; t < many; t++, stored += key_width)
                        *score++ = dot(asked, stored, key_width) * scale;
                }
                if (cap > 0)
                    for (float *s = scratch; s < score; s++) *s = tanhf(*s / cap) * cap;
                float total = weigh(scratch, score - scratch, sinks ? sinks + g : 0);
                mix(out + (row * heads + g) * value_width, values, &span, scratch, total,
                    stored_width, value_width);
            }
        }
    }
    return 0;
}
