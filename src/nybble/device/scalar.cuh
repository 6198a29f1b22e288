// Scalar types: what float16, bfloat16 and float32 are called here, and the conversions between them.
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
