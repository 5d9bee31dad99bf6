// A span of a cache as attention.cpp reads it: links (link.h) of dimensions of keys, so that lanes are keys, and links of
// keys of values, so that lanes are dimensions. Knows every type that a cache may have, nothing of sequences or of attention.
#pragma once

#include "functions.h"
#include "link.h"
#include "panels.h"

namespace QUIRE_ISA {
namespace {

constexpr int SPAN = 128;  // keys

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Heads of one token lie far apart, where the hardware does not look ahead by itself.
INLINE void fetch(const uint8_t *row, int64_t count) {
    for (int64_t from = 0; from < count; from += 64) __builtin_prefetch(row + from, 0, 2);
}

// Link j of words of elements.
template <int type> INLINE Link::Values link_of_words(Words w, int j) {
#if defined(__AVX512BF16__)
    if constexpr (type == QUIRE_BF16) return w;
    return pair(Element<type>::of_words(w, 2 * j), Element<type>::of_words(w, 2 * j + 1));
#else
    return Element<type>::of_words(w, j);
#endif
}

// Keys [begin, end) of a span, both multiples of LANES, into [panel of 32 keys][links][32], zeros past the size. Transposed as
// words, of one to four numbers each, and widened afterwards. `ahead`: rows that are needed next; memory brings them meanwhile.
template <int type>
void decode_keys(const uint8_t *const *rows, const uint8_t *const *ahead, int begin, int end, int64_t size, int64_t links,
                 float *out) {
    constexpr int BYTES = Element<type>::BYTES * Link::NUMBERS, EACH = 4 / BYTES, WIDTH = LANES * 4;
    const int64_t row_bytes = size * Element<type>::BYTES, whole = row_bytes / WIDTH * WIDTH, rest = row_bytes - whole;
    for (int key = begin; key < end; key += LANES) {
        float *to = out + key / PANEL * links * PANEL + key % PANEL;
        for (int i = 0; i < LANES; i++) fetch(ahead[key + i], row_bytes);
        Words words[LANES];
        for (int64_t from = 0; from < whole; from += WIDTH) {
            for (int i = 0; i < LANES; i++) words[i] = load<Words>(rows[key + i] + from);
            transpose(words);
            for (int i = 0; i < LANES; i++)
                for (int j = 0; j < EACH; j++, to += PANEL) store(to, link_of_words<type>(words[i], j));
        }
        if (rest) {
            for (int i = 0; i < LANES; i++) words[i] = load_some<Words>(rows[key + i] + whole, rest);
            transpose(words);
            for (int i = 0; i < rest / BYTES; i++, to += PANEL) store(to, link_of_words<type>(words[i / EACH], i % EACH));
        }
        for (int64_t i = size / Link::NUMBERS; i < links; i++, to += PANEL) store(to, Floats{});
    }
}

// Dimensions of the panel that begins at d: 32, or 16 where no more are left.
INLINE int panel_width(int64_t size, int64_t d) { return size - d > 16 ? PANEL : 16; }

// Values [begin, end), both multiples of a link's keys, into [panel of dimensions][links of 128][width of the panel], filled up
// with zeros.
template <int type>
void decode_values(const uint8_t *const *rows, int begin, int end, int64_t size, float *out) {
    for (int64_t d = 0; d < size; d += PANEL) {
        const int width = panel_width(size, d);
        float *to = out + d * (SPAN / Link::NUMBERS);
        for (int key = begin; key < end; key += Link::NUMBERS) {
            for (int i = 0; i < width; i += LANES) {
                const auto value = [&](int k) { return d + i < size ? read<type>(rows[k], d + i, size) : Floats{}; };
#if defined(__AVX512BF16__)
                store(to + key / 2 * width + i, pair(value(key), value(key + 1)));
#else
                store(to + key * width + i, value(key));
#endif
            }
        }
    }
}

}  // namespace
}  // namespace QUIRE_ISA
