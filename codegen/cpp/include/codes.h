// Far entries and where their pages are; small integers as bfloat16 holds them.
#pragma once
#include "tiles.h"

namespace graft {

// The far entries of one slot and kv head.
template <class T> struct Far {
    const T* tail;  // its first place
    int64_t width;  // elements from one place to the next
    const uint8_t* pages;
    int64_t page_bytes;
    const int32_t* table;  // the numbers of its pages
    int64_t count;         // entries

    const uint8_t* page(int64_t number) const { return pages + table[number] * page_bytes; }
};

// Sixteen pairs of codes, the first of a pair in the low half of a lane.
template <int BITS> INLINE u32v code_pairs(const uint8_t* from) {
    u32v x;
    if constexpr (BITS == 8) {
        u16v both;
        memcpy(&both, from, sizeof both);
#if defined(__AVX512F__)
        x = bits<u32v>(_mm512_cvtepu16_epi32(bits<__m256i>(both)));
#else
        x = __builtin_convertvector(both, u32v);
#endif
        return (x | x << 8) & 0x00ff00ff;
    } else if constexpr (BITS == 4) {
        typedef uint8_t u8v __attribute__((vector_size(16)));
        u8v both;
        memcpy(&both, from, sizeof both);
#if defined(__AVX512F__)
        x = bits<u32v>(_mm512_cvtepu8_epi32(bits<__m128i>(both)));
#else
        x = __builtin_convertvector(both, u32v);
#endif
        return (x | x << 12) & 0x000f000f;
    } else {
        typedef uint8_t u8h __attribute__((vector_size(8)));
        typedef uint64_t u64v __attribute__((vector_size(64)));
        u8h four;
        memcpy(&four, from, sizeof four);
#if defined(__AVX512F__)
        const u64v wide = bits<u64v>(_mm512_cvtepu8_epi64(_mm_set_epi64x(0, bits<long long>(four))));
#else
        const u64v wide = __builtin_convertvector(four, u64v);
#endif
        x = bits<u32v>(wide | wide << 28);
        return (x | x << 14) & 0x00030003;
    }
}

// The same as pairs of bfloat16: the codes, and this much more.
template <int BITS> constexpr float EXCESS = BITS < 8 ? 128 : 0;
template <int BITS> constexpr float MIDDLE = ((1 << BITS) - 1) / 2.0f;
template <int BITS> INLINE u32v bf16_pairs(const uint8_t* from) {
    const u32v x = code_pairs<BITS>(from);
    if constexpr (BITS < 8) return x | 0x43004300;
    const f32v low = __builtin_convertvector(bits<i32v>(x & 0xffff), f32v);
    const f32v high = __builtin_convertvector(bits<i32v>(x >> 16), f32v);
    return bits<u32v>(low) >> 16 | bits<u32v>(high);
}

// Rounds to bfloat16; returns what it has become.
INLINE f32v rounded_factors(f32v x, bf16* to) {
#if defined(__AVX512BF16__)
    const __m256i narrowed = bits<__m256i>(_mm512_cvtneps_pbh((__m512)x));
    _mm256_storeu_si256((__m256i*)to, narrowed);
    return bits<f32v>(bits<u32v>(_mm512_cvtepu16_epi32(narrowed)) << 16);
#else
    narrow(x, to);
    return widen(to);
#endif
}

// Brings so many bytes nearer, a part with every call.
template <int BYTES, int CALLS> struct Nearing {
    static constexpr int each = (BYTES + 64 * CALLS - 1) / (64 * CALLS);
    const char* from;

    INLINE void operator()() {
        for (int line = 0; line < each; ++line, from += 64) __builtin_prefetch(from, 0, 2);
    }
};

INLINE void decoded(u32v pairs, f32v& low, f32v& high) {
    low = __builtin_convertvector(bits<i32v>(pairs & 0xffff), f32v);
    high = __builtin_convertvector(bits<i32v>(pairs >> 16), f32v);
}
INLINE void decoded(u32v pairs, f64v& low, f64v& high) {
    f32v few, more;
    decoded(pairs, few, more);
    low = to_f64(few), high = to_f64(more);
}

INLINE f32v widened(f32v x, f32v) { return x; }
INLINE f64v widened(f32v x, f64v) { return to_f64(x); }
INLINE float sum_of(f32v x) {
    return fold<float>(x, [](auto a, auto b) { return a + b; });
}

}  // namespace graft
