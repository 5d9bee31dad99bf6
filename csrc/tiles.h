// AMX's tiles: eight registers of up to 16 rows of up to 64 bytes, and what is done with them. Two implementations of one
// interface: the instructions, and (with QUIRE_EMULATED) their meaning in plain C++, for tests on machines without them.
// Knows no weights.
//
// The numbers of the tiles are parts of the instructions, hence template arguments.
#pragma once

#include "vector.h"

#include <algorithm>
#include <cstdlib>

namespace QUIRE_ISA {

constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 64;  // of a row

// What ldtilecfg reads.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row, of each tile
    uint8_t rows[16] = {};
};

#ifndef QUIRE_EMULATED

// By hand: GCC 12 drops the stores of a configuration that is passed to its intrinsic, and takes only literal tile numbers.
INLINE void configure(const TileConfig &config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
INLINE void release() { asm volatile("tilerelease"); }
template <int T> INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> INLINE void load_tile(const void *from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T> INLINE void store_tile(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}
// C += A B. A: rows of pairs of bfloat16 (or of four bytes), B: the same pairs (fours) of each column side by side.
template <int C, int A, int B> INLINE void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> INLINE void dot_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> INLINE void dot_unsigned() {  // signed A, unsigned B
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct Emulated {
    TileConfig config;
    bool configured = false;
    uint8_t data[8][TILE_ROWS][TILE_BYTES];

    // What the processor answers with an undefined instruction ends the program here.
    int rows(int tile) const {
        if (!configured || !config.rows[tile]) std::abort();
        return config.rows[tile];
    }
    int bytes(int tile) const { return rows(tile) ? config.bytes[tile] : 0; }
};

inline Emulated &emulated() {
    static thread_local Emulated tiles;
    return tiles;
}

inline void configure(const TileConfig &config) {
    Emulated &tiles = emulated();
    tiles.config = config, tiles.configured = true;
    std::memset(tiles.data, 0, sizeof tiles.data);
    bool right = config.palette == 1 && !config.start_row;
    for (uint8_t one : config.reserved) right &= !one;
    for (int t = 0; t < 16; t++) {
        const int rows = config.rows[t], bytes = config.bytes[t];
        right &= t < 8 ? rows <= TILE_ROWS && bytes <= TILE_BYTES && !rows == !bytes && bytes % 4 == 0 : !rows && !bytes;
    }
    if (!right) std::abort();
}
inline void release() { emulated().configured = false; }
template <int T> void zero() {
    emulated().rows(T);
    std::memset(emulated().data[T], 0, sizeof emulated().data[T]);
}
template <int T> void load_tile(const void *from, int64_t stride) {
    Emulated &tiles = emulated();
    std::memset(tiles.data[T], 0, sizeof tiles.data[T]);
    for (int r = 0; r < tiles.rows(T); r++)
        std::memcpy(tiles.data[T][r], static_cast<const uint8_t *>(from) + r * stride, size_t(tiles.bytes(T)));
}
template <int T> void store_tile(void *to, int64_t stride) {
    Emulated &tiles = emulated();
    for (int r = 0; r < tiles.rows(T); r++)
        std::memcpy(static_cast<uint8_t *>(to) + r * stride, tiles.data[T][r], size_t(tiles.bytes(T)));
}

// Calls row(m, the row of C, the row of A, B, pairs or fours of a row) and zeroes what is outside.
template <int C, int A, int B, class Row> void each_row(const Row &row) {
    Emulated &tiles = emulated();
    const int depth = tiles.bytes(A) / 4;
    static_assert(C != A && C != B && A != B);
    if (tiles.rows(C) != tiles.rows(A) || tiles.bytes(C) != tiles.bytes(B) || depth != tiles.rows(B)) std::abort();
    for (int m = 0; m < TILE_ROWS; m++) {
        if (m < tiles.rows(C)) row(tiles.data[C][m], tiles.data[A][m], tiles.data[B], depth);
        const int from = m < tiles.rows(C) ? tiles.bytes(C) : 0;
        std::memset(tiles.data[C][m] + from, 0, size_t(TILE_BYTES - from));
    }
}

// Denormal numbers count as zero, on the way in and out.
INLINE Floats flushed(Floats v) { return magnitude(v) < 0x1p-126f ? bits<Floats>(bits<Words>(v) & 0x80000000u) : v; }

// The first numbers of the pairs and the second ones have a chain each, which begins at 0; their sum is added to C.
template <int C, int A, int B> void dot_bf16() {
    each_row<C, A, B>([](uint8_t *c, const uint8_t *a, const uint8_t(*b)[TILE_BYTES], int depth) {
        constexpr int VECTORS = TILE_BYTES / 4 / LANES;
        for (int v = 0; v < VECTORS; v++) {
            Floats first = {}, second = {};
            for (int k = 0; k < depth; k++) {
                uint32_t pair;
                std::memcpy(&pair, a + k * 4, 4);
                const Words w = load<Words>(b[k] + v * LANES * 4);
                const Floats x0 = all(bits<float>(pair << 16)), x1 = all(bits<float>(pair & 0xffff0000u));
                first = flushed(fma(flushed(x0), flushed(bits<Floats>(w << 16)), first));
                second = flushed(fma(flushed(x1), flushed(bits<Floats>(w & 0xffff0000u)), second));
            }
            Floats sum = flushed(first + second), old = flushed(load<Floats>(c + v * LANES * 4));
            store(c + v * LANES * 4, flushed(old + sum));
        }
    });
}
template <class W, int C, int A, int B> void dot_bytes() {
    each_row<C, A, B>([](uint8_t *c, const uint8_t *a, const uint8_t(*b)[TILE_BYTES], int depth) {
        int32_t sums[TILE_BYTES / 4];
        std::memcpy(sums, c, sizeof sums);
        for (int k = 0; k < depth; k++)
            for (int n = 0; n < TILE_BYTES / 4; n++)
                for (int i = 0; i < 4; i++) sums[n] += int32_t(int8_t(a[k * 4 + i])) * int32_t(W(b[k][n * 4 + i]));
        std::memcpy(c, sums, sizeof sums);
    });
}
template <int C, int A, int B> void dot_signed() { dot_bytes<int8_t, C, A, B>(); }
template <int C, int A, int B> void dot_unsigned() { dot_bytes<uint8_t, C, A, B>(); }

#endif

// The tiles of one product: 0 to 3 are sums of 32 rows by 32 columns, 4 and 5 rows, 6 and 7 columns.
class Tiles {
public:
    ~Tiles() {
        if (rows_) release();
    }
    // For `rows` rows and steps of `bytes` bytes. Does nothing where the tiles are so already.
    void shape(int rows, int bytes) {
        if (rows == rows_) return;
        rows_ = rows;
        TileConfig config;
        const int halves[2] = {std::min(rows, TILE_ROWS), std::max(rows - TILE_ROWS, 0)};
        for (int h = 0; h < 2; h++)
            if (halves[h]) {
                config.rows[2 * h] = config.rows[2 * h + 1] = config.rows[4 + h] = uint8_t(halves[h]);
                config.bytes[2 * h] = config.bytes[2 * h + 1] = TILE_BYTES, config.bytes[4 + h] = uint16_t(bytes);
            }
        config.rows[6] = config.rows[7] = uint8_t(bytes / 4);
        config.bytes[6] = config.bytes[7] = TILE_BYTES;
        configure(config);
    }

private:
    int rows_ = 0;
};

}  // namespace QUIRE_ISA
