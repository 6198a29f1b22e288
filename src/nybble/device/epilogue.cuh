// What follows a linear layer's sums: bias, activation, residual, and the place of a result, which may be three planes.
#pragma once
#include "vectors.cuh"

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, SILU_MUL = 3 };

template <int ACT> __device__ __forceinline__ float activate(float v) {
    if constexpr (ACT == GELU) return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    if constexpr (ACT == GELU_TANH) return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    return v;
}

__device__ __forceinline__ float silu_mul(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// Where row m, feature f of N is, when features SPLIT1 .. SPLIT2 are a second plane behind the first, and the rest a third.
template <int N, int SPLIT1, int SPLIT2, typename X>
__device__ __forceinline__ X* in_planes(X* y, long long rows, long long m, int f) {
    if constexpr (SPLIT1 == N) return y + m * N + f;
    if (f < SPLIT1) return y + m * SPLIT1 + f;
    if (f < SPLIT2) return y + rows * SPLIT1 + m * (SPLIT2 - SPLIT1) + (f - SPLIT1);
    return y + rows * SPLIT2 + m * (N - SPLIT2) + (f - SPLIT2);
}

// Features of the plane that feature f is in: how far apart its rows are.
template <int N, int SPLIT1, int SPLIT2> __device__ __forceinline__ int plane_width(int f) {
    if constexpr (SPLIT1 == N) return N;
    return f < SPLIT1 ? SPLIT1 : f < SPLIT2 ? SPLIT2 - SPLIT1 : N - SPLIT2;
}

// Four neighbouring features, from their sums on, to `to`; with a residual from `residual` on. `sum(which, value)` adds up those
// of the result, or with silu_mul of the gate (0) and of up (1).
template <int ACT, bool BIAS, bool RESIDUAL, int N, typename X, typename Y, typename Sum>
__device__ __forceinline__ void finish_at(const X* bias, const X* residual, Y* to, int feature, Sum sum) {
    auto add = [](const X* from, float (&value)[4]) {
        float extra[4];
        load_vector(from, extra);
#pragma unroll
        for (int e = 0; e < 4; ++e) value[e] += extra[e];
    };
    float value[4];
    sum(0, value);
    if constexpr (BIAS) add(bias + feature, value);
    if constexpr (ACT == SILU_MUL) {
        float up[4];
        sum(1, up);
        if constexpr (BIAS) add(bias + feature + N / 2, up);
#pragma unroll
        for (int e = 0; e < 4; ++e) value[e] = silu_mul(value[e], up[e]);
    } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) value[e] = activate<ACT>(value[e]);
    }
    if constexpr (RESIDUAL) add(residual, value);
    store_vector(to, value);
}

// The same of row m of a result that may be three planes.
template <int ACT, bool BIAS, bool RESIDUAL, int N, int SPLIT1, int SPLIT2, typename X, typename Y, typename Sum>
__device__ __forceinline__ void finish_four(const X* bias, const X* residual, Y* y, long long rows, long long m, int feature,
                                            Sum sum) {
    constexpr int N_OUT = ACT == SILU_MUL ? N / 2 : N;
    const long long at = m * N_OUT + feature;
    if constexpr (ACT == SILU_MUL) finish_at<ACT, BIAS, RESIDUAL, N>(bias, residual + at, y + at, feature, sum);
    else finish_at<ACT, BIAS, RESIDUAL, N>(bias, residual + at, in_planes<N, SPLIT1, SPLIT2>(y, rows, m, feature), feature, sum);
}
