// Sums over a vocabulary: what log-probabilities are made of, in serving and in training, and the gradient of the
// cross-entropy.
#include "kernels.h"
#include "masses.h"

namespace QUIRE_ISA {
namespace {

int peaks_of_rows(int type, int64_t rows, int64_t size, const void *x, int64_t stride, float *peaks, int64_t *ids) {
    if (size < 1) return -1;
    return with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value, B = Element<T>::BYTES;
        over_rows(rows, size, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; r++) {
                const Largest found = largest_of<T>(bytes(x) + r * stride * B, size, nullptr);
                peaks[r] = found.value, ids[r] = found.id;
            }
        });
    });
}

// One row's probabilities less 1 at the target; may be written over the row itself.
template <int type>
void slope_of_row(const uint8_t *row, int64_t size, float peak, int64_t mass, int64_t target, uint8_t *slope) {
    const Floats share = all(float(ONE / double(mass)));
    for (int64_t i = 0; i < size; i += LANES) {
        Floats p = weight_of(logits_at<type>(row, i, size), all(peak), all(LOG2_E)) * share;
        if (uint64_t(target - i) < LANES) p[target - i] -= 1.0f;
        write<type>(slope, i, size, p);
    }
}

int cross_entropy(int type, int64_t rows, int64_t size, const void *x, int64_t stride, const int64_t *targets, float *peaks,
                  int64_t *masses, void *slope, int64_t slope_stride) {
    if (size < 1 || size > MOST_TOKENS) return -1;
    for (int64_t r = 0; slope && r < rows; r++)
        if (targets[r] < 0 || targets[r] >= size) return -1;
    return with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value, B = Element<T>::BYTES;
        over_rows(rows, 8 * size, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; r++) {
                const uint8_t *row = bytes(x) + r * stride * B;
                uint8_t *out = slope ? bytes(slope) + r * slope_stride * B : nullptr;
                const Largest most = largest_of<T>(row, size, nullptr);
                peaks[r] = most.value;
                masses[r] = most.sound() ? mass_of_row<T>(row, size, most.value, LOG2_E, 0.0f, nullptr) : 0;
                if (out && most.sound()) slope_of_row<T>(row, size, most.value, masses[r], targets[r], out);
                for (int64_t i = 0; out && !most.sound() && i < size; i += LANES) write<T>(out, i, size, all(NAN));
            }
        });
    });
}

int masses_of_rows(int type, int64_t rows, int64_t size, const void *x, int64_t stride, float *peaks, int64_t *masses) {
    return cross_entropy(type, rows, size, x, stride, nullptr, peaks, masses, nullptr, 0);
}

}  // namespace

void add_loss(quire::Kernels &kernels) {
    kernels.peaks = peaks_of_rows;
    kernels.masses = masses_of_rows;
    kernels.cross_entropy = cross_entropy;
}

}  // namespace QUIRE_ISA
