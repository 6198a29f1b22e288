// gemm: int8 activations times an int4 weight on the integer tensor cores. Weights are unpacked into their registers, activations
// stream past through the copy engine; both scales and the bias come at the end.
//
// Computes      y[m, n] = scale_x[m] * scale_w[n] * sum_k x[m, k] * q[k, n] (+ bias[n]); the sum is exact
// Tensors       x_map: of x, int8 [M, K], as 16-bit values, in tiles of 64 of them (128 int8) by TILE_M / CLUSTER rows; qweight:
//               uint4 [N64, 2 * UNITS, 4, 32]; scale_w: float [N64 * 64]; scale_x: float [M]; bias: X [N] or null; y: X [M, N].
//               N64 = ceil(N / 64), UNITS = ceil(K / 128); all 16-byte aligned
// Layout        a chunk is 64 output by 64 input features; a strip of it, 16 output features, is 4 words a lane. With g = lane / 4,
//               t = lane % 4: word 2 s + h, of the 32 input features from 32 s on, holds those from 16 h + 4 t on, four bytes of
//               two values, of output feature g in the high half of the byte, of g + 8 in the low one, two's complement. So
//               word & 0xf0f0f0f0 and (word << 4) & 0xf0f0f0f0 are registers of A, 16 times the value each
// Mapping       blocks (clusters of CLUSTER) take tile after tile, all rows of some output features first. A block has TILE_M rows
//               by 64 * TEAMS output features; the blocks of a cluster have other features each, and fetch x for each other. A
//               warpgroup has 64 of the features, and every SLICES-th unit of 128 input features; one more asks for the tiles
// Shared memory AHEAD stages of SLICES units: x [TILE_M][128] swizzled, weights 4 KB a team; [TEAMS][PASS][64] X of results; the
//               sums of the other slices, [SLICES - 1][TEAMS][TILE_M / 8][128][4] int
// Constants     X: half_t, bf16_t; N: a multiple of 8, K: of 16; TILE_M: 8, 16, 32, 64, 128, 256; TEAMS, SLICES: together up to
//               4, of TILE_M 128 and 256 up to 2; CLUSTER: 1, 2; AHEAD: stages; BIAS: 0/1; SHARED: bytes
// Roof          the larger of N * K / 2 bytes of weights and 2 M N K operations of int8
// Source        own work
#include "arrive.cuh"
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "tensor.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

static_assert(N % 8 == 0 && K % 16 == 0, "16-byte pieces of rows of x and of y");
constexpr int UNITS = (K + 127) / 128, N64 = (N + 63) / 64, STAGES = (UNITS + SLICES - 1) / SLICES;
constexpr int WARPGROUPS = TEAMS * SLICES, THREADS = 128 * WARPGROUPS;  // that compute
constexpr int SHARE_M = TILE_M / CLUSTER, TILES_N = (N + 64 * TEAMS * CLUSTER - 1) / (64 * TEAMS * CLUSTER);
static_assert(WARPGROUPS <= (TILE_M >= 128 ? 2 : 4), "registers for more are not there");
static_assert(SHARE_M % 8 == 0 && (CLUSTER == 1 || CLUSTER == 2), "parts of 8 rows");
static_assert(AHEAD > 1, "a stage is unpacked before the one before it has been read");
constexpr int X_BYTES = TILE_M * 128, WEIGHT_BYTES = 4096;  // of a unit
constexpr int STAGE = SLICES * X_BYTES + WARPGROUPS * WEIGHT_BYTES;
constexpr int PRODUCER_REGISTERS = WARPGROUPS >= 3 ? 32 : WARPGROUPS == 2 && TILE_M > 64 ? 40 : 0;
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 4 ? 112 : WARPGROUPS == 3 ? 160 : 232;
constexpr int PASS = TILE_M < 64 ? TILE_M : 64;  // rows of results at a time
constexpr int SUMS = (SLICES - 1) * TEAMS * TILE_M / 2 * 128;
constexpr int BYTES = AHEAD * STAGE + TEAMS * PASS * 128 + SUMS * 4 + 2 * AHEAD * 8;
static_assert(STAGE % 1024 == 0, "tiles of x begin at multiples of 1024 bytes");
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
gemm_kernel(const __grid_constant__ TensorMap x_map, const uint4* __restrict__ qweight, const float* __restrict__ scale_w,
            const float* __restrict__ scale_x, const X* __restrict__ bias, X* __restrict__ y, long long rows) {
    extern __shared__ __align__(1024) unsigned char shared[];
    X* const results = reinterpret_cast<X*>(shared + AHEAD * STAGE);
    int4* const sums = reinterpret_cast<int4*>(results + TEAMS * PASS * 64);
    Barrier* const filled = reinterpret_cast<Barrier*>(sums + SUMS / 4);
    Barrier* const used = filled + AHEAD;

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    const int team = warp / 4 % TEAMS, slice = warp / (4 * TEAMS), strip = warp % 4;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, worker = blockIdx.x / CLUSTER, workers = gridDim.x / CLUSTER;
    const int tiles_m = static_cast<int>((rows + TILE_M - 1) / TILE_M), tiles = tiles_m * TILES_N;

    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) barrier_init(filled + i, 1), barrier_init(used + i, CLUSTER * THREADS / 32 * ARRIVALS);
        barrier_init_done();
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) cluster_arrive();  // this block's barriers are there

    auto features_of = [&](int tile_n, int t) { return (tile_n * CLUSTER + rank) * TEAMS + t; };  // in 64s

    // The last warpgroup asks for everything: weights before the previous kernel is complete, x after.
    if (slice == SLICES) {
        if constexpr (PRODUCER_REGISTERS > 0) fewer_registers<PRODUCER_REGISTERS>();
        if (warp != THREADS / 32) {
            if constexpr (CLUSTER > 1) cluster_wait();
            return;
        }
        int tile, stage, slot, turn, n_tile, row;  // of what is asked for next
        auto turn_to = [&](int to) { tile = to, n_tile = to / tiles_m, row = to % tiles_m * TILE_M + rank * SHARE_M; };
        auto begin = [&] { turn_to(worker), stage = slot = turn = 0; };
        auto next = [&] {
            if (++stage == STAGES) stage = 0, turn_to(tile + workers);
            if (++slot == AHEAD) slot = 0, ++turn;
        };
        auto ask_weights = [&] {
            const int count = min(SLICES, UNITS - stage * SLICES);
            barrier_expect(filled + slot, count * (X_BYTES + TEAMS * WEIGHT_BYTES));
#pragma unroll
            for (int t = 0; t < TEAMS; ++t) {
                const long long of = min(features_of(n_tile, t), N64 - 1);
                copy_bulk(shared + slot * STAGE + SLICES * X_BYTES + t * SLICES * WEIGHT_BYTES,
                          qweight + (of * UNITS + stage * SLICES) * (WEIGHT_BYTES / 16), count * WEIGHT_BYTES, filled + slot);
            }
        };
        auto ask_x = [&] {
            const int count = min(SLICES, UNITS - stage * SLICES);
#pragma unroll
            for (int c = 0; c < SLICES; ++c) {
                if (SLICES > 1 && c >= count) break;
                unsigned char* const part = shared + slot * STAGE + c * X_BYTES + rank * SHARE_M * 128;
                const int column = (stage * SLICES + c) * 64;
                if constexpr (CLUSTER > 1) copy_tile(part, x_map, column, row, filled + slot, (1 << CLUSTER) - 1);
                else copy_tile(part, x_map, column, row, filled + slot);
            }
        };
        const bool asks = elected();
        begin();
        if (asks)
            for (; turn == 0 && tile < tiles; next()) ask_weights();
        __syncwarp();
        if constexpr (CLUSTER > 1) cluster_wait();  // all blocks' are
        if (!asks) return;
        wait_for_previous();
        allow_next();
        const int upto = turn * AHEAD + slot;
        begin();
        for (int i = 0; i < upto; ++i, next()) ask_x();
        for (; tile < tiles; next()) {
            barrier_wait(used + slot, (turn - 1) % 2);
            ask_weights();
            ask_x();
        }
        return;
    }
    if constexpr (PRODUCER_REGISTERS > 0) more_registers<CONSUMER_REGISTERS>();
    if constexpr (CLUSTER > 1) cluster_wait();
    wait_for_previous();  // of this kernel's writes to y, and its reads of scale_x

    const unsigned x_rows = wgmma_rows(shared) + slice * (X_BYTES / 16);
    const unsigned char* const my_weights = shared + SLICES * X_BYTES + (team * SLICES + slice) * WEIGHT_BYTES + strip * 512 + lane * 16;
    int slot = 0, turn = 0;
    // Weights are unpacked two steps ahead of the tensor cores, into the registers that they no longer read.
    unsigned a[2][2][4];
    auto unpack = [&](int at, int half, bool absent) {  // of the unit at `at` in the ring
        const uint4 four = *reinterpret_cast<const uint4*>(my_weights + at + half * 2048);
        const unsigned word[4] = {four.x, four.y, four.z, four.w}, mask = absent ? 0u : 0xf0f0f0f0u;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[half][i / 2][i % 2 * 2] = word[i] & mask;
            a[half][i / 2][i % 2 * 2 + 1] = word[i] << 4 & mask;
        }
    };
    auto beyond = [&](int stage) { return UNITS % SLICES != 0 && stage * SLICES + slice >= UNITS; };  // only what was there before
    const int all = (tiles - worker + workers - 1) / workers * STAGES;  // stages
    int done = 0;
    if (all > 0) barrier_wait(filled, 0), unpack(0, 0, beyond(0));
    for (int tile = worker; tile < tiles; tile += workers) {
        int total[TILE_M / 2];
#pragma unroll 1
        for (int stage = 0; stage < STAGES; ++stage) {
            const int now = slot;
            const unsigned x_unit = x_rows + now * (STAGE / 16);
            const bool last = ++done == all;
            if (++slot == AHEAD) slot = 0, turn ^= 1;
            // Every block of the cluster writes x here. Not after the last stages: nobody waits, and it might be gone.
            auto release = [&](int slot_read, int number) {
                if (CLUSTER == 1) warp_arrive(used + slot_read, lane);
                if (CLUSTER > 1 && number + AHEAD <= all) warp_arrive_at<CLUSTER>(used + slot_read, lane);
            };
            // A stage has been read when the next one's first products wait.
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 2; ++i) wgmma_add(total, a[half][i], x_unit + half * 4 + i * 2, stage + half + i);
                wgmma_commit();
                if (half == 1 && !last) barrier_wait(filled + slot, turn);
                wgmma_wait<1>();
                if (half == 0) {
                    if (stage > 0) release((now == 0 ? AHEAD : now) - 1, done - 1);
                    unpack(now * STAGE, 1, beyond(stage));
                } else if (!last) {
                    unpack(slot * STAGE, 0, beyond(stage + 1 == STAGES ? 0 : stage + 1));
                }
            }
            if (stage + 1 < STAGES) continue;
            wgmma_wait<0>();
            release(now, done);
            arrived(total);
        }

        unsigned index = threadIdx.x;  // read again: what is computed from it would keep registers through the product
        pin(index);
        const int lane = index % 32, row8 = lane / 4, thread = index % 128;
        if constexpr (SLICES > 1) {  // the first slice adds the others' sums to its own
            int4* const mine = sums + team * (TILE_M / 8) * 128 + thread;
            constexpr int BETWEEN = TEAMS * (TILE_M / 8) * 128;
            if (slice > 0) {
#pragma unroll
                for (int i = 0; i < TILE_M / 8; ++i)
                    mine[(slice - 1) * BETWEEN + i * 128] = int4{total[i * 4], total[i * 4 + 1], total[i * 4 + 2], total[i * 4 + 3]};
            }
            sync_part(1 + TEAMS + team, 128 * SLICES);
            if (slice == 0) {
#pragma unroll
                for (int s = 0; s < SLICES - 1; ++s)
#pragma unroll
                    for (int i = 0; i < TILE_M / 8; ++i) {
                        const int4 more = mine[s * BETWEEN + i * 128];
                        total[i * 4] += more.x, total[i * 4 + 1] += more.y, total[i * 4 + 2] += more.z, total[i * 4 + 3] += more.w;
                    }
            }
            sync_part(1 + TEAMS + team, 128 * SLICES);
            if (slice > 0) continue;
        }

        // Results, PASS rows at a time: scaled and rounded in registers, turned around by stmatrix, and on.
        X* const place = results + team * PASS * 64;  // [PASS][64], swizzled
        const long long first_row = static_cast<long long>(tile % tiles_m) * TILE_M;
        const int first = features_of(tile / tiles_m, team) * 64, own = first + strip * 16 + row8;
        float scale[2] = {}, bias_of[2] = {};  // of features g and g + 8
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (own + i * 8 < N) {
                scale[i] = scale_w[own + i * 8] * 0.0625f;  // the values are 16 times what they stand for
                if constexpr (BIAS) bias_of[i] = to_float(bias[own + i * 8]);
            }
        const int feature = first + thread % 8 * 8;
#pragma unroll
        for (int pass = 0; pass < TILE_M / PASS; ++pass) {
            if (first_row + pass * PASS >= rows) break;
            sync_part(1 + team, 128);
#pragma unroll
            for (int block = 0; block < PASS / 8; ++block) {
                const long long m = first_row + pass * PASS + block * 8 + lane % 4 * 2;
                const float of_row[2] = {m < rows ? scale_x[m] : 0.0f, m + 1 < rows ? scale_x[m + 1] : 0.0f};
                unsigned pair[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int* const v = total + (pass * (PASS / 8) + block) * 4 + i * 2;
                    pair[i] = rounded_pair<X>(v[0] * of_row[0] * scale[i] + bias_of[i], v[1] * of_row[1] * scale[i] + bias_of[i]);
                }
                const int row = block * 8 + lane % 8;
                store_transposed(pair[0], pair[1], place + row * 64 + ((strip * 2 + lane / 8 % 2) ^ lane % 8) * 8);
            }
            sync_part(1 + team, 128);
            if (feature >= N) continue;
            for (int row = thread / 8; row < PASS; row += 16) {
                const long long m = first_row + pass * PASS + row;
                if (m >= rows) break;
                *reinterpret_cast<uint4*>(y + m * N + feature) = *reinterpret_cast<const uint4*>(place + row * 64 + (thread % 8 ^ row % 8) * 8);
            }
        }
    }
}
