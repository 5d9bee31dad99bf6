// Gradients of causal attention over rows, as attention_backward.cpp's, for bfloat16 numbers in pairs (squares.h): weights and
// scores' gradients are rounded to bfloat16 before they multiply, as weights are on the way forward. What is softly capped, and
// other types, go to the kernels of AVX-512.
//
// One kv head after the other, in blocks of 32 rows counted from the start of a sequence. First, per block and head: all
// scores, from them each row's exponent, its sum of weights and the mean of dy v under them, and dq. Then, per block of keys:
// scores the other way round, a key's in a row, so that weights and gradients are at once the rows that dv and dk are made of.
// Every sum has one order, by positions in the sequence: neither threads nor company change a bit.
#include "functions.h"
#include "kernels.h"
#include "product.h"
#include "squares.h"

#include <cfloat>
#include <vector>

namespace QUIRE_ISA {
namespace {

constexpr int BLOCK = PANEL;     // rows, or keys
constexpr int PAIRS = BLOCK / 2;  // of them
constexpr int64_t TOGETHER = 4;  // blocks of rows whose weights multiply at once

// A head's rows of one tensor in blocks, zeros past the end of a sequence and past the last dimension.
struct Lines {
    float *rows;    // [block][32][links]
    float *turned;  // [block][links][32]
    float *paired;  // [panel of 32 dimensions][block][16 pairs of rows][32]
};

struct Sequence {
    int64_t first, rows, block;  // first row, and number of the first block, of the call
    int64_t blocks() const { return (rows + BLOCK - 1) / BLOCK; }
};

// What is known of query rows after all their scores: the exponent of the largest, 1 / the sum of weights, the mean of dy v.
struct Known {
    float *base, *share, *mean;
};

// What a row's numbers are rounded to, thirty-two at a time.
INLINE Words rounded(Floats low, Floats high) { return (Words)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

INLINE Floats counted_from(int64_t first) {
    Floats places;
    for (int i = 0; i < LANES; i++) places[i] = float(first + i);
    return places;
}

// One kv head of the call, with `group` heads of queries.
struct Head {
    const quire_attention &call;
    const quire_heads &dy;
    float unit;  // a score times this is the exponent of 2
    int64_t kv_head, group, size, links, panels, blocks;
    float *memory;

    Head(const quire_attention &call, const quire_heads &dy, int64_t blocks)
        : call(call), dy(dy), unit(std::max(call.scale * 1.44269504f, FLT_MIN)), kv_head(0),
          group(call.heads / call.kv.kv_heads), size(call.kv.size), links(up(size, PANEL) / 2), panels(up(size, PANEL) / PANEL),
          blocks(blocks), memory(static_cast<float *>(quire::scratch(0, room() * 4))) {}

    int64_t each() const { return blocks * BLOCK * links; }
    int64_t room() const { return (2 + 2 * group) * 3 * each() + 3 * group * blocks * BLOCK; }
    Lines lines(int64_t number) const {
        float *at = memory + number * 3 * each();
        return {at, at + each(), at + 2 * each()};
    }
    Lines keys() const { return lines(0); }
    Lines values() const { return lines(1); }
    Lines queries(int64_t head) const { return lines(2 + head); }
    Lines gradients(int64_t head) const { return lines(2 + group + head); }
    Known known(int64_t head, int64_t block) const {
        const int64_t count = group * blocks * BLOCK;
        float *at = memory + (2 + 2 * group) * 3 * each() + (head * blocks + block) * BLOCK;
        return {at, at + count, at + 2 * count};
    }
    int64_t lowest(int64_t place) const { return call.window ? std::max<int64_t>(0, place - call.window + 1) : 0; }

    void read(const quire_heads &from, int64_t head, const Sequence &sequence, int64_t block, const Lines &to) const;
    void settle_row(float *scores, float *pulls, int64_t width, int64_t low, int64_t end, const Known &row) const;
    void settle_key(const float *scores, const float *pulls, int64_t low, int64_t end, const Known &rows, float *weights,
                    float *gradients) const;
    void make_dq(const Sequence &sequence, int64_t block, int64_t head, void *dq) const;
    void make_dk_dv(const Sequence &sequence, int64_t block, void *dk, void *dv) const;
    void put(float *sums, int64_t count, float factor, int64_t row, int64_t heads, int64_t head, void *out) const;
};

// Block number `block` of a sequence.
void Head::read(const quire_heads &from, int64_t head, const Sequence &sequence, int64_t block, const Lines &to) const {
    const int64_t number = sequence.block + block, first = sequence.first + block * BLOCK;
    float *rows = to.rows + number * BLOCK * links;
    for (int64_t r = 0; r < BLOCK; r++) {
        auto line = reinterpret_cast<uint8_t *>(rows + r * links);
        const int64_t bytes = block * BLOCK + r < sequence.rows ? size * 2 : 0;
        if (bytes)
            std::memcpy(line, static_cast<const uint8_t *>(from.data) + ((first + r) * from.token + head * from.head) * 2,
                        size_t(bytes));
        std::memset(line + bytes, 0, size_t(links * 4 - bytes));
    }
    for (int64_t link = 0; link < links; link += LANES)
        for (int half = 0; half < BLOCK; half += LANES) {
            Words words[LANES];
            for (int r = 0; r < LANES; r++) words[r] = load<Words>(rows + (half + r) * links + link);
            transpose(words);
            for (int i = 0; i < LANES; i++) store(to.turned + (number * links + link + i) * BLOCK + half, words[i]);
        }
    for (int64_t panel = 0; panel < panels; panel++)
        for (int r = 0; r < BLOCK; r += 2)
            for (int half = 0; half < PANEL; half += LANES) {
                const float *one = rows + r * links + (panel * PANEL + half) / 2, *other = one + links;
                store(to.paired + ((panel * blocks + number) * PAIRS + r / 2) * PANEL + half,
                      widen(load<Halves>(one)) | widen(load<Halves>(other)) << 16);
            }
}

// A query row's scores [width], of which [low, end) may be seen, become their gradients, as pairs in the row's first half.
void Head::settle_row(float *scores, float *pulls, int64_t width, int64_t low, int64_t end, const Known &row) const {
    const int64_t from = low / PANEL * PANEL, to = up(end, PANEL);
    Floats most = all(-INFINITY);
    for (int64_t i = from; i < to; i += LANES) {
        Floats score = load<Floats>(scores + i);
        if (i < low || i + LANES > end) {
            const Floats places = counted_from(i);
            const auto hidden = (places < float(low)) | (places >= float(end));
            score = hidden ? all(-INFINITY) : score;
            store(scores + i, score);
            store(pulls + i, hidden ? Floats{} : load<Floats>(pulls + i));
        }
        most = larger(score, most);
    }
    const float base = largest_lane(most) * unit;
    Floats totals[2] = {}, means[2] = {};
    for (int64_t i = from; i < to; i += PANEL)
        for (int v = 0; v < 2; v++) {
            const int64_t at = i + v * LANES;
            const Floats weight = power(fma(load<Floats>(scores + at), all(unit), all(-base)));
            store(scores + at, weight);
            totals[v] += weight;
            means[v] = fma(weight, load<Floats>(pulls + at), means[v]);
        }
    const float share = 1.0f / sum(Sixteen{{totals[0] + totals[1]}}), mean = sum(Sixteen{{means[0] + means[1]}}) * share;
    for (int64_t i = from; i < to; i += PANEL) {
        Floats gradients[2];
        for (int v = 0; v < 2; v++) {
            const int64_t at = i + v * LANES;
            gradients[v] = load<Floats>(scores + at) * share * (load<Floats>(pulls + at) - mean);
        }
        store(scores + i / 2, rounded(gradients[0], gradients[1]));
    }
    std::fill(scores, scores + from / 2, 0.0f);
    std::fill(scores + to / 2, scores + width / 2, 0.0f);
    *row.base = base, *row.share = share, *row.mean = mean;
}

// A key's scores of a block of rows, of which those at [low, end) see it, become pairs of weights and of gradients.
void Head::settle_key(const float *scores, const float *pulls, int64_t low, int64_t end, const Known &rows, float *weights,
                      float *gradients) const {
    Floats weight[2], gradient[2];
    for (int v = 0; v < 2; v++) {
        const int64_t at = v * LANES;
        const Floats score = load<Floats>(scores + at), mean = load<Floats>(rows.mean + at);
        weight[v] = power(fma(score, all(unit), -load<Floats>(rows.base + at))) * load<Floats>(rows.share + at);
        gradient[v] = weight[v] * (load<Floats>(pulls + at) - mean);
        if (at < low || at + LANES > end) {
            const Floats places = counted_from(at);
            const auto hidden = (places < float(low)) | (places >= float(end));
            weight[v] = hidden ? Floats{} : weight[v];
            gradient[v] = hidden ? Floats{} : gradient[v];
        }
    }
    store(weights, rounded(weight[0], weight[1]));
    store(gradients, rounded(gradient[0], gradient[1]));
}

// Rows of sums into the rows of a result.
void Head::put(float *sums, int64_t count, float factor, int64_t row, int64_t heads, int64_t head, void *out) const {
    const int64_t width = panels * PANEL;
    for (int64_t r = 0; r < count; r++, sums += width) {
        for (int64_t i = 0; i < width; i += LANES) store(sums + i, load<Floats>(sums + i) * factor);
        floats_to_row(QUIRE_BF16, sums, size, static_cast<uint8_t *>(out) + ((row + r) * heads + head) * size * 2);
    }
}

void Head::make_dq(const Sequence &sequence, int64_t block, int64_t head, void *dq) const {
    const int64_t begin = block * BLOCK, count = std::min<int64_t>(BLOCK, sequence.rows - begin);
    const int64_t first = lowest(begin) / BLOCK, width = (block + 1 - first) * BLOCK, number = sequence.block + block;
    auto scores = static_cast<float *>(quire::scratch(1, (2 * width + panels * PANEL) * BLOCK * 4));
    float *pulls = scores + width * BLOCK, *sums = pulls + width * BLOCK;
    const Squares squares;
    const Lines keys = this->keys(), values = this->values();
    const float *q = queries(head).rows + number * BLOCK * links, *g = gradients(head).rows + number * BLOCK * links;
    for (int64_t k = first; k <= block; k++) {
        const int64_t at = (sequence.block + k) * BLOCK * links, column = (k - first) * BLOCK;
        squares.multiply<true>(links, q, links, keys.turned + at, scores + column, width);
        squares.multiply<true>(links, g, links, values.turned + at, pulls + column, width);
    }
    const Known rows = known(head, number);
    for (int64_t r = 0; r < count; r++)
        settle_row(scores + r * width, pulls + r * width, width, lowest(begin + r) - first * BLOCK,
                   begin + r + 1 - first * BLOCK, {rows.base + r, rows.share + r, rows.mean + r});
    for (int64_t r = count; r < BLOCK; r++) rows.base[r] = rows.share[r] = rows.mean[r] = 0.0f;
    for (int64_t p = 0; p < panels; p++)
        squares.multiply<true>(width / 2, scores, width, keys.paired + (p * blocks + sequence.block + first) * PAIRS * PANEL,
                               sums + p * PANEL, panels * PANEL);
    put(sums, count, call.scale, sequence.first + begin, call.heads, kv_head * group + head, dq);
}

void Head::make_dk_dv(const Sequence &sequence, int64_t block, void *dk, void *dv) const {
    const int64_t origin = block * BLOCK, count = std::min<int64_t>(BLOCK, sequence.rows - origin), width = panels * PANEL;
    const int64_t at = (sequence.block + block) * BLOCK * links;
    constexpr int64_t ROW = TOGETHER * PAIRS;
    auto scores = static_cast<float *>(quire::scratch(1, (2 * BLOCK + 2 * ROW + 2 * width) * BLOCK * 4));
    float *pulls = scores + BLOCK * BLOCK, *weights = pulls + BLOCK * BLOCK, *gradients = weights + ROW * BLOCK;
    float *sums_k = gradients + ROW * BLOCK, *sums_v = sums_k + width * BLOCK;
    std::fill(sums_k, sums_k + 2 * width * BLOCK, 0.0f);
    const Squares squares;
    const float *keys = this->keys().rows + at, *values = this->values().rows + at;
    const int64_t last = call.window ? std::min(sequence.rows - 1, origin + count - 1 + call.window - 1) : sequence.rows - 1;
    for (int64_t head = 0; head < group; head++) {
        const Lines q = queries(head), g = this->gradients(head);
        for (int64_t first = block, next; first <= last / BLOCK; first = next) {
            next = std::min(last / BLOCK + 1, (first / TOGETHER + 1) * TOGETHER);
            for (int64_t b = first; b < next; b++) {
                const int64_t number = sequence.block + b, rows = number * BLOCK * links, begin = b * BLOCK;
                squares.multiply<true>(links, keys, links, q.turned + rows, scores, BLOCK);
                squares.multiply<true>(links, values, links, g.turned + rows, pulls, BLOCK);
                const Known known = this->known(head, number);
                for (int64_t k = 0; k < BLOCK; k++) {
                    const int64_t place = origin + k - begin, end = call.window ? place + call.window : BLOCK;
                    const int64_t to = k * ROW + (b - first) * PAIRS;
                    settle_key(scores + k * BLOCK, pulls + k * BLOCK, place, end, known, weights + to, gradients + to);
                }
            }
            for (int64_t p = 0; p < panels; p++) {
                const int64_t lines = (p * blocks + sequence.block + first) * PAIRS * PANEL, some = (next - first) * PAIRS;
                squares.multiply<false>(some, gradients, ROW, q.paired + lines, sums_k + p * PANEL, width);
                squares.multiply<false>(some, weights, ROW, g.paired + lines, sums_v + p * PANEL, width);
            }
        }
    }
    put(sums_k, count, call.scale, sequence.first + origin, call.kv.kv_heads, kv_head, dk);
    put(sums_v, count, 1.0f, sequence.first + origin, call.kv.kv_heads, kv_head, dv);
}

decltype(quire::Kernels::attend_backward) others;

int attend_backward(const quire_attention *call, const quire_heads *dy, void *dq, void *dk, void *dv) {
    const quire_kv &kv = call->kv;
    // The largest product is the largest score only where the scale is positive.
    if (call->type != QUIRE_BF16 || kv.type != QUIRE_BF16 || call->tables || kv.scales || call->softcap != 0.0f ||
        !(call->scale > 0))
        return others(call, dy, dq, dk, dv);
    if (kv.kv_heads < 1 || call->heads % kv.kv_heads || kv.size < 1 || call->window < 0) return -1;
    std::vector<Sequence> sequence_of;  // of each block
    for (int64_t s = 0; s < call->sequences; s++) {
        const Sequence one{call->starts[s], call->starts[s + 1] - call->starts[s], int64_t(sequence_of.size())};
        if (one.rows < 0 || one.first + one.rows > kv.slots) return -1;
        sequence_of.resize(sequence_of.size() + size_t(one.blocks()), one);
    }
    const int64_t blocks = int64_t(sequence_of.size());
    if (!blocks) return 0;
    Head head(*call, *dy, blocks);
    const quire_heads keys{kv.keys, kv.k_token, kv.k_head}, values{kv.values, kv.v_token, kv.v_head};
    const auto each = [&](int64_t number, const auto &body) {
        const Sequence &sequence = sequence_of[size_t(number)];
        body(sequence, number - sequence.block);
    };
    for (; head.kv_head < kv.kv_heads; head.kv_head++) {
        quire::parallel((head.group + 1) * blocks, [&](int64_t task) {
            each(task % blocks, [&](const Sequence &sequence, int64_t block) {
                const int64_t h = task / blocks, number = head.kv_head * head.group + h;
                const bool queries = h < head.group;
                head.read(queries ? call->q : keys, queries ? number : head.kv_head, sequence, block,
                          queries ? head.queries(h) : head.keys());
                head.read(queries ? *dy : values, queries ? number : head.kv_head, sequence, block,
                          queries ? head.gradients(h) : head.values());
            });
        });
        // The last blocks see most keys, and the first keys are seen by most rows: they come first.
        quire::parallel(head.group * blocks, [&](int64_t task) {
            each(blocks - 1 - task / head.group, [&](const Sequence &sequence, int64_t block) {
                head.make_dq(sequence, block, task % head.group, dq);
            });
        });
        quire::parallel(blocks, [&](int64_t task) {
            each(task, [&](const Sequence &sequence, int64_t block) { head.make_dk_dv(sequence, block, dk, dv); });
        });
    }
    return 0;
}

}  // namespace

void add_attention_backward(quire::Kernels &kernels) {
    others = kernels.attend_backward;
    kernels.attend_backward = attend_backward;
}

}  // namespace QUIRE_ISA
