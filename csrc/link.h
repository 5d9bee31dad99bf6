// What a chain of sums takes at once: a number, or, compiled for AVX512_BF16, a pair of bfloat16 numbers, which one instruction
// multiplies and adds. Knows no layout.
#pragma once

#include "vector.h"

namespace QUIRE_ISA {

#if defined(__AVX512BF16__)

struct Link {
    static constexpr int NUMBERS = 2;
    using Values = Words;  // of LANES chains; the first number is the lower half
    static INLINE Words factor(const float *x) { return bits<Words>(all_ints(load<int32_t>(x))); }
    // Denormal numbers count as zero.
    static INLINE Floats add(Floats sum, Words values, Words factor) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)values, (__m512bh)factor);
    }
};

// Of numbers that bfloat16 holds.
INLINE Words pair(Floats first, Floats second) { return bits<Words>(first) >> 16 | (bits<Words>(second) & 0xffff0000u); }

#else

struct Link {
    static constexpr int NUMBERS = 1;
    using Values = Floats;
    static INLINE Floats factor(const float *x) { return all(*x); }
    static INLINE Floats add(Floats sum, Floats values, Floats factor) { return fma(factor, values, sum); }
};

#endif

}  // namespace QUIRE_ISA
