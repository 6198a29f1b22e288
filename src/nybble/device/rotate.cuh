// A row of a head by one warp, lane i with dimensions i, i + 32, ...: RMSNorm with a weight, then rotation of its first dimensions.
#pragma once
#include "reduce.cuh"

// Cosines and sines of a text's row; 1 and 0 from ROTARY on.
template <int D, int ROTARY, typename A>
__device__ __forceinline__ void load_angles(float (&cosine)[(D + 31) / 32], float (&sine)[(D + 31) / 32], const A* cos, const A* sin, int lane) {
#pragma unroll
    for (int i = 0; i < (D + 31) / 32; ++i) {
        const int d = lane + 32 * i;
        cosine[i] = 1.0f, sine[i] = 0.0f;
        if (ROTARY > 0 && d < ROTARY) cosine[i] = to_float(cos[d]), sine[i] = to_float(sin[d]);
    }
}

// The row at `from`, normed where NORM is set and turned, rounded once to T; as it is where `plain`. Everything is asked for
// before anything is used.
template <int D, int ROTARY, bool NORM, typename T>
__device__ __forceinline__ void rotated_row(T (&result)[(D + 31) / 32], const T* from, const T* weight, const float (&cosine)[(D + 31) / 32],
                                            const float (&sine)[(D + 31) / 32], float eps, bool plain, int lane) {
    constexpr int COUNT = (D + 31) / 32;
    float x[COUNT], other[COUNT], gain[COUNT], other_gain[COUNT], square = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int d = lane + 32 * i, pair_d = d < ROTARY / 2 ? d + ROTARY / 2 : d - ROTARY / 2;
        const bool turns = ROTARY > 0 && ROTARY % 64 != 0 && d < ROTARY;
        x[i] = other[i] = gain[i] = other_gain[i] = 0.0f;
        if (d < D) x[i] = to_float(from[d]);
        if (turns) other[i] = to_float(from[pair_d]);
        if (NORM && d < D) gain[i] = to_float(weight[d]);
        if (NORM && turns) other_gain[i] = to_float(weight[pair_d]);
    }
    if constexpr (ROTARY > 0 && ROTARY % 64 == 0) {  // the other dimension of a pair is this lane's as well
#pragma unroll
        for (int i = 0; i < ROTARY / 32; ++i) {
            constexpr int HALF = ROTARY / 64;
            other[i] = x[i < HALF ? i + HALF : i - HALF], other_gain[i] = gain[i < HALF ? i + HALF : i - HALF];
        }
    }
    float unit = 1.0f;
    if constexpr (NORM) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) square += x[i] * x[i];
        unit = rsqrtf(warp_sum(square) * (1.0f / D) + eps);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        float y = x[i], z = other[i];
        if constexpr (NORM) y *= unit * gain[i], z *= unit * other_gain[i];
        y = y * cosine[i] + (lane + 32 * i < ROTARY / 2 ? -z : z) * sine[i];
        result[i] = from_float<T>(plain ? x[i] : y);
    }
}
