// Products with packed weights the other way round, as transposed.cpp's, on AMX's tiles: dx = dy W for bfloat16 dy and weights.
//
// A panel's 32 outputs of an input lie side by side, which is a row of a tile: so the product is made as dx^T = W^T dy^T, 32
// inputs by 32 rows at a time, and the weights are loaded as they lie. A step is a panel: its outputs j and j + 16 are a pair.
// dy is turned once, each sum is one chain over the panels of one weight after the other, stored whole between blocks. Other
// types go to the next instruction set.
#include "kernels.h"
#include "product.h"
#include "tiles.h"

#include <vector>

namespace QUIRE_ISA {
namespace {

constexpr int BAND = 2 * TILE_ROWS;                  // rows, and inputs, that pass together
constexpr int64_t STEP_BYTES = BAND * TILE_BYTES;    // of dy and of a panel
constexpr int64_t CHUNK_ROWS = 512, BLOCK_STEPS = 8;  // as in amx.cpp: caches hold their rows, their panels and their sums
constexpr int64_t MANY_BLOCKS = 14;                   // of inputs

// Rows of dy in tiles: [band][panel][half band][16 pairs of outputs][16 rows], zeros past the last of them.
void turn(const quire_weight &weight, const uint16_t *dy, int64_t stride, int64_t rows, int64_t steps, uint8_t *to) {
    quire::parallel(up(rows, BAND) / TILE_ROWS, [&](int64_t half) {
        const int64_t first = half * TILE_ROWS, count = std::clamp<int64_t>(rows - first, 0, TILE_ROWS);
        uint8_t *place = to + half / 2 * steps * STEP_BYTES + half % 2 * TILE_ROWS * TILE_BYTES;
        for (int64_t begin = 0; begin < weight.outputs; begin += PANEL, place += STEP_BYTES) {
            const int64_t outputs = std::min<int64_t>(PANEL, weight.outputs - begin);
            Words words[TILE_ROWS] = {};
            for (int64_t r = 0; r < count; r++) {
                const uint16_t *from = dy + (first + r) * stride + begin;
                uint16_t some[PANEL] = {};
                if (outputs < PANEL) std::memcpy(some, from, size_t(outputs) * 2), from = some;
                words[r] = widen(load<Halves>(from)) | widen(load<Halves>(from + LANES)) << 16;
            }
            transpose(words);
            for (int j = 0; j < TILE_ROWS; j++) store(place + j * TILE_BYTES, words[j]);
        }
    });
}

// sums [32 inputs][32 rows] = or += panels' inputs times turned rows, over `steps` panels.
void multiply(int64_t steps, const uint8_t *const *inputs, const uint8_t *rows, float *sums, bool add) {
    constexpr int64_t LINE = BAND * 4, HALF = TILE_ROWS * TILE_BYTES;
    auto c = reinterpret_cast<uint8_t *>(sums), lower = c + TILE_ROWS * LINE;
    if (add) {
        load_tile<0>(c, LINE), load_tile<1>(c + TILE_BYTES, LINE);
        load_tile<2>(lower, LINE), load_tile<3>(lower + TILE_BYTES, LINE);
    } else {
        zero<0>(), zero<1>(), zero<2>(), zero<3>();
    }
    for (int64_t s = 0; s < steps; s++, rows += STEP_BYTES) {
        load_tile<4>(inputs[s], TILE_BYTES);
        load_tile<6>(rows, TILE_BYTES);
        dot_bf16<0, 4, 6>();
        load_tile<7>(rows + HALF, TILE_BYTES);
        dot_bf16<1, 4, 7>();
        load_tile<5>(inputs[s] + HALF, TILE_BYTES);
        dot_bf16<2, 5, 6>();
        dot_bf16<3, 5, 7>();
    }
    store_tile<0>(c, LINE), store_tile<1>(c + TILE_BYTES, LINE);
    store_tile<2>(lower, LINE), store_tile<3>(lower + TILE_BYTES, LINE);
}

// sums [32 inputs][32 rows], of which there are so many, into dx.
void finish(const float *sums, int64_t inputs, int64_t rows, int type, uint8_t *dx, int64_t row_bytes) {
    for (int64_t first = 0; first < rows; first += LANES) {
        Words words[2][LANES];
        for (int h = 0; h < 2; h++) {
            for (int i = 0; i < LANES; i++) words[h][i] = load<Words>(sums + (h * LANES + i) * BAND + first);
            transpose(words[h]);
        }
        for (int64_t r = 0; r < std::min<int64_t>(LANES, rows - first); r++, dx += row_bytes) {
            alignas(64) float line[BAND];
            for (int h = 0; h < 2; h++) store(line + h * LANES, words[h][r]);
            floats_to_row(type, line, inputs, dx);
        }
    }
}

// All weights' panels, in the order in which they are summed.
struct Panels {
    std::vector<const uint8_t *> data;
    int64_t inputs;

    Panels(int count, const quire_weight *const *weights) : inputs(weights[0]->inputs) {
        for (int w = 0; w < count; w++)
            for (int64_t p = 0; p < up(weights[w]->outputs, PANEL) / PANEL; p++)
                data.push_back(static_cast<const uint8_t *>(weights[w]->data) + p * inputs * PANEL * 2);
    }
    int64_t steps() const { return int64_t(data.size()); }
    // Inputs [first, first + 32) of a panel as two tiles, in the weight itself or, where it has not so many, in room.
    const uint8_t *tile(int64_t step, int64_t first, uint8_t *room) const {
        const uint8_t *from = data[size_t(step)] + first * PANEL * 2;
        if (first + BAND <= inputs) return from;
        std::memset(room, 0, STEP_BYTES);
        std::memcpy(room, from, size_t(inputs - first) * PANEL * 2);
        return room;
    }
};

decltype(quire::Kernels::linears_backward) others;

int linears_backward(int count, const quire_weight *const *weights, int dy_type, int type, int64_t rows, const void *const *dys,
                     const int64_t *dy_strides, void *dx, int64_t dx_stride) {
    const bool tiled = dy_type == QUIRE_BF16 && std::all_of(weights, weights + count, [&](const quire_weight *weight) {
        const bool dense = weight->form == QUIRE_DENSE && weight->type == QUIRE_BF16 && !weight->scales;
        return dense && weight->inputs == weights[0]->inputs;
    });
    if (!tiled || bytes_of(type) < 2) return others(count, weights, dy_type, type, rows, dys, dy_strides, dx, dx_stride);
    const Panels panels(count, weights);
    const int64_t steps = panels.steps(), blocks = up(panels.inputs, BAND) / BAND;
    const int64_t together = std::clamp<int64_t>(blocks / quire::threads(), 1, MANY_BLOCKS);
    auto turned = static_cast<uint8_t *>(quire::scratch(0, up(std::min(rows, CHUNK_ROWS), BAND) / BAND * steps * STEP_BYTES));
    for (int64_t start = 0; start < rows; start += CHUNK_ROWS) {
        const int64_t chunk = std::min(CHUNK_ROWS, rows - start), bands = up(chunk, BAND) / BAND;
        uint8_t *to = turned;
        for (int w = 0; w < count; to += up(weights[w]->outputs, PANEL) / PANEL * STEP_BYTES, w++)
            turn(*weights[w], static_cast<const uint16_t *>(dys[w]) + start * dy_strides[w], dy_strides[w], chunk, steps, to);
        quire::parallel((blocks + together - 1) / together, [&](int64_t task) {
            const int64_t first = task * together, last = std::min(blocks, first + together);
            auto sums = static_cast<float *>(quire::scratch(2, together * bands * BAND * BAND * 4));
            auto room = static_cast<uint8_t *>(quire::scratch(3, BLOCK_STEPS * STEP_BYTES));
            Tiles tiles;
            tiles.shape(BAND, TILE_BYTES);
            for (int64_t step = 0; step < steps; step += BLOCK_STEPS) {
                const int64_t size = std::min(BLOCK_STEPS, steps - step);
                for (int64_t block = first; block < last; block++) {
                    const uint8_t *inputs[BLOCK_STEPS];
                    for (int64_t s = 0; s < size; s++) inputs[s] = panels.tile(step + s, block * BAND, room + s * STEP_BYTES);
                    for (int64_t band = 0; band < bands; band++) {
                        float *own = sums + ((block - first) * bands + band) * BAND * BAND;
                        multiply(size, inputs, turned + (band * steps + step) * STEP_BYTES, own, step > 0);
                        if (step + size < steps) continue;
                        const int64_t row = start + band * BAND, input = block * BAND, each = bytes_of(type);
                        finish(own, std::min<int64_t>(BAND, panels.inputs - input), std::min<int64_t>(BAND, rows - row), type,
                               static_cast<uint8_t *>(dx) + (row * dx_stride + input) * each, dx_stride * each);
                    }
                }
            }
        });
    }
    return 0;
}

}  // namespace

void add_transposed(quire::Kernels &kernels) {
    others = kernels.linears_backward;
    kernels.linears_backward = linears_backward;
}

}  // namespace QUIRE_ISA
