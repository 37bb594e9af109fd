// Attention of rows over the paths of their texts in the KV cache.
//
// Keys are visited in the order of their positions, in blocks of 64 cut at multiples of 64, a block in tiles of 16 keys. A
// row whose text lies at other places, because it is part of a tree, walks its own path into the tiles. So the arithmetic
// of a row depends on its position alone: rows share the work of a tile only where they share its keys.
#pragma once
#include "math.h"
#include "matmul.h"

namespace graft {

constexpr int TILE = LANES, KEYS = 64, TILES = KEYS / TILE;
constexpr int64_t QUERIES = 48;  // that are worked on together, where there are no more in one row

// Where the heads of a row lie: first element, elements from head to head.
struct Heads { int64_t width, offset, stride; };

template <class T, int KD, int VD>
void append(const Step& step, int part, int64_t heads, const T* keys, Heads k, const T* values, Heads v, T* kv) {
    const Call& call = step.call;
    for (Share share(call.rows, part, step.parts); share.first < share.last; ++share.first) {
        const int64_t row = share.first;
        for (int64_t head = 0; head < heads; ++head) {
            T* to = kv + ((call.sequences[row] * heads + head) * call.capacity + step.place[row]) * (KD + VD);
            memcpy(to, keys + row * k.width + k.offset + head * k.stride, KD * sizeof(T));
            memcpy(to + KD, values + row * v.width + v.offset + head * v.stride, VD * sizeof(T));
        }
    }
}

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

template <class C> struct Scoring { C scale, softcap; };

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

template <class T, class O, int KD, int VD> struct Attention {
    typedef computing<T> C;
    static constexpr int SUMMED = most(1, REGISTERS / int(sizeof(C) / sizeof(float)) / Query<T, VD>::vectors);

    const Step& step;
    const T* kv;  // of one slot and head
    int64_t group, first, count;  // queries per row; rows
    int64_t window;
    Scoring<C> scoring;
    typename KeyTile<T, KD>::Factor* factors;  // of the queries, for KeyTile::dot
    Query<T, VD>* queries;

    int64_t start(int64_t row) const {
        return window ? most<int64_t>(0, step.position[row] + 1 - window) : 0;
    }
    int64_t place(int64_t row, int64_t position) const {
        return position < step.plain[row] ? position : step.path[step.path_start[row] + position - step.plain[row]];
    }
    bool seen(int64_t row, int64_t from) const { return from <= step.position[row] && from + TILE > start(row); }
    bool plainly(int64_t row, int64_t from) const { return start(row) <= from && from + TILE <= step.plain[row]; }

    // The keys of a tile as a row sees them; those it does not see stand for one it does.
    void point(int64_t row, int64_t from, const T* (&keys)[TILE]) const {
        const int64_t low = most(start(row), from), high = step.position[row];
        for (int key = 0; key < TILE; ++key)
            keys[key] = kv + place(row, least(most(from + key, low), high)) * (KD + VD);
    }

    // Brings the keys and values of a tile nearer.
    void expect(int64_t from) const {
        const char* at = (const char*)(kv + from * (KD + VD));
        for (int64_t byte = 0; byte < int64_t(TILE * (KD + VD) * sizeof(T)); byte += 64) __builtin_prefetch(at + byte, 0, 2);
    }

    template <int N> void score_some(const KeyTile<T, KD>& tile, int at, int64_t query) {
        vec<C> sums[N];
        tile.template dot<N>(factors + query, count * group, sums);
        for (int i = 0; i < N; ++i) {
            vec<C> s = sums[i] * scoring.scale;
            if (scoring.softcap) s = op::tanh(s / scoring.softcap) * scoring.softcap;
            narrow(s, queries[query + i].scores + at * TILE);
        }
    }

    void score(const KeyTile<T, KD>& tile, int at, int64_t query, int64_t end) {
        for (; query + 12 <= end; query += 12) score_some<12>(tile, at, query);
        for (; query + 8 <= end; query += 8) score_some<8>(tile, at, query);
        for (; query + 4 <= end; query += 4) score_some<4>(tile, at, query);
        for (; query + 3 <= end; query += 3) score_some<3>(tile, at, query);
        for (; query < end; ++query) score_some<1>(tile, at, query);
    }

    template <int N> void add_some(const Values<T, VD>& values, int first, int last, int64_t query, int64_t end) {
        for (; query + N <= end; query += N) values.template add<N>(queries + query, first, last);
        if constexpr (N > 1) add_some<N - 1>(values, first, last, query, end);
    }

    // Calls each(keys, first query, last query, row) for the rows that share a tile's keys, then for the others.
    template <class Each> void over_tile(int64_t from, Each each) {
        const T* keys[TILE];
        for (int64_t row = 0, end; row < count; row = end) {
            end = row + 1;
            const bool shared = plainly(first + row, from);
            while (shared && end < count && plainly(first + end, from)) ++end;
            point(first + row, from, keys);
            each(keys, row * group, end * group, first + row, shared);
        }
    }

    void block(int64_t from) {
        KeyTile<T, KD> tile;
        Values<T, VD> values;
        for (int at = 0; at < TILES; ++at)
            over_tile(from + at * TILE, [&](auto& keys, int64_t query, int64_t end, int64_t row, bool shared) {
                if (!seen(row, from + at * TILE)) return;
                if (shared) expect(from + at * TILE + KEYS);
                tile.fill(keys);
                score(tile, at, query, end);
            });
        for (int64_t row = 0; row < count; ++row) {
            const int64_t low = start(first + row) - from, high = step.position[first + row] + 1 - from;
            if (low >= KEYS || high <= 0) continue;
            for (int64_t i = 0; i < group; ++i)
                queries[row * group + i].weigh(int(most<int64_t>(low, 0)), int(least<int64_t>(high, KEYS)));
        }
        bool together = true;  // whether all rows share all tiles: then a sum stays in registers from tile to tile
        for (int64_t row = 0; row < count; ++row)
            for (int at = 0; at < TILES; ++at) together &= plainly(first + row, from + at * TILE);
        for (int at = 0; at < TILES; ++at)
            over_tile(from + at * TILE, [&](auto& keys, int64_t query, int64_t end, int64_t row, bool) {
                if (!seen(row, from + at * TILE)) return;
                values.fill(keys, KD, at);
                if (!together) add_some<SUMMED>(values, at, at + 1, query, end);
            });
        if (together) add_some<SUMMED>(values, 0, TILES, 0, count * group);
    }

    void run(const T* q, Heads heads, const C* sinks, int64_t head, O* out, int64_t out_width) {
        int64_t begin = start(first), end = 0;
        factors = new typename KeyTile<T, KD>::Factor[count * group * KeyTile<T, KD>::steps];
        queries = new Query<T, VD>[count * group];
        for (int64_t row = 0; row < count; ++row) {
            begin = least(begin, start(first + row)), end = most<int64_t>(end, step.position[first + row] + 1);
            for (int64_t i = 0; i < group; ++i) {
                const T* query = q + (first + row) * heads.width + heads.offset + (head + i) * heads.stride;
                KeyTile<T, KD>::place(query, factors + row * group + i, count * group);
                queries[row * group + i].start(sinks ? sinks + head + i : nullptr);
            }
        }
        for (int tile = 0; tile < TILES; ++tile) expect(begin / KEYS * KEYS + tile * TILE);
        for (int64_t from = begin / KEYS * KEYS; from < end; from += KEYS) block(from);
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; i < group; ++i) {
                const Query<T, VD>& query = queries[row * group + i];
                O* to = out + (first + row) * out_width + (head + i) * VD;
                sweep<VD>([&](int64_t d, auto lanes) { store(to + d, query.gathered[d / LANES] / query.total, lanes); });
            }
        delete[] factors;
        delete[] queries;
    }
};

template <class T, class O, int KD, int VD>
void attend(const Step& step, int part, int64_t heads, int64_t kv_heads, const T* q, Heads where, const T* kv, O* out,
            const computing<T>* sinks, int64_t window, Scoring<computing<T>> scoring) {
    const Call& call = step.call;
    const int64_t group = heads / kv_heads;
    // A thread takes whole heads, which prepares each tile once; the heads left over are cut by rows.
    const int64_t whole = kv_heads / step.parts * step.parts, most_rows = most<int64_t>(1, QUERIES / group);
    const int64_t even = most<int64_t>(1, least(most_rows, (call.rows + step.parts - 1) / step.parts));
    int64_t item = 0;
    for (int64_t head = 0; head < kv_heads; ++head) {
        for (int64_t first = 0, end; first < call.rows; first = end, ++item) {
            end = first + 1;
            const int64_t together = head < whole ? most_rows : even;
            while (end < call.rows && call.sequences[end] == call.sequences[first] && end - first < together) ++end;
            if ((head < whole ? head : item) % step.parts != part) continue;
            const T* stored = kv + (call.sequences[first] * kv_heads + head) * call.capacity * (KD + VD);
            Attention<T, O, KD, VD> attention{step, stored, group, first, end - first, window, scoring, nullptr, nullptr};
            attention.run(q, where, sinks, head * group, out, heads * VD);
        }
    }
}

}  // namespace graft
