// The scalar operators on vectors. exp, tanh and erf are our own for float (within 2 units in the last place, fitted on
// the intervals named); the others, and all of them for double, are the C library's, lane by lane.
#pragma once
#include "vec.h"

namespace graft::op {

template <class V> INLINE V add(V a, V b) { return a + b; }
template <class V> INLINE V sub(V a, V b) { return a - b; }
template <class V> INLINE V mul(V a, V b) { return a * b; }
template <class V> INLINE V div(V a, V b) { return a / b; }
template <class V> INLINE V neg(V a) { return -a; }
template <class V> INLINE V abs(V a) { return a <= 0 ? V{} - a : a; }
template <class V> INLINE V min(V a, V b) { return graft::min(a, b); }
template <class V> INLINE V max(V a, V b) { return graft::max(a, b); }
template <class V> INLINE V lt(V a, V b) { return a < b ? V{} + 1 : V{}; }
template <class V> INLINE V le(V a, V b) { return a <= b ? V{} + 1 : V{}; }
template <class V> INLINE V eq(V a, V b) { return a == b ? V{} + 1 : V{}; }
template <class V> INLINE V select(V condition, V a, V b) { return condition != 0 ? a : b; }

#define LANE_BY_LANE(name)                                                        \
    template <class V> INLINE V name(V a) {                                       \
        for (int lane = 0; lane < LANES; ++lane) a[lane] = std::name(a[lane]);    \
        return a;                                                                 \
    }
LANE_BY_LANE(sqrt)
LANE_BY_LANE(floor)
LANE_BY_LANE(expm1)
LANE_BY_LANE(log)
LANE_BY_LANE(log1p)
LANE_BY_LANE(sin)
LANE_BY_LANE(cos)
LANE_BY_LANE(exp)
LANE_BY_LANE(tanh)
LANE_BY_LANE(erf)
#undef LANE_BY_LANE

template <class V> INLINE V pow(V a, V b) {
    for (int lane = 0; lane < LANES; ++lane) a[lane] = std::pow(a[lane], b[lane]);
    return a;
}

template <size_t n> INLINE f32v polynomial(f32v x, const float (&coefficients)[n]) {
    f32v sum = splat(coefficients[0]);
    for (size_t i = 1; i < n; ++i) sum = fma(sum, x, splat(coefficients[i]));
    return sum;
}

INLINE f32v power_of_two(i32v exponent) { return bits<f32v>((exponent + 127) << 23); }

INLINE f32v exp(f32v x) {
    // Beyond these all results are infinite or zero; NaN passes.
    f32v within = x < -104.0f ? splat(-104.0f) : x > 89.0f ? splat(89.0f) : x;
    constexpr float shift = 12582912.0f;  // adding it leaves a whole number in the last bits
    f32v whole = fma(within, splat(1.44269504f), splat(shift)) - shift;
    f32v rest = fma(whole, splat(-0.693359375f), within);  // ln(2) in two parts, the first of few digits
    rest = fma(whole, splat(2.12194440e-4f), rest);
    constexpr float fitted[] = {0.000199037109f, 0.0013928347f, 0.00833329372f, 0.0416665412f, 0.166666672f, 0.5f};  // (e**r - 1 - r) / r**2 for |r| <= ln(2) / 2
    f32v value = fma(polynomial(rest, fitted), rest * rest, rest) + 1.0f;
#if defined(__AVX512F__)
    return (f32v)_mm512_scalef_ps((__m512)value, (__m512)whole);
#else
    // In two steps, so that a subnormal result is rounded once.
    i32v exponent = __builtin_convertvector(whole == whole ? whole : f32v{}, i32v), half = exponent >> 1;
    return value * power_of_two(half) * power_of_two(exponent - half);
#endif
}

INLINE f32v tanh(f32v x) {
    f32v size = abs(x), square = x * x;
    constexpr float fitted[] = {-0.00611317903f, 0.021010071f, -0.0538540669f, 0.133327946f, -0.333333284f};  // (tanh(x) / x - 1) / x**2 for |x| <= 0.625, of x**2
    f32v near = x + x * (square * polynomial(square, fitted));
    f32v far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    return size < 0.625f ? near : x < 0 ? -far : far;
}

INLINE f32v erf(f32v x) {
    f32v size = abs(x), square = x * x;
    constexpr float inner[] = {7.88911493e-05f, -0.000802083989f, 0.00518953521f, -0.0268544443f,
                               0.112836003f,   -0.37612626f,    1.12837911f};  // erf(x) / x for |x| <= 1, of x**2
    constexpr float outer[] = {0.0270186476f, -0.159072563f, 0.388173699f,  -0.467836142f, 0.178596377f,
                               0.263872176f,  -0.388009638f, 0.0232842136f, 0.561416328f,  0.000140450662f};  // exp(x**2) erfc(x) for 1 <= x <= 4, of 1 / x
    f32v near = x * polynomial(square, inner);
    f32v far = 1.0f - exp(-square) * polynomial(1.0f / size, outer);
    far = size < 4.0f ? far : size >= 4.0f ? splat(1.0f) : x;
    return size < 1.0f ? near : x < 0 ? -far : far;
}

}  // namespace graft::op
