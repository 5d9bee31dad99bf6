// A span of a cache as attention.cpp reads it: float32, keys transposed, so that lanes are keys, values as they lie, so
// that lanes are dimensions. Knows every type that a cache may have, and nothing of sequences or of attention.
#pragma once

#include "functions.h"
#include "panels.h"

namespace QUIRE_ISA {
namespace {

constexpr int SPAN = 128;  // keys

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Heads of one token lie far apart, where the hardware does not look ahead by itself.
INLINE void fetch(const uint8_t *row, int64_t count) {
    for (int64_t from = 0; from < count; from += 64) __builtin_prefetch(row + from, 0, 2);
}

// Keys [begin, end) of a span, both multiples of LANES, into [panel of 32 keys][size][32]. Transposed as words, of one to
// four numbers each, and widened afterwards. `ahead`: rows that are needed next; memory brings them meanwhile.
template <int type>
void decode_keys(const uint8_t *const *rows, const uint8_t *const *ahead, int begin, int end, int64_t size, float *out) {
    constexpr int BYTES = Element<type>::BYTES, EACH = 4 / BYTES, WIDTH = LANES * 4;
    const int64_t row_bytes = size * BYTES, whole = row_bytes / WIDTH * WIDTH, rest = row_bytes - whole;
    for (int key = begin; key < end; key += LANES) {
        float *to = out + key / PANEL * size * PANEL + key % PANEL;
        for (int i = 0; i < LANES; i++) fetch(ahead[key + i], row_bytes);
        Words words[LANES];
        for (int64_t from = 0; from < whole; from += WIDTH) {
            for (int i = 0; i < LANES; i++) words[i] = load<Words>(rows[key + i] + from);
            transpose(words);
            for (int i = 0; i < LANES; i++)
                for (int j = 0; j < EACH; j++, to += PANEL) store(to, Element<type>::of_words(words[i], j));
        }
        if (!rest) continue;
        for (int i = 0; i < LANES; i++) words[i] = load_some<Words>(rows[key + i] + whole, rest);
        transpose(words);
        for (int i = 0; i < rest / BYTES; i++, to += PANEL) store(to, Element<type>::of_words(words[i / EACH], i % EACH));
    }
}

// Dimensions of the panel that begins at d: 32, or 16 where no more are left.
INLINE int panel_width(int64_t size, int64_t d) { return size - d > 16 ? PANEL : 16; }

// Values [begin, end) into [panel of dimensions][128][width of the panel], filled up with zeros.
template <int type>
void decode_values(const uint8_t *const *rows, const uint8_t *const *ahead, int begin, int end, int64_t size, float *out) {
    for (int64_t d = 0; d < size; d += PANEL) {
        const int width = panel_width(size, d);
        float *to = out + d * SPAN;
        for (int key = begin; key < end; key++) {
            fetch(ahead[key] + d * Element<type>::BYTES, width * Element<type>::BYTES);
            for (int i = 0; i < width; i += LANES)
                store(to + key * width + i, d + i < size ? read<type>(rows[key], d + i, size) : Floats{});
        }
    }
}

}  // namespace
}  // namespace QUIRE_ISA
