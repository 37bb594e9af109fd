// Attention of rows over far entries, in pages or in place, and then over the tail of their slots.
//
// Blocks of 64 far entries come first, in their order, then the tail's as in attention.h; one running softmax goes through
// all of them. What a page holds is known to a loader. Its entries are rows in memory (`in_rows`: `at` says where), or
// they are codes: then it weighs and adds up a whole page by itself (`attend`), and decodes single entries (`row`).
#pragma once
#include "affine.h"
#include "attention.h"
#include "selection.h"

namespace graft {

// As they lie in the tail.
template <class T, int KD, int VD> struct InPlace {
    static constexpr bool in_rows = true;
    static constexpr int key_dim = KD;

    static const uint8_t* page(const Far<T>& far, int64_t number) {
        return (const uint8_t*)(far.tail + number * KEYS * far.width);
    }
    static const T* at(const Far<T>& far, const uint8_t* page, int64_t entry) {
        return (const T*)page + entry * far.width;
    }
};

// A token's key and value side by side.
template <class T, int KD, int VD> struct DensePages {
    static constexpr bool in_rows = true;
    static constexpr int key_dim = KD;

    static const uint8_t* page(const Far<T>& far, int64_t number) { return far.page(number); }
    static const T* at(const Far<T>&, const uint8_t* page, int64_t entry) {
        return (const T*)page + entry * (KD + VD);
    }
};

// Some channels of the keys, whose numbers stand in front of what Inner stores.
template <class T, int KD, int VD, int KEPT, class Stored> struct KeyChannels {
    typedef Stored Inner;
    static constexpr bool in_rows = false;
    static constexpr int key_dim = KEPT;

    static const uint8_t* page(const Far<T>& far, int64_t number) { return far.page(number); }
    static const uint8_t* inner(const uint8_t* page) { return page + (KEPT + 63) / 64 * 64; }
    static void expect(const uint8_t* page, int64_t entry) {
        if constexpr (!Inner::in_rows) Inner::expect(inner(page), entry);
    }
    static void row(const Far<T>& far, const uint8_t* page, int64_t entry, T* key, T* value) {
        T narrow[KEPT];
        if constexpr (Inner::in_rows) {
            const T* from = Inner::at(far, inner(page), entry);
            memcpy(narrow, from, sizeof narrow), memcpy(value, from + KEPT, VD * sizeof(T));
        } else {
            Inner::row(far, inner(page), entry, narrow, value);
        }
        memset((void*)key, 0, KD * sizeof(T));
        for (int d = 0; d < KEPT; ++d) key[page[d]] = narrow[d];
    }
};

constexpr int64_t SOON = 12;  // so many entries ahead codes are brought nearer

template <class L> concept Narrowing = requires { typename L::Inner; };

// The far entries of an Attention's rows. Queries have numbers: row after row, those of a row's group together.
template <class A, class L> struct FarAttention {
    typedef typename A::Element T;
    static constexpr int KD = A::key_dim, VD = A::value_dim, KEPT = L::key_dim;
    typedef KeyTile<T, KEPT> Tile;

    A& a;
    const Far<T>& far;
    const int64_t count;                      // of queries
    const T** const own;                      // where they lie
    T* const narrow;                          // where keys have some channels: those of the queries
    typename Tile::Factor* const factors;     // and their factors

    FarAttention(A& a, const Far<T>& far)
        : a(a), far(far), count(a.count * a.group), own(new const T*[count]),
          narrow(Narrowing<L> ? new T[count * KEPT] : nullptr),
          factors(Narrowing<L> ? new typename Tile::Factor[count * Tile::steps] : nullptr) {
        for (int64_t i = 0; i < count; ++i) own[i] = Narrowing<L> ? narrow + i * KEPT : a.query(i);
    }
    FarAttention(const FarAttention&) = delete;
    ~FarAttention() {
        delete[] own;
        delete[] narrow;
        delete[] factors;
    }

    // A block of entries that are rows, their keys of D elements, for the queries from `query` to `end`.
    // `next` are entries of the block after it, which are brought nearer meanwhile.
    template <int D>
    void rows(const T* const* entries, int count, const T* const* next, int more,
              const typename KeyTile<T, D>::Factor* factors, int64_t query, int64_t end) {
        KeyTile<T, D> tile;
        Values<T, VD> values;
        const int tiles = (count + TILE - 1) / TILE;
        const T* some[TILE];
        const auto point = [&](int at) {
            for (int i = 0; i < TILE; ++i) some[i] = entries[least(at * TILE + i, count - 1)];
        };
        for (int at = 0; at < tiles; ++at) {
            expect_rows<D>(next + at * TILE, least(more - at * TILE, TILE / 2));
            point(at);
            tile.fill(some);
            a.score(tile, at, query, end, factors);
        }
        for (int64_t i = query; i < end; ++i) a.queries[i].weigh(0, count);
        for (int at = 0; at < tiles; ++at) {
            expect_rows<D>(next + at * TILE + TILE / 2, least(more - at * TILE, TILE) - TILE / 2);
            point(at);
            values.fill(some, D, at);
        }
        a.template add_some<A::SUMMED>(values, 0, tiles, query, end);
    }

    // Few at a time, so that the loads that the work waits for get through between them.
    template <int D> static INLINE void expect_rows(const T* const* rows, int count) {
        for (int i = 0; i < count; ++i)
            for (int64_t byte = 0; byte < int64_t((D + VD) * sizeof(T)); byte += 64)
                __builtin_prefetch((const char*)rows[i] + byte, 0, 2);
    }

    // A page of which so many entries count, for all queries; `next` is the page after it.
    void page(const uint8_t* page, const uint8_t* next, int entries) {
        if constexpr (Narrowing<L>) {
            typedef typename L::Inner Inner;
            for (int64_t i = 0; i < count; ++i) {
                const T* query = a.query(i);
                for (int d = 0; d < KEPT; ++d) narrow[i * KEPT + d] = query[page[d]];
            }
            if constexpr (Inner::in_rows) {
                for (int64_t i = 0; i < count; ++i) Tile::place(narrow + i * KEPT, factors + i, count);
                whole<Inner>(L::inner(page), next, entries, factors);
            } else {
                Inner::attend(a, L::inner(page), next, entries, count, own);
            }
        } else if constexpr (L::in_rows) {
            whole<L>(page, next, entries, a.factors);
        } else {
            L::attend(a, page, next, entries, count, own);
        }
    }

    // A page of rows.
    template <class Rows>
    void whole(const uint8_t* page, const uint8_t* next, int entries, const typename Tile::Factor* factors) {
        const T *at[KEYS], *then[KEYS];
        for (int i = 0; i < entries; ++i) at[i] = Rows::at(far, page, i), then[i] = Rows::at(far, next, i);
        rows<KEPT>(at, entries, then, entries, factors, 0, count);
    }

    void all() {
        for (int64_t from = 0; from < far.count; from += KEYS) {
            const uint8_t* const at = L::page(far, from / KEYS);
            const uint8_t* const next = from + KEYS < far.count ? L::page(far, from / KEYS + 1) : at;
            page(at, next, int(least<int64_t>(far.count - from, KEYS)));
        }
    }

    // Chosen entries, for the queries of one row.
    void some(const Chosen& chosen, int64_t row) {
        const T* entries[2][KEYS];
        T* const decoded = L::in_rows ? nullptr : new T[KEYS * (KD + VD)];
        const auto point = [&](int64_t from, const T** to) {
            const int here = int(most<int64_t>(0, least<int64_t>(chosen.count - from, KEYS)));
            for (int i = 0; i < here; ++i) {
                const int64_t entry = chosen.entries[from + i];
                const uint8_t* page = L::page(far, entry / KEYS);
                if constexpr (L::in_rows) {
                    to[i] = L::at(far, page, entry % KEYS);
                } else {
                    const int64_t later = chosen.entries[least(from + i + SOON, chosen.count - 1)];
                    L::expect(L::page(far, later / KEYS), later % KEYS);
                    T* const place = decoded + i * (KD + VD);
                    L::row(far, page, entry % KEYS, place, place + KD);
                    to[i] = place;
                }
            }
            return here;
        };
        int count = point(0, entries[0]);
        for (int64_t from = 0; from < chosen.count; from += KEYS) {
            const int64_t at = from / KEYS % 2;
            const int more = L::in_rows ? point(from + KEYS, entries[1 - at]) : 0;
            rows<KD>(entries[at], count, entries[1 - at], more, a.factors, row * a.group, (row + 1) * a.group);
            count = L::in_rows ? more : point(from + KEYS, entries[1 - at]);
        }
        delete[] decoded;
    }
};

// A state with pages as a function is given it; what belongs to a layer is that of this one.
struct Paged {
    int64_t capacity, page_bytes, label_bytes, most_pages;  // most_pages: that a kv head may have
    const int64_t *lengths, *starts;
    const uint8_t* pages;
    const int32_t *table, *counts;
    const uint8_t* labels;
    const int64_t* channels;
};

template <class T, class O, int KD, int VD, int W, class Loader, class Choice>
void attend_pages(const Step& step, int part, int64_t heads, int64_t kv_heads, const T* q, Heads where, const T* kv,
                  const Paged& paged, O* out, const computing<T>* sinks, Scoring<computing<T>> scoring, Choice choice) {
    typedef Attention<T, O, KD, VD, W> A;
    const int64_t group = heads / kv_heads;
    over_heads(step, part, kv_heads, group, [&](int64_t head, int64_t first, int64_t end) {
        const int64_t slot = step.call.sequences[first], at = slot * kv_heads + head;
        const int64_t base = step.call.lengths[slot] - paged.lengths[slot];  // position of the tail's first place
        const T* const tail = kv + at * paged.capacity * W;
        const Far<T> far{tail, W, paged.pages, paged.page_bytes, paged.table + at * paged.most_pages, paged.counts[at]};
        A attention(step, tail - base * W, group, first, end - first, 0, base + paged.starts[slot], scoring,
                    q + where.offset + head * group * where.stride, where);
        attention.open(sinks ? sinks + head * group : nullptr);
        FarAttention<A, Loader> entries{attention, far};
        if constexpr (std::is_same_v<Choice, Everything>) {
            entries.all();
        } else if (choice.units(far.count) == Choice::units_of(far.count)) {
            entries.all();
        } else {
            const int64_t* channels = paged.channels + at * Choice::width;
            Chosen chosen(far.count);
            for (int64_t row = 0; row < attention.count; ++row) {
                choice.choose(far, paged.labels, paged.label_bytes, channels, attention.query(row * group), group,
                              where.stride, chosen);
                entries.some(chosen, row);
            }
        }
        attention.tail();
        attention.close(out + head * group * VD, heads * VD);
    });
}

}  // namespace graft
