// The one vector type of the kernels. LANES floats, 16 with AVX-512, 8 with AVX2, 4 otherwise; GCC's and Clang's vector
// extension does the arithmetic, intrinsics only what it has no word for. This file is compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace QUIRE_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

#define INLINE inline __attribute__((always_inline))

template <class V, class T> INLINE V load(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T> INLINE void store(T *p, V v) { std::memcpy(p, &v, sizeof v); }
template <class To, class From> INLINE To bits(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    std::memcpy(&out, &v, sizeof v);
    return out;
}
INLINE Floats all(float x) { return x - Floats{}; }
INLINE Ints all_ints(int32_t x) { return x - Ints{}; }

// a * b + c in one rounding where the machine can, never sometimes so and sometimes not: each instruction set has one way.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
// a / b, given 1 / b: the same bits as a division, in a fraction of its time, while nothing becomes denormal or infinite.
INLINE Floats quotient(Floats a, Floats b, Floats inverse) {
#if defined(__AVX2__) || defined(__aarch64__)
    const Floats near = a * inverse;
    return fma(fma(-near, b, a), inverse, near);  // what is left of a, exactly, gives the last bit
#else
    return a / b;
#endif
}
INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);  // what the words below say, NaN too
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
// Over all lanes; neither depends on the order. No NaN.
INLINE float largest_lane(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(__aarch64__)
    return vmaxvq_f32((float32x4_t)v);
#else
    float out = v[0];
    for (int lane = 1; lane < LANES; lane++) out = v[lane] > out ? v[lane] : out;
    return out;
#endif
}
INLINE int32_t sum_of_lanes(Ints v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#elif defined(__aarch64__)
    return vaddvq_s32((int32x4_t)v);
#else
    int32_t out = 0;
    for (int lane = 0; lane < LANES; lane++) out += v[lane];
    return out;
#endif
}

INLINE float from_bf16(uint16_t x) { return bits<float>(uint32_t(x) << 16); }
INLINE uint16_t to_bf16(float x) {
    uint32_t u = bits<uint32_t>(x);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 64);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE float from_f16(uint16_t x) {
    uint32_t magnitude = x & 0x7fff, sign = uint32_t(x & 0x8000) << 16;
    float out;
    if (magnitude >= 0x7c00)
        out = bits<float>(0x7f800000u | uint32_t(magnitude & 0x3ff) << 13);
    else if (magnitude < 0x400)
        out = float(magnitude) * 0x1p-24f;
    else
        out = bits<float>((magnitude << 13) + (112u << 23));
    return bits<float>(bits<uint32_t>(out) | sign);
}
INLINE uint16_t to_f16(float x) {
    uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
    if (u < 0x38800000)                                   // subnormal: the hardware's own rounding at 2^-24
        return uint16_t(sign | (bits<uint32_t>(bits<float>(u) + 0.5f) - 0x3f000000));
    return uint16_t(sign | ((u + 0xfff + (u >> 13 & 1) - (112u << 23)) >> 13));
}
// E4M3 ("fn": no infinity; 0x7f is NaN), E5M2 is a half float's upper byte.
INLINE float from_e4m3(uint8_t x) {
    uint32_t magnitude = x & 0x7f;
    if (magnitude == 0x7f) return NAN;
    float out = magnitude < 8 ? float(magnitude) * 0x1p-9f : bits<float>((magnitude << 20) + (120u << 23));
    return x & 0x80 ? -out : out;
}

INLINE Words widen(Halves v) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#elif defined(__aarch64__)
    return (Words)vmovl_u16((uint16x4_t)v);
#else
    return __builtin_convertvector(v, Words);
#endif
}
INLINE Words widen(Bytes v) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits<int64_t>(v)));
#elif defined(__aarch64__)
    return (Words)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bits<uint32_t>(v)))));
#else
    return __builtin_convertvector(v, Words);
#endif
}
// The lower half, or the lowest byte, of each word; what is above it must be 0. GCC 12 takes some of these apart by itself.
template <class V> INLINE V narrow_to(Words v) {
    [[maybe_unused]] constexpr bool HALVES = sizeof(V) == sizeof(Halves);
#if defined(__AVX512F__)
    if constexpr (HALVES) return (V)_mm512_cvtepi32_epi16((__m512i)v);
    if constexpr (!HALVES) return (V)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x88);
    if constexpr (HALVES) return (V)_mm256_castsi256_si128(halves);
    __m256i bytes = _mm256_packus_epi16(halves, halves);
    if constexpr (!HALVES) return bits<V>(_mm256_extract_epi64(bytes, 0));
#elif defined(__aarch64__)
    const uint16x4_t halves = vmovn_u32((uint32x4_t)v);
    if constexpr (HALVES) return (V)halves;
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
    if constexpr (!HALVES) return bits<V>(vget_lane_u32(vreinterpret_u32_u8(bytes), 0));
#endif
    return __builtin_convertvector(v, V);
}
INLINE Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }
// The nearest integer, halves to even, for |v| < 2^22.
INLINE Ints nearest(Floats v) {
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: the sum's last bit is worth one
    return bits<Ints>(v + magic) - bits<Ints>(magic);
}
INLINE Floats magnitude(Floats v) { return bits<Floats>(bits<Words>(v) & 0x7fffffffu); }
INLINE Floats floats_of_bf16(Halves v) { return bits<Floats>(widen(v) << 16); }
INLINE Halves bf16_of_floats(Floats v) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);  // what is below the smallest normal number becomes 0
#else
    Words u = bits<Words>(v);
    Words rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    Words nan = (u >> 16) | 64;
    return narrow_to<Halves>((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
#endif
}
INLINE Floats floats_of_f16(Halves v) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)v);
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps((__m128i)v);
#elif defined(__aarch64__)
    return (Floats)vcvt_f32_f16((float16x4_t)v);
#else
    Floats out;
    for (int i = 0; i < LANES; i++) out[i] = from_f16(v[i]);
    return out;
#endif
}
INLINE Halves f16_of_floats(Floats v) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return (Halves)vcvt_f16_f32((float32x4_t)v);
#else
    Halves out;
    for (int i = 0; i < LANES; i++) out[i] = to_f16(v[i]);
    return out;
#endif
}
// The lowest byte of each word.
INLINE Floats floats_of_e4m3(Words u) {
    Words magnitude = u & 0x7f;
    Floats normal = bits<Floats>((magnitude << 20) + (120u << 23));
    Floats small = to_float(bits<Ints>(magnitude)) * 0x1p-9f;
    Words out = bits<Words>(magnitude < 8 ? small : normal);
    out = magnitude == 0x7f ? Words{} + 0x7fc00000 : out;
    return bits<Floats>(out | (u & 0x80) << 24);
}
INLINE Floats floats_of_e4m3(Bytes v) { return floats_of_e4m3(widen(v)); }
INLINE Floats floats_of_e5m2(Bytes v) { return floats_of_f16(narrow_to<Halves>(widen(v) << 8)); }

// To eight bits with 23 - DROPPED bits of mantissa and exponents from BIAS up: the nearest, ties to even; what is larger
// than LARGEST becomes it. Below the normal range the hardware's own rounding does it, at the unit that SUBNORMAL's last bit is.
template <int DROPPED, int BIAS> INLINE Bytes eight_bits(Floats v, float largest, float smallest, float subnormal) {
    Words u = bits<Words>(v), sign = u >> 24 & 0x80;
    Floats size = bits<Floats>(u & 0x7fffffffu);
    Floats held = size > largest ? all(largest) : size;
    Words h = bits<Words>(held);
    Words normal = ((h + ((1u << (DROPPED - 1)) - 1) + (h >> DROPPED & 1)) >> DROPPED) - (uint32_t(BIAS) << (23 - DROPPED));
    Words tiny = bits<Words>(held + subnormal) - bits<uint32_t>(subnormal);
    Words out = held < smallest ? tiny : normal;
    out = v == v ? out : Words{} + 0x7f;
    return narrow_to<Bytes>(out | sign);
}
INLINE Bytes e4m3_of_floats(Floats v) { return eight_bits<20, 120>(v, 448.0f, 0x1p-6f, 0x1p14f); }
INLINE Bytes e5m2_of_floats(Floats v) { return eight_bits<21, 112>(v, 57344.0f, 0x1p-14f, 0x1p7f); }

// acc[lane] += sum of four products: unsigned bytes of w times signed bytes of x. Exact, so every way gives the same.
INLINE Ints dot4(Ints acc, Words w, Ints x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (Ints)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, (int8x16_t)x);
#elif defined(__ARM_FEATURE_DOTPROD)
    // w - 128 is signed, and 128 times the sum of x comes back by taking off its product with -128.
    const int32x4_t back = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), (int8x16_t)x);
    return (Ints)vdotq_s32((int32x4_t)acc, (int8x16_t)(w ^ 0x80808080u), (int8x16_t)x) - (Ints)back;
#elif defined(__aarch64__)
    // A product, 255 * -128 at the most, fits into 16 bits; the sum of two does not.
    const int16x8_t w_even = (int16x8_t)(w & 0x00ff00ffu), w_odd = (int16x8_t)vshrq_n_u16((uint16x8_t)w, 8);
    const int16x8_t x_even = vshrq_n_s16(vshlq_n_s16((int16x8_t)x, 8), 8), x_odd = vshrq_n_s16((int16x8_t)x, 8);
    const int32x4_t sums = vpadalq_s16((int32x4_t)acc, vmulq_s16(w_even, x_even));
    return (Ints)vpadalq_s16(sums, vmulq_s16(w_odd, x_odd));
#else
    for (int i = 0; i < 4; i++) acc += bits<Ints>(w >> (8 * i) & 0xff) * ((x << (24 - 8 * i)) >> 24);
    return acc;
#endif
}


}  // namespace QUIRE_ISA
