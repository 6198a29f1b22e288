// gather: the activations in the order of an act-order weight, once for all blocks of the product that follows.
//
// Computes      y[m, j] = x[m, perm[j]]
// Tensors       x: X [M, K]; perm: int32 [K]; y: X [M, K]; all contiguous, 16-byte aligned
// Layout        perm: packed position -> input feature, as formats/tiles.py has it
// Mapping       a thread has eight neighbours of y, in the order of memory; grid x: as many blocks as that takes
// Shared memory none
// Constants     X: half_t, bf16_t; K: a multiple of 8; THREADS
// Roof          latency: a kernel more in the chain. Every block of wgmma.cu gathering for itself added 9 us to 11
//               (12288 x 4096, 16 rows): 2-byte loads, a cycle each
// Source        own work
#include "dependent.cuh"
#include "vectors.cuh"

static_assert(K % 8 == 0, "K must be a multiple of 8");

extern "C" __global__ void __launch_bounds__(THREADS)
gather_kernel(const X* __restrict__ x, const int* __restrict__ perm, X* __restrict__ y, long long rows) {
    const long long piece = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long row = piece / (K / 8);
    const int column = piece % (K / 8) * 8;
    int from[8];
    *reinterpret_cast<int4*>(from) = *reinterpret_cast<const int4*>(perm + column);
    *reinterpret_cast<int4*>(from + 4) = *reinterpret_cast<const int4*>(perm + column + 4);
    if (row < rows && piece % 8 == 0) prefetch_l2(x + piece * 8);
    wait_for_previous();
    allow_next();
    if (row >= rows) return;
    Vector<X, 8> values;
#pragma unroll
    for (int e = 0; e < 8; ++e) values.lane[e] = x[row * K + from[e]];
    *reinterpret_cast<Vector<X, 8>*>(y + piece * 8) = values;
}
