/* The exchange of one layer's batch: cutting pairs into messages, writing a request, checking one,
 * adding up replies. raymoe/dispatch.py and raymoe/links/protocol.py say the same in numpy and are
 * the reference; tests/native holds the two against each other.
 *
 * A cut lies in one int32 arena (P pairs, B boxes; a box is a group and a stretch of tokens):
 *     [0] messages  [1] P  [2] B  [3..7] unused
 *     B records of 8: group, first pair, pairs, tokens, first run, runs, 0, 0
 *     pair[P] row[P] token[P] expert[P] count[P]     message m's part of each
 *     key[P] token_of_pair[P] histogram[B * experts] last[B] record[B]     scratch
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { HEAD = 8, RECORD = 8 };
enum { GROUP, FIRST, PAIRS, TOKENS, RUN, RUNS };

typedef struct {
    int32_t *record, *pair, *row, *token, *expert, *count, *scratch;
} Cut;

static Cut parts_of(int32_t *arena, int64_t pairs, int64_t boxes) {
    Cut cut;
    cut.record = arena + HEAD;
    cut.pair = cut.record + RECORD * boxes;
    cut.row = cut.pair + pairs;
    cut.token = cut.row + pairs;
    cut.expert = cut.token + pairs;
    cut.count = cut.expert + pairs;
    cut.scratch = cut.count + pairs;
    return cut;
}

/* Sort P pairs by (group, stretch, expert), stably, by counting; number the distinct tokens of each
 * message. `groups_of` holds a group for each pair (by_pair) or each expert. `load` [experts] or
 * NULL is counted up. Returns the number of messages, -1 for an expert or token out of range, -2 for
 * a pair without a group; nothing has been counted then. */
int64_t raymoe_cut(int32_t *arena, const int64_t *expert_of_pair, const int64_t *groups_of,
                   int64_t by_pair, int64_t *load, int64_t pairs, int64_t top_k, int64_t experts,
                   int64_t groups, int64_t tokens, int64_t message_tokens) {
    int64_t stretches = (tokens + message_tokens - 1) / message_tokens;
    int64_t boxes = groups * stretches;
    Cut cut = parts_of(arena, pairs, boxes);
    int32_t *key = cut.scratch, *token_of_pair = key + pairs, *histogram = token_of_pair + pairs;
    int32_t *last = histogram + boxes * experts, *record_of_box = last + boxes;

    memset(histogram, 0, (size_t)(boxes * experts) * sizeof *histogram);
    int64_t token = 0, choice = 0;
    for (int64_t p = 0; p < pairs; p++) {
        int64_t expert = expert_of_pair[p];
        if ((uint64_t)expert >= (uint64_t)experts) return -1;
        if (choice++ == top_k) {
            choice = 1;
            token++;
        }
        if ((uint64_t)token >= (uint64_t)tokens) return -1;
        int64_t group = by_pair ? groups_of[p] : groups_of[expert];
        if ((uint64_t)group >= (uint64_t)groups) return -2;
        int64_t box = stretches == 1 ? group : group * stretches + token / message_tokens;
        key[p] = (int32_t)(box * experts + expert);
        token_of_pair[p] = (int32_t)token;
        histogram[key[p]]++;
    }
    if (load)
        for (int64_t p = 0; p < pairs; p++) load[expert_of_pair[p]]++;

    int32_t at = 0, runs = 0, messages = 0;
    for (int64_t box = 0; box < boxes; box++) {
        int32_t first = at, first_run = runs;
        int32_t *bins = histogram + box * experts;
        for (int32_t expert = 0; expert < experts; expert++) {
            int32_t count = bins[expert];
            bins[expert] = at; /* where the run begins */
            if (!count) continue;
            cut.expert[runs] = expert;
            cut.count[runs++] = count;
            at += count;
        }
        if (at == first) continue;
        int32_t *record = cut.record + RECORD * messages;
        record[GROUP] = (int32_t)(box / stretches);
        record[FIRST] = first;
        record[PAIRS] = at - first;
        record[TOKENS] = 0;
        record[RUN] = first_run;
        record[RUNS] = runs - first_run;
        record_of_box[box] = messages++;
        last[box] = -1;
    }
    for (int64_t p = 0; p < pairs; p++) {
        int32_t box = key[p] / (int32_t)experts;
        int32_t *record = cut.record + RECORD * record_of_box[box];
        if (token_of_pair[p] != last[box]) { /* pairs come by token, so each token comes once */
            last[box] = token_of_pair[p];
            cut.token[record[FIRST] + record[TOKENS]++] = token_of_pair[p];
        }
        int32_t to = histogram[key[p]]++;
        cut.pair[to] = (int32_t)p;
        cut.row[to] = record[TOKENS] - 1;
    }
    arena[0] = messages;
    arena[1] = (int32_t)pairs;
    arena[2] = (int32_t)boxes;
    return messages;
}

/* Write message `number` into a request region. weights [batch pairs] is NULL in ROWS mode; x is
 * the batch's [T, row_bytes]. */
void raymoe_write(int32_t *arena, int64_t number, uint8_t *request, const float *weights,
                  const uint8_t *x, int64_t row_bytes) {
    Cut cut = parts_of(arena, arena[1], arena[2]);
    const int32_t *record = cut.record + RECORD * number;
    size_t runs = (size_t)record[RUNS], pairs = (size_t)record[PAIRS];
    const int32_t *pair = cut.pair + record[FIRST], *token = cut.token + record[FIRST];
    uint8_t *to = request;

    memcpy(to, cut.expert + record[RUN], 4 * runs);
    memcpy(to += 4 * runs, cut.count + record[RUN], 4 * runs);
    memcpy(to += 4 * runs, cut.row + record[FIRST], 4 * pairs);
    to += 4 * pairs;
    if (weights) {
        for (size_t p = 0; p < pairs; p++) memcpy(to + 4 * p, weights + pair[p], 4);
        to += 4 * pairs;
    }
    to = request + ((size_t)(to - request + 63) & ~(size_t)63);
    for (int32_t i = 0, j; i < record[TOKENS]; i = j) { /* neighbours travel in one copy */
        for (j = i + 1; j < record[TOKENS] && token[j] == token[j - 1] + 1; j++) {
        }
        size_t size = (size_t)(j - i) * (size_t)row_bytes;
        memcpy(to, x + (size_t)token[i] * (size_t)row_bytes, size);
        to += size;
    }
}

/* Add the reply to message `number`, rows [N, D] float32, to out [T, D]. The `first` reply fills
 * out, zeros where it has no row. */
void raymoe_add(int32_t *arena, int64_t number, const float *restrict rows, float *restrict out,
                int64_t hidden, int64_t tokens, int64_t first) {
    Cut cut = parts_of(arena, arena[1], arena[2]);
    const int32_t *record = cut.record + RECORD * number;
    const int32_t *token = cut.token + record[FIRST];
    size_t row_bytes = (size_t)hidden * sizeof(float);
    int64_t done = 0; /* tokens of out written, when first */
    for (int32_t i = 0; i < record[TOKENS]; i++) {
        const float *restrict row = rows + (size_t)i * (size_t)hidden;
        float *restrict to = out + (size_t)token[i] * (size_t)hidden;
        if (first) {
            memset(out + (size_t)done * (size_t)hidden, 0, (size_t)(token[i] - done) * row_bytes);
            memcpy(to, row, row_bytes);
            done = token[i] + 1;
        } else {
            for (int64_t d = 0; d < hidden; d++) to[d] += row[d];
        }
    }
    if (first)
        memset(out + (size_t)done * (size_t)hidden, 0, (size_t)(tokens - done) * row_bytes);
}

/* Copy the small arrays of a request out of its region, where the peer could still change them,
 * and check the copy: 0, or what is wrong (1 an expert, 2 a token, 3 the sum of the counts).
 * `words` holds 2 n + 2 P words. */
int64_t raymoe_check(uint32_t *restrict words, const uint8_t *region, int64_t n, int64_t pairs,
                     int64_t tokens, int64_t experts, int64_t weighted) {
    memcpy(words, region, 4 * (size_t)(2 * n + (weighted ? 2 : 1) * pairs));
    const uint32_t *count = words + n, *row = words + 2 * n;
    uint32_t expert = 0, token = 0;
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; i++) expert = words[i] > expert ? words[i] : expert;
    for (int64_t i = 0; i < n; i++) sum += count[i];
    for (int64_t p = 0; p < pairs; p++) token = row[p] > token ? row[p] : token;
    if ((int64_t)expert >= experts) return 1;
    if ((int64_t)token >= tokens) return 2;
    return sum == (uint64_t)pairs ? 0 : 3;
}

/* Count the pairs of a message's runs: words are expert_ids [n] and counts [n], load int64 [E]. */
void raymoe_tally(int64_t *load, const int32_t *words, int64_t n) {
    for (int64_t i = 0; i < n; i++) load[words[i]] += words[n + i];
}

/* Identity experts, for tests and measurements of the exchange alone: out[i] = x[i] * the sum of the
 * weights of its pairs. `total` [N] is scratch. */
void raymoe_identity(const float *restrict x, const int32_t *row, const float *weights,
                     float *restrict out, float *restrict total, int64_t tokens, int64_t pairs,
                     int64_t hidden) {
    memset(total, 0, (size_t)tokens * sizeof *total);
    for (int64_t p = 0; p < pairs; p++) total[row[p]] += weights[p];
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = 0; d < hidden; d++) out[t * hidden + d] = x[t * hidden + d] * total[t];
}
