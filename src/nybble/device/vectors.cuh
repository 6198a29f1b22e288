// Vectors: COUNT elements of T moved by one instruction when they fill 16 bytes, and as floats in registers.
#pragma once
#include "scalar.cuh"

template <typename T, int COUNT> struct alignas(sizeof(T) * COUNT) Vector {
    static_assert(sizeof(T) * COUNT <= 16, "a vector is at most one 16-byte access");
    T lane[COUNT];
};

template <typename T, int COUNT>
__device__ __forceinline__ void load_vector(const T* __restrict__ from, float (&values)[COUNT]) {
    const Vector<T, COUNT> packed = *reinterpret_cast<const Vector<T, COUNT>*>(from);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = to_float(packed.lane[i]);
}

// Each value rounded to T, once.
template <typename T, int COUNT>
__device__ __forceinline__ Vector<T, COUNT> rounded(const float (&values)[COUNT]) {
    Vector<T, COUNT> packed;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) packed.lane[i] = from_float<T>(values[i]);
    return packed;
}

template <typename T, int COUNT>
__device__ __forceinline__ void store_vector(T* __restrict__ to, const float (&values)[COUNT]) {
    *reinterpret_cast<Vector<T, COUNT>*>(to) = rounded<T>(values);
}

// Two values rounded to T, the first in the low half of a register.
template <typename T> __device__ __forceinline__ unsigned rounded_pair(float first, float second) {
    const float two[2] = {first, second};
    const Vector<T, 2> packed = rounded<T>(two);
    return *reinterpret_cast<const unsigned*>(&packed);
}
