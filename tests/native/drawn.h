// What digests.cpp feeds the kernels with and how it sums up what they answer: numbers that are the same on every machine,
// made of integers alone, and a checksum in which every NaN is one number (its sign and payload are the processor's own).
#pragma once

#include "quire.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct Format {
    const char *name;
    int bytes, exponent, mantissa;  // bits
};
constexpr Format FORMATS[] = {{"f32", 4, 8, 23}, {"bf16", 2, 8, 7}, {"f16", 2, 5, 10},
                              {"e4m3", 1, 4, 3}, {"e5m2", 1, 5, 2}, {"i8", 1, 0, 7}};
constexpr int COMPUTED[] = {QUIRE_F32, QUIRE_BF16, QUIRE_F16};
constexpr int CACHED[] = {QUIRE_F32, QUIRE_BF16, QUIRE_F16, QUIRE_E4M3, QUIRE_E5M2, QUIRE_I8};

inline uint32_t draw() {  // PCG: O'Neill 2014
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t mixed = uint32_t((state >> 18 ^ state) >> 27), turn = uint32_t(state >> 59);
    return mixed >> turn | mixed << (-turn & 31);
}
inline uint32_t draw(uint32_t below) { return draw() % below; }

// A tensor of one type, between marks that are summed up with it.
struct Tensor {
    static constexpr int64_t MARGIN = 64;
    int type;
    int64_t count;
    std::vector<uint8_t> memory;

    Tensor(int type, int64_t count) : type(type), count(count), memory(size_t(count * each() + 2 * MARGIN), 0x5a) {}
    int each() const { return FORMATS[type].bytes; }
    uint8_t *data() { return memory.data() + MARGIN; }
    void *at(int64_t i) { return data() + i * each(); }
    void set(int64_t i, uint32_t word) { std::memcpy(at(i), &word, size_t(each())); }
};

// Numbers between 2^-5 and 4 of both signs, and now and then one below the normal range, or zero.
inline uint32_t tame(int type) {
    const Format &format = FORMATS[type];
    if (type == QUIRE_I8) return draw(256);
    const uint32_t bias = (1u << (format.exponent - 1)) - 1, exponent = draw(64) ? bias - 5 + draw(7) : 0;
    return (draw(2) << format.exponent | exponent) << format.mantissa | (draw() & ((1u << format.mantissa) - 1));
}
inline Tensor numbers(int type, int64_t count) {
    Tensor out(type, count);
    for (int64_t i = 0; i < count; i++) out.set(i, tame(type));
    return out;
}
// Any bits, infinities and NaN among them.
inline Tensor anything(int type, int64_t count) {
    Tensor out(type, count);
    for (int64_t i = 0; i < count; i++) out.set(i, draw());
    return out;
}
inline std::vector<float> floats(int64_t count, bool positive = false) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float &value : out) {
        const uint32_t word = tame(QUIRE_F32) & (positive ? 0x7fffffffu : ~0u);
        std::memcpy(&value, &word, 4);
        if (positive) value += 0.125f;
    }
    return out;
}

// FNV-1a, 64 bits, a number at a time.
class Sum {
public:
    Sum &add(const Tensor &tensor) {
        const Format &format = FORMATS[tensor.type];
        const uint32_t infinity = ((1u << format.exponent) - 1) << format.mantissa;
        for (size_t i = 0; i < tensor.memory.size(); i += size_t(format.bytes)) {
            uint32_t word = 0;
            std::memcpy(&word, tensor.memory.data() + i, size_t(format.bytes));
            const uint32_t magnitude = word & (infinity | ((1u << format.mantissa) - 1));
            const bool nan = tensor.type == QUIRE_E4M3 ? magnitude == 0x7f : tensor.type != QUIRE_I8 && magnitude > infinity;
            value_ = (value_ ^ (nan ? 0x7fffffffu : word)) * 1099511628211u;
        }
        return *this;
    }
    // A line of what was called and what came out.
    template <class... Words> void report(const char *words, Words... values) const {
        std::printf(words, values...);
        std::printf(": %016llx\n", static_cast<unsigned long long>(value_));
    }

private:
    uint64_t value_ = 14695981039346656037u;
};

inline void must(int result, const char *what) {
    if (!result) return;
    std::printf("refused: %s\n", what);
    std::exit(1);
}
#define MUST(call) must(call, #call)
