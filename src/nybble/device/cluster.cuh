// Clusters: blocks that run side by side and read each other's shared memory (sm_90).
#pragma once

// This block's number in its cluster. PTX ISA, "%cluster_ctarank".
__device__ __forceinline__ int cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Barrier over all threads of the cluster's blocks; what they wrote to shared memory before it is visible after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same without its promise about memory, in two halves: that the blocks are there, or no longer need this one. What
// orders memory (cluster_sync) waits for every load and copy in flight, 2 us in the middle of a stream of weights.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// A float in block `rank`'s shared memory, where `here` is its place in this block's. PTX ISA, "mapa".
__device__ __forceinline__ float cluster_load(const float* here, int rank) {
    const unsigned local = static_cast<unsigned>(__cvta_generic_to_shared(here));
    float value;
    asm volatile("{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %1, %2;\n\t"
                 "ld.shared::cluster.f32 %0, [there];\n\t}"
                 : "=f"(value)
                 : "r"(local), "r"(rank)
                 : "memory");
    return value;
}

// Four of them, from a 16-byte aligned place.
__device__ __forceinline__ float4 cluster_load4(const float* here, int rank) {
    const unsigned local = static_cast<unsigned>(__cvta_generic_to_shared(here));
    float4 v;
    asm volatile("{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %4, %5;\n\t"
                 "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n\t}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(local), "r"(rank)
                 : "memory");
    return v;
}
