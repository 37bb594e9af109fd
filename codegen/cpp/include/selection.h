// Which far entries a row reads: units of some consecutive ones, by what their labels promise to the row's own queries
// (compiler/kv/selection.py). A page's labels are stored [number of the label][unit].
#pragma once
#include "codes.h"

namespace graft {

struct Everything {};

// What a row reads, in ascending order, and room to choose it in.
struct Chosen {
    int64_t count = 0;
    int32_t* const entries;
    float* const scores;  // of units; there is room for those of a whole page at the end
    uint16_t* const high;

    explicit Chosen(int64_t far) : entries(new int32_t[far + KEYS]), scores(new float[far + 2 * KEYS]), high(new uint16_t[far + 2 * KEYS]) {}
    Chosen(const Chosen&) = delete;
    ~Chosen() {
        delete[] entries;
        delete[] scores;
        delete[] high;
    }
};

// Numbers whose order is that of the floats; zeros are equal.
INLINE u32v ordered(f32v x) {
    const u32v u = bits<u32v>(x + 0.0f);
    return u ^ (bits<u32v>(bits<i32v>(u) >> 31) | 0x80000000);
}

typedef uint16_t u16w __attribute__((vector_size(64)));
constexpr int WORDS = sizeof(u16w) / sizeof(uint16_t);

// How many of `count` numbers, a multiple of WORDS, are at least `low`.
inline int64_t reaching(const uint16_t* numbers, int64_t count, uint16_t low) {
    int64_t total = 0;
    for (int64_t from = 0; from < count; from += WORDS << 15) {
        u16w held{};
        for (int64_t at = from; at < least<int64_t>(count, from + (int64_t(WORDS) << 15)); at += WORDS) {
            u16w x;
            memcpy(&x, numbers + at, sizeof x);
            held -= (u16w)(x >= low);
        }
        for (int lane = 0; lane < WORDS; ++lane) total += held[lane];
    }
    return total;
}

// The largest number that `wanted` of the numbers reach; how many are larger.
inline uint16_t threshold(const uint16_t* numbers, int64_t count, int64_t wanted, int64_t& larger) {
    uint32_t found = 0;
    larger = 0;
    for (uint32_t bit = 1 << 15; bit; bit /= 2) {
        const int64_t there = reaching(numbers, count, uint16_t(found | bit));
        if (there >= wanted) found |= bit;
        else larger = there;
    }
    return uint16_t(found);
}

INLINE uint32_t lanes_where(i32v held) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)held, (__m512i)held);
#else
    uint32_t all = 0;
    for (int lane = 0; lane < LANES; ++lane) all |= uint32_t(held[lane] & 1) << lane;
    return all;
#endif
}

// Calls take(index) for the `wanted` largest of `count` scores in ascending order of their indices; of equal ones the
// first are taken. What stands behind the scores up to a multiple of 64 is written over.
template <class Take> void largest(float* scores, uint16_t* high, int64_t count, int64_t wanted, Take take) {
    const int64_t padded = (count + KEYS - 1) / KEYS * KEYS;
    for (int64_t at = count; at < padded; ++at) scores[at] = -INFINITY;
    for (int64_t at = 0; at < padded; at += LANES) {
        const u16v halves = __builtin_convertvector(ordered(widen(scores + at)) >> 16, u16v);
        memcpy(high + at, &halves, sizeof halves);
    }
    // First by the upper half of the numbers, then by the lower one of those that are equal in it.
    int64_t above, larger;
    const uint32_t upper = threshold(high, padded, wanted, above);
    int64_t equal = 0;
    for (int64_t at = 0; at < padded; at += LANES) {
        const u32v number = ordered(widen(scores + at));
        for (uint32_t left = lanes_where(number >> 16 == upper); left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            if (at + lane < count) high[equal++] = uint16_t(number[lane]);
        }
    }
    while (equal % WORDS) high[equal++] = 0;
    const uint32_t number = upper << 16 | threshold(high, equal, wanted - above, larger);
    int64_t ties = wanted - above - larger;
    for (int64_t at = 0; at < count; at += LANES) {
        const u32v all = ordered(widen(scores + at));
        for (uint32_t left = lanes_where(all >= number); left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            if (all[lane] > number || ties-- > 0) take(at + lane);
        }
    }
}

template <class T, int KD, int SIZE, int WIDTH, bool CALIBRATES, bool BOUNDS> struct Selection {
    static constexpr int UNITS = KEYS / SIZE, width = WIDTH;
    // Of many units two labels are taken at a time; few units stand side by side with those of the next label.
    static constexpr bool pairs = PAIRED<T> && UNITS % (2 * LANES) == 0 && WIDTH % 2 == 0;
    static constexpr int BESIDE = UNITS < LANES ? UNITS : 1, FACTORS = WIDTH * BESIDE;

    double ratio;
    int64_t fewest;  // entries
    int64_t first;   // units that are read whatever they promise

    static int64_t units_of(int64_t count) { return (count + SIZE - 1) / SIZE; }
    int64_t units(int64_t count) const {
        const int64_t there = units_of(count), scaled = int64_t(double(there) * ratio * 1048576.0);
        return least(there, most((fewest + SIZE - 1) / SIZE, (scaled + 1048575) / 1048576));
    }

    // The best units' entries for the queries of a row, `stride` elements apart.
    void choose(const Far<T>& far, const uint8_t* labels, int64_t label_bytes, const int64_t* channels, const T* queries,
                int64_t group, int64_t stride, Chosen& chosen) const {
        float* const factors = new float[group * FACTORS];
        for (int64_t i = 0; i < group; ++i) place(queries + i * stride, channels, factors + i * FACTORS);
        const int64_t pages = (far.count + KEYS - 1) / KEYS;
        for (int64_t page = 0; page < pages; ++page) {
            const uint8_t* const next = labels + far.table[least(page + 1, pages - 1)] * label_bytes;
            for (int64_t byte = 0; byte < label_bytes; byte += 64) __builtin_prefetch(next + byte, 0, 2);
            score((const T*)(labels + far.table[page] * label_bytes), factors, group, chosen.scores + page * UNITS);
        }
        delete[] factors;
        for (int64_t unit = 0; unit < least(first, units_of(far.count)); ++unit) chosen.scores[unit] = INFINITY;
        chosen.count = 0;
        largest(chosen.scores, chosen.high, units_of(far.count), units(far.count), [&](int64_t unit) {
            for (int64_t entry = unit * SIZE; entry < least((unit + 1) * SIZE, far.count); ++entry)
                chosen.entries[chosen.count++] = int32_t(entry);
        });
    }

  private:
    // What labels are multiplied with.
    static void place(const T* query, const int64_t* channels, float* factors) {
        for (int i = 0; i < WIDTH; ++i) {
            const float x = float(widen(query[CALIBRATES ? channels[i] : BOUNDS ? i % KD : i]));
            const float factor = !BOUNDS ? x : i < KD ? (x > 0 ? x : 0) : (x < 0 ? x : 0);
            for (int unit = 0; unit < BESIDE; ++unit) factors[i * BESIDE + unit] = factor;
        }
    }

    static void score(const T* labels, const float* factors, int64_t group, float* scores) {
        int64_t i = 0;
        if (group >= 3) score_some<3, true>(labels, factors, scores), i = 3;
        else score_some<1, true>(labels, factors, scores), i = 1;
        for (; i + 3 <= group; i += 3) score_some<3, false>(labels, factors + i * FACTORS, scores);
        for (; i < group; ++i) score_some<1, false>(labels, factors + i * FACTORS, scores);
    }

    template <int N, bool FIRST> static INLINE void keep_largest(const f32v (&sums)[N], float* scores, int count) {
        f32v top = sums[0];
        for (int i = 1; i < N; ++i) top = sums[i] > top ? sums[i] : top;
        if (!FIRST) {
            const f32v before = count < LANES ? load(scores, Part{count}) : widen(scores);
            top = before > top ? before : top;
        }
        if (count < LANES) store(scores, top, Part{count});
        else narrow(top, scores);
    }

    template <int N, bool FIRST> static void score_some(const T* labels, const float* factors, float* scores) {
        if constexpr (pairs) {
            constexpr u32v low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
            constexpr u32v high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
            for (int from = 0; from < UNITS; from += 2 * LANES) {
                f32v even[N] = {}, odd[N] = {};
                for (int i = 0; i < WIDTH; i += 2) {
                    u32v a, b;
                    memcpy(&a, labels + i * UNITS + from, sizeof a), memcpy(&b, labels + (i + 1) * UNITS + from, sizeof b);
                    const u32v first = (a & 0xffff) | b << 16, second = a >> 16 | (b & 0xffff0000);
                    for (int query = 0; query < N; ++query) {
                        const float* const factor = factors + query * FACTORS + i;
                        const uint32_t pair = bits<uint32_t>(factor[0]) >> 16 | (bits<uint32_t>(factor[1]) & 0xffff0000);
                        multiply_pair(even[query], first, pair), multiply_pair(odd[query], second, pair);
                    }
                }
                f32v sums[2][N];
                for (int query = 0; query < N; ++query) {
                    sums[0][query] = __builtin_shuffle(even[query], odd[query], low);
                    sums[1][query] = __builtin_shuffle(even[query], odd[query], high);
                }
                keep_largest<N, FIRST>(sums[0], scores + from, LANES);
                keep_largest<N, FIRST>(sums[1], scores + from + LANES, LANES);
            }
        } else if constexpr (UNITS >= LANES) {
            for (int from = 0; from < UNITS; from += LANES) {
                f32v sums[N] = {};
                for (int i = 0; i < WIDTH; ++i) {
                    const f32v label = to_f32(widen(labels + i * UNITS + from));
                    for (int query = 0; query < N; ++query)
                        sums[query] = fma(splat(factors[query * FACTORS + i]), label, sums[query]);
                }
                keep_largest<N, FIRST>(sums, scores + from, LANES);
            }
        } else {
            f32v sums[N] = {};
            sweep<FACTORS>([&](int64_t i, auto lanes) {
                const f32v label = to_f32(load(labels + i, lanes));
                for (int query = 0; query < N; ++query)
                    sums[query] = fma(load(factors + query * FACTORS + i, lanes), label, sums[query]);
            });
            for (int query = 0; query < N; ++query)
                for (int far = LANES / 2; far >= UNITS; far /= 2)
                    sums[query] += __builtin_shuffle(sums[query], lane_numbers<float> ^ far);
            keep_largest<N, FIRST>(sums, scores, UNITS);
        }
    }
};

}  // namespace graft
