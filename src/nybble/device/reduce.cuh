// Reductions: sums and maxima over a warp, or over aligned groups of its threads, by shuffles.
#pragma once
#include "scalar.cuh"

// The sum over each aligned group of SPAN threads; every thread gets its group's. The order of additions is fixed, so
// the result is deterministic and the same in all of them.
template <int SPAN = 32> __device__ __forceinline__ float warp_sum(float v) {
    static_assert(SPAN >= 1 && SPAN <= 32 && (SPAN & (SPAN - 1)) == 0, "a group is a power of two of threads");
#pragma unroll
    for (int offset = SPAN / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// The largest over a warp, for all of its threads.
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v = max_or_nan(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

// Whether it is so in any of a warp's threads.
__device__ __forceinline__ bool warp_any(bool v) { return __any_sync(0xffffffffu, v); }

// A value that all lanes of a warp have, told to the compiler: what is computed from it needs one register and one
// instruction a warp.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }
