// Do AMX's instructions give the bits that their emulation gives, and the same for every number of rows and threads? To be run
// on a machine, or in an emulator of one, that has them; it needs neither Python nor torch. Link it with the objects that
// setup.py leaves behind:
//
//   c++ -std=c++17 -O2 -Icsrc -static -pthread tests/native/same_bits.cpp build/temp*/*.o -o same_bits && ./same_bits
//
// It ends with 0 if all is the same, 2 where there is no AMX.
#include "quire.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

std::mt19937 generator(1);

uint16_t bf16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return uint16_t(word >> 16);
}

struct Case {
    const char *name;
    int form, type;
    int64_t outputs, inputs, group;
};

int failures = 0;

void check(bool right, const Case &one, const char *what, int64_t rows) {
    if (right) return;
    failures++;
    std::printf("WRONG: %s [%d, %d], %s, %d rows\n", one.name, int(one.outputs), int(one.inputs), what, int(rows));
}

void run(const Case &one, int64_t rows) {
    std::normal_distribution<float> normal;
    const int64_t padded = (one.outputs + 31) / 32 * 32, groups = one.group ? one.inputs / one.group : 1;
    const bool bf16_weight = one.form == QUIRE_DENSE && one.type == QUIRE_BF16;
    std::vector<uint8_t> source(size_t(one.outputs * one.inputs * 2));
    for (auto &byte : source) byte = uint8_t(generator());
    if (bf16_weight)
        for (size_t i = 0; i < source.size(); i += 2) {
            const uint16_t value = bf16(normal(generator));
            std::memcpy(source.data() + i, &value, 2);
        }
    if (one.type == QUIRE_E4M3)
        for (auto &byte : source)
            if ((byte & 0x7f) == 0x7f) byte = 0;
    std::vector<float> scales(size_t(padded * groups));
    std::vector<uint8_t> zeros(scales.size());
    for (auto &scale : scales) scale = normal(generator);
    for (auto &zero : zeros) zero = uint8_t(generator() % 16);
    void *data = std::aligned_alloc(64, size_t(quire_packed_bytes(one.form, one.type, padded, one.inputs) + 63) / 64 * 64);
    const quire_weight weight = {one.form, one.type, one.outputs, one.inputs, one.group, data,
                                 bf16_weight ? nullptr : scales.data(), one.group ? zeros.data() : nullptr};
    if (quire_pack(&weight, source.data(), one.form == QUIRE_INT4 ? one.inputs / 2 : one.inputs)) std::abort();

    std::vector<uint16_t> x(size_t(rows * one.inputs)), bias(size_t(one.outputs));
    for (auto &value : x) value = bf16(normal(generator));
    for (auto &value : bias) value = bf16(normal(generator));
    const auto product = [&](const char *isa, int threads, int64_t at_once) {
        std::vector<uint16_t> y(size_t(rows * one.outputs), 0x7fc0);
        if (quire_set_isa(isa) || quire_set_threads(threads)) std::abort();
        for (int64_t r = 0; r < rows; r += at_once) {
            const uint16_t *from = x.data() + r * one.inputs;
            uint16_t *to = y.data() + r * one.outputs;
            const int64_t count = at_once < rows - r ? at_once : rows - r;
            if (quire_linear(&weight, QUIRE_BF16, count, from, one.inputs, bias.data(), to, one.outputs)) std::abort();
        }
        return y;
    };
    const auto all = product("amx", 1, rows);
    check(all == product("amx-emulated", 1, rows), one, "emulated", rows);
    check(all == product("amx", 2, rows), one, "two threads", rows);
    for (int64_t at_once : {1, 7, 16, 17, 33})
        if (at_once < rows) check(all == product("amx", 2, at_once), one, "fewer at once", at_once);
    if (one.form != QUIRE_DENSE) check(all == product("avx512", 1, rows), one, "AVX-512", rows);
    std::printf("%s [%d, %d], %d rows\n", one.name, int(one.outputs), int(one.inputs), int(rows));
    std::fflush(stdout);
    std::free(data);
}

}  // namespace

int main() {
    std::printf("instruction sets: %s; %s\n", quire_isas(), quire_isa_note());
    if (std::string(quire_isas()).rfind("amx,", 0)) return std::printf("no AMX here\n"), 2;
    const std::vector<Case> cases = {
        {"bfloat16", QUIRE_DENSE, QUIRE_BF16, 100, 200, 0}, {"bfloat16", QUIRE_DENSE, QUIRE_BF16, 33, 601, 0},
        {"FP8", QUIRE_DENSE, QUIRE_E4M3, 64, 331, 0},       {"int8", QUIRE_INT8, QUIRE_I8, 70, 333, 0},
        {"int4", QUIRE_INT4, QUIRE_I8, 64, 256, 128},       {"int4", QUIRE_INT4, QUIRE_I8, 40, 96, 32},
    };
    for (const Case &one : cases)
        for (int64_t rows : {1, 5, 16, 17, 32, 47, 140}) run(one, rows);
    std::printf("%d wrong\n", failures);
    return failures ? 1 : 0;
}
