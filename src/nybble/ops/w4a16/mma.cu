// mma: the 4-bit linear on tensor cores through mma.sync, for every number of rows and every GPU since sm_80.
//
// Computes      y[m, n] = sum_k x[m, k] * scale[k / GROUP, n] * (q[k, n] - zero[k / GROUP, n]) (+ bias[n])
//               q - zero is an exact small integer in 16 bits; products and sums are fp32; the scale multiplies the
//               fp32 sum of a group (or of 64 of its features), so a weight is never rounded
// Tensors       x: X [M, K]; qweight: uint4 [N64, K64, 4, 32]; scales: S [N64, GROUPS, 64]; qzeros: uint8
//               [N64, GROUPS, 32] or null (8 everywhere); perm: int32 [K] or null; bias: X [N] or null; y: X [M, N].
//               N64 = ceil(N / 64), K64 = ceil(K / 64); x, y, qweight, bias 16-byte aligned
// Layout        formats/tiles.py has the diagram. A warp owns 16 output features and reads, for 64 input features, one
//               uint4 a lane: word j is the A fragment of features 16 j .. 16 j + 15. Scales lie so that a lane's two
//               rows (g and g + 8 of the 16) are neighbours; so do the two nibbles of their zero points
// Mapping       block (i, j) -> rows TILE_M * i .., output features 64 * j ..; 4 warps share the 64 features; SLICES such
//               teams take every SLICES-th chunk of 64 input features and add up at the end, in a fixed order
// Shared memory shared: x, SLICES * 2 stages of [TILE_M][72] X; then, in the same bytes, the slices' sums,
//               [SLICES][TILE_M][68] float
// Constants     X: half_t, bf16_t; S: half_t, bf16_t, float; N, K: multiples of 8; GROUP: multiple of 16 or >= K;
//               TILE_M: 8, 16, 32, 64; SLICES: 1..8; ZEROS, PERM, BIAS: 0/1
// Roof          few rows: N * K / 2 bytes of weights; many rows: 2 * M * N * K flops
// Source        own work. The word-per-lane packing follows the idea of Marlin (Frantar et al. 2024).
#include "copy.cuh"
#include "int4.cuh"
#include "mma.cuh"
#include "vectors.cuh"

static_assert(N % 8 == 0 && K % 8 == 0, "N and K must be multiples of 8");
static_assert(GROUP % 16 == 0 || GROUP >= K, "a group is a multiple of 16 input features, or all of them");
static_assert(TILE_M % 8 == 0 && TILE_M >= 8 && TILE_M <= 64, "a tile has 8 to 64 rows");
static_assert(SLICES >= 1 && SLICES <= 8, "one to eight slices along K: 128 threads each");

constexpr int K64 = (K + 63) / 64;
constexpr int GROUPS = GROUP >= K ? 1 : (K64 * 64 + GROUP - 1) / GROUP;
// Steps of 16 features between two applications of the scale: a group's, but at most a chunk's.
constexpr int STEPS = GROUP >= 64 || GROUP >= K ? 4 : GROUP / 16;
static_assert(4 % STEPS == 0, "a chunk of 64 features holds a whole number of groups");
constexpr int ROUNDS = (K64 + SLICES - 1) / SLICES;
constexpr int AHEAD = 4;                 // chunks of weights a warp keeps in flight: 4 x 512 bytes
constexpr int MBLOCKS = TILE_M / 8;
constexpr int STRIDE = 64 + 8;           // 144 bytes a row: ldmatrix meets no bank twice
constexpr int STAGE = TILE_M * STRIDE;   // elements of one stage

constexpr int SUM_STRIDE = 64 + 4;       // floats of a row of partial sums

constexpr int X_BYTES = SLICES * 2 * STAGE * sizeof(X);
constexpr int SUM_BYTES = SLICES * TILE_M * SUM_STRIDE * sizeof(float);
constexpr int BYTES = X_BYTES > SUM_BYTES ? X_BYTES : SUM_BYTES;
static_assert(BYTES <= 48 * 1024, "the tile must fit the 48 KB that need no special launch");

extern "C" __global__ void __launch_bounds__(128 * SLICES, 1)
mma_kernel(const X* __restrict__ x, const uint4* __restrict__ qweight, const S* __restrict__ scales,
           const unsigned char* __restrict__ qzeros, const int* __restrict__ perm, const X* __restrict__ bias,
           X* __restrict__ y, long long rows) {
    __shared__ __align__(16) unsigned char shared[BYTES];
    const int lane = threadIdx.x % 32, strip = threadIdx.x / 32 % 4, slice = threadIdx.x / 128;
    const int member = threadIdx.x % 128;    // of the slice's 128 threads
    const int row8 = lane / 4;               // g of the fragment: this lane's output features are g and g + 8
    const long long first_row = static_cast<long long>(blockIdx.x) * TILE_M;
    const int tile_n = blockIdx.y;

    // Phase 1: weights of the first chunks are on their way before anything else.
    const uint4* words = qweight + (static_cast<long long>(tile_n) * K64 * 4 + strip) * 32 + lane;
    uint4 ahead[AHEAD];
#pragma unroll
    for (int d = 0; d < AHEAD; ++d) {
        const int chunk = slice + d * SLICES;
        if (chunk < K64) ahead[d] = load_streaming(words + chunk * 128);
    }

    // Phase 2: x through shared memory, two stages a slice.
    X* stages = reinterpret_cast<X*>(shared) + slice * 2 * STAGE;
    auto fetch_x = [&](int chunk, int stage) {
        X* to = stages + stage * STAGE;
#pragma unroll
        for (int piece = member; piece < TILE_M * 8; piece += 128) {
            const int row = piece / 8, column = piece % 8 * 8, k = chunk * 64 + column;
            const bool valid = first_row + row < rows && k < K;
            X* target = to + row * STRIDE + column;
            if constexpr (PERM) {
                // Act-order: the packed weights are sorted by group, so x is gathered instead. 2-byte loads, from L2.
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    target[e] = valid ? x[(first_row + row) * K + perm[k + e]] : from_float<X>(0.0f);
            } else {
                copy_async_16(target, valid ? x + (first_row + row) * K + k : x, valid);
            }
        }
        commit_copies();
    };
    if (slice < K64) fetch_x(slice, 0);

    // Phase 3: the product, chunk by chunk.
    float total[MBLOCKS][4] = {};
    auto multiply = [&](int chunk, int stage, const uint4& packed) {
        const X* tile = stages + stage * STAGE + lane % 8 * STRIDE + lane / 8 * 8;
        const unsigned word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int first = 0; first < 4; first += STEPS) {
            const int group = GROUP >= K ? 0 : (chunk * 64 + first * 16) / GROUP;
            const long long at = static_cast<long long>(tile_n) * GROUPS + group;
            int zero_points = 0x88;
            if constexpr (ZEROS) zero_points = qzeros[at * 32 + strip * 8 + row8];
            const S* scale = scales + at * 64 + strip * 16 + row8 * 2;
            const float scale_top = to_float(scale[0]), scale_bottom = to_float(scale[1]);
            const ZeroPoint zero_top = zero_pair<X>(zero_points & 15), zero_bottom = zero_pair<X>(zero_points >> 4);
            unsigned a[STEPS][4];
#pragma unroll
            for (int step = 0; step < STEPS; ++step) unpack_int4<X>(word[first + step], zero_top, zero_bottom, a[step]);
#pragma unroll
            for (int block = 0; block < MBLOCKS; ++block) {
                float sum[4] = {};
                unsigned b[4];
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
                    // One load brings the B fragments of two steps (32 features).
                    const int at_step = first + step;
                    if (step == 0 || at_step % 2 == 0)
                        load_matrices(b, tile + block * 8 * STRIDE + at_step / 2 * 32);
                    mma_16816<X>(sum, a[step], b[at_step % 2 * 2], b[at_step % 2 * 2 + 1]);
                }
                total[block][0] += scale_top * sum[0];
                total[block][1] += scale_top * sum[1];
                total[block][2] += scale_bottom * sum[2];
                total[block][3] += scale_bottom * sum[3];
            }
        }
    };
    // Every slice makes the same number of rounds, idle in the last one if there is no chunk left for it: slices that
    // met their barriers a different number of times are what racecheck reports as a race.
    for (int round = 0, stage = 0; round < ROUNDS;) {
#pragma unroll
        for (int d = 0; d < AHEAD; ++d, ++round, stage ^= 1) {
            if (round == ROUNDS) break;
            const int chunk = slice + round * SLICES;
            const uint4 packed = ahead[d];
            if (chunk + AHEAD * SLICES < K64) ahead[d] = load_streaming(words + (chunk + AHEAD * SLICES) * 128);
            if (chunk + SLICES < K64) {
                fetch_x(chunk + SLICES, stage ^ 1);
                wait_copies<1>();
            } else {
                wait_copies<0>();
            }
            sync_part(1 + slice, 128);   // every thread's part of this stage has arrived
            if (chunk < K64) multiply(chunk, stage, packed);
            sync_part(1 + slice, 128);   // the stage may be written again
        }
    }

    // Phase 4: every slice puts its sums where x was. 68 floats a row: the 32 lanes of a store meet 32 banks.
    float* sums = reinterpret_cast<float*>(shared);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MBLOCKS * 4; ++i) {
        const int row = i / 4 * 8 + lane % 4 * 2 + i % 2, feature = strip * 16 + row8 + i % 4 / 2 * 8;
        sums[(slice * TILE_M + row) * SUM_STRIDE + feature] = total[i / 4][i % 4];
    }
    __syncthreads();

    // Phase 5: add the slices in order, so that the result never depends on timing; bias; one rounding; 16-byte stores.
    for (int piece = threadIdx.x; piece < TILE_M * 8; piece += 128 * SLICES) {
        const int row = piece / 8, column = piece % 8 * 8, feature = tile_n * 64 + column;
        if (first_row + row >= rows || feature >= N) continue;
        float value[8] = {};
#pragma unroll
        for (int part = 0; part < SLICES; ++part) {
            const float4* from = reinterpret_cast<const float4*>(sums + (part * TILE_M + row) * SUM_STRIDE + column);
            const float4 low = from[0], high = from[1];
            value[0] += low.x, value[1] += low.y, value[2] += low.z, value[3] += low.w;
            value[4] += high.x, value[5] += high.y, value[6] += high.z, value[7] += high.w;
        }
        if constexpr (BIAS) {
            float extra[8];
            load_vector(bias + feature, extra);
#pragma unroll
            for (int e = 0; e < 8; ++e) value[e] += extra[e];
        }
        store_vector(y + (first_row + row) * N + feature, value);
    }
}
