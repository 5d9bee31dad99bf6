// A span of a cache as attention.cpp reads it: float32, keys transposed, so that lanes are keys, values as they lie, so
// that lanes are dimensions. Knows every type that a cache may have, and nothing of sequences or of attention.
#pragma once

#include "functions.h"

namespace QUIRE_ISA {
namespace {

constexpr int SPAN = 128;  // keys
constexpr int PANEL = 32;  // keys, or dimensions, of a panel

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// LANES x LANES words, in place.
INLINE void transpose(Words *rows) {
#if defined(__AVX512F__)
    __m512i t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            u[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
            u[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
        }
    for (int c = 0; c < 4; c++) {
        __m512i even[2], odd[2];
        for (int h = 0; h < 2; h++) {
            even[h] = _mm512_shuffle_i32x4(u[8 * h + c], u[8 * h + 4 + c], 0x88);
            odd[h] = _mm512_shuffle_i32x4(u[8 * h + c], u[8 * h + 4 + c], 0xdd);
        }
        rows[c] = (Words)_mm512_shuffle_i32x4(even[0], even[1], 0x88);
        rows[c + 4] = (Words)_mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        rows[c + 8] = (Words)_mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        rows[c + 12] = (Words)_mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
#elif defined(__AVX2__)
    __m256i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; h++) {
            u[i + 2 * h] = _mm256_unpacklo_epi64(t[i + h], t[i + 2 + h]);
            u[i + 2 * h + 1] = _mm256_unpackhi_epi64(t[i + h], t[i + 2 + h]);
        }
    for (int c = 0; c < 4; c++) {
        rows[c] = (Words)_mm256_permute2x128_si256(u[c], u[4 + c], 0x20);
        rows[c + 4] = (Words)_mm256_permute2x128_si256(u[c], u[4 + c], 0x31);
    }
#else
    Words out[LANES];
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) out[j][i] = rows[i][j];
    for (int i = 0; i < LANES; i++) rows[i] = out[i];
#endif
}

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
