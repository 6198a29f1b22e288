// int4: one 32-bit word of eight 4-bit values to the four registers of a 16x16 tensor-core A fragment.
//
//   nibble of the word   0      1      2      3      4      5      6      7
//   register, half       r0.lo  r1.lo  r2.lo  r3.lo  r0.hi  r1.hi  r2.hi  r3.hi
//
// A value q lands in the mantissa of a float whose unit in the last place is 1, by one AND and one OR for two of them:
// fp16 0x6400 = 1024, bf16 0x4300 = 128. Taking (1024 + z) or (128 + z) away leaves q - z, and both steps are exact.
#pragma once
#include "scalar.cuh"

template <typename T> struct Magic;
template <> struct Magic<half_t> { static constexpr unsigned word = 0x64006400u; };
template <> struct Magic<bf16_t> { static constexpr unsigned word = 0x43004300u; };

// Two copies of (magic + z), to be subtracted.
template <typename T> __device__ __forceinline__ unsigned zero_pair(int z) {
    const unsigned one = (Magic<T>::word & 0xffffu) + z;  // the mantissa counts in ones
    return one | (one << 16);
}

template <typename T> __device__ __forceinline__ unsigned subtract_pair(unsigned a, unsigned b) {
    using P = typename Pair<T>::type;
    const P difference = __hsub2(*reinterpret_cast<P*>(&a), *reinterpret_cast<P*>(&b));
    return *reinterpret_cast<const unsigned*>(&difference);
}

// fragment[i] = the pair (q - zeros) of register i; rows 0..7 of the tile are registers 0 and 2, rows 8..15 are 1 and 3.
template <typename T>
__device__ __forceinline__ void unpack_int4(unsigned word, unsigned zero_top, unsigned zero_bottom,
                                            unsigned (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned pair = ((word >> (4 * i)) & 0x000f000fu) | Magic<T>::word;
        fragment[i] = subtract_pair<T>(pair, i % 2 == 0 ? zero_top : zero_bottom);
    }
}
