// Moments: mean and variance of a row whose parts were looked at apart.
#pragma once

// Of a part: its mean (0 where the mean square is wanted), and the sums of (value - mean) and of its square.
struct Moments {
    float mean, first, second;
};

// What a norm takes away from a value, in two steps that lose nothing to a large mean, and what it then multiplies by.
struct Normal {
    float centre, off, scale;
    __device__ __forceinline__ float operator()(float v) const { return ((v - centre) - off) * scale; }
};

// Of `parts` parts of a row of `width` values, count(p) of them in part p. CENTRED: LayerNorm; otherwise RMSNorm.
template <bool CENTRED, typename Count, typename Part>
__device__ __forceinline__ Normal combine(int parts, int width, float eps, Count count, Part part) {
    const float centre = part(0).mean;
    float first = 0.0f, second = 0.0f;
#pragma unroll 8
    for (int p = 0; p < parts; ++p) {
        const Moments of = part(p);
        const float apart = CENTRED ? of.mean - centre : 0.0f;
        first += of.first + count(p) * apart;
        second += of.second + apart * (2.0f * of.first + count(p) * apart);
    }
    const float off = CENTRED ? first / width : 0.0f;
    float variance = fmaxf(second / width - off * off, 0.0f);
    if (isnan(second)) variance = second;
    return {centre, off, rsqrtf(variance + eps)};
}
