// What a product with packed weights is given, and its rows on their way in and out. Knows no kernel and no layout but the
// width of a panel.
#pragma once

#include "functions.h"
#include "panels.h"
#include "pool.h"
#include "quire.h"

#include <algorithm>

namespace QUIRE_ISA {

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// ---- rows in and out -------------------------------------------------------------------------------------------------

INLINE float element(int type, const void *p, int64_t i) {
    if (type == QUIRE_F32) return static_cast<const float *>(p)[i];
    uint16_t half = static_cast<const uint16_t *>(p)[i];
    return type == QUIRE_BF16 ? from_bf16(half) : from_f16(half);
}

inline int64_t bytes_of(int type) { return type == QUIRE_F32 ? 4 : type == QUIRE_E4M3 || type == QUIRE_E5M2 ? 1 : 2; }

inline void row_to_floats(int type, const void *source, int64_t count, float *out) {
    int64_t i = 0;
    if (type == QUIRE_F32) {
        std::memcpy(out, source, size_t(count) * 4);
        return;
    }
    auto from = static_cast<const uint16_t *>(source);
    for (; i + LANES <= count; i += LANES) {
        Halves half = load<Halves>(from + i);
        store(out + i, type == QUIRE_BF16 ? floats_of_bf16(half) : floats_of_f16(half));
    }
    for (; i < count; i++) out[i] = type == QUIRE_BF16 ? from_bf16(from[i]) : from_f16(from[i]);
}

inline void floats_to_row(int type, const float *source, int64_t count, void *out) {
    int64_t i = 0;
    if (type == QUIRE_F32) {
        std::memcpy(out, source, size_t(count) * 4);
        return;
    }
    auto to = static_cast<uint16_t *>(out);
    for (; i + LANES <= count; i += LANES) {
        Floats value = load<Floats>(source + i);
        store(to + i, type == QUIRE_BF16 ? bf16_of_floats(value) : f16_of_floats(value));
    }
    for (; i < count; i++) to[i] = type == QUIRE_BF16 ? to_bf16(source[i]) : to_f16(source[i]);
}

// Words [rows][count], rows `stride` bytes apart, into [count][rows]. At most MOST_ROWS rows.
inline void interleave(const void *lines, int64_t stride, int rows, int64_t count, void *out) {
    auto from = static_cast<const uint8_t *>(lines);
    auto to = static_cast<uint8_t *>(out);
    int64_t i = 0;
#if defined(__AVX512BW__)
    static_assert(MOST_ROWS <= LANES);
    for (; i + LANES <= count; i += LANES) {
        Words words[LANES];  // the last row again where there are no more: not stored
        for (int r = 0; r < LANES; r++) words[r] = load<Words>(from + std::min(r, rows - 1) * stride + i * 4);
        transpose(words);
        const __mmask16 some = __mmask16((1u << rows) - 1);
        for (int j = 0; j < LANES; j++) _mm512_mask_storeu_epi32(to + (i + j) * rows * 4, some, (__m512i)words[j]);
    }
#endif
    for (; i < count; i++)
        for (int r = 0; r < rows; r++) std::memcpy(to + (i * rows + r) * 4, from + r * stride + i * 4, 4);
}

// ---- the call --------------------------------------------------------------------------------------------------------

// One call: rows of x, and the weights that they are multiplied by, all of one form, type, number of inputs and group size.
struct Product {
    int count;
    const quire_weight *const *weights;
    int type;
    int64_t rows;
    const uint8_t *x;
    int64_t x_stride;
    const void *const *biases;
    void *const *ys;
    const int64_t *y_strides;

    const void *row(int64_t r) const { return x + r * x_stride * bytes_of(type); }
    // Scales (dense), bias, and the row's own type: sums [32] of row r and panel p of weight w into its y.
    void finish(int w, int64_t r, int64_t p, float *sums) const {
        const quire_weight &weight = *weights[w];
        int64_t start = p * PANEL, count = std::min<int64_t>(PANEL, weight.outputs - start);
        if (weight.form == QUIRE_DENSE && weight.scales)
            for (int o = 0; o < count; o++) sums[o] *= weight.scales[start + o];
        if (biases[w])
            for (int o = 0; o < count; o++) sums[o] += element(type, biases[w], start + o);
        floats_to_row(type, sums, count, static_cast<uint8_t *>(ys[w]) + (r * y_strides[w] + start) * bytes_of(type));
    }
    // Runs body(weight, first panel, end, block) in parallel over all panels of all weights, and over `blocks` blocks of
    // rows; at most `most` tasks of consecutive panels for each weight and block, of whole groups of `together` panels.
    template <class Body> void over_panels(int64_t blocks, int64_t most, const Body &body, int64_t together = 1) const {
        const auto groups = [&](int w) { return (panels(w) + together - 1) / together; };
        int64_t tasks = 0;
        for (int w = 0; w < count; w++) tasks += std::min(groups(w), most);
        quire::parallel(tasks * blocks, [&](int64_t number) {
            int64_t task = number % tasks;
            int w = 0;
            for (; task >= std::min(groups(w), most); w++) task -= std::min(groups(w), most);
            const int64_t parts = std::min(groups(w), most), first = groups(w) * task / parts * together;
            body(w, first, std::min(panels(w), groups(w) * (task + 1) / parts * together), number / tasks);
        });
    }
    int64_t panels(int w) const { return up(weights[w]->outputs, PANEL) / PANEL; }
};

constexpr int64_t FEW_ROWS_TASKS = 64;  // long runs of panels for each thread, and enough runs to even out

// ---- integers --------------------------------------------------------------------------------------------------------

// x: `count` floats, zeros after them up to whole vectors.
inline void quantize_row(const float *x, int64_t count, int8_t *out, float *scale, int32_t *sum) {
    Floats most = {}, others = {};  // two chains
    int64_t at = 0;
    for (; at + 2 * LANES <= count; at += 2 * LANES) {
        most = larger(magnitude(load<Floats>(x + at)), most);
        others = larger(magnitude(load<Floats>(x + at + LANES)), others);
    }
    for (; at < count; at += LANES) most = larger(magnitude(load<Floats>(x + at)), most);
    most = larger(most, others);
    const float s = std::max(largest_lane(most) / 127, 1.17549435e-38f);
    const Floats divisor = all(s), inverse = all(1 / s);
    Ints total = {};
    const auto write = [&](const auto &divided) {
        for (int64_t i = 0; i < count; i += LANES) {
            const Ints q = nearest(divided(load<Floats>(x + i)));
            total += q;
            store(out + i, narrow_to<Bytes>(bits<Words>(q) & 0xffu));
        }
    };
    if (s > 0x1p-80f && s < 0x1p80f)  // no remainder is denormal
        write([&](Floats value) { return quotient(value, divisor, inverse); });
    else
        write([&](Floats value) { return value / divisor; });
    *sum = sum_of_lanes(total);
    *scale = s;
}

// What products of LANES outputs with a row are worth: (total - zeros * sum) * (scale * scales), sum and scale the row's. zeros
// are those of INT4; INT8's are 128.
template <bool INT4> class Worth {
public:
    INLINE Worth(const uint8_t *zeros, const float *scales) : scales_(load<Floats>(scales)) {
        if (INT4) zeros_ = widen(load<Bytes>(zeros));
#if defined(__AVX512VNNI__)
        zeros_ |= zeros_ << 24;  // zeros and 256 * zeros, as 16 bits each
#endif
    }
    INLINE Floats operator()(Ints total, int32_t sum, float scale) const {
        return to_float(less_zeros(total, sum)) * (all(scale) * scales_);
    }

private:
    Floats scales_;
    Words zeros_ = {};

    INLINE Ints less_zeros(Ints total, int32_t sum) const {
        if (!INT4) return total - all_ints(128 * sum);
#if defined(__AVX512VNNI__)
        // One instruction: sum = high * 256 + low. Zeros are below 128, and sums below 2^23, which are groups of 66,000 inputs.
        const uint32_t parts = (uint32_t(-(sum & 255)) & 0xffffu) | uint32_t(-(sum >> 8)) << 16;
        return (Ints)_mm512_dpwssd_epi32((__m512i)total, (__m512i)zeros_, (__m512i)all_ints(int32_t(parts)));
#else
        return total - bits<Ints>(zeros_) * sum;
#endif
    }
};

}  // namespace QUIRE_ISA
