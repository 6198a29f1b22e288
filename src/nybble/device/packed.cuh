// packed: a weight of 4 or 8 bits as formats/tiles.py lays it out, copies of it to shared memory, and a lane's words of it. 64
// output features are one stream along K: chunks of 64 input features, 2 or 4 KB each, with a row of scales (and of zero
// points) a group. Kernels take it by units of two chunks, eight steps of the tensor cores.
#pragma once
#include "barrier.cuh"
#include "int4.cuh"
#include "int8.cuh"

template <typename S, int N, int K, int GROUP, bool ZEROS, int BITS> struct Packed {
    using Scale = S;
    static_assert(BITS == 4 || BITS == 8, "nibbles or bytes");
    static_assert(N % 8 == 0 && K % 8 == 0, "N and K must be multiples of 8");
    static_assert(GROUP == 16 || GROUP == 32 || GROUP == 64 || GROUP % 128 == 0 || GROUP >= K, "a group is a part or a multiple of 128");
    static constexpr int FEATURES = N, K64 = (K + 63) / 64, N64 = (N + 63) / 64, UNITS = (K64 + 1) / 2;
    static constexpr int GROUPS = GROUP >= K ? 1 : (K64 * 64 + GROUP - 1) / GROUP;
    static constexpr int PARTS = GROUP >= 128 || GROUP >= K ? 1 : 128 / GROUP, STEPS = 8 / PARTS;  // groups of a unit, steps of a group
    static constexpr int CHUNK = 512 * BITS, ZERO_ROW = 8 * BITS;  // bytes of 64 input features; of a group's zero points
    static constexpr int WEIGHT_BYTES = 2 * CHUNK, SCALE_BYTES = PARTS * 64 * sizeof(S);  // of a unit
    static constexpr int ZERO_BYTES = ZEROS ? PARTS * ZERO_ROW : 0;

    // Rows of scales of `chunks` chunks: one a group, or one a unit where a group is longer. Of the last unit maybe only half
    // is there.
    __device__ static __forceinline__ int groups(int chunk, int chunks) {
        return PARTS == 1 ? (chunks + 1) / 2 : min((chunks + 1) / 2 * PARTS, GROUPS - chunk * 64 / GROUP);
    }
    // What the copies of them announce to their barrier.
    __device__ static __forceinline__ int bytes(int chunk, int chunks) {
        return chunks * CHUNK + groups(chunk, chunks) * (64 * static_cast<int>(sizeof(S)) + (ZEROS ? ZERO_ROW : 0));
    }
    // `chunks` of them from `chunk` on, of the `block`-th 64 output features; past the end those of the last.
    __device__ static __forceinline__ void copy(unsigned char* weights, unsigned char* scale, unsigned char* zero, const uint4* qweight,
                                                const S* scales, const unsigned char* qzeros, int block, int chunk, int chunks,
                                                Barrier* at) {
        const long long of = min(block, N64 - 1);
        copy_bulk(weights, qweight + (of * K64 + chunk) * (CHUNK / 16), chunks * CHUNK, at);
        constexpr bool JOINED = GROUP <= 128 && GROUP < K;  // rows of scales that follow each other
        for (int i = 0; i < (JOINED ? 1 : groups(chunk, chunks)); ++i) {
            const int group = GROUP >= K ? 0 : PARTS == 1 ? (chunk + 2 * i) * 64 / GROUP : chunk * 64 / GROUP + i;
            const int count = JOINED ? groups(chunk, chunks) : 1;
            copy_bulk(scale + i * 64 * sizeof(S), scales + (of * GROUPS + group) * 64, count * 64 * sizeof(S), at);
            if constexpr (ZEROS) copy_bulk(zero + i * ZERO_ROW, qzeros + (of * GROUPS + group) * ZERO_ROW, count * ZERO_ROW, at);
        }
    }

    // A lane's 16 bytes of a warp's 512 hold LOADED steps, each of them WORDS words; 2 KB on are those of the next ones.
    static constexpr int LOADED = 16 / BITS, WORDS = BITS / 4;
    template <int LOADS> struct Words { unsigned word[LOADS * 4]; };
    template <int LOADS> __device__ static __forceinline__ Words<LOADS> load(const unsigned char* from) {
        static_assert(LOADS == 1 || LOADS == 2 || LOADS == 4, "of a batch of steps, or of a unit");
        auto four = [&](int i) { return *reinterpret_cast<const uint4*>(from + i * 2048); };
        const uint4 a = four(0);
        if constexpr (LOADS == 1) {
            return {a.x, a.y, a.z, a.w};
        } else {
            const uint4 b = four(1);
            if constexpr (LOADS == 2) {
                return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            } else {
                const uint4 c = four(2), d = four(3);
                return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w};
            }
        }
    }
    // Zero points of rows g and g + 8, g in the low half; `zero` is where row g's are. MIDDLE is what they are where none are stored.
    static constexpr unsigned MIDDLE = BITS == 4 ? 0x88 : 0x8080;
    __device__ static __forceinline__ unsigned zeros_of(const unsigned char* zero) {
        if constexpr (BITS == 4) return *zero;
        else return *reinterpret_cast<const unsigned short*>(zero);
    }
    // The pairs (q - zero point) of a step, as int4.cuh and int8.cuh have them: in steps of 1 / LARGER.
    template <typename T> static constexpr float LARGER = BITS == 8 && same<T, bf16_t> ? 64.0f : 1.0f;
    template <typename T>
    __device__ static __forceinline__ void unpack(const unsigned* words, unsigned zeros, unsigned (&fragment)[4]) {
        if constexpr (BITS == 4) unpack_int4<T>(words[0], zero_pair<T>(zeros & 15), zero_pair<T>(zeros >> 4), fragment);
        else unpack_int8<T>(words[0], words[1], byte_zero<T>(zeros & 255), byte_zero<T>(zeros >> 8), fragment);
    }
};

// A stage of a ring: UNITS units of each of TEAMS blocks of 64 output features, first their weights, then their scales, then their
// zero points. PAIRED: every other block is of the second half of N, as silu_mul wants them.
template <typename Weights, int TEAMS, int UNITS, bool PAIRED> struct Stage {
    static constexpr int SCALES = TEAMS * UNITS * Weights::WEIGHT_BYTES, ZEROS = SCALES + TEAMS * UNITS * Weights::SCALE_BYTES;
    static constexpr int BYTES = ZEROS + TEAMS * UNITS * Weights::ZERO_BYTES;
    // Ask for `chunks` chunks from `chunk` on of a tile of TEAMS * 64 features.
    __device__ static __forceinline__ void ask(unsigned char* to, const uint4* qweight, const typename Weights::Scale* scales,
                                               const unsigned char* qzeros, int tile, int chunk, int chunks, Barrier* at) {
        barrier_expect(at, TEAMS * Weights::bytes(chunk, chunks));
#pragma unroll
        for (int i = 0; i < TEAMS; ++i) {
            int block = tile * TEAMS + i;
            if constexpr (PAIRED) block = min(block / 2, Weights::FEATURES / 128 - 1) + i % 2 * (Weights::FEATURES / 128);
            Weights::copy(to + i * UNITS * Weights::WEIGHT_BYTES, to + SCALES + i * UNITS * Weights::SCALE_BYTES,
                          to + ZEROS + i * UNITS * Weights::ZERO_BYTES, qweight, scales, qzeros, block, chunk, chunks, at);
        }
    }
};
