/* Cutting bfloat16 weights into the panels of experts.c, and putting them together again.
 *
 * A panel's row is 16 words; a word holds one number of each half of the row: `second` numbers
 * apart where they are stored. Numbers are moved as bits. */

#include <stdint.h>

enum { HALF = 16 };

/* stored [rows][stride] <-> panels [count][rows][16][2]; panel p's first half begins at column
 * `step` * p. `back`: from the panels to what is stored. */
int64_t raymoe_panels(uint16_t *stored, uint16_t *panels, int64_t rows, int64_t stride,
                      int64_t count, int64_t step, int64_t second, int64_t back) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < count; p++) {
            uint16_t *restrict low = stored + r * stride + p * step, *restrict high = low + second;
            uint16_t *restrict words = panels + 2 * HALF * (p * rows + r);
            if (back)
                for (int c = 0; c < HALF; c++) {
                    low[c] = words[2 * c];
                    high[c] = words[2 * c + 1];
                }
            else
                for (int c = 0; c < HALF; c++) {
                    words[2 * c] = low[c];
                    words[2 * c + 1] = high[c];
                }
        }
    return 0;
}
