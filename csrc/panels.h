// The shape of products: what lies in panels of 32 columns, and how many rows and columns of it the registers hold sums for.
#pragma once

#include "vector.h"

#include <type_traits>

namespace QUIRE_ISA {

constexpr int PANEL = 32;             // columns: outputs of a weight, keys or dimensions of a span
constexpr int PARTS = PANEL / LANES;  // vectors of a panel's row

// A tile has up to MOST_ROWS rows. With that many a pass takes MOST_VECTORS of a panel's vectors, and the next pass finds the
// panel in the first-level cache; with few rows one pass takes them all.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12, MOST_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int MOST_ROWS = 6, MOST_VECTORS = 4;
#else
constexpr int MOST_ROWS = 6, MOST_VECTORS = 2;
#endif
constexpr int pass_for(int rows) { return rows <= 2 ? PARTS : MOST_VECTORS; }

// choose() of the number of rows as a constant, 1 to MOST_ROWS: there is a kernel for each.
template <int N = 1, class Choose> auto for_rows(int rows, const Choose &choose) {
    if constexpr (N < MOST_ROWS)
        if (rows != N) return for_rows<N + 1>(rows, choose);
    return choose(std::integral_constant<int, N>());
}

}  // namespace QUIRE_ISA
