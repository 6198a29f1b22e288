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

// The same, each matrix transposed: a register has two neighbours of one column.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// Two 8x8 matrices of 16-bit values, held as an accumulator is, to shared memory, transposed; lane i gives the address of row
// i % 8 of matrix i / 8, the lanes from 16 on are not asked. sm_90. PTX ISA, "stmatrix".
__device__ __forceinline__ void store_transposed(unsigned first, unsigned second, void* row) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(row))), "r"(first), "r"(second)
                 : "memory");
}

// An 8x8 matrix of 16-bit values, a register a lane, transposed: lane i has columns 2 (i % 4) and the next of row i / 4.
// PTX ISA, "movmatrix".
__device__ __forceinline__ unsigned transposed(unsigned of) {
    unsigned d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(of));
    return d;
}

// A float as the sum of two that the tensor cores take as they are (tf32, 11 bits each). PTX ISA, "cvt.rna.tf32".
struct Split {
    unsigned high, low;
};
__device__ __forceinline__ Split split(float v) {
    Split s;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(s.high) : "f"(v));
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(s.low) : "f"(v - __uint_as_float(s.high)));
    return s;
}

// d += A B, m16n8k8 of tf32. A: (g, t) (g+8, t) (g, t+4) (g+8, t+4); B: (k = t, n = g) (k = t+4, n = g); d as above.
// PTX ISA, "mma.m16n8k8".
__device__ __forceinline__ void mma_1688(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same of split factors; the product of the low parts, 2^-22 of the whole, is left out.
__device__ __forceinline__ void mma_split(float (&d)[4], const Split (&a)[4], Split b0, Split b1) {
    mma_1688(d, a[0].low, a[1].low, a[2].low, a[3].low, b0.high, b1.high);
    mma_1688(d, a[0].high, a[1].high, a[2].high, a[3].high, b0.low, b1.low);
    mma_1688(d, a[0].high, a[1].high, a[2].high, a[3].high, b0.high, b1.high);
}

// Keeps a value in its register: the compiler would otherwise compute addresses anew at every use, a dozen instructions.
__device__ __forceinline__ void pin(unsigned& value) { asm volatile("" : "+r"(value)); }
template <typename T> __device__ __forceinline__ void pin(const T*& pointer) { asm volatile("" : "+l"(pointer)); }
