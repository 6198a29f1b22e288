// A warp's arrivals at barriers, for all its lanes.
#pragma once
#include "barrier.cuh"

// One lane arrives: what the others have read, the products or the __syncwarp before it have waited for. compute-sanitizer's
// racecheck follows each lane by itself and calls that a race, so for it all of them arrive (tests/gpu/sanitize.py).
#ifdef EVERY_LANE_ARRIVES
constexpr int ARRIVALS = 32;
#else
constexpr int ARRIVALS = 1;
#endif

// ARRIVALS of them.
__device__ __forceinline__ void warp_arrive(Barrier* at, int lane) {
    if (ARRIVALS == 32 || lane == 0) barrier_arrive(at);
}

// As many at the same barrier of each of the first BLOCKS blocks of the cluster.
template <int BLOCKS> __device__ __forceinline__ void warp_arrive_at(Barrier* at, int lane) {
    if constexpr (ARRIVALS == 32) {
        for (int block = 0; block < BLOCKS; ++block) barrier_arrive(at, block);
    } else if (lane < BLOCKS) {
        barrier_arrive(at, lane);
    }
}
