// Causal attention with one order of summation for every way of cutting a batch.
//
// Keys are taken in spans of 128 positions, counted from the start of the sequence. Each query row folds the spans one
// after another into a running maximum, sum and output (Milakov & Gimelshein 2018; Dao 2022). A score is one chain over the
// head's dimensions, an output one chain over the keys, a row's sum of weights sixteen chains over the keys modulo 16: nothing
// depends on which rows share a tile, on where chunks begin or on threads. A key that a row may not see has the weight 0, a
// span that it may not see the fade 1; leaving them out, where the whole tile may, changes no bit.
//
// A task is some rows of one sequence with the heads of one kv head. It decodes a span once (spans.h): keys transposed,
// so that lanes are keys, values as they lie, so that lanes are dimensions. Then its rows pass over it in tiles, as rows pass
// over a panel of a weight in dense.cpp. What lies past a sequence's end is never read.
//
// Compiled for AVX512_BF16 this file is a way of its own in front of AVX-512's, for bfloat16 rows and caches of what bfloat16
// holds: a chain takes two dimensions or two keys at once, a score is scaled when it is complete, and weights are rounded to
// bfloat16 before they are summed and multiply the values. Compiled for AMX it is one more, whose chains are those of tiles
// (attention_tiles.h).
//
// Scales of a quantized cache: q (or the score) is multiplied by `scale` and by the keys' scale; the finished output by the
// values'.
#include "functions.h"
#include "kernels.h"
#include "pool.h"
#include "spans.h"
#if defined(QUIRE_TILES)
#include "attention_tiles.h"
#else
#include "attention_chains.h"
#endif

#include <cfloat>
#include <vector>

namespace QUIRE_ISA {
namespace {

constexpr bool PAIRS = Link::NUMBERS == 2;

// ---- a row's weights of a span ---------------------------------------------------------------------------------------

// What a row has folded so far: the largest exponent, the sum of weights.
struct Folded {
    float best, total;
};

// How products become the exponents of weights: times `scale`, softly capped, times `unit`.
struct Bend {
    float scale = 1.0f, softcap, unit = 1.0f;

    Bend(const quire_attention &call, int64_t kv_head) : softcap(call.softcap) {
        if (!PAIRS) return;  // queries were scaled before they were multiplied, which pairs of bfloat16 cannot be
        scale = call.kv.scales ? call.scale * call.kv.scales[kv_head] : call.scale;
        unit = 1.44269504f * (softcap != 0.0f ? 1.0f : std::max(scale, FLT_MIN));  // -infinity times 0 were no number
    }
};

// Scores [first, last), multiples of 32, of which [begin, end) may be seen: softly capped, the hidden ones -infinity.
// Returns the largest.
INLINE float hide(float *scores, int first, int last, int begin, int end, const Bend &bend) {
    if (bend.softcap != 0.0f)
        for (int i = first; i < last; i += LANES)
            store(scores + i, bend.softcap * tanh(load<Floats>(scores + i) * bend.scale / bend.softcap));
    Floats places;
    if (begin > first || end < last) {
        for (int i = 0; i < LANES; i++) places[i] = float(i);
        for (int i = first; i < last; i += LANES) {
            Floats s = load<Floats>(scores + i), place = places + float(i);
            s = place < float(begin) ? all(-INFINITY) : s;
            store(scores + i, place < float(end) ? s : all(-INFINITY));
        }
    }
    Sixteen most;
    for (int v = 0; v < Sixteen::COUNT; v++) most.part[v] = all(-INFINITY);
    for (int i = first; i < last; i += 16)
        for (int v = 0; v < Sixteen::COUNT; v++)
            most.part[v] = larger(load<Floats>(scores + i + v * LANES), most.part[v]);
    return largest(most);
}

#if defined(__AVX512BF16__)

INLINE float fade_of(float x) { return exp(all(x * 0.693147181f))[0]; }

// Weights 2^(score * unit - base), rounded to bfloat16, which makes 0 of denormal numbers, into the row's first half: what lies
// there was read. Returns their sum, of sixteen chains each for the even and the odd keys.
INLINE float weights_of(float *scores, int first, int last, float unit, float base) {
    Floats sums[2] = {};
    for (int i = first; i < last; i += 2 * LANES) {
        Floats weights[2];
        for (int v = 0; v < 2; v++)
            weights[v] = power(fma(load<Floats>(scores + i + v * LANES), all(unit), all(-base)));
        const Words rounded = (Words)_mm512_cvtne2ps_pbh((__m512)weights[1], (__m512)weights[0]);
        store(scores + i / 2, rounded);
        sums[0] += bits<Floats>(rounded << 16), sums[1] += bits<Floats>(rounded & 0xffff0000u);
    }
    return sum(Sixteen{{sums[0] + sums[1]}});
}

#else

INLINE float fade_of(float x) { return exp(all(x))[0]; }

// Weights exp(score - base) in place of the scores. Returns their sum.
INLINE float weights_of(float *scores, int first, int last, float, float base) {
    Sixteen sums{};
    for (int i = first; i < last; i += 16)
        for (int v = 0; v < Sixteen::COUNT; v++) {
            const Floats weight = exp(load<Floats>(scores + i + v * LANES) - base);
            store(scores + i + v * LANES, weight);
            sums.part[v] += weight;
        }
    return sum(sums);
}

#endif

// Scores into weights; their sum, and the fade of what was folded before, are taken into account.
INLINE float weigh(float *scores, int first, int last, float high, float unit, Folded &folded) {
    high *= unit;
    const float highest = folded.best > high ? folded.best : high;
    const float base = highest == -INFINITY ? 0.0f : highest;
    const float total = weights_of(scores, first, last, unit, base);
    // While a row's maximum stands, which is nearly always, there is nothing to compute: exp(0) is 1.
    const float fade = folded.best == base ? 1.0f : fade_of(folded.best - base);
    folded.best = highest;
    folded.total = folded.total * fade + total;
    return fade;
}

// ---- tasks -----------------------------------------------------------------------------------------------------------

const uint8_t *bytes(const void *p) { return static_cast<const uint8_t *>(p); }

// How the rows of a call are cut into tasks. Any cut gives the same bits.
struct Plan {
    int64_t rows, parts;         // query rows of a task; runs of heads that a group is cut into
    std::vector<int64_t> first;  // per sequence the number of its first run of rows
    int64_t tasks;

    Plan(const quire_attention &call, int threads) : first(size_t(call.sequences) + 1) {
        const int64_t kv_heads = call.kv.kv_heads, group = call.heads / kv_heads;
        rows = std::max<int64_t>(1, Products::TASK_ROWS / group);
        count(call);
        // Few long runs: shorter ones, then fewer heads to each, until every thread has its share.
        while (tasks * kv_heads < 3 * threads && rows * group > 4 * Products::TOGETHER && rows > 1)
            rows = (rows + 1) / 2, count(call);
        parts = 1;
        while (tasks * kv_heads * parts < threads && parts * 2 <= group) parts *= 2;
        tasks *= kv_heads * parts;
    }

    void count(const quire_attention &call) {
        tasks = 0;
        for (int64_t s = 0; s < call.sequences; s++) {
            first[size_t(s)] = tasks;
            tasks += (call.starts[s + 1] - call.starts[s] + rows - 1) / rows;
        }
        first[size_t(call.sequences)] = tasks;
    }
};

struct Task {
    const quire_attention &call;
    int64_t sequence, kv_head, head, heads;  // heads [head, head + heads) of the call, all of kv_head
    int64_t row, rows;                       // query rows of the call
    int64_t position;                        // of the first row, in the sequence

    Task(const quire_attention &call, const Plan &plan, int64_t number) : call(call) {
        const int64_t kv_heads = call.kv.kv_heads, group = call.heads / kv_heads;
        const int64_t part = number % plan.parts;
        kv_head = number / plan.parts % kv_heads;
        // The last runs of rows first: they see most keys, and so the threads end together.
        const int64_t run = plan.tasks / (plan.parts * kv_heads) - 1 - number / (plan.parts * kv_heads);
        sequence = std::upper_bound(plan.first.begin(), plan.first.end(), run) - plan.first.begin() - 1;
        head = kv_head * group + group * part / plan.parts;
        heads = kv_head * group + group * (part + 1) / plan.parts - head;
        const int64_t begin = call.starts[sequence], end = call.starts[sequence + 1];
        row = begin + (run - plan.first[size_t(sequence)]) * plan.rows;
        rows = std::min(plan.rows, end - row);
        position = call.lengths[sequence] - (end - row);
    }

    int64_t lowest_seen(int64_t place) const { return call.window ? std::max<int64_t>(0, place - call.window + 1) : 0; }
    int64_t first_place() const { return lowest_seen(position); }
    int64_t last_place() const { return position + rows - 1; }
};

// Where a task's keys and values of one span lie: at their places [low, high) in [0, 128).
struct Span {
    int low, high;
    int64_t row_bytes;
    const uint8_t *keys[SPAN], *values[SPAN];

    // Those of the positions that a task sees. The places beside them name one that there is: it is read where only whole
    // vectors can be, and its scores are hidden.
    void locate(const Task &task, int64_t number) {
        const int64_t first = task.first_place(), last = task.last_place();
        const quire_attention &call = task.call;
        const quire_kv &kv = call.kv;
        const int64_t each = bytes_of_type(kv.type), origin = number * SPAN;
        const int64_t k_step = kv.k_token * each, v_step = kv.v_token * each;
        const uint8_t *k = bytes(kv.keys) + task.kv_head * kv.k_head * each;
        const uint8_t *v = bytes(kv.values) + task.kv_head * kv.v_head * each;
        const int64_t *table = call.tables ? call.tables + task.sequence * call.table_stride : nullptr;
        row_bytes = kv.size * each;
        low = int(std::clamp<int64_t>(first - origin, 0, SPAN));
        high = int(std::clamp<int64_t>(last + 1 - origin, 0, SPAN));
        for (int i = low; i < high;) {
            const int64_t place = origin + i;
            int64_t slot = call.starts[task.sequence] + place, count = high - i;
            if (table) {
                const int64_t offset = place % call.block_size;
                slot = table[place / call.block_size] * call.block_size + offset;
                count = std::min(count, call.block_size - offset);
            }
            const uint8_t *key = k + slot * k_step, *value = v + slot * v_step;
            for (; count > 0; count--, i++, key += k_step, value += v_step) keys[i] = key, values[i] = value;
        }
        const uint8_t *key = low < high ? keys[low] : k, *value = low < high ? values[low] : v;
        for (int i = 0; i < low; i++) keys[i] = key, values[i] = value;
        for (int i = high; i < SPAN; i++) keys[i] = key, values[i] = value;
    }
};

// A task's memory: one block of the thread's scratch, cut up. `whole`: a row's dimensions up to whole links.
struct Room {
    float *q, *keys, *values, *weights, *out, *line;
    Folded *folded;

    Room(int64_t rows, int64_t whole, int64_t padded) {
        int64_t used = 0;
        auto take = [&](int64_t count) { return (used += up(count, 16)) - up(count, 16); };
        const int64_t places[] = {take(rows * whole),  take(SPAN * whole), take(SPAN * padded), take(Products::TOGETHER * SPAN),
                                  take(rows * padded), take(whole + 16),   take(2 * rows)};
        auto all = static_cast<float *>(quire::scratch(0, used * 4));
        float **members[] = {&q, &keys, &values, &weights, &out, &line};
        for (int i = 0; i < 6; i++) *members[i] = all + places[i];
        folded = reinterpret_cast<Folded *>(all + places[6]);
    }
};

// What depends on the types of a call.
struct Formats {
    void (*read_query)(const uint8_t *, int64_t, float, const float *, float *) = nullptr;
    void (*write_output)(const float *, int64_t, float, const float *, uint8_t *) = nullptr;
    void (*decode_keys)(const uint8_t *const *, const uint8_t *const *, int, int, int64_t, int64_t, float *) = nullptr;
    void (*decode_values)(const uint8_t *const *, int, int, int64_t, float *) = nullptr;
};

template <int type> void read_query(const uint8_t *x, int64_t size, float scale, const float *keys_scale, float *out) {
    if (PAIRS) {
        std::memcpy(out, x, size_t(size) * 2);
        for (int64_t i = size / 2; i < up(size, Products::UNIT) / 2; i++) out[i] = 0.0f;
        return;
    }
    for (int64_t i = 0; i < size; i += LANES) {
        Floats value = read<type>(x, i, size) * scale;
        store(out + i, keys_scale ? value * *keys_scale : value);
    }
}

template <int type>
void write_output(const float *sums, int64_t size, float total, const float *values_scale, uint8_t *out) {
    const Floats divisor = all(std::max(total, FLT_MIN));
    for (int64_t i = 0; i < size; i += LANES) {
        Floats value = load<Floats>(sums + i) / divisor;
        write<type>(out, i, size, values_scale ? value * *values_scale : value);
    }
}

// Row m of a task is head m % heads of query row m / heads, so that the rows of a tile see nearly the same keys.
// `following`: the task that this thread most likely takes next, or NULL; memory brings what it begins with.
void attend(const Task &task, const Task *following, const Formats &formats) {
    const quire_attention &call = task.call;
    const int64_t size = call.kv.size, whole = up(size, Products::UNIT), links = whole / Link::NUMBERS;
    const int64_t padded = up(size, 16), rows = task.rows * task.heads;
    const int64_t tiles = (rows + Products::TOGETHER - 1) / Products::TOGETHER;
    auto start = [&](int64_t t) { return Products::start(t, tiles, rows); };
    auto place_of = [&](int64_t m) { return task.position + m / task.heads; };
    const Room room(rows, whole, padded);
    const float *scales = call.kv.scales;
    const Bend bend(call, task.kv_head);
    const int64_t each = bytes_of_type(call.type);

    for (int64_t t = 0; t < tiles; t++) {
        const auto query = [&](int64_t r, float *line) {
            const int64_t m = start(t) + r;
            const int64_t from = (task.row + m / task.heads) * call.q.token + (task.head + m % task.heads) * call.q.head;
            const float *keys_scale = scales ? scales + task.kv_head : nullptr;
            formats.read_query(bytes(call.q.data) + from * each, size, call.scale, keys_scale, line);
        };
        Products::arrange(links, start(t + 1) - start(t), query, room.line, room.q + start(t) * links);
    }
    std::fill(room.out, room.out + rows * padded, 0.0f);
    std::fill(room.folded, room.folded + rows, Folded{-INFINITY, 0.0f});

    Products products;
    float fade[Products::TOGETHER];
    const int64_t first = task.first_place() / SPAN, last = task.last_place() / SPAN;
    Span spans[2];
    spans[0].locate(task, first);
    for (int i = spans[0].low; i < spans[0].high; i++)
        fetch(spans[0].keys[i], spans[0].row_bytes), fetch(spans[0].values[i], spans[0].row_bytes);
    for (int64_t number = first; number <= last; number++) {
        const Span &span = spans[(number - first) % 2];
        Span &next = spans[(number - first + 1) % 2];
        if (number == last && following)
            next.locate(*following, following->first_place() / SPAN);
        else
            next.locate(task, number + 1);
        auto within = [&](int64_t place) { return int(std::clamp<int64_t>(place - number * SPAN, 0, SPAN)); };
        formats.decode_keys(span.keys, next.keys, span.low / LANES * LANES, int(up(span.high, LANES)), size, links, room.keys);
        formats.decode_values(span.values, int(span.low / Products::UNIT * Products::UNIT), int(up(span.high, Products::UNIT)),
                              size, room.values);
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t m = start(t), count = start(t + 1) - m;
            const int begin = within(task.lowest_seen(place_of(m))), end = within(place_of(m + count - 1) + 1);
            if (begin >= end) continue;
            products.set_rows(int(count));
            const int panel = begin / PANEL, end_panel = (end + PANEL - 1) / PANEL;
            products.score(links, room.q + m * links, room.keys, panel, end_panel, room.weights);
            for (int64_t r = 0; r < count; r++) {
                const int64_t place = place_of(m + r);
                // Requests for memory that come evenly are served beside the arithmetic; a burst of them stops it.
                for (int64_t i = (m + r) * SPAN / rows; i < (m + r + 1) * SPAN / rows; i++)
                    fetch(next.values[i], next.row_bytes);
                float *weights = room.weights + r * SPAN;
                const float high = hide(weights, panel * PANEL, end_panel * PANEL, within(task.lowest_seen(place)),
                                        within(place + 1), bend);
                fade[r] = weigh(weights, panel * PANEL, end_panel * PANEL, high, bend.unit, room.folded[m + r]);
            }
            products.mix(size, begin, end, room.weights, room.values, fade, padded, room.out + m * padded);
        }
    }

    for (int64_t m = 0; m < rows; m++) {
        const int64_t to = (task.row + m / task.heads) * call.heads + task.head + m % task.heads;
        formats.write_output(room.out + m * padded, size, room.folded[m].total,
                             scales ? scales + call.kv.kv_heads + task.kv_head : nullptr,
                             static_cast<uint8_t *>(call.out) + to * size * each);
    }
}

bool sound(const quire_attention &call) {
    const quire_kv &kv = call.kv;
    if (kv.kv_heads < 1 || call.heads % kv.kv_heads || kv.size < 1 || call.window < 0) return false;
    for (int64_t s = 0; s < call.sequences; s++) {
        const int64_t rows = call.starts[s + 1] - call.starts[s], length = call.lengths[s];
        if (rows < 0 || length < rows) return false;
        if (!call.tables) {
            if (length != rows || call.starts[s + 1] > kv.slots) return false;
            continue;
        }
        const int64_t blocks = (length + call.block_size - 1) / call.block_size;
        if (blocks > call.table_stride) return false;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t block = call.tables[s * call.table_stride + b];
            if (block < 0 || (block + 1) * call.block_size > kv.slots) return false;
        }
    }
    return true;
}

// Whether links hold the numbers of such rows and such a cache.
constexpr bool links_hold(int type, int cached) {
    return !PAIRS || (type == QUIRE_BF16 && cached != QUIRE_F32 && cached != QUIRE_F16);
}

int attend_all(const quire_attention *call) {
    if (!sound(*call)) return -1;
    Formats formats;
    const int typed = with_type(call->type, [&](auto t) {
        if constexpr (links_hold(decltype(t)::value, QUIRE_BF16)) {
            formats.read_query = read_query<decltype(t)::value>;
            formats.write_output = write_output<decltype(t)::value>;
        }
    });
    const int cached = with_cache_type(call->kv.type, [&](auto c) {
        if constexpr (links_hold(QUIRE_BF16, decltype(c)::value)) {
            formats.decode_keys = decode_keys<decltype(c)::value>;
            formats.decode_values = decode_values<decltype(c)::value>;
        }
    });
    if (typed || cached) return -1;
    const Plan plan(*call, quire::threads());
    quire::parallel(plan.tasks, [&](int64_t number) {
        const Task task(*call, plan, number), following(*call, plan, std::min(number + 1, plan.tasks - 1));
        attend(task, number + 1 < plan.tasks ? &following : nullptr, formats);
    });
    return 0;
}

#if defined(__AVX512BF16__)
decltype(quire::Kernels::attend) others;

int attend_in_pairs(const quire_attention *call) {
    // The largest product is the largest score only where the scale is positive.
    const bool fit = call->kv.size % 2 == 0 && call->scale > 0;
    return (links_hold(call->type, call->kv.type) && fit ? attend_all : others)(call);
}
#endif

}  // namespace

#if defined(__AVX512BF16__)
void add_attention(quire::Kernels &kernels) {
    others = kernels.attend;
    kernels.attend = attend_in_pairs;
}
#else
void add_attention(quire::Kernels &kernels) { kernels.attend = attend_all; }
#endif

}  // namespace QUIRE_ISA
