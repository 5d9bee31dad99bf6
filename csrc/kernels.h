// The kernels of one instruction set, as a table. Each kernel file adds its own.
#pragma once

#include "quire.h"

namespace quire {

struct Kernels {
    int (*pack)(const quire_weight *, const void *, int64_t);
    int (*linears)(int, const quire_weight *const *, int, int64_t, const void *, int64_t, const void *const *, void *const *,
                   const int64_t *);
    int (*weight_rows)(const quire_weight *, int, int64_t, const int64_t *, void *);
    decltype(&quire_rms_norm) rms_norm;
    decltype(&quire_layer_norm) layer_norm;
    decltype(&quire_activation) activation;
    decltype(&quire_add) add;
    decltype(&quire_gather_rows) gather_rows;
    decltype(&quire_rope) rope;
    decltype(&quire_write_kv) write_kv;
    decltype(&quire_rope_and_write) rope_and_write;
    decltype(&quire_attend) attend;
    decltype(&quire_loras) loras;
    decltype(&quire_lora_backward) lora_backward;
    decltype(&quire_linears_backward) linears_backward;
    decltype(&quire_rms_norm_backward) rms_norm_backward;
    decltype(&quire_layer_norm_backward) layer_norm_backward;
    decltype(&quire_activation_backward) activation_backward;
    decltype(&quire_attend_backward) attend_backward;
    decltype(&quire_peaks) peaks;
    decltype(&quire_masses) masses;
    decltype(&quire_cross_entropy) cross_entropy;
    decltype(&quire_draw) draw;
};

}  // namespace quire

#define QUIRE_DECLARE(isa)                                \
    namespace isa {                                       \
    void add_linear(quire::Kernels &kernels);             \
    void add_rows(quire::Kernels &kernels);               \
    void add_attention(quire::Kernels &kernels);          \
    void add_lora(quire::Kernels &kernels);               \
    void add_transposed(quire::Kernels &kernels);         \
    void add_gradients(quire::Kernels &kernels);          \
    void add_attention_backward(quire::Kernels &kernels); \
    void add_loss(quire::Kernels &kernels);               \
    void add_sampling(quire::Kernels &kernels);           \
    }
QUIRE_DECLARE(avx512)
QUIRE_DECLARE(avx2)
QUIRE_DECLARE(neon)
QUIRE_DECLARE(generic)
// They take over what they can from the kernels that are given.
namespace avx512_bf16 {
void add_linear(quire::Kernels &kernels);
void add_attention(quire::Kernels &kernels);
void add_attention_backward(quire::Kernels &kernels);
void add_transposed(quire::Kernels &kernels);
}
namespace amx {
void add_linear(quire::Kernels &kernels);
void add_attention(quire::Kernels &kernels);
void add_attention_backward(quire::Kernels &kernels);
void add_transposed(quire::Kernels &kernels);
}
namespace amx_emulated {
void add_linear(quire::Kernels &kernels);
void add_attention(quire::Kernels &kernels);
void add_attention_backward(quire::Kernels &kernels);
void add_transposed(quire::Kernels &kernels);
}
