// quantize: activations to Q8_1, llama.cpp's blocks of 32 8-bit values with a float16 scale.
//
// Computes      d = max |x| / 127 of each 32 values; q = round(x * (1 / d)), halves away from zero; s = d * sum(q), or with
//               EXACT_SUM sum(x)
// Tensors       x: X [count], 16-byte aligned, count a multiple of 32; y: [count / 32] blocks of 36 bytes, 4-byte aligned
// Layout        a block is nine words: d and s as float16, d in the lower half; then 32 int8 in order
// Mapping       grid x: THREADS threads a block, 16 values a thread; two neighbouring lanes have a block of 32
// Shared memory none
// Constants     X: half_t, bf16_t, float; THREADS: multiple of 32; EXACT_SUM: 0/1
// Roof          count * (sizeof(X) + 1.125) bytes
// Source        own work; the format is llama.cpp's (MIT).
#include "dependent.cuh"
#include "q8_1.cuh"

static_assert(THREADS % 32 == 0, "whole warps");

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_kernel(const X* __restrict__ x, unsigned* __restrict__ y, long long count) {
    const long long at = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * 16;
    const bool valid = at < count;
    wait_for_previous();
    allow_next();
    HalfBlockValues<X> values;
    values.load(x + (valid ? at : 0), valid);
    const HalfBlock half = quantize<EXACT_SUM>(values);
    const float sum = half.sum + __shfl_xor_sync(0xffffffffu, half.sum, 1);
    if (!valid) return;
    const int odd = threadIdx.x % 2;
    unsigned* const block = y + at / 32 * 9;
    if (odd == 0) {
        const float s = EXACT_SUM ? sum : half.d * sum;
        block[0] = as_bits(from_float<half_t>(half.d)) | as_bits(from_float<half_t>(s)) << 16;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) block[1 + odd * 4 + i] = half.word[i];
}
