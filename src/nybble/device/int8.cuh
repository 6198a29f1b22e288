// int8: two 32-bit words of eight 8-bit values to the four registers of a 16x16 tensor-core A fragment.
//
//   byte of the words    0      1      2      3      4      5      6      7
//   register, half       r0.lo  r0.hi  r1.lo  r1.hi  r2.lo  r2.hi  r3.lo  r3.hi
//
// fp16: a byte lands in the mantissa of 0x6400 = 1024, two of them by one PRMT, and taking (1024 + z) away leaves q - z exactly.
// bf16 has 7 bits of mantissa: a byte alone is the number q * 2^-133, as the smallest exponent and the subnormals below it count
// in the same unit. One fma takes it to q / 64 and z / 64 away: (q - z) / 64 has 8 bits at most and is exact. 64 is the
// business of whoever multiplies by the scale; 2^133 is no bf16. Subnormals are kept: PTX ISA, "Half Precision Floating Point
// Instructions: fma".
#pragma once
#include "int4.cuh"

constexpr unsigned HUGE_PAIR = 0x7f007f00u;  // 2^127 in bf16, twice

// Bytes FIRST and FIRST + 1 of a word become the low bytes of two halves, whose high one is byte 1 of `high`.
template <int FIRST> __device__ __forceinline__ unsigned spread(unsigned word, unsigned high) {
    return __byte_perm(word, high, 0x5050 | FIRST | (FIRST + 1) << 8);
}

// What is taken away for a zero point, twice: 1024 + z in fp16, z / 64 in bf16.
template <typename T> __device__ __forceinline__ unsigned byte_zero(unsigned z) {
    const unsigned twice = z | z << 16;
    if constexpr (same<T, half_t>) {
        return Magic<T>::word | twice;
    } else {
        using P = typename Pair<T>::type;
        const unsigned huge = HUGE_PAIR;
        const P scaled = __hmul2(*reinterpret_cast<const P*>(&twice), *reinterpret_cast<const P*>(&huge));
        return *reinterpret_cast<const unsigned*>(&scaled);
    }
}

// fragment[i] = the pair (q - zero point), in bf16 a 64th of it, of register i; rows 0..7 of the tile are registers 0 and 2,
// rows 8..15 1 and 3.
template <typename T>
__device__ __forceinline__ void unpack_int8(unsigned low, unsigned high, unsigned top, unsigned bottom, unsigned (&fragment)[4]) {
    if constexpr (same<T, half_t>) {
        const unsigned magic = Magic<T>::word;
        fragment[0] = subtract_pair<T>(spread<0>(low, magic), top);
        fragment[1] = subtract_pair<T>(spread<2>(low, magic), bottom);
        fragment[2] = subtract_pair<T>(spread<0>(high, magic), top);
        fragment[3] = subtract_pair<T>(spread<2>(high, magic), bottom);
    } else {
        using P = typename Pair<T>::type;
        const unsigned huge = HUGE_PAIR;
        auto scaled = [&](unsigned pair, unsigned zero) {
            const unsigned minus = zero ^ 0x80008000u;
            const P d =
                __hfma2(*reinterpret_cast<const P*>(&pair), *reinterpret_cast<const P*>(&huge), *reinterpret_cast<const P*>(&minus));
            return *reinterpret_cast<const unsigned*>(&d);
        };
        fragment[0] = scaled(spread<0>(low, 0), top);
        fragment[1] = scaled(spread<2>(low, 0), bottom);
        fragment[2] = scaled(spread<0>(high, 0), top);
        fragment[3] = scaled(spread<2>(high, 0), bottom);
    }
}
