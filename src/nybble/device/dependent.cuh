// Programmatic dependent launch: a kernel that is scheduled while the one before it still runs, and waits for it here.
#pragma once

// Until the kernels launched before this one on the stream are complete and their writes visible. At once where the
// launch did not ask to overlap. Nothing another kernel may write is read before it.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel on the stream may be scheduled. Always after wait_for_previous: then whoever runs beside
// this kernel was launched when all earlier ones were complete, and only this one's own writes can be news to it.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for the cache line at `from` in L2. A hint without a value, so it may come before wait_for_previous: L2 is where
// all SMs meet, and a write that follows lands in the same line.
__device__ __forceinline__ void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
