// Scalar types: what float16, bfloat16 and float32 are called here, the conversions between them, and operations without a C++ name.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using half_t = __half;
using bf16_t = __nv_bfloat16;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(half_t v) { return __half2float(v); }
__device__ __forceinline__ float to_float(bf16_t v) { return __bfloat162float(v); }

// Round to nearest even, once.
template <typename T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ half_t from_float<half_t>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ bf16_t from_float<bf16_t>(float v) { return __float2bfloat16_rn(v); }

// Two constants that every 16-bit trick needs: same<A, B>, and the type that holds two of T in one register.
template <typename A, typename B> constexpr bool same = false;
template <typename A> constexpr bool same<A, A> = true;
template <typename T> struct Pair;
template <> struct Pair<half_t> { using type = __half2; };
template <> struct Pair<bf16_t> { using type = __nv_bfloat162; };

// The larger of two floats, a NaN where one is. PTX ISA, "max", with .NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

// The larger magnitude of each of two pairs of fp16, with any sign; NaN where one is. PTX ISA, "max", with .xorsign.abs.
__device__ __forceinline__ unsigned larger_magnitude(unsigned a, unsigned b) {
    unsigned d;
#if __CUDA_ARCH__ >= 860
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a & 0x7fff7fffu), "r"(b & 0x7fff7fffu));
#endif
    return d;
}

// a b + c, at least 0 and at most 1; 0 where it is NaN. PTX ISA, "fma", with .sat.
__device__ __forceinline__ float saturated(float a, float b, float c) {
    float d;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}
