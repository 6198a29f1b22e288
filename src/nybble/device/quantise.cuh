// int4 of a row: its scale from its largest magnitude, and its values as bytes or as words of eight. Before that, fp16 in its range.
#pragma once
#include "reduce.cuh"
#include "scalar.cuh"

// Whether a warp's values, rounded to fp16, neither pass 65504 nor are all below 2^-8; `largest`: the larger magnitudes, two a lane.
// If not, they are to be multiplied by `factor` and rounded again, twice at the most; `back` undoes all factors.
__device__ __forceinline__ bool in_range(unsigned largest, int attempt, float& back, float& factor) {
    const unsigned low = largest & 0x7fffu, high = largest >> 16 & 0x7fffu;
    const unsigned most = low > high ? low : high;  // of fp16 bits: infinities and NaN are 0x7c00 and more
    const bool over = warp_any(most >= 0x7c00u), under = !warp_any(most >= 0x1c00u);
    if (attempt == 2 || (attempt == 0 ? !over && !under : back > 1.0f ? !over : !under)) return true;
    factor = over ? 1.0f / 65536.0f : 65536.0f;
    back *= over ? 65536.0f : 1.0f / 65536.0f;
    return false;
}

// Of one row and clip ratio. OFFSET8: values are q + 8, else q; CLAMP: a quotient can pass -8 or 7.
template <bool OFFSET8, bool CLAMP> struct Quantiser {
    float scale, inverse, fifteenth;

    // `largest`: of the row's magnitudes, `back` times those of the values given to `bits`. A row that is not finite has the scale
    // NaN; its values must come as 0.
    __device__ __forceinline__ Quantiser(float largest, float back, float clip) {
        const bool finite = largest < __int_as_float(0x7f800000);
        scale = fmaxf(clip * largest / 7.0f, 1.17549435e-38f);
        if (largest == 0.0f) scale = 1.0f;
        inverse = finite ? 1.0f / scale * back : 1.0f;
        if (!finite) scale = __int_as_float(0x7fc00000);
        fifteenth = inverse * (1.0f / 15.0f);
    }

    // The value lands in the low bits of a float whose unit in the last place is 1: above them are BITS. To clamp, the range
    // -8 .. 7 becomes 0 .. 1, to which the multiplication saturates.
    static constexpr unsigned BITS = 0x4b400000u;
    __device__ __forceinline__ unsigned bits(float v) const {
        constexpr float MAGIC = 12582912.0f + (OFFSET8 ? 8.0f : 0.0f);
        if constexpr (CLAMP) return __float_as_uint(fmaf(saturated(v, fifteenth, 8.0f / 15.0f), 15.0f, MAGIC - 8.0f));
        return __float_as_uint(fmaf(v, inverse, MAGIC));
    }

    // COUNT values (up to 8) of q + 8 as a word, the first in the lowest bits: value(i) is the i-th. One multiply-add each.
    template <int COUNT, typename Value> __device__ __forceinline__ unsigned nibbles(Value value) const {
        unsigned word = 0, extra = 0;  // of all the floats' own bits
#pragma unroll
        for (int e = COUNT - 1; e >= 0; --e) word = word * 16u + bits(value(e)), extra = extra * 16u + BITS;
        return word - extra;
    }

    // Four bytes.
    template <typename Value> __device__ __forceinline__ unsigned bytes(Value value) const {
        return __byte_perm(__byte_perm(bits(value(0)), bits(value(1)), 0x0040), __byte_perm(bits(value(2)), bits(value(3)), 0x0040), 0x5410);
    }
};
