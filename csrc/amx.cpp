// Products with packed weights on AMX's tiles: 32 rows by 32 outputs at a time, one way for every number of rows.
//
// The panels are linear.cpp's, so a weight may be packed before the instruction set is chosen. A step is what one tile takes:
// 32 inputs in bfloat16, 64 (or 32) in bytes. INT8's panels are loaded as they lie; the others are turned into tiles step by
// step, bfloat16 by pairing the inputs, FP8 and INT4 by decoding: once for all rows where they are a band, else a block of
// steps that bands pass over. Every output adds its steps in ascending order; where it is put aside between two blocks it is
// stored whole. Integers are exact and scaled as integers.cpp scales them, so they give its bits; bfloat16 does not, as a
// step's pairs are summed inside the tile.
//
// What has no tiles (float32 and float16, of x or of weights) goes to the next instruction set.
#include "linear.h"
#include "tiles.h"

namespace QUIRE_ISA {
namespace {

constexpr int BAND = 2 * TILE_ROWS;                    // rows of x that pass together
constexpr int64_t STEP_BYTES = TILE_ROWS * PANEL * 4;  // a step of a panel: 16 lines, each of 32 outputs' pairs or fours
constexpr int64_t AHEAD = 3072;                        // bytes between a read and its prefetch
constexpr int64_t FEW_BANDS = 4;                       // until here reading the weight is what takes the time
constexpr int64_t BLOCK_STEPS = 8;                     // with those of a band's rows they fill the first-level cache
constexpr int64_t MANY_PANELS = 8, MANY_BANDS = 16;    // they share what lies in the second-level cache
constexpr int64_t STREAMED = int64_t(8) << 20;         // bytes of a result that no cache keeps: its lines are not read first
constexpr int64_t TASKS_PER_THREAD = 4;

// x in tiles: [band][step][half band][16 rows][bytes of a step], zeros past the inputs. For integers also the rows' scales
// and sums, [row, groups].
struct Rows {
    int64_t steps, bytes, groups;
    uint8_t *values;
    float *scales;
    int32_t *sums;
    const uint8_t *step(int64_t band, int64_t s) const { return values + (band * steps + s) * BAND * bytes; }
};

struct Dots {
    static constexpr int BF16 = 0, SIGNED = 1, UNSIGNED = 2;
};

template <int kind, int C, int A, int B> INLINE void dot() {
    if constexpr (kind == Dots::BF16) dot_bf16<C, A, B>();
    if constexpr (kind == Dots::SIGNED) dot_signed<C, A, B>();
    if constexpr (kind == Dots::UNSIGNED) dot_unsigned<C, A, B>();
}

// sums [32, 32] = or += a band of rows times weights over steps [first, end): weights(s) is the tile of step s.
template <int kind, bool BOTH, class Weights>
void multiply(const Rows &x, int64_t band, int64_t first, int64_t end, const Weights &weights, void *sums, bool add) {
    constexpr int64_t LINE = PANEL * 4;  // of sums and of the weights
    auto c = static_cast<uint8_t *>(sums), lower = c + TILE_ROWS * LINE;
    if (add) {
        load_tile<0>(c, LINE), load_tile<1>(c + TILE_BYTES, LINE);
        if constexpr (BOTH) load_tile<2>(lower, LINE), load_tile<3>(lower + TILE_BYTES, LINE);
    } else {
        zero<0>(), zero<1>();
        if constexpr (BOTH) zero<2>(), zero<3>();
    }
    const int64_t half = TILE_ROWS * x.bytes;
    const uint8_t *a = x.step(band, first);
    for (int64_t s = first; s < end; s++, a += 2 * half) {
        const uint8_t *b = weights(s);
        load_tile<4>(a, x.bytes);
        load_tile<6>(b, LINE);
        dot<kind, 0, 4, 6>();
        load_tile<7>(b + TILE_BYTES, LINE);
        dot<kind, 1, 4, 7>();
        if constexpr (BOTH) {
            load_tile<5>(a + half, x.bytes);
            dot<kind, 2, 5, 6>();
            dot<kind, 3, 5, 7>();
        }
    }
    store_tile<0>(c, LINE), store_tile<1>(c + TILE_BYTES, LINE);
    if constexpr (BOTH) store_tile<2>(lower, LINE), store_tile<3>(lower + TILE_BYTES, LINE);
}

template <int kind, class Weights>
void multiply(Tiles &tiles, const Rows &x, int64_t band, int rows, int64_t first, int64_t end, const Weights &weights,
              void *sums, bool add) {
    tiles.shape(rows, int(x.bytes));
    if (rows > TILE_ROWS)
        multiply<kind, true>(x, band, first, end, weights, sums, add);
    else
        multiply<kind, false>(x, band, first, end, weights, sums, add);
}

// What memory brings next, for the second-level cache: where the first one's few pending lines are not waited for.
INLINE void fetch(const uint8_t *from) { __builtin_prefetch(from, 0, 2); }

// ---- the forms: how a panel becomes tiles, and what its sums become ---------------------------------------------------

// A form has
//   x: the rows in tiles;
//   unit(): blocks have a multiple of so many steps;
//   raw(weight, panel, step): where the panel's inputs from that step on begin, raw_step() bytes for each step;
//   tile(weight, panel, step, room): a step as a tile, in the weight itself or in room; fetches what lies AHEAD;
//   add(...): the products of steps [first, end), added to the sums of a band, where weights(step) is a step's tile;
//   finish(...): the sums' way into y.

// 16 rows to a task, read side by side. fill(row, room) gives the row's bytes up to a whole step, made in room or not.
template <class Fill> Rows rows_in_tiles(int64_t rows, int64_t steps, int64_t bytes, const Fill &fill) {
    Rows out = {steps, bytes, 1, nullptr, nullptr, nullptr};
    out.values = static_cast<uint8_t *>(quire::scratch(0, up(rows, BAND) * steps * bytes));
    quire::parallel(up(rows, TILE_ROWS) / TILE_ROWS, [&](int64_t task) {
        const int64_t first = task * TILE_ROWS, count = std::min<int64_t>(TILE_ROWS, rows - first);
        const int64_t size = up(steps * bytes, 64);
        auto room = static_cast<uint8_t *>(quire::scratch(6, TILE_ROWS * size));
        const uint8_t *lines[TILE_ROWS];
        for (int64_t r = 0; r < count; r++) lines[r] = fill(first + r, room + r * size);
        uint8_t *to = out.values + (first / BAND * steps * BAND + first % BAND) * bytes;
        for (int64_t s = 0; s < steps; s++, to += BAND * bytes)
            for (int64_t r = 0; r < count; r++) std::memcpy(to + r * bytes, lines[r] + s * bytes, size_t(bytes));
    });
    return out;
}

// Rows of a panel into y: value(row of the band, output of the panel) are LANES floats, to which the bias is added. (The
// instruction that rounds to bfloat16 makes 0 of what is below the smallest normal number.)
template <class Value> void finish_rows(const Product &product, int w, int64_t p, int64_t row, int rows, const Value &value) {
    const int64_t start = p * PANEL, size = bytes_of(product.type);
    const int64_t count = std::min<int64_t>(PANEL, product.weights[w]->outputs - start);
    alignas(64) float bias[PANEL] = {}, line[PANEL];
    const bool biased = product.biases[w], streamed = product.rows * product.y_strides[w] * size >= STREAMED;
    if (biased) row_to_floats(product.type, static_cast<const uint8_t *>(product.biases[w]) + start * size, count, bias);
    const Floats left_bias = load<Floats>(bias), right_bias = load<Floats>(bias + LANES);
    auto to = static_cast<uint8_t *>(product.ys[w]) + (row * product.y_strides[w] + start) * size;
    for (int r = 0; r < rows; r++, to += product.y_strides[w] * size) {
        Floats left = value(r, 0), right = value(r, LANES);
        if (biased) left += left_bias, right += right_bias;
        if (product.type == QUIRE_BF16 && count == PANEL) {
            const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
            if (streamed && uintptr_t(to) % 64 == 0)
                _mm512_stream_si512(reinterpret_cast<__m512i *>(to), halves);
            else
                store(to, halves);
        } else {
            store(line, left), store(line + LANES, right);
            floats_to_row(product.type, line, count, to);
        }
    }
}

// Line i of a bfloat16 panel holds input i, outputs o and o + 16 in a word; a tile's line the inputs 2i and 2i + 1.
struct Bf16 {
    static constexpr int64_t INPUT = PANEL * 2;
    static INLINE void pair(const uint8_t *from, bool both, uint8_t *to) {
        const Words even = load<Words>(from), odd = both ? load<Words>(from + INPUT) : Words{};
        store(to, (even & 0xffffu) | odd << 16);
        store(to + TILE_BYTES, even >> 16 | (odd & 0xffff0000u));
    }
};

// The upper and lower byte, as bfloat16, of all 128 sizes of FP8; and which of 128 bytes, the lower ones of two inputs and then
// the upper ones, make each half of the outputs. Made by the compiler: nothing here may run when the library is loaded.
struct Fp8Tables {
    alignas(64) uint8_t low[128] = {}, high[128] = {};
    alignas(64) uint8_t order[2][TILE_BYTES] = {};
    constexpr Fp8Tables() {
        constexpr uint16_t small[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // i * 2^-9
        for (int i = 0; i < 128; i++) {
            const int half = i < 8 ? small[i] : i == 127 ? 0x7fc0 : (i << 4) + (120 << 7);
            low[i] = uint8_t(half & 0xff), high[i] = uint8_t(half >> 8);
        }
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < TILE_BYTES; i++) order[h][i] = uint8_t(i % 2 * 64 + i / 2 % 2 * PANEL + i / 4 * 2 + h);
    }
};
constexpr Fp8Tables fp8;

struct E4m3 {
    static constexpr int64_t INPUT = PANEL;
    static INLINE void pair(const uint8_t *from, bool both, uint8_t *to) {
        const auto table = [](const uint8_t *p) { return load<__m512i>(p); };
        const __m512i u = both ? load<__m512i>(from) : _mm512_zextsi256_si512(load<__m256i>(from));
        const __m512i low = _mm512_permutex2var_epi8(table(fp8.low), u, table(fp8.low + 64));
        const __m512i size = _mm512_permutex2var_epi8(table(fp8.high), u, table(fp8.high + 64));
        const __m512i high = _mm512_or_si512(size, _mm512_and_si512(u, _mm512_set1_epi8(char(0x80))));
        store(to, _mm512_permutex2var_epi8(low, table(fp8.order[0]), high));
        store(to + TILE_BYTES, _mm512_permutex2var_epi8(low, table(fp8.order[1]), high));
    }
};

template <class Values> struct Dense {
    static constexpr int kind = Dots::BF16;
    static constexpr int64_t STEP = TILE_BYTES / 2;  // inputs of a step
    const Product &product;
    int64_t inputs = product.weights[0]->inputs;
    Rows x = rows_in_tiles(product.rows, up(inputs, STEP) / STEP, TILE_BYTES, [this](int64_t r, uint8_t *room) {
        if (inputs % STEP == 0) return static_cast<const uint8_t *>(product.row(r));
        std::memcpy(room, product.row(r), size_t(inputs) * 2);
        std::memset(room + inputs * 2, 0, size_t(up(inputs, STEP) - inputs) * 2);
        return static_cast<const uint8_t *>(room);
    });

    int64_t unit() const { return 1; }
    const uint8_t *raw(int w, int64_t p, int64_t step) const {
        return static_cast<const uint8_t *>(product.weights[w]->data) + (p * inputs + step * STEP) * Values::INPUT;
    }
    int64_t raw_step() const { return STEP * Values::INPUT; }
    const uint8_t *tile(int w, int64_t p, int64_t step, uint8_t *room) const {
        const uint8_t *from = raw(w, p, step);
        const int64_t count = std::min(STEP, inputs - step * STEP);
        uint8_t *to = room;
        for (int64_t i = 0; i + 1 < count; i += 2, from += 2 * Values::INPUT, to += 2 * TILE_BYTES) {
            for (int64_t line = 0; line < 2 * Values::INPUT; line += 64) fetch(from + AHEAD + line);
            Values::pair(from, true, to);
        }
        if (count % 2) Values::pair(from, false, to), to += 2 * TILE_BYTES;
        if (count < STEP) std::memset(to, 0, size_t(room + STEP_BYTES - to));
        return room;
    }
    template <class Weights>
    void add(Tiles &tiles, int, int64_t, int64_t band, int rows, int64_t first, int64_t end, const Weights &weights,
             float *sums) const {
        multiply<kind>(tiles, x, band, rows, first, end, weights, sums, first > 0);
    }
    void finish(int w, int64_t p, int64_t row, int rows, const float *sums) const {
        const float *scales = product.weights[w]->scales;
        if (!scales)
            return finish_rows(product, w, p, row, rows, [&](int r, int o) { return load<Floats>(sums + r * PANEL + o); });
        alignas(64) float scale[PANEL] = {};
        std::memcpy(scale, scales + p * PANEL, size_t(std::min<int64_t>(PANEL, product.weights[w]->outputs - p * PANEL)) * 4);
        finish_rows(product, w, p, row, rows,
                    [&](int r, int o) { return load<Floats>(sums + r * PANEL + o) * load<Floats>(scale + o); });
    }
};

// x as bytes with a scale for each group of inputs.
Rows quantized(const Product &product, int64_t inputs, int64_t group, int64_t bytes) {
    const int64_t groups = (inputs + group - 1) / group, steps = up(inputs, bytes) / bytes;
    auto scales = static_cast<float *>(quire::scratch(4, product.rows * groups * 4));
    auto sums = static_cast<int32_t *>(quire::scratch(5, product.rows * groups * 4));
    Rows out = rows_in_tiles(product.rows, steps, bytes, [&](int64_t r, uint8_t *room) -> const uint8_t * {
        const int64_t whole = up(inputs, LANES);
        auto line = static_cast<float *>(quire::scratch(1, whole * 4));
        row_to_floats(product.type, product.row(r), inputs, line);
        std::fill(line + inputs, line + whole, 0.0f);
        for (int64_t g = 0; g < groups; g++)
            quantize_row(line + g * group, std::min(group, inputs - g * group), reinterpret_cast<int8_t *>(room) + g * group,
                         scales + r * groups + g, sums + r * groups + g);
        if (steps * bytes > whole) std::memset(room + whole, 0, size_t(steps * bytes - whole));
        return room;
    });
    out.groups = groups, out.scales = scales, out.sums = sums;
    return out;
}

struct Int8 {
    static constexpr int kind = Dots::UNSIGNED;
    const Product &product;
    int64_t inputs = product.weights[0]->inputs, panel_bytes = up(inputs, 4) * PANEL;
    Rows x = quantized(product, inputs, inputs, TILE_BYTES);

    int64_t unit() const { return 1; }
    const uint8_t *raw(int w, int64_t p, int64_t step) const {
        return static_cast<const uint8_t *>(product.weights[w]->data) + p * panel_bytes + step * STEP_BYTES;
    }
    int64_t raw_step() const { return STEP_BYTES; }
    const uint8_t *tile(int w, int64_t p, int64_t step, uint8_t *room) const {
        const uint8_t *from = raw(w, p, step);
        for (int64_t line = 0; line < STEP_BYTES; line += 64) fetch(from + AHEAD + line);
        const int64_t rest = panel_bytes - step * STEP_BYTES;
        if (rest >= STEP_BYTES) return from;
        std::memcpy(room, from, size_t(rest));
        std::memset(room + rest, 0, size_t(STEP_BYTES - rest));
        return room;
    }
    template <class Weights>
    void add(Tiles &tiles, int, int64_t, int64_t band, int rows, int64_t first, int64_t end, const Weights &weights,
             float *sums) const {
        multiply<kind>(tiles, x, band, rows, first, end, weights, sums, first > 0);
    }
    void finish(int w, int64_t p, int64_t row, int rows, const float *sums) const {
        const float *scales = product.weights[w]->scales + p * PANEL;
        finish_rows(product, w, p, row, rows, [&](int r, int o) {  // as Worth()
            const Ints exact = load<Ints>(sums + r * PANEL + o) - all_ints(128) * x.sums[row + r];
            return Floats{} + to_float(exact) * (all(x.scales[row + r]) * load<Floats>(scales + o));
        });
    }
};

// Weights less their zeros, -15 to 15, so that a group's sum is final.
struct Int4 {
    static constexpr int kind = Dots::SIGNED;
    const Product &product;
    int64_t inputs = product.weights[0]->inputs, group = product.weights[0]->group_size;
    int64_t bytes = group % TILE_BYTES ? TILE_BYTES / 2 : TILE_BYTES;  // of a step, which is within a group
    Rows x = quantized(product, inputs, group, bytes);

    int64_t unit() const { return group / bytes; }
    const uint8_t *raw(int w, int64_t p, int64_t step) const {
        return static_cast<const uint8_t *>(product.weights[w]->data) + (p * inputs + step * bytes) * PANEL / 2;
    }
    int64_t raw_step() const { return bytes * PANEL / 2; }
    const uint8_t *tile(int w, int64_t p, int64_t step, uint8_t *room) const {
        const uint8_t *zeros = product.weights[w]->zeros + (p * x.groups + step / unit()) * PANEL, *from = raw(w, p, step);
        __m512i zero[2];
        for (int h = 0; h < 2; h++) zero[h] = (__m512i)(widen(load<Bytes>(zeros + h * LANES)) * 0x01010101u);
        uint8_t *to = room;
        for (int64_t i = 0; i < bytes; i += 8, from += PANEL * 4, to += PANEL * 8)
            for (int h = 0; h < 2; h++) {
                fetch(from + AHEAD + h * TILE_BYTES);
                const Words word = load<Words>(from + h * TILE_BYTES);
                store(to + h * TILE_BYTES, _mm512_sub_epi8((__m512i)(word & 0x0f0f0f0fu), zero[h]));
                store(to + PANEL * 4 + h * TILE_BYTES, _mm512_sub_epi8((__m512i)(word >> 4 & 0x0f0f0f0fu), zero[h]));
            }
        return room;
    }
    // While a group's sums are scaled, the tiles multiply the next one.
    template <class Weights>
    void add(Tiles &tiles, int w, int64_t p, int64_t band, int rows, int64_t first, int64_t end, const Weights &weights,
             float *sums) const {
        alignas(64) int32_t exact[2][BAND * PANEL];
        for (int64_t g = first / unit(); g <= end / unit(); g++) {
            const int64_t s = g * unit();
            if (s < end) multiply<kind>(tiles, x, band, rows, s, s + unit(), weights, exact[g % 2], false);
            if (s > first) scale(w, p, band, rows, g - 1, exact[(g - 1) % 2], sums);
        }
    }
    void scale(int w, int64_t p, int64_t band, int rows, int64_t g, const int32_t *exact, float *sums) const {
        const float *scales = product.weights[w]->scales + (p * x.groups + g) * PANEL;
        const Floats left = load<Floats>(scales), right = load<Floats>(scales + LANES);
        const float *own = x.scales + band * BAND * x.groups + g;
        for (int r = 0; r < rows; r++, sums += PANEL, exact += PANEL) {
            const Floats scale = all(own[r * x.groups]);
            const Floats before = g ? load<Floats>(sums) : Floats{}, other = g ? load<Floats>(sums + LANES) : Floats{};
            store(sums, before + to_float(load<Ints>(exact)) * (scale * left));
            store(sums + LANES, other + to_float(load<Ints>(exact + LANES)) * (scale * right));
        }
    }
    void finish(int w, int64_t p, int64_t row, int rows, const float *sums) const {
        finish_rows(product, w, p, row, rows, [&](int r, int o) { return load<Floats>(sums + r * PANEL + o); });
    }
};

// ---- the loops -------------------------------------------------------------------------------------------------------

// One band: a panel's steps are tiles one after the other, its sums stay in the tiles.
template <class Form> void run_band(const Product &product, const Form &form) {
    const int rows = int(product.rows);
    product.over_panels(1, FEW_ROWS_TASKS, [&](int w, int64_t p, int64_t end, int64_t) {
        alignas(64) uint8_t room[STEP_BYTES];
        alignas(64) float sums[BAND * PANEL];
        Tiles tiles;
        for (; p < end; p++) {
            form.add(tiles, w, p, 0, rows, 0, form.x.steps, [&](int64_t step) { return form.tile(w, p, step, room); }, sums);
            form.finish(w, p, 0, rows, sums);
        }
    });
}

// More bands: for few of them one panel at a time from front to back; for many, blocks of bands and panels that fill caches.
template <class Form> void run_bands(const Product &product, const Form &form) {
    const int64_t bands = up(product.rows, BAND) / BAND, steps = form.x.steps, size = form.x.bytes * PANEL;
    const bool many = bands > FEW_BANDS;
    const int64_t blocks = many ? (bands + MANY_BANDS - 1) / MANY_BANDS : 1, most_bands = (bands + blocks - 1) / blocks;
    int64_t panels = 0;
    for (int w = 0; w < product.count; w++) panels += product.panels(w);
    const int64_t even = panels * blocks / (quire::threads() * TASKS_PER_THREAD);
    const int64_t span = std::min(steps, up(BLOCK_STEPS, form.unit()));
    const int64_t together = many ? std::max<int64_t>(1, std::min(MANY_PANELS, even)) : 1;

    product.over_panels(blocks, many ? INT64_MAX : FEW_ROWS_TASKS, [&](int w, int64_t p, int64_t end, int64_t block) {
        const int64_t first = bands * block / blocks, last = bands * (block + 1) / blocks;
        auto turned = static_cast<uint8_t *>(quire::scratch(3, span * size));
        auto made = static_cast<const uint8_t **>(quire::scratch(7, span * 8));
        auto sums = static_cast<float *>(quire::scratch(2, together * most_bands * BAND * PANEL * 4));
        // A band's share of what comes next, for each of its steps.
        const int64_t lines = (form.raw_step() / 64 + last - first - 1) / (last - first);
        Tiles tiles;
        for (; p < end; p += together)
            for (int64_t step = 0; step < steps; step += span) {
                const int64_t count = std::min(span, steps - step);
                const bool more = step + count < steps;
                for (int64_t g = 0; g < std::min(together, end - p); g++) {
                    for (int64_t s = 0; s < count; s++) made[s] = form.tile(w, p + g, step + s, turned + s * size);
                    const uint8_t *next = more ? form.raw(w, p + g, step + count) : form.raw(w, p + together + g, 0);
                    for (int64_t band = first; band < last; band++) {
                        const int rows = int(std::min<int64_t>(BAND, product.rows - band * BAND));
                        float *own = sums + ((band - first) * together + g) * BAND * PANEL;
                        form.add(tiles, w, p + g, band, rows, step, step + count, [&](int64_t s) {
                            for (int64_t line = 0; line < lines; line++, next += 64) fetch(next);
                            return made[s - step];
                        }, own);
                        if (!more) form.finish(w, p + g, band * BAND, rows, own);
                    }
                }
            }
        _mm_sfence();  // after streamed lines
    }, together);
}

template <class Form> void run(const Product &product) {
    const Form form{product};
    product.rows <= BAND ? run_band(product, form) : run_bands(product, form);
}

bool multiply_tiles(const Product &product) {
    const quire_weight &first = *product.weights[0];
    if (first.form == QUIRE_INT8) return run<Int8>(product), true;
    if (first.form == QUIRE_INT4) return run<Int4>(product), true;
    if (product.type != QUIRE_BF16) return false;
    if (first.type == QUIRE_BF16) return run<Dense<Bf16>>(product), true;
    if (first.type == QUIRE_E4M3) return run<Dense<E4m3>>(product), true;
    return false;
}

}  // namespace

void add_linear(quire::Kernels &kernels) { InFront<multiply_tiles>::add(kernels); }

}  // namespace QUIRE_ISA
