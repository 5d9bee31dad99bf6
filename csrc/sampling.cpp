// From logits to a token: temperature, min_p, top_k, top_p and the draw, one row after the other, all of it for a row while
// that is in the cache. The rules stand at `draw` in quire/ops/__init__.py.
//
// Nothing is sorted. A row's order is that of its logits, larger first and lower id first among equals, and all that is asked
// of it is the same question: at which token do the counts, or the masses, of those before it pass a number? For that a list of
// candidates is dealt into buckets by logit, and only the bucket in which it happens is looked into, again by buckets.
#include "kernels.h"
#include "masses.h"

#include <functional>

namespace QUIRE_ISA {
namespace {

// Orders as the logits do, -0 as 0.
INLINE uint32_t key_of(float logit) {
    const uint32_t u = bits<uint32_t>(logit + 0.0f);
    return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}

struct Candidate {
    uint32_t key;
    int32_t id;
    int64_t mass;
};

// Candidates in ascending order of their ids.
struct List {
    Candidate *data;
    int64_t size, mass;
    uint32_t low, high;  // their keys lie in between
};

// A token, and how many tokens there are up to it, itself included, and their mass.
struct Place {
    int32_t id;
    int64_t count, mass;
};

enum Measure { COUNT, MASS };

INLINE int64_t passed(const Place &at, Measure by) { return by == COUNT ? at.count : at.mass; }

// The first token in order at which `by` passes `target`; `at` is what was before these candidates.
Place walk(Candidate *data, int64_t size, Measure by, int64_t target, Place at) {
    for (int64_t i = 1; i < size; i++)  // by insertion: few, or none that is out of place
        for (int64_t j = i; j > 0 && data[j - 1].key < data[j].key; j--) std::swap(data[j - 1], data[j]);
    for (int64_t i = 0; i < size; i++) {
        at = {data[i].id, at.count + 1, at.mass + data[i].mass};
        if (passed(at, by) > target) break;
    }
    return at;
}

// The same of a whole list, which stays as it is; `room` takes as many candidates. The target is below the list's measure.
Place find(const List &list, Candidate *room, Measure by, int64_t target) {
    constexpr int BUCKETS = 1024, FEW = 32;
    struct Bucket {
        int64_t count, mass;
    };
    auto buckets = static_cast<Bucket *>(quire::scratch(4, BUCKETS * int64_t(sizeof(Bucket))));
    const Candidate *data = list.data;
    int64_t size = list.size;
    Place at = {0, 0, 0};
    for (uint32_t low = list.low, high = list.high;;) {
        if (size <= FEW || low == high) {
            if (data != room) std::copy(data, data + size, room);
            return walk(room, size, by, target, at);
        }
        int shift = 0;
        while ((high - low) >> shift >= BUCKETS) shift++;
        const int top = int((high - low) >> shift);
        std::fill(buckets, buckets + top + 1, Bucket{0, 0});
        for (int64_t i = 0; i < size; i++) {
            Bucket &bucket = buckets[(high - data[i].key) >> shift];
            bucket.count++, bucket.mass += data[i].mass;
        }
        int in = 0;
        for (;; in++) {
            const Place after = {0, at.count + buckets[in].count, at.mass + buckets[in].mass};
            if (in == top || passed(after, by) > target) break;
            at = after;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < size; i++) {
            room[kept] = data[i];
            kept += int((high - data[i].key) >> shift) == in;
        }
        data = room, size = kept;
        low = 0xffffffffu, high = 0;
        for (int64_t i = 0; i < size; i++) low = std::min(low, data[i].key), high = std::max(high, data[i].key);
    }
}

struct Row {
    const float *logits;
    int64_t size;
    float peak, scale, least;  // least: the weight below which tokens weigh nothing
    const float *peaks;        // of blocks

    // All tokens whose logit is at least `bound`.
    List list(float bound, Candidate *room) const {
        List out = {room, 0, 0, key_of(bound), key_of(peak)};
        alignas(64) float values[LANES];
        alignas(64) int64_t masses[LANES];
        for (int64_t start = 0; start < size; start += BLOCK) {
            if (peaks[start / BLOCK] < bound) continue;
            const int64_t end = std::min(size, start + BLOCK);
            for (int64_t i = start; i < end; i += LANES) {
                const Floats x = logits_at<QUIRE_F32>(bytes(logits), i, size);
                uint32_t lanes = lanes_of(x >= all(bound));
                if (!lanes) continue;
                const Floats w = weight_of(x, all(peak), all(scale));
                store(values, x);
                store(masses, mass_of(w >= all(least) ? w : Floats{}));
                if (i + LANES > size) lanes &= (1u << (size - i)) - 1;
                for (; lanes; lanes &= lanes - 1) {
                    const int lane = __builtin_ctz(lanes);
                    out.data[out.size++] = {key_of(values[lane]), int32_t(i + lane), masses[lane] - EXCESS};
                    out.mass += masses[lane] - EXCESS;
                }
            }
        }
        return out;
    }

    // A logit that at least `count` tokens reach: so many blocks have one. -inf where that would be no help.
    float bound_of(int64_t count, float *room) const {
        const int64_t blocks = (size + BLOCK - 1) / BLOCK;
        if (count > blocks * 7 / 8) return -INFINITY;
        std::copy(peaks, peaks + blocks, room);
        std::nth_element(room, room + count - 1, room + blocks, std::greater<float>());
        return room[count - 1];
    }
};

// floor(share * mass), for a share in [0, 1] of which 53 bits count.
INLINE int64_t part_of(double share, int64_t mass) {
    return int64_t((unsigned __int128)(uint64_t(share * 0x1p53)) * uint64_t(mass) >> 53);
}
// The least mass that reaches top_p of `mass`, at least 1.
INLINE int64_t reached(double top_p, int64_t mass) {
    const unsigned __int128 product = (unsigned __int128)(uint64_t(top_p * 0x1p53)) * uint64_t(mass);
    return std::max<int64_t>(1, int64_t((product + ((uint64_t(1) << 53) - 1)) >> 53));
}

// In order of token ids: first the block, then the token in it.
int64_t draw_by_id(const Row &row, double uniform) {
    auto blocks = static_cast<int64_t *>(quire::scratch(1, (row.size / BLOCK + 1) * 8));
    const uint8_t *logits = bytes(row.logits);
    int64_t left = part_of(uniform, mass_of_row<QUIRE_F32>(logits, row.size, row.peak, row.scale, row.least, blocks));
    alignas(64) int64_t masses[LANES];
    int64_t block = 0;
    while (blocks[block] <= left) left -= blocks[block++];
    for (int64_t i = block * BLOCK;; i += LANES) {
        const Floats w = weight_of(logits_at<QUIRE_F32>(logits, i, row.size), all(row.peak), all(row.scale));
        store(masses, mass_of(w >= all(row.least) ? w : Floats{}));
        for (int lane = 0; lane < LANES; lane++)
            if ((left -= masses[lane] - EXCESS) < 0) return i + lane;
    }
}

// In order of likelihood.
int64_t draw_by_rank(const Row &row, int64_t top_k, double top_p, double uniform) {
    constexpr float NEAR = 10.0f, FAR = 42.0f;  // octaves below the peak: beyond the second nothing has a mass
    const int64_t bytes_of_list = row.size * int64_t(sizeof(Candidate));
    auto data = static_cast<Candidate *>(quire::scratch(2, bytes_of_list));
    auto room = static_cast<Candidate *>(quire::scratch(3, bytes_of_list));
    List list;
    int64_t mass;
    if (top_k > 0 && top_k < row.size) {
        auto peaks = static_cast<float *>(quire::scratch(1, (row.size / BLOCK + 1) * 4));
        list = row.list(row.bound_of(top_k, peaks), data);
        mass = find(list, room, COUNT, top_k - 1).mass;
    } else {
        mass = mass_of_row<QUIRE_F32>(bytes(row.logits), row.size, row.peak, row.scale, row.least, nullptr);
        list = row.list(row.peak - NEAR / row.scale, data);
        if (list.mass < reached(top_p, mass)) list = row.list(row.peak - FAR / row.scale, data);
    }
    const int64_t kept = top_p < 1.0 ? find(list, room, MASS, reached(top_p, mass) - 1).mass : mass;
    return find(list, room, MASS, part_of(uniform, kept)).id;
}

int draw(int64_t rows, int64_t size, const float *logits, int64_t stride, const double *temperatures, const double *min_ps,
         const int64_t *top_ks, const double *top_ps, const double *uniforms, int64_t *tokens) {
    if (size < 1 || size > MOST_TOKENS) return -1;
    over_rows(rows, 8 * size, [&](int64_t first, int64_t last) {
        auto peaks = static_cast<float *>(quire::scratch(0, (size / BLOCK + 1) * 4));
        for (int64_t r = first; r < last; r++) {
            const float *row = logits + r * stride;
            const Largest most = largest_of<QUIRE_F32>(bytes(row), size, peaks);
            tokens[r] = most.sound() ? most.id : -1;
            if (!most.sound() || temperatures[r] == 0.0) continue;
            const float scale = float(1.4426950408889634 / temperatures[r]);
            const Row one = {row, size, most.value, scale, float(min_ps[r]), peaks};
            const bool ranked = top_ks[r] > 0 || top_ps[r] < 1.0;
            tokens[r] = ranked ? draw_by_rank(one, top_ks[r], top_ps[r], uniforms[r]) : draw_by_id(one, uniforms[r]);
        }
    });
    return 0;
}

}  // namespace

void add_sampling(quire::Kernels &kernels) { kernels.draw = draw; }

}  // namespace QUIRE_ISA
