// Low-rank products: what each row's adapter adds to a linear, and the gradients of that.
//
// Rows are gathered by their slot (in their order), so that the matrices of an adapter are read once for a block of its rows,
// whatever lies between them; ranks may differ, and nothing is padded or copied to the largest. A matrix [rank, inputs] times
// rows is a sum over the inputs in sixteen chains by the place modulo 16; one [rank, outputs] is a chain over the rank in
// ascending order; a matrix's gradient is a chain over the rows of its slot in ascending order. So a row's result depends on
// that row, and a gradient on the rows of its slot, and on nothing else.
#include "functions.h"
#include "kernels.h"
#include "pool.h"

#include <vector>

namespace QUIRE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int DOT_ROWS = 4, DOT_RANKS = 4, MIX_ROWS = 4, MIX_PARTS = 4, SUM_RANKS = 4, SUM_PARTS = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int DOT_ROWS = 2, DOT_RANKS = 2, MIX_ROWS = 2, MIX_PARTS = 4, SUM_RANKS = 2, SUM_PARTS = 4;
#else
constexpr int DOT_ROWS = 1, DOT_RANKS = 1, MIX_ROWS = 1, MIX_PARTS = 2, SUM_RANKS = 1, SUM_PARTS = 2;
#endif
constexpr int64_t BLOCK_ROWS = 32;      // rows of a task
constexpr int64_t RUN_INPUTS = 512;     // of x and a that stay in the first-level cache while tiles of rows pass
constexpr int64_t RUN_OUTPUTS = 256;    // of b likewise
constexpr int64_t COLUMNS = 64;         // of a gradient's task; the grain at which outputs are dealt out
constexpr int64_t SHARES = 4;           // tasks for each thread, where rows alone do not give them
constexpr int64_t WORTH_SHARING = 1 << 14;  // multiplications: less is done sooner than another thread wakes

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
const uint8_t *bytes(const void *p) { return static_cast<const uint8_t *>(p); }

// ---- which rows belong to which adapter ------------------------------------------------------------------------------

struct Rows {
    const void *data;
    int64_t stride;  // in elements
    template <int type> const uint8_t *row(int64_t r) const { return bytes(data) + r * stride * Element<type>::BYTES; }
};

// Rows of one slot as one task sees them: those numbered order[first:first + count]. Their products with the first matrix lie
// at `inner`, [count, rank].
struct Block {
    int product;  // which table of the call
    const quire_lora_part *part;
    int64_t first, count, inner;
};

// Row numbers by slot, ascending within each. Rows without a slot come first, and `ends[0]` is where they end.
struct Order {
    std::vector<int64_t> rows, ends;

    Order(int64_t count, const int32_t *slots, int64_t known) : rows(size_t(count)), ends(size_t(known) + 2) {
        auto place = [&](int64_t r) { return size_t(slots[r] < 0 || slots[r] >= known ? 0 : slots[r] + 1); };
        for (int64_t r = 0; r < count; r++) ends[place(r) + 1]++;
        for (size_t s = 1; s < ends.size(); s++) ends[s] += ends[s - 1];
        for (int64_t r = 0; r < count; r++) rows[size_t(ends[place(r)]++)] = r;
    }
    int64_t begin(int64_t slot) const { return ends[size_t(slot)]; }
    int64_t end(int64_t slot) const { return ends[size_t(slot) + 1]; }
};

bool sound(const quire_lora_table &table) {
    for (int64_t s = 0; s < table.slots; s++)
        if (table.parts[s].a && (table.parts[s].rank < 1 || !table.parts[s].b)) return false;
    return table.inputs > 0 && table.outputs > 0;
}

struct Plan {
    Order order;
    std::vector<Block> blocks;
    int64_t inner = 0;  // floats of all blocks' products

    Plan(int count, const quire_lora_table *const *tables, int64_t rows, const int32_t *slots)
        : order(rows, slots, most_slots(count, tables)) {
        for (int t = 0; t < count; t++)
            for (int64_t s = 0; s < tables[t]->slots; s++) {
                const quire_lora_part &part = tables[t]->parts[s];
                if (!part.a) continue;
                const int64_t end = order.end(s);
                for (int64_t first = order.begin(s); first < end; first += BLOCK_ROWS) {
                    const int64_t some = std::min(BLOCK_ROWS, end - first);
                    blocks.push_back({t, &part, first, some, inner});
                    inner += some * part.rank;
                }
            }
    }
    static int64_t most_slots(int count, const quire_lora_table *const *tables) {
        int64_t most = 0;
        for (int t = 0; t < count; t++) most = std::max(most, tables[t]->slots);
        return most;
    }
    // body(block, share, shares): every block cut into so many shares that all threads have something to do; `size`: by what
    // the products of all blocks go on.
    template <class Body> void over_blocks(int64_t size, const Body &body) const {
        const int64_t count = int64_t(blocks.size());
        if (!count) return;
        const int64_t shares = std::max<int64_t>(1, SHARES * quire::threads() / count);
        if (inner * size < WORTH_SHARING) {
            for (const Block &block : blocks) body(block, 0, 1);
            return;
        }
        quire::parallel(count * shares, [&](int64_t task) { body(blocks[size_t(task / shares)], task % shares, shares); });
    }
};

// Share number `share` of [0, total), in grains.
INLINE int64_t part_of(int64_t total, int64_t share, int64_t shares, int64_t grain) {
    return std::min(total, up(total * share / shares, grain));
}

// body(Type<size>, first row): tiles of MOST rows (at most 4), and one of what is left.
template <int MOST, class Body> INLINE void in_tiles(int64_t count, const Body &body) {
    static_assert(MOST <= 4);
    int64_t r = 0;
    for (; r + MOST <= count; r += MOST) body(Type<MOST>(), r);
    if constexpr (MOST > 3)
        if (count - r == 3) return body(Type<3>(), r);
    if constexpr (MOST > 2)
        if (count - r == 2) return body(Type<2>(), r);
    if (count > r) body(Type<1>(), r);
}

// ---- rows times a matrix over what they have in common: [rows, inputs] x [rank, inputs] -------------------------------

// Of a run of inputs: x [ROWS, padded] with zeros from `width` on, a's rows `stride` apart. The chains [ROWS, ranks, 16] begin
// with the FIRST run and are put aside after each but the last, which folds them: out[r * rank + k].
template <int ROWS, int RANKS>
INLINE void dot_some(int64_t width, int64_t padded, const float *x, const float *a, int64_t stride, bool first,
                     float *chains, int64_t ranks, float factor, int64_t rank, float *out) {
    constexpr int EACH = Sixteen::COUNT;
    Sixteen sums[ROWS][RANKS];
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < RANKS; k++)
            for (int v = 0; v < EACH; v++)
                sums[r][k].part[v] = first ? Floats{} : load<Floats>(chains + (r * ranks + k) * 16 + v * LANES);
    auto step = [&](int64_t i, auto read_a) __attribute__((always_inline)) {
        Floats values[RANKS][EACH];
        for (int k = 0; k < RANKS; k++)
            for (int v = 0; v < EACH; v++) values[k][v] = read_a(a + k * stride, i + v * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < EACH; v++) {
                const Floats one = load<Floats>(x + r * padded + i + v * LANES);
                for (int k = 0; k < RANKS; k++) sums[r][k].part[v] = fma(one, values[k][v], sums[r][k].part[v]);
            }
    };
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) step(i, [](const float *row, int64_t at) { return load<Floats>(row + at); });
    if (i < width)
        step(i, [&](const float *row, int64_t at) {
            return at < width ? read<QUIRE_F32>(bytes(row), at, width) : Floats{};
        });
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < RANKS; k++) {
            if (out) {
                out[r * rank + k] = sum(sums[r][k]) * factor;
                continue;
            }
            for (int v = 0; v < EACH; v++) store(chains + (r * ranks + k) * 16 + v * LANES, sums[r][k].part[v]);
        }
}

// factor * x a^T for some rows of a block and the ranks [begin, end): `inner` [rows, rank].
template <int type>
void dot(const Rows &x, const int64_t *rows, int64_t count, int64_t inputs, const float *a, int64_t rank, int64_t begin,
         int64_t end, float factor, float *inner) {
    if (begin >= end) return;
    const int64_t ranks = end - begin, run = count <= DOT_ROWS ? up(inputs, 16) : RUN_INPUTS;
    auto wide = static_cast<float *>(quire::scratch(1, count * (run + ranks * 16) * 4));
    float *chains = wide + count * run;
    for (int64_t from = 0; from < inputs; from += run) {
        const int64_t width = std::min(run, inputs - from), padded = up(width, 16);
        for (int64_t r = 0; r < count; r++) {
            const uint8_t *row = x.row<type>(rows[r]) + from * Element<type>::BYTES;
            for (int64_t i = 0; i < padded; i += LANES)
                store(wide + r * padded + i, i < width ? read<type>(row, i, width) : Floats{});
        }
        float *out = from + run >= inputs ? inner + begin : nullptr;
        in_tiles<DOT_ROWS>(count, [&](auto tile, int64_t r) {
            constexpr int ROWS = decltype(tile)::value;
            auto some = [&](auto together, int64_t k) {
                dot_some<ROWS, decltype(together)::value>(width, padded, wide + r * padded, a + (begin + k) * inputs + from,
                                                          inputs, from == 0, chains + (r * ranks + k) * 16, ranks, factor, rank,
                                                          out ? out + r * rank + k : nullptr);
            };
            int64_t k = 0;
            for (; k + DOT_RANKS <= ranks; k += DOT_RANKS) some(Type<DOT_RANKS>(), k);
            for (; k < ranks; k++) some(Type<1>(), k);
        });
    }
}

// ---- rows times a matrix: [rows, rank] x [rank, outputs] --------------------------------------------------------------

// y[rows[r], o:o + PARTS vectors] = sums * factor, plus what it was where it is ADDED to.
template <int type, bool ADDED, int ROWS, int PARTS>
INLINE void mix_some(const float *inner, int64_t rank, const float *b, int64_t outputs, int64_t o, float factor,
                     const Rows &y, const int64_t *rows, bool fetch) {
    Floats sums[ROWS][PARTS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < PARTS; v++) sums[r][v] = Floats{};
    constexpr int B = Element<type>::BYTES;
    if (ADDED && PARTS > 1)  // memory brings y meanwhile
        for (int r = 0; r < ROWS; r++)
            for (int line = 0; line < PARTS * LANES * B; line += 64)
                __builtin_prefetch(y.row<type>(rows[r]) + o * B + line, 1);
    for (int64_t k = 0; k < rank; k++) {
        Floats values[PARTS];
        const float *from = b + k * outputs + o;
        if (fetch)
            for (int line = 0; line < PARTS * LANES; line += 16) __builtin_prefetch(from + PARTS * LANES + line);
        for (int v = 0; v < PARTS; v++)
            values[v] = PARTS > 1 ? load<Floats>(from + v * LANES) : read<QUIRE_F32>(bytes(b + k * outputs), o, outputs);
        for (int r = 0; r < ROWS; r++) {
            const Floats one = all(inner[r * rank + k]);
            for (int v = 0; v < PARTS; v++) sums[r][v] = fma(one, values[v], sums[r][v]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        auto row = const_cast<uint8_t *>(y.row<type>(rows[r]));
        for (int v = 0; v < PARTS; v++) {
            Floats value = sums[r][v] * factor;
            if (ADDED) value = read<type>(row, o + v * LANES, outputs) + value;
            write<type>(row, o + v * LANES, outputs, value);
        }
    }
}

// Columns [begin, end) of y for the rows of a block.
template <int type, bool ADDED>
void mix(const float *inner, int64_t rank, const float *b, int64_t outputs, int64_t begin, int64_t end, float factor,
         const Rows &y, const int64_t *rows, int64_t count) {
    for (int64_t from = begin; from < end; from += RUN_OUTPUTS) {
        const int64_t to = std::min(end, from + RUN_OUTPUTS);
        in_tiles<MIX_ROWS>(count, [&](auto tile, int64_t r) {
            constexpr int ROWS = decltype(tile)::value;
            const float *some = inner + r * rank;
            int64_t o = from;
            for (; o + MIX_PARTS * LANES <= to; o += MIX_PARTS * LANES)
                mix_some<type, ADDED, ROWS, MIX_PARTS>(some, rank, b, outputs, o, factor, y, rows + r, r == 0);
            for (; o < to; o += LANES) mix_some<type, ADDED, ROWS, 1>(some, rank, b, outputs, o, factor, y, rows + r, r == 0);
        });
    }
}

int loras(int count, const quire_lora_table *const *tables, int type, int64_t rows, const void *x, int64_t x_stride,
          void *const *ys, const int64_t *y_strides, const int32_t *slots) {
    for (int t = 0; t < count; t++)
        if (!sound(*tables[t]) || tables[t]->inputs != tables[0]->inputs) return -1;
    const Plan plan(count, tables, rows, slots);
    auto inner = static_cast<float *>(quire::scratch(0, plan.inner * 4 + 64));
    const int64_t *order = plan.order.rows.data();
    return with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value;
        const Rows from{x, x_stride};
        plan.over_blocks(tables[0]->inputs, [&](const Block &block, int64_t share, int64_t shares) {
            const int64_t rank = block.part->rank;
            dot<T>(from, order + block.first, block.count, tables[block.product]->inputs, block.part->a, rank,
                   part_of(rank, share, shares, DOT_RANKS), part_of(rank, share + 1, shares, DOT_RANKS), 1.0f,
                   inner + block.inner);
        });
        plan.over_blocks(tables[0]->outputs, [&](const Block &block, int64_t share, int64_t shares) {
            const int64_t outputs = tables[block.product]->outputs;
            mix<T, true>(inner + block.inner, block.part->rank, block.part->b, outputs,
                         part_of(outputs, share, shares, COLUMNS), part_of(outputs, share + 1, shares, COLUMNS),
                         block.part->scale, {ys[block.product], y_strides[block.product]}, order + block.first, block.count);
        });
    });
}

// ---- gradients --------------------------------------------------------------------------------------------------------

// sums [RANKS][64] of a block of rows: += inner[r, k] * z[r, :], z [count, 64].
template <int RANKS>
INLINE void sum_some(const float *inner, int64_t rank, const float *z, int64_t count, float *sums) {
    for (int64_t from = 0; from < COLUMNS; from += SUM_PARTS * LANES) {
        Floats chains[RANKS][SUM_PARTS];
        for (int k = 0; k < RANKS; k++)
            for (int v = 0; v < SUM_PARTS; v++) chains[k][v] = load<Floats>(sums + k * COLUMNS + from + v * LANES);
        for (int64_t r = 0; r < count; r++) {
            Floats values[SUM_PARTS];
            for (int v = 0; v < SUM_PARTS; v++) values[v] = load<Floats>(z + r * COLUMNS + from + v * LANES);
            for (int k = 0; k < RANKS; k++) {
                const Floats one = all(inner[r * rank + k]);
                for (int v = 0; v < SUM_PARTS; v++) chains[k][v] = fma(one, values[v], chains[k][v]);
            }
        }
        for (int k = 0; k < RANKS; k++)
            for (int v = 0; v < SUM_PARTS; v++) store(sums + k * COLUMNS + from + v * LANES, chains[k][v]);
    }
}

// out [rank, size], columns [begin, begin + 64): factor * inner^T z over all rows of a slot.
template <int type>
void outer(const float *inner, int64_t rank, const Rows &z, const int64_t *rows, int64_t count, int64_t size, int64_t begin,
           float factor, float *out) {
    const int64_t width = std::min(COLUMNS, size - begin);
    auto sums = static_cast<float *>(quire::scratch(1, (rank + BLOCK_ROWS) * COLUMNS * 4));
    float *wide = sums + rank * COLUMNS;
    std::fill(sums, sums + rank * COLUMNS, 0.0f);
    for (int64_t first = 0; first < count; first += BLOCK_ROWS) {
        const int64_t some = std::min(BLOCK_ROWS, count - first);
        for (int64_t r = 0; r < some; r++) {
            const uint8_t *row = z.row<type>(rows[first + r]);
            for (int64_t i = 0; i < COLUMNS; i += LANES)
                store(wide + r * COLUMNS + i, i < width ? read<type>(row, begin + i, size) : Floats{});
        }
        const float *from = inner + first * rank;
        int64_t k = 0;
        for (; k + SUM_RANKS <= rank; k += SUM_RANKS) sum_some<SUM_RANKS>(from + k, rank, wide, some, sums + k * COLUMNS);
        for (; k < rank; k++) sum_some<1>(from + k, rank, wide, some, sums + k * COLUMNS);
    }
    for (int64_t k = 0; k < rank; k++)
        for (int64_t i = 0; i < width; i++) out[k * size + begin + i] = sums[k * COLUMNS + i] * factor;
}

struct Gradient {
    int64_t slot, size;
    const float *inner;  // of all rows of the slot
    float *out;
    bool of_a;
};

int lora_backward(const quire_lora_table *table, int type, int64_t rows, const void *x, int64_t x_stride, const void *dy,
                  int64_t dy_stride, const int32_t *slots, void *dx, float *const *das, float *const *dbs) {
    if (!sound(*table)) return -1;
    const Plan plan(1, &table, rows, slots);
    const int64_t *order = plan.order.rows.data(), inputs = table->inputs, outputs = table->outputs;
    auto low = static_cast<float *>(quire::scratch(0, 2 * plan.inner * 4 + 64));
    float *back = low + plan.inner;  // x a^T, and scale * dy b^T
    return with_type(type, [&](auto t) {
        constexpr int T = decltype(t)::value;
        const Rows from{x, x_stride}, gradient{dy, dy_stride}, to{dx, inputs};
        plan.over_blocks(std::max(inputs, outputs), [&](const Block &block, int64_t share, int64_t shares) {
            const quire_lora_part &part = *block.part;
            const int64_t begin = part_of(part.rank, share, shares, DOT_RANKS);
            const int64_t end = part_of(part.rank, share + 1, shares, DOT_RANKS);
            const int64_t *some = order + block.first;
            if (das || dx)
                dot<T>(gradient, some, block.count, outputs, part.b, part.rank, begin, end, part.scale, back + block.inner);
            if (dbs) dot<T>(from, some, block.count, inputs, part.a, part.rank, begin, end, 1.0f, low + block.inner);
        });
        if (dx) {
            for (int64_t r = 0; r < rows; r++)
                if (slots[r] < 0 || slots[r] >= table->slots || !table->parts[slots[r]].a)
                    std::memset(const_cast<uint8_t *>(to.row<T>(r)), 0, size_t(inputs * Element<T>::BYTES));
            plan.over_blocks(inputs, [&](const Block &block, int64_t share, int64_t shares) {
                mix<T, false>(back + block.inner, block.part->rank, block.part->a, inputs,
                              part_of(inputs, share, shares, COLUMNS), part_of(inputs, share + 1, shares, COLUMNS), 1.0f, to,
                              order + block.first, block.count);
            });
        }
        std::vector<Gradient> wanted;
        int64_t place = 0;
        for (int64_t s = 0; s < table->slots; s++) {
            if (!table->parts[s].a) continue;
            if (das && das[s]) wanted.push_back({s, inputs, back + place, das[s], true});
            if (dbs && dbs[s]) wanted.push_back({s, outputs, low + place, dbs[s], false});
            place += (plan.order.end(s) - plan.order.begin(s)) * table->parts[s].rank;
        }
        const int64_t columns = up(std::max(inputs, outputs), COLUMNS) / COLUMNS;
        quire::parallel(int64_t(wanted.size()) * columns, [&](int64_t task) {
            const Gradient &g = wanted[size_t(task / columns)];
            const int64_t begin = task % columns * COLUMNS, first = plan.order.begin(g.slot);
            if (begin >= g.size) return;
            const quire_lora_part &part = table->parts[g.slot];
            outer<T>(g.inner, part.rank, g.of_a ? from : gradient, order + first, plan.order.end(g.slot) - first, g.size,
                     begin, g.of_a ? 1.0f : part.scale, g.out);
        });
    });
}

}  // namespace

void add_lora(quire::Kernels &kernels) {
    kernels.loras = loras;
    kernels.lora_backward = lora_backward;
}

}  // namespace QUIRE_ISA
