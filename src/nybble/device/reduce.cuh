// Reductions: sums over a warp by shuffles, and over a block through one float per warp.
#pragma once

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// The sum of a value over the THREADS threads of a block; every thread gets it. The order of additions is fixed, so the
// result is deterministic. `scratch` holds a float a warp.
template <int THREADS> __device__ __forceinline__ float block_sum(float value, float* scratch) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "a block is 1 to 32 full warps");
    constexpr int WARPS = THREADS / 32;
    value = warp_sum(value);
    if constexpr (WARPS > 1) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) scratch[warp] = value;
        __syncthreads();
        value = warp_sum(lane < WARPS ? scratch[lane] : 0.0f);
    }
    return value;
}
