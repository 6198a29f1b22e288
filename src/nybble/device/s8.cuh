// s8: products of 8-bit integers on tensor cores, and what brings 4-bit weights and float activations there.
#pragma once
#include "scalar.cuh"

// A 24-bit float whose unit in the last place is 1: added to an integer below 2^22, as bits, it is the float of both.
constexpr unsigned SEED_BITS = 0x4b400000u;
constexpr float SEED = 12582912.0f;

// d = A B + SEED_BITS, m16n8k32, int32 accumulators: d's bits are the float SEED + (A B), as long as |A B| < 2^22.
// With g = lane / 4 and t = lane % 4: A row-major 16 x 32, registers (g, 4t) (g+8, 4t) (g, 4t+16) (g+8, 4t+16), four
// neighbours along k each; B 32 x 8, registers (k = 4t, n = g) (k = 4t+16, n = g); d as mma_16816's.
// PTX ISA, "mma.m16n8k32 with integer type".
__device__ __forceinline__ void mma_16832_seeded(unsigned (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(SEED_BITS));
}

// The high nibbles of four bytes, less 8, times 16: (word & 0xf0f0f0f0) ^ 0x80808080 in one instruction; from C++ it becomes
// two, as only one operand may be a constant. PTX ISA, "lop3".
__device__ __forceinline__ unsigned signed_nibbles(unsigned word) {
    asm("lop3.b32 %0, %0, %1, %2, 0x6A;" : "+r"(word) : "r"(0xf0f0f0f0u), "r"(0x80808080u));
    return word;
}

// To the nearest integer, halves away from zero; NaN to 0. What is added is the largest float below one half, so that
// 0.49999997 stays 0. PTX ISA, "cvt.rzi".
__device__ __forceinline__ int round_away(float v) {
    const float moved = v + copysignf(0.49999997f, v);
    int whole;
    asm("cvt.rzi.s32.f32 %0, %1;" : "=r"(whole) : "f"(moved));
    return whole;
}

// Four integers within int8 as bytes, a the lowest. PTX ISA, "cvt.pack".
__device__ __forceinline__ unsigned pack_bytes(int a, int b, int c, int d) {
    unsigned high, word;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(d), "r"(c), "r"(0));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(b), "r"(a), "r"(high));
    return word;
}

// Bytes of a (numbers 0 to 3) and b (4 to 7) in the order of the selector's nibbles. PTX ISA, "prmt".
template <unsigned SELECTOR> __device__ __forceinline__ unsigned pick_bytes(unsigned a, unsigned b) {
    unsigned word;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "n"(SELECTOR));
    return word;
}

__device__ __forceinline__ float as_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned as_bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ unsigned as_bits(half_t v) { return __half_as_ushort(v); }
__device__ __forceinline__ half_t as_half(unsigned bits) { return __ushort_as_half(static_cast<unsigned short>(bits)); }

// Words from shared memory in the order they are written here: the compiler would otherwise put off the first ones, and fill
// the registers with half-finished sums that wait for them. PTX ISA, "ld.volatile".
__device__ __forceinline__ uint4 load_in_order(const uint4* from) {
    uint4 v;
    asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from))));
    return v;
}
__device__ __forceinline__ unsigned load_in_order(const unsigned* from) {
    unsigned v;
    asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(v) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from))));
    return v;
}
