// What the ways of multiplying by a packed weight share: how rows are cut into tiles, what memory brings meanwhile, and how one
// way stands in front of another.
#pragma once

#include "kernels.h"
#include "product.h"

namespace QUIRE_ISA {

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

constexpr int64_t BLOCK_TILES = 8;  // that pass over a block of a panel one after the other

// What memory brings while a tile is computed: from where on, and how many bytes for each step that the tile takes.
struct Ahead {
    const uint8_t *from;
    int64_t step;
    INLINE Ahead after(int64_t steps) const { return {from + steps * step, step}; }
    INLINE void fetch(int64_t i, int64_t bytes) const {
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + i * step + line);
    }
};

// Whether rows may be of this type, and all weights have what a product takes from the first one.
inline bool fits(int type, int count, const quire_weight *const *weights) {
    const quire_weight &first = *weights[0];
    if (type != QUIRE_F32 && type != QUIRE_BF16 && type != QUIRE_F16) return false;
    for (int w = 1; w < count; w++)
        if (weights[w]->form != first.form || weights[w]->type != first.type || weights[w]->inputs != first.inputs ||
            weights[w]->group_size != first.group_size)
            return false;
    return true;
}

// Ways for all forms on every instruction set (dense.cpp, integers.cpp). False: not for these types.
bool multiply_dense(const Product &product);
void multiply_integers(const Product &product);

// A way in front of the kernels that are there already: what multiply() has no way for goes to them.
template <bool (*multiply)(const Product &)> struct InFront {
    static inline decltype(quire::Kernels::linears) others;

    static int linears(int count, const quire_weight *const *weights, int type, int64_t rows, const void *x, int64_t x_stride,
                       const void *const *biases, void *const *ys, const int64_t *y_strides) {
        if (rows > 0 && weights[0]->inputs > 0 && fits(type, count, weights)) {
            const Product product{count, weights, type, rows, static_cast<const uint8_t *>(x), x_stride, biases, ys, y_strides};
            if (multiply(product)) return 0;
        }
        return others(count, weights, type, rows, x, x_stride, biases, ys, y_strides);
    }
    static void add(quire::Kernels &kernels) {
        others = kernels.linears;
        kernels.linears = linears;
    }
};

}  // namespace QUIRE_ISA
