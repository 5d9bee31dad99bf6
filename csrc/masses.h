// What tokens weigh: 2 to the power of (logit - largest logit) * scale, and sums of that.
//
// A weight is made of additions and multiplications that round one by one, without fused ones, and sums are sums of integers:
// so every instruction set, every order, every cutting into blocks and the reference in plain torch
// (quire/ops/reference/masses.py) give the same bits. A weight of 1 counts as 2^40, what is below 2^-41 as nothing: the tokens
// that are lost by that hold less than a ten-millionth of the mass of 150,000. Vocabularies may have up to 2^22 tokens.
#pragma once

#include "lines.h"

namespace QUIRE_ISA {
namespace {

constexpr int64_t BLOCK = 128;  // tokens whose sum is kept
constexpr int64_t MOST_TOKENS = int64_t(1) << 22;
constexpr float LOG2_E = 1.44269504f;
constexpr double ONE = 0x1p40;

// Half as many lanes: what fills a register. Unsigned, since sums of numbers with an EXCESS wrap around.
typedef double Doubles __attribute__((vector_size(LANES * 4)));
typedef uint64_t Longs __attribute__((vector_size(LANES * 4)));

// Relative error of the power itself below 2e-7; 1 for x = peak exactly. x may be -inf, and is no larger than peak.
INLINE Floats weight_of(Floats x, Floats peak, Floats scale) {
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    const Floats y = (x - peak) * scale, shifted = y + shift, f = y - (shifted - shift);
    Floats p = f * all(0.00132647273f) + all(0.00967151299f);
    p = p * f + all(0.0555073358f);
    p = p * f + all(0.240222424f);
    p = p * f + all(0.693147004f);
    p = p * f + all(1.0f);
    const Floats out = bits<Floats>(bits<Words>(p) + (bits<Words>(shifted) << 23));
    return y < all(-126.0f) ? Floats{} : out;
}

// The nearest integers to 2^40 * w, halves to even, each too large by EXCESS: of the first half of the lanes and of the second.
constexpr int64_t EXCESS = 0x40b8000000000000;  // the bits of 1.5 * 2^12, whose last bit is worth 2^-40
struct Masses {
    Longs low, high;
};
INLINE Masses mass_of(Floats w) {
#if defined(__AVX512F__)
    const Doubles low = (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)w));
    const Doubles high = (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)w, 1));
#elif defined(__AVX2__)
    const Doubles low = (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)w));
    const Doubles high = (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)w, 1));
#else
    Doubles low, high;
    for (int lane = 0; lane < LANES / 2; lane++) low[lane] = w[lane], high[lane] = w[LANES / 2 + lane];
#endif
    return {bits<Longs>(low + 6144.0), bits<Longs>(high + 6144.0)};
}

// One bit for each lane whose word is negative (true, in what a comparison gives).
INLINE uint32_t lanes_of(Ints v) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps((__m256)v));
#else
    uint32_t out = 0;
    for (int lane = 0; lane < LANES; lane++) out |= uint32_t(v[lane] < 0) << lane;
    return out;
#endif
}

INLINE uint64_t sum_of_longs(Longs v) {
    uint64_t out = 0;
    for (int lane = 0; lane < LANES / 2; lane++) out += uint64_t(v[lane]);
    return out;
}

// Elements [i, i + LANES) of a row of `count`; what is past its end is -inf.
template <int type> INLINE Floats logits_at(const uint8_t *row, int64_t i, int64_t count) {
    if (i + LANES <= count) return Element<type>::widen(load<typename Element<type>::Stored>(row + i * Element<type>::BYTES));
    Floats v = read<type>(row, i, count);
    for (int lane = int(count - i); lane < LANES; lane++) v[lane] = -INFINITY;
    return v;
}

// The largest of a row and the first place that has it. NaN, if there is one anywhere, is the largest.
struct Largest {
    float value;
    int64_t id;
    bool sound() const { return value - value == 0.0f; }
};

// blocks: one float for each block, its largest, or NULL.
template <int type> Largest largest_of(const uint8_t *row, int64_t count, float *blocks) {
    Largest out = {-INFINITY, 0};
    Ints nan{};
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t end = std::min(count, start + BLOCK);
        // Four chains, so that none waits for the one before it.
        Floats most[4];
        for (Floats &part : most) part = all(-INFINITY);
        auto look = [&](Floats x, int part) {
            most[part] = larger(most[part], x);
            nan |= (Ints)(x != x);
        };
        if (end - start == BLOCK)
            for (int64_t i = start; i < end; i += 4 * LANES)
                for (int part = 0; part < 4; part++) look(read<type>(row, i + part * LANES, end), part);
        else
            for (int64_t i = start; i < end; i += LANES) look(logits_at<type>(row, i, count), 0);
        const float here = largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3])));
        if (blocks) blocks[start / BLOCK] = here;
        if (here > out.value) out = {here, start};
    }
    if (lanes_of(nan)) return {NAN, 0};
    for (int64_t i = out.id;; i += LANES)
        if (const uint32_t lanes = lanes_of(logits_at<type>(row, i, count) == out.value))
            return {out.value, i + __builtin_ctz(lanes)};
}

// The mass of a row; of those tokens alone that weigh at least `least`. blocks: one number for each block, its mass, or NULL.
template <int type>
int64_t mass_of_row(const uint8_t *row, int64_t count, float peak, float scale, float least, int64_t *blocks) {
    int64_t total = 0;
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t end = std::min(count, start + BLOCK);
        Longs low{}, high{};
        int64_t vectors = 0;
        for (int64_t i = start; i < end; i += LANES, vectors++) {
            const Floats w = weight_of(logits_at<type>(row, i, count), all(peak), all(scale));
            const Masses masses = mass_of(w >= all(least) ? w : Floats{});
            low += masses.low, high += masses.high;
        }
        const int64_t mass = int64_t(sum_of_longs(low + high) - uint64_t(vectors * LANES) * uint64_t(EXCESS));
        if (blocks) blocks[start / BLOCK] = mass;
        total += mass;
    }
    return total;
}

}  // namespace
}  // namespace QUIRE_ISA
