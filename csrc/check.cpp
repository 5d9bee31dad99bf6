#include "check.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quire {

const char *amx_refused() {
#if defined(__linux__) && defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return "";
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
    if ((d & wanted) != wanted || !(c & 1u << 1)) return "";                        // and AVX512_VBMI
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return "";  // and AVX512_BF16
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27)) return "the system does not save AMX's registers";
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned tiles = 3u << 17;
    if ((low & tiles) != tiles) return "the system does not save AMX's registers";
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA))
        return errno == ENOSPC ? "a thread of this process has too small a stack for signals"
                               : "the system does not grant the registers to this process";
    return nullptr;
#else
    return "";
#endif
}

namespace {

struct Aligned {
    explicit Aligned(int64_t bytes) : memory(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64), std::free) {
        if (!memory) std::abort();
    }
    std::unique_ptr<void, void (*)(void *)> memory;
    void *get() const { return memory.get(); }
};

struct Draw {
    uint32_t state = 1;
    uint32_t operator()(uint32_t below) {
        state = state * 1664525u + 1013904223u;
        return (state >> 8) % below;
    }
};

uint16_t small_bf16(Draw &draw) {  // whole numbers, -8 to 8
    const float value = float(int(draw(17)) - 8);
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return uint16_t(word >> 16);
}

// [outputs, inputs] of a form, products with which agree or do not.
bool agree(const Kernels &one, const Kernels &other, int form, int type, int64_t inputs, int64_t group) {
    constexpr int64_t OUTPUTS = 40, PADDED = 64, MOST_ROWS = 150, STRIDE = OUTPUTS + 3;
    Draw draw;
    const int64_t row_bytes = form == QUIRE_INT4 ? inputs / 2 : form == QUIRE_DENSE && type == QUIRE_BF16 ? inputs * 2 : inputs;
    std::vector<uint8_t> source(size_t(OUTPUTS * row_bytes));
    for (size_t i = 0; i < source.size(); i++) {
        // Of FP8 the sizes 0.5 to 8, whose sums are exact.
        source[i] = form == QUIRE_DENSE ? uint8_t(draw(2) << 7 | (0x30 + draw(33))) : uint8_t(draw(256));
        if (form == QUIRE_DENSE && type == QUIRE_BF16 && i % 2 == 0) {
            const uint16_t value = small_bf16(draw);
            std::memcpy(source.data() + i, &value, 2), i++;
        }
    }
    const int64_t groups = form == QUIRE_INT4 ? inputs / group : 1;
    std::vector<float> scales(size_t(groups * PADDED));
    std::vector<uint8_t> zeros(scales.size());
    for (auto &scale : scales) scale = float(1 + draw(1000)) / 1024;
    for (auto &zero : zeros) zero = uint8_t(draw(16));

    const Aligned data(quire_packed_bytes(form, type, OUTPUTS, inputs));
    const bool scaled = form != QUIRE_DENSE;
    const quire_weight weight = {form, type, OUTPUTS, inputs, group, data.get(), scaled ? scales.data() : nullptr,
                                 form == QUIRE_INT4 ? zeros.data() : nullptr};
    const int64_t stride = form == QUIRE_DENSE ? inputs : row_bytes;
    if (one.pack(&weight, source.data(), stride)) return false;

    std::vector<uint16_t> x(size_t(MOST_ROWS * inputs)), bias(OUTPUTS), results[2];
    for (auto &value : x) value = small_bf16(draw);
    for (auto &value : bias) value = small_bf16(draw);
    const quire_weight *const weights = &weight;
    const void *const biases = bias.data();
    for (int64_t rows : {int64_t(1), int64_t(16), int64_t(17), int64_t(35), MOST_ROWS}) {
        for (int i = 0; i < 2; i++) {
            results[i].assign(size_t(rows * STRIDE), 0x1234);
            void *const y = results[i].data();
            if ((i ? other : one).linears(1, &weights, QUIRE_BF16, rows, x.data(), inputs, &biases, &y, &STRIDE)) return false;
        }
        if (results[0] != results[1]) return false;
    }
    return true;
}

}  // namespace

bool same_products(const Kernels &one, const Kernels &other) {
    return agree(one, other, QUIRE_DENSE, QUIRE_BF16, 1101, 0) && agree(one, other, QUIRE_DENSE, QUIRE_E4M3, 601, 0) &&
           agree(one, other, QUIRE_INT8, QUIRE_I8, 1101, 0) && agree(one, other, QUIRE_INT4, QUIRE_I8, 1152, 128) &&
           agree(one, other, QUIRE_INT4, QUIRE_I8, 96, 32);
}

}  // namespace quire
