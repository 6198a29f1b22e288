// packed: a 4-bit weight as formats/tiles.py lays it out, and copies of it to shared memory. 64 output features are one
// stream along K: chunks of 64 input features, 2 KB each, with a row of scales (and of zero points) a group. Kernels take it
// by units of two chunks, eight steps of the tensor cores.
#pragma once
#include "barrier.cuh"

template <typename S, int N, int K, int GROUP, bool ZEROS> struct Packed {
    static_assert(N % 8 == 0 && K % 8 == 0, "N and K must be multiples of 8");
    static_assert(GROUP == 16 || GROUP == 32 || GROUP == 64 || GROUP % 128 == 0 || GROUP >= K, "a group is a part or a multiple of 128");
    static constexpr int K64 = (K + 63) / 64, N64 = (N + 63) / 64, UNITS = (K64 + 1) / 2;
    static constexpr int GROUPS = GROUP >= K ? 1 : (K64 * 64 + GROUP - 1) / GROUP;
    static constexpr int PARTS = GROUP >= 128 || GROUP >= K ? 1 : 128 / GROUP, STEPS = 8 / PARTS;  // groups of a unit, steps of a group
    static constexpr int WEIGHT_BYTES = 4096, SCALE_BYTES = PARTS * 64 * sizeof(S), ZERO_BYTES = ZEROS ? PARTS * 32 : 0;  // of a unit

    // Rows of scales of `chunks` chunks: one a group, or one a unit where a group is longer. Of the last unit maybe only half
    // is there.
    __device__ static __forceinline__ int groups(int chunk, int chunks) {
        return PARTS == 1 ? (chunks + 1) / 2 : min((chunks + 1) / 2 * PARTS, GROUPS - chunk * 64 / GROUP);
    }
    // What the copies of them announce to their barrier.
    __device__ static __forceinline__ int bytes(int chunk, int chunks) {
        return chunks * 2048 + groups(chunk, chunks) * (64 * static_cast<int>(sizeof(S)) + (ZEROS ? 32 : 0));
    }
    // `chunks` of them from `chunk` on, of the `block`-th 64 output features; past the end those of the last.
    __device__ static __forceinline__ void copy(unsigned char* weights, unsigned char* scale, unsigned char* zero, const uint4* qweight,
                                                const S* scales, const unsigned char* qzeros, int block, int chunk, int chunks,
                                                Barrier* at) {
        const long long of = min(block, N64 - 1);
        copy_bulk(weights, qweight + (of * K64 + chunk) * 128, chunks * 2048, at);
        constexpr bool JOINED = GROUP <= 128 && GROUP < K;  // rows of scales that follow each other
        for (int i = 0; i < (JOINED ? 1 : groups(chunk, chunks)); ++i) {
            const int group = GROUP >= K ? 0 : PARTS == 1 ? (chunk + 2 * i) * 64 / GROUP : chunk * 64 / GROUP + i;
            const int count = JOINED ? groups(chunk, chunks) : 1;
            copy_bulk(scale + i * 64 * sizeof(S), scales + (of * GROUPS + group) * 64, count * 64 * sizeof(S), at);
            if constexpr (ZEROS) copy_bulk(zero + i * 32, qzeros + (of * GROUPS + group) * 32, count * 32, at);
        }
    }
};
