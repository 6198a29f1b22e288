// mma: the warp-wide tensor-core product every NVIDIA GPU since sm_80 has, and the load that feeds it.
#pragma once
#include "scalar.cuh"

// d += A B, m16n8k16, fp32 accumulators. PTX ISA, "mma.m16n8k16 with floating point type".
// With g = lane / 4 and t = lane % 4: A row-major 16 x 16, registers (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8), two
// neighbours along k each; B 16 x 8, registers (k = 2t, n = g) (k = 2t+8, n = g); d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1).
template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (same<T, half_t>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Four 8x8 matrices of 16-bit values from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
// PTX ISA, "ldmatrix".
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
    load_matrices(r, static_cast<unsigned>(__cvta_generic_to_shared(row)));
}

// Two 8x8 matrices of 16-bit values, held as an accumulator is, to shared memory, transposed; lane i gives the address of row
// i % 8 of matrix i / 8, the lanes from 16 on are not asked. sm_90. PTX ISA, "stmatrix".
__device__ __forceinline__ void store_transposed(unsigned first, unsigned second, void* row) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(row))), "r"(first), "r"(second)
                 : "memory");
}

// Keeps a value in its register: the compiler would otherwise compute addresses anew at every use, a dozen instructions.
__device__ __forceinline__ void pin(unsigned& value) { asm volatile("" : "+r"(value)); }
template <typename T> __device__ __forceinline__ void pin(const T*& pointer) { asm volatile("" : "+l"(pointer)); }
