// What acts on each row by itself: norms, rotation, activations, table look-up. float32 inside; results are rounded to the
// rows' type at the places where the reference (quire/ops/reference/rows.py) rounds them.
#include "functions.h"
#include "kernels.h"
#include "lines.h"

namespace QUIRE_ISA {
namespace {

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// ---- norms -----------------------------------------------------------------------------------------------------------

template <int type, int weights>
INLINE void normalize(const float *line, int64_t size, const uint8_t *weight, float eps, float offset, uint8_t *out) {
    const float squares = sum_of(line, size, [](Floats s, Floats x) { return fma(x, x, s); });
    const Floats factor = all(1.0f / std::sqrt(squares / float(size) + eps)), shift = all(offset);
    for (int64_t i = 0; i < size; i += LANES) {
        Floats scaled = load<Floats>(line + i) * factor;
        write<type>(out, i, size, scaled * (read<weights>(weight, i, size) + shift));
    }
}

int rms_norm(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride, const void *weight,
             float eps, float offset, void *out) {
    return with_type(type, [&](auto t) {
        with_type(weight_type, [&](auto w) {
            constexpr int T = decltype(t)::value, W = decltype(w)::value, B = Element<T>::BYTES;
            over_rows(rows, size, [&](int64_t first, int64_t last) {
                auto line = static_cast<float *>(quire::scratch(0, (size + 64) * 4));
                for (int64_t r = first; r < last; r++) {
                    widen_row<T>(bytes(x) + r * stride * B, size, line);
                    normalize<T, W>(line, size, bytes(weight), eps, offset, bytes(out) + r * size * B);
                }
            });
        });
    });
}

int layer_norm(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride, const void *weight,
               const void *bias, float eps, void *out) {
    return with_type(type, [&](auto t) {
        with_type(weight_type, [&](auto w) {
            constexpr int T = decltype(t)::value, W = decltype(w)::value, B = Element<T>::BYTES;
            over_rows(rows, size, [&](int64_t first, int64_t last) {
                auto line = static_cast<float *>(quire::scratch(0, (size + 64) * 4));
                for (int64_t r = first; r < last; r++) {
                    widen_row<T>(bytes(x) + r * stride * B, size, line);
                    const float mean = sum_of(line, size, [](Floats s, Floats x) { return s + x; }) / float(size);
                    for (int64_t i = 0; i < size; i += LANES) store(line + i, load<Floats>(line + i) - all(mean));
                    for (int64_t i = size; i % LANES; i++) line[i] = 0;
                    const float squares = sum_of(line, size, [](Floats s, Floats x) { return fma(x, x, s); });
                    const Floats factor = all(1.0f / std::sqrt(squares / float(size) + eps));
                    for (int64_t i = 0; i < size; i += LANES) {
                        Floats value = load<Floats>(line + i) * factor;
                        if (weight) value = value * read<W>(bytes(weight), i, size);
                        if (bias) value = value + read<W>(bytes(bias), i, size);
                        write<T>(bytes(out) + r * size * B, i, size, value);
                    }
                }
            });
        });
    });
}

// ---- rotation --------------------------------------------------------------------------------------------------------

// One head: x [size] turned by cos, sin [half] into out; may be the same place.
template <int type>
INLINE void turn(const uint8_t *x, int64_t size, int64_t half, const uint8_t *cos, const uint8_t *sin, uint8_t *out) {
    constexpr int B = Element<type>::BYTES;
    for (int64_t i = 0; i < half; i += LANES) {
        Floats first = read<type>(x, i, half), second = read<type>(x + half * B, i, half);
        Floats c = read<QUIRE_F32>(cos, i, half), s = read<QUIRE_F32>(sin, i, half);
        write<type>(out, i, half, first * c - second * s);
        write<type>(out + half * B, i, half, second * c + first * s);
    }
    if (x != out) std::memcpy(out + 2 * half * B, x + 2 * half * B, size_t(size - 2 * half) * B);
}

int rope(int type, int64_t tokens, int64_t heads, int64_t size, int64_t half, const void *x, int64_t token_stride,
         int64_t head_stride, const float *cos, const float *sin, void *out) {
    if (2 * half > size) return -1;
    return with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value, B = Element<T>::BYTES;
        over_rows(tokens, heads * size, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; r++)
                for (int64_t h = 0; h < heads; h++)
                    turn<T>(bytes(x) + (r * token_stride + h * head_stride) * B, size, half, bytes(cos + r * half),
                            bytes(sin + r * half), bytes(out) + (r * heads + h) * size * B);
        });
    });
}

// ---- the cache -------------------------------------------------------------------------------------------------------

using Widen = void (*)(const uint8_t *, int64_t, float *);
using Keep = void (*)(const float *, int64_t, float, uint8_t *);

template <int type> void widen_head(const uint8_t *x, int64_t size, float *out) {
    for (int64_t i = 0; i < size; i += LANES) store(out + i, read<type>(x, i, size));
}

template <int cache> void keep_head(const float *x, int64_t size, float scale, uint8_t *out) {
    const Floats divisor = all(scale);
    for (int64_t i = 0; i < size; i += LANES) write<cache>(out, i, size, load<Floats>(x + i) / divisor);
}

// How rows of heads go into a cache: as they are, or divided by the head's scale and rounded to the cache's type.
struct Writer {
    const quire_kv &kv;
    int type, each, cache_each;
    Widen widen = nullptr;
    Keep keep = nullptr;

    Writer(const quire_kv &kv, int type)
        : kv(kv), type(type), each(bytes_of_type(type)), cache_each(bytes_of_type(kv.type)) {
        with_type(type, [&](auto t) { widen = widen_head<decltype(t)::value>; });
        with_cache_type(kv.type, [&](auto c) { keep = keep_head<decltype(c)::value>; });
    }

    bool sound(int64_t tokens, const int64_t *slots) const {
        for (int64_t r = 0; r < tokens; r++)
            if (slots[r] < 0 || slots[r] >= kv.slots) return false;
        return widen && keep;
    }

    void write(bool key, int64_t slot, const uint8_t *x, int64_t head_stride) const {
        const int64_t place = slot * (key ? kv.k_token : kv.v_token), stride = key ? kv.k_head : kv.v_head;
        uint8_t *to = bytes(key ? kv.keys : kv.values) + place * cache_each;
        auto line = static_cast<float *>(quire::scratch(1, up(kv.size, LANES) * 4));
        for (int64_t h = 0; h < kv.kv_heads; h++, x += head_stride * each, to += stride * cache_each) {
            if (type == kv.type && !kv.scales) {
                std::memcpy(to, x, size_t(kv.size * each));
                continue;
            }
            widen(x, kv.size, line);
            keep(line, kv.size, kv.scales ? kv.scales[(key ? 0 : kv.kv_heads) + h] : 1.0f, to);
        }
    }
};

const uint8_t *row_of(const quire_heads &x, int64_t row, int each) { return bytes(x.data) + row * x.token * each; }

int write_kv(const quire_kv *kv, int type, int64_t tokens, const quire_heads *k, const quire_heads *v,
             const int64_t *slots) {
    const Writer writer(*kv, type);
    if (!writer.sound(tokens, slots)) return -1;
    over_rows(tokens, 2 * kv->kv_heads * kv->size, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            writer.write(true, slots[r], row_of(*k, r, writer.each), k->head);
            writer.write(false, slots[r], row_of(*v, r, writer.each), v->head);
        }
    });
    return 0;
}

int rope_and_write(const quire_kv *kv, int type, int64_t tokens, int64_t heads, int64_t half, const quire_heads *q,
                   const quire_heads *k, const quire_heads *v, const float *cos, const float *sin, const int64_t *slots) {
    const int64_t size = kv->size;
    const Writer writer(*kv, type);
    if (2 * half > size || !writer.sound(tokens, slots)) return -1;
    return with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value, B = Element<T>::BYTES;
        over_rows(tokens, (heads + 2 * kv->kv_heads) * size, [&](int64_t first, int64_t last) {
            auto turned = static_cast<uint8_t *>(quire::scratch(0, kv->kv_heads * size * B));
            for (int64_t r = first; r < last; r++) {
                const uint8_t *c = bytes(cos + r * half), *s = bytes(sin + r * half);
                for (int64_t h = 0; h < heads; h++) {
                    uint8_t *x = bytes(q->data) + (r * q->token + h * q->head) * B;
                    turn<T>(x, size, half, c, s, x);
                }
                for (int64_t h = 0; h < kv->kv_heads; h++)
                    turn<T>(row_of(*k, r, B) + h * k->head * B, size, half, c, s, turned + h * size * B);
                writer.write(true, slots[r], turned, size);
                writer.write(false, slots[r], row_of(*v, r, B), v->head);
            }
        });
    });
}

// ---- activations -----------------------------------------------------------------------------------------------------

template <int kind> INLINE Floats activate(Floats x) {
    if (kind == QUIRE_SILU) return x / (1.0f + exp(-x));
    if (kind == QUIRE_GELU) return 0.5f * x * (1.0f + erf(x * 0.70710678f));
    if (kind == QUIRE_GELU_TANH) return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    return x < 0.0f ? Floats{} : x;
}

template <int type, int kind>
void activate_rows(int64_t rows, int64_t size, const void *x, int64_t stride, const void *up, int64_t up_stride,
                   void *out) {
    constexpr int B = Element<type>::BYTES;
    over_rows(rows, 4 * size, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            const uint8_t *row = bytes(x) + r * stride * B, *factor = up ? bytes(up) + r * up_stride * B : nullptr;
            for (int64_t i = 0; i < size; i += LANES) {
                Floats value = activate<kind>(read<type>(row, i, size));
                if (up) value = value * read<type>(factor, i, size);
                write<type>(bytes(out) + r * size * B, i, size, value);
            }
        }
    });
}

int activation(int type, int kind, int64_t rows, int64_t size, const void *x, int64_t stride, const void *up,
               int64_t up_stride, void *out) {
    int known = 0;
    const int typed = with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value;
        switch (kind) {
        case QUIRE_SILU: return activate_rows<T, QUIRE_SILU>(rows, size, x, stride, up, up_stride, out);
        case QUIRE_GELU: return activate_rows<T, QUIRE_GELU>(rows, size, x, stride, up, up_stride, out);
        case QUIRE_GELU_TANH: return activate_rows<T, QUIRE_GELU_TANH>(rows, size, x, stride, up, up_stride, out);
        case QUIRE_RELU: return activate_rows<T, QUIRE_RELU>(rows, size, x, stride, up, up_stride, out);
        }
        known = -1;
    });
    return typed | known;
}

int add(int type, int64_t count, const void *x, const void *y, void *out) {
    constexpr int64_t ROW = 1024;
    return with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value;
        over_rows((count + ROW - 1) / ROW, ROW, [&](int64_t first, int64_t last) {
            const int64_t end = std::min(count, last * ROW);
            for (int64_t i = first * ROW; i < end; i += LANES)
                write<T>(bytes(out), i, end, read<T>(bytes(x), i, end) + read<T>(bytes(y), i, end));
        });
    });
}

// ---- table look-up ---------------------------------------------------------------------------------------------------

int gather_rows(int64_t rows, const int64_t *ids, const void *table, int64_t table_rows, int64_t row_bytes,
                int64_t stride_bytes, void *out) {
    for (int64_t r = 0; r < rows; r++)
        if (ids[r] < 0 || ids[r] >= table_rows) return -1;
    over_rows(rows, row_bytes / 4, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++)
            std::memcpy(bytes(out) + r * row_bytes, bytes(table) + ids[r] * stride_bytes, size_t(row_bytes));
    });
    return 0;
}

}  // namespace

void add_rows(quire::Kernels &kernels) {
    kernels.rms_norm = rms_norm;
    kernels.layer_norm = layer_norm;
    kernels.rope = rope;
    kernels.write_kv = write_kv;
    kernels.rope_and_write = rope_and_write;
    kernels.activation = activation;
    kernels.add = add;
    kernels.gather_rows = gather_rows;
}

}  // namespace QUIRE_ISA
