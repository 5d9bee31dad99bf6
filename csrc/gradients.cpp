// Gradients of what acts on each row by itself (rows.cpp), with respect to the rows; the weights stay as they are. float32
// inside, a row's result from that row alone.
#include "functions.h"
#include "kernels.h"
#include "lines.h"

namespace QUIRE_ISA {
namespace {

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// ---- norms -----------------------------------------------------------------------------------------------------------

// dy times the weight (plus offset), filled up with zeros.
template <int type, int weights>
INLINE void weigh_row(const uint8_t *dy, const uint8_t *weight, float offset, int64_t size, float *out) {
    widen_row<type>(dy, size, out);
    if (weight)
        for (int64_t i = 0; i < size; i += LANES)
            store(out + i, load<Floats>(out + i) * (read<weights>(weight, i, size) + offset));
}

// Calls body(line of x, line of dy, r) for each row, whose lines have room up to a multiple of 64.
template <class Body> void over_pairs(int64_t rows, int64_t size, const Body &body) {
    over_rows(rows, 2 * size, [&](int64_t first, int64_t last) {
        const int64_t room = up(size, 64);
        auto line = static_cast<float *>(quire::scratch(0, 2 * room * 4));
        for (int64_t r = first; r < last; r++) body(line, line + room, r);
    });
}

// sum of a[i] * b[i]
INLINE float sum_of_products(const float *a, const float *b, int64_t size) {
    return sum_along(size, [&](Floats s, int64_t i) { return fma(load<Floats>(a + i), load<Floats>(b + i), s); });
}

// With f = 1 / sqrt(mean(x^2) + eps) and g = dy * (weight + offset): dx = f g - x f^3 mean(g x).
int rms_norm_backward(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride, const void *dy,
                      int64_t dy_stride, const void *weight, float eps, float offset, void *dx) {
    return with_type(type, [&](auto t) {
        with_type(weight_type, [&](auto w) {
            constexpr int T = decltype(t)::value, W = decltype(w)::value, B = Element<T>::BYTES;
            over_pairs(rows, size, [&](float *line, float *g, int64_t r) {
                widen_row<T>(bytes(x) + r * stride * B, size, line);
                weigh_row<T, W>(bytes(dy) + r * dy_stride * B, bytes(weight), offset, size, g);
                const float factor = 1.0f / std::sqrt(sum_of_products(line, line, size) / float(size) + eps);
                const float pull = factor * factor * factor * (sum_of_products(g, line, size) / float(size));
                for (int64_t i = 0; i < size; i += LANES)
                    write<T>(bytes(dx) + r * size * B, i, size, load<Floats>(g + i) * factor - load<Floats>(line + i) * pull);
            });
        });
    });
}

// With c = x - mean(x), f = 1 / sqrt(mean(c^2) + eps), g = dy * weight: dx = f (g - mean(g)) - c f^3 mean(g c).
int layer_norm_backward(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride, const void *dy,
                        int64_t dy_stride, const void *weight, float eps, void *dx) {
    const auto plus = [](Floats s, Floats v) { return s + v; };
    return with_type(type, [&](auto t) {
        with_type(weight_type, [&](auto w) {
            constexpr int T = decltype(t)::value, W = decltype(w)::value, B = Element<T>::BYTES;
            over_pairs(rows, size, [&](float *line, float *g, int64_t r) {
                widen_row<T>(bytes(x) + r * stride * B, size, line);
                weigh_row<T, W>(bytes(dy) + r * dy_stride * B, bytes(weight), 0.0f, size, g);
                const float mean = sum_of(line, size, plus) / float(size), shift = sum_of(g, size, plus) / float(size);
                for (int64_t i = 0; i < size; i += LANES) store(line + i, load<Floats>(line + i) - all(mean));
                for (int64_t i = size; i % LANES; i++) line[i] = 0;
                const float factor = 1.0f / std::sqrt(sum_of_products(line, line, size) / float(size) + eps);
                const float pull = factor * factor * factor * (sum_of_products(g, line, size) / float(size));
                for (int64_t i = 0; i < size; i += LANES)
                    write<T>(bytes(dx) + r * size * B, i, size,
                             (load<Floats>(g + i) - shift) * factor - load<Floats>(line + i) * pull);
            });
        });
    });
}

// ---- activations -----------------------------------------------------------------------------------------------------

struct Slope {
    Floats value, slope;
};

template <int kind> INLINE Slope slope_of(Floats x) {
    if (kind == QUIRE_SILU) {
        const Floats s = 1.0f / (1.0f + exp(-x));
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    if (kind == QUIRE_GELU) {
        const Floats half = 0.5f * (1.0f + erf(x * 0.70710678f));
        return {x * half, half + x * 0.39894228f * exp(-0.5f * x * x)};
    }
    if (kind == QUIRE_GELU_TANH) {
        const Floats t = tanh(0.79788456f * (x + 0.044715f * x * x * x)), half = 0.5f * (1.0f + t);
        const Floats bend = 0.5f * (1.0f - t * t) * (0.79788456f * (1.0f + 0.134145f * x * x));
        return {x * half, t * t == 1.0f ? half : half + x * bend};  // where x^2 overflows, the bend is 0
    }
    return {x < 0.0f ? Floats{} : x, x < 0.0f ? Floats{} : all(1.0f)};
}

template <int type, int kind>
void slope_rows(int64_t rows, int64_t size, const void *x, int64_t stride, const void *up_rows, int64_t up_stride,
                const void *dy, int64_t dy_stride, void *dx, void *dup) {
    constexpr int B = Element<type>::BYTES;
    over_rows(rows, 8 * size, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            const uint8_t *row = bytes(x) + r * stride * B, *gradient = bytes(dy) + r * dy_stride * B;
            const uint8_t *factor = up_rows ? bytes(up_rows) + r * up_stride * B : nullptr;
            for (int64_t i = 0; i < size; i += LANES) {
                const Slope found = slope_of<kind>(read<type>(row, i, size));
                Floats g = read<type>(gradient, i, size);
                if (dup) write<type>(bytes(dup) + r * size * B, i, size, g * found.value);
                if (factor) g = g * read<type>(factor, i, size);
                if (dx) write<type>(bytes(dx) + r * size * B, i, size, g * found.slope);
            }
        }
    });
}

int activation_backward(int type, int kind, int64_t rows, int64_t size, const void *x, int64_t stride, const void *up_rows,
                        int64_t up_stride, const void *dy, int64_t dy_stride, void *dx, void *dup) {
    int known = 0;
    const int typed = with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value;
        auto run = [&](auto k) {
            slope_rows<T, decltype(k)::value>(rows, size, x, stride, up_rows, up_stride, dy, dy_stride, dx, dup);
        };
        switch (kind) {
        case QUIRE_SILU: return run(Type<QUIRE_SILU>());
        case QUIRE_GELU: return run(Type<QUIRE_GELU>());
        case QUIRE_GELU_TANH: return run(Type<QUIRE_GELU_TANH>());
        case QUIRE_RELU: return run(Type<QUIRE_RELU>());
        }
        known = -1;
    });
    return typed | known;
}

}  // namespace

void add_gradients(quire::Kernels &kernels) {
    kernels.rms_norm_backward = rms_norm_backward;
    kernels.layer_norm_backward = layer_norm_backward;
    kernels.activation_backward = activation_backward;
}

}  // namespace QUIRE_ISA
