// Products of rows with a packed weight, one tile order for every number of rows.
//
// A weight lies in panels of 32 outputs. For each input in turn a panel holds its 32 values (one cache line in bfloat16), so
// a product reads memory in one direction, and every output has a chain of its own: acc[r][o] = fma(x[r][i], w[o][i], acc),
// i ascending. Tiles of rows share the reading; where a chain is put aside between blocks of inputs it is stored whole.
// For more than one tile a block of an E4M3 panel first becomes bfloat16, so that its decoding is paid once.
//
// INT8 and INT4 multiply unsigned weights (INT8 stores w + 128) by signed activations in exact integers.
#include "kernels.h"
#include "product.h"

#include <algorithm>
#include <type_traits>

namespace QUIRE_ISA {
namespace {

// Of a block of inputs, between two store-aways: tiles pass over it one after the other, from the second-level cache where one
// pass takes the whole panel, else from the first-level one.
constexpr int64_t BLOCK_INPUTS = LANES == 16 ? 1024 : 256, BLOCK_TILES = 8;
constexpr int AHEAD = 2048;           // bytes between a read and its prefetch, for each of two panels
constexpr int INTEGERS_AHEAD = 4096;  // for one
constexpr int64_t RUN_QUADS = 128;    // 16 KiB of an 8-bit panel

// ---- decoding: some of one input's 32 weights as floats --------------------------------------------------------------

// read: vectors [first, first + SIDE) of the panel's first half, then the same of its second half.
template <int type> struct Dense;
template <> struct Dense<QUIRE_F32> {
    static constexpr int64_t BYTES = PANEL * 4;
    template <int SIDE> static INLINE void read(const uint8_t *p, int first, Floats *w) {
        for (int v = 0; v < SIDE; v++) {
            w[v] = load<Floats>(p + (first + v) * LANES * 4);
            w[v + SIDE] = load<Floats>(p + (first + v + PARTS / 2) * LANES * 4);
        }
    }
};
// Word j holds outputs j and j + 16, so that both become floats by one operation.
template <> struct Dense<QUIRE_BF16> {
    static constexpr int64_t BYTES = PANEL * 2;
    template <int SIDE> static INLINE void read(const uint8_t *p, int first, Floats *w) {
        for (int v = 0; v < SIDE; v++) {
            Words pair = load<Words>(p + (first + v) * LANES * 4);
            w[v] = bits<Floats>(pair << 16);
            w[v + SIDE] = bits<Floats>(pair & 0xffff0000u);
        }
    }
};
template <> struct Dense<QUIRE_F16> {
    static constexpr int64_t BYTES = PANEL * 2;
    template <int SIDE> static INLINE void read(const uint8_t *p, int first, Floats *w) {
        for (int v = 0; v < SIDE; v++) {
            w[v] = floats_of_f16(load<Halves>(p + (first + v) * LANES * 2));
            w[v + SIDE] = floats_of_f16(load<Halves>(p + (first + v + PARTS / 2) * LANES * 2));
        }
    }
};
// Bytes in bfloat16's order. With AVX-512 all 32 become bfloat16 at once, which holds every E4M3 value.
template <> struct Dense<QUIRE_E4M3> {
    static constexpr int64_t BYTES = PANEL;
    template <int SIDE> static INLINE void read(const uint8_t *p, [[maybe_unused]] int first, Floats *w) {
#if defined(__AVX512F__)
        // The eight values below 2^-6, m * 2^-9, as bfloat16; larger ones only shift.
        const __m512i small = _mm512_broadcast_i64x2(_mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));
        const __m512i u = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
        const __m512i m = _mm512_and_si512(u, _mm512_set1_epi16(0x7f));
        __m512i half = _mm512_add_epi16(_mm512_slli_epi16(m, 4), _mm512_set1_epi16(120 << 7));
        half = _mm512_mask_permutexvar_epi16(half, _mm512_cmplt_epi16_mask(m, _mm512_set1_epi16(8)), m, small);
        half = _mm512_mask_mov_epi16(half, _mm512_cmpeq_epi16_mask(m, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
        half = _mm512_or_si512(half, _mm512_slli_epi16(_mm512_xor_si512(u, m), 8));
        w[0] = (Floats)_mm512_slli_epi32(half, 16);
        w[1] = (Floats)_mm512_and_si512(half, _mm512_set1_epi32(int(0xffff0000)));
#else
        for (int v = 0; v < SIDE; v++) {
            Words pair = widen(load<Halves>(p + (first + v) * LANES * 2));
            w[v] = floats_of_e4m3(pair & 0xff);
            w[v + SIDE] = floats_of_e4m3(pair >> 8);
        }
#endif
    }
};

// ---- the tile: ROWS rows times PANELS panels over `inputs` inputs ---------------------------------------------------

// x: [inputs, ROWS]. acc: [ROWS, PANELS * 32], read and written. Panels lie panel_bytes apart. A pass takes as many of a panel's
// vectors as the registers hold sums for; where it takes two, the second finds its inputs in the first-level cache.
template <class Weights, int ROWS, int PANELS>
void tile(int64_t inputs, const float *x, const uint8_t *w, int64_t panel_bytes, float *acc) {
    constexpr int PASS = pass_for(ROWS), SIDE = PASS / 2, TOGETHER = PANELS * PASS;
    const int64_t step = PASS == PARTS ? inputs : std::min(inputs, BLOCK_INPUTS);
    for (int64_t begin = 0; begin < inputs; begin += step)
        for (int first = 0; first < PARTS / 2; first += SIDE) {
            const int64_t end = std::min(inputs, begin + step);
            const auto place = [&](int r, int v) {  // of sum v of row r
                const int vector = first + v % PASS % SIDE + v % PASS / SIDE * (PARTS / 2);
                return acc + (r * PANELS + v / PASS) * PANEL + vector * LANES;
            };
            Floats sums[ROWS][TOGETHER];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < TOGETHER; v++) sums[r][v] = load<Floats>(place(r, v));
            for (int64_t i = begin; i < end; i++) {
                Floats values[TOGETHER];
                for (int p = 0; p < PANELS; p++) {
                    const uint8_t *from = w + p * panel_bytes + i * Weights::BYTES;
                    if (first == 0) __builtin_prefetch(from + AHEAD);
                    Weights::template read<SIDE>(from, first, values + p * PASS);
                }
                for (int r = 0; r < ROWS; r++) {
                    Floats one = all(x[i * ROWS + r]);
                    for (int v = 0; v < TOGETHER; v++) sums[r][v] = fma(one, values[v], sums[r][v]);
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < TOGETHER; v++) store(place(r, v), sums[r][v]);
        }
}

using Tile = void (*)(int64_t, const float *, const uint8_t *, int64_t, float *);

// Few rows leave registers free: more panels at a time hide the latency of the chains.
constexpr int panels_for(int rows) { return rows <= (LANES == 16 ? 3 : 1) ? 2 : 1; }

template <class Weights> Tile tile_for(int rows, int panels) {
    static_assert(MOST_ROWS <= 12);
#define ONE(n)                                                                                            \
    if constexpr (n <= MOST_ROWS)                                                                         \
        if (rows == n) return panels == 1 ? tile<Weights, n, 1> : tile<Weights, n, panels_for(n)>;
    ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12)
#undef ONE
    return nullptr;
}

// ---- rows cut into tiles --------------------------------------------------------------------------------------------

// How `rows` rows are cut into tiles of nearly equal size: each tile's rows, at most MOST_ROWS.
struct Cut {
    int64_t tiles, small, larger;  // the first `larger` tiles have small + 1 rows
    explicit Cut(int64_t rows) {
        tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
        small = rows / tiles, larger = rows % tiles;
    }
    int64_t start(int64_t t) const { return t * small + std::min(t, larger); }
    int rows(int64_t t) const { return int(small + (t < larger)); }
};

// ---- dense -----------------------------------------------------------------------------------------------------------

// A block of a panel of E4M3 as bfloat16, which holds all its values, in memory of this thread.
inline const uint8_t *decoded(const uint8_t *from, int64_t inputs) {
    using Weights = Dense<QUIRE_E4M3>;
    auto out = static_cast<uint8_t *>(quire::scratch(3, BLOCK_INPUTS * PANEL * 2));
    for (int64_t i = 0; i < inputs; i++) {
        Floats w[PARTS];
        __builtin_prefetch(from + i * Weights::BYTES + AHEAD);
        Weights::read<PARTS / 2>(from + i * Weights::BYTES, 0, w);
        for (int v = 0; v < PARTS / 2; v++)
            store(out + (i * PANEL / 2 + v * LANES) * 4, bits<Words>(w[v]) >> 16 | bits<Words>(w[v + PARTS / 2]));
    }
    return out;
}

template <class Weights> void dense(const Product &product) {
    const int64_t inputs = product.weights[0]->inputs, panel_bytes = inputs * Weights::BYTES;
    const Cut cut(product.rows);

    // x as floats, tile by tile, [inputs, rows of the tile].
    auto x = static_cast<float *>(quire::scratch(0, product.rows * inputs * 4));
    quire::parallel(cut.tiles, [&](int64_t t) {
        const int rows = cut.rows(t);
        float *to = x + cut.start(t) * inputs;
        if (rows == 1) return row_to_floats(product.type, product.row(cut.start(t)), inputs, to);
        auto line = static_cast<float *>(quire::scratch(1, inputs * 4));
        for (int r = 0; r < rows; r++) {
            row_to_floats(product.type, product.row(cut.start(t) + r), inputs, line);
            for (int64_t i = 0; i < inputs; i++) to[i * rows + r] = line[i];
        }
    });

    if (cut.tiles == 1) {
        const int rows = int(product.rows), together = panels_for(rows);
        const Tile several = tile_for<Weights>(rows, together), single = tile_for<Weights>(rows, 1);
        product.over_panels(1, FEW_ROWS_TASKS, [&](int w, int64_t p, int64_t end, int64_t) {
            alignas(64) float acc[MOST_ROWS * 4 * PANEL];
            auto data = static_cast<const uint8_t *>(product.weights[w]->data);
            while (p < end) {
                const int width = p + together <= end ? together : 1;
                std::fill(acc, acc + rows * width * PANEL, 0.0f);
                (width == 1 ? single : several)(inputs, x, data + p * panel_bytes, panel_bytes, acc);
                for (int r = 0; r < rows; r++)
                    for (int i = 0; i < width; i++) product.finish(w, r, p + i, acc + (r * width + i) * PANEL);
                p += width;
            }
        }, together);
        return;
    }

    using Shared = std::conditional_t<(Weights::BYTES < PANEL * 2), Dense<QUIRE_BF16>, Weights>;
    const int64_t row_blocks = (cut.tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    product.over_panels(row_blocks, INT64_MAX, [&](int w, int64_t p, int64_t, int64_t block) {
        const int64_t first = block * BLOCK_TILES, last = std::min(cut.tiles, first + BLOCK_TILES), row = cut.start(first);
        auto data = static_cast<const uint8_t *>(product.weights[w]->data) + p * panel_bytes;
        alignas(64) float acc[BLOCK_TILES * MOST_ROWS * PANEL];
        std::fill(acc, acc + (cut.start(last) - row) * PANEL, 0.0f);
        for (int64_t begin = 0; begin < inputs; begin += BLOCK_INPUTS) {
            const int64_t count = std::min(BLOCK_INPUTS, inputs - begin);
            const uint8_t *part = data + begin * Weights::BYTES;
            if (Weights::BYTES < PANEL * 2) part = decoded(part, count);
            for (int64_t t = first; t < last; t++) {
                const int rows = cut.rows(t);
                const Tile multiply = tile_for<Shared>(rows, 1);
                multiply(count, x + cut.start(t) * inputs + begin * rows, part, 0, acc + (cut.start(t) - row) * PANEL);
            }
        }
        for (int64_t r = row; r < cut.start(last); r++) product.finish(w, r, p, acc + (r - row) * PANEL);
    });
}

// ---- integers --------------------------------------------------------------------------------------------------------

// x as integers, in tiles of rows, four inputs at a time (`Integers::spread`); scales and sums of the integers [row, groups].
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

    static INLINE void spread(const int8_t *four, int row, int rows, uint8_t *to) {
        if (INT4) {
            std::memcpy(to + row * 4, four, 4);
            return;
        }
        const int16_t pairs[2][2] = {{four[0], four[2]}, {four[1], four[3]}};
        for (int parity = 0; parity < 2; parity++) std::memcpy(to + (parity * rows + row) * 4, pairs[parity], 4);
    }

    // sums += products of `quads` times four inputs, for PASS vectors of outputs from vector `first` of the panel on.
    template <int ROWS, int PASS>
    static INLINE void add(int64_t quads, const uint8_t *x, const uint8_t *w, int first, Ints (&sums)[ROWS][PASS]) {
        if constexpr (INT4)
            add_nibbles(quads, x, w, first, sums);
        else
            add_bytes(quads, x, w, first, sums);
    }

  private:
    template <int ROWS, int PASS>
    static INLINE void add_bytes(int64_t quads, const uint8_t *x, const uint8_t *w, int first, Ints (&sums)[ROWS][PASS]) {
        for (int64_t i = 0; i < quads; i++, x += ROWS * 8) {
            const uint8_t *from = w + i * (PANEL * 4);
            if (first == 0) __builtin_prefetch(from + INTEGERS_AHEAD), __builtin_prefetch(from + INTEGERS_AHEAD + 64);
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
    static INLINE void add_nibbles(int64_t quads, const uint8_t *x, const uint8_t *w, int first, Ints (&sums)[ROWS][PASS]) {
        constexpr int64_t FITTING = 4;  // eights of inputs; a group is a multiple
        for (int64_t begin = 0; begin < quads / 2; begin += FITTING) {
            __m256i narrow[ROWS][PASS];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < PASS; v++) narrow[r][v] = _mm256_setzero_si256();
            for (int64_t i = begin; i < begin + FITTING; i++) {
                const uint8_t *from = w + i * (PANEL * 4);
                if (first == 0) __builtin_prefetch(from + INTEGERS_AHEAD), __builtin_prefetch(from + INTEGERS_AHEAD + 64);
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

    static INLINE void spread(const int8_t *four, int row, int, uint8_t *to) { std::memcpy(to + row * 4, four, 4); }

    template <int ROWS, int PASS>
    static INLINE void add(int64_t quads, const uint8_t *x, const uint8_t *w, int first, Ints (&sums)[ROWS][PASS]) {
        constexpr int STEP = INT4 ? 2 : 1;
        for (int64_t i = 0; i < quads; i += STEP) {
            Words values[STEP][PASS];
            const uint8_t *from = w + i / STEP * (PANEL * 4);
            if (first == 0) __builtin_prefetch(from + INTEGERS_AHEAD), __builtin_prefetch(from + INTEGERS_AHEAD + 64);
            for (int v = 0; v < PASS; v++) {
                Words word = load<Words>(from + (first + v) * LANES * 4);
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
                    for (int v = 0; v < PASS; v++) sums[r][v] = dot4(sums[r][v], values[s][v], one);
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
        auto line = static_cast<float *>(quire::scratch(1, whole * 5));
        auto bytes = reinterpret_cast<int8_t *>(line + whole);
        std::fill(line + inputs, line + whole, 0.0f);
        uint8_t *to = out.values + cut.start(t) * padded / 4 * BYTES;
        for (int r = 0; r < rows; r++) {
            const int64_t row = cut.start(t) + r;
            row_to_floats(product.type, product.row(row), inputs, line);
            for (int64_t g = 0; g < out.groups; g++)
                quantize_row(line + g * group, std::min(group, inputs - g * group), bytes + g * group,
                             out.scales + row * out.groups + g, out.sums + row * out.groups + g);
            for (int64_t i = 0; i < padded / 4; i++) Integers<INT4>::spread(bytes + i * 4, r, rows, to + i * rows * BYTES);
        }
    });
    return out;
}

// acc [ROWS][32] += products of `quads` times four inputs.
template <bool INT4, int ROWS> void integer_tile(int64_t quads, const uint8_t *x, const uint8_t *w, int32_t *acc) {
    constexpr int PASS = pass_for(ROWS);
    for (int first = 0; first < PARTS; first += PASS) {
        Ints sums[ROWS][PASS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < PASS; v++) sums[r][v] = load<Ints>(acc + r * PANEL + (first + v) * LANES);
        Integers<INT4>::add(quads, x, w, first, sums);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < PASS; v++) store(acc + r * PANEL + (first + v) * LANES, sums[r][v]);
    }
}

using IntegerTile = void (*)(int64_t, const uint8_t *, const uint8_t *, int32_t *);

template <bool INT4> IntegerTile integer_tile_for(int rows) {
#define ONE(n)                        \
    if constexpr (n <= MOST_ROWS)     \
        if (rows == n) return integer_tile<INT4, n>;
    ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12)
#undef ONE
    return nullptr;
}

// A panel is taken in runs of inputs that stay in the first-level cache while tiles of rows pass: INT4's are its groups.
template <bool INT4> void integer(const Product &product) {
    const int64_t inputs = product.weights[0]->inputs, padded = up(inputs, INT4 ? 8 : 4);
    const int64_t group = INT4 ? product.weights[0]->group_size : inputs;
    const int64_t quads = padded / 4, run = INT4 ? group / 4 : RUN_QUADS, quad_bytes = PANEL * (INT4 ? 2 : 4);
    const Cut cut(product.rows);
    const Quantized x = quantize<INT4>(product, cut, inputs, padded, group);

    const bool few = cut.tiles == 1;
    const int64_t row_blocks = (cut.tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    product.over_panels(row_blocks, few ? FEW_ROWS_TASKS : INT64_MAX, [&](int w, int64_t p, int64_t end, int64_t block) {
        const quire_weight &weight = *product.weights[w];
        const int64_t first = block * BLOCK_TILES, last = std::min(cut.tiles, first + BLOCK_TILES);
        const int64_t row = cut.start(first), rows = cut.start(last) - row, width = product.panels(w) * PANEL;
        alignas(64) int32_t acc[BLOCK_TILES * MOST_ROWS * PANEL];
        alignas(64) float sums[BLOCK_TILES * MOST_ROWS * PANEL];
        for (; p < end; p++) {
            const uint8_t *panel = static_cast<const uint8_t *>(weight.data) + p * quads * quad_bytes;
            std::fill(sums, sums + rows * PANEL, 0.0f);
            std::fill(acc, acc + rows * PANEL, 0);
            for (int64_t begin = 0; begin < quads; begin += run) {
                const int64_t count = std::min(run, quads - begin), g = INT4 ? begin / run : 0;
                for (int64_t t = first; t < last; t++) {
                    const uint8_t *values = x.values + (cut.start(t) * quads + begin * cut.rows(t)) * Integers<INT4>::BYTES;
                    integer_tile_for<INT4>(cut.rows(t))(count, values, panel + begin * quad_bytes,
                                                        acc + (cut.start(t) - row) * PANEL);
                }
                if (!INT4 && begin + count < quads) continue;
                const float *scales = weight.scales + g * width + p * PANEL;
                const uint8_t *zeros = INT4 ? weight.zeros + g * width + p * PANEL : nullptr;
                for (int64_t r = 0; r < rows; r++) {
                    const int64_t at = (row + r) * x.groups + g;
                    add_group<INT4>(acc + r * PANEL, x.sums[at], x.scales[at], zeros, scales, sums + r * PANEL);
                }
                std::fill(acc, acc + rows * PANEL, 0);
            }
            for (int64_t r = 0; r < rows; r++) product.finish(w, row + r, p, sums + r * PANEL);
        }
    });
}

int linears(int count, const quire_weight *const *weights, int type, int64_t rows, const void *x, int64_t x_stride,
            const void *const *biases, void *const *ys, const int64_t *y_strides) {
    if (type != QUIRE_F32 && type != QUIRE_BF16 && type != QUIRE_F16) return -1;
    const quire_weight &first = *weights[0];
    for (int w = 1; w < count; w++)
        if (weights[w]->form != first.form || weights[w]->type != first.type || weights[w]->inputs != first.inputs ||
            weights[w]->group_size != first.group_size)
            return -1;
    if (rows == 0) return 0;
    const Product product{count, weights, type, rows, static_cast<const uint8_t *>(x), x_stride, biases, ys, y_strides};
    if (first.form == QUIRE_INT8) return integer<false>(product), 0;
    if (first.form == QUIRE_INT4) return integer<true>(product), 0;
    switch (first.type) {
    case QUIRE_F32: return dense<Dense<QUIRE_F32>>(product), 0;
    case QUIRE_BF16: return dense<Dense<QUIRE_BF16>>(product), 0;
    case QUIRE_F16: return dense<Dense<QUIRE_F16>>(product), 0;
    case QUIRE_E4M3: return dense<Dense<QUIRE_E4M3>>(product), 0;
    }
    return -1;
}

// ---- packing ---------------------------------------------------------------------------------------------------------

int paired_place(int output) { return output % 16 * 2 + output / 16; }

// Inputs [begin, end) of one output into its panel `to`.
void pack_output(const quire_weight &weight, const uint8_t *row, int o, int64_t begin, int64_t end, uint8_t *to) {
    if (weight.form == QUIRE_INT8) {
        for (int64_t i = begin; i < end; i++) to[(i / 4 * PANEL + o) * 4 + i % 4] = uint8_t(row[i] ^ 0x80);
    } else if (weight.form == QUIRE_INT4) {
        for (int64_t i = begin; i < end; i++) {
            const uint8_t half = row[i / 2] >> (i % 2 * 4) & 15;
            to[(i / 8 * PANEL + o) * 4 + i % 4] |= uint8_t(half << (i / 4 % 2 * 4));
        }
    } else if (weight.type == QUIRE_F32) {
        for (int64_t i = begin; i < end; i++) std::memcpy(to + (i * PANEL + o) * 4, row + i * 4, 4);
    } else if (weight.type == QUIRE_E4M3) {
        for (int64_t i = begin; i < end; i++) to[i * PANEL + paired_place(o)] = row[i];
    } else {
        const int place = weight.type == QUIRE_BF16 ? paired_place(o) : o;
        for (int64_t i = begin; i < end; i++) std::memcpy(to + (i * PANEL + place) * 2, row + i * 2, 2);
    }
}

int pack(const quire_weight *weight, const void *source, int64_t stride) {
    constexpr int64_t BLOCK = 128;  // inputs whose place in a panel stays in the first-level cache while outputs come and go
    const int64_t inputs = weight->inputs, outputs = weight->outputs, panels = up(outputs, PANEL) / PANEL;
    const int64_t panel_bytes = quire_packed_bytes(weight->form, weight->type, PANEL, inputs);
    if (panel_bytes < 0) return -1;
    if (weight->form == QUIRE_INT4 && (weight->group_size % 32 || inputs % weight->group_size)) return -1;
    const int64_t row_bytes = stride * (weight->form == QUIRE_DENSE ? bytes_of(weight->type) : 1);
    auto all = static_cast<uint8_t *>(weight->data);
    auto from = static_cast<const uint8_t *>(source);
    quire::parallel(panels, [&](int64_t p) {
        uint8_t *to = all + p * panel_bytes;
        const int count = int(std::min<int64_t>(PANEL, outputs - p * PANEL));
        if (count < PANEL || weight->form != QUIRE_DENSE)
            std::memset(to, weight->form == QUIRE_INT8 ? 128 : 0, size_t(panel_bytes));
        for (int64_t begin = 0; begin < inputs; begin += BLOCK)
            for (int o = 0; o < count; o++) {
                const uint8_t *row = from + (p * PANEL + o) * row_bytes;
                pack_output(*weight, row, o, begin, std::min(inputs, begin + BLOCK), to);
            }
    });
    return 0;
}

float unpacked(const quire_weight &weight, int64_t panel_bytes, int64_t output, int64_t i) {
    const int64_t p = output / PANEL, o = output % PANEL;
    const uint8_t *panel = static_cast<const uint8_t *>(weight.data) + p * panel_bytes;
    if (weight.form == QUIRE_INT8) return float(int(panel[(i / 4 * PANEL + o) * 4 + i % 4]) - 128) * weight.scales[output];
    if (weight.form == QUIRE_INT4) {
        const int64_t at = i / weight.group_size * up(weight.outputs, PANEL) + output;
        const int half = panel[(i / 8 * PANEL + o) * 4 + i % 4] >> (i / 4 % 2 * 4) & 15;
        return float(half - int(weight.zeros[at])) * weight.scales[at];
    }
    float value;
    if (weight.type == QUIRE_F32) {
        std::memcpy(&value, panel + (i * PANEL + o) * 4, 4);
    } else if (weight.type == QUIRE_E4M3) {
        value = from_e4m3(panel[i * PANEL + paired_place(int(o))]);
    } else {
        const int64_t place = weight.type == QUIRE_BF16 ? paired_place(int(o)) : o;
        uint16_t half;
        std::memcpy(&half, panel + (i * PANEL + place) * 2, 2);
        value = weight.type == QUIRE_BF16 ? from_bf16(half) : from_f16(half);
    }
    return weight.scales ? value * weight.scales[output] : value;
}

int weight_rows(const quire_weight *weight, int type, int64_t rows, const int64_t *ids, void *out) {
    const int64_t inputs = weight->inputs;
    const int64_t panel_bytes = quire_packed_bytes(weight->form, weight->type, PANEL, inputs);
    if (panel_bytes < 0 || type == QUIRE_E4M3) return -1;
    for (int64_t r = 0; r < rows; r++)
        if (ids[r] < 0 || ids[r] >= weight->outputs) return -1;
    quire::parallel(rows, [&](int64_t r) {
        auto line = static_cast<float *>(quire::scratch(1, inputs * 4));
        for (int64_t i = 0; i < inputs; i++) line[i] = unpacked(*weight, panel_bytes, ids[r], i);
        floats_to_row(type, line, inputs, static_cast<uint8_t *>(out) + r * inputs * bytes_of(type));
    });
    return 0;
}

}  // namespace

void add_linear(quire::Kernels &kernels) {
    kernels.pack = pack;
    kernels.linears = linears;
    kernels.weight_rows = weight_rows;
}

}  // namespace QUIRE_ISA
