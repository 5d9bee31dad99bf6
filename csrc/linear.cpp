// Packed weights: how they are laid out, read back, and which way a product with them goes.
//
// A weight lies in panels of 32 outputs. For each input in turn a panel holds its 32 values (one cache line in bfloat16), so
// a product reads memory in one direction.
#include "linear.h"

#include <algorithm>

namespace QUIRE_ISA {
namespace {

int linears(int count, const quire_weight *const *weights, int type, int64_t rows, const void *x, int64_t x_stride,
            const void *const *biases, void *const *ys, const int64_t *y_strides) {
    if (!fits(type, count, weights)) return -1;
    if (rows == 0) return 0;
    const Product product{count, weights, type, rows, static_cast<const uint8_t *>(x), x_stride, biases, ys, y_strides};
    if (weights[0]->form == QUIRE_DENSE) return multiply_dense(product) ? 0 : -1;
    return multiply_integers(product), 0;
}

// ---- packing ---------------------------------------------------------------------------------------------------------

int paired_place(int output) { return output % 16 * 2 + output / 16; }

// Inputs [begin, end) of one output into its panel `to`.
void pack_output(const quire_weight &weight, const uint8_t *row, int o, int64_t begin, int64_t end, uint8_t *to) {
    if (weight.form == QUIRE_INT8) {
        for (int64_t i = begin; i < end; i++) to[(i / 4 * PANEL + o) * 4 + i % 4] = uint8_t(row[i] ^ 0x80);
    } else if (weight.form == QUIRE_INT4) {
        for (int64_t i = begin; i < end; i++) {
            const uint8_t half = row[i / 2] >> (i % 2 * 4) & 15;
            to[(i / 8 * PANEL + o) * 4 + i % 4] |= uint8_t(half << (i / 4 % 2 * 4));
        }
    } else if (weight.type == QUIRE_F32) {
        for (int64_t i = begin; i < end; i++) std::memcpy(to + (i * PANEL + o) * 4, row + i * 4, 4);
    } else if (weight.type == QUIRE_E4M3) {
        for (int64_t i = begin; i < end; i++) to[i * PANEL + paired_place(o)] = row[i];
    } else {
        const int place = weight.type == QUIRE_BF16 ? paired_place(o) : o;
        for (int64_t i = begin; i < end; i++) std::memcpy(to + (i * PANEL + place) * 2, row + i * 2, 2);
    }
}

int pack(const quire_weight *weight, const void *source, int64_t stride) {
    constexpr int64_t BLOCK = 128;  // inputs whose place in a panel stays in the first-level cache while outputs come and go
    const int64_t inputs = weight->inputs, outputs = weight->outputs, panels = up(outputs, PANEL) / PANEL;
    const int64_t panel_bytes = quire_packed_bytes(weight->form, weight->type, PANEL, inputs);
    if (panel_bytes < 0) return -1;
    if (weight->form == QUIRE_INT4 && (weight->group_size % 32 || inputs % weight->group_size)) return -1;
    const int64_t row_bytes = stride * (weight->form == QUIRE_DENSE ? bytes_of(weight->type) : 1);
    auto all = static_cast<uint8_t *>(weight->data);
    auto from = static_cast<const uint8_t *>(source);
    quire::parallel(panels, [&](int64_t p) {
        uint8_t *to = all + p * panel_bytes;
        const int count = int(std::min<int64_t>(PANEL, outputs - p * PANEL));
        if (count < PANEL || weight->form != QUIRE_DENSE)
            std::memset(to, weight->form == QUIRE_INT8 ? 128 : 0, size_t(panel_bytes));
        for (int64_t begin = 0; begin < inputs; begin += BLOCK)
            for (int o = 0; o < count; o++) {
                const uint8_t *row = from + (p * PANEL + o) * row_bytes;
                pack_output(*weight, row, o, begin, std::min(inputs, begin + BLOCK), to);
            }
    });
    return 0;
}

float unpacked(const quire_weight &weight, int64_t panel_bytes, int64_t output, int64_t i) {
    const int64_t p = output / PANEL, o = output % PANEL;
    const uint8_t *panel = static_cast<const uint8_t *>(weight.data) + p * panel_bytes;
    if (weight.form == QUIRE_INT8) return float(int(panel[(i / 4 * PANEL + o) * 4 + i % 4]) - 128) * weight.scales[output];
    if (weight.form == QUIRE_INT4) {
        const int64_t at = (p * (weight.inputs / weight.group_size) + i / weight.group_size) * PANEL + o;
        const int half = panel[(i / 8 * PANEL + o) * 4 + i % 4] >> (i / 4 % 2 * 4) & 15;
        return float(half - int(weight.zeros[at])) * weight.scales[at];
    }
    float value;
    if (weight.type == QUIRE_F32) {
        std::memcpy(&value, panel + (i * PANEL + o) * 4, 4);
    } else if (weight.type == QUIRE_E4M3) {
        value = from_e4m3(panel[i * PANEL + paired_place(int(o))]);
    } else {
        const int64_t place = weight.type == QUIRE_BF16 ? paired_place(int(o)) : o;
        uint16_t half;
        std::memcpy(&half, panel + (i * PANEL + place) * 2, 2);
        value = weight.type == QUIRE_BF16 ? from_bf16(half) : from_f16(half);
    }
    return weight.scales ? value * weight.scales[output] : value;
}

int weight_rows(const quire_weight *weight, int type, int64_t rows, const int64_t *ids, void *out) {
    const int64_t inputs = weight->inputs;
    const int64_t panel_bytes = quire_packed_bytes(weight->form, weight->type, PANEL, inputs);
    if (panel_bytes < 0 || type == QUIRE_E4M3) return -1;
    for (int64_t r = 0; r < rows; r++)
        if (ids[r] < 0 || ids[r] >= weight->outputs) return -1;
    quire::parallel(rows, [&](int64_t r) {
        auto line = static_cast<float *>(quire::scratch(1, inputs * 4));
        for (int64_t i = 0; i < inputs; i++) line[i] = unpacked(*weight, panel_bytes, ids[r], i);
        floats_to_row(type, line, inputs, static_cast<uint8_t *>(out) + r * inputs * bytes_of(type));
    });
    return 0;
}

}  // namespace

void add_linear(quire::Kernels &kernels) {
    kernels.pack = pack;
    kernels.linears = linears;
    kernels.weight_rows = weight_rows;
}

}  // namespace QUIRE_ISA
