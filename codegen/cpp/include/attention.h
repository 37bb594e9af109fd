// Attention of rows over the paths of their texts in the KV cache.
//
// Keys are visited in the order of their positions, in blocks of 64 cut at multiples of 64, a block in tiles of 16 keys. A
// row whose text lies at other places, because it is part of a tree, walks its own path into the tiles. So the arithmetic
// of a row depends on its position alone: rows share the work of a tile only where they share its keys.
#pragma once
#include "tiles.h"

namespace graft {

constexpr int64_t QUERIES = 48;  // that are worked on together, where there are no more in one row

// Where the heads of a row lie: first element, elements from head to head.
struct Heads { int64_t width, offset, stride; };

// `tail`, of a state with pages, has how many tokens of each slot lie in it: the last ones of those committed.
template <class T, int KD, int VD>
void append(const Step& step, int part, int64_t heads, const T* keys, Heads k, const T* values, Heads v, T* kv,
            int64_t capacity, const int64_t* tail) {
    const Call& call = step.call;
    for (Share share(call.rows, part, step.parts); share.first < share.last; ++share.first) {
        const int64_t row = share.first, slot = call.sequences[row];
        const int64_t place = step.place[row] - (tail ? call.lengths[slot] - tail[slot] : 0);
        for (int64_t head = 0; head < heads; ++head) {
            T* to = kv + ((slot * heads + head) * capacity + place) * (KD + VD);
            memcpy(to, keys + row * k.width + k.offset + head * k.stride, KD * sizeof(T));
            memcpy(to + KD, values + row * v.width + v.offset + head * v.stride, VD * sizeof(T));
        }
    }
}

// Rows of one slot and kv head. A token takes W elements of the state, its key and value first.
template <class T, class O, int KD, int VD, int W = KD + VD> struct Attention {
    typedef T Element;
    typedef computing<T> C;
    static constexpr int key_dim = KD, value_dim = VD;
    static constexpr int SUMMED = most(1, REGISTERS / int(sizeof(C) / sizeof(float)) / Query<T, VD>::vectors);

    const Step& step;
    const T* kv;  // where the token at position 0 would lie
    int64_t group, first, count;  // queries per row; rows
    int64_t window, cut;  // nothing in front of the cut is seen
    Scoring<C> scoring;
    const T* q;  // the head's first query of row 0
    Heads heads;
    typename KeyTile<T, KD>::Factor* factors = nullptr;  // of the queries, for KeyTile::dot
    Query<T, VD>* queries = nullptr;

    Attention(const Step& step, const T* kv, int64_t group, int64_t first, int64_t count, int64_t window, int64_t cut,
              Scoring<C> scoring, const T* q, Heads heads)
        : step(step), kv(kv), group(group), first(first), count(count), window(window), cut(cut), scoring(scoring), q(q),
          heads(heads), factors(new typename KeyTile<T, KD>::Factor[count * group * KeyTile<T, KD>::steps]),
          queries(new Query<T, VD>[count * group]) {}
    Attention(const Attention&) = delete;
    ~Attention() {
        delete[] factors;
        delete[] queries;
    }

    const T* query(int64_t number) const {
        return q + (first + number / group) * heads.width + number % group * heads.stride;
    }
    int64_t start(int64_t row) const { return window ? most<int64_t>(cut, step.position[row] + 1 - window) : cut; }
    int64_t place(int64_t row, int64_t position) const {
        return position < step.plain[row] ? position : step.path[step.path_start[row] + position - step.plain[row]];
    }
    bool seen(int64_t row, int64_t from) const { return from <= step.position[row] && from + TILE > start(row); }
    bool plainly(int64_t row, int64_t from) const { return start(row) <= from && from + TILE <= step.plain[row]; }

    // The keys of a tile as a row sees them; those it does not see stand for one it does.
    void point(int64_t row, int64_t from, const T* (&keys)[TILE]) const {
        const int64_t low = most(start(row), from), high = step.position[row];
        for (int key = 0; key < TILE; ++key)
            keys[key] = kv + place(row, least(most(from + key, low), high)) * W;
    }

    // Brings the keys and values of a tile nearer.
    void expect(int64_t from) const {
        const char* at = (const char*)(kv + from * W);
        for (int64_t byte = 0; byte < int64_t(TILE * W * sizeof(T)); byte += 64) __builtin_prefetch(at + byte, 0, 2);
    }

    // `factors` are those of the queries for a tile of this kind.
    template <int N, class Tile>
    void score_some(const Tile& tile, int at, int64_t query, const typename Tile::Factor* factors) {
        vec<C> sums[N];
        tile.template dot<N>(factors + query, count * group, sums);
        for (int i = 0; i < N; ++i) narrow(scoring(sums[i]), queries[query + i].scores + at * TILE);
    }

    template <class Tile>
    void score(const Tile& tile, int at, int64_t query, int64_t end, const typename Tile::Factor* factors) {
        for (; query + 12 <= end; query += 12) score_some<12>(tile, at, query, factors);
        for (; query + 8 <= end; query += 8) score_some<8>(tile, at, query, factors);
        for (; query + 4 <= end; query += 4) score_some<4>(tile, at, query, factors);
        for (; query + 3 <= end; query += 3) score_some<3>(tile, at, query, factors);
        for (; query < end; ++query) score_some<1>(tile, at, query, factors);
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
                score(tile, at, query, end, factors);
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

    void open(const C* sinks) {
        for (int64_t i = 0; i < count * group; ++i) {
            KeyTile<T, KD>::place(query(i), factors + i, count * group);
            queries[i].start(sinks ? sinks + i % group : nullptr);
        }
    }

    // Everything from the cut on.
    void tail() {
        int64_t begin = start(first), end = 0;
        for (int64_t row = 0; row < count; ++row)
            begin = least(begin, start(first + row)), end = most<int64_t>(end, step.position[first + row] + 1);
        for (int tile = 0; tile < TILES; ++tile) expect(begin / KEYS * KEYS + tile * TILE);
        for (int64_t from = begin / KEYS * KEYS; from < end; from += KEYS) block(from);
    }

    void close(O* out, int64_t out_width) const {
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; i < group; ++i) {
                const Query<T, VD>& query = queries[row * group + i];
                O* to = out + (first + row) * out_width + i * VD;
                sweep<VD>([&](int64_t d, auto lanes) { store(to + d, query.gathered[d / LANES] / query.total, lanes); });
            }
    }
};

// Calls each(kv head, first row, row after the last) for this part of the work. A thread takes whole heads, which prepares
// each tile once; the heads left over are cut by rows.
template <class Each> void over_heads(const Step& step, int part, int64_t kv_heads, int64_t group, Each each) {
    const Call& call = step.call;
    const int64_t whole = kv_heads / step.parts * step.parts, most_rows = most<int64_t>(1, QUERIES / group);
    const int64_t even = most<int64_t>(1, least(most_rows, (call.rows + step.parts - 1) / step.parts));
    int64_t item = 0;
    for (int64_t head = 0; head < kv_heads; ++head) {
        for (int64_t first = 0, end; first < call.rows; first = end, ++item) {
            end = first + 1;
            const int64_t together = head < whole ? most_rows : even;
            while (end < call.rows && call.sequences[end] == call.sequences[first] && end - first < together) ++end;
            if ((head < whole ? head : item) % step.parts == part) each(head, first, end);
        }
    }
}

template <class T, class O, int KD, int VD>
void attend(const Step& step, int part, int64_t heads, int64_t kv_heads, const T* q, Heads where, const T* kv,
            int64_t capacity, O* out, const computing<T>* sinks, int64_t window, Scoring<computing<T>> scoring) {
    const int64_t group = heads / kv_heads;
    over_heads(step, part, kv_heads, group, [&](int64_t head, int64_t first, int64_t end) {
        const T* stored = kv + (step.call.sequences[first] * kv_heads + head) * capacity * (KD + VD);
        const T* queries = q + where.offset + head * group * where.stride;
        Attention<T, O, KD, VD> attention(step, stored, group, first, end - first, window, 0, scoring, queries, where);
        attention.open(sinks ? sinks + head * group : nullptr);
        attention.tail();
        attention.close(out + head * group * VD, heads * VD);
    });
}

}  // namespace graft
