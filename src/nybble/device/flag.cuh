// Flags in global memory: what a warp of one block has written, for a warp of another. Who waits lowers the flag again, so
// that the flags are zero after a kernel as before it.
#pragma once

// After a __syncwarp: all that the warp has written is visible to whoever sees the flag. PTX ISA, "st.release".
__device__ __forceinline__ void raise_flag(unsigned* flag) {
    asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// By all lanes of a warp, each for a flag of its own or all for one. PTX ISA, "ld.acquire".
__device__ __forceinline__ void wait_for_flag(const unsigned* flag) {
    unsigned raised;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    while (raised == 0);
    __syncwarp();
}

// Seen by the kernels after this one only.
__device__ __forceinline__ void lower_flag(unsigned* flag) { asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(flag) : "memory"); }

// What another block has written, past this SM's own cache. PTX ISA, "ld.relaxed".
__device__ __forceinline__ float4 load_of_other(const float* from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}
