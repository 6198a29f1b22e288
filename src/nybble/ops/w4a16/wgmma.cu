// wgmma: the 4-bit or 8-bit linear for a batch of decode steps, the unpacked weights being the tensor cores' register operand; norm
// before it and epilogue in one launch. stream.cu computes the same without Hopper's instructions.
//
// Computes      y[m, n] = f(sum_k h[m, k] * scale[k / GROUP, n] * (q[k, n] - zero[k / GROUP, n]) (+ bias[n])) (+ residual[m, n])
//               h = x, or LayerNorm or RMSNorm of x over k, rounded to X. f: identity, gelu, gelu by tanh, or
//               silu(first half of n) * second half. The weight is never rounded: q - zero is exact, sums are fp32
// Tensors       as stream.cu: x: X [M, K]; qweight: uint4 [N64, K64, BITS / 4, 4, 32]; scales: S [N64, GROUPS, 64]; qzeros: uint8
//               [N64, GROUPS, 8 BITS]; perm: int32 [K]; bias: X [N]; residual: X [M, N or N / 2]; norm_weight, norm_bias: X [K];
//               y: Y [M, SPLIT1], [M, SPLIT2 - SPLIT1], [M, N - SPLIT2] after each other, or [M, N / 2] for silu_mul;
//               unused ones are null. N64 = ceil(N / 64), K64 = ceil(K / 64); all 16-byte aligned
// Layout        formats/tiles.py has the diagram. 64 output by 64 input features are 2 KB (8 bits: 4) that follow each other along
//               K, so that one bulk copy brings SLICES units; a warp's 512 of 2 KB are its quarter of wgmma's A, 4 steps (2)
// Mapping       grid x: workers of CLUSTER blocks. A worker takes every (gridDim.x / CLUSTER)-th tile of 64 * TEAMS output
//               features; its blocks split K. In a block a warpgroup has 64 of the tile's features and every SLICES-th unit
//               of 128 input features of the block's range; one more warp asks for the weights. grid y: TILE_M rows
// Shared memory x: [chunk of 64 features][TILE_M][64] X, swizzled, the block's range of K for all its tiles; the ring:
//               AHEAD stages of a unit for every warpgroup, with its scales and zero points; sums: [BUFFERS][SOURCES][OWNED]
//               [SUM_ROWS / 8][128] float, as fragments; moments: [CLUSTER][max(TILE_M, warps)][4] float, and
//               [TILE_M][4] of rows; barriers
// Constants     BITS: 4, 8; X: half_t, bf16_t; Y: X or float; S: half_t, bf16_t, float; N, K: multiples of 8; GROUP: 16, 32, 64, a multiple of 128 or
//               >= K; TILE_M: 8, 16, 32, 64; TEAMS, SLICES: together up to 4; CLUSTER: 2, 4, 8, dividing 4 * TEAMS; AHEAD: stages;
//               GATHERED: 0/1, x is in the order of perm already (gather.cu); SUM_ROWS: rows exchanged at a time; BUFFERS: 1..2;
//               BLOCKS: on an SM; ZEROS, PERM, BIAS, NORM_BIAS, RESIDUAL: 0/1; NORM: 0, 1 LayerNorm, 2 RMSNorm; ACT: 0,
//               1 gelu, 2 gelu by tanh, 3 silu_mul (N a multiple of 128, TEAMS even: every other warpgroup has features of up)
// Roof          N * K * BITS / 8 bytes of weights up to about 32 rows; beyond, the exchange of sums
// Source        own work. Weights as wgmma's register operand, y^T = W^T x^T: the idea of Machete (vLLM, 2024).
#include "arrive.cuh"
#include "barrier.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "dependent.cuh"
#include "epilogue.cuh"
#include "moments.cuh"
#include "packed.cuh"
#include "reduce.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

static_assert(ACT != SILU_MUL || (N % 128 == 0 && TEAMS % 2 == 0), "silu_mul pairs 64 features of the two halves");
static_assert(SPLIT1 % 8 == 0 && SPLIT2 % 8 == 0 && SPLIT1 <= SPLIT2 && SPLIT2 <= N, "planes are multiples of 8 wide");

using Weights = Packed<S, N, K, GROUP, ZEROS, BITS>;
constexpr int K64 = Weights::K64, PARTS = Weights::PARTS, STEPS = Weights::STEPS;
constexpr float LARGER = Weights::LARGER<X>;  // that scales are, for weights that are smaller
// Of the groups of a unit up to TOGETHER are summed apart at once, as registers allow.
constexpr int TOGETHER = PARTS * TILE_M <= 64 ? PARTS : TILE_M < 64 ? 64 / TILE_M : 1;
constexpr int THREADS = 128 * TEAMS * SLICES;  // that compute; one more warp asks for the weights
constexpr int BLOCK_N = 64 * TEAMS, BLOCK_OUT = ACT == SILU_MUL ? BLOCK_N / 2 : BLOCK_N;
constexpr int N_OUT = ACT == SILU_MUL ? N / 2 : N;
constexpr int TILES = (N_OUT + BLOCK_OUT - 1) / BLOCK_OUT;
constexpr int UNITS = (K64 + 2 * CLUSTER - 1) / (2 * CLUSTER), RANGE = 2 * UNITS;  // of a block: units, chunks of 64 features
// Sums are exchanged SUM_ROWS rows at a time, in blocks of 8; of the tile's strips of 16 features every block of the
// cluster adds up and stores OWNED.
constexpr int PASSES = TILE_M / SUM_ROWS, PASS_BLOCKS = SUM_ROWS / 8;
constexpr int OWNED = 4 * TEAMS / CLUSTER, SOURCES = CLUSTER * SLICES;
static_assert(OWNED * CLUSTER == 4 * TEAMS && (ACT != SILU_MUL || OWNED % 2 == 0), "a block owns whole strips, with silu_mul pairs");

constexpr int X_BYTES = RANGE * TILE_M * 128;
constexpr int WEIGHT_BYTES = Weights::WEIGHT_BYTES, SCALE_BYTES = Weights::SCALE_BYTES, ZERO_BYTES = Weights::ZERO_BYTES;  // of a unit
using Stages = Stage<Weights, TEAMS, SLICES, ACT == SILU_MUL>;
constexpr int STAGE = Stages::BYTES;
constexpr int WARPS = THREADS / 32, MOMENT_ROWS = TILE_M > WARPS ? TILE_M : WARPS;
constexpr int SUMS = SOURCES * OWNED * PASS_BLOCKS * 128, MOMENTS = NORM ? (CLUSTER * MOMENT_ROWS + TILE_M) * 4 : 0;  // floats
constexpr bool GATHER = PERM && !GATHERED;  // one row of x, in the order of perm
constexpr int ROW_BYTES = GATHER ? (K * 2 + 15) / 16 * 16 : 0;
constexpr int BYTES = X_BYTES + AHEAD * STAGE + (BUFFERS * SUMS + MOMENTS) * 4 + ROW_BYTES + (2 * AHEAD + 2 * BUFFERS + 1) * 8;
static_assert(BYTES <= SHARED, "the launch must ask for this much shared memory");

extern "C" __global__ void __launch_bounds__(THREADS + 32, BLOCKS)
wgmma_kernel(const X* __restrict__ x, const uint4* __restrict__ qweight, const S* __restrict__ scales,
             const unsigned char* __restrict__ qzeros, const int* __restrict__ perm, const X* __restrict__ bias,
             const X* __restrict__ residual, const X* __restrict__ norm_weight, const X* __restrict__ norm_bias,
             Y* __restrict__ y, long long rows, double eps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char* const tile = shared;
    unsigned char* const ring = shared + X_BYTES;
    float* const all_sums = reinterpret_cast<float*>(ring + AHEAD * STAGE);
    float* const moments = all_sums + BUFFERS * SUMS;
    X* const whole = reinterpret_cast<X*>(moments + MOMENTS);  // a row of x before it is gathered
    Barrier* const filled = reinterpret_cast<Barrier*>(moments + MOMENTS + ROW_BYTES / 4);  // a stage of the ring
    Barrier* const used = filled + AHEAD;
    Barrier* const summed = used + AHEAD;  // a step's sums
    Barrier* const stored = summed + BUFFERS;
    Barrier* const measured = stored + BUFFERS;

    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), row8 = lane / 4;
    const int warp_n = warp % (4 * TEAMS), slice = warp / (4 * TEAMS), team = warp_n / 4;
    const int rank = cluster_rank();
    const int worker = blockIdx.x / CLUSTER, workers = gridDim.x / CLUSTER;
    const long long first_row = static_cast<long long>(blockIdx.y) * TILE_M;
    const int rows_here = static_cast<int>(min(static_cast<long long>(TILE_M), rows - first_row));
    const int begin = rank * RANGE, end = min(begin + RANGE, K64);
    const int units = max((end - begin + 1) / 2, 0), stages = (units + SLICES - 1) / SLICES;  // a tile's

    // Phase 1: one warp asks for all weights, AHEAD stages of them before anything is waited for: no kernel writes them.
    if (warp == THREADS / 32) {
        int tile_asked = worker, stage = 0, slot = 0, turn = 0;
        auto ask = [&] {
            const int chunk = begin + stage * SLICES * 2, chunks = min(SLICES * 2, end - chunk);
            Stages::ask(ring + slot * STAGE, qweight, scales, qzeros, tile_asked, chunk, chunks, filled + slot);
            if (++slot == AHEAD) slot = 0, ++turn;
            if (++stage == stages) stage = 0, tile_asked += workers;
        };
        const bool asks = elected();
        if (asks) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) barrier_init(filled + i, 1), barrier_init(used + i, WARPS * ARRIVALS);
#pragma unroll
            for (int b = 0; b < BUFFERS; ++b) barrier_init(summed + b, 1), barrier_init(stored + b, CLUSTER * WARPS * ARRIVALS);
            barrier_init(measured, 1);
            barrier_init_done();
            while (turn == 0 && tile_asked < TILES && units > 0) ask();
        }
        __syncthreads();
        cluster_arrive();
        cluster_wait();
        if (asks && units > 0)
            while (tile_asked < TILES) {
                barrier_wait(used + slot, (turn - 1) % 2);
                ask();
            }
        return;
    }
    for (int i = threadIdx.x; i < TILE_M * RANGE; i += THREADS) {
        const int row = i / RANGE, chunk = begin + i % RANGE;
        if (row < rows_here && chunk < end) prefetch_l2(x + (first_row + row) * K + chunk * 64);
        if (NORM && PERM == 0 && row == 0 && chunk < end) {
            prefetch_l2(norm_weight + chunk * 64);
            if constexpr (NORM_BIAS) prefetch_l2(norm_bias + chunk * 64);
        }
    }
    __syncthreads();
    // For the norm several warps share a row when there are enough of them.
    const int share_bits = NORM == 0 || rows_here * 2 > WARPS ? 0 : rows_here * 4 > WARPS ? 1 : rows_here * 8 > WARPS ? 2 : 3;
    const int sharers = 1 << share_bits;
    if (NORM && threadIdx.x == 0) barrier_expect(measured, CLUSTER * rows_here * sharers * 16);
    // The norm's weight and bias for this thread's columns. They are on their way with x: the kernel before may have made them.
    constexpr int SETS = THREADS < RANGE * 8 ? 1 : THREADS / (RANGE * 8);  // threads that have the same columns, of other rows
    const int my_columns = SETS == 1 ? threadIdx.x : threadIdx.x % (RANGE * 8), my_set = SETS == 1 ? 0 : threadIdx.x / (RANGE * 8);
    Vector<X, 8> by, plus;
    auto load_norm = [&](int group) {
        const int k = begin * 64 + group * 8;
        if (NORM == 0 || k >= K) return;
        if constexpr (PERM) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int feature = perm[k + e];
                by.lane[e] = norm_weight[feature];
                if constexpr (NORM_BIAS) plus.lane[e] = norm_bias[feature];
            }
        } else {
            by = *reinterpret_cast<const Vector<X, 8>*>(norm_weight + k);
            if constexpr (NORM_BIAS) plus = *reinterpret_cast<const Vector<X, 8>*>(norm_bias + k);
        }
    };
    int order[8] = {};  // act-order: where this thread's next eight features of x are
    auto turn_to = [&](int piece) {
        const int k = begin * 64 + piece % (RANGE * 8) * 8;
        if (k >= K) return;
        *reinterpret_cast<int4*>(order) = *reinterpret_cast<const int4*>(perm + k);
        *reinterpret_cast<int4*>(order + 4) = *reinterpret_cast<const int4*>(perm + k + 4);
    };
    if constexpr (GATHER) turn_to(threadIdx.x);
    cluster_arrive();  // this block's barriers are there
    wait_for_previous();
    allow_next();

    // Phase 2: the block's range of x to shared memory, swizzled as the tensor cores read it. Rows that are not there stay
    // what they were: a row of x reaches its own row of y only.
    auto piece_at = [&](int row, int column) {  // of eight features
        return reinterpret_cast<X*>(tile + (column / 64 * TILE_M + row) * 128 + ((column / 8 % 8) ^ (row % 8)) * 16);
    };
    if constexpr (GATHER) {
        // The packed weights are sorted by group, so x is gathered instead, from shared memory: every 2-byte load from global
        // memory would take a cycle of the SM's own.
        static_assert(!GATHER || TILE_M == 8, "only one row is gathered here");
        for (int k = threadIdx.x * 8; k < K; k += THREADS * 8) copy_async_16(whole + k, x + first_row * K + k, true);
        commit_copies();
        wait_copies<0>();
        sync_part(1, THREADS);
        for (int piece = threadIdx.x; piece < RANGE * 8; piece += THREADS) {
            Vector<X, 8> gathered;
#pragma unroll
            for (int e = 0; e < 8; ++e) gathered.lane[e] = begin * 64 + piece * 8 < K ? whole[order[e]] : from_float<X>(0.0f);
            *reinterpret_cast<Vector<X, 8>*>(piece_at(0, piece * 8)) = gathered;
            turn_to(piece + THREADS);
        }
    } else {
        for (int piece = threadIdx.x; piece < rows_here * (RANGE * 8); piece += THREADS) {
            const int row = piece / (RANGE * 8), column = piece % (RANGE * 8) * 8, k = begin * 64 + column;
            copy_async_16(piece_at(row, column), k < K ? x + (first_row + row) * K + k : x, k < K);
        }
    }
    if (NORM && my_set < SETS && my_columns < RANGE * 8) load_norm(my_columns);
    commit_copies();
    cluster_wait();

    // Phase 3: the norm of the rows, in place. A block has a part of each row; the parts' moments are sent around.
    if constexpr (NORM > 0) {
        wait_copies<0>();
        sync_part(1, THREADS);
        const int width = max(min(end * 64, K) - begin * 64, 0);  // columns of this block, and of a warp
        auto share_of = [&](int wide) { return ((wide / 8 + sharers - 1) >> share_bits) * 8; };
        const int share = share_of(width);
        for (int job = warp; job < rows_here * sharers; job += WARPS) {
            const int row = job >> share_bits, from = (job & (sharers - 1)) * share, upto = min(from + share, width);
            float mean = 0.0f, first = 0.0f, second = 0.0f;
            auto over_row = [&](auto add) {
#pragma unroll 4
                for (int k = from + lane * 8; k < upto; k += 256) {
                    float value[8];
                    load_vector(piece_at(row, k), value);
                    add(value);
                }
            };
            auto sum = [](const float (&v)[8]) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); };
            if constexpr (NORM == 1) {
                over_row([&](const float (&v)[8]) { mean += sum(v); });
                mean = upto > from ? warp_sum(mean) / (upto - from) : 0.0f;
            }
            over_row([&](float (&v)[8]) {
                float squares[8];
#pragma unroll
                for (int e = 0; e < 8; ++e) v[e] -= mean, squares[e] = v[e] * v[e];
                first += sum(v);
                second += sum(squares);
            });
            first = warp_sum(first);
            second = warp_sum(second);
            if (lane < CLUSTER) send(moments + (rank * MOMENT_ROWS + job) * 4, mean, first, second, 0.0f, measured, lane);
        }
        barrier_wait(measured, 0);
        float* const normals = moments + CLUSTER * MOMENT_ROWS * 4;
        for (int row = warp; row < rows_here; row += WARPS) {
            const Normal normal = combine<NORM == 1>(
                CLUSTER * sharers, K, static_cast<float>(eps),
                [&](int part) {
                    const int r = part >> share_bits, wide = max(min(min((r + 1) * RANGE, K64) * 64, K) - r * RANGE * 64, 0);
                    return max(min(share_of(wide), wide - (part & (sharers - 1)) * share_of(wide)), 0);
                },
                [&](int part) {
                    const int at = (part >> share_bits) * MOMENT_ROWS + (row << share_bits) + (part & (sharers - 1));
                    const float4 of = *reinterpret_cast<const float4*>(moments + at * 4);
                    return Moments{of.x, of.y, of.z};
                });
            if (lane == 0) *reinterpret_cast<float4*>(normals + row * 4) = float4{normal.centre, normal.off, normal.scale, 0.0f};
        }
        sync_part(1, THREADS);
        // Now a thread has eight columns of several rows, so that the norm's weight is read once and not once a row.
        for (int group = my_columns; group < RANGE * 8 && my_set < SETS; group += THREADS) {
            if (begin * 64 + group * 8 >= K) break;
            if (group != my_columns) load_norm(group);
#pragma unroll 2
            for (int row = my_set; row < rows_here; row += SETS) {
                const float4 n = *reinterpret_cast<const float4*>(normals + row * 4);
                const Normal normal{n.x, n.y, n.z};
                float value[8];
                load_vector(piece_at(row, group * 8), value);
#pragma unroll
                for (int e = 0; e < 8; ++e) value[e] = normal(value[e]) * to_float(by.lane[e]) + (NORM_BIAS ? to_float(plus.lane[e]) : 0.0f);
                store_vector(piece_at(row, group * 8), value);
            }
        }
    }

    // Phase 6, of a step: SUM_ROWS rows of a tile. When all its sums are there, they are added up in order, so that the
    // result never depends on timing, and stored. Four features a thread.
    const int passes = PASSES == 1 ? 1 : (rows_here + SUM_ROWS - 1) / SUM_ROWS;
    const int steps = (TILES - worker + workers - 1) / workers * passes;  // of this worker; it has at least one tile
    auto blocks_of = [&](int pass) { return min((rows_here + 7) / 8 - pass * PASS_BLOCKS, PASS_BLOCKS); };
    auto expect = [&](int step) {
        if (threadIdx.x == 0 && step < steps) barrier_expect(summed + step % BUFFERS, SOURCES * OWNED * 512 * blocks_of(step % passes));
    };
    auto finish = [&](int step, int n_tile) {
        const int pass = step % passes, blocks = blocks_of(pass);
        const float* const sums = all_sums + step % BUFFERS * SUMS;
        barrier_wait(summed + step % BUFFERS, step / BUFFERS % 2);
        expect(step + BUFFERS);
        constexpr int STRIPS_OUT = ACT == SILU_MUL ? OWNED / 2 : OWNED;
        for (int piece = threadIdx.x; piece < STRIPS_OUT * blocks * 32; piece += THREADS) {
            const int strip = piece / 32 % STRIPS_OUT, block = piece / (32 * STRIPS_OUT);
            const int row = pass * SUM_ROWS + block * 8 + lane / 4, column = lane % 4 * 4;  // of the tile; of the strip
            const int feature = n_tile * BLOCK_OUT + (rank * STRIPS_OUT + strip) * 16 + column;
            const long long m = first_row + row;
            if (row >= rows_here || feature >= N_OUT) continue;
            // A strip's sums lie as the tensor cores left them: lane 4 g + t has rows 2 t, 2 t + 1 of features g and g + 8.
            const int at = column % 8 * 16 + row % 8 / 2 * 4 + column / 8 * 2 + row % 2;
            finish_four<ACT, BIAS, RESIDUAL, N, SPLIT1, SPLIT2>(bias, residual, y, rows, m, feature, [&](int which, float (&value)[4]) {
#pragma unroll
                for (int e = 0; e < 4; ++e) value[e] = 0.0f;
#pragma unroll
                for (int source = 0; source < SOURCES; ++source)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int of = source * OWNED + (ACT == SILU_MUL ? strip * 2 + which : strip);
                        value[e] += sums[(of * PASS_BLOCKS + block) * 128 + at + e * 16];
                    }
            });
        }
        __syncwarp();
        // Not after the last steps: nobody waits for it, and the other block might be gone.
        if (step + BUFFERS < steps) warp_arrive_at<CLUSTER>(stored + step % BUFFERS, lane);
    };

    // Phase 4: the product, tile after tile.
    const unsigned x_rows = wgmma_rows(tile);
    const unsigned char* const my_weights = ring + (team * SLICES + slice) * WEIGHT_BYTES + warp_n % 4 * 512 + lane * 16;
    const unsigned char* const my_scales =
        ring + Stages::SCALES + (team * SLICES + slice) * SCALE_BYTES + (warp_n % 4 * 16 + row8 * 2) * sizeof(S);
    const unsigned char* const my_zeros =
        ring + Stages::ZEROS + (team * SLICES + slice) * ZERO_BYTES + warp_n % 4 * (2 * BITS) + row8 * (BITS / 4);
    int slot = 0, turn = 0, step = 0, unfinished = worker;
#pragma unroll
    for (int b = 0; b < BUFFERS; ++b) expect(b);
    wait_copies<0>();
    fence_async();
    sync_part(1, THREADS);
    for (int n_tile = worker; n_tile < TILES; n_tile += workers) {
        float total[TILE_M / 2];
#pragma unroll
        for (int i = 0; i < TILE_M / 2; ++i) total[i] = 0.0f;
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            const int unit = stage * SLICES + slice, at = slot * STAGE;
            barrier_wait(filled + slot, turn);
            if (unit < units) {
                const unsigned x_unit = x_rows + unit * (2 * TILE_M * 128 / 16);
                const auto words = Weights::load<8 / Weights::LOADED>(my_weights + at);
                float scale[PARTS][2];  // of features g and g + 8
                unsigned zero_points[PARTS];
#pragma unroll
                for (int i = 0; i < PARTS; ++i) {
                    const Vector<S, 2> pair = *reinterpret_cast<const Vector<S, 2>*>(my_scales + at + i * 64 * sizeof(S));
                    scale[i][0] = to_float(pair.lane[0]) * LARGER, scale[i][1] = to_float(pair.lane[1]) * LARGER;
                    zero_points[i] = Weights::MIDDLE;
                    if constexpr (ZEROS) zero_points[i] = Weights::zeros_of(my_zeros + (at + i * Weights::ZERO_ROW));
                    // Half a unit has no scales for its other half, only what was in the ring before.
                    if (K64 % 2 != 0 && PARTS > 1 && i >= PARTS / 2 && begin + unit * 2 + 1 >= K64) scale[i][0] = scale[i][1] = 0.0f;
                }
                unsigned a[8][4];
#pragma unroll
                for (int first = 0; first < PARTS; first += TOGETHER) {
                    float part[TOGETHER][TILE_M / 2];
#pragma unroll
                    for (int half = 0; half < TOGETHER * STEPS; half += 4) {  // the tensor cores begin when half is unpacked
                        const int from = first * STEPS + half;
                        const int upto = from + (TOGETHER * STEPS < 4 ? TOGETHER * STEPS : 4);
#pragma unroll
                        for (int step = from; step < upto; ++step)
                            Weights::unpack<X>(words.word + step * Weights::WORDS, zero_points[step / STEPS], a[step]);
                        wgmma_fence();
#pragma unroll
                        for (int step = from; step < upto; ++step)
                            wgmma_add<X>(part[step / STEPS - first], a[step],
                                         x_unit + (step / 4 * TILE_M * 128 + step % 4 * 32) / 16, step % STEPS != 0);
                    }
                    wgmma_commit();
                    if (first == 0) warp_arrive(used + slot, lane);  // this warp has read the stage
                    wgmma_wait<0>();
#pragma unroll
                    for (int p = 0; p < TOGETHER; ++p) {
                        arrived(part[p]);
#pragma unroll
                        for (int i = 0; i < TILE_M / 2; ++i) total[i] += scale[first + p][i / 2 % 2] * part[p][i];
                    }
                }
            } else {
                warp_arrive(used + slot, lane);
            }
            if (++slot == AHEAD) slot = 0, turn ^= 1;
        }

        // Phase 5: every warp sends its sums to the block that owns their features, and goes on; those of the step before
        // are added up meanwhile. With silu_mul the strips of two warpgroups belong together in pairs.
        const int strip = ACT == SILU_MUL ? (team / 2 * 4 + warp_n % 4) * 2 + team % 2 : warp_n;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass, ++step) {
            if (pass >= passes) break;
            if (BUFFERS == 1 && step > 0) finish(step - 1, unfinished);
            float* const to = all_sums + step % BUFFERS * SUMS +
                              (((rank * SLICES + slice) * OWNED + strip % OWNED) * PASS_BLOCKS) * 128 + lane * 4;
            if (step >= BUFFERS) barrier_wait(stored + step % BUFFERS, (step / BUFFERS - 1) % 2);
#pragma unroll
            for (int block = 0; block < PASS_BLOCKS; ++block) {
                const float* v = total + (pass * PASS_BLOCKS + block) * 4;
                if (block < blocks_of(pass)) send(to + block * 128, v[0], v[1], v[2], v[3], summed + step % BUFFERS, strip / OWNED);
            }
            if (BUFFERS == 2 && step > 0) finish(step - 1, unfinished);
            unfinished = n_tile;
        }
    }
    finish(step - 1, unfinished);
}
