// Sixteen numbers at a time, in the compiler's vector extension: the same source for every instruction set, and the same
// arithmetic for whole vectors and for the part of one at the end of a row.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace graft {

constexpr int LANES = 16;

template <class T> constexpr T least(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T most(T a, T b) { return a < b ? b : a; }

typedef float f32v __attribute__((vector_size(64)));
typedef double f64v __attribute__((vector_size(128)));
typedef int32_t i32v __attribute__((vector_size(64)));
typedef uint32_t u32v __attribute__((vector_size(64)));
typedef int64_t i64v __attribute__((vector_size(128)));
typedef uint16_t u16v __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// How many lanes count: all, or the first few, the others being zero.
struct Whole { static constexpr int count = LANES; };
struct Part { int count; };

template <class C> struct vector_of;
template <> struct vector_of<float> { typedef f32v type; typedef i32v mask; };
template <> struct vector_of<double> { typedef f64v type; typedef i64v mask; };
template <class C> using vec = typename vector_of<C>::type;
template <class C> using mask = typename vector_of<C>::mask;

template <class To, class From> INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <class C> INLINE vec<C> splat(C value) { return value - vec<C>{}; }

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE double widen(int64_t x) { return double(x); }
INLINE float widen(bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
INLINE float widen(f16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return bits<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // Half's numbers are floats whose exponent is 112 less, subnormal ones included.
    return bits<float>(sign | bits<uint32_t>(bits<float>(rest << 13) * 0x1p112f));
}

INLINE void narrow(float x, float& to) { to = x; }
INLINE void narrow(double x, double& to) { to = x; }
INLINE void narrow(double x, int64_t& to) { to = int64_t(x); }
INLINE void narrow(float x, bf16& to) {
    uint32_t u = bits<uint32_t>(x);
    to.bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE void narrow(float x, f16& to) {
    uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest >= 0x47800000) {  // too large, infinite or NaN
        to.bits = uint16_t(sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00));
    } else if (rest < 0x38800000) {  // subnormal: the sum rounds at the place of half's last bit
        to.bits = uint16_t(sign | (bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000));
    } else {
        to.bits = uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
    }
}

INLINE f32v widen(const float* p) { f32v x; memcpy(&x, p, sizeof x); return x; }
INLINE f64v widen(const double* p) { f64v x; memcpy(&x, p, sizeof x); return x; }
INLINE f64v widen(const int64_t* p) { i64v x; memcpy(&x, p, sizeof x); return __builtin_convertvector(x, f64v); }
INLINE f32v widen(const bf16* p) {
    u16v x;
    memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
    return bits<f32v>(bits<u32v>(_mm512_cvtepu16_epi32(bits<__m256i>(x))) << 16);
#else
    return bits<f32v>(__builtin_convertvector(x, u32v) << 16);
#endif
}
INLINE f32v widen(const f16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    f32v x;
    for (int lane = 0; lane < LANES; ++lane) x[lane] = widen(p[lane]);
    return x;
#endif
}

INLINE void narrow(f32v x, float* p) { memcpy(p, &x, sizeof x); }
INLINE void narrow(f64v x, double* p) { memcpy(p, &x, sizeof x); }
INLINE void narrow(f64v x, int64_t* p) { i64v y = __builtin_convertvector(x, i64v); memcpy(p, &y, sizeof y); }
INLINE u32v rounded_bits(f32v x) {
    u32v u = bits<u32v>(x);
    return x != x ? u | 0x400000 : u + 0x7fff + (u >> 16 & 1);
}
INLINE void narrow(f32v x, bf16* p) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bits<__m512i>(rounded_bits(x) >> 16)));
#else
    u16v y = __builtin_convertvector(rounded_bits(x) >> 16, u16v);
    memcpy(p, &y, sizeof y);
#endif
}
INLINE void narrow(f32v x, f16* p) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int lane = 0; lane < LANES; ++lane) narrow(x[lane], p[lane]);
#endif
}

template <class T> using computing = decltype(widen(T{}));

template <class T> INLINE auto load(const T* p, Whole) { return widen(p); }
template <class T> INLINE auto load(const T* p, Part part) {
    T all[LANES] = {};
    memcpy(all, p, part.count * sizeof(T));
    return widen(all);
}
template <class T, class N> INLINE auto load_strided(const T* p, int64_t stride, N lanes) {
    computing<T> all[LANES] = {};
    for (int lane = 0; lane < lanes.count; ++lane) all[lane] = widen(p[lane * stride]);
    return widen(all);
}
template <class T> INLINE auto load_one(const T* p) { return splat<computing<T>>(widen(*p)); }

template <class T, class V> INLINE void store(T* p, V x, Whole) { narrow(x, p); }
template <class T, class V> INLINE void store(T* p, V x, Part part) {
    T all[LANES];
    narrow(x, all);
    memcpy(p, all, part.count * sizeof(T));
}
template <class T, class V, class N> INLINE void store_strided(T* p, int64_t stride, V x, N lanes) {
    for (int lane = 0; lane < lanes.count; ++lane) narrow(x[lane], p[lane * stride]);
}
template <class T, class C> INLINE void store_one(T* p, C x) { narrow(x, *p); }

// Rounding to a dtype in the midst of a computation; `to_*` changes what is computed in.
INLINE f32v to_f32(f32v x) { return x; }
INLINE f32v to_f32(f64v x) { return __builtin_convertvector(x, f32v); }
INLINE f64v to_f64(f64v x) { return x; }
INLINE f64v to_f64(f32v x) { return __builtin_convertvector(x, f64v); }
template <class V> INLINE f32v to_bf16(V x) { return bits<f32v>(rounded_bits(to_f32(x)) & 0xffff0000); }
template <class V> INLINE f32v to_f16(V x) {
    f16 all[LANES];
    narrow(to_f32(x), all);
    return widen(all);
}
template <class V> INLINE f64v to_i64(V x) {
    return __builtin_convertvector(__builtin_convertvector(to_f64(x), i64v), f64v);
}

template <class T, class C> INLINE C rounded(C x) {
    T narrowed;
    narrow(x, narrowed);
    return widen(narrowed);
}

// a * b + c, rounded once where the instruction set can.
INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, sizeof a), memcpy(y, &b, sizeof b), memcpy(z, &c, sizeof c);
    z[0] = _mm256_fmadd_ps(x[0], y[0], z[0]), z[1] = _mm256_fmadd_ps(x[1], y[1], z[1]);
    memcpy(&c, z, sizeof c);
    return c;
#else
    return a * b + c;
#endif
}
INLINE f64v fma(f64v a, f64v b, f64v c) {
#if defined(__AVX512F__)
    __m512d x[2], y[2], z[2];
    memcpy(x, &a, sizeof a), memcpy(y, &b, sizeof b), memcpy(z, &c, sizeof c);
    z[0] = _mm512_fmadd_pd(x[0], y[0], z[0]), z[1] = _mm512_fmadd_pd(x[1], y[1], z[1]);
    memcpy(&c, z, sizeof c);
    return c;
#else
    return a * b + c;
#endif
}

INLINE f32v max(f32v a, f32v b) { return (a > b) | (a != a) ? a : b; }
INLINE f64v max(f64v a, f64v b) { return (a > b) | (a != a) ? a : b; }
INLINE f32v min(f32v a, f32v b) { return (a < b) | (a != a) ? a : b; }
INLINE f64v min(f64v a, f64v b) { return (a < b) | (a != a) ? a : b; }

template <class C> constexpr mask<C> lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE i32v lanes_below(int count, f32v) { return lane_numbers<float> < count; }
INLINE i64v lanes_below(int count, f64v) { return lane_numbers<double> < count; }
template <class V> INLINE V keep(V x, V, Whole) { return x; }
template <class V> INLINE V keep(V x, V other, Part part) { return lanes_below(part.count, x) ? x : other; }

// All lanes combined into one, in halves, always in the same order.
template <class C, class F> INLINE C fold(vec<C> x, F combine) {
    for (int width = LANES / 2; width; width /= 2) x = combine(x, __builtin_shuffle(x, lane_numbers<C> ^ width));
    return x[0];
}

// Whether any lane of a comparison holds.
INLINE bool any(i32v held) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)held, (__m512i)held);
#else
    int32_t all = 0;
    for (int lane = 0; lane < LANES; ++lane) all |= held[lane];
    return all;
#endif
}

// Calls body(i) for i = 0 .. count - 1, each a constant, so that arrays they index can be registers.
template <class Body, size_t... i> INLINE void unrolled(Body body, std::index_sequence<i...>) {
    (body(std::integral_constant<int, int(i)>{}), ...);
}
template <int count, class Body> INLINE void unrolled(Body body) { unrolled(body, std::make_index_sequence<count>{}); }

// Calls body(first element, lanes) over `count` elements.
template <int64_t count, class Body> INLINE void sweep(Body body) {
    constexpr int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) body(i, Whole{});
    if constexpr (count > whole) body(whole, Part{int(count - whole)});
}

}  // namespace graft
