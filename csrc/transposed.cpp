// Products with a packed weight the other way round, dx = dy W: the gradient of what linear.cpp computes, from the very panels
// that it reads, so that training needs no second copy of a weight.
//
// For 32 inputs at a time a block of outputs is decoded to float32 and turned, [output][32 inputs], in memory of the thread;
// tiles of rows pass over it as they pass over a panel in dense.cpp. Each sum is one chain over the outputs in ascending
// order, over one weight after the other; between blocks it is stored whole. Rows are taken in chunks, so that what is put
// aside stays small. A quantized weight counts as the numbers that it stands for, and rows as they are: rounding them, as the
// forward product does, has no gradient.
//
// Compiled for AVX512_BF16 this file is a way of its own in front of AVX-512's, where dy and the weights are bfloat16: a link of
// a chain is then the outputs j and j + 16 of a panel, which lie side by side, and one instruction multiplies and adds both.
#include "functions.h"
#include "kernels.h"
#include "link.h"
#include "product.h"

#include <algorithm>
#include <vector>

namespace QUIRE_ISA {
namespace {

constexpr int64_t CHUNK_ROWS = 384;     // rows that share the turning of a block
constexpr int64_t BLOCK_OUTPUTS = 512;  // of a block: 64 KiB, and as much of dy for 384 rows as a second-level cache holds

using Turn = void (*)(const quire_weight &, int64_t, int64_t, int64_t, int64_t, float *);

#if !defined(__AVX512BF16__)

// ---- one input's 32 weights of a panel ---------------------------------------------------------------------------------

// bfloat16 and E4M3: outputs j and j + 16 lie side by side.
template <int form, int type>
INLINE void read_input(const quire_weight &weight, const uint8_t *panel, int64_t p, int64_t i, Floats *w) {
    if constexpr (form == QUIRE_INT8 || form == QUIRE_INT4) {
        constexpr int EACH = form == QUIRE_INT8 ? 4 : 8;
        const uint8_t *from = panel + i / EACH * PANEL * 4;
        const int shift = int(i % 4 * 8 + i % EACH / 4 * 4);
        const int64_t size = form == QUIRE_INT4 ? weight.group_size : weight.inputs;
        const int64_t at = (p * (weight.inputs / size) + i / size) * PANEL;
        for (int v = 0; v < PARTS; v++) {
            const Words word = load<Words>(from + v * LANES * 4) >> shift;
            if (form == QUIRE_INT8) {
                w[v] = to_float(bits<Ints>(word & 0xffu) - 128);
            } else {
                const Ints zeros = bits<Ints>(widen(load<Bytes>(weight.zeros + at + v * LANES)));
                w[v] = to_float(bits<Ints>(word & 15u) - zeros) * load<Floats>(weight.scales + at + v * LANES);
            }
        }
    } else if constexpr (type == QUIRE_F32) {
        for (int v = 0; v < PARTS; v++) w[v] = load<Floats>(panel + (i * PANEL + v * LANES) * 4);
    } else if constexpr (type == QUIRE_F16) {
        for (int v = 0; v < PARTS; v++) w[v] = floats_of_f16(load<Halves>(panel + (i * PANEL + v * LANES) * 2));
    } else {
        for (int v = 0; v < PARTS / 2; v++) {
            if (type == QUIRE_BF16) {
                const Words pair = load<Words>(panel + i * PANEL * 2 + v * LANES * 4);
                w[v] = bits<Floats>(pair << 16), w[v + PARTS / 2] = bits<Floats>(pair & 0xffff0000u);
            } else {
                const Words pair = widen(load<Halves>(panel + i * PANEL + v * LANES * 2));
                w[v] = floats_of_e4m3(pair & 0xffu), w[v + PARTS / 2] = floats_of_e4m3(pair >> 8);
            }
        }
    }
}

// Panels [p, end) of a weight, inputs [first, first + 32), into out [output][32]; zeros past the last input.
template <int form, int type>
void turn(const quire_weight &weight, int64_t panel_bytes, int64_t p, int64_t end, int64_t first, float *out) {
    for (; p < end; p++, out += PANEL * PANEL) {
        const uint8_t *panel = static_cast<const uint8_t *>(weight.data) + p * panel_bytes;
        for (int i = 0; i < PANEL; i += LANES) {
            Words words[PARTS][LANES];
            for (int j = 0; j < LANES; j++) {
                Floats w[PARTS] = {};
                if (first + i + j < weight.inputs) read_input<form, type>(weight, panel, p, first + i + j, w);
                for (int v = 0; v < PARTS; v++) words[v][j] = bits<Words>(w[v]);
            }
            for (int v = 0; v < PARTS; v++) {
                transpose(words[v]);
                for (int j = 0; j < LANES; j++) store(out + (v * LANES + j) * PANEL + i, words[v][j]);
            }
        }
    }
}

Turn turn_for(const quire_weight &weight) {
    if (weight.form == QUIRE_INT8) return turn<QUIRE_INT8, QUIRE_I8>;
    if (weight.form == QUIRE_INT4) return turn<QUIRE_INT4, QUIRE_I8>;
    switch (weight.type) {
    case QUIRE_F32: return turn<QUIRE_DENSE, QUIRE_F32>;
    case QUIRE_BF16: return turn<QUIRE_DENSE, QUIRE_BF16>;
    case QUIRE_F16: return turn<QUIRE_DENSE, QUIRE_F16>;
    case QUIRE_E4M3: return turn<QUIRE_DENSE, QUIRE_E4M3>;
    }
    return nullptr;
}

// A row's links of outputs [begin, end), four bytes each.
void row_of_links(const quire_weight &weight, int type, const uint8_t *dy, int64_t begin, int64_t end, float *to) {
    row_to_floats(type, dy, end - begin, to);
    if (weight.scales && weight.form != QUIRE_INT4)
        for (int64_t o = begin; o < end; o++) to[o - begin] *= weight.scales[o];
}

#else

// ---- links of two outputs -------------------------------------------------------------------------------------------------

// Panels [p, end) of a weight, inputs [first, first + 32), into out [pair of outputs][32]; zeros past the last input.
void turn_pairs(const quire_weight &weight, int64_t panel_bytes, int64_t p, int64_t end, int64_t first, float *out) {
    for (; p < end; p++, out += PANEL / 2 * PANEL) {
        const uint8_t *panel = static_cast<const uint8_t *>(weight.data) + p * panel_bytes;
        for (int i = 0; i < PANEL; i += LANES) {
            Words words[LANES] = {};
            for (int j = 0; j < LANES && first + i + j < weight.inputs; j++)
                words[j] = load<Words>(panel + (first + i + j) * PANEL * 2);
            transpose(words);
            for (int j = 0; j < LANES; j++) store(out + j * PANEL + i, words[j]);
        }
    }
}

Turn turn_for(const quire_weight &) { return turn_pairs; }

void row_of_links(const quire_weight &, int, const uint8_t *dy, int64_t begin, int64_t end, float *to) {
    for (; begin < end; begin += PANEL, dy += PANEL * 2, to += PANEL / 2) {
        const uint8_t *from = dy;
        uint8_t some[PANEL * 2];
        if (end - begin < PANEL) {
            std::memset(some, 0, sizeof some);
            from = static_cast<uint8_t *>(std::memcpy(some, dy, size_t(end - begin) * 2));
        }
        store(to, widen(load<Halves>(from)) | widen(load<Halves>(from + LANES * 2)) << 16);
    }
}

#endif

// ---- the tile ------------------------------------------------------------------------------------------------------------

// acc [ROWS][32] += x [links][ROWS] times w [links][32].
template <int ROWS> void tile(int64_t links, const float *x, const float *w, float *acc) {
    constexpr int PASS = pass_for(ROWS);
    for (int first = 0; first < PARTS; first += PASS, w += PASS * LANES, acc += PASS * LANES) {
        Floats sums[ROWS][PASS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < PASS; v++) sums[r][v] = load<Floats>(acc + r * PANEL + v * LANES);
        for (int64_t i = 0; i < links; i++) {
            Link::Values values[PASS];
            for (int v = 0; v < PASS; v++) values[v] = load<Link::Values>(w + i * PANEL + v * LANES);
            for (int r = 0; r < ROWS; r++) {
                const auto factor = Link::factor(x + i * ROWS + r);
                for (int v = 0; v < PASS; v++) sums[r][v] = Link::add(sums[r][v], values[v], factor);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < PASS; v++) store(acc + r * PANEL + v * LANES, sums[r][v]);
    }
}

using Tile = void (*)(int64_t, const float *, const float *, float *);

Tile tile_for(int rows) {
    return for_rows(rows, [](auto n) -> Tile { return tile<n()>; });
}

// ---- the call ------------------------------------------------------------------------------------------------------------

// Some rows of dy and dx, in tiles of nearly equal size.
struct Chunk {
    int64_t first, rows, tiles;
    Chunk(int64_t first, int64_t rows) : first(first), rows(rows), tiles((rows + MOST_ROWS - 1) / MOST_ROWS) {}
    int64_t start(int64_t t) const { return rows * t / tiles; }
    int count(int64_t t) const { return int(start(t + 1) - start(t)); }
};

// Links of outputs, that a block of so many has.
int64_t links_of(int64_t outputs) { return Link::NUMBERS == 1 ? outputs : up(outputs, PANEL) / Link::NUMBERS; }

// Outputs [begin, end) of the chunk's rows of dy, times the outputs' scales, into x: tiles of [links][rows].
void prepare(const Chunk &chunk, const quire_weight &weight, int type, const void *dy, int64_t stride, int64_t begin,
             int64_t end, float *x) {
    const int64_t links = links_of(end - begin);
    quire::parallel(chunk.tiles, [&](int64_t t) {
        const int rows = chunk.count(t);
        float *to = x + chunk.start(t) * links;
        float lines[MOST_ROWS][BLOCK_OUTPUTS];
        for (int r = 0; r < rows; r++) {
            const int64_t at = (chunk.first + chunk.start(t) + r) * stride + begin;
            row_of_links(weight, type, static_cast<const uint8_t *>(dy) + at * bytes_of(type), begin, end, lines[r]);
        }
        interleave(lines, sizeof lines[0], rows, links, to);
    });
}

int linears_backward(int count, const quire_weight *const *weights, int dy_type, int type, int64_t rows,
                     const void *const *dys, const int64_t *dy_strides, void *dx, int64_t dx_stride) {
    const int64_t inputs = weights[0]->inputs, panels = up(inputs, PANEL) / PANEL;
    std::vector<Turn> turns;
    for (int w = 0; w < count; w++) {
        turns.push_back(turn_for(*weights[w]));
        if (!turns.back() || weights[w]->inputs != inputs) return -1;
    }
    for (int one : {dy_type, type})
        if (one != QUIRE_F32 && one != QUIRE_BF16 && one != QUIRE_F16) return -1;
    const int64_t most = std::min(rows, CHUNK_ROWS);
    auto sums = static_cast<float *>(quire::scratch(0, most * panels * PANEL * 4));  // [input panel][row][32]
    auto x = static_cast<float *>(quire::scratch(1, most * BLOCK_OUTPUTS * 4));
    for (int64_t first = 0; first < rows; first += CHUNK_ROWS) {
        const Chunk chunk(first, std::min(CHUNK_ROWS, rows - first));
        bool begun = false;
        for (int w = 0; w < count; w++) {
            const quire_weight &weight = *weights[w];
            const int64_t panel_bytes = quire_packed_bytes(weight.form, weight.type, PANEL, inputs);
            for (int64_t begin = 0; begin < weight.outputs; begin += BLOCK_OUTPUTS, begun = true) {
                const int64_t end = std::min(weight.outputs, begin + BLOCK_OUTPUTS);
                prepare(chunk, weight, dy_type, dys[w], dy_strides[w], begin, end, x);
                quire::parallel(panels, [&](int64_t p) {
                    auto turned = static_cast<float *>(quire::scratch(2, BLOCK_OUTPUTS * PANEL * 4));
                    float *acc = sums + p * chunk.rows * PANEL;
                    if (!begun) std::fill(acc, acc + chunk.rows * PANEL, 0.0f);
                    turns[size_t(w)](weight, panel_bytes, begin / PANEL, up(end, PANEL) / PANEL, p * PANEL, turned);
                    const int64_t links = links_of(end - begin);
                    for (int64_t t = 0; t < chunk.tiles; t++)
                        tile_for(chunk.count(t))(links, x + chunk.start(t) * links, turned, acc + chunk.start(t) * PANEL);
                });
            }
        }
        quire::parallel(chunk.tiles, [&](int64_t t) {
            for (int64_t r = chunk.start(t); r < chunk.start(t + 1); r++)
                for (int64_t p = 0; p < panels; p++)
                    floats_to_row(type, sums + (p * chunk.rows + r) * PANEL, std::min<int64_t>(PANEL, inputs - p * PANEL),
                                  static_cast<uint8_t *>(dx) + ((first + r) * dx_stride + p * PANEL) * bytes_of(type));
        });
    }
    return 0;
}

#if defined(__AVX512BF16__)
decltype(quire::Kernels::linears_backward) others;

int linears_backward_in_pairs(int count, const quire_weight *const *weights, int dy_type, int type, int64_t rows,
                              const void *const *dys, const int64_t *dy_strides, void *dx, int64_t dx_stride) {
    const bool paired = dy_type == QUIRE_BF16 && std::all_of(weights, weights + count, [](const quire_weight *weight) {
        return weight->form == QUIRE_DENSE && weight->type == QUIRE_BF16 && !weight->scales;
    });
    return (paired ? linears_backward : others)(count, weights, dy_type, type, rows, dys, dy_strides, dx, dx_stride);
}
#endif

}  // namespace

#if defined(__AVX512BF16__)
void add_transposed(quire::Kernels &kernels) {
    others = kernels.linears_backward;
    kernels.linears_backward = linears_backward_in_pairs;
}
#else
void add_transposed(quire::Kernels &kernels) { kernels.linears_backward = linears_backward; }
#endif

}  // namespace QUIRE_ISA
