// Products of rows with a packed INT8 or INT4 weight: unsigned weights (INT8 stores w + 128) by rows that are rounded to signed
// bytes, in exact integers, so that every order of summation gives the same bits.
#include "linear.h"

#include <algorithm>

namespace QUIRE_ISA {
namespace {

constexpr int64_t AHEAD = 4096;       // bytes between a read and its prefetch, where one tile reads
constexpr int64_t RUN_QUADS = 128;    // 16 KiB of an 8-bit panel
constexpr int64_t LINES = PANEL * 4;  // bytes of a panel for a step: four inputs of INT8, eight of INT4
template <bool INT4> constexpr int64_t QUAD_BYTES = PANEL * (INT4 ? 2 : 4);  // of a panel for four inputs

// x as integers, in tiles of rows, four inputs at a time (`Integers::spread`: from lines to their places); scales and sums of
// the integers [row, groups].
struct Quantized {
    uint8_t *values;
    float *scales;
    int32_t *sums;
    int64_t groups;
};

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// sum += part, here and now: GCC would gather parts of several steps before it adds them, and run out of registers.
INLINE void add_to(Ints &sum, __m256i part) {
    sum += (Ints)part;
    asm("" : "+x"(sum));
}
INLINE void add_to(__m256i &sum, __m256i part) {
    sum = _mm256_add_epi16(sum, part);
    asm("" : "+x"(sum));
}

// Without an instruction that adds four products of bytes to 32 bits. Eight-bit weights: words of 16 bits, whose products are
// added in pairs; so four inputs of a row are the pairs (0, 2) and (1, 3), and bytes 0 and 2 of a weight's word are what a mask
// leaves. Four-bit weights: bytes, whose products are added in pairs to 16 bits (below 2 * 15 * 127), and eight of these sums
// still fit there.
template <bool INT4> struct Integers {
    static constexpr int64_t BYTES = INT4 ? 4 : 8;  // of four inputs of a row

    static void spread(const int8_t *lines, int64_t stride, int rows, int64_t quads, uint8_t *to) {
        if (INT4) return interleave(lines, stride, rows, quads, to);
        for (int64_t i = 0; i < quads; i++, to += rows * BYTES)
            for (int r = 0; r < rows; r++) {
                const int8_t *four = lines + r * stride + i * 4;
                const int16_t pairs[2][2] = {{four[0], four[2]}, {four[1], four[3]}};
                for (int parity = 0; parity < 2; parity++) std::memcpy(to + (parity * rows + r) * 4, pairs[parity], 4);
            }
    }

    // sums += products of `quads` times four inputs, for PASS vectors of outputs from vector `first` of a panel on.
    template <int ROWS, int PASS>
    static INLINE void add(int64_t quads, const uint8_t *x, const uint8_t *w, int first, Ahead ahead,
                           Ints (&sums)[ROWS][PASS]) {
        if constexpr (INT4)
            add_nibbles(quads, x, w, first, ahead, sums);
        else
            add_bytes(quads, x, w, first, ahead, sums);
    }

  private:
    template <int ROWS, int PASS>
    static INLINE void add_bytes(int64_t quads, const uint8_t *x, const uint8_t *w, int first, Ahead ahead,
                                 Ints (&sums)[ROWS][PASS]) {
        for (int64_t i = 0; i < quads; i++, x += ROWS * 8) {
            const uint8_t *from = w + i * LINES;
            if (first == 0) ahead.fetch(i, LINES);
            for (int parity = 0; parity < 2; parity++) {
                __m256i values[PASS];
                for (int v = 0; v < PASS; v++) {
                    const __m256i word = load<__m256i>(from + (first + v) * LANES * 4);
                    values[v] = parity ? _mm256_srli_epi16(word, 8) : _mm256_and_si256(word, _mm256_set1_epi16(0xff));
                }
                for (int r = 0; r < ROWS; r++) {
                    const __m256i one = _mm256_set1_epi32(load<int32_t>(x + (parity * ROWS + r) * 4));
                    for (int v = 0; v < PASS; v++) add_to(sums[r][v], _mm256_madd_epi16(values[v], one));
                }
            }
        }
    }
    template <int ROWS, int PASS>
    static INLINE void add_nibbles(int64_t quads, const uint8_t *x, const uint8_t *w, int first, Ahead ahead,
                                   Ints (&sums)[ROWS][PASS]) {
        constexpr int64_t FITTING = 4;  // eights of inputs; a group is a multiple
        for (int64_t begin = 0; begin < quads / 2; begin += FITTING) {
            __m256i narrow[ROWS][PASS];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < PASS; v++) narrow[r][v] = _mm256_setzero_si256();
            for (int64_t i = begin; i < begin + FITTING; i++) {
                const uint8_t *from = w + i * LINES;
                if (first == 0) ahead.fetch(i, LINES);
                for (int half = 0; half < 2; half++) {
                    __m256i values[PASS];
                    for (int v = 0; v < PASS; v++) {
                        const __m256i word = load<__m256i>(from + (first + v) * LANES * 4);
                        values[v] = _mm256_and_si256(half ? _mm256_srli_epi16(word, 4) : word, _mm256_set1_epi8(15));
                    }
                    for (int r = 0; r < ROWS; r++) {
                        const __m256i one = _mm256_set1_epi32(load<int32_t>(x + ((i * 2 + half) * ROWS + r) * 4));
                        for (int v = 0; v < PASS; v++)
                            add_to(narrow[r][v], _mm256_maddubs_epi16(values[v], one));
                    }
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < PASS; v++)
                    add_to(sums[r][v], _mm256_madd_epi16(narrow[r][v], _mm256_set1_epi16(1)));
        }
    }
};

#else

// INT8: for each four inputs 32 outputs x 4 bytes. INT4: for each eight inputs 32 outputs x 4 bytes whose low halves are the
// first four inputs and whose high halves the other four.
template <bool INT4> struct Integers {
    static constexpr int64_t BYTES = 4;  // of four inputs of a row

    static void spread(const int8_t *lines, int64_t stride, int rows, int64_t quads, uint8_t *to) {
        interleave(lines, stride, rows, quads, to);
    }

    template <int ROWS, int PASS>
    static INLINE void add(int64_t quads, const uint8_t *x, const uint8_t *w, int first, Ahead ahead,
                           Ints (&sums)[ROWS][PASS]) {
        constexpr int STEP = INT4 ? 2 : 1, CHAINS = ROWS <= 2 ? STEP : 1;  // for each output: few rows wait for their sums
        Ints others[ROWS][PASS] = {};
        for (int64_t i = 0; i < quads; i += STEP) {
            Words values[STEP][PASS];
            if (first == 0) ahead.fetch(i / STEP, LINES);
            for (int v = 0; v < PASS; v++) {
                Words word = load<Words>(w + i / STEP * LINES + (first + v) * LANES * 4);
                if (INT4) {
                    values[0][v] = word & 0x0f0f0f0fu;
                    values[STEP - 1][v] = word >> 4 & 0x0f0f0f0fu;
                } else {
                    values[0][v] = word;
                }
            }
            for (int s = 0; s < STEP; s++)
                for (int r = 0; r < ROWS; r++) {
                    Ints one = all_ints(load<int32_t>(x + ((i + s) * ROWS + r) * 4));
                    for (int v = 0; v < PASS; v++) {
                        Ints &sum = s % CHAINS ? others[r][v] : sums[r][v];
                        sum = dot4(sum, values[s][v], one);
                    }
                }
        }
        if (CHAINS > 1)
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < PASS; v++) sums[r][v] += others[r][v];
    }
};

#endif

// inputs: padded to a multiple of 4; group: inputs that share a scale.
template <bool INT4>
Quantized quantize(const Product &product, const Cut &cut, int64_t inputs, int64_t padded, int64_t group) {
    constexpr int64_t BYTES = Integers<INT4>::BYTES;
    Quantized out;
    out.groups = (inputs + group - 1) / group;
    out.values = static_cast<uint8_t *>(quire::scratch(0, product.rows * padded / 4 * BYTES));
    out.scales = static_cast<float *>(quire::scratch(4, product.rows * out.groups * 4));
    out.sums = static_cast<int32_t *>(quire::scratch(5, product.rows * out.groups * 4));
    quire::parallel(cut.tiles, [&](int64_t t) {
        const int rows = cut.rows(t);
        const int64_t whole = up(inputs, 16);
        auto line = static_cast<float *>(quire::scratch(1, whole * (4 + rows)));
        auto lines = reinterpret_cast<int8_t *>(line + whole);
        std::fill(line + inputs, line + whole, 0.0f);
        for (int r = 0; r < rows; r++) {
            int8_t *bytes = lines + r * whole;
            const int64_t row = cut.start(t) + r;
            row_to_floats(product.type, product.row(row), inputs, line);
            for (int64_t g = 0; g < out.groups; g++)
                quantize_row(line + g * group, std::min(group, inputs - g * group), bytes + g * group,
                             out.scales + row * out.groups + g, out.sums + row * out.groups + g);
        }
        Integers<INT4>::spread(lines, whole, rows, padded / 4, out.values + cut.start(t) * padded / 4 * BYTES);
    });
    return out;
}

// What makes floats of integers at the ends of `count` groups, one after the other: scales and sums of a tile's rows,
// `stride` apart, and a panel's scales and zeros.
struct Groups {
    int64_t count;
    const float *row_scales;
    const int32_t *row_sums;
    int64_t stride;
    const float *scales;
    const uint8_t *zeros;
};

// Products of `quads` times four inputs, added to acc [ROWS][32] where there is something; at the ends of groups sums
// [ROWS][32] += what they are worth.
template <bool INT4, int ROWS>
void integer_tile(int64_t quads, const uint8_t *x, const uint8_t *w, Ahead ahead, bool begun, const Groups &groups,
                  int32_t *acc, float *sums) {
    constexpr int PASS = pass_for(ROWS);
    const int64_t each = quads / std::max<int64_t>(groups.count, 1);
    for (int64_t g = 0, done = 0; done < quads; g++, done += each) {
        const int64_t bytes = done * QUAD_BYTES<INT4>;
        const Ahead next = ahead.after(bytes / LINES);
        for (int first = 0; first < PARTS; first += PASS) {
            Ints totals[ROWS][PASS];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < PASS; v++)
                    totals[r][v] = begun ? load<Ints>(acc + r * PANEL + (first + v) * LANES) : Ints{};
            Integers<INT4>::add(each, x + done * ROWS * Integers<INT4>::BYTES, w + bytes, first, next, totals);
            for (int v = 0; v < PASS; v++) {
                const int64_t at = (first + v) * LANES, own = g * PANEL + at;
                if (groups.count == 0) {
                    for (int r = 0; r < ROWS; r++) store(acc + r * PANEL + at, totals[r][v]);
                    continue;
                }
                const Worth<INT4> worth(INT4 ? groups.zeros + own : nullptr, groups.scales + own);
                for (int r = 0; r < ROWS; r++) {
                    const int64_t row = r * groups.stride + g, place = r * PANEL + at;
                    const Floats part = worth(totals[r][v], groups.row_sums[row], groups.row_scales[row]);
                    store(sums + place, load<Floats>(sums + place) + part);
                }
            }
        }
    }
}

using IntegerTile = void (*)(int64_t, const uint8_t *, const uint8_t *, Ahead, bool, const Groups &, int32_t *, float *);

template <bool INT4> IntegerTile integer_tile_for(int rows) {
    return for_rows(rows, [](auto n) -> IntegerTile { return integer_tile<INT4, n()>; });
}

// A panel is taken in runs of inputs that stay in the first-level cache while tiles of rows pass: INT4's are its groups, of
// which a single tile takes all at once. One panel after the other is one stream out of memory, the fastest way to read it.
template <bool INT4> void multiply(const Product &product) {
    const int64_t inputs = product.weights[0]->inputs, padded = up(inputs, INT4 ? 8 : 4);
    const int64_t group = INT4 ? product.weights[0]->group_size : inputs;
    const Cut cut(product.rows);
    const Quantized x = quantize<INT4>(product, cut, inputs, padded, group);

    const bool few = cut.tiles == 1;
    const int64_t quads = padded / 4, run = !INT4 ? RUN_QUADS : few ? quads : group / 4;
    const int64_t row_blocks = (cut.tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    product.over_panels(row_blocks, few ? FEW_ROWS_TASKS : INT64_MAX, [&](int w, int64_t p, int64_t end, int64_t block) {
        const quire_weight &weight = *product.weights[w];
        const int64_t first = block * BLOCK_TILES, last = std::min(cut.tiles, first + BLOCK_TILES);
        const int64_t row = cut.start(first), rows = cut.start(last) - row;
        alignas(64) int32_t acc[BLOCK_TILES * MOST_ROWS * PANEL];
        alignas(64) float sums[BLOCK_TILES * MOST_ROWS * PANEL];
        for (; p < end; p++) {
            std::fill(sums, sums + rows * PANEL, 0.0f);
            for (int64_t begin = 0; begin < quads; begin += run) {
                const int64_t count = std::min(run, quads - begin), g = INT4 ? begin * 4 / group : 0;
                const int64_t ends = INT4 ? count * 4 / group : begin + count == quads, own = (p * x.groups + g) * PANEL;
                const uint8_t *part = static_cast<const uint8_t *>(weight.data) + (p * quads + begin) * QUAD_BYTES<INT4>;
                // Several tiles share the reading of the next run, which lies behind this one.
                const int64_t steps = count * QUAD_BYTES<INT4> / LINES;
                Ahead ahead = {part + (few ? AHEAD : steps * LINES), LINES / (last - first)};
                for (int64_t t = first; t < last; t++, ahead = ahead.after(steps)) {
                    const int64_t at = cut.start(t) * x.groups + g, place = (cut.start(t) - row) * PANEL;
                    const Groups groups = {ends, x.scales + at, x.sums + at, x.groups, weight.scales + own,
                                           INT4 ? weight.zeros + own : nullptr};
                    const uint8_t *values = x.values + (cut.start(t) * quads + begin * cut.rows(t)) * Integers<INT4>::BYTES;
                    integer_tile_for<INT4>(cut.rows(t))(count, values, part, ahead, !INT4 && begin > 0, groups, acc + place,
                                                        sums + place);
                }
            }
            for (int64_t r = 0; r < rows; r++) product.finish(w, row + r, p, sums + r * PANEL);
        }
    });
}

}  // namespace

void multiply_integers(const Product &product) {
    product.weights[0]->form == QUIRE_INT4 ? multiply<true>(product) : multiply<false>(product);
}

}  // namespace QUIRE_ISA
