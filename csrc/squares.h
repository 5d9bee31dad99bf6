// Thirty-two rows times a panel of thirty-two columns, both as pairs of bfloat16 (link.h): on AMX's tiles, or by vectors.
// Knows no layout beyond that. Rows are apart from each other.
#pragma once

#include "link.h"
#include "panels.h"
#if defined(QUIRE_TILES)
#include "tiles.h"
#endif

namespace QUIRE_ISA {
namespace {

class Squares {
public:
    static constexpr int64_t STEP = 16;  // of which the numbers of links are multiples

#if defined(QUIRE_TILES)
    Squares() { tiles_.shape(PANEL, TILE_BYTES); }

    // sums [32][stride] = (FRESH) or += x [32][x_stride] times panel [links][32].
    template <bool FRESH>
    void multiply(int64_t links, const float *x, int64_t x_stride, const float *panel, float *sums, int64_t stride) const {
        float *lower = sums + TILE_ROWS * stride;
        if constexpr (FRESH) {
            zero<0>(), zero<1>(), zero<2>(), zero<3>();
        } else {
            load_tile<0>(sums, stride * 4), load_tile<1>(sums + LANES, stride * 4);
            load_tile<2>(lower, stride * 4), load_tile<3>(lower + LANES, stride * 4);
        }
        for (int64_t i = 0; i < links; i += STEP, panel += STEP * PANEL) {
            load_tile<4>(x + i, x_stride * 4);
            load_tile<6>(panel, PANEL * 4);
            dot_bf16<0, 4, 6>();
            load_tile<7>(panel + LANES, PANEL * 4);
            dot_bf16<1, 4, 7>();
            load_tile<5>(x + TILE_ROWS * x_stride + i, x_stride * 4);
            dot_bf16<2, 5, 6>();
            dot_bf16<3, 5, 7>();
        }
        store_tile<0>(sums, stride * 4), store_tile<1>(sums + LANES, stride * 4);
        store_tile<2>(lower, stride * 4), store_tile<3>(lower + LANES, stride * 4);
    }

private:
    Tiles tiles_;
#else
    template <bool FRESH>
    void multiply(int64_t links, const float *x, int64_t x_stride, const float *panel, float *sums, int64_t stride) const {
        constexpr int ROWS = 8;  // with two vectors each: as many chains as hide the latency
        static_assert(PANEL == 2 * LANES && PANEL % ROWS == 0);
        for (int first = 0; first < PANEL; first += ROWS, x += ROWS * x_stride, sums += ROWS * stride) {
            Floats chains[ROWS][2];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < 2; v++) chains[r][v] = FRESH ? Floats{} : load<Floats>(sums + r * stride + v * LANES);
            for (int64_t i = 0; i < links; i++) {
                const Link::Values values[2] = {load<Words>(panel + i * PANEL), load<Words>(panel + i * PANEL + LANES)};
                for (int r = 0; r < ROWS; r++) {
                    const Words factor = Link::factor(x + r * x_stride + i);
                    for (int v = 0; v < 2; v++) chains[r][v] = Link::add(chains[r][v], values[v], factor);
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < 2; v++) store(sums + r * stride + v * LANES, chains[r][v]);
        }
    }
#endif
};

}  // namespace
}  // namespace QUIRE_ISA
