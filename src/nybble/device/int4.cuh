// int4: one 32-bit word of eight 4-bit values to the four registers of a 16x16 tensor-core A fragment.
//
//   nibble of the word   0      1      2      3      4      5      6      7
//   register, half       r0.lo  r1.lo  r2.lo  r3.lo  r0.hi  r1.hi  r2.hi  r3.hi
//
// A value q lands in the mantissa of a float whose unit in the last place is 1: fp16 0x6400 = 1024, bf16 0x4300 = 128, two of
// them by one LOP3. Taking (1024 + z) or (128 + z) away leaves q - z, and both steps are exact. In fp16 a nibble may also
// stay four bits higher, as 1024 + 16 q: an fma by 1/16 takes (64 + z) away, exactly too, and saves the shift.
#pragma once
#include "scalar.cuh"

template <typename T> struct Magic;
template <> struct Magic<half_t> { static constexpr unsigned word = 0x64006400u; };
template <> struct Magic<bf16_t> { static constexpr unsigned word = 0x43004300u; };

// What is taken away for a zero point, twice each: from magic + q, and (fp16) from 64 + q.
struct ZeroPoint {
    unsigned low, high;
};
template <typename T> __device__ __forceinline__ ZeroPoint zero_pair(int z) {
    const unsigned low = (Magic<T>::word & 0xffffu) + z;  // the mantissa counts in ones
    const unsigned high = 0x5400u + 16 * z;               // 64 in fp16 counts in sixteenths
    return {low | (low << 16), high | (high << 16)};
}

template <typename T> __device__ __forceinline__ unsigned subtract_pair(unsigned a, unsigned b) {
    using P = typename Pair<T>::type;
    const P difference = __hsub2(*reinterpret_cast<P*>(&a), *reinterpret_cast<P*>(&b));
    return *reinterpret_cast<const unsigned*>(&difference);
}

// (a & mask) | magic in one instruction; from C++ it becomes two, as only one operand may be a constant.
__device__ __forceinline__ unsigned place(unsigned a, unsigned mask, unsigned magic) {
#ifdef __CUDA_ARCH__
    asm("lop3.b32 %0, %0, %1, %2, 0xEA;" : "+r"(a) : "r"(mask), "r"(magic));
    return a;
#else
    return (a & mask) | magic;
#endif
}

// fragment[i] = the pair (q - zero point) of register i; rows 0..7 of the tile are registers 0 and 2, rows 8..15 1 and 3.
template <typename T>
__device__ __forceinline__ void unpack_int4(unsigned word, ZeroPoint top, ZeroPoint bottom, unsigned (&fragment)[4]) {
    if constexpr (same<T, half_t>) {
        const half2 sixteenth = __half2half2(__ushort_as_half(0x2c00));
        auto high = [&](unsigned pair, unsigned zero) {
            const unsigned minus = zero ^ 0x80008000u;
            const half2 d = __hfma2(*reinterpret_cast<const half2*>(&pair), sixteenth, *reinterpret_cast<const half2*>(&minus));
            return *reinterpret_cast<const unsigned*>(&d);
        };
        const unsigned shifted = word >> 8;
        fragment[0] = subtract_pair<T>(place(word, 0x000f000fu, Magic<T>::word), top.low);
        fragment[1] = high(place(word, 0x00f000f0u, Magic<T>::word), bottom.high);
        fragment[2] = subtract_pair<T>(place(shifted, 0x000f000fu, Magic<T>::word), top.low);
        fragment[3] = high(place(shifted, 0x00f000f0u, Magic<T>::word), bottom.high);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned pair = place(word >> (4 * i), 0x000f000fu, Magic<T>::word);
            fragment[i] = subtract_pair<T>(pair, i % 2 == 0 ? top.low : bottom.low);
        }
    }
}

// The same times the scales of rows 0..7 and of rows 8..15, twice each, and rounded: weights as a 16-bit model has them.
template <typename T>
__device__ __forceinline__ void scale_fragment(unsigned (&fragment)[4], unsigned top, unsigned bottom) {
    using P = typename Pair<T>::type;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const P scaled = __hmul2(*reinterpret_cast<P*>(&fragment[i]), *reinterpret_cast<P*>(i % 2 == 0 ? &top : &bottom));
        fragment[i] = *reinterpret_cast<const unsigned*>(&scaled);
    }
}
