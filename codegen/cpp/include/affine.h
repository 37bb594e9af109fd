// Pages of small integers with a scale and a least value for each group (compiler/kv/codecs.py: Affine).
//
// In bfloat16 nothing is decoded: products are summed with the codes themselves, which bfloat16 holds exactly, and scales
// are multiplied into what they are multiplied with, queries and weights. 0x4300 | n is 128 + n in bfloat16 for n < 128.
// Rounding those products to bfloat16 then counts for a number's distance from the middle of its group, because the
// middle is added for itself.
#pragma once
#include "codes.h"

namespace graft {

template <class T, int KD, int VD, int KEY_BITS, int VALUE_BITS, int BY_CHANNEL, int KEY_GROUP, int VALUE_GROUP>
struct Affine {
    typedef computing<T> C;
    static constexpr bool in_rows = false;
    static constexpr int key_dim = KD;
    static constexpr int PAIRS = (KD + 1) / 2, PARTS = (VD + LANES - 1) / LANES;
    // Groups of the channels of one token, or of one channel's tokens.
    static constexpr int KEY_GROUPS = BY_CHANNEL ? KEYS / KEY_GROUP : (KD + KEY_GROUP - 1) / KEY_GROUP;
    static constexpr int VALUE_GROUPS = (VD + VALUE_GROUP - 1) / VALUE_GROUP;
    static constexpr int KEY_SCALES = KEY_GROUPS * (BY_CHANNEL ? KD : KEYS), VALUE_SCALES = KEYS * VALUE_GROUPS;
    // Bytes of sixteen pairs of codes; what stands in front of the sections of a page.
    static constexpr int KEY_STEP = 4 * KEY_BITS, VALUE_STEP = 4 * VALUE_BITS;
    static constexpr int VALUE_CODES = TILES * PAIRS * KEY_STEP;
    static constexpr int KEY_SCALE = VALUE_CODES + KEYS / 2 * PARTS * VALUE_STEP;
    static constexpr int KEY_LEAST = KEY_SCALE + 2 * KEY_SCALES;
    static constexpr int VALUE_SCALE = KEY_LEAST + 2 * KEY_SCALES, VALUE_LEAST = VALUE_SCALE + 2 * VALUE_SCALES;

    static constexpr int BYTES = (VALUE_LEAST + 2 * VALUE_SCALES + 63) / 64 * 64;
    // Tiles that are worked on together; steps of the work on a page, of which each brings a part of the next one nearer.
    static constexpr int M = BY_CHANNEL ? least(2, KEY_GROUP / TILE) : 2, STEPS = TILES / M * PAIRS + KEYS / 2;
    typedef Nearing<BYTES, STEPS> Next;

    static const uint8_t* page(const Far<T>& far, int64_t number) { return far.page(number); }
    static const f16* halves(const uint8_t* page, int section) { return (const f16*)(page + section); }

    // Brings nearer what `row` reads of the entry for itself.
    static void expect(const uint8_t* page, int64_t entry) {
        const uint8_t* keys = page + entry / TILE * PAIRS * KEY_STEP;
        for (int byte = 0; byte < PAIRS * KEY_STEP; byte += 64) __builtin_prefetch(keys + byte, 0, 2);
        const uint8_t* values = page + VALUE_CODES + entry / 2 * PARTS * VALUE_STEP;
        for (int byte = 0; byte < PARTS * VALUE_STEP; byte += 64) __builtin_prefetch(values + byte, 0, 2);
    }
    static void row(const Far<T>&, const uint8_t* page, int64_t entry, T* key, T* value) {
        const int token = int(entry), odd = token % 2;
        const f16 *scale = halves(page, KEY_SCALE), *low = halves(page, KEY_LEAST);
        f32v codes[(PAIRS + LANES - 1) / LANES * 2];
        const uint8_t* from = page + token / TILE * PAIRS * KEY_STEP + token % TILE * KEY_BITS / 4;
        for (int first = 0; first < PAIRS; first += LANES) {
            f32v even, uneven;
            decoded(column(from + first * KEY_STEP, odd), even, uneven);
            codes[first / LANES * 2] = __builtin_shuffle(even, uneven, FIRST_PAIRS);
            codes[first / LANES * 2 + 1] = __builtin_shuffle(even, uneven, FIRST_PAIRS + LANES / 2);
        }
        sweep<KD>([&](int64_t d, auto lanes) {
            const int64_t at = BY_CHANNEL ? token / KEY_GROUP * KD + d : d / KEY_GROUP * KEYS + token;
            const f32v x = BY_CHANNEL ? fma(codes[d / LANES], load(scale + at, lanes), load(low + at, lanes))
                                      : fma(codes[d / LANES], load_one(scale + at), load_one(low + at));
            store(key + d, widened(x, vec<C>{}), lanes);
        });
        scale = halves(page, VALUE_SCALE) + token * VALUE_GROUPS, low = halves(page, VALUE_LEAST) + token * VALUE_GROUPS;
        from = page + VALUE_CODES + token / 2 * PARTS * VALUE_STEP;
        sweep<VD>([&](int64_t d, auto lanes) {
            const u32v pairs = code_pairs<VALUE_BITS>(from + d / LANES * VALUE_STEP);
            const f32v code = __builtin_convertvector(bits<i32v>(odd ? pairs >> 16 : pairs & 0xffff), f32v);
            const f32v x = fma(code, load_one(scale + d / VALUE_GROUP), load_one(low + d / VALUE_GROUP));
            store(value + d, widened(x, vec<C>{}), lanes);
        });
    }

    // A page of which so many entries count, for so many queries, of KD elements each; `next` is the page after it.
    template <class A>
    static void attend(A& a, const uint8_t* page, const uint8_t* next, int count, int64_t queries, const T* const* own) {
        ValueScales scales;
        scales.fill(page, count);
        if constexpr (PAIRED<T>) {
            Next ahead{(const char*)next};
            constexpr int few = most(1, least(4, REGISTERS / 4));
            some<few>(queries, [&](auto n, int64_t at) { score<n.value>(a, page, at, own, ahead); });
            for (int64_t i = 0; i < queries; ++i) a.queries[i].weigh(0, count);
            some<A::SUMMED>(queries, [&](auto n, int64_t at) { add<n.value>(a, page, count, scales, at, ahead); });
        } else {
            for (int byte = 0; byte < BYTES; byte += 64) __builtin_prefetch(next + byte, 0, 2);
            typedef KeyTile<T, KD> Tile;
            auto* const factors = new typename Tile::Factor[queries * KD];
            for (int64_t i = 0; i < queries; ++i) Tile::place(own[i], factors + i, queries);
            Tile tile;
            for (int at = 0; at < TILES; ++at) {
                fill(tile, page, at);
                a.score(tile, at, 0, queries, factors);
            }
            delete[] factors;
            for (int64_t i = 0; i < queries; ++i) a.queries[i].weigh(0, count);
            Values<T, VD> values;
            fill(values, page, scales);
            a.template add_some<A::SUMMED>(values, 0, TILES, 0, queries);
        }
    }

  private:
    static constexpr i32v FIRST_PAIRS = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};

    // A token's pairs of codes from sixteen steps, as `code_pairs` has them; what lies behind its keys is in the page, too.
    static INLINE u32v column(const uint8_t* from, int odd) {
        u32v x;
#if defined(__AVX512F__)
        x = bits<u32v>(_mm512_i32gather_epi32((__m512i)(lane_numbers<float> * KEY_STEP), from, 1));
#else
        for (int lane = 0; lane < LANES; ++lane) x[lane] = from[lane * KEY_STEP] | from[lane * KEY_STEP + 1] << 8;
#endif
        if constexpr (KEY_BITS == 8) return (x & 0xff) | (x & 0xff00) << 8;
        if constexpr (KEY_BITS == 4) return (x & 0xf) | (x & 0xf0) << 12;
        x = x >> 4 * odd;
        return (x & 3) | (x & 12) << 14;
    }

    template <int N> struct Number { static constexpr int value = N; };
    // Calls work(N, first) over all queries, as many at a time as may be.
    template <int N, class Work> static INLINE void some(int64_t queries, Work work, int64_t at = 0) {
        for (; at + N <= queries; at += N) work(Number<N>{}, at);
        if constexpr (N > 1) some<N - 1>(queries, work, at);
    }

    // Scales of values, and the value of code 0 (where codes are not decoded, of a code in the middle), group by group;
    // zero behind the entries that count.
    struct ValueScales {
        alignas(64) float scale[VALUE_GROUPS][KEYS], base[VALUE_GROUPS][KEYS];

        void fill(const uint8_t* page, int count) {
            apart(halves(page, VALUE_SCALE), scale, count), apart(halves(page, VALUE_LEAST), base, count);
            if constexpr (PAIRED<T>)
                for (int group = 0; group < VALUE_GROUPS; ++group)
                    for (int at = 0; at < KEYS; at += LANES) {
                        const f32v x = widen(scale[group] + at);
                        narrow(fma(x, splat(MIDDLE<VALUE_BITS>), widen(base[group] + at)), base[group] + at);
                    }
        }
        static void apart(const f16* from, float (&to)[VALUE_GROUPS][KEYS], int count) {
            constexpr i32v even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
            for (int tile = 0; tile < TILES; ++tile) {
                f32v lanes[VALUE_GROUPS];
                if constexpr (VALUE_GROUPS <= 2) {
                    for (int i = 0; i < VALUE_GROUPS; ++i) lanes[i] = widen(from + (tile * VALUE_GROUPS + i) * LANES);
                    if constexpr (VALUE_GROUPS == 2) {
                        const f32v odd = __builtin_shuffle(lanes[0], lanes[1], even + 1);
                        lanes[0] = __builtin_shuffle(lanes[0], lanes[1], even), lanes[1] = odd;
                    }
                } else {
                    for (int i = 0; i < VALUE_GROUPS; ++i)
                        lanes[i] = load_strided(from + tile * LANES * VALUE_GROUPS + i, VALUE_GROUPS, Whole{});
                }
                for (int i = 0; i < VALUE_GROUPS; ++i)
                    narrow(lanes_below(count - tile * TILE, lanes[i]) ? lanes[i] : f32v{}, to[i] + tile * TILE);
            }
        }
    };

    // Factors of N queries for the codes of a group of tokens, and what is to be added to the products' sums.
    template <int N, size_t size>
    static INLINE void fold_scales(const T* const* own, const uint8_t* page, int group, bf16 (&factors)[N][size], float* rest) {
        const f16 *scales = halves(page, KEY_SCALE) + group * KD, *least = halves(page, KEY_LEAST) + group * KD;
        f32v sums[N] = {};
        sweep<KD>([&](int64_t d, auto lanes) {
            const f32v scale = load(scales + d, lanes), middle = fma(scale, splat(MIDDLE<KEY_BITS>), load(least + d, lanes));
            unrolled<N>([&](auto i) {
                const f32v x = load(own[i] + d, lanes), factor = rounded_factors(x * scale, factors[i] + d);
                sums[i] = fma(factor, splat(-EXCESS<KEY_BITS> - MIDDLE<KEY_BITS>), fma(x, middle, sums[i]));
            });
        });
        for (int i = 0; i < N; ++i) rest[i] = sum_of(sums[i]);
    }

    // Products of codes from pair `first` to pair `last` with the factors of N queries, for M tiles.
    template <int N, size_t size>
    static INLINE void multiply(f32v (&sums)[M][N], const uint8_t* page, int tile, int first, int last,
                                const bf16 (&factors)[N][size], Next& ahead) {
        const uint8_t* from = page + (tile * PAIRS + first) * KEY_STEP;
        for (int pair = first; pair < last; ++pair, from += KEY_STEP) {
            ahead();
            u32v codes[M];
            unrolled<M>([&](auto m) { codes[m] = bf16_pairs<KEY_BITS>(from + m * (PAIRS * KEY_STEP)); });
            unrolled<N>([&](auto i) {
                uint32_t factor;
                memcpy(&factor, factors[i] + 2 * pair, sizeof factor);
                unrolled<M>([&](auto m) { multiply_pair(sums[m][i], codes[m], factor); });
            });
        }
    }

    template <int N, class A>
    static void score(A& a, const uint8_t* page, int64_t query, const T* const* own, Next& ahead) {
        alignas(64) bf16 factors[N][(KD + LANES - 1) / LANES * LANES];
        const auto put = [&](f32v sum, int i, int tile) { narrow(a.scoring(sum), a.queries[query + i].scores + tile * TILE); };
        if constexpr (BY_CHANNEL) {
            float rest[N];
            for (int tile = 0; tile < TILES; tile += M) {
                if (tile * TILE % KEY_GROUP == 0) fold_scales<N>(own + query, page, tile * TILE / KEY_GROUP, factors, rest);
                f32v sums[M][N] = {};
                multiply<N>(sums, page, tile, 0, PAIRS, factors, ahead);
                for (int m = 0; m < M; ++m)
                    for (int i = 0; i < N; ++i) put(sums[m][i] + rest[i], i, tile + m);
            }
        } else {
            float rest[N][KEY_GROUPS];  // sums of a query's factors
            for (int i = 0; i < N; ++i) {
                f32v sums[KEY_GROUPS] = {};
                sweep<KD>([&](int64_t d, auto lanes) {
                    const f32v x = load(own[query + i] + d, lanes);
                    narrow(x, factors[i] + d), sums[d / KEY_GROUP] += x;
                });
                for (int group = 0; group < KEY_GROUPS; ++group) rest[i][group] = sum_of(sums[group]);
            }
            for (int tile = 0; tile < TILES; tile += M) {
                f32v total[M][N] = {};
                for (int group = 0; group < KEY_GROUPS; ++group) {
                    f32v sums[M][N] = {};
                    const int first = group * KEY_GROUP / 2, last = least(PAIRS, (group + 1) * KEY_GROUP / 2);
                    multiply<N>(sums, page, tile, first, last, factors, ahead);
                    for (int m = 0; m < M; ++m) {
                        const int at = group * KEYS + (tile + m) * TILE;
                        const f32v scale = widen(halves(page, KEY_SCALE) + at), low = widen(halves(page, KEY_LEAST) + at);
                        for (int i = 0; i < N; ++i) {
                            const f32v codes = sums[m][i] - EXCESS<KEY_BITS> * rest[i][group];
                            total[m][i] = fma(codes, scale, fma(low, splat(rest[i][group]), total[m][i]));
                        }
                    }
                }
                for (int m = 0; m < M; ++m)
                    for (int i = 0; i < N; ++i) put(total[m][i], i, tile + m);
            }
        }
    }

    template <int N, class A>
    static void add(A& a, const uint8_t* page, int count, const ValueScales& scales, int64_t query, Next& ahead) {
        alignas(64) bf16 factors[N][VALUE_GROUPS][KEYS];
        float rest[N][VALUE_GROUPS];
        for (int i = 0; i < N; ++i)
            for (int group = 0; group < VALUE_GROUPS; ++group) {
                f32v more{};
                for (int at = 0; at < KEYS; at += TILE) {
                    const f32v weight = widen(a.queries[query + i].weights + at);
                    const f32v factor = rounded_factors(weight * widen(scales.scale[group] + at), factors[i][group] + at);
                    more = fma(weight, widen(scales.base[group] + at), more);
                    more = fma(factor, splat(-EXCESS<VALUE_BITS> - MIDDLE<VALUE_BITS>), more);
                }
                rest[i][group] = sum_of(more);
            }
        f32v sums[N][PARTS];
        unrolled<N>([&](auto i) {
            unrolled<PARTS>([&](auto part) { sums[i][part] = a.queries[query + i].gathered[part]; });
        });
        const uint8_t* codes = page + VALUE_CODES;
        for (int step = 0; step < (count + 1) / 2; ++step, codes += PARTS * VALUE_STEP) {
            ahead();
            unrolled<PARTS>([&](auto part) {
                const u32v values = bf16_pairs<VALUE_BITS>(codes + part * VALUE_STEP);
                unrolled<N>([&](auto i) {
                    uint32_t pair;
                    memcpy(&pair, factors[i][part * LANES / VALUE_GROUP] + 2 * step, sizeof pair);
                    multiply_pair(sums[i][part], values, pair);
                });
            });
        }
        unrolled<N>([&](auto i) {
            unrolled<PARTS>([&](auto part) {
                a.queries[query + i].gathered[part] = sums[i][part] + rest[i][part * LANES / VALUE_GROUP];
            });
        });
    }

    // Sixteen keys, decoded.
    static void fill(KeyTile<T, KD>& tile, const uint8_t* page, int at) {
        const f16 *scale = halves(page, KEY_SCALE), *low = halves(page, KEY_LEAST);
        const auto put = [&](int d, vec<C> code) {
            if constexpr (BY_CHANNEL) {
                const int group = at * TILE / KEY_GROUP * KD + d;
                tile.of[d] = fma(code, splat(C(widen(scale[group]))), splat(C(widen(low[group]))));
            } else {
                const int group = d / KEY_GROUP * KEYS + at * TILE;
                tile.of[d] = fma(code, widened(widen(scale + group), code), widened(widen(low + group), code));
            }
        };
        for (int pair = 0; pair < PAIRS; ++pair) {
            vec<C> even, odd;
            decoded(code_pairs<KEY_BITS>(page + (at * PAIRS + pair) * KEY_STEP), even, odd);
            put(2 * pair, even);
            if (2 * pair + 1 < KD) put(2 * pair + 1, odd);
        }
    }

    // All values, decoded; those of entries that do not count are zero.
    static void fill(Values<T, VD>& values, const uint8_t* page, const ValueScales& scales) {
        for (int token = 0; token < KEYS; token += 2)
            for (int part = 0; part < PARTS; ++part) {
                vec<C> code[2];
                decoded(code_pairs<VALUE_BITS>(page + VALUE_CODES + (token / 2 * PARTS + part) * VALUE_STEP), code[0], code[1]);
                const int group = part * LANES / VALUE_GROUP;
                for (int i = 0; i < 2; ++i)
                    values.of[token + i][part] = fma(code[i], splat(C(scales.scale[group][token + i])),
                                                     splat(C(scales.base[group][token + i])));
            }
    }
};

}  // namespace graft
