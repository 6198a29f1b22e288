// Tiles of a matrix by the copy engine: a tensor map says where the matrix is, coordinates which tile (sm_90).
#pragma once
#include "barrier.cuh"

// What cuda.h calls CUtensorMap; NVRTC has no cuda.h. Encoded by the driver, a parameter of the kernel.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

// A tile of 64 columns from `column` on and the map's number of rows from `row` on, in rows of 128 bytes, swizzled as
// wgmma.cuh wants B; zeros past the matrix's end. It arrives on a barrier of this block as all its bytes, those past the
// end too. PTX ISA, "cp.async.bulk.tensor".
__device__ __forceinline__ void copy_tile(void* to_shared, const TensorMap& map, int column, int row, Barrier* at) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to_shared))),
                 "l"(&map), "r"(column), "r"(row), "r"(static_cast<unsigned>(__cvta_generic_to_shared(at)))
                 : "memory");
}

// The same into the same place of every block of the cluster in `blocks`, a bit a block, and counted on each one's barrier.
__device__ __forceinline__ void copy_tile(void* to_shared, const TensorMap& map, int column, int row, Barrier* at, int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to_shared))),
        "l"(&map), "r"(column), "r"(row), "r"(static_cast<unsigned>(__cvta_generic_to_shared(at))),
        "h"(static_cast<unsigned short>(blocks))
        : "memory");
}

// Fewer or more registers for each thread of a warpgroup from here on. PTX ISA, "setmaxnreg".
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
