// Two instruction sets that no machine has both of: do they give the same bits? This calls every kernel with what is drawn
// alike everywhere and prints a line for each call, with a checksum of what came out; the lines of two machines, or of a
// machine and an emulated processor, are compared. tests/native/test_neon.py builds and runs it; by hand, with setup.py's
// objects:
//
//   c++ -std=c++17 -O2 -Icsrc -static -pthread tests/native/digests.cpp build/temp*/*.o -o digests && ./digests avx2 2
//
// Its arguments are an instruction set and the number of threads.
#include "drawn.h"

#include <initializer_list>
#include <string>

namespace {

// ---- products --------------------------------------------------------------------------------------------------------

struct Weight {
    quire_weight packed;
    std::vector<float> scales;
    std::vector<uint8_t> zeros, memory;

    Weight(int form, int type, int64_t outputs, int64_t inputs, int64_t group) {
        const int64_t padded = (outputs + 31) / 32 * 32, groups = group ? inputs / group : 1;
        const bool scaled = form != QUIRE_DENSE || type == QUIRE_E4M3;
        if (scaled) scales = floats(padded * groups);
        if (form == QUIRE_INT4) zeros.resize(size_t(padded * groups));
        for (uint8_t &zero : zeros) zero = uint8_t(draw(16));
        memory.resize(size_t(quire_packed_bytes(form, type, outputs, inputs) + 64));
        void *data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
        packed = {form, type, outputs, inputs, group, data, scaled ? scales.data() : nullptr,
                  form == QUIRE_INT4 ? zeros.data() : nullptr};
        Tensor source = numbers(type, outputs * inputs);
        MUST(quire_pack(&packed, source.data(), form == QUIRE_INT4 ? inputs / 2 : inputs));
    }
    Weight(const Weight &) = delete;
};

struct Form {
    const char *name;
    int form, type;
    int64_t group;
};
constexpr Form FORMS[] = {
    {"dense f32", QUIRE_DENSE, QUIRE_F32, 0}, {"dense bf16", QUIRE_DENSE, QUIRE_BF16, 0},
    {"dense f16", QUIRE_DENSE, QUIRE_F16, 0}, {"dense e4m3", QUIRE_DENSE, QUIRE_E4M3, 0},
    {"int8", QUIRE_INT8, QUIRE_I8, 0},        {"int4/32", QUIRE_INT4, QUIRE_I8, 32},
    {"int4/96", QUIRE_INT4, QUIRE_I8, 96},
};

void products(const Form &form) {
    struct Shape {
        int64_t outputs, inputs;
    };
    for (const Shape shape : {Shape{1, 8}, Shape{33, 72}, Shape{100, 331}, Shape{40, 1101}}) {
        const int64_t outputs = shape.outputs, step = form.form == QUIRE_INT4 ? 96 : 1;
        const int64_t inputs = (shape.inputs + step - 1) / step * step;
        const Weight one(form.form, form.type, outputs, inputs, form.group), two(form.form, form.type, 40, inputs, form.group);
        const quire_weight *const weights[] = {&one.packed, &two.packed};
        for (int type : COMPUTED) {
            for (int64_t rows : {1, 2, 3, 7, 29}) {
                const int64_t strides[] = {outputs + 3, 40};
                Tensor x = numbers(type, rows * (inputs + 5)), bias = numbers(type, outputs);
                Tensor y(type, rows * strides[0]), z(type, rows * strides[1]);
                if (rows > 2) std::memset(x.at(inputs + 5), 0, size_t(inputs * x.each()));
                const void *const biases[] = {bias.data(), nullptr};
                void *const ys[] = {y.data(), z.data()};
                MUST(quire_linears(2, weights, type, rows, x.data(), inputs + 5, biases, ys, strides));
                Sum().add(y).add(z).report("linears %s [%d, %d], %d rows of %s", form.name, int(outputs), int(inputs),
                                           int(rows), FORMATS[type].name);
            }
            const int64_t ids[] = {0, outputs - 1, outputs / 2};
            Tensor rows(type, 3 * inputs);
            MUST(quire_weight_rows(&one.packed, type, 3, ids, rows.data()));
            Sum().add(rows).report("weight_rows %s [%d, %d] as %s", form.name, int(outputs), int(inputs), FORMATS[type].name);
        }
    }
}

void products_backward(const Form &form) {
    const int64_t inputs = form.group ? 96 : 75;
    const Weight one(form.form, form.type, 100, inputs, form.group), other(QUIRE_DENSE, QUIRE_BF16, 531, inputs, 0);
    const quire_weight *const weights[] = {&one.packed, &other.packed};
    for (int from : COMPUTED)
        for (int to : COMPUTED)
            for (int64_t rows : {1, 4, 11, 390}) {
                if (rows > 11 && (form.type != QUIRE_BF16 || from != QUIRE_BF16 || to != QUIRE_BF16)) continue;
                const int count = rows % 2 + 1;
                Tensor first = numbers(from, rows * 103), second = numbers(from, rows * 531), dx(to, rows * (inputs + 2));
                const void *const dys[] = {first.data(), second.data()};
                const int64_t strides[] = {103, 531};
                MUST(quire_linears_backward(count, weights, from, to, rows, dys, strides, dx.data(), inputs + 2));
                Sum().add(dx).report("linears_backward %s, %d weights, %d rows, %s to %s", form.name, count, int(rows),
                                     FORMATS[from].name, FORMATS[to].name);
            }
}

// ---- rows ------------------------------------------------------------------------------------------------------------

void norms(int type, int weight_type) {
    for (int64_t size : {1, 7, 64, 100, 1031}) {
        const int64_t rows = 3, stride = size + 2;
        Tensor x = numbers(type, rows * stride), dy = numbers(type, rows * stride);
        Tensor weight = numbers(weight_type, size), bias = numbers(weight_type, size);
        Tensor rms(type, rows * size), layer = rms, plain = rms, rms_dx = rms, layer_dx = rms, plain_dx = rms;
        const float offset = size % 2 ? 1.0f : 0.0f;
        MUST(quire_rms_norm(type, weight_type, rows, size, x.data(), stride, weight.data(), 1e-6f, offset, rms.data()));
        MUST(quire_layer_norm(type, weight_type, rows, size, x.data(), stride, weight.data(), bias.data(), 1e-5f,
                              layer.data()));
        MUST(quire_layer_norm(type, weight_type, rows, size, x.data(), stride, nullptr, nullptr, 1e-5f, plain.data()));
        MUST(quire_rms_norm_backward(type, weight_type, rows, size, x.data(), stride, dy.data(), stride, weight.data(), 1e-6f,
                                     offset, rms_dx.data()));
        MUST(quire_layer_norm_backward(type, weight_type, rows, size, x.data(), stride, dy.data(), stride, weight.data(), 1e-5f,
                                       layer_dx.data()));
        MUST(quire_layer_norm_backward(type, weight_type, rows, size, x.data(), stride, dy.data(), stride, nullptr, 1e-5f,
                                       plain_dx.data()));
        const auto report = [&](const char *what, const Tensor &out) {
            Sum().add(out).report("%s of %d %s, weight %s", what, int(size), FORMATS[type].name, FORMATS[weight_type].name);
        };
        report("rms_norm", rms), report("layer_norm", layer), report("layer_norm alone", plain);
        report("rms_norm_backward", rms_dx), report("layer_norm_backward", layer_dx);
        report("layer_norm_backward alone", plain_dx);
    }
}

// Of `type` all numbers of 16 bits; of float32 one for each upper half.
Tensor every(int type) {
    Tensor out(type, 1 << 16);
    for (int64_t i = 0; i < out.count; i++) out.set(i, type == QUIRE_F32 ? uint32_t(i) << 16 | draw(1 << 16) : uint32_t(i));
    return out;
}

void elementwise(int type) {
    Tensor all = every(type);
    const int64_t many = all.count;
    for (int64_t count : {1, 5, 1027, 4099}) {
        Tensor x = anything(type, count), y = anything(type, count), out(type, count);
        MUST(quire_add(type, count, x.data(), y.data(), out.data()));
        Sum().add(out).report("add %d %s", int(count), FORMATS[type].name);
    }
    for (int kind = QUIRE_SILU; kind <= QUIRE_RELU; kind++)
        for (int64_t size : {many, int64_t(1), int64_t(5), int64_t(77)})
            for (bool gated : {false, true}) {
                if (gated && size == many) continue;
                const int64_t rows = size == many ? 1 : 3, stride = size == many ? size : size + 1;
                Tensor x = size == many ? all : anything(type, rows * stride), up = numbers(type, rows * stride);
                Tensor dy = numbers(type, rows * stride), out(type, rows * size), dx = out, dup = out;
                void *const factor = gated ? up.data() : nullptr;
                MUST(quire_activation(type, kind, rows, size, x.data(), stride, factor, stride, out.data()));
                MUST(quire_activation_backward(type, kind, rows, size, x.data(), stride, factor, stride, dy.data(), stride,
                                               dx.data(), gated ? dup.data() : nullptr));
                const char *const with = gated ? " and product" : "";
                Sum().add(out).report("activation %d%s of %d %s", kind, with, int(size), FORMATS[type].name);
                Sum().add(dx).add(dup).report("activation_backward %d%s of %d %s", kind, with, int(size), FORMATS[type].name);
            }
    const int64_t ids[] = {4, 0, 4, 2};
    Tensor rows(type, 4 * 13);
    MUST(quire_gather_rows(4, ids, all.data(), 5, 13 * all.each(), 17 * all.each(), rows.data()));
    Sum().add(rows).report("gather_rows %s", FORMATS[type].name);
}

void rotations(int type) {
    struct Shape {
        int64_t size, half;
    };
    for (const Shape shape : {Shape{8, 4}, Shape{64, 32}, Shape{80, 20}, Shape{33, 13}}) {
        const int64_t size = shape.size, heads = 3, tokens = 4;
        const std::vector<float> cos = floats(tokens * shape.half), sin = floats(tokens * shape.half);
        Tensor x = numbers(type, tokens * (heads * size + 2)), out(type, tokens * heads * size);
        MUST(quire_rope(type, tokens, heads, size, shape.half, x.data(), heads * size + 2, size, cos.data(), sin.data(),
                        out.data()));
        Sum().add(out).report("rope %s, %d of %d", FORMATS[type].name, int(2 * shape.half), int(size));
    }
}

// ---- the cache and attention -------------------------------------------------------------------------------------------

// A cache, with or without scales, and rows of its heads' size on their way into it.
struct Cache {
    static constexpr int64_t HEADS = 2, SIZE = 64, ROW = HEADS * SIZE;
    std::vector<float> scales = floats(2 * HEADS, true);
    Tensor keys, values;
    std::vector<int64_t> slots;
    quire_kv kv;

    Cache(int type, int64_t tokens, bool scaled) : keys(type, tokens * ROW), values(type, tokens * ROW) {
        for (int64_t t = tokens; t > 0; t--) slots.push_back(t - 1);
        kv = {type, HEADS, SIZE, tokens, keys.data(), values.data(), ROW, SIZE, ROW, SIZE, scaled ? scales.data() : nullptr};
    }
    Cache(const Cache &) = delete;
};

// Into caches of every type: the conversions, one by one.
void cached(int type, int cache) {
    for (bool scaled : {false, true}) {
        const int64_t row = Cache::ROW, size = Cache::SIZE;
        const char *const how = scaled ? ", scaled" : "";
        Tensor x = scaled ? anything(type, 40 * row) : every(type);
        Cache to(cache, x.count / row, scaled);
        const quire_heads from = {x.data(), row, size};
        MUST(quire_write_kv(&to.kv, type, x.count / row, &from, &from, to.slots.data()));
        Sum().add(to.keys).add(to.values).report("write_kv %s to %s%s", FORMATS[type].name, FORMATS[cache].name, how);
        for (int64_t half : {5, 32}) {
            const int64_t tokens = 7, part = 3 * 66;
            const std::vector<float> cos = floats(tokens * half), sin = floats(tokens * half);
            Tensor q = numbers(type, tokens * part), k = numbers(type, tokens * row), v = numbers(type, tokens * row);
            Cache turned(cache, tokens, scaled);
            const quire_heads from_q = {q.data(), part, 66}, from_k = {k.data(), row, size}, from_v = {v.data(), row, size};
            MUST(quire_rope_and_write(&turned.kv, type, tokens, 3, half, &from_q, &from_k, &from_v, cos.data(), sin.data(),
                                      turned.slots.data()));
            Sum().add(q).add(turned.keys).add(turned.values).report("rope_and_write %s to %s%s, %d", FORMATS[type].name,
                                                                    FORMATS[cache].name, how, int(2 * half));
        }
    }
}

struct Case {
    int64_t heads, kv_heads, size, window;
    float softcap;
};
constexpr Case CASES[] = {
    {2, 2, 16, 0, 0.0f}, {6, 2, 64, 0, 0.0f}, {4, 1, 40, 37, 0.0f}, {2, 1, 72, 0, 30.0f}, {4, 2, 7, 140, 2.0f}};

// Three sequences: one that decodes, one in the middle of its prompt, one from its start. They share blocks.
void attention(int type, int cache, const Case &one) {
    const int64_t starts[] = {0, 1, 8, 18}, lengths[] = {261, 140, 10}, block = 16, width = 17, blocks = 18;
    const int64_t slots = blocks * block;
    const int64_t row = one.kv_heads * one.size, q_row = one.heads * one.size + 3;
    const std::vector<float> scales = floats(2 * one.kv_heads, true);
    std::vector<int64_t> tables(3 * width);
    for (size_t i = 0; i < tables.size(); i++) tables[i] = int64_t(i * 5) % blocks;
    Tensor q = numbers(type, 18 * q_row), keys = numbers(cache, slots * row), values = numbers(cache, slots * row);
    Tensor out(type, 18 * one.heads * one.size);
    const bool scaled = FORMATS[cache].bytes == 1;
    const quire_kv kv = {cache, one.kv_heads, one.size, slots, keys.data(), values.data(), row, one.size, row, one.size,
                         scaled ? scales.data() : nullptr};
    const float scale = cache == QUIRE_I8 ? 0.002f : 0.125f;
    const quire_attention call = {type, one.heads, {q.data(), q_row, one.size}, out.data(), kv, 3, starts, lengths,
                                  tables.data(), width, block, scale, one.softcap, one.window};
    MUST(quire_attend(&call));
    Sum().add(out).report("attend %s, cache %s, %dx%dx%d, window %d, cap %d", FORMATS[type].name, FORMATS[cache].name,
                          int(one.heads), int(one.kv_heads), int(one.size), int(one.window), int(one.softcap));
}

void attention_backward(int type, const Case &one) {
    const int64_t starts[] = {0, 1, 50, 190}, lengths[] = {1, 49, 140}, rows = 190;
    const int64_t row = one.kv_heads * one.size, q_row = one.heads * one.size;
    Tensor q = numbers(type, rows * q_row), k = numbers(type, rows * row), v = numbers(type, rows * row);
    Tensor dy = numbers(type, rows * q_row), out(type, rows * q_row), dq = out, dk(type, rows * row), dv = dk;
    const quire_kv kv = {type, one.kv_heads, one.size, rows, k.data(), v.data(), row, one.size, row, one.size, nullptr};
    const quire_attention call = {type, one.heads, {q.data(), q_row, one.size}, out.data(), kv, 3, starts, lengths,
                                  nullptr, 0, 0, 0.125f, one.softcap, one.window};
    const quire_heads gradient = {dy.data(), q_row, one.size};
    MUST(quire_attend(&call));
    MUST(quire_attend_backward(&call, &gradient, dq.data(), dk.data(), dv.data()));
    const auto report = [&](const char *what, const Tensor &sums) {
        Sum().add(sums).report("%s %s, %dx%dx%d, window %d, cap %d", what, FORMATS[type].name, int(one.heads),
                               int(one.kv_heads), int(one.size), int(one.window), int(one.softcap));
    };
    report("attend over rows", out), report("attend_backward q", dq), report("attend_backward k", dk);
    report("attend_backward v", dv);
}

// ---- adapters ----------------------------------------------------------------------------------------------------------

void adapters(int type, int64_t inputs, int64_t outputs) {
    const int64_t ranks[] = {1, 0, 5, 16}, rows = 71;
    std::vector<std::vector<float>> matrices;
    std::vector<quire_lora_part> parts[2];
    Tensor das(QUIRE_F32, 22 * inputs), dbs(QUIRE_F32, 22 * outputs);
    std::vector<float *> to_a, to_b;
    int64_t place = 0;  // of all adapters' ranks
    for (int64_t rank : ranks) {
        to_a.push_back(rank ? static_cast<float *>(das.at(place * inputs)) : nullptr);
        to_b.push_back(rank ? static_cast<float *>(dbs.at(place * outputs)) : nullptr);
        place += rank;
        for (auto &table : parts) {
            quire_lora_part part = {nullptr, nullptr, rank, 0.37f};
            if (rank) {
                part.a = matrices.emplace_back(floats(rank * inputs)).data();
                part.b = matrices.emplace_back(floats(rank * outputs)).data();
            }
            table.push_back(part);
        }
    }
    const quire_lora_table one = {inputs, outputs, 4, parts[0].data()}, two = {inputs, outputs, 4, parts[1].data()};
    const quire_lora_table *const tables[] = {&one, &two};
    std::vector<int32_t> slots(rows);
    for (int32_t &slot : slots) slot = int32_t(draw(6)) - 1;
    Tensor x = numbers(type, rows * (inputs + 1)), y = numbers(type, rows * (outputs + 2)), z = y, dx(type, rows * inputs);
    void *const ys[] = {y.data(), z.data()};
    const int64_t strides[] = {outputs + 2, outputs + 2};
    MUST(quire_loras(2, tables, type, rows, x.data(), inputs + 1, ys, strides, slots.data()));
    Sum().add(y).add(z).report("loras %s [%d, %d]", FORMATS[type].name, int(outputs), int(inputs));
    MUST(quire_lora_backward(&one, type, rows, x.data(), inputs + 1, z.data(), outputs + 2, slots.data(), dx.data(),
                             to_a.data(), to_b.data()));
    Sum().add(dx).report("lora_backward x %s [%d, %d]", FORMATS[type].name, int(outputs), int(inputs));
    Sum().add(das).add(dbs).report("lora_backward a and b %s [%d, %d]", FORMATS[type].name, int(outputs), int(inputs));
}

// A call that was written down: how a function takes its arguments is the machine's own.
void replayed() {
    Tensor x = numbers(QUIRE_F32, 200), weight = numbers(QUIRE_F32, 100), out(QUIRE_F32, 200);
    const float eps = 1e-6f, offset = 1.0f;
    const auto word = [](auto value) {
        int64_t bits = 0;
        std::memcpy(&bits, &value, sizeof value);
        return bits;
    };
    const quire_call call = {quire_function("rms_norm"),
                             {QUIRE_F32, QUIRE_F32, 2, 100, word(x.data()), 100, word(weight.data()), word(eps), word(offset),
                              word(out.data())}};
    MUST(quire_replay(&call, 1));
    Sum().add(out).report("replay of rms_norm");
}

}  // namespace

int main(int count, char **arguments) {
    if (count != 3 || quire_set_isa(arguments[1]) || quire_set_threads(std::atoi(arguments[2]))) {
        std::fprintf(stderr, "digests INSTRUCTION_SET THREADS; here is %s\n", quire_isas());
        return 2;
    }
    for (const Form &form : FORMS) products(form), products_backward(form);
    for (int type : COMPUTED) {
        for (int weight_type : COMPUTED) norms(type, weight_type);
        elementwise(type), rotations(type);
        for (int cache : CACHED) {
            cached(type, cache);
            for (const Case &one : CASES) attention(type, cache, one);
        }
        for (const Case &one : CASES) attention_backward(type, one);
        adapters(type, 64, 33), adapters(type, 601, 300), adapters(type, 5, 1);
    }
    replayed();
    return 0;
}
