// Rows one by one: how they are dealt out to threads, and a row as a line of floats with sums along it.
#pragma once

#include "functions.h"
#include "pool.h"

namespace QUIRE_ISA {
namespace {

constexpr int64_t WORTH_A_TASK = 16384;  // elements: less is done sooner than another thread wakes

// body(first, last) over runs of rows of `work` elements each.
template <class Body> void over_rows(int64_t rows, int64_t work, const Body &body) {
    const int64_t enough = rows * std::max<int64_t>(work, 1) / WORTH_A_TASK;
    const int64_t tasks = std::max<int64_t>(1, std::min({rows, enough, int64_t(4 * quire::threads())}));
    quire::parallel(tasks, [&](int64_t t) { body(rows * t / tasks, rows * (t + 1) / tasks); });
}

const uint8_t *bytes(const void *p) { return static_cast<const uint8_t *>(p); }
[[maybe_unused]] uint8_t *bytes(void *p) { return static_cast<uint8_t *>(p); }

// Sum over a line filled up to a multiple of 64 with what adds nothing, in 64 chains by the place modulo 64: chain(sums, i)
// adds what the places from i on have.
template <class F> INLINE float sum_along(int64_t count, const F &chain) {
    constexpr int PARTS = 64 / LANES, STEP = Sixteen::COUNT;
    Floats sums[PARTS];
    for (int v = 0; v < PARTS; v++) sums[v] = Floats{};
    for (int64_t i = 0; i < count; i += 64)
        for (int v = 0; v < PARTS; v++) sums[v] = chain(sums[v], i + v * LANES);
    Sixteen s;
    for (int v = 0; v < STEP; v++)
        s.part[v] = (sums[v] + sums[v + STEP]) + (sums[v + 2 * STEP] + sums[v + 3 * STEP]);
    return sum(s);
}

template <class F> INLINE float sum_of(const float *x, int64_t count, const F &chain) {
    return sum_along(count, [&](Floats s, int64_t i) { return chain(s, load<Floats>(x + i)); });
}

// A row as floats, filled up with zeros.
template <int type> INLINE void widen_row(const uint8_t *row, int64_t count, float *out) {
    int64_t i = 0;
    for (; i < count; i += LANES) store(out + i, read<type>(row, i, count));
    for (; i % 64; i += LANES) store(out + i, Floats{});
}

}  // namespace
}  // namespace QUIRE_ISA
