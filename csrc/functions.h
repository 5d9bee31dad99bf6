// Elementary functions on vectors, and vectors of each element type in memory.
//
// A tail goes through the same vector code as the body, filled up with zeros: what becomes of an element never depends on
// its place in the tensor. Coefficients are least-maximum-error fits; the stated errors bound what one in three of
// all float32 numbers shows (in units in the last place, against float64).
#pragma once

#include "quire.h"
#include "vector.h"

#include <algorithm>

namespace QUIRE_ISA {

// ---- exp, tanh, erf ------------------------------------------------------------------------------------------------

// Error below 1.1 ulp. Below -87.3 (the smallest normal result) exactly 0; exp(0) is exactly 1.
INLINE Floats exp(Floats x) {
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    Floats shifted = fma(x, all(1.44269504f), shift), n = shifted - shift;
    Floats r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Floats p = fma(all(0.0013814465f), r, all(0.008368781f));
    p = fma(p, r, all(0.041668393f));
    p = fma(p, r, all(0.1666652f));
    p = fma(p, r, all(0.49999994f));
    p = fma(p, r * r, r) + 1.0f;
    Floats out = bits<Floats>(bits<Words>(p) + (bits<Words>(shifted) << 23));
    out = x < -87.3f ? Floats{} : out;
    return x <= 88.7228317f ? out : x + INFINITY;  // NaN stays NaN
}

// 2^x of x <= 0, right to 1e-4; what bfloat16 has no normal number for becomes denormal or 0. NaN stays NaN.
INLINE Floats power(Floats x) {
    const Floats shift = all(12582912.0f);  // as in exp()
    x = larger(all(-127.0f), x);
    const Floats shifted = x + shift, r = x - (shifted - shift);
    Floats p = fma(all(0.0550091f), r, all(0.242210984f));
    p = fma(fma(p, r, all(0.6932829f)), r, all(1.0f));
    return bits<Floats>(bits<Words>(p) + (bits<Words>(shifted) << 23));
}

// Error below 1.5 ulp.
INLINE Floats tanh(Floats x) {
    Floats size = bits<Floats>(bits<Words>(x) & 0x7fffffffu), z = x * x;
    Floats p = fma(all(-0.0057049785f), z, all(0.020639079f));
    p = fma(p, z, all(-0.05373971f));
    p = fma(p, z, all(0.13331442f));
    p = fma(p, z, all(-0.3333328f));
    Floats small = fma(p * z, x, x);
    Floats large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    large = bits<Floats>(bits<Words>(large) | (bits<Words>(x) & 0x80000000u));
    return size < 0.625f ? small : large;
}

// Error below 1.5 ulp. Past 0.92 it is 1 - exp(a polynomial for log(1 - erf)).
INLINE Floats erf(Floats x) {
    Floats size = bits<Floats>(bits<Words>(x) & 0x7fffffffu), z = x * x;
    Floats p = fma(all(-0.0005953739f), z, all(0.00498594f));
    p = fma(p, z, all(-0.02676172f));
    p = fma(p, z, all(0.112816826f));
    p = fma(p, z, all(-0.3761248f));
    p = fma(p, z, all(0.12837915f));
    Floats small = fma(p, x, x);
    Floats t = size > 3.93f ? all(3.93f) : size;  // from here on erf rounds to 1
    Floats q = fma(all(0.00019593822f), t, all(-0.0030432264f));
    q = fma(q, t, all(0.022226954f));
    q = fma(q, t, all(-0.10393166f));
    q = fma(q, t, all(-0.6371822f));
    q = fma(q, t, all(-1.1276757f));
    q = fma(q, t, all(-0.00019566691f));
    Floats large = 1.0f - exp(q);
    large = bits<Floats>(bits<Words>(large) | (bits<Words>(x) & 0x80000000u));
    Floats out = size < 0.92f ? small : large;
    return x == x ? out : x;
}

// ---- sums in one order on every instruction set ----------------------------------------------------------------------

// Sixteen chains, one per place modulo 16, whatever LANES is.
struct Sixteen {
    static constexpr int COUNT = 16 / LANES;
    Floats part[COUNT];
};

// Sixteen places become one: i with i + 8, then i + 4, i + 2, i + 1.
template <class Op> INLINE float fold(const Sixteen &s, const Op &op) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m512 whole = (__m512)s.part[0];
    const __m256 low = _mm512_castps512_ps256(whole), high = _mm512_extractf32x8_ps(whole, 1);
#else
    const __m256 low = (__m256)s.part[0], high = (__m256)s.part[1];
#endif
    const __m256 eight = op(low, high);
    const __m128 four = op(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = op(four, _mm_movehl_ps(four, four));
    return op(two, _mm_movehdup_ps(two))[0];
#else
    alignas(64) float place[16];
    for (int i = 0; i < Sixteen::COUNT; i++) store(place + i * LANES, s.part[i]);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) place[i] = op(place[i], place[i + width]);
    return place[0];
#endif
}
INLINE float sum(const Sixteen &s) {
    return fold(s, [](auto a, auto b) { return a + b; });
}
INLINE float largest(const Sixteen &s) {
    return fold(s, [](auto a, auto b) { return a > b ? a : b; });
}

// ---- vectors in memory -----------------------------------------------------------------------------------------------

// The first `bytes` bytes of a vector; what is read beyond them is zero.
template <class V> INLINE V load_some(const void *p, int64_t bytes) {
#if defined(__AVX512BW__)
    if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_loadu_epi8((1ull << bytes) - 1, p);
    if constexpr (sizeof(V) == 32) return (V)_mm256_maskz_loadu_epi8((1u << bytes) - 1, p);
    if constexpr (sizeof(V) == 16) return (V)_mm_maskz_loadu_epi8(__mmask16((1u << bytes) - 1), p);
#endif
    V v{};
    std::memcpy(&v, p, size_t(bytes));
    return v;
}
template <class V> INLINE void store_some(void *p, int64_t bytes, V v) {
#if defined(__AVX512BW__)
    if constexpr (sizeof(V) == 64) return _mm512_mask_storeu_epi8(p, (1ull << bytes) - 1, (__m512i)v);
    if constexpr (sizeof(V) == 32) return _mm256_mask_storeu_epi8(p, (1u << bytes) - 1, (__m256i)v);
    if constexpr (sizeof(V) == 16) return _mm_mask_storeu_epi8(p, __mmask16((1u << bytes) - 1), (__m128i)v);
#endif
    std::memcpy(p, &v, size_t(bytes));
}

// LANES x LANES words, in place.
INLINE void transpose(Words *rows) {
#if defined(__AVX512F__)
    __m512i t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            u[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
            u[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
        }
    for (int c = 0; c < 4; c++) {
        __m512i even[2], odd[2];
        for (int h = 0; h < 2; h++) {
            even[h] = _mm512_shuffle_i32x4(u[8 * h + c], u[8 * h + 4 + c], 0x88);
            odd[h] = _mm512_shuffle_i32x4(u[8 * h + c], u[8 * h + 4 + c], 0xdd);
        }
        rows[c] = (Words)_mm512_shuffle_i32x4(even[0], even[1], 0x88);
        rows[c + 4] = (Words)_mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        rows[c + 8] = (Words)_mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        rows[c + 12] = (Words)_mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
#elif defined(__AVX2__)
    __m256i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; h++) {
            u[i + 2 * h] = _mm256_unpacklo_epi64(t[i + h], t[i + 2 + h]);
            u[i + 2 * h + 1] = _mm256_unpackhi_epi64(t[i + h], t[i + 2 + h]);
        }
    for (int c = 0; c < 4; c++) {
        rows[c] = (Words)_mm256_permute2x128_si256(u[c], u[4 + c], 0x20);
        rows[c + 4] = (Words)_mm256_permute2x128_si256(u[c], u[4 + c], 0x31);
    }
#elif defined(__aarch64__)
    uint64x2_t t[4];  // words of rows 0 and 1 (2 and 3) side by side: the even ones, the odd ones
    for (int i = 0; i < 4; i += 2) {
        t[i] = (uint64x2_t)vtrn1q_u32((uint32x4_t)rows[i], (uint32x4_t)rows[i + 1]);
        t[i + 1] = (uint64x2_t)vtrn2q_u32((uint32x4_t)rows[i], (uint32x4_t)rows[i + 1]);
    }
    for (int c = 0; c < 2; c++) {
        rows[c] = (Words)vtrn1q_u64(t[c], t[c + 2]);
        rows[c + 2] = (Words)vtrn2q_u64(t[c], t[c + 2]);
    }
#else
    Words out[LANES];
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) out[j][i] = rows[i][j];
    for (int i = 0; i < LANES; i++) rows[i] = out[i];
#endif
}

// One element type: how a vector of it is read and written, and how element j of 32-bit words becomes floats.
template <int type> struct Element;

template <> struct Element<QUIRE_F32> {
    static constexpr int BYTES = 4;
    using Stored = Floats;
    static INLINE Floats widen(Stored v) { return v; }
    static INLINE Stored narrow(Floats v) { return v; }
    static INLINE Floats of_words(Words w, int) { return bits<Floats>(w); }
};
template <> struct Element<QUIRE_BF16> {
    static constexpr int BYTES = 2;
    using Stored = Halves;
    static INLINE Floats widen(Stored v) { return floats_of_bf16(v); }
    static INLINE Stored narrow(Floats v) { return bf16_of_floats(v); }
    static INLINE Floats of_words(Words w, int j) { return bits<Floats>(j ? w & 0xffff0000u : w << 16); }
};
template <> struct Element<QUIRE_F16> {
    static constexpr int BYTES = 2;
    using Stored = Halves;
    static INLINE Floats widen(Stored v) { return floats_of_f16(v); }
    static INLINE Stored narrow(Floats v) { return f16_of_floats(v); }
    static INLINE Floats of_words(Words w, int j) {
        return floats_of_f16(narrow_to<Halves>(j ? w >> 16 : w & 0xffffu));
    }
};
// Narrowing to eight bits: the nearest, ties to even; what is too large becomes the largest finite value.
template <> struct Element<QUIRE_E4M3> {
    static constexpr int BYTES = 1;
    using Stored = Bytes;
    static INLINE Floats widen(Stored v) { return floats_of_e4m3(v); }
    static INLINE Stored narrow(Floats v) { return e4m3_of_floats(v); }
    static INLINE Floats of_words(Words w, int j) { return floats_of_e4m3(w >> (8 * j) & 0xffu); }
};
template <> struct Element<QUIRE_E5M2> {
    static constexpr int BYTES = 1;
    using Stored = Bytes;
    static INLINE Floats widen(Stored v) { return floats_of_e5m2(v); }
    static INLINE Stored narrow(Floats v) { return e5m2_of_floats(v); }
    static INLINE Floats of_words(Words w, int j) {
        return floats_of_f16(narrow_to<Halves>((w >> (8 * j) & 0xffu) << 8));
    }
};
template <> struct Element<QUIRE_I8> {
    static constexpr int BYTES = 1;
    using Stored = Bytes;
    static INLINE Floats widen(Stored v) { return of_words(QUIRE_ISA::widen(v), 0); }
    static INLINE Stored narrow(Floats v) {
        v = v > 127.0f ? all(127.0f) : v;
        v = v < -127.0f ? all(-127.0f) : v;
        return narrow_to<Bytes>(bits<Words>(v + 12582912.0f) & 0xffu);
    }
    static INLINE Floats of_words(Words w, int j) {
        return to_float(bits<Ints>(w << (24 - 8 * j)) >> 24);
    }
};

// Elements [i, i + LANES) of a row of `count`; past its end zeros are read and nothing is written.
template <int type> INLINE Floats read(const uint8_t *row, int64_t i, int64_t count) {
    using E = Element<type>;
    if (i + LANES <= count) return E::widen(load<typename E::Stored>(row + i * E::BYTES));
    return E::widen(load_some<typename E::Stored>(row + i * E::BYTES, (count - i) * E::BYTES));
}
template <int type> INLINE void write(uint8_t *row, int64_t i, int64_t count, Floats v) {
    using E = Element<type>;
    typename E::Stored stored = E::narrow(v);
    if (i + LANES <= count) return store(row + i * E::BYTES, stored);
    store_some(row + i * E::BYTES, (count - i) * E::BYTES, stored);
}

inline int bytes_of_type(int type) { return type == QUIRE_F32 ? 4 : type == QUIRE_BF16 || type == QUIRE_F16 ? 2 : 1; }

template <int type> struct Type { static constexpr int value = type; };

// Calls body(Type<type>) for the types that models compute in; -1 for others.
template <class Body> int with_type(int type, const Body &body) {
    switch (type) {
    case QUIRE_F32: return body(Type<QUIRE_F32>()), 0;
    case QUIRE_BF16: return body(Type<QUIRE_BF16>()), 0;
    case QUIRE_F16: return body(Type<QUIRE_F16>()), 0;
    }
    return -1;
}

// The same for the types that a cache may have.
template <class Body> int with_cache_type(int type, const Body &body) {
    switch (type) {
    case QUIRE_E4M3: return body(Type<QUIRE_E4M3>()), 0;
    case QUIRE_E5M2: return body(Type<QUIRE_E5M2>()), 0;
    case QUIRE_I8: return body(Type<QUIRE_I8>()), 0;
    }
    return with_type(type, body);
}

}  // namespace QUIRE_ISA
