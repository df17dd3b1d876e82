/* Small operations on rows of numbers that transformers makes of half a dozen torch calls each.
 * raymoe/engine/fused.py puts them in their place where they give the same. */

#include <math.h>
#include <stdint.h>

/* out[r] = weight * x[r] / sqrt(mean(x[r]^2) + epsilon), rows side by side: Zhang & Sennrich 2019. */
int64_t raymoe_norm(float *restrict out, const float *restrict x, const float *restrict weight,
                    int64_t rows, int64_t width, float epsilon) {
    for (int64_t r = 0; r < rows; r++, x += width, out += width) {
        float parts[16] = {0}, total = 0;
        int64_t at = 0;
        for (; at + 16 <= width; at += 16)
            for (int n = 0; n < 16; n++) parts[n] += x[at + n] * x[at + n];
        for (; at < width; at++) total += x[at] * x[at];
        for (int n = 0; n < 16; n++) total += parts[n];
        float factor = 1.0f / sqrtf(total / (float)width + epsilon);
        for (int64_t n = 0; n < width; n++) out[n] = weight[n] * (x[n] * factor);
    }
    return 0;
}

/* Rotary embedding of x [rows, heads, width] with the given strides -> out, side by side: the first
 * half of a head turns with the second (Su et al. 2021, in the order of GPT-NeoX). cos and sin are
 * [rows, width]. */
int64_t raymoe_rotate(float *restrict out, const float *restrict x, int64_t row_stride,
                      int64_t head_stride, const float *restrict cos, const float *restrict sin,
                      int64_t rows, int64_t heads, int64_t width) {
    int64_t half = width / 2;
    for (int64_t r = 0; r < rows; r++, cos += width, sin += width)
        for (int64_t h = 0; h < heads; h++, out += width) {
            const float *from = x + r * row_stride + h * head_stride;
            for (int64_t n = 0; n < half; n++) {
                out[n] = from[n] * cos[n] - from[n + half] * sin[n];
                out[n + half] = from[n + half] * cos[n + half] + from[n] * sin[n + half];
            }
        }
    return 0;
}
