// Chooses the kernels for this processor, once, and is the C interface to them.
#include "check.h"
#include "kernels.h"
#include "pool.h"

#include <cstring>
#include <string>
#include <vector>

namespace {

struct Isa {
    const char *name;
    quire::Kernels kernels;
};

struct Isas {
    std::vector<Isa> list;
    std::string note;
};

#define ADD(isa)                                                            \
    add(#isa, [](quire::Kernels &k) {                                       \
        isa::add_linear(k), isa::add_rows(k), isa::add_attention(k);        \
        isa::add_lora(k), isa::add_transposed(k), isa::add_gradients(k);    \
        isa::add_attention_backward(k), isa::add_loss(k);                   \
        isa::add_sampling(k);                                               \
    })

#if defined(__x86_64__)
// Beside AVX-512, whose kernels do all but what is bfloat16 on both sides. The instruction is worth two of AVX-512's on AMD's
// processors; on Intel's it is worth what they are, and is there to be asked for.
void add_pairs([[maybe_unused]] Isas &found) {
#if defined(QUIRE_BF16_PAIRS)
    if (!__builtin_cpu_supports("avx512bf16")) return;
    Isa pairs = {"avx512_bf16", found.list.back().kernels};
    avx512_bf16::add_linear(pairs.kernels), avx512_bf16::add_attention(pairs.kernels);
    avx512_bf16::add_transposed(pairs.kernels), avx512_bf16::add_attention_backward(pairs.kernels);
    found.list.insert(__builtin_cpu_is("amd") ? found.list.begin() : found.list.end(), pairs);
#endif
}

// In front of AVX-512, whose kernels do all but products with packed weights, their gradients, and attention.
void add_amx(Isas &found) {
    const Isa avx512 = found.list.back();
    const char *refused = quire::amx_refused();
#if defined(QUIRE_AMX)
    if (!refused) {
        Isa tiles = {"amx", avx512.kernels};
        amx::add_linear(tiles.kernels), amx::add_attention(tiles.kernels);
        amx::add_transposed(tiles.kernels), amx::add_attention_backward(tiles.kernels);
        if (quire::same_products(tiles.kernels, avx512.kernels))
            found.list.insert(found.list.begin(), tiles);
        else
            refused = "known products came out wrong";
    }
#else
    if (!refused) refused = "the compiler that built this library does not know it";
#endif
    if (refused && *refused) found.note = std::string("AMX is not used: ") + refused;
}
#endif

Isas find() {
    Isas found;
    auto add = [&](const char *name, void (*fill)(quire::Kernels &)) {
        found.list.push_back({name, {}});
        fill(found.list.back().kernels);
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512_here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512vnni");
    if (avx512_here) {
        ADD(avx512);
        add_amx(found);
        add_pairs(found);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) ADD(avx2);
    ADD(generic);
#if defined(QUIRE_AMX)
    if (avx512_here && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) {
        ADD(avx512);
        found.list.back().name = "amx-emulated";
        quire::Kernels &kernels = found.list.back().kernels;
        amx_emulated::add_linear(kernels), amx_emulated::add_attention(kernels);
        amx_emulated::add_transposed(kernels), amx_emulated::add_attention_backward(kernels);
    }
#endif
#elif defined(__aarch64__)
    ADD(neon);
#else
    ADD(generic);
#endif
    return found;
}

Isas &found() {
    static Isas isas = find();
    return isas;
}
std::vector<Isa> &isas() { return found().list; }
size_t chosen = 0;

const quire::Kernels &kernels() { return isas()[chosen].kernels; }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int quire_version(void) { return QUIRE_VERSION; }

const char *quire_isa(void) { return isas()[chosen].name; }

const char *quire_isas(void) {
    static std::string names = [] {
        std::string out;
        for (auto &isa : isas()) out += (out.empty() ? "" : ",") + std::string(isa.name);
        return out;
    }();
    return names.c_str();
}

int quire_set_isa(const char *name) {
    for (size_t i = 0; i < isas().size(); i++)
        if (!std::strcmp(isas()[i].name, name)) return chosen = i, 0;
    return -1;
}

const char *quire_isa_note(void) { return found().note.c_str(); }

int quire_check_isa(const char *name) {
    for (size_t i = 0; i < isas().size(); i++)
        if (!std::strcmp(isas()[i].name, name))
            return quire::same_products(isas()[i].kernels, isas()[i || isas().size() == 1 ? 0 : 1].kernels) ? 0 : -1;
    return -1;
}

int quire_set_threads(int count) { return quire::set_threads(count); }
int quire_threads(void) { return quire::threads(); }

int64_t quire_packed_bytes(int form, int type, int64_t outputs, int64_t inputs) {
    const int64_t padded = (outputs + 31) / 32 * 32;
    if (form == QUIRE_INT8) return padded * ((inputs + 3) / 4 * 4);
    if (form == QUIRE_INT4) return inputs % 8 ? -1 : padded * inputs / 2;
    if (form != QUIRE_DENSE) return -1;
    if (type == QUIRE_F32) return padded * inputs * 4;
    if (type == QUIRE_BF16 || type == QUIRE_F16) return padded * inputs * 2;
    return type == QUIRE_E4M3 ? padded * inputs : -1;
}

int quire_pack(const quire_weight *weight, const void *source, int64_t source_stride) {
    return kernels().pack(weight, source, source_stride);
}

int quire_linears(int count, const quire_weight *const *weights, int type, int64_t rows, const void *x, int64_t x_stride,
                  const void *const *biases, void *const *ys, const int64_t *y_strides) {
    return kernels().linears(count, weights, type, rows, x, x_stride, biases, ys, y_strides);
}

int quire_linear(const quire_weight *weight, int type, int64_t rows, const void *x, int64_t x_stride, const void *bias,
                 void *y, int64_t y_stride) {
    return kernels().linears(1, &weight, type, rows, x, x_stride, &bias, &y, &y_stride);
}

int quire_weight_rows(const quire_weight *weight, int type, int64_t rows, const int64_t *ids, void *out) {
    return kernels().weight_rows(weight, type, rows, ids, out);
}

int quire_rms_norm(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride, const void *weight,
                   float eps, float offset, void *out) {
    return kernels().rms_norm(type, weight_type, rows, size, x, stride, weight, eps, offset, out);
}

int quire_layer_norm(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride,
                     const void *weight, const void *bias, float eps, void *out) {
    return kernels().layer_norm(type, weight_type, rows, size, x, stride, weight, bias, eps, out);
}

int quire_activation(int type, int kind, int64_t rows, int64_t size, const void *x, int64_t stride, const void *up,
                     int64_t up_stride, void *out) {
    return kernels().activation(type, kind, rows, size, x, stride, up, up_stride, out);
}

int quire_add(int type, int64_t count, const void *x, const void *y, void *out) {
    return kernels().add(type, count, x, y, out);
}

int quire_gather_rows(int64_t rows, const int64_t *ids, const void *table, int64_t table_rows, int64_t row_bytes,
                      int64_t stride_bytes, void *out) {
    return kernels().gather_rows(rows, ids, table, table_rows, row_bytes, stride_bytes, out);
}

int quire_rope(int type, int64_t tokens, int64_t heads, int64_t size, int64_t half, const void *x, int64_t token_stride,
               int64_t head_stride, const float *cos, const float *sin, void *out) {
    return kernels().rope(type, tokens, heads, size, half, x, token_stride, head_stride, cos, sin, out);
}

int quire_write_kv(const quire_kv *kv, int type, int64_t tokens, const quire_heads *k, const quire_heads *v,
                   const int64_t *slots) {
    return kernels().write_kv(kv, type, tokens, k, v, slots);
}

int quire_rope_and_write(const quire_kv *kv, int type, int64_t tokens, int64_t heads, int64_t half, const quire_heads *q,
                         const quire_heads *k, const quire_heads *v, const float *cos, const float *sin,
                         const int64_t *slots) {
    return kernels().rope_and_write(kv, type, tokens, heads, half, q, k, v, cos, sin, slots);
}

int quire_attend(const quire_attention *call) { return kernels().attend(call); }

int quire_lora(const quire_lora_table *table, int type, int64_t rows, const void *x, int64_t x_stride, void *y,
               int64_t y_stride, const int32_t *slots) {
    return kernels().loras(1, &table, type, rows, x, x_stride, &y, &y_stride, slots);
}

int quire_loras(int count, const quire_lora_table *const *tables, int type, int64_t rows, const void *x, int64_t x_stride,
                void *const *ys, const int64_t *y_strides, const int32_t *slots) {
    return kernels().loras(count, tables, type, rows, x, x_stride, ys, y_strides, slots);
}

int quire_lora_backward(const quire_lora_table *table, int type, int64_t rows, const void *x, int64_t x_stride,
                        const void *dy, int64_t dy_stride, const int32_t *slots, void *dx, float *const *das,
                        float *const *dbs) {
    return kernels().lora_backward(table, type, rows, x, x_stride, dy, dy_stride, slots, dx, das, dbs);
}

int quire_linears_backward(int count, const quire_weight *const *weights, int dy_type, int type, int64_t rows,
                           const void *const *dys, const int64_t *dy_strides, void *dx, int64_t dx_stride) {
    return kernels().linears_backward(count, weights, dy_type, type, rows, dys, dy_strides, dx, dx_stride);
}

int quire_rms_norm_backward(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride,
                            const void *dy, int64_t dy_stride, const void *weight, float eps, float offset, void *dx) {
    return kernels().rms_norm_backward(type, weight_type, rows, size, x, stride, dy, dy_stride, weight, eps, offset, dx);
}

int quire_layer_norm_backward(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride,
                              const void *dy, int64_t dy_stride, const void *weight, float eps, void *dx) {
    return kernels().layer_norm_backward(type, weight_type, rows, size, x, stride, dy, dy_stride, weight, eps, dx);
}

int quire_activation_backward(int type, int kind, int64_t rows, int64_t size, const void *x, int64_t stride, const void *up,
                              int64_t up_stride, const void *dy, int64_t dy_stride, void *dx, void *dup) {
    return kernels().activation_backward(type, kind, rows, size, x, stride, up, up_stride, dy, dy_stride, dx, dup);
}

int quire_attend_backward(const quire_attention *call, const quire_heads *dy, void *dq, void *dk, void *dv) {
    return kernels().attend_backward(call, dy, dq, dk, dv);
}

int quire_peaks(int type, int64_t rows, int64_t size, const void *x, int64_t stride, float *peaks, int64_t *ids) {
    return kernels().peaks(type, rows, size, x, stride, peaks, ids);
}

int quire_masses(int type, int64_t rows, int64_t size, const void *x, int64_t stride, float *peaks, int64_t *masses) {
    return kernels().masses(type, rows, size, x, stride, peaks, masses);
}

int quire_cross_entropy(int type, int64_t rows, int64_t size, const void *x, int64_t stride, const int64_t *targets,
                        float *peaks, int64_t *masses, void *slope, int64_t slope_stride) {
    return kernels().cross_entropy(type, rows, size, x, stride, targets, peaks, masses, slope, slope_stride);
}

int quire_draw(int64_t rows, int64_t size, const float *logits, int64_t stride, const double *temperatures,
               const double *min_ps, const int64_t *top_ks, const double *top_ps, const double *uniforms, int64_t *tokens) {
    return kernels().draw(rows, size, logits, stride, temperatures, min_ps, top_ks, top_ps, uniforms, tokens);
}
}
