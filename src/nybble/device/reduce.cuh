// Reductions: sums over a warp by shuffles, and over a block through one float per warp.
#pragma once

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// The sums of COUNT values over the THREADS threads of a block; every thread gets them. The order of additions is
// fixed, so the result is deterministic. `scratch` holds COUNT * THREADS / 32 floats that no earlier reduction of the
// same phase uses: a block that reduces twice gives each its own, which saves a barrier.
template <int THREADS, int COUNT>
__device__ __forceinline__ void block_sum(float (&values)[COUNT], float* scratch) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "a block is 1 to 32 full warps");
    constexpr int WARPS = THREADS / 32;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = warp_sum(values[i]);
    if constexpr (WARPS > 1) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) scratch[i * WARPS + warp] = values[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = warp_sum(lane < WARPS ? scratch[i * WARPS + lane] : 0.0f);
    }
}
