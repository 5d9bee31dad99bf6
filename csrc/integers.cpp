// Products of rows with a packed INT8 or INT4 weight: unsigned weights (INT8 stores w + 128) by rows that are rounded to signed
// bytes, in exact integers, so that every order of summation gives the same bits.
#include "linear.h"

#include <algorithm>

namespace QUIRE_ISA {
namespace {

constexpr int64_t AHEAD = 4096;       // bytes between a read and its prefetch, where one tile reads, for each of its panels
constexpr int64_t RUN_QUADS = 128;    // 16 KiB of an 8-bit panel
constexpr int64_t LINES = PANEL * 4;  // bytes of a panel for a step: four inputs of INT8, eight of INT4

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

    // sums += products of `quads` times four inputs, for PASS vectors of outputs from vector `first` of a panel on; panels
    // lie panel_bytes apart.
    template <int PASS, int ROWS>
    static INLINE void add(int64_t quads, const uint8_t *x, const uint8_t *w, int64_t, int first, Ahead ahead,
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

    template <int PASS, int ROWS, int SUMS>
    static INLINE void add(int64_t quads, const uint8_t *x, const uint8_t *w, int64_t panel_bytes, int first, Ahead ahead,
                           Ints (&sums)[ROWS][SUMS]) {
        constexpr int STEP = INT4 ? 2 : 1;
        for (int64_t i = 0; i < quads; i += STEP) {
            Words values[STEP][SUMS];
            for (int v = 0; v < SUMS; v++) {
                const int64_t panel = v / PASS * panel_bytes;
                if (first == 0 && v % PASS == 0) Ahead{ahead.from + panel, ahead.step}.fetch(i / STEP, LINES);
                Words word = load<Words>(w + panel + i / STEP * LINES + (first + v % PASS) * LANES * 4);
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
                    for (int v = 0; v < SUMS; v++) sums[r][v] = dot4(sums[r][v], values[s][v], one);
                }
        }
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

// What makes floats of a group's integers: scales and sums of a tile's rows, `stride` apart, and the panel's scales and zeros.
struct Group {
    const float *row_scales;
    const int32_t *row_sums;
    int64_t stride;
    const float *scales;
    const uint8_t *zeros;
};

// Products of `quads` times four inputs, added to acc [ROWS][PANELS * 32] where there is something; at a group's end sums, which
// lie alike, += what they are worth.
template <bool INT4, int ROWS, int PANELS>
void integer_tile(int64_t quads, const uint8_t *x, const uint8_t *w, int64_t panel_bytes, Ahead ahead, bool begun,
                  const Group *group, int32_t *acc, float *sums) {
    constexpr int PASS = pass_for(ROWS), SUMS = PANELS * PASS, WIDTH = PANELS * PANEL;
    for (int first = 0; first < PARTS; first += PASS) {
        const auto place = [&](int v) { return v / PASS * PANEL + (first + v % PASS) * LANES; };
        Ints totals[ROWS][SUMS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < SUMS; v++) totals[r][v] = begun ? load<Ints>(acc + r * WIDTH + place(v)) : Ints{};
        Integers<INT4>::template add<PASS>(quads, x, w, panel_bytes, first, ahead, totals);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < SUMS; v++) {
                const int at = place(v);
                if (!group) {
                    store(acc + r * WIDTH + at, totals[r][v]);
                    continue;
                }
                float *to = sums + r * WIDTH + at;
                const int64_t row = r * group->stride;
                const Floats part = worth<INT4>(totals[r][v], group->row_sums[row], group->row_scales[row],
                                                INT4 ? group->zeros + at : nullptr, group->scales + at);
                store(to, load<Floats>(to) + part);
            }
    }
}

using IntegerTile = void (*)(int64_t, const uint8_t *, const uint8_t *, int64_t, Ahead, bool, const Group *, int32_t *, float *);

// Few rows: two panels at a time are two streams out of memory.
constexpr int panels_for(int rows) { return LANES == 16 && rows <= 3 ? 2 : 1; }

template <bool INT4> IntegerTile integer_tile_for(int rows, int panels) {
    return for_rows(rows, [&](auto n) -> IntegerTile {
        return panels == 1 ? integer_tile<INT4, n(), 1> : integer_tile<INT4, n(), panels_for(n())>;
    });
}

// A panel is taken in runs of inputs that stay in the first-level cache while tiles of rows pass: INT4's are its groups.
template <bool INT4> void multiply(const Product &product) {
    const int64_t inputs = product.weights[0]->inputs, padded = up(inputs, INT4 ? 8 : 4);
    const int64_t group = INT4 ? product.weights[0]->group_size : inputs;
    const int64_t quads = padded / 4, run = INT4 ? group / 4 : RUN_QUADS, quad_bytes = PANEL * (INT4 ? 2 : 4);
    const Cut cut(product.rows);
    const Quantized x = quantize<INT4>(product, cut, inputs, padded, group);

    const bool few = cut.tiles == 1;
    const int together = few ? panels_for(int(product.rows)) : 1;
    const int64_t panel_bytes = quads * quad_bytes;
    const int64_t row_blocks = (cut.tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    product.over_panels(row_blocks, few ? FEW_ROWS_TASKS : INT64_MAX, [&](int w, int64_t p, int64_t end, int64_t block) {
        const quire_weight &weight = *product.weights[w];
        const int64_t first = block * BLOCK_TILES, last = std::min(cut.tiles, first + BLOCK_TILES);
        const int64_t row = cut.start(first), rows = cut.start(last) - row, width = product.panels(w) * PANEL;
        alignas(64) int32_t acc[BLOCK_TILES * MOST_ROWS * PANEL];
        alignas(64) float sums[BLOCK_TILES * MOST_ROWS * PANEL];
        while (p < end) {
            const int panels = p + together <= end ? together : 1;
            const uint8_t *panel = static_cast<const uint8_t *>(weight.data) + p * panel_bytes;
            std::fill(sums, sums + rows * panels * PANEL, 0.0f);
            for (int64_t begin = 0; begin < quads; begin += run) {
                const int64_t count = std::min(run, quads - begin), g = INT4 ? begin / run : 0;
                const uint8_t *part = panel + begin * quad_bytes;
                // Several tiles share the reading of the next run, which lies behind this one.
                Ahead ahead = {part + (few ? AHEAD : count * quad_bytes), LINES / (last - first)};
                for (int64_t t = first; t < last; t++) {
                    const int64_t at = cut.start(t) * x.groups + g, place = (cut.start(t) - row) * PANEL;
                    const Group group = {x.scales + at, x.sums + at, x.groups, weight.scales + g * width + p * PANEL,
                                         INT4 ? weight.zeros + g * width + p * PANEL : nullptr};
                    const bool ends = INT4 || begin + count == quads;
                    const uint8_t *values = x.values + (cut.start(t) * quads + begin * cut.rows(t)) * Integers<INT4>::BYTES;
                    integer_tile_for<INT4>(cut.rows(t), panels)(count, values, part, panel_bytes, ahead, !INT4 && begin > 0,
                                                                ends ? &group : nullptr, acc + place, sums + place);
                    ahead.from += count * quad_bytes / LINES * ahead.step;
                }
            }
            for (int64_t r = 0; r < rows; r++)
                for (int i = 0; i < panels; i++) product.finish(w, row + r, p + i, sums + (r * panels + i) * PANEL);
            p += panels;
        }
    }, together);
}

}  // namespace

void multiply_integers(const Product &product) {
    product.weights[0]->form == QUIRE_INT4 ? multiply<true>(product) : multiply<false>(product);
}

}  // namespace QUIRE_ISA
