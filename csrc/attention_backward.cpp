// Gradients of causal attention over rows (attention.cpp without a cache), from q, k, v and dy alone.
//
// One kv head after the other, its numbers as float32 in the layouts that the products read. First, per block of 48 query rows
// of a head: all scores, from them each row's largest, its sum of weights and the mean of dy v under them (Milakov & Gimelshein
// 2018; Dao 2022), and dq. Then, per span of 128 keys: the weights again, and dk and dv, block after block of rows that see
// the span, head after head. Every sum has one order, by positions in the sequence: neither threads nor company change a bit.
#include "functions.h"
#include "kernels.h"
#include "product.h"

#include <vector>

namespace QUIRE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int TILE = 12, KEYS = 8;  // rows, or keys, of a tile: what the registers hold
#else
constexpr int TILE = 6, KEYS = 4;
#endif
constexpr int BLOCK = 48;  // query rows of a task
constexpr int SPAN = 128;  // keys

// acc [ROWS][stride], 32 columns, += sum over i of x(i, r) * w[i][32]; x(i, r) at x[i * STEP + r * ROW].
template <int ROWS, int STEP, int ROW, bool FRESH>
INLINE void multiply(int64_t count, const float *x, const float *w, int64_t stride, float *acc) {
    constexpr int PASS = pass_for(ROWS);
    for (int first = 0; first < PARTS; first += PASS, w += PASS * LANES, acc += PASS * LANES) {
        Floats sums[ROWS][PASS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < PASS; v++) sums[r][v] = FRESH ? Floats{} : load<Floats>(acc + r * stride + v * LANES);
        for (int64_t i = 0; i < count; i++) {
            Floats values[PASS];
            for (int v = 0; v < PASS; v++) values[v] = load<Floats>(w + i * PANEL + v * LANES);
            for (int r = 0; r < ROWS; r++) {
                const Floats one = all(x[i * STEP + r * ROW]);
                for (int v = 0; v < PASS; v++) sums[r][v] = fma(one, values[v], sums[r][v]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < PASS; v++) store(acc + r * stride + v * LANES, sums[r][v]);
    }
}

// What is known of a query row after all its scores: the largest, 1 / the sum of weights, the mean of dy v.
struct Row {
    float most, share, mean;
};

struct Sequence {
    int64_t first, rows, block, span;  // first row, and numbers of the first block and span, of the call
};

// One kv head of the call, with `group` heads of queries. Layouts: turned [span][4 panels of 32 keys][size][32], rows
// [panel of 32 dimensions][row of the call][32], tiles [head][block][tile][size][TILE].
struct Head {
    const quire_attention &call;
    const quire_heads &dy;
    int64_t kv_head, group, size, panels, rows, blocks, spans;
    float *q_tiles, *dy_tiles, *q_rows, *dy_rows, *keys_turned, *values_turned, *key_rows;
    Row *known;  // [head][row of the call]

    int64_t bytes() const {
        const int64_t tiles = group * blocks * BLOCK * size, lines = panels * rows * PANEL, turned = spans * SPAN * size;
        return 4 * (2 * tiles + 2 * group * lines + 2 * turned + lines + 3 * group * rows);
    }
    void settle(float *memory) {
        auto take = [&](int64_t count) { return memory += count, memory - count; };
        const int64_t tiles = group * blocks * BLOCK * size, lines = panels * rows * PANEL, turned = spans * SPAN * size;
        q_tiles = take(tiles), dy_tiles = take(tiles), q_rows = take(group * lines), dy_rows = take(group * lines);
        keys_turned = take(turned), values_turned = take(turned), key_rows = take(lines);
        known = reinterpret_cast<Row *>(memory);
    }

    static void line_of(const quire_heads &from, int type, int64_t row, int64_t head, int64_t size, float *line) {
        const int64_t at = (row * from.token + head * from.head) * bytes_of(type);
        row_to_floats(type, static_cast<const uint8_t *>(from.data) + at, size, line);
    }
    void keep_row(const float *line, int64_t row, float *lines) const {
        for (int64_t p = 0; p < panels; p++)
            for (int64_t i = 0; i < PANEL; i++)
                lines[(p * rows + row) * PANEL + i] = p * PANEL + i < size ? line[p * PANEL + i] : 0.0f;
    }
    // Rows [begin, begin + BLOCK) of a sequence, as rows and in tiles; what is past its end is zero in the tiles.
    void read_block(const Sequence &sequence, int64_t begin, int64_t head, const quire_heads &from, float scale, float *tiles,
                    float *lines) const {
        auto line = static_cast<float *>(quire::scratch(1, size * 4));
        for (int64_t r = 0; r < BLOCK; r++) {
            float *to = tiles + r / TILE * size * TILE + r % TILE;
            const bool real = begin + r < sequence.rows;
            if (real) {
                line_of(from, call.type, sequence.first + begin + r, head, size, line);
                for (int64_t i = 0; i < size; i++) line[i] *= scale;
                keep_row(line, sequence.first + begin + r, lines);
            }
            for (int64_t i = 0; i < size; i++) to[i * TILE] = real ? line[i] : 0.0f;
        }
    }
    void read_span(const Sequence &sequence, int64_t begin) const {
        auto line = static_cast<float *>(quire::scratch(1, size * 4));
        const quire_kv &kv = call.kv;
        const quire_heads sources[2] = {{kv.keys, kv.k_token, kv.k_head}, {kv.values, kv.v_token, kv.v_head}};
        for (int which = 0; which < 2; which++) {
            float *to = (which ? values_turned : keys_turned) + (sequence.span * SPAN + begin) * size;
            for (int64_t key = 0; key < SPAN; key++) {
                const bool real = begin + key < sequence.rows;
                if (real) line_of(sources[which], call.type, sequence.first + begin + key, kv_head, size, line);
                if (real && !which) keep_row(line, sequence.first + begin + key, key_rows);
                float *column = to + key / PANEL * size * PANEL + key % PANEL;
                for (int64_t i = 0; i < size; i++) column[i * PANEL] = real ? line[i] : 0.0f;
            }
        }
    }
    const float *tiles_of(const float *tiles, int64_t head, int64_t block) const {
        return tiles + (head * blocks + block) * BLOCK * size;
    }
    int64_t lowest(int64_t place) const { return call.window ? std::max<int64_t>(0, place - call.window + 1) : 0; }

    // Products of a block with a span: scores and dy v, [BLOCK][SPAN]; only the panels that some row of the block sees.
    void products(const Sequence &sequence, int64_t head, int64_t begin, int64_t origin, float *scores, float *pulls) const {
        const int64_t block = sequence.block + begin / BLOCK, last = std::min(sequence.rows, begin + BLOCK) - 1;
        const int64_t from = std::max<int64_t>(0, lowest(begin) - origin) / PANEL * PANEL;
        const float *q = tiles_of(q_tiles, head, block), *g = tiles_of(dy_tiles, head, block);
        for (int64_t key = from; key < SPAN && origin + key <= last; key += PANEL) {
            const int64_t at = (sequence.span * SPAN + origin + key) * size;
            for (int64_t r = 0; r < BLOCK && begin + r <= last; r += TILE) {
                multiply<TILE, TILE, 1, true>(size, q + r * size, keys_turned + at, SPAN, scores + r * SPAN + key);
                multiply<TILE, TILE, 1, true>(size, g + r * size, values_turned + at, SPAN, pulls + r * SPAN + key);
            }
        }
    }
    // One row's scores of a span, softly capped, those that it may not see -infinity; the largest.
    float hide(float *scores, int64_t place, int64_t origin) const {
        const float low = float(lowest(place) - origin), high = float(place - origin);
        Floats places, most = all(-INFINITY);
        for (int i = 0; i < LANES; i++) places[i] = float(i);
        for (int i = 0; i < SPAN; i += LANES) {
            const Floats at = places + float(i);
            Floats s = load<Floats>(scores + i);
            if (call.softcap != 0.0f) s = call.softcap * tanh(s / call.softcap);
            s = at < low ? all(-INFINITY) : s;
            s = at > high ? all(-INFINITY) : s;
            store(scores + i, s);
            most = larger(s, most);
        }
        float found = -INFINITY;
        for (int i = 0; i < LANES; i++) found = std::max(found, most[i]);
        return found;
    }
    // Scores become their gradients, and dy v the weights.
    void settle_row(float *scores, float *pulls, const Row &row) const {
        for (int i = 0; i < SPAN; i += LANES) {
            const Floats s = load<Floats>(scores + i), weight = exp(s - row.most) * row.share;
            Floats gradient = weight * (load<Floats>(pulls + i) - row.mean);
            if (call.softcap != 0.0f) gradient = gradient * (1.0f - (s / call.softcap) * (s / call.softcap));
            // What is hidden has no score, and what stands there may be anything.
            store(scores + i, s > -INFINITY ? gradient : Floats{});
            store(pulls + i, s > -INFINITY ? weight : Floats{});
        }
    }

    void queries(const Sequence &sequence, int64_t begin, int64_t head, void *dq) const;
    void keys(const Sequence &sequence, int64_t origin, void *dk, void *dv) const;
};

void Head::queries(const Sequence &sequence, int64_t begin, int64_t head, void *dq) const {
    const int64_t count = std::min<int64_t>(BLOCK, sequence.rows - begin), last = begin + count - 1;
    const int64_t first = lowest(begin) / SPAN, ends = last / SPAN + 1, width = panels * PANEL;
    auto scores = static_cast<float *>(quire::scratch(1, ((ends - first) * 2 * BLOCK * SPAN + BLOCK * width) * 4));
    float *pulls = scores + (ends - first) * BLOCK * SPAN, *sums = pulls + (ends - first) * BLOCK * SPAN;
    for (int64_t s = first; s < ends; s++)
        products(sequence, head, begin, s * SPAN, scores + (s - first) * BLOCK * SPAN, pulls + (s - first) * BLOCK * SPAN);
    for (int64_t r = 0; r < count; r++) {
        Row row{-INFINITY, 0, 0};
        for (int64_t s = first; s < ends; s++)
            row.most = std::max(row.most, hide(scores + ((s - first) * BLOCK + r) * SPAN, begin + r, s * SPAN));
        Sixteen total{}, mean{};
        for (int64_t s = first; s < ends; s++) {
            const int64_t at = ((s - first) * BLOCK + r) * SPAN;
            for (int i = 0; i < SPAN; i += 16)
                for (int v = 0; v < Sixteen::COUNT; v++) {
                    const Floats score = load<Floats>(scores + at + i + v * LANES), weight = exp(score - row.most);
                    const Floats pull = load<Floats>(pulls + at + i + v * LANES);
                    total.part[v] += weight;
                    mean.part[v] = fma(weight, score > -INFINITY ? pull : Floats{}, mean.part[v]);
                }
        }
        row.share = 1.0f / sum(total), row.mean = sum(mean) * row.share;
        for (int64_t s = first; s < ends; s++) {
            const int64_t at = ((s - first) * BLOCK + r) * SPAN;
            settle_row(scores + at, pulls + at, row);
        }
        known[head * rows + sequence.first + begin + r] = row;
    }
    std::fill(sums, sums + BLOCK * width, 0.0f);
    for (int64_t s = first; s < ends; s++)
        for (int64_t p = 0; p < panels; p++)
            for (int64_t r = 0; r < count; r += TILE)
                multiply<TILE, 1, SPAN, false>(std::min<int64_t>(SPAN, last + 1 - s * SPAN),
                                               scores + ((s - first) * BLOCK + r) * SPAN,
                                               key_rows + (p * rows + sequence.first + s * SPAN) * PANEL, width,
                                               sums + r * width + p * PANEL);
    for (int64_t r = 0; r < count; r++) {
        const int64_t to = ((sequence.first + begin + r) * call.heads + kv_head * group + head) * size;
        for (int64_t i = 0; i < size; i++) sums[r * width + i] *= call.scale;
        floats_to_row(call.type, sums + r * width, size, static_cast<uint8_t *>(dq) + to * bytes_of(call.type));
    }
}

void Head::keys(const Sequence &sequence, int64_t origin, void *dk, void *dv) const {
    const int64_t width = panels * PANEL, count = std::min<int64_t>(SPAN, sequence.rows - origin);
    auto scores = static_cast<float *>(quire::scratch(1, 2 * (BLOCK * SPAN + SPAN * width) * 4));
    float *pulls = scores + BLOCK * SPAN, *sums[2] = {pulls + BLOCK * SPAN, pulls + BLOCK * SPAN + SPAN * width};
    std::fill(sums[0], sums[0] + 2 * SPAN * width, 0.0f);
    const int64_t last_seen = origin + count - 1 + (call.window ? call.window - 1 : sequence.rows);
    for (int64_t begin = origin / BLOCK * BLOCK; begin < sequence.rows && begin <= last_seen; begin += BLOCK)
        for (int64_t head = 0; head < group; head++) {
            products(sequence, head, begin, origin, scores, pulls);
            const int64_t some = std::min<int64_t>(BLOCK, sequence.rows - begin);
            for (int64_t r = 0; r < some; r++) {
                hide(scores + r * SPAN, begin + r, origin);
                settle_row(scores + r * SPAN, pulls + r * SPAN, known[head * rows + sequence.first + begin + r]);
            }
            for (int which = 0; which < 2; which++)
                for (int64_t p = 0; p < panels; p++) {
                    const int64_t at = ((head * panels + p) * rows + sequence.first + begin) * PANEL;
                    const float *lines = (which ? dy_rows : q_rows) + at;
                    for (int64_t key = 0; key < count; key += KEYS)
                        multiply<KEYS, SPAN, 1, false>(some, (which ? pulls : scores) + key, lines, width,
                                                       sums[which] + key * width + p * PANEL);
                }
        }
    for (int which = 0; which < 2; which++)
        for (int64_t key = 0; key < count; key++) {
            const int64_t to = ((sequence.first + origin + key) * call.kv.kv_heads + kv_head) * size;
            floats_to_row(call.type, sums[which] + key * width, size,
                          static_cast<uint8_t *>(which ? dv : dk) + to * bytes_of(call.type));
        }
}

int attend_backward(const quire_attention *call, const quire_heads *dy, void *dq, void *dk, void *dv) {
    const quire_kv &kv = call->kv;
    if (call->tables || kv.scales || kv.type != call->type || kv.kv_heads < 1 || call->heads % kv.kv_heads || kv.size < 1 ||
        call->window < 0 || (call->type != QUIRE_F32 && call->type != QUIRE_BF16 && call->type != QUIRE_F16))
        return -1;
    std::vector<Sequence> block_of, span_of;
    int64_t blocks = 0, spans = 0;
    for (int64_t s = 0; s < call->sequences; s++) {
        const Sequence one{call->starts[s], call->starts[s + 1] - call->starts[s], blocks, spans};
        if (one.rows < 0 || one.first + one.rows > kv.slots) return -1;
        blocks += (one.rows + BLOCK - 1) / BLOCK, spans += (one.rows + SPAN - 1) / SPAN;
        block_of.resize(size_t(blocks), one), span_of.resize(size_t(spans), one);
    }
    if (!blocks) return 0;
    Head head{*call, *dy, 0, call->heads / kv.kv_heads, kv.size, up(kv.size, PANEL) / PANEL, call->starts[call->sequences],
              blocks, spans, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    head.settle(static_cast<float *>(quire::scratch(0, head.bytes())));
    const int64_t lines = head.panels * head.rows * PANEL, tasks = head.group * blocks;
    for (; head.kv_head < kv.kv_heads; head.kv_head++) {
        quire::parallel(tasks + spans, [&](int64_t task) {
            if (task >= tasks) {
                const Sequence &sequence = span_of[size_t(task - tasks)];
                return head.read_span(sequence, (task - tasks - sequence.span) * SPAN);
            }
            const int64_t block = task % blocks, h = task / blocks, number = head.kv_head * head.group + h;
            const Sequence &sequence = block_of[size_t(block)];
            const int64_t begin = (block - sequence.block) * BLOCK, at = (h * blocks + block) * BLOCK * head.size;
            head.read_block(sequence, begin, number, call->q, call->scale, head.q_tiles + at, head.q_rows + h * lines);
            head.read_block(sequence, begin, number, *dy, 1.0f, head.dy_tiles + at, head.dy_rows + h * lines);
        });
        // The last blocks see most keys, and the first spans are seen by most rows: they come first.
        quire::parallel(tasks, [&](int64_t task) {
            const int64_t block = blocks - 1 - task / head.group;
            const Sequence &sequence = block_of[size_t(block)];
            head.queries(sequence, (block - sequence.block) * BLOCK, task % head.group, dq);
        });
        quire::parallel(spans, [&](int64_t span) {
            const Sequence &sequence = span_of[size_t(span)];
            head.keys(sequence, (span - sequence.span) * SPAN, dk, dv);
        });
    }
    return 0;
}

}  // namespace

void add_attention_backward(quire::Kernels &kernels) { kernels.attend_backward = attend_backward; }

}  // namespace QUIRE_ISA
