// stream: the 4-bit linear for few rows, bound by the reading of the weights; norm before it and epilogue in one launch.
//
// Computes      y[m, n] = f(sum_k h[m, k] * scale[k / GROUP, n] * (q[k, n] - zero[k / GROUP, n]) (+ bias[n])) (+ residual[m, n])
//               h = x, or LayerNorm or RMSNorm of x over k, rounded to X. f: identity, gelu, gelu by tanh, or
//               silu(first half of n) * second half. The weight is never rounded: q - zero is exact, sums are fp32
// Tensors       x: X [M, K]; qweight: uint4 [N64, K64, 4, 32]; scales: S [N64, GROUPS, 64]; qzeros: uint8
//               [N64, GROUPS, 32]; perm: int32 [K]; bias: X [N]; residual: X [M, N or N / 2]; norm_weight, norm_bias: X [K];
//               y: X [M, SPLIT1], [M, SPLIT2 - SPLIT1], [M, N - SPLIT2] after each other, or [M, N / 2] for silu_mul;
//               unused ones are null. N64 = ceil(N / 64), K64 = ceil(K / 64); all 16-byte aligned
// Layout        formats/tiles.py has the diagram. A strip is 16 output features; for 64 input features it is one uint4 a
//               lane: word j is the A fragment of features 16 j .. 16 j + 15
// Mapping       grid x: workers of CLUSTER blocks. A worker takes every (gridDim.x / CLUSTER)-th tile of BLOCK_N = 16 * STRIPS *
//               WARPS_N output features, from the first to the last of its tiles in one stream of weights; its blocks split
//               K64 into ranges. In a block, SLICES teams of WARPS_N warps take every SLICES-th chunk of 64 features of the
//               range; a warp owns STRIPS strips. grid y: TILE_M rows. With silu_mul half of a warp's strips are of each
//               half of n
// Shared memory x: [TILE_M][RANGE * 64 + 8] X, the block's range of K, for all its tiles; 128 zero bytes; statistics
//               [TILE_M][3] float; sums: [BUFFERS][SLICES][TILE_M][BLOCK_N + 4] float
// Constants     X: half_t, bf16_t; S: half_t, bf16_t, float; N, K: multiples of 8; GROUP: multiple of 16 or >= K;
//               TILE_M: 1, 2, 4, or a multiple of 8 up to 64; AHEAD: chunks a warp asks for before it needs them;
//               BUFFERS: 1..2; ZEROS, PERM, BIAS, NORM_BIAS, RESIDUAL: 0/1;
//               NORM: 0, 1 LayerNorm, 2 RMSNorm; ACT: 0, 1 gelu, 2 gelu by tanh, 3 silu_mul
// Roof          N * K / 2 bytes of weights
// Source        own work. The word-per-lane packing follows the idea of Marlin (Frantar et al. 2024).
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "epilogue.cuh"
#include "int4.cuh"
#include "mma.cuh"
#include "moments.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

static_assert(N % 8 == 0 && K % 8 == 0, "N and K must be multiples of 8");
static_assert(GROUP % 16 == 0 || GROUP >= K, "a group is a multiple of 16 input features, or all of them");
static_assert(TILE_M <= 4 || (TILE_M % 8 == 0 && TILE_M <= 64), "a tile has 1 to 4 or 8 to 64 rows");
static_assert(ACT != SILU_MUL || (STRIPS % 2 == 0 && N % 32 == 0), "silu_mul pairs strips of the two halves");
static_assert(SPLIT1 % 8 == 0 && SPLIT2 % 8 == 0 && SPLIT1 <= SPLIT2 && SPLIT2 <= N, "planes are multiples of 8 wide");

constexpr int K64 = (K + 63) / 64, N64 = (N + 63) / 64;
constexpr int GROUPS = GROUP >= K ? 1 : (K64 * 64 + GROUP - 1) / GROUP;
constexpr int STEPS = GROUP >= 64 || GROUP >= K ? 4 : GROUP / 16;  // of 16 features, between two scales
static_assert(4 % STEPS == 0, "a chunk of 64 features holds a whole number of groups");
constexpr int SCALES = 4 / STEPS;  // groups of a chunk
constexpr int THREADS = 32 * WARPS_N * SLICES;
constexpr int BLOCK_N = 16 * STRIPS * WARPS_N, BLOCK_OUT = ACT == SILU_MUL ? BLOCK_N / 2 : BLOCK_N;
constexpr int N_OUT = ACT == SILU_MUL ? N / 2 : N;
constexpr int TILES = (N_OUT + BLOCK_OUT - 1) / BLOCK_OUT;
constexpr int RANGE = (K64 + CLUSTER - 1) / CLUSTER;  // chunks of a block
// Chunks of a slice in a tile, and as many turns of the ring of AHEAD as they need.
constexpr int ROUNDS = ((RANGE + SLICES - 1) / SLICES + AHEAD - 1) / AHEAD * AHEAD;
constexpr int MBLOCKS = (TILE_M + 7) / 8;
constexpr int X_STRIDE = RANGE * 64 + 8;   // 16 bytes more than a multiple of 128: ldmatrix meets no bank twice
constexpr int SUM_STRIDE = BLOCK_N + 4, SUMS = SLICES * TILE_M * SUM_STRIDE;

constexpr int X_BYTES = (TILE_M * X_STRIDE * 2 + 15) / 16 * 16;
constexpr int ZERO_BYTES = 128;  // of zeros, for the rows of a tile that is not full
constexpr int STATISTICS_BYTES = NORM ? (TILE_M * 12 + 15) / 16 * 16 : 0;
constexpr int BYTES = X_BYTES + ZERO_BYTES + STATISTICS_BYTES + BUFFERS * SUMS * 4;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

// What a warp needs of a strip for 64 input features. Two scales are one or two whole registers: as values of 16 bits they
// would be taken apart where they are loaded, and every load waited for.
struct Scales {
    unsigned word[sizeof(S) / 2];
};
struct Chunk {
    uint4 weights;
    Scales scale[SCALES];
    unsigned zeros[SCALES];
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
stream_kernel(const X* __restrict__ x, const uint4* __restrict__ qweight, const S* __restrict__ scales,
              const unsigned char* __restrict__ qzeros, const int* __restrict__ perm, const X* __restrict__ bias,
              const X* __restrict__ residual, const X* __restrict__ norm_weight, const X* __restrict__ norm_bias,
              X* __restrict__ y, long long rows, double eps) {
    extern __shared__ __align__(16) unsigned char shared[];
    X* const tile = reinterpret_cast<X*>(shared);
    X* const zeros = reinterpret_cast<X*>(shared + X_BYTES);
    float* const statistics = reinterpret_cast<float*>(shared + X_BYTES + ZERO_BYTES);
    float* const all_sums = reinterpret_cast<float*>(shared + X_BYTES + ZERO_BYTES + STATISTICS_BYTES);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_n = warp % WARPS_N, slice = warp / WARPS_N;
    const int row8 = lane / 4;  // g of the fragment: this lane's output features are g and g + 8
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int worker = CLUSTER > 1 ? blockIdx.x / CLUSTER : blockIdx.x;
    const int workers = CLUSTER > 1 ? gridDim.x / CLUSTER : gridDim.x;
    const long long first_row = static_cast<long long>(blockIdx.y) * TILE_M;
    const int begin = rank * RANGE, end = min(begin + RANGE, K64);

    // Where a tile's strips of this warp are; a strip past the end is the last one, whose result is not stored.
    struct Place {
        const uint4* words[STRIPS];
        const S* scales[STRIPS];
        const unsigned char* zeros[STRIPS];
    };
    auto place_of = [&](int n_tile) {
        Place at;
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            int strip;
            if constexpr (ACT == SILU_MUL) {
                constexpr int HALF = STRIPS / 2;
                strip = (n_tile * WARPS_N + warp_n) * HALF + s % HALF + (s < HALF ? 0 : N / 32);
            } else {
                strip = (n_tile * WARPS_N + warp_n) * STRIPS + s;
            }
            strip = min(strip, N64 * 4 - 1);
            const long long block = strip / 4;
            at.words[s] = qweight + (block * K64 * 4 + strip % 4) * 32 + lane;
            at.scales[s] = scales + block * GROUPS * 64 + strip % 4 * 16 + row8 * 2;
            at.zeros[s] = qzeros + block * GROUPS * 32 + strip % 4 * 8 + row8;
            pin(at.words[s]);
            pin(at.scales[s]);
            if constexpr (ZEROS) pin(at.zeros[s]);
        }
        return at;
    };
    auto fetch_weights = [&](const Place& at, int chunk, Chunk (&to)[STRIPS]) {
        if (chunk >= end) return;
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            to[s].weights = load_streaming(at.words[s] + static_cast<long long>(chunk) * 128);
#pragma unroll
            for (int i = 0; i < SCALES; ++i) {
                const unsigned group = GROUP >= K ? 0u : (chunk * 64u + i * STEPS * 16) / GROUP;
#pragma unroll
                for (int w = 0; w < static_cast<int>(sizeof(S)) / 2; ++w)
                    to[s].scale[i].word[w] = __ldg(reinterpret_cast<const unsigned*>(at.scales[s] + group * 64) + w);
                if constexpr (ZEROS) to[s].zeros[i] = __ldg(at.zeros[s] + group * 32);
            }
        }
    };

    // Phase 1: before the previous kernel is complete, what does not depend on it: the first weights, and a hint for L2.
    Chunk ahead[AHEAD][STRIPS];
    Place here = place_of(worker);
#pragma unroll
    for (int d = 0; d < AHEAD; ++d) fetch_weights(here, begin + slice + d * SLICES, ahead[d]);
    for (int i = threadIdx.x; i < TILE_M * RANGE; i += THREADS) {
        const int row = i / RANGE, chunk = begin + i % RANGE;
        if (first_row + row < rows && chunk < end) prefetch_l2(x + (first_row + row) * K + chunk * 64);
    }
    if (threadIdx.x < ZERO_BYTES / 4) reinterpret_cast<unsigned*>(zeros)[threadIdx.x] = 0;
    wait_for_previous();
    allow_next();

    // Phase 2: the block's range of x to shared memory.
    for (int piece = threadIdx.x; piece < TILE_M * RANGE * 8; piece += THREADS) {
        const int row = piece / (RANGE * 8), column = piece % (RANGE * 8) * 8;
        const int k = begin * 64 + column;
        const bool valid = first_row + row < rows && k < K && k < end * 64;
        X* target = tile + row * X_STRIDE + column;
        if constexpr (PERM) {
            // Act-order: the packed weights are sorted by group, so x is gathered instead. 2-byte loads, from L2.
            int from[8] = {};
            if (valid) {
                *reinterpret_cast<int4*>(from) = *reinterpret_cast<const int4*>(perm + k);
                *reinterpret_cast<int4*>(from + 4) = *reinterpret_cast<const int4*>(perm + k + 4);
            }
            Vector<X, 8> gathered;
#pragma unroll
            for (int e = 0; e < 8; ++e)
                gathered.lane[e] = valid ? x[(first_row + row) * K + from[e]] : from_float<X>(0.0f);
            *reinterpret_cast<Vector<X, 8>*>(target) = gathered;
        } else {
            copy_async_16(target, valid ? x + (first_row + row) * K + k : x, valid);
        }
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();

    // Phase 3: the norm of the rows, in place. A block has a part of each row, the cluster the whole of it.
    if constexpr (NORM > 0) {
        const int width = min(end * 64, K) - begin * 64;  // columns of this block
        for (int row = warp; row < TILE_M; row += THREADS / 32) {
            const X* values = tile + row * X_STRIDE;
            float mean = 0.0f, first = 0.0f, second = 0.0f;
            if constexpr (NORM == 1) {
                for (int k = lane; k < width; k += 32) mean += to_float(values[k]);
                mean = width > 0 ? warp_sum(mean) / width : 0.0f;
            }
            for (int k = lane; k < width; k += 32) {
                const float deviation = to_float(values[k]) - mean;
                first += deviation;
                second += deviation * deviation;
            }
            first = warp_sum(first);
            second = warp_sum(second);
            if (lane == 0) statistics[row * 3] = mean, statistics[row * 3 + 1] = first, statistics[row * 3 + 2] = second;
        }
        if constexpr (CLUSTER > 1) cluster_sync();
        else __syncthreads();
        for (int row = warp; row < TILE_M; row += THREADS / 32) {
            const Normal normal = combine<NORM == 1>(
                CLUSTER, K, static_cast<float>(eps),
                [](int r) { return max(min(min((r + 1) * RANGE, K64) * 64, K) - r * RANGE * 64, 0); },
                [&](int r) {
                    const float* at = statistics + row * 3;
                    if constexpr (CLUSTER == 1) return Moments{at[0], at[1], at[2]};
                    else return Moments{cluster_load(at, r), cluster_load(at + 1, r), cluster_load(at + 2, r)};
                });
            X* values = tile + row * X_STRIDE;
            for (int k = lane; k < width; k += 32) {
                const int feature = PERM ? perm[begin * 64 + k] : begin * 64 + k;
                float h = normal(to_float(values[k])) * to_float(norm_weight[feature]);
                if constexpr (NORM_BIAS) h += to_float(norm_bias[feature]);
                values[k] = from_float<X>(first_row + row < rows ? h : 0.0f);
            }
        }
        __syncthreads();
    }

    // Phase 4: the product, tile after tile.
    float total[STRIPS][MBLOCKS][4];
    // Where this lane's row of a B fragment is, and how far it moves with a chunk. Rows that a small tile does not have are
    // the zeros behind x.
    const bool real = TILE_M >= 8 || lane % 8 < TILE_M;
    unsigned x_at = static_cast<unsigned>(__cvta_generic_to_shared(tile)) + (lane % 8 * X_STRIDE + lane / 8 * 8) * 2;
    unsigned x_step = 128;
    if (!real) x_at = static_cast<unsigned>(__cvta_generic_to_shared(zeros)) + lane / 8 * 16, x_step = 0;
    pin(x_at);
    if constexpr (TILE_M < 8) pin(x_step);
    auto multiply = [&](unsigned x_chunk, const Chunk (&chunk)[STRIPS]) {
        unsigned a[STRIPS][4][4];
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            const unsigned word[4] = {chunk[s].weights.x, chunk[s].weights.y, chunk[s].weights.z, chunk[s].weights.w};
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                unsigned zero_points = 0x88;
                if constexpr (ZEROS) zero_points = chunk[s].zeros[step / STEPS];
                unpack_int4<X>(word[step], zero_pair<X>(zero_points & 15), zero_pair<X>(zero_points >> 4), a[s][step]);
            }
        }
#pragma unroll
        for (int block = 0; block < MBLOCKS; ++block) {
            unsigned b[2][4];
            load_matrices(b[0], x_chunk + block * 16 * X_STRIDE);
            load_matrices(b[1], x_chunk + block * 16 * X_STRIDE + 64);
#pragma unroll
            for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
                for (int i = 0; i < SCALES; ++i) {
                    float sum[4] = {};
#pragma unroll
                    for (int step = i * STEPS; step < (i + 1) * STEPS; ++step)
                        mma_16816<X>(sum, a[s][step], b[step / 2][step % 2 * 2], b[step / 2][step % 2 * 2 + 1]);
                    const Vector<S, 2> scale = reinterpret_cast<const Vector<S, 2>&>(chunk[s].scale[i]);
                    const float top = to_float(scale.lane[0]), bottom = to_float(scale.lane[1]);
                    total[s][block][0] += top * sum[0];
                    total[s][block][1] += top * sum[1];
                    total[s][block][2] += bottom * sum[2];
                    total[s][block][3] += bottom * sum[3];
                }
            }
        }
    };
    for (int n_tile = worker, turn = 0; n_tile < TILES; n_tile += workers, ++turn) {
#pragma unroll
        for (int s = 0; s < STRIPS; ++s)
#pragma unroll
            for (int block = 0; block < MBLOCKS; ++block)
#pragma unroll
                for (int e = 0; e < 4; ++e) total[s][block][e] = 0.0f;
        const bool more = n_tile + workers < TILES;
        const Place next = more ? place_of(n_tile + workers) : here;
        for (int round = 0; round < ROUNDS; round += AHEAD) {
            const bool last = round + AHEAD == ROUNDS;  // what is asked for now belongs to the next tile
#pragma unroll
            for (int d = 0; d < AHEAD; ++d) {
                const int at = slice + (round + d) * SLICES;
                if (begin + at < end) multiply(x_at + at * x_step, ahead[d]);
                if (!last) fetch_weights(here, begin + at + AHEAD * SLICES, ahead[d]);
                else if (more) fetch_weights(next, begin + slice + d * SLICES, ahead[d]);
            }
        }
        here = next;

        // Phase 5: the block's sums of this tile to shared memory, while the next tile's weights are on their way.
        float* const sums = all_sums + turn % BUFFERS * SUMS;
#pragma unroll
        for (int s = 0; s < STRIPS; ++s)
#pragma unroll
            for (int i = 0; i < MBLOCKS * 4; ++i) {
                const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
                const int feature = (warp_n * STRIPS + s) * 16 + row8 + i % 4 / 2 * 8;
                if (TILE_M >= 8 || row < TILE_M)
                    sums[(slice * TILE_M + row) * SUM_STRIDE + feature] = total[s][i / 4][i % 4];
            }
        if constexpr (CLUSTER > 1) cluster_sync();
        else __syncthreads();

        // Phase 6: the blocks of the cluster share the outputs; parts are added in order, so that the result never depends
        // on timing. Four features a thread.
        for (int piece = rank * THREADS + threadIdx.x; piece < TILE_M * BLOCK_OUT / 4; piece += CLUSTER * THREADS) {
            const int row = piece / (BLOCK_OUT / 4), column = piece % (BLOCK_OUT / 4) * 4;
            const int feature = n_tile * BLOCK_OUT + column;
            const long long m = first_row + row;
            if (m >= rows || feature >= N_OUT) continue;
            // With silu_mul a warp has WIDTH features of the gate, and behind them as many of up.
            constexpr int WIDTH = STRIPS * 8;
            const int begins = ACT == SILU_MUL ? column / WIDTH * 2 * WIDTH + column % WIDTH : column;
            finish_four<ACT, BIAS, RESIDUAL, N, SPLIT1, SPLIT2>(bias, residual, y, rows, m, feature, [&](int which, float (&value)[4]) {
                const int from = begins + which * WIDTH;
#pragma unroll
                for (int e = 0; e < 4; ++e) value[e] = 0.0f;
#pragma unroll
                for (int r = 0; r < CLUSTER; ++r)
#pragma unroll
                    for (int part = 0; part < SLICES; ++part) {
                        const float* at = sums + (part * TILE_M + row) * SUM_STRIDE + from;
                        const float4 v = CLUSTER > 1 ? cluster_load4(at, r) : *reinterpret_cast<const float4*>(at);
                        value[0] += v.x, value[1] += v.y, value[2] += v.z, value[3] += v.w;
                    }
            });
        }
        if constexpr (BUFFERS == 1) {  // the next tile writes the same place
            if constexpr (CLUSTER > 1) cluster_sync();
            else __syncthreads();
        }
    }
    if constexpr (CLUSTER > 1) cluster_sync();  // no block leaves while another reads its sums
}
