// Barriers in shared memory (mbarrier, sm_90) that count bytes, and stores that count themselves on another block's.
#pragma once

using Barrier = unsigned long long;

// PTX ISA, "mbarrier.init": a phase is complete after `count` arrivals, and all bytes announced.
__device__ __forceinline__ void barrier_init(Barrier* at, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(count)
                 : "memory");
}

// What was initialised is so for all blocks of the cluster that pass a barrier of it afterwards.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, and so many bytes to come. PTX ISA, "mbarrier.arrive.expect_tx".
__device__ __forceinline__ void barrier_expect(Barrier* at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(bytes)
                 : "memory");
}

// One arrival at the same barrier of block `rank` of the cluster. PTX ISA, "mbarrier.arrive". Relaxed: a release would wait
// for all loads and copies in flight. What the caller has read before, and used, it has read.
#ifdef EVERY_LANE_ARRIVES  // for racecheck, which would call relaxed arrivals no order (arrive.cuh)
#define REMOTE_ARRIVAL "release"
#else
#define REMOTE_ARRIVAL "relaxed"
#endif
__device__ __forceinline__ void barrier_arrive(Barrier* at, int rank) {
    asm volatile("{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                 "mbarrier.arrive." REMOTE_ARRIVAL ".cluster.shared::cluster.b64 _, [there];\n\t}" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(rank)
                 : "memory");
}

// One arrival at this block's own.
__device__ __forceinline__ void barrier_arrive(Barrier* at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(at))) : "memory");
}

// Until the phase of this parity is complete; phases count from 0. PTX ISA, "mbarrier.try_wait".
__device__ __forceinline__ void barrier_wait(Barrier* at, int parity) {
    asm volatile("{\n\t.reg .pred done;\n\tagain:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t}" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(parity)
                 : "memory");
}

// Four floats to block `rank`, counted as 16 bytes on its barrier; no fence, the barrier says when they are there.
// `to` and `at` are the places in this block's shared memory. PTX ISA, "st.async".
__device__ __forceinline__ void send(float* to, float a, float b, float c, float d, Barrier* at, int rank) {
    asm volatile("{\n\t.reg .u32 there, count;\n\tmapa.shared::cluster.u32 there, %0, %6;\n\t"
                 "mapa.shared::cluster.u32 count, %5, %6;\n\t"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1,%2,%3,%4}, [count];\n\t}" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"(static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(rank)
                 : "memory");
}

// Two, counted as 8 bytes.
__device__ __forceinline__ void send(float* to, float a, float b, Barrier* at, int rank) {
    asm volatile("{\n\t.reg .u32 there, count;\n\tmapa.shared::cluster.u32 there, %0, %4;\n\t"
                 "mapa.shared::cluster.u32 count, %3, %4;\n\t"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%1,%2}, [count];\n\t}" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "f"(a), "f"(b), "r"(static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(rank)
                 : "memory");
}

// Whether this is the one lane of its warp that asks for copies. So picked, the compiler knows that it is one lane; with
// `lane == 0` each copy stands in a loop over lanes, 80 ns of it. PTX ISA, "elect.sync".
__device__ __forceinline__ bool elected() {
    unsigned yes;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(yes));
    return yes != 0;
}

// `bytes` from global memory, counted on a barrier of this block; addresses and bytes are multiples of 16. One thread asks.
// PTX ISA, "cp.async.bulk".
__device__ __forceinline__ void copy_bulk(void* to_shared, const void* from, int bytes, Barrier* at) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to_shared))),
                 "l"(from), "r"(bytes), "r"(static_cast<unsigned>(__cvta_generic_to_shared(at)))
                 : "memory");
}
