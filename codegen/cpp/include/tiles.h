// What attention is made of: sixteen keys side by side, a block's values, and the running softmax of a query.
#pragma once
#include "math.h"
#include "matmul.h"

namespace graft {

constexpr int TILE = LANES, KEYS = 64, TILES = KEYS / TILE;

// 16 x 16 words, rows to columns, by four rounds of interleaving.
INLINE void transpose(u32v (&m)[LANES]) {
    constexpr u32v low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    constexpr u32v high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int round = 0; round < 4; ++round) {
        u32v next[LANES];
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = __builtin_shuffle(m[i], m[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(m[i], m[i + LANES / 2], high);
        }
        memcpy(m, next, sizeof m);
    }
}

template <class T> constexpr bool PAIRED = std::is_same_v<T, bf16>;

// Sixteen keys side by side, for each element (of bfloat16: each pair of elements) of their vectors.
template <class T, int KD> struct KeyTile {
    static constexpr int steps = PAIRED<T> ? (KD + 1) / 2 : KD;
    typedef std::conditional_t<PAIRED<T>, u32v, vec<computing<T>>> Lanes;
    typedef std::conditional_t<PAIRED<T>, uint32_t, computing<T>> Factor;
    Lanes of[steps];

    void fill(const T* const (&keys)[TILE]) {
        if constexpr (PAIRED<T> && KD % 32 == 0) {
            for (int d = 0; d < KD; d += 32) {
                u32v square[LANES];
                for (int key = 0; key < TILE; ++key) memcpy(&square[key], keys[key] + d, sizeof(u32v));
                transpose(square);
                memcpy(of + d / 2, square, sizeof square);
            }
        } else if constexpr (PAIRED<T>) {
            for (int d = 0; d < KD; d += 2)
                for (int key = 0; key < TILE; ++key)
                    of[d / 2][key] = keys[key][d].bits | (d + 1 < KD ? uint32_t(keys[key][d + 1].bits) << 16 : 0);
        } else if constexpr (std::is_same_v<computing<T>, float> && KD % LANES == 0) {
            for (int d = 0; d < KD; d += LANES) {
                u32v square[LANES];
                for (int key = 0; key < TILE; ++key) square[key] = bits<u32v>(widen(keys[key] + d));
                transpose(square);
                memcpy(of + d, square, sizeof square);
            }
        } else {
            for (int d = 0; d < KD; ++d)
                for (int key = 0; key < TILE; ++key) of[d][key] = widen(keys[key][d]);
        }
    }

    // Dot products of N queries with the sixteen keys; `queries` are element (pair) after element of `count` queries.
    template <int N> INLINE void dot(const Factor* queries, int64_t count, vec<computing<T>> (&sums)[N]) const {
        for (int i = 0; i < N; ++i) sums[i] = vec<computing<T>>{};
        for (int d = 0; d < steps; ++d)
            for (int i = 0; i < N; ++i) {
                if constexpr (PAIRED<T>) multiply_pair(sums[i], of[d], queries[d * count + i]);
                else sums[i] = fma(splat(queries[d * count + i]), of[d], sums[i]);
            }
    }

    // Puts a query among `count` others for `dot`.
    static void place(const T* query, Factor* to, int64_t count) {
        for (int d = 0; d < steps; ++d) {
            if constexpr (PAIRED<T>)
                to[d * count] = query[2 * d].bits | (2 * d + 1 < KD ? uint32_t(query[2 * d + 1].bits) << 16 : 0);
            else to[d * count] = widen(query[d]);
        }
    }
};

template <class C> struct Scoring {
    C scale, softcap;

    INLINE vec<C> operator()(vec<C> product) const {
        const vec<C> s = product * scale;
        return softcap ? op::tanh(s / softcap) * softcap : s;
    }
};

// The running softmax of one query, and what it has gathered so far.
template <class T, int VD> struct Query {
    typedef computing<T> C;
    static constexpr int vectors = (VD + LANES - 1) / LANES;
    vec<C> gathered[vectors];
    C top, total;
    C scores[KEYS];
    std::conditional_t<PAIRED<T>, bf16, C> weights[KEYS];

    void start(const C* sink) {
        for (auto& part : gathered) part = vec<C>{};
        top = sink ? *sink : -C(INFINITY), total = sink ? 1 : 0;
    }

    // Turns a block's scores, of which those from `low` to `high` count, into weights.
    void weigh(int low, int high) {
        vec<C> s[TILES];
        for (int tile = 0; tile < TILES; ++tile) s[tile] = widen(scores + tile * TILE);
        if (low > 0 || high < KEYS)
            for (int tile = 0; tile < TILES; ++tile) {
                const auto inside = lanes_below(high - tile * TILE, s[0]) & ~lanes_below(low - tile * TILE, s[0]);
                s[tile] = inside ? s[tile] : splat(-C(INFINITY));
            }
        // NaN may get lost here; it comes back with the weights.
        const auto more = [](auto a, auto b) { return a > b ? a : b; };
        const C limit = more(fold<C>(more(more(s[0], s[1]), more(s[2], s[3])), more), top);
        for (int tile = 0; tile < TILES; ++tile) {
            s[tile] = op::exp(s[tile] - limit);
            narrow(s[tile], weights + tile * TILE);
            // They are added up as they are multiplied with, so that their shares still add up to one.
            if constexpr (PAIRED<T>) s[tile] = widen(weights + tile * TILE);
        }
        const C sum = fold<C>((s[0] + s[1]) + (s[2] + s[3]), [](auto a, auto b) { return a + b; });
        if (limit != top) {
            const C faded = op::exp(splat(top - limit))[0];
            total *= faded;
            for (auto& part : gathered) part *= faded;
        }
        total += sum;
        top = limit;
    }
};

// The values of a block, padded to whole vectors: as numbers that are computed with, or in bfloat16 two and two side by
// side.
template <class T, int VD> struct Values {
    typedef Query<T, VD> One;
    static constexpr int vectors = One::vectors, steps = PAIRED<T> ? TILE / 2 : TILE;
    typedef std::conditional_t<PAIRED<T>, u32v, vec<computing<T>>> Lanes;
    Lanes of[TILES * steps][vectors];

    void fill(const T* const (&keys)[TILE], int64_t key_dim, int tile) {
        for (int step = 0; step < steps; ++step)
            sweep<VD>([&](int64_t d, auto lanes) {
                Lanes& to = of[tile * steps + step][d / LANES];
                if constexpr (PAIRED<T>) {
                    const T *even = keys[2 * step] + key_dim + d, *odd = keys[2 * step + 1] + key_dim + d;
                    to = bits<u32v>(load(even, lanes)) >> 16 | bits<u32v>(load(odd, lanes));
                } else {
                    to = load(keys[step] + key_dim + d, lanes);
                }
            });
    }

    // Adds weights times values of some tiles to what N queries have gathered; a key that is not seen weighs nothing.
    template <int N> INLINE void add(One* queries, int first, int last) const {
        vec<computing<T>> sums[N][vectors];
        for (int i = 0; i < N; ++i)
            for (int part = 0; part < vectors; ++part) sums[i][part] = queries[i].gathered[part];
        for (int step = first * steps; step < last * steps; ++step)
            for (int i = 0; i < N; ++i) {
                if constexpr (PAIRED<T>) {
                    uint32_t pair;
                    memcpy(&pair, queries[i].weights + 2 * step, sizeof pair);
                    for (int part = 0; part < vectors; ++part) multiply_pair(sums[i][part], of[step][part], pair);
                } else {
                    const auto weight = load_one(queries[i].weights + step);
                    for (int part = 0; part < vectors; ++part) sums[i][part] = fma(weight, of[step][part], sums[i][part]);
                }
            }
        for (int i = 0; i < N; ++i)
            for (int part = 0; part < vectors; ++part) queries[i].gathered[part] = sums[i][part];
    }
};

}  // namespace graft
