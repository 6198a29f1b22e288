// scalar.cuh of the emulator: 16-bit floats, their pairs, and their conversions with one rounding to nearest even.
#pragma once
#include "cuda.h"

struct half_t {
    uint16_t bits;
};
struct bf16_t {
    uint16_t bits;
};
static float to_float(float v) { return v; }
static float to_float(half_t v) {
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return h;
}
static float to_float(bf16_t v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
template <typename T> static T from_float(float v);
template <> float from_float<float>(float v) { return v; }
template <> half_t from_float<half_t>(float v) {
    const _Float16 h = v;
    half_t result;
    std::memcpy(&result, &h, 2);
    return result;
}
template <> bf16_t from_float<bf16_t>(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (std::isnan(v)) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <typename A, typename B> constexpr bool same = false;
template <typename A> constexpr bool same<A, A> = true;

template <typename T> struct PairOf {
    T v[2];
};
template <typename T> struct Pair {
    using type = PairOf<T>;
};
using half2 = PairOf<half_t>;
template <typename T> static PairOf<T> __hsub2(PairOf<T> a, PairOf<T> b) {
    PairOf<T> d;
    for (int i = 0; i < 2; ++i) d.v[i] = from_float<T>(to_float(a.v[i]) - to_float(b.v[i]));
    return d;
}
template <typename T> static PairOf<T> __hmul2(PairOf<T> a, PairOf<T> b) {
    PairOf<T> d;
    for (int i = 0; i < 2; ++i) d.v[i] = from_float<T>(to_float(a.v[i]) * to_float(b.v[i]));
    return d;
}
template <typename T> static PairOf<T> __hfma2(PairOf<T> a, PairOf<T> b, PairOf<T> c) {
    PairOf<T> d;
    for (int i = 0; i < 2; ++i) d.v[i] = from_float<T>(to_float(a.v[i]) * to_float(b.v[i]) + to_float(c.v[i]));
    return d;
}
static half_t __ushort_as_half(unsigned short bits) { return {bits}; }
static half2 __half2half2(half_t h) { return {{h, h}}; }
static float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
static float saturated(float a, float b, float c) { return std::fmin(std::fmax(std::fma(a, b, c), 0.0f), 1.0f); }
static unsigned larger_magnitude(unsigned a, unsigned b) {
    unsigned d = 0;
    for (int i = 0; i < 32; i += 16) {
        const unsigned x = a >> i & 0x7fff, y = b >> i & 0x7fff;  // as numbers, and NaN above all
        d |= (x > y ? x : y) << i;
    }
    return d;
}
