// Products of rows with a packed weight of floating point numbers, one tile order for every number of rows.
//
// Every output has a chain of its own: acc[r][o] = fma(x[r][i], w[o][i], acc), i ascending. Tiles of rows share the reading;
// where a chain is put aside between blocks of inputs it is stored whole. For more than one tile a block of an E4M3 panel first
// becomes bfloat16, so that its decoding is paid once.
//
// Compiled for AVX512_BF16 this file is a way of its own in front of AVX-512's, for bfloat16 rows: a link of the chain is then
// two inputs, which one instruction multiplies and adds.
#include "linear.h"
#include "link.h"

#include <algorithm>
#include <type_traits>

namespace QUIRE_ISA {
namespace {

// Inputs of a block, between two store-aways: tiles pass over it one after the other, from the second-level cache where one
// pass takes the whole panel, else from the first-level one.
constexpr int64_t BLOCK_INPUTS = LANES == 16 ? 1024 : 256;
constexpr int64_t AHEAD = 2048;  // bytes between a read and its prefetch, for each of two panels

// ---- links of rows and panels ------------------------------------------------------------------------------------------

// A row's links, four bytes each.
void row_of_links(const Product &product, int64_t r, float *to) {
    const int64_t inputs = product.weights[0]->inputs;
    if (Link::NUMBERS == 1)
        row_to_floats(product.type, product.row(r), inputs, to);
    else
        std::memcpy(to, product.row(r), size_t(inputs) * 2);
}

// What a link of a panel is: BYTES bytes. read: vectors [first, first + SIDE) of the panel's first half, then the same of its
// second half.
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
#if defined(__AVX512F__)
// All 32 weights of an input become bfloat16 at once, which holds every E4M3 value.
INLINE Words bf16_of_e4m3(const uint8_t *p) {
    // The eight values below 2^-6, m * 2^-9, as bfloat16; larger ones only shift.
    const __m512i small = _mm512_broadcast_i64x2(_mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));
    const __m512i u = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
    const __m512i m = _mm512_and_si512(u, _mm512_set1_epi16(0x7f));
    __m512i half = _mm512_add_epi16(_mm512_slli_epi16(m, 4), _mm512_set1_epi16(120 << 7));
    half = _mm512_mask_permutexvar_epi16(half, _mm512_cmplt_epi16_mask(m, _mm512_set1_epi16(8)), m, small);
    half = _mm512_mask_mov_epi16(half, _mm512_cmpeq_epi16_mask(m, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
    return (Words)_mm512_or_si512(half, _mm512_slli_epi16(_mm512_xor_si512(u, m), 8));
}
#endif
// Bytes in bfloat16's order.
template <> struct Dense<QUIRE_E4M3> {
    static constexpr int64_t BYTES = PANEL;
    template <int SIDE> static INLINE void read(const uint8_t *p, [[maybe_unused]] int first, Floats *w) {
#if defined(__AVX512F__)
        const Words pair = bf16_of_e4m3(p);
        w[0] = bits<Floats>(pair << 16);
        w[1] = bits<Floats>(pair & 0xffff0000u);
#else
        for (int v = 0; v < SIDE; v++) {
            Words pair = widen(load<Halves>(p + (first + v) * LANES * 2));
            w[v] = floats_of_e4m3(pair & 0xff);
            w[v + SIDE] = floats_of_e4m3(pair >> 8);
        }
#endif
    }
};

#if defined(__AVX512BF16__)

// Two inputs of bfloat16 weights and rows: word o of a vector holds output o's, as the row's word holds the row's.
template <int type> struct Pairs {
    static constexpr int64_t BYTES = 2 * Dense<type>::BYTES;
    template <int SIDE> static INLINE void read(const uint8_t *p, int, Words *w) {
        const Words even = line(p), odd = line(p + Dense<type>::BYTES);
        w[0] = (Words)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)even, (__m512i)(odd << 16));
        w[1] = (Words)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(even >> 16), (__m512i)odd);
    }
    static INLINE Words line(const uint8_t *p) { return type == QUIRE_BF16 ? load<Words>(p) : bf16_of_e4m3(p); }
};

#endif

// ---- the tile: ROWS rows times PANELS panels over `links` links -----------------------------------------------------

// x: [links, ROWS]. acc: [ROWS, PANELS * 32], read and written. Panels lie panel_bytes apart. A pass takes as many of a panel's
// vectors as the registers hold sums for; where it takes two, the second finds its links in the first-level cache.
template <class Weights, int ROWS, int PANELS>
void tile(int64_t links, const float *x, const uint8_t *w, int64_t panel_bytes, Ahead ahead, float *acc) {
    constexpr int PASS = pass_for(ROWS), SIDE = PASS / 2, TOGETHER = PANELS * PASS;
    const int64_t step = PASS == PARTS ? links : std::min(links, BLOCK_INPUTS / Link::NUMBERS);
    for (int64_t begin = 0; begin < links; begin += step)
        for (int first = 0; first < PARTS / 2; first += SIDE) {
            const int64_t end = std::min(links, begin + step);
            const auto place = [&](int r, int v) {  // of sum v of row r
                const int vector = first + v % PASS % SIDE + v % PASS / SIDE * (PARTS / 2);
                return acc + (r * PANELS + v / PASS) * PANEL + vector * LANES;
            };
            Floats sums[ROWS][TOGETHER];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < TOGETHER; v++) sums[r][v] = load<Floats>(place(r, v));
            for (int64_t i = begin; i < end; i++) {
                Link::Values values[TOGETHER];
                for (int p = 0; p < PANELS; p++) {
                    const uint8_t *from = w + p * panel_bytes + i * Weights::BYTES;
                    if (first == 0) Ahead{ahead.from + p * panel_bytes, ahead.step}.fetch(i, Weights::BYTES);
                    Weights::template read<SIDE>(from, first, values + p * PASS);
                }
                for (int r = 0; r < ROWS; r++) {
                    const auto factor = Link::factor(x + i * ROWS + r);
                    for (int v = 0; v < TOGETHER; v++) sums[r][v] = Link::add(sums[r][v], values[v], factor);
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < TOGETHER; v++) store(place(r, v), sums[r][v]);
        }
}

using Tile = void (*)(int64_t, const float *, const uint8_t *, int64_t, Ahead, float *);

// Few rows leave registers free: more panels at a time hide the latency of the chains.
constexpr int panels_for(int rows) { return rows <= (LANES == 16 ? 3 : 1) ? 2 : 1; }

template <class Weights> Tile tile_for(int rows, int panels) {
    return for_rows(rows, [&](auto n) -> Tile {
        return panels == 1 ? tile<Weights, n(), 1> : tile<Weights, n(), panels_for(n())>;
    });
}

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

// Shared: what more than one tile reads, the weights themselves or bfloat16 made of them.
template <class Weights, class Shared = Weights> void multiply(const Product &product) {
    const int64_t links = product.weights[0]->inputs / Link::NUMBERS, panel_bytes = links * Weights::BYTES;
    const Cut cut(product.rows);

    // Tile by tile, [links, rows of the tile].
    auto x = static_cast<float *>(quire::scratch(0, product.rows * links * 4));
    quire::parallel(cut.tiles, [&](int64_t t) {
        const int rows = cut.rows(t);
        float *to = x + cut.start(t) * links;
        if (rows == 1) return row_of_links(product, cut.start(t), to);
        auto lines = static_cast<float *>(quire::scratch(1, rows * links * 4));
        for (int r = 0; r < rows; r++) row_of_links(product, cut.start(t) + r, lines + r * links);
        interleave(lines, links * 4, rows, links, to);
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
                const uint8_t *panel = data + p * panel_bytes;
                (width == 1 ? single : several)(links, x, panel, panel_bytes, {panel + AHEAD, Weights::BYTES}, acc);
                for (int r = 0; r < rows; r++)
                    for (int i = 0; i < width; i++) product.finish(w, r, p + i, acc + (r * width + i) * PANEL);
                p += width;
            }
        }, together);
        return;
    }

    constexpr int64_t BLOCK = BLOCK_INPUTS / Link::NUMBERS, TILES = BLOCK_TILES * Link::NUMBERS;
    const int64_t row_blocks = (cut.tiles + TILES - 1) / TILES;
    product.over_panels(row_blocks, INT64_MAX, [&](int w, int64_t p, int64_t, int64_t block) {
        const int64_t first = block * TILES, last = std::min(cut.tiles, first + TILES), row = cut.start(first);
        auto data = static_cast<const uint8_t *>(product.weights[w]->data) + p * panel_bytes;
        alignas(64) float acc[TILES * MOST_ROWS * PANEL];
        std::fill(acc, acc + (cut.start(last) - row) * PANEL, 0.0f);
        for (int64_t begin = 0; begin < links; begin += BLOCK) {
            const int64_t count = std::min(BLOCK, links - begin);
            const uint8_t *part = data + begin * Weights::BYTES;
            // The tiles share the reading of the next block, which lies behind this one.
            Ahead ahead = {part + count * Weights::BYTES, Weights::BYTES / (last - first)};
            if constexpr (!std::is_same_v<Weights, Shared>) part = decoded(part, count * Link::NUMBERS);
            for (int64_t t = first; t < last; t++) {
                const int rows = cut.rows(t);
                const Tile pass = tile_for<Shared>(rows, 1);
                pass(count, x + cut.start(t) * links + begin * rows, part, 0, ahead, acc + (cut.start(t) - row) * PANEL);
                ahead.from += count * ahead.step;
            }
        }
        for (int64_t r = row; r < cut.start(last); r++) product.finish(w, r, p, acc + (r - row) * PANEL);
    });
}

#if defined(__AVX512BF16__)
bool multiply_pairs(const Product &product) {
    const quire_weight &first = *product.weights[0];
    if (product.type != QUIRE_BF16 || first.form != QUIRE_DENSE || first.inputs % 2) return false;
    if (first.type == QUIRE_BF16) return multiply<Pairs<QUIRE_BF16>>(product), true;
    if (first.type == QUIRE_E4M3) return multiply<Pairs<QUIRE_E4M3>, Pairs<QUIRE_BF16>>(product), true;
    return false;
}
#endif

}  // namespace

#if defined(__AVX512BF16__)

void add_linear(quire::Kernels &kernels) { InFront<multiply_pairs>::add(kernels); }

#else

bool multiply_dense(const Product &product) {
    switch (product.weights[0]->type) {
    case QUIRE_F32: return multiply<Dense<QUIRE_F32>>(product), true;
    case QUIRE_BF16: return multiply<Dense<QUIRE_BF16>>(product), true;
    case QUIRE_F16: return multiply<Dense<QUIRE_F16>>(product), true;
    case QUIRE_E4M3: return multiply<Dense<QUIRE_E4M3>, Dense<QUIRE_BF16>>(product), true;
    }
    return false;
}

#endif

}  // namespace QUIRE_ISA
