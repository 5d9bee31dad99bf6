// The products of attention.cpp on AMX's tiles. Spans that are decoded into pairs (spans.h) are made of tiles already: 16 pairs
// of dimensions by 16 keys, and 16 pairs of keys by 16 dimensions. A tile's rows are apart from each other, so their number
// changes no bit.
#pragma once

#include "spans.h"
#include "tiles.h"

namespace QUIRE_ISA {
namespace {

// For up to TOGETHER rows, which pass over a span together.
class Products {
public:
    static constexpr int64_t TASK_ROWS = 448;  // that share the decoding of a span
    static constexpr int64_t TOGETHER = 2 * TILE_ROWS;
    static constexpr int64_t UNIT = PANEL;  // of which the numbers of dimensions and of keys are multiples

    // Where tile t of a task's rows begins: all but the last are full.
    static int64_t start(int64_t t, int64_t, int64_t rows) { return std::min(rows, t * TOGETHER); }

    void set_rows(int rows) { rows_ = rows, tiles_.shape(rows, TILE_BYTES); }

    // Queries into q [rows][links]: read(r, line) gives a line of links.
    template <class Read> static void arrange(int64_t links, int64_t rows, const Read &read, float *, float *q) {
        for (int64_t r = 0; r < rows; r++) read(r, q + r * links);
    }
    // Scores of the queries with the keys of panels [panel, last) into scores [rows][128].
    void score(int64_t links, const float *q, const float *keys, int panel, int last, float *scores) const {
        const auto some = [&](auto both) {
            for (int p = panel; p < last; p++) {
                zero<0>(), zero<1>();
                if constexpr (both) zero<2>(), zero<3>();
                multiply<both, true>(links, q, links, keys + p * links * PANEL, PANEL);
                put<both, true>(scores + p * PANEL, SPAN);
            }
        };
        rows_ > TILE_ROWS ? some(std::true_type()) : some(std::false_type());
    }
    // out [rows][stride] = out * fade + weights, pairs in [rows][128], times the values of keys [begin, end); those beside
    // them, up to whole tiles, have no weight.
    void mix(int64_t size, int begin, int end, const float *weights, const float *values, const float *fade, int64_t stride,
             float *out) const {
        const int64_t first = begin / PANEL * TILE_ROWS, links = up(end, PANEL) / 2 - first;
        for (int r = 0; r < rows_; r++)
            if (fade[r] != 1.0f)
                for (float *o = out + r * stride; o < out + r * stride + size; o += LANES) store(o, load<Floats>(o) * fade[r]);
        const auto some = [&](auto both, auto wide, int64_t d) {
            constexpr int64_t WIDTH = wide ? PANEL : LANES;
            take<both, wide>(out + d, stride);
            multiply<both, wide>(links, weights + first, SPAN, values + d * (SPAN / 2) + first * WIDTH, WIDTH);
            put<both, wide>(out + d, stride);
        };
        const auto all = [&](auto both) {
            for (int64_t d = 0; d < size; d += PANEL)
                panel_width(size, d) == PANEL ? some(both, std::true_type(), d) : some(both, std::false_type(), d);
        };
        rows_ > TILE_ROWS ? all(std::true_type()) : all(std::false_type());
    }

private:
    Tiles tiles_;
    int rows_ = 0;

    // Tiles of sums: BOTH halves of the rows, WIDE panels of 32 columns.
    template <bool BOTH, bool WIDE> static void take(const float *sums, int64_t stride) {
        const float *lower = sums + TILE_ROWS * stride;
        load_tile<0>(sums, stride * 4);
        if constexpr (WIDE) load_tile<1>(sums + LANES, stride * 4);
        if constexpr (BOTH) load_tile<2>(lower, stride * 4);
        if constexpr (BOTH && WIDE) load_tile<3>(lower + LANES, stride * 4);
    }
    template <bool BOTH, bool WIDE> static void put(float *sums, int64_t stride) {
        float *lower = sums + TILE_ROWS * stride;
        store_tile<0>(sums, stride * 4);
        if constexpr (WIDE) store_tile<1>(sums + LANES, stride * 4);
        if constexpr (BOTH) store_tile<2>(lower, stride * 4);
        if constexpr (BOTH && WIDE) store_tile<3>(lower + LANES, stride * 4);
    }
    // Tiles of sums += x [rows][stride] times a panel [links][width].
    template <bool BOTH, bool WIDE>
    static void multiply(int64_t links, const float *x, int64_t stride, const float *panel, int64_t width) {
        for (int64_t i = 0; i < links; i += TILE_ROWS, panel += TILE_ROWS * width) {
            load_tile<4>(x + i, stride * 4);
            load_tile<6>(panel, width * 4);
            dot_bf16<0, 4, 6>();
            if constexpr (WIDE) load_tile<7>(panel + LANES, width * 4), dot_bf16<1, 4, 7>();
            if constexpr (BOTH) load_tile<5>(x + TILE_ROWS * stride + i, stride * 4), dot_bf16<2, 5, 6>();
            if constexpr (BOTH && WIDE) dot_bf16<3, 5, 7>();
        }
    }
};

}  // namespace
}  // namespace QUIRE_ISA
