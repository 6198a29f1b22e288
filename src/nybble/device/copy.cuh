// Copies: asynchronous global -> shared, streaming loads, and a barrier for part of a block.
#pragma once

// 16 bytes from global to shared memory in the background; zeros when `valid` is false (nothing is read then).
// PTX ISA, "cp.async", with the source size below the copy size.
__device__ __forceinline__ void copy_async_16(void* to_shared, const void* from, bool valid) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

// 4 or 8 bytes in the background, through L1.
template <int BYTES> __device__ __forceinline__ void copy_async(void* to_shared, const void* from) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
}

// PTX ISA, "cp.async.commit_group": what this thread has issued becomes one group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// PTX ISA, "cp.async.wait_group": all but this thread's newest PENDING groups have arrived.
template <int PENDING> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 16 bytes read once: past L1, where they would only push out what is read again. PTX ISA, "ld.global.nc".
__device__ __forceinline__ uint4 load_streaming(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// The same of 8, 4 and 2 bytes, where a row is no multiple of 16 for all of a warp's lanes.
__device__ __forceinline__ uint2 load_streaming(const uint2* from) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
__device__ __forceinline__ unsigned load_streaming(const unsigned* from) {
    unsigned v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}
__device__ __forceinline__ unsigned load_streaming(const unsigned short* from) {
    unsigned short v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(from));
    return v;
}

// Barrier number `id` (1..15) among `threads` threads, a multiple of 32. PTX ISA, "bar.sync".
__device__ __forceinline__ void sync_part(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
