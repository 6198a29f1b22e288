// What follows a linear layer's sums: activation, and the place of a result that is stored as three planes.
#pragma once

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
