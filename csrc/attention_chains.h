// The products of attention.cpp as chains of vectors: of numbers, or of pairs (link.h).
#pragma once

#include "spans.h"

namespace QUIRE_ISA {
namespace {

constexpr int SPAN_LINKS = SPAN / Link::NUMBERS;  // of keys

// sums[r][p][v] is one chain over links i of x(i, r) * w(p, i, v): x(i, r) at x[i * STEP + r * ROW], panel p at w + p * panel,
// of which EACH vectors are read.
template <int ROWS, int PANELS, int EACH, int WIDTH, int STEP, int ROW>
INLINE void chains(int64_t count, const float *x, const float *w, int64_t panel, Floats (&sums)[ROWS][PANELS * EACH]) {
    for (int64_t i = 0; i < count; i++) {
        Link::Values values[PANELS * EACH];
        for (int p = 0; p < PANELS; p++)
            for (int v = 0; v < EACH; v++) values[p * EACH + v] = load<Link::Values>(w + p * panel + i * WIDTH + v * LANES);
        for (int r = 0; r < ROWS; r++) {
            const auto factor = Link::factor(x + i * STEP + r * ROW);
            for (int v = 0; v < PANELS * EACH; v++) sums[r][v] = Link::add(sums[r][v], values[v], factor);
        }
    }
}

// Few rows leave registers free: more panels at a time hide the latency of the chains.
constexpr int panels_for(int rows) {
    if (LANES == 16) return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    return rows == 1 ? 2 : 1;
}

// Scores of ROWS queries [links][ROWS] with the keys of PANELS panels into scores [ROWS][128].
template <int ROWS, int PANELS> INLINE void score_some(int64_t links, const float *q, const float *keys, float *scores) {
    constexpr int EACH = pass_for(ROWS), SUMS = PANELS * EACH;
    for (int first = 0; first < PARTS; first += EACH) {
        Floats sums[ROWS][SUMS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < SUMS; v++) sums[r][v] = Floats{};
        chains<ROWS, PANELS, EACH, PANEL, ROWS, 1>(links, q, keys + first * LANES, links * PANEL, sums);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < SUMS; v++)
                store(scores + r * SPAN + v / EACH * PANEL + (first + v % EACH) * LANES, sums[r][v]);
    }
}

template <int ROWS> void score_rows(int64_t links, const float *q, const float *keys, int panel, int last, float *scores) {
    constexpr int TOGETHER = panels_for(ROWS);
    for (; panel + TOGETHER <= last; panel += TOGETHER)
        score_some<ROWS, TOGETHER>(links, q, keys + panel * links * PANEL, scores + panel * PANEL);
    for (; panel < last; panel++) score_some<ROWS, 1>(links, q, keys + panel * links * PANEL, scores + panel * PANEL);
}

// out [ROWS][stride] = out * fade + weights [ROWS][128] times the values of links [begin, end), for some dimensions.
template <int ROWS, int PANELS, int WIDTH>
INLINE void mix_some(int begin, int end, const float *weights, const float *values, const float *fade, int64_t stride,
                     float *out) {
    constexpr int EACH = std::min(pass_for(ROWS), WIDTH / LANES), SUMS = PANELS * EACH;
    for (int first = 0; first < WIDTH / LANES; first += EACH) {
        const auto place = [&](int r, int v) { return out + r * stride + v / EACH * WIDTH + (first + v % EACH) * LANES; };
        Floats sums[ROWS][SUMS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < SUMS; v++) sums[r][v] = load<Floats>(place(r, v)) * fade[r];
        const float *from = values + begin * WIDTH + first * LANES;
        chains<ROWS, PANELS, EACH, WIDTH, 1, SPAN>(end - begin, weights + begin, from, PANEL * SPAN_LINKS, sums);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < SUMS; v++) store(place(r, v), sums[r][v]);
    }
}

template <int ROWS>
void mix_rows(int64_t size, int begin, int end, const float *weights, const float *values, const float *fade, int64_t stride,
              float *out) {
    constexpr int TOGETHER = panels_for(ROWS);
    int64_t d = 0;
    for (; d + TOGETHER * PANEL <= size; d += TOGETHER * PANEL)
        mix_some<ROWS, TOGETHER, PANEL>(begin, end, weights, values + d * SPAN_LINKS, fade, stride, out + d);
    for (; d < size && panel_width(size, d) == PANEL; d += PANEL)
        mix_some<ROWS, 1, PANEL>(begin, end, weights, values + d * SPAN_LINKS, fade, stride, out + d);
    if (d < size) mix_some<ROWS, 1, 16>(begin, end, weights, values + d * SPAN_LINKS, fade, stride, out + d);
}

// For up to TOGETHER rows, which pass over a span together.
class Products {
public:
    static constexpr int64_t TASK_ROWS = 168;  // that share the decoding of a span
    static constexpr int64_t TOGETHER = MOST_ROWS;
    static constexpr int64_t UNIT = Link::NUMBERS;  // of which the numbers of dimensions and of keys are multiples

    // Where tile t of a task's rows begins, of `tiles`: all are about as large.
    static int64_t start(int64_t t, int64_t tiles, int64_t rows) { return rows * t / tiles; }

    void set_rows(int rows) {
        for_rows(rows, [&](auto n) { return score_ = score_rows<n()>, mix_ = mix_rows<n()>, 0; });
    }
    // Queries into q [links][rows]: read(r, line) gives a line of links.
    template <class Read> static void arrange(int64_t links, int64_t rows, const Read &read, float *line, float *q) {
        for (int64_t r = 0; r < rows; r++) {
            read(r, line);
            for (int64_t i = 0; i < links; i++) std::memcpy(q + i * rows + r, line + i, 4);
        }
    }
    // Scores of the queries with the keys of panels [panel, last) into scores [rows][128].
    void score(int64_t links, const float *q, const float *keys, int panel, int last, float *scores) const {
        score_(links, q, keys, panel, last, scores);
    }
    // out [rows][stride] = out * fade + weights [rows][128] times the values of keys [begin, end).
    void mix(int64_t size, int begin, int end, const float *weights, const float *values, const float *fade, int64_t stride,
             float *out) const {
        mix_(size, begin / Link::NUMBERS, (end + Link::NUMBERS - 1) / Link::NUMBERS, weights, values, fade, stride, out);
    }

private:
    void (*score_)(int64_t, const float *, const float *, int, int, float *) = nullptr;
    void (*mix_)(int64_t, int, int, const float *, const float *, const float *, int64_t, float *) = nullptr;
};

}  // namespace
}  // namespace QUIRE_ISA
