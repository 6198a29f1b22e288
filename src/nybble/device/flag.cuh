// Flags in global memory: what the warps of one block have written, for another block. Who waits lowers the flag again, so that
// the flags are zero after a kernel as before it.
#pragma once

// What this thread has written to global memory, the copy engine may read. PTX ISA, "fence.proxy".
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// By one. After a __syncwarp: all that the warp has written is visible to whoever sees the flag. PTX ISA, "red.release".
__device__ __forceinline__ void raise_flag(unsigned* flag) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// Until it has been raised so many times; the copy engine may then read what was written. PTX ISA, "ld.acquire".
__device__ __forceinline__ void wait_for_flag(const unsigned* flag, unsigned times) {
    unsigned raised;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    while (raised != times);
    fence_for_copies();
}

// Seen by the kernels after this one only.
__device__ __forceinline__ void lower_flag(unsigned* flag) { asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(flag) : "memory"); }
