// q8_1: half a block of Q8_1, llama.cpp's quantised activations: 16 of 32 values, the other half being the neighbour lane's.
#pragma once
#include "s8.cuh"
#include "vectors.cuh"

constexpr float TINIEST = 7.5231638e-37f;  // 2^-120: a block of smaller values counts as zeros; d in float16 is 0 anyway

struct HalfBlock {
    unsigned word[4];  // int8 values 0-3, 4-7, 8-11, 12-15
    float d;           // of the whole block, not yet rounded to float16
    float sum;         // of this half: of q, or of the values themselves
};

// 16 values on their way from global memory.
template <typename T> struct HalfBlockValues {
    static constexpr int PER = 16 / sizeof(T), COUNT = 16 / PER;
    Vector<T, PER> part[COUNT];

    __device__ __forceinline__ void load(const T* from, bool valid) {
        const Vector<T, PER>* const vectors = reinterpret_cast<const Vector<T, PER>*>(from);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (valid) part[i] = vectors[i];
            else
#pragma unroll
                for (int e = 0; e < PER; ++e) part[i].lane[e] = from_float<T>(0.0f);
        }
    }
};

// d = amax / 127 of the 32 values of two neighbouring lanes, q = round(x * (1 / d)) with halves away from zero, as llama.cpp's
// reference computes it. A NaN or an infinity is in d, and q is 0. All lanes of the warp call it.
template <bool EXACT_SUM, typename T> __device__ __forceinline__ HalfBlock quantize(const HalfBlockValues<T>& values) {
    constexpr int PER = HalfBlockValues<T>::PER;
    float v[16], amax = 0.0f;
#pragma unroll
    for (int e = 0; e < 16; ++e) {
        v[e] = to_float(values.part[e / PER].lane[e % PER]);
        amax = max_or_nan(amax, fabsf(v[e]));
    }
    amax = max_or_nan(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
    HalfBlock out;
    out.d = amax / 127.0f;
    const bool usual = amax >= TINIEST && amax <= 3.4028235e38f;
    const float inverse = usual ? 1.0f / out.d : 0.0f;
    int q[16], whole = 0;
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 16; ++e) {
        q[e] = usual ? round_away(__fmul_rn(v[e], inverse)) : 0;
        if constexpr (EXACT_SUM) sum += v[e];
        else whole += q[e];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out.word[i] = pack_bytes(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]);
    out.sum = EXACT_SUM ? sum : static_cast<float>(whole);
    if (amax < TINIEST) out.d = 0.0f;
    return out;
}
